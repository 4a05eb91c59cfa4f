"""One encoded picture, PNG or JPEG, as an array."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

# what Pillow raises for damaged files
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, zlib.error, struct.error, Image.DecompressionBombError)


class PictureError(ValueError):
    """Bytes that are not a whole picture."""


def decode_picture(source: bytes | Path) -> np.ndarray:
    """A picture file, or its bytes: (H, W, 3) uint8 RGB, turned as its EXIF tag says. Raises PictureError."""
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
            return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
    except DAMAGE as error:
        text = "the file is missing" if isinstance(error, FileNotFoundError) else str(error)
        raise PictureError(f"is not a picture: {text.splitlines()[0] if text else type(error).__name__}") from error
