"""How answers are decoded: actions in parallel or in sequence, frames step by step or from a draft.

Plain functions over a `DecodingCache` and a `Sampler`; the format is the caller's. Everything here is exact: parallel
decoding gives the tokens of sequential decoding because `independent` attention hides action blocks from one another,
forced tokens are those the format leaves no choice about, and drafts are verified.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.functional import avg_pool1d

from .cache_worldvla import DecodingCache

# hidden states (..., hidden) -> chosen ids (...) and their log-probabilities (...)
Choose = Callable[[torch.Tensor], tuple[torch.LongTensor, torch.Tensor]]


class Sampler:
    """Chooses among legal ids: the head is applied to their rows only."""

    def __init__(
        self,
        lm_head: torch.nn.Module,
        legal_ids: Sequence[int],
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
        window: int = 0,
    ):
        if do_sample and temperature <= 0:
            raise ValueError(f"temperature is positive, not {temperature}: use do_sample=False for greedy decoding")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k is at least 1, not {top_k}: leave it out to sample from all legal tokens")
        if window < 0:
            raise ValueError(f"a window of bins is at least 0, not {window}")
        self.lm_head = lm_head
        ids = sorted(legal_ids)
        self.adjacent = (ids[0], ids[-1] + 1) if ids[-1] - ids[0] == len(ids) - 1 else None
        self.ids = torch.tensor(ids, device=next(lm_head.parameters()).device)
        self.take_rows()
        self.do_sample, self.temperature, self.top_k, self.generator = do_sample, temperature, top_k, generator
        self.window = window
        if window:  # where the legal ids, in the order they were given, stand in `ids`
            self.places = torch.searchsorted(self.ids, self.ids.new_tensor(legal_ids))

    def take_rows(self) -> None:
        """The head's rows of the legal ids as they are now: (legal ids, hidden), a view where ids are adjacent, as in
        the published vocabulary. Part of a CUDA graph, so that it sees new weights."""
        self.rows = None
        # a wrapped head (adapter, quantised) has no plain rows: apply it whole, then slice
        if type(self.lm_head) is torch.nn.Linear and type(self.lm_head.weight.data) is torch.Tensor:
            weight = self.lm_head.weight
            self.rows = weight[self.ids] if self.adjacent is None else weight[slice(*self.adjacent)]

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

    def likeliest_range(self, logits: torch.Tensor) -> tuple[torch.LongTensor, torch.Tensor]:
        """The expected index within the likeliest `window` neighbours to either side, and that range's log-probability.

        (..., legal ids) -> (...) each. Neighbours are so in the order in which the legal ids were given.
        """
        probabilities = logits[..., self.places].softmax(-1).flatten(0, -2)[:, None]
        index = torch.arange(logits.shape[-1], device=logits.device, dtype=logits.dtype)
        both = torch.cat([probabilities, probabilities * index], dim=1)
        width = 2 * self.window + 1
        mass, moment = (avg_pool1d(both, width, stride=1, padding=self.window) * width).unbind(1)
        best = mass.argmax(-1, keepdim=True)
        most = mass.gather(-1, best)
        choice = (moment.gather(-1, best) / most).round().long()
        return self.places[choice].view(logits.shape[:-1]), most.clamp(max=1).log().view(logits.shape[:-1])

    def __call__(self, hidden: torch.Tensor) -> tuple[torch.LongTensor, torch.Tensor]:
        """(..., hidden) -> chosen ids (...) and their log-probabilities (...), with a window those of the ranges."""
        logits = self.logits(hidden)
        if self.window and not self.do_sample:
            choice, logprobs = self.likeliest_range(logits)
            return self.ids[choice], logprobs
        choice = self.draw(self.probabilities(logits)) if self.do_sample else logits.argmax(-1)
        return self.ids[choice], logits.log_softmax(-1).gather(-1, choice[..., None])[..., 0]


def actions_in_parallel(
    cache: DecodingCache,
    sampler: Choose,
    input_ids: torch.LongTensor,
    tokens: Any,
    count: int,
    dim: int,
    repeat: int = 1,
) -> tuple[torch.LongTensor, torch.Tensor]:
    """All blocks at once: one forward a dimension. Returns ids and log-probabilities (rows, count, dim).

    Nothing looks at a value on the host, so that the whole answer can be one CUDA graph.
    """
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


def actions_in_sequence(
    cache: DecodingCache,
    sampler: Choose,
    input_ids: torch.LongTensor,
    tokens: Any,
    count: int,
    dim: int,
    independent: bool,
    repeat: int = 1,
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
            earlier = torch.zeros_like(visible[..., cache.prompt :])
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


def frames_step_by_step(
    cache: DecodingCache, sampler: Sampler, input_ids: torch.LongTensor, layout: torch.LongTensor
) -> tuple[torch.LongTensor, torch.Tensor]:
    """One code a forward; forced tokens ride along with the code before them. `layout` (length,) is -1 where a code is
    free. Returns ids and log-probabilities (batch, length)."""
    answer = layout.expand(len(input_ids), -1).clone()
    logprobs = torch.zeros(answer.shape, device=answer.device)
    free = (layout < 0).nonzero()[:, 0].tolist()
    hidden = cache.prefill(input_ids, answer[:, : free[0]], apart=False, stride=1)[:, -1]
    places = torch.arange(len(layout), device=answer.device).expand_as(answer)
    for slot, following in zip(free, [*free[1:], None], strict=True):
        answer[:, slot], logprobs[:, slot] = sampler(hidden)
        if following is None:
            break
        hidden = cache.feed_answer(answer[:, slot:following], places[:, slot:following], filled=following)[:, -1]
    return answer, logprobs


def frames_from_draft(
    cache: DecodingCache,
    sampler: Sampler,
    input_ids: torch.LongTensor,
    layout: torch.LongTensor,
    draft: torch.LongTensor,
    window: int,
) -> tuple[torch.LongTensor, torch.Tensor]:
    """Verify up to `window` tokens of a draft (batch, length) a forward and keep the accepted ones.

    Greedy: a drafted token is kept when it is the arg max. Sampled: it is kept with its probability p, else another
    token is drawn from the rest of the distribution (speculative sampling with a deterministic draft, Leviathan et al.
    2023), so answers keep theirs. Each row advances at its own pace; rejected tokens are overwritten. The width
    follows the runs accepted so far, which says nothing of tokens still undecided and so changes no answer.
    """
    batch, length, device = len(input_ids), len(layout), input_ids.device
    answer = torch.where(layout < 0, draft, layout)  # forced tokens are right from the start
    logprobs = torch.zeros(answer.shape, device=device)
    index_of = torch.zeros(int(max(sampler.ids.max(), answer.max())) + 1, dtype=torch.long, device=device)
    index_of[sampler.ids] = torch.arange(len(sampler.ids), device=device)
    free_slots = (layout < 0).nonzero()[:, 0].tolist()
    lead, last = free_slots[0], free_slots[-1]
    hidden = cache.prefill(input_ids, answer[:, :lead], apart=False, stride=1)[:, -1:]
    fed = torch.full((batch,), lead - 1, device=device)  # slot of the first token of the newest forward, decided
    width, run = window, float(window)
    while True:
        # `hidden` (batch, q, hidden) of the tokens at fed .. fed + q - 1 predicts those at fed + 1 .. fed + q
        count = hidden.shape[1]
        slots = fed[:, None] + 1 + torch.arange(count, device=device)
        free = (layout[slots.clamp(max=length - 1)] < 0) & (slots < length)
        slots = slots.clamp(max=length - 1)
        proposed = answer.gather(1, slots)
        choice, kept, scores = verify(sampler, sampler.logits(hidden), index_of[proposed])
        kept = kept | ~free
        first_miss = torch.where(kept.all(-1), count, (~kept).int().argmax(-1))  # (batch,)
        write = free & (torch.arange(count, device=device) <= first_miss[:, None])
        answer = answer.scatter(1, slots, torch.where(write, sampler.ids[choice], proposed))
        logprobs = logprobs.scatter(1, slots, torch.where(write, scores, logprobs.gather(1, slots)))
        # a token is right when everything before it was kept
        fresh = torch.minimum(first_miss + 1, torch.tensor(count, device=device))
        fed = (fed + fresh).clamp(max=last)
        progress = list(zip(fed.tolist(), fresh.tolist(), strict=True))  # the one look at the device in a step
        if all(done >= last for done, _ in progress):
            return answer, logprobs
        if count > 1:
            runs = [new for done, new in progress if done < last]
            run = (run + sum(runs) / len(runs)) / 2
            width = next_width(run, window)
        slots = fed[:, None] + torch.arange(width, device=device)
        filled = min(max(done for done, _ in progress) + width, length + window)
        hidden = cache.feed_answer(answer.gather(1, slots.clamp(max=length - 1)), slots, filled)


def verify(
    sampler: Sampler, logits: torch.Tensor, candidate: torch.LongTensor
) -> tuple[torch.LongTensor, torch.BoolTensor, torch.Tensor]:
    """Proposed indices (batch, q) against the model's logits (batch, q, legal ids).

    Returns what stands there if everything before was right, whether that is the proposal, and its log-probability.
    """
    if sampler.do_sample:
        probabilities = sampler.probabilities(logits)
        chance = probabilities.gather(-1, candidate[..., None])[..., 0]
        kept = torch.rand(chance.shape, device=logits.device, generator=sampler.generator) < chance
        rest = probabilities.scatter(-1, candidate[..., None], 0.0)
        rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, probabilities)
        choice = torch.where(kept, candidate, sampler.draw(rest))
    else:
        choice = logits.argmax(-1)
        kept = choice == candidate
    return choice, kept, logits.log_softmax(-1).gather(-1, choice[..., None])[..., 0]


def next_width(run: float, window: int) -> int:
    """A power of two (few shapes for compiled code) with room for more than the mean accepted run, at most `window`."""
    width = 4
    while width < min(1.5 * run, window):
        width *= 2
    return min(width, window)


__all__ = ["Sampler"]
