"""What all transforms have in common: how they are written down, and the checks of their arguments.

A transform is a frozen dataclass with a `name`; as JSON or TOML it is ``{"name": "rotate", "limit": 15.0, "p": 0.5}``, the name and what
differs from the defaults. Imports nothing heavy, since the trainer's side checks what it is given.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from catalog.errors import CatalogError, UsageError

Limit = float | tuple[float, float]


class TransformError(CatalogError):
    """A transform failed on a sample that is well: a user's function raised, or gave what cannot be fed. Ends the stream, flags nothing."""


@dataclass(frozen=True)
class Transform:
    """What every transform has. Subclasses check and normalise their fields in `check`.

    Attributes:
        p: The probability, 0 to 1, that it is applied to a sample.
    """

    name: ClassVar[str]
    geometric: ClassVar[bool] = False  # part of the one resampling

    p: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        self.replace("p", number(self, "p", 0, 1))
        self.check()

    def check(self) -> None:
        """Check the fields, and give them their one form (`replace`). Raises UsageError: ``limit=…: must be …``."""

    def replace(self, name: str, value: object) -> None:
        """Set a field of this frozen dataclass to its normalised value."""
        object.__setattr__(self, name, value)

    @property
    def statistics(self) -> tuple[str, ...]:
        """The statistics of the whole stream that it needs: "mean", "std", "min", "max", "p0.5" and so on; () for none."""
        return ()

    def to_json(self) -> dict[str, Any]:
        """Return the name and what differs from the defaults, so that a field added later changes no digest."""
        given = {one.name: getattr(self, one.name) for one in fields(self) if getattr(self, one.name) != one.default}
        return {"name": self.name, **{name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}}


def wrong(transform: Transform, name: str, must: str) -> UsageError:
    """Return the error of a field: ``limit=…: must be …``."""
    return UsageError(f"{name}={shortened(getattr(transform, name))}: must be {must}")


def shortened(value: object) -> str:
    """Return a value as an error shows it: one short line, whatever somebody passed."""
    try:
        text = repr(value)
    except Exception:  # a class of the user's, or an integer of more digits than Python prints
        text = f"a {type(value).__name__}"
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= 60 else text[:60] + "…"


def number(transform: Transform, name: str, low: float = -math.inf, high: float = math.inf, *, above: bool = False) -> float:
    """Return a field as a finite float within [low, high] (`above`: not low itself), or raise UsageError."""
    value = _float(getattr(transform, name))
    if value is None or not (low < value if above else low <= value) or value > high:
        raise wrong(transform, name, f"a number{_range(low, high, above)}")
    return value


def limits(transform: Transform, name: str, low: float = -math.inf, high: float = math.inf, *, above: bool = False) -> Limit:
    """Return a field as the limit that a value is drawn within: a number a (from -a to a), or (lowest, highest).

    Both ends lie within [low, high] (`above`: not at low). A pair (-a, a) is returned as a, so that one meaning has one form.
    """
    value = getattr(transform, name)
    must = f"a number, or (lowest, highest){_range(low, high, above)}"
    if isinstance(value, tuple | list):
        ends = [_float(one) for one in value]
        if len(ends) != 2 or ends[0] is None or ends[1] is None or ends[0] > ends[1]:
            raise wrong(transform, name, must)
        first, last = ends[0], ends[1]
    else:
        single = _float(value)
        if single is None or single < 0:
            raise wrong(transform, name, must)
        first, last = -single, single
    if not (low < first if above else low <= first) or last > high:
        raise wrong(transform, name, must)
    return last if first == -last else (first, last)


def pair(transform: Transform, name: str, low: float, high: float, *, above: bool = False) -> tuple[float, float]:
    """Return a field as (lowest, highest), both finite and within [low, high] (`above`: not low itself), or raise UsageError."""
    value = getattr(transform, name)
    ends = [_float(one) for one in value] if isinstance(value, tuple | list) else []
    if len(ends) != 2 or ends[0] is None or ends[1] is None or ends[0] > ends[1]:
        raise wrong(transform, name, f"(lowest, highest){_range(low, high, above)}")
    if not (low < ends[0] if above else low <= ends[0]) or ends[1] > high:
        raise wrong(transform, name, f"(lowest, highest){_range(low, high, above)}")
    return ends[0], ends[1]


def whole(transform: Transform, name: str, low: int, high: int) -> int:
    """Return a field as a whole number within [low, high], or raise UsageError."""
    value = getattr(transform, name)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not int or not low <= value <= high:
        raise wrong(transform, name, f"a whole number from {low} to {high}")
    return value


def choice(transform: Transform, name: str, allowed: tuple[str, ...]) -> str:
    """Return a field that is one of some words, or raise UsageError."""
    value = getattr(transform, name)
    if not isinstance(value, str) or value not in allowed:
        raise wrong(transform, name, f"one of {', '.join(map(repr, allowed))}")
    return value


def within(limit: Limit, drawn: float) -> float:
    """Return the value within a limit that `limits` returned, for what was drawn from [0, 1)."""
    low, high = limit if isinstance(limit, tuple) else (-limit, limit)
    return low + drawn * (high - low)


def _float(value: object) -> float | None:
    """Return a number as a finite float, None for anything else. True is no number; -0.0 becomes 0.0: one meaning, one form."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value) + 0.0
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def _range(low: float, high: float, above: bool) -> str:
    if math.isinf(low) and math.isinf(high):
        return ""
    if math.isinf(high):
        return f" {'above' if above else 'from'} {low:g}{'' if above else ' on'}"
    return f" above {low:g}, up to {high:g}" if above else f" from {low:g} to {high:g}"
