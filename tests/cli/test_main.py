"""The dispatcher, driven through a command of the tests' own."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from transformers_worldvla import __version__, cli
from transformers_worldvla.cli import main as dispatcher

PROBE = '''
"""A command that does what its arguments say."""
import os
import sys
from pathlib import Path
import numpy as np
from transformers_worldvla.cli.errors import UserError
ERRORS = {
    "user": UserError("no such embodiment: choose libero"),
    "value": ValueError("first line\\n  second line"),
    "file": FileNotFoundError(2, "No such file or directory", "missing.json"),
    "extra": ImportError("simulation needs the extra libero"),
    "interrupt": KeyboardInterrupt(),
    "defect": RuntimeError("a defect"),
}
def add_parser(subparsers):
    parser = subparsers.add_parser("probe", help="a command of the tests")
    parser.add_argument("--fail", choices=ERRORS)
    parser.add_argument("--json", action="store_true")
    return parser
def run(args):
    print("progress of python")
    os.write(1, b"progress of a C library\\n")
    if args.fail:
        raise ERRORS[args.fail]
    return {"psnr": np.float32(30.5), "actions": np.zeros((1, 2)), "folder": Path("a"), "undefined": float("nan")}
'''


@pytest.fixture
def probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "probe.py").write_text(PROBE)
    monkeypatch.setattr(cli, "__path__", [*cli.__path__, str(tmp_path)])
    monkeypatch.setattr(dispatcher, "COMMANDS", ("probe", "absent"))
    yield
    sys.modules.pop("transformers_worldvla.cli.probe", None)


def test_lists_the_commands_that_exist(probe: None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        dispatcher.main(["--help"])
    assert exit_.value.code == 0
    output = capsys.readouterr().out
    assert "probe" in output and "absent" not in output


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        dispatcher.main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"transformers_worldvla {__version__}\n"


def test_without_json_people_read_stdout(probe: None, capfd: pytest.CaptureFixture[str]) -> None:
    assert dispatcher.main(["probe"]) == 0
    captured = capfd.readouterr()
    assert sorted(captured.out.splitlines()) == ["progress of a C library", "progress of python"]
    assert captured.err == ""


def test_json_is_the_only_thing_on_stdout(probe: None, capfd: pytest.CaptureFixture[str]) -> None:
    assert dispatcher.main(["probe", "--json"]) == 0
    captured = capfd.readouterr()
    assert json.loads(captured.out) == {"psnr": 30.5, "actions": [[0.0, 0.0]], "folder": "a", "undefined": None}
    assert "progress of python" in captured.err and "progress of a C library" in captured.err
    dispatcher.main(["probe"])
    assert "progress of python" in capfd.readouterr().out, "stdout is given back after a --json run"


@pytest.mark.parametrize(
    ("fail", "message"),
    [
        ("user", "worldvla probe: no such embodiment: choose libero\n"),
        ("value", "worldvla probe: first line second line\n"),
        ("file", "worldvla probe: No such file or directory: missing.json\n"),
        ("extra", "worldvla probe: simulation needs the extra libero\n"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    probe: None, capfd: pytest.CaptureFixture[str], fail: str, message: str
) -> None:
    assert dispatcher.main(["probe", "--json", "--fail", fail]) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines(keepends=True)[-1] == message
    with pytest.raises((ValueError, OSError, ImportError, dispatcher.BAD_INPUT[0])):
        dispatcher.main(["probe", "--debug", "--fail", fail])


def test_interruption_and_defects(probe: None, capfd: pytest.CaptureFixture[str]) -> None:
    assert dispatcher.main(["probe", "--fail", "interrupt"]) == 130
    assert capfd.readouterr().err == "worldvla probe: interrupted\n"
    with pytest.raises(RuntimeError, match="a defect"):
        dispatcher.main(["probe", "--fail", "defect"])


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["probe", "--nonsense"], ["probe", "--fail", "nonsense"]])
def test_bad_arguments_are_one_line(probe: None, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        dispatcher.main(arguments)
    assert exit_.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and "--help" in captured.err


def test_help_loads_nothing_heavy() -> None:
    script = (
        "import sys; from transformers_worldvla.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    )
    script += "sys.exit(', '.join({'torch', 'transformers', 'numpy'} & set(sys.modules)) or None)"
    command = [sys.executable, "-c", script, "-m", "transformers_worldvla.cli"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


def test_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "transformers_worldvla.cli", "nonsense"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert result.stdout == "" and result.stderr.count("\n") == 1
