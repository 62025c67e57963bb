"""Our own header reader against pydicom's way, `catalog.dicom.read_instance`: for any bytes whatever it says the same, or nothing."""

import csv
import dataclasses
import os
import random
import re
import struct
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.datadict import DicomDictionary
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels.common import PhotometricInterpretation
from pydicom.sequence import Sequence
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    MRImageStorage,
    RLELossless,
)
from pydicom.valuerep import EXPLICIT_VR_LENGTH_16, EXPLICIT_VR_LENGTH_32, STANDARD_VR

from catalog import encoding, header, pixels
from catalog.dicom import read_instance
from catalog.errors import FileError
from catalog.header import PREFIXES, Header, parse_header, read_header

DATA = Path(os.environ.get("SCANFEED_DATA", Path(__file__).parents[2] / "shared" / "data"))
needs_data = pytest.mark.skipif(not (DATA / "manifest.csv").is_file(), reason=f"no manifest.csv under {DATA}; set SCANFEED_DATA")
LITTLE_ENDIAN = (str(ImplicitVRLittleEndian), str(ExplicitVRLittleEndian))


def agreed(path, data=None, *, decoders=True):
    """What the header reader says of a file, after checking that pydicom says so, too; `data` is written to it first if given."""
    if data is not None:
        path.write_bytes(data)
    found = from_file(path)
    assert found == parse_header(path.read_bytes(), path.stat().st_size)
    if found is None:
        return None
    assert found.instance == read_instance(path, hash_pixels=False)
    if found.checked or decoders:
        try:
            looked_at = read_instance(path)
        except FileError:
            assert not found.checked
            return found
        assert without(looked_at, "pixel_hash") == found.instance or (
            not found.checked and without(looked_at, "pixel_hash") == without(found.instance, offset=None, length=0, dtype=None)
        )
    return found


def without(instance, *none, **values):
    """The instance with some attributes of its frames exchanged."""
    values |= dict.fromkeys(none)
    return dataclasses.replace(instance, frames=tuple(dataclasses.replace(frame, **values) for frame in instance.frames))


def from_file(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return read_header(partial(os.pread, descriptor), os.fstat(descriptor).st_size)
    finally:
        os.close(descriptor)


@pydicom.config.disable_value_validation()
def image_file(path, pixels=None, *, syntax=ExplicitVRLittleEndian, **elements):
    """A file of one image, (rows, columns) or (frames, rows, columns), with `elements` set or, if None, left out."""
    pixels = np.arange(24, dtype="int16").reshape(4, 6) if pixels is None else pixels
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.SOPClassUID, dataset.SOPInstanceUID, dataset.PatientID = MRImageStorage, "1.2.3", "A7"
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.StudyDate = "1.2", "1.3", "20120101"
    dataset.ImagePositionPatient, dataset.ImageOrientationPatient = ["1", "2", "3"], ["1", "0", "0", "0", "0", "1"]
    dataset.PixelSpacing, dataset.RescaleSlope, dataset.TriggerTime = ["0.5", "2"], "1.5", "42"
    dataset.PhotometricInterpretation, dataset.SamplesPerPixel = "MONOCHROME2", 1
    dataset.Rows, dataset.Columns = pixels.shape[-2:]
    if pixels.ndim == 3:
        dataset.NumberOfFrames = len(pixels)
    dataset.BitsAllocated = dataset.BitsStored = pixels.dtype.itemsize * 8
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    dataset.PixelData = pixels.astype(pixels.dtype.newbyteorder("<" if syntax.is_little_endian else ">")).tobytes()
    dataset["PixelData"].VR = "OW"
    for name, value in elements.items():
        if value is None:
            delattr(dataset, name)
        else:
            setattr(dataset, name, value)
    dataset.save_as(path, implicit_vr=syntax.is_implicit_VR, little_endian=syntax.is_little_endian, enforce_file_format=True)
    return path


def item(**elements):
    dataset = Dataset()
    for name, value in elements.items():
        setattr(dataset, name, value)
    return dataset


def long_sequence(*items):
    """A sequence whose end, and that of its items, is a delimiter."""
    sequence = Sequence(items)
    sequence.is_undefined_length = True
    for each in items:
        each.is_undefined_length_sequence_item = True
    return sequence


def real_files():
    with (DATA / "manifest.csv").open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["kind"] == "dicom"]


@needs_data
def test_real_files_say_what_pydicom_says(capsys):
    """Each shared file agrees. Of the uncompressed little-endian images that are no enhanced object, all are read by this reader."""
    read, missed = 0, []
    for row in real_files():
        path = DATA / row["path"]
        found = agreed(path)
        if row["decode"] == "ok" and row["ts"] in LITTLE_ENDIAN:
            read += found is not None
            if found is None:
                missed.append(path)
        if row["decode"] == "no-pixels":
            assert found is None
    with capsys.disabled():
        sys.stdout.write(f"\n{read} of {read + len(missed)} uncompressed little-endian images need no pydicom for their header\n")
    for path in missed:
        dataset = pydicom.dcmread(path, stop_before_pixels=True)
        assert "SharedFunctionalGroupsSequence" in dataset, path
    assert read >= 0.98 * (read + len(missed))


@needs_data
def test_every_prefix_of_real_headers_agrees(tmp_path):
    """A file that is cut off anywhere in its header, or in its pixels, is left to pydicom."""
    for name in ("dicom/pydicom/MR_small.dcm", "dicom/pydicom/MR_small_implicit.dcm", "dicom/dicomdir-tree/98892001/CT5N/2062"):
        data = (DATA / name).read_bytes()
        offset = parse_header(data, len(data)).instance.frames[0].offset
        for length in (*range(offset + 2), len(data) - 300):
            assert parse_header(data[:length], length) is None
            assert parse_header(data[:length], len(data)) == (parse_header(data, len(data)) if length >= offset else None)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
@pytest.mark.parametrize(("dtype", "named"), [("uint8", "|u1"), ("int8", "|i1"), ("uint16", "<u2"), ("int16", "<i2"), ("int32", "<i4")])
def test_images_that_are_certain(tmp_path, syntax, dtype, named):
    """Whole-width grey values: the header says all, and the bytes at the offset are the pixels."""
    pixels = np.arange(72).reshape(3, 4, 6).astype(dtype)
    path = image_file(tmp_path / "a.dcm", pixels, syntax=syntax)
    found = agreed(path)
    assert found.checked
    assert [frame.position for frame in found.instance.frames] == [-2.0, None, None]
    for frame, expected in zip(found.instance.frames, pixels, strict=True):
        assert frame.dtype == named
        np.testing.assert_array_equal(np.memmap(path, frame.dtype, "r", frame.offset, (4, 6)), expected)


def test_unused_high_bits_are_for_the_pixels_to_say(tmp_path):
    """Below Bits Allocated the dtype is given and not checked; pydicom's way withdraws it where a value uses a bit above Bits Stored."""
    pixels = np.arange(24, dtype="uint16").reshape(4, 6)
    for highest, dtype in ((0x0FFF, "<u2"), (0xF000, None)):
        pixels[2, 3] = highest
        path = image_file(tmp_path / "a.dcm", pixels, BitsStored=12, HighBit=11)
        found = agreed(path)
        assert (found.checked, found.instance.frames[0].dtype, read_instance(path).frames[0].dtype) == (False, "<u2", dtype)


def test_pixels_that_need_a_decoder_have_a_header_too(tmp_path):
    """Compressed, by planes, YBR, single bits: no dtype, and not checked, since the decoder decides. RGB by pixel needs none."""
    grey = np.zeros((4, 6), "uint8")
    colour = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0, "PixelData": bytes(range(72))}
    ybr = {"PhotometricInterpretation": "YBR_FULL_422", "PixelData": bytes(range(48))}
    compressed = pydicom.dcmread(image_file(tmp_path / "a.dcm", np.zeros((2, 4, 6), "int16")))
    compressed.compress(RLELossless)
    compressed.save_as(tmp_path / "rle.dcm")
    for path, dtype in (
        (image_file(tmp_path / "rgb.dcm", grey, **colour), "|u1"),
        (image_file(tmp_path / "planes.dcm", grey, **colour | {"PlanarConfiguration": 1}), None),
        (image_file(tmp_path / "ybr.dcm", grey, **colour | ybr), None),
        (image_file(tmp_path / "bits.dcm", grey, BitsAllocated=1, BitsStored=1, HighBit=0, PixelData=b"\1\2\3\0"), None),
        (tmp_path / "rle.dcm", None),
    ):
        found = agreed(path)
        assert {frame.dtype for frame in found.instance.frames} == {dtype}
        assert found.checked == (dtype is not None)


def test_a_file_without_preamble(tmp_path):
    """The dataset alone: how it is encoded is certain."""
    for syntax in (ExplicitVRLittleEndian, ImplicitVRLittleEndian):
        data = image_file(tmp_path / "a.dcm", syntax=syntax).read_bytes()
        bare = data[144 + int.from_bytes(data[140:144], "little") :]
        assert agreed(tmp_path / "b.dcm", bare).instance == without(parse_header(data, len(data)).instance, offset=len(bare) - 48)
        assert parse_header(bare[8:], len(bare) - 8) is None


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_sequences_that_matter_not_are_passed_over(tmp_path, syntax):
    """With lengths or with delimiters, nested, private or empty."""
    inner = item(ReferencedSOPInstanceUID="1.2.4", PurposeOfReferenceCodeSequence=long_sequence(item(CodeValue="1"), Dataset()))
    inner.SpecificCharacterSet = "ISO_IR 192"
    private = item()
    private.private_block(0x11, "US", create=True).add_new(1, "SQ", long_sequence(item(Rows=999)))
    for made in (long_sequence, lambda *items: Sequence(items)):
        path = image_file(
            tmp_path / "a.dcm", syntax=syntax, ReferencedImageSequence=made(inner, Dataset(), private), SourceImageSequence=made()
        )
        found = agreed(path)
        assert found.checked
        assert found.instance.frames[0].rows == 4


TELLING = {
    "PatientName": "Müller^Anna", "SpecificCharacterSet": "ISO_IR 100", "PatientBirthDate": "19220101", "PatientAge": "090Y",
    "OperatorsName": "anonymous", "InstitutionName": "St. Elsewhere", "DeviceSerialNumber": "0", "PatientComments": "tall " * 200,
    "BurnedInAnnotation": "YES", "PatientIdentityRemoved": "NO", "GantryDetectorTilt": "-12.5",
}  # fmt: skip


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian])
def test_what_quality_rules_ask(tmp_path, syntax):
    """Privacy, tilt, the second UID and surplus bytes: both readers say the same of them, and what the file says."""

    def asked(**elements):
        path = image_file(tmp_path / "a.dcm", syntax=syntax, **elements)
        found = agreed(path)
        assert (found is None) == (syntax not in LITTLE_ENDIAN)
        instance = read_instance(path, hash_pixels=False) if found is None else found.instance
        return {name: getattr(instance, name) for name in plain}

    plain = {
        "burned_in_annotation": "", "identity_removed": "", "over_89": None, "identifying": (), "gantry_tilt": None,
        "other_meta_uid": False, "surplus_bytes": 0,
    }  # fmt: skip
    assert asked() == plain
    named = ("(0008,0080)", "(0010,0010)", "(0010,0030)", "(0010,4000)")
    assert asked(**TELLING) == plain | {
        "burned_in_annotation": "YES", "identity_removed": "NO", "over_89": True, "identifying": named, "gantry_tilt": -12.5,
    }  # fmt: skip
    assert asked(PatientName="A7", PatientBirthDate="00000000", PatientAge="089Y") == plain | {"over_89": False}
    assert asked(PatientName="Bond", PatientID="Bond")["identifying"] == ("(0010,0010)",)
    for surplus in (0, 2, 48):
        assert asked(PixelData=bytes(48 + surplus)) == plain | {"surplus_bytes": surplus}
    odd = {"Rows": 3, "Columns": 3, "BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}
    for length, surplus in ((9, 0), (10, 0), (12, 2)):
        assert asked(**odd, PixelData=bytes(length)) == plain | {"surplus_bytes": surplus}
    assert asked(BitsAllocated=1, BitsStored=1, HighBit=0, PixelData=bytes(6)) == plain | {"surplus_bytes": 2}


def test_the_second_uid_of_a_file(tmp_path):
    """MediaStorageSOPInstanceUID is another one, the same with padding, or missing; a file without meta information has none."""
    data = image_file(tmp_path / "a.dcm", SOPInstanceUID="1.2.345").read_bytes()
    at = data.index(b"1.2.345\0")
    for value, other in ((b"1.2.345\0", False), (b"1.2.345 ", False), (b"1.2.346\0", True), (b"1.2.3\0\0\0", True), (bytes(8), False)):
        assert agreed(tmp_path / "b.dcm", data[:at] + value + data[at + 8 :]).instance.other_meta_uid is other
    assert agreed(tmp_path / "b.dcm", data[144 + data[140] :]).instance.other_meta_uid is False
    unnamed = data[: at + 8] + data[at + 8 :].replace(b"1.2.345\0", bytes(8))
    assert agreed(tmp_path / "b.dcm", unnamed).instance.other_meta_uid is True


def test_the_group_of_nothing_that_osirix_writes_is_nothing(tmp_path):
    """A functional group without content leaves the header as it is; one with content is for pydicom."""
    assert agreed(image_file(tmp_path / "a.dcm", PerFrameFunctionalGroupsSequence=Sequence([Dataset()]))).checked
    group = item(PixelMeasuresSequence=Sequence([item(SliceThickness="8")]))
    assert from_file(image_file(tmp_path / "a.dcm", PerFrameFunctionalGroupsSequence=Sequence([group]))) is None
    assert from_file(image_file(tmp_path / "a.dcm", SharedFunctionalGroupsSequence=long_sequence(Dataset()))) is None


@pytest.mark.parametrize(
    "elements",
    [
        {"syntax": ExplicitVRBigEndian},
        {"syntax": DeflatedExplicitVRLittleEndian},
        {"ModalityLUTSequence": Sequence([item(ModalityLUTType="HU")])},
        {"SpecificCharacterSet": "ISO_IR 100", "PatientID": "Müller"},
        {"SpecificCharacterSet": "utf8"},
        {"NumberOfFrames": "-1"},
        {"NumberOfFrames": "2"},
        {"NumberOfFrames": "2147483647"},
        {"Rows": None},
        {"Rows": 0},
        {"Rows": 5},
        {"BitsStored": 17},
        {"BitsStored": None},
        {"PixelRepresentation": 7},
        {"PhotometricInterpretation": "GREY"},
        {"PhotometricInterpretation": None},
        {"SamplesPerPixel": 2},
        {"BitsAllocated": 12, "BitsStored": 12, "Rows": 2},
        {"PixelData": None},
    ],
    ids=str,
)
def test_what_is_left_to_pydicom(tmp_path, elements):
    """Another byte order, text beyond ASCII, a header that contradicts itself: None, and at once."""
    assert from_file(image_file(tmp_path / "a.dcm", **elements)) is None


ITEM, ITEM_END, SEQUENCE_END = (struct.pack("<HHL", 0xFFFE, element, 0) for element in (0xE000, 0xE00D, 0xE0DD))
ENDLESS_ITEM = ITEM[:4] + b"\xff\xff\xff\xff"


def long_form(group, element, vr, length):
    """An element's head with a length of 4 bytes; `vr` None for implicit VR."""
    return struct.pack("<HHL", group, element, length) if vr is None else struct.pack("<HH2sHL", group, element, vr, 0, length)


def test_encoding_that_is_left_to_pydicom(tmp_path):
    """No preamble, elements out of order or twice, VRs that nobody knows, an undefined length that is no sequence's, wrong lengths."""
    data = image_file(tmp_path / "a.dcm", SpecificCharacterSet="ISO_IR 100").read_bytes()
    patient, trigger = data.index(b"\x10\0\x20\0LO"), data.index(b"\x18\0\x60\x10DS")
    study, pixels = data.index(b"\x20\0\x0d\0UI"), data.index(b"\xe0\x7f\x10\0OW")
    element = data[patient:trigger]
    nothing = b"\x19\0\1\x10LO\0\0"

    def with_private(vr, length, value):
        return data[:study] + long_form(0x19, 0x1001, vr, length) + value + data[study:]

    assert agreed(tmp_path / "b.dcm", data).checked
    assert agreed(tmp_path / "b.dcm", data[:study] + nothing + data[study:]).checked
    assert agreed(tmp_path / "b.dcm", with_private(b"SQ", 0xFFFFFFFF, ITEM + ENDLESS_ITEM + ITEM_END + SEQUENCE_END)).checked
    for changed in (
        data[132:],
        data[:1],
        data[:128] + b"DICX" + data[132:],
        data[:trigger] + element + data[trigger:],
        data[:patient] + data[trigger:study] + element + data[study:],
        data[:patient] + element.replace(b"LO", b"ZZ") + data[trigger:],
        data[:patient] + element.replace(b"LO", b"\0\0") + data[trigger:],
        data[:pixels] + struct.pack("<HH2sH", 0x7FE0, 0x0008, b"US", 0) + data[pixels:],
        data[:140] + b"\0\0\0\0" + data[144:],
        data[:140] + struct.pack("<L", data[140] - 2) + data[144:],
        data[:140] + b"\xff\xff\xff\xff" + data[144:],
        data[:136] + b"SS" + data[138:],
        data.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1 "),
        data.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.9\0"),
        data.replace(b"DS\4\0001.5 ", b"DS\4\0001.x "),
        data.replace(b"ISO_IR 100", b"ISO-IR 100"),
        with_private(b"UN", 0xFFFFFFFF, SEQUENCE_END),
        with_private(b"OB", 0xFFFFFFFF, SEQUENCE_END),
        with_private(b"OB", 0x7FFFFFFF, b""),
        with_private(b"SQ", 0xFFFFFFFF, ITEM[:4] + b"\4\0\0\0" + nothing + SEQUENCE_END),
        with_private(b"SQ", 0xFFFFFFFF, ITEM[:4] + b"\x08\0\0\0" + nothing[:6] + b"\x08\0" + SEQUENCE_END),
        with_private(b"SQ", 0xFFFFFFFF, ENDLESS_ITEM + b"\x08\0\5\0CS\4\0none" + ITEM_END + SEQUENCE_END),
        with_private(b"SQ", 0xFFFFFFFF, ENDLESS_ITEM + b"\x08\0\5\0LO\0\0" + ITEM_END + SEQUENCE_END),
        with_private(b"SQ", 0xFFFFFFFF, ENDLESS_ITEM + b"\x19\0\1\x10\0\0\0\0" + ITEM_END + SEQUENCE_END),
        with_private(b"SQ", 0xFFFFFFFF, nothing + SEQUENCE_END),
    ):
        assert changed != data
        assert agreed(tmp_path / "b.dcm", changed) is None


def test_implicit_encoding_that_is_left_to_pydicom(tmp_path):
    """Without VR only the standard's dictionary, or an item that follows, makes a sequence; and a length can look like a VR."""
    data = image_file(tmp_path / "a.dcm", syntax=ImplicitVRLittleEndian).read_bytes()
    first, study = 144 + data[140], data.index(b"\x20\0\x0d\0\4\0")

    def with_element(group, element, value):
        return data[:study] + long_form(group, element, None, 0xFFFFFFFF) + value + SEQUENCE_END + data[study:]

    for group, element in ((0x19, 0x1001), (0x18, 0x9004 + 2)):
        assert agreed(tmp_path / "b.dcm", with_element(group, element, ITEM)).checked
    for changed in (
        with_element(0x19, 0x1001, b""),
        with_element(0x18, 0x9004, ITEM),
        with_element(0x18, 0xFFFF, ITEM),
        data[:first] + long_form(0x08, 0x0001, None, 0x4141) + bytes(0x4141) + data[first:],
    ):
        assert agreed(tmp_path / "b.dcm", changed) is None


def test_many_nested_sequences_end(tmp_path):
    """A sequence in a sequence, ten thousand times, is no recursion to the end of the stack."""
    nested = (long_form(0x08, 0x1140, b"SQ", 0xFFFFFFFF) + ENDLESS_ITEM) * 10_000
    data = image_file(tmp_path / "a.dcm").read_bytes()
    at = data.index(b"\x10\0\x20\0LO")
    assert parse_header(data[:at] + nested + data[at:], len(data) + len(nested)) is None


def test_a_long_header_takes_another_read(tmp_path):
    """One read of the first bytes serves a usual file; more only where the header goes on, and never the pixels of a large file."""
    reads = []

    def read(length, offset):
        reads.append((length, offset))
        return data[offset : offset + length]

    for size, expected in ((100, PREFIXES[:1]), (20_000, PREFIXES[:2]), (200_000, PREFIXES[:3]), (9 << 20, PREFIXES)):
        private = item()
        private.private_block(0x11, "US", create=True).add_new(1, "OB", b"\0" * size)
        path = image_file(tmp_path / "a.dcm", np.zeros((3000, 2000), "int16"))
        dataset = pydicom.dcmread(path)
        dataset.update(private)
        dataset.save_as(path)
        data = path.read_bytes()
        reads.clear()
        found = read_header(read, len(data))
        assert reads == [(length, 0) for length in expected]
        assert (found is None) == (size > PREFIXES[-1])
        assert found is None or agreed(path) == found
        assert parse_header(data, len(data)).checked


def changed(data, elements, choose):
    """One mutant: `elements` are the offsets of the elements, `choose` a random.Random."""
    data = bytearray(data)
    for _ in range(choose.choice((1, 1, 1, 2, 3))):
        index = choose.randrange(len(elements))
        at = min(elements[index], len(data) - 12)
        behind = min(elements[index + 1] if index + 1 < len(elements) else at + 12, len(data))
        kind = choose.choice(KINDS)
        if kind == "byte":
            data[choose.randrange(128, min(behind + 16, len(data)))] = choose.choice(
                (0, 1, 0x20, 0x5C, 0x7F, 0x80, 0xFF, choose.randrange(256))
            )
        elif kind == "value" and behind > at + 8:
            data[choose.randrange(at + 8, behind)] = choose.choice(b"\0 \\.+-0123456789eEn_A\x80\xe4\x1b")
        elif kind == "short length":
            was = int.from_bytes(data[at + 6 : at + 8], "little")
            data[at + 6 : at + 8] = struct.pack(
                "<H", choose.choice((0, 1, 2, 4, 6, 8, 12, was ^ 1, was + 2 & 0xFFFF, was + 8 & 0xFFFF, 0xFFFF))
            )
        elif kind == "long length":
            place = at + choose.choice((4, 8))
            was = int.from_bytes(data[place : place + 4], "little")
            lengths = (0, 2, 8, was ^ 1, was + 2 & 0xFFFFFFFF, was + 8 & 0xFFFFFFFF, len(data), 0x7FFFFFFF, 0xFFFFFFFE, 0xFFFFFFFF)
            data[place : place + 4] = struct.pack("<L", choose.choice(lengths))
        elif kind == "vr":
            data[at + 4 : at + 6] = choose.choice((*VRS, b"\0\0", b"??", b"ZZ", b"us", b"OX"))
        elif kind == "tag":
            tag = (choose.choice(TAGS) + choose.choice((0, 0, 0, -2, -1, 1, 2))) & 0xFFFFFFFF
            data[at : at + 4] = struct.pack("<HH", tag >> 16, tag & 0xFFFF)
        elif kind == "delimiter":
            places = [found.start() for found in re.finditer(b"\xfe\xff[\x00\x0d\xdd]\xe0", data[:behind])]
            place = choose.choice(places or [at])
            data[place : place + 8] = choose.choice(DELIMITERS)
        elif kind == "insert":
            data[at:at] = choose.choice((*DELIMITERS, *INSERTED))
        elif kind == "delete":
            del data[at:behind]
        elif kind == "twice":
            data[at:at] = data[at:behind]
        elif kind == "move":
            moved = bytes(data[at:behind])
            del data[at:behind]
            place = elements[choose.randrange(len(elements))]
            data[place:place] = moved
        elif kind == "cut":
            del data[choose.choice((at, at + 4, at + 8, behind, len(data) - choose.randrange(1, 200))) :]
            break
    return bytes(data)


KINDS = (
    "byte",
    "byte",
    "value",
    "value",
    "short length",
    "long length",
    "vr",
    "tag",
    "delimiter",
    "insert",
    "delete",
    "twice",
    "move",
    "cut",
)


def test_tables_are_pydicoms() -> None:
    """What stands in the reader of PS3.5, PS3.6 and PS3.10, so that pydicom need not be imported, is what pydicom knows."""
    codes = {tag: int.from_bytes(vr.encode(), "little") for tag, (vr, *_) in DicomDictionary.items() if len(vr) == 2}
    assert {tag: vr for tag, vr in codes.items() if tag >> 16 == 2} == encoding._META
    assert {tag: codes[tag] for tag in header._KEPT} == header._KEPT
    for vrs, known in ((EXPLICIT_VR_LENGTH_16, encoding._SHORT_VR), (EXPLICIT_VR_LENGTH_32, encoding._LONG_VR)):
        assert known == {int.from_bytes(vr.encode(), "little") for vr in vrs}
    assert {name.value for name in PhotometricInterpretation} == pixels._PHOTOMETRIC
    syntaxes = [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian]
    assert [*pixels.LITTLE_ENDIAN, pixels.BIG_ENDIAN, pixels.DEFLATED] == syntaxes


def test_reading_needs_no_pydicom() -> None:
    """A reading process that meets nothing but common files starts in half the time, as it never imports pydicom."""
    program = "import sys, catalog.reading; assert not {'pydicom', 'sqlalchemy', 'psycopg', 'typer'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


VRS = [str(vr).encode() for vr in sorted(STANDARD_VR)]
TAGS = [*sorted(header._KEPT), 0x00000000, 0x00020000, 0x00020010, 0x00100010, 0x00111001, 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD, 0x7FE00008,
        0x7FE00009, 0x7FE00010, 0x7FE10010]  # fmt: skip
DELIMITERS = [struct.pack("<HHL", 0xFFFE, tag, length) for tag in (0xE000, 0xE00D, 0xE0DD) for length in (0, 8, 0xFFFFFFFF)]
ENDLESS = [long_form(group, 0x1001, vr, 0xFFFFFFFF) for group in (8, 0x11) for vr in (b"SQ", b"UN", b"OB", b"US", b"\0\0")]
INSERTED = [start + end for start in (*ENDLESS, long_form(8, 0x1140, None, 0xFFFFFFFF)) for end in (DELIMITERS[6], DELIMITERS[2], b"")]


def element_offsets(data):
    """Where the elements of a file begin, as pydicom finds them."""
    path = pydicom.filebase.DicomBytesIO(data)
    dataset = pydicom.dcmread(path, stop_before_pixels=True)
    offsets = []
    for part in (dataset.file_meta, dataset):
        for element in part.elements():
            told = getattr(element, "value_tell", None) or element.file_tell
            long = not getattr(element, "is_implicit_VR", part.original_encoding[0]) and element.VR in ("OB", "OW", "UN", "SQ", "UT", "OF")
            offsets.append(told - (12 if long else 8))
    return [*sorted(offsets), path.tell()]


def fuzz(tmp_path, count, seed):
    """Compare mutants of the real files and of those that hold what is odd; return how many were read, how many left to pydicom."""
    native, compressed = [], []
    inner = item(ReferencedSOPInstanceUID="1.2.4", PurposeOfReferenceCodeSequence=long_sequence(item(CodeValue="1"), Dataset()))
    inner.SpecificCharacterSet = "ISO_IR 192"
    for syntax in (ExplicitVRLittleEndian, ImplicitVRLittleEndian):
        odd = {"ReferencedImageSequence": long_sequence(inner, Dataset()), "SourceImageSequence": long_sequence()}
        frames = np.arange(72, dtype="int16").reshape(3, 4, 6)
        native += 4 * [image_file(tmp_path / "a.dcm", frames, syntax=syntax, BitsStored=12, HighBit=11, **odd).read_bytes()]
        native += 3 * [image_file(tmp_path / "a.dcm", syntax=syntax, PixelData=bytes(60), **TELLING).read_bytes()]
        native += 2 * [image_file(tmp_path / "a.dcm", syntax=syntax, PerFrameFunctionalGroupsSequence=Sequence([Dataset()])).read_bytes()]
    rle = pydicom.dcmread(image_file(tmp_path / "a.dcm", frames))
    rle.compress(RLELossless)
    rle.save_as(tmp_path / "a.dcm")
    compressed.append((tmp_path / "a.dcm").read_bytes())
    if (DATA / "manifest.csv").is_file():
        kept = Counter()
        for row in real_files():
            path = DATA / row["path"]
            kept[path.parent] += 1
            data = path.read_bytes()
            if kept[path.parent] <= 20 and len(data) < 600_000 and parse_header(data, len(data)):
                (native if row["ts"] in LITTLE_ENDIAN else compressed).append(data)
    choose = random.Random(seed)
    offsets = {}
    outcomes = Counter()
    for _ in range(count):
        sources = native if choose.random() < 0.8 else compressed
        data = choose.choice(sources)
        elements = offsets.get(data) or offsets.setdefault(data, element_offsets(data))
        # Decoders are slow, and not all of them survive a wrong header.
        found = agreed(tmp_path / "b.dcm", changed(data, elements, choose), decoders=sources is native)
        outcomes[found is not None] += 1
    return outcomes


def test_mutants_say_what_pydicom_says_or_nothing(tmp_path):
    """Of 2,000 mutants none is read in another way, and enough of them are read for that to mean something."""
    outcomes = fuzz(tmp_path, 2_000, seed=1)
    assert outcomes[True] > 300
    assert outcomes[False] > 300


@pytest.mark.soak
def test_very_many_mutants_say_what_pydicom_says_or_nothing(tmp_path, capsys):
    """The same for 100,000 others each time."""
    seed = random.SystemRandom().randrange(2**32)
    with capsys.disabled():
        sys.stdout.write(f"\nseed {seed}\n")
        outcomes = fuzz(tmp_path, 100_000, seed)
        sys.stdout.write(f"{outcomes[True]} read, {outcomes[False]} left to pydicom\n")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(start=st.sampled_from([b"", b"\0" * 128 + b"DICM", b"\0" * 128 + b"DICM\x02\0\0\0UL\x04\0"]), rest=st.binary(max_size=400))
def test_any_bytes_give_nothing_worse_than_none(start, rest):
    """No exception, whatever the bytes and the size that is claimed for them."""
    for size in (len(start + rest), 0, 1 << 40):
        assert parse_header(start + rest, size) is None


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(changes=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4), implicit=st.booleans())
def test_changed_bytes_say_what_pydicom_says(tmp_path, changes, implicit):
    """Bytes anywhere in the header changed, found and shrunk by hypothesis."""
    source = tmp_path / f"{implicit}.dcm"
    if not source.exists():
        image_file(
            source, syntax=ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian, ReferencedImageSequence=long_sequence(Dataset())
        )
    data = bytearray(source.read_bytes())
    for at, value in changes:
        data[128 + at % (len(data) - 128)] = value
    assert isinstance(agreed(tmp_path / "b.dcm", bytes(data)), Header | None)
