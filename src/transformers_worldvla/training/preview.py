"""One training sample in words, as the model will see it: what is text, picture and action, and what carries loss."""

from collections.abc import Sequence
from typing import Any

import torch

from ..loss_worldvla import IGNORE_INDEX


def describe_batch_row(batch: dict[str, torch.Tensor], row: int, processor: Any, embodiment: str | None) -> list[str]:
    """Lines for people: one for each text, picture and action of a padded row, `*` before what carries loss."""
    kept = batch["attention_mask"][row].bool()
    ids = batch["input_ids"][row][kept].tolist()
    labelled = (batch["labels"][row][kept] != IGNORE_INDEX).tolist()
    weights = batch["loss_weights"][row][kept].tolist()
    robot = processor.get_embodiment(embodiment) if processor.embodiments else None
    lines, position = [], 0
    while position < len(ids):
        end, text = _piece(ids, position, processor, robot)
        trained = sum(labelled[position:end])
        share = f"{trained} of {end - position} with loss" if trained else "no loss"
        weight = sorted(
            {weight for weight, has in zip(weights[position:end], labelled[position:end], strict=True) if has}
        )
        if weight and weight != [1.0]:
            share += f", weight {' '.join(f'{value:g}' for value in weight)}"
        lines.append(f"{'*' if trained else ' '} {text}  [{end - position} tokens, {share}]")
        position = end
    lines.append(f"  {len(ids)} tokens, {sum(labelled)} with loss, padded to {len(kept)}")
    return lines


def _piece(ids: Sequence[int], start: int, processor: Any, robot: Any) -> tuple[int, str]:
    """The piece of the sequence that begins at `start`: where it ends, and what it is."""
    tokens = processor.tokens
    first = ids[start]
    if first == tokens.image_start:
        end = ids.index(tokens.image_end, start) + 1
        codes = tokens.parse_image_block(ids[start:end])
        return end, f"picture of {codes.shape[0]} x {codes.shape[1]} codes"
    if first == tokens.action_start:
        end = ids.index(tokens.action_end, start) + 1
        bins = torch.tensor([[ids[start + 1 : end - 1]]])
        values = processor.decode_actions(bins, robot.name)[0, 0].tolist()
        names = robot.action_names or [str(index) for index in range(robot.action_dim)]
        return end, "action " + ", ".join(f"{name} {value:+.4g}" for name, value in zip(names, values, strict=True))
    if first in (tokens.bos, tokens.separator):
        return start + 1, "begin" if first == tokens.bos else "separator"
    end = start
    while end < len(ids) and ids[end] not in tokens.structural_ids:
        end += 1
    return max(end, start + 1), f'text "{processor.tokenizer.decode(ids[start : max(end, start + 1)])}"'


def length_histogram(lengths: Sequence[int], bins: int = 8) -> list[tuple[int, int, int]]:
    """Sequence lengths counted: (shortest, longest, number) of each group, empty groups left out."""
    low, high = min(lengths), max(lengths)
    width = max(1, -(-(high - low + 1) // bins))
    groups: dict[int, list[int]] = {}
    for length in lengths:
        groups.setdefault((length - low) // width, []).append(length)
    return [(min(group), max(group), len(group)) for _, group in sorted(groups.items())]
