"""Imagine before acting: propose some chunks of actions, see in the world model where they lead, take the best.

`PlanningPredictor` stands where `ActionPredictor` does, so `PlanningPolicy` and the server plan like this without
knowing it; `EpisodePlanner` offers it to the closed-loop evaluation. What is good is for the caller's score to say
(`goals.GoalImage` knows one): no success is learned here, and a score of imagined pixels believes what the world model
imagines.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..evaluation.open_loop import crop_for_model
from .goals import GoalImage
from .history import Frame, FrameHistory
from .policy import WorldVLAPolicy
from .prediction import ActionChunk, ActionPredictor, ChunkRequest


@dataclass(frozen=True)
class Rollouts:
    """N candidates of one plan and where the world model thinks that they lead. Candidate 0 is the greedy chunk.

    Attributes:
        instruction: what is to be done.
        start: (C, H, W, 3) uint8, the newest pictures seen, as the model crops them.
        actions: (N, K, D) in robot units.
        logprobs: (N, K, D), log-probability of each chosen bin.
        frames: (N, T, C, H, W, 3) uint8, imagined after each of the first T <= K actions.
    """

    instruction: str
    start: np.ndarray
    actions: np.ndarray
    logprobs: np.ndarray
    frames: np.ndarray


Score = Callable[[Rollouts], np.ndarray]


def score_by_goal(goal: GoalImage | Mapping[str, GoalImage]) -> Score:
    """A score: minus the distance of the last imagined pictures from a goal, or from the goal of each instruction.

    The score raises ValueError for an instruction that has no goal.
    """

    def score(rollouts: Rollouts) -> np.ndarray:
        aim = goal
        if isinstance(aim, Mapping):
            if rollouts.instruction not in aim:
                raise ValueError(f"there is no goal picture for the instruction {rollouts.instruction!r}")
            aim = aim[rollouts.instruction]
        return -aim.distance(rollouts.frames[:, -1])

    return score


@dataclass(frozen=True)
class PlannedChunk(ActionChunk):
    """The chunk that was chosen, with what it was chosen from.

    Attributes:
        rollouts: all candidates.
        scores: (N,), higher is better.
        best: which one is this; of equals the first, so the greedy chunk where nothing is better.
    """

    rollouts: Rollouts
    scores: np.ndarray
    best: int


class PlanningPredictor(ActionPredictor):
    """Predicts by planning; nothing is remembered, and the same request gives the same plan.

    Args:
        score: `Rollouts` -> (N,) numbers, higher is better.
        num_candidates: N: the greedy chunk and N - 1 sampled ones.
        horizon: T, actions of a chunk that are imagined; all K by default. Fewer cost less and look less far.
        temperature, top_k: of the sampled chunks.
        seed: of the sampled chunks. Every plan draws the same numbers.
        imagine_kwargs: for `model.imagine` (`feedback`, `num_history`, `draft` ...).
        options: of `ActionPredictor`; the chunks it answers with are the candidates.

    Raises ValueError for numbers that make no sense, and for options that would change how candidates are drawn.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        score: Score,
        *,
        num_candidates: int = 8,
        horizon: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 0,
        imagine_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ):
        super().__init__(model, processor, **options)
        if num_candidates < 2:
            raise ValueError(f"num_candidates is at least 2 (one alone is no choice), not {num_candidates}")
        self.horizon = self.num_actions if horizon is None else horizon
        if not 1 <= self.horizon <= self.num_actions:
            raise ValueError(f"horizon is 1 to {self.num_actions} (actions a chunk), not {horizon}")
        if not temperature > 0:
            raise ValueError(f"temperature is above 0, not {temperature}")
        if self.entropy or self.expected_value:
            raise ValueError("entropy and expected_value belong to greedy chunks: a planner chooses among sampled ones")
        if taken := sorted({"do_sample", "temperature", "top_k", "generator"} & set(self.generate_kwargs)):
            raise ValueError(f"the planner sets {taken[0]} itself: leave it out of generate_kwargs")
        self.score = score
        self.num_candidates = num_candidates
        self.temperature, self.top_k, self.seed = temperature, top_k, seed
        self.imagine_kwargs = {"draft": "previous", **(imagine_kwargs or {})}

    def predict(self, requests: Sequence[ChunkRequest]) -> list[ActionChunk]:
        """The best chunk (`PlannedChunk`) for each request; one request is planned after the other."""
        return [self.plan(request) for request in requests]

    def plan(self, request: ChunkRequest) -> PlannedChunk:
        """Propose, imagine, score, choose. Raises ValueError when the score is no number for each candidate."""
        greedy = super().predict([request])[0]
        sampled, logprobs = self._sample(request)
        actions = np.concatenate([greedy.actions[None], sampled])  # (N, K, D)
        rollouts = Rollouts(
            instruction=request.instruction,
            start=np.stack([crop_for_model(self.processor, picture) for picture in request.frames[-1].pictures]),
            actions=actions,
            logprobs=np.concatenate([greedy.logprobs[None], logprobs]),
            frames=self._roll_out(request.frames[-1], actions[:, : self.horizon]),
        )
        scores = np.asarray(self.score(rollouts), np.float64)
        if scores.shape != (len(actions),) or not np.isfinite(scores).all():
            raise ValueError(f"a score gives one finite number for each of {len(actions)} candidates, not {scores}")
        best = int(scores.argmax())
        return PlannedChunk(actions[best], rollouts.logprobs[best], None, greedy.num_frames, rollouts, scores, best)

    def _sample(self, request: ChunkRequest) -> tuple[np.ndarray, np.ndarray]:
        """N - 1 chunks drawn from the model and the log-probabilities of their bins, (N - 1, K, D) each."""
        with self._lock:
            generator = torch.Generator(self.model.device).manual_seed(self.seed)
            answer = self.model.generate_actions(
                **self._inputs([request]),
                num_actions=self.num_actions,
                action_dim=self.robot.action_dim,
                do_sample=True,
                temperature=self.temperature,
                top_k=self.top_k,
                num_return_sequences=self.num_candidates - 1,
                return_dict_in_generate=True,
                generator=generator,
                **self.generate_kwargs,
            )
        actions = self.processor.decode_actions(answer.sequences, self.robot.name)
        return actions, answer.logprobs.double().cpu().numpy()

    def _roll_out(self, frame: Frame, plans: np.ndarray) -> np.ndarray:
        """Frames (N, T, C, H, W, 3) imagined after each action of the plans (N, T, D), all in one batch."""
        pictures = list(frame.pictures)
        with self._lock:
            rows = self.model.imagine(
                self.processor,
                image=[pictures] * len(plans),  # the same objects: tokenized once
                actions=plans,
                embodiment=self.robot.name,
                **self.imagine_kwargs,
            )
        steps = [step if isinstance(step, list) else [step] for row in rows for step in row]
        frames = np.stack([np.stack([np.asarray(picture) for picture in step]) for step in steps])
        return frames.reshape(*plans.shape[:2], *frames.shape[1:])


class PlanningPolicy(WorldVLAPolicy):
    """A `WorldVLAPolicy` that imagines before it acts.

    Args:
        score, num_candidates, horizon, temperature, top_k, seed, imagine_kwargs: see `PlanningPredictor`.
        options: all others of `WorldVLAPolicy`.

    Attributes:
        last_chunk: the newest `PlannedChunk`, with its candidates.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        score: Score,
        num_candidates: int = 8,
        horizon: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 0,
        imagine_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ):
        super().__init__(model, processor, **options)
        plain = self.predictor
        self.predictor = PlanningPredictor(
            model,
            processor,
            score,
            num_candidates=num_candidates,
            horizon=horizon,
            temperature=temperature,
            top_k=top_k,
            seed=seed,
            imagine_kwargs=imagine_kwargs,
            embodiment=plain.robot.name,
            num_actions=plain.num_actions,
            entropy=plain.entropy,
            expected_value=plain.expected_value,
            generate_kwargs=plain.generate_kwargs,
        )


class EpisodePlanner:
    """A `PlanningPredictor` where the closed-loop evaluation expects a `ModelPlanner`: one robot's query at a time."""

    batch_size = 1

    def __init__(self, predictor: ActionPredictor):
        self._predictor = predictor
        self.processor, self.robot = predictor.processor, predictor.robot
        self.num_actions = predictor.num_actions
        self._histories: dict[Any, FrameHistory] = defaultdict(lambda: FrameHistory(self.processor.history))

    def plan(self, requests: Sequence[Any]) -> list[np.ndarray]:
        """A chunk (K, D) for each `PlanRequest`."""
        return [self._predictor.predict([self._chunk_request(request)])[0].actions for request in requests]

    def forget(self, episode: Any) -> None:
        """An episode is over."""
        self._histories.pop(episode, None)

    def _chunk_request(self, request: Any) -> ChunkRequest:
        history = self._histories[request.episode]
        if request.begins:
            history.clear()
        for step in request.frames:  # successive control steps
            history.add([[Image.fromarray(picture) for picture in step]], None, follows=True)
        return ChunkRequest(history.frames, request.instruction)
