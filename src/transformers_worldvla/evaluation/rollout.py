"""One closed-loop episode: an environment, a policy, and the loop between them.

`play` is the only loop in which anything acts here: a model, the scripted expert and a robot that keeps still go
through it, in LIBERO and in gymnasium environments alike. It knows no processes (`workers`) and no files (`results`).
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np


class Environment(Protocol):
    """A task that a robot is to do."""

    @property
    def instruction(self) -> str: ...

    @property
    def ended(self) -> bool:
        """Whether the episode is over for another reason than success."""

    @property
    def still_action(self) -> np.ndarray:
        """(D,), the action that moves nothing."""

    def start(self, trial: int, seed: int) -> None:
        """Begin an episode; nothing of it depends on what ran before."""

    def step(self, action: np.ndarray) -> bool:
        """Carry out an action (D,) and return whether the task is done."""

    def render(self, camera: str) -> np.ndarray:
        """The last picture of a camera, (H, W, 3) uint8, in the model's orientation."""

    def expert(self) -> Callable[[], np.ndarray]:
        """The scripted expert for the episode that has begun: each call gives the next action (D,)."""

    def describe(self, looks: bool) -> dict[str, Any]:
        """What belongs into the row of an episode: `versions`, and when pictures are looked at what draws them. A
        `warning` among it is shown once and left out of the row."""

    def close(self) -> None: ...


class EnvironmentSpec(Protocol):
    """Says which environment; small, hashable and picklable, so that another process can open it."""

    def open(self) -> Environment: ...


class Policy(Protocol):
    """Chooses actions in chunks."""

    def begin(self, environment: Environment) -> None:
        """An episode has begun."""

    def plan(self) -> np.ndarray:
        """The next actions (K, D), all of which will be carried out unless the episode ends before."""

    def stepped(self, remaining: int) -> None:
        """One of them was carried out, the episode goes on, and so many of the chunk are left."""


@dataclass
class Outcome:
    """What became of an episode. `success` is None until it ended; `actions` are those carried out so far."""

    success: bool | None = None
    actions: list[np.ndarray] = field(default_factory=list)


def play(environment: Environment, policy: Policy, budget: int, outcome: Outcome) -> None:
    """Run an episode that has been started, to success, the end of the environment, or `budget` steps.

    `outcome` is filled while it goes on, so that after an exception it says how far the episode came.
    """
    policy.begin(environment)
    while True:
        chunk = policy.plan()  # (K, D)
        for remaining in reversed(range(len(chunk))):
            action = np.asarray(chunk[len(chunk) - 1 - remaining])
            success = environment.step(action)
            outcome.actions.append(action)
            if success or environment.ended or len(outcome.actions) >= budget:
                outcome.success = success
                return
            policy.stepped(remaining)


def episode_seed(seed: int, suite: str, task: int, trial: int) -> int:
    """The seed (below 2**32) of everything random in one episode: the same whatever runs beside and before it."""
    sequence = np.random.SeedSequence([seed, zlib.crc32(suite.encode()), task, trial])
    return int(sequence.generate_state(1)[0])


class StillPolicy:
    """Moves nothing: what a task gives for free."""

    def begin(self, environment: Environment) -> None:
        self._chunk = environment.still_action[None]

    def plan(self) -> np.ndarray:
        return self._chunk

    def stepped(self, remaining: int) -> None:
        pass


class ExpertPolicy:
    """The environment's scripted expert, which reads the simulator's state."""

    def begin(self, environment: Environment) -> None:
        self._act = environment.expert()

    def plan(self) -> np.ndarray:
        return np.asarray(self._act())[None]

    def stepped(self, remaining: int) -> None:
        pass


class FramePolicy:
    """Shows frames to whoever answers with a chunk of actions.

    Args:
        answer: called with the new frames (n, C, H, W, 3), oldest first, and whether the episode has just begun;
            returns the next chunk (K, D).
        cameras: what the environment calls the C cameras.
        history: M, time steps that the answerer looks at.

    Only frames that are looked at are drawn. The M frames of a query are those of the last M control steps: the
    present one and those just before it, also where a query follows a chunk; at the start of an episode there is one.
    """

    def __init__(self, answer: Callable[[np.ndarray, bool], np.ndarray], cameras: tuple[str, ...], history: int):
        self._answer, self._cameras, self._history = answer, cameras, history

    def begin(self, environment: Environment) -> None:
        self._environment = environment
        self._fresh = True
        self._frames = [self._look()]

    def plan(self) -> np.ndarray:
        chunk = self._answer(np.stack(self._frames), self._fresh)
        self._fresh, self._frames = False, []
        return chunk

    def stepped(self, remaining: int) -> None:
        if remaining < self._history:
            self._frames.append(self._look())

    def _look(self) -> np.ndarray:
        return np.stack([self._environment.render(camera) for camera in self._cameras])  # (C, H, W, 3)
