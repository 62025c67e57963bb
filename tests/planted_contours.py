"""Plantings for the rules about contours, masks, pairings and labels: see tests/test_planted.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from psycopg.types.json import Jsonb

from catalog import contours
from tests.planting import SIZE, UID, Ground, Points
from tests.plantings import each_inner, plants

Mask = npt.NDArray[np.bool_]

# ------------------------------------------------------------------------------------------ contours and masks


def filled(rings: Sequence[Points]) -> Mask:
    return contours.rasterise(rings, SIZE, SIZE, convention="centre")


def centre(points: Points) -> Points:
    """Return x, y of the middle of an outline's mask."""
    rows, columns = np.nonzero(filled([points]))
    return np.array([columns.mean(), rows.mean()])


def compass(k: int) -> Points:
    """Return one of seven directions."""
    return np.array([np.cos(2 * np.pi * k / 7), np.sin(2 * np.pi * k / 7)])


def most(value: Callable[[float], float], limit: float, highest: float) -> float:
    """Return about the largest step, up to `highest`, at which a value that grows with it is no more than a limit."""
    low, high = 0.0, highest
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if value(middle) <= limit else (low, middle)
    return low


def scaled(points: Points, factor: float) -> Points:
    """Return an outline of another size about its middle."""
    middle = points.mean(axis=0)
    return middle + (points - middle) * factor


def area(points: Points) -> float:
    x, y = (points - points[0]).T
    return abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2


def few_points(at: Ground, bad: bool, k: int, points: Points) -> tuple[Points, ...]:
    """A reader clicked once or twice, or the file was cut after a line; near: a triangle."""
    third = len(points) // 3
    return (points[:: max(third * (3 - k % 2), 1)][: 1 + k % 2] if bad else points[[0, third, 2 * third]],)


each_inner("CONTOUR-FEW-POINTS", few_points)


def outside(at: Ground, bad: bool, k: int, points: Points) -> tuple[Points, ...]:
    """Drawn on an image of another size: moved over an edge; near: up to the outer edge of the last pixels."""
    side, sign = k % 2, (-1 if k % 4 < 2 else 1)
    edge = -0.5 if sign < 0 else SIZE - 0.5
    reach = points[:, side].min() if sign < 0 else points[:, side].max()
    moved = points.copy()
    moved[:, side] += edge - reach + (sign * (2.0 + k % 7) if bad else 0.0)
    return (moved,)


each_inner("CONTOUR-OUTSIDE", outside)


def crossing(at: Ground, bad: bool, k: int, points: Points) -> tuple[Points, ...]:
    """Part of the points in the wrong order; near: a spike out and back by the same way."""
    count = len(points)
    first, last = count // 5, count // 2 + k % 4
    if bad:
        return (np.concatenate([points[:first], points[first:last][::-1], points[last:]]),)
    tip = points[first] + (points[first] - points.mean(axis=0)) * 0.15
    return (np.concatenate([points[: first + 1], [tip], points[first:]]),)


each_inner("CONTOUR-CROSSING", crossing)


def through(points: Points, other: Points) -> Points:
    """Return two closed outlines in one ring, joined by a way there and back."""
    return np.concatenate([points, points[:1], other, other[:1], points[:1]])


def holes(at: Ground, bad: bool, k: int, points: Points) -> tuple[Points, ...]:
    """Drawn twice round, the second time smaller, one way or the other; near: two rings, or a bay that is open to one side."""
    if (points[0] == points[-1]).all():
        points = points[:-1]
    if bad:
        return (through(points, scaled(points, 0.45)[:: -1 if k % 2 else 1]),)
    if k % 2:
        return points, scaled(points, 0.45)
    bay = np.array([points[0], points.mean(axis=0), points[max(3, len(points) // 8)]])
    return (np.concatenate([bay, points[max(4, len(points) // 8 + 1) :]]),)


each_inner("MASK-HOLES", holes)


def border(at: Ground, bad: bool, k: int, points: Points) -> tuple[Points, ...]:
    """Cut by the image's edge; near: one pixel is left between."""
    side, sign = k % 2, (-1 if k % 4 < 2 else 1)
    edge = 0.0 if sign < 0 else SIZE - 1.0
    reach = points[:, side].min() if sign < 0 else points[:, side].max()
    moved = points.copy()
    moved[:, side] += edge - reach + sign * (4.0 if bad else -1.25)
    return (np.clip(moved, -0.5, SIZE - 0.5) if bad else moved,)


each_inner("MASK-BORDER", border)


def parts(at: Ground, bad: bool, k: int, points: Points) -> tuple[Points, ...]:
    """Two structures in one outline, joined by a line that is no pixel wide; near: joined by one that is."""
    if (points[0] == points[-1]).all():
        points = points[:-1]
    small = scaled(points, 0.5)
    far = np.ptp(points[:, 0]) + 4
    if bad:
        return (through(small, small + np.array([far, 0])),)
    # A bar of three pixels between them.
    x, y = np.rint(small.mean(axis=0))
    bar = np.array([[x, y - 1.5], [x + far, y - 1.5], [x + far, y + 1.5], [x, y + 1.5]])
    rows, columns = np.nonzero(filled([small]) | filled([small + np.array([far, 0])]) | filled([bar]))
    left = [[columns[rows == row].min() - 0.5, row + side] for row in np.unique(rows) for side in (-0.5, 0.5)]
    right = [[columns[rows == row].max() + 0.5, row + side] for row in np.unique(rows)[::-1] for side in (0.5, -0.5)]
    return (np.array(left + right),)


each_inner("MASK-PARTS", parts)


def huge(at: Ground, bad: bool, k: int, points: Points) -> tuple[Points, ...]:
    """The background instead of the structure, a box around everything; near: as much as is allowed."""
    rows = int(SIZE * at.limit("most")) + (1 + 2 * k % 90 if bad else -(k % 10))
    down = np.linspace(-0.5, rows - 0.5, 9)
    return (np.concatenate([np.column_stack([np.full(9, -0.5), down]), np.column_stack([np.full(9, SIZE - 0.5), down[::-1]])]),)


each_inner("MASK-HUGE", huge)


@plants("MASK-TINY", hearts=(1, 1))
def tiny(at: Ground) -> None:
    """A click, in px, or in mm² of an image with small pixels; near: as much as it has to be."""
    for bad, k, place, drawn in at.cells("inner"):
        least = int(np.ceil(at.limit("least_px")))
        if k % 2:  # a mm² is 25 px here
            at.set("image", place.image, row_spacing=0.2, column_spacing=0.2)
            least = int(np.ceil(at.limit("least_mm2") * 25))
        pixels = max(1, least - 1 - k % 3) if bad else least + k % 3
        x, y = np.rint(drawn.points.mean(axis=0))
        at.redraw(place, drawn, np.array([[x, y], [x + pixels, y], [x + pixels, y + 1], [x, y + 1]]) - 0.5)
        at.mark(bad, (place, drawn))


def cut_short(at: Ground, bad: bool, k: int, points: Points) -> tuple[Points, ...]:
    """The file ends early, or the reader stopped; near: just before the gap is wide in both senses."""
    if (points[0] == points[-1]).all():
        points = points[:-1]

    def wide(left: int) -> bool:
        path = points[:left]
        steps = np.hypot(*np.diff(path, axis=0).T)
        gap = float(np.hypot(*(path[-1] - path[0])))
        return gap > at.limit("steps") * float(np.median(steps)) and gap > at.limit("share") * (float(steps.sum()) + gap)

    fewest = next(left for left in range(len(points), 3, -1) if wide(left))
    return (points[: max(int(at.limit("least_points")), fewest - k % 4)] if bad else points[: fewest + 1],)


each_inner("CONTOUR-OPEN", cut_short)


# ------------------------------------------------------------------------------------------ pairings and labels


@plants("PAIR-REFERENCE", hearts=(1, 1))
def reference(at: Ground) -> None:
    """The file names an image that never came: its UID, its frame or its path; near: one that is there."""
    for bad, k, place, drawn in at.cells("inner"):
        uid, path = at.archive.rows["instance"][place.instance - 1][2], at.archive.rows["file"][place.file - 1][2]
        refers_to: dict[str, object] = (
            [{"sop_instance_uid": f"{uid}.7"}, {"sop_instance_uid": uid, "frame": 7}, {"path": f"{path}.gz"}]
            if bad
            else [{"sop_instance_uid": uid}, {"sop_instance_uid": uid, "frame": 0}, {"path": path}]
        )[k % 3]
        at.set("annotation", drawn.annotation, refers_to=Jsonb(refers_to))
        at.mark(bad, (place, drawn))


@plants("PAIR-PATIENT", hearts=(1, 1))
def of_another_patient(at: Ground) -> None:
    """A structure set of somebody else, or a contour out of another one's folder; near: one's own, though the names begin alike."""
    for number, study in enumerate([*at.bad, *at.near]):
        at.set("patient", study.patient, original_id=f"SC-HF-I-{'1' * (number + 1)}")
    for bad, k, place, drawn in at.cells("inner"):
        mine, other = (at.bad[0], at.near[0]) if bad else (at.near[0], at.bad[0])
        whose = other if bad else mine
        if k % 2:
            uid = f"{UID}.8.{drawn.annotation}"
            at.run("INSERT INTO instance (series_id, sop_instance_uid, number_of_frames) VALUES (%s, %s, 0)", whose.series, uid)
            at.run("UPDATE file SET instance_id = (SELECT id FROM instance WHERE sop_instance_uid = %s) WHERE id = %s", uid, drawn.file)
        else:
            original = f"SC-HF-I-{'1' * (2 if whose is at.near[0] else 1)}"
            at.set("annotation", drawn.annotation, refers_to=Jsonb({"original_id": original, "number": k}))
        at.mark(bad, (place, drawn))


@plants("LABEL-UNEXPECTED", hearts=(1, 1))
def unexpected(at: Ground) -> None:
    """A value of a label volume, or a segment, that nothing names, or a class that nobody expects (the test expects a and b);
    near: a value that has a name, a class that is expected."""
    at.run("INSERT INTO structure (name) VALUES ('label 7'), ('segment 3')")
    named = "(SELECT id FROM structure WHERE name = %s)"
    for bad, k, place, drawn in at.cells("outer"):
        assert place.inner is not None
        if k % 3 == 0:
            at.run("UPDATE annotation SET kind = 'label', label = %s, points = NULL, rings = NULL, convention = NULL WHERE id = %s",
                   "c" if bad else "ab"[k % 2], drawn.annotation)  # fmt: skip
            at.mark(bad, (place, drawn))
            continue
        of_volume = k % 3 == 1
        names = ("inner", "label 7" if of_volume else "segment 3") if bad else ("inner", "outer")
        at.run("UPDATE file SET format = %s WHERE id = %s", "nifti" if of_volume else "dicom", place.inner.file)
        for value, one, name in ((1, place.inner, names[0]), (7 if of_volume else 3, drawn, names[1])):
            refers_to = {"value": value, "frame": 0} if of_volume else {"segment_number": value}
            at.run("UPDATE annotation SET kind = 'segment', origin = 'segment', points = NULL, rings = NULL, convention = NULL, "
                   "polygon_area_px = NULL, rows = m.rows, columns = m.columns, "
                   "box = ARRAY[m.box_row, m.box_column, m.box_rows, m.box_columns], "
                   f"bits = m.bits, structure_id = {named}, refers_to = %s, file_id = %s, source_key = %s "
                   "FROM mask m WHERE m.pairing_id = %s AND annotation.id = %s",
                   name, Jsonb(refers_to), place.inner.file, f"0/0/{value}", one.pairing, one.annotation)  # fmt: skip
        at.mark(bad, (place, drawn))
