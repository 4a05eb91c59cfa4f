"""Stage 1: train the small VQ-GAN image tokenizer on the frames of a dataset.

    python train_image_tokenizer.py --dataset DIR_OR_REPO --output runs/tiny

Writes OUTPUT/vqvae (a `WorldVLAVQVAE` folder). Reconstruction only, no adversary: a weighted L2 + L1, where pixels that
differ from the dataset's median picture (arm, gripper, objects) weigh up to five times more, in the spirit of the
region losses of Gafni et al. 2022 that Chameleon's tokenizer was trained with. The codebook is an exponential moving
average of the latents that chose it; codes that nothing chooses restart at a random latent. Killed and started again,
it goes on from OUTPUT/vqvae.pt.
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from recipe import VQ_CONFIG, read_pictures, read_split
from torch import nn

from transformers_worldvla import WorldVLAVQVAE, WorldVLAVQVAEConfig

LEARNING_RATE = 1e-3
WARMUP_STEPS = 30
CONTINUOUS_STEPS = 250  # plain auto-encoder first: the codebook starts as a k-means of its latents
DECAY = 0.99
RESTART_EVERY = 100


class Codebook:
    """Moving-average vector quantisation of (n, dim) latents."""

    def __init__(self, embedding: nn.Embedding):
        self.vectors = embedding.weight.requires_grad_(False).data
        self.counts = torch.ones(len(self.vectors))
        self.sums = self.vectors.clone()
        self.chosen = torch.zeros(len(self.vectors))

    def nearest(self, latents: torch.Tensor) -> torch.Tensor:
        return torch.cdist(latents, self.vectors).argmin(1)

    def start_from(self, latents: torch.Tensor, rounds: int = 20) -> None:
        """k-means on the latents."""
        self.vectors.copy_(latents[torch.randperm(len(latents))[: len(self.vectors)]])
        for _ in range(rounds):
            totals, counts = self._totals(latents, self.nearest(latents))
            spare = latents[torch.randint(len(latents), (len(self.vectors),))]
            self.vectors.copy_(torch.where(counts[:, None] > 0, totals / counts.clamp(min=1)[:, None], spare))
        self.sums, self.counts = self.vectors.clone(), torch.ones(len(self.vectors))

    def _totals(self, latents: torch.Tensor, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        totals = torch.zeros_like(self.vectors).index_add_(0, codes, latents)
        return totals, torch.bincount(codes, minlength=len(self.vectors)).float()

    def update(self, latents: torch.Tensor, restart: bool) -> torch.Tensor:
        """Move towards the latents; returns the vector that each latent chose."""
        codes = self.nearest(latents)
        totals, counts = self._totals(latents, codes)
        self.counts.mul_(DECAY).add_(counts, alpha=1 - DECAY)
        self.sums.mul_(DECAY).add_(totals, alpha=1 - DECAY)
        self.chosen += counts
        self.vectors.copy_(self.sums / self.counts.clamp(min=1e-4)[:, None])
        if restart:
            dead = torch.where(self.chosen < 2)[0]
            fresh = latents[torch.randint(len(latents), (len(dead),))]
            self.vectors[dead], self.sums[dead], self.counts[dead] = fresh, fresh * 0.05, torch.tensor(0.05)
            self.chosen.zero_()
        return self.vectors[codes]


def whiten_latents(vqvae: WorldVLAVQVAE, pixels: torch.Tensor) -> None:
    """Make the first latents the whitened principal components of the untrained encoder's output.

    Without it their variation over pictures is tiny beside their mean, and the decoder learns the mean picture first.
    """
    with torch.no_grad():
        features = vqvae.encoder(pixels).permute(0, 2, 3, 1).flatten(0, 2)  # (n, latent_channels)
        mean = features.mean(0)
        _, scale, components = torch.linalg.svd(features - mean, full_matrices=False)
        dim = vqvae.config.embed_dim
        weight = components[:dim] / (scale[:dim, None] / len(features) ** 0.5)
        vqvae.quant_conv.weight.copy_(weight[:, :, None, None])
        vqvae.quant_conv.bias.copy_(-weight @ mean)


def to_pixels(pictures: np.ndarray) -> torch.Tensor:
    """(n, H, W, 3) uint8 -> (n, 3, H, W) in [-1, 1]."""
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div(127.5).sub(1)
    return pixels.contiguous(memory_format=torch.channels_last)


def reconstruction_psnr(vqvae: WorldVLAVQVAE, pictures: np.ndarray) -> float:
    """Mean PSNR in dB of encoding and decoding the pictures."""
    values = []
    with torch.no_grad():
        for start in range(0, len(pictures), 16):
            pixels = to_pixels(pictures[start : start + 16])
            error = (vqvae.decode_codes(vqvae.encode_codes(pixels)) - pixels) / 2
            values += (-10 * error.square().mean((1, 2, 3)).log10()).tolist()
    return float(np.mean(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1900)
    parser.add_argument("--batch-size", type=int, default=8)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    train, held_out = (read_pictures(episodes) for episodes in read_split(args.dataset))
    held_out = held_out[::12]
    median = to_pixels(np.median(train[::17], axis=0).astype(np.uint8)[None])[0]

    vqvae = WorldVLAVQVAE(WorldVLAVQVAEConfig(**VQ_CONFIG)).trainable().to(memory_format=torch.channels_last)
    whiten_latents(vqvae, to_pixels(train[::200]))
    codebook = Codebook(vqvae.quantize.embedding)
    parameters = [parameter for parameter in vqvae.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-4)
    encode = torch.compile(lambda pixels: vqvae.quant_conv(vqvae.encoder(pixels)))
    decode = torch.compile(vqvae.decode)
    average: dict[str, torch.Tensor] = {}
    latents_seen: list[torch.Tensor] = []
    first = 0
    progress_file = args.output / "vqvae.pt"
    if progress_file.exists():
        saved = torch.load(progress_file, weights_only=True)
        vqvae.load_state_dict(saved["vqvae"])
        optimizer.load_state_dict(saved["optimizer"])
        codebook.counts, codebook.sums, codebook.chosen = saved["codebook"]
        average, latents_seen, first = saved["average"], saved["latents_seen"], saved["step"]
    start = time.time()
    for step in range(first, args.steps):
        rng = np.random.default_rng(step)  # so that a resumed run sees the same pictures
        progress = 0.5 * (1 + math.cos(math.pi * step / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, (step + 1) / WARMUP_STEPS) * (0.97 * progress + 0.03)
        pixels = to_pixels(train[rng.choice(len(train), args.batch_size, replace=False)])
        latents = encode(pixels)  # (batch, embed_dim, h, w)
        rows = latents.detach().permute(0, 2, 3, 1).flatten(0, 2)
        if step < CONTINUOUS_STEPS:
            latents_seen = [*latents_seen[-39:], rows]
            quantized, commitment = latents, 1e-4 * latents.square().mean()
        else:
            if step == CONTINUOUS_STEPS:
                codebook.start_from(torch.cat(latents_seen))
            chosen = codebook.update(rows, restart=step % RESTART_EVERY == 0 and step < 0.8 * args.steps)
            chosen = chosen.view(latents.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)
            commitment = 0.25 * F.mse_loss(latents, chosen)
            quantized = latents + (chosen - latents).detach()  # straight-through gradient
        error = decode(quantized) - pixels
        moved = ((pixels - median).abs().mean(1, keepdim=True) / 0.3).clamp(max=1)
        weight = 1 + 4 * F.max_pool2d(moved, 5, stride=1, padding=2)
        loss = (weight * error.square()).mean() + 0.1 * (weight * error.abs()).mean() + commitment
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step >= CONTINUOUS_STEPS:
            decay = min(0.998, 1 - 1 / (step - CONTINUOUS_STEPS + 2) ** 0.9)
            for name, value in vqvae.state_dict().items():
                average[name] = value.clone() if name not in average else average[name].lerp(value, 1 - decay)
        if (step + 1) % 25 == 0:
            psnr = -10 * math.log10((error / 2).square().mean().item())
            print(f"step {step + 1} loss {loss.item():.4f} psnr {psnr:.2f} {time.time() - start:.0f}s", flush=True)
        if (step + 1) % 200 == 0:
            state = {"step": step + 1, "vqvae": vqvae.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"codebook": (codebook.counts, codebook.sums, codebook.chosen)}
            torch.save({**state, "average": average, "latents_seen": latents_seen}, progress_file.with_suffix(".tmp"))
            progress_file.with_suffix(".tmp").replace(progress_file)
    average["quantize.embedding.weight"] = codebook.vectors
    vqvae.load_state_dict(average)
    vqvae.eval().to(memory_format=torch.contiguous_format)
    print(f"held-out reconstruction {reconstruction_psnr(vqvae, held_out):.2f} dB")
    vqvae.save_pretrained(args.output / "vqvae")


if __name__ == "__main__":
    main()
