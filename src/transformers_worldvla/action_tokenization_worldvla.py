"""Actions in a robot's own units <-> bin indices, and what there is to know about a robot's actions: the embodiment.

Everything is numpy in float64 (in float32 a range's maximum falls into another bin). Bin indices run from 0 to 255; the
token ids that stand for them are the business of `tokens_worldvla`. Nothing here knows pictures or sequences.

The codec is the authors' (`item_processor.py`): 256 edges evenly spaced over [-1, 1], so index 0..254 are the bins
between them and index 255 is only reached above the range's maximum; it decodes like 254.
"""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch

from .tokens_worldvla import NUM_BINS

EDGES = np.linspace(-1.0, 1.0, NUM_BINS)
CENTERS = (EDGES[:-1] + EDGES[1:]) / 2.0  # (255,)
RANGE_EPSILON = 1e-8  # the authors' guard against an empty range; it keeps the maximum in the last bin but one
CLIP_TOLERANCE = 1e-6  # of the normalised range: float32 noise at the ends is no reason to warn
SEMANTICS = ("delta", "absolute")
ROTATIONS = (0, 90, 180, 270)


def normalize(actions: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Robot units (..., D) -> [-1, 1] inside the range; not clipped."""
    return 2.0 * (actions - low) / (high - low + RANGE_EPSILON) - 1.0


def denormalize(values: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """[-1, 1] (..., D) -> robot units."""
    return (values + 1.0) / 2.0 * (high - low + RANGE_EPSILON) + low


def digitize(values: np.ndarray) -> np.ndarray:
    """Normalised values -> bin indices 0..255; clips to [-1, 1]."""
    return np.digitize(np.clip(values, -1.0, 1.0), EDGES) - 1


def bin_centers(bins: np.ndarray) -> np.ndarray:
    """Bin indices -> normalised centres; -1 (the unreachable id) is bin 0 and 255 is bin 254."""
    return CENTERS[np.clip(bins, 0, len(CENTERS) - 1)]


def to_float64(values: Any) -> np.ndarray:
    """Numbers in a numpy array, torch tensor (any device and dtype) or nested list of them -> float64 array.

    Raises ValueError when they are no numbers or a ragged list.
    """
    if isinstance(values, torch.Tensor):
        return values.detach().to("cpu", torch.float64).numpy()
    if isinstance(values, list | tuple) and any(isinstance(value, torch.Tensor) for value in values):
        values = [to_float64(value) for value in values]
    try:
        array = np.asarray(values)
        if array.dtype.kind in "iuf":
            return array.astype(np.float64)
    except ValueError:  # numpy on a ragged list
        pass
    raise ValueError("actions are numbers in an array, a tensor or nested lists of equal length")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True)
class Embodiment:
    """A robot as one data set moves it: D action dimensions, their ranges and meaning, and its cameras.

    Attributes:
        name: what `embodiment=` calls it.
        low, high: the range of each dimension in robot units, (D,); outside it an action is clipped.
        action_names, units: one a dimension, or empty.
        semantics: `delta` (added to the present pose) or `absolute`.
        gripper: `{"index": dimension, "open": value, "close": value}`, or None. The codec treats it like every
            dimension.
        rotation: degrees by which the *raw* camera picture must be turned; whoever owns raw frames does that once.
        control_hz: actions a second.
        cameras: names of the C pictures of a time step, in the order of the sequence.
        raw_cameras: what the simulator or recorder calls them, same order; empty when it uses the same names.
        dataset: where the ranges come from.
    """

    name: str
    low: tuple[float, ...]
    high: tuple[float, ...]
    action_names: tuple[str, ...] = ()
    units: tuple[str, ...] = ()
    semantics: str = "delta"
    gripper: dict[str, float] | None = None
    rotation: int = 0
    control_hz: float | None = None
    cameras: tuple[str, ...] = ("image",)
    raw_cameras: tuple[str, ...] = ()
    dataset: str | None = None

    def __post_init__(self) -> None:
        for field in ("low", "high", "action_names", "units", "cameras", "raw_cameras"):
            value = getattr(self, field)
            if isinstance(value, str) or not isinstance(value, Iterable):
                self._fail(f"{field} is a list, not {value!r}")
            entries = to_float64(list(value)).tolist() if field in ("low", "high") else list(value)
            if field not in ("low", "high") and not all(isinstance(entry, str) for entry in entries):
                self._fail(f"{field} is a list of names, not {value!r}")
            object.__setattr__(self, field, tuple(entries))  # frozen, but JSON gives lists
        self._check()

    def _check(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            self._fail("its name is text")
        if np.ndim(self.low) != 1 or np.ndim(self.high) != 1:
            self._fail("low and high are lists of numbers")
        if not self.low or len(self.low) != len(self.high):
            self._fail(f"low and high have one number for each dimension, not {len(self.low)} and {len(self.high)}")
        if not np.isfinite([*self.low, *self.high]).all() or np.greater(self.low, self.high).any():
            self._fail("low and high are finite, and low is not above high")
        if not self.cameras or len(set(self.cameras)) != len(self.cameras):
            self._fail(f"cameras are one or more different names, not {list(self.cameras)}")
        for field, wanted in (
            ("action_names", self.action_dim),
            ("units", self.action_dim),
            ("raw_cameras", self.num_cameras),
        ):
            if len(getattr(self, field)) not in (0, wanted):
                self._fail(f"{field} has {wanted} entries or none, not {len(getattr(self, field))}")
        if self.control_hz is not None and not (_is_number(self.control_hz) and self.control_hz > 0):
            self._fail(f"control_hz is a number above 0, or None, not {self.control_hz!r}")
        if self.semantics not in SEMANTICS:
            self._fail(f"semantics is one of {', '.join(SEMANTICS)}, not {self.semantics!r}")
        if self.rotation not in ROTATIONS:
            self._fail(f"rotation is one of {ROTATIONS} degrees, not {self.rotation!r}")
        if self.gripper is not None and not isinstance(self.gripper, Mapping):
            self._fail(f"gripper is an object with index, open and close, not {self.gripper!r}")
        if self.gripper is not None and set(self.gripper) != {"index", "open", "close"}:
            self._fail(f"gripper has the keys index, open and close, not {sorted(map(str, self.gripper))}")
        if self.gripper is not None and not all(map(_is_number, self.gripper.values())):
            self._fail(f"gripper has numbers as index, open and close, not {dict(self.gripper)}")
        if self.gripper is not None and self.gripper["index"] not in range(self.action_dim):
            self._fail(f"gripper index {self.gripper['index']} is no dimension of {self.action_dim}")

    def _fail(self, reason: str) -> None:
        raise ValueError(f"embodiment {self.name!r}: {reason}")

    @property
    def action_dim(self) -> int:
        """D."""
        return len(self.low)

    @property
    def num_cameras(self) -> int:
        """C."""
        return len(self.cameras)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Embodiment":
        """Inverse of `to_dict`. Raises ValueError on unknown or missing fields."""
        if not isinstance(values, Mapping):
            raise ValueError(f"an embodiment is an object with a name and ranges, not {values!r}")
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise ValueError(f"an embodiment has no field {unknown[0]!r}: the fields are {', '.join(known)}")
        if missing := [name for name in ("name", "low", "high") if name not in values]:
            raise ValueError(f"an embodiment needs the field {missing[0]!r}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, ready for JSON."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def describe(self) -> str:
        """Name and dimension for messages: `libero (D=7)`."""
        return f"{self.name} (D={self.action_dim})"

    def encode(self, actions: Any) -> np.ndarray:
        """Actions (N, D) in robot units -> bin indices (N, D), int64 in 0..255.

        Values outside the range are clipped with a UserWarning. Raises ValueError on another shape, no rows, NaN,
        infinity.
        """
        values = to_float64(actions)
        if values.ndim != 2 or values.shape[0] == 0 or values.shape[1] != self.action_dim:
            raise ValueError(
                f"actions of embodiment {self.name!r} have shape (N, {self.action_dim}) with N >= 1, not {values.shape}"
            )
        if not np.isfinite(values).all():
            row, column = np.argwhere(~np.isfinite(values))[0].tolist()
            raise ValueError(f"action {row} is {values[row, column]} in dimension {self._dimension(column)}")
        normalized = normalize(values, np.array(self.low), np.array(self.high))
        outside = (np.abs(normalized) > 1.0 + CLIP_TOLERANCE).any(axis=0)
        if outside.any():
            ranges = [
                f"{self._dimension(i)} [{self.low[i]:g}, {self.high[i]:g}]" for i in np.flatnonzero(outside).tolist()
            ]
            warnings.warn(
                f"actions outside the range of embodiment {self.name!r} are clipped: {', '.join(ranges)}", stacklevel=2
            )
        return digitize(normalized)

    def decode(self, bins: np.ndarray) -> np.ndarray:
        """Bin indices (..., D) -> actions in robot units, float64. Raises ValueError on another D."""
        bins = np.asarray(bins)
        if bins.ndim == 0 or bins.shape[-1] != self.action_dim:
            raise ValueError(
                f"an action of embodiment {self.name!r} has {self.action_dim} bins, these have shape {bins.shape}"
            )
        return denormalize(bin_centers(bins), np.array(self.low), np.array(self.high))

    def _dimension(self, index: int) -> str:
        return self.action_names[index] if self.action_names else str(index)


# Ranges: the authors' `item_processor.py`, the same for all four suites. Units: robosuite's OSC_POSE scales a command
# of 1 to 0.05 m and 0.5 rad a control step.
LIBERO = Embodiment(
    name="libero",
    low=(-0.9375, -0.9375, -0.9375, -0.32571429, -0.375, -0.375, -1.0),
    high=(0.9375, 0.9375, 0.9375, 0.375, 0.375, 0.375, 1.0),
    action_names=("x", "y", "z", "rx", "ry", "rz", "gripper"),
    units=("0.05 m", "0.05 m", "0.05 m", "0.5 rad", "0.5 rad", "0.5 rad", "command"),
    semantics="delta",
    gripper={"index": 6, "open": -1.0, "close": 1.0},
    rotation=180,
    control_hz=20.0,
    cameras=("image",),
    raw_cameras=("agentview",),
    dataset="LIBERO Spatial, Object, Goal and 10 without no-op actions",
)

EMBODIMENTS = {"libero": LIBERO}

__all__ = ["EMBODIMENTS", "LIBERO", "Embodiment"]
