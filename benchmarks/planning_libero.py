"""Imagining before acting against plain acting, in LIBERO: the same tasks, initial states and seed.

    OMP_NUM_THREADS=1 python benchmarks/planning_libero.py --dataset DEMONSTRATIONS --tasks 7 8 --output runs/planning

The plan that is carried out is the one of N chunks whose imagined end looks most like the goal: the last picture of a
demonstration of the task, from the dataset. Writes OUTPUT/plain and OUTPUT/planned as `worldvla evaluate libero` does,
so that `worldvla evaluate compare` takes them; killed and started again, it goes on.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from transformers_worldvla.assets import DEFAULT_CHECKPOINT, bundled_folder
from transformers_worldvla.cli.checkpoints import find_checkpoint
from transformers_worldvla.cli.closed_loop import hash_checkpoint, versions
from transformers_worldvla.data import load_episodes
from transformers_worldvla.evaluation.closed_loop import Episode, Filming, run_episodes
from transformers_worldvla.evaluation.libero_benchmark import LiberoSpec, libero_cameras
from transformers_worldvla.evaluation.libero_env import SETTLE_STEPS
from transformers_worldvla.evaluation.libero_suites import LiberoTask, find_tasks, step_budget
from transformers_worldvla.evaluation.policies import ModelPlanner
from transformers_worldvla.evaluation.results import ResultFolder, compare_pairs, format_rate, pair_episodes, rate
from transformers_worldvla.serving.dream_world import DreamWorld
from transformers_worldvla.serving.goals import GoalImage
from transformers_worldvla.serving.planning import EpisodePlanner, PlanningPredictor, score_by_goal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="demonstrations: a folder or Hub id")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", default=str(bundled_folder(DEFAULT_CHECKPOINT)), help="(the bundled checkpoint)")
    parser.add_argument("--suite", default="libero_goal", help="(%(default)s)")
    parser.add_argument("--tasks", type=int, nargs="+", required=True)
    parser.add_argument("--trials", type=int, default=10, help="(%(default)s)")
    parser.add_argument("--candidates", type=int, default=8, help="chunks that are imagined, N (%(default)s)")
    parser.add_argument("--horizon", type=int, help="actions of each that are imagined (the whole chunk)")
    parser.add_argument("--workers", type=int, default=2, help="simulators (%(default)s)")
    args = parser.parse_args()
    checkpoint = find_checkpoint(args.model)
    world = DreamWorld.from_pretrained(args.model)
    tasks = [find_tasks(args.suite)[number] for number in args.tasks]
    predictor = PlanningPredictor(
        world.model,
        world.processor,
        score=score_by_goal(find_goals(world, args.dataset, tasks)),
        num_candidates=args.candidates,
        horizon=args.horizon,
    )
    texts = {args.suite: [task.instruction for task in find_tasks(args.suite)]}
    planners = {"plain": ModelPlanner(world.model, world.processor, texts), "planned": EpisodePlanner(predictor)}
    facts = {"model": checkpoint.name, "checkpoint": hash_checkpoint(checkpoint), "versions": versions()}
    rows = {}
    for name, planner in planners.items():
        planning = {"goals": args.dataset, "candidates": args.candidates, "horizon": args.horizon}
        own = planning if name == "planned" else {}
        results = ResultFolder(args.output / name, {"benchmark": "libero", "seed": 0, **facts, **own})
        rows[name] = evaluate(planner, results, facts, world.processor, tasks, args)
        print(f"{name}: {format_rate(rate(rows[name]))}", flush=True)
    print(json.dumps(compare_pairs(pair_episodes(rows["plain"], rows["planned"])), indent=2))


def find_goals(world: DreamWorld, dataset: str, tasks: list[LiberoTask]) -> dict[str, GoalImage]:
    """Instruction -> the last picture of the dataset's first demonstration of it. ValueError for a task without one."""
    camera = world.robot.cameras[0]
    first: dict[str, Any] = {}
    for episode in load_episodes(dataset, cameras=[camera]):
        first.setdefault(episode.instruction, episode)
    if missing := [task.instruction for task in tasks if task.instruction not in first]:
        raise ValueError(f'{dataset} has no demonstration of "{missing[0]}"')
    shown = {text: first[text] for text in (task.instruction for task in tasks)}
    return {
        text: GoalImage.from_pictures(world, episode.frame(camera, len(episode) - 1)) for text, episode in shown.items()
    }


def evaluate(
    planner: Any,
    results: ResultFolder,
    facts: dict[str, Any],
    processor: Any,
    tasks: list[LiberoTask],
    args: argparse.Namespace,
) -> list[dict[str, Any]]:
    """The rows of all episodes, those that are missing played now."""
    robot, budget = processor.get_embodiment(), step_budget(args.suite)
    episodes = [
        Episode(
            LiberoSpec(args.suite, task.index, 256, robot.rotation, SETTLE_STEPS),
            args.suite, task.index, trial, task.instruction, budget,
        )
        for task in tasks
        for trial in range(args.trials)
    ]  # fmt: skip
    run_episodes(
        episodes,
        results,
        common=facts,
        seed=0,
        policy="frames",
        planner=planner,
        cameras=libero_cameras(robot),
        workers=args.workers,
        filming=Filming(0, 0, suffix=".mp4"),
    )
    return [results.rows[episode.key] for episode in episodes]


if __name__ == "__main__":
    main()
