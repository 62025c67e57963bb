"""IDX files, the format of MNIST and its family: a list of images, or a list of labels. Plain or gzip'd; numbers are big-endian.

A header is two zero bytes, a type, the number of dimensions, and each dimension as four bytes: http://yann.lecun.com/exdb/mnist/.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from catalog.cache import Content, open_content
from catalog.errors import FileError
from catalog.records import Drawn, Frame, Instance

TYPES = {0x08: "|u1", 0x09: "|i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
MOST_ITEMS = 1 << 20  # EMNIST by class, the largest of the family, has 697,932
MOST_IMAGE_BYTES = 1 << 28
BLOCK = 1 << 20  # bytes read at a time


def read_images(path: Path, options: Mapping[str, Any]) -> Instance:
    """Return the images of a file of three dimensions (images, rows, columns); identifiers are empty, since IDX has none.

    A gzip'd file is decompressed to its end, since nothing else says whether it is whole; with `options` ``{"hash": False}`` nothing is
    hashed, and of a plain file only the header is read.

    Raises:
        FileError: ``not-idx``; ``truncated``; ``unreadable`` for what is damaged, or is no list of images.
    """
    hashing = options.get("hash", True)
    with open_content(path) as content:
        dtype, offset, dims = _read_header(content)
        if len(dims) != 3:
            raise FileError("unreadable", f"{len(dims)} dimensions where images have three (images, rows, columns)")
        count, rows, columns = dims
        length = rows * columns * dtype.itemsize
        hashes: list[bytes | None] = [None] * count
        if hashing or content.coding:
            at_once = max(1, BLOCK // length)
            for start in range(0, count, at_once):
                here = min(at_once, count - start)
                stored = np.frombuffer(content.take(here * length), dtype).astype(dtype.newbyteorder("<"), copy=False)
                if hashing:
                    each = stored.reshape(here, -1)
                    hashes[start : start + here] = [hashlib.sha256(image.data).digest() for image in each]
            content.finish()
    frames = tuple(
        Frame(
            frame=frame, rows=rows, columns=columns, samples_per_pixel=1, photometric="MONOCHROME2", bits_stored=dtype.itemsize * 8,
            pixel_spacing=None, image_position=None, image_orientation=None, position=None, slice_thickness=None, trigger_time=None,
            slope=1.0, intercept=0.0, window_center=None, window_width=None, pixel_hash=pixel_hash, offset=offset + frame * length,
            length=length, dtype=dtype.str,
        )
        for frame, pixel_hash in enumerate(hashes)
    )  # fmt: skip
    return Instance(
        patient_id="", study_instance_uid="", series_instance_uid="", sop_instance_uid="", sop_class_uid="", modality="",
        series_number=None, study_date="", instance_number=None, images_in_acquisition=None, frame_of_reference_uid="",
        transfer_syntax_uid="", number_of_frames=count, frames=frames, coding=content.coding,
    )  # fmt: skip


def read_annotations(path: Path, options: Mapping[str, Any]) -> list[Drawn]:
    """Return the labels of a file of one dimension: label i is that of image i.

    Options:
        image_path: the file of the images, relative to `root`; where it holds another number of images than there are labels,
            ``refers_to["mismatch"]`` says so: which label is whose is not known then.
        root: the root's folder.
        reader: who gave the labels; ``manual``.

    Raises:
        FileError: As `read_images`; ``not-labels`` for floats, or more than one dimension.
    """
    with open_content(path) as content:
        dtype, _, dims = _read_header(content)
        if len(dims) != 1 or dtype.kind == "f":
            raise FileError("not-labels", f"{len(dims)} dimension(s) of {dtype.name} where labels are one of whole numbers")
        values = np.frombuffer(content.take(dims[0] * dtype.itemsize), dtype).tolist()
        content.finish()
    where: dict[str, Any] = {}
    if image_path := options.get("image_path"):
        where["path"] = image_path
        if (images := _count(Path(options["root"], image_path))) not in (None, len(values)):
            where["mismatch"] = f"{len(values)} labels, the images are {images}"
    reader = options.get("reader") or "manual"
    return [Drawn(str(at), "label", reader, "label", {**where, "frame": at}, label=str(value)) for at, value in enumerate(values)]


def _count(path: Path) -> int | None:
    """Return how many images a file holds; None if it does not say: then it is refused itself, or not there, and nothing is paired."""
    try:
        with open_content(path) as content:
            return _read_header(content)[2][0]
    except FileError:
        return None


def _read_header(content: Content) -> tuple[np.dtype[Any], int, tuple[int, ...]]:
    """Return type, length of the header in bytes, and dimensions; `content` is left behind it."""
    try:
        zeros, kind, count = content.take(2), *content.take(2)
        if zeros != b"\0\0" or kind not in TYPES or not 1 <= count <= 8:
            raise FileError("not-idx", "no IDX header at its start, so this is no IDX file")
        dims = tuple(np.frombuffer(content.take(4 * count), ">u4").tolist())
    except FileError as error:
        if error.code == "truncated":
            raise FileError("not-idx", "too short for a header, so this is no IDX file") from None
        raise
    dtype, items = np.dtype(TYPES[kind]), 1
    for size in dims[1:]:
        items *= size
    offset = 4 + 4 * count
    if not dims[0] or not items:
        raise FileError("unreadable", "a dimension is 0, so there is nothing in it")
    if dims[0] > MOST_ITEMS or items * dtype.itemsize > MOST_IMAGE_BYTES:
        raise FileError(
            "unreadable", f"its header promises {'×'.join(map(str, dims))} values, which is beyond what is read; it may be damaged"
        )
    content.expect(offset + dims[0] * items * dtype.itemsize)
    return dtype, offset, dims
