"""`hub/libero-goal-tokens`: the demonstrations that the bundled checkpoint learnt from, ready to train on."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from transformers_worldvla import WorldVLAForCausalLM, WorldVLAProcessor
from transformers_worldvla.cli.main import main
from transformers_worldvla.data import FrameTokenCache
from transformers_worldvla.evaluation.libero_suites import find_tasks, step_budget

HUB = Path(__file__).parents[2] / "hub"
TOKENS, CHECKPOINT = HUB / "libero-goal-tokens", HUB / "worldvla-libero-tiny"


@pytest.fixture(scope="module")
def cache() -> FrameTokenCache:
    """Opened for the bundled checkpoint: refused where its image tokenizer is another one."""
    model = WorldVLAForCausalLM.from_pretrained(CHECKPOINT)
    return FrameTokenCache(TOKENS).verify(model, WorldVLAProcessor.from_pretrained(CHECKPOINT, trust_remote_code=False))


def test_holds_whole_demonstrations_of_the_benchmark(cache: FrameTokenCache) -> None:
    pytest.importorskip("libero", reason="the extra libero is not installed")
    official = {task.instruction for task in find_tasks("libero_goal")}
    episodes = [episode for split in cache.splits for episode in cache.episodes(split)]
    counts = Counter(episode.instruction for episode in episodes)
    assert counts.keys() <= official and sum(count >= 40 for count in counts.values()) == 6
    for episode in episodes:
        assert np.abs(episode.actions).max() <= 1
        assert len(episode.actions) <= step_budget("libero_goal")


def test_no_episode_is_in_two_splits(cache: FrameTokenCache) -> None:
    seen = [set(numbers) for numbers in cache.header["split"]["episodes"].values()]
    assert sum(map(len, seen)) == len(set.union(*seen)) == cache.header["preparation"]["episodes"]


def test_is_what_train_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--dataset", str(TOKENS), "--model", str(CHECKPOINT), "--recipe", "full", "--dry-run"]) == 0
    assert "train 258 episodes" in capsys.readouterr().out
