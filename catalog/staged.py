"""What a file's rows are COPYed as: lines of the table ``staged`` (`catalog.images`), each with an instance and one of its frames."""

from __future__ import annotations

import hashlib

from catalog.layouts import Image
from catalog.records import Frame, Instance

FRAME_COLUMNS = 20  # of `staged`: those that a frame has of its own
LONGEST_MM = 1e9


def rows(item: Image, found: Instance, patient: str) -> bytes:
    """Return a file's lines for ``COPY staged``."""
    known = all(frame.pixel_hash is not None for frame in found.frames)
    content = hashlib.sha256(b"".join(frame.pixel_hash or b"" for frame in found.frames)).digest() if known and found.frames else None
    head = _line(
        item.entry.path, patient, found.study_instance_uid, found.study_date, found.series_instance_uid, _int4(found.series_number),
        found.modality, found.sop_instance_uid, found.sop_class_uid, _int4(found.instance_number), found.number_of_frames,
        _int4(found.images_in_acquisition), content, found.frame_of_reference_uid, found.transfer_syntax_uid, found.coding,
        found.burned_in_annotation, found.identity_removed, found.over_89, "{" + ",".join(f'"{tag}"' for tag in found.identifying) + "}",
        found.gantry_tilt, found.other_meta_uid, found.surplus_bytes,
    )  # fmt: skip
    if not found.frames:
        return (head + "\t\\N" * FRAME_COLUMNS + "\n").encode(errors="replace")
    lines = []
    for frame in found.frames:
        own = _line(
            frame.frame, frame.rows, frame.columns, frame.samples_per_pixel, frame.photometric, *_spacing(frame.pixel_spacing),
            frame.image_position, frame.image_orientation, _mm(frame.position), _mm(frame.slice_thickness), frame.trigger_time, frame.slope,
            frame.intercept, frame.modality_lut, frame.pixel_hash, frame.offset, frame.length if frame.dtype else None, frame.dtype,
            _unchecked_bits(frame),
        )  # fmt: skip
        lines.append(f"{head}\t{own}\n")
    return "".join(lines).encode(errors="replace")


# What PostgreSQL's text format cannot hold as it is: NUL not at all, the others with a backslash.
ESCAPED = str.maketrans({"\\": r"\\", "\t": r"\t", "\n": r"\n", "\r": r"\r", "\0": "\N{REPLACEMENT CHARACTER}"})


def _line(*values: str | int | float | bool | bytes | tuple[float, ...] | None) -> str:
    """Return values as a part of a line of ``COPY FROM`` in text format."""
    parts = []
    for value in values:
        if isinstance(value, str):
            parts.append(value.translate(ESCAPED))
        elif value is None:
            parts.append(r"\N")
        elif isinstance(value, bytes):
            parts.append(r"\\x" + value.hex())
        elif isinstance(value, tuple):
            parts.append("{" + ",".join(map(repr, value)) + "}")
        else:
            parts.append(repr(value))
    return "\t".join(parts)


def _unchecked_bits(frame: Frame) -> int | None:
    """Return Bits Stored where the pixels were not looked at, and bits above it may be in use."""
    if frame.dtype is None or frame.pixel_hash is not None or frame.bits_stored == 8 * int(frame.dtype[2:]):
        return None
    return frame.bits_stored


def _int4(value: int | None) -> int | None:
    return value if value is not None and -(2**31) <= value < 2**31 else None


def _mm(value: float | None) -> float | None:
    # A damaged header's 1e300 mm would overflow in the views, and one such row would fail every query over all.
    return value if value is not None and abs(value) < LONGEST_MM else None


def _spacing(spacing: tuple[float, float] | None) -> tuple[float | None, float | None]:
    return spacing if spacing and all(0 < value < LONGEST_MM for value in spacing) else (None, None)
