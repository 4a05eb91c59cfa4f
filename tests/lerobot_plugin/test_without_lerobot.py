"""Where LeRobot is missing the plugin says so, and nothing else notices."""

import ast
import sys
from importlib import import_module
from pathlib import Path

import pytest

import transformers_worldvla

PACKAGE = Path(transformers_worldvla.__file__).parent


def test_the_plugin_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = "transformers_worldvla.lerobot"
    for name in list(sys.modules):
        if name.partition(".")[0] == "lerobot" or name.startswith(plugin):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lerobot", None)  # as if it were not there
    with pytest.raises(ImportError) as error:
        import_module(plugin)
    assert str(error.value) == f"{plugin} is a plugin of LeRobot, which is not installed here"


def test_only_the_plugin_imports_lerobot() -> None:
    importing = set()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            if any(name.partition(".")[0] == "lerobot" for name in names):
                importing.add(file.relative_to(PACKAGE).parts[0])
    assert importing == {"lerobot"}
