"""From episodes to training samples: which frames and actions of an episode make one sequence.

A sample is the arguments of one processor call, and `source`, its name for messages. The rules are the authors'
(`action_model_conv_generation.py`, `world_model_conv_generation.py`). Sample i of epoch e is a pure function of (seed,
e, i): no worker, order or earlier call changes it. Nothing here builds a sequence or knows a token's meaning.
"""

from abc import ABC, abstractmethod
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


class EpochDataset(Dataset, ABC):
    """A dataset whose samples may differ from epoch to epoch: `dataset[i]` is `sample(i, epoch)`.

    The epoch lies in shared memory, so that workers which outlive an epoch (`persistent_workers`) see the new one.
    accelerate's data loaders call `set_epoch`, except in the epoch that a run resumes in; `epochs.EpochCallback` makes
    transformers' Trainer call it always.
    """

    def __init__(self) -> None:
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Number of the pass over the data, from 0."""
        self._epoch.fill_(epoch)

    @abstractmethod
    def sample(self, item: int, epoch: int) -> dict[str, Any]:
        """Arguments of the processor for one sample (absent ones are None), and `source`, the name of the sample."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples of an epoch."""

    def __getitem__(self, item: int) -> dict[str, Any]:
        return self.sample(item, self.epoch)


class EpisodeSamples(EpochDataset):
    """Every sample of some episodes, one episode after the other, in it one kind after the other.

    Of an episode of T steps, with step j in 0..T - 1:

        action  text, frames max(0, j - M + 1)..j            -> actions j..j + K - 1; T - K + 1 samples
        world   (frame, action) max(0, j - N + 1)..j         -> frame j + 1; T - 1 samples, none when T <= N
        video   text, frames max(0, j - M + 1)..j            -> frame j + 1; T - 1 samples

    No frame is repeated to fill a history: at an episode's start it is shorter.

    Args:
        episodes: the episodes, as the subclass wants them.
        kinds: of `action`, `world`, `video`; a kind that is named twice is there twice.
        num_actions: K.
        history: time steps shown before an action or a video answer (M).
        world_history: (frame, action) pairs shown to the world model (N).
        history_dropout: share of action samples that are shown the newest time step only, as a policy is whose
            previous frame was not seen. Drawn anew every epoch.
        seed: of everything random, >= 0.
    """

    picture_names: tuple[str, str]  # the processor's names for pictures in the prompt and in the answer

    def __init__(
        self,
        episodes: Sequence[Any],
        kinds: Sequence[str] = ("action", "world"),
        num_actions: int = 5,
        history: int = 2,
        world_history: int = 1,
        history_dropout: float = 0.0,
        seed: int = 0,
    ):
        super().__init__()
        if unknown := sorted(set(kinds) - set(KINDS)):
            raise ValueError(f"sample kinds are {', '.join(KINDS)}, not {', '.join(unknown)}")
        counts = {"num_actions": num_actions, "history": history, "world_history": world_history}
        if wrong := [name for name, value in counts.items() if value < 1]:
            raise ValueError(f"{wrong[0]} is a number >= 1, not {counts[wrong[0]]}")
        self.episodes = episodes
        self.kinds = tuple(kinds)
        self.num_actions, self.history, self.world_history = num_actions, history, world_history
        self.history_dropout, self.seed = history_dropout, seed
        lengths = np.array([len(episode) for episode in episodes], dtype=np.int64)
        per_kind = {
            "action": lengths - num_actions + 1,
            "world": np.where(lengths > world_history, lengths - 1, 0),
            "video": lengths - 1,
        }
        # samples of each (episode, kind), and the number of the first of each
        self._counts = np.array([per_kind[kind] for kind in kinds], dtype=np.int64).T.clip(min=0).ravel()
        self._starts = np.cumsum([0, *self._counts])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def locate(self, item: int) -> tuple[int, str, int]:
        """Position of the episode, kind and step of a sample."""
        if not 0 <= item < len(self):
            raise IndexError(f"sample {item} of {len(self)}")
        segment = int(np.searchsorted(self._starts, item, side="right")) - 1
        episode, kind = divmod(segment, len(self.kinds))
        return episode, self.kinds[kind], int(item - self._starts[segment])

    def items_of(self, kind: str) -> np.ndarray:
        """Numbers of all samples of a kind, ascending."""
        segments = [s for s in range(len(self._counts)) if self.kinds[s % len(self.kinds)] == kind]
        ranges = [np.arange(self._starts[s], self._starts[s + 1]) for s in segments]
        return np.concatenate(ranges) if ranges else np.zeros(0, dtype=np.int64)

    def sample(self, item: int, epoch: int) -> dict[str, Any]:
        number, kind, step = self.locate(item)
        episode, rng = self.episodes[number], np.random.default_rng((self.seed, epoch, item))
        length = self.world_history if kind == "world" else self.history
        if rng.random() < self.history_dropout and kind == "action":
            length = 1
        first = max(0, step + 1 - length)
        frames = self._frames(episode, first, step + (1 if kind == "action" else 2), rng)
        shown = step + 1 - first
        prompt_name, answer_name = self.picture_names
        return {
            "source": f"episode {episode.index}, step {step}, {kind}",
            "instruction": None if kind == "world" else episode.instruction,
            prompt_name: [picture for frame in frames[:shown] for picture in frame],
            "actions": self._actions(number)[first : step + 1] if kind == "world" else None,
            "target_actions": self._actions(number)[step : step + self.num_actions] if kind == "action" else None,
            answer_name: None if kind == "action" else [picture for frame in frames[shown:] for picture in frame],
            "embodiment": self._embodiment(episode),
        }

    @abstractmethod
    def _frames(self, episode: Any, start: int, stop: int, rng: np.random.Generator) -> Sequence[Sequence[Any]]:
        """The C pictures of each time step from `start` to before `stop`."""

    @abstractmethod
    def _actions(self, number: int) -> np.ndarray:
        """(T, D), the actions of the episode at a position."""

    @abstractmethod
    def _embodiment(self, episode: Any) -> str | None:
        """Whose actions they are; None for the processor's default."""


class SampleDataset(EpisodeSamples):
    """The samples of tokenized episodes; arguments and rules as `EpisodeSamples`."""

    picture_names = ("image_tokens", "target_image_tokens")

    def _frames(
        self, episode: TokenizedEpisode, start: int, stop: int, rng: np.random.Generator
    ) -> list[list[np.ndarray]]:
        return [list(frame) for frame in episode.frames[start:stop]]

    def _actions(self, number: int) -> np.ndarray:
        actions: np.ndarray = self.episodes[number].actions
        return actions

    def _embodiment(self, episode: TokenizedEpisode) -> str | None:
        return episode.embodiment
