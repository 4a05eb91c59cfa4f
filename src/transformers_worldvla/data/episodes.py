"""What an episode is: pictures by camera, actions, state and an instruction, whatever files they come from.

Readers (`lerobot.py`, `libero_hdf5.py`, `folder.py`) subclass `Episode` and `EpisodeDataset`; everything after them,
from the frame-token cache to the trainer, sees only this interface. Nothing here knows a file format, a token or a
model, and nothing here changes data: no filtering, no resizing, no normalisation.
"""

import difflib
import hashlib
import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import overload

import numpy as np


class EpisodeError(ValueError):
    """A recording that cannot be trusted: corrupt, truncated, mismatched or missing.

    `file` and `episode` say where (either may be None), `reason` what; the message is all three on one line.
    """

    def __init__(self, reason: str, file: str | Path | None = None, episode: int | None = None):
        self.reason = " ".join(reason.split())
        self.file = None if file is None else " ".join(str(file).splitlines())
        self.episode = episode
        places = [self.file, None if episode is None else f"episode {episode}", self.reason]
        super().__init__(": ".join(place for place in places if place is not None))


def import_extra(module: str) -> ModuleType:
    """Import an optional package, or say in one line which extra brings it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise ImportError(
            f'reading this dataset needs {error.name}: pip install "transformers_worldvla[train]"'
        ) from None


def short_camera_names(keys: Sequence[str]) -> dict[str, str]:
    """Camera name -> key in the files: `observation.images.wrist` is `wrist`, unless two keys would share a name."""
    shorts = [key.removeprefix("observation.").removeprefix("images.") for key in keys]
    return {short if shorts.count(short) == 1 else key: key for short, key in zip(shorts, keys, strict=True)}


def resolve_camera(name: str, cameras: Mapping[str, str]) -> str:
    """The camera with that name or full key among `cameras` (name -> key). ValueError that suggests the nearest."""
    for camera, key in cameras.items():
        if name in (camera, key):
            return camera
    known = ", ".join(cameras) or "none"
    nearest = difflib.get_close_matches(name, [*cameras, *cameras.values()], n=1, cutoff=0.4)
    hint = f', did you mean "{nearest[0]}"?' if nearest else ""
    raise ValueError(f'no camera "{name}" here; the cameras are: {known}{hint}')


def select_cameras(wanted: str | Sequence[str] | None, keys: Sequence[str]) -> dict[str, str]:
    """Camera name -> key for the wanted cameras in the wanted order; all of them for None.

    `image=agentview_rgb` is the camera `agentview_rgb` under the name `image`, as a checkpoint may call it. ValueError
    when two would share a name.
    """
    known = short_camera_names(keys)
    if wanted is None:
        return known
    chosen: dict[str, str] = {}
    for text in [wanted] if isinstance(wanted, str) else wanted:
        name, _, original = text.rpartition("=")
        found = resolve_camera(original, known)
        if (name or found) in chosen:
            raise ValueError(f'two cameras would be called "{name or found}"')
        chosen[name or found] = known[found]
    return chosen


class Episode(ABC):
    """One recording of T steps. Row t of pictures and state is what was seen when action t was chosen.

    Lazy: nothing is read before it is asked for, and pictures are never kept. Readers raise `EpisodeError` for damage.
    """

    index: int  # number of the episode in its dataset
    instruction: str
    fps: float | None  # as the dataset declares it; a control rate it is not. None when unknown

    def __init__(self, index: int, length: int, instruction: str, fps: float | None, cameras: Mapping[str, str]):
        self.index = index
        self.instruction = instruction
        self.fps = fps
        self._length = length
        self._camera_keys = dict(cameras)

    def __len__(self) -> int:
        """T, the number of steps."""
        return self._length

    @property
    def cameras(self) -> tuple[str, ...]:
        """Names of the cameras, in the order asked for, else in the order of the files."""
        return tuple(self._camera_keys)

    @property
    @abstractmethod
    def actions(self) -> np.ndarray:
        """(T, D) float32, in the units of the dataset, all finite."""

    @property
    @abstractmethod
    def state(self) -> np.ndarray | None:
        """(T, S) float32, all finite, or None when the dataset has no state."""

    @property
    @abstractmethod
    def success(self) -> bool | None:
        """Whether the task was done; None when the dataset does not say."""

    def problems(self) -> list[EpisodeError]:
        """Mismatches that reading would not meet, for `scan_episodes`. Raises EpisodeError for what it cannot read."""
        return []

    @abstractmethod
    def _read_frames(self, key: str, start: int, stop: int) -> np.ndarray:
        """Frames [start, stop) of the camera stored under `key`: (stop - start, H, W, 3) uint8."""

    def frames(self, camera: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Pictures of a camera: (T, H, W, 3) uint8 RGB, or only steps `start` to `stop` (both within 0..T)."""
        key = self._camera_keys[resolve_camera(camera, self._camera_keys)]
        stop = len(self) if stop is None else stop
        if not 0 <= start < stop <= len(self):
            raise IndexError(f"episode {self.index} has steps 0 to {len(self) - 1}, not {start} to {stop - 1}")
        return self._read_frames(key, start, stop)

    def frame(self, camera: str, t: int) -> np.ndarray:
        """The picture of step t: (H, W, 3) uint8 RGB. A negative t counts from the end."""
        start = t + len(self) if t < 0 else t
        return self.frames(camera, start, start + 1)[0]

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.index}: {len(self)} steps, {', '.join(self.cameras)}, {self.instruction!r})"
        )


class EpisodeDataset(Sequence[Episode]):
    """The episodes of one dataset, made on access. Plain data inside, so it may travel to worker processes.

    `source` is the folder, file or repository; `revision` the commit on the Hub, None for local data; `action_names`
    and `state_names` name the dimensions where the dataset does.
    """

    source: str
    revision: str | None = None
    format: str  # such as "LeRobot v3.0"
    fps: float | None = None
    action_names: tuple[str, ...] | None = None
    state_names: tuple[str, ...] | None = None
    cameras: tuple[str, ...]

    @abstractmethod
    def _episode(self, position: int) -> Episode:
        """The episode at a position in 0..len - 1."""

    @property
    @abstractmethod
    def lengths(self) -> list[int]:
        """Number of steps of every episode, without reading pictures."""

    @abstractmethod
    def problems(self) -> list[EpisodeError]:
        """What is wrong with the dataset as a whole, such as counts that disagree; found without reading episodes."""

    @abstractmethod
    def _local_files(self) -> list[Path]:
        """The files of the dataset on this machine."""

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, position: int) -> Episode: ...
    @overload
    def __getitem__(self, position: slice) -> list[Episode]: ...
    def __getitem__(self, position: int | slice) -> Episode | list[Episode]:
        if isinstance(position, slice):
            return [self._episode(each) for each in range(*position.indices(len(self)))]
        if not -len(self) <= position < len(self):
            raise IndexError(f"{self.source} has episodes 0 to {len(self) - 1}, not {position}")
        return self._episode(position % len(self))

    def __iter__(self) -> Iterator[Episode]:
        return (self._episode(position) for position in range(len(self)))

    @property
    def fingerprint(self) -> str:
        """Identity of the data for caches: the commit on the Hub, else a hash of file names, sizes, heads and tails."""
        if self.revision is not None:
            return self.revision
        digest = hashlib.sha256()
        for path in sorted(self._local_files()):
            size, edge = path.stat().st_size, 4096
            with path.open("rb") as file:
                head = file.read(edge)
                file.seek(max(size - edge, 0))
                digest.update(f"{path.name}\0{size}\0".encode() + head + file.read(edge))
        return digest.hexdigest()

    def __repr__(self) -> str:
        rate = "fps unknown" if self.fps is None else f"{self.fps:g} fps"
        return (
            f"{self.source} ({self.format}): {len(self)} episodes, {sum(self.lengths)} frames, "
            f"cameras {', '.join(self.cameras) or 'none'}, {rate}"
        )


def finite_rows(values: np.ndarray, what: str, file: str, episode: int) -> np.ndarray:
    """`values` as (T, D) float32. EpisodeError for what holds no numbers, and for the first row that is not finite."""
    try:
        with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and said below
            rows = np.asarray(values, dtype=np.float32)
        is_numeric = np.asarray(values).dtype.kind in "biufO"
    except (TypeError, ValueError, OverflowError):
        is_numeric = False
    if not is_numeric or rows.ndim == 0 or 0 in rows.shape[1:]:
        raise EpisodeError(f"{what} holds no rows of numbers", file, episode)
    rows = rows.reshape(len(rows), -1) if len(rows) else rows.reshape(0, max(1, math.prod(rows.shape[1:])))
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if len(bad):
        raise EpisodeError(f"{what} of step {bad[0]} is not finite ({len(bad)} such steps)", file, episode)
    return rows
