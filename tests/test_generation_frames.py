"""Decoding frames: the forced format, a slow reference that runs the whole sequence for each code, and exact drafts."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from model_factory import left_pad, tiny_model, writer

from transformers_worldvla import WorldVLAForCausalLM

CACHES = ("dynamic", "static")


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request) -> WorldVLAForCausalLM:
    return tiny_model(attention=request.param)


@pytest.fixture(scope="module")
def repeating() -> WorldVLAForCausalLM:
    """A model that likes some codes much more than others, so that part of a draft is accepted and part is not."""
    return favouring(tiny_model(seed=1), count=3, strength=3.0)


def favouring(model: WorldVLAForCausalLM, count: int, strength: float) -> WorldVLAForCausalLM:
    """Make `count` codes more likely everywhere, by hidden states that share a direction."""
    with torch.no_grad():
        model.model.norm.weight[0] = strength
        model.model.embed_tokens.weight[:, 0] = 3.0
        model.lm_head.weight[:, 0] *= 0.3
        model.lm_head.weight[writer(model).codes[:count], 0] = 1.0
    return model


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def slow_reference(
    model: WorldVLAForCausalLM, prompt: list[int], grid: tuple[int, int], images: int
) -> tuple[list[list[int]], list[float]]:
    """Greedy image blocks, code by code: the whole sequence through the model, no cache, the head masked to codes."""
    write = writer(model)
    not_codes = torch.ones(model.config.vocab_size, dtype=torch.bool)
    not_codes[write.codes] = False
    ids, blocks, logprobs = list(prompt), [], []
    for _ in range(images):
        blocks.append([])
        for token in write.image(grid, [-1] * (4 * grid[0] * grid[1])):
            logprobs.append(0.0)
            if token == -1:
                with torch.no_grad():
                    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
                scores = logits.masked_fill(not_codes, -torch.inf).log_softmax(-1)
                token = int(scores.argmax())
                logprobs[-1] = float(scores[token])
            ids.append(token)
            blocks[-1].append(token)
    return blocks, logprobs


def favoured_prompts(
    model: WorldVLAForCausalLM, seed: int, batch: int, grid: tuple[int, int] = (1, 1)
) -> list[list[int]]:
    """World prompts of different lengths, whose frames hold likely codes and others."""
    write = writer(model, seed)
    rows = []
    for index in range(batch):
        codes = write.rng.choice(write.codes[:4], 4 * grid[0] * grid[1]).tolist()
        text = write.text(1 + index * 2)
        rows.append([write.ids["<s>"], *text, *write.image(grid, codes), *write.action(3 + index % 2), write.separator])
    return rows


# -------------------------------------------------------------------- the format and the reference


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("grid", [(1, 1), (2, 1), (1, 3)])
def test_world_prompts_against_the_slow_reference(model, grid, cache):
    write = writer(model)
    rows = [write.world_prompt(rounds, grid=grid, length=2 + rounds) for rounds in (1, 2)]
    output = model.generate_frames(**left_pad(model, rows), cache_implementation=cache, return_dict_in_generate=True)
    length = len(write.image(grid))
    assert output.sequences.shape == output.logprobs.shape == (2, 1, length)
    for prompt, frames, logprobs in zip(rows, output.sequences, output.logprobs, strict=True):
        expected, scores = slow_reference(model, prompt, grid, 1)
        assert frames.tolist() == expected
        torch.testing.assert_close(logprobs.flatten(), torch.tensor(scores), rtol=0, atol=1e-5)
        codes = model.tokens.parse_image_block(frames[0].tolist())
        assert codes.shape == (2 * grid[0], 2 * grid[1])


def test_frames_of_several_cameras(model):
    """A world prompt shows its number of cameras: images to actions."""
    prompt = writer(model).world_prompt(rounds=2, cameras=2)
    frames = model.generate_frames(torch.tensor([prompt]))
    assert frames.shape == (1, 2, 10)
    assert frames[0].tolist() == slow_reference(model, prompt, (1, 1), 2)[0]


@pytest.mark.parametrize(("frames", "cameras"), [(2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("drafting", [{}, {"draft": "previous"}, {"draft": "previous", "draft_window": 2}])
@pytest.mark.parametrize("cache", CACHES)
def test_video_prediction(frames, cameras, drafting, cache):
    """No action in the prompt: several frames may follow, C pictures each as the config says."""
    model = tiny_model(num_cameras=cameras)
    rows = [writer(model, seed).action_prompt(2 + seed, images=2) for seed in range(2)]
    batch = left_pad(model, rows)
    output = model.generate_frames(**batch, num_frames=frames, cache_implementation=cache, **drafting)
    assert output.shape == (2, frames * cameras, 10)
    for prompt, sample in zip(rows, output, strict=True):
        assert sample.tolist() == slow_reference(model, prompt, (1, 1), frames * cameras)[0]


@pytest.mark.parametrize("draft", [None, "previous"])
def test_pictures_in_the_prompt(model, draft):
    write = writer(model)
    prompt = torch.tensor([[write.ids["<s>"], *write.text(), *write.pixels((2, 1)), *write.action(), write.separator]])
    answers = []
    for value in (-1.0, 1.0):
        pixels = torch.full((1, 3, 64, 32), value)
        frames = model.generate_frames(prompt, pixel_values=pixels, draft=draft)
        assert torch.equal(model.generate_frames(**model.discretize(prompt, pixels), draft=draft), frames)
        answers.append(frames)
    assert not torch.equal(*answers)


def test_generated_frames_are_pictures(model):
    frames = model.generate_frames(torch.tensor([writer(model).world_prompt(grid=(2, 1))]))
    pixels = model.detokenize_images(frames[0])
    assert pixels.shape == (1, 3, 64, 32) and pixels.abs().max() <= 1
    codes = torch.tensor(model.tokens.parse_image_block(frames[0, 0].tolist()))[None]
    assert torch.equal(model.detokenize_images(codes), pixels)


def test_frames_have_the_size_of_the_newest(model):
    write = writer(model)
    prompt = [write.ids["<s>"], *write.image((1, 1)), *write.action(), *write.image((1, 2)), *write.action()]
    frames = model.generate_frames(torch.tensor([[*prompt, write.separator]]))
    assert frames.shape == (1, 1, len(write.image((1, 2))))


@pytest.mark.parametrize("temperature", [0.5, 20.0])
@pytest.mark.parametrize("draft", [None, "previous"])
def test_sampled_frames_keep_the_format(model, temperature, draft):
    rows = [writer(model, seed).world_prompt(grid=(1, 2), length=1 + seed) for seed in range(3)]
    arguments = {**left_pad(model, rows), "do_sample": True, "temperature": temperature, "draft": draft}
    frames = model.generate_frames(**arguments, generator=seeded(1))
    for block in frames[:, 0].tolist():
        model.tokens.parse_image_block(block)  # raises on anything that is none
    assert torch.equal(model.generate_frames(**arguments, generator=seeded(1)), frames)
    assert not torch.equal(model.generate_frames(**arguments, generator=seeded(2)), frames)


def test_number_of_forward_passes(model):
    """One for each code; newlines and other forced tokens ride along."""
    passes = []
    hook = model.model.layers[0].register_forward_hook(lambda *_: passes.append(1))
    try:
        model.generate_frames(torch.tensor([writer(model).world_prompt(grid=(2, 2))]))
    finally:
        hook.remove()
    assert len(passes) == 16


# -------------------------------------------------------------------- drafts


@settings(max_examples=25, deadline=None)
@example(batch=2, window=1, grid=(2, 2), caches=["dynamic", "static"], seed=0)
@given(
    batch=st.integers(1, 4),
    window=st.integers(1, 32),
    grid=st.sampled_from([(1, 1), (1, 2), (2, 2)]),
    caches=st.permutations(CACHES),
    seed=st.integers(0, 2**20),
)
def test_greedy_drafts_change_nothing(repeating, batch, window, grid, caches, seed):
    inputs = left_pad(repeating, favoured_prompts(repeating, seed, batch, grid))
    plain = repeating.generate_frames(**inputs, cache_implementation=caches[0], return_dict_in_generate=True)
    drafted = repeating.generate_frames(
        **inputs, draft="previous", draft_window=window, cache_implementation=caches[1], return_dict_in_generate=True
    )
    assert torch.equal(drafted.sequences, plain.sequences)
    torch.testing.assert_close(drafted.logprobs, plain.logprobs, rtol=0, atol=1e-4)


def test_drafts_are_accepted_in_part(repeating):
    """Guards the test above, and is what drafts are for: fewer passes than codes, yet some proposals are wrong."""
    passes, shares = [], []
    hook = repeating.model.layers[0].register_forward_hook(lambda *_: passes.append(1))
    try:
        for seed in range(6):
            (prompt,) = favoured_prompts(repeating, seed, 1, (2, 2))
            passes.clear()
            frames = repeating.generate_frames(torch.tensor([prompt]), draft="previous", draft_window=8)
            start = prompt.index(repeating.config.vocabulary_map["<racm3:break>"])
            proposed = torch.tensor(prompt[start : start + frames.shape[-1]])
            free = torch.isin(frames[0, 0], torch.tensor(writer(repeating).codes))
            shares.append(float((proposed == frames[0, 0])[free].float().mean()))
            assert len(passes) <= 17
            if shares[-1] > 0.5:
                assert len(passes) < 16
    finally:
        hook.remove()
    assert 0 < sum(shares) < len(shares)


def test_a_right_draft_is_read_in_few_passes():
    """A frame that repeats itself: the prefill and one pass for each window."""
    model = favouring(tiny_model(seed=1), count=1, strength=1.0)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1000.0  # drowns everything else
    write = writer(model)
    still = write.image((2, 2), [write.codes[0]] * 16)
    prompt = [write.ids["<s>"], *write.text(), *still, *write.action(), write.separator]
    passes = []
    model.model.layers[0].register_forward_hook(lambda *_: passes.append(1))
    frames = model.generate_frames(torch.tensor([prompt]), draft="previous", draft_window=10)
    assert frames[0, 0].tolist() == still
    assert len(passes) == 1 + 2  # the last code is the 19th token behind <boi> and the grid


@pytest.mark.parametrize("cache", CACHES)
def test_sampled_drafts_keep_the_distribution(cache):
    """Four codes of an image, 1500 images with and without draft: every pair of codes is distributed alike."""
    model = favouring(tiny_model(seed=2, num_codes=5, initializer_range=0.15), count=2, strength=1.0)
    rows = favoured_prompts(model, 3, 1)
    draws = 1500
    inputs = {name: value.expand(draws, -1) for name, value in left_pad(model, rows, extra=2).items()}
    arguments = {**inputs, "do_sample": True, "temperature": 0.8, "top_k": 4, "cache_implementation": cache}
    plain = model.generate_frames(**arguments, generator=seeded(0))
    free = torch.isin(plain[0, 0], torch.tensor(writer(model).codes))
    plain = plain[:, 0, free]  # (draws, 4)
    with torch.no_grad():  # the first code has an exact distribution
        prefix = torch.tensor([rows[0] + writer(model).image()[:3]])
        logits = model(input_ids=prefix).logits[0, -1, writer(model).codes] / 0.8
        kept = logits.topk(4)
        expected = dict(
            zip([writer(model).codes[i] for i in kept.indices], kept.values.softmax(0).tolist(), strict=True)
        )
    for window in (1, 3, 16) if cache == "dynamic" else (3,):
        drafted = model.generate_frames(**arguments, draft="previous", draft_window=window, generator=seeded(1))
        drafted = drafted[:, 0, free]
        statistic = sum((int((drafted[:, 0] == t).sum()) - draws * p) ** 2 / (draws * p) for t, p in expected.items())
        assert statistic < 30  # 3 degrees of freedom
        for left in range(4):  # every pair of codes, jointly
            for right in range(left + 1, 4):
                assert two_samples(plain[:, [left, right]], drafted[:, [left, right]]) < 70  # at most 24


def two_samples(one: torch.Tensor, two: torch.Tensor) -> float:
    """Chi square of homogeneity between two equally large samples of rows, rare rows together."""
    rows, index = torch.cat([one, two]).unique(dim=0, return_inverse=True)
    counts = torch.stack(
        [index[: len(one)].bincount(minlength=len(rows)), index[len(one) :].bincount(minlength=len(rows))]
    )
    rare = counts.sum(0) < 10
    counts = torch.cat([counts[:, ~rare], counts[:, rare].sum(1, keepdim=True)], dim=1).double()
    counts = counts[:, counts.sum(0) > 0]
    return float(((counts[0] - counts[1]) ** 2 / counts.sum(0)).sum())


def test_the_two_sample_test_can_fail():
    draw = torch.randint(0, 5, (1500, 2), generator=seeded(0))
    other = torch.where(torch.rand(1500, 1, generator=seeded(1)) < 0.2, torch.zeros_like(draw), draw)
    assert two_samples(draw, torch.randint(0, 5, (1500, 2), generator=seeded(2))) < 70 < two_samples(draw, other)


def test_sampled_draft_log_probabilities():
    """Of the chosen codes under the model itself, as without a draft."""
    model = favouring(tiny_model(seed=1), count=3, strength=3.0)
    rows = favoured_prompts(model, 0, 3, (1, 2))
    output = model.generate_frames(
        **left_pad(model, rows), do_sample=True, draft="previous", draft_window=5, return_dict_in_generate=True,
        generator=seeded(0),
    )  # fmt: skip
    codes = torch.tensor(writer(model).codes)
    for prompt, block, logprobs in zip(rows, output.sequences[:, 0], output.logprobs[:, 0], strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + block.tolist()])).logits[0, len(prompt) - 1 : -1]
        scores = logits[:, codes].log_softmax(-1)
        for token, score, logprob in zip(block, scores, logprobs, strict=True):
            expected = score[codes == token] if token in codes else torch.zeros(1)
            torch.testing.assert_close(logprob[None], expected, rtol=0, atol=1e-4)


# -------------------------------------------------------------------- stateless, wrong calls


@pytest.mark.parametrize("draft", [None, "previous"])
def test_calls_do_not_remember(model, draft):
    one, two = ({"input_ids": torch.tensor([writer(model, seed).world_prompt()])} for seed in (1, 2))
    first, other = (model.generate_frames(**inputs, draft=draft) for inputs in (one, two))
    assert torch.equal(model.generate_frames(**one), first)
    assert torch.equal(model.generate_frames(**two), other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_frames": 2}, "a world-model prompt answers with one frame: use model.imagine"),
        ({"num_frames": 0}, "num_frames and draft_window are at least 1, not 0 and 16"),
        ({"draft_window": 0}, "num_frames and draft_window are at least 1, not 1 and 0"),
        ({"draft": "next"}, "draft is \"previous\" or None, not 'next'"),
        ({"do_sample": True, "temperature": -1.0}, "temperature is positive"),
        ({"cache_implementation": "none"}, 'cache_implementation is "dynamic" or "static"'),
    ],
)
def test_wrong_arguments(model, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        model.generate_frames(torch.tensor([writer(model).world_prompt()]), **arguments)
    assert "\n" not in str(error.value)


def test_prompts_that_do_not_fit_together(model):
    write = writer(model)
    sizes = left_pad(model, [write.world_prompt(grid=(1, 2)), write.world_prompt(grid=(2, 1))])
    with pytest.raises(ValueError, match="prompts of one batch must ask for images of one size and number"):
        model.generate_frames(**sizes)
    cameras = left_pad(model, [write.world_prompt(cameras=2), write.world_prompt()])
    with pytest.raises(ValueError, match="prompts of one batch must ask for images of one size and number"):
        model.generate_frames(**cameras)
    mixed = [write.ids["<s>"], *write.image((1, 1)), *write.image((1, 2)), *write.action(), write.separator]
    with pytest.raises(ValueError, match="the cameras of a time step must have one image size"):
        model.generate_frames(torch.tensor([mixed]))
    with pytest.raises(ValueError, match="the prompt holds no image"):
        model.generate_frames(torch.tensor([[write.ids["<s>"], *write.text(), write.separator]]))
    with pytest.raises(ValueError, match="a prompt ends with the separator token"):
        model.generate_frames(torch.tensor([write.world_sample()[0][:-3]]))
