"""`worldvla predict`: pictures and an instruction in, a chunk of robot actions out."""

import argparse
import sys
import time
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
    positive_int,
    sampling_options,
)

_EPILOG = """\
examples:
  # the camera's picture of one control step ago and of now, the bundled small model
  worldvla predict --images previous.png current.png --instruction "put the bowl on the plate"
  # a checkpoint of one's own, five actions, to a file that `worldvla imagine --actions` reads
  worldvla predict --model my-checkpoint --images now.png --instruction "open the drawer" \\
      --num-actions 5 --output actions.csv
  # sampled, as JSON for another program
  worldvla predict --images now.png --instruction "open the drawer" --sample --temperature 0.7 --seed 1 --json

Pictures must have the orientation that the model was trained with; nothing is rotated here. With several cameras a time
step is one picture a camera, in the order of the embodiment.
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "predict",
        help="predict robot actions from pictures and an instruction",
        description="Predict a chunk of robot actions from camera pictures and an instruction.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--images", nargs="+", required=True, metavar="FILE", help="what the camera saw, oldest first")
    parser.add_argument("--instruction", required=True, metavar="TEXT", help="what the robot is to do")
    parser.add_argument("--num-actions", type=positive_int, metavar="K", help="length of the chunk (the checkpoint's)")
    parser.add_argument("--embodiment", metavar="E", help="whose actions, where the checkpoint has several")
    parser.add_argument("--output", metavar="FILE", help="also write the actions: .json (everything), .csv or .npy")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    add_model_arguments(parser)
    add_sampling_arguments(parser)
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    from .files import PLAN_SUFFIXES, check_output_file, read_picture, write_plan

    check_sampling(args)
    output = None if args.output is None else Path(args.output).expanduser()
    if output is not None:
        check_output_file(output, PLAN_SUFFIXES)
    pictures = [read_picture(path) for path in args.images]
    checkpoint = find_checkpoint(args.model, args.revision)
    processor = load_processor(checkpoint)
    robot = processor.get_embodiment(args.embodiment)
    inputs = processor(images=pictures, instruction=args.instruction, embodiment=robot.name)
    num_actions = args.num_actions or processor.num_actions
    if num_actions > processor.num_actions:
        print(f"note: the checkpoint was trained on chunks of {processor.num_actions} actions", file=sys.stderr)

    model = load_model(checkpoint, args.device, args.dtype)
    began = time.perf_counter()
    answer = model.generate_actions(
        **inputs.to(model.device),
        num_actions=num_actions,
        action_dim=robot.action_dim,
        return_dict_in_generate=True,
        **sampling_options(args, model.device),
    )
    actions = processor.decode_actions(answer.sequences, robot.name)[0]  # (K, D)
    seconds = time.perf_counter() - began
    logprobs = answer.logprobs[0].double().cpu()  # (K, D)
    document = {
        "model": checkpoint.name,
        "images": args.images,
        "instruction": args.instruction,
        "embodiment": robot.name,
        "control_hz": robot.control_hz,
        "semantics": robot.semantics,
        "action_names": list(robot.action_names) or [str(index) for index in range(robot.action_dim)],
        "units": list(robot.units),
        "actions": actions.tolist(),
        "confidence": logprobs.mean(-1).exp().tolist(),
        "probabilities": logprobs.exp().tolist(),
        "sampling": describe_sampling(args),
        "device": str(model.device),
        "seconds": seconds,
    }
    if output is not None:
        write_plan(output, document)
        print(f"wrote {output}", file=sys.stderr)
    print(format_table(document))
    return document


def format_table(document: dict[str, Any]) -> str:
    """The actions for people: a row a time step.

    The confidence of an action is the geometric mean of the probabilities of its bins among all 256.
    """
    rate = "" if document["control_hz"] is None else f", {document['control_hz']:g} a second"
    chunk = f"{len(document['actions'])} {document['semantics']} actions of {document['embodiment']}{rate}"
    rows = [["step", *document["action_names"], "confidence"]]
    if document["units"]:
        rows.append(["", *document["units"], ""])
    for step, (action, confidence) in enumerate(zip(document["actions"], document["confidence"], strict=True)):
        rows.append([str(step), *(f"{value:+.4f}" for value in action), f"{confidence:.1%}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([f'"{document["instruction"]}": {chunk}', *lines])
