"""Probes of a model: one that sees, reads and stands upright passes, and one broken in each of these ways does not."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diagnosis_data import ARM, usual_actions, write_recording

from transformers_worldvla import WorldVLAForCausalLM, WorldVLAProcessor
from transformers_worldvla.data import EpisodeDataset, load_episodes
from transformers_worldvla.diagnosis.probes import (
    TURNS,
    bin_logprobs,
    check_image_tokenizer,
    check_language_sensitivity,
    check_orientation,
    check_picture_sensitivity,
    check_round_trip,
    shuffle_patches,
    total_variation,
)
from transformers_worldvla.diagnosis.recording import Moment, invent_moments, read_moments
from transformers_worldvla.diagnosis.report import FAILED, OK, SKIPPED, WARNING


@pytest.fixture
def loaded(healthy: Path) -> tuple[Any, Any]:
    """A random model that looks and reads, and its processor; the model may be broken."""
    return WorldVLAForCausalLM.from_pretrained(healthy).eval(), WorldVLAProcessor.from_pretrained(healthy)


@pytest.fixture
def moments() -> list[Moment]:
    return invent_moments(ARM, history=2, num_actions=4, count=2, side=64)


@pytest.fixture(scope="session")
def real_moments(trained: tuple[Any, Any], real_episode: EpisodeDataset) -> list[Moment]:
    processor = trained[1]
    robot = processor.get_embodiment()
    return read_moments(real_episode, robot, processor.history, processor.num_actions, count=12)


# -------------------------------------------------------------------- moments


def test_moments_are_what_the_robot_saw_before_it_acted(tmp_path: Path) -> None:
    actions = usual_actions(9)
    for number, instruction in enumerate(("open the box", "lift the cup")):
        pictures = {camera: np.full((32, 32, 3), 100 * number + 10 * i, np.uint8) for i, camera in enumerate("ab")}
        write_recording(tmp_path, actions, cameras=pictures, instruction=instruction)
    robot = replace(ARM, cameras=("b", "a"))
    found = read_moments(load_episodes(tmp_path), robot, history=2, num_actions=3, count=4)
    assert len(found) == 4 and {moment.instruction for moment in found} == {"open the box", "lift the cup"}
    for moment in found:
        base = 100 * (moment.instruction == "lift the cup")
        assert [int(image.mean()) for image in moment.images] == [base + 10, base, base + 10, base]
        starts = [start for start in range(7) if np.allclose(actions[start : start + 3], moment.actions, atol=1e-6)]
        assert len(starts) == 1 and starts[0] >= 1


def test_an_episode_that_is_too_short(tmp_path: Path) -> None:
    dataset = load_episodes(write_recording(tmp_path, usual_actions(4)))
    with pytest.raises(ValueError, match="no episode has the 5 steps"):
        read_moments(dataset, ARM, history=2, num_actions=4, count=2)


# -------------------------------------------------------------------- distributions


def test_log_probabilities_are_those_of_generate_actions(loaded: tuple[Any, Any], moments: list[Moment]) -> None:
    model, processor = loaded
    inputs = processor(images=[list(m.images) for m in moments], instruction=[m.instruction for m in moments])
    answer = model.generate_actions(**inputs, num_actions=4, action_dim=3, return_dict_in_generate=True)
    chosen = processor.decode_actions(answer.sequences)  # greedy: its own answers as if they had been recorded
    told = [replace(moment, actions=chunk) for moment, chunk in zip(moments, chosen, strict=True)]
    scores, recorded = bin_logprobs(model, processor, ARM, told)
    assert scores.shape == (2, 12, 256)
    np.testing.assert_allclose(np.exp(scores).sum(-1), 1.0, atol=1e-9)
    np.testing.assert_allclose(recorded, scores.max(-1))
    np.testing.assert_allclose(recorded, answer.logprobs.reshape(2, -1).double(), atol=1e-4)


def test_total_variation_in_closed_form() -> None:
    a, b = np.log([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]]), np.log([[0.3, 0.3, 0.4], [0.2, 0.2, 0.6]])
    assert total_variation(a, b) == pytest.approx((0.2 + 0.0) / 2)


def test_shuffling_keeps_every_pixel() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (70, 100, 3), dtype=np.uint8)
    mixed = shuffle_patches(picture, np.random.default_rng(1))
    assert (mixed != picture).any()
    np.testing.assert_array_equal(np.sort(mixed.reshape(-1)), np.sort(picture.reshape(-1)))


# -------------------------------------------------------------------- pictures and words


def make_invisible(model: Any, tokens: Sequence[int]) -> None:
    """Give tokens one embedding: the model can no longer tell them apart."""
    with torch.no_grad():
        rows = model.model.embed_tokens.weight
        rows[list(tokens)] = rows[tokens[0]].clone()


def test_a_model_that_looks(loaded: tuple[Any, Any], moments: list[Moment]) -> None:
    finding = check_picture_sensitivity(*loaded, ARM, moments)
    assert finding.verdict == OK and set(finding.numbers["total_variation"]) == {"black", "white", "shuffled"}


def test_a_model_that_does_not_look(loaded: tuple[Any, Any], moments: list[Moment]) -> None:
    model, processor = loaded
    make_invisible(model, processor.tokens.image_codes)
    assert check_picture_sensitivity(model, processor, ARM, moments).verdict == FAILED
    assert check_language_sensitivity(model, processor, ARM, moments).verdict == OK


def test_a_model_that_hardly_looks(loaded: tuple[Any, Any], moments: list[Moment]) -> None:
    model, processor = loaded
    with torch.no_grad():
        codes = list(processor.tokens.image_codes)
        rows = model.model.embed_tokens.weight
        rows[codes] = rows[codes[0]] + 0.01 * (rows[codes] - rows[codes[0]])
    assert check_picture_sensitivity(model, processor, ARM, moments).verdict == WARNING


def test_a_model_that_reads(loaded: tuple[Any, Any], moments: list[Moment]) -> None:
    finding = check_language_sensitivity(*loaded, ARM, moments, ["drop the red cup", moments[0].instruction])
    assert finding.verdict == OK and list(finding.numbers["total_variation"]) == ["drop the red cup"]


def test_a_model_that_does_not_read(loaded: tuple[Any, Any], moments: list[Moment]) -> None:
    model, processor = loaded
    letters = processor.tokenizer.convert_tokens_to_ids([*"abcdefghijklmnopqrstuvwxyz", "Ġ", "?"])
    make_invisible(model, letters)
    same_length = "kick the tan dog up"  # another length would still move what comes after it
    assert len(same_length) == len(moments[0].instruction)
    assert check_language_sensitivity(model, processor, ARM, moments, [same_length]).verdict == FAILED
    assert check_picture_sensitivity(model, processor, ARM, moments).verdict == OK


# -------------------------------------------------------------------- a real model and a real recording


def test_the_bundled_checkpoint_sees_its_pictures_as_recorded(
    trained: tuple[Any, Any], real_moments: list[Moment]
) -> None:
    finding = check_orientation(*trained, trained[1].get_embodiment(), real_moments)
    assert finding.verdict == OK
    assert min(finding.numbers["loss"], key=finding.numbers["loss"].get) == "as recorded"


@pytest.mark.parametrize(
    "name", ["turned by 180 degrees", pytest.param("mirrored left to right", marks=pytest.mark.slow)]
)
def test_recordings_in_another_orientation(trained: tuple[Any, Any], real_moments: list[Moment], name: str) -> None:
    turned = [
        moment.with_images([np.ascontiguousarray(TURNS[name](image)) for image in moment.images])
        for moment in real_moments
    ]
    finding = check_orientation(*trained, trained[1].get_embodiment(), turned)
    assert finding.verdict == FAILED and f"must be {name} first" in finding.advice


def test_few_moments_say_nothing_about_orientation(loaded: tuple[Any, Any], moments: list[Moment]) -> None:
    assert check_orientation(*loaded, ARM, moments).verdict == SKIPPED


def test_an_image_tokenizer_that_knows_its_pictures(trained: tuple[Any, Any], real_moments: list[Moment]) -> None:
    finding, pictures = check_image_tokenizer(*trained, trained[1].get_embodiment(), real_moments[:2])
    assert finding.verdict == OK and pictures[0].shape == (128, 128, 3)


def test_an_image_tokenizer_with_random_weights(loaded: tuple[Any, Any], moments: list[Moment]) -> None:
    assert check_image_tokenizer(*loaded, ARM, moments)[0].verdict == FAILED


# -------------------------------------------------------------------- saving


def test_a_checkpoint_survives_saving(loaded: tuple[Any, Any], moments: list[Moment]) -> None:
    assert check_round_trip(*loaded, ARM, moments).verdict == OK


def test_what_is_lost_on_saving(loaded: tuple[Any, Any], moments: list[Moment]) -> None:
    model, processor = loaded
    model.lm_head.register_forward_hook(lambda _module, _inputs, logits: 2 * logits)
    finding = check_round_trip(model, processor, ARM, moments)
    assert finding.verdict == FAILED and finding.found.startswith("logits differ")


def test_settings_that_are_lost_on_saving(loaded: tuple[Any, Any], moments: list[Moment]) -> None:
    model, processor = loaded

    class Forgetful(type(processor)):  # type: ignore[misc]
        def to_dict(self) -> dict[str, Any]:
            return super().to_dict() | {"history": 2}

    processor.history, processor.__class__ = 3, Forgetful
    finding = check_round_trip(model, processor, ARM, moments)
    assert finding.verdict == FAILED and "history" in finding.found
