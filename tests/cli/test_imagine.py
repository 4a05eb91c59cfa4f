"""`worldvla imagine`: the frames of `model.imagine`, as files, and one line for bad input."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from small_checkpoint import LIBERO

from transformers_worldvla import WorldVLAForCausalLM, WorldVLAProcessor

STEPS = 3
NAMES = list(LIBERO.action_names)


@pytest.fixture
def plan() -> np.ndarray:
    """Actions (T, D) inside LIBERO's range."""
    return np.random.default_rng(5).uniform(np.array(LIBERO.low), np.array(LIBERO.high), (STEPS, 7))


@pytest.fixture
def plan_file(plan: np.ndarray, tmp_path: Path) -> Path:
    np.save(tmp_path / "plan.npy", plan)
    return tmp_path / "plan.npy"


def imagine(checkpoint: Path, pictures: list[Path], plan: np.ndarray, **options: Any) -> list[list[np.ndarray]]:
    """T lists of C frames, without the command."""
    processor = WorldVLAProcessor.from_pretrained(checkpoint)
    model = WorldVLAForCausalLM.from_pretrained(checkpoint)
    frames = model.imagine(processor, [Image.open(file) for file in pictures], plan, **options)
    steps = [frame if isinstance(frame, list) else [frame] for frame in frames]
    return [[np.asarray(picture) for picture in step] for step in steps]


def command(checkpoint: Path, images: list[Path], actions: Path, output: Path) -> tuple[Any, ...]:
    """The arguments that every call needs."""
    return "imagine", "--model", checkpoint, "--image", *images, "--actions", actions, "--output", output


def read(file: Path) -> np.ndarray:
    with Image.open(file) as picture:
        return np.asarray(picture)


@pytest.mark.parametrize("options", [{}, {"feedback": "pixels"}, {"num_history": 2}], ids=str)
def test_frames_are_those_of_the_model(
    worldvla: Callable[..., Any],
    robot_checkpoint: Path,
    pictures: list[Path],
    plan: np.ndarray,
    plan_file: Path,
    tmp_path: Path,
    options: dict[str, Any],
) -> None:
    output = tmp_path / "frames"
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    result = worldvla(*command(robot_checkpoint, pictures[:1], plan_file, output), *flags, "--json")
    assert result.code == 0, result.err
    expected = imagine(robot_checkpoint, pictures[:1], plan, **options)
    names = [f"imagined_{step:03d}.png" for step in range(1, STEPS + 1)]
    assert sorted(path.name for path in output.iterdir()) == ["imagined.gif", *names]
    for name, step in zip(names, expected, strict=True):
        assert np.array_equal(read(output / name), step[0])
    document = result.document
    assert document["frames"] == [str(output / name) for name in names]
    assert document["actions"] == plan.tolist() and document["embodiment"] == "libero"
    assert (document["feedback"], document["num_history"]) == (
        options.get("feedback", "tokens"),
        options.get("num_history", 1),
    )
    with Image.open(output / "imagined.gif") as gif:
        assert gif.n_frames == STEPS + 1 and gif.info["duration"] == 50, "the given frame and 20 frames a second"


def test_a_frame_a_camera(
    worldvla: Callable[..., Any],
    two_camera_checkpoint: Path,
    pictures: list[Path],
    plan: np.ndarray,
    plan_file: Path,
    tmp_path: Path,
) -> None:
    output = tmp_path / "frames"
    arguments = ("imagine", "--model", two_camera_checkpoint, "--actions", plan_file, "--output", output, "--image")
    result = worldvla(*arguments, *pictures)
    assert result.code == 0, result.err
    assert f"{STEPS} frames in" in result.out and str(output / "imagined.gif") in result.out
    for step, frames in enumerate(imagine(two_camera_checkpoint, pictures, plan), start=1):
        for camera, frame in zip(("image", "wrist"), frames, strict=True):
            assert np.array_equal(read(output / f"imagined_{step:03d}_{camera}.png"), frame)
    one = worldvla(*arguments, pictures[0])
    assert one.code == 2
    assert "--image takes one file a camera of libero: image, wrist; 1 given" in one.err


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("plan.csv", "{rows}"),
        ("plan.csv", "x,y,z,rx,ry,rz,gripper\n{rows}"),
        ("plan.csv", "\ufeffa,b,c,d,e,f,g\n{rows}\n"),
        ("plan.csv", "time,gripper,rz,ry,rx,z,y,x\n{reversed}"),
        ("plan.json", "{list}"),
        ("plan.json", '{{"actions": {list}, "confidence": [1, 1, 1]}}'),
    ],
)
def test_plans_in_other_formats(
    worldvla: Callable[..., Any],
    robot_checkpoint: Path,
    pictures: list[Path],
    plan: np.ndarray,
    tmp_path: Path,
    name: str,
    content: str,
) -> None:
    rows = "\n".join(",".join(map(repr, row)) for row in plan.tolist())
    backwards = "\n".join(",".join(map(repr, [9.0, *row[::-1]])) for row in plan.tolist())
    text = content.format(rows=rows, reversed=backwards, list=json.dumps(plan.tolist()))
    (tmp_path / name).write_text(text, encoding="utf-8")
    result = worldvla(*command(robot_checkpoint, pictures[:1], tmp_path / name, tmp_path / "o"), "--json")
    assert result.code == 0, result.err
    assert result.document["actions"] == plan.tolist()


def test_takes_what_predict_writes(
    worldvla: Callable[..., Any], robot_checkpoint: Path, pictures: list[Path], tmp_path: Path
) -> None:
    predict = ("predict", "--model", robot_checkpoint, "--images", pictures[0], "--instruction", "go", "--json")
    documents = []
    for suffix in ("json", "csv", "npy"):
        file = tmp_path / f"plan.{suffix}"
        actions = worldvla(*predict, "--output", file).document["actions"]
        result = worldvla(*command(robot_checkpoint, pictures[:1], file, tmp_path / suffix), "--json")
        assert result.code == 0, result.err
        assert result.document["actions"] == actions
        documents.append(result.document["actions"])
    assert documents[0] == documents[1] == documents[2]


def test_shorter_rollout_replaces_a_longer_one_and_nothing_else(
    worldvla: Callable[..., Any],
    robot_checkpoint: Path,
    pictures: list[Path],
    plan: np.ndarray,
    plan_file: Path,
    tmp_path: Path,
) -> None:
    output = tmp_path / "frames"
    output.mkdir()
    others = ["imagined_by_me.png", "frame_001.png", "imagined_2.png"]
    for name in others:
        (output / name).write_text("mine")
    arguments = ("imagine", "--model", robot_checkpoint, "--image", pictures[0], "--output", output, "--actions")
    assert worldvla(*arguments, plan_file).code == 0
    assert (output / "imagined_003.png").exists()
    np.save(tmp_path / "short.npy", plan[:1])
    assert worldvla(*arguments, tmp_path / "short.npy", "--fps", 5).code == 0
    assert sorted(path.name for path in output.iterdir()) == sorted([*others, "imagined.gif", "imagined_001.png"])
    with Image.open(output / "imagined.gif") as gif:
        assert gif.n_frames == 2 and gif.info["duration"] == 200


def test_actions_outside_the_range_are_clipped_with_one_warning(
    worldvla: Callable[..., Any], robot_checkpoint: Path, pictures: list[Path], plan: np.ndarray, tmp_path: Path
) -> None:
    np.save(tmp_path / "wild.npy", plan * [5, 1, 1, 1, 1, 1, 1])
    result = worldvla(*command(robot_checkpoint, pictures[:1], tmp_path / "wild.npy", tmp_path / "o"))
    assert result.code == 0
    assert result.err.count("are clipped") == 1
    assert "warning: actions outside the range of embodiment 'libero' are clipped: x [-0.9375, 0.9375]\n" in result.err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.npy", None, "No such file or directory: "),
        ("plan.txt", "1 2 3", "plan.txt: actions are read from .json, .csv, .npy files"),
        ("wide.csv", "1,2,3", "wide.csv holds actions of shape (1, 3), not (T, 7) with T >= 1 and D = 7 (x, y, z, rx"),
        ("flat.json", "[1, 2, 3, 4, 5, 6, 7]", "flat.json holds actions of shape (7,), not (T, 7)"),
        ("empty.json", "[]", "empty.json holds actions of shape (0,)"),
        ("empty.csv", "", "empty.csv holds actions of shape (0,)"),
        ("ragged.csv", "1,2\n3", "ragged.csv holds no table of numbers"),
        ("words.csv", "1,2,3,4,5,6,left", "words.csv holds no table of numbers"),
        ("nan.csv", "1,1,1,1,1,1,1\n1,1,nan,1,1,1,1", "nan.csv: action 1 is nan in dimension 2"),
        ("broken.json", "{", "broken.json holds no table of numbers"),
        (
            "keyless.json",
            "{}",
            'keyless.json holds no table of numbers: an object has the actions under the key "actions"',
        ),
        ("text.json", '[["a"]]', "text.json holds no table of numbers"),
        ("text.npy", "no array", "text.npy holds no table of numbers"),
        ("pickled.npy", np.array([{}], dtype=object), "pickled.npy holds no table of numbers"),
    ],
)
def test_bad_plans_are_one_line(
    worldvla: Callable[..., Any],
    robot_checkpoint: Path,
    pictures: list[Path],
    tmp_path: Path,
    name: str,
    content: Any,
    message: str,
) -> None:
    if isinstance(content, np.ndarray):
        np.save(tmp_path / name, content)
    elif content is not None:
        (tmp_path / name).write_text(content)
    output = tmp_path / "frames"
    result = worldvla(*command(robot_checkpoint, pictures[:1], tmp_path / name, output), "--json")
    assert result.code == 2 and result.out == ""
    line = result.err.splitlines()[-1]
    assert line.startswith("worldvla imagine: ") and message in line
    assert not output.exists()


def test_output_that_is_a_file(
    worldvla: Callable[..., Any], robot_checkpoint: Path, pictures: list[Path], plan_file: Path
) -> None:
    before = pictures[1].read_bytes()
    result = worldvla(*command(robot_checkpoint, pictures[:1], plan_file, pictures[1]))
    assert result.code == 2 and "is a file, not a folder" in result.err
    assert pictures[1].read_bytes() == before


def test_in_a_process_without_network_or_questions(
    worldvla_process: Callable[..., Any],
    robot_checkpoint: Path,
    pictures: list[Path],
    plan: np.ndarray,
    plan_file: Path,
    tmp_path: Path,
) -> None:
    arguments = ("imagine", "--model", robot_checkpoint, "--image", pictures[0], "--actions", plan_file)
    good = worldvla_process(*arguments, "--output", "frames", "--json", network=False)
    assert good.code == 0, good.err
    assert good.document["frames"][0] == "frames/imagined_001.png"
    frames = [read(tmp_path / name).astype(int) for name in good.document["frames"]]
    expected = [step[0].astype(int) for step in imagine(robot_checkpoint, pictures[:1], plan)]
    assert np.abs(np.stack(frames) - np.stack(expected)).max() <= 1


def test_error_in_a_process(
    worldvla_process: Callable[..., Any], robot_checkpoint: Path, pictures: list[Path], plan_file: Path
) -> None:
    arguments = ("imagine", "--model", robot_checkpoint, "--image", pictures[0], "--actions", plan_file)
    bad = worldvla_process(*arguments, "--output", "frames", "--embodiment", "aloha")
    assert bad.code == 2 and bad.out == ""
    assert bad.err.startswith("worldvla imagine: unknown embodiment 'aloha'; known: libero (D=7) from LIBERO ")
    assert bad.err.count("\n") == 1


def test_help_has_examples(worldvla: Callable[..., Any], capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        worldvla("imagine", "--help")
    assert exit_.value.code == 0
    text = capfd.readouterr().out
    assert "examples:" in text and "worldvla imagine --image" in text
