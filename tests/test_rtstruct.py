"""RTSTRUCT: each ROI on each image is one polygon in mm of the patient, and no bytes give anything but that or a FileError."""

import json
import os
import resource
import struct
import sys
import time
import zlib
from collections import Counter
from dataclasses import asdict
from functools import reduce
from pathlib import Path

import numpy as np
import pydicom
import pytest
import shapely
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian
from shapely import Polygon

from catalog import contours, geometry, pixels, rtstruct
from catalog.errors import FileError
from catalog.rtstruct import read_annotations

DATA = Path(os.environ.get("SCANFEED_DATA", Path(__file__).parents[2] / "shared" / "data"))
needs_data = pytest.mark.skipif(not (DATA / "rtstruct").is_dir(), reason=f"no rtstruct under {DATA}; set SCANFEED_DATA")
CLASS = "1.2.840.10008.5.1.4.1.1.481.3"
SECRET = "Zbigniew-4711"
SQUARE = [(0, 0), (10, 0), (10, 8), (0, 8)]
HOLE = [(2, 2), (5, 2), (5, 5), (2, 5)]
SYNTAXES = [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian]


def made(**elements):
    """A dataset of these elements, valid or not, without those that are None."""
    dataset = Dataset()
    with pydicom.config.disable_value_validation():
        for name, value in elements.items():
            if value is not None:
                setattr(dataset, name, Sequence(value) if isinstance(value, list) and name.endswith("Sequence") else value)
    return dataset


def contour(points, *images, kind="CLOSED_PLANAR", **elements):
    """A contour of (x, y, z) points on images, each a UID or (UID, frame numbers from 1)."""
    references = [
        made(ReferencedSOPClassUID="1.2", ReferencedSOPInstanceUID=image)
        if isinstance(image, str)
        else made(ReferencedSOPClassUID="1.2", ReferencedSOPInstanceUID=image[0], ReferencedFrameNumber=image[1])
        for image in images
    ]
    numbers = [f"{float(value):.10g}" for point in points for value in point]
    elements = {"ContourGeometricType": kind, "NumberOfContourPoints": len(points), "ContourData": numbers, **elements}
    return made(ContourImageSequence=references or None, **elements)


def flat(points, z=0.0):
    return [(x, y, z) for x, y in points]


def structures(rois, *, described=None, series=(("1.9", "1.9.1", ("1.9.1.1", "1.9.1.2")),), **elements):
    """An RTSTRUCT of ROIs: number → its contours. `described` gives the items of Structure Set ROI Sequence, else one each."""
    if described is None:
        described = [
            made(ROINumber=number, ReferencedFrameOfReferenceUID="1.8", ROIName=f"roi {number}", ROIGenerationAlgorithm="MANUAL")
            for number in rois
        ]
    studies = [
        made(
            ReferencedSOPInstanceUID=study,
            RTReferencedSeriesSequence=[
                made(SeriesInstanceUID=uid, ContourImageSequence=[made(ReferencedSOPInstanceUID=image) for image in images])
            ],
        )
        for study, uid, images in series
    ]
    elements = {
        "SOPClassUID": CLASS,
        "SOPInstanceUID": "1.7",
        "Modality": "RTSTRUCT",
        "OperatorsName": SECRET,
        "PatientID": SECRET,
        "PatientName": SECRET,
        "StructureSetLabel": "planning",
        "ReferencedFrameOfReferenceSequence": [made(FrameOfReferenceUID="1.8", RTReferencedStudySequence=studies)],
        "StructureSetROISequence": described,
        "ROIContourSequence": [made(ReferencedROINumber=number, ContourSequence=drawn) for number, drawn in rois.items()],
        "RTROIObservationsSequence": [made(ObservationNumber=1, ROIInterpreter=SECRET)],
        **elements,
    }
    return made(**elements)


def written(path, dataset, syntax=ImplicitVRLittleEndian):
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.MediaStorageSOPClassUID, dataset.file_meta.MediaStorageSOPInstanceUID = CLASS, "1.7"
    dataset.file_meta.TransferSyntaxUID = syntax
    with pydicom.config.disable_value_validation():
        dataset.save_as(path, implicit_vr=syntax.is_implicit_VR, little_endian=syntax.is_little_endian, enforce_file_format=True)
    return path


def rings(drawn):
    assert drawn.polygon is not None
    assert (drawn.kind, drawn.convention, drawn.segment, drawn.label) == ("polygon", "patient", None, None)
    return contours.unflatten(drawn.polygon.points, drawn.polygon.rings, 3)


def refusal(path):
    with pytest.raises(FileError) as caught:
        read_annotations(path, {})
    assert "\n" not in str(caught.value)
    assert SECRET not in str(caught.value)
    assert str(path) not in str(caught.value)
    return caught.value


@needs_data
@pytest.mark.filterwarnings("ignore")
def test_real_contours_lie_where_rt_utils_has_them(capsys):
    """Points in pixels agree with rt_utils' own to 0.001 px; masks with shapely pixel by pixel, holes included, and in area to 1 %."""
    helper = pytest.importorskip("rt_utils.image_helper")
    folder = DATA / "rtstruct" / "rt-utils"
    series = helper.load_sorted_image_series(str(folder))
    matrix = helper.get_patient_to_pixel_transformation_matrix(series)
    images = {str(image.SOPInstanceUID): image for image in series}
    compared, areas = 0, []
    for name in ("rt.dcm", "invalid_reference_rt.dcm"):
        for drawn in read_annotations(folder / name, {}):
            image = images.get(drawn.refers_to["sop_instance_uid"])
            if image is None:
                continue
            shapes, in_pixels = [], []
            for ring in rings(drawn):
                points, off = geometry.to_pixels(ring, image.ImagePositionPatient, image.ImageOrientationPatient, image.PixelSpacing)
                theirs = helper.apply_transformation_to_3d_points(ring, matrix)
                np.testing.assert_allclose(points, theirs[:, :2], atol=1e-3)
                np.testing.assert_allclose(off, 0.0, atol=1e-6)
                shapes.append(Polygon(points).buffer(0))
                in_pixels.append(points)
                compared += len(points)
            mask = contours.rasterise(in_pixels, image.Rows, image.Columns, convention="centre")
            row, column = np.indices(mask.shape)
            inside = [shapely.contains_xy(shape, column.ravel(), row.ravel()).reshape(mask.shape) for shape in shapes]
            np.testing.assert_array_equal(mask, np.logical_xor.reduce(inside), err_msg=drawn.source_key)
            areas.append((int(mask.sum()), reduce(lambda one, other: one.symmetric_difference(other), shapes).area))
    assert compared > 1_000
    counted, enclosed = map(sum, zip(*areas, strict=True))
    assert abs(counted - enclosed) < 0.01 * enclosed
    # A rectangle of 49.15 pixels has 49 columns of centres, and with its hole that adds up to 2.1 %; drawn outlines do better.
    assert max(abs(count / area - 1) for count, area in areas) < 0.025
    with capsys.disabled():
        sys.stdout.write(f"\n{compared} points; masks {counted} px for {enclosed:.1f} px²: " + ", ".join(f"{c / a:.4f}" for c, a in areas))


@needs_data
def test_a_hole_of_the_real_file_is_a_hole():
    """rt.dcm's two contours, one inside the other on the same image, are one annotation of two rings."""
    (drawn,) = read_annotations(DATA / "rtstruct" / "rt-utils" / "rt.dcm", {})
    assert [len(ring) for ring in rings(drawn)] == [4, 8]
    assert (drawn.structure, drawn.reader) == ("ROI-1", "RTstruct (MANUAL)")


@needs_data
def test_references_to_images_that_are_not_there_are_kept():
    """Of the four ROIs on three slices, each is there, also on the slice whose image is missing; the order is the file's."""
    folder = DATA / "rtstruct" / "rt-utils"
    here = {pydicom.dcmread(folder / name, stop_before_pixels=True).SOPInstanceUID for name in ("ct_1.dcm", "ct_2.dcm")}
    drawn = read_annotations(folder / "invalid_reference_rt.dcm", {})
    truth = pydicom.dcmread(folder / "invalid_reference_rt.dcm")
    expected = [
        (int(roi.ReferencedROINumber), str(one.ContourImageSequence[0].ReferencedSOPInstanceUID), [float(x) for x in one.ContourData])
        for roi in truth.ROIContourSequence
        for one in roi.ContourSequence
    ]
    assert len(drawn) == len(expected) == 12
    assert sum(one.refers_to["sop_instance_uid"] not in here for one in drawn) == 4
    found = [(one.refers_to["roi_number"], one.refers_to["sop_instance_uid"], one.polygon.points) for one in drawn]
    assert found == expected
    assert len({one.source_key for one in drawn}) == 12


@needs_data
def test_without_image_references_there_is_a_plane_for_each_height():
    """pydicom's file without preamble names no image: three planes of ROI 1, and two points that are left out, with a line each."""
    left_out = []
    drawn = read_annotations(DATA / "rtstruct" / "pydicom-rtstruct-no-preamble.dcm", {}, left_out)
    assert [one.source_key for one in drawn] == [f"1/plane 0.00,0.00,1.00 at {z}.00" for z in (-200, -190, -180)]
    assert [one.refers_to["plane"]["position"][2] for one in drawn] == [-200.0, -190.0, -180.0]
    assert all("sop_instance_uid" not in one.refers_to for one in drawn)
    assert left_out == [f"ROI {number}: contours that enclose no area are left out: 1 of type POINT" for number in (2, 3)]


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_what_is_drawn_on_one_image_is_one_annotation(tmp_path, syntax):
    """Outline and hole are two rings of one polygon in the order of the file; another image, another ROI is another annotation."""
    rois = {
        7: [
            contour(flat(SQUARE, 3), "1.9.1.1"),
            contour(flat(SQUARE, 6), "1.9.1.2"),
            contour(flat(HOLE, 3), "1.9.1.1", kind="CLOSEDPLANAR_XOR"),
        ],
        2: [contour(flat(HOLE, 3), "1.9.1.1")],
    }
    drawn = read_annotations(written(tmp_path / "a.dcm", structures(rois), syntax), {})
    assert [one.source_key for one in drawn] == ["7/1.9.1.1", "7/1.9.1.2", "2/1.9.1.1"]
    assert [[ring.tolist() for ring in rings(one)] for one in drawn] == [
        [[list(p) for p in flat(SQUARE, 3)], [list(p) for p in flat(HOLE, 3)]],
        [[list(p) for p in flat(SQUARE, 6)]],
        [[list(p) for p in flat(HOLE, 3)]],
    ]
    assert drawn[0].refers_to == {
        "roi_number": 7,
        "sop_instance_uid": "1.9.1.1",
        "plane": {
            "position": [0.0, 0.0, 3.0],
            "orientation": None,
            "normal": [0.0, 0.0, 1.0],
            "frame_of_reference_uid": "1.8",
            "series_instance_uid": "1.9.1",
            "study_instance_uid": "1.9",
        },
    }
    assert (drawn[0].structure, drawn[0].reader) == ("roi 7", "planning (MANUAL)")
    mask = contours.rasterise([ring[:, :2] for ring in rings(drawn[0])], 12, 12, convention="centre")
    assert mask.sum() == 80 - 9


def test_frames_and_several_images(tmp_path):
    """A frame number counts from 1 in the file and from 0 here; a contour on several images or frames is drawn on each, once."""
    rois = {1: [contour(flat(SQUARE), ("1.5", 3), ("1.5", [4, 5]), "1.6", "1.6")]}
    drawn = read_annotations(written(tmp_path / "a.dcm", structures(rois)), {})
    found = [(one.refers_to["sop_instance_uid"], one.refers_to.get("frame"), one.source_key, one.polygon.rings) for one in drawn]
    assert found == [("1.5", 2, "1/1.5/2", [4]), ("1.5", 3, "1/1.5/3", [4]), ("1.5", 4, "1/1.5/4", [4]), ("1.6", None, "1/1.6", [4])]


@pytest.mark.parametrize(
    ("label", "algorithm", "reader"),
    [("A", "MANUAL", "A (MANUAL)"), ("", "AUTOMATIC", "AUTOMATIC"), ("A", "", "A"), (None, None, "")],
)
def test_reader_and_names(tmp_path, label, algorithm, reader):
    """The reader says whose set it is and how it was made, never a person; a ROI without name is called by its number."""
    described = [made(ROINumber=1, ROIName="", ROIGenerationAlgorithm=algorithm)]
    dataset = structures({1: [contour(flat(SQUARE), "1.5")]}, described=described, StructureSetLabel=label)
    (drawn,) = read_annotations(written(tmp_path / "a.dcm", dataset), {})
    assert (drawn.reader, drawn.structure) == (reader, "ROI 1")
    assert SECRET not in json.dumps(asdict(drawn), default=str)


def test_names_are_read_in_their_character_set(tmp_path):
    """A ROI's name in UTF-8 or Latin-1 is that name."""
    for charset in ("ISO_IR 192", "ISO_IR 100"):
        dataset = structures({1: [contour(flat(SQUARE), "1.5")]}, SpecificCharacterSet=charset)
        dataset.StructureSetROISequence[0].ROIName = "Übergang"
        (drawn,) = read_annotations(written(tmp_path / "a.dcm", dataset), {})
        assert drawn.structure == "Übergang"


def test_places_are_given_where_there_is_just_one(tmp_path):
    """Of several series the one with the image is named; without an image none of them is guessed."""
    series = (("1.9", "1.9.1", ("1.9.1.1",)), ("1.9", "1.9.2", ("1.9.2.1",)))
    rois = {1: [contour(flat(SQUARE), "1.9.2.1"), contour(flat(SQUARE, 9))]}
    on_image, in_space = read_annotations(written(tmp_path / "a.dcm", structures(rois, series=series)), {})
    assert on_image.refers_to["plane"]["series_instance_uid"] == "1.9.2"
    assert (in_space.refers_to["plane"]["series_instance_uid"], in_space.refers_to["plane"]["study_instance_uid"]) == ("", "1.9")


@given(st.floats(-3, 3), st.floats(-3, 3), st.floats(0.5, 5), st.integers(1, 6), st.randoms(use_true_random=False))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_oblique_contours_without_images_are_put_together_by_plane(tmp_path, first, second, distance, count, shuffled):
    """With coordinates of two decimals, each plane's outline has its own hole, whatever the angle, the order and the distance."""
    row = np.array([np.cos(first), np.sin(first), 0])
    column = np.array([-np.sin(first) * np.cos(second), np.cos(first) * np.cos(second), np.sin(second)])
    drawn_on = []
    for at in range(count):
        origin = np.array([100.0, -250.0, 30.0]) + at * distance * np.cross(row, column)
        for shape in (SQUARE, HOLE):
            points = geometry.to_patient(5.0 * np.array(shape), origin, [*row, *column], [1, 1])
            drawn_on.append((at, contour(np.round(points, 2).tolist()), len(points)))
    shuffled.shuffle(drawn_on)
    drawn = read_annotations(written(tmp_path / "a.dcm", structures({1: [one for _, one, _ in drawn_on]})), {})
    assert [one.polygon.rings for one in drawn] == [[4, 4]] * count
    assert len({one.source_key for one in drawn}) == count
    for one in drawn:
        assert geometry.plane(np.concatenate(rings(one)))[2] < 0.05
        assert abs(np.array(one.refers_to["plane"]["normal"]) @ np.cross(row, column)) > 0.9999


def test_planes_of_three_directions_and_points_without_any(tmp_path):
    """Axial, sagittal and coronal contours of one ROI stay apart; a single point, which has no plane, is by itself."""
    axial = [contour(flat(SQUARE, 1)), contour(flat(HOLE, 1)), contour(flat(SQUARE, 1.5))]
    sagittal = [contour([(1, x, y) for x, y in SQUARE]), contour([(1.0, x, y) for x, y in HOLE])]
    coronal = [contour([(x, 1, y) for x, y in SQUARE])]
    drawn = read_annotations(written(tmp_path / "a.dcm", structures({1: [*sagittal, *axial, *coronal, contour([(7, 6, 5)])]})), {})
    assert {one.source_key: one.polygon.rings for one in drawn} == {
        "1/plane 0.00,0.00,1.00 at 1.00": [4, 4],
        "1/plane 0.00,0.00,1.00 at 1.50": [4],
        "1/plane 1.00,0.00,0.00 at 1.00": [4, 4],
        "1/plane 0.00,1.00,0.00 at 1.00": [4],
        "1/point 7.00,6.00,5.00": [1],
    }
    assert {one.source_key: one.refers_to["plane"]["normal"] for one in drawn}["1/point 7.00,6.00,5.00"] is None


def test_a_new_version_keeps_the_keys(tmp_path):
    """Another outline, another ROI before it, another name: what was drawn of a ROI on an image keeps its key."""
    old = structures({5: [contour(flat(SQUARE), "1.5"), contour(flat(SQUARE, 4))]})
    new = structures({1: [contour(flat(HOLE), "1.5")], 5: [contour(flat(HOLE, 4)), contour(flat(HOLE), "1.5")]}, StructureSetLabel="new")
    keys = {one.source_key for one in read_annotations(written(tmp_path / "a.dcm", old), {})}
    assert keys < {one.source_key for one in read_annotations(written(tmp_path / "b.dcm", new), {})}


def test_what_encloses_no_area_is_left_out_and_said(tmp_path):
    """Points, open lines, types that nobody knows and contours without points give no annotation, and one line a ROI."""
    others = [contour(flat(SQUARE), "1.5", kind=kind) for kind in ("POINT", "OPEN_PLANAR", "OPEN_NONPLANAR", "OPEN_PLANAR", SECRET[:8], "")]
    rois = {1: [*others, contour(flat(SQUARE), "1.5")], 3: [contour([], "1.5", ContourData=None, NumberOfContourPoints=0)], 4: []}
    left_out = []
    path = written(tmp_path / "a.dcm", structures(rois))
    (drawn,) = read_annotations(path, {}, left_out)
    assert drawn.refers_to["roi_number"] == 1
    assert left_out == [
        "ROI 1: contours that enclose no area are left out: "
        "1 of type OPEN_NONPLANAR, 2 of type OPEN_PLANAR, 1 of type POINT, 2 of type unknown",
        "ROI 3: contours that enclose no area are left out: 1 of type closed, without points",
    ]
    assert read_annotations(path, {}) == [drawn]


BEFORE = contour(flat(HOLE), "1.5")
WRONG = {
    "count": (contour(flat(SQUARE), "1.5", NumberOfContourPoints=5), "contour-unreadable", "has 12 numbers for 5 points"),
    "triplets": (contour(flat(SQUARE), ContourData=["1"] * 11, NumberOfContourPoints=None), "contour-unreadable", "11 numbers"),
    "missing": (contour(flat(SQUARE), ContourData=None), "contour-unreadable", "has 0 numbers for 4 points"),
    "nan": (contour([(0, 0, float("nan")), (1, 0, 0), (1, 1, 0)]), "contour-unreadable", "beyond 1000000 mm"),
    "infinite": (contour([(0, 0, 0), (1, float("inf"), 0), (1, 1, 0)]), "contour-unreadable", "beyond 1000000 mm"),
    "far": (contour([(0, 0, 0), (1e7, 0, 0), (1, 1, 0)]), "contour-unreadable", "beyond 1000000 mm"),
    "solid": (contour([(0, 0, 0), (9, 0, 0), (9, 9, 5), (0, 9, 0)]), "contour-unreadable", "mm off a plane"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_contour_that_is_none_refuses_the_file(tmp_path, wrong):
    """An outline without its hole would be a wrong mask, so one bad contour is one error that says which it is."""
    bad, code, words = WRONG[wrong]
    error = refusal(written(tmp_path / "a.dcm", structures({1: [BEFORE, bad]})))
    assert error.code == code
    assert words in str(error)
    assert str(error).startswith("ROI 1, contour 2: ")


@pytest.mark.parametrize("number", [b"1_000.", b"0x10  ", b"1,5   ", b"      ", b"1e3e4 "])
def test_only_numbers_are_numbers(tmp_path, number):
    """What Python would take for a number and DICOM would not is refused."""
    path = written(tmp_path / "a.dcm", structures({1: [contour([(123.456, 0, 0), (1, 0, 0), (1, 1, 0)])]}))
    data = path.read_bytes()
    assert data.count(b"123.456") == 1
    path.write_bytes(data.replace(b"123.456", number + b" "))
    error = refusal(path)
    assert error.code == "contour-unreadable"
    assert "is not all numbers" in str(error)


@pytest.mark.parametrize(
    ("dataset", "code", "words"),
    [
        (structures({1: []}, SOPClassUID="1.2.840.10008.5.1.4.1.1.2"), "not-rtstruct", "is not RT Structure Set Storage"),
        (structures({1: []}, ROIContourSequence=None), "unreadable", "(3006,0039) ROI Contour Sequence is missing"),
        (structures({1: []}, StructureSetROISequence=None), "unreadable", "(3006,0020) Structure Set ROI Sequence is missing"),
        (structures({1: []}, described=[made(ROINumber=1), made(ROINumber=1)]), "unreadable", "(3006,0022) ROI Number stands twice"),
        (structures({None: [BEFORE]}, described=[]), "unreadable", "(3006,0084) Referenced ROI Number is missing"),
        (structures({1: [contour(flat(SQUARE), ("1.5", 0))]}), "unreadable", "(0008,1160) Referenced Frame Number"),
        (structures({1: [contour(flat(SQUARE), "1." + "5" * 2000)]}), "unreadable", "2002 characters"),
    ],
)
def test_an_object_that_contradicts_itself_is_refused(tmp_path, dataset, code, words):
    """What leaves open whose contours they are, or where, is a FileError that names the element."""
    error = refusal(written(tmp_path / "a.dcm", dataset))
    assert error.code == code
    assert words in str(error)


def test_a_roi_twice_is_refused(tmp_path):
    """Contours of one ROI in two items could be versions of each other: by even-odd they would cancel."""
    dataset = structures({1: [BEFORE]})
    dataset.ROIContourSequence.append(dataset.ROIContourSequence[0])
    assert "has ROI 1 twice" in str(refusal(written(tmp_path / "a.dcm", dataset)))


def test_other_files_are_refused(tmp_path):
    """What is no DICOM, an image, nothing or not there has its code."""
    path = tmp_path / "a.dcm"
    for content in (b"", b"x", b"1.5 2.0\n" * 40):
        path.write_bytes(content)
        assert refusal(path).code == "not-dicom"
    assert refusal(tmp_path).code == "unreadable"
    assert refusal(tmp_path / "absent").code == "unreadable"


def test_references_cannot_multiply_points_without_limit(tmp_path, monkeypatch):
    """A contour's points stand once in the file and once for each image it refers to: their sum has a limit."""
    monkeypatch.setattr(rtstruct, "MOST_POINTS", 20_000)
    many = [contour([(x, x * x / 1e4, 0) for x in range(500)], *[f"1.{at}" for at in range(41)])]
    path = written(tmp_path / "a.dcm", structures({1: many}))
    assert "over 20000 points" in str(refusal(path))
    monkeypatch.setattr(rtstruct, "MOST_POINTS", 20_500)
    assert len(read_annotations(path, {})) == 41


def test_zeros_behind_the_end_are_no_elements(tmp_path):
    """Padding, or a small deflated file that becomes very many zeros, costs nothing."""
    path = written(tmp_path / "a.dcm", structures({1: [BEFORE]}))
    whole = read_annotations(path, {})
    with path.open("ab") as file:
        file.write(bytes(100_000_000))
    begun = time.process_time()
    assert read_annotations(path, {}) == whole
    assert time.process_time() - begun < 2


def test_a_deflated_file_inflates_to_a_limit(tmp_path, monkeypatch):
    """A small file that would inflate to something huge is refused before it does."""
    monkeypatch.setattr(pixels, "MOST_BYTES", 1 << 24)
    path = written(tmp_path / "a.dcm", structures({1: [BEFORE]}), DeflatedExplicitVRLittleEndian)
    deflater = zlib.compressobj(9, wbits=-15)
    head = path.read_bytes()
    head = head[: 144 + struct.unpack("<L", head[140:144])[0]]
    path.write_bytes(head + deflater.compress(bytes(1 << 26)) + deflater.flush())
    assert path.stat().st_size < 100_000
    assert "it inflates to more than" in str(refusal(path))


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_a_file_cut_anywhere_is_refused_or_whole(tmp_path, syntax):
    """Cut off after any byte a file gives a FileError, or all that was drawn where only what comes after it is gone: never a part."""
    rois = {1: [contour(flat(SQUARE), "1.5"), contour(flat(HOLE), "1.5")], 2: [contour(flat(SQUARE), "1.6")]}
    path = written(tmp_path / "a.dcm", structures(rois), syntax)
    whole = read_annotations(path, {})
    data = path.read_bytes()
    refused = 0
    for length in range(len(data)):
        path.write_bytes(data[:length])
        try:
            assert read_annotations(path, {}) == whole, length
        except FileError as error:
            refused += 1
            assert SECRET not in str(error)
    assert refused > 0.8 * len(data)


def test_undefined_lengths_cut_anywhere_are_refused_or_whole(tmp_path):
    """Sequences without a length, which pydicom drops with a warning when they are cut off, are noticed too."""
    dataset = structures({1: [contour(flat(SQUARE), "1.5"), contour(flat(HOLE), "1.5")]})

    def undefine(inside):
        for element in inside:
            if element.VR == "SQ":
                element.is_undefined_length = True
                for item in element.value:
                    item.is_undefined_length_sequence_item = True
                    undefine(item)

    undefine(dataset)
    path = written(tmp_path / "a.dcm", dataset)
    whole = read_annotations(path, {})
    data = path.read_bytes()
    assert data.count(b"\xfe\xff\xdd\xe0") > 5
    codes = Counter()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        try:
            assert read_annotations(path, {}) == whole, length
        except FileError as error:
            codes[error.code] += 1
    assert codes["truncated"] > 0.3 * len(data)


def test_a_contour_lost_within_a_damaged_sequence_refuses_the_file(tmp_path):
    """A reference whose end is damaged swallows the contour behind it: the outline is not taken without its hole."""
    dataset = structures({1: [contour(flat(SQUARE), "1.5"), contour(flat(HOLE), "1.5")]})
    for one in dataset.ROIContourSequence[0].ContourSequence:
        one["ContourImageSequence"].is_undefined_length = True
    path = written(tmp_path / "a.dcm", dataset)
    (drawn,) = read_annotations(path, {})
    assert drawn.polygon.rings == [4, 4]
    head, end, tail = path.read_bytes().rpartition(b"\xfe\xff\xdd\xe0")
    path.write_bytes(head + b"\xfe\xff\x00\xe0" + tail)
    assert end
    assert "(3006,0040) Contour Sequence cannot be parsed" in str(refusal(path))


def mutants(seeds, count, seed):
    """Yield files with bytes set, spans doubled, cut out or overwritten by tags, lengths and delimiters."""
    random = np.random.default_rng(seed)
    pieces = [
        b"\xff\xff\xff\xff",
        b"\xfe\xff\x00\xe0",
        b"\xfe\xff\x0d\xe0",
        b"\xfe\xff\xdd\xe0",
        b"\x06\x30\x50\x00",
        b"SQ",
        b"UN",
        b"\\\\",
    ]
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
    """Read mutants of files in all encodings; only FileErrors come out, and what is read is what a polygon may be."""
    rois = {
        1: [contour(flat(SQUARE), "1.5"), contour(flat(HOLE, 9))],
        2: [contour(flat(SQUARE), ("1.6", 2)), contour([(1, 1, 1)], kind="POINT")],
    }
    seeds = [written(folder / "seed.dcm", structures(rois), syntax).read_bytes() for syntax in SYNTAXES]
    path = folder / "mutant.dcm"
    read = 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for data in mutants(seeds, count, seed):
        path.write_bytes(data)
        try:
            for drawn in read_annotations(path, {}):
                assert np.isfinite(np.concatenate(rings(drawn))).all()
            read += 1
        except FileError as error:
            assert "\n" not in str(error)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB
    return read


def test_damaged_files_give_annotations_or_a_file_error(tmp_path):
    """2,000 mutants: no other exception, no warning, no large memory."""
    assert survive(tmp_path, 2_000, 1) > 100


@pytest.mark.soak
def test_damaged_files_give_annotations_or_a_file_error_100000_times(tmp_path):
    """The same with 100,000."""
    assert survive(tmp_path, 100_000, 2) > 5_000
