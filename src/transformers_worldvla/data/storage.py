"""Where the files of a dataset are: a folder, or a Hub repository whose files are fetched when an episode needs them.

A name is a path inside the dataset, with forward slashes. Hub files are pinned to the commit that was resolved first.
"""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np

from .episodes import EpisodeError

MAX_NAME = 1000  # characters of a path


class Files(Protocol):
    """The files of one dataset."""

    @property
    def root(self) -> Path:
        """The folder on this machine."""

    def name(self, name: str) -> str:
        """How to call a file in a message to the user."""

    def path(self, name: str, episode: int | None = None) -> Path:
        """The file on this machine. EpisodeError, naming the episode that wants it, when there is none."""

    def list(self, folder: str) -> list[str]:
        """Names of all files below a folder, sorted."""


@dataclass(frozen=True)
class LocalFiles:
    """A folder, whole."""

    root: Path
    label: str | None = None  # what to call the folder in messages, for example the repository it is a copy of

    def name(self, name: str) -> str:
        return f"{self.label or self.root}/{name}"

    def path(self, name: str, episode: int | None = None) -> Path:
        check_inside(name, self.name(name), episode)
        path = self.root / name
        if not path.is_file():
            raise EpisodeError("file is missing", self.name(name), episode)
        return path

    def list(self, folder: str) -> list[str]:
        return sorted(
            path.relative_to(self.root).as_posix() for path in (self.root / folder).rglob("*") if path.is_file()
        )


@dataclass(frozen=True)
class HubFiles:
    """A dataset repository at one commit. `root` is its snapshot in the cache, where only `meta/` must be so far."""

    repo: str
    commit: str
    root: Path

    def name(self, name: str) -> str:
        return f"{self.repo}/{name}"

    def path(self, name: str, episode: int | None = None) -> Path:
        check_inside(name, self.name(name), episode)
        if (self.root / name).is_file():
            return self.root / name
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

        try:
            return Path(hf_hub_download(self.repo, name, repo_type="dataset", revision=self.commit))
        except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
            if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
                raise EpisodeError("file is missing on the Hub", self.name(name), episode) from error
            raise EpisodeError(
                f"cannot be fetched from the Hub: {first_line(error)}", self.name(name), episode
            ) from error

    def list(self, folder: str) -> list[str]:
        return LocalFiles(self.root).list(folder)


def check_inside(name: str, label: str, episode: int | None = None) -> None:
    """Raise EpisodeError for a name, read from metadata, that no file of the dataset can have."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name or len(name) > MAX_NAME:
        raise EpisodeError("leads out of the dataset, or is no name of a file", label[:MAX_NAME], episode)


def load_numbers(path: Path) -> np.ndarray:
    """The array in an npy file. OSError or ValueError when it is damaged or holds no numbers.

    It is mapped before it is copied: a header that promises more than the file holds costs no memory.
    """
    with path.open("rb") as file:
        if file.read(len(np.lib.format.MAGIC_PREFIX)) != np.lib.format.MAGIC_PREFIX:
            raise ValueError("it is no npy file")
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        if "Python objects" in str(error):
            raise ValueError("Object arrays cannot be loaded: they are pickles, which run code") from error
        raise
    except Exception as error:  # numpy reads headers with Python's own tokenizer and parser
        raise ValueError(f"its header makes no sense: {first_line(error)}") from error
    if values.dtype.kind not in "biuf":
        raise ValueError(f"it holds {values.dtype}, no numbers")
    return np.array(values)


def first_line(error: BaseException) -> str:
    """The message of an error in one line."""
    return (str(error).strip() or repr(error)).splitlines()[0]
