"""One recorded episode, one HDF5 file: the unit that makes a recording resumable.

A file has LIBERO's own layout (`data/demo_0` with raw OpenGL pictures) and is written beside its place and moved there,
so that a file which exists is complete. Row t of everything was seen *before* action t, as in the authors' regenerated
data. `record_episode` runs the scripted expert; nothing here knows how many episodes are wanted.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
from disturbance import Disturbance

from transformers_worldvla.evaluation.libero_env import LiberoEnv
from transformers_worldvla.evaluation.libero_expert import LiberoExpert
from transformers_worldvla.evaluation.libero_suites import step_budget

if TYPE_CHECKING:
    from learner import Learner

HDF5_CAMERAS = {"agentview": "agentview_rgb", "robot0_eye_in_hand": "eye_in_hand_rgb"}  # LIBERO's names
PATCH = 16  # pixels: all steps of such a square are compressed together, and most of a scene stands still
CLEARANCE = 1e-4  # a placement that is nearer to an official initial state in every number counts as the same


def record_episode(
    env: LiberoEnv, seed: int, cameras: Sequence[str], disturbances: float = 0.0, learner: "Learner | None" = None
) -> dict[str, np.ndarray] | None:
    """Let the expert solve the task from a new placement of all objects.

    `disturbances` is the probability of a push at a step (`Disturbance`). A `learner` acts first; that is not recorded.

    Returns the rows of the episode, T of each, or None when the learner reached the goal or the expert did not, in the
    suite's step budget.
    Raises ValueError when the placement is one of the states that evaluation starts from.
    """
    env.reset(None, seed=seed, settle_steps=0)
    placement = env.simulator.sim.get_state().flatten()
    if np.abs(env.initial_states - placement).max(axis=1).min() < CLEARANCE:
        raise ValueError(f"seed {seed} places the objects as in an official initial state")
    env.reset(placement, seed=seed)
    if learner is not None and learner.act(env, seed):
        return None
    expert, disturbance = LiberoExpert(env), Disturbance(disturbances, seed)
    rows: list[dict[str, np.ndarray]] = []
    done = False
    while not done and len(rows) < step_budget(env.task.suite):
        row = read_row(env, cameras)
        row["actions"] = disturbance.apply(expert.act())
        done = env.step(row["actions"])
        rows.append(row)
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]} if done else None


def read_row(env: LiberoEnv, cameras: Sequence[str]) -> dict[str, np.ndarray]:
    """What LIBERO's files hold of one step, pictures in the model's orientation."""
    seen = env.simulator._get_observations()  # those of the last step; nothing is computed anew
    state = env.state
    return {
        "states": env.simulator.sim.get_state().flatten(),
        "robot_states": env.simulator.get_robot_state_vector(seen),
        "obs/ee_pos": state[:3],
        "obs/ee_ori": state[3:6],
        "obs/ee_states": state[:6],
        "obs/gripper_states": state[6:],
        "obs/joint_states": seen["robot0_joint_pos"],
        **{f"obs/{HDF5_CAMERAS[camera]}": env.render(camera) for camera in cameras},
    }


def write_episode(path: Path, env: LiberoEnv, seed: int, rows: dict[str, np.ndarray]) -> None:
    """Write the file; it appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}")
    with h5py.File(beside, "w") as file:
        data = file.create_group("data")
        data.attrs.update(task_attributes(env))
        write_demo(data.create_group("demo_0"), rows, seed)
    beside.replace(path)


def task_attributes(env: LiberoEnv) -> dict[str, Any]:
    """What LIBERO's files say about the task."""
    bddl, problem = env.task.bddl_file, env.simulator.parsed_problem
    arguments = {"problem_name": problem["problem_name"], "bddl_file": f"{env.task.suite}/{bddl.name}"}
    kwargs = {"robots": ["Panda"], "control_freq": env.simulator.control_freq, "camera_heights": env.resolution}
    sentence = " ".join(problem["language_instruction"])
    return {
        "env_args": json.dumps({"type": 1, **arguments, "env_kwargs": {**kwargs, "camera_widths": env.resolution}}),
        "problem_info": json.dumps({"problem_name": problem["problem_name"], "language_instruction": sentence}),
        "bddl_file_name": f"{env.task.suite}/{bddl.name}",
        "bddl_file_content": bddl.read_text(encoding="utf-8"),
        "macros_image_convention": "opengl",
        "instruction": env.instruction,
        "recorded_by": "transformers_worldvla scripted expert",
    }


def write_demo(demo: h5py.Group, rows: dict[str, np.ndarray], seed: int) -> None:
    """The rows of an episode as LIBERO stores them: success in the last one, pictures as OpenGL draws them."""
    length = len(rows["actions"])
    last = np.zeros(length, np.uint8)
    last[-1] = 1
    for key, values in {**rows, "rewards": last, "dones": last}.items():
        if values.ndim == 4:
            raw = values[:, ::-1, ::-1]  # the reader turns pictures by 180 degrees
            demo.create_dataset(key, data=raw, compression="gzip", chunks=(length, PATCH, PATCH, 3))
        else:
            demo.create_dataset(key, data=values, compression="gzip")
    demo.attrs["num_samples"], demo.attrs["seed"] = length, seed
    demo.attrs["init_state"] = rows["states"][0]
