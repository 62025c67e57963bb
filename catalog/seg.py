"""DICOM segmentation → a raster for each segment and frame (PS3.3 C.8.20): binary, fractional and label map.

A frame of a binary or fractional object is one raster, also where no pixel is set: the writer says that there is nothing, which is not
the same as leaving the frame out. A frame of a label map is a raster for each segment that has a pixel in it. Segments may
overlap. Tiled objects, those of whole-slide microscopy, are refused: their frames are no images.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from pydicom import uid as uids
from pydicom.dataset import Dataset

from catalog import decoders, dicom, elements, pixels
from catalog.elements import named
from catalog.errors import FileError, UsageError
from catalog.records import Drawn, segment
from catalog.rtstruct import frame_numbers, only, opened_object, text

_CLASSES = {"1.2.840.10008.5.1.4.1.1.66.4": "Segmentation Storage", "1.2.840.10008.5.1.4.1.1.66.7": "Label Map Segmentation Storage"}
_CODE_MEANING = 0x00080104
_ALL_SERIES = 0x00081115  # Referenced Series Sequence
_INSTANCES = 0x0008114A  # Referenced Instance Sequence
_SOP_INSTANCE = 0x00081155  # Referenced SOP Instance UID
_SOURCES = 0x00082112
_DERIVATIONS = 0x00089124
_STUDY = 0x0020000D
_SERIES = 0x0020000E
_POSITION = 0x00200032
_ORIENTATION = 0x00200037
_FRAME_OF_REFERENCE = 0x00200052
_PLANE_POSITION = 0x00209113
_PLANE_ORIENTATION = 0x00209116
_DIMENSION_ORGANIZATION = 0x00209311
_SPACING = 0x00280030
_BITS = 0x00280100
_PADDING = 0x00280120
_PRESERVED = 0x0028135A  # Spatial Locations Preserved
_MEASURES = 0x00289110
_MATRIX_COLUMNS = 0x00480006
_PER_FRAME = 0x52009230
_TYPE = 0x00620001
_SEGMENTS = 0x00620002
_SEGMENT_NUMBER = 0x00620004
_SEGMENT_LABEL = 0x00620005
_ALGORITHM_TYPE = 0x00620008
_ALGORITHM_NAME = 0x00620009
_IDENTIFICATION = 0x0062000A
_OF_SEGMENT = 0x0062000B  # Referenced Segment Number
_MAXIMUM = 0x0062000E
_PROPERTY = 0x0062000F
_FRACTIONAL_TYPE = 0x00620010
_PIXELS = 0x7FE00010
_TAGS = (
    _ALL_SERIES, _STUDY, _FRAME_OF_REFERENCE, _DIMENSION_ORGANIZATION, _BITS, _PADDING, _MATRIX_COLUMNS, _TYPE, _SEGMENTS, _MAXIMUM,
    _FRACTIONAL_TYPE,
)  # fmt: skip

# Which bits a pixel has: PS3.3 C.8.20.2. Some write binary ones a byte a pixel; that is taken where all are 0 or 1.
_BITS_OF = {"BINARY": (1, 8), "FRACTIONAL": (8,), "LABELMAP": (8, 16)}
# A compressed frame does not say how large it gets, and a label map's frame becomes as many rasters as it has labels.
MOST_PIXELS = 1 << 26
MOST_RASTER_PIXELS = 1 << 36
MOST_KEPT = 1 << 30
# A value that PS3.3 C.8.20.2 leaves open; the middle, as highdicom and others have it.
THRESHOLD = 0.5


class _Segment(NamedTuple):
    structure: str
    reader: str


def read_annotations(path: Path, options: Mapping[str, Any]) -> list[Drawn]:
    """Return a raster, kind ``segment``, for each segment and frame.

    The structure is the segment's label, else the meaning of its property's code; the reader is the algorithm's name, else its type
    (MANUAL, SEMIAUTOMATIC, AUTOMATIC). `refers_to` holds ``segment_number``; ``sop_instance_uid`` (and ``frame`` from 0, where the file
    says one) if the frame was made from a single image pixel by pixel; ``plane`` where its position is known, with spacing, rows
    and columns; and for a fractional one ``threshold`` and ``fractional_type``.

    Args:
        options: ``threshold``: a fractional pixel belongs to the mask if its share of Maximum Fractional Value is at least this; 0.5.

    Raises:
        FileError: ``not-dicom``; ``not-seg``; ``seg-tiled``; ``truncated``; ``no-decoder``; ``unreadable`` for the rest.
        UsageError: If the threshold is not above 0 and at most 1.
    """
    threshold = options.get("threshold", THRESHOLD)
    if not isinstance(threshold, int | float) or not 0 < threshold <= 1:
        raise UsageError("threshold must be a number above 0, up to 1")
    with opened_object(path, _CLASSES, "not-seg", _TAGS) as (file, dataset):
        if _MATRIX_COLUMNS in dataset or text(dataset, _DIMENSION_ORGANIZATION).strip().startswith("TILED"):
            raise FileError("seg-tiled", "a tiled segmentation, as of a microscope's slide, whose frames are no images; leave it out")
        kind = text(dataset, _TYPE).strip()
        bits = elements.unsigned(dataset, _BITS)
        if bits not in _BITS_OF.get(kind, ()):
            raise FileError("unreadable", f"{named(_TYPE)} and {named(_BITS)} do not go together, so its pixels have no meaning")
        segments = _segments(dataset)
        file.seek(0)
        header = dicom._read_header(file)
        image = _checked(header.pixels, len(header.per_frame))
        shared = header.shared[0] if header.shared else Dataset()
        own = header.per_frame or [Dataset()]
        series = {
            text(one, _SERIES): frozenset(text(image, _SOP_INSTANCE) for image in elements.groups(one, _INSTANCES))
            for one in elements.groups(dataset, _ALL_SERIES)
        }
        top: dict[str, Any] = {}
        maximum = 1
        if kind == "FRACTIONAL":
            maximum = elements.required(dataset, _MAXIMUM)
            top = {"threshold": float(threshold), "fractional_type": text(dataset, _FRACTIONAL_TYPE).strip()}
        padding = elements.unsigned(dataset, _PADDING)
        background = padding if padding is not None else 0 if 0 not in segments else None

        drawn: list[Drawn] = []
        keys: set[str] = set()
        kept = work = 0
        for frame, (group, values) in enumerate(zip(own, decoders.all_decoded(image), strict=True)):
            where = _refers_to(dataset, group, shared, series, values.shape)
            rasters: Iterator[tuple[int, npt.NDArray[np.bool_]]]
            if kind == "LABELMAP":
                rasters = ((int(label), values == label) for label in np.unique(values) if label != background)
            else:
                if int(values.max()) > maximum:
                    raise FileError("unreadable", f"a pixel of frame {frame + 1} is above {maximum}, the most that it may be")
                identification = _group(group, shared, _IDENTIFICATION)
                number = None if identification is None else elements.unsigned(identification, _OF_SEGMENT)
                if number is None:
                    raise FileError(
                        "unreadable", f"{named(_OF_SEGMENT)} of frame {frame + 1} is missing, so whose pixels they are is not known"
                    )
                # A division, not a multiplication: 0.07 × 100 is above 7.
                rasters = iter([(number, values.astype(np.float64) / maximum >= threshold if kind == "FRACTIONAL" else values == 1)])
            for number, raster in rasters:
                if number not in segments:
                    raise FileError("unreadable", f"{named(_SEGMENTS)} does not have segment {number} of frame {frame + 1}")
                work += raster.size
                shape = segment(raster)
                kept += len(shape.bits)
                if kept > MOST_KEPT or work > MOST_RASTER_PIXELS:
                    raise FileError(
                        "unreadable", f"its masks are over {MOST_KEPT} bytes or {MOST_RASTER_PIXELS} pixels, more than are kept"
                    )
                key = _key(number, where, frame)
                if key in keys:
                    key = f"{key}/frame {frame}"
                keys.add(key)
                refers_to = {"segment_number": number, **top, **where}
                drawn.append(Drawn(key, *segments[number], "segment", refers_to, segment=shape))
        return drawn


def _segments(dataset: Any) -> dict[int, _Segment]:
    found: dict[int, _Segment] = {}
    for item in elements.groups(dataset, _SEGMENTS):
        number = elements.unsigned(item, _SEGMENT_NUMBER)
        if number is None or number in found:
            raise FileError("unreadable", f"{named(_SEGMENT_NUMBER)} is missing or stands twice, so which segment is meant is not known")
        meaning = next((text(code, _CODE_MEANING).strip() for code in elements.groups(item, _PROPERTY)), "")
        structure = text(item, _SEGMENT_LABEL).strip() or meaning or f"segment {number}"
        found[number] = _Segment(structure, text(item, _ALGORITHM_NAME).strip() or text(item, _ALGORITHM_TYPE).strip())
    return found


def _checked(image: pixels.Pixels | None, groups: int) -> pixels.Pixels:
    """Return an object's pixels if they can be a segmentation's; every frame has its functional groups (PS3.3 C.7.6.16.1.1)."""
    if image is None:
        raise FileError("no-pixels", f"{named(_PIXELS)} is missing, so it holds no mask")
    if image.samples != 1 or image.representation != 0 or image.rows * image.columns > MOST_PIXELS:
        size = f"{image.rows}×{image.columns}×{image.samples}"
        raise FileError("unreadable", f"frames of {size}, signed, in colour or over {MOST_PIXELS} pixels, are no segmentation's")
    if image.number_of_frames != max(groups, 1):
        raise FileError(
            "unreadable", f"{named(_PER_FRAME)} has {groups} items for {image.number_of_frames} frames, so whose each one is is not known"
        )
    if image.bits_allocated == 1 and image.transfer_syntax == uids.ExplicitVRBigEndian:
        raise FileError("no-decoder", "single bits in big endian, retired before there were segmentations, are not read; convert the file")
    return image


def _refers_to(dataset: Any, own: Any, shared: Any, series: Mapping[str, frozenset[str]], shape: tuple[int, ...]) -> dict[str, Any]:
    """Return what a frame says about its image; `series` are those that the object refers to, with their images."""
    found: dict[str, Any] = {}
    sources: set[tuple[str, int | None]] = set()
    preserved = True
    for derivation in elements.groups(own, _DERIVATIONS) or elements.groups(shared, _DERIVATIONS):
        for source in elements.groups(derivation, _SOURCES):
            uid = text(source, _SOP_INSTANCE)
            frames: list[int | None] = [*frame_numbers(source)]
            sources.update((uid, frame) for frame in frames or [None])
            # NO and REORIENTED_ONLY: its pixels are not those of the source. Absent in many files where they are.
            preserved &= text(source, _PRESERVED).strip() in ("", "YES")
    if len(sources) == 1 and preserved:
        uid, frame = sources.pop()
        if uid:
            found["sop_instance_uid"] = uid
            if frame is not None:
                found["frame"] = frame
    position = _floats(_group(own, shared, _PLANE_POSITION), _POSITION, 3)
    if position is not None:
        spacing = _floats(_group(own, shared, _MEASURES), _SPACING, 2)
        orientation = _floats(_group(own, shared, _PLANE_ORIENTATION), _ORIENTATION, 6)
        image = found.get("sop_instance_uid")
        mine = [uid for uid, images in series.items() if image in images]
        found["plane"] = {
            "position": position,
            "orientation": orientation,
            "frame_of_reference_uid": text(dataset, _FRAME_OF_REFERENCE),
            "series_instance_uid": only(mine or series),
            "study_instance_uid": text(dataset, _STUDY),
            "spacing": spacing,
            "rows": shape[0],
            "columns": shape[1],
        }
    return found


def _group(own: Any, shared: Any, tag: int) -> Any | None:
    """Return a functional group's item: the frame's own, else that of all frames (PS3.3 C.7.6.16)."""
    return next(iter(elements.groups(own, tag) or elements.groups(shared, tag)), None)


def _floats(dataset: Any | None, tag: int, count: int) -> list[float] | None:
    values = None if dataset is None else elements.floats(dataset, tag, count)
    return None if values is None else list(values)


def _key(number: int, where: Mapping[str, Any], frame: int) -> str:
    """Return what tells a raster from others of its file, and stays when a new version of the file has more or fewer frames."""
    image = where.get("sop_instance_uid", "")
    if "frame" in where:
        return f"{number}/{image}/{where['frame']}"
    if "plane" in where:
        return f"{number}/{image}/" + ",".join(f"{round(value, 2) + 0.0:.2f}" for value in where["plane"]["position"])
    return f"{number}/{image}" if image else f"{number}/frame {frame}"
