"""What a file says, as the readers of all formats return it: its images, and what was drawn.

Neither a database nor a path stands in here. What the rows add (the root, the file, the run) the writer knows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from catalog import contours

Kind = Literal["polygon", "segment", "label"]
Convention = Literal["corner", "centre", "patient"]


@dataclass(frozen=True, slots=True)
class Frame:
    """One image of an instance. Lengths are in mm, times in ms; None where the file says nothing usable."""

    frame: int  # counted from 0
    rows: int
    columns: int
    samples_per_pixel: int
    photometric: str
    bits_stored: int
    pixel_spacing: tuple[float, float] | None  # between rows, between columns: PS3.3 10.7.1.3
    image_position: tuple[float, float, float] | None
    image_orientation: tuple[float, float, float, float, float, float] | None
    position: float | None  # along the slice normal: dot(image_position, cross(row direction, column direction))
    slice_thickness: float | None
    trigger_time: float | None
    slope: float  # 1.0 where absent
    intercept: float  # 0.0 where absent
    window_center: float | None
    window_width: float | None
    pixel_hash: bytes | None  # sha256 of the decoded stored values, C order, little endian; None where it was not asked for
    offset: int | None  # of the frame's first byte in the file; None unless dtype is given
    length: int  # bytes of the frame at offset; 0 unless dtype is given
    dtype: str | None  # numpy's name, such as "<i2", where the bytes at offset are what a decoder gives; else None
    modality_lut: bool = False  # its values go through a Modality LUT Sequence (0028,3000) instead of slope and intercept


@dataclass(frozen=True, slots=True)
class Instance:
    """One SOP object, or what stands for one in a file that is no DICOM, with its images: none for a plan or a report.

    Text is as found less the padding at its end, empty where missing. A NUL inside a text, which PostgreSQL cannot hold, and bytes that
    the character set cannot decode are U+FFFD.
    """

    patient_id: str
    study_instance_uid: str
    series_instance_uid: str
    sop_instance_uid: str
    sop_class_uid: str
    modality: str
    series_number: int | None
    study_date: str
    instance_number: int | None
    images_in_acquisition: int | None
    frame_of_reference_uid: str
    transfer_syntax_uid: str
    number_of_frames: int  # 0 for an object without pixels
    frames: tuple[Frame, ...]
    coding: str = ""  # "gzip": offsets count in what the file decompresses to
    burned_in_annotation: str = ""  # BurnedInAnnotation (0028,0301)
    identity_removed: str = ""  # PatientIdentityRemoved (0012,0062)
    over_89: bool | None = None  # None where nothing says
    identifying: tuple[str, ...] = ()  # tags such as (0010,0010), never values: `catalog.privacy`
    gantry_tilt: float | None = None  # GantryDetectorTilt (0018,1120) in degrees
    other_meta_uid: bool = False  # MediaStorageSOPInstanceUID (0002,0003) is there and is not SOPInstanceUID
    surplus_bytes: int = 0  # of uncompressed Pixel Data beyond what the header describes and a byte of padding


@dataclass(frozen=True, slots=True)
class Polygon:
    """A polygon as a row keeps it: its numbers one after another as read, points in each ring, area in px², sha256 of both.

    `points` are x, y, x, y, … in px; for the convention "patient" x, y, z, … in mm, whose area in px² is known only on an image.
    """

    points: list[float]
    rings: list[int]
    area_px: float | None
    content_hash: bytes


@dataclass(frozen=True, slots=True)
class Segment:
    """A raster as a row keeps it: `bits` are `numpy.packbits` of its bounding box (row, column, rows, columns), C order."""

    rows: int
    columns: int
    box: tuple[int, int, int, int]
    bits: bytes
    content_hash: bytes


@dataclass(frozen=True, slots=True)
class Drawn:
    """One annotation as its file says it.

    `source_key` tells it from others of its file, the same in every version of it; empty in a file that holds one. `refers_to` is what
    the source says about its image and how it is found; see `catalog.pairings`. Of `polygon`, `segment` and `label` the one that
    `kind` names is given. `convention` is that of a polygon.
    """

    source_key: str
    structure: str
    reader: str
    kind: Kind
    refers_to: dict[str, Any] = field(default_factory=dict)
    polygon: Polygon | None = None
    convention: Convention | None = None
    segment: Segment | None = None
    label: str | None = None


def polygon(rings: Sequence[npt.NDArray[np.float64]]) -> Polygon:
    """Return rings as a row keeps them: each (n, 2) in px, or (n, 3) in mm of the patient."""
    points = np.concatenate(rings) if rings else np.empty((0, 2))
    lengths = [len(ring) for ring in rings]
    digest = hashlib.sha256(np.array(lengths, "<i8").tobytes() + points.astype("<f8").tobytes()).digest()
    area = contours.polygon_area(rings) if points.shape[1] == 2 else None
    return Polygon(points.ravel().tolist(), lengths, area, digest)


def segment(raster: npt.NDArray[np.bool_]) -> Segment:
    """Return a raster (rows, columns) as a row keeps it."""
    rows, columns = raster.shape
    *box, bits = contours.boxed(raster)
    digest = hashlib.sha256(np.array([rows, columns, *box], "<i8").tobytes() + bits).digest()
    return Segment(rows, columns, (box[0], box[1], box[2], box[3]), bits, digest)
