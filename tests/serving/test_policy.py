"""The policy: which frames its prompts show, when it plans, and that it acts as its parts do by hand."""

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from transformers_worldvla.serving.policy import WorldVLAPolicy
from transformers_worldvla.serving.prediction import ActionChunk, ChunkRequest

PROMPT = "push the square to the right"
K = 4  # actions a chunk of the small checkpoint


def see(picture: np.ndarray, **more: Any) -> dict[str, Any]:
    return {"image": picture, "prompt": PROMPT, **more}


def chunk_by_hand(arm: WorldVLAPolicy, *pictures: np.ndarray) -> np.ndarray:
    inputs = arm.processor(images=list(pictures), instruction=PROMPT)
    return np.asarray(arm.processor.decode_actions(arm.model.generate_actions(**inputs, num_actions=K))[0])


def policy_over(arm: WorldVLAPolicy, **options: Any) -> WorldVLAPolicy:
    return WorldVLAPolicy(arm.model, arm.processor, **options)


# -------------------------------------------------------------------- which frames a prompt shows


def test_one_frame_a_plan_gives_prompts_with_one_image(arm: WorldVLAPolicy, frames: list[np.ndarray]) -> None:
    policy = arm.session()
    for picture in frames[:3]:
        np.testing.assert_array_equal(policy.predict_action_chunk(see(picture)), chunk_by_hand(arm, picture))
        assert policy.last_chunk is not None and policy.last_chunk.num_frames == 1


def test_an_observed_frame_is_shown_with_the_next_plan(arm: WorldVLAPolicy, frames: list[np.ndarray]) -> None:
    policy = arm.session()
    policy.predict_action_chunk(see(frames[0]))
    policy.observe({"image": frames[1]})  # needs no prompt
    chunk = policy.predict_action_chunk(see(frames[2]))
    np.testing.assert_array_equal(chunk, chunk_by_hand(arm, frames[1], frames[2]))
    # what was planned on is not one step before the next plan
    np.testing.assert_array_equal(policy.predict_action_chunk(see(frames[3])), chunk_by_hand(arm, frames[3]))


def test_step_numbers_tell_which_frames_are_neighbours(arm: WorldVLAPolicy, frames: list[np.ndarray]) -> None:
    policy = arm.session()
    policy.predict_action_chunk(see(frames[0], step=0))
    chunk = policy.predict_action_chunk(see(frames[1], step=1))
    np.testing.assert_array_equal(chunk, chunk_by_hand(arm, frames[0], frames[1]))
    chunk = policy.predict_action_chunk(see(frames[2], step=5))
    np.testing.assert_array_equal(chunk, chunk_by_hand(arm, frames[2]))


def test_a_camera_may_hold_the_frames_itself(arm: WorldVLAPolicy, frames: list[np.ndarray]) -> None:
    chunk = arm.session().predict_action_chunk(see(np.stack(frames[:2])))
    np.testing.assert_array_equal(chunk, chunk_by_hand(arm, frames[0], frames[1]))
    # more than the checkpoint was trained with: the newest
    chunk = arm.session().predict_action_chunk(see(np.stack(frames[:3])))
    np.testing.assert_array_equal(chunk, chunk_by_hand(arm, frames[1], frames[2]))


def test_a_robot_that_replans_every_step_sends_neighbouring_frames(
    arm: WorldVLAPolicy, frames: list[np.ndarray]
) -> None:
    policy = policy_over(arm, replan_interval=1)
    policy.predict_action_chunk(see(frames[0]))
    chunk = policy.predict_action_chunk(see(frames[1]))
    np.testing.assert_array_equal(chunk, chunk_by_hand(arm, frames[0], frames[1]))


# -------------------------------------------------------------------- one action a control step


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("interval", [1, 3, 4])
def test_actions_are_those_of_chunks_planned_every_interval(
    arm: WorldVLAPolicy, frames: list[np.ndarray], interval: int, overlap: bool
) -> None:
    policy = policy_over(arm, replan_interval=interval, overlap=overlap)
    actions = [policy.select_action(see(picture)) for picture in frames[:9]]
    for step, action in enumerate(actions):
        plan = step - step % interval
        shown = frames[max(plan - 1, 0) : plan + 1]
        np.testing.assert_array_equal(action, chunk_by_hand(arm, *shown)[step - plan])


def test_temporal_ensembling_is_acts_weighted_mean(arm: WorldVLAPolicy, frames: list[np.ndarray]) -> None:
    policy = policy_over(arm, aggregation="ensemble", ensemble_coefficient=0.3)
    actions = [policy.select_action(see(picture)) for picture in frames[:7]]
    chunks = [chunk_by_hand(arm, *frames[max(step - 1, 0) : step + 1]) for step in range(7)]
    for step, action in enumerate(actions):
        oldest_first = [chunks[plan][step - plan] for plan in range(max(0, step - K + 1), step + 1)]
        weights = np.array([np.exp(-0.3 * index) for index in range(len(oldest_first))])
        np.testing.assert_allclose(action, (weights[:, None] * oldest_first).sum(0) / weights.sum(), atol=1e-12)


def test_another_instruction_is_planned_for_at_once(arm: WorldVLAPolicy, frames: list[np.ndarray]) -> None:
    policy = arm.session()
    policy.select_action(see(frames[0]))
    action = policy.select_action({"image": frames[1], "task": "stop"})
    inputs = arm.processor(images=frames[:2], instruction="stop")
    expected = arm.processor.decode_actions(arm.model.generate_actions(**inputs, num_actions=K))[0, 0]
    np.testing.assert_array_equal(action, expected)


def test_reset_forgets_the_episode(arm: WorldVLAPolicy, frames: list[np.ndarray]) -> None:
    policy = arm.session()
    for picture in frames[:3]:
        policy.select_action(see(picture))
    policy.reset()
    assert policy.last_chunk is None
    np.testing.assert_array_equal(policy.select_action(see(frames[5])), chunk_by_hand(arm, frames[5])[0])


def test_steps_that_begin_again_are_another_episode(arm: WorldVLAPolicy, frames: list[np.ndarray]) -> None:
    policy = arm.session()
    for step in range(3):
        policy.select_action(see(frames[step], step=step))
    np.testing.assert_array_equal(policy.select_action(see(frames[7], step=0)), chunk_by_hand(arm, frames[7])[0])


def test_a_step_that_was_skipped_takes_the_chunks_later_action(arm: WorldVLAPolicy, frames: list[np.ndarray]) -> None:
    policy = arm.session()
    policy.select_action(see(frames[0], step=10))
    action = policy.select_action(see(frames[1], step=12))
    np.testing.assert_array_equal(action, chunk_by_hand(arm, frames[0])[2])


def test_the_default_prompt_serves_observations_without_one(arm: WorldVLAPolicy, frames: list[np.ndarray]) -> None:
    policy = policy_over(arm, prompt=PROMPT)
    np.testing.assert_array_equal(policy.select_action({"image": frames[0]}), chunk_by_hand(arm, frames[0])[0])
    with pytest.raises(ValueError, match="has no prompt"):
        arm.session().select_action({"image": frames[0]})


def test_a_refused_observation_leaves_the_policy_as_it_was(arm: WorldVLAPolicy, frames: list[np.ndarray]) -> None:
    policy = arm.session()
    policy.observe({"image": frames[0]})
    with pytest.raises(ValueError, match="no picture 'image'"):
        policy.predict_action_chunk({"imgae": frames[1], "prompt": PROMPT})
    with pytest.raises(ValueError, match="no prompt"):
        policy.predict_action_chunk({"image": frames[1]})
    chunk = policy.predict_action_chunk(see(frames[2]))
    np.testing.assert_array_equal(chunk, chunk_by_hand(arm, frames[0], frames[2]))


# -------------------------------------------------------------------- what else it tells


def test_sessions_share_weights_and_nothing_else(arm: WorldVLAPolicy, frames: list[np.ndarray]) -> None:
    first, second = arm.session(), arm.session()
    first.observe({"image": frames[0]})
    assert first.model is second.model
    np.testing.assert_array_equal(second.predict_action_chunk(see(frames[1])), chunk_by_hand(arm, frames[1]))
    chunk = first.predict_action_chunk(see(frames[1]))
    np.testing.assert_array_equal(chunk, chunk_by_hand(arm, frames[0], frames[1]))


def test_surprise_rates_the_frame_that_came_after_the_executed_action(
    arm: WorldVLAPolicy, frames: list[np.ndarray]
) -> None:
    policy = policy_over(arm, measure_surprise=True)
    action = policy.select_action(see(frames[0]))
    assert policy.last_surprise is None
    policy.select_action(see(frames[1]))
    assert policy.last_surprise == pytest.approx(arm.surprise(see(frames[0]), action, see(frames[1])), rel=1e-5)
    policy.observe(see(frames[2]))  # whose action led here is not known
    policy.select_action(see(frames[3]))
    assert policy.last_surprise is None


def test_imagine_starts_from_what_was_seen_last(arm: WorldVLAPolicy, frames: list[np.ndarray]) -> None:
    policy = arm.session()
    plan = np.zeros((2, 7))
    with pytest.raises(ValueError, match="nothing was seen yet"):
        policy.imagine(plan)
    policy.observe({"image": frames[0]})
    expected = arm.model.imagine(arm.processor, image=frames[0], actions=plan)
    assert [np.asarray(one).tolist() for one in policy.imagine(plan)] == [np.asarray(one).tolist() for one in expected]
    other = arm.model.imagine(arm.processor, image=frames[1], actions=plan, feedback="pixels")
    imagined = policy.imagine(plan, {"image": frames[1]}, feedback="pixels")
    assert [np.asarray(one).tolist() for one in imagined] == [np.asarray(one).tolist() for one in other]


def test_metadata_says_what_a_client_must_send(arm: WorldVLAPolicy) -> None:
    policy = policy_over(arm, camera_map={"observation/image": "image"})
    told = policy.metadata
    wanted = {"cameras": ["observation/image"], "action_dim": 7, "num_actions": 4, "control_hz": 20.0}
    assert {key: told[key] for key in wanted} == wanted and told["embodiment"] == "libero"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"replan_interval": 5}, "replan_interval is 1 to 4"),
        ({"replan_interval": 0}, "replan_interval is 1 to 4"),
        ({"num_actions": 0}, "num_actions is at least 1"),
        ({"aggregation": "mean"}, "aggregation is one of latest, ensemble"),
        ({"embodiment": "libra"}, "unknown embodiment 'libra'; known: libero"),
        ({"camera_map": {"x": "imgae"}}, "did you mean 'image'?"),
    ],
)
def test_wrong_options_are_refused(arm: WorldVLAPolicy, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError) as caught:
        policy_over(arm, **options)
    assert reason in str(caught.value)


# -------------------------------------------------------------------- threads


def test_threads_wait_for_one_another(arm: WorldVLAPolicy, frames: list[np.ndarray]) -> None:
    """Many threads share one policy: every step is taken once, and each chunk is planned once."""
    policy = arm.session()
    predict, plans = policy.predictor.predict, []

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(arm.predictor, name)

        def predict(self, requests: Sequence[ChunkRequest]) -> list[ActionChunk]:
            plans.append(len(requests))
            return predict(requests)

    policy.predictor = Counting()  # type: ignore[assignment]
    policy.overlap = False
    actions: list[np.ndarray] = []

    def act() -> None:
        for _ in range(4):
            actions.append(policy.select_action(see(frames[0])))

    threads = [threading.Thread(target=act) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(actions) == 20 and plans == [1] * 5  # 20 steps are 5 chunks of 4
    first, later = chunk_by_hand(arm, frames[0]), chunk_by_hand(arm, frames[0], frames[0])
    expected = sorted([*first.tolist(), *(4 * later.tolist())])
    assert sorted(action.tolist() for action in actions) == expected
