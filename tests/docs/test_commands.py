"""Every command that the documentation, the README and the examples show is one that exists: nothing is run here.

Commands of `worldvla` are parsed with all their options; of other programs the files, extras and options that they name
must be there.
"""

import re
import tomllib
from pathlib import Path

import pytest
from doc_pages import (
    OTHER_PAGES,
    PAGES,
    ROOT,
    blocks,
    command_lines,
    inline_code,
    name,
    parse_error,
    unknown_flags,
    words_of,
    worldvla_arguments,
)

EVERYWHERE = [pytest.param(page, id=name(page)) for page in [*OTHER_PAGES, *PAGES] if page.exists()]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def complaint(words: list[str], page: Path) -> str | None:
    """What is wrong with a command; None for one that may be typed."""
    arguments = worldvla_arguments(words)
    if arguments is not None:
        return parse_error(arguments)
    for package, extras in re.findall(r"(transformers_worldvla)\[([\w,]+)\]", " ".join(words)):
        if unknown := set(extras.split(",")) - set(EXTRAS):
            return f"{package} has no extra {', '.join(sorted(unknown))}"
    if words[0] in ("bash", "python") and len(words) > 1:
        scripts = [folder / words[1] for folder in (ROOT, page.parent) if (folder / words[1]).is_file()]
        if not scripts:
            return f"there is no {words[1]}"
        source = scripts[0].read_text(encoding="utf-8")
        flags = [word.partition("=")[0] for word in words[2:] if word.startswith("--")]
        return next((f"{words[1]} has no {flag}" for flag in flags if flag not in source), None)
    return None


@pytest.mark.parametrize("page", EVERYWHERE)
def test_commands_exist_with_their_options(page: Path) -> None:
    lines = [(block, line) for block in blocks(page) if block.language == "bash" for line in command_lines(block.code)]
    found = [(str(block), line, complaint(words_of(line), page)) for block, line in lines if words_of(line)]
    assert [each for each in found if each[2] is not None] == []


@pytest.mark.parametrize("page", EVERYWHERE)
def test_options_in_the_text_exist(page: Path) -> None:
    assert {code: unknown for code in inline_code(page) if (unknown := unknown_flags(code, page))} == {}


def test_an_option_that_does_not_exist_is_found() -> None:
    assert parse_error(["train", "--no-such-option"]) and parse_error(["no-such-command"])
    assert parse_error(["evaluate", "libero", "--suite", "libero_goal"])  # --output is missing
    assert parse_error(["evaluate", "libero", "--suite", "libero_goal", "--output", "x"]) is None
    page = ROOT / "README.md"
    assert unknown_flags("worldvla serve --porte 1", page) == ["--porte"]
    assert unknown_flags("--no-such-option", page) == ["--no-such-option"]
    assert unknown_flags("worldvla fly", page) == ["worldvla fly"]
    assert complaint(["bash", "scripts/no_such.sh"], page)
    assert complaint(["pip", "install", "transformers_worldvla[no_such]"], page)
    assert complaint(["python", "benchmarks/draft_acceptance.py", "--no-such-option"], page)
