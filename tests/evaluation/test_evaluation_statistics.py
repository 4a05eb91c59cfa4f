"""Intervals and tests, against scipy, brute force and the equations that define them."""

import itertools
from math import sqrt

import pytest

from transformers_worldvla.evaluation.statistics import mcnemar_exact, newcombe_interval, wilson_interval

COUNTS = [(0, 1), (1, 1), (0, 10), (3, 10), (5, 10), (10, 10), (17, 20), (137, 200), (499, 500)]


@pytest.mark.parametrize(("successes", "trials"), COUNTS)
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_wilson_is_scipys(successes: int, trials: int, confidence: float) -> None:
    scipy_stats = pytest.importorskip("scipy.stats")
    expected = scipy_stats.binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    assert wilson_interval(successes, trials, confidence) == pytest.approx(tuple(expected), abs=1e-12)


@pytest.mark.parametrize(("successes", "trials"), [(3, 10), (17, 20), (137, 200)])
def test_wilson_bounds_are_where_the_score_test_turns(successes: int, trials: int) -> None:
    rate = successes / trials
    for bound in wilson_interval(successes, trials):
        assert abs(rate - bound) / sqrt(bound * (1 - bound) / trials) == pytest.approx(1.959964, abs=1e-6)


def test_wilson_at_the_ends() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(0, 10)[0] == 0.0
    assert wilson_interval(10, 10)[1] == 1.0
    assert 0.0 < wilson_interval(0, 10)[1] < 0.35, "ten failures do not prove that it never works"


@pytest.mark.parametrize("arguments", [(3, 2), (-1, 4), (1, 2, 0.0), (1, 2, 1.0)])
def test_wilson_refuses_impossible_counts(arguments: tuple[int, int]) -> None:
    with pytest.raises(ValueError):
        wilson_interval(*arguments)


@pytest.mark.parametrize(
    ("successes", "trials", "expected"),
    [  # R. G. Newcombe, Statistics in Medicine 17 (1998), table II, method 10
        ((48, 56), (80, 70), (0.0524, 0.3339)),
        ((3, 9), (10, 10), (0.1705, 0.8090)),
        ((2, 6), (7, 7), (0.0582, 0.8062)),
        ((0, 5), (29, 56), (-0.0381, 0.1926)),
        ((0, 10), (10, 10), (0.6075, 1.0)),
    ],
)
def test_newcombe_is_the_papers(
    successes: tuple[int, int], trials: tuple[int, int], expected: tuple[float, float]
) -> None:
    assert newcombe_interval(successes, trials) == pytest.approx(expected, abs=5e-5)


def test_newcombe_without_an_episode_excludes_nothing() -> None:
    low, high = newcombe_interval((0, 0), (0, 0))
    assert low <= 0 <= high


@pytest.mark.parametrize(("first", "second"), [(0, 0), (0, 1), (1, 5), (5, 1), (3, 3), (4, 12), (40, 61)])
def test_mcnemar_is_scipys_binomial_test(first: int, second: int) -> None:
    scipy_stats = pytest.importorskip("scipy.stats")
    expected = scipy_stats.binomtest(first, first + second).pvalue if first + second else 1.0
    assert mcnemar_exact(first, second) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("first", "second"), [(0, 4), (1, 5), (2, 7), (3, 3)])
def test_mcnemar_counts_all_ways_coins_can_fall(first: int, second: int) -> None:
    pairs = first + second
    heads = [sum(coins) for coins in itertools.product((0, 1), repeat=pairs)]
    as_extreme = sum(abs(2 * count - pairs) >= abs(first - second) for count in heads)
    assert mcnemar_exact(first, second) == pytest.approx(as_extreme / 2**pairs)


def test_mcnemar_refuses_negative_counts() -> None:
    with pytest.raises(ValueError):
        mcnemar_exact(-1, 2)
