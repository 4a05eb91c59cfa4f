"""`worldvla tokenize`: every frame of a dataset encoded once, into a cache that training reads instead of pictures."""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from .checkpoints import (
    add_device_argument,
    find_checkpoint,
    load_processor,
    positive_int,
)
from .errors import UserError

_EPILOG = """\
examples:
  # what would be kept, split and clipped; nothing is encoded
  worldvla tokenize lerobot/libero --cameras image --dry-run
  # encode it, on the GPU if there is one; run the same again after an interruption and it goes on
  worldvla tokenize my-dataset --model my-checkpoint --output my-cache
  # LIBERO as the authors prepare it, for a converted checkpoint of theirs: their ranges, their split
  worldvla tokenize libero_goal_hdf5 --model worldvla-7b --output goal --statistics checkpoint --split authors
  # absolute joint positions, quantile ranges, four processes (two a GPU on two GPUs), published
  worldvla tokenize me/so101 --model my-checkpoint --output cache --semantics absolute \\
      --statistics quantile --processes 4 --push-to-hub me/so101-tokens
  # two caches of changed pictures to train on beside the plain one: worldvla train --dataset cache --dataset crop1 ...
  worldvla tokenize my-dataset --augment 1 --output crop1
  worldvla tokenize my-dataset --augment 2 --output crop2
  # several machines on one file system
  torchrun --nnodes 2 --nproc-per-node 8 -m transformers_worldvla.cli tokenize my-dataset --output shared/cache

DATASET is a folder (LeRobot, LIBERO HDF5, pictures and actions) or a dataset repository of the Hub.
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "tokenize",
        help="encode every frame of a dataset once, for training",
        description="Choose, split and encode the frames of a dataset into a cache of image tokens, actions and state.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("dataset", metavar="DATASET", help="a folder or a Hub id")
    parser.add_argument("--output", metavar="DIR", help="where the cache goes")
    parser.add_argument("--push-to-hub", metavar="REPO", help="upload the cache as a dataset repository")
    parser.add_argument("--private", action="store_true", help="make that repository private")
    parser.add_argument("--dry-run", action="store_true", help="print counts, split, statistics and stop")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    _add_data_arguments(parser.add_argument_group("data"))
    _add_robot_arguments(parser.add_argument_group("robot"))
    group = parser.add_argument_group("model")
    group.add_argument("--model", metavar="M", help="checkpoint: a folder or a Hub id (default: the bundled small one)")
    group.add_argument("--revision", metavar="R", help="branch, tag or commit of the checkpoint")
    add_device_argument(group)
    group.add_argument("--batch-size", type=positive_int, default=32, metavar="N", help="pictures (%(default)s)")
    group.add_argument("--processes", type=positive_int, default=1, metavar="N", help="that share the work")
    return parser


def _add_data_arguments(group: Any) -> None:
    group.add_argument("--dataset-revision", metavar="R", help="branch, tag or commit of the dataset")
    group.add_argument(
        "--cameras",
        nargs="+",
        metavar="C",
        help="of a time step, in order (the checkpoint's if all are there, else all); image=agentview_rgb renames one",
    )
    group.add_argument(
        "--no-ops", choices=("authors", "keep"), help="drop them by the authors' rule (the default for delta actions)"
    )
    group.add_argument("--unsuccessful", choices=("drop", "keep"), default="drop", help="episodes (%(default)s)")
    group.add_argument(
        "--split",
        choices=("seeded", "authors", "none"),
        default="seeded",
        help="into train, val_ind, val_ood (%(default)s)",
    )
    group.add_argument("--seed", type=int, metavar="N", help="of the seeded split (0)")
    group.add_argument("--val-share", type=_share, metavar="X", help="of the seeded split: episodes in val_ind (0.1)")
    group.add_argument("--ood-share", type=_share, metavar="X", help="of the seeded split: tasks in val_ood (0.1)")

    group.add_argument(
        "--augment",
        type=_seed,
        metavar="N",
        help="instead of the plain cache one to train on beside it: its training episodes, pictures changed by chance "
        "(crop, colours; an episode's alike); another N, other changes",
    )
    group.add_argument(
        "--augment-colours", type=_colours, metavar="X", help="share of the usual change of colours, 0: none (1)"
    )


def _add_robot_arguments(group: Any) -> None:
    group.add_argument(
        "--statistics",
        choices=("minmax", "quantile", "checkpoint"),
        default="minmax",
        help="action ranges: of the training episodes, or the checkpoint's (%(default)s)",
    )
    group.add_argument(
        "--embodiment", metavar="E", help="of the checkpoint, whose names, units and gripper these are too"
    )
    group.add_argument("--name", metavar="E", help="of the embodiment that this makes (the dataset's)")
    group.add_argument("--semantics", choices=("delta", "absolute"), help="of the actions (delta)")
    group.add_argument(
        "--rotation",
        type=int,
        choices=(0, 90, 180, 270),
        metavar="DEG",
        help="that the robot's raw camera pictures need; this dataset's are upright already (0)",
    )
    group.add_argument(
        "--raw-cameras", nargs="+", metavar="C", help="what the robot or simulator calls the cameras (the same)"
    )
    group.add_argument("--gripper", metavar="I", help='its dimension for the no-op rule, a number, a name or "none"')


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 to below 1")
    return value


def _colours(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 5:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 to 5")
    return value


def _seed(text: str) -> int:
    if not (text.isdecimal() and text.isascii()):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number >= 0")
    return int(text)


def run(args: argparse.Namespace) -> dict[str, Any]:
    from ..data.cache_plan import plan_cache
    from ..data.image_tokenizer import load_image_tokenizer

    rank, world_size = read_ranks(args.processes)
    output = _check_output(args)
    device = _rank_device(args.device, world_size)
    checkpoint = find_checkpoint(args.model, args.revision)
    processor = load_processor(checkpoint)
    template = _find_template(processor, args)
    dataset = _open_dataset(args, processor, template)
    load = partial(load_image_tokenizer, checkpoint.name, **checkpoint.options)
    vqvae = load()
    options = _cache_options(args, device, dataset, template)
    with progress("reading actions", "episode", len(dataset), rank == 0) as advance:
        plan = plan_cache(
            dataset, processor.image_processor, vqvae, options, template, on_episode=lambda done, total: advance(1)
        )
    if rank == 0:
        print(plan)
    document = {"model": checkpoint.name, **plan.header}
    if output is None:
        return document
    document |= _encode(plan, output, vqvae, load, device, args.processes, rank, world_size)
    if args.push_to_hub and rank == 0:
        document["repository"] = push(output, args.push_to_hub, args.private)
    return document


# -------------------------------------------------------------------- what was asked for


def read_ranks(processes: int) -> tuple[int, int]:
    """RANK and WORLD_SIZE, as torchrun sets them; (0, 1) without."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1 and processes > 1:
        raise UserError(f"--processes {processes}: the {world_size} ranks share the work already")
    return rank, world_size


def _check_output(args: argparse.Namespace) -> Path | None:
    """The folder to write, None for a dry run."""
    from .files import check_output_folder

    if args.dry_run:
        return None
    if args.output is None:
        raise UserError("--output DIR is needed (or --dry-run)")
    if args.private and not args.push_to_hub:
        raise UserError("--private does nothing without --push-to-hub")
    output = Path(args.output).expanduser()
    check_output_folder(output)
    return output


def _rank_device(device: str, world_size: int) -> Any:
    """The device of this process: under torchrun, each rank's own GPU."""
    from ..serving.loading import choose_device

    chosen = choose_device(device)
    if chosen.type == "cuda" and chosen.index is None and world_size > 1:
        import torch

        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    return chosen


def _find_template(processor: Any, args: argparse.Namespace) -> Any:
    """The embodiment of the checkpoint that says what a dataset does not, None when none is asked for."""
    if args.embodiment is None and args.statistics != "checkpoint":
        return None
    return processor.get_embodiment(args.embodiment)


def _open_dataset(args: argparse.Namespace, processor: Any, template: Any) -> Any:
    from ..data import load_episodes

    if args.cameras is not None:
        return load_episodes(args.dataset, args.dataset_revision, args.cameras)
    known = load_episodes(args.dataset, args.dataset_revision, streaming=True).cameras
    cameras = known
    if template is not None or processor.default_embodiment or len(processor.embodiments) == 1:
        wanted = (template or processor.get_embodiment()).cameras
        cameras = wanted if set(wanted) <= set(known) else known
    return load_episodes(args.dataset, args.dataset_revision, cameras)


def _cache_options(args: argparse.Namespace, device: Any, dataset: Any, template: Any) -> Any:
    from ..data.cache_plan import CacheOptions

    given = {name: getattr(args, name) for name in ("seed", "val_share", "ood_share")}
    given = {name: value for name, value in given.items() if value is not None}
    if given and args.split != "seeded":
        raise UserError(f"--{next(iter(given)).replace('_', '-')} belongs to --split seeded, not {args.split}")
    if args.augment_colours is not None:
        if args.augment is None:
            raise UserError("--augment-colours does nothing without --augment N")
        given["augment_colours"] = args.augment_colours
    return CacheOptions(
        augment=args.augment,
        no_ops=args.no_ops,
        unsuccessful=args.unsuccessful,
        gripper=_gripper_index(args.gripper, template, dataset),
        split=args.split,
        statistics=args.statistics,
        name=args.name,
        semantics=args.semantics,
        rotation=args.rotation,
        raw_cameras=None if args.raw_cameras is None else tuple(args.raw_cameras),
        batch_size=args.batch_size,
        device=device.type,
        **given,
    )


def _gripper_index(text: str | None, template: Any, dataset: Any) -> int | None:
    """`--gripper` as `CacheOptions` wants it."""
    if text is None or text == "none":
        return None if text is None else -1
    if text.isdecimal():
        return int(text)
    names = (template.action_names if template else ()) or dataset.action_names or ()
    if text not in names:
        raise UserError(f'--gripper {text}: a dimension\'s number, "none", or one of {", ".join(names) or "no names"}')
    return list(names).index(text)


# -------------------------------------------------------------------- work


def _encode(
    plan: Any,
    output: Path,
    vqvae: Any,
    load: Callable[[], Any],
    device: Any,
    processes: int,
    rank: int,
    world_size: int,
) -> dict[str, Any]:
    """Encode what is missing, this rank's share of it; the first rank ends the cache. Returns what was measured."""
    from ..data.cache import FrameTokenCache
    from ..data.cache_writer import (
        begin_cache,
        cache_size,
        encode_episodes,
        encode_in_processes,
        finish_cache,
        missing_episodes,
        wait_for_ranks,
    )

    began, cameras = time.perf_counter(), len(plan.cameras)
    is_finished = begin_cache(plan, output)
    missing = [] if is_finished else missing_episodes(plan, output)
    share = [each for each in missing if each.position % world_size == rank]
    total, here = (sum(map(len, episodes)) * cameras for episodes in (missing, share))
    if rank == 0 and total < plan.num_pictures:
        print(f"{plan.num_pictures - total} of {plan.num_pictures} frames are there already", file=sys.stderr)
    with progress("encoding", "frame", total, rank == 0) as advance:
        if processes > 1 and share:
            encode_in_processes(plan, share, output, load, spread(device, processes), advance)
        else:
            encode_episodes(plan, share, output, vqvae.to(device), advance)
        seconds = time.perf_counter() - began
        if rank == 0 and not is_finished:
            wait_for_ranks(plan, output, lambda steps: advance(steps * cameras))
    measured: dict[str, Any] = {
        "rank": rank,
        "frames_encoded": here,
        "seconds": seconds,
        "frames_per_second": here / seconds,
    }
    if rank != 0:
        return measured
    if not is_finished:
        finish_cache(plan, output)
    cache = FrameTokenCache(output)
    size, frames = cache_size(output, cache.header), plan.num_pictures
    measured |= {"output": str(output), "frames": frames, "bytes": size, "bytes_per_frame": size / frames}
    rate = f", {measured['frames_per_second']:.0f} frames/s" if here else ""
    print(f"{output}: {frames} frames, {size / frames:.0f} bytes a frame{rate}")
    return measured


def spread(device: Any, processes: int) -> list[str]:
    """The device of each process: all GPUs in turn, unless one is named."""
    if device.type == "cuda" and device.index is None:
        import torch

        return [f"cuda:{number % torch.cuda.device_count()}" for number in range(processes)]
    return [str(device)] * processes


@contextmanager
def progress(title: str, unit: str, total: int, shown: bool) -> Iterator[Callable[[int], object]]:
    """A bar on stderr; yields the function that moves it on."""
    from tqdm import tqdm

    with tqdm(desc=title, unit=f" {unit}s", total=total, disable=not shown, file=sys.stderr) as bar:
        yield bar.update


def push(folder: Path, repository: str, private: bool) -> str:
    """Upload a finished cache; returns the address of the commit. Raises ValueError when the Hub refuses."""
    from ..publishing import upload_folder
    from ..publishing.folder import CACHE, STALE

    address = upload_folder(folder, repository, "dataset", private, delete=STALE[CACHE])
    print(f"pushed to {address}")
    return address
