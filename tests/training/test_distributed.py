"""Two processes on the CPU (gloo) against one: FSDP2 under the policy of the example config, and DDP in the Trainer.

What happens in each process, and most assertions, stand in `distributed_worker.py`. accelerate itself runs DDP where
FSDP is asked for on a CPU, so its units are made here by the same calls of `fully_shard`.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from accelerate.utils.launch import prepare_multi_gpu_env
from model_factory import tiny_model

from transformers_worldvla.training.distributed import DECODER_LAYERS, WHOLE_MODULES, adapt_fsdp_plugin

CONFIGS = Path(__file__).parents[2] / "examples" / "distributed"
WORKER = Path(__file__).with_name("distributed_worker.py")


def run(case: str, folder: Path, processes: int = 2) -> None:
    """Run the worker in so many processes; a failed assertion in one of them fails here with its output."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, str(WORKER), case, str(folder)]
    result = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert result.returncode == 0, result.stderr[-6000:]


@pytest.mark.slow
def test_fsdp2_is_one_process(tmp_path: Path) -> None:
    """Sharded parameters; same losses and gradients, chunked and checkpointed too; sharded saving and resuming."""
    run("fsdp", tmp_path)


@pytest.mark.slow
def test_ddp_through_the_trainer_is_accumulation(tmp_path: Path) -> None:
    """Three steps of 2 ranks are those of 1 process with 2 accumulation steps: losses, metrics and weights."""
    run("ddp", tmp_path, processes=2)
    run("ddp", tmp_path, processes=1)
    ranks, one = (torch.load(tmp_path / f"weights{n}.pt", weights_only=True) for n in (2, 1))
    assert ranks.keys() == one.keys()
    for name, weights in one.items():
        torch.testing.assert_close(ranks[name], weights, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
    logs = [json.loads((tmp_path / f"log{n}.json").read_text()) for n in (2, 1)]
    assert len(logs[0]) == len(logs[1]) == 4  # three steps and the summary
    timing = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos"}
    for with_ranks, alone in zip(*logs, strict=True):
        assert with_ranks.keys() == alone.keys()
        for name in alone.keys() - timing:
            assert with_ranks[name] == pytest.approx(alone[name], rel=1e-4), name


# -------------------------------------------------------------------- the example configs


def config(name: str) -> dict[str, Any]:
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())


def test_the_fsdp_config_names_our_modules() -> None:
    """A class that the model has, and a pattern that finds the image tokenizer alone."""
    fsdp = config("fsdp2")["fsdp_config"]
    assert fsdp["fsdp_version"] == 2
    assert fsdp["fsdp_transformer_layer_cls_to_wrap"] == DECODER_LAYERS[0]
    assert fsdp["fsdp_ignored_modules"] == WHOLE_MODULES
    model = tiny_model()
    wrapped = [module for module in model.modules() if type(module).__name__ == DECODER_LAYERS[0]]
    assert wrapped == list(model.model.layers)
    assert [name for name, _ in model.named_modules() if re.fullmatch(WHOLE_MODULES, name)] == ["model.vqmodel"]
    swin = tiny_model(swin_norm=True)
    assert {type(layer).__name__ for layer in swin.model.layers} == {DECODER_LAYERS[1]}


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "deepspeed_zero2", "deepspeed_zero3"])
def test_accelerate_reads_the_config(name: str) -> None:
    """accelerate knows every field: it refuses others."""
    loaded = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert loaded.distributed_type == {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}.get(name, "DEEPSPEED")


def test_the_fsdp_config_becomes_the_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `accelerate launch` puts into the environment gives the plugin that the worker's units stand for."""
    arguments = launch_command_parser().parse_args(["--config_file", str(CONFIGS / "fsdp2.yaml"), "train.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    for key, value in prepare_multi_gpu_env(arguments).items():
        if key.startswith("FSDP_"):
            monkeypatch.setenv(key, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.transformer_cls_names_to_wrap == [DECODER_LAYERS[0]]
    assert plugin.ignored_modules == WHOLE_MODULES
    assert plugin.reshard_after_forward is True
    assert "FULL_STATE_DICT" in str(plugin.state_dict_type)


def test_a_bare_plugin_is_completed() -> None:
    """`--fsdp` without a config: by itself accelerate would look for all of `_no_split_modules` and shard the VQ."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", mixed_precision_policy="bf16"
    )
    adapt_fsdp_plugin(plugin, tiny_model(swin_norm=True))
    assert plugin.transformer_cls_names_to_wrap == [DECODER_LAYERS[1]]
    assert plugin.ignored_modules == WHOLE_MODULES
    policy = plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) == (torch.bfloat16, torch.float32, None)
    assert not policy.cast_forward_inputs


@pytest.mark.parametrize("stage", [2, 3])
def test_the_deepspeed_config(stage: int) -> None:
    """The stage, a 16-bit checkpoint that opens as any other, and nothing that a recipe should decide."""
    name = f"deepspeed_zero{stage}"
    path = config(name)["deepspeed_config"]["deepspeed_config_file"]
    assert path == f"examples/distributed/{name}.json"
    assert "mixed_precision" not in config(name), "accelerate refuses it beside a DeepSpeed file"
    loaded = HfDeepSpeedConfig(str(CONFIGS / f"{name}.json"))
    assert loaded.is_zero2() == (stage == 2) and loaded.is_zero3() == (stage == 3)
    decided = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "bf16.enabled")
    assert {loaded.get_value(key) for key in decided} == {"auto"}
    assert loaded.get_value("optimizer") is None and loaded.get_value("scheduler") is None
    if stage == 3:
        assert loaded.is_true("zero_optimization.stage3_gather_16bit_weights_on_model_save")
