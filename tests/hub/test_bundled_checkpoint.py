"""The checkpoint and the episode that ship with the package, as they lie in `hub/`."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel, AutoModelForCausalLM, AutoProcessor

from transformers_worldvla import WorldVLAForCausalLM
from transformers_worldvla.assets import DEFAULT_CHECKPOINT, DEFAULT_EPISODE, bundled_folder
from transformers_worldvla.data import load_episodes

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCE = REPOSITORY / "src" / "transformers_worldvla"
MEGABYTE = 2**20


@pytest.fixture(scope="module")
def folder() -> Path:
    return bundled_folder(DEFAULT_CHECKPOINT)


@pytest.fixture(scope="module")
def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


def test_it_is_small_enough_for_the_repository(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 32 * MEGABYTE
    assert max(path.stat().st_size for path in files) <= 16 * MEGABYTE


def test_its_code_is_that_of_the_source(folder):
    """If this fails: python scripts/sync_checkpoint_code.py"""
    expected = {path.name: path.read_bytes() for path in SOURCE.glob("*_worldvla.py")}
    assert {path.name: path.read_bytes() for path in folder.glob("*.py")} == expected


def test_it_is_stored_in_half_precision_and_opened_in_float32(folder, loaded):
    dtypes = {}
    for shard in folder.glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            dtypes |= {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
    assert {dtype for key, dtype in dtypes.items() if ".vqmodel." in key} == {"F32"}
    assert {dtype for key, dtype in dtypes.items() if ".vqmodel." not in key} == {"BF16"}
    assert {parameter.dtype for parameter in loaded[0].parameters()} == {torch.float32}


def test_auto_model_gives_the_class_that_acts(folder):
    assert type(AutoModel.from_pretrained(folder)) is WorldVLAForCausalLM


def test_it_loads_where_the_package_is_unknown(folder, tmp_path, use_checkpoint):
    used = use_checkpoint(folder, tmp_path / "saved-again")
    assert used


def test_it_acts_on_the_bundled_episode_better_than_the_mean_action(folder, loaded):
    model, processor = loaded
    episode = load_episodes(bundled_folder(DEFAULT_EPISODE))[0]
    steps = list(range(1, len(episode) - processor.num_actions, 8))
    inputs = processor(
        images=[[episode.frame("image", step - 1), episode.frame("image", step)] for step in steps],
        instruction=[episode.instruction] * len(steps),
    )
    actions = processor.decode_actions(model.generate_actions(**inputs, num_actions=processor.num_actions))
    recorded = np.stack([episode.actions[step : step + processor.num_actions] for step in steps])
    mean = np.array(json.loads((folder / "training_statistics.json").read_text())["action_mean"])
    assert actions.shape == recorded.shape
    assert np.abs(actions - recorded).mean() < 0.5 * np.abs(mean - recorded).mean()
