"""Where a polygon crosses itself, and the area that it encloses by even-odd even so.

Points are complex numbers, x + iy in px: the cross product of a and b is then the imaginary part of conj(a) · b, one numpy call.

Real contours touch themselves all the time: points on half pixels that stand there twice, stretches that run back along themselves.
None of that is a crossing. One is where a stretch of the outline comes to lie on the other side of another: inside two edges, or at
points that lie on the other edge or on a point of it. Where two stretches run along one another first it is left uncounted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from catalog import contours
from catalog.contours import FloatArray, IntArray

ComplexArray = npt.NDArray[np.complex128]

TOUCH = 1e-6  # px: closer than this is on the line; in polygons that come from mm the rest is rounding
MOST = 100
PAIRS_AT_ONCE = 1 << 18
MOST_PAIRS = 1 << 25  # of edges that may meet: half a second; an outline of 10,000 points has some 100,000
MOST_SLABS = 1 << 22  # edges × heights of a polygon that touches itself: half a second


def crossings(rings: Sequence[ComplexArray]) -> tuple[int | None, FloatArray | None]:
    """Count where the rings cross themselves and one another; rings of fewer than three points enclose nothing and are left out.

    Returns:
        How often, 100 standing for more too, None where there is too much to compare. And the heights y at which edges cross, float64;
        None where the rings do not so much as touch themselves, or too much to compare: then they are areas as they stand.
    """
    cleaned = [ring[np.abs(ring - np.concatenate([ring[-1:], ring[:-1]])) > TOUCH] for ring in rings if len(ring) >= 3]
    kept = [ring for ring in cleaned if len(ring) >= 3]
    if not kept:
        return 0, None
    start = np.concatenate(kept)
    end = np.concatenate([part for ring in kept for part in (ring[1:], ring[:1])])
    after = np.arange(1, len(start) + 1)  # the edge after each
    first = 0
    for ring in kept:
        after[first + len(ring) - 1] = first
        first += len(ring)
    blocks = _pairs(start, end)
    if blocks is None:
        return None, None
    step = end - start
    length = np.abs(step)
    towards = np.conj(step / length)
    count, touches, heights = 0, False, []
    for one, other in blocks:
        # How far the ends of each lie to the left of the other.
        begins = (towards[one] * (start[other] - start[one])).imag
        ends = (towards[one] * (end[other] - start[one])).imag
        met = np.minimum(begins, ends) <= TOUCH
        met &= np.maximum(begins, ends) >= -TOUCH
        one, other, begins, ends = one[met], other[met], begins[met], ends[met]  # noqa: PLW2901
        begun = (towards[other] * (start[one] - start[other])).imag
        ended = (towards[other] * (end[one] - start[other])).imag
        proper = (np.minimum(begins, ends) < -TOUCH) & (np.maximum(begins, ends) > TOUCH)
        proper &= (np.minimum(begun, ended) < -TOUCH) & (np.maximum(begun, ended) > TOUCH)
        if proper.any():
            at = begun[proper] / (begun[proper] - ended[proper])
            heights.append((start[one[proper]] + at * step[one[proper]]).imag)
            count += int(proper.sum())
        beside = (after[one] != other) & (after[other] != one) & ~proper
        if beside.any():
            one, other = one[beside], other[beside]  # noqa: PLW2901
            touching, crossing = _at_points(start, end, towards, length, after, one, other)
            touches |= touching
            count += crossing
        if count >= MOST:
            break
    if not heights and not touches:
        return count, None
    return min(count, MOST), np.concatenate(heights) if heights else np.empty(0)


def _pairs(start: ComplexArray, end: ComplexArray) -> Iterator[tuple[IntArray, IntArray]] | None:
    """Yield pairs of edges whose boxes meet, each once, in blocks; None if there are too many to look at."""
    sides = [(np.minimum(a, b), np.maximum(a, b) + TOUCH) for a, b in ((start.real, end.real), (start.imag, end.imag))]
    best: tuple[int, int, IntArray, IntArray] | None = None
    for axis, (low, high) in enumerate(sides):
        order = np.argsort(low)
        count = np.searchsorted(low[order], high[order], side="right") - np.arange(1, len(order) + 1)
        total = int(count.sum())
        if best is None or total < best[0]:
            best = total, axis, order, count
        if total < PAIRS_AT_ONCE:
            break
    assert best is not None
    total, axis, order, count = best
    return None if total > MOST_PAIRS else _blocks(order, count, *sides[1 - axis])


def _blocks(order: IntArray, count: IntArray, low: FloatArray, high: FloatArray) -> Iterator[tuple[IntArray, IntArray]]:
    ends = np.cumsum(count)
    begin = 0
    while begin < len(count):
        done = int(ends[begin - 1]) if begin else 0
        stop = max(begin + 1, int(np.searchsorted(ends, done + PAIRS_AT_ONCE, side="right")))
        part = slice(begin, stop)
        rank = np.repeat(np.arange(begin, stop), count[part])
        other = order[np.arange(len(rank)) - np.repeat(ends[part] - count[part] - done, count[part]) + rank + 1]
        one = order[rank]
        meet = (low[one] <= high[other]) & (low[other] <= high[one])
        yield one[meet], other[meet]
        begin = stop


def _at_points(
    start: ComplexArray, end: ComplexArray, towards: ComplexArray, length: FloatArray, after: IntArray, one: IntArray, other: IntArray
) -> tuple[bool, int]:
    """Return whether edges, none next to one another, touch at a point, and how often the outline crosses there."""
    count, touches = 0, False
    for line, edge in ((one, other), (other, one)):
        # The point at which `edge` ends lies on `line`: on which side does the outline come, and on which does it go on?
        offset = towards[line] * (end[edge] - start[line])
        on = (np.abs(offset.imag) <= TOUCH) & (offset.real > TOUCH) & (offset.real < length[line] - TOUCH)
        if on.any():
            touches = True
            line, edge = line[on], edge[on]  # noqa: PLW2901
            comes = (towards[line] * (start[edge] - start[line])).imag
            goes = (towards[line] * (end[after[edge]] - start[line])).imag
            count += int(((np.minimum(comes, goes) < -TOUCH) & (np.maximum(comes, goes) > TOUCH)).sum())
    same = np.abs(end[one] - end[other]) <= TOUCH
    if same.any():
        touches = True
        one, other = one[same], other[same]
        # Directions away from the point that both share, as angles from the one by which the first stretch comes.
        ways = (np.conj(towards[after[one]]), -np.conj(towards[other]), np.conj(towards[after[other]]))
        turns = [np.angle(-towards[one] * way) % (2 * np.pi) for way in ways]
        goes, low, high = turns[0], np.minimum(turns[1], turns[2]), np.maximum(turns[1], turns[2])
        small = 1e-9
        count += int(((low > small) & (low < goes - small) & (high > goes + small) & (high < 2 * np.pi - small)).sum())
    return touches, count


def even_odd_area(rings: Sequence[ComplexArray], heights: FloatArray | None) -> float:
    """Return the area in px² that rings enclose by even-odd; `heights` as `crossings` returns them.

    Between two neighbouring heights at which an edge begins, ends or crosses another one, the width is linear in y: its value half way up
    times the height is the area. With over 100 crossings or some thousand points it is nearly that.
    """
    whole = [ring for ring in rings if len(ring) >= 3]
    if not whole:
        return 0.0
    if heights is None and len(whole) == 1:
        ring = whole[0] - whole[0][0]  # far from the origin the products would cancel
        return abs(float((np.vdot(ring[:-1], ring[1:])).imag)) / 2
    start = np.concatenate(whole)
    end = np.concatenate([part for ring in whole for part in (ring[1:], ring[:1])])
    if heights is None or len(start) * (len(start) + len(heights)) > MOST_SLABS:
        return contours.polygon_area([ring.view(np.float64).reshape(-1, 2) for ring in whole])
    levels = np.unique(np.concatenate([start.imag, heights]))
    middle = ((levels[1:] + levels[:-1]) / 2)[:, np.newaxis]
    low, high = np.minimum(start.imag, end.imag), np.maximum(start.imag, end.imag)
    rise = np.where(end.imag == start.imag, 1.0, end.imag - start.imag)
    met = np.where((low < middle) & (middle < high), start.real + (middle - start.imag) / rise * (end.real - start.real), np.inf)
    met.sort(axis=1)
    met = met[:, : met.shape[1] // 2 * 2]
    inside = np.isfinite(met[:, 1::2])
    widths = np.where(inside, met[:, 1::2], 0.0) - np.where(inside, met[:, ::2], 0.0)
    return float(widths.sum(axis=1) @ np.diff(levels))
