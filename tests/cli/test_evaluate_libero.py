"""`worldvla evaluate libero`: what is refused at once, and short runs of the real simulator."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from command_result import Result

sys.path.insert(0, str(Path(__file__).parents[1] / "evaluation"))
from simulator_extras import need_libero  # noqa: E402

from transformers_worldvla.assets import DEFAULT_CHECKPOINT  # noqa: E402

need_libero()

HUB = Path(__file__).resolve().parents[2] / "hub"
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


@pytest.mark.slow
def test_robustness_is_a_table_of_a_suite_and_its_variants(worldvla_process: Any, tmp_path: Path) -> None:
    """A still robot for three steps: every variant that the package brings is opened; the others are named."""
    command = (*GOAL, "--robustness", "--tasks", "7", "--trials", "1", "--max-steps", "3", "--model", "noop")
    options = ("--workers", "2", "--videos", "0", "--output", tmp_path / "out")
    result: Result = worldvla_process(*command, *options, network=False)
    assert result.code == 0, result.err
    names = ["libero_goal", *(f"libero_goal_{kind}" for kind in ("lan", "object", "swap", "task"))]
    assert [row["suite"] for row in rows(tmp_path / "out")] == names
    table = result.out[result.out.index("robustness (LIBERO-PRO)") :].splitlines()
    assert table[1].startswith("libero_goal   ") and "(0 of 1)" in table[1]
    assert [line.split("  ")[1].rpartition(" ")[2] for line in table[2:]] == [
        "(lan)", "(object)", "(swap)", "(task)", "(env)"
    ]  # fmt: skip
    # 0 of 1 against 0 of 1: Wilson's upper bound is z^2 / (1 + z^2)
    bound = 100 * 1.959964**2 / (1 + 1.959964**2)
    assert all(line.endswith(f"+0.0 [-{bound:.1f}, +{bound:.1f}]") for line in table[2:6])
    assert table[6].endswith("not in the installed package")


@pytest.mark.slow
@pytest.mark.skipif(not (HUB / DEFAULT_CHECKPOINT).is_dir(), reason="hub/ holds no checkpoint yet")
def test_workers_and_kills_leave_no_trace_in_the_result(worldvla_process: Any, tmp_path: Path) -> None:
    """The bundled checkpoint in the real simulator: one worker, four, and two that were killed and taken up again."""
    command = (*GOAL, "--tasks", "7,8", "--trials", "2", "--max-steps", "15", "--videos", "0", "--device", "cpu")
    for workers in (1, 4):
        result: Result = worldvla_process(*command, "--workers", workers, "--output", tmp_path / f"by-{workers}")
        assert result.code == 0, result.err
    expected = (tmp_path / "by-1" / "episodes.jsonl").read_bytes()
    assert [(row["task"], row["trial"], row["steps"]) for row in rows(tmp_path / "by-1")] == [
        (task, trial, 15) for task in (7, 8) for trial in (0, 1)
    ]
    assert (tmp_path / "by-4" / "episodes.jsonl").read_bytes() == expected

    cut = tmp_path / "cut"
    words = [sys.executable, "-m", "transformers_worldvla.cli", *command, "--workers", "2", "--output", str(cut)]
    with (tmp_path / "log").open("wb") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(words, env=environment, stdout=log, stderr=log, start_new_session=True)
    written, deadline = cut / "episodes.jsonl", time.monotonic() + 400
    while process.poll() is None and time.monotonic() < deadline and not (written.exists() and written.stat().st_size):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert 0 < len(rows(cut)) < 4, (tmp_path / "log").read_text()
    assert worldvla_process(*command, "--workers", "2", "--output", cut).code == 0
    assert written.read_bytes() == expected
