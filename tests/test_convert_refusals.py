"""What cannot be converted is refused with one clear line, and nothing is written; pickles are never executed."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_sources import Sources, assert_refused, assert_same_weights, expected_weights, quietly

from transformers_worldvla.cli.main import main


@pytest.fixture
def sources(authors_tiny: Path, tmp_path: Path) -> Sources:
    return Sources(authors_tiny / "checkpoint", tmp_path / "published")


def set_config(**values: Any) -> Callable[[Sources], None]:
    return lambda sources: sources.edit_json(sources.model / "config.json", lambda config: config.update(values))


def remove(folder: str, name: str) -> Callable[[Sources], None]:
    return lambda sources: (getattr(sources, folder) / name).unlink()


def put(folder: str, name: str, content: str | bytes) -> Callable[[Sources], None]:
    return lambda sources: sources.write(getattr(sources, folder) / name, content)


def change_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Sources], None]:
    def apply(sources: Sources) -> None:
        weights = sources.weights()
        change(weights)
        sources.save_weights({name: value.contiguous() for name, value in weights.items()})

    return apply


def change_vocabulary(change: Callable[[dict[str, int]], Any]) -> Callable[[Sources], None]:
    return lambda sources: sources.edit_json(
        sources.model / "config.json", lambda config: change(config["vocabulary_map"])
    )


def index_names(shards: dict[str, str]) -> Callable[[Sources], None]:
    def apply(sources: Sources) -> None:
        (sources.model / "model.safetensors").rename(sources.model / "one.safetensors")
        sources.write(sources.model / "model.safetensors.index.json", json.dumps({"weight_map": shards}))

    return apply


def truncate(folder: str, name: str) -> Callable[[Sources], None]:
    def apply(sources: Sources) -> None:
        path = getattr(sources, folder) / name
        sources.write(path, path.read_bytes()[:-1000])

    return apply


def swap(vocabulary: dict[str, int], first: str, second: str) -> None:
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]


NORM = "model.norm.weight"
REFUSED = {
    "rynnvla": (
        set_config(architectures=["ChameleonXLLMXForConditionalGeneration_ck_action_head"], action_dim=7),
        "RynnVLA-002 checkpoint .*ck_action_head.*cannot be converted",
    ),
    "rynnvla without a name": (set_config(architectures=None, time_horizon=5), "RynnVLA-002"),
    "rynnvla by its weights": (
        change_weights(lambda weights: weights.update({"action_head.proj.weight": torch.ones(2, 2)})),
        "RynnVLA-002 checkpoint .it holds action_head.proj.weight",
    ),
    "another model": (
        set_config(model_type="llama", architectures=["LlamaForCausalLM"]),
        "expected a config.json with model_type 'chameleon'.*found model_type 'llama', architectures: LlamaForCausalLM",
    ),
    "ours": (set_config(model_type="worldvla"), "transformers_worldvla checkpoint already"),
    "no configuration": (remove("model", "config.json"), "has no config.json .*it holds model.safetensors"),
    "configuration that is no JSON": (put("model", "config.json", "{"), "config.json is no JSON file"),
    "configuration that is a list": (put("model", "config.json", "[]"), "holds a list where a JSON object"),
    "configuration with nonsense in it": (set_config(hidden_size="big"), "config.json is damaged: .*hidden_size"),
    "no weights": (
        remove("model", "model.safetensors"),
        "no weights: expected one of model.safetensors, .*; it holds config.json",
    ),
    "weights in Git LFS": (
        put("model", "model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "Git LFS pointer",
    ),
    "truncated weights": (truncate("model", "model.safetensors"), "model.safetensors is damaged or incomplete"),
    "a missing shard": (index_names({NORM: "two.safetensors"}), "has no two.safetensors .a shard that .* names"),
    "an index that is wrong": (
        index_names({NORM: "one.safetensors", "x": "one.safetensors"}),
        "places x in one.safetensors, which does not hold it",
    ),
    "an index that leaves the folder": (index_names({NORM: "../one.safetensors"}), "which is no file name"),
    "an index without a map": (index_names({}), "has no weight_map"),
    "missing tensors": (
        change_weights(lambda weights: weights.pop(NORM)),
        "the checkpoint lacks tensors .1.: model.norm.weight",
    ),
    "unknown tensors": (
        change_weights(lambda weights: weights.update({"model.adapter.weight": torch.ones(2)})),
        "tensors that WorldVLA does not have .1.: model.adapter.weight",
    ),
    "another size": (set_config(intermediate_size=96), "another shape .*gate_proj.weight .128, 64. for .96, 64."),
    "quantized weights": (
        change_weights(lambda weights: weights.update({NORM: weights[NORM].to(torch.int8)})),
        "quantized weights, such as model.norm.weight",
    ),
    "no image tokenizer": (remove("vq", "vqgan.ckpt"), "has no vqgan.ckpt .*it holds text_tokenizer.json, vqgan.yaml"),
    "no sizes of the image tokenizer": (remove("vq", "vqgan.yaml"), "has no vqgan.yaml"),
    "sizes without sizes": (put("vq", "vqgan.yaml", "model: {params: {n_embed: 8192}}"), "not found: 'ddconfig'"),
    "sizes with code in them": (
        put("vq", "vqgan.yaml", "model: !!python/object/apply:os.getcwd []"),
        "vqgan.yaml is no plain YAML file",
    ),
    "another image tokenizer": (
        put("vq", "vqgan.yaml", "model: {params: {n_embed: 8192, embed_dim: 16, ddconfig: {ch: 64, ch_mult: [1, 1, 1, 1, 1], num_res_blocks: 1, z_channels: 16, in_channels: 3, out_ch: 3}}}"),  # noqa: E501
        "another shape .*model.vqmodel.encoder.conv_in.weight",
    ),
    "another codebook": (
        put("vq", "vqgan.yaml", "model: {params: {n_embed: 1024, embed_dim: 16, ddconfig: {ch: 32, out_ch: 3, in_channels: 3}}}"),  # noqa: E501
        "8192 image codes, the image tokenizer of --vq has 1024",
    ),
    "truncated image tokenizer": (truncate("vq", "vqgan.ckpt"), "vqgan.ckpt is damaged or no PyTorch file"),
    "image tokenizer that is text": (put("vq", "vqgan.ckpt", "hello, no weights"), "damaged or no PyTorch file"),
    "names of another tokenizer": (
        lambda sources: sources.edit_json(
            sources.vq / "text_tokenizer.json",
            lambda value: swap(value["model"]["vocab"], "<reserved08706>", "<reserved08800>"),
        ),
        "tokenizer.json and text_tokenizer.json do not belong together: 2 tokens have different ids",
    ),
    "names without a vocabulary": (put("vq", "text_tokenizer.json", "{}"), "expected the vocabulary under model.vocab"),
    "no tokenizer": (remove("tokenizer", "tokenizer.json"), "has no tokenizer.json .*base_model"),
    "damaged tokenizer": (truncate("tokenizer", "tokenizer.json"), "tokenizer.json is no JSON file"),
    "another vocabulary": (
        change_vocabulary(lambda vocabulary: swap(vocabulary, "IMGIMGAZ", "IMGIMGBZ")),
        "tokenizer.json and config.json do not belong together: 2 tokens have different ids, for example 'IMGIMG",
    ),
    "a vocabulary without actions": (
        change_vocabulary(lambda vocabulary: [vocabulary.pop(f"<reserved{number}>") for number in range(10000, 10100)]),
        "config.json: not a WorldVLA vocabulary: 100 names are missing, among them <reserved10000>",
    ),
    "a vocabulary that is too large": (
        set_config(vocab_size=16900),
        "tokenizer.json: 53 tokens lie outside the model's 16900 embeddings",
    ),
}  # fmt: skip


@pytest.mark.parametrize("change, message", REFUSED.values(), ids=REFUSED)
def test_refused_in_one_line(
    sources: Sources, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable, message: str
) -> None:
    change(sources)
    assert_refused(sources.command(tmp_path / "output"), message, capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["published"], "nothing is written"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "{missing}"], "model folder .*missing does not exist: download"),
        (["--tokenizer", "{missing}"], "tokenizer folder .* does not exist"),
        (["--vq", "{missing}"], "vq folder .* does not exist"),
        (["--embodiment", "aloha"], "unknown embodiment 'aloha': known are libero"),
        (["--target-size", "250"], "target_size is a positive multiple of 32"),
        (["--num-actions", "0"], "num_actions is an integer >= 1"),
        (["--history", "0"], "history is an integer >= 1"),
    ],
)
def test_bad_arguments(
    sources: Sources, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    more = [argument.format(missing=tmp_path / "missing") for argument in arguments]
    assert_refused(sources.command(tmp_path / "output", *more), message, capsys)


def test_a_model_folder_alone_is_not_enough(
    sources: Sources, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["convert", "--model", str(sources.model), "--output", str(tmp_path / "output")]
    assert_refused([*command, "--tokenizer", str(sources.tokenizer)], "no image tokenizer: pass --vq FOLDER", capsys)
    assert_refused([*command, "--vq", str(sources.vq)], "has no tokenizer.json", capsys)


# -------------------------------------------------------------------- pickles


class Trap:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("place", ["vq", "model"])
def test_nothing_in_a_pickle_is_executed(
    sources: Sources, tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str, is_zip: bool
) -> None:
    trap = Trap(tmp_path / "trapped")
    value = (
        {"state_dict": sources.vq_weights(), "callbacks": trap} if place == "vq" else sources.weights() | {"x": trap}
    )
    path = sources.vq / "vqgan.ckpt" if place == "vq" else sources.model / "pytorch_model.bin"
    path.unlink(missing_ok=True)
    torch.save(value, path, _use_new_zipfile_serialization=is_zip)
    if place == "model":
        (sources.model / "model.safetensors").unlink()
    assert_refused(sources.command(tmp_path / "output"), f"{path.name} holds more than tensors .posix.system", capsys)
    assert not trap.path.exists()
    torch.load(path, weights_only=False)
    assert trap.path.exists(), "the trap works where one walks into it"


def test_a_bare_pickle_is_not_executed(sources: Sources, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources.write(sources.vq / "vqgan.ckpt", pickle.dumps(Trap(tmp_path / "trapped"), protocol=2))
    assert_refused(
        sources.command(tmp_path / "output"), "vqgan.ckpt is damaged or no PyTorch file|posix.system", capsys
    )
    assert not (tmp_path / "trapped").exists()


def test_what_the_refusal_advises_works(
    sources: Sources,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Checkpoints of training frameworks hold their own objects beside the weights."""
    expected = expected_weights(sources)
    sources.save_vq({"state_dict": sources.vq_weights(), "callbacks": {"path": Path("elsewhere")}})
    capsys.readouterr()
    assert main(sources.command(tmp_path / "output")) == 2
    advice = capsys.readouterr().err.rpartition('python -c "')[2].rstrip().rstrip('"')
    monkeypatch.chdir(sources.vq)
    exec(advice, {})
    quietly(sources, tmp_path / "output")
    assert_same_weights(tmp_path / "output", expected)
