"""Decoding: actions in parallel, frames under a forced format, rollouts of the world model.

Everything here is exact. Parallel decoding of actions gives the tokens of sequential decoding because `independent`
attention hides action blocks from one another; forced tokens are those the format leaves no choice about; drafts are
verified. Every call starts from an empty cache and remembers nothing. The format itself is asked of `tokens_worldvla`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.utils import ModelOutput, logging

if TYPE_CHECKING:
    from PIL import Image

logger = logging.get_logger(__name__)


@dataclass
class WorldVLAGenerateOutput(ModelOutput):
    """`sequences` as returned without `return_dict_in_generate`, and `logprobs` of the same shape: each chosen token's
    log-probability under the model restricted to the ids that are legal there (0 for forced tokens)."""

    sequences: torch.LongTensor | None = None
    logprobs: torch.FloatTensor | None = None


class DecodingCache:
    """A key-value cache, the position of each row and which columns a new token may see.

    Rows may be left-padded and may advance at different speeds: a column that a row rejected stays, unseen.
    """

    def __init__(self, model: Any, attention_mask: torch.Tensor, implementation: str, capacity: int):
        if implementation not in ("dynamic", "static"):
            raise ValueError(f'cache_implementation is "dynamic" or "static", not {implementation!r}')
        if implementation == "static" and model.config._attn_implementation == "flex_attention":
            raise ValueError('flex_attention does not work with a static cache: use cache_implementation="dynamic"')
        self.model = model
        self.prompt_mask = attention_mask.bool()  # (batch, prompt)
        self.prompt_length = self.prompt_mask.sum(-1)  # (batch,)
        self.capacity = capacity if implementation == "static" else None
        self.cache = (
            StaticCache(config=model.config, max_cache_len=capacity)
            if implementation == "static"
            else DynamicCache(config=model.config)
        )

    def prefill(
        self, input_ids: torch.LongTensor, appended: torch.LongTensor, apart: bool, stride: int
    ) -> torch.Tensor:
        """Run prompt (batch, P) and appended ids (batch, q); returns the hidden states of the appended ones.

        `apart`: the appended ids do not see one another and lie `stride` positions apart; else they follow causally.
        """
        batch, prompt = input_ids.shape
        count = appended.shape[1]
        device = input_ids.device
        causal = torch.ones(prompt + count, prompt + count, dtype=torch.bool, device=device).tril()
        if apart:
            causal[prompt:, prompt:] = torch.eye(count, dtype=torch.bool, device=device)
        keys = torch.cat([self.prompt_mask, self.prompt_mask.new_ones(batch, count)], dim=-1)
        # padding sees itself, so that no row of the softmax is empty
        visible = (causal & keys[:, None]) | torch.eye(prompt + count, dtype=torch.bool, device=device)
        positions = (self.prompt_mask.long().cumsum(-1) - 1).clamp(min=0)
        after = self.prompt_length[:, None] + torch.arange(count, device=device) * stride
        hidden = self.feed(torch.cat([input_ids, appended], -1), torch.cat([positions, after], -1), visible)
        return hidden[:, hidden.shape[1] - max(count, 1) :]

    def feed(self, ids: torch.LongTensor, positions: torch.LongTensor, visible: torch.BoolTensor) -> torch.Tensor:
        """ids, positions (batch, q); visible (batch, q, columns so far + q) -> hidden states (batch, q, hidden)."""
        if self.capacity is not None:
            visible = torch.nn.functional.pad(visible, (0, self.capacity - visible.shape[-1]), value=False)
        outputs = self.model.model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=_attention_form(visible[:, None], self.model),
            past_key_values=self.cache,
            use_cache=True,
        )
        return outputs.last_hidden_state

    def repeat(self, times: int) -> None:
        """Every row `times` times, next to one another."""
        self.cache.batch_repeat_interleave(times)
        self.prompt_mask = self.prompt_mask.repeat_interleave(times, 0)
        self.prompt_length = self.prompt_length.repeat_interleave(times, 0)


def _attention_form(visible: torch.BoolTensor, model: Any) -> Any:
    """(batch, 1, queries, keys) True = visible, in the form that the attention implementation takes."""
    implementation = model.config._attn_implementation
    if implementation == "eager":
        return torch.zeros_like(visible, dtype=model.dtype).masked_fill_(~visible, torch.finfo(model.dtype).min)
    if implementation == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        batch, _, queries, keys = visible.shape
        return create_block_mask(
            lambda b, h, q, k: visible[b, 0, q, k], B=batch, H=None, Q_LEN=queries, KV_LEN=keys, device=visible.device
        )
    if "flash" in implementation:
        raise ValueError(f'{implementation} takes no mask: load the model with attn_implementation="sdpa" to generate')
    return visible


class Sampler:
    """Chooses among legal ids: the head is applied to their rows only."""

    def __init__(
        self,
        lm_head: torch.nn.Module,
        legal_ids: Sequence[int],
        do_sample: bool,
        temperature: float,
        top_k: int | None,
        generator: torch.Generator | None,
    ):
        if do_sample and temperature <= 0:
            raise ValueError(f"temperature is positive, not {temperature}: use do_sample=False for greedy decoding")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k is at least 1, not {top_k}: leave it out to sample from all legal tokens")
        self.lm_head = lm_head
        self.ids = torch.tensor(legal_ids, device=next(lm_head.parameters()).device)
        # a wrapped head (adapter, quantised) has no plain rows: apply it whole, then slice
        self.rows = lm_head.weight[self.ids] if type(lm_head) is torch.nn.Linear else None
        self.do_sample, self.temperature, self.top_k, self.generator = do_sample, temperature, top_k, generator

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., hidden) -> (..., legal ids) in float32."""
        logits = self.lm_head(hidden)[..., self.ids] if self.rows is None else hidden @ self.rows.T
        return logits.float()

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """The distribution that is sampled from: after temperature and top-k."""
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            threshold = logits.topk(self.top_k, dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < threshold, -torch.inf)
        return logits.softmax(-1)

    def draw(self, probabilities: torch.Tensor) -> torch.LongTensor:
        """One index from each distribution: (..., legal ids) -> (...)."""
        flat = probabilities.reshape(-1, probabilities.shape[-1])
        return torch.multinomial(flat, 1, generator=self.generator).view(probabilities.shape[:-1])

    def __call__(self, hidden: torch.Tensor) -> tuple[torch.LongTensor, torch.Tensor]:
        """(..., hidden) -> chosen ids (...) and their log-probabilities (...)."""
        logits = self.logits(hidden)
        choice = self.draw(self.probabilities(logits)) if self.do_sample else logits.argmax(-1)
        return self.ids[choice], logits.log_softmax(-1).gather(-1, choice[..., None])[..., 0]


class WorldVLAGenerationMixin:
    """`generate_actions`, `generate_frames` and `imagine` of `WorldVLAForCausalLM`."""

    # what the model class brings
    config: Any
    model: Any
    lm_head: Any
    device: Any

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
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        num_return_sequences: int = 1,
        return_dict_in_generate: bool = False,
        cache_implementation: str = "dynamic",
        generator: torch.Generator | None = None,
    ) -> torch.LongTensor | WorldVLAGenerateOutput:
        """Answer an action prompt with exactly `num_actions` actions of legal bins.

        Returns bin token ids (batch x num_return_sequences, num_actions, action_dim) for `processor.decode_actions`.

        `parallel`: the prefill carries the start tokens of all K blocks, then D - 1 steps of K tokens follow: D
        forwards. `sequential`: token by token, (D + 2) K + 1 forwards, the same tokens. Under `causal` attention blocks
        do see one another, so both names decode sequentially.
        """
        config, tokens = self.config, self.model.tokens
        action_dim = config.action_dim if action_dim is None else action_dim
        if action_dim is None:
            raise ValueError(
                "the checkpoint's embodiments differ in their number of action dimensions: pass action_dim="
            )
        if num_actions < 1 or action_dim < 1:
            raise ValueError(f"num_actions and action_dim are at least 1, not {num_actions} and {action_dim}")
        if decoding not in ("parallel", "sequential"):
            raise ValueError(f'decoding is "parallel" or "sequential", not {decoding!r}')
        if num_return_sequences < 1:
            raise ValueError(f"num_return_sequences is at least 1, not {num_return_sequences}")
        if num_return_sequences > 1 and not do_sample:
            raise ValueError("num_return_sequences > 1 needs do_sample=True: greedy decoding has one answer")
        independent = config.action_attention == "independent"
        input_ids, attention_mask = self._prompt(input_ids, attention_mask, pixel_values)
        if cache_implementation == "static" and num_return_sequences > 1:
            input_ids = input_ids.repeat_interleave(num_return_sequences, 0)
            attention_mask = attention_mask.repeat_interleave(num_return_sequences, 0)
        block = tokens.action_block_length(action_dim)
        capacity = input_ids.shape[1] + num_actions * block
        cache = DecodingCache(self, attention_mask, cache_implementation, capacity)
        sampler = Sampler(self.lm_head, tokens.action_bins, do_sample, temperature, top_k, generator)
        repeat = num_return_sequences if cache_implementation == "dynamic" else 1
        if decoding == "parallel" and independent:
            chosen = _actions_in_parallel(cache, sampler, input_ids, tokens, num_actions, action_dim, repeat)
        else:
            chosen = _actions_in_sequence(
                cache, sampler, input_ids, tokens, num_actions, action_dim, repeat, independent=independent
            )
        return WorldVLAGenerateOutput(*chosen) if return_dict_in_generate else chosen[0]

    @torch.inference_mode()
    def generate_frames(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        *,
        num_frames: int = 1,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        draft: str | None = None,
        draft_window: int = 16,
        return_dict_in_generate: bool = False,
        cache_implementation: str = "dynamic",
        generator: torch.Generator | None = None,
    ) -> torch.LongTensor | WorldVLAGenerateOutput:
        """Answer a world-model or video prompt with whole image blocks, as large as the prompt's last images.

        Returns token ids (batch, num_frames x cameras, block length), each block from <boi> to <eoi>.

        `draft="previous"` proposes the codes of the newest frame and verifies `draft_window` of them a forward: the
        greedy answer and the distribution of sampled ones stay what they are. `num_frames` > 1 only for video prompts.
        """
        tokens = self.model.tokens
        if draft not in (None, "previous"):
            raise ValueError(f'draft is "previous" or None, not {draft!r}')
        if num_frames < 1 or draft_window < 1:
            raise ValueError(f"num_frames and draft_window are at least 1, not {num_frames} and {draft_window}")
        input_ids, attention_mask = self._prompt(input_ids, attention_mask, pixel_values)
        previous = self._newest_frames(input_ids, num_frames)  # (batch, cameras, block)
        batch, cameras, length = previous.shape
        template = tokens.image_block_layout(
            tokens.grid_codes(int(previous[0, 0, 1])), tokens.grid_codes(int(previous[0, 0, 2]))
        )
        layout = torch.tensor(template * (cameras * num_frames), device=input_ids.device)  # -1 where a code is free
        # a rejected draft stays in the cache; each window decides one token at least
        capacity = input_ids.shape[1] + len(layout) * (1 if draft is None else draft_window)
        cache = DecodingCache(self, attention_mask, cache_implementation, capacity)
        sampler = Sampler(self.lm_head, tokens.image_codes, do_sample, temperature, top_k, generator)
        if draft is None:
            ids, logprobs = _frames_step_by_step(cache, sampler, input_ids, layout)
        else:
            proposal = previous.repeat(1, num_frames, 1).flatten(1)  # (batch, length of the answer)
            ids, logprobs = _frames_from_draft(cache, sampler, input_ids, layout, proposal, draft_window)
        shape = (batch, cameras * num_frames, length)
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
            image: the first frame (a list of C with several cameras); with a batch of plans a list of first frames.
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
        firsts = list(image) if batched else [image]
        if len(firsts) != len(plans):
            raise ValueError(f"{len(firsts)} first frames for {len(plans)} plans: pass one each")
        frames = [list(first) if isinstance(first, list | tuple) else [first] for first in firsts]
        cameras = len(frames[0])
        # (frame tokens of one time step, newest last) for each plan
        history = [[self._tokenize(processor, step)] for step in frames]
        rollouts: list[list[Any]] = [[] for _ in plans]
        for time in range(plans.shape[1]):
            first = max(0, time + 1 - num_history)
            inputs = processor(
                image_tokens=[[tokens for step in steps for tokens in step] for steps in history],
                actions=[plan[first : time + 1] for plan in plans],
                **({} if embodiment is None else {"embodiment": [embodiment] * len(plans)}),
            )
            ids = self.generate_frames(**inputs.to(self.device), **generate_kwargs)
            pictures = processor.decode_frames(ids, self)
            for row, steps in enumerate(history):
                rollouts[row].append(pictures[row] if cameras > 1 else pictures[row][0])
                steps.append(self._tokenize(processor, pictures[row]) if feedback == "pixels" else list(ids[row]))
                del steps[:-num_history]
        return rollouts if batched else rollouts[0]

    # ---------------------------------------------------------------- helpers

    def _tokenize(self, processor: Any, pictures: list[Any]) -> list[torch.Tensor]:
        """Code ids (h, w) of each picture of one time step."""
        pixels = [processor.image_processor(images=[one], return_tensors="pt")["pixel_values"] for one in pictures]
        return [self.model.tokenize_images(one)[0] for one in pixels]

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


def _actions_in_parallel(
    cache: DecodingCache, sampler: Sampler, input_ids: torch.LongTensor, tokens: Any, count: int, dim: int, repeat: int
) -> tuple[torch.LongTensor, torch.Tensor]:
    """All blocks at once: one forward a dimension. Returns ids and log-probabilities (rows, count, dim)."""
    stride = tokens.action_block_length(dim)
    starts = torch.full((len(input_ids), count), tokens.action_start, device=input_ids.device)
    hidden = cache.prefill(input_ids, starts, apart=True, stride=stride)  # (batch, count, hidden)
    if repeat > 1:
        hidden = hidden.repeat_interleave(repeat, 0)
        cache.repeat(repeat)
    own = torch.eye(count, dtype=torch.bool, device=input_ids.device)[None].expand(len(hidden), -1, -1)
    visible = torch.cat([cache.prompt_mask[:, None].expand(-1, count, -1), own], dim=-1)  # (rows, count, columns)
    first = cache.prompt_length[:, None] + torch.arange(count, device=input_ids.device) * stride
    chosen = [sampler(hidden)]
    for step in range(1, dim):
        visible = torch.cat([visible, own], dim=-1)
        chosen.append(sampler(cache.feed(chosen[-1][0], first + step, visible)))
    ids, logprobs = zip(*chosen, strict=True)
    return torch.stack(ids, dim=-1), torch.stack(logprobs, dim=-1)


def _actions_in_sequence(
    cache: DecodingCache,
    sampler: Sampler,
    input_ids: torch.LongTensor,
    tokens: Any,
    count: int,
    dim: int,
    repeat: int,
    independent: bool,
) -> tuple[torch.LongTensor, torch.Tensor]:
    """One token a forward, as the authors decode. Returns ids and log-probabilities (rows, count, dim)."""
    cache.prefill(input_ids, input_ids[:, :0], apart=False, stride=1)
    if repeat > 1:
        cache.repeat(repeat)
    rows, device = len(cache.prompt_mask), input_ids.device
    position = cache.prompt_length[:, None]
    visible = cache.prompt_mask[:, None]  # (rows, 1, columns)
    chosen = []
    for _ in range(count):
        if independent:  # earlier blocks are hidden
            earlier = torch.zeros_like(visible[..., cache.prompt_mask.shape[1] :])
            visible = torch.cat([cache.prompt_mask[:, None], earlier], dim=-1)
        token = torch.full((rows, 1), tokens.action_start, device=device)
        for index in range(dim + 2):
            visible = torch.cat([visible, visible.new_ones(rows, 1, 1)], dim=-1)
            hidden = cache.feed(token, position, visible)
            position = position + 1
            if index < dim:
                chosen.append(sampler(hidden[:, 0]))
                token = chosen[-1][0][:, None]
            else:
                token = torch.full((rows, 1), tokens.action_end, device=device)
    ids, logprobs = zip(*chosen, strict=True)
    return torch.stack(ids, dim=-1).view(rows, count, dim), torch.stack(logprobs, dim=-1).view(rows, count, dim)


def _frames_step_by_step(
    cache: DecodingCache, sampler: Sampler, input_ids: torch.LongTensor, layout: torch.LongTensor
) -> tuple[torch.LongTensor, torch.Tensor]:
    """One code a forward; forced tokens ride along with the code before them. Returns (batch, length) twice."""
    answer = layout.expand(len(input_ids), -1).clone()
    logprobs = torch.zeros(answer.shape, device=answer.device)
    free = (layout < 0).nonzero()[:, 0].tolist()
    hidden = cache.prefill(input_ids, answer[:, : free[0]], apart=False, stride=1)[:, -1]
    columns = torch.cat([cache.prompt_mask, cache.prompt_mask.new_ones(answer.shape)], dim=-1)
    prompt = input_ids.shape[1]
    for slot, following in zip(free, [*free[1:], None], strict=True):
        answer[:, slot], logprobs[:, slot] = sampler(hidden)
        if following is None:
            break
        width = following - slot
        steps = torch.arange(slot, following, device=answer.device)
        causal = torch.ones(width, width, dtype=torch.bool, device=answer.device).tril()
        seen = columns[:, None, : prompt + slot].expand(-1, width, -1)
        visible = torch.cat([seen, causal.expand(len(answer), -1, -1)], dim=-1)
        hidden = cache.feed(answer[:, slot:following], cache.prompt_length[:, None] + steps, visible)[:, -1]
    return answer, logprobs


def _frames_from_draft(
    cache: DecodingCache,
    sampler: Sampler,
    input_ids: torch.LongTensor,
    layout: torch.LongTensor,
    draft: torch.LongTensor,
    window: int,
) -> tuple[torch.LongTensor, torch.Tensor]:
    """Verify `window` tokens of a draft a forward and keep the accepted ones; each row advances at its own pace.

    Greedy: a drafted token is kept when it is the arg max. Sampled: it is kept with its probability p, else another
    token is drawn from the rest of the distribution (speculative sampling with a deterministic draft), so answers keep
    theirs.
    """
    batch, length = len(input_ids), len(layout)
    device = input_ids.device
    answer = torch.where(layout < 0, draft, layout)  # forced tokens are right from the start
    logprobs = torch.zeros(answer.shape, device=device)
    index_of = torch.full((int(max(sampler.ids.max(), answer.max())) + 1,), 0, device=device)
    index_of[sampler.ids] = torch.arange(len(sampler.ids), device=device)
    free_slots = (layout < 0).nonzero()[:, 0].tolist()
    lead, last = free_slots[0], free_slots[-1]
    hidden = cache.prefill(input_ids, answer[:, :lead], apart=False, stride=1)[:, -1:]
    seen = torch.cat([cache.prompt_mask, cache.prompt_mask.new_ones(batch, lead)], dim=-1)  # (batch, columns)
    fed = torch.full((batch,), lead, device=device)  # tokens of the answer whose keys are in the cache, all decided
    offsets = torch.arange(window, device=device)
    causal = torch.ones(window, window, dtype=torch.bool, device=device).tril()
    while True:
        # `hidden` (batch, q, hidden) predicts the tokens fed - q + 1 .. fed of each row
        width = hidden.shape[1]
        slots = fed[:, None] - width + 1 + torch.arange(width, device=device)
        inside = (slots < length) & (slots >= 0)
        slots = slots.clamp(0, length - 1)
        free = (layout[slots] < 0) & inside
        proposed = answer.gather(1, slots)
        logits = sampler.logits(hidden)
        candidate = index_of[proposed]
        if sampler.do_sample:
            probabilities = sampler.probabilities(logits)
            chance = probabilities.gather(-1, candidate[..., None])[..., 0]
            uniform = torch.rand(chance.shape, device=device, generator=sampler.generator)
            kept = uniform < chance
            rest = probabilities.scatter(-1, candidate[..., None], 0.0)
            rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, probabilities)
            choice = torch.where(kept, candidate, sampler.draw(rest))
        else:
            choice = logits.argmax(-1)
            kept = choice == candidate
        kept = kept | ~free
        first_miss = torch.where(kept.all(-1), width, (~kept).int().argmax(-1))  # (batch,)
        decided = torch.arange(width, device=device) <= first_miss[:, None]
        write = free & decided
        chosen_log = logits.log_softmax(-1).gather(-1, choice[..., None])[..., 0]
        answer = answer.scatter(1, slots, torch.where(write, sampler.ids[choice], proposed))
        logprobs = logprobs.scatter(1, slots, torch.where(write, chosen_log, logprobs.gather(1, slots)))
        # inputs up to and including the one that predicted the first miss were right
        fresh = torch.minimum(first_miss + 1, torch.tensor(width, device=device))
        fed = fed - width + fresh
        if seen.shape[1] > cache.prompt_mask.shape[1] + lead:
            right = torch.arange(width, device=device) < fresh[:, None]
            seen = torch.cat([seen[:, :-width], right], dim=-1)
        if bool((fed >= last).all()):
            return answer, logprobs
        slots = fed[:, None] + offsets
        ids = answer.gather(1, slots.clamp(max=length - 1))
        visible = torch.cat([seen[:, None].expand(-1, window, -1), causal.expand(batch, -1, -1)], dim=-1)
        hidden = cache.feed(ids, cache.prompt_length[:, None] + slots, visible)
        fed = fed + window
        seen = torch.cat([seen, seen.new_ones(batch, window)], dim=-1)
