"""Completeness of a checkpoint folder: each kind of damage is found and named, and nothing else is."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from transformers_worldvla import WorldVLAForCausalLM
from transformers_worldvla.assets import DEFAULT_CHECKPOINT, bundled_folder
from transformers_worldvla.diagnosis.files import check_code, check_files, check_folder, check_weights
from transformers_worldvla.diagnosis.report import FAILED, OK, SKIPPED, WARNING

WEIGHTS = "model.safetensors"


def change_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace tensors, leave those out that are None; dots in names are written as double underscores."""
    weights = load_file(folder / WEIGHTS)
    for name, tensor in changes.items():
        key = name.replace("__", ".")
        weights.pop(key, None)
        if tensor is not None:
            weights[key] = tensor
    save_file(weights, folder / WEIGHTS, {"format": "pt"})


def test_a_checkpoint_as_it_is_saved_is_complete(folder: Path) -> None:
    findings = check_folder(folder)
    assert [finding.verdict for finding in findings] == [OK, OK, OK]
    model = WorldVLAForCausalLM.from_pretrained(folder)
    assert findings[1].numbers["parameters"] == sum(each.numel() for each in model.state_dict().values())


def test_a_checkpoint_in_shards_is_complete() -> None:
    assert [finding.verdict for finding in check_folder(bundled_folder(DEFAULT_CHECKPOINT))] == [OK, OK, OK]


@pytest.mark.parametrize("name", ["processor_config.json", "tokenizer.json", "tokenizer_config.json", WEIGHTS])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    finding = check_files(folder)
    assert finding.verdict == FAILED and name in finding.found


def test_a_missing_shard_is_named(folder: Path) -> None:
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00001-of-00002.safetensors" in check_files(folder).found


def test_a_file_that_is_cut_off_is_named(folder: Path) -> None:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text[: len(text) // 2])
    finding = check_files(folder)
    assert finding.verdict == FAILED and "config.json" in finding.found


def test_a_pickle_is_a_warning(folder: Path) -> None:
    torch.save({}, folder / "training_args.bin")
    finding = check_files(folder)
    assert finding.verdict == WARNING and "training_args.bin" in finding.found


def test_weights_that_are_cut_off(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-100])
    assert check_weights(folder).verdict == FAILED


def test_weights_that_are_no_numbers(folder: Path) -> None:
    weight = load_file(folder / WEIGHTS)["model.norm.weight"]
    weight[3] = float("nan")
    change_weights(folder, model__norm__weight=weight)
    finding = check_weights(folder)
    assert finding.verdict == FAILED and "model.norm.weight" in finding.found


def test_weights_that_are_missing(folder: Path) -> None:
    change_weights(folder, model__norm__weight=None)
    finding = check_weights(folder)
    assert finding.verdict == FAILED and "1 missing (model.norm.weight" in finding.found


def test_weights_of_another_shape(folder: Path) -> None:
    change_weights(folder, model__norm__weight=torch.ones(7))
    finding = check_weights(folder)
    assert finding.verdict == FAILED and "model.norm.weight [7], not [32]" in finding.found


def test_weights_that_no_layer_has(folder: Path) -> None:
    change_weights(folder, left__over=torch.ones(2))
    finding = check_weights(folder)
    assert finding.verdict == WARNING and "left.over" in finding.found


def test_weights_without_a_use_in_the_index(folder: Path) -> None:
    index = {"weight_map": {"model.norm.weight": WEIGHTS, "not.there": WEIGHTS}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    finding = check_weights(folder)
    assert finding.verdict == FAILED and "not.there" in finding.found


def test_a_missing_module_is_found_through_the_imports(folder: Path) -> None:
    (folder / "tokens_worldvla.py").unlink()  # no auto_map names it
    finding = check_code(folder)
    assert finding.verdict == FAILED and finding.found == "missing: tokens_worldvla.py"


def test_a_changed_module_is_a_warning(folder: Path) -> None:
    with (folder / "tokens_worldvla.py").open("a") as file:
        file.write("\n# changed\n")
    finding = check_code(folder)
    assert finding.verdict == WARNING and "(tokens_worldvla.py)" in finding.found


def test_a_checkpoint_that_names_no_code(folder: Path) -> None:
    for name in ("config.json", "processor_config.json"):
        document = json.loads((folder / name).read_text())
        document.pop("auto_map", None)
        document.get("image_processor", {}).pop("auto_map", None)
        (folder / name).write_text(json.dumps(document))
    finding = check_code(folder)
    assert finding.verdict == FAILED and "no auto_map" in finding.found


def test_code_of_another_repository_is_a_warning(folder: Path) -> None:
    document = json.loads((folder / "config.json").read_text())
    document["auto_map"] = {key: f"someone/else--{value}" for key, value in document["auto_map"].items()}
    (folder / "config.json").write_text(json.dumps(document))
    assert check_code(folder).verdict == WARNING


def test_an_adapter_is_judged_as_one(folder: Path) -> None:
    for name in ("config.json", WEIGHTS):
        (folder / name).unlink()
    (folder / "adapter_config.json").write_text("{}")
    missing = check_files(folder)
    assert missing.found == "missing: worldvla_adapter.json, adapter_model.safetensors"
    (folder / "worldvla_adapter.json").write_text("{}")
    save_file({"a": torch.ones(2, 3)}, folder / "adapter_model.safetensors")
    assert [finding.verdict for finding in check_folder(folder)] == [OK, OK, SKIPPED]
    (folder / "config.json").write_text("{}")
    assert "takes for a whole model" in check_files(folder).found
