"""What a forward says, counted: the parts of the loss, accuracies, and action errors in robot units.

Predictions are teacher-forced argmaxes, taken where the loss computes its logits, so that no second set of logits is
ever made. Counters are tensors on the model's device: nothing waits for it before the numbers are asked for.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ..action_tokenization_worldvla import CENTERS, Embodiment
from ..loss_worldvla import IGNORE_INDEX
from ..tokens_worldvla import WorldVLATokens


@dataclass
class Predictions:
    """Argmaxes at the labelled positions of one forward, in the order of `labels[:, 1:] != -100`."""

    tokens: list[torch.Tensor] = field(default_factory=list)  # chunks of (rows,): likeliest token of all
    bins: list[torch.Tensor] = field(default_factory=list)  # chunks of (rows,): likeliest of the legal action bins


@contextmanager
def record_predictions(lm_head: torch.nn.Module, action_bins: Sequence[int]) -> Iterator[Predictions]:
    """Record what `lm_head` says to the loss's labelled rows (rows, hidden) while the block runs.

    The backward pass, which computes chunks of rows again, comes after the block. Logits of whole sequences are 3-D
    and no business of this.
    """
    predictions = Predictions()
    bins = torch.tensor(action_bins)

    def record(_module: torch.nn.Module, _inputs: Any, logits: torch.Tensor) -> None:
        if logits.ndim == 2:
            with torch.no_grad():
                predictions.tokens.append(logits.argmax(-1))
                predictions.bins.append(logits[:, bins.to(logits.device)].argmax(-1))

    handle = lm_head.register_forward_hook(record)
    try:
        yield predictions
    finally:
        handle.remove()


class LossMeter:
    """Means of a loss's parts over any number of forwards and ranks; this rank's own share is kept."""

    PARTS = ("action_loss", "world_loss", "class_loss", "z_loss")  # `class_loss` is that of the reduction `authors`

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._sums: torch.Tensor | float = 0.0
        self._weights: torch.Tensor | float = 0.0

    def add_weights(self, weights: torch.Tensor) -> None:
        """What the parts of the coming forwards are to be divided by: (4,)."""
        self._weights = self._weights + weights.to(exact_dtype(weights.device))

    def add_means(self, means: torch.Tensor, divisors: torch.Tensor) -> None:
        """The parts of one forward (4,), and what each was divided by."""
        self._sums = self._sums + means.to(exact_dtype(means.device)) * divisors

    def means(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """Each part over all that was added on all ranks, which `reduce` sums over; absent kinds are left out."""
        if isinstance(self._sums, float) or isinstance(self._weights, float):
            return {}
        sums, weights = reduce(torch.stack([self._sums, self._weights.to(self._sums.device)])).tolist()
        return {name: sums[i] / weights[i] for i, name in enumerate(self.PARTS) if weights[i]}


class TokenMeter:
    """Counts correct tokens and sums absolute action errors, per embodiment and dimension.

    All counters are one tensor, `sums`, so that ranks add them up in one call:
    action tokens, those right, image codes, those right, then for each embodiment and dimension the summed error in
    robot units and the number of actions.
    """

    COUNTS = ("action_tokens", "action_right", "image_tokens", "image_right")

    def __init__(self, tokens: WorldVLATokens, embodiments: Sequence[Embodiment]):
        self.tokens, self.embodiments = tokens, list(embodiments)
        self.width = max((robot.action_dim for robot in self.embodiments), default=0)
        # half a range is what one unit of the normalised value is worth
        self._scale = torch.zeros(len(self.embodiments), self.width, dtype=torch.float64)
        for row, robot in zip(self._scale, self.embodiments, strict=True):
            row[: robot.action_dim] = (torch.tensor(robot.high) - torch.tensor(robot.low)) / 2
        self._centers = torch.tensor([*CENTERS, CENTERS[-1]])  # the last bin decodes like the one before
        self._bin_table = torch.from_numpy(tokens.action_bin_table)
        self._code_table = torch.from_numpy(tokens.image_code_table)
        self.sums = self._zeros(torch.device("cpu"))

    def _zeros(self, device: torch.device) -> torch.Tensor:
        return torch.zeros(len(self.COUNTS) + 2 * self._scale.numel(), dtype=exact_dtype(device), device=device)

    def reset(self) -> None:
        self.sums = torch.zeros_like(self.sums)

    @torch.no_grad()
    def update(self, batch: dict[str, torch.Tensor], predictions: Predictions, embodiments: torch.Tensor) -> None:
        """Add one forward.

        Args:
            batch: `input_ids` and `labels` (batch, length).
            predictions: of the forward of this batch.
            embodiments: (batch, length), number of the embodiment each token belongs to.
        """
        labels, ids = batch["labels"], batch["input_ids"]
        if self.sums.device != labels.device:
            self.sums = self._zeros(labels.device) + self.sums.to(labels.device)
        rows = labels[:, 1:] != IGNORE_INDEX
        target = labels[:, 1:][rows]
        predicted, chosen = torch.cat(predictions.tokens), torch.cat(predictions.bins)

        true_bin = _look_up(target, self._bin_table)
        action, code = true_bin >= 0, _look_up(target, self._code_table) >= 0
        right = predicted == target
        counts = torch.stack([action.sum(), (action & right).sum(), code.sum(), (code & right).sum()])
        self.sums[: len(self.COUNTS)] += counts.to(self.sums)
        if not self.embodiments:
            return

        # the dimension of a bin is its distance from the start of its action block
        position = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        start = torch.where(ids == self.tokens.action_start, position, -1).cummax(-1).values
        dimension = (position - start - 1)[:, 1:][rows]
        robot = embodiments[:, 1:][rows]
        is_bin = action & (dimension < self.width)
        slot = (robot * self.width + dimension)[is_bin]
        centers, scale = self._centers.to(self.sums), self._scale.to(self.sums).flatten()
        error = (centers[chosen[is_bin]] - centers[true_bin[is_bin]]).abs() * scale[slot]
        errors, numbers = self.sums[len(self.COUNTS) :].view(2, -1)
        errors.index_add_(0, slot, error)
        numbers.index_add_(0, slot, torch.ones_like(error))

    def compute(self, reduce: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums) -> dict[str, float]:
        """Metrics of all that was added, over all ranks when `reduce` sums a tensor over them.

        `action_accuracy` counts bins and `image_accuracy` codes: what the format forces is left out of both.
        `l1/<dimension>` is the mean absolute error in robot units between the centres of the likeliest and of the
        right bin; with several embodiments it is `l1/<embodiment>/<dimension>`. What was not seen is left out.
        """
        values = reduce(self.sums).tolist()
        action, action_right, image, image_right = values[: len(self.COUNTS)]
        metrics = {}
        if action:
            metrics["action_accuracy"] = action_right / action
        if image:
            metrics["image_accuracy"] = image_right / image
        errors, numbers = torch.tensor(values[len(self.COUNTS) :]).view(2, len(self.embodiments), -1).tolist()
        for robot, sums, counts in zip(self.embodiments, errors, numbers, strict=True):
            prefix = f"l1/{robot.name}/" if len(self.embodiments) > 1 else "l1/"
            for index in range(robot.action_dim):
                if counts[index]:
                    name = robot.action_names[index] if robot.action_names else str(index)
                    metrics[prefix + name] = sums[index] / counts[index]
        return metrics


def exact_dtype(device: torch.device) -> torch.dtype:
    """The most exact floating-point type of a device, for long sums."""
    return torch.float32 if device.type == "mps" else torch.float64


def _look_up(tokens: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Entries of a table of `WorldVLATokens`, whose last one stands for every larger id."""
    return table.to(tokens.device)[tokens.clamp(max=len(table) - 1)]
