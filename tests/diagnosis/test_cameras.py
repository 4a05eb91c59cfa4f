"""Cameras of a dataset beside those of a checkpoint, and beside the picture of a simulator."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from diagnosis_data import ARM, scene, usual_actions
from PIL import Image

from transformers_worldvla.action_tokenization_worldvla import LIBERO
from transformers_worldvla.data import EpisodeDataset
from transformers_worldvla.diagnosis.cameras import check_cameras, check_picture_shapes, draw_views
from transformers_worldvla.diagnosis.report import FAILED, OK, SKIPPED, WARNING
from transformers_worldvla.diagnosis.simulators import check_simulator, compare_orientation

Recorded = Callable[..., EpisodeDataset]
ACTIONS = usual_actions(5)


def test_cameras_of_the_same_names(recorded: Recorded) -> None:
    dataset = recorded(ACTIONS, cameras={"image": scene(), "wrist": scene(64)})
    finding = check_cameras(dataset, ARM)
    assert finding.verdict == OK and "not looked at: wrist" in finding.found
    assert check_picture_shapes(dataset, ARM).verdict == OK


def test_a_camera_of_another_name_gets_the_nearest(recorded: Recorded) -> None:
    finding = check_cameras(recorded(ACTIONS, cameras={"images": scene()}), ARM)
    assert finding.verdict == FAILED and 'rename "images" to "image"' in finding.advice


def test_a_camera_with_its_lens_covered(recorded: Recorded) -> None:
    dataset = recorded(ACTIONS, cameras={"image": np.zeros((64, 64, 3), np.uint8)})
    assert check_picture_shapes(dataset, ARM).verdict == FAILED


def test_two_cameras_with_one_picture(recorded: Recorded) -> None:
    dataset = recorded(ACTIONS, cameras={"image": scene(), "wrist": scene()})
    robot = replace(ARM, cameras=("image", "wrist"))
    finding = check_picture_shapes(dataset, robot)
    assert finding.verdict == WARNING and finding.found == "image and wrist are the same picture"


def test_the_picture_shows_all_views_beside_each_other(tmp_path: Path) -> None:
    recorded, seen, simulated = (np.full((40, 40, 3), color, np.uint8) for color in (50, 120, 200))
    draw_views(tmp_path / "views.png", recorded, seen, simulated, "title")
    colors = {color for _, color in Image.open(tmp_path / "views.png").getcolors(1 << 20) or []}
    assert {(50, 50, 50), (120, 120, 120), (200, 200, 200)} <= colors


# -------------------------------------------------------------------- simulators


def test_a_simulator_that_stands_as_the_recordings(recorded: Recorded) -> None:
    finding = compare_orientation(scene(256), recorded(ACTIONS), ARM)
    assert finding.verdict == OK and finding.numbers["correlation"]["as recorded"] > 0.99


@pytest.mark.parametrize(
    ("turn", "name"),
    [
        (lambda picture: np.rot90(picture, 2), "turned by 180 degrees"),
        (lambda picture: np.rot90(picture, 3), "turned by 90 degrees"),
        (lambda picture: picture[:, ::-1], "mirrored left to right"),
    ],
)
def test_a_simulator_that_stands_otherwise(
    recorded: Recorded, turn: Callable[[np.ndarray], np.ndarray], name: str
) -> None:
    finding = compare_orientation(turn(scene(256)), recorded(ACTIONS), ARM)
    assert finding.verdict == FAILED and f"must be {name}" in finding.advice


def test_another_scene_cannot_be_compared(recorded: Recorded) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    finding = compare_orientation(noise, recorded(ACTIONS), ARM, is_known=False)
    assert finding.verdict == WARNING and "no task of LIBERO" in finding.found


def test_a_scene_too_symmetric_to_tell(recorded: Recorded) -> None:
    rings = np.add.outer(*[np.abs(np.arange(64) - 31.5)] * 2)[..., None].repeat(3, -1).astype(np.uint8)
    assert compare_orientation(rings, recorded(ACTIONS, cameras={"image": rings}), ARM).verdict == WARNING


def test_nothing_recorded() -> None:
    assert compare_orientation(scene(), None, ARM).verdict == SKIPPED


def test_a_robot_that_is_not_the_simulators() -> None:
    [finding], frame = check_simulator("libero", ARM, None)
    assert finding.verdict == FAILED and "7 delta actions" in finding.found and frame is None


def test_a_camera_that_the_simulator_does_not_have() -> None:
    robot = replace(LIBERO, cameras=("ceiling",), raw_cameras=())
    [finding], _ = check_simulator("libero", robot, None)
    assert finding.verdict == FAILED and '"ceiling"' in finding.found
    [finding], _ = check_simulator("metaworld", ARM, None)
    assert finding.verdict == FAILED and "corner2" in finding.found
    with pytest.raises(ValueError, match="simulators are libero, metaworld"):
        check_simulator("unity", ARM, None)
