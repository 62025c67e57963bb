"""Images with what was drawn on them, as PNGs to judge contours by: is this the border, on the right image, in the right place?

A picture has the whole image at the left and, at the right, the part around what was drawn. There a contour is a solid
anti-aliased line at its place to a fraction of an image pixel, and the mask made of it is the dashed line along the edges of
its pixels, so that half a pixel of wrong convention shows. The image itself is interpolated, as in a viewer for reading: in
blocks the eye follows the blocks' edges and not the organ's. Each part has a window of its own, from its values alone: on
a heart the fat of the chest wall would take most of a common one.

Places are computed in pixels with the corner of the first one at (0, 0), whatever the convention of the contour.
"""

from __future__ import annotations

import io
import math
import re
import unicodedata
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from catalog.contours import BoolArray, Convention, FloatArray

Colour = tuple[int, int, int]
Canvas = npt.NDArray[np.float32]  # (rows, columns, RGB), 0 to 255

# Okabe and Ito's palette for all kinds of colour vision, without its black and its blue, which are lost on a dark image.
PALETTE: tuple[Colour, ...] = ((204, 121, 167), (230, 159, 0), (240, 228, 66), (0, 158, 115), (213, 94, 0), (86, 180, 233))
CHECKSUM_START = 1  # a checksum of the name picks the colour; from here `inner` gets orange and `outer` sky blue

PERCENTILES = (1.0, 99.5)
WHOLE, ZOOM, ALONE = 384, 672, 768  # largest side in px: the whole image, the part beside it, an image with nothing drawn
MARGIN = 16
AROUND = 1.5  # the zoomed part is this many times as large as what was drawn
LEAST_ZOOMED = 24  # px of the image
LINE = 1.6  # px of the picture
DASH = 4
CELL, GRID_COLUMNS, MOST_SHOWN = 256, 4, 64
TEXT, RAISED, LINE_HEIGHT, KEY = 15, 10, 21, 32

_PLAIN = str.maketrans({"×": "x", "–": "-", "—": "-", "−": "-", "µ": "u", "μ": "u", "ß": "ss", "≤": "<=", "≥": ">="})
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")
_BACKGROUND, _INK, _DIM = (20, 20, 20), (235, 235, 235), (165, 165, 165)


@dataclass(frozen=True)
class Drawn:
    """One annotation as it goes into a picture. Arrays are only read."""

    structure: str
    rings: list[FloatArray]  # each (n, 2): x, y in px as read, closed implicitly
    convention: Convention
    shift: tuple[float, float]  # x, y in px, added to the points
    mask: BoolArray | None  # (rows, columns) of the image
    label: str  # a short text for the legend


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


def overlay(
    image: npt.NDArray[Any],
    drawn: Sequence[Drawn],
    *,
    spacing_mm: tuple[float, float] | None,
    caption: Sequence[str],
) -> bytes:
    """Return a PNG of an image with what was drawn on it, about 1,100 px wide: whole, zoomed, legend, caption.

    Pixels are as wide and as high as their spacing says. What lies outside the image is not shown, and the legend says so.

    Args:
        image: (rows, columns) in modality units, any real dtype; what is not finite is shown black. Read only.
        drawn: In any order; a structure has the same colour in every picture unless two of one picture would share it.
        spacing_mm: Between rows, between columns; None where unknown: square pixels, no scale bar.
        caption: Lines below the picture; one about the window is added.

    Raises:
        ValueError: If the image is not 2-D or empty, a mask has another shape, a ring is not (n, 2) or not finite, the
            convention is unknown, or a spacing is not a positive number.
    """
    image = _checked_image(image)
    rows, columns = image.shape
    placed = [_placed_rings(one) for one in drawn]
    for one in drawn:
        if one.mask is not None and one.mask.shape != image.shape:
            raise ValueError(f"the mask of {one.label!r} is {one.mask.shape}, its image {image.shape}")
    whole, zoom = panes((rows, columns), drawn, spacing_mm=spacing_mm)
    colours = _colours_of(drawn)

    # The legend stands under the whole image, at the left of the zoomed part.
    legend_width = WHOLE if zoom else max(whole.width, 480)
    width = (zoom.left + zoom.width if zoom else MARGIN + legend_width) + MARGIN
    legend = [_wrapped(_legend_text(one, rings, rows, columns), legend_width - KEY) for one, rings in zip(drawn, placed, strict=True)]
    legend_top = whole.top + whole.height + MARGIN
    legend_bottom = legend_top + (sum(len(lines) for lines in legend) + 2) * LINE_HEIGHT + 8 if drawn else legend_top
    shown = [windowed(image)]
    about = f"left: {shown[0][1]}" if zoom else f"nothing drawn; {shown[0][1]}"
    if zoom:
        shown.append(windowed(image, np.s_[zoom.y0 : zoom.y0 + zoom.rows, zoom.x0 : zoom.x0 + zoom.columns]))
        about += f"; right: {shown[1][1]}, 1 image pixel is {zoom.scale[0]:.3g} × {zoom.scale[1]:.3g} px"
    about += "; interpolated" if spacing_mm is not None else "; interpolated; pixel spacing unknown, so no scale bar"
    lines = [line for text in (*caption, about) for line in _wrapped(text, width - 2 * MARGIN)]
    caption_top = max(legend_bottom, zoom.top + zoom.height + MARGIN if zoom else 0)
    height = caption_top + len(lines) * LINE_HEIGHT + MARGIN

    canvas = np.empty((height, width, 3), np.float32)
    canvas[:] = _BACKGROUND
    for (grey, _), pane in zip(shown, (whole, zoom), strict=False):
        if pane:
            _show(canvas, grey, pane)
    if zoom:
        for one, colour in zip(drawn, colours, strict=True):
            if one.mask is not None:
                edge = outline(one.mask, zoom) & _dashes(zoom)
                _part(canvas, zoom)[edge] = colour
        for rings, colour in zip(placed, colours, strict=True):
            for ring in rings:
                _stroke(canvas, zoom, ring, colour)

    picture = Image.fromarray(np.rint(np.clip(canvas, 0, 255)).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for pane in (whole, zoom) if zoom else (whole,):
        draw.rectangle((pane.left - 1, pane.top - 1, pane.left + pane.width, pane.top + pane.height), outline=(70, 70, 70))
        if spacing_mm is not None:
            _scale_bar(draw, pane, spacing_mm[1])
    if zoom:
        corners = whole.place(np.array([[zoom.x0, zoom.y0], [zoom.x0 + zoom.columns, zoom.y0 + zoom.rows]], np.float64))
        draw.rectangle([*np.rint(corners[0]).tolist(), *(np.rint(corners[1]) - 1).tolist()], outline=_INK)
    y = legend_top
    for colour, paragraph in zip(colours, legend, strict=True):
        draw.line((MARGIN, y + 10, MARGIN + 23, y + 10), fill=colour, width=3)
        y = _write(draw, MARGIN + KEY, y, paragraph, _INK)
    if zoom:
        draw.line((MARGIN, y + 18, MARGIN + 23, y + 18), fill=_DIM, width=2)
        for x in range(MARGIN, MARGIN + 24, 2 * DASH):
            draw.line((x, y + 18 + LINE_HEIGHT, x + DASH - 1, y + 18 + LINE_HEIGHT), fill=_DIM)
        _write(draw, MARGIN + KEY, y + 8, ["contour, as drawn", "edge of the mask's pixels"], _DIM)
    _write(draw, MARGIN, caption_top, lines, _INK)
    return _png(picture)


def contact_sheet(
    images: npt.NDArray[Any],
    masks: npt.NDArray[np.bool_] | None,
    titles: Sequence[str],
    structures: Sequence[str],
) -> bytes:
    """Return a PNG of a batch: its images four in a row, each in its own window, masks as coloured outlines.

    At most 64 images are shown; the last line says how many more there are.

    Args:
        images: (B, rows, columns), any real dtype; what is not finite is shown black. Read only, a view of a slot will do.
        masks: (B, K, rows, columns), or (B, rows, columns) of one structure.
        titles: One an image, cut where it is too long for its image.
        structures: One a mask, K names.

    Raises:
        ValueError: If shapes or numbers do not fit each other.
    """
    images = np.asarray(images)
    if images.ndim != 3 or (images.size == 0 and len(images)):
        raise ValueError(f"images must be (B, rows, columns), not {images.shape}")
    if masks is not None:
        masks = np.asarray(masks)
        masks = masks[:, np.newaxis] if masks.ndim == 3 else masks
        expected = (len(images), len(structures), *images.shape[1:])
        if masks.shape != expected:
            raise ValueError(f"masks of these images and structures are {expected}, not {masks.shape}")
    if len(titles) != len(images):
        raise ValueError(f"{len(images)} images need as many titles, not {len(titles)}")
    shown = min(len(images), MOST_SHOWN)
    across = min(max(shown, 1), GRID_COLUMNS)
    down = math.ceil(shown / across)
    rows, columns = images.shape[1:] if shown else (1, 1)
    fit = CELL / max(rows, columns)
    cell_width, cell_height = max(1, round(columns * fit)), max(1, round(rows * fit))
    step_x, step_y = max(cell_width, 96) + MARGIN, cell_height + LINE_HEIGHT + MARGIN
    width = max(MARGIN + across * step_x, 320)

    colours = colours_of(structures)
    foot = [_wrapped(name, width - 2 * MARGIN - KEY) for name in structures] if masks is not None else []
    notes = _wrapped(f"each image in its own window, percentiles {PERCENTILES[0]:g} to {PERCENTILES[1]:g}", width - 2 * MARGIN)
    if not shown:
        notes = ["no images"]
    elif len(images) > shown:
        notes.append(f"… and {len(images) - shown} more")
    top = MARGIN + down * step_y
    height = top + (sum(len(lines) for lines in foot) + len(notes)) * LINE_HEIGHT + MARGIN

    canvas = np.empty((height, width, 3), np.float32)
    canvas[:] = _BACKGROUND
    grid = [
        Pane(MARGIN + at % across * step_x, MARGIN + LINE_HEIGHT + at // across * step_y, cell_width, cell_height, 0, 0, columns, rows)
        for at in range(shown)
    ]
    for at, pane in enumerate(grid):
        _show(canvas, windowed(images[at])[0], pane)
        if masks is not None:
            for mask, name in zip(masks[at], structures, strict=True):
                _part(canvas, pane)[outline(mask, pane)] = colours[name]
    picture = Image.fromarray(np.rint(np.clip(canvas, 0, 255)).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for title, pane in zip(titles[:shown], grid, strict=True):
        _write(draw, pane.left, pane.top - LINE_HEIGHT, [_cut(title, step_x - MARGIN)], _INK)
    for name, lines in zip(structures, foot, strict=False):
        draw.line((MARGIN, top + 10, MARGIN + 23, top + 10), fill=colours[name], width=3)
        top = _write(draw, MARGIN + KEY, top, lines, _INK)
    _write(draw, MARGIN, top, notes, _DIM)
    return _png(picture)


def windowed(image: npt.NDArray[Any], part: tuple[slice, slice] = np.s_[:, :]) -> tuple[npt.NDArray[np.float32], str]:
    """Return an image's grey values from 0 to 255, a new array, and in words the window that made them.

    Dark and bright ends are the percentiles 1 and 99.5 of what is finite in a part of it, or where those are equal its least and
    largest value. What is not finite is 0.
    """
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


def panes(shape: tuple[int, int], drawn: Sequence[Drawn], *, spacing_mm: tuple[float, float] | None) -> tuple[Pane, Pane | None]:
    """Return where the picture shows the whole image, and the part around what was drawn: None if there is nothing.

    The smaller side of a pixel of the zoomed part is a whole number of pixels of the picture, wherever a pixel has room for one.
    """
    rows, columns = shape
    row_mm, column_mm = spacing_mm if spacing_mm is not None else (1.0, 1.0)
    if not all(math.isfinite(mm) and mm > 0.0 for mm in (row_mm, column_mm)):
        raise ValueError(f"a pixel spacing must be positive and finite, not {spacing_mm}")
    least = min(row_mm, column_mm)
    wide, high = column_mm / least, row_mm / least

    def pane(left: int, x0: int, y0: int, part_columns: int, part_rows: int, scale: float) -> Pane:
        width, height = (max(1, round(px)) for px in (part_columns * wide * scale, part_rows * high * scale))
        return Pane(left, MARGIN, width, height, x0, y0, part_columns, part_rows)

    side = WHOLE if drawn else ALONE
    whole = pane(MARGIN, 0, 0, columns, rows, min(side / (columns * wide), side / (rows * high)))
    if not drawn:
        return whole, None
    (x_low, x_high), (y_low, y_high) = _extent(drawn, rows, columns)
    need_x = min(columns, max(LEAST_ZOOMED, AROUND * (x_high - x_low)))
    need_y = min(rows, max(LEAST_ZOOMED, AROUND * (y_high - y_low)))
    scale = min(ZOOM / (need_x * wide), ZOOM / (need_y * high))
    scale = math.floor(scale) if scale >= 1.0 else scale
    part_columns = min(columns, max(1, math.floor(ZOOM / (wide * scale))))
    part_rows = min(rows, max(1, math.floor(ZOOM / (high * scale))))
    x0 = min(max(round((x_low + x_high - part_columns) / 2), 0), columns - part_columns)
    y0 = min(max(round((y_low + y_high - part_rows) / 2), 0), rows - part_rows)
    return whole, pane(MARGIN + WHOLE + MARGIN, x0, y0, part_columns, part_rows, scale)


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


def _colours_of(drawn: Sequence[Drawn]) -> list[Colour]:
    """The structure's colour; lighter for a second annotation of it, lighter still from the third on."""
    colours, seen, found = colours_of([one.structure for one in drawn]), dict.fromkeys((one.structure for one in drawn), 0), []
    for one in drawn:
        white = (0.0, 0.5, 0.75)[min(seen[one.structure], 2)]
        seen[one.structure] += 1
        red, green, blue = (round(part + (255 - part) * white) for part in colours[one.structure])
        found.append((red, green, blue))
    return found


def _checked_image(image: npt.NDArray[Any]) -> npt.NDArray[Any]:
    image = np.asarray(image)
    if image.ndim != 2 or image.size == 0:
        raise ValueError(f"an image must be (rows, columns) and not empty, not {image.shape}")
    return image


def _placed_rings(one: Drawn) -> list[FloatArray]:
    """Rings with (0, 0) the corner of the first pixel."""
    if one.convention not in ("corner", "centre"):
        raise ValueError(f"convention must be 'corner' or 'centre', not {one.convention!r}")
    centre = 0.5 if one.convention == "centre" else 0.0
    rings = []
    for ring in one.rings:
        points = np.asarray(ring, np.float64)
        if points.ndim != 2 or points.shape[1] != 2:
            raise ValueError(f"a ring must be (n, 2), not {points.shape}")
        moved = points + np.asarray(one.shift, np.float64) + centre
        if not np.isfinite(moved).all():
            raise ValueError("a ring holds a coordinate that is not finite")
        rings.append(moved)
    return rings


def _extent(drawn: Sequence[Drawn], rows: int, columns: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """What of the image was drawn on, in x and in y; all of it where nothing lies inside."""
    found = [ring for one in drawn for ring in _placed_rings(one)]
    for one in drawn:
        if one.mask is not None and one.mask.any():
            inside_y, inside_x = np.flatnonzero(one.mask.any(axis=1)), np.flatnonzero(one.mask.any(axis=0))
            found.append(np.array([[inside_x[0], inside_y[0]], [inside_x[-1] + 1, inside_y[-1] + 1]], np.float64))
    # A ring around the image has no point inside it, and yet all of the image is drawn on.
    found = [np.clip(ring, 0.0, (columns, rows)) for ring in found if len(ring)]
    found = [ring for ring in found if (ring.max(axis=0) > 0.0).all() and (ring.min(axis=0) < (columns, rows)).all()]
    if not found:
        return (0.0, float(columns)), (0.0, float(rows))
    points = np.concatenate(found)
    low, high = points.min(axis=0).tolist(), points.max(axis=0).tolist()
    return (low[0], high[0]), (low[1], high[1])


def _legend_text(one: Drawn, rings: Sequence[FloatArray], rows: int, columns: int) -> str:
    points = np.concatenate(rings) if rings else np.empty((0, 2))
    outside = int(((points < 0.0) | (points > (columns, rows))).any(axis=1).sum())
    text = one.label or one.structure
    if not len(points) and one.mask is None:
        text += ", no points"
    if outside:
        text += f", {outside} of {len(points)} points lie outside the image"
    if one.mask is not None and not one.mask.any():
        text += ", its mask is empty"
    return text


def _part(canvas: Canvas, pane: Pane) -> Canvas:
    return canvas[pane.top : pane.top + pane.height, pane.left : pane.left + pane.width]


def _show(canvas: Canvas, grey: npt.NDArray[np.float32], pane: Pane) -> None:
    box = (pane.x0, pane.y0, pane.x0 + pane.columns, pane.y0 + pane.rows)
    scaled = Image.fromarray(grey).resize((pane.width, pane.height), Image.Resampling.BICUBIC, box)
    _part(canvas, pane)[:] = np.clip(np.asarray(scaled), 0.0, 255.0)[:, :, np.newaxis]


def _dashes(pane: Pane) -> BoolArray:
    """Stripes across both directions, half an image pixel wide: so stairs that run along them are dashed, too."""
    dash = min(max(int(min(pane.scale) / 2), 1), DASH)
    dashes: BoolArray = np.add.outer(np.arange(pane.height), np.arange(pane.width)) // dash % 2 == 0
    return dashes


def _stroke(canvas: Canvas, pane: Pane, ring: FloatArray, colour: Colour) -> None:
    """Draw a closed line. A pixel of the picture is covered as far as its centre's distance to the line says."""
    if not len(ring):
        return
    part = _part(canvas, pane)
    start = pane.place(ring) - (pane.left, pane.top)
    end = np.roll(start, -1, axis=0)
    reach = LINE / 2 + 0.5
    first = np.clip(np.floor(np.minimum(start, end) - reach), 0, (pane.width, pane.height)).astype(np.int64)
    past = np.clip(np.ceil(np.maximum(start, end) + reach), 0, (pane.width, pane.height)).astype(np.int64)
    cover = np.zeros((pane.height, pane.width), np.float32)
    for at in np.flatnonzero((past > first).all(axis=1)).tolist():
        (left, top), (right, bottom) = first[at].tolist(), past[at].tolist()
        (x, y), (dx, dy) = start[at].tolist(), (end[at] - start[at]).tolist()
        across = np.arange(left, right) + 0.5 - x
        along = (np.arange(top, bottom) + 0.5 - y)[:, np.newaxis]
        length = dx * dx + dy * dy
        share = np.clip((across * dx + along * dy) / length, 0.0, 1.0) if length > 0.0 else np.zeros_like(across + along)
        distance = np.hypot(across - share * dx, along - share * dy)
        block = cover[top:bottom, left:right]
        np.maximum(block, np.clip(reach - distance, 0.0, 1.0), out=block)
    part += cover[:, :, np.newaxis] * (np.asarray(colour, np.float32) - part)


def _scale_bar(draw: ImageDraw.ImageDraw, pane: Pane, column_mm: float) -> None:
    """A bar of 1, 2 or 5 × 10ⁿ mm, at most a third of the pane long, with its length above it."""
    px_per_mm = pane.scale[0] / column_mm
    most = pane.width / 3 / px_per_mm
    decade = 10.0 ** math.floor(math.log10(most))
    length = decade * max(step for step in (1, 2, 5) if step * decade <= most or step == 1)
    left, bottom, bar = pane.left + 12, pane.top + pane.height - 12, round(length * px_per_mm)
    text = f"{length:g} mm"
    if max(bar, _length(text)) + 24 > pane.width or pane.height < 48:
        return
    draw.rectangle((left - 1, bottom - 4, left + bar, bottom), fill=(0, 0, 0))
    draw.rectangle((left, bottom - 3, left + bar - 1, bottom - 1), fill=(255, 255, 255))
    draw.text((left, bottom - 8), text, font=_font(TEXT), fill=(255, 255, 255), stroke_width=2, stroke_fill=(0, 0, 0), anchor="ls")


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _runs(text: str) -> list[tuple[str, int]]:
    """Text as Pillow's own font can set it, in parts with their sizes: it has no accents, no × and no ²."""
    plain = "".join(letter for letter in unicodedata.normalize("NFD", text) if not unicodedata.combining(letter)).translate(_PLAIN)
    parts = enumerate(re.split(r"([⁰¹²³⁴⁵⁶⁷⁸⁹]+)", plain))
    return [(part.translate(_RAISED), RAISED if number % 2 else TEXT) for number, part in parts if part]


def _length(text: str) -> float:
    return sum(_font(size).getlength(part) for part, size in _runs(text))


def _write(draw: ImageDraw.ImageDraw, x: float, y: int, lines: Sequence[str], colour: Colour) -> int:
    """Write lines, one below the other, and return where the next one goes."""
    for line in lines:
        at = x
        for part, size in _runs(line):
            draw.text((at, y), part, font=_font(size), fill=colour)
            at += _font(size).getlength(part)
        y += LINE_HEIGHT
    return y


def _cut(text: str, width: float) -> str:
    text = _one_line(text)
    if _length(text) <= width:
        return text
    while text and _length(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _wrapped(text: str, width: float) -> list[str]:
    """Lines of at most a width; a word that is longer, such as a UID, is broken anywhere."""
    lines = [""]
    for word in _one_line(text).split(" "):
        if lines[-1] and _length(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and _length(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines


def _one_line(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
