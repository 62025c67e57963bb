"""A mask between two masks: what lies between two slices of a structure, or between two moments of it.

``shape`` is shape-based interpolation (Raya & Udupa, IEEE Transactions on Medical Imaging 9(1), 1990, 32-42): of each mask the signed
distance of every pixel to its border, positive inside; the two are mixed by where the image lies, and what is not negative belongs. It
takes masks of any form, holes and several parts too. ``linear`` draws a contour half-way (or wherever) between corresponding points of
two contours, ``nearest`` takes the nearer one as it is.

On 36 inner and 18 outer contours of the real studies `shape` from masks and from polygons to the sub-pixel are equally good, and so is
moving both to a common centre first: see docs/sets.md. So masks are enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from catalog.contours import BoolArray, FloatArray, rasterise
from catalog.errors import CatalogError

Method = Literal["shape", "linear", "nearest"]
METHODS: tuple[Method, ...] = ("shape", "linear", "nearest")

POINTS = 200  # of a contour that is resampled; with 50 the Dice is the same to 0.002
# px by which a pixel may lie outside and belong: one that is as far inside the one mask as outside the other is decided by rounding of the
# images' positions otherwise. Half-way that is every second row of pixels that two borders have between them.
TIE = 0.01


class Outline(NamedTuple):
    """What was drawn on an image."""

    mask: BoolArray  # (rows, columns)
    rings: Sequence[FloatArray] | None = None  # each (n, 2) px, convention centre, as the mask was made from; None: a segment


def needed(method: Method) -> None:
    """Say in one line what to install where SciPy is needed and not there."""
    if method == "shape":
        try:
            import scipy.ndimage  # noqa: F401
        except ImportError:
            raise CatalogError("--method shape needs SciPy, which is not installed: pip install 'scanfeed[derive]'") from None


def can(method: Method, first: Outline, second: Outline) -> bool:
    """Say whether a method takes these two: `linear` knows which point corresponds to which only where each is one ring."""
    return method != "linear" or all(one.rings is not None and len(one.rings) == 1 and len(one.rings[0]) >= 3 for one in (first, second))


def between(
    method: Method,
    first: Outline,
    second: Outline,
    fraction: float,
    *,
    shape: tuple[int, int],
    offsets: tuple[tuple[float, float], tuple[float, float]] = ((0.0, 0.0), (0.0, 0.0)),
) -> BoolArray:
    """Return the mask at a place between two, bool (rows, columns). It may be empty: `shape` makes nothing outside both.

    Args:
        fraction: 0 < fraction < 1; near 0 it is like the first, near 1 like the second.
        shape: Rows and columns of the image on which it is to lie.
        offsets: Of each, where its image's first pixel falls on this image, seen along the slice normal: x, y in px.

    Raises:
        ValueError: If the fraction is no such number, or the method does not take these (see `can`).
    """
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"fraction is between 0 and 1, not {fraction}")
    if not can(method, first, second):
        raise ValueError("linear takes two contours of one ring each")
    if method == "nearest":
        return _placed(first, offsets[0], shape) if fraction <= 0.5 else _placed(second, offsets[1], shape)
    if method == "linear":
        assert first.rings is not None and second.rings is not None
        ring = _linear(first.rings[0] + np.array(offsets[0]), second.rings[0] + np.array(offsets[1]), fraction)
        return rasterise([ring], *shape, convention="centre")
    masks = [_placed(one, offset, shape) for one, offset in zip((first, second), offsets, strict=True)]
    if not (masks[0].any() and masks[1].any()):
        return np.zeros(shape, np.bool_)
    top, bottom, left, right = _around(masks[0] | masks[1])
    window = (slice(top, bottom), slice(left, right))
    mixed = (1.0 - fraction) * signed_distance(masks[0][window]) + fraction * signed_distance(masks[1][window])
    mask = np.zeros(shape, np.bool_)
    mask[window] = mixed >= -TIE
    return mask


def signed_distance(mask: BoolArray) -> FloatArray:
    """Return how far the centre of each pixel lies from the mask's border, which runs half a pixel from it: px, negative outside.

    What is beyond the array counts as outside, so a window with all of the mask in it gives what the whole image would.
    """
    from scipy import ndimage

    padded = np.pad(mask, 1)
    inside, outside = ndimage.distance_transform_edt(padded), ndimage.distance_transform_edt(~padded)
    found: FloatArray = np.where(padded, inside - 0.5, 0.5 - outside)[1:-1, 1:-1]
    return found


def _placed(one: Outline, offset: tuple[float, float], shape: tuple[int, int]) -> BoolArray:
    """Return a mask as it lies on another image: a polygon to the sub-pixel, a segment at the nearest whole pixel."""
    if offset == (0.0, 0.0) and one.mask.shape == shape:
        return one.mask
    if one.rings is not None:
        return rasterise(one.rings, *shape, convention="centre", shift=offset)
    placed = np.zeros(shape, np.bool_)
    rows, columns = np.nonzero(one.mask)
    rows, columns = rows + int(np.rint(offset[1])), columns + int(np.rint(offset[0]))
    inside = (rows >= 0) & (rows < shape[0]) & (columns >= 0) & (columns < shape[1])
    placed[rows[inside], columns[inside]] = True
    return placed


def _around(mask: BoolArray) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


def _linear(one: FloatArray, other: FloatArray, fraction: float) -> FloatArray:
    """Return the ring between two, (POINTS, 2): points at the same share of the length correspond, from where they fit best.

    Both run the same way round; of all places to begin at, the one is taken for which the squares of the distances between
    corresponding points, each ring around its own centre, have the least sum: the greatest of a circular correlation.
    """
    a, b = _resampled(one), _resampled(other)
    if _turn(a) * _turn(b) < 0:
        b = b[::-1]
    a_centred, b_centred = ((ring - ring.mean(axis=0)) @ np.array([1.0, 1.0j]) for ring in (a, b))
    correlation = np.fft.ifft(np.fft.fft(a_centred) * np.conj(np.fft.fft(b_centred))).real
    # Of begins that fit equally well (a circle's all do) the first, whatever the last digits say.
    best = int(np.flatnonzero(correlation >= correlation.max() - 1e-9 * max(abs(float(correlation.max())), 1.0))[0])
    return np.asarray((1.0 - fraction) * a + fraction * np.roll(b, best, axis=0), np.float64)


def _resampled(ring: FloatArray) -> FloatArray:
    closed = np.concatenate([ring, ring[:1]])
    walked = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(closed, axis=0).T))])
    at = np.arange(POINTS) * (walked[-1] / POINTS)
    return np.column_stack([np.interp(at, walked, closed[:, 0]), np.interp(at, walked, closed[:, 1])])


def _turn(ring: FloatArray) -> float:
    x, y = (ring - ring[0]).T
    return float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))
