"""Rollouts against recordings: which frames are compared, how they are pooled, and what a killed run leaves."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_checkpoint import small_model, small_processor, with_cameras, write_episode

from transformers_worldvla import WorldVLAForCausalLM, WorldVLAProcessor
from transformers_worldvla.data import Episode, load_episodes
from transformers_worldvla.evaluation.metrics import psnr
from transformers_worldvla.evaluation.open_loop import read_recording
from transformers_worldvla.evaluation.perceptual import ssim
from transformers_worldvla.evaluation.world_model import (
    CANDIDATES,
    Instruments,
    Protocol,
    clip_starts,
    evaluate_world_model,
    measure_episode,
    summarize,
    summarize_fvd,
)

pytest.importorskip("torchmetrics")
INSTRUMENTS = Instruments({"psnr": psnr, "ssim": ssim}, missing={"lpips": "no network", "fvd": "no network"})
PROTOCOL = Protocol(horizons=(3, 6), batch_size=4)


class Features:
    """Mean colours in place of I3D's features, which need a network."""

    def __call__(self, clips: np.ndarray) -> np.ndarray:
        return clips.mean((1, 2, 3)).astype(np.float64)


class Setup:
    def __init__(self, folder: Path, *cameras: str):
        self.processor: WorldVLAProcessor = small_processor(with_cameras(*cameras))
        self.model: WorldVLAForCausalLM = small_model(self.processor)
        for number, steps in enumerate((14, 9, 5)):
            write_episode(folder / str(number), steps=steps, cameras=cameras, seed=number)
        self.episodes: list[Episode] = []
        for number in range(3):
            episode = load_episodes(folder / str(number))[0]
            episode.index = number
            self.episodes.append(episode)

    def evaluate(self, output: Path, protocol: Protocol = PROTOCOL, **options: Any) -> dict[str, Any]:
        instruments = options.pop("instruments", INSTRUMENTS)
        return evaluate_world_model(self.model, self.processor, self.episodes, output, protocol, instruments, **options)


@pytest.fixture(scope="module", params=[("image",), ("image", "wrist")], ids=["one camera", "two cameras"])
def setup(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return Setup(tmp_path_factory.mktemp("episodes"), *request.param)


def test_clips_lie_end_to_end_or_are_spread() -> None:
    assert clip_starts(32, 10) == [0, 10, 20]  # the frame after 10 steps from 20 is the 31st
    assert clip_starts(30, 10) == [0, 10]
    assert clip_starts(10, 10) == []
    assert clip_starts(101, 10, clips=4) == [0, 30, 60, 90]
    assert clip_starts(32, 10, clips=9) == [0, 10, 20]


@pytest.mark.parametrize("feedback", ["pixels", "tokens"])
def test_numbers_are_those_of_imagine(setup: Setup, feedback: str) -> None:
    """Frame by frame, without any of the code that measures."""
    episode = setup.episodes[1]
    recording = read_recording(setup.model, setup.processor, episode)
    protocol = Protocol(horizons=(4,), feedback=feedback, batch_size=1)
    row, imagined, features = measure_episode(setup.model, setup.processor, recording, 4, protocol, INSTRUMENTS)
    assert row["starts"] == [0, 4] and features == {}
    assert imagined.shape == (2, 4, len(recording.cameras), 64, 64, 3)
    for clip, start in enumerate(row["starts"]):
        first = list(recording.pictures[start])
        plan = episode.actions[start : start + 4]
        frames = setup.model.imagine(setup.processor, first if len(first) > 1 else first[0], plan, feedback=feedback)
        for ahead, frame in enumerate(frames):
            pictures = np.stack([np.asarray(one) for one in (frame if isinstance(frame, list) else [frame])])
            target = recording.pictures[start + ahead + 1]
            for name, metric in (("psnr", psnr), ("ssim", ssim)):
                assert row[name]["model"][clip][ahead] == pytest.approx(metric(pictures, target).mean(), abs=1e-2)
                copied = metric(recording.pictures[start], target).mean()
                assert row[name]["copy_last_frame"][clip][ahead] == pytest.approx(copied, abs=1e-4)
                ceiling = metric(recording.reconstructed[start + ahead + 1], target).mean()
                assert row[name]["reconstruction_ceiling"][clip][ahead] == pytest.approx(ceiling, abs=1e-4)


def test_summary_pools_clips_and_says_what_is_missing(setup: Setup, tmp_path: Path) -> None:
    summary = setup.evaluate(tmp_path / "run")
    assert summary["missing"] == INSTRUMENTS.missing
    rows = [json.loads(line) for line in (tmp_path / "run/episodes.jsonl").read_text().splitlines()]
    assert [(row["episode"], row["horizon"]) for row in rows] == [(0, 3), (0, 6), (1, 3), (1, 6), (2, 3)]
    at_3 = summary["horizons"]["3"]
    assert (at_3["episodes"], at_3["clips"]) == (3, 4 + 2 + 1) and summary["episodes"] == 3
    for metric in ("psnr", "ssim"):
        for name in CANDIDATES:
            clips = np.concatenate([row[metric][name] for row in rows if row["horizon"] == 3])
            assert clips.shape == (7, 3)
            assert at_3[metric][name]["mean"] == pytest.approx(clips.mean())
            assert at_3[metric][name]["curve"] == pytest.approx(clips.mean(0))
    assert json.loads((tmp_path / "run/summary.json").read_text()) == summary


def test_a_run_that_was_cut_off_ends_with_the_same_bytes(setup: Setup, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    instruments = Instruments(INSTRUMENTS.metrics, Features())  # type: ignore[arg-type]
    expected = setup.evaluate(whole, instruments=instruments)
    setup.evaluate(cut, instruments=instruments)
    lines = (cut / "episodes.jsonl").read_text().splitlines(keepends=True)
    (cut / "episodes.jsonl").write_text("".join(lines[:2]) + lines[2][:40])  # killed while the third was written
    (cut / "summary.json").unlink()
    assert setup.evaluate(cut, instruments=instruments) == expected
    for name in ("episodes.jsonl", "run.json", "summary.json"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()


def test_a_folder_takes_no_rows_of_other_settings(setup: Setup, tmp_path: Path) -> None:
    setup.evaluate(tmp_path, settings={"checkpoint": "a"})
    before = (tmp_path / "episodes.jsonl").read_bytes()
    with pytest.raises(ValueError, match="checkpoint differs"):
        setup.evaluate(tmp_path, settings={"checkpoint": "b"})
    with pytest.raises(ValueError, match="feedback differs"):
        setup.evaluate(
            tmp_path, Protocol(horizons=(3, 6), batch_size=4, feedback="tokens"), settings={"checkpoint": "a"}
        )
    assert (tmp_path / "episodes.jsonl").read_bytes() == before


def test_fvd_pools_the_clips_of_all_episodes_and_cameras(setup: Setup, tmp_path: Path) -> None:
    instruments = Instruments(INSTRUMENTS.metrics, Features())  # type: ignore[arg-type]
    summary = setup.evaluate(tmp_path, Protocol(horizons=(2,), batch_size=8), instruments=instruments)
    cameras = len(setup.processor.get_embodiment().cameras)
    fvd = summary["horizons"]["2"]["fvd"]
    clips = (6 + 4 + 2) * cameras
    assert fvd["clips"] == clips and fvd["protocol"] == f"fvd_i3d_n{clips}_t2_224"
    if clips < 16:
        assert fvd["model"] is None and "too few" in fvd["warning"]
    else:
        assert fvd["model"] > fvd["reconstruction_ceiling"] >= 0 or fvd["model"] >= 0
    rng = np.random.default_rng(0)
    recorded = rng.normal(size=(40, 3))
    shifted = {name: recorded + shift for name, shift in zip(CANDIDATES, (2.0, 3.0, 0.0), strict=True)}
    numbers = summarize_fvd({"recorded": recorded, **shifted}, 10)
    assert [numbers[name] for name in CANDIDATES] == pytest.approx([12.0, 27.0, 0.0], abs=1e-9)


def test_summarize_weighs_clips_not_episodes() -> None:
    def row(episode: int, values: list[list[float]]) -> dict[str, Any]:
        return {
            "episode": episode,
            "horizon": 2,
            "starts": list(range(len(values))),
            "psnr": {name: values for name in CANDIDATES},
        }

    numbers = summarize([row(0, [[30.0, 20.0], [30.0, 20.0]]), row(1, [[18.0, 8.0]])])["horizons"]["2"]["psnr"]["model"]
    assert numbers["mean"] == pytest.approx(21.0) and numbers["curve"] == pytest.approx([26.0, 16.0])
    assert numbers["standard_error"] == pytest.approx(6.0)  # of the means 25 and 13


def test_no_episode_is_long_enough(setup: Setup, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the longest has 14 steps"):
        setup.evaluate(tmp_path, Protocol(horizons=(50,)))
