"""The two training losses of WorldVLA, from hidden states at labelled positions only.

`paper`    L_action + alpha L_world, a weighted mean each (paper equation 4)
`authors`  one class-weighted mean over all labelled tokens (their released training code)
plus, in both, z_loss_weight times the mean squared logsumexp over labelled tokens.

Logits exist for one chunk of labelled rows at a time; chunks are recomputed in the backward pass. It knows nothing of
how a sequence is built: which label belongs to the world model is said by the caller.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
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
    """Scalars of one forward; `action` and `world` are the segment means without alpha (0 for an absent kind)."""

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
    by_class = weights * class_weights(labels, world_classes, alpha)
    # one column a sum: action, world, class-weighted cross entropy
    columns = torch.stack([torch.where(is_world, 0.0, weights), torch.where(is_world, weights, 0.0), by_class], dim=-1)

    def chunk_sums(states: torch.Tensor, targets: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
        logits = lm_head(states).float()  # (chunk, vocabulary)
        losses = F.cross_entropy(logits, targets, reduction="none")
        # no matrix product, which autocast would do in half precision
        weighted = (losses[:, None] * coefficients).sum(0)
        return torch.cat([weighted, logits.logsumexp(-1).square().sum()[None]])  # (4,)

    sums = hidden_states.new_zeros(4, dtype=torch.float32)
    starts = range(0, max(len(labels), 1), chunk_size)  # without labels one empty chunk: a loss of 0 has a gradient too
    for start in starts:
        rows = slice(start, start + chunk_size)
        args = (hidden_states[rows], labels[rows], columns[rows])
        if len(starts) > 1 and torch.is_grad_enabled():
            sums = sums + checkpoint(chunk_sums, *args, use_reentrant=False)
        else:
            sums = sums + chunk_sums(*args)

    action, world = _mean(sums[0], own.action), _mean(sums[1], own.world)
    z = _mean(sums[3], own.count)
    cross_entropy = action + alpha * world if reduction == "paper" else _mean(sums[2], own.classes)
    return LossTerms(loss=cross_entropy + z_loss_weight * z, action=action, world=world, z=z)


def _mean(total: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    """total / denominator, and 0 (with a gradient of 0) where there is nothing to average."""
    denominator = torch.as_tensor(denominator, device=total.device, dtype=torch.float32)
    return torch.where(denominator > 0, total / denominator.clamp(min=torch.finfo(torch.float32).tiny), 0.0 * total)
