"""Intervals and tests for success rates: Wilson's, Newcombe's and McNemar's exact test, in closed form.

Episodes that crashed have no outcome and are left out before anything here is called.
"""

from math import comb, sqrt
from statistics import NormalDist


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a success rate; (0, 1) without a trial.

    Unlike the normal interval it is never empty at 0 or `trials` successes and holds its level for few trials.
    Raises ValueError for counts that cannot be.
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes in {trials} trials cannot be")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence lies between 0 and 1, not at {confidence}")
    if trials == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2.0)
    rate, weight = successes / trials, z * z / trials
    center = (rate + weight / 2.0) / (1.0 + weight)
    reach = z * sqrt(rate * (1.0 - rate) / trials + weight / (4.0 * trials)) / (1.0 + weight)
    low = 0.0 if successes == 0 else max(0.0, center - reach)
    high = 1.0 if successes == trials else min(1.0, center + reach)
    return low, high


def newcombe_interval(
    successes: tuple[int, int], trials: tuple[int, int], confidence: float = 0.95
) -> tuple[float, float]:
    """Newcombe's interval (1998, method 10) of the second success rate less the first, of independent episodes."""
    bounds = [wilson_interval(won, count, confidence) for won, count in zip(successes, trials, strict=True)]
    first, second = (won / count if count else 0.5 for won, count in zip(successes, trials, strict=True))
    (low_first, high_first), (low_second, high_second) = bounds
    difference = second - first
    low = difference - sqrt((second - low_second) ** 2 + (high_first - first) ** 2)
    high = difference + sqrt((high_second - second) ** 2 + (first - low_first) ** 2)
    return low, high


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Two-sided p value that two paired policies are equally good.

    Counts are the pairs that only one of them solved; pairs with one outcome say nothing about the difference. Under
    the hypothesis each of the n discordant pairs is a fair coin, so p = min(1, 2 P[Binomial(n, 1/2) <= smaller count]).
    Raises ValueError for negative counts.
    """
    if only_first < 0 or only_second < 0:
        raise ValueError("counts of pairs are not negative")
    pairs = only_first + only_second
    tail = sum(comb(pairs, count) for count in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**pairs)
