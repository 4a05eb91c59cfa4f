"""Random crops and colours for pictures, one and the same for all pictures of a sample.

History and target then show one scene through one camera: a world model is never asked to predict a jump that no action
made. Works on uint8 arrays with PIL and numpy, before anything is tokenized; knows no samples and no episodes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from PIL import Image

LUMA = np.array([0.299, 0.587, 0.114])
_YIQ = np.array([LUMA, [0.59590059, -0.27455667, -0.32134392], [0.21153661, -0.52273617, 0.31119955]])


@dataclass(frozen=True)
class ImageAugmentation:
    """How much pictures may change; the defaults are OpenVLA's, 0 (or `crop` 1) leaves a part out.

    Attributes:
        crop: least share of the area that a crop keeps; its shape is the picture's, its place is random, and it is
            scaled back to the picture's size (bicubic).
        brightness: most that is added, in shares of white.
        contrast, saturation: a factor between 1 - this and 1 + this. Contrast is about the mean of the sample's first
            picture.
        hue: most that colours are turned, in shares of the colour circle.
    """

    crop: float = 0.9
    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2
    hue: float = 0.05

    def __post_init__(self) -> None:
        for field in fields(self):
            value, low = getattr(self, field.name), 1e-3 if field.name == "crop" else 0.0
            if not low <= value <= 1.0:
                raise ValueError(f"{field.name} is a number between {low:g} and 1, not {value!r}")

    def __call__(self, pictures: Sequence[np.ndarray], rng: np.random.Generator) -> list[np.ndarray]:
        """Change all pictures (H, W, 3) uint8, of any sizes, alike; the same `rng` state gives the same change."""
        area, left, upper = rng.uniform([self.crop, 0.0, 0.0], 1.0)
        side = math.sqrt(area)
        box = (left * (1 - side), upper * (1 - side), side)
        brightness, contrast, saturation, hue = rng.uniform(-1.0, 1.0, 4)
        cropped = [_crop(picture, *box) for picture in pictures] if self.crop < 1 else list(pictures)
        if not (self.brightness or self.contrast or self.saturation or self.hue):
            return cropped
        matrix = (1 + contrast * self.contrast) * _hue(hue * self.hue) @ _saturation(1 + saturation * self.saturation)
        shift = 255 * brightness * self.brightness
        mean = float((cropped[0].reshape(-1, 3).mean(axis=0) @ LUMA) + shift)
        # (x + shift - mean) * contrast + mean; hue and saturation leave greys as they are
        offset = (1 + contrast * self.contrast) * (shift - mean) + mean
        return [_recolour(picture, matrix, offset) for picture in cropped]


def _crop(picture: np.ndarray, left: float, upper: float, side: float) -> np.ndarray:
    """Enlarge a part of a picture to its size; place and side in shares of width and height."""
    height, width = picture.shape[:2]
    box = (left * width, upper * height, (left + side) * width, (upper + side) * height)
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC, box=box))


def _recolour(picture: np.ndarray, matrix: np.ndarray, offset: float) -> np.ndarray:
    """One affine map of (red, green, blue) for all pixels, rounded and clipped."""
    values = picture.astype(np.float32) @ matrix.T.astype(np.float32) + np.float32(offset)
    return np.rint(values).clip(0, 255).astype(np.uint8)


def _saturation(factor: float) -> np.ndarray:
    """Mix of a colour and its grey: (3, 3)."""
    return factor * np.eye(3) + (1 - factor) * np.tile(LUMA, (3, 1))


def _hue(turn: float) -> np.ndarray:
    """Rotation of the colours about the grey axis in the YIQ space by a share of the circle: (3, 3)."""
    cosine, sine = math.cos(2 * math.pi * turn), math.sin(2 * math.pi * turn)
    rotation = np.array([[1.0, 0.0, 0.0], [0.0, cosine, -sine], [0.0, sine, cosine]])
    return np.linalg.inv(_YIQ) @ rotation @ _YIQ
