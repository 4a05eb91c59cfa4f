"""Splits: the authors' rule by brute force over their folder names, and a seeded one that depends on names alone."""

import math
import random

import pytest
from robot_folder import write_recordings

from transformers_worldvla.data import load_episodes, name_trajectories, split_trajectories
from transformers_worldvla.data.splits import SPLITS, Trajectory


def trajectories(counts):
    """Episodes of tasks, mixed: task i has counts[i] of them, numbered from 0."""
    names = [
        (f"task_{chr(97 + task)}", f"trj_{number}") for task, count in enumerate(counts) for number in range(count)
    ]
    random.Random(0).shuffle(names)
    return [Trajectory(position, task, name) for position, (task, name) in enumerate(names)]


def names_of(found, positions):
    chosen = set(positions)
    return {(each.task, each.name) for each in found if each.position in chosen}


def authors_lists(found):
    """As `action_model_conv_generation.py` walks its folders: os.listdir sorted, ceil(0.9 n) of tasks and of each."""
    folders = {}
    for each in found:
        folders.setdefault(each.task, []).append(each.name)
    tasks = sorted(folders)
    in_distribution = tasks[: math.ceil(len(tasks) * 0.9)]
    lists = {split: set() for split in SPLITS}
    for task in tasks:
        files = sorted(folders[task])
        count = math.ceil(len(files) * 0.9)
        for number, name in enumerate(files):
            split = "val_ood" if task not in in_distribution else "train" if number < count else "val_ind"
            lists[split].add((task, name))
    return lists


@pytest.mark.parametrize("counts", [[50] * 10, [43, 50, 39, 48, 41, 45, 37, 50, 44, 42], [7], [1, 2, 3], [20, 11]])
def test_the_authors_rule(counts):
    found = trajectories(counts)
    splits = split_trajectories(found, "authors")
    assert {name: names_of(found, splits[name]) for name in SPLITS} == authors_lists(found)


def test_of_fifty_demonstrations_the_authors_validate_on_five_to_nine():
    found = trajectories([50] * 10)
    splits = split_trajectories(found, "authors")
    assert names_of(found, splits["val_ood"]) == {("task_j", f"trj_{number}") for number in range(50)}
    assert {name for _, name in names_of(found, splits["val_ind"])} == {f"trj_{number}" for number in range(5, 10)}
    assert [len(splits[name]) for name in SPLITS] == [9 * 45, 9 * 5, 50]


@pytest.mark.parametrize("rule", ["authors", "seeded", "none"])
def test_every_episode_is_in_one_split_and_in_order(rule):
    found = trajectories([12, 3, 30, 1, 8, 9, 10, 11, 5, 6, 7])
    splits = split_trajectories(found, rule)
    assert sorted(sum(splits.values(), [])) == list(range(len(found)))
    assert all(positions == sorted(positions) for positions in splits.values())
    assert (rule == "none") == (splits["train"] == list(range(len(found))))


def test_the_seeded_rule_does_not_depend_on_the_order_of_the_episodes():
    found = trajectories([12] * 20)
    renumbered = [Trajectory(position, each.task, each.name) for position, each in enumerate(reversed(found))]
    for name in SPLITS:
        here = names_of(found, split_trajectories(found, "seeded", seed=3)[name])
        assert here == names_of(renumbered, split_trajectories(renumbered, "seeded", seed=3)[name])
        assert here != names_of(found, split_trajectories(found, "seeded", seed=4)[name])


def test_the_seeded_shares():
    found = trajectories([12] * 20)
    splits = split_trajectories(found, "seeded", val_share=0.25, ood_share=0.2)
    held_out = {task for task, _ in names_of(found, splits["val_ood"])}
    assert len(held_out) == 4 and len(splits["val_ood"]) == 48
    assert not held_out & {task for task, _ in names_of(found, splits["train"] + splits["val_ind"])}
    assert len(splits["val_ind"]) == 48
    nothing = split_trajectories(found, "seeded", val_share=0.0, ood_share=0.0)
    assert len(nothing["train"]) == 240


def test_the_seeded_rule_leaves_every_task_an_episode_to_train_on():
    found = trajectories([1, 2, 1, 3])
    splits = split_trajectories(found, "seeded", val_share=0.9, ood_share=0.0)
    assert {task for task, _ in names_of(found, splits["train"])} == {each.task for each in found}
    assert len(splits["val_ind"]) == 3
    few = split_trajectories(trajectories([4]), "seeded")
    assert [len(few[name]) for name in SPLITS] == [3, 1, 0]


@pytest.mark.parametrize("seed", range(5))
def test_every_task_gives_its_share_to_the_seeded_validation(seed):
    counts = [40, 40, 40]
    found = trajectories(counts)
    tasks = [task for task, _ in names_of(found, split_trajectories(found, val_share=0.15, seed=seed)["val_ind"])]
    assert sorted(tasks) == ["task_a"] * 6 + ["task_b"] * 6 + ["task_c"] * 6
    counts = [50, 30, 12, 7, 1]
    found = trajectories(counts)
    splits = split_trajectories(found, val_share=0.2, ood_share=0.0, seed=seed)
    tasks = [task for task, _ in names_of(found, splits["val_ind"])]
    given = [tasks.count(f"task_{letter}") for letter in "abcde"]
    assert sum(given) == 20 and all(abs(number - 0.2 * count) < 1 for number, count in zip(given, counts, strict=True))
    assert given[4] == 0, "its only episode is for training"


def test_libero_files_and_the_authors_folders_name_themselves(libero, tmp_path):
    demo = name_trajectories(load_episodes(libero / "libero_hdf5"))[0]
    assert (demo.task, demo.name) == ("put_the_wine_bottle_on_the_rack", "trj_0")
    write_recordings(tmp_path / "from", steps=(3, 3))
    for number in (0, 1):
        (tmp_path / f"from/episode_{number}/instruction.txt").unlink()
    (tmp_path / "to/KITCHEN_SCENE3_lift").mkdir(parents=True)
    (tmp_path / "from/episode_0").rename(tmp_path / "to/KITCHEN_SCENE3_lift/trj_7")
    (tmp_path / "from/episode_1").rename(tmp_path / "to/KITCHEN_SCENE3_lift/trj_31")
    named = name_trajectories(load_episodes(tmp_path / "to"))
    assert [(each.task, each.name) for each in named] == [("KITCHEN_SCENE3_lift", f"trj_{n}") for n in (7, 31)]


def test_elsewhere_the_task_is_the_instruction_and_episodes_are_counted(small):
    named = name_trajectories(load_episodes(small / "v21_video"))
    assert [(each.task, each.name) for each in named] == [
        ("stack_the_cups", "trj_0"),
        ("open_the_drawer", "trj_0"),
        ("stack_the_cups", "trj_1"),
        ("close_the_drawer", "trj_0"),
    ]


def test_wrong_options():
    with pytest.raises(ValueError, match="a split rule is one of seeded, authors, none, not 'random'"):
        split_trajectories(trajectories([3]), "random")
    with pytest.raises(ValueError, match="val_share is a number from 0 to below 1, not 1"):
        split_trajectories(trajectories([3]), val_share=1)
