"""One training step, three ways, in one run: tokens per second and peak memory.

    python benchmarks/training_step.py                              # about 15 minutes on two idle cores
    python benchmarks/training_step.py --shape depth8 --device cuda --batch-size 8 --pixels 512

Every arm trains the same random model on the same batch, half action samples (2 frames, 5 actions), half world-model
samples, with the same loss (`authors` reduction, z-loss), and ends with clipping and AdamW:

    ours      the model as it is: logits at labelled positions, a chunk at a time
    plain     what a Trainer does with an ordinary causal LM: logits of every position, a dense mask
    authors   the step of the released training code, written anew: right padding, a mask built in Python per sample,
              float32 logits of every position, contiguous shifted copies for the cross entropy and once more for the
              z-loss; gradient checkpointing in every layer, as their scripts do

`+full`, `+selective` and `+no` behind an arm's name choose gradient checkpointing of the layers: a whole layer is
computed again, or what lies between its matrix products, or nothing. Each arm runs in processes of its own, in turn, so
that a drift of the machine hits all of them; times are medians over all steps but the first of each process. Memory is
the largest peak: allocated on CUDA; on the CPU resident, less what the process held before it built the model. `cpu s`
is the processor time of a step, which other work on the machine disturbs less than the clock. On CUDA parameters are
float32 and computation is bfloat16 autocast, as in the authors' recipe.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from transformers_worldvla import WorldVLAConfig, WorldVLAForCausalLM
from transformers_worldvla.loss_worldvla import IGNORE_INDEX, class_weights
from transformers_worldvla.tokens_worldvla import TokenSequence
from transformers_worldvla.training.checkpointing import selective_checkpointing

SHAPES = {  # hidden, layers, heads, intermediate; the vocabulary always has 65536 entries
    "tiny": (64, 2, 2, 96),
    "small": (512, 12, 8, 1376),
    "depth8": (4096, 8, 32, 11008),  # Chameleon-7B's width, a quarter of its depth
}
ARMS = ("authors", "plain", "ours", "ours+selective", "ours+full")
CHECKPOINTING = {"full": {"use_reentrant": False}, "selective": selective_checkpointing(), "no": None}
BY_DEFAULT = {"authors": "full", "plain": "no", "ours": "no"}
TEXT = range(16384, 16408)  # 24 text tokens


def build_model(shape: str, device: str = "cpu", **fields: object) -> WorldVLAForCausalLM:
    """A random model in training mode, built on its device."""
    hidden, layers, heads, intermediate = SHAPES[shape]
    config = WorldVLAConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=intermediate,
        loss_reduction="authors",
        # the image tokenizer has no part in the step
        vq_config={"base_channels": 32, "channel_multiplier": [1, 1, 1, 1, 1], "latent_channels": 16, "embed_dim": 16},
        **fields,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = WorldVLAForCausalLM(config)
    model.model.vqmodel.requires_grad_(False)
    return model.train()


def make_samples(model: WorldVLAForCausalLM, batch_size: int, pixels: int) -> list[TokenSequence]:
    """Action (2 frames, 5 actions) and world-model (frame and action, next frame) samples in turn."""
    tokens, side = model.tokens, pixels // 16
    draw = torch.Generator().manual_seed(0)
    codes, bins = torch.tensor(tokens.image_codes), torch.tensor(tokens.action_bins)

    def image() -> list[int]:
        return tokens.image_block(codes[torch.randint(len(codes), (side, side), generator=draw)].numpy())

    def action() -> list[int]:
        return tokens.action_block(bins[torch.randint(len(bins), (7,), generator=draw)].tolist())

    rows = []
    for index in range(batch_size):
        if index % 2 == 0:
            prompt, answer = [image(), image()], [action() for _ in range(5)]
        else:
            prompt, answer = [image(), action()], [image()]
        rows.append(tokens.sequence(list(TEXT), prompt, answer))
    return rows


def right_padded(rows: list[TokenSequence], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels, both (batch, length)."""
    length = max(map(len, rows))
    ids = [row.ids + [pad] * (length - len(row)) for row in rows]
    labels = [
        [token if labelled else IGNORE_INDEX for token, labelled in zip(row.ids, row.labelled, strict=True)]
        + [IGNORE_INDEX] * (length - len(row))
        for row in rows
    ]
    return torch.tensor(ids, device=device), torch.tensor(labels, device=device)


# -------------------------------------------------------------------- the arms: samples -> loss


def ours(model: WorldVLAForCausalLM, rows: list[TokenSequence]) -> torch.Tensor:
    ids, labels = right_padded(rows, model.tokens.pad, model.device)
    mask = (ids != model.tokens.pad).long()
    return model(input_ids=ids, labels=labels, attention_mask=mask, use_cache=False).loss


def plain(model: WorldVLAForCausalLM, rows: list[TokenSequence]) -> torch.Tensor:
    """Full logits through `ForCausalLMLoss`' steps (float copy, labels shifted by padding) under a dense mask."""
    ids, labels = right_padded(rows, model.tokens.pad, model.device)
    blocks = model.action_block_ids(ids)
    query, key = blocks[:, :, None], blocks[:, None, :]
    visible = ((query < 0) | (key < 0) | (query == key)).tril() & (ids != model.tokens.pad)[:, None, :]
    states = model.model(input_ids=ids, attention_mask=visible[:, None], use_cache=False).last_hidden_state
    logits = model.lm_head(states).float().view(-1, model.vocab_size)
    targets = F.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:].reshape(-1)
    loss = F.cross_entropy(logits, targets, weight=vocabulary_weights(model), ignore_index=IGNORE_INDEX)
    z_loss = logits.logsumexp(-1)[targets != IGNORE_INDEX].square().mean()
    return loss + model.config.z_loss_weight * z_loss


def authors(model: WorldVLAForCausalLM, rows: list[TokenSequence]) -> torch.Tensor:
    ids, labels = right_padded(rows, model.tokens.bos, model.device)
    visible = python_mask(ids, model)
    states = model.model(input_ids=ids, attention_mask=visible[:, None], use_cache=False).last_hidden_state
    logits = model.lm_head(states).float()
    shifted, targets = logits[..., :-1, :].contiguous(), labels[..., 1:].contiguous()
    loss = nn.CrossEntropyLoss(weight=vocabulary_weights(model))(shifted.view(-1, model.vocab_size), targets.view(-1))
    again = logits[..., :-1, :].contiguous()
    z_loss = torch.logsumexp(again, dim=-1).pow(2)[targets >= 0].mean()
    return loss + model.config.z_loss_weight * z_loss


def vocabulary_weights(model: WorldVLAForCausalLM) -> torch.Tensor:
    """alpha for the class ids of the `authors` reduction, 1 elsewhere: (vocabulary,)."""
    classes = torch.arange(model.vocab_size, device=model.device)
    return class_weights(classes, model.authors_world_classes, model.config.world_loss_weight)


def python_mask(ids: torch.Tensor, model: WorldVLAForCausalLM) -> torch.Tensor:
    """(batch, length, length) bool; pairs of action blocks behind the last image are hidden one by one."""
    tokens, (batch, length) = model.tokens, ids.shape
    mask = torch.ones(length, length, device=ids.device).tril().unsqueeze(0).expand(batch, -1, -1).bool()
    for row in range(batch):
        image_ends = torch.where(ids[row] == tokens.image_end)[0].cpu().numpy()
        starts = torch.where(ids[row] == tokens.action_start)[0].cpu().numpy()
        ends = torch.where(ids[row] == tokens.action_end)[0].cpu().numpy()
        blocks = list(zip(starts, ends, strict=True))
        for start, end in blocks:
            if start > image_ends[-1]:
                for earlier_start, earlier_end in blocks:
                    if earlier_end < start:
                        mask[row, start : end + 1, earlier_start : earlier_end + 1] = False
    return mask


STEPS: dict[str, Callable[[WorldVLAForCausalLM, list[TokenSequence]], torch.Tensor]] = {
    "ours": ours,
    "plain": plain,
    "authors": authors,
}


# -------------------------------------------------------------------- measuring


def run_arm(arm: str, args: argparse.Namespace) -> dict[str, object]:
    """One process: build, warm up with one step, time `args.steps` more."""
    name, checkpointing = parse_arm(arm)
    before = peak_memory(args.device)
    model = build_model(args.shape, args.device)
    if args.attention:
        model.set_attn_implementation(args.attention)
    if checkpointing is not None:
        model.gradient_checkpointing_enable(checkpointing)
    rows = make_samples(model, args.batch_size, args.pixels)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # the Trainer's default is fused, the authors' is not
    fused = None if name == "authors" else True
    optimizer = torch.optim.AdamW(trained, lr=5e-6, betas=(0.9, 0.95), weight_decay=0.1, fused=fused)
    losses, seconds, processor_seconds = [], [], []
    for _ in range(1 + args.steps):
        start, processor_start = time.perf_counter(), time.process_time()
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
            loss = STEPS[name](model, rows)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 4.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())  # waits for the device
        seconds.append(time.perf_counter() - start)
        processor_seconds.append(time.process_time() - processor_start)
    return {
        "arm": arm,
        "tokens": sum(map(len, rows)),
        "seconds": seconds[1:],
        "cpu_seconds": processor_seconds[1:],
        "peak_gb": (peak_memory(args.device) - before) / 2**30,
        "first_loss": losses[0],
        "parameters": sum(parameter.numel() for parameter in trained),
    }


def parse_arm(arm: str) -> tuple[str, dict[str, object] | None]:
    """Name of the step, and arguments of gradient checkpointing or None. Raises KeyError for an unknown arm."""
    name, _, checkpointing = arm.partition("+")
    return name, CHECKPOINTING[checkpointing or BY_DEFAULT[name]]


def peak_memory(device: str) -> int:
    """Largest memory of this process so far, in bytes."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(args: argparse.Namespace) -> list[dict[str, object]]:
    """Rounds over the arms, each in a process of its own; one row an arm."""
    runs: dict[str, list[dict]] = {arm: [] for arm in args.arms}
    for number in range(args.rounds):
        for arm in list(runs):
            print(f"round {number + 1}/{args.rounds}: {arm}", file=sys.stderr)
            command = [sys.executable, __file__, "--only", arm, *sys.argv[1:]]
            result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if result.returncode:  # most likely out of memory, which the other arms may not be
                print(f"{arm} failed with exit code {result.returncode} and is left out", file=sys.stderr)
                del runs[arm]
            else:
                runs[arm].append(json.loads(result.stdout.splitlines()[-1]))
    if not runs:
        sys.exit("no arm got through: lower --batch-size")
    rows = []
    for arm, results in runs.items():
        seconds = median(results, "seconds")
        rows.append(
            {
                "arm": arm,
                "shape": args.shape,
                "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
                "px": args.pixels,
                "batch": args.batch_size,
                "parameters": results[0]["parameters"],
                "tokens": results[0]["tokens"],
                "median_s": seconds,
                "median_cpu_s": median(results, "cpu_seconds"),
                "tokens_per_s": results[0]["tokens"] / seconds,
                "peak_gb": max(result["peak_gb"] for result in results),
                "first_loss": results[0]["first_loss"],
            }
        )
    return rows


def median(results: list[dict], name: str) -> float:
    """Over the steps of all processes of an arm."""
    return statistics.median(value for result in results for value in result[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), metavar="ARM", help=f"default: {' '.join(ARMS)}")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--pixels", type=int, default=256)
    parser.add_argument("--attention", help="attention implementation of all arms, sdpa by default")
    parser.add_argument("--rounds", type=int, default=3, help="processes an arm")
    parser.add_argument("--steps", type=int, default=2, help="timed steps a process")
    parser.add_argument("--json", action="store_true", help="print rows as one JSON document")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    for arm in args.arms:
        try:
            parse_arm(arm)
        except KeyError:
            parser.error(f"no arm is called {arm!r}: {', '.join(STEPS)}, each with +full, +selective, +no or nothing")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device: use --device cpu")
    if args.only:
        print(json.dumps(run_arm(args.only, args)))
        return
    rows = measure(args)
    if args.json:
        print(json.dumps(rows))
        return
    reference = next((row for row in rows if row["arm"] == "authors"), rows[0])
    print(f"{args.shape}: {rows[0]['parameters'] / 1e6:.0f} M parameters, {rows[0]['tokens']} tokens a step")
    print(
        f"{'arm':16}{'s/step':>8}{'cpu s':>8}{'tokens/s':>10}{'GB':>7}{'first loss':>12}   against {reference['arm']}"
    )
    for row in rows:
        times = [reference[name] / row[name] for name in ("median_s", "median_cpu_s", "peak_gb")]
        print(
            f"{row['arm']:16}{row['median_s']:8.2f}{row['median_cpu_s']:8.2f}{row['tokens_per_s']:10.0f}"
            f"{row['peak_gb']:7.2f}{row['first_loss']:12.5f}   "
            "{:.2f}x tokens/s, {:.2f}x tokens per cpu s, {:.2f}x less memory".format(*times)
        )


if __name__ == "__main__":
    main()
