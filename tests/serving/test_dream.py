"""The dream environment: gymnasium's own checker, `model.imagine` and `SyncVectorEnv` say what is right."""

import copy
import importlib
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from small_checkpoint import small_model, small_processor, with_cameras

from transformers_worldvla.data import load_episodes
from transformers_worldvla.evaluation.open_loop import crop_for_model
from transformers_worldvla.serving.dream_world import DreamWorld
from transformers_worldvla.serving.goals import GoalImage
from transformers_worldvla.serving.policy import WorldVLAPolicy

gymnasium = pytest.importorskip("gymnasium", reason="the extra dream")

from gymnasium.utils.env_checker import check_env  # noqa: E402
from gymnasium.vector import SyncVectorEnv  # noqa: E402

from transformers_worldvla.serving.dream import ENV_ID, DreamEnv, DreamVectorEnv  # noqa: E402

EPISODE = Path(__file__).parents[1] / "fixtures" / "lerobot_small" / "v30_video"


@pytest.fixture
def world(arm: WorldVLAPolicy) -> DreamWorld:
    return DreamWorld(arm.model, arm.processor)


@pytest.fixture
def plan(arm: WorldVLAPolicy) -> np.ndarray:
    robot = arm.predictor.robot
    return np.random.default_rng(3).uniform(robot.low, robot.high, (4, robot.action_dim))


def imagined(world: DreamWorld, start: Any, plan: np.ndarray, **options: Any) -> np.ndarray:
    """(T, C, H, W, 3) by `model.imagine`."""
    steps = world.model.imagine(world.processor, image=start, actions=plan, embodiment=world.robot.name, **options)
    return np.stack([np.stack([np.asarray(one) for one in (s if isinstance(s, list) else [s])]) for s in steps])


def pictures_of(observation: dict[str, np.ndarray]) -> np.ndarray:
    return np.stack(list(observation.values()))


def test_gymnasiums_checker_has_no_objection(world: DreamWorld, frames: list[np.ndarray]) -> None:
    env = gymnasium.make(ENV_ID, world=world, start=frames[:3], horizon=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_env(env.unwrapped)
    # robot units are what policies speak; `gymnasium.wrappers.RescaleAction` gives [-1, 1]
    assert all("symmetric and normalized" in str(warning.message) for warning in caught), caught


@pytest.mark.filterwarnings("ignore:.*symmetric and normalized")
def test_the_checker_objects_to_a_dream_that_forgets_its_seed(world: DreamWorld, frames: list[np.ndarray]) -> None:
    class Forgetful(DreamEnv):
        def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
            super().reset(seed=seed)
            return super().reset(options={"start": frames[np.random.default_rng().integers(12)]})

    gymnasium.register("Forgetful-v0", entry_point=Forgetful)
    with pytest.raises(AssertionError):
        check_env(gymnasium.make("Forgetful-v0", world=world, start=frames).unwrapped)
    del gymnasium.registry["Forgetful-v0"]


@pytest.mark.parametrize("options", [{}, {"num_history": 3}, {"feedback": "pixels"}])
def test_a_dream_is_imagine_step_by_step(
    arm: WorldVLAPolicy, frames: list[np.ndarray], plan: np.ndarray, options: dict[str, Any]
) -> None:
    world = DreamWorld(arm.model, arm.processor, **options)
    env = DreamEnv(world, start=frames[0], render_mode="rgb_array")
    observation, info = env.reset(seed=0)
    np.testing.assert_array_equal(observation["image"], crop_for_model(arm.processor, frames[0]))
    assert info == {"step": 0, "instruction": ""}
    for number, (action, expected) in enumerate(zip(plan, imagined(world, frames[0], plan, **options), strict=True)):
        observation, reward, terminated, truncated, info = env.step(action)
        np.testing.assert_array_equal(observation["image"], expected[0])
        np.testing.assert_array_equal(env.render(), expected[0])
        assert (reward, terminated, truncated, info["step"]) == (0.0, False, False, number + 1)


def test_pictures_that_are_not_square(world: DreamWorld, plan: np.ndarray) -> None:
    wide = np.random.default_rng(0).integers(0, 256, (90, 140, 3), dtype=np.uint8)
    env = DreamEnv(world, start=Image.fromarray(wide))
    assert env.reset()[0]["image"].shape[0] < env.observation_space["image"].shape[1]
    for action, expected in zip(plan, imagined(world, wide, plan), strict=True):
        np.testing.assert_array_equal(env.step(action)[0]["image"], expected[0])


def test_several_cameras(plan: np.ndarray, frames: list[np.ndarray]) -> None:
    processor = small_processor(with_cameras("image", "wrist"))
    world = DreamWorld(small_model(processor), processor)
    env = DreamEnv(world, start={"wrist": frames[1], "image": frames[0]}, render_mode="rgb_array")
    assert list(env.observation_space) == ["image", "wrist"]
    observation, _ = env.reset()
    np.testing.assert_array_equal(observation["wrist"], crop_for_model(processor, frames[1]))
    for action, expected in zip(plan, imagined(world, frames[:2], plan), strict=True):
        np.testing.assert_array_equal(pictures_of(env.step(action)[0]), expected)
    assert np.array_equal(env.render(), np.concatenate(list(expected), axis=1))
    with pytest.raises(ValueError, match="no picture of the camera 'wrist'"):
        env.reset(options={"start": {"image": frames[0]}})


def test_the_horizon_truncates_and_success_terminates(world: DreamWorld, frames: list[np.ndarray]) -> None:
    env = DreamEnv(world, start=frames[0], horizon=2, is_success=lambda pictures: pictures.mean() < 0)
    env.reset()
    still = np.zeros(7)
    assert env.step(still)[2:] == (False, False, {"step": 1, "instruction": "", "is_success": False})
    assert env.step(still)[2:4] == (False, True)
    env = DreamEnv(world, start=frames[0], is_success=lambda pictures: True)
    env.reset()
    _, _, terminated, truncated, info = env.step(still)
    assert terminated and not truncated and info["is_success"]


def test_a_goal_picture_as_reward(world: DreamWorld, frames: list[np.ndarray], plan: np.ndarray) -> None:
    goal = GoalImage.from_pictures(world, frames[1], reconstruct=False)
    env = DreamEnv(world, start=frames[0], reward=goal.reward, is_success=goal.is_success)
    env.reset()
    observation, reward, terminated, *_ = env.step(plan[0])
    difference = observation["image"].astype(float) - crop_for_model(world.processor, frames[1])
    assert reward == pytest.approx(-np.sqrt((difference**2).mean()) / 255, rel=1e-6)
    assert not terminated
    reached = GoalImage(observation["image"][None], reached=0.0)
    assert reached.distance(observation["image"][None]) == 0.0
    env = DreamEnv(world, start=frames[0], is_success=reached.is_success)
    env.reset()
    assert env.step(plan[0])[2], "the same dream reaches the same picture"


def test_a_goal_is_compared_as_the_tokenizer_shows_it(world: DreamWorld, frames: list[np.ndarray]) -> None:
    pixels = world.processor(images=[frames[2]], instruction="go")["pixel_values"]
    decoded = world.model.detokenize_images(world.model.tokenize_images(pixels))
    expected = np.asarray(world.processor.image_processor.postprocess(decoded)[0])
    np.testing.assert_array_equal(GoalImage.from_pictures(world, frames[2]).pictures[0], expected)


def test_episodes_as_starts(world: DreamWorld) -> None:
    episodes = load_episodes(EPISODE)
    camera = episodes[0].cameras[0]
    processor = small_processor(with_cameras(camera))
    world = DreamWorld(small_model(processor), processor)
    env = DreamEnv(world, start=episodes)
    first = {crop_for_model(processor, one.frame(camera, 0)).tobytes(): one.instruction for one in episodes}
    seen = set()
    for seed in range(12):
        observation, info = env.reset(seed=seed)
        assert first[observation[camera].tobytes()] == info["instruction"]
        seen.add(observation[camera].tobytes())
    assert seen == set(first), "every episode is drawn"


def test_the_bundled_world_needs_no_argument() -> None:
    env = gymnasium.make(ENV_ID)
    observation, info = env.reset(seed=0)
    assert observation["image"].shape == (128, 128, 3) and info["instruction"] == "put the bowl on top of the cabinet"
    moved = env.step(np.zeros(7, np.float32))[0]["image"].astype(float)
    assert np.abs(moved - observation["image"]).mean() < 12, "a still robot sees about the same picture"


def test_sampled_frames_follow_the_seed(arm: WorldVLAPolicy, frames: list[np.ndarray], plan: np.ndarray) -> None:
    world = DreamWorld(arm.model, arm.processor, generate_kwargs={"do_sample": True})

    def dream(seed: int) -> np.ndarray:
        env = DreamEnv(world, start=frames[0])
        env.reset(seed=seed)
        return np.stack([env.step(action)[0]["image"] for action in plan[:2]])

    np.testing.assert_array_equal(dream(1), dream(1))
    assert not np.array_equal(dream(1), dream(2))


def test_sampled_frames_of_many_dreams_follow_the_seed(arm: WorldVLAPolicy, frames: list[np.ndarray]) -> None:
    env = DreamVectorEnv(
        2,
        DreamWorld(arm.model, arm.processor, generate_kwargs={"do_sample": True}),
        start=frames[0],
        render_mode="rgb_array",
    )

    def dream(seed: int) -> np.ndarray:
        env.reset(seed=seed)
        observation = env.step(np.zeros((2, 7)))[0]["image"]
        np.testing.assert_array_equal(env.render(), observation)
        return observation

    seen = dream(1)
    assert not np.array_equal(seen[0], seen[1]), "each row is drawn by itself"
    np.testing.assert_array_equal(dream(1), seen)
    assert not np.array_equal(dream(2), seen)


def test_many_dreams_at_once_are_as_many_alone(world: DreamWorld, frames: list[np.ndarray]) -> None:
    options = {"world": world, "start": frames[:3], "horizon": 3, "is_success": lambda seen: seen.mean() > 128.5}
    options["reward"] = lambda before, action, after: float(1000 * action[0] + after.mean() - before.mean())
    together = gymnasium.make_vec(ENV_ID, num_envs=3, **options)
    assert isinstance(together.unwrapped, DreamVectorEnv)
    apart = SyncVectorEnv([lambda: DreamEnv(**options)] * 3)
    assert together.observation_space == apart.observation_space and together.action_space == apart.action_space
    for one, other in zip(together.reset(seed=5), apart.reset(seed=5), strict=True):
        assert_alike(one, other)
    apart.action_space.seed(0)
    ended = 0
    for _ in range(7):  # past the horizon twice
        actions = apart.action_space.sample()
        results = together.step(actions), apart.step(actions)
        for one, other in zip(*results, strict=True):
            assert_alike(one, other)
        ended += int((results[0][2] | results[0][3]).sum())
    assert ended >= 3


def assert_alike(one: Any, other: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_alike(one[key], other[key])
    elif np.asarray(one).dtype.kind in "uf":
        # a batch adds up in another order: a colour may round to its neighbour
        np.testing.assert_allclose(np.asarray(one, float), np.asarray(other, float), rtol=0, atol=1)
    else:
        np.testing.assert_array_equal(one, other)


def test_many_dreams_take_one_call_of_the_model_a_step(
    world: DreamWorld, frames: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    env = DreamVectorEnv(4, world, start=frames[0])
    env.reset(seed=0)
    rows = []
    generate = world.model.generate_frames
    monkeypatch.setattr(
        world.model, "generate_frames", lambda **inputs: rows.append(len(inputs["input_ids"])) or generate(**inputs)
    )
    env.step(env.action_space.sample())
    assert rows == [4]


def test_a_policy_acts_in_a_dream(arm: WorldVLAPolicy, world: DreamWorld, frames: list[np.ndarray]) -> None:
    policy, env = arm.session(), DreamEnv(world, start=frames[0])
    observation, _ = env.reset()
    for _ in range(2):
        action = policy.select_action({**observation, "prompt": "push the square to the right"})
        observation, *_ = env.step(action)
    expected = arm.processor(images=[frames[0]], instruction="push the square to the right")
    chunk = arm.processor.decode_actions(arm.model.generate_actions(**expected, num_actions=4))[0]
    assert np.array_equal(observation["image"], imagined(world, frames[0], chunk[:2])[-1, 0])


def test_weights_are_not_copied_with_an_environment(world: DreamWorld) -> None:
    assert copy.deepcopy({"world": world})["world"] is world


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda world, picture: DreamEnv(world, start=[]), "start is empty"),
        (lambda world, picture: DreamEnv(world, start=picture, horizon=0), "horizon is at least 1"),
        (lambda world, picture: DreamEnv(world, start=picture, render_mode="human"), "render_mode is rgb_array"),
        (lambda world, picture: DreamEnv(world, start=picture).step(np.zeros(7)), "call reset"),
        (lambda world, picture: DreamVectorEnv(0, world, start=picture), "num_envs is at least 1"),
        (lambda world, picture: DreamVectorEnv(2, world, start=picture).reset(seed=[1]), "1 seeds for 2 dreams"),
        (lambda world, picture: DreamWorld(world.model, world.processor, feedback="text"), "feedback is one of"),
        (lambda world, picture: DreamWorld(world.model, world.processor, num_history=0), "num_history is at least 1"),
        (lambda world, picture: world.step([world.begin(picture)], np.zeros((1, 6))), r"shape \(1, 7\), not \(1, 6\)"),
        (lambda world, picture: world.step([world.begin(picture)], np.full((1, 7), np.nan)), "action 0 is nan"),
        (
            lambda world, picture: DreamEnv(world, start=picture).reset(options={"start": picture[:40]}),
            "starts have pictures of one size",
        ),
        (lambda world, picture: GoalImage(np.zeros((2, 2, 3), np.uint8)), "goal pictures are"),
        (
            lambda world, picture: GoalImage(np.zeros((1, 2, 2, 3), np.uint8)).distance(picture[None]),
            "the goal has pictures",
        ),
    ],
)
def test_wrong_calls_say_so(world: DreamWorld, frames: list[np.ndarray], call: Any, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        call(world, frames[0])


def test_without_gymnasium_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    monkeypatch.delitem(sys.modules, "transformers_worldvla.serving.dream")
    with pytest.raises(ImportError, match=r'pip install "transformers_worldvla\[dream\]"'):
        importlib.import_module("transformers_worldvla.serving.dream")
