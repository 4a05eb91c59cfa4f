"""What is decoded: model shapes with random weights, and prompts with random pictures.

Random weights never emit the format of an answer, so every arm is forced to it: it chooses among the ids that are legal
at a place. That fixes the number of tokens and makes the answers of all arms comparable.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from .. import WorldVLAConfig, WorldVLAForCausalLM

ACTION_DIM = 7
TEXT_TOKENS = 24
SHAPES: dict[str, dict[str, Any]] = {
    # about 100 M parameters; the image tokenizer takes no part unless it is asked for
    "small": {
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": 65536,
        "vq_config": {"base_channels": 32, "channel_multiplier": [1, 1, 1, 1, 1], "latent_channels": 16},
    },
    "7b": {},  # the defaults of the configuration are those of the published model
}


@dataclass(frozen=True)
class Case:
    """One combination that every arm decodes.

    `chunk`: `actions` actions from `frames` pictures. `frame`: the next picture from `frames` (picture, action) pairs
    (then `actions` is equal to `frames`). Pictures have `px` x `px` pixels.
    """

    what: str
    px: int
    frames: int
    actions: int
    batch: int

    @property
    def side(self) -> int:
        """Codes along a picture."""
        return self.px // 16

    def answer(self, tokens: Any) -> list[tuple[int, ...]]:
        """The legal ids at each place of the answer, its final separator included."""
        end = [(tokens.separator,)]
        if self.what == "chunk":
            block = [(tokens.action_start,), *[tokens.action_bins] * ACTION_DIM, (tokens.action_end,)]
            return block * self.actions + end
        layout = tokens.image_block_layout(self.side, self.side)
        return [tokens.image_codes if token < 0 else (token,) for token in layout] + end

    def prompts(self, tokens: Any, seed: int) -> torch.LongTensor:
        """Random prompts (batch, length) of one length; rows of a world-model batch share their picture and text."""
        generator = torch.Generator().manual_seed(seed)

        def draw(table: tuple[int, ...], *shape: int) -> torch.Tensor:
            return torch.tensor(table)[torch.randint(len(table), shape, generator=generator)]

        structural = tokens.structural_ids
        words = [token for token in range(max(structural)) if token not in structural][-TEXT_TOKENS:]
        pictures = [draw(tokens.image_codes, self.side, self.side).numpy() for _ in range(self.frames)]
        rows = []
        for _ in range(self.batch):
            if self.what == "chunk":
                pictures = [draw(tokens.image_codes, self.side, self.side).numpy() for _ in range(self.frames)]
                blocks = [tokens.image_block(picture) for picture in pictures]
            else:
                blocks = []
                for picture in pictures:
                    action = draw(tokens.action_bins, ACTION_DIM).tolist()
                    blocks += [tokens.image_block(picture), tokens.action_block(action)]
            rows.append(tokens.sequence(words, blocks).ids)
        return torch.tensor(rows)


def build_model(shape: str, device: torch.device, dtype: torch.dtype, seed: int = 0) -> WorldVLAForCausalLM:
    """A random model of one of `SHAPES`, made on the device; its image tokenizer stays float32."""
    with default_dtype(dtype), device:
        torch.manual_seed(seed)
        model = WorldVLAForCausalLM(WorldVLAConfig(action_dim=ACTION_DIM, initializer_range=0.02, **SHAPES[shape]))
    model.model.vqmodel.float()
    return model.eval()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
