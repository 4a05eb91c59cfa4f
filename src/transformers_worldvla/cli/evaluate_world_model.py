"""`worldvla evaluate world-model`: rollouts of recorded actions beside what was recorded, in numbers and GIFs."""

import argparse
from pathlib import Path
from typing import Any

from .checkpoints import add_model_arguments, find_checkpoint, load_model, load_processor, positive_int
from .errors import UserError

_EPILOG = """\
examples:
  # the bundled checkpoint on its bundled episode, which it has not seen
  worldvla evaluate world-model --output runs/world-model
  # a checkpoint on the validation episodes of the cache that it was trained on
  worldvla evaluate world-model --model my-run --episodes my-dataset --cache my-cache --split val_ind --output runs/mine
  # some episodes, 10 frames, image tokens fed back instead of pictures, networks of LPIPS and FVD from a folder
  worldvla evaluate world-model --model M --episodes DATA --index 3 7 12 --horizons 10 --feedback tokens \\
      --weights metric-weights --output runs/tokens

Run again with the same settings, it goes on where it stopped. PSNR and SSIM need no network. LPIPS (vgg16-397923af.pth)
and FVD (i3d_torchscript.pt) fetch theirs from the Hub once; where that fails they are left out, which is said.
The folder gets episodes.jsonl (a row an episode and horizon), summary.json (what --json prints) and the GIFs.
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "world-model",
        help="imagined rollouts against recorded episodes: PSNR, SSIM, LPIPS, FVD",
        description="Imagine the frames that follow recorded frames under the recorded actions, and compare.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for rows, summary and GIFs")
    group = parser.add_argument_group("episodes")
    group.add_argument("--episodes", metavar="DATA", help="dataset: a folder or a Hub id (default: the bundled one)")
    group.add_argument("--index", type=int, nargs="+", metavar="N", help="which of its episodes (all)")
    group.add_argument("--split", choices=("train", "val_ind", "val_ood"), help="or a split of them")
    group.add_argument(
        "--split-rule", choices=("seeded", "authors"), default="seeded", help="how `tokenize` split them (%(default)s)"
    )
    group.add_argument("--split-seed", type=int, default=0, metavar="N", help="of the seeded rule (%(default)s)")
    group.add_argument("--cache", metavar="DIR", help="or the split that this frame-token cache was made with")
    group.add_argument("--embodiment", metavar="E", help="whose actions, where the checkpoint has several")
    group = parser.add_argument_group("protocol")
    group.add_argument(
        "--horizons", type=positive_int, nargs="+", default=[10, 50], metavar="N", help="frames of a clip (10 50)"
    )
    group.add_argument("--clips", type=positive_int, metavar="N", help="of an episode, at most (all, end to end)")
    group.add_argument(
        "--feedback",
        choices=("pixels", "tokens"),
        default="pixels",
        help="decode and encode each frame again, or feed image tokens back (%(default)s)",
    )
    group.add_argument(
        "--num-history", type=positive_int, default=1, metavar="N", help="(frame, action) pairs shown (%(default)s)"
    )
    group.add_argument(
        "--batch-size", type=positive_int, default=16, metavar="N", help="clips imagined at once (%(default)s)"
    )
    group.add_argument("--weights", metavar="DIR", help="folder with the networks of LPIPS and FVD, instead of the Hub")
    parser.add_argument("--gifs", type=int, default=4, metavar="N", help="episodes that are drawn (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    add_model_arguments(parser)
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    from ..assets import DEFAULT_EPISODE, bundled_folder
    from ..data import load_episodes
    from ..evaluation.world_model import Protocol, evaluate_world_model, find_instruments, format_summary
    from .demo import describe_checkpoint
    from .files import check_output_folder

    output = Path(args.output).expanduser()
    check_output_folder(output)
    checkpoint = find_checkpoint(args.model, args.revision)
    processor = load_processor(checkpoint)
    robot = processor.get_embodiment(args.embodiment)
    source = args.episodes or bundled_folder(DEFAULT_EPISODE)
    dataset = load_episodes(source, cameras=robot.cameras)
    chosen = choose_episodes(args, dataset)
    model = load_model(checkpoint, args.device, args.dtype)
    instruments = find_instruments(args.weights, model.device)
    protocol = Protocol(
        horizons=tuple(sorted(set(args.horizons))),
        feedback=args.feedback,
        num_history=args.num_history,
        clips=args.clips,
        batch_size=args.batch_size,
    )
    identity = {
        "checkpoint": describe_checkpoint(model, checkpoint),
        "revision": args.revision,
        "dtype": str(model.dtype),
        "dataset": dataset.fingerprint,
        "embodiment": robot.name,
    }
    summary = evaluate_world_model(
        model,
        processor,
        [dataset[position] for position in chosen],
        output,
        protocol,
        instruments,
        settings=identity,
        embodiment=robot.name,
        gifs=args.gifs,
        progress=True,
        draft="previous",
    )
    print(format_summary(summary))
    print(f"\nwrote {output}")
    return {"model": checkpoint.name, "dataset": str(source), "episodes_measured": chosen, **summary}


def choose_episodes(args: argparse.Namespace, dataset: Any) -> list[int]:
    """Positions of the episodes that were asked for. Raises UserError when there is none, or no such episode."""
    from ..data.cache import read_header
    from ..data.splits import name_trajectories, split_trajectories

    if args.split is None:
        if args.cache is not None:
            raise UserError("--cache does nothing without --split")
        chosen = list(range(len(dataset))) if args.index is None else sorted(set(args.index))
        if not all(0 <= position < len(dataset) for position in chosen):
            raise UserError(f"--index: {dataset.source} has the episodes 0 to {len(dataset) - 1}")
        return chosen
    if args.index is not None:
        raise UserError("--index and --split exclude each other")
    if args.cache is None:
        splits = split_trajectories(name_trajectories(dataset), rule=args.split_rule, seed=args.split_seed)
    else:
        header = read_header(Path(args.cache).expanduser())
        if header["dataset"]["fingerprint"] != dataset.fingerprint:
            raise UserError(f"--cache {args.cache} was not made from {dataset.source}")
        splits = header["split"]["episodes"]
    if not splits[args.split]:
        raise UserError(f"--split {args.split}: no episode of {dataset.source} belongs to it")
    return splits[args.split]
