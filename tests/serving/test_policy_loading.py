"""Loading a policy: names are checked before weights, adapters load over their base, damage is one line."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_checkpoint import GANTRY, LIBERO, write_checkpoint

from transformers_worldvla import WorldVLAForCausalLM
from transformers_worldvla.serving.policy import WorldVLAPolicy

PROMPT = "push the square to the right"


@pytest.fixture
def without_weights(arm_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint whose weights are gone: whoever reads them fails with another error."""
    folder = tmp_path / "no-weights"
    shutil.copytree(arm_checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    return folder


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            {"observation_keys": ["imgae", "prompt"]},
            "no picture 'image', only the keys 'imgae', 'prompt'; is it 'imgae'?",
        ),
        ({"camera_map": {"front": "imag"}}, "did you mean 'image'?"),
        ({"embodiment": "panda"}, "unknown embodiment 'panda'; known: libero"),
        ({"replan_interval": 9}, "replan_interval is 1 to 4"),
        ({"device": "no-such-device"}, "the device 'no-such-device' cannot be used here"),
    ],
)
def test_wrong_names_are_found_before_weights_are_read(
    without_weights: Path, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError) as caught:
        WorldVLAPolicy.from_pretrained(without_weights, **options)
    assert reason in str(caught.value)
    with pytest.raises(ValueError, match="no-weights: the weights cannot be loaded"):
        WorldVLAPolicy.from_pretrained(without_weights, observation_keys=["image"])


def test_a_folder_that_is_no_checkpoint_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no checkpoint: config.json is missing"):
        WorldVLAPolicy.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="model type 'llama', not 'worldvla'"):
        WorldVLAPolicy.from_pretrained(tmp_path)


def test_damaged_weights_are_one_line(arm_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(arm_checkpoint, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged: the weights cannot be loaded") as caught:
        WorldVLAPolicy.from_pretrained(folder, device="cpu")
    assert "\n" not in str(caught.value)


def test_one_of_several_embodiments_is_served(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "robots", LIBERO, GANTRY)
    policy = WorldVLAPolicy.from_pretrained(folder, embodiment="gantry", device="cpu", num_actions=3)
    chunk = policy.predict_action_chunk({"image": np.zeros((64, 64, 3), np.uint8), "prompt": PROMPT})
    assert chunk.shape == (3, 3) and policy.metadata["action_names"] == ["along", "across", "down"]


@pytest.mark.parametrize("with_processor", [True, False])
def test_an_adapter_acts_as_the_base_it_was_merged_into(
    arm_checkpoint: Path, arm: WorldVLAPolicy, tmp_path: Path, frames: list[np.ndarray], with_processor: bool
) -> None:
    peft = pytest.importorskip("peft")
    model = WorldVLAForCausalLM.from_pretrained(arm_checkpoint)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, config)
    folder = tmp_path / "adapter"
    adapted.save_pretrained(folder)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(arm_checkpoint)
    if with_processor:
        arm.processor.save_pretrained(folder)
    policy = WorldVLAPolicy.from_pretrained(folder, device="cpu")
    seen = {"image": frames[0], "prompt": PROMPT}
    merged = WorldVLAPolicy(adapted.merge_and_unload(), arm.processor)
    got, wanted, base = (one.predict(seen) for one in (policy, merged, arm.session()))
    np.testing.assert_allclose(got.logprobs, wanted.logprobs, atol=1e-4)
    np.testing.assert_array_equal(got.actions, wanted.actions)
    assert (got.actions != base.actions).any()


def test_an_adapter_without_a_base_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="does not name its base"):
        WorldVLAPolicy.from_pretrained(tmp_path)


def test_acting_needs_nothing_of_the_extra_serve(arm_checkpoint: Path) -> None:
    script = """
import sys
for name in ("aiohttp", "msgpack", "prometheus_client", "websockets"):
    sys.modules[name] = None  # cannot be imported
import numpy as np
from transformers_worldvla import WorldVLAPolicy
policy = WorldVLAPolicy.from_pretrained(sys.argv[1], device="cpu")
print(policy.select_action({"image": np.zeros((64, 64, 3), np.uint8), "prompt": "go"}).shape)
try:
    import transformers_worldvla.serving.server
except ImportError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", script, str(arm_checkpoint)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["(7,)", 'this needs aiohttp: pip install "transformers_worldvla[serve]"']
