"""The tables of the WorldVLA paper on a small model: trains and evaluates row after row, and writes the document.

    python reproduce.py --dataset DATA --output runs/tables --list             # the plan and what it costs
    python reproduce.py --dataset DATA --output runs/tables --processes 2      # all of it, the first things first
    python reproduce.py --dataset DATA --output runs/tables --rows "table3.*" --trials 5
    python reproduce.py --output runs/tables --report --document ../../docs/paper_tables.md

DATA is a dataset of LIBERO demonstrations as `examples/libero_demonstrations` records it. Killed at any point and
started again, it goes on.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import plan
import report
import stages
from rows import ROWS, SUITES, Row, Training, choose_rows
from store import Budget, Store, read_budget

from transformers_worldvla.cli.closed_loop import parse_numbers, parse_trials
from transformers_worldvla.cli.errors import BAD_INPUT, one_line

STAGES = ("train", "success", "frames", "speed")


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        run(args)
    except BAD_INPUT as error:
        parser.exit(2, f"{parser.prog}: {one_line(error)}\n")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="reproduce.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="of all that is trained and measured")
    parser.add_argument("--list", action="store_true", help="print the plan, with its cost on one CPU core, and stop")
    parser.add_argument("--report", action="store_true", help="only write the document")
    parser.add_argument("--document", type=Path, metavar="FILE", help="(OUTPUT/paper_tables.md)")
    group = parser.add_argument_group("what is run")
    group.add_argument("--rows", nargs="+", default=["*"], metavar="NAME", help='such as table3.5 or "figure6.*" (all)')
    group.add_argument(
        "--stages", nargs="+", default=STAGES, choices=STAGES, metavar="S", help=f"{', '.join(STAGES)} (all)"
    )
    group.add_argument("--processes", type=int, default=1, help="simulators beside each other (%(default)s)")
    group.add_argument("--cache", type=Path, action="append", default=[], metavar="DIR", help="made before; repeatable")
    budget, default = parser.add_argument_group("budget of every row (default: what OUTPUT was begun with)"), Budget()
    budget.add_argument("--dataset", metavar="DATA", help="demonstrations: a folder or Hub id")
    budget.add_argument("--instructions", nargs="+", metavar="TEXT", help="train on episodes with these only (all)")
    budget.add_argument("--model", metavar="M", help=f"whose image tokenizer and sizes are taken ({default.model})")
    budget.add_argument("--steps", type=int, metavar="N", help=f"of the optimizer ({default.steps})")
    budget.add_argument("--batch-size", type=int, metavar="N", help=f"({default.batch_size})")
    budget.add_argument("--learning-rate", type=float, metavar="X", help=f"({default.learning_rate})")
    budget.add_argument(
        "--moved-weight", type=float, metavar="X", help=f"of codes that change ({default.moved_weight})"
    )
    budget.add_argument("--precision", choices=("bf16", "fp32"), help="(that of `worldvla train`)")
    budget.add_argument("--seed", type=int, metavar="N", help=f"({default.seed})")
    budget.add_argument("--suite", choices=SUITES, metavar="S", help=f"{', '.join(SUITES)} ({default.suite})")
    budget.add_argument("--tasks", metavar="T", help=f"such as 1,4 or 0-4 ({default.tasks})")
    budget.add_argument("--trials", metavar="N", help=f"initial states of a task ({default.trials})")
    budget.add_argument("--max-steps", type=int, metavar="N", help="of an episode (the suite's)")
    budget.add_argument("--clips", type=int, metavar="N", help="imagined of a validation episode, at most (all)")
    return parser


def run(args: argparse.Namespace) -> None:
    given = {name: getattr(args, name) for name in Budget.__dataclass_fields__}
    store = Store(args.output, read_budget(args.output, {k: v for k, v in given.items() if v is not None}))
    parse_numbers(store.budget.tasks, "--tasks")
    parse_trials(store.budget.trials)
    rows = choose_rows(tuple(args.rows))
    if args.list:
        print(plan.describe_plan(store, rows))
        return
    document = args.document or args.output / "paper_tables.md"
    if not args.report:
        stages.begin(store, args.cache, {row.training.px for row in rows})
        for row in rows:
            run_row(store, row, args.stages, args.processes)
            write_document(store, document)
    write_document(store, document)
    print(f"wrote {document}", file=sys.stderr)


def run_row(store: Store, row: Row, wanted: tuple[str, ...], processes: int) -> None:
    """All of a row that is wanted and missing."""
    print(f"== {row.name}: {row.label}", file=sys.stderr, flush=True)
    if "speed" in row.measures and "speed" in wanted:
        stages.measure_speed(store, [other.training for other in ROWS.values() if "speed" in other.measures])
    if "train" in wanted:
        stages.train(store, row.training)
    if not store.is_trained(row.training):
        return
    if "success" in row.measures and "success" in wanted and not is_evaluated(store, row.training):
        stages.evaluate_success(store, row.training, processes)
    if "frames" in row.measures and "frames" in wanted:
        stages.evaluate_frames(store, row.training)


def is_evaluated(store: Store, training: Training) -> bool:
    """Whether every episode of the budget ended; one that crashed is tried again."""
    budget = store.budget
    wanted = {(task, trial) for task in parse_numbers(budget.tasks, "--tasks") for trial in parse_trials(budget.trials)}
    episodes = store.episodes(training)
    return wanted <= {(row["task"], row["trial"]) for row in episodes if row["success"] is not None}


def write_document(store: Store, document: Path) -> None:
    from transformers_worldvla.durable import write_whole

    document.parent.mkdir(parents=True, exist_ok=True)
    write_whole(document, report.write_report(store))


if __name__ == "__main__":
    main()
