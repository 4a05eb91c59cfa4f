"""Imagine before acting: candidates and rollouts are those of the model called by hand, the best is taken."""

from typing import Any

import numpy as np
import pytest
import torch
from small_checkpoint import small_model, small_processor, with_cameras

from transformers_worldvla.evaluation.open_loop import crop_for_model
from transformers_worldvla.evaluation.policies import PlanRequest
from transformers_worldvla.serving.dream_world import DreamWorld
from transformers_worldvla.serving.goals import GoalImage
from transformers_worldvla.serving.planning import (
    EpisodePlanner,
    PlannedChunk,
    PlanningPolicy,
    PlanningPredictor,
    Rollouts,
    score_by_goal,
)
from transformers_worldvla.serving.policy import WorldVLAPolicy

PROMPT = "push the square to the right"
K, N = 4, 5


def nearest_to(target: np.ndarray) -> Any:
    """A score in closed form: minus the L1 distance of the actions."""
    return lambda rollouts: -np.abs(rollouts.actions - target).sum((1, 2))


def planner(arm: WorldVLAPolicy, score: Any, **options: Any) -> PlanningPolicy:
    return PlanningPolicy(arm.model, arm.processor, score=score, **{"num_candidates": N, "horizon": 1, **options})


def see(picture: np.ndarray) -> dict[str, Any]:
    return {"image": picture, "prompt": PROMPT}


def plan(policy: PlanningPolicy, *pictures: np.ndarray) -> PlannedChunk:
    chunk = policy.predict({"image": np.stack(pictures), "prompt": PROMPT})
    assert isinstance(chunk, PlannedChunk)
    return chunk


def candidates_by_hand(arm: WorldVLAPolicy, *pictures: np.ndarray, seed: int = 0) -> np.ndarray:
    inputs = arm.processor(images=list(pictures), instruction=PROMPT)
    greedy = arm.model.generate_actions(**inputs, num_actions=K)
    generator = torch.Generator().manual_seed(seed)
    options = {"do_sample": True, "num_return_sequences": N - 1, "generator": generator}
    sampled = arm.model.generate_actions(**inputs, num_actions=K, **options)
    return np.asarray(arm.processor.decode_actions(torch.cat([greedy, sampled])))


def test_the_candidates_are_the_greedy_chunk_and_samples(arm: WorldVLAPolicy, frames: list[np.ndarray]) -> None:
    chunk = plan(planner(arm, lambda rollouts: np.zeros(N)), *frames[:2])
    expected = candidates_by_hand(arm, *frames[:2])
    np.testing.assert_array_equal(chunk.rollouts.actions, expected)
    assert len(np.unique(expected, axis=0)) == N, "or there is nothing to choose from"
    assert chunk.best == 0, "of equals the greedy one"
    assert chunk.num_frames == 2
    np.testing.assert_array_equal(chunk.rollouts.start[0], crop_for_model(arm.processor, frames[1]))


@pytest.mark.parametrize("horizon", [2, None])
def test_rollouts_are_imagine_called_by_hand(
    arm: WorldVLAPolicy, frames: list[np.ndarray], horizon: int | None
) -> None:
    rollouts = plan(planner(arm, lambda rollouts: np.zeros(N), horizon=horizon), frames[0]).rollouts
    steps = horizon or K
    assert rollouts.frames.shape == (N, steps, 1, 64, 64, 3)
    for actions, seen in zip(rollouts.actions, rollouts.frames, strict=True):
        expected = arm.model.imagine(arm.processor, image=frames[0], actions=actions[:steps])
        # a batch adds up in another order: a colour may round to its neighbour
        for one, other in zip(seen, expected, strict=True):
            np.testing.assert_allclose(one[0].astype(int), np.asarray(other).astype(int), rtol=0, atol=1)


@pytest.mark.parametrize("wanted", range(N))
def test_the_best_candidate_is_taken(arm: WorldVLAPolicy, frames: list[np.ndarray], wanted: int) -> None:
    target = candidates_by_hand(arm, frames[0])[wanted]
    policy = planner(arm, nearest_to(target))
    chunk = plan(policy, frames[0])
    assert (chunk.best, chunk.scores[wanted]) == (wanted, 0.0)
    np.testing.assert_array_equal(chunk.actions, target)
    np.testing.assert_array_equal(chunk.logprobs, chunk.rollouts.logprobs[wanted])
    inputs = arm.processor(images=[frames[0]], instruction=PROMPT)
    if wanted == 0:
        answer = arm.model.generate_actions(**inputs, num_actions=K, return_dict_in_generate=True)
        np.testing.assert_allclose(chunk.logprobs, answer.logprobs[0].numpy(), atol=1e-6)
    assert policy.last_chunk is chunk


def test_a_goal_that_one_candidate_reaches(arm: WorldVLAPolicy, frames: list[np.ndarray]) -> None:
    world = DreamWorld(arm.model, arm.processor)
    seen = plan(planner(arm, lambda rollouts: np.zeros(N), horizon=2), frames[0]).rollouts.frames
    distinct = {frame[-1].tobytes() for frame in seen}
    assert len(distinct) > 1, "or every plan looks the same"
    for wanted in range(N):
        goal = GoalImage(seen[wanted, -1])
        policy = planner(arm, score_by_goal(goal), horizon=2)
        chunk = plan(policy, frames[0])
        assert chunk.scores[wanted] == 0.0 == chunk.scores.max()
        assert np.array_equal(chunk.rollouts.frames[chunk.best, -1], goal.pictures)
    by_task = score_by_goal({PROMPT: GoalImage.from_pictures(world, frames[1])})
    assert plan(planner(arm, by_task), frames[0]).scores.max() < 0
    with pytest.raises(ValueError, match="no goal picture for the instruction 'stop'"):
        planner(arm, by_task).predict({"image": frames[0], "prompt": "stop"})


def test_plans_follow_the_seed_and_nothing_else(arm: WorldVLAPolicy, frames: list[np.ndarray]) -> None:
    def sampled(policy: PlanningPolicy) -> np.ndarray:
        return plan(policy, frames[0]).rollouts.actions[1:]

    policy = planner(arm, lambda rollouts: np.zeros(N), seed=4)
    before = sampled(policy)
    plan(policy, frames[1])
    np.testing.assert_array_equal(sampled(policy), before)
    np.testing.assert_array_equal(before, candidates_by_hand(arm, frames[0], seed=4)[1:])
    assert not np.array_equal(sampled(planner(arm, lambda rollouts: np.zeros(N), seed=5)), before)


def test_it_acts_as_every_policy_does(arm: WorldVLAPolicy, frames: list[np.ndarray]) -> None:
    target = np.full((K, 7), 0.2)
    policy = planner(arm, nearest_to(target), replan_interval=2).session()
    actions = [policy.select_action(see(picture)) for picture in frames[:4]]
    for start in (0, 2):
        candidates = candidates_by_hand(arm, *frames[max(0, start - 1) : start + 1])
        best = candidates[np.abs(candidates - target).sum((1, 2)).argmin()]
        np.testing.assert_array_equal(actions[start : start + 2], best[:2])


def test_a_checkpoint_with_several_cameras(frames: list[np.ndarray]) -> None:
    processor = small_processor(with_cameras("image", "wrist"))
    policy = PlanningPolicy(
        small_model(processor), processor, score=lambda rollouts: np.zeros(2), num_candidates=2, horizon=1
    )
    pictures = [frames[0], frames[1][::2, ::2]]  # of different sizes, as cameras are
    chunk = policy.predict({"image": pictures[0], "wrist": pictures[1], "prompt": PROMPT})
    assert isinstance(chunk, PlannedChunk)
    expected = policy.model.imagine(processor, image=pictures, actions=chunk.rollouts.actions[1, :1])[0]
    for one, other in zip(chunk.rollouts.frames[1, 0], expected, strict=True):
        np.testing.assert_allclose(one.astype(int), np.asarray(other).astype(int), rtol=0, atol=1)


def test_closed_loop_queries_show_successive_frames(arm: WorldVLAPolicy, frames: list[np.ndarray]) -> None:
    target = np.full((K, 7), -0.1)
    predictor = PlanningPredictor(arm.model, arm.processor, nearest_to(target), num_candidates=N, horizon=1)
    episodes = EpisodePlanner(predictor)

    def ask(name: str, *seen: np.ndarray, begins: bool) -> np.ndarray:
        request = PlanRequest(name, "libero_goal", PROMPT, np.stack(seen)[:, None], begins, seed=0)
        return episodes.plan([request])[0]

    def best(*seen: np.ndarray) -> np.ndarray:
        candidates = candidates_by_hand(arm, *seen)
        return candidates[np.abs(candidates - target).sum((1, 2)).argmin()]

    np.testing.assert_array_equal(ask("a", frames[0], begins=True), best(frames[0]))
    np.testing.assert_array_equal(ask("b", frames[5], begins=True), best(frames[5]))
    np.testing.assert_array_equal(ask("a", *frames[1:4], begins=False), best(*frames[2:4]))
    np.testing.assert_array_equal(ask("a", frames[6], begins=True), best(frames[6]))
    episodes.forget("b")
    episodes.forget("never seen")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"num_candidates": 1}, "num_candidates is at least 2"),
        ({"horizon": 5}, r"horizon is 1 to 4 \(actions a chunk\), not 5"),
        ({"horizon": 0}, r"horizon is 1 to 4 \(actions a chunk\), not 0"),
        ({"temperature": 0.0}, "temperature is above 0"),
        ({"entropy": True}, "entropy and expected_value belong to greedy chunks"),
        ({"generate_kwargs": {"do_sample": True}}, "sets do_sample itself"),
    ],
)
def test_options_that_make_no_sense(arm: WorldVLAPolicy, options: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        planner(arm, lambda rollouts: np.zeros(N), **options)


@pytest.mark.parametrize("scores", [0.0, np.zeros(N + 1), np.full(N, np.nan)])
def test_a_score_is_one_number_a_candidate(arm: WorldVLAPolicy, frames: list[np.ndarray], scores: Any) -> None:
    def score(rollouts: Rollouts) -> Any:
        return scores

    with pytest.raises(ValueError, match="one finite number for each of 5 candidates"):
        plan(planner(arm, score), frames[0])
