"""Toy data for training: random episodes as token ids."""

from typing import Any

import numpy as np
from small_checkpoint import LIBERO, NUM_ACTIONS
from torch.utils.data import Dataset

from transformers_worldvla.data import SampleDataset, TokenizedEpisode

SIDE = 4  # codes of a picture of 64 pixels


def random_episodes(processor: Any, robot: Any = LIBERO, count: int = 2, steps: int = 8, seed: int = 0) -> list[Any]:
    """Episodes of noise."""
    rng = np.random.default_rng(seed)
    codes = np.array(processor.tokens.image_codes)
    return [
        TokenizedEpisode(
            index=number,
            instruction="push the square" if number % 2 else "lift",
            frames=rng.choice(codes, (steps, robot.num_cameras, SIDE, SIDE)).astype(np.int32),
            actions=rng.uniform(robot.low, robot.high, (steps, robot.action_dim)).astype(np.float32),
            embodiment=robot.name,
        )
        for number in range(count)
    ]


def random_samples(
    processor: Any, robot: Any = LIBERO, count: int = 2, steps: int = 8, seed: int = 0, **options: Any
) -> SampleDataset:
    """Their samples; `options` go to `SampleDataset`."""
    return SampleDataset(
        random_episodes(processor, robot, count, steps, seed), **{"num_actions": NUM_ACTIONS, **options}
    )


class Weighted(Dataset):
    """Some samples with loss weights of their own."""

    def __init__(self, samples: Any, weights: list[float]):
        self.samples, self.weights = samples, weights

    def __len__(self) -> int:
        return len(self.weights)

    def __getitem__(self, item: int) -> dict[str, Any]:
        return self.samples[item] | {"sample_weights": self.weights[item]}
