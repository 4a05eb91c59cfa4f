"""What an installation holds: built as a wheel, and used from somewhere else than the repository."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from transformers_worldvla import assets

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCE = REPOSITORY / "src" / "transformers_worldvla"
BUNDLED = [name for name in (assets.DEFAULT_CHECKPOINT, assets.DEFAULT_EPISODE) if (REPOSITORY / "hub" / name).is_dir()]


def run(*command: object, cwd: Path) -> str:
    """Run a command without the suite's environment variables; returns stdout."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PYTHON", "VIRTUAL_"))}
    result = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=1500
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, REPOSITORY, cwd=folder)
    return next(folder.glob("*.whl"))


def test_missing_asset_says_where_it_was_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hub" / "no-such-asset").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)  # the working directory is never looked at
    with pytest.raises(
        FileNotFoundError, match="no no-such-asset: looked in .*transformers_worldvla/hub/no-such-asset"
    ):
        assets.bundled_folder("no-such-asset")


@pytest.mark.slow
def test_wheel_holds_the_source_and_the_bundled_folders(wheel: Path) -> None:
    packages = (SOURCE, SOURCE.parent / "worldvla_client")
    files = [path for package in packages for path in package.rglob("*") if path.suffix in (".py", ".npz")]
    expected = {str(path.relative_to(SOURCE.parent)): path for path in files}
    for name in BUNDLED:
        folder = REPOSITORY / "hub" / name
        files = [path for path in folder.rglob("*") if path.is_file()]
        expected |= {f"transformers_worldvla/hub/{name}/{path.relative_to(folder)}": path for path in files}
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert packed == expected.keys()
        for name, path in expected.items():
            assert archive.read(name) == path.read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_wheel_works_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    environment, elsewhere = tmp_path / "environment", tmp_path / "elsewhere"
    elsewhere.mkdir()
    venv.create(environment, with_pip=True)
    pip = (
        environment / "bin" / "python",
        "-m",
        "pip",
        "install",
        "-q",
        "--no-compile",
        "-c",
        REPOSITORY / "constraints.txt",
    )
    run(*pip, "torch", cwd=elsewhere)
    run(*pip, wheel, cwd=elsewhere)

    assert "usage: worldvla" in run(environment / "bin" / "worldvla", "--help", cwd=elsewhere)
    script = """
import sys, transformers_worldvla
from transformers_worldvla.assets import bundled_folder
for name in transformers_worldvla.__all__:
    getattr(transformers_worldvla, name)
print(*map(bundled_folder, sys.argv[1:]))
"""
    folders = run(environment / "bin" / "python", "-c", script, *BUNDLED, cwd=elsewhere).split()
    assert len(folders) == len(BUNDLED) and all(folder.startswith(str(environment)) for folder in folders)

    run(environment / "bin" / "worldvla", "demo", cwd=elsewhere)
    assert {path.name for path in (elsewhere / "worldvla-demo").iterdir()} >= {"demo.gif", "demo.png", "demo.json"}
