"""Stages of `examples/libero_from_scratch` that need no simulator: hand positions from a cache, and packing."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from readme_runner import EXAMPLES, make_runner
from safetensors.torch import load_file
from small_checkpoint import small_model

from transformers_worldvla import WorldVLAForCausalLM, WorldVLAProcessor
from transformers_worldvla.assets import DEFAULT_CHECKPOINT, bundled_folder
from transformers_worldvla.data import FrameTokenCache

CACHE = Path(__file__).parents[2] / "hub" / "libero-goal-corrections"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    scripts = {"hand_positions.py": "", "pack.py": ""}
    call = make_runner(EXAMPLES / "libero_from_scratch", scripts, monkeypatch, capsys)
    return lambda name, *arguments: call(["python", f"{name}.py", *map(str, arguments)])


def test_a_hand_position_is_the_state_one_step_later(run: Callable[..., str], tmp_path: Path) -> None:
    run("hand_positions", CACHE, "--output", tmp_path / "hands")
    run("hand_positions", CACHE, "--output", tmp_path / "again", "--ranges", tmp_path / "hands")
    before, hands, again = (FrameTokenCache(path) for path in (CACHE, tmp_path / "hands", tmp_path / "again"))
    assert hands.splits == before.splits and hands.fingerprint == again.fingerprint != before.fingerprint
    assert (hands.embodiment.name, hands.embodiment.action_dim) == ("libero-hand", 4)
    assert again.embodiment == hands.embodiment
    old, new = before.table("val_ind"), hands.table("val_ind")
    assert new["codes.image"].equals(old["codes.image"])
    rows = list(zip(old.to_pylist(), new.to_pylist(), strict=True))
    for (here, asked), (there, _) in zip(rows, [*rows[1:], rows[-1]], strict=True):
        later = there if there["episode_index"] == here["episode_index"] else here
        assert asked["action"] == [later["state"][index] for index in (0, 1, 2, 6)]
        assert asked["instruction"] == here["instruction"] + ", as hand positions"
    trained = np.array(hands.table("train")["action"].to_pylist())
    assert trained.min(0) == pytest.approx(hands.embodiment.low) and trained.max(0) == pytest.approx(
        hands.embodiment.high
    )


def test_a_folder_that_is_there_is_not_written_to(
    run: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, arguments in (
        ("hand_positions", [CACHE]),
        ("pack", ["--checkpoint", bundled_folder(DEFAULT_CHECKPOINT)]),
    ):
        with pytest.raises(SystemExit):
            run(name, *arguments, "--output", tmp_path)
        assert f"{tmp_path} exists: choose another --output" in capsys.readouterr().err


def test_packing_loses_the_second_robot_and_half_of_the_bits(run: Callable[..., str], tmp_path: Path) -> None:
    processor = WorldVLAProcessor.from_pretrained(bundled_folder(DEFAULT_CHECKPOINT))
    libero = processor.get_embodiment("libero").to_dict()
    processor.embodiments = {"libero": libero, "libero-hand": {**libero, "name": "libero-hand"}}
    processor.default_embodiment = "libero"
    model = small_model(processor)
    model.config.action_dim = None
    model.save_pretrained(tmp_path / "trained")
    processor.save_pretrained(tmp_path / "trained")
    (tmp_path / "trained" / "training_statistics.json").write_text('{"action_mean": [0, 0, 0, 0, 0, 0, 0]}')
    run("pack", "--checkpoint", tmp_path / "trained", "--output", tmp_path / "packed")
    stored = {
        name: value for file in (tmp_path / "packed").glob("*.safetensors") for name, value in load_file(file).items()
    }
    assert {value.dtype for name, value in stored.items() if ".vqmodel." in name} == {torch.float32}
    assert {value.dtype for name, value in stored.items() if ".vqmodel." not in name} == {torch.bfloat16}
    opened = WorldVLAForCausalLM.from_pretrained(tmp_path / "packed")
    assert opened.dtype == torch.float32 and opened.config.action_dim == 7
    for name, value in model.state_dict().items():
        assert torch.equal(opened.state_dict()[name], value if ".vqmodel." in name else value.bfloat16().float()), name
    assert list(WorldVLAProcessor.from_pretrained(tmp_path / "packed").embodiments) == ["libero"]
    assert json.loads((tmp_path / "packed" / "training_statistics.json").read_text()) == {"action_mean": [0] * 7}
