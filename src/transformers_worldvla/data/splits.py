"""Which episodes are for training, which for validation: `train`, `val_ind` (known tasks) and `val_ood` (new tasks).

The authors' rule follows the names of their folders; the seeded one orders tasks and episodes by a hash, which is the
same on every machine and does not depend on the order of the episodes. Nothing here reads actions or pictures.
"""

import hashlib
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from .episodes import Episode
from .folder import FolderEpisode
from .libero_hdf5 import HDF5Episode

SPLITS = ("train", "val_ind", "val_ood")
RULES = ("seeded", "authors", "none")


@dataclass(frozen=True, order=True)
class Trajectory:
    """An episode under the names that the authors' folders would have: `task/trj_3`."""

    position: int  # in the dataset
    task: str
    name: str


def name_trajectories(episodes: Sequence[Episode]) -> list[Trajectory]:
    """Task and trajectory names of the episodes of a dataset (all of it, so that numbers keep their gaps).

    LIBERO files and folders name their task and number themselves. Elsewhere the task is the instruction, spelt like a
    folder, and trajectories are numbered in the order of the dataset.
    """
    trajectories, seen = [], defaultdict[str, int](int)
    for position, episode in enumerate(episodes):
        if isinstance(episode, HDF5Episode):
            task, name = episode.demo.task_name, episode.demo.name.replace("demo", "trj")
        elif isinstance(episode, FolderEpisode) and episode.folder.name.startswith("trj_"):
            task, name = episode.folder.resolve().parent.name, episode.folder.name
        else:
            task = episode.instruction.strip().replace(" ", "_")
            name = f"trj_{seen[task]}"
        seen[task] += 1
        trajectories.append(Trajectory(position, task, name))
    return trajectories


def split_trajectories(
    trajectories: Sequence[Trajectory],
    rule: str = "seeded",
    seed: int = 0,
    val_share: float = 0.1,
    ood_share: float = 0.1,
) -> dict[str, list[int]]:
    """Positions of the episodes of each split, ascending; every trajectory is in exactly one.

    Args:
        rule: `authors` (`action_model_conv_generation.py`): of the tasks by name the last tenth, rounded down, is
            `val_ood`; of each other task's trajectories, sorted as text (trj_0, trj_1, trj_10, trj_2, ...), the last
            tenth, rounded down, is `val_ind`. `seeded`: tasks and episodes in an order given by `seed`; the share
            `ood_share` of the tasks, and of the episodes of all others the share nearest to `val_share`, at least one.
            These are spread over the tasks: each gives `val_share` of its own, rounded so that the sum is right
            (Webster's method), and keeps one to train on. `none`: everything is `train`.
        val_share, ood_share: shares of the seeded rule, in [0, 1).
    """
    if rule not in RULES:
        raise ValueError(f"a split rule is one of {', '.join(RULES)}, not {rule!r}")
    for name, share in (("val_share", val_share), ("ood_share", ood_share)):
        if not 0 <= share < 1:
            raise ValueError(f"{name} is a number from 0 to below 1, not {share}")
    tasks = defaultdict[str, list[Trajectory]](list)
    for trajectory in trajectories:
        tasks[trajectory.task].append(trajectory)
    if rule == "none":
        chosen = {"train": list(trajectories), "val_ind": [], "val_ood": []}
    elif rule == "authors":
        chosen = _split_authors(tasks)
    else:
        chosen = _split_seeded(tasks, seed, val_share, ood_share)
    return {name: sorted(trajectory.position for trajectory in chosen[name]) for name in SPLITS}


def _split_authors(tasks: dict[str, list[Trajectory]]) -> dict[str, list[Trajectory]]:
    names = sorted(tasks)
    known = math.ceil(0.9 * len(names))
    train, val_ind = list[Trajectory](), list[Trajectory]()
    for task in names[:known]:
        ordered = sorted(tasks[task], key=lambda trajectory: trajectory.name)
        stop = math.ceil(0.9 * len(ordered))
        train += ordered[:stop]
        val_ind += ordered[stop:]
    return {"train": train, "val_ind": val_ind, "val_ood": [each for task in names[known:] for each in tasks[task]]}


def _split_seeded(
    tasks: dict[str, list[Trajectory]], seed: int, val_share: float, ood_share: float
) -> dict[str, list[Trajectory]]:
    names = sorted(tasks, key=lambda task: _draw(seed, task))
    known = math.ceil((1 - ood_share) * len(names))
    count = sum(len(tasks[task]) for task in names[:known])
    wanted = max(1, round(val_share * count)) if val_share else 0
    train, candidates = list[Trajectory](), list[tuple[float, bytes, Trajectory]]()
    for task in names[:known]:
        ordered = sorted((_draw(seed, each.task, each.name), each) for each in tasks[task])
        train.append(ordered.pop()[1])
        candidates += [((rank + 0.5) / (len(ordered) + 1), *each) for rank, each in enumerate(ordered)]
    candidates.sort()
    val_ind = [each for _, _, each in candidates[:wanted]]
    train += [each for _, _, each in candidates[wanted:]]
    return {"train": train, "val_ind": val_ind, "val_ood": [each for task in names[known:] for each in tasks[task]]}


def _draw(seed: int, *names: str) -> bytes:
    """A random-looking key that depends on the seed and the names alone."""
    return hashlib.sha256("\0".join([str(seed), *names]).encode()).digest()
