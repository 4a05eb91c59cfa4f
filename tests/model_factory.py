"""Tiny random models and hand-written sequences for them: what the tests of the model core share.

The vocabulary is compact and its ids are shuffled, so that nothing passes that assumes an order of ids. Weights are
drawn large enough that a wrong mask or position changes every logit.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from transformers_worldvla import WorldVLAConfig, WorldVLAForCausalLM, WorldVLATokens
from transformers_worldvla.tokens_worldvla import special_token_names

NUM_CODES, NUM_TEXT, MAX_GRID = 32, 50, 4
VQ_SIZES = {
    "base_channels": 32,
    "channel_multiplier": [1, 1, 1, 1, 1],
    "num_res_blocks": 1,
    "embed_dim": 8,
    "latent_channels": 16,
    "resolution": 64,
}


def compact_vocabulary(num_codes: int = NUM_CODES, shuffled: bool = True) -> dict[str, int]:
    """Names of the grammar and 50 text pieces, `text0` .. `text49`, with ids in random order."""
    names = [*special_token_names(num_codes, MAX_GRID), *(f"text{index}" for index in range(NUM_TEXT))]
    ids = np.random.default_rng(7).permutation(len(names)).tolist() if shuffled else range(len(names))
    return dict(zip(names, ids, strict=True))


def tiny_config(num_codes: int = NUM_CODES, shuffled: bool = True, **fields: Any) -> WorldVLAConfig:
    vocabulary = fields.pop("vocabulary_map", None) or compact_vocabulary(num_codes, shuffled)
    sizes = {
        "vocab_size": max(vocabulary.values()) + 1,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 1024,
        "initializer_range": 0.3,
        "vq_config": {**VQ_SIZES, "num_embeddings": num_codes},
    }
    return WorldVLAConfig(**{**sizes, "vocabulary_map": vocabulary, **fields})


def tiny_model(seed: int = 0, attention: str = "sdpa", **fields: Any) -> WorldVLAForCausalLM:
    """A random model in evaluation mode; `fields` go to its config."""
    torch.manual_seed(seed)
    model = WorldVLAForCausalLM(tiny_config(**fields)).eval()
    model.set_attn_implementation(attention)
    return model


@contextmanager
def configured(model: WorldVLAForCausalLM, **fields: Any) -> Iterator[WorldVLAForCausalLM]:
    """The model with other config fields for a while."""
    before = {name: getattr(model.config, name) for name in fields}
    for name, value in fields.items():
        setattr(model.config, name, value)
    try:
        yield model
    finally:
        for name, value in before.items():
            setattr(model.config, name, value)


class Writer:
    """Writes random sequences of one vocabulary, block by block and without the code under test."""

    def __init__(self, vocabulary: dict[str, int], seed: int = 0):
        self.ids = vocabulary
        self.rng = np.random.default_rng(seed)
        self.codes = [vocabulary[name] for name in vocabulary if name.startswith("IMGIMG")]
        self.bins = [vocabulary[f"<reserved{10002 + index}>"] for index in range(256)]
        self.texts = [vocabulary[name] for name in vocabulary if name.startswith("text")]

    @property
    def separator(self) -> int:
        return self.ids["<reserved08706>"]

    def text(self, length: int = 4) -> list[int]:
        return self.rng.choice(self.texts, length).tolist()

    def image(self, grid: tuple[int, int] = (1, 1), codes: Iterable[int] | None = None) -> list[int]:
        """An image of `grid` units of 32 pixels, so 2 x 2 codes each."""
        height, width = 2 * grid[0], 2 * grid[1]
        draw = iter(self.rng.choice(self.codes, height * width).tolist() if codes is None else codes)
        ids = [self.ids["<racm3:break>"], *(self.ids[f"<reserved{8800 + side:05d}>"] for side in grid)]
        for _ in range(height):
            ids += [*(next(draw) for _ in range(width)), self.ids["<reserved08799>"]]
        return [*ids, self.ids["<eoss>"]]

    def pixels(self, grid: tuple[int, int] = (1, 1)) -> list[int]:
        """An image whose codes are placeholders."""
        return self.image(grid, [self.ids["<reserved08707>"]] * (4 * grid[0] * grid[1]))

    def action(self, dim: int = 7) -> list[int]:
        return [self.ids["<reserved10000>"], *self.rng.choice(self.bins, dim).tolist(), self.ids["<reserved15000>"]]

    def action_prompt(self, length: int = 4, images: int = 1, grid: tuple[int, int] = (1, 1)) -> list[int]:
        blocks = [token for _ in range(images) for token in self.image(grid)]
        return [self.ids["<s>"], *self.text(length), *blocks, self.separator]

    def world_prompt(
        self, rounds: int = 1, cameras: int = 1, dim: int = 7, grid: tuple[int, int] = (1, 1), length: int = 4
    ) -> list[int]:
        ids = [self.ids["<s>"], *self.text(length)]
        for _ in range(rounds):
            ids += [token for _ in range(cameras) for token in self.image(grid)] + self.action(dim)
        return [*ids, self.separator]

    def action_sample(self, actions: int = 3, dim: int = 7, **prompt: Any) -> tuple[list[int], int]:
        """Ids of a whole action sample, and the length of its prompt."""
        prompt_ids = self.action_prompt(**prompt)
        return prompt_ids + [t for _ in range(actions) for t in self.action(dim)] + [self.separator], len(prompt_ids)

    def world_sample(self, targets: int = 1, **prompt: Any) -> tuple[list[int], int]:
        prompt_ids = self.world_prompt(**prompt)
        grid = prompt.get("grid", (1, 1))
        return prompt_ids + [t for _ in range(targets) for t in self.image(grid)] + [self.separator], len(prompt_ids)


def writer(model: WorldVLAForCausalLM, seed: int = 0) -> Writer:
    return Writer(model.config.vocabulary_map, seed)


def left_pad(model: WorldVLAForCausalLM, rows: list[list[int]], extra: int = 0) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` of rows padded on the left to the longest (and `extra` more)."""
    width = max(map(len, rows)) + extra
    pad = model.config.vocabulary_map["<pad>"]
    return {
        "input_ids": torch.tensor([[pad] * (width - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
    }


def labels_of(ids: list[int], prompt: int) -> list[int]:
    return [-100] * prompt + ids[prompt:]


def tokens_of(model: WorldVLAForCausalLM) -> WorldVLATokens:
    return WorldVLATokens.from_vocabulary(model.config.vocabulary_map)
