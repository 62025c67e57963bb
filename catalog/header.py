"""The header of a common DICOM file, read without pydicom: many times as fast, and nothing where it is not certain.

Understood are files in Explicit or Implicit VR Little Endian, and those with compressed pixels, whose elements are in ascending order,
each once, up to Pixel Data. For everything else the answer is None, which means "ask pydicom" (`catalog.dicom.read_instance`, which says
the same wherever this says something): big endian, deflated, no pixels, float pixels, enhanced objects (their geometry is in functional
groups), Modality LUT Sequence, text beyond ASCII, an unknown VR, and whatever contradicts itself. Pixels are not read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from struct import Struct, error
from typing import BinaryIO, NamedTuple, cast

from catalog import encoding, pixels, privacy
from catalog.encoding import LONGEST, LOOKED_INTO, UnsureError, code
from catalog.errors import FileError
from catalog.pixels import Pixels
from catalog.records import Frame, Instance

# Bytes from the start of a file: the header of a cardiac MR takes 3 KB, of a CT 10 KB; a private element may take more than a megabyte.
PREFIXES = (16 * 1024, 128 * 1024, 1024 * 1024, 8 * 1024 * 1024)

_DOUBLE = Struct("<d").unpack_from

_SOP_CLASS = 0x00080016
_SOP_INSTANCE = 0x00080018
_STUDY_DATE = 0x00080020
_MODALITY = 0x00080060
_PATIENT_ID = privacy.PATIENT_ID
_AGE = privacy.AGE
_IDENTITY_REMOVED = 0x00120062
_SLICE_THICKNESS = 0x00180050
_TRIGGER_TIME = 0x00181060
_GANTRY_TILT = 0x00181120
_STUDY = 0x0020000D
_SERIES = 0x0020000E
_SERIES_NUMBER = 0x00200011
_INSTANCE_NUMBER = 0x00200013
_IMAGE_POSITION = 0x00200032
_IMAGE_ORIENTATION = 0x00200037
_FRAME_OF_REFERENCE = 0x00200052
_IMAGES_IN_ACQUISITION = 0x00201002
_TRIGGER_DELAY = 0x00209153
_SAMPLES = 0x00280002
_PHOTOMETRIC = 0x00280004
_PLANAR_CONFIGURATION = 0x00280006
_FRAMES = 0x00280008
_ROWS = 0x00280010
_COLUMNS = 0x00280011
_PIXEL_SPACING = 0x00280030
_BITS_ALLOCATED = 0x00280100
_BITS_STORED = 0x00280101
_PIXEL_REPRESENTATION = 0x00280103
_BURNED_IN = 0x00280301
_WINDOW_CENTER = 0x00281050
_WINDOW_WIDTH = 0x00281051
_INTERCEPT = 0x00281052
_SLOPE = 0x00281053

# What is kept, with the VR it must have (PS3.6): pydicom converts some of it by its VR, and cannot if that is a wrong one.
_KEPT = LOOKED_INTO | {
    tag: code(vr)
    for vr, tags in {
        "CS": (_MODALITY, _PHOTOMETRIC, _IDENTITY_REMOVED, _BURNED_IN),
        "AS": (_AGE,), "DA": (_STUDY_DATE,), "FD": (_TRIGGER_DELAY,), "LO": (_PATIENT_ID,),
        "UI": (_SOP_CLASS, _SOP_INSTANCE, _STUDY, _SERIES, _FRAME_OF_REFERENCE),
        "IS": (_SERIES_NUMBER, _INSTANCE_NUMBER, _IMAGES_IN_ACQUISITION, _FRAMES),
        "DS": (_SLICE_THICKNESS, _TRIGGER_TIME, _IMAGE_POSITION, _IMAGE_ORIENTATION, _PIXEL_SPACING, _WINDOW_CENTER, _WINDOW_WIDTH,
               _INTERCEPT, _SLOPE, _GANTRY_TILT),
        "US": (_SAMPLES, _PLANAR_CONFIGURATION, _ROWS, _COLUMNS, _BITS_ALLOCATED, _BITS_STORED, _PIXEL_REPRESENTATION),
    }.items()
    for tag in tags
} | {tag: code(vr) for vr, tags in privacy.BY_VR.items() for tag in tags}  # fmt: skip

Read = Callable[[int, int], bytes]


class Header(NamedTuple):
    """What a header says: exactly `catalog.dicom.read_instance(path, hash_pixels=False)`.

    `checked` is whether that is all there is to know: a look at the pixels, as for their hash, would add the hash and change nothing
    else. If False, it may take the dtype away (a value uses bits above Bits Stored) or refuse the file (it does not decode).
    """

    instance: Instance
    checked: bool


def read_header(read: Read, size: int) -> Header | None:
    """Return what a file's header says, or None where that takes pydicom.

    Args:
        read: Returns up to so many bytes (the first argument) from an offset (the second), as `functools.partial(os.pread, descriptor)`
            does. It is called with offset 0: once for nearly every file, again with a longer length where the header is longer.
        size: Of the file, in bytes.
    """
    for length in PREFIXES:
        data = read(length, 0)
        try:
            return _parsed(data, size)
        except (UnsureError, FileError):
            return None
        except error:  # the header goes on behind the bytes read
            if length >= size:
                return None
    return None


def parse_header(data: bytes, size: int) -> Header | None:
    """Return what a header says, as `read_header`, from the first bytes of a file, or all of them: None also where they end too soon."""
    try:
        return _parsed(data, size)
    except (UnsureError, FileError, error):
        return None


class _Sized:
    """Stands for a file where only its size is asked for."""

    def __init__(self, size: int) -> None:
        self._size = size

    def seek(self, _offset: int, _whence: int) -> int:
        return self._size


def _parsed(data: bytes, size: int) -> Header:
    """Raises `UnsureError`, struct's error where data ends within the header, FileError where `pixels.check` refuses."""
    syntax, meta_uid, values, vr, offset, length = encoding.find(data, _KEPT)
    image = Pixels(
        file=cast(BinaryIO, _Sized(size)),
        keyword="PixelData",
        vr=vr,
        offset=offset,
        length=length,
        transfer_syntax=syntax,
        rows=_unsigned(values, _ROWS),
        columns=_unsigned(values, _COLUMNS),
        samples=_unsigned(values, _SAMPLES),
        photometric=_text(values, _PHOTOMETRIC).strip(),
        planar=_unsigned(values, _PLANAR_CONFIGURATION) if _PLANAR_CONFIGURATION in values else None,
        bits_allocated=_unsigned(values, _BITS_ALLOCATED),
        bits_stored=_unsigned(values, _BITS_STORED),
        representation=_unsigned(values, _PIXEL_REPRESENTATION),
        number_of_frames=_number_of_frames(values),
        extended_offsets=None,
        modality_lut=False,
    )
    if not image.rows or not image.columns:
        raise UnsureError
    pixels.check(image)
    dtype = pixels.plain_dtype(image)
    name = None if dtype is None else dtype.str
    frame_bytes = 0 if dtype is None else image.frame_bytes
    position = _floats(values, _IMAGE_POSITION, 3)
    orientation = _floats(values, _IMAGE_ORIENTATION, 6)
    spacing = _floats(values, _PIXEL_SPACING, 2)
    along = _along_normal(position, orientation)
    thickness = _number(values, _SLICE_THICKNESS)
    trigger = _number(values, _TRIGGER_TIME)
    if trigger is None:
        trigger = _double(values, _TRIGGER_DELAY)
    slope, intercept = _rescale(values, _SLOPE, 1.0), _rescale(values, _INTERCEPT, 0.0)
    center, width = _number(values, _WINDOW_CENTER), _number(values, _WINDOW_WIDTH)
    # The header's position is that of the first frame; where the others lie, a classic multi-frame object does not say.
    frames = tuple(
        Frame(
            frame=index,
            rows=image.rows,
            columns=image.columns,
            samples_per_pixel=image.samples,
            photometric=image.photometric,
            bits_stored=image.bits_stored,
            pixel_spacing=spacing,  # type: ignore[arg-type]
            image_position=None if index else position,  # type: ignore[arg-type]
            image_orientation=orientation,  # type: ignore[arg-type]
            position=None if index else along,
            slice_thickness=thickness,
            trigger_time=trigger,
            slope=slope,
            intercept=intercept,
            window_center=center,
            window_width=width,
            pixel_hash=None,
            offset=None if name is None else offset + index * frame_bytes,
            length=frame_bytes,
            dtype=name,
        )
        for index in range(image.number_of_frames)
    )
    identifying, over_89 = privacy.told(tuple(map(values.get, privacy.ASKED)))
    instance = Instance(
        patient_id=_text(values, _PATIENT_ID),
        study_instance_uid=_text(values, _STUDY),
        series_instance_uid=_text(values, _SERIES),
        sop_instance_uid=_text(values, _SOP_INSTANCE),
        sop_class_uid=_text(values, _SOP_CLASS),
        modality=_text(values, _MODALITY),
        series_number=_whole_number(values, _SERIES_NUMBER),
        study_date=_text(values, _STUDY_DATE),
        instance_number=_whole_number(values, _INSTANCE_NUMBER),
        images_in_acquisition=_whole_number(values, _IMAGES_IN_ACQUISITION),
        frame_of_reference_uid=_text(values, _FRAME_OF_REFERENCE),
        transfer_syntax_uid=syntax,
        number_of_frames=image.number_of_frames,
        frames=frames,
        burned_in_annotation=_text(values, _BURNED_IN),
        identity_removed=_text(values, _IDENTITY_REMOVED),
        over_89=over_89,
        identifying=identifying,
        gantry_tilt=_number(values, _GANTRY_TILT),
        other_meta_uid=meta_uid not in (b"", values.get(_SOP_INSTANCE, b"").rstrip(b"\0 ")),
        surplus_bytes=image.surplus_bytes,
    )
    return Header(instance, checked=name is not None and image.bits_stored == image.bits_allocated)


def _text(values: dict[int, bytes], tag: int) -> str:
    value = values.get(tag, b"").rstrip(b"\0 ")
    if not value.isascii():
        raise UnsureError
    return value.decode("ascii").replace("\0", "\ufffd")


def _unsigned(values: dict[int, bytes], tag: int) -> int:
    value = values.get(tag, b"")
    if len(value) != 2:
        raise UnsureError
    return value[0] | value[1] << 8


def _number_of_frames(values: dict[int, bytes]) -> int:
    text = values.get(_FRAMES, b"").strip(b"\0 ")
    try:
        frames = int(text or b"1")
    except ValueError:
        raise UnsureError from None
    if frames < 0:
        raise UnsureError
    return max(frames, 1)


def _whole_number(values: dict[int, bytes], tag: int) -> int | None:
    try:
        value = int(values.get(tag, b"").split(b"\\")[0].strip(b"\0 "))
    except ValueError:
        return None
    return value if -(2**31) <= value < 2**31 else None


def _floats(values: dict[int, bytes], tag: int, count: int) -> tuple[float, ...] | None:
    value = values.get(tag, b"")
    if len(value) > LONGEST:
        raise UnsureError
    return _parsed_floats(value, count)


@lru_cache(1024)  # most numbers of a series are those of the file before
def _parsed_floats(value: bytes, count: int) -> tuple[float, ...] | None:
    parts = value.split(b"\\")[:count]
    try:
        numbers = tuple(float(part.strip(b"\0 ")) for part in parts)
    except ValueError:
        return None
    return numbers if len(numbers) == count and all(map(math.isfinite, numbers)) else None


def _number(values: dict[int, bytes], tag: int) -> float | None:
    numbers = _floats(values, tag, 1)
    return None if numbers is None else numbers[0]


def _double(values: dict[int, bytes], tag: int) -> float | None:
    value = values.get(tag, b"")
    if len(value) < 8:
        return None
    (number,) = _DOUBLE(value)
    return float(number) if math.isfinite(number) else None


def _rescale(values: dict[int, bytes], tag: int, default: float) -> float:
    if not values.get(tag, b"").strip(b"\0 "):
        return default
    number = _number(values, tag)
    if number is None:
        raise UnsureError
    return number


def _along_normal(origin: tuple[float, ...] | None, axes: tuple[float, ...] | None) -> float | None:
    if origin is None or axes is None:
        return None
    a, b, c, d, e, f = axes
    normal = (b * f - c * e, c * d - a * f, a * e - b * d)
    return sum(along * component for along, component in zip(origin, normal, strict=True)) if any(normal) else None
