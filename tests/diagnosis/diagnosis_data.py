"""Recordings made to measure: a robot of three dimensions, and episodes of given actions for it."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from transformers_worldvla.action_tokenization_worldvla import Embodiment

ARM = Embodiment(
    "arm",
    low=(-1.0, -1.0, -1.0),
    high=(1.0, 1.0, 1.0),
    action_names=("x", "y", "gripper"),
    gripper={"index": 2, "open": -1.0, "close": 1.0},
    control_hz=10.0,
)


def usual_actions(steps: int = 60, seed: int = 0) -> np.ndarray:
    """(steps, 3) actions that use ARM's ranges well."""
    rng = np.random.default_rng(seed)
    return np.column_stack([rng.uniform(-0.95, 0.95, (steps, 2)), rng.choice([-1.0, 1.0], steps)])


def scene(side: int = 80) -> np.ndarray:
    """A picture (side, side, 3) that looks different in each of the eight orientations."""
    picture = np.zeros((side, side, 3), dtype=np.uint8)
    picture[:, :, 2] = np.linspace(0, 160, side)[:, None].astype(np.uint8)
    picture[: side // 4, : side // 2, 0] = 250
    picture[: side // 2, : side // 8, 1] = 200
    return picture


def write_recording(
    root: Path,
    actions: np.ndarray,
    names: tuple[str, ...] = ("x", "y", "gripper"),
    cameras: dict[str, np.ndarray] | None = None,
    fps: float = 10,
    instruction: str = "put the cup on the plate",
) -> Path:
    """One episode as a folder; each camera always sees one picture."""
    episode = root / f"episode_{len(list(root.glob('episode_*')))}"
    for camera, picture in ({"image": scene()} if cameras is None else cameras).items():
        (episode / camera).mkdir(parents=True)
        for step in range(len(actions)):
            Image.fromarray(picture).save(episode / camera / f"image_{step}.png")
    rows = [",".join(names), *(",".join(map(repr, row)) for row in actions.tolist())]
    (episode / "actions.csv").write_text("\n".join(rows) + "\n")
    (episode / "instruction.txt").write_text(instruction)
    (episode / "episode.json").write_text(json.dumps({"fps": fps}))
    return root
