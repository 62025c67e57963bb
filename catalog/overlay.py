"""Images with what was drawn on them, as PNGs to judge contours by: is this the border, on the right image, in the right place?

A picture has the whole image at the left and, at the right, the part around what was drawn. There a contour is a solid
anti-aliased line at its place to a fraction of an image pixel, and the mask made of it is the dashed line along the edges of
its pixels, so that half a pixel of wrong convention shows. The image itself is interpolated, as in a viewer for reading: in
blocks the eye follows the blocks' edges and not the organ's. Each part has a window of its own, from its values alone: on
a heart the fat of the chest wall would take most of a common one. Below stand the same part of neighbouring images, and the open
flags; the cause of a flag is framed in white where it is.

Places are computed in pixels with the corner of the first one at (0, 0), whatever the convention of the contour.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from catalog.canvas import (
    BACKGROUND,
    DASH,
    DIM,
    INK,
    PERCENTILES,
    Canvas,
    Colour,
    Pane,
    colours_of,
    dashes,
    outline,
    png,
    region,
    scale_bar,
    show,
    stroke,
    windowed,
)
from catalog.contours import FloatArray
from catalog.lettering import LINE_HEIGHT, TEXT, cut, font, length, wrapped, write
from catalog.marks import Box, Drawn, Mark, extent, placed_rings

WHOLE, ZOOM, ALONE, BESIDE = 384, 672, 768, 252  # largest side in px: all of it, the part beside it, with nothing drawn, a neighbour
MARGIN = 16
AROUND = 1.5  # the zoomed part is this many times as large as what was drawn
LEAST_ZOOMED = 24  # px of the image
CELL, GRID_COLUMNS, MOST_SHOWN = 256, 4, 64
KEY = 32
MARKED: Colour = (255, 255, 255)
SEVERITY: dict[str, Colour] = {"error": (255, 150, 110), "warning": (240, 228, 66), "info": DIM}


@dataclass(frozen=True)
class Beside:
    """A neighbouring image, shown small: the same part of it."""

    title: str
    image: npt.NDArray[Any]
    drawn: Sequence[Drawn]


def overlay(
    image: npt.NDArray[Any],
    drawn: Sequence[Drawn],
    *,
    spacing_mm: tuple[float, float] | None,
    caption: Sequence[str],
    marks: Sequence[Mark] = (),
    findings: Sequence[tuple[str, str]] = (),
    beside: Sequence[Beside] = (),
    inverted: bool = False,
) -> bytes:
    """Return a PNG of an image with what was drawn on it, about 1,100 px wide: whole, zoomed, legend, neighbours, flags, caption.

    Pixels are as wide and as high as their spacing says. What lies outside the image is not shown, and the legend says so.

    Args:
        image: (rows, columns) in modality units, any real dtype; what is not finite is shown black. Or uint8 (rows, columns, 3): RGB.
            Read only.
        drawn: In any order; a structure has the same colour in every picture unless two of one picture would share it.
        spacing_mm: Between rows, between columns; None where unknown: square pixels, no scale bar.
        caption: Lines below the picture; one about the window is added.
        marks: Where causes of flags are; framed in the zoomed part.
        findings: Severity and text of each open flag, listed below the picture.
        beside: Neighbouring images of the same size, at most four of which have room.
        inverted: Small values are bright (MONOCHROME1).

    Raises:
        ValueError: If the image is not 2-D or empty, a mask has another shape, a ring is not (n, 2) or not finite, the
            convention is unknown, or a spacing is not a positive number.
    """
    image = _checked_image(image)
    rows, columns = image.shape[:2]
    placed = [placed_rings(one) for one in drawn]
    for one in drawn:
        if one.mask is not None and one.mask.shape != (rows, columns):
            raise ValueError(f"the mask of {one.label!r} is {one.mask.shape}, its image {(rows, columns)}")
    whole, zoom = panes((rows, columns), drawn, spacing_mm=spacing_mm)
    palette = colours_of([one.structure for one in (*drawn, *(one for neighbour in beside for one in neighbour.drawn))])
    colours = colours_for(drawn, palette)

    # The legend stands under the whole image, at the left of the zoomed part.
    legend_width = WHOLE if zoom else max(whole.width, 480)
    width = (zoom.left + zoom.width if zoom else MARGIN + legend_width) + MARGIN
    legend = [wrapped(_legend_text(one, rings, rows, columns), legend_width - KEY) for one, rings in zip(drawn, placed, strict=True)]
    legend_top = whole.top + whole.height + MARGIN
    legend_bottom = legend_top + (sum(len(lines) for lines in legend) + 2) * LINE_HEIGHT + 8 if drawn else legend_top
    shown = [windowed(image)]
    about = f"left: {shown[0][1]}" if zoom else f"nothing drawn; {shown[0][1]}"
    if zoom:
        shown.append(windowed(image, np.s_[zoom.y0 : zoom.y0 + zoom.rows, zoom.x0 : zoom.x0 + zoom.columns]))
        about += f"; right: {shown[1][1]}, 1 image pixel is {zoom.scale[0]:.3g} × {zoom.scale[1]:.3g} px"
    about += "; scaled smoothly" if spacing_mm is not None else "; scaled smoothly; pixel spacing unknown, so no scale bar"
    lines = [(INK, line) for text in caption for line in wrapped(text, width - 2 * MARGIN)]
    lines += [(DIM, line) for line in wrapped(about, width - 2 * MARGIN)]
    for severity, text in findings:
        lines += [(SEVERITY.get(severity, INK), line) for line in wrapped(f"{severity}: {text}", width - 2 * MARGIN)]
    strip_top = max(legend_bottom, zoom.top + zoom.height + MARGIN if zoom else 0)
    strip = _strip(beside, zoom or whole, strip_top + LINE_HEIGHT, width - 2 * MARGIN)
    caption_top = max((pane.top + pane.height for pane in strip), default=strip_top - MARGIN) + MARGIN
    height = caption_top + len(lines) * LINE_HEIGHT + MARGIN

    canvas = np.empty((height, width, 3), np.float32)
    canvas[:] = BACKGROUND
    for (grey, _), pane in zip(shown, (whole, zoom), strict=False):
        if pane:
            show(canvas, 255.0 - grey if inverted else grey, pane)
    if zoom:
        for mark in marks:
            if mark.pixels is not None:
                tint(canvas, zoom, mark.pixels)
        draw_lines(canvas, zoom, drawn, colours)
        for mark in marks:
            frame(canvas, zoom, mark)
    for neighbour, pane in zip(beside, strip, strict=False):
        part = np.s_[pane.y0 : pane.y0 + pane.rows, pane.x0 : pane.x0 + pane.columns]
        grey, _ = windowed(neighbour.image, part)
        show(canvas, 255.0 - grey if inverted else grey, pane)
        draw_lines(canvas, pane, neighbour.drawn, colours_for(neighbour.drawn, palette), masks=False)

    picture = Image.fromarray(np.rint(np.clip(canvas, 0, 255)).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for pane in (whole, zoom, *strip) if zoom else (whole, *strip):
        draw.rectangle((pane.left - 1, pane.top - 1, pane.left + pane.width, pane.top + pane.height), outline=(70, 70, 70))
        if spacing_mm is not None and pane not in strip:
            scale_bar(draw, pane, spacing_mm[1])
    for neighbour, pane in zip(beside, strip, strict=False):
        write(draw, pane.left, strip_top, [cut(neighbour.title, pane.width + MARGIN)], DIM)
    if zoom:
        label_marks(draw, zoom, marks)
        corners = whole.place(np.array([[zoom.x0, zoom.y0], [zoom.x0 + zoom.columns, zoom.y0 + zoom.rows]], np.float64))
        draw.rectangle([*np.rint(corners[0]).tolist(), *(np.rint(corners[1]) - 1).tolist()], outline=INK)
    y = legend_top
    for colour, paragraph in zip(colours, legend, strict=True):
        draw.line((MARGIN, y + 10, MARGIN + 23, y + 10), fill=colour, width=3)
        y = write(draw, MARGIN + KEY, y, paragraph, INK)
    if zoom:
        draw.line((MARGIN, y + 18, MARGIN + 23, y + 18), fill=DIM, width=2)
        for x in range(MARGIN, MARGIN + 24, 2 * DASH):
            draw.line((x, y + 18 + LINE_HEIGHT, x + DASH - 1, y + 18 + LINE_HEIGHT), fill=DIM)
        write(draw, MARGIN + KEY, y + 8, ["contour, as drawn", "edge of the mask's pixels"], DIM)
    for ink, line in lines:
        caption_top = write(draw, MARGIN, caption_top, [line], ink)
    return png(picture)


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
    foot = [wrapped(name, width - 2 * MARGIN - KEY) for name in structures] if masks is not None else []
    notes = wrapped(f"each image in its own window, percentiles {PERCENTILES[0]:g} to {PERCENTILES[1]:g}", width - 2 * MARGIN)
    if not shown:
        notes = ["no images"]
    elif len(images) > shown:
        notes.append(f"… and {len(images) - shown} more")
    top = MARGIN + down * step_y
    height = top + (sum(len(lines) for lines in foot) + len(notes)) * LINE_HEIGHT + MARGIN

    canvas = np.empty((height, width, 3), np.float32)
    canvas[:] = BACKGROUND
    grid = [
        Pane(MARGIN + at % across * step_x, MARGIN + LINE_HEIGHT + at // across * step_y, cell_width, cell_height, 0, 0, columns, rows)
        for at in range(shown)
    ]
    for at, pane in enumerate(grid):
        show(canvas, windowed(images[at])[0], pane)
        if masks is not None:
            for mask, name in zip(masks[at], structures, strict=True):
                region(canvas, pane)[outline(mask, pane)] = colours[name]
    picture = Image.fromarray(np.rint(np.clip(canvas, 0, 255)).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for title, pane in zip(titles[:shown], grid, strict=True):
        write(draw, pane.left, pane.top - LINE_HEIGHT, [cut(title, step_x - MARGIN)], INK)
    for name, lines in zip(structures, foot, strict=False):
        draw.line((MARGIN, top + 10, MARGIN + 23, top + 10), fill=colours[name], width=3)
        top = write(draw, MARGIN + KEY, top, lines, INK)
    write(draw, MARGIN, top, notes, DIM)
    return png(picture)


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
    x_low, y_low, x_high, y_high = extent(drawn, rows, columns) or (0.0, 0.0, float(columns), float(rows))
    need_x = min(columns, max(LEAST_ZOOMED, AROUND * (x_high - x_low)))
    need_y = min(rows, max(LEAST_ZOOMED, AROUND * (y_high - y_low)))
    scale = min(ZOOM / (need_x * wide), ZOOM / (need_y * high))
    scale = math.floor(scale) if scale >= 1.0 else scale
    part_columns = min(columns, max(1, math.floor(ZOOM / (wide * scale))))
    part_rows = min(rows, max(1, math.floor(ZOOM / (high * scale))))
    x0 = min(max(round((x_low + x_high - part_columns) / 2), 0), columns - part_columns)
    y0 = min(max(round((y_low + y_high - part_rows) / 2), 0), rows - part_rows)
    return whole, pane(MARGIN + WHOLE + MARGIN, x0, y0, part_columns, part_rows, scale)


def _strip(beside: Sequence[Beside], like: Pane, top: int, width: int) -> list[Pane]:
    """Panes side by side, of the same part of the image as another pane."""
    fit = min(BESIDE / max(like.width, like.height), 1.0)
    size = max(1, round(like.width * fit)), max(1, round(like.height * fit))
    room = max(1, (width + MARGIN) // (size[0] + MARGIN))
    return [
        Pane(MARGIN + at * (size[0] + MARGIN), top, *size, like.x0, like.y0, like.columns, like.rows)
        for at in range(min(len(beside), room))
    ]  # fmt: skip


def draw_lines(canvas: Canvas, pane: Pane, drawn: Sequence[Drawn], colours: Sequence[Colour], *, masks: bool = True) -> None:
    """Draw masks' outlines, and contours over them. `masks` False: of those alone that have no contour."""
    for one, colour in zip(drawn, colours, strict=True):
        if one.mask is not None and (masks or not one.rings):
            region(canvas, pane)[outline(one.mask, pane) & dashes(pane)] = colour
    for one, colour in zip(drawn, colours, strict=True):
        for ring in placed_rings(one):
            stroke(canvas, pane, ring, colour)


def tint(canvas: Canvas, pane: Pane, pixels: npt.NDArray[np.bool_]) -> None:
    """Lighten pixels of the image in stripes, so that what lies below is still seen."""
    box = (pane.x0, pane.y0, pane.x0 + pane.columns, pane.y0 + pane.rows)
    bits = Image.fromarray(pixels.astype(np.uint8) * np.uint8(255)).resize((pane.width, pane.height), Image.Resampling.NEAREST, box)
    stripes = np.add.outer(np.arange(pane.height), np.arange(pane.width)) // 2 % 3 == 0
    part = region(canvas, pane)
    part[(np.asarray(bits) > 0) & stripes] = MARKED


def frame(canvas: Canvas, pane: Pane, mark: Mark) -> None:
    """Draw boxes, crosses and the dotted line of a mark in white with a black edge, which shows on every image and no structure has."""
    lines = [(np.array([[a, b], [c, b], [c, d], [a, d]]), True) for a, b, c, d in mark.boxes]
    arm_x, arm_y = 6 / pane.scale[0], 6 / pane.scale[1]
    for x, y in mark.crosses:
        lines += [(np.array([[x - arm_x, y + sign * arm_y], [x + arm_x, y - sign * arm_y]]), False) for sign in (-1, 1)]
    if len(mark.line) == 2:
        (x, y), (to_x, to_y) = mark.line
        steps = max(2, round(math.hypot((to_x - x) * pane.scale[0], (to_y - y) * pane.scale[1]) / 5))
        dots = np.linspace((x, y), (to_x, to_y), steps + steps % 2)
        lines += [(dots[at : at + 2], False) for at in range(0, len(dots) - 1, 2)]
    for colour, width in (((0, 0, 0), 3.6), (MARKED, 1.4)):
        for points, closed in lines:
            stroke(canvas, pane, points, colour, width=width, closed=closed)


def label_marks(draw: ImageDraw.ImageDraw, pane: Pane, marks: Sequence[Mark]) -> None:
    """Write a mark's text at the first of its places, within the pane and below one that is there already."""
    taken: list[Box] = []
    for mark in marks:
        if mark.place is None:
            continue
        x, y = pane.place(np.array([mark.place], np.float64))[0].tolist()
        wide = length(mark.text) + 6
        x = min(max(x, pane.left + 4), pane.left + pane.width - wide - 4)
        y = min(max(y - LINE_HEIGHT - 2, pane.top + 2), pane.top + pane.height - LINE_HEIGHT - 2)
        while any(x < right and left < x + wide and y < low and high < y + LINE_HEIGHT for left, high, right, low in taken):
            y += LINE_HEIGHT
        taken.append((x, y, x + wide, y + LINE_HEIGHT))
        draw.text((x, y), mark.text, font=font(TEXT), fill=MARKED, stroke_width=2, stroke_fill=(0, 0, 0))


def colours_for(drawn: Sequence[Drawn], palette: Mapping[str, Colour]) -> list[Colour]:
    """Return the colour of each: its structure's; lighter for a second annotation of it, lighter still from the third on."""
    seen, found = dict.fromkeys((one.structure for one in drawn), 0), []
    for one in drawn:
        white = (0.0, 0.5, 0.75)[min(seen[one.structure], 2)]
        seen[one.structure] += 1
        red, green, blue = (round(part + (255 - part) * white) for part in palette[one.structure])
        found.append((red, green, blue))
    return found


def _checked_image(image: npt.NDArray[Any]) -> npt.NDArray[Any]:
    image = np.asarray(image)
    colour = image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8
    if not (image.ndim == 2 or colour) or image.size == 0:
        raise ValueError(f"an image must be (rows, columns) and not empty, or RGB of uint8, not {image.shape}")
    return image


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
