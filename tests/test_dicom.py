"""DICOM files: what is read from a header, where pixels lie, and that nothing but a FileError comes out of a bad file."""

import csv
import hashlib
import os
import sys
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
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

from catalog import dicom
from catalog.dicom import decode_frame, is_dicom, read_instance
from catalog.errors import FileError

DATA = Path(os.environ.get("SCANFEED_DATA", Path(__file__).parents[2] / "shared" / "data"))
needs_data = pytest.mark.skipif(not (DATA / "manifest.csv").is_file(), reason=f"no manifest.csv under {DATA}; set SCANFEED_DATA")
SECRET = "Zbigniew-4711"
# Decoders that the package does not require; with them installed these files decode.
EXTRA_DECODERS = {"1.2.840.10008.1.2.4." + end for end in ("51", "57", "70", "80", "81")}
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
        decode_frame(path, 0)
    assert SECRET not in str(caught.value)
    assert str(path) not in str(caught.value)
    assert "\n" not in str(caught.value)
    return caught.value


def manifest():
    with (DATA / "manifest.csv").open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["kind"] == "dicom"]


@needs_data
def test_real_files_are_what_the_manifest_says(capsys):
    """Each real file that decodes has the manifest's identifiers, shape and pixel hash; each other gives a FileError.

    Where bytes can be read by offset, they are what pydicom decodes, dtype and all.
    """
    fast = little_endian = 0
    for row in manifest():
        path = DATA / row["path"]
        try:
            instance = read_instance(path)
        except FileError as error:
            assert row["decode"] != "ok" or (error.code == "no-decoder" and row["ts"] in EXTRA_DECODERS), (row["path"], str(error))
            continue
        assert row["decode"] == "ok", row["path"]
        assert (instance.patient_id, instance.study_instance_uid) == (row["patient"], row["study"]), row["path"]
        assert (instance.series_instance_uid, instance.sop_instance_uid) == (row["series"], row["sop"]), row["path"]
        assert (instance.transfer_syntax_uid, instance.modality) == (row["ts"], row["modality"]), row["path"]
        assert instance.number_of_frames == len(instance.frames) == int(row["frames"] or 1)
        pixels = []
        for index, frame in enumerate(instance.frames):
            assert (frame.frame, frame.rows, frame.columns) == (index, int(row["rows"]), int(row["cols"]))
            assert (frame.photometric, frame.bits_stored) == (row["photo"], int(row["bits"].partition("/")[0]))
            decoded = decode_frame(path, index)
            assert decoded.dtype.isnative
            assert decoded.flags.c_contiguous
            assert frame.pixel_hash == hashlib.sha256(decoded.astype(decoded.dtype.newbyteorder("<")).tobytes()).digest(), row["path"]
            pixels.append(decoded.astype(decoded.dtype.newbyteorder("<")).tobytes())
            if frame.dtype is not None:
                raw = np.memmap(path, frame.dtype, "r", frame.offset, (frame.rows, frame.columns))
                assert raw.dtype == decoded.dtype
                assert raw.nbytes == frame.length
                np.testing.assert_array_equal(raw, decoded, err_msg=row["path"])
        assert hashlib.sha256(b"".join(pixels)).hexdigest()[:16] == row["pixsha"], row["path"]
        if instance.transfer_syntax_uid in LITTLE_ENDIAN:
            little_endian += 1
            fast += all(frame.dtype is not None for frame in instance.frames)
    with capsys.disabled():
        sys.stdout.write(f"\n{fast} of {little_endian} uncompressed little-endian files can be read by offset\n")
    assert fast >= 0.95 * little_endian


@needs_data
def test_broken_files_say_what_is_wrong():
    """The real broken files give the code that tells their finder what to do."""
    broken = DATA / "dicom" / "broken"
    assert refusal(broken / "MR_truncated.dcm").code == "truncated"
    assert refusal(broken / "rtplan_truncated.dcm").code == "no-pixels"
    assert refusal(broken / "no_meta.dcm").code == "not-dicom"
    assert "(0028,0008) Number of Frames" in str(refusal(broken / "badVR.dcm"))
    assert refusal(DATA / "rtstruct" / "rt-utils" / "rt.dcm").code == "no-pixels"
    assert refusal(DATA / "sunnybrook" / "final_data" / "link.csv").code == "not-dicom"
    assert refusal(DATA / "dicom" / "transfer-syntax-ctimage").code == "unreadable"


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


def test_colour_and_single_bits_are_left_to_pydicom(tmp_path):
    """Neither can be read by offset as (rows, columns); both decode, single bits to uint8 with frames off the byte grid."""
    rgb = ramp(4, 6, 3, dtype="uint8")
    path = image_file(
        tmp_path / "rgb.dcm",
        rgb,
        Rows=4,
        Columns=6,
        NumberOfFrames=None,
        SamplesPerPixel=3,
        PhotometricInterpretation="RGB",
        PlanarConfiguration=0,
    )
    (frame,) = read_instance(path).frames
    assert (frame.dtype, frame.samples_per_pixel) == (None, 3)
    np.testing.assert_array_equal(decode_frame(path, 0), rgb)

    bits = np.random.default_rng(0).integers(0, 2, (3, 3, 5), dtype="uint8")
    packed = np.packbits(bits.ravel(), bitorder="little").tobytes()
    path = image_file(tmp_path / "seg.dcm", bits, BitsAllocated=1, BitsStored=1, HighBit=0, PixelData=packed)
    for frame in read_instance(path).frames:
        np.testing.assert_array_equal(decode_frame(path, frame.frame), bits[frame.frame])
        assert (frame.dtype, frame.pixel_hash) == (None, hashlib.sha256(bits[frame.frame].tobytes()).digest())


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
    ("missing", "tag"), [("Rows", "(0028,0010) Rows"), ("Columns", "(0028,0011) Columns"), ("PixelData", "(7FE0,0010) Pixel Data")]
)
def test_an_object_without_an_image_names_what_is_missing(tmp_path, missing, tag):
    """`no-pixels` gives tag and name, so that it can be told from a damaged image."""
    error = refusal(image_file(tmp_path / "a.dcm", ramp(4, 6), **{missing: None}))
    assert (error.code, str(error)) == ("no-pixels", f"{tag} is missing, so it holds no image")


@pytest.mark.parametrize(
    ("elements", "code", "words"),
    [
        ({"Rows": 0}, "no-pixels", "(0028,0010) Rows is 0"),
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
    error = refusal(image_file(tmp_path / "a.dcm", ramp(4, 6), **elements))
    assert error.code == code
    assert words in str(error)


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
        assert not is_dicom(text)
        assert refusal(text).code == "not-dicom"
    assert refusal(tmp_path).code == "unreadable"
    assert refusal(tmp_path / "absent").code == "unreadable"
    assert is_dicom(image_file(tmp_path / "a.dcm", ramp(4, 6)))


def test_a_file_without_preamble_is_dicom_but_cannot_be_decoded(tmp_path):
    """Without file meta information nothing says how the pixels are encoded; the message names that element."""
    path = tmp_path / "a.dcm"
    for syntax in (ImplicitVRLittleEndian, ExplicitVRLittleEndian):
        dataset = image_dataset(ramp(4, 6), syntax=syntax)
        del dataset.file_meta
        dataset.save_as(path, implicit_vr=syntax.is_implicit_VR, little_endian=True)
        assert is_dicom(path)
        assert "(0002,0010) Transfer Syntax UID is missing" in str(refusal(path))


def test_large_files_are_read_as_small_ones(tmp_path, monkeypatch):
    """Above the size that is read at once, the same comes out, and a cut file is still noticed."""
    path = image_file(tmp_path / "a.dcm", ramp(3, 40, 60), BitsStored=12, HighBit=11)
    small = read_instance(path)
    monkeypatch.setattr(dicom, "_READ_WHOLE", 0)
    assert read_instance(path) == small
    np.testing.assert_array_equal(decode_frame(path, 2), ramp(3, 40, 60)[2])
    path.write_bytes(path.read_bytes()[:-100])
    assert refusal(path).code == "truncated"


def test_a_damaged_size_does_not_take_all_memory(tmp_path, monkeypatch):
    """Compressed pixels that claim to be huge are refused before a decoder makes room for them."""
    path = image_file(tmp_path / "a.dcm", ramp(4, 6))
    compressed = pydicom.dcmread(path)
    compressed.compress(RLELossless)
    compressed.Rows = compressed.Columns = 65535
    compressed.save_as(path)
    assert "more than the 1073741824 that are decoded at once" in str(refusal(path))


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


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
    assert len(list(Path("/proc/self/fd").iterdir())) == before
