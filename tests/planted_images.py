"""Plantings for the rules about files, privacy, identity, series and images: see tests/test_planted.py."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tests.planting import DISTANCE, SIZE, SPACING, UID, Ground, Place, Points, Study
from tests.plantings import LEAST, each_side, plants

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
    lambda at, k, s: at.set("instance", s.middle.instance, identity_removed="NO" if k % 2 else ""),
    lambda at, k, s: at.set("instance", s.middle.instance, identity_removed="YES"),
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
            some = [
                "DOE^JANE",
                "Doe, Jane",
                "MRN0048812",
                "ssn_123-45-6789",
                "j.doe@example.org",
                f"{2011 - years}1230",
                f"{2010 - years}-06-30",
            ]
        else:
            some = [f"{2013 - years}0101", "2012-01-01", "IM-0001-0048", f"{UID}.4.{study.study}", "9fc81b2276f0", "short axis, 8 mm",
                    str(at.archive.rows["patient"][study.patient - 1][1])]  # fmt: skip
        for number, place in enumerate(study):
            at.set(
                "file",
                place.file,
                path=f"from/{some[k % 7]}/{study.study}/{number}.dcm" if k % 2 else f"from/{study.study}/{some[k % 7]}_{number}.dcm",
            )
        at.mark(bad, *study)


for _code, _word in (("FILE-TRUNCATED", "truncated"), ("FILE-NO-DECODER", "no-decoder")):

    @plants(_code, sides=(LEAST, LEAST))
    def unreadable(at: Ground, word: str = _word) -> None:
        """An ingest could not read a file, for this cause; near: for another one, or it could in the end."""
        for bad, k, study in at.both():
            cause = word if bad or k % 2 else ["unreadable", "no-access", "reader-died"][k % 3]
            read_since = not bad and k % 2 == 1
            at.run(
                "INSERT INTO flag (rule, severity, detail, file_id, raised_by, state, closed_by, closed_at) "
                "VALUES ('FILE-UNREADABLE', 'error', %s, %s, 'ingest', %s, %s, CASE WHEN %s THEN now() END)",
                f"{cause}: it cannot be read; {word} is a word",
                study.middle.file,
                *(("resolved", "ingest", True) if read_since else ("open", None, False)),
            )
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
            path = f"again/{study.middle.image}.dcm"
            at.run("INSERT INTO file (root_id, path, kind, size, mtime_ns, ingest_run_id) VALUES (1, %s, 'image', 9, 1, 1)", path)
            at.run(
                "INSERT INTO location (image_id, file_id, transfer_syntax_uid, preferred) "
                "SELECT %s, id, '1.2.840.10008.1.2.4.70', false FROM file WHERE path = %s",
                study.middle.image,
                path,
            )
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


@plants("SERIES-FEW", sides=(LEAST, LEAST), stack=(3, 1))
def few_slices(at: Ground) -> None:
    """Most of a stack did not arrive; near: just enough did, or it is an image of a kind that comes alone."""
    least = int(at.limit("least"))
    for bad, k, study in at.both():
        gone = [place for place in study if place.slice >= (1 + k % 2 if bad else [least, 1][k % 2])]
        at.drop(gone)
        if not bad and k % 2:
            at.set("series", study.series, modality="CR")
        at.mark(bad, *(place for place in study if place not in gone))


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
