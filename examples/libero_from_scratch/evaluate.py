"""Compare a checkpoint with held-out episodes, open loop.

    python evaluate.py --dataset DIR_OR_REPO --checkpoint runs/tiny/run [--stride 2] [--output result.json]
    python evaluate.py --dataset RECORDED_LATER --whole --checkpoint runs/tiny/run

Prints action L1 against the mean action of the training set and against repeating the last action, next-frame PSNR
against the reconstruction ceiling of the image tokenizer and against copying the last frame, and PSNR over a rollout.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from recipe import CAMERA, read_split
from transformers import AutoModelForCausalLM, AutoProcessor

import transformers_worldvla  # noqa: F401  registers the Auto classes
from transformers_worldvla.data import load_episodes
from transformers_worldvla.evaluation.open_loop import evaluate_open_loop


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--whole", action="store_true", help="every episode: none of the dataset was trained on")
    parser.add_argument("--stride", type=int, default=2)
    parser.add_argument("--horizon", type=int, default=10)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    held_out = load_episodes(args.dataset, cameras=[CAMERA]) if args.whole else read_split(args.dataset)[1]
    model = AutoModelForCausalLM.from_pretrained(args.checkpoint).eval()
    processor = AutoProcessor.from_pretrained(args.checkpoint)
    statistics = json.loads((args.checkpoint / "training_statistics.json").read_text())
    result = evaluate_open_loop(
        model,
        processor,
        held_out,
        np.array(statistics["action_mean"]),
        stride=args.stride,
        horizon=args.horizon,
        progress=True,
    )
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
