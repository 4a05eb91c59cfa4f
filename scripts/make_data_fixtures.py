"""Makes tests/fixtures/libero and lerobot_small: `python scripts/make_data_fixtures.py RECORDINGS ROUNDTRIP`.

RECORDINGS holds `lerobot_v30_video`, `lerobot_v21_video`, `libero_hdf5` and `expected`. The v3.0 set is cut (packets
copied, see cut_lerobot.py), of the v2.1 set the first episodes stay byte for byte, of the HDF5 file the first steps of
one demo. Of what the real readers returned (`expected`) the rows and pictures that are still there stay.
ROUNDTRIP is the folder of lerobot_roundtrip.sh: its datasets stay whole, of what LeRobot returned some pictures.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from cut_lerobot import cut

from transformers_worldvla.data import load_episodes

FIXTURES = Path(__file__).parents[1] / "tests" / "fixtures"
TARGET, SMALL = FIXTURES / "libero", FIXTURES / "lerobot_small"
V30, V30_STEPS = [0, 27, 28, 30, 83], 60  # the cameras split their files at episodes 28 and 30
V21 = [0, 1]
HDF5_STEPS = 12


def make_libero(recordings: Path) -> None:
    for path in TARGET.glob("[!R]*"):  # all but the README
        shutil.rmtree(path)
    cut(load_episodes(recordings / "lerobot_v30_video"), TARGET / "lerobot_v30_video", V30, V30_STEPS)
    keep_first_episodes(recordings / "lerobot_v21_video", TARGET / "lerobot_v21_video", len(V21))
    shorten_demo(next((recordings / "libero_hdf5").glob("*.hdf5")), TARGET / "libero_hdf5", HDF5_STEPS)
    keep_expected(recordings / "expected", "lerobot_v30_video", "ep{:06d}_fr{:06d}", V30, V30_STEPS)
    keep_expected(recordings / "expected", "lerobot_v21_video", "ep{:06d}_fr{:06d}", V21, None)
    keep_expected(recordings / "expected", "libero_hdf5", "demo_{}_fr{:06d}", [0], HDF5_STEPS)


def make_small(roundtrip: Path) -> None:
    for path in SMALL.glob("v*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for version, name in (("0.3.3", "v21"), ("0.4.4", "v30")):
        for kind, decoder in (("video", "pyav"), ("image", "stored")):
            source, target = roundtrip / f"data-{version}", SMALL / f"{name}_{kind}"
            shutil.copytree(source / kind, target, ignore=shutil.ignore_patterns("images", ".cache"))
            expected = dict(np.load(source / f"{kind}_{decoder}.npz"))
            kept = np.arange(0, len(expected["action"]), 5)
            cameras = {key: value[kept] for key, value in expected.items() if value.ndim == 4}
            np.savez_compressed(f"{target}.npz", **(expected | cameras), kept=kept)


def keep_first_episodes(source: Path, target: Path, count: int) -> None:
    """The first episodes of a v2.1 dataset, every file of theirs as it is."""
    info = json.loads((source / "meta/info.json").read_text())
    for path in sorted(source.rglob("episode_*")):
        if int(path.stem.split("_")[1]) < count:
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    (target / "meta").mkdir()
    (target / "meta/tasks.jsonl").write_bytes((source / "meta/tasks.jsonl").read_bytes())
    for name in ("episodes.jsonl", "episodes_stats.jsonl"):
        lines = (source / "meta" / name).read_text().splitlines(keepends=True)
        (target / "meta" / name).write_text("".join(lines[:count]))
    lengths = [json.loads(line)["length"] for line in (target / "meta/episodes.jsonl").read_text().splitlines()]
    info |= {"total_episodes": count, "total_frames": sum(lengths), "splits": {"train": f"0:{count}"}}
    info["total_videos"] = len(list(target.rglob("*.mp4")))
    (target / "meta/info.json").write_text(json.dumps(info, indent=4))


def shorten_demo(source: Path, folder: Path, steps: int) -> None:
    """The first steps of the first demo of a LIBERO file, with all attributes."""
    folder.mkdir(parents=True)
    with h5py.File(source) as old, h5py.File(folder / source.name, "w") as new:
        data = new.create_group("data")
        for name, value in old["data"].attrs.items():
            data.attrs[name] = value
        data.attrs["num_demos"], data.attrs["total"] = 1, steps
        demo = data.create_group("demo_0")
        for name, value in old["data/demo_0"].attrs.items():
            demo.attrs[name] = value
        demo.attrs["num_samples"] = steps

        def copy(name: str, item: Any) -> None:
            if isinstance(item, h5py.Dataset):
                demo.create_dataset(name, data=item[:steps], compression="gzip")

        old["data/demo_0"].visititems(copy)


def keep_expected(expected: Path, name: str, array: str, episodes: list[int], steps: int | None) -> None:
    """Rows and pictures of the kept steps, under the new episode numbers."""
    report = json.loads((expected / f"{name}.json").read_text())
    pictures = np.load(expected / f"{name}_images.npz")
    new = {old: position for position, old in enumerate(episodes)}
    frames, arrays = [], {}
    for frame in report["frames"]:
        if frame["episode"] not in new or (steps is not None and frame["frame"] >= steps):
            continue
        prefix = array.format(frame["episode"], frame["frame"])
        renamed = array.format(new[frame["episode"]], frame["frame"])
        arrays |= {key.replace(prefix, renamed): pictures[key] for key in pictures if key.startswith(prefix)}
        kept = ("frame", "action", "observation.state", "actions", "ee_states", "gripper_states", "task")
        frames.append({"episode": new[frame["episode"]]} | {key: frame[key] for key in kept if key in frame})
    (TARGET / "expected").mkdir(exist_ok=True)
    content = {"reader": report["reader"], "original_episodes": episodes, "frames": frames}
    (TARGET / "expected" / f"{name}.json").write_text(json.dumps(content, indent=1))
    np.savez_compressed(TARGET / "expected" / f"{name}_images.npz", **arrays)


if __name__ == "__main__":
    make_libero(Path(sys.argv[1]))
    make_small(Path(sys.argv[2]))
