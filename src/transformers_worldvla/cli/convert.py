"""`worldvla convert`: a published checkpoint of the authors, or of Chameleon, becomes a WorldVLA checkpoint."""

import argparse
from typing import Any

from ..prompts_worldvla import INSTRUCTION_STYLES, WORLD_PROMPTS

_EPILOG = """\
examples:
  # the published repository, downloaded into ./WorldVLA
  worldvla convert --model WorldVLA/model_256/libero_goal --tokenizer WorldVLA/base_model \\
      --vq WorldVLA/chameleon/tokenizer --output worldvla-libero-goal
  # LIBERO-Long at 512 pixels: chunks of ten actions
  worldvla convert --model WorldVLA/model_512/libero_10 --tokenizer WorldVLA/base_model \\
      --vq WorldVLA/chameleon/tokenizer --output worldvla-libero-10 --target-size 512 --num-actions 10
  # Chameleon, as a start for training of one's own
  worldvla convert --model chameleon-7b --vq WorldVLA/chameleon/tokenizer --output worldvla-base
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "convert",
        help="convert a checkpoint of the authors or of Chameleon",
        description="Convert a checkpoint of the authors or of Chameleon, and print a parity report.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    folders = parser.add_argument_group("folders")
    folders.add_argument("--model", required=True, metavar="DIR", help="config.json and weights of the language model")
    folders.add_argument("--tokenizer", metavar="DIR", help="tokenizer.json (base_model/); default: the model folder")
    folders.add_argument("--vq", metavar="DIR", help="vqgan.yaml and vqgan.ckpt (chameleon/tokenizer/)")
    folders.add_argument("--output", required=True, metavar="DIR", help="the folder to write")
    folders.add_argument("--overwrite", action="store_true", help="replace a WorldVLA checkpoint in the output folder")
    choices = parser.add_argument_group("what the checkpoint does not say about itself")
    choices.add_argument(
        "--target-size", type=int, default=256, help="side of a square picture in pixels (%(default)s)"
    )
    choices.add_argument("--num-actions", type=int, default=5, help="actions of a chunk (%(default)s)")
    choices.add_argument("--history", type=int, default=2, help="time steps that an action prompt shows (%(default)s)")
    choices.add_argument(
        "--world-prompt", choices=WORLD_PROMPTS, default="training", help="world-model prompt (%(default)s)"
    )
    choices.add_argument("--embodiment", default="libero", help="action ranges and cameras (%(default)s)")
    choices.add_argument(
        "--instruction-style",
        choices=INSTRUCTION_STYLES,
        default="as_given",
        help="how a task's name is spelled in prompts (%(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    from ..convert import Choices, convert_checkpoint
    from ..convert_report import REPORT_NAME, format_report

    choices = Choices(
        target_size=args.target_size,
        num_actions=args.num_actions,
        history=args.history,
        world_prompt=args.world_prompt,
        embodiment=args.embodiment,
        instruction_style=args.instruction_style,
    )
    report = convert_checkpoint(
        args.model, args.output, args.tokenizer, args.vq, choices, overwrite=args.overwrite, progress=True
    )
    print(format_report(report))
    print(f"\nwrote {args.output} (report: {REPORT_NAME})")
    return report
