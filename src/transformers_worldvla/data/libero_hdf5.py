"""Reads LIBERO's HDF5 demonstrations, one file a task: `data/demo_N` with `actions` and `obs/*_rgb`.

This reader owns raw frames, so it turns them by 180 degrees, exactly once; everything after it has the model's
orientation. LIBERO's own files store the observation *after* each action, regenerated ones (the authors', OpenVLA's)
the one before it. The simulator states in the file tell which, and the former lose their first action and last
observation, so that row t is always what was seen before action t.

The instruction is the task's name, as LIBERO's `task.language` and RLDS have it: the file name's words after the scene.
The BDDL sentence, which differs in half of LIBERO-Goal, is `bddl_language`.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .episodes import Episode, EpisodeDataset, EpisodeError, finite_rows, import_extra, select_cameras
from .storage import first_line

CONTROL_FREQUENCY = 20.0  # of every LIBERO task; used when `env_args` is absent
STATE_PARTS = ("ee_states", "gripper_states")  # position, axis-angle, gripper: the 8 numbers of the LeRobot copies
JOINTS_IN_SIMULATOR_STATE = slice(
    1, 8
)  # a row of `states` is time, positions (the arm's seven joints first), velocities
MAX_STEPS, MAX_SIDE = 10**6, 8192  # steps of a demonstration, pixels: a file of kilobytes may promise any shape
READ_ERRORS = (
    OSError,
    KeyError,
    RuntimeError,
    TypeError,
    ValueError,
    AttributeError,
)  # what h5py raises for damaged or foreign files


def instruction_from_task_name(name: str) -> str:
    """`KITCHEN_SCENE3_turn_on_the_stove` -> `turn on the stove`, as LIBERO's `grab_language_from_filename`."""
    words = name.split("_")
    scene = next((position for position, word in enumerate(words) if word.startswith("SCENE")), -1)
    return " ".join(words[scene + 1 :])


@dataclass(frozen=True)
class Demo:
    """One demonstration: where it lies and what its file says about it."""

    file: Path
    name: str  # "demo_3"
    length: int  # steps given out, one less than stored when observations follow actions
    task_name: str
    instruction: str
    bddl_language: str | None
    fps: float
    camera_keys: tuple[str, ...]
    has_state: bool
    has_rewards: bool
    observations_follow_actions: bool


class HDF5Episodes(EpisodeDataset):
    """The demonstrations of one HDF5 file, or of all `*.hdf5` below a folder, tasks by name, demos by number."""

    format = "LIBERO HDF5"

    def __init__(self, path: Path, cameras: str | Sequence[str] | None = None, source: str | None = None):
        self.source = source or str(path)
        self.files = [path] if path.is_file() else sorted(path.rglob("*.hdf5"))
        self.demos: list[Demo] = []
        self._problems: list[EpisodeError] = []
        for file in self.files:
            self._list_demos(file)
        if not self.demos:
            raise self._problems[0] if self._problems else EpisodeError("holds no demonstration", path)
        first = self.demos[0]
        self.fps = first.fps
        self.camera_keys = select_cameras(cameras, first.camera_keys)
        self.cameras = tuple(self.camera_keys)
        for position, demo in enumerate(self.demos):
            missing = [key for key in self.camera_keys.values() if key not in demo.camera_keys]
            if missing:
                self._problems.append(EpisodeError(f"{demo.name} lacks camera {missing[0]}", demo.file, position))

    def _list_demos(self, file: Path) -> None:
        """Add the demos of a file; what cannot be listed becomes a problem of the dataset."""
        h5py = import_extra("h5py")
        try:
            with h5py.File(file) as content:
                data = content["data"]
                names = sorted((name for name in data if re.fullmatch(r"demo_\d+", name)), key=lambda n: int(n[5:]))
                declared = data.attrs.get("num_demos")
                if declared is not None and int(declared) != len(names):
                    self._problems.append(EpisodeError(f"says {declared} demos, holds {len(names)}", file))
                for name in names:
                    try:
                        self.demos.append(describe_demo(file, data, name))
                    except READ_ERRORS as error:
                        reason = f"{name} cannot be read: {first_line(error)}"
                        self._problems.append(EpisodeError(reason, file, len(self.demos)))
        except READ_ERRORS as error:
            self._problems.append(EpisodeError(f"is not a LIBERO file: {first_line(error)}", file))

    @property
    def lengths(self) -> list[int]:
        return [demo.length for demo in self.demos]

    def _episode(self, position: int) -> Episode:
        return HDF5Episode(self, position)

    def problems(self) -> list[EpisodeError]:
        return list(self._problems)

    def _local_files(self) -> list[Path]:
        return self.files


class HDF5Episode(Episode):
    """A demonstration of a LIBERO HDF5 file; `demo` describes it."""

    def __init__(self, dataset: HDF5Episodes, position: int):
        self.demo = dataset.demos[position]
        super().__init__(position, self.demo.length, self.demo.instruction, self.demo.fps, dataset.camera_keys)

    @property
    def bddl_language(self) -> str | None:
        """The sentence of the task's BDDL file, None when the file has none."""
        return self.demo.bddl_language

    @property
    def actions(self) -> np.ndarray:
        skipped = int(self.demo.observations_follow_actions)  # no observation precedes the first action then
        return finite_rows(self._read("actions", skipped, skipped + len(self)), "action", self._file, self.index)

    @property
    def state(self) -> np.ndarray | None:
        if not self.demo.has_state:
            return None
        parts = [self._read(f"obs/{part}", 0, len(self)) for part in STATE_PARTS]
        return finite_rows(np.concatenate(parts, axis=1), "state", self._file, self.index)

    @property
    def success(self) -> bool | None:
        return bool(self._read("rewards", 0, None).any()) if self.demo.has_rewards else None

    @property
    def _file(self) -> str:
        return str(self.demo.file)

    def _read_frames(self, key: str, start: int, stop: int) -> np.ndarray:
        upside_down = self._read(f"obs/{key}", start, stop)
        return np.ascontiguousarray(upside_down[:, ::-1, ::-1])  # 180 degrees

    def _read(self, name: str, start: int, stop: int | None) -> np.ndarray:
        """Rows of a dataset of this demo."""
        h5py = import_extra("h5py")
        try:
            with h5py.File(self.demo.file) as content:
                return content["data"][self.demo.name][name][start:stop]
        except READ_ERRORS as error:
            raise EpisodeError(f"{self.demo.name}/{name}: {first_line(error)}", self._file, self.index) from error


def describe_demo(file: Path, data: Any, name: str) -> Demo:
    """Read everything about a demonstration but its rows. ValueError when its parts differ in length."""
    demo, observations = data[name], data[name]["obs"]
    cameras = [key for key, value in observations.items() if is_pictures(value)]
    stored, has_state = len(demo["actions"]), all(part in observations for part in STATE_PARTS)
    if stored > MAX_STEPS or len(demo["actions"].shape) > 1 and demo["actions"].shape[1] > MAX_STEPS:
        raise ValueError(f"actions of shape {demo['actions'].shape} are no steps of a robot")
    if large := [key for key in cameras if max(observations[key].shape[1:3]) > MAX_SIDE]:
        raise ValueError(f"{large[0]} is larger than {MAX_SIDE} pixels on a side: {observations[large[0]].shape}")
    for key in [*cameras, *(STATE_PARTS if has_state else ())]:
        if len(observations[key]) != stored:
            raise ValueError(f"{len(observations[key])} rows of {key}, {stored} actions")
    follow = observations_follow_actions(demo)
    task_name = file.stem.removesuffix("_demo")
    environment = json.loads(data.attrs.get("env_args", "{}")).get("env_kwargs", {})
    return Demo(
        file=file,
        name=name,
        length=stored - int(follow),
        task_name=task_name,
        instruction=instruction_from_task_name(task_name),
        bddl_language=json.loads(data.attrs.get("problem_info", "{}")).get("language_instruction"),
        fps=float(environment.get("control_freq", CONTROL_FREQUENCY)),
        camera_keys=tuple(cameras),
        has_state=has_state,
        has_rewards="rewards" in demo,
        observations_follow_actions=follow,
    )


def is_pictures(rows: Any) -> bool:
    """Whether a dataset of `obs` is a camera: (T, H, W, 3) uint8."""
    return rows.ndim == 4 and rows.shape[-1] == 3 and rows.dtype == np.uint8


def observations_follow_actions(demo: Any) -> bool:
    """Whether observation t was taken after action t: then the arm's joints in it are those of simulator state t + 1.

    `states` always precede the action. Row 0 is left out, regenerated files copy it from the original recording.
    """
    if "states" not in demo or "joint_states" not in demo["obs"] or len(demo["states"]) < 3:
        return False
    simulated, observed = demo["states"][1:, JOINTS_IN_SIMULATOR_STATE], demo["obs/joint_states"][1:-1]
    same, next_one = (np.abs(rows - observed).mean() for rows in (simulated[:-1], simulated[1:]))
    return bool(next_one < 0.5 * same)
