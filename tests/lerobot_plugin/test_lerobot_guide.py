"""The guide does what it says: its blocks are run in order by LeRobot's own commands, with small names and sizes."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lerobot_environment import require_lerobot
from plugin_robot import DATASET

require_lerobot()

sys.path.append(str(Path(__file__).parents[1] / "docs"))
from doc_pages import DOCS, blocks, command_lines, words_of  # noqa: E402

SMALL = ["--steps=2", "--batch_size=2", "--num_workers=0", "--policy.device=cpu"]


def test_every_block_runs(
    checkpoint: Path, command: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoint, "my-checkpoint")
    shutil.copytree(DATASET, "my-robot")
    found = [block for block in blocks(DOCS / "guides" / "lerobot.md") if block.reason is None]
    assert [block.language for block in found] == ["bash", "python", "bash", "python"]
    names: dict[str, Any] = {}
    for block in found:
        if block.language == "python":
            exec(compile("\n" * (block.line - 1) + block.code, block.page, "exec"), names)
            continue
        for line in command_lines(block.code):
            program, *words = words_of(line)
            cut = {option.partition("=")[0] for option in SMALL}
            command(program, *(word for word in words if word.partition("=")[0] not in cut), *SMALL)
    assert names["action"].shape == (1, 4) and (tmp_path / "runs/more/checkpoints/last/pretrained_model").is_dir()
