"""`worldvla imagine`: a picture and a plan of actions in, the frames that the model expects to see out.

With `--play` the plan comes from the keyboard, one action a key, and each frame is drawn as soon as it is imagined.
"""

import argparse
import re
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from .checkpoints import (
    add_model_arguments,
    add_sampling_arguments,
    check_sampling,
    describe_sampling,
    find_checkpoint,
    load_model,
    load_processor,
    positive_float,
    positive_int,
    sampling_options,
)
from .errors import UserError

_EPILOG = """\
examples:
  # what the bundled small model expects to see when it follows its own prediction
  worldvla predict --images now.png --instruction "open the drawer" --output plan.csv
  worldvla imagine --image now.png --actions plan.csv --output imagined
  # a checkpoint of one's own with two cameras; every frame is decoded and encoded again before the next
  worldvla imagine --model my-checkpoint --image front.png wrist.png --actions plan.npy --output imagined \\
      --feedback pixels
  # drive the robot by hand, in the terminal; then keep what was seen
  worldvla imagine --play --image now.png
  worldvla imagine --play --image now.png --output played
  # the same keys from a file
  worldvla imagine --play --image now.png --output played < keys.txt

Actions are in the robot's own units, a row a control step: .npy of shape (T, D), .csv (with or without a header of
names) or .json (a list of actions, or what `worldvla predict --output plan.json` writes). The folder gets
imagined_001.png ... and imagined.gif, in place of those of an earlier run.
"""
_GIF = "imagined.gif"
_FRAME = re.compile(r"imagined_\d{3,}(_.+)?\.png")
_PANEL = 256  # pixels along the longer side of a picture in the GIF


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "imagine",
        help="imagine the frames that follow a picture under a plan of actions",
        description="Roll a plan of actions out in the world model, frame by frame, from one picture.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--image", nargs="+", required=True, metavar="FILE", help="the first frame; with several cameras one file each"
    )
    plan = parser.add_mutually_exclusive_group(required=True)
    plan.add_argument("--actions", metavar="FILE", help="the plan: .npy, .csv or .json, T rows of D")
    plan.add_argument("--play", action="store_true", help="the plan comes from the keyboard, a key an action")
    parser.add_argument(
        "--output", metavar="DIR", help="folder for the frames (PNG) and the GIF; may be left out with --play"
    )
    parser.add_argument("--embodiment", metavar="E", help="whose actions, where the checkpoint has several")
    parser.add_argument(
        "--feedback",
        choices=("tokens", "pixels"),
        default="tokens",
        help="feed image tokens back, or decode and encode each frame again (%(default)s)",
    )
    parser.add_argument(
        "--num-history",
        type=positive_int,
        default=1,
        metavar="N",
        help="(frame, action) pairs in a prompt (%(default)s)",
    )
    parser.add_argument(
        "--fps", type=positive_float, metavar="X", help="of the GIF (the robot's control rate, else 10)"
    )
    parser.add_argument("--json", action="store_true", help="print what was done as JSON")
    add_model_arguments(parser)
    add_sampling_arguments(parser)
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    from .files import check_output_folder, read_picture

    check_sampling(args)
    if args.output is None and not args.play:
        raise UserError("--output is missing: name a folder for the frames")
    output = None if args.output is None else Path(args.output).expanduser()
    if output is not None:
        check_output_folder(output)
    pictures = [read_picture(path) for path in args.image]
    checkpoint = find_checkpoint(args.model, args.revision)
    processor = load_processor(checkpoint)
    robot = processor.get_embodiment(args.embodiment)
    if len(pictures) != robot.num_cameras:
        names = ", ".join(robot.cameras)
        raise UserError(f"--image takes one file a camera of {robot.name}: {names}; {len(pictures)} given")
    plan = None if args.play else _read_plan(args, robot)

    model = load_model(checkpoint, args.device, args.dtype)
    began = time.perf_counter()
    if plan is None:
        plan, steps = _play(args, model, processor, pictures, robot)
    else:
        steps = _roll_out(args, model, processor, pictures, robot, plan)  # T lists of C pictures
    seconds = time.perf_counter() - began
    fps = args.fps or robot.control_hz or 10.0
    files: list[Path] = []
    if output is not None and steps:
        files = _write(output, steps, _first_frame(processor, pictures), robot.cameras, fps)
    wrote = f"; wrote {output / _GIF} and {files[0]} ... {files[-1].name}" if output is not None and files else ""
    print(f"{len(steps)} frames in {seconds:.1f} s{wrote}")
    return {
        "model": checkpoint.name,
        "image": args.image,
        "embodiment": robot.name,
        "action_names": list(robot.action_names),
        "actions": plan.tolist(),
        "feedback": args.feedback,
        "num_history": args.num_history,
        "sampling": describe_sampling(args),
        "frames": files,
        "gif": output / _GIF if output is not None and files else None,
        "fps": fps,
        "device": str(model.device),
        "seconds": seconds,
    }


def _read_plan(args: argparse.Namespace, robot: Any) -> Any:
    """The plan (T, D) of `--actions`; says once where it leaves the range, not at every step."""
    from .files import read_plan

    plan = read_plan(args.actions, robot.action_names, robot.action_dim)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        robot.encode(plan)
    for warning in caught:
        print(f"warning: {warning.message}", file=sys.stderr)
    return plan


def _roll_out(
    args: argparse.Namespace, model: Any, processor: Any, pictures: list[Any], robot: Any, plan: Any
) -> list[Any]:
    """T lists of C pictures along a plan (T, D)."""
    from tqdm import tqdm

    from ..evaluation.open_loop import StepCounter

    with tqdm(total=len(plan), desc="frames") as bar, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "actions outside the range")
        frames = model.imagine(
            StepCounter(processor, bar),
            image=pictures,
            actions=plan,
            feedback=args.feedback,
            num_history=args.num_history,
            embodiment=robot.name,
            draft="previous",
            **sampling_options(args, model.device),
        )
    return [frame if isinstance(frame, list) else [frame] for frame in frames]


def _play(
    args: argparse.Namespace, model: Any, processor: Any, pictures: list[Any], robot: Any
) -> tuple[Any, list[Any]]:
    """What was played since the last restart: the actions (T, D), and T lists of C pictures."""
    import numpy as np
    from PIL import Image

    from ..serving.dream_world import DreamWorld
    from ..serving.play import play_in_terminal

    world = DreamWorld(
        model,
        processor,
        embodiment=robot.name,
        num_history=args.num_history,
        feedback=args.feedback,
        generate_kwargs=sampling_options(args, model.device),
    )
    start = world.begin(dict(zip(robot.cameras, pictures, strict=True)))
    played = play_in_terminal(world, start)
    actions = np.array(played.actions).reshape(-1, robot.action_dim)
    return actions, [[Image.fromarray(picture) for picture in step] for step in played.pictures]


def _first_frame(processor: Any, pictures: list[Any]) -> list[Any]:
    """The given pictures as the model sees them."""
    from PIL import Image

    from ..evaluation.open_loop import crop_for_model

    return [Image.fromarray(crop_for_model(processor, picture)) for picture in pictures]


def _write(output: Path, steps: list[Any], first: list[Any], cameras: tuple[str, ...], fps: float) -> list[Path]:
    """Write all frames and the GIF; frames that an earlier, longer rollout left there go."""
    from ..evaluation.pictures import beside, captioned, enlarge, save_gif
    from .files import new_files

    panels = []
    for number, pictures in enumerate([first, *steps]):
        caption = f"imagined, step {number} of {len(steps)}" if number else "given"
        panels.append(captioned(beside([enlarge(picture, _PANEL) for picture in pictures]), caption))
    names = []
    with new_files(output) as folder:
        for number, pictures in enumerate(steps, start=1):
            for camera, picture in zip(cameras, pictures, strict=True):
                suffix = f"_{re.sub(r'[^A-Za-z0-9-]+', '_', camera)}" if len(cameras) > 1 else ""
                names.append(f"imagined_{number:03d}{suffix}.png")
                picture.save(folder / names[-1])
        save_gif(panels, folder / _GIF, fps)
    for file in output.iterdir():
        if _FRAME.fullmatch(file.name) and file.name not in names:
            file.unlink()
    return [output / name for name in names]
