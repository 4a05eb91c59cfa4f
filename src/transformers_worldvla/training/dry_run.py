"""What a run would be, without loading the decoder: sequence lengths, memory, steps and one sample in words."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..configuration_worldvla import WorldVLAConfig
from ..data import WorldVLADataCollator
from ..loss_worldvla import IGNORE_INDEX
from .datasets import Source, training_set, validation_sets
from .estimate import ParameterCounts, count_parameters, estimate_memory, size_text
from .preview import describe_batch_row, length_histogram
from .run import RunOptions, RunSettings, steps_per_epoch, training_arguments

MEASURED_SAMPLES = 512


@dataclass
class DryRun:
    """The facts; `str()` gives them to people, `to_dict()` to programs."""

    model: str
    recipe: str
    datasets: list[dict[str, Any]]
    samples: dict[str, int]
    validation: dict[str, int]
    lengths: list[tuple[int, int, int]]
    longest: int
    batch_size: int
    accumulation: int
    steps: int
    steps_per_epoch: int
    warmup_steps: int
    learning_rate: float
    parameters: ParameterCounts
    memory: dict[str, int]
    sample: list[str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.recipe} on {self.model}", ""]
        for data in self.datasets:
            counts = ", ".join(f"{name} {count} episodes" for name, count in data["episodes"].items())
            share = "" if data["weight"] is None else f", weight {data['weight']:g}"
            lines.append(f"{data['name']}: robot {data['robot']} (D={data['action_dim']}), {counts}{share}")
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.samples.items())
        held = ", ".join(f"{name} {count}" for name, count in self.validation.items()) or "none"
        lines += [f"training samples an epoch: {kinds}; validation samples: {held}", "", "tokens of a sample:"]
        most = max(count for _, _, count in self.lengths)
        for low, high, count in self.lengths:
            lines.append(f"  {low:5d} .. {high:5d}  {'#' * max(1, round(40 * count / most))} {count}")
        trained = f"{self.parameters.trained / 1e6:.2f} M trained weights"
        lines += [
            "",
            f"{self.steps} steps ({self.steps_per_epoch} an epoch, {self.warmup_steps} of warm-up) of "
            f"{self.batch_size} x {self.accumulation} samples, learning rate {self.learning_rate:g}, {trained}",
            f"memory of a device, estimated for rows of {self.longest} tokens, without sharding: "
            + ", ".join(f"{name} {size_text(size)}" for name, size in self.memory.items()),
            "",
            "one sample (* carries loss):",
            *self.sample,
        ]
        return "\n".join(lines)


def dry_run(settings: RunSettings, options: RunOptions, processor: Any, sources: Sequence[Source]) -> DryRun:
    """Look at a run. `processor` has the robots of `sources`, as for `run_training`."""
    train, validation = training_set(sources, settings.samples), validation_sets(sources, settings.samples)
    arguments = training_arguments(settings, options, len(train))
    # padded one by one: the lengths are the samples' own
    collate = WorldVLADataCollator(processor, max_length=settings.max_length)
    chosen = np.linspace(0, len(train) - 1, min(len(train), MEASURED_SAMPLES)).round().astype(int).tolist()
    rows = [collate([train[number]]) for number in chosen]
    lengths = [row["input_ids"].shape[1] for row in rows]
    labelled = max(int((row["labels"] != IGNORE_INDEX).sum()) for row in rows)
    counts: dict[str, int] = {}
    for stratum in train.strata:
        counts[stratum.kind] = counts.get(stratum.kind, 0) + stratum.per_epoch
    batch, recipe = arguments.per_device_train_batch_size, settings.hyper_parameters
    config = WorldVLAConfig.from_pretrained(
        settings.checkpoint, **({"revision": settings.revision} if settings.revision else {})
    )
    memory = estimate_memory(
        config,
        recipe,
        batch,
        max(lengths),
        labelled,
        settings.bf16,
        arguments.gradient_checkpointing,
        settings.lora_rank,
        settings.lora_tokens,
    )
    drop_last = arguments.dataloader_drop_last
    per_batch, accumulation = batch * arguments.world_size, arguments.gradient_accumulation_steps
    first = train[chosen[0]]
    return DryRun(
        model=settings.checkpoint,
        recipe=f"{recipe.name} ({recipe.summary})",
        datasets=[_describe(source) for source in sources],
        samples=counts,
        validation={name: len(samples) for name, samples in validation.items()},
        lengths=length_histogram(lengths),
        longest=max(lengths),
        batch_size=batch,
        accumulation=accumulation,
        steps=arguments.max_steps,
        steps_per_epoch=steps_per_epoch(len(train), per_batch, accumulation, drop_last),
        warmup_steps=int(arguments.warmup_steps),
        learning_rate=arguments.learning_rate,
        parameters=count_parameters(config, recipe, settings.lora_rank, settings.lora_tokens),
        memory=memory.to_dict(),
        sample=[first["source"], *describe_batch_row(rows[0], 0, processor, first["embodiment"])],
    )


def _describe(source: Source) -> dict[str, Any]:
    return {
        "name": source.name,
        "robot": source.embodiment.name,
        "action_dim": source.embodiment.action_dim,
        "weight": source.weight,
        "episodes": {split: len(episodes) for split, episodes in source.splits.items()},
    }
