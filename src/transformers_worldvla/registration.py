"""Makes transformers' Auto classes know WorldVLA."""

import multiprocessing
import sys
from itertools import pairwise
from pathlib import Path

SIMULATOR_PROCESS = "worldvla-simulator"  # name of the processes of `evaluation.workers`: they load no model


def register_auto_classes() -> None:
    """Register config, model, image processor and processor with transformers' Auto classes; repeatable.

    `AutoModel` gives the same class as `AutoModelForCausalLM`, which acts out of the box.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor

    # not from the top level, where transformers 5.5 hides it when torchvision is not installed
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    from .configuration_worldvla import WorldVLAConfig
    from .image_processing_worldvla import WorldVLAImageProcessor
    from .modeling_worldvla import WorldVLAForCausalLM
    from .processing_worldvla import WorldVLAProcessor

    AutoConfig.register(WorldVLAConfig.model_type, WorldVLAConfig, exist_ok=True)
    AutoModel.register(WorldVLAConfig, WorldVLAForCausalLM, exist_ok=True)
    AutoModelForCausalLM.register(WorldVLAConfig, WorldVLAForCausalLM, exist_ok=True)
    AutoImageProcessor.register(WorldVLAConfig, WorldVLAImageProcessor, exist_ok=True)
    AutoProcessor.register(WorldVLAConfig, WorldVLAProcessor, exist_ok=True)


def is_command_line() -> bool:
    """Whether this process is the `worldvla` command of this environment, or `python -m transformers_worldvla.cli`.

    So is a simulator that the command started; other workers inherit the arguments, but never get to the command line.
    """
    if multiprocessing.parent_process() is not None:
        return multiprocessing.current_process().name.startswith(SIMULATOR_PROCESS)
    command = Path(sys.argv[0]).absolute().with_suffix("") if sys.argv else None
    is_script = command == Path(sys.executable).with_name("worldvla")
    return is_script or ("-m", "transformers_worldvla.cli") in pairwise(sys.orig_argv)
