"""Weights in and out of a conversion, one tensor at a time: the largest tensor is all that memory has to hold.

Reads safetensors and PyTorch files, single or in shards with an index; writes safetensors shards with an index. It
knows names, shapes and bytes, and nothing of models. Pickles are opened weights-only: nothing in them is executed.
"""

import json
import pickle
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

WEIGHT_NAMES = (  # in the order in which transformers looks for them
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ZIP_MAGIC = b"PK\x03\x04"
_LFS_MAGIC = b"version https://git-lfs"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file: what it is, and how to read it. `read` reads it anew at every call."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    read: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    def rename(self, name: str) -> "StoredTensor":
        """The same values under another name."""
        return replace(self, name=name)

    def cast(self, dtype: torch.dtype) -> "StoredTensor":
        """The same values in another type."""
        read = self.read
        return replace(self, dtype=dtype, read=lambda: read().to(dtype))

    def repeat_rows(self, rows: int) -> "StoredTensor":
        """(r, ...) -> (rows, ...), each row repeated rows / r times in a row."""
        read, times = self.read, rows // self.shape[0]
        if times == 1:
            return self
        return replace(self, shape=(rows, *self.shape[1:]), read=lambda: read().repeat_interleave(times, 0))


# -------------------------------------------------------------------- files and folders


def list_folder(folder: Path, limit: int = 8) -> str:
    """What a folder holds, for messages."""
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "nothing") + more


def require_file(folder: Path, name: str, purpose: str) -> Path:
    """Path of a file that a folder must hold. Raises FileNotFoundError that says what is there instead."""
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {name} ({purpose}); it holds {list_folder(folder)}")
    with path.open("rb") as file:
        if file.read(len(_LFS_MAGIC)) == _LFS_MAGIC:
            raise ValueError(f"{path} is a Git LFS pointer and not the file itself: download it with `git lfs pull`")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises ValueError that names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON file: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__} where a JSON object is expected")
    return value


def open_folder(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a folder's weights by name, shard after shard.

    Raises FileNotFoundError when weights or one of their shards are missing, ValueError when they contradict the index.
    """
    name = next((name for name in WEIGHT_NAMES if (folder / name).is_file()), None)
    if name is None:
        raise FileNotFoundError(
            f"{folder} has no weights: expected one of {', '.join(WEIGHT_NAMES)}; it holds {list_folder(folder)}"
        )
    path = require_file(folder, name, "weights")
    if not name.endswith(".index.json"):
        return open_file(path)
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path} has no weight_map: it is no index of weights")
    tensors: dict[str, StoredTensor] = {}
    pickles = _Pickles()
    for shard in dict.fromkeys(weight_map.values()):
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ValueError(f"{path} names the shard {shard!r}, which is no file name")
        tensors |= open_file(require_file(folder, shard, f"a shard that {name} names"), pickles)
    if lost := [key for key, shard in weight_map.items() if key not in tensors or tensors[key].file.name != shard]:
        raise ValueError(f"{path} places {lost[0]} in {weight_map[lost[0]]}, which does not hold it")
    return tensors


def open_file(path: Path, pickles: "_Pickles | None" = None) -> dict[str, StoredTensor]:
    """The tensors of one file by name. Raises ValueError when it is damaged or holds more than tensors.

    Of the PyTorch files that share `pickles` one is open at a time.
    """
    return _open_safetensors(path) if path.suffix == ".safetensors" else (pickles or _Pickles()).open(path)


def _open_safetensors(path: Path) -> dict[str, StoredTensor]:
    tensors = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                entry = file.get_slice(name)
                if entry.get_dtype() not in _DTYPES:
                    raise ValueError(f"{path}: {name} has the type {entry.get_dtype()}: convert unquantized weights")
                dtype, shape = _DTYPES[entry.get_dtype()], tuple(entry.get_shape())
                tensors[name] = StoredTensor(name, dtype, shape, path, partial(_read_safetensors, path, name))
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or incomplete: {error}") from None
    return tensors


def _read_safetensors(path: Path, name: str) -> torch.Tensor:
    # the file is opened for each tensor: an open mapping keeps every page that was read
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


class _Pickles:
    """PyTorch files, the last used of which is open: to find a tensor in one, all of its index has to be unpickled."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self.tensors: dict[str, torch.Tensor] = {}

    def open(self, path: Path) -> dict[str, StoredTensor]:
        self._load(path)
        return {
            name: StoredTensor(name, value.dtype, tuple(value.shape), path, partial(self._read, path, name))
            for name, value in self.tensors.items()
        }

    def _read(self, path: Path, name: str) -> torch.Tensor:
        self._load(path)
        return self.tensors[name]

    def _load(self, path: Path) -> None:
        if path != self.path:
            self.tensors = {}  # closes the file before
            self.path, self.tensors = path, _load_pickle(path)


def _load_pickle(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a PyTorch file, or of its `state_dict` if it has one; mapped from disk since PyTorch 1.6."""
    with path.open("rb") as file:
        is_zip = file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise ValueError(_refusal(path, str(error))) from None
    except (RuntimeError, EOFError, LookupError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is damaged or no PyTorch file: {str(error).splitlines()[0]}") from None
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    entries = state.items() if isinstance(state, dict) else ()
    tensors = {name: value for name, value in entries if isinstance(name, str) and torch.is_tensor(value)}
    if not tensors:
        found = ", ".join(str(name) for name, _ in list(entries)[:5]) or f"a {type(state).__name__}"
        raise ValueError(f"{path} holds no weights: expected tensors by name, or a state_dict of them; found {found}")
    return tensors


def _refusal(path: Path, reason: str) -> str:
    """One line about a pickle that is not tensors only."""
    found = re.search(r"GLOBAL (\S+)", reason) or re.search(r"[Uu]nsupported (?:class|global):? (\S+)", reason)
    if found is None:
        return f"{path} is damaged or no PyTorch file"
    return (
        f"{path} holds more than tensors ({found[1]}) and was not loaded: nothing in it was executed; if you trust it, "
        f"keep only its weights: python -c \"import torch; p = '{path.name}'; d = torch.load(p, weights_only=False); "
        "torch.save({k: v for k, v in d.get('state_dict', d).items() if torch.is_tensor(v)}, p)\""
    )


# -------------------------------------------------------------------- writing


def split_shards(tensors: Iterable[StoredTensor], max_shard_bytes: int) -> list[list[StoredTensor]]:
    """Group tensors, in their order, into shards of at most so many bytes (a larger tensor gets a shard of its own)."""
    shards: list[list[StoredTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def write_folder(folder: Path, tensors: list[StoredTensor], max_shard_bytes: int) -> Iterator[int]:
    """Write weights as transformers stores them; yields the bytes of each tensor when it is written."""
    shards = split_shards(tensors, max_shard_bytes)
    count = len(shards)
    names = [f"model-{index:05d}-of-{count:05d}.safetensors" for index in range(1, count + 1)]
    if count == 1:
        names = [WEIGHT_NAMES[0]]
    for name, shard in zip(names, shards, strict=True):
        yield from write_file(folder / name, shard)
    if count > 1:
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)},
            "weight_map": {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard},
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / WEIGHT_NAMES[1]).write_text(text, encoding="utf-8")


def write_file(path: Path, tensors: Iterable[StoredTensor]) -> Iterator[int]:
    """Write one safetensors file, value by value behind its header; yields the bytes of each tensor when it is written.

    The library's own writer wants all tensors at once.
    """
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)  # so that every tensor is aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in ordered:
        header[tensor.name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in ordered:
            file.write(raw_bytes(tensor.read()).numpy().data)
            yield tensor.nbytes


def raw_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor's values in order: (n,) uint8."""
    return tensor.detach().contiguous().flatten().view(torch.uint8)
