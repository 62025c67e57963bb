"""What a stream's transforms do to one sample, in a worker. Needs OpenCV (the extra `transforms`).

First the geometry, which `loaderd.resampling` carries out at once for image and masks, then the intensities one by one.
Each transform has its own random numbers: Philox with the key (seed, epoch) and the counter (0, place in the list, sample_key), so a
draw is the same on any worker, in any order of samples, after any crash. Its first number decides about `p`, whatever `p` is.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from catalog.errors import FileError, UsageError
from loaderd.resampling import EXACT, HALF_OPEN, Resampling
from loaderd.transforms import Affine, Crop, Elastic, Resample, build, filling

FITS = ("crop", "pad", "resize")
KEPT = 128 << 20  # bytes that may stay free; a quarter is the most that glibc takes for one block
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


@functools.cache
def opencv() -> Any:
    """Return OpenCV, and set this process up for it. Raises UsageError where it is not there, or too old.

    One thread, since the workers are the parallelism. And memory that is freed stays for the next sample: by default glibc gives blocks of
    an image's size back to the system each time, and taking them again, page by page, made an elastic field 2.3 times as slow.
    """
    remedy = "pip install 'scanfeed[transforms]'"
    try:
        import cv2
    except ImportError as error:
        raise UsageError(f"transforms need OpenCV; {remedy}") from error
    if int(cv2.__version__.split(".")[0]) < 5:
        raise UsageError(f"transforms need OpenCV 5: {cv2.__version__} rounds places to 1/32 of a pixel; {remedy}")
    cv2.setNumThreads(1)
    with contextlib.suppress(AttributeError):  # another libc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, KEPT // 4)
        mallopt(M_TRIM_THRESHOLD, KEPT)
    return cv2


class Pipeline:
    """The transforms of one stream, for one worker; not for several threads at once.

    Args:
        transforms: As `loaderd.transforms.checked` returned them.
        seed: The stream's; its 64 bits.
        size: (rows, columns) of all samples in the end, or None: what the transforms make of each sample's own size.
        fit: How a sample of another size comes to `size`. "crop": the scale stays; what is too large is cut off evenly, what is too
            small is filled up evenly. "pad": nothing is cut off; what is too large is shrunk in proportion, then filled up evenly.
            "resize": stretched.
        statistics: What `loaderd.transforms.needs_statistics` named, over the stream.

    Raises:
        UsageError: OpenCV is not there; `fit` is none.
        TransformError: A user's function cannot be imported.
    """

    def __init__(
        self,
        transforms: Sequence[Mapping[str, Any]],
        *,
        seed: int,
        size: tuple[int, int] | None,
        fit: str,
        statistics: Mapping[str, float] | None,
    ) -> None:
        self._cv2 = opencv()
        if fit not in FITS:
            raise UsageError(f"fit={fit!r}: must be one of {', '.join(map(repr, FITS))}")
        self._size, self._fit = size, fit
        self._statistics = None if statistics is None else dict(statistics)
        built = build(transforms)
        self._geometry: list[tuple[int, Any]] = [(place, one) for place, one in enumerate(built) if one.geometric]
        self._intensities: list[tuple[int, Any]] = [(place, one) for place, one in enumerate(built) if not one.geometric]
        for _, one in self._intensities:
            if hasattr(one, "resolve"):
                one.resolve()
        self._fill, self._fill_value = filling(built)
        self._border: int = {
            "constant": self._cv2.BORDER_CONSTANT, "nearest": self._cv2.BORDER_REPLICATE,
            "reflect": self._cv2.BORDER_REFLECT, "wrap": self._cv2.BORDER_WRAP,
        }[self._fill]  # fmt: skip
        self._philox = np.random.Philox(0)
        self._generator = np.random.Generator(self._philox)
        self._state: Any = self._philox.state  # with no numbers left over of a block
        self._state["state"] = {"key": np.array([seed & (2**64 - 1), 0], np.uint64), "counter": np.zeros(4, np.uint64)}

    def __call__(
        self,
        images: NDArray[Any],
        masks: NDArray[np.bool_],
        *,
        key: bytes,
        epoch: int,
        spacing: tuple[float, float] | None,
        out_images: NDArray[Any],
        out_masks: NDArray[np.bool_],
    ) -> None:
        """Transform one sample into its place in a slot.

        Args:
            images: (C, rows, columns) float32 or float64.
            masks: (K, rows, columns), K may be 0.
            key: The 16 bytes of its sample_key.
            epoch: From 0.
            spacing: (mm between rows, mm between columns), if known.
            out_images: (C, H, W) of any float dtype and strides; shares no memory with `images`.
            out_masks: (K, H, W).

        Raises:
            FileError: The sample cannot be transformed: ``no-spacing`` for Resample, ``too-large`` for OpenCV's 32,766 rows or columns.
            TransformError: A user's function failed.
            ValueError: The output is of another shape than the transforms make of the sample.
        """
        self._state["state"]["key"][1] = epoch
        self._state["state"]["counter"][2:] = np.frombuffer(key, ">u8")
        drawn = self._draw(images.shape[1], images.shape[2], masks, spacing)
        for planes, out in ((images, out_images), (masks, out_masks)):
            if out.shape != (len(planes), drawn.rows, drawn.columns):
                raise ValueError(f"the transforms make {len(planes)}×{drawn.rows}×{drawn.columns} of a sample, and its room is {out.shape}")
        # The intensities need contiguous numbers of 32 or 64 bits.
        direct = not self._intensities or (out_images.flags.c_contiguous and out_images.dtype in (np.float32, np.float64))
        work = out_images if direct else np.empty(out_images.shape, np.float32)
        self._resample(images, masks, drawn, work, out_masks)
        for place, transform in self._intensities:
            generator = self._drawing(place)
            if generator.random() < transform.p:
                transform.apply(work, out_masks, generator, self._statistics)
        if not direct:
            out_images[...] = work

    def _drawing(self, place: int) -> np.random.Generator:
        """Return the generator, set to where the numbers of one transform begin (2 µs; a new one would take 12)."""
        self._state["state"]["counter"][:2] = 0, place
        self._philox.state = self._state
        return self._generator

    def _draw(self, rows: int, columns: int, masks: NDArray[np.bool_], spacing: tuple[float, float] | None) -> Resampling:
        drawn = Resampling(self._cv2, rows, columns)
        for place, transform in self._geometry:
            generator = self._drawing(place)
            if generator.random() >= transform.p:
                continue
            if isinstance(transform, Affine):
                drawn.follow(transform.matrix(generator, drawn.rows, drawn.columns))
            elif isinstance(transform, Elastic):
                if transform.alpha > 0:
                    drawn.bend(transform.alpha, transform.sigma, generator)
            elif isinstance(transform, Crop):
                _crop(transform, drawn, masks, generator)
            elif isinstance(transform, Resample):
                if spacing is None or not all(0 < one < math.inf for one in spacing):
                    raise FileError("no-spacing", "has no known distance between its pixels, so it cannot be resampled to one")
                drawn.stretch(transform.between[0] / spacing[0], transform.between[1] / spacing[1])
                spacing = transform.between
        if self._size is not None:
            rows, columns = self._size
            down, right = drawn.rows / rows, drawn.columns / columns
            if self._fit == "resize":
                drawn.stretch(down, right, rows, columns)
            elif self._fit == "pad" and max(down, right) > 1:
                drawn.stretch(max(down, right), max(down, right), rows, columns)
            else:
                drawn.cut(rows, columns)
        return drawn

    def _resample(
        self, images: NDArray[Any], masks: NDArray[np.bool_], drawn: Resampling, out_images: NDArray[Any], out_masks: NDArray[np.bool_]
    ) -> None:
        whole = drawn.whole()
        if whole is not None:
            _copy(images, whole, self._fill, self._fill_value, out_images)
            _copy(masks, whole, self._fill, False, out_masks)
            return
        out_images[...] = drawn.warp(images, self._border, self._fill_value)
        if len(masks):
            np.greater_equal(drawn.warp(masks, self._border, 0.0, HALF_OPEN), np.float32(0.5), out=out_masks)


def _crop(crop: Crop, drawn: Resampling, masks: NDArray[np.bool_], generator: np.random.Generator) -> None:
    rows, columns = crop.window
    down, right = generator.random(), generator.random()
    if crop.at == "random":
        drawn.cut(rows, columns, math.floor(down * (drawn.rows - rows + 1)), math.floor(right * (drawn.columns - columns + 1)))
        return
    box = drawn.box(masks) if crop.at == "mask" else None
    if box is None:
        drawn.cut(rows, columns)
        return
    top = _window(box[1], box[3], crop.margin, rows, drawn.rows, down)
    drawn.cut(rows, columns, top, _window(box[0], box[2], crop.margin, columns, drawn.columns, right))


def _window(low: float, high: float, margin: int, window: int, length: int, drawn: float) -> int:
    """Return where a window begins in a line of pixels, drawn from where it holds [low - margin, high + margin]; inside the line."""
    first, last = math.ceil(high + margin - (window - 1) - EXACT), math.floor(low - margin + EXACT)
    if first > last:
        first = last = round((low + high - (window - 1)) / 2)
    first, last = (max(0, min(one, length - window)) for one in (first, last))
    return first + math.floor(drawn * (last - first + 1))


def _copy(planes: NDArray[Any], whole: tuple[int, int, int, int], fill: str, constant: float, out: NDArray[Any]) -> None:
    """Copy planes (n, rows, columns) whose pixels keep their values; `whole` as `Resampling.whole` returns it."""
    down, right = (_along(planes.shape[1 + axis], out.shape[1 + axis], whole[axis], whole[2 + axis], fill) for axis in range(2))
    if isinstance(down, tuple) and isinstance(right, tuple):
        if out[:, down[0], right[0]].shape != out.shape:
            out[...] = constant
        out[:, down[0], right[0]] = planes[:, down[1], right[1]]
        return
    rows, columns = (
        np.arange(length)[one[1]] if isinstance(one, tuple) else one for length, one in zip(planes.shape[1:], (down, right), strict=True)
    )
    out[...] = planes[:, rows[:, None], columns]


def _along(length: int, out: int, first: int, step: int, fill: str) -> tuple[slice, slice] | NDArray[np.intp]:
    """Return which of the output's rows (or columns) are which of the input's; where some are continued, the input's number of each."""
    at = first + step * np.arange(out)
    if fill == "constant" or (0 <= at[0] < length and 0 <= at[-1] < length):
        inside = np.flatnonzero((at >= 0) & (at < length))
        if inside.size == 0:
            return slice(0), slice(0)
        low, high = int(inside[0]), int(inside[-1])
        end = int(at[high]) + step
        return slice(low, high + 1), slice(int(at[low]), None if end < 0 else end, step)
    if fill == "nearest":
        return at.clip(0, length - 1)
    if fill == "wrap":
        return at % length
    at %= 2 * length
    return np.minimum(at, 2 * length - 1 - at)
