"""Pictures in, pixel arrays out, and back: the authors' crop rule and pixel transform on PIL and numpy.

A picture becomes (3, H, W) float32 in [-1, 1] with sides that are multiples of 32, as the image tokenizer and the grid
tokens want it. Pictures arrive in the model's orientation: nothing here rotates. It knows no tokens and no robots.
"""

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.processing_utils import ImagesKwargs

GRID_UNIT = 32  # pixels; every side is a multiple, and a grid token counts them
MAX_ASPECT_RATIO = 4
_CHANNELS = (1, 3, 4)
_DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")


@lru_cache(maxsize=32)
def candidate_sizes(target_size: int) -> tuple[tuple[int, int], ...]:
    """Sizes (width, height) a picture may be cropped to: sides of 32 units, area <= target_size^2, ratio <= 4.

    The authors' walk (`generate_crop_size_list`): from the widest strip to the tallest, on the edge of the area budget.
    256 and 288 give 25 sizes, 512 gives 49. Raises ValueError when `target_size` is no positive multiple of 32.
    """
    if isinstance(target_size, bool) or not isinstance(target_size, int) or target_size < 1 or target_size % GRID_UNIT:
        raise ValueError(f"target_size is a positive multiple of {GRID_UNIT} pixels, not {target_size!r}")
    budget = (target_size // GRID_UNIT) ** 2
    sizes = []
    width, height = budget, 1
    while width > 0:
        if max(width, height) <= MAX_ASPECT_RATIO * min(width, height):
            sizes.append((width * GRID_UNIT, height * GRID_UNIT))
        if (height + 1) * width <= budget:
            height += 1
        else:
            width -= 1
    return tuple(sizes)


def choose_size(width: int, height: int, target_size: int) -> tuple[int, int]:
    """The candidate (width, height) that loses least of a picture to the crop; ties go to the larger tuple."""

    def kept(size: tuple[int, int]) -> float:
        scales = (size[0] / width, size[1] / height)
        return min(scales) / max(scales)

    return max(candidate_sizes(target_size), key=lambda size: (kept(size), size))


def center_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize a picture to cover (width, height) and cut exactly that from its middle.

    As the authors: BOX halvings while both sides are at least twice too long, then BICUBIC. Their crop offset is random
    where there is slack; this one is the true centre, so the result depends on nothing but the picture.
    """
    while image.width >= 2 * size[0] and image.height >= 2 * size[1]:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = max(size[0] / image.width, size[1] / image.height)
    image = image.resize((round(image.width * scale), round(image.height * scale)), resample=Image.Resampling.BICUBIC)
    left, upper = (image.width - size[0]) // 2, (image.height - size[1]) // 2
    return image.crop((left, upper, left + size[0], upper + size[1]))


def to_pil(picture: Any) -> Image.Image:
    """A picture as PIL image in mode L, RGB or RGBA.

    Accepts PIL images, and numpy arrays or torch tensors of shape (H, W), (H, W, C) or (C, H, W) with C = 1, 3 or 4,
    either uint8 or float in [0, 1]. Raises ValueError that says what to pass.
    """
    if isinstance(picture, Image.Image):
        if picture.mode in _DEEP_MODES:
            raise ValueError(
                f"a picture has 8 bits a channel, this one has mode {picture.mode}: scale it to uint8 first"
            )
        if picture.mode in ("L", "RGB", "RGBA"):
            return picture
        has_alpha = picture.mode in ("LA", "PA", "RGBa") or "transparency" in picture.info
        return picture.convert("RGBA" if has_alpha else "RGB")
    if isinstance(picture, torch.Tensor):
        picture = picture.detach().cpu()
        picture = (picture.float() if picture.is_floating_point() else picture).numpy()
    if not isinstance(picture, np.ndarray):
        raise ValueError(f"a picture is a PIL image, numpy array or torch tensor, not {type(picture).__name__}")
    array = _to_uint8(_channels_last(picture))
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)


def _channels_last(array: np.ndarray) -> np.ndarray:
    """(H, W), (H, W, C) or (C, H, W) -> (H, W, C); where both ends could be channels, the last is."""
    shape = array.shape
    if array.ndim == 2:
        array = array[:, :, None]
    elif array.ndim == 3 and shape[2] not in _CHANNELS and shape[0] in _CHANNELS:
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[2] not in _CHANNELS or array.size == 0:
        raise ValueError(f"a picture has shape (H, W), (H, W, C) or (C, H, W) with C = 1, 3 or 4, not {shape}")
    return array


def _to_uint8(array: np.ndarray) -> np.ndarray:
    """uint8 as it is, float in [0, 1] to the nearest of 0..255."""
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"a picture is uint8 or float in [0, 1], not {array.dtype}: scale it to uint8 first")
    low, high = float(array.min()), float(array.max())
    if not (low >= 0.0 and high <= 1.0):  # also false for NaN
        raise ValueError(f"a float picture lies in [0, 1], this one in [{low:g}, {high:g}]: give uint8 for 0..255")
    return np.rint(array.astype(np.float64) * 255.0).astype(np.uint8)


def blend_on_white(image: Image.Image) -> Image.Image:
    """To RGB, transparency blended onto white (Chameleon's `whiten_transparency`)."""
    if image.mode != "RGBA":
        return image.convert("RGB")
    values = np.asarray(image)
    alpha = values[:, :, 3:] / 255.0
    return Image.fromarray(((1 - alpha) * 255 + alpha * values[:, :, :3]).astype(np.uint8))


class WorldVLAImageProcessorKwargs(ImagesKwargs):
    """Arguments of `WorldVLAImageProcessor` that `from_pretrained` may override."""

    target_size: int


class WorldVLAImageProcessor(BaseImageProcessor):
    """Crop and scale pictures as the authors do, without their random offset; the reverse is `postprocess`.

    Args:
        target_size: pixels along the side of a square picture, a multiple of 32. A picture
            that is not square gets the candidate size of about the same area that fits its aspect ratio best.
    """

    model_input_names = ["pixel_values"]
    valid_kwargs = WorldVLAImageProcessorKwargs

    def __init__(self, target_size: int = 512, **kwargs: Any):
        super().__init__(**kwargs)
        candidate_sizes(target_size)  # raises when no picture could have this size
        self.target_size = target_size

    def pixels(self, picture: Any, target_size: int | None = None) -> np.ndarray:
        """One picture -> (3, H, W) float32 in [-1, 1], H and W multiples of 32."""
        image = to_pil(picture)
        size = choose_size(*image.size, self.target_size if target_size is None else target_size)
        values = np.asarray(blend_on_white(center_crop(image, size)))  # (H, W, 3) uint8
        return (values.astype(np.float64) / 255.0 * 2.0 - 1.0).astype(np.float32).transpose(2, 0, 1)

    def preprocess(
        self, images: Any, target_size: int | None = None, return_tensors: str | None = None
    ) -> BatchFeature:
        """Pictures -> `pixel_values` (n, 3, H, W) in [-1, 1] and `image_sizes` (n, 2), the (height, width) of each.

        `images` is one picture or a flat list. Where sizes differ, smaller pictures are padded with zeros at the right
        and the bottom; crop them to `image_sizes` before tokenizing.
        """
        is_one = isinstance(images, Image.Image) or (isinstance(images, np.ndarray | torch.Tensor) and images.ndim < 4)
        pixels = [self.pixels(picture, target_size) for picture in ([images] if is_one else images)]
        if not pixels:
            raise ValueError("images is empty: give at least one picture")
        sizes = np.array([image.shape[1:] for image in pixels])  # (n, 2)
        return BatchFeature({"pixel_values": pad_to_largest(pixels), "image_sizes": sizes}, tensor_type=return_tensors)

    def postprocess(self, pixel_values: torch.Tensor | np.ndarray) -> list[Image.Image]:
        """Pixels (n, 3, H, W), or one picture (3, H, W), in [-1, 1] -> list of PIL images.

        Values beyond are clamped; the cast to uint8 truncates, as the authors' decoder does. Raises ValueError on
        another shape and on NaN.
        """
        values = torch.as_tensor(pixel_values).detach().to("cpu", torch.float32)
        if values.ndim == 3:
            values = values[None]
        if values.ndim != 4 or values.shape[1] != 3:
            raise ValueError(f"pixel values have shape (n, 3, H, W) or (3, H, W), not {tuple(values.shape)}")
        if values.isnan().any():
            raise ValueError("pixel values contain NaN")
        values = ((values.clamp(-1.0, 1.0) + 1.0) / 2.0 * 255.0).permute(0, 2, 3, 1)
        return [Image.fromarray(image.numpy().astype(np.uint8)) for image in values]


def pad_to_largest(pixels: list[np.ndarray]) -> np.ndarray:
    """Stack (3, h, w) arrays as (n, 3, H, W), zeros at the right and the bottom of the smaller ones."""
    height, width = (max(image.shape[axis] for image in pixels) for axis in (1, 2))
    stacked = np.zeros((len(pixels), 3, height, width), dtype=np.float32)
    for index, image in enumerate(pixels):
        stacked[index, :, : image.shape[1], : image.shape[2]] = image
    return stacked


WorldVLAImageProcessor.register_for_auto_class()

__all__ = ["WorldVLAImageProcessor"]
