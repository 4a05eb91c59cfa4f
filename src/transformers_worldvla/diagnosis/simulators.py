"""A simulator beside the checkpoint and the dataset: does it take these actions, have these cameras, draw as it did.

Opening one takes seconds and needs its extra; what is missing is a failed check that names it.
"""

from collections.abc import Sequence
from contextlib import closing
from typing import Any

import numpy as np

from ..action_tokenization_worldvla import Embodiment
from ..data.episodes import EpisodeDataset
from .probes import TURNS
from .report import FAILED, OK, SKIPPED, WARNING, Finding

SIMULATORS = ("libero", "metaworld")
GRID = 16  # cells a side that pictures are compared by
ALIKE, BETTER = 0.5, 0.1  # correlation: of pictures of one scene; by which another orientation must be more alike
META_WORLD_TASK = "reach-v3"
META_WORLD_CAMERAS = ("corner", "corner2", "corner3", "corner4", "topview", "behindGripper", "gripperPOV")
_CAMERA_ADVICE = "set raw_cameras of the embodiment in processor_config.json"


def check_simulator(
    simulator: str, robot: Embodiment, dataset: EpisodeDataset | None
) -> tuple[list[Finding], np.ndarray | None]:
    """The checks of a simulator, and its picture (H, W, 3) of the first camera, None where there is none.

    Raises ValueError for an unknown simulator.
    """
    if simulator not in SIMULATORS:
        raise ValueError(f"simulators are {', '.join(SIMULATORS)}, not {simulator!r}")
    try:
        return _check_libero(robot, dataset) if simulator == "libero" else _check_meta_world(robot, dataset)
    except ImportError as error:
        return [Finding("simulator", FAILED, "cannot be used here", " ".join(str(error).split()))], None


def _check_libero(robot: Embodiment, dataset: EpisodeDataset | None) -> tuple[list[Finding], np.ndarray | None]:
    from ..evaluation.libero_benchmark import LiberoSpec, check_robot, libero_cameras

    advice = "this checkpoint acts another robot: name LIBERO's with --embodiment"
    try:
        check_robot(robot)
    except ValueError as error:
        return [Finding("simulator", FAILED, str(error), advice)], None
    try:
        camera = libero_cameras(robot)[0]
    except ValueError as error:
        return [Finding("simulator", FAILED, str(error), _CAMERA_ADVICE)], None
    suite, task, is_known = find_libero_task(dataset)
    with closing(LiberoSpec(suite, task, rotation=robot.rotation).open()) as benchmark:
        about = benchmark.describe(looks=True)
        benchmark.start(0, 0)
        frame = benchmark.render(camera)
    numbers = {name: about.get(name) for name in ("versions", "renderer", "render_hash", "render_difference")}
    difference = about["render_difference"]
    if warning := about.get("warning"):
        drawing = Finding(
            "simulator", FAILED, warning, "install the pinned versions: see the check `versions`", numbers
        )
    else:
        same = "no reference of it" if difference is None else f"{difference:.2f} of 255 from the reference"
        drawing = Finding("simulator", OK, f"{suite} task {task} opens, its first frame is {same}", numbers=numbers)
    return [drawing, compare_orientation(frame, dataset, robot, is_known)], frame


def find_libero_task(dataset: EpisodeDataset | None) -> tuple[str, int, bool]:
    """Suite and number of the task whose text the dataset's first episode has, and whether there is one."""
    from ..evaluation.libero_suites import match_task

    task = None if dataset is None else match_task(dataset[0].instruction)
    return ("libero_goal", 0, False) if task is None else (task.suite, task.index, True)


def _check_meta_world(robot: Embodiment, dataset: EpisodeDataset | None) -> tuple[list[Finding], np.ndarray | None]:
    from ..evaluation.gym_env import META_WORLD, GymSpec

    name = (robot.raw_cameras or robot.cameras)[0]
    if name not in META_WORLD_CAMERAS:
        found = f'embodiment {robot.name!r} sees a camera "{name}"; Meta-World has {", ".join(META_WORLD_CAMERAS)}'
        return [Finding("simulator", FAILED, found, _CAMERA_ADVICE)], None
    options = (("env_name", META_WORLD_TASK), ("camera_name", name))
    with closing(GymSpec(META_WORLD, "reach", robot.rotation, options).open()) as benchmark:
        benchmark.start(0, 0)
        width = benchmark.still_action.shape[0]
        if width != robot.action_dim or robot.semantics != "delta":
            found = f"Meta-World takes {width} delta actions, not those of {robot.describe()}"
            return [Finding("simulator", FAILED, found, "name Meta-World's robot with --embodiment")], None
        frame = benchmark.render(name)
    drawing = Finding("simulator", OK, f"{META_WORLD_TASK} opens and draws {name}")
    return [drawing, compare_orientation(frame, dataset, robot, is_known=True)], frame


# -------------------------------------------------------------------- orientation


def compare_orientation(
    frame: np.ndarray, dataset: EpisodeDataset | None, robot: Embodiment, is_known: bool = True
) -> Finding:
    """The simulator's frame, turned by the embodiment's rotation, stands as the recorded frames do.

    `is_known`: the dataset shows the scene that the simulator drew.
    """
    check = "simulator orientation"
    if dataset is None or robot.cameras[0] not in dataset.cameras:
        return Finding(check, SKIPPED, "nothing recorded to compare with: give --dataset")
    recorded = average_frame(dataset, robot.cameras[0])
    alike = {name: _correlation(_cells(turn(frame)), recorded) for name, turn in TURNS.items()}
    usual, *others = alike
    best = max(others, key=lambda name: alike[name])
    numbers = {"correlation": alike, "rotation": robot.rotation}
    found = (
        f"with rotation {robot.rotation} its frame correlates {alike[usual]:.2f} with the recorded first frames, "
        f"{alike[best]:.2f} {best} (best of the others)"
    )
    if max(alike.values()) < ALIKE:
        where = "" if is_known else "; the dataset's first instruction is no task of LIBERO"
        advice = "another scene, camera or drawing: compare the frames in the picture that doctor writes"
        return Finding(check, WARNING, found + where, advice, numbers)
    if alike[best] > alike[usual] + BETTER:
        advice = f"the frame must be {best}: set rotation of the embodiment {robot.name!r} in processor_config.json"
        return Finding(check, FAILED, found, advice, numbers)
    if alike[best] > alike[usual] - BETTER / 2:
        advice = "too symmetric to tell: compare the frames in the picture that doctor writes"
        return Finding(check, WARNING, found, advice, numbers)
    return Finding(check, OK, found, numbers=numbers)


def average_frame(dataset: EpisodeDataset, camera: str, count: int = 8) -> np.ndarray:
    """Mean colours of the first frames of the first episodes with one instruction: (16, 16, 3)."""
    first = dataset[0].instruction
    cells: Sequence[Any] = [
        _cells(episode.frame(camera, 0)) for episode in dataset[:count] if episode.instruction == first
    ]
    return np.mean(cells, axis=0)


def _cells(picture: np.ndarray) -> np.ndarray:
    """Mean colours of a grid of 16 x 16 cells of a picture of any size: (16, 16, 3) float64."""
    rows, columns = (np.linspace(0, length, GRID + 1).round().astype(int) for length in picture.shape[:2])
    sums = np.add.reduceat(np.add.reduceat(picture.astype(np.float64), rows[:-1], 0), columns[:-1], 1)
    return sums / np.multiply.outer(np.diff(rows), np.diff(columns))[..., None]


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's correlation of two pictures' brightness and colour over their places."""
    a, b = a - a.mean((0, 1)), b - b.mean((0, 1))
    size = np.sqrt((a**2).sum() * (b**2).sum())
    return float((a * b).sum() / size) if size > 0 else 0.0
