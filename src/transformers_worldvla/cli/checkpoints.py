"""Where the commands that run a model find it: `--model`, `--device` and sampling, the same in each of them.

A folder is loaded with this installed code alone: no network, no code of the checkpoint's own, no question asked.
"""

import argparse
import json
import re
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


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """`--sample` and what goes with it; `sampling_options` reads them."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--sample", action="store_true", help="draw tokens at random instead of the likeliest ones")
    group.add_argument("--temperature", type=positive_float, metavar="X", help="above 1 more random (1.0)")
    group.add_argument("--top-k", type=positive_int, metavar="N", help="draw among the N likeliest (all)")
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
        return find_checkpoint(json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"])


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
    from transformers import PreTrainedConfig

    from ..configuration_worldvla import WorldVLAConfig
    from ..processing_worldvla import WorldVLAProcessor

    try:
        whole = checkpoint.whole
        config, _ = PreTrainedConfig.get_config_dict(whole.name, **whole.options)
        if (found := config.get("model_type")) != WorldVLAConfig.model_type:
            raise UserError(
                f"{checkpoint.name} is a checkpoint of model type {found!r}, not {WorldVLAConfig.model_type!r}: "
                "`worldvla convert` makes one of the authors' and of Chameleon's"
            )
        return WorldVLAProcessor.from_pretrained(checkpoint.name, **checkpoint.options)
    except (OSError, TypeError, KeyError) as error:
        where = "cannot be loaded" if checkpoint.is_folder else "no such folder, and not to be had from the Hub"
        raise UserError(f"{checkpoint.name}: {where}: {one_line(error)}") from error


def load_model(checkpoint: Checkpoint, device: str = "auto", dtype: str = "auto") -> Any:
    """The model of a checkpoint in evaluation mode. Raises UserError when weights are damaged or missing."""
    from safetensors import SafetensorError

    from ..modeling_worldvla import WorldVLAForCausalLM

    target = choose_device(device)
    try:
        model, info = WorldVLAForCausalLM.from_pretrained(
            checkpoint.name, dtype=dtype, output_loading_info=True, **checkpoint.options
        )
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"{checkpoint.name}: the weights cannot be loaded: {one_line(error)}") from error
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{checkpoint.name}: the weights lack {missing[0]} ({len(missing)} missing in all)")
    return model.to(target).eval()


def choose_device(device: str) -> Any:
    """The torch device of that name; "auto" is CUDA where there is some, else the CPU. UserError for one not here."""
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--device {device} cannot be used here: {reason}") from error
    return chosen


def sampling_options(args: argparse.Namespace, device: Any) -> dict[str, Any]:
    """Arguments of `generate_actions` and `generate_frames`."""
    import torch

    if not args.sample:
        return {}
    return {
        "do_sample": True,
        "temperature": args.temperature or 1.0,
        "top_k": args.top_k,
        "generator": torch.Generator(device).manual_seed(args.seed or 0),
    }


def check_sampling(args: argparse.Namespace) -> None:
    """Raise UserError for an option that does nothing without `--sample`."""
    for name in ("temperature", "top_k", "seed"):
        if getattr(args, name) is not None and not args.sample:
            raise UserError(f"--{name.replace('_', '-')} does nothing without --sample")


def describe_sampling(args: argparse.Namespace) -> dict[str, Any] | None:
    """How tokens were drawn, for a report; None when the likeliest were taken."""
    if not args.sample:
        return None
    return {"temperature": args.temperature or 1.0, "top_k": args.top_k, "seed": args.seed or 0}
