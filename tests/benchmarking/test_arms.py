"""The arms of the benchmark give one answer in different ways, and do the work that is counted for them."""

import numpy as np
import pytest
import torch
from model_factory import tiny_model

from transformers_worldvla import WorldVLATokens
from transformers_worldvla.benchmarking import counts, measure
from transformers_worldvla.benchmarking.arms import Arms, authors_mask, known_arm
from transformers_worldvla.benchmarking.cases import Case, build_model
from transformers_worldvla.tokens_worldvla import published_vocabulary

ARMS = ["A", "B1", "B2", "C", "D", "D-parallel", "D-sliced", "D-overlap"]
CHUNK = Case("chunk", 32, frames=2, actions=3, batch=1)
FRAME = Case("frame", 64, frames=1, actions=1, batch=1)


@pytest.fixture(scope="module")
def model():
    return tiny_model(action_dim=7)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("case", [CHUNK, Case("chunk", 64, 3, 5, 2), FRAME, Case("frame", 32, 1, 1, 3)])
def test_all_arms_give_the_same_tokens(case, seed):
    """In float32, on random models."""
    model = tiny_model(seed=seed, action_dim=7)
    ids = case.prompts(model.tokens, seed)
    arms = Arms(model)
    names = [name for name in [*ARMS, "D-draft", "D-draft60"] if known_arm(name, case.what)]
    answers = {name: arms.prepare(name, case, ids)() for name in names}
    assert answers["A"].shape == (
        (case.batch, case.actions, 7) if case.what == "chunk" else (case.batch, answers["A"].shape[1])
    )
    for name, answer in answers.items():
        assert torch.equal(answer, answers["A"]), name


def test_the_authors_mask():
    """Their rule, written out: an action block behind the last image sees the prompt and itself."""
    model = tiny_model()
    tokens = model.tokens
    image = tokens.image_block(np.full((2, 2), tokens.image_codes[0]))
    block = tokens.action_block(tokens.action_bins[:2])
    history = torch.tensor([*image, *block, *block[:2]])  # the second block is open
    mask = authors_mask(history, tokens)
    expected = torch.ones(len(history), len(history)).tril().bool()
    expected[len(image) + 4 :, len(image) : len(image) + 4] = False
    assert torch.equal(mask, expected)
    # a block before the image is hidden from the block behind it, and from nothing else
    mask = authors_mask(torch.tensor([*block, *image, *block]), tokens)
    assert not mask[-len(block) :, : len(block)].any()
    assert mask[len(block) : -len(block), : len(block)].all()


# -------------------------------------------------------------------- counts


class Observed:
    """What really runs: tokens of each forward of the modules, rows of each call of the head."""

    def __init__(self, model):
        self.tokens, self.rows, self.model = [], [], model

    def __enter__(self):
        self.hooks = [
            self.model.model.layers[0].register_forward_hook(lambda m, a, out: self.tokens.append(out[0].shape[1])),
            self.model.lm_head.register_forward_hook(lambda m, a, out: self.rows.append(out.numel() // out.shape[-1])),
        ]
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()


@pytest.mark.parametrize("arm", ["A", "B1", "C", "D", "D-parallel", "D-overlap"])
@pytest.mark.parametrize("case", [CHUNK, Case("chunk", 64, 2, 10, 1), FRAME])
def test_counts_are_what_runs(model, arm, case):
    if not known_arm(arm, case.what):
        pytest.skip("no such arm for frames")
    ids = case.prompts(model.tokens, 0)
    answer = Arms(model).prepare(arm, case, ids)
    with Observed(model) as seen:
        answer()
    forwards = counts.forwards_of(arm, case, model.config, model.tokens, ids.shape[1])
    assert [one.tokens for one in forwards] == seen.tokens
    if arm in ("A", "B1", "C", "D-parallel"):  # the others multiply with some rows of the head only
        assert [one.head_rows for one in forwards] == seen.rows


@pytest.mark.parametrize(("actions", "sequential"), [(5, 46), (10, 91)])
def test_counts_of_the_published_shape(actions, sequential):
    """By hand: 256 px, two frames, 24 words: a prompt of 1 + 24 + 2 x 276 + 1 tokens."""
    model = tiny_model(num_codes=32)
    case = Case("chunk", 256, 2, actions, 1)
    config = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32}
    shape = type(model.config)(**config, vocab_size=65536)
    prompt = 578

    def totals(arm):
        forwards = counts.forwards_of(arm, case, shape, model.tokens, prompt)
        return counts.count(forwards, case, shape, 2, prompt)

    authors, sequence, ours, overlapped = (totals(arm) for arm in ("A", "C", "D", "D-overlap"))
    assert (authors.forwards, sequence.forwards, ours.forwards, overlapped.forwards) == (sequential, sequential, 7, 7)
    assert authors.trunk_tokens == sequence.trunk_tokens == prompt + 9 * actions
    assert ours.trunk_tokens == prompt + 7 * actions
    assert overlapped.trunk_tokens == 277 + 7 * actions
    assert authors.head_rows == prompt + 9 * actions and sequence.head_rows == sequential
    assert ours.head_rows == 7 * actions and ours.head_products == 7 * actions * 256
    assert authors.kv_bytes == (prompt + 9 * actions) * 524288  # 0.5 MiB a token
    assert ours.kv_bytes == overlapped.kv_bytes == (prompt + 7 * actions) * 524288
    assert counts.layer_parameters(shape) == 32 * (4 * 4096**2 + 3 * 4096 * 11008)


def test_counts_of_a_frame():
    """By hand: 256 codes, a newline behind each row of 16 that rides along, the grid in the prefill."""
    tokens = WorldVLATokens.from_vocabulary(published_vocabulary())
    config = tiny_model().config
    case = Case("frame", 256, 1, 1, 1)
    prompt = 311
    plain = counts.forwards_of("C", case, config, tokens, prompt)
    merged = counts.forwards_of("D", case, config, tokens, prompt)
    assert (len(plain), len(merged)) == (277, 256)
    assert sum(one.tokens for one in merged) == prompt + 3 + 255 + 15
    assert counts.forwards_of("D-draft", case, config, tokens, prompt) is None


def test_the_roofline():
    """Two forwards by hand, one bound by reading, one by computing."""
    config = build_model("small", torch.device("meta"), torch.float32).config
    weights = 12 * (4 * 512**2 + 3 * 512 * 1376)
    step = counts.Forward(tokens=1, columns=100, head_rows=1, head_width=256)
    read = 4 * (weights + 512 * 256) + 100 * 2 * 12 * 512 * 4
    assert counts.bytes_read(step, 1, config, 4) == read
    assert counts.roofline_seconds([step], 1, config, 4, bandwidth=1e9, throughput=1e15) == pytest.approx(read / 1e9)
    work = 2 * weights + 4 * 100 * 512 * 12 + 2 * 512 * 256
    assert counts.operations(step, 3, config) == 3 * work
    assert counts.roofline_seconds([step], 3, config, 4, bandwidth=1e15, throughput=1e9) == pytest.approx(
        3 * work / 1e9
    )


# -------------------------------------------------------------------- measuring


def test_arms_take_turns(model):
    """Every repeat runs all arms of a case before the next repeat begins."""
    order = []
    samples = measure.measure(model, ["A", "D"], [CHUNK, FRAME], 2, order.append)
    assert [name.split()[0] for name in order if not name.startswith("warm")] == ["A", "D"] * 4
    assert all(len(taken.wall) == 2 for taken in samples.values())
    rows = measure.rows_of(samples, model, measure.Ceilings(1e10, 1e11))
    assert [row["arm"] for row in rows] == ["A", "D", "A", "D"]
    assert all(row["agreement"] == 1.0 for row in rows)
    assert [row["forwards"] for row in rows] == [28, 7, 25, 16]
    for row in rows:
        assert row["median_s"] <= row["p95_s"] and 0 < row["prefill_s"] < row["median_s"]
    ratios = measure.ratios_of(rows)
    assert [one["ratio"] for one in ratios] == ["A/D", "A/D"]
    assert ratios[0]["measured"] == pytest.approx(rows[0]["median_s"] / rows[1]["median_s"])


def test_percentiles_and_agreement():
    values = list(range(1, 41))
    assert measure.percentile(values, 0.95) == 38 and measure.percentile([3.0], 0.95) == 3.0
    one, other = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[1, 2, 0, 0]])
    assert measure.agreement([one, one], [one, other]) == 0.75
