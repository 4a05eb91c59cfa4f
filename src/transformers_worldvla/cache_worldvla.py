"""Keys and values while decoding: where they are kept, which of them a token may see, and prefixes computed ahead.

A column is a place in the cache, a position is a place in the sequence: rows may be left-padded and may advance at
different speeds, so the two differ. Nothing here chooses tokens or knows the format.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F


class KeyValueStore:
    """Keys and values of every layer, (batch, heads, capacity, head_dim) each, allocated once.

    It takes the place of a transformers `Cache` in attention layers. Columns may be written again: a rejected draft is
    overwritten, nothing is concatenated. Columns that nobody wrote are zero, so that hiding them is enough.
    """

    is_compileable = False

    def __init__(self, num_layers: int, capacity: int, static: bool):
        self.keys: list[torch.Tensor | None] = [None] * num_layers
        self.values: list[torch.Tensor | None] = [None] * num_layers
        self.capacity = capacity
        self.filled = 0  # columns in use
        self.static = static  # attention reads all columns, not only those in use
        self.target: slice | torch.Tensor = slice(0, 0)

    @property
    def width(self) -> int:
        """How many columns attention reads."""
        return self.capacity if self.static else self.filled

    def aim(self, count: int, columns: torch.LongTensor | None = None, filled: int | None = None) -> None:
        """Say where the next `count` keys go: the columns after those in use, or `columns` (batch, count)."""
        if columns is None:
            self.target = slice(self.filled, self.filled + count)
            self.filled += count
        else:
            self.target = columns
            self.filled = self.capacity if filled is None else max(self.filled, filled)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.filled

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write (batch, heads, count, head_dim) where `aim` said; returns all keys and values that attention reads."""
        read = []
        for tensors, new in ((self.keys, key), (self.values, value)):
            stored = tensors[layer_idx]
            if stored is None:
                stored = tensors[layer_idx] = new.new_zeros(*new.shape[:2], self.capacity, new.shape[3])
            if isinstance(self.target, slice):
                stored[:, :, self.target] = new
            else:
                stored.scatter_(2, self.target[:, None, :, None].expand_as(new), new)
            read.append(stored[:, :, : self.width])
        return read[0], read[1]

    def load(self, prefix: "Prefix", batch: int) -> None:
        """Start with the columns of a prefix; one row of it serves any number of rows."""
        for tensors, known in ((self.keys, prefix.keys), (self.values, prefix.values)):
            for index, part in enumerate(known):
                stored = tensors[index]
                if stored is None:
                    stored = tensors[index] = part.new_zeros(batch, part.shape[1], self.capacity, part.shape[3])
                stored[:, :, : part.shape[2]] = part
        self.filled = prefix.input_ids.shape[1]

    def repeat(self, times: int) -> None:
        """Every row `times` times, next to one another."""
        for tensors in (self.keys, self.values):
            tensors[:] = [None if one is None else one.repeat_interleave(times, 0) for one in tensors]


@dataclass
class Prefix:
    """The beginning of a prompt whose keys and values are already known; `generate_actions(prefix=...)` continues it.

    It may be used any number of times. Rows are left-padded; a prefix of one row serves prompts of any batch size that
    all begin with it.
    """

    input_ids: torch.LongTensor  # (batch, length)
    mask: torch.BoolTensor  # (batch, length), False on padding
    keys: list[torch.Tensor]  # one a layer, (batch, heads, length, head_dim)
    values: list[torch.Tensor]

    def __len__(self) -> int:
        """Longest row without padding."""
        return int(self.mask.sum(-1).max())

    def matches(self, input_ids: torch.LongTensor, attention_mask: torch.Tensor) -> bool:
        """Does every prompt (batch, length) begin with its row of this prefix, and go on behind it?"""
        rows = self.rows(self.input_ids, self.mask)
        prompts = self.rows(input_ids, attention_mask)
        if len(rows) not in (1, len(prompts)):
            return False
        rows = rows * (len(prompts) // len(rows))
        return all(len(a) < len(b) and b[: len(a)] == a for a, b in zip(rows, prompts, strict=True))

    def remainder(
        self, input_ids: torch.LongTensor, attention_mask: torch.Tensor
    ) -> tuple[torch.LongTensor, torch.BoolTensor]:
        """What the prompts go on with, left-padded: ids and mask (batch, rest). Raises ValueError on other prompts."""
        if not self.matches(input_ids, attention_mask):
            raise ValueError(
                "the prompt does not begin with the prefix: prefill_actions takes the same instruction, embodiment and "
                "older images, or leave prefix= out"
            )
        length = self.mask.sum(-1).tolist()
        prompts = self.rows(input_ids, attention_mask)
        rests = [row[length[min(index, len(length) - 1)] :] for index, row in enumerate(prompts)]
        width = max(map(len, rests))
        ids = torch.tensor([[0] * (width - len(rest)) + rest for rest in rests], device=input_ids.device)
        mask = torch.tensor([[False] * (width - len(rest)) + [True] * len(rest) for rest in rests], device=ids.device)
        return ids, mask

    def tensors(self) -> list[torch.Tensor]:
        """Mask, keys and values: what a CUDA graph copies in."""
        return [self.mask, *self.keys, *self.values]

    def holding(self, tensors: Sequence[torch.Tensor]) -> "Prefix":
        """The same prefix in other memory (inverse of `tensors`)."""
        layers = len(self.keys)
        return Prefix(self.input_ids, tensors[0], list(tensors[1 : 1 + layers]), list(tensors[1 + layers :]))

    @staticmethod
    def rows(input_ids: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
        """Ids of each row without its padding."""
        pairs = zip(input_ids.tolist(), mask.bool().tolist(), strict=True)
        return [[token for token, real in zip(ids, kept, strict=True) if real] for ids, kept in pairs]


class DecodingCache:
    """One call's cache: the prompt's columns and positions, and forwards through modules or through the engine."""

    def __init__(
        self,
        model: Any,
        prompt_mask: torch.Tensor,
        implementation: str,
        answer: int,
        prefix: Prefix | None = None,
        engine: Any = None,
        keeps_store: bool = False,
    ):
        """`prompt_mask` (batch, rest) is the prompt's mask without its prefix, `answer` the columns behind it.

        `keeps_store`: steps are replayed one by one, in a store that the engine keeps (and not as one whole graph).
        """
        if implementation not in ("dynamic", "static"):
            raise ValueError(f'cache_implementation is "dynamic" or "static", not {implementation!r}')
        if implementation == "static" and engine is None and model.config._attn_implementation == "flex_attention":
            raise ValueError('flex_attention does not work with a static cache: use cache_implementation="dynamic"')
        self.model, self.engine = model, engine
        mask = prompt_mask.bool()
        if prefix is not None:
            mask = torch.cat([prefix.mask.to(mask.device).expand(len(mask), -1), mask], dim=-1)
        self.prompt_mask = mask  # (batch, prompt)
        self.prompt_length = mask.sum(-1)  # (batch,)
        capacity = mask.shape[1] + answer
        if keeps_store:
            self.store = engine.store(len(mask), engine.rounded(capacity))
        else:
            self.store = KeyValueStore(model.config.num_hidden_layers, capacity, static=implementation == "static")
        if prefix is not None:
            self.store.load(prefix, len(mask))

    @property
    def prompt(self) -> int:
        """Columns of the prompt."""
        return self.prompt_mask.shape[1]

    def prefill(
        self, input_ids: torch.LongTensor, appended: torch.LongTensor, apart: bool, stride: int
    ) -> torch.Tensor:
        """Run the prompt behind its prefix (batch, rest) and appended ids (batch, q); returns the hidden states of
        the appended ones (the prompt's last one without any).

        `apart`: the appended ids do not see one another and lie `stride` positions apart; else they follow causally.
        """
        batch, count, device = len(input_ids), appended.shape[1], input_ids.device
        total, cached = self.prompt + count, self.store.filled
        causal = torch.ones(total, total, dtype=torch.bool, device=device).tril()
        itself = torch.eye(total, dtype=torch.bool, device=device)
        if apart:
            causal[self.prompt :, self.prompt :] = itself[self.prompt :, self.prompt :]
        keys = torch.cat([self.prompt_mask, self.prompt_mask.new_ones(batch, count)], dim=-1)
        # padding sees itself, so that no row of the softmax is empty
        visible = (causal & keys[:, None]) | itself
        positions = (self.prompt_mask.long().cumsum(-1) - 1).clamp(min=0)[:, cached:]
        after = self.prompt_length[:, None] + torch.arange(count, device=device) * stride
        ids = torch.cat([input_ids, appended], -1)
        rows = max(count, 1)
        return self.feed(ids, torch.cat([positions, after], -1), visible[:, cached:], last_rows=rows)[:, -rows:]

    def feed(
        self,
        ids: torch.LongTensor,
        positions: torch.LongTensor,
        visible: torch.BoolTensor,
        columns: torch.LongTensor | None = None,
        filled: int | None = None,
        last_rows: int | None = None,
    ) -> torch.Tensor:
        """ids, positions (batch, q), visible (batch, q, columns) -> hidden states (batch, q, hidden).

        They go behind all columns so far, or to `columns` (batch, q), after which `filled` columns are in use. Of the
        hidden states only the `last_rows` last are read, if given: the last layer need not compute the others.
        """
        self.store.aim(ids.shape[1], columns, filled)
        visible = F.pad(visible, (0, self.store.width - visible.shape[-1]), value=False)[:, None]
        if self.engine is not None:
            if columns is not None:
                return self.engine.step_forward(ids, positions, visible, self.store)
            return self.engine.forward(ids, positions, visible, self.store, last_rows)
        outputs = self.model.model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=_attention_form(visible, self.model),
            past_key_values=self.store,
            use_cache=True,
            last_rows=last_rows,
        )
        return outputs.last_hidden_state

    def feed_answer(self, ids: torch.LongTensor, slots: torch.LongTensor, filled: int | None = None) -> torch.Tensor:
        """Tokens (batch, q) of the answer at `slots` (batch, q), each row's own: causal, written where they belong.

        `filled`: slots in use after this, over all rows, when the caller knows it; attention then reads no more.
        """
        columns = self.store.capacity if filled is None or self.store.static else self.prompt + filled
        answer = torch.arange(columns - self.prompt, device=ids.device)
        seen = self.prompt_mask[:, None].expand(-1, ids.shape[1], -1)
        visible = torch.cat([seen, answer <= slots[..., None]], dim=-1)  # (batch, q, columns)
        return self.feed(ids, self.prompt_length[:, None] + slots, visible, self.prompt + slots, columns)

    def repeat(self, times: int) -> None:
        """Every row `times` times, next to one another."""
        self.store.repeat(times)
        self.prompt_mask = self.prompt_mask.repeat_interleave(times, 0)
        self.prompt_length = self.prompt_length.repeat_interleave(times, 0)

    def as_prefix(self, input_ids: torch.LongTensor) -> Prefix:
        """What has been prefilled, to continue later."""
        keys = [one[:, :, : self.store.filled] for one in self.store.keys if one is not None]
        values = [one[:, :, : self.store.filled] for one in self.store.values if one is not None]
        return Prefix(input_ids, self.prompt_mask, keys, values)


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


__all__ = ["DecodingCache", "KeyValueStore", "Prefix"]
