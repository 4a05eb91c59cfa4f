"""The processor as a specification: the authors' sequences, every form of call, and back."""

import inspect
import json
import warnings

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from sequences import (
    ACTION,
    ACTION_BLOCK,
    ARM,
    BOA,
    BOI,
    BOS,
    EOA,
    EOI,
    FIRST_BIN,
    GRID_ZERO,
    PLACEHOLDER,
    SEP,
    TEXT,
    codes,
    image_block,
    libero_processor,
    picture,
    pixels_block,
    text_ids,
    two_robot_processor,
)
from transformers import AutoProcessor

from transformers_worldvla import WorldVLAConfig, WorldVLAForCausalLM, WorldVLAImageProcessor, WorldVLAProcessor
from transformers_worldvla.action_tokenization_worldvla import LIBERO
from transformers_worldvla.prompts_worldvla import WORLD_PROMPTS


@pytest.fixture(scope="module")
def processor(tokenizer) -> WorldVLAProcessor:
    return libero_processor(tokenizer)


@pytest.fixture(scope="module")
def two_robots(tokenizer) -> WorldVLAProcessor:
    return two_robot_processor(tokenizer)


@pytest.fixture(scope="module")
def reference(authors_tiny):
    return json.loads((authors_tiny / "reference.json").read_text())


@pytest.fixture(scope="module")
def authors_model(authors_tiny, tokenizer) -> WorldVLAForCausalLM:
    """The authors' image tokenizer behind a language model of no importance."""
    folder = authors_tiny / "checkpoint" / "tokenizer"
    sizes = yaml.safe_load((folder / "vqgan.yaml").read_text())["model"]["params"]
    config = WorldVLAConfig(
        vocab_size=len(tokenizer),
        vocabulary_map=tokenizer.get_vocab(),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vq_config={
            "base_channels": sizes["ddconfig"]["ch"],
            "channel_multiplier": sizes["ddconfig"]["ch_mult"],
            "num_res_blocks": sizes["ddconfig"]["num_res_blocks"],
            "latent_channels": sizes["ddconfig"]["z_channels"],
            "embed_dim": sizes["embed_dim"],
        },
    )
    model = WorldVLAForCausalLM(config).eval()
    weights = torch.load(folder / "vqgan.ckpt", map_location="cpu", weights_only=True)["state_dict"]
    missing = model.model.vqmodel.load_state_dict(weights, strict=False).missing_keys
    assert not missing
    return model


# -------------------------------------------------------------------- the authors' sequences


@pytest.mark.parametrize("index", range(10))
def test_reference_samples_token_for_token(processor, reference, authors_tiny, index):
    """Tokens, labels and inference prompt of the authors' items, from the flat image blocks of their code."""
    item = reference["items"][index]
    spec = item["spec"]
    blocks = [reference["image_tokens"][f"{name}@{spec['res']}"] for name in spec["images"]]
    actions = np.load(authors_tiny / "actions.npy")[spec["actions"]]
    if spec["kind"] == "action":
        prompt = {"image_tokens": blocks, "instruction": spec["task"]}
        target = {"target_actions": actions}
    else:
        prompt = {"image_tokens": blocks[:-1], "actions": actions}
        target = {"target_image_tokens": blocks[-1:]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # rows 3 and 4 of the actions are out of range on purpose
        batch = processor(**prompt, **target)
        inference = processor(**prompt)
    assert batch["input_ids"].tolist() == [item["tokens"]]
    assert batch["labels"].tolist() == [item["labels"]]
    assert batch["loss_weights"].tolist() == [[float(label != -100) for label in item["labels"]]]
    assert inference["input_ids"].tolist() == [item["prompt"]]
    assert "labels" not in inference and "pixel_values" not in inference


def test_pictures_give_the_codes_of_the_authors(processor, authors_model, authors_tiny, reference):
    """Pictures -> processor -> image tokenizer: the sequence of the authors, codes included."""
    item = reference["items"][1]
    images = [Image.open(authors_tiny / "images" / f"{name}.png") for name in item["spec"]["images"]]
    inputs = processor(images, item["spec"]["task"], target_size=256)
    assert inputs["pixel_values"].shape == (2, 3, 256, 256)
    assert authors_model.discretize(**inputs)["input_ids"].tolist() == [item["prompt"]]


def test_decoded_actions_of_the_authors(processor, reference):
    tokens = torch.tensor([row[1:-1] for row in reference["action_tokens"]])[None]
    low, high = np.array(LIBERO.low), np.array(LIBERO.high)
    expected = (np.array(reference["action_decoded"]) + 1) / 2 * (high - low + 1e-8) + low
    decoded = processor.decode_actions(tokens)
    assert decoded.dtype == np.float64
    assert np.array_equal(decoded, expected[None])


def test_decoded_frames_of_the_authors(processor, authors_model, authors_tiny, reference):
    """Within one grey level, also when pictures of two sizes come in one call."""
    names = ["i256_0@256", "i512_0@512"]
    frames = processor.decode_frames([[reference["image_tokens"][name]] for name in names], authors_model)
    for name, pictures in zip(names, frames, strict=True):
        expected = np.asarray(Image.open(authors_tiny / "images" / f"decoded_{name.split('@')[0]}.png"))
        (decoded,) = pictures
        assert np.abs(np.asarray(decoded).astype(int) - expected).max() <= 1


# -------------------------------------------------------------------- one sample of each kind


def test_action_prompt(processor):
    inputs = processor([picture(0), picture(1)], TEXT)
    text = text_ids(processor, f"What action should the robot take to {TEXT}?")
    assert inputs["input_ids"].tolist() == [[BOS, *text, *pixels_block(), *pixels_block(), SEP]]
    assert inputs["attention_mask"].tolist() == [[1] * inputs["input_ids"].shape[1]]
    assert list(inputs) == ["input_ids", "attention_mask", "pixel_values"] == processor.model_input_names
    expected = np.stack([processor.image_processor.pixels(picture(seed)) for seed in (0, 1)])
    assert np.array_equal(inputs["pixel_values"], expected)


def test_action_sample(processor):
    batch = processor(images=[picture()], instruction=TEXT, target_actions=[ACTION, ACTION])
    prompt = processor(picture(), TEXT)["input_ids"][0].tolist()
    answer = [*ACTION_BLOCK, *ACTION_BLOCK, SEP]
    assert batch["input_ids"].tolist() == [prompt + answer]
    assert batch["labels"].tolist() == [[-100] * len(prompt) + answer]
    assert batch["loss_weights"].tolist() == [[0.0] * len(prompt) + [1.0] * len(answer)]
    assert [batch[key].dtype for key in ("input_ids", "labels", "attention_mask")] == [torch.int64] * 3
    assert [batch[key].dtype for key in ("loss_weights", "pixel_values")] == [torch.float32] * 2


def test_world_sample(processor):
    batch = processor(images=[picture(0), picture(1)], actions=[ACTION, ACTION], target_images=[picture(2)])
    text = text_ids(processor, WORLD_PROMPTS["training"])
    prompt = [BOS, *text, *(pixels_block() + ACTION_BLOCK) * 2, SEP]
    assert batch["input_ids"].tolist() == [[*prompt, *pixels_block(), SEP]]
    assert batch["labels"].tolist() == [[-100] * len(prompt) + [*pixels_block(), SEP]]
    expected = np.stack([processor.image_processor.pixels(picture(seed)) for seed in (0, 1, 2)])
    assert np.array_equal(batch["pixel_values"], expected)


def test_video_sample(processor):
    batch = processor(images=[picture(0)], instruction=TEXT, target_images=[picture(1), picture(2)])
    text = text_ids(processor, f"Generate the future image based on the task and current image. {TEXT}")
    prompt = [BOS, *text, *pixels_block(), SEP]
    assert batch["input_ids"].tolist() == [[*prompt, *pixels_block() * 2, SEP]]
    assert processor([picture()], TEXT, prompt="video")["input_ids"].tolist() == [prompt]


def test_a_picture_that_is_not_square_has_its_height_first(processor):
    ids = processor(picture(height=100, width=300), TEXT, target_size=128)["input_ids"][0].tolist()
    start = ids.index(BOI)
    assert ids[start:-1] == pixels_block(64, 192)
    assert ids[start + 1 : start + 3] == [GRID_ZERO + 2, GRID_ZERO + 6]


def test_pictures_of_different_size_share_one_tensor(processor):
    """Padded right and bottom; the grid tokens tell the true size."""
    images = [picture(0, 64, 64), picture(1, 64, 256), picture(2, 256, 64)]
    inputs = processor(images, TEXT)
    pixels = inputs["pixel_values"]
    assert pixels.shape == (3, 3, 128, 128)
    for image, padded in zip(images, pixels.numpy(), strict=True):
        own = processor.image_processor.pixels(image)
        assert np.array_equal(padded[:, : own.shape[1], : own.shape[2]], own)
        padded[:, : own.shape[1], : own.shape[2]] = 0
        assert not padded.any()
    ids = inputs["input_ids"][0].tolist()
    assert ids[ids.index(BOI) : -1] == pixels_block(64, 64) + pixels_block(32, 128) + pixels_block(128, 32)


def test_several_cameras_are_time_major(two_robots):
    """Two time steps of (front, wrist): each step's pictures, then its action."""
    actions = np.array([[0.0, 0, 1, 15], [1, 2, 3, 20]])
    images = [codes(two_robots, seed) for seed in range(6)]
    batch = two_robots(
        image_tokens=images[:4], actions=actions, target_image_tokens=images[4:], embodiment="arm", prompt="world"
    )
    blocks = [image_block(image) for image in images]
    acts = [[BOA, *(ARM.encode(row[None])[0] + FIRST_BIN).tolist(), EOA] for row in actions]
    text = text_ids(two_robots, WORLD_PROMPTS["training"])
    prompt = [BOS, *text, *blocks[0], *blocks[1], *acts[0], *blocks[2], *blocks[3], *acts[1], SEP]
    assert batch["input_ids"].tolist() == [[*prompt, *blocks[4], *blocks[5], SEP]]


def test_tokens_and_pixels_in_one_sample(processor):
    """A prompt that is tokenized already, a target that is not: pixel_values hold only the target."""
    image = codes(processor)
    batch = processor(image_tokens=[image], actions=[ACTION], target_images=[picture()])
    assert batch["pixel_values"].shape == (1, 3, 64, 64)
    ids = batch["input_ids"][0].tolist()
    assert image_block(image) == ids[ids.index(BOI) : ids.index(EOI) + 1]
    assert ids.count(PLACEHOLDER) == 16 == batch["labels"][0].tolist().count(PLACEHOLDER)


def test_discretize_equals_image_tokens(processor, authors_model):
    """Tokenizing first and calling with `image_tokens`, or calling with pictures and tokenizing later: the same."""
    images, target = [picture(0, 64, 64), picture(1, 64, 256)], picture(2)
    later = authors_model.discretize(**processor(images, TEXT, target_images=[target]))

    def tokenize(image):
        return authors_model.tokenize_images(torch.from_numpy(processor.image_processor.pixels(image))[None])[0]

    first = processor(
        image_tokens=[tokenize(image) for image in images], instruction=TEXT, target_image_tokens=[tokenize(target)]
    )
    assert torch.equal(later["input_ids"], first["input_ids"])
    assert torch.equal(later["labels"], first["labels"])


# -------------------------------------------------------------------- prompts of a checkpoint and of a call


@pytest.mark.parametrize("name", ["training", "evaluation", "paper"])
def test_the_three_world_prompts(tokenizer, name):
    processor = libero_processor(tokenizer, prompts={"world": name})
    expected = text_ids(processor, WORLD_PROMPTS[name])
    ids = processor([picture()], actions=[ACTION])["input_ids"][0].tolist()
    assert ids[1 : ids.index(BOI)] == expected
    assert processor.prompts["world"] == WORLD_PROMPTS[name]


def test_a_prompt_of_a_call(processor):
    def text_of(**arguments) -> list[int]:
        ids = processor([picture()], **arguments)["input_ids"][0].tolist()
        return ids[1 : ids.index(BOI)]

    assert text_of(instruction="go", prompt="Robot, {instruction} now!") == text_ids(processor, "Robot, go now!")
    assert text_of(instruction="{x} go", prompt="{instruction}{}") == text_ids(processor, "{x} go{}")
    world = {"actions": [ACTION], "instruction": "go"}
    assert text_of(**world) == text_ids(processor, WORLD_PROMPTS["training"])  # it has no place for an instruction
    assert text_of(**world, prompt=WORLD_PROMPTS["paper"]) == text_ids(processor, WORLD_PROMPTS["paper"])
    assert text_of(**world, prompt="What if? {instruction}") == text_ids(processor, "What if? go")


@pytest.mark.parametrize(
    ("style", "text"), [("task_name", "KITCHEN SCENE3 turn on the stove"), ("task_language", "turn on the stove")]
)
def test_both_spellings_of_libero_long(processor, tokenizer, style, text):
    spelling = libero_processor(tokenizer, instruction_style=style)
    expected = processor(picture(), text)["input_ids"]
    assert torch.equal(spelling(picture(), "KITCHEN_SCENE3_turn_on_the_stove")["input_ids"], expected)


# -------------------------------------------------------------------- embodiments


def test_one_embodiment_or_a_default_needs_no_argument(processor, two_robots, tokenizer):
    assert processor.get_embodiment() == LIBERO
    with pytest.raises(ValueError, match=r"name one with embodiment=; known: libero \(D=7\) from .*, arm \(D=4\)"):
        two_robots.get_embodiment()
    chosen = two_robot_processor(tokenizer, default_embodiment="arm")
    assert chosen.get_embodiment() == ARM
    assert chosen.get_embodiment("libero") == LIBERO


def test_without_embodiments_pictures_and_text_work_and_actions_do_not(tokenizer):
    processor = WorldVLAProcessor(WorldVLAImageProcessor(64), tokenizer)
    assert processor(picture(), TEXT)["input_ids"].shape[0] == 1
    with pytest.raises(ValueError, match="no embodiment for actions; known: none"):
        processor(picture(), actions=[ACTION])


def test_decode_actions_of_several_embodiments(two_robots):
    tokens = torch.full((2, 3, 7), FIRST_BIN + 127)
    expected = np.broadcast_to(LIBERO.decode(np.full(7, 127)), (2, 3, 7))
    assert np.array_equal(two_robots.decode_actions(tokens, "libero"), expected)
    assert np.array_equal(two_robots.decode_actions(tokens.numpy(), ["libero", "libero"]), expected)
    assert two_robots.decode_actions(tokens[:, :, :4], embodiment="arm").shape == (2, 3, 4)
    assert two_robots.decode_actions([[[FIRST_BIN] * 4]], "arm").tolist() == [[ARM.decode(np.zeros(4, int)).tolist()]]


def test_the_unreachable_bin_decodes_like_the_first(processor):
    first = processor.decode_actions(torch.full((1, 1, 7), FIRST_BIN))
    assert np.array_equal(processor.decode_actions(torch.full((1, 1, 7), FIRST_BIN - 1)), first)


@pytest.mark.parametrize(
    ("tokens", "embodiment", "message"),
    [
        (torch.full((1, 2, 7), BOA), None, "14 of 14 ids are no action bins"),
        (torch.full((1, 2, 6), FIRST_BIN), None, "'libero' has 7 bins, these have shape \\(2, 6\\)"),
        (torch.full((2, 7), FIRST_BIN), None, "shape \\(batch, K, D\\), not int64 of shape \\(2, 7\\)"),
        (torch.zeros(1, 2, 7), None, "not float32"),
        (torch.full((2, 1, 7), FIRST_BIN), ["libero"], "one for each of the 2 samples, not 1"),
        (torch.full((1, 1, 7), FIRST_BIN), "panda", "unknown embodiment 'panda'; known: libero \\(D=7\\)"),
    ],
)
def test_tokens_that_are_no_actions(processor, tokens, embodiment, message):
    with pytest.raises(ValueError, match=message):
        processor.decode_actions(tokens, embodiment)


def test_decode_frames_keeps_samples_apart(processor, tiny_model):
    images = [codes(processor, seed, *shape) for seed, shape in enumerate([(4, 4), (4, 4), (2, 4), (4, 4)])]
    blocks = [image_block(image) for image in images]
    frames = processor.decode_frames([blocks[:3], [], blocks[3:]], tiny_model)
    assert [[image.size for image in row] for row in frames] == [[(64, 64), (64, 64), (64, 32)], [], [(64, 64)]]
    for image, entry in zip([*frames[0], *frames[2]], images, strict=True):
        pixels = tiny_model.detokenize_images(torch.from_numpy(entry)[None])
        (alone,) = processor.image_processor.postprocess(pixels)
        assert np.abs(np.asarray(image).astype(int) - np.asarray(alone)).max() <= 1
    tensor = torch.tensor([blocks[:2], blocks[:2]])
    assert [len(row) for row in processor.decode_frames(tensor, tiny_model)] == [2, 2]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.full((1, 1, 24), BOI), "not an image block"),
        (torch.tensor([pixels_block()]), r"\(batch, frames, block length\)"),
        ([[pixels_block()]], "no image codes"),
    ],
)
def test_ids_that_are_no_frames(processor, tiny_model, ids, message):
    with pytest.raises(ValueError, match=message):
        processor.decode_frames(ids, tiny_model)


# -------------------------------------------------------------------- in a checkpoint


def fields_of(processor: WorldVLAProcessor) -> dict:
    """What is stored, without the map to the code, which `save_pretrained` writes anew each time."""
    return {key: value for key, value in processor.to_dict().items() if key != "auto_map"}


def test_every_field_survives_save_and_load(tokenizer, tmp_path):
    saved = WorldVLAProcessor(
        WorldVLAImageProcessor(96),
        tokenizer,
        {"libero": LIBERO, "arm": ARM},
        default_embodiment="arm",
        prompts={"action": "Please {instruction}.", "world": "paper"},
        instruction_style="task_language",
        num_actions=10,
        history=4,
    )
    saved.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("*.py")} == {
        "action_tokenization_worldvla.py",
        "image_processing_worldvla.py",
        "processing_inputs_worldvla.py",
        "processing_worldvla.py",
        "prompts_worldvla.py",
        "tokens_worldvla.py",
    }
    for load in (WorldVLAProcessor.from_pretrained, AutoProcessor.from_pretrained):
        loaded = load(tmp_path, trust_remote_code=True)
        assert fields_of(loaded) == fields_of(saved)
        assert loaded.tokens == saved.tokens
        assert loaded.get_embodiment() == ARM
        call = {"images": [picture(), picture()], "instruction": "KITCHEN_SCENE3_go", "target_actions": [[0, 0, 1, 15]]}
        for key, value in saved(**call).items():
            assert torch.equal(loaded(**call)[key], value)
    assert WorldVLAProcessor.from_pretrained(tmp_path, num_actions=7, trust_remote_code=True).num_actions == 7
    stored = (tmp_path / "processor_config.json").read_text()
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "processor_config.json").read_text() == stored


def test_every_init_argument_is_a_field_that_can_be_restored():
    """ProcessorMixin drops keyword-only arguments at load, and saves only attributes named like their argument."""
    parameters = inspect.signature(WorldVLAProcessor.__init__).parameters
    assert all(parameter.kind is parameter.POSITIONAL_OR_KEYWORD for parameter in parameters.values())
    assert WorldVLAProcessor.get_attributes() == ["image_processor", "tokenizer"]


def test_the_stored_file_is_plain_and_readable(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "processor_config.json").read_text())
    assert stored["embodiments"]["libero"]["rotation"] == 180
    assert stored["embodiments"]["libero"]["high"][:4] == [0.9375, 0.9375, 0.9375, 0.375]
    assert stored["prompts"]["world"] == WORLD_PROMPTS["training"]
    assert stored["image_processor"]["target_size"] == 64
    assert stored["auto_map"]["AutoProcessor"] == "processing_worldvla.WorldVLAProcessor"
    assert (stored["num_actions"], stored["history"], stored["instruction_style"]) == (5, 2, "as_given")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"default_embodiment": "panda"}, r"unknown default_embodiment 'panda'; known: libero \(D=7\)"),
        ({"instruction_style": "shouted"}, "one of as_given, task_name, task_language, not 'shouted'"),
        ({"num_actions": 0}, "num_actions is an integer >= 1, not 0"),
        ({"history": 1.5}, "history is an integer >= 1, not 1.5"),
        ({"embodiments": {"robot": LIBERO}}, "embodiment 'robot' calls itself 'libero'"),
        ({"embodiments": {"libero": {"low": [0]}}}, "needs the field 'high'"),
    ],
)
def test_wrong_fields(tokenizer, fields, message):
    with pytest.raises(ValueError, match=message):
        libero_processor(tokenizer, **fields)
