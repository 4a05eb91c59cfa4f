"""`worldvla evaluate compare`: is one result better than another, episode by episode?"""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from .errors import UserError

_EPILOG = """\
examples:
  worldvla evaluate compare results-without-mask results-with-mask
  worldvla evaluate compare a/episodes.jsonl.gz b --json

Pairs are episodes of the same suite, task and trial, so of the same initial state. McNemar's exact test asks whether
the pairs that only one of the two solved are as many on either side.
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "compare",
        help="paired test of two results",
        description="Compare two results of `worldvla evaluate libero` or `gym` episode by episode.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("first", metavar="A", help="result folder, episodes.jsonl or episodes.jsonl.gz")
    parser.add_argument("second", metavar="B", help="the other")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    from ..evaluation.results import episode_key, format_rate, read_episodes

    first, second = ({episode_key(row): row for row in read_episodes(path)} for path in (args.first, args.second))
    shared = sorted(first.keys() & second.keys())
    for key in shared:
        if first[key]["episode_seed"] != second[key]["episode_seed"]:
            raise UserError(f"{args.first} and {args.second} were run with different --seed: they have no pairs")
    ended = [key for key in shared if first[key]["success"] is not None and second[key]["success"] is not None]
    if not ended:
        raise UserError(f"{args.first} and {args.second} have no episode in common that ended in both")
    document: dict[str, Any] = {
        "first": args.first,
        "second": args.second,
        "unpaired": [len(first) - len(ended), len(second) - len(ended)],
        **_compare([first[key] for key in ended], [second[key] for key in ended]),
        "suites": {
            suite: _compare(
                [first[key] for key in ended if key[0] == suite], [second[key] for key in ended if key[0] == suite]
            )
            for suite in sorted({key[0] for key in ended})
        },
    }
    print(f"A {args.first}: {format_rate(document['rates'][0])}")
    print(f"B {args.second}: {format_rate(document['rates'][1])}")
    print(_describe("all", document))
    if len(document["suites"]) > 1:
        for suite, numbers in document["suites"].items():
            print(_describe(suite, numbers))
    if any(document["unpaired"]):
        print(f"left out, without a partner that ended: {document['unpaired'][0]} of A, {document['unpaired'][1]} of B")
    return document


def _compare(first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts and p value of paired rows, all of which ended."""
    from ..evaluation.results import rate
    from ..evaluation.statistics import mcnemar_exact

    pairs = [(a["success"], b["success"]) for a, b in zip(first, second, strict=True)]
    only_first, only_second = pairs.count((True, False)), pairs.count((False, True))
    return {
        "pairs": len(pairs),
        "rates": [rate(first), rate(second)],
        "difference": (only_second - only_first) / len(pairs),
        "both": pairs.count((True, True)),
        "only_first": only_first,
        "only_second": only_second,
        "neither": pairs.count((False, False)),
        "p_value": mcnemar_exact(only_first, only_second),
    }


def _describe(name: str, numbers: Mapping[str, Any]) -> str:
    return (
        f"{name}: B - A = {100 * numbers['difference']:+.1f} points over {numbers['pairs']} pairs; only A solved "
        f"{numbers['only_first']}, only B {numbers['only_second']}; McNemar's exact p = {numbers['p_value']:.3g}"
    )
