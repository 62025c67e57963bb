"""Plantings for the rules about what lies inside what, neighbours, repeated polygons and shifts: see tests/test_planted.py."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tests.planted_contours import Mask, centre, compass, filled, most, scaled
from tests.planting import CYCLE_MS, DISTANCE, PHASES, SPACING, Ground, Place, Points, Study, fit
from tests.plantings import LEAST, plants

# ------------------------------------------------------------------------------------------ relations


@plants("RELATION-LARGER", hearts=(1, 1))
def larger(at: Ground) -> None:
    """Inner and outer contour are exchanged; near: the inner one was saved as both."""
    for bad, _, place, inner in at.cells("inner"):
        assert place.outer is not None
        within, around = inner.rings, place.outer.rings
        at.redraw(place, place.outer, *within)
        if bad:
            at.redraw(place, inner, *around)
        at.mark(bad, (place, inner), (place, place.outer))


@plants("RELATION-OUTSIDE", hearts=(1, 1))
def not_inside(at: Ground) -> None:
    """The inner contour is moved out through the wall; near: as far as the slack allows."""
    slack = at.limit("slack")
    for bad, k, place, inner in at.cells("inner"):
        assert place.outer is not None
        around, points, way = filled(place.outer.rings), inner.points, compass(k)

        def share(step: float, points: Points = points, way: Points = way, around: Mask = around) -> float:
            mask = filled([points + step * way])
            return float((mask & ~around).sum() / mask.sum())

        step = most(share, slack, 30.0)
        if bad:
            step = next(step + more for more in np.arange(0.25, 30, 0.25) if share(step + more) > slack * (1.05 + k % 5))
        at.redraw(place, inner, points + step * way)
        at.mark(bad, (place, inner), (place, place.outer))


@plants("RELATION-ALONE", hearts=(2, 1))
def alone(at: Ground) -> None:
    """On half the images of a series one of the two is gone; near: the reader never drew outer contours."""
    for bad, k, place, inner in at.cells("inner", lambda place: True):
        assert place.outer is not None
        if not bad:
            at.unpair(place.study, place.outer)
            at.mark(False, (place, inner))
        elif (place.slice + place.phase) % 2:
            gone, left = (inner, place.outer) if k % 3 else (place.outer, inner)
            if k % 2:
                at.set("pairing", gone.pairing, state="rejected")
            else:
                at.unpair(place.study, gone)
            at.mark(True, (place, left))


def spread(place: Place) -> bool:
    """Images far enough from each other that all neighbours of one are as they were."""
    return place.slice in (1, 4, 7) and place.phase in (0, 3)


SPREAD = 6  # of them in a heart; with both structures 60 in five


def neighbours(study: Study, place: Place, structure: str) -> Iterator[tuple[Points, float, float]]:
    """Yield outline, mm and ms away of the same structure on the next slices and in the next phases."""
    for slices, phases in ((-1, 0), (1, 0), (0, -1), (0, 1)):
        other = study.places.get((place.slice + slices, place.phase + phases))
        if other is not None:
            drawn = getattr(other, structure)
            yield drawn.points, abs(slices) * DISTANCE, abs(phases) * CYCLE_MS / PHASES


def of_hearts(at: Ground) -> Iterator[tuple[bool, int, Study, Place, str]]:
    for bad, studies in ((True, at.bad), (False, at.near)):
        cells = [(study, place, structure) for study in studies for place in study if spread(place) for structure in ("inner", "outer")]
        for number, cell in enumerate(cells):
            yield bad, number, *cell


def radius_mm(points: Points) -> float:
    return float(np.sqrt(filled([points]).sum() * SPACING**2 / np.pi))


def change(at: Ground, bad: bool, place: Place, structure: str, points: Points) -> None:
    drawn = getattr(place, structure)
    at.redraw(place, drawn, points)
    at.mark(bad, (place, drawn))


@plants("AREA-JUMP", hearts=(5, 5))
def area_jump(at: Ground) -> None:
    """A contour of another size, as of a file with another spacing; near: as large as all its neighbours allow."""
    for bad, k, study, place, structure in of_hearts(at):
        points = getattr(place, structure).points
        around = [
            (radius_mm(other), at.limit("least_mm") + at.limit("per_mm") * mm + at.limit("per_ms") * ms)
            for other, mm, ms in neighbours(study, place, structure)
        ]
        wide = [radius + allowed for radius, allowed in around]
        radius = max(wide) * (1.02 + k % 5 / 10) if bad else min(wide) * 0.985
        change(at, bad, place, structure, scaled(points, radius / radius_mm(points)))


@plants("AREA-OUTLIER", hearts=(5, 5))
def area_outlier(at: Ground) -> None:
    """A contour larger or smaller than those before and after; near: within what both pairs of neighbours allow."""
    for bad, k, study, place, structure in of_hearts(at):
        points = getattr(place, structure).points
        radii = [radius_mm(other) for other, _, _ in neighbours(study, place, structure)]
        couples = [radii[:2], *([radii[2:]] if len(radii) == 4 else [])]
        beyond = [max(at.limit("least_mm"), at.limit("share") * sum(pair) / 2) for pair in couples]
        larger = [max(pair) + more for pair, more in zip(couples, beyond, strict=True)]
        smaller = [min(pair) - more for pair, more in zip(couples, beyond, strict=True)]
        if k % 2 and min(smaller) > 2:
            radius = min(smaller) * (0.95 - k % 5 / 20) if bad else max(smaller) * 1.03
        else:
            radius = max(larger) * (1.03 + k % 5 / 10) if bad else min(larger) * 0.97
        change(at, bad, place, structure, scaled(points, radius / radius_mm(points)))


@plants("CENTROID-JUMP", hearts=(5, 5))
def centroid_jump(at: Ground) -> None:
    """A contour that lies beside its neighbours; near: as far as all of them allow."""
    for bad, k, study, place, structure in of_hearts(at):
        points, way = getattr(place, structure).points, compass(k)

        own = radius_mm(points)
        around = [
            (
                centre(other),
                max(
                    at.limit("furthest_mm") + at.limit("per_mm") * mm + at.limit("per_ms") * ms,
                    at.limit("radii") * max(radius_mm(other), own),
                ),
            )
            for other, mm, ms in neighbours(study, place, structure)
        ]

        def away(step: float, points: Points = points, way: Points = way, around: list[tuple[Points, float]] = around,
                 all_of_them: bool = bad) -> float:  # fmt: skip
            here = centre(points + step * way)
            ratios = [float(np.hypot(*(here - there))) * SPACING / allowed for there, allowed in around]
            return min(ratios) if all_of_them else max(ratios)

        change(at, bad, place, structure, points + way * (most(away, 1.03 + k % 5 / 10, 60) if bad else most(away, 0.98, 60)))


@plants("CENTROID-FAR", hearts=(5, 5))
def centroid_far(at: Ground) -> None:
    """A contour at the other side of the chest; near: as far off as allowed."""
    for bad, k, study, place, structure in of_hearts(at):
        points, way = getattr(place, structure).points, compass(k)
        every = [getattr(one, structure).points for one in study]
        middle = np.median([centre(one) for one in every], axis=0)
        allowed = max(at.limit("furthest_mm"), at.limit("radii") * float(np.median([radius_mm(one) for one in every]))) / SPACING

        def away(step: float, points: Points = points, way: Points = way, middle: Points = middle) -> float:
            return float(np.hypot(*(centre(points + step * way) - middle)))

        change(at, bad, place, structure, points + way * most(away, allowed * (1.05 if bad else 0.97), 90))


@plants("OVERLAP-NONE", hearts=(5, 5))
def no_overlap(at: Ground) -> None:
    """A contour that has nothing in common with the slices above and below; near: a few pixels."""
    for bad, k, study, place, structure in of_hearts(at):
        points, way = getattr(place, structure).points, compass(k)
        others = [filled([other]) for other, mm, _ in neighbours(study, place, structure) if mm]

        def apart(step: float, points: Points = points, way: Points = way, others: list[Mask] = others, bad: bool = bad) -> float:
            mask = filled([points + step * way])
            shared = [int((mask & other).sum()) for other in others]
            return -float(max(shared) if bad else min(shared))

        step = most(apart, -1.0, 60)  # the furthest at which a pixel is shared: with any, or with each of them
        change(at, bad, place, structure, points + way * (step + 1.5 + k % 4 if bad else step))


@plants("POLYGON-REPEATED", hearts=(4, 2))
def repeated(at: Ground) -> None:
    """A contour was saved for another image or patient too: an error there, an info where it was drawn. Where nothing but the two is
    drawn, both are errors. Near: half a pixel beside, one point moved, rectangles."""
    one, other, *few = at.bad
    for k, place in enumerate(place for place in one if place.slice < 5):
        # To the far end of the same stack, or to another patient.
        target = one.places[9, (place.phase + 2) % PHASES] if place.slice < 1 else other.places[place.slice, place.phase]
        source, drawn = (place.inner, target.inner) if k % 2 or place.slice < 1 else (place.outer, target.outer)
        assert source is not None
        assert drawn is not None
        rings = (
            [np.roll(source.points, k, axis=0)[:: -1 if k % 3 else 1]] if (source.points[0] != source.points[-1]).any() else source.rings
        )
        at.redraw(target, drawn, *rings)
        at.mark(True, (target, drawn), severity="error")
        # In another heart it may happen to fit as well: then nothing decides.
        at.mark(True, (place, source), severity="info" if place.slice < 1 else None)
    for study in few:
        left = [study.places[1, 0], study.places[5, 3]]
        for place in study:
            for drawing in (place.inner, place.outer):
                if place not in left or drawing is place.outer:
                    assert drawing is not None
                    at.unpair(place.study, drawing)
        first, second = (place.inner for place in left)
        assert first is not None
        assert second is not None
        at.redraw(left[1], second, *first.rings)
        at.mark(True, (left[0], first), severity="error")
        at.mark(True, (left[1], second), severity="error")
    one, other = at.near
    for k, place in enumerate(one):
        target = other.places[place.slice, place.phase]
        source, drawn = place.inner, target.inner
        assert source is not None
        assert drawn is not None
        if k % 3 == 0:
            at.redraw(target, drawn, source.points + np.array([0.5, 0]))
        elif k % 3 == 1:
            at.redraw(target, drawn, np.concatenate([source.points[:1] + 0.5, source.points[1:]]))
        else:
            square = np.array([[80.0, 80], [100, 80], [100, 100], [80, 100]])
            at.redraw(place, source, square)
            at.redraw(target, drawn, square)
        at.mark(False, (place, source), (target, drawn))


@plants("CONTOUR-SHIFT", hearts=(-LEAST, -LEAST))
def shift(at: Ground) -> None:
    """All contours of a root fit the edges best when moved; near: too little to tell, each another way, or too few contours."""
    gain, at_least = at.limit("gain"), int(at.limit("at_least"))

    def better(distance: float) -> float:
        scores = np.array(fit(at.archive.rng, (distance, 0.0), noise=0))
        return float(scores.max() - scores[40])

    little = most(better, gain * 0.8, 2.0)
    tops = [(-1.0, -1.0), (0.5, 0.5), (-0.5, -0.5), (1.0, 0.0), (0.0, -1.5)]
    for bad, k, study in at.both():
        at.run("INSERT INTO root (name, url) VALUES (%s, %s)", f"heart{study.study}", f"/nowhere/heart{study.study}")
        for number, place in enumerate(study):
            at.run("UPDATE file SET root_id = (SELECT id FROM root WHERE name = %s) WHERE id = %s", f"heart{study.study}", place.file)
            for drawn in (place.inner, place.outer):
                assert drawn is not None
                at.run("UPDATE file SET root_id = (SELECT id FROM root WHERE name = %s) WHERE id = %s", f"heart{study.study}", drawn.file)
                elsewhere = at.archive.rng.normal(0, 0.7, 2)
                top = tops[k % 5] if bad else [(little, 0.0), (float(elsewhere[0]), float(elsewhere[1])), (-1.0, -1.0)][k % 3]
                if not bad and k % 3 == 2 and number >= at_least - 1:
                    at.run("DELETE FROM edge_fit WHERE pairing_id = %s", drawn.pairing)
                else:
                    at.set("edge_fit", drawn.pairing, "pairing_id", scores=fit(at.archive.rng, top, noise=0.05 if bad or k % 3 else 0.01))
        at.mark(bad, *study)
