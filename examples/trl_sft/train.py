"""TRL's `SFTTrainer` on a frame-token cache, with WorldVLA's own loss.

    python train.py --cache my-cache --model my-checkpoint --output runs/trl --steps 2000 --lora

Cache, samples and batches are those of `worldvla train`. What TRL would do otherwise, and what is done about it, is
said in the README beside this file.
"""

import argparse
from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoProcessor
from trl import SFTConfig, SFTTrainer

from transformers_worldvla.data import FrameTokenCache, WorldVLADataCollator
from transformers_worldvla.data.epochs import EpochCallback
from transformers_worldvla.data.samples import EpochDataset
from transformers_worldvla.training.adapters import add_lora, base_model, fingerprint, write_adapter_facts
from transformers_worldvla.training.datasets import (
    SampleOptions,
    Source,
    adopt_embodiments,
    training_set,
    validation_sets,
)
from transformers_worldvla.training.trainer import prepare_model


class WorldVLASFTTrainer(SFTTrainer):
    """`SFTTrainer` whose loss is the model's: sample weights, alpha, reduction and z-loss of the checkpoint's config.

    Args:
        samples: data sets of samples by name; `train` is trained on, the others are evaluated.
        processor: builds the sequences. Its robots become the model's.
        kwargs: as for `SFTTrainer`.
    """

    def __init__(self, model: Any, args: SFTConfig, samples: Mapping[str, Any], processor: Any, **kwargs: Any):
        prepare_model(model, args, processor)  # freezes the image tokenizer, writes the robot's sizes into the config
        rows = {name: _numbers(name, dataset) for name, dataset in samples.items()}
        collate = WorldVLADataCollator(processor)
        super().__init__(
            model,
            args,
            data_collator=lambda batch: collate([samples[row["set"]][row["item"]] for row in batch]),
            train_dataset=rows.pop("train"),
            eval_dataset=rows or None,
            processing_class=processor.tokenizer,
            **kwargs,
        )
        self.processing_class = None  # else the Trainer adds the tokenizer's </s> to the separator that ends generation
        if isinstance(samples["train"], EpochDataset):
            self.add_callback(EpochCallback(samples["train"]))

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of the model's own forward, as a mean over this batch."""
        # one position: in evaluation the model would also give logits of all positions, which nobody reads
        outputs = model(**inputs, logits_to_keep=1)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


def _numbers(name: str, dataset: Any) -> Dataset:
    """Rows that name the samples: SFTTrainer takes a `datasets.Dataset` only."""
    return Dataset.from_dict({"set": [name] * len(dataset), "item": range(len(dataset))})


def sft_config(output: str, **fields: Any) -> SFTConfig:
    """TRL's settings, with those that WorldVLA needs."""
    needed = {
        "dataset_kwargs": {"skip_prepare_dataset": True},  # there is no text to tokenize
        "remove_unused_columns": False,  # rows are numbers of samples, not arguments of the model
        "max_length": None,  # nothing is cut
        "bf16": torch.cuda.is_available(),  # TRL: always
    }
    return SFTConfig(output_dir=output, **{**needed, **fields})


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", required=True, help="made by `worldvla tokenize`: a folder or a Hub id")
    parser.add_argument("--model", required=True, help="the checkpoint that the cache was made with")
    parser.add_argument("--output", required=True)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--lora", action="store_true", help="train an adapter (try --learning-rate 5e-4)")
    args = parser.parse_args(arguments)

    processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(args.model, trust_remote_code=True, dtype=torch.float32)
    source = Source.from_cache(FrameTokenCache(args.cache).verify(model, processor))
    adopt_embodiments(processor, [source])
    options = SampleOptions(num_actions=processor.num_actions, history=processor.history)
    samples = {"train": training_set([source], options), **validation_sets([source], options)}
    base = fingerprint(model)
    if args.lora:
        model = add_lora(model)
    config = sft_config(
        args.output,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        report_to=[],
    )
    trainer = WorldVLASFTTrainer(model, config, samples, processor)
    trainer.train()
    base_model(model).config.use_cache = True  # the Trainer turned it off
    trainer.save_model(args.output)
    processor.save_pretrained(args.output)
    if args.lora:
        write_adapter_facts(args.output, base_model(model).config, base)


if __name__ == "__main__":
    main()
