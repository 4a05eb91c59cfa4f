"""What the model does: `generate_actions`, `generate_frames`, `imagine`, and what makes them fast.

Every call starts from an empty cache and remembers nothing. How answers are decoded is `decoding_worldvla`, the format
is asked of `tokens_worldvla`.

A fast control loop
-------------------
Nothing here changes an answer beyond the rounding of sums.

    model.enable_engine()                                   # once: fused, compiled, CUDA graphs (no effect on a CPU)
    model.warm_up(inputs["input_ids"].shape[1], num_actions=5)

    # each frame is tokenized once in its life; cameras in one call
    codes = model.tokenize_images(pixels)                   # (n, h, w) token ids, one row a camera or frame
    # while the robot executes the last action of a chunk: the older frame of the next prompt is already known
    prefix = model.prefill_actions(**processor(image_tokens=[codes_older], instruction=text))
    # when the newest frame arrives, only that frame is left to run before the first action token
    inputs = processor(image_tokens=[codes_older, codes_newest], instruction=text)
    actions = model.generate_actions(**inputs, num_actions=5, prefix=prefix)

`prefix.matches(input_ids, attention_mask)` tells whether a prompt continues it; `generate_actions` raises ValueError on
one that does not. A prefix may be used many times, and one of a single row serves a batch (planning: one frame, many
candidate plans), also in `generate_frames`; `imagine` makes its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.utils import ModelOutput

from .cache_worldvla import DecodingCache, Prefix
from .decoding_worldvla import (
    Sampler,
    actions_in_parallel,
    actions_in_sequence,
    frames_from_draft,
    frames_step_by_step,
)
from .engine_worldvla import Engine, EngineOptions

if TYPE_CHECKING:
    from PIL import Image


@dataclass
class WorldVLAGenerateOutput(ModelOutput):
    """`sequences` as returned without `return_dict_in_generate`, and `logprobs` of the same shape: each chosen token's
    log-probability under the model restricted to the ids that are legal there (0 for forced tokens); with a bin window
    that of the range that a bin is the middle of."""

    sequences: torch.LongTensor | None = None
    logprobs: torch.FloatTensor | None = None


class WorldVLAGenerationMixin:
    """`generate_actions`, `generate_frames`, `imagine` and the engine of `WorldVLAForCausalLM`."""

    # what the model class brings
    config: Any
    model: Any
    lm_head: Any
    device: Any

    engine: Engine | None = None

    # ---------------------------------------------------------------- actions

    @torch.inference_mode()
    def generate_actions(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        *,
        num_actions: int,
        action_dim: int | None = None,
        decoding: str = "parallel",
        prefix: Prefix | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        num_return_sequences: int = 1,
        return_dict_in_generate: bool = False,
        cache_implementation: str | None = None,
        generator: torch.Generator | None = None,
        bin_window: int | None = None,
    ) -> torch.LongTensor | WorldVLAGenerateOutput:
        """Answer an action prompt with exactly `num_actions` actions of legal bins.

        Returns bin token ids (batch x num_return_sequences, num_actions, action_dim) for `processor.decode_actions`.

        `parallel`: the prefill carries the start tokens of all K blocks, then D - 1 steps of K tokens follow: D
        forwards. `sequential`: token by token, (D + 2) K + 1 forwards, the same tokens. Under `causal` attention blocks
        do see one another, so both names decode sequentially.

        `prefix` (of `prefill_actions`): the beginning of the prompt, already computed. `cache_implementation`:
        "dynamic" (attention reads the columns in use) or "static" (all columns: fixed shapes, the engine's).

        `bin_window` (the configuration's `action_bin_window` by default): without sampling, 0 chooses the likeliest
        bin, w the expected bin within the likeliest range of 2 w + 1.
        """
        action_dim = self._action_dim(action_dim)
        if num_actions < 1 or action_dim < 1:
            raise ValueError(f"num_actions and action_dim are at least 1, not {num_actions} and {action_dim}")
        if decoding not in ("parallel", "sequential"):
            raise ValueError(f'decoding is "parallel" or "sequential", not {decoding!r}')
        if num_return_sequences < 1:
            raise ValueError(f"num_return_sequences is at least 1, not {num_return_sequences}")
        if num_return_sequences > 1 and not do_sample:
            raise ValueError("num_return_sequences > 1 needs do_sample=True: greedy decoding has one answer")
        tokens = self.model.tokens
        independent = self.config.action_attention == "independent"
        in_parallel = decoding == "parallel" and independent
        input_ids, mask = self._prompt(input_ids, attention_mask, pixel_values)
        if prefix is not None:
            input_ids, mask = prefix.remainder(input_ids, mask)
        window = self.config.action_bin_window if bin_window is None else bin_window
        sampler = Sampler(self.lm_head, tokens.action_bins, do_sample, temperature, top_k, generator, window)
        engine = self._attached_engine()
        implementation = cache_implementation or ("dynamic" if engine is None else "static")
        answer = num_actions * tokens.action_block_length(action_dim)

        def decode(ids: torch.Tensor, mask: torch.Tensor, *prefilled: torch.Tensor) -> tuple[torch.Tensor, ...]:
            sampler.take_rows()
            known = prefix.holding(prefilled) if prefix is not None and prefilled else prefix
            cache = DecodingCache(self, mask, implementation, answer, known, engine)
            if in_parallel:
                return actions_in_parallel(cache, sampler, ids, tokens, num_actions, action_dim, num_return_sequences)
            return actions_in_sequence(
                cache, sampler, ids, tokens, num_actions, action_dim, independent, num_return_sequences
            )

        if engine is None or not engine.uses_graphs or do_sample or implementation == "dynamic":
            chosen = decode(input_ids, mask)
        else:
            ids, mask = engine.bucketed(input_ids, mask, tokens.pad)
            inputs = (ids, mask) if prefix is None else (ids, mask, *prefix.tensors())
            chosen = engine.replay(("actions", in_parallel, num_actions, action_dim, window), decode, *inputs)
        return WorldVLAGenerateOutput(*chosen) if return_dict_in_generate else chosen[0]

    @torch.inference_mode()
    def prefill_actions(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
    ) -> Prefix:
        """Run the beginning of a prompt ahead of time, for `generate_actions(prefix=...)`; lossless.

        Takes what the processor makes of the frames known so far and the instruction, `processor(images=[older],
        instruction=text)`, and keeps all of it but the separator: the full prompt of `[older, newest]` begins with it.
        """
        input_ids, mask = self._prompt(input_ids, attention_mask, pixel_values)
        return self._run_prefix(input_ids[:, :-1], mask[:, :-1])

    def _run_prefix(self, input_ids: torch.LongTensor, mask: torch.Tensor) -> Prefix:
        cache = DecodingCache(self, mask, "dynamic", 0, engine=self._attached_engine())
        cache.prefill(input_ids, input_ids[:, :0], apart=False, stride=1)
        return cache.as_prefix(input_ids)

    # ---------------------------------------------------------------- frames

    @torch.inference_mode()
    def generate_frames(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        *,
        num_frames: int = 1,
        prefix: Prefix | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        draft: str | torch.LongTensor | None = None,
        draft_window: int = 16,
        return_dict_in_generate: bool = False,
        cache_implementation: str | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.LongTensor | WorldVLAGenerateOutput:
        """Answer a world-model or video prompt with whole image blocks, as large as the prompt's last images.

        Returns token ids (batch, num_frames x cameras, block length), each block from `<boi>` to `<eoi>`.

        `draft="previous"` proposes the codes of the newest frame, a tensor of the answer's shape those of its own, and
        up to `draft_window` of them are verified a forward: the greedy answer and the distribution of sampled ones stay
        what they are. `num_frames` > 1 only for video prompts. `prefix` and `cache_implementation` as in
        `generate_actions`.
        """
        tokens = self.model.tokens
        if not (draft is None or isinstance(draft, torch.Tensor) or draft == "previous"):
            raise ValueError(f'draft is "previous" or None, not {draft!r}')
        if num_frames < 1 or draft_window < 1:
            raise ValueError(f"num_frames and draft_window are at least 1, not {num_frames} and {draft_window}")
        input_ids, mask = self._prompt(input_ids, attention_mask, pixel_values)
        previous = self._newest_frames(input_ids, num_frames)  # (batch, cameras, block)
        if prefix is not None:
            input_ids, mask = prefix.remainder(input_ids, mask)
        batch, cameras, length = previous.shape
        shape = (batch, cameras * num_frames, length)
        template = tokens.image_block_layout(
            tokens.grid_codes(int(previous[0, 0, 1])), tokens.grid_codes(int(previous[0, 0, 2]))
        )
        layout = torch.tensor(template * shape[1], device=input_ids.device)  # -1 where a code is free
        sampler = Sampler(self.lm_head, tokens.image_codes, do_sample, temperature, top_k, generator)
        engine = self._attached_engine()
        implementation = cache_implementation or ("dynamic" if engine is None else "static")
        keeps_store = engine is not None and implementation == "static"
        room = len(layout) + (0 if draft is None else draft_window)
        cache = DecodingCache(self, mask, implementation, room, prefix, engine, keeps_store)
        if draft is None:
            ids, logprobs = frames_step_by_step(cache, sampler, input_ids, layout)
        else:
            # (batch, length of the answer)
            proposal = (
                previous.repeat(1, num_frames, 1)
                if isinstance(draft, str)
                else self._own_draft(draft, shape).to(layout)
            )
            ids, logprobs = frames_from_draft(cache, sampler, input_ids, layout, proposal.flatten(1), draft_window)
        ids, logprobs = ids.view(shape), logprobs.view(shape)
        return WorldVLAGenerateOutput(ids, logprobs) if return_dict_in_generate else ids

    @torch.inference_mode()
    def imagine(
        self,
        processor: Any,
        image: Any,
        actions: np.ndarray,
        feedback: str = "tokens",
        num_history: int = 1,
        embodiment: str | None = None,
        **generate_kwargs: Any,
    ) -> list["Image.Image"] | list[list["Image.Image"]]:
        """Roll a plan out in the world model, frame by frame.

        Args:
            image: the first frame (a list of C with several cameras); with a batch of plans a list of first frames, or
                one picture that all plans start from. What the prompts of a batch begin with alike runs once.
            actions: (T, D) in robot units, or (B, T, D).
            feedback: `tokens` feeds the generated ids back; `pixels` decodes and encodes each frame again, as the
                evaluation of RynnVLA-002 does.
            num_history: how many (frame, action) pairs the prompt holds at most.
            generate_kwargs: for `generate_frames`, for example `draft="previous"`.

        Returns T PIL images (lists of C with several cameras), or a list of such lists for a batch.
        """
        actions = np.asarray(actions, dtype=np.float64)
        if actions.ndim not in (2, 3):
            raise ValueError(f"actions are (T, D) or (batch, T, D), not {actions.shape}")
        if feedback not in ("tokens", "pixels"):
            raise ValueError(f'feedback is "tokens" or "pixels", not {feedback!r}')
        if num_history < 1:
            raise ValueError(f"num_history is at least 1, not {num_history}")
        batched = actions.ndim == 3
        plans = actions if batched else actions[None]
        steps = self._first_frames(image, len(plans)) if batched else [_as_list(image)]
        cameras = len(steps[0])
        # (frame tokens of one time step, newest last) for each plan; one picture is tokenized once
        history = [[codes] for codes in self._tokenize(processor, steps)]
        rollouts: list[list[Any]] = [[] for _ in plans]
        for time in range(plans.shape[1]):
            first = max(0, time + 1 - num_history)
            inputs = processor(
                image_tokens=[[tokens for step in steps for tokens in step] for steps in history],
                actions=[plan[first : time + 1] for plan in plans],
                **({} if embodiment is None else {"embodiment": [embodiment] * len(plans)}),
            ).to(self.device)
            prefix = self._common_prefix(inputs["input_ids"], inputs["attention_mask"])
            ids = self.generate_frames(**inputs, prefix=prefix, **generate_kwargs)
            pictures = processor.decode_frames(ids, self)
            again = self._tokenize(processor, pictures) if feedback == "pixels" else [list(row) for row in ids]
            for row, frames in enumerate(history):
                rollouts[row].append(pictures[row] if cameras > 1 else pictures[row][0])
                frames.append(again[row])
                del frames[:-num_history]
        return rollouts if batched else rollouts[0]

    # ---------------------------------------------------------------- the engine

    def enable_engine(
        self,
        compile: bool = True,
        cuda_graphs: bool | None = None,
        fuse: bool = True,
        mode: str | None = None,
    ) -> None:
        """Decode with fused weights, compiled layers and CUDA graphs from now on; see `engine_worldvla`.

        Weights stay parameters of the same names and shapes: they load, save and train as before. On a CPU without
        `compile` this changes nothing: the modules run. Raises ValueError where the model has other layers than a
        WorldVLA checkpoint (an adapter that is not merged, layers on several devices).

        Args:
            cuda_graphs: None takes them on a CUDA device. They hold for greedy decoding; sampling runs without.
            mode: of `torch.compile`; "max-autotune-no-cudagraphs" tries more kernels and compiles for minutes.
        """
        engine = Engine(EngineOptions(compile, cuda_graphs, fuse, mode))
        if compile or self.device.type == "cuda":
            self.engine = engine.attach(self)
        if compile and self.device.type == "cuda":
            self.model.vqmodel.encoder.compile()

    def disable_engine(self) -> None:
        """Run the modules again."""
        self.engine = None

    @torch.inference_mode()
    def warm_up(
        self,
        prompt_length: int | Sequence[int],
        *,
        num_actions: int,
        action_dim: int | None = None,
        batch_size: int = 1,
    ) -> None:
        """Compile and capture everything that action prompts of these lengths (in tokens) need, before the first real
        one arrives. Harmless without an engine."""
        tokens = self.model.tokens
        for length in [prompt_length] if isinstance(prompt_length, int) else prompt_length:
            ids = torch.full((batch_size, length), tokens.bos, device=self.device)
            ids[:, -1] = tokens.separator
            mask = torch.ones_like(ids)
            self.generate_actions(ids, mask, num_actions=num_actions, action_dim=action_dim)

    def _attached_engine(self) -> Engine | None:
        return None if self.engine is None else self.engine.attach(self)

    # ---------------------------------------------------------------- helpers

    def _action_dim(self, action_dim: int | None) -> int:
        chosen = self.config.action_dim if action_dim is None else action_dim
        if chosen is None:
            raise ValueError(
                "the checkpoint's embodiments differ in their number of action dimensions: pass action_dim="
            )
        return chosen

    def _tokenize(self, processor: Any, steps: list[list[Any]]) -> list[list[torch.Tensor]]:
        """Code ids (h, w) of the pictures of each row; a picture that several rows share goes through once, pictures
        of one size together."""
        unique = {id(one): one for step in steps for one in step}
        pixels = {
            key: processor.image_processor(images=[one], return_tensors="pt")["pixel_values"]
            for key, one in unique.items()
        }
        codes: dict[int, torch.Tensor] = {}
        for size in {one.shape[-2:] for one in pixels.values()}:
            same = [key for key, one in pixels.items() if one.shape[-2:] == size]
            codes |= zip(same, self.model.tokenize_images(torch.cat([pixels[key] for key in same])), strict=True)
        return [[codes[id(one)] for one in step] for step in steps]

    @staticmethod
    def _first_frames(image: Any, num_plans: int) -> list[list[Any]]:
        """The pictures of each plan's first time step: from one for all, or one (a list of C) for each."""
        if not isinstance(image, list | tuple) and getattr(image, "ndim", 3) == 3:
            image = [image] * num_plans
        if len(image) != num_plans:
            raise ValueError(f"{len(image)} first frames for {num_plans} plans: pass one each, or one picture for all")
        return [_as_list(one) for one in image]

    def _common_prefix(self, input_ids: torch.LongTensor, mask: torch.Tensor) -> Prefix | None:
        """What the prompts of a batch begin with alike, run once, when there is an image in it."""
        rows = Prefix.rows(input_ids, mask)
        shortest, longest = min(rows), max(rows)  # in lexical order: what these two share, all do
        length = next((i for i, pair in enumerate(zip(shortest, longest, strict=False)) if pair[0] != pair[1]), 0)
        if len(rows) == 1 or self.model.tokens.image_end not in shortest[:length]:
            return None
        shared = torch.tensor([shortest[:length]], device=input_ids.device)
        return self._run_prefix(shared, torch.ones_like(shared))

    def _prompt(
        self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None, pixel_values: torch.Tensor | None
    ) -> tuple[torch.LongTensor, torch.Tensor]:
        """Prompt ids with image codes in place, and a mask of its own length."""
        input_ids = input_ids.to(self.device)
        if attention_mask is None:
            attention_mask = input_ids != self.model.tokens.pad
        attention_mask = attention_mask.to(self.device)
        if not bool((attention_mask[:, -1] != 0).all()):
            raise ValueError("pad prompts on the left: the last position of a row is padding")
        if bool((input_ids[:, -1] != self.model.tokens.separator).any()):
            raise ValueError("a prompt ends with the separator token: call the processor without targets to generate")
        if pixel_values is not None:
            input_ids, _ = self.model.fill_image_tokens(input_ids, pixel_values.to(self.device))
        return input_ids, attention_mask

    @staticmethod
    def _own_draft(draft: torch.LongTensor, shape: tuple[int, ...]) -> torch.LongTensor:
        if tuple(draft.shape) != shape:
            raise ValueError(f"a draft has the shape of the answer, {shape}, not {tuple(draft.shape)}")
        return draft

    def _newest_frames(self, input_ids: torch.LongTensor, num_frames: int) -> torch.LongTensor:
        """The image blocks of the newest time step in each prompt: (batch, cameras, block length)."""
        tokens = self.model.tokens
        newest = []
        for row in input_ids.tolist():
            starts = [index for index, token in enumerate(row) if token == tokens.image_start]
            num_actions = row.count(tokens.action_start)
            if not starts:
                raise ValueError("the prompt holds no image: pass images= or image_tokens= to the processor")
            if num_actions and num_frames > 1:
                raise ValueError("a world-model prompt answers with one frame: use model.imagine to roll a plan out")
            cameras = len(starts) // num_actions if num_actions else self.config.num_cameras
            blocks = [row[start : row.index(tokens.image_end, start) + 1] for start in starts[-cameras:]]
            newest.append(blocks)
        if len({(len(blocks), *(tuple(block[1:3]) for block in blocks)) for blocks in newest}) > 1:
            raise ValueError("prompts of one batch must ask for images of one size and number: generate them apart")
        if len({tuple(block[1:3]) for block in newest[0]}) > 1:
            raise ValueError("the cameras of a time step must have one image size: give the processor one target_size")
        return torch.tensor(newest, device=input_ids.device)


def _as_list(pictures: Any) -> list[Any]:
    return list(pictures) if isinstance(pictures, list | tuple) else [pictures]


__all__ = ["WorldVLAGenerateOutput", "WorldVLAGenerationMixin"]
