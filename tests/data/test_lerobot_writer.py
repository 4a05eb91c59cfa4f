"""Datasets that `LeRobotWriter` makes: read back by our reader, and laid out as those of LeRobot's own writer."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from transformers_worldvla.data import load_episodes, scan_episodes
from transformers_worldvla.data.lerobot_writer import LeRobotWriter, describe, pool

LENGTHS, TASKS = (9, 6, 11), ("stack the cups", "open the drawer", "stack the cups")


def episode(number: int) -> dict[str, np.ndarray]:
    """Smooth pictures, so that a lossy codec keeps them, and numbers of every step."""
    rng, length = np.random.default_rng(number), LENGTHS[number]
    rows, columns = np.mgrid[0:64, 0:96]
    steps = np.arange(length).reshape(-1, 1, 1)
    front = np.stack([rows * 3 + 0 * steps, columns * 2 + 0 * steps, (rows + columns) // 2 + 8 * steps], axis=-1)
    return {
        "actions": rng.normal(size=(length, 4)).astype(np.float32),
        "state": rng.normal(size=(length, 5)).astype(np.float32),
        "front": front.astype(np.uint8),
        "wrist": front[:, ::-1].astype(np.uint8),
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three episodes, video files so small that every episode begins a new one."""
    folder = tmp_path_factory.mktemp("writer") / "dataset"
    with LeRobotWriter(folder, 10, ["front", "wrist"], ["x", "y", "z", "gripper"], video_frames=5) as writer:
        for number, task in enumerate(TASKS):
            values = episode(number)
            frames = {camera: values[camera] for camera in ("front", "wrist")}
            writer.add_episode(task, values["actions"], frames, state=values["state"])
        assert not folder.exists(), "it appears whole"
    return folder


def test_is_read_back(written: Path) -> None:
    dataset = load_episodes(written)
    assert dataset.format == "LeRobot v3.0" and dataset.fps == 10 and dataset.cameras == ("front", "wrist")
    assert dataset.action_names == ("x", "y", "z", "gripper")
    assert not scan_episodes(written).problems
    for number, found in enumerate(dataset):
        expected = episode(number)
        assert found.instruction == TASKS[number] and len(found) == LENGTHS[number]
        assert np.array_equal(found.actions, expected["actions"]) and np.array_equal(found.state, expected["state"])
        for camera in ("front", "wrist"):
            error = np.abs(found.frames(camera).astype(int) - expected[camera]).mean()
            assert error < 4, "the right frames, as far as the codec keeps them"


def kinds(schema: pa.Schema) -> dict[str, str]:
    """Column -> type; lists of fixed and of any length, texts of any length and list items of any name are the same."""
    found = {field.name: str(field.type).replace("large_string", "string") for field in schema}
    return {
        key: re.sub(r"fixed_size_list<(.*)>\[\d+\]", r"list<\1>", kind).replace("item:", "element:")
        for key, kind in found.items()
    }


def test_is_laid_out_as_by_lerobot(written: Path, small: Path) -> None:
    """Files, columns, types and keys of a dataset that lerobot 0.4.4 wrote."""
    theirs = small / "v30_video"
    for name in ("meta/tasks.parquet", "meta/episodes/chunk-000/file-000.parquet", "data/chunk-000/file-000.parquet"):
        ours, expected = pq.read_schema(written / name), pq.read_schema(theirs / name)
        assert kinds(ours) == {key: kind for key, kind in kinds(expected).items() if "next.success" not in key}
        assert set(ours.metadata or {}) == set(expected.metadata or {})
    pandas = json.loads(pq.read_schema(written / "meta/tasks.parquet").metadata[b"pandas"])
    assert pandas["index_columns"] == ["__index_level_0__"]
    ours, expected = (json.loads((root / "meta/info.json").read_text()) for root in (written, theirs))
    assert ours.keys() == expected.keys()
    assert ours["features"].keys() == expected["features"].keys() - {"next.success"}
    camera = "observation.images.front"
    assert ours["features"][camera].keys() == expected["features"][camera].keys()
    assert ours["features"][camera]["info"].keys() == expected["features"][camera]["info"].keys()
    ours, expected = (json.loads((root / "meta/stats.json").read_text()) for root in (written, theirs))
    assert ours.keys() == expected.keys() - {"next.success"}
    for key in ours:
        assert {name: np.shape(value) for name, value in ours[key].items()} == {
            name: np.shape(value) for name, value in expected[key].items()
        }


def test_episodes_share_video_files_until_one_is_full(written: Path, tmp_path: Path) -> None:
    rows = pq.read_table(written / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    assert [row["videos/observation.images.front/file_index"] for row in rows] == [0, 1, 2]
    with LeRobotWriter(tmp_path / "one", 10, ["front"]) as writer:
        for number, task in enumerate(TASKS):
            writer.add_episode(task, episode(number)["actions"], {"front": episode(number)["front"]})
    rows = pq.read_table(tmp_path / "one/meta/episodes/chunk-000/file-000.parquet").to_pylist()
    key = "videos/observation.images.front"
    assert [(row[f"{key}/file_index"], row[f"{key}/from_timestamp"]) for row in rows] == [(0, 0.0), (0, 0.9), (0, 1.5)]
    last = load_episodes(tmp_path / "one")[2]
    assert np.abs(last.frames("front").astype(int) - episode(2)["front"]).mean() < 4 and last.state is None


def test_statistics_of_episodes_pool_to_those_of_all_rows() -> None:
    rng = np.random.default_rng(0)
    parts = [rng.normal(shift, 2, size=(30 + shift, 3)) for shift in range(3)]
    found, expected = pool([describe(part) for part in parts]), describe(np.concatenate(parts))
    for name in ("min", "max", "mean", "std", "count"):
        assert found[name] == pytest.approx(expected[name])
    picture = describe(rng.integers(0, 256, (4, 8, 8, 3), dtype=np.uint8))
    assert picture["mean"].shape == (3, 1, 1) and 0.4 < picture["mean"].mean() < 0.6


def test_what_does_not_fit_leaves_nothing(tmp_path: Path) -> None:
    values = episode(0)
    wrong = [
        ("has the cameras front", values["actions"], {"wrist": values["wrist"]}),
        ("9 rows of finite numbers", np.full((9, 4), np.nan), {"front": values["front"]}),
        (r"is \(9, H, W, 3\) uint8", values["actions"], {"front": values["front"][:5]}),
        ("4 dimensions and 2 names", values["actions"], {"front": values["front"]}),
    ]
    for message, actions, frames in wrong:
        with pytest.raises(ValueError, match=message):
            with LeRobotWriter(tmp_path / "dataset", 10, ["front"], action_names=["x", "y"]) as writer:
                writer.add_episode("task", actions, frames)
    with pytest.raises(ValueError, match="at least one episode"):
        with LeRobotWriter(tmp_path / "dataset", 10, ["front"]):
            pass
    with pytest.raises(ValueError, match="observation.state differs"):
        with LeRobotWriter(tmp_path / "dataset", 10, ["front"]) as writer:
            writer.add_episode("task", values["actions"], {"front": values["front"]}, state=values["state"])
            writer.add_episode("task", values["actions"], {"front": values["front"]})
    assert not list(tmp_path.iterdir())
    (tmp_path / "dataset").mkdir()
    with pytest.raises(FileExistsError, match="exists already"):
        LeRobotWriter(tmp_path / "dataset", 10, ["front"])
