"""Pictures of an open-loop comparison: a GIF of recorded and imagined frames, and a page of strips and plots.

They show what a report says, a dict as `worldvla demo` builds from the summaries of `open_loop`.
"""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .metrics import psnr
from .open_loop import Recording
from .pictures import (
    BLUE,
    GREY,
    INK,
    ORANGE,
    Line,
    below,
    beside,
    captioned,
    enlarge,
    film_strip,
    label,
    line_plot,
    save_gif,
)

GIF_SIDE, STRIP_SIDE = 256, 128  # pixels along the longer side of a picture
STRIP_STEPS = 6  # imagined frames in a film strip
PSNR_LINES = {
    "model": ("imagined", BLUE),
    "copy_last_frame": ("copy of the first", ORANGE),
    "reconstruction_ceiling": ("tokenizer's ceiling", GREY),
}


def draw_gif(report: dict[str, Any], recording: Recording, imagined: np.ndarray, path: Path) -> None:
    """Recorded frames and rollouts (S, horizon, C, H, W, 3) side by side, one rollout after the other."""
    frames = []
    for start, rollout in zip(report["rollout"]["starts"], imagined, strict=True):
        for ahead, pictures in enumerate(rollout, start=1):
            panels = beside(
                [
                    captioned(_cameras(recording.pictures[start + ahead], GIF_SIDE), f"recorded, step {start + ahead}"),
                    captioned(_cameras(pictures, GIF_SIDE), f"imagined, {ahead} ahead of step {start}"),
                ]
            )
            frames.append(below([label(recording.instruction, panels.width), panels], gap=2, margin=6))
    save_gif(frames, path, report["episode"]["fps"] or 10.0)


def draw_rollout_gif(recording: Recording, start: int, imagined: np.ndarray, path: Path, fps: float) -> None:
    """One rollout (horizon, C, H, W, 3): recorded, as well as the image tokenizer can show it, and imagined."""
    frames = []
    for ahead, pictures in enumerate(imagined, start=1):
        step = start + ahead
        panels = beside(
            [
                captioned(_cameras(recording.pictures[step], GIF_SIDE), f"recorded, step {step}"),
                captioned(_cameras(recording.reconstructed[step], GIF_SIDE), "recorded, through the tokenizer"),
                captioned(_cameras(pictures, GIF_SIDE), f"imagined, {ahead} ahead of step {start}"),
            ]
        )
        frames.append(below([label(recording.instruction, panels.width), panels], gap=2, margin=6))
    save_gif(frames, path, fps)


def draw_picture(report: dict[str, Any], recording: Recording, imagined: np.ndarray, path: Path) -> None:
    """A film strip of the rollout that moves most, PSNR along rollouts, and the actions of every dimension."""
    strip = _film_strip(report["rollout"]["starts"], recording, imagined)
    title = f"{recording.instruction} (episode {recording.index}, {len(recording)} steps)"
    plots, columns = _action_plots(report["actions"], recording, (strip.width - 8) // 2), 2
    grid = [beside(plots[index : index + columns]) for index in range(0, len(plots), columns)]
    page = [label(title, strip.width, size=16), strip, _psnr_plot(report["rollout"], strip.width), *grid]
    below(page, gap=12, margin=12).save(path)


def _film_strip(starts: list[int], recording: Recording, imagined: np.ndarray) -> Image.Image:
    horizon = imagined.shape[1]
    likeness = [psnr(recording.pictures[start + horizon], recording.pictures[start]).mean() for start in starts]
    row = int(np.argmin(likeness))
    start, ahead = starts[row], np.unique(np.linspace(0, horizon, STRIP_STEPS + 1).round().astype(int))[1:]
    first = recording.pictures[start]
    rows = {
        "recorded": [first, *recording.pictures[start + ahead]],
        "imagined from the first frame and the recorded actions": [first, *imagined[row, ahead - 1]],
    }
    return film_strip(
        {name: [_cameras(pictures, STRIP_SIDE) for pictures in row] for name, row in rows.items()},
        [f"step {start}", *(f"{step} ahead" for step in ahead)],
        STRIP_SIDE * len(first),
    )


def _psnr_plot(rollout: dict[str, Any], width: int) -> Image.Image:
    ahead = range(1, rollout["horizon"] + 1)
    lines = [Line(ahead, rollout["psnr"][key], color, name) for key, (name, color) in PSNR_LINES.items()]
    return line_plot("PSNR of rollouts in dB", lines, (width, 200), "steps ahead")


def _action_plots(actions: dict[str, Any], recording: Recording, width: int) -> list[Image.Image]:
    """One plot a dimension: what was recorded, and predicted chunks end to end."""
    num_actions, starts = actions["num_actions"], actions["starts"]
    shown: list[int] = []
    for index, start in enumerate(starts):
        if not shown or start >= starts[shown[-1]] + num_actions:
            shown.append(index)
    plots = []
    for dimension, name in enumerate(actions["names"]):
        unit = f" ({actions['units'][dimension]})" if actions["units"] else ""
        lines = [Line(range(len(recording)), recording.actions[:, dimension], INK, "recorded")]
        for number, index in enumerate(shown):
            steps = range(starts[index], starts[index] + num_actions)
            legend = "predicted chunks" if number == 0 else None
            lines.append(Line(steps, actions["predicted"][index, :, dimension], (BLUE, ORANGE)[number % 2], legend))
        plots.append(line_plot(f"{name}{unit}", lines, (width, 150), "step"))
    return plots


def _cameras(pictures: np.ndarray, side: int) -> Image.Image:
    """The pictures (C, H, W, 3) of one time step in a row."""
    return beside([enlarge(Image.fromarray(picture), side) for picture in pictures], gap=0)
