"""What transformers and trainers expect of a model: pictures in, load and save, precision, checkpointing, training."""

import importlib.util
from pathlib import Path

import pytest
import torch
from model_factory import compact_vocabulary, configured, labels_of, left_pad, tiny_config, tiny_model, writer
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    StaticCache,
)

from transformers_worldvla import WorldVLAConfig, WorldVLAForCausalLM, WorldVLAModel, WorldVLAVQVAE

CLOSE = {"rtol": 0.0, "atol": 1e-5}
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


@pytest.fixture(scope="module")
def model() -> WorldVLAForCausalLM:
    return tiny_model()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(path)
    return path


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def training_batch(model: WorldVLAForCausalLM) -> dict[str, torch.Tensor]:
    """An action and a world sample with labels."""
    write = writer(model)
    samples = [write.action_sample(2, 7), write.world_sample(1)]
    batch = left_pad(model, [ids for ids, _ in samples])
    width = batch["input_ids"].shape[1]
    labels = [[-100] * (width - len(ids)) + labels_of(ids, prompt) for ids, prompt in samples]
    return {**batch, "labels": torch.tensor(labels)}


def logits(model: WorldVLAForCausalLM, **inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


# -------------------------------------------------------------------- pictures


def test_tokenize_and_detokenize(model):
    images = noise(2, 3, 32, 64)
    ids = model.tokenize_images(images)
    codes = model.model.vqmodel.encode_codes(images)
    names = {token: name for name, token in model.config.vocabulary_map.items()}
    spelled = [names[token] for token in ids.flatten().tolist()]
    digits = ["IMGIMG" + "".join("ABCDEFGHIJ"[int(d)] for d in str(code)) + "Z" for code in codes.flatten().tolist()]
    assert ids.shape == (2, 2, 4) and spelled == digits
    pixels = model.detokenize_images(ids)
    assert pixels.shape == images.shape
    torch.testing.assert_close(pixels, model.model.vqmodel.decode_codes(codes))
    blocks = torch.tensor([writer(model).image((1, 2), image.flatten().tolist()) for image in ids])
    assert torch.equal(model.detokenize_images(blocks), pixels)


def test_ids_that_are_no_picture(model):
    codes = model.tokenize_images(noise(1, 3, 32, 32))
    for wrong in (model.config.bos_token_id, 10**6, -1):
        ids = codes.clone()
        ids[0, 0, 1] = wrong
        with pytest.raises(ValueError, match="1 of 4 ids are no image codes: pass code ids"):
            model.detokenize_images(ids)
    with pytest.raises(ValueError, match="not an image block"):
        model.detokenize_images(codes.flatten(1))


def test_pixels_stand_for_their_codes(model):
    """Two sizes in one tensor, the smaller picture in the corner; filled in order of appearance."""
    write = writer(model)
    small, large = noise(3, 32, 32, seed=1), noise(3, 64, 32, seed=2)
    rows = [[write.ids["<s>"], *write.pixels((2, 1)), *write.image(), *write.pixels((1, 1)), write.separator]]
    padded = torch.zeros(2, 3, 64, 32)
    padded[0], padded[1, :, :32] = large, small
    codes = [model.tokenize_images(picture[None]).flatten().tolist() for picture in (large, small)]
    write = writer(model)
    expected = [write.ids["<s>"], *write.image((2, 1), codes[0]), *write.image(), *write.image((1, 1), codes[1])]
    batch = model.discretize(torch.tensor(rows), padded)
    assert list(batch) == ["input_ids"] and batch["input_ids"].tolist() == [[*expected, write.separator]]
    actual = logits(model, input_ids=torch.tensor(rows), pixel_values=padded)
    torch.testing.assert_close(actual, logits(model, **batch), **CLOSE)
    hidden = model.model(input_ids=torch.tensor(rows), pixel_values=padded).last_hidden_state
    torch.testing.assert_close(model.lm_head(hidden), actual, **CLOSE)  # the backbone alone takes pictures too


def test_black_is_not_white(model):
    write = writer(model)
    ids = torch.tensor([[write.ids["<s>"], *write.pixels(), write.separator]])
    black, white = (logits(model, input_ids=ids, pixel_values=torch.full((1, 3, 32, 32), v)) for v in (-1.0, 1.0))
    assert (black - white)[:, 4:].abs().amax() > 0.1
    assert torch.equal(black[:, :4], white[:, :4])  # nothing is seen before the first code


def test_discretize_fills_labels(model):
    """Target pictures become labels; what is no placeholder stays, and so does what is not labelled."""
    write = writer(model)
    prompt = [write.ids["<s>"], *write.pixels(), *write.action(2), write.separator]
    ids = [*prompt, *write.pixels(), write.separator]
    batch = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels_of(ids, len(prompt))])}
    pixels = noise(2, 3, 32, 32)
    batch["loss_weights"] = (batch["labels"] != -100).float()
    discrete = model.discretize(**batch, pixel_values=pixels)
    assert set(discrete) == {"input_ids", "labels", "loss_weights"}
    target = model.tokenize_images(pixels[1:]).flatten().tolist()
    assert discrete["labels"][0, len(prompt) :].tolist() == [*write.image((1, 1), target), write.separator]
    assert (discrete["labels"][0, : len(prompt)] == -100).all()
    placeholder = write.ids["<reserved08707>"]
    assert not (discrete["input_ids"] == placeholder).any() and not (discrete["labels"] == placeholder).any()
    with torch.no_grad():
        torch.testing.assert_close(model(**batch, pixel_values=pixels).loss, model(**discrete).loss)
    assert model.discretize(**discrete).keys() == discrete.keys()


def test_pictures_that_do_not_fit(model):
    write = writer(model)
    ids = torch.tensor([[write.ids["<s>"], *write.pixels((1, 2)), write.separator]])
    with pytest.raises(ValueError, match="2 pictures for 1 image blocks with placeholders"):
        model(input_ids=ids, pixel_values=torch.zeros(2, 3, 32, 64))
    with pytest.raises(ValueError, match=r"a picture of \(32, 32\) pixels does not fill its block of 2x4 codes"):
        model(input_ids=ids, pixel_values=torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="pixel_values need input_ids"):
        model.model(inputs_embeds=torch.zeros(1, 4, 32), pixel_values=torch.zeros(1, 3, 32, 32))


def test_image_tokens_are_not_forbidden(model):
    """Upstream Chameleon's head sets their logits to the smallest number."""
    values = logits(model, input_ids=torch.tensor([writer(model).action_prompt()]))[..., writer(model).codes]
    assert values.abs().max() < 100


def test_logits_to_keep(model):
    ids = torch.tensor([writer(model).action_prompt()])
    everything = logits(model, input_ids=ids)
    torch.testing.assert_close(logits(model, input_ids=ids, logits_to_keep=2), everything[:, -2:])
    torch.testing.assert_close(logits(model, input_ids=ids, logits_to_keep=torch.tensor([1, 4])), everything[:, [1, 4]])


# -------------------------------------------------------------------- load and save


def assert_same_weights(one: torch.nn.Module, two: torch.nn.Module) -> None:
    state, other = one.state_dict(), two.state_dict()
    assert state.keys() == other.keys()
    for name in state:
        assert torch.equal(state[name], other[name]), name


def test_save_and_load(model, folder):
    loaded, info = WorldVLAForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_weights(loaded, model)
    assert not loaded.training and not any(p.requires_grad for p in loaded.model.vqmodel.parameters())
    ids = torch.tensor([writer(model).action_sample(2)[0]])
    assert torch.equal(logits(loaded, input_ids=ids), logits(model, input_ids=ids))
    assert loaded.tokens == model.tokens


def test_auto_classes_give_the_model_itself(folder):
    """AutoModel too, which acts out of the box."""
    for auto in (AutoModel, AutoModelForCausalLM):
        assert type(auto.from_pretrained(folder)) is WorldVLAForCausalLM
    assert type(AutoModelForCausalLM.from_config(tiny_config())) is WorldVLAForCausalLM


def test_a_fresh_load_initialises_what_a_file_lacks(model, tmp_path):
    """A language model without image tokenizer, as the authors publish it: the rest is random, nothing is left
    empty."""
    state = {name: value for name, value in model.state_dict().items() if "vqmodel" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    loaded, info = WorldVLAForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] and all("vqmodel" in name for name in info["missing_keys"])
    for name, parameter in loaded.named_parameters():
        assert parameter.isfinite().all(), name
        assert parameter.device.type == "cpu"
    assert loaded.tokenize_images(noise(1, 3, 32, 32)).shape == (1, 2, 2)


def test_a_stock_chameleon_folder(tmp_path):
    """Only the pixel decoder is missing, and the logits are upstream's (which forbids image tokens)."""
    fields = tiny_config().to_dict()
    vq = {name: value for name, value in fields["vq_config"].items() if name != "model_type"}
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    sizes = {name: fields[name] for name in (*names, "vocab_size", "initializer_range", "max_position_embeddings")}
    vocabulary = compact_vocabulary()
    vocabulary["<image>"] = vocabulary.pop("<reserved08707>")  # as upstream's conversion names it
    torch.manual_seed(0)
    config = ChameleonConfig(**sizes, vq_config=vq, vocabulary_map=vocabulary)
    upstream = ChameleonForConditionalGeneration(config).eval()
    for parameter in upstream.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))  # norms away from 1
    upstream.save_pretrained(tmp_path)
    ours_config = WorldVLAConfig(**{k: v for k, v in config.to_dict().items() if k != "model_type"})
    ours, info = WorldVLAForCausalLM.from_pretrained(tmp_path, config=ours_config, output_loading_info=True)
    assert {name.split(".")[2] for name in info["missing_keys"]} == {"decoder"} and not info["unexpected_keys"]
    write = writer(tiny_model())
    ids = torch.tensor([write.world_prompt(2) + write.text()])
    text = [token for name, token in vocabulary.items() if not name.startswith("IMGIMG")]
    expected = upstream(input_ids=ids).logits[..., text]
    torch.testing.assert_close(logits(ours, input_ids=ids)[..., text], expected, **CLOSE)
    images = noise(2, 3, 64, 64)
    assert torch.equal(ours.tokenize_images(images).flatten(1), upstream.get_image_tokens(images))


def test_tied_embeddings(tmp_path):
    tied = tiny_model(tie_word_embeddings=True)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    tied.save_pretrained(tmp_path)
    loaded = WorldVLAForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    ids = torch.tensor([writer(tied).action_prompt()])
    assert torch.equal(logits(loaded, input_ids=ids), logits(tied, input_ids=ids))
    untied = tiny_model()
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


def test_resized_embeddings(tmp_path):
    model = tiny_model(action_dim=4)
    ids = torch.tensor([writer(model).action_prompt()])
    before = logits(model, input_ids=ids)
    actions = model.generate_actions(ids, num_actions=2)
    size = model.config.vocab_size
    model.resize_token_embeddings(size + 3)
    assert model.config.vocab_size == size + 3 and model.lm_head.out_features == size + 3
    torch.testing.assert_close(logits(model, input_ids=ids)[..., :size], before, **CLOSE)
    assert torch.equal(model.generate_actions(ids, num_actions=2), actions)
    model.save_pretrained(tmp_path)
    assert_same_weights(WorldVLAForCausalLM.from_pretrained(tmp_path), model)


# -------------------------------------------------------------------- precision and placement


def dtypes(module: torch.nn.Module) -> set[torch.dtype]:
    return {parameter.dtype for parameter in module.parameters()}


@HALF
def test_half_precision_leaves_the_image_tokenizer_alone(model, folder, dtype):
    """Loaded, built from a config, or cast: codes do not change, and everything else is half precision."""
    codes = model.tokenize_images(noise(2, 3, 32, 32))
    built = AutoModelForCausalLM.from_config(tiny_config(), dtype=dtype)
    loaded = WorldVLAForCausalLM.from_pretrained(folder, dtype=dtype)
    for variant in (loaded, built, tiny_model().to(dtype)):
        assert dtypes(variant.model.vqmodel) == {torch.float32}
        assert dtypes(variant.model.layers) == dtypes(variant.lm_head) == {dtype}
        assert variant.dtype == dtype
        assert variant.tokenize_images(noise(2, 3, 32, 32).to(dtype)).shape == codes.shape
        if variant is not built:  # whose weights are others
            assert torch.equal(variant.tokenize_images(noise(2, 3, 32, 32)), codes)
    batch = training_batch(model)
    with torch.no_grad():
        output, exact = loaded(**batch), model(**batch)
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, exact.loss, rtol=0.02, atol=0.0)


def test_a_checkpoint_in_half_precision_loads_as_such(folder, tmp_path):
    WorldVLAForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(tmp_path)
    again = WorldVLAForCausalLM.from_pretrained(tmp_path)
    assert dtypes(again.lm_head) == {torch.bfloat16}
    assert dtypes(again.model.vqmodel) == {torch.float32}


def test_autocast(model):
    batch = training_batch(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    model.zero_grad()
    with torch.no_grad():
        torch.testing.assert_close(loss, model(**batch).loss, rtol=0.02, atol=0.0)


def test_device_map(model, folder):
    assert importlib.util.find_spec("accelerate"), "device_map needs accelerate, which the extra `train` brings"
    loaded = WorldVLAForCausalLM.from_pretrained(folder, device_map="cpu")
    assert_same_weights(loaded, model)
    split = {"model.embed_tokens": "cpu", "model.layers": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    split |= {"model.vqmodel": "cpu", "lm_head": "cpu"}
    loaded = WorldVLAForCausalLM.from_pretrained(folder, device_map=split)
    ids = torch.tensor([writer(model).action_prompt()])
    assert torch.equal(logits(loaded, input_ids=ids), logits(model, input_ids=ids))
    assert torch.equal(*(m.generate_actions(ids, num_actions=2, action_dim=3) for m in (loaded, model)))


def test_building_on_the_meta_device():
    with torch.device("meta"):
        model = WorldVLAForCausalLM(WorldVLAConfig(num_hidden_layers=2))
    sizes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert sizes["lm_head.weight"] == sizes["model.embed_tokens.weight"] == (65536, 4096)
    assert sizes["model.layers.1.self_attn.q_norm.weight"] == (32, 128)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_loading(bits, tmp_path):
    """The bitsandbytes path: linear layers of the decoder in few bits, the image tokenizer untouched."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = tiny_model(hidden_size=64, intermediate_size=64)  # bitsandbytes quantises blocks of 64
    model.save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    try:
        loaded = WorldVLAForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu")
    except ImportError as error:
        pytest.skip(f"this bitsandbytes does not run on the CPU: {error}")
    assert {type(m).__name__ for m in loaded.model.layers.modules()} >= {"Linear4bit" if bits == 4 else "Linear8bitLt"}
    assert dtypes(loaded.model.vqmodel) == {torch.float32}
    assert torch.equal(loaded.tokenize_images(noise(2, 3, 32, 32)), model.tokenize_images(noise(2, 3, 32, 32)))
    prompt = torch.tensor([writer(model).action_prompt()])
    close = torch.corrcoef(torch.stack([logits(m, input_ids=prompt).flatten() for m in (loaded, model)]))[0, 1]
    assert close > {4: 0.7, 8: 0.98}[bits]
    assert loaded.generate_actions(prompt, num_actions=2, action_dim=3).shape == (1, 2, 3)
    frames = loaded.generate_frames(torch.tensor([writer(model).world_prompt()]))
    loaded.tokens.parse_image_block(frames[0, 0].tolist())


# -------------------------------------------------------------------- training


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    model = tiny_model(dropout=0.0, loss_chunk_size=5).train()
    batch = training_batch(model)
    plain = model(**batch).loss
    plain.backward()
    expected = gradients(model)
    runs = []
    hook = model.model.layers[0].self_attn.register_forward_hook(lambda *_: runs.append(1))
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    loss = model(**batch).loss
    loss.backward()
    hook.remove()
    assert len(runs) == 2  # once more in the backward pass
    torch.testing.assert_close(loss, plain)
    actual = gradients(model)
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_what_is_trained():
    """Everything but the image tokenizer."""
    model = tiny_model(dropout=0.0).train()
    model(**training_batch(model)).loss.backward()
    untouched = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert untouched == {name for name, _ in model.named_parameters() if "vqmodel" in name}
    assert not model.model.vqmodel.training and model.model.layers.training


def test_dropout_is_on_the_residual_branches_of_training():
    """With probability 1 nothing but the embedding is left; in evaluation it is as if there were none."""
    batch = training_batch(tiny_model())
    model, without = tiny_model(dropout=0.5), tiny_model(dropout=0.0)
    assert torch.equal(logits(model, **batch), logits(without, **batch))
    without.train()
    model.train()
    ids = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    once, twice = logits(model, **ids), logits(model, **ids)
    assert not torch.equal(once, twice)
    assert torch.equal(logits(without, **ids), logits(without.eval(), **ids))
    everything = tiny_model(dropout=1.0).train()
    embeddings = everything.model.embed_tokens(ids["input_ids"])
    expected = everything.lm_head(everything.model.norm(embeddings))
    torch.testing.assert_close(logits(everything, **ids), expected, **CLOSE)


def test_training_lowers_the_loss():
    model = tiny_model(initializer_range=0.05, loss_chunk_size=16).train()
    batch = training_batch(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        output = model(**batch)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(float(output.action_loss + output.world_loss))
    assert losses[-1] < 0.5 * losses[0]


def test_the_loss_needs_ids(model):
    batch = training_batch(model)
    embeddings = model.get_input_embeddings()(batch["input_ids"])
    blocks = model.action_block_ids(batch["input_ids"])
    with pytest.raises(ValueError, match="the loss needs input_ids"):
        model(inputs_embeds=embeddings, action_block_ids=blocks, labels=batch["labels"])


def test_outputs_for_a_trainer(model):
    """Labels in evaluation give loss and logits; the parts of the loss are no predictions; a plain Trainer divides."""
    with torch.no_grad():
        output = model(**training_batch(model), output_hidden_states=True)
    assert output.logits.shape[:2] == training_batch(model)["labels"].shape
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    assert {"action_loss", "world_loss", "z_loss", "past_key_values"} <= set(model.config.keys_to_ignore_at_inference)
    assert model.accepts_loss_kwargs is False
    with configured(model, use_cache=False):
        assert model(**training_batch(model)).past_key_values is None


def test_attentions_obey_the_mask():
    """What eager attention reports: nothing is spent on a hidden block."""
    model = tiny_model(attention="eager")
    ids, prompt = writer(model).action_sample(3, 4)
    with torch.no_grad():
        attentions = model(input_ids=torch.tensor([ids]), output_attentions=True).attentions
    assert len(attentions) == 2
    second = slice(prompt + 6, prompt + 12)
    for attention in attentions:
        assert attention.shape == (1, 4, len(ids), len(ids))
        assert attention[0, :, second, prompt : prompt + 6].max() == 0
        assert attention[0, :, -1].min() > 0  # the final separator sees all


def test_parts_have_their_classes(model):
    assert type(model.model) is WorldVLAModel and type(model.model.vqmodel) is WorldVLAVQVAE
    assert model.base_model is model.model
    assert model.get_input_embeddings() is model.model.embed_tokens
    assert model.get_output_embeddings() is model.lm_head
    assert model.can_generate()


def test_swin_norm_layers():
    """The 30B variant normalises after attention and MLP."""
    model = tiny_model(swin_norm=True)
    rows = [writer(model).action_prompt(length) for length in (2, 5)]
    batch = left_pad(model, rows)
    together = logits(model, **batch)
    for row, ids in enumerate(rows):
        torch.testing.assert_close(together[row, -len(ids) :], logits(model, input_ids=torch.tensor([ids]))[0], **CLOSE)


@pytest.mark.slow
def test_a_decoding_step_compiles_into_one_graph():
    """The backbone's step under a ready mask and a static cache: no break, no recompilation, the same numbers."""
    model = tiny_model()
    ids = torch.tensor([writer(model).action_prompt()])
    length = ids.shape[1]
    outputs = []
    for compiled in (False, True):
        torch.compiler.reset()
        step = torch.compile(model.model, fullgraph=True) if compiled else model.model
        cache = StaticCache(config=model.config, max_cache_len=length + 4)
        hidden = []
        with torch.no_grad():
            model.model(input_ids=ids, past_key_values=cache, use_cache=True)
            for index in range(3):
                visible = (torch.arange(length + 4) <= length + index)[None, None, None]
                position = torch.tensor([[length + index]])
                token = ids[:, index : index + 1]
                hidden.append(
                    step(
                        input_ids=token, attention_mask=visible, position_ids=position, past_key_values=cache,
                        use_cache=True,
                    ).last_hidden_state
                )  # fmt: skip
        outputs.append(torch.cat(hidden, 1))
    torch.testing.assert_close(outputs[1], outputs[0], **CLOSE)
