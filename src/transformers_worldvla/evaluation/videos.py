"""Writes what a camera saw: mp4 through PyAV, GIF through Pillow, with a line of text above the picture."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from .pictures import captioned, save_gif

SUFFIXES = (".mp4", ".gif")


def write_video(frames: Sequence[np.ndarray], path: Path, fps: float, caption: str = "") -> None:
    """Write frames (H, W, 3) uint8 to an mp4 (H.264) or gif file; the folder is made.

    Raises ValueError for another suffix or no frame.
    """
    if path.suffix not in SUFFIXES or not frames:
        raise ValueError(f"{path}: a video has frames and a name that ends in {' or '.join(SUFFIXES)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = [Image.fromarray(frame) for frame in frames]
    if caption:
        pictures = [captioned(picture, caption) for picture in pictures]
    if path.suffix == ".gif":
        save_gif(pictures, path, fps)
    else:
        _write_mp4(pictures, path, fps)


def _write_mp4(pictures: Sequence[Image.Image], path: Path, fps: float) -> None:
    import av

    width, height = (side + side % 2 for side in pictures[0].size)  # H.264 wants even sides
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for picture in pictures:
            canvas = Image.new("RGB", (width, height))
            canvas.paste(picture)
            container.mux(stream.encode(av.VideoFrame.from_image(canvas)))
        container.mux(stream.encode())
