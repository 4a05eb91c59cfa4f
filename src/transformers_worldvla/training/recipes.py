"""Named sets of hyper-parameters, and the model loaded as each of them needs it.

A recipe fixes what a run does not choose for itself; anything given explicitly wins. Where numbers are the authors' or
another project's, the source stands beside them.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..modeling_worldvla import WorldVLAForCausalLM
from .adapters import add_lora, is_adapter, open_adapter

QUANTIZED = "qlora"


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters of one kind of run.

    Attributes:
        summary: one line for people.
        adapter: None (every decoder weight is trained), `lora`, or `qlora` (a base of 4 bits).
        epochs: passes over the data.
        warmup_epochs: length of the linear warm-up from 0, in epochs.
        global_batch_size: samples of an optimizer step over all ranks, where the recipe fixes it; accumulation makes
            up for ranks that are not there.
        arguments: fields of `WorldVLATrainingArguments`.
    """

    name: str
    summary: str
    adapter: str | None = None
    epochs: float = 10
    warmup_epochs: float = 0.1
    global_batch_size: int | None = None
    arguments: dict[str, Any] = field(default_factory=dict)

    def accumulation(self, batch_size: int, ranks: int) -> int:
        """Micro-batches an optimizer step, for that many samples a rank and that many ranks."""
        if self.global_batch_size is None:
            return 1
        return max(1, round(self.global_batch_size / (batch_size * ranks)))


AUTHORS = Recipe(
    name="authors",
    summary="the released training code and published args.json: every decoder weight, global batch 256, 40 epochs",
    # exps_*/*.sh: 40 epochs, --warmup_epochs 0.01, linear from 0; lr_sched.py with min_lr = lr is constant after it
    epochs=40,
    warmup_epochs=0.01,
    # args.json of WorldVLA-ActionModel-LIBERO-Object-512 and -10-512: world_size 32 x batch 8 (the scripts themselves
    # start 2 or 4 GPUs)
    global_batch_size=256,
    arguments={
        # 5e-6 in both args.json; the names of the 256-pixel runs suggest 1e-6 for Long and 3e-6 for Spatial
        "learning_rate": 5e-6,
        "lr_scheduler_type": "constant_with_warmup",
        # pretrain_solver_ck...py: AdamW(betas=(0.9, 0.95), weight_decay=0.1) on all parameters, eps PyTorch's default
        "optim": "adamw_torch",
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-8,
        "weight_decay": 0.1,
        "decay_all_parameters": True,
        "max_grad_norm": 4.0,  # FSDP's global norm
        "per_device_train_batch_size": 8,
        "dataloader_drop_last": True,  # theirs cuts the remainder before shuffling, this one after
        "gradient_checkpointing": True,  # every decoder layer
        "seed": 0,
        # class weight 0.04 on ids 3..8194 in one weighted mean; z-loss 1e-5; dropout on both residual branches
        "loss_reduction": "authors",
        "world_loss_weight": 0.04,
        "z_loss_weight": 1e-5,
        "dropout": 0.05,
    },
)

LORA = Recipe(
    name="lora",
    summary="an adapter of rank 32 on the seven linears of every layer, and the rows of the action tokens",
    adapter="lora",
    epochs=10,
    arguments={
        # OpenVLA's vla-scripts/finetune.py: 5e-4 at rank 32, no dropout on the adapter
        "learning_rate": 5e-4,
        "lr_scheduler_type": "constant_with_warmup",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "per_device_train_batch_size": 8,
        "gradient_checkpointing": True,  # 8 samples of 512 pixels without it: 174 GB by `estimate_memory`, with it 27
    },
)

QLORA = Recipe(
    name=QUANTIZED,
    summary="as lora, over a base of 4 bits (bitsandbytes NF4)",
    adapter=QUANTIZED,
    epochs=LORA.epochs,
    # Dettmers et al. 2023 take 2e-4 up to 13B parameters
    arguments={**LORA.arguments, "learning_rate": 2e-4},
)

FULL = Recipe(
    name="full",
    summary="every decoder weight, with a cosine schedule",
    epochs=10,
    # no published source: the authors' rate, doubled for the mean of a cosine
    arguments={
        "learning_rate": 1e-5,
        "lr_scheduler_type": "cosine",
        "adam_beta2": 0.95,
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "per_device_train_batch_size": 8,
        "gradient_checkpointing": True,
    },
)

RECIPES = {recipe.name: recipe for recipe in (LORA, QLORA, FULL, AUTHORS)}


def check_quantization() -> None:
    """Raise ImportError in one line where a base of 4 bits cannot be loaded."""
    try:
        import bitsandbytes  # noqa: F401
    except ModuleNotFoundError:
        raise ImportError('qlora needs bitsandbytes: pip install "transformers_worldvla[qlora]"') from None


def load_for_training(
    checkpoint: str, recipe: Recipe, bf16: bool, lora: dict[str, Any] | None = None, **options: Any
) -> Any:
    """The model of a checkpoint as a recipe trains it: whole in float32, or frozen under a new adapter.

    Args:
        checkpoint: a folder or Hub id. A folder of an adapter goes on with that adapter.
        bf16: the precision of the computation. A frozen base is then stored in it too; weights that are trained stay
            in float32, for steps of 5e-6 are below bfloat16's resolution.
        lora: arguments of `add_lora`.
        options: further arguments of `from_pretrained`, such as `revision`.

    Raises:
        ValueError: an adapter folder for a recipe that trains everything.
        ImportError: `qlora` without bitsandbytes.
    """
    if recipe.adapter is None:
        if is_adapter(checkpoint):
            raise ValueError(f"{checkpoint} is an adapter: train it with the recipe lora, or merge it first")
        return WorldVLAForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, **options)
    options["dtype"] = torch.bfloat16 if bf16 else torch.float32
    if recipe.adapter == QUANTIZED:
        check_quantization()
        options["quantization_config"] = _four_bits()
    if is_adapter(checkpoint):
        return open_adapter(checkpoint, trainable=True, **options)
    model = WorldVLAForCausalLM.from_pretrained(checkpoint, **options)
    model.config.name_or_path = str(Path(checkpoint).resolve()) if Path(checkpoint).is_dir() else checkpoint
    return add_lora(model, **(lora or {}))


def _four_bits() -> Any:
    """NF4 with double quantisation; embedding, head and image tokenizer as they are."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head", "vqmodel"],
    )
