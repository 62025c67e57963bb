"""Rasters: values are those in the file, masks are the pixels that were meant, and nothing but a FileError comes of a bad file.

The oracles are writers of our own for PNG, TIFF and BMP, from their specifications; Pillow writes only what has no such writer.
"""

from __future__ import annotations

import hashlib
import io
import random
import resource
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from catalog import raster
from catalog.contours import unboxed
from catalog.errors import FileError
from catalog.records import Drawn

Array = NDArray[Any]
SECRET = "Zbigniew-4711"


# ------------------------------------------------------------------------------------------------- files from the specifications


def packed(values: Array, bits: int) -> list[bytes]:
    """The rows of a grey image of 1, 2, 4 or 8 bits, the first pixel in the highest bits."""
    every = ((values[:, :, np.newaxis] >> np.arange(bits - 1, -1, -1)) & 1).astype(np.uint8)
    return [np.packbits(row.ravel()).tobytes() for row in every]


def png(rows: list[bytes], width: int, bits: int, colour: int, *extra: tuple[bytes, bytes]) -> bytes:
    """A PNG: PNG specification 11.2; `colour` 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGBA."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, len(rows), bits, colour, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in ((b"IHDR", head), *extra, (b"IDAT", pixels), (b"IEND", b"")))


def tiff(
    *pages: Array, order: str = "<", photometric: int = 1, deflate: bool = False, subfile: int = 0, strips: int = 2, more_rows: int = 0
) -> bytes:
    """A TIFF 6.0 of grey (rows, columns) or RGB (rows, columns, 3) pages in strips, deflated or plain."""
    data, next_at = bytearray(struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 0)), 4
    for values in pages:
        each = -(-len(values) // strips)
        parts = [values[at : at + each].astype(values.dtype.newbyteorder(order)).tobytes() for at in range(0, len(values), each)]
        places = []
        for part in parts:
            stored = zlib.compress(part) if deflate else part
            places.append((len(data), len(stored)))
            data += stored
        samples = 1 if values.ndim == 2 else values.shape[2]
        sign = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
        tags = {
            254: [subfile], 256: [values.shape[1]], 257: [len(values) + more_rows], 258: [values.dtype.itemsize * 8] * samples,
            259: [8 if deflate else 1], 262: [2 if samples > 1 else photometric], 273: [at for at, _ in places], 277: [samples],
            278: [each], 279: [size for _, size in places], 339: [sign] * samples,
        }  # fmt: skip
        entries = b""
        for tag, numbers in tags.items():
            stored = struct.pack(f"{order}{len(numbers)}I", *numbers)
            if len(stored) > 4:
                at = len(data)
                data += stored
                stored = struct.pack(f"{order}I", at)
            entries += struct.pack(f"{order}HHI", tag, 4, len(numbers)) + stored
        data += b"\0" * (len(data) % 2)
        data[next_at : next_at + 4] = struct.pack(f"{order}I", len(data))
        data += struct.pack(f"{order}H", len(tags)) + entries
        next_at = len(data)
        data += b"\0" * 4
    return bytes(data)


def bmp(values: Array, bits: int, palette: list[tuple[int, int, int]]) -> bytes:
    """A BMP with a palette, rows from the bottom up, each padded to 4 bytes."""
    rows = b"".join(row + b"\0" * (-len(row) % 4) for row in reversed(packed(values, bits)))
    colours = b"".join(bytes((blue, green, red, 0)) for red, green, blue in palette)
    start = 14 + 40 + len(colours)
    head = struct.pack("<2sIHHI", b"BM", start + len(rows), 0, 0, start)
    return (
        head + struct.pack("<IiiHHIIiiII", 40, values.shape[1], len(values), 1, bits, 0, len(rows), 0, 0, len(palette), 0) + colours + rows
    )


def saved(values: Array, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values).save(file, kind, **options)
    return file.getvalue()


def ramp(rows: int, columns: int, dtype: str = "u1", *, samples: int = 0, below: int | None = None) -> Array:
    """Values over the whole range of the type, or from 0 to `below`."""
    rng = np.random.default_rng(rows * columns)
    shape = (rows, columns, samples) if samples else (rows, columns)
    if dtype.startswith("f"):
        return rng.standard_normal(shape).astype(dtype)
    info = np.iinfo(dtype)
    return rng.integers(info.min if below is None else 0, info.max if below is None else below, shape, dtype, endpoint=below is None)


def file_of(folder: Path, data: bytes) -> Path:
    path = folder / f"{SECRET}.raster"
    path.write_bytes(data)
    return path


def refusal(path: Path, **options: Any) -> FileError:
    """The FileError of a mask, after checking that it is one line and tells neither name nor path."""
    with pytest.raises(FileError) as caught:
        raster.read_annotations(path, options)
    assert SECRET not in str(caught.value)
    assert "\n" not in str(caught.value)
    return caught.value


def mask_of(drawn: Drawn) -> Array:
    assert drawn.segment is not None
    shape = drawn.segment
    return unboxed(shape.rows, shape.columns, shape.box, shape.bits)


GREY = [ramp(5, 7), ramp(5, 7, "u2"), ramp(5, 7, "i2"), ramp(5, 7, "i4"), ramp(5, 7, "u4"), ramp(5, 7, "f4")]
STORED = [
    *(
        pytest.param(tiff(values, order=order, deflate=deflate), [values], values.dtype.itemsize * 8,
                     id=f"TIFF {order}{values.dtype.name}{' deflated' * deflate}")
        for values in GREY for order in "<>" for deflate in (False, True)
        # These Pillow 13 reads wrong (see below) or not at all.
        if order == "<" or (values.dtype.kind == "u" and values.dtype.name != "uint32") or (values.dtype.kind in "if" and not deflate)
    ),
    *(
        pytest.param(png(packed(ramp(5, 7, below=2**bits), bits), 7, bits, 0), [ramp(5, 7, below=2**bits)], bits, id=f"PNG grey {bits}")
        for bits in (1, 2, 4, 8)
    ),
    pytest.param(png([row.astype(">u2").tobytes() for row in ramp(5, 7, "u2")], 7, 16, 0), [ramp(5, 7, "u2")], 16, id="PNG grey 16"),
    pytest.param(png([row.tobytes() for row in ramp(5, 7, samples=3)], 7, 8, 2), [ramp(5, 7, samples=3)], 8, id="PNG RGB"),
    pytest.param(tiff(ramp(5, 7, samples=3)), [ramp(5, 7, samples=3)], 8, id="TIFF RGB"),
    pytest.param(
        png([np.insert(row, 3, 200, axis=1).tobytes() for row in ramp(5, 7, samples=3)], 7, 8, 6), [ramp(5, 7, samples=3)], 8,
        id="PNG RGB, evenly transparent",
    ),
    pytest.param(
        png(packed(ramp(5, 7, below=4), 2), 7, 2, 3, (b"PLTE", bytes(range(12)))),
        [np.arange(12, dtype="u1").reshape(4, 3)[ramp(5, 7, below=4)]], 8, id="PNG palette",
    ),
    pytest.param(tiff(255 - ramp(5, 7), photometric=0), [ramp(5, 7)], 8, id="TIFF white is 0, 8 bits"),
    pytest.param(tiff(65535 - ramp(5, 7, "u2"), photometric=0), [ramp(5, 7, "u2")], 16, id="TIFF white is 0, 16 bits"),
    pytest.param(
        tiff(65535 - ramp(5, 7, "u2"), photometric=0, deflate=True), [ramp(5, 7, "u2")], 16, id="TIFF white is 0, 16 bits deflated"
    ),
    pytest.param(saved(ramp(5, 7, "u2"), "TIFF", big_tiff=True), [ramp(5, 7, "u2")], 16, id="BigTIFF"),
    pytest.param(tiff(ramp(5, 7), ramp(3, 4), ramp(1, 1)), [ramp(5, 7), ramp(3, 4), ramp(1, 1)], 8, id="TIFF pages"),
    pytest.param(bmp(ramp(5, 7, below=2), 1, [(0, 0, 0), (255, 255, 255)]), [ramp(5, 7, below=2)], 1, id="BMP 1 bit"),
    pytest.param(bmp(ramp(5, 7), 8, [(v, v, v) for v in range(256)]), [ramp(5, 7)], 8, id="BMP grey"),
    pytest.param(saved(ramp(5, 7), "GIF"), [np.repeat(ramp(5, 7)[:, :, np.newaxis], 3, axis=2)], 8, id="GIF"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "pages", "bits"), STORED)
def test_values_are_those_in_the_file(tmp_path: Path, data: bytes, pages: list[Array], bits: int) -> None:
    """Every supported kind of grey, palette and RGB decodes to the values that were written, and is hashed as such."""
    path = file_of(tmp_path, data)
    instance = raster.read_images(path, {})
    assert instance.number_of_frames == len(instance.frames) == len(pages)
    for number, (frame, expected) in enumerate(zip(instance.frames, pages, strict=True)):
        decoded = raster.decode_frame(path, number)
        assert decoded.dtype == expected.dtype
        np.testing.assert_array_equal(decoded, expected)
        assert frame.pixel_hash == hashlib.sha256(np.ascontiguousarray(expected).tobytes()).digest()
        assert (frame.frame, frame.rows, frame.columns, frame.bits_stored) == (number, *expected.shape[:2], bits)
        assert (frame.samples_per_pixel, frame.photometric) == ((1, "MONOCHROME2") if expected.ndim == 2 else (3, "RGB"))
        assert (frame.dtype, frame.offset) == (None, None)
    with pytest.raises(FileError, match="holds no frame"):
        raster.decode_frame(path, len(pages))


def test_jpeg_is_decoded_as_it_lies(tmp_path: Path) -> None:
    """A JPEG image's pixels are libjpeg's; an EXIF orientation does not turn them."""
    tag = Image.Exif()
    tag[0x0112] = 6
    smooth = np.add.outer(np.arange(32), np.arange(48)).astype("u1")
    plain = raster.decode_frame(file_of(tmp_path, saved(smooth, "JPEG", quality=95)), 0)
    turned = raster.decode_frame(file_of(tmp_path, saved(smooth, "JPEG", quality=95, exif=tag)), 0)
    assert plain.shape == (32, 48)
    assert np.abs(plain.astype(int) - smooth).max() < 6
    np.testing.assert_array_equal(turned, plain)


WHITE_FIRST = [(255, 255, 255), (0, 0, 0)]
REFUSED = [
    pytest.param(png([row.astype(">u2").tobytes() for row in ramp(5, 7, "u2", samples=3)], 7, 16, 2), "8 bits a channel", id="PNG RGB 16"),
    pytest.param(png([row.astype(">u2").tobytes() for row in ramp(5, 7, "u2", samples=2)], 7, 16, 4), "8 bits a channel", id="PNG LA 16"),
    pytest.param(tiff(ramp(5, 7, "u2", samples=3)), "8 bits a channel", id="TIFF RGB 16"),
    pytest.param(tiff(ramp(5, 7, "u2", samples=3), deflate=True), "8 bits a channel", id="TIFF RGB 16 deflated"),
    pytest.param(png([row.tobytes() for row in ramp(5, 7, samples=4)], 7, 8, 6), "transparent parts", id="PNG RGBA"),
    pytest.param(png([row.tobytes() for row in ramp(5, 7, samples=2)], 7, 8, 4), "transparent parts", id="PNG LA"),
    pytest.param(tiff(ramp(5, 7, "f4"), order=">", deflate=True), "misreads", id="TIFF big-endian float, deflated"),
    pytest.param(tiff(ramp(5, 7, "i2"), order=">", deflate=True), "misreads", id="TIFF big-endian signed, deflated"),
    pytest.param(bmp(ramp(5, 7, below=2), 8, [(0, 0, 0), (255, 255, 255)]), "misreads", id="BMP 8 bits, black and white"),
    pytest.param(bmp(ramp(5, 7, below=2), 4, [(v, v, v) for v in range(16)]), "misreads", id="BMP 4 bits, 16 greys"),
    pytest.param(tiff(ramp(8, 8), ramp(4, 4), subfile=1), "smaller copy", id="TIFF pyramid"),
    pytest.param(tiff(ramp(8, 8), more_rows=8), "its strips cover 64 of 128 pixels", id="TIFF without its last strips"),
    pytest.param(saved(ramp(5, 7), "GIF", save_all=True, append_images=[Image.fromarray(255 - ramp(5, 7))]), "several pictures", id="GIFs"),
    pytest.param(saved(ramp(5, 7), "PNG", save_all=True, append_images=[Image.fromarray(255 - ramp(5, 7))]), "several pictures", id="APNG"),
    pytest.param(b"", "is no PNG", id="empty"),
    pytest.param(b"1.0 2.0\n", "is no PNG", id="a contour"),
    pytest.param(saved(np.zeros((5, 7), "u1"), "PPM"), "is no PNG", id="another format"),
    pytest.param(
        png([b""], 7, 8, 0).replace(struct.pack(">II", 7, 1), struct.pack(">II", 2**31 - 1, 2**31 - 1)), "is no PNG|promises", id="bomb"
    ),
    pytest.param(png([bytes(10_000)], 10_000, 1, 0)[:16] + struct.pack(">II", 10_000, 10_000), "cannot be decoded", id="only a head"),
]


@pytest.mark.parametrize(("data", "message"), REFUSED)
def test_what_is_not_certain_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    """What Pillow would change, misread or leave open is refused in one line, as image and as mask."""
    path = file_of(tmp_path, data)
    with pytest.raises(FileError, match=message):
        raster.read_images(path, {})
    with pytest.raises(FileError, match=message):
        raster.decode_frame(path, 0)
    refusal(path)


def test_header_sizes_are_not_believed(tmp_path: Path) -> None:
    """A small file that promises many pixels or pages is refused before they are allocated: in seconds and without 400 MB more."""
    big = 20_000
    promise = png([bytes(1)] * 3, 1, 8, 0).replace(struct.pack(">II", 1, 3), struct.pack(">II", big, big))
    head = promise[:12]
    body = promise[12:29]
    promise = head + body + struct.pack(">I", zlib.crc32(body)) + promise[33:]
    shared = bytearray(tiff(np.zeros((9000, 9000), "u1"), deflate=True, strips=1))
    (at,) = struct.unpack_from("<I", shared, 4)
    page = bytes(shared[at:-4])
    for _ in range(300):  # pages that share one strip
        shared[-4:] = struct.pack("<I", len(shared))
        shared += page + b"\0" * 4
    many = bytearray(tiff(np.zeros((1, 1), "u1")))
    (at,) = struct.unpack_from("<I", many, 4)
    page = bytes(many[at:-4])
    for _ in range(raster.MOST_PAGES + 1):
        many[-4:] = struct.pack("<I", len(many))
        many += page + b"\0" * 4
    # Directories that overlap: each of 400 has 6,000 entries, in a file of 77 KB.
    directory = bytearray(tiff(np.zeros((1, 1), "u1"), strips=1))
    (at,) = struct.unpack_from("<I", directory, 4)
    tags = bytes(directory[at + 2 : -4])
    del directory[at:]
    entries, pages = 6_000, 400
    directory += struct.pack("<HHQ", entries, 0, 0) * pages
    directory += bytes(at + 2 + 12 * entries - len(tags) - len(directory)) + tags
    directory += b"".join(struct.pack("<IQ", at + 12 * page, 0) for page in range(1, pages + 1))
    for data, message in ((promise, "promises"), (bytes(shared), "together"), (bytes(many), "pages"), (bytes(directory), "share")):
        before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        error = refusal(file_of(tmp_path, data))
        assert message in str(error)
        assert error.code == "raster-too-large"
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000
        assert time.process_time() - begun < 10


# ------------------------------------------------------------------------------------------------------------------ masks

LABELS = np.array([[0, 0, 1, 1], [0, 2, 2, 255], [0, 0, 0, 255]], "u1")
RED_GREEN = np.array([[(0, 0, 0), (255, 0, 0)], [(0, 255, 0), (254, 0, 0)]], "u1")
COLOURS = [(0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 0)]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        pytest.param(png(packed(LABELS, 8), 4, 8, 0), LABELS > 0, id="grey"),
        pytest.param(png(packed(LABELS & 1, 1), 4, 1, 0), (LABELS & 1) > 0, id="1 bit"),
        pytest.param(tiff(LABELS.astype("u2") * 256), LABELS > 0, id="16 bits, low byte 0"),
        pytest.param(png([row.tobytes() for row in RED_GREEN], 2, 8, 2), RED_GREEN.any(axis=2), id="RGB"),
        pytest.param(png(packed(LABELS & 3, 2), 4, 2, 3, (b"PLTE", bytes(sum(COLOURS[:3], ()))  + b"\1\1\1")), LABELS > 0, id="palette"),
        pytest.param(bmp(LABELS & 1, 1, [(0, 0, 0), (0, 0, 255)]), (LABELS & 1) > 0, id="BMP"),
        pytest.param(png(packed(LABELS * 0, 8), 4, 8, 0), LABELS < 0, id="nothing drawn"),
    ],
)  # fmt: skip
def test_masks(tmp_path: Path, data: bytes, expected: Array) -> None:
    """Without values a mask is what is not 0: one segment of the structure and reader that the layout says, also where nothing is drawn."""
    (drawn,) = raster.read_annotations(file_of(tmp_path, data), {"structure": "inner", "reader": "kim"})
    assert (drawn.source_key, drawn.structure, drawn.reader, drawn.kind, drawn.refers_to) == ("", "inner", "kim", "segment", {})
    np.testing.assert_array_equal(mask_of(drawn), expected)


@pytest.mark.parametrize(
    ("data", "values", "expected"),
    [
        pytest.param(png(packed(LABELS, 8), 4, 8, 0), {"1": "a", "255": "b"}, [LABELS == 1, LABELS == 255], id="grey"),
        pytest.param(png(packed(LABELS, 8), 4, 8, 0), {255: "b", "7": "none"}, [LABELS == 255, LABELS < 0], id="one does not occur"),
        pytest.param(png(packed(LABELS, 8), 4, 8, 0), {"#FFFFFF": "b", "#ff0000": "c"}, [LABELS == 255, LABELS < 0], id="grey by colour"),
        pytest.param(png(packed(LABELS & 3, 2), 4, 2, 0), {"2": "b"}, [(LABELS & 3) == 2], id="2 bits"),
        pytest.param(tiff(LABELS.astype("u2") * 257), {"257": "a"}, [LABELS == 1], id="16 bits"),
        pytest.param(
            png([row.tobytes() for row in RED_GREEN], 2, 8, 2), {"#FF0000": "a", "#00ff00": "b"},
            [np.array([[0, 1], [0, 0]]), np.array([[0, 0], [1, 0]])], id="RGB",
        ),
        pytest.param(tiff(np.repeat(LABELS[:, :, np.newaxis], 3, axis=2)), {"255": "b"}, [LABELS == 255], id="grey saved as RGB"),
        pytest.param(
            png(packed(LABELS & 3, 2), 4, 2, 3, (b"PLTE", bytes(sum(COLOURS, ())))), {"2": "b", "#ff0000": "a", "#000000": "black"},
            [(LABELS & 3) == 2, (LABELS & 3) == 1, np.isin(LABELS & 3, (0, 3))], id="palette",
        ),
        pytest.param(saved(LABELS, "GIF"), {"#010101": "a"}, [LABELS == 1], id="GIF"),
    ],
)  # fmt: skip
def test_values(tmp_path: Path, data: bytes, values: dict[Any, str], expected: list[Array]) -> None:
    """With values each gives a segment of exactly its pixels, under its own key and structure."""
    drawn = raster.read_annotations(file_of(tmp_path, data), {"values": values, "structure": "not used"})
    assert [item.structure for item in drawn] == list(values.values())
    assert [item.source_key for item in drawn] == [f"value {str(key).lower()}" for key in values]
    for item, inside in zip(drawn, expected, strict=True):
        np.testing.assert_array_equal(mask_of(item), inside)


def test_pages_are_frames(tmp_path: Path) -> None:
    """Each page of a TIFF is one frame, and every segment has a key of its own."""
    path = file_of(tmp_path, tiff(LABELS, LABELS * 0, LABELS[::-1]))
    drawn = raster.read_annotations(path, {"structure": "inner"})
    assert [(item.source_key, item.refers_to) for item in drawn] == [(f"frame {at}", {"frame": at}) for at in range(3)]
    np.testing.assert_array_equal(mask_of(drawn[2]), LABELS[::-1] > 0)
    drawn = raster.read_annotations(path, {"values": {"1": "a", "2": "b"}})
    assert [item.source_key for item in drawn] == [f"frame {at} value {value}" for at in range(3) for value in (1, 2)]
    assert drawn[1].refers_to == {"frame": 0}


DISC = (np.hypot(*np.mgrid[-40:40, -40:40]) < 25).astype("u1") * 255


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        pytest.param(bmp(LABELS & 1, 1, WHITE_FIRST), {}, "one black", id="index 0 is white"),
        pytest.param(png(packed(LABELS & 3, 2), 4, 2, 3, (b"PLTE", bytes(sum(COLOURS, ())))), {}, "one black", id="two blacks"),
        pytest.param(saved(LABELS, "GIF"), {"values": {"255": "b"}}, "greys", id="grey or index"),
        pytest.param(tiff(ramp(5, 7, "f4")), {}, "floating", id="float"),
        pytest.param(png([row.tobytes() for row in RED_GREEN], 2, 8, 2), {"values": {"255": "a"}}, "holds colours", id="number in colours"),
        pytest.param(tiff(LABELS.astype("u2")), {"values": {"#ff0000": "a"}}, "holds no colour", id="colour in 16 bits"),
        pytest.param(png(packed(LABELS, 8), 4, 8, 0), {"values": {"red": "a"}}, "must name", id="a name"),
        pytest.param(png(packed(LABELS, 8), 4, 8, 0), {"values": {"-1": "a"}}, "must name", id="below 0"),
        pytest.param(saved(DISC, "JPEG", quality=90), {"values": {"255": "a"}}, "save it as PNG", id="values in JPEG"),
        pytest.param(saved(DISC, "JPEG", quality=20), {}, "save it as PNG", id="JPEG of low quality"),
        pytest.param(saved(DISC // 2, "JPEG", quality=95), {}, "save it as PNG", id="grey JPEG"),
        pytest.param(saved(DISC // 2, "TIFF", compression="jpeg"), {}, "save it as PNG", id="JPEG in TIFF"),
    ],
)
def test_which_pixels_are_meant_is_never_guessed(tmp_path: Path, data: bytes, options: dict[str, Any], message: str) -> None:
    """A mask that can be read in two ways, or that lost its edge, is refused and says what to do."""
    error = refusal(file_of(tmp_path, data), **options)
    assert error.code == "raster-values"
    assert message in str(error)


@pytest.mark.parametrize("convert", ["L", "RGB"])
def test_a_jpeg_mask_is_black_and_white(tmp_path: Path, convert: str) -> None:
    """A black and white mask saved as JPEG of usual quality comes back exactly."""
    file = io.BytesIO()
    Image.fromarray(DISC).convert(convert).save(file, "JPEG", quality=85)
    (drawn,) = raster.read_annotations(file_of(tmp_path, file.getvalue()), {})
    np.testing.assert_array_equal(mask_of(drawn), DISC > 0)


@given(values=st.binary(min_size=1, max_size=64), columns=st.integers(1, 8), bits=st.sampled_from((1, 2, 4, 8)))
def test_any_grey_png(tmp_path_factory: pytest.TempPathFactory, values: bytes, columns: int, bits: int) -> None:
    """Whatever grey values a PNG of 1 to 8 bits holds, image and mask are these values."""
    stored = np.resize(np.frombuffer(values, "u1") & 2**bits - 1, (-(-len(values) // columns), columns))
    path = file_of(tmp_path_factory.mktemp("png"), png(packed(stored, bits), columns, bits, 0))
    np.testing.assert_array_equal(raster.decode_frame(path, 0), stored)
    np.testing.assert_array_equal(mask_of(raster.read_annotations(path, {})[0]), stored > 0)


# ---------------------------------------------------------------------------------------------------------------- damage

SOUND = [parameter.values[0] for parameter in STORED] + [
    saved(ramp(9, 11), "JPEG"), saved(ramp(9, 11), "TIFF", compression="tiff_lzw"), saved(ramp(9, 11) > 99, "TIFF", compression="group4"),
]  # fmt: skip


@pytest.mark.parametrize("data", [*SOUND[:3], *SOUND[-20:]])
def test_a_cut_file_is_whole_or_refused(tmp_path: Path, data: bytes) -> None:
    """Cut anywhere, a file gives all its pixels or a FileError, never fewer pages or black instead of what is missing."""
    whole = raster.read_images(file_of(tmp_path, data), {})
    refused = 0
    for length in range(0, len(data), max(1, len(data) // 150)):
        path = file_of(tmp_path, data[:length])
        try:
            assert raster.read_images(path, {}) == whole, length
        except FileError:
            refused += 1
    assert refused > 10


def survives(path: Path, inputs: int, seed: int) -> int:
    """Read mutants of all sound files; returns how many were read. Anything but a FileError is a failure."""
    rng, read = random.Random(seed), 0
    for _ in range(inputs):
        data = bytearray(rng.choice(SOUND))
        for _ in range(rng.randint(1, 6)):
            at = rng.randrange(len(data))
            match rng.randrange(5):
                case 0:
                    data[at] = rng.randrange(256)
                case 1:
                    data[at : at + 4] = rng.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f"))
                case 2:
                    del data[at : at + rng.randint(1, 8)]
                case 3:
                    data[at:at] = rng.randbytes(rng.randint(1, 8))
                case 4:
                    data = data[: max(at, 1)]
            data = data or bytearray(b"\0")
        path.write_bytes(data)
        for reader in (raster.read_images, raster.read_annotations):
            try:
                reader(path, {"values": {"1": "a", "#ff0000": "b"}} if rng.random() < 0.5 else {})
                read += 1
            except FileError as error:
                assert SECRET not in str(error)
                assert "\n" not in str(error)
    return read


def test_mutants(tmp_path: Path) -> None:
    """2,000 damaged files are read or refused; nothing else comes out."""
    assert survives(tmp_path / SECRET, 2_000, 1) > 100


@pytest.mark.soak
def test_many_mutants(tmp_path: Path) -> None:
    """The same for 100,000."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert survives(tmp_path / SECRET, 100_000, 2) > 5_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000
