"""WorldVLA, an autoregressive action world model, as an ordinary Hugging Face model.

Importing this package registers WorldVLA with the Auto classes of transformers, so that `AutoModelForCausalLM` and
`AutoProcessor` load a checkpoint with this installed code: no `trust_remote_code`, no prompt.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .registration import is_command_line, register_auto_classes

if TYPE_CHECKING:
    from .configuration_worldvla import WorldVLAConfig, WorldVLAVQVAEConfig
    from .data import WorldVLADataCollator
    from .image_processing_worldvla import WorldVLAImageProcessor
    from .modeling_worldvla import WorldVLAForCausalLM, WorldVLAModel
    from .processing_worldvla import WorldVLAProcessor
    from .serving.policy import WorldVLAPolicy
    from .tokens_worldvla import WorldVLATokens
    from .training import WorldVLATrainer, WorldVLATrainingArguments
    from .vqvae_worldvla import WorldVLAVQVAE

__version__ = "0.1.0"

__all__ = [
    "WorldVLAConfig",
    "WorldVLADataCollator",
    "WorldVLAForCausalLM",
    "WorldVLAImageProcessor",
    "WorldVLAModel",
    "WorldVLAPolicy",
    "WorldVLAProcessor",
    "WorldVLATokens",
    "WorldVLATrainer",
    "WorldVLATrainingArguments",
    "WorldVLAVQVAE",
    "WorldVLAVQVAEConfig",
    "register_auto_classes",
]

_MODULE_OF = {
    "WorldVLAConfig": "configuration_worldvla",
    "WorldVLADataCollator": "data",
    "WorldVLAForCausalLM": "modeling_worldvla",
    "WorldVLAImageProcessor": "image_processing_worldvla",
    "WorldVLAModel": "modeling_worldvla",
    "WorldVLAPolicy": "serving.policy",
    "WorldVLAProcessor": "processing_worldvla",
    "WorldVLATokens": "tokens_worldvla",
    "WorldVLATrainer": "training",
    "WorldVLATrainingArguments": "training",
    "WorldVLAVQVAE": "vqvae_worldvla",
    "WorldVLAVQVAEConfig": "configuration_worldvla",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if not is_command_line():  # the command line registers when a command runs: `worldvla --help` need not load torch
    register_auto_classes()
