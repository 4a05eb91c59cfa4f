"""What the tests of the documentation share: pages, their blocks of code, the commands in them.

A block is run unless the line above it says `*Not run by the tests: REASON.*`, which readers see too.
"""

import contextlib
import io
import re
import shlex
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from transformers_worldvla.cli.evaluate import measurement_modules
from transformers_worldvla.cli.main import COMMANDS, build_parser

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
LOGS = ("experiments.md", "paper_tables.md")  # what was typed then; commands may have changed since
PAGES = sorted(path for path in DOCS.rglob("*.md") if path.name not in LOGS)
OTHER_PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "examples").glob("*/README.md"))]
LANGUAGES = ("bash", "python", "text", "json", "")  # of a fence; nothing that looks like a shell escapes the tests

_FENCE = re.compile(
    r"^(?:\*Not run by the tests: (?P<reason>.+?)\.\*\n+)?```(?P<language>[\w-]*)[^\n]*\n(?P<code>.*?)^```$",
    re.M | re.S,
)
_ASSIGNMENT = re.compile(r"[A-Z_]+=\S*")
_FLAG = re.compile(r"--[a-z][a-z-]*")


@dataclass(frozen=True)
class Block:
    """A block of code in a page, and the line it begins in."""

    page: Path
    line: int
    language: str
    code: str
    reason: str | None  # why it is not run

    def __str__(self) -> str:
        return f"{name(self.page)}:{self.line}"


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, each.start("code")) + 1, each["language"], each["code"], each["reason"])
        for each in _FENCE.finditer(text)
    ]


def command_lines(code: str) -> list[str]:
    """The commands of a bash block, each on a line of its own, without comments."""
    lines = code.replace("\\\n", " ").splitlines()
    return [line for line in lines if shlex.split(line, comments=True)]


def words_of(line: str) -> list[str]:
    """The words of a command up to `|`, `<`, `>` or `&`, without variables set before it and without comments."""
    words = shlex.split(line, comments=True)
    while words and _ASSIGNMENT.fullmatch(words[0]):
        words = words[1:]
    end = next((index for index, word in enumerate(words) if word in ("|", "<", ">", "&", "&&")), len(words))
    return words[:end]


def worldvla_arguments(words: list[str]) -> list[str] | None:
    """What the command line of `worldvla` gets, also through `python -m` or `accelerate launch`; None without it."""
    if words[0] == "worldvla":
        return words[1:]
    if "transformers_worldvla.cli" in words:
        return words[words.index("transformers_worldvla.cli") + 1 :]
    return None


def parse_error(arguments: list[str]) -> str | None:
    """What the parser says against a command line; None when it takes it."""
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
            _parser().parse_args(arguments)
    except SystemExit as end:
        return stderr.getvalue().strip() if end.code else None
    return None


@cache
def _parser():  # type: ignore[no-untyped-def]
    return build_parser()


@cache
def known_flags() -> dict[tuple[str, ...], frozenset[str]]:
    """The options of every command, by its words: `("evaluate", "libero")`."""
    measurements = [("evaluate", each.removeprefix("evaluate_").replace("_", "-")) for each in measurement_modules()]
    paths = [(), *((command,) for command in COMMANDS), *measurements]
    return {path: frozenset(_FLAG.findall(_help(path))) for path in paths}


def _help(path: tuple[str, ...]) -> str:
    stdout = io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.suppress(SystemExit):
        _parser().parse_args([*path, "--help"])
    return stdout.getvalue()


def inline_code(page: Path) -> list[str]:
    """What stands between single backticks outside of blocks."""
    return re.findall(r"`([^`\n]+)`", _FENCE.sub("", page.read_text(encoding="utf-8")))


def unknown_flags(code: str, page: Path) -> list[str]:
    """Options in inline code that no command has, or not the one it names; scripts beside the page may have some."""
    flags = _FLAG.findall(code)
    words = code.split()
    if words[0] not in ("worldvla", *flags) or words[1:2] == ["..."]:
        return []
    known = known_flags()
    if words[0] == "worldvla":
        named = [word for word in words[1:3] if not word.startswith("-")]
        path = tuple(named) if tuple(named) in known else tuple(named[:1])
        if path not in known:
            return [" ".join(words[:2])]
        allowed = known[path]
    else:
        scripts = [path.read_text(encoding="utf-8") for path in page.parent.glob("*.py")]
        allowed = frozenset().union(*known.values(), *(_FLAG.findall(script) for script in scripts))
    return [flag for flag in flags if flag not in allowed]
