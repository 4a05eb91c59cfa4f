"""The two halves of `lerobot_roundtrip.sh`, each run where its packages are.

    write FOLDER      with lerobot: write datasets with its writer, read them with its reader, keep what it returned
    compare FOLDER    with transformers_worldvla: read the same datasets and compare, bit by bit

Datasets: `video` (mp4) and `image` (pictures in parquet), in v3.0 with files so small that cameras split at different
episodes. LeRobot has no writer of v2.0 any more; `*_v20` is v2.1 with v2.0's one statistics file, and LeRobot reads it.
"""

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers_worldvla.data import EpisodeDataset

LENGTHS, HEIGHT, WIDTH, FPS = (9, 6, 11, 7), 64, 96, 10
TASKS = ("stack the cups", "open the drawer", "stack the cups", "close the drawer")
CAMERAS = ("observation.images.front", "observation.images.wrist")
MEGABYTES_A_FILE = 0.02
ACTIONS = ["x", "y", "z", "gripper"]


def make_frame(episode: int, step: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """One time step. The pictures are not symmetric and the wrist camera's noise makes its files larger."""
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
    front = np.stack([rows * 3, columns * 2, (rows + columns + 9 * step + 40 * episode) % 256], axis=-1)
    wrist = front[::-1] + rng.integers(-60, 60, (HEIGHT // 4, WIDTH // 4, 3)).repeat(4, 0).repeat(4, 1)
    return {
        CAMERAS[0]: front.clip(0, 255).astype(np.uint8),
        CAMERAS[1]: wrist.clip(0, 255).astype(np.uint8),
        "observation.state": rng.normal(size=5).astype(np.float32),
        "action": rng.normal(size=4).astype(np.float32),
        "next.success": np.array([episode % 2 == 0 and step == LENGTHS[episode] - 1]),
    }


def write(folder: Path) -> None:
    """Write and read with lerobot."""
    from lerobot.datasets.lerobot_dataset import CODEBASE_VERSION

    folder.mkdir(parents=True)
    for kind in ("video", "image"):
        write_dataset(folder / kind, kind)
        read_dataset(folder / kind)
        if CODEBASE_VERSION == "v2.1":
            make_v20(folder / kind, folder / f"{kind}_v20")
            read_dataset(folder / f"{kind}_v20")


def write_dataset(root: Path, kind: str) -> None:
    """Record the episodes with LeRobot's writer, cameras as `kind`."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    picture = {"dtype": kind, "shape": (HEIGHT, WIDTH, 3), "names": ["height", "width", "channels"]}
    features = {camera: picture for camera in CAMERAS} | {
        "observation.state": {"dtype": "float32", "shape": (5,), "names": None},
        "action": {"dtype": "float32", "shape": (4,), "names": ACTIONS},
        "next.success": {"dtype": "bool", "shape": (1,), "names": None},
    }
    dataset = LeRobotDataset.create("test/roundtrip", FPS, features, root=root, use_videos=kind == "video")
    is_v3 = hasattr(dataset, "finalize")
    if is_v3:
        dataset.meta.update_chunk_settings(
            data_files_size_in_mb=MEGABYTES_A_FILE, video_files_size_in_mb=MEGABYTES_A_FILE
        )
    rng = np.random.default_rng(0)
    for episode, (length, task) in enumerate(zip(LENGTHS, TASKS, strict=True)):
        for step in range(length):
            frame = make_frame(episode, step, rng)
            dataset.add_frame(frame | {"task": task}) if is_v3 else dataset.add_frame(frame, task)
        dataset.save_episode()
    if is_v3:
        dataset.finalize()


def make_v20(source: Path, target: Path) -> None:
    """v2.0 differs from v2.1 by its version and by one `stats.json` in place of statistics an episode."""
    shutil.copytree(source, target)
    info = json.loads((target / "meta/info.json").read_text())
    (target / "meta/info.json").write_text(json.dumps(info | {"codebase_version": "v2.0"}))
    first = json.loads((target / "meta/episodes_stats.jsonl").read_text().splitlines()[0])
    (target / "meta/stats.json").write_text(json.dumps(first["stats"]))
    (target / "meta/episodes_stats.jsonl").unlink()


def read_dataset(root: Path) -> None:
    """Read everything with LeRobot's reader, once a video decoder, into `<root>_<decoder>.npz`."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    has_videos = root.name.startswith("video")
    for decoder in ("pyav", "torchcodec") if has_videos else (None,):
        try:
            dataset = LeRobotDataset("test/roundtrip", root=root, video_backend=decoder)
            items = [dataset[position] for position in range(len(dataset))]
        except (ImportError, RuntimeError, AttributeError) as error:
            print(f"{root.name}: LeRobot cannot read with {decoder} here: {str(error).strip().splitlines()[0]}")
            continue
        arrays = {
            camera: np.stack(
                [np.rint(255 * item[camera].numpy()).astype(np.uint8).transpose(1, 2, 0) for item in items]
            )
            for camera in CAMERAS
        }
        arrays |= {key: np.stack([item[key].numpy() for item in items]) for key in ("action", "observation.state")}
        arrays |= {key: np.array([item[key].item() for item in items]) for key in ("episode_index", "next.success")}
        arrays["task"] = np.array([item["task"] for item in items])
        np.savez(root.parent / f"{root.name}_{decoder or 'stored'}.npz", **arrays)


def compare(folder: Path) -> None:
    """Read with transformers_worldvla, with every video decoder at hand; exits with 1 when anything differs."""
    from transformers_worldvla.data import load_episodes, scan_episodes
    from transformers_worldvla.data.video import BACKEND_VARIABLE

    failures = 0
    for expected in sorted(folder.glob("*.npz")):
        name, theirs = expected.stem.rsplit("_", 1)
        has_torchcodec = importlib.util.find_spec("torchcodec") is not None
        for ours in ("stored",) if theirs == "stored" else ("pyav", "torchcodec") if has_torchcodec else ("pyav",):
            os.environ[BACKEND_VARIABLE] = "pyav" if ours == "stored" else ours
            dataset, report = load_episodes(folder / name), scan_episodes(folder / name)
            worst = compare_arrays(dataset, dict(np.load(expected)))
            files = len({span.file for entry in dataset.entries for span in entry.videos.values()})
            verdict = "same" if worst == 0 and report.ok else "DIFFERENT"
            failures += verdict != "same"
            print(f"{verdict}: {name} ({dataset.format}, {len(dataset)} episodes, {files} video files)", end=", ")
            print(
                f"decoder theirs {theirs}, ours {ours}: largest difference {worst:g}, {len(report.problems)} problems"
            )
    sys.exit(1 if failures else 0)


def compare_arrays(dataset: "EpisodeDataset", expected: dict[str, np.ndarray]) -> float:
    """The largest difference in a frame, action or state; infinite when tasks, success or lengths differ."""
    worst = 0.0
    for episode in dataset:
        mine = expected["episode_index"] == episode.index
        told = set(expected["task"][mine]), bool(expected["next.success"][mine].any()), int(mine.sum())
        if told != ({episode.instruction}, episode.success, len(episode)):
            return float("inf")
        pairs = [(episode.frames(camera), expected[camera][mine]) for camera in CAMERAS]
        pairs += [(episode.actions, expected["action"][mine]), (episode.state, expected["observation.state"][mine])]
        worst = max([worst, *(float(np.abs(ours.astype(float) - theirs).max()) for ours, theirs in pairs)])
    return worst


if __name__ == "__main__":
    {"write": write, "compare": compare}[sys.argv[1]](Path(sys.argv[2]))
