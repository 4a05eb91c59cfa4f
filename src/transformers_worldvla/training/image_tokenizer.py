"""Trains the image tokenizer on pictures: a new one from nothing, or that of a checkpoint for pictures it has not seen.

Reconstruction only, no adversary: a weighted L2 + L1, where pixels that differ from the median picture (arm, gripper,
objects) weigh up to five times more, in the spirit of the region losses of Gafni et al. 2022 that Chameleon's tokenizer
was trained with. The codebook is an exponential moving average of the latents that chose it; codes that nothing chooses
restart at a random latent. A decoder that was trained with other codes has to learn the new ones: whoever changes
the image tokenizer of a checkpoint trains the rows of the image tokens afterwards, best from `start_image_embeddings`.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from ..data.episodes import Episode
from ..modeling_worldvla import WorldVLAForCausalLM
from ..vqvae_worldvla import WorldVLAVQVAE

WARMUP_STEPS = 30
DECAY = 0.99
COMMITMENT = 0.25  # van den Oord et al. 2017
RESTART_EVERY = 100
RESTART_SHARE = 0.8  # of the steps; after that every code keeps its place
REPORT_EVERY, SAVE_EVERY = 25, 200


@dataclass(frozen=True)
class ImageTokenizerTraining:
    """How to train an image tokenizer.

    Attributes:
        steps: of AdamW; the learning rate warms up and falls on a cosine.
        continuous_steps: so many of them as a plain auto-encoder, whose latents then give the codebook by k-means. 0
            goes on with the codebook there is.
        compile: `torch.compile` encoder and decoder, which needs a C++ compiler and pays from some hundred steps on.
    """

    steps: int
    batch_size: int = 8
    learning_rate: float = 1e-3
    continuous_steps: int = 0
    compile: bool = True


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
        self.vectors.copy_(latents[torch.randint(len(latents), (len(self.vectors),))])
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


def train_image_tokenizer(
    vqvae: WorldVLAVQVAE,
    pictures: np.ndarray,
    training: ImageTokenizerTraining,
    progress_file: str | Path,
    report: Callable[[str], object] | None = None,
) -> None:
    """Train in place, on the CPU; in the end the weights are the moving average over the quantised steps, and frozen.

    Args:
        pictures: (n, H, W, 3) uint8 as the image processor crops them, H and W multiples of 16.
        progress_file: written every 200 steps; where it exists, training goes on from it, on the same pictures.
        report: called with a line every 25 steps.

    Raises:
        ValueError: no step is left after the continuous ones.
    """
    if training.steps <= training.continuous_steps:
        raise ValueError(f"{training.steps} steps leave none after the {training.continuous_steps} continuous ones")
    torch.manual_seed(0)
    median = to_pixels(np.median(pictures[::17], axis=0).astype(np.uint8)[None])[0]
    run = _Run(vqvae, training)
    progress_file = Path(progress_file)
    first = run.load(progress_file) if progress_file.exists() else 0
    start = time.time()
    for step in range(first, training.steps):
        rng = np.random.default_rng(step)  # so that a resumed run sees the same pictures
        chosen = rng.choice(len(pictures), min(training.batch_size, len(pictures)), replace=False)
        loss, decibel = run.step(step, to_pixels(pictures[chosen]), median)
        if report and (step + 1) % REPORT_EVERY == 0:
            report(f"step {step + 1} loss {loss:.4f} psnr {decibel:.2f} {time.time() - start:.0f}s")
        if (step + 1) % SAVE_EVERY == 0:
            run.save(progress_file, step + 1)
    run.finish()


class _Run:
    """All that changes from step to step."""

    def __init__(self, vqvae: WorldVLAVQVAE, training: ImageTokenizerTraining):
        self.vqvae, self.training = vqvae, training
        vqvae.trainable().to(memory_format=torch.channels_last)
        self.codebook = Codebook(vqvae.quantize.embedding)
        self.parameters = [parameter for parameter in vqvae.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=training.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4
        )
        self.encode: Any = lambda pixels: vqvae.quant_conv(vqvae.encoder(pixels))
        self.decode: Any = vqvae.decode
        if training.compile:
            self.encode, self.decode = torch.compile(self.encode), torch.compile(self.decode)
        self.average: dict[str, torch.Tensor] = {}
        self.latents_seen: list[torch.Tensor] = []

    def step(self, step: int, pixels: torch.Tensor, median: torch.Tensor) -> tuple[float, float]:
        """One step of AdamW and of the codebook; returns the loss and the PSNR in dB of the pictures (n, 3, H, W)."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.training.learning_rate * _schedule(step, self.training.steps)
        quantized, commitment = self._quantize(step, self.encode(pixels))
        error = self.decode(quantized) - pixels
        loss = _weighted_error(error, pixels, median) + commitment
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self._follow(step - self.training.continuous_steps)
        return loss.item(), -10 * math.log10((error / 2).square().mean().item())

    def _quantize(self, step: int, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents (n, dim, h, w) -> the vectors that stand for them, and the loss that keeps them near."""
        rows = latents.detach().permute(0, 2, 3, 1).flatten(0, 2)
        quantized_steps = step - self.training.continuous_steps
        if quantized_steps < 0:
            self.latents_seen = [*self.latents_seen[-39:], rows]
            return latents, 1e-4 * latents.square().mean()
        if quantized_steps == 0 and self.latents_seen:
            self.codebook.start_from(torch.cat(self.latents_seen))
        restart = quantized_steps > 0 and step % RESTART_EVERY == 0 and step < RESTART_SHARE * self.training.steps
        chosen = self.codebook.update(rows, restart).view(latents.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)
        # the gradient goes straight through
        return latents + (chosen - latents).detach(), COMMITMENT * F.mse_loss(latents, chosen)

    def _follow(self, quantized_steps: int) -> None:
        """Moving average of the weights, longer and longer."""
        if quantized_steps < 0:
            return
        keep = min(0.998, 1 - 1 / (quantized_steps + 2) ** 0.9)
        for name, value in self.vqvae.state_dict().items():
            self.average[name] = value.clone() if name not in self.average else self.average[name].lerp(value, 1 - keep)

    def finish(self) -> None:
        self.average["quantize.embedding.weight"] = self.codebook.vectors
        self.vqvae.load_state_dict(self.average)
        self.vqvae.frozen = True
        self.vqvae.eval().to(memory_format=torch.contiguous_format)
        self.vqvae.requires_grad_(False)

    def save(self, file: Path, step: int) -> None:
        """Whole or not at all."""
        codebook = (self.codebook.counts, self.codebook.sums, self.codebook.chosen)
        state = {"step": step, "vqvae": self.vqvae.state_dict(), "optimizer": self.optimizer.state_dict()}
        state |= {"codebook": codebook, "average": self.average, "latents_seen": self.latents_seen}
        torch.save(state, file.with_suffix(".tmp"))
        file.with_suffix(".tmp").replace(file)

    def load(self, file: Path) -> int:
        """Go on from what `save` wrote; returns the number of the next step."""
        saved = torch.load(file, weights_only=True)
        self.vqvae.load_state_dict(saved["vqvae"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.codebook.counts, self.codebook.sums, self.codebook.chosen = saved["codebook"]
        self.average, self.latents_seen = saved["average"], saved["latents_seen"]
        return int(saved["step"])


def _schedule(step: int, steps: int) -> float:
    """Share of the learning rate: linear warm-up times a cosine that ends at 3 %."""
    return min(1, (step + 1) / WARMUP_STEPS) * (0.97 * 0.5 * (1 + math.cos(math.pi * step / steps)) + 0.03)


def _weighted_error(error: torch.Tensor, pixels: torch.Tensor, median: torch.Tensor) -> torch.Tensor:
    moved = ((pixels - median).abs().mean(1, keepdim=True) / 0.3).clamp(max=1)
    weight = 1 + 4 * F.max_pool2d(moved, 5, stride=1, padding=2)
    return (weight * error.square()).mean() + 0.1 * (weight * error.abs()).mean()


def whiten_latents(vqvae: WorldVLAVQVAE, pictures: np.ndarray) -> None:
    """Make the first latents of a new image tokenizer the whitened principal components of its encoder's output.

    Without it their variation over pictures is tiny beside their mean, and the decoder learns the mean picture first.
    """
    with torch.no_grad():
        features = vqvae.encoder(to_pixels(pictures)).permute(0, 2, 3, 1).flatten(0, 2)  # (n, latent_channels)
        mean = features.mean(0)
        _, scale, components = torch.linalg.svd(features - mean, full_matrices=False)
        dim = vqvae.config.embed_dim
        weight = components[:dim] / (scale[:dim, None] / len(features) ** 0.5)
        vqvae.quant_conv.weight.copy_(weight[:, :, None, None])
        vqvae.quant_conv.bias.copy_(-weight @ mean)


@torch.no_grad()
def start_image_embeddings(model: WorldVLAForCausalLM, scale: float = 0.5) -> None:
    """Make the image tokens' input embeddings a random projection of the codebook, so that like codes look alike.

    Embeddings from nothing make a decoder learn each code for itself, and what it learnt of one says nothing about its
    neighbour, which the next picture shows instead. For a decoder of random weights, or a new image tokenizer.

    Args:
        model: its `embed_tokens` rows of image codes change, nothing else.
        scale: their standard deviation; far above a step of the optimizer, which would soon scatter them.
    """
    codebook = model.model.vqmodel.quantize.embedding.weight.float()
    vectors = (codebook - codebook.mean(0)) / codebook.std()  # one scale for all dimensions keeps their distances
    embedding = model.get_input_embeddings().weight
    projection = torch.randn(vectors.shape[1], embedding.shape[1], device=vectors.device) / vectors.shape[1] ** 0.5
    embedding[list(model.tokens.image_codes)] = (scale * vectors @ projection).to(embedding)


def reconstruction_psnr(vqvae: WorldVLAVQVAE, pictures: np.ndarray) -> float:
    """Mean PSNR in dB of encoding and decoding pictures (n, H, W, 3) uint8."""
    values: list[float] = []
    for start in range(0, len(pictures), 16):
        pixels = to_pixels(pictures[start : start + 16])
        with torch.inference_mode():
            error = (vqvae.decode_codes(vqvae.encode_codes(pixels)) - pixels) / 2
        values += (-10 * error.square().mean((1, 2, 3)).log10()).tolist()
    return float(np.mean(values))


def read_pictures(episodes: Iterable[Episode], image_processor: Any, camera: str | None = None) -> np.ndarray:
    """Every frame of a camera, by default each episode's first, as the image processor crops it: (n, H, W, 3) uint8."""
    pictures = []
    for episode in episodes:
        for frame in episode.frames(camera or episode.cameras[0]):
            pixels = image_processor.pixels(Image.fromarray(frame))  # (3, H, W) in [-1, 1]
            pictures.append(np.rint((pixels.transpose(1, 2, 0) + 1) * 127.5).astype(np.uint8))
    return np.stack(pictures)


def to_pixels(pictures: np.ndarray) -> torch.Tensor:
    """(n, H, W, 3) uint8 -> (n, 3, H, W) in [-1, 1]."""
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div(127.5).sub(1)
    return pixels.contiguous(memory_format=torch.channels_last)
