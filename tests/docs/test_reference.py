"""Every public name has a docstring and an entry in the reference, and every entry is a name that exists."""

import ast
import importlib
import re
from functools import cache
from typing import Any

import pytest
from doc_pages import DOCS, ROOT

# packages whose `__all__` is public; of evaluation and serving, what the reference lists is
PACKAGES = (
    "transformers_worldvla",
    "transformers_worldvla.data",
    "transformers_worldvla.diagnosis",
    "transformers_worldvla.publishing",
    "transformers_worldvla.training",
    "worldvla_client",
)
NAMES = [f"{package}.{name}" for package in PACKAGES for name in importlib.import_module(package).__all__]


def entries() -> list[str]:
    pages = sorted((DOCS / "reference").glob("*.md"))
    return [each for page in pages for each in re.findall(r"^::: (\S+)", page.read_text(encoding="utf-8"), re.M)]


@cache
def find(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_is_in_the_reference(name: str) -> None:
    if isinstance(find(name), dict):  # a constant has no docstring of its own: it stands in the text
        assert name in (DOCS / "reference" / f"{name.split('.')[1]}.md").read_text(encoding="utf-8")
    else:
        assert any(find(entry) is find(name) for entry in entries())


@pytest.mark.parametrize("entry", entries())
def test_an_entry_has_a_docstring(entry: str) -> None:
    found = find(entry)
    own = found.__dict__.get("__doc__") if isinstance(found, type) else found.__doc__
    assert own and not own.startswith(f"{found.__name__}(")  # what a dataclass writes by itself


def test_no_entry_is_there_twice() -> None:
    assert len(entries()) == len({id(find(entry)) for entry in entries()})


def test_docstrings_hold_no_bare_html() -> None:
    """`<boi>` outside of backticks would vanish from the page as a tag that browsers do not know."""
    found = []
    for file in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                text = re.sub(r"`[^`]*`", "", ast.get_docstring(node) or "")
                found += [f"{file.name}, {node.name}: {tag}" for tag in re.findall(r"<[a-zA-Z/][^<>\n]*>", text)]
    assert found == []
