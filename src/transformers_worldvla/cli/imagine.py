"""`worldvla imagine`: a picture and a plan of actions in, the frames that the model expects to see out."""

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
    parser.add_argument("--actions", required=True, metavar="FILE", help="the plan: .npy, .csv or .json, T rows of D")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the frames (PNG) and the GIF")
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
    from tqdm import tqdm

    from ..evaluation.open_loop import StepCounter
    from .files import check_output_folder, read_picture, read_plan

    check_sampling(args)
    output = Path(args.output).expanduser()
    check_output_folder(output)
    pictures = [read_picture(path) for path in args.image]
    checkpoint = find_checkpoint(args.model, args.revision)
    processor = load_processor(checkpoint)
    robot = processor.get_embodiment(args.embodiment)
    if len(pictures) != robot.num_cameras:
        names = ", ".join(robot.cameras)
        raise UserError(f"--image takes one file a camera of {robot.name}: {names}; {len(pictures)} given")
    plan = read_plan(args.actions, robot.action_names, robot.action_dim)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        robot.encode(plan)
    for warning in caught:  # the plan leaves the range: said once, not at every step
        print(f"warning: {warning.message}", file=sys.stderr)

    model = load_model(checkpoint, args.device, args.dtype)
    began = time.perf_counter()
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
    seconds = time.perf_counter() - began
    steps = [frame if isinstance(frame, list) else [frame] for frame in frames]  # T lists of C pictures
    fps = args.fps or robot.control_hz or 10.0
    files = _write(output, steps, _first_frame(processor, pictures), robot.cameras, fps)
    print(f"{len(steps)} frames in {seconds:.1f} s; wrote {output / _GIF} and {files[0]} ... {files[-1].name}")
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
        "gif": output / _GIF,
        "fps": fps,
        "device": str(model.device),
        "seconds": seconds,
    }


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
