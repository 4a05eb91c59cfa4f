"""The tokens in `hub/`: the demonstrations that the bundled checkpoint learnt from and corrections of it."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from transformers_worldvla import WorldVLAForCausalLM, WorldVLAProcessor
from transformers_worldvla.cli.main import main
from transformers_worldvla.data import FrameTokenCache
from transformers_worldvla.evaluation.libero_suites import find_tasks, step_budget

HUB = Path(__file__).parents[2] / "hub"
DEMONSTRATIONS, CORRECTIONS = HUB / "libero-goal-tokens", HUB / "libero-goal-corrections"
CHECKPOINT = HUB / "worldvla-libero-tiny"


@pytest.fixture(scope="module", params=[DEMONSTRATIONS, CORRECTIONS], ids=["demonstrations", "corrections"])
def cache(request: pytest.FixtureRequest) -> FrameTokenCache:
    """Opened for the bundled checkpoint: refused where its image tokenizer is another one."""
    model = WorldVLAForCausalLM.from_pretrained(CHECKPOINT)
    processor = WorldVLAProcessor.from_pretrained(CHECKPOINT, trust_remote_code=False)
    return FrameTokenCache(request.param).verify(model, processor)


def test_holds_successful_episodes_of_the_benchmark(cache: FrameTokenCache) -> None:
    pytest.importorskip("libero", reason="the extra libero is not installed")
    official = {task.instruction for task in find_tasks("libero_goal")}
    episodes = [episode for split in cache.splits for episode in cache.episodes(split)]
    counts = Counter(episode.instruction for episode in episodes)
    least = 25 if cache.path == DEMONSTRATIONS else 12
    assert counts.keys() <= official and sum(count >= least for count in counts.values()) == 6
    for episode in episodes:
        assert np.abs(episode.actions).max() <= 1
        assert len(episode.actions) <= step_budget("libero_goal")


def test_no_episode_is_in_two_splits(cache: FrameTokenCache) -> None:
    seen = [set(numbers) for numbers in cache.header["split"]["episodes"].values()]
    assert sum(map(len, seen)) == len(set.union(*seen)) == cache.header["preparation"]["episodes"]


def test_train_takes_both_as_one_robot(capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--dataset", str(DEMONSTRATIONS), "--dataset", str(CORRECTIONS)]
    assert main(["train", *data, "--model", str(CHECKPOINT), "--recipe", "full", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "train 142 episodes" in shown and "train 83 episodes" in shown
