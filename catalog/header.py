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

from catalog import pixels, privacy
from catalog.errors import FileError
from catalog.pixels import Pixels
from catalog.records import Frame, Instance

# Bytes from the start of a file: the header of a cardiac MR takes 3 KB, of a CT 10 KB; a private element may take more than a megabyte.
PREFIXES = (16 * 1024, 128 * 1024, 1024 * 1024, 8 * 1024 * 1024)
_LONGEST = 256  # bytes of a value whose reading is remembered
_DEEPEST = 16  # sequences in one another

_IMPLICIT_SYNTAX, _EXPLICIT_SYNTAX = pixels.LITTLE_ENDIAN

_EXPLICIT = Struct("<HHHH").unpack_from  # group, element, VR, length of those VRs that have a short one
_IMPLICIT = Struct("<HHL").unpack_from
_GROUP_LENGTH = Struct("<HHHHL").unpack_from
_LENGTH = Struct("<L").unpack_from
_DOUBLE = Struct("<d").unpack_from


def _code(vr: str) -> int:
    """Return a VR as `_EXPLICIT` reads it."""
    return int.from_bytes(vr.encode(), "little")


# What PS3.5, PS3.6 and PS3.10 say stands here, and is tested against pydicom's own tables: importing pydicom takes 0.2 s, which each
# reading process would begin with.
_SHORT_VR = frozenset(map(_code, (
    "AE", "AS", "AT", "CS", "DA", "DS", "DT", "FD", "FL", "IS", "LO", "LT", "PN", "SH", "SL", "SS", "ST", "TM", "UI", "UL", "US",
)))  # fmt: skip
_LONG_VR = frozenset(map(_code, ("OB", "OD", "OF", "OL", "OV", "OW", "SQ", "SV", "UC", "UN", "UR", "UT", "UV")))
_CS, _OB, _OW, _SQ, _UL = map(_code, ("CS", "OB", "OW", "SQ", "UL"))
_UNDEFINED = 0xFFFFFFFF
_EMPTY_ITEM = b"\xfe\xff\x00\xe0\0\0\0\0"
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD

_META_SOP_INSTANCE = 0x00020003
_TRANSFER_SYNTAX = 0x00020010
_LAST_META = 0x0002FFFF
_CHARACTER_SET = 0x00080005
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
_MODALITY_LUT = 0x00283000
_SHARED_GROUPS = 0x52009229
_PER_FRAME_GROUPS = 0x52009230
_FLOAT_PIXELS = 0x7FE00008
_PIXEL_DATA = 0x7FE00010

# File Meta Information: PS3.10 7.1.
_META = {
    0x00020000 | element: _code(vr)
    for vr, elements in {
        "UL": (0x00, 0x37), "OB": (0x01, 0x31, 0x35, 0x36, 0x0102), "UI": (0x02, 0x03, 0x10, 0x12, 0x32, 0x33, 0x0100), "SH": (0x13,),
        "AE": (0x16, 0x17, 0x18), "UR": (0x26, 0x27, 0x28), "FD": (0x38,),
    }.items()
    for element in elements
}  # fmt: skip
# What is kept, with the VR it must have (PS3.6): pydicom converts some of it by its VR, and cannot if that is a wrong one.
_KEPT = {
    tag: _code(vr)
    for vr, tags in {
        "CS": (_CHARACTER_SET, _MODALITY, _PHOTOMETRIC, _IDENTITY_REMOVED, _BURNED_IN),
        "AS": (_AGE,), "DA": (_STUDY_DATE,), "FD": (_TRIGGER_DELAY,), "LO": (_PATIENT_ID,),
        "UI": (_SOP_CLASS, _SOP_INSTANCE, _STUDY, _SERIES, _FRAME_OF_REFERENCE),
        "IS": (_SERIES_NUMBER, _INSTANCE_NUMBER, _IMAGES_IN_ACQUISITION, _FRAMES),
        "DS": (_SLICE_THICKNESS, _TRIGGER_TIME, _IMAGE_POSITION, _IMAGE_ORIENTATION, _PIXEL_SPACING, _WINDOW_CENTER, _WINDOW_WIDTH,
               _INTERCEPT, _SLOPE, _GANTRY_TILT),
        "US": (_SAMPLES, _PLANAR_CONFIGURATION, _ROWS, _COLUMNS, _BITS_ALLOCATED, _BITS_STORED, _PIXEL_REPRESENTATION),
        "SQ": (_MODALITY_LUT, _SHARED_GROUPS, _PER_FRAME_GROUPS),
    }.items()
    for tag in tags
} | {tag: _code(vr) for vr, tags in privacy.BY_VR.items() for tag in tags}  # fmt: skip
_LOOKED_INTO = frozenset((_CHARACTER_SET, _MODALITY_LUT, _SHARED_GROUPS, _PER_FRAME_GROUPS))

Read = Callable[[int, int], bytes]


class Header(NamedTuple):
    """What a header says: exactly `catalog.dicom.read_instance(path, hash_pixels=False)`.

    `checked` is whether that is all there is to know: a look at the pixels, as for their hash, would add the hash and change nothing
    else. If False, it may take the dtype away (a value uses bits above Bits Stored) or refuse the file (it does not decode).
    """

    instance: Instance
    checked: bool


class _UnsureError(Exception):
    """This file is one for pydicom."""


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
        except (_UnsureError, FileError):
            return None
        except error:  # the header goes on behind the bytes read
            if length >= size:
                return None
    return None


def parse_header(data: bytes, size: int) -> Header | None:
    """Return what a header says, as `read_header`, from the first bytes of a file, or all of them: None also where they end too soon."""
    try:
        return _parsed(data, size)
    except (_UnsureError, FileError, error):
        return None


class _Sized:
    """Stands for a file where only its size is asked for."""

    def __init__(self, size: int) -> None:
        self._size = size

    def seek(self, _offset: int, _whence: int) -> int:
        return self._size


def _parsed(data: bytes, size: int) -> Header:
    """Raises `_UnsureError`, struct's error where data ends within the header, FileError where `pixels.check` refuses."""
    syntax, at, meta_uid = _meta(data) if data[128:132] == b"DICM" else (_encoding(data), 0, b"")
    explicit = syntax != _IMPLICIT_SYNTAX
    values: dict[int, bytes] = {}
    vr, offset, length = (_explicit if explicit else _implicit)(data, at, values)
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
        raise _UnsureError
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


def _encoding(data: bytes) -> str:
    """Return the transfer syntax of a file without preamble and File Meta Information: nothing else is possible if it is uncompressed."""
    group, element, vr, length = _EXPLICIT(data, 0)
    if group != 8 or len(data) < 132:
        raise _UnsureError
    if vr in _SHORT_VR or vr in _LONG_VR:
        return _EXPLICIT_SYNTAX
    if element <= 0x0100 and length == 0 and vr <= 1024:  # as `catalog.dicom` tells it from what is no DICOM file
        return _IMPLICIT_SYNTAX
    raise _UnsureError


def _meta(data: bytes) -> tuple[str, int, bytes]:
    """Return the transfer syntax, where the dataset begins, and the SOP Instance UID of File Meta Information.

    It must be as long as it says (PS3.10 7.1).
    """
    group, element, vr, length, meta = _GROUP_LENGTH(data, 132)
    if (group, element, vr, length) != (2, 0, _UL, 4):
        raise _UnsureError
    at = 144
    end = at + meta
    last, syntax, uid = 0x00020000, b"", b""
    while at < end:
        group, element, vr, length = _EXPLICIT(data, at)
        tag = group << 16 | element
        if tag <= last or vr != _META.get(tag):
            raise _UnsureError
        last = tag
        if vr in _SHORT_VR:
            at += 8
        else:
            (length,) = _LENGTH(data, at + 8)
            at += 12
        if tag == _TRANSFER_SYNTAX:
            syntax = data[at : at + length]
        elif tag == _META_SOP_INSTANCE:
            uid = data[at : at + length].rstrip(b"\0 ")
        at += length  # of undefined length it lands behind the end
    known = syntax.removesuffix(b"\0").decode("latin-1")
    if at != end or not (known in pixels.LITTLE_ENDIAN or _compressed(known)):
        raise _UnsureError
    return known, at, uid


@lru_cache
def _compressed(syntax: str) -> bool:
    from pydicom import uid as uids

    return syntax in uids.AllTransferSyntaxes and uids.UID(syntax).is_encapsulated


def _explicit(data: bytes, at: int, values: dict[int, bytes]) -> tuple[str | None, int, int]:
    """Collect the values of `_KEPT` up to Pixel Data; return its VR, offset and length."""
    last = _LAST_META
    while True:
        group, element, vr, length = _EXPLICIT(data, at)
        if (tag := group << 16 | element) <= last:
            raise _UnsureError
        if vr in _SHORT_VR:
            at += 8
        elif vr in _LONG_VR:
            (length,) = _LENGTH(data, at + 8)
            at += 12
            if tag >= _FLOAT_PIXELS:
                if tag != _PIXEL_DATA or vr not in (_OB, _OW) or last >= _FLOAT_PIXELS:
                    raise _UnsureError
                return "OB" if vr == _OB else "OW", at, length
            if length == _UNDEFINED:
                if tag in _KEPT or vr != _SQ:
                    raise _UnsureError
                at = _behind_sequence(data, at, explicit=True)
                last = tag
                continue
        else:
            raise _UnsureError
        if tag in _KEPT:
            values[tag] = value = data[at : at + length]
            if vr != _KEPT[tag] or (tag in _LOOKED_INTO and not _harmless(tag, value)):
                raise _UnsureError
        at += length
        last = tag


def _implicit(data: bytes, at: int, values: dict[int, bytes]) -> tuple[str | None, int, int]:
    """As `_explicit`."""
    if data[at + 4 : at + 6].isalpha():  # a VR where none should be: pydicom changes to explicit
        raise _UnsureError
    last = _LAST_META
    while True:
        group, element, length = _IMPLICIT(data, at)
        tag = group << 16 | element
        at += 8
        if tag <= last:
            raise _UnsureError
        last = tag
        if tag >= _FLOAT_PIXELS:
            if tag != _PIXEL_DATA:
                raise _UnsureError
            return None, at, length
        if length == _UNDEFINED:
            if tag in _KEPT or not _is_sequence(data, at, tag):
                raise _UnsureError
            at = _behind_sequence(data, at, explicit=False)
            continue
        if tag in _KEPT:
            values[tag] = value = data[at : at + length]
            if tag in _LOOKED_INTO and not _harmless(tag, value):
                raise _UnsureError
        at += length


def _is_sequence(data: bytes, at: int, tag: int) -> bool:
    """Whether an element of undefined length without VR is a sequence: PS3.6 says so, or, of a private one, its first item."""
    if tag & 0x10000:
        group, element, _ = _IMPLICIT(data, at)
        return bool(group << 16 | element == _ITEM)
    from pydicom.datadict import DicomDictionary

    return tag in DicomDictionary and DicomDictionary[tag][0] == "SQ"


def _behind_sequence(data: bytes, at: int, *, explicit: bool, depth: int = 0) -> int:
    """Return the offset behind a sequence of undefined length, all of which is understood.

    An item's length is not enough: pydicom reads its elements, and they may go beyond it.
    """
    if depth == _DEEPEST:
        raise _UnsureError
    while True:
        group, element, length = _IMPLICIT(data, at)
        tag = group << 16 | element
        at += 8
        if tag == _SEQUENCE_END and length == 0:
            return at
        if tag != _ITEM:
            raise _UnsureError
        at = _behind_item(data, at, None if length == _UNDEFINED else at + length, explicit=explicit, depth=depth)


def _behind_item(data: bytes, at: int, end: int | None, *, explicit: bool, depth: int) -> int:
    last = 0
    while end is None or at < end:
        group, element, vr, length = _EXPLICIT(data, at)
        tag = group << 16 | element
        if tag == _ITEM_END and end is None and vr == length == 0:
            return at + 8
        if tag <= last or group >= 0xFFFE:
            raise _UnsureError
        last = tag
        if not explicit or vr in _LONG_VR:
            at += 12 if explicit else 8
            (length,) = _LENGTH(data, at - 4)
        elif vr in _SHORT_VR:
            at += 8
        else:
            raise _UnsureError
        if tag == _CHARACTER_SET and ((explicit and vr != _CS) or not _harmless(tag, data[at : at + length])):
            raise _UnsureError
        if length == _UNDEFINED:
            if not (vr == _SQ if explicit else _is_sequence(data, at, tag)):
                raise _UnsureError
            at = _behind_sequence(data, at, explicit=explicit, depth=depth + 1)
        else:
            at += length
    if at != end:
        raise _UnsureError
    return at


def _harmless(tag: int, value: bytes) -> bool:
    """Whether an element of `_LOOKED_INTO` leaves all else as it is."""
    if tag == _CHARACTER_SET:
        return len(value) <= _LONGEST and _known_character_set(value)
    # OsiriX writes a functional group with nothing in it into classic images, such as Sunnybrook's.
    return tag != _MODALITY_LUT and value == _EMPTY_ITEM * (len(value) // 8)


@lru_cache
def _known_character_set(value: bytes) -> bool:
    """Whether pydicom knows each of the character sets: it guesses what others might be."""
    if value.rstrip() in (b"", b"ISO_IR 6", b"ISO_IR 100", b"ISO_IR 192"):
        return True
    from pydicom.charset import python_encoding

    return all(part.rstrip("\0 ") in python_encoding for part in value.decode("latin-1").split("\\"))


def _text(values: dict[int, bytes], tag: int) -> str:
    value = values.get(tag, b"").rstrip(b"\0 ")
    if not value.isascii():
        raise _UnsureError
    return value.decode("ascii").replace("\0", "\ufffd")


def _unsigned(values: dict[int, bytes], tag: int) -> int:
    value = values.get(tag, b"")
    if len(value) != 2:
        raise _UnsureError
    return value[0] | value[1] << 8


def _number_of_frames(values: dict[int, bytes]) -> int:
    text = values.get(_FRAMES, b"").strip(b"\0 ")
    try:
        frames = int(text or b"1")
    except ValueError:
        raise _UnsureError from None
    if frames < 0:
        raise _UnsureError
    return max(frames, 1)


def _whole_number(values: dict[int, bytes], tag: int) -> int | None:
    try:
        value = int(values.get(tag, b"").split(b"\\")[0].strip(b"\0 "))
    except ValueError:
        return None
    return value if -(2**31) <= value < 2**31 else None


def _floats(values: dict[int, bytes], tag: int, count: int) -> tuple[float, ...] | None:
    value = values.get(tag, b"")
    if len(value) > _LONGEST:
        raise _UnsureError
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
        raise _UnsureError
    return number


def _along_normal(origin: tuple[float, ...] | None, axes: tuple[float, ...] | None) -> float | None:
    if origin is None or axes is None:
        return None
    a, b, c, d, e, f = axes
    normal = (b * f - c * e, c * d - a * f, a * e - b * d)
    return sum(along * component for along, component in zip(origin, normal, strict=True)) if any(normal) else None
