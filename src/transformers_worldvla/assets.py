"""Finds what ships with the package: the default checkpoint and a real episode it has not seen.

A wheel holds them inside the package; an editable install reads them from the repository's `hub/`, where they are kept.
The working directory is never looked at.
"""

from pathlib import Path

DEFAULT_CHECKPOINT = "worldvla-libero-tiny"
DEFAULT_EPISODE = "libero-episode"


def bundled_folder(name: str) -> Path:
    """Folder of a bundled asset (`DEFAULT_CHECKPOINT`, `DEFAULT_EPISODE`).

    Raises FileNotFoundError when this installation holds none.
    """
    package = Path(__file__).resolve().parent
    candidates = [package / "hub" / name]
    if package.parent.name == "src":  # an editable install: <repository>/src/transformers_worldvla
        candidates.append(package.parents[1] / "hub" / name)
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise FileNotFoundError(
        f"this installation of transformers_worldvla has no {name}: looked in {' and '.join(map(str, candidates))}; "
        "reinstall the package, or name a checkpoint or episode of your own"
    )
