"""From tokenized episodes to training samples: which frames and actions of an episode make one sequence.

A sample is the arguments of one processor call, with frames as token ids, so that a frame is tokenized once in its
life. The rules are the authors' (`action_model_conv_generation.py`, `world_model_conv_generation.py`). Nothing here
builds a sequence or knows a token's meaning.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from .episodes import Episode

KINDS = ("action", "world", "video")


@dataclass
class TokenizedEpisode:
    """One episode with its frames as token ids."""

    index: int
    instruction: str
    frames: np.ndarray  # (T, C, h, w) token ids of codes
    actions: np.ndarray  # (T, D) float32, robot units
    embodiment: str | None = None

    def __len__(self) -> int:
        return len(self.actions)


def tokenize_episode(
    episode: Episode,
    model: Any,
    processor: Any,
    cameras: Sequence[str],
    batch_size: int = 32,
    embodiment: str | None = None,
) -> TokenizedEpisode:
    """Encode every frame of the named cameras with the model's image tokenizer, in camera order."""
    views = []
    for camera in cameras:
        codes = []
        for start in range(0, len(episode), batch_size):
            pictures = list(episode.frames(camera, start, min(start + batch_size, len(episode))))
            pixels = processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
            codes.append(model.tokenize_images(pixels).cpu().numpy())
        views.append(np.concatenate(codes))
    frames = np.stack(views, axis=1).astype(np.int32)
    return TokenizedEpisode(episode.index, episode.instruction, frames, episode.actions, embodiment)


class SampleDataset(Dataset):
    """Every sample of some episodes, one after the other.

    Args:
        episodes: tokenized episodes.
        kinds: of `action` (frames and text -> the next K actions), `world` (frame, action pairs -> the next frame),
            `video` (frames and text -> the next frame).
        num_actions: K. An episode of T steps has T - K + 1 action samples, and T - 1 of the others.
        history: time steps shown before an action or a video answer (M); fewer at an episode's start.
        world_history: (frame, action) pairs shown to the world model (N); fewer at an episode's start.
        history_dropout: share of action samples that are shown the newest time step only, as a policy is whose
            previous frame was not seen. Chosen by `seed` and the sample's number.
    """

    def __init__(
        self,
        episodes: Sequence[TokenizedEpisode],
        kinds: Sequence[str] = ("action", "world"),
        num_actions: int = 5,
        history: int = 2,
        world_history: int = 1,
        history_dropout: float = 0.0,
        seed: int = 0,
    ):
        if unknown := sorted(set(kinds) - set(KINDS)):
            raise ValueError(f"sample kinds are {', '.join(KINDS)}, not {', '.join(unknown)}")
        self.episodes = list(episodes)
        self.num_actions, self.history, self.world_history = num_actions, history, world_history
        self.history_dropout, self.seed = history_dropout, seed
        self.index = [
            (number, kind, step)
            for number, episode in enumerate(self.episodes)
            for kind in kinds
            for step in range(len(episode) - (num_actions - 1 if kind == "action" else 1))
        ]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, item: int) -> dict[str, Any]:
        """Arguments of the processor for one sample; absent ones are None."""
        number, kind, step = self.index[item]
        episode = self.episodes[number]
        sample: dict[str, Any] = dict.fromkeys(
            ("instruction", "image_tokens", "actions", "target_actions", "target_image_tokens")
        )
        sample["embodiment"] = episode.embodiment
        length = self.world_history if kind == "world" else self.history
        if kind == "action" and np.random.default_rng((self.seed, item)).random() < self.history_dropout:
            length = 1
        first = max(0, step + 1 - length)
        sample["image_tokens"] = list(episode.frames[first : step + 1].reshape(-1, *episode.frames.shape[2:]))
        if kind == "world":
            sample["actions"] = episode.actions[first : step + 1]
        else:
            sample["instruction"] = episode.instruction
        if kind == "action":
            sample["target_actions"] = episode.actions[step : step + self.num_actions]
        else:
            sample["target_image_tokens"] = list(episode.frames[step + 1])
        return sample


class WorldVLADataCollator:
    """Samples in, one padded batch of model inputs with labels and loss weights out."""

    def __init__(self, processor: Any):
        self.processor = processor

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        columns = {key: [sample.get(key) for sample in samples] for key in samples[0]}
        return dict(
            self.processor(**{key: column for key, column in columns.items() if any(v is not None for v in column)})
        )
