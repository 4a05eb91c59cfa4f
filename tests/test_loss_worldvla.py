"""Both reductions, weights, chunks and denominators against numpy, with gradients; the class range of the authors."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from model_factory import configured, labels_of, left_pad, tiny_config, tiny_model, writer

from transformers_worldvla import WorldVLAForCausalLM
from transformers_worldvla.loss_worldvla import class_weights, loss_denominators, world_vla_loss
from transformers_worldvla.tokens_worldvla import published_vocabulary

ROWS, HIDDEN, VOCABULARY, CLASSES = 20, 6, 40, (3, 17)
TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}


def problem(seed: int = 0, world: float = 0.5) -> dict[str, torch.Tensor]:
    """Random rows; `world` is the share of world labels."""
    draw = torch.Generator().manual_seed(seed)
    return {
        "states": torch.randn(ROWS, HIDDEN, generator=draw),
        "head": torch.randn(VOCABULARY, HIDDEN, generator=draw),
        "labels": torch.randint(0, VOCABULARY, (ROWS,), generator=draw),
        "weights": torch.rand(ROWS, generator=draw) * 2,
        "is_world": torch.rand(ROWS, generator=draw) < world,
    }


def reference(rows: dict[str, torch.Tensor], reduction: str, alpha: float, z_weight: float) -> dict[str, Any]:
    """The formulas in float64 numpy, one label at a time, and the gradients by hand."""
    states, head, weights = (rows[name].double().numpy() for name in ("states", "head", "weights"))
    labels, is_world = rows["labels"].numpy(), rows["is_world"].numpy()
    logits = states @ head.T
    lse = np.log(np.exp(logits).sum(-1))
    losses = np.array([lse[i] - logits[i, label] for i, label in enumerate(labels)])
    by_class = np.array([alpha if CLASSES[0] <= label <= CLASSES[1] else 1.0 for label in labels])

    def mean(weight: np.ndarray) -> tuple[float, np.ndarray]:
        share = weight / weight.sum() if weight.sum() > 0 else np.zeros_like(weight)
        return float(share @ losses), share

    (action, action_share), (world, world_share) = mean(weights * ~is_world), mean(weights * is_world)
    whole, share = mean(weights * by_class)
    if reduction == "paper":
        whole, share = action + alpha * world, action_share + alpha * world_share
    softmax = np.exp(logits - lse[:, None])
    onehot = np.eye(VOCABULARY)[labels]
    d_logits = share[:, None] * (softmax - onehot) + z_weight * 2 * lse[:, None] * softmax / len(labels)
    return {
        "loss": whole + z_weight * np.mean(lse**2),
        "action": action,
        "world": world,
        "z": np.mean(lse**2),
        "d_states": d_logits @ head,
        "d_head": d_logits.T @ states,
    }


def linear(weight: torch.Tensor) -> torch.nn.Linear:
    """A head whose parameters the loss can see: their gradients are taken in the forward pass."""
    head = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    head.weight = torch.nn.Parameter(weight)
    return head


def computed(
    rows: dict[str, torch.Tensor], reduction: str, chunk: int, alpha: float, z_weight: float, fused=False, **more: Any
):
    states, head = rows["states"].clone().requires_grad_(), rows["head"].clone().requires_grad_()
    module = linear(rows["head"].clone())
    terms = world_vla_loss(
        states,
        module if fused else lambda x: x @ head.T,
        rows["labels"],
        rows["weights"],
        rows["is_world"],
        reduction=reduction,
        world_classes=CLASSES,
        alpha=alpha,
        z_loss_weight=z_weight,
        chunk_size=chunk,
        **more,
    )
    terms.loss.backward()
    return terms, states.grad, module.weight.grad if fused else head.grad


@pytest.mark.parametrize("reduction", ["paper", "authors"])
@pytest.mark.parametrize("chunk", [1, 7, ROWS, 1000])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("world", "alpha", "z_weight"), [(0.5, 0.04, 1e-5), (0.5, 1, 0.1), (0, 0.04, 0.1), (1, 0.3, 0)]
)
def test_against_numpy(reduction, chunk, fused, world, alpha, z_weight):
    rows = problem(world=world)
    expected = reference(rows, reduction, alpha, z_weight)
    terms, d_states, d_head = computed(rows, reduction, chunk, alpha, z_weight, fused)
    for name in ("loss", "action", "world", "z"):
        value = getattr(terms, name)
        assert value.dtype == torch.float32
        np.testing.assert_allclose(value.item(), expected[name], rtol=1e-6, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(d_states.numpy(), expected["d_states"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(d_head.numpy(), expected["d_head"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", ["paper", "authors"])
def test_weight_zero_is_a_label_less(reduction):
    rows = problem()
    rows["weights"][::3] = 0.0
    kept = {name: value[rows["weights"] > 0] if name != "head" else value for name, value in rows.items()}
    with_zeros, without = (computed(r, reduction, 7, 0.04, 0.0)[0] for r in (rows, kept))
    torch.testing.assert_close(with_zeros.loss, without.loss)


def test_nothing_to_learn_is_zero_with_a_gradient():
    rows = problem()
    rows["weights"] = torch.zeros(ROWS)
    nothing = {name: value[:0] if name != "head" else value for name, value in problem().items()}
    for case, reduction, fused in itertools.product((rows, nothing), ("paper", "authors"), (False, True)):
        terms, d_states, d_head = computed(case, reduction, 7, 0.04, 0.0, fused)
        assert terms.loss == 0
        assert (d_states == 0).all() and (d_head == 0).all()


def test_autocast_keeps_the_sums_in_float32():
    rows = problem()
    head = rows["head"]
    with torch.autocast("cpu", torch.bfloat16):
        logits = (rows["states"] @ head.T).float()
        terms, _, _ = computed(rows, "paper", ROWS, 0.04, 0.0)
    losses = torch.nn.functional.cross_entropy(logits, rows["labels"], reduction="none")
    weights = rows["weights"] * ~rows["is_world"]
    torch.testing.assert_close(terms.action, (losses * weights).sum() / weights.sum(), **TOLERANCE)


def test_logits_in_half_precision_are_read_in_float32():
    rows = problem()
    exact, _, _ = computed(rows, "authors", 7, 0.04, 1e-5)
    half = {name: v.bfloat16() if name in ("states", "head") else v for name, v in rows.items()}
    terms, _, _ = computed(half, "authors", 7, 0.04, 1e-5)
    assert terms.loss.dtype == torch.float32
    torch.testing.assert_close(terms.loss, exact.loss, rtol=0.02, atol=0.0)


# -------------------------------------------------------------------- heads of other kinds


def loss_of(rows: dict[str, torch.Tensor], head: Any, states: torch.Tensor | None = None) -> torch.Tensor:
    states = rows["states"] if states is None else states
    options = {"reduction": "paper", "world_classes": CLASSES, "alpha": 0.04, "z_loss_weight": 0.1, "chunk_size": 7}
    return world_vla_loss(states, head, rows["labels"], rows["weights"], rows["is_world"], **options).loss


def test_a_frozen_head_passes_the_gradient_on():
    rows = problem()
    expected = computed(rows, "paper", 7, 0.04, 0.1)[1]
    head, states = linear(rows["head"]).requires_grad_(False), rows["states"].clone().requires_grad_()
    loss_of(rows, head, states).backward()
    torch.testing.assert_close(states.grad, expected, **TOLERANCE)
    assert head.weight.grad is None


def test_a_head_in_parts_trains_those_that_want_it():
    """As adapters wrap it: a frozen weight, a trained one, and one that nothing uses."""

    class Adapted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.base, self.unused = linear(rows["head"].clone()).requires_grad_(False), torch.nn.Linear(2, 2)
            self.low = torch.nn.Linear(HIDDEN, VOCABULARY, bias=False)

        def forward(self, states):
            return self.base(states) + self.low(states)

    rows = problem()
    head = Adapted()
    loss_of(rows, head).backward()
    weight = (head.base.weight + head.low.weight).detach().requires_grad_()
    loss_of(rows, lambda x: x @ weight.T).backward()
    torch.testing.assert_close(head.low.weight.grad, weight.grad, **TOLERANCE)
    assert head.base.weight.grad is None and head.unused.weight.grad is None


def test_gradients_are_taken_once():
    rows = problem()
    loss = loss_of(rows, linear(rows["head"]))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="for one backward pass only: run the forward again"):
        loss.backward()


def test_a_gradient_from_outside_scales_both():
    rows = problem()
    _, d_states, d_head = computed(rows, "paper", 7, 0.04, 0.1)
    head, states = linear(rows["head"].clone()), rows["states"].clone().requires_grad_()
    (3 * loss_of(rows, head, states)).backward()
    torch.testing.assert_close(states.grad, 3 * d_states, **TOLERANCE)
    torch.testing.assert_close(head.weight.grad, 3 * d_head, **TOLERANCE)


# -------------------------------------------------------------------- denominators


def test_denominators_ignore_what_is_not_labelled():
    labels = torch.tensor([[-100, 3, 17], [18, -100, 2]])
    weights = torch.tensor([[5.0, 1.0, 2.0], [3.0, 7.0, 4.0]])
    is_world = torch.tensor([[True, True, False], [False, True, True]])
    sums = loss_denominators(labels, weights, is_world, CLASSES, 0.5)
    assert (sums.action.item(), sums.world.item(), sums.count.item()) == (2 + 3, 1 + 4, 4)
    assert sums.classes.item() == 0.5 * (1 + 2) + 3 + 4
    assert class_weights(labels, CLASSES, 0.5).tolist() == [[1, 0.5, 0.5], [1, 1, 1]]


@pytest.mark.parametrize("reduction", ["paper", "authors"])
def test_parts_of_a_batch_add_up(reduction):
    """With global denominators the losses and gradients of four parts sum to those of the whole."""
    rows = problem()
    whole, d_states, d_head = computed(rows, reduction, 7, 0.04, 0.1)
    sums = loss_denominators(rows["labels"], rows["weights"], rows["is_world"], CLASSES, 0.04)
    loss, grads, head = torch.zeros(()), [], torch.zeros_like(d_head)
    for start in range(0, ROWS, 5):
        part = {name: v[start : start + 5] if name != "head" else v for name, v in rows.items()}
        terms, states_grad, head_grad = computed(part, reduction, 7, 0.04, 0.1, denominators=sums)
        loss, head = loss + terms.loss.detach(), head + head_grad
        grads.append(states_grad)
    torch.testing.assert_close(loss, whole.loss.detach(), **TOLERANCE)
    torch.testing.assert_close(torch.cat(grads), d_states, **TOLERANCE)
    torch.testing.assert_close(head, d_head, **TOLERANCE)


# -------------------------------------------------------------------- in the model


@pytest.fixture(scope="module")
def model() -> WorldVLAForCausalLM:
    """Evaluation mode, so without dropout; ids in their published order, for the class range."""
    return tiny_model(shuffled=False, z_loss_weight=0.01, loss_chunk_size=7)


def batch_of(model: WorldVLAForCausalLM, seed: int = 0) -> dict[str, torch.Tensor]:
    """Four samples of different kinds and lengths, padded on the left, each label with a weight of its own."""
    write = writer(model, seed)
    samples = [
        write.action_sample(3, 7),
        write.world_sample(1, rounds=2),
        write.action_sample(1, 4, images=2, length=2),
        write.world_sample(2, rounds=0, length=6),  # video prediction: no action, frames out
    ]
    batch = left_pad(model, [ids for ids, _ in samples], extra=2)
    width = batch["input_ids"].shape[1]
    labels = [[-100] * (width - len(ids)) + labels_of(ids, prompt) for ids, prompt in samples]
    batch["labels"] = torch.tensor(labels)
    weights = torch.rand(batch["labels"].shape, generator=torch.Generator().manual_seed(seed)) + 0.5
    batch["loss_weights"] = torch.where(batch["labels"] == -100, 0.0, weights)
    return batch


def terms_by_hand(model: WorldVLAForCausalLM, batch: dict[str, torch.Tensor], is_world: list[bool]) -> dict[str, float]:
    """Loss of a batch from the logits of each sample alone, label by label."""
    first, last = model.authors_world_classes
    sums = dict.fromkeys(("action", "action_w", "world", "world_w", "class", "class_w", "z", "n"), 0.0)
    alpha = model.config.world_loss_weight
    for row, world in enumerate(is_world):
        keep = batch["attention_mask"][row].bool()
        ids, labels, weights = (batch[name][row][keep] for name in ("input_ids", "labels", "loss_weights"))
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0].double()
        for position in range(1, len(ids)):
            if (label := int(labels[position])) == -100:
                continue
            lse, weight = logits[position - 1].logsumexp(-1).item(), weights[position].item()
            loss = lse - logits[position - 1, label].item()
            kind = "world" if world else "action"
            sums[kind] += weight * loss
            sums[f"{kind}_w"] += weight
            class_weight = weight * (alpha if first <= label <= last else 1.0)
            sums["class"] += class_weight * loss
            sums["class_w"] += class_weight
            sums["z"] += lse**2
            sums["n"] += 1
    action, world = (sums[kind] / sums[f"{kind}_w"] if sums[f"{kind}_w"] else 0.0 for kind in ("action", "world"))
    z = sums["z"] / sums["n"]
    return {
        "action": action,
        "world": world,
        "z": z,
        "paper": action + alpha * world + model.config.z_loss_weight * z,
        "authors": sums["class"] / sums["class_w"] + model.config.z_loss_weight * z,
    }


@pytest.mark.parametrize("reduction", ["paper", "authors"])
@pytest.mark.parametrize("chunk", [1, 7, 2048])
def test_model_loss_by_hand(model, reduction, chunk):
    batch = batch_of(model)
    expected = terms_by_hand(model, batch, [False, True, False, True])
    with configured(model, loss_reduction=reduction, loss_chunk_size=chunk), torch.no_grad():
        output = model(**batch)
        everything_one = model(**{**batch, "loss_weights": (batch["labels"] != -100).float()}).loss
        without_weights = model(**{name: value for name, value in batch.items() if name != "loss_weights"}).loss
    assert output.loss.item() == pytest.approx(expected[reduction], rel=1e-5)
    assert output.action_loss.item() == pytest.approx(expected["action"], rel=1e-5)
    assert output.world_loss.item() == pytest.approx(expected["world"], rel=1e-5)
    assert output.z_loss.item() == pytest.approx(expected["z"], rel=1e-5)
    torch.testing.assert_close(everything_one, without_weights)
    assert not torch.isclose(output.loss, without_weights, rtol=1e-4)


def test_fields_are_read_at_every_forward(model):
    batch = batch_of(model)
    losses = []
    for fields in ({}, {"world_loss_weight": 0.5}, {"z_loss_weight": 0.0}, {"loss_reduction": "authors"}):
        with configured(model, **fields), torch.no_grad():
            losses.append(model(**batch).loss.item())
    assert len(set(losses)) == 4


def test_an_absent_kind_adds_nothing(model):
    batch = {name: value[[0, 2]] for name, value in batch_of(model).items()}
    with torch.no_grad():
        output = model(**batch)
    assert output.world_loss == 0
    z = model.config.z_loss_weight * output.z_loss
    torch.testing.assert_close(output.loss, output.action_loss + z)


def test_the_authors_class_range_is_off_by_one():
    """Their slice covers ids 3..8194: <unk> (3) is weighted down, the last code (8195) is not."""
    vocabulary = published_vocabulary()
    config = tiny_config(vocabulary_map=vocabulary, hidden_size=8, num_hidden_layers=1, loss_reduction="authors")
    config.z_loss_weight, config.world_loss_weight = 0.0, 0.25
    torch.manual_seed(0)
    model = WorldVLAForCausalLM(config).eval()
    assert model.authors_world_classes == (3, 8194)
    ids = [0, 11000, 8710, 2, 3, 4, 8194, 8195, 8196, 8710]
    labels = torch.tensor([[-100] * 3 + ids[3:]])
    with torch.no_grad():
        output = model(input_ids=torch.tensor([ids]), labels=labels)
    logits = output.logits[0, 2:-1]
    losses = torch.nn.functional.cross_entropy(logits, labels[0, 3:], reduction="none")
    weights = torch.tensor([1, 0.25, 0.25, 0.25, 1, 1, 1])
    torch.testing.assert_close(output.loss, (losses * weights).sum() / weights.sum())
    with configured(model, authors_world_classes=(4, 8195)), torch.no_grad():
        right = model(input_ids=torch.tensor([ids]), labels=labels).loss
    weights = torch.tensor([1, 1, 0.25, 0.25, 0.25, 1, 1])
    torch.testing.assert_close(right, (losses * weights).sum() / weights.sum())


def gradients(model: WorldVLAForCausalLM) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("reduction", ["paper", "authors"])
def test_one_by_four_is_four_by_one(model, reduction):
    """Accumulation with global denominators: loss and every gradient of four micro-batches are those of one batch."""
    batch = batch_of(model)
    is_world = torch.tensor([False, True, False, True])[:, None].expand_as(batch["labels"])
    sums = loss_denominators(batch["labels"], batch["loss_weights"], is_world, model.authors_world_classes, 0.04)
    names = ("action_weight_sum", "world_weight_sum", "class_weight_sum", "label_count")
    denominators = dict(zip(names, (sums.action, sums.world, sums.classes, sums.count), strict=True))
    with configured(model, loss_reduction=reduction):
        whole = model(**batch).loss
        whole.backward()
        expected = gradients(model)
        total = 0.0
        for row in range(4):
            loss = model(**{name: value[row : row + 1] for name, value in batch.items()}, **denominators).loss
            loss.backward()
            total += loss.item()
    assert total == pytest.approx(whole.item(), rel=1e-6)
    actual = gradients(model)
    assert actual.keys() == expected.keys() and "model.embed_tokens.weight" in actual
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_denominators_come_together(model):
    with pytest.raises(
        ValueError, match="pass all of action_weight_sum, world_weight_sum, class_weight_sum and label_co"
    ):
        model(**batch_of(model), label_count=torch.tensor(3))


@pytest.mark.parametrize("reduction", ["paper", "authors"])
def test_packed_is_padded(model, reduction):
    """The same samples in one row, told apart by `seq_idx`."""
    batch = batch_of(model)
    keep = batch["attention_mask"].bool()
    packed = {name: batch[name][keep][None] for name in ("input_ids", "labels", "loss_weights")}
    rows = torch.arange(4)[:, None].expand_as(keep)
    with configured(model, loss_reduction=reduction):
        padded = model(**batch).loss
        padded.backward()
        expected = gradients(model)
        loss = model(**packed, seq_idx=rows[keep][None]).loss
        loss.backward()
    torch.testing.assert_close(loss, padded, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=2e-6, msg=name)


# -------------------------------------------------------------------- memory


@pytest.mark.parametrize("chunk", [7, 2048])
def test_logits_exist_at_labelled_positions_only(chunk):
    """Counts every tensor with a vocabulary axis: those the head makes, and those autograd keeps."""
    model = tiny_model(loss_chunk_size=chunk)
    batch = batch_of(model)
    labelled = int((batch["labels"] != -100).sum())
    vocabulary, positions = model.config.vocab_size, batch["labels"].numel()
    made, kept = [], []
    model.lm_head.register_forward_hook(lambda module, args, output: made.append(output.numel()))

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        is_head = tensor.untyped_storage().data_ptr() == model.lm_head.weight.untyped_storage().data_ptr()
        if tensor.shape[-1:] == (vocabulary,) and not is_head:
            kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.train()(**batch)
    assert output.logits is None
    assert model.tokens.world_mask(batch["input_ids"]).any(-1).tolist() == [False, True, False, True]
    assert max(made) == min(chunk, labelled) * vocabulary
    assert sum(made) == labelled * vocabulary  # each labelled position once
    assert labelled < positions / 2
    assert not kept  # gradients are taken while the logits exist
    made.clear()
    model.eval()(**batch)
    assert max(made) == positions * vocabulary  # evaluation returns them all
