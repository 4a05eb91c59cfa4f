"""Times the image tokenizer by itself: the published sizes, float32, all frames of a prompt in one batch."""

import statistics
import time
from typing import Any

import torch

from ..configuration_worldvla import WorldVLAVQVAEConfig
from ..vqvae_worldvla import WorldVLAVQVAE
from .measure import synchronize


@torch.inference_mode()
def time_image_tokenizer(device: torch.device, px: int, frames: int, repeats: int) -> dict[str, Any]:
    """Seconds to encode `frames` pictures of `px` x `px` pixels, and to decode one."""
    with device:
        torch.manual_seed(0)
        tokenizer = WorldVLAVQVAE(WorldVLAVQVAEConfig()).eval()
    pixels = torch.rand(frames, 3, px, px, device=device) * 2 - 1
    times: dict[str, list[float]] = {"encode_s": [], "decode_s": []}
    for _ in range(repeats + 1):
        began = time.perf_counter()
        codes = tokenizer.encode_codes(pixels)
        synchronize(device)
        encoded = time.perf_counter()
        tokenizer.decode_codes(codes[:1])
        synchronize(device)
        times["encode_s"].append(encoded - began)
        times["decode_s"].append(time.perf_counter() - encoded)
    return {"px": px, "frames": frames, **{name: statistics.median(values[1:]) for name, values in times.items()}}
