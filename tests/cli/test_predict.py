"""`worldvla predict`: the same actions as the library's own calls, in every form, and one line for bad input."""

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from small_checkpoint import NUM_ACTIONS

from transformers_worldvla import WorldVLAForCausalLM, WorldVLAProcessor

INSTRUCTION = "push the square to the right"


@pytest.fixture
def expected(robot_checkpoint: Path, pictures: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """Actions (K, D) and the probabilities of their bins (K, D), without the command."""
    processor = WorldVLAProcessor.from_pretrained(robot_checkpoint)
    model = WorldVLAForCausalLM.from_pretrained(robot_checkpoint)
    inputs = processor(images=[Image.open(file) for file in pictures], instruction=INSTRUCTION)
    answer = model.generate_actions(**inputs, num_actions=NUM_ACTIONS, return_dict_in_generate=True)
    return processor.decode_actions(answer.sequences)[0], answer.logprobs[0].exp().numpy()


def test_json_has_the_actions_and_what_they_mean(
    worldvla: Callable[..., Any], robot_checkpoint: Path, pictures: list[Path], expected: tuple[np.ndarray, np.ndarray]
) -> None:
    result = worldvla(
        "predict", "--model", robot_checkpoint, "--images", *pictures, "--instruction", INSTRUCTION, "--json"
    )
    assert result.code == 0, result.err
    document = result.document
    actions, probabilities = expected
    assert np.array_equal(document["actions"], actions)
    assert document["probabilities"] == pytest.approx(probabilities, abs=1e-5)
    assert document["confidence"] == pytest.approx([math.prod(row) ** (1 / 7) for row in probabilities], abs=1e-4)
    assert document["action_names"] == ["x", "y", "z", "rx", "ry", "rz", "gripper"]
    assert document["units"][0] == "0.05 m" and document["control_hz"] == 20 and document["semantics"] == "delta"
    assert document["embodiment"] == "libero" and document["sampling"] is None


def test_table_shows_names_units_values_and_confidence(
    worldvla: Callable[..., Any], robot_checkpoint: Path, pictures: list[Path], expected: tuple[np.ndarray, np.ndarray]
) -> None:
    result = worldvla("predict", "--model", robot_checkpoint, "--images", *pictures, "--instruction", INSTRUCTION)
    assert result.code == 0, result.err
    title, names, units, *rows = result.out.splitlines()
    assert INSTRUCTION in title and "4 delta actions of libero, 20 a second" in title
    assert names.split() == ["step", "x", "y", "z", "rx", "ry", "rz", "gripper", "confidence"]
    assert units.split() == ["0.05", "m"] * 3 + ["0.5", "rad"] * 3 + ["command"]
    assert len(rows) == NUM_ACTIONS
    actions, probabilities = expected
    for step, row in enumerate(rows):
        cells = row.split()
        assert cells[0] == str(step)
        assert [float(cell) for cell in cells[1:-1]] == pytest.approx(actions[step], abs=6e-5)
        assert float(cells[-1].rstrip("%")) == pytest.approx(100 * math.prod(probabilities[step]) ** (1 / 7), abs=0.06)


@pytest.mark.parametrize("suffix", ["json", "csv", "npy"])
def test_output_file(
    worldvla: Callable[..., Any],
    robot_checkpoint: Path,
    pictures: list[Path],
    expected: tuple[np.ndarray, np.ndarray],
    tmp_path: Path,
    suffix: str,
) -> None:
    file = tmp_path / "new folder" / f"actions.{suffix}"
    arguments = ("predict", "--model", robot_checkpoint, "--images", *pictures, "--instruction", INSTRUCTION)
    assert worldvla(*arguments, "--output", file).code == 0
    if suffix == "npy":
        actions = np.load(file)
    elif suffix == "csv":
        header, *rows = csv.reader(file.read_text().splitlines())
        assert header == ["x", "y", "z", "rx", "ry", "rz", "gripper"]
        actions = np.array(rows, float)
    else:
        actions = np.array(json.loads(file.read_text())["actions"])
    assert np.array_equal(actions, expected[0])
    assert [path.name for path in file.parent.iterdir()] == [file.name], "nothing else is left in the folder"


def test_number_of_actions_and_sampling(
    worldvla: Callable[..., Any], robot_checkpoint: Path, pictures: list[Path]
) -> None:
    arguments = (
        "predict",
        "--model",
        robot_checkpoint,
        "--images",
        pictures[1],
        "--instruction",
        INSTRUCTION,
        "--json",
    )
    longer = worldvla(*arguments, "--num-actions", 6)
    assert np.shape(longer.document["actions"]) == (6, 7)
    assert "trained on chunks of 4 actions" in longer.err
    sampled = [
        worldvla(*arguments, "--sample", "--temperature", 2, "--top-k", 40, "--seed", seed).document
        for seed in (1, 1, 2)
    ]
    assert sampled[0]["actions"] == sampled[1]["actions"] != sampled[2]["actions"]
    assert sampled[0]["sampling"] == {"temperature": 2.0, "top_k": 40, "seed": 1}
    greedy = worldvla(*arguments, "--sample", "--top-k", 1).document
    assert greedy["actions"] == worldvla(*arguments).document["actions"]


def test_embodiment_decides_dimension_and_cameras(
    worldvla: Callable[..., Any], two_robot_checkpoint: Path, two_camera_checkpoint: Path, pictures: list[Path]
) -> None:
    arguments = ("--instruction", INSTRUCTION, "--json", "--model")
    gantry = worldvla(
        "predict", "--images", *pictures, *arguments, two_robot_checkpoint, "--embodiment", "gantry"
    ).document
    assert np.shape(gantry["actions"]) == (NUM_ACTIONS, 3) and gantry["action_names"] == ["along", "across", "down"]
    odd = worldvla("predict", "--images", pictures[0], *arguments, two_camera_checkpoint)
    assert odd.code == 2 and "2 cameras (C) the number of images is a multiple of 2, not 1" in odd.err
    assert worldvla("predict", "--images", *pictures, *arguments, two_camera_checkpoint).code == 0


class Inputs:
    """The arguments of a good call, one of which a test replaces."""

    def __init__(self, model: Path, pictures: list[Path]):
        self.options: dict[str, Any] = {"--model": model, "--images": pictures, "--instruction": INSTRUCTION}

    def with_(self, **changes: Any) -> list[Any]:
        options = self.options | {f"--{name.replace('_', '-')}": value for name, value in changes.items()}
        flat: list[Any] = ["predict"]
        for name, value in options.items():
            flat += [name, *(value if isinstance(value, list) else [value])]
        return flat


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": ["missing.png"]}, "No such file or directory: missing.png"),
        ({"images": ["notes.txt"]}, "notes.txt is not a picture that can be read"),
        ({"images": ["cut.png"]}, "cut.png: "),
        ({"images": ["deep.png"]}, "deep.png: a picture has 8 bits a channel"),
        ({"instruction": " "}, "this prompt needs an instruction"),
        ({"embodiment": "aloha"}, "unknown embodiment 'aloha'; known: libero (D=7) from LIBERO"),
        ({"model": "no-such-folder"}, "no-such-folder: no such folder, and no Hub id (owner/name)"),
        ({"model": "nobody/nothing"}, "nobody/nothing: no such folder, and not to be had from the Hub"),
        ({"model": "notes.txt"}, "notes.txt is a file"),
        ({"model": "empty"}, "empty holds no WorldVLA checkpoint: config.json and processor_config.json missing"),
        ({"model": "llama"}, "llama is a checkpoint of model type 'llama', not 'worldvla'"),
        ({"output": "actions.txt"}, "--output actions.txt: the file's name ends in .json, .csv, .npy"),
        ({"output": "empty.csv"}, "--output empty.csv is a folder"),
        ({"output": "notes.txt/a.csv"}, "notes.txt is no folder that can be written to"),
        ({"temperature": 0.5}, "--temperature does nothing without --sample"),
        ({"device": "warp"}, "the device 'warp' cannot be used here: "),
        ({"device": "cuda:99"}, "the device 'cuda:99' cannot be used here: "),
        ({"revision": "main"}, "--revision belongs to Hub ids"),
    ],
)
def test_bad_input_is_one_line(
    worldvla: Callable[..., Any],
    robot_checkpoint: Path,
    pictures: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    message: str,
) -> None:
    folder = tmp_path / "here"
    for name in ("empty", "empty.csv", "llama"):
        (folder / name).mkdir(parents=True)
    (folder / "notes.txt").write_text("no picture")
    (folder / "cut.png").write_bytes(pictures[0].read_bytes()[:2000])
    Image.fromarray(np.zeros((64, 64), np.uint16)).save(folder / "deep.png")
    for name in ("config.json", "processor_config.json"):
        (folder / "llama" / name).write_text('{"model_type": "llama"}')
    before = sorted(folder.rglob("*"))
    monkeypatch.chdir(folder)
    result = worldvla(*Inputs(robot_checkpoint, pictures).with_(**changes), "--json")
    assert result.code == 2
    assert result.out == ""
    line = result.err.splitlines()[-1]
    assert line.startswith("worldvla predict: ") and message in line
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("damage", ["cut", "renamed"])
def test_damaged_weights_are_refused(
    worldvla: Callable[..., Any], robot_checkpoint: Path, pictures: list[Path], tmp_path: Path, damage: str
) -> None:
    """Above all, no random weights in place of missing ones."""
    from safetensors.numpy import load_file, save_file

    folder = tmp_path / "damaged"
    folder.mkdir()
    for file in robot_checkpoint.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = folder / "model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        tensors = load_file(weights)
        tensors["elsewhere"] = tensors.pop("model.norm.weight")
        save_file(tensors, weights, metadata={"format": "pt"})
    result = worldvla(*Inputs(folder, pictures).with_())
    assert result.code == 2 and result.out == ""
    line = result.err.splitlines()[-1]
    assert f"{folder}: the weights " in line
    assert damage == "cut" or "lack model.norm.weight (1 missing in all)" in line


def test_bad_arguments_are_one_line(worldvla: Callable[..., Any], capfd: pytest.CaptureFixture[str]) -> None:
    for extra in (["--num-actions", "0"], ["--top-k", "x"], ["--temperature", "-1"]):
        with pytest.raises(SystemExit) as exit_:
            worldvla("predict", "--images", "a.png", "--instruction", "b", *extra)
        assert exit_.value.code == 2
        assert capfd.readouterr().err.count("\n") == 1


def test_a_failed_run_leaves_an_earlier_output_alone(
    worldvla: Callable[..., Any], robot_checkpoint: Path, pictures: list[Path], tmp_path: Path
) -> None:
    file = tmp_path / "actions.csv"
    file.write_text("precious")
    assert worldvla(*Inputs(robot_checkpoint, pictures).with_(output=file, instruction="")).code == 2
    assert file.read_text() == "precious"
    assert worldvla(*Inputs(robot_checkpoint, pictures).with_(output=file)).code == 0
    assert file.read_text().startswith("x,y,z")


def test_in_a_process_without_network_or_questions(
    worldvla_process: Callable[..., Any],
    robot_checkpoint: Path,
    pictures: list[Path],
    expected: tuple[np.ndarray, np.ndarray],
) -> None:
    good = worldvla_process(*Inputs(robot_checkpoint, pictures).with_(), "--json", network=False)
    assert good.code == 0, good.err
    assert np.allclose(good.document["actions"], expected[0])


def test_error_in_a_process(worldvla_process: Callable[..., Any], robot_checkpoint: Path, pictures: list[Path]) -> None:
    bad = worldvla_process(*Inputs(robot_checkpoint, pictures).with_(images=["missing.png"]))
    assert bad.code == 2 and bad.out == ""
    assert bad.err == "worldvla predict: No such file or directory: missing.png\n"


def test_help_has_examples(worldvla: Callable[..., Any], capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        worldvla("predict", "--help")
    assert exit_.value.code == 0
    text = capfd.readouterr().out
    assert "examples:" in text and "worldvla predict --images" in text
