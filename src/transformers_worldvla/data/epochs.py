"""Tells data sets the epoch under transformers' Trainer, also in the epoch that a run resumes in."""

from typing import Any

from transformers import TrainerCallback

from .samples import EpochDataset


class EpochCallback(TrainerCallback):
    """Call `dataset.set_epoch` before the first batch of every epoch: `Trainer(..., callbacks=[EpochCallback(data)])`.

    accelerate's loaders do it themselves unless their batches come from a sampler inside a sampler, as they do on
    several ranks and in the rest of an epoch after `resume_from_checkpoint`.
    """

    def __init__(self, dataset: EpochDataset):
        self.dataset = dataset

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # a fraction where a run resumes; rounding may have left it just below a whole number
        self.dataset.set_epoch(int((state.epoch or 0) + 1e-6))
