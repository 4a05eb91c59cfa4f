"""Bring the remote code in `hub/worldvla-libero-tiny` up to date with `src/`.

    python scripts/sync_checkpoint_code.py

A checkpoint carries its code. The bundled one is kept in the repository, so its copy follows the source (a test
compares).
"""

import shutil
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCE = REPOSITORY / "src" / "transformers_worldvla"
CHECKPOINT = REPOSITORY / "hub" / "worldvla-libero-tiny"


def main() -> None:
    for stale in CHECKPOINT.glob("*.py"):
        if not (SOURCE / stale.name).exists():
            stale.unlink()
    for source in sorted(SOURCE.glob("*_worldvla.py")):
        shutil.copyfile(source, CHECKPOINT / source.name)
        print(CHECKPOINT / source.name)


if __name__ == "__main__":
    main()
