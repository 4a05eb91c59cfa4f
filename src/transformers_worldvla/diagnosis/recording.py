"""The recorded moments that a model is probed with: pictures, instruction and the actions that followed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..action_tokenization_worldvla import Embodiment
from ..data.episodes import EpisodeDataset


@dataclass(frozen=True)
class Moment:
    """What a model sees and what came next.

    Attributes:
        images: pictures (H, W, 3) uint8 of M time steps with C cameras each, oldest first.
        instruction: what was to be done.
        actions: the chunk that followed, (K, D) in robot units.
    """

    images: tuple[np.ndarray, ...]
    instruction: str
    actions: np.ndarray

    def with_images(self, images: Sequence[np.ndarray]) -> "Moment":
        return replace(self, images=tuple(images))


def read_moments(
    dataset: EpisodeDataset, robot: Embodiment, history: int, num_actions: int, count: int
) -> list[Moment]:
    """Up to `count` moments spread over a dataset: different episodes first, then different steps.

    Raises ValueError when no episode is long enough, EpisodeError for one that cannot be read.
    """
    starts = [
        (position, step)
        for position, length in enumerate(dataset.lengths)
        for step in range(history - 1, length - num_actions + 1)
    ]
    if not starts:
        raise ValueError(f"no episode has the {history - 1 + num_actions} steps that a sample needs")
    places = np.linspace(0, len(starts) - 1, min(count, len(starts)) + 2)[1:-1].round().astype(int)
    moments = []
    for position, step in dict.fromkeys(starts[place] for place in places.tolist()):
        episode = dataset[position]
        images = [
            episode.frame(camera, time) for time in range(step - history + 1, step + 1) for camera in robot.cameras
        ]
        moments.append(Moment(tuple(images), episode.instruction, episode.actions[step : step + num_actions]))
    return moments


def invent_moments(robot: Embodiment, history: int, num_actions: int, count: int, side: int = 256) -> list[Moment]:
    """Moments without a dataset: smooth coloured noise, for probes that ask only whether pictures matter at all."""
    rng = np.random.default_rng(0)
    low, high = np.array(robot.low), np.array(robot.high)
    moments = []
    for _ in range(count):
        images = []
        for _ in range(history * robot.num_cameras):
            coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            images.append(np.kron(coarse, np.ones((side // 8, side // 8, 1), dtype=np.uint8)))
        actions = rng.uniform(low, np.maximum(high, low), (num_actions, robot.action_dim))
        moments.append(Moment(tuple(images), "pick up the red cup", actions))
    return moments
