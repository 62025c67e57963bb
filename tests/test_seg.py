"""DICOM SEG: masks equal highdicom's bit for bit, each frame says where it belongs, and no bytes give anything but that or a FileError."""

import gzip
import os
import resource
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless

from catalog import contours, seg
from catalog.errors import FileError, UsageError
from catalog.seg import read_annotations

DATA = Path(os.environ.get("SCANFEED_DATA", Path(__file__).parents[2] / "shared" / "data"))
needs_data = pytest.mark.skipif(not (DATA / "seg").is_dir(), reason=f"no seg under {DATA}; set SCANFEED_DATA")
SEGMENTATION, LABEL_MAP = "1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7"
SECRET = "Zbigniew-4711"
SYNTAXES = [ImplicitVRLittleEndian, ExplicitVRLittleEndian, DeflatedExplicitVRLittleEndian]
HIGHDICOM = ["binary", "binary_overlap", "binary_single_frame", "true_fractional"]


def made(**elements):
    """A dataset of these elements, valid or not, without those that are None."""
    dataset = Dataset()
    with pydicom.config.disable_value_validation():
        for name, value in elements.items():
            if value is not None:
                setattr(dataset, name, Sequence(value) if isinstance(value, list) and name.endswith("Sequence") else value)
    return dataset


def group(*, segment=1, position=(0, 0, 0), sources=("1.5",), preserved=None, frames=None):
    """Functional groups of one frame."""
    source = [made(ReferencedSOPInstanceUID=uid, ReferencedFrameNumber=frames, SpatialLocationsPreserved=preserved) for uid in sources]
    return made(
        DerivationImageSequence=[made(SourceImageSequence=source)] if sources else None,
        PlanePositionSequence=None if position is None else [made(ImagePositionPatient=list(map(str, position)))],
        SegmentIdentificationSequence=None if segment is None else [made(ReferencedSegmentNumber=segment)],
    )


def segmentation(frames, groups=None, *, kind="BINARY", segments=(1, 2, 3), **elements):
    """A SEG of stored values (frames, rows, columns): bits of a binary one run on across frames, the first in the lowest place."""
    frames = np.asarray(frames)
    bits = elements.pop("bits", {"BINARY": 1, "FRACTIONAL": 8, "LABELMAP": 8 * frames.dtype.itemsize}[kind])
    if bits == 1:
        stored = np.packbits(frames.astype(bool).ravel(), bitorder="little").tobytes()
    else:
        stored = frames.astype(f"<u{bits // 8}").tobytes()
    described = [
        made(SegmentNumber=number, SegmentLabel=f"label {number}", SegmentAlgorithmType="MANUAL", SegmentAlgorithmName=None)
        for number in segments
    ]
    shared = made(
        PlaneOrientationSequence=[made(ImageOrientationPatient=["1", "0", "0", "0", "1", "0"])],
        PixelMeasuresSequence=[made(PixelSpacing=["0.5", "0.25"])],
    )
    if groups is None:
        groups = [group(segment=None if kind == "LABELMAP" else 1, position=(0, 0, at)) for at in range(len(frames))]
    elements = {
        "SOPClassUID": LABEL_MAP if kind == "LABELMAP" else SEGMENTATION,
        "SOPInstanceUID": "1.7",
        "PatientID": SECRET,
        "PatientName": SECRET,
        "ContentCreatorName": SECRET,
        "StudyInstanceUID": "1.3",
        "FrameOfReferenceUID": "1.8",
        "SegmentationType": kind,
        "SegmentSequence": described,
        "ReferencedSeriesSequence": [
            made(SeriesInstanceUID="1.4", ReferencedInstanceSequence=[made(ReferencedSOPInstanceUID="1.5")]),
        ],
        "SharedFunctionalGroupsSequence": [shared],
        "PerFrameFunctionalGroupsSequence": groups,
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "NumberOfFrames": len(frames),
        "Rows": frames.shape[1],
        "Columns": frames.shape[2],
        "BitsAllocated": bits,
        "BitsStored": bits,
        "HighBit": bits - 1,
        "PixelRepresentation": 0,
        "MaximumFractionalValue": 255 if kind == "FRACTIONAL" else None,
        "SegmentationFractionalType": "PROBABILITY" if kind == "FRACTIONAL" else None,
        "PixelData": stored + b"\0" * (len(stored) % 2),
        **elements,
    }
    dataset = made(**elements)
    if "PixelData" in dataset:
        dataset["PixelData"].VR = "OW" if bits == 16 else "OB"
    return dataset


def written(path, dataset, syntax=ExplicitVRLittleEndian):
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.MediaStorageSOPClassUID, dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPClassUID, "1.7"
    dataset.file_meta.TransferSyntaxUID = syntax
    with pydicom.config.disable_value_validation():
        if syntax == RLELossless:
            dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
            dataset.set_original_encoding(False, True)
            dataset.compress(RLELossless, encoding_plugin="pydicom", generate_instance_uid=False)  # gdcm's encoder aborts on some
        dataset.save_as(path, implicit_vr=syntax.is_implicit_VR, little_endian=syntax.is_little_endian, enforce_file_format=True)
    return path


def raster(drawn):
    assert drawn.segment is not None
    assert (drawn.kind, drawn.polygon, drawn.convention, drawn.label) == ("segment", None, None, None)
    return contours.unboxed(drawn.segment.rows, drawn.segment.columns, drawn.segment.box, drawn.segment.bits)


def refusal(path, **options):
    with pytest.raises(FileError) as caught:
        read_annotations(path, options)
    assert "\n" not in str(caught.value)
    assert SECRET not in str(caught.value)
    assert str(path) not in str(caught.value)
    return caught.value


def theirs(path, drawn, threshold=0.5):
    """What highdicom has for the segment of an annotation on the image that it names, by its own reading."""
    highdicom = pytest.importorskip("highdicom")
    opened = highdicom.seg.segread(path)
    number = drawn.refers_to["segment_number"]
    combine = opened.SegmentationType == "LABELMAP"  # highdicom 0.28.2 loses numbers over 255 where it takes labels apart
    found = opened.get_pixels_by_source_instance(
        [drawn.refers_to["sop_instance_uid"]],
        segment_numbers=None if combine else [number],
        combine_segments=combine,
        ignore_spatial_locations=True,
        assert_missing_frames_are_empty=True,
        skip_overlap_checks=True,
    )
    if combine:
        return found[0] == number
    found = found[0, :, :, 0]
    return found >= threshold if found.dtype.kind == "f" else found.astype(bool)


@needs_data
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", [f"highdicom-ct/seg_image_ct_{name}.dcm" for name in HIGHDICOM] + ["dcmqi-24x38x3/seg/label.seg"])
def test_real_masks_equal_highdicoms(path):
    """Every frame of every real file is highdicom's bit for bit, and there are as many as frames in the file."""
    file = DATA / "seg" / path
    drawn = read_annotations(file, {})
    truth = pydicom.dcmread(file)
    assert len(drawn) == len({one.source_key for one in drawn}) == int(truth.NumberOfFrames)
    for one in drawn:
        np.testing.assert_array_equal(raster(one), theirs(file, one))
    assert any(raster(one).any() for one in drawn)


@needs_data
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("threshold", [0.01, 0.3, 128 / 255, 129 / 255, 1.0])
def test_a_fraction_belongs_from_the_threshold_on(threshold):
    """A threshold that is asked for is kept with the annotation; a pixel just at it belongs to the mask."""
    file = DATA / "seg" / "highdicom-ct" / "seg_image_ct_true_fractional.dcm"
    stored = pydicom.dcmread(file).pixel_array
    drawn = read_annotations(file, {"threshold": threshold})
    for one, values in zip(drawn, stored, strict=True):
        np.testing.assert_array_equal(raster(one), values / 255 >= threshold)
        np.testing.assert_array_equal(raster(one), theirs(file, one, np.float32(threshold)))
        assert (one.refers_to["threshold"], one.refers_to["fractional_type"]) == (threshold, "PROBABILITY")
    assert sum(raster(one).sum() for one in drawn) == (0 if threshold > 128 / 255 else np.count_nonzero(stored / 255 >= threshold))


@needs_data
def test_dcmqi_frames_are_the_nrrd_labels():
    """The NRRD that dcmqi's SEG was made from has the same pixels slice by slice; slices without any are kept as empty masks."""
    folder = DATA / "seg" / "dcmqi-24x38x3"
    header, _, data = (folder / "nrrd" / "label.nrrd").read_bytes().partition(b"\n\n")
    fields = dict(line.split(": ", 1) for line in header.decode().splitlines() if ": " in line)
    columns, rows, slices = map(int, fields["sizes"].split())
    assert (fields["type"], fields["endian"], fields["encoding"]) == ("short", "little", "gzip")
    labels = np.frombuffer(gzip.decompress(data), "<i2").reshape(slices, rows, columns)
    drawn = read_annotations(folder / "seg" / "label.seg", {})
    np.testing.assert_array_equal([raster(one) for one in drawn], labels == 1)
    assert [int(raster(one).sum()) for one in drawn] == [int(layer.sum()) for layer in labels]
    assert {(one.structure, one.reader) for one in drawn} == {("Liver", "SlicerEditor")}
    origin = np.array(eval(fields["space origin"]))
    assert abs(origin - drawn[0].refers_to["plane"]["position"]).max() < 1e-3


@needs_data
def test_real_frames_name_images_of_the_same_plane():
    """Where a frame names its image, the image lies in the frame's plane, of the same size and place, for all files with sources here."""
    checked = 0
    for segs, images in (("dcmqi-24x38x3/seg", "dcmqi-24x38x3/image"), ("highdicom-ct", "highdicom-ct/source-CT2")):
        sources = {}
        for path in (DATA / "seg" / images).iterdir():
            image = pydicom.dcmread(path)
            sources[image.SOPInstanceUID] = image
        for path in (DATA / "seg" / segs).glob("*[rel]*.[ds]*"):
            if path.name == "ct_image.dcm":
                continue
            for one in read_annotations(path, {}):
                image = sources.get(one.refers_to["sop_instance_uid"])
                if image is None:
                    continue
                plane = one.refers_to["plane"]
                np.testing.assert_allclose(plane["position"], image.ImagePositionPatient, atol=1e-4)
                np.testing.assert_allclose(plane["orientation"], image.ImageOrientationPatient, atol=1e-6)
                np.testing.assert_allclose(plane["spacing"], image.PixelSpacing, atol=1e-6)
                assert (plane["rows"], plane["columns"]) == (image.Rows, image.Columns)
                assert plane["series_instance_uid"] == image.SeriesInstanceUID
                assert plane["study_instance_uid"] == image.StudyInstanceUID
                assert plane["frame_of_reference_uid"] == image.FrameOfReferenceUID
                checked += 1
    assert checked == 3 + 3 + 8 + 3


@pytest.mark.filterwarnings("ignore")
@needs_data
@pytest.mark.parametrize("syntax", [*SYNTAXES[:2], RLELossless])
def test_label_maps_equal_highdicoms(tmp_path, syntax):
    """A label map that highdicom wrote, its numbers with gaps, has highdicom's mask for each label in a frame, none for background."""
    highdicom = pytest.importorskip("highdicom")
    codes = pydicom.sr.codedict.codes
    images = [pydicom.dcmread(path) for path in sorted((DATA / "seg" / "highdicom-ct" / "source-CT2").iterdir())]
    labels = np.zeros((4, 16, 16), np.uint16)
    labels[1, 2:9, 3:7], labels[1, 10:12], labels[2, 0, 0], labels[3, 5:, 5:] = 2, 300, 300, 7
    described = [
        highdicom.seg.SegmentDescription(number, f"label {number}", codes.SCT.Tissue, codes.SCT.Bone, "MANUAL") for number in (2, 7, 300)
    ]
    made_by = highdicom.seg.Segmentation(
        images, labels, "LABELMAP", described, "1.2.1", 1, "1.2.2", 1, "m", "n", "1", "d", transfer_syntax_uid=syntax
    )
    path = tmp_path / "a.dcm"
    made_by.save_as(path)
    drawn = read_annotations(path, {})
    order = {image.SOPInstanceUID: at for at, image in enumerate(images)}
    found = {(order[one.refers_to["sop_instance_uid"]], one.structure) for one in drawn}
    assert found == {(1, "label 2"), (1, "label 300"), (2, "label 300"), (3, "label 7")}
    for one in drawn:
        at = order[one.refers_to["sop_instance_uid"]]
        np.testing.assert_array_equal(raster(one), labels[at] == one.refers_to["segment_number"])
        np.testing.assert_array_equal(raster(one), theirs(path, one))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(arrays.arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 13), st.integers(1, 13))), st.sampled_from(SYNTAXES))
def test_bits_run_on_across_frames(tmp_path, frames, syntax):
    """Whatever the size of a frame, and wherever within a byte it begins, its pixels are those that were packed."""
    drawn = read_annotations(written(tmp_path / "a.dcm", segmentation(frames), syntax), {})
    np.testing.assert_array_equal([raster(one) for one in drawn], frames)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    st.sampled_from([np.uint8, np.uint16]).flatmap(
        lambda dtype: arrays.arrays(dtype, st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)), elements=st.integers(0, 3))
    ),
    st.sampled_from([*SYNTAXES, RLELossless, ExplicitVRBigEndian]),
    st.sampled_from([None, 0, 2]),
)
def test_a_label_map_has_a_mask_for_each_label_in_a_frame(tmp_path, frames, syntax, padding):
    """Each value but that of the background is a segment, in every encoding; a frame's masks share no pixel and cover the rest."""
    dataset = segmentation(frames, kind="LABELMAP", PixelPaddingValue=padding, segments=(1, 2, 3) if padding != 2 else (0, 1, 3))
    if syntax == ExplicitVRBigEndian and frames.dtype == np.uint16:
        dataset.PixelData = frames.astype(">u2").tobytes()
    drawn = read_annotations(written(tmp_path / "a.dcm", dataset, syntax), {})
    background = padding or 0
    assert len(drawn) == sum(len(set(np.unique(frame)) - {background}) for frame in frames)
    covered = np.zeros(frames.shape, int)
    for one in drawn:
        at = int(one.refers_to["plane"]["position"][2])
        np.testing.assert_array_equal(raster(one), frames[at] == one.refers_to["segment_number"])
        covered[at] += raster(one)
    np.testing.assert_array_equal(covered, frames != background)


@pytest.mark.parametrize("syntax", [*SYNTAXES, RLELossless])
def test_fractions_in_every_encoding(tmp_path, syntax):
    """A share of exactly the threshold belongs, also where a product would be rounded up: 0.07 × 100."""
    frames = np.array([[[0, 6, 7, 8, 49], [50, 51, 99, 100, 7]]], np.uint8)
    path = written(tmp_path / "a.dcm", segmentation(frames, kind="FRACTIONAL", MaximumFractionalValue=100), syntax)
    for threshold, least in ((0.07, 7), (0.5, 50), (1.0, 100)):
        (drawn,) = read_annotations(path, {"threshold": threshold})
        np.testing.assert_array_equal(raster(drawn), frames[0] >= least)
    for threshold in (0, -1, 1.1, "0.5", None, float("nan")):
        with pytest.raises(UsageError):
            read_annotations(path, {"threshold": threshold})


def test_what_a_frame_refers_to(tmp_path):
    """One source image counts, its frames from 0; several, or one on another grid, leave the plane, which is always there."""
    groups = [
        group(sources=["1.5"]),
        group(sources=["1.6"], frames=3, position=(0, 0, 1)),
        group(sources=["1.5", "1.6"], position=(0, 0, 2)),
        group(sources=["1.5"], frames=[1, 2], position=(0, 0, 3)),
        group(sources=["1.5"], preserved="REORIENTED_ONLY", position=(0, 0, 4)),
        group(sources=["1.5", "1.5"], preserved="YES", position=(0, 0, 5)),
        group(sources=[], position=None),
    ]
    drawn = read_annotations(written(tmp_path / "a.dcm", segmentation(np.ones((7, 2, 3)), groups)), {})
    assert [(one.refers_to.get("sop_instance_uid"), one.refers_to.get("frame")) for one in drawn] == [
        ("1.5", None), ("1.6", 2), (None, None), (None, None), (None, None), ("1.5", None), (None, None),
    ]  # fmt: skip
    assert drawn[1].refers_to == {
        "segment_number": 1,
        "sop_instance_uid": "1.6",
        "frame": 2,
        "plane": {
            "position": [0.0, 0.0, 1.0],
            "orientation": [1.0, 0.0, 0.0, 0.0, 1.0, 0.0],
            "frame_of_reference_uid": "1.8",
            "series_instance_uid": "1.4",
            "study_instance_uid": "1.3",
            "spacing": [0.5, 0.25],
            "rows": 2,
            "columns": 3,
        },
    }
    assert "plane" not in drawn[6].refers_to
    assert [one.source_key for one in drawn] == [
        "1/1.5/0.00,0.00,0.00", "1/1.6/2", "1//0.00,0.00,2.00", "1//0.00,0.00,3.00", "1//0.00,0.00,4.00", "1/1.5/0.00,0.00,5.00",
        "1/frame 6",
    ]  # fmt: skip


def test_keys_are_different_and_stay(tmp_path):
    """Two frames of one segment in one place have two keys; a new version with more frames leaves a key where it was."""
    groups = [group(), group(segment=2), group(), group(segment=2, position=(0, 0, -0.001))]
    keys = [one.source_key for one in read_annotations(written(tmp_path / "a.dcm", segmentation(np.ones((4, 2, 3)), groups)), {})]
    assert keys == ["1/1.5/0.00,0.00,0.00", "2/1.5/0.00,0.00,0.00", "1/1.5/0.00,0.00,0.00/frame 2", "2/1.5/0.00,0.00,0.00/frame 3"]
    more = [group(position=(0, 0, 9)), group(segment=2)]
    later = [one.source_key for one in read_annotations(written(tmp_path / "a.dcm", segmentation(np.zeros((2, 2, 3)), more)), {})]
    assert later == ["1/1.5/0.00,0.00,9.00", keys[1]]


def test_names(tmp_path):
    """A segment is called by its label, else by its property's meaning, else by its number; the reader is the algorithm, no person."""
    bone = [made(CodeMeaning="Bone")]
    described = [
        made(SegmentNumber=1, SegmentLabel=" a ", SegmentAlgorithmType="AUTOMATIC", SegmentAlgorithmName="net 3"),
        made(SegmentNumber=2, SegmentLabel="", SegmentAlgorithmType="MANUAL", SegmentedPropertyTypeCodeSequence=bone),
        made(SegmentNumber=3),
    ]
    groups = [group(segment=number) for number in (1, 2, 3)]
    drawn = read_annotations(written(tmp_path / "a.dcm", segmentation(np.ones((3, 2, 2)), groups, SegmentSequence=described)), {})
    assert [(one.structure, one.reader) for one in drawn] == [("a", "net 3"), ("Bone", "MANUAL"), ("segment 3", "")]
    assert SECRET not in repr(drawn)


def test_an_empty_frame_is_an_annotation(tmp_path):
    """A frame without a pixel says that there is nothing, and is kept; two segments may have the same pixels."""
    frames = np.zeros((3, 4, 5))
    frames[1:, 1, 1] = 1
    groups = [group(), group(position=(0, 0, 1)), group(segment=2, position=(0, 0, 1))]
    drawn = read_annotations(written(tmp_path / "a.dcm", segmentation(frames, groups)), {})
    assert [(one.segment.rows, one.segment.columns, one.segment.box) for one in drawn] == [
        (4, 5, (0, 0, 0, 0)), (4, 5, (1, 1, 1, 1)), (4, 5, (1, 1, 1, 1)),
    ]  # fmt: skip


def test_binary_by_the_byte(tmp_path):
    """Binary masks with a byte a pixel, as some write them, are read where all are 0 or 1, and refused where not."""
    frames = np.array([[[0, 1], [1, 1]]])
    (drawn,) = read_annotations(written(tmp_path / "a.dcm", segmentation(frames, bits=8)), {})
    np.testing.assert_array_equal(raster(drawn), frames[0] == 1)
    assert "a pixel of frame 1 is above 1" in str(refusal(written(tmp_path / "a.dcm", segmentation(frames * 255, bits=8))))


ONE = np.ones((2, 3, 5), np.uint8)
REFUSED = {
    "image": (segmentation(ONE, SOPClassUID="1.2.840.10008.5.1.4.1.1.2"), "not-seg", "is not Segmentation Storage or Label Map"),
    "tiled full": (segmentation(ONE, DimensionOrganizationType="TILED_FULL"), "seg-tiled", "tiled"),
    "tiled sparse": (segmentation(ONE, DimensionOrganizationType="TILED_SPARSE"), "seg-tiled", "tiled"),
    "matrix": (segmentation(ONE, TotalPixelMatrixColumns=50), "seg-tiled", "tiled"),
    "type": (segmentation(ONE, SegmentationType="OTHER"), "unreadable", "(0062,0001) Segmentation Type and (0028,0100) Bits Allocated"),
    "bits": (segmentation(ONE, kind="FRACTIONAL", bits=16), "unreadable", "(0062,0001) Segmentation Type and (0028,0100) Bits Allocated"),
    "groups": (segmentation(ONE, [group()]), "unreadable", "(5200,9230) Per-Frame Functional Groups Sequence has 1 items for 2 frames"),
    "frames": (segmentation(ONE, NumberOfFrames=2**31 - 1), "unreadable", "(0028,0008) Number of Frames is 2147483647"),
    "rows": (segmentation(ONE, Rows=6_000, Columns=6_000), "truncated", "(7FE0,0010) Pixel Data has"),
    "too large": (segmentation(ONE, Rows=10_000, Columns=10_000, PixelData=bytes(25_000_000)), "unreadable", "over 67108864 pixels"),
    "pixels": (segmentation(ONE, PixelData=None), "no-pixels", "(7FE0,0010) Pixel Data is missing"),
    "no segment": (segmentation(ONE, [group(), group(segment=None)]), "unreadable", "(0062,000B) Referenced Segment Number of frame 2"),
    "unknown": (segmentation(ONE, [group(), group(segment=9)]), "unreadable", "does not have segment 9 of frame 2"),
    "label": (segmentation(ONE * 9, kind="LABELMAP"), "unreadable", "does not have segment 9 of frame 1"),
    "padding": (segmentation(ONE * 0, kind="LABELMAP", PixelPaddingValue=5), "unreadable", "does not have segment 0 of frame 1"),
    "twice": (segmentation(ONE, segments=(1, 1)), "unreadable", "(0062,0004) Segment Number is missing or stands twice"),
    "maximum": (segmentation(ONE, kind="FRACTIONAL", MaximumFractionalValue=None), "unreadable", "(0062,000E) Maximum Fractional Value is"),
    "above": (segmentation(ONE * 9, kind="FRACTIONAL", MaximumFractionalValue=8), "unreadable", "a pixel of frame 1 is above 8"),
    "signed": (segmentation(ONE, kind="LABELMAP", PixelRepresentation=1), "unreadable", "signed"),
    "source": (segmentation(ONE, [group(), group(frames=0)]), "unreadable", "(0008,1160) Referenced Frame Number"),
}


@pytest.mark.parametrize("wrong", REFUSED)
def test_an_object_that_contradicts_itself_is_refused(tmp_path, wrong):
    """Each way in which a mask or its segment is not certain is a FileError that names the element."""
    dataset, code, words = REFUSED[wrong]
    error = refusal(written(tmp_path / "a.dcm", dataset))
    assert error.code == code, str(error)
    assert words in str(error)


def test_single_bits_in_big_endian_are_refused(tmp_path):
    """No such file can be by the standard, and its bits could lie in either order."""
    assert refusal(written(tmp_path / "a.dcm", segmentation(ONE), ExplicitVRBigEndian)).code == "no-decoder"


def test_other_files_are_refused(tmp_path):
    """What is no DICOM, nothing or not there has its code."""
    path = tmp_path / "a.dcm"
    for content in (b"", b"x", b"1.5 2.0\n" * 40):
        path.write_bytes(content)
        assert refusal(path).code == "not-dicom"
    assert refusal(tmp_path).code == "unreadable"
    assert refusal(tmp_path / "absent").code == "unreadable"


def test_masks_have_a_limit(tmp_path, monkeypatch):
    """A frame of a label map becomes as many rasters as it has labels: both their work and what is kept are limited."""
    path = written(tmp_path / "a.dcm", segmentation(np.arange(64, dtype=np.uint8).reshape(1, 8, 8), kind="LABELMAP", segments=range(1, 64)))
    assert len(read_annotations(path, {})) == 63
    for name, limit in (("MOST_RASTER_PIXELS", 63 * 64 - 1), ("MOST_KEPT", 62)):
        with monkeypatch.context() as patched:
            patched.setattr(seg, name, limit)
            assert "its masks are over" in str(refusal(path))


@pytest.mark.parametrize("syntax", [*SYNTAXES, RLELossless])
def test_a_file_cut_anywhere_is_refused_or_whole(tmp_path, syntax):
    """Cut off after any byte a file gives a FileError, or all masks where only padding is gone."""
    kind = "LABELMAP" if syntax == RLELossless else "BINARY"
    path = written(tmp_path / "a.dcm", segmentation(ONE, kind=kind), syntax)
    whole = read_annotations(path, {})
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        try:
            assert read_annotations(path, {}) == whole, length
            assert length > len(data) - 12
        except FileError as error:
            assert SECRET not in str(error)


def mutants(seeds, count, seed):
    """Yield files with bytes set, spans doubled, cut out or overwritten by tags, lengths and delimiters."""
    random = np.random.default_rng(seed)
    pieces = [b"\xff\xff\xff\xff", b"\xfe\xff\x00\xe0", b"\xfe\xff\x0d\xe0", b"\xfe\xff\xdd\xe0", b"\xe0\x7f\x10\x00", b"SQ", b"UN", b"OB"]
    pieces += [struct.pack("<L", length) for length in (0, 1, 0x7FFFFFFF, 0xFFFFFFFE)]
    for at in range(count):
        data = bytearray(seeds[at % len(seeds)])
        for _ in range(int(random.integers(1, 5))):
            where = int(random.integers(128, len(data)))
            kind = random.integers(5)
            if kind < 2:
                data[where] = random.integers(256)
            elif kind == 2:
                piece = pieces[random.integers(len(pieces))]
                data[where : where + len(piece)] = piece
            elif kind == 3:
                del data[where : where + int(random.integers(1, 40))]
            else:
                data[where:where] = data[where : where + int(random.integers(1, 40))]
        yield bytes(data)


def survive(folder, count, seed):
    """Read mutants in all encodings; only FileErrors come out, none takes long or much memory, and rasters are whole."""
    kinds = [("BINARY", syntax) for syntax in SYNTAXES] + [
        ("FRACTIONAL", RLELossless),
        ("LABELMAP", RLELossless),
        ("LABELMAP", SYNTAXES[0]),
    ]
    seeds = [written(folder / "seed.dcm", segmentation(ONE, kind=kind), syntax).read_bytes() for kind, syntax in kinds]
    path = folder / "mutant.dcm"
    read, slowest = 0, 0.0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for data in mutants(seeds, count, seed):
        path.write_bytes(data)
        begun = time.process_time()
        try:
            for drawn in read_annotations(path, {}):
                assert raster(drawn).shape == (drawn.segment.rows, drawn.segment.columns)
            read += 1
        except FileError as error:
            assert "\n" not in str(error)
        slowest = max(slowest, time.process_time() - begun)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB
    assert slowest < 10
    return read


def test_damaged_files_give_annotations_or_a_file_error(tmp_path):
    """2,000 mutants: no other exception, no warning, no large memory."""
    assert survive(tmp_path, 2_000, 1) > 100


@pytest.mark.soak
def test_damaged_files_give_annotations_or_a_file_error_100000_times(tmp_path):
    """The same with 100,000."""
    assert survive(tmp_path, 100_000, 2) > 5_000


def test_a_small_file_cannot_become_large(tmp_path):
    """A run-length frame that claims 8,192×8,192, and a deflated file of nothing but zeros, are refused within a second of computing."""
    path = written(tmp_path / "a.dcm", segmentation(ONE, kind="LABELMAP"), RLELossless)
    data = bytearray(path.read_bytes())
    for tag in (b"\x28\0\x10\0US\x02\0", b"\x28\0\x11\0US\x02\0"):
        at = data.index(tag) + 8
        data[at : at + 2] = struct.pack("<H", 8192)
    begun = time.process_time()
    path.write_bytes(data)
    assert refusal(path).code in ("truncated", "unreadable")
    head = written(path, segmentation(ONE), DeflatedExplicitVRLittleEndian).read_bytes()
    head = head[: 144 + struct.unpack("<L", head[140:144])[0]]
    deflater = zlib.compressobj(9, wbits=-15)
    path.write_bytes(head + deflater.compress(bytes(1 << 26)) + deflater.flush())
    assert "there are zeros where its elements should be" in str(refusal(path))
    assert time.process_time() - begun < 5
