"""Pushes that an expert has to recover from, so that its demonstrations also show the way back.

A policy that learned from faultless episodes has never seen where its own small errors lead (Ross et al. 2011; noise on
the demonstrator's actions: Laskey et al. 2017, DART). What is recorded is what the robot did, push included: a world
model needs that, and a policy that answers its likeliest action follows the expert, because pushes are rare and point
anywhere.
"""

import numpy as np

STEPS = (3, 6)  # of a push
STRENGTH = 0.6  # of an action, largest, along each axis
LEAST_MOTION = 0.15  # of an action: a hand that waits or grasps is left alone


class Disturbance:
    """Adds a push to the translation of an action now and then; the same seed pushes the same way.

    Args:
        probability: that a push begins at a step in which the hand travels.
    """

    def __init__(self, probability: float, seed: int):
        self._probability = probability
        self._random = np.random.default_rng(seed)
        self._push, self._left = np.zeros(3), 0

    def apply(self, action: np.ndarray) -> np.ndarray:
        """The action (7,) that is carried out in place of the expert's."""
        if np.abs(action[:3]).max() < LEAST_MOTION:
            self._left = 0
            return action
        if self._left == 0 and self._random.random() < self._probability:
            self._left = int(self._random.integers(*STEPS, endpoint=True))
            self._push = self._random.uniform(-STRENGTH, STRENGTH, 3)
        if self._left == 0:
            return action
        self._left -= 1
        return np.concatenate([np.clip(action[:3] + self._push, -1, 1), action[3:]]).astype(np.float32)
