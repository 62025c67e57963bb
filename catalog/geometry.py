"""Patient millimetres ↔ pixels of an image, by its position, orientation and spacing (PS3.3 C.7.6.2.1.1); oblique planes as any other.

Positions are x, y, z in mm of the patient (towards left, back, head). `position` is where the centre of the first pixel lies,
`orientation` the direction of a row and then of a column, each a unit vector, `spacing` the distance of two rows and then of two columns
in mm. Pixels are x (column), y (row) with whole numbers at pixel centres: the convention ``centre`` of `catalog.contours`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

# Unit vectors written with three decimals are off by up to 0.0009 in length and 0.0018 in their product; a damaged one by far more.
MOST_SKEW = 2e-3
# Points that are nowhere further than this from a line (root mean square, mm) do not say which plane they lie in.
LEAST_WIDTH_MM = 0.01


def to_pixels(
    points: npt.ArrayLike, position: Sequence[float], orientation: Sequence[float], spacing: Sequence[float]
) -> tuple[FloatArray, FloatArray]:
    """Return where points of the patient fall on an image, seen along its normal.

    Args:
        points: (n, 3) mm.

    Returns:
        x, y in pixels, float64 (n, 2), and how far each point lies off the image's plane in mm, float64 (n,): positive along
        row direction × column direction. On the plane this is the exact inverse of `to_patient`, also where the two directions are
        slightly off a right angle.

    Raises:
        ValueError: If the points are not (n, 3), a number is not finite, a spacing is not positive, or the directions are not two unit
            vectors at a right angle, to 0.002. They are not repaired: which of them is wrong nobody can know.
    """
    given = np.asarray(points, np.float64)
    if given.ndim != 2 or given.shape[1] != 3 or not np.isfinite(given).all():
        raise ValueError("points must be (n, 3) and finite")
    origin, steps, normal = _axes(position, orientation, spacing)
    solved = np.linalg.solve(np.column_stack([steps, normal]), (given - origin).T).T
    return np.ascontiguousarray(solved[:, :2]), np.ascontiguousarray(solved[:, 2])


def to_patient(pixels: npt.ArrayLike, position: Sequence[float], orientation: Sequence[float], spacing: Sequence[float]) -> FloatArray:
    """Return where pixels x, y, (n, 2), of an image lie in the patient: float64 (n, 3) mm.

    Raises:
        ValueError: As `to_pixels`.
    """
    given = np.asarray(pixels, np.float64)
    if given.ndim != 2 or given.shape[1] != 2 or not np.isfinite(given).all():
        raise ValueError("pixels must be (n, 2) and finite")
    origin, steps, _ = _axes(position, orientation, spacing)
    return np.asarray(origin + given @ steps.T, np.float64)


def plane(points: FloatArray) -> tuple[FloatArray | None, float, float]:
    """Return the plane that fits points, (n, 3) mm, best in the sense of least squares.

    By least squares and not from the area that they enclose: in a contour that crosses itself areas cancel, and what is left of the
    normal is rounding.

    Returns:
        Its unit normal with the largest component positive, float64 (3,), or None where the points lie on a line; how wide they lie across
        their longest direction (root mean square); and how far the farthest is off the plane, 0 for no normal. Both in mm.
    """
    centred = points - points.mean(axis=0)
    squares, directions = np.linalg.eigh(centred.T @ centred / len(points))
    width = float(np.sqrt(max(squares[1], 0.0)))
    if width < LEAST_WIDTH_MM:
        return None, width, 0.0
    normal = directions[:, 0] * np.copysign(1.0, directions[np.argmax(np.abs(directions[:, 0])), 0])
    return normal, width, float(np.abs(centred @ normal).max())


def _axes(position: Sequence[float], orientation: Sequence[float], spacing: Sequence[float]) -> tuple[FloatArray, Any, Any]:
    """Return the first pixel's centre, the steps (3, 2) to the next column and the next row, and the unit normal."""
    origin, axes, step = (np.asarray(value, np.float64) for value in (position, orientation, spacing))
    if origin.shape != (3,) or axes.shape != (6,) or step.shape != (2,):
        raise ValueError("position, orientation and spacing must be 3, 6 and 2 numbers")
    if not (np.isfinite(origin).all() and np.isfinite(axes).all() and np.isfinite(step).all() and (step > 0).all()):
        raise ValueError("position and orientation must be finite, spacing positive")
    row, column = axes[:3], axes[3:]
    skew = max(abs(float(np.linalg.norm(row)) - 1.0), abs(float(np.linalg.norm(column)) - 1.0), abs(float(row @ column)))
    if skew > MOST_SKEW:
        raise ValueError(f"the directions of rows and columns are off unit vectors at a right angle by {skew:.3g}, over {MOST_SKEW}")
    normal = np.cross(row, column)
    # The first spacing is that between rows, so it goes with the direction of a column: PS3.3 10.7.1.3.
    return origin, np.column_stack([row * step[1], column * step[0]]), normal / np.linalg.norm(normal)
