"""One DICOM file → its images: where the pixels lie, their geometry, a hash of what they hold; and one frame's values.

Values are taken from the raw elements and kept as found: real archives hold UIDs that break PS3.5 9.1, dates such as
20120000 and text that fails every VR check. Nothing here validates or rewrites an identifier, and no message repeats one.
"""

import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from pydicom import uid as uids
from pydicom.filereader import read_partial
from pydicom.tag import BaseTag, Tag
from pydicom.valuerep import EXPLICIT_VR_LENGTH_32, STANDARD_VR

from catalog import decoders, elements, pixels, privacy
from catalog.decoders import Array
from catalog.elements import named
from catalog.errors import FileError
from catalog.pixels import UNDEFINED, Pixels
from catalog.records import Frame, Instance

_TRANSFER_SYNTAX = Tag(0x00020010)
_CHARACTER_SET = Tag(0x00080005)
_SOP_CLASS = Tag(0x00080016)
_SOP_INSTANCE = Tag(0x00080018)
_STUDY_DATE = Tag(0x00080020)
_MODALITY = Tag(0x00080060)
_PATIENT_ID = Tag(privacy.PATIENT_ID)
_IDENTITY_REMOVED = Tag(0x00120062)
_SLICE_THICKNESS = Tag(0x00180050)
_TRIGGER_TIME = Tag(0x00181060)
_GANTRY_TILT = Tag(0x00181120)
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
_PLANAR = Tag(0x00280006)
_FRAMES = Tag(0x00280008)
_ROWS = Tag(0x00280010)
_COLUMNS = Tag(0x00280011)
_PIXEL_SPACING = Tag(0x00280030)
_BITS_ALLOCATED = Tag(0x00280100)
_BITS_STORED = Tag(0x00280101)
_PIXEL_REPRESENTATION = Tag(0x00280103)
_BURNED_IN = Tag(0x00280301)
_WINDOW_CENTER = Tag(0x00281050)
_WINDOW_WIDTH = Tag(0x00281051)
_INTERCEPT = Tag(0x00281052)
_SLOPE = Tag(0x00281053)
_MODALITY_LUT = Tag(0x00283000)
_PIXEL_MEASURES = Tag(0x00289110)
_FRAME_VOI = Tag(0x00289132)
_PIXEL_VALUE_TRANSFORMATION = Tag(0x00289145)
_SHARED_GROUPS = Tag(0x52009229)
_PER_FRAME_GROUPS = Tag(0x52009230)
_EXTENDED_OFFSETS = Tag(0x7FE00001)
_EXTENDED_LENGTHS = Tag(0x7FE00002)

_HEADER_TAGS: list[BaseTag] = [value for name, value in list(globals().items()) if name.startswith("_") and isinstance(value, BaseTag)]
_HEADER_TAGS += map(Tag, privacy.ASKED)
_META_SOP_INSTANCE = Tag(0x00020003)
_LUT_DESCRIPTOR, _LUT_DATA = Tag(0x00283002), Tag(0x00283006)
_PIXEL_DATA = 0x7FE00010
# Plain numbers, because pydicom's tags compare slowly and this is asked for every element.
_PIXEL_KEYWORDS = {0x7FE00008: "FloatPixelData", 0x7FE00009: "DoubleFloatPixelData", _PIXEL_DATA: "PixelData"}
# Below this the whole file is read at once: parsing asks for the position some 180 times, which memory answers 10 times faster.
_READ_WHOLE = 8 * 1024 * 1024
_BUFFER = 64 * 1024
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


def read_instance(path: Path | str, *, hash_pixels: bool = True) -> Instance:
    """Return what one file says about its images, with a hash of each frame's stored values.

    Uncompressed little-endian pixels are hashed as they lie; everything else is decoded for the hash, which costs about what decoding
    it costs. For a lossy transfer syntax the decoded values, and so the hash, may depend on which decoder is installed.

    With `hash_pixels=False` no pixels are read (a deflated file is inflated all the same): `pixel_hash` is None, damage inside
    compressed data is not noticed, and a dtype is given although bits above Bits Stored may be in use. Who reads by offset then clears
    them: with s = bits allocated − bits stored, ``(values << s) >> s`` in that dtype, which is what a decoder does (PS3.5 8.1.1).

    An object without pixels, such as a plan or a report, has no frames. Where the pixel data holds more frames than Number of Frames
    says, the header is believed. A multi-frame object without functional groups has the header's position on its first frame only.
    Where the transfer syntax is missing, the one that the elements' encoding leaves as the only possible one is given.

    A Modality LUT Sequence goes before Rescale Slope and Intercept (PS3.3 C.11.1): frames with `modality_lut` have neither of the two
    and no dtype, and `decode_values` gives their values.

    Raises:
        FileError: ``not-dicom``; ``dicomdir`` for the index of a medium; ``no-pixels`` for an image whose pixels are missing, or for
            nothing that tells what it is; ``truncated`` for a file that ends before what its header promises; ``no-decoder`` where
            the installed decoders cannot decode its transfer syntax; ``unreadable`` for the rest. The message does not repeat the path.
    """
    with _opened(path, whole=hash_pixels) as file, _quiet():
        header = _read_header(file)
        dataset = header.dataset
        frames: list[Frame] = []
        if (image := header.pixels) is not None:
            if image.modality_lut:
                _modality_lut(header)
            if hash_pixels:
                dtype, hashes = decoders.hashes(image)
                frames = [_frame(header, index, dtype, pixel_hash) for index, pixel_hash in enumerate(hashes)]
            else:
                dtype = pixels.plain_dtype(image)
                frames = [_frame(header, index, dtype, None) for index in range(image.number_of_frames)]
        return Instance(
            patient_id=elements.text(dataset, _PATIENT_ID),
            study_instance_uid=elements.text(dataset, _STUDY),
            series_instance_uid=elements.text(dataset, _SERIES),
            sop_instance_uid=elements.text(dataset, _SOP_INSTANCE),
            sop_class_uid=elements.text(dataset, _SOP_CLASS),
            modality=elements.text(dataset, _MODALITY),
            series_number=elements.whole_number(dataset, _SERIES_NUMBER),
            study_date=elements.text(dataset, _STUDY_DATE),
            instance_number=elements.whole_number(dataset, _INSTANCE_NUMBER),
            images_in_acquisition=elements.whole_number(dataset, _IMAGES_IN_ACQUISITION),
            frame_of_reference_uid=elements.text(dataset, _FRAME_OF_REFERENCE),
            transfer_syntax_uid=header.transfer_syntax,
            number_of_frames=len(frames),
            frames=tuple(frames),
            **_said_of_the_whole(header),
        )


def decode_frame(path: Path | str, frame: int) -> Array:
    """Return the stored values of one frame, decoded by pydicom: before rescale and window.

    Returns:
        (rows, columns), or (rows, columns, samples) for colour, converted to RGB where it was stored as YBR; indices where it has a
        palette; C order, native byte order, a new array. The dtype is that of the stored values, uint8 for single bits.

    Raises:
        FileError: As `read_instance`; ``no-pixels`` for every object without pixels, ``unreadable`` for a frame that it does not hold.
    """
    with _opened(path) as file, _quiet():
        return decoders.decoded(_pixels_of(_read_header(file), frame), frame)


def decode_values(path: Path | str, frame: int) -> npt.NDArray[np.float64]:
    """Return one frame's values after the modality transform (PS3.3 C.11.1, C.7.6.16.2.9), in the shape of `decode_frame`.

    That is the Modality LUT where there is one, else ``float64(stored) * slope + intercept`` with the frame's own slope and intercept.

    Raises:
        FileError: As `decode_frame`.
    """
    with _opened(path) as file, _quiet():
        header = _read_header(file)
        image = _pixels_of(header, frame)
        if image.modality_lut:
            first, table = _modality_lut(header)
            # What lies outside the table has the value at its nearer end: PS3.3 C.11.1.1.
            at = np.clip(decoders.decoded(image, frame).astype(np.int64) - first, 0, len(table) - 1)
            return table[at].astype(np.float64)
        rescale = _frame(header, frame, None, None)
        values = decoders.decoded(image, frame).astype(np.float64)
        values *= rescale.slope
        values += rescale.intercept
        return values


@dataclass(frozen=True, slots=True)
class _Header:
    dataset: Any  # pydicom's; elements up to the pixel data
    transfer_syntax: str
    pixels: Pixels | None
    shared: list[Any]  # functional groups of all frames, at most one item
    per_frame: list[Any]


class _Large(BufferedReader):
    """A file whose `read` makes room for no more than there is, whatever length a damaged element gives."""

    def __init__(self, raw: Any, size: int) -> None:
        super().__init__(raw, _BUFFER)
        self._size = size

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(size if size is None or size < _BUFFER else max(0, min(size, self._size - self.tell())))


@contextmanager
def _opened(path: Path | str, *, whole: bool = True) -> Iterator[BinaryIO]:
    try:
        with Path(path).open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if whole and size <= _READ_WHOLE:
                yield BytesIO(file.readall())
            else:
                with _Large(file, size) as buffered:
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
    return begins(start)


def begins(start: bytes) -> bool:
    """Whether these first 132 bytes are a DICOM file's: ``DICM`` at byte 128, or a first element of group 0002 or 0008."""
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
    file, deflated = _inflated(file)
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    tag, vr, length, offset = 0, None, 0, 0

    def at_pixels(at: int, found_vr: str | None, found_length: int) -> bool:
        nonlocal tag, vr, length, offset
        tag, vr, length, offset = int(at), found_vr, found_length, file.tell()
        return tag in _PIXEL_KEYWORDS

    try:
        dataset = read_partial(file, stop_when=at_pixels, force=True, specific_tags=_HEADER_TAGS)
        meta_class, meta_syntax = (
            str(dataset.file_meta.get(name) or "").rstrip("\0 ") for name in ("MediaStorageSOPClassUID", "TransferSyntaxUID")
        )
    except Exception as error:  # a damaged header can raise anything in the parser; its OSErrors without a number are no errors of I/O
        if isinstance(error, OSError) and error.errno is not None:
            raise
        if file.tell() >= size:
            raise FileError("truncated", "it ends within its header, so the file is cut off or a length in it is damaged") from None
        raise FileError("unreadable", f"its header cannot be parsed ({type(error).__name__})") from None
    if meta_syntax == uids.DeflatedExplicitVRLittleEndian:  # one that `_inflated` did not find
        raise FileError("unreadable", "its file meta information is damaged, so what it deflates cannot be read")
    if tag not in _PIXEL_KEYWORDS and length != UNDEFINED and offset + length > size:
        at = f"({tag >> 16:04X},{tag & 0xFFFF:04X})"
        raise FileError("truncated", f"it ends within {at}, so the file is cut off or a length in it is damaged")

    transfer_syntax = str(uids.DeflatedExplicitVRLittleEndian) if deflated else meta_syntax or _encoding(dataset)
    image = None
    if tag in _PIXEL_KEYWORDS:
        if not meta_syntax and length == UNDEFINED:
            raise FileError("unreadable", f"{named(_TRANSFER_SYNTAX)} is missing, so its compressed pixels cannot be decoded")
        keyword = _PIXEL_KEYWORDS[tag]
        bits_allocated = elements.required(dataset, _BITS_ALLOCATED)
        image = Pixels(
            file=file,
            keyword=keyword,
            vr=vr,
            offset=offset,
            length=length,
            transfer_syntax=transfer_syntax,
            rows=elements.required(dataset, _ROWS),
            columns=elements.required(dataset, _COLUMNS),
            samples=elements.required(dataset, _SAMPLES),
            photometric=elements.text(dataset, _PHOTOMETRIC).strip(),
            planar=elements.unsigned(dataset, _PLANAR),
            bits_allocated=bits_allocated,
            bits_stored=elements.required(dataset, _BITS_STORED) if keyword == "PixelData" else bits_allocated,
            representation=elements.unsigned(dataset, _PIXEL_REPRESENTATION),
            number_of_frames=elements.number_of_frames(dataset),
            extended_offsets=(elements.raw(dataset, _EXTENDED_OFFSETS), elements.raw(dataset, _EXTENDED_LENGTHS))
            if _EXTENDED_OFFSETS in dataset
            else None,
            modality_lut=keyword == "PixelData" and bool(elements.groups(dataset, _MODALITY_LUT)),
        )
        pixels.check(image)
    else:
        _check_without_pixels(dataset, meta_class)
    return _Header(
        dataset, transfer_syntax, image, elements.groups(dataset, _SHARED_GROUPS)[:1], elements.groups(dataset, _PER_FRAME_GROUPS)
    )


def _said_of_the_whole(header: _Header) -> dict[str, Any]:
    """Return what quality rules ask of an object: the attributes of `Instance` that are neither names of it nor pixels."""
    dataset, image = header.dataset, header.pixels
    identifying, over_89 = privacy.told(tuple(elements.raw(dataset, Tag(tag)) for tag in privacy.ASKED))
    meta_uid = elements.raw(dataset.file_meta, _META_SOP_INSTANCE).rstrip(b"\0 ")
    return {
        "burned_in_annotation": elements.text(dataset, _BURNED_IN),
        "identity_removed": elements.text(dataset, _IDENTITY_REMOVED),
        "over_89": over_89,
        "identifying": identifying,
        "gantry_tilt": elements.number(dataset, _GANTRY_TILT),
        "other_meta_uid": meta_uid not in (b"", elements.raw(dataset, _SOP_INSTANCE).rstrip(b"\0 ")),
        "surplus_bytes": 0 if image is None else image.surplus_bytes,
    }


def _inflated(file: BinaryIO) -> tuple[BinaryIO, bool]:
    """Return what a deflated object (PS3.5 A.5) inflates to, as an explicit little-endian one, and that it was; else the file."""
    head = file.read(_BUFFER)
    file.seek(0)
    deflated, plain = (str(uid).encode() for uid in (uids.DeflatedExplicitVRLittleEndian, uids.ExplicitVRLittleEndian))
    at, syntax = 132 if head[128:132] == b"DICM" else 0, 0
    while deflated in head and head[at : at + 2] == b"\x02\0" and at + 12 <= len(head):
        long = head[at + 4 : at + 6].decode("latin-1") in EXPLICIT_VR_LENGTH_32
        start = at + 12 if long else at + 8
        element, at = at, start + int.from_bytes(head[start - 4 : start] if long else head[start - 2 : start], "little")
        if head[element + 2 : element + 4] == b"\x10\0" and head[start:at].rstrip(b"\0 ") == deflated:
            syntax = start
    if not syntax:
        return file, False
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    # pydicom inflates without a limit; it is given the object as if it had never been deflated.
    whole = BytesIO()
    whole.write(head[:syntax] + plain.ljust(len(deflated), b"\0") + head[syntax + len(deflated) : at])
    file.seek(at)
    try:
        while not inflater.eof:
            data = inflater.unconsumed_tail or file.read(_BUFFER)
            whole.write(inflater.decompress(data, 1 << 20) if data else inflater.flush())
            if not data and not inflater.eof:
                raise FileError("truncated", "it ends within its deflated data, so the file is cut off")
            if whole.tell() > pixels.MOST_BYTES:
                raise FileError("unreadable", f"it inflates to more than {pixels.MOST_BYTES} bytes, which are not read at once")
    except zlib.error:
        raise FileError("unreadable", "its deflated data is damaged, so nothing in it can be read") from None
    return whole, True


def _encoding(dataset: Any) -> str:
    """Return the only uncompressed transfer syntax with this encoding of elements; compressed ones have pixels of undefined length."""
    implicit, little_endian = dataset.original_encoding
    return str(uids.ImplicitVRLittleEndian if implicit else uids.ExplicitVRLittleEndian if little_endian else uids.ExplicitVRBigEndian)


def _check_without_pixels(dataset: Any, meta_class: str) -> None:
    """Refuse what should hold an image, or is no object at all."""
    own = elements.text(dataset, _SOP_CLASS)
    if uids.MediaStorageDirectoryStorage in (own, meta_class):
        raise FileError("dicomdir", "an index of the files beside it (PS3.3 F), no object of its own; they are read by themselves")
    missing, name = f"{named(_PIXEL_DATA)} is missing", uids.UID(own or meta_class).name
    # Not by Rows, which spectroscopy has as well.
    if _BITS_ALLOCATED in dataset or "Image Storage" in name:
        what = f"{named(_BITS_ALLOCATED)} is there" if _BITS_ALLOCATED in dataset else f"it says that it is {name}"
        raise FileError("no-pixels", f"{missing} though {what}, so its pixels were removed or the file is cut off")
    if not own:
        raise FileError("no-pixels", f"{missing}, and {named(_SOP_CLASS)} too, so what it holds is not known")


def _pixels_of(header: _Header, frame: int) -> Pixels:
    if header.pixels is None:
        raise FileError("no-pixels", f"{named(_PIXEL_DATA)} is missing, so it holds no image")
    if not 0 <= frame < header.pixels.number_of_frames:
        raise FileError("unreadable", f"frame {frame} is not in it: it holds {header.pixels.number_of_frames}, counted from 0")
    return header.pixels


def _modality_lut(header: _Header) -> tuple[int, Array]:
    """Return the first stored value of the Modality LUT and the values from there on (PS3.3 C.11.1.1)."""
    assert header.pixels is not None
    item = elements.groups(header.dataset, _MODALITY_LUT)[0]
    descriptor, data = elements.raw(item, _LUT_DESCRIPTOR), elements.raw(item, _LUT_DATA)
    order = "<" if header.dataset.original_encoding[1] else ">"
    if len(descriptor) == 6:
        count, first, bits = struct.unpack(f"{order}H{'h' if header.pixels.representation else 'H'}H", descriptor)
        count = count or 1 << 16
        if bits <= 16 and len(data) >= 2 * count:
            return first, np.frombuffer(data, f"{order}u2", count)
        if bits <= 8 and count <= len(data) <= count + 1 and order == "<":
            return first, np.frombuffer(data, np.uint8, count)
    raise FileError("unreadable", f"{named(_MODALITY_LUT)} does not hold the table that it describes, so its values have no meaning")


def _frame(header: _Header, index: int, dtype: np.dtype[Any] | None, pixel_hash: bytes | None) -> Frame:
    top, image = header.dataset, header.pixels
    assert image is not None
    own = header.per_frame[index : index + 1]

    def where(tag: BaseTag) -> Any:
        """Return the dataset that holds an element for this frame: its own group, the shared one, else the top."""
        for groups in (own, header.shared):
            for group in groups:
                for item in elements.groups(group, _IN_GROUP[tag]):
                    if tag in item:
                        return item
        return top

    at_position = where(_IMAGE_POSITION)
    image_position = elements.floats(at_position, _IMAGE_POSITION, 3) if index == 0 or at_position is not top else None
    image_orientation = elements.floats(where(_IMAGE_ORIENTATION), _IMAGE_ORIENTATION, 6)
    spacing = elements.floats(where(_PIXEL_SPACING), _PIXEL_SPACING, 2)
    trigger = elements.number(top, _TRIGGER_TIME)
    return Frame(
        frame=index,
        rows=image.rows,
        columns=image.columns,
        samples_per_pixel=image.samples,
        photometric=image.photometric,
        bits_stored=image.bits_stored,
        pixel_spacing=None if spacing is None else (spacing[0], spacing[1]),
        image_position=None if image_position is None else (image_position[0], image_position[1], image_position[2]),
        image_orientation=None if image_orientation is None else image_orientation[:6],  # type: ignore[arg-type]
        position=_position(image_position, image_orientation),
        slice_thickness=elements.number(where(_SLICE_THICKNESS), _SLICE_THICKNESS),
        trigger_time=elements.double(where(_TRIGGER_DELAY), _TRIGGER_DELAY) if trigger is None else trigger,
        slope=1.0 if image.modality_lut else elements.rescale(where(_SLOPE), _SLOPE, 1.0),
        intercept=0.0 if image.modality_lut else elements.rescale(where(_INTERCEPT), _INTERCEPT, 0.0),
        window_center=elements.number(where(_WINDOW_CENTER), _WINDOW_CENTER),
        window_width=elements.number(where(_WINDOW_WIDTH), _WINDOW_WIDTH),
        pixel_hash=pixel_hash,
        offset=None if dtype is None else image.offset + index * image.frame_bytes,
        length=0 if dtype is None else image.frame_bytes,
        dtype=None if dtype is None else dtype.str,
        modality_lut=image.modality_lut,
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
