"""What a robot sends: pictures under the names of cameras, an instruction, and optionally the number of the step.

Keys are resolved and checked here, before any weight is loaded where they are known then and in one line that names the
nearest key. Pictures are already in the model's orientation; nothing is rotated, cropped or tokenized here.
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

PROMPT_KEYS = ("prompt", "instruction", "task")
STEP_KEY = "step"
MAX_SIDE = 4096  # pixels
MAX_STEPS = 16  # time steps in one observation
MAX_PROMPT = 2000  # characters


@dataclass(frozen=True)
class Observation:
    """M time steps of C pictures each, oldest first, the last one now; `step` counts control steps from any origin."""

    steps: tuple[tuple[Image.Image, ...], ...]
    prompt: str | None
    step: int | None


class ObservationReader:
    """Reads observations for the cameras of one embodiment.

    Args:
        cameras: names of the C pictures of a time step, in the order of the sequence.
        camera_map: key in the observations -> camera, for clients with other names
            (`{"observation/image": "image"}`).

    Raises ValueError for a map to a camera that does not exist, or of two keys to one.
    """

    def __init__(self, cameras: Iterable[str], camera_map: Mapping[str, str] | None = None):
        self.cameras = tuple(cameras)
        self._key_of = {camera: camera for camera in self.cameras}
        for key, camera in (camera_map or {}).items():
            if camera not in self._key_of:
                raise ValueError(
                    f"camera_map sends {key!r} to {camera!r}, which is no camera of this checkpoint; "
                    f"its cameras are {_listed(self.cameras)}{_nearest(camera, self.cameras)}"
                )
            if self._key_of[camera] != camera:
                raise ValueError(f"camera_map sends both {self._key_of[camera]!r} and {key!r} to {camera!r}: name one")
            self._key_of[camera] = key

    @property
    def keys(self) -> list[str]:
        """The picture keys that an observation must hold, in the order of the cameras."""
        return [self._key_of[camera] for camera in self.cameras]

    def check_keys(self, found: Iterable[Any]) -> None:
        """Raise ValueError, one line with the nearest name, when a picture key is not among those found."""
        names = [str(name) for name in found]
        for camera, key in self._key_of.items():
            if key in names:
                continue
            others = [name for name in names if name not in (*PROMPT_KEYS, STEP_KEY, *self.keys)]
            near = difflib.get_close_matches(key, others, n=1, cutoff=0.4)
            near = near or [name for name in others if camera in name or name in camera][:1]
            hint = f'; is it {near[0]!r}? then use camera_map={{"{near[0]}": "{camera}"}}' if near else ""
            raise ValueError(f"the observation has no picture {key!r}, only the keys {_listed(names)}{hint}")

    def read(self, observation: Any) -> Observation:
        """Check an observation. Raises ValueError that says what is wrong with which key."""
        if not isinstance(observation, Mapping):
            raise ValueError(f"an observation is a map of pictures and a prompt, not {type(observation).__name__}")
        self.check_keys(observation)
        columns = [_pictures(key, observation[key]) for key in self.keys]  # C columns of M pictures
        if len({len(column) for column in columns}) > 1:
            counts = ", ".join(f"{key} {len(column)}" for key, column in zip(self.keys, columns, strict=True))
            raise ValueError(f"the cameras of an observation have the same number of time steps, not {counts}")
        return Observation(tuple(zip(*columns, strict=True)), _prompt(observation), _step(observation))


def _prompt(observation: Mapping[Any, Any]) -> str | None:
    found = {name: observation[name] for name in PROMPT_KEYS if observation.get(name) is not None}
    if not found:
        return None
    name, value = next(iter(found.items()))
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.item()
    if isinstance(value, list | tuple) and len(value) == 1:  # a batch of one, as LeRobot keeps tasks
        value = value[0]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} is a sentence that says what to do, not {str(value)[:40]!r}")
    if len(value) > MAX_PROMPT:
        raise ValueError(f"{name} has {len(value)} characters, more than {MAX_PROMPT}")
    return str(value)


def _step(observation: Mapping[Any, Any]) -> int | None:
    value = observation.get(STEP_KEY)
    if value is None:
        return None
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ValueError(f"{STEP_KEY} is the whole number of the control step, not {str(value)[:40]!r}")
    return int(value)


def _pictures(key: str, value: Any) -> list[Image.Image]:
    """One picture, or (M, H, W, 3) of them, as PIL images."""
    from ..image_processing_worldvla import to_pil

    if hasattr(value, "detach"):  # a torch tensor
        value = value.detach().cpu().numpy()
    if isinstance(value, list | tuple) and all(isinstance(entry, Image.Image | np.ndarray) for entry in value):
        pictures = list(value)
    elif isinstance(value, np.ndarray) and value.ndim == 4:
        pictures = list(value)
    elif isinstance(value, Image.Image) or (isinstance(value, np.ndarray) and value.ndim == 3):
        pictures = [value]
    else:
        found = f"shape {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
        raise ValueError(f"{key!r} is a picture (H, W, 3) uint8, or (M, H, W, 3), oldest first, not {found}")
    if not 1 <= len(pictures) <= MAX_STEPS:
        raise ValueError(f"{key!r} holds 1 to {MAX_STEPS} time steps, not {len(pictures)}")
    for picture in pictures:
        size = picture.size if isinstance(picture, Image.Image) else picture.shape
        if max(size, default=0) > MAX_SIDE:
            raise ValueError(f"{key!r} is larger than {MAX_SIDE} pixels on a side: {tuple(size)}")
    try:
        return [to_pil(picture) for picture in pictures]
    except ValueError as error:
        raise ValueError(f"{key!r}: {error}") from None


def _listed(names: Iterable[str]) -> str:
    shown = [repr(name[:60]) for name in names]
    return ", ".join(shown[:20]) + (f" and {len(shown) - 20} more" if len(shown) > 20 else "") if shown else "(none)"


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    return f"; did you mean {near[0]!r}?" if near else ""
