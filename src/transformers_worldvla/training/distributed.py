"""How the model is cut for fully sharded training (FSDP2), in a loop of one's own or by accelerate for the Trainer.

Each decoder layer is a unit; the image tokenizer stays whole on every rank, for it is frozen, runs in float32, and
turns pictures into tokens outside of the model's forward. `examples/distributed/fsdp2.yaml` says the same to
accelerate, which shards the model for `WorldVLATrainer`.
"""

from typing import Any

import torch
from torch import nn

from ..modeling_worldvla import WorldVLAForCausalLM
from .adapters import base_model

# class names of decoder layers, for `fsdp_transformer_layer_cls_to_wrap`; a model has one of them
DECODER_LAYERS = ("WorldVLADecoderLayer", "ChameleonSwinDecoderLayer")
WHOLE_MODULES = r".*vqmodel"  # regular expression for `fsdp_ignored_modules`


def fully_shard_model(
    model: Any,
    mesh: Any = None,
    param_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = torch.float32,
    reshard_after_forward: bool = True,
) -> Any:
    """Shard a model in place with FSDP2 (`torch.distributed.fsdp.fully_shard`); returns it.

    Args:
        model: a `WorldVLAForCausalLM`, or a PEFT model around one, with the same weights on every rank.
        mesh: a 1-D device mesh (2-D: replicated over the first dimension); all ranks by default.
        param_dtype: of the computation, such as `torch.bfloat16`; the parameters' own by default.
        reduce_dtype: in which gradients are summed over ranks; float32, as the authors.
        reshard_after_forward: free a layer's weights after its forward and gather them again for its backward.

    Give the forward the loss's denominators over all ranks, and multiply its loss by their number: FSDP averages
    gradients.
    """
    from torch.distributed.fsdp import fully_shard

    inner: WorldVLAForCausalLM = base_model(model)
    image_tokenizer: nn.Module = inner.model.vqmodel
    image_tokenizer.requires_grad_(False)
    options = {"mesh": mesh, "ignored_params": set(image_tokenizer.parameters())}
    options["mp_policy"] = exact_policy(param_dtype, reduce_dtype)
    for layer in inner.model.layers:
        fully_shard(layer, reshard_after_forward=reshard_after_forward, **options)
    fully_shard(model, **options)
    return model


def exact_policy(param_dtype: torch.dtype | None, reduce_dtype: torch.dtype | None = torch.float32) -> Any:
    """FSDP2's mixed precision without a cast of inputs and outputs.

    The first layer's input is an embedding, of `param_dtype` already. What else goes in are weights and sums of the
    loss, and what comes out is the loss: in bfloat16 a sum over a batch is off by up to 0.4 %.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)


def adapt_fsdp_plugin(plugin: Any, model: Any) -> None:
    """Complete accelerate's FSDP plugin by what this module says, before the model is prepared.

    Without it the classes to wrap would be all of `_no_split_modules`, of which a model never has all, the image
    tokenizer would be sharded, and inputs, outputs and the sum of gradients would be in half precision. What a config
    names itself stays.
    """
    if plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = [type(base_model(model).model.layers[0]).__name__]
    if plugin.ignored_modules is None:
        plugin.ignored_modules = WHOLE_MODULES
    policy = plugin.mixed_precision_policy
    if plugin.fsdp_version == 2 and policy is not None and policy.param_dtype is not None:
        plugin.mixed_precision_policy = exact_policy(policy.param_dtype)
