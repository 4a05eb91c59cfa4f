"""Samples with pictures instead of tokens, for training that changes the pictures (augmentation).

Slower than a frame-token cache: every picture is read, and tokenized by the model, each time it is shown. Which frames
and actions make a sample is the business of `samples`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .augmentation import ImageAugmentation
from .episodes import Episode
from .samples import EpisodeSamples


class PixelSampleDataset(EpisodeSamples):
    """The samples of episodes with pictures; rules as `EpisodeSamples`.

    `WorldVLATrainer` turns the pictures of a batch into tokens; elsewhere call `model.discretize(**batch)`, or pass the
    batch to the model, which does the same.

    Args:
        episodes: as `load_episodes` returns them.
        cameras: in the order of the embodiment's; by default those of each episode, in its order.
        embodiment: name of the robot in the processor; None is the processor's default.
        augmentation: none by default. One and the same for all pictures of a sample, another one in every epoch.
        rules: `kinds`, `num_actions`, `history`, `world_history`, `history_dropout`, `seed` of `EpisodeSamples`.
    """

    picture_names = ("images", "target_images")

    def __init__(
        self,
        episodes: Sequence[Episode],
        cameras: Sequence[str] | None = None,
        embodiment: str | None = None,
        augmentation: ImageAugmentation | None = None,
        **rules: Any,
    ):
        super().__init__(episodes, **rules)
        self.cameras = cameras
        self.embodiment = embodiment
        self.augmentation = augmentation
        self._actions_read: dict[int, np.ndarray] = {}  # readers go to the file each time

    def _frames(self, episode: Episode, start: int, stop: int, rng: np.random.Generator) -> list[list[np.ndarray]]:
        cameras = episode.cameras if self.cameras is None else self.cameras
        views = [episode.frames(camera, start, stop) for camera in cameras]
        pictures = [view[step] for step in range(stop - start) for view in views]
        if self.augmentation is not None:
            pictures = self.augmentation(pictures, rng)
        return [pictures[first : first + len(views)] for first in range(0, len(pictures), len(views))]

    def _actions(self, number: int) -> np.ndarray:
        if number not in self._actions_read:
            self._actions_read[number] = self.episodes[number].actions
        return self._actions_read[number]

    def _embodiment(self, episode: Episode) -> str | None:
        return self.embodiment
