"""What `worldvla evaluate libero` and `worldvla evaluate gym` share: options, the model, the report."""

import argparse
import hashlib
import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoints import (
    DTYPES,
    Checkpoint,
    add_device_argument,
    add_sampling_arguments,
    check_sampling,
    find_checkpoint,
    load_model,
    load_processor,
    positive_int,
    sampling,
)
from .errors import UserError

SCRIPTED = ("expert", "noop")
GPU_BATCH_SIZE = 8


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """`--model` and how it answers, `--trials`, `--seed`, `--output`, `--workers`, videos, `--json`."""
    parser.add_argument("--output", required=True, metavar="DIR", help="result folder; a run that was cut off goes on")
    parser.add_argument("--seed", type=_natural, default=0, metavar="S", help="of all that is random (%(default)s)")
    parser.add_argument("--workers", type=positive_int, metavar="W", help="simulators beside each other (CPU cores)")
    parser.add_argument("--max-steps", type=positive_int, metavar="N", help="steps of an episode (the benchmark's)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        metavar="M",
        help="checkpoint: a folder or a Hub id (default: the bundled small one); or `expert`, the scripted expert that "
        "reads the simulator's state; or `noop`, a robot that keeps still",
    )
    group.add_argument("--revision", metavar="R", help="branch, tag or commit of a Hub id")
    add_device_argument(group)
    group.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights (default: as they are stored)")
    group.add_argument("--embodiment", metavar="E", help="whose actions, where the checkpoint has several")
    group.add_argument("--num-actions", type=positive_int, metavar="K", help="actions a query (the checkpoint's)")
    group.add_argument(
        "--batch-size",
        type=positive_int,
        metavar="B",
        help=f"rows of every model call (1, on a GPU {GPU_BATCH_SIZE}); 1 where rows influence one another",
    )
    add_sampling_arguments(parser, seed=False)
    videos = parser.add_argument_group("videos, drawn after an episode by carrying out its actions again")
    videos.add_argument("--videos", type=_natural, default=1, metavar="N", help="of failures, a task (%(default)s)")
    videos.add_argument("--success-videos", type=_natural, default=0, metavar="N", help="of successes (%(default)s)")
    videos.add_argument("--video-format", choices=("mp4", "gif"), default="mp4", help="(%(default)s)")


def parse_numbers(text: str, option: str) -> list[int]:
    """`3,5-7` -> 3, 5, 6, 7. Raises UserError that names the option."""
    numbers: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if found is None or (found[2] is not None and int(found[2]) < int(found[1])):
            raise UserError(f"{option} {text}: give numbers and ranges, such as 1,4 or 0-9")
        numbers += range(int(found[1]), int(found[2] or found[1]) + 1)
    return sorted(set(numbers))


def parse_trials(text: str) -> list[int]:
    """`20` -> trials 0 to 19; `30-49` and `3,7` -> those. Raises UserError."""
    if text.strip().isdecimal():
        if int(text) == 0:
            raise UserError("--trials 0: there is at least one trial")
        return list(range(int(text)))
    return parse_numbers(text, "--trials")


def count_workers(args: argparse.Namespace) -> int:
    return args.workers or len(
        os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    )


@dataclass(frozen=True)
class Controller:
    """What acts in the episodes: `policy` of `workers.POLICIES`; for a checkpoint its parts, and what to write down."""

    policy: str
    settings: Mapping[str, Any]
    checkpoint: Checkpoint | None = None
    processor: Any = None
    robot: Any = None


def read_controller(args: argparse.Namespace) -> Controller:
    """What `--model` names. The model itself is loaded later, so that mistakes in other options show at once."""
    check_sampling(args, ("temperature", "top_k"))
    if args.model in SCRIPTED:
        unused = [name for name in ("revision", "embodiment", "num_actions", "batch_size") if getattr(args, name)]
        if unused or args.sample:
            option = unused[0] if unused else "sample"
            raise UserError(f"--{option.replace('_', '-')} belongs to checkpoints, --model {args.model} is scripted")
        return Controller(args.model, {"model": args.model, "versions": versions()})
    checkpoint = find_checkpoint(args.model, args.revision)
    processor = load_processor(checkpoint)
    robot = processor.get_embodiment(args.embodiment)
    settings = {
        "model": Path(checkpoint.name).name if checkpoint.is_folder else checkpoint.name,
        "embodiment": robot.name,
        "num_actions": args.num_actions or processor.num_actions,
        "history": processor.history,
        "sampling": sampling(args) or None,
        "dtype": args.dtype,
        "versions": versions(),
    }
    return Controller("frames", settings, checkpoint, processor, robot)


def load_planner(
    args: argparse.Namespace, controller: Controller, instructions: Mapping[str, Sequence[str]]
) -> tuple[Any, dict[str, Any]]:
    """The planner of a checkpoint, and what else belongs into the settings of the run.

    Where rows of a batch influence one another on this machine, the batch size becomes 1.
    """
    from ..evaluation.policies import ModelPlanner

    assert controller.checkpoint is not None
    model = load_model(controller.checkpoint, args.device, args.dtype)
    batch_size = args.batch_size or (GPU_BATCH_SIZE if model.device.type == "cuda" and not args.sample else 1)
    options = {"embodiment": args.embodiment, "num_actions": args.num_actions, "sampling": sampling(args)}
    planner = ModelPlanner(model, controller.processor, instructions, batch_size=batch_size, **options)
    if batch_size > 1 and not planner.batch_is_independent(next(iter(instructions))):
        print(
            f"note: here a row of a batch of {batch_size} depends on the other rows: the batch size is 1, so that "
            "results do not depend on what runs beside them",
            file=sys.stderr,
        )
        planner = ModelPlanner(model, controller.processor, instructions, batch_size=1, **options)
    found = {
        "checkpoint": hash_checkpoint(controller.checkpoint),
        "batch_size": planner.batch_size,
        "device": model.device.type,
    }
    return planner, found


def hash_checkpoint(checkpoint: Checkpoint) -> str:
    """SHA-256 over all that decides what a checkpoint does: weights, configuration, processor and tokenizer."""
    folder = Path(checkpoint.name)
    if not checkpoint.is_folder:
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(checkpoint.name, revision=checkpoint.revision, local_files_only=True))
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")]):
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Of what decides a model's answers; environments add theirs."""
    import torch
    import transformers

    from .. import __version__

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "transformers_worldvla": __version__,
    }


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 on")
    return int(text)
