"""One DICOM file → its images: where the pixels lie, their geometry, a hash of what they hold; and decoding one frame.

Values are taken from the raw elements and kept as found: real archives hold UIDs that break PS3.5 9.1, dates such as
20120000 and text that fails every VR check. Nothing here validates or rewrites an identifier, and no message repeats one.
"""

import hashlib
import math
import os
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from pydicom import uid as uids
from pydicom.charset import decode_bytes
from pydicom.dataset import Dataset
from pydicom.filereader import dcmread, read_partial
from pydicom.pixels import get_decoder, iter_pixels, pixel_array
from pydicom.tag import BaseTag, Tag
from pydicom.valuerep import EXPLICIT_VR_LENGTH_32, STANDARD_VR

from catalog.errors import FileError
from catalog.records import Frame, Instance

Array = npt.NDArray[Any]


# Names follow PS3.6 so that a message can give tag and name.
_NAMES = {
    0x00020010: "Transfer Syntax UID",
    0x00280002: "Samples per Pixel",
    0x00280008: "Number of Frames",
    0x00280010: "Rows",
    0x00280011: "Columns",
    0x00280100: "Bits Allocated",
    0x00280101: "Bits Stored",
    0x00281052: "Rescale Intercept",
    0x00281053: "Rescale Slope",
    0x7FE00010: "Pixel Data",
}

_TRANSFER_SYNTAX = Tag(0x00020010)
_CHARACTER_SET = Tag(0x00080005)
_SOP_CLASS = Tag(0x00080016)
_SOP_INSTANCE = Tag(0x00080018)
_STUDY_DATE = Tag(0x00080020)
_MODALITY = Tag(0x00080060)
_PATIENT_ID = Tag(0x00100020)
_SLICE_THICKNESS = Tag(0x00180050)
_TRIGGER_TIME = Tag(0x00181060)
_CARDIAC_SYNCHRONIZATION = Tag(0x00189118)
_STUDY = Tag(0x0020000D)
_SERIES = Tag(0x0020000E)
_SERIES_NUMBER = Tag(0x00200011)
_INSTANCE_NUMBER = Tag(0x00200013)
_IMAGE_POSITION = Tag(0x00200032)
_IMAGE_ORIENTATION = Tag(0x00200037)
_FRAME_OF_REFERENCE = Tag(0x00200052)
_IMAGES_IN_ACQUISITION = Tag(0x00201002)
_PLANE_POSITION = Tag(0x00209113)
_PLANE_ORIENTATION = Tag(0x00209116)
_TRIGGER_DELAY = Tag(0x00209153)
_SAMPLES = Tag(0x00280002)
_PHOTOMETRIC = Tag(0x00280004)
_FRAMES = Tag(0x00280008)
_ROWS = Tag(0x00280010)
_COLUMNS = Tag(0x00280011)
_PIXEL_SPACING = Tag(0x00280030)
_BITS_ALLOCATED = Tag(0x00280100)
_BITS_STORED = Tag(0x00280101)
_PIXEL_REPRESENTATION = Tag(0x00280103)
_WINDOW_CENTER = Tag(0x00281050)
_WINDOW_WIDTH = Tag(0x00281051)
_INTERCEPT = Tag(0x00281052)
_SLOPE = Tag(0x00281053)
_PIXEL_MEASURES = Tag(0x00289110)
_FRAME_VOI = Tag(0x00289132)
_PIXEL_VALUE_TRANSFORMATION = Tag(0x00289145)
_SHARED_GROUPS = Tag(0x52009229)
_PER_FRAME_GROUPS = Tag(0x52009230)
_PIXEL_DATA = Tag(0x7FE00010)

_HEADER_TAGS: list[BaseTag] = [
    value for name, value in list(globals().items()) if name.startswith("_") and isinstance(value, BaseTag) and value != _PIXEL_DATA
]
# A set, because pydicom's tags compare slowly and this is asked for every element.
_PIXEL_TAGS = frozenset((0x7FE00008, 0x7FE00009, 0x7FE00010))
_UNDEFINED = 0xFFFFFFFF
# Below this the whole file is read at once: parsing asks for the position some 180 times, which memory answers 10 times faster.
_READ_WHOLE = 8 * 1024 * 1024
# A damaged Rows or Columns must not make a decoder ask for all memory there is: compressed data does not say how large it gets.
_MOST_DECODED = 1 << 30
_LITTLE_ENDIAN = (str(uids.ImplicitVRLittleEndian), str(uids.ExplicitVRLittleEndian))
_NATIVE = (*_LITTLE_ENDIAN, str(uids.ExplicitVRBigEndian))
# Groups hold the elements of PS3.3 C.7.6.16: where an element of a frame may stand in an enhanced object.
_IN_GROUP = {
    _IMAGE_POSITION: _PLANE_POSITION,
    _IMAGE_ORIENTATION: _PLANE_ORIENTATION,
    _PIXEL_SPACING: _PIXEL_MEASURES,
    _SLICE_THICKNESS: _PIXEL_MEASURES,
    _INTERCEPT: _PIXEL_VALUE_TRANSFORMATION,
    _SLOPE: _PIXEL_VALUE_TRANSFORMATION,
    _WINDOW_CENTER: _FRAME_VOI,
    _WINDOW_WIDTH: _FRAME_VOI,
    _TRIGGER_DELAY: _CARDIAC_SYNCHRONIZATION,
}


def is_dicom(path: Path | str) -> bool:
    """Whether a file begins as a DICOM file does: ``DICM`` at byte 128, or a first element of group 0002 or 0008.

    Raises:
        FileError: ``unreadable`` if the file cannot be opened or read.
    """
    with _opened(path) as file:
        return _sniff(file)


def read_instance(path: Path | str) -> Instance:
    """Return what one file says about its images, with a hash of each frame's stored values.

    The header is parsed up to the pixel data. Uncompressed little-endian pixels are hashed as they lie; everything else
    is decoded for the hash, which costs about what decoding it costs. For a lossy transfer syntax the decoded values, and
    so the hash, may depend on which decoder is installed.

    Where the pixel data holds more frames than Number of Frames says, the header is believed. A multi-frame object without
    functional groups has the header's position on its first frame only.

    Raises:
        FileError: ``not-dicom``; ``no-pixels`` for an object without an image; ``truncated`` for pixel data shorter than
            the header promises; ``no-decoder`` where the installed decoders cannot decode its transfer syntax;
            ``unreadable`` for the rest. The message does not repeat the path.
    """
    with _opened(path) as file, _quiet():
        header = _read_header(file)
        dtype, hashes = _hash_frames(file, header)
        dataset = header.dataset
        shared = _groups(dataset, _SHARED_GROUPS)
        per_frame = _groups(dataset, _PER_FRAME_GROUPS)
        return Instance(
            patient_id=_text(dataset, _PATIENT_ID),
            study_instance_uid=_text(dataset, _STUDY),
            series_instance_uid=_text(dataset, _SERIES),
            sop_instance_uid=_text(dataset, _SOP_INSTANCE),
            sop_class_uid=_text(dataset, _SOP_CLASS),
            modality=_text(dataset, _MODALITY),
            series_number=_whole_number(dataset, _SERIES_NUMBER),
            study_date=_text(dataset, _STUDY_DATE),
            instance_number=_whole_number(dataset, _INSTANCE_NUMBER),
            images_in_acquisition=_whole_number(dataset, _IMAGES_IN_ACQUISITION),
            frame_of_reference_uid=_text(dataset, _FRAME_OF_REFERENCE),
            transfer_syntax_uid=header.transfer_syntax,
            number_of_frames=header.number_of_frames,
            frames=tuple(
                _frame(header, index, shared[:1], per_frame[index : index + 1], dtype=dtype, pixel_hash=pixel_hash)
                for index, pixel_hash in enumerate(hashes)
            ),
        )


def decode_frame(path: Path | str, frame: int) -> Array:
    """Return the stored values of one frame, decoded by pydicom: before rescale and window.

    Returns:
        (rows, columns), or (rows, columns, samples) for colour, converted to RGB where it was stored as YBR; C order,
        native byte order, a new array. The dtype is that of the stored values, uint8 for single bits.

    Raises:
        FileError: As `read_instance`; ``unreadable`` also if the file does not hold that frame.
    """
    with _opened(path) as file, _quiet():
        header = _read_header(file)
        if not 0 <= frame < header.number_of_frames:
            raise FileError("unreadable", f"frame {frame} is not in it: it holds {header.number_of_frames}, counted from 0")
        with _decoding(header):
            if _single_bits(header):
                return _unpacked(file, header, frame)
            decoded = pixel_array(_pixel_source(file, header), index=frame)
            return np.ascontiguousarray(decoded, dtype=decoded.dtype.newbyteorder("="))


@dataclass(frozen=True, slots=True)
class _Header:
    dataset: Any  # pydicom's; elements up to the pixel data
    transfer_syntax: str
    rows: int
    columns: int
    samples: int
    photometric: str
    bits_allocated: int
    bits_stored: int
    signed: bool
    number_of_frames: int
    offset: int  # of the pixel data's value; meaningless in a deflated file
    length: int  # as the element says, perhaps 0xFFFFFFFF
    integers: bool  # Pixel Data, not Float or Double Float Pixel Data

    @property
    def frame_bytes(self) -> int:
        return self.rows * self.columns * self.samples * self.bits_allocated // 8


@contextmanager
def _opened(path: Path | str) -> Iterator[BinaryIO]:
    try:
        with Path(path).open("rb", buffering=0) as file:
            if os.fstat(file.fileno()).st_size <= _READ_WHOLE:
                yield BytesIO(file.readall())
            else:
                with BufferedReader(file) as buffered:
                    yield buffered
    except OSError as error:
        # strerror, because str(error) repeats the path.
        raise FileError("unreadable", f"it cannot be read: {error.strerror or type(error).__name__}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep pydicom's warnings, which quote values, from the caller; its configuration stays as it is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _sniff(file: BinaryIO) -> bool:
    start = file.read(132)
    file.seek(0)
    if start[128:] == b"DICM":
        return True
    if len(start) < 16:
        return False
    # Files of before 1993, and of writers who leave out the preamble, begin with their first element: PS3.10 7.1.
    if start[4:6].decode("latin-1") in STANDARD_VR:
        return start[:2] in (b"\x02\0", b"\x08\0", b"\0\x02", b"\0\x08")
    group, element, length = struct.unpack("<HHL", start[:8])
    return group in (0x0002, 0x0008) and element <= 0x0100 and length <= 1024


def _read_header(file: BinaryIO) -> _Header:
    if not _sniff(file):
        raise FileError("not-dicom", "neither `DICM` at byte 128 nor a DICOM element at its start, so this is no DICOM file")
    found: list[tuple[int, str | None, int]] = []

    def at_pixels(tag: int, vr: str | None, length: int) -> bool:
        if tag not in _PIXEL_TAGS:
            return False
        found.append((tag, vr, length))
        return True

    try:
        dataset = read_partial(file, stop_when=at_pixels, force=True, specific_tags=_HEADER_TAGS)
    except OSError:
        raise
    except Exception as error:  # a damaged header can raise anything in the parser
        raise FileError("unreadable", f"its header cannot be parsed ({type(error).__name__})") from None

    rows, columns = (_positive_or_no_image(dataset, tag) for tag in (_ROWS, _COLUMNS))
    if not found:
        raise FileError("no-pixels", f"{_named(_PIXEL_DATA)} is missing, so it holds no image")
    transfer_syntax = str(dataset.file_meta.get("TransferSyntaxUID") or "").rstrip("\0 ")
    if not transfer_syntax:
        raise FileError("unreadable", f"{_named(_TRANSFER_SYNTAX)} is missing, so its pixels cannot be decoded")
    tag, vr, length = found[0]
    integers = tag == _PIXEL_DATA
    bits_allocated = _required(dataset, _BITS_ALLOCATED)
    header = _Header(
        dataset=dataset,
        transfer_syntax=transfer_syntax,
        rows=rows,
        columns=columns,
        samples=_required(dataset, _SAMPLES),
        photometric=_text(dataset, _PHOTOMETRIC).strip(),
        bits_allocated=bits_allocated,
        bits_stored=_required(dataset, _BITS_STORED) if integers else bits_allocated,
        signed=_unsigned(dataset, _PIXEL_REPRESENTATION) == 1,
        number_of_frames=_number_of_frames(dataset),
        offset=file.tell() + (12 if vr in EXPLICIT_VR_LENGTH_32 else 8),
        length=length,
        integers=integers,
    )
    if transfer_syntax in _NATIVE and length != _UNDEFINED:
        available = min(length, max(0, file.seek(0, os.SEEK_END) - header.offset))
        bits = header.number_of_frames * rows * columns * header.samples * bits_allocated
        # PS3.3 C.7.6.3.1.2: two pixels share their colour.
        expected = -(-(bits * 2 // 3 if header.photometric == "YBR_FULL_422" else bits) // 8)
        if available < expected:
            raise FileError(
                "truncated",
                f"{_named(_PIXEL_DATA)} has {available} bytes where {header.number_of_frames} frame(s) of "
                f"{rows}×{columns}×{header.samples} at {bits_allocated} bits take {expected}, so the file is cut off or its header wrong",
            )
    return header


def _hash_frames(file: BinaryIO, header: _Header) -> tuple[str | None, list[bytes]]:
    """Return the dtype where frames can be read by offset, and each frame's hash."""
    dtype = _plain_dtype(header)
    if dtype is not None:
        hashes = []
        file.seek(header.offset)
        for _ in range(header.number_of_frames):
            stored = file.read(header.frame_bytes)
            if not _fits(stored, dtype, header.bits_stored):
                break
            hashes.append(hashlib.sha256(stored).digest())
        else:
            return dtype.str, hashes
    with _decoding(header):
        # The first frames only: pydicom yields more where the pixel data has room for more than the header says.
        indices = range(header.number_of_frames)
        every = (_unpacked(file, header, at) for at in indices) if _single_bits(header) else iter_pixels(_pixel_source(file, header))
        decoded = zip(indices, every, strict=False)
        hashes = [hashlib.sha256(np.ascontiguousarray(frame, frame.dtype.newbyteorder("<")).data).digest() for _, frame in decoded]
    if len(hashes) != header.number_of_frames:
        raise FileError("truncated", f"{_named(_PIXEL_DATA)} has {len(hashes)} frames where the header says {header.number_of_frames}")
    return None, hashes


def _plain_dtype(header: _Header) -> np.dtype[Any] | None:
    """Return the dtype of pixels that lie in the file as pydicom would decode them, leaving unused high bits aside."""
    plain = (
        header.transfer_syntax in _LITTLE_ENDIAN
        and header.length != _UNDEFINED
        and header.integers
        and header.samples == 1
        and header.bits_allocated in (8, 16, 32)
        and 1 <= header.bits_stored <= header.bits_allocated
        and header.photometric in ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR")
        and _unsigned(header.dataset, _PIXEL_REPRESENTATION) in (0, 1)
    )
    return np.dtype(f"<{'i' if header.signed else 'u'}{header.bits_allocated // 8}") if plain else None


def _fits(stored: bytes, dtype: np.dtype[Any], bits_stored: int) -> bool:
    """Whether no value uses a bit above Bits Stored. pydicom clears those bits (PS3.5 8.1.1), a read by offset would not."""
    if bits_stored == dtype.itemsize * 8:
        return True
    values = np.frombuffer(stored, dtype)
    bits = bits_stored - (dtype.kind == "i")
    return int(values.max()) < 1 << bits and (dtype.kind == "u" or int(values.min()) >= -(1 << bits))


def _pixel_source(file: BinaryIO, header: _Header) -> Any:
    """Return what pydicom's decoders read from: the file, or for a deflated one its image elements in memory."""
    if header.transfer_syntax != uids.DeflatedExplicitVRLittleEndian:
        return file
    file.seek(0)
    dataset = dcmread(file, force=True)
    # Nothing but the image, so that no message of pydicom can quote anything else.
    image = Dataset({element.tag: element for element in dataset.elements() if element.tag >> 16 in (0x0028, 0x7FE0)})
    image.file_meta = dataset.file_meta
    image.set_original_encoding(*dataset.original_encoding)
    return image


@contextmanager
def _decoding(header: _Header) -> Iterator[None]:
    """Turn what pydicom raises while it decodes into a FileError. It sees only the Image Pixel module, no identifying tag."""
    name = uids.UID(header.transfer_syntax).name
    advice = "`pip install 'scanfeed[codecs]'` adds decoders"
    try:
        decoder = get_decoder(uids.UID(header.transfer_syntax))
    except NotImplementedError:
        raise FileError("no-decoder", f"{_named(_TRANSFER_SYNTAX)} is {name}, which pydicom cannot decode") from None
    if not decoder.is_available:
        raise FileError("no-decoder", f"no decoder for {name} is installed; {advice}")
    if header.frame_bytes > _MOST_DECODED:
        raise FileError(
            "unreadable", f"a frame would take {header.frame_bytes} bytes, more than the {_MOST_DECODED} that are decoded at once"
        )
    try:
        yield
    except FileError:
        raise
    except MemoryError:
        raise FileError("unreadable", "its pixels take more memory than there is") from None
    except OSError:
        if decoder.is_native:
            raise
        raise FileError("unreadable", f"its pixels cannot be decoded as {name}") from None
    except Exception as error:  # decoders raise whatever their C libraries do
        if decoder.is_encapsulated and decoder.missing_dependencies:
            tried = ", ".join(decoder.available_plugins)
            raise FileError("no-decoder", f"what is installed ({tried}) cannot decode it as {name}; {advice}") from None
        reason = " ".join(str(error).split())[:300]
        raise FileError("unreadable", f"its pixels cannot be decoded as {name}: {type(error).__name__}: {reason}") from None


def _single_bits(header: _Header) -> bool:
    # pydicom 3.0.2 reads too few bytes for a frame that straddles one byte more than its own length takes.
    return (
        header.bits_allocated == header.bits_stored == header.samples == 1 and header.transfer_syntax in _LITTLE_ENDIAN and header.integers
    )


def _unpacked(file: BinaryIO, header: _Header, index: int) -> Array:
    """Return a frame of single bits as uint8: bits run on across rows and frames, the first in the lowest place (PS3.5 8.1.1, 8.2)."""
    pixels = header.rows * header.columns
    first, skipped = divmod(index * pixels, 8)
    file.seek(header.offset + first)
    stored = np.frombuffer(file.read(-(-(skipped + pixels) // 8)), np.uint8)
    return np.unpackbits(stored, bitorder="little")[skipped : skipped + pixels].reshape(header.rows, header.columns)


def _frame(header: _Header, index: int, shared: list[Any], per_frame: list[Any], *, dtype: str | None, pixel_hash: bytes) -> Frame:
    top = header.dataset
    single = header.number_of_frames == 1 or index == 0

    def where(tag: BaseTag) -> Any:
        """Return the dataset that holds an element for this frame: its own group, the shared one, else the top."""
        for groups in (per_frame, shared):
            for group in groups:
                for item in _groups(group, _IN_GROUP[tag]):
                    if tag in item:
                        return item
        return top

    at_position = where(_IMAGE_POSITION)
    image_position = _floats(at_position, _IMAGE_POSITION, 3) if single or at_position is not top else None
    image_orientation = _floats(where(_IMAGE_ORIENTATION), _IMAGE_ORIENTATION, 6)
    spacing = _floats(where(_PIXEL_SPACING), _PIXEL_SPACING, 2)
    trigger = _number(top, _TRIGGER_TIME)
    return Frame(
        frame=index,
        rows=header.rows,
        columns=header.columns,
        samples_per_pixel=header.samples,
        photometric=header.photometric,
        bits_stored=header.bits_stored,
        pixel_spacing=None if spacing is None else (spacing[0], spacing[1]),
        image_position=None if image_position is None else (image_position[0], image_position[1], image_position[2]),
        image_orientation=None if image_orientation is None else image_orientation[:6],  # type: ignore[arg-type]
        position=_position(image_position, image_orientation),
        slice_thickness=_number(where(_SLICE_THICKNESS), _SLICE_THICKNESS),
        trigger_time=_double(where(_TRIGGER_DELAY), _TRIGGER_DELAY) if trigger is None else trigger,
        slope=_rescale(where(_SLOPE), _SLOPE, 1.0),
        intercept=_rescale(where(_INTERCEPT), _INTERCEPT, 0.0),
        window_center=_number(where(_WINDOW_CENTER), _WINDOW_CENTER),
        window_width=_number(where(_WINDOW_WIDTH), _WINDOW_WIDTH),
        pixel_hash=pixel_hash,
        offset=None if dtype is None else header.offset + index * header.frame_bytes,
        length=0 if dtype is None else header.frame_bytes,
        dtype=dtype,
    )


def _position(origin: tuple[float, ...] | None, axes: tuple[float, ...] | None) -> float | None:
    """Return how far an image lies along its slice normal, in mm. Rows and columns are taken as the unit vectors they should be."""
    if origin is None or axes is None:
        return None
    (a, b, c), (d, e, f) = axes[:3], axes[3:]
    normal = (b * f - c * e, c * d - a * f, a * e - b * d)
    if not any(normal):
        return None
    return sum(along * component for along, component in zip(origin, normal, strict=True))


def _named(tag: int) -> str:
    return f"({tag >> 16:04X},{tag & 0xFFFF:04X}) {_NAMES[tag]}"


def _raw(dataset: Any, tag: BaseTag) -> bytes:
    """Return an element's bytes as they lie in the file, empty where it is missing."""
    element = dataset.get_item(tag)
    value = None if element is None else element.value
    return value if isinstance(value, bytes) else b""


def _text(dataset: Any, tag: BaseTag) -> str:
    value = _raw(dataset, tag).rstrip(b"\0 ")
    if value.isascii():
        text = value.decode("ascii")
    else:
        encodings = dataset.original_character_set
        try:
            text = decode_bytes(value, [encodings] if isinstance(encodings, str) else encodings, set())
        except Exception:  # a character set that Python does not know
            text = value.decode("latin-1")
        text = text.encode("utf-8", "replace").decode("utf-8")
    return text.replace("\0", "\ufffd")


def _unsigned(dataset: Any, tag: BaseTag) -> int | None:
    """Return a US value (PS3.5 6.2: two bytes in the dataset's byte order)."""
    value = _raw(dataset, tag)
    return int.from_bytes(value[:2], "little" if dataset.original_encoding[1] else "big") if len(value) >= 2 else None


def _required(dataset: Any, tag: BaseTag) -> int:
    value = _unsigned(dataset, tag)
    if not value:
        raise FileError("unreadable", f"{_named(tag)} is {'missing' if value is None else '0'}, so its pixels cannot be decoded")
    return value


def _positive_or_no_image(dataset: Any, tag: BaseTag) -> int:
    value = _unsigned(dataset, tag)
    if not value:
        raise FileError("no-pixels", f"{_named(tag)} is {'missing' if value is None else '0'}, so it holds no image")
    return value


def _number_of_frames(dataset: Any) -> int:
    text = _raw(dataset, _FRAMES).strip(b"\0 ")
    if not text:
        return 1
    try:
        frames = int(text)
    except ValueError:
        raise FileError("unreadable", f"{_named(_FRAMES)} is not a whole number, so its pixels cannot be told apart") from None
    if frames < 0:
        raise FileError("unreadable", f"{_named(_FRAMES)} is below 0, so its pixels cannot be told apart")
    # 0 is what some writers of single images say; pydicom reads it so, too.
    return max(frames, 1)


def _whole_number(dataset: Any, tag: BaseTag) -> int | None:
    """Return the first IS value; None where it is missing, no number, or beyond the 32 bits that PS3.5 6.2 allows."""
    try:
        value = int(_raw(dataset, tag).split(b"\\")[0].strip(b"\0 "))
    except ValueError:
        return None
    return value if -(2**31) <= value < 2**31 else None


def _floats(dataset: Any, tag: BaseTag, count: int) -> tuple[float, ...] | None:
    """Return the first `count` DS values; None where there are fewer or one is not a finite number."""
    parts = _raw(dataset, tag).split(b"\\")[:count]
    try:
        values = tuple(float(part.strip(b"\0 ")) for part in parts)
    except ValueError:
        return None
    return values if len(values) == count and all(map(math.isfinite, values)) else None


def _number(dataset: Any, tag: BaseTag) -> float | None:
    values = _floats(dataset, tag, 1)
    return None if values is None else values[0]


def _double(dataset: Any, tag: BaseTag) -> float | None:
    value = _raw(dataset, tag)
    if len(value) < 8:
        return None
    (number,) = struct.unpack("<d" if dataset.original_encoding[1] else ">d", value[:8])
    return float(number) if math.isfinite(number) else None


def _rescale(dataset: Any, tag: BaseTag, default: float) -> float:
    """Return slope or intercept. One that is there but no number is an error: a default would make wrong values of right ones."""
    if not _raw(dataset, tag).strip(b"\0 "):
        return default
    value = _number(dataset, tag)
    if value is None:
        raise FileError("unreadable", f"{_named(tag)} is not a number, so its values have no meaning")
    return value


def _groups(dataset: Any, tag: BaseTag) -> list[Any]:
    """Return the items of a sequence, none where it is missing."""
    if tag not in dataset:
        return []
    try:
        return list(dataset[tag].value or [])
    except Exception as error:
        raise FileError("unreadable", f"({tag >> 16:04X},{tag & 0xFFFF:04X}) cannot be parsed ({type(error).__name__})") from None
