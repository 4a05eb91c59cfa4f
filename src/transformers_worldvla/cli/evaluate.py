"""`worldvla evaluate`: the measurements of a model, each a module `evaluate_<name>.py` beside this one."""

import argparse
import pkgutil
from importlib import import_module
from typing import Any

_PREFIX = "evaluate_"


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "evaluate",
        help="measure a model: in a simulator, as a world model; compare two results",
        description="Measure a model. `worldvla evaluate <what> --help` shows examples.",
    )
    measurements = parser.add_subparsers(title="measurements", metavar="<what>", required=True)
    for name in measurement_modules():
        module = import_module(f"{__package__}.{name}")
        own_parser = module.add_parser(measurements)
        own_parser.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the trace of an error"
        )
        own_parser.set_defaults(measure=module.run)
    return parser


def measurement_modules() -> list[str]:
    """The modules beside this one that measure something."""
    package = import_module(__package__ or "")
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__) if module.name.startswith(_PREFIX))


def run(args: argparse.Namespace) -> Any:
    return args.measure(args)
