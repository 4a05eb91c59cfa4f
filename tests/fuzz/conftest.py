"""Files for the fuzz tests: copies that a test may damage, of real recordings and of a small checkpoint."""

import shutil
from pathlib import Path

import pytest
from small_checkpoint import write_checkpoint

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.fixture(scope="module", params=["v21_video", "v21_image", "v30_video", "v30_image"])
def recording(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LeRobot dataset by LeRobot's own writer."""
    source = FIXTURES / "lerobot_small" / request.param
    return Path(shutil.copytree(source, tmp_path_factory.mktemp("recording") / request.param))


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cut of a LIBERO file."""
    return Path(shutil.copytree(FIXTURES / "libero" / "libero_hdf5", tmp_path_factory.mktemp("hdf5") / "libero"))


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete checkpoint of toy size."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model")
