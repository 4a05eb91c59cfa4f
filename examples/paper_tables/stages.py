"""What a row needs, stage by stage; each goes on where it was killed and does nothing when it is done.

Training and both evaluations are the commands of `worldvla`, called in this process: nothing of them is repeated here.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rows import HORIZONS, Training
from store import BUDGET_FILE, SPEED_FILE, Store

CHECKPOINT_EVERY = 250  # optimizer steps
ANSWERS = 10  # that are timed, after one that is not


def worldvla(*arguments: object) -> None:
    """Run a command of the command line here. SystemExit with its exit code where it fails."""
    from transformers_worldvla.cli.main import main

    words = [str(argument) for argument in arguments]
    print(f"$ worldvla {' '.join(words)}", file=sys.stderr, flush=True)
    if code := main(words):
        raise SystemExit(code)


# -------------------------------------------------------------------- what all rows share


def begin(store: Store, caches: Sequence[Path], sizes: set[int]) -> None:
    """Keep the budget, and take in caches that were made before.

    Raises ValueError, before anything is written, where pictures of one of `sizes` pixels cannot be had.
    """

    from transformers_worldvla.data.cache import read_header
    from transformers_worldvla.durable import write_json

    given = {read_header(cache)["image_transform"]["target_size"]: cache for cache in caches}
    for px in sorted(sizes - given.keys()):
        if store.budget.dataset is None and not store.cache(px).exists():
            raise ValueError(f"--dataset DATA is needed, or --cache with pictures of {px} pixels")
    for px, cache in given.items():
        place = store.cache(px)
        if place.exists() and place.resolve() != cache.resolve():
            raise ValueError(f"{store.output} has a cache of {px} pixels already: {place.resolve()}")
    store.output.mkdir(parents=True, exist_ok=True)
    for px, cache in given.items():
        place = store.cache(px)
        if not place.exists():
            place.parent.mkdir(exist_ok=True)
            place.symlink_to(cache.resolve())
    write_json(store.output / BUDGET_FILE, asdict(store.budget))


def checkpoint_folder(model: str) -> Path:
    """The checkpoint that `--model` names: a folder, or the name of a bundled one."""
    from transformers_worldvla.assets import bundled_folder

    return Path(model) if Path(model).is_dir() else bundled_folder(model)


def make_start(store: Store, training: Training) -> Path:
    """An untrained checkpoint with a trained image tokenizer: the same weights whatever its mask and pictures."""
    from transformers import set_seed

    from transformers_worldvla import WorldVLAConfig, WorldVLAForCausalLM, WorldVLAProcessor
    from transformers_worldvla.data.image_tokenizer import load_image_tokenizer

    folder, source = store.start(training), str(checkpoint_folder(store.budget.model))
    if folder.is_dir():
        return folder
    config = WorldVLAConfig.from_pretrained(source)
    config.action_attention, config.world_loss_weight = training.action_attention, training.world_loss_weight
    config.action_bin_window = 0  # the paper decodes the likeliest bin, whatever the model that lends its sizes does
    set_seed(store.budget.seed)
    model = WorldVLAForCausalLM(config)
    model.model.vqmodel.load_state_dict(load_image_tokenizer(source).state_dict())
    processor = WorldVLAProcessor.from_pretrained(source)
    processor.image_processor.target_size = training.px
    partial = folder.with_name(f".{folder.name}.partial")
    model.save_pretrained(partial)
    processor.save_pretrained(partial)
    partial.replace(folder)
    return folder


def make_cache(store: Store, training: Training) -> Path:
    """The dataset's frames as tokens of that size. Raises ValueError for a cache that says nothing of raw pictures."""
    from transformers_worldvla import WorldVLAProcessor
    from transformers_worldvla.data.cache import HEADER, FrameTokenCache
    from transformers_worldvla.evaluation.libero_env import ROTATION

    folder, start = store.cache(training.px), make_start(store, training)
    if not (folder / HEADER).is_file():
        robot = WorldVLAProcessor.from_pretrained(start).get_embodiment().name
        # every task is trained, and scripted demonstrations keep the steps in which only the gripper moves
        options = ("--embodiment", robot, "--ood-share", 0, "--no-ops", "keep")
        worldvla("tokenize", store.budget.dataset, "--model", start, "--output", folder, *options)
    if FrameTokenCache(folder).embodiment.rotation != ROTATION:
        raise ValueError(f"{folder.resolve()}: LIBERO would stand on its head: make it with --rotation {ROTATION}")
    return folder


# -------------------------------------------------------------------- one row


def train(store: Store, training: Training) -> Path:
    """The trained checkpoint of a row."""
    folder = store.run(training)
    if store.is_trained(training):
        return folder
    start = make_start(store, training) if training.start_from is None else train(store, training.start_from)
    budget = store.budget
    precision = () if budget.precision is None else ("--precision", budget.precision)
    chosen = () if budget.instructions is None else ("--instructions", *budget.instructions)
    worldvla(
        "train",
        *("--recipe", "full", "--model", start, "--dataset", make_cache(store, training), "--output", folder),
        *chosen,
        *("--kinds", *training.kinds, "--num-actions", training.num_actions, "--history", training.history),
        *("--steps", budget.steps, "--batch-size", budget.batch_size, "--learning-rate", budget.learning_rate),
        *("--moved-weight", budget.moved_weight, *precision, "--seed", budget.seed, "--no-gradient-checkpointing"),
        *("--log-every", 50, "--eval-samples", 256),
        *("--eval-every", budget.steps, "--save-every", min(CHECKPOINT_EVERY, budget.steps)),
    )
    return folder


def evaluate_success(store: Store, training: Training, processes: int) -> None:
    """Closed loop in the simulator, on the first official initial states of every task."""
    budget = store.budget
    limit = () if budget.max_steps is None else ("--max-steps", budget.max_steps)
    worldvla(
        *("evaluate", "libero", "--model", store.run(training), "--output", store.success(training)),
        *("--suite", budget.suite, "--tasks", budget.tasks, "--trials", budget.trials, *limit),
        *("--seed", budget.seed, "--workers", processes, "--videos", 0),
    )


def evaluate_frames(store: Store, training: Training) -> None:
    """Imagined rollouts of the validation episodes."""
    budget = store.budget
    if store.imagined(training) is not None:
        return
    if budget.dataset is None:
        raise ValueError("the rows of Table 4 compare with recorded pictures: give --dataset")
    limit = () if budget.clips is None else ("--clips", budget.clips)
    worldvla(
        *("evaluate", "world-model", "--model", store.run(training), "--output", store.frames(training)),
        *("--episodes", budget.dataset, "--cache", store.cache(training.px), "--split", "val_ind"),
        *("--horizons", *HORIZONS, "--gifs", 1, *limit),
    )


def measure_speed(store: Store, trainings: Sequence[Training]) -> None:
    """Time an answer of each model, in turns, so that other work on the machine falls on all alike.

    The models are untrained: how long an answer takes does not depend on its weights.
    """

    import numpy as np
    import torch

    from transformers_worldvla.durable import write_json

    trainings = list(dict.fromkeys(trainings))
    if {store.name(training) for training in trainings} <= store.speeds().keys():
        return
    answers = {store.name(training): _answerer(store, training) for training in trainings}
    seconds: dict[str, list[float]] = {name: [] for name in answers}
    for turn in range(ANSWERS + 1):
        for name, answer in answers.items():
            began = time.perf_counter()
            answer(turn)
            seconds[name].append(time.perf_counter() - began)
    report = {}
    for training in trainings:
        median = float(np.median(seconds[store.name(training)][1:]))
        report[store.name(training)] = {
            "seconds": median,
            "actions_per_second": training.num_actions / median,
            "answers": ANSWERS,
            "threads": torch.get_num_threads(),
            "device": "cuda" if torch.cuda.is_available() else "cpu",
        }
    write_json(store.output / SPEED_FILE, report)


def _answerer(store: Store, training: Training) -> Any:
    """A function that answers one query, number `turn`, as an evaluation's planner does."""
    import numpy as np

    from transformers_worldvla.cli.checkpoints import find_checkpoint, load_model, load_processor
    from transformers_worldvla.evaluation.policies import ModelPlanner, PlanRequest

    checkpoint = find_checkpoint(str(make_start(store, training)))
    model, processor = load_model(checkpoint), load_processor(checkpoint)
    processor.num_actions, processor.history = training.num_actions, training.history
    text = "put the bowl on the stove"
    planner = ModelPlanner(model, processor, {store.budget.suite: [text]})
    frames = np.random.default_rng(0).integers(0, 256, (training.history, 1, 256, 256, 3), np.uint8)
    seen_anew = min(training.history, training.num_actions)  # of the M frames, after a chunk

    def answer(turn: int) -> None:
        shown = frames if turn == 0 else frames[:seen_anew]
        planner.plan([PlanRequest("speed", store.budget.suite, text, shown, turn == 0, seed=0)])

    return answer
