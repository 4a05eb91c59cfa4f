"""Conversion: from every form in which a checkpoint is published to a complete one of ours, or to one clear line."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_sources import (
    Sources,
    as_bin,
    as_old_bin,
    as_sharded_bin,
    as_sharded_safetensors,
    assert_refused,
    assert_same_weights,
    expected_weights,
    output_weights,
    quietly,
)
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoProcessor, AutoTokenizer, ChameleonConfig, ChameleonForConditionalGeneration

from transformers_worldvla import WorldVLAForCausalLM, WorldVLAProcessor
from transformers_worldvla.cli.main import main
from transformers_worldvla.convert import Choices, convert_checkpoint
from transformers_worldvla.convert_report import REPORT_NAME
from transformers_worldvla.prompts_worldvla import WORLD_PROMPTS

TEXT = "What action should the robot take to put both moka pots on the stove?"


@pytest.fixture
def sources(authors_tiny: Path, tmp_path: Path) -> Sources:
    return Sources(authors_tiny / "checkpoint", tmp_path / "published")


@pytest.fixture(scope="module")
def converted(authors_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """authors_tiny after the command line converted it."""
    root = tmp_path_factory.mktemp("converted")
    output = root / "deep" / "output"
    assert main(Sources(authors_tiny / "checkpoint", root / "published").command(output)) == 0
    return output


# -------------------------------------------------------------------- what is written


def test_every_weight_is_that_of_the_files(converted: Path, sources: Sources) -> None:
    assert_same_weights(converted, expected_weights(sources))


def test_the_folder_is_complete(converted: Path) -> None:
    names = {path.name for path in converted.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "processor_config.json"} <= names
    assert {"tokenizer.json", "tokenizer_config.json", "README.md", REPORT_NAME} <= names
    assert {"modeling_worldvla.py", "processing_worldvla.py", "image_processing_worldvla.py"} <= names
    assert [path.name for path in converted.parent.iterdir()] == ["output"], "no temporary folder stays"
    assert converted.stat().st_mode & 0o777 == (0o777 & ~current_umask())


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_configuration(converted: Path, sources: Sources) -> None:
    config = json.loads((converted / "config.json").read_text())
    source = json.loads((sources.model / "config.json").read_text())
    same = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "vocabulary_map", "dropout")
    assert {name: config[name] for name in same} == {name: source[name] for name in same}
    assert config["architectures"] == ["WorldVLAForCausalLM"] and config["model_type"] == "worldvla"
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (0, 8710, 1)
    assert config["loss_reduction"] == "authors"
    assert (config["world_loss_weight"], config["z_loss_weight"], config["dropout"]) == (0.04, 1e-5, 0.05)
    assert (config["action_dim"], config["num_cameras"], config["dtype"]) == (7, 1, "float32")
    assert config["vq_config"]["base_channels"] == 32 and config["vq_config"]["embed_dim"] == 16
    model = "modeling_worldvla.WorldVLAForCausalLM"
    assert config["auto_map"]["AutoModel"] == config["auto_map"]["AutoModelForCausalLM"] == model
    generation = json.loads((converted / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"], generation["pad_token_id"]) == (0, 8710, 1)


def test_fields_of_older_configurations_are_carried_over(sources: Sources, tmp_path: Path) -> None:
    changes = {"rope_theta": 5e5, "dropout": 0.1, "z_loss_weight": 0.0, "mask_image_logits": True}
    changes["vq_config"] = {"base_channels": 64}
    sources.edit_json(sources.model / "config.json", lambda config: config.update(changes))
    report = quietly(sources, tmp_path / "output")
    config = WorldVLAForCausalLM.config_class.from_pretrained(tmp_path / "output")
    assert config.rope_parameters["rope_theta"] == 5e5
    assert (config.dropout, config.z_loss_weight) == (0.1, 0.0)
    assert config.vq_config.base_channels == 32
    assert report["config"]["changed"]["vq_config.base_channels"] == [64, 32]
    assert report["config"]["left_out"] == {"mask_image_logits": True}
    assert any("mask_image_logits" in line for line in report["warnings"])
    assert any("vqgan.yaml was used" in line for line in report["warnings"])


def test_the_processor_holds_the_choices(converted: Path, sources: Sources, tmp_path: Path) -> None:
    default = AutoProcessor.from_pretrained(converted)
    assert (default.image_processor.target_size, default.num_actions, default.history) == (256, 5, 2)
    assert default.prompts["world"] == WORLD_PROMPTS["training"]
    assert default.default_embodiment == "libero" and default.get_embodiment().action_dim == 7

    choices = Choices(512, 10, 1, "paper", "libero", "task_language")
    report = quietly(sources, tmp_path / "output", choices=choices)
    processor = WorldVLAProcessor.from_pretrained(tmp_path / "output")
    assert (processor.image_processor.target_size, processor.num_actions, processor.history) == (512, 10, 1)
    assert processor.prompts["world"] == WORLD_PROMPTS["paper"] and processor.instruction_style == "task_language"
    assert report["choices"]["world_prompt"] == "paper"
    assert report["choices"]["prompts"]["world"] == WORLD_PROMPTS["paper"]


def test_it_loads_where_the_package_is_unknown(converted: Path, fresh_process: Callable[..., Any]) -> None:
    script = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoProcessor
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
inputs = processor(torch.zeros(64, 64, 3, dtype=torch.uint8), "pick up the cup", target_size=64)
print(json.dumps(model.generate_actions(**inputs, num_actions=2).tolist()))
"""
    local = WorldVLAForCausalLM.from_pretrained(converted)
    processor = WorldVLAProcessor.from_pretrained(converted)
    inputs = processor(torch.zeros(64, 64, 3, dtype=torch.uint8), "pick up the cup", target_size=64)
    expected = local.generate_actions(**inputs, num_actions=2).tolist()
    assert fresh_process(script, converted, package=False) == expected


# -------------------------------------------------------------------- the report


def test_report(converted: Path, sources: Sources) -> None:
    report = json.loads((converted / REPORT_NAME).read_text())
    weights, vq = sources.weights(), sources.vq_weights()
    assert report["layout"] == "WorldVLA"
    tensors = report["tensors"]
    assert (tensors["read"], tensors["written"], tensors["left_out"]) == (len(weights) + len(vq), len(weights | vq), 0)
    assert (tensors["missing"], tensors["unexpected"], tensors["qk_norms_repeated"]) == ([], [], 3 * 4)
    vocabulary = report["vocabulary"]
    assert vocabulary["image_codes_are_code_plus_4"] is False, "authors_tiny permutes them"
    assert vocabulary["special_ids_are_the_published_ones"] is True
    assert vocabulary["files"] == ["tokenizer.json", "config.json", "text_tokenizer.json"]
    assert report["config"]["changed"] == {"bos_token_id": [1, 0], "eos_token_id": [2, 8710], "pad_token_id": [None, 1]}
    sums = {source["name"]: source["sha256"] for source in report["sources"]}
    assert set(sums) == {"config.json", "model.safetensors", "tokenizer.json", "text_tokenizer.json", "vqgan.yaml", "vqgan.ckpt"}  # fmt: skip  # noqa: E501
    assert sums["vqgan.yaml"] == "1a05ed13c21fb5db354495afcf424c9ce6033433870c3133259e56b0328024f8"
    check = report["self_check"]
    assert check["tensors_bit_equal"] == tensors["written"] and check["prompts_tokenized_equally"] == 3
    assert check["forward"]["logits_finite"] and len(check["forward"]["first_action"]) == 7
    assert 0 < check["reconstruction_psnr_db"] < 60


def test_json_prints_the_report_that_is_written(
    sources: Sources, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(sources.command(tmp_path / "output", "--json", "--world-prompt", "evaluation")) == 0
    captured = capfd.readouterr()
    assert json.loads(captured.out) == json.loads((tmp_path / "output" / REPORT_NAME).read_text())
    assert json.loads(captured.out)["choices"]["world_prompt"] == "evaluation"
    for line in ("world_prompt", WORLD_PROMPTS["evaluation"], "247 tensors bit-equal", "logits finite"):
        assert line in captured.err, "what people read goes to stderr"


# -------------------------------------------------------------------- forms of the same checkpoint


@pytest.mark.parametrize("store", [as_sharded_safetensors, as_bin, as_old_bin, as_sharded_bin])
def test_other_files_give_the_same_weights(sources: Sources, tmp_path: Path, store: Callable[..., None]) -> None:
    expected, weights = expected_weights(sources), sources.weights()
    (sources.model / "model.safetensors").unlink()
    store(sources, weights)
    report = quietly(sources, tmp_path / "output")
    assert_same_weights(tmp_path / "output", expected)
    assert report["self_check"]["forward"] is None and "GB" in report["self_check"]["forward_skipped"]


def test_half_precision_stays_and_the_image_tokenizer_is_float32(sources: Sources, tmp_path: Path) -> None:
    weights = {name: value.to(torch.bfloat16) for name, value in sources.weights().items()}
    sources.save_weights(weights)
    sources.save_vq({"state_dict": {name: value.half() for name, value in sources.vq_weights().items()}})
    report = convert_checkpoint(**sources.arguments(), output=tmp_path / "output")
    expected = expected_weights(sources)
    for name in expected:
        if name.startswith("model.vqmodel."):
            expected[name] = expected[name].float()
    assert_same_weights(tmp_path / "output", expected)
    assert json.loads((tmp_path / "output" / "config.json").read_text())["dtype"] == "bfloat16"
    assert report["tensors"]["language_model_dtypes"] == ["bfloat16"]
    assert report["self_check"]["forward"]["logits_finite"]
    model = WorldVLAForCausalLM.from_pretrained(tmp_path / "output")
    assert model.dtype == torch.bfloat16 and model.model.vqmodel.dtype == torch.float32


def test_output_in_shards(sources: Sources, converted: Path, tmp_path: Path) -> None:
    limit = 1_000_000
    quietly(sources, tmp_path / "output", max_shard_bytes=limit)
    shards = sorted((tmp_path / "output").glob("*.safetensors"))
    assert len(shards) > 3 and shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    largest = max(value.nbytes for value in output_weights(converted).values())
    assert largest > limit, "a tensor that is larger has a shard of its own"
    assert all(sum(value.nbytes for value in load_file(path).values()) <= limit or len(load_file(path)) == 1 for path in shards)  # fmt: skip  # noqa: E501
    index = json.loads((tmp_path / "output" / "model.safetensors.index.json").read_text())
    assert {path.name: sorted(load_file(path)) for path in shards} == {
        path.name: sorted(name for name, shard in index["weight_map"].items() if shard == path.name) for path in shards
    }
    loaded = WorldVLAForCausalLM.from_pretrained(tmp_path / "output").state_dict()
    assert_same_weights(converted, loaded)


def test_norms_of_several_ranks_belong_to_the_heads_of_their_rank(sources: Sources, tmp_path: Path) -> None:
    weights = sources.weights()
    name = "model.layers.1.self_attn.q_norm.weight"
    weights[name] = torch.arange(2.0)[:, None].expand(2, 16).contiguous()
    sources.save_weights(weights)
    quietly(sources, tmp_path / "output")
    assert output_weights(tmp_path / "output")[name][:, 0].tolist() == [0, 0, 1, 1]


def test_training_state_of_the_image_tokenizer_is_left_out(sources: Sources, converted: Path, tmp_path: Path) -> None:
    state = sources.vq_weights()
    state["loss.discriminator.main.0.weight"] = torch.ones(2, 2)
    state["loss.discriminator.main.1.num_batches_tracked"] = torch.tensor(3)
    state["model_ema.decay"] = torch.tensor(0.9)
    sources.save_vq({"state_dict": state, "epoch": 3, "hyper_parameters": {"lr": 1e-4}})
    report = quietly(sources, tmp_path / "output")
    assert_same_weights(tmp_path / "output", output_weights(converted))
    assert (report["tensors"]["left_out"], report["tensors"]["unexpected"]) == (2, ["model_ema.decay"])
    assert any("model_ema.decay" in line for line in report["warnings"])


def test_the_tokenizer_is_what_its_file_says(sources: Sources, tmp_path: Path) -> None:
    """Published tokenizers call themselves Llama tokenizers, as which they would split text differently."""
    change = {"tokenizer_class": "LlamaTokenizerFast"}
    sources.edit_json(sources.tokenizer / "tokenizer_config.json", lambda config: config.update(change))
    (sources.vq / "text_tokenizer.json").unlink()
    report = quietly(sources, tmp_path / "output")
    expected = Tokenizer.from_file(str(sources.tokenizer / "tokenizer.json")).encode(TEXT, add_special_tokens=False).ids
    processor = AutoProcessor.from_pretrained(tmp_path / "output")
    assert processor.tokenizer(TEXT, add_special_tokens=False)["input_ids"] == expected
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "output")
    assert tokenizer(TEXT, add_special_tokens=False)["input_ids"] == expected
    assert report["vocabulary"]["files"] == ["tokenizer.json", "config.json"]


def test_a_configuration_without_a_vocabulary_takes_that_of_the_tokenizer(
    sources: Sources, converted: Path, tmp_path: Path
) -> None:
    sources.edit_json(sources.model / "config.json", lambda config: config.pop("vocabulary_map"))
    quietly(sources, tmp_path / "output")
    config, expected = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "output", converted))
    assert config["vocabulary_map"] == expected["vocabulary_map"]


# -------------------------------------------------------------------- stock Chameleon


@pytest.fixture(params=["float32", "bfloat16"])
def chameleon(request: pytest.FixtureRequest, sources: Sources, tmp_path: Path) -> tuple[Path, Any]:
    """A folder like `facebook/chameleon-7b` (<image> in the vocabulary), and the random model it was saved from."""
    folder = tmp_path / "chameleon"
    vocabulary = json.loads((sources.model / "config.json").read_text())["vocabulary_map"]
    vocabulary["<image>"] = vocabulary.pop("<reserved08707>")
    sizes = {"base_channels": 32, "channel_multiplier": [1] * 5, "embed_dim": 16, "latent_channels": 16}
    config = ChameleonConfig(
        vocab_size=16953,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocabulary_map=vocabulary,
        vq_config={**sizes, "num_res_blocks": 1},
    )
    torch.manual_seed(0)
    model = ChameleonForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2 and parameter.shape[1] == 8:  # q/k norms: a value of its own for every head
            torch.nn.init.normal_(parameter)
    encoder = {name: value for name, value in sources.vq_weights().items() if "decoder" not in name}
    model.model.vqmodel.load_state_dict(encoder)
    model.to(getattr(torch, request.param)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (sources.tokenizer / name).read_text()
        (folder / name).write_text(text.replace("<reserved08707>", "<image>"))
    return folder, ChameleonForConditionalGeneration.from_pretrained(folder).eval()


def test_stock_chameleon(chameleon: tuple[Path, Any], sources: Sources, tmp_path: Path) -> None:
    folder, upstream = chameleon
    report = convert_checkpoint(folder, tmp_path / "output", vq=sources.vq)
    assert report["layout"] == "Chameleon"
    encoder = [name for name in upstream.state_dict() if ".vqmodel." in name]
    assert report["tensors"]["left_out"] == len(encoder)
    assert report["tensors"]["encoder_difference"] <= torch.finfo(upstream.dtype).eps

    model = WorldVLAForCausalLM.from_pretrained(tmp_path / "output").eval()
    processor = WorldVLAProcessor.from_pretrained(tmp_path / "output")
    assert model.dtype == upstream.dtype
    for name, value in sources.vq_weights().items():
        assert torch.equal(model.model.vqmodel.state_dict()[name], value), "float32, from vqgan.ckpt"
    ids = torch.tensor([[0, *processor.tokenizer(TEXT, add_special_tokens=False)["input_ids"], 8710]])
    with torch.no_grad():
        ours, theirs = model(input_ids=ids).logits, upstream(input_ids=ids).logits
    allowed = torch.ones(ours.shape[-1], dtype=torch.bool)
    allowed[list(model.tokens.image_codes)] = False  # upstream forbids them
    assert torch.equal(ours[..., allowed], theirs[..., allowed])


def test_stock_chameleon_needs_its_own_decoder(chameleon: tuple[Path, Any], sources: Sources, tmp_path: Path) -> None:
    folder, _ = chameleon
    with pytest.raises(ValueError, match="no image decoder.*pass --vq"):
        convert_checkpoint(folder, tmp_path / "output")
    state = sources.vq_weights()
    state["encoder.conv_in.weight"] = state["encoder.conv_in.weight"] * 1.05
    sources.save_vq({"state_dict": state})
    with pytest.raises(ValueError, match=r"--vq is not the image tokenizer of --model: encoder.conv_in.weight differs"):
        convert_checkpoint(folder, tmp_path / "output", vq=sources.vq)


# -------------------------------------------------------------------- little memory

_MEASURE = """
import json, sys
from pathlib import Path
from transformers_worldvla import WorldVLAForCausalLM
from transformers_worldvla.convert import convert_checkpoint

def memory(field):
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) * 1024

def peak_of(work):
    before = memory("VmRSS")
    work()
    return memory("VmHWM") - before

root, output = map(Path, sys.argv[1:])
folders = {"model": root / "model", "tokenizer": root / "base_model", "vq": root / "tokenizer"}
options = {"forward_limit": 0, "max_shard_bytes": 10**8}
peaks = [peak_of(lambda: convert_checkpoint(**folders, output=output, **options))]
model = []
peaks.append(peak_of(lambda: model.extend(WorldVLAForCausalLM.from_pretrained(output).double().state_dict().values())))
print(json.dumps(peaks))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures memory as Linux tells it")
@pytest.mark.parametrize("store", [as_sharded_safetensors, as_sharded_bin])
def test_memory_is_that_of_one_tensor(
    sources: Sources, tmp_path: Path, fresh_process: Callable[..., Any], store: Callable[..., None]
) -> None:
    """400 MB of weights in three shards: their peak in memory is a fraction of it."""
    weights = sources.weights()
    wide = 65536
    for name, value in weights.items():
        if ".mlp." in name:
            weights[name] = value.new_zeros([wide if size == 128 else size for size in value.shape])
    for layer in range(3, 8):
        weights |= {name.replace("layers.0.", f"layers.{layer}."): weights[name] for name in list(weights) if "layers.0." in name}  # fmt: skip  # noqa: E501
    sources.edit_json(
        sources.model / "config.json", lambda config: config.update(intermediate_size=wide, num_hidden_layers=8)
    )
    (sources.model / "model.safetensors").unlink()
    store(sources, {name: value.clone() for name, value in weights.items()})
    total = sum(value.nbytes for value in weights.values())
    assert total > 400e6

    converting, loading = fresh_process(_MEASURE, sources.root, tmp_path / "output", package=True)
    assert loading > 1.8 * total, "the measure sees a model in memory"
    shard = total / 3 if store is as_sharded_bin else 0  # one PyTorch file is mapped while it is read
    assert converting < total / 2 + shard


# -------------------------------------------------------------------- the output folder


def test_an_output_that_is_not_empty_is_only_replaced_when_asked(
    sources: Sources, converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "output"
    shutil.copytree(converted, output)
    (output / "stale.txt").write_text("of an earlier conversion")
    assert_refused(sources.command(output), "is not empty.*--overwrite", capsys)
    assert (output / "stale.txt").exists()
    quietly(sources, output, overwrite=True)
    assert not (output / "stale.txt").exists() and (output / "model.safetensors").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["output", "published"]


def test_an_empty_output_folder_is_used(sources: Sources, tmp_path: Path) -> None:
    (tmp_path / "output").mkdir()
    quietly(sources, tmp_path / "output")
    assert (tmp_path / "output" / "model.safetensors").exists()


def test_overwrite_takes_only_checkpoints_away(
    sources: Sources, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    assert_refused(sources.command(tmp_path / "thesis", "--overwrite"), "other than a WorldVLA checkpoint", capsys)
    assert_refused(sources.command(sources.root, "--overwrite"), "holds one of the sources", capsys)
    assert_refused(sources.command(tmp_path / "thesis" / "chapter1.tex"), "is a file", capsys)
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "years of work"


def test_a_conversion_that_fails_late_leaves_nothing(
    sources: Sources, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = sources.weights()
    weights["model.norm.weight"][:] = torch.nan
    sources.save_weights(weights)
    assert_refused(sources.command(tmp_path / "output"), "logits that are not finite", capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["published"]
