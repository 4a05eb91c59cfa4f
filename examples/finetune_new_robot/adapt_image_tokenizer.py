"""Stage 2: go on training the image tokenizer of a checkpoint on the new robot's pictures.

    python adapt_image_tokenizer.py --dataset data/meta_world --output runs/base [--checkpoint DIR_OR_REPO]

OUTPUT is a whole checkpoint: the decoder as it was, over an image tokenizer that has seen this robot. The episodes that
`worldvla tokenize` will hold out are not trained on; `--val-share` must be the same. Printed are reconstructions in dB
before and after, of the frames held out and of the bundled LIBERO episode: what the pictures of the first robot lose.
Killed and started again, it goes on from OUTPUT.pt.
"""

import argparse
import json
from pathlib import Path

from transformers_worldvla import WorldVLAForCausalLM, WorldVLAProcessor
from transformers_worldvla.assets import DEFAULT_CHECKPOINT, DEFAULT_EPISODE, bundled_folder
from transformers_worldvla.card_worldvla import CARD_NAME
from transformers_worldvla.data import load_episodes, name_trajectories, split_trajectories
from transformers_worldvla.training.image_tokenizer import (
    ImageTokenizerTraining,
    read_pictures,
    reconstruction_psnr,
    train_image_tokenizer,
)

_NOTE = """
## A base to train on, not to act with

The image tokenizer went on learning from the pictures of `{dataset}`. The decoder is that of `{checkpoint}` and
does not know the codes: `worldvla train --lora-tokens action image` teaches it.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="a new folder")
    parser.add_argument("--checkpoint", default=bundled_folder(DEFAULT_CHECKPOINT), help="(the bundled one)")
    parser.add_argument("--val-share", type=float, default=0.1, help="as `worldvla tokenize` (%(default)s)")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    args = parser.parse_args()
    if args.output.exists():
        parser.error(f"{args.output} exists: choose another --output")
    processor = WorldVLAProcessor.from_pretrained(args.checkpoint)
    model = WorldVLAForCausalLM.from_pretrained(args.checkpoint)
    episodes = load_episodes(args.dataset)
    split = split_trajectories(name_trajectories(episodes), val_share=args.val_share)
    pictures = read_pictures((episodes[position] for position in split["train"]), processor.image_processor)
    watched = {
        "held_out": read_pictures((episodes[n] for n in split["val_ind"]), processor.image_processor)[::8],
        "libero": read_pictures(load_episodes(bundled_folder(DEFAULT_EPISODE)), processor.image_processor)[::8],
    }

    vqvae = model.model.vqmodel
    before = {name: reconstruction_psnr(vqvae, frames) for name, frames in watched.items()}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    progress = args.output.with_suffix(".pt")
    training = ImageTokenizerTraining(args.steps, args.batch_size, args.learning_rate, compile=args.steps >= 100)
    train_image_tokenizer(vqvae, pictures, training, progress, report=lambda line: print(line, flush=True))
    after = {name: reconstruction_psnr(vqvae, frames) for name, frames in watched.items()}
    model.save_pretrained(args.output)
    processor.save_pretrained(args.output)
    with (args.output / CARD_NAME).open("a", encoding="utf-8") as card:
        card.write(_NOTE.format(checkpoint=Path(args.checkpoint).name, dataset=args.dataset.name))
    progress.unlink(missing_ok=True)
    print(json.dumps({"psnr_before": before, "psnr_after": after}, indent=2))


if __name__ == "__main__":
    main()
