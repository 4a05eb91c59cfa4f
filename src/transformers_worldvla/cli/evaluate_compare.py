"""`worldvla evaluate compare`: is one result better than another, episode by episode?"""

import argparse
from collections.abc import Mapping
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
    from ..evaluation.results import compare_pairs, format_rate, pair_episodes, read_episodes

    first, second = read_episodes(args.first), read_episodes(args.second)
    try:
        pairs = pair_episodes(first, second)
    except ValueError as error:
        raise UserError(f"{args.first} and {args.second}: {error}") from error
    if not pairs:
        raise UserError(f"{args.first} and {args.second} have no episode in common that ended in both")
    document: dict[str, Any] = {
        "first": args.first,
        "second": args.second,
        "unpaired": [len(first) - len(pairs), len(second) - len(pairs)],
        **compare_pairs(pairs),
        "suites": {
            suite: compare_pairs([pair for pair in pairs if pair[0]["suite"] == suite])
            for suite in sorted({row["suite"] for row, _ in pairs})
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


def _describe(name: str, numbers: Mapping[str, Any]) -> str:
    return (
        f"{name}: B - A = {100 * numbers['difference']:+.1f} points over {numbers['pairs']} pairs; only A solved "
        f"{numbers['only_first']}, only B {numbers['only_second']}; McNemar's exact p = {numbers['p_value']:.3g}"
    )
