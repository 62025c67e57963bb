"""Which rule's defects are planted how: the plantings register themselves here, by the rule's code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.planting import Ground, Points, Study

LEAST = 50  # defects and near misses of each rule


@dataclass(frozen=True)
class Planting:
    """How a rule's defects are planted, and how many studies of its own that takes: with defects, with near misses."""

    plant: Callable[[Ground], None]
    hearts: tuple[int, int]
    sides: tuple[int, int]
    stack: tuple[int, int]  # slices and phases of the side studies


PLANTINGS: dict[str, Planting] = {}


def plants(
    code: str, *, hearts: tuple[int, int] = (0, 0), sides: tuple[int, int] = (0, 0), stack: tuple[int, int] = (3, 2)
) -> Callable[[Callable[[Ground], None]], Callable[[Ground], None]]:
    """Register how a rule's defects are planted."""

    def register(plant: Callable[[Ground], None]) -> Callable[[Ground], None]:
        PLANTINGS[code] = Planting(plant, hearts, sides, stack)
        return plant

    return register


def each_side(
    code: str, wrong: Callable[[Ground, int, Study], None], right: Callable[[Ground, int, Study], None], **options: object
) -> None:
    """Register a rule one of whose defects, or near misses, lies in the middle of each of 50 and 50 side studies."""

    @plants(code, sides=(LEAST, LEAST), **options)  # type: ignore[arg-type]
    def plant(at: Ground) -> None:
        for bad, number, study in at.both():
            (wrong if bad else right)(at, number, study)
            at.mark(bad, study.middle)


def each_inner(code: str, change: Callable[[Ground, bool, int, Points], tuple[Points, ...]]) -> None:
    """Register a rule one of whose defects, or near misses, is the inner contour of each image of two hearts."""

    @plants(code, hearts=(1, 1))
    def plant(at: Ground) -> None:
        for bad, number, place, drawn in at.cells("inner"):
            at.redraw(place, drawn, *change(at, bad, number, drawn.points))
            at.mark(bad, (place, drawn))
