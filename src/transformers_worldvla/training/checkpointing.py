"""Gradient checkpointing that computes again only what is cheap.

Full checkpointing keeps a layer's input and runs the whole layer again: least memory, a third more time. Here the
results of matrix products and of attention are kept as well, and only what lies between them (norms, rotary embedding,
activations, dropout) is computed again.
"""

import functools
from typing import Any

import torch

_ATEN = torch.ops.aten
_KEPT = [
    _ATEN.mm.default,
    _ATEN.addmm.default,
    _ATEN.bmm.default,
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    _ATEN._scaled_dot_product_efficient_attention.default,
    _ATEN._scaled_dot_product_cudnn_attention.default,
]


def selective_checkpointing() -> dict[str, Any]:
    """Arguments of `model.gradient_checkpointing_enable`: keep products and attention, compute the rest again."""
    from torch.utils.checkpoint import create_selective_checkpoint_contexts

    return {
        "use_reentrant": False,
        "context_fn": functools.partial(create_selective_checkpoint_contexts, _KEPT),
    }
