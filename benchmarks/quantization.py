"""Weights in fewer bits: speed, memory and agreement of actions, side by side.

    python benchmarks/quantization.py [--model M] [--prompts 20] [--device cuda] [--schemes bfloat16 int8 int4 fp8]

Prompts are frames of the bundled held-out LIBERO episode. Each scheme starts from the same checkpoint; `bits` counts
what the decoder layers store a weight, `agreement` is the share of action tokens equal to the reference (float32 on a
CPU, bfloat16 on a GPU), `bins` the mean distance of the others in bins of 256. The image tokenizer stays float32. Needs
torchao (pip install torchao). int4 packs for CUDA kernels; on a CPU it is skipped with the reason.
"""

import argparse
import json
import statistics
import time
from typing import Any

import torch

from transformers_worldvla import WorldVLAForCausalLM, WorldVLAProcessor
from transformers_worldvla.assets import DEFAULT_CHECKPOINT, DEFAULT_EPISODE, bundled_folder
from transformers_worldvla.benchmarking.measure import quantised, synchronize
from transformers_worldvla.data import load_episodes


def load(folder: Any, scheme: str, device: str) -> WorldVLAForCausalLM:
    dtype = torch.float32 if scheme == "float32" else torch.bfloat16
    if scheme in ("int8", "fp8") and device == "cpu":
        dtype = torch.float32
    model = WorldVLAForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    return model if scheme in ("float32", "bfloat16") else quantised(model, f"D-{scheme}")


def stored_bytes(model: WorldVLAForCausalLM) -> int:
    """Bytes of the decoder layers' weights, packed tensors by their parts."""

    def size(tensor: torch.Tensor) -> int:
        if hasattr(tensor, "__tensor_flatten__"):
            names, _ = tensor.__tensor_flatten__()
            return sum(size(getattr(tensor, name)) for name in names)
        return tensor.numel() * tensor.element_size()

    return sum(size(parameter.data) for parameter in model.model.layers.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--schemes", nargs="+", default=["float32", "bfloat16", "int8", "int4", "fp8"])
    args = parser.parse_args()
    folder = args.model or bundled_folder(DEFAULT_CHECKPOINT)
    processor = WorldVLAProcessor.from_pretrained(folder)
    episode = load_episodes(bundled_folder(DEFAULT_EPISODE))[0]
    camera = episode.cameras[0]
    steps = torch.linspace(1, len(episode) - 1, args.prompts).long().tolist()
    batches = [
        processor(
            images=[episode.frame(camera, step - 1), episode.frame(camera, step)], instruction=episode.instruction
        ).to(args.device)
        for step in steps
    ]
    schemes = args.schemes if args.device != "cpu" else [one for one in args.schemes if one != "int4"]
    if schemes != args.schemes:
        print(json.dumps({"scheme": "int4", "skipped": "its packing is for CUDA kernels"}))
    models = {scheme: load(folder, scheme, args.device) for scheme in schemes}
    inputs = [models[schemes[0]].discretize(**batch) for batch in batches]  # each frame is tokenized once
    answers: dict[str, list[torch.Tensor]] = {scheme: [] for scheme in schemes}
    seconds: dict[str, list[float]] = {scheme: [] for scheme in schemes}
    for index, batch in enumerate([inputs[0], *inputs]):  # the first is a warm-up
        for scheme, model in models.items():
            began = time.process_time() if args.device == "cpu" else time.perf_counter()
            tokens = model.generate_actions(**batch, num_actions=processor.num_actions)
            synchronize(model.device)
            ended = time.process_time() if args.device == "cpu" else time.perf_counter()
            if index:
                answers[scheme].append(tokens.cpu())
                seconds[scheme].append(ended - began)
    place = {token: index for index, token in enumerate(models[schemes[0]].tokens.action_bins)}
    bins = {
        scheme: torch.tensor([[place[t] for t in a.flatten().tolist()] for a in answers[scheme]]) for scheme in answers
    }
    for scheme, model in models.items():
        distance = (bins[scheme] - bins[schemes[0]]).abs()
        different = distance[distance > 0]
        weights = sum(parameter.numel() for parameter in models[schemes[0]].model.layers.parameters())
        print(
            json.dumps(
                {
                    "scheme": scheme,
                    "median_s": statistics.median(seconds[scheme]),
                    "layers_MB": stored_bytes(model) / 1e6,
                    "bits": 8 * stored_bytes(model) / weights,
                    "agreement": float((distance == 0).float().mean()),
                    "bins": float(different.float().mean()) if len(different) else 0.0,
                }
            )
        )


if __name__ == "__main__":
    main()
