"""What the actions of a dataset look like, dimension by dimension, and the ranges that follow from it.

Ranges are min and max as in the paper (section 3.2), or the 1 % and 99 % quantiles. A dimension that never moves,
hardly moves or has outliers would make a range that wastes bins or amplifies noise: each is flagged with what is done
about it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

METHODS = ("minmax", "quantile")
QUANTILES = (0.01, 0.99)
CONSTANT = 1e-6  # of the value's size: float32 noise is no motion
NEAR_CONSTANT = 1e-3  # of the other dimensions' median range
OUTLIER = 4.0  # times as wide as the middle 98 %


@dataclass(frozen=True)
class Flag:
    """Something odd about a dimension of the actions, and what is done about it."""

    dimension: int
    name: str
    kind: str  # constant, near-constant, rarely moves, outliers
    found: str
    done: str

    def __str__(self) -> str:
        return f"{self.name} (dimension {self.dimension}) {self.kind}: {self.found}; {self.done}"


@dataclass(frozen=True, eq=False)
class ActionStatistics:
    """Statistics of N actions, each an array (D,) float64 in robot units, and the ranges by `method`."""

    method: str
    names: tuple[str, ...]
    count: int
    minimum: np.ndarray
    maximum: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    q01: np.ndarray
    q99: np.ndarray
    outside: np.ndarray  # share of actions outside [q01, q99]

    @cached_property
    def flags(self) -> list[Flag]:
        """What is odd, by dimension."""
        return [self._flag(index, kind) for index, kind in enumerate(self._kinds) if kind is not None]

    @cached_property
    def ranges(self) -> tuple[np.ndarray, np.ndarray]:
        """`low` and `high`, (D,) each.

        A constant dimension gets the range [c, c]: every token of it decodes to c, so that nothing can move what never
        moved. A near-constant one is widened around its middle to 1/1000 of the other dimensions' median range. One
        that rarely moves keeps min and max, as its quantiles coincide.
        """
        if self.method == "minmax":
            low, high = self.minimum.copy(), self.maximum.copy()
        else:
            low, high = self.q01.copy(), self.q99.copy()
        for index, kind in enumerate(self._kinds):
            if kind == "constant":
                low[index] = high[index] = self.q01[index]
            elif kind == "near-constant":
                middle = (self.minimum[index] + self.maximum[index]) / 2
                low[index], high[index] = middle - self._floors[index] / 2, middle + self._floors[index] / 2
            elif kind == "rarely moves":
                low[index], high[index] = self.minimum[index], self.maximum[index]
        return low, high

    @cached_property
    def _is_constant(self) -> np.ndarray:
        size = np.maximum(np.abs(self.minimum), np.abs(self.maximum))
        return self.maximum - self.minimum <= CONSTANT * size

    @cached_property
    def _floors(self) -> list[float]:
        """The narrowest range that counts as motion, by dimension."""
        ranges = self.maximum - self.minimum
        moving = [set(np.flatnonzero(~self._is_constant).tolist()) - {index} for index in range(len(ranges))]
        return [NEAR_CONSTANT * float(np.median(ranges[list(others)])) if others else 0.0 for others in moving]

    @cached_property
    def _kinds(self) -> list[str | None]:
        kinds: list[str | None] = []
        for index in range(len(self.minimum)):
            full, middle = self.maximum[index] - self.minimum[index], self.q99[index] - self.q01[index]
            if self._is_constant[index]:
                kinds.append("constant")
            elif full < self._floors[index]:
                kinds.append("near-constant")
            elif middle <= CONSTANT * full:
                kinds.append("rarely moves")
            else:
                kinds.append("outliers" if full > OUTLIER * middle else None)
        return kinds

    def _flag(self, index: int, kind: str) -> Flag:
        low, high, q01, q99 = (float(v[index]) for v in (self.minimum, self.maximum, self.q01, self.q99))
        if kind == "constant":
            found, done = f"always {q01:g}", "masked, it decodes to that value whatever the model says"
        elif kind == "near-constant":
            found, done = f"moves by {high - low:.3g} only", f"range widened to {self._floors[index]:.3g}"
        elif kind == "rarely moves":
            found, done = f"{q01:g} in 98 % of the steps", f"range [{low:g}, {high:g}] by minimum and maximum"
        elif self.method == "minmax":
            found = f"[{low:g}, {high:g}], 98 % within [{q01:g}, {q99:g}]"
            done = f"nothing: quantile ranges would make bins {(high - low) / (q99 - q01):.1f} times finer"
        else:
            found = f"[{low:g}, {high:g}], 98 % within [{q01:g}, {q99:g}]"
            done = f"{self.outside[index]:.2%} of the steps are clipped"
        return Flag(index, self.names[index], kind, found, done)

    def to_dict(self) -> dict[str, Any]:
        """Method, numbers and flags, ready for JSON."""
        arrays = {"min": self.minimum, "max": self.maximum, "mean": self.mean, "std": self.std}
        arrays |= {"q01": self.q01, "q99": self.q99}
        numbers = {name: values.tolist() for name, values in arrays.items()}
        return {"method": self.method, "steps": self.count, **numbers, "flags": [str(flag) for flag in self.flags]}

    def __str__(self) -> str:
        """A row a dimension, then the flags."""
        low, high = self.ranges
        columns = {"min": self.minimum, "q01": self.q01, "mean": self.mean, "q99": self.q99, "max": self.maximum}
        columns |= {"std": self.std, "low": low, "high": high}
        rows = [["dimension", *columns]]
        for index, name in enumerate(self.names):
            rows.append([name, *(f"{values[index]:.4g}" for values in columns.values())])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join([f"actions, {self.count} steps, ranges by {self.method}", *lines, *map(str, self.flags)])


def action_statistics(
    actions: Sequence[np.ndarray], method: str = "minmax", names: Sequence[str] | None = None
) -> ActionStatistics:
    """Statistics of the actions of some episodes, (T, D) each, exact: all of them are looked at together.

    `names` are those of the dimensions, numbers by default. Raises ValueError for another method and for no actions.
    """
    if method not in METHODS:
        raise ValueError(f"statistics are one of {', '.join(METHODS)}, not {method!r}")
    if sum(map(len, actions)) == 0:
        raise ValueError("statistics need at least one action")
    rows = np.concatenate([np.asarray(episode, dtype=np.float64) for episode in actions])  # (N, D)
    q01, q99 = np.quantile(rows, QUANTILES, axis=0)
    return ActionStatistics(
        method=method,
        names=tuple(names) if names else tuple(str(index) for index in range(rows.shape[1])),
        count=len(rows),
        minimum=rows.min(0),
        maximum=rows.max(0),
        mean=rows.mean(0),
        std=rows.std(0),
        q01=q01,
        q99=q99,
        outside=((rows < q01) | (rows > q99)).mean(0),
    )
