"""Stored values out of one DICOM object: as they lie in the file, or through pydicom's decoders, one frame at a time.

What a header says about sizes is believed only as far as the bytes bear it out, so that a damaged one neither takes all memory nor
gives another image.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom import uid as uids
from pydicom.encaps import encapsulate, generate_frames, get_frame
from pydicom.pixels import get_decoder

from catalog.elements import named
from catalog.errors import FileError
from catalog.pixels import BIG_ENDIAN, DEFLATED, UNCOMPRESSED, Pixels, fits, plain_dtype

Array = npt.NDArray[Any]

# In this order because Pillow, which is always there, then decides what lossy pixels are with and without the extra `codecs`.
_PLUGINS = ("pillow", "pyjpegls", "pylibjpeg", "pydicom")
# PS3.5 G.3.1: two bytes of run-length encoding give at most 128.
_RLE_RATIO = 64
_ITEM, _DELIMITER = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0"


def hashes(pixels: Pixels) -> tuple[np.dtype[Any] | None, list[bytes]]:
    """Return the dtype where frames can be read by offset, and the sha256 of each frame as `decoded` gives it, little endian.

    Unlike `plain_dtype` this knows whether unused high bits are used.
    """
    dtype = plain_dtype(pixels)
    if dtype is not None:
        found = []
        pixels.file.seek(pixels.offset)
        for _ in range(pixels.number_of_frames):
            stored = pixels.file.read(pixels.frame_bytes)
            if not fits(stored, dtype, pixels.bits_stored):
                break
            found.append(hashlib.sha256(stored).digest())
        else:
            return dtype, found
    return None, [hashlib.sha256(frame.astype(frame.dtype.newbyteorder("<"), copy=False).data).digest() for frame in all_decoded(pixels)]


def decoded(pixels: Pixels, index: int) -> Array:
    """Return one frame's stored values: (rows, columns) or (rows, columns, samples), C order, native byte order, a new array.

    Raises:
        FileError: ``unreadable``, ``truncated`` or ``no-decoder``.
    """
    with _decoding(pixels):
        if pixels.transfer_syntax in UNCOMPRESSED:
            return _uncompressed(pixels, index)
        _check_fragments(pixels)
        pixels.file.seek(pixels.offset)
        encoded = get_frame(
            pixels.file, index, number_of_frames=pixels.number_of_frames, extended_offsets=pixels.extended_offsets
        )  # fmt: skip
        return _uncompress(pixels, encoded)


def all_decoded(pixels: Pixels) -> Iterator[Array]:
    count = 0
    with _decoding(pixels):
        if pixels.transfer_syntax in UNCOMPRESSED:
            for index in range(pixels.number_of_frames):
                yield _uncompressed(pixels, index)
            return
        _check_fragments(pixels)
        pixels.file.seek(pixels.offset)
        every = generate_frames(pixels.file, number_of_frames=pixels.number_of_frames, extended_offsets=pixels.extended_offsets)
        # The header is believed: pydicom yields more where there are more fragments than frames.
        for count, encoded in zip(range(1, pixels.number_of_frames + 1), every, strict=False):  # noqa: B007
            yield _uncompress(pixels, encoded)
    if count != pixels.number_of_frames:
        raise FileError("truncated", f"{named(0x7FE00010)} has {count} frames where {named(0x00280008)} says {pixels.number_of_frames}")


def decoder(pixels: Pixels) -> Any:
    """Return pydicom's decoder. A deflated object was inflated: what remains is explicit little endian."""
    syntax = uids.ExplicitVRLittleEndian if pixels.transfer_syntax == DEFLATED else uids.UID(pixels.transfer_syntax)
    try:
        found = get_decoder(syntax)
    except NotImplementedError:
        # The UID itself is shown only if the standard knows it: a private one could hold anything.
        name = syntax.name if syntax.name != syntax else "none of the standard's"
        raise FileError("no-decoder", f"{named(0x00020010)} is {name}, which pydicom cannot decode") from None
    if not found.is_available:
        raise FileError("no-decoder", f"no decoder for {syntax.name} is installed; `pip install 'scanfeed[codecs]'` adds decoders")
    return found


@contextmanager
def _decoding(pixels: Pixels) -> Iterator[None]:
    """Turn what pydicom raises while it decodes into a FileError. It is given the Image Pixel module alone, no identifying tag."""
    try:
        yield
    except FileError:
        raise
    except MemoryError:
        raise FileError("unreadable", "its pixels take more memory than there is") from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise _undecodable(pixels, f"{type(error).__name__}: {error}") from None


def _undecodable(pixels: Pixels, reason: str) -> FileError:
    name = uids.UID(pixels.transfer_syntax).name
    return FileError("unreadable", f"its pixels cannot be decoded as {name}: {' '.join(reason.split())[:300]}")


def _options(pixels: Pixels) -> dict[str, Any]:
    return {
        "rows": pixels.rows, "columns": pixels.columns, "samples_per_pixel": pixels.samples, "bits_allocated": pixels.bits_allocated,
        "bits_stored": pixels.bits_stored, "photometric_interpretation": pixels.photometric, "planar_configuration": pixels.planar or 0,
        "pixel_representation": pixels.representation or 0, "pixel_keyword": pixels.keyword, "pixel_vr": pixels.vr,
    }  # fmt: skip


def _uncompressed(pixels: Pixels, index: int) -> Array:
    if pixels.bits_allocated == pixels.samples == 1 and pixels.transfer_syntax != BIG_ENDIAN:
        # pydicom 3.0.2 reads too few bytes for a frame that straddles one byte more than its own length takes.
        return _unpacked(pixels, index)
    pixels.file.seek(pixels.offset)
    stored, _ = decoder(pixels).as_array(pixels.file, index=index, number_of_frames=pixels.number_of_frames, **_options(pixels))
    return np.ascontiguousarray(stored, dtype=stored.dtype.newbyteorder("="))


def _unpacked(pixels: Pixels, index: int) -> Array:
    """Return a frame of single bits as uint8: bits run on across rows and frames, the first in the lowest place (PS3.5 8.1.1, 8.2)."""
    count = pixels.rows * pixels.columns
    first, skipped = divmod(index * count, 8)
    pixels.file.seek(pixels.offset + first)
    stored = np.frombuffer(pixels.file.read(-(-(skipped + count) // 8)), np.uint8)
    return np.unpackbits(stored, bitorder="little")[skipped : skipped + count].reshape(pixels.rows, pixels.columns)


def _uncompress(pixels: Pixels, encoded: bytes) -> Array:
    """Return one compressed frame decoded. Each frame by itself: pydicom's iterator carries one frame's properties on to the next."""
    _check_size(pixels, encoded)
    found, reasons = decoder(pixels), []
    source = encapsulate([encoded], has_bot=False)
    # GDCM ends the whole process on some damaged frames, so it is asked only where nothing else is installed; pylibjpeg never returns
    # from some damaged JPEG-LS, so it is not asked after another.
    plugins = [name for name in _PLUGINS if name in found.available_plugins] or list(found.available_plugins)
    for plugin in plugins[:1] if pixels.transfer_syntax in uids.JPEGLSTransferSyntaxes else plugins:
        try:
            stored, _ = found.as_array(source, index=0, number_of_frames=1, decoding_plugin=plugin, **_options(pixels))
        except MemoryError:
            raise
        except BaseException as error:
            # Decoders raise whatever their C libraries do; Rust's panic in pylibjpeg is no Exception.
            if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
                raise
            # pydicom names the plugin in a message of its own.
            text = " ".join(str(error).split()).removeprefix("Unable to decode as exceptions were raised by all available plugins: ")
            reasons.append(text if text.startswith(plugin) else f"{plugin}: {text}")
            continue
        return np.ascontiguousarray(stored, dtype=stored.dtype.newbyteorder("="))
    if found.missing_dependencies and pixels.transfer_syntax != uids.RLELossless:  # pydicom itself knows all of RLE
        tried, name = ", ".join(found.available_plugins), uids.UID(pixels.transfer_syntax).name
        advice = "`pip install 'scanfeed[codecs]'` adds decoders"
        raise FileError("no-decoder", f"what is installed ({tried}) cannot decode it as {name}; {advice}")
    raise _undecodable(pixels, "; ".join(reasons))


def _check_fragments(pixels: Pixels) -> None:
    """Refuse compressed pixels whose fragments (PS3.5 A.4) go on beyond the end of the file: a decoder would fill in the rest."""
    file = pixels.file
    size = file.seek(0, os.SEEK_END)
    at, fragments = pixels.offset, -1  # the first item is the offset table
    while True:
        file.seek(at)
        head = file.read(8)
        if head[:4] == _DELIMITER or (not head and fragments >= pixels.number_of_frames):
            break
        at += 8
        if len(head) == 8 and head[:4] != _ITEM:
            raise FileError("unreadable", f"{named(0x7FE00010)} is not made of items as compressed pixels are, so it cannot be decoded")
        if len(head) < 8 or at + (length := struct.unpack("<L", head[4:])[0]) > size:
            raise FileError("truncated", f"{named(0x7FE00010)} goes on beyond the end of the file, so the file is cut off")
        at += length
        fragments += 1
    if fragments < pixels.number_of_frames and not pixels.extended_offsets:
        raise FileError("truncated", f"{named(0x7FE00010)} has {fragments} frames where {named(0x00280008)} says {pixels.number_of_frames}")


def _check_size(pixels: Pixels, encoded: bytes) -> None:
    """Refuse a compressed frame of another size than the header's, before a decoder makes room for either."""
    if pixels.transfer_syntax == uids.RLELossless:
        if pixels.rows * pixels.columns * pixels.samples * pixels.bits_allocated > 8 * _RLE_RATIO * len(encoded):
            raise FileError(
                "truncated", f"a frame of {len(encoded)} bytes cannot hold {pixels.rows}×{pixels.columns}×{pixels.samples} values"
            )
        return
    coded = _jpeg_2000_size(encoded) if encoded[:2] != b"\xff\xd8" else _jpeg_size(encoded)
    if coded is not None and coded != (pixels.rows, pixels.columns, pixels.samples):
        found = "×".join(map(str, coded))
        raise FileError(
            "unreadable",
            f"a compressed frame says of itself that it is {found} where the header says {pixels.rows}×{pixels.columns}×{pixels.samples}, "
            "so one of the two is damaged",
        )


def _jpeg_size(encoded: bytes) -> tuple[int, int, int] | None:
    """Return rows, columns and components of a JPEG or JPEG-LS frame (ISO/IEC 10918-1 B.2.2); None where it does not say."""
    at = 2
    while len(head := encoded[at : at + 10]) == 10:
        marker, length, _, rows, columns, components = struct.unpack(">HHBHHB", head)
        # Start of frame, but for C4, C8 and CC, which are other things.
        if (0xFFC0 <= marker <= 0xFFCF and marker not in (0xFFC4, 0xFFC8, 0xFFCC)) or marker == 0xFFF7:
            return (rows, columns, components) if rows else None  # 0 rows: a later marker says it
        at += 2 + length
    return None


def _jpeg_2000_size(encoded: bytes) -> tuple[int, int, int] | None:
    """Return rows, columns and components of a JPEG 2000 frame (ISO/IEC 15444-1 A.5.1), in a JP2 file or bare."""
    at = 0
    if encoded[4:8] == b"jP  ":
        while encoded[at + 4 : at + 8] != b"jp2c":
            length = int.from_bytes(encoded[at : at + 4], "big")
            if length < 8 or at + length > len(encoded):  # pydicom would look for the next box for ever
                raise FileError("unreadable", "the boxes around its JPEG 2000 data are damaged, so it cannot be decoded")
            at += length
        at += 8
    head = encoded[at : at + 42]
    if head[:4] != b"\xff\x4f\xff\x51" or len(head) < 42:
        return None
    right, bottom, left, top, *_, components = struct.unpack(">8LH", head[8:42])
    return bottom - top, right - left, components
