"""What was drawn on an image, and where in it the cause of a flag lies: the crossing, the gap, the part that lies apart.

All places are in px of the image, from the corner of its first pixel; x goes along a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from catalog.contours import BoolArray, Convention, FloatArray

Box = tuple[float, float, float, float]  # left, top, right, bottom
MOST_PLACES = 12  # of one mark: beyond that the whole structure is what is wrong


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
class Mark:
    """Where the cause of a flag is, to be drawn with the flag's code beside it. What has no place has only its text."""

    text: str
    boxes: tuple[Box, ...] = ()
    crosses: tuple[tuple[float, float], ...] = ()
    line: tuple[tuple[float, float], ...] = ()  # dots from the first to the last of two points
    pixels: BoolArray | None = None  # (rows, columns): to be tinted

    @property
    def place(self) -> tuple[float, float] | None:
        """Where its text goes: the first of its places, from the top; None where it has none."""
        spots = [(box[0], box[1]) for box in self.boxes] + list(self.crosses)
        return min(spots, key=lambda spot: (spot[1], spot[0])) if spots else None


def placed_rings(one: Drawn) -> list[FloatArray]:
    """Return the rings with (0, 0) the corner of the first pixel.

    Raises:
        ValueError: If the convention is unknown, a ring is not (n, 2), or a coordinate is not finite.
    """
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


def extent(drawn: Sequence[Drawn], rows: int, columns: int) -> Box | None:
    """Return the box of the image that was drawn on; None where nothing lies inside it."""
    found = [ring for one in drawn for ring in placed_rings(one)]
    for one in drawn:
        if one.mask is not None and one.mask.any():
            found.append(np.array(_box_of(one.mask), np.float64).reshape(2, 2))
    # A ring around the image has no point inside it, and yet all of the image is drawn on.
    found = [np.clip(ring, 0.0, (columns, rows)) for ring in found if len(ring)]
    found = [ring for ring in found if (ring.max(axis=0) > 0.0).all() and (ring.min(axis=0) < (columns, rows)).all()]
    if not found:
        return None
    points = np.concatenate(found)
    (left, top), (right, bottom) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
    return left, top, right, bottom


def mark(rule: str, one: Drawn, around: Sequence[Drawn], shape: tuple[int, int]) -> Mark:
    """Return where the cause of a rule's flag on an annotation is; a box around the annotation where the rule names no smaller place.

    Args:
        around: What else was drawn on the image and should enclose it.
        shape: Rows and columns of the image.
    """
    find = CAUSES.get(rule)
    if find is not None and (found := find(rule, one, around, shape)) is not None:
        return found
    rows, columns = shape
    box = extent([one], rows, columns)
    return Mark(rule) if box is None else Mark(rule, boxes=(_grown(box, rows, columns),))


def parts(mask: BoolArray, *, diagonal: bool = False) -> list[Box]:
    """Return a box around each part of a mask, the largest part first. Parts that touch at corners alone are two, unless `diagonal`."""
    sizes: list[int] = []
    boxes: list[Box] = []
    parent: list[int] = []

    def root(at: int) -> int:
        while parent[at] != at:
            parent[at] = parent[parent[at]]
            at = parent[at]
        return at

    above: list[tuple[int, int, int]] = []  # runs of the row before: first, past, part
    reach = int(diagonal)
    for row in range(mask.shape[0]):
        steps = np.flatnonzero(np.diff(np.pad(mask[row].astype(np.int8), 1)))
        here: list[tuple[int, int, int]] = []
        for first, past in steps.reshape(-1, 2).tolist():
            own = len(parent)
            parent.append(own)
            sizes.append(past - first)
            boxes.append((first, row, past, row + 1))
            for other_first, other_past, other in above:
                if other_first < past + reach and first < other_past + reach:
                    a, b = root(other), root(own)
                    if a != b:
                        parent[b] = a
                        sizes[a] += sizes[b]
                        boxes[a] = _joined(boxes[a], boxes[b])
            here.append((first, past, own))
        above = here
    roots = sorted((at for at in range(len(parent)) if parent[at] == at), key=lambda at: (-sizes[at], boxes[at]))
    return [boxes[at] for at in roots]


def crossings(rings: Sequence[FloatArray]) -> FloatArray:
    """Return where edges of closed rings properly cross one another: (n, 2)."""
    rings = [ring for ring in rings if len(ring)]
    if not rings:
        return np.empty((0, 2))
    start = np.concatenate(rings)
    step = np.concatenate([np.roll(ring, -1, axis=0) for ring in rings]) - start
    found = []
    for at in range(len(start) - 1):
        dx, dy = step[at + 1 :, 0], step[at + 1 :, 1]
        away = start[at + 1 :] - start[at]
        across = step[at, 0] * dy - step[at, 1] * dx
        with np.errstate(all="ignore"):
            own = (away[:, 0] * dy - away[:, 1] * dx) / across
            other = (away[:, 0] * step[at, 1] - away[:, 1] * step[at, 0]) / across
        inner = (own > 0) & (own < 1) & (other > 0) & (other < 1)
        found.append(start[at] + own[inner, np.newaxis] * step[at])
    return np.concatenate(found) if found else np.empty((0, 2))


def _crossing(rule: str, one: Drawn, around: Sequence[Drawn], shape: tuple[int, int]) -> Mark | None:
    rings = placed_rings(one)
    # Beyond that many edges the search takes seconds; the box around the structure does.
    places = crossings(rings) if sum(map(len, rings)) <= 4_000 else np.empty((0, 2))
    return Mark(rule, boxes=_squares(places, shape)) if 0 < len(places) <= MOST_PLACES else None


def _outside(rule: str, one: Drawn, around: Sequence[Drawn], shape: tuple[int, int]) -> Mark | None:
    """Crosses where the image ends, at the points that lie beyond."""
    rings = placed_rings(one)
    points = np.concatenate(rings) if rings else np.empty((0, 2))
    rows, columns = shape
    beyond = ((points < 0.0) | (points > (columns, rows))).any(axis=1)
    ends = np.unique(np.clip(points[beyond], 0.5, (max(columns - 0.5, 0.5), max(rows - 0.5, 0.5))), axis=0)
    if not len(ends):
        return None
    step = -(-len(ends) // MOST_PLACES)
    return Mark(rule, crosses=tuple((x, y) for x, y in ends[::step].tolist()))


def _gap(rule: str, one: Drawn, around: Sequence[Drawn], shape: tuple[int, int]) -> Mark | None:
    rings = [ring for ring in placed_rings(one) if len(ring) > 1]
    if not rings:
        return None
    widest = max(rings, key=lambda ring: float(np.hypot(*(ring[0] - ring[-1]))))
    (x, y), (to_x, to_y) = widest[-1].tolist(), widest[0].tolist()
    return Mark(rule, line=((x, y), (to_x, to_y)), crosses=((x, y), (to_x, to_y)))


def _points(rule: str, one: Drawn, around: Sequence[Drawn], shape: tuple[int, int]) -> Mark | None:
    rings = placed_rings(one)
    smallest = min(rings, key=len, default=np.empty((0, 2)))
    return Mark(rule, crosses=tuple((x, y) for x, y in smallest[:MOST_PLACES].tolist())) if len(smallest) else None


def _border(rule: str, one: Drawn, around: Sequence[Drawn], shape: tuple[int, int]) -> Mark | None:
    if one.mask is None:
        return None
    edge = np.zeros_like(one.mask)
    edge[[0, -1]], edge[:, [0, -1]] = one.mask[[0, -1]], one.mask[:, [0, -1]]
    return _boxed(rule, parts(edge, diagonal=True), edge, shape)


def _lesser_parts(rule: str, one: Drawn, around: Sequence[Drawn], shape: tuple[int, int]) -> Mark | None:
    return None if one.mask is None else _boxed(rule, parts(one.mask)[1:], None, shape)


def _holes(rule: str, one: Drawn, around: Sequence[Drawn], shape: tuple[int, int]) -> Mark | None:
    if one.mask is None:
        return None
    # With a margin all that is outside is one part. It is the one that reaches the margin's corner.
    outside = np.pad(~one.mask, 1, constant_values=True)
    inner = [(x - 1, y - 1, right - 1, bottom - 1) for x, y, right, bottom in parts(outside, diagonal=True) if (x, y) != (0, 0)]
    return _boxed(rule, inner, None, shape)


def _sticking_out(rule: str, one: Drawn, around: Sequence[Drawn], shape: tuple[int, int]) -> Mark | None:
    masks = [other.mask for other in around if other.mask is not None]
    if one.mask is None or not masks:
        return None
    out = one.mask & ~np.logical_or.reduce(masks)
    return _boxed(rule, parts(out, diagonal=True), out, shape)


CAUSES: Mapping[str, Callable[[str, Drawn, Sequence[Drawn], tuple[int, int]], Mark | None]] = {
    "CONTOUR-CROSSING": _crossing,
    "CONTOUR-OUTSIDE": _outside,
    "CONTOUR-OPEN": _gap,
    "CONTOUR-FEW-POINTS": _points,
    "MASK-BORDER": _border,
    "MASK-PARTS": _lesser_parts,
    "MASK-HOLES": _holes,
    "RELATION-OUTSIDE": _sticking_out,
    "RELATION-LARGER": _sticking_out,
}


def _boxed(rule: str, boxes: Sequence[Box], pixels: BoolArray | None, shape: tuple[int, int]) -> Mark | None:
    if not boxes:
        return None
    if len(boxes) > MOST_PLACES:
        whole = boxes[0]
        for box in boxes[1:]:
            whole = _joined(whole, box)
        boxes = [whole]
    return Mark(rule, boxes=tuple(_grown(box, *shape) for box in boxes), pixels=pixels)


def _squares(places: FloatArray, shape: tuple[int, int]) -> tuple[Box, ...]:
    return tuple(_grown((x, y, x, y), *shape) for x, y in places.tolist())


def _grown(box: Box, rows: int, columns: int, by: float = 1.5) -> Box:
    """A box that leaves room around what it holds, as far as the image goes."""
    left, top, right, bottom = box
    return max(left - by, 0.0), max(top - by, 0.0), min(right + by, float(columns)), min(bottom + by, float(rows))


def _joined(a: Box, b: Box) -> Box:
    return min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])


def _box_of(mask: BoolArray) -> Box:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
