"""transformers' own `generate()`: every cache, beams, padding, pictures; the arg max of teacher-forced forwards.

And `imagine`, which joins the processor with `generate_frames`.
"""

import numpy as np
import pytest
import torch
from model_factory import configured, left_pad, tiny_model, writer
from PIL import Image
from sequences import ARM, libero_processor
from transformers.cache_utils import DynamicCache

from transformers_worldvla import WorldVLAForCausalLM, WorldVLAProcessor

WAYS = [{}, {"use_cache": False}, {"cache_implementation": "static"}]


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request) -> WorldVLAForCausalLM:
    """Prefers tokens of the action grammar, so that free generation opens and closes blocks."""
    model = tiny_model(attention=request.param)
    names = model.config.vocabulary_map
    with torch.no_grad():
        model.lm_head.weight[[names["<reserved10000>"], names["<reserved15000>"]]] *= 4
    return model


def rows_of(model: WorldVLAForCausalLM) -> list[list[int]]:
    write = writer(model)
    begun = write.action_prompt(3) + write.action(4) + write.action(4)[:2]  # one action done, the second one open
    return [write.action_prompt(2, images=2), begun, write.world_prompt(1)]


def generate(model: WorldVLAForCausalLM, count: int = 24, **inputs) -> torch.Tensor:
    arguments = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, **inputs}
    return model.generate(**arguments)


def assert_arg_max(model: WorldVLAForCausalLM, prompt: list[int], answer: list[int], eos: int) -> None:
    """Every generated token is the best one behind the tokens before it, in one forward without cache.

    `min_new_tokens` keeps generation going: the separator may not be chosen.
    """
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    logits[:, eos] = -torch.inf
    assert logits.argmax(-1).tolist() == answer


@pytest.mark.parametrize("way", WAYS)
def test_greedy_is_the_arg_max(model, way):
    rows = rows_of(model)
    batch = left_pad(model, rows)
    answers = generate(model, **batch, **way)[:, batch["input_ids"].shape[1] :]
    for prompt, answer in zip(rows, answers.tolist(), strict=True):
        assert_arg_max(model, prompt, answer, model.config.eos_token_id)
        alone = generate(
            model, input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)).long(), **way
        )
        assert alone[0, len(prompt) :].tolist() == answer


def test_the_mask_shows_in_what_is_generated(model):
    """Guards the tests above: blocks are opened, and without the mask other tokens follow."""
    rows = rows_of(model)[:2]
    batch = left_pad(model, rows)
    independent = generate(model, **batch)
    assert int((model.action_block_ids(independent).amax(-1) > 0).sum()) >= 1
    with configured(model, action_attention="causal"):
        causal = generate(model, **batch)
        for prompt, answer in zip(rows, causal[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
            assert_arg_max(model, prompt, answer, model.config.eos_token_id)
    assert not torch.equal(causal, independent)


@pytest.mark.parametrize("way", WAYS)
def test_generation_stops_at_the_separator(way):
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[:] = 0
        model.model.embed_tokens.weight[:, 0] = 1000.0  # the hidden state points one way, and so does the separator
        model.lm_head.weight[model.config.eos_token_id, 0] = 1.0
    batch = left_pad(model, rows_of(model)[:2])
    output = model.generate(**batch, max_new_tokens=5, do_sample=False, **way)
    assert output[:, batch["input_ids"].shape[1] :].tolist() == [[model.config.eos_token_id]] * 2


@pytest.mark.parametrize("way", WAYS)
def test_beams(model, way):
    """The score of each beam is the sum of teacher-forced log-probabilities, and at least that of greedy decoding."""
    prompt = rows_of(model)[1]
    inputs = {"input_ids": torch.tensor([prompt]), "attention_mask": torch.ones(1, len(prompt)).long(), **way}
    output = generate(
        model, 8, **inputs, num_beams=3, num_return_sequences=3, return_dict_in_generate=True, output_scores=True,
        length_penalty=0.0,
    )  # fmt: skip
    assert output.sequences.shape == (3, len(prompt) + 8)

    def score(answer: list[int]) -> float:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        return float(logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum())

    scores = [score(sequence[len(prompt) :].tolist()) for sequence in output.sequences]
    torch.testing.assert_close(output.sequences_scores, torch.tensor(scores), rtol=0, atol=1e-4)
    greedy = generate(model, 8, **inputs)[0, len(prompt) :].tolist()
    assert max(scores) >= score(greedy) - 1e-4


@pytest.mark.parametrize("way", [*WAYS, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_inputs_with_pictures(model, way):
    """Two pictures in one row and one in the other: the same tokens as with codes in their place."""
    write = writer(model)
    begin, end = write.ids["<s>"], write.separator
    rows = [
        [begin, *write.text(2), *write.pixels(), *write.pixels(), end],
        [begin, *write.text(3), *write.pixels(), end],
    ]
    pixels = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pixels[0], pixels[2] = -1.0, 1.0
    batch = left_pad(model, rows)
    discrete = model.discretize(**batch, pixel_values=pixels)
    assert len({tuple(row.tolist()) for row in model.tokenize_images(pixels).flatten(1)}) == 3
    width = batch["input_ids"].shape[1]
    expected = generate(model, 12, **discrete, **way)
    assert torch.equal(generate(model, 12, **batch, pixel_values=pixels, **way)[:, width:], expected[:, width:])


def test_sampling_several_answers_from_pictures(model):
    write = writer(model)
    prompt = [write.ids["<s>"], *write.pixels(), *write.pixels(), write.separator]
    inputs = {"input_ids": torch.tensor([prompt]), "attention_mask": torch.ones(1, len(prompt)).long()}
    pixels = torch.stack([torch.full((3, 32, 32), -1.0), torch.full((3, 32, 32), 1.0)])
    outputs = []
    for arguments in ({**inputs, "pixel_values": pixels}, model.discretize(**inputs, pixel_values=pixels)):
        torch.manual_seed(0)
        outputs.append(generate(model, 6, **arguments, do_sample=True, num_return_sequences=4)[:, len(prompt) :])
    assert outputs[0].shape == (4, 6) and torch.equal(*outputs)


def test_continuing_from_a_cache(model):
    """The cache of one call and all the ids so far: as if generated in one go."""
    prompt = torch.tensor([rows_of(model)[1]])
    whole = generate(model, 16, input_ids=prompt, attention_mask=torch.ones_like(prompt))
    cache = DynamicCache(config=model.config)
    first = generate(model, 7, input_ids=prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache)
    rest = generate(model, 9, input_ids=first, attention_mask=torch.ones_like(first), past_key_values=cache)
    assert torch.equal(rest, whole)


def test_generate_agrees_with_generate_actions():
    """Free generation that happens to write actions is what constrained decoding writes."""
    model = tiny_model()
    write, names = writer(model), model.config.vocabulary_map
    begin, end = names["<reserved10000>"], names["<reserved15000>"]
    prompt = torch.tensor([write.action_prompt()])
    tokens = model.generate_actions(prompt, num_actions=2, action_dim=3)
    step = {"index": 0}

    def allowed(batch: int, ids: torch.Tensor) -> list[int]:
        step["index"] = (len(ids) - prompt.shape[1]) % 5
        return [begin] if step["index"] == 0 else [end] if step["index"] == 4 else write.bins

    output = generate(
        model, 10, input_ids=prompt, attention_mask=torch.ones_like(prompt), prefix_allowed_tokens_fn=allowed
    )
    assert output[0, prompt.shape[1] :].view(2, 5)[:, 1:4].tolist() == tokens[0].tolist()


# -------------------------------------------------------------------- imagine


@pytest.fixture(scope="module")
def dreamer(tokenizer) -> tuple[WorldVLAForCausalLM, WorldVLAProcessor]:
    """A model of the published vocabulary and its processor: pictures of 32 x 32 pixels, four codes."""
    processor = libero_processor(tokenizer)
    processor.image_processor.target_size = 32
    model = tiny_model(vocabulary_map=tokenizer.get_vocab(), vq_config={**VQ, "num_embeddings": 8192}, action_dim=7)
    return model, processor


VQ = {
    "base_channels": 32,
    "channel_multiplier": [1, 1, 1, 1, 1],
    "num_res_blocks": 1,
    "embed_dim": 8,
    "latent_channels": 8,
}


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8))


def plan(seed: int, steps: int = 3, dim: int = 7) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.3, 0.3, (steps, dim))


def same(one: list[Image.Image], two: list[Image.Image]) -> bool:
    """Up to one grey level: a picture decoded in a batch may round the other way."""
    return len(one) == len(two) and all(
        np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max() <= 1 for a, b in zip(one, two, strict=True)
    )


@pytest.mark.parametrize("history", [1, 2])
def test_imagine_feeds_its_tokens_back(dreamer, history):
    """Step by step with the processor: the frames generated so far are the images of the next prompt."""
    model, processor = dreamer
    actions = plan(0)
    frames = model.imagine(processor, picture(0), actions, num_history=history)
    assert [frame.size for frame in frames] == [(32, 32)] * 3
    first = processor(images=[picture(0)], actions=actions[:1])
    seen = [model.tokenize_images(first["pixel_values"])[0]]
    expected = []
    for step in range(3):
        start = max(0, step + 1 - history)
        inputs = processor(image_tokens=seen[start:], actions=actions[start : step + 1])
        ids = model.generate_frames(**inputs)
        expected += processor.decode_frames(ids, model)[0]
        seen.append(torch.from_numpy(model.tokens.parse_image_block(ids[0, 0].tolist())))
    assert same(frames, expected)


def test_imagine_feeds_pixels_back(dreamer):
    """Each frame is decoded and encoded again: what a loop over pictures does."""
    model, processor = dreamer
    actions, current, expected = plan(0), picture(0), []
    for action in actions:
        ids = model.generate_frames(**processor(images=[current], actions=[action]))
        current = processor.decode_frames(ids, model)[0][0]
        expected.append(current)
    frames = model.imagine(processor, picture(0), actions, feedback="pixels")
    assert same(frames, expected)
    tokens = model.imagine(processor, picture(0), actions)
    assert same(tokens[:1], frames[:1]) and not same(tokens, frames)


@pytest.mark.parametrize("feedback", ["tokens", "pixels"])
def test_imagining_a_batch(dreamer, feedback):
    model, processor = dreamer
    plans = np.stack([plan(0, 2), plan(1, 2)])
    together = model.imagine(processor, [picture(0), picture(1)], plans, feedback=feedback, draft="previous")
    for index, frames in enumerate(together):
        assert same(model.imagine(processor, picture(index), plans[index], feedback=feedback), frames)
    assert not same(*together)


def test_imagining_with_two_cameras(dreamer):
    model, processor = dreamer
    processor = libero_processor(processor.tokenizer, embodiments={"arm": ARM.to_dict()})
    processor.image_processor.target_size = 32
    actions = np.random.default_rng(0).uniform(-0.5, 0.5, (2, 4)) + [0, 0, 1, 15]
    frames = model.imagine(processor, [picture(0), picture(1)], actions)
    assert [len(step) for step in frames] == [2, 2]
    batch = model.imagine(processor, [[picture(0), picture(1)]], actions[None])
    assert all(same(*steps) for steps in zip(batch[0], frames, strict=True))


def test_wrong_plans(dreamer):
    model, processor = dreamer
    with pytest.raises(ValueError, match=r"actions are \(T, D\) or \(batch, T, D\), not \(7,\)"):
        model.imagine(processor, picture(0), plan(0)[0])
    with pytest.raises(ValueError, match='feedback is "tokens" or "pixels", not \'codes\''):
        model.imagine(processor, picture(0), plan(0), feedback="codes")
    with pytest.raises(ValueError, match="1 first frames for 2 plans: pass one each"):
        model.imagine(processor, [picture(0)], np.stack([plan(0), plan(1)]))
    with pytest.raises(ValueError, match="num_history is at least 1, not 0"):
        model.imagine(processor, picture(0), plan(0), num_history=0)
