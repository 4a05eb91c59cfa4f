"""A saved checkpoint carries its own code: it loads where our package is unknown, without a flag where it is known."""

import ast
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

import transformers_worldvla
from transformers_worldvla import WorldVLAConfig, WorldVLAForCausalLM

PACKAGE = Path(transformers_worldvla.__file__).parent
TRAVELLING = sorted(PACKAGE.glob("*_worldvla.py"))


@pytest.mark.parametrize("path", TRAVELLING, ids=lambda path: path.name)
def test_travelling_modules_import_only_what_every_user_has(path: Path) -> None:
    """transformers copies a module's `from .x import y` along, and nothing else; other imports must be installed."""
    installed = {"torch", "numpy", "PIL", "transformers", *sys.stdlib_module_names}
    siblings = {sibling.stem for sibling in TRAVELLING}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert {alias.name.partition(".")[0] for alias in node.names} <= installed
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module is not None and node.module.partition(".")[0] in installed
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 1 and node.module in siblings, f"line {node.lineno}: write from .x_worldvla import y"


def test_saved_folder_is_complete(checkpoint: Path) -> None:
    files = {path.name for path in checkpoint.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "processor_config.json"} <= files
    assert {"tokenizer.json", "tokenizer_config.json", "README.md"} <= files
    assert {path.name for path in TRAVELLING} == {name for name in files if name.endswith(".py")}
    for path in TRAVELLING:
        assert (checkpoint / path.name).read_bytes() == path.read_bytes()
    auto_map = json.loads((checkpoint / "config.json").read_text())["auto_map"]
    model = "modeling_worldvla.WorldVLAForCausalLM"
    config = "configuration_worldvla.WorldVLAConfig"
    assert auto_map == {"AutoConfig": config, "AutoModel": model, "AutoModelForCausalLM": model}
    card = (checkpoint / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and "hidden size 32" in card


def test_saving_keeps_the_users_own_card(tiny_model: WorldVLAForCausalLM, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# mine\n")
    tiny_model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# mine\n"


def test_auto_classes_give_our_class_without_a_flag(checkpoint: Path, tiny_config: WorldVLAConfig) -> None:
    assert type(AutoModel.from_pretrained(checkpoint)) is WorldVLAForCausalLM
    assert type(AutoModelForCausalLM.from_config(tiny_config)) is WorldVLAForCausalLM


def test_folder_loads_where_the_package_is_unknown(
    checkpoint: Path, tmp_path: Path, use_checkpoint: Callable[..., Any]
) -> None:
    """Same numbers as the installed package gives; what that process saves again loads again."""
    local = use_checkpoint(checkpoint, tmp_path / "local", package=True)
    remote = use_checkpoint(checkpoint, tmp_path / "remote")
    again = use_checkpoint(tmp_path / "remote", tmp_path / "again")

    assert [run["prompts"] for run in (local, remote, again)] == [0, 0, 0]
    for name in local["classes"].keys() - {"AutoTokenizer"}:
        assert local["classes"][name].startswith("transformers_worldvla."), "installed code wins over the folder's"
        for run in (remote, again):
            assert run["classes"][name].startswith("transformers_modules.")
            assert run["classes"][name].rpartition(".")[2] == local["classes"][name].rpartition(".")[2]

    expected = torch.load(tmp_path / "local.pt")
    assert expected["tokens"].shape == (1, 2, 7)
    for name in ("remote", "again"):
        torch.testing.assert_close(torch.load(tmp_path / f"{name}.pt"), expected, rtol=0, atol=0)
        assert contents(tmp_path / name) == contents(tmp_path / "local")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_half_precision_keeps_the_image_tokenizer_in_float32(
    checkpoint: Path, fresh_process: Callable[..., Any]
) -> None:
    script = """
import json, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.bfloat16)
dtypes = {name: str(value.dtype) for name, value in model.named_parameters()}
print(json.dumps(dtypes))
"""
    dtypes = fresh_process(script, checkpoint, package=False)
    vq = {dtype for name, dtype in dtypes.items() if ".vqmodel." in name}
    assert vq == {"torch.float32"}
    assert {dtype for name, dtype in dtypes.items() if ".vqmodel." not in name} == {"torch.bfloat16"}
