"""Predictions beside a recording: which frames and actions are shown, which are compared, and how they are pooled."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_checkpoint import GANTRY, NUM_ACTIONS, small_model, small_processor, with_cameras, write_episode
from tqdm import tqdm

from transformers_worldvla import WorldVLAForCausalLM, WorldVLAProcessor
from transformers_worldvla.data import Episode, load_episodes
from transformers_worldvla.evaluation import open_loop
from transformers_worldvla.evaluation.metrics import psnr

CAMERAS = ("image", "wrist")


class Setup:
    """A random model, its processor, an episode of 14 steps and what the model sees of it."""

    def __init__(self, folder: Path, *cameras: str):
        self.processor: WorldVLAProcessor = small_processor(with_cameras(*cameras))
        self.model: WorldVLAForCausalLM = small_model(self.processor)
        self.episode: Episode = load_episodes(write_episode(folder, cameras=cameras))[0]
        self.recording = open_loop.read_recording(self.model, self.processor, self.episode, batch_size=4)

    def frames(self, step: int) -> list[np.ndarray]:
        """The recorded pictures of a step, one a camera."""
        return [self.episode.frame(camera, step) for camera in self.recording.cameras]


def same_pictures(pictures: Any, others: Any) -> bool:
    """Equal but for one grey level: a batch of another size rounds otherwise before the cast to uint8."""
    pair = [np.stack([np.asarray(picture) for picture in each]).astype(int) for each in (pictures, others)]
    return pair[0].shape == pair[1].shape and abs(pair[0] - pair[1]).max() <= 1


@pytest.fixture(scope="module", params=[CAMERAS[:1], CAMERAS], ids=["one camera", "two cameras"])
def setup(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return Setup(tmp_path_factory.mktemp("episode"), *request.param)


def test_recording_is_what_the_model_sees(setup: Setup) -> None:
    recording, processor = setup.recording, setup.processor
    assert len(recording) == len(setup.episode) == 14
    assert recording.pictures.shape == (14, len(recording.cameras), 64, 64, 3) and recording.pictures.dtype == np.uint8
    assert recording.codes.shape == (14, len(recording.cameras), 4, 4)
    for step in (0, 6, 13):
        pixels = processor.image_processor(images=setup.frames(step), return_tensors="pt")["pixel_values"]
        ids = setup.model.tokenize_images(pixels)
        assert np.array_equal(recording.codes[step], ids.numpy())
        decoded = processor.image_processor.postprocess(setup.model.detokenize_images(ids))
        assert same_pictures(recording.reconstructed[step], decoded)
        for shown, frame in zip(recording.pictures[step], setup.frames(step), strict=True):
            assert np.array_equal(shown, open_loop.crop_for_model(processor, frame))
    again = processor.image_processor(images=list(recording.pictures[6]), return_tensors="pt")["pixel_values"]
    assert np.array_equal(setup.model.tokenize_images(again).numpy(), recording.codes[6]), (
        "cropping twice changes nothing"
    )


def test_chunks_are_those_of_a_policy_at_that_step(setup: Setup) -> None:
    starts = [0, 1, 5, 10]
    chunks = open_loop.predict_chunks(setup.model, setup.processor, setup.recording, starts, batch_size=3)
    assert chunks.shape == (4, NUM_ACTIONS, 7)
    for start, chunk in zip(starts, chunks, strict=True):
        seen = [frame for step in range(max(0, start - 1), start + 1) for frame in setup.frames(step)]
        inputs = setup.processor(images=seen, instruction="push the square to the right")
        tokens = setup.model.generate_actions(**inputs, num_actions=NUM_ACTIONS)
        assert np.array_equal(chunk, setup.processor.decode_actions(tokens)[0])
    assert len(np.unique(chunks.round(6), axis=0)) > 1, "the model must tell steps apart, or this test shows nothing"
    longer = open_loop.predict_chunks(setup.model, setup.processor, setup.recording, [5], num_actions=6)
    assert longer.shape == (1, 6, 7)


@pytest.mark.parametrize("num_history", [1, 2])
def test_next_frames_follow_the_recorded_frame_and_action(setup: Setup, num_history: int) -> None:
    steps = [0, 4, 12]
    frames = open_loop.predict_next_frames(
        setup.model, setup.processor, setup.recording, steps, num_history, batch_size=2
    )
    assert frames.shape == (3, len(setup.recording.cameras), 64, 64, 3) and frames.dtype == np.uint8
    for step, imagined in zip(steps, frames, strict=True):
        first = max(0, step + 1 - num_history)
        seen = [frame for t in range(first, step + 1) for frame in setup.frames(t)]
        inputs = setup.processor(images=seen, actions=setup.episode.actions[first : step + 1])
        expected = setup.processor.decode_frames(setup.model.generate_frames(**inputs), setup.model)[0]
        assert same_pictures(imagined, expected)
    drafted = open_loop.predict_next_frames(
        setup.model, setup.processor, setup.recording, steps, num_history, draft="previous"
    )
    assert same_pictures(drafted, frames)


@pytest.mark.parametrize("feedback", ["tokens", "pixels"])
def test_rollouts_follow_the_recorded_actions(setup: Setup, feedback: str, capsys: pytest.CaptureFixture[str]) -> None:
    starts, horizon = [0, 3, 9], 3
    rollouts = open_loop.roll_out(
        setup.model, setup.processor, setup.recording, starts, horizon, feedback=feedback, batch_size=2, progress=True
    )
    assert rollouts.shape == (3, horizon, len(setup.recording.cameras), 64, 64, 3)
    assert "9/9" in capsys.readouterr().err
    for start, rollout in zip(starts, rollouts, strict=True):
        plan = setup.episode.actions[start : start + horizon]
        expected = setup.model.imagine(setup.processor, setup.frames(start), plan, feedback=feedback)
        steps = [step if isinstance(step, list) else [step] for step in expected]
        assert all(same_pictures(*pair) for pair in zip(rollout, steps, strict=True))
    first = open_loop.predict_next_frames(setup.model, setup.processor, setup.recording, starts)
    assert same_pictures(rollouts[:, 0], first), "a rollout begins with the next frame"


def test_starts_leave_room_for_a_last_action_and_a_whole_chunk() -> None:
    assert open_loop.chunk_starts(14, 4) == list(range(1, 11))
    assert open_loop.chunk_starts(14, 4, stride=3) == [1, 4, 7, 10]
    assert open_loop.chunk_starts(5, 4) == [1]
    assert open_loop.rollout_starts(11, 5) == [0, 5]
    assert open_loop.rollout_starts(10, 5) == [0]
    assert open_loop.rollout_starts(9, 5, stride=1) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="4 steps is too short for chunks of 4 actions"):
        open_loop.chunk_starts(4, 4)
    with pytest.raises(ValueError, match="5 steps is too short for rollouts of 5 steps"):
        open_loop.rollout_starts(5, 5)


def test_actions_are_compared_step_by_step(setup: Setup) -> None:
    actions, starts = setup.episode.actions, [1, 6, 10]
    perfect = np.stack([actions[start : start + NUM_ACTIONS] for start in starts]).astype(np.float64)
    comparison = open_loop.compare_actions(setup.recording, starts, perfect)
    mean = actions.mean(axis=0)
    summary = open_loop.summarize_actions([comparison], mean)
    assert summary["l1"]["model"]["total"] == 0
    assert summary["chunks"] == 3 and summary["num_actions"] == NUM_ACTIONS and summary["constant_dimensions"] == [5]
    for step in range(NUM_ACTIONS):
        by_mean = np.mean([np.abs(actions[start + step] - mean) for start in starts])
        by_last = np.mean([np.abs(actions[start + step] - actions[start - 1]) for start in starts])
        assert summary["l1"]["mean_action"]["per_step"][step] == pytest.approx(by_mean, abs=1e-6)
        assert summary["l1"]["repeat_last_action"]["per_step"][step] == pytest.approx(by_last, abs=1e-6)
    shifted = open_loop.compare_actions(setup.recording, starts, perfect + 0.5)
    assert open_loop.summarize_actions([shifted], mean)["l1"]["model"]["per_dimension"] == pytest.approx([0.5] * 7)


def test_next_frames_are_compared_with_the_frame_after(setup: Setup) -> None:
    recording, steps = setup.recording, [0, 5, 12]
    perfect = recording.pictures[[1, 6, 13]]
    compared = open_loop.compare_next_frames(recording, steps, perfect)["psnr"]
    assert compared["model"] == pytest.approx([80.0] * 3)
    for row, step in enumerate(steps):
        after = recording.pictures[step + 1]
        assert compared["copy_last_frame"][row] == pytest.approx(psnr(recording.pictures[step], after).mean())
        assert compared["reconstruction_ceiling"][row] == pytest.approx(
            psnr(recording.reconstructed[step + 1], after).mean()
        )
        assert compared["copy_last_frame"][row] < 40


def test_rollouts_are_compared_with_the_last_frame_seen(setup: Setup) -> None:
    recording, starts, horizon = setup.recording, [0, 8], 5
    perfect = np.stack([recording.pictures[start + 1 : start + 1 + horizon] for start in starts])
    compared = open_loop.compare_rollouts(recording, starts, perfect)["psnr"]
    assert compared["model"] == pytest.approx(np.full((2, horizon), 80.0))
    for (row, start), ahead in ((pair, ahead) for pair in enumerate(starts) for ahead in range(1, horizon + 1)):
        then = recording.pictures[start + ahead]
        assert compared["copy_last_frame"][row, ahead - 1] == pytest.approx(
            psnr(recording.pictures[start], then).mean()
        )
        ceiling = psnr(recording.reconstructed[start + ahead], then).mean()
        assert compared["reconstruction_ceiling"][row, ahead - 1] == pytest.approx(ceiling)
    summary = open_loop.summarize_psnr([{"psnr": compared}])
    assert summary["samples"] == 2
    assert summary["psnr"]["copy_last_frame"] == pytest.approx(compared["copy_last_frame"].mean(axis=0))


def test_episodes_are_pooled_sample_by_sample(setup: Setup) -> None:
    """A long episode counts more than a short one: every chunk and every frame has the same weight."""
    rng = np.random.default_rng(0)

    def comparison(count: int) -> dict[str, Any]:
        shape = (count, NUM_ACTIONS, 7)
        return {
            "predicted": rng.normal(size=shape),
            "recorded": rng.normal(size=shape),
            "last": rng.normal(size=(count, 7)),
        }

    parts = [comparison(2), comparison(5)]
    merged = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    assert open_loop.summarize_actions(parts, np.zeros(7)) == open_loop.summarize_actions([merged], np.zeros(7))
    frames = [{"psnr": {"model": np.array([10.0, 20.0])}}, {"psnr": {"model": np.array([30.0])}}]
    assert open_loop.summarize_psnr(frames) == {"samples": 3, "psnr": {"model": 20.0}}


def test_evaluation_of_several_episodes_is_the_sum_of_its_parts(setup: Setup) -> None:
    mean = setup.episode.actions.mean(axis=0)
    options = {"stride": 4, "horizon": 4, "batch_size": 8}
    report = open_loop.evaluate_open_loop(setup.model, setup.processor, [setup.episode] * 2, mean, **options)
    assert report["episodes"] == 2
    assert report["actions"]["chunks"] == 2 * len([1, 5, 9])
    assert report["next_frame"]["samples"] == 2 * len([0, 4, 8, 12])
    assert report["rollout"]["samples"] == 2 * len([0, 4, 8]) and report["rollout"]["horizon"] == 4
    starts = [1, 5, 9]
    chunks = open_loop.predict_chunks(setup.model, setup.processor, setup.recording, starts)
    alone = open_loop.summarize_actions([open_loop.compare_actions(setup.recording, starts, chunks)], mean)
    assert report["actions"]["l1"]["model"]["per_step"] == pytest.approx(alone["l1"]["model"]["per_step"])
    assert len(report["rollout"]["psnr"]["model"]) == 4


def test_what_does_not_fit_is_said(setup: Setup) -> None:
    with pytest.raises(ValueError, match="cameras"):
        open_loop.read_recording(setup.model, setup.processor, setup.episode, cameras=["image", "wrist", "third"])
    with pytest.raises(ValueError, match='no camera "wirst" here; the cameras are: image'):
        names = ["wirst", "image"][: len(setup.recording.cameras)]
        open_loop.read_recording(setup.model, setup.processor, setup.episode, cameras=names)
    with pytest.raises(ValueError, match=r"actions have D=7, not those of gantry \(D=3\)"):
        open_loop.read_recording(setup.model, small_processor(GANTRY), setup.episode, cameras=["image"])


def test_step_counter_is_a_processor(setup: Setup) -> None:
    with tqdm(total=4, disable=True) as bar:
        counter = open_loop.StepCounter(setup.processor, bar)
        assert counter.num_actions == NUM_ACTIONS
        inputs = counter(images=setup.frames(0), instruction="go")
        assert torch.equal(inputs["input_ids"], setup.processor(images=setup.frames(0), instruction="go")["input_ids"])
