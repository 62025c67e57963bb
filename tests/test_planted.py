"""Every rule, on a synthetic archive of 10,000 contours: planted defects are all found, near misses and the clean set raise nothing.

What is planted is what goes wrong in archives: a contour of another image, mirrored or cut short, a dropped slice, a copied file. The
plantings know a rule's title and its parameters, and not how it looks for anything. All rules run twice: on the clean set, and planted.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import psycopg
import pytest
from psycopg.types.json import Jsonb

from catalog import contours, qa
from catalog.database import Database
from tests.conftest import _create, _named
from tests.planting import CYCLE_MS, DISTANCE, HEARTS, PHASES, SIZE, SPACING, UID, Archive, Ground, Place, Points, Study, fit

Mask = npt.NDArray[np.bool_]

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


# ------------------------------------------------------------------------------------------ files, identity, privacy

each_side(
    "FILE-MISSING",
    lambda at, k, s: at.set("file", s.middle.file, state="missing"),
    lambda at, k, s: at.set("file", s.middle.file, state="present", mtime_ns=k),
)
each_side(
    "FILE-PIXEL-LENGTH",
    lambda at, k, s: at.set("instance", s.middle.instance, surplus_bytes=2 + 97 * k),
    lambda at, k, s: at.set("instance", s.middle.instance, surplus_bytes=0, number_of_frames=1),
)
each_side(
    "FILE-META-UID",
    lambda at, k, s: at.set("instance", s.middle.instance, other_meta_uid=True),
    lambda at, k, s: at.set("instance", s.middle.instance, other_meta_uid=False),
)


@plants("UID-INVALID", sides=(LEAST, LEAST))
def uid_invalid(at: Ground) -> None:
    """Leading zeros, too long, letters, empty components; near: 64 characters, a component that is 0."""
    for bad, k, study in at.both():
        stem = f"1.2.{study.study}."
        if bad:
            uid = [stem + "007", stem + "1" * (65 - len(stem)), stem + "1a", stem + ".5", stem + "5."][k % 5]
        else:
            uid = [stem + "0", stem + "1" * (64 - len(stem)), stem + "0.10.0"][k % 3]
        if k % 3 == 0:
            at.set("study", study.study, study_instance_uid=uid)
        elif k % 3 == 1:
            at.set("series", study.series, series_instance_uid=uid)
        else:
            at.set("instance", study.middle.instance, sop_instance_uid=uid)
        at.mark(bad, *study)


each_side(
    "PRIVACY-BURNED-IN",
    lambda at, k, s: at.set("instance", s.middle.instance, burned_in_annotation="YES"),
    lambda at, k, s: at.set("instance", s.middle.instance, burned_in_annotation="NO"),
)
each_side(
    "PRIVACY-NOT-REMOVED",
    lambda at, k, s: at.set("instance", s.middle.instance, identity_removed="NO"),
    lambda at, k, s: at.set("instance", s.middle.instance, identity_removed="YES" if k % 2 else ""),
)
each_side(
    "PRIVACY-IDENTIFYING",
    lambda at, k, s: at.set("instance", s.middle.instance, identifying=["(0010,0010)", "(0010,0030)"][: k % 2 + 1]),
    lambda at, k, s: at.set("instance", s.middle.instance, identifying=[]),
)
each_side(
    "PRIVACY-AGE",
    lambda at, k, s: at.set("instance", s.middle.instance, over_89=True),
    lambda at, k, s: at.set("instance", s.middle.instance, over_89=False if k % 2 else None),
)


@plants("PRIVACY-PATH", sides=(LEAST, LEAST))
def privacy_path(at: Ground) -> None:
    """Names, numbers with a label, addresses and dates of birth in folders; near: other dates, long numbers, UIDs, the PatientID."""
    years = int(at.limit("years"))
    for bad, k, study in at.both():
        if bad:
            some = ["DOE^JANE", "Doe, Jane", "MRN0048812", "ssn_123-45-6789", "j.doe@example.org", f"{2011 - years}1230", f"{2010 - years}-06-30"]
        else:
            some = [f"{2013 - years}0101", "2012-01-01", "IM-0001-0048", f"{UID}.4.{study.study}", "9fc81b2276f0", "short axis, 8 mm",
                    str(at.archive.rows["patient"][study.patient - 1][1])]  # fmt: skip
        for number, place in enumerate(study):
            at.set("file", place.file, path=f"from/{some[k % 7]}/{study.study}/{number}.dcm" if k % 2 else f"from/{study.study}/{some[k % 7]}_{number}.dcm")
        at.mark(bad, *study)


for _code, _word in (("FILE-TRUNCATED", "truncated"), ("FILE-NO-DECODER", "no-decoder")):

    @plants(_code, sides=(LEAST, LEAST))
    def unreadable(at: Ground, word: str = _word) -> None:
        """An ingest could not read a file, for this cause; near: for another one, or it could in the end."""
        for bad, k, study in at.both():
            said = word if bad or k % 2 else ["unreadable", "no-access", "reader-died"][k % 3]
            at.run("INSERT INTO flag (rule, severity, detail, file_id, raised_by, state, closed_by, closed_at) "
                   "VALUES ('FILE-UNREADABLE', 'error', %s, %s, 'ingest', %s, %s, CASE WHEN %s THEN NULL::timestamptz ELSE now() END)",
                   f"{said}: {'it' if bad else word} cannot be read", study.middle.file, *(("resolved", "ingest", False) if not bad and k % 2
                   else ("open", None, True)))  # fmt: skip
            at.mark(bad, study.middle)


def pairs(studies: list[Study]) -> Iterator[tuple[int, Study, Study]]:
    for number in range(len(studies) // 2):
        yield number, studies[2 * number], studies[2 * number + 1]


def copy_pixels(at: Ground, source: Place, target: Place, flip: bool) -> None:
    pixels = bytearray(at.image(source)["pixel_hash"])
    pixels[-1] ^= flip
    at.set("image", target.image, pixel_hash=bytes(pixels))


@plants("IDENTITY-PIXELS-PATIENTS", sides=(2 * LEAST, 2 * LEAST))
def pixels_of_others(at: Ground) -> None:
    """An image of one patient lies among another's; near: all bits of the hash but one."""
    for bad, studies in ((True, at.bad), (False, at.near)):
        for _, one, other in pairs(studies):
            copy_pixels(at, one.first, other.middle, not bad)
            at.mark(bad, one.first, other.middle)


@plants("IDENTITY-PIXELS-TWICE", sides=(LEAST, LEAST))
def pixels_twice(at: Ground) -> None:
    """An image was exported twice under two UIDs; near: one object in two files, a re-encoding, or all bits of the hash but one."""
    for bad, k, study in at.both():
        if bad or k % 2:
            copy_pixels(at, study.first, study.middle, not bad)
            at.mark(bad, study.first, study.middle)
        else:
            at.run("WITH f AS (INSERT INTO file (root_id, path, kind, size, mtime_ns, ingest_run_id) VALUES (1, %s, 'image', 9, 1, 1) RETURNING id) "
                   "INSERT INTO location (image_id, file_id, transfer_syntax_uid, preferred) SELECT %s, id, '1.2.840.10008.1.2.4.70', false FROM f",
                   f"again/{study.middle.image}.dcm", study.middle.image)  # fmt: skip
            at.mark(False, study.middle)


@plants("IDENTITY-STUDY", sides=(2 * LEAST, 2 * LEAST))
def study_twice(at: Ground) -> None:
    """One StudyInstanceUID under two patients; near: one that begins with the whole of the other."""
    for bad, studies in ((True, at.bad), (False, at.near)):
        for _, one, other in pairs(studies):
            at.set("study", other.study, study_instance_uid=f"{UID}.1.{one.study}" + ("" if bad else ".1"))
            at.mark(bad, *one, *other)


@plants("IDENTITY-SERIES", sides=(2 * LEAST, 2 * LEAST))
def series_twice(at: Ground) -> None:
    """One SeriesInstanceUID under two patients; near: one that begins with the whole of the other."""
    for bad, studies in ((True, at.bad), (False, at.near)):
        for _, one, other in pairs(studies):
            at.set("series", other.series, series_instance_uid=f"{UID}.2.{one.series}" + ("" if bad else ".1"))
            at.mark(bad, *one, *other)


def flipped(value: int, bits: list[int]) -> int:
    """Return a signed 64-bit number with some bits turned over."""
    turned = value & (1 << 64) - 1
    for bit in bits:
        turned ^= 1 << bit
    return turned - (1 << 64) if turned >> 63 else turned


@plants("IDENTITY-NEAR", sides=(2 * LEAST, 2 * LEAST))
def alike(at: Ground) -> None:
    """An image of another patient after compression or rescaling: few bits differ; near: one bit more does, or it is the same patient."""
    bits = int(at.limit("bits"))
    for bad, studies in ((True, at.bad), (False, at.near)):
        for k, one, other in pairs(studies):
            value = int(at.archive.rows["measure"][one.first.image - 1][-1])
            count = k % (bits + 1) if bad or k % 2 else bits + 1
            target = other.middle if bad or k % 2 == 0 else one.middle
            turned_over = [int(bit) for bit in at.archive.rng.choice(64, count, replace=False)]
            at.set("measure", target.image, "image_id", near_hash=flipped(value, turned_over))
            at.mark(bad, one.first, target)


# ------------------------------------------------------------------------------------------ series


def turned(axes: list[float], degrees: float, about: int) -> Points:
    """Return an orientation turned about its row, its column, or its normal."""
    row, column = np.array(axes[:3]), np.array(axes[3:])
    around = (row, column, np.cross(row, column))[about]
    angle = np.radians(degrees)

    def turn(vector: Points) -> Points:
        return (
            vector * np.cos(angle) + np.cross(around, vector) * np.sin(angle) + around * (around @ vector) * (1 - np.cos(angle))
        )  # Rodrigues

    return np.concatenate([turn(row), turn(column)])


def localizer(at: Ground, study: Study) -> None:
    """Put one image into a series of its own."""
    at.apart([study.middle], study.study)


def other_size(at: Ground, place: Place, k: int) -> None:
    at.set("image", place.image, rows=SIZE - 2 * (k % 4), columns=SIZE + 16 - 4 * (k % 3))


@plants("SERIES-ORIENTATION", sides=(LEAST, LEAST))
def series_orientation(at: Ground) -> None:
    """One image is turned, mirrored or transposed; near: turned by less than the limit, or in a series of its own."""
    limit = at.limit("most")
    for bad, k, study in at.both():
        axes = at.image(study.middle)["image_orientation"]
        if bad:
            other = [turned(axes, 5.0 + k, k % 3), np.array([-one for one in axes[:3]] + axes[3:]), np.array(axes[3:] + axes[:3]),
                     turned(axes, float(np.degrees(limit)) * 2, k % 3)][k % 4]  # fmt: skip
        elif k % 3:
            # A difference of a cosine is at most the sine of the angle.
            other = turned(axes, float(np.degrees(limit)) * 0.95, k % 3)
        else:
            other = turned(axes, 90.0, k % 2)
            localizer(at, study)
        at.move(study.middle, axes=other)
        at.mark(bad, *study)


@plants("SERIES-SPACING", sides=(LEAST, LEAST))
def series_spacing(at: Ground) -> None:
    """One image has another spacing, or none; near: just less than the limit, or in a series of its own."""
    limit = at.limit("most")
    for bad, k, study in at.both():
        by = [limit * 1.1, 0.01, -0.3, limit * -1.1][k % 4] if bad else [limit * 0.9, limit * -0.9, 0.5][k % 3]
        rows, columns = (SPACING + by * (k % 2 == 0), SPACING + by * (k % 3 != 0 or k % 2))
        if bad and k % 10 == 9:
            at.set("image", study.middle.image, row_spacing=None, column_spacing=None)
        else:
            at.set("image", study.middle.image, row_spacing=rows, column_spacing=columns)
        if by == 0.5:
            localizer(at, study)
        at.mark(bad, *study)


@plants("SERIES-ORTHONORMAL", sides=(LEAST, LEAST))
def series_orthonormal(at: Ground) -> None:
    """A direction is too long, too short, aslant, or zeros; near: just within the limit, or rounded to three decimals."""
    limit = at.limit("most")
    for bad, k, study in at.both():
        axes = np.array(at.image(study.middle)["image_orientation"])
        row, column = axes[:3], axes[3:]
        off = limit * ([1.1, 5.0, 40.0][k % 3] if bad else 0.95)
        other = [np.concatenate([row * (1 + off), column]), np.concatenate([row, column * (1 - off)]),
                 np.concatenate([row, column * np.sqrt(1 - off**2) + row * off]),
                 np.zeros(6) if bad else np.round(axes, 3)][k % 4]  # fmt: skip
        at.set("image", study.middle.image, image_orientation=other.tolist())
        at.mark(bad, *study)


@plants("SERIES-POSITION-TWICE", sides=(LEAST, LEAST))
def position_twice(at: Ground) -> None:
    """A slice came twice, under other UIDs; near: beside it by a little more than positions are rounded to, or all places have two."""
    for bad, k, study in at.both():
        first, second = study.places[0, 0], study.places[k % 2 + 1, 1]
        place, when = np.array(at.image(first)["image_position"]), at.image(first)["trigger_time"]
        if bad:
            at.move(second, place)
            at.set("image", second.image, trigger_time=when)
        elif k % 2:
            at.move(second, place + study.normal * 0.03)
            at.set("image", second.image, trigger_time=when)
        else:
            for (slice_, phase), one in study.places.items():
                at.set("image", one.image, trigger_time=at.image(study.places[slice_, 0])["trigger_time"], phase=0 * phase)
        at.mark(bad, *study)


@plants("SERIES-GAP", sides=(LEAST, LEAST), stack=(8, 2))
def series_gap(at: Ground) -> None:
    """A slice within the stack was dropped, or lies unevenly; near: as uneven as allowed, or the last slice is missing."""
    limit = at.limit("most")
    for bad, k, study in at.both():
        gone: list[Place] = []
        if k % 2 == 0:
            gone = [study.places[3 + k % 3 if bad else 7, phase] for phase in range(2)]
            at.drop(gone)
        else:
            off = DISTANCE * (limit * 1.1 if k % 4 == 1 else 0.4) if bad else DISTANCE * limit * 0.95
            for phase in range(2):
                one = study.places[4, phase]
                at.move(one, np.array(at.image(one)["image_position"]) + study.normal * off * (-1 if k % 3 else 1))
        at.mark(bad, *(place for place in study if place not in gone))


@plants("SERIES-SIZE", sides=(LEAST, LEAST))
def series_size(at: Ground) -> None:
    """One image is cropped; near: it is, in a series of its own."""
    for bad, k, study in at.both():
        other_size(at, study.middle, k)
        if not bad:
            localizer(at, study)
        at.mark(bad, *study)


@plants("SERIES-PHASES", sides=(LEAST, LEAST), stack=(4, 4))
def series_phases(at: Ground) -> None:
    """Images of one slice are not there; near: one phase is missing in all slices."""
    for bad, k, study in at.both():
        gone = [study.places[1, k % 4]] if bad else [study.places[at_slice, k % 4] for at_slice in range(4)]
        at.drop(gone)
        at.mark(bad, *(place for place in study if place not in gone))


@plants("SERIES-INCOMPLETE", sides=(LEAST, LEAST))
def series_incomplete(at: Ground) -> None:
    """The headers speak of more images than there are; near: of just as many, or of fewer, or not at all."""
    for bad, k, study in at.both():
        claimed = len(study.places) + 1 + k if bad else [len(study.places), 1, None][k % 3]
        for place in study:
            at.set("instance", place.instance, images_in_acquisition=claimed)
        at.mark(bad, *study)


@plants("SERIES-NUMBERS", sides=(LEAST, LEAST))
def series_numbers(at: Ground) -> None:
    """A number is there twice, or none is, or one left out; near: they begin at 101, or run backwards."""
    for bad, k, study in at.both():
        if bad:
            at.set("instance", study.middle.instance, instance_number=[1, None, 40 + k][k % 3])
        else:
            for number, place in enumerate(study):
                at.set("instance", place.instance, instance_number=101 + number if k % 2 else 6 - number)
        at.mark(bad, *study)


@plants("SERIES-TILT", sides=(LEAST, LEAST))
def tilt(at: Ground) -> None:
    """The gantry was tilted, as a number says or the places of the slices do; near: less than is reported."""
    for bad, k, study in at.both():
        degrees = at.limit("least") * ([1.05, 2.0, 30.0][k % 3] if bad else 0.95) * (-1 if k % 5 == 0 else 1)
        if k % 2:
            for place in study:
                at.set("instance", place.instance, gantry_tilt=degrees)
        else:
            for place in study:
                sheared = study.axes[3:] * np.tan(np.radians(degrees)) * DISTANCE * place.slice
                at.move(place, np.array(at.image(place)["image_position"]) + sheared)
        at.mark(bad, *study)


# ------------------------------------------------------------------------------------------ images


@plants("IMAGE-FLAT", sides=(LEAST, LEAST))
def flat(at: Ground) -> None:
    """Next to no information, or next to no spread beside the others of the series; near: just as much as there has to be."""
    for bad, k, study in at.both():
        others = np.mean([at.archive.rows["measure"][place.image - 1][4] for place in study if place is not study.middle])
        if k % 2:
            at.set("measure", study.middle.image, "image_id", entropy=at.limit("bits") * (0.97 if bad else 1.03))
        else:
            # Is the image among those that it is compared with? Either way.
            ratio = at.limit("share") * (0.97 * (1 - 1 / len(study.places)) if bad else 1.03)
            at.set("measure", study.middle.image, "image_id", deviation=float(others) * ratio)
        at.mark(bad, study.middle)


@plants("IMAGE-SIZE", sides=(LEAST, LEAST))
def image_size(at: Ground) -> None:
    """A thumbnail, or a scanned page; near: as small or large as may be, or a narrow strip of the usual length."""
    times = at.limit("times")
    for bad, k, study in at.both():
        small, large = int(SIZE / times), int(SIZE * times)
        if bad:
            rows, columns = [(small - 1 - k % 9, small - 2), (large + 1 + k, 200), (150, large + 1)][k % 3]
        else:
            rows, columns = [(small, small - 9), (large, large), (SIZE, 8)][k % 3]
        at.set("image", study.middle.image, rows=rows, columns=columns)
        at.mark(bad, study.middle)


each_side(
    "IMAGE-SATURATED",
    lambda at, k, s: at.set("measure", s.middle.image, "image_id", saturated=at.limit("most") * (1.02 + k / 10)),
    lambda at, k, s: at.set("measure", s.middle.image, "image_id", saturated=at.limit("most") * (1 - k % 5 / 50)),
)
each_side(
    "IMAGE-CONSTANT",
    lambda at, k, s: at.set("measure", s.middle.image, "image_id", minimum=k, maximum=k, mean=k, deviation=0.0, entropy=0.0, saturated=1.0),
    lambda at, k, s: at.set("measure", s.middle.image, "image_id", minimum=k, maximum=k + 1, mean=k + 0.1, deviation=0.3, entropy=0.47),
)
each_side(
    "IMAGE-NAN",
    lambda at, k, s: at.set("measure", s.middle.image, "image_id", nans=1 + k),
    lambda at, k, s: at.set("measure", s.middle.image, "image_id", nans=0, minimum=-1e6 * k),
)


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
        return (through(small, small + [far, 0]),)
    # A bar of three pixels between them.
    x, y = np.rint(small.mean(axis=0))
    bar = np.array([[x, y - 1.5], [x + far, y - 1.5], [x + far, y + 1.5], [x, y + 1.5]])
    rows, columns = np.nonzero(filled([small]) | filled([small + [far, 0]]) | filled([bar]))
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
                   "polygon_area_px = NULL, rows = m.rows, columns = m.columns, box = ARRAY[m.box_row, m.box_column, m.box_rows, m.box_columns], "
                   f"bits = m.bits, structure_id = {named}, refers_to = %s, file_id = %s, source_key = %s "
                   "FROM mask m WHERE m.pairing_id = %s AND annotation.id = %s",
                   name, Jsonb(refers_to), place.inner.file, f"0/0/{value}", one.pairing, one.annotation)  # fmt: skip
        at.mark(bad, (place, drawn))



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
            at.unpair(place.outer)
            at.mark(False, (place, inner))
        elif (place.slice + place.phase) % 2:
            gone, left = (inner, place.outer) if k % 3 else (place.outer, inner)
            if k % 2:
                at.set("pairing", gone.pairing, state="rejected")
            else:
                at.unpair(gone)
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

        def away(step: float, points: Points = points, way: Points = way, study: Study = study, place: Place = place,
                 structure: str = structure, all_of_them: bool = bad) -> float:  # fmt: skip
            ratios = []
            for other, mm, ms in neighbours(study, place, structure):
                allowed = max(
                    at.limit("furthest_mm") + at.limit("per_mm") * mm + at.limit("per_ms") * ms,
                    at.limit("radii") * max(radius_mm(other), radius_mm(points)),
                )
                ratios.append(float(np.hypot(*(centre(points) + step * way - centre(other)))) * SPACING / allowed)
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
            return float(np.hypot(*(centre(points) + step * way - middle)))

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
        target = one.places[9 - place.slice % 2, (place.phase + 2) % PHASES] if place.slice < 2 else other.places[place.slice, place.phase]
        source, drawn = (place.inner, target.inner) if k % 2 else (place.outer, target.outer)
        assert source is not None
        assert drawn is not None
        rings = [np.roll(source.points, k, axis=0)[:: -1 if k % 3 else 1]] if (source.points[0] != source.points[-1]).any() else source.rings
        at.redraw(target, drawn, *rings)
        at.mark(True, (target, drawn), severity="error")
        at.mark(True, (place, source), severity="info")
    for study in few:
        left = [study.places[1, 0], study.places[5, 3]]
        for place in study:
            for drawing in (place.inner, place.outer):
                if place not in left or drawing is place.outer:
                    assert drawing is not None
                    at.unpair(drawing)
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
            at.redraw(target, drawn, source.points + [0.5, 0])
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
    hill = np.array(fit(at.archive.rng, noise=0))
    deviation = hill.std()

    def better(distance: float) -> float:
        scores = np.array(fit(at.archive.rng, (distance, 0.0), noise=0))
        return float((scores.max() - scores[40]) / deviation)

    little = most(better, gain * 0.9, 2.0)
    tops = [(-1.0, -1.0), (0.5, 0.5), (-0.5, -0.5), (1.0, 0.0), (0.0, -1.5)]
    for bad, k, study in at.both():
        at.run("INSERT INTO root (name, url) VALUES (%s, %s)", f"heart{study.study}", f"/nowhere/heart{study.study}")
        for number, place in enumerate(study):
            for drawn in (place.inner, place.outer):
                assert drawn is not None
                at.run("UPDATE file SET root_id = (SELECT id FROM root WHERE name = %s) WHERE id = %s", f"heart{study.study}", drawn.file)
                if bad:
                    top = tops[k % 5]
                else:
                    top = [(little, 0.0), tuple(at.archive.rng.normal(0, 0.7, 2)), (-1.0, -1.0)][k % 3]
                if not bad and k % 3 == 2 and number >= at_least - 1:
                    at.run("DELETE FROM edge_fit WHERE pairing_id = %s", drawn.pairing)
                else:
                    at.set("edge_fit", drawn.pairing, "pairing_id", scores=fit(at.archive.rng, top))
        at.mark(bad, *study)


# ------------------------------------------------------------------------------------------ the runs


@dataclass
class Planted:
    """What was planted, and what the rules said."""

    rules: dict[str, qa.Rule]
    grounds: dict[str, Ground]
    clean: list[tuple[str, str, str, int]]  # rule, severity, subject, its id; before anything was planted
    found: dict[str, dict[str, dict[int, str]]]  # rule → subject → id → severity, afterwards


def flagged(conn: psycopg.Connection) -> list[tuple[str, str, str, int]]:
    """Return rule, severity, subject and its id of each open flag that a rule raised."""
    subjects = ("file", "image", "annotation", "pairing", "series", "study", "patient")
    return [
        (rule, severity, *next((subject, one) for subject, one in zip(subjects, ids, strict=True) if one is not None))
        for rule, severity, *ids in conn.execute(
            f"SELECT rule, severity, {', '.join(f'{subject}_id' for subject in subjects)} FROM flag "
            f"WHERE state = 'open' AND raised_by = %s", [qa.ACTOR],
        )
    ]  # fmt: skip


@pytest.fixture(scope="module")
def planted(server_url: str, template: str) -> Iterator[Planted]:
    """An archive in a database of its own: rules run on it clean, everything is planted, and they run again."""
    only = os.environ.get("PLANTED_RULES", "").split()  # to try some alone
    rules = {code: rule for code, rule in qa.load().items() if rule.query and (not only or code in only)}
    plan = {code: PLANTINGS[code] for code in rules if code in PLANTINGS}
    archive = Archive()
    for one in plan.values():
        archive.sides += [archive.study(*one.stack) for _ in range(sum(one.sides))]
    archive.hearts = [archive.heart() for _ in range(HEARTS if not only else sum(abs(sum(one.hearts)) for one in plan.values()))]
    name = f"planted_{os.getpid()}"
    _create(server_url, name, template)
    grounds: dict[str, Ground] = {}
    try:
        url = _named(server_url, name)
        with psycopg.connect(url, autocommit=True) as conn, Database(url) as db:
            archive.write(conn)
            if "LABEL-UNEXPECTED" in rules:
                qa.set_value(db, rules["LABEL-UNEXPECTED"], "classes", "a|b", reason="some are expected here")
            qa.run(db, rules=rules.values(), actor="test")
            clean = flagged(conn)
            hearts, sides = iter(archive.hearts), iter(archive.sides)
            for code, one in plan.items():
                if one.hearts[0] < 0:  # some of all of them, which other rules share
                    of_hearts = [archive.hearts[: LEAST], archive.hearts[LEAST : 2 * LEAST]]
                else:
                    of_hearts = [[next(hearts) for _ in range(count)] for count in one.hearts]
                of_sides = [[next(sides) for _ in range(count)] for count in one.sides]
                ground = grounds[code] = Ground(archive, rules[code], of_hearts[0] + of_sides[0], of_hearts[1] + of_sides[1])
                one.plant(ground)
                ground.write(conn)
            conn.execute("ANALYZE")
            qa.run(db, rules=rules.values(), actor="test")
            found: dict[str, dict[str, dict[int, str]]] = {}
            for rule, severity, subject, number in flagged(conn):
                found.setdefault(rule, {}).setdefault(subject, {})[number] = severity
        yield Planted(rules, grounds, clean, found)
    finally:
        with psycopg.connect(server_url, autocommit=True) as conn:
            conn.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


def queried() -> list[str]:
    only = os.environ.get("PLANTED_RULES", "").split()
    return [code for code, rule in qa.load().items() if rule.query and (not only or code in only)]


@pytest.mark.parametrize("code", queried())
def test_every_planted_defect_is_found(planted: Planted, code: str) -> None:
    """Of a rule at least 50 defects are planted, and it flags each; a rule that nobody planted anything for fails."""
    assert code in PLANTINGS, f"{code} has no planting in tests/test_planted.py"
    defects = planted.grounds[code].defects
    assert len(defects) >= LEAST
    found = planted.found.get(code, {})
    missed = [
        number
        for number, (one, severity) in enumerate(defects)
        if not any(severity in (None, said) for subject, ids in one.items() for each, said in found.get(subject, {}).items() if each in ids)
    ]
    assert not missed, f"{len(missed)} of {len(defects)}"


@pytest.mark.parametrize("code", queried())
def test_no_near_miss_is_flagged(planted: Planted, code: str) -> None:
    """Of a rule at least 50 near misses are planted, just inside its thresholds, and it flags none."""
    misses = planted.grounds[code].misses
    assert len(misses) >= LEAST
    found = planted.found.get(code, {})
    flagged = [number for number, one in enumerate(misses) if any(ids & found.get(subject, {}).keys() for subject, ids in one.items())]
    assert not flagged, f"{len(flagged)} of {len(misses)}"


def test_the_clean_set_raises_nothing(planted: Planted) -> None:
    """Before anything is planted no rule raises an error or a warning on any of 10,000 contours and their images."""
    assert [one for one in planted.clean if one[1] != "info"] == []


def test_plantings_are_of_rules(planted: Planted) -> None:
    """No planting is left behind by a rule that is gone or was renamed."""
    assert set(PLANTINGS) <= set(planted.rules)
