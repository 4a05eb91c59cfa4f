"""The two training losses of WorldVLA, from hidden states at labelled positions only.

`paper`    L_action + alpha L_world, a weighted mean each (paper equation 4)
`authors`  one class-weighted mean over all labelled tokens (their released training code)
plus, in both, z_loss_weight times the mean squared logsumexp over labelled tokens.

Logits exist for one chunk of labelled rows at a time. All weights of the loss are known before the first logit, so the
gradient of a chunk is taken in the forward pass, while its logits exist, and nothing is computed twice (the idea
of Liger's fused linear cross entropy, for any head). It knows nothing of how a sequence is built: which label belongs
to the world model is said by the caller.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100


@dataclass
class LossDenominators:
    """What the sums of a loss are divided by; a trainer that accumulates or shards supplies global ones."""

    action: torch.Tensor  # sum of weights of action labels
    world: torch.Tensor  # sum of weights of world labels
    classes: torch.Tensor  # sum of weight times class weight of all labels (`authors`)
    count: torch.Tensor  # number of labels (z-loss)


@dataclass
class LossTerms:
    """Scalars of one forward; `action` and `world` are the segment means without alpha (0 for an absent kind).

    Only `loss` has a gradient.
    """

    loss: torch.Tensor
    action: torch.Tensor
    world: torch.Tensor
    z: torch.Tensor


def class_weights(labels: torch.Tensor, world_classes: tuple[int, int], alpha: float) -> torch.Tensor:
    """alpha for class ids in the closed range `world_classes`, 1 elsewhere (authors' `loss_weights`)."""
    first, last = world_classes
    return torch.where((labels >= first) & (labels <= last), alpha, 1.0)


def loss_denominators(
    labels: torch.Tensor,
    weights: torch.Tensor,
    is_world: torch.Tensor,
    world_classes: tuple[int, int],
    alpha: float,
) -> LossDenominators:
    """Denominators of the given labels, all tensors of one shape; labels of -100 do not count."""
    labelled = labels != IGNORE_INDEX
    weights = torch.where(labelled, weights.float(), 0.0)
    return LossDenominators(
        action=torch.where(is_world, 0.0, weights).sum(),
        world=torch.where(is_world, weights, 0.0).sum(),
        classes=(weights * class_weights(labels, world_classes, alpha)).sum(),
        count=labelled.sum(),
    )


def world_vla_loss(
    hidden_states: torch.Tensor,  # (rows, hidden): the states that predict `labels`
    lm_head: Callable[[torch.Tensor], torch.Tensor],
    labels: torch.Tensor,  # (rows,), none of them -100
    weights: torch.Tensor,  # (rows,)
    is_world: torch.Tensor,  # (rows,) bool
    *,
    reduction: str,
    world_classes: tuple[int, int],
    alpha: float,
    z_loss_weight: float,
    chunk_size: int,
    denominators: LossDenominators | None = None,
) -> LossTerms:
    """Loss of the labelled rows in float32; `denominators` default to those of these rows."""
    weights = weights.float()
    own = denominators or loss_denominators(labels, weights, is_world, world_classes, alpha)
    # each row's share of every mean: the means are sums of shares times losses
    action_share = _share(torch.where(is_world, 0.0, weights), own.action)
    world_share = _share(torch.where(is_world, weights, 0.0), own.world)
    z_share = _share(torch.ones_like(weights), own.count)
    if reduction == "paper":
        share = action_share + alpha * world_share
    else:
        share = _share(weights * class_weights(labels, world_classes, alpha), own.classes)

    loss, losses, squares = _summed_loss(hidden_states, lm_head, labels, share, z_loss_weight * z_share, chunk_size)
    # no matrix product, which autocast would do in half precision
    return LossTerms(
        loss=loss,
        action=(losses * action_share).sum(),
        world=(losses * world_share).sum(),
        z=(squares * z_share).sum(),
    )


def _share(weights: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    """weights / denominator, and 0 where there is nothing to average."""
    denominator = torch.as_tensor(denominator, device=weights.device, dtype=torch.float32)
    return torch.where(denominator > 0, weights / denominator.clamp(min=torch.finfo(torch.float32).tiny), 0.0)


def _summed_loss(
    states: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    labels: torch.Tensor,
    weights: torch.Tensor,
    z_weights: torch.Tensor,
    chunk_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """sum(weights * cross entropy + z_weights * logsumexp^2), and both per row (rows,) without a gradient."""
    parameters = _gradients_known_early(head)
    if parameters is not None and torch.is_grad_enabled() and not _is_float16(states):
        return _FusedHeadLoss.apply(head, states, labels, weights, z_weights, chunk_size, *parameters)

    def chunk_loss(chunk: torch.Tensor, *rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return _RowLoss.apply(head(chunk), *rows)

    chunks = [
        (states[rows], labels[rows], weights[rows], z_weights[rows]) for rows in _row_chunks(len(labels), chunk_size)
    ]
    if len(chunks) > 1 and torch.is_grad_enabled():
        parts = [checkpoint(chunk_loss, *chunk, use_reentrant=False) for chunk in chunks]
    else:
        parts = [chunk_loss(*chunk) for chunk in chunks]
    sums, losses, squares = zip(*parts, strict=True)
    return torch.stack(sums).sum(), torch.cat(losses), torch.cat(squares)


def _row_chunks(rows: int, chunk_size: int) -> list[slice]:
    """Slices of `chunk_size` rows; without labels one empty chunk, since a loss of 0 has a gradient too."""
    return [slice(start, start + chunk_size) for start in range(0, max(rows, 1), chunk_size)]


def _gradients_known_early(head: Any) -> list[nn.Parameter] | None:
    """The head's parameters to train, if their gradients can be taken in the forward pass.

    None for a head whose parameters stand for others elsewhere: a plain function, a replica of DataParallel (which
    has no parameters), sharded parameters (FSDP units of their own, tensor parallel, ZeRO-3) and quantised ones.
    """
    if not isinstance(head, nn.Module):
        return None
    parameters = list(head.parameters())
    if not parameters or any(type(p) is not nn.Parameter or p.numel() == 0 for p in parameters):
        return None
    # an FSDP2 unit takes the first gradient at its output for the start of the backward pass
    if any(hasattr(module, "set_requires_gradient_sync") for module in head.modules()):
        return None
    return [parameter for parameter in parameters if parameter.requires_grad]


def _is_float16(states: torch.Tensor) -> bool:
    """Whether logits will be float16, whose gradients vanish unless the loss is scaled before they are taken."""
    device = states.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device) == torch.float16
    return states.dtype == torch.float16


def _row_losses(
    logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, z_weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weighted sum, cross entropy and squared logsumexp per row, and d sum / d logits, all in float32.

    The gradient takes the memory of the log-probabilities. Log-softmax as in `F.cross_entropy`: on small losses its
    float32 kernels round otherwise than a logsumexp, and the authors' numbers are reproduced only by the former.
    """
    labels = labels[:, None]
    logits = logits.float()
    log_probabilities = logits.log_softmax(-1)
    losses = -log_probabilities.gather(-1, labels)[:, 0]
    logsumexp = logits.gather(-1, labels)[:, 0] + losses
    d_logits = log_probabilities.exp_().mul_((weights + 2 * z_weights * logsumexp)[:, None])
    d_logits.scatter_add_(-1, labels, -weights[:, None])
    squares = logsumexp.square()
    return (weights * losses + z_weights * squares).sum(), losses, squares, d_logits


class _FusedHeadLoss(torch.autograd.Function):
    """Head and `_row_losses` with the gradients of states and head's parameters taken chunk by chunk in forward."""

    @staticmethod
    def forward(
        ctx: Any,
        head: nn.Module,
        states: torch.Tensor,
        labels: torch.Tensor,
        weights: torch.Tensor,
        z_weights: torch.Tensor,
        chunk_size: int,
        *parameters: nn.Parameter,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        d_states = torch.empty_like(states)
        d_parameters: list[torch.Tensor | None] = [None] * len(parameters)
        terms = []
        for rows in _row_chunks(len(labels), chunk_size):
            chunk = (states[rows], labels[rows], weights[rows], z_weights[rows])
            values, d_states[rows], gradients = _head_gradients(head, parameters, *chunk)
            terms.append(values)
            for index, gradient in enumerate(gradients):
                known = d_parameters[index]
                d_parameters[index] = gradient if known is None else known.add_(gradient)
        sums, losses, squares = zip(*terms, strict=True)
        ctx.gradients = [d_states, *d_parameters]
        outputs = torch.stack(sums).sum(), torch.cat(losses), torch.cat(squares)
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx: Any, d_sum: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the loss keeps its gradients for one backward pass only: run the forward again")
        d_states, *d_parameters = (None if value is None else value.mul_(d_sum) for value in ctx.gradients)
        ctx.gradients = None
        return None, d_states, None, None, None, None, *d_parameters


def _head_gradients(
    head: nn.Module, parameters: tuple[nn.Parameter, ...], states: torch.Tensor, *rows: torch.Tensor
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor, tuple[torch.Tensor | None, ...]]:
    """(sum, losses, squares) of one chunk, and the gradients of its states and of the head's parameters."""
    with torch.enable_grad():
        states = states.detach().requires_grad_()
        logits = head(states)
    *values, d_logits = _row_losses(logits.detach(), *rows)
    d_states, *gradients = torch.autograd.grad(
        logits, [states, *parameters], d_logits.to(logits.dtype), allow_unused=True
    )
    return tuple(values), d_states, tuple(gradients)


class _RowLoss(torch.autograd.Function):
    """`_row_losses` of ready logits."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, *rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        *outputs, d_logits = _row_losses(logits, *rows)
        ctx.save_for_backward(d_logits.to(logits.dtype))
        ctx.mark_non_differentiable(*outputs[1:])
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, d_sum: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ctx.saved_tensors[0] * d_sum, None, None, None
