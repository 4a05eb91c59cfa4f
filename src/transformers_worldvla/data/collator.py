"""Batches from samples: padded, or packed into rows of limited length.

The processor builds every sequence with its labels and loss weights; here they are only laid out in rows. The mask is
the model's business: it derives it from the ids, and in packed rows from `seq_idx`.
"""

import inspect
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..processing_worldvla import IGNORED_LABEL, WorldVLAProcessor

_ARGUMENTS = frozenset(inspect.signature(WorldVLAProcessor.__call__).parameters)


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Distribute samples over rows of at most `capacity` tokens: positions of the samples of each row, ascending.

    Best fit, longest first: a sample goes where it leaves least room. Rows stand in the order of their first samples.
    No sample may be longer than `capacity`.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for sample in sorted(range(len(lengths)), key=lambda sample: -lengths[sample]):
        fitting = [row for row, free in enumerate(room) if free >= lengths[sample]]
        if fitting:
            row = min(fitting, key=room.__getitem__)
        else:
            row = len(rows)
            rows.append([])
            room.append(capacity)
        rows[row].append(sample)
        room[row] -= lengths[sample]
    return sorted(sorted(row) for row in rows)


class WorldVLADataCollator:
    """Samples in, one batch of model inputs with labels and loss weights out.

    A sample is a dict of arguments of the processor for one sample; other entries are left out. Samples of different
    kinds, embodiments, and of pictures and tokens go into one batch. With transformers' Trainer set
    `remove_unused_columns=False`: the arguments are not the model's.

    Args:
        processor: builds the sequences.
        packing: put several samples into one row and add `seq_idx`, which keeps them apart in mask, positions and
            loss. Worth it where lengths differ much, as between 256 and 512 pixels; the attention is over rows.
        max_length: most tokens of a row. A longer sample is an error, nothing is ever cut. When packing, None means
            the longest sample of the batch: fewer rows, none of them wider than padding would make it.
        pad_to_multiple_of: round row lengths up to a multiple, so that few shapes occur (for `torch.compile`).
        embodiment_ids: add the number of each token's embodiment in the order of the processor's, for metrics by
            embodiment (the model does not take it).
        moved_weight: loss weight of an answer's picture codes that differ from the frame before, for samples of tokens.
            From frame to frame few codes change: a small model that weighs all alike learns to copy.
        action_jitter: standard deviation, in bins, of noise on the labels of actions (the ids stay). To a cross entropy
            the bin beside the right one is as wrong as any; with noise neighbours share what is learned, and the
            likeliest bin is the middle of a likely range.
        code_noise: share of a prompt's picture codes, for samples of tokens, that become any other code. Few recorded
            episodes are otherwise learnt by heart.

    Noise belongs to the batch: a run that goes on sees it again.

    Returns on call:
        `input_ids`, `attention_mask`, `labels`, `loss_weights`, and where asked for `seq_idx` (a row's samples from 0)
        and `embodiment_ids`, (rows, length), padded on the left, the last two with -1; with pictures `pixel_values` in
        order of appearance, to be passed to the model or first to `model.discretize`.

    Raises:
        ValueError: names the sample that is too long or that the processor refuses.
    """

    def __init__(
        self,
        processor: Any,
        packing: bool = False,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        embodiment_ids: bool = False,
        moved_weight: float = 1.0,
        action_jitter: float = 0.0,
        code_noise: float = 0.0,
    ):
        for name, value in (("max_length", max_length), ("pad_to_multiple_of", pad_to_multiple_of)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is a number >= 1 or None, not {value}")
        if max_length is not None and max_length % (pad_to_multiple_of or 1):
            raise ValueError(f"max_length {max_length} is no multiple of pad_to_multiple_of {pad_to_multiple_of}")
        if not 0 <= moved_weight < float("inf"):
            raise ValueError(f"moved_weight is a number >= 0, not {moved_weight}")
        if not 0 <= action_jitter < float("inf"):
            raise ValueError(f"action_jitter is a number of bins >= 0, not {action_jitter}")
        if not 0 <= code_noise < 1:
            raise ValueError(f"code_noise is a share from 0 to below 1, not {code_noise}")
        self.processor = processor
        self.packing = packing
        self.max_length = max_length
        self.pad_to_multiple_of = pad_to_multiple_of
        self.embodiment_ids = embodiment_ids
        self.moved_weight = moved_weight
        self.action_jitter = action_jitter
        self.code_noise = code_noise

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = self._process(samples)
        if self.moved_weight != 1:
            self._weigh_moved_codes(samples, batch)
        if self.action_jitter:
            self._jitter_actions(batch)
        if self.code_noise:
            self._disturb_codes(batch)
        lengths = batch["attention_mask"].sum(axis=1).tolist()
        longest = max(range(len(samples)), key=lengths.__getitem__)
        if self.max_length is not None and lengths[longest] > self.max_length:
            raise ValueError(
                f"{_name(samples, longest)} has {lengths[longest]} tokens, more than max_length {self.max_length}: "
                "raise it, or make pictures, history or the action chunk smaller"
            )
        capacity = lengths[longest] if self.max_length is None else self.max_length
        rows = pack(lengths, capacity) if self.packing else [[sample] for sample in range(len(samples))]
        return self._lay_out(samples, batch, lengths, rows)

    def _process(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The samples as the processor pads them, in numpy."""
        names = {name for sample in samples for name, value in sample.items() if value is not None}
        columns = {name: [sample.get(name) for sample in samples] for name in sorted(names & _ARGUMENTS)}
        try:
            return dict(self.processor(**columns, return_tensors="np"))
        except ValueError as error:
            for index in range(len(samples)):
                row = {name: [values[index]] for name, values in columns.items()}
                try:
                    self.processor(**row, return_tensors="np")
                except ValueError as own:
                    message = str(own).removeprefix("sample 0: ")
                    raise ValueError(f"{_name(samples, index)}: {message}") from error
            raise

    def _weigh_moved_codes(self, samples: Sequence[dict[str, Any]], batch: dict[str, Any]) -> None:
        """Multiply the loss weights (samples, longest) of codes that are not those of the time step before."""
        is_code = self.processor.tokens.are_image_codes(batch["input_ids"])
        for row, sample in enumerate(samples):
            if sample.get("target_images") is not None:
                raise ValueError(f"{_name(samples, row)} has pictures to predict: moved_weight compares their tokens")
            targets = sample.get("target_image_tokens")
            if targets is None:
                continue
            places = is_code[row].nonzero()[0]
            step = np.asarray(targets[0]).size * self.processor.get_embodiment(sample.get("embodiment")).num_cameras
            answered = np.asarray(targets[0]).size * len(targets)
            codes = batch["input_ids"][row, places]
            moved = codes[-answered:] != codes[-answered - step : -step]
            batch["loss_weights"][row, places[-answered:][moved]] *= self.moved_weight

    def _jitter_actions(self, batch: dict[str, Any]) -> None:
        """Move the labels (samples, longest) of action bins to bins nearby, never past the first or the last."""
        tokens, labels = self.processor.tokens, batch["labels"]
        index = tokens.action_bin_indices(labels)
        places = index >= 0
        rng = np.random.default_rng(zlib.crc32(labels.tobytes()))
        shift = rng.normal(scale=self.action_jitter, size=places.sum()).round().astype(np.int64)
        bins = np.array(tokens.action_bins)
        labels[places] = bins[np.clip(index[places] + shift, 0, len(bins) - 1)]

    def _disturb_codes(self, batch: dict[str, Any]) -> None:
        """Put any other code at some of the picture codes (samples, longest) that are shown, not asked for."""
        ids, codes = batch["input_ids"], np.array(self.processor.tokens.image_codes)
        rng = np.random.default_rng(zlib.crc32(ids.tobytes()))
        shown = self.processor.tokens.are_image_codes(ids) & (batch["labels"] == IGNORED_LABEL)
        places = shown & (rng.random(ids.shape) < self.code_noise)
        others = rng.choice(codes[:-1], size=places.sum())
        ids[places] = np.where(others == ids[places], codes[-1], others)

    def _lay_out(
        self, samples: Sequence[dict[str, Any]], batch: dict[str, Any], lengths: list[int], rows: list[list[int]]
    ) -> dict[str, torch.Tensor]:
        """Move the sequences of `batch` (samples, longest) to their rows, each row filled to its right end."""
        multiple = self.pad_to_multiple_of or 1
        width = -(-max(sum(lengths[sample] for sample in row) for row in rows) // multiple) * multiple
        fill = {"input_ids": self.processor.tokens.pad, "labels": IGNORED_LABEL, "seq_idx": -1, "embodiment_ids": -1}
        sources = {name: value for name, value in batch.items() if name != "pixel_values"}
        names = [*sources, *(["seq_idx"] if self.packing else []), *(["embodiment_ids"] if self.embodiment_ids else [])]
        out = {
            name: np.full((len(rows), width), fill.get(name, 0), sources[name].dtype if name in sources else np.int64)
            for name in names
        }
        embodiments = list(self.processor.embodiments)
        for row, members in enumerate(rows):
            stop = width
            for segment in reversed(range(len(members))):
                sample = members[segment]
                place = (row, slice(stop - lengths[sample], stop))
                for name, values in sources.items():
                    out[name][place] = values[sample, -lengths[sample] :]
                if self.packing:
                    out["seq_idx"][place] = segment
                if self.embodiment_ids:
                    robot = self.processor.get_embodiment(samples[sample].get("embodiment")).name
                    out["embodiment_ids"][place] = embodiments.index(robot)
                stop -= lengths[sample]
        tensors = {name: torch.from_numpy(value) for name, value in out.items()}
        if "pixel_values" in batch:
            order = [sample for row in rows for sample in row]
            tensors["pixel_values"] = torch.from_numpy(batch["pixel_values"][_picture_order(samples, order)])
        return tensors


def _picture_order(samples: Sequence[dict[str, Any]], order: list[int]) -> np.ndarray:
    """Numbers of the batch's pictures when its samples stand in another order."""
    counts = [len(sample.get("images") or []) + len(sample.get("target_images") or []) for sample in samples]
    starts = np.cumsum([0, *counts])
    return np.concatenate([np.arange(starts[sample], starts[sample + 1]) for sample in order])


def _name(samples: Sequence[dict[str, Any]], index: int) -> str:
    """What to call a sample in a message."""
    source = samples[index].get("source")
    return f"sample {index} of the batch" if source is None else f"sample {index} of the batch ({source})"
