"""A checkpoint for acting: the processor first, so that wrong names are found before gigabytes of weights are read.

A checkpoint is a folder or a Hub id, of a whole model or of an adapter (LoRA), which names its base itself.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
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

    register_auto_classes()
    base = adapter_base(source, revision)
    if base is not None and not _has_file(source, "processor_config.json", revision):
        return load_processor(base)
    with _one_line(source):
        config, _ = PreTrainedConfig.get_config_dict(base or str(source), **_options(base or source, revision))
    if not isinstance(config, dict) or not config:
        raise ValueError(f"{source} holds no checkpoint: config.json is missing")
    if (found := config.get("model_type")) != WorldVLAConfig.model_type:
        raise ValueError(
            f"{source} is a checkpoint of model type {found!r}, not {WorldVLAConfig.model_type!r}: "
            "`worldvla convert` makes one of the authors' and of Chameleon's"
        )
    return open_processor(source, revision)


def open_processor(source: str | Path, revision: str | None = None) -> Any:
    """The processor that lies beside a model or an adapter, whatever they are.

    Code of its own never runs: without `trust_remote_code=False` transformers would ask whether it may. Raises as
    `load_processor`.
    """
    from ..processing_worldvla import WorldVLAProcessor

    with _one_line(source):
        return WorldVLAProcessor.from_pretrained(str(source), trust_remote_code=False, **_options(source, revision))


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
    options = {"dtype": dtype, "output_loading_info": True, **_options(source, revision), **kwargs}
    safe = {"use_safetensors": True, "trust_remote_code": False}  # no pickle, no code of the checkpoint's own
    try:
        with _one_line(source, "the weights cannot be loaded"):
            model, info = WorldVLAForCausalLM.from_pretrained(str(source), **safe, **options)
    except OSError as error:
        raise ValueError(f"{source}: the weights cannot be loaded: {' '.join(str(error).split())}") from error
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
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    base = document.get("base_model_name_or_path") if isinstance(document, dict) else None
    if not isinstance(base, str) or not base or "\0" in base:
        raise ValueError(f"{source} is an adapter that does not name its base: set base_model_name_or_path in {path}")
    return base


@contextmanager
def _one_line(source: str | Path, what: str = "its files are damaged") -> Iterator[None]:
    """ValueError in one line that names the source for all that libraries raise when they read damaged files.

    What a file system or the Hub refuses (OSError) passes; packages that are missing stay an ImportError, in one line.
    """
    try:
        yield
    except (OSError, MemoryError):
        raise
    except ImportError as error:
        raise ImportError(f"{source}: {' '.join(str(error).split())}") from error
    except Exception as error:
        reason = " ".join(str(error).split())[:1000]
        kind = "" if isinstance(error, ValueError | RuntimeError | SafetensorError) else f"{type(error).__name__}: "
        raise ValueError(f"{source}: {what}: {kind}{reason}") from error


def _has_file(source: str | Path, name: str, revision: str | None) -> bool:
    from transformers.utils import has_file

    return (Path(source) / name).is_file() if Path(source).is_dir() else has_file(str(source), name, revision=revision)


def _options(source: str | Path, revision: str | None) -> dict[str, Any]:
    """A folder is read without asking the network."""
    return {"local_files_only": True} if Path(source).is_dir() else {"revision": revision}
