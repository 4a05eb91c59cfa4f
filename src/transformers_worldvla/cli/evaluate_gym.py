"""`worldvla evaluate gym`: success rates in any gymnasium environment."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from .closed_loop import add_run_arguments, count_workers, load_planner, parse_trials, read_controller
from .errors import UserError

_EPILOG = """\
examples:
  # two tasks of Meta-World; `expert` is Meta-World's own scripted policy of each
  worldvla evaluate gym --env Meta-World/MT1 --tasks reach-v3,push-v3 --model my-checkpoint --trials 10 --output results
  worldvla evaluate gym --env Meta-World/MT1 --tasks reach-v3 --model expert --trials 10 --output expert
  # any other environment that draws rgb_array pictures and reports success in `info`
  worldvla evaluate gym --env FetchReach-v4 --instruction "reach the red ball" --model my-checkpoint --output results \\
      --option width=256 --option height=256

Meta-World's instruction is made of the task's name (`button-press-topdown-v3`: "button press topdown"), its
pictures of 256 x 256 pixels (--option width=..., height=...) come from --camera (corner2). Cameras corner, corner2, ...
stand on their heads there: a checkpoint's embodiment says by `rotation` what was done about it in training.
--fast-render leaves out shadows, reflections and anti-aliasing.
"""
_SIDE = 256
_OWN_OPTIONS = {"env_name": "--tasks", "camera_name": "--camera", "seed": "--seed"}  # of Meta-World's `make`


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "gym",
        help="success rates in a gymnasium environment",
        description="Run a model in a gymnasium environment (Meta-World, ...) and count successes.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--env", required=True, metavar="ID", help="what `gymnasium.make` calls it")
    parser.add_argument("--tasks", metavar="NAMES", help="Meta-World: names of tasks with commas")
    parser.add_argument("--trials", default="10", metavar="N", help="episodes a task, or which: 10-19 (%(default)s)")
    parser.add_argument("--instruction", metavar="TEXT", help="what the robot is told (Meta-World: the task's name)")
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="further argument of `gymnasium.make`"
    )
    parser.add_argument(
        "--camera", metavar="C", help="Meta-World: its camera (the checkpoint's raw camera, or corner2)"
    )
    parser.add_argument("--rotation", type=int, choices=(0, 90, 180, 270), metavar="DEG", help="turn pictures by this")
    parser.add_argument("--fast-render", action="store_true", help="MuJoCo: plain pictures, drawn ten times faster")
    add_run_arguments(parser)
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    from ..evaluation.closed_loop import Episode, Filming, run_episodes, videos_in
    from ..evaluation.gym_env import GymSpec, make
    from ..evaluation.results import ResultFolder, format_summary, summarize
    from ..evaluation.rollout import episode_seed
    from .files import check_output_folder

    output = Path(args.output).expanduser()
    check_output_folder(output)
    trials = parse_trials(args.trials)
    options = _read_options(args.option)
    if args.env.startswith("Meta-World/"):
        for name in _OWN_OPTIONS.keys() & options.keys():
            raise UserError(f"--option {name}=...: with Meta-World say it by {_OWN_OPTIONS[name]}")
    controller = read_controller(args)
    named = () if controller.robot is None else controller.robot.raw_cameras
    args.camera = args.camera or next(iter(named), "corner2")
    rotation = _rotation(args, controller.robot)
    tasks = _tasks(args)
    specs = {
        number: GymSpec(args.env, text, rotation, tuple(sorted({**own, **options}.items())), args.fast_render)
        for number, text, own in tasks
    }
    first = make(next(iter(specs.values())), episode_seed(args.seed, args.env, tasks[0][0], trials[0]))
    shape, budget = first.action_space.shape, args.max_steps or _budget(first)
    first.close()
    if controller.robot is not None:
        if (controller.robot.action_dim,) != shape:
            raise UserError(f"{args.env} takes actions of shape {shape}, not those of {controller.robot.describe()}")
        if controller.robot.num_cameras != 1:
            raise UserError(f"{args.env} draws one picture a step, {controller.robot.describe()} sees more cameras")

    settings = {
        "benchmark": "gym",
        "env": args.env,
        "seed": args.seed,
        "max_steps": budget,
        "rotation": rotation,
        "options": {**options, **({"camera_name": args.camera} if args.env.startswith("Meta-World/") else {})},
        "fast_render": args.fast_render,
        "instruction": args.instruction,
        **controller.settings,
    }
    planner = None
    if controller.checkpoint is not None:
        planner, found = load_planner(args, controller, {args.env: [text for _, text, _ in tasks]})
        settings.update(found)
    results = ResultFolder(output, settings)
    episodes = [
        Episode(specs[number], args.env, number, trial, text, budget) for number, text, _ in tasks for trial in trials
    ]
    speed = run_episodes(
        episodes,
        results,
        common={name: settings[name] for name in ("model", "checkpoint", "versions") if name in settings},
        seed=args.seed,
        policy=controller.policy,
        planner=planner,
        cameras=("",),
        workers=count_workers(args),
        filming=Filming(args.videos, args.success_videos, camera="", suffix=f".{args.video_format}"),
    )
    summary = summarize(results.rows[episode.key] for episode in episodes)
    print(format_summary(summary))
    print(f"{speed['env_steps_per_second']:.1f} steps/s, model {speed['model_share']:.0%} of the time", file=sys.stderr)
    return {
        "settings": settings,
        **summary,
        "speed": speed,
        "episodes_file": results.episodes_file,
        "videos": videos_in(output),
    }


def _tasks(args: argparse.Namespace) -> list[tuple[int, str, dict[str, Any]]]:
    """Number, instruction and own `gymnasium.make` arguments of each task."""
    from ..evaluation.gym_env import META_WORLD, meta_world_instruction, meta_world_tasks

    if args.env != META_WORLD:
        if args.tasks is not None:
            raise UserError(f"--tasks names tasks of {META_WORLD}; {args.env} is one task")
        if args.instruction is None:
            raise UserError(f"--instruction: say what the robot is to do in {args.env}")
        return [(0, args.instruction, {})]
    known = meta_world_tasks()
    names = [name.strip() for name in args.tasks.split(",")] if args.tasks else list(known)
    for name in names:
        if name not in known:
            raise UserError(f"--tasks: Meta-World has no task {name!r}; it has {', '.join(known)}")
    own = {"camera_name": args.camera, "width": _SIDE, "height": _SIDE}
    return [
        (known.index(name), args.instruction or meta_world_instruction(name), {**own, "env_name": name})
        for name in sorted(set(names), key=known.index)
    ]


def _rotation(args: argparse.Namespace, robot: Any) -> int:
    """The embodiment's, for its pictures; what stands on its head in Meta-World is turned in videos of the expert."""
    if args.rotation is not None:
        return int(args.rotation)
    if robot is not None:
        return int(robot.rotation)
    return 180 if args.env.startswith("Meta-World/") and args.camera.startswith("corner") else 0


def _budget(env: Any) -> int:
    from ..evaluation.gym_env import MAX_STEPS

    own = getattr(env.unwrapped, "max_path_length", MAX_STEPS)
    return int(getattr(env.spec, "max_episode_steps", None) or own)


def _read_options(texts: list[str]) -> dict[str, Any]:
    """`NAME=VALUE` -> arguments; a value that is JSON is what it says, any other a text."""
    options = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise UserError(f"--option {text}: give NAME=VALUE")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options
