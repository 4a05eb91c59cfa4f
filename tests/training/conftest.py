"""Processors of the small checkpoint, and trainers of fresh small models."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_checkpoint import GANTRY, LIBERO, small_model, small_processor

from transformers_worldvla import WorldVLATrainer, WorldVLATrainingArguments


@pytest.fixture
def processor() -> Any:
    return small_processor()


@pytest.fixture
def two_robots() -> Any:
    """A processor of LIBERO's arm (D=7) and a gantry (D=3)."""
    return small_processor(LIBERO, GANTRY)


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., WorldVLATrainer]:
    """A trainer of a small model: `make_trainer(processor, samples, learning_rate=1e-3, ...)`."""

    def make(processor: Any, samples: Any, model: Any = None, **arguments: Any) -> WorldVLATrainer:
        own = {
            name: arguments.pop(name) for name in ("eval_dataset", "callbacks", "data_collator") if name in arguments
        }
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 2,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "dropout": 0.0,
        }
        return WorldVLATrainer(
            small_model(processor) if model is None else model,
            WorldVLATrainingArguments(**{**defaults, **arguments}),
            processing_class=processor,
            train_dataset=samples,
            **own,
        )

    return make
