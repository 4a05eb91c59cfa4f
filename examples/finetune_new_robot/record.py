"""Stage 1: demonstrations of Meta-World's scripted experts, written as a LeRobot v3.0 dataset.

    python record.py --output data/meta_world [--tasks window-open-v3 drawer-close-v3] [--episodes 40]

A new robot needs exactly this: pictures as the model is to see them, the actions that were done, and a text. Here it is
Meta-World's Sawyer arm with 4 action dimensions, which move the hand and close the gripper. Only successes are kept.
"""

import argparse
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tqdm import tqdm

from transformers_worldvla.data.lerobot_writer import LeRobotWriter
from transformers_worldvla.evaluation.gym_env import META_WORLD, GymBenchmark, GymSpec, meta_world_instruction

TASKS = ("button-press-topdown-v3", "door-close-v3", "drawer-close-v3")
# What `worldvla evaluate gym --env Meta-World/MT1 --fast-render` draws: a policy must see what it was trained on.
CAMERA, SIDE, ROTATION = "corner2", 256, 180  # this camera stands on its head
FPS = 80  # of Meta-World's control
MAX_STEPS = 150  # its experts need 40 to 90
STEPS_AFTER_SUCCESS = 10  # so that a whole chunk of actions still follows the last steps before it
LONGEST_LEAD, LONGEST_PUSH = 40, 15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="a new folder")
    parser.add_argument("--tasks", nargs="+", default=TASKS, metavar="TASK", help="names of Meta-World (%(default)s)")
    parser.add_argument("--episodes", type=int, default=40, help="a task (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of where things stand (%(default)s)")
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count(), help="simulators beside each other (all cores)"
    )
    args = parser.parse_args()
    tasks = [task for task in args.tasks for _ in range(args.episodes)]
    seeds = [[args.seed, number] for number in range(len(tasks))]
    names = ("x", "y", "z", "gripper")
    with (
        LeRobotWriter(args.output, FPS, ["image"], action_names=names, robot_type="sawyer") as writer,
        ProcessPoolExecutor(args.processes, mp_context=get_context("spawn")) as pool,
    ):
        recorded = tqdm(pool.map(record_success, tasks, seeds), total=len(tasks), unit="episode")
        for task, (frames, actions) in zip(tasks, recorded, strict=True):
            writer.add_episode(meta_world_instruction(task), actions, {"image": frames})


def record_success(task: str, seed: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Frames (T, H, W, 3) and actions (T, 4) of the first attempt that reaches the goal."""
    options = {"env_name": task, "camera_name": CAMERA, "width": SIDE, "height": SIDE}
    instruction = meta_world_instruction(task)
    env = GymSpec(META_WORLD, instruction, ROTATION, tuple(options.items()), fast_render=True).open()
    for attempt in range(10):
        rng = np.random.default_rng([*seed, attempt])
        env.start(trial=0, seed=int(rng.integers(2**31)))
        begin_elsewhere(env, rng)
        if recorded := record_episode(env):
            env.close()
            return recorded
    raise RuntimeError(f"the expert of {task} failed ten times in a row")


def begin_elsewhere(env: GymBenchmark, rng: np.random.Generator) -> None:
    """Unrecorded steps: in every other episode some way with the expert, then up to 15 cm in any direction.

    Whoever has only seen the expert's own path does not know the way back to it.
    """
    expert, lead = env.expert(), rng.integers(2) * rng.integers(LONGEST_LEAD + 1)
    for _ in range(lead):
        env.step(expert())
    direction = rng.uniform(-1, 1, 3)
    for _ in range(rng.integers(LONGEST_PUSH + 1)):
        env.step(np.append(direction, 0.0))


def record_episode(env: GymBenchmark) -> tuple[np.ndarray, np.ndarray] | None:
    """What the expert sees and does; None when it does not reach the goal."""
    expert, frames, actions, left = env.expert(), [], [], None
    while left != 0 and len(actions) < MAX_STEPS:
        frames.append(env.render(CAMERA))
        actions.append(expert())
        success = env.step(actions[-1])
        if left is not None:
            left -= 1
        elif success:
            left = STEPS_AFTER_SUCCESS
    return None if left is None else (np.stack(frames), np.stack(actions))


if __name__ == "__main__":
    main()
