"""The trainer's loss and gradients against an independent reference, however a step is cut into micro-batches."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from small_checkpoint import small_model
from training_samples import Weighted, random_samples
from transformers import AutoModelForCausalLM, AutoProcessor

from transformers_worldvla.data import WorldVLADataCollator
from transformers_worldvla.training import WorldVLATrainer, WorldVLATrainingArguments

ALPHA, Z = 0.04, 1e-3


def reference_loss(
    model: Any, processor: Any, samples: list[Any], reduction: str, weights: list[float]
) -> torch.Tensor:
    """The loss of samples, each run alone with whole logits; written from the paper and the authors' code."""
    action, world, classes, z = [], [], [], []
    action_weight = world_weight = class_weight = 0.0
    codes = processor.tokens.image_codes
    for sample, weight in zip(samples, weights, strict=True):
        batch = WorldVLADataCollator(processor)([sample])
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[0, :-1]
        labels = batch["labels"][0, 1:]
        for row, label in zip(logits, labels.tolist(), strict=True):
            if label == -100:
                continue
            loss = F.cross_entropy(row[None].double(), torch.tensor([label])) * weight
            by_class = ALPHA if min(codes) - 1 <= label <= max(codes) - 1 else 1.0
            classes.append(loss * by_class)
            class_weight += weight * by_class
            z.append(row.double().logsumexp(-1) ** 2)
            if sample["target_actions"] is not None:
                action.append(loss)
                action_weight += weight
            else:
                world.append(loss)
                world_weight += weight
    z_loss = torch.stack(z).mean()
    if reduction == "authors":
        return torch.stack(classes).sum() / class_weight + Z * z_loss
    total = torch.stack(action).sum() / action_weight if action else 0.0
    total += ALPHA * torch.stack(world).sum() / world_weight if world else 0.0
    return total + Z * z_loss


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def mixed_samples(processor: Any) -> tuple[list[Any], list[float]]:
    """Action and world samples of several lengths, and weights for them."""
    samples = random_samples(processor, count=1, steps=7, history_dropout=0.5)
    return [samples[item] for item in (0, 1, 3, 4, 5, 6, 8, 9)], [1.0, 2.0, 0.5, 1.0, 3.0, 1.0, 0.25, 1.0]


def train_one_step(trainer: Any) -> dict[str, torch.Tensor]:
    """Gradients of the first optimizer step."""
    recorded, backward = {}, trainer.accelerator.backward

    def record(loss: torch.Tensor, **kwargs: Any) -> None:
        backward(loss, **kwargs)
        recorded.update(gradients(trainer.model))

    trainer.accelerator.backward = record
    trainer.train()
    return recorded


@pytest.mark.parametrize("reduction", ["paper", "authors"])
@pytest.mark.parametrize(
    ("batch_size", "accumulation", "packing"),
    [(8, 1, False), (2, 4, False), pytest.param(1, 8, False, marks=pytest.mark.slow), (4, 2, True)],
)
def test_gradients_are_those_of_one_big_batch(
    processor: Any,
    make_trainer: Callable[..., WorldVLATrainer],
    reduction: str,
    batch_size: int,
    accumulation: int,
    packing: bool,
) -> None:
    samples, weights = mixed_samples(processor)
    trainer = make_trainer(
        processor,
        Weighted(samples, weights),
        data_collator=WorldVLADataCollator(processor, packing, max_length=400 if packing else None),
        max_steps=1,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=0.0,
        learning_rate=0.0,
        loss_reduction=reduction,
        world_loss_weight=ALPHA,
        z_loss_weight=Z,
    )
    recorded = train_one_step(trainer)

    reference = small_model(processor)
    wanted = reference_loss(reference, processor, samples, reduction, weights)
    wanted.backward()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(wanted.item(), rel=1e-6)
    assert recorded.keys() == gradients(reference).keys()
    for name, gradient in gradients(reference).items():
        torch.testing.assert_close(recorded[name], gradient, rtol=1e-4, atol=1e-6)


def test_logs_the_parts_of_the_loss(processor: Any, make_trainer: Callable[..., WorldVLATrainer]) -> None:
    samples, _ = mixed_samples(processor)
    arguments = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3, "max_steps": 1}
    trainer = make_trainer(processor, samples, learning_rate=0.0, **arguments)
    trainer.train()
    logged, model = trainer.state.log_history[0], small_model(processor)
    acting = [sample for sample in samples if sample["target_actions"] is not None]
    imagining = [sample for sample in samples if sample["target_actions"] is None]
    for name, part, alpha in (("action_loss", acting, 1.0), ("world_loss", imagining, ALPHA)):
        wanted = reference_loss(model, processor, part, "paper", [1.0] * len(part)).item() - z_part(
            model, processor, part
        )
        assert logged[name] == pytest.approx(wanted / alpha, rel=1e-5)
    assert logged["z_loss"] == pytest.approx(z_part(model, processor, samples) / Z, rel=1e-5)


def z_part(model: Any, processor: Any, samples: list[Any]) -> float:
    """The z part of `reference_loss`."""
    values = []
    for sample in samples:
        batch = WorldVLADataCollator(processor)([sample])
        logits = model(input_ids=batch["input_ids"]).logits[0, :-1].double()
        values.append(logits.logsumexp(-1).square()[batch["labels"][0, 1:] != -100])
    return Z * torch.cat(values).mean().item()


@pytest.mark.parametrize("reduction", ["paper", "authors"])
def test_evaluates_a_data_set_as_one_batch(
    processor: Any, make_trainer: Callable[..., WorldVLATrainer], reduction: str
) -> None:
    samples, _ = mixed_samples(processor)
    sets = {"val_ind": samples[:5], "val_ood": samples[2:]}
    trainer = make_trainer(
        processor, samples, eval_dataset=sets, per_device_eval_batch_size=2, loss_reduction=reduction, z_loss_weight=Z
    )
    metrics = trainer.evaluate()
    for name, part in sets.items():
        wanted = reference_loss(small_model(processor), processor, part, reduction, [1.0] * len(part))
        assert metrics[f"eval_{name}_loss"] == pytest.approx(wanted.item(), rel=1e-5)
        assert {f"eval_{name}_{part}" for part in ("action_loss", "world_loss", "l1/gripper")} <= metrics.keys()


def test_pictures_give_the_loss_of_their_codes(processor: Any, make_trainer: Callable[..., WorldVLATrainer]) -> None:
    model = small_model(processor)
    rng = np.random.default_rng(0)
    frames = [Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(2)]
    pixels = processor.image_processor(images=frames, return_tensors="pt")["pixel_values"]
    codes = model.tokenize_images(pixels).numpy()
    action = np.zeros((1, 7))
    losses = []
    for shown, target in (("images", "target_images"), ("image_tokens", "target_image_tokens")):
        pictures = frames if shown == "images" else codes
        sample = {shown: [pictures[0]], target: [pictures[1]], "actions": action, "embodiment": "libero"}
        trainer = make_trainer(processor, [sample], max_steps=1, learning_rate=0.0, loss_reduction="authors")
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_writes_its_fields_and_the_robot_into_the_model(
    two_robots: Any, make_trainer: Callable[..., WorldVLATrainer]
) -> None:
    model = small_model(two_robots)
    make_trainer(two_robots, [], model, dropout=0.25, world_loss_weight=0.5, z_loss_weight=0.0)
    assert model.config.world_loss_weight == 0.5 and model.config.z_loss_weight == 0.0
    assert {layer.dropout.p for layer in model.model.layers} == {0.25}
    assert model.config.action_dim is None, "two robots of different D"
    two_robots.embodiments.pop("libero")
    make_trainer(two_robots, [], model)
    assert model.config.action_dim == 3 and model.config.world_loss_weight == 0.5, "None keeps what is there"


def test_a_checkpoint_is_complete_and_ends_with_the_separator(
    processor: Any, make_trainer: Callable[..., WorldVLATrainer], tmp_path: Path
) -> None:
    make_trainer(processor, mixed_samples(processor)[0], save_strategy="steps", save_steps=2).train()
    folder = tmp_path / "run" / "checkpoint-2"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert AutoProcessor.from_pretrained(folder).embodiments.keys() == {"libero"}
    separator = processor.tokens.separator
    assert separator != processor.tokenizer.eos_token_id
    assert model.generation_config.eos_token_id == model.config.eos_token_id == separator


def test_image_tokenizer_stays_as_it_is(processor: Any, make_trainer: Callable[..., WorldVLATrainer]) -> None:
    model = small_model(processor)
    before = {name: value.clone() for name, value in model.model.vqmodel.state_dict().items()}
    other = model.lm_head.weight.clone()
    make_trainer(processor, mixed_samples(processor)[0], model, bf16=True, learning_rate=1e-2).train()
    assert not torch.equal(model.lm_head.weight, other)
    for name, value in model.model.vqmodel.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, before[name])


def test_training_lowers_the_loss(processor: Any, make_trainer: Callable[..., WorldVLATrainer]) -> None:
    samples = mixed_samples(processor)[0][2:4]
    trainer = make_trainer(
        processor, samples, max_steps=10, per_device_train_batch_size=2, learning_rate=2e-2, world_loss_weight=1.0
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]


def test_says_what_is_missing(processor: Any, tmp_path: Path) -> None:
    arguments = WorldVLATrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(ValueError, match="processing_class=processor"):
        WorldVLATrainer(small_model(processor), arguments)
    arguments.remove_unused_columns = True
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        WorldVLATrainer(small_model(processor), arguments, processing_class=processor)
