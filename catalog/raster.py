"""PNG, TIFF, BMP, GIF and JPEG files: masks that somebody painted, and images.

What is read, of both: 1, 2, 4 and 8 bits grey, palette, RGB of 8 bits a channel; 16 and 32 bit grey of PNG and TIFF; float TIFF as images
only. The pages of a TIFF are frames, counted from 0. An alpha channel that is the same everywhere is left aside.

What is refused, because Pillow would change its values or its meaning is not certain: RGB of 16 bits a channel (Pillow cuts it to 8),
CMYK and other colour spaces, varying transparency, animations, pages that are reduced copies of others.

EXIF orientation is not applied: pixels stay where they lie in the file, as the annotations on them do.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from catalog.errors import FileError
from catalog.records import Drawn, Frame, Instance, Segment, segment

Array = npt.NDArray[Any]

FORMATS = ("PNG", "TIFF", "BMP", "GIF", "JPEG")
# For each page Pillow looks through the list of those before: 10,000 take 1 s, 100,000 would take minutes.
MOST_PAGES = 10_000
# A few KB can hold thousands of pages that share their pixels, so a bound on each page is none on the file.
MOST_PIXELS = 1 << 31
# Of JPEG masks of 0 and 255: how far values may lie from both. At quality 75 they lie up to 43 away, at 50 up to 92.
LOSS = 63

_SUBFILE_TYPE, _WIDTH, _LENGTH, _BITS_PER_SAMPLE, _COMPRESSION, _PHOTOMETRIC = 254, 256, 257, 258, 259, 262
_MODES = frozenset(("1", "L", "P", "I;16", "I;16B", "I;16L", "RGB", "RGBA", "LA"))
# What Pillow holds in more bits, or in signed ones, than the file has.
_WIDE = {
    **dict.fromkeys(("I;16", "I;16B", "I;16N", "I;16R", "I;12"), "u2"),
    **dict.fromkeys(("I;16S", "I;16BS"), "i2"),
    **dict.fromkeys(("I;32S", "I;32BS"), "i4"),
    "I;32N": "u4",
    **dict.fromkeys(("F;32F", "F;32BF"), "f4"),
}
_LAST_TAG = 347  # of those that say how pixels lie; others may point anywhere
_TYPE_BYTES = {3: 2, 4: 4, 5: 8, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_COLOUR = re.compile("#[0-9a-fA-F]{6}", re.ASCII)


@dataclass(frozen=True, slots=True)
class _Page:
    values: Array  # (rows, columns), or (rows, columns, 3) for RGB
    bits: int
    palette: Array | None  # (256, 3) uint8: what the values stand for
    lossy: bool


def read_images(path: Path, options: Mapping[str, Any]) -> Instance:
    """Return what an image file holds, a frame a page. No identifier, geometry or window: such files have none.

    Stored values are grey as (rows, columns) or RGB as (rows, columns, 3), greater being brighter; a palette is looked up and gives RGB.
    They are decoded to see that they are whole, and hashed unless `options` have ``{"hash": False}``.

    Raises:
        FileError: If the file is none of these formats, is damaged, is too large, or holds what is not supported.
    """
    frames = []
    with _opened(path) as pages:
        for number, page in enumerate(pages):
            values = _shown(page)
            frames.append(
                Frame(
                    frame=number,
                    rows=values.shape[0],
                    columns=values.shape[1],
                    samples_per_pixel=1 if values.ndim == 2 else 3,
                    photometric="MONOCHROME2" if values.ndim == 2 else "RGB",
                    bits_stored=page.bits,
                    pixel_spacing=None,
                    image_position=None,
                    image_orientation=None,
                    position=None,
                    slice_thickness=None,
                    trigger_time=None,
                    slope=1.0,
                    intercept=0.0,
                    window_center=None,
                    window_width=None,
                    pixel_hash=hashlib.sha256(values.data).digest() if options.get("hash", True) else None,
                    offset=None,
                    length=0,
                    dtype=None,
                )
            )
    return Instance(
        patient_id="",
        study_instance_uid="",
        series_instance_uid="",
        sop_instance_uid="",
        sop_class_uid="",
        modality="",
        series_number=None,
        study_date="",
        instance_number=None,
        images_in_acquisition=None,
        frame_of_reference_uid="",
        transfer_syntax_uid="",
        number_of_frames=len(frames),
        frames=tuple(frames),
    )


def decode_frame(path: Path, frame: int) -> Array:
    """Return one image as `read_images` hashed it: (rows, columns), or (rows, columns, 3) for RGB; little endian, a new array.

    dtype: uint8, for more bits uint16, int16, uint32, int32 or float32, as the file has it.

    Raises:
        FileError: As `read_images`, and if there is no such frame.
    """
    with _opened(path, first=frame) as pages:
        for page in pages:
            return _shown(page)
    raise FileError("no-frame", f"holds no frame {frame}; ingest the folder again")


def read_annotations(path: Path, options: Mapping[str, Any]) -> list[Drawn]:
    """Return what a mask file's pages hold, as segments.

    Args:
        options: ``structure`` and ``reader``, as text. ``values``: what each value stands for, such as ``{"255": "inner"}``, or
            ``{"#ff0000": "inner"}`` for a colour. Then each page gives one `Drawn` for each value, empty where the value does not occur;
            values that are not named belong to nothing. Without it: one a page, of what is not 0.

    A whole number is the stored value: 0 or 1 of 1 bit, the index of a palette. A colour also means the palette's. RGB in which all
    pixels are grey is taken as grey. Of several pages, `refers_to` has the ``frame``.

    A palette is refused where which pixels are meant is not certain: without ``values`` where index 0 is not its only black, with whole
    numbers where its greys differ from their indices. JPEG changes values: it is taken without ``values`` only, black and white, each
    pixel for what it is nearer to, and refused if any lies further than 63 from both.

    Raises:
        FileError: If the file is none of these formats, is damaged, is too large, or leaves open which pixels are meant.
    """
    named = named_values(options.get("values"))
    structure, reader = str(options.get("structure", "")), str(options.get("reader", ""))
    found: list[tuple[int, str, str, Segment]] = []
    with _opened(path, masks=max(1, len(named))) as pages:
        for number, page in enumerate(pages):
            if page.values.dtype.kind == "f":
                raise FileError("raster-values", "holds floating point values, which are no labels; save whole numbers")
            if named:
                found += [(number, f"value {key}", name, segment(_equal(page, key))) for key, name in named.items()]
            else:
                found.append((number, "", structure, segment(_not_zero(page))))
    several = found[-1][0] > 0
    return [
        Drawn(
            source_key=" ".join(filter(None, (f"frame {number}" if several else "", key))),
            structure=name,
            reader=reader,
            kind="segment",
            refers_to={"frame": number} if several else {},
            segment=shape,
        )
        for number, key, name, shape in found
    ]


def named_values(values: Any) -> dict[str, str]:
    """Return the option ``values`` with its keys as they are compared: plain decimals and small letters.

    Raises:
        FileError: If it is no mapping, or a key is neither a whole number nor a colour.
    """
    if not isinstance(values or {}, Mapping):
        raise FileError("raster-values", "`values` must say what each value stands for, such as 255 → inner")
    named: dict[str, str] = {}
    for key, name in (values or {}).items():
        whole = re.fullmatch("[0-9]{1,10}", str(key), re.ASCII)
        if not whole and not _COLOUR.fullmatch(str(key)):
            raise FileError("raster-values", "`values` must name whole numbers from 0 (255) or colours (#ff0000)")
        named[str(int(key)) if whole else str(key).lower()] = str(name)
    return named


def _equal(page: _Page, key: str) -> npt.NDArray[np.bool_]:
    """Return where a page has a value or colour."""
    if page.lossy:
        raise FileError("raster-values", "is a JPEG, which does not keep values apart; save it as PNG")
    colour = np.array([int(key[at : at + 2], 16) for at in (1, 3, 5)]) if key.startswith("#") else None
    values = page.values
    if page.palette is not None:
        used = np.unique(values)
        colours = page.palette[used]
        if colour is not None:
            return np.isin(values, used[(colours == colour).all(axis=1)])
        if (colours == colours[:, :1]).all() and (colours[:, 0] != used).any():
            raise FileError("raster-values", "its palette has greys other than their indices, so a number may mean either; name colours")
        return np.asarray(values == int(key))
    if values.ndim == 3:
        if colour is not None:
            return np.asarray((values == colour).all(axis=2))
        if (values != values[:, :, :1]).any():
            raise FileError("raster-values", "holds colours, so whole numbers name none of its values; name colours (#ff0000)")
        values = values[:, :, 0]
    if colour is None:
        return np.asarray(values == int(key))
    if page.bits != 8:
        raise FileError("raster-values", f"is grey of {page.bits} bits, which holds no colour; name whole numbers")
    return np.asarray(values == colour[0]) if len(set(colour.tolist())) == 1 else np.zeros(values.shape, np.bool_)


def _not_zero(page: _Page) -> npt.NDArray[np.bool_]:
    """Return where a page is not 0, or for a JPEG nearer to white than to black."""
    values = page.values
    if page.palette is not None:
        used = np.unique(values)
        if ((used == 0) != (page.palette[used] == 0).all(axis=1)).any():
            raise FileError(
                "raster-values", "index 0 is not the one black of its palette, so which pixels are drawn is open; name `values`"
            )
    inside = values != 0 if values.ndim == 2 else (values != 0).any(axis=2)
    if page.lossy:
        if ((values > LOSS) & (values < 255 - LOSS)).any() or (values.ndim == 3 and ((values > 127) != (values[:, :, :1] > 127)).any()):
            raise FileError("raster-values", "is a JPEG of more than black and white, so where the mask ends is lost; save it as PNG")
        inside = values > 127 if values.ndim == 2 else values[:, :, 0] > 127
    return np.asarray(inside)


def _shown(page: _Page) -> Array:
    values = page.values if page.palette is None else page.palette[page.values]
    return np.ascontiguousarray(values, values.dtype.newbyteorder("<"))


@contextmanager
def _opened(path: Path, *, masks: int = 1, first: int | None = None) -> Iterator[Iterator[_Page]]:
    """Yield the pages, each decoded when it is asked for, of a file or from `first` on; what Pillow raises becomes a FileError.

    Pillow's texts are not passed on: some quote the path. Its warnings are about tags that nothing here reads, or about a page that
    is refused next.
    """
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file, formats=FORMATS) as image:
                yield _pages(image, masks, first)
    except FileError:
        raise
    except Image.DecompressionBombError:
        raise FileError("raster-too-large", f"its header promises over {Image.MAX_IMAGE_PIXELS} pixels, which is the most") from None
    except UnidentifiedImageError:
        raise FileError("not-raster", "is no PNG, TIFF, BMP, GIF or JPEG file, or its header is damaged") from None
    except MemoryError:
        raise FileError("unreadable", "its pixels take more memory than there is") from None
    except Exception as error:  # Pillow raises anything from SyntaxError to struct.error
        if isinstance(error, OSError) and error.errno is not None:
            raise FileError("no-access", f"{error.strerror}; give read access, then ingest again") from None
        raise FileError("unreadable", f"its pixels cannot be decoded ({type(error).__name__}): it is cut off or damaged") from None


def _bits_of_bmp(image: Image.Image) -> int:
    file: Any = getattr(image, "fp", None)
    file.seek(14)
    head = file.read(16)
    return int.from_bytes(head[10:12] if head[0] == 12 else head[14:16], "little")  # after a header of 12 bytes, or of 40 and more


def _pages(image: Image.Image, masks: int, first: int | None) -> Iterator[_Page]:
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        if getattr(image, "n_frames", 1) > 1:
            raise FileError("not-raster", "holds several pictures, which only TIFF's pages may be; save them apart")
        if not first:
            _bounded(image)
            yield _page(image)
        return
    for number in range(first or 0, _count(image, masks)):
        image.seek(number)
        if image.tag_v2.get(_SUBFILE_TYPE, 0) & 0b101:  # TIFF 6.0: a reduced copy, a transparency mask
            raise FileError("not-raster", f"page {number + 1} is a smaller copy or a transparency of another; save it without")
        _bounded(image)
        yield _page(image)


def _count(image: Image.Image, masks: int) -> int:
    """Return the number of a TIFF's pages, after a look at what Pillow takes as it comes, or would find out page by page.

    Of a directory that is cut off Pillow uses the part that is there, so that a missing tag becomes its default, and other pixels.
    """
    file: Any = getattr(image, "fp", None)
    size = file.seek(0, 2)

    def read(at: int, length: int) -> bytes:
        if at + length > size:
            raise FileError("unreadable", f"its directory of page {len(seen) + 1} lies beyond the file's end, so it is cut off or damaged")
        file.seek(at)
        return bytes(file.read(length))

    seen: set[int] = set()
    order: Literal["little", "big"] = "little" if read(0, 1) == b"I" else "big"
    number = partial(int.from_bytes, byteorder=order)
    # TIFF 6.0 section 2: count of 2 bytes, entries of 12, offset of 4; BigTIFF: 8, 20, 8.
    counts, entry, offset = (8, 20, 8) if number(read(2, 2)) == 43 else (2, 12, 4)
    at, pixels, taken = number(read(4 if offset == 4 else 8, offset)), 0, 0
    while at and at not in seen:
        seen.add(at)
        entries = number(read(at, counts))
        directory = read(at + counts, entries * entry + offset)
        taken += len(directory)
        if len(seen) > MOST_PAGES or taken > size:
            raise FileError(
                "raster-too-large", f"has over {MOST_PAGES} pages, or pages that share their directories; save it as several files"
            )
        sides = {_WIDTH: 0, _LENGTH: 0}
        for here in range(0, entries * entry, entry):
            tag, kind, count = number(directory[here : here + 2]), number(directory[here + 2 : here + 4]), directory[here + 4 :][:offset]
            bytes_each = _TYPE_BYTES.get(kind, 1)
            value, length = directory[here + 4 + offset :][:offset], number(count) * bytes_each
            if tag in sides:
                sides[tag] = number(value[:bytes_each])
            if tag <= _LAST_TAG and length > offset:
                read(number(value) + length - 1, 1)
        pixels += sides[_WIDTH] * sides[_LENGTH]
        at = number(directory[-offset:])
    if pixels * masks > MOST_PIXELS and len(seen) > 1:
        raise FileError("raster-too-large", f"its pages are over {MOST_PIXELS // masks} pixels together; save it as several files")
    return len(seen)


def _bounded(image: Image.Image) -> None:
    """Refuse too many pixels before anything of their size is allocated."""
    pixels = image.width * image.height
    most = Image.MAX_IMAGE_PIXELS
    if most is not None and pixels > most:
        raise FileError("raster-too-large", f"its header promises {image.height}×{image.width} pixels, over the {most} that are decoded")


def _page(image: Image.Image) -> _Page:
    # The tiles say how values lie in the file, and are gone once they are decoded.
    tiles = list(getattr(image, "tile", ()))
    codec, arguments = (tiles[0][0], tiles[0][3]) if tiles else ("", "")
    raw = arguments if isinstance(arguments, str) else str(next(iter(arguments), ""))
    tags: Mapping[int, Any] = getattr(image, "tag_v2", {})
    mode, depth = image.mode, tags.get(_BITS_PER_SAMPLE, (8,))
    lossy = image.format == "JPEG" or tags.get(_COMPRESSION) in (6, 7)
    if codec == "raw" and image.format == "TIFF":
        covered = sum((box[2] - box[0]) * (box[3] - box[1]) for _, box, *_ in tiles)
        if covered < image.width * image.height:  # Pillow leaves the rest black
            raise FileError("unreadable", f"its strips cover {covered} of {image.width * image.height} pixels, so it is damaged")
    if image.format == "BMP" and mode in ("1", "L") and _bits_of_bmp(image) != (1 if mode == "1" else 8):
        raise FileError("not-raster", "is a BMP with a grey palette of an odd size, which Pillow misreads; save it as PNG")
    if mode in ("RGB", "RGBA", "LA") and (re.search(";1[0-9]", raw) or (image.format == "TIFF" and max(depth) > 8)):
        raise FileError("not-raster", "has colours of more than 8 bits a channel, of which Pillow drops the lower ones; save it as grey")
    if codec == "libtiff" and re.search("B[SF]?$", raw):
        raise FileError("not-raster", "is a compressed TIFF of big-endian signed or float values, which Pillow misreads; save it again")
    if mode not in _MODES and not (mode in ("I", "F") and raw in _WIDE):
        raise FileError("not-raster", f"has pixels of Pillow's mode {mode}, which are not supported; save it as grey or RGB of 8 bits")
    image.load()
    values = np.asarray(image)
    palette = None
    bits = {"1": 1, "I": 32, "F": 32}.get(mode, 16 if mode.startswith("I;16") else 8)
    if mode == "1":
        values = (values != 0).astype(np.uint8)
    elif mode == "L" and (narrow := re.match("L;([24])", raw)):
        bits = int(narrow[1])
        values = values // (255 // (2**bits - 1))  # Pillow spreads them over 0 to 255
    elif mode == "P":
        palette = np.zeros((256, 3), np.uint8)
        colours = np.array(image.getpalette("RGB") or [], np.uint8)[: 256 * 3].reshape(-1, 3)
        palette[: len(colours)] = colours
    elif mode in ("LA", "RGBA"):
        if (values[:, :, -1] != values[0, 0, -1]).any():
            raise FileError("not-raster", "has transparent parts, so what its pixels are is open; save it without an alpha channel")
        values = values[:, :, 0] if mode == "LA" else values[:, :, :3]
    elif raw in _WIDE:
        values = values.astype(_WIDE[raw])
        bits = 12 if raw == "I;12" else values.dtype.itemsize * 8
    if mode.startswith("I;16") and tags.get(_PHOTOMETRIC) == 0:
        values = np.uint16(2**bits - 1) - values  # white is 0: Pillow turns this round for 8 bits and fewer only
    return _Page(values.astype(values.dtype.newbyteorder("="), copy=False), bits, palette, lossy)
