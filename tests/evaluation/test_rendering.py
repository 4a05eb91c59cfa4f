"""Which OpenGL is chosen, and what is said when there is none."""

import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from transformers_worldvla.evaluation import rendering

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux has the choice")

_CHOOSE = """
import json, os
from transformers_worldvla.evaluation.rendering import choose_gl
try:
    print(json.dumps([choose_gl(), os.environ["MUJOCO_GL"]]))
except ImportError as error:
    print(json.dumps(str(error)))
"""


def test_what_is_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    assert rendering.choose_gl() == "glfw"
    assert os.environ["MUJOCO_GL"] == "glfw"


def test_without_egl_it_is_osmesa_or_a_line_with_the_package(fresh_process: Callable[..., Any]) -> None:
    pytest.importorskip("mujoco", reason='MuJoCo is not installed (extra "libero")')
    answer = fresh_process(_CHOOSE, package=True, MUJOCO_GL="", __EGL_VENDOR_LIBRARY_FILENAMES="/nowhere.json")
    assert answer == ["osmesa", "osmesa"] or (
        "apt-get install -y --no-install-recommends libegl1 libegl-mesa0 libgl1-mesa-dri" in answer
        and "libosmesa6" in answer
        and "\n" not in answer
    )


def test_another_mujoco_is_warned_about(monkeypatch: pytest.MonkeyPatch) -> None:
    for version, warns in (("3.3.0", False), ("3.3.7", True), (None, False)):
        monkeypatch.setattr(rendering, "package_version", lambda name, version=version: version)
        line = rendering.mujoco_warning()
        assert (line is not None and "pip install mujoco==3.3.0" in line) == warns


def test_difference_of_pictures() -> None:
    black = np.zeros((4, 4, 3), np.uint8)
    assert rendering.picture_difference(black, black + 200) == 200.0, "uint8 must not wrap around"
    assert rendering.picture_difference(black + 200, black) == 200.0
    with pytest.raises(ValueError):
        rendering.picture_difference(black, black[:2])
