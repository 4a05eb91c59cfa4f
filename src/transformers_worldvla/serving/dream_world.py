"""The world model as a place to act in: frames and actions in, the next frames out, for several robots in one call.

A `Dream` is one robot's rollout and is never changed: `DreamWorld.step` returns the next ones. So nothing has to be
reset, and a dream may be continued twice. Rewards, episodes and gymnasium are the business of `dream`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..data.episodes import Episode
from ..evaluation.open_loop import crop_for_model
from .loading import choose_device, load_model, load_processor

FEEDBACKS = ("tokens", "pixels")


@dataclass(frozen=True)
class Dream:
    """Where a rollout has come to.

    Attributes:
        pictures: (C, H, W, 3) uint8, the newest frame of each camera: at the start the given ones as the model crops
            them, later imagined ones.
        frames: code ids of the last time steps, C arrays each, oldest first.
        actions: what was done between these frames, (D,) each.
        instruction: what is to be done, where the start says it. The world model does not read it.
        steps: actions taken since the start.
    """

    pictures: np.ndarray
    frames: tuple[list[Any], ...]
    actions: tuple[np.ndarray, ...] = ()
    instruction: str | None = None
    steps: int = 0


class DreamWorld:
    """A checkpoint that answers actions with frames.

    A dream equals `model.imagine` over the same actions, step by step.

    Args:
        model, processor: of one checkpoint; `from_pretrained` loads both.
        embodiment: whose actions; not needed where the checkpoint has one, or a default.
        num_history: (frame, action) pairs that a prompt holds at most.
        feedback: `tokens` feeds the generated ids back, `pixels` decodes and encodes each frame again.
        generate_kwargs: for `model.generate_frames` (`do_sample`, `temperature`, `top_k` ...).

    Raises ValueError for options that do not exist.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        embodiment: str | None = None,
        num_history: int = 1,
        feedback: str = "tokens",
        generate_kwargs: Mapping[str, Any] | None = None,
    ):
        if feedback not in FEEDBACKS:
            raise ValueError(f"feedback is one of {', '.join(FEEDBACKS)}, not {feedback!r}")
        if num_history < 1:
            raise ValueError(f"num_history is at least 1, not {num_history}")
        self.model, self.processor = model, processor
        self.robot = processor.get_embodiment(embodiment)
        self.num_history = num_history
        self.feedback = feedback
        self.generate_kwargs = {"draft": "previous", **(generate_kwargs or {})}

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | None = None,
        *,
        revision: str | None = None,
        device: str = "auto",
        dtype: Any = "auto",
        **options: Any,
    ) -> "DreamWorld":
        """Load a checkpoint, a folder or a Hub id; the bundled small one by default. `options` are those of the class.

        Raises ValueError, OSError or ImportError, one line each; options are checked before weights are read.
        """
        from ..assets import DEFAULT_CHECKPOINT, bundled_folder

        source = bundled_folder(DEFAULT_CHECKPOINT) if source is None else source
        target = choose_device(device)
        world = cls(None, load_processor(source, revision), **options)
        world.model = load_model(source, revision, target, dtype)
        return world

    def __deepcopy__(self, memo: Any) -> "DreamWorld":
        """Itself: gymnasium copies an environment's arguments, and weights are there once."""
        return self

    @property
    def samples(self) -> bool:
        """Whether frames are drawn at random, so that `step` needs a generator to be repeatable."""
        return bool(self.generate_kwargs.get("do_sample"))

    def crop(self, pictures: Any) -> np.ndarray:
        """One picture, or C pictures by camera name, as the model sees them: (C, H, W, 3) uint8.

        Raises ValueError when a camera is missing or when the pictures of a time step differ in size.
        """
        cameras = self.robot.cameras
        if isinstance(pictures, Mapping):
            if missing := [name for name in cameras if name not in pictures]:
                raise ValueError(f"there is no picture of the camera {missing[0]!r}: pass {', '.join(cameras)} by name")
            given = [pictures[name] for name in cameras]
        elif len(cameras) == 1:
            given = [pictures]
        else:
            raise ValueError(f"{self.robot.name} has several cameras: pass a map of {', '.join(cameras)} to pictures")
        cropped = [crop_for_model(self.processor, picture) for picture in given]
        if len({picture.shape for picture in cropped}) > 1:
            sizes = ", ".join(
                f"{name} {picture.shape[1]}x{picture.shape[0]}" for name, picture in zip(cameras, cropped, strict=True)
            )
            raise ValueError(f"the cameras of a time step have one size once they are cropped, not {sizes}")
        return np.stack(cropped)

    def begin(self, start: Any) -> Dream:
        """A dream that has not moved yet.

        Args:
            start: a picture (PIL or array), pictures by camera name, or an `Episode`, which starts at its first frame
                and brings its instruction.
        """
        instruction = None
        if isinstance(start, Episode):
            instruction = start.instruction
            start = {name: start.frame(name, 0) for name in self.robot.cameras}
        pictures = self.crop(start)
        return Dream(pictures, (self._tokenize(pictures),), instruction=instruction)

    def step(self, dreams: Sequence[Dream], actions: Any, generator: torch.Generator | None = None) -> list[Dream]:
        """What follows each of B dreams under actions (B, D) in robot units, all in one call of the model.

        Raises ValueError for another shape, NaN and infinity; actions outside the range are clipped with a warning.
        """
        moves = np.asarray(actions, np.float64)
        if moves.shape != (len(dreams), self.robot.action_dim):
            raise ValueError(f"actions have shape ({len(dreams)}, {self.robot.action_dim}), not {moves.shape}")
        taken = [(*dream.actions, move) for dream, move in zip(dreams, moves, strict=True)]
        inputs = self.processor(
            image_tokens=[[codes for frame in dream.frames for codes in frame] for dream in dreams],
            actions=[np.stack(row) for row in taken],
            embodiment=[self.robot.name] * len(dreams),
        ).to(self.model.device)
        options = self.generate_kwargs if generator is None else {**self.generate_kwargs, "generator": generator}
        ids = self.model.generate_frames(**inputs, **options)  # (B, C, block)
        pictures = [np.stack([np.asarray(one) for one in row]) for row in self.processor.decode_frames(ids, self.model)]
        following = []
        for dream, row, seen, blocks in zip(dreams, taken, pictures, ids, strict=True):
            newest = list(blocks) if self.feedback == "tokens" else self._tokenize(seen)
            frames = (*dream.frames, newest)[-self.num_history :]
            kept = row[len(row) + 1 - len(frames) :]  # one fewer than frames
            following.append(replace(dream, pictures=seen, frames=frames, actions=kept, steps=dream.steps + 1))
        return following

    def _tokenize(self, pictures: np.ndarray) -> list[torch.Tensor]:
        """Code ids (h, w) of cropped pictures (C, H, W, 3)."""
        pixels = np.stack([self.processor.image_processor.pixels(Image.fromarray(picture)) for picture in pictures])
        return list(self.model.tokenize_images(torch.from_numpy(pixels)))
