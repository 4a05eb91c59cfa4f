"""A small environment whose pictures say which step they show: for tests of the loop around environments.

A slider is pushed along a line by actions (7,) of LIBERO's arm. It is done when it has been pushed `goal` in all.
"""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

SIDE = 64


@dataclass(frozen=True)
class CountingSpec:
    """`failing` trials raise at step 3, `dying` ones kill their process there, `ending` ones end at step 3."""

    goal: float = 3.0
    failing: tuple[int, ...] = ()
    dying: tuple[int, ...] = ()
    ending: tuple[int, ...] = ()

    def open(self) -> "CountingEnvironment":
        return CountingEnvironment(self)


class CountingEnvironment:
    instruction = "push the slider"
    still_action = np.zeros(7)

    def __init__(self, spec: CountingSpec):
        self.spec = spec
        self.drawn: list[int] = []  # the steps that were looked at

    def start(self, trial: int, seed: int) -> None:
        self.trial, self.place, self.steps, self.ended = trial, (seed % 97) / 97.0, 0, False

    def step(self, action: np.ndarray) -> bool:
        self.steps += 1
        if self.steps == 3:
            if self.trial in self.spec.failing:
                raise FloatingPointError("the slider\nfell off")
            if self.trial in self.spec.dying:
                os.kill(os.getpid(), signal.SIGKILL)
            self.ended = self.trial in self.spec.ending
        self.place += abs(float(action[0]))
        return self.place >= self.spec.goal

    def render(self, camera: str) -> np.ndarray:
        self.drawn.append(self.steps)
        picture = np.full((SIDE, SIDE, 3), self.steps, np.uint8)
        left = int(self.place * 10) % (SIDE - 16)
        picture[16:48, left : left + 16] = (250, 40, len(camera))
        return picture

    def expert(self) -> Callable[[], np.ndarray]:
        return lambda: np.array([0.5, 0, 0, 0, 0, 0, 1.0])

    def describe(self, looks: bool) -> dict[str, Any]:
        return {"versions": {"slider": "1"}, **({"renderer": "numpy", "warning": "a slider"} if looks else {})}

    def close(self) -> None:
        pass
