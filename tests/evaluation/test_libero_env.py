"""LIBERO's simulator: complete resets, pictures and states as LIBERO itself gives them, and what is refused."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from simulator_extras import need_libero

from transformers_worldvla.data import load_episodes
from transformers_worldvla.evaluation.libero_benchmark import (
    RENDER_TOLERANCE,
    LiberoSpec,
    reference_name,
    render_references,
    thumbnail,
)
from transformers_worldvla.evaluation.libero_env import LiberoEnv
from transformers_worldvla.evaluation.rendering import picture_difference

need_libero()

SUITE, TASK = "libero_goal", 7  # turn on the stove: a joint, a site that lights up, and fixtures that are jittered
ACTIONS = np.concatenate(
    [np.random.default_rng(0).uniform(-1, 1, (30, 6)), np.random.default_rng(1).choice([-1.0, 1.0], (30, 1))], axis=1
)
Trace = tuple[np.ndarray, np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def env() -> Iterator[LiberoEnv]:
    env = LiberoEnv(SUITE, TASK, resolution=128)
    yield env
    env.close()


def trace(env: LiberoEnv, trial: int, seed: int, steps: int = 30) -> Trace:
    """Simulator states and proprioception after each step, and the last picture."""
    env.reset(env.initial_states[trial], seed)
    states, proprioception = [], []
    for action in ACTIONS[:steps]:
        env.step(action)
        states.append(env.simulator.sim.get_state().flatten())
        proprioception.append(env.state)
    return np.stack(states), np.stack(proprioception), env.render()


def same(first: Trace, second: Trace) -> bool:
    return all(np.array_equal(one, other) for one, other in zip(first, second, strict=True))


def test_an_episode_does_not_depend_on_those_before_it(env: LiberoEnv) -> None:
    """Bit by bit: after another placement, other fixtures, a closed gripper, a lit stove; and in a new environment."""
    first = trace(env, trial=5, seed=3)
    other = trace(env, trial=8, seed=4)
    solve(env)
    assert same(trace(env, trial=5, seed=3), first)
    assert not np.array_equal(other[0], first[0])
    fresh = LiberoEnv(SUITE, TASK, resolution=128)
    assert same(trace(fresh, trial=5, seed=3), first)
    arrays = [name for name in dir(env._model) if isinstance(getattr(env._model, name), np.ndarray)]
    for name in arrays:
        np.testing.assert_array_equal(getattr(env._model, name), getattr(fresh._model, name), err_msg=name)
    fresh.close()


def solve(env: LiberoEnv) -> int:
    """Let the scripted expert solve trial 0; the steps it took."""
    from transformers_worldvla.evaluation.libero_expert import LiberoExpert

    env.reset(env.initial_states[0])
    expert = LiberoExpert(env)
    return next(step for step in range(1, 301) if env.step(expert.act()))


def test_the_scripted_expert_solves_it_within_the_budget(env: LiberoEnv) -> None:
    assert solve(env) <= 300


def test_the_seed_places_fixtures_and_what_has_no_initial_state(env: LiberoEnv) -> None:
    places = []
    for seed in (1, 2, 1):
        env.reset(env.initial_states[0], seed, settle_steps=0)
        places.append(env._model.body_pos.copy())
    assert np.array_equal(places[0], places[2])
    assert 0 < np.abs(places[0] - places[1]).max() < 0.05, "a jitter"
    drawn = []
    for seed in (1, 2, 1):
        env.reset(None, seed)
        drawn.append(env.simulator.sim.get_state().flatten())
    assert np.array_equal(drawn[0], drawn[2])
    assert not np.array_equal(drawn[0], drawn[1])
    assert not any(np.array_equal(drawn[0], state) for state in env.initial_states)


def test_numpys_generator_is_left_alone(env: LiberoEnv) -> None:
    np.random.seed(11)
    expected = np.random.uniform(size=3)
    np.random.seed(11)
    env.reset(env.initial_states[0], seed=5, settle_steps=0)
    assert np.array_equal(np.random.uniform(size=3), expected)


def test_settling_steps_close_the_gap_between_state_and_physics(env: LiberoEnv) -> None:
    """Time goes by 50 ms a step: ten steps before the episode, and nothing else."""
    env.reset(env.initial_states[3], settle_steps=0)
    start = env.simulator.sim.data.time
    env.reset(env.initial_states[3])
    assert env.simulator.sim.data.time - start == pytest.approx(0.5)
    assert np.array_equal(env.state.shape, (8,)) and env.state.dtype == np.float32


def test_pictures_have_the_orientation_of_public_recordings(env: LiberoEnv) -> None:
    """A frame of a recorded LIBERO-Goal episode, which LeRobot's own writer stored, against the four rotations."""
    folder = Path(__file__).parents[1] / "fixtures" / "libero" / "lerobot_v30_video"
    recorded = load_episodes(folder)[0].frame("image", 0)
    recorded = recorded[:: len(recorded) // 128, :: len(recorded) // 128]
    env.reset(env.initial_states[0])
    drawn = env.render()
    assert drawn.shape == (128, 128, 3) and drawn.dtype == np.uint8
    differences = [picture_difference(np.rot90(drawn, turns), recorded) for turns in range(4)]
    assert np.argmin(differences) == 0, differences
    assert min(differences[1:]) > 2 * differences[0]


def test_rotation_turns_pictures_and_nothing_else(env: LiberoEnv) -> None:
    upside_down = LiberoEnv(SUITE, TASK, resolution=128, rotation=0)
    for each in (env, upside_down):
        each.reset(each.initial_states[0])
    np.testing.assert_array_equal(upside_down.render(), env.render()[::-1, ::-1])
    upside_down.close()


def test_the_first_frame_is_drawn_as_by_the_pinned_versions() -> None:
    benchmark = LiberoSpec(SUITE, TASK).open()
    about = benchmark.describe(looks=True)
    assert about["render_difference"] < RENDER_TOLERANCE
    assert about["versions"]["mujoco"] and about["renderer"] and len(about["render_hash"]) == 16
    assert "warning" not in about
    darker = thumbnail((benchmark.first_frame() * 0.8).astype(np.uint8))
    assert picture_difference(darker, render_references()[reference_name(SUITE, TASK)]) > RENDER_TOLERANCE
    benchmark.close()


@pytest.mark.parametrize("action", [np.zeros(6), np.zeros((1, 7)), np.full(7, np.nan)])
def test_other_actions_are_refused(env: LiberoEnv, action: np.ndarray) -> None:
    with pytest.raises(ValueError, match="7 finite numbers"):
        env.step(action)


def test_looking_changes_nothing(env: LiberoEnv) -> None:
    """Also the first look of a process, for which a renderer is opened in the middle of an episode."""
    blind, looking = LiberoEnv(SUITE, TASK, resolution=128), LiberoEnv(SUITE, TASK, resolution=128)
    for each in (blind, looking):
        each.reset(None, seed=3)
    picture = looking.render()
    for action in ACTIONS[:5]:
        np.testing.assert_array_equal(looking._data.qacc_warmstart, blind._data.qacc_warmstart)
        for each in (blind, looking):
            each.step(action)
        np.testing.assert_array_equal(
            looking.simulator.sim.get_state().flatten(), blind.simulator.sim.get_state().flatten()
        )
    env.reset(None, seed=3)
    np.testing.assert_array_equal(env.render(), picture)
    for each in (blind, looking):
        each.close()


def test_other_states_and_cameras_are_refused(env: LiberoEnv) -> None:
    with pytest.raises(ValueError, match=r"shape \(79,\), not \(3,\)"):
        env.reset(np.zeros(3))
    with pytest.raises(ValueError, match='no camera "front" in the scene; there are .*agentview'):
        env.render("front")


@pytest.mark.slow
@pytest.mark.parametrize(("suite", "task"), [("libero_goal", 9), ("libero_spatial", 0), ("libero_object", 3)])
def test_physics_and_pictures_are_liberos_own(suite: str, task: int) -> None:
    """Bit by bit the observations of LIBERO's `OffScreenRenderEnv`, fixtures placed alike, solver started afresh."""
    from libero.libero.envs import OffScreenRenderEnv
    from robosuite.utils.transform_utils import quat2axisangle

    env = LiberoEnv(suite, task)
    env.reset(env.initial_states[5], seed=3)
    official = OffScreenRenderEnv(bddl_file_name=str(env.task.bddl_file), camera_heights=256, camera_widths=256)
    official.seed(0)
    official.env.reset()
    model = official.env.sim.model._model
    model.body_pos[:], model.body_quat[:] = env._model.body_pos, env._model.body_quat
    official.env.sim.reset()  # else the solver's warm start of a random placement is left over: differences of 1e-15
    seen = official.set_init_state(env.initial_states[5])
    for _ in range(10):
        seen, *_ = official.step([0.0] * 6 + [-1.0])
    for action in (None, *ACTIONS[:20]):
        if action is not None:
            seen, *_ = official.step(action)
            env.step(action)
        np.testing.assert_array_equal(env.simulator.sim.get_state().flatten(), official.get_sim_state())
        np.testing.assert_array_equal(env.state[:3], seen["robot0_eef_pos"].astype(np.float32))
        np.testing.assert_array_equal(env.state[3:6], quat2axisangle(seen["robot0_eef_quat"].copy()).astype(np.float32))
        np.testing.assert_array_equal(env.state[6:], seen["robot0_gripper_qpos"].astype(np.float32))
    for camera in ("agentview", "robot0_eye_in_hand"):
        np.testing.assert_array_equal(env.render(camera), seen[f"{camera}_image"][::-1, ::-1])
    official.close()
    env.close()
