"""Numbers that say how far a prediction is from a recording, and the baselines it has to beat.

Pure numpy: no model, no episode, no file but the small one that holds a training set's mean action. Errors are kept one
a sample until `mean_psnr` and `action_l1` average them, so that episodes of different length can be pooled.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

PSNR_EPSILON = 1e-8  # as in piqa, which RynnVLA-002 measures with: equal pictures have 80 dB, not infinity
CONSTANT_RANGE = 1e-6  # a dimension that moves less has nothing to predict
STATISTICS_FILE = "training_statistics.json"


def psnr(pictures: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of uint8 pictures (..., H, W, 3) against references of the same shape: (...) in dB.

    10 log10(1 / (mse + 1e-8)) with values scaled to [0, 1]. Raises ValueError on another dtype or shape.
    """
    pictures, references = np.asarray(pictures), np.asarray(references)
    if pictures.dtype != np.uint8 or references.dtype != np.uint8:
        raise ValueError(f"PSNR compares uint8 pictures, not {pictures.dtype} and {references.dtype}")
    if pictures.shape != references.shape or pictures.ndim < 3 or pictures.shape[-1] != 3:
        raise ValueError(f"PSNR compares (..., H, W, 3) of one shape, not {pictures.shape} and {references.shape}")
    errors = pictures.astype(np.float32) - references.astype(np.float32)
    mse = np.square(errors).mean(axis=(-3, -2, -1), dtype=np.float64) / 255.0**2
    return 10.0 * np.log10(1.0 / (mse + PSNR_EPSILON))


def action_l1(predicted: np.ndarray, recorded: np.ndarray) -> dict[str, Any]:
    """Mean absolute error of action chunks (S, K, D), in the units of the actions.

    Returns `total`, the mean of everything, `per_dimension` (D numbers) and `per_step` (K numbers, first step first).
    Raises ValueError on another shape and when there is no chunk.
    """
    predicted, recorded = np.asarray(predicted, np.float64), np.asarray(recorded, np.float64)
    if predicted.shape != recorded.shape or predicted.ndim != 3 or predicted.size == 0:
        raise ValueError(f"action chunks have one shape (S, K, D), S >= 1, not {predicted.shape} and {recorded.shape}")
    errors = np.abs(predicted - recorded)
    return {
        "total": float(errors.mean()),
        "per_dimension": errors.mean(axis=(0, 1)).tolist(),
        "per_step": errors.mean(axis=(0, 2)).tolist(),
    }


def constant_dimensions(actions: np.ndarray) -> list[int]:
    """Dimensions of actions (..., D) that never change: no baseline can be beaten there."""
    rows = np.asarray(actions).reshape(-1, np.shape(actions)[-1])
    return np.flatnonzero(np.ptp(rows, axis=0) < CONSTANT_RANGE).tolist()


def mean_action_chunks(mean: np.ndarray, recorded: np.ndarray) -> np.ndarray:
    """The same action (D,) in place of each of the recorded ones (S, K, D)."""
    return np.broadcast_to(np.asarray(mean, np.float64), np.shape(recorded))


def repeat_last_action(last: np.ndarray, num_actions: int) -> np.ndarray:
    """Chunks (S, K, D) that go on with the action taken just before them, (S, D)."""
    return np.repeat(np.asarray(last, np.float64)[:, None], num_actions, axis=1)


def read_action_mean(checkpoint: str | Path, action_dim: int) -> np.ndarray | None:
    """Mean action (D,) of the training set, from `training_statistics.json` of a checkpoint's folder; None without one.

    Raises ValueError when the file holds anything else than `{"action_mean": [D numbers]}` (more keys may be there).
    """
    path = Path(checkpoint) / STATISTICS_FILE
    if not path.is_file():
        return None
    try:
        mean = np.asarray(json.loads(path.read_text(encoding="utf-8"))["action_mean"], np.float64)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f'{path} holds no {{"action_mean": [{action_dim} numbers]}}: {error!r}') from error
    if mean.shape != (action_dim,) or not np.isfinite(mean).all():
        raise ValueError(f'"action_mean" of {path} is {action_dim} finite numbers, not of shape {mean.shape}')
    return mean
