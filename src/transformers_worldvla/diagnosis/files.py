"""Is a checkpoint folder complete: its files, its weights down to names, shapes and numbers, the code it carries.

Reads headers first and tensors one at a time, so that a folder of many gigabytes needs the memory of one tensor. No
model is built, no code of the checkpoint runs, no network is used.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .report import FAILED, OK, SKIPPED, WARNING, Finding

ADAPTER_CONFIG, ADAPTER_WEIGHTS, ADAPTER_FACTS = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "worldvla_adapter.json",
)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PROCESSOR_FILES = ("processor_config.json", "tokenizer.json", "tokenizer_config.json")
CODE_ENTRY_FILES = ("config.json", "processor_config.json")
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
SOURCE = Path(__file__).resolve().parents[1]  # where the modules that travel with a checkpoint lie
WEIGHT_FILE = re.compile(r"[\w.-]+\.safetensors").fullmatch
_RELATIVE_IMPORT = re.compile(r"^\s*from\s+\.(\w+)\s+import\s", re.MULTILINE)
_AGAIN = "download or save the checkpoint again"


def is_adapter(folder: Path) -> bool:
    """Whether this is the folder of an adapter."""
    return (folder / ADAPTER_CONFIG).is_file()


def check_folder(folder: Path) -> list[Finding]:
    """The checks `files`, `weights` and `code` of a checkpoint or of an adapter."""
    return [check_files(folder), check_weights(folder), check_code(folder)]


# -------------------------------------------------------------------- files


def check_files(folder: Path) -> Finding:
    """Every file that loading needs is there and what should be JSON is; pickles are warned of."""
    wanted = [ADAPTER_CONFIG, ADAPTER_FACTS] if is_adapter(folder) else ["config.json"]
    missing = [name for name in (*wanted, *PROCESSOR_FILES) if not (folder / name).is_file()]
    missing += _missing_weights(folder)
    if missing:
        return Finding("files", FAILED, f"missing: {', '.join(missing)}", _AGAIN, {"missing": missing})
    if damaged := [path.name for path in sorted(folder.glob("*.json")) if not _is_json(path)]:
        return Finding("files", FAILED, f"no JSON: {', '.join(damaged)}", _AGAIN, {"damaged": damaged})
    if is_adapter(folder) and (folder / "config.json").exists():
        found = "an adapter with a config.json, which transformers takes for a whole model"
        return Finding("files", FAILED, found, f"delete {folder / 'config.json'}")
    if pickles := sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES):
        found = f"complete, but {', '.join(pickles)} may be pickles, which run code when they are opened"
        return Finding("files", WARNING, found, "delete them: nothing here needs them", {"pickles": pickles})
    count = sum(path.is_file() for path in folder.iterdir())
    return Finding("files", OK, f"complete ({count} files)", numbers={"files": count})


def _missing_weights(folder: Path) -> list[str]:
    if is_adapter(folder):
        return [] if (folder / ADAPTER_WEIGHTS).is_file() else [ADAPTER_WEIGHTS]
    if not (folder / INDEX).is_file():
        return [] if (folder / WEIGHTS).is_file() else [f"{WEIGHTS} (or {INDEX})"]
    try:
        return [name for name in _shards(folder) if not (folder / name).is_file()]
    except (ValueError, RecursionError):
        return []  # no index: `check_files` says that it is no JSON, `check_weights` the rest


def _shards(folder: Path) -> list[str]:
    """Names of the weight files."""
    if is_adapter(folder):
        return [ADAPTER_WEIGHTS]
    if (folder / INDEX).is_file():
        return sorted(set(_weight_map(folder).values()))
    return [WEIGHTS]


def _weight_map(folder: Path) -> dict[str, str]:
    """Weight -> the file of this folder that holds it. Raises ValueError."""
    document = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    places = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(places, dict) or not all(isinstance(name, str) and WEIGHT_FILE(name) for name in places.values()):
        raise ValueError(f"{INDEX} does not say which files of the folder hold the weights")
    return places


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return False
    return True


# -------------------------------------------------------------------- weights


def check_weights(folder: Path) -> Finding:
    """Weight files are whole, hold every weight of the configured model in its shape, and only finite numbers."""
    from safetensors import SafetensorError

    try:
        shapes, not_finite = _read_weights(folder)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        return Finding("weights", FAILED, f"cannot be read: {' '.join(str(error).split())}", _AGAIN)
    if not_finite:
        found = f"{len(not_finite)} weights hold NaN or infinity, {not_finite[0]} the first"
        return Finding("weights", FAILED, found, "training diverged: take an earlier checkpoint")
    count = sum(torch.Size(shape).numel() for shape in shapes.values())
    numbers = {"tensors": len(shapes), "parameters": count}
    if is_adapter(folder):
        return Finding("weights", OK, f"adapter of {count:,} parameters, all finite", numbers=numbers)
    try:
        wanted, tied = _configured_shapes(folder)
    except Exception as error:  # transformers raises whatever it likes on fields that make no sense
        found = f"config.json describes no model: {type(error).__name__}: {' '.join(str(error).split())[:500]}"
        return Finding("weights", FAILED, found, _AGAIN)
    missing = sorted(wanted.keys() - shapes.keys() - tied)
    differing = [name for name in sorted(wanted.keys() & shapes.keys()) if wanted[name] != shapes[name]]
    unused = sorted(shapes.keys() - wanted.keys())
    if missing or differing:
        found = f"{len(missing)} missing" + (f" ({missing[0]}, ...)" if missing else "")
        if differing:
            name = differing[0]
            found += f"; {len(differing)} of other shape ({name} {list(shapes[name])}, not {list(wanted[name])})"
        advice = "config.json and weights belong to different checkpoints, or saving was interrupted: " + _AGAIN
        return Finding("weights", FAILED, found, advice, numbers)
    if unused:
        found = f"{len(unused)} tensors that the model does not have ({unused[0]}, ...) are ignored and lost on saving"
        return Finding("weights", WARNING, found, "load and save the checkpoint once to be rid of them", numbers)
    return Finding("weights", OK, f"{count:,} parameters, all there and finite", numbers=numbers)


def _read_weights(folder: Path) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Shape of every stored tensor, and the names of those that hold NaN or infinity."""
    shapes, not_finite = {}, []
    for name, tensor in _tensors(folder):
        shapes[name] = tuple(tensor.shape)
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            not_finite.append(name)
    if (folder / INDEX).is_file() and not is_adapter(folder):
        places = _weight_map(folder)
        if absent := sorted(places.keys() - shapes.keys()):
            raise ValueError(f"{INDEX} names {absent[0]}, which {places[absent[0]]} does not hold")
    return shapes, not_finite


def _tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    from safetensors import safe_open

    for shard in _shards(folder):
        with safe_open(folder / shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 a safetensors file is no mapping
                yield name, file.get_tensor(name)


def _configured_shapes(folder: Path) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Shapes of the weights that a model of this config has, and those that need not be stored."""
    from ..configuration_worldvla import WorldVLAConfig
    from ..modeling_worldvla import WorldVLAForCausalLM

    config = WorldVLAConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        model = WorldVLAForCausalLM(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return shapes, {"lm_head.weight"} if config.tie_word_embeddings else set()


# -------------------------------------------------------------------- code


def check_code(folder: Path) -> Finding:
    """The checkpoint carries its code, all of it, and it is that of this installation."""
    if is_adapter(folder):
        return Finding("code", SKIPPED, "an adapter uses the code of its base")
    try:
        references = _code_references(folder)
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        return Finding("code", FAILED, f"cannot be read: {' '.join(str(error).split())}", _AGAIN)
    copy = f"copy the files *_worldvla.py of {SOURCE.name} into the folder, or save it with this library again"
    if not references:
        return Finding("code", FAILED, "no auto_map: nobody without this library installed can load it", copy)
    if foreign := sorted(reference for reference in references if "--" in reference):
        found = f"the code comes from another repository: {foreign[0]}"
        return Finding("code", WARNING, found, copy)
    modules, missing = _follow_imports(folder, {reference.partition(".")[0] for reference in references})
    if missing:
        return Finding("code", FAILED, f"missing: {', '.join(missing)}", copy, {"missing": missing})
    stale = [
        name
        for name in modules
        if not (SOURCE / name).is_file() or (SOURCE / name).read_bytes() != (folder / name).read_bytes()
    ]
    if stale:
        found = f"{len(stale)} of {len(modules)} modules differ from this library's ({', '.join(stale[:3])}, ...)"
        advice = f"with trust_remote_code it runs its own code; {copy}, if that is not meant"
        return Finding("code", WARNING, found.replace(", ...)", ")") if len(stale) <= 3 else found, advice)
    return Finding("code", OK, f"{len(modules)} modules, those of this library", numbers={"modules": modules})


def _code_references(folder: Path) -> set[str]:
    """What `auto_map` names in the configs: `modeling_worldvla.WorldVLAForCausalLM`, ..."""
    found: set[str] = set()
    for name in CODE_ENTRY_FILES:
        if not (folder / name).is_file():
            continue
        document: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
        for holder in (document, document.get("image_processor") or {}):
            found |= {str(reference) for reference in (holder.get("auto_map") or {}).values()}
    return found


def _follow_imports(folder: Path, roots: set[str]) -> tuple[list[str], list[str]]:
    """Files of the modules that `roots` import from one another: those that are there and those that are not."""
    seen, waiting = set[str](), set(roots)
    there, missing = [], []
    while waiting:
        module = waiting.pop()
        seen.add(module)
        file = folder / f"{module}.py"
        if not file.is_file():
            missing.append(file.name)
            continue
        there.append(file.name)
        waiting |= set(_RELATIVE_IMPORT.findall(file.read_text(encoding="utf-8"))) - seen
    return sorted(there), sorted(missing)
