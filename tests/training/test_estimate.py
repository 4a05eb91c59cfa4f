"""The memory estimate against what a step really holds, on shapes a CPU can run."""

from typing import Any

import pytest
import torch
from live_memory import LiveMemory
from model_factory import Writer, labels_of, tiny_config

from transformers_worldvla import WorldVLAForCausalLM
from transformers_worldvla.training import RECIPES, add_lora, estimate_memory
from transformers_worldvla.training.estimate import count_parameters


def measure(model: Any, batch: dict[str, torch.Tensor]) -> int:
    """Peak bytes of a step with AdamW states in place, weights and states included."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], foreach=False)
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    memory = LiveMemory()
    memory.mark([list(model.parameters()), [list(state.values()) for state in optimizer.state.values()]])
    with memory:
        model(**batch).loss.backward()
        optimizer.step()
    return memory.peak


def shape(hidden: int, layers: int, inner: int) -> Any:
    return tiny_config(
        num_codes=512, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=8, initializer_range=0.02, dropout=0.05,
    )  # fmt: skip


@pytest.mark.parametrize("recipe", ["full", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("hidden", "layers", "inner", "batch"), [(256, 4, 688, 2), pytest.param(384, 3, 1024, 1, marks=pytest.mark.slow)]
)
def test_estimates_what_a_step_holds(
    recipe: str, checkpointing: bool, hidden: int, layers: int, inner: int, batch: int
) -> None:
    config = shape(hidden, layers, inner)
    model: Any = WorldVLAForCausalLM(config)
    if RECIPES[recipe].adapter:
        model = add_lora(model)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    writer = Writer(config.vocabulary_map)
    rows = [writer.action_sample(actions=10, images=2, grid=(4, 4)) for _ in range(batch)]
    ids, labels = torch.tensor([row[0] for row in rows]), torch.tensor([labels_of(*row) for row in rows])
    measured = measure(model, {"input_ids": ids, "labels": labels})
    labelled = int((labels[0] != -100).sum())
    estimate = estimate_memory(config, RECIPES[recipe], batch, ids.shape[1], labelled, False, checkpointing)
    # never much too little; too much where gradients come to be only when activations go, as without accumulation
    assert 0.95 < estimate.total / measured < 1.3, (estimate, measured)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kinds", [["action"], ["action", "image"]])
def test_counts_the_weights_of_a_real_model(tied: bool, kinds: list[str]) -> None:
    config = tiny_config(tie_word_embeddings=tied)
    model = WorldVLAForCausalLM(config)
    decoder = sum(p.numel() for name, p in model.named_parameters() if "vqmodel" not in name)
    full = count_parameters(config, RECIPES["full"])
    assert full.linears + full.others == full.trained == decoder
    adapted = add_lora(model, rank=3, token_kinds=kinds)
    lora = count_parameters(config, RECIPES["lora"], lora_rank=3, lora_tokens=kinds)
    assert lora.trained == lora.adapter == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def test_an_adapter_needs_less_than_everything() -> None:
    config = shape(256, 4, 688)
    sizes = {name: estimate_memory(config, RECIPES[name], 2, 300, 91, True, True) for name in ("full", "lora", "qlora")}
    assert sizes["qlora"].weights < sizes["lora"].weights < sizes["full"].weights
    assert sizes["lora"].optimizer < 0.5 * sizes["full"].optimizer
