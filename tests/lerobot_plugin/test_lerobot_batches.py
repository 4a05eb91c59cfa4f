"""From LeRobot's batches to what WorldVLA is shown."""

import numpy as np
import pytest
import torch
from lerobot_environment import require_lerobot

require_lerobot()

from transformers_worldvla.lerobot.batches import camera_keys, read_rows, training_samples  # noqa: E402

FRONT, WRIST = "observation.images.front", "observation.images.wrist"


def pictures(rows: int, steps: int | None = None, seed: int = 0) -> tuple[np.ndarray, torch.Tensor]:
    """The same pictures as (rows, steps, H, W, 3) uint8, and as LeRobot keeps them: channels first, float in [0, 1]."""
    array = np.random.default_rng(seed).integers(0, 256, (rows, steps or 1, 6, 8, 3), dtype=np.uint8)
    tensor = torch.from_numpy(array).movedim(-1, 2).float() / 255
    return array, tensor if steps else tensor[:, 0]


def test_cameras_go_by_their_short_names_in_the_order_of_the_checkpoint() -> None:
    assert camera_keys(("wrist", "front"), [FRONT, WRIST], {}) == {"wrist": WRIST, "front": FRONT}
    assert camera_keys(("image",), ["observation.image"], {}) == {"image": "observation.image"}


def test_the_camera_map_wins_over_names() -> None:
    assert camera_keys(("image",), [FRONT, WRIST], {FRONT: "image"}) == {"image": FRONT}
    assert camera_keys(("front", "wrist"), [FRONT, WRIST], {FRONT: "wrist", WRIST: "front"}) == {
        "front": WRIST,
        "wrist": FRONT,
    }


@pytest.mark.parametrize(
    ("cameras", "found", "camera_map", "line"),
    [
        (
            ("image",),
            [FRONT],
            {},
            "no picture for the checkpoint's camera 'image' among observation.images.front; "
            '--policy.camera_map=\'{"observation.images.front": "image"}\' gives it one',
        ),
        (("image",), [], {}, "no picture for the checkpoint's camera 'image' among none"),
        (
            ("image",),
            [FRONT],
            {FRONT: "images"},
            f"camera_map sends '{FRONT}' to 'images'; the checkpoint's cameras are image",
        ),
        (
            ("image",),
            [FRONT],
            {"observation.images.frnt": "image"},
            f"camera_map names 'observation.images.frnt', but the pictures are {FRONT}; did you mean {FRONT}?",
        ),
    ],
)
def test_a_camera_that_is_not_there(cameras: tuple[str, ...], found: list[str], camera_map: dict, line: str) -> None:
    with pytest.raises(ValueError) as error:
        camera_keys(cameras, found, camera_map)
    assert str(error.value) == line


def test_pictures_come_out_as_they_were_recorded() -> None:
    array, tensor = pictures(2)
    rows = read_rows({FRONT: tensor, "task": ["stack", ""], "observation.state": torch.zeros(2, 5)}, ("front",), {}, 2)
    assert [row.task for row in rows] == ["stack", None]
    for row, expected in zip(rows, array, strict=True):
        assert len(row.steps) == 1 and row.following is None
        assert np.array_equal(row.steps[0][0], expected[0])


def test_steps_beyond_the_episode_are_not_shown() -> None:
    """Three steps a row: the one before, now, and the next; LeRobot repeats frames at both ends and flags them."""
    front, tensor = pictures(3, 3)
    wrist, other = pictures(3, 3, seed=1)
    flags = torch.tensor([[True, False, False], [False, False, False], [False, False, True]])
    batch = {FRONT: tensor, WRIST: other, f"{FRONT}_is_pad": flags, f"{WRIST}_is_pad": flags, "task": "stack"}
    first, middle, last = read_rows(batch, ("wrist", "front"), {}, 2)
    assert [len(row.steps) for row in (first, middle, last)] == [1, 2, 2]
    assert np.array_equal(first.steps[0][0], wrist[0, 1]) and np.array_equal(middle.steps[0][1], front[1, 0])
    assert middle.following is not None and np.array_equal(middle.following[1], front[1, 2])
    assert last.following is None


def test_a_row_gives_one_sample_of_each_kind() -> None:
    array, tensor = pictures(2, 3)
    flags = torch.tensor([[False, False, False], [False, False, True]])
    actions = torch.arange(24.0).reshape(2, 3, 4)
    batch = {FRONT: tensor, f"{FRONT}_is_pad": flags, "task": ["stack", "lift"], "action": actions}
    batch["action_is_pad"] = torch.tensor([[False, False, False], [False, True, True]])
    rows = read_rows(batch, ("front",), {}, 2)
    samples, counts = training_samples(batch, rows, ("action", "world"), "toy")
    assert [sample["source"] for sample in samples] == ["row 0, action", "row 0, world", "row 1, action"]
    assert counts == [3, None, 1]
    action, world, _ = samples
    assert action["instruction"] == "stack" and len(action["images"]) == 2
    assert np.array_equal(action["target_actions"], actions[0].numpy())
    assert np.array_equal(world["images"][0], array[0, 1]) and np.array_equal(world["target_images"][0], array[0, 2])
    assert np.array_equal(world["actions"], actions[0, :1].numpy())


@pytest.mark.parametrize(
    ("batch", "line"),
    [
        ({FRONT: torch.full((1, 3, 6, 8), 2.0)}, f"{FRONT} has values from 2 to 2: pictures are in \\[0, 1\\] here"),
        ({FRONT: torch.zeros(1, 6, 8, 3)}, f"{FRONT} is \\(rows, 3, H, W\\) or .*, not \\(1, 6, 8, 3\\)"),
        (
            {FRONT: torch.zeros(1, 3, 6, 8, dtype=torch.int64)},
            f"{FRONT} is float in \\[0, 1\\] or uint8, not torch.int64",
        ),
        ({FRONT: torch.zeros(2, 3, 6, 8), "task": ["one"]}, '"task" is one sentence for each of the 2 rows'),
    ],
)
def test_batches_that_are_refused(batch: dict, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        read_rows(batch, ("front",), {}, 2)
