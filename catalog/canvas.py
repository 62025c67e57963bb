"""What pictures are put together from: a part of an image at its place, thin lines to a fraction of a pixel, a mask's outline, a scale.

A canvas is float32 (rows, columns, RGB) from 0 to 255. Places in an image count from the corner of its first pixel.
"""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from catalog.contours import BoolArray, FloatArray
from catalog.lettering import TEXT, font, length

Colour = tuple[int, int, int]
Canvas = npt.NDArray[np.float32]  # (rows, columns, RGB), 0 to 255

# Okabe and Ito's palette for all kinds of colour vision, without its black and its blue, which are lost on a dark image.
PALETTE: tuple[Colour, ...] = ((204, 121, 167), (230, 159, 0), (240, 228, 66), (0, 158, 115), (213, 94, 0), (86, 180, 233))
CHECKSUM_START = 1  # a checksum of the name picks the colour; from here `inner` gets orange and `outer` sky blue
BACKGROUND, INK, DIM = (20, 20, 20), (235, 235, 235), (165, 165, 165)

PERCENTILES = (1.0, 99.5)
LINE = 1.6  # px of the picture
DASH = 4


@dataclass(frozen=True)
class Pane:
    """Where a part of an image lies in the picture: `columns` × `rows` pixels from (`x0`, `y0`), scaled to `width` × `height`."""

    left: int
    top: int
    width: int
    height: int
    x0: int
    y0: int
    columns: int
    rows: int

    @property
    def scale(self) -> tuple[float, float]:
        """Pixels of the picture an image pixel, in x and in y."""
        return self.width / self.columns, self.height / self.rows

    def place(self, points: FloatArray) -> FloatArray:
        """Return where points of the image, (n, 2) from the first pixel's corner, lie in the picture, from its corner."""
        return (points - (self.x0, self.y0)) * self.scale + (self.left, self.top)


def windowed(image: npt.NDArray[Any], part: tuple[slice, slice] = np.s_[:, :]) -> tuple[npt.NDArray[np.float32], str]:
    """Return an image's grey values from 0 to 255, a new array, and in words the window that made them.

    Dark and bright ends are the percentiles 1 and 99.5 of what is finite in a part of it, or where those are equal its least and
    largest value. What is not finite is 0. A colour image, (rows, columns, 3), of 8 bits is as it is.
    """
    if np.ndim(image) == 3 and image.dtype == np.uint8:
        return image.astype(np.float32), "colours as stored"
    values = np.asarray(image, np.float64)
    finite = np.isfinite(values)
    grey = np.zeros(values.shape, np.float32)
    gaps = int((~finite[part]).sum())
    missing = f", {gaps} px are no number and black" if gaps else ""
    known = values[part][finite[part]]
    if not known.size:
        return grey, "no pixel is a number"
    low, high = (float(end) for end in np.percentile(known, PERCENTILES, method="nearest"))
    how = f"percentiles {PERCENTILES[0]:g} to {PERCENTILES[1]:g}"
    if not low < high:
        low, high, how = float(known.min()), float(known.max()), "least to largest value"
    largest = max(abs(low), abs(high)) or 1.0  # so that no difference overflows
    span = high / largest - low / largest
    if not span > 0.0:
        grey[finite] = 128.0
        return grey, f"all values are {low:g}{missing}"
    grey[finite] = (np.clip(values[finite], low, high) / largest - low / largest) / span * 255.0
    return grey, f"window {low:.4g} to {high:.4g} ({how}){missing}"


def outline(mask: BoolArray, pane: Pane) -> BoolArray:
    """Return the line around a mask's pixels in a pane: bool (height, width), one px outside them, inside where the image ends."""
    bits = Image.fromarray(np.asarray(mask, np.uint8) * np.uint8(255))
    smallest = Image.Resampling.NEAREST if min(pane.scale) >= 1.0 else Image.Resampling.BOX
    box = (pane.x0, pane.y0, pane.x0 + pane.columns, pane.y0 + pane.rows)
    inside = np.asarray(bits.resize((pane.width, pane.height), smallest, box)) > 0
    padded = np.pad(inside, 1)
    near = np.zeros_like(inside)
    for row in range(3):
        for column in range(3):
            near |= padded[row : row + pane.height, column : column + pane.width]
    edge = near & ~inside
    rows, columns = mask.shape
    edge[0] |= inside[0] & (pane.y0 == 0)
    edge[-1] |= inside[-1] & (pane.y0 + pane.rows == rows)
    edge[:, 0] |= inside[:, 0] & (pane.x0 == 0)
    edge[:, -1] |= inside[:, -1] & (pane.x0 + pane.columns == columns)
    return edge


def colours_of(structures: Sequence[str]) -> dict[str, Colour]:
    """Return the colour of each structure: the one its name stands for, the next free one where an earlier name has taken it.

    Names come in their own order, not in the caller's. From the seventh structure on colours repeat.
    """
    colours: dict[str, Colour] = {}
    for name in sorted(set(structures)):
        at = zlib.crc32(name.encode("utf-8", "surrogatepass"), CHECKSUM_START)
        choice = [PALETTE[(at + step) % len(PALETTE)] for step in range(len(PALETTE))]
        colours[name] = next((colour for colour in choice if colour not in colours.values()), choice[0])
    return colours


def region(canvas: Canvas, pane: Pane) -> Canvas:
    """Return the part of a canvas that a pane takes: a view."""
    return canvas[pane.top : pane.top + pane.height, pane.left : pane.left + pane.width]


def show(canvas: Canvas, grey: npt.NDArray[np.float32], pane: Pane) -> None:
    """Draw the part of an image, (rows, columns) or RGB from 0 to 255, that a pane has room for, interpolated."""
    box = (pane.x0, pane.y0, pane.x0 + pane.columns, pane.y0 + pane.rows)
    for channel in range(3):
        values = grey if grey.ndim == 2 else np.ascontiguousarray(grey[:, :, channel])
        scaled = np.asarray(Image.fromarray(values).resize((pane.width, pane.height), Image.Resampling.BICUBIC, box))
        if grey.ndim == 2:
            region(canvas, pane)[:] = np.clip(scaled, 0.0, 255.0)[:, :, np.newaxis]
            break
        region(canvas, pane)[:, :, channel] = np.clip(scaled, 0.0, 255.0)


def dashes(pane: Pane) -> BoolArray:
    """Stripes across both directions, half an image pixel wide: so stairs that run along them are dashed, too."""
    dash = min(max(int(min(pane.scale) / 2), 1), DASH)
    dashes: BoolArray = np.add.outer(np.arange(pane.height), np.arange(pane.width)) // dash % 2 == 0
    return dashes


def stroke(canvas: Canvas, pane: Pane, ring: FloatArray, colour: Colour, *, width: float = LINE, closed: bool = True) -> None:
    """Draw a line through points of the image. A pixel of the picture is covered as far as its centre's distance to the line says."""
    if not len(ring):
        return
    part = region(canvas, pane)
    start = pane.place(ring) - (pane.left, pane.top)
    end = np.roll(start, -1, axis=0)
    if not closed:
        start, end = start[:-1], end[:-1]
    reach = width / 2 + 0.5
    first = np.clip(np.floor(np.minimum(start, end) - reach), 0, (pane.width, pane.height)).astype(np.int64)
    past = np.clip(np.ceil(np.maximum(start, end) + reach), 0, (pane.width, pane.height)).astype(np.int64)
    cover = np.zeros((pane.height, pane.width), np.float32)
    for at in np.flatnonzero((past > first).all(axis=1)).tolist():
        (left, top), (right, bottom) = first[at].tolist(), past[at].tolist()
        (x, y), (dx, dy) = start[at].tolist(), (end[at] - start[at]).tolist()
        across = np.arange(left, right) + 0.5 - x
        along = (np.arange(top, bottom) + 0.5 - y)[:, np.newaxis]
        square = dx * dx + dy * dy
        share = np.clip((across * dx + along * dy) / square, 0.0, 1.0) if square > 0.0 else np.zeros_like(across + along)
        distance = np.hypot(across - share * dx, along - share * dy)
        block = cover[top:bottom, left:right]
        np.maximum(block, np.clip(reach - distance, 0.0, 1.0), out=block)
    part += cover[:, :, np.newaxis] * (np.asarray(colour, np.float32) - part)


def round_length(most: float) -> float:
    """Return the largest of 1, 2 or 5 × 10ⁿ that is not above a length."""
    decade = 10.0 ** math.floor(math.log10(most))
    return decade * max(step for step in (1, 2, 5) if step * decade <= most or step == 1)


def scale_bar(draw: ImageDraw.ImageDraw, pane: Pane, column_mm: float) -> None:
    """Draw a bar of 1, 2 or 5 × 10ⁿ mm, at most a third of the pane long, with its length above it; nothing where there is no room."""
    px_per_mm = pane.scale[0] / column_mm
    mm = round_length(pane.width / 3 / px_per_mm)
    left, bottom, bar = pane.left + 12, pane.top + pane.height - 12, round(mm * px_per_mm)
    text = f"{mm:g} mm"
    if max(bar, length(text)) + 24 > pane.width or pane.height < 48:
        return
    draw.rectangle((left - 1, bottom - 4, left + bar, bottom), fill=(0, 0, 0))
    draw.rectangle((left, bottom - 3, left + bar - 1, bottom - 1), fill=(255, 255, 255))
    draw.text((left, bottom - 8), text, font=font(TEXT), fill=(255, 255, 255), stroke_width=2, stroke_fill=(0, 0, 0), anchor="ls")


def png(picture: Image.Image) -> bytes:
    """Return a picture as a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
