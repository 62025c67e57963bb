"""What a trainer will see of a stream: some samples, each as it lies in the catalog, then as it is fed in one epoch after the other.

The workers' own code makes the numbers, in this process: what is drawn for a sample follows from seed, epoch and sample key alone, so they
are those that any trainer gets, bit for bit. Nothing is planned, fed or written: no run, no ledger, and of a stream that was never asked
for no constants.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import psycopg
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from psycopg import sql

from catalog.canvas import BACKGROUND, DIM, INK, Colour, Pane, colours_of, outline, png, region, show, windowed
from catalog.database import Database
from catalog.errors import CatalogError
from catalog.lettering import LINE_HEIGHT, cut, wrapped, write
from loaderd import constants, named, orders, ring, selections
from loaderd.decode import Changed, Decoder
from loaderd.definitions import Definition
from loaderd.neighbours import Neighbours, with_neighbours
from loaderd.work import work_query

CELL, NARROW, GAP = 232, 150, 12  # px of an image that has one channel, of each of several channels, between cells
KEY = 32
# In front of the work's query: an order of one part that nobody stored.
ORDER = "WITH epoch_order (epoch_id, part, sample_ids, annotation_ids) AS (VALUES (0::bigint, 0, %(ids)s::bigint[], %(drawn)s::bigint[])) "


@dataclass
class Seen:
    """Some samples of a stream as they come out of a slot."""

    sample_ids: list[int]
    images: NDArray[Any]  # (samples, channels, rows, columns)
    masks: NDArray[np.bool_]  # (samples, structures, rows, columns)
    labels: NDArray[np.int64]  # (samples, numbers)
    problems: dict[int, str] = field(default_factory=dict)  # place → why it cannot be read


@dataclass
class Gallery:
    """What a gallery shows."""

    name: str
    definition: Definition
    num_samples: int
    plain: list[Seen]  # one a sample, as it lies in the catalog; of sequences none
    epochs: list[Seen]
    classes: list[str] | None


def look(database: Database, name: str, *, samples: int, epochs: int) -> Gallery:
    """Return the samples of a stream with the smallest keys, which is as good as at random, as they are and as the epochs feed them.

    Raises:
        UsageError: If there is no stream of that name.
        CatalogError: If it is empty, its images have shapes that cannot share a batch, or a transform fails.
    """
    with database.read_only(timeout_s=selections.SELECT_TIMEOUT_S) as reading, database.connect() as conn:
        stream_id, definition = named.find(conn, name)
        selections.check_where(reading, definition)
        shapes = selections.shapes(reading, definition)
        size = definition.fixed_size or selections.one_shape(reading, shapes, definition)
        kept = constants.of(conn, reading, stream_id, definition) if definition.looks_up else {}
        query, parameters = selections.selection(definition)
        chosen = sql.SQL("SELECT sample_id, annotation_ids, rows, columns FROM ({}) AS s ORDER BY sample_key LIMIT %(most)s").format(query)
        rows = reading.execute(chosen, {**parameters, "most": samples}).fetchall()
        if not rows:
            raise CatalogError(f"stream {name!r} is empty: nothing to show; see `loaderd stream show`")
        pool, labels = None, int(definition.labels is not None)
        if definition.sequences is not None:
            from loaderd import pools

            pool, size, labels = pools.make(database, definition)
        try:
            found = Gallery(name, definition, sum(shapes.values()), [], [], kept.get("classes"))
            maker = Maker(definition, size, kept, labels=labels, pool=pool)
            found.epochs = maker.made(_work(conn, definition, rows, kept), epochs)
            if definition.sequences is None:
                lying = replace(definition, transforms=(), size=None, fit=None, context=0, channels="none", labels=None)
                for row in rows:
                    [one] = Maker(lying, row[2:4], {}, labels=0, pool=None).made(_work(conn, lying, [row], {}), 1)
                    found.plain.append(one)
        finally:
            if pool is not None:
                os.close(pool)
            conn.rollback()
    return found


def _work(conn: psycopg.Connection[Any], definition: Definition, rows: Sequence[Any], kept: dict[str, Any]) -> list[tuple[bytes, bytes]]:
    ids = [row[0] for row in rows]
    drawn = [annotation for column in zip(*(row[1][: definition.annotations] for row in rows), strict=True) for annotation in column]
    parameters = {"epoch": 0, "first": 0, "end": len(ids), "part": orders.PART, "positions": f"{{[0,{len(ids)})}}", "ids": ids,
                  "drawn": drawn, "classes": kept.get("classes")}  # fmt: skip
    with conn.cursor(binary=True) as cursor:
        work = cursor.execute(sql.SQL(ORDER) + work_query(definition), parameters).fetchall()
    return with_neighbours(work, Neighbours(definition.context).rows(conn, ids)) if definition.context else work


class Maker:
    """A decode worker in this process, with a ring of one slot for all samples."""

    def __init__(self, definition: Definition, size: tuple[int, int], kept: dict[str, Any], *, labels: int, pool: int | None) -> None:
        self._definition, self._size, self._labels = definition, size, labels
        self._changed = None
        if not definition.plain:
            self._changed = Changed(
                {
                    "transforms": definition.transforms, "seed": definition.seed, "size": definition.size, "fit": definition.fit,
                    "sequences": definition.sequences, "statistics": kept.get("statistics"),
                },
                pool,
            )  # fmt: skip

    def made(self, work: Sequence[tuple[bytes, bytes]], epochs: int) -> list[Seen]:
        """Return what each epoch makes of some samples."""
        given = self._definition
        layout = ring.Layout(
            batch_size=len(work), structures=len(given.structures), rows=self._size[0], columns=self._size[1], dtype=given.dtype, slots=1,
            channels=given.channels, depth=1 + 2 * given.context, labels=self._labels, sequences=given.sequences is not None,
        )  # fmt: skip
        lines = b"[" + b",".join(row for row, _ in work) + b"]"
        ring_fd, work_fd = ring.create(layout), os.memfd_create("loaderd-gallery", os.MFD_CLOEXEC)
        os.pwrite(work_fd, b"".join([lines, *(bits for _, bits in work)]), 0)
        decoder = Decoder(ring_fd, work_fd, layout, blank=True, changed=self._changed, context_ends=given.context_ends)
        os.close(ring_fd)  # the mapping stays
        found = []
        try:
            slot = decoder.slots[0]
            for epoch in range(epochs):
                job = {"stream": 0, "job": 0, "slot": 0, "generation": 1, "epoch": epoch, "index": 0, "length": len(lines), "pad": 0}
                report = decoder.fill(job)
                if "fault" in report:
                    raise CatalogError(report["fault"])
                problems = {number: code for number, _, code, _ in report.get("unreadable", ())}
                found.append(Seen(slot.sample_ids.tolist(), slot.planes.copy(), slot.masks.copy(), slot.labels.copy(), problems))
        finally:
            decoder.close()
        return found


# ------------------------------------------------------------------------------------------ the picture


def picture(found: Gallery) -> bytes:
    """Return a PNG: a row a sample, the catalog's image first, then each epoch's. Masks are outlines; each cell says its range of values.

    The epochs of a sample share one window from its own values, so that a change of brightness shows; the image as it lies has another.
    """
    definition, across = found.definition, len(found.epochs)
    depth, rows, columns = found.epochs[0].images.shape[1:]
    one = CELL if depth == 1 else NARROW
    wide, high = _fitted(rows, columns, one)
    lying = [_fitted(seen.images.shape[2], seen.images.shape[3], one) for seen in found.plain]
    first = max((width for width, _ in lying), default=-GAP)
    heights = [max(high, lying[at][1] if lying else 0) for at in range(len(found.epochs[0].sample_ids))]
    step = max(depth * wide, NARROW) + GAP
    width = max(2 * GAP + first + GAP + across * step, 480)
    heads = wrapped(_title(found), width - 2 * GAP)
    top = GAP + (len(heads) + 1) * LINE_HEIGHT + GAP // 2
    colours = colours_of(definition.structures)
    own = ", its catalog image has its own" if found.plain else ""
    foot = wrapped(f"a sample's epochs share one window{own}; numbers are least … largest, mean", width - 2 * GAP)
    height = top + sum(one + 2 * LINE_HEIGHT + GAP for one in heights) + (len(colours) + len(foot)) * LINE_HEIGHT + GAP
    canvas = np.empty((height, width, 3), np.float32)
    canvas[:] = BACKGROUND
    texts: list[tuple[int, int, str, int, Colour]] = [
        *((GAP, GAP + at * LINE_HEIGHT, text, width - 2 * GAP, INK) for at, text in enumerate(heads)),
        *((_left(first, step, at), top - LINE_HEIGHT, f"epoch {at}", step - GAP, DIM) for at in range(across)),
    ]
    if found.plain:
        texts.append((GAP, top - LINE_HEIGHT, "in the catalog", first, DIM))
    y = top
    for place, most in enumerate(heights):
        if found.plain:
            seen = found.plain[place]
            pane = Pane(GAP, y, *lying[place], 0, 0, seen.images.shape[3], seen.images.shape[2])
            _draw(canvas, pane, windowed(seen.images[0, 0])[0], seen.masks[0], colours, definition.structures)
            said = f"sample {found.epochs[0].sample_ids[place]}, {seen.images.shape[2]}×{seen.images.shape[3]}"
            texts.append((GAP, y + most, said, max(first, NARROW), INK))
            texts.append((GAP, y + most + LINE_HEIGHT, seen.problems.get(0) or _range(seen.images[0]), max(first, NARROW), DIM))
        together = np.concatenate([plane for seen in found.epochs for plane in seen.images[place]])
        grey = windowed(together)[0].reshape(across, depth, rows, columns)
        for at, seen in enumerate(found.epochs):
            left = _left(first, step, at)
            for channel in range(depth):
                pane = Pane(left + channel * wide, y, wide, high, 0, 0, columns, rows)
                _draw(canvas, pane, grey[at, channel], seen.masks[place] if channel == depth // 2 else [], colours, definition.structures)
            why = seen.problems.get(place)
            texts.append((left, y + most, f"cannot be read: {why}" if why else _range(seen.images[place]), step - GAP, INK))
            texts.append((left, y + most + LINE_HEIGHT, _label(found, seen, place), step - GAP, DIM))
        y += most + 2 * LINE_HEIGHT + GAP
    drawn = Image.fromarray(np.rint(np.clip(canvas, 0, 255)).astype(np.uint8))
    draw = ImageDraw.Draw(drawn)
    for left, at, text, room, ink in texts:
        write(draw, left, at, [cut(text, room)], ink)
    for name, colour in colours.items():
        draw.line((GAP, y + 10, GAP + 23, y + 10), fill=colour, width=3)
        y = write(draw, GAP + KEY, y, [cut(name, width - KEY - 2 * GAP)], INK)
    write(draw, GAP, y, foot, DIM)
    return png(drawn)


def _fitted(rows: int, columns: int, side: int) -> tuple[int, int]:
    """Width and height of an image: a wide one, of digits in a row say, may take two cells."""
    scale = min(side / rows, (2 if columns > 2 * rows else 1) * side / columns)
    return max(1, round(columns * scale)), max(1, round(rows * scale))


def _left(first: int, step: int, epoch: int) -> int:
    return GAP + first + GAP + epoch * step


def _draw(
    canvas: NDArray[np.float32], pane: Pane, grey: NDArray[np.float32], masks: Any, colours: dict[str, Colour], structures: Sequence[str]
) -> None:
    show(canvas, grey, pane)
    for mask, name in zip(masks, structures, strict=False):  # a channel beside the middle one has none
        if mask.any():
            region(canvas, pane)[outline(mask, pane)] = colours[name]


def _range(values: NDArray[Any]) -> str:
    finite = values[np.isfinite(values)].astype(np.float64)
    return f"{finite.min():.4g} … {finite.max():.4g}, {finite.mean():.3g}" if finite.size else "no number in it"


def _label(found: Gallery, seen: Seen, place: int) -> str:
    numbers = [int(one) for one in seen.labels[place] if one >= 0 or found.definition.sequences is None]
    if found.definition.sequences is not None:
        return "".join(map(str, numbers))
    return ", ".join(found.classes[one] if found.classes and 0 <= one < len(found.classes) else str(one) for one in numbers)


def _title(found: Gallery) -> str:
    given = found.definition
    parts = [f"stream {found.name}: {len(found.epochs[0].sample_ids)} of {found.num_samples} samples, seed {given.seed}"]
    parts += [", ".join(one["name"] for one in given.transforms)] if given.transforms else []
    parts += [f"size {given.size[0]}×{given.size[1]}, {given.fit}"] if given.size else []
    parts += [f"context {given.context}, ends {given.context_ends}"] if given.context else []
    return "; ".join(parts)
