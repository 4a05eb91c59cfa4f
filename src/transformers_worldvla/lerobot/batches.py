"""LeRobot's batches as WorldVLA wants them: observations for acting, samples for training.

A batch is a flat dict: pictures under `observation.images.<name>` (or `observation.image`), float in [0, 1] or uint8,
(B, 3, H, W) when acting and (B, T, 3, H, W) from a dataset, actions (B, K, D) in robot units, texts under `task`, and
`<key>_is_pad` (B, T) for steps beyond an episode's ends, where LeRobot repeats the last one. Pictures are taken as they
are: LeRobot's datasets and environments give them in the model's orientation, and nothing here rotates. Other keys, the
robot's state among them, are not looked at: WorldVLA acts on pictures and text. Nothing here needs LeRobot.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..data.episodes import short_camera_names
from ..loss_worldvla import IGNORE_INDEX

ACTION, TASK, PAD_SUFFIX, PICTURES = "action", "task", "_is_pad", "observation.image"
RANGE_TOLERANCE = 0.01  # of pictures in [0, 1]: resizing may overshoot a little


@dataclass(frozen=True)
class Row:
    """One row of a batch: time steps of C pictures (H, W, 3) uint8, oldest first, the last one now."""

    steps: list[list[np.ndarray]]
    following: list[np.ndarray] | None  # the C pictures one step later, where the batch has them
    task: str | None


def camera_keys(cameras: Sequence[str], found: Iterable[str], camera_map: Mapping[str, str]) -> dict[str, str]:
    """Camera -> key of its pictures, in the order of the cameras.

    `observation.images.wrist` is the camera `wrist` and `observation.image` the camera `image`; `camera_map` (key ->
    camera) says otherwise. Raises ValueError, one line with the nearest name.
    """
    found = list(found)
    chosen = {name: key for name, key in short_camera_names(found).items() if key not in camera_map}
    for key, camera in camera_map.items():
        if camera not in cameras:
            raise ValueError(f"camera_map sends {key!r} to {camera!r}; the checkpoint's cameras are {_listed(cameras)}")
        if key not in found:
            raise ValueError(f"camera_map names {key!r}, but the pictures are {_listed(found)}{_nearest(key, found)}")
        chosen[camera] = key
    for camera in cameras:
        if camera not in chosen:
            near = difflib.get_close_matches(camera, found, n=1, cutoff=0.3) or found[:1]
            hint = f'; --policy.camera_map=\'{{"{near[0]}": "{camera}"}}\' gives it one' if near else ""
            raise ValueError(f"no picture for the checkpoint's camera {camera!r} among {_listed(found)}{hint}")
    return {camera: chosen[camera] for camera in cameras}


def picture_keys(batch: Mapping[str, Any]) -> list[str]:
    """The keys of a batch that hold pictures."""
    return [
        key
        for key, value in batch.items()
        if key.startswith(PICTURES) and not key.endswith(PAD_SUFFIX) and isinstance(value, torch.Tensor)
    ]


def read_rows(
    batch: Mapping[str, Any], cameras: Sequence[str], camera_map: Mapping[str, str], num_shown: int
) -> list[Row]:
    """The rows of a batch. Where pictures have a time axis its first `num_shown` steps are shown, up to now.

    Raises ValueError, one line: a camera without pictures, pictures of another shape or range, texts that do not match.
    """
    keys = camera_keys(cameras, picture_keys(batch), camera_map)
    views = [_to_uint8(key, batch[key]) for key in keys.values()]  # C arrays (B, T, H, W, 3)
    if len({view.shape[:2] for view in views}) > 1:
        shapes = ", ".join(f"{key} {view.shape[:2]}" for key, view in zip(keys.values(), views, strict=True))
        raise ValueError(f"all cameras have the same rows and time steps, not {shapes}")
    size, length = views[0].shape[:2]
    padded = np.zeros((size, length), dtype=bool)
    for key in keys.values():
        if (flags := batch.get(key + PAD_SUFFIX)) is not None:
            padded |= torch.as_tensor(flags).cpu().numpy().reshape(size, length)
    now = min(num_shown, length) - 1
    rows = []
    for row, task in enumerate(_tasks(batch, size)):
        steps = [[view[row, step] for view in views] for step in range(length)]
        shown = [step for step in range(now + 1) if not padded[row, step]]
        has_next = now + 1 < length and not padded[row, now + 1]
        rows.append(Row([steps[step] for step in shown], steps[now + 1] if has_next else None, task))
    return rows


def training_samples(
    batch: Mapping[str, Any], rows: Sequence[Row], kinds: Sequence[str], embodiment: str
) -> tuple[list[dict[str, Any]], list[int | None]]:
    """The samples of a batch, by the rules of `EpisodeSamples` with one (frame, action) pair in a world prompt.

    Returns:
        Arguments of the processor for each sample, and how many of its actions are real: LeRobot fills a chunk that
        reaches beyond the episode. None for a sample without actions to learn.
    """
    actions = batch[ACTION]
    if actions.ndim != 3 or len(actions) != len(rows):
        raise ValueError(f'"{ACTION}" is (rows, actions a chunk, D) with {len(rows)} rows, not {tuple(actions.shape)}')
    actions = actions.float().cpu().numpy()
    flags = batch.get(ACTION + PAD_SUFFIX)
    missing = np.zeros(len(rows), dtype=int) if flags is None else torch.as_tensor(flags).sum(-1).cpu().numpy()
    samples: list[dict[str, Any]] = []
    counts: list[int | None] = []
    for number, row in enumerate(rows):
        shown = [picture for step in row.steps for picture in step]
        made = {
            "action": {"instruction": row.task, "images": shown, "target_actions": actions[number]},
            "world": {"images": row.steps[-1], "actions": actions[number, :1], "target_images": row.following},
            "video": {"instruction": row.task, "images": shown, "target_images": row.following},
        }
        for kind in kinds:
            if kind != "action" and row.following is None:
                continue
            samples.append({"source": f"row {number}, {kind}", "embodiment": embodiment, **made[kind]})
            counts.append(actions.shape[1] - int(missing[number]) if kind == "action" else None)
    return samples, counts


def unlabel_padding(inputs: dict[str, torch.Tensor], counts: Sequence[int | None], tokens: Any) -> None:
    """Take labels and weights from the actions after the first `counts[row]` of a row, and from its final separator."""
    blocks = tokens.action_block_ids(inputs["input_ids"])
    for row, count in enumerate(counts):
        if count is None or count > int(blocks[row].max()):
            continue
        filler = blocks[row] >= count
        filler[-1] = True  # padding is on the left: the separator stands last
        inputs["labels"][row, filler] = IGNORE_INDEX
        inputs["loss_weights"][row, filler] = 0


def _to_uint8(key: str, pictures: torch.Tensor) -> np.ndarray:
    """(B, 3, H, W) or (B, T, 3, H, W) -> (B, T, H, W, 3) uint8 on the CPU."""
    if pictures.ndim not in (4, 5) or pictures.shape[-3] != 3:
        raise ValueError(f"{key} is (rows, 3, H, W) or (rows, steps, 3, H, W), not {tuple(pictures.shape)}")
    if pictures.ndim == 4:
        pictures = pictures[:, None]
    if pictures.is_floating_point():
        low, high = pictures.min().item(), pictures.max().item()
        if not (-RANGE_TOLERANCE <= low and high <= 1 + RANGE_TOLERANCE):
            raise ValueError(
                f"{key} has values from {low:.3g} to {high:.3g}: pictures are in [0, 1] here, not normalised "
                "(normalization_mapping stays IDENTITY)"
            )
        pictures = (pictures.float() * 255).round().clamp(0, 255).to(torch.uint8)
    elif pictures.dtype != torch.uint8:
        raise ValueError(f"{key} is float in [0, 1] or uint8, not {pictures.dtype}")
    array: np.ndarray = pictures.movedim(2, -1).contiguous().cpu().numpy()
    return array


def _tasks(batch: Mapping[str, Any], size: int) -> list[str | None]:
    """The text of each row; None for an empty one."""
    tasks = batch.get(TASK)
    if tasks is None or isinstance(tasks, str):
        tasks = [tasks] * size
    if len(tasks) != size or not all(task is None or isinstance(task, str) for task in tasks):
        raise ValueError(f'"{TASK}" is one sentence for each of the {size} rows, not {str(tasks)[:80]}')
    return [(task or "").strip() or None for task in tasks]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"; did you mean {near[0]}?" if near else ""
