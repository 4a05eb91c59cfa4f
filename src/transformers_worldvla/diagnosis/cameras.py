"""Cameras: are their names those of the checkpoint, and what does the model see beside what was recorded."""

import difflib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ..action_tokenization_worldvla import Embodiment
from ..data.episodes import EpisodeDataset
from ..evaluation.pictures import below, beside, captioned, enlarge, label
from .report import FAILED, OK, WARNING, Finding

SIDE = 256  # pixels of a picture in the written one


def check_cameras(dataset: EpisodeDataset, robot: Embodiment) -> Finding:
    """The dataset has the checkpoint's cameras under their names."""
    known, missing = dataset.cameras, [name for name in robot.cameras if name not in dataset.cameras]
    numbers = {"dataset": list(known), "checkpoint": list(robot.cameras)}
    if not missing:
        extra = [name for name in known if name not in robot.cameras]
        found = f"{', '.join(robot.cameras)}" + (f" (not looked at: {', '.join(extra)})" if extra else "")
        return Finding("cameras", OK, found, numbers=numbers)
    near = difflib.get_close_matches(missing[0], known, n=1, cutoff=0.4)
    hint = f'rename "{near[0]}" to "{missing[0]}" if it is that' if near else "rename the dataset's cameras"
    found = f'no camera "{missing[0]}"; the dataset has {", ".join(known) or "none"}'
    advice = f"{hint}, or fine-tune on this dataset; when serving, --camera-map does it"
    return Finding("cameras", FAILED, found, advice, numbers)


def check_picture_shapes(dataset: EpisodeDataset, robot: Embodiment) -> Finding:
    """Pictures of every camera show something, in one size; cameras that are the same picture are noticed."""
    episode = dataset[0]
    frames = {camera: episode.frame(camera, 0) for camera in robot.cameras}
    sizes = ", ".join(f"{camera} {frame.shape[1]} x {frame.shape[0]}" for camera, frame in frames.items())
    if flat := [camera for camera, frame in frames.items() if frame.std() < 1.0]:
        advice = "check the recorder: the lens is covered, or frames were not written"
        return Finding("pictures", FAILED, f"{', '.join(flat)}: one colour all over", advice)
    names = list(frames)
    for index, name in enumerate(names):
        for other in names[index + 1 :]:
            if np.array_equal(frames[name], frames[other]):
                advice = "check which device each camera name opens"
                return Finding("pictures", WARNING, f"{name} and {other} are the same picture", advice)
    return Finding("pictures", OK, sizes)


def draw_views(
    path: Path,
    recorded: np.ndarray,
    seen: np.ndarray,
    simulated: np.ndarray | None,
    title: str,
) -> None:
    """Write a picture: the training frame, what the model sees of it, and the simulator's frame in its orientation.

    All are (H, W, 3) uint8.
    """
    columns: Sequence[tuple[str, np.ndarray | None]] = [
        ("recorded frame", recorded),
        ("what the model sees of it", seen),
        ("simulator, model orientation", simulated),
    ]
    pictures = [
        captioned(enlarge(Image.fromarray(frame), SIDE), caption) for caption, frame in columns if frame is not None
    ]
    row = beside(pictures)
    path.parent.mkdir(parents=True, exist_ok=True)
    below([label(title, row.width), row], margin=8).save(path)
