"""`worldvla doctor`: what is wrong with a checkpoint, and with a dataset and a simulator beside it, before it costs."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoints import DTYPES, Checkpoint, add_device_argument, find_checkpoint, positive_int
from .errors import UserError

if TYPE_CHECKING:
    from ..data import EpisodeDataset, EpisodeError

PICTURE = "worldvla-doctor.png"
_EPILOG = """\
examples:
  # files, weights, code, versions; does it see pictures and read instructions; does it survive saving
  worldvla doctor my-checkpoint
  # beside the data that it is to be trained or run on: names, ranges, pauses, orientation; writes a picture of it
  worldvla doctor my-checkpoint --dataset my-recordings
  # beside the simulator that it is evaluated in
  worldvla doctor me/worldvla-goal --dataset lerobot/libero --simulator libero
  # for a script: exit code 1 when a check failed, 0 when none did
  worldvla doctor my-checkpoint --dataset my-recordings --json > doctor.json

Exit code 0: no check failed (warnings may be there), 1: a check failed, 2: there is nothing to check.
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "doctor",
        help="check a checkpoint, a dataset and a simulator",
        description="Check a checkpoint by itself, beside a dataset and beside a simulator. Says what to do about it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a folder or a Hub id, of a model or an adapter")
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit of the checkpoint")
    parser.add_argument("--dataset", metavar="D", help="recordings: a folder or a Hub id")
    parser.add_argument("--dataset-revision", metavar="R", help="branch, tag or commit of the dataset")
    parser.add_argument("--simulator", choices=("libero", "metaworld"), help="that the checkpoint is to run in")
    parser.add_argument("--embodiment", metavar="E", help="whose actions, where the checkpoint has several")
    parser.add_argument(
        "--moments", type=positive_int, default=8, metavar="N", help="of the recordings to probe with (%(default)s)"
    )
    parser.add_argument(
        "--picture", metavar="FILE", help=f"what the model sees beside a recorded frame ({PICTURE}, with --dataset)"
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    add_device_argument(parser)
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights (default: as they are stored)")
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    from tqdm import tqdm

    from ..diagnosis import Patient, diagnose
    from ..serving.loading import choose_device
    from .files import check_output_file

    if args.picture is not None and args.dataset is None:
        raise UserError("--picture shows a recorded frame: it needs --dataset")
    if args.dataset_revision is not None and args.dataset is None:
        raise UserError("--dataset-revision does nothing without --dataset")
    picture = None if args.dataset is None else Path(args.picture or PICTURE).expanduser()
    if picture is not None:
        check_output_file(picture, (".png", ".jpg", ".webp"))
    folder = _find_folder(args.checkpoint, args.revision)
    patient = Patient(
        folder=folder,
        dataset=None if args.dataset is None else _open_dataset(args.dataset, args.dataset_revision),
        simulator=args.simulator,
        embodiment=args.embodiment,
        device=choose_device(args.device),
        dtype=args.dtype,
        moments=args.moments,
        picture=picture,
    )
    with tqdm(bar_format="{desc} ({elapsed})", file=sys.stderr, leave=False) as bar:
        diagnosis = diagnose(patient, on_check=lambda name: bar.set_description_str(f"checking: {name}"))
    print(diagnosis)
    written = picture if picture is not None and picture.is_file() else None
    if written is not None:
        print(f"wrote {written}")
    args.exit_code = int(diagnosis.has_failed)
    names = {"checkpoint": args.checkpoint, "dataset": args.dataset, "simulator": args.simulator}
    return {**names, "ok": not diagnosis.has_failed, "picture": written, **diagnosis.to_dict()}


def _find_folder(checkpoint: str, revision: str | None) -> Path:
    """The folder of a checkpoint; that of a Hub id is downloaded. Raises UserError when there is none.

    What is missing inside it is for the checks to say.
    """
    folder = Path(checkpoint).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise UserError(f"--revision belongs to Hub ids, {folder} is a folder")
        if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise UserError(f"{folder} holds no checkpoint: neither config.json nor adapter_config.json is there")
        return folder
    return _download(find_checkpoint(checkpoint, revision))


def _download(checkpoint: Checkpoint) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(checkpoint.name, revision=checkpoint.revision))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{checkpoint.name}: no such folder, and not to be had from the Hub: {reason}") from error


def _open_dataset(dataset: str, revision: str | None) -> "EpisodeDataset | EpisodeError":
    """The recordings; the damage, where they cannot be opened for it. Raises FileNotFoundError when there are none."""
    from ..data import EpisodeError, load_episodes

    try:
        return load_episodes(dataset, revision)
    except EpisodeError as error:
        return error
