"""The recorder of demonstrations: what it plans, what it writes, and that a killed recording goes on."""

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from process_tree import HAS_PROC, children, is_running

from transformers_worldvla.data import load_episodes, scan_episodes

pytest.importorskip("libero")
h5py = pytest.importorskip("h5py")
FOLDER = Path(__file__).parents[2] / "examples" / "libero_demonstrations"
TASK = "turn_on_the_stove"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"libero_demonstrations_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(FOLDER))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(FOLDER))
    return module


@pytest.fixture(scope="module")
def record() -> ModuleType:
    return load("record")


def arguments(output: Path, **changes: object) -> argparse.Namespace:
    values = {"suites": ["libero_goal"], "tasks": None, "episodes": 7, "cameras": ["agentview"], "resolution": 64}
    values |= {"disturbances": 0.0, "first_episode": 0, "learner": None, "learner_steps": (20, 150)}
    return argparse.Namespace(**values | {"output": output} | changes)


def test_tasks_take_turns_and_recorded_episodes_are_left_out(record: ModuleType, tmp_path: Path) -> None:
    turns = list(record.plan(arguments(tmp_path, tasks=[2, 7])))
    assert [(turn.task, turn.numbers) for turn in turns] == [
        (2, (0, 1, 2, 3, 4)),
        (7, (0, 1, 2, 3, 4)),
        (2, (5, 6)),
        (7, (5, 6)),
    ]
    for number in (0, 1, 2, 3, 4, 6):
        path = record.episode_path(tmp_path, "libero_goal", 7, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert path.parent.name == TASK
    turns = list(record.plan(arguments(tmp_path, tasks=[2, 7])))
    assert [(turn.task, turn.numbers) for turn in turns] == [(2, (0, 1, 2, 3, 4)), (2, (5, 6)), (7, (5,))]


def test_a_second_recording_numbers_its_episodes_apart(record: ModuleType, tmp_path: Path) -> None:
    turns = list(record.plan(arguments(tmp_path, tasks=[2], first_episode=100, learner="m", learner_steps=[3, 9])))
    assert [turn.numbers for turn in turns] == [(100, 101, 102, 103, 104), (105, 106)]
    assert {(turn.learner, turn.learner_steps) for turn in turns} == {("m", (3, 9))}


def travel(disturbance: Any, steps: int) -> np.ndarray:
    """What becomes of an expert's action (7,) in that many steps."""
    return np.stack([disturbance.apply(np.array([0.9, -0.5, 0, 0.1, -0.2, 0.3, 1], np.float32)) for _ in range(steps)])


def test_pushes_move_the_hand_alone_and_stay_in_range() -> None:
    disturbance = load("disturbance")
    carried_out = travel(disturbance.Disturbance(1.0, seed=3), 500)
    assert carried_out.dtype == np.float32
    np.testing.assert_array_equal(carried_out[:, 3:], np.tile(np.float32([0.1, -0.2, 0.3, 1]), (500, 1)))
    assert np.abs(carried_out[:, :3]).max() <= 1
    assert np.abs(carried_out[:, 2]).max() > 0.5
    np.testing.assert_array_equal(carried_out, travel(disturbance.Disturbance(1.0, seed=3), 500))
    assert not np.array_equal(carried_out, travel(disturbance.Disturbance(1.0, seed=4), 500))


def test_pushes_are_as_frequent_as_said() -> None:
    """A push of 4.5 steps on average follows (1 - p) / p quiet ones."""
    disturbance = load("disturbance")
    pushed = (travel(disturbance.Disturbance(0.03, seed=0), 40_000)[:, 2] != 0).mean()
    assert pushed == pytest.approx(4.5 / (4.5 + 0.97 / 0.03), rel=0.06)
    assert not (travel(disturbance.Disturbance(0.0, seed=0), 1000)[:, 2] != 0).any()


def test_a_hand_that_waits_or_grasps_is_left_alone() -> None:
    disturbance = load("disturbance").Disturbance(1.0, seed=0)
    still = np.array([0.1, -0.1, 0, 0.4, 0, 0, -1], np.float32)
    np.testing.assert_array_equal(disturbance.apply(still), still)


def test_no_two_episodes_share_a_placement(record: ModuleType) -> None:
    seeds = {
        record.placement_seed(task, number, attempt)
        for task in range(10)
        for number in range(100)
        for attempt in range(record.ATTEMPTS)
    }
    assert len(seeds) == 10 * 100 * record.ATTEMPTS


def made_up_rows(length: int, seed: int) -> dict[str, np.ndarray]:
    """An episode as `record_episode` returns it; the arm's joints stand where the simulator's state has them."""
    rng = np.random.default_rng(seed)
    states = rng.normal(size=(length, 20)).cumsum(0)
    proprioception = rng.normal(size=(length, 8)).astype(np.float32)
    rows, columns = np.mgrid[0:64, 0:64]
    frames = np.stack([np.stack([rows * 3, columns * 2 + step, (rows + columns) % 256], -1) for step in range(length)])
    return {
        "states": states,
        "robot_states": rng.normal(size=(length, 9)),
        "obs/ee_pos": proprioception[:, :3],
        "obs/ee_ori": proprioception[:, 3:6],
        "obs/ee_states": proprioception[:, :6],
        "obs/gripper_states": proprioception[:, 6:],
        "obs/joint_states": states[:, 1:8],
        "obs/agentview_rgb": frames.astype(np.uint8),
        "actions": rng.uniform(-1, 1, (length, 7)).astype(np.float32),
    }


def write_made_up_episodes(output: Path) -> list[Path]:
    episode_file = load("episode_file")
    files = []
    for number in range(2):
        path = output / "episodes" / "libero_goal" / TASK / f"{number:04d}.hdf5"
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(path, "w") as file:
            data = file.create_group("data")
            data.attrs["instruction"] = "turn on the stove"
            data.attrs["problem_info"] = json.dumps({"language_instruction": "turn on the flat stove"})
            episode_file.write_demo(data.create_group("demo_0"), made_up_rows(9 + number, number), seed=number)
        files.append(path)
    return files


def test_both_exports_hold_what_was_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    files, export = write_made_up_episodes(tmp_path), load("export")
    export.export_hdf5([files], tmp_path / "libero_hdf5")
    export.export_lerobot([files], tmp_path / "lerobot")
    export.export_lerobot([files], tmp_path / "lerobot")  # replaces the earlier one

    recorded, converted = load_episodes(tmp_path / "libero_hdf5"), load_episodes(tmp_path / "lerobot")
    assert not scan_episodes(tmp_path / "libero_hdf5").problems and not scan_episodes(tmp_path / "lerobot").problems
    assert len(recorded) == len(converted) == 2 and converted.cameras == ("image",)
    for number, (demo, episode) in enumerate(zip(recorded, converted, strict=True)):
        rows = made_up_rows(9 + number, number)
        state = np.concatenate([rows["obs/ee_states"], rows["obs/gripper_states"]], axis=1)
        for found in (demo, episode):
            assert found.instruction == "turn on the stove" and np.array_equal(found.actions, rows["actions"])
            assert np.array_equal(found.state, state)
        assert np.array_equal(demo.frames("agentview_rgb"), rows["obs/agentview_rgb"]), "turned twice is not turned"
        assert np.abs(episode.frames("image").astype(int) - rows["obs/agentview_rgb"]).mean() < 4
        assert demo.success and demo.demo.bddl_language == "turn on the flat stove"


@pytest.mark.parametrize("formats", [["libero_hdf5"], ["lerobot"], ["lerobot", "libero_hdf5"]])
def test_only_the_wanted_formats_are_written(
    record: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, formats: list[str]
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    write_made_up_episodes(tmp_path)
    monkeypatch.setattr("sys.argv", ["record.py", "--output", str(tmp_path), "--export-only", "--formats", *formats])
    record.main()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["episodes", *formats])


@pytest.mark.slow
@pytest.mark.skipif(not HAS_PROC, reason="needs /proc")
def test_a_killed_recording_goes_on_to_the_same_episodes(tmp_path: Path) -> None:
    """Two real episodes: killed after the first, run again, compared with a recording that was left alone."""

    def start(output: Path) -> subprocess.Popen[bytes]:
        options = ["--tasks", "7", "--episodes", "2", "--resolution", "64"]
        command = [sys.executable, "record.py", "--output", str(output), *options]
        return subprocess.Popen(command, cwd=FOLDER, stderr=subprocess.DEVNULL)

    cut, whole = tmp_path / "cut", tmp_path / "whole"
    first = cut / "episodes" / "libero_goal" / TASK / "0000.hdf5"
    process, deadline = start(cut), time.monotonic() + 400
    while not first.exists() and time.monotonic() < deadline:
        time.sleep(0.5)
    workers = children(process)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while any(map(is_running, workers)):
        assert time.monotonic() < deadline, "simulators outlive the recorder"
        time.sleep(0.1)
    assert first.exists() and not (cut / "lerobot").exists()
    written = first.stat().st_mtime_ns
    assert start(cut).wait() == 0 and start(whole).wait() == 0
    assert first.stat().st_mtime_ns == written, "what was recorded is kept"
    assert not scan_episodes(cut / "lerobot").problems
    for name in ("0000.hdf5", "0001.hdf5"):
        with (
            h5py.File(first.with_name(name)) as ours,
            h5py.File(str(first.with_name(name)).replace("cut", "whole")) as theirs,
        ):
            for key in ("actions", "obs/agentview_rgb"):
                assert np.array_equal(ours[f"data/demo_0/{key}"], theirs[f"data/demo_0/{key}"])
            # a drawn placement is the same to rounding only, when another episode ran before it in the process
            np.testing.assert_allclose(ours["data/demo_0/states"], theirs["data/demo_0/states"], rtol=0, atol=1e-10)


@pytest.mark.slow
def test_the_expert_goes_on_where_the_learner_ended() -> None:
    """Real simulator, real checkpoint: twelve steps of the policy from the same placement, then the expert's rows."""
    from transformers_worldvla.assets import DEFAULT_CHECKPOINT, bundled_folder
    from transformers_worldvla.evaluation.libero_env import LiberoEnv

    learner = load("learner").Learner(str(bundled_folder(DEFAULT_CHECKPOINT)), (12, 12))
    env = LiberoEnv("libero_goal", 7, resolution=256)
    try:
        env.reset(None, seed=5, settle_steps=0)
        env.reset(env.simulator.sim.get_state().flatten(), seed=5)
        began = env.simulator.sim.get_state().flatten()
        assert not learner.act(env, 5)
        ended = env.simulator.sim.get_state().flatten()
        rows = load("episode_file").record_episode(env, 5, ["agentview"], learner=learner)
    finally:
        env.close()
    assert rows is not None, "the expert turns the stove on from there"
    assert np.array_equal(rows["states"][0], ended)
    assert ended[0] - began[0] == pytest.approx(12 / 20)  # seconds
