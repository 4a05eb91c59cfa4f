"""How much memory a training run will need, from sizes alone: nothing is loaded, nothing is run.

The terms are those of mixed-precision AdamW without sharding; activations are counted tensor by tensor for
Chameleon's decoder layer. What an allocator wastes and what CUDA itself takes (about 1 GiB) comes on top.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from ..configuration_worldvla import WorldVLAConfig
from ..modeling_worldvla import WorldVLAForCausalLM
from .adapters import trainable_tokens
from .recipes import QUANTIZED, Recipe

GIB = 2**30
FLOAT32 = 4
ADAM_STATES = 2  # of float32 a trained weight
FOUR_BIT_BYTES = 0.516  # a weight in NF4 with double quantisation: half a byte and its share of the scales
# a decoder layer keeps for its backward pass so many tensors of a token's hidden size, and of its MLP's inner size
HIDDEN_TENSORS, INNER_TENSORS = 14, 4


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the peak of a training step on one device without sharding."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        return sum(getattr(self, each.name) for each in fields(self))

    def to_dict(self) -> dict[str, int]:
        """Bytes by name, with the total."""
        return {each.name: round(getattr(self, each.name)) for each in fields(self)} | {"total": round(self.total)}

    def __str__(self) -> str:
        return ", ".join(f"{name} {size_text(value)}" for name, value in self.to_dict().items())


def size_text(size: float) -> str:
    """Bytes for people."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of weights."""

    linears: int  # the seven linears of every layer, which 4 bits shrink
    others: int  # embedding, head and norms
    image_tokenizer: int
    trained: int
    adapter: int


def count_parameters(
    config: WorldVLAConfig, recipe: Recipe, lora_rank: int = 32, lora_tokens: Sequence[str] = ("action",)
) -> ParameterCounts:
    """Weights of a model of this configuration and of those a recipe trains."""
    with torch.device("meta"):
        model = WorldVLAForCausalLM(config)
    linears = [
        (parameter.shape[0], parameter.shape[1])
        for name, parameter in model.model.layers.named_parameters()
        if parameter.ndim == 2 and "norm" not in name
    ]
    image_tokenizer = sum(parameter.numel() for parameter in model.model.vqmodel.parameters())
    everything = sum(parameter.numel() for parameter in model.parameters()) - image_tokenizer
    in_linears = sum(rows * columns for rows, columns in linears)
    adapter = 0
    if recipe.adapter:
        tokens = len(trainable_tokens(model, lora_tokens)) * (1 if config.tie_word_embeddings else 2)
        adapter = sum(lora_rank * (rows + columns) for rows, columns in linears) + tokens * config.hidden_size
    return ParameterCounts(
        linears=in_linears,
        others=everything - in_linears,
        image_tokenizer=image_tokenizer,
        trained=adapter or everything,
        adapter=adapter,
    )


def estimate_memory(
    config: WorldVLAConfig,
    recipe: Recipe,
    batch_size: int,
    length: int,
    labelled: int,
    bf16: bool = True,
    checkpointing: bool | None = None,
    lora_rank: int = 32,
    lora_tokens: Sequence[str] = ("action",),
) -> MemoryEstimate:
    """Peak memory of a step.

    Args:
        batch_size: samples of a micro-batch on one device.
        length: tokens of a padded row.
        labelled: labelled tokens of a row, which alone get logits.
        bf16: the computation is in bfloat16; weights that are trained are in float32 either way.
        checkpointing: gradient checkpointing; the recipe's by default.
    """
    counts, width = count_parameters(config, recipe, lora_rank, lora_tokens), 2 if bf16 else FLOAT32
    if checkpointing is None:
        checkpointing = bool(recipe.arguments.get("gradient_checkpointing"))
    decoder = counts.linears + counts.others
    if recipe.adapter == QUANTIZED:
        weights = counts.linears * FOUR_BIT_BYTES + counts.others * width
    elif recipe.adapter:
        weights = decoder * width
    else:
        # autocast keeps a copy of the weights that it computed with until the backward pass is over
        weights = decoder * (FLOAT32 + (width if bf16 else 0))
    weights += counts.image_tokenizer * FLOAT32 + counts.adapter * FLOAT32

    tokens, hidden = batch_size * length, config.hidden_size
    layer = tokens * (HIDDEN_TENSORS * hidden + INNER_TENSORS * config.intermediate_size) * width
    if recipe.adapter:  # what each low-rank product keeps: its input in float32, where the base is not, and its waist
        layer += tokens * 7 * lora_rank * FLOAT32
        layer += tokens * (3 * hidden + config.intermediate_size) * FLOAT32 if bf16 else 0
    kept = tokens * hidden * width
    layers = config.num_hidden_layers
    activations = layers * kept + layer if checkpointing else layers * layer
    activations += batch_size * length**2  # the mask, a byte each

    rows = min(batch_size * labelled, config.loss_chunk_size)
    logits = rows * config.vocab_size * 2 * (width + FLOAT32)  # logits and their gradient, each in float32 too
    if recipe.adapter and not config.tie_word_embeddings:  # the head with its trained rows in place, and its gradient
        logits += 2 * config.vocab_size * hidden * width
    return MemoryEstimate(
        weights=weights,
        gradients=counts.trained * FLOAT32,
        optimizer=counts.trained * FLOAT32 * ADAM_STATES,
        activations=activations,
        logits=logits,
    )
