"""Transforms of the pixels' values: gamma to noise, normalisation. `loaderd.transforms` has those of the geometry.

Pixels come in modality units, whose range is anything: Hounsfield from -1,000 to 3,000, MR from 0 to 1,500. So strengths are no fixed
amounts but shares of the image's own standard deviation or, for gamma, of its own range, taken over all channels: neighbours stay
comparable. Gamma, brightness, contrast, channel shift, noise and blur therefore do the same before a normalisation and after it
(f(a·x + b) = a·f(x) + b). Nothing clips, but what promises a range.

`apply` changes images, (C, H, W) float32 or float64, C-contiguous, and masks, (K, H, W) bool, in place; it draws from the generator it is
given and from nothing else, and leaves `p` to the caller. Zero strength leaves every bit; a constant image gives no NaN. Values that are
not finite do not count in any statistic; NaN stays NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from loaderd.arguments import Limit, Transform, TransformError, choice, limits, number, pair, within, wrong
from loaderd.user import Images, Masks, Statistics, User

OVER = ("image", "dataset")
BINS = 4_096
SMALL = 16_384  # pixels: up to here, sorting is faster than a histogram


@dataclass(frozen=True)
class Gamma(Transform):
    """Raise the values' place in the image's range to a power: MONAI's AdjustContrast, albumentations' RandomGamma.

    ``((x - least) / (largest - least)) ** (1 + d) * (largest - least) + least``: the range stays, only what lies between moves.

    Attributes:
        limit: d is drawn from -limit to limit, or from (lowest, highest); above -1. 0.2: exponents from 0.8 to 1.2.
    """

    name: ClassVar[str] = "gamma"
    limit: Limit = 0.2

    def check(self) -> None:
        self.replace("limit", limits(self, "limit", -1, above=True))

    def apply(self, images: Images, masks: Masks, rng: np.random.Generator, statistics: Statistics) -> None:
        exponent = 1 + within(self.limit, rng.random())
        least, largest = _range(images)
        if exponent == 1 or least == largest:
            return
        with np.errstate(invalid="ignore"):  # infinities
            images -= least
            images /= largest - least
            np.power(images, exponent, out=images)
            images *= largest - least
            images += least


@dataclass(frozen=True)
class Brightness(Transform):
    """Add one amount to all pixels: MONAI's RandStdShiftIntensity.

    Attributes:
        limit: The amount, in standard deviations of the image, is drawn from -limit to limit, or from (lowest, highest).
    """

    name: ClassVar[str] = "brightness"
    limit: Limit = 0.2

    def check(self) -> None:
        self.replace("limit", limits(self, "limit"))

    def apply(self, images: Images, masks: Masks, rng: np.random.Generator, statistics: Statistics) -> None:
        if amount := within(self.limit, rng.random()) * _moments(images)[1]:
            images += amount


@dataclass(frozen=True)
class Contrast(Transform):
    """Stretch the values about their mean: ``(x - mean) * (1 + d) + mean``.

    Attributes:
        limit: d is drawn from -limit to limit, or from (lowest, highest); from -1 on, which leaves the mean alone.
    """

    name: ClassVar[str] = "contrast"
    limit: Limit = 0.2

    def check(self) -> None:
        self.replace("limit", limits(self, "limit", -1))

    def apply(self, images: Images, masks: Masks, rng: np.random.Generator, statistics: Statistics) -> None:
        factor = 1 + within(self.limit, rng.random())
        mean, deviation = _moments(images)
        if factor == 1 or deviation == 0:
            return
        images -= mean
        images *= factor
        images += mean


@dataclass(frozen=True)
class ChannelShift(Transform):
    """Add an amount of its own to each channel: albumentations' RGBShift. With one channel the same as `Brightness`.

    Attributes:
        limit: Each amount, in standard deviations of the image, is drawn from -limit to limit, or from (lowest, highest).
    """

    name: ClassVar[str] = "channel_shift"
    limit: Limit = 0.1

    def check(self) -> None:
        self.replace("limit", limits(self, "limit"))

    def apply(self, images: Images, masks: Masks, rng: np.random.Generator, statistics: Statistics) -> None:
        deviation = _moments(images)[1]
        for channel in range(len(images)):
            if amount := within(self.limit, rng.random()) * deviation:
                images[channel] += amount


@dataclass(frozen=True)
class Noise(Transform):
    """Add Gaussian noise, independent for each pixel: MONAI's RandGaussianNoise, albumentations' GaussNoise.

    Attributes:
        std: The noise's standard deviation, in standard deviations of the image, is drawn from 0 to std, or from (lowest, highest).
    """

    name: ClassVar[str] = "noise"
    std: Limit = 0.1

    def check(self) -> None:
        self.replace("std", _up_to(self, "std"))

    def apply(self, images: Images, masks: Masks, rng: np.random.Generator, statistics: Statistics) -> None:
        deviation = _below(self.std, rng.random()) * _moments(images)[1]
        if deviation == 0:
            return
        import cv2  # needed by `loaderd.warping`, which says so where it is not there

        # 65,536 values take OpenCV 0.12 ms and numpy's Philox 1.0 ms. Its generator starts with the seed as it is: the very first value is
        # drawn from that, and would never be negative if seeds were not.
        cv2.setRNGSeed(int(rng.integers(-(2**31), 2**31)))
        noise = np.empty((images.shape[0] * images.shape[1], images.shape[2]), np.float32)
        cv2.randn(noise, np.zeros(1), np.full(1, deviation))
        images += noise.reshape(images.shape)


@dataclass(frozen=True)
class Blur(Transform):
    """Smooth by a Gaussian: MONAI's RandGaussianSmooth, albumentations' GaussianBlur, scipy.ndimage.gaussian_filter. Masks stay.

    The kernel reaches 4 sigma; beyond the edges the image is mirrored.

    Attributes:
        sigma: Pixels; drawn from 0 to sigma, or from (lowest, highest); at most 100.
    """

    name: ClassVar[str] = "blur"
    sigma: Limit = 1.0

    def check(self) -> None:
        self.replace("sigma", _up_to(self, "sigma", 100))

    def apply(self, images: Images, masks: Masks, rng: np.random.Generator, statistics: Statistics) -> None:
        sigma = _below(self.sigma, rng.random())
        size = 2 * int(4 * sigma + 0.5) + 1
        if size == 1:
            return
        import cv2

        for channel in images:
            cv2.GaussianBlur(channel, (size, size), sigma, dst=channel, borderType=cv2.BORDER_REFLECT)


@dataclass(frozen=True)
class ZScore(Transform):
    """Make the mean 0 and the standard deviation 1: MONAI's NormalizeIntensity. A constant image becomes 0.

    Attributes:
        over: "image": by its own mean and deviation, over all channels; "dataset": by those of all the stream's pixels.
    """

    name: ClassVar[str] = "zscore"
    over: str = "image"

    def check(self) -> None:
        choice(self, "over", OVER)

    @property
    def statistics(self) -> tuple[str, ...]:
        return ("mean", "std") if self.over == "dataset" else ()

    def apply(self, images: Images, masks: Masks, rng: np.random.Generator, statistics: Statistics) -> None:
        mean, deviation = _known(self, statistics) if self.over == "dataset" else _moments(images)
        images -= mean
        images /= deviation or 1


@dataclass(frozen=True)
class MinMax(Transform):
    """Map the least value to output[0] and the largest to output[1], linearly: MONAI's ScaleIntensity. A constant image becomes output[0].

    Attributes:
        output: The range of what comes out; always kept.
        over: "image": its own least and largest value, over all channels; "dataset": those of all the stream's pixels.
    """

    name: ClassVar[str] = "minmax"
    output: tuple[float, float] = (0.0, 1.0)
    over: str = "image"

    def check(self) -> None:
        self.replace("output", pair(self, "output", -math.inf, math.inf))
        choice(self, "over", OVER)

    @property
    def statistics(self) -> tuple[str, ...]:
        return ("min", "max") if self.over == "dataset" else ()

    def apply(self, images: Images, masks: Masks, rng: np.random.Generator, statistics: Statistics) -> None:
        least, largest = _known(self, statistics) if self.over == "dataset" else _range(images)
        _spread(images, least, largest, self.output)


@dataclass(frozen=True)
class Percentile(Transform):
    """Map two percentiles to output[0] and output[1], linearly, and clip: MONAI's ScaleIntensityRangePercentiles(clip=True).

    Attributes:
        lower: Per cent of the pixels, 0 to 100.
        upper: Per cent of the pixels, above `lower`.
        output: The range of what comes out; always kept.
        over: "image": its own percentiles, over all channels; "dataset": those of all the stream's pixels.
    """

    name: ClassVar[str] = "percentile"
    lower: float = 0.5
    upper: float = 99.5
    output: tuple[float, float] = (0.0, 1.0)
    over: str = "image"

    def check(self) -> None:
        self.replace("lower", number(self, "lower", 0, 100))
        self.replace("upper", number(self, "upper", 0, 100))
        if self.upper <= self.lower:
            raise wrong(self, "upper", f"above lower={self.lower:g}")
        self.replace("output", pair(self, "output", -math.inf, math.inf))
        choice(self, "over", OVER)

    @property
    def statistics(self) -> tuple[str, ...]:
        return (f"p{self.lower:g}", f"p{self.upper:g}") if self.over == "dataset" else ()

    def apply(self, images: Images, masks: Masks, rng: np.random.Generator, statistics: Statistics) -> None:
        lower, upper = _known(self, statistics) if self.over == "dataset" else percentiles(images, (self.lower, self.upper))
        _spread(images, lower, upper, self.output)


@dataclass(frozen=True)
class Window(Transform):
    """Map a window of values to output, linearly, and clip what lies beyond: DICOM's LINEAR function (PS3.3 C.11.2.1.2.1).

    From center - 0.5 - (width - 1) / 2, which becomes output[0], to center - 0.5 + (width - 1) / 2, which becomes output[1].

    Attributes:
        center: Window Center (0028,1050), in modality units.
        width: Window Width (0028,1051), from 1 on.
        output: The range of what comes out; always kept.
    """

    name: ClassVar[str] = "window"
    center: float
    width: float
    output: tuple[float, float] = (0.0, 1.0)

    def check(self) -> None:
        self.replace("center", number(self, "center"))
        self.replace("width", number(self, "width", 1))
        self.replace("output", pair(self, "output", -math.inf, math.inf))

    def apply(self, images: Images, masks: Masks, rng: np.random.Generator, statistics: Statistics) -> None:
        middle, half = self.center - 0.5, (self.width - 1) / 2
        _spread(images, middle - half, middle + half, self.output)


TRANSFORMS: tuple[type[Transform], ...] = (
    Gamma, Brightness, Contrast, ChannelShift, Noise, Blur, ZScore, MinMax, Percentile, Window, User,
)  # fmt: skip


def percentiles(images: Images, wanted: tuple[float, ...]) -> list[float]:
    """Return percentiles (0 to 100) of the finite pixels as np.percentile does; 0 where there is none.

    Only the pixels of a histogram's bins that hold the values are sorted.
    """
    least, largest = _range(images)
    values = images.reshape(-1)
    with np.errstate(all="ignore"):
        if not math.isfinite(float(values.sum())):
            values = values[np.isfinite(values)]
    if values.size == 0:
        return [0.0 for _ in wanted]
    if values.size <= SMALL or not 1e-30 < largest - least < 1e30:
        return [float(one) for one in np.percentile(values, wanted)]
    bins = values - least
    bins *= (BINS - 1) / (largest - least)
    bins = bins.astype(np.uint16)
    up_to = np.cumsum(np.bincount(bins, minlength=BINS))

    def ordered(rank: int) -> float:
        number = int(np.searchsorted(up_to, rank, side="right"))
        inside = values[bins == number]
        rank -= int(up_to[number - 1]) if number else 0
        if inside.min() == inside.max():  # air: half of the image has one value, which np.partition is slow at
            return float(inside[0])
        return float(np.partition(inside, rank)[rank])

    found = []
    for one in wanted:
        place = one / 100 * (values.size - 1)
        low = ordered(int(place))
        high = ordered(min(int(place) + 1, values.size - 1))
        found.append(low + (high - low) * (place - int(place)))
    return found


def _up_to(transform: Transform, name: str, high: float = math.inf) -> Limit:
    """Return a field that a value is drawn up to: a number from 0 on, or (lowest, highest); (0, a) is returned as a."""
    if isinstance(getattr(transform, name), tuple | list):
        first, last = pair(transform, name, 0, high)
        return (first, last) if first else last
    return number(transform, name, 0, high)


def _below(limit: Limit, drawn: float) -> float:
    """Return the value within what `_up_to` returned, for what was drawn from [0, 1)."""
    return within(limit if isinstance(limit, tuple) else (0.0, limit), drawn)


def _known(transform: Any, statistics: Statistics) -> tuple[float, float]:
    """Return the two statistics that a transform over the dataset needs."""
    first, second = transform.statistics
    if statistics is None or first not in statistics or second not in statistics:
        raise TransformError(f"{transform.name}: the stream has no statistics {first} and {second}; create it anew")
    return statistics[first], statistics[second]


def _moments(images: Images) -> tuple[float, float]:
    """Return mean and standard deviation of the finite pixels; the deviation of a constant image is 0, whatever was rounded."""
    values = images
    with np.errstate(all="ignore"):
        mean = float(images.mean())
        deviations = images - mean
        variance = float(np.einsum("chw,chw->ch", deviations, deviations).sum()) / images.size  # row by row: float32 adds up few at a time
        if not math.isfinite(variance):
            values = images[np.isfinite(images)].astype(np.float64)
            if values.size == 0:
                return 0.0, 0.0
            mean, variance = float(values.mean()), float(values.var())
    deviation = math.sqrt(variance)
    if deviation <= 1e-5 * abs(mean) and values.min() == values.max():
        return float(values.flat[0]), 0.0
    return mean, deviation


def _range(images: Images) -> tuple[float, float]:
    """Return the least and the largest finite pixel; (0, 0) where there is none."""
    with np.errstate(invalid="ignore"):
        least, largest = float(images.min()), float(images.max())
    if not math.isfinite(largest - least):
        finite = images[np.isfinite(images)]
        return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    return least, largest


def _spread(images: Images, least: float, largest: float, output: tuple[float, float]) -> None:
    """Map [least, largest] to output, linearly, and clip; of both in one, output[1] is what lies above."""
    low, high = output
    if largest <= least:
        above = images > least
        images[...] = low
        images[above] = high
        return
    images -= least
    images /= largest - least
    if output != (0.0, 1.0):
        images *= high - low
        images += low
    np.clip(images, low, high, out=images)
