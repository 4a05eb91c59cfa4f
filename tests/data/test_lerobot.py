import json
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from transformers_worldvla.data import EpisodeError, load_episodes
from transformers_worldvla.data.lerobot import flat_values

VIDEO_SETS = ["lerobot_v30_video", "lerobot_v21_video"]


def parse(name: str) -> tuple[int, int, str]:
    """`ep000003_fr000115/observation.images.image` -> (3, 115, that key)."""
    place, key = name.split("/")
    return int(place[2:8]), int(place[11:]), key


@pytest.mark.parametrize("name", VIDEO_SETS)
def test_frames_are_those_of_the_real_reader(libero, name):
    dataset = load_episodes(libero / name)
    pictures = np.load(libero / "expected" / f"{name}_images.npz")
    assert len(pictures) >= 2
    for key in pictures:
        episode, step, camera = parse(key)
        assert np.array_equal(dataset[episode].frame(camera, step), pictures[key]), key
        assert np.array_equal(dataset[episode].frames(camera.split(".")[-1])[step], pictures[key]), key


@pytest.mark.parametrize("name", VIDEO_SETS)
def test_rows_are_those_of_the_real_reader(libero, name):
    dataset = load_episodes(libero / name)
    expected = json.loads((libero / "expected" / f"{name}.json").read_text())
    assert len(expected["frames"]) >= 4
    for row in expected["frames"]:
        episode = dataset[row["episode"]]
        assert np.array_equal(episode.actions[row["frame"]], np.float32(row["action"]))
        assert np.array_equal(episode.state[row["frame"]], np.float32(row["observation.state"]))
        assert episode.instruction == row["task"]


@pytest.mark.parametrize("name", ["v21_video", "v21_image", "v30_video", "v30_image"])
def test_datasets_by_the_real_writers_read_like_with_the_real_readers(small, name):
    dataset, expected = load_episodes(small / name), np.load(small / f"{name}.npz")
    assert dataset.cameras == ("front", "wrist")
    for camera in dataset.cameras:
        frames = np.concatenate([episode.frames(camera) for episode in dataset])
        assert np.array_equal(frames[expected["kept"]], expected[f"observation.images.{camera}"])
    for episode in dataset:
        mine = expected["episode_index"] == episode.index
        assert np.array_equal(episode.frame("wrist", 2), episode.frames("wrist")[2])
        assert np.array_equal(episode.actions, expected["action"][mine])
        assert np.array_equal(episode.state, expected["observation.state"][mine])
        assert {episode.instruction} == set(expected["task"][mine])
        assert episode.success == expected["next.success"][mine].any()


def test_episodes_begin_and_end_inside_row_groups(copy_of, small):
    """Converters write row groups that know nothing of episodes."""
    folder = copy_of("v30_image")
    files = sorted((folder / "data").rglob("*.parquet"))
    assert len(files) > 1
    for path in files:
        pq.write_table(pq.read_table(path), path, row_group_size=4)
    for episode, other in zip(load_episodes(folder), load_episodes(small / "v30_image"), strict=True):
        assert np.array_equal(episode.frames("wrist"), other.frames("wrist"))
        assert np.array_equal(episode.actions, other.actions)


def test_interface_of_an_episode(libero):
    dataset = load_episodes(libero / "lerobot_v30_video")
    episode = dataset[1]
    assert (len(episode), episode.index, episode.fps, episode.success) == (60, 1, 20.0, None)
    assert episode.cameras == dataset.cameras == ("image", "wrist_image")
    assert episode.frames("image").shape == (60, 256, 256, 3)
    assert episode.frames("image").dtype == np.uint8
    assert (episode.actions.shape, episode.actions.dtype) == ((60, 7), np.float32)
    assert (episode.state.shape, episode.state.dtype) == ((60, 8), np.float32)
    assert dataset.action_names == ("x", "y", "z", "rx", "ry", "rz", "gripper")


def test_names_in_a_dict_of_v21(libero):
    dataset = load_episodes(libero / "lerobot_v21_video")
    assert dataset.action_names == ("x", "y", "z", "rx", "ry", "rz", "gripper")
    assert dataset.state_names[-2:] == ("gripper_0", "gripper_1")


def test_each_camera_has_its_own_file_index(libero):
    """In episode 2 the image camera is in its second file already, the wrist camera still in its first."""
    dataset = load_episodes(libero / "lerobot_v30_video")
    files = [[span.file[-5] for span in entry.videos.values()] for entry in dataset.entries]
    assert files == [["0", "0"], ["0", "0"], ["1", "0"], ["1", "1"], ["2", "2"]]
    full = {camera: dataset[2].frames(camera) for camera in dataset.cameras}
    for camera in dataset.cameras:
        for step in (0, 31, 59):
            assert np.array_equal(dataset[2].frame(camera, step), full[camera][step])


def test_float_error_of_the_start_in_a_file_does_not_move_a_frame(copy_of, libero):
    folder = copy_of("lerobot_v30_video")
    path = folder / "meta/episodes/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    for name in [name for name in table.column_names if name.endswith("_timestamp")]:
        shifted = [value - 1e-6 for value in table[name].to_pylist()]
        table = table.set_column(table.column_names.index(name), name, pa.array(shifted))
    pq.write_table(table, path)
    moved, straight = load_episodes(folder)[1], load_episodes(libero / "lerobot_v30_video")[1]
    assert np.array_equal(moved.frames("image"), straight.frames("image"))


def test_one_frame_needs_only_the_bytes_around_it(copy_of, libero):
    """Everything behind the first third of a video is destroyed; its first frames can still be read."""
    folder = copy_of("lerobot_v30_video")
    video = folder / "videos/observation.images.image/chunk-000/file-000.mp4"
    data = bytearray(video.read_bytes())
    data[len(data) // 3 :] = bytes(len(data) - len(data) // 3)
    video.write_bytes(data)
    damaged, whole = load_episodes(folder)[0], load_episodes(libero / "lerobot_v30_video")[0]
    assert np.array_equal(damaged.frame("image", 7), whole.frame("image", 7))
    with pytest.raises(EpisodeError, match=r"file-000.mp4: episode 0: "):
        damaged.frames("image")


@pytest.mark.parametrize("kind", ["video", "image"])
def test_version_2_0(copy_of, small, kind):
    """v2.0 is v2.1 with one statistics file for the whole dataset."""
    folder = copy_of(f"v21_{kind}")
    info = json.loads((folder / "meta/info.json").read_text())
    (folder / "meta/info.json").write_text(json.dumps(info | {"codebase_version": "v2.0"}))
    (folder / "meta/episodes_stats.jsonl").unlink()
    dataset, same = load_episodes(folder), load_episodes(small / f"v21_{kind}")
    assert dataset.format == "LeRobot v2.0"
    assert np.array_equal(dataset[2].frames("wrist"), same[2].frames("wrist"))


@pytest.mark.parametrize("version", ["v1.6", "v4.0", None])
def test_other_versions_are_refused(copy_of, version):
    folder = copy_of("lerobot_v21_video")
    info = json.loads((folder / "meta/info.json").read_text())
    (folder / "meta/info.json").write_text(json.dumps(info | {"codebase_version": version}))
    with pytest.raises(EpisodeError, match=rf"meta/info.json: codebase_version is {version}, readable are v2.0, v2.1"):
        load_episodes(folder)


def test_openpi_names_the_action_actions_and_has_no_state(copy_of):
    folder = copy_of("lerobot_v21_video")
    text = (folder / "meta/info.json").read_text()
    info = json.loads(text.replace('"action"', '"actions"'))
    del info["features"]["observation.state"]
    (folder / "meta/info.json").write_text(json.dumps(info))
    for path in folder.rglob("*.parquet"):
        table = pq.read_table(path)
        pq.write_table(table.rename_columns([name.replace("action", "actions") for name in table.column_names]), path)
    episode = load_episodes(folder)[0]
    assert episode.actions.shape == (116, 7)
    assert episode.state is None


def test_a_dataset_without_action_lists_what_it_has(copy_of):
    folder = copy_of("lerobot_v21_video")
    text = (folder / "meta/info.json").read_text().replace('"action"', '"command"')
    (folder / "meta/info.json").write_text(text)
    with pytest.raises(EpisodeError, match='has no feature "action" or "actions", only observation.state, command'):
        load_episodes(folder)


@pytest.mark.parametrize("names", [["channels", "height", "width"], None])
def test_shape_of_a_camera_may_be_channels_first_or_unknown(copy_of, libero, names):
    folder = copy_of("lerobot_v21_video")
    info = json.loads((folder / "meta/info.json").read_text())
    info["features"]["observation.images.image"] |= {"shape": [3, 256, 256], "names": names}
    (folder / "meta/info.json").write_text(json.dumps(info))
    assert load_episodes(folder)[0].frame("image", 0).shape == (256, 256, 3)


def test_several_tasks_in_an_episode_are_not_hidden(copy_of):
    folder = copy_of("lerobot_v21_video")
    path = folder / "meta/episodes.jsonl"
    path.write_text(path.read_text().replace('stove"]', 'stove", "put the wine bottle on the rack"]', 1))
    dataset = load_episodes(folder)
    with pytest.warns(UserWarning, match="episode 0 has 2 tasks, its instruction is the first"):
        episode = dataset[0]
    assert episode.instruction == "put the bowl on the stove"


def test_numbers_of_any_arrow_layout():
    rows = [[1.0, 2.0], [3.0, 4.0]]
    for kind in (pa.list_(pa.float32()), pa.list_(pa.float32(), 2), pa.large_list(pa.float64())):
        assert flat_values(pa.chunked_array([pa.array(rows, kind)])).tolist() == [1, 2, 3, 4]
    assert flat_values(pa.chunked_array([pa.array([True, False])])).tolist() == [True, False]
    extension = pa.ExtensionArray.from_storage(_Array2D(), pa.array([rows], pa.list_(pa.list_(pa.float32()))))
    assert flat_values(pa.chunked_array([extension])).tolist() == [1, 2, 3, 4]


class _Array2D(pa.ExtensionType):
    """As the type that `datasets` registers for features of two dimensions."""

    def __init__(self) -> None:
        super().__init__(pa.list_(pa.list_(pa.float32())), "test.array2d")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: pa.DataType, serialized: bytes) -> "_Array2D":
        return cls()


def plain_decoding(path: Path) -> np.ndarray:
    """An oracle without seeking: every frame of a file, from its start."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.mark.parametrize("camera", ["image", "wrist_image"])
def test_every_frame_of_v30_is_at_its_number_in_the_file(libero, camera):
    folder, key = libero / "lerobot_v30_video", f"observation.images.{camera}"
    files = [plain_decoding(path) for path in sorted((folder / "videos" / key).rglob("*.mp4"))]
    rows = pq.read_table(folder / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    for row, episode in zip(rows, load_episodes(folder), strict=True):
        first = round(20 * row[f"videos/{key}/from_timestamp"])
        expected = files[row[f"videos/{key}/file_index"]][first : first + 60]
        assert np.array_equal(episode.frames(camera), expected)
        assert np.array_equal(episode.frames(camera, 13, 29), expected[13:29])


def test_every_frame_of_v21_is_at_its_number_in_the_file(libero):
    folder = libero / "lerobot_v21_video"
    expected = plain_decoding(folder / "videos/chunk-000/observation.images.image/episode_000001.mp4")
    episode = load_episodes(folder)[1]
    assert np.array_equal(episode.frames("image"), expected)
    assert np.array_equal(episode.frames("image", 101, 173), expected[101:])
