"""Shared fixtures. The suite never talks to the Hub, nor reads or writes the user's Hugging Face cache."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

_HF_HOME = tempfile.TemporaryDirectory(prefix="worldvla-tests-", ignore_cleanup_errors=True)
os.environ.update({"HF_HOME": _HF_HOME.name, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"})
os.environ.pop("HF_MODULES_CACHE", None)

import pytest  # noqa: E402
import torch  # noqa: E402
from transformers import AutoTokenizer, PreTrainedTokenizerBase  # noqa: E402

from transformers_worldvla import (  # noqa: E402
    WorldVLAConfig,
    WorldVLAForCausalLM,
    WorldVLAImageProcessor,
    WorldVLAProcessor,
)
from transformers_worldvla.action_tokenization_worldvla import LIBERO  # noqa: E402

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="session")
def authors_tiny() -> Path:
    """The reference checkpoint and the numbers that the authors' code gives for it (see its README)."""
    return FIXTURES / "authors_tiny"


@pytest.fixture(scope="session")
def tokenizer(authors_tiny: Path) -> PreTrainedTokenizerBase:
    """A tokenizer with the published special ids and a small text vocabulary; treat it as read-only."""
    return AutoTokenizer.from_pretrained(authors_tiny / "checkpoint" / "base_model")


@pytest.fixture
def tiny_config(tokenizer: PreTrainedTokenizerBase) -> WorldVLAConfig:
    """A full vocabulary around a decoder and an image tokenizer of toy size."""
    return WorldVLAConfig(
        vocab_size=len(tokenizer),
        vocabulary_map=tokenizer.get_vocab(),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        action_dim=7,
        vq_config={
            "base_channels": 32,
            "channel_multiplier": [1, 1, 1, 1, 1],
            "embed_dim": 8,
            "latent_channels": 8,
            "num_res_blocks": 1,
        },
    )


@pytest.fixture
def tiny_model(tiny_config: WorldVLAConfig) -> WorldVLAForCausalLM:
    """A random model of `tiny_config` in evaluation mode, the same in every test."""
    torch.manual_seed(0)
    return WorldVLAForCausalLM(tiny_config).eval()


@pytest.fixture
def processor(tokenizer: PreTrainedTokenizerBase) -> WorldVLAProcessor:
    """A processor for LIBERO's arm and pictures of 64 pixels, 16 codes each."""
    return WorldVLAProcessor(WorldVLAImageProcessor(target_size=64), tokenizer, embodiments={"libero": LIBERO})


@pytest.fixture
def checkpoint(tiny_model: WorldVLAForCausalLM, processor: WorldVLAProcessor, tmp_path: Path) -> Path:
    """A folder with all that `save_pretrained` of the model and of the processor write."""
    folder = tmp_path / "tiny-checkpoint"
    tiny_model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


_HIDE_PACKAGE = """
import importlib.abc, sys
class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "transformers_worldvla":
            raise ModuleNotFoundError(f"{name} is hidden from this process", name=name)
sys.meta_path.insert(0, Hidden())
"""


@pytest.fixture
def fresh_process(tmp_path: Path) -> Callable[..., Any]:
    """Run a script in a new Python process with an empty Hugging Face cache; returns the JSON that it prints last.

    `package=False` makes our package impossible to import. Further keyword arguments are environment variables.
    """

    def run(script: str, *arguments: object, package: bool, **environment: str) -> Any:
        home = tempfile.mkdtemp(dir=tmp_path)
        command = [sys.executable, "-c", script if package else _HIDE_PACKAGE + script, *map(str, arguments)]
        result = subprocess.run(
            command,
            cwd=home,
            env={**os.environ, "HF_HOME": home, "OMP_NUM_THREADS": "1", **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout.splitlines()[-1])

    return run


@pytest.fixture
def use_checkpoint(fresh_process: Callable[..., Any]) -> Callable[..., Any]:
    """Run `use_checkpoint.py` with (source, output[, revision]); our package is installed or, by default, unknown."""
    script = (Path(__file__).parent / "use_checkpoint.py").read_text()

    def use(source: object, output: Path, *revision: str, package: bool = False, **environment: str) -> Any:
        code = "installed" if package else "remote"
        return fresh_process(script, source, output, code, *revision, package=package, **environment)

    return use
