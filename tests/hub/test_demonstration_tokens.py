"""The tokens in `hub/`: the demonstrations that the bundled checkpoint learnt from and corrections of it."""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from transformers_worldvla import WorldVLAForCausalLM, WorldVLAProcessor
from transformers_worldvla.cli.main import main
from transformers_worldvla.data import FrameTokenCache
from transformers_worldvla.evaluation.libero_suites import find_tasks, step_budget

HUB = Path(__file__).parents[2] / "hub"
NAMES = (
    "libero-goal-tokens",
    "libero-goal-tokens-more",
    "libero-goal-tokens-more-2",
    "libero-goal-corrections",
    "libero-goal-corrections-2",
    "libero-goal-corrections-3",
)
DEMONSTRATIONS, MORE, MORE_2, CORRECTIONS, CORRECTIONS_2, CORRECTIONS_3 = ALL = [HUB / name for name in NAMES]
EPISODES = {  # how many, of how many tasks there are as many at least
    DEMONSTRATIONS: (25, 6),
    MORE: (12, 7),
    MORE_2: (25, 3),
    CORRECTIONS: (12, 6),
    CORRECTIONS_2: (20, 10),
    CORRECTIONS_3: (16, 3),
}
CHECKPOINT = HUB / "worldvla-libero-tiny"


def opened(path: Path) -> FrameTokenCache:
    """For the bundled checkpoint: refused where its image tokenizer is another one."""
    model = WorldVLAForCausalLM.from_pretrained(CHECKPOINT)
    processor = WorldVLAProcessor.from_pretrained(CHECKPOINT, trust_remote_code=False)
    return FrameTokenCache(path).verify(model, processor)


def instructions(cache: FrameTokenCache) -> Counter[str]:
    return Counter(episode.instruction for split in cache.splits for episode in cache.episodes(split))


@pytest.fixture(scope="module", params=ALL, ids=NAMES)
def cache(request: pytest.FixtureRequest) -> FrameTokenCache:
    return opened(request.param)


def test_holds_successful_episodes_of_the_benchmark(cache: FrameTokenCache) -> None:
    pytest.importorskip("libero", reason="the extra libero is not installed")
    official = {task.instruction for task in find_tasks("libero_goal")}
    episodes = [episode for split in cache.splits for episode in cache.episodes(split)]
    counts = instructions(cache)
    least, tasks = EPISODES[cache.path]
    assert counts.keys() <= official and sum(count >= least for count in counts.values()) == tasks
    for episode in episodes:
        assert np.abs(episode.actions).max() <= 1
        assert len(episode.actions) <= step_budget("libero_goal")


def test_no_episode_is_in_two_splits(cache: FrameTokenCache) -> None:
    seen = [set(numbers) for numbers in cache.header["split"]["episodes"].values()]
    assert sum(map(len, seen)) == len(set.union(*seen)) == cache.header["preparation"]["episodes"]


def test_every_task_has_demonstrations() -> None:
    pytest.importorskip("libero", reason="the extra libero is not installed")
    counts = sum((instructions(opened(path)) for path in (DEMONSTRATIONS, MORE, MORE_2)), Counter())
    assert counts.keys() == {task.instruction for task in find_tasks("libero_goal")}
    assert sum(counts.values()) == 357 and sorted(counts.values())[:2] == [12, 25]


def test_the_recipe_trains_on_all_as_one_robot(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command of its README that needs no simulator."""
    folder = HUB.parent / "examples" / "libero_from_scratch"
    readme = (folder / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    (command,) = re.findall(r"^worldvla (train .*\.\./\.\./hub/.*)$", readme, re.MULTILINE)
    monkeypatch.chdir(folder)
    assert main([*command.split(), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert all(f"train {count} episodes" in shown for count in (142, 125, 71, 83, 236, 53))
