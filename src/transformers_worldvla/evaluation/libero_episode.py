"""One LIBERO episode that a model acts in, in this process and with its pictures: what `worldvla demo` shows.

The loop, the planner and the environment are those of `worldvla evaluate libero`, so the same task and trial with the
same seed ends the same there. Rates come from many episodes, and those from `closed_loop`.
"""

from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from .libero_benchmark import LiberoSpec, check_robot, libero_cameras
from .libero_env import SETTLE_STEPS
from .libero_suites import LiberoTask, step_budget
from .policies import ModelPlanner, PlanRequest
from .rollout import FramePolicy, Outcome, episode_seed, play


@dataclass(frozen=True)
class ActedEpisode:
    """How an episode ended. `frames` (H, W, 3): what the first camera saw at every query, and at the end."""

    success: bool
    steps: int
    frames: list[np.ndarray]


def act_in_libero(
    model: Any,
    processor: Any,
    task: LiberoTask,
    embodiment: str | None = None,
    trial: int = 0,
    seed: int = 0,
    max_steps: int | None = None,
    progress: bool = False,
) -> ActedEpisode:
    """Let a model act from official initial state `trial` until it succeeds or the suite's step budget is spent.

    Raises ValueError when the embodiment is none that LIBERO takes or there is no such state, and ImportError where
    LIBERO or OpenGL is missing; each says what to do.
    """
    robot = processor.get_embodiment(embodiment)
    check_robot(robot)
    cameras = libero_cameras(robot)
    planner = ModelPlanner(model, processor, {task.suite: [task.instruction]}, robot.name)
    own_seed = episode_seed(seed, task.suite, task.index, trial)
    resolution = max(256, processor.image_processor.target_size)
    budget, outcome = max_steps or step_budget(task.suite), Outcome()
    frames: list[np.ndarray] = []
    spec = LiberoSpec(task.suite, task.index, resolution, robot.rotation, SETTLE_STEPS)
    with closing(spec.open()) as environment, tqdm(total=budget, desc="steps", disable=not progress) as bar:

        def answer(shown: np.ndarray, begins: bool) -> np.ndarray:
            frames.append(shown[-1, 0])
            bar.update(len(outcome.actions) - bar.n)
            request = PlanRequest("the one", task.suite, task.instruction, shown, begins, own_seed)
            return planner.plan([request])[0]

        environment.start(trial, own_seed)
        play(environment, FramePolicy(answer, cameras, processor.history), budget, outcome)
        frames.append(environment.render(cameras[0]))
    return ActedEpisode(bool(outcome.success), len(outcome.actions), frames)
