"""Augmentation: one change for all pictures of a sample, against closed forms, PIL and colorsys."""

import colorsys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from transformers_worldvla.data import ImageAugmentation

OFF: dict[str, float] = {"crop": 1.0, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}


class Chosen:
    """A generator that answers with chosen numbers: shares of the range from low to high."""

    def __init__(self, *shares: float):
        self.shares = list(shares)

    def uniform(self, low: Any, high: float, size: int | None = None) -> np.ndarray:
        low = np.broadcast_to(low, size or np.shape(low))
        return low + (high - low) * [self.shares.pop(0) for _ in range(len(low))]


def apply(
    pictures: list[np.ndarray], area: float = 1.0, left: float = 0.0, upper: float = 0.0, colours=(0.5,) * 4, **fields
):
    """Augment with known draws: shares of the area's range, of the room, and of the colours' ranges (0.5: none)."""
    return ImageAugmentation(**{**OFF, **fields})(pictures, Chosen(area, left, upper, *colours))


def noise(seed: int = 0, height: int = 48, width: int = 64) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def ramp(side: int = 100) -> np.ndarray:
    """Red says the column, green the row."""
    steps = np.arange(side, dtype=np.uint8)
    return np.stack(
        [np.tile(steps, (side, 1)), np.tile(steps[:, None], (1, side)), np.zeros((side, side), np.uint8)], -1
    )


# -------------------------------------------------------------------- one change for all


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), count=st.integers(1, 4))
def test_equal_pictures_stay_equal(seed, count):
    pictures = ImageAugmentation(crop=0.5)([noise()] * count, np.random.default_rng(seed))
    assert all((picture == pictures[0]).all() for picture in pictures)
    assert {(picture.shape, picture.dtype) for picture in pictures} == {((48, 64, 3), np.dtype(np.uint8))}


def test_history_and_target_are_seen_through_one_crop():
    """Where two frames agree, the augmented ones agree: what differs in the top rows stays up there."""
    first = noise(height=64)
    second = first.copy()
    second[:8] = 255 - second[:8]
    for seed in range(20):
        one, other = ImageAugmentation(crop=0.5)([first, second], np.random.default_rng(seed))
        assert (one[20:] == other[20:]).all()  # 8 rows become at most 12, and a bicubic kernel reaches a few more
        assert (one[20:] != first[20:]).any()


def test_pictures_of_other_sizes_get_the_same_part():
    small, large = ramp(50), np.repeat(np.repeat(ramp(50), 2, axis=0), 2, axis=1)
    for area, left, upper in ((0.0, 0.0, 0.0), (0.3, 1.0, 0.2), (0.5, 0.3, 0.9)):
        one, other = apply([small, large], area, left, upper, crop=0.25)
        difference = one.astype(int) - other.reshape(50, 2, 50, 2, 3).mean(axis=(1, 3))
        assert abs(difference[2:-2, 2:-2]).max() <= 1


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_the_generator_decides_alone(seed):
    augment = ImageAugmentation()
    again = [augment([noise()], np.random.default_rng(seed))[0] for _ in range(2)]
    other = augment([noise()], np.random.default_rng(seed + 1))[0]
    assert (again[0] == again[1]).all() and (again[0] != other).any()


def test_nothing_to_do_changes_nothing():
    picture = noise()
    assert (apply([picture])[0] == picture).all()
    assert (ImageAugmentation(**OFF)([picture], np.random.default_rng(0))[0] == picture).all()


def test_the_source_is_left_alone():
    picture = noise()
    before = picture.copy()
    ImageAugmentation()([picture], np.random.default_rng(0))
    assert (picture == before).all()


# -------------------------------------------------------------------- crop


@pytest.mark.parametrize(("left", "upper"), [(0.0, 0.0), (1.0, 1.0), (0.25, 0.75)])
def test_the_crop_is_the_part_it_says(left, upper):
    """A quarter of the area is half of each side; positions are read off a ramp."""
    picture = apply([ramp()], 0.0, left, upper, crop=0.25)[0].astype(float)
    inner = np.arange(4, 96)
    expected = 50 * left + (inner + 0.5) / 2 - 0.5, 50 * upper + (inner + 0.5) / 2 - 0.5
    assert abs(picture[50, inner, 0] - expected[0]).max() <= 1
    assert abs(picture[inner, 50, 1] - expected[1]).max() <= 1


def test_a_crop_keeps_at_least_the_share_it_says():
    areas = []
    for seed in range(200):
        columns = ImageAugmentation(**{**OFF, "crop": 0.6})([ramp()], np.random.default_rng(seed))[0][50, :, 0]
        areas.append((float(columns[-4]) - float(columns[4])) ** 2 / 92**2)
    assert 0.56 < min(areas) < 0.66 and 0.94 < max(areas) <= 1.05


# -------------------------------------------------------------------- colour


def test_brightness_is_added():
    picture = noise()
    for draw, shift in ((0.0, -51), (0.75, 25.5), (1.0, 51)):
        expected = np.rint(picture + np.float32(shift)).clip(0, 255)
        assert (apply([picture], colours=(draw, 0.5, 0.5, 0.5), brightness=0.2)[0] == expected).all()


@pytest.mark.parametrize("draw", [0.0, 0.25, 0.9, 1.0])
def test_contrast_and_saturation_are_those_of_pil(draw):
    picture = noise()
    factor = 1 + 0.4 * (2 * draw - 1)
    for name, colours, enhance in (
        ("contrast", (0.5, draw, 0.5, 0.5), ImageEnhance.Contrast),
        ("saturation", (0.5, 0.5, draw, 0.5), ImageEnhance.Color),
    ):
        expected = np.asarray(enhance(Image.fromarray(picture)).enhance(factor)).astype(int)
        actual = apply([picture], colours=colours, **{name: 0.4})[0]
        assert abs(actual - expected).max() <= 2, name  # PIL rounds the mean and the greys


def test_contrast_of_all_pictures_is_about_the_first():
    dark, bright = np.full((8, 8, 3), 50, np.uint8), np.full((8, 8, 3), 200, np.uint8)
    one, other = apply([dark, bright], colours=(0.5, 0.0, 0.5, 0.5), contrast=0.2)
    assert (one == 50).all() and (other == 170).all()  # 50 + 0.8 * 150


def test_hue_is_a_rotation_of_the_chroma():
    """In the YIQ space of colorsys; luma and greys stay what they are."""
    red, grey = np.full((2, 2, 3), (200, 90, 90), np.uint8), np.full((2, 2, 3), 120, np.uint8)

    def yiq(picture: np.ndarray) -> tuple[float, complex]:
        luma, i, q = colorsys.rgb_to_yiq(*(picture[0, 0] / 255.0).tolist())
        return luma, complex(i, q)

    luma, chroma = yiq(red)
    for draw in (0.0, 0.3, 0.5, 1.0):
        turned, same = apply([red, grey], colours=(0.5, 0.5, 0.5, draw), hue=0.1)
        assert (same == 120).all()
        new_luma, new_chroma = yiq(turned)
        assert new_luma == pytest.approx(luma, abs=0.01) and abs(new_chroma) == pytest.approx(abs(chroma), abs=0.01)
        angle = float(np.angle(new_chroma / chroma))
        assert angle == pytest.approx(2 * np.pi * 0.1 * (2 * draw - 1), abs=0.04)


@pytest.mark.parametrize("fields", [{"crop": 0.0}, {"crop": 1.5}, {"brightness": -0.1}, {"hue": 2.0}])
def test_strengths_that_cannot_be(fields):
    with pytest.raises(ValueError, match=f"{next(iter(fields))} is a number between"):
        ImageAugmentation(**fields)
