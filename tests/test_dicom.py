"""DICOM files: what is read from a header, where pixels lie, and that nothing but a FileError comes out of a bad file."""

import dataclasses
import hashlib
import logging
import os
import re
import resource
import struct
import sys
import time
import tracemalloc
import warnings
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import PIL.Image
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGLSLossless,
    MRImageStorage,
    RLELossless,
)

from catalog import dicom, pixels
from catalog.dicom import begins, decode_frame, decode_values, read_instance
from catalog.errors import FileError

DATA = Path(os.environ.get("SCANFEED_DATA", Path(__file__).parents[2] / "shared" / "data"))
needs_data = pytest.mark.skipif(not (DATA / "manifest.csv").is_file(), reason=f"no manifest.csv under {DATA}; set SCANFEED_DATA")
SECRET = "Zbigniew-4711"
LITTLE_ENDIAN = (ImplicitVRLittleEndian, ExplicitVRLittleEndian)


def image_dataset(pixels, *, syntax=ExplicitVRLittleEndian, **elements):
    """A dataset of one image, (rows, columns) or (frames, rows, columns), with `elements` set or, if None, left out."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.MediaStorageSOPClassUID = MRImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.SOPClassUID, dataset.SOPInstanceUID = MRImageStorage, "1.2.3"
    dataset.PatientID = dataset.PatientName = SECRET
    dataset.PhotometricInterpretation, dataset.SamplesPerPixel = "MONOCHROME2", 1
    dataset.Rows, dataset.Columns = pixels.shape[-2:]
    if pixels.ndim == 3:
        dataset.NumberOfFrames = len(pixels)
    dataset.BitsAllocated = dataset.BitsStored = pixels.dtype.itemsize * 8
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    stored = pixels.astype(pixels.dtype.newbyteorder("<" if syntax.is_little_endian else ">")).tobytes()
    dataset.PixelData = stored + b"\0" * (len(stored) % 2)
    dataset["PixelData"].VR = "OW" if pixels.dtype.itemsize > 1 else "OB"
    for name, value in elements.items():
        if value is None:
            delattr(dataset, name)
        else:
            setattr(dataset, name, value)
    return dataset


def image_file(path, pixels, *, patch=(), **elements):
    """Write one; `patch` exchanges bytes for as many others, for what pydicom refuses to write."""
    with pydicom.config.disable_value_validation():
        dataset = image_dataset(pixels, **elements)
        syntax = dataset.file_meta.TransferSyntaxUID
        dataset.save_as(path, implicit_vr=syntax.is_implicit_VR, little_endian=syntax.is_little_endian, enforce_file_format=True)
    for old, new in patch:
        data = path.read_bytes()
        assert data.count(old) == 1
        assert len(old) == len(new)
        path.write_bytes(data.replace(old, new))
    return path


def ramp(*shape, dtype="int16"):
    return (np.arange(np.prod(shape)).reshape(shape) * 7 % 251).astype(dtype)


def refusal(path):
    """The FileError that a file gives, after checking that it tells nobody's name and both functions agree on it."""
    with pytest.raises(FileError) as caught:
        read_instance(path)
    with pytest.raises(FileError):
        decode_values(path, 0)
    assert SECRET not in str(caught.value)
    assert str(path) not in str(caught.value)
    assert "\n" not in str(caught.value)
    return caught.value


@needs_data
def test_enhanced_objects_have_a_geometry_per_frame():
    """An enhanced CT's position, spacing and rescale come from its functional groups, frame by frame."""
    instance = read_instance(DATA / "dicom" / "multiframe" / "eCT_Supplemental.dcm")
    assert [frame.position for frame in instance.frames] == [159.0, 149.0]
    assert {(frame.pixel_spacing, frame.slope, frame.intercept) for frame in instance.frames} == {((0.388672, 0.388672), 1.0, -1024.0)}


def test_a_header_is_read_as_found(tmp_path):
    """Identifiers keep leading zeros, wrong lengths and anything else; only padding at the end goes, and numbers are numbers."""
    path = image_file(
        tmp_path / "a.dcm",
        ramp(4, 6),
        PatientID=" 0042 ",
        SOPInstanceUID="1.02.003",
        StudyInstanceUID="no uid at all" * 9,
        SeriesInstanceUID="",
        StudyDate="20120000",
        Modality="MR",
        SeriesNumber="300",
        InstanceNumber="7 ",
        ImagesInAcquisition="280",
        FrameOfReferenceUID="1.2.000",
        PixelSpacing=["0.5", "0.25"],
        ImagePositionPatient=["1", "2", "3e1"],
        ImageOrientationPatient=["1", "0", "0", "0", "1", "0"],
        SliceThickness="10",
        TriggerTime="18.75",
        WindowCenter=["40", "300"],
        WindowWidth=["400", "1500"],
    )
    instance = read_instance(path)
    assert (instance.patient_id, instance.sop_instance_uid, instance.study_instance_uid) == (" 0042", "1.02.003", "no uid at all" * 9)
    assert (instance.series_instance_uid, instance.study_date, instance.modality) == ("", "20120000", "MR")
    assert (instance.series_number, instance.instance_number, instance.images_in_acquisition) == (300, 7, 280)
    assert (instance.frame_of_reference_uid, instance.sop_class_uid) == ("1.2.000", MRImageStorage)
    (frame,) = instance.frames
    assert (frame.rows, frame.columns, frame.pixel_spacing, frame.slice_thickness, frame.trigger_time) == (4, 6, (0.5, 0.25), 10.0, 18.75)
    assert (frame.image_position, frame.position) == ((1.0, 2.0, 30.0), 30.0)
    assert (frame.slope, frame.intercept, frame.window_center, frame.window_width) == (1.0, 0.0, 40.0, 400.0)
    assert (frame.dtype, frame.length, type(instance.sop_class_uid)) == ("<i2", 48, str)


def test_what_a_header_lacks_is_empty_or_none(tmp_path):
    """Missing and unusable values never stop a file from being read."""
    path = image_file(
        tmp_path / "a.dcm",
        ramp(4, 6),
        patch=[(b"77777 ", b"seven "), (b"77\\88\\99", b"77\\88\\up"), (b"4444", b"nan ")],
        PatientID=None,
        SOPInstanceUID="",
        InstanceNumber="77777",
        SeriesNumber=str(2**31),
        PixelSpacing=["0.5"],
        ImagePositionPatient=["77", "88", "99"],
        ImageOrientationPatient=["0"] * 6,
        TriggerTime="4444",
    )
    instance = read_instance(path)
    assert (instance.patient_id, instance.sop_instance_uid, instance.instance_number, instance.series_number) == ("", "", None, None)
    (frame,) = instance.frames
    assert (frame.pixel_spacing, frame.image_position, frame.position, frame.trigger_time) == (None, None, None, None)


@pytest.mark.parametrize(
    ("charset", "raw", "text"),
    [(b"ISO_IR 144", b"\xbb\xee12", "Лю12"), (b"ISO_IR 192", "Ж12".encode(), "Ж12"), (b"nonsense  ", b"\xe9tou", "étou")],
)
def test_text_is_decoded_by_its_character_set(tmp_path, charset, raw, text):
    """A patient ID that is not ASCII is decoded as the file says, and by Latin-1 where what it says is unknown."""
    patch = [(b"ISO_IR 100", charset), (b"QQQQ", raw)]
    path = image_file(tmp_path / "a.dcm", ramp(4, 6), patch=patch, SpecificCharacterSet="ISO_IR 100", PatientID="QQQQ", PatientName=None)
    assert read_instance(path).patient_id == text


def test_a_nul_inside_text_does_not_reach_the_database(tmp_path):
    """PostgreSQL holds no NUL: padding goes, one inside becomes U+FFFD."""
    path = image_file(tmp_path / "a.dcm", ramp(4, 6), patch=[(b"A?B???", b"A\0B\0 \0")], PatientID="A?B???")
    assert read_instance(path).patient_id == "A\ufffdB"


@pytest.mark.parametrize(("slope", "intercept"), [(None, "-1024"), ("2.5", None), ("2.5", "-1024"), (None, None)])
def test_slope_and_intercept_default_each_on_its_own(tmp_path, slope, intercept):
    """One without the other is used as it is: the absent one is 1 or 0."""
    given_ones = {name: value for name, value in (("RescaleSlope", slope), ("RescaleIntercept", intercept)) if value}
    (frame,) = read_instance(image_file(tmp_path / "a.dcm", ramp(4, 6), **given_ones)).frames
    assert (frame.slope, frame.intercept) == (float(slope or 1), float(intercept or 0))


def test_a_rescale_that_is_no_number_is_refused(tmp_path):
    """A default in its place would turn right values into wrong ones."""
    path = image_file(tmp_path / "a.dcm", ramp(4, 6), patch=[(b"77", b"QQ")], RescaleSlope="77")
    with pytest.raises(FileError, match=r"\(0028,1053\) Rescale Slope is not a number"):
        read_instance(path)


@pytest.mark.parametrize("dtype", ["int16", "uint16", "uint8", "int8", "int32", "uint32"])
@pytest.mark.parametrize("syntax", LITTLE_ENDIAN)
def test_uncompressed_little_endian_is_read_by_offset(tmp_path, syntax, dtype):
    """For each integer size, odd lengths too, the bytes at the offset are the decoded values of that frame."""
    pixels = ramp(3, 5, 7, dtype=dtype)
    path = image_file(tmp_path / "a.dcm", pixels, syntax=syntax)
    for frame in read_instance(path).frames:
        raw = np.fromfile(path, frame.dtype, 35, offset=frame.offset).reshape(5, 7)
        np.testing.assert_array_equal(raw, pixels[frame.frame])
        np.testing.assert_array_equal(decode_frame(path, frame.frame), pixels[frame.frame])
        assert raw.dtype == decode_frame(path, frame.frame).dtype
        assert frame.pixel_hash == hashlib.sha256(pixels[frame.frame].tobytes()).digest()


def test_encodings_of_the_same_pixels_have_the_same_hash(tmp_path):
    """A re-encoding is recognised by its pixels: big endian, deflated and compressed files hash as the original does."""
    pixels = ramp(2, 8, 6)
    original = read_instance(image_file(tmp_path / "a.dcm", pixels))
    for number, syntax in enumerate((ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian)):
        other = image_file(tmp_path / f"{number}.dcm", pixels, syntax=syntax)
        assert [frame.pixel_hash for frame in read_instance(other).frames] == [frame.pixel_hash for frame in original.frames]
        np.testing.assert_array_equal(decode_frame(other, 1), pixels[1])
    compressed = pydicom.dcmread(tmp_path / "a.dcm")
    compressed.compress(RLELossless, generate_instance_uid=False)
    compressed.save_as(tmp_path / "rle.dcm")
    instance = read_instance(tmp_path / "rle.dcm")
    assert [frame.pixel_hash for frame in instance.frames] == [frame.pixel_hash for frame in original.frames]
    assert {(frame.dtype, frame.offset, frame.length) for frame in instance.frames} == {(None, None, 0)}


@pytest.mark.parametrize(
    ("dtype", "value", "plain"),
    [("uint16", 4095, True), ("uint16", 4096, False), ("int16", -2048, True), ("int16", 2048, False), ("int16", -2049, False)],
)
def test_bits_above_bits_stored_are_not_read_by_offset(tmp_path, dtype, value, plain):
    """Old overlays live in the unused high bits (PS3.5 8.1.1): pydicom clears them, so such a file is left to pydicom."""
    pixels = ramp(4, 6, dtype=dtype)
    pixels[1, 2] = value
    path = image_file(tmp_path / "a.dcm", pixels, BitsStored=12, HighBit=11)
    (frame,) = read_instance(path).frames
    assert (frame.dtype is not None) == plain
    decoded = decode_frame(path, 0)
    assert (decoded[1, 2] == value) == plain
    assert frame.pixel_hash == hashlib.sha256(decoded.tobytes()).digest()


def colour(**elements):
    """Elements that make `image_dataset` a colour image of 4×6 from an array of (4, 6, 3) or (3, 4, 6)."""
    return {"Rows": 4, "Columns": 6, "NumberOfFrames": None, "SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", **elements}


def test_colour_by_pixel_is_read_by_offset_and_other_colour_is_not(tmp_path):
    """RGB whose samples lie together is there as (rows, columns, 3); by plane or as YBR it is decoded, YBR to RGB."""
    rgb = ramp(4, 6, 3, dtype="uint8")
    path = image_file(tmp_path / "a.dcm", rgb, **colour(PlanarConfiguration=0))
    (frame,) = read_instance(path).frames
    assert (frame.dtype, frame.samples_per_pixel, frame.length) == ("|u1", 3, 72)
    np.testing.assert_array_equal(np.fromfile(path, frame.dtype, 72, offset=frame.offset).reshape(4, 6, 3), rgb)
    np.testing.assert_array_equal(decode_frame(path, 0), rgb)
    planes = image_file(tmp_path / "b.dcm", np.ascontiguousarray(rgb.transpose(2, 0, 1)), **colour(PlanarConfiguration=1))
    (by_plane,) = read_instance(planes).frames
    assert (by_plane.dtype, by_plane.pixel_hash) == (None, frame.pixel_hash)
    np.testing.assert_array_equal(decode_frame(planes, 0), rgb)
    ybr = image_file(tmp_path / "c.dcm", rgb, **colour(PlanarConfiguration=0, PhotometricInterpretation="YBR_FULL"))
    assert read_instance(ybr).frames[0].dtype is None
    np.testing.assert_array_equal(decode_frame(ybr, 0), pydicom.pixels.convert_color_space(rgb, "YBR_FULL", "RGB"))
    assert decode_values(ybr, 0).shape == (4, 6, 3)


@pytest.mark.parametrize(("dtype", "name"), [("float32", "FloatPixelData"), ("float64", "DoubleFloatPixelData")])
@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian])
def test_floating_point_pixels(tmp_path, syntax, dtype, name):
    """Float and double pixels are read as such, by offset where they are little endian; one hash for all byte orders."""
    pixels = np.linspace(-1, 1, 48, dtype=dtype).reshape(2, 4, 6)
    stored = pixels.astype(pixels.dtype.newbyteorder("<" if syntax.is_little_endian else ">")).tobytes()
    without = dict.fromkeys(("PixelData", "BitsStored", "HighBit", "PixelRepresentation"))
    path = image_file(tmp_path / "a.dcm", pixels, syntax=syntax, **without, **{name: stored})
    for frame in read_instance(path).frames:
        assert frame.dtype == (pixels.dtype.str if syntax == ImplicitVRLittleEndian else None)
        assert frame.pixel_hash == hashlib.sha256(pixels[frame.frame].tobytes()).digest()
        np.testing.assert_array_equal(decode_frame(path, frame.frame), pixels[frame.frame])
        if frame.dtype:
            np.testing.assert_array_equal(np.memmap(path, dtype, "r", frame.offset, (4, 6)), pixels[frame.frame])


def test_single_bits_are_unpacked(tmp_path):
    """Bits decode to uint8, with frames off the byte grid, and are not read by offset."""
    bits = np.random.default_rng(0).integers(0, 2, (3, 3, 5), dtype="uint8")
    packed = np.packbits(bits.ravel(), bitorder="little").tobytes()
    path = image_file(tmp_path / "seg.dcm", bits, BitsAllocated=1, BitsStored=1, HighBit=0, PixelData=packed)
    for frame in read_instance(path).frames:
        np.testing.assert_array_equal(decode_frame(path, frame.frame), bits[frame.frame])
        assert (frame.dtype, frame.pixel_hash) == (None, hashlib.sha256(bits[frame.frame].tobytes()).digest())


def lut(count, first, bits, data, *, signed=False, raw=False):
    """A Modality LUT Sequence; `raw` writes the table byte by byte."""
    item = Dataset()
    item.add_new(0x00283002, "SS" if signed else "US", [count, first, bits])
    item.add_new(0x00283006, "OW" if raw else "US", bytes(data) if raw else list(data))
    item.ModalityLUTType = "HU"
    return Sequence([item])


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16"])
def test_a_modality_lut_goes_before_slope_and_intercept(tmp_path, syntax, dtype):
    """Values are those of the table, its ends beyond it, as pydicom's own function has them; nothing is read by offset meanwhile."""
    first = -20 if dtype == "int16" else 30
    pixels = ramp(4, 60, dtype=dtype) - (60 if dtype == "int16" else 0)
    pixels = pixels.astype(dtype)
    native = ExplicitVRLittleEndian if syntax == RLELossless else syntax
    table = lut(100, first, 16, [5 * at + 7 for at in range(100)], signed=dtype == "int16")
    path = image_file(tmp_path / "a.dcm", pixels, syntax=native, ModalityLUTSequence=table, RescaleSlope="2", RescaleIntercept="-1024")
    dataset = pydicom.dcmread(path)
    if syntax == RLELossless:
        dataset.compress(RLELossless)
        dataset.save_as(path)
    (frame,) = read_instance(path).frames
    assert (frame.modality_lut, frame.dtype, frame.offset, frame.slope, frame.intercept) == (True, None, None, 1.0, 0.0)
    assert frame.pixel_hash == hashlib.sha256(pixels.tobytes()).digest()
    values = decode_values(path, 0)
    assert values.dtype == np.float64
    np.testing.assert_array_equal(values, pydicom.pixels.apply_modality_lut(pixels, dataset))
    assert {7.0, 5 * 99 + 7.0} <= set(values.ravel())


def test_a_modality_lut_of_65536_entries_or_of_bytes(tmp_path):
    """0 entries mean 65,536 (PS3.3 C.11.1.1.1); entries of 8 bits may lie byte by byte."""
    pixels = ramp(4, 6, dtype="uint16")
    path = image_file(
        tmp_path / "a.dcm", pixels, ModalityLUTSequence=lut(0, 0, 16, np.arange(65536, dtype="<u2")[::-1].tobytes(), raw=True)
    )
    np.testing.assert_array_equal(decode_values(path, 0), 65535.0 - pixels)
    path = image_file(tmp_path / "a.dcm", pixels, ModalityLUTSequence=lut(256, 0, 8, range(255, -1, -1), raw=True))
    np.testing.assert_array_equal(decode_values(path, 0), 255.0 - pixels)


@pytest.mark.parametrize("table", [(100, 0, 16, range(99)), (100, 0, 8, range(40)), (0, 0, 16, range(256))])
def test_a_modality_lut_that_is_too_short_is_refused(tmp_path, table):
    """Values from a table that is not there would be wrong ones."""
    error = refusal(image_file(tmp_path / "a.dcm", ramp(4, 6), ModalityLUTSequence=lut(*table)))
    assert "(0028,3000) Modality LUT Sequence does not hold the table" in str(error)


def test_values_are_stored_values_times_slope_plus_intercept(tmp_path):
    """Without a table, exactly that in float64, each frame with its own; an empty LUT sequence is none."""
    own = [Dataset(), Dataset()]
    for number, item in enumerate(own):
        item.PixelValueTransformationSequence = Sequence([Dataset()])
        item.PixelValueTransformationSequence[0].RescaleSlope = f"0.{number + 3}"
    path = image_file(
        tmp_path / "a.dcm",
        ramp(2, 4, 6),
        PerFrameFunctionalGroupsSequence=Sequence(own),
        RescaleIntercept="-10.1",
        ModalityLUTSequence=Sequence([]),
    )
    for frame in read_instance(path).frames:
        assert (frame.slope, frame.intercept, frame.dtype) == ((0.3, 0.4)[frame.frame], -10.1, "<i2")
        assert not frame.modality_lut
        stored = decode_frame(path, frame.frame)
        np.testing.assert_array_equal(decode_values(path, frame.frame), stored.astype(np.float64) * frame.slope + frame.intercept)
    path = image_file(tmp_path / "a.dcm", ramp(4, 6), RescaleSlope="3", RescaleIntercept="0")
    np.testing.assert_array_equal(decode_values(path, 0), 3.0 * ramp(4, 6))


def test_without_hashing_the_rest_is_the_same(tmp_path):
    """`hash_pixels=False` gives the same but for hashes, without a look at a pixel; the caller can clear unused high bits himself."""
    pixels = ramp(2, 4, 6, dtype="int16")
    pixels[1] -= 100
    stored = pixels & 0x0FFF | ramp(2, 4, 6) << 12  # an overlay in the unused bits
    path = image_file(tmp_path / "a.dcm", stored, BitsStored=12, HighBit=11, RescaleSlope="2")
    for target in (path, tmp_path / "rle.dcm"):
        if target != path:
            compressed = pydicom.dcmread(path)
            compressed.compress(RLELossless, generate_instance_uid=False)
            compressed.save_as(target)
        hashed, unhashed = read_instance(target), read_instance(target, hash_pixels=False)
        assert {frame.pixel_hash for frame in unhashed.frames} == {None}
        same = {"pixel_hash": None, "dtype": None, "offset": None, "length": 0}
        assert [dataclasses.replace(frame, **same) for frame in unhashed.frames] == [
            dataclasses.replace(frame, **same) for frame in hashed.frames
        ]
        assert dataclasses.replace(unhashed, frames=()) == dataclasses.replace(hashed, frames=())
    assert {frame.dtype for frame in unhashed.frames} == {None}
    for frame in read_instance(path, hash_pixels=False).frames:
        assert frame.dtype == "<i2"
        values = np.memmap(path, frame.dtype, "r", frame.offset, (4, 6)) << 4 >> 4
        np.testing.assert_array_equal(values, decode_frame(path, frame.frame))
    assert {frame.dtype for frame in read_instance(path).frames} == {None}


@pytest.mark.parametrize("frames", [3, 100])
def test_without_hashing_no_pixel_is_read(tmp_path, frames):
    """Of a file of 3 or 100 megabytes a buffer's worth is read."""
    path = image_file(tmp_path / "a.dcm", np.zeros((frames, 512, 1024), np.uint16))
    before = read_bytes()
    (first, *_), size = read_instance(path, hash_pixels=False).frames, path.stat().st_size
    assert first.dtype == "<u2"
    assert read_bytes() - before < 1_000_000 < size


def read_bytes():
    """Bytes that this process has read from files and pipes so far."""
    if not Path("/proc/self/io").is_file():
        pytest.skip("needs Linux's /proc to count what is read")
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


def test_functional_groups_go_before_shared_ones_before_the_top(tmp_path):
    """Each element of a frame comes from its own group, else the shared group, else the object's top level (PS3.3 C.7.6.16)."""

    def group(**sequences):
        item = Dataset()
        for name, elements in sequences.items():
            inner = Dataset()
            for keyword, value in elements.items():
                setattr(inner, keyword, value)
            setattr(item, name, Sequence([inner]))
        return item

    own = [
        group(
            PlanePositionSequence={"ImagePositionPatient": ["0", "0", str(10 * at)]},
            CardiacSynchronizationSequence={"NominalCardiacTriggerDelayTime": 2.5 * at},
        )
        for at in range(3)
    ]
    own[1].PixelValueTransformationSequence = group(PixelValueTransformationSequence={"RescaleSlope": "3"}).PixelValueTransformationSequence
    shared = group(
        PlaneOrientationSequence={"ImageOrientationPatient": ["1", "0", "0", "0", "1", "0"]},
        PixelMeasuresSequence={"PixelSpacing": ["2", "1"], "SliceThickness": "8"},
        PixelValueTransformationSequence={"RescaleSlope": "2", "RescaleIntercept": "-5"},
    )
    for syntax in LITTLE_ENDIAN:
        path = image_file(
            tmp_path / "a.dcm",
            ramp(3, 4, 6),
            syntax=syntax,
            SharedFunctionalGroupsSequence=Sequence([shared]),
            PerFrameFunctionalGroupsSequence=Sequence(own),
            WindowCenter="50",
        )
        frames = read_instance(path).frames
        assert [frame.position for frame in frames] == [0.0, 10.0, 20.0]
        assert [frame.trigger_time for frame in frames] == [0.0, 2.5, 5.0]
        assert [(frame.slope, frame.intercept) for frame in frames] == [(2.0, -5.0), (3.0, -5.0), (2.0, -5.0)]
        assert {(frame.pixel_spacing, frame.slice_thickness, frame.window_center) for frame in frames} == {((2.0, 1.0), 8.0, 50.0)}


def test_a_classic_multi_frame_has_a_position_on_its_first_frame_only(tmp_path):
    """The header's position is that of one frame; the others' is not known, and not made up."""
    path = image_file(
        tmp_path / "a.dcm", ramp(3, 4, 6), ImagePositionPatient=["1", "2", "3"], ImageOrientationPatient=["1", "0", "0", "0", "1", "0"]
    )
    assert [frame.position for frame in read_instance(path).frames] == [3.0, None, None]


@pytest.mark.parametrize(
    ("elements", "words"),
    [
        ({"PixelData": None}, "(0028,0100) Bits Allocated is there"),
        ({"PixelData": None, "BitsAllocated": None}, "it says that it is MR Image Storage"),
        ({"PixelData": None, "BitsAllocated": None, "SOPClassUID": None}, "it says that it is MR Image Storage"),
        ({"PixelData": None, "BitsAllocated": None, "SOPClassUID": ""}, "it says that it is MR Image Storage"),
    ],
)
def test_an_image_without_its_pixels_is_refused(tmp_path, elements, words):
    """`no-pixels` says what is missing and why it was expected: a file that was stripped, or cut off between two elements."""
    error = refusal(image_file(tmp_path / "a.dcm", ramp(4, 6), **elements))
    assert error.code == "no-pixels"
    assert str(error).startswith("(7FE0,0010) Pixel Data is missing though " + words)


PLAN = {"PixelData": None, "BitsAllocated": None, "SOPClassUID": "1.2.840.10008.5.1.4.1.1.481.5"}


def test_an_object_without_pixels_is_an_instance_without_frames(tmp_path):
    """A plan, a report or a spectrum, which has rows too, is catalogued with its identifiers and no image; nothing of it decodes."""
    for sop_class in (PLAN["SOPClassUID"], "1.2.840.10008.5.1.4.1.1.4.2", "1.2.840.10008.5.1.4.1.1.88.11"):
        path = image_file(tmp_path / "a.dcm", ramp(4, 6), **{**PLAN, "SOPClassUID": sop_class})
        for hash_pixels in (True, False):
            instance = read_instance(path, hash_pixels=hash_pixels)
            assert (instance.number_of_frames, instance.frames, instance.sop_class_uid) == (0, (), sop_class)
            assert (instance.sop_instance_uid, instance.transfer_syntax_uid) == ("1.2.3", ExplicitVRLittleEndian)
        for function in (decode_frame, decode_values):
            with pytest.raises(FileError, match="Pixel Data is missing, so it holds no image") as caught:
                function(path, 0)
            assert caught.value.code == "no-pixels"


def test_a_dicomdir_is_no_object(tmp_path):
    """The index of a medium has a code of its own, so that it need count neither as an image nor as an error."""
    meta = image_dataset(ramp(4, 6), **PLAN, SOPInstanceUID=None)
    meta.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.1.3.10"
    del meta.SOPClassUID
    meta.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    assert refusal(tmp_path / "a.dcm").code == "dicomdir"


def test_what_has_neither_pixels_nor_a_class_is_refused(tmp_path):
    """A scrap of a header is no instance."""
    dataset = image_dataset(ramp(4, 6), **{**PLAN, "SOPClassUID": None})
    dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.481.5"
    dataset.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    assert "(0008,0016) SOP Class UID too" in str(refusal(tmp_path / "a.dcm"))


@pytest.mark.parametrize(
    ("elements", "code", "words"),
    [
        ({"Rows": 0}, "unreadable", "(0028,0010) Rows is 0"),
        ({"Rows": None}, "unreadable", "(0028,0010) Rows is missing"),
        ({"Columns": None}, "unreadable", "(0028,0011) Columns is missing"),
        ({"SamplesPerPixel": 3}, "unreadable", "(0028,0006) Planar Configuration is missing"),
        ({"SamplesPerPixel": 2}, "unreadable", "(0028,0002) Samples per Pixel is 2"),
        ({"PhotometricInterpretation": "YBR_FULL"}, "unreadable", "(0028,0002) Samples per Pixel is 1 where it must be 3 for YBR_FULL"),
        ({"BitsAllocated": None}, "unreadable", "(0028,0100) Bits Allocated is missing"),
        ({"SamplesPerPixel": None}, "unreadable", "(0028,0002) Samples per Pixel is missing"),
        ({"BitsAllocated": 12, "BitsStored": 12, "Rows": 2}, "unreadable", "Bits Allocated"),
        ({"BitsStored": 17}, "unreadable", "Bits Stored"),
        ({"PixelRepresentation": 7}, "unreadable", "Pixel Representation"),
        ({"PhotometricInterpretation": None}, "unreadable", "Photometric Interpretation"),
        ({"NumberOfFrames": "-1"}, "unreadable", "(0028,0008) Number of Frames"),
        ({"NumberOfFrames": "77", "patch": [(b"77", b"1A")]}, "unreadable", "(0028,0008) Number of Frames"),
        ({"NumberOfFrames": "2"}, "truncated", "48 bytes where 2 frame(s) of 4×6×1 at 16 bits take 96"),
        ({"Rows": 5}, "truncated", "48 bytes where 1 frame(s) of 5×6×1 at 16 bits take 60"),
    ],
)
def test_an_impossible_image_says_which_element(tmp_path, elements, code, words):
    """A header that contradicts itself or its pixels is a FileError that names the element and, where sizes differ, both."""
    path = image_file(tmp_path / "a.dcm", ramp(4, 6), **elements)
    error = refusal(path)
    assert error.code == code
    assert words in str(error)
    with pytest.raises(FileError, match=re.escape(str(error))):
        read_instance(path, hash_pixels=False)


@pytest.mark.parametrize("frames", ["0", ""])
def test_no_frames_means_one(tmp_path, frames):
    """Writers of single images leave Number of Frames empty or at 0."""
    assert read_instance(image_file(tmp_path / "a.dcm", ramp(4, 6), NumberOfFrames=frames)).number_of_frames == 1


def test_more_pixels_than_frames_leaves_the_header_right(tmp_path):
    """Number of Frames is believed: what lies behind the last frame is no image, in the bytes' reader as in pydicom's."""
    path = image_file(tmp_path / "a.dcm", ramp(3, 4, 6), NumberOfFrames=2)
    assert len(read_instance(path).frames) == 2
    with pytest.raises(FileError, match="frame 2 is not in it: it holds 2"):
        decode_frame(path, 2)
    with pytest.raises(FileError, match="frame -1 is not in it"):
        decode_frame(path, -1)


def test_a_transfer_syntax_without_decoder_says_what_to_install(tmp_path):
    """A compressed file that nothing here decodes names its transfer syntax and the remedy, or that there is none."""
    path = image_file(tmp_path / "a.dcm", ramp(4, 6))
    data = path.read_bytes()
    for syntax, words in (("1.2.840.10008.1.2.4.55", "which pydicom cannot decode"), ("1.2.840.10008.1.2.4.80", "scanfeed[codecs]")):
        if syntax == JPEGLSLossless and pydicom.pixels.get_decoder(JPEGLSLossless).is_available:
            continue
        meta = pydicom.dcmread(BytesIO(data))
        meta.file_meta.TransferSyntaxUID = pydicom.uid.UID(syntax)
        meta["PixelData"].is_undefined_length = True
        meta.PixelData = pydicom.encaps.encapsulate([meta.PixelData])
        meta.save_as(path, enforce_file_format=True)
        error = refusal(path)
        assert error.code == "no-decoder"
        assert words in str(error)


def test_files_that_are_no_dicom(tmp_path):
    """Text, nothing, a folder and a missing file are told from DICOM without parsing them."""
    text = tmp_path / "a.txt"
    for content in (b"", b"x", b"1.5 2.0\n" * 40, b"\x89PNG\r\n\x1a\n" * 30, b"\0" * 400):
        text.write_bytes(content)
        assert not begins(text.read_bytes()[:132])
        assert refusal(text).code == "not-dicom"
    assert refusal(tmp_path).code == "unreadable"
    assert refusal(tmp_path / "absent").code == "unreadable"
    assert begins(image_file(tmp_path / "a.dcm", ramp(4, 6)).read_bytes()[:132])


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian])
def test_a_missing_transfer_syntax_is_what_the_elements_leave_possible(tmp_path, syntax):
    """Without meta information, or with one that lacks it, uncompressed pixels are read; compressed ones could be anything."""
    pixels = ramp(2, 4, 6)
    whole = read_instance(image_file(tmp_path / "whole.dcm", pixels, syntax=syntax))
    path = tmp_path / "a.dcm"
    for meta in (False, True):
        dataset = image_dataset(pixels, syntax=syntax)
        if meta:
            del dataset.file_meta.TransferSyntaxUID
        else:
            del dataset.file_meta
        dataset.save_as(path, implicit_vr=syntax.is_implicit_VR, little_endian=syntax.is_little_endian)
        assert begins(path.read_bytes()[:132])
        instance = read_instance(path)
        assert instance.transfer_syntax_uid == syntax
        assert [frame.pixel_hash for frame in instance.frames] == [frame.pixel_hash for frame in whole.frames]
        np.testing.assert_array_equal(decode_frame(path, 1), pixels[1])
    dataset = image_dataset(pixels)
    dataset.compress(RLELossless)
    del dataset.file_meta
    dataset.save_as(path, implicit_vr=False, little_endian=True)
    assert "(0002,0010) Transfer Syntax UID is missing, so its compressed pixels" in str(refusal(path))


def test_large_files_are_read_as_small_ones(tmp_path, monkeypatch):
    """Above the size that is read at once, the same comes out, and a cut file is still noticed."""
    path = image_file(tmp_path / "a.dcm", ramp(3, 40, 60), BitsStored=12, HighBit=11)
    small = read_instance(path)
    monkeypatch.setattr(dicom, "_READ_WHOLE", 0)
    assert read_instance(path) == small
    np.testing.assert_array_equal(decode_frame(path, 2), ramp(3, 40, 60)[2])
    path.write_bytes(path.read_bytes()[:-100])
    assert refusal(path).code == "truncated"


def jpeg(path, size, *, rows=None, columns=None, **elements):
    """Write an 8-bit JPEG of `size` px square under a header of other Rows and Columns."""
    picture = BytesIO()
    PIL.Image.fromarray(ramp(size, size, dtype="uint8")).save(picture, "jpeg")
    dataset = image_dataset(ramp(size, size, dtype="uint8"), **elements)
    dataset.Rows, dataset.Columns = rows or size, columns or size
    dataset.PixelData = pydicom.encaps.encapsulate([picture.getvalue()])
    dataset["PixelData"].is_undefined_length = True
    dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.50"
    dataset.save_as(path, enforce_file_format=True)
    return path


def test_a_damaged_size_does_not_take_all_memory(tmp_path):
    """Rows, Columns and Number of Frames that the bytes do not bear out are refused before anything makes room for them."""
    path = image_file(tmp_path / "a.dcm", ramp(4, 6))
    compressed = pydicom.dcmread(path)
    compressed.compress(RLELossless)
    for elements, words in (
        ({"Rows": 65535, "Columns": 65535}, "more than the 1073741824 that are decoded at once"),
        ({"Rows": 20000, "Columns": 20000}, "bytes cannot hold 20000×20000×1 values"),
        ({"NumberOfFrames": 2**31 - 1}, "more than the 1048576 that a file may hold"),
        ({"NumberOfFrames": 500_000}, "take at least 4000008, so the file is cut off"),
    ):
        changed = pydicom.dcmread(path)
        changed.compress(RLELossless)
        for name, value in elements.items():
            setattr(changed, name, value)
        changed.save_as(tmp_path / "rle.dcm")
        tracemalloc.start()
        error = refusal(tmp_path / "rle.dcm")
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert words in str(error)
        assert peak < 20_000_000
    error = refusal(jpeg(tmp_path / "jpeg.dcm", 16, rows=20000, columns=20000))
    assert "says of itself that it is 16×16×1 where the header says 20000×20000×1" in str(error)
    jpeg(tmp_path / "jpeg.dcm", 16)
    np.testing.assert_allclose(decode_frame(tmp_path / "jpeg.dcm", 0), ramp(16, 16, dtype="uint8"), atol=60)


@pytest.mark.parametrize("length", [0xFFFFFFFE, 0x7FFFFFFF, 2**20])
def test_a_damaged_length_does_not_take_all_memory(tmp_path, monkeypatch, length):
    """A kept element that claims more bytes than the file has is noticed, and nothing makes room for it, in large files too."""
    path = image_file(tmp_path / "a.dcm", ramp(4, 6), syntax=ImplicitVRLittleEndian)
    at = path.read_bytes().index(struct.pack("<HHL", 0x0010, 0x0020, len(SECRET) + 1))
    data = bytearray(path.read_bytes())
    data[at + 4 : at + 8] = struct.pack("<L", length)
    path.write_bytes(data)
    for limit in (8 << 20, 0):
        monkeypatch.setattr(dicom, "_READ_WHOLE", limit)
        tracemalloc.start()
        error = refusal(path)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert (error.code, peak < 1_000_000) == ("truncated", True)
        assert "(0010,0020)" in str(error)


def test_deflated_data_has_a_limit(tmp_path, monkeypatch):
    """What inflates without end is refused at the limit, what is damaged or cut off says so, and what follows it is no matter."""
    path = image_file(tmp_path / "a.dcm", ramp(4, 6), syntax=DeflatedExplicitVRLittleEndian)
    data = path.read_bytes()
    whole = read_instance(path)
    assert whole.transfer_syntax_uid == DeflatedExplicitVRLittleEndian
    path.write_bytes(data + b"\0")
    assert read_instance(path) == whole
    path.write_bytes(data[:-20])
    assert refusal(path).code == "truncated"
    path.write_bytes(data[:-40] + bytes(20) + data[-20:])
    assert refusal(path).code in ("unreadable", "truncated")
    meta = data[: data.index(b"1.2.840.10008.1.2.1.99") + 22]
    end = 132 + 12 + struct.unpack("<L", data[140:144])[0]
    assert len(meta) <= end
    implicit = data.replace(b"UI\x16\0" + b"1.2.840.10008.1.2.1.99", struct.pack("<L", 22) + b"1.2.840.10008.1.2.1.99")
    path.write_bytes(implicit)
    assert refusal(path).code == "unreadable"
    monkeypatch.setattr(pixels, "MOST_BYTES", 10_000_000)
    deflater = zlib.compressobj(wbits=-15)
    path.write_bytes(data[:end] + deflater.compress(bytes(200_000_000)) + deflater.flush())
    tracemalloc.start()
    assert "inflates to more than 10000000 bytes" in str(refusal(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 40_000_000


def test_compressed_pixels_that_are_cut_off_are_truncated(tmp_path):
    """A decoder would make up the rest of a picture: a fragment beyond the file's end, or too few of them, is refused."""
    path = image_file(tmp_path / "a.dcm", ramp(3, 40, 60))
    compressed = pydicom.dcmread(path)
    compressed.compress(RLELossless)
    compressed.save_as(path)
    data, whole = path.read_bytes(), read_instance(path)
    path.write_bytes(data[:-8])  # without the delimiter all frames are there
    assert read_instance(path) == whole
    for cut in (10, 60, 2000):
        path.write_bytes(data[:-cut])
        assert refusal(path).code == "truncated"
    compressed.NumberOfFrames = 4
    compressed.save_as(path)
    assert "has 3 frames where (0028,0008) Number of Frames says 4" in str(refusal(path))
    path.write_bytes(jpeg(path, 64).read_bytes()[:-200])
    assert refusal(path).code == "truncated"


def test_a_decoder_that_panics_is_no_more_than_one_that_fails(tmp_path):
    """pylibjpeg-rle ends a segment that is too long with Rust's panic, which is no Exception: the next decoder is asked, then refused."""
    path = image_file(tmp_path / "a.dcm", ramp(4, 6))
    compressed = pydicom.dcmread(path)
    compressed.compress(RLELossless)
    for second, code in ((b"\x81\1", ""), (b"\0\1", "unreadable")):
        segments = struct.pack("<16L", 2, 64, 66, *[0] * 13) + b"\x81\2" + second
        compressed.PixelData = pydicom.encaps.encapsulate([segments])
        compressed.save_as(path)
        if code:
            assert "cannot be decoded as RLE Lossless" in str(refusal(path))
        else:
            assert (decode_frame(path, 0) == 0x0201).all()


@needs_data
def test_damaged_jpeg_ls_does_not_hang(tmp_path):
    """One decoder is asked: the second would never return from a frame with these two bytes, and the third would end the process."""
    if not pydicom.pixels.get_decoder(JPEGLSLossless).is_available:
        pytest.skip("needs the extra `codecs`")
    data = bytearray((DATA / "dicom" / "pydicom" / "JPEGLSNearLossless_16.dcm").read_bytes())
    data[586], data[588] = 7, 0
    path = tmp_path / "a.dcm"
    path.write_bytes(data)
    assert refusal(path).code in ("unreadable", "no-decoder")


def test_an_uncompressed_image_without_a_length_is_refused(tmp_path):
    """Only compressed pixels have no length (PS3.5 A.4): what is in there would be taken for pixels, item headers and all."""
    path = jpeg(tmp_path / "a.dcm", 16)
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.PixelData = pydicom.encaps.encapsulate([bytes(256)])
    path.write_bytes(path.read_bytes().replace(b"1.2.840.10008.1.2.4.50", b"1.2.840.10008.1.2.1\0\0\0"))
    assert "has no length, as only compressed pixels have" in str(refusal(path))


def test_damaged_jpeg_2000_boxes_do_not_hang(tmp_path):
    """pydicom looks for the next box of a JP2 file for ever where one has length 0."""
    dataset = pydicom.dcmread(jpeg(tmp_path / "a.dcm", 16))
    boxes = b"\0\0\0\x0cjP  \r\n\x87\n" + b"\0\0\0\0ftyp" + bytes(100)
    dataset.PixelData = pydicom.encaps.encapsulate([boxes])
    dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.90"
    dataset.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    if not pydicom.pixels.get_decoder(pydicom.uid.JPEG2000Lossless).is_available:
        pytest.skip("no decoder for JPEG 2000 is installed")
    assert "boxes around its JPEG 2000 data are damaged" in str(refusal(tmp_path / "a.dcm"))


def test_an_empty_element_of_an_unknown_vr_is_missing(tmp_path):
    """pydicom takes it for one whose reading was put off, and raises when it is asked for."""
    path = image_file(tmp_path / "a.dcm", ramp(4, 6))
    data = path.read_bytes()
    assert data.count(b"\x28\0\1\1US\2\0\x10\0") == 1
    path.write_bytes(data.replace(b"\x28\0\1\1US\2\0\x10\0", b"\x28\0\1\1ZZ\0\0"))
    assert "(0028,0101) Bits Stored is missing" in str(refusal(path))


def test_a_sequence_that_is_none_is_refused(tmp_path):
    """A sequence whose VR is damaged gives a FileError, not an error about strings."""
    group = Dataset()
    group.PixelMeasuresSequence = Sequence([Dataset()])
    path = image_file(tmp_path / "a.dcm", ramp(4, 6), SharedFunctionalGroupsSequence=Sequence([group]))
    data = path.read_bytes()
    path.write_bytes(data.replace(b"\x00\x52\x29\x92SQ", b"\x00\x52\x29\x92UT"))
    assert "(5200,9229) Shared Functional Groups Sequence is no sequence" in str(refusal(path))


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian])
def test_a_file_cut_anywhere_is_refused_or_whole(tmp_path, syntax):
    """Cut off after any byte, a file gives a FileError and never a wrong image; no warning and no open file is left."""
    path = image_file(tmp_path / "a.dcm", ramp(4, 6), syntax=syntax, SharedFunctionalGroupsSequence=Sequence([Dataset()]))
    data = path.read_bytes()
    whole = read_instance(path).frames[0].pixel_hash
    for length in range(len(data)):
        path.write_bytes(data[:length])
        try:
            assert read_instance(path).frames[0].pixel_hash == whole
        except FileError as error:
            assert SECRET not in str(error)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    changes=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=6),
    encoding=st.sampled_from(["plain", "rle"]),
)
def test_a_damaged_file_gives_an_image_or_a_file_error(tmp_path, changes, encoding):
    """With any bytes changed there is no other exception and no warning."""
    source = tmp_path / f"{encoding}.dcm"
    if not source.exists():
        image_file(source, ramp(2, 4, 6), PerFrameFunctionalGroupsSequence=Sequence([Dataset(), Dataset()]), RescaleSlope="1.5")
        if encoding == "rle":
            compressed = pydicom.dcmread(source)
            compressed.compress(RLELossless)
            compressed.save_as(source)
    data = bytearray(source.read_bytes())
    for at, value in changes:
        data[128 + at % (len(data) - 128)] = value
    path = tmp_path / "damaged.dcm"
    path.write_bytes(data)
    try:
        for frame in read_instance(path).frames:
            decode_frame(path, frame.frame)
    except FileError as error:
        assert "\n" not in str(error)


def seeds(folder):
    """Small files of many kinds, each with the length of its header, to damage."""
    group = Dataset()
    group.PixelMeasuresSequence, group.PixelValueTransformationSequence = Sequence([Dataset()]), Sequence([Dataset()])
    group.PixelMeasuresSequence[0].PixelSpacing, group.PixelValueTransformationSequence[0].RescaleSlope = ["2", "1"], "2"
    elements = {
        "SharedFunctionalGroupsSequence": Sequence([group]), "PerFrameFunctionalGroupsSequence": Sequence([group, Dataset()]),
        "ImagePositionPatient": ["1", "2", "3"], "SpecificCharacterSet": "ISO_IR 192", "StudyDate": "20120000", "InstanceNumber": "7",
    }  # fmt: skip
    paths = [
        image_file(folder / f"{number}.dcm", ramp(2, 4, 6), syntax=syntax, **elements)
        for number, syntax in enumerate(
            (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian)
        )
    ]
    paths.append(image_file(folder / "lut.dcm", ramp(4, 6), ModalityLUTSequence=lut(250, 0, 16, range(250)), RescaleIntercept="-5"))
    paths.append(image_file(folder / "rgb.dcm", ramp(4, 6, 3, dtype="uint8"), **colour(PlanarConfiguration=0)))
    paths.append(image_file(folder / "bits.dcm", ramp(2, 4, 8, dtype="uint8"), BitsAllocated=1, BitsStored=1, HighBit=0))
    paths.append(image_file(folder / "plan.dcm", ramp(4, 6), **PLAN, ReferencedStudySequence=Sequence([group])))
    paths.append(jpeg(folder / "jpeg.dcm", 16, RescaleSlope="2"))
    for source in (1, 2):
        compressed = pydicom.dcmread(paths[1])
        compressed.compress(RLELossless, encoding_plugin="pydicom")
        if source == 2:
            for sequence in (compressed["SharedFunctionalGroupsSequence"], compressed["PerFrameFunctionalGroupsSequence"]):
                sequence.is_undefined_length = True
                for item in sequence.value:
                    item.is_undefined_length_sequence_item = True
        compressed.save_as(folder / f"rle{source}.dcm")
        paths.append(folder / f"rle{source}.dcm")
    found = []
    for path in paths:
        data = path.read_bytes()
        at = max(data.rfind(b"\xe0\x7f\x10\x00"), data.rfind(b"\x7f\xe0\x00\x10"))
        found.append((data, at + 28 if at > 0 else len(data)))
    return found


def mutant(random, data, header):
    """A file whose header is damaged once to four times: bytes, numbers, tags and delimiters, pieces moved or gone."""
    data = bytearray(data)
    for _ in range(random.integers(1, 5)):
        at = int(random.integers(128 if random.integers(20) else 0, min(header, len(data) - 8)))
        kind = random.integers(9)
        if kind == 0:
            data[at] = random.integers(256)
        elif kind == 1:
            data[at] ^= 1 << random.integers(8)
        elif kind == 2:
            data[at : at + 4] = random.choice([0, 1, 7, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF]).astype("<u4").tobytes()
        elif kind == 3:
            data[at : at + 2] = random.choice([0, 1, 2, 0x7FFF, 0x8000, 0xFFFE, 0xFFFF]).astype("<u2").tobytes()
        elif kind == 4:
            data[at : at + 8] = random.choice([b"\xfe\xff\x00\xe0", b"\xfe\xff\x0d\xe0", b"\xfe\xff\xdd\xe0"]) + bytes(4)
        elif kind == 5:
            data[at : at + 2] = random.choice([b"SQ", b"UN", b"OB", b"US", b"UI", b"UT", b"ZZ", b"FD", b"\0\0", b"OV"])
        elif kind == 6:
            del data[at : at + int(random.integers(1, 40))]
        elif kind == 7:
            data[at:at] = data[at : at + int(random.integers(1, 40))]
        else:
            # A value in the place of another: tags of the Image Pixel module, numbers, transfer syntaxes.
            data[at : at + 4] = random.choice([b"\x28\0\x10\0", b"\x28\0\x08\0", b"\xe0\x7f\x10\0", b"1.99", b"9999", b"-1e9", b"\0R)\x92"])
    return bytes(data[: random.integers(len(data))] if random.integers(12) == 0 else data)


def damaged_headers(folder, count, seed):
    """Read `count` mutants in every way; returns how many were refused and the longest time for one, in s."""
    random, found = np.random.default_rng(seed), seeds(folder)
    path, refused, longest = folder / "damaged.dcm", 0, 0.0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(count):
        path.write_bytes(mutant(random, *found[number % len(found)]))
        begun = time.process_time()  # the machine may be busy with something else
        try:
            instance = read_instance(path, hash_pixels=bool(number % 3))
            for frame in instance.frames[:2]:
                decode_values(path, frame.frame)
        except FileError as error:
            refused += 1
            assert "\n" not in str(error)
            assert SECRET not in str(error)
        longest = max(longest, time.process_time() - begun)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "kB more at the most than before"
    return refused, longest


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kB on Linux only")
def test_damaged_headers_give_an_instance_or_a_file_error(tmp_path, caplog):
    """2,000 mutants of eleven kinds of file: nothing but a FileError, none takes a second, none takes memory for what is not there."""
    caplog.set_level(logging.CRITICAL, logger="pydicom")  # pytest would keep every record
    refused, longest = damaged_headers(tmp_path, 2_000, seed=1)
    assert 200 < refused < 1_900
    assert longest < 1


@pytest.mark.soak
def test_a_hundred_thousand_damaged_headers(tmp_path, capsys, caplog):
    """The same with 100,000."""
    caplog.set_level(logging.CRITICAL, logger="pydicom")
    refused, longest = damaged_headers(tmp_path, 100_000, seed=2)
    with capsys.disabled():
        sys.stdout.write(f"\n{refused} of 100000 damaged headers were refused; the slowest took {longest * 1000:.0f} ms\n")
    assert longest < 1


def test_reading_leaves_pydicom_and_warnings_as_they_were(tmp_path):
    """An importer's own settings of pydicom and of warnings are the same after a file full of violations."""
    path = image_file(tmp_path / "a.dcm", ramp(4, 6), SOPInstanceUID="1.02.x", PatientID="P" * 100)
    before = (pydicom.config.settings.reading_validation_mode, list(warnings.filters))
    read_instance(path)
    decode_frame(path, 0)
    assert (pydicom.config.settings.reading_validation_mode, list(warnings.filters)) == before


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs Linux's /proc to count open files")
def test_files_are_closed(tmp_path, monkeypatch):
    """Read, refused or large: no file stays open."""
    good, bad = image_file(tmp_path / "a.dcm", ramp(4, 6)), image_file(tmp_path / "b.dcm", ramp(4, 6), Rows=None)
    before = len(list(Path("/proc/self/fd").iterdir()))
    kept = []
    for limit in (8 << 20, 0):
        monkeypatch.setattr(dicom, "_READ_WHOLE", limit)
        kept += [read_instance(good), decode_frame(good, 0), refusal(bad)]
    assert len(list(Path("/proc/self/fd").iterdir())) <= before  # fewer: what earlier tests dropped was collected meanwhile
