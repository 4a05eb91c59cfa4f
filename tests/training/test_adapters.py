"""Adapters: what they train, folders that open by themselves in a fresh process, and the verified merge."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_checkpoint import GANTRY, small_model, small_processor, write_checkpoint
from training_samples import random_samples

from transformers_worldvla import WorldVLAForCausalLM, WorldVLAProcessor, WorldVLATrainer
from transformers_worldvla.training import add_lora, merge_adapter
from transformers_worldvla.training.adapters import fingerprint, open_adapter

_OPEN = """
import json, sys
import numpy as np, torch
from transformers import AutoModelForCausalLM, AutoProcessor
folder, output = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
inputs = processor(images=[np.zeros((64, 64, 3), np.uint8)], instruction="lift")
logits = model(**inputs).logits
np.save(output, logits.detach().numpy())
tokens = model.generate_actions(**inputs, num_actions=2)
print(json.dumps({"actions": processor.decode_actions(tokens).shape, "module": type(model).__module__}))
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A checkpoint of LIBERO's arm (D=7)."""
    return write_checkpoint(tmp_path / "base")


@pytest.fixture
def trained(base: Path, make_trainer: Callable[..., WorldVLATrainer], tmp_path: Path) -> tuple[Path, Any]:
    """An adapter of it for a gantry (D=3), in a folder, and the model that was trained."""
    processor = small_processor(GANTRY)
    model = add_lora(WorldVLAForCausalLM.from_pretrained(base), rank=4)
    trainer = make_trainer(processor, random_samples(processor, GANTRY), model, learning_rate=3e-2, max_steps=3)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    return tmp_path / "adapter", model.eval()


def logits_of(model: Any, processor: Any) -> torch.Tensor:
    inputs = processor(images=[np.zeros((64, 64, 3), np.uint8)], instruction="lift")
    with torch.no_grad():
        return model(**inputs).logits


def test_trains_low_rank_matrices_and_rows_of_action_tokens_only(processor: Any) -> None:
    model = small_model(processor)
    adapted = add_lora(model, rank=4)
    trained = {name: p.shape for name, p in adapted.named_parameters() if p.requires_grad}
    linears = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in trained if "lora_" in name}
    assert linears == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    rows = {name: shape for name, shape in trained.items() if "lora_" not in name}
    assert [shape for shape in rows.values()] == [(258, 32), (258, 32)], "256 bins, start and end; embedding and head"
    assert sum("lora_" in name for name in trained) == 2 * 7 * 2
    assert not any("vqmodel" in name for name in trained)


def test_a_head_that_never_drew_also_learns_to(processor: Any) -> None:
    model = small_model(processor)
    tokens = model.tokens
    model.lm_head.weight.data[list(tokens.image_codes)] = 0.0  # as the authors' starting point
    rows = [p for name, p in add_lora(model, rank=4).named_parameters() if "trainable_tokens_delta" in name]
    assert len(rows[0]) == 258 + len(tokens.image_codes) + len(tokens.grids) + 3


def test_learns_the_codes_of_another_image_tokenizer_where_asked(processor: Any) -> None:
    model = small_model(processor)
    tokens = model.tokens
    adapted = add_lora(model, rank=4, token_kinds=["action", "image"])
    rows = [p for name, p in adapted.named_parameters() if "trainable_tokens_delta" in name]
    assert [len(each) for each in rows] == [258 + len(tokens.image_codes) + len(tokens.grids) + 3] * 2
    with pytest.raises(ValueError, match="kinds of trainable tokens are action, image, not 'text'"):
        add_lora(small_model(processor), token_kinds=["text"])


def test_opens_in_a_process_without_this_package(
    trained: tuple[Path, Any], fresh_process: Callable[..., Any], tmp_path: Path
) -> None:
    folder, model = trained
    said = fresh_process(_OPEN, folder, tmp_path / "logits.npy", package=False)
    assert said["actions"] == [1, 2, 3], "the new robot's D, which the base does not have"
    assert said["module"].startswith("transformers_modules")
    wanted = logits_of(model, WorldVLAProcessor.from_pretrained(folder)).numpy()
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), wanted, atol=1e-5)


def test_merges_into_a_checkpoint_with_the_same_logits(trained: tuple[Path, Any], tmp_path: Path) -> None:
    folder, model = trained
    report = merge_adapter(folder, tmp_path / "merged")
    merged = WorldVLAForCausalLM.from_pretrained(tmp_path / "merged").eval()
    processor = WorldVLAProcessor.from_pretrained(tmp_path / "merged")
    wanted = logits_of(model, processor)
    torch.testing.assert_close(logits_of(merged, processor), wanted, atol=1e-4, rtol=1e-4)
    assert merged.config.action_dim == 3 and processor.get_embodiment().name == "gantry"
    assert report["merge_difference"] < 1e-4 and report["saved_difference"] == 0.0
    base = WorldVLAForCausalLM.from_pretrained(report["base"]).eval()
    assert (logits_of(base, processor) - wanted).abs().max() > 0.1, "the adapter had learnt something"


def test_merges_in_float32_and_rounds_at_the_end(trained: tuple[Path, Any], tmp_path: Path) -> None:
    folder, model = trained
    report = merge_adapter(folder, tmp_path / "merged", dtype=torch.bfloat16)
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    exact = layer.base_layer.weight + layer.get_delta_weight("default")
    torch.testing.assert_close(weights["model.layers.0.self_attn.q_proj.weight"], exact.to(torch.bfloat16))
    assert weights["model.vqmodel.quant_conv.weight"].dtype == torch.float32
    assert report["dtype"] == "bfloat16" and report["saved_difference"] == 0.0


def test_refuses_another_base(trained: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = trained
    other = small_processor()
    small_model(other, seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="is not the base that .* was trained on"):
        merge_adapter(folder, tmp_path / "merged", base=str(tmp_path / "other"))
    assert not (tmp_path / "merged").exists()


def test_refuses_its_base_with_another_codebook(base: Path, trained: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = trained
    model = WorldVLAForCausalLM.from_pretrained(base)
    model.model.vqmodel.quantize.embedding.weight.data *= 1.1
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="is not the base that .* was trained on"):
        open_adapter(folder, str(tmp_path / "other"))


def test_leaves_nothing_of_a_merge_that_fails(trained: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = trained
    weights = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in weights if "lora_B" in name)
    weights[name].fill_(float("nan"))
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="NaNs detected"):
        merge_adapter(folder, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_refuses_what_is_no_adapter_and_outputs_that_are_not_empty(
    base: Path, trained: tuple[Path, Any], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="holds no adapter"):
        open_adapter(base)
    with pytest.raises(ValueError, match="is not empty"):
        merge_adapter(trained[0], base)


def test_fingerprint_is_of_the_base_alone(processor: Any) -> None:
    model = small_model(processor)
    before = fingerprint(model)
    adapted = add_lora(model, rank=2)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 1.0
    assert fingerprint(model) == before
    assert fingerprint(small_model(processor).to(torch.bfloat16)) == before, "whatever the precision it runs in"
    assert fingerprint(small_model(processor, seed=1)) != before


def test_the_folder_names_its_base(trained: tuple[Path, Any], base: Path) -> None:
    folder, _ = trained
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    assert not (folder / "config.json").exists(), "transformers would take it for a whole model"
    facts = json.loads((folder / "worldvla_adapter.json").read_text())
    assert facts["model_fields"] == {"action_dim": 3, "num_cameras": 1}
