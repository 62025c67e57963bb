"""IDX files: images by offset, labels, and how names pair them. The oracle is the published layout, read by hand."""

from __future__ import annotations

import gzip
import hashlib
import os
import random
import resource
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from catalog.errors import FileError
from catalog.idx import TYPES, read_annotations, read_images
from catalog.layouts import Found, Tree
from catalog.layouts import idx as layout
from catalog.records import Instance

DATA = Path(os.environ.get("SCANFEED_DATA", Path(__file__).parents[2] / "shared" / "data")) / "mnist"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no MNIST files in {DATA}; set SCANFEED_DATA")
IMAGES, LABELS = "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"


def idx(data: np.ndarray[Any, Any]) -> bytes:
    """The bytes of an IDX file."""
    kind = {np.dtype(name): code for code, name in TYPES.items()}[data.dtype.newbyteorder(">")]
    return struct.pack(f">HBB{data.ndim}I", 0, kind, data.ndim, *data.shape) + data.astype(data.dtype.newbyteorder(">")).tobytes()


def stored(path: Path, found: Instance) -> np.ndarray[Any, Any]:
    """The images as reads at their offsets give them."""
    data = gzip.decompress(path.read_bytes()) if found.coding else path.read_bytes()
    return np.stack(
        [
            np.frombuffer(data[frame.offset :][: frame.length], frame.dtype).reshape(frame.rows, frame.columns)
            for frame in found.frames
            if frame.offset is not None
        ]
    )


def refusal(path: Path, reader: Any = read_images, options: Any = None) -> FileError:
    with pytest.raises(FileError) as caught:
        reader(path, options or {})
    assert str(path) not in str(caught.value)
    assert "\n" not in str(caught.value)
    return caught.value


@needs_data
def test_the_real_files(tmp_path: Path) -> None:
    """MNIST's 10,000 images and labels, gzip'd and plain: the published pixels, each at its offset, with its label."""
    plain = tmp_path / "images"
    plain.write_bytes(gzip.decompress((DATA / IMAGES).read_bytes()))
    expected = np.frombuffer(plain.read_bytes(), np.uint8, offset=16).reshape(10_000, 28, 28)
    for path, coding in ((DATA / IMAGES, "gzip"), (plain, "")):
        found = read_images(path, {})
        assert (found.coding, found.number_of_frames, len(found.frames)) == (coding, 10_000, 10_000)
        assert np.array_equal(stored(path, found) if not coding else expected, expected)
        assert [frame.offset for frame in found.frames] == list(range(16, 16 + 784 * 10_000, 784))
        assert [frame.pixel_hash for frame in found.frames] == [hashlib.sha256(image.tobytes()).digest() for image in expected]
        assert {(frame.dtype, frame.slope, frame.intercept, frame.pixel_spacing) for frame in found.frames} == {("|u1", 1.0, 0.0, None)}
    found = layout.read(Tree(DATA), {})
    assert layout.recognises(Tree(DATA)) == f"1 IDX files of images, such as {IMAGES}"
    drawn = read_annotations(DATA / LABELS, {"root": str(DATA), **found.annotations[0].options})
    values = np.frombuffer(gzip.decompress((DATA / LABELS).read_bytes()), np.uint8, offset=8)
    assert [one.label for one in drawn] == [str(value) for value in values]
    assert [one.refers_to for one in drawn] == [{"path": IMAGES, "frame": number} for number in range(10_000)]
    assert {(one.structure, one.kind, one.reader) for one in drawn} == {("label", "label", "manual")}
    assert np.bincount(values).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]  # as published


@given(shape=st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4)), kind=st.sampled_from(sorted(TYPES)), zipped=st.booleans())
def test_any_images(tmp_path_factory: pytest.TempPathFactory, shape: tuple[int, ...], kind: int, zipped: bool) -> None:
    """Every type: values, byte order and hash, plain and gzip'd; without hashing the same places."""
    data = (np.arange(np.prod(shape)) * 37 % 120).reshape(shape).astype(np.dtype(TYPES[kind]).newbyteorder("="))
    path = tmp_path_factory.mktemp("any") / "images"
    path.write_bytes(gzip.compress(idx(data)) if zipped else idx(data))
    found = read_images(path, {})
    assert np.array_equal(stored(path, found), data)
    assert [frame.pixel_hash for frame in found.frames] == [
        hashlib.sha256(image.astype(image.dtype.newbyteorder("<")).tobytes()).digest() for image in data
    ]
    assert {np.dtype(frame.dtype) for frame in found.frames} == {np.dtype(TYPES[kind])}
    unhashed = read_images(path, {"hash": False})
    assert [(frame.offset, frame.length) for frame in unhashed.frames] == [(frame.offset, frame.length) for frame in found.frames]
    assert {frame.pixel_hash for frame in unhashed.frames} == {None}


@pytest.mark.parametrize("dtype", ["u1", "i1", ">i2", ">i4"])
def test_labels(tmp_path: Path, dtype: str) -> None:
    """Whole numbers of any type; another number of images than labels is said on each."""
    (tmp_path / "labels").write_bytes(idx(np.array([5, 0, 7], dtype)))
    options = {"root": str(tmp_path), "image_path": "images", "reader": "kim"}
    for images, mismatch in ((3, None), (2, "3 labels, the images are 2"), (4, "3 labels, the images are 4")):
        (tmp_path / "images").write_bytes(gzip.compress(idx(np.zeros((images, 2, 2), np.uint8))))
        drawn = read_annotations(tmp_path / "labels", options)
        assert [(one.label, one.refers_to["frame"], one.refers_to["path"], one.reader) for one in drawn] == [
            ("5", 0, "images", "kim"), ("0", 1, "images", "kim"), ("7", 2, "images", "kim"),
        ]  # fmt: skip
        assert {one.refers_to.get("mismatch") for one in drawn} == {mismatch}
    (tmp_path / "images").unlink()
    assert [one.refers_to for one in read_annotations(tmp_path / "labels", options)] == [{"path": "images", "frame": n} for n in range(3)]
    assert [one.refers_to for one in read_annotations(tmp_path / "labels", {})] == [{"frame": n} for n in range(3)]


HEADERS = [
    (b"", "not-idx"), (b"\0\0\x08", "not-idx"), (b"\0\0\x08\3\0\0", "not-idx"), (b"\0\1\x08\3" + bytes(100), "not-idx"),
    (b"\0\0\x0a\3" + bytes(100), "not-idx"), (b"\0\0\x08\0" + bytes(100), "not-idx"), (b"\0\0\x08\xff" + bytes(2000), "not-idx"),
    (struct.pack(">HBB3I", 0, 8, 3, 0, 2, 2), "unreadable"), (struct.pack(">HBB3I", 0, 8, 3, 2, 0, 2), "unreadable"),
    (struct.pack(">HBB3I", 0, 8, 3, 2, 2, 2) + bytes(7), "truncated"), (struct.pack(">HBB2I", 0, 8, 2, 2, 2) + bytes(4), "unreadable"),
    (struct.pack(">HBB4I", 0, 8, 4, 2, 2, 2, 3) + bytes(24), "unreadable"), (struct.pack(">HBB1I", 0, 8, 1, 2) + bytes(2), "unreadable"),
    (struct.pack(">HBB3I", 0, 8, 3, 2**32 - 1, 1, 1), "unreadable"), (struct.pack(">HBB3I", 0, 8, 3, 1, 2**31, 2**31), "unreadable"),
    (struct.pack(">HBB3I", 0, 8, 3, 2**20, 2**14, 2**14), "truncated"),
    (struct.pack(">HBB8I", 0, 8, 8, *[2**32 - 1] * 8), "unreadable"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "code"), HEADERS)
def test_refused(tmp_path: Path, data: bytes, code: str) -> None:
    """What is no IDX file, holds no images, or promises more than it has is refused as that, plain and gzip'd."""
    for stored_bytes in (data, gzip.compress(data)):
        (tmp_path / "images").write_bytes(stored_bytes)
        assert refusal(tmp_path / "images").code == code
        assert refusal(tmp_path / "images", options={"hash": False}).code == code


def test_refused_labels(tmp_path: Path) -> None:
    """Floats and lists of lists are no labels; cut off and damaged files are refused."""
    path = tmp_path / "labels"
    for data in (np.zeros(3, ">f4"), np.zeros((3, 8), np.uint8), np.zeros((3, 2, 2), np.uint8)):
        path.write_bytes(idx(data))
        assert refusal(path, read_annotations).code == "not-labels"
    whole = idx(np.zeros(100, np.uint8))
    for data, code in (
        (whole[:-1], "truncated"), (gzip.compress(whole)[:-9], "truncated"), (gzip.compress(whole)[:-8] + bytes(8), "unreadable"),
        (gzip.compress(whole) + b"garbage", "unreadable"),
    ):  # fmt: skip
        path.write_bytes(data)
        assert refusal(path, read_annotations).code == code
    assert refusal(tmp_path / "missing").code == refusal(tmp_path).code == "unreadable"


# ------------------------------------------------------------------------------------------------------------- layout


def make_tree(folder: Path, *names: str) -> Found:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return layout.read(Tree(folder), {})


@pytest.mark.parametrize(
    ("images", "labels", "patient"),
    [
        ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte", "t10k"),
        ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte", "t10k"),
        ("train-images.idx3-ubyte", "train-labels.idx1-ubyte", "train"),
        ("images.idx3-ubyte", "labels.idx1-ubyte", "idx"),
        ("raw/images.idx3-ubyte", "raw/labels.idx1-ubyte", "raw"),
        ("gzip/emnist-letters-train-images-idx3-ubyte.gz", "gzip/emnist-letters-train-labels-idx1-ubyte.gz", "gzip/emnist-letters-train"),
        ("a-images-idx3-float", "a-labels-idx1-int", "a"),
    ],
)
def test_names(tmp_path: Path, images: str, labels: str, patient: str) -> None:
    """The names of the family pair; their set is the patient."""
    found = make_tree(tmp_path, images, labels)
    assert [(image.entry.path, image.patient, image.sure, image.format) for image in found.images] == [(images, patient, True, "idx")]
    assert [(one.entry.path, one.options, one.unpaired, one.format) for one in found.annotations] == [
        (labels, {"image_path": images}, "", "idx")
    ]
    assert layout.recognises(Tree(tmp_path))


def test_several_sets(tmp_path: Path) -> None:
    """Only one set's files belong together; the plain one of two is taken; labels alone are unpaired, with a reason."""
    found = make_tree(
        tmp_path, "train-images-idx3-ubyte", "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz", "train-labels-idx1-ubyte",
        "train-images.idx3-ubyte", "train-labels.idx1-ubyte", "fashion/train-images-idx3-ubyte.gz", "fashion/train-labels-idx1-ubyte.gz",
        "t10k-labels-idx1-ubyte", "x-images-idx3-ubyte", "x-images-idx3-float", "x-labels-idx1-ubyte", "mapping.txt",
        "qmnist-train-labels-idx2-int", "train-images-idx3-ubyte.bak", "images",
    )  # fmt: skip
    assert {one.entry.path: one.options.get("image_path") for one in found.annotations} == {
        "train-labels-idx1-ubyte": "train-images-idx3-ubyte", "train-labels.idx1-ubyte": "train-images.idx3-ubyte",
        "fashion/train-labels-idx1-ubyte.gz": "fashion/train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte": None,
        "x-labels-idx1-ubyte": None,
    }  # fmt: skip
    unpaired = {one.entry.path: one.unpaired for one in found.annotations if one.unpaired}
    assert unpaired == {
        "t10k-labels-idx1-ubyte": "no file of images has this name", "x-labels-idx1-ubyte": "several files of images have this name",
    }  # fmt: skip
    assert {image.patient for image in found.images} == {"train", "fashion/train", "x"}
    assert (len(found.images), found.left_over) == (5, 6)
    assert layout.recognises(Tree(tmp_path / "nothing")) is None


# --------------------------------------------------------------------------------------------------------------- fuzz


def check_fuzz(folder: Path, count: int) -> None:
    chance = random.Random(5)
    numbers = np.arange(24, dtype=np.uint8)
    seeds = [idx(numbers.reshape(3, 2, 4)), idx(numbers.reshape(6, 2, 2).astype(">f8")), idx(numbers), idx(numbers.astype(">i4"))]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (folder / "images").write_bytes(seeds[0])
    path, read, refused = folder / "mutant", 0, 0
    for _ in range(count):
        data = bytearray(chance.choice(seeds))
        for _ in range(chance.choice((0, 1, 1, 2, 4))):
            at = chance.randrange(16) if chance.random() < 0.8 else chance.randrange(len(data) + 1)
            data[at : at + chance.choice((1, 1, 4))] = chance.choice(
                (b"\xff", b"\0", b"\1", bytes([chance.randrange(256)]), b"\x7f\xff\xff\xff")
            )
            if chance.random() < 0.05:
                del data[at:]
        mutant = gzip.compress(data, 1) if chance.random() < 0.3 else bytes(data)
        if mutant[:2] == b"\x1f\x8b" and chance.random() < 0.3:
            mutant = mutant[: chance.randrange(len(mutant))] + bytes([chance.randrange(256)])
        path.write_bytes(mutant)
        for reader in (read_images, read_annotations):
            try:
                reader(path, {"root": str(folder), "image_path": "images"})  # type: ignore[operator]
                read += 1
            except FileError as error:
                assert "\n" not in str(error)
                refused += 1
    assert read > count // 10
    assert refused > count // 4
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


def test_mutants(tmp_path: Path) -> None:
    """Damaged headers are read or refused by a FileError, with no memory for what they only promise."""
    check_fuzz(tmp_path, 2_000)


@pytest.mark.soak
def test_many_mutants(tmp_path: Path) -> None:
    """The same, 100,000 times."""
    check_fuzz(tmp_path, 100_000)
