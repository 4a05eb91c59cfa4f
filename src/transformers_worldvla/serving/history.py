"""Which frames a prompt shows: those of successive control steps, the last one now.

A model trained on frames one control step apart must never be shown frames K steps apart as if they were. So frames are
kept only as long as each is known to be one step after the one before it; the first frame of unknown distance begins
the history anew. A frame is tokenized once in its life: its codes stay with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image


@dataclass
class Frame:
    """The C pictures of one control step, and once they are tokenized their code ids, (h, w) each."""

    pictures: tuple[Image.Image, ...]
    codes: list[np.ndarray] | None = field(default=None, repr=False)

    def shows_the_same(self, pictures: Sequence[Image.Image]) -> bool:
        """Are these the same pictures, pixel by pixel?"""
        return len(pictures) == len(self.pictures) and all(
            own is other
            or (
                own.mode == other.mode and own.size == other.size and np.array_equal(np.asarray(own), np.asarray(other))
            )
            for own, other in zip(self.pictures, pictures, strict=True)
        )


class FrameHistory:
    """Up to `length` frames of successive control steps, oldest first."""

    def __init__(self, length: int):
        self.length = length
        self._frames: list[Frame] = []
        self._step: int | None = None

    def __len__(self) -> int:
        return len(self._frames)

    @property
    def frames(self) -> list[Frame]:
        """The frames that a prompt may show now."""
        return list(self._frames)

    def clear(self) -> None:
        self._frames, self._step = [], None

    def add(self, steps: Sequence[Sequence[Image.Image]], step: int | None, follows: bool) -> None:
        """Take in M successive control steps, the last one being now.

        Args:
            steps: M tuples of C pictures, oldest first. More than one say themselves what came before: earlier frames
                go.
            step: number of the control step of the last one, where the client counts them.
            follows: whether a single frame without a number is one control step after the last one.
        """
        if step is not None and self._step is not None:
            distance: int | None = step - self._step
        else:
            distance = 1 if follows else None
        known = self._frames
        kept = known if len(steps) == 1 and distance == 1 else []
        if len(steps) == 1 and distance == 0:  # the same control step, sent again
            kept = known[:-1]
        fresh = [self._known(pictures, known) for pictures in steps]
        self._frames = [*kept, *fresh][-self.length :]
        if step is None and distance is not None and self._step is not None:
            step = self._step + distance
        self._step = step

    @staticmethod
    def _known(pictures: Sequence[Image.Image], known: Sequence[Frame]) -> Frame:
        """A frame of these pictures, with the codes of an equal one that is there already."""
        same = next((frame for frame in known if frame.codes is not None and frame.shows_the_same(pictures)), None)
        return Frame(tuple(pictures), None if same is None else same.codes)
