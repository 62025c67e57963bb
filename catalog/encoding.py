"""Where the elements of a DICOM file lie in its bytes (PS3.5 7.1 and 7.5, PS3.10 7.1), found without pydicom, or not at all.

Understood are Explicit and Implicit VR Little Endian, and File Meta Information of compressed pixels, whose elements are in ascending
order, each once, up to Pixel Data. Whatever else a file does, and whatever in it would change how the rest is to be read, is for pydicom:
`UnsureError`. What values mean is for `catalog.header` to say.
"""

from __future__ import annotations

from functools import lru_cache
from struct import Struct
from typing import NamedTuple

from catalog import pixels

LONGEST = 256  # bytes of a value whose reading is remembered
_DEEPEST = 16  # sequences in one another

_IMPLICIT_SYNTAX, _EXPLICIT_SYNTAX = pixels.LITTLE_ENDIAN

_EXPLICIT = Struct("<HHHH").unpack_from  # group, element, VR, length of those VRs that have a short one
_IMPLICIT = Struct("<HHL").unpack_from
_GROUP_LENGTH = Struct("<HHHHL").unpack_from
_LENGTH = Struct("<L").unpack_from


def code(vr: str) -> int:
    """Return a VR as `_EXPLICIT` reads it."""
    return int.from_bytes(vr.encode(), "little")


# What PS3.5, PS3.6 and PS3.10 say stands here, and is tested against pydicom's own tables: importing pydicom takes 0.2 s, which each
# reading process would begin with.
_SHORT_VR = frozenset(map(code, (
    "AE", "AS", "AT", "CS", "DA", "DS", "DT", "FD", "FL", "IS", "LO", "LT", "PN", "SH", "SL", "SS", "ST", "TM", "UI", "UL", "US",
)))  # fmt: skip
_LONG_VR = frozenset(map(code, ("OB", "OD", "OF", "OL", "OV", "OW", "SQ", "SV", "UC", "UN", "UR", "UT", "UV")))
_CS, _OB, _OW, _SQ, _UL = map(code, ("CS", "OB", "OW", "SQ", "UL"))
_UNDEFINED = 0xFFFFFFFF
_EMPTY_ITEM = b"\xfe\xff\x00\xe0\0\0\0\0"
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD

_META_SOP_INSTANCE = 0x00020003
_TRANSFER_SYNTAX = 0x00020010
_LAST_META = 0x0002FFFF
_CHARACTER_SET = 0x00080005
_MODALITY_LUT = 0x00283000
_SHARED_GROUPS = 0x52009229
_PER_FRAME_GROUPS = 0x52009230
_FLOAT_PIXELS = 0x7FE00008
_PIXEL_DATA = 0x7FE00010

# File Meta Information: PS3.10 7.1.
_META = {
    0x00020000 | element: code(vr)
    for vr, elements in {
        "UL": (0x00, 0x37), "OB": (0x01, 0x31, 0x35, 0x36, 0x0102), "UI": (0x02, 0x03, 0x10, 0x12, 0x32, 0x33, 0x0100), "SH": (0x13,),
        "AE": (0x16, 0x17, 0x18), "UR": (0x26, 0x27, 0x28), "FD": (0x38,),
    }.items()
    for element in elements
}  # fmt: skip
# What must leave all else as it is, with its VR (PS3.6).
LOOKED_INTO = {_CHARACTER_SET: _CS, _MODALITY_LUT: _SQ, _SHARED_GROUPS: _SQ, _PER_FRAME_GROUPS: _SQ}


class UnsureError(Exception):
    """This file is one for pydicom."""


class Elements(NamedTuple):
    """The elements of a file that were asked for, and where its pixels lie."""

    transfer_syntax: str
    meta_uid: bytes  # Media Storage SOP Instance UID (0002,0003) less its padding; empty where there is none
    values: dict[int, bytes]  # by tag, as they lie in the file
    pixels_vr: str | None  # None where the encoding says none
    pixels_offset: int
    pixels_length: int  # 0xFFFFFFFF: undefined


def find(data: bytes, kept: dict[int, int]) -> Elements:
    """Return what a file's first bytes hold of the elements `kept`.

    Args:
        data: From the file's start to behind the header of Pixel Data, or beyond.
        kept: Tag → the VR that it must have where the file says one, as `code` gives it; LOOKED_INTO is among them.

    Raises:
        UnsureError: If not all up to Pixel Data is understood.
        struct.error: If the data end before Pixel Data.
    """
    syntax, at, meta_uid = _meta(data) if data[128:132] == b"DICM" else (_encoding(data), 0, b"")
    values: dict[int, bytes] = {}
    vr, offset, length = (_implicit if syntax == _IMPLICIT_SYNTAX else _explicit)(data, at, kept, values)
    return Elements(syntax, meta_uid, values, vr, offset, length)


def _encoding(data: bytes) -> str:
    """Return the transfer syntax of a file without preamble and File Meta Information: nothing else is possible if it is uncompressed."""
    group, element, vr, length = _EXPLICIT(data, 0)
    if group != 8 or len(data) < 132:
        raise UnsureError
    if vr in _SHORT_VR or vr in _LONG_VR:
        return _EXPLICIT_SYNTAX
    if element <= 0x0100 and length == 0 and vr <= 1024:  # as `catalog.dicom` tells it from what is no DICOM file
        return _IMPLICIT_SYNTAX
    raise UnsureError


def _meta(data: bytes) -> tuple[str, int, bytes]:
    """Return the transfer syntax, where the dataset begins, and the SOP Instance UID of File Meta Information.

    It must be as long as it says (PS3.10 7.1).
    """
    group, element, vr, length, meta = _GROUP_LENGTH(data, 132)
    if (group, element, vr, length) != (2, 0, _UL, 4):
        raise UnsureError
    at = 144
    end = at + meta
    last, syntax, uid = 0x00020000, b"", b""
    while at < end:
        group, element, vr, length = _EXPLICIT(data, at)
        tag = group << 16 | element
        if tag <= last or vr != _META.get(tag):
            raise UnsureError
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
        raise UnsureError
    return known, at, uid


@lru_cache
def _compressed(syntax: str) -> bool:
    from pydicom import uid as uids

    return syntax in uids.AllTransferSyntaxes and uids.UID(syntax).is_encapsulated


def _explicit(data: bytes, at: int, kept: dict[int, int], values: dict[int, bytes]) -> tuple[str | None, int, int]:
    """Collect the values of `kept` up to Pixel Data; return its VR, offset and length."""
    last = _LAST_META
    while True:
        group, element, vr, length = _EXPLICIT(data, at)
        if (tag := group << 16 | element) <= last:
            raise UnsureError
        if vr in _SHORT_VR:
            at += 8
        elif vr in _LONG_VR:
            (length,) = _LENGTH(data, at + 8)
            at += 12
            if tag >= _FLOAT_PIXELS:
                if tag != _PIXEL_DATA or vr not in (_OB, _OW) or last >= _FLOAT_PIXELS:
                    raise UnsureError
                return "OB" if vr == _OB else "OW", at, length
            if length == _UNDEFINED:
                if tag in kept or vr != _SQ:
                    raise UnsureError
                at = _behind_sequence(data, at, explicit=True)
                last = tag
                continue
        else:
            raise UnsureError
        if tag in kept:
            values[tag] = value = data[at : at + length]
            if vr != kept[tag] or (tag in LOOKED_INTO and not _harmless(tag, value)):
                raise UnsureError
        at += length
        last = tag


def _implicit(data: bytes, at: int, kept: dict[int, int], values: dict[int, bytes]) -> tuple[str | None, int, int]:
    """As `_explicit`."""
    if data[at + 4 : at + 6].isalpha():  # a VR where none should be: pydicom changes to explicit
        raise UnsureError
    last = _LAST_META
    while True:
        group, element, length = _IMPLICIT(data, at)
        tag = group << 16 | element
        at += 8
        if tag <= last:
            raise UnsureError
        last = tag
        if tag >= _FLOAT_PIXELS:
            if tag != _PIXEL_DATA:
                raise UnsureError
            return None, at, length
        if length == _UNDEFINED:
            if tag in kept or not _is_sequence(data, at, tag):
                raise UnsureError
            at = _behind_sequence(data, at, explicit=False)
            continue
        if tag in kept:
            values[tag] = value = data[at : at + length]
            if tag in LOOKED_INTO and not _harmless(tag, value):
                raise UnsureError
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
        raise UnsureError
    while True:
        group, element, length = _IMPLICIT(data, at)
        tag = group << 16 | element
        at += 8
        if tag == _SEQUENCE_END and length == 0:
            return at
        if tag != _ITEM:
            raise UnsureError
        at = _behind_item(data, at, None if length == _UNDEFINED else at + length, explicit=explicit, depth=depth)


def _behind_item(data: bytes, at: int, end: int | None, *, explicit: bool, depth: int) -> int:
    last = 0
    while end is None or at < end:
        group, element, vr, length = _EXPLICIT(data, at)
        tag = group << 16 | element
        if tag == _ITEM_END and end is None and vr == length == 0:
            return at + 8
        if tag <= last or group >= 0xFFFE:
            raise UnsureError
        last = tag
        if not explicit or vr in _LONG_VR:
            at += 12 if explicit else 8
            (length,) = _LENGTH(data, at - 4)
        elif vr in _SHORT_VR:
            at += 8
        else:
            raise UnsureError
        if tag == _CHARACTER_SET and ((explicit and vr != _CS) or not _harmless(tag, data[at : at + length])):
            raise UnsureError
        if length == _UNDEFINED:
            if not (vr == _SQ if explicit else _is_sequence(data, at, tag)):
                raise UnsureError
            at = _behind_sequence(data, at, explicit=explicit, depth=depth + 1)
        else:
            at += length
    if at != end:
        raise UnsureError
    return at


def _harmless(tag: int, value: bytes) -> bool:
    """Whether an element of `LOOKED_INTO` leaves all else as it is."""
    if tag == _CHARACTER_SET:
        return len(value) <= LONGEST and _known_character_set(value)
    # OsiriX writes a functional group with nothing in it into classic images, such as Sunnybrook's.
    return tag != _MODALITY_LUT and value == _EMPTY_ITEM * (len(value) // 8)


@lru_cache
def _known_character_set(value: bytes) -> bool:
    """Whether pydicom knows each of the character sets: it guesses what others might be."""
    if value.rstrip() in (b"", b"ISO_IR 6", b"ISO_IR 100", b"ISO_IR 192"):
        return True
    from pydicom.charset import python_encoding

    return all(part.rstrip("\0 ") in python_encoding for part in value.decode("latin-1").split("\\"))
