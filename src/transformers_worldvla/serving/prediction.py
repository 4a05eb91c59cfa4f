"""The model as acting needs it: prompts in, chunks of actions with their confidence out, for many robots at once.

It remembers nothing between calls: frames, chunks and the control step belong to a policy. Calls from several threads
wait for one another; one model does one thing at a time.
"""

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..action_tokenization_worldvla import bin_centers, denormalize
from .history import Frame


@dataclass(frozen=True)
class ChunkRequest:
    """What the model is to be asked: the frames of successive control steps, oldest first, and what to do.

    `prefix`: what `ActionPredictor.prepare` has under way for this prompt; it is used where a request comes alone.
    """

    frames: Sequence[Frame]
    instruction: str
    prefix: "Future[Any] | None" = None


@dataclass(frozen=True)
class ActionChunk:
    """A chunk of K actions of D dimensions in robot units, and how sure the model is of it.

    Attributes:
        actions: (K, D) float64.
        logprobs: (K, D), log-probability of each chosen bin among the 256 legal ones.
        entropy: (K, D) in nats, of the distribution that each bin was chosen from; None unless asked for.
        num_frames: time steps that the prompt showed.
    """

    actions: np.ndarray
    logprobs: np.ndarray
    entropy: np.ndarray | None
    num_frames: int

    @property
    def confidence(self) -> np.ndarray:
        """(K,): geometric mean of the probabilities of an action's bins, 1/256 for a model that knows nothing."""
        return np.exp(self.logprobs.mean(-1))


class ActionPredictor:
    """Predicts chunks for one embodiment of a checkpoint.

    Args:
        model, processor: of one checkpoint.
        embodiment: whose actions; not needed where the checkpoint has one, or a default.
        num_actions: K, the checkpoint's by default.
        entropy: also give the entropy of every bin, at the price of one more pass over prompt and answer.
        expected_value: answer with the mean of the bins' centres under that distribution instead of the chosen bin's
            centre (the later dimensions of an action stay conditioned on the chosen bins). The same price.
        generate_kwargs: for `model.generate_actions` (`do_sample`, `temperature`, `top_k`, `decoding` ...).
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        embodiment: str | None = None,
        num_actions: int | None = None,
        entropy: bool = False,
        expected_value: bool = False,
        generate_kwargs: dict[str, Any] | None = None,
    ):
        self.model = model
        self.processor = processor
        self.robot = processor.get_embodiment(embodiment)
        self.num_actions = processor.num_actions if num_actions is None else num_actions
        if self.num_actions < 1:
            raise ValueError(f"num_actions is at least 1, not {self.num_actions}")
        self.entropy = entropy
        self.expected_value = expected_value
        self.generate_kwargs = dict(generate_kwargs or {})
        self._lock = threading.Lock()
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="worldvla-ahead")

    def predict(self, requests: Sequence[ChunkRequest]) -> list[ActionChunk]:
        """A chunk for each request, all in one batch; their frames are tokenized where they were not yet."""
        ahead = requests[0].prefix if len(requests) == 1 else None
        prefix = None if ahead is None else ahead.result()
        with self._lock:
            inputs = self._inputs(requests)
            if prefix is not None and not prefix.matches(inputs["input_ids"], inputs["attention_mask"]):
                prefix = None
            answer = self.model.generate_actions(
                **inputs,
                num_actions=self.num_actions,
                action_dim=self.robot.action_dim,
                return_dict_in_generate=True,
                prefix=prefix,
                **self.generate_kwargs,
            )
            actions = self.processor.decode_actions(answer.sequences, self.robot.name)  # (batch, K, D)
            entropies: Sequence[np.ndarray | None] = [None] * len(requests)
            if self.entropy or self.expected_value:
                logprobs = self._distribution(inputs, answer.sequences)  # (batch, K, D, 256)
                if self.entropy:
                    entropies = -(np.exp(logprobs) * logprobs).sum(-1)
                if self.expected_value:
                    actions = self._expected_actions(np.exp(logprobs))
        chosen = answer.logprobs.double().cpu().numpy()
        return [
            ActionChunk(actions[row], chosen[row], entropies[row], len(request.frames))
            for row, request in enumerate(requests)
        ]

    def prepare(self, request: ChunkRequest) -> "Future[Any]":
        """Run the prompt of the next plan as far as its frames are known, in a thread; returns at once.

        `request` holds the frames up to now; the plan will show one more. The result is for `ChunkRequest.prefix`, and
        is not used where the plan turns out otherwise.
        """
        older = request.frames[-(self.processor.history - 1) :] if self.processor.history > 1 else []
        return self._ahead.submit(self._prefill, ChunkRequest(older, request.instruction))

    def _prefill(self, request: ChunkRequest) -> Any:
        if not request.frames:  # the checkpoint sees one frame: nothing is known yet
            return None
        with self._lock:
            return self.model.prefill_actions(**self._inputs([request]))

    def surprise(self, before: Frame, action: np.ndarray, after: Frame) -> float:
        """How unexpected a frame is after an action: nats for each image token, under the world model.

        The mean of -log p(code) over the codes of `after`, each given those before it, restricted to the image codes;
        log(number of codes) for a model that knows nothing.
        """
        with self._lock:
            self._tokenize([before, after])
            sample = self.processor(
                image_tokens=_codes(before),
                actions=np.asarray(action)[None],
                target_image_tokens=_codes(after),
                embodiment=self.robot.name,
            ).to(self.model.device)
            ids, labels = sample["input_ids"], sample["labels"]
            codes = torch.tensor(self.processor.tokens.image_codes, device=ids.device)
            free = torch.isin(labels[:, 1:], codes)  # the position before each code
            logprobs = self._legal_logprobs(sample, free, codes)  # (codes, legal)
            chosen = (labels[:, 1:][free][:, None] == codes).int().argmax(-1)
            return -float(logprobs.gather(-1, chosen[:, None]).mean())

    def imagine(self, frame: Frame, actions: np.ndarray, **kwargs: Any) -> list[Any]:
        """Frames that the world model expects after `frame` under actions (T, D): see `model.imagine`."""
        with self._lock:
            pictures = list(frame.pictures)
            return self.model.imagine(
                self.processor,
                image=pictures if len(pictures) > 1 else pictures[0],
                actions=actions,
                embodiment=self.robot.name,
                **kwargs,
            )

    # ---------------------------------------------------------------- helpers

    def _inputs(self, requests: Sequence[ChunkRequest]) -> Any:
        """The prompts of some requests on the model's device; frames are tokenized where they were not yet."""
        self._tokenize([frame for request in requests for frame in request.frames])
        return self.processor(
            image_tokens=[[codes for frame in request.frames for codes in _codes(frame)] for request in requests],
            instruction=[request.instruction for request in requests],
            embodiment=self.robot.name,
        ).to(self.model.device)

    def _tokenize(self, frames: Sequence[Frame]) -> None:
        """Give every frame its codes; pictures of one size go through the image tokenizer together."""
        fresh = list({id(frame): frame for frame in frames if frame.codes is None}.values())
        pixels = [self.processor.image_processor.pixels(picture) for frame in fresh for picture in frame.pictures]
        codes: list[Any] = [None] * len(pixels)
        for shape in {image.shape for image in pixels}:
            members = [index for index, image in enumerate(pixels) if image.shape == shape]
            ids = self.model.tokenize_images(torch.from_numpy(np.stack([pixels[index] for index in members])))
            for index, grid in zip(members, ids.cpu().numpy(), strict=True):
                codes[index] = grid
        remaining = iter(codes)
        for frame in fresh:
            frame.codes = [next(remaining) for _ in frame.pictures]

    def _distribution(self, inputs: Any, sequences: torch.Tensor) -> np.ndarray:
        """Log-probabilities of the 256 bins (batch, K, D, 256) that each bin was chosen from, before temperature."""
        tokens = self.processor.tokens
        batch, count, dim = sequences.shape
        answers = torch.tensor(
            [[token for action in row for token in tokens.action_block(action)] for row in sequences.tolist()],
            device=inputs["input_ids"].device,
        )
        ids = torch.cat([inputs["input_ids"], answers], dim=-1)
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(answers)], dim=-1)
        bins = torch.tensor(tokens.action_bins, device=ids.device)
        slots = torch.isin(ids[:, 1:], bins) & tokens.answer_mask(ids)[:, 1:]
        logprobs = self._legal_logprobs({"input_ids": ids, "attention_mask": mask}, slots, bins)
        return logprobs.view(batch, count, dim, len(bins)).double().cpu().numpy()

    @torch.inference_mode()
    def _legal_logprobs(self, inputs: Any, slots: torch.Tensor, legal: torch.Tensor) -> torch.Tensor:
        """Log-probabilities over `legal` ids for the tokens after the positions `slots` (batch, length - 1)."""
        hidden = self.model.model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
        ).last_hidden_state
        return self.model.lm_head(hidden[:, :-1][slots])[:, legal].float().log_softmax(-1)

    def _expected_actions(self, probabilities: np.ndarray) -> np.ndarray:
        """Mean of the bins' centres (batch, K, D) in robot units, under probabilities (batch, K, D, 256)."""
        low, high = np.array(self.robot.low), np.array(self.robot.high)
        return denormalize(probabilities @ bin_centers(np.arange(probabilities.shape[-1])), low, high)


def _codes(frame: Frame) -> list[np.ndarray]:
    if frame.codes is None:
        raise RuntimeError("the frame is not tokenized")
    return frame.codes
