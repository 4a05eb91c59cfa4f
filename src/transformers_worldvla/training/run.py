"""One training run in one folder: started, continued after a kill, finished as a complete checkpoint.

    OUTPUT/run.json         what was asked for; the same command goes on, another one is refused
    OUTPUT/trainer/         the Trainer's own checkpoints, logs and sample pictures
    OUTPUT/*                at the end the checkpoint, or the adapter, with processor, card and statistics
    OUTPUT/training_log.json, OUTPUT/merged/

It knows the order of things; what a sample, a loss or an adapter is, others know.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import set_seed

from ..card_worldvla import CARD_NAME
from ..configuration_worldvla import WorldVLAConfig
from ..data import WorldVLADataCollator
from ..durable import write_json
from .adapters import STATISTICS_FILE, base_model, cast_decoder, is_peft_model
from .arguments import WorldVLATrainingArguments
from .callbacks import SamplePicturesCallback
from .card import write_training_card
from .datasets import SampleOptions, Source, training_set, validation_sets
from .recipes import RECIPES, Recipe, load_for_training
from .trainer import WorldVLATrainer

RUN_FILE, LOG_FILE, STATE_FILE = "run.json", "training_log.json", "trainer_state.json"
TRAINER_FOLDER = "trainer"
SCHEDULES = {"constant": "constant_with_warmup", "cosine": "cosine"}  # of the learning rate, after the warm-up


@dataclass
class RunSettings:
    """What decides a run's result. `None` is the recipe's or the checkpoint's own value.

    `steps` (optimizer steps) wins over `epochs`. `checkpoint` is a folder or Hub id, `revision` belongs to the latter.
    """

    checkpoint: str
    recipe: str
    samples: SampleOptions
    revision: str | None = None
    steps: int | None = None
    epochs: float | None = None
    batch_size: int | None = None
    accumulation: int | None = None
    learning_rate: float | None = None
    lora_rank: int = 32
    lora_tokens: Sequence[str] = ("action",)
    schedule: str | None = None
    warmup_steps: int | None = None
    moved_weight: float = 1.0
    action_jitter: float = 0.0
    code_noise: float = 0.0
    packing: bool = False
    max_length: int | None = None
    bf16: bool = False
    seed: int | None = None

    @property
    def hyper_parameters(self) -> Recipe:
        return RECIPES[self.recipe]


@dataclass
class RunOptions:
    """What may change when a run goes on."""

    output: Path
    use_cpu: bool = False
    log_every: int = 10
    eval_every: int | None = 500
    save_every: int = 500
    report_to: Sequence[str] = ()
    sample_pictures: int = 0
    dataloader_workers: int = 0
    gradient_checkpointing: bool | None = None
    resume: Path | None = None
    deepspeed: str | None = None
    fsdp_config: str | None = None


# ---------------------------------------------------------------- the plan of a run


def training_arguments(settings: RunSettings, options: RunOptions, num_samples: int) -> WorldVLATrainingArguments:
    """The Trainer's arguments: the recipe's, overridden by what the settings say. Raises ValueError for no steps."""
    recipe = settings.hyper_parameters
    values = dict(recipe.arguments)
    values["seed"] = settings.seed if settings.seed is not None else values.get("seed", 0)
    if settings.batch_size is not None:
        values["per_device_train_batch_size"] = settings.batch_size
    if settings.learning_rate is not None:
        values["learning_rate"] = settings.learning_rate
    if settings.schedule is not None:
        values["lr_scheduler_type"] = SCHEDULES[settings.schedule]
    if options.gradient_checkpointing is not None:
        values["gradient_checkpointing"] = options.gradient_checkpointing
    if options.deepspeed:
        values["deepspeed"] = options.deepspeed
    if options.fsdp_config:
        values |= {"fsdp": True, "fsdp_config": options.fsdp_config}
    if values.get("gradient_checkpointing"):
        values["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    ranks, batch = int(os.environ.get("WORLD_SIZE", 1)), values["per_device_train_batch_size"]
    accumulation = settings.accumulation or recipe.accumulation(batch, ranks)
    per_epoch = steps_per_epoch(num_samples, batch * ranks, accumulation, bool(values.get("dataloader_drop_last")))
    if per_epoch == 0:
        raise ValueError(f"{num_samples} training samples do not fill one batch of {batch * ranks}: lower --batch-size")
    epochs = settings.epochs if settings.epochs is not None else recipe.epochs
    steps = settings.steps or math.ceil(epochs * per_epoch)
    warmup = settings.warmup_steps or math.ceil(recipe.warmup_epochs * per_epoch)
    return WorldVLATrainingArguments(
        output_dir=str(options.output / TRAINER_FOLDER),
        max_steps=steps,
        warmup_steps=min(steps, warmup),
        gradient_accumulation_steps=accumulation,
        per_device_eval_batch_size=batch,
        bf16=settings.bf16,
        use_cpu=options.use_cpu,
        logging_steps=options.log_every,
        logging_first_step=True,
        eval_strategy="no" if options.eval_every is None else "steps",
        eval_steps=options.eval_every,
        save_strategy="steps",
        save_steps=options.save_every,
        save_total_limit=2,
        report_to=list(options.report_to),
        dataloader_num_workers=options.dataloader_workers,
        ddp_find_unused_parameters=False,
        **values,
    )


def steps_per_epoch(num_samples: int, samples_per_batch: int, accumulation: int, drop_last: bool) -> int:
    """Optimizer steps of one pass over the data, as the Trainer counts them."""
    batches = num_samples // samples_per_batch if drop_last else math.ceil(num_samples / samples_per_batch)
    return math.ceil(batches / accumulation)


# ---------------------------------------------------------------- going on


def describe_run(settings: RunSettings, sources: Sequence[Source]) -> dict[str, Any]:
    """What must be the same for a run to go on, ready for JSON."""
    data = [{"fingerprint": source.fingerprint, "weight": source.weight} for source in sources]
    return json.loads(json.dumps({**asdict(settings), "data": data}))


def check_output(output: Path, run: dict[str, Any]) -> bool:
    """Whether the folder holds this very run already.

    Raises ValueError when it holds another run, or other files than the caches made for this one.
    """
    file = output / RUN_FILE
    if not file.exists():
        foreign = [each.name for each in output.iterdir() if each.name != "cache"] if output.is_dir() else []
        if foreign:
            raise ValueError(f"{output} is not empty ({sorted(foreign)[0]}) and holds no run: choose another --output")
        return False
    document = json.loads(file.read_text(encoding="utf-8"))
    before = document["settings"]
    if before == run:
        return True
    if "result" not in document and last_checkpoint(output / TRAINER_FOLDER) is None:
        return False  # it had not come to anything
    differing = [name for name in sorted({*before, *run}) if before.get(name) != run.get(name)]
    changed = "; ".join(f"{name} was {_short(before.get(name))}, is {_short(run.get(name))}" for name in differing)
    raise ValueError(f"{output} holds another run ({changed}): give the same arguments to go on, or another --output")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of the Trainer: one that was killed while being written does not count."""
    found = []
    for each in folder.glob("checkpoint-*"):
        number = each.name.removeprefix("checkpoint-")
        if number.isdecimal() and is_whole(each):
            found.append((int(number), each))
    return max(found)[1] if found else None


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end: the state of the run comes last."""
    try:
        json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


# ---------------------------------------------------------------- the run


def run_training(
    settings: RunSettings, options: RunOptions, processor: Any, sources: Sequence[Source]
) -> dict[str, Any]:
    """Train, or go on, or find the run finished. Returns the facts of the finished run, with its last metrics.

    `processor` is that of the checkpoint with the robots of `sources` (`adopt_embodiments`).
    """
    run = describe_run(settings, sources)
    if check_output(options.output, run):
        document = json.loads((options.output / RUN_FILE).read_text(encoding="utf-8"))
        if "result" in document:
            return document["result"]
    train, validation = training_set(sources, settings.samples), validation_sets(sources, settings.samples)
    if not validation:
        options.eval_every = None
    arguments = training_arguments(settings, options, len(train))
    if arguments.should_save:
        options.output.mkdir(parents=True, exist_ok=True)
        write_json(options.output / RUN_FILE, {"settings": run})
    processor.num_actions, processor.history = settings.samples.num_actions, settings.samples.history
    set_seed(arguments.seed)  # of the new weights of an adapter
    model = load_for_training(
        settings.checkpoint,
        settings.hyper_parameters,
        settings.bf16,
        {"rank": settings.lora_rank, "token_kinds": settings.lora_tokens},
        **({"revision": settings.revision} if settings.revision else {}),
    )
    trainer = _trainer(model, arguments, processor, train, validation, settings, options)
    resume = options.resume or last_checkpoint(Path(arguments.output_dir))
    output = trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    metrics = {name: value for name, value in output.metrics.items() if name.startswith("train_")}
    history = trainer.state.log_history
    for entry in history:
        metrics |= {name: value for name, value in entry.items() if name.startswith("eval_")}
    result = {
        "output": str(options.output),
        "recipe": settings.recipe,
        "model": settings.checkpoint,
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "resumed_from": None if resume is None else resume.name,
        "metrics": metrics,
    }
    _finish(trainer, settings, options, sources, result)
    if trainer.args.should_save:
        write_json(options.output / LOG_FILE, history)
        write_json(options.output / RUN_FILE, {"settings": run, "result": result})
    return result


def _trainer(
    model: Any,
    arguments: WorldVLATrainingArguments,
    processor: Any,
    train: Any,
    validation: dict[str, Any],
    settings: RunSettings,
    options: RunOptions,
) -> WorldVLATrainer:
    collate = WorldVLADataCollator(
        processor,
        settings.packing,
        settings.max_length,
        embodiment_ids=True,
        moved_weight=settings.moved_weight,
        action_jitter=settings.action_jitter,
        code_noise=settings.code_noise,
    )
    callback = None
    if options.sample_pictures and (samples := world_samples(validation, options.sample_pictures)):
        callback = SamplePicturesCallback(processor, samples, Path(arguments.output_dir) / "samples")
    return WorldVLATrainer(
        model,
        arguments,
        collate,
        eval_data_collator=WorldVLADataCollator(processor, embodiment_ids=True),
        processing_class=processor,
        train_dataset=train,
        eval_dataset=validation or None,
        callbacks=[callback] if callback else None,
    )


def world_samples(validation: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """World-model samples of the first validation set that has some, evenly spaced."""
    for samples in validation.values():
        found = [number for number in range(len(samples)) if samples[number]["actions"] is not None]
        if found:
            places = np.linspace(0, len(found) - 1, min(count, len(found))).round().astype(int)
            return [samples[found[place]] for place in places.tolist()]
    return []


def _finish(
    trainer: WorldVLATrainer,
    settings: RunSettings,
    options: RunOptions,
    sources: Sequence[Source],
    result: dict[str, Any],
) -> None:
    """Write the checkpoint or adapter into the output folder."""
    from .. import __version__

    model, output = trainer.accelerator.unwrap_model(trainer.model), options.output
    config = base_model(model).config
    config.use_cache = True
    config.generator_version = __version__
    if not is_peft_model(model) and not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        revision = {"revision": settings.revision} if settings.revision else {}
        stored = WorldVLAConfig.from_pretrained(settings.checkpoint, **revision).dtype or torch.float32
        cast_decoder(model, stored)
        config.dtype = stored
    card = output / CARD_NAME
    if trainer.args.should_save:
        card.unlink(missing_ok=True)
    trainer.save_model(str(output))
    if not trainer.args.should_save:
        return
    (output / "training_args.bin").unlink(missing_ok=True)  # a pickle that no reader of the checkpoint needs
    write_json(output / STATISTICS_FILE, action_statistics(sources))
    adapter_of = settings.checkpoint if is_peft_model(model) else None
    write_training_card(card, config, [source.embodiment for source in sources], result, adapter_of)


def action_statistics(sources: Sequence[Source]) -> dict[str, Any]:
    """Mean and deviation (D,) of the training actions of the default robot, which is the first source's."""
    robot = sources[0].embodiment.name
    episodes = [each for source in sources if source.embodiment.name == robot for each in source.splits["train"]]
    actions = np.concatenate([episode.actions for episode in episodes]).astype(np.float64)
    return {"action_mean": actions.mean(0).tolist(), "action_std": actions.std(0).tolist(), "steps": len(actions)}
