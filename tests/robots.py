"""Two robots that share little: what the tests of samples, batches and training losses are made of."""

from typing import Any

import numpy as np
from small_checkpoint import GANTRY, small_processor

from transformers_worldvla import WorldVLAProcessor
from transformers_worldvla.action_tokenization_worldvla import LIBERO
from transformers_worldvla.data import SampleDataset, TokenizedEpisode

SIDE = 4  # codes a side: 64 pixels
ROBOTS = {"libero": LIBERO, "gantry": GANTRY}  # D = 7 and D = 3


def two_robots() -> WorldVLAProcessor:
    return small_processor(*ROBOTS.values())


def tokenized_episodes(
    processor: WorldVLAProcessor, robot: str = "libero", lengths: tuple[int, ...] = (7, 9), seed: int = 0
) -> list[TokenizedEpisode]:
    """Episodes of noise; `instruction` and every frame of every episode differ."""
    rng, embodiment = np.random.default_rng(seed), ROBOTS[robot]
    return [
        TokenizedEpisode(
            index=10 + number,
            instruction=f"{robot} does thing {number}",
            frames=rng.choice(processor.tokens.image_codes, (steps, embodiment.num_cameras, SIDE, SIDE)),
            actions=rng.uniform(embodiment.low, embodiment.high, (steps, embodiment.action_dim)).astype(np.float32),
            embodiment=robot,
        )
        for number, steps in enumerate(lengths)
    ]


def samples_of(processor: WorldVLAProcessor, robot: str = "libero", **fields: Any) -> SampleDataset:
    """All kinds of sample of some episodes."""
    lengths = fields.pop("lengths", (7, 9))
    fields = {"kinds": ("action", "world", "video"), "num_actions": 3, **fields}
    return SampleDataset(tokenized_episodes(processor, robot, lengths), **fields)
