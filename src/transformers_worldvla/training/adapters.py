"""LoRA adapters: which linears and tokens they train, folders that open by themselves, and the verified merge.

An adapter folder holds what PEFT writes (weights and the name of the base), the processor, and `worldvla_adapter.json`
with the fields of the model that training changed and a fingerprint of the base. It must not hold a `config.json`:
transformers would take it for a whole model.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from ..configuration_worldvla import WorldVLAConfig
from ..modeling_worldvla import ADAPTER_FIELDS_FILE, WorldVLAForCausalLM
from ..processing_worldvla import WorldVLAProcessor
from ..tokens_worldvla import WorldVLATokens
from .card import copy_training_section

ADAPTER_CONFIG = "adapter_config.json"
STATISTICS_FILE = "training_statistics.json"  # of the training actions; whoever measures a checkpoint reads it
TARGETS = r".*\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
TOKEN_KINDS = ("action", "image")
MODEL_FIELDS = ("action_dim", "num_cameras")
MERGE_TOLERANCE = 1e-3  # of the largest logit, in float32


def peft() -> Any:
    """The `peft` package. ImportError that names the extra."""
    try:
        return import_module("peft")
    except ModuleNotFoundError as error:
        if error.name != "peft":
            raise
        raise ImportError('adapters need peft: pip install "transformers_worldvla[train]"') from None


def is_peft_model(model: Any) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def base_model(model: Any) -> WorldVLAForCausalLM:
    """The WorldVLA model inside a PEFT model; any other model as it is."""
    return model.get_base_model() if is_peft_model(model) else model


def is_adapter(folder: str | Path) -> bool:
    """Whether this is a folder of an adapter."""
    return (Path(folder) / ADAPTER_CONFIG).is_file()


def trainable_tokens(model: WorldVLAForCausalLM, kinds: Sequence[str] = ("action",)) -> list[int]:
    """Tokens whose rows in the embedding and the head are trained beside the low-rank matrices.

    Of `kinds`, `action` are the action tokens, which mean something else to a base that never acted; `image` those of
    image blocks, whose codes mean something else where the image tokenizer was trained on. They also belong to it where
    the head has only zeros for them, as in the authors' starting point (`chameleon/starting_point`), which never draws.
    Raises ValueError for another kind.
    """
    if unknown := sorted(set(kinds) - set(TOKEN_KINDS)):
        raise ValueError(f"kinds of trainable tokens are {', '.join(TOKEN_KINDS)}, not {unknown[0]!r}")
    groups = token_groups(model.tokens)
    rows = model.lm_head.weight[torch.tensor(model.tokens.image_codes, device=model.lm_head.weight.device)]
    never_drew = not rows.is_meta and not bool(rows.any())
    return sorted(token for kind in {*kinds, *(["image"] if never_drew else [])} for token in groups[kind])


def token_groups(tokens: WorldVLATokens) -> dict[str, list[int]]:
    """The ids of each of `TOKEN_KINDS`."""
    images = [tokens.image_start, tokens.image_end, tokens.image_newline, *tokens.grids.values(), *tokens.image_codes]
    return {"action": [tokens.action_start, tokens.action_end, *tokens.action_bins], "image": images}


def add_lora(
    model: WorldVLAForCausalLM,
    rank: int = 32,
    alpha: int | None = None,
    dropout: float = 0.0,
    tokens: Sequence[int] | None = None,
    token_kinds: Sequence[str] = ("action",),
) -> Any:
    """Wrap the model so that only an adapter is trained: LoRA on the seven linears of every layer, and token rows.

    Args:
        rank: of the low-rank matrices.
        alpha: their scale is alpha / rank; min(rank, 16) by default, as OpenVLA's fine-tuning script has it.
        dropout: on the input of the low-rank matrices.
        tokens: ids whose rows in the embedding and the head are trained, by default `trainable_tokens` of
            `token_kinds`. Rows alone are kept (PEFT's `trainable_token_indices`): both whole matrices of the 7B model
            with gradients and AdamW states would be 8.6 GB, 258 rows are 34 MB.

    Returns:
        The PEFT model. Its trained weights are float32 whatever the dtype of the base.
    """
    library = peft()
    tokens = trainable_tokens(model, token_kinds) if tokens is None else sorted(tokens)
    rows = {"embed_tokens": tokens} if model.config.tie_word_embeddings else {"embed_tokens": tokens, "lm_head": tokens}
    config = library.LoraConfig(
        r=rank,
        lora_alpha=min(rank, 16) if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=TARGETS,
        trainable_token_indices=rows if tokens else None,
        task_type="CAUSAL_LM",
    )
    return library.get_peft_model(model, config)


def open_adapter(adapter: str | Path, base: str | None = None, trainable: bool = False, **options: Any) -> Any:
    """The PEFT model of an adapter folder over its base; `options` go to the base's `from_pretrained`.

    Raises ValueError when the base is not the one that the adapter was trained on.
    """
    adapter = Path(adapter)
    if not is_adapter(adapter):
        raise ValueError(f"{adapter} holds no adapter ({ADAPTER_CONFIG} is missing)")
    facts = json.loads((adapter / ADAPTER_FIELDS_FILE).read_text(encoding="utf-8"))
    base = base or json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
    model = WorldVLAForCausalLM.from_pretrained(base, **options).eval()
    if fingerprint(model) != facts["base_fingerprint"]:
        raise ValueError(f"{base} is not the base that {adapter} was trained on: its weights differ")
    for name, value in facts["model_fields"].items():
        setattr(model.config, name, value)
    model.config.name_or_path = str(base)
    return peft().PeftModel.from_pretrained(model, adapter, is_trainable=trainable)


# ---------------------------------------------------------------- folders


def write_adapter_facts(folder: str | Path, config: Any, base_fingerprint: str) -> None:
    """Add to what PEFT wrote the model's fields and the fingerprint of the base."""
    document = {
        "model_fields": {name: getattr(config, name) for name in MODEL_FIELDS},
        "base_fingerprint": base_fingerprint,
    }
    (Path(folder) / ADAPTER_FIELDS_FILE).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def fingerprint(model: WorldVLAForCausalLM) -> str:
    """A hash of the weights that every fine-tuning changes and none quantises, the same with or without an adapter.

    They are the norms, the rows of the action tokens in embedding and head, and the codebook, all as bfloat16.
    """
    digest = hashlib.sha256()
    rows = torch.tensor(model.tokens.action_bins)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "trainable_tokens" in name:
            continue
        if name.startswith("model.vqmodel.") and not name.endswith("quantize.embedding.weight"):
            continue
        if "embed_tokens." in name or "lm_head." in name:
            parameter = parameter.detach()[rows.to(parameter.device)]
        elif parameter.ndim > 1 and "norm" not in name and "quantize" not in name:
            continue
        digest.update(parameter.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


# ---------------------------------------------------------------- merge


def merge_adapter(
    adapter: str | Path, output: str | Path, base: str | None = None, dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """Write `output`: a checkpoint with the adapter's low-rank matrices and token rows added to its base.

    Everything is done in float32 on the CPU; then the decoder is rounded to `dtype`. Logits of a fixed sequence are
    compared before and after the merge, and again after opening the written checkpoint.

    Args:
        adapter: a folder as `WorldVLATrainer` writes it.
        output: a new or empty folder.
        base: the base model, where it is no longer where the adapter says.
        dtype: of the weights on disk; by default that of the base.

    Returns:
        `base`, `max_logit`, and the largest logit differences `merge_difference` and `saved_difference`.

    Raises:
        ValueError: no adapter, another base than the one it was trained on, an output that is not empty, or logits
            that differ. Nothing is left in `output` then.
    """
    adapter, output = Path(adapter), Path(output)
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty: merge into a new folder")
    adapted = open_adapter(adapter, base, dtype=torch.float32).eval()
    source = base_model(adapted).config.name_or_path
    probe = _probe(base_model(adapted))
    with torch.no_grad():
        wanted = adapted(input_ids=probe).logits
        merged = adapted.merge_and_unload(safe_merge=True)
        after = merged(input_ids=probe).logits
    report = {
        "base": source,
        "max_logit": wanted.abs().max().item(),
        "merge_difference": (after - wanted).abs().max().item(),
    }
    _check(report["merge_difference"], MERGE_TOLERANCE * report["max_logit"], "merging")
    stored = dtype or WorldVLAConfig.from_pretrained(source).dtype or torch.float32
    return report | _save_merged(merged, adapter, output, stored, probe)


def _save_merged(
    merged: WorldVLAForCausalLM, adapter: Path, output: Path, dtype: torch.dtype, probe: torch.Tensor
) -> dict[str, Any]:
    """Write beside `output`, open again, compare, move into place."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".merge-", dir=output.parent) as staging:
        folder = Path(staging) / "checkpoint"
        cast_decoder(merged, dtype)
        cast_decoder(merged, torch.float32)  # the rounded weights, computed with in float32
        with torch.no_grad():
            wanted = merged(input_ids=probe).logits
        cast_decoder(merged, dtype)
        merged.config.dtype = dtype
        merged.save_pretrained(folder)
        WorldVLAProcessor.from_pretrained(adapter, trust_remote_code=False).save_pretrained(folder)
        copy_training_section(adapter, folder)
        if (adapter / STATISTICS_FILE).is_file():
            shutil.copyfile(adapter / STATISTICS_FILE, folder / STATISTICS_FILE)
        reopened = WorldVLAForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            difference = (reopened(input_ids=probe).logits - wanted).abs().max().item()
        _check(difference, MERGE_TOLERANCE * wanted.abs().max().item(), "writing")
        if output.exists():
            output.rmdir()
        folder.rename(output)
    return {"output": str(output), "dtype": str(dtype).removeprefix("torch."), "saved_difference": difference}


def cast_decoder(model: WorldVLAForCausalLM, dtype: torch.dtype) -> None:
    """All weights but the image tokenizer's, which stay in float32."""
    for name, parameter in model.named_parameters():
        if not name.startswith("model.vqmodel."):
            parameter.data = parameter.data.to(dtype)


def _check(difference: float, tolerance: float, doing: str) -> None:
    if not difference <= tolerance:
        raise ValueError(
            f"{doing} changed the logits by {difference:.3g} (at most {tolerance:.3g}): nothing was written"
        )


def _probe(model: WorldVLAForCausalLM) -> torch.Tensor:
    """Ids (1, length) of a fixed sequence with every kind of token."""
    tokens = model.tokens
    side = 2 * min(tokens.grids)
    codes = torch.tensor(tokens.image_codes)[torch.arange(side * side) * 7919 % len(tokens.image_codes)]
    image = tokens.image_block(codes.view(side, side).numpy())
    bins = [tokens.action_bins[number] for number in (0, 31, 77, 128, 200, 254, 255)]
    sequence = tokens.sequence([], [image, tokens.action_block(bins)], [tokens.action_block(bins)])
    return torch.tensor([sequence.ids])
