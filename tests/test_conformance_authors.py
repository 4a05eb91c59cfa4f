"""The converted authors_tiny against the numbers that the authors' own code gives for it (see the fixture's README).

Everything goes the way a user goes: `worldvla convert`, the Auto classes, pictures and actions through the processor.
"""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor

from transformers_worldvla import WorldVLAForCausalLM, WorldVLAProcessor
from transformers_worldvla.action_tokenization_worldvla import LIBERO
from transformers_worldvla.cli.main import main

BOA, EOA, SEPARATOR, GRID_ZERO = 10004, 15004, 8710, 8804  # published ids
SQUARE = [f"i{size}_{index}@{target}" for size in (256, 512) for index in range(4) for target in (256, 512)]
OBLONG = [f"{name}@{target}" for name in ("w320x240", "w640x480", "w200x300") for target in (256, 512)]
ITEMS = pytest.mark.parametrize("index", range(10))


@pytest.fixture(scope="module")
def reference(authors_tiny: Path) -> dict[str, Any]:
    return json.loads((authors_tiny / "reference.json").read_text())


@pytest.fixture(scope="module")
def numbers(authors_tiny: Path) -> Any:
    return np.load(authors_tiny / "numbers.npz")


@pytest.fixture(scope="module")
def actions(authors_tiny: Path) -> np.ndarray:
    return np.load(authors_tiny / "actions.npy")


@pytest.fixture(scope="module")
def checkpoint(authors_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("authors") / "converted"
    folders = {"model": "model", "tokenizer": "base_model", "vq": "tokenizer"}
    arguments = [
        part for role, name in folders.items() for part in (f"--{role}", str(authors_tiny / "checkpoint" / name))
    ]
    assert main(["convert", *arguments, "--output", str(output)]) == 0
    return output


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> WorldVLAForCausalLM:
    return AutoModelForCausalLM.from_pretrained(checkpoint).eval()


@pytest.fixture(scope="module")
def processor(checkpoint: Path) -> WorldVLAProcessor:
    return AutoProcessor.from_pretrained(checkpoint)


@pytest.fixture(autouse=True)
def out_of_range_actions() -> Iterator[None]:
    """Some of the actions leave the range on purpose."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "action", UserWarning)
        yield


def picture(folder: Path, name: str) -> Image.Image:
    return Image.open(folder / "images" / f"{name}.png")


def arguments_of(spec: dict[str, Any], folder: Path, actions: np.ndarray) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the processor is given for an item: its prompt, and its target."""
    images = [picture(folder, name) for name in spec["images"]]
    if spec["kind"] == "action":
        return {"images": images, "instruction": spec["task"]}, {"target_actions": actions[spec["actions"]]}
    return {"images": images[:-1], "actions": actions[spec["actions"]]}, {"target_images": images[-1:]}


def relative_error(value: torch.Tensor, expected: np.ndarray) -> float:
    return abs(float(value) / float(expected) - 1)


# -------------------------------------------------------------------- sequences


@ITEMS
def test_sequences(model, processor, reference, authors_tiny, actions, index):
    """Tokens, labels and inference prompt, from pictures and raw actions."""
    item = reference["items"][index]
    prompt, target = arguments_of(item["spec"], authors_tiny, actions)
    sample = model.discretize(**processor(**prompt, **target, target_size=item["spec"]["res"]))
    assert sample["input_ids"].tolist() == [item["tokens"]]
    assert sample["labels"].tolist() == [item["labels"]]
    assert sample["loss_weights"].tolist() == [[float(label != -100) for label in item["labels"]]]
    inference = model.discretize(**processor(**prompt, target_size=item["spec"]["res"]))
    assert inference["input_ids"].tolist() == [item["prompt"]]


@pytest.mark.parametrize("name", SQUARE)
def test_codes_of_square_pictures(model, processor, reference, authors_tiny, name):
    assert image_block(model, processor, authors_tiny, name) == reference["image_tokens"][name]


@pytest.mark.parametrize("name", OBLONG)
def test_size_of_other_pictures(model, processor, reference, authors_tiny, name):
    """The authors' crop has a random offset there, so that only the grid is the same."""
    expected = reference["image_tokens"][name]
    block = image_block(model, processor, authors_tiny, name)
    assert len(block) == len(expected) and block[:3] == expected[:3]
    assert block[1] != block[2] and min(block[1:3]) > GRID_ZERO


def image_block(model, processor, folder: Path, name: str) -> list[int]:
    """BOI to EOI of the only picture of a prompt."""
    name, target = name.split("@")
    inputs = model.discretize(**processor(picture(folder, name), "go", target_size=int(target)))
    ids = inputs["input_ids"][0].tolist()
    return ids[ids.index(processor.tokens.image_start) : ids.index(processor.tokens.image_end) + 1]


@pytest.mark.parametrize("name", ["i256_0@256", "i512_0@512"])
def test_decoded_pictures(model, processor, reference, authors_tiny, name):
    """Within one grey level."""
    ((decoded,),) = processor.decode_frames([[reference["image_tokens"][name]]], model)
    expected = np.asarray(picture(authors_tiny, f"decoded_{name.split('@')[0]}"))
    assert np.abs(np.asarray(decoded).astype(int) - expected).max() <= 1


def test_action_tokens_and_decoded_values(processor, reference, authors_tiny, actions):
    """All twelve raw actions at once, edge cases of the range among them; decoded in robot units."""
    labels = processor(picture(authors_tiny, "i256_0"), "go", target_actions=actions)["labels"][0]
    blocks = [token for block in reference["action_tokens"] for token in block]
    assert labels[labels != -100].tolist() == [*blocks, SEPARATOR]
    bins = torch.tensor([block[1:-1] for block in reference["action_tokens"]])
    decoded = processor.decode_actions(bins[None])
    assert np.array_equal(decoded[0], in_robot_units(reference["action_decoded"]))


def in_robot_units(normalized: list[list[float]]) -> np.ndarray:
    """Inverse of the authors' normalisation."""
    low, high = np.array(LIBERO.low), np.array(LIBERO.high)
    return (np.array(normalized) + 1) / 2 * (high - low + 1e-8) + low


# -------------------------------------------------------------------- numbers


@ITEMS
def test_logits_and_losses(model, reference, numbers, monkeypatch, index):
    item = reference["items"][index]
    ids, labels = torch.tensor([item["tokens"]]), torch.tensor([item["labels"]])
    monkeypatch.setattr(model.config, "world_loss_weight", 1.0)
    monkeypatch.setattr(model.config, "z_loss_weight", 0.0)
    with torch.no_grad():
        plain = model(input_ids=ids, labels=labels)
    logits = plain.logits[0]
    positions = torch.from_numpy(numbers[f"logits_pos_{index}"])
    assert np.abs(logits.logsumexp(-1).numpy() - numbers[f"lse_{index}"]).max() <= 1e-4
    assert np.abs(logits[positions].numpy() - numbers[f"logits_{index}"]).max() <= 5e-3, "stored in half precision"
    assert np.array_equal(logits.argmax(-1).numpy(), numbers[f"argmax_{index}"])
    assert relative_error(plain.loss, numbers[f"closs_{index}"]) <= 1e-5
    assert relative_error(plain.z_loss, numbers[f"zloss_{index}"]) <= 1e-5

    monkeypatch.undo()
    assert (model.config.loss_reduction, model.config.world_loss_weight) == ("authors", 0.04)
    with torch.no_grad():
        weighted = model(input_ids=ids, labels=labels, logits_to_keep=1)
    without_z = weighted.loss - model.config.z_loss_weight * weighted.z_loss
    assert relative_error(without_z, numbers[f"wloss_{index}"]) <= 1e-5


def test_losses_of_a_mixed_batch(model, processor, reference, numbers, authors_tiny, actions, monkeypatch):
    """An action and a world-model sample, padded to one length, in one weighted mean."""
    (images, chunk), (world_images, target) = (
        arguments_of(reference["items"][index]["spec"], authors_tiny, actions) for index in (1, 3)
    )
    batch = processor(
        images=[images["images"], world_images["images"]],
        instruction=[images["instruction"], None],
        actions=[None, world_images["actions"]],
        target_actions=[chunk["target_actions"], None],
        target_images=[None, target["target_images"]],
    )
    monkeypatch.setattr(model.config, "z_loss_weight", 0.0)
    with torch.no_grad():
        weighted = model(**batch)
        monkeypatch.setattr(model.config, "world_loss_weight", 1.0)
        plain = model(**batch)
    assert relative_error(weighted.loss, numbers["mix_wloss"]) <= 1e-5
    assert relative_error(plain.loss, numbers["mix_closs"]) <= 1e-5
    assert relative_error(plain.z_loss, numbers["mix_zloss"]) <= 1e-5


@ITEMS
def test_hidden_pairs_of_the_mask(model, reference, numbers, index):
    """(query, key) pairs before the query that get no attention at all."""
    seen = []
    handle = model.model.layers[0].self_attn.register_forward_hook(lambda _, __, output: seen.append(output[1]))
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            model(input_ids=torch.tensor([reference["items"][index]["tokens"]]), logits_to_keep=1)
    finally:
        handle.remove()
        model.set_attn_implementation("sdpa")
    (weights,) = seen  # (1, heads, length, length)
    attended = (weights[0] > 0).any(0)
    causal = torch.ones_like(attended).tril()
    assert not (attended & ~causal).any()
    hidden = (causal & ~attended).nonzero().tolist()
    assert hidden == sorted(numbers[f"mask_hidden_{index}"].tolist())


# -------------------------------------------------------------------- generation


@pytest.mark.parametrize("decoding", ["parallel", "sequential"])
@pytest.mark.parametrize("number", range(3))
def test_generated_actions(model, processor, reference, authors_tiny, actions, number, decoding):
    generation = reference["generations"][number]
    spec = reference["items"][generation["item"]]["spec"]
    inputs = processor(**arguments_of(spec, authors_tiny, actions)[0], target_size=spec["res"])
    tokens = model.generate_actions(**inputs, num_actions=len(generation["actions"]), decoding=decoding)
    blocks = [[BOA, *bins, EOA] for bins in tokens[0].tolist()]
    assert [token for block in blocks for token in block] + [SEPARATOR] == generation["tokens"]
    # they decode these in float32
    expected = in_robot_units(generation["actions"])
    np.testing.assert_allclose(processor.decode_actions(tokens)[0], expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("draft", [None, "previous"])
def test_generated_frame(model, processor, reference, authors_tiny, actions, draft):
    (generation,) = reference["generations"][3:]
    spec = reference["items"][generation["item"]]["spec"]
    inputs = processor(**arguments_of(spec, authors_tiny, actions)[0], target_size=spec["res"])
    ids = model.generate_frames(**inputs, draft=draft)
    assert [*ids[0, 0].tolist(), SEPARATOR] == generation["tokens"]
