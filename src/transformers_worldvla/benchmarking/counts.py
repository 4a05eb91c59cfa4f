"""What an arm has to do, counted: forwards, tokens, rows of the head, bytes. The same on every machine.

From the counts and two measured ceilings (bytes read and operations a second) follows the time that a perfect
implementation of the arm would take: each forward costs the larger of reading what it reads and computing what it
computes (a roofline).
"""

from dataclasses import dataclass
from typing import Any

from .cases import ACTION_DIM, Case


@dataclass(frozen=True)
class Forward:
    """One forward of one row of a batch: `tokens` run against `columns` keys (their own included); `head_rows` hidden
    states go through `head_width` rows of the head."""

    tokens: int
    columns: int
    head_rows: int
    head_width: int


@dataclass(frozen=True)
class Counts:
    """Totals of one answer: of one row, but for `kv_bytes`, which is of the batch."""

    forwards: int
    trunk_tokens: int
    head_rows: int
    head_products: int  # head rows times the vocabulary rows that each meets
    kv_bytes: int  # keys and values at the end


def forwards_of(arm: str, case: Case, config: Any, tokens: Any, prompt: int) -> list[Forward] | None:
    """The forwards of an arm; None where they depend on the numbers (drafts). `prompt`: its tokens."""
    whole = config.vocab_size
    answer = len(case.answer(tokens))
    if arm in ("A", "B1", "B2", "C"):
        first = Forward(prompt, prompt, prompt if arm == "A" else 1, whole)
        return [first, *(Forward(1, prompt + done, 1, whole) for done in range(1, answer))]
    if arm.startswith("D-draft"):
        return None
    if case.what == "chunk":
        count = case.actions
        width = whole if arm == "D-parallel" else len(tokens.action_bins)
        new = prompt + count if arm != "D-overlap" else tokens.image_block_length(case.side, case.side) + 1 + count
        steps = [Forward(count, prompt + 1 + step, count, width) for step in range(1, ACTION_DIM)]
        return [Forward(new, prompt + 1, count, width), *steps]
    layout = tokens.image_block_layout(case.side, case.side)
    free = [place for place, token in enumerate(layout) if token < 0]
    width = len(tokens.image_codes)
    steps = [Forward(b - a, prompt + b, 1, width) for a, b in zip(free, free[1:], strict=False)]
    return [Forward(prompt + free[0], prompt + free[0], 1, width), *steps]


def count(forwards: list[Forward], case: Case, config: Any, element: int, prompt: int) -> Counts:
    """Totals; `element` is the size of a number in bytes."""
    kept = sum(one.tokens for one in forwards)
    if forwards[0].tokens < prompt:  # a prefix came before
        kept += prompt - (forwards[0].tokens - forwards[0].head_rows)
    return Counts(
        forwards=len(forwards),
        trunk_tokens=sum(one.tokens for one in forwards),
        head_rows=sum(one.head_rows for one in forwards),
        head_products=sum(one.head_rows * one.head_width for one in forwards),
        kv_bytes=case.batch * kept * kv_bytes_of_token(config, element),
    )


def layer_parameters(config: Any) -> int:
    """Weights of all decoder layers' matrices."""
    hidden, heads, keys = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    attention = 2 * hidden * hidden + 2 * hidden * hidden * keys // heads
    return config.num_hidden_layers * (attention + 3 * hidden * config.intermediate_size)


def kv_bytes_of_token(config: Any, element: int) -> int:
    head_dim = config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * element


def operations(forward: Forward, batch: int, config: Any) -> float:
    """Floating-point operations of a forward of a batch; a multiply and an add are two."""
    hidden = config.hidden_size
    trunk = 2 * layer_parameters(config) * forward.tokens
    # a causal row of a prefill sees half of its columns
    seen = forward.columns if forward.tokens == 1 else forward.columns - forward.tokens / 2
    attention = 4 * forward.tokens * seen * hidden * config.num_hidden_layers
    return batch * (trunk + attention + 2 * hidden * forward.head_rows * forward.head_width)


def bytes_read(forward: Forward, batch: int, config: Any, element: int) -> float:
    """Weights once, keys and values of every row."""
    weights = (layer_parameters(config) + config.hidden_size * forward.head_width * (forward.head_rows > 0)) * element
    return weights + batch * forward.columns * kv_bytes_of_token(config, element)


def roofline_seconds(
    forwards: list[Forward], batch: int, config: Any, element: int, bandwidth: float, throughput: float
) -> float:
    """Least time of all forwards at `bandwidth` bytes and `throughput` operations a second."""
    return sum(
        max(bytes_read(one, batch, config, element) / bandwidth, operations(one, batch, config) / throughput)
        for one in forwards
    )
