import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest

from transformers_worldvla.data import EpisodeError, load_episodes
from transformers_worldvla.data.episodes import finite_rows, import_extra, select_cameras, short_camera_names


def test_error_is_one_line_that_names_file_and_episode():
    error = EpisodeError("ends at\n 3 s", "data/a.mp4", 7)
    assert str(error) == "data/a.mp4: episode 7: ends at 3 s"
    assert (error.file, error.episode, error.reason) == ("data/a.mp4", 7, "ends at 3 s")
    assert str(EpisodeError("is not JSON", "meta/info.json")) == "meta/info.json: is not JSON"


def test_error_survives_the_way_from_a_worker_process():
    error = pickle.loads(pickle.dumps(EpisodeError("is empty", "a.mp4", 7)))
    assert (str(error), error.file, error.episode) == ("a.mp4: episode 7: is empty", "a.mp4", 7)


def test_cameras_are_called_by_their_last_name_unless_two_share_it():
    assert short_camera_names(["observation.images.top", "observation.image", "wrist_image"]) == {
        "top": "observation.images.top",
        "image": "observation.image",
        "wrist_image": "wrist_image",
    }
    assert list(short_camera_names(["observation.images.image", "observation.image", "observation.images.top"])) == [
        "observation.images.image",
        "observation.image",
        "top",
    ]


def test_cameras_are_chosen_by_either_name_in_the_order_asked_for():
    keys = ["observation.images.image", "observation.images.wrist_image"]
    assert list(select_cameras(["wrist_image", "observation.images.image"], keys)) == ["wrist_image", "image"]
    assert select_cameras("wrist_image", keys) == {"wrist_image": keys[1]}
    with pytest.raises(
        ValueError, match=r'no camera "wirst_image" here; .*image, wrist_image, did you .*"wrist_image"\?'
    ):
        select_cameras(["wirst_image"], keys)


def test_a_camera_may_be_renamed():
    keys = ["observation.images.agentview_rgb", "observation.images.wrist"]
    chosen = select_cameras(["wrist", "image=agentview_rgb"], keys)
    assert list(chosen.items()) == [("wrist", keys[1]), ("image", keys[0])]
    assert select_cameras("image=observation.images.wrist", keys) == {"image": keys[1]}
    with pytest.raises(ValueError, match='no camera "agentvew_rgb" here'):
        select_cameras(["image=agentvew_rgb"], keys)
    with pytest.raises(ValueError, match='two cameras would be called "wrist"'):
        select_cameras(["wrist", "wrist=agentview_rgb"], keys)


def test_a_renamed_camera_shows_the_same_pictures(libero):
    plain, renamed = (load_episodes(libero / "lerobot_v21_video", cameras=name)[0] for name in ("image", "top=image"))
    assert renamed.cameras == ("top",)
    assert np.array_equal(renamed.frames("top", 0, 3), plain.frames("image", 0, 3))


def test_unknown_camera_of_an_episode_suggests_the_nearest(libero):
    episode = load_episodes(libero / "lerobot_v21_video", cameras="image")[0]
    assert episode.cameras == ("image",)
    with pytest.raises(ValueError, match='no camera "wrist_image" here; the cameras are: image, did you mean "image"'):
        episode.frames("wrist_image")


def test_a_dataset_is_a_sequence(libero):
    dataset = load_episodes(libero / "lerobot_v30_video")
    assert len(dataset) == 5
    assert [episode.index for episode in dataset] == [0, 1, 2, 3, 4]
    assert dataset[-1].index == 4
    assert [episode.index for episode in dataset[1:3]] == [1, 2]
    assert dataset.lengths == [len(episode) for episode in dataset] == [60] * 5
    with pytest.raises(IndexError, match="has episodes 0 to 4, not 5"):
        dataset[5]
    assert "LeRobot v3.0): 5 episodes, 300 frames, cameras image, wrist_image, 20 fps" in repr(dataset)


def test_a_dataset_travels_to_worker_processes(libero):
    for name in ("lerobot_v30_video", "libero_hdf5"):
        dataset = load_episodes(libero / name)
        copy = pickle.loads(pickle.dumps(dataset))
        assert np.array_equal(copy[0].frame(copy.cameras[0], 3), dataset[0].frame(dataset.cameras[0], 3))


def test_steps_outside_the_episode_are_refused(libero):
    episode = load_episodes(libero / "lerobot_v30_video")[0]
    assert np.array_equal(episode.frame("image", -1), episode.frame("image", 59))
    for start, stop in ((60, 61), (5, 5), (0, 61), (-1, 1)):
        with pytest.raises(IndexError, match="episode 0 has steps 0 to 59"):
            episode.frames("image", start, stop)
    with pytest.raises(IndexError, match="not 60 to 60"):
        episode.frame("image", 60)


def test_not_finite_numbers_are_refused():
    rows = np.zeros((4, 7))
    rows[2, 3] = np.nan
    with pytest.raises(EpisodeError, match="a.parquet: episode 5: action of step 2 is not finite"):
        finite_rows(rows, "action", "a.parquet", 5)


def test_fingerprint_tells_one_dataset_from_another(copy_of, libero):
    original, copy = libero / "lerobot_v21_video", copy_of("lerobot_v21_video")
    assert load_episodes(copy).fingerprint == load_episodes(original).fingerprint
    assert load_episodes(copy).revision is None
    shutil.copy(
        copy / "data/chunk-000/episode_000000.parquet", copy / "data/chunk-000/episode_000001.parquet"
    )  # one other episode
    assert load_episodes(copy).fingerprint != load_episodes(original).fingerprint


def test_missing_package_names_the_extra():
    with pytest.raises(ImportError, match=r'needs no_such_package: pip install "transformers_worldvla\[train\]"$'):
        import_extra("no_such_package.part")


def test_nothing_heavy_is_imported_before_it_is_needed():
    script = """
import sys, transformers_worldvla.data
print(sorted({"av", "pyarrow", "h5py", "torchcodec", "lerobot", "datasets"} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_what_is_no_dataset_says_what_was_looked_for(tmp_path, libero):
    with pytest.raises(FileNotFoundError, match=r"holds no meta/info.json \(LeRobot\), no \*.hdf5"):
        load_episodes(tmp_path)
    with pytest.raises(FileNotFoundError, match="/not/there: no such file or folder"):
        load_episodes("/not/there")
    with pytest.raises(ValueError, match="revision applies to Hub repositories"):
        load_episodes(libero / "lerobot_v21_video", revision="v2.1")
