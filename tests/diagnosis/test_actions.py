"""A dataset's actions beside an embodiment: data that fit pass, and each way not to fit is found."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diagnosis_data import ARM, usual_actions

from transformers_worldvla.data import EpisodeDataset
from transformers_worldvla.diagnosis.actions import check_actions
from transformers_worldvla.diagnosis.report import FAILED, OK, WARNING, Finding

Check = Callable[..., dict[str, Finding]]


@pytest.fixture
def check(recorded: Callable[..., EpisodeDataset], tmp_path: Path) -> Check:
    """The findings by name for some actions of a robot; `training` are the statistics that the checkpoint holds."""

    def run(
        actions: np.ndarray, robot: Any = ARM, training: dict[str, Any] | None = None, **options: Any
    ) -> dict[str, Finding]:
        if training is not None:
            (tmp_path / "training_statistics.json").write_text(json.dumps(training))
        return {each.check: each for each in check_actions(recorded(actions, **options), robot, tmp_path)}

    return run


def test_actions_that_fit(check: Check) -> None:
    actions = usual_actions()
    training = {"action_mean": actions.mean(0).tolist(), "action_std": actions.std(0).tolist()}
    findings = check(actions, training=training)
    assert {name: each.verdict for name, each in findings.items()} == dict.fromkeys(
        [
            "action dimensions",
            "action ranges",
            "quantisation",
            "constant dimensions",
            "gripper",
            "idle frames",
            "action statistics",
            "control rate",
        ],
        OK,
    )


def test_another_number_of_dimensions_ends_the_checks(check: Check) -> None:
    findings = check(usual_actions()[:, :2], names=("x", "y"))
    assert list(findings) == ["action dimensions"] and findings["action dimensions"].verdict == FAILED


def test_dimensions_in_another_order(check: Check) -> None:
    finding = check(usual_actions(), names=("y", "x", "gripper"))["action dimensions"]
    assert finding.verdict == FAILED and "other order" in finding.found


def test_dimensions_of_other_names(check: Check) -> None:
    assert check(usual_actions(), names=("dx", "dy", "grip"))["action dimensions"].verdict == WARNING


def test_actions_outside_the_ranges(check: Check) -> None:
    actions = usual_actions()
    actions[:6, 0] = 1.5  # a tenth of the steps
    finding = check(actions)["action ranges"]
    assert finding.verdict == FAILED and "x is clipped in 10.0% of the steps" in finding.found
    np.testing.assert_allclose(finding.numbers["clipped"], [0.1, 0.0, 0.0])


def test_actions_in_units_that_are_too_small(check: Check) -> None:
    actions = usual_actions()
    actions[:, :2] /= 1000.0  # metres where the checkpoint has millimetres
    findings = check(actions)
    assert findings["action ranges"].verdict == FAILED and "of 255 bins" in findings["action ranges"].found
    assert findings["quantisation"].verdict == FAILED


def test_quantisation_of_a_uniform_dimension_is_that_of_the_closed_form(check: Check) -> None:
    actions = usual_actions(1500)
    step = 2.0 / 255  # a uniform value lies uniformly in its bin: RMS error step / sqrt(12)
    rms = check(actions)["quantisation"].numbers["rms"]
    np.testing.assert_allclose(rms[:2], step / np.sqrt(12), rtol=0.1)


def test_quantisation_that_eats_the_motion(check: Check) -> None:
    robot = replace(ARM, low=(-30.0, -1.0, -1.0), high=(30.0, 1.0, 1.0))
    finding = check(usual_actions(), robot)["quantisation"]
    assert finding.verdict == WARNING and "(x:" in finding.found


def test_a_dimension_that_never_moves(check: Check) -> None:
    actions = usual_actions()
    actions[:, 1] = 0.25
    finding = check(actions)["constant dimensions"]
    assert finding.verdict == WARNING and "y is constant" in finding.found
    still = replace(ARM, low=(-1.0, 0.25, -1.0), high=(1.0, 0.25, 1.0))  # as `worldvla tokenize` makes it
    assert check(actions, still)["constant dimensions"].verdict == OK


def test_noise_of_a_near_constant_dimension_that_fills_its_range(check: Check) -> None:
    actions = usual_actions()
    actions[:, 1] = np.random.default_rng(0).uniform(-1e-5, 1e-5, len(actions))
    robot = replace(ARM, low=(-1.0, -1e-5, -1.0), high=(1.0, 1e-5, 1.0))
    finding = check(actions, robot)["constant dimensions"]
    assert finding.verdict == FAILED and finding.found.startswith("y moves by 1.99e-05 only")


def test_a_dimension_with_outliers(check: Check) -> None:
    actions = usual_actions(400)
    actions[:, 0] /= 20.0
    actions[7, 0] = 0.9
    finding = check(actions)["constant dimensions"]
    assert finding.verdict == WARNING and "x: outliers" in finding.found


def test_a_gripper_in_other_units(check: Check) -> None:
    actions = usual_actions()
    actions[:, 2] = actions[:, 2] > 0  # 0 and 1
    finding = check(actions)["gripper"]
    assert finding.verdict == FAILED and finding.found == "commands from 0 to 1; the checkpoint knows -1 and 1"
    actions[:, 2] = 1.0
    assert check(actions)["gripper"].verdict != OK


def test_pauses(check: Check) -> None:
    actions = usual_actions()
    actions[10:16] = [0.0, 0.0, 1.0]
    assert check(actions)["idle frames"].verdict == WARNING
    actions[10:50] = [0.0, 0.0, 1.0]
    assert check(actions)["idle frames"].verdict == FAILED


def test_pauses_of_absolute_actions_are_repeated_targets(check: Check) -> None:
    actions = usual_actions()
    actions[10:21] = actions[10]
    finding = check(actions, replace(ARM, semantics="absolute"))["idle frames"]
    assert finding.verdict == WARNING and finding.numbers["idle"] == 10


def test_actions_unlike_those_of_training(check: Check) -> None:
    actions = usual_actions()
    training = {"action_mean": [2.0, 0.0, 0.0], "action_std": [0.4, 0.5, 1.0]}
    finding = check(actions, training=training)["action statistics"]
    assert finding.verdict == FAILED and "(x)" in finding.found
    np.testing.assert_allclose(finding.numbers["shift"][0], abs(actions[:, 0].mean() - 2.0) / 0.4, rtol=1e-5)
    training["action_mean"][0] = 0.9
    assert check(actions, training=training)["action statistics"].verdict == WARNING


def test_statistics_of_another_robot(check: Check) -> None:
    training = {"action_mean": [0.0], "action_std": [1.0]}
    assert check(usual_actions(), training=training)["action statistics"].verdict == WARNING


def test_another_rate(check: Check) -> None:
    assert check(usual_actions(), fps=30)["control rate"].verdict == WARNING
