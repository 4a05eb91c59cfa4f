"""What a caller may hand to the processor: every form of pictures and tokens, batches of anything, and bad input."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sequences import (
    ACTION,
    ARM,
    BOA,
    BOI,
    BOS,
    EOA,
    EOI,
    FIRST_BIN,
    PAD,
    PLACEHOLDER,
    SEP,
    TEXT,
    codes,
    image_block,
    libero_processor,
    picture,
    pixels_block,
    two_robot_processor,
)

from transformers_worldvla import WorldVLAProcessor
from transformers_worldvla.action_tokenization_worldvla import LIBERO


@pytest.fixture(scope="module")
def processor(tokenizer) -> WorldVLAProcessor:
    return libero_processor(tokenizer)


@pytest.fixture(scope="module")
def two_robots(tokenizer) -> WorldVLAProcessor:
    return two_robot_processor(tokenizer)


# -------------------------------------------------------------------- image tokens


def test_image_tokens_in_every_form(processor):
    grids = np.stack([codes(processor, seed) for seed in (0, 1)])
    blocks = [image_block(entry) for entry in grids]
    expected = processor(image_tokens=list(grids), instruction=TEXT)["input_ids"].tolist()
    for form in (
        grids,
        torch.from_numpy(grids),
        grids.tolist(),
        blocks,
        np.array(blocks),
        torch.tensor(blocks),
        [torch.tensor(blocks[0]), grids[1]],
        [blocks[0], torch.from_numpy(grids[1])],
    ):
        assert processor(image_tokens=form, instruction=TEXT)["input_ids"].tolist() == expected
        in_a_batch = processor(image_tokens=[form, form], instruction=[TEXT, TEXT])["input_ids"].tolist()
        assert in_a_batch == expected * 2
    one = processor(image_tokens=grids[0], instruction=TEXT)["input_ids"].tolist()
    assert one == processor(image_tokens=[grids[0]], instruction=TEXT)["input_ids"].tolist()
    assert one == processor(image_tokens=blocks[0], instruction=TEXT)["input_ids"].tolist()
    stack = torch.tensor([blocks, blocks])  # (batch, frames, block length), what generate_frames returns
    assert processor(image_tokens=stack, instruction=[TEXT, TEXT])["input_ids"].tolist() == expected * 2


# -------------------------------------------------------------------- batches


def test_the_mixed_batch(processor):
    """One action sample and one world sample, each exactly what it is alone, behind padding on the left."""
    chunk = [ACTION] * 2
    batch = processor(
        images=[[picture(0), picture(1)], [picture(2)]],
        instruction=[TEXT, None],
        actions=[None, [ACTION]],
        target_actions=[chunk, None],
        target_images=[None, [picture(3)]],
    )
    singles = [
        processor([picture(0), picture(1)], TEXT, target_actions=chunk),
        processor([picture(2)], actions=[ACTION], target_images=[picture(3)]),
    ]
    assert_rows_are(batch, singles)


def assert_rows_are(batch, singles) -> None:
    """Row i is single i behind its padding; pictures follow one another."""
    length = max(single["input_ids"].shape[1] for single in singles)
    fill = {"input_ids": PAD, "attention_mask": 0, "labels": -100, "loss_weights": 0.0}
    has_labels = any("labels" in single for single in singles)
    assert set(batch) - {"pixel_values"} == set(fill if has_labels else ["input_ids", "attention_mask"])
    for key in set(batch) - {"pixel_values"}:
        assert batch[key].shape == (len(singles), length)
        for row, single in zip(batch[key].tolist(), singles, strict=True):
            width = single["input_ids"].shape[1]
            own = single[key][0].tolist() if key in single else [fill[key]] * width
            assert row == [fill[key]] * (length - width) + own
    pictures = [image for single in singles if "pixel_values" in single for image in single["pixel_values"]]
    assert len(pictures) == len(batch.get("pixel_values", []))
    for image, own in zip(batch.get("pixel_values", []), pictures, strict=True):
        height, width = own.shape[1:]  # a batch may pad further than a sample
        assert torch.equal(image[:, :height, :width], own)
        assert not image[:, height:].any() and not image[:, :, width:].any()


@st.composite
def samples(draw):
    """Arguments of one sample: any kind, robot and history, pictures in several forms, with or without target."""
    robot = draw(st.sampled_from([LIBERO, ARM]))
    kind = draw(st.sampled_from(["action", "world", "video"]))
    seed = draw(st.integers(0, 2**16))
    rng = np.random.default_rng(seed)

    def pictures(count: int, tokenized: bool) -> list:
        entries = []
        for _ in range(count):
            if tokenized:
                shape = draw(st.sampled_from([(4, 4), (2, 8), (4, 2)]))
                entries.append(rng.integers(4, 8196, shape))  # the published ids of codes
                continue
            image = rng.integers(0, 256, draw(st.sampled_from([(64, 64, 3), (40, 90, 3), (90, 30, 3)])), dtype=np.uint8)
            form = draw(st.sampled_from(["hwc", "chw", "gray", "pil", "torch", "float", "alpha"]))
            entries.append(
                {
                    "hwc": image,
                    "chw": image.transpose(2, 0, 1),
                    "gray": image[:, :, 0],
                    "pil": Image.fromarray(image),
                    "torch": torch.from_numpy(image).permute(2, 0, 1),
                    "float": image / 255,
                    "alpha": np.dstack([image, image[:, :, 0]]),
                }[form]
            )
        return entries

    def actions(count: int) -> np.ndarray:
        return rng.uniform(robot.low, robot.high, (count, robot.action_dim))

    steps, answers = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    sample = {"embodiment": robot.name, "instruction": None if kind == "world" else f"do task {seed}"}
    tokenized = draw(st.booleans())
    sample["image_tokens" if tokenized else "images"] = pictures(steps * robot.num_cameras, tokenized)
    if kind == "world":
        sample["actions"], answers = actions(steps), 1
    if kind == "action" and draw(st.booleans()):
        sample["target_actions"] = actions(answers)
    if kind == "video" or (kind == "world" and draw(st.booleans())):
        tokenized = draw(st.booleans())
        key = "target_image_tokens" if tokenized else "target_images"
        sample[key] = pictures(answers * robot.num_cameras, tokenized)
    sample["sample_weights"] = draw(st.sampled_from([1.0, 0.0, 0.5, 3.0]))
    return sample


ARGUMENTS = (
    *("images", "image_tokens", "instruction", "actions", "target_actions", "target_images", "target_image_tokens"),
    *("embodiment", "sample_weights"),
)


@settings(max_examples=250, deadline=None)
@given(st.lists(samples(), min_size=1, max_size=4))
def test_any_mixture_of_samples(two_robots, mixture):
    """A batch of anything: every row is the sample alone, and every sample obeys the grammar."""
    singles = [two_robots(**sample) for sample in mixture]
    batch = two_robots(**{name: [sample.get(name) for sample in mixture] for name in ARGUMENTS})
    assert_rows_are(batch, singles)
    for sample, single in zip(mixture, singles, strict=True):
        assert_grammar(sample, single)


def assert_grammar(sample, single) -> None:
    ids, robot = single["input_ids"][0].tolist(), ARM if sample["embodiment"] == "arm" else LIBERO
    images = sample.get("images") or sample["image_tokens"]
    targets = sample.get("target_images") or sample.get("target_image_tokens")
    answer_actions = sample.get("target_actions")
    assert single["attention_mask"].tolist() == [[1] * len(ids)]
    assert ids[0] == BOS and ids.count(BOS) == 1 and ids[-1] == SEP and PAD not in ids
    separator = ids.index(SEP)
    prompt, answer = ids[:separator], ids[separator + 1 :]
    assert prompt.count(BOI) == prompt.count(EOI) == len(images)
    steps = len(sample.get("actions", []))
    assert prompt.count(BOA) == prompt.count(EOA) == steps
    pixels = single["pixel_values"] if "pixel_values" in single else []
    assert len(pixels) == sum(len(sample.get(key, [])) for key in ("images", "target_images"))
    if steps:  # every action stands behind the C pictures of its step
        order = [token for token in prompt if token in (BOI, BOA)]
        assert order == ([BOI] * robot.num_cameras + [BOA]) * steps
    if targets is None and answer_actions is None:
        assert not answer and "labels" not in single
        return
    labels, weights = single["labels"][0].tolist(), single["loss_weights"][0].tolist()
    assert labels == [-100] * (separator + 1) + answer
    assert weights == [0.0] * (separator + 1) + [sample["sample_weights"]] * len(answer)
    if answer_actions is not None:
        assert len(answer) == len(answer_actions) * (robot.action_dim + 2) + 1
        bins = np.array(answer[:-1]).reshape(len(answer_actions), robot.action_dim + 2)[:, 1:-1] - FIRST_BIN
        half_bin = (np.array(robot.high) - np.array(robot.low)) / 510
        assert (np.abs(robot.decode(bins) - answer_actions) <= half_bin + 1e-7).all()
    else:
        assert answer.count(BOI) == len(targets) and answer[0] == BOI and answer[-2] == EOI


def test_sample_weights(processor):
    call = {"images": [[picture()], [picture()]], "instruction": [TEXT, TEXT], "target_actions": [[ACTION], [ACTION]]}
    for given_weights, expected in ((2.5, [2.5, 2.5]), ([0.5, 2], [0.5, 2]), ([None, 3], [1, 3]), (np.ones(2), [1, 1])):
        weights = processor(**call, sample_weights=given_weights)["loss_weights"]
        assert weights[:, -1].tolist() == expected
        assert not weights[:, 0].any()
    single = processor([picture()], TEXT, target_actions=[ACTION], sample_weights=0.25)
    assert single["loss_weights"].max() == 0.25


def test_one_prompt_and_one_embodiment_serve_a_batch_or_each_has_its_own(two_robots):
    images = [[picture(), picture()]] * 2
    shared = two_robots(images, [TEXT, TEXT], prompt="video", embodiment="arm")
    each = two_robots(images, [TEXT, TEXT], prompt=["video", "video"], embodiment=["arm", "arm"])
    assert torch.equal(shared["input_ids"], each["input_ids"])
    action, video = (two_robots(images[0], TEXT, prompt=kind, embodiment="arm") for kind in ("action", "video"))
    mixed = two_robots(images, [TEXT, TEXT], prompt=[None, "video"], embodiment="arm")
    assert_rows_are(mixed, [action, video])


def test_a_stack_of_pictures_is_one_sample_and_a_stack_of_stacks_a_batch(processor):
    stack = np.stack([picture(seed) for seed in range(4)])
    assert torch.equal(processor(stack, TEXT)["input_ids"], processor(list(stack), TEXT)["input_ids"])
    batch = processor(torch.from_numpy(stack).reshape(2, 2, 64, 64, 3), [TEXT, TEXT])
    assert torch.equal(batch["input_ids"], processor([list(stack[:2]), list(stack[2:])], [TEXT, TEXT])["input_ids"])


def test_tensors_arrays_or_lists(processor):
    call = {"images": [[picture()], [picture(), picture()]], "instruction": [TEXT, TEXT]}
    tensors, arrays, lists = (processor(**call, return_tensors=kind) for kind in ("pt", "np", None))
    ragged = processor(**call, return_tensors=None, padding=False)
    for key in ("input_ids", "attention_mask"):
        assert tensors[key].tolist() == arrays[key].tolist() == lists[key]
        assert isinstance(arrays[key], np.ndarray) and isinstance(lists[key], list)
        assert [len(row) for row in ragged[key]] == [len(lists[key][0]) - 24, len(lists[key][0])]
    assert lists["input_ids"][0][24:] == ragged["input_ids"][0]
    with pytest.raises(ValueError, match="padding=False needs return_tensors=None"):
        processor(**call, padding=False)


# -------------------------------------------------------------------- bad calls


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": None, "instruction": TEXT}, "no picture: give images \\(or image_tokens\\), at least one"),
        ({"images": [], "instruction": TEXT}, "images is empty"),
        ({"images": [[picture()], []], "instruction": [TEXT, TEXT]}, "sample 1: images is empty"),
        ({"images": [[[picture()]]], "instruction": [TEXT]}, "sample 0: images of one sample is a flat list"),
        ({"images": ["a.png"], "instruction": TEXT}, "a picture is a PIL image, numpy array or torch tensor, not str"),
        ({"images": [np.zeros((8, 8, 3), np.uint16)], "instruction": TEXT}, "not uint16"),
        ({"instruction": None}, "needs an instruction, a string that says what to do, not None"),
        ({"instruction": "  "}, "needs an instruction"),
        ({"instruction": [TEXT]}, "instruction of one sample is a string, not list"),
        ({"instruction": 3}, "instruction of one sample is a string, not int"),
        (
            {"images": [[picture()]], "instruction": TEXT},
            "instruction is a list with one entry for each of the 1 samples",
        ),
        ({"images": [[picture()]] * 2, "instruction": [TEXT]}, "each of the 2 samples .* not 1 entries"),
        ({"images": [[picture()]], "instruction": [TEXT], "sample_weights": [1, 2]}, "sample_weights .* not 2 entries"),
        ({"images": [[picture()]], "instruction": [TEXT], "actions": [None, [ACTION]]}, "actions .* not 2 entries"),
        ({"instruction": f"{TEXT}<reserved10000>"}, "reserved token <reserved10000>: remove it"),
        ({"instruction": "</s> open"}, "reserved token </s>"),
        ({"embodiment": "panda"}, "unknown embodiment 'panda'; known: libero \\(D=7\\)"),
        ({"target_actions": [ACTION[:6]]}, "shape \\(N, 7\\) with N >= 1, not \\(1, 6\\)"),
        ({"target_actions": ACTION}, "not \\(7,\\)"),
        ({"target_actions": []}, "not \\(0,\\)"),
        ({"target_actions": [[float("nan")] * 7]}, "action 0 is nan in dimension x"),
        (
            {"instruction": None, "actions": [ACTION] * 2},
            r"1 camera \(C\) and 2 actions \(N\) takes C x N = 2 images, not 1",
        ),
        (
            {"instruction": None, "actions": [ACTION], "target_images": [picture()] * 2},
            "answered by 1 target images, one step, not 2",
        ),
        ({"target_images": []}, "target_images is empty"),
        ({"instruction": None, "target_images": [picture()]}, "video prediction needs an instruction"),
        ({"target_images": [picture()], "target_actions": [ACTION]}, "not both: make two samples"),
        ({"actions": [ACTION], "target_actions": [ACTION]}, "kind world is answered by target images"),
        ({"prompt": "world"}, "a world prompt needs actions"),
        ({"prompt": "action", "actions": [ACTION]}, "kind action takes no actions"),
        ({"prompt": "video", "actions": [ACTION]}, "kind video takes no actions"),
        ({"prompt": "action", "target_images": [picture()]}, "kind action is answered by target_actions"),
        ({"prompt": "video", "target_actions": [ACTION]}, "kind video is answered by target images"),
        ({"prompt": "wrold"}, "one of action, world, video, or a template with {instruction} in it, not 'wrold'"),
        ({"prompt": "wrold", "actions": [ACTION]}, "not 'wrold'"),
        ({"target_size": 100}, "positive multiple of 32 pixels, not 100"),
        ({"sample_weights": -1.0, "target_actions": [ACTION]}, "a sample weight is a number >= 0, not -1.0"),
        ({"padding": "max_length"}, "padding is True .* not 'max_length'"),
        ({"image_tokens": [np.full((4, 4), 2007)]}, "as pictures and as tokens: give one of the two"),
        ({"images": None, "image_tokens": [np.full((4, 4), 1)]}, "16 of 16 image tokens are no ids of image codes"),
        ({"images": None, "image_tokens": [np.full((4, 4), PLACEHOLDER)]}, "16 of 16 image tokens"),
        ({"images": None, "image_tokens": [np.full((3, 4), 2007)]}, "48 pixels has no grid token"),
        ({"images": None, "image_tokens": [np.full((4, 4), 2007.0)]}, "not shape \\(4, 4\\) of float64"),
        ({"images": None, "image_tokens": [pixels_block()]}, "no ids of image codes"),
        ({"images": None, "image_tokens": [pixels_block()[:-1]]}, "not an image block"),
        ({"images": None, "image_tokens": ["x"]}, "flat image block, not a str"),
    ],
)
def test_a_bad_call_gets_one_clear_line(processor, arguments, message):
    call = {"images": [picture()], "instruction": TEXT, **arguments}
    with pytest.raises(ValueError, match=message) as error:
        processor(**call)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "several embodiments, name one with embodiment="),
        ({"embodiment": "arm"}, r"with 2 cameras \(C\) the number of images is a multiple of 2, not 1"),
        ({"embodiment": "arm", "actions": [[0, 0, 0, 10]]}, r"C x N = 2 images, not 1"),
        ({"embodiment": "libero", "target_actions": [[0, 0, 0, 10]]}, r"'libero' have shape \(N, 7\)"),
        (
            {"embodiment": "arm", "images": [picture()] * 2, "target_images": [picture()]},
            "target images is a multiple of 2",
        ),
    ],
)
def test_a_bad_call_with_two_robots(two_robots, arguments, message):
    with pytest.raises(ValueError, match=message):
        two_robots(**{"images": [picture()], "instruction": TEXT, **arguments})


def test_an_error_in_a_batch_says_in_which_sample(processor):
    with pytest.raises(ValueError, match="^sample 1: action 0 is nan"):
        processor([[picture()]] * 2, [TEXT, TEXT], target_actions=[None, [[float("nan")] * 7]])
