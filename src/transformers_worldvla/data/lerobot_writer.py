"""Writes LeRobot datasets of format v3.0, which LeRobot itself and `load_episodes` read, without the lerobot package.

    with LeRobotWriter("my-dataset", fps=20, cameras=["image"], action_names=["x", "y", "z", "gripper"]) as writer:
        writer.add_episode("open the drawer", actions, {"image": frames}, state=state)

The dataset is made in a folder beside its place and moved there when the block ends well: it appears whole or not at
all. Format: `lerobot/datasets/utils.py` and `compute_stats.py` of lerobot 0.4.4. Cameras become AV1 videos as LeRobot
makes them (lossy); several episodes share a file, and the metadata says where each one lies.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from .episodes import import_extra

CODECS = {"av1": "libsvtav1", "h264": "libx264"}  # name in info.json -> FFmpeg's encoder
VIDEO_OPTIONS = {"crf": "30", "g": "2"}  # LeRobot's quality and key frame every two frames, so that seeking is cheap
VIDEO_FRAMES = 20_000  # a video file that holds more takes no further episode
CHUNK_SIZE = 1000
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EPISODES_PATH = "meta/episodes/chunk-000/file-000.parquet"
INDEX_FEATURES = ("timestamp", "frame_index", "episode_index", "index", "task_index")
QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
SAMPLED_FRAMES = 32  # of an episode and camera, for the statistics of pictures


class LeRobotWriter:
    """A dataset in the making.

    Args:
        folder: must not exist yet.
        fps: frames a second, the same for all cameras.
        cameras: short names; the features are called `observation.images.<name>`.
        action_names, state_names: of the dimensions, where they have names.
        codec: `av1`, or `h264` for players that lack AV1.
        video_frames: a video file that holds as many takes no further episode.

    Raises FileExistsError when there is something at `folder`, and ValueError for an unknown codec.
    """

    def __init__(
        self,
        folder: str | Path,
        fps: int,
        cameras: Sequence[str],
        action_names: Sequence[str] | None = None,
        state_names: Sequence[str] | None = None,
        robot_type: str | None = None,
        codec: str = "av1",
        video_frames: int = VIDEO_FRAMES,
    ):
        self.folder = Path(folder)
        if self.folder.exists():
            raise FileExistsError(f"{self.folder} exists already: a dataset is written to a new folder")
        if codec not in CODECS:
            raise ValueError(f"codec is {' or '.join(CODECS)}, not {codec!r}")
        self.fps, self._robot_type, self._codec = int(fps), robot_type, codec
        self._names = {"action": action_names, "observation.state": state_names}
        self._keys = {camera: f"observation.images.{camera}" for camera in cameras}
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self._staging = Path(tempfile.mkdtemp(prefix=f".{self.folder.name}-", dir=self.folder.parent))
        self._staging.chmod(0o755)
        self._videos = {
            key: _VideoFiles(self._staging, key, self.fps, codec, video_frames) for key in self._keys.values()
        }
        self._features: dict[str, dict[str, Any]] = {}
        self._data: Any = None  # the parquet writer, once the first episode tells how wide its columns are
        self._tasks: dict[str, int] = {}
        self._rows: list[dict[str, Any]] = []
        self._statistics: list[dict[str, dict[str, np.ndarray]]] = []
        self._frames = 0

    def add_episode(
        self,
        instruction: str,
        actions: np.ndarray,
        frames: Mapping[str, np.ndarray],
        state: np.ndarray | None = None,
    ) -> None:
        """Append an episode of T steps.

        Args:
            actions: (T, D); row t is what was done when row t of frames and state had been seen.
            frames: camera -> (T, H, W, 3) uint8 RGB, in the orientation that models are to see.
            state: (T, S), for every episode or for none.

        Raises:
            ValueError: something has another length, shape or type than the rest or than the episodes before.
        """
        numbers = {"action": np.asarray(actions, np.float32)}
        if state is not None:
            numbers = {"observation.state": np.asarray(state, np.float32), **numbers}
        pictures = {self._keys.get(camera, camera): np.asarray(values) for camera, values in frames.items()}
        length = len(numbers["action"])
        self._check(length, numbers, pictures)
        task = self._tasks.setdefault(instruction, len(self._tasks))
        index = len(self._rows)
        columns: dict[str, np.ndarray] = {
            **numbers,
            "timestamp": (np.arange(length) / self.fps).astype(np.float32),
            "frame_index": np.arange(length),
            "episode_index": np.full(length, index),
            "index": np.arange(self._frames, self._frames + length),
            "task_index": np.full(length, task),
        }
        self._write_rows(columns)
        row: dict[str, Any] = {
            "episode_index": index,
            "tasks": [instruction],
            "length": length,
            "data/chunk_index": 0,
            "data/file_index": 0,
            "dataset_from_index": self._frames,
            "dataset_to_index": self._frames + length,
        }
        for key, values in pictures.items():
            row |= self._videos[key].append(values)
        sampled = {key: values[:: -(-length // SAMPLED_FRAMES)] for key, values in pictures.items()}
        statistics = {key: describe(values) for key, values in {**sampled, **columns}.items()}
        row |= {f"stats/{key}/{name}": value.tolist() for key, s in statistics.items() for name, value in s.items()}
        self._rows.append(row | {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0})
        self._statistics.append(statistics)
        self._frames += length

    def _check(self, length: int, numbers: Mapping[str, np.ndarray], pictures: Mapping[str, np.ndarray]) -> None:
        if set(pictures) != set(self._keys.values()):
            raise ValueError(f"an episode has the cameras {', '.join(self._keys)}, not {', '.join(pictures)}")
        for key, values in numbers.items():
            if values.ndim != 2 or len(values) != length or length == 0 or not np.isfinite(values).all():
                raise ValueError(f"{key} is {length} rows of finite numbers, not of shape {values.shape}")
        for key, values in pictures.items():
            if values.dtype != np.uint8 or values.ndim != 4 or values.shape[-1] != 3 or len(values) != length:
                raise ValueError(f"{key} is ({length}, H, W, 3) uint8, not {values.shape} {values.dtype}")
        features = {key: self._picture_feature(values) for key, values in pictures.items()}
        features |= {key: self._number_feature(key, values) for key, values in numbers.items()}
        features |= {
            key: {"dtype": "float32" if key == "timestamp" else "int64", "shape": [1], "names": None}
            for key in INDEX_FEATURES
        }
        if self._features and features != self._features:
            changed = next(key for key in features | self._features if features.get(key) != self._features.get(key))
            raise ValueError(f"{changed} differs in shape from the episodes before, or is not in all of them")
        self._features = features

    def _number_feature(self, key: str, values: np.ndarray) -> dict[str, Any]:
        names, width = self._names[key], values.shape[1]
        if names is not None and len(names) != width:
            raise ValueError(f"{key} has {width} dimensions and {len(names)} names")
        return {"dtype": "float32", "shape": [width], "names": None if names is None else list(names)}

    def _picture_feature(self, values: np.ndarray) -> dict[str, Any]:
        height, width = values.shape[1:3]
        info = {
            "video.height": height,
            "video.width": width,
            "video.codec": self._codec,
            "video.pix_fmt": "yuv420p",
            "video.is_depth_map": False,
            "video.fps": self.fps,
            "video.channels": 3,
            "has_audio": False,
        }
        names = ["height", "width", "channels"]
        return {"dtype": "video", "shape": [height, width, 3], "names": names, "info": info}

    def _write_rows(self, columns: Mapping[str, np.ndarray]) -> None:
        """One row group an episode, as LeRobot does."""
        pa, pq = import_extra("pyarrow"), import_extra("pyarrow.parquet")
        arrays, described = {}, {}
        for key, values in columns.items():
            dtype = self._features[key]["dtype"]
            value: dict[str, Any] = {"dtype": dtype, "_type": "Value"}
            if values.ndim == 2:
                flat = pa.array(values.reshape(-1), dtype)
                arrays[key] = pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
                described[key] = {"feature": value, "length": values.shape[1], "_type": "List"}
            else:
                arrays[key], described[key] = pa.array(values, dtype), value
        table = pa.table(arrays)
        schema = table.schema.with_metadata({"huggingface": json.dumps({"info": {"features": described}})})
        if self._data is None:
            path = self._staging / DATA_PATH.format(chunk_index=0, file_index=0)
            path.parent.mkdir(parents=True)
            self._data = pq.ParquetWriter(path, schema, compression="snappy")
        self._data.write_table(table.cast(schema))

    # ---------------------------------------------------------------- the end

    def close(self) -> None:
        """Write the metadata and move the dataset to its place. Raises ValueError when it has no episode."""
        if not self._rows:
            raise ValueError("a dataset has at least one episode")
        for video in self._videos.values():
            video.close()
        self._data.close()
        self._write_metadata()
        self._staging.rename(self.folder)

    def discard(self) -> None:
        """Drop all that was written."""
        for video in self._videos.values():
            video.close()
        if self._data is not None:
            self._data.close()
        shutil.rmtree(self._staging, ignore_errors=True)

    def __enter__(self) -> "LeRobotWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        if kind is not None:
            self.discard()
            return
        try:
            self.close()
        except BaseException:
            self.discard()
            raise

    def _write_metadata(self) -> None:
        pa, pq = import_extra("pyarrow"), import_extra("pyarrow.parquet")
        (self._staging / EPISODES_PATH).parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(self._rows), self._staging / EPISODES_PATH)
        pq.write_table(task_table(self._tasks), self._staging / "meta/tasks.parquet")
        info = {
            "codebase_version": "v3.0",
            "robot_type": self._robot_type,
            "total_episodes": len(self._rows),
            "total_frames": self._frames,
            "total_tasks": len(self._tasks),
            "chunks_size": CHUNK_SIZE,
            "data_files_size_in_mb": 100,
            "video_files_size_in_mb": 200,
            "fps": self.fps,
            "splits": {"train": f"0:{len(self._rows)}"},
            "data_path": DATA_PATH,
            "video_path": VIDEO_PATH if self._keys else None,
            "features": self._features,
        }
        (self._staging / "meta/info.json").write_text(json.dumps(info, indent=4) + "\n", encoding="utf-8")
        overall = {key: pool([each[key] for each in self._statistics]) for key in self._statistics[0]}
        plain = {key: {name: value.tolist() for name, value in s.items()} for key, s in overall.items()}
        (self._staging / "meta/stats.json").write_text(json.dumps(plain, indent=4) + "\n", encoding="utf-8")


class _VideoFiles:
    """The video files of one camera; a new one is begun when the last is full."""

    def __init__(self, root: Path, key: str, fps: int, codec: str, limit: int):
        self._root, self._key, self._fps, self._codec = root, key, fps, codec
        self._limit = limit
        self._file = -1
        self._container: Any = None
        self._stream: Any = None
        self._count = 0  # frames in the file

    def append(self, frames: np.ndarray) -> dict[str, Any]:
        """Encode an episode (T, H, W, 3); returns the columns that say where it lies."""
        av = import_extra("av")
        if self._container is not None and self._count >= self._limit:
            self.close()
        if self._container is None:
            self._open(*frames.shape[1:3])
        start = self._count
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            picture.pts = self._count
            self._container.mux(self._stream.encode(picture))
            self._count += 1
        places: dict[str, float] = {"chunk_index": self._file // CHUNK_SIZE, "file_index": self._file % CHUNK_SIZE}
        places |= {"from_timestamp": start / self._fps, "to_timestamp": self._count / self._fps}
        return {f"videos/{self._key}/{name}": value for name, value in places.items()}

    @property
    def _path(self) -> Path:
        chunk, file = divmod(self._file, CHUNK_SIZE)
        return self._root / VIDEO_PATH.format(video_key=self._key, chunk_index=chunk, file_index=file)

    def _open(self, height: int, width: int) -> None:
        av = import_extra("av")
        os.environ.setdefault("SVT_LOG", "1")  # errors only; the AV1 encoder has no other switch
        self._file, self._count = self._file + 1, 0
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._container = av.open(str(self._path), "w")
        self._stream = self._container.add_stream(CODECS[self._codec], Fraction(self._fps), options=dict(VIDEO_OPTIONS))
        self._stream.height, self._stream.width, self._stream.pix_fmt = height, width, "yuv420p"
        self._stream.time_base = Fraction(1, self._fps)

    def close(self) -> None:
        """Finish the file, if one is open."""
        if self._container is not None:
            self._container.mux(self._stream.encode())
            self._container.close()
            self._container = None


def describe(values: np.ndarray) -> dict[str, np.ndarray]:
    """LeRobot's statistics: of each dimension of rows (T,) or (T, D), or of each colour of frames
    (T, H, W, 3), these in 0..1 and of shape (3, 1, 1)."""
    is_picture = values.ndim == 4
    rows = values.reshape(len(values), -1) if values.ndim < 3 else values
    axes, scale = ((0, 1, 2), 255.0) if is_picture else ((0,), 1.0)
    found = {
        "min": rows.min(axes),
        "max": rows.max(axes),
        "mean": rows.mean(axes, dtype=np.float64),
        "std": rows.std(axes, dtype=np.float64),
        **{name: np.quantile(rows, share, axis=axes) for name, share in QUANTILES.items()},
    }
    shape = (3, 1, 1) if is_picture else (-1,)
    plain = {
        name: (value / scale).reshape(shape) if is_picture else value.reshape(shape) for name, value in found.items()
    }
    return {**plain, "count": np.array([len(values)])}


def pool(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Statistics of several episodes as one, as LeRobot aggregates: exact but for quantiles, which are averaged."""
    counts = np.array([part["count"][0] for part in parts], np.float64)
    weights = (counts / counts.sum()).reshape(-1, *[1] * parts[0]["mean"].ndim)
    means = np.stack([part["mean"] for part in parts])
    mean = (weights * means).sum(0)
    variance = (weights * (np.stack([part["std"] for part in parts]) ** 2 + (means - mean) ** 2)).sum(0)
    return {
        "min": np.min([part["min"] for part in parts], axis=0),
        "max": np.max([part["max"] for part in parts], axis=0),
        "mean": mean,
        "std": np.sqrt(variance),
        "count": np.array([int(counts.sum())]),
        **{name: (weights * np.stack([part[name] for part in parts])).sum(0) for name in QUANTILES},
    }


def task_table(tasks: Mapping[str, int]) -> Any:
    """`tasks.parquet`: a pandas table whose index is the instruction."""
    pa = import_extra("pyarrow")
    index = "__index_level_0__"
    column = {"name": None, "field_name": index, "pandas_type": "unicode", "numpy_type": "object", "metadata": None}
    number = {"pandas_type": "int64", "numpy_type": "int64", "metadata": None}
    described = {
        "index_columns": [index],
        "column_indexes": [{**column, "field_name": None, "metadata": {"encoding": "UTF-8"}}],
        "columns": [{"name": "task_index", "field_name": "task_index", **number}, column],
        "pandas_version": "2.2.0",
    }
    table = pa.table({"task_index": pa.array(tasks.values(), pa.int64()), index: pa.array(tasks, pa.string())})
    return table.replace_schema_metadata({"pandas": json.dumps(described)})
