"""RT Structure Set → what was drawn on each image, in mm of the patient (PS3.3 C.8.8.5, C.8.8.6); and opening such an object safely.

All closed contours of one ROI on one image are one annotation by even-odd, so holes work: the type CLOSEDPLANAR_XOR asks for it
(C.8.8.6.3), and for CLOSED_PLANAR, whose contours should not overlap, it changes nothing. Points and open lines enclose no area: they are
left out, and `left_out` of `read_annotations` says which.
"""

from __future__ import annotations

import os
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
from pydicom.filereader import _read_file_meta_info, read_partial, read_preamble

from catalog import dicom, elements, geometry
from catalog.contours import MAX_COORDINATE
from catalog.elements import named
from catalog.errors import CatalogError, FileError
from catalog.records import Drawn, polygon

FloatArray = npt.NDArray[np.float64]

_CLASS = "1.2.840.10008.5.1.4.1.1.481.3"
_SOP_CLASS = 0x00080016
_SOP_INSTANCE = 0x00081155  # Referenced SOP Instance UID
_FRAME_NUMBER = 0x00081160  # Referenced Frame Number
_SERIES = 0x0020000E
_FRAME_OF_REFERENCE = 0x00200052
_LABEL = 0x30060002
_FRAMES_OF_REFERENCE = 0x30060010
_STUDIES = 0x30060012
_ALL_SERIES = 0x30060014
_IMAGES = 0x30060016  # Contour Image Sequence
_ROIS = 0x30060020
_ROI_NUMBER = 0x30060022
_ROI_FRAME_OF_REFERENCE = 0x30060024
_ROI_NAME = 0x30060026
_ALGORITHM = 0x30060036
_ROI_CONTOURS = 0x30060039
_CONTOURS = 0x30060040
_TYPE = 0x30060042
_COUNT = 0x30060046
_DATA = 0x30060050
_CONTOUR_OF = 0x30060084  # Referenced ROI Number

_CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")
_OTHER = ("POINT", "OPEN_PLANAR", "OPEN_NONPLANAR")
# Coordinates with two decimals put two contours of one oblique plane up to 0.02 mm apart; images lie ten times further from each other.
SAME_PLANE_MM = 0.05
# What pairs an image with a plane is as far; a contour beyond it lies in no image.
FLAT_MM = 0.5
MOST_ORIENTATIONS = 100
MOST_POINTS = 5_000_000
MOST_BYTES = 256 * 1024 * 1024
LONGEST_TEXT = 1_000  # characters; UIDs may have 64 and names 64, and PostgreSQL must be able to index them
_PIXELS = frozenset((0x7FE00008, 0x7FE00009, 0x7FE00010))


class _Series(NamedTuple):
    frame_of_reference: str
    study: str
    series: str
    images: frozenset[str]


class _Image(NamedTuple):
    """What a contour refers to; the frame counts from 0, None: not said."""

    uid: str
    frame: int | None


def read_annotations(path: Path, options: Mapping[str, Any], left_out: list[str] | None = None) -> list[Drawn]:
    """Return what was drawn: one polygon of convention ``patient`` for each ROI and image that it refers to.

    Contours that name no image are put together where they lie in one plane. `refers_to` holds the image's UID (and its frame, where the
    file says one), always the plane, and the ROI's number. The structure is the ROI's name; the reader is the structure set's
    label with how the ROI was made ("RTstruct (MANUAL)"), no person's name. The list is empty where nothing closed was drawn.

    Args:
        options: None are known.
        left_out: Gets a line for each ROI with contours that enclose no area.

    Raises:
        FileError: ``not-dicom``; ``not-rtstruct``; ``contour-unreadable`` for a closed contour that is no closed planar contour, whose file
            is then used not at all, since an outline without its hole is a wrong one; ``truncated``; ``unreadable`` for the rest.
    """
    tags = (_LABEL, _FRAMES_OF_REFERENCE, _ROIS, _ROI_CONTOURS)
    with opened_object(path, {_CLASS: "RT Structure Set Storage"}, "not-rtstruct", tags, most_bytes=MOST_BYTES) as (_, dataset):
        for tag in (_ROIS, _ROI_CONTOURS):
            if tag not in dataset:
                raise FileError("unreadable", f"{named(tag)} is missing, so nothing says what was drawn; the file may be cut off")
        everywhere = list(_referenced(dataset))
        rois: dict[int, Any] = {}
        for roi in elements.groups(dataset, _ROIS):
            if rois.setdefault(_number(roi, _ROI_NUMBER), roi) is not roi:
                raise FileError("unreadable", f"{named(_ROI_NUMBER)} stands twice, so which ROI a contour belongs to is not known")
        drawn: list[Drawn] = []
        seen: set[int] = set()
        points = 0
        for contours_of in elements.groups(dataset, _ROI_CONTOURS):
            number = _number(contours_of, _CONTOUR_OF)
            if number in seen:
                raise FileError("unreadable", f"{named(_ROI_CONTOURS)} has ROI {number} twice; what of it counts is not known")
            seen.add(number)
            roi = rois.get(number)
            name = text(roi, _ROI_NAME).strip() if roi is not None else ""
            frame_of_reference = text(roi, _ROI_FRAME_OF_REFERENCE) if roi is not None else ""
            reader = _reader(text(dataset, _LABEL).strip(), text(roi, _ALGORITHM).strip() if roi is not None else "")
            for image, key, rings in _grouped(contours_of, number, left_out):
                points += sum(map(len, rings))
                if points > MOST_POINTS:
                    raise FileError(
                        "unreadable", f"over {MOST_POINTS} points, more than are read from one file; export fewer ROIs to a file"
                    )
                place = _place(everywhere, frame_of_reference, image)
                normal, _, _ = geometry.plane(np.concatenate(rings))
                refers_to: dict[str, Any] = {"roi_number": number}
                if image is not None:
                    refers_to["sop_instance_uid"] = image.uid
                    if image.frame is not None:
                        refers_to["frame"] = image.frame
                refers_to["plane"] = {
                    "position": rings[0][0].tolist(),
                    "orientation": None,
                    "normal": None if normal is None else normal.tolist(),
                    **place,
                }
                shape = polygon(rings)
                drawn.append(Drawn(f"{number}/{key}", name or f"ROI {number}", reader, "polygon", refers_to, shape, "patient"))
        return drawn


def _grouped(contours_of: Any, number: int, left_out: list[str] | None) -> Iterator[tuple[_Image | None, str, list[FloatArray]]]:
    """Yield the contours of one ROI by what they lie on: an image or, where none is named, a plane; with what tells it from others."""
    on_image: dict[_Image, list[FloatArray]] = defaultdict(list)
    in_space: list[FloatArray] = []
    others: dict[str, int] = defaultdict(int)
    for at, contour in enumerate(elements.groups(contours_of, _CONTOURS), start=1):
        kind = text(contour, _TYPE).strip()
        if kind not in _CLOSED:
            others[kind if kind in _OTHER else "unknown"] += 1
            continue
        ring = _ring(contour, f"ROI {number}, contour {at}")
        if not len(ring):
            others["closed, without points"] += 1
            continue
        # Once an image, however often its reference stands there: a ring twice would be a hole in itself.
        images = dict.fromkeys(_images(contour))
        for image in images:
            on_image[image].append(ring)
        if not images:
            in_space.append(ring)
    if others and left_out is not None:
        listed = ", ".join(f"{count} of type {kind}" for kind, count in sorted(others.items()))
        left_out.append(f"ROI {number}: contours that enclose no area are left out: {listed}")
    for image, rings in on_image.items():
        yield image, image.uid if image.frame is None else f"{image.uid}/{image.frame}", rings
    for key, rings in _by_plane(in_space):
        yield None, key, rings


def _by_plane(rings: list[FloatArray]) -> Iterator[tuple[str, list[FloatArray]]]:
    """Yield the rings that lie in one plane together, with the plane in words, different for each."""
    fits = [geometry.plane(ring) for ring in rings]
    # The widest contour says best how its plane lies, and the others are held against it.
    rest = sorted(range(len(rings)), key=lambda at: -fits[at][1])
    keys: dict[str, int] = defaultdict(int)

    def unique(key: str) -> str:
        keys[key] += 1
        return key if keys[key] == 1 else f"{key} #{keys[key]}"

    for _ in range(MOST_ORIENTATIONS):
        if not rest:
            return
        normal = fits[rest[0]][0]
        if normal is None:  # from here on only lines and single points: none of them has a plane
            for at in sorted(rest):
                yield unique("point " + _rounded(rings[at][0])), [rings[at]]
            return
        along = {at: rings[at] @ normal for at in rest}
        offsets = {at: float(values.mean()) for at, values in along.items()}
        flat = sorted((at for at in rest if at == rest[0] or np.ptp(along[at]) <= 2 * SAME_PLANE_MM), key=offsets.__getitem__)
        taken = set(flat)
        rest = [at for at in rest if at not in taken]
        planes = [[flat[0]]]
        for before, at in pairwise(flat):
            if offsets[at] - offsets[before] > SAME_PLANE_MM:
                planes.append([])
            planes[-1].append(at)
        for together in planes:
            here = [rings[at] for at in sorted(together)]
            if all(fits[at][0] is None for at in together):
                yield unique(f"point {_rounded(here[0][0])}"), here
            else:
                offset = sum(offsets[at] for at in together) / len(together)
                yield unique(f"plane {_rounded(normal)} at {_rounded([offset])}"), here
    if rest:
        raise FileError("unreadable", f"the contours of one ROI lie in over {MOST_ORIENTATIONS} directions and name no images")


def _rounded(values: Iterable[float]) -> str:
    return ",".join(f"{round(float(value), 2) + 0.0:.2f}" for value in values)


def _ring(contour: Any, which: str) -> FloatArray:
    """Return a contour's points as they stand there, (n, 3) mm."""
    data = elements.raw(contour, _DATA).rstrip(b"\0 ")
    numbers = data.count(b"\\") + 1 if data else 0
    count = elements.whole_number(contour, _COUNT)
    if numbers % 3 or numbers > 3 * MOST_POINTS or (count is not None and 3 * count != numbers):
        said = "an unknown number of" if count is None else count
        raise FileError(
            "contour-unreadable",
            f"{which}: {named(_DATA)} has {numbers} numbers for {said} points, so it is damaged; export the structure set again",
        )
    try:
        if b"_" in data:  # which float() takes for a separator of thousands
            raise ValueError
        ring = np.array([float(part) for part in data.split(b"\\")] if data else [], np.float64).reshape(-1, 3)
    except ValueError:
        raise FileError("contour-unreadable", f"{which}: {named(_DATA)} is not all numbers; export the structure set again") from None
    if not (np.abs(ring) <= MAX_COORDINATE).all():  # false for not-a-number, too
        raise FileError("contour-unreadable", f"{which}: {named(_DATA)} has a coordinate beyond {MAX_COORDINATE:.0f} mm")
    if len(ring) and (off := geometry.plane(ring)[2]) > FLAT_MM:
        raise FileError(
            "contour-unreadable",
            f"{which}: a closed planar contour by {named(_TYPE)}, but its points lie up to {off:.3g} mm off a plane, so it is on no image",
        )
    return ring


def _images(contour: Any) -> Iterator[_Image]:
    for reference in elements.groups(contour, _IMAGES):
        if uid := text(reference, _SOP_INSTANCE):
            frames = frame_numbers(reference)
            yield from (_Image(uid, frame) for frame in frames)
            if not frames:
                yield _Image(uid, None)


def _referenced(dataset: Any) -> Iterator[_Series]:
    """Yield the series that the structure set was drawn on: PS3.3 C.8.8.5, Referenced Frame of Reference Sequence."""
    for space in elements.groups(dataset, _FRAMES_OF_REFERENCE):
        frame_of_reference = text(space, _FRAME_OF_REFERENCE)
        for study in elements.groups(space, _STUDIES):
            for series in elements.groups(study, _ALL_SERIES):
                images = frozenset(text(image, _SOP_INSTANCE) for image in elements.groups(series, _IMAGES))
                yield _Series(frame_of_reference, text(study, _SOP_INSTANCE), text(series, _SERIES), images)


def _place(everywhere: list[_Series], frame_of_reference: str, image: _Image | None) -> dict[str, str]:
    """Return the UIDs of where a ROI lies, each empty unless there is just one that it can be."""
    where = [series for series in everywhere if not frame_of_reference or series.frame_of_reference == frame_of_reference]
    if image is not None:
        where = [series for series in where if image.uid in series.images] or where
    return {
        "frame_of_reference_uid": frame_of_reference or only(series.frame_of_reference for series in where),
        "series_instance_uid": only(series.series for series in where),
        "study_instance_uid": only(series.study for series in where),
    }


def _reader(label: str, algorithm: str) -> str:
    return f"{label} ({algorithm})" if label and algorithm else label or algorithm


def _number(dataset: Any, tag: int) -> int:
    number: int | None = elements.whole_number(dataset, tag)
    if number is None:
        raise FileError("unreadable", f"{named(tag)} is missing or no number, so which ROI is meant is not known")
    return number


@contextmanager
def opened_object(
    path: Path, classes: Mapping[str, str], refused_as: str, tags: Collection[int], *, most_bytes: int | None = None
) -> Iterator[tuple[BinaryIO, Any]]:
    """Open a DICOM object of one of these SOP classes (UID → name): its file, and its elements `tags` as a pydicom dataset.

    The file is one in memory, without deflation, where it was deflated; it stands at the pixel data, or at its end. Whatever is
    raised inside, by whatever bytes, comes out as a FileError; with `refused_as` for another class.
    """
    try:
        with dicom._opened(path) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if not dicom._sniff(file):
                raise FileError("not-dicom", "neither `DICM` at byte 128 nor a DICOM element at its start, so this is no DICOM file")
            if most_bytes is not None and (size := file.seek(0, os.SEEK_END)) > most_bytes:
                raise FileError("unreadable", f"{size} bytes are more than the {most_bytes} that are read of such a file")
            file.seek(0)
            plain, _ = dicom._inflated(file)
            plain.seek(0)
            read_preamble(plain, force=True)
            _read_file_meta_info(plain)
            if plain.read(16) == bytes(16):
                raise FileError("unreadable", "there are zeros where its elements should be, so its content was lost; copy it again")
            plain.seek(0)
            # As elements, the zeros behind the end of some files take minutes a gigabyte.
            try:
                dataset = read_partial(
                    plain, lambda tag, vr, length: tag in _PIXELS or tag < 0x00020000, force=True, specific_tags=[_SOP_CLASS, *tags]
                )
            except OSError as error:
                if error.errno is not None:
                    raise
                # What pydicom raises where a sequence goes on beyond the end; with a number it is the disk's.
                raise FileError("truncated", "a sequence goes on beyond the end, so the file is cut off; copy it again") from None
            if text(dataset, _SOP_CLASS) not in classes:
                raise FileError(
                    refused_as, f"{named(_SOP_CLASS)} is not {' or '.join(classes.values())}, so this is another kind of object"
                )
            for element in dataset.elements():
                if isinstance(element.value, bytes) and len(element.value) < element.length != 0xFFFFFFFF:
                    raise FileError("truncated", f"{named(element.tag)} ends before its {element.length} bytes; copy the file again")
            yield plain, dataset
    except CatalogError:
        raise
    except MemoryError:
        raise FileError("unreadable", "it takes more memory than there is") from None
    except Exception as error:  # damaged bytes can raise anything in the parser and the decoders
        raise FileError("unreadable", f"it cannot be parsed ({type(error).__name__}), so it is damaged; copy or export it again") from None


def text(dataset: Any, tag: int) -> str:
    """Return a text or UID as found less the padding at its end, empty where it is missing."""
    value = elements.text(dataset, tag)
    if len(value) > LONGEST_TEXT:
        raise FileError("unreadable", f"{named(tag)} has {len(value)} characters where DICOM allows 64, so the file is damaged")
    return value


def frame_numbers(reference: Any) -> list[int]:
    """Return the frames that an item refers to, from 0; none where it does not say."""
    value = elements.raw(reference, _FRAME_NUMBER).strip(b"\0 ")
    try:
        frames = [int(part) - 1 for part in value.split(b"\\")] if value else []
    except ValueError:
        frames = [-1]
    if any(not 0 <= frame < 2**31 for frame in frames):
        raise FileError("unreadable", f"{named(_FRAME_NUMBER)} is not all numbers from 1, so which image is meant is not known")
    return frames


def only(values: Iterable[str]) -> str:
    """Return the one value there is, empty for several."""
    different = set(values)
    return different.pop() if len(different) == 1 else ""
