"""Values of a dataset's raw elements, as found: pydicom's own conversion refuses, warns of or rewrites what breaks the standard.

What is missing or of no use is empty or None; only what would make wrong values of right pixels is a FileError.
"""

from __future__ import annotations

import math
import struct
from typing import Any

from pydicom.charset import decode_bytes
from pydicom.datadict import dictionary_description
from pydicom.dataset import Dataset
from pydicom.tag import BaseTag, Tag

from catalog.errors import FileError

_FRAMES = Tag(0x00280008)


def named(tag: int) -> str:
    """Return an element's tag and its name in PS3.6."""
    return f"({tag >> 16:04X},{tag & 0xFFFF:04X}) {dictionary_description(tag)}"


def raw(dataset: Any, tag: BaseTag) -> bytes:
    """Return an element's bytes as they lie in the file, empty where it is missing."""
    element = dataset.get_item(tag, keep_deferred=True)  # else one of no length and an unknown VR is converted, and raises
    value = None if element is None else element.value
    return value if isinstance(value, bytes) else b""


def text(dataset: Any, tag: BaseTag) -> str:
    """Return a text less the padding at its end; what its character set or PostgreSQL cannot hold is U+FFFD."""
    value = raw(dataset, tag).rstrip(b"\0 ")
    if value.isascii():
        found = value.decode("ascii")
    else:
        encodings = dataset.original_character_set
        try:
            found = decode_bytes(value, [encodings] if isinstance(encodings, str) else encodings, set())
        except Exception:  # a character set that Python does not know
            found = value.decode("latin-1")
        found = found.encode("utf-8", "replace").decode("utf-8")
    return found.replace("\0", "\ufffd")


def unsigned(dataset: Any, tag: BaseTag) -> int | None:
    """Return a US value (PS3.5 6.2: two bytes in the dataset's byte order)."""
    value = raw(dataset, tag)
    return int.from_bytes(value[:2], "little" if dataset.original_encoding[1] else "big") if len(value) >= 2 else None


def required(dataset: Any, tag: BaseTag) -> int:
    """Return a US value without which pixels cannot be decoded. Raises FileError if it is missing or 0."""
    value = unsigned(dataset, tag)
    if not value:
        raise FileError("unreadable", f"{named(tag)} is {'missing' if value is None else '0'}, so its pixels cannot be decoded")
    return value


def number_of_frames(dataset: Any) -> int:
    """Return Number of Frames, 1 where it is missing. Raises FileError if it is no such number."""
    value = raw(dataset, _FRAMES).strip(b"\0 ")
    if not value:
        return 1
    try:
        frames = int(value)
    except ValueError:
        raise FileError("unreadable", f"{named(_FRAMES)} is not a whole number, so its pixels cannot be told apart") from None
    if frames < 0:
        raise FileError("unreadable", f"{named(_FRAMES)} is below 0, so its pixels cannot be told apart")
    # 0 is what some writers of single images say; pydicom reads it so, too.
    return max(frames, 1)


def whole_number(dataset: Any, tag: BaseTag) -> int | None:
    """Return the first IS value; None where it is missing, no number, or beyond the 32 bits that PS3.5 6.2 allows."""
    try:
        value = int(raw(dataset, tag).split(b"\\")[0].strip(b"\0 "))
    except ValueError:
        return None
    return value if -(2**31) <= value < 2**31 else None


def floats(dataset: Any, tag: BaseTag, count: int) -> tuple[float, ...] | None:
    """Return the first `count` DS values; None where there are fewer or one is not a finite number."""
    parts = raw(dataset, tag).split(b"\\")[:count]
    try:
        values = tuple(float(part.strip(b"\0 ")) for part in parts)
    except ValueError:
        return None
    return values if len(values) == count and all(map(math.isfinite, values)) else None


def number(dataset: Any, tag: BaseTag) -> float | None:
    """Return the first DS value."""
    values = floats(dataset, tag, 1)
    return None if values is None else values[0]


def double(dataset: Any, tag: BaseTag) -> float | None:
    """Return an FD value."""
    value = raw(dataset, tag)
    if len(value) < 8:
        return None
    (number,) = struct.unpack("<d" if dataset.original_encoding[1] else ">d", value[:8])
    return float(number) if math.isfinite(number) else None


def rescale(dataset: Any, tag: BaseTag, default: float) -> float:
    """Return slope or intercept. One that is there but no number is an error: a default would make wrong values of right ones."""
    if not raw(dataset, tag).strip(b"\0 "):
        return default
    value = number(dataset, tag)
    if value is None:
        raise FileError("unreadable", f"{named(tag)} is not a number, so its values have no meaning")
    return value


def groups(dataset: Any, tag: BaseTag) -> list[Any]:
    """Return the items of a sequence, none where it is missing."""
    if tag not in dataset:
        return []
    try:
        items = list(dataset[tag].value or [])
    except Exception as error:
        raise FileError("unreadable", f"{named(tag)} cannot be parsed ({type(error).__name__})") from None
    if not all(isinstance(item, Dataset) for item in items):
        raise FileError("unreadable", f"{named(tag)} is no sequence, so its header is damaged")
    return items
