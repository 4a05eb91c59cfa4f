"""Any gymnasium environment as an `Environment` of the closed loop, and what Meta-World needs besides.

Each episode gets a fresh `gym.make`, so that it cannot depend on those before it. Success is `info["success"]` or
`info["is_success"]`, which robot environments report; there is no guess for one that reports neither.

Meta-World has no texts, so the instruction is made of the task's name. Its `corner*` cameras stand on their heads: turn
their pictures by 180 degrees.
"""

import hashlib
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np

from .rendering import choose_gl, package_version, renderer_name

META_WORLD = "Meta-World/MT1"
SUCCESS_KEYS = ("success", "is_success")
MAX_STEPS = 500  # of an environment that does not say how long its episodes are
_PACKAGES = ("gymnasium", "metaworld", "mujoco", "numpy")


@dataclass(frozen=True)
class GymSpec:
    """An environment and the arguments of its `gym.make`.

    Attributes:
        rotation: degrees that pictures are turned by, counter-clockwise: the embodiment's `rotation`.
        instruction: what the robot is told.
        options: further arguments of `gym.make`, as pairs.
        fast_render: draw a MuJoCo scene without shadows, reflections and anti-aliasing: some ten times faster in
            Meta-World, and other pictures. Evaluate with what the training pictures were drawn with.
    """

    env_id: str
    instruction: str
    rotation: int = 0
    options: tuple[tuple[str, Any], ...] = ()
    fast_render: bool = False

    def open(self) -> "GymBenchmark":
        return GymBenchmark(self)


class GymBenchmark:
    """Episodes of a gymnasium environment; a trial is decided by its seed alone."""

    def __init__(self, spec: GymSpec):
        self._spec = spec
        self.instruction = spec.instruction
        self.ended = False
        self._env: Any = None
        self._observation: Any = None

    def start(self, trial: int, seed: int) -> None:
        """Make the environment anew. Raises ValueError as `make` does."""
        self.close()
        self._env = make(self._spec, seed)
        self._observation, _ = self._env.reset(seed=seed)
        self.ended = False

    @property
    def still_action(self) -> np.ndarray:
        """Zeros: the action that moves nothing where actions are deltas."""
        return np.zeros(self._env.action_space.shape)

    def step(self, action: np.ndarray) -> bool:
        """Raises ValueError for an action of another dimension, and when the environment does not report success."""
        space = self._env.action_space
        if np.shape(action) != space.shape:
            raise ValueError(f"{self._spec.env_id} takes actions of shape {space.shape}, not {np.shape(action)}")
        clipped = np.clip(action, space.low, space.high).astype(space.dtype)
        self._observation, _, terminated, truncated, info = self._env.step(clipped)
        self.ended = bool(terminated or truncated)
        return succeeded(info, self._spec.env_id)

    def render(self, camera: str) -> np.ndarray:
        """The environment's picture; which camera draws it is an argument of `gym.make`."""
        picture = np.asarray(self._env.render())
        if picture.ndim != 3 or picture.dtype != np.uint8:
            raise ValueError(
                f"{self._spec.env_id} draws no (H, W, 3) uint8 picture, but {picture.dtype} {picture.shape}"
            )
        return np.ascontiguousarray(np.rot90(picture, self._spec.rotation // 90))

    def expert(self) -> Callable[[], np.ndarray]:
        """Meta-World's own scripted policy of the task. Raises ValueError for another environment."""
        name = dict(self._spec.options).get("env_name")
        if self._spec.env_id != META_WORLD or name is None:
            raise ValueError(f"{self._spec.env_id} has no scripted expert here; Meta-World's tasks have")
        from metaworld.policies import ENV_POLICY_MAP

        policy: Any = ENV_POLICY_MAP[name]()  # type: ignore[abstract]
        return lambda: np.clip(policy.get_action(self._observation), -1.0, 1.0)

    def describe(self, looks: bool) -> dict[str, Any]:
        """`versions`; when pictures are looked at also `render_hash`, of the first picture with seed 0, and for MuJoCo
        scenes `renderer`."""
        versions = {name: found for name in _PACKAGES if (found := package_version(name))}
        about: dict[str, Any] = {"versions": versions}
        if looks:
            self.start(0, 0)
            about["render_hash"] = hashlib.sha256(self.render("").tobytes()).hexdigest()[:16]
            about["renderer"] = renderer_name() if hasattr(self._env.unwrapped, "mujoco_renderer") else None
        return about

    def close(self) -> None:
        if self._env is not None:
            self._env.close()
            self._env = None


def make(spec: GymSpec, seed: int) -> Any:
    """`gym.make` with pictures. Raises ValueError for an unknown name, and for actions that are no vector."""
    gymnasium = import_gymnasium()
    options = dict(spec.options)
    if spec.env_id.startswith("Meta-World/"):
        import_meta_world()
        options["seed"] = seed
    try:
        env = gymnasium.make(spec.env_id, render_mode="rgb_array", disable_env_checker=True, **options)
    except (gymnasium.error.Error, TypeError, KeyError, ValueError) as error:
        raise ValueError(f"gym.make({spec.env_id!r}) failed: {' '.join(str(error).split())}") from error
    if not isinstance(env.action_space, gymnasium.spaces.Box) or len(env.action_space.shape) != 1:
        raise ValueError(f"{spec.env_id} takes {env.action_space}: WorldVLA's actions are vectors of numbers")
    if spec.fast_render:
        _draw_fast(env)
    return env


def succeeded(info: dict[str, Any], env_id: str) -> bool:
    """What `info` says about success. Raises ValueError when it says nothing."""
    found = [info[key] for key in SUCCESS_KEYS if key in info]
    if not found:
        raise ValueError(f"{env_id} does not report success: info has neither {' nor '.join(SUCCESS_KEYS)}")
    return bool(found[0])


def meta_world_instruction(task: str) -> str:
    """The text of a task: `button-press-topdown-v3` -> `button press topdown`."""
    return re.sub(r"-v\d+$", "", task).replace("-", " ")


def meta_world_tasks() -> tuple[str, ...]:
    """Names of Meta-World's tasks in alphabetical order: a task's number is its place here."""
    import_meta_world()
    from metaworld.policies import ENV_POLICY_MAP

    return tuple(sorted(ENV_POLICY_MAP))


def import_gymnasium() -> Any:
    """gymnasium, with OpenGL chosen where there is any. Raises ImportError when it is not installed."""
    if find_spec("gymnasium") is None:
        raise ImportError('gymnasium is not installed: pip install "transformers_worldvla[metaworld]"')
    if find_spec("mujoco") is not None:
        with suppress(ImportError):  # environments that draw without MuJoCo do not need it
            choose_gl()
    import gymnasium

    return gymnasium


def import_meta_world() -> None:
    """Register Meta-World's environments. Raises ImportError when it, or OpenGL, is not installed."""
    if find_spec("metaworld") is None:
        raise ImportError('Meta-World is not installed: pip install "transformers_worldvla[metaworld]"')
    choose_gl()
    import metaworld  # noqa: F401


def _draw_fast(env: Any) -> None:
    model: Any = getattr(env.unwrapped, "model", None)
    if not hasattr(model, "light_castshadow"):
        raise ValueError("--fast-render is for MuJoCo environments")
    model.vis.quality.offsamples = 0
    model.light_castshadow[:] = 0
    model.mat_reflectance[:] = 0
