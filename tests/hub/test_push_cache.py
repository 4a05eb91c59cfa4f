"""`worldvla tokenize --push-to-hub`: the cache as an ordinary dataset repository, through the real upload client."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import FakeHub
from robot_folder import write_recordings
from small_checkpoint import write_checkpoint

from transformers_worldvla.cli.main import main
from transformers_worldvla.data import FrameTokenCache

REPO = "tester/toy-tokens"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    from huggingface_hub import constants

    with FakeHub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "any")
        yield server


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    dataset = write_recordings(tmp_path / "toy", (5, 6, 7))
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    return ["tokenize", *map(str, [dataset, "--model", checkpoint, "--output", tmp_path / "cache", "--device", "cpu"])]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_pushed_as_an_ordinary_dataset(
    command: list[str], hub: FakeHub, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--json", "--push-to-hub", REPO, "--private"]) == 0
    address = json.loads(capfd.readouterr().out)["repository"]
    assert address.startswith(f"{hub.endpoint}/") and hub.commit(REPO)["oid"] in address
    cache = contents(tmp_path / "cache")
    assert {name: hub.files(REPO)[name] for name in cache} == cache
    assert b'path: "data/train-*.parquet"' in hub.files(REPO)["README.md"]

    # a finished cache is pushed without encoding it again, in place of files that it no longer has
    assert main([*command, "--json", "--push-to-hub", REPO]) == 0
    assert json.loads(capfd.readouterr().out)["frames_encoded"] == 0
    assert {name: hub.files(REPO)[name] for name in cache} == cache


def test_a_push_that_fails_loses_nothing(
    command: list[str], hub: FakeHub, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--push-to-hub", "no good name"]) == 2
    assert "is complete, but no good name refused it: " in capfd.readouterr().err.splitlines()[-1]
    assert FrameTokenCache(tmp_path / "cache").splits["train"] > 0
