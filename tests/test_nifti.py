"""NIfTI: slices by offset, geometry, segments of label volumes, and how folders pair them. The oracle is nibabel's own image."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import re
import resource
import struct
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from catalog import contours
from catalog.errors import FileError
from catalog.layouts import Found, Tree
from catalog.layouts import nifti as layout
from catalog.nifti import NUMBERS, OTHERS, read_annotations, read_images
from catalog.records import Drawn, Instance

DATA = Path(os.environ.get("SCANFEED_DATA", Path(__file__).parents[2] / "shared" / "data")) / "nifti"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no NIfTI files in {DATA}; set SCANFEED_DATA")

# An oblique affine in RAS: columns run left, rows to the feet and a little to the back.
AFFINE = np.array([[-0.9, 0.0, 0.3, 12.0], [0.1, -0.4, 2.0, -7.5], [0.0, -1.1, 0.1, 30.25], [0, 0, 0, 1.0]])


def write(path: Path, data: np.ndarray[Any, Any], affine: Any = AFFINE, *, two: bool = False, big: bool = False, **fields: Any) -> Path:
    """Write a volume with nibabel; `fields` are set in its header's bytes, past every check."""
    kind = nib.Nifti2Image if two else nib.Nifti1Image
    header = kind.header_class(endianness=">" if big else "<")
    header.set_data_dtype(data.dtype)
    image = kind(data, affine, header, dtype=data.dtype)
    if affine is not None:
        image.set_qform(affine, 0)
        image.set_sform(affine, 2)
    plain = path.with_name("plain.nii")
    nib.save(image, plain)
    stored = bytearray(plain.read_bytes())
    size = 540 if two else 348
    raw = kind.header_class(bytes(stored[:size]), ">" if big else "<", check=False)
    for name, value in fields.items():
        raw[name] = value
    stored[:size] = raw.binaryblock
    plain.unlink()
    path.write_bytes(gzip.compress(bytes(stored), 1) if path.suffix == ".gz" else stored)
    return path


def ramp(*shape: int, dtype: str = "i2") -> np.ndarray[Any, Any]:
    return (np.arange(np.prod(shape)) * 7 % 119).reshape(shape).astype(dtype)


def content(path: Path) -> bytes:
    data = path.read_bytes()
    return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data


def stored(path: Path, found: Instance) -> list[np.ndarray[Any, Any]]:
    """Each image as a read at its offset gives it."""
    data = content(path)
    return [
        np.frombuffer(data, frame.dtype, frame.rows * frame.columns, frame.offset or -1).reshape(frame.rows, frame.columns)
        for frame in found.frames
    ]


def refusal(path: Path, options: dict[str, Any] | None = None) -> FileError:
    """The FileError that a file gives as an image and as a label volume, in one line without its path."""
    with pytest.raises(FileError) as caught:
        read_images(path, options or {})
    with pytest.raises(FileError):
        read_annotations(path, options or {})
    assert str(path) not in str(caught.value)
    assert "\n" not in str(caught.value)
    return caught.value


def check_against_nibabel(path: Path) -> Instance:
    """Pixels, scaling, hashes and places of every image are those of nibabel's array and affine."""
    found = read_images(path, {})
    image = nib.load(path)
    unscaled, data = image.dataobj.get_unscaled(), image.get_fdata()
    volume = unscaled.reshape(*unscaled.shape[:2], -1, order="F")
    scaled = data.reshape(volume.shape, order="F")
    slices = unscaled.shape[2] if unscaled.ndim > 2 else 1
    assert found.number_of_frames == len(found.frames) == volume.shape[2]
    assert found.coding == ("gzip" if path.suffix == ".gz" else "")
    for frame, pixels in zip(found.frames, stored(path, found), strict=True):
        at = frame.frame
        assert np.array_equal(pixels, volume[:, :, at].T, equal_nan=pixels.dtype.kind == "f")
        assert np.dtype(frame.dtype) == unscaled.dtype
        assert np.allclose(pixels.astype(np.float64) * frame.slope + frame.intercept, scaled[:, :, at].T, rtol=1e-6, equal_nan=True)
        little = np.ascontiguousarray(pixels, pixels.dtype.newbyteorder("<"))
        assert frame.pixel_hash == hashlib.sha256(little.data).digest()
        assert frame.length == pixels.nbytes
        if frame.image_position is None:
            assert image.header["sform_code"] <= 0 >= image.header["qform_code"]
            continue
        # PS3.3 C.7.6.2.1.1: a pixel's place from position, orientation and spacing; LPS has x and y the other way round.
        assert frame.image_orientation is not None
        assert frame.pixel_spacing is not None
        row, column = frame.rows - 1, frame.columns // 2
        along_row, along_column = np.array(frame.image_orientation[:3]), np.array(frame.image_orientation[3:])
        between_rows, between_columns = frame.pixel_spacing
        place = np.array(frame.image_position) + along_row * between_columns * column + along_column * between_rows * row
        scale = {1: 1000.0, 3: 0.001}.get(int(image.header["xyzt_units"]) & 7, 1.0)
        expected = (image.affine @ [column, row, at % slices, 1])[:3] * scale * [-1, -1, 1]
        assert np.allclose(place, expected, atol=1e-4 * scale)
        assert frame.position == pytest.approx(float(np.dot(frame.image_position, np.cross(along_row, along_column))), abs=1e-6)
    return found


@needs_data
def test_the_real_files() -> None:
    """Every image and label volume here is read as nibabel reads it, scaling and geometry too."""
    paths = sorted(DATA.rglob("*.nii*"))
    assert len(paths) == 41
    frames = sum(check_against_nibabel(path).number_of_frames for path in paths)
    assert frames == sum(int(np.prod(nib.load(path).shape[2:])) for path in paths)


@needs_data
def test_the_same_series_as_dicom() -> None:
    """A volume made of DICOM files: each slice is one of theirs, pixel for pixel, at the same place, turned the same way."""
    path = DATA / "dicom-and-nifti" / "001_ground_truth.nii.gz"
    found = read_images(path, {})
    files = [pydicom.dcmread(file) for file in (DATA / "dicom-and-nifti" / "dicom").iterdir()]
    files.sort(key=lambda dataset: int(dataset.InstanceNumber), reverse=True)
    assert len(files) == found.number_of_frames == 4
    for dataset, frame, pixels in zip(files, found.frames, stored(path, found), strict=True):
        assert np.array_equal(pixels, dataset.pixel_array)
        assert np.allclose(frame.image_position, dataset.ImagePositionPatient, atol=1e-3)
        assert np.allclose(frame.image_orientation, dataset.ImageOrientationPatient, atol=1e-5)
        assert np.allclose(frame.pixel_spacing, dataset.PixelSpacing, atol=1e-5)


@needs_data
def test_the_real_labels() -> None:
    """19 pairs: for each slice and value that is there one segment, the mask that nibabel's array has, on the image's slice."""
    found = layout.read(Tree(DATA / "hippocampus"), {})
    assert (len(found.images), len(found.annotations), found.left_over, found.problems) == (19, 19, 0, [])
    assert {image.patient for image in found.images} == {Path(image.entry.path).name.removesuffix(".nii.gz") for image in found.images}
    for annotation in found.annotations:
        drawn = read_annotations(DATA / "hippocampus" / annotation.entry.path, {"root": str(DATA / "hippocampus"), **annotation.options})
        labels = np.asarray(nib.load(DATA / "hippocampus" / annotation.entry.path).dataobj)
        expected = {(k, value) for k in range(labels.shape[2]) for value in np.unique(labels[:, :, k]).tolist() if value}
        assert {(one.refers_to["frame"], one.refers_to["value"]) for one in drawn} == expected
        for one in drawn:
            assert one.refers_to["path"] == annotation.entry.path.replace("labels/", "images/")
            assert "mismatch" not in one.refers_to
            assert np.array_equal(mask(one), one.refers_to["value"] == labels[:, :, one.refers_to["frame"]].T)
            assert (one.structure, one.reader, one.kind) == (f"label {one.refers_to['value']}", "manual", "segment")
        assert len({one.source_key for one in drawn}) == len(drawn)


def mask(drawn: Drawn) -> np.ndarray[Any, Any]:
    assert drawn.segment is not None
    return contours.unboxed(drawn.segment.rows, drawn.segment.columns, drawn.segment.box, drawn.segment.bits)


@given(
    shape=st.lists(st.integers(1, 5), min_size=2, max_size=4).map(tuple),
    dtype=st.sampled_from(sorted(NUMBERS.values())),
    two=st.booleans(), big=st.booleans(), suffix=st.sampled_from([".nii", ".nii.gz"]), qform=st.booleans(),
    units=st.integers(0, 3), slope=st.sampled_from([0.0, 1.0, -2.5, float("nan"), float("inf")]), gap=st.sampled_from([0, 16, 1000]),
)  # fmt: skip
@settings(max_examples=150)
def test_any_volume(
    tmp_path_factory: pytest.TempPathFactory,
    shape: tuple[int, ...], dtype: str, two: bool, big: bool, suffix: str, qform: bool, units: int, slope: float, gap: int,
) -> None:  # fmt: skip
    """Any numeric type, byte order, version, dimension, scaling, unit and either affine: read as nibabel reads it."""
    path = write(tmp_path_factory.mktemp("any") / f"v{suffix}", ramp(*shape, dtype=dtype), two=two, big=big)
    image = nib.load(path)
    straight = np.linalg.qr(AFFINE[:3, :3])[0] * np.linalg.norm(AFFINE[:3, :3], axis=0)  # a qform cannot be sheared
    image.set_qform(np.block([[straight, AFFINE[:3, 3:]], [np.zeros((1, 3)), 1]]), 1)
    fields = {name: image.header[name] for name in ("pixdim", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z")}
    fields |= {"qform_code": 1, "sform_code": 0} if qform else {}
    fields |= {"xyzt_units": units, "scl_slope": slope, "scl_inter": -3.5}
    path = write(path, ramp(*shape, dtype=dtype), two=two, big=big, **fields)
    if gap:  # header extensions lie between header and voxels
        data = content(path)
        start = 544 if two else 352
        data = data[:start] + bytes(gap) + data[start:]
        header = bytearray(data)
        at, form = (168, "q") if two else (108, "f")
        header[at : at + struct.calcsize(form)] = struct.pack((">" if big else "<") + form, start + gap)
        path.write_bytes(gzip.compress(header, 1) if suffix == ".nii.gz" else header)
    found = check_against_nibabel(path)
    assert all(
        (frame.bits_stored, frame.trigger_time, frame.samples_per_pixel) == (np.dtype(dtype).itemsize * 8, None, 1)
        for frame in found.frames
    )
    unhashed = read_images(path, {"hash": False})
    assert [frame.offset for frame in unhashed.frames] == [frame.offset for frame in found.frames]
    assert {frame.pixel_hash for frame in unhashed.frames} == {None}


def test_geometry_without_affine(tmp_path: Path) -> None:
    """Neither form coded: spacing in mm of the unit and no place; a qform that is none, an sform that is flat: the same."""
    nothing = {"sform_code": 0, "qform_code": 0, "pixdim": [1, 0.5, 0.25, 2, 0, 0, 0, 0]}
    flat = {"srow_x": [1, 0, 1, 0], "srow_y": [0, 1, 0, 0], "srow_z": [0, 0, 0, 0]}
    for fields in (nothing, {**nothing, "qform_code": 1, "quatern_b": 3.0}, {**nothing, "sform_code": 1, **flat},
                   {**nothing, "sform_code": 1, "srow_x": [float("nan"), 0, 0, 0]}):  # fmt: skip
        frame = read_images(write(tmp_path / "v.nii", ramp(3, 4, 2), **fields), {}).frames[1]
        assert (frame.pixel_spacing, frame.slice_thickness) == ((0.25, 0.5), 2.0)
        assert (frame.image_position, frame.image_orientation, frame.position) == (None, None, None)
    tiny = {"sform_code": 1, "srow_x": [1e-162, 0, 0, 0], "srow_y": [0, 1e-170, 0, 0], "srow_z": [0, 0, 1e-170, 0]}
    assert read_images(write(tmp_path / "v.nii", ramp(3, 4, 2), two=True, **tiny), {}).frames[0].image_position is None
    metres = read_images(write(tmp_path / "v.nii", ramp(3, 4, 2), **nothing, xyzt_units=1), {}).frames[0]
    assert (metres.pixel_spacing, metres.slice_thickness) == ((250.0, 500.0), 2000.0)
    unknown = read_images(write(tmp_path / "v.nii", ramp(3, 4), **{**nothing, "pixdim": [0] * 8}), {}).frames[0]
    assert (unknown.pixel_spacing, unknown.slice_thickness) == (None, None)


@pytest.mark.parametrize("qfac", [0.0, 1.0, -1.0, 7.0])
def test_qfac(tmp_path: Path, qfac: float) -> None:
    """pixdim[0] turns a qform's third axis around if it is -1, and does nothing else, whatever it is (nifti1.h)."""
    fields = {"sform_code": 0, "qform_code": 1, "quatern_b": 0.6, "quatern_c": -0.3, "quatern_d": 0.1, "qoffset_x": 5}
    check_against_nibabel(write(tmp_path / "v.nii", ramp(3, 4, 2), **fields, pixdim=[qfac, 0.5, 0.25, 2, 1, 1, 1, 1]))


def test_order_in_four_dimensions(tmp_path: Path) -> None:
    """Frames run over slices, then over time, and each slice has the same place at each time."""
    data = ramp(3, 4, 5, 2)
    path = write(tmp_path / "v.nii", data)
    found = read_images(path, {})
    for t in range(2):
        for k in range(5):
            frame = found.frames[t * 5 + k]
            assert np.array_equal(stored(path, found)[t * 5 + k], data[:, :, k, t].T)
            assert frame.image_position == found.frames[k].image_position
    assert len({frame.image_position for frame in found.frames}) == 5


@pytest.mark.parametrize(
    ("fields", "code", "words"),
    [
        ({"magic": b"ni1"}, "unreadable", r"\.hdr/\.img pair"),
        ({"magic": b""}, "not-nifti", "Analyze"),
        ({"sizeof_hdr": 347}, "not-nifti", "no NIfTI-1 or NIfTI-2 header"),
        *[({"datatype": code}, "unreadable", name) for code, name in OTHERS.items()],
        ({"datatype": 3}, "unreadable", "unknown datatype 3"),
        ({"dim": [5, 3, 4, 2, 1, 3, 1, 1]}, "unreadable", "at most four"),
        ({"dim": [1, 3, 4, 2, 1, 1, 1, 1]}, "unreadable", r"dim\[0\] is 1"),
        ({"dim": [9, 3, 4, 2, 1, 1, 1, 1]}, "unreadable", r"dim\[0\] is 9"),
        ({"dim": [3, -1, 1, 1, 1, 1, 1, 1]}, "unreadable", "below 1"),
        ({"dim": [3, 3, 0, 2, 1, 1, 1, 1]}, "unreadable", "below 1"),
        ({"dim": [3, 3, 4, 3, 1, 1, 1, 1]}, "truncated", "cut off"),
        ({"dim": [4, 32767, 32767, 32767, 32767, 1, 1, 1]}, "unreadable", "beyond what is read"),
        ({"dim": [4, 1, 1, 32767, 32767, 1, 1, 1]}, "unreadable", "beyond what is read"),
        ({"vox_offset": 0}, "unreadable", "inside the header"),
        ({"vox_offset": 348}, "unreadable", "inside the header"),
        ({"vox_offset": 352.5}, "unreadable", "no whole number"),
        ({"vox_offset": float("nan")}, "unreadable", "no whole number"),
        ({"vox_offset": 1e18}, "truncated", "promises"),
        ({"scl_slope": 2.0, "scl_inter": float("inf")}, "unreadable", "scl_inter"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_refused(tmp_path: Path, fields: dict[str, Any], code: str, words: str, suffix: str) -> None:
    """What is no volume of numbers, or lies about itself, is refused with what it is; a gzip'd file as well."""
    error = refusal(write(tmp_path / f"v{suffix}", ramp(3, 4, 2), **fields))
    assert error.code == code
    assert re.search(words, str(error))


def test_five_dimensions_of_one(tmp_path: Path) -> None:
    """More dimensions of size 1 say nothing, and are read."""
    check_against_nibabel(write(tmp_path / "v.nii", ramp(3, 4, 2, 1, 1, 1)))


@pytest.mark.parametrize("hashing", [True, False])
def test_cut_off(tmp_path: Path, hashing: bool) -> None:
    """A file cut off anywhere is no NIfTI or truncated, plain and gzip'd, with and without hashing; one damaged inside is unreadable."""
    whole = write(tmp_path / "v.nii", np.random.default_rng(1).integers(0, 255, (16, 16, 8), np.uint8)).read_bytes()
    squeezed = gzip.compress(whole)
    path = tmp_path / "cut"
    for data in (whole, squeezed):
        for length in (0, 1, 3, 4, 100, 347, 351, 352, len(data) // 2, len(data) - 1):
            path.write_bytes(data[:length])
            assert refusal(path, {"hash": hashing}).code in ("not-nifti", "truncated"), length
    for wrong in (squeezed[:-8] + bytes(8), squeezed + b"garbage"):
        path.write_bytes(wrong)
        assert refusal(path, {"hash": hashing}).code == "unreadable"
    path.write_bytes(squeezed + bytes(100))  # padding, which gzip allows
    assert read_images(path, {}).number_of_frames == 8
    assert refusal(tmp_path / "missing").code == refusal(tmp_path).code == "unreadable"


def test_without_nibabel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without nibabel one line says what to install."""
    path = write(tmp_path / "v.nii", ramp(3, 4, 2))
    monkeypatch.setitem(sys.modules, "nibabel.nifti1", None)
    error = refusal(path)
    assert error.code == "no-decoder"
    assert "pip install 'scanfeed[nifti]'" in str(error)


# ----------------------------------------------------------------------------------------------------- label volumes


def label_volume(*shape: int, values: int = 3, dtype: str = "u1") -> np.ndarray[Any, Any]:
    labels = np.random.default_rng(3).integers(0, values, shape).astype(dtype)
    labels[:, :, 0] = 0
    return labels


@pytest.mark.parametrize("dtype", ["u1", "i2", "f4", "f8", "u8"])
def test_labels(tmp_path: Path, dtype: str) -> None:
    """Named values, unnamed ones, structures of several values; no segment for the background or for what a slice has not."""
    labels = label_volume(5, 6, 4, values=5, dtype=dtype)
    path = write(tmp_path / "l.nii.gz", labels)
    write(tmp_path / "i.nii", ramp(5, 6, 4))
    names = {"0": "background", "1": "liver", "2,3": "tumour", "3": "core"}
    drawn = read_annotations(path, {"image_path": "i.nii", "root": str(tmp_path), "labels": names, "reader": "kim"})
    meaning = {"liver": [1], "tumour": [2, 3], "core": [3], "label 4": [4]}
    for k in range(4):
        here = {one.structure: one for one in drawn if one.refers_to["frame"] == k}
        assert here.keys() == {name for name, values in meaning.items() if np.isin(labels[:, :, k], values).any()}
        for name, one in here.items():
            assert np.array_equal(mask(one), np.isin(labels[:, :, k].T, meaning[name]))
            assert one.reader == "kim"
            assert one.refers_to["path"] == "i.nii"
            assert one.refers_to["shape"] == [5, 6, 4]
            assert np.allclose(np.reshape(one.refers_to["affine"], (4, 4)), AFFINE, atol=1e-5)
            assert "mismatch" not in one.refers_to
            json.dumps(one.refers_to, allow_nan=False)
    renamed = read_annotations(path, {"labels": {"1": "Liver"}})
    assert {one.source_key for one in renamed} >= {one.source_key for one in drawn if one.structure in ("liver", "label 4")}
    assert all("path" not in one.refers_to for one in renamed)


def test_scaled_labels(tmp_path: Path) -> None:
    """Label values are those after scaling."""
    path = write(tmp_path / "l.nii", np.full((3, 3, 1), 4, np.int16), scl_slope=0.5, scl_inter=5.0)
    assert [one.structure for one in read_annotations(path, {})] == ["label 7"]
    signalling = np.full((3, 3, 1), 0x7F800001, np.uint32).view(np.float32)
    for data in (np.full((3, 3, 1), 3, np.int16), signalling):
        path = write(tmp_path / "l.nii", data, scl_slope=0.5, scl_inter=5.0)
        with pytest.raises(FileError, match="no whole number"):
            read_annotations(path, {})


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (np.full((3, 3, 2), 0.5, np.float32), "no whole number"),
        (np.full((3, 3, 2), np.nan, np.float32), "no whole number"),
        (np.full((3, 3, 2), 0x7F800001, np.uint32).view(np.float32), "no whole number"),  # a signalling NaN
        (np.full((3, 3, 2), 1e30, np.float32), r"2\^31"),
        (np.full((3, 3, 2), 2**40, np.int64), r"2\^31"),
        (np.full((3, 3, 2), -(2**63), np.int64), r"2\^31"),
        (np.full((3, 3, 2), 2**64 - 1, np.uint64), r"2\^31"),
        (np.arange(40 * 40 * 2, dtype=np.int32).reshape(40, 40, 2), "1024 different"),
        (np.arange(40 * 40 * 2, dtype=np.int32).reshape(40, 40, 2) * 100_000, "1024 different"),
    ],
)
def test_images_are_no_labels(tmp_path: Path, data: np.ndarray[Any, Any], words: str) -> None:
    """An image that lies among the labels is refused as such."""
    with pytest.raises(FileError, match=words) as caught:
        read_annotations(write(tmp_path / "l.nii", data), {})
    assert caught.value.code == "not-labels"


@pytest.mark.parametrize(
    ("shape", "affine", "fields", "mismatch"),
    [
        ((5, 6, 4), AFFINE, {}, None),
        ((5, 6, 4), AFFINE + np.array([[0, 0, 0, 9e-4], *[[0] * 4] * 3]), {}, None),
        ((5, 6, 3), AFFINE, {}, "shape 5×6×4, the image has 5×6×3"),
        ((6, 5, 4), AFFINE, {}, "shape 5×6×4, the image has 6×5×4"),
        ((5, 6, 4, 2), AFFINE, {}, "shape 5×6×4, the image has 5×6×4×2"),
        ((5, 6, 4), AFFINE + np.array([[0, 0, 0, 2e-3], *[[0] * 4] * 3]), {}, "affine: its voxels lie up to 0.002 mm from the image's"),
        ((5, 6, 4), AFFINE @ np.diag([-1, 1, 1, 1]), {}, "affine: its voxels lie up to 7.24 mm from the image's"),
        ((5, 6, 4), AFFINE * 1.001, {}, "affine: "),
        ((5, 6, 4), AFFINE, {"sform_code": 0}, "the labels have an affine, the image has none"),
        ((5, 6, 4), AFFINE, {"xyzt_units": 1}, "affine: "),
    ],
)  # fmt: skip
def test_mismatch(tmp_path: Path, shape: tuple[int, ...], affine: Any, fields: dict[str, Any], mismatch: str | None) -> None:
    """Where shape or affine differ from the image's, beyond 1e-3 mm at some corner, each segment says how."""
    path = write(tmp_path / "l.nii.gz", label_volume(5, 6, 4))
    write(tmp_path / "i.nii.gz", ramp(*shape), affine, **fields)
    drawn = read_annotations(path, {"image_path": "i.nii.gz", "root": str(tmp_path)})
    assert drawn
    for one in drawn:
        assert one.refers_to["path"] == "i.nii.gz"
        said = one.refers_to.get("mismatch")
        assert said == mismatch or (mismatch == "affine: " and said is not None and said.startswith(mismatch))


def test_mismatch_without_affines(tmp_path: Path) -> None:
    """Where neither has an affine, spacings are compared; an image that cannot be read is no mismatch of the labels."""
    options = {"image_path": "i.nii", "root": str(tmp_path)}
    path = write(tmp_path / "l.nii", label_volume(5, 6, 4), sform_code=0)
    assert all("mismatch" not in one.refers_to for one in read_annotations(path, options))
    write(tmp_path / "i.nii", ramp(5, 6, 4), sform_code=0)
    assert all("mismatch" not in one.refers_to for one in read_annotations(path, options))
    write(tmp_path / "i.nii", ramp(5, 6, 4), sform_code=0, pixdim=[1, 1, 1, 3, 1, 1, 1, 1])
    assert all(one.refers_to["mismatch"].startswith("affine: ") for one in read_annotations(path, options))
    write(tmp_path / "i.nii", ramp(5, 6, 4))
    assert all(one.refers_to["mismatch"].startswith("the image has an affine") for one in read_annotations(path, options))
    (tmp_path / "i.nii").write_bytes(b"nothing")
    assert all(one.refers_to["path"] == "i.nii" and "mismatch" not in one.refers_to for one in read_annotations(path, options))


def test_channels(tmp_path: Path) -> None:
    """A label volume is for every channel of its case: files, or the fourth dimension where dataset.json counts as many."""
    labels = label_volume(5, 6, 4)
    path = write(tmp_path / "l.nii", labels)
    one = len(read_annotations(path, {}))
    for name in ("c_0000.nii", "c_0001.nii"):
        write(tmp_path / name, ramp(5, 6, 4))
    drawn = read_annotations(path, {"image_path": ["c_0000.nii", "c_0001.nii"], "root": str(tmp_path)})
    assert len(drawn) == len({item.source_key for item in drawn}) == 2 * one
    assert {item.refers_to["path"] for item in drawn} == {"c_0000.nii", "c_0001.nii"}
    write(tmp_path / "i.nii", ramp(5, 6, 4, 3))
    drawn = read_annotations(path, {"image_path": "i.nii", "root": str(tmp_path), "channels": 3})
    assert len(drawn) == len({item.source_key for item in drawn}) == 3 * one
    for item in drawn:
        assert np.array_equal(mask(item), item.refers_to["value"] == labels[:, :, item.refers_to["frame"] % 4].T)
    assert {item.refers_to["frame"] // 4 for item in drawn} == {0, 1, 2}


# ------------------------------------------------------------------------------------------------------------ layouts


def make_tree(folder: Path, *names: str, **tables: Any) -> Found:
    """Make empty files and a dataset.json for each folder, and read the tree."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    for below, table in tables.items():
        at = folder / ("" if below == "top" else below) / "dataset.json"
        at.write_bytes(table if isinstance(table, bytes) else json.dumps(table).encode())
    return layout.read(Tree(folder), {})


def pairs(found: Found) -> dict[str, Any]:
    return {item.entry.path: item.options.get("image_path") for item in found.annotations}


def patients(found: Found) -> dict[str, str | None]:
    return {item.entry.path: item.patient for item in found.images}


def test_decathlon(tmp_path: Path) -> None:
    """Equal names; values → names; test images without labels; what else lies there is left over."""
    found = make_tree(
        tmp_path, "imagesTr/la_003.nii.gz", "imagesTr/la_0004.nii.gz", "labelsTr/la_003.nii.gz", "labelsTr/la_0004.nii.gz",
        "imagesTs/la_0001.nii.gz", "imagesTs/la_0007.nii.gz", "README.md", "predictions/la_003.nii.gz",
        top={"labels": {"0": "background", "1": "left atrium"}, "modality": {"0": "T1", "1": "T2"}, "tensorImageSize": "4D"},
    )  # fmt: skip
    assert pairs(found) == {f"labelsTr/{name}": f"imagesTr/{name}" for name in ("la_003.nii.gz", "la_0004.nii.gz")}
    assert found.annotations[0].options["labels"] == {"1": "left atrium"}
    assert found.annotations[0].options["channels"] == 2
    assert set(patients(found).values()) == {"la_003", "la_0004", "la_0001", "la_0007"}
    assert (found.left_over, found.problems) == (2, [])
    assert all(image.sure and image.format == "nifti" for image in found.images)
    assert all((drawn.format, drawn.unpaired, drawn.candidates) == ("nifti", "", ()) for drawn in found.annotations)
    assert layout.recognises(Tree(tmp_path)) == "dataset.json beside imagesTr/ and labelsTr/ with NIfTI files"


def test_nnunet(tmp_path: Path) -> None:
    """Channels of one case are one patient; names → values, also several; test images by their channels."""
    found = make_tree(
        tmp_path, *(f"D1/imagesTr/b_1_000{channel}.nii.gz" for channel in range(2)), "D1/imagesTr/b_2_0000.nii.gz",
        *(f"D1/labelsTr/b_{case}.nii.gz" for case in (1, 2, 3)), "D1/imagesTs/b_9_0000.nii.gz", "D1/imagesTs/b_9_0001.nii.gz",
        D1={"labels": {"background": 0, "whole": [1, 2, 3], "core": [3, 2], "active": 3, "ignore": 4}, "channel_names": {"0": "CT"}},
    )  # fmt: skip
    assert pairs(found) == {
        "D1/labelsTr/b_1.nii.gz": ["D1/imagesTr/b_1_0000.nii.gz", "D1/imagesTr/b_1_0001.nii.gz"],
        "D1/labelsTr/b_2.nii.gz": "D1/imagesTr/b_2_0000.nii.gz", "D1/labelsTr/b_3.nii.gz": None,
    }  # fmt: skip
    assert found.annotations[2].unpaired == "imagesTr/ holds no image of this name"
    assert found.annotations[0].options["labels"] == {"1,2,3": "whole", "2,3": "core", "3": "active", "4": "ignore"}
    assert list(patients(found).values()) == ["b_1", "b_1", "b_2", "b_9", "b_9"]


def test_other_folders(tmp_path: Path) -> None:
    """images/ and labels/; volumes by themselves, each of a patient named by its path; a hundred numbered files are no channels."""
    found = make_tree(
        tmp_path, "set/images/a.nii", "set/labels/a.nii.gz", "set/labels/b.nii", "other/imagesTs/c_0000.nii", "other/imagesTs/c_0002.nii",
        "many/imagesTs/p_0000.nii", *(f"many/imagesTs/p_{number:04}.nii" for number in range(1, 20)), "scan.NII.GZ", "one/scan.nii",
        "two/scan.hdr", "two/scan.img", "two/.hidden.nii", "notes.txt", "two/dataset.json", "two/.nii",
    )  # fmt: skip
    assert pairs(found) == {"set/labels/a.nii.gz": "set/images/a.nii", "set/labels/b.nii": None}
    named = patients(found)
    assert {named[f"other/imagesTs/c_{n}.nii"] for n in ("0000", "0002")} == {"c_0000", "c_0002"}
    assert len({patient for path, patient in named.items() if path.startswith("many/")}) == 20
    assert {path: named[path] for path in ("scan.NII.GZ", "one/scan.nii", "two/scan.hdr")} == {
        "scan.NII.GZ": "scan", "one/scan.nii": "one/scan", "two/scan.hdr": "two/scan",
    }  # fmt: skip
    assert (len(named), found.left_over) == (26, 3)


def test_one_name_twice(tmp_path: Path) -> None:
    """x.nii beside x.nii.gz: nobody knows which is meant, so neither is paired, and a problem says what to do."""
    found = make_tree(
        tmp_path, "images/x.nii", "images/x.nii.gz", "labels/x.nii", "images/y.nii", "labels/y.nii", "labels/y.nii.gz",
        "images/z.nii", "labels/z.nii.gz",
    )  # fmt: skip
    assert pairs(found) == {"labels/x.nii": None, "labels/y.nii": None, "labels/y.nii.gz": None, "labels/z.nii.gz": "images/z.nii"}
    assert [(problem.path, problem.code) for problem in found.problems] == [("images/x.nii", "name-twice"), ("images/y.nii", "name-twice")]
    assert [drawn.unpaired for drawn in found.annotations] == ["two files have this name"] * 3 + [""]


@pytest.mark.parametrize(
    ("table", "code"),
    [
        (b"", "table-unreadable"), (b"[]", "table-unreadable"), (b"\xff", "table-unreadable"), (b"[" * 100_000, "table-unreadable"),
        ({"labels": ["a"]}, "table-unreadable"), ({"labels": {"a": 1.5}}, "table-unreadable"),
        ({"labels": {"a": True}}, "table-unreadable"),
        ({"labels": {"a": []}}, "table-unreadable"), ({"labels": {"one": "a"}}, "table-unreadable"),
        ({"labels": {"1": "a" * 300}}, "table-unreadable"), ({"labels": {"1": None}}, "table-unreadable"),
        ({"labels": {"a": 1, "b": 1, "c": 2}}, "label-twice"),
    ],
)  # fmt: skip
def test_bad_table(tmp_path: Path, table: Any, code: str) -> None:
    """A dataset.json that is none, or names a value twice, is a problem in one line; the volumes are paired all the same."""
    found = make_tree(tmp_path, "images/x.nii", "labels/x.nii", top=table)
    assert pairs(found) == {"labels/x.nii": "images/x.nii"}
    assert [problem.code for problem in found.problems] == [code]
    assert all("\n" not in problem.message for problem in found.problems)
    assert found.annotations[0].options["labels"] == ({"2": "c"} if code == "label-twice" else {})


@needs_data
def test_recognised() -> None:
    """Real folders are recognised for what they hold; a tree without NIfTI is not."""
    assert layout.recognises(Tree(DATA / "hippocampus")) == "images/ and labels/ with NIfTI files"
    assert layout.recognises(Tree(DATA / "nibabel")) == "2 NIfTI files"
    assert layout.recognises(Tree(DATA / "dicom-and-nifti" / "dicom")) is None


# --------------------------------------------------------------------------------------------------------------- fuzz


def fuzz(folder: Path, count: int) -> tuple[int, int]:
    """Read mutants of small volumes as images and as labels; returns how many were read and how many refused."""
    chance = random.Random(11)
    seeds = [
        write(folder / f"{number}.nii", ramp(*shape, dtype=dtype), two=two, big=big).read_bytes()
        for number, (shape, dtype, two, big) in enumerate(
            [((4, 3, 2), "u1", False, False), ((4, 3, 2, 2), "i2", True, True), ((5, 5), "f4", False, True), ((2, 2, 2), "f8", True, False)]
        )
    ]
    path, read, refused = folder / "mutant", 0, 0
    write(folder / "image.nii", ramp(4, 3, 2, dtype="u1"))
    options = {"root": str(folder), "image_path": "image.nii", "labels": {"1": "a", "1,2": "b"}}
    for _ in range(count):
        data = bytearray(chance.choice(seeds))
        squeeze = chance.random() < 0.3
        for _ in range(chance.choice((1, 1, 2, 4, 16))):
            kind = chance.randrange(4)
            at = (
                chance.randrange(len(data) + 1)
                if chance.random() < 0.3
                else chance.choice((0, 40, 42, 44, 46, 48, 70, 108, 112, 123, 252, 344))
            )
            at += chance.randrange(4)
            if kind == 0:
                data[at : at + 1] = bytes([chance.randrange(256)])
            elif kind == 1:
                data[at : at + 2] = chance.choice((b"\xff\xff", b"\xff\x7f", b"\0\0", b"\x7f\xff", b"\0\1", b"\1\0"))
            elif kind == 2:
                data[at : at + 8] = chance.choice(
                    (b"\xff" * 8, b"\0" * 8, b"\0\0\xc0\x7f" * 2, b"\xff\xff\xff\x7f\0\0\0\0", b"\0\0\0\x40\0\0\0\0")
                )
            elif chance.random() < 0.2:
                del data[at:]
        mutant = gzip.compress(data, 1) if squeeze else bytes(data)
        if squeeze and chance.random() < 0.3:
            mutant = bytearray(mutant)
            mutant[chance.randrange(len(mutant))] ^= 1 << chance.randrange(8)
        path.write_bytes(mutant)
        for reader in (read_images, read_annotations):
            try:
                reader(path, options)  # type: ignore[operator]
                read += 1
            except FileError as error:
                assert "\n" not in str(error)
                refused += 1
    return read, refused


def check_fuzz(folder: Path, count: int) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    read, refused = fuzz(folder, count)
    assert read > count // 4
    assert refused > count // 4
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


def test_mutants(tmp_path: Path) -> None:
    """Damaged headers and volumes are read or refused by a FileError, with no memory for what they only promise."""
    check_fuzz(tmp_path, 2_000)


@pytest.mark.soak
def test_many_mutants(tmp_path: Path) -> None:
    """The same, 100,000 times."""
    check_fuzz(tmp_path, 100_000)
