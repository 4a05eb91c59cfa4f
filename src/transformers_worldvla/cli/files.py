"""Files that commands read from the user and write for the user: pictures, action plans, outputs.

What is read is checked here and named in every error. What is written appears whole or not at all: it is made beside
its place and moved there at the end.
"""

import csv
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from .errors import UserError

PLAN_SUFFIXES = (".json", ".csv", ".npy")


# -------------------------------------------------------------------- reading


def read_picture(path: str | Path) -> Image.Image:
    """A picture file, upright as its EXIF data says. Raises UserError that names the file."""
    from ..image_processing_worldvla import to_pil

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                upright = ImageOps.exif_transpose(picture)
        return to_pil(upright)
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except Image.UnidentifiedImageError as error:
        raise UserError(f"{path} is not a picture that can be read (PNG, JPEG, WebP, ...)") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"{path}: {error}") from error


def read_plan(path: str | Path, action_names: Sequence[str], action_dim: int) -> np.ndarray:
    """Actions (T, D) float64 from an npy, csv or json file, in the order of the embodiment's dimensions.

    A csv may have a header; where it names every action of the embodiment, columns are taken by name and others left
    out. json is a list of actions, or an object with such a list under "actions", as `worldvla predict` writes it.
    Raises UserError that names the file when the shape is another or a number is not finite.
    """
    path = Path(path)
    readers = {".npy": _read_npy, ".csv": lambda file: _read_csv(file, action_names), ".json": _read_json}
    if path.suffix.lower() not in readers:
        raise UserError(f"{path}: actions are read from {', '.join(PLAN_SUFFIXES)} files")
    try:
        plan = readers[path.suffix.lower()](path)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, TypeError, OverflowError, RecursionError, csv.Error) as error:
        raise UserError(f"{path} holds no table of numbers: {error}") from error
    if plan.ndim != 2 or len(plan) == 0 or plan.shape[1] != action_dim:
        names = f" ({', '.join(action_names)})" if action_names else ""
        raise UserError(
            f"{path} holds actions of shape {plan.shape}, not (T, {action_dim}) with T >= 1 and D = {action_dim}{names}"
        )
    if not np.isfinite(plan).all():
        row, column = np.argwhere(~np.isfinite(plan))[0].tolist()
        raise UserError(f"{path}: action {row} is {plan[row, column]} in dimension {column}")
    return plan


def _read_npy(path: Path) -> np.ndarray:
    from ..data.storage import load_numbers

    return load_numbers(path).astype(np.float64)


def _read_json(path: Path) -> np.ndarray:
    document = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(document, dict):
        if "actions" not in document:
            raise ValueError('an object has the actions under the key "actions"')
        document = document["actions"]
    values = np.asarray(document)
    if values.dtype.kind not in "iuf":
        raise ValueError("give a list of actions, each a list of numbers")
    return values.astype(np.float64)


def _read_csv(path: Path, action_names: Sequence[str]) -> np.ndarray:
    with path.open(newline="", encoding="utf-8-sig") as file:
        lines = [[cell.strip() for cell in line] for line in csv.reader(file) if line]
    if lines and not _is_number(lines[0][0]):
        header = lines.pop(0)
        if action_names and set(action_names) <= set(header):
            columns = [header.index(name) for name in action_names]
            lines = [[line[column] for column in columns if column < len(line)] for line in lines]
    return np.array(lines, dtype=np.float64)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


# -------------------------------------------------------------------- writing


def check_output_file(path: Path, suffixes: Sequence[str]) -> None:
    """Raise UserError when no such file could be written; nothing is made yet."""
    if path.suffix.lower() not in suffixes:
        raise UserError(f"--output {path}: the file's name ends in {', '.join(suffixes)}")
    if path.is_dir():
        raise UserError(f"--output {path} is a folder, not a file")
    _check_parent(path)


def check_output_folder(path: Path) -> None:
    """Raise UserError when the folder is none and cannot be made; nothing is made yet."""
    if path.exists() and not path.is_dir():
        raise UserError(f"--output {path} is a file, not a folder")
    _check_parent(path / "file")


def _check_parent(path: Path) -> None:
    nearest = next(parent for parent in path.absolute().parents if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"--output: {nearest} is no folder that can be written to")


@contextmanager
def new_files(folder: Path) -> Iterator[Path]:
    """An empty folder whose files move into `folder` when the block ends well, in place of those of the same names.

    When it does not, nothing is left of it and `folder` is as it was.
    """
    existed = folder.is_dir()
    folder.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".worldvla-", dir=folder))
    try:
        yield staging
        for file in sorted(staging.iterdir()):
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(staging)
        if not existed and not any(folder.iterdir()):
            folder.rmdir()


def write_plan(path: Path, document: dict[str, Any]) -> None:
    """Write a prediction: all of it as json; its `actions` (K, D) alone as npy, or as csv under their names."""
    from .main import to_json

    actions = np.asarray(document["actions"], dtype=np.float64)
    with new_files(path.absolute().parent) as folder:
        file = folder / path.name
        if path.suffix.lower() == ".npy":
            with file.open("wb") as stream:
                np.save(stream, actions)
        elif path.suffix.lower() == ".csv":
            with file.open("w", newline="", encoding="utf-8") as stream:
                writer = csv.writer(stream)
                writer.writerow(document["action_names"])
                writer.writerows(actions.tolist())
        else:
            file.write_text(json.dumps(to_json(document), indent=2, allow_nan=False) + "\n", encoding="utf-8")
