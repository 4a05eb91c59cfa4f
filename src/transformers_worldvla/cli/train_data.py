"""The datasets of `worldvla train`: caches as they are, raw datasets tokenized first, and checked against the model."""

import argparse
import difflib
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from .errors import UserError


def split_weight(text: str) -> tuple[str, float | None]:
    """`data:3` -> ("data", 3.0); a folder whose own name ends like that is taken as it is."""
    name, colon, weight = text.rpartition(":")
    if colon and name and re.fullmatch(r"\d*\.?\d+", weight) and not Path(text).expanduser().exists():
        return name, float(weight)
    return text, None


def open_sources(args: argparse.Namespace, checkpoint: Any, processor: Any, output: Path | None) -> list[Any]:
    """The datasets of a run, each checked to hold the codes that this model would make.

    A raw dataset is tokenized into OUTPUT/cache; in a dry run only its plan is made, and its pictures stay blank.
    """
    from ..data.image_tokenizer import load_image_tokenizer
    from ..training.datasets import Source

    whole = checkpoint.whole
    vqvae = load_image_tokenizer(whole.name, **whole.options)
    image_tokenizer = SimpleNamespace(model=SimpleNamespace(vqmodel=vqvae))  # all of a model that `verify` looks at
    sources = []
    for number, text in enumerate(args.dataset):
        name, weight = split_weight(text)
        cache = _find_cache(name)
        if cache is None and args.dry_run:
            sources.append(_plan_source(name, weight, checkpoint, processor))
            continue
        if cache is None:
            cache = _tokenize(name, _cache_folder(output, number, name), checkpoint, args)
        sources.append(Source.from_cache(cache.verify(image_tokenizer, processor), weight))
    return sources if args.instructions is None else _choose(sources, args.instructions)


def _choose(sources: list[Any], instructions: list[str]) -> list[Any]:
    """Of every dataset the episodes with one of these instructions; a dataset that has none is left out."""
    told = [{episode.instruction for episode in source.splits["train"]} for source in sources]
    known = set().union(*told)
    if unknown := sorted(set(instructions) - known):
        nearest = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f', did you mean "{nearest[0]}"?' if nearest else f'; there are {len(known)}, such as "{min(known)}"'
        raise UserError(f'--instructions: no training episode has "{unknown[0]}"{hint}')
    return [each.choose(instructions) for each, texts in zip(sources, told, strict=True) if texts & set(instructions)]


def _find_cache(name: str) -> Any:
    """The cache of that name; None when it names something else."""
    from ..data import FrameTokenCache
    from ..data.cache import is_unfinished

    try:
        return FrameTokenCache(name)
    except FileNotFoundError:
        if is_unfinished(Path(name).expanduser()):
            raise
        return None


def _cache_folder(output: Path | None, number: int, name: str) -> Path:
    if output is None:
        raise UserError("--output DIR is needed")
    short = re.sub(r"[^\w.-]+", "-", name if not Path(name).exists() else Path(name).resolve().name).strip("-.")
    return output / "cache" / f"{number}-{short or 'dataset'}"


def _tokenize_arguments(name: str, checkpoint: Any, *more: str) -> argparse.Namespace:
    """As `worldvla tokenize NAME --model CHECKPOINT` would be parsed."""
    from . import tokenize
    from .main import OneLineParser

    parser = OneLineParser(prog="worldvla train")
    tokenize.add_parser(parser.add_subparsers())
    revision = ["--revision", checkpoint.revision] if checkpoint.revision else []
    return parser.parse_args(["tokenize", name, "--model", checkpoint.name, *revision, *more])


def _tokenize(name: str, folder: Path, checkpoint: Any, args: argparse.Namespace) -> Any:
    from ..data import FrameTokenCache
    from . import tokenize

    device = ["--device", "cpu"] if args.cpu else []
    tokenize.run(_tokenize_arguments(name, checkpoint, "--output", str(folder), *device))
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()  # the first rank ends the cache
    return FrameTokenCache(folder)


def _plan_source(name: str, weight: float | None, checkpoint: Any, processor: Any) -> Any:
    """The dataset as tokenizing would choose it, every frame blank: lengths, text and actions are the real ones."""
    from ..action_tokenization_worldvla import Embodiment
    from ..data import TokenizedEpisode, load_episodes
    from ..data.preparation import moving_steps
    from ..training.datasets import Source
    from . import tokenize

    header = tokenize.run(_tokenize_arguments(name, checkpoint, "--dry-run"))
    dataset = load_episodes(name, None, header["cameras"], streaming=True)
    robot, preparation = Embodiment.from_dict(header["embodiment"]), header["preparation"]
    height, width = header["image_transform"]["codes"]
    splits: dict[str, list[Any]] = {}
    for split, positions in header["split"]["episodes"].items():
        splits[split] = []
        for position in positions:
            episode = dataset[position]
            actions = episode.actions
            if preparation["no_ops"] == "authors":
                actions = actions[moving_steps(actions, preparation["gripper"])]
            blank = np.int32(processor.tokens.image_codes[0])
            frames = np.broadcast_to(blank, (len(actions), robot.num_cameras, height, width))
            splits[split].append(TokenizedEpisode(episode.index, episode.instruction, frames, actions, robot.name))
    return Source(robot.name, robot, header["fingerprint"], splits, weight)
