"""The decoder as plain functions over fused weights, compiled a layer at a time and replayed as CUDA graphs.

`model.enable_engine()` puts it behind `generate_actions`, `generate_frames` and `imagine`; without it, and on a CPU
without compilation, every forward runs the model's modules. The numbers are those of the modules up to the rounding of
another order of additions. In the style of gpt-fast (github.com/meta-pytorch/gpt-fast): no classes in the hot path.

- Fused weights: q, k, v and gate, up become row blocks of one matrix each. The parameters stay, as views of it: no
  second copy, the same `state_dict`, training goes on.
- Compilation is regional: what a layer does before and after attention, so all layers share two compiled functions.
- CUDA graphs: the whole answer of a chunk (prefill, all steps, arg max) is one graph for each prompt-length bucket; the
  host waits for it once, when it reads the answer.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from .cache_worldvla import KeyValueStore

BUCKET = 32  # prompt lengths and cache capacities are rounded up to a multiple of it
MAX_GRAPHS, MAX_STORES = 32, 2


class LayerWeights(NamedTuple):
    """What one decoder layer multiplies with; a fused matrix is one entry of its tuple."""

    input_norm: torch.Tensor  # (hidden,)
    qkv: tuple[torch.Tensor, ...]  # rows: q, k, v
    q_norm: tuple[torch.Tensor, torch.Tensor]  # weight and bias (heads, head_dim)
    k_norm: tuple[torch.Tensor, torch.Tensor]  # (key heads, head_dim)
    out: torch.Tensor  # (hidden, hidden)
    post_norm: torch.Tensor  # (hidden,)
    gate_up: tuple[torch.Tensor, ...]  # rows: gate, up
    down: torch.Tensor  # (hidden, intermediate)


@dataclass(frozen=True)
class EngineOptions:
    """compile: `torch.compile` the two functions of a layer; cuda_graphs: None takes them where there is a CUDA device;
    fuse: join q, k, v and gate, up; mode: of `torch.compile`, e.g. "max-autotune-no-cudagraphs"."""

    compile: bool = True
    cuda_graphs: bool | None = None
    fuse: bool = True
    mode: str | None = None


# ------------------------------------------------------------------------------------------------ one layer


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As `ChameleonRMSNorm`: normalised in float32, scaled in the model's precision."""
    wide = hidden.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(hidden.dtype)


def head_norm(heads: torch.Tensor, weight_bias: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """As `ChameleonLayerNorm`: statistics of each head, an affine map of its own for every head."""
    return F.layer_norm(heads, heads.shape[-1:], eps=1e-5) * weight_bias[0] + weight_bias[1]


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of (batch, heads, q, head_dim)."""
    left, right = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat((-right, left), dim=-1) * sin


def project(
    weights: LayerWeights, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states (batch, q, hidden) -> query, key and value (batch, heads, q, head_dim)."""
    batch, length, _ = hidden.shape
    normed = rms_norm(hidden, weights.input_norm, eps)
    (heads, head_dim), key_heads = weights.q_norm[0].shape, weights.k_norm[0].shape[0]
    joined = torch.cat([F.linear(normed, rows) for rows in weights.qkv], dim=-1) if len(weights.qkv) > 1 else None
    joined = F.linear(normed, weights.qkv[0]) if joined is None else joined
    parts = joined.view(batch, length, heads + 2 * key_heads, head_dim)
    query, key, value = parts.split([heads, key_heads, key_heads], dim=2)
    query = head_norm(query, weights.q_norm).transpose(1, 2)
    key = head_norm(key, weights.k_norm).transpose(1, 2)
    return rotate(query, cos, sin), rotate(key, cos, sin), value.transpose(1, 2)


def complete(weights: LayerWeights, hidden: torch.Tensor, attended: torch.Tensor, eps: float) -> torch.Tensor:
    """Hidden states (batch, q, hidden) and attended values (batch, heads, q, head_dim) -> the layer's output."""
    batch, length, width = hidden.shape
    hidden = hidden + F.linear(attended.transpose(1, 2).reshape(batch, length, width), weights.out)
    normed = rms_norm(hidden, weights.post_norm, eps)
    if len(weights.gate_up) == 1:
        gate, up = F.linear(normed, weights.gate_up[0]).chunk(2, dim=-1)
    else:
        gate, up = (F.linear(normed, rows) for rows in weights.gate_up)
    return hidden + F.linear(F.silu(gate) * up, weights.down)


# ------------------------------------------------------------------------------------------------ weights


def fuse_rows(linears: list[nn.Linear]) -> torch.Tensor:
    """One matrix that holds the rows of several layers; their weights become views of it."""
    weights = [linear.weight.data for linear in linears]
    first, row = weights[0], 0
    for weight in weights:  # already views of one matrix?
        if weight.data_ptr() != first.data_ptr() + row * first.stride(0) * first.element_size():
            break
        row += len(weight)
    else:
        if first.untyped_storage().nbytes() == row * first.shape[1] * first.element_size():
            return first.as_strided((row, first.shape[1]), first.stride())
    fused = torch.cat(weights)
    for linear, part in zip(linears, fused.split([len(weight) for weight in weights]), strict=True):
        linear.weight.data = part
    return fused


def layer_weights(layer: nn.Module, fuse: bool) -> LayerWeights:
    """The weights of one `WorldVLADecoderLayer`. Raises ValueError on a layer that was altered (an adapter)."""
    attention, mlp = layer.self_attn, layer.mlp
    qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
    gate_up = [mlp.gate_proj, mlp.up_proj]
    linears = [*qkv, attention.o_proj, *gate_up, mlp.down_proj]
    for linear in linears:
        if type(linear) is not nn.Linear:
            raise ValueError(
                f"the engine needs plain linear layers, not {type(linear).__name__}: merge adapters first "
                "(merge_and_unload), or call disable_engine()"
            )
        if linear.bias is not None:
            raise ValueError("the engine knows no biases of linear layers: call disable_engine()")
    fuse = fuse and all(type(linear.weight.data) is torch.Tensor for linear in linears)  # quantised rows stay apart

    def rows(parts: list[nn.Linear]) -> tuple[torch.Tensor, ...]:
        return (fuse_rows(parts),) if fuse else tuple(part.weight.data for part in parts)

    return LayerWeights(
        input_norm=layer.input_layernorm.weight.data,
        qkv=rows(qkv),
        q_norm=(attention.q_norm.weight.data, attention.q_norm.bias.data),
        k_norm=(attention.k_norm.weight.data, attention.k_norm.bias.data),
        out=attention.o_proj.weight.data,
        post_norm=layer.post_attention_layernorm.weight.data,
        gate_up=rows(gate_up),
        down=mlp.down_proj.weight.data,
    )


def addresses_of(model: Any) -> tuple[int, ...]:
    """Where the weights are; it changes with `.to`, a copy, another file. A quantised weight has no address."""
    weights = [layer.self_attn.q_proj.weight for layer in model.model.layers]
    weights += [model.model.embed_tokens.weight, model.lm_head.weight]
    return tuple(weight.data_ptr() or id(weight) for weight in weights)


# ------------------------------------------------------------------------------------------------ the engine


class Engine:
    """Runs a model's decoder. It holds views of the weights and follows them when they move (`.to`, a loaded file)."""

    def __init__(self, options: EngineOptions):
        self.options = options
        self.layers: list[LayerWeights] = []
        self.addresses: tuple[int, ...] = ()
        self.graphs: OrderedDict[Any, GraphedFunction] = OrderedDict()
        self.stores: OrderedDict[tuple[int, int], KeyValueStore] = OrderedDict()
        # prompts come in many lengths, steps in few
        self.step = self._functions(dynamic=False)
        self.sequence = self._functions(dynamic=True)

    def __reduce__(self) -> tuple[type["Engine"], tuple[EngineOptions]]:
        """A copy of a model gets an engine of its own."""
        return Engine, (self.options,)

    def _functions(self, dynamic: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
        if not self.options.compile:
            return project, complete
        keywords: dict[str, Any] = {"dynamic": dynamic, "mode": self.options.mode}
        return torch.compile(project, **keywords), torch.compile(complete, **keywords)

    def attach(self, model: Any) -> "Engine":
        """Take the weights of a model, again where they have moved. Raises ValueError where they cannot be used."""
        self.decoder = model.model
        if self.layers and addresses_of(model) == self.addresses:
            return self
        if model.config.swin_norm or model.config.hidden_act != "silu":
            raise ValueError(
                "the engine runs pre-norm layers with silu only, as WorldVLA's checkpoints have: call disable_engine()"
            )
        if len(devices := {parameter.device for parameter in self.decoder.layers.parameters()}) > 1:
            raise ValueError(f"the engine needs all layers on one device, not on {len(devices)}: call disable_engine()")
        with torch.inference_mode(False), torch.no_grad():
            self.layers = [layer_weights(layer, self.options.fuse) for layer in self.decoder.layers]
        self.graphs.clear()
        self.addresses = addresses_of(model)  # fusing has moved them
        self.eps = model.config.rms_norm_eps
        return self

    @property
    def uses_graphs(self) -> bool:
        on_cuda = self.decoder.device.type == "cuda"
        return on_cuda if self.options.cuda_graphs is None else self.options.cuda_graphs and on_cuda

    @staticmethod
    def rounded(length: int) -> int:
        """The next multiple of `BUCKET`."""
        return -(-length // BUCKET) * BUCKET

    def store(self, batch: int, capacity: int) -> KeyValueStore:
        """An empty static store; with graphs the one of the same size again, because graphs hold its addresses."""
        if not self.uses_graphs:
            return KeyValueStore(len(self.layers), capacity, static=True)
        key = (batch, capacity)
        if key not in self.stores:
            self.stores[key] = KeyValueStore(len(self.layers), capacity, static=True)
            if len(self.stores) > MAX_STORES:
                self.stores.popitem(last=False)
                self.graphs.clear()
        self.stores.move_to_end(key)
        self.stores[key].filled = 0
        return self.stores[key]

    def step_forward(
        self, ids: torch.LongTensor, positions: torch.LongTensor, visible: torch.BoolTensor, store: KeyValueStore
    ) -> torch.Tensor:
        """`forward` of a few tokens whose columns are a tensor: one graph for each shape and store."""

        def run(*inputs: torch.Tensor) -> tuple[torch.Tensor]:
            ids, positions, visible, columns = inputs
            store.target = columns
            return (self.forward(ids, positions, visible, store),)

        assert isinstance(store.target, torch.Tensor)
        return self.replay(("step", id(store)), run, ids, positions, visible, store.target)[0]

    def forward(
        self,
        ids: torch.LongTensor,
        positions: torch.LongTensor,
        visible: torch.BoolTensor,
        store: KeyValueStore,
        last_rows: int | None = None,
    ) -> torch.Tensor:
        """ids, positions (batch, q), visible (batch, 1, q, columns) -> hidden states (batch, q, hidden), or of the
        `last_rows` last tokens."""
        before, after = self.step if ids.shape[1] <= 2 * BUCKET else self.sequence
        hidden = self.decoder.embed_tokens(ids)
        cos, sin = (table[:, None] for table in self.decoder.rotary_emb(hidden, position_ids=positions))
        for index, weights in enumerate(self.layers):
            query, key, value = before(weights, hidden, cos, sin, self.eps)
            keys, values = store.update(key, value, index)
            if last_rows is not None and index + 1 == len(self.layers):
                query, visible, hidden = query[:, :, -last_rows:], visible[:, :, -last_rows:], hidden[:, -last_rows:]
                after = self.step[1]
            grouped = keys.shape[1] != query.shape[1]
            attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=visible, enable_gqa=grouped)
            hidden = after(weights, hidden, attended, self.eps)
        return rms_norm(hidden, self.decoder.norm.weight, self.eps)

    def bucketed(
        self, input_ids: torch.LongTensor, mask: torch.Tensor, pad: int
    ) -> tuple[torch.LongTensor, torch.Tensor]:
        """Pad prompts (batch, length) on the left to their bucket, so that few graphs serve all lengths."""
        missing = self.rounded(input_ids.shape[1]) - input_ids.shape[1]
        return F.pad(input_ids, (missing, 0), value=pad), F.pad(mask, (missing, 0), value=0)

    def replay(self, key: Any, function: Callable[..., Any], *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """`function(*inputs)` as one CUDA graph, captured at its first use; just called where there are none.

        `function` returns tensors, never looks at a value on the host, and may be run twice.
        """
        if not self.uses_graphs:
            return function(*inputs)
        key = (key, *((tuple(one.shape), one.dtype) for one in inputs))
        if key not in self.graphs:
            self.graphs[key] = GraphedFunction(function, inputs)
            if len(self.graphs) > MAX_GRAPHS:
                self.graphs.popitem(last=False)
        self.graphs.move_to_end(key)
        return self.graphs[key](*inputs)


class GraphedFunction:
    """A CUDA graph of a function of tensors: inputs are copied in, outputs out."""

    def __init__(self, function: Callable[..., Any], inputs: tuple[torch.Tensor, ...]):
        self.inputs = [one.clone() for one in inputs]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles, and lets libraries set themselves up outside the capture
            for _ in range(2):
                function(*self.inputs)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = function(*self.inputs)

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        for held, given in zip(self.inputs, inputs, strict=True):
            held.copy_(given)
        self.graph.replay()
        return tuple(one.clone() for one in self.outputs)


__all__ = ["Engine", "EngineOptions"]
