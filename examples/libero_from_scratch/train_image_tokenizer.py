"""Stage 1: train the small VQ-GAN image tokenizer on the frames of a dataset.

    python train_image_tokenizer.py --dataset DIR_OR_REPO --output runs/tiny

Writes OUTPUT/vqvae (a `WorldVLAVQVAE` folder). 250 steps of a plain auto-encoder, then the codebook starts as a k-means
of its latents; `transformers_worldvla.training.image_tokenizer` says the rest. Killed and started again, it goes on
from OUTPUT/vqvae.pt.
"""

import argparse
from pathlib import Path

import torch
from recipe import CAMERA, TARGET_SIZE, VQ_CONFIG, read_split

from transformers_worldvla import WorldVLAImageProcessor, WorldVLAVQVAE, WorldVLAVQVAEConfig
from transformers_worldvla.training.image_tokenizer import (
    ImageTokenizerTraining,
    read_pictures,
    reconstruction_psnr,
    train_image_tokenizer,
    whiten_latents,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1900)
    parser.add_argument(
        "--continuous-steps", type=int, default=250, help="of them as a plain auto-encoder (%(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=8)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    crop = WorldVLAImageProcessor(target_size=TARGET_SIZE)
    train, held_out = (read_pictures(episodes, crop, CAMERA) for episodes in read_split(args.dataset))
    vqvae = WorldVLAVQVAE(WorldVLAVQVAEConfig(**VQ_CONFIG))
    whiten_latents(vqvae, train[::200])
    training = ImageTokenizerTraining(args.steps, args.batch_size, 1e-3, args.continuous_steps, args.steps >= 100)
    train_image_tokenizer(vqvae, train, training, args.output / "vqvae.pt", report=lambda line: print(line, flush=True))
    print(f"held-out reconstruction {reconstruction_psnr(vqvae, held_out[::12]):.2f} dB")
    vqvae.save_pretrained(args.output / "vqvae")


if __name__ == "__main__":
    main()
