"""Observations: keys are resolved before anything else, wrong ones are named with the nearest."""

import numpy as np
import pytest
import torch
from PIL import Image

from transformers_worldvla.serving.observations import MAX_PROMPT, MAX_SIDE, MAX_STEPS, ObservationReader

PICTURE = np.arange(8 * 6 * 3, dtype=np.uint8).reshape(8, 6, 3)


def test_pictures_are_read_in_the_order_of_the_cameras() -> None:
    reader = ObservationReader(["front", "wrist"])
    seen = reader.read({"wrist": PICTURE + 1, "front": PICTURE, "prompt": "go", "state": np.zeros(8)})
    assert [np.asarray(picture).tolist() for picture in seen.steps[0]] == [PICTURE.tolist(), (PICTURE + 1).tolist()]
    assert (seen.prompt, seen.step) == ("go", None)


def test_several_time_steps_come_oldest_first() -> None:
    seen = ObservationReader(["front"]).read({"front": np.stack([PICTURE, PICTURE + 1])})
    assert [np.asarray(step[0]).tolist() for step in seen.steps] == [PICTURE.tolist(), (PICTURE + 1).tolist()]


@pytest.mark.parametrize(
    "value", [Image.fromarray(PICTURE), torch.from_numpy(PICTURE), PICTURE.transpose(2, 0, 1), PICTURE / 255.0]
)
def test_other_forms_of_a_picture_are_the_same_picture(value: object) -> None:
    seen = ObservationReader(["front"]).read({"front": value})
    assert np.asarray(seen.steps[0][0]).tolist() == PICTURE.tolist()


@pytest.mark.parametrize("key", ["prompt", "instruction", "task"])
@pytest.mark.parametrize("value", ["go", np.array("go"), ["go"]])
def test_the_prompt_has_aliases(key: str, value: object) -> None:
    assert ObservationReader(["front"]).read({"front": PICTURE, key: value}).prompt == "go"


def test_a_camera_map_renames_keys_and_says_which_keys_are_wanted() -> None:
    reader = ObservationReader(["front", "wrist"], {"observation/image": "front"})
    assert reader.keys == ["observation/image", "wrist"]
    seen = reader.read({"observation/image": PICTURE, "wrist": PICTURE + 1})
    assert np.asarray(seen.steps[0][0]).tolist() == PICTURE.tolist()


@pytest.mark.parametrize(
    ("keys", "hint"),
    [
        (["image_0", "prompt"], 'use camera_map={"image_0": "image"}'),
        (["observation/image", "observation/state"], 'use camera_map={"observation/image": "image"}'),
        (["imgae"], "is it 'imgae'?"),
        (["state"], "only the keys 'state'"),
        ([], "only the keys (none)"),
    ],
)
def test_a_missing_key_is_named_with_the_nearest(keys: list[str], hint: str) -> None:
    with pytest.raises(ValueError, match="no picture 'image'") as caught:
        ObservationReader(["image"]).check_keys(keys)
    assert hint in str(caught.value) and "\n" not in str(caught.value)


def test_a_map_to_no_camera_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="its cameras are 'image', 'wrist'; did you mean 'wrist'"):
        ObservationReader(["image", "wrist"], {"hand": "wrists"})
    with pytest.raises(ValueError, match="both 'a' and 'b' to 'image'"):
        ObservationReader(["image"], {"a": "image", "b": "image"})


@pytest.mark.parametrize(
    ("observation", "reason"),
    [
        ([1], "an observation is a map"),
        ({"image": "a picture"}, "is a picture (H, W, 3) uint8"),
        ({"image": np.zeros((4, 4), np.uint8)}, "not shape (4, 4)"),
        ({"image": np.zeros((5, 5, 2), np.uint8)}, "'image': a picture has shape"),
        ({"image": np.zeros((0, 4, 3), np.uint8)}, "'image': a picture has shape"),
        ({"image": np.zeros((4, 4, 3), np.int32)}, "'image': a picture is uint8 or float"),
        ({"image": np.full((4, 4, 3), np.nan)}, "'image': a float picture lies in [0, 1]"),
        ({"image": np.zeros((0, 4, 4, 3), np.uint8)}, "holds 1 to"),
        ({"image": np.zeros((MAX_STEPS + 1, 4, 4, 3), np.uint8)}, "holds 1 to"),
        ({"image": np.zeros((MAX_SIDE + 1, 1, 3), np.uint8)}, "is larger than"),
        ({"image": PICTURE, "prompt": 3}, "prompt is a sentence"),
        ({"image": PICTURE, "prompt": "  "}, "prompt is a sentence"),
        ({"image": PICTURE, "task": "x" * (MAX_PROMPT + 1)}, "task has"),
        ({"image": PICTURE, "step": "first"}, "step is the whole number"),
        ({"image": PICTURE, "step": True}, "step is the whole number"),
        ({"image": PICTURE, "step": 1.5}, "step is the whole number"),
    ],
)
def test_what_is_no_observation_is_refused_in_one_line(observation: object, reason: str) -> None:
    with pytest.raises(ValueError) as caught:
        ObservationReader(["image"]).read(observation)
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_cameras_must_agree_on_the_number_of_steps() -> None:
    with pytest.raises(ValueError, match="the same number of time steps, not front 2, wrist 1"):
        ObservationReader(["front", "wrist"]).read({"front": np.stack([PICTURE, PICTURE]), "wrist": PICTURE})
