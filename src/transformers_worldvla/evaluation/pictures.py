"""Draws what was measured: captioned panels, film strips, line plots and GIFs, with Pillow alone.

Everything is a PIL image in mode RGB that fits beside the others; nothing here knows a model or an episode.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

INK, FAINT, PAPER = (32, 33, 36), (218, 220, 224), (255, 255, 255)
BLUE, ORANGE, GREY = (26, 115, 232), (232, 113, 10), (128, 134, 139)
SUPERSAMPLING = 2  # plots are drawn this much larger: Pillow's lines are not smooth
FONT_SIZE = 13
GIF_COLORS = 128


def font(size: int = FONT_SIZE) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font that Pillow brings along."""
    return ImageFont.load_default(size)


def line_height(size: int = FONT_SIZE) -> int:
    """Pixels from one line of text to the next."""
    return round(size * 1.5)


def fit_text(text: str, width: int, size: int = FONT_SIZE) -> str:
    """The text, cut with an ellipsis where it is wider than `width` pixels."""
    face = font(size)
    if face.getlength(text) <= width:
        return text
    while text and face.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."


def label(text: str, width: int, size: int = FONT_SIZE, color: tuple[int, int, int] = INK) -> Image.Image:
    """One line of text on a strip of that width."""
    strip = Image.new("RGB", (width, line_height(size)), PAPER)
    ImageDraw.Draw(strip).text((0, size // 5), fit_text(text, width, size), fill=color, font=font(size))
    return strip


def enlarge(picture: Image.Image, side: int) -> Image.Image:
    """The picture with its longer side at that many pixels."""
    scale = side / max(picture.size)
    width, height = (max(1, round(length * scale)) for length in picture.size)
    return picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)


def beside(pictures: Sequence[Image.Image], gap: int = 8) -> Image.Image:
    """Pictures in a row, aligned at the top."""
    width = sum(picture.width for picture in pictures) + gap * (len(pictures) - 1)
    row = Image.new("RGB", (width, max(picture.height for picture in pictures)), PAPER)
    left = 0
    for picture in pictures:
        row.paste(picture, (left, 0))
        left += picture.width + gap
    return row


def below(pictures: Sequence[Image.Image], gap: int = 8, margin: int = 0) -> Image.Image:
    """Pictures in a column, aligned at the left, with a margin around it."""
    size = (
        max(picture.width for picture in pictures) + 2 * margin,
        sum(picture.height for picture in pictures) + gap * (len(pictures) - 1) + 2 * margin,
    )
    column = Image.new("RGB", size, PAPER)
    top = margin
    for picture in pictures:
        column.paste(picture, (margin, top))
        top += picture.height + gap
    return column


def captioned(picture: Image.Image, caption: str) -> Image.Image:
    """A line of text over a picture."""
    return below([label(caption, picture.width), picture], gap=2)


def film_strip(rows: Mapping[str, Sequence[Image.Image]], columns: Sequence[str], side: int = 128) -> Image.Image:
    """One row of pictures a name, each column under its title. All rows have as many pictures as there are titles."""
    for name, pictures in rows.items():
        if len(pictures) != len(columns):
            raise ValueError(f"row {name!r} has {len(pictures)} pictures for {len(columns)} columns")
    lines = []
    for number, (name, pictures) in enumerate(rows.items()):
        enlarged = [enlarge(picture, side) for picture in pictures]
        if number == 0:
            enlarged = [captioned(picture, title) for picture, title in zip(enlarged, columns, strict=True)]
        strip = beside(enlarged, gap=4)
        lines.append(below([label(name, strip.width, color=GREY), strip], gap=2))
    return below(lines)


@dataclass(frozen=True)
class Line:
    """Values y at places x of a plot; a name makes an entry of the legend."""

    x: Sequence[float] | np.ndarray
    y: Sequence[float] | np.ndarray
    color: tuple[int, int, int]
    name: str | None = None
    width: int = 2


def line_plot(title: str, lines: Sequence[Line], size: tuple[int, int], x_label: str = "") -> Image.Image:
    """Lines over common axes with the range of both written on them, and a legend of the lines that have names.

    The y axis spans the finite values of all lines. Raises ValueError when there is none.
    """
    points = [(np.asarray(line.x, float), np.asarray(line.y, float)) for line in lines]
    finite = [y[np.isfinite(y)] for _, y in points]
    if not any(len(y) for y in finite):
        raise ValueError(f"the plot {title!r} has no finite value")
    low, high = float(np.concatenate(finite).min()), float(np.concatenate(finite).max())
    if high - low < 1e-6:
        low, high = low - 0.5, high + 0.5
    first = min(float(x.min()) for x, _ in points if len(x))
    last = max(max(float(x.max()) for x, _ in points if len(x)), first + 1e-6)

    scale, text = SUPERSAMPLING, round(FONT_SIZE * 0.85) * SUPERSAMPLING
    width, height = size[0] * scale, size[1] * scale
    image = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(image)
    left, right = round(text * 3.4), width - text // 2
    top, bottom = round(text * 1.7), height - round(text * 1.6)
    pad = 0.05 * (high - low)

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            left + (x - first) / (last - first) * (right - left),
            bottom - (y - low + pad) / (high - low + 2 * pad) * (bottom - top),
        )

    draw.rectangle((left, top, right, bottom), outline=FAINT, width=scale)
    if low < 0 < high:
        draw.line((place(first, 0), place(last, 0)), fill=FAINT, width=scale)
    face = font(text)
    for value in (low, high):
        draw.text((left - text // 3, place(first, value)[1]), f"{value:.2g}", fill=GREY, font=face, anchor="rm")
    draw.text((left, bottom + text // 4), f"{first:g}", fill=GREY, font=face)
    draw.text((right, bottom + text // 4), f"{last:g}", fill=GREY, font=face, anchor="ra")
    draw.text(((left + right) // 2, bottom + text // 4), x_label, fill=GREY, font=face, anchor="ma")
    draw.text((left, 0), title, fill=INK, font=face)
    for line, (x, y) in zip(lines, points, strict=True):
        dots = [place(a, b) for a, b in zip(x.tolist(), y.tolist(), strict=True) if np.isfinite(b)]
        if len(dots) > 1:
            draw.line(dots, fill=line.color, width=line.width * scale, joint="curve")
        elif dots:
            reach = line.width * scale
            draw.ellipse((dots[0][0] - reach, dots[0][1] - reach, dots[0][0] + reach, dots[0][1] + reach), line.color)
    _legend(draw, [line for line in lines if line.name], right, face, text)
    return image.resize(size, Image.Resampling.LANCZOS)


def _legend(
    draw: ImageDraw.ImageDraw,
    lines: Sequence[Line],
    right: int,
    face: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    text: int,
) -> None:
    """Names of lines at the top right, in their colours."""
    for line in reversed(lines):
        draw.text((right, 0), line.name or "", fill=line.color, font=face, anchor="ra")
        right -= round(face.getlength(line.name or "")) + text


def save_gif(frames: Sequence[Image.Image], path: Path, fps: float) -> None:
    """Write an endless GIF. One palette for all frames, so that what does not move does not flicker.

    GIF counts time in 1/100 s, and players slow down what is faster than 50 frames a second.
    """
    if not frames:
        raise ValueError("a GIF has at least one frame")
    sample = frames[:: max(1, len(frames) // 8)]
    palette = below([frame.convert("RGB") for frame in sample], gap=0).quantize(GIF_COLORS)
    indexed = [frame.convert("RGB").quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    duration = max(20, round(100 / fps) * 10)
    indexed[0].save(path, save_all=True, append_images=indexed[1:], duration=duration, loop=0, optimize=False)
