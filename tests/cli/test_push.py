"""`worldvla push`: wrong arguments are one line, before anything is sent. What arrives: hub/test_push_folder.py."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["{checkpoint}", "no good name"], "is no name of a repository"),
        (["{checkpoint}", "a/b/c"], "is no name of a repository"),
        (["{checkpoint}/config.json", "me/model"], "is no folder"),
        (["{empty}", "me/model"], "holds nothing to push"),
        (["{checkpoint}", "me/model", "--results", "no-such-folder"], "no folder that `worldvla evaluate` wrote"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(
    worldvla: Callable[..., Any], robot_checkpoint: Path, tmp_path: Path, arguments: list[str], reason: str
) -> None:
    result = worldvla("push", *(each.format(checkpoint=robot_checkpoint, empty=tmp_path) for each in arguments))
    assert result.code == 2 and reason in result.err.splitlines()[-1] and result.out == ""


def test_a_dry_run_shows_files_and_card(worldvla: Callable[..., Any], robot_checkpoint: Path) -> None:
    result = worldvla("push", robot_checkpoint, "me/model", "--revision", "trial", "--dry-run")
    assert result.code == 0
    assert f"model {robot_checkpoint} -> me/model, branch trial: nothing was sent" in result.out
    assert "model.safetensors" in result.out and "## Licence and origin" in result.out
