"""A gallery as one PNG: a card for each sample, worst first, with its flags and its neighbours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image as Pillow
from PIL import ImageDraw

from catalog import viewing
from catalog.canvas import BACKGROUND, DIM, INK, Colour, Pane, png, scale_bar, show, windowed
from catalog.errors import FileError
from catalog.gallery import Card, Region, palette
from catalog.lettering import LINE_HEIGHT, cut, length, wrapped, write
from catalog.overlay import SEVERITY, colours_for, draw_lines, frame, label_marks, tint
from catalog.processes import Progress
from catalog.viewing import View
from catalog.workers import mapped

WIDTH, SMALL, GAP, ACROSS = 440, 84, 5, 3  # px of a card and of a neighbour; cards side by side
MOST_LINES = 9  # of text on a card
KEY = 32

Picture = npt.NDArray[np.uint8]


class Job(NamedTuple):
    """A card to be drawn."""

    card: Card
    inside: dict[str, set[str]]
    colours: dict[str, Colour]


def made(cards: Sequence[Card], inside: dict[str, set[str]], *, title: str, processes: int | None, progress: Progress) -> bytes:
    """Return one PNG of some samples, drawn in processes."""
    colours = palette(cards)
    jobs = [Job(card, inside, colours) for card in cards]
    return sheet(list(mapped(draw_all, jobs, died=died, jobs=processes, progress=progress)), colours, title)


def sheet(pictures: Sequence[Picture], colours: Mapping[str, Colour], title: str) -> bytes:
    """Return one PNG of cards as `draw_all` draws them, three in a row, below a title and a legend."""
    across = min(max(len(pictures), 1), ACROSS)
    width = max(GAP + across * (WIDTH + 4 * GAP), 480)
    rows = [pictures[start : start + across] for start in range(0, len(pictures), across)]
    heads = wrapped(title, width - 4 * GAP)
    keys: list[tuple[int, int, str]] = []  # x, line, name
    x, line = 2 * GAP, 0
    for name in colours:
        shown = cut(name, width - KEY - 4 * GAP)
        if x > 2 * GAP and x + KEY + length(shown) > width - 2 * GAP:
            x, line = 2 * GAP, line + 1
        keys.append((x, line, shown))
        x += KEY + math.ceil(length(shown)) + 4 * GAP
    top = 2 * GAP + (len(heads) + (line + 1 if keys else 0)) * LINE_HEIGHT + GAP
    height = top + sum(max(len(one) for one in row) + 4 * GAP for row in rows)
    picture = Pillow.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(picture)
    y = write(draw, 2 * GAP, 2 * GAP, heads, INK)
    for (x, line, shown), colour in zip(keys, colours.values(), strict=True):
        at = y + line * LINE_HEIGHT
        draw.line((x, at + 10, x + 23, at + 10), fill=colour, width=3)
        write(draw, x + KEY, at, [shown], INK)
    for row in rows:
        for at, one in enumerate(row):
            picture.paste(Pillow.fromarray(one), (2 * GAP + at * (WIDTH + 4 * GAP), top))
        top += max(len(one) for one in row) + 4 * GAP
    return png(picture)


def draw_all(jobs: Sequence[Job]) -> list[Picture]:
    """Draw some cards, each (height, 440, 3). Runs in a process of its own."""
    return [_card(job) for job in jobs]


def died(job: Job) -> Picture:
    """Return the card of a sample that killed the process that drew it."""
    return _words(job, "the process that decoded it died; look at it with another program")


def _card(job: Job) -> Picture:
    view, region = job.card.view, job.card.region
    try:
        if why := viewing.unreadable(view.image):
            raise FileError("missing", why)
        pixels = viewing.pixels(view.image)
    except FileError as error:
        return _words(job, str(error))
    except OSError as error:
        return _words(job, f"{error.strerror} while its file was read")
    except Exception as error:  # one file must not stop the others; the text could hold a value of its header
        return _words(job, f"decoding it failed with {type(error).__name__}")
    top = LINE_HEIGHT + GAP
    main = _pane(region, view.spacing, WIDTH, GAP, top)
    strip_top = main.top + main.height + GAP
    whole = _pane(Region(0, 0, view.image["columns"], view.image["rows"]), view.spacing, SMALL, 0, strip_top)
    small = [(whole, "whole image", pixels, view)]
    for at, (title, other) in enumerate(view.beside, 1):
        pane = _pane(region, view.spacing, SMALL, at * (SMALL + GAP), strip_top)
        try:
            small.append((pane, title, viewing.pixels(other.image), other))
        except Exception:  # it is shown for comparison alone
            small.append((pane, "unreadable", np.zeros((other.image["rows"], other.image["columns"])), other))
    lines = _lines(job)
    strip_bottom = max(pane.top + pane.height for pane, *_ in small)
    height = strip_bottom + LINE_HEIGHT + len(lines) * LINE_HEIGHT + GAP
    canvas = np.empty((height, WIDTH, 3), np.float32)
    canvas[:] = BACKGROUND
    _show(canvas, main, pixels, view)
    marks = view.marks(job.card.drawn, job.inside)
    for mark in marks:
        if mark.pixels is not None:
            tint(canvas, main, mark.pixels)
    drawn = list(job.card.drawn.values())
    draw_lines(canvas, main, drawn, colours_for(drawn, job.colours))
    for mark in marks:
        frame(canvas, main, mark)
    for pane, _, values, other in small:
        _show(canvas, pane, values, other)
        if other is not view:
            theirs = list(other.drawn().values())
            draw_lines(canvas, pane, theirs, colours_for(theirs, job.colours), masks=False)
    picture = Pillow.fromarray(np.rint(np.clip(canvas, 0, 255)).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    if view.spacing is not None:
        scale_bar(draw, main, view.spacing[1])
    label_marks(draw, main, marks)
    for pane, title, _, _ in small:
        write(draw, pane.left, strip_bottom, [cut(title.removeprefix("slice "), SMALL)], DIM)
    corners = whole.place(np.array([[region.x0, region.y0], [region.x0 + region.columns, region.y0 + region.rows]], np.float64))
    draw.rectangle([*np.rint(corners[0]).tolist(), *(np.rint(corners[1]) - 1).tolist()], outline=INK)
    y = strip_bottom + LINE_HEIGHT
    write(draw, 0, 0, [_title(view)], INK)
    for colour, line in lines:
        y = write(draw, 0, y, [line], colour)
    return np.asarray(picture)


def _words(job: Job, why: str) -> Picture:
    lines = [(INK, line) for line in wrapped(f"cannot be shown: {why}", WIDTH)] + _lines(job)
    picture = Pillow.new("RGB", (WIDTH, (len(lines) + 1) * LINE_HEIGHT + GAP), BACKGROUND)
    draw = ImageDraw.Draw(picture)
    y = write(draw, 0, 0, [_title(job.card.view)], INK)
    for colour, line in lines:
        y = write(draw, 0, y, [line], colour)
    return np.asarray(picture)


def _lines(job: Job) -> list[tuple[Colour, str]]:
    lines = [(DIM, line) for text in job.card.view.labels() for line in wrapped(text, WIDTH)]
    for severity, text in job.card.view.findings(job.card.drawn):
        lines += [(SEVERITY.get(severity, INK), line) for line in wrapped(f"{severity}: {text}", WIDTH)]
    lines += [(DIM, cut(one.label, WIDTH)) for one in job.card.drawn.values()]
    more = len(lines) - MOST_LINES
    return [*lines[:MOST_LINES], (DIM, f"… and {more} more lines; see `catalog show`")] if more > 0 else lines


def _title(view: View) -> str:
    return cut(", ".join([f"sample {view.image['sample_id']}", *viewing.where(view.image)]), WIDTH)


def _pane(region: Region, spacing: tuple[float, float] | None, side: int, left: int, top: int) -> Pane:
    """A pane for a region, as large as a square has room for, pixels as wide and high as their spacing says."""
    row_mm, column_mm = spacing or (1.0, 1.0)
    fit = side / max(region.columns * column_mm, region.rows * row_mm)
    size = max(1, round(region.columns * column_mm * fit)), max(1, round(region.rows * row_mm * fit))
    return Pane(left if side < WIDTH else (WIDTH - size[0]) // 2, top, *size, *region)


def _show(canvas: Any, pane: Pane, pixels: npt.NDArray[Any], view: View) -> None:
    grey, _ = windowed(pixels, np.s_[pane.y0 : pane.y0 + pane.rows, pane.x0 : pane.x0 + pane.columns])
    show(canvas, 255.0 - grey if view.image["photometric"] == "MONOCHROME1" else grey, pane)
