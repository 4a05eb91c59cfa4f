"""Draws growth curves from the documents of `worldvla bench --json`.

    worldvla bench --arms A C D --actions 1 2 5 10 --json > actions.json
    python benchmarks/plot_speed.py actions --values actions.json --output docs/assets/performance-actions.png

The first argument names what grows: actions, frames, px or batch. Needs matplotlib.
"""

import argparse
import json
from pathlib import Path

LABELS = {"actions": "actions in a chunk (K)", "frames": "pictures (M)", "px": "picture side", "batch": "prompts"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grows", choices=LABELS)
    parser.add_argument("--values", nargs="+", type=Path, required=True, help="documents of worldvla bench --json")
    parser.add_argument("--arms", nargs="+", help="some of them (all)")
    parser.add_argument("--time", choices=("median_s", "cpu_s"), default="median_s")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for path in args.values for row in json.loads(path.read_text())["rows"]]
    rows = [row for row in rows if args.arms is None or row["arm"] in args.arms]
    figure, axes = pyplot.subplots(figsize=(4.2, 2.8), dpi=100)
    for arm in dict.fromkeys(row["arm"] for row in rows):
        points = sorted((row[args.grows], row[args.time]) for row in rows if row["arm"] == arm)
        axes.plot(*zip(*points, strict=True), marker="o", label=arm)
    axes.set_xlabel(LABELS[args.grows])
    axes.set_ylabel("processor seconds" if args.time == "cpu_s" else "seconds")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.tight_layout()
    figure.savefig(args.output)


if __name__ == "__main__":
    main()
