"""A mask of what lies inside another mask, by intensities alone: the blood pool inside the muscle's outer border.

Three ways, each without anything learnt: Otsu's threshold, two clusters of intensity and depth, and the closed line of the steepest
edge. Whether the inside is the brighter or the darker class is seen from where its pixels lie. Needs SciPy, the extra `derive`, except
for `otsu` and `best_dice`.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from catalog.contours import BoolArray, FloatArray, rasterise
from catalog.errors import CatalogError

LEAST_PX = 9  # of fewer pixels nobody can say what is inside
DEPTH_WEIGHT = 0.5  # of depth beside intensity, both in their standard deviations
SIGMA_PX = 1.5  # of the Gaussian by which edges are found
RAYS = RADII = 64
MARGIN_PX = 6  # around the box that is worked on, so that the Gaussian sees what is there: 4 standard deviations
ROUNDS = 100  # of 2-means, which ends by itself long before


class Method(StrEnum):
    """How the inside is found."""

    EDGES = "edges"
    OTSU = "otsu"
    KMEANS = "kmeans"


SAID = {
    Method.EDGES: "the closed line of the steepest edge inside {}",
    Method.OTSU: "Otsu's threshold of the pixels inside {}, convex hull of the largest part",
    Method.KMEANS: "two clusters of intensity and depth inside {}, convex hull of the largest part",
}


class Inside(NamedTuple):
    """What was found."""

    mask: BoolArray  # (rows, columns)
    parameters: dict[str, float | bool]  # level: Otsu's threshold (modality units); brighter: the inside is the brighter class


def needed() -> None:
    """Say in one line what to install where SciPy is not there."""
    if not there():
        raise CatalogError("proposals need SciPy, which is not installed: pip install 'scanfeed[derive]'")


def there() -> bool:
    """Say whether SciPy is installed."""
    try:
        import scipy  # noqa: F401
    except ImportError:
        return False
    return True


def found(pixels: npt.NDArray[Any], around: BoolArray, method: Method) -> Inside | None:
    """Return what lies inside a mask, or None where intensities tell nothing apart there.

    Args:
        pixels: (rows, columns), grey. What is not finite counts for nothing.
        around: bool (rows, columns), the mask to look inside of.

    The convex hull is there because readers draw papillary muscles and trabeculae into the pool, and their contours are convex.

    Raises:
        ValueError: If the two are not of one shape (rows, columns).
    """
    if pixels.ndim != 2 or pixels.shape != around.shape:
        raise ValueError(f"grey pixels and a mask of one shape are needed, not {pixels.shape} and {around.shape}")
    if not around.any():
        return None
    box = _box(around)
    values, outer = pixels[box].astype(np.float64), around[box]
    finite = np.isfinite(values)
    level = otsu(values[outer & finite]) if np.count_nonzero(outer & finite) >= LEAST_PX else None
    if level is None:
        return None
    values[~finite] = level
    brighter = is_brighter(values > level, outer & finite)
    if not brighter:
        values, level = -values, -level
    if method is Method.EDGES:
        inner = _edges(values, outer)
    else:
        inner = _convex(_largest((values > level) & outer if method is Method.OTSU else _two_means(values, outer, level))) & outer
    if not inner.any() or (inner == outer).all():
        return None
    mask = np.zeros(around.shape, np.bool_)
    mask[box] = inner
    return Inside(mask, {"level": level if brighter else -level, "brighter": brighter})


def dice(one: BoolArray, other: BoolArray) -> float:
    """Return twice what two masks have in common over what they have together, 0 to 1; of two empty ones 1."""
    both = int(np.count_nonzero(one)) + int(np.count_nonzero(other))
    return 2.0 * int(np.count_nonzero(one & other)) / both if both else 1.0


def otsu(values: npt.NDArray[Any]) -> float | None:
    """Return the threshold between two classes of the least variance within them, the lower not above it; None if all are equal.

    Exact, over all thresholds, not over a histogram's bars (Otsu 1979, IEEE Trans. SMC 9(1):62). In one dimension this is what 2-means
    looks for, too.
    """
    ordered = np.sort(values.astype(np.float64), axis=None)
    if not ordered.size or ordered[0] == ordered[-1]:
        return None
    # From the mean and in parts of the range, so that neither a large offset nor large values cost digits.
    scaled = (ordered - ordered.mean()) / (ordered[-1] - ordered[0])
    below = np.arange(1, ordered.size)
    sums = np.cumsum(scaled)
    total = sums[-1]
    between = below * (ordered.size - below) * (sums[:-1] / below - (total - sums[:-1]) / (ordered.size - below)) ** 2
    between[ordered[1:] == ordered[:-1]] = -1.0  # equal values are in one class
    at = int(between.argmax())
    level = float(ordered[at] / 2 + ordered[at + 1] / 2)
    return level if level < ordered[at + 1] else float(ordered[at])  # half-way between two neighbours of float64 is the upper one


def is_brighter(above: BoolArray, outer: BoolArray) -> bool:
    """Say whether of a mask's pixels those above a threshold are the ones inside: nearer to the mask's centre than the others."""
    rows, columns = np.nonzero(outer)
    away = (rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2
    high = above[outer]
    return bool(not high.any() or high.all() or away[high].mean() <= away[~high].mean())


def best_dice(pixels: npt.NDArray[Any], around: BoolArray, drawn: BoolArray) -> float:
    """Return the Dice that the best of all thresholds inside a mask has against what was drawn: no threshold does better.

    It is chosen knowing the answer, the better of brighter and darker.
    """
    usable = around & np.isfinite(pixels)
    values, right = pixels[usable].astype(np.float64), drawn[usable]
    area, best = int(np.count_nonzero(drawn)), 0.0
    for signed in (values, -values):
        order = np.argsort(-signed, kind="stable")
        common = np.cumsum(right[order])
        ends = np.append(signed[order][1:] != signed[order][:-1], True)  # a threshold takes equal values together
        if values.size:
            best = max(best, float((2.0 * common / (np.arange(1, values.size + 1) + area))[ends].max()))
    return best


def _box(mask: BoolArray) -> tuple[slice, slice]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return (
        slice(max(int(rows[0]) - MARGIN_PX, 0), int(rows[-1]) + MARGIN_PX + 1),
        slice(max(int(columns[0]) - MARGIN_PX, 0), int(columns[-1]) + MARGIN_PX + 1),
    )


def _largest(mask: BoolArray) -> BoolArray:
    """Return the largest part whose pixels touch by an edge."""
    from scipy import ndimage

    labels, parts = ndimage.label(mask)
    largest: BoolArray = labels == 1 + int(np.bincount(labels.ravel())[1:].argmax()) if parts > 1 else mask
    return largest


def _convex(mask: BoolArray) -> BoolArray:
    """Return the pixels whose centres lie in the convex hull of a mask's pixel centres."""
    from scipy.spatial import ConvexHull, QhullError

    points = np.argwhere(mask).astype(np.float64)
    try:
        sides = ConvexHull(points).equations
    except (QhullError, ValueError):  # a line, or fewer than three
        return mask
    rows, columns = np.ogrid[: mask.shape[0], : mask.shape[1]]
    inside = np.ones(mask.shape, np.bool_)
    for along_rows, along_columns, offset in sides.tolist():
        inside &= along_rows * rows + along_columns * columns + offset <= 1e-9
    return inside


def _two_means(values: FloatArray, outer: BoolArray, level: float) -> BoolArray:
    """Return the brighter of two clusters of intensity and of depth below the mask's border, from Otsu's classes on."""
    from scipy import ndimage

    depth = ndimage.distance_transform_edt(np.pad(outer, 1))[1:-1, 1:-1][outer]
    grey = values[outer]
    places = np.column_stack([grey / grey.std(), DEPTH_WEIGHT * depth / (depth.std() or 1.0)])
    high = grey > level
    for _ in range(ROUNDS):
        low_mean, high_mean = places[~high].mean(axis=0), places[high].mean(axis=0)
        now = ((places - high_mean) ** 2).sum(axis=1) < ((places - low_mean) ** 2).sum(axis=1)
        if (now == high).all() or now.all() or not now.any():
            break
        high = now
    cluster = np.zeros(outer.shape, np.bool_)
    cluster[outer] = high
    return cluster


def _edges(values: FloatArray, outer: BoolArray) -> BoolArray:
    """Return the inside of the closed line around the mask's centre along which intensities fall outwards the most.

    On rays from the centre, by dynamic programming: from ray to ray the line moves by one of the radii at most.
    """
    from scipy import ndimage

    places = np.argwhere(outer).astype(np.float64)
    centre = places.mean(axis=0)
    reach = float(np.hypot(*(places - centre).T).max())
    angles = np.arange(RAYS) * (2.0 * np.pi / RAYS)
    radii = np.linspace(0.0, reach, RADII + 1)[1:]
    grid = [centre[0] + np.outer(np.sin(angles), radii), centre[1] + np.outer(np.cos(angles), radii)]
    smooth = ndimage.map_coordinates(ndimage.gaussian_filter(values, SIGMA_PX), grid, order=1, mode="nearest")
    fall = -np.gradient(smooth, reach / RADII, axis=1)
    within = ndimage.map_coordinates(outer.astype(np.float64), grid, order=1) > 0.5
    cost = np.where(within, -fall, 10.0 * np.abs(fall).max() + 1.0)
    path = radii[_closed(cost)]
    line = np.column_stack([centre[1] + path * np.cos(angles), centre[0] + path * np.sin(angles)])
    return rasterise([line], *outer.shape, convention="centre") & outer


def _closed(cost: FloatArray) -> npt.NDArray[np.int64]:
    """Return for each ray the column of the cheapest line that goes around: the middle one of three rounds, whose ends are free."""
    rays, columns = cost.shape
    rounds = np.concatenate([cost, cost, cost])
    total = rounds[0]
    came = np.empty((len(rounds), columns), np.int64)
    for at in range(1, len(rounds)):
        steps = np.full((3, columns), np.inf)
        steps[0, 1:], steps[1], steps[2, :-1] = total[:-1], total, total[1:]
        choice = steps.argmin(axis=0)
        came[at] = np.arange(columns) + choice - 1
        total = rounds[at] + steps[choice, np.arange(columns)]
    path = np.empty(len(rounds), np.int64)
    path[-1] = total.argmin()
    for at in range(len(rounds) - 1, 0, -1):
        path[at - 1] = came[at, path[at]]
    return path[rays : 2 * rays]
