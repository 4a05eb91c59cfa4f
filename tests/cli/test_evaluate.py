"""The measurements that `worldvla evaluate` finds, and the paired comparison of two results."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from command_result import Result

from transformers_worldvla.cli.evaluate import measurement_modules
from transformers_worldvla.evaluation.results import ResultFolder
from transformers_worldvla.evaluation.rollout import episode_seed


def write_result(folder: Path, outcomes: dict[str, str], seed: int = 0) -> Path:
    """A result whose episodes of a suite are `+` solved, `-` failed, `!` crashed."""
    results = ResultFolder(folder, {"seed": seed})
    for suite, marks in outcomes.items():
        for trial, mark in enumerate(marks):
            row: dict[str, Any] = {"suite": suite, "task": trial % 2, "trial": trial, "steps": 5, "seed": seed}
            row |= {"success": {"+": True, "-": False, "!": None}[mark], "instruction": "push"}
            results.add(row | {"episode_seed": episode_seed(seed, suite, trial % 2, trial)})
    results.finish()
    return folder


def test_every_measurement_beside_the_dispatcher_is_a_command(worldvla: Any, capfd: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        worldvla("evaluate", "--help")
    assert stopped.value.code == 0
    text = capfd.readouterr().out
    names = [module.removeprefix("evaluate_").replace("_", "-") for module in measurement_modules()]
    assert {"compare", "gym", "libero"} <= set(names)
    assert all(f"    {name}" in text for name in names)


def test_a_missing_or_unknown_measurement_is_one_line(worldvla: Any, capfd: Any) -> None:
    for arguments in ([], ["nothing"]):
        with pytest.raises(SystemExit) as stopped:
            worldvla("evaluate", *arguments)
        assert stopped.value.code == 2
        assert len(capfd.readouterr().err.strip().splitlines()) == 1


def test_compare_pairs_episodes(worldvla: Any, tmp_path: Path) -> None:
    """Counted by hand; the p value of 2 against 6 is 2 * (1 + 8 + 28) / 2**8."""
    first = write_result(tmp_path / "a", {"goal": "+-------!+", "spatial": "++"})
    second = write_result(tmp_path / "b", {"goal": "-++++++-+-", "spatial": "+"})
    result: Result = worldvla("evaluate", "compare", first, second, "--json")
    assert result.code == 0
    found = result.document
    goal = found["suites"]["goal"]
    assert [goal[name] for name in ("pairs", "both", "only_first", "only_second", "neither")] == [9, 0, 2, 6, 1]
    assert (found["pairs"], found["both"], found["unpaired"]) == (10, 1, [2, 1])
    assert goal["p_value"] == found["p_value"] == pytest.approx(2 * (1 + 8 + 28) / 2**8)
    assert found["difference"] == pytest.approx(0.4)


def test_compare_prints_a_line_for_people(worldvla: Any, tmp_path: Path) -> None:
    first = write_result(tmp_path / "a", {"goal": "+---"})
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress((write_result(tmp_path / "b", {"goal": "++++"}) / "episodes.jsonl").read_bytes()))
    result: Result = worldvla("evaluate", "compare", first, packed)
    assert result.code == 0
    assert "B - A = +75.0 points over 4 pairs; only A solved 0, only B 3; McNemar's exact p = 0.25" in result.out


@pytest.mark.parametrize(
    ("first", "second", "seed", "reason"),
    [
        ({"goal": "+"}, {"goal": "+"}, 1, "different --seed"),
        ({"goal": "+"}, {"spatial": "+"}, 0, "no episode in common"),
        ({"goal": "+"}, {"goal": "!"}, 0, "no episode in common that ended"),
    ],
)
def test_results_that_cannot_be_compared(
    worldvla: Any, tmp_path: Path, first: dict[str, str], second: dict[str, str], seed: int, reason: str
) -> None:
    one, other = write_result(tmp_path / "a", first), write_result(tmp_path / "b", second, seed)
    result: Result = worldvla("evaluate", "compare", one, other)
    assert result.code == 2 and reason in result.err and len(result.err.strip().splitlines()) == 1


def test_compare_of_something_else(worldvla: Any, tmp_path: Path) -> None:
    (tmp_path / "episodes.jsonl").write_text(json.dumps({"loss": 1}) + "\n")
    result: Result = worldvla("evaluate", "compare", tmp_path, tmp_path)
    assert result.code == 2 and "line 1 is no episode" in result.err
