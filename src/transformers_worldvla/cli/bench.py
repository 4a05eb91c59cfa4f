"""`worldvla bench`: how fast this machine decodes, against other ways to decode the same answers."""

import argparse
import sys
from typing import Any

from .checkpoints import add_device_argument, positive_int

_EPILOG = """\
examples:
  # authors' way (A), a tight sequential loop (C) and this library (D) on a model of about 100 M parameters
  worldvla bench
  # the published shape in bfloat16 on a GPU, every arm, actions and imagined frames
  worldvla bench --shape 7b --arms A B1 B2 C D-parallel D-sliced D-compile D D-overlap --px 256 512 --json
  worldvla bench --shape 7b --what frame --arms C D D-draft75 --batch 1 16
  # how latency grows with the number of actions
  worldvla bench --arms C D --actions 1 5 10 20 --repeats 5

Weights and prompts are random: this measures speed and the equality of answers, not skill. All arms decode the same
prompts with the same weights, in turn, and choose among the ids that are legal at a place. Pictures come as tokens; the
image tokenizer is timed apart, with --vq.

arms: A the authors' decoding; B1, B2 generate() of transformers with a dynamic and a static cache; C a sequential loop
in the style of gpt-fast; D this library. D-overlap starts the clock when the newest frame arrives, the older frames and
the text being prefilled. D-parallel, D-sliced, D-compile, D-graphs switch D's techniques on in turn. Frames only:
D-draft proposes the previous frame, D-draft75 a draft of which 75 % are right. D-int8, D-int4, D-fp8: torchao.
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "bench",
        help="measure decoding speed on this machine",
        description="Measure how fast this machine decodes actions and frames, against other ways to decode them.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--shape", choices=("small", "7b"), default="small", help="about 100 M parameters, or the published model's"
    )
    parser.add_argument("--arms", nargs="+", default=["A", "C", "D"], metavar="ARM", help="(A C D)")
    parser.add_argument(
        "--what", nargs="+", choices=("chunk", "frame"), default=["chunk"], help="actions, or imagined frames (chunk)"
    )
    parser.add_argument("--px", nargs="+", type=positive_int, default=[256], metavar="N", help="picture sides (256)")
    parser.add_argument("--frames", nargs="+", type=positive_int, default=[2], metavar="M", help="of a chunk (2)")
    parser.add_argument("--actions", nargs="+", type=positive_int, default=[5, 10], metavar="K", help="(5 10)")
    parser.add_argument("--batch", nargs="+", type=positive_int, default=[1], metavar="B", help="prompts at once (1)")
    parser.add_argument("--repeats", type=positive_int, default=3, metavar="N", help="timed runs of each arm (3)")
    parser.add_argument("--threads", type=positive_int, metavar="N", help="of PyTorch on a CPU (as they are)")
    add_device_argument(parser)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="(float32 for small, bfloat16 for 7b)")
    parser.add_argument("--vq", action="store_true", help="also time the image tokenizer on the frames of one prompt")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    from tqdm import tqdm

    from ..benchmarking import measure
    from ..benchmarking.cases import build_model
    from ..benchmarking.vq import time_image_tokenizer
    from ..serving.loading import choose_device

    cases = cases_of(args)
    device = choose_device(args.device)
    dtype = getattr(torch, args.dtype or ("float32" if args.shape == "small" else "bfloat16"))
    with measure.threads(args.threads):
        model = build_model(args.shape, device, dtype)
        ceilings = measure.measure_ceilings(device, dtype)
        rounds = (args.repeats + 1) * sum(len(arms) for arms in cases.values())
        samples: dict[Any, measure.Samples] = {}
        with tqdm(total=rounds, file=sys.stderr, unit="run") as bar:

            def progress(text: str) -> None:
                bar.set_description(text, refresh=False)
                bar.update()

            for what in dict.fromkeys(case.what for case in cases):
                chosen = [case for case in cases if case.what == what]
                samples |= measure.measure(model, cases[chosen[0]], chosen, args.repeats, progress)
        rows = measure.rows_of(samples, model, ceilings)
        document = {
            "shape": args.shape,
            "dtype": str(dtype).removeprefix("torch."),
            "repeats": args.repeats,
            "machine": measure.machine(device),
            "ceilings": vars(ceilings),
            "rows": rows,
            "ratios": measure.ratios_of(rows),
        }
        if args.vq:
            document["vq"] = [time_image_tokenizer(device, px, max(args.frames), args.repeats) for px in args.px]
    print(format_tables(document))
    return document


def cases_of(args: argparse.Namespace) -> dict[Any, list[str]]:
    """Every combination, with the arms that apply to it. Raises ValueError on a wrong arm or size."""
    from ..benchmarking.arms import known_arm
    from ..benchmarking.cases import Case

    arms = list(dict.fromkeys(args.arms))
    for arm in arms:
        if not any(known_arm(arm, what) for what in args.what):
            raise ValueError(f"there is no arm {arm} for {' and '.join(args.what)}: see worldvla bench --help")
    for px in args.px:
        if px % 32 or px > 1024:
            raise ValueError(f"a picture side is a multiple of 32 up to 1024, not {px}")
    if "D-overlap" in arms and 1 in args.frames:
        raise ValueError("D-overlap prefills the older frames: it needs --frames of 2 or more")
    cases: dict[Any, list[str]] = {}
    for what in dict.fromkeys(args.what):
        counts = [(m, k) for m in args.frames for k in args.actions] if what == "chunk" else [(1, 1)]
        fitting = [arm for arm in arms if known_arm(arm, what)]
        cases |= {Case(what, px, m, k, batch): fitting for px in args.px for m, k in counts for batch in args.batch}
    return cases


def format_tables(document: dict[str, Any]) -> str:
    """The rows and the ratios for people."""
    machine, ceilings = document["machine"], document["ceilings"]
    lines = [
        f"{document['shape']} shape, {document['dtype']}, {machine['device']}, {machine['threads']} threads: "
        f"{ceilings['bandwidth'] / 1e9:.1f} GB/s read, {ceilings['throughput'] / 1e9:.0f} GFLOP/s measured",
        "",
    ]
    header = ["arm", "what", "px", "frames", "actions", "batch", "median", "p95", "prefill", "decode", "forwards"]
    table = [[*header, "per s", "of limit", "agreement"]]
    for row in document["rows"]:
        rate = row["actions_per_s"] if row["what"] == "chunk" else row["frames_per_s"]
        times = [seconds(row[name]) for name in ("median_s", "p95_s", "prefill_s", "decode_s")]
        limit = f"{row['fraction_of_limit']:.0%}" if "fraction_of_limit" in row else "-"
        fixed = [str(row[name]) for name in header[:6]]
        table.append([*fixed, *times, str(row["forwards"]), f"{rate:.2f}", limit, f"{row['agreement']:.1%}"])
    lines += align(table)
    if document["ratios"]:
        table = [
            ["ratio", "what", "px", "actions", "batch", "measured", "CPU time", "decode phase", "predicted", "of it"]
        ]
        for row in document["ratios"]:
            phase = "-" if row["decode_phase"] is None else f"{row['decode_phase']:.2f}"
            shown = [str(row[name]) for name in ("ratio", "what", "px", "actions", "batch")]
            figures = [f"{row['measured']:.2f}", f"{row['cpu_time']:.2f}", phase, f"{row['predicted']:.2f}"]
            table.append([*shown, *figures, f"{row['of_predicted']:.0%}"])
        lines += ["", *align(table)]
    for row in document.get("vq", []):
        lines.append(
            f"image tokenizer, {row['px']} px: {row['frames']} frames in {row['encode_s']:.3f} s, "
            f"a frame back in {row['decode_s']:.3f} s"
        )
    return "\n".join(lines)


def seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def align(table: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
