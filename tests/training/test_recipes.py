"""The authors' recipe against their published numbers, and what the others promise."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_checkpoint import small_model, write_checkpoint
from training_samples import random_samples

from transformers_worldvla.training import RECIPES, WorldVLATrainer
from transformers_worldvla.training.datasets import SampleOptions
from transformers_worldvla.training.recipes import load_for_training
from transformers_worldvla.training.run import RunOptions, RunSettings, steps_per_epoch, training_arguments


def arguments_of(tmp_path: Path, recipe: str, samples: int, **settings: Any) -> Any:
    return training_arguments(
        RunSettings("model", recipe, SampleOptions(), **settings),
        RunOptions(tmp_path, use_cpu=True, eval_every=None),
        samples,
    )


def test_the_authors_numbers(tmp_path: Path) -> None:
    """exps_*/*.sh, pretrain_solver_ck.py and the published args.json."""
    arguments = arguments_of(tmp_path, "authors", samples=256 * 1000)
    published = {
        "learning_rate": 5e-6, "adam_beta1": 0.9, "adam_beta2": 0.95, "adam_epsilon": 1e-8, "weight_decay": 0.1,
        "max_grad_norm": 4.0, "per_device_train_batch_size": 8, "seed": 0, "z_loss_weight": 1e-5, "dropout": 0.05,
        "world_loss_weight": 0.04, "loss_reduction": "authors", "gradient_checkpointing": True,
        "max_steps": 40 * 1000, "warmup_steps": 10,
    }  # fmt: skip
    assert {name: getattr(arguments, name) for name in published} == published
    assert arguments.gradient_accumulation_steps == 32, "256 samples a step on one device, as on their 32"


def test_a_schedule_of_ones_own(tmp_path: Path) -> None:
    schedules = {name: arguments_of(tmp_path, "lora", 80, schedule=name) for name in (None, "constant", "cosine")}
    found = {name: str(arguments.lr_scheduler_type.value) for name, arguments in schedules.items()}
    assert found == {None: "constant_with_warmup", "constant": "constant_with_warmup", "cosine": "cosine"}
    warmups = [arguments_of(tmp_path, "lora", 8000, steps=500, **chosen) for chosen in ({}, {"warmup_steps": 20})]
    assert [arguments.warmup_steps for arguments in warmups] == [100, 20], "a tenth of 1000 batches, and as asked"


def test_the_authors_schedule_and_decay(processor: Any, make_trainer: Callable[..., WorldVLATrainer]) -> None:
    recipe = RECIPES["authors"]
    arguments = {**recipe.arguments, "gradient_checkpointing": False, "warmup_steps": 4}
    model = small_model(processor)
    trainer = make_trainer(processor, random_samples(processor), model, max_steps=8, **arguments)
    trainer.create_optimizer_and_scheduler(8)
    rates = []
    for _ in range(8):
        rates.append(trainer.lr_scheduler.get_last_lr()[0])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert rates == pytest.approx([0, 1.25e-6, 2.5e-6, 3.75e-6, 5e-6, 5e-6, 5e-6, 5e-6]), "linear from 0, then constant"
    decayed = [p for group in trainer.optimizer.param_groups if group["weight_decay"] == 0.1 for p in group["params"]]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in decayed} == {id(p) for p in trained}, "norms too"


@pytest.mark.parametrize(
    ("samples", "batch", "accumulation", "drop_last", "steps"),
    [(100, 8, 1, False, 13), (100, 8, 1, True, 12), (100, 8, 4, False, 4), (7, 8, 1, True, 0)],
)
def test_counts_steps_as_the_trainer_does(
    processor: Any,
    make_trainer: Callable[..., WorldVLATrainer],
    samples: int,
    batch: int,
    accumulation: int,
    drop_last: bool,
    steps: int,
) -> None:
    assert steps_per_epoch(samples, batch, accumulation, drop_last) == steps
    trainer = make_trainer(
        processor,
        [{}] * samples,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        dataloader_drop_last=drop_last,
    )
    batches = len(trainer.get_train_dataloader())
    assert -(-batches // accumulation) == steps


def test_what_is_given_wins(tmp_path: Path) -> None:
    arguments = arguments_of(tmp_path, "lora", 80, epochs=3, batch_size=4, learning_rate=1.0, accumulation=2, seed=5)
    assert (arguments.max_steps, arguments.learning_rate, arguments.seed) == (30, 1.0, 5)
    assert (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps) == (4, 2)
    assert arguments_of(tmp_path, "lora", 80, steps=7).max_steps == 7
    with pytest.raises(ValueError, match="5 training samples do not fill one batch of 8"):
        arguments_of(tmp_path, "authors", 5)


def test_precision_of_what_is_trained_and_what_is_not(tmp_path: Path) -> None:
    base = str(write_checkpoint(tmp_path / "base"))
    full = load_for_training(base, RECIPES["full"], bf16=True)
    assert {p.dtype for p in full.parameters()} == {torch.float32}
    adapted = load_for_training(base, RECIPES["lora"], bf16=True, lora={"rank": 2})
    trained = {p.dtype for p in adapted.parameters() if p.requires_grad}
    frozen = {p.dtype for name, p in adapted.named_parameters() if not p.requires_grad and "vqmodel" not in name}
    image_tokenizer = {p.dtype for name, p in adapted.named_parameters() if "vqmodel" in name}
    assert (trained, frozen, image_tokenizer) == ({torch.float32}, {torch.bfloat16}, {torch.float32})


@pytest.mark.parametrize("bf16", [False, True])
def test_four_bits_under_an_adapter(tmp_path: Path, bf16: bool) -> None:
    """Linears of the decoder are NF4; embedding, head and image tokenizer are not, and gradients reach the adapter."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: the extra qlora")
    base = write_checkpoint(tmp_path / "base", hidden_size=64, intermediate_size=64)  # NF4 has blocks of 64 weights
    model = load_for_training(str(base), RECIPES["qlora"], bf16=bf16, lora={"rank": 2})
    four_bits = {name for name, weight in model.named_parameters() if type(weight).__name__ == "Params4bit"}
    assert len(four_bits) == 7 * model.config.num_hidden_layers
    assert not [name for name in four_bits if "lm_head" in name or "vqmodel" in name]
    assert {p.dtype for name, p in model.named_parameters() if "vqmodel" in name} == {torch.float32}
    model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits.float().square().sum().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert all(p.grad.abs().sum() > 0 for name, p in trained.items() if "lora_B" in name)
