"""Answers the queries of simulated robots with a model: frames in, chunks of actions out, several robots in one call.

An episode must not depend on which others share its batch. So with a batch size of B every forward has exactly B rows
of one length, empty rows are filled up, and `batch_is_independent` makes sure, bit by bit, that on this machine a row
then gives the same whatever stands in the others and wherever it stands. With B = 1 nothing is padded.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional


@dataclass(frozen=True)
class PlanRequest:
    """A robot's query. `episode` says whose it is; `frames` (n, C, H, W, 3) are new since its last one."""

    episode: Any
    suite: str
    instruction: str
    frames: np.ndarray
    begins: bool
    seed: int


class ModelPlanner:
    """A checkpoint that answers `PlanRequest`s.

    Args:
        model, processor: as `from_pretrained` loads them.
        instructions: all the instructions of each suite. They settle how long the padded prompts of a suite are, so
            that it does not depend on which of its tasks are run.
        embodiment: whose actions, where the checkpoint has several.
        num_actions: length of a chunk (K); the checkpoint's by default.
        batch_size: rows of a forward (B).
        sampling: `do_sample`, `temperature`, `top_k` of `generate_actions`. Sampling draws from one generator an
            episode, so it needs a batch size of 1.

    Raises:
        ValueError: sampling with a larger batch.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        instructions: Mapping[str, Sequence[str]],
        embodiment: str | None = None,
        num_actions: int | None = None,
        batch_size: int = 1,
        sampling: Mapping[str, Any] | None = None,
    ):
        if sampling and batch_size > 1:
            raise ValueError("sampled actions need a batch size of 1: each episode draws from its own generator")
        self.model, self.processor = model, processor
        self.robot = processor.get_embodiment(embodiment)
        self.num_actions = num_actions or processor.num_actions
        self.batch_size = batch_size
        self._instructions = instructions
        self._sampling = dict(sampling or {})
        self._lengths: dict[str, int] = {}
        self._codes: dict[Any, deque[list[np.ndarray]]] = {}  # the last M time steps, C pictures each
        self._generators: dict[Any, torch.Generator] = {}

    @torch.inference_mode()
    def plan(self, requests: Sequence[PlanRequest]) -> list[np.ndarray]:
        """A chunk (K, D) in robot units for each of at most `batch_size` requests."""
        if not 0 < len(requests) <= self.batch_size:
            raise ValueError(f"between 1 and {self.batch_size} requests are answered at once, not {len(requests)}")
        lengths = [len(request.frames) for request in requests]
        codes = iter(self._tokenize(np.concatenate([request.frames for request in requests])))
        for request, length in zip(requests, lengths, strict=True):
            if request.begins:
                self._codes[request.episode] = deque(maxlen=self.processor.history)
                generator = torch.Generator(self.model.device).manual_seed(request.seed)
                self._generators[request.episode] = generator
            self._codes[request.episode].extend(next(codes) for _ in range(length))
        prompts = [[code for step in self._codes[request.episode] for code in step] for request in requests]
        texts = [request.instruction for request in requests]
        inputs = self._inputs(prompts, texts, max(self._prompt_length(request.suite) for request in requests))
        generator = self._generators[requests[0].episode] if self._sampling else None
        tokens = self._generate(inputs, generator)[0]  # (B, K, D)
        return list(self.processor.decode_actions(tokens[: len(requests)], self.robot.name))

    def forget(self, episode: Any) -> None:
        """An episode is over."""
        self._codes.pop(episode, None)
        self._generators.pop(episode, None)

    # ------------------------------------------------------------------ fixed shapes

    def _tokenize(self, frames: np.ndarray) -> list[list[np.ndarray]]:
        """Frames (n, C, H, W, 3) -> n lists of C code grids (h, w); always B pictures at a time."""
        count, cameras = frames.shape[:2]
        pixels = [self.processor.image_processor.pixels(picture) for step in frames for picture in step]
        pixels += pixels[:1] * (-len(pixels) % self.batch_size)
        codes: list[np.ndarray] = []
        for start in range(0, len(pixels), self.batch_size):
            batch = torch.from_numpy(np.stack(pixels[start : start + self.batch_size]))
            codes += list(self.model.tokenize_images(batch).cpu().numpy())
        return [codes[step * cameras : (step + 1) * cameras] for step in range(count)]

    def _inputs(self, prompts: list[list[np.ndarray]], texts: list[str], length: int) -> dict[str, torch.Tensor]:
        """`input_ids` and `attention_mask`: B rows of `length` tokens, or one row as long as it is."""
        rows = range(self.batch_size)
        inputs = self.processor(
            image_tokens=[prompts[row if row < len(prompts) else 0] for row in rows],
            instruction=[texts[row if row < len(texts) else 0] for row in rows],
            embodiment=self.robot.name,
        )
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        if self.batch_size > 1:
            missing = length - ids.shape[1]
            ids = functional.pad(ids, (missing, 0), value=self.processor.tokens.pad)
            mask = functional.pad(mask, (missing, 0), value=0)
        return {"input_ids": ids.to(self.model.device), "attention_mask": mask.to(self.model.device)}

    def _prompt_length(self, suite: str) -> int:
        """Tokens of the longest prompt that a suite can have."""
        if suite not in self._lengths:
            side = self.processor.image_processor.target_size
            blank = self._tokenize(np.zeros((1, 1, side, side, 3), np.uint8))[0][0]
            pictures = [blank] * (self.processor.history * self.robot.num_cameras)
            prompts = [
                self.processor(image_tokens=pictures, instruction=text, embodiment=self.robot.name)["input_ids"]
                for text in self._instructions[suite]
            ]
            self._lengths[suite] = max(prompt.shape[1] for prompt in prompts)
        return self._lengths[suite]

    def _generate(
        self, inputs: dict[str, torch.Tensor], generator: torch.Generator | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Bin tokens and their log-probabilities, (B, K, D) each."""
        answer = self.model.generate_actions(
            **inputs,
            num_actions=self.num_actions,
            action_dim=self.robot.action_dim,
            generator=generator,
            return_dict_in_generate=True,
            **self._sampling,
        )
        return answer.sequences, answer.logprobs

    # ------------------------------------------------------------------ the promise

    @torch.inference_mode()
    def batch_is_independent(self, suite: str) -> bool:
        """Whether a row of a full batch gives the same bits wherever it stands and whatever fills the other rows.

        Tried with pictures of noise in every row: codes of the pictures, tokens and log-probabilities of the actions.
        """
        rng = np.random.default_rng(0)
        texts, length = list(self._instructions[suite]), self._prompt_length(suite)
        side = self.processor.image_processor.target_size
        shape = (self.batch_size, self.robot.num_cameras, side, side, 3)
        probe = rng.integers(0, 256, shape[1:], dtype=np.uint8)
        answers = []
        for row in range(self.batch_size):
            frames = rng.integers(0, 256, shape, dtype=np.uint8)
            frames[row] = probe
            codes = self._tokenize(frames)
            steps = [self.processor.history if index == row else 1 + index % 2 for index in range(self.batch_size)]
            instructions = [
                texts[0 if index == row else (index + row) % len(texts)] for index in range(self.batch_size)
            ]
            prompts = [grids * min(count, self.processor.history) for grids, count in zip(codes, steps, strict=True)]
            tokens, scores = self._generate(self._inputs(prompts, instructions, length), None)
            answers.append((np.stack(codes[row]), tokens[row].cpu().numpy(), scores[row].float().cpu().numpy()))
        return all(
            np.array_equal(one, other) for found in answers for one, other in zip(answers[0], found, strict=True)
        )
