"""The dispatcher of the command line: finds the commands, parses, runs one, turns errors into exit codes.

It knows nothing of what the commands do. Exit codes: 0 done, 2 bad input, 130 interrupted; anything else that goes
wrong is a defect and shows its trace (exit code 1). A command whose answer may be "no" sets `args.exit_code` (`worldvla
doctor`: 1 when a check failed).
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn, TextIO

from .errors import BAD_INPUT, one_line

COMMANDS = (
    "demo",
    "convert",
    "predict",
    "imagine",
    "tokenize",
    "train",
    "evaluate",
    "serve",
    "doctor",
    "bench",
    "push",
)


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line instead of repeating the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `worldvla argv` (default: the process's own arguments) and return its exit code."""
    args = build_parser().parse_args(argv)
    try:
        return _run(args)
    except KeyboardInterrupt:
        print(f"{args.prog}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of stdout has gone, as in `worldvla ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except BAD_INPUT as error:
        if args.debug:
            raise
        print(f"{args.prog}: {one_line(error)}", file=sys.stderr)
        return 2


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command that exists, in the order of `COMMANDS`."""
    parser = OneLineParser(prog="worldvla", description="WorldVLA: robot actions and imagined frames from one model.")
    parser.add_argument("--version", action=_Version)
    subparsers = parser.add_subparsers(title="commands", metavar="<command>", required=True)
    for name in COMMANDS:
        if find_spec(f"{__package__}.{name}") is None:
            continue
        command = import_module(f"{__package__}.{name}")
        command_parser = command.add_parser(subparsers)
        command_parser.add_argument("--debug", action="store_true", help="show the trace of an error")
        command_parser.set_defaults(run=command.run, prog=command_parser.prog, exit_code=0)
    return parser


class _Version(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, **_: Any):
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help="show the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from .. import __version__

        print(f"transformers_worldvla {__version__}")
        parser.exit()


def _run(args: argparse.Namespace) -> int:
    from .. import register_auto_classes

    register_auto_classes()
    if not getattr(args, "json", False):
        args.run(args)
        sys.stdout.flush()
        return args.exit_code
    with _stdout_for_json() as stdout:
        document = json.dumps(to_json(args.run(args)), indent=2, allow_nan=False)
        stdout.write(document + "\n")
    return args.exit_code


@contextmanager
def _stdout_for_json() -> Iterator[TextIO]:
    """Keep stdout for one document: whatever else is printed, also by C libraries, goes to stderr."""
    sys.stdout.flush()
    original = os.dup(1)
    os.dup2(2, 1)
    try:
        with os.fdopen(os.dup(original), "w", encoding="utf-8") as stdout, redirect_stdout(sys.stderr):
            yield stdout
    finally:
        os.dup2(original, 1)
        os.close(original)


def to_json(value: Any) -> Any:
    """Plain JSON values of a result: arrays become lists, paths strings; NaN and infinities, which JSON lacks, null."""
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if hasattr(value, "tolist"):  # numpy and torch
        return to_json(value.tolist())
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
