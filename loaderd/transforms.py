"""The transforms of a stream, ``transforms=[...]``: what there is, and the checks of what is given. `loaderd.warping` executes them.

Geometry comes first whatever its place in the list: all of it, in the list's order, is one resampling of image and masks, together
with the stream's ``size=`` and ``fit=``. The transforms of intensities (`loaderd.intensity`) follow, in the list's order.

What is drawn for a sample follows from the stream's seed, the epoch, the sample's key and the transform's place in the list, and from
nothing else: not from the worker, nor from the other transforms. Another `p` of one, or one more at the end, changes no other.

The centre of a pixel is at whole coordinates, that of the first at (0, 0); an image turns about its middle, ((rows - 1) / 2,
(columns - 1) / 2). Names and arguments are those of albumentations where it has them; a limit is how far from doing nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from catalog.errors import UsageError
from loaderd.arguments import Limit, Transform, TransformError, choice, limits, number, shortened, whole, within, wrong
from loaderd.intensity import (
    TRANSFORMS,
    Blur,
    Brightness,
    ChannelShift,
    Contrast,
    Gamma,
    MinMax,
    Noise,
    Percentile,
    Window,
    ZScore,
)
from loaderd.user import User

__all__ = [
    "Blur", "Brightness", "ChannelShift", "Contrast", "Crop", "Elastic", "Flip", "Gamma", "MinMax", "Noise", "Percentile", "Resample",
    "Rotate", "Scale", "Shear", "Shift", "Transform", "TransformError", "User", "Window", "ZScore",
    "build", "checked", "filling", "needs_statistics", "output_size",
]  # fmt: skip

FILLS = ("constant", "nearest", "reflect", "wrap")
LARGEST = 32_766  # rows or columns: OpenCV's warping counts in 16 bits

Matrix = NDArray[np.float64]  # (3, 3): (x, y, 1) after a transform → (x, y, 1) before it, in pixels


@dataclass(frozen=True)
class Geometric(Transform):
    """A transform of image and masks alike. All of a stream's are one resampling, and so have one `fill`.

    Attributes:
        fill: What lies outside of the image abc, in the words of SciPy and Keras: "constant" (kkk|abc|kkk), "nearest" (aaa|abc|ccc),
            "reflect" (cba|abc|cba), "wrap" (abc|abc|abc). Masks are continued as the image is, with False where that is a constant.
            None: as another transform of the stream says, else "constant".
        fill_value: The constant, in the image's units before normalisation. None: as another says, else 0.
    """

    geometric: ClassVar[bool] = True

    fill: str | None = field(default=None, kw_only=True)
    fill_value: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.fill is not None:
            choice(self, "fill", FILLS)
        if self.fill_value is not None:
            self.replace("fill_value", number(self, "fill_value"))
            if self.fill not in (None, "constant"):
                raise wrong(self, "fill_value", f"left out, since fill={self.fill!r} has no constant")
        super().__post_init__()


@dataclass(frozen=True)
class Affine(Geometric):
    """A geometric transform that is a matrix, and leaves the size as it is."""

    def matrix(self, generator: np.random.Generator, rows: int, columns: int) -> Matrix:
        """Return what was drawn for one sample."""
        raise NotImplementedError


@dataclass(frozen=True)
class Rotate(Affine):
    """Turns about the image's middle, counter-clockwise as one sees it.

    In pixels, as all geometry but Resample: where pixels are not square put Resample first.

    Attributes:
        limit: Degrees: a number a for -a to a, or (lowest, highest), drawn uniformly.
    """

    name: ClassVar[str] = "rotate"

    limit: Limit = 45.0

    def check(self) -> None:
        self.replace("limit", limits(self, "limit", -360, 360))

    def matrix(self, generator: np.random.Generator, rows: int, columns: int) -> Matrix:
        angle = math.radians(within(self.limit, generator.random()))
        turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        return _about_middle(turn, rows, columns)


@dataclass(frozen=True)
class Shift(Affine):
    """Moves to the right and down.

    Attributes:
        limit: Fractions of the width and of the height, each drawn for itself: a number a for -a to a, or (lowest, highest).
        limit_x: To the right, instead of `limit`.
        limit_y: Down, instead of `limit`.
    """

    name: ClassVar[str] = "shift"

    limit: Limit = 0.0625
    limit_x: Limit | None = None
    limit_y: Limit | None = None

    def check(self) -> None:
        self.replace("limit", limits(self, "limit", -1, 1))
        for name in ("limit_x", "limit_y"):
            if getattr(self, name) is not None:
                self.replace(name, limits(self, name, -1, 1))

    def matrix(self, generator: np.random.Generator, rows: int, columns: int) -> Matrix:
        right = within(self.limit if self.limit_x is None else self.limit_x, generator.random()) * columns
        down = within(self.limit if self.limit_y is None else self.limit_y, generator.random()) * rows
        return moved(-right, -down)


@dataclass(frozen=True)
class Scale(Affine):
    """Makes what is seen larger or smaller about the image's middle; the image's size stays.

    Attributes:
        limit: The factor is 1 + what is drawn: a number a for -a to a, or (lowest, highest); above 1 is larger.
    """

    name: ClassVar[str] = "scale"

    limit: Limit = 0.1

    def check(self) -> None:
        self.replace("limit", limits(self, "limit", -0.99, 99))

    def matrix(self, generator: np.random.Generator, rows: int, columns: int) -> Matrix:
        factor = 1 + within(self.limit, generator.random())
        return _about_middle(np.diag([1 / factor, 1 / factor]), rows, columns)


@dataclass(frozen=True)
class Shear(Affine):
    """Slants rows against each other, then columns; areas stay as they are.

    Attributes:
        limit: Degrees, for rows and for columns each drawn for itself: a number a for -a to a, or (lowest, highest).
    """

    name: ClassVar[str] = "shear"

    limit: Limit = 10.0

    def check(self) -> None:
        self.replace("limit", limits(self, "limit", -80, 80))

    def matrix(self, generator: np.random.Generator, rows: int, columns: int) -> Matrix:
        x, y = (math.tan(math.radians(within(self.limit, generator.random()))) for _ in range(2))
        # The inverse of [[1, 0], [y, 1]] @ [[1, x], [0, 1]], whose determinant is 1.
        return _about_middle(np.array([[1 + x * y, -x], [-y, 1.0]]), rows, columns)


@dataclass(frozen=True)
class Flip(Affine):
    """Mirrors. Always, so give a `p`; for either way or both at random put two into the list.

    Attributes:
        axis: "horizontal" changes left and right, "vertical" top and bottom.
    """

    name: ClassVar[str] = "flip"

    axis: str = "horizontal"

    def check(self) -> None:
        choice(self, "axis", ("horizontal", "vertical"))

    def matrix(self, generator: np.random.Generator, rows: int, columns: int) -> Matrix:
        x, y = (-1.0, 1.0) if self.axis == "horizontal" else (1.0, -1.0)
        return _about_middle(np.diag([x, y]), rows, columns)


@dataclass(frozen=True)
class Elastic(Geometric):
    """Moves each pixel by a smooth random field: noise in -1…1, blurred by a Gaussian, times alpha (Simard, Steinkraus and Platt, 2003).

    A pixel moves by about ``0.16 * alpha / sigma`` pixels in each direction (root mean square), less near the edges. Above about
    ``sigma ** 2`` alpha folds the image.

    Attributes:
        alpha: What the blurred noise is multiplied with, in pixels; 0 does nothing.
        sigma: The Gaussian's standard deviation, in pixels.
    """

    name: ClassVar[str] = "elastic"

    alpha: float = 34.0
    sigma: float = 4.0

    def check(self) -> None:
        self.replace("alpha", number(self, "alpha", 0, 1e6))
        self.replace("sigma", number(self, "sigma", 0.5, 1000))


@dataclass(frozen=True)
class Crop(Geometric):
    """Cuts out a window; an image too small for it is centred and filled up.

    Attributes:
        size: (rows, columns) of the window in pixels, or one number for both.
        at: "random": anywhere in the image; "center"; "mask": anywhere in the image where it holds the box around all masks.
        margin: With "mask": pixels around the box that the window holds as well. A box too large for the window is centred in it. Without
            a mask the window is in the centre.
    """

    name: ClassVar[str] = "crop"

    size: tuple[int, int] | int
    at: str = "random"
    margin: int = 0

    def check(self) -> None:
        must = f"one whole number from 1 to {LARGEST}, or (rows, columns)"
        given = self.size if isinstance(self.size, tuple | list) else (self.size, self.size)
        if len(given) != 2 or not all(type(one) is int and 1 <= one <= LARGEST for one in given):
            raise wrong(self, "size", must)
        self.replace("size", tuple(given))
        choice(self, "at", ("random", "center", "mask"))
        self.replace("margin", whole(self, "margin", 0, LARGEST))
        if self.margin and self.at != "mask":
            raise wrong(self, "margin", "left out unless at='mask'")

    @property
    def window(self) -> tuple[int, int]:
        """(rows, columns)."""
        assert isinstance(self.size, tuple)
        return self.size


@dataclass(frozen=True)
class Resample(Geometric):
    """Gives the image another distance between pixels, about its middle; its size in pixels changes with it, its extent does not.

    Rows and columns that were apart by different distances are then as asked for. It follows the size of the sample, so a Crop after it
    or the stream's ``size=`` must give all samples one.

    Attributes:
        spacing: Millimetres between rows and between columns: (rows, columns), or one number for both.
    """

    name: ClassVar[str] = "resample"

    spacing: tuple[float, float] | float

    def check(self) -> None:
        given = self.spacing if isinstance(self.spacing, tuple | list) else (self.spacing, self.spacing)
        if len(given) != 2 or not all(type(one) in (int, float) and 1e-4 <= one <= 1e4 for one in given):
            raise wrong(self, "spacing", "millimetres from 0.0001 to 10000, or (between rows, between columns)")
        self.replace("spacing", tuple(float(one) for one in given))

    @property
    def between(self) -> tuple[float, float]:
        """(mm between rows, mm between columns)."""
        assert isinstance(self.spacing, tuple)
        return self.spacing


def moved(x: float, y: float) -> Matrix:
    """Return a move: what lay at (x, y) comes to lie at (0, 0)."""
    return np.array([[1.0, 0.0, x], [0.0, 1.0, y], [0.0, 0.0, 1.0]])


def _about_middle(linear: NDArray[np.float64], rows: int, columns: int) -> Matrix:
    middle = np.array([(columns - 1) / 2, (rows - 1) / 2])
    found = np.eye(3)
    found[:2, :2] = linear
    found[:2, 2] = middle - linear @ middle
    return found


GEOMETRY: tuple[type[Transform], ...] = (Rotate, Shift, Scale, Shear, Flip, Elastic, Crop, Resample)
REGISTRY: dict[str, type[Transform]] = {one.name: one for one in (*GEOMETRY, *TRANSFORMS)}


def checked(given: object, size: tuple[int, int] | None = None) -> tuple[dict[str, Any], ...]:
    """Return transforms in their one form, as JSON: names and what differs from the defaults. What it returned it returns again.

    Args:
        given: A list of transforms, or of dicts as JSON or TOML have them.
        size: The stream's ``size=``, which makes up for transforms after which samples differ in size.

    Raises:
        UsageError: Where, what, and what it must be: ``transforms[2]: rotate: limit=…: must be …``.
    """
    if not isinstance(given, list | tuple):
        raise UsageError(f"transforms={shortened(given)}: must be a list, as in [{{'name': 'rotate', 'limit': 15}}]")
    found = [_one(one, f"transforms[{place}]") for place, one in enumerate(given)]
    filling(found)
    unknown = _sized(found)[1]
    if unknown is not None and size is None:
        raise UsageError(f"{unknown}: samples would differ in size after it; add a crop behind it, or size=(rows, columns)")
    return tuple(one.to_json() for one in found)


def build(given: Iterable[Mapping[str, Any]]) -> list[Transform]:
    """Return the transforms that `checked` gave the one form of."""
    return [_one(one, f"transforms[{place}]") for place, one in enumerate(given)]


def output_size(given: Sequence[Mapping[str, Any]], size: tuple[int, int] | None) -> tuple[int, int] | None:
    """Return (rows, columns) that every sample has in the end, whatever its own size; None: each as it came."""
    return size if size is not None else _sized(build(given))[0]


def needs_statistics(given: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return the statistics over the whole stream that they need, sorted; () if none."""
    return tuple(sorted({one for transform in build(given) for one in transform.statistics}))


def filling(transforms: Sequence[Transform]) -> tuple[str, float]:
    """Return the one (fill, fill_value) of all geometry. Raises UsageError if two transforms differ about it."""
    said: dict[str, tuple[str, Any]] = {}
    for place, transform in enumerate(transforms):
        where = f"transforms[{place}]: {transform.name}"
        for argument in ("fill", "fill_value"):
            value = getattr(transform, argument, None)
            if value is None:
                continue
            if argument in said and said[argument][1] != value:
                first, before = said[argument]
                raise UsageError(f"{where}: {argument}={value!r}: all geometry is one resampling, and {first} says {before!r}; say it once")
            said.setdefault(argument, (where, value))
    fill, constant = said.get("fill"), said.get("fill_value")
    if fill is not None and constant is not None and fill[1] != "constant":
        raise UsageError(f"{constant[0]}: fill_value={constant[1]!r}: {fill[0]} says fill={fill[1]!r}, which has no constant; leave it out")
    return "constant" if fill is None else fill[1], 0.0 if constant is None else constant[1]


def _one(given: object, where: str) -> Transform:
    if type(given) in REGISTRY.values():
        assert isinstance(given, Transform)
        return given
    if not isinstance(given, Mapping):
        raise UsageError(f"{where}: {shortened(given)}: must be a transform, as {{'name': 'rotate', 'limit': 15}}")
    name = given.get("name")
    kind = REGISTRY.get(name) if isinstance(name, str) else None
    if kind is None:
        raise UsageError(f"{where}: name={shortened(name)}: there is none of this name; there are {', '.join(REGISTRY)}")
    arguments = {key: value for key, value in given.items() if key != "name"}
    allowed = {one.name: one for one in fields(kind)}
    for key in arguments:
        if key not in allowed:
            raise UsageError(f"{where}: {name}: {shortened(key)} is none of its arguments; there are {', '.join(allowed)}")
    for key, one in allowed.items():
        if key not in arguments and one.default is MISSING:
            raise UsageError(f"{where}: {name}: {key} is missing")
    try:
        return kind(**arguments)
    except UsageError as error:
        raise UsageError(f"{where}: {name}: {error}") from error


def _sized(transforms: Sequence[Transform]) -> tuple[tuple[int, int] | None, str | None]:
    """Return (the size of all samples or None: as they came, the transform after which they differ or None)."""
    known: tuple[int, int] | None = None
    unknown: str | None = None
    for place, one in enumerate(transforms):
        if one.p == 0:
            continue
        if isinstance(one, Crop) and one.p == 1:
            known, unknown = one.window, None
        elif isinstance(one, Resample) or (isinstance(one, Crop) and (unknown is not None or known != one.window)):
            known, unknown = None, f"transforms[{place}]: {one.name}"
    return known, unknown
