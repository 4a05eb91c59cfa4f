"""A small checkpoint for the robot of the dataset that LeRobot's own writer made (see tests/fixtures/lerobot_small)."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from plugin_robot import ROBOT
from small_checkpoint import write_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random WorldVLA checkpoint (K = 4, two frames of history) as `save_pretrained` writes it; read-only."""
    return write_checkpoint(tmp_path_factory.mktemp("plugin") / "checkpoint", ROBOT)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run one of LeRobot's commands, such as `lerobot-train`, in this process."""

    def run(name: str, *arguments: Any) -> None:
        from importlib import import_module

        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        import_module(f"lerobot.scripts.{name.replace('-', '_')}").main()

    return run
