"""Stage 2: a checkpoint to start from: the trained image tokenizer under a small decoder of random weights.

    python make_checkpoint.py --dataset DIR_OR_REPO --vqvae runs/tiny/vqvae --output runs/tiny/start

The dataset gives the words of the text tokenizer and the ranges of the actions, the codebook the embeddings of the
codes. OUTPUT is complete: `worldvla tokenize`, `worldvla train --recipe full` and all others take it as `--model`.
"""

import argparse
from pathlib import Path

from recipe import make_config, make_processor, read_split
from transformers import set_seed

from transformers_worldvla import WorldVLAForCausalLM, WorldVLAVQVAE
from transformers_worldvla.training.image_tokenizer import start_image_embeddings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--vqvae", type=Path, required=True, help="of stage 1")
    parser.add_argument("--output", type=Path, required=True, help="a new folder")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (%(default)s)")
    args = parser.parse_args()
    if args.output.exists():
        parser.error(f"{args.output} exists: choose another --output")
    train, _ = read_split(args.dataset)
    processor = make_processor(train)
    set_seed(args.seed)
    model = WorldVLAForCausalLM(make_config(processor))
    model.model.vqmodel = WorldVLAVQVAE.from_pretrained(args.vqvae)
    start_image_embeddings(model)
    partial = args.output.with_name(f".{args.output.name}.partial")
    model.save_pretrained(partial)
    processor.save_pretrained(partial)
    partial.replace(args.output)
    count = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("model.vqmodel"))
    print(f"{args.output}: {count / 1e6:.1f} M decoder weights, {len(train)} episodes to train on")


if __name__ == "__main__":
    main()
