"""Sequences written out by hand from the published ids, and small inputs: what the processor's tests compare with."""

import numpy as np

from transformers_worldvla import WorldVLAImageProcessor, WorldVLAProcessor
from transformers_worldvla.action_tokenization_worldvla import LIBERO, Embodiment

BOS, PAD, SEP, PLACEHOLDER = 0, 1, 8710, 8711
BOI, EOI, NEWLINE, GRID_ZERO = 8197, 8196, 8803, 8804
BOA, EOA, FIRST_BIN = 10004, 15004, 10006

ARM = Embodiment(
    "arm", low=[-1, -2, 0, 10], high=[1, 2, 3, 20], cameras=["front", "wrist"], semantics="absolute", rotation=90
)
TEXT = "open the drawer"
ACTION = [0.1, -0.2, 0.3, 0.05, -0.1, 0.2, 1]
ACTION_BLOCK = [BOA, 10147, 10106, 10174, 10142, 10099, 10201, 10260, EOA]


def libero_processor(tokenizer, **fields) -> WorldVLAProcessor:
    """One embodiment, pictures of 64 x 64 pixels: 4 x 4 codes, 24 tokens."""
    return WorldVLAProcessor(WorldVLAImageProcessor(64), tokenizer, **{"embodiments": {"libero": LIBERO}, **fields})


def two_robot_processor(tokenizer, **fields) -> WorldVLAProcessor:
    """LIBERO (D=7, C=1) and an arm (D=4, C=2), none of them the default."""
    return libero_processor(tokenizer, embodiments={"libero": LIBERO, "arm": ARM.to_dict()}, **fields)


def picture(seed: int = 0, height: int = 64, width: int = 64) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def codes(processor: WorldVLAProcessor, seed: int = 0, height: int = 4, width: int = 4) -> np.ndarray:
    """Token ids of the codes of a picture, (height, width)."""
    return np.random.default_rng(seed).choice(processor.tokens.image_codes, (height, width))


def text_ids(processor: WorldVLAProcessor, text: str) -> list[int]:
    return processor.tokenizer(text, add_special_tokens=False)["input_ids"]


def image_block(codes: np.ndarray) -> list[int]:
    height, width = codes.shape
    rows = [token for row in codes.tolist() for token in (*row, NEWLINE)]
    return [BOI, GRID_ZERO + height // 2, GRID_ZERO + width // 2, *rows, EOI]


def pixels_block(height: int = 64, width: int = 64) -> list[int]:
    """An image block whose codes are still pixels."""
    return image_block(np.full((height // 16, width // 16), PLACEHOLDER))
