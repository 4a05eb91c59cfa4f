"""LeRobot for the tests of the plugin, or one line that says how to get it.

This folder is not called `lerobot`: pytest puts the folders of tests on the path, where it would pass for LeRobot.

The newest for Python 3.11 is lerobot 0.4.4, which was written for transformers 4. One thing of it that the plugin never
touches does not start beside ours and is kept from starting: the GR00T policy, whose configuration transformers 5
refuses.
"""

import sys
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

import pytest
from packaging.version import Version

MISSING = (
    "lerobot is not installed: `bash scripts/lerobot_plugin.sh` builds an environment with it and runs these tests"
)
GROOT = "lerobot.policies.groot.groot_n1"


def require_lerobot() -> None:
    """Skip the module that calls it where there is no LeRobot; elsewhere make it ready for import."""
    try:
        installed = Version(version("lerobot"))
    except PackageNotFoundError:
        pytest.skip(MISSING, allow_module_level=True)
    if installed < Version("0.5") and GROOT not in sys.modules:
        groot = ModuleType(GROOT)
        groot.GR00TN15 = None  # type: ignore[attr-defined]
        sys.modules[GROOT] = groot
