"""The action mask against brute force: each block run alone, and masks written out pair by pair.

Packing, padding and batching must change nothing; what cannot carry the mask must say so.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_factory import configured, left_pad, tiny_model, writer
from transformers.cache_utils import DynamicCache, StaticCache

from transformers_worldvla import WorldVLAForCausalLM

CLOSE = {"rtol": 0.0, "atol": 1e-5}


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def model(request) -> WorldVLAForCausalLM:
    return tiny_model(attention=request.param)


def logits(model: WorldVLAForCausalLM, ids: list[int], **inputs) -> torch.Tensor:
    """(length, vocabulary) of one row, without cache."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False, **inputs).logits[0]


def pairs(model: WorldVLAForCausalLM, ids: list[int]) -> torch.Tensor:
    """Which (query, key) is visible: causal, less the pairs of two different action blocks of the answer."""
    begin, end = (model.config.vocabulary_map[f"<reserved{number}>"] for number in (10000, 15000))
    separator = model.config.vocabulary_map["<reserved08706>"]
    start = ids.index(separator) if separator in ids else len(ids)
    block, blocks = -1, []
    for position, token in enumerate(ids):
        if token == begin and position > start:
            block = position
        blocks.append(block)
        if token == end:
            block = -1
    visible = torch.zeros(len(ids), len(ids), dtype=torch.bool)
    for query in range(len(ids)):
        for key in range(query + 1):
            visible[query, key] = blocks[query] == blocks[key] or blocks[query] < 0 or blocks[key] < 0
    return visible


def ready_mask(model: WorldVLAForCausalLM, visible: torch.Tensor) -> torch.Tensor:
    """(1, 1, queries, keys) in the form that the attention implementation takes."""
    if model.config._attn_implementation == "eager":
        return torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)[None, None]
    return visible[None, None]


# -------------------------------------------------------------------- brute force


@settings(max_examples=15, deadline=None)
@given(count=st.integers(1, 6), dim=st.integers(1, 8), images=st.integers(1, 3), seed=st.integers(0, 2**20))
def test_each_block_is_as_if_alone(model, count, dim, images, seed):
    """A block of the answer behind the prompt, at its true positions, under a plain causal mask."""
    ids, prompt = writer(model, seed).action_sample(count, dim, images=images)
    together = logits(model, ids)
    length = prompt + dim + 2
    causal = ready_mask(model, torch.ones(length, length, dtype=torch.bool).tril())
    for start in range(prompt, prompt + count * (dim + 2), dim + 2):
        block = ids[start : start + dim + 2]
        positions = torch.tensor([[*range(prompt), *range(start, start + dim + 2)]])
        alone = logits(model, ids[:prompt] + block, position_ids=positions, attention_mask=causal)
        torch.testing.assert_close(together[start : start + dim + 2], alone[prompt:], **CLOSE)
        torch.testing.assert_close(together[:prompt], alone[:prompt], **CLOSE)


@settings(max_examples=10, deadline=None)
@given(count=st.integers(1, 4), dim=st.integers(1, 4), rounds=st.integers(0, 2), seed=st.integers(0, 2**20))
def test_whole_sequences_with_pairs_written_out(model, count, dim, rounds, seed):
    """Also what stands outside the blocks: the final separator sees all of them."""
    write = writer(model, seed)
    prompt = write.world_prompt(rounds, dim=dim)
    ids = prompt + [token for _ in range(count) for token in write.action(dim)] + [write.separator]
    visible = pairs(model, ids)
    hidden = torch.ones_like(visible).tril() & ~visible
    assert hidden.sum() == (dim + 2) ** 2 * count * (count - 1) // 2
    assert visible[-1].all()
    expected = logits(model, ids, attention_mask=ready_mask(model, visible))
    torch.testing.assert_close(logits(model, ids), expected, **CLOSE)


def test_the_mask_matters(model):
    """Guards the tests above: a plain causal model gives other logits in the second block, and only from there."""
    ids, prompt = writer(model).action_sample(3, 7)
    independent = logits(model, ids)
    with configured(model, action_attention="causal"):
        causal = logits(model, ids)
    torch.testing.assert_close(causal[: prompt + 9], independent[: prompt + 9], **CLOSE)
    assert ((causal - independent)[prompt + 9 :].abs().amax(-1) > 0.1).all()


def test_causal_config_is_plain_causal(model):
    ids, _ = writer(model).action_sample(3, 4)
    everything = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    with configured(model, action_attention="causal"):
        actual = logits(model, ids)
    torch.testing.assert_close(actual, logits(model, ids, attention_mask=ready_mask(model, everything)), **CLOSE)


@pytest.mark.parametrize(("rounds", "targets"), [(1, 1), (3, 1), (0, 2)])
def test_world_samples_are_plain_causal(model, rounds, targets):
    ids, _ = writer(model).world_sample(targets, rounds=rounds, cameras=2)
    independent = logits(model, ids)
    with configured(model, action_attention="causal"):
        torch.testing.assert_close(logits(model, ids), independent, **CLOSE)


def test_actions_in_the_prompt_are_visible(model):
    """The prefill of a world prompt with two rounds is the prefix of the teacher-forced sample."""
    ids, prompt = writer(model).world_sample(1, rounds=2)
    whole = logits(model, ids)
    prefill = logits(model, ids[:prompt])
    torch.testing.assert_close(prefill, whole[:prompt], **CLOSE)
    other = list(ids)
    first_bin = ids.index(model.config.vocabulary_map["<reserved10000>"]) + 1
    other[first_bin] = next(token for token in writer(model).bins if token != ids[first_bin])
    changed = (logits(model, other) - whole).abs().amax(-1)
    assert (changed[:first_bin] == 0).all() and (changed[first_bin:] > 1e-3).all()


# -------------------------------------------------------------------- padding, batches, packing


def samples(model: WorldVLAForCausalLM, seed: int = 0) -> list[list[int]]:
    write = writer(model, seed)
    return [
        write.action_sample(3, 7)[0],
        write.world_sample(1, rounds=2, dim=4)[0],
        write.action_sample(5, 4, images=2, length=1)[0],
        write.action_prompt(),
        write.world_sample(2, rounds=0, length=7)[0],
    ]


@pytest.mark.parametrize("seed", range(3))
def test_a_batch_is_its_samples(model, seed):
    rows = samples(model, seed)
    batch = left_pad(model, rows, extra=3)
    with torch.no_grad():
        together = model(**batch).logits
    assert together.isfinite().all()
    for row, ids in enumerate(rows):
        torch.testing.assert_close(together[row, -len(ids) :], logits(model, ids), **CLOSE)


def test_padding_on_the_right_is_as_good(model):
    """What the authors' collator does; it needs no mask, since nothing looks to the right."""
    rows = samples(model)[:3]
    width = max(map(len, rows)) + 2
    ids = torch.tensor([row + [model.config.pad_token_id] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    for inputs in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": mask}):
        with torch.no_grad():
            together = model(**inputs).logits
        for row, expected in enumerate(rows):
            torch.testing.assert_close(together[row, : len(expected)], logits(model, expected), **CLOSE)


@pytest.mark.parametrize("seed", range(3))
def test_packing_is_its_samples(model, seed):
    """Segments in one row, also with a second row that holds others behind padding, and a block cut off in the
    middle."""
    rows = samples(model, seed)
    rows[2] = rows[2][:-4]
    packs = [rows[:3], rows[3:]]
    width = max(sum(map(len, pack)) for pack in packs)
    ids = torch.full((2, width), model.config.pad_token_id)
    seq_idx = torch.full((2, width), -1)
    places = []
    for row, pack in enumerate(packs):
        start = width - sum(map(len, pack))
        for index, sample in enumerate(pack):
            ids[row, start : start + len(sample)] = torch.tensor(sample)
            seq_idx[row, start : start + len(sample)] = index
            places.append((row, start, sample))
            start += len(sample)
    with torch.no_grad():
        together = model(input_ids=ids, seq_idx=seq_idx).logits
    for row, start, sample in places:
        torch.testing.assert_close(together[row, start : start + len(sample)], logits(model, sample), **CLOSE)
    with configured(model, action_attention="causal"), torch.no_grad():
        together = model(input_ids=ids, seq_idx=seq_idx).logits
        for row, start, sample in places:
            torch.testing.assert_close(together[row, start : start + len(sample)], logits(model, sample), **CLOSE)


# -------------------------------------------------------------------- caches


@pytest.mark.parametrize("static", [False, True])
def test_token_by_token_through_a_cache(model, static):
    """A history that the model cannot see any more comes as block ids."""
    rows = [writer(model, seed).action_sample(3, 4, length=2 + seed)[0] for seed in range(2)]
    batch = left_pad(model, rows)
    with torch.no_grad():
        expected = model(**batch).logits
    ids, mask = batch["input_ids"], batch["attention_mask"]
    blocks = model.action_block_ids(ids)
    width = ids.shape[1]
    cache = StaticCache(config=model.config, max_cache_len=width + 3) if static else DynamicCache(config=model.config)
    steps = [0, 5, *range(width - 22, width + 1)]  # a chunk, another, then one by one
    pieces = []
    for start, end in zip(steps, steps[1:], strict=False):
        with torch.no_grad():
            output = model(
                input_ids=ids[:, start:end],
                attention_mask=mask[:, :end],
                action_block_ids=blocks[:, :end],
                past_key_values=cache,
                use_cache=True,
            )
        pieces.append(output.logits)
    keep = mask.bool()
    torch.testing.assert_close(torch.cat(pieces, 1)[keep], expected[keep], **CLOSE)


def test_a_filled_cache_needs_the_history(model):
    ids, prompt = writer(model).action_sample(2, 4)
    with torch.no_grad():
        cache = model(input_ids=torch.tensor([ids[:prompt]]), use_cache=True).past_key_values
        rest = torch.tensor([ids[prompt:]])
        with pytest.raises(
            ValueError, match="pass action_block_ids=model.action_block_ids.all_ids. for the whole hist"
        ):
            model(input_ids=rest, past_key_values=cache)
        with pytest.raises(ValueError, match="packed segments .seq_idx. cannot be continued from a cache"):
            model(input_ids=rest, past_key_values=cache, seq_idx=torch.zeros_like(rest))
        with configured(model, action_attention="causal"):
            model(input_ids=rest, past_key_values=cache)  # a plain causal mask needs none


def test_embeddings_without_ids_need_the_history(model):
    ids, _ = writer(model).action_sample(2, 4)
    embeddings = model.get_input_embeddings()(torch.tensor([ids]))
    with pytest.raises(ValueError, match="behind inputs_embeds: pass action_block_ids"):
        model(inputs_embeds=embeddings)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(input_ids=torch.tensor([ids]), inputs_embeds=embeddings)
    blocks = model.action_block_ids(torch.tensor([ids]))
    with torch.no_grad():
        actual = model(inputs_embeds=embeddings, action_block_ids=blocks).logits[0]
    torch.testing.assert_close(actual, logits(model, ids), **CLOSE)


# -------------------------------------------------------------------- what cannot carry the mask


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flash_attention_3", "kernels-community/flash-attn"])
def test_flash_attention_is_refused(implementation):
    model = tiny_model()
    ids, prompt = writer(model).action_sample(2, 4)
    model.config._attn_implementation = implementation
    with pytest.raises(ValueError, match=f'{implementation} cannot hide action blocks.*attn_implementation="sdpa"'):
        model(input_ids=torch.tensor([ids]))
    with pytest.raises(ValueError, match="sdpa"):
        model.model(input_ids=torch.tensor([ids]))  # the backbone, which trainers may call directly
    with pytest.raises(ValueError, match=f'{implementation} takes no mask.*attn_implementation="sdpa"'):
        model.generate_actions(torch.tensor([ids[:prompt]]), num_actions=1, action_dim=2)


def test_flex_attention_with_a_static_cache_is_refused():
    model = tiny_model(attention="flex_attention")
    prompt = torch.tensor([writer(model).action_prompt()])
    cache = StaticCache(config=model.config, max_cache_len=64)
    with pytest.raises(ValueError, match="flex_attention does not work with a static cache: use a DynamicCache or"):
        model(input_ids=prompt, past_key_values=cache)
    with pytest.raises(ValueError, match="flex_attention does not work with a static cache"):
        model.generate(prompt, max_new_tokens=2, cache_implementation="static")
    with pytest.raises(ValueError, match="flex_attention does not work with a static cache"):
        model.generate_actions(prompt, num_actions=1, action_dim=2, cache_implementation="static")


def test_continuous_batching_is_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match="continuous batching builds its own mask and would drop the action mask"):
        model.init_continuous_batching()
    with pytest.raises(ValueError, match="use generate_actions, or generate.. with a dynamic or static cache"):
        model.generate_batch([writer(model).action_prompt()])


@pytest.mark.slow
def test_flex_attention():
    """Compiles on the CPU for about a minute."""
    fields = {"hidden_size": 64}  # flex wants heads of at least 16
    flex, reference = tiny_model(attention="flex_attention", **fields), tiny_model(**fields)
    batch = left_pad(reference, samples(reference))
    keep = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = reference(**batch).logits[keep]
        torch.testing.assert_close(flex(**batch, use_cache=False).logits[keep], expected, **CLOSE)


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="torch cannot compile flex kernels of changing size on the CPU"
)
def test_flex_attention_with_a_cache():
    fields = {"hidden_size": 64}
    flex, reference = tiny_model(attention="flex_attention", **fields).cuda(), tiny_model(**fields).cuda()
    prompts = left_pad(reference, [writer(reference, seed).action_prompt(length=2 + seed) for seed in range(2)])
    arguments = {**prompts, "num_actions": 3, "action_dim": 3}
    assert torch.equal(flex.generate_actions(**arguments), reference.generate_actions(**arguments))
