"""Loss and gradients of whole batches against a reference that shares no code with ours.

The reference spells every sample out token by token, runs a decoder written below in float64 on one sample at a time
(no padding, no packing, a dense mask made pair by pair, logits everywhere) and sums up the formulas label by label.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from robots import ROBOTS, samples_of, two_robots
from small_checkpoint import small_model

from transformers_worldvla import WorldVLAForCausalLM, WorldVLAProcessor
from transformers_worldvla.data import MixtureDataset, WorldVLADataCollator

ALPHA, Z_WEIGHT = 0.04, 0.01
PROMPTS = {
    "action": "What action should the robot take to {}?",
    "world": "Generate the next image based on the provided sequence of historical images and corresponding actions.",
    "video": "Generate the future image based on the task and current image. {}",
}

# -------------------------------------------------------------------- the reference


def spell(sample: dict[str, Any], processor: WorldVLAProcessor) -> dict[str, Any]:
    """Ids of a sample, where its answer starts, and its kind (paper section 3.3)."""
    name = processor.tokenizer.get_vocab()

    def image(codes: np.ndarray) -> list[int]:
        rows, columns = codes.shape
        ids = [name["<racm3:break>"], name[f"<reserved{8800 + rows // 2:05d}>"]]
        ids.append(name[f"<reserved{8800 + columns // 2:05d}>"])
        for row in codes.tolist():
            ids += [*row, name["<reserved08799>"]]
        return [*ids, name["<eoss>"]]

    def action(values: np.ndarray) -> list[int]:
        robot = ROBOTS[sample["embodiment"]]
        ids = [name["<reserved10000>"]]
        for value, low, high in zip(values.astype(np.float64), robot.low, robot.high, strict=True):
            scaled = min(max(2 * (value - low) / (high - low + 1e-8) - 1, -1.0), 1.0)
            edges_below = sum(edge <= scaled for edge in np.linspace(-1, 1, 256))
            ids.append(name[f"<reserved{10001 + edges_below}>"])
        return [*ids, name["<reserved15000>"]]

    kind = "world" if sample["actions"] is not None else "video" if sample["target_image_tokens"] else "action"
    ids = [name["<s>"], *processor.tokenizer(PROMPTS[kind].format(sample["instruction"]))["input_ids"]]
    for step, codes in enumerate(sample["image_tokens"]):
        ids += image(codes) + (action(sample["actions"][step]) if kind == "world" else [])
    ids.append(name["<reserved08706>"])
    start = len(ids)
    for codes in sample["target_image_tokens"] or []:
        ids += image(codes)
    for values in [] if sample["target_actions"] is None else sample["target_actions"]:
        ids += action(values)
    ids.append(name["<reserved08706>"])
    return {"ids": ids, "start": start, "kind": kind, "weight": sample["sample_weights"]}


def visible_pairs(ids: Sequence[int], start: int, begin: int, end: int) -> torch.Tensor:
    """Paper Figure 3b: causal, but no action of the answer sees another one: (length, length)."""
    block, blocks = 0, []
    for position, token in enumerate(ids):
        if token == begin and position >= start:
            block = position
        blocks.append(block)
        if token == end:
            block = 0
    visible = torch.zeros(len(ids), len(ids), dtype=torch.bool)
    for query in range(len(ids)):
        for key in range(query + 1):
            visible[query, key] = blocks[query] in (0, blocks[key]) or not blocks[key]
    return visible


def decode(weights: dict[str, torch.Tensor], ids: Sequence[int], visible: torch.Tensor, config: Any) -> torch.Tensor:
    """Chameleon's decoder in plain torch: logits (length, vocabulary)."""
    heads, length = config.num_attention_heads, len(ids)
    head_dim = config.hidden_size // heads
    # transformers computes the angles in float32; in float64 they would be others by 1e-5 at position 100
    frequencies = 1.0 / (config.rope_parameters["rope_theta"] ** (torch.arange(0, head_dim, 2).float() / head_dim))
    angles = torch.arange(length).float()[:, None] * frequencies
    cosine, sine = (torch.cat([f(angles)] * 2, -1).double()[:, None] for f in (torch.cos, torch.sin))

    def norm(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * gain

    def heads_of(x: torch.Tensor, layer: str, kind: str) -> torch.Tensor:
        """Queries or keys, normalised a head at a time and turned by their position."""
        x = (x @ weights[f"{layer}.self_attn.{kind}_proj.weight"].T).view(length, heads, head_dim)
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        x = x * weights[f"{layer}.self_attn.{kind}_norm.weight"] + weights[f"{layer}.self_attn.{kind}_norm.bias"]
        first, second = x.chunk(2, -1)
        return x * cosine + torch.cat([-second, first], -1) * sine

    x = weights["model.embed_tokens.weight"][torch.tensor(ids)]
    for number in range(config.num_hidden_layers):
        layer = f"model.layers.{number}"
        y = norm(x, weights[f"{layer}.input_layernorm.weight"])
        queries, keys = heads_of(y, layer, "q"), heads_of(y, layer, "k")
        values = (y @ weights[f"{layer}.self_attn.v_proj.weight"].T).view(length, heads, head_dim)
        scores = torch.einsum("qhd,khd->hqk", queries, keys) / math.sqrt(head_dim)
        mixed = torch.einsum("hqk,khd->qhd", scores.masked_fill(~visible, -math.inf).softmax(-1), values)
        x = x + mixed.reshape(length, -1) @ weights[f"{layer}.self_attn.o_proj.weight"].T
        y = norm(x, weights[f"{layer}.post_attention_layernorm.weight"])
        gate = torch.nn.functional.silu(y @ weights[f"{layer}.mlp.gate_proj.weight"].T)
        x = x + (gate * (y @ weights[f"{layer}.mlp.up_proj.weight"].T)) @ weights[f"{layer}.mlp.down_proj.weight"].T
    return norm(x, weights["model.norm.weight"]) @ weights["lm_head.weight"].T


def label_sums(spelled: list[dict[str, Any]], codes: list[int]) -> dict[str, float]:
    """What the loss of these samples is divided by."""
    sums = {"action": 0.0, "world": 0.0, "classes": 0.0, "count": 0}
    for sample in spelled:
        for label in sample["ids"][sample["start"] :]:
            sums["action" if sample["kind"] == "action" else "world"] += sample["weight"]
            # ids 3..8194 for codes 4..8195, as in the authors' code
            sums["classes"] += sample["weight"] * (ALPHA if min(codes) <= label + 1 <= max(codes) else 1.0)
            sums["count"] += 1
    return sums


def reference(
    model: WorldVLAForCausalLM, processor: WorldVLAProcessor, samples: list[dict[str, Any]], reduction: str
) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of some samples and its gradient, in float64."""
    name = processor.tokenizer.get_vocab()
    codes = [token for piece, token in name.items() if piece.startswith("IMGIMG")]
    weights = {
        key: value.detach().double().requires_grad_()
        for key, value in model.named_parameters()
        if not key.startswith("model.vqmodel.")
    }
    spelled = [spell(sample, processor) for sample in samples]
    sums = label_sums(spelled, codes)
    loss = torch.zeros((), dtype=torch.float64)
    for sample in spelled:
        ids, start, weight = sample["ids"], sample["start"], sample["weight"]
        visible = visible_pairs(ids, start, name["<reserved10000>"], name["<reserved15000>"])
        logits = decode(weights, ids, visible, model.config)
        for position in range(start, len(ids)):
            row, label = logits[position - 1], ids[position]
            entropy = row.logsumexp(0) - row[label]
            if reduction == "authors":
                class_weight = ALPHA if min(codes) <= label + 1 <= max(codes) else 1.0
                loss = loss + weight * class_weight * entropy / sums["classes"]
            elif sample["kind"] == "action":
                loss = loss + weight * entropy / sums["action"]
            else:
                loss = loss + ALPHA * weight * entropy / sums["world"]
            loss = loss + Z_WEIGHT * row.logsumexp(0) ** 2 / sums["count"]
    loss.backward()
    return loss.item(), {key: value.grad for key, value in weights.items()}


# -------------------------------------------------------------------- ours


@pytest.fixture(scope="module")
def processor() -> WorldVLAProcessor:
    return two_robots()


@pytest.fixture(scope="module")
def samples(processor) -> list[dict[str, Any]]:
    """Eight samples of three kinds and two robots, M = 2, N = 2, each with a weight of its own."""
    datasets = [samples_of(processor, robot, world_history=2) for robot in ROBOTS]
    mixture = MixtureDataset(datasets, seed=3, kind_weights={"action": 2, "world": 1, "video": 1}, samples_per_epoch=8)
    chosen = [mixture[item] for item in range(8)]
    assert (
        len({(sample["embodiment"], spell({**sample, "sample_weights": 1}, processor)["kind"]) for sample in chosen})
        == 6
    )
    return [{**sample, "sample_weights": 0.5 + 0.25 * number} for number, sample in enumerate(chosen)]


def build(processor: WorldVLAProcessor, reduction: str) -> WorldVLAForCausalLM:
    """In training mode, without the randomness; logits seven rows at a time."""
    fields = {"loss_reduction": reduction, "world_loss_weight": ALPHA, "z_loss_weight": Z_WEIGHT}
    return small_model(processor, dropout=0.0, loss_chunk_size=7, **fields).double().train()


def accumulate(
    model: WorldVLAForCausalLM, batches: list[dict[str, torch.Tensor]], sums: dict[str, float] | None
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients summed over micro-batches, which are divided by `sums` (None: by their own)."""
    arguments = ("action_weight_sum", "world_weight_sum", "class_weight_sum", "label_count")
    values = [] if sums is None else [torch.tensor(float(sums[key])) for key in ("action", "world", "classes", "count")]
    denominators = dict(zip(arguments, values, strict=False))
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = model(**batch, **denominators).loss
        loss.backward()
        total += loss.item()
    grads = {key: value.grad for key, value in model.named_parameters() if not key.startswith("model.vqmodel.")}
    return total, grads


@pytest.fixture(scope="module", params=["paper", "authors"])
def case(request, processor, samples) -> dict[str, Any]:
    """A model and what the reference says of the samples, once for each reduction."""
    model = build(processor, request.param)
    codes = list(processor.tokens.image_codes)
    return {
        "model": model,
        "expected": reference(model, processor, samples, request.param),
        "sums": label_sums([spell(sample, processor) for sample in samples], codes),
        "reduction": request.param,
    }


COLLATORS = {
    "padded": {},
    "padded to a multiple": {"pad_to_multiple_of": 64},
    "packed": {"packing": True, "max_length": 400},
    "packed into one row": {"packing": True, "max_length": 2048},
    "packed without a limit": {"packing": True},
}


def assert_same(actual: tuple[float, dict[str, torch.Tensor]], expected: tuple[float, dict[str, torch.Tensor]]) -> None:
    """Equal to 1e-6, gradients too, which are of order 0.01 to 10."""
    assert actual[0] == pytest.approx(expected[0], rel=1e-6, abs=0)
    assert actual[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(
            actual[1][name].double(), gradient, rtol=1e-6, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("layout", COLLATORS)
@pytest.mark.parametrize("steps", [1, 4])
def test_loss_and_gradients_equal_the_reference(case, processor, samples, layout, steps):
    """One batch of eight, and four of two that are divided by the sums of all eight."""
    collate = WorldVLADataCollator(processor, **COLLATORS[layout])
    size = len(samples) // steps
    batches = [collate(samples[start : start + size]) for start in range(0, len(samples), size)]
    assert_same(accumulate(case["model"], batches, case["sums"] if steps > 1 else None), case["expected"])


def test_the_reference_tells_what_matters(case, processor, samples):
    """Guards the tests above: weights, mask, segments and denominators all show in the loss."""
    collate, model = WorldVLADataCollator(processor, packing=True, max_length=2048), case["model"]
    expected = case["expected"][0]
    batch = collate(samples)
    unweighted = {name: value for name, value in batch.items() if name != "loss_weights"}
    one_segment = {**batch, "seq_idx": batch["seq_idx"].clamp(max=0)}
    micro_means = accumulate(model, [collate(samples[:2]), collate(samples[2:])], None)[0] / 2
    others = [model(**unweighted).loss.item(), model(**one_segment).loss.item(), micro_means]
    model.config.action_attention = "causal"
    others.append(model(**batch).loss.item())
    model.config.action_attention = "independent"
    for other in others:
        assert abs(other - expected) > 1e-4 * expected  # a hundred times the tolerance


def test_float32_is_as_close_as_it_can_be(processor, samples):
    """What training really runs: the same to float32's precision."""
    model = build(processor, "paper")
    expected = reference(model, processor, samples, "paper")
    loss, grads = accumulate(model.float(), [WorldVLADataCollator(processor, packing=True)(samples)], None)
    assert loss == pytest.approx(expected[0], rel=1e-6)
    for name, gradient in expected[1].items():
        error = (grads[name] - gradient).norm() / gradient.norm()
        assert error < 1e-5, f"{name}: {error}"
