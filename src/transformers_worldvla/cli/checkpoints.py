"""Where the commands that run a model find it: `--model`, `--device` and sampling, the same in each of them.

A folder is loaded with this installed code alone: no network, no code of the checkpoint's own, no question asked.
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UserError, one_line

ADAPTER_CONFIG = "adapter_config.json"
DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """`--model`, `--revision`, `--device` and `--dtype`."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", metavar="M", help="checkpoint: a folder or a Hub id (default: the bundled small one)")
    group.add_argument("--revision", metavar="R", help="branch, tag or commit of a Hub id")
    add_device_argument(group)
    group.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights (default: as they are stored)")


def add_device_argument(parser: Any) -> None:
    parser.add_argument(
        "--device", default="auto", metavar="D", help="cpu, cuda, cuda:1, mps ... (default: cuda if any)"
    )


def add_sampling_arguments(parser: argparse.ArgumentParser, seed: bool = True) -> None:
    """`--sample` and what goes with it, for `sampling_options`; without `--seed` for a command that has its own."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--sample", action="store_true", help="draw tokens at random instead of the likeliest ones")
    group.add_argument("--temperature", type=positive_float, metavar="X", help="above 1 more random (1.0)")
    group.add_argument("--top-k", type=positive_int, metavar="N", help="draw among the N likeliest (all)")
    if seed:
        group.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same answer (0)")


def positive_int(text: str) -> int:
    """An argument that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def positive_float(text: str) -> float:
    """An argument that measures something."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return value


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was named: a folder, or a Hub id at a revision."""

    name: str
    is_folder: bool
    revision: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of every `from_pretrained`."""
        return {"local_files_only": True} if self.is_folder else {"revision": self.revision}

    @property
    def whole(self) -> "Checkpoint":
        """The checkpoint with all weights: itself, or the base of an adapter's folder."""
        file = Path(self.name) / ADAPTER_CONFIG
        if not self.is_folder or not file.is_file():
            return self
        from ..serving.loading import adapter_base

        return find_checkpoint(adapter_base(self.name))


def find_checkpoint(model: str | None, revision: str | None = None) -> Checkpoint:
    """The checkpoint of that name; the bundled one for None.

    Raises UserError when it is neither a folder with a checkpoint nor a possible Hub id.
    """
    if model is None:
        from ..assets import DEFAULT_CHECKPOINT, bundled_folder

        folder = bundled_folder(DEFAULT_CHECKPOINT)
    else:
        folder = Path(model).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise UserError(f"--revision belongs to Hub ids, {folder} is a folder")
        config = ADAPTER_CONFIG if (folder / ADAPTER_CONFIG).is_file() else "config.json"
        missing = [name for name in (config, "processor_config.json") if not (folder / name).is_file()]
        if missing:
            raise UserError(f"{folder} holds no WorldVLA checkpoint: {' and '.join(missing)} missing")
        return Checkpoint(str(folder), is_folder=True)
    if folder.exists():
        raise UserError(f"{model} is a file: a checkpoint is a folder or a Hub id")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(model)):
        raise UserError(f"{model}: no such folder, and no Hub id (owner/name)")
    return Checkpoint(str(model), is_folder=False, revision=revision)


def load_processor(checkpoint: Checkpoint) -> Any:
    """The processor of a checkpoint. Raises UserError when there is none of WorldVLA."""
    from ..serving import loading

    try:
        return loading.load_processor(checkpoint.name, checkpoint.revision)
    except (OSError, TypeError, KeyError) as error:
        where = "cannot be loaded" if checkpoint.is_folder else "no such folder, and not to be had from the Hub"
        raise UserError(f"{checkpoint.name}: {where}: {one_line(error)}") from error


def load_model(checkpoint: Checkpoint, device: str = "auto", dtype: str = "auto") -> Any:
    """The model of a checkpoint or adapter in evaluation mode. ValueError when weights are damaged or missing."""
    from ..serving import loading

    return loading.load_model(checkpoint.name, checkpoint.revision, loading.choose_device(device), dtype)


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `generate_actions` and `generate_frames`; none for the likeliest tokens. No generator."""
    if not args.sample:
        return {}
    return {"do_sample": True, "temperature": args.temperature or 1.0, "top_k": args.top_k}


def sampling_options(args: argparse.Namespace, device: Any) -> dict[str, Any]:
    """`sampling`, with a generator that `--seed` starts."""
    import torch

    if not args.sample:
        return {}
    return {**sampling(args), "generator": torch.Generator(device).manual_seed(args.seed or 0)}


def check_sampling(args: argparse.Namespace, names: Sequence[str] = ("temperature", "top_k", "seed")) -> None:
    """Raise UserError for an option that does nothing without `--sample`."""
    for name in names:
        if getattr(args, name) is not None and not args.sample:
            raise UserError(f"--{name.replace('_', '-')} does nothing without --sample")


def describe_sampling(args: argparse.Namespace) -> dict[str, Any] | None:
    """How tokens were drawn, for a report; None when the likeliest were taken."""
    if not args.sample:
        return None
    return {"temperature": args.temperature or 1.0, "top_k": args.top_k, "seed": args.seed or 0}
