"""Records demonstrations of LIBERO with the scripted expert, in as many processes as wanted; run again, it goes on.

    python record.py --output runs/demonstrations --suites libero_goal --episodes 40
    python record.py --output runs/demonstrations --suites libero_goal libero_object libero_spatial --processes 2
    python record.py --output runs/demonstrations --export-only

Every episode is a file below `<output>/episodes`, complete as soon as it exists, so that a recording may be killed at
any moment. Tasks take turns: stopped early, all of them have about the same number. At the end the episodes become
`<output>/lerobot` (LeRobot v3.0) and `<output>/libero_hdf5` (LIBERO's own layout), or one of both (`--formats`).
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm

from transformers_worldvla.evaluation.libero_suites import find_tasks
from transformers_worldvla.processes import end_with_parent

SUITES = ("libero_goal", "libero_object", "libero_spatial")
CAMERAS = ("agentview", "robot0_eye_in_hand")
FORMATS = ("libero_hdf5", "lerobot")
EPISODES_A_TURN = 5  # of a task, before the next task has its turn: building a scene takes as long as half an episode
ATTEMPTS = 6  # placements that are tried for an episode


@dataclass(frozen=True)
class Turn:
    """Some episodes of a task that one process records, one after another."""

    suite: str
    task: int
    numbers: tuple[int, ...]  # of the episodes
    output: Path
    cameras: tuple[str, ...]
    resolution: int
    disturbances: float
    learner: str | None
    learner_steps: tuple[int, int]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--suites", nargs="+", default=["libero_goal"], choices=SUITES, metavar="SUITE")
    parser.add_argument("--tasks", type=int, nargs="+", help="numbers of the suites' tasks (all)")
    parser.add_argument("--episodes", type=int, default=40, help="a task (%(default)s)")
    parser.add_argument("--cameras", nargs="+", default=["agentview"], choices=CAMERAS, help="(%(default)s)")
    parser.add_argument("--resolution", type=int, default=256, help="pixels; drawing 128 takes as long (%(default)s)")
    parser.add_argument(
        "--disturbances",
        type=float,
        default=0.0,
        metavar="P",
        help="probability that a push begins at a step, which the expert recovers from (%(default)s)",
    )
    parser.add_argument("--first-episode", type=int, default=0, metavar="N", help="its number (%(default)s)")
    parser.add_argument("--learner", metavar="M", help="checkpoint that acts before the expert takes over")
    parser.add_argument(
        "--learner-steps", type=int, nargs=2, default=(20, 150), metavar=("MIN", "MAX"), help="(%(default)s)"
    )
    parser.add_argument("--processes", type=int, default=1, help="some 2 GB of memory each (%(default)s)")
    parser.add_argument("--formats", nargs="+", default=FORMATS, choices=FORMATS, help="(both)")
    parser.add_argument(
        "--export-only", action="store_true", help="write the datasets from the episodes that are there"
    )
    args = parser.parse_args()
    if not args.export_only:
        failed = record(list(plan(args)), args.processes)
        if failed:
            print(f"{failed} episodes are missing: see {args.output / 'attempts.jsonl'}", file=sys.stderr)
    export(args.output, args.formats)


def plan(args: argparse.Namespace) -> Iterator[Turn]:
    """Turns in the order in which they are taken; episodes that exist are left out."""
    tasks = [(suite, task.index) for suite in args.suites for task in find_tasks(suite)]
    if args.tasks is not None:
        tasks = [(suite, index) for suite, index in tasks if index in args.tasks]
    end = args.first_episode + args.episodes
    for first in range(args.first_episode, end, EPISODES_A_TURN):
        numbers = range(first, min(first + EPISODES_A_TURN, end))
        for suite, index in tasks:
            missing = [number for number in numbers if not episode_path(args.output, suite, index, number).exists()]
            if missing:
                cameras, learner_steps = tuple(args.cameras), (args.learner_steps[0], args.learner_steps[1])
                how = (args.resolution, args.disturbances, args.learner, learner_steps)
                yield Turn(suite, index, tuple(missing), args.output, cameras, *how)


def episode_path(output: Path, suite: str, task: int, number: int) -> Path:
    return output / "episodes" / suite / find_tasks(suite)[task].name / f"{number:04d}.hdf5"


def placement_seed(task: int, number: int, attempt: int) -> int:
    """The seed of a placement: the same episode whoever records it, in whatever order."""
    return 1_000_000 + 100_000 * task + 100 * number + attempt


def record(turns: list[Turn], processes: int) -> int:
    """Take all turns; returns how many episodes could not be recorded."""
    wanted = sum(len(turn.numbers) for turn in turns)
    recorded = 0
    with (
        tqdm(total=wanted, desc="episodes", smoothing=0) as bar,
        # a process ends after a few turns and gives the memory of its simulators back; that is what hangs a
        # ProcessPoolExecutor (python/cpython#115634)
        get_context("spawn").Pool(processes, end_with_parent, maxtasksperchild=4) as pool,
    ):
        for done in pool.imap_unordered(take_turn, turns):
            recorded += done
            bar.update(done)
    return wanted - recorded


def take_turn(turn: Turn) -> int:
    """Record the episodes of a turn; returns how many there are now."""
    from episode_file import record_episode, write_episode

    from transformers_worldvla.evaluation.libero_env import LiberoEnv

    env = LiberoEnv(turn.suite, turn.task, resolution=turn.resolution)
    learner = None
    if turn.learner is not None:
        from learner import Learner

        learner = Learner(turn.learner, turn.learner_steps)
    recorded = 0
    try:
        for number in turn.numbers:
            for attempt in range(ATTEMPTS):
                began, seed = time.perf_counter(), placement_seed(turn.task, number, attempt)
                rows = record_episode(env, seed, turn.cameras, turn.disturbances, learner)
                steps = None if rows is None else len(rows["actions"])
                line = {"suite": turn.suite, "task": turn.task, "episode": number, "seed": seed}
                line |= {"disturbances": turn.disturbances, "learner": turn.learner, "steps": steps}
                note(turn.output, {**line, "seconds": round(time.perf_counter() - began, 1)})
                if rows is not None:
                    write_episode(episode_path(turn.output, turn.suite, turn.task, number), env, seed, rows)
                    recorded += 1
                    break
    finally:
        env.close()
    return recorded


def note(output: Path, line: dict[str, object]) -> None:
    """One line an attempt, `steps` null where the goal was not reached; appended in one piece, whoever else writes."""
    output.mkdir(parents=True, exist_ok=True)
    with (output / "attempts.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def export(output: Path, formats: Sequence[str]) -> None:
    """Write the datasets of these formats from all episodes that are there."""
    from export import export_hdf5, export_lerobot

    folders = [
        output / "episodes" / suite / task.name
        for suite in SUITES
        if (output / "episodes" / suite).is_dir()
        for task in find_tasks(suite)
    ]
    tasks = [files for folder in folders if (files := sorted(folder.glob("*.hdf5")))]
    if not tasks:
        sys.exit(f"{output} holds no episode")
    writers = {"libero_hdf5": export_hdf5, "lerobot": export_lerobot}
    for name in formats:
        writers[name](tasks, output / name)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
