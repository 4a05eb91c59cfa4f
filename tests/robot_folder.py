"""Recordings of a toy robot with all that preparation looks for: several tasks, pauses, failures, two cameras."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

NAMES = ("x", "y", "gripper")
TASKS = ("lift the cup", "open the box")


def toy_actions(rng: np.random.Generator, steps: int) -> np.ndarray:
    """(steps, 3) delta actions: motion in two dimensions with pauses, and a gripper that changes now and then."""
    is_moving = rng.random((steps, 1)) < 0.6
    is_moving[1] = True
    motion = rng.uniform(-1, 1, (steps, 2)) * is_moving
    return np.column_stack([motion, np.where(rng.random(steps) < 0.8, 1.0, -1.0)]).astype(np.float32)


def write_recordings(
    root: Path,
    steps: Sequence[int] = (9, 12, 7, 10, 8, 11),
    cameras: Sequence[str] = ("image", "wrist"),
    side: int = 72,
    failed: Sequence[int] = (),
    seed: int = 0,
) -> Path:
    """A folder of episodes, tasks in turn; every frame is a different picture. `failed` ones say so."""
    rng = np.random.default_rng(seed)
    for number, length in enumerate(steps):
        episode = root / f"episode_{number}"
        for camera in cameras:
            (episode / camera).mkdir(parents=True)
            for step in range(length):
                blocks = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
                Image.fromarray(blocks).resize((side, side)).save(episode / camera / f"image_{step}.png")
        rows = [",".join(NAMES), *(",".join(map(repr, row.tolist())) for row in toy_actions(rng, length))]
        (episode / "actions.csv").write_text("\n".join(rows) + "\n")
        np.save(episode / "state.npy", rng.normal(size=(length, 4)).astype(np.float32))
        (episode / "instruction.txt").write_text(TASKS[number % len(TASKS)])
        (episode / "episode.json").write_text(json.dumps({"fps": 10, "success": number not in failed}))
    return root
