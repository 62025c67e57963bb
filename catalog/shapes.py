"""What a mask and its polygon are like on their image: the columns of table `shape`, computed once so that rules need SQL alone.

Parts of a mask are 4-connected and holes 8-connected, which belong together: two pixels that touch by a corner are two parts, and what
lies on both sides of that corner is one background.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import numpy as np
import psycopg

from catalog import contours, geometry
from catalog.contours import BoolArray, Convention, FloatArray, IntArray
from catalog.crossings import ComplexArray, crossings, even_odd_area

ROWS_AT_ONCE = 1_000
HASHED = 1024  # polygons are the same where no point differs by a 1/1024 px; in mm of the patient all else is rounding

# position, orientation, row spacing, column spacing of an image, as its row has them
Place = Sequence[Any]
Box = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Shape:
    """A row of table `shape`, in its order, which says what each is."""

    points: int | None
    smallest_ring: int | None
    points_outside: int | None
    self_crossings: int | None
    gap_px: float | None
    step_px: float | None
    perimeter_px: float | None
    polygon_area_px: float | None
    polygon_hash: bytes | None
    components: int
    largest_px: int
    holes: int
    border_px: int
    centroid_row: float | None
    centroid_column: float | None
    centroid: list[float] | None


_NAMES = tuple(field.name for field in fields(Shape))
COLUMNS = f"pairing_id, {', '.join(_NAMES)}"
COPY = f"COPY shape ({COLUMNS}) FROM STDIN"


def of_segment(rows: int, columns: int, box: Box, bits: bytes, place: Place) -> Shape:
    """Return what a mask is like.

    Args:
        rows, columns: its image's size in px.
        box, bits: first row, first column, rows and columns of its bounding box, and the box packed, as `contours.boxed` returns them.
        place: its image's position, orientation, row spacing and column spacing, as in table `image`; each may be None.
    """
    (parts, perimeter) = _of_mask(rows, columns, box, contours.unpack(bits, box[2], box[3]), place)
    return Shape(None, None, None, None, None, None, perimeter, None, None, *parts)


def of_polygon(
    rings: Sequence[FloatArray],
    rows: int,
    columns: int,
    box: Box,
    bits: bytes,
    *,
    convention: Convention,
    shift: tuple[float, float] = (0.0, 0.0),
    place: Place = (None, None, None, None),
) -> Shape:
    """Return what a polygon and its mask are like.

    Args:
        rings: each (n, 2) float64, x and y in px of the image, by the convention, before the shift. The hash is of them as they stand.
        rows, columns, box, bits, place: as for `of_segment`.
    """
    drawn = [np.ascontiguousarray(ring, np.float64).reshape(-1, 2) for ring in rings]
    parts, _ = _of_mask(rows, columns, box, contours.unpack(bits, box[2], box[3]), place)
    each: list[ComplexArray] = [ring.view(np.complex128).ravel() for ring in drawn if len(ring)]
    if not each:
        return Shape(0, 0, 0, 0, 0.0, 0.0, 0.0, 0.0, polygon_hash(drawn), *parts)
    points = np.concatenate(each)
    edge = 0.0 if convention == "corner" else -0.5
    x, y = points.real + (shift[0] - edge), points.imag + (shift[1] - edge)
    outside = len(points) - int(np.count_nonzero((x >= 0) & (x <= columns) & (y >= 0) & (y <= rows)))
    steps = [np.abs(ring[1:] - ring[:-1]) for ring in each]
    gaps = [abs(complex(ring[-1] - ring[0])) for ring in each]
    walked = np.concatenate(steps)
    moved = np.sort(walked[walked > 0.0])
    step = float(moved[(len(moved) - 1) // 2] + moved[len(moved) // 2]) / 2 if len(moved) else 0.0
    count, heights = crossings(each)
    return Shape(
        len(points), min(_distinct(ring) for ring in each), outside, count, max(gaps), step, float(walked.sum()) + sum(gaps),
        even_odd_area(each, heights), polygon_hash(drawn), *parts,
    )  # fmt: skip


def polygon_hash(rings: Sequence[FloatArray]) -> bytes:
    """Return a sha256 that polygons share which are the same: rings in any order, from any point, either way round, closed or not.

    A point that stands there twice in a row counts once. Coordinates, (n, 2), are compared to 1/1024 px.
    """
    texts = sorted(_canonical(ring) for ring in rings if len(ring))
    digest = hashlib.sha256()
    for text in texts:
        digest.update(len(text).to_bytes(8, "little"))
        digest.update(text)
    return digest.digest()


def _canonical(ring: FloatArray) -> bytes:
    grid = np.clip(np.rint(ring * HASHED), -(2.0**62), 2.0**62).astype("<i8")
    keys = grid[:, 0] * (1 << 31) + grid[:, 1]  # may overflow, alike wherever the ring begins
    repeated = (grid == np.concatenate([grid[-1:], grid[:-1]])).all(axis=1)
    if repeated.any() and not repeated.all():
        grid, keys = grid[~repeated], keys[~repeated]
    elif repeated.all():
        grid, keys = grid[:1], keys[:1]
    least = np.flatnonzero(keys == keys.min())
    at = int(least[0])
    if len(least) > 1:
        ways = [np.concatenate([way[first:], way[:first]]) for way in (grid, grid[::-1]) for first in (_least_rotation(way),)]
    else:
        onward = np.concatenate([grid[at:], grid[:at]])
        ways = [onward, np.concatenate([onward[:1], onward[:0:-1]])]
    return min(way.tobytes() for way in ways)


def _least_rotation(ring: IntArray) -> int:
    """Return where to begin so that the points are smallest in order; in linear time, however often a ring comes back to a point."""
    points = [tuple(point) for point in ring.tolist()]
    size, one, other, same = len(points), 0, 1, 0
    while one < size and other < size and same < size:
        a, b = points[(one + same) % size], points[(other + same) % size]
        if a == b:
            same += 1
            continue
        if a > b:
            one += same + 1
        else:
            other += same + 1
        other += one == other
        same = 0
    return min(one, other)


def _distinct(ring: ComplexArray) -> int:
    ordered = np.sort(ring)
    return 1 + int(np.count_nonzero(ordered[1:] != ordered[:-1]))


def _of_mask(rows: int, columns: int, box: Box, inside: BoolArray, place: Place) -> tuple[tuple[Any, ...], float]:
    """Return the columns of `shape` from `components` on, and the length of the outline along pixel edges in px."""
    top, left, height, width = box
    if not inside.size:
        return (0, 0, 0, 0, None, None, None), 0.0
    # Runs of pixels along the rows, by where they begin and end in rows that end in a column without any.
    stride = width + 1
    padded = np.zeros((height, stride), np.int8)
    padded[:, :width] = inside
    flat = padded.ravel()
    ends = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    if flat[0]:
        ends = np.concatenate([[0], ends])
    starts, ends = ends[::2], ends[1::2]
    length = ends - starts
    area = int(length.sum())
    row = starts // stride
    centre_row = top + float(row @ length) / area
    centre_column = left + float((starts - row * stride) @ length + (length * (length - 1)).sum() / 2) / area

    below = inside[1:] & inside[:-1]
    beside, upright = area - len(starts), int(np.count_nonzero(below))
    parts, largest = _parts(starts, ends, length, stride)
    # Euler: parts less holes = pixels less pairs that share an edge plus blocks of four.
    holes = parts - (area - beside - upright + int(np.count_nonzero(below[:, 1:] & below[:, :-1])))

    border = 0
    if top == 0 or left == 0 or top + height == rows or left + width == columns:
        within = inside[int(top == 0) : height - int(top + height == rows), int(left == 0) : width - int(left + width == columns)]
        border = area - int(np.count_nonzero(within))
    numbers = (parts, largest, holes, border, centre_row, centre_column, _in_patient(centre_row, centre_column, place))
    return numbers, float(4 * area - 2 * (beside + upright))


def _parts(starts: IntArray, ends: IntArray, length: IntArray, stride: int) -> tuple[int, int]:
    """Return how many 4-connected parts runs form, and the pixels of the largest."""
    first = np.searchsorted(ends, starts + stride, side="right")
    count = np.searchsorted(starts, ends + stride, side="left") - first
    one = np.repeat(np.arange(len(starts)), count)
    other = np.arange(len(one)) - np.repeat(np.cumsum(count) - count, count) + np.repeat(first, count)
    part = np.arange(len(starts))
    while True:
        mine, its = part[one], part[other]
        if (mine == its).all():
            break
        np.minimum.at(part, np.maximum(mine, its), np.minimum(mine, its))
        while ((further := part[part]) != part).any():
            part = further
    if not part.any():
        return 1, int(length.sum())
    pixels = np.bincount(part, weights=length)
    return int(np.count_nonzero(pixels)), int(pixels.max())


def _in_patient(row: float, column: float, place: Place) -> list[float] | None:
    position, orientation, row_spacing, column_spacing = place
    if position is None or orientation is None or not row_spacing or not column_spacing:
        return None
    steps = _steps(tuple(position), tuple(orientation), (row_spacing, column_spacing))
    return None if steps is None else [at + column * across + row * down for at, across, down in zip(*steps, strict=True)]


@lru_cache(4096)  # an image has several masks
def _steps(position: tuple[float, ...], orientation: tuple[float, ...], spacing: tuple[float, float]) -> list[list[float]] | None:
    """Return where the first pixel's centre lies, and the ways to the next column and row, in mm; None where that is not plain."""
    try:
        first, across, down = geometry.to_patient([[0, 0], [1, 0], [0, 1]], position, orientation, spacing)
    except ValueError:
        return None
    return [first.tolist(), (across - first).tolist(), (down - first).tolist()]


def in_pixels(rings: Sequence[FloatArray], place: Place) -> tuple[list[FloatArray], float] | None:
    """Return rings in mm of the patient as pixels of an image, and how far off its plane they lie at most, in mm.

    None if the image does not say where it lies, or not plainly.
    """
    position, orientation, row_spacing, column_spacing = place
    if position is None or orientation is None or not row_spacing or not column_spacing:
        return None
    try:
        placed = [geometry.to_pixels(ring, position, orientation, (row_spacing, column_spacing)) for ring in rings]
    except ValueError:
        return None
    return [pixels for pixels, _ in placed], max((float(abs(distance).max()) for _, distance in placed if len(distance)), default=0.0)


def row(pairing_id: int, shape: Shape) -> tuple[Any, ...]:
    """Return a shape as `write` takes it."""
    return (pairing_id, *(getattr(shape, name) for name in _NAMES))


def write(conn: psycopg.Connection[Any], rows: Sequence[tuple[Any, ...]]) -> None:
    """Write shapes of masks that have none. Writes nothing where there are none: even a COPY of no row fires triggers."""
    if rows:
        with conn.cursor().copy(COPY) as copy:
            for one in rows:
                copy.write_row(one)


MISSING = """
SELECT p.id, a.points, a.rings, a.convention, a.shift_x, a.shift_y, m.rows, m.columns,
       ARRAY[m.box_row, m.box_column, m.box_rows, m.box_columns], m.bits,
       i.image_position, i.image_orientation, i.row_spacing, i.column_spacing
FROM pairing p JOIN annotation a ON a.id = p.annotation_id JOIN mask m ON m.pairing_id = p.id JOIN image i ON i.id = p.image_id
WHERE p.id = ANY(%s) ORDER BY p.id FOR KEY SHARE OF p
"""


def make_missing(conn: psycopg.Connection[Any], progress: Callable[[int, int], None] = lambda done, total: None) -> int:
    """Compute the shapes that masks have none of, as in a catalog made before there were any. Commits every 1,000; returns how many.

    Args:
        progress: Called with (done, of how many).
    """
    missing = [
        pairing_id
        for (pairing_id,) in conn.execute(
            "SELECT p.id FROM pairing p JOIN mask m ON m.pairing_id = p.id "
            "WHERE p.state <> 'rejected' AND NOT EXISTS (SELECT FROM shape h WHERE h.pairing_id = p.id) ORDER BY p.id"
        )
    ]
    marks = ", ".join(["%s"] * (1 + len(_NAMES)))
    for begin in range(0, len(missing), ROWS_AT_ONCE):
        # A pairing that is being deleted is waited for, one that is here cannot be: the rows would point nowhere.
        found = conn.execute(MISSING, [missing[begin : begin + ROWS_AT_ONCE]]).fetchall()
        conn.cursor().executemany(
            f"INSERT INTO shape ({COLUMNS}) VALUES ({marks}) ON CONFLICT DO NOTHING",  # noqa: S608
            [row(pairing_id, _of_row(*values)) for pairing_id, *values in found],
        )
        conn.commit()
        progress(min(begin + ROWS_AT_ONCE, len(missing)), len(missing))
    return len(missing)


def _of_row(
    points: list[float] | None, lengths: list[int], convention: str | None, shift_x: float, shift_y: float, rows: int, columns: int,
    box: list[int], bits: bytes, *place: Any,
) -> Shape:  # fmt: skip
    covered = (box[0], box[1], box[2], box[3])
    if points is None:
        return of_segment(rows, columns, covered, bits, place)
    rings = contours.unflatten(points, lengths, 3 if convention == "patient" else 2)
    if convention == "patient":
        placed = in_pixels(rings, place)
        if placed is None:  # its image has changed since the mask was made
            return of_segment(rows, columns, covered, bits, place)
        rings = placed[0]
    of: Convention = "corner" if convention == "corner" else "centre"
    return of_polygon(rings, rows, columns, covered, bits, convention=of, shift=(shift_x, shift_y), place=place)
