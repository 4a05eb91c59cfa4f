"""The arms: ways to decode the same answer. All of them run the same weights.

    A   as the authors decode: token by token, the mask of the whole history rebuilt in Python before every token (their
        `generate_att_mask_3`, of which the last row is used), the full head on every position of a forward. A stand-in
        for their code that does the same work, without the overhead of their `generate`.
    B1  transformers' `generate` with a dynamic cache.       B2  with a static cache (compiled where that is automatic).
    C   a tight sequential loop in the style of gpt-fast: static cache, one token a forward, full head on one position;
        compiled layers and CUDA graphs on a GPU.
    D   this library as it comes: on a GPU with the engine.

Ablations switch the techniques of D on in turn: `D-parallel` (parallel actions, full head, modules), `D-sliced` (only
the legal rows of the head), `D-compile` (fused weights, compiled layers), `D-graphs` (CUDA graphs). `D-overlap` has the
older frames and the text prefilled before the clock starts. `D-draft` verifies the previous frame's codes, `D-draft75`
a draft of which 75 % are right (any share). `D-int8`, `D-int4`, `D-fp8` store weights in fewer bits (torchao).
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import DynamicCache

from ..cache_worldvla import DecodingCache
from ..decoding_worldvla import actions_in_parallel
from ..engine_worldvla import Engine, EngineOptions
from .cases import ACTION_DIM, Case

ARMS = ("A", "B1", "B2", "C", "D", "D-parallel", "D-sliced", "D-compile", "D-graphs", "D-overlap", "D-draft")
QUANTISED = ("D-int8", "D-int4", "D-fp8")
_DRAFT = re.compile(r"D-draft(\d{1,3})")
CHUNK_ONLY = ("D-parallel", "D-overlap")

Answer = Callable[[], torch.LongTensor]


def known_arm(name: str, what: str) -> bool:
    """Is this an arm for `chunk` or `frame`?"""
    drafts = name == "D-draft" or (match := _DRAFT.fullmatch(name)) is not None and int(match[1]) <= 100
    if what == "chunk":
        return name in (*ARMS, *QUANTISED) and not drafts
    return (name in (*ARMS, *QUANTISED) and name not in CHUNK_ONLY) or drafts


class Arms:
    """Prepares arms for one model: `prepare` does what happens before the clock starts, its result is what is timed."""

    def __init__(self, model: Any):
        self.model, self.tokens = model, model.tokens
        on_gpu = model.device.type == "cuda"
        self.engines: dict[str, Engine | None] = {
            "C": Engine(EngineOptions()) if on_gpu else None,
            "D": Engine(EngineOptions()) if on_gpu else None,
            "D-compile": Engine(EngineOptions(cuda_graphs=False)),
            "D-graphs": Engine(EngineOptions(compile=False)) if on_gpu else None,
        }

    @torch.inference_mode()
    def prepare(self, arm: str, case: Case, ids: torch.LongTensor) -> Answer:
        """What decodes the prompts `ids` (batch, length): () -> answer (batch, K, D) or (batch, block length)."""
        self.model.engine = self._engine(arm)
        if arm in ("A", "C"):
            decode = self._authors if arm == "A" else self._sequential
            return lambda: self._free(decode(ids, case), case)
        if arm in ("B1", "B2"):
            return lambda: self._free(self._generate(ids, case, static=arm == "B2"), case)
        if case.what == "chunk":
            return self._chunk(arm, case, ids)
        return self._frame(arm, case, ids)

    def _engine(self, arm: str) -> Engine | None:
        if arm in ("A", "B1", "B2", "D-parallel", "D-sliced"):
            return None
        return self.engines.get(arm, self.engines["D"])

    def _free(self, answer: torch.LongTensor, case: Case) -> torch.LongTensor:
        """The part of a whole answer (batch, length) that `generate_actions` and `generate_frames` return."""
        body = answer[:, :-1]
        return body.view(len(body), case.actions, -1)[..., 1:-1] if case.what == "chunk" else body

    # ---------------------------------------------------------------- ours

    def _chunk(self, arm: str, case: Case, ids: torch.LongTensor) -> Answer:
        if arm == "D-parallel":
            return lambda: self._parallel_full_head(ids, case)
        prefix = None
        if arm == "D-overlap":
            newest = self.tokens.image_block_length(case.side, case.side)
            known = torch.cat([ids[:, : -1 - newest], ids[:, -1:]], dim=-1)  # the prompt of the frames before
            prefix = self.model.prefill_actions(known)
        return lambda: self.model.generate_actions(ids, num_actions=case.actions, prefix=prefix)

    def _frame(self, arm: str, case: Case, ids: torch.LongTensor) -> Answer:
        draft: Any = "previous" if arm == "D-draft" else None
        if match := _DRAFT.fullmatch(arm):
            draft = self.model.generate_frames(ids).clone()
            generator = torch.Generator().manual_seed(0)
            codes = torch.tensor(self.tokens.image_codes)
            other = codes[torch.randint(len(codes), draft.shape, generator=generator)].to(draft)
            wrong = torch.rand(draft.shape, generator=generator) >= int(match[1]) / 100
            draft = torch.where(wrong.to(draft.device) & torch.isin(draft, codes.to(draft)), other, draft)
        prefix = self.model._common_prefix(ids, torch.ones_like(ids)) if case.batch > 1 else None
        window = 32 if ids.device.type == "cuda" else 16
        return lambda: self.model.generate_frames(ids, draft=draft, draft_window=window, prefix=prefix)[:, 0]

    @torch.inference_mode()
    def _parallel_full_head(self, ids: torch.LongTensor, case: Case) -> torch.LongTensor:
        tokens = self.tokens
        legal = _mask_of(tokens.action_bins, self.model)
        room = case.actions * tokens.action_block_length(ACTION_DIM)
        cache = DecodingCache(self.model, torch.ones_like(ids), "static", room)

        def choose(hidden: torch.Tensor) -> tuple[torch.LongTensor, torch.Tensor]:
            scores = self.model.lm_head(hidden).float().masked_fill(~legal, -torch.inf)
            best = scores.argmax(-1)
            return best, best

        return actions_in_parallel(cache, choose, ids, tokens, case.actions, ACTION_DIM)[0]

    # ---------------------------------------------------------------- the others

    @torch.inference_mode()
    def _authors(self, ids: torch.LongTensor, case: Case) -> torch.LongTensor:
        """Batch 1, as their mask allows no other: rows one after another."""
        slots = [_mask_of(legal, self.model) for legal in _unique(case.answer(self.tokens))]
        order = _order(case.answer(self.tokens))
        answers = []
        for row in ids:
            history, new = row, row
            cache = DynamicCache(config=self.model.config)
            for place in order:
                mask = authors_mask(history, self.tokens)[-len(new) :]
                # every position of the forward goes through the whole head
                logits = self.model(new[None], attention_mask=mask[None, None], past_key_values=cache).logits.float()
                new = logits[:, -1].masked_fill(~slots[place], -torch.inf).argmax(-1)
                history = torch.cat([history, new])
            answers.append(history[len(row) :])
        return torch.stack(answers)

    @torch.inference_mode()
    def _sequential(self, ids: torch.LongTensor, case: Case) -> torch.LongTensor:
        slots = [_mask_of(legal, self.model) for legal in _unique(case.answer(self.tokens))]
        order = _order(case.answer(self.tokens))
        engine = self.model._attached_engine()
        mask, empty = torch.ones_like(ids), ids[:, :0]
        cache = DecodingCache(self.model, mask, "static", len(order), engine=engine, keeps_store=engine is not None)
        hidden = cache.prefill(ids, empty, apart=False, stride=1)
        columns = torch.arange(cache.store.capacity, device=ids.device)
        block = ACTION_DIM + 2 if case.what == "chunk" else len(order)
        answer = []
        for done, place in enumerate(order):
            logits = self.model.lm_head(hidden[:, -1]).float()
            answer.append(logits.masked_fill(~slots[place], -torch.inf).argmax(-1))
            if done + 1 == len(order):
                return torch.stack(answer, dim=-1)
            slot = cache.prompt + done
            first = cache.prompt + done // block * block  # earlier blocks are hidden
            seen = (columns < cache.prompt) | ((columns >= first) & (columns <= slot))
            place_now = torch.full((len(ids), 1), slot, device=ids.device)
            visible = seen.expand(len(ids), 1, -1)
            hidden = cache.feed(answer[-1][:, None], place_now, visible, place_now, cache.store.capacity)
        raise AssertionError("an answer ends with its separator")

    @torch.inference_mode()
    def _generate(self, ids: torch.LongTensor, case: Case, static: bool) -> torch.LongTensor:
        answer = case.answer(self.tokens)
        forced = ForcedFormat([_mask_of(legal, self.model) for legal in _unique(answer)], _order(answer), ids.shape[1])
        options = {"cache_implementation": "static"} if static else {}
        output = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            logits_processor=LogitsProcessorList([forced]),
            do_sample=False,
            max_new_tokens=len(answer),
            **options,
        )
        return output[:, ids.shape[1] :]


class ForcedFormat(LogitsProcessor):
    """Allows only what the format allows at each place of the answer."""

    def __init__(self, legal: list[torch.BoolTensor], order: list[int], prompt: int):
        self.legal, self.order, self.prompt = legal, order, prompt

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        return scores.masked_fill(~self.legal[self.order[input_ids.shape[1] - self.prompt]], -torch.inf)


def authors_mask(history: torch.LongTensor, tokens: Any) -> torch.BoolTensor:
    """Their `generate_att_mask_3` of a whole history (length,): (length, length), True = visible.

    Action blocks behind the last image do not see the action blocks before them; an open block lasts to the end.
    """
    length = len(history)
    mask = torch.tril(torch.ones(length, length, dtype=torch.bool, device=history.device))
    images = (history == tokens.image_end).nonzero()[:, 0].tolist()
    starts = (history == tokens.action_start).nonzero()[:, 0].tolist()
    ends = (history == tokens.action_end).nonzero()[:, 0].tolist()
    if len(ends) < len(starts):
        ends.append(length - 1)
    last_image = images[-1] if images else -1
    for index, (start, end) in enumerate(zip(starts, ends, strict=True)):
        if start < last_image:
            continue
        for earlier in range(index):
            mask[start : end + 1, starts[earlier] : ends[earlier] + 1] = False
    return mask


def _unique(answer: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    return list(dict.fromkeys(answer))


def _order(answer: list[tuple[int, ...]]) -> list[int]:
    index = {legal: place for place, legal in enumerate(_unique(answer))}
    return [index[legal] for legal in answer]


def _mask_of(legal: tuple[int, ...], model: Any) -> torch.BoolTensor:
    mask = torch.zeros(model.config.vocab_size, dtype=torch.bool, device=model.device)
    mask[torch.tensor(legal, device=model.device)] = True
    return mask
