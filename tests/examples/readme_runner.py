"""Runs the commands of an example's README, in this process where that is possible: torch is imported once."""

import importlib
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from transformers_worldvla.cli.main import main

EXAMPLES = Path(__file__).parents[2] / "examples"


def readme_commands(folder: Path) -> list[list[str]]:
    """The words of every command in the README's first block of shell, `pip` left out."""
    block = re.search(r"```bash\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    lines = [line.partition(" #")[0] for line in block[1].replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := line.split()) and words[0] not in ("#", "pip", "cd")]


def make_runner(
    folder: Path,
    shorter: Mapping[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    apart: Sequence[str] = (),
) -> Callable[[list[str]], str]:
    """A function that runs a command with the options of `shorter` after its own and returns what it printed.

    `shorter` names a part of each command. Scripts that start processes of themselves are run `apart`.
    """
    monkeypatch.syspath_prepend(str(folder))

    def run(words: list[str]) -> str:
        (options,) = [options for name, options in shorter.items() if name in " ".join(words)]
        arguments = [*words[1:], *options.split()]
        if arguments[0] in apart:
            command = [sys.executable, str(folder / arguments[0]), *arguments[1:]]
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600)
            assert done.returncode == 0, done.stderr
            return done.stdout
        capsys.readouterr()
        if words[0] == "worldvla":
            assert main(arguments) == 0, capsys.readouterr().err
        else:
            monkeypatch.setattr(sys, "argv", arguments)
            name = arguments[0].removesuffix(".py")
            monkeypatch.delitem(sys.modules, name, raising=False)  # another example may have a script of that name
            importlib.import_module(name).main()
        return capsys.readouterr().out

    return run
