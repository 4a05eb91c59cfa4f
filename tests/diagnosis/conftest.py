"""A healthy checkpoint and recordings that fit it, to be broken one thing at a time."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diagnosis_data import ARM, write_recording
from small_checkpoint import write_checkpoint

from transformers_worldvla.assets import DEFAULT_CHECKPOINT, DEFAULT_EPISODE, bundled_folder
from transformers_worldvla.data import EpisodeDataset, load_episodes
from transformers_worldvla.serving.loading import load_model, load_processor


@pytest.fixture(scope="session")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random checkpoint; treat it as read-only."""
    return write_checkpoint(tmp_path_factory.mktemp("healthy") / "arm", ARM)


@pytest.fixture
def folder(healthy: Path, tmp_path: Path) -> Path:
    """A copy of it that may be broken."""
    return Path(shutil.copytree(healthy, tmp_path / "checkpoint"))


@pytest.fixture
def recorded(tmp_path: Path) -> Callable[..., EpisodeDataset]:
    """A dataset of one episode with some actions (T, 3)."""

    def write(actions: np.ndarray, **options: Any) -> EpisodeDataset:
        folder = tmp_path / f"recordings-{len(list(tmp_path.iterdir()))}"
        return load_episodes(write_recording(folder, actions, **options))

    return write


@pytest.fixture(scope="session")
def trained() -> tuple[Any, Any]:
    """The bundled checkpoint: model and processor."""
    import torch

    folder = bundled_folder(DEFAULT_CHECKPOINT)
    return load_model(folder, None, torch.device("cpu")), load_processor(folder)


@pytest.fixture(scope="session")
def real_episode() -> EpisodeDataset:
    """A LIBERO episode that the bundled checkpoint has not seen."""
    return load_episodes(bundled_folder(DEFAULT_EPISODE))
