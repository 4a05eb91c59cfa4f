"""Checkpoints for the tests of conversion: authors_tiny as a copy to change, stored in every form there is."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from transformers_worldvla.cli.main import main
from transformers_worldvla.convert import convert_checkpoint

HEADS = 4


class Sources:
    """The three folders of a checkpoint, as copies that a test may change."""

    def __init__(self, original: Path, root: Path):
        self.root = root
        self.model, self.tokenizer, self.vq = root / "model", root / "base_model", root / "tokenizer"
        for folder in (self.model, self.tokenizer, self.vq):
            folder.mkdir(parents=True)
            for path in (original / folder.name).iterdir():
                (folder / path.name).symlink_to(path)  # a changed file takes the link's place

    def arguments(self) -> dict[str, Path]:
        return {"model": self.model, "tokenizer": self.tokenizer, "vq": self.vq}

    def command(self, output: Path, *more: str) -> list[str]:
        folders = [part for role, path in self.arguments().items() for part in (f"--{role}", str(path))]
        return ["convert", *folders, "--output", str(output), *more]

    def write(self, path: Path, content: str | bytes) -> None:
        path.unlink(missing_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    def edit_json(self, path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
        value = json.loads(path.read_text())
        change(value)
        self.write(path, json.dumps(value))

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.model / "model.safetensors")

    def save_weights(self, weights: dict[str, torch.Tensor]) -> None:
        (self.model / "model.safetensors").unlink()
        save_file(weights, self.model / "model.safetensors", metadata={"format": "pt"})

    def vq_weights(self) -> dict[str, torch.Tensor]:
        return torch.load(self.vq / "vqgan.ckpt", weights_only=True)["state_dict"]

    def save_vq(self, value: Any) -> None:
        (self.vq / "vqgan.ckpt").unlink()
        torch.save(value, self.vq / "vqgan.ckpt")


def quietly(sources: Sources, output: Path, **options: Any) -> dict[str, Any]:
    """Convert without the forward at the end, which other tests have."""
    return convert_checkpoint(**sources.arguments(), output=output, forward_limit=0, **options)


def output_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def expected_weights(sources: Sources) -> dict[str, torch.Tensor]:
    """What the files say, read and put together by hand."""
    weights = {
        name: value.expand(HEADS, -1) if name.endswith(("q_norm.weight", "q_norm.bias", "k_norm.weight", "k_norm.bias"))
        else value
        for name, value in sources.weights().items()
    }  # fmt: skip
    return weights | {f"model.vqmodel.{name}": value for name, value in sources.vq_weights().items()}


def assert_same_weights(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    written = output_weights(folder)
    assert sorted(written) == sorted(expected)
    assert [name for name in expected if written[name].dtype != expected[name].dtype] == []
    assert [name for name in expected if not torch.equal(written[name], expected[name])] == []


def assert_refused(command: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The command line says no in one line, beside which there are only progress bars, with exit code 2."""
    capsys.readouterr()
    assert main(command) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("worldvla")]
    assert re.search(message, line), line


# -------------------------------------------------------------------- forms of the same weights


def as_sharded_safetensors(sources: Sources, weights: dict[str, torch.Tensor]) -> None:
    write_shards(sources, weights, "model-{}.safetensors", "model.safetensors.index.json", save_file)


def as_bin(sources: Sources, weights: dict[str, torch.Tensor]) -> None:
    torch.save(weights, sources.model / "pytorch_model.bin")


def as_old_bin(sources: Sources, weights: dict[str, torch.Tensor]) -> None:
    torch.save(weights, sources.model / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def as_sharded_bin(sources: Sources, weights: dict[str, torch.Tensor]) -> None:
    write_shards(sources, weights, "pytorch_model-{}.bin", "pytorch_model.bin.index.json", torch.save)


def write_shards(sources: Sources, weights: dict[str, torch.Tensor], name: str, index: str, save: Callable) -> None:
    """Three shards, tensors dealt out in turn."""
    weight_map = {}
    for shard in range(3):
        part = dict(list(weights.items())[shard::3])
        save(part, sources.model / name.format(shard))
        weight_map |= dict.fromkeys(part, name.format(shard))
    (sources.model / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
