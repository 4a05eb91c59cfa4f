"""`worldvla evaluate libero`: success rates in LIBERO's simulator."""

import argparse
import sys
from pathlib import Path
from typing import Any

from .closed_loop import (
    Controller,
    add_run_arguments,
    count_workers,
    load_planner,
    parse_numbers,
    parse_trials,
    read_controller,
)
from .errors import UserError

_EPILOG = """\
examples:
  # the bundled checkpoint on two tasks of LIBERO-Goal, five official initial states each
  worldvla evaluate libero --suite libero_goal --tasks 1,4 --trials 5 --output results
  # the whole benchmark as published: four suites, ten tasks, fifty initial states, eight simulators
  worldvla evaluate libero --model my-checkpoint --suite libero_spatial,libero_object,libero_goal,libero_10 \\
      --output results --workers 8
  # does the harness lose anything? (near 100 %), is anything for free? (0 %)
  worldvla evaluate libero --model expert --suite libero_goal --trials 5 --output expert
  worldvla evaluate libero --model noop --suite libero_goal --trials 5 --output noop
  # robustness: also LIBERO-PRO's reworded instructions, other objects, swapped places and other tasks, as a table
  worldvla evaluate libero --suite libero_goal --robustness --trials 10 --output robustness
  # any other suite of the package by its name, such as a thing that stands about
  worldvla evaluate libero --suite libero_goal_with_mug --trials 10 --output mug
  # does it listen? the same scene with another instruction
  worldvla evaluate libero --suite libero_goal --tasks 1 --instruction "turn on the stove" --output listens

A run that was cut off goes on where it stopped when the same command is given again. DIR/episodes.jsonl has one line an
episode. Crashed episodes have no outcome and count in no rate; the same command tries them again.
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "libero",
        help="success rates in LIBERO",
        description="Run a model in LIBERO's simulator from the official initial states and count successes.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--suite", required=True, metavar="NAMES", help="libero_goal, ..., several with commas")
    parser.add_argument(
        "--robustness", action="store_true", help="also LIBERO-PRO's variants of each suite, side by side"
    )
    parser.add_argument("--tasks", metavar="T", help="0-based numbers in official order, such as 1,4 or 0-4 (all)")
    parser.add_argument(
        "--trials",
        default="50",
        metavar="N",
        help="the first N official initial states, or which: 30-49 (%(default)s)",
    )
    parser.add_argument("--instruction", metavar="TEXT", help="say this instead of what the task is")
    parser.add_argument(
        "--resolution", type=int, metavar="PX", help="pixels drawn (256, or more if the model sees more)"
    )
    add_run_arguments(parser)
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    from ..evaluation.closed_loop import Episode, Filming, run_episodes, videos_in
    from ..evaluation.libero_benchmark import LiberoSpec, check_robot, libero_cameras
    from ..evaluation.libero_env import ROTATION, SETTLE_STEPS
    from ..evaluation.libero_suites import find_task, find_tasks, perturbed_suites, step_budget
    from ..evaluation.rendering import choose_gl, mujoco_warning
    from ..evaluation.results import ResultFolder, format_summary, summarize
    from .files import check_output_folder

    output = Path(args.output).expanduser()
    check_output_folder(output)
    named = [name.strip() for name in args.suite.split(",")]
    variants = {base: perturbed_suites(base) for base in named} if args.robustness else {}
    suites = [name for base in named for name in (base, *variants.get(base, {}).values())]
    trials = parse_trials(args.trials)
    controller = read_controller(args)
    cameras: tuple[str, ...] = ()
    if controller.robot is not None:
        check_robot(controller.robot)
        cameras = libero_cameras(controller.robot)
    setup = {
        "resolution": _resolution(args, controller),
        "rotation": ROTATION if controller.robot is None else controller.robot.rotation,
        "settle_steps": SETTLE_STEPS,
        "instruction": args.instruction,
    }
    episodes = []
    for suite in suites:
        numbers = range(len(find_tasks(suite))) if args.tasks is None else parse_numbers(args.tasks, "--tasks")
        for number in numbers:
            task = find_task(suite, number)
            if trials[-1] >= (count := len(task.initial_states())):
                raise UserError(
                    f"--trials {args.trials}: {suite} task {number} has the initial states 0 to {count - 1}"
                )
            spec = LiberoSpec(suite, number, **setup)
            budget = args.max_steps or step_budget(suite)
            text = args.instruction or task.instruction
            episodes += [Episode(spec, suite, number, trial, text, budget) for trial in trials]
    choose_gl()
    if warning := mujoco_warning():
        print(f"warning: {warning}", file=sys.stderr)

    planner, settings = None, {"benchmark": "libero", "seed": args.seed, "max_steps": args.max_steps, **setup}
    settings.update(controller.settings)
    if controller.checkpoint is not None:
        texts = {
            suite: [args.instruction] if args.instruction else [task.instruction for task in find_tasks(suite)]
            for suite in suites
        }
        planner, found = load_planner(args, controller, texts)
        settings.update(found, cameras=list(cameras))
    results = ResultFolder(output, settings)
    speed = run_episodes(
        episodes,
        results,
        common={name: settings[name] for name in ("model", "checkpoint", "versions") if name in settings},
        seed=args.seed,
        policy=controller.policy,
        planner=planner,
        cameras=cameras,
        workers=count_workers(args),
        filming=Filming(args.videos, args.success_videos, suffix=f".{args.video_format}"),
    )
    summary = summarize(results.rows[episode.key] for episode in episodes)
    robustness = {base: _drops(summary, base, variants[base]) for base in variants}
    print(format_summary(summary))
    if robustness:
        print(_format_drops(summary, robustness))
    print(f"{speed['env_steps_per_second']:.1f} steps/s, model {speed['model_share']:.0%} of the time", file=sys.stderr)
    return {
        "settings": settings,
        **summary,
        **({"robustness": robustness} if robustness else {}),
        "speed": speed,
        "episodes_file": results.episodes_file,
        "videos": videos_in(output),
    }


def _resolution(args: argparse.Namespace, controller: Controller) -> int:
    if args.resolution is None:
        return 256 if controller.processor is None else max(256, controller.processor.image_processor.target_size)
    if args.resolution < 16 or args.resolution % 16:
        raise UserError(f"--resolution {args.resolution}: a multiple of 16")
    return int(args.resolution)


def _drops(summary: dict[str, Any], base: str, variants: dict[str, str]) -> dict[str, Any]:
    """Kind of perturbation -> the rate of that variant of a suite, and its difference from the suite's own.

    Variants have initial states of their own, so there are no pairs: `difference_interval` is Newcombe's. What is
    missing from the installed package is None.
    """
    from ..evaluation.libero_suites import PERTURBATIONS
    from ..evaluation.statistics import newcombe_interval

    own = summary["suites"][base]
    report: dict[str, Any] = dict.fromkeys(PERTURBATIONS)
    for kind, variant in variants.items():
        found = summary["suites"][variant]
        rates = own["success_rate"], found["success_rate"]
        counts = (own["successes"], found["successes"]), (own["episodes"], found["episodes"])
        report[kind] = {
            "suite": variant,
            **{name: value for name, value in found.items() if name != "tasks"},
            "difference": None if None in rates else rates[1] - rates[0],
            "difference_interval": list(newcombe_interval(*counts)),
        }
    return report


def _format_drops(summary: dict[str, Any], robustness: dict[str, Any]) -> str:
    """A table: a suite, and below it what its LIBERO-PRO variants change."""
    from ..evaluation.libero_suites import PERTURBATIONS
    from ..evaluation.results import format_rate

    lines = ["", f"{'robustness (LIBERO-PRO)':<42}{'success [95 %]':<40}points against the suite itself"]
    for base, report in robustness.items():
        lines.append(f"{base:<42}{format_rate(summary['suites'][base])}")
        for kind, numbers in report.items():
            name = f"  {PERTURBATIONS[kind]} ({kind})"
            if numbers is None:
                lines.append(f"{name:<42}not in the installed package")
                continue
            change = ""
            if numbers["difference"] is not None:
                low, high = (100 * bound for bound in numbers["difference_interval"])
                change = f"{100 * numbers['difference']:+.1f} [{low:+.1f}, {high:+.1f}]"
            lines.append(f"{name:<42}{format_rate(numbers):<40}{change}".rstrip())
    return "\n".join(lines)
