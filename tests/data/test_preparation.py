"""Preparation: the authors' no-op rule by brute force, the unsuccessful filter; what is left out is counted."""

import numpy as np
import pytest
from robot_folder import toy_actions, write_recordings

from transformers_worldvla.data import EpisodeError, load_episodes, prepare_episodes
from transformers_worldvla.data.preparation import find_gripper, moving_steps


def is_noop(action, previous):
    """The rule of the authors' `regenerate_libero_dataset_filter_no_op.py`, as it stands there."""
    if previous is None:
        return np.linalg.norm(action[:-1]) < 1e-4
    return np.linalg.norm(action[:-1]) < 1e-4 and action[-1] == previous[-1]


def replay(actions):
    """Their loop: each action is compared with the last one that was replayed."""
    kept, steps = [], []
    for step, action in enumerate(actions):
        if not is_noop(action, kept[-1] if kept else None):
            kept.append(action)
            steps.append(step)
    return steps


@pytest.mark.parametrize("seed", range(20))
def test_the_authors_rule(seed):
    rng = np.random.default_rng(seed)
    actions = toy_actions(rng, 60)
    actions[:, :2] *= rng.choice([1e-5, 1e-4, 1.0], (60, 1))  # also motion just around the limit
    actions = actions.astype(np.float64)
    assert moving_steps(actions, gripper=2).tolist() == replay(actions)


def test_the_real_recordings(libero):
    episode = load_episodes(libero / "lerobot_v30_video")[2]
    kept = moving_steps(episode.actions, gripper=6)
    assert kept.tolist() == replay(episode.actions.astype(np.float64))
    assert 0 < len(kept) < len(episode)


def test_a_pause_keeps_the_step_that_changes_the_gripper():
    still, close = [0.0, 0.0, -1.0], [0.0, 0.0, 1.0]
    move = [0.5, 0.0, -1.0]
    assert moving_steps(np.array([still, still, move, still, close, close, still]), gripper=2).tolist() == [2, 4, 6]


def test_the_gripper_may_be_another_dimension_or_none():
    actions = np.array([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.3], [-1.0, 0.0, 0.0]])
    assert moving_steps(actions, gripper=0).tolist() == [2, 3]
    assert moving_steps(actions, gripper=None).tolist() == [0, 1, 2, 3]
    assert moving_steps(np.zeros((3, 2)), gripper=None).tolist() == []


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("x", "y", "Gripper.pos"), 2),
        (("left_gripper", "right_gripper"), None),
        (("x", "y"), None),
        (None, None),
    ],
)
def test_the_gripper_by_its_name(names, expected):
    assert find_gripper(names) == expected


def test_every_step_is_kept_or_counted(tmp_path):
    dataset = load_episodes(write_recordings(tmp_path, failed=(1, 4)))
    preparation, actions = prepare_episodes(dataset, gripper=2)
    assert preparation.failed == [1, 4]
    assert [episode.position for episode in preparation.episodes] == [0, 2, 3, 5]
    for kept, rows in zip(preparation.episodes, actions, strict=True):
        recorded = dataset[kept.position].actions
        assert kept.steps.tolist() == replay(recorded)
        assert np.array_equal(rows, recorded[kept.steps])
    left = sum(dataset.lengths[position] for position in (0, 2, 3, 5))
    assert preparation.num_steps + preparation.dropped_steps == left
    assert preparation.dropped_steps > 0
    report = str(preparation)
    assert "unsuccessful episodes: 2 dropped (1, 4), 0 that do not say kept" in report
    assert f"no-ops: {preparation.dropped_steps} of {left} steps dropped" in report
    assert f"left: 4 episodes, {preparation.num_steps} steps" in report


def test_keep_keeps_everything(tmp_path):
    dataset = load_episodes(write_recordings(tmp_path, failed=(1,)))
    preparation, actions = prepare_episodes(dataset, no_ops="keep", unsuccessful="keep", gripper=2)
    assert [len(episode) for episode in preparation.episodes] == dataset.lengths
    assert (preparation.dropped_steps, preparation.failed) == (0, [1])
    assert all(np.array_equal(rows, episode.actions) for rows, episode in zip(actions, dataset, strict=True))
    assert "1 kept (1)" in str(preparation)


def test_success_as_lerobot_records_it(small):
    dataset = load_episodes(small / "v30_image")
    success = np.load(small / "v30_image.npz")
    preparation, _ = prepare_episodes(dataset, no_ops="keep")
    expected = [episode.index for episode in dataset if not episode.success]
    assert preparation.failed == expected and preparation.unknown_success == 0
    assert len(success.files) > 0


def test_episodes_that_do_not_say_are_kept_and_counted(libero):
    dataset = load_episodes(libero / "lerobot_v30_video")
    preparation, _ = prepare_episodes(dataset, no_ops="keep")
    assert (preparation.unknown_success, len(preparation.episodes)) == (5, 5)
    assert "5 that do not say kept" in str(preparation)


def write_still(folder, steps):
    (folder / "actions.csv").write_text("x,y,gripper\n" + "0,0,1\n" * steps)


def test_an_episode_of_nothing_but_pauses_is_dropped_and_named(tmp_path):
    write_recordings(tmp_path, steps=(6, 6, 6))
    write_still(tmp_path / "episode_1", 6)
    preparation, _ = prepare_episodes(load_episodes(tmp_path), gripper=2)
    assert preparation.empty == [1]
    assert "episodes of nothing but no-ops: 1 dropped (1)" in str(preparation)


def test_nothing_left_is_an_error_that_says_why(tmp_path):
    write_recordings(tmp_path, steps=(6,))
    write_still(tmp_path / "episode_0", 6)
    with pytest.raises(EpisodeError, match="nothing is left to train on: .*nothing but no-ops: 1 dropped"):
        prepare_episodes(load_episodes(tmp_path), gripper=2)


def test_wrong_options(tmp_path):
    dataset = load_episodes(write_recordings(tmp_path, steps=(3,)))
    with pytest.raises(ValueError, match="no_ops is one of authors, keep, not 'drop'"):
        prepare_episodes(dataset, no_ops="drop")
    with pytest.raises(ValueError, match="unsuccessful is one of drop, keep, not 'authors'"):
        prepare_episodes(dataset, unsuccessful="authors")
    with pytest.raises(ValueError, match="dimension 3 is no gripper: actions have the dimensions 0 to 2"):
        prepare_episodes(dataset, gripper=3)


def test_episodes_of_another_width_are_refused(tmp_path):
    write_recordings(tmp_path, steps=(3, 3))
    np.save(tmp_path / "episode_1/actions.npy", np.zeros((3, 5)))
    with pytest.raises(EpisodeError, match="episode 1: actions have 5 values, those of earlier episodes 3"):
        prepare_episodes(load_episodes(tmp_path))
