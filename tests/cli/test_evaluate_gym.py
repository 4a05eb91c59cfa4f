"""`worldvla evaluate gym` on Meta-World, with its own expert and with a small random model."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from command_result import Result
from PIL import Image
from small_checkpoint import write_checkpoint

from transformers_worldvla.action_tokenization_worldvla import Embodiment

sys.path.insert(0, str(Path(__file__).parents[1] / "evaluation"))
from simulator_extras import need_meta_world  # noqa: E402

need_meta_world()

META_WORLD = ("evaluate", "gym", "--env", "Meta-World/MT1")
SAWYER = Embodiment("sawyer", low=(-1.0,) * 4, high=(1.0,) * 4, rotation=180)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--env", "Meta-World/MT1", "--tasks", "fly-v3"), "Meta-World has no task 'fly-v3'"),
        (("--env", "Pendulum-v1"), "--instruction: say what the robot is to do"),
        (("--env", "Pendulum-v1", "--tasks", "a"), "Pendulum-v1 is one task"),
        (("--env", "NoSuch-v0", "--instruction", "go"), "NoSuch"),
        (("--env", "Pendulum-v1", "--instruction", "go", "--option", "g"), "--option g: give NAME=VALUE"),
        (("--env", "Meta-World/MT1", "--tasks", "reach-v3"), "takes actions of shape (4,)"),
        (("--env", "Meta-World/MT1", "--option", "camera_name=corner"), "with Meta-World say it by --camera"),
    ],
)
def test_bad_input_is_one_line(
    worldvla: Any, robot_checkpoint: Path, tmp_path: Path, arguments: tuple[str, ...], reason: str
) -> None:
    options = ("--model", robot_checkpoint, "--output", tmp_path / "out")
    result: Result = worldvla("evaluate", "gym", *arguments, *options)
    assert result.code == 2
    assert reason in result.err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_the_expert_and_a_model(worldvla: Any, tmp_path: Path) -> None:
    reach = (*META_WORLD, "--tasks", "reach-v3", "--fast-render", "--workers", "1", "--json")
    expert: Result = worldvla(*reach, "--model", "expert", "--trials", "2", "--output", tmp_path / "expert")
    assert expert.code == 0, expert.err
    assert expert.document["average"]["success_rate"] == 1.0
    checkpoint = write_checkpoint(tmp_path / "sawyer", SAWYER)
    options = ("--model", checkpoint, "--trials", "1", "--max-steps", "6", "--output", tmp_path / "model")
    model: Result = worldvla(*reach, *options)
    assert model.code == 0, model.err
    (row,) = [json.loads(line) for line in (tmp_path / "model" / "episodes.jsonl").read_text().splitlines()]
    assert (row["suite"], row["instruction"], row["steps"]) == ("Meta-World/MT1", "reach", 6)
    assert row["success"] is not None and row["versions"]["metaworld"]
    assert (tmp_path / "model" / "views" / f"Meta-World_MT1_{row['task']}.png").is_file()


def test_options_reach_meta_world(worldvla: Any, tmp_path: Path) -> None:
    options = ("--option", "width=96", "--option", "height=80", "--max-steps", "2", "--video-format", "gif", "--json")
    tasks = ("--tasks", "reach-v3", "--trials", "1", "--fast-render", "--workers", "1")
    result: Result = worldvla(*META_WORLD, *tasks, *options, "--model", "noop", "--output", tmp_path / "out")
    assert result.code == 0, result.err
    assert result.document["settings"]["options"] == {"width": 96, "height": 80, "camera_name": "corner2"}
    (video,) = result.document["videos"]
    with Image.open(video) as picture:
        assert picture.width == 96, "and a line of text above it"
