"""Complete checkpoints of toy size: what the tests of commands and evaluation load.

A random model of `model_factory` with a tokenizer of bytes, pictures of 64 pixels (16 codes) and LIBERO's arm.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from model_factory import MAX_GRID, NUM_CODES, tiny_config
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from transformers_worldvla import WorldVLAForCausalLM, WorldVLAImageProcessor, WorldVLAProcessor
from transformers_worldvla.action_tokenization_worldvla import LIBERO, Embodiment
from transformers_worldvla.tokens_worldvla import special_token_names

TARGET_SIZE, NUM_ACTIONS = 64, 4
GANTRY = Embodiment("gantry", low=(-1.0,) * 3, high=(1.0,) * 3, action_names=("along", "across", "down"))


def small_tokenizer() -> PreTrainedTokenizerFast:
    """The names of the grammar and the 256 bytes."""
    names = special_token_names(NUM_CODES, MAX_GRID)
    pieces = [*names, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, [], unk_token="<unk>"))
    tokenizer.add_special_tokens(names)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def small_processor(*robots: Embodiment) -> WorldVLAProcessor:
    """A processor for some embodiments, LIBERO's arm by default; the first is the default of several."""
    robots = robots or (LIBERO,)
    return WorldVLAProcessor(
        WorldVLAImageProcessor(target_size=TARGET_SIZE),
        small_tokenizer(),
        embodiments={robot.name: robot for robot in robots},
        default_embodiment=robots[0].name if len(robots) > 1 else None,
        num_actions=NUM_ACTIONS,
        history=2,
    )


def small_model(processor: WorldVLAProcessor, seed: int = 0, **fields: Any) -> WorldVLAForCausalLM:
    """A random model over the processor's vocabulary, the same for the same seed."""
    torch.manual_seed(seed)
    vocabulary = processor.tokenizer.get_vocab()
    robot = processor.get_embodiment()
    sizes = {"action_dim": robot.action_dim, "num_cameras": robot.num_cameras, "max_position_embeddings": 2048}
    return WorldVLAForCausalLM(tiny_config(vocabulary_map=vocabulary, **sizes, **fields)).eval()


def write_checkpoint(folder: Path, *robots: Embodiment, **fields: Any) -> Path:
    """A folder with model and processor, as `save_pretrained` writes them; `fields` go to the model's config."""
    processor = small_processor(*robots)
    small_model(processor, **fields).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def with_cameras(*cameras: str) -> Embodiment:
    """LIBERO's arm seen by other cameras."""
    return replace(LIBERO, cameras=cameras, raw_cameras=())


def write_episode(folder: Path, steps: int = 14, cameras: tuple[str, ...] = ("image",), seed: int = 0) -> Path:
    """A folder of pictures and actions: a square that moves over a gradient, seen at another size by every camera."""
    rng = np.random.default_rng(seed)
    episode = folder / "episode_0"
    for number, camera in enumerate(cameras):
        (episode / camera).mkdir(parents=True)
        side = 96 + 32 * number
        base = np.broadcast_to(np.linspace(0, 200, side)[:, None, None], (side, side, 3)).astype(np.uint8)
        for step in range(steps):
            frame = base.copy()
            left = 4 * step + 8 * number
            frame[20:50, left : left + 30] = (250, 40, 10)
            Image.fromarray(frame).save(episode / camera / f"image_{step}.png")
    actions = rng.uniform(LIBERO.low, LIBERO.high, (steps, LIBERO.action_dim)) * 0.9
    actions[:, 5] = 0.0  # a dimension that never moves
    np.save(episode / "actions.npy", actions.astype(np.float32))
    (episode / "instruction.txt").write_text("push the square to the right\n")
    (episode / "episode.json").write_text('{"fps": 20}')
    return folder
