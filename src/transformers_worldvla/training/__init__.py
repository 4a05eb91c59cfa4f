"""Training: the Trainer with the exact loss under accumulation and ranks, recipes, adapters, memory estimates."""

from .adapters import add_lora, is_adapter, merge_adapter
from .arguments import WorldVLATrainingArguments
from .callbacks import RolloutCallback, SamplePicturesCallback
from .estimate import MemoryEstimate, estimate_memory
from .recipes import RECIPES, Recipe
from .trainer import WorldVLATrainer

__all__ = [
    "RECIPES",
    "MemoryEstimate",
    "Recipe",
    "RolloutCallback",
    "SamplePicturesCallback",
    "WorldVLATrainer",
    "WorldVLATrainingArguments",
    "add_lora",
    "estimate_memory",
    "is_adapter",
    "merge_adapter",
]
