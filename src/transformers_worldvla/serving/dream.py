"""`WorldVLA/Dream-v0`: the world model as a gymnasium environment, for policies and learners that want to step it.

Observations are camera pictures, actions are in robot units; nothing but the checkpoint is simulated. `DreamVectorEnv`
steps many dreams with one call of the model. How a frame comes about is in `dream_world`. Importing this module
registers the environment, and so does `gymnasium.make("transformers_worldvla.serving.dream:WorldVLA/Dream-v0")`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .dream_world import Dream, DreamWorld

try:
    import gymnasium
except ModuleNotFoundError:
    raise ImportError('the dream environment needs gymnasium: pip install "transformers_worldvla[dream]"') from None

from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

ENV_ID = "WorldVLA/Dream-v0"
DEFAULT_FPS = 10.0
Reward = Callable[[np.ndarray, np.ndarray, np.ndarray], float]


class DreamTask:
    """What single and vectorised dreams share: where they start, what they are worth, when they end.

    Args:
        world: a `DreamWorld`, or the folder or Hub id of a checkpoint; the bundled one by default.
        start: where episodes start: a picture, pictures by camera name, an `Episode`, or a sequence of these
            (`load_episodes(...)` is one), of which each episode draws one at random. The bundled episode by default.
        horizon: steps after which an episode is truncated.
        reward: called with the pictures before (C, H, W, 3) uint8, the action (D,) and the pictures after; 0 without.
        is_success: called with the pictures after; True ends the episode, and `info["is_success"]` says so.

    Raises ValueError for an empty list of starts, a horizon below 1, and pictures that do not fit the checkpoint.
    """

    def __init__(
        self,
        world: DreamWorld | str | Path | None = None,
        start: Any = None,
        horizon: int = 50,
        reward: Reward | None = None,
        is_success: Callable[[np.ndarray], bool] | None = None,
    ):
        if horizon < 1:
            raise ValueError(f"horizon is at least 1, not {horizon}")
        self.world = world if isinstance(world, DreamWorld) else DreamWorld.from_pretrained(world)
        start = _bundled_episodes() if start is None else start
        self.starts: Sequence[Any] = start if isinstance(start, Sequence) and not isinstance(start, str) else [start]
        if not len(self.starts):
            raise ValueError("start is empty: give at least one picture or episode")
        self.horizon, self.reward, self.is_success = horizon, reward, is_success
        self.shape = self.world.begin(self.starts[0]).pictures.shape  # (C, H, W, 3)
        robot = self.world.robot
        picture = gymnasium.spaces.Box(0, 255, self.shape[1:], np.uint8)
        self.observation_space: Any = gymnasium.spaces.Dict({name: picture for name in robot.cameras})
        low, high = (np.array(values, np.float32) for values in (robot.low, robot.high))
        self.action_space = gymnasium.spaces.Box(low, high, dtype=np.float32)
        self.fps = robot.control_hz or DEFAULT_FPS

    def begin(self, rng: np.random.Generator, options: dict[str, Any] | None) -> Dream:
        """A dream from `options["start"]`, or from one of the starts."""
        chosen = (options or {}).get("start")
        if chosen is None:
            chosen = self.starts[int(rng.integers(len(self.starts)))]
        dream = self.world.begin(chosen)
        if dream.pictures.shape != self.shape:
            raise ValueError(
                f"starts have pictures of one size: {self.shape} at first, {dream.pictures.shape} now (C, H, W, 3)"
            )
        return dream

    def generator(self, rng: np.random.Generator) -> torch.Generator | None:
        """What frames are drawn from, where they are drawn."""
        if not self.world.samples:
            return None
        return torch.Generator(self.world.model.device).manual_seed(int(rng.integers(2**63)))

    def judge(self, before: Dream, action: np.ndarray, after: Dream) -> tuple[float, bool, bool, dict[str, Any]]:
        """Reward, terminated, truncated and info of a step."""
        reward = 0.0 if self.reward is None else float(self.reward(before.pictures, action, after.pictures))
        info = self.info(after)
        terminated = False
        if self.is_success is not None:
            terminated = info["is_success"] = bool(self.is_success(after.pictures))
        return reward, terminated, after.steps >= self.horizon, info

    @staticmethod
    def info(dream: Dream) -> dict[str, Any]:
        return {"step": dream.steps, "instruction": dream.instruction or ""}

    def observation(self, dream: Dream) -> dict[str, np.ndarray]:
        return {name: picture.copy() for name, picture in zip(self.world.robot.cameras, dream.pictures, strict=True)}


class DreamEnv(gymnasium.Env[dict[str, np.ndarray], np.ndarray]):
    """One dream. The arguments are those of `DreamTask`.

    An observation maps every camera to its picture (H, W, 3) uint8, so that with `"prompt"` added it is one of
    `WorldVLAPolicy`. `reset(options={"start": ...})` starts somewhere else for once. `info` holds `step` and
    `instruction`.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": DEFAULT_FPS}

    def __init__(self, world: DreamWorld | str | Path | None = None, *, render_mode: str | None = None, **options: Any):
        _check_render_mode(render_mode)
        self.task = DreamTask(world, **options)
        self.render_mode = render_mode
        self.metadata = {**self.metadata, "render_fps": self.task.fps}
        self.observation_space = self.task.observation_space
        self.action_space = self.task.action_space
        self._dream: Dream | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        super().reset(seed=seed)
        self._dream = self.task.begin(self.np_random, options)
        self._generator = self.task.generator(self.np_random)
        return self.task.observation(self._dream), self.task.info(self._dream)

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        before = self._now()
        self._dream = self.task.world.step([before], np.asarray(action)[None], self._generator)[0]
        return self.task.observation(self._dream), *self.task.judge(before, action, self._dream)

    def render(self) -> np.ndarray | None:
        """The pictures of all cameras beside each other, (H, C W, 3) uint8; None without a render mode."""
        return None if self.render_mode is None else np.concatenate(list(self._now().pictures), axis=1)

    def _now(self) -> Dream:
        if self._dream is None:
            raise ValueError("call reset() first")
        return self._dream


class DreamVectorEnv(gymnasium.vector.VectorEnv[dict[str, np.ndarray], np.ndarray, np.ndarray]):
    """`num_envs` dreams that take one call of the model a step. The other arguments are those of `DreamTask`.

    It does what `SyncVectorEnv` of as many `DreamEnv` does: seeds are `seed`, `seed + 1` ..., and a dream that has
    ended starts again at the next step, whose action it ignores. Frames drawn at random differ, as all dreams draw from
    one generator; of the others a colour may differ by 1 of 255, as a batch adds up in another order.
    """

    metadata: dict[str, Any] = {**DreamEnv.metadata, "autoreset_mode": AutoresetMode.NEXT_STEP}

    def __init__(
        self,
        num_envs: int = 1,
        world: DreamWorld | str | Path | None = None,
        *,
        render_mode: str | None = None,
        **options: Any,
    ):
        _check_render_mode(render_mode)
        if num_envs < 1:
            raise ValueError(f"num_envs is at least 1, not {num_envs}")
        self.task = DreamTask(world, **options)
        self.num_envs, self.render_mode = num_envs, render_mode
        self.metadata = {**self.metadata, "render_fps": self.task.fps}
        self.single_observation_space = self.task.observation_space
        self.single_action_space = self.task.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._rngs = [seeding.np_random()[0] for _ in range(num_envs)]
        self._dreams: list[Dream] = []
        self._ended = np.zeros(num_envs, np.bool_)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        seeds = [seed + row for row in range(self.num_envs)] if isinstance(seed, int) else seed
        if seeds is not None and len(seeds) != self.num_envs:
            raise ValueError(f"{len(seeds)} seeds for {self.num_envs} dreams")
        for row, own in enumerate(seeds or []):
            if own is not None:
                self._rngs[row] = seeding.np_random(own)[0]
        self._dreams = [self.task.begin(rng, options) for rng in self._rngs]
        self._generator = self.task.generator(self._rngs[0])
        self._ended[:] = False
        infos: dict[str, Any] = {}
        for row, dream in enumerate(self._dreams):
            infos = self._add_info(infos, self.task.info(dream), row)
        return self._observations(), infos

    def step(
        self, actions: np.ndarray
    ) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        if not self._dreams:
            raise ValueError("call reset() first")
        actions = np.asarray(actions)
        if actions.shape != self.action_space.shape:
            raise ValueError(f"actions have shape {self.action_space.shape}, not {actions.shape}")
        running = np.flatnonzero(~self._ended).tolist()
        stepped = iter(
            self.task.world.step([self._dreams[row] for row in running], actions[running], self._generator)
            if running
            else []
        )
        rewards = np.zeros(self.num_envs)
        terminated, truncated = np.zeros(self.num_envs, np.bool_), np.zeros(self.num_envs, np.bool_)
        infos: dict[str, Any] = {}
        for row, before in enumerate(self._dreams):
            if row in running:
                after = next(stepped)
                rewards[row], terminated[row], truncated[row], info = self.task.judge(before, actions[row], after)
            else:
                after = self.task.begin(self._rngs[row], None)
                info = self.task.info(after)
            self._dreams[row] = after
            infos = self._add_info(infos, info, row)
        self._ended = terminated | truncated
        return self._observations(), rewards, terminated, truncated, infos

    def render(self) -> tuple[np.ndarray, ...] | None:
        """A picture of each dream as `DreamEnv.render` draws it; None without a render mode."""
        if self.render_mode is None:
            return None
        return tuple(np.concatenate(list(dream.pictures), axis=1) for dream in self._dreams)

    def _observations(self) -> dict[str, np.ndarray]:
        pictures = np.stack([dream.pictures for dream in self._dreams], axis=1)  # (C, B, H, W, 3)
        return dict(zip(self.task.world.robot.cameras, pictures, strict=True))


def _check_render_mode(render_mode: str | None) -> None:
    if render_mode not in (None, *DreamEnv.metadata["render_modes"]):
        raise ValueError(f"render_mode is rgb_array or None, not {render_mode!r}")


def _bundled_episodes() -> Any:
    from ..assets import DEFAULT_EPISODE, bundled_folder
    from ..data import load_episodes

    return load_episodes(bundled_folder(DEFAULT_EPISODE))


gymnasium.register(
    ENV_ID,
    entry_point=f"{__name__}:DreamEnv",
    vector_entry_point=f"{__name__}:DreamVectorEnv",
)
