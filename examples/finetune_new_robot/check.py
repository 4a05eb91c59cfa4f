"""Stage 5: the held-out episodes, open loop: what a checkpoint predicts beside what the expert did.

    python check.py --dataset data/meta_world --cache data/tokens --checkpoint runs/sawyer [--pictures pictures.png]

`--checkpoint` is the folder of an adapter or of a merged checkpoint: `from_pretrained` opens both. Printed are mean
absolute errors of action chunks, in the robot's units: of the checkpoint; for an adapter also of its base, which has
never acted with the robot; of always answering the mean action, and of going on with the last one. The same of the
last step of a chunk alone, and how well the image tokenizer draws this robot's pictures.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor

import transformers_worldvla  # noqa: F401  registers the Auto classes
from transformers_worldvla.data import FrameTokenCache, load_episodes
from transformers_worldvla.evaluation.metrics import psnr
from transformers_worldvla.evaluation.open_loop import (
    Recording,
    chunk_starts,
    compare_actions,
    predict_chunks,
    read_recording,
    summarize_actions,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True, help="knows which episodes were held out")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--stride", type=int, default=3, help="steps from chunk to chunk (%(default)s)")
    parser.add_argument("--pictures", type=Path, help="draw a frame of every held-out episode, and its reconstruction")
    args = parser.parse_args()
    processor = AutoProcessor.from_pretrained(args.checkpoint)
    model = AutoModelForCausalLM.from_pretrained(args.checkpoint).eval()
    episodes = load_episodes(args.dataset)
    cache = FrameTokenCache(args.cache).verify(model, processor, episodes)
    held_out = [episodes[position] for position in cache.header["split"]["episodes"]["val_ind"]]
    recordings = [read_recording(model, processor, episode) for episode in held_out]
    action_mean = np.concatenate([episode.actions for episode in cache.episodes("train")]).mean(0)

    summary = measure(model, processor, recordings, action_mean, args.stride)
    errors = {name: each["total"] for name, each in summary["l1"].items()}
    last_step = {name: each["per_step"][-1] for name, each in summary["l1"].items()}
    if (args.checkpoint / "adapter_config.json").exists():
        model.disable_adapters()
        errors["base"] = measure(model, processor, recordings, action_mean, args.stride)["l1"]["model"]["total"]
    pictures, drawn = (
        np.concatenate([getattr(each, name) for each in recordings]) for name in ("pictures", "reconstructed")
    )
    report = {
        "episodes": len(recordings),
        "chunks": summary["chunks"],
        "action_l1": errors,
        "action_l1_of_last_step": last_step,
        "reconstruction_psnr": psnr(drawn, pictures).mean().item(),
    }
    print(json.dumps(report, indent=2))
    if args.pictures:
        draw(recordings).save(args.pictures)


@torch.inference_mode()
def measure(
    model: Any, processor: Any, recordings: Sequence[Recording], action_mean: np.ndarray, stride: int
) -> dict[str, Any]:
    """Errors of the chunks that start at every `stride`-th step."""
    comparisons = []
    for recording in recordings:
        starts = chunk_starts(len(recording), processor.num_actions, stride)
        comparisons.append(compare_actions(recording, starts, predict_chunks(model, processor, recording, starts)))
    return summarize_actions(comparisons, action_mean)


def draw(recordings: Sequence[Recording]) -> Image.Image:
    """The first frame of each episode, and below it what the image tokenizer makes of it."""
    rows = [
        np.concatenate([frames[0, 0] for frames in column], axis=1)
        for column in ([each.pictures for each in recordings], [each.reconstructed for each in recordings])
    ]
    return Image.fromarray(np.concatenate(rows))


if __name__ == "__main__":
    main()
