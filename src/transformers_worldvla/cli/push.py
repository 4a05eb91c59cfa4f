"""`worldvla push`: a model, an adapter, a frame-token cache or a Space as a Hub repository, checked, with its card."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoints import ADAPTER_CONFIG, Checkpoint
from .errors import UserError

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

    from ..publishing import Publication

NOTICE = "NOTICE"
_EPILOG = """\
examples:
  # what would go there, with its card; nothing is sent and nothing is written
  worldvla push runs/goal me/worldvla-goal --dry-run
  # a trained model with the results of its evaluation
  worldvla push runs/goal me/worldvla-goal --results results/goal --private
  # an adapter, whose base has a repository already, to a branch
  worldvla push runs/lora me/worldvla-lora --base-model me/worldvla-7b --revision rank-32
  # a frame-token cache, as a dataset repository
  worldvla push my-cache me/goal-tokens
  # the page on which visitors see a model act and imagine, as a Space
  worldvla push hub/space me/worldvla-demo

PATH says itself what it is. Of a run only the checkpoint goes to the Hub: not the Trainer's state, not run.json
with this machine's paths, no pickles. The card in PATH is kept; what this command knows stands between two markers in
it and is written anew at every push.
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "push",
        help="publish a model, an adapter, a frame-token cache or a Space on the Hub",
        description="Check a folder, fill its card and upload it to a Hub repository.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("path", metavar="PATH", help="a model, an adapter, a cache of `worldvla tokenize`, a Space")
    parser.add_argument("repository", metavar="REPO", help="owner/name; it is made where there is none")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to push to (the default one)")
    parser.add_argument("--dry-run", action="store_true", help="check, print files and card, and stop")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    group = parser.add_argument_group("card of a model or adapter")
    group.add_argument("--results", nargs="+", default=[], metavar="DIR", help="of `worldvla evaluate` with it")
    group.add_argument("--license", metavar="ID", help="of the weights, as the Hub names it (the card's)")
    group.add_argument("--base-model", metavar="REPO", help="Hub id that it was fine-tuned from (the card's)")
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    from ..publishing import inspect_folder, upload_folder
    from ..publishing.folder import CACHE, SPACE, STALE

    folder = Path(args.path).expanduser()
    _check_repository(args.repository)
    publication = inspect_folder(folder)
    has_card = publication.kind in (CACHE, SPACE)
    if has_card and (args.results or args.license or args.base_model):
        raise UserError(
            f"--results, --license and --base-model belong to models and adapters: a {publication.kind} has its card"
        )
    card = None if has_card else _card(publication, args)
    notice = None if card is None else _notice(card, folder)
    files = sorted({*publication.files, *([NOTICE] if notice else [])})
    for finding in publication.findings:
        if finding.verdict == "warning":
            print(f"note: {finding.check}: {finding.found}; {finding.advice}", file=sys.stderr)
    document = {
        "path": str(folder),
        "kind": publication.kind,
        "repository": args.repository,
        "revision": args.revision,
        "files": files,
        "checks": [finding.to_dict() for finding in publication.findings],
        "card": str(card) if card is not None else (folder / "README.md").read_text(encoding="utf-8"),
        "dry_run": args.dry_run,
        "commit": None,
    }
    if args.dry_run:
        _print_plan(document, publication)
        return document
    if card is not None:
        _write(folder, "README.md", str(card))
        if notice is not None:
            _write(folder, NOTICE, notice)
        if args.base_model and (folder / ADAPTER_CONFIG).is_file():
            _name_base(folder, args.base_model)
    document["commit"] = upload_folder(
        folder,
        args.repository,
        publication.repo_type,
        args.private,
        args.revision,
        files=files,
        delete=STALE[publication.kind],
        space_sdk=publication.space_sdk,
    )
    print(f"pushed the {publication.kind} {folder} to {document['commit']}")
    return document


def _check_repository(repository: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"{repository!r} is no name of a repository (owner/name): {error}") from error


def _card(publication: "Publication", args: argparse.Namespace) -> "ModelCard":
    """The filled card. Raises UserError for results of other weights and for a base that only this machine has."""
    from ..diagnosis.versions import version_table
    from ..publishing import fill_card
    from ..publishing.card import adapter_base
    from ..publishing.folder import ADAPTER
    from .closed_loop import versions

    folders = [Path(each).expanduser() for each in args.results]
    for each in folders:
        _check_results(each, publication.folder)
    if publication.kind == ADAPTER and args.base_model is None:
        base = adapter_base(publication.folder)
        if not base or os.path.isabs(base) or Path(base).exists():
            named = f"the adapter's base {base} is a folder of this machine" if base else "the adapter names no base"
            raise UserError(f"{named}, nobody else could open it: name the base's repository with --base-model")
    return fill_card(publication, version_table() | versions(), folders, args.license, args.base_model)


def _notice(card: "ModelCard", folder: Path) -> str | None:
    """What the file NOTICE must say where there is none; says what else Chameleon's licence asks for."""
    from ..publishing.card import CHAMELEON_NOTICE, CHAMELEON_TEXT, has_chameleon_license

    if not has_chameleon_license(card):
        return None
    if not any(folder.glob("LICENSE*")):
        advice = (
            f"the Chameleon Research License asks for a copy of itself: save {CHAMELEON_TEXT} as {folder / 'LICENSE'}"
        )
        print(f"note: {advice}", file=sys.stderr)
    return None if any(folder.glob(f"{NOTICE}*")) else CHAMELEON_NOTICE


def _check_results(results: Path, folder: Path) -> None:
    """Raise UserError unless the results were made with the weights in the folder."""
    from ..evaluation.results import EPISODES_FILE, SETTINGS_FILE
    from .closed_loop import hash_checkpoint

    if missing := [name for name in (EPISODES_FILE, SETTINGS_FILE) if not (results / name).is_file()]:
        raise UserError(f"--results {results}: no folder that `worldvla evaluate` wrote ({missing[0]} is missing)")
    found = json.loads((results / SETTINGS_FILE).read_text(encoding="utf-8")).get("checkpoint")
    wanted = hash_checkpoint(Checkpoint(str(folder), is_folder=True))
    if found != wanted:
        made = "a scripted policy" if found is None else f"another checkpoint (sha256 {found[:12]}, not {wanted[:12]})"
        raise UserError(f"--results {results} are of {made}: evaluate {folder} itself")


def _name_base(folder: Path, base: str) -> None:
    """Make the adapter name its base's repository."""
    document = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    document["base_model_name_or_path"] = base
    _write(folder, ADAPTER_CONFIG, json.dumps(document, indent=2, sort_keys=True) + "\n")


def _write(folder: Path, name: str, text: str) -> None:
    """Whole or not at all."""
    from .files import new_files

    with new_files(folder) as staging:
        (staging / name).write_text(text, encoding="utf-8")


def _print_plan(document: dict[str, Any], publication: "Publication") -> None:
    branch = f", branch {document['revision']}" if document["revision"] else ""
    print(f"{publication.kind} {publication.folder} -> {document['repository']}{branch}: nothing was sent\n")
    for name in document["files"]:
        file = publication.folder / name
        print(f"  {name}  {file.stat().st_size:,} bytes" if file.is_file() else f"  {name}  (written by the push)")
    print(f"\n{document['card']}")
