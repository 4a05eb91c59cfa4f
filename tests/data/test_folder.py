import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from transformers_worldvla.data import EpisodeError, load_episodes, scan_episodes

RNG = np.random.default_rng(0)
STEPS = 12


def write_pictures(folder: Path, pictures: np.ndarray) -> None:
    folder.mkdir(parents=True)
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"image_{number}.png")


@pytest.fixture
def pictures() -> np.ndarray:
    return RNG.integers(0, 256, (STEPS, 8, 10, 3), dtype=np.uint8)


@pytest.fixture
def actions() -> np.ndarray:
    return RNG.normal(size=(STEPS, 4))


@pytest.fixture
def simple(tmp_path, pictures, actions) -> Path:
    """One episode of the simplest kind."""
    write_pictures(tmp_path / "data/episode_0/top", pictures)
    np.save(tmp_path / "data/episode_0/actions.npy", actions)
    (tmp_path / "data/instruction.txt").write_text("stack the cups\n")
    return tmp_path / "data"


def test_simple_folder(simple, pictures, actions):
    dataset = load_episodes(simple)
    episode = dataset[0]
    assert (len(dataset), len(episode), dataset.cameras, dataset.fps) == (1, STEPS, ("top",), None)
    assert np.array_equal(episode.frames("top"), pictures)  # picture 2 before picture 10
    assert np.array_equal(episode.actions, actions.astype(np.float32))
    assert (episode.instruction, episode.state, episode.success) == ("stack the cups", None, None)
    assert "1 episodes, 12 frames, cameras top, fps unknown" in repr(dataset)


def test_the_folders_of_the_authors_scripts(tmp_path, pictures, actions):
    """`{task}/trj_{i}/imgs/image_{j}.png` and `action/action_{j}.npy`; trajectories of failed replays are missing."""
    for number in (0, 10, 2):
        folder = tmp_path / "KITCHEN_SCENE3_turn_on_the_stove" / f"trj_{number}"
        write_pictures(folder / "imgs", pictures)
        (folder / "action").mkdir()
        for step, action in enumerate(actions + number):
            np.save(folder / "action" / f"action_{step}.npy", action)
    for root in (tmp_path, tmp_path / "KITCHEN_SCENE3_turn_on_the_stove"):
        dataset = load_episodes(root)
        assert [round(float(episode.actions[0, 0] - actions[0, 0])) for episode in dataset] == [0, 2, 10]
        assert {episode.instruction for episode in dataset} == {"turn on the stove"}
        assert np.array_equal(dataset[1].actions[11], (actions[11] + 2).astype(np.float32))


def test_csv_state_and_facts(simple, actions):
    folder = simple / "episode_0"
    (folder / "actions.npy").unlink()
    lines = [",".join(map(repr, map(float, row))) for row in actions]
    (folder / "actions.csv").write_text("\n".join(["x,y,z,gripper", *lines]))
    (folder / "state.csv").write_text("\n".join(lines))
    (folder / "episode.json").write_text(json.dumps({"fps": 15, "success": True}))
    dataset = load_episodes(simple)
    assert np.array_equal(dataset[0].actions, actions.astype(np.float32))
    assert np.array_equal(dataset[0].state, actions.astype(np.float32))
    assert (dataset.action_names, dataset.state_names) == (("x", "y", "z", "gripper"), None)
    assert (dataset.fps, dataset[0].fps, dataset[0].success) == (15.0, 15.0, True)


def damage_picture(folder: Path) -> None:
    path = folder / "top/image_3.png"
    path.write_bytes(path.read_bytes()[:60])


def resize_picture(folder: Path) -> None:
    Image.new("RGB", (5, 5)).save(folder / "top/image_3.png")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "top/image_3.png").unlink(), "top: episode 0: number 3 is missing between 0 and 11"),
        (lambda folder: (folder / "top/image_11.png").unlink(), "top: episode 0: 11 pictures, 12 actions"),
        (lambda folder: (folder / "top/x_3.png").write_bytes(b""), "files must carry different numbers"),
        (lambda folder: (folder.parent / "instruction.txt").unlink(), "episode_0: episode 0: has no instruction.txt"),
        (lambda folder: (folder / "instruction.txt").write_text(" "), "instruction.txt: episode 0: is empty"),
        (lambda folder: (folder / "actions.npy").write_bytes(b"x"), "actions.npy: episode 0: cannot be read: "),
        (lambda folder: (folder / "episode.json").write_text("{"), "episode.json: episode 0: is not JSON: "),
        (lambda folder: (folder / "episode.json").write_text('{"success": "yes"}'), 'may hold "fps", a number, and'),
        (
            lambda folder: np.save(folder / "state.npy", np.ones((3, 2))),
            "state.npy: episode 0: 3 rows of state, 12 actions",
        ),
        (
            lambda folder: np.save(folder / "actions.npy", np.full((12, 4), np.nan)),
            "actions.npy: episode 0: action of step 0",
        ),
        (damage_picture, "image_3.png: episode 0: is not a picture: "),
        (resize_picture, "image_3.png: episode 0: differs in size from image_0.png"),
    ],
)
def test_damage_is_one_line_with_file_and_episode(simple, damage, message):
    damage(simple / "episode_0")
    report = scan_episodes(simple)
    assert len(report.problems) == 1
    assert message in str(report.problems[0]) and "\n" not in str(report.problems[0])
    with pytest.raises(EpisodeError) as raised:
        episode = load_episodes(simple)[0]
        _ = episode.actions, episode.state, episode.frames("top")
    assert str(raised.value) == str(report.problems[0])


def test_pickled_arrays_are_not_opened(simple):
    np.save(simple / "episode_0/actions.npy", np.array([{"a": 1}] * STEPS), allow_pickle=True)
    with pytest.raises(EpisodeError, match="actions.npy: episode 0: cannot be read: Object arrays cannot be loaded"):
        load_episodes(simple)


def test_a_camera_that_another_episode_lacks(simple, pictures, actions):
    write_pictures(simple / "episode_1/side", pictures)
    np.save(simple / "episode_1/actions.npy", actions)
    with pytest.raises(EpisodeError, match="episode_1/top: episode 1: folder is missing or empty"):
        load_episodes(simple)
