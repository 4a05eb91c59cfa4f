"""Files that survive a kill: written whole or not at all, or a line at a time."""

import json
import os
from pathlib import Path
from typing import Any


def append_line(path: Path, line: str) -> None:
    """Add a line to a file, on disk when this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def write_whole(path: Path, text: str) -> None:
    """Write a file all at once: a reader sees the old or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_json(path: Path, document: Any) -> None:
    """A document as indented JSON, all at once."""
    write_whole(path, json.dumps(document, indent=2) + "\n")
