"""The engine gives the answers of the modules, leaves the weights where they are, and prefixes continue losslessly."""

from copy import deepcopy

import pytest
import torch
from model_factory import left_pad, tiny_model, writer

from transformers_worldvla import WorldVLAForCausalLM
from transformers_worldvla.cache_worldvla import KeyValueStore, Prefix
from transformers_worldvla.engine_worldvla import BUCKET, Engine, EngineOptions, fuse_rows


@pytest.fixture
def model() -> WorldVLAForCausalLM:
    return tiny_model(action_dim=7)


def with_engine(model: WorldVLAForCausalLM, **options) -> WorldVLAForCausalLM:
    """A copy whose forwards go through the plain functions, not compiled."""
    copy = deepcopy(model)
    copy.engine = Engine(EngineOptions(compile=False, **options)).attach(copy)
    return copy


def prompts(model: WorldVLAForCausalLM, seed: int = 0) -> dict[str, torch.Tensor]:
    write = writer(model, seed)
    return left_pad(model, [write.action_prompt(3, 2), write.action_prompt(7, 2), write.action_prompt(1, 2)])


def passes(model: WorldVLAForCausalLM) -> list[int]:
    """Fills with the tokens of each forward of the modules."""
    seen: list[int] = []
    model.model.layers[0].register_forward_hook(lambda module, args, output: seen.append(output[0].shape[1]))
    return seen


# -------------------------------------------------------------------- the functions


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("decoding", ["parallel", "sequential"])
def test_actions_are_those_of_the_modules(fuse, heads, decoding):
    model = tiny_model(action_dim=7, num_key_value_heads=heads)
    arguments = {**prompts(model), "num_actions": 4, "decoding": decoding, "return_dict_in_generate": True}
    expected = model.generate_actions(**arguments)
    seen = passes(fast := with_engine(model, fuse=fuse))
    answer = fast.generate_actions(**arguments)
    assert torch.equal(answer.sequences, expected.sequences)
    torch.testing.assert_close(answer.logprobs, expected.logprobs, rtol=0, atol=1e-4)
    assert not seen  # guards the comparison: no module ran


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("draft", [None, "previous"])
def test_frames_are_those_of_the_modules(model, draft, cache):
    write = writer(model)
    batch = left_pad(model, [write.world_prompt(grid=(2, 1), length=2 + row) for row in range(3)])
    expected = model.generate_frames(**batch)
    fast = with_engine(model)
    assert torch.equal(fast.generate_frames(**batch, draft=draft, cache_implementation=cache), expected)


def test_samples_come_from_the_same_distribution(model):
    """Log-probabilities of sampled bins, under the modules: what the engine reports."""
    fast = with_engine(model)
    generator = torch.Generator().manual_seed(0)
    arguments = {"num_actions": 3, "do_sample": True, "num_return_sequences": 4, "return_dict_in_generate": True}
    answer = fast.generate_actions(**prompts(model), **arguments, generator=generator)
    again = model.generate_actions(**prompts(model), **arguments, generator=torch.Generator().manual_seed(0))
    assert torch.equal(answer.sequences, again.sequences)
    torch.testing.assert_close(answer.logprobs, again.logprobs, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_compiled_layers_give_the_same_answers(model):
    expected = model.generate_actions(**prompts(model), num_actions=4)
    model.enable_engine()
    model.warm_up(40, num_actions=4)
    seen = passes(model)
    assert torch.equal(model.generate_actions(**prompts(model), num_actions=4), expected)
    assert not seen
    model.disable_engine()
    model.generate_actions(**prompts(model), num_actions=4)
    assert len(seen) == 7


def test_a_layer_compiles_as_one_graph(model):
    """No break in either function of a layer: nothing falls back to Python between kernels."""
    from torch._dynamo.testing import CompileCounter

    from transformers_worldvla import engine_worldvla

    engine = Engine(EngineOptions(compile=False)).attach(model)
    for name in ("project", "complete"):
        counter = CompileCounter()
        torch._dynamo.reset()
        compiled = torch.compile(getattr(engine_worldvla, name), backend=counter, fullgraph=True, dynamic=False)
        hidden, table = torch.randn(1, 3, 32), torch.randn(1, 1, 3, 8)
        for weights in engine.layers:  # all layers share it
            if name == "project":
                compiled(weights, hidden, table, table, engine.eps)
            else:
                compiled(weights, hidden, torch.randn(1, 4, 3, 8), engine.eps)
        assert counter.frame_count == 1


def test_on_a_cpu_without_compilation_the_modules_run(model):
    model.enable_engine(compile=False)
    seen = passes(model)
    model.warm_up([20, 40], num_actions=2)
    assert len(seen) == 14


# -------------------------------------------------------------------- weights


def test_fused_weights_are_the_same_parameters(model, tmp_path):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    fast = Engine(EngineOptions(compile=False)).attach(model)
    assert dict(model.named_parameters()).keys() == parameters.keys()
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    attention = model.model.layers[0].self_attn
    assert fast.layers[0].qkv[0].data_ptr() == attention.q_proj.weight.data_ptr()  # no copy
    torch.testing.assert_close(fast.layers[0].qkv[0][32:64], attention.k_proj.weight)
    model.save_pretrained(tmp_path)
    loaded = WorldVLAForCausalLM.from_pretrained(tmp_path)
    for name, value in loaded.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    model.load_state_dict(before)
    torch.testing.assert_close(fast.layers[0].qkv[0][:32], before["model.layers.0.self_attn.q_proj.weight"])


def test_training_reaches_the_engine(model):
    """An optimizer changes fused weights in place; the next answer is that of the new weights."""
    fast = with_engine(model)
    before = fast.generate_actions(**prompts(model), num_actions=3)
    optimizer = torch.optim.SGD(fast.parameters(), lr=0.5)
    fast(prompts(model)["input_ids"]).logits.square().mean().backward()
    optimizer.step()
    after = fast.generate_actions(**prompts(model), num_actions=3)
    fast.engine = None
    assert torch.equal(after, fast.generate_actions(**prompts(model), num_actions=3))
    assert not torch.equal(after, before)


def test_weights_that_moved_are_found_again(model):
    fast = with_engine(model).to(torch.float64)
    expected = deepcopy(model).to(torch.float64).generate_actions(**prompts(model), num_actions=3)
    assert torch.equal(fast.generate_actions(**prompts(model), num_actions=3), expected)
    assert fast.engine.layers[0].out.dtype == torch.float64


def test_fusing_twice_takes_the_same_memory():
    linears = [torch.nn.Linear(4, rows, bias=False) for rows in (2, 6)]
    first = fuse_rows(linears)
    assert fuse_rows(linears).data_ptr() == first.data_ptr()
    torch.testing.assert_close(fuse_rows(linears)[2:], linears[1].weight.data)


def test_models_that_the_engine_does_not_know(model):
    model.model.layers[1].mlp.up_proj = torch.nn.Sequential(model.model.layers[1].mlp.up_proj)
    with pytest.raises(ValueError, match="the engine needs plain linear layers, not Sequential: merge adapters first"):
        model.enable_engine()
    with pytest.raises(ValueError, match="pre-norm layers with silu only"):
        tiny_model(swin_norm=True).enable_engine()
    with pytest.raises(ValueError, match="no biases of linear layers"):
        tiny_model(attention_bias=True).enable_engine()


def test_buckets_change_no_answer(model):
    """What graphs are captured for: prompts padded on the left to a multiple of the bucket."""
    batch = prompts(model)
    engine = Engine(EngineOptions(compile=False)).attach(model)
    ids, mask = engine.bucketed(batch["input_ids"], batch["attention_mask"], model.tokens.pad)
    assert ids.shape[1] % BUCKET == 0 and ids.shape == mask.shape
    expected = model.generate_actions(**batch, num_actions=3)
    assert torch.equal(model.generate_actions(ids, mask, num_actions=3), expected)


# -------------------------------------------------------------------- prefixes


def split(batch: dict[str, torch.Tensor], model: WorldVLAForCausalLM, newest: int) -> dict[str, torch.Tensor]:
    """The prompts without the `newest` last tokens before the separator."""
    rows = Prefix.rows(batch["input_ids"], batch["attention_mask"])
    return left_pad(model, [[*row[: -1 - newest], row[-1]] for row in rows])


@pytest.mark.parametrize("through_engine", [False, True])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("newest", [1, 10, 12])
def test_a_prefix_changes_nothing(model, newest, cache, through_engine):
    batch = prompts(model)
    expected = model.generate_actions(**batch, num_actions=4, return_dict_in_generate=True)
    chosen = with_engine(model) if through_engine else model
    prefix = chosen.prefill_actions(**split(batch, model, newest))
    for _ in range(2):  # a prefix is not used up
        answer = chosen.generate_actions(
            **batch, num_actions=4, prefix=prefix, cache_implementation=cache, return_dict_in_generate=True
        )
        assert torch.equal(answer.sequences, expected.sequences)
        torch.testing.assert_close(answer.logprobs, expected.logprobs, rtol=0, atol=1e-4)


def test_a_prefix_saves_its_tokens(model):
    """Its block is not run again: the rest of the prompt and a start token for each action."""
    (prompt,) = Prefix.rows(*(value[:1] for value in prompts(model).values()))
    block = len(writer(model).image())
    seen = passes(model)
    whole = torch.tensor([prompt])
    prefix = model.prefill_actions(torch.tensor([[*prompt[: -1 - block], prompt[-1]]]))
    model.generate_actions(whole, num_actions=5, prefix=prefix)
    assert seen == [len(prompt) - block - 1, block + 1 + 5, *[5] * 6]
    assert len(prefix) == len(prompt) - block - 1


def test_one_prefix_for_a_batch_of_frames(model):
    write = writer(model)
    start = [write.ids["<s>"], *write.text(), *write.image((2, 1))]
    rows = [[*start, *write.action(dim), write.separator] for dim in (7, 7, 9)]
    batch = left_pad(model, rows)
    prefix = model.prefill_actions(torch.tensor([[*start, write.separator]]))
    for draft in (None, "previous"):
        expected = model.generate_frames(**batch, draft=draft)
        assert torch.equal(model.generate_frames(**batch, prefix=prefix, draft=draft), expected)


def test_prompts_that_do_not_continue_the_prefix(model):
    batch = prompts(model)
    prefix = model.prefill_actions(**split(batch, model, 10))
    assert prefix.matches(**batch)
    for other in (prompts(model, seed=1), {name: value[:2] for name, value in batch.items()}):
        assert not prefix.matches(**other)
        with pytest.raises(ValueError, match="the prompt does not begin with the prefix"):
            model.generate_actions(**other, num_actions=2, prefix=prefix)
    again = prefix.holding([one.clone() for one in prefix.tensors()])
    expected = model.generate_actions(**batch, num_actions=2)
    assert torch.equal(model.generate_actions(**batch, num_actions=2, prefix=again), expected)


@pytest.mark.parametrize("through_engine", [False, True])
def test_the_last_layer_computes_what_is_read(model, through_engine):
    """Of a prompt, the positions of the start tokens: the others are keys and values only."""
    chosen = with_engine(model) if through_engine else model
    rows: list[int] = []
    if through_engine:
        after = chosen.engine.step[1]
        chosen.engine.step = (
            chosen.engine.step[0],
            lambda weights, hidden, *rest: rows.append(hidden.shape[1]) or after(weights, hidden, *rest),
        )
        chosen.engine.sequence = chosen.engine.step
    else:
        for layer in chosen.model.layers:
            layer.register_forward_hook(lambda module, args, output: rows.append(output[0].shape[1]))
    batch = prompts(model)
    chosen.generate_actions(**batch, num_actions=3)
    length = batch["input_ids"].shape[1]
    assert rows[:4] == [length + 3, 3, 3, 3]


# -------------------------------------------------------------------- drafts, the store


def test_a_draft_of_ones_own(model):
    """Any draft gives the greedy answer; the right one in few forwards."""
    write = writer(model)
    batch = left_pad(model, [write.world_prompt(grid=(2, 2)), write.world_prompt(grid=(2, 2), length=6)])
    expected = model.generate_frames(**batch)
    seen = passes(model)
    assert torch.equal(model.generate_frames(**batch, draft=expected, draft_window=10), expected)
    assert len(seen) == 3  # the prefill, and two windows for 20 tokens behind the grid
    wrong = expected.roll(1, dims=0)
    assert torch.equal(model.generate_frames(**batch, draft=wrong, draft_window=10), expected)
    with pytest.raises(ValueError, match="a draft has the shape of the answer"):
        model.generate_frames(**batch, draft=expected[:1])


def test_the_window_follows_what_is_accepted(model):
    """After rejections it is narrow, so that little is computed in vain; it never exceeds the limit."""
    write = writer(model)
    prompt = torch.tensor([write.world_prompt(grid=(2, 2))])
    expected = model.generate_frames(prompt)
    codes = torch.tensor(writer(model).codes)
    wrong = torch.where(torch.isin(expected, codes), codes[(expected == codes[0]).long()], expected)
    seen = passes(model)
    assert torch.equal(model.generate_frames(prompt, draft=wrong, draft_window=16), expected)
    assert seen[1] == 16 and max(seen[1:]) == 16
    assert seen[-1] == 4


def test_the_store_reads_what_was_written():
    """Against a plain tensor: appended columns, then columns of each row's own."""
    store = KeyValueStore(1, capacity=6, static=False)
    expected = torch.zeros(2, 3, 6, 4)
    first = torch.randn(2, 3, 2, 4)
    store.aim(2)
    keys, values = store.update(first, -first, 0)
    expected[:, :, :2] = first
    torch.testing.assert_close(keys, expected[:, :, :2])
    torch.testing.assert_close(values, -expected[:, :, :2])
    columns, more = torch.tensor([[1, 2], [4, 3]]), torch.randn(2, 3, 2, 4)
    store.aim(2, columns, filled=5)
    keys, _ = store.update(more, more, 0)
    for row in range(2):
        for place in range(2):
            expected[row, :, columns[row, place]] = more[row, :, place]
    torch.testing.assert_close(keys, expected[:, :, :5])
    store.repeat(2)
    assert store.keys[0].shape[0] == 4
    torch.testing.assert_close(store.keys[0][1], expected[0])
