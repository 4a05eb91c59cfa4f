"""Reads LeRobot datasets v2.0, v2.1 and v3.0, cameras as mp4 or as pictures in parquet, without the lerobot package.

An episode is rows of a parquet file and, per camera, a span of an mp4. Every camera has its own file index and its own
`from_timestamp`: two cameras may split their files at different episodes. The row's `timestamp` plus the span's start
is the time of the frame, as in LeRobot's reader; its float error (10.899999) is far below half a frame.
"""

import warnings
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from . import lerobot_meta as meta
from .episodes import Episode, EpisodeDataset, EpisodeError, finite_rows, import_extra, select_cameras
from .pictures import PictureError, decode_picture
from .storage import Files, HubFiles
from .video import VideoError, count_frames, decode_frames

SUCCESS_KEY = "next.success"
FRAME_TOLERANCE = 0.25  # of a frame; more than that and a video does not fit its rows


class LeRobotEpisodes(EpisodeDataset):
    """A LeRobot dataset. `files` is a folder, or a Hub repository to fetch from episode by episode."""

    def __init__(self, files: Files, cameras: str | Sequence[str] | None = None, source: str | None = None):
        self.files = files
        self.info = meta.read_info(files)
        self.source = source or str(files.root)
        self.revision = files.commit if isinstance(files, HubFiles) else None
        self.format = f"LeRobot v{self.info.version[0]}.{self.info.version[1]}"
        self.fps = self.info.fps
        self.camera_keys = select_cameras(cameras, self.info.camera_keys)
        self.cameras = tuple(self.camera_keys)
        action_key = self.info.first_of(meta.ACTION_KEYS)
        if action_key is None:
            numeric = [key for key in self.info.features if key not in self.info.camera_keys]
            raise EpisodeError(
                f'has no feature "action" or "actions", only {", ".join(numeric)}', files.name(meta.INFO)
            )
        self.action_key = action_key
        self.state_key = self.info.first_of(meta.STATE_KEYS)
        self.action_names = self.info.names(self.action_key)
        self.state_names = self.info.names(self.state_key)
        self.tasks = meta.read_tasks(files, self.info)
        self.entries = meta.read_entries(files, self.info)

    @property
    def lengths(self) -> list[int]:
        return [entry.length for entry in self.entries]

    def _episode(self, position: int) -> Episode:
        return LeRobotEpisode(self, self.entries[position])

    def problems(self) -> list[EpisodeError]:
        where, found = self.files.name(meta.INFO), []
        if self.info.total_episodes != len(self.entries):
            found.append(
                EpisodeError(f"says {self.info.total_episodes} episodes, {len(self.entries)} are listed", where)
            )
        if self.info.total_frames != sum(self.lengths):
            found.append(
                EpisodeError(f"says {self.info.total_frames} frames, the episodes have {sum(self.lengths)}", where)
            )
        for position, entry in enumerate(self.entries):
            if entry.index != position:
                found.append(
                    EpisodeError(f"episode {position} is not listed, {entry.index} stands in its place", where)
                )
                break
        for entry in self.entries:
            unknown = [task for task in entry.tasks if task not in self.tasks.values()]
            if not entry.tasks or unknown or entry.length < 1:
                reason = f"tasks {list(entry.tasks)}, length {entry.length}: not a known task or no step"
                found.append(EpisodeError(reason, self.files.name("meta"), entry.index))
        return found

    def _local_files(self) -> list[Path]:
        return [self.files.root / name for folder in ("meta", "data", "videos") for name in self.files.list(folder)]


class LeRobotEpisode(Episode):
    """An episode of a LeRobot dataset."""

    def __init__(self, dataset: LeRobotEpisodes, entry: meta.EpisodeEntry):
        super().__init__(
            entry.index, max(entry.length, 0), next(iter(entry.tasks), ""), dataset.fps, dataset.camera_keys
        )
        self._dataset, self._entry = dataset, entry
        if len(entry.tasks) > 1:
            warnings.warn(
                f"episode {entry.index} has {len(entry.tasks)} tasks, its instruction is the first", stacklevel=3
            )

    @property
    def actions(self) -> np.ndarray:
        return self._numbers(self._dataset.action_key)

    @property
    def state(self) -> np.ndarray | None:
        return None if self._dataset.state_key is None else self._numbers(self._dataset.state_key)

    @property
    def success(self) -> bool | None:
        return bool(np.any(self._numbers(SUCCESS_KEY))) if SUCCESS_KEY in self._dataset.info.features else None

    @cached_property
    def timestamps(self) -> np.ndarray:
        """(T,) seconds since the start of the episode; read on their own, they are all that a frame needs."""
        return self._finite(self._read_columns(["timestamp"]), "timestamp")[:, 0].astype(np.float64)

    def problems(self) -> list[EpisodeError]:
        found, frame = [], 1 / self._dataset.info.fps
        drift = np.abs(self.timestamps - np.arange(len(self)) * frame).max()
        if drift > FRAME_TOLERANCE * frame:
            reason = f"timestamps are up to {drift:.3f} s off a clock of {self.fps:g} fps"
            found.append(EpisodeError(reason, self._file, self.index))
        for key in filter(self._dataset.info.is_video, self._camera_keys.values()):
            span = self._entry.videos[key]
            if span.stop is None:  # a file of its own
                frames = count_frames(self._dataset.files.path(span.file, self.index))
                reason = f"holds {frames} frames, the episode has {len(self)} steps"
                fits = frames in (None, len(self))
            else:
                reason = f"the metadata gives {len(self)} steps {span.stop - span.start:.3f} s of the video"
                fits = abs(span.stop - span.start - len(self) * frame) < frame / 2
            if not fits:
                found.append(EpisodeError(reason, self._dataset.files.name(span.file), self.index))
        return found

    @property
    def _file(self) -> str:
        return self._dataset.files.name(self._entry.data_file)

    @cached_property
    def _rows(self) -> Any:
        """The numeric columns of the episode, checked against the metadata."""
        dataset, entry = self._dataset, self._entry
        columns = [dataset.action_key, "frame_index", "task_index"]
        columns += [key for key in (dataset.state_key, SUCCESS_KEY) if key is not None and key in dataset.info.features]
        rows = self._read_columns(columns)
        if rows["frame_index"].to_pylist() != list(range(entry.length)):
            raise EpisodeError("frame_index does not count 0, 1, 2, ...", self._file, entry.index)
        numbers = [task for task in rows["task_index"].to_pylist() if isinstance(task, int)]
        texts = {dataset.tasks.get(task) for task in set(numbers)} if len(numbers) == len(rows) else {"no number"}
        if not texts <= set(entry.tasks):
            reason = f"task_index stands for {sorted(map(str, texts))}, the metadata says {list(entry.tasks)}"
            raise EpisodeError(reason, self._file, entry.index)
        return rows

    def _numbers(self, key: str) -> np.ndarray:
        """A numeric column: (T, D) float32."""
        return self._finite(self._rows, key)

    def _finite(self, rows: Any, key: str) -> np.ndarray:
        """A numeric column of `rows`, as wide as the metadata says."""
        width, length = self._dataset.info.width(key), self._entry.length
        try:
            values = flat_values(rows[key])
        except import_extra("pyarrow").ArrowException as error:
            raise EpisodeError(f"{key} holds no numbers: {error}", self._file, self._entry.index) from error
        if len(values) != length * width:
            reason = f"{key} has {len(values) / length:g} values a row, not {width}"
            raise EpisodeError(reason, self._file, self._entry.index)
        return finite_rows(values.reshape(length, width), key, self._file, self._entry.index)

    def _read_columns(self, columns: list[str]) -> Any:
        """The episode's rows of some columns, as many as the metadata says."""
        pa = import_extra("pyarrow")
        path, entry = self._dataset.files.path(self._entry.data_file, self._entry.index), self._entry
        try:
            rows = read_episode_rows(path, entry.index, columns)
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
            raise EpisodeError(f"cannot be read: {error}", self._file, entry.index) from error
        if len(rows) != entry.length:
            raise EpisodeError(f"holds {len(rows)} rows, the metadata says {entry.length}", self._file, entry.index)
        return rows

    def _read_frames(self, key: str, start: int, stop: int) -> np.ndarray:
        is_video = self._dataset.info.is_video(key)
        frames = self._video_frames(key, start, stop) if is_video else self._stored_pictures(key, start, stop)
        size = self._dataset.info.picture_size(key)
        if size is not None and frames.shape[1:3] != size:
            file = self._dataset.files.name(self._entry.videos[key].file) if is_video else self._file
            reason = f"{key} is {frames.shape[1]} x {frames.shape[2]} pixels, meta/info.json says {size[0]} x {size[1]}"
            raise EpisodeError(reason, file, self._entry.index)
        return frames

    def _video_frames(self, key: str, start: int, stop: int) -> np.ndarray:
        span, index = self._entry.videos[key], self._entry.index
        path = self._dataset.files.path(span.file, index)
        seconds = span.start + self.timestamps[start:stop]
        frame = 1 / self._dataset.info.fps
        if span.stop is not None and seconds[-1] + frame / 2 > span.stop:
            reason = f"step {stop - 1} is at {seconds[-1]:.3f} s, the episode's part ends at {span.stop:.3f} s"
            raise EpisodeError(reason, self._dataset.files.name(span.file), index)
        try:
            return decode_frames(path, seconds, FRAME_TOLERANCE * frame)
        except VideoError as error:
            raise EpisodeError(str(error), self._dataset.files.name(span.file), index) from error

    def _stored_pictures(self, key: str, start: int, stop: int) -> np.ndarray:
        cells = self._read_columns([key])[key].slice(start, stop - start).to_pylist()
        pictures = [self._decode_picture(cell, key, start + offset) for offset, cell in enumerate(cells)]
        if len({picture.shape for picture in pictures}) > 1:
            raise EpisodeError(f"the pictures of {key} differ in size", self._file, self._entry.index)
        return np.stack(pictures)

    def _decode_picture(self, cell: Any, key: str, step: int) -> np.ndarray:
        """A cell `{bytes, path}` (or bare bytes) as (H, W, 3) uint8; a path without bytes is a file of the dataset."""
        data, name = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
        if not isinstance(data, bytes):
            if data is not None or not isinstance(name, str) or not name:
                reason = "is empty" if data is None else "holds no picture"
                raise EpisodeError(f"{key} of step {step} {reason}", self._file, self._entry.index)
            data = self._dataset.files.path(name, self._entry.index).read_bytes()
        try:
            return decode_picture(data)
        except PictureError as error:
            raise EpisodeError(f"{key} of step {step} {error}", self._file, self._entry.index) from error


def read_episode_rows(path: Path, episode: int, columns: list[str]) -> Any:
    """The rows of one episode; only row groups that can hold it are read. KeyError for a missing column."""
    pq, compute = import_extra("pyarrow.parquet"), import_extra("pyarrow.compute")
    stat = path.stat()
    footer, spans = _row_groups(path, stat.st_mtime_ns, stat.st_size)
    with pq.ParquetFile(path, metadata=footer) as file:
        for column in ["episode_index", *columns]:
            if column not in file.schema_arrow.names:
                raise KeyError(f"there is no column {column}")
        groups = [group for group, (low, high) in enumerate(spans) if low <= episode <= high]
        rows = file.read_row_groups(groups, columns=["episode_index", *columns])
    mine = compute.equal(rows["episode_index"], episode)
    return rows if compute.all(mine).as_py() else rows.filter(mine)


def flat_values(column: Any) -> np.ndarray:
    """All numbers of a scalar, list or ArrayND column, one after another."""
    pa = import_extra("pyarrow")
    array = column.combine_chunks()
    while isinstance(array, pa.ExtensionArray) or pa.types.is_nested(array.type):
        array = array.storage if isinstance(array, pa.ExtensionArray) else array.flatten()
    return array.to_numpy(zero_copy_only=False)


@lru_cache(maxsize=64)
def _row_groups(path: Path, changed: int, size: int) -> tuple[Any, list[tuple[float, float]]]:
    """The footer of a parquet file and the range of episode_index in each of its row groups."""
    footer = import_extra("pyarrow.parquet").read_metadata(path)
    names = [footer.schema.column(position).path for position in range(footer.num_columns)]
    column = names.index("episode_index") if "episode_index" in names else None
    spans = []
    for group in range(footer.num_row_groups):
        statistics = None if column is None else footer.row_group(group).column(column).statistics
        if statistics is not None and statistics.has_min_max:
            spans.append((statistics.min, statistics.max))
        else:
            spans.append((float("-inf"), float("inf")))
    return footer, spans
