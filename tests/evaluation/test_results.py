"""Result folders: what is written, what is taken up again, what is refused; rates and their report."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from transformers_worldvla.evaluation.results import (
    ResultFolder,
    format_rate,
    format_summary,
    read_episodes,
    summarize,
)

SETTINGS = {"model": "m", "seed": 0, "versions": {"mujoco": "3.3.0"}}


def row(
    task: int = 0, trial: int = 0, success: bool | None = True, suite: str = "goal", **fields: Any
) -> dict[str, Any]:
    about = {"instruction": f"do {task}", "steps": 10 * (trial + 1), "seed": 0, "episode_seed": 7}
    return {"suite": suite, "task": task, "trial": trial, "success": success, **about, **fields}


def test_the_file_is_ordered_whatever_the_order_of_episodes(tmp_path: Path) -> None:
    rows = [row(task, trial, suite=suite) for suite in ("b", "a") for task in (10, 9) for trial in (1, 0)]
    for name, order in (("one", rows), ("other", rows[::-1])):
        folder = ResultFolder(tmp_path / name, SETTINGS)
        for each in order:
            folder.add(each)
        folder.finish()
    written = (tmp_path / "one" / "episodes.jsonl").read_bytes()
    assert written == (tmp_path / "other" / "episodes.jsonl").read_bytes()
    found = [json.loads(line) for line in written.decode().splitlines()]
    assert [(each["suite"], each["task"], each["trial"]) for each in found] == sorted(
        (each["suite"], each["task"], each["trial"]) for each in rows
    )


def test_every_episode_is_on_disk_at_once(tmp_path: Path) -> None:
    folder = ResultFolder(tmp_path, SETTINGS)
    for trial in range(3):
        folder.add(row(trial=trial))
        assert len((tmp_path / "episodes.jsonl").read_text().splitlines()) == trial + 1


def test_a_torn_line_of_a_killed_run_is_run_again(tmp_path: Path) -> None:
    folder = ResultFolder(tmp_path, SETTINGS)
    folder.add(row(trial=0))
    folder.add(row(trial=1))
    file = tmp_path / "episodes.jsonl"
    whole = file.read_bytes()
    for cut in range(1, len(whole) // 2):
        file.write_bytes(whole[:-cut])
        again = ResultFolder(tmp_path, SETTINGS)
        assert again.is_done(("goal", 0, 0))
        assert not again.is_done(("goal", 0, 1))
        again.add(row(trial=1))
        assert file.read_bytes() == whole


def test_a_crashed_episode_is_tried_again_and_replaced(tmp_path: Path) -> None:
    ResultFolder(tmp_path, SETTINGS).add(row(success=None, error="boom"))
    again = ResultFolder(tmp_path, SETTINGS)
    assert not again.is_done(("goal", 0, 0))
    again.add(row(success=True))
    again.finish()
    assert [each["success"] for each in read_episodes(tmp_path)] == [True]


@pytest.mark.parametrize("change", [{"seed": 1}, {"versions": {"mujoco": "3.3.7"}}, {"extra": 1}])
def test_a_folder_takes_no_episodes_of_other_settings(tmp_path: Path, change: dict[str, Any]) -> None:
    ResultFolder(tmp_path, SETTINGS).add(row())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=f"another run .{next(iter(change))} was.*--output"):
        ResultFolder(tmp_path, {**SETTINGS, **change})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_foreign_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "episodes.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="choose another --output"):
        ResultFolder(tmp_path, SETTINGS)
    assert (tmp_path / "episodes.jsonl").read_text() == "{}\n"


def test_reading_a_folder_a_file_and_a_gzipped_file(tmp_path: Path) -> None:
    folder = ResultFolder(tmp_path / "run", SETTINGS)
    folder.add(row())
    file = tmp_path / "run" / "episodes.jsonl"
    packed = tmp_path / "packed" / "episodes.jsonl.gz"
    packed.parent.mkdir()
    packed.write_bytes(gzip.compress(file.read_bytes()))
    expected = [row()]
    for path in (tmp_path / "run", file, packed, packed.parent):
        assert read_episodes(path) == expected


@pytest.mark.parametrize("line", ["no json", "{}", '{"suite": "a", "task": "0", "trial": 0, "success": true}'])
def test_a_file_of_something_else_is_refused_with_its_line(tmp_path: Path, line: str) -> None:
    file = tmp_path / "episodes.jsonl"
    file.write_text(json.dumps(row()) + "\n" + line + "\n")
    with pytest.raises(ValueError, match="episodes.jsonl, line 2"):
        read_episodes(file)
    with pytest.raises(ValueError, match="no such file"):
        read_episodes(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has no episodes.jsonl"):
        read_episodes(tmp_path.parent / tmp_path.name / "..")


def test_a_crash_is_no_failure() -> None:
    numbers = summarize([row(0, 0, True), row(0, 1, False), row(0, 2, None, error="boom"), row(1, 0, None)])
    suite = numbers["suites"]["goal"]
    assert (suite["success_rate"], suite["episodes"], suite["crashed"]) == (0.5, 2, 2)
    assert suite["tasks"]["1"]["success_rate"] is None
    assert suite["tasks"]["0"]["mean_steps"] == 10, "of successes"
    assert format_rate(suite["tasks"]["1"]) == "no episode ended, 1 crashed"
    assert format_rate(suite) == "50.0 % [9.5, 90.5] (1 of 2, 2 crashed)"


def test_the_average_is_that_of_suites() -> None:
    rows = [row(0, trial, trial < 2, suite="a") for trial in range(4)] + [row(0, 0, True, suite="b")]
    numbers = summarize(rows)
    assert [suite["success_rate"] for suite in numbers["suites"].values()] == [0.5, 1.0]
    assert numbers["average"]["success_rate"] == 0.75
    assert (numbers["average"]["successes"], numbers["average"]["episodes"]) == (3, 5)
    lines = format_summary(numbers).splitlines()
    assert lines[0].startswith("a: 50.0 %")
    assert "do 0" in lines[1]
    assert lines[-1].startswith("average of suites: 75.0 %")


@pytest.mark.parametrize("seed", ["NaN", "-Infinity", "1e999", '"\\ud800"'])
def test_what_could_not_be_written_again_is_refused(tmp_path: Path, seed: str) -> None:
    ResultFolder(tmp_path, SETTINGS).add(row(seed="here"))
    file = tmp_path / "episodes.jsonl"
    damaged = file.read_text().replace('"here"', seed)
    file.write_text(damaged)
    with pytest.raises(ValueError, match="episodes.jsonl, line 1 is no episode"):
        ResultFolder(tmp_path, SETTINGS)
    assert file.read_text() == damaged
