"""Recordings for the data tests: small cuts of real ones, and copies that a test may damage."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.fixture(scope="session")
def libero() -> Path:
    """Cuts of LIBERO recordings in three formats, and what the real readers return for them (see its README)."""
    return FIXTURES / "libero"


@pytest.fixture(scope="session")
def small() -> Path:
    """Tiny v2.1 and v3.0 datasets by LeRobot's own writers, and what its readers return (see its README)."""
    return FIXTURES / "lerobot_small"


@pytest.fixture
def copy_of(libero: Path, small: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a dataset of `libero` or `small` that may be changed."""

    def copy(name: str) -> Path:
        source = small / name if (small / name).exists() else libero / name
        return Path(shutil.copytree(source, tmp_path / name))

    return copy


@pytest.fixture(scope="session")
def recordings() -> Path:
    """The full recordings that the fixtures are cut from; they are not part of the repository."""
    folder = os.environ.get("WORLDVLA_DATA")
    if not folder:
        pytest.skip(
            "WORLDVLA_DATA is not set: it names a folder with lerobot_v30_video, lerobot_v21_video and libero_hdf5"
        )
    return Path(folder)
