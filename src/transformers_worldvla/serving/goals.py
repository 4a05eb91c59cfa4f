"""How near pictures are to a goal picture: a reward for dreams, a score for plans.

The distance is of pixels and knows no task: it is small where the whole picture looks like the goal, and a gripper, a
few pixels of it, hardly counts. Give a function of your own where that is not what matters.
"""

from typing import Any

import numpy as np
import torch

from .dream_world import DreamWorld


class GoalImage:
    """Pictures as they should become.

    Args:
        pictures: (C, H, W, 3) uint8, cropped as the model sees pictures; `from_pictures` makes them.
        reached: distance at which the goal counts as reached, None for never.
    """

    def __init__(self, pictures: np.ndarray, reached: float | None = None):
        if pictures.ndim != 4 or pictures.shape[-1] != 3 or pictures.dtype != np.uint8:
            raise ValueError(f"goal pictures are (C, H, W, 3) uint8, not {pictures.dtype} {pictures.shape}")
        self.pictures = pictures
        self.reached = reached

    @classmethod
    def from_pictures(
        cls, world: DreamWorld, pictures: Any, reached: float | None = None, reconstruct: bool = True
    ) -> "GoalImage":
        """From one picture, or C pictures by camera name.

        `reconstruct`: through the image tokenizer and back, as imagined frames are: what the tokenizer cannot show then
        does not count as distance.
        """
        cropped = world.crop(pictures)
        if reconstruct:
            pixels = [world.processor.image_processor.pixels(picture) for picture in cropped]
            ids = world.model.tokenize_images(torch.from_numpy(np.stack(pixels)))
            decoded = world.processor.image_processor.postprocess(world.model.detokenize_images(ids))
            cropped = np.stack([np.asarray(picture) for picture in decoded])
        return cls(cropped, reached)

    def distance(self, pictures: np.ndarray) -> np.ndarray:
        """Root mean square difference of pictures (..., C, H, W, 3) from the goal: (...) in [0, 1].

        Raises ValueError for pictures of another size.
        """
        if pictures.shape[-4:] != self.pictures.shape:
            raise ValueError(f"the goal has pictures {self.pictures.shape}, these have {pictures.shape[-4:]}")
        differences = pictures.astype(np.float32) - self.pictures.astype(np.float32)
        return np.sqrt(np.square(differences).mean(axis=(-4, -3, -2, -1), dtype=np.float64)) / 255.0

    def reward(self, before: np.ndarray, action: np.ndarray, after: np.ndarray) -> float:
        """A reward of `DreamEnv`: minus the distance of the new frame."""
        return -float(self.distance(after))

    def is_success(self, pictures: np.ndarray) -> bool:
        """For `DreamEnv`: whether the goal is reached."""
        return self.reached is not None and bool(self.distance(pictures) <= self.reached)
