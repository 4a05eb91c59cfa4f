"""From overlapping chunks of actions to one action a control step. numpy only: robots' computers run this too.

A chunk planned at step t proposes actions for the steps t .. t + K - 1. Where chunks overlap, either the newest one
decides (`latest`) or their proposals are averaged (`ensemble`: temporal ensembling as in ACT, Zhao et al. 2023,
section IV-A and its code: weights exp(-m i), i = 0 for the oldest chunk that still covers the step).
"""

import numpy as np

AGGREGATIONS = ("latest", "ensemble")


class ActionTimeline:
    """The chunks of one episode, laid out over its control steps.

    Args:
        aggregation: `latest` or `ensemble`.
        coefficient: m of the ensemble's weights; 0 is the plain mean, positive values favour older chunks, negative
            ones newer chunks.
    """

    def __init__(self, aggregation: str = "latest", coefficient: float = 0.01):
        if aggregation not in AGGREGATIONS:
            raise ValueError(f"aggregation is one of {', '.join(AGGREGATIONS)}, not {aggregation!r}")
        if not np.isfinite(coefficient):
            raise ValueError(f"the coefficient of the ensemble is a finite number, not {coefficient}")
        self.aggregation = aggregation
        self.coefficient = coefficient
        self._chunks: list[tuple[int, np.ndarray]] = []  # (first step, actions (K, D)), oldest first

    def clear(self) -> None:
        self._chunks = []

    def add(self, step: int, actions: np.ndarray) -> None:
        """Lay out a chunk (K, D) that was planned on the frame of `step`; it may arrive later than that step."""
        if self.aggregation == "latest":
            self._chunks = []
        self._chunks.append((step, np.asarray(actions)))
        self._chunks.sort(key=lambda chunk: chunk[0])

    def action(self, step: int) -> np.ndarray | None:
        """The action (D,) of a step, None where no chunk reaches. Earlier steps are forgotten."""
        self._chunks = [(first, actions) for first, actions in self._chunks if first + len(actions) > step]
        proposals = [actions[step - first] for first, actions in self._chunks if first <= step]
        if not proposals:
            return None
        weights = np.exp(-self.coefficient * np.arange(len(proposals)))
        return np.average(np.stack(proposals), axis=0, weights=weights)

    def reaches(self, step: int) -> int:
        """How many steps from `step` on have an action."""
        return max((first + len(actions) - step for first, actions in self._chunks if first <= step), default=0)
