"""`load_episodes`: one call for a local LeRobot folder, a Hub repository, LIBERO HDF5 files or a folder of pictures."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from .episodes import EpisodeDataset, select_cameras
from .folder import FolderEpisodes, episode_folders
from .lerobot import LeRobotEpisodes
from .lerobot_meta import INFO, read_info
from .libero_hdf5 import HDF5Episodes
from .storage import HubFiles, LocalFiles, first_line


def load_episodes(
    path_or_repo: str | Path,
    revision: str | None = None,
    cameras: str | Sequence[str] | None = None,
    streaming: bool = False,
) -> EpisodeDataset:
    """Open a dataset of robot episodes; nothing is decoded before an episode is asked for it.

    Args:
        path_or_repo: a folder (LeRobot v2.0, v2.1 or v3.0; LIBERO `*.hdf5`; pictures and actions, see `folder.py`), an
            HDF5 file, or a Hub dataset repository such as "lerobot/libero".
        revision: branch, tag or commit of the repository. The commit found is in `.revision`.
        cameras: names or full keys of the cameras to read, in that order; all by default. Others are not downloaded.
        streaming: with a repository, download only the metadata now and each file when an episode needs it.

    Raises:
        EpisodeError: the dataset is damaged; the line names file and episode. `scan_episodes` lists every damage.
        FileNotFoundError: there is no such folder and no such repository.
        ValueError: a camera does not exist; the line names the nearest one.
    """
    dataset = open_episodes(path_or_repo, revision, cameras, streaming)
    problems = dataset.problems()
    if problems:
        raise problems[0]
    return dataset


def open_episodes(
    path_or_repo: str | Path,
    revision: str | None = None,
    cameras: str | Sequence[str] | None = None,
    streaming: bool = False,
) -> EpisodeDataset:
    """As `load_episodes`, but problems of the dataset as a whole are left in `.problems()`."""
    path = Path(path_or_repo).expanduser()
    if path.exists():
        if revision is not None:
            raise ValueError(f"revision applies to Hub repositories; {path} is a local folder")
        return _open_local(path, cameras, str(path_or_repo))
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path_or_repo)):
        raise FileNotFoundError(f"{path_or_repo}: no such file or folder")
    return _open_repository(str(path_or_repo), revision, cameras, streaming)


def _open_local(path: Path, cameras: str | Sequence[str] | None, source: str) -> EpisodeDataset:
    if path.is_file() and path.suffix in (".hdf5", ".h5"):
        return HDF5Episodes(path, cameras, source)
    if (path / INFO).is_file():
        return LeRobotEpisodes(LocalFiles(path, source), cameras, source)
    if any(path.rglob("*.hdf5")):
        return HDF5Episodes(path, cameras, source)
    if episode_folders(path):
        return FolderEpisodes(path, cameras, source)
    raise FileNotFoundError(
        f"{path} holds no {INFO} (LeRobot), no *.hdf5 (LIBERO) and no folder with pictures and actions"
    )


def _open_repository(
    repo: str, revision: str | None, cameras: str | Sequence[str] | None, streaming: bool
) -> EpisodeDataset:
    root = download_snapshot(repo, revision, ["meta/*"])
    commit = root.name
    if streaming and (root / INFO).is_file():
        return LeRobotEpisodes(HubFiles(repo, commit, root), cameras, repo)
    if (root / INFO).is_file():
        info = read_info(LocalFiles(root, repo))
        keys = [key for key in select_cameras(cameras, info.camera_keys).values() if info.is_video(key)]
        videos = [pattern for key in keys for pattern in (f"videos/{key}/*", f"videos/*/{key}/*")]  # v3, v2
        root = download_snapshot(repo, commit, ["meta/*", "data/*", *videos])
    elif not any(download_snapshot(repo, commit, ["*.hdf5"]).rglob("*.hdf5")):
        raise FileNotFoundError(f"the dataset repository {repo} holds no {INFO} (LeRobot) and no *.hdf5 (LIBERO)")
    dataset = _open_local(root, cameras, repo)
    dataset.revision = commit
    return dataset


def download_snapshot(repo: str, revision: str | None, patterns: list[str]) -> Path:
    """The snapshot folder of a repository, whose name is the commit, with the files of some patterns."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return Path(snapshot_download(repo, repo_type="dataset", revision=revision, allow_patterns=patterns))
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f'the dataset repository {repo} has no revision "{revision}"') from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{repo}: no such folder, and no such dataset repository on the Hub{_recorded(repo)}"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise FileNotFoundError(
            f"{repo}: no such folder, and the Hub could not be asked: {first_line(error)}{_recorded(repo)}"
        ) from error


def _recorded(repo: str) -> str:
    """Where LeRobot's own tools have put a recording of this name, if they have."""
    home = os.environ.get("HF_LEROBOT_HOME") or Path.home() / ".cache" / "huggingface" / "lerobot"
    folder = Path(home) / repo
    return f"; LeRobot recorded it in {folder}, give that folder" if folder.is_dir() else ""
