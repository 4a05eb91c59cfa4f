"""`worldvla train`: from a dataset to a checkpoint, in this process and in ones that are killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_checkpoint import LIBERO, NUM_ACTIONS, write_checkpoint, write_episode
from transformers import AutoModelForCausalLM, AutoProcessor

from transformers_worldvla import WorldVLAConfig
from transformers_worldvla.cli.main import build_parser
from transformers_worldvla.data import FrameTokenCache
from transformers_worldvla.training.datasets import Source

HUB = Path(__file__).parents[2] / "hub"
FAST = ("--batch-size", 2, "--log-every", 1, "--cpu")


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three episodes of a task, so that one is held out."""
    folder = tmp_path_factory.mktemp("recordings")
    for number in range(3):
        write_episode(folder / "made", steps=9, seed=number)
        (folder / "made" / "episode_0").rename(folder / f"episode_{number}")
    (folder / "made").rmdir()
    return folder


@pytest.fixture(scope="module")
def cache(recordings: Path, robot_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its frame-token cache."""
    from transformers_worldvla.cli.main import main

    output = tmp_path_factory.mktemp("caches") / "arm"
    code = main(["tokenize", str(recordings), "--model", str(robot_checkpoint), "--output", str(output),
                 "--name", "arm", "--val-share", "0.3", "--ood-share", "0"])  # fmt: skip
    assert code == 0
    return output


def test_dry_run_says_what_would_happen(worldvla: Callable[..., Any], cache: Path, robot_checkpoint: Path) -> None:
    result = worldvla("train", "--dataset", cache, "--model", robot_checkpoint, "--dry-run", "--epochs", 2, "--json")
    document = result.document
    per_episode = {"action": 9 - NUM_ACTIONS + 1, "world": 8}
    assert document["samples"] == {kind: 2 * count for kind, count in per_episode.items()}
    assert document["datasets"][0]["episodes"] == {"train": 2, "val_ind": 1, "val_ood": 0}
    assert document["validation"] == {"val_ind": sum(per_episode.values())}
    assert document["steps_per_epoch"] == 4 and document["steps"] == 8, "28 samples in batches of 8"
    assert sum(count for _, _, count in document["lengths"]) == 28
    assert document["memory"]["total"] == sum(v for k, v in document["memory"].items() if k != "total")
    labelled = [line for line in document["sample"] if line.startswith("*")]
    assert labelled[-1].startswith("* separator") and not any("text" in line for line in labelled)


def test_dry_run_counts_the_embeddings_that_an_adapter_trains(
    worldvla: Callable[..., Any], cache: Path, robot_checkpoint: Path
) -> None:
    arguments = ("train", "--dataset", cache, "--model", robot_checkpoint, "--dry-run", "--json")
    config = WorldVLAConfig.from_pretrained(robot_checkpoint)
    few, many = (
        worldvla(*arguments, *kinds).document["parameters"]["trained"]
        for kinds in ((), ("--lora-tokens", "action", "image"))
    )
    # a row of every code in embedding and head, and of the few tokens that frame a picture
    assert many - few > 2 * config.vq_config.num_embeddings * config.hidden_size


def test_dry_run_of_a_raw_dataset_encodes_nothing(
    worldvla: Callable[..., Any], recordings: Path, robot_checkpoint: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    result = worldvla("train", "--dataset", recordings, "--model", robot_checkpoint, "--dry-run", "--output", output)
    assert result.code == 0 and not output.exists()
    assert 'text "What action should the robot take to push the square to the right?"' in result.out
    actions = np.load(recordings / "episode_0" / "actions.npy")
    assert f"z {actions[0, 2]:+.2f}"[:4] in result.out or "* action" in result.out
    assert "optimizer" in result.out and "tokens of a sample" in result.out


def test_trains_an_adapter_from_a_raw_dataset_and_merges_it(
    worldvla: Callable[..., Any], recordings: Path, robot_checkpoint: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    command = ("train", "--dataset", recordings, "--model", robot_checkpoint, "--output", output, "--merge", "--json")
    document = worldvla(*command, "--steps", 2, "--lora-rank", 4, *FAST).document
    assert document["steps"] == 2 and document["merged"]["merge_difference"] < 1e-3
    for folder in (output, output / "merged"):
        processor = AutoProcessor.from_pretrained(folder)
        robot = processor.get_embodiment()
        assert robot.low[0] > LIBERO.low[0], "the ranges of these recordings"
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert model.config.action_dim == 7
    card = (output / "README.md").read_text()
    assert "library_name: peft" in card and "2 optimizer steps" in card and robot.name in card
    assert "## Training" in (output / "merged" / "README.md").read_text()
    assert (output / "cache" / f"0-{recordings.name}" / "worldvla_cache.json").is_file()
    assert worldvla("predict", "--model", output, "--images", *_pictures(recordings), "--instruction", "lift").code == 0


def test_trains_over_a_base_of_four_bits(worldvla: Callable[..., Any], recordings: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: the extra qlora")
    base = write_checkpoint(tmp_path / "base", hidden_size=64, intermediate_size=64)  # NF4 has blocks of 64 weights
    output = tmp_path / "run"
    stored = {file.name: file.read_bytes() for file in base.glob("*.safetensors")}
    command = ("train", "--dataset", recordings, "--model", base, "--output", output, "--recipe", "qlora", "--merge")
    document = worldvla(*command, "--json", "--steps", 3, "--lora-rank", 4, *FAST).document
    assert document["steps"] == 3 and document["merged"]["merge_difference"] < 1e-3
    assert {file.name: file.read_bytes() for file in base.glob("*.safetensors")} == stored
    assert worldvla("predict", "--model", output, "--images", *_pictures(recordings), "--instruction", "lift").code == 0


def _pictures(recordings: Path) -> list[Path]:
    return sorted((recordings / "episode_0" / "image").glob("*.png"))[:2]


def test_world_model_first_then_actions(
    worldvla: Callable[..., Any], cache: Path, robot_checkpoint: Path, tmp_path: Path
) -> None:
    """Paper Table 6 as two runs of one command."""
    common = ("--recipe", "full", "--dataset", cache, "--steps", 1, "--eval-every", 1, *FAST, "--json")
    world = worldvla("train", "--model", robot_checkpoint, "--kinds", "world", "--output", tmp_path / "w", *common)
    assert "eval_val_ind_world_loss" in world.document["metrics"]
    assert "eval_val_ind_action_loss" not in world.document["metrics"]
    action = worldvla("train", "--start-from", tmp_path / "w", "--kinds", "action", "--output", tmp_path / "a", *common)
    assert action.document["model"] == str(tmp_path / "w")
    assert "eval_val_ind_action_loss" in action.document["metrics"]
    logged = json.loads((tmp_path / "a" / "training_log.json").read_text())
    assert "world_loss" not in logged[0]


def test_two_robots_in_one_run(
    worldvla: Callable[..., Any], cache: Path, recordings: Path, robot_checkpoint: Path, tmp_path: Path
) -> None:
    """Of different D, each with its own metrics and ranges."""
    other = tmp_path / "gantry"
    shutil.copytree(recordings, other)
    for file in other.glob("*/actions.npy"):
        np.save(file, np.load(file)[:, :3])
    code = worldvla("tokenize", other, "--model", robot_checkpoint, "--output", tmp_path / "gantry-cache", "--name",
                    "gantry", "--val-share", 0.3, "--ood-share", 0).code  # fmt: skip
    assert code == 0
    output, gantry = tmp_path / "run", f"{tmp_path / 'gantry-cache'}:3"
    options = ("--recipe", "full", "--steps", 3, "--eval-every", 3, "--output", output, *FAST, "--json")
    command = ("train", "--dataset", cache, "--dataset", gantry, "--model", robot_checkpoint)
    document = worldvla(*command, *options).document
    assert {"eval_arm_val_ind_loss", "eval_gantry_val_ind_loss"} <= document["metrics"].keys()
    assert any(name.startswith("eval_gantry_val_ind_l1/gantry/") for name in document["metrics"])
    processor = AutoProcessor.from_pretrained(output)
    assert list(processor.embodiments) == ["arm", "gantry"] and processor.default_embodiment == "arm"
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.config.action_dim is None, "the robots differ in D"


def test_instructions_choose_episodes(worldvla: Callable[..., Any]) -> None:
    """Of bundled caches; one that has none of them is left out, and what is chosen is told from the whole."""
    caches = {name: FrameTokenCache(HUB / f"libero-goal-{name}") for name in ("tokens", "tokens-more")}
    data = [word for cache in caches.values() for word in ("--dataset", cache.path)]
    chosen = ("put the bowl on the stove", "turn on the stove")
    command = ("train", *data, "--kinds", "action", "--dry-run", "--json")
    documents = [worldvla(*command, *more).document for more in ((), ("--instructions", *chosen))]
    whole, part = (document["datasets"] for document in documents)
    assert len(whole) == 2 and len(part) == 1
    for split in ("train", "val_ind"):
        rows = caches["tokens"].table(split, ["episode_index", "instruction"]).to_pydict()
        told = dict(zip(rows["episode_index"], rows["instruction"], strict=True))
        assert part[0]["episodes"][split] == sum(text in chosen for text in told.values()) > 0
    assert 0 < documents[1]["samples"]["action"] < documents[0]["samples"]["action"]
    source = Source("libero", LIBERO, "a fingerprint", {})
    prints = [source.choose(texts).fingerprint for texts in (chosen, chosen[::-1], chosen[:1])]
    assert prints[0] == prints[1] and len({*prints, source.fingerprint}) == 3, "another choice is another run"
    result = worldvla(*command, "--instructions", "turn on the stove", "turn of the stove")
    assert result.code == 2
    assert 'no training episode has "turn of the stove", did you mean "turn on the stove"?' in result.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "--output DIR is needed"),
        (("--output", "{tmp}/o", "--instructions", "fly"), '--instructions: no training episode has "fly"; there '),
        (("--output", "{tmp}/o", "--recipe", "full", "--merge"), "--merge does nothing with --recipe full"),
        (("--output", "{tmp}/o", "--kinds", "action", "dream"), "sample kinds are"),
        (("--output", "{tmp}/o", "--kinds", "action:2", "world"), "give every kind a weight, or none"),
        (("--output", "{tmp}/o", "--max-length", "40"), "raise it, or make pictures, history or the action chunk"),
        (("--output", "{tmp}"), "is not empty"),
        (("--output", "{tmp}/o", "--resume", "{tmp}"), "no whole checkpoint of a run"),
    ],
)
def test_says_what_is_wrong_in_one_line(
    worldvla: Callable[..., Any],
    cache: Path,
    robot_checkpoint: Path,
    tmp_path: Path,
    arguments: tuple[str, ...],
    said: str,
) -> None:
    (tmp_path / "foreign.txt").write_text("mine")
    own = [argument.format(tmp=tmp_path) for argument in arguments]
    result = worldvla("train", "--dataset", cache, "--model", robot_checkpoint, "--steps", 1, *FAST, *own)
    assert result.code == 2 and said in result.err and "Traceback" not in result.err
    assert (tmp_path / "foreign.txt").read_text() == "mine"


def test_refuses_to_go_on_with_other_arguments(
    worldvla: Callable[..., Any], cache: Path, robot_checkpoint: Path, tmp_path: Path
) -> None:
    command = ("train", "--dataset", cache, "--model", robot_checkpoint, "--output", tmp_path / "run", "--steps", 1)
    assert worldvla(*command, *FAST, "--max-length", 40).code == 2
    assert worldvla(*command, *FAST).code == 0, "a run that came to nothing may be begun anew"
    before = (tmp_path / "run" / "adapter_model.safetensors").read_bytes()
    result = worldvla(*command, *FAST, "--learning-rate", 0.1)
    assert result.code == 2 and "learning_rate was null, is 0.1" in result.err
    assert worldvla(*command, *FAST).code == 0, "a finished run is left as it is"
    assert (tmp_path / "run" / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["full", "lora"])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    cache: Path, robot_checkpoint: Path, tmp_path: Path, recipe: str
) -> None:
    """kill -9 between two checkpoints, in the second epoch; dropout, sampler, history dropout and AdamW go on."""
    command = [sys.executable, "-m", "transformers_worldvla.cli", "train", "--dataset", cache, "--model",
               robot_checkpoint, "--recipe", recipe, "--steps", 24, "--save-every", 4, "--history-dropout", 0.5,
               "--accumulation", 2, *FAST]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(name: str) -> subprocess.Popen[bytes]:
        arguments = [str(part) for part in (*command, "--output", tmp_path / name)]
        return subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    whole = start("whole")
    assert whole.wait(timeout=500) == 0, whole.stderr and whole.stderr.read().decode()
    killed = start("killed")
    while not (tmp_path / "killed" / "trainer" / "checkpoint-12").exists():
        assert killed.poll() is None, "it was done before it could be killed"
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)  # while the checkpoint is being written, or after it
    killed.wait()
    assert not (tmp_path / "killed" / "training_log.json").exists()
    again = start("killed")
    assert again.wait(timeout=500) == 0, again.stderr and again.stderr.read().decode()

    curves = []
    for name in ("whole", "killed"):
        log = json.loads((tmp_path / name / "training_log.json").read_text())
        curves.append([(entry["step"], entry["loss"], entry["grad_norm"]) for entry in log if "loss" in entry])
    resumed = json.loads((tmp_path / "killed" / "run.json").read_text())["result"]["resumed_from"]
    assert resumed in ("checkpoint-8", "checkpoint-12")
    assert curves[0] == curves[1] and len(curves[0]) == 24
    weights = "model.safetensors" if recipe == "full" else "adapter_model.safetensors"
    assert (tmp_path / "whole" / weights).read_bytes() == (tmp_path / "killed" / weights).read_bytes()


def test_lora_is_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    parser = build_parser()
    assert parser.parse_args(["train", "--dataset", "d", "--lora"]).recipe == "lora"
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["train", "--dataset", "d", "--lora", "--recipe", "full"])
    assert "argument --recipe: not allowed with argument --lora" in capsys.readouterr().err
