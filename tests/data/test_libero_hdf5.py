import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from transformers_worldvla.data import EpisodeError, load_episodes
from transformers_worldvla.data.libero_hdf5 import instruction_from_task_name

NAME = "put_the_wine_bottle_on_the_rack_demo.hdf5"


def edit(folder: Path, change) -> Path:
    """Let `change` edit the file in `folder`; returns the file."""
    with h5py.File(folder / NAME, "r+") as file:
        change(file["data"])
    return folder / NAME


def replace(group: h5py.Group, name: str, value: np.ndarray) -> None:
    del group[name]
    group[name] = value


def test_raw_frames_are_turned_by_180_degrees_once(libero):
    episode = load_episodes(libero / "libero_hdf5")[0]
    raw = np.load(libero / "expected" / "libero_hdf5_images.npz")["demo_0_fr000000/agentview_rgb"]
    assert np.array_equal(episode.frame("agentview_rgb", 0), np.rot90(raw, 2))
    assert np.array_equal(episode.frames("agentview_rgb")[0], np.rot90(raw, 2))


def test_orientation_is_that_of_the_lerobot_copy(recordings):
    """The same recording in both formats: half-size LeRobot frames fit the HDF5 frames in this orientation only."""
    raw = load_episodes(recordings / "libero_hdf5")[0]
    sources = json.loads((recordings / "expected/lerobot_v30_video.json").read_text())["sources"]
    copy = load_episodes(recordings / "lerobot_v30_video")[sources.index("libero_goal_9_000.npz")]
    assert np.array_equal(raw.actions, copy.actions)
    assert np.array_equal(raw.state, copy.state)
    assert raw.instruction == copy.instruction
    small = copy.frame("image", 40).reshape(128, 2, 128, 2, 3).mean((1, 3))
    picture = raw.frame("agentview_rgb", 40)
    turned = [picture, picture[::-1], picture[:, ::-1], picture[::-1, ::-1]]
    errors = [np.abs(small - other).mean() for other in turned]
    assert errors[0] < 5 < 10 * errors[0] < min(errors[1:])


def test_rows_and_facts(libero):
    dataset = load_episodes(libero / "libero_hdf5" / NAME)
    episode = dataset[0]
    row = json.loads((libero / "expected/libero_hdf5.json").read_text())["frames"][0]
    assert np.array_equal(episode.actions[0], np.float32(row["actions"]))
    assert np.array_equal(episode.state[0], np.float32(row["ee_states"] + row["gripper_states"]))
    assert (len(episode), episode.fps, dataset.cameras) == (12, 20.0, ("agentview_rgb", "eye_in_hand_rgb"))
    assert (episode.actions.dtype, episode.state.shape) == (np.float32, (12, 8))
    assert episode.instruction == episode.bddl_language == "put the wine bottle on the rack"
    assert episode.success is False  # the cut ends before the reward


@pytest.mark.parametrize(
    ("task", "instruction"),
    [
        ("open_the_middle_drawer_of_the_cabinet", "open the middle drawer of the cabinet"),
        ("KITCHEN_SCENE3_turn_on_the_stove_and_put_the_moka_pot_on_it", "turn on the stove and put the moka pot on it"),
        ("LIVING_ROOM_SCENE2_put_both_the_soup_in_the_basket", "put both the soup in the basket"),
        ("STUDY_SCENE1_pick_up_the_book", "pick up the book"),
    ],
)
def test_instruction_is_the_task_name_after_the_scene(task, instruction):
    assert instruction_from_task_name(task) == instruction


def test_success_is_any_reward(copy_of):
    def change(data):
        data["demo_0/rewards"][-1] = 1

    assert load_episodes(edit(copy_of("libero_hdf5"), change))[0].success is True


def test_observations_after_the_action_are_moved_before_it(copy_of, libero):
    """LIBERO's own downloads: row t of `obs` follows action t. Such a file is made by shifting `obs` by one row."""
    before = load_episodes(libero / "libero_hdf5")[0]

    def change(data):
        demo = data["demo_0"]
        for name in [*demo["obs"]]:
            replace(demo["obs"], name, demo["obs"][name][1:])
        for name in ("actions", "states", "rewards", "dones", "robot_states"):
            replace(demo, name, demo[name][:-1])

    after = load_episodes(edit(copy_of("libero_hdf5"), change))[0]
    assert after.demo.observations_follow_actions and not before.demo.observations_follow_actions
    assert len(after) == 10
    assert np.array_equal(after.actions, before.actions[1:11])
    assert np.array_equal(after.state, before.state[1:11])
    assert np.array_equal(after.frames("agentview_rgb"), before.frames("agentview_rgb")[1:11])


def test_regenerated_files_have_no_attributes(copy_of):
    """OpenVLA's and the authors' scripts write neither attributes nor, for failed replays, every demo."""

    def change(data):
        for name in [*data.attrs]:
            del data.attrs[name]
        data.move("demo_0", "demo_17")
        del data["demo_17/rewards"], data["demo_17/obs/ee_states"]

    episode = load_episodes(edit(copy_of("libero_hdf5"), change))[0]
    assert (episode.index, episode.demo.name, episode.fps) == (0, "demo_17", 20.0)
    assert (episode.success, episode.state, episode.bddl_language) == (None, None, None)
    assert episode.instruction == "put the wine bottle on the rack"


def test_demos_in_the_order_of_their_numbers_files_by_name(copy_of):
    def change(data):
        for number in (10, 2):
            data.copy("demo_0", f"demo_{number}")
        data.attrs["num_demos"] = 3

    folder = copy_of("libero_hdf5")
    edit(folder, change)
    (folder / "a_suite").mkdir()
    (folder / "a_suite/open_the_drawer_demo.hdf5").write_bytes((folder / NAME).read_bytes())
    dataset = load_episodes(folder)
    assert [episode.demo.name for episode in dataset] == 2 * ["demo_0", "demo_2", "demo_10"]
    assert [episode.instruction for episode in dataset][::3] == ["open the drawer", "put the wine bottle on the rack"]


def test_damage_names_file_and_episode(copy_of):
    def shorter(data):
        replace(data["demo_0/obs"], "agentview_rgb", data["demo_0/obs/agentview_rgb"][:5])

    def fewer(data):
        data.attrs["num_demos"] = 50

    def not_finite(data):
        data["demo_0/actions"][3, 2] = np.inf

    folder = copy_of("libero_hdf5")
    pristine = (folder / NAME).read_bytes()
    for change, message in (
        (shorter, f"{NAME}: episode 0: demo_0 cannot be read: 5 rows of agentview_rgb, 12 actions"),
        (fewer, f"{NAME}: says 50 demos, holds 1"),
    ):
        (folder / NAME).write_bytes(pristine)
        with pytest.raises(EpisodeError, match=message):
            load_episodes(edit(folder, change))
    (folder / NAME).write_bytes(pristine)
    episode = load_episodes(edit(folder, not_finite))[0]
    with pytest.raises(EpisodeError, match=f"{NAME}: episode 0: action of step 3 is not finite"):
        _ = episode.actions
    (folder / NAME).write_bytes(pristine[: len(pristine) // 2])
    with pytest.raises(EpisodeError, match=f"{NAME}: is not a LIBERO file: .*truncated"):
        load_episodes(folder)
