"""The scripted expert: grasps on shapes that are known, and tasks of the real simulator solved in their step budget."""

import numpy as np
import pytest

from transformers_worldvla.evaluation import libero_grasps

CUBE = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in np.linspace(-1, 1, 21)])


def bowl(radius: float = 0.055, height: float = 0.06) -> np.ndarray:
    """Points (n, 3) of the wall of a bowl that stands at the origin."""
    angles, levels = np.meshgrid(np.linspace(0, 2 * np.pi, 72, endpoint=False), np.linspace(0.3, 1, 15))
    return np.stack([levels * radius * np.cos(angles), levels * radius * np.sin(angles), levels * height], -1).reshape(
        -1, 3
    )


@pytest.mark.parametrize("yaw", [0.0, 0.5, -0.7])
def test_fingers_close_across_the_narrow_side(yaw: float) -> None:
    turn = np.array([[np.cos(yaw), -np.sin(yaw), 0], [np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]])
    box = CUBE * [0.05, 0.02, 0.04] @ turn.T + [0.3, -0.1, 1.0]
    grasp = libero_grasps.narrowest_grasp(box, depth=0.035)
    assert grasp.position == pytest.approx([0.3, -0.1, 1.005], abs=1e-9)
    assert grasp.rotation[:, 2] == pytest.approx([0, 0, -1])
    assert abs(grasp.rotation[:, 1] @ turn[:, 1]) > np.cos(np.radians(5))
    assert np.linalg.det(grasp.rotation) == pytest.approx(1)


def test_flat_things_are_held_in_their_middle() -> None:
    assert libero_grasps.narrowest_grasp(CUBE * [0.05, 0.02, 0.01], depth=0.035).position[2] == pytest.approx(0)


def test_a_bowl_is_held_by_its_rim_where_nothing_is_in_the_way() -> None:
    free = libero_grasps.rim_grasps(bowl(), np.empty((0, 3)))
    assert len(free) == 24
    for grasp in free:
        assert np.linalg.norm(grasp.position[:2]) == pytest.approx(0.051, abs=5e-3)  # a little inside the rim
        outwards = grasp.position[:2] / np.linalg.norm(grasp.position[:2])
        assert abs(grasp.rotation[:2, 1] @ outwards) == pytest.approx(1, abs=1e-6), "one finger inside, one outside"
    assert free[0].position[1] > 0.046, "with room everywhere the wrist turns least"
    wall = free[0].position + [[0.001 * column, 0.04, 0.002 * level] for column in range(8) for level in range(50)]
    assert libero_grasps.rim_grasps(bowl(), wall)[0].position[1] < 0.046
    assert libero_grasps.rim_grasps(bowl(), wall)[-1].position == pytest.approx(free[0].position)


@pytest.mark.parametrize("tilt", [0.0, 0.8, 1.4])
def test_the_hand_leans_towards_a_handle(tilt: float) -> None:
    rotation = libero_grasps.tilted(np.array([0.0, 1.0, 0.0]), tilt)
    assert rotation @ rotation.T == pytest.approx(np.eye(3)) and np.linalg.det(rotation) == pytest.approx(1)
    assert rotation[:, 2] == pytest.approx([0, -np.sin(tilt), -np.cos(tilt)])
    assert libero_grasps.tilted(np.array([0.0, 1.0, 0.0]), 0.0) == pytest.approx(libero_grasps.DOWN)


@pytest.mark.slow
@pytest.mark.parametrize(
    "suite, task",
    [("libero_goal", task) for task in (0, 3, 5, 6, 7)] + [("libero_object", 0), ("libero_spatial", 0)],
)
def test_solves_tasks_in_their_step_budget(suite: str, task: int) -> None:
    """A drawer, the two-stage task, a push, a grasp from above, a knob, and one task of each of the other suites."""
    pytest.importorskip("libero")
    from transformers_worldvla.evaluation.libero_env import LiberoEnv
    from transformers_worldvla.evaluation.libero_expert import LiberoExpert
    from transformers_worldvla.evaluation.libero_suites import step_budget

    env = LiberoEnv(suite, task)
    try:
        env.reset(env.initial_states[0])
        expert = LiberoExpert(env)
        for _ in range(step_budget(suite)):
            action = expert.act()
            assert action.shape == (7,) and action.dtype == np.float32 and np.abs(action).max() <= 1
            assert np.abs(action[:6]).max() > 0.01, "a pause, which a policy that learns from pictures would never end"
            if env.step(action):
                break
        else:
            pytest.fail(f"not solved in {step_budget(suite)} steps")
    finally:
        env.close()


@pytest.mark.slow
def test_goes_on_with_what_the_hand_already_holds() -> None:
    """An expert that takes over from a policy keeps hold of the bowl instead of dropping it and picking it up again."""
    pytest.importorskip("libero")
    from transformers_worldvla.evaluation.libero_env import LiberoEnv
    from transformers_worldvla.evaluation.libero_expert import CLOSE, LiberoExpert
    from transformers_worldvla.evaluation.libero_scene import Scene

    env = LiberoEnv("libero_goal", 8)  # the bowl onto the plate
    try:
        env.reset(env.initial_states[0])
        scene, bowl, expert = Scene(env.simulator), "akita_black_bowl_1", LiberoExpert(env)
        assert not scene.is_held(bowl)
        on_the_table = scene.height(bowl)
        while scene.height(bowl) < on_the_table + 0.1:
            env.step(expert.act())
        assert scene.is_held(bowl)
        successor = LiberoExpert(env)
        for _ in range(80):
            action = successor.act()
            if env.step(action):
                break
            assert action[6] == CLOSE or scene.height(bowl) < on_the_table + 0.08
        else:
            pytest.fail("not solved")
    finally:
        env.close()
