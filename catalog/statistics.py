"""What an image's pixels are like: their hash, least and largest, mean, entropy. Pure; `catalog.measuring` reads and writes.

(Rows of table ``measure`` and column ``image.pixel_hash``.)
"""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

BINS = 256
MOST_LEVELS = 1 << 20  # whole numbers are counted value by value where they span no more than this, as all of 16 bits do

Array = npt.NDArray[Any]


class Statistics(NamedTuple):
    """What stands in a row of ``measure``; without any finite value minimum, maximum, mean and deviation are NaN, the rest 0."""

    minimum: float
    maximum: float
    mean: float
    deviation: float
    entropy: float
    saturated: float
    nans: int


def pixel_hash_of(stored: Array) -> bytes:
    """Return sha256 of stored values, in C order, little endian: ``image.pixel_hash``."""
    return hashlib.sha256(np.ascontiguousarray(stored, stored.dtype.newbyteorder("<")).data).digest()


def statistics(stored: Array, slope: float = 1.0, intercept: float = 0.0) -> Statistics:
    """Return what the values float64(stored) * slope + intercept are like; of several samples a pixel, all of them.

    Values that are not finite are left out. The histogram's bins are equal: (value - minimum) * 256 // (maximum - minimum), the maximum
    in the last one.
    """
    flat = stored.reshape(-1)
    with np.errstate(all="ignore"):
        if flat.dtype.kind in "iu" and flat.dtype.itemsize <= 4:
            first, last = int(flat.min()), int(flat.max())
            if last - first < MOST_LEVELS:
                return _of_levels(flat, first, last, slope, intercept)
        return _of_values(flat.astype(np.float64) * slope + intercept)


def _of_levels(flat: Array, first: int, last: int, slope: float, intercept: float) -> Statistics:
    """For whole numbers: everything follows from how often each occurs, and np.bincount counts 65,536 in 80 µs."""
    levels = flat.astype(np.intp)
    levels -= first
    every = np.bincount(levels)
    present = np.flatnonzero(every)
    counts = every[present]
    values = (present + first).astype(np.float64) * slope + intercept
    if not (np.isfinite(values[0]) and np.isfinite(values[-1])):
        return _of_values(flat.astype(np.float64) * slope + intercept)
    if slope < 0:
        present, counts, values = last - first - present[::-1], counts[::-1], values[::-1]
    if values[0] == values[-1]:
        return Statistics(float(values[0]), float(values[0]), float(values[0]), 0.0, 0.0, 1.0, 0)
    mean = float(counts @ values) / flat.size
    deviation = float(np.sqrt(counts @ (values - mean) ** 2 / flat.size))
    bins = np.bincount(np.minimum(present * BINS // (last - first), BINS - 1), weights=counts)
    return Statistics(
        float(values[0]), float(values[-1]), mean, deviation, _entropy(bins), float(counts[-1]) / flat.size, 0
    )  # fmt: skip


def _of_values(values: npt.NDArray[np.float64]) -> Statistics:
    finite = values[np.isfinite(values)]
    nans = values.size - finite.size
    if not finite.size:
        return Statistics(np.nan, np.nan, np.nan, np.nan, 0.0, 0.0, nans)
    first, last = float(finite.min()), float(finite.max())
    mean, deviation = float(finite.mean()), float(finite.std())
    if first == last:
        return Statistics(first, last, first, 0.0, 0.0, 1.0, nans)
    at = (finite / 2 - first / 2) / (last / 2 - first / 2) * BINS  # halves: the difference of two numbers can be too large for one
    bins = np.bincount(np.minimum(at.astype(np.intp), BINS - 1), minlength=BINS)
    return Statistics(first, last, mean, deviation, _entropy(bins), float(np.count_nonzero(finite == last)) / finite.size, nans)


def _entropy(bins: Array) -> float:
    shares = bins[bins > 0] / bins.sum()
    return float(-(shares @ np.log2(shares))) + 0.0
