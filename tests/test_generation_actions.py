"""Decoding actions: parallel is sequential is the arg max of a plain forward; counted, sampled, always legal,
stateless."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_factory import configured, left_pad, tiny_model, writer

from transformers_worldvla import WorldVLAForCausalLM
from transformers_worldvla.decoding_worldvla import Sampler

EITHER = pytest.mark.parametrize("decoding", ["parallel", "sequential"])
CACHES = ("dynamic", "static")


@pytest.fixture(scope="module")
def model() -> WorldVLAForCausalLM:
    return tiny_model(action_dim=7)


@pytest.fixture(scope="module")
def eager() -> WorldVLAForCausalLM:
    return tiny_model(attention="eager", action_dim=7)


def prompts(model: WorldVLAForCausalLM, lengths: list[int], seed: int = 0) -> list[list[int]]:
    """One prompt for each text length; every second one has two images."""
    write = writer(model, seed)
    return [write.action_prompt(length, 1 + index % 2) for index, length in enumerate(lengths)]


def teacher_forced(model: WorldVLAForCausalLM, prompt: list[int], tokens: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of all legal bins at each bin of one answer, (K, D, 256), from one forward without cache."""
    write = writer(model)
    begin, end = (model.config.vocabulary_map[f"<reserved{number}>"] for number in (10000, 15000))
    count, dim = tokens.shape
    answer = [token for row in tokens.tolist() for token in (begin, *row, end)]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + answer + [write.separator]]), use_cache=False).logits[0]
    first = len(prompt) + torch.arange(count)[:, None] * (dim + 2) + torch.arange(dim)  # predicts the next token
    return logits[first][..., write.bins].log_softmax(-1)


def legal(model: WorldVLAForCausalLM, tokens: torch.Tensor) -> bool:
    return bool(torch.isin(tokens, torch.tensor(writer(model).bins)).all())


# -------------------------------------------------------------------- greedy


@settings(max_examples=20, deadline=None)
@given(
    count=st.integers(1, 12),
    dim=st.integers(4, 14),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    seed=st.integers(0, 2**20),
    use_eager=st.booleans(),
    caches=st.permutations(CACHES),
)
def test_parallel_is_sequential_is_the_arg_max(model, eager, count, dim, lengths, seed, use_eager, caches):
    chosen = eager if use_eager else model
    rows = prompts(chosen, lengths, seed)
    arguments = {**left_pad(chosen, rows), "num_actions": count, "action_dim": dim}
    parallel = chosen.generate_actions(**arguments, cache_implementation=caches[0])
    sequential = chosen.generate_actions(**arguments, decoding="sequential", cache_implementation=caches[1])
    assert parallel.shape == (len(rows), count, dim) and parallel.dtype == torch.long
    assert torch.equal(parallel, sequential)
    bins = torch.tensor(writer(chosen).bins)
    for prompt, tokens in zip(rows, parallel, strict=True):
        assert torch.equal(bins[teacher_forced(chosen, prompt, tokens).argmax(-1)], tokens)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@EITHER
def test_every_way_gives_the_same_actions(model, eager, attention, cache, decoding):
    rows = prompts(model, [3, 8, 1])
    expected = model.generate_actions(**left_pad(model, rows), num_actions=5)
    chosen = model if attention == "sdpa" else eager
    arguments = {"num_actions": 5, "decoding": decoding, "cache_implementation": cache}
    padded = left_pad(model, rows, extra=4)
    assert torch.equal(chosen.generate_actions(**padded, **arguments), expected)
    assert torch.equal(chosen.generate_actions(padded["input_ids"], **arguments), expected)  # <pad> is padding
    for row, prompt in enumerate(rows):  # and alone, where the mask may be left out
        assert torch.equal(chosen.generate_actions(torch.tensor([prompt]), **arguments)[0], expected[row])


def test_answers_differ_between_prompts_and_actions(model):
    """Guards the tests above: the model is not a constant."""
    tokens = model.generate_actions(**left_pad(model, prompts(model, [3, 8, 1, 5])), num_actions=4)
    assert len({tuple(action) for sample in tokens.tolist() for action in sample}) > 8


@EITHER
def test_pictures_in_the_prompt(model, decoding):
    """As pixels or as tokens; a black and a white picture are not the same."""
    write = writer(model)
    prompt = torch.tensor(
        [[model.config.bos_token_id, *write.text(), *write.pixels(), *write.pixels(), write.separator]]
    )
    random = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    answers = []
    for value in (-1.0, 1.0):
        pixels = torch.cat([random, torch.full((1, 3, 32, 32), value)])
        tokens = model.generate_actions(prompt, pixel_values=pixels, num_actions=2, decoding=decoding)
        discrete = model.discretize(prompt, pixels)
        assert torch.equal(model.generate_actions(**discrete, num_actions=2, decoding=decoding), tokens)
        answers.append(tokens)
    assert not torch.equal(*answers)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_causal_models_decode_in_sequence(attention, cache):
    """Under `causal` attention an action sees those before it, whatever the name of the decoding."""
    causal = tiny_model(attention=attention, action_attention="causal", action_dim=5)
    rows = prompts(causal, [2, 6])
    arguments = {**left_pad(causal, rows), "num_actions": 3, "cache_implementation": cache}
    parallel = causal.generate_actions(**arguments)
    assert torch.equal(parallel, causal.generate_actions(**arguments, decoding="sequential"))
    bins = torch.tensor(writer(causal).bins)
    for prompt, tokens in zip(rows, parallel, strict=True):
        assert torch.equal(bins[teacher_forced(causal, prompt, tokens).argmax(-1)], tokens)
    with configured(causal, action_attention="independent"):
        assert not torch.equal(causal.generate_actions(**arguments)[:, 1:], parallel[:, 1:])


# -------------------------------------------------------------------- passes


@pytest.mark.parametrize(("count", "dim"), [(5, 7), (1, 4), (10, 14)])
@pytest.mark.parametrize("cache", CACHES)
def test_number_of_forward_passes(model, count, dim, cache):
    """D for parallel (7 for D = 7, whatever K), (D + 2) K + 1 for sequential: 9K + 1 for D = 7."""
    passes = []
    hook = model.model.layers[0].register_forward_hook(lambda module, args, output: passes.append(output[0].shape))
    try:
        arguments = {**left_pad(model, prompts(model, [2, 4])), "num_actions": count, "action_dim": dim}
        model.generate_actions(**arguments, cache_implementation=cache)
        assert len(passes) == dim
        passes.clear()
        model.generate_actions(**arguments, decoding="sequential", cache_implementation=cache)
        assert len(passes) == (dim + 2) * count + 1
    finally:
        hook.remove()


# -------------------------------------------------------------------- log-probabilities and sampling


@EITHER
@pytest.mark.parametrize("do_sample", [False, True])
def test_log_probabilities(model, decoding, do_sample):
    """Of the chosen bin among all legal ones, under the model itself: before temperature and top-k."""
    rows = prompts(model, [3, 6])
    sampling = {"do_sample": True, "temperature": 0.7, "top_k": 20, "generator": seeded(0)} if do_sample else {}
    output = model.generate_actions(
        **left_pad(model, rows), num_actions=4, decoding=decoding, return_dict_in_generate=True, **sampling
    )
    assert output.logprobs.shape == output.sequences.shape == (2, 4, 7)
    place = {token: index for index, token in enumerate(writer(model).bins)}
    for prompt, tokens, logprobs in zip(rows, output.sequences, output.logprobs, strict=True):
        index = torch.tensor([[place[token] for token in action] for action in tokens.tolist()])
        expected = teacher_forced(model, prompt, tokens).gather(-1, index[..., None])[..., 0]
        torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-5)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@EITHER
def test_a_generator_makes_samples_repeatable(model, decoding):
    arguments = {**left_pad(model, prompts(model, [3])), "num_actions": 3, "do_sample": True, "decoding": decoding}
    first, again, other = (model.generate_actions(**arguments, generator=seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


@EITHER
def test_top_k(model, decoding):
    """One is greedy; k are the k most likely bins."""
    rows = prompts(model, [3, 6])
    arguments = {**left_pad(model, rows), "num_actions": 3, "decoding": decoding}
    greedy = model.generate_actions(**arguments)
    assert torch.equal(model.generate_actions(**arguments, do_sample=True, top_k=1, temperature=5.0), greedy)
    sampled = model.generate_actions(**arguments, do_sample=True, top_k=4, temperature=5.0, generator=seeded(0))
    assert not torch.equal(sampled, greedy)
    bins = torch.tensor(writer(model).bins)
    for prompt, tokens in zip(rows, sampled, strict=True):
        likely = bins[teacher_forced(model, prompt, tokens).topk(4, dim=-1).indices]
        assert (likely == tokens[..., None]).any(-1).all()


@pytest.mark.parametrize(
    ("decoding", "cache"), [("parallel", "dynamic"), ("sequential", "dynamic"), ("parallel", "static")]
)
def test_samples_follow_the_distribution(decoding, cache):
    """First and second bin of two prompts, 2000 draws each: chi square against the teacher-forced probabilities."""
    model = tiny_model(initializer_range=0.1)  # flatter, so that many bins are drawn
    rows = prompts(model, [2, 4])
    draws, sampling = 2000, {"temperature": 0.6, "top_k": 12}
    tokens = model.generate_actions(
        **left_pad(model, rows), num_actions=2, action_dim=2, decoding=decoding, do_sample=True, **sampling,
        num_return_sequences=draws, cache_implementation=cache, generator=seeded(0),
    )  # fmt: skip
    assert tokens.shape == (2 * draws, 2, 2) and legal(model, tokens)
    bins = torch.tensor(writer(model).bins)
    for row, prompt in enumerate(rows):
        answers = tokens[row * draws : (row + 1) * draws]
        for action in range(2):
            expected = sharpened(teacher_forced(model, prompt, answers[0])[action, 0], **sampling)
            assert chi_square(answers[:, action, 0], bins, expected) < 45  # 11 degrees of freedom
            first = answers[:, action, 0].mode().values  # and the second bin behind the most frequent first
            behind = answers[answers[:, action, 0] == first]
            expected = sharpened(teacher_forced(model, prompt, behind[0])[action, 1], **sampling)
            assert chi_square(behind[:, action, 1], bins, expected) < 45


def sharpened(logprobs: torch.Tensor, temperature: float, top_k: int) -> torch.Tensor:
    """Softmax at a temperature over the k best."""
    values, indices = logprobs.topk(top_k)
    return torch.zeros_like(logprobs).scatter(0, indices, (values / temperature).softmax(0))


def chi_square(drawn: torch.Tensor, ids: torch.Tensor, probabilities: torch.Tensor) -> float:
    counts = (drawn[:, None] == ids).sum(0)
    assert counts[probabilities == 0].sum() == 0
    expected = (len(drawn) * probabilities)[probabilities > 0]
    return float(((counts[probabilities > 0] - expected) ** 2 / expected).sum())


@EITHER
def test_num_return_sequences(model, decoding):
    """Answers of one prompt stand next to one another, each with its own log-probabilities."""
    rows = prompts(model, [2, 7, 4])
    output = model.generate_actions(
        **left_pad(model, rows), num_actions=2, action_dim=4, decoding=decoding, do_sample=True, num_return_sequences=3,
        return_dict_in_generate=True, generator=seeded(3),
    )  # fmt: skip
    assert output.sequences.shape == output.logprobs.shape == (9, 2, 4)
    place = {token: index for index, token in enumerate(writer(model).bins)}
    for index, (tokens, logprobs) in enumerate(zip(output.sequences, output.logprobs, strict=True)):
        found = torch.tensor([[place[token] for token in action] for action in tokens.tolist()])
        expected = teacher_forced(model, rows[index // 3], tokens).gather(-1, found[..., None])[..., 0]
        torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-5)
    assert len({tuple(answer.flatten().tolist()) for answer in output.sequences}) == 9


@settings(max_examples=10, deadline=None)
@given(st.floats(0.1, 50.0), st.integers(0, 2**20), st.sampled_from(["parallel", "sequential"]))
def test_always_legal(model, temperature, seed, decoding):
    """However hot: exactly K actions of legal bins, never the unreachable one."""
    tokens = model.generate_actions(
        **left_pad(model, prompts(model, [2])), num_actions=3, action_dim=5, decoding=decoding, do_sample=True,
        temperature=temperature, num_return_sequences=2, generator=seeded(seed),
    )  # fmt: skip
    assert tokens.shape == (2, 3, 5) and legal(model, tokens)
    assert not (tokens == model.config.vocabulary_map["<reserved10001>"]).any()


# -------------------------------------------------------------------- the middle of the likeliest range


def likeliest_range(logprobs: torch.Tensor, window: int) -> tuple[int, float]:
    """By brute force: of all ranges of bins the likeliest, its rounded mean and its log-probability."""
    p = logprobs.double().exp()
    ranges = [slice(max(0, middle - window), middle + window + 1) for middle in range(len(p))]
    best = max(ranges, key=lambda bins: float(p[bins].sum()))
    mean = (p[best] * torch.arange(len(p))[best]).sum() / p[best].sum()
    return round(float(mean)), float(p[best].sum().log())


@pytest.mark.parametrize("window", [1, 12, 200])
@EITHER
def test_a_window_answers_the_mean_of_the_likeliest_range(model, decoding, window):
    """Both ways of decoding, and the log-probability is that of the range; 0 is the arg max."""
    rows = prompts(model, [3, 8, 1])
    arguments = {**left_pad(model, rows), "num_actions": 3, "decoding": decoding}
    answer = model.generate_actions(**arguments, bin_window=window, return_dict_in_generate=True)
    bins = writer(model).bins
    for row, prompt in enumerate(rows):
        logprobs = teacher_forced(model, prompt, answer.sequences[row]).flatten(0, -2)
        for bin_logprobs, token, found in zip(
            logprobs, answer.sequences[row].flatten(), answer.logprobs[row].flatten(), strict=True
        ):
            middle, logprob = likeliest_range(bin_logprobs, window)
            assert abs(bins.index(int(token)) - middle) <= 1, "a half may be rounded either way"
            assert float(found) == pytest.approx(logprob, abs=1e-4)
    plain = model.generate_actions(**arguments)
    assert torch.equal(model.generate_actions(**arguments, bin_window=0), plain)
    with configured(model, action_bin_window=window):
        assert torch.equal(model.generate_actions(**arguments), answer.sequences)
        assert torch.equal(model.generate_actions(**arguments, bin_window=0), plain)


def test_a_window_sees_the_range_where_the_likeliest_bin_is_a_stray():
    """One bin of 0.3 among nothing, twenty neighbours of 0.035: the range is likelier."""
    sampler = Sampler(torch.nn.Linear(1, 256), range(256), window=10)
    p = torch.full((256,), 1e-9)
    p[5], p[100:120] = 0.3, 0.035
    choice, logprob = sampler.likeliest_range(p.log()[None])
    assert int(choice) in (109, 110) and float(logprob.exp()) == pytest.approx(0.7, abs=1e-4)


def test_a_window_does_nothing_to_samples(model):
    arguments = {**left_pad(model, prompts(model, [3, 8])), "num_actions": 2, "do_sample": True}
    one, other = (
        model.generate_actions(**arguments, generator=torch.Generator().manual_seed(3), bin_window=window)
        for window in (0, 9)
    )
    assert torch.equal(one, other)


# -------------------------------------------------------------------- stateless


def test_calls_do_not_remember(model):
    one, two = (left_pad(model, prompts(model, lengths)) for lengths in ([3, 5], [7]))
    first = model.generate_actions(**one, num_actions=3)
    other = model.generate_actions(**two, num_actions=4, action_dim=4, decoding="sequential")
    assert torch.equal(model.generate_actions(**one, num_actions=3), first)
    assert torch.equal(model.generate_actions(**two, num_actions=4, action_dim=4), other)


def test_training_mode_and_gradients_survive(model):
    """Decoding leaves the model trainable: what it returns is no part of a graph, what it used still is."""
    tokens = model.generate_actions(**left_pad(model, prompts(model, [3])), num_actions=2)
    assert not tokens.requires_grad
    loss = model(input_ids=torch.tensor(prompts(model, [3]))).logits.sum()
    loss.backward()
    assert model.lm_head.weight.grad is not None
    model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@EITHER
def test_half_precision(dtype, decoding):
    model = tiny_model(action_dim=4).to(dtype)
    rows = left_pad(model, prompts(model, [2, 5]))
    output = model.generate_actions(**rows, num_actions=3, decoding=decoding, return_dict_in_generate=True)
    assert legal(model, output.sequences)
    assert output.logprobs.dtype == torch.float32 and (output.logprobs <= 0).all()


def test_a_head_that_is_no_plain_linear(model):
    """An adapted or quantised head has no rows to slice: it is applied whole."""

    class Wrapped(torch.nn.Linear):
        pass

    expected = model.generate_actions(**left_pad(model, prompts(model, [3])), num_actions=2)
    wrapped = tiny_model(action_dim=7)
    head = Wrapped(wrapped.config.hidden_size, wrapped.config.vocab_size, bias=False)
    head.load_state_dict(wrapped.lm_head.state_dict())
    wrapped.lm_head = head
    assert torch.equal(wrapped.generate_actions(**left_pad(model, prompts(model, [3])), num_actions=2), expected)


# -------------------------------------------------------------------- wrong calls


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_actions": 0}, "num_actions and action_dim are at least 1, not 0 and 7"),
        ({"action_dim": 0}, "num_actions and action_dim are at least 1, not 2 and 0"),
        ({"decoding": "beam"}, 'decoding is "parallel" or "sequential", not \'beam\''),
        ({"num_return_sequences": 2}, "num_return_sequences > 1 needs do_sample=True"),
        ({"num_return_sequences": 0}, "num_return_sequences is at least 1, not 0"),
        ({"do_sample": True, "temperature": 0.0}, "temperature is positive, not 0.0: use do_sample=False"),
        ({"do_sample": True, "top_k": 0}, "top_k is at least 1, not 0: leave it out"),
        ({"bin_window": -1}, "a window of bins is at least 0, not -1"),
        ({"cache_implementation": "paged"}, 'cache_implementation is "dynamic" or "static", not \'paged\''),
    ],
)
def test_wrong_arguments(model, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        model.generate_actions(torch.tensor(prompts(model, [3])), **{"num_actions": 2, **arguments})
    assert "\n" not in str(error.value)


def test_no_action_dimension():
    model = tiny_model()
    with pytest.raises(ValueError, match="pass action_dim="):
        model.generate_actions(torch.tensor(prompts(model, [3])), num_actions=2)


def test_prompts_that_cannot_be_continued(model):
    prompt = prompts(model, [3])[0]
    with pytest.raises(ValueError, match="a prompt ends with the separator token: call the processor without targets"):
        model.generate_actions(torch.tensor([prompt[:-1]]), num_actions=2)
    padded = torch.tensor([[*prompt, model.config.pad_token_id]])
    with pytest.raises(ValueError, match="pad prompts on the left"):
        model.generate_actions(padded, num_actions=2)
    with pytest.raises(ValueError, match="pad prompts on the left"):
        model.generate_actions(padded, (padded != model.config.pad_token_id).long(), num_actions=2)
    pixels = torch.zeros(2, 3, 32, 32)
    with pytest.raises(ValueError, match="2 pictures for 0 image blocks with placeholders"):
        model.generate_actions(torch.tensor([prompt]), pixel_values=pixels, num_actions=2)
