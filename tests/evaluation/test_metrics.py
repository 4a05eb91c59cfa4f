"""The formulas, against numbers worked out by hand or written as loops."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from transformers_worldvla.evaluation.metrics import (
    action_l1,
    constant_dimensions,
    mean_action_chunks,
    psnr,
    read_action_mean,
    repeat_last_action,
)


def test_psnr_of_known_errors() -> None:
    black = np.zeros((4, 4, 3), np.uint8)
    assert psnr(black, black) == pytest.approx(80.0), "equal pictures are finite, as in piqa"
    assert psnr(black, black + 255) == pytest.approx(0.0, abs=1e-6), "uint8 must not wrap around"
    assert psnr(black, black + 51) == pytest.approx(20 * math.log10(5.0), abs=1e-5)
    assert psnr(black + 51, black) == psnr(black, black + 51)
    one_pixel = black.copy()
    one_pixel[0, 0, 0] = 255
    assert psnr(one_pixel, black) == pytest.approx(10 * math.log10(48), abs=1e-4)


def test_psnr_is_taken_picture_by_picture() -> None:
    rng = np.random.default_rng(0)
    pictures, references = rng.integers(0, 256, (2, 5, 3, 8, 6, 3), dtype=np.uint8)
    values = psnr(pictures, references)
    assert values.shape == (5, 3)
    for row, column in np.ndindex(5, 3):
        errors = pictures[row, column] / 255.0 - references[row, column] / 255.0
        assert values[row, column] == pytest.approx(-10 * math.log10((errors**2).mean() + 1e-8), abs=1e-4)


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((8, 8, 3), np.float32, "uint8 pictures, not float32"),
        ((8, 8, 4), np.uint8, r"\(8, 8, 4\)"),
        ((8, 3), np.uint8, "one shape"),
    ],
)
def test_psnr_refuses_what_are_no_pictures(shape: tuple[int, ...], dtype: type, message: str) -> None:
    picture = np.zeros(shape, dtype)
    with pytest.raises(ValueError, match=message):
        psnr(picture, picture)
    with pytest.raises(ValueError, match="one shape"):
        psnr(np.zeros((8, 8, 3), np.uint8), np.zeros((1, 8, 8, 3), np.uint8))


def test_action_l1_by_loops() -> None:
    rng = np.random.default_rng(1)
    predicted, recorded = rng.normal(size=(2, 6, 4, 3))
    errors = action_l1(predicted, recorded)
    for dimension in range(3):
        own = [abs(predicted[s, k, dimension] - recorded[s, k, dimension]) for s in range(6) for k in range(4)]
        assert errors["per_dimension"][dimension] == pytest.approx(sum(own) / 24)
    for step in range(4):
        own = [abs(predicted[s, step, d] - recorded[s, step, d]) for s in range(6) for d in range(3)]
        assert errors["per_step"][step] == pytest.approx(sum(own) / 18)
    assert errors["total"] == pytest.approx(np.mean(errors["per_step"]))
    assert len(errors["per_dimension"]) == 3 and len(errors["per_step"]) == 4
    assert action_l1(recorded, recorded)["total"] == 0


@pytest.mark.parametrize("shape", [(4, 3), (0, 4, 3)])
def test_action_l1_wants_chunks(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="one shape"):
        action_l1(np.zeros(shape), np.zeros(shape))
    with pytest.raises(ValueError, match="one shape"):
        action_l1(np.zeros((2, 4, 3)), np.zeros((2, 1, 3)))


def test_baselines() -> None:
    recorded = np.arange(12.0).reshape(2, 2, 3)
    assert mean_action_chunks(np.array([1, 2, 3]), recorded).tolist() == [[[1, 2, 3]] * 2] * 2
    last = np.array([[1.0, 2.0], [3.0, 4.0]])
    assert repeat_last_action(last, 3).tolist() == [[[1, 2]] * 3, [[3, 4]] * 3]


def test_constant_dimensions() -> None:
    actions = np.random.default_rng(2).normal(size=(5, 4, 3))
    assert constant_dimensions(actions) == []
    actions[..., 1] = 0.25
    assert constant_dimensions(actions) == [1]
    actions[0, 0, 1] = 0.26
    assert constant_dimensions(actions) == []


def test_mean_action_of_the_training_set(tmp_path: Path) -> None:
    assert read_action_mean(tmp_path, 2) is None
    file = tmp_path / "training_statistics.json"
    file.write_text(json.dumps({"action_mean": [0.5, -1], "frames": 10}))
    mean = read_action_mean(tmp_path, 2)
    assert mean is not None and mean.tolist() == [0.5, -1.0]


@pytest.mark.parametrize(
    "content", ["{", "[1, 2]", "{}", '{"action_mean": [1]}', '{"action_mean": [1, NaN]}', '{"action_mean": ["a", 1]}']
)
def test_damaged_statistics_are_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "training_statistics.json").write_text(content)
    with pytest.raises(ValueError, match="training_statistics.json"):
        read_action_mean(tmp_path, 2)
