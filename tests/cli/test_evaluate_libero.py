"""`worldvla evaluate libero`: what is refused at once, and short runs of the real simulator."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import Result

sys.path.insert(0, str(Path(__file__).parents[1] / "evaluation"))
from simulator_extras import need_libero  # noqa: E402

need_libero()

GOAL = ("evaluate", "libero", "--suite", "libero_goal")


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "episodes.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--suite", "libero_gaol"), 'did you mean "libero_goal"'),
        (("--suite", "libero_mine"), "--max-steps"),
        (("--suite", "libero_90", "--robustness"), "LIBERO-PRO perturbs"),
        (("--tasks", "10"), "has the tasks 0 to 9, not 10"),
        (("--tasks", "3-1"), "--tasks 3-1: give numbers and ranges"),
        (("--trials", "51"), "initial states 0 to 49"),
        (("--trials", "0"), "at least one trial"),
        (("--temperature", "0.5"), "nothing without --sample"),
        (("--resolution", "100"), "multiple of 16"),
        (("--model", "expert", "--batch-size", "4"), "--batch-size belongs to checkpoints"),
        (("--model", "nowhere/at/all"), "no such folder"),
    ],
)
def test_bad_input_is_one_line_before_anything_runs(
    worldvla: Any, robot_checkpoint: Path, tmp_path: Path, arguments: tuple[str, ...], reason: str
) -> None:
    defaults = ("--model", robot_checkpoint, "--trials", "1", "--output", tmp_path / "out")
    result: Result = worldvla(*GOAL, *defaults, *arguments)
    assert result.code == 2
    assert reason in result.err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_robot_of_another_kind_is_refused(worldvla: Any, two_robot_checkpoint: Path, tmp_path: Path) -> None:
    options = ("--model", two_robot_checkpoint, "--embodiment", "gantry", "--output", tmp_path / "out")
    result: Result = worldvla(*GOAL, *options)
    assert result.code == 2 and "LIBERO takes 7 delta actions" in result.err


def test_the_expert_solves_a_task_and_a_still_robot_does_not(worldvla_process: Any, tmp_path: Path) -> None:
    command = (*GOAL, "--tasks", "7", "--trials", "1", "--workers", "1", "--videos", "0", "--json")
    result: Result = worldvla_process(*command, "--model", "expert", "--output", tmp_path / "expert", network=False)
    assert result.code == 0, result.err
    assert result.document["suites"]["libero_goal"]["success_rate"] == 1.0
    (row,) = rows(tmp_path / "expert")
    assert (row["suite"], row["task"], row["trial"], row["success"], row["seed"]) == ("libero_goal", 7, 0, True, 0)
    assert row["instruction"] == "turn on the stove" and row["versions"]["mujoco"] and row["versions"]["robosuite"]
    assert result.document["speed"]["env_steps"] == row["steps"] <= 300

    still: Result = worldvla_process(*command, "--model", "noop", "--max-steps", "20", "--output", tmp_path / "noop")
    assert still.document["average"]["success_rate"] == 0.0
    assert [row["steps"] for row in rows(tmp_path / "noop")] == [20]


def test_a_checkpoint_acts_from_pictures(worldvla: Any, robot_checkpoint: Path, tmp_path: Path) -> None:
    """A random model for a few steps: rows, the first picture, a video of the failure; a second call adds nothing."""
    output = tmp_path / "out"
    command = (
        *GOAL,
        "--tasks",
        "7",
        "--trials",
        "1",
        "--model",
        robot_checkpoint,
        "--max-steps",
        "6",
        "--workers",
        "1",
    )
    result: Result = worldvla(*command, "--output", output, "--json")
    assert result.code == 0, result.err
    (row,) = rows(output)
    assert (row["success"], row["steps"], row["model"]) == (False, 6, robot_checkpoint.name)
    assert len(row["checkpoint"]) == 64 and row["renderer"] and row["render_hash"]
    assert [path.name for path in (output / "views").iterdir()] == ["libero_goal_7.png"]
    assert [path.name for path in (output / "videos").iterdir()] == ["libero_goal_7_0_failure.mp4"]
    speed = result.document["speed"]
    assert speed["queries"] == 2, "chunks of four actions"
    assert 0 < speed["model_share"] < 1

    written = (output / "episodes.jsonl").read_bytes()
    again: Result = worldvla(*command, "--output", output, "--json")
    assert again.document["speed"]["env_steps"] == 0
    assert (output / "episodes.jsonl").read_bytes() == written
    other: Result = worldvla(*command, "--output", output, "--seed", "1")
    assert other.code == 2 and "another run (seed was 0, is now 1)" in other.err
