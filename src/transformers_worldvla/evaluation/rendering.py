"""How MuJoCo draws without a display: which OpenGL it uses, who drew a picture, and whether it draws as it should.

MuJoCo and robosuite read `MUJOCO_GL` when they are imported, so `choose_gl` runs before. Nothing here knows LIBERO.

The version matters. Measured on LIBERO-Object at 256 px, mean absolute difference from the stack that LIBERO was made
with (MuJoCo 2.3.7): 0.00 with 3.3.0, 36.5 (of 255) with 3.3.7, where in LIBERO-10 objects also fall through the table.
"""

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import numpy as np

PINNED_MUJOCO = "3.3.0"
_PROBE = "import mujoco; context = mujoco.GLContext(64, 64); context.make_current(); context.free()"
_APT = {
    "egl": "apt-get install -y --no-install-recommends libegl1 libegl-mesa0 libgl1-mesa-dri",
    "osmesa": "apt-get install -y --no-install-recommends libosmesa6",
}


def choose_gl() -> str:
    """Set `MUJOCO_GL` unless it is set: `egl`, or `osmesa` where EGL cannot draw. Returns what it is.

    Only Linux has the choice. Each candidate draws once in a process of its own, because a failed attempt leaves MuJoCo
    unusable in the process that made it. Raises ImportError that names the Debian package when none works.
    """
    if not sys.platform.startswith("linux"):
        return os.environ.get("MUJOCO_GL", "")
    if chosen := os.environ.get("MUJOCO_GL"):
        return chosen
    for name in _APT:
        if _can_draw(name):
            os.environ["MUJOCO_GL"] = name
            return name
    raise ImportError(
        f"no OpenGL to draw with: `{_APT['egl']}` (or `{_APT['osmesa']}`), or set MUJOCO_GL to what works here"
    )


def _can_draw(name: str) -> bool:
    environment = {**os.environ, "MUJOCO_GL": name, "PYOPENGL_PLATFORM": name}
    done = subprocess.run([sys.executable, "-c", _PROBE], env=environment, capture_output=True, timeout=120)
    return done.returncode == 0


def renderer_name() -> str:
    """What draws in the current OpenGL context, as the driver says it."""
    from OpenGL import GL

    name, gl_version = (GL.glGetString(which).decode() for which in (GL.GL_RENDERER, GL.GL_VERSION))
    return f"{os.environ.get('MUJOCO_GL') or 'default'}: {name}, OpenGL {gl_version}"


def package_version(name: str) -> str | None:
    """The installed version of a package; None without it."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def mujoco_warning() -> str | None:
    """One line when the installed MuJoCo is another than the pinned one."""
    installed = package_version("mujoco")
    if installed in (None, PINNED_MUJOCO):
        return None
    return (
        f"MuJoCo {installed} is installed, results are made with {PINNED_MUJOCO}: others draw LIBERO's scenes in other "
        f"colours and move objects otherwise (pip install mujoco=={PINNED_MUJOCO})"
    )


def picture_difference(picture: np.ndarray, reference: np.ndarray) -> float:
    """Mean absolute difference (0 to 255) of two uint8 pictures of the same shape."""
    if picture.shape != reference.shape:
        raise ValueError(f"pictures of {picture.shape} and {reference.shape} cannot be compared")
    return float(np.abs(picture.astype(np.int16) - reference.astype(np.int16)).mean())
