"""One resampling of image and masks: what geometry was drawn for a sample, composed, and carried out by OpenCV.

The map goes from the output's pixels back to the input's: affine matrices multiplied in the order of the transforms, crops and sizes as
offsets and scales in them, elastic fields added where they stand. So a chain of ten blurs no more than one does, and turning there and
back is the identity. A map that only mirrors, or moves by whole pixels, copies: no value changes, in any dtype.

Images are interpolated linearly. Where the map shrinks, a pixel is the mean of samples spread over it, as many along each axis as the
factor says. OpenCV 5 interpolates float32 as SciPy does, to 0.00006 standard deviations of white noise, and is 30 times faster. It
takes float64 at 1/32 of a pixel (0.1 standard deviations off), as version 4 did with all: so float64 images are interpolated as float32.

Masks by coverage: interpolated as the image is, and True from a half on. Against the rasters of polygons that were turned themselves
Dice is 0.986 where the nearest pixel gives 0.980 (radius 12; 0.994 and 0.992 at 30), and the areas agree to 0.5 % both ways. A pixel
covered by exactly a half (a move by half a pixel) is in at a left or top edge and out at a right or bottom one, as
`catalog.contours.rasterise` has it: else areas would grow by 4 %, and by 5 % where an image is halved. A mask of a pixel or two may vanish.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from catalog.errors import FileError
from loaderd.transforms import LARGEST, Matrix, moved

Plane = NDArray[Any]  # (rows, columns)
Points = NDArray[np.float64]  # (2, n): x, y
HALF_OPEN = 1 / 1024  # of a pixel: masks are looked at so far right and below, which decides ties; 60 times OpenCV's rounding
EXACT = 1e-9  # of a pixel
NODES = 2  # of an elastic field to a sigma
MILD = 0.25  # a map that shrinks by up to 1.25 is interpolated: linear interpolation blurs as much


class Resampling:
    """The map of one sample, made by appending what comes next; `rows` and `columns` are the output's so far.

    Args:
        cv2: OpenCV.
        rows: The input's.
        columns: The input's.
    """

    def __init__(self, cv2: Any, rows: int, columns: int) -> None:
        self.rows, self.columns = rows, columns
        self._cv2 = cv2
        self._input = rows, columns
        self._matrix: Matrix = np.eye(3)  # of what came after the last field
        # The matrix before a field, the field (2, rows, columns): x, y in pixels, and the pixels between its nodes.
        self._fields: list[tuple[Matrix, NDArray[np.float32], int]] = []
        self._sampled: tuple[tuple[int, int], Matrix, tuple[NDArray[np.float32], NDArray[np.float32]] | None] | None = None

    def follow(self, matrix: Matrix) -> None:
        """Append an affine transform."""
        self._matrix = self._matrix @ matrix

    def bend(self, alpha: float, sigma: float, generator: np.random.Generator) -> None:
        """Append an elastic field.

        The noise is drawn on nodes, two to a sigma, and what they move is interpolated between them: the field is as strong as one drawn
        for each pixel, and as steep, to 2 %, and costs up to (sigma / 2) ** 2 times less.
        """
        if max(self.rows, self.columns) > LARGEST:
            raise FileError("too-large", f"is {self.rows}×{self.columns} where an elastic field takes up to {LARGEST}×{LARGEST} pixels")
        step = max(1, math.floor(sigma / NODES))
        shape = (2, -(-(self.rows - 1) // step) + 1, -(-(self.columns - 1) // step) + 1)
        noise = generator.random(shape, np.float32)
        noise -= np.float32(0.5)
        noise *= np.float32(2 * alpha / step)  # the mean of step² values varies by 1 / step
        for field in noise:
            self._cv2.GaussianBlur(field, (0, 0), sigma / step, dst=field, borderType=self._cv2.BORDER_CONSTANT)
        self._fields.append((self._matrix, noise, step))
        self._matrix = np.eye(3)

    def cut(self, rows: int, columns: int, top: int | None = None, left: int | None = None) -> None:
        """Append a window; None or a side too short for it: in the centre."""
        if top is None or rows > self.rows:
            top = _centred(self.rows, rows)
        if left is None or columns > self.columns:
            left = _centred(self.columns, columns)
        self.follow(moved(left, top))
        self.rows, self.columns = rows, columns

    def stretch(self, down: float, right: float, rows: int | None = None, columns: int | None = None) -> None:
        """Append a change of the distances between rows and columns by factors, about the middle; the size follows unless it is given."""
        rows = max(1, round(self.rows / down)) if rows is None else rows
        columns = max(1, round(self.columns / right)) if columns is None else columns
        matrix = np.diag([right, down, 1.0])
        matrix[:2, 2] = (self.columns - 1 - right * (columns - 1)) / 2, (self.rows - 1 - down * (rows - 1)) / 2
        self.follow(matrix)
        self.rows, self.columns = rows, columns

    def box(self, masks: NDArray[np.bool_]) -> tuple[float, float, float, float] | None:
        """Return (left, top, right, bottom) of what is True in any of (K, rows, columns), as it lies in the output so far."""
        seen: NDArray[np.bool_] = np.any(masks, axis=0)
        y = np.flatnonzero(np.any(seen, axis=1))
        if y.size == 0:
            return None
        # Each row's first and last pixel: the corners of the mask's hull are among them.
        first, last = seen[y].argmax(axis=1), seen.shape[1] - 1 - seen[y, ::-1].argmax(axis=1)
        points: Points = np.stack([np.concatenate([first, last]), np.concatenate([y, y])]).astype(np.float64)
        for matrix, field, step in self._fields:
            points = _mapped(np.linalg.inv(matrix), points)
            start = points
            for _ in range(8):  # a field that does not fold shortens the error each time
                points = start - self._displacement(field, step, points)
        points = _mapped(np.linalg.inv(self._matrix), points)
        (left, top), (right, bottom) = points.min(axis=1), points.max(axis=1)
        if right < 0 or bottom < 0 or left > self.columns - 1 or top > self.rows - 1:
            return None
        return max(left, 0.0), max(top, 0.0), min(right, self.columns - 1.0), min(bottom, self.rows - 1.0)

    def whole(self) -> tuple[int, int, int, int] | None:
        """Return (row, column) of the input at the output's (0, 0) and the steps down and right, 1 or -1; None if it must interpolate."""
        (xx, xy, x), (yx, yy, y), _ = self._matrix.tolist()
        # Over the whole output the map stays within EXACT of the rounded one.
        slack = EXACT / max(self.rows, self.columns)
        straight = abs(xy) < slack and abs(yx) < slack and abs(abs(xx) - 1) < slack and abs(abs(yy) - 1) < slack
        if self._fields or not straight or abs(x - round(x)) > EXACT or abs(y - round(y)) > EXACT:
            return None
        return round(y), round(x), round(yy), round(xx)

    def warp(self, planes: NDArray[Any], border: int, constant: float, shift: float = 0.0) -> NDArray[np.float32]:
        """Return planes (n, rows, columns) as the map says: (n, output's rows, columns) float32, a new array. Then nothing may be appended.

        Args:
            planes: Of any dtype that becomes float32.
            border: OpenCV's word for what lies outside.
            constant: What lies outside, with BORDER_CONSTANT.
            shift: How far right and below of each place to look, in pixels.

        Raises:
            FileError: ``too-large``: OpenCV takes up to 32,766 rows or columns.
        """
        cv2 = self._cv2
        if max(*self._input, self.rows, self.columns) > LARGEST:
            sizes = f"{self._input[0]}×{self._input[1]}, to become {self.rows}×{self.columns}"
            raise FileError("too-large", f"has {sizes} pixels, and OpenCV interpolates up to {LARGEST}×{LARGEST}")
        if self._sampled is None:
            self._sampled = self._sample()
        (down, right), matrix, places = self._sampled
        size = (self.columns * right, self.rows * down)
        options = {"borderMode": border, "borderValue": constant}
        if places is not None:
            x, y = places if shift == 0 else (places[0] + np.float32(shift), places[1] + np.float32(shift))
        else:
            matrix = moved(shift, shift) @ matrix
        out = np.empty((len(planes), self.rows, self.columns), np.float32)
        for plane, result in zip(planes, out, strict=True):
            values = plane.astype(np.float32, copy=False)
            if places is not None:
                dense = cv2.remap(values, x, y, cv2.INTER_LINEAR, **options)
            else:
                dense = cv2.warpAffine(values, matrix[:2], size, flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, **options)
            result[...] = dense if (down, right) == (1, 1) else cv2.resize(dense, (self.columns, self.rows), interpolation=cv2.INTER_AREA)
        return out

    def _sample(self) -> tuple[tuple[int, int], Matrix, tuple[NDArray[np.float32], NDArray[np.float32]] | None]:
        """Return how many samples to take down and across a pixel, their matrix and, with fields, their x and y in the input."""
        down, right = self._samples()
        matrix = self._matrix @ np.array([[1 / right, 0, (1 / right - 1) / 2], [0, 1 / down, (1 / down - 1) / 2], [0, 0, 1]])
        return (down, right), matrix, self._places(matrix, (self.columns * right, self.rows * down)) if self._fields else None

    def _samples(self) -> tuple[int, int]:
        total = np.eye(3)
        for matrix, _, _ in self._fields:
            total = total @ matrix
        total = total @ self._matrix
        right, down = (math.hypot(total[0, axis], total[1, axis]) for axis in range(2))
        return (
            max(1, min(math.ceil(down - MILD), LARGEST // self.rows)),
            max(1, min(math.ceil(right - MILD), LARGEST // self.columns)),
        )

    def _places(self, matrix: Matrix, size: tuple[int, int]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return x and y in the input of each pixel of an output of (columns, rows): twice (rows, columns)."""
        cv2 = self._cv2
        columns, rows = np.arange(size[0], dtype=np.float32), np.arange(size[1], dtype=np.float32)[:, None]
        (xx, xy, x0), (yx, yy, y0) = matrix[:2].astype(np.float32)
        x, y = (xx * columns + x0) + xy * rows, yx * columns + (yy * rows + y0)
        for place, (before, field, step) in enumerate(reversed(self._fields)):
            if place == 0:  # seen through a matrix alone
                to_nodes = (np.diag([1 / step, 1 / step, 1.0]) @ matrix)[:2]
                flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
                added = [cv2.warpAffine(one, to_nodes, size, flags=flags, borderMode=cv2.BORDER_REPLICATE) for one in field]
            else:
                at = x / np.float32(step), y / np.float32(step)
                added = [cv2.remap(one, *at, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE) for one in field]
            x += added[0]
            y += added[1]
            if not np.array_equal(before, np.eye(3)):
                (xx, xy, x0), (yx, yy, y0) = before[:2].astype(np.float32)
                x, y = xx * x + xy * y + x0, yx * x + yy * y + y0
        return x, y

    def _displacement(self, field: NDArray[np.float32], step: int, points: Points) -> Points:
        """Return what a field adds at points (2, n)."""
        x, y = (points / step).astype(np.float32).reshape(2, 2, -1)  # two rows, as one could be too long
        found = [self._cv2.remap(one, x, y, self._cv2.INTER_LINEAR, borderMode=self._cv2.BORDER_REPLICATE) for one in field]
        return np.stack(found).reshape(2, -1).astype(np.float64)


def _centred(length: int, window: int) -> int:
    """Return where a window begins whose middle is that of a line; the odd pixel is cut off, or filled up, behind."""
    return (length - window) // 2 if window <= length else -((window - length) // 2)


def _mapped(matrix: NDArray[np.floating[Any]], points: Points) -> Points:
    return np.asarray(matrix[:2, :2] @ points + matrix[:2, 2:], np.float64)
