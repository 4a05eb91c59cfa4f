"""Turns recorded episode files into the two forms that others read: LIBERO's HDF5 files and a LeRobot v3.0 dataset.

Both are made in a folder beside their place and replace an earlier export at the end. Episodes are ordered by suite,
task and number, so the same files give the same dataset however they were recorded.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

import h5py
from tqdm import tqdm

from transformers_worldvla.data import load_episodes
from transformers_worldvla.data.lerobot_writer import LeRobotWriter

LEROBOT_CAMERAS = {"agentview_rgb": "image", "eye_in_hand_rgb": "wrist_image"}  # as in the public copies of LIBERO
STATE_NAMES = ("x", "y", "z", "rx", "ry", "rz", "gripper_0", "gripper_1")
ACTION_NAMES = ("x", "y", "z", "rx", "ry", "rz", "gripper")


def export_hdf5(tasks: Sequence[Sequence[Path]], folder: Path) -> None:
    """One `<suite>/<task>_demo.hdf5` a task, with `demo_0`, `demo_1`, ... copied from its episode files."""
    staging = folder.with_name(f".{folder.name}")
    shutil.rmtree(staging, ignore_errors=True)
    for files in tqdm(tasks, desc="HDF5", unit="task"):
        suite, task = files[0].parts[-3:-1]
        (staging / suite).mkdir(parents=True, exist_ok=True)
        with h5py.File(staging / suite / f"{task}_demo.hdf5", "w") as target:
            data, total = target.create_group("data"), 0
            for number, file in enumerate(files):
                with h5py.File(file) as source:
                    if number == 0:
                        data.attrs.update(source["data"].attrs)
                    source.copy("data/demo_0", data, name=f"demo_{number}")
                    total += int(source["data/demo_0"].attrs["num_samples"])
            data.attrs["num_demos"], data.attrs["total"] = len(files), total
    shutil.rmtree(folder, ignore_errors=True)
    staging.rename(folder)


def export_lerobot(tasks: Sequence[Sequence[Path]], folder: Path) -> None:
    """All episodes as one LeRobot v3.0 dataset, pictures turned by 180 degrees as in the public copies."""
    files = [file for group in tasks for file in group]
    with h5py.File(files[0]) as first:
        fps, cameras = 20, [key for key in LEROBOT_CAMERAS if key in first["data/demo_0/obs"]]
    staging = folder.with_name(f".{folder.name}-new")
    shutil.rmtree(staging, ignore_errors=True)
    names = [LEROBOT_CAMERAS[key] for key in cameras]
    with LeRobotWriter(staging, fps, names, ACTION_NAMES, STATE_NAMES, robot_type="panda") as writer:
        for file in tqdm(files, desc="LeRobot", unit="episode"):
            episode = load_episodes(file)[0]  # turns the pictures
            with h5py.File(file) as source:
                instruction = str(source["data"].attrs["instruction"])
            frames = {LEROBOT_CAMERAS[key]: episode.frames(key) for key in cameras}
            writer.add_episode(instruction, episode.actions, frames, state=episode.state)
    shutil.rmtree(folder, ignore_errors=True)
    staging.rename(folder)
