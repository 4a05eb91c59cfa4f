"""The picture side of the processor: the authors' crop rule and pixel transform, every kind of picture, and back."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

# not from the top level, where transformers 5.5 hides it when torchvision is not installed
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from transformers_worldvla import WorldVLAImageProcessor
from transformers_worldvla.image_processing_worldvla import candidate_sizes, choose_size

GRID_ZERO = 8804  # published id of a grid token of 0 units


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def transform(rgb: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 -> (3, H, W): the authors' transform, written out."""
    return (rgb.astype(np.float64) / 255 * 2 - 1).astype(np.float32).transpose(2, 0, 1)


# -------------------------------------------------------------------- which size


@pytest.mark.parametrize(("target", "count"), [(256, 25), (288, 25), (512, 49)])
def test_candidate_sizes(target, count):
    sizes = candidate_sizes(target)
    assert len(sizes) == len(set(sizes)) == count
    assert (target, target) in sizes
    for width, height in sizes:
        assert width % 32 == height % 32 == 0
        assert width * height <= target**2
        assert max(width, height) <= 4 * min(width, height)


@pytest.mark.parametrize(
    ("picture", "target", "size"),
    [
        ((640, 480), 256, (288, 224)),
        ((640, 480), 512, (576, 448)),
        ((1280, 720), 256, (320, 192)),
        ((1280, 720), 512, (672, 384)),
        ((256, 256), 256, (256, 256)),
        ((128, 128), 512, (512, 512)),
        ((720, 1280), 256, (192, 320)),
        ((3000, 10), 256, (512, 128)),  # longer than any candidate: the longest
    ],
)
def test_the_authors_choice_of_size(picture, target, size):
    assert choose_size(*picture, target) == size


def test_sizes_of_the_reference_pictures_are_those_of_the_authors(authors_tiny):
    reference = json.loads((authors_tiny / "reference.json").read_text())["image_tokens"]
    processor = WorldVLAImageProcessor()
    assert len(reference) == 22
    for key, block in reference.items():
        name, target = key.split("@")
        _, height, width = processor.pixels(Image.open(authors_tiny / "images" / f"{name}.png"), int(target)).shape
        assert [GRID_ZERO + height // 32, GRID_ZERO + width // 32] == block[1:3]
        assert len(block) == height // 16 * (width // 16 + 1) + 4


@pytest.mark.parametrize("target", [0, -32, 100, 256.0, "256", True, None])
def test_target_size_is_a_multiple_of_32(target):
    with pytest.raises(ValueError, match="positive multiple of 32 pixels"):
        WorldVLAImageProcessor(target_size=target)


# -------------------------------------------------------------------- which pixels


def test_a_picture_of_the_right_size_is_only_rescaled():
    rgb = noise(256, 256, 3)
    pixels = WorldVLAImageProcessor(256).pixels(Image.fromarray(rgb))
    assert pixels.dtype == np.float32
    assert np.array_equal(pixels, transform(rgb))


def test_halving_is_one_box_filter():
    image = Image.fromarray(noise(512, 512, 3))
    expected = np.asarray(image.resize((256, 256), Image.Resampling.BOX))
    assert np.array_equal(WorldVLAImageProcessor(256).pixels(image), transform(expected))


def test_other_scales_are_bicubic_after_the_halvings():
    image = Image.fromarray(noise(300, 300, 3))
    expected = np.asarray(image.resize((256, 256), Image.Resampling.BICUBIC))
    assert np.array_equal(WorldVLAImageProcessor(256).pixels(image), transform(expected))
    image = Image.fromarray(noise(601, 601, 3))
    halved = image.resize((300, 300), Image.Resampling.BOX)
    expected = np.asarray(halved.resize((256, 256), Image.Resampling.BICUBIC))
    assert np.array_equal(WorldVLAImageProcessor(256).pixels(image), transform(expected))


def test_the_crop_is_the_centre():
    """320x256 of target 256 is 288x224: scaled by 0.9 to 288x230, three rows go at the top and three at the bottom."""
    image = Image.fromarray(noise(256, 320, 3))
    scaled = np.asarray(image.resize((288, 230), Image.Resampling.BICUBIC))
    pixels = WorldVLAImageProcessor(256).pixels(image)
    assert np.array_equal(pixels, transform(scaled[3:227]))
    assert np.array_equal(pixels, WorldVLAImageProcessor(256).pixels(image))  # the authors' offset would differ


def test_target_size_of_a_call():
    assert WorldVLAImageProcessor(256).pixels(noise(64, 64, 3), target_size=512).shape == (3, 512, 512)


# -------------------------------------------------------------------- every kind of picture

RGB = noise(48, 64, 3)


@pytest.mark.parametrize(
    "picture",
    [
        pytest.param(RGB, id="numpy HWC"),
        pytest.param(RGB.transpose(2, 0, 1), id="numpy CHW"),
        pytest.param(RGB[::-1][::-1], id="numpy view"),
        pytest.param(torch.from_numpy(RGB), id="torch HWC"),
        pytest.param(torch.from_numpy(RGB).permute(2, 0, 1), id="torch CHW"),
        pytest.param(RGB / 255, id="float64"),
        pytest.param((RGB / 255).astype(np.float32), id="float32"),
        pytest.param(torch.from_numpy(RGB).permute(2, 0, 1) / 255, id="torch float32 CHW"),
        pytest.param((torch.from_numpy(RGB) / 255).requires_grad_(), id="torch with gradient"),
        pytest.param(np.dstack([RGB, np.full((48, 64), 255, np.uint8)]), id="opaque RGBA"),
        pytest.param(Image.fromarray(RGB).convert("RGBA"), id="PIL opaque RGBA"),
    ],
)
def test_one_picture_in_many_forms(picture):
    processor = WorldVLAImageProcessor(256)
    assert np.array_equal(processor.pixels(picture), processor.pixels(Image.fromarray(RGB)))


@pytest.mark.parametrize(
    "picture", [RGB[:, :, 0], RGB[:, :, :1], RGB[None, :, :, 0], Image.fromarray(RGB[:, :, 0]), RGB[:, :, 0] / 255]
)
def test_grayscale_becomes_three_equal_channels(picture):
    processor = WorldVLAImageProcessor(256)
    expected = processor.pixels(np.repeat(RGB[:, :, :1], 3, axis=2))
    assert np.array_equal(processor.pixels(picture), expected)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBX", "CMYK", "YCbCr", "HSV"])
def test_other_pil_modes(mode):
    flat = Image.new("RGB", (64, 64), (255, 255, 255)).convert("L" if mode in ("LA", "PA") else "RGB").convert(mode)
    pixels = WorldVLAImageProcessor(64).pixels(flat)
    assert pixels.shape == (3, 64, 64)
    assert np.allclose(pixels, 1.0, atol=0.02)


def test_transparency_is_blended_onto_white():
    rgba = np.zeros((64, 64, 4), np.uint8)
    rgba[:, :, 0], rgba[:, :32, 3], rgba[:, 32:, 3] = 200, 0, 128
    pixels = WorldVLAImageProcessor(64).pixels(rgba)
    assert np.array_equal(pixels[:, :, :32], np.ones((3, 64, 32), np.float32))
    alpha = 128 / 255
    expected = [int((1 - alpha) * 255 + alpha * 200), int((1 - alpha) * 255)]
    assert np.array_equal(pixels[0, :, 32:], np.full((64, 32), expected[0] / 255 * 2 - 1, np.float32))
    assert np.array_equal(pixels[1, :, 32:], np.full((64, 32), expected[1] / 255 * 2 - 1, np.float32))


def test_transparency_of_a_palette():
    image = Image.new("P", (64, 64), 0)
    image.putpalette([10, 20, 30] * 256)
    image.info["transparency"] = 0
    assert np.array_equal(WorldVLAImageProcessor(64).pixels(image), np.ones((3, 64, 64), np.float32))


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (np.zeros((8, 8, 3), np.uint16), "uint8 or float in \\[0, 1\\], not uint16"),
        (np.zeros((8, 8, 3), np.int64), "uint8 or float in \\[0, 1\\], not int64"),
        (np.zeros((8, 8, 3), bool), "not bool"),
        (np.full((8, 8, 3), 255.0), "lies in \\[0, 1\\], this one in \\[255, 255\\]"),
        (np.full((8, 8, 3), -0.5), "this one in \\[-0.5, -0.5\\]"),
        (np.full((8, 8, 3), np.nan), "lies in \\[0, 1\\]"),
        (torch.zeros(8, 8, 3, dtype=torch.int32), "not int32"),
        (np.zeros((8, 8, 2), np.uint8), "not \\(8, 8, 2\\)"),
        (np.zeros((2, 8, 8), np.uint8), "not \\(2, 8, 8\\)"),
        (np.zeros(8, np.uint8), "not \\(8,\\)"),
        (np.zeros((0, 8, 3), np.uint8), "not \\(0, 8, 3\\)"),
        (Image.new("I;16", (8, 8)), "8 bits a channel, this one has mode I;16"),
        (Image.new("F", (8, 8)), "this one has mode F"),
        ("frame.png", "PIL image, numpy array or torch tensor, not str"),
        (None, "not NoneType"),
    ],
)
def test_what_is_no_picture_gets_one_clear_line(picture, message):
    with pytest.raises(ValueError, match=message) as error:
        WorldVLAImageProcessor(256).pixels(picture)
    assert "\n" not in str(error.value)


# -------------------------------------------------------------------- many pictures


@pytest.mark.parametrize("kind", ["pt", "np"])
def test_a_list_of_pictures_is_padded_at_the_right_and_the_bottom(kind):
    processor = WorldVLAImageProcessor(256)
    wide, tall = noise(48, 64, 3), noise(64, 48, 3)
    batch = processor([wide, tall], return_tensors=kind)
    pixels = np.asarray(batch["pixel_values"])
    assert pixels.shape == (2, 3, 288, 288)
    assert pixels.dtype == np.float32
    assert np.asarray(batch["image_sizes"]).tolist() == [[224, 288], [288, 224]]
    assert np.array_equal(pixels[0, :, :224], processor.pixels(wide)) and not pixels[0, :, 224:].any()
    assert np.array_equal(pixels[1, :, :, :224], processor.pixels(tall)) and not pixels[1, :, :, 224:].any()


def test_one_picture_and_a_stack_of_pictures():
    processor = WorldVLAImageProcessor(64)
    stack = noise(3, 64, 64, 3)
    assert processor(stack[0])["pixel_values"].shape == (1, 3, 64, 64)
    assert np.array_equal(processor(stack)["pixel_values"], processor(list(stack))["pixel_values"])
    with pytest.raises(ValueError, match="images is empty"):
        processor([])


# -------------------------------------------------------------------- back to pictures


def test_postprocess_truncates_as_the_authors_do():
    values = torch.tensor([-3.0, -1.0, -0.999, 0.0, 0.5, 0.9999, 1.0, 7.0])
    pixels = values.expand(3, 1, 8)
    (image,) = WorldVLAImageProcessor().postprocess(pixels)
    assert np.asarray(image)[0, :, 0].tolist() == [0, 0, 0, 127, 191, 254, 255, 255]


def test_postprocess_undoes_the_transform_within_one_grey_level():
    rgb = noise(2, 64, 96, 3)
    images = WorldVLAImageProcessor().postprocess(np.stack([transform(one) for one in rgb]))
    assert [image.size for image in images] == [(96, 64)] * 2
    difference = np.stack([np.asarray(image) for image in images]).astype(int) - rgb
    assert difference.min() >= -1 and difference.max() <= 0  # truncated, never rounded up


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (torch.zeros(1, 4, 8, 8), "shape \\(n, 3, H, W\\)"),
        (torch.zeros(8, 8), "not \\(8, 8\\)"),
        (torch.full((3, 8, 8), torch.nan), "NaN"),
    ],
)
def test_postprocess_refuses_what_are_no_pixels(pixels, message):
    with pytest.raises(ValueError, match=message):
        WorldVLAImageProcessor().postprocess(pixels)


# -------------------------------------------------------------------- in a checkpoint


def test_save_and_load(tmp_path: Path):
    WorldVLAImageProcessor(target_size=288).save_pretrained(tmp_path)
    assert WorldVLAImageProcessor.from_pretrained(tmp_path).target_size == 288
    assert WorldVLAImageProcessor.from_pretrained(tmp_path, target_size=256).target_size == 256
    stored = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert stored["auto_map"] == {"AutoImageProcessor": "image_processing_worldvla.WorldVLAImageProcessor"}
    assert (tmp_path / "image_processing_worldvla.py").is_file()


def test_auto_class_loads_the_installed_code(tmp_path: Path):
    WorldVLAImageProcessor(target_size=288).save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    assert loaded.target_size == 288
    picture = noise(50, 70, 3)
    assert np.array_equal(loaded.pixels(picture), WorldVLAImageProcessor(288).pixels(picture))
