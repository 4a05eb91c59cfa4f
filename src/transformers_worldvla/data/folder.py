"""Reads a plain folder of pictures and actions: data that no robot framework wrote, and what the authors' scripts save.

    root/[task/]episode/
        CAMERA/image_0.png, ...      a folder a camera, named like it; pictures numbered without gaps
        actions.npy                  one row a picture; or actions.csv, or action/action_0.npy, ...
        state.npy                    optional; or state.csv, or state/state_0.npy, ...
        instruction.txt              here or in a folder above; without one, a `trj_N` in a task's folder has its name
        episode.json                 optional: {"fps": 20, "success": true}

Pictures are given out as they are: they must have the model's orientation already. A csv may have a header of names.
"""

import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .episodes import Episode, EpisodeDataset, EpisodeError, finite_rows, select_cameras
from .libero_hdf5 import instruction_from_task_name
from .pictures import PictureError, decode_picture
from .storage import load_numbers

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
ACTIONS, STATE = ("actions.npy", "actions.csv", "action"), ("state.npy", "state.csv", "state")


class FolderEpisodes(EpisodeDataset):
    """The episodes of a folder tree, in natural order. All need the cameras of the first, or those asked for."""

    format = "folder of pictures"

    def __init__(self, root: Path, cameras: str | Sequence[str] | None = None, source: str | None = None):
        self.root, self.source = root, source or str(root)
        self.folders = episode_folders(root)
        if not self.folders:
            raise EpisodeError(f"holds no {', no '.join(ACTIONS)}", root)
        self.camera_keys = select_cameras(cameras, camera_names(self.folders[0]))
        self.cameras = tuple(self.camera_keys)
        self._problems: list[EpisodeError] = []
        self._episodes = [self._describe(position) for position in range(len(self.folders))]
        self.fps = self._episodes[0].fps
        self.action_names = csv_header(find_rows(self.folders[0], ACTIONS))
        self.state_names = csv_header(find_rows(self.folders[0], STATE))

    def _describe(self, position: int) -> "FolderEpisode":
        """An episode; what does not fit in it becomes a problem of the dataset."""
        folder, length, instruction, facts = self.folders[position], 0, "", {}
        try:
            length = count_rows(find_rows(folder, ACTIONS), position)
            facts = read_facts(folder, position)
            instruction = read_instruction(folder, self.root, position)
            for camera in self.camera_keys.values():
                pictures = len(numbered(folder / camera, PICTURES, position))
                if pictures != length:
                    raise EpisodeError(f"{pictures} pictures, {length} actions", folder / camera, position)
        except EpisodeError as error:
            self._problems.append(error)
        return FolderEpisode(position, folder, length, instruction, facts, self.camera_keys)

    @property
    def lengths(self) -> list[int]:
        return [len(episode) for episode in self._episodes]

    def _episode(self, position: int) -> Episode:
        return self._episodes[position]

    def problems(self) -> list[EpisodeError]:
        return list(self._problems)

    def _local_files(self) -> list[Path]:
        return [path for path in self.root.rglob("*") if path.is_file()]


class FolderEpisode(Episode):
    """An episode that is a folder."""

    def __init__(
        self, index: int, folder: Path, length: int, instruction: str, facts: dict[str, Any], cameras: dict[str, str]
    ):
        fps = facts.get("fps")
        super().__init__(index, length, instruction, None if fps is None else float(fps), cameras)
        self.folder, self._success = folder, facts.get("success")

    @property
    def actions(self) -> np.ndarray:
        source = find_rows(self.folder, ACTIONS)
        return finite_rows(read_rows(source, self.index), "action", str(source), self.index)

    @property
    def state(self) -> np.ndarray | None:
        source = find_rows(self.folder, STATE)
        if source is None:
            return None
        rows = finite_rows(read_rows(source, self.index), "state", str(source), self.index)
        if len(rows) != len(self):
            raise EpisodeError(f"{len(rows)} rows of state, {len(self)} actions", source, self.index)
        return rows

    @property
    def success(self) -> bool | None:
        return self._success

    def _read_frames(self, key: str, start: int, stop: int) -> np.ndarray:
        files = numbered(self.folder / key, PICTURES, self.index)[start:stop]
        pictures: list[np.ndarray] = []
        for file in files:
            try:
                pictures.append(decode_picture(file))
            except PictureError as error:
                raise EpisodeError(str(error), file, self.index) from error
            if pictures[-1].shape != pictures[0].shape:
                raise EpisodeError(f"differs in size from {files[0].name}", file, self.index)
        return np.stack(pictures)


def natural_key(path: Path) -> list[tuple[int, str]]:
    """Sorts trj_2 before trj_10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.as_posix())]


def episode_folders(root: Path) -> list[Path]:
    """Folders with actions, at or below `root`."""
    return sorted({mark.parent for name in ACTIONS for mark in root.rglob(name)}, key=natural_key)


def camera_names(folder: Path) -> list[str]:
    """Folders of pictures in an episode's folder."""
    folders = sorted(path for path in folder.iterdir() if path.is_dir())
    return [path.name for path in folders if any(file.suffix.lower() in PICTURES for file in path.iterdir())]


def numbered(folder: Path, suffixes: set[str], episode: int) -> list[Path]:
    """The files of a folder by the last number in their names, which must count up by one."""
    files = [file for file in folder.iterdir() if file.suffix.lower() in suffixes] if folder.is_dir() else []
    if not files:
        raise EpisodeError("folder is missing or empty", folder, episode)
    numbers = {}
    for file in files:
        digits = re.findall(r"\d+", file.stem)
        if not digits or int(digits[-1]) in numbers:
            raise EpisodeError("files must carry different numbers, as image_0.png, image_1.png", file, episode)
        numbers[int(digits[-1])] = file
    for number in range(min(numbers), max(numbers)):
        if number not in numbers:
            raise EpisodeError(f"number {number} is missing between {min(numbers)} and {max(numbers)}", folder, episode)
    return [numbers[number] for number in sorted(numbers)]


def find_rows(folder: Path, names: Sequence[str]) -> Path | None:
    """The file or folder that holds actions or state."""
    return next((folder / name for name in names if (folder / name).exists()), None)


def count_rows(source: Path | None, episode: int) -> int:
    """Number of rows, without reading a folder of npy files."""
    if source is not None and source.is_dir():
        return len(numbered(source, {".npy"}, episode))
    return len(read_rows(source, episode))


def read_rows(source: Path | None, episode: int) -> np.ndarray:
    """Rows of an npy file, a csv file or a folder of one npy file a row: (T, D)."""
    try:
        if source is None:
            raise EpisodeError(f"holds no {', no '.join(ACTIONS)}", None, episode)
        if source.is_dir():
            return np.stack([load_numbers(file) for file in numbered(source, {".npy"}, episode)])
        if source.suffix == ".npy":
            rows = load_numbers(source)
        else:
            lines = read_csv(source)
            rows = np.array(lines[1:] if csv_header(source) else lines, dtype=np.float64)
        if rows.ndim == 0 or 0 in rows.shape[1:]:
            raise ValueError(f"an array of shape {rows.shape} has no rows")
        return rows
    except EpisodeError:
        raise
    except (OSError, ValueError) as error:
        raise EpisodeError(f"cannot be read: {error}", source, episode) from error


def csv_header(source: Path | None) -> tuple[str, ...] | None:
    """The column names of a csv file, None without a header or for other files."""
    if source is None or source.suffix != ".csv":
        return None
    first = next(iter(read_csv(source)), [])
    try:
        [float(cell) for cell in first]
        return None
    except ValueError:
        return tuple(cell.strip() for cell in first)


def read_csv(source: Path) -> list[list[str]]:
    """The lines of a csv file that are not empty. Raises EpisodeError."""
    try:
        with source.open(newline="", encoding="utf-8-sig") as file:
            return [line for line in csv.reader(file) if line]
    except (OSError, ValueError, csv.Error) as error:
        raise EpisodeError(f"cannot be read: {error}", source) from error


def read_facts(folder: Path, episode: int) -> dict[str, Any]:
    """`episode.json`, checked; empty when absent."""
    path = folder / "episode.json"
    if not path.exists():
        return {}
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise EpisodeError(f"is not JSON: {error}", path, episode) from error
    success, fps = (facts.get(key) if isinstance(facts, dict) else ... for key in ("success", "fps"))
    if success not in (None, True, False) or not (fps is None or isinstance(fps, int | float)):
        raise EpisodeError('may hold "fps", a number, and "success", true or false', path, episode)
    return facts


def read_instruction(folder: Path, root: Path, episode: int) -> str:
    """The nearest `instruction.txt` from the episode's folder up to `root`, else a `trj_N`'s task folder's name."""
    for place in [folder, *folder.parents]:
        if (place / "instruction.txt").exists():
            try:
                text = (place / "instruction.txt").read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise EpisodeError(f"is no text: {error}", place / "instruction.txt", episode) from error
            if not text:
                raise EpisodeError("is empty", place / "instruction.txt", episode)
            return text
        if place == root:
            break
    if re.fullmatch(r"trj_\d+", folder.name):
        return instruction_from_task_name(folder.resolve().parent.name)
    raise EpisodeError("has no instruction.txt, neither here nor in a folder above", folder, episode)
