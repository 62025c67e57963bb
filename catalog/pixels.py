"""The Image Pixel module of a DICOM object (PS3.3 C.7.6.3): what it says, whether it can be, how its pixels lie in the file.

Nothing here reads pixels, and nothing imports pydicom unless something is wrong: that takes 0.2 s of each process.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from catalog.errors import FileError

UNDEFINED = 0xFFFFFFFF
LITTLE_ENDIAN = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1")  # implicit, explicit VR
DEFLATED = "1.2.840.10008.1.2.1.99"
BIG_ENDIAN = "1.2.840.10008.1.2.2"
UNCOMPRESSED = (*LITTLE_ENDIAN, BIG_ENDIAN, DEFLATED)
# Compressed data does not say how large it gets: what a decoder may be asked to make room for, and what a deflated file may become.
MOST_BYTES = 1 << 30
MOST_FRAMES = 1 << 20  # each is a row; the largest whole-slide images have some 300,000
# PS3.3 C.7.6.3.1.2, also the retired ones.
_PHOTOMETRIC = frozenset((
    "MONOCHROME1", "MONOCHROME2", "PALETTE COLOR", "RGB", "HSV", "ARGB", "CMYK",
    "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT", "YBR_PARTIAL_420", "YBR_PARTIAL_422",
))  # fmt: skip
_FLOAT_BITS = {"FloatPixelData": 32, "DoubleFloatPixelData": 64}
_PIXEL_DATA = {"PixelData": 0x7FE00010, "FloatPixelData": 0x7FE00008, "DoubleFloatPixelData": 0x7FE00009}


@dataclass(frozen=True, slots=True)
class Pixels:
    """The Image Pixel module of an object (PS3.3 C.7.6.3), and where its pixels lie."""

    file: BinaryIO  # the file, or what a deflated one inflates to
    keyword: str  # PixelData, FloatPixelData, DoubleFloatPixelData
    vr: str | None
    offset: int  # of the value's first byte in `file`
    length: int  # as the element says, perhaps UNDEFINED
    transfer_syntax: str
    rows: int
    columns: int
    samples: int
    photometric: str
    planar: int | None
    bits_allocated: int
    bits_stored: int  # bits_allocated for floats
    representation: int | None  # 0 unsigned, 1 signed
    number_of_frames: int
    extended_offsets: tuple[bytes, bytes] | None
    modality_lut: bool  # stored values are no values of the modality by slope and intercept

    @property
    def frame_bytes(self) -> int:
        """Bytes of one frame, unpacked and uncompressed."""
        return self.rows * self.columns * self.samples * -(-self.bits_allocated // 8)

    @property
    def uncompressed_bytes(self) -> int:
        """Bytes of all frames as they lie in uncompressed pixel data: single bits are packed across frames."""
        bits = self.number_of_frames * self.rows * self.columns * self.samples * self.bits_allocated
        # PS3.3 C.7.6.3.1.2: two pixels share their colour.
        return -(-(bits * 2 // 3 if self.photometric == "YBR_FULL_422" else bits) // 8)

    @property
    def surplus_bytes(self) -> int:
        """Bytes of uncompressed pixel data beyond that and the byte that makes a length even (PS3.5 7.1.1); 0 for compressed ones."""
        expected = self.uncompressed_bytes
        return max(0, self.length - expected - expected % 2) if self.transfer_syntax in UNCOMPRESSED else 0


def check(pixels: Pixels) -> None:
    """Refuse an Image Pixel module that contradicts itself or the file's size. Reads no pixels.

    Raises:
        FileError: ``unreadable``, ``truncated``, or ``no-decoder`` where nothing installed decodes the transfer syntax.
    """

    def named(tag: int) -> str:
        from catalog import elements

        return elements.named(tag)

    def impossible(tag: int, value: object, allowed: str) -> FileError:
        return FileError("unreadable", f"{named(tag)} is {value} where it must be {allowed}, so its pixels cannot be decoded")

    floats = _FLOAT_BITS.get(pixels.keyword)
    compressed = pixels.transfer_syntax not in UNCOMPRESSED
    if pixels.samples not in (1, 3):
        raise impossible(0x00280002, pixels.samples, "1 or 3")
    if pixels.photometric not in _PHOTOMETRIC:
        raise FileError(
            "unreadable", f"{named(0x00280004)} is {'unknown' if pixels.photometric else 'missing'}, so its pixels have no meaning"
        )
    if pixels.photometric.startswith("YBR") and pixels.samples != 3:
        raise impossible(0x00280002, pixels.samples, f"3 for {pixels.photometric}")
    if pixels.samples == 3 and not compressed and pixels.planar not in (0, 1):
        raise impossible(0x00280006, "missing" if pixels.planar is None else pixels.planar, "0 or 1")
    if floats and pixels.bits_allocated != floats:
        raise impossible(0x00280100, pixels.bits_allocated, f"{floats} for {named(_PIXEL_DATA[pixels.keyword])}")
    if pixels.bits_allocated not in (1, 8, 16, 32, 64):
        raise impossible(0x00280100, pixels.bits_allocated, "1, 8, 16, 32 or 64")
    if not 1 <= pixels.bits_stored <= pixels.bits_allocated:
        raise impossible(0x00280101, pixels.bits_stored, f"1 to {pixels.bits_allocated}, {named(0x00280100)}")
    if not floats and pixels.representation not in (0, 1):
        raise impossible(0x00280103, "missing" if pixels.representation is None else pixels.representation, "0 or 1")
    if pixels.frame_bytes > MOST_BYTES:
        raise FileError("unreadable", f"a frame would take {pixels.frame_bytes} bytes, more than the {MOST_BYTES} that are decoded at once")
    if pixels.number_of_frames > MOST_FRAMES:
        raise FileError("unreadable", f"{named(0x00280008)} is {pixels.number_of_frames}, more than the {MOST_FRAMES} that a file may hold")
    if not compressed and pixels.length == UNDEFINED:
        raise FileError(
            "unreadable",
            f"{named(0x7FE00010)} has no length, as only compressed pixels have, where {named(0x00020010)} says uncompressed, "
            "so how it is encoded is not known",
        )
    available = min(pixels.length, max(0, pixels.file.seek(0, os.SEEK_END) - pixels.offset))
    if compressed:
        from catalog import decoders

        decoders.decoder(pixels)
        expected = 8 * (pixels.number_of_frames + 1)  # an item for the offset table and at least one a frame: PS3.5 A.4
    else:
        expected = pixels.uncompressed_bytes
    if available < expected:
        raise FileError(
            "truncated",
            f"{named(_PIXEL_DATA[pixels.keyword])} has {available} bytes where {pixels.number_of_frames} frame(s) of "
            f"{pixels.rows}×{pixels.columns}×{pixels.samples} at {pixels.bits_allocated} bits take {'at least ' * compressed}{expected}, "
            "so the file is cut off or its header wrong",
        )


def plain_dtype(pixels: Pixels) -> np.dtype[Any] | None:
    """Return the dtype with which frames lie in the file as a decoder gives them, but for unused high bits; None where they do not.

    They do if the values are uncompressed, little endian, whole bytes, and grey, indices of a palette or RGB by pixel, and no lookup
    table stands between them and the values of the modality.
    """
    floats = pixels.keyword in _FLOAT_BITS
    grey = pixels.samples == 1 and pixels.photometric in ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR")
    rgb = pixels.samples == 3 and pixels.photometric == "RGB" and pixels.planar == 0
    if pixels.transfer_syntax not in LITTLE_ENDIAN or pixels.modality_lut or not (grey or rgb):
        return None
    if not floats and pixels.bits_allocated not in (8, 16, 32):
        return None
    return np.dtype(f"<{'f' if floats else 'ui'[pixels.representation or 0]}{pixels.bits_allocated // 8}")


def fits(stored: bytes | memoryview, dtype: np.dtype[Any], bits_stored: int) -> bool:
    """Whether no value uses a bit above Bits Stored. pydicom clears those bits (PS3.5 8.1.1), a read by offset would not."""
    if bits_stored == dtype.itemsize * 8:
        return True
    values = np.frombuffer(stored, dtype)
    bits = bits_stored - (dtype.kind == "i")
    return int(values.max()) < 1 << bits and (dtype.kind == "u" or int(values.min()) >= -(1 << bits))
