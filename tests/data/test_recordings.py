"""The full recordings that the fixtures are cut from, and all that the real readers returned for them."""

import json

import numpy as np
import pytest

from transformers_worldvla.data import load_episodes, scan_episodes


@pytest.mark.parametrize("name", ["lerobot_v30_video", "lerobot_v21_video"])
def test_everything_that_the_real_reader_returned(recordings, name):
    dataset = load_episodes(recordings / name)
    expected = json.loads((recordings / "expected" / f"{name}.json").read_text())
    assert (len(dataset), sum(dataset.lengths), dataset.fps) == (
        expected["num_episodes"],
        expected["num_frames"],
        expected["fps"],
    )
    assert dataset.lengths == expected["episode_lengths"]
    assert set(dataset.tasks.values()) == set(expected["tasks"])
    for row in expected["frames"]:
        episode = dataset[row["episode"]]
        assert np.array_equal(episode.actions[row["frame"]], np.float32(row["action"]))
        assert np.array_equal(episode.state[row["frame"]], np.float32(row["observation.state"]))
        assert episode.instruction == row["task"]
    pictures = np.load(recordings / "expected" / f"{name}_images.npz")
    for image in expected["images"]:
        frame = dataset[image["episode"]].frame(image["key"], image["frame"])
        assert np.array_equal(frame, pictures[image["array"]])
    actions = np.concatenate([episode.actions for episode in dataset])
    assert np.allclose(actions.min(0), expected["stats"]["action"]["min"])
    assert np.allclose(actions.max(0), expected["stats"]["action"]["max"])


def test_everything_in_the_hdf5_file(recordings):
    dataset = load_episodes(recordings / "libero_hdf5")
    expected = json.loads((recordings / "expected/libero_hdf5.json").read_text())
    assert dataset.lengths == expected["episode_lengths"]
    for row in expected["frames"]:
        assert np.array_equal(dataset[row["episode"]].actions[row["frame"]], np.float32(row["actions"]))
    pictures = np.load(recordings / "expected/libero_hdf5_images.npz")
    for name, raw in pictures.items():
        place, camera = name.split("/")
        demo, frame = int(place[5]), int(place[9:])
        assert np.array_equal(dataset[demo].frame(camera, frame), np.rot90(raw, 2))
    assert [episode.success for episode in dataset] == [True, True]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lerobot_v30_video", "lerobot_v21_video", "libero_hdf5"])
def test_a_scan_finds_nothing_wrong(recordings, name):
    report = scan_episodes(recordings / name)
    assert report.ok, str(report)
    assert report.num_frames == 2 * sum(load_episodes(recordings / name).lengths)
