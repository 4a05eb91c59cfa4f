"""`worldvla train`: fine-tune or pre-train a checkpoint on robot data, with an adapter or whole."""

import argparse
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .checkpoints import find_checkpoint, load_processor, positive_float, positive_int
from .errors import UserError

RECIPE_NAMES = ("lora", "qlora", "full", "authors")  # of training.recipes, which needs torch to be imported

_EPILOG = """\
examples:
  # what would happen: sequence lengths, memory, steps, one sample in words
  worldvla train --dataset my-cache --model my-checkpoint --dry-run
  # LoRA on one GPU from a dataset of the Hub, which is tokenized first; run it again after a kill and it goes on
  worldvla train --dataset me/my-robot --model worldvla-7b --output runs/my-robot
  # two robots, the second three times as often; the adapter is also merged into a checkpoint of its own
  worldvla train --dataset arm-cache --dataset gantry-cache:3 --model worldvla-7b --output runs/two --merge
  # the authors' recipe on eight GPUs
  torchrun --nproc-per-node 8 -m transformers_worldvla.cli train --recipe authors --dataset goal-cache \\
      --model starting-point --output runs/goal
  # paper Table 6: pre-train the world model, then go on from it with actions
  worldvla train --recipe full --kinds world --dataset cache --model base --output runs/world
  worldvla train --recipe full --kinds action --dataset cache --start-from runs/world --output runs/action

--dataset is a cache made by `worldvla tokenize` (which has the options of preparation), or a raw dataset, which is then
tokenized with that command's defaults into OUTPUT/cache. `:3` is its weight: its share of the samples is 3 to 1 of each
other. The first dataset's robot becomes the checkpoint's default.
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "train",
        help="train a checkpoint on robot data",
        description="Train a WorldVLA checkpoint on one or more datasets of robot episodes.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--dataset", action="append", required=True, metavar="D[:W]", help="a cache, folder or Hub id; repeatable"
    )
    parser.add_argument(
        "--instructions", nargs="+", metavar="TEXT", help="train on the episodes with one of these only (all)"
    )
    parser.add_argument(
        "--model", "--start-from", metavar="M", help="checkpoint or adapter to start from (default: the bundled one)"
    )
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit of a Hub id")
    parser.add_argument("--output", metavar="DIR", help="folder of the run and of the trained checkpoint")
    recipe = parser.add_mutually_exclusive_group()
    recipe.add_argument("--recipe", choices=RECIPE_NAMES, default="lora", help="hyper-parameters (%(default)s)")
    recipe.add_argument("--lora", dest="recipe", action="store_const", const="lora", help="the same as --recipe lora")
    parser.add_argument("--dry-run", action="store_true", help="say what would happen and stop")
    parser.add_argument("--merge", action="store_true", help="also write OUTPUT/merged, a checkpoint without adapter")
    parser.add_argument("--resume", metavar="DIR", help="go on from this checkpoint of the run (its newest whole one)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    _add_sample_arguments(parser.add_argument_group("samples"))
    _add_optimization_arguments(parser.add_argument_group("optimization (default: the recipe's)"))
    _add_report_arguments(parser.add_argument_group("reports"))
    _add_machine_arguments(parser.add_argument_group("machine"))
    return parser


def _add_sample_arguments(group: Any) -> None:
    group.add_argument(
        "--kinds", nargs="+", default=["action", "world"], metavar="KIND[:W]",
        help="action, world, video, with weights or without (%(default)s)",
    )  # fmt: skip
    group.add_argument("--num-actions", type=positive_int, metavar="K", help="of a chunk (the checkpoint's)")
    group.add_argument("--history", type=positive_int, metavar="M", help="time steps of a prompt (the checkpoint's)")
    group.add_argument(
        "--world-history", type=positive_int, default=1, metavar="N", help="(frame, action) pairs shown (%(default)s)"
    )
    group.add_argument(
        "--history-dropout", type=_share, default=0.0, metavar="X", help="share that sees one time step (%(default)s)"
    )
    group.add_argument(
        "--moved-weight",
        type=positive_float,
        default=1.0,
        metavar="X",
        help="loss weight of predicted picture codes that differ from the frame before (%(default)s)",
    )
    group.add_argument(
        "--action-jitter",
        type=positive_float,
        default=0.0,
        metavar="BINS",
        help="deviation of noise on the labels of actions: neighbouring bins are nearly right too (%(default)s)",
    )
    group.add_argument(
        "--code-noise",
        type=_share,
        default=0.0,
        metavar="X",
        help="share of the picture codes of a prompt that become any other (%(default)s)",
    )
    group.add_argument("--packing", action="store_true", help="several samples a row; pays when lengths differ much")
    group.add_argument("--max-length", type=positive_int, metavar="L", help="most tokens of a row")


def _add_optimization_arguments(group: Any) -> None:
    length = group.add_mutually_exclusive_group()
    length.add_argument("--steps", type=positive_int, metavar="N", help="optimizer steps")
    length.add_argument("--epochs", type=positive_float, metavar="X", help="passes over the data")
    group.add_argument("--batch-size", type=positive_int, metavar="N", help="samples a device at once")
    group.add_argument("--accumulation", type=positive_int, metavar="N", help="batches a step")
    group.add_argument("--learning-rate", type=positive_float, metavar="X")
    group.add_argument("--schedule", choices=("constant", "cosine"), help="of the learning rate, after the warm-up")
    group.add_argument("--warmup-steps", type=positive_int, metavar="N", help="until the learning rate is reached")
    group.add_argument("--lora-rank", type=positive_int, default=32, metavar="R", help="(%(default)s)")
    group.add_argument(
        "--lora-tokens", nargs="+", choices=("action", "image"), default=["action"], metavar="KIND",
        help="tokens whose embeddings are trained too: action, image (%(default)s); image where the image tokenizer "
        "is not the one that the base was trained with",
    )  # fmt: skip
    group.add_argument("--seed", type=int, metavar="N", help="of everything random (0)")


def _add_report_arguments(group: Any) -> None:
    group.add_argument("--log-every", type=positive_int, default=10, metavar="N", help="steps (%(default)s)")
    group.add_argument("--eval-every", type=positive_int, default=500, metavar="N", help="steps (%(default)s)")
    group.add_argument("--save-every", type=positive_int, default=500, metavar="N", help="steps (%(default)s)")
    group.add_argument(
        "--eval-samples", type=positive_int, default=512, metavar="N", help="of a validation set (%(default)s)"
    )
    group.add_argument(
        "--report-to", nargs="+", default=[], choices=("tensorboard", "trackio", "wandb"), metavar="R",
        help="tensorboard, trackio, wandb",
    )  # fmt: skip
    group.add_argument(
        "--sample-pictures", type=int, default=0, metavar="N", help="imagined frames drawn at every evaluation (0)"
    )


def _add_machine_arguments(group: Any) -> None:
    group.add_argument("--cpu", action="store_true", help="train on the CPU though there is a GPU")
    group.add_argument("--precision", choices=("bf16", "fp32"), help="of the computation (bf16 on a GPU, else fp32)")
    group.add_argument(
        "--gradient-checkpointing", action=argparse.BooleanOptionalAction, help="less memory, a third more time"
    )
    group.add_argument("--workers", type=int, default=0, metavar="N", help="processes that build batches (0)")
    group.add_argument("--deepspeed", metavar="FILE", help="DeepSpeed configuration")
    group.add_argument("--fsdp-config", metavar="FILE", help="FSDP2 configuration, as transformers' fsdp_config")


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 to 1")
    return value


def run(args: argparse.Namespace) -> dict[str, Any]:
    from ..training.adapters import merge_adapter
    from ..training.datasets import adopt_embodiments
    from ..training.dry_run import dry_run
    from ..training.run import run_training
    from .files import check_output_folder
    from .train_data import open_sources

    if args.output is None and not args.dry_run:
        raise UserError("--output DIR is needed (or --dry-run)")
    if args.merge and args.recipe not in ("lora", "qlora"):
        raise UserError(f"--merge does nothing with --recipe {args.recipe}: its checkpoint is whole")
    output = None if args.output is None else Path(args.output).expanduser()
    if output is not None:
        check_output_folder(output)
    checkpoint = find_checkpoint(args.model, args.revision)
    processor = load_processor(checkpoint)
    sources = open_sources(args, checkpoint, processor, output)
    adopt_embodiments(processor, sources)
    settings, options = _settings(args, checkpoint, processor), _options(args, output or Path("output"))
    if args.dry_run:
        facts = dry_run(settings, options, processor, sources)
        print(facts)
        return facts.to_dict()
    result = run_training(settings, options, processor, sources)
    merged = options.output / "merged"
    if args.merge and int(os.environ.get("RANK", 0)) == 0 and not merged.exists():
        result["merged"] = merge_adapter(options.output, merged)
    print(f"{result['output']}: {result['steps']} steps, {result['epochs']:.2f} epochs")
    for name, value in result["metrics"].items():
        if name.startswith("eval_") and isinstance(value, float) and name.endswith(("loss", "accuracy")):
            print(f"  {name.removeprefix('eval_')} {value:.4f}")
    return result


def _settings(args: argparse.Namespace, checkpoint: Any, processor: Any) -> Any:
    from ..training.datasets import SampleOptions
    from ..training.run import RunSettings

    kinds, weights = _kinds(args.kinds)
    samples = SampleOptions(
        kinds=kinds,
        kind_weights=weights,
        num_actions=args.num_actions or processor.num_actions,
        history=args.history or processor.history,
        world_history=args.world_history,
        history_dropout=args.history_dropout,
        seed=args.seed or 0,
        max_eval_samples=args.eval_samples,
    )
    return RunSettings(
        checkpoint=str(Path(checkpoint.name).resolve()) if checkpoint.is_folder else checkpoint.name,
        recipe=args.recipe,
        samples=samples,
        revision=checkpoint.revision,
        bf16=_is_bf16(args),
        **{name: getattr(args, name) for name in
           ("steps", "epochs", "batch_size", "accumulation", "learning_rate", "schedule", "warmup_steps", "lora_rank",
            "lora_tokens", "moved_weight", "action_jitter", "code_noise", "packing", "max_length", "seed")},
    )  # fmt: skip


def _kinds(texts: list[str]) -> tuple[list[str], dict[str, float] | None]:
    """`action:2 world:1` -> kinds and their weights; None without weights."""
    names, weights = [], {}
    for text in texts:
        name, colon, weight = text.partition(":")
        names.append(name)
        if colon:
            weights[name] = _weight(weight, f"--kinds {text}")
    if weights and set(weights) != set(names):
        raise UserError("--kinds: give every kind a weight, or none")
    return names, weights or None


def _weight(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise UserError(f"{where}: {text!r} is no weight, a number >= 0")
    return value


def _is_bf16(args: argparse.Namespace) -> bool:
    import torch

    if args.precision is not None:
        return bool(args.precision == "bf16")
    return torch.cuda.is_available() and not args.cpu


def _options(args: argparse.Namespace, output: Path) -> Any:
    import torch

    from ..training.run import RunOptions, is_whole

    for package in args.report_to:
        if find_spec(package) is None:
            extra = '"transformers_worldvla[train]"' if package == "tensorboard" else package
            raise UserError(f"--report-to {package} needs {package}: pip install {extra}")
    if args.resume is not None and not is_whole(Path(args.resume)):
        raise UserError(f"--resume {args.resume}: no whole checkpoint of a run (OUTPUT/trainer/checkpoint-N)")
    return RunOptions(
        output=output,
        use_cpu=args.cpu or not (torch.cuda.is_available() or torch.backends.mps.is_available()),
        log_every=args.log_every,
        eval_every=args.eval_every,
        save_every=args.save_every,
        report_to=args.report_to,
        sample_pictures=args.sample_pictures,
        dataloader_workers=args.workers,
        gradient_checkpointing=args.gradient_checkpointing,
        resume=None if args.resume is None else Path(args.resume),
        deepspeed=args.deepspeed,
        fsdp_config=args.fsdp_config,
    )
