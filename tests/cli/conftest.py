"""Small checkpoints and recordings for the commands, and two ways to call them."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from command_result import Result
from PIL import Image
from small_checkpoint import GANTRY, LIBERO, with_cameras, write_checkpoint, write_episode

from transformers_worldvla.cli.main import main


@pytest.fixture(scope="session")
def robot_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random checkpoint of LIBERO's arm; treat it as read-only."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "arm")


@pytest.fixture(scope="session")
def two_camera_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that sees two cameras."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "arm-2", with_cameras("image", "wrist"))


@pytest.fixture(scope="session")
def two_robot_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with two embodiments, LIBERO's arm (D=7) and a gantry (D=3)."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "robots", LIBERO, GANTRY)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One episode of 14 steps, two cameras, as a folder of pictures and actions."""
    return write_episode(tmp_path_factory.mktemp("dataset"), cameras=("image", "wrist"))


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """Two pictures of another size and shape than the model's."""
    rng = np.random.default_rng(3)
    files = [tmp_path / "previous.png", tmp_path / "current.png"]
    for file in files:
        Image.fromarray(rng.integers(0, 256, (80, 100, 3), dtype=np.uint8)).save(file)
    return files


@pytest.fixture
def worldvla(capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run a command in this process."""

    def run(*arguments: object) -> Result:
        capfd.readouterr()
        code = main(list(map(str, arguments)))
        return Result(code, *capfd.readouterr())

    return run


_NO_NETWORK = """
import runpy, socket, sys
def refuse(*_): raise AssertionError("the network was used")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
sys.argv = ["worldvla", *sys.argv[1:]]
runpy.run_module("transformers_worldvla.cli", run_name="__main__", alter_sys=True)
"""


@pytest.fixture
def worldvla_process(tmp_path: Path) -> Callable[..., Result]:
    """Run a command in a new process: `python -m transformers_worldvla.cli`, or with `network=False` the same where
    every connection fails, no switch says so to the libraries and nobody answers a question."""

    def run(*arguments: object, network: bool = True) -> Result:
        module = ["-m", "transformers_worldvla.cli"] if network else ["-c", _NO_NETWORK]
        environment = {**os.environ, "HF_HOME": str(tmp_path / "hf-home"), "OMP_NUM_THREADS": "1"}
        if not network:
            environment.pop("HF_HUB_OFFLINE", None)
        result = subprocess.run(
            [sys.executable, *module, *map(str, arguments)],
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=550,
        )
        return Result(result.returncode, result.stdout, result.stderr)

    return run
