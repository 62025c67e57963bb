"""Digits changed a little, many at a time: a crop, an elastic jitter, a small blur, dropped pixels, each for some of the digits.

What happens to a digit follows from its `WORDS` random words alone, whatever it is done together with. All crops and jitters of a batch
are one resampling: the digits lie one below the other, and one `cv2.remap` draws them anew.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from catalog.errors import UsageError
from loaderd.gaps import Words

WORDS = 12  # a digit
# Shares of the digits, and strengths, of the seed: imgaug's Sometimes(0.3, Crop(percent=(0, 0.25))) and so on.
CROPPED, CROP = 0.3, 0.25  # up to that share of each side is cut off, and the rest enlarged to the digit's size
JITTERED, JITTER = 0.15, (0.5, 0.6)  # px, each pixel for itself
BLURRED, BLUR = 0.1, 0.5  # the largest sigma in px; the seed's 0.05 changes no pixel
DROPPED, DROP = 0.3, 0.1  # the share of pixels
SHARES = np.array([CROPPED, JITTERED, BLURRED, DROPPED])
MOST_ROWS = 32_000  # a resampling: OpenCV counts them in 16 bits
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def needed() -> None:
    """Say in one line what to install where OpenCV is not there."""
    try:
        import cv2
    except ImportError:
        raise UsageError("transforms need OpenCV, which is not installed: pip install 'scanfeed[transforms]'") from None
    cv2.setNumThreads(1)  # processes share the cores


def distort(digits: NDArray[np.uint8], words: Words, dropped_to: int) -> None:
    """Change digits in place.

    Args:
        digits: uint8 (M, rows, columns), C-contiguous, ink bright on a ground of 0.
        words: uint64 (M, WORDS), uniformly random.
        dropped_to: The value of dropped pixels.
    """
    chance = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
    cropped, jittered, blurred, dropped = (chance[:, :4] < SHARES).T
    moved = (cropped | jittered).nonzero()[0]
    if moved.size:
        cut = chance[:, 4:8] * CROP * cropped[:, None]
        strength = (JITTER[0] + (JITTER[1] - JITTER[0]) * chance[:, 8]) * jittered
        at_once = max(MOST_ROWS // digits.shape[1], 1)
        for start in range(0, len(moved), at_once):
            some = moved[start : start + at_once]
            digits[some] = _resampled(digits[some], cut[some], strength[some], words[some, 9])
    if (some := blurred.nonzero()[0]).size:
        digits[some] = _blurred(digits[some], chance[some, 10] * BLUR)
    if (some := dropped.nonzero()[0]).size:
        kept = _field(words[some, 11], digits[0].size).reshape(-1, *digits.shape[1:]) >= round(DROP * 2**16)
        digits[some] = np.where(kept, digits[some], np.uint8(dropped_to))


def _resampled(digits: NDArray[np.uint8], cut: NDArray[Any], strength: NDArray[Any], seeds: Words) -> NDArray[np.uint8]:
    """Crop by (top, bottom, left, right) as shares of the side, enlarge to the old size and move each pixel by up to `strength` px."""
    import cv2

    count, rows, columns = digits.shape
    low, high = cut[:, 0::2, None], cut[:, 1::2, None]  # (count, 2 axes, 1)
    sides = np.array([[rows], [columns]])
    lines = low * sides + (np.arange(max(rows, columns)) + 0.5) * (1 - low - high) - 0.5
    # In steps of 1/256 px, which a float32 holds exactly also in the last row of many digits: so where a digit lies changes no pixel.
    # Within its own digit: the one below begins a row further down.
    lines = np.rint(np.minimum(np.maximum(lines, 0), sides - 1) * 256) / 256
    at = np.empty((2, count, rows, columns), np.float32)  # x, y
    at[0], at[1] = lines[:, 1, None, :columns], lines[:, 0, :rows, None]
    if (some := strength.nonzero()[0]).size:
        away = _field(seeds[some], 2 * rows * columns).astype(np.float32).reshape(-1, 2, rows, columns)
        away -= np.float32(2**15 - 0.5)
        away *= (strength[some] * (256 / 2**15)).astype(np.float32)[:, None, None, None]
        np.rint(away, out=away)
        away *= np.float32(1 / 256)
        for axis, last in ((0, columns - 1), (1, rows - 1)):
            moved = away[:, axis]
            moved += at[axis, some]
            at[axis, some] = np.minimum(np.maximum(moved, 0, out=moved), np.float32(last), out=moved)
    at[1] += (np.arange(count, dtype=np.float32) * rows)[:, None, None]
    x, y = at.reshape(2, count * rows, columns)
    found = cv2.remap(digits.reshape(-1, columns), x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(found, np.uint8).reshape(digits.shape)


def _blurred(digits: NDArray[np.uint8], sigma: NDArray[Any]) -> NDArray[np.uint8]:
    """Return digits under a Gaussian of three pixels: of sigma 0.5, what lies further out weighs 0.0003."""
    side = np.exp(-0.5 / np.maximum(sigma, 0.05) ** 2).astype(np.float32)[:, None, None]
    whole = 1 + 2 * side
    count, rows, columns = digits.shape
    padded = np.zeros((count, rows + 2, columns + 2), np.float32)
    padded[:, 1:-1, 1:-1] = digits
    across = (padded[:, :, 1:-1] + side * (padded[:, :, :-2] + padded[:, :, 2:])) / whole
    down = (across[:, 1:-1] + side * (across[:, :-2] + across[:, 2:])) / whole
    return np.asarray(np.rint(down), np.uint8)


def _field(seeds: Words, count: int) -> NDArray[np.uint16]:
    """Return `count` random numbers of 16 bits for each seed: SplitMix64 (Steele, Lea, Flood 2014), whose n-th word needs no other."""
    words = mixed(seeds[:, None] + GOLDEN * np.arange(1, -(-count // 4) + 1, dtype=np.uint64))
    return words.astype("<u8", copy=False).view("<u2")[:, :count]  # four a word, from the low end on any machine


def mixed(words: Words) -> Words:
    """Return SplitMix64's finalizer of words: another word for each, as random as it was."""
    words = words ^ (words >> np.uint64(30))
    words *= np.uint64(0xBF58476D1CE4E5B9)
    words ^= words >> np.uint64(27)
    words *= np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    return words
