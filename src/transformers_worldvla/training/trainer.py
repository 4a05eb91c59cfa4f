"""`WorldVLATrainer`: transformers' Trainer with WorldVLA's weighted loss, exact over accumulation steps and ranks.

Every micro-batch of an optimizer step is divided by the weights of the whole step, summed over micro-batches and
ranks, which the model takes as named arguments (`loss_worldvla.LossDenominators`). So 1 x 4 and 4 x 1 accumulation, and
any number of ranks, give the same gradients. On the way it measures what the model predicts; it knows no data set.
"""

from collections.abc import Callable, Iterator
from dataclasses import astuple
from itertools import islice
from typing import Any

import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from ..data import WorldVLADataCollator
from ..data.epochs import EpochCallback
from ..data.samples import EpochDataset
from ..loss_worldvla import IGNORE_INDEX, loss_denominators
from ..modeling_worldvla import WorldVLAForCausalLM
from .adapters import base_model, fingerprint, is_peft_model, write_adapter_facts
from .arguments import MODEL_FIELDS, WorldVLATrainingArguments
from .callbacks import ReportingCallback
from .distributed import adapt_fsdp_plugin
from .metrics import LossMeter, TokenMeter, record_predictions

DENOMINATORS = ("action_weight_sum", "world_weight_sum", "class_weight_sum", "label_count")
EMBODIMENTS = "embodiment_ids"  # of a batch, for the metrics; the model never sees it


class WorldVLATrainer(Trainer):
    """Trains a `WorldVLAForCausalLM`, or a PEFT model around one.

    Args:
        model: its image tokenizer stays frozen and in float32.
        args: `WorldVLATrainingArguments`; plain `TrainingArguments` keep every field of the checkpoint's.
        processing_class: the `WorldVLAProcessor`, required, afterwards `trainer.processor`. It is saved into every
            checkpoint, and its embodiments give the model's `action_dim` and `num_cameras`.
        data_collator: by default `WorldVLADataCollator(processing_class, embodiment_ids=True)`. It may return pictures
            instead of tokens, they are turned into tokens before anything is counted.
        eval_data_collator: another one for evaluation, such as one that does not pack.
        Others as in `transformers.Trainer`. `eval_dataset` may be a dict: `{"val_ind": ..., "val_ood": ...}`.

    It logs, over the micro-batches and ranks since the last log, `action_loss`, `world_loss` (without alpha), `z_loss`
    and the metrics of `TokenMeter`; evaluation gives the same over a whole data set, under `eval_<name>_`.
    """

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        *,
        processing_class: Any = None,
        eval_data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        **kwargs: Any,
    ):
        if processing_class is None:
            raise ValueError("WorldVLATrainer needs processing_class=processor: it is saved with every checkpoint")
        args = args or WorldVLATrainingArguments()
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs in one process: start a process for each with `torchrun --nproc-per-node "
                f"{args.n_gpu}` or `accelerate launch`, or show it one with CUDA_VISIBLE_DEVICES"
            )
        if args.remove_unused_columns:
            raise ValueError("set remove_unused_columns=False: samples are the processor's arguments, not the model's")
        prepare_model(model, args, processing_class)
        data_collator = data_collator or WorldVLADataCollator(processing_class, embodiment_ids=True)
        # a Trainer that knows it would put the tokenizer's </s> in place of the separator that ends our sequences
        super().__init__(model, args, data_collator, processing_class=None, **kwargs)
        if self.is_fsdp_enabled:
            adapt_fsdp_plugin(self.accelerator.state.fsdp_plugin, model)
        self.processor = processing_class
        self.eval_data_collator = eval_data_collator or data_collator
        if isinstance(self.train_dataset, EpochDataset):
            self.add_callback(EpochCallback(self.train_dataset))
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ReportingCallback):
                callback.trainer = self
        self.model_accepts_loss_kwargs = True  # the loss is divided by our denominators, not by the number of steps
        # now, while no rank holds a part of the weights only
        self._base_fingerprint = fingerprint(base_model(model)) if is_peft_model(model) else None
        self._losses, self._eval_losses = LossMeter(), LossMeter()
        self._meter, self._eval_meter = self._token_meter(), self._token_meter()

    @property
    def base_model(self) -> WorldVLAForCausalLM:
        """The WorldVLA model inside whatever wraps it."""
        return base_model(self.accelerator.unwrap_model(self.model))

    def _token_meter(self) -> TokenMeter:
        processor = self.processor
        return TokenMeter(processor.tokens, [processor.get_embodiment(name) for name in processor.embodiments])

    # ---------------------------------------------------------------- loss

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor]:
        """The micro-batches of one optimizer step, and the loss denominators (4,) of all of them over all ranks."""
        batches = [self._discretize(batch) for batch in islice(epoch_iterator, num_batches)]
        own = torch.zeros(len(DENOMINATORS), device=device)
        for batch in batches:
            own += self._denominators(batch).to(device)
        self._losses.add_weights(own)
        return batches, self._sum_over_ranks(own)

    def _discretize(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Pictures become token ids, once: the classes that the loss counts are known only then."""
        if "pixel_values" not in batch:
            return batch
        return self.base_model.discretize(**self._prepare_inputs(batch))

    def _denominators(self, batch: dict[str, Any]) -> torch.Tensor:
        """What the loss of this batch alone would be divided by: (4,) float32, in the order of `DENOMINATORS`."""
        model, labels = self.base_model, batch["labels"]
        weights = batch.get("loss_weights")
        own = loss_denominators(
            labels[:, 1:],
            (torch.ones_like(labels, dtype=torch.float32) if weights is None else weights)[:, 1:],
            model.tokens.world_mask(batch["input_ids"], batch.get("seq_idx"))[:, 1:],
            model.authors_world_classes,
            model.config.world_loss_weight,
        )
        return torch.stack([value.float() for value in astuple(own)])

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """This micro-batch's share of the step's loss, times the ranks, whose gradients are averaged.

        `num_items_in_batch` is what `get_batch_samples` gave; without it the batch stands for itself.
        """
        scale = self.accelerator.num_processes
        if num_items_in_batch is None:
            inputs = self._discretize(inputs)
            num_items_in_batch, scale = self._denominators(inputs), 1
            self._losses.add_weights(num_items_in_batch)
        outputs = self._forward(model, inputs, num_items_in_batch, self._losses, self._meter)
        loss = outputs.loss * scale
        return (loss, outputs) if return_outputs else loss

    def _forward(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        denominators: torch.Tensor,
        losses: LossMeter,
        meter: TokenMeter,
    ) -> Any:
        """Run the model, and add what it says to the meters."""
        inputs = dict(inputs)
        embodiments = inputs.pop(EMBODIMENTS, None)
        denominators = denominators.to(inputs["labels"].device)
        if embodiments is None:
            embodiments = torch.full_like(inputs["labels"], self._default_embodiment())
        with record_predictions(self.base_model.lm_head, self.processor.tokens.action_bins) as predictions:
            # one position: in evaluation the model also gives logits of positions without a label
            outputs = model(**inputs, **dict(zip(DENOMINATORS, denominators, strict=True)), logits_to_keep=1)
        meter.update(inputs, predictions, embodiments)
        config = self.base_model.config
        cross_entropy = outputs.loss.detach() - config.z_loss_weight * outputs.z_loss
        parts = torch.stack([outputs.action_loss, outputs.world_loss, cross_entropy, outputs.z_loss])
        losses.add_means(parts, denominators)
        return outputs

    def _default_embodiment(self) -> int:
        processor = self.processor
        names = list(processor.embodiments)
        return names.index(processor.default_embodiment) if processor.default_embodiment in names else 0

    def _sum_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(values.to(self.accelerator.device), reduction="sum")

    # ---------------------------------------------------------------- logs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer's; a log of the training loss also gets its parts and the metrics since the last one."""
        if "loss" in logs:
            parts = self._losses.means(self._sum_over_ranks)
            parts.pop("class_loss", None)  # what `authors` minimises, and the loss itself there
            logs = logs | parts | self._meter.compute(self._sum_over_ranks)
            self._losses.reset()
            self._meter.reset()
        super().log(logs, start_time)

    # ---------------------------------------------------------------- evaluation

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As the Trainer's, with the collator of evaluation."""
        training, self.data_collator = self.data_collator, self.eval_data_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = training

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As the Trainer's, but the loss is that of the data set as one batch, with its parts and token metrics."""
        self._eval_losses.reset()
        self._eval_meter.reset()
        output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
        means, config = self._eval_losses.means(self._sum_over_ranks), self.base_model.config
        cross_entropy = means.pop("class_loss", 0.0)
        if config.loss_reduction == "paper":
            cross_entropy = means.get("action_loss", 0.0) + config.world_loss_weight * means.get("world_loss", 0.0)
        loss = cross_entropy + config.z_loss_weight * means.get("z_loss", 0.0)
        metrics = {"loss": loss} | means | self._eval_meter.compute(self._sum_over_ranks)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, None, None]:
        """Add one batch to the evaluation's meters; predictions themselves are not kept."""
        inputs = self._without_repeated(self._discretize(self._prepare_inputs(inputs)))
        own = self._denominators(inputs)
        self._eval_losses.add_weights(own)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = self._forward(model, inputs, own, self._eval_losses, self._eval_meter)
        return outputs.loss.detach(), None, None

    def _without_repeated(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Unlabel the samples that the last batch repeats so that every rank has as many."""
        state, labels = self.accelerator.gradient_state, batch["labels"]
        if not state.end_of_dataloader or state.remainder <= 0:
            return batch
        number = self.accelerator.process_index * len(labels) + torch.arange(len(labels), device=labels.device)
        return batch | {"labels": torch.where((number < state.remainder)[:, None], labels, IGNORE_INDEX)}

    # ---------------------------------------------------------------- optimizer, checkpoints

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Every parameter where `decay_all_parameters` says so."""
        if getattr(self.args, "decay_all_parameters", False):
            return [name for name, _ in model.named_parameters()]
        return super().get_decay_parameter_names(model)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's, with the processor; the folder of an adapter also gets what tells its base."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            folder = output_dir or self.args.output_dir
            self.processor.save_pretrained(folder)
            if self._base_fingerprint is not None:
                write_adapter_facts(folder, self.base_model.config, self._base_fingerprint)


def prepare_model(model: Any, args: TrainingArguments, processor: Any) -> None:
    """Write what training fixes into the model: loss fields, dropout, the default embodiment's sizes."""
    base = base_model(model)
    for name in MODEL_FIELDS:
        value = getattr(args, name, None)
        if value is not None:
            setattr(base.config, name, value)
    for layer in base.model.layers:
        if hasattr(layer, "dropout"):
            layer.dropout.p = float(base.config.dropout)
    robots = [processor.get_embodiment(name) for name in processor.embodiments]
    for field in ("action_dim", "num_cameras"):
        if robots:
            sizes = {getattr(robot, field) for robot in robots}
            if field == "action_dim" or len(sizes) == 1:
                setattr(base.config, field, sizes.pop() if len(sizes) == 1 else None)
    base.model.vqmodel.requires_grad_(False)
