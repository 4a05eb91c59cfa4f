"""gymnasium environments as episodes: fresh each time, Meta-World among them."""

import numpy as np
import pytest
from simulator_extras import need_meta_world

from transformers_worldvla.evaluation.gym_env import (
    META_WORLD,
    GymBenchmark,
    GymSpec,
    meta_world_instruction,
    meta_world_tasks,
)

need_meta_world()

OPTIONS = (("camera_name", "corner2"), ("env_name", "reach-v3"), ("height", 64), ("width", 64))
REACH = GymSpec(META_WORLD, "reach", rotation=180, options=OPTIONS, fast_render=True)


def solve(benchmark: GymBenchmark, seed: int) -> list[np.ndarray]:
    """The observations of an episode of the scripted expert, which succeeds."""
    benchmark.start(0, seed)
    act, seen = benchmark.expert(), []
    for _ in range(200):
        success = benchmark.step(act())
        seen.append(np.array(benchmark._observation))
        if success:
            return seen
    raise AssertionError("the scripted expert did not succeed")


def test_an_episode_depends_on_its_seed_alone() -> None:
    benchmark = REACH.open()
    first, other, again = solve(benchmark, 5), solve(benchmark, 6), solve(benchmark, 5)
    np.testing.assert_array_equal(np.stack(first), np.stack(again))
    assert not np.array_equal(first[0], other[0])
    benchmark.close()


def test_pictures_are_turned_once() -> None:
    upright, raw = REACH.open(), GymSpec(META_WORLD, "reach", 0, OPTIONS, True).open()
    upright.start(0, 1)
    raw.start(0, 1)
    assert upright.render("").shape == (64, 64, 3)
    np.testing.assert_array_equal(upright.render(""), raw.render("")[::-1, ::-1])
    about = upright.describe(looks=True)
    assert about["versions"]["metaworld"] and about["renderer"]
    upright.close()
    raw.close()


def test_actions_are_clipped_and_other_shapes_refused() -> None:
    benchmark = REACH.open()
    benchmark.start(0, 1)
    assert benchmark.still_action.shape == (4,)
    benchmark.step(np.full(4, 7.0))
    far = np.array(benchmark._observation)
    benchmark.start(0, 1)
    benchmark.step(np.ones(4))
    np.testing.assert_array_equal(benchmark._observation, far)
    with pytest.raises(ValueError, match=r"actions of shape \(4,\), not \(7,\)"):
        benchmark.step(np.zeros(7))
    benchmark.close()


def test_texts_of_meta_world() -> None:
    assert meta_world_instruction("button-press-topdown-v3") == "button press topdown"
    assert len(meta_world_tasks()) == 50 and "reach-v3" in meta_world_tasks()


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (GymSpec("NoSuch-v0", ""), "gym.make"),
        (GymSpec("CartPole-v1", ""), "actions are vectors of numbers"),
        (GymSpec("Pendulum-v1", "", fast_render=True), "--fast-render is for MuJoCo"),
        (GymSpec(META_WORLD, "", options=(("env_name", "fly-v3"),)), "gym.make"),
    ],
)
def test_what_cannot_be_made_is_one_line(spec: GymSpec, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as raised:
        spec.open().start(0, 0)
    assert "\n" not in str(raised.value)


def test_success_is_never_guessed() -> None:
    benchmark = GymSpec("Pendulum-v1", "swing up").open()
    benchmark.start(0, 0)
    with pytest.raises(ValueError, match="does not report success"):
        benchmark.step(benchmark.still_action)
    with pytest.raises(ValueError, match="no scripted expert"):
        benchmark.expert()
    benchmark.close()
