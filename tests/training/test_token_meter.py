"""Accuracies and action errors against a count by hand."""

from typing import Any

import numpy as np
import pytest
import torch
from small_checkpoint import GANTRY, LIBERO, small_model
from training_samples import random_samples

from transformers_worldvla.data import WorldVLADataCollator
from transformers_worldvla.training.metrics import TokenMeter, record_predictions


def count_by_hand(model: Any, processor: Any, samples: list[Any]) -> dict[str, float]:
    """Each sample alone, with whole logits and the processor's own decoding."""
    right: dict[str, list[bool]] = {"action_accuracy": [], "image_accuracy": []}
    errors: dict[str, list[float]] = {}
    tokens = processor.tokens
    for sample in samples:
        batch = WorldVLADataCollator(processor)([sample])
        logits = model(input_ids=batch["input_ids"]).logits[0, :-1]
        robot = processor.get_embodiment(sample["embodiment"])
        told, truth = [], []
        for row, label in zip(logits, batch["labels"][0, 1:].tolist(), strict=True):
            kind = {True: "action_accuracy", False: "image_accuracy"}[label in tokens.action_bins]
            if label in tokens.action_bins or label in tokens.image_codes:
                right[kind].append(int(row.argmax()) == label)
            if label in tokens.action_bins:
                told.append(max(tokens.action_bins, key=lambda token: row[token].item()))
                truth.append(label)
        if told:
            shape = (1, -1, robot.action_dim)
            values = [processor.decode_actions(np.reshape(ids, shape), robot.name) for ids in (told, truth)]
            for name, column in zip(robot.action_names, np.abs(values[0] - values[1])[0].T, strict=True):
                key = f"l1/{robot.name}/{name}" if len(processor.embodiments) > 1 else f"l1/{name}"
                errors.setdefault(key, []).extend(column.tolist())
    return {name: float(np.mean(values)) for name, values in {**right, **errors}.items()}


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("robots", ["one", "two"])
def test_counts_what_the_loss_saw(processor: Any, two_robots: Any, robots: str, packing: bool) -> None:
    processor = processor if robots == "one" else two_robots
    samples = [random_samples(processor)[item] for item in (0, 3, 6, 11)]
    if robots == "two":
        samples += [random_samples(processor, GANTRY)[item] for item in (1, 4, 7)]
    model = small_model(processor, loss_chunk_size=16, dropout=0.0).train()
    model.lm_head.weight.data[processor.tokens.action_bins[7]] *= 3  # so that something is right
    meter = TokenMeter(processor.tokens, [processor.get_embodiment(name) for name in processor.embodiments])
    collate = WorldVLADataCollator(processor, packing, max_length=500 if packing else None, embodiment_ids=True)
    for part in (samples[:3], samples[3:]):
        batch = collate(part)
        embodiments = batch.pop("embodiment_ids")
        with record_predictions(model.lm_head, processor.tokens.action_bins) as predictions:
            loss = model(**batch).loss
        loss.backward()  # computes chunks again, which must not be counted
        meter.update(batch, predictions, embodiments)
    wanted = count_by_hand(model.eval(), processor, samples)
    found = meter.compute()
    assert found.keys() == wanted.keys() and len(found) == (9 if robots == "one" else 12)
    assert found == pytest.approx(wanted, rel=1e-6)


def test_perfect_predictions_have_no_error(processor: Any) -> None:
    batch = WorldVLADataCollator(processor, embodiment_ids=True)([random_samples(processor)[0]])
    meter = TokenMeter(processor.tokens, [LIBERO])
    target = batch["labels"][:, 1:][batch["labels"][:, 1:] != -100]
    places = {token: place for place, token in enumerate(processor.tokens.action_bins)}
    with record_predictions(torch.nn.Identity(), processor.tokens.action_bins) as predictions:
        predictions.tokens.append(target)
        predictions.bins.append(torch.tensor([places.get(token, 0) for token in target.tolist()]))
    meter.update(batch, predictions, batch["embodiment_ids"])
    found = meter.compute()
    assert found["action_accuracy"] == 1.0 and "image_accuracy" not in found
    assert all(value == 0.0 for name, value in found.items() if name.startswith("l1/"))
    meter.reset()
    assert meter.compute() == {}
