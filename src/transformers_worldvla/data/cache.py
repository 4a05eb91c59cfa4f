"""The frame-token cache, opened: every frame of a dataset as codes of the image tokenizer, with actions and state.

A cache is a folder, or a dataset repository, of Parquet files (`data/SPLIT-*.parquet`, a row a time step) and a header
`worldvla_cache.json`; `worldvla tokenize` makes it. Reading needs pyarrow alone. What is stored are codebook indices:
they become token ids through the grammar of the processor they are used with, once `verify` has found that model and
processor would have made the same codes.

Columns: `episode_index` and `step`, the numbers in the original dataset (a gap is a dropped no-op), `instruction`,
`action` (D,) float32, `state` (S,) float32 where the dataset has it, and per camera `codes.CAMERA` (h * w,) uint16, row
by row.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..action_tokenization_worldvla import Embodiment
from .episodes import EpisodeDataset, EpisodeError
from .image_tokenizer import hash_image_tokenizer
from .loading import download_snapshot
from .samples import TokenizedEpisode
from .splits import SPLITS
from .storage import check_inside, first_line

HEADER, DATA, VERSION = "worldvla_cache.json", "data", 1
CODES = "codes."  # prefix of the column of a camera
MAX_ROWS = 2**40  # what a header may promise


class FrameTokenCache:
    """A finished cache: a folder, or a dataset repository on the Hub at a revision (downloaded when opened).

    Attributes:
        header: what was tokenized and how; see `cache_plan.py`.
        path: the folder on this machine.

    Raises FileNotFoundError where there is no cache, and EpisodeError for one that is damaged.
    """

    def __init__(self, path_or_repo: str | Path, revision: str | None = None):
        self.path = _locate(path_or_repo, revision)
        self.header = read_header(self.path)
        self._code_ids: np.ndarray | None = None
        for entry in self.header["files"]:
            if not (self.path / entry["path"]).is_file():
                raise EpisodeError("file is missing", self.path / entry["path"])

    @property
    def fingerprint(self) -> str:
        """Changes with anything that decides what the cache holds: weights, transform, data, choice of steps, split."""
        return self.header["fingerprint"]

    @property
    def embodiment(self) -> Embodiment:
        """The robot, with the ranges of its training actions."""
        return Embodiment.from_dict(self.header["embodiment"])

    @property
    def cameras(self) -> tuple[str, ...]:
        """The C cameras of a time step, in the order of the sequence."""
        return tuple(self.header["cameras"])

    @property
    def grid(self) -> tuple[int, int]:
        """Codes of a picture: (h, w)."""
        height, width = self.header["image_transform"]["codes"]
        return height, width

    @property
    def splits(self) -> dict[str, int]:
        """Number of steps of each split; empty ones have 0."""
        files = self.header["files"]
        return {split: sum(entry["rows"] for entry in files if entry["split"] == split) for split in SPLITS}

    def verify(self, model: Any, processor: Any, dataset: EpisodeDataset | None = None) -> "FrameTokenCache":
        """Check that a model and processor would make the same codes; from now on, codes become their token ids.

        Compares the weights of the image tokenizer, the size of pictures and, where a dataset is given, its revision
        or content. Raises ValueError in one line that says what differs. Returns the cache itself.
        """
        again = "run `worldvla tokenize` with this checkpoint"
        made, found = self.header["image_tokenizer"]["sha256"], hash_image_tokenizer(model.model.vqmodel)
        if found != made:
            raise ValueError(
                f"{self.path} was made by another image tokenizer (sha256 {made[:12]}, not {found[:12]}): {again}"
            )
        transform, images = self.header["image_transform"], processor.image_processor
        then, now = (transform["type"], transform["target_size"]), (type(images).__name__, images.target_size)
        if now != then:
            raise ValueError(
                f"{self.path} holds pictures of {then[0]} at {then[1]} pixels, this processor is {now[0]} at {now[1]}: "
                f"{again}"
            )
        if dataset is not None and dataset.fingerprint != self.header["dataset"]["fingerprint"]:
            raise ValueError(
                f"{self.path} was made from other data than {dataset.source} is now (fingerprint "
                f"{self.header['dataset']['fingerprint'][:12]}, not {dataset.fingerprint[:12]}): {again}"
            )
        self._bind(processor)
        return self

    def _bind(self, processor: Any) -> None:
        ids, wanted = processor.tokens.image_codes, self.header["image_tokenizer"]["num_codes"]
        if len(ids) < wanted:
            raise ValueError(f"the vocabulary names {len(ids)} image codes, {self.path} uses {wanted}")
        self._code_ids = np.array(ids[:wanted], dtype=np.int32)

    def episodes(self, split: str | None = None) -> list[TokenizedEpisode]:
        """The episodes of a split (`train`, `val_ind`, `val_ood`), or all of them, by their number.

        Frames are token ids (T, C, h, w) int32 of the vocabulary that `verify` was given; raises ValueError before it.
        """
        if self._code_ids is None:
            raise ValueError("call verify(model, processor) first: codes become token ids through their vocabulary")
        columns = ["episode_index", "instruction", "action", *(CODES + camera for camera in self.cameras)]
        episodes: list[TokenizedEpisode] = []
        for entry in self._files(split):
            rows = self._read(entry, columns)
            try:
                numbers = rows["episode_index"].to_numpy().astype(np.int64)
                codes = [self._codes(rows, camera, entry["path"]) for camera in self.cameras]
                actions = _matrix(rows["action"]).astype(np.float32)
                starts = np.flatnonzero(np.diff(numbers, prepend=-1)).tolist()
                instructions = [rows["instruction"][start].as_py() for start in starts]
            except (ValueError, TypeError, AttributeError) as error:  # pyarrow's own are among them
                file = self.path / entry["path"]
                raise EpisodeError(f"holds columns of another kind: {first_line(error)}", file) from error
            for start, stop, instruction in zip(starts, [*starts[1:], len(numbers)], instructions, strict=True):
                frames = np.stack([self._code_ids[view[start:stop]] for view in codes], axis=1)
                index, own = int(numbers[start]), actions[start:stop]
                episodes.append(TokenizedEpisode(index, instruction, frames, own, self.header["embodiment"]["name"]))
        return sorted(episodes, key=lambda episode: episode.index)

    def table(self, split: str | None = None, columns: Sequence[str] | None = None) -> Any:
        """Rows of a split, or of all, as a pyarrow table, in the order of the files; all columns by default."""
        import pyarrow as pa

        tables = [self._read(entry, columns) for entry in self._files(split)]
        if not tables:
            raise ValueError(f"{self.path} has no {split} rows")
        return pa.concat_tables(tables)

    def _files(self, split: str | None) -> list[dict[str, Any]]:
        if split is not None and split not in SPLITS:
            raise ValueError(f"splits are {', '.join(SPLITS)}, not {split!r}")
        return [entry for entry in self.header["files"] if split in (None, entry["split"])]

    def _read(self, entry: dict[str, Any], columns: Sequence[str] | None) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = self.path / entry["path"]
        try:
            with pq.ParquetFile(path) as file:
                rows = file.read(columns=None if columns is None else list(columns))
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            raise EpisodeError(f"cannot be read: {first_line(error)}", path) from error
        missing = [column for column in columns or [] if column not in rows.column_names]
        if missing or len(rows) != entry["rows"]:
            reason = f"lacks column {missing[0]}" if missing else f"holds {len(rows)} rows, not {entry['rows']}"
            raise EpisodeError(reason, path)
        return rows

    def _codes(self, rows: Any, camera: str, file: str) -> np.ndarray:
        """Codebook indices of a camera: (rows, h, w) uint16."""
        codes = _matrix(rows[CODES + camera])
        if codes.shape[1] != np.prod(self.grid) or codes.max() >= self.header["image_tokenizer"]["num_codes"]:
            raise EpisodeError(f"{CODES}{camera} holds no {self.grid} codes", self.path / file)
        return codes.reshape(-1, *self.grid)

    def __repr__(self) -> str:
        counts = ", ".join(f"{name} {count}" for name, count in self.splits.items())
        return f"FrameTokenCache({self.path}: steps {counts}; cameras {', '.join(self.cameras)})"


def _matrix(column: Any) -> np.ndarray:
    """A column of lists of equal length: (rows, length)."""
    array = column.combine_chunks()
    return array.flatten().to_numpy().reshape(len(array), -1)


def _locate(path_or_repo: str | Path, revision: str | None) -> Path:
    path = Path(path_or_repo).expanduser()
    if path.exists() or str(path_or_repo).count("/") != 1:
        if revision is not None:
            raise ValueError(f"revision applies to Hub repositories, not to {path}")
        return path
    return download_snapshot(str(path_or_repo), revision, [HEADER, f"{DATA}/*"])


def read_header(path: Path) -> dict[str, Any]:
    """The header of a finished cache. FileNotFoundError when there is none, EpisodeError when it is damaged."""
    file = path / HEADER
    if not file.is_file():
        state = "an unfinished cache: run the same `worldvla tokenize` again" if is_unfinished(path) else "no cache"
        raise FileNotFoundError(f"{path} holds {state} ({HEADER} is missing)")
    try:
        header = json.loads(file.read_text(encoding="utf-8"))
        version = header["version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise EpisodeError(f"is no header of a cache: {first_line(error)}", file) from error
    if version != VERSION:
        raise EpisodeError(f"is version {str(version)[:40]}, this library reads {VERSION}", file)
    try:
        _check_header(header)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise EpisodeError(f"is damaged: {error!r}", file) from error
    return header


def _check_header(header: dict[str, Any]) -> None:
    """Raise when something that readers take from a header is not there, or of another kind."""
    robot = Embodiment.from_dict(header["embodiment"])
    if tuple(header["cameras"]) != robot.cameras:
        raise ValueError(f"cameras are {header['cameras']}, the embodiment has {list(robot.cameras)}")
    height, width = header["image_transform"]["codes"]
    counts = [height, width, header["image_tokenizer"]["num_codes"], *(entry["rows"] for entry in header["files"])]
    if not all(type(count) is int and 0 < count < MAX_ROWS for count in counts):
        raise ValueError("numbers of codes and rows are whole and above 0")
    texts = [header["fingerprint"], header["image_tokenizer"]["sha256"], header["dataset"]["fingerprint"]]
    texts += [header["image_transform"]["type"], *(entry["path"] for entry in header["files"])]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("names, paths and fingerprints are text")
    header["image_transform"]["target_size"]  # whether it fits is asked by `verify`
    for entry in header["files"]:
        check_inside(entry["path"], entry["path"])
        if entry["split"] not in SPLITS:
            raise ValueError(f"no split is {entry['split']!r}")


def unfinished_folder(path: Path) -> Path:
    """Where a cache keeps what it has so far."""
    return path / "unfinished"


def is_unfinished(path: Path) -> bool:
    """Whether somebody has begun a cache here and not ended it."""
    return (unfinished_folder(path) / HEADER).is_file()
