"""Build hook: put the default checkpoint and its episode into the wheel, so that `worldvla demo` needs no network.

They live in `hub/` of the repository, because they are Hub repositories too; an editable install reads them there (see
`transformers_worldvla/assets.py`). A folder that is not there yet is left out.
"""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

BUNDLED = ("worldvla-libero-tiny", "libero-episode")


class BundleAssets(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            return
        for name in BUNDLED:
            folder = Path(self.root) / "hub" / name
            if folder.is_dir():
                build_data["force_include"][str(folder)] = f"transformers_worldvla/hub/{name}"
