"""What computing logits at labelled positions only saves in training.

    python benchmarks/loss_memory.py [--batch-size 4] [--pixels 256]

One training step (forward and backward) of a 4-layer decoder with the published vocabulary of 65536 on a batch of
action and world-model samples, in a process of its own for each arm: `labelled` is the model as it is, `full` computes
float32 logits for every position first, as the authors' trainer does. Prints peak resident memory above the idle model
and time.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

from transformers_worldvla import WorldVLAConfig, WorldVLAForCausalLM

TEXT = list(range(16384, 16408))  # 24 text tokens


def make_batch(model: WorldVLAForCausalLM, batch_size: int, pixels: int) -> dict[str, torch.Tensor]:
    """Half action samples (2 frames, 5 actions), half world-model samples, left-padded."""
    tokens, side = model.tokens, pixels // 16
    generator = torch.Generator().manual_seed(0)

    def image() -> list[int]:
        codes = torch.randint(len(tokens.image_codes), (side, side), generator=generator)
        return tokens.image_block(torch.tensor(tokens.image_codes)[codes].numpy())

    action = tokens.action_block(tokens.action_bins[:7])
    rows = []
    for index in range(batch_size):
        prompt, answer = ([image(), image()], [action] * 5) if index % 2 == 0 else ([image(), action], [image()])
        rows.append(tokens.sequence(TEXT, prompt, answer))
    length = max(len(row) for row in rows)
    pad = [length - len(row) for row in rows]
    ids = torch.tensor([[tokens.pad] * n + row.ids for n, row in zip(pad, rows, strict=True)])
    labelled = torch.tensor([[False] * n + row.labelled for n, row in zip(pad, rows, strict=True)])
    return {
        "input_ids": ids,
        "attention_mask": (ids != tokens.pad).long(),
        "labels": torch.where(labelled, ids, -100),
    }


def run_arm(arm: str, batch_size: int, pixels: int) -> dict[str, float]:
    torch.manual_seed(0)
    config = WorldVLAConfig(
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        dropout=0.0,
        z_loss_weight=0.0,
        world_loss_weight=1.0,
        loss_reduction="authors",
        vq_config={"base_channels": 32, "channel_multiplier": [1, 1, 1, 1, 1], "latent_channels": 16, "embed_dim": 16},
    )
    model = WorldVLAForCausalLM(config).train()
    batch = make_batch(model, batch_size, pixels)
    for parameter in model.parameters():  # gradients exist before the measurement, as in every step but the first
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    if arm == "full":
        labels = batch.pop("labels")
        logits = model(**batch).logits.float()[:, :-1].contiguous().view(-1, config.vocab_size)
        loss = F.cross_entropy(logits, labels[:, 1:].contiguous().view(-1))
    else:
        loss = model(**batch).loss
    loss.backward()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "loss": loss.item(),
        "peak_MB": (peak - idle) / 1024,
        "seconds": seconds,
        "length": batch["input_ids"].shape[1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--pixels", type=int, default=256)
    parser.add_argument("--arm", choices=["labelled", "full"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(run_arm(args.arm, args.batch_size, args.pixels)))
        return
    for arm in ("full", "labelled"):
        command = [sys.executable, __file__, "--arm", arm, f"--batch-size={args.batch_size}", f"--pixels={args.pixels}"]
        result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        print(f"{arm:9s} " + "  ".join(f"{key} {value:.4g}" for key, value in result.items()))


if __name__ == "__main__":
    main()
