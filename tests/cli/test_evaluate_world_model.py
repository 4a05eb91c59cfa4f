"""`worldvla evaluate world-model`: numbers of the library, files, and one line for bad input."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from transformers_worldvla.data.cache import HEADER

pytest.importorskip("torchmetrics")


def command(checkpoint: Path, dataset: Path, output: Path, *more: object) -> tuple[object, ...]:
    arguments = ("--model", checkpoint, "--episodes", dataset, "--output", output, "--horizons", 3, 6)
    return ("evaluate", "world-model", *arguments, *more)


def test_measures_draws_and_goes_on(
    worldvla: Callable[..., Any], robot_checkpoint: Path, dataset: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    result = worldvla(*command(robot_checkpoint, dataset, output, "--json"))
    assert result.code == 0, result.err
    summary = result.document
    assert set(summary["horizons"]) == {"3", "6"} and summary["horizons"]["3"]["clips"] == 4
    for name in ("model", "copy_last_frame", "reconstruction_ceiling"):
        assert len(summary["horizons"]["6"]["psnr"][name]["curve"]) == 6
        assert 0 < summary["horizons"]["6"]["ssim"][name]["mean"] <= 1
    assert "lpips" in summary["missing"] and "vgg16" in summary["missing"]["lpips"]
    assert "copy last frame" in result.err and "was not computed" in result.err and "3 frames ahead" in result.err
    with Image.open(output / "episode_000000_h6.gif") as gif:
        assert gif.n_frames == 6 and gif.width > 2.5 * 256
    rows = (output / "episodes.jsonl").read_bytes()
    assert len(rows.splitlines()) == 2

    again = worldvla(*command(robot_checkpoint, dataset, output, "--json"))
    assert again.document == summary and "rollout frames" not in again.err, "nothing is imagined twice"
    assert (output / "episodes.jsonl").read_bytes() == rows


def test_a_split_is_that_of_tokenize(
    worldvla: Callable[..., Any], robot_checkpoint: Path, dataset: Path, tmp_path: Path
) -> None:
    result = worldvla(*command(robot_checkpoint, dataset, tmp_path / "a", "--split", "train", "--json"))
    assert result.code == 0 and result.document["episodes_measured"] == [0]
    result = worldvla(*command(robot_checkpoint, dataset, tmp_path / "b", "--split", "val_ind"))
    assert result.code == 2 and "no episode" in result.err and not (tmp_path / "b").exists()


def test_a_split_is_that_of_a_cache(
    worldvla: Callable[..., Any], robot_checkpoint: Path, dataset: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    made = worldvla("tokenize", dataset, "--model", robot_checkpoint, "--output", cache, "--split", "none")
    assert made.code == 0, made.err
    result = worldvla(
        *command(robot_checkpoint, dataset, tmp_path / "a", "--cache", cache, "--split", "train", "--json")
    )
    assert result.code == 0 and result.document["episodes_measured"] == [0]

    header = json.loads((cache / HEADER).read_text())
    header["dataset"]["fingerprint"] = "another"
    (cache / HEADER).write_text(json.dumps(header))
    result = worldvla(*command(robot_checkpoint, dataset, tmp_path / "b", "--cache", cache, "--split", "train"))
    assert result.code == 2 and "was not made from" in result.err


@pytest.mark.parametrize(
    "options, message",
    [
        (("--cache", "c"), "--cache does nothing without --split"),
        (("--cache", "c", "--split", "train"), "c holds no cache"),
        (("--index", 3), "has the episodes 0 to 0"),
        (("--index", 0, "--split", "train"), "exclude each other"),
        (("--horizons", 99), "the longest has 14 steps"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(
    worldvla: Callable[..., Any],
    robot_checkpoint: Path,
    dataset: Path,
    tmp_path: Path,
    options: tuple[object, ...],
    message: str,
) -> None:
    result = worldvla(*command(robot_checkpoint, dataset, tmp_path / "run", *options))
    assert result.code == 2 and result.out == ""
    assert message in result.err.strip().splitlines()[-1]


def test_settings_of_a_folder_do_not_mix(
    worldvla: Callable[..., Any], robot_checkpoint: Path, dataset: Path, tmp_path: Path
) -> None:
    assert worldvla(*command(robot_checkpoint, dataset, tmp_path, "--gifs", 0)).code == 0
    assert json.loads((tmp_path / "run.json").read_text())["feedback"] == "pixels"
    result = worldvla(*command(robot_checkpoint, dataset, tmp_path, "--feedback", "tokens"))
    assert result.code == 2 and "feedback differs" in result.err
