"""A checkpoint for acting: the processor first, so that wrong names are found before gigabytes of weights are read.

A checkpoint is a folder or a Hub id, of a whole model or of an adapter (LoRA), which names its base itself.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..registration import register_auto_classes


def load_processor(source: str | Path, revision: str | None = None) -> Any:
    """The processor of a checkpoint; that of its base for an adapter that has none. Reads no weights.

    Raises ValueError or OSError, one line, when there is no WorldVLA checkpoint.
    """
    from transformers import PreTrainedConfig

    from ..configuration_worldvla import WorldVLAConfig
    from ..processing_worldvla import WorldVLAProcessor

    register_auto_classes()
    base = adapter_base(source, revision)
    if base is not None and not _has_file(source, "processor_config.json", revision):
        return load_processor(base)
    config, _ = PreTrainedConfig.get_config_dict(base or str(source), **_options(base or source, revision))
    if not config:
        raise ValueError(f"{source} holds no checkpoint: config.json is missing")
    if (found := config.get("model_type")) != WorldVLAConfig.model_type:
        raise ValueError(
            f"{source} is a checkpoint of model type {found!r}, not {WorldVLAConfig.model_type!r}: "
            "`worldvla convert` makes one of the authors' and of Chameleon's"
        )
    return WorldVLAProcessor.from_pretrained(str(source), **_options(source, revision))


def load_model(
    source: str | Path, revision: str | None, device: torch.device, dtype: Any = "auto", **kwargs: Any
) -> Any:
    """The model of a checkpoint or of an adapter over its base, in evaluation mode.

    Args:
        device: of `choose_device`; quantised weights stay where they are.
        kwargs: for `from_pretrained` (`attn_implementation`, `quantization_config` ...).

    Raises ValueError when weights are damaged or missing, ImportError that names the extra when an adapter finds no
    peft.
    """
    from ..modeling_worldvla import WorldVLAForCausalLM

    if adapter_base(source, revision) is not None:
        try:
            import peft  # noqa: F401  transformers loads the adapter with it
        except ModuleNotFoundError:
            raise ImportError(
                f'{source} is an adapter, which needs peft: pip install "transformers_worldvla[train]"'
            ) from None
    try:
        model, info = WorldVLAForCausalLM.from_pretrained(
            str(source), dtype=dtype, output_loading_info=True, **_options(source, revision), **kwargs
        )
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{source}: the weights cannot be loaded: {reason}") from error
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{source}: the weights lack {missing[0]} ({len(missing)} missing in all)")
    if getattr(model, "hf_quantizer", None) is None and "device_map" not in kwargs:
        model = model.to(device)
    return model.eval()


def choose_device(device: str) -> torch.device:
    """The torch device of that name; "auto" is CUDA where there is some, else the CPU. ValueError for one not here."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"the device {device!r} cannot be used here: {str(error).strip().splitlines()[0]}") from error
    return chosen


def adapter_base(source: str | Path, revision: str | None = None) -> str | None:
    """The checkpoint that an adapter belongs to, None for a whole model."""
    from transformers.utils import cached_file

    path = cached_file(
        str(source), "adapter_config.json", _raise_exceptions_for_missing_entries=False, **_options(source, revision)
    )
    if path is None:
        return None
    base = json.loads(Path(path).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{source} is an adapter that does not name its base: set base_model_name_or_path in {path}")
    return str(base)


def _has_file(source: str | Path, name: str, revision: str | None) -> bool:
    from transformers.utils import has_file

    return (Path(source) / name).is_file() if Path(source).is_dir() else has_file(str(source), name, revision=revision)


def _options(source: str | Path, revision: str | None) -> dict[str, Any]:
    """A folder is read without asking the network."""
    return {"local_files_only": True} if Path(source).is_dir() else {"revision": revision}
