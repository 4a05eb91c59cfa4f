"""Frames are shown together only where each is known to be one control step after the one before."""

import numpy as np
import pytest
from PIL import Image

from transformers_worldvla.serving.history import FrameHistory


def picture(value: int) -> tuple[Image.Image, ...]:
    return (Image.new("RGB", (4, 4), (value, value, value)),)


def shown(history: FrameHistory) -> list[int]:
    return [frame.pictures[0].getpixel((0, 0))[0] for frame in history.frames]


def test_frames_that_follow_are_kept_up_to_the_length() -> None:
    history = FrameHistory(3)
    for value in range(5):
        history.add([picture(value)], None, follows=True)
    assert shown(history) == [2, 3, 4]


def test_a_frame_of_unknown_distance_begins_anew() -> None:
    history = FrameHistory(3)
    history.add([picture(0)], None, follows=True)
    history.add([picture(1)], None, follows=False)
    assert shown(history) == [1]
    history.add([picture(2)], None, follows=True)
    assert shown(history) == [1, 2]


@pytest.mark.parametrize(("step", "expected"), [(11, [0, 1]), (12, [1]), (3, [1]), (10, [1])])
def test_step_numbers_decide_over_what_the_caller_supposes(step: int, expected: list[int]) -> None:
    for follows in (True, False):
        history = FrameHistory(2)
        history.add([picture(0)], 10, follows=False)
        history.add([picture(1)], step, follows)
        assert shown(history) == expected


def test_a_step_that_is_sent_again_replaces_its_frame() -> None:
    history = FrameHistory(3)
    for step, value in [(4, 0), (5, 1), (5, 2)]:
        history.add([picture(value)], step, follows=False)
    assert shown(history) == [0, 2]


def test_numbers_go_on_counting_through_frames_without_one() -> None:
    history = FrameHistory(3)
    history.add([picture(0)], 7, follows=False)
    history.add([picture(1)], None, follows=True)  # step 8
    history.add([picture(2)], 9, follows=False)
    assert shown(history) == [0, 1, 2]
    history.add([picture(3)], None, follows=False)  # nobody knows which
    history.add([picture(4)], 11, follows=False)
    assert shown(history) == [4]


def test_several_steps_at_once_say_themselves_what_came_before() -> None:
    history = FrameHistory(2)
    history.add([picture(0)], None, follows=True)
    history.add([picture(1), picture(2), picture(3)], None, follows=True)
    assert shown(history) == [2, 3]


def test_a_frame_that_is_sent_again_keeps_its_codes() -> None:
    history = FrameHistory(2)
    history.add([picture(0)], None, follows=False)
    history.frames[0].codes = [np.array([[5]])]
    history.add([picture(0), picture(1)], None, follows=False)
    assert [frame.codes for frame in history.frames] == [[np.array([[5]])], None]


def test_clear_forgets_frames_and_numbers() -> None:
    history = FrameHistory(2)
    history.add([picture(0)], 1, follows=True)
    history.clear()
    history.add([picture(1)], 2, follows=False)
    assert shown(history) == [1]
