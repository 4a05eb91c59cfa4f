"""The loop: budgets, whole chunks, which frames are shown, seeds."""

import numpy as np
import pytest
from counting_environment import CountingEnvironment, CountingSpec

from transformers_worldvla.evaluation.rollout import (
    ExpertPolicy,
    FramePolicy,
    Outcome,
    StillPolicy,
    episode_seed,
    play,
)


def started(spec: CountingSpec | None = None, trial: int = 0) -> CountingEnvironment:
    environment = CountingEnvironment(spec or CountingSpec(goal=1e9))
    environment.start(trial, seed=0)
    return environment


@pytest.mark.parametrize("budget", [1, 4, 5, 7])
def test_an_episode_takes_exactly_its_budget(budget: int) -> None:
    environment, outcome = started(), Outcome()
    play(environment, FramePolicy(lambda frames, begins: np.ones((3, 7)), ("a",), 2), budget, outcome)
    assert environment.steps == len(outcome.actions) == budget
    assert outcome.success is False


def test_it_stops_at_success_within_a_chunk() -> None:
    environment, outcome = started(CountingSpec(goal=4.0)), Outcome()
    play(environment, FramePolicy(lambda frames, begins: np.ones((10, 7)), ("a",), 1), 100, outcome)
    assert outcome.success is True
    assert environment.steps == 4


def test_it_stops_when_the_environment_ends() -> None:
    environment, outcome = started(CountingSpec(goal=1e9, ending=(0,))), Outcome()
    play(environment, StillPolicy(), 100, outcome)
    assert (outcome.success, environment.steps) == (False, 3)


def test_success_at_the_last_step_counts() -> None:
    environment, outcome = started(CountingSpec(goal=2.0)), Outcome()
    play(environment, ExpertPolicy(), 4, outcome)
    assert (outcome.success, environment.steps) == (True, 4)


def test_after_an_exception_the_outcome_says_how_far_it_came() -> None:
    outcome = Outcome()
    with pytest.raises(FloatingPointError):
        play(started(CountingSpec(failing=(0,))), StillPolicy(), 100, outcome)
    assert (outcome.success, len(outcome.actions)) == (None, 2)


@pytest.mark.parametrize(("num_actions", "history"), [(1, 1), (1, 2), (2, 2), (5, 2), (10, 2), (3, 4), (4, 4), (5, 1)])
def test_a_query_is_shown_the_last_control_steps(num_actions: int, history: int) -> None:
    """The rule of the authors' evaluation: frame `step - 1` is the previous control step's, also after a chunk."""
    seen: list[int] = []
    queries: list[list[int]] = []

    def answer(frames: np.ndarray, begins: bool) -> np.ndarray:
        assert begins == (not queries)
        assert frames.shape[1:] == (1, 64, 64, 3)
        seen.extend(frames[:, 0, 0, 0, 0].tolist())
        queries.append(seen[-history:])
        return np.zeros((num_actions, 7))

    environment = started()
    play(environment, FramePolicy(answer, ("a",), history), 4 * num_actions, Outcome())
    expected = [list(range(max(0, step - history + 1), step + 1)) for step in range(0, 4 * num_actions, num_actions)]
    assert queries == expected
    looked_at = {step for query in expected for step in query}
    after_last_query = {step for step in environment.drawn if step > expected[-1][-1]}
    assert sorted(set(environment.drawn) - after_last_query) == sorted(looked_at)
    assert len(environment.drawn) == len(set(environment.drawn)), "no step is drawn twice"


def test_every_camera_is_drawn_once_a_time_step() -> None:
    shapes = []

    def answer(frames: np.ndarray, begins: bool) -> np.ndarray:
        shapes.append(frames.shape)
        sliders = [set(picture[picture[..., 0] == 250][:, 2].tolist()) for picture in frames[0]]
        assert sliders == [{1}, {8}], "a slider's blue is the length of its camera's name"
        return np.zeros((2, 7))

    play(started(), FramePolicy(answer, ("a", "bbbbbbbb"), 1), 4, Outcome())
    assert shapes == [(1, 2, 64, 64, 3)] * 2


def test_seeds_of_episodes_depend_on_everything_that_names_one() -> None:
    first = episode_seed(0, "libero_goal", 1, 2)
    others = [
        episode_seed(1, "libero_goal", 1, 2),
        episode_seed(0, "libero_object", 1, 2),
        episode_seed(0, "libero_goal", 2, 2),
        episode_seed(0, "libero_goal", 1, 3),
        episode_seed(0, "libero_goal", 2, 1),
    ]
    assert first == episode_seed(0, "libero_goal", 1, 2)
    assert len({first, *others}) == 6
    assert 0 <= first < 2**32
    assert first == 1219602920, "the numbers of published results"
