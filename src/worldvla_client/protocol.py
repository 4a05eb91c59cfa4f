"""openpi's wire format: maps in msgpack, numpy arrays inside them as dtype, shape and bytes.

Both ends use this module, and the robot's has no torch: numpy and msgpack only. What comes from outside is checked
before memory is spent on it, and nothing is ever unpickled: arrays of objects, records and complex numbers are refused.

Format (openpi-client 0.1, `msgpack_numpy.py`): an array is `{b"__ndarray__": True, b"data": bytes, b"dtype": str,
b"shape": [int]}`, a numpy scalar `{b"__npgeneric__": True, b"data": value, b"dtype": str}`.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .optional import import_extra

MAX_MESSAGE_BYTES = 16 * 2**20
MAX_CONTAINER_ITEMS = 10_000  # entries of all maps and lists of a message together; arrays are one entry each
MAX_DIMENSIONS = 8
_DTYPE = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248]|[SU][1-9]\d{0,6})")


class ProtocolError(ValueError):
    """A message that is none. Its text is the one line for whoever sent it."""


def pack(message: Any) -> bytes:
    """A message as bytes. Raises ValueError for arrays that no receiver takes, TypeError for other objects."""
    return import_extra("msgpack").packb(message, default=_pack_numpy)


def unpack(data: bytes, max_items: int = MAX_CONTAINER_ITEMS) -> Any:
    """Inverse of `pack` for bytes from outside; arrays are read-only views into them. Raises ProtocolError."""
    msgpack = import_extra("msgpack")
    counter = _Counter(max_items)
    try:
        return msgpack.unpackb(data, object_pairs_hook=counter.read_map, list_hook=counter.read_list)
    except ProtocolError:
        raise
    except (ValueError, TypeError, OverflowError, msgpack.UnpackException) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ProtocolError(f"the message is no msgpack map: {reason[:200]}") from error


def array_from_bytes(data: Any, dtype: Any, shape: Any) -> np.ndarray:
    """A read-only view of `data` as an array. Raises ProtocolError unless dtype, shape and size agree."""
    if not isinstance(dtype, str) or not _DTYPE.fullmatch(dtype):
        raise ProtocolError(f"arrays hold numbers, booleans or strings, not dtype {str(dtype)[:40]!r}")
    if not isinstance(data, bytes | bytearray | memoryview):
        raise ProtocolError(f"the data of an array are bytes, not {type(data).__name__}")
    if not isinstance(shape, Sequence) or isinstance(shape, str | bytes) or len(shape) > MAX_DIMENSIONS:
        raise ProtocolError(f"the shape of an array is a list of at most {MAX_DIMENSIONS} lengths")
    if not all(isinstance(side, int) and not isinstance(side, bool) and side >= 0 for side in shape):
        raise ProtocolError("the shape of an array is a list of whole numbers that are not negative")
    kind = np.dtype(dtype)
    if math.prod(shape) * kind.itemsize != len(data):
        raise ProtocolError(f"an array of shape {tuple(shape)} and dtype {dtype} does not have {len(data)} bytes")
    try:
        array = np.ndarray(buffer=data, dtype=kind, shape=tuple(shape))
    except (ValueError, OverflowError) as error:  # no bytes, but sides beyond what numpy can count
        raise ProtocolError(f"no array has the shape {tuple(shape)}") from error
    array.flags.writeable = False
    return array


class _Counter:
    """Reads maps and lists of one message and stops at too many entries: an empty map is one byte on the wire."""

    def __init__(self, limit: int):
        self.limit = self.left = limit

    def _count(self, entries: int) -> None:
        self.left -= entries + 1
        if self.left < 0:
            raise ProtocolError(f"the message has more than {self.limit} entries: send arrays as arrays, not as lists")

    def read_list(self, values: list[Any]) -> list[Any]:
        self._count(len(values))
        return values

    def read_map(self, pairs: list[tuple[Any, Any]]) -> Any:
        self._count(len(pairs))
        values = dict(pairs)
        if _entry(values, "__ndarray__") is not None:
            return array_from_bytes(*(_entry(values, name) for name in ("data", "dtype", "shape")))
        if _entry(values, "__npgeneric__") is not None:
            return _read_scalar(_entry(values, "data"), _entry(values, "dtype"))
        return values


def _entry(values: Mapping[Any, Any], name: str) -> Any:
    """openpi's keys are bytes; clients in other languages send strings."""
    value = values.get(name.encode())
    return values.get(name) if value is None else value


def _read_scalar(value: Any, dtype: Any) -> Any:
    if not isinstance(dtype, str) or not _DTYPE.fullmatch(dtype) or not isinstance(value, int | float | str | bytes):
        raise ProtocolError(f"a scalar is a number, boolean or string, not {str(dtype)[:40]!r}")
    try:
        return np.dtype(dtype).type(value)
    except (ValueError, TypeError, OverflowError) as error:
        raise ProtocolError(f"a scalar of dtype {dtype} does not have this value") from error


def _pack_numpy(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind not in "biufSU":
        raise ValueError(f"arrays of dtype {value.dtype} cannot be sent: numbers, booleans and strings can")
    if isinstance(value, np.ndarray):
        return {
            b"__ndarray__": True,
            b"data": value.tobytes(),
            b"dtype": value.dtype.str,
            b"shape": list(value.shape),
        }
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    raise TypeError(f"a message holds numbers, strings, lists, maps and numpy arrays, not {type(value).__name__}")
