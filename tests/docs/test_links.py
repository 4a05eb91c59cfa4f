"""Links and names in the documentation lead somewhere: files, anchors, tests. Pages of the web are not asked."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest
from doc_pages import DOCS, OTHER_PAGES, PAGES, ROOT, blocks, name

EVERY_PAGE = [*OTHER_PAGES, *PAGES, ROOT / "CHANGELOG.md", DOCS / "experiments.md"]
EVERYWHERE = [pytest.param(page, id=name(page)) for page in EVERY_PAGE if page.exists()]
SITE = [pytest.param(page, id=name(page)) for page in PAGES]
SOURCES = ("src", "tests", "examples", "docs", "benchmarks", "scripts", "hub")


def prose(page: Path) -> str:
    """The text without its blocks of code."""
    text = page.read_text(encoding="utf-8")
    for block in blocks(page):
        text = text.replace(block.code, "")
    return text


def links(page: Path) -> list[str]:
    """Targets of links and pictures that are no web addresses."""
    text = re.sub(r"`[^`\n]*`", "", prose(page))
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


@cache
def anchors(page: Path) -> frozenset[str]:
    """Of the headings, as GitHub and the site make them."""
    headings = re.findall(r"^#{1,6} (.+?)\s*$", prose(page), re.M)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)|[`*]", r"\1", heading) for heading in headings]
    return frozenset(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain)


@pytest.mark.parametrize("page", EVERYWHERE)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    dead = []
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    assert dead == []


@pytest.mark.parametrize("page", SITE)
def test_the_site_does_not_link_out_of_itself(page: Path) -> None:
    """A relative link to a file that is not in docs/ works on GitHub and is dead on the site: name the path instead."""
    inside = [(page.parent / link.partition("#")[0]).resolve().is_relative_to(DOCS) for link in links(page)]
    assert [link for link, is_inside in zip(links(page), inside, strict=True) if not is_inside] == []


@pytest.mark.parametrize("page", EVERYWHERE)
def test_files_and_tests_that_are_named_exist(page: Path) -> None:
    if page.name == "experiments.md":
        pytest.skip("a log names what was there then")
    missing = []
    for file, test in re.findall(rf"`((?:{'|'.join(SOURCES)})/[\w./-]+?)(?:::(\w+))?`", prose(page)):
        path = ROOT / file
        if not path.exists() or (test and not re.search(rf"def {test}\(", path.read_text(encoding="utf-8"))):
            missing.append(f"{file}::{test}" if test else file)
    assert missing == []


# -------------------------------------------------------------------- messages that are explained


@cache
def templates() -> tuple[str, ...]:
    """Every text in the sources, with a hole for each value that is filled in."""
    found = []
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(p.value if isinstance(p, ast.Constant) else "\0" for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return tuple(found)


def is_said_somewhere(message: str) -> bool:
    """Do the words between the `...` of a message stand in one text of the sources, in this order?"""
    parts = [re.escape(part.strip()) for part in message.split("...") if part.strip()]
    pattern = re.compile(r"[\s\S]*?".join(parts))
    return any(pattern.search(template) for template in templates())


@pytest.mark.parametrize("page", SITE)
def test_messages_that_are_explained_are_said(page: Path) -> None:
    """The first column of a table under a heading "What goes wrong"."""
    section = re.search(r"^## What goes wrong$(.*?)(?=^## |\Z)", prose(page), re.M | re.S)
    messages = re.findall(r"^\| `([^`]+)` \|", section[1], re.M) if section else []
    assert [message for message in messages if not is_said_somewhere(message)] == []


def test_a_message_that_nobody_says_is_found() -> None:
    assert is_said_somewhere("the observation has no picture ..., only the keys ...")
    assert not is_said_somewhere("only the keys ... the observation has no picture")
    assert not is_said_somewhere("the robot is on holiday")
