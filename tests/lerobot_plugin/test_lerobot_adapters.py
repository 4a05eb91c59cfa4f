"""LoRA by LeRobot's own options: the adapter trains, is saved, opens over its base, and merges into a checkpoint."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lerobot_environment import require_lerobot
from plugin_robot import DATASET, PLUGIN
from safetensors.torch import load_file

require_lerobot()
pytest.importorskip("peft")

DATA = ["--dataset.repo_id=lab/toy", f"--dataset.root={DATASET}", "--batch_size=2", "--num_workers=0"]


def test_an_adapter_of_a_new_robot_is_trained_opened_and_merged(
    checkpoint: Path, command: Callable[..., None], tmp_path: Path
) -> None:
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.datasets.lerobot_dataset import LeRobotDatasetMetadata
    from lerobot.policies.factory import make_policy

    from transformers_worldvla.serving.policy import WorldVLAPolicy

    policy = [PLUGIN, "--policy.type=worldvla", f"--policy.checkpoint={checkpoint}", "--policy.device=cpu"]
    policy += ["--policy.embodiment=mine"]
    options = ["--policy.push_to_hub=false", "--policy.optimizer_lr=0.01", "--peft.method_type=LORA", "--peft.r=4"]
    command("lerobot-train", *policy, *options, *DATA, "--steps=2", f"--output_dir={tmp_path / 'run'}")
    saved = tmp_path / "run" / "checkpoints" / "000002" / "pretrained_model"
    weights = load_file(saved / "adapter_model.safetensors")
    assert not (saved / "model.safetensors").exists()
    assert {name.rsplit(".", 3)[1] for name in weights} == {"q_proj", "k_proj", "v_proj", "o_proj"} | {
        f"{part}_proj" for part in ("gate", "up", "down")
    }
    assert any(bool(value.any()) for name, value in weights.items() if "lora_B" in name), "it was trained"

    config = PreTrainedConfig.from_pretrained(saved)
    config.pretrained_path = saved
    again = make_policy(config, ds_meta=LeRobotDatasetMetadata("lab/toy", root=DATASET))
    loaded = {name.replace(".default", ""): value for name, value in again.state_dict().items() if "lora_" in name}
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())

    merged = again.merge_and_unload()
    merged.config.use_peft = False
    merged.save_pretrained(tmp_path / "merged")
    ours = WorldVLAPolicy.from_pretrained(tmp_path / "merged", device="cpu")
    assert ours.metadata["embodiment"] == "mine", "the ranges of the dataset came along"
    weights = ours.model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in merged.model.state_dict().items())
