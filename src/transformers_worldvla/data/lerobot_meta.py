"""The metadata of a LeRobot dataset, v2.0, v2.1 or v3.0, as one table: which rows of which files are which episode.

Read from `meta/` alone; no recording is opened here. Sources: `lerobot/datasets/utils.py` of lerobot 0.3.3 (v2) and
0.4.4 (v3). Unknown keys and columns are ignored, later writers add some.
"""

import json
import re
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from .episodes import EpisodeError, import_extra
from .storage import Files

INFO, TASKS_V2, EPISODES_V2 = "meta/info.json", "meta/tasks.jsonl", "meta/episodes.jsonl"
TASKS_V3, EPISODES_V3 = "meta/tasks.parquet", "meta/episodes"
Value = TypeVar("Value")
ACTION_KEYS, STATE_KEYS = ("action", "actions"), ("observation.state", "state")  # the plurals are openpi's


@dataclass(frozen=True)
class VideoSpan:
    """Where the frames of an episode lie: a file and the seconds in it."""

    file: str
    start: float = 0.0
    stop: float | None = None  # None: to the end of the file


@dataclass(frozen=True)
class EpisodeEntry:
    """One episode as the metadata describes it."""

    index: int
    length: int
    tasks: tuple[str, ...]
    data_file: str
    videos: Mapping[str, VideoSpan] = field(default_factory=dict)  # camera key -> span


@dataclass(frozen=True)
class LeRobotInfo:
    """The parts of `meta/info.json` that a reader needs."""

    version: tuple[int, int]
    fps: float
    features: Mapping[str, Mapping[str, Any]]
    data_path: str
    video_path: str | None
    chunks_size: int
    total_episodes: int
    total_frames: int

    @property
    def camera_keys(self) -> list[str]:
        return [key for key, feature in self.features.items() if feature.get("dtype") in ("video", "image")]

    def is_video(self, key: str) -> bool:
        return self.features[key]["dtype"] == "video"

    def first_of(self, keys: tuple[str, ...]) -> str | None:
        return next((key for key in keys if key in self.features), None)

    def width(self, key: str) -> int:
        """Number of values a row of a numeric feature has."""
        size = 1
        for side in self.features[key]["shape"]:
            size *= int(side)
        return size

    def names(self, key: str | None) -> tuple[str, ...] | None:
        """Names of the dimensions of a feature, stored as a list or as {"motors": [...]}; None when there are none."""
        names = self.features[key].get("names") if key else None
        if isinstance(names, Mapping):
            names = [name for group in names.values() for name in (group if isinstance(group, list) else [group])]
        if not isinstance(names, list) or not names or key is None or len(names) != self.width(key):
            return None
        return tuple(str(name) for name in names)

    def picture_size(self, key: str) -> tuple[int, int] | None:
        """(height, width) of a camera; the shape may be HWC or CHW, `names` tells. None when it does not."""
        shape, names = self.features[key].get("shape"), self.features[key].get("names")
        if not isinstance(names, list) or not shape or len(names) != len(shape):
            return None
        sides = dict(zip(map(str, names), shape, strict=True))
        return (int(sides["height"]), int(sides["width"])) if {"height", "width"} <= sides.keys() else None


def read_info(files: Files) -> LeRobotInfo:
    """Parse `meta/info.json`. EpisodeError for a version that is not 2.0, 2.1 or 3.x and for missing keys."""
    info = _read_json(files, INFO)
    where = files.name(INFO)
    match = re.fullmatch(r"v?(\d+)\.(\d+).*", str(info.get("codebase_version")))
    version = (int(match[1]), int(match[2])) if match else (0, 0)
    if version[0] not in (2, 3):
        raise EpisodeError(
            f"codebase_version is {info.get('codebase_version')}, readable are v2.0, v2.1 and v3.0"
            ' (Hub repositories often have them as revision="v2.1" or "v3.0")',
            where,
        )
    try:
        parsed = LeRobotInfo(
            version=version,
            fps=float(info["fps"]),
            features={key: dict(feature) for key, feature in info["features"].items()},
            data_path=str(info["data_path"]),
            video_path=info.get("video_path") and str(info["video_path"]),
            chunks_size=int(info.get("chunks_size", 1000)),
            total_episodes=int(info["total_episodes"]),
            total_frames=int(info["total_frames"]),
        )
        sizes = [parsed.width(key) for key in parsed.features]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise EpisodeError(f"is not complete: {error!r}", where) from error
    if not 0 < parsed.fps < 1e6 or min([parsed.chunks_size, *sizes]) < 1:
        raise EpisodeError("has an fps, a chunks_size or a shape that is not positive", where)
    return parsed


def read_tasks(files: Files, info: LeRobotInfo) -> dict[int, str]:
    """Task index -> instruction."""
    if info.version[0] == 2:
        rows, text = _read_json_lines(files, TASKS_V2), "task"
    else:
        rows = _read_parquet(files, TASKS_V3)
        texts = [key for key, value in rows[0].items() if isinstance(value, str)] if rows else []
        text = next((key for key in texts if key.startswith("__index")), "task")  # the index of a pandas table
    name = TASKS_V2 if info.version[0] == 2 else TASKS_V3
    return {_field(row, "task_index", int, files, name): _field(row, text, _text, files, name) for row in rows}


def read_entries(files: Files, info: LeRobotInfo) -> list[EpisodeEntry]:
    """The episodes of the dataset, by index."""
    rows = _entries_v2(files, info) if info.version[0] == 2 else _entries_v3(files, info)
    return sorted(rows, key=lambda entry: entry.index)


def _entries_v2(files: Files, info: LeRobotInfo) -> list[EpisodeEntry]:
    entries = []
    for row in _read_json_lines(files, EPISODES_V2):
        index = _field(row, "episode_index", int, files, EPISODES_V2)
        places = {"episode_chunk": index // info.chunks_size, "episode_index": index}
        entries.append(
            EpisodeEntry(
                index,
                _field(row, "length", int, files, EPISODES_V2),
                _field(row, "tasks", _texts, files, EPISODES_V2),
                _fill(info.data_path, files, **places),
                {key: VideoSpan(_video_file(info, key, files, **places)) for key in _video_keys(info)},
            )
        )
    return entries


def _entries_v3(files: Files, info: LeRobotInfo) -> list[EpisodeEntry]:
    names = [name for name in files.list(EPISODES_V3) if name.endswith(".parquet")]
    if not names:
        raise EpisodeError("holds no parquet file", files.name(EPISODES_V3))
    columns = ["episode_index", "tasks", "length", "data/chunk_index", "data/file_index"]
    for key in _video_keys(info):
        columns += [f"videos/{key}/{part}" for part in ("chunk_index", "file_index", "from_timestamp", "to_timestamp")]
    return [_entry_v3(row, files, name, info) for name in names for row in _read_parquet(files, name, columns)]


def _entry_v3(row: dict[str, Any], files: Files, name: str, info: LeRobotInfo) -> EpisodeEntry:
    videos = {}
    for key in _video_keys(info):
        places = {part: _field(row, f"videos/{key}/{part}", int, files, name) for part in ("chunk_index", "file_index")}
        start, stop = (_field(row, f"videos/{key}/{part}_timestamp", float, files, name) for part in ("from", "to"))
        videos[key] = VideoSpan(_video_file(info, key, files, **places), start, stop)
    places = {part: _field(row, f"data/{part}", int, files, name) for part in ("chunk_index", "file_index")}
    return EpisodeEntry(
        _field(row, "episode_index", int, files, name),
        _field(row, "length", int, files, name),
        _field(row, "tasks", _texts, files, name),
        _fill(info.data_path, files, **places),
        videos,
    )


def _read_parquet(files: Files, name: str, columns: list[str] | None = None) -> list[dict[str, Any]]:
    """The rows of a small parquet file. EpisodeError when it is missing, damaged or lacks a column."""
    pa, pq = import_extra("pyarrow"), import_extra("pyarrow.parquet")
    path = files.path(name)
    try:
        with pq.ParquetFile(path) as file:
            missing = [column for column in columns or [] if column not in file.schema_arrow.names]
            if missing:
                raise EpisodeError(f"lacks column {missing[0]}", files.name(name))
            return file.read(columns=columns).to_pylist()
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise EpisodeError(f"cannot be read: {error}", files.name(name)) from error


def _video_keys(info: LeRobotInfo) -> list[str]:
    return [key for key in info.camera_keys if info.is_video(key)]


def _video_file(info: LeRobotInfo, key: str, files: Files, **places: int) -> str:
    if info.video_path is None:
        raise EpisodeError(f"video_path is null, yet {key} is a video", files.name(INFO))
    return _fill(info.video_path, files, video_key=key, **places)


def _fill(template: str, files: Files, **places: int | str) -> str:
    """The path that a template stands for. Fields are plain, like `{episode_index:06d}`: `format` can do far more."""
    try:
        for _, name, form, conversion in string.Formatter().parse(template):
            if name is not None and (
                name not in places or conversion or not re.fullmatch(r"(0?\d{1,2})?d?", form or "")
            ):
                raise ValueError(f"no field is {{{name}}}")
        return template.format(**places)
    except (KeyError, IndexError, ValueError) as error:
        raise EpisodeError(f'the path "{template[:200]}" cannot be filled in: {error}', files.name(INFO)) from error


def _field(row: Mapping[str, Any], key: str, convert: Callable[[Any], Value], files: Files, name: str) -> Value:
    """A value of a row; EpisodeError when it is missing or of another type."""
    try:
        return convert(row[key])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        reason = f'lacks "{key}"' if key not in row else f'has {row[key]!r} as "{key}"'
        raise EpisodeError(f"a row {reason}", files.name(name), _number(row.get("episode_index"))) from error


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise TypeError
    return tuple(map(_text, value))


def _read_json(files: Files, name: str) -> dict[str, Any]:
    return _parsed(files, name, lambda text: [json.loads(text)])[0]


def _read_json_lines(files: Files, name: str) -> list[dict[str, Any]]:
    return _parsed(files, name, lambda text: [json.loads(line) for line in text.splitlines() if line.strip()])


def _parsed(files: Files, name: str, parse: Callable[[str], list[Any]]) -> list[dict[str, Any]]:
    try:
        rows = parse(files.path(name).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise EpisodeError(f"is not JSON: {error}", files.name(name)) from error
    if not all(isinstance(row, dict) for row in rows):
        raise EpisodeError("is not JSON: an object { } is wanted", files.name(name))
    return rows
