"""Overlapping chunks of actions become one action a step."""

import numpy as np
import pytest

from worldvla_client.chunking import ActionTimeline


def chunk(start: float, length: int = 4) -> np.ndarray:
    return np.arange(start, start + length)[:, None] * [1.0, -1.0]


def test_latest_the_newest_chunk_decides() -> None:
    timeline = ActionTimeline()
    timeline.add(0, chunk(0))
    assert timeline.action(0).tolist() == [0, 0] and timeline.action(1).tolist() == [1, -1]
    timeline.add(2, chunk(100))
    assert timeline.action(2).tolist() == [100, -100] and timeline.action(3).tolist() == [101, -101]


def test_a_chunk_that_comes_late_loses_the_actions_whose_time_has_passed() -> None:
    timeline = ActionTimeline()
    timeline.add(0, chunk(0))
    timeline.action(3)
    timeline.add(1, chunk(10))  # planned at 1, here at 3
    assert timeline.action(3).tolist() == [12, -12]


@pytest.mark.parametrize("coefficient", [0.0, 0.01, 1.5, -0.5])
def test_ensemble_is_the_weighted_mean_oldest_first(coefficient: float) -> None:
    """ACT's `exp_weights = np.exp(-k * np.arange(n)); exp_weights / exp_weights.sum()` over the actions for a step."""
    rng = np.random.default_rng(0)
    chunks = {step: rng.normal(size=(5, 3)) for step in (0, 1, 3, 6)}
    timeline = ActionTimeline("ensemble", coefficient)
    for step in range(11):
        if step in chunks:
            timeline.add(step, chunks[step])
        proposals = [chunks[first][step - first] for first in chunks if first <= step < first + 5]
        if not proposals:
            assert timeline.action(step) is None
            continue
        weights = np.exp(-coefficient * np.arange(len(proposals)))
        expected = sum(w * p for w, p in zip(weights / weights.sum(), proposals, strict=True))
        np.testing.assert_allclose(timeline.action(step), expected, atol=1e-12)


def test_ensemble_of_chunks_that_come_late_and_out_of_order_is_the_same() -> None:
    first, second = ActionTimeline("ensemble", 0.7), ActionTimeline("ensemble", 0.7)
    first.add(0, chunk(0))
    first.add(1, chunk(50))
    second.add(1, chunk(50))
    second.add(0, chunk(0))
    assert first.action(2).tolist() == second.action(2).tolist()


def test_reaches_counts_the_steps_that_have_an_action() -> None:
    timeline = ActionTimeline()
    assert timeline.reaches(0) == 0 and timeline.action(0) is None
    timeline.add(2, chunk(0))
    assert [timeline.reaches(step) for step in (1, 2, 5, 6)] == [0, 4, 1, 0]
    timeline.clear()
    assert timeline.reaches(2) == 0


def test_wrong_options_are_refused() -> None:
    with pytest.raises(ValueError, match="aggregation is one of latest, ensemble, not 'mean'"):
        ActionTimeline("mean")
    with pytest.raises(ValueError, match="finite"):
        ActionTimeline("ensemble", float("nan"))
