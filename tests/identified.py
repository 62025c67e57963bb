"""Folders in which each of the 18 kinds of `tests.identities` stands in each place where it can: one folder a layout."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
from PIL import Image, PngImagePlugin
from pydicom.datadict import DicomDictionary
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian, MRImageStorage

from tests.identities import KINDS, Planted

SIZE = 32
RTSTRUCT, SEG, REPORT = "1.2.840.10008.5.1.4.1.1.481.3", "1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.88.11"
RING = [(8, 8), (20, 8), (20, 20), (8, 20)]
# Free text in standard attributes of images: a name, an address, a number, a comment, wherever people and programs write some.
ATTRIBUTES = (
    "AccessionNumber", "InstitutionName", "InstitutionAddress", "ReferringPhysicianName", "ReferringPhysicianAddress",
    "ReferringPhysicianTelephoneNumbers", "StationName", "StudyDescription", "SeriesDescription", "PerformingPhysicianName",
    "OperatorsName", "PatientName", "PatientBirthDate", "OtherPatientIDs", "OtherPatientNames", "PatientBirthName", "PatientAge",
    "PatientSize", "PatientAddress", "PatientMotherBirthName", "MilitaryRank", "MedicalAlerts", "PatientTelephoneNumbers", "EthnicGroup",
    "Occupation", "AdditionalPatientHistory", "PatientComments", "DeviceSerialNumber", "ProtocolName", "StudyID", "ImageComments",
    "RequestingPhysician", "RequestedProcedureDescription", "CurrentPatientLocation", "RetrieveURL", "IssuerOfPatientID",
    "DeviceUID", "StudyTime", "SeriesDate", "AcquisitionDateTime", "ContentDate", "InstanceCreatorUID", "Manufacturer",
)  # fmt: skip
# Attributes of which the catalog keeps the text as it stands there: codes, where the standard has a list of what may be said.
CODES = ("Modality", "BurnedInAnnotation", "PatientIdentityRemoved")
UIDS = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID")

# What would make an image another kind of object, or damage it.
_STRUCTURAL = {
    "SpecificCharacterSet", "SOPClassUID", "PhotometricInterpretation", "NumberOfFrames", "ModalityLUTSequence", "PixelData",
    "FloatPixelData", "DoubleFloatPixelData", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
    "ExtendedOffsetTable", "ExtendedOffsetTableLengths", "DataSetTrailingPadding",
}  # fmt: skip
_TEXTS = ("AE", "AS", "CS", "DA", "DT", "LO", "LT", "PN", "SH", "ST", "TM", "UC", "UI", "UR", "UT")


def in_path(text: str) -> str:
    """As a part of a path."""
    return text.replace("/", "_")


def letters(text: str) -> str:
    """As Sunnybrook's names have a reader."""
    return re.sub("[^A-Za-z0-9]", "", text)


@pydicom.config.disable_value_validation()  # type: ignore[untyped-decorator]
def write_dicom(folder: Path, planted: Planted) -> None:
    """18 patients: images, an RT Structure Set, a segmentation and a report each, and files that cannot be read."""
    for number, kind in enumerate(KINDS):
        at = folder / in_path(planted(kind, "folder", in_path))
        at.mkdir(parents=True)
        study = _image(kind, planted, number)
        # Written in turn for our own header reader, for pydicom, and without VRs.
        syntax = (ExplicitVRLittleEndian, ExplicitVRBigEndian, ImplicitVRLittleEndian)[number % 3]
        _save(at / f"{planted(kind, 'file name', in_path)}.dcm", study, syntax, planted, kind)
        second = _image(kind, planted, number)
        second.SOPInstanceUID = planted(kind, "SOPInstanceUID of a second image")
        second.InstanceNumber = 2
        second.ImagePositionPatient = ["0", "0", "10"]
        second.SpecificCharacterSet = "ISO_IR 100"
        second.PatientComments = planted(kind, "PatientComments in Latin-1", lambda text: f"Müller {text} grüßt")
        _save(at / "2.dcm", second, ExplicitVRLittleEndian, planted, kind)
        _save(at / "rtstruct.dcm", _structures(kind, planted, study), ExplicitVRLittleEndian, planted, kind)
        _save(at / "seg.dcm", _segments(kind, planted, study, number), ExplicitVRLittleEndian, planted, kind)
        _save(at / "report", _report(kind, planted), ExplicitVRLittleEndian, planted, kind)
        _damaged(at, kind, planted, number)
    # Two contents claim one UID; and a copy.
    first = folder / in_path(planted("name", "folder", in_path))
    twin = _image("name", planted, 77)
    _save(first / f"{planted('name', 'name of a file of the same UID', in_path)}.dcm", twin, ExplicitVRLittleEndian, planted, "name")
    (first / f"{planted('name', 'name of a copy', in_path)}.dcm").write_bytes((first / "2.dcm").read_bytes())
    (folder / planted("name", "name of a note", lambda text: f"{text}.txt")).write_text(planted("name", "a file that is left over"))
    bad = folder / planted("name", "folder with a name that is not UTF-8", in_path)
    bad.mkdir()
    (bad / "beside\udcff.dcm").write_bytes(b"")
    (folder / planted("name", "link to a folder elsewhere", in_path)).symlink_to("/usr/share")


def _image(kind: str, planted: Planted, number: int) -> Dataset:
    dataset = Dataset()
    with pydicom.config.disable_value_validation():
        dataset.SpecificCharacterSet = "ISO_IR 100" if number % 4 == 3 else "ISO_IR 192"
        dataset.SOPClassUID = MRImageStorage
        dataset.PatientID = planted(kind, "PatientID")
        for keyword in UIDS:
            setattr(dataset, keyword, planted(kind, keyword))
        dataset.StudyDate = planted(kind, "StudyDate")
        for keyword in CODES:
            setattr(dataset, keyword, planted(kind, keyword))
        for keyword in ATTRIBUTES:
            text = planted(kind, keyword)
            tag = pydicom.datadict.tag_for_keyword(keyword)
            assert tag is not None
            vr = pydicom.datadict.dictionary_VR(tag)
            # Of a VR for numbers there is none to be said but as text that breaks it.
            dataset[tag] = DataElement(tag, "LO" if vr == "DS" else vr, text)
        dataset.RequestAttributesSequence = Sequence([_nested(kind, planted, "RequestAttributesSequence")])
        dataset.ReferencedStudySequence = Sequence([_nested(kind, planted, "ReferencedStudySequence")])
        private = dataset.private_block(0x0029, planted(kind, "private creator"), create=True)
        private.add_new(0x01, "LO", planted(kind, "private LO"))
        private.add_new(0x02, "UN", planted(kind, "private UN").encode())
        private.add_new(0x03, "OB", planted(kind, "private OB").encode("utf-16-le"))
        private.add_new(0x04, "SQ", Sequence([_nested(kind, planted, "private sequence")]))
        private.add_new(0x05, "PN", planted(kind, "private PN"))
        dataset.SeriesNumber, dataset.InstanceNumber = 3, 1
        dataset.TriggerTime = "10"
        dataset.ImagePositionPatient = ["0", "0", "0"]
        dataset.ImageOrientationPatient = ["1", "0", "0", "0", "1", "0"]
        dataset.PixelSpacing = ["1", "1"]
        _pixels(dataset, number)
        dataset.add_new(0xFFFCFFFC, "OB", planted(kind, "trailing padding").encode())
    return dataset


def _pixels(dataset: Dataset, number: int) -> None:
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows = dataset.Columns = SIZE
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit, dataset.PixelRepresentation = 15, 0
    rows, columns = np.indices((SIZE, SIZE))
    bright = 400 * (np.hypot(rows - 14, columns - 14) < 7)
    noise = np.random.default_rng((5, number)).integers(0, 60, (SIZE, SIZE))
    dataset.add_new(0x7FE00010, "OW", (100 + bright + noise).astype("<u2").tobytes())


def _nested(kind: str, planted: Planted, where: str) -> Dataset:
    item = Dataset()
    item.PatientName = planted(kind, f"PatientName in {where}")
    item.TextValue = planted(kind, f"TextValue in {where}")
    item.ReferencedSOPInstanceUID = planted(kind, f"ReferencedSOPInstanceUID in {where}")
    inner = Dataset()
    inner.CodeMeaning = planted(kind, f"CodeMeaning in a sequence in {where}")
    item.ConceptNameCodeSequence = Sequence([inner])
    return item


def _structures(kind: str, planted: Planted, image: Dataset) -> Dataset:
    dataset = _object(kind, planted, RTSTRUCT, "RTSTRUCT", image)
    dataset.StructureSetLabel = planted(kind, "StructureSetLabel")
    dataset.StructureSetName = planted(kind, "StructureSetName")
    dataset.StructureSetDescription = planted(kind, "StructureSetDescription")
    referenced = Dataset()
    referenced.ReferencedSOPInstanceUID = image.SOPInstanceUID
    series = Dataset()
    series.SeriesInstanceUID = image.SeriesInstanceUID
    series.ContourImageSequence = Sequence([referenced])
    study = Dataset()
    study.ReferencedSOPInstanceUID = image.StudyInstanceUID
    study.RTReferencedSeriesSequence = Sequence([series])
    space = Dataset()
    space.FrameOfReferenceUID = image.FrameOfReferenceUID
    space.RTReferencedStudySequence = Sequence([study])
    dataset.ReferencedFrameOfReferenceSequence = Sequence([space])
    rois, drawn = [], []
    for number, (name, form) in enumerate((("ROIName", "CLOSED_PLANAR"), ("name of a ROI of points", "POINT")), start=1):
        roi = Dataset()
        roi.ROINumber, roi.ROIName = number, planted(kind, name)
        roi.ReferencedFrameOfReferenceUID = image.FrameOfReferenceUID
        roi.ROIDescription = planted(kind, "ROIDescription")
        roi.ROIGenerationAlgorithm = planted(kind, "ROIGenerationAlgorithm")
        rois.append(roi)
        contour = Dataset()
        contour.ContourGeometricType = form
        contour.NumberOfContourPoints = len(RING)
        contour.ContourData = [str(value) for x, y in RING for value in (x, y, 0)]
        # The first by its image's UID, and by its place where the image's UID says too little.
        contour.ContourImageSequence = Sequence([referenced])
        contours = Dataset()
        contours.ReferencedROINumber, contours.ContourSequence = number, Sequence([contour])
        drawn.append(contours)
    observation = Dataset()
    observation.ROIInterpreter = planted(kind, "ROIInterpreter")
    observation.ROIObservationLabel = planted(kind, "ROIObservationLabel")
    dataset.StructureSetROISequence, dataset.ROIContourSequence = Sequence(rois), Sequence(drawn)
    dataset.RTROIObservationsSequence = Sequence([observation])
    return dataset


def _segments(kind: str, planted: Planted, image: Dataset, number: int) -> Dataset:
    dataset = _object(kind, planted, SEG, "SEG", image)
    _pixels(dataset, number)
    raster = np.zeros((SIZE, SIZE), np.uint8)
    raster[9:19, 9:19] = 255
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit = 7
    dataset.add_new(0x7FE00010, "OB", raster.tobytes())
    dataset.NumberOfFrames = 1
    dataset.SegmentationType = "FRACTIONAL"
    dataset.SegmentationFractionalType = planted(kind, "SegmentationFractionalType")
    dataset.MaximumFractionalValue = 255
    dataset.ContentCreatorName = planted(kind, "ContentCreatorName")
    dataset.ContentDescription = planted(kind, "ContentDescription")
    dataset.ContentLabel = planted(kind, "ContentLabel")
    segment = Dataset()
    segment.SegmentNumber = 1
    segment.SegmentLabel = planted(kind, "SegmentLabel")
    segment.SegmentDescription = planted(kind, "SegmentDescription")
    segment.SegmentAlgorithmType = "MANUAL"
    segment.SegmentAlgorithmName = planted(kind, "SegmentAlgorithmName")
    dataset.SegmentSequence = Sequence([segment])
    source = Dataset()
    source.ReferencedSOPInstanceUID = image.SOPInstanceUID
    derivation = Dataset()
    derivation.SourceImageSequence = Sequence([source])
    derivation.DerivationDescription = planted(kind, "DerivationDescription")
    identification = Dataset()
    identification.ReferencedSegmentNumber = 1
    plane = Dataset()
    plane.ImagePositionPatient = ["0", "0", "0"]
    group = Dataset()
    group.DerivationImageSequence = Sequence([derivation])
    group.SegmentIdentificationSequence = Sequence([identification])
    group.PlanePositionSequence = Sequence([plane])
    orientation, measures, shared = Dataset(), Dataset(), Dataset()
    orientation.ImageOrientationPatient = ["1", "0", "0", "0", "1", "0"]
    measures.PixelSpacing = ["1", "1"]
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = Sequence([orientation]), Sequence([measures])
    dataset.SharedFunctionalGroupsSequence, dataset.PerFrameFunctionalGroupsSequence = Sequence([shared]), Sequence([group])
    return dataset


def _report(kind: str, planted: Planted) -> Dataset:
    dataset = _object(kind, planted, REPORT, "SR", None)
    content = Dataset()
    content.TextValue = planted(kind, "TextValue of a report")
    content.PersonName = planted(kind, "PersonName of a report")
    dataset.ContentSequence = Sequence([content])
    return dataset


def _object(kind: str, planted: Planted, sop_class: str, modality: str, image: Dataset | None) -> Dataset:
    dataset = Dataset()
    with pydicom.config.disable_value_validation():
        dataset.SOPClassUID, dataset.Modality = sop_class, modality
        dataset.PatientID, dataset.PatientName = planted(kind, "PatientID"), planted(kind, f"PatientName of {modality}")
        dataset.OperatorsName = planted(kind, f"OperatorsName of {modality}")
        dataset.SOPInstanceUID = planted(kind, f"SOPInstanceUID of {modality}")
        dataset.SeriesInstanceUID = planted(kind, f"SeriesInstanceUID of {modality}")
        dataset.StudyInstanceUID = planted(kind, "StudyInstanceUID")
        dataset.StudyDate = planted(kind, "StudyDate")
        if image is not None:
            dataset.FrameOfReferenceUID = image.FrameOfReferenceUID
            item = Dataset()
            item.ReferencedSOPInstanceUID = image.SOPInstanceUID
            series = Dataset()
            series.SeriesInstanceUID, series.ReferencedInstanceSequence = image.SeriesInstanceUID, Sequence([item])
            dataset.ReferencedSeriesSequence = Sequence([series])
    return dataset


def _damaged(folder: Path, kind: str, planted: Planted, number: int) -> None:
    """Files whose messages would say what is in them, if any did."""
    cut = _image(kind, planted, number)
    cut.SOPInstanceUID = planted(kind, "SOPInstanceUID of a damaged file")
    path = folder / f"{planted(kind, 'name of a damaged file', in_path)}.dcm"
    _save(path, cut, ExplicitVRLittleEndian, planted, kind)
    stored = path.read_bytes()
    if number % 3 == 0:
        path.write_bytes(stored[: len(stored) * 2 // 3])  # in the pixels
    elif number % 3 == 1:
        path.write_bytes(stored[:600])  # in the header
    else:
        path.write_bytes(stored.replace(b"MONOCHROME2", planted.word("PhotometricInterpretation").upper().encode().ljust(11)))
    odd = _image(kind, planted, number)
    odd.SOPInstanceUID = planted(kind, "SOPInstanceUID of a file of an unknown transfer syntax")
    _save(folder / "odd.dcm", odd, ExplicitVRLittleEndian, planted, kind, named=planted(kind, "TransferSyntaxUID"))
    other = _image(kind, planted, number)
    other.SOPInstanceUID = planted(kind, "SOPInstanceUID of a file of an unknown class")
    other.SOPClassUID = planted(kind, "SOPClassUID")
    _save(folder / "class.dcm", other, ExplicitVRLittleEndian, planted, kind)
    (folder / f"{planted(kind, 'name of a file that is no DICOM', in_path)}.dcm").write_text(planted(kind, "no DICOM"))


def _save(path: Path, dataset: Dataset, syntax: str, planted: Planted, kind: str, named: str | None = None) -> None:
    meta = FileMetaDataset()
    with pydicom.config.disable_value_validation():
        meta.MediaStorageSOPClassUID = dataset.SOPClassUID
        meta.MediaStorageSOPInstanceUID = planted(kind, "MediaStorageSOPInstanceUID")
        meta.TransferSyntaxUID = syntax
        meta.ImplementationVersionName = planted(kind, "ImplementationVersionName")
        meta.SourceApplicationEntityTitle = planted(kind, "SourceApplicationEntityTitle")
        meta.PrivateInformationCreatorUID = planted(kind, "PrivateInformationCreatorUID")
        meta.PrivateInformation = planted(kind, "PrivateInformation").encode()
        dataset.file_meta = meta
        dataset.preamble = planted(kind, "preamble").encode().ljust(128, b"\0")
        big = syntax == ExplicitVRBigEndian
        if big and dataset.get("BitsAllocated") == 16:
            dataset[0x7FE00010].value = np.frombuffer(dataset.PixelData, "<u2").astype(">u2").tobytes()
        dataset.save_as(path, implicit_vr=syntax == ImplicitVRLittleEndian, little_endian=not big, enforce_file_format=True)
    if named is not None:
        stored, was = path.read_bytes(), b"\x02\0\x10\0UI"
        at = stored.index(was) + len(was)
        length = int.from_bytes(stored[at : at + 2], "little")
        text = named.encode().ljust(len(named) + len(named) % 2, b"\0")
        # The group's length (PS3.10 7.1) counts what stands behind it.
        grown = int.from_bytes(stored[140:144], "little") + len(text) - length
        stored = (
            stored[:140] + grown.to_bytes(4, "little") + stored[144:at] + len(text).to_bytes(2, "little") + text + stored[at + 2 + length :]
        )
        path.write_bytes(stored)


def write_everything(path: Path, planted: Planted, syntax: str = ExplicitVRLittleEndian) -> dict[str, str]:
    """Write one image in which each attribute of PS3.6 that can hold a text or a number has one of its own. Returns keyword → what.

    A sequence holds an item with a text in it. Left out are those that decide what the object is, and those without a keyword.
    """
    dataset = Dataset()
    numbers = iter(range(410_007, 500_000, 7))
    said: dict[str, str] = {}
    with pydicom.config.disable_value_validation():
        dataset.SpecificCharacterSet = "ISO_IR 192"
        dataset.SOPClassUID = MRImageStorage
        _pixels(dataset, 1)
        for tag, (vr, multiplicity, _, _, keyword) in DicomDictionary.items():
            if not keyword or tag >> 16 <= 2 or keyword in _STRUCTURAL or tag in dataset or tag >> 16 >= 0x7FE0:
                continue
            if vr in _TEXTS:
                said[keyword] = planted.word(keyword)
                dataset.add_new(tag, vr, said[keyword])
            elif vr in ("DS", "IS"):
                said[keyword] = str(next(numbers))
                count = int(multiplicity) if multiplicity.isdigit() else 1
                dataset.add_new(tag, vr, [said[keyword]] * count)
            elif vr in ("OB", "UN") or vr.startswith("OB or"):
                said[keyword] = planted.word(keyword)
                dataset.add_new(tag, "OB", said[keyword].encode())
            elif vr == "SQ":
                said[keyword] = planted.word(f"in {keyword}")
                item = Dataset()
                item.TextValue = item.CodeMeaning = item.PatientName = item.ReferencedSOPInstanceUID = said[keyword]
                item.SeriesInstanceUID = item.StudyInstanceUID = said[keyword]
                dataset.add_new(tag, "SQ", Sequence([item]))
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = MRImageStorage, syntax
        meta.MediaStorageSOPInstanceUID = planted.word("MediaStorageSOPInstanceUID")
        dataset.file_meta = meta
        if syntax == ExplicitVRBigEndian:
            dataset[0x7FE00010].value = np.frombuffer(dataset.PixelData, "<u2").astype(">u2").tobytes()
        dataset.save_as(
            path, implicit_vr=syntax == ImplicitVRLittleEndian, little_endian=syntax != ExplicitVRBigEndian, enforce_file_format=True
        )
    return said


@pydicom.config.disable_value_validation()  # type: ignore[untyped-decorator]
def write_sunnybrook(folder: Path, planted: Planted) -> None:
    """18 patients as arranged for teaching: names of patients, folders and readers, and what is wrong with the table."""
    rows = [["patient_id", "original_id", "remark"]]
    for number, kind in enumerate(KINDS):
        patient = planted(kind, "Sunnybrook's patient", in_path)
        original = planted(kind, "Sunnybrook's original id", in_path)
        rows.append([patient, original, planted(kind, "a further column of link.csv")])
        images, contours = folder / "dicoms" / patient, folder / "contourfiles" / original / "i-contours"
        images.mkdir(parents=True)
        contours.mkdir(parents=True)
        image = Dataset()
        image.SOPClassUID, image.SOPInstanceUID = MRImageStorage, f"1.2.3.{number}"
        image.StudyInstanceUID, image.SeriesInstanceUID = f"1.2.3.4.{number}", f"1.2.3.4.5.{number}"
        image.PatientID = planted(kind, "PatientID beside another name of the folder")
        image.InstanceNumber = 1
        _pixels(image, 100 + number)
        _save(images / "1.dcm", image, ExplicitVRLittleEndian, planted, kind)
        reader = planted(kind, "reader in a contour's name", letters)
        (contours / f"IM-0001-0001-icontour-{reader}.txt").write_text("".join(f"{x} {y}\n" for x, y in RING))
        # A contour without an image, and one that cannot be read.
        (contours / f"IM-0001-0009-icontour-{reader}.txt").write_text("".join(f"{x} {y}\n" for x, y in RING))
        (contours / f"IM-0001-0001-ocontour-{reader}.txt").write_text(planted(kind, "in a contour"))
    for at in (0, 1):
        rows.append([planted("name", "patient without a folder"), planted("name", f"original {at} of nobody"), ""])
    with (folder / "link.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def write_table(folder: Path, planted: Planted) -> Path:
    """18 patients by a table: pictures with texts in them, painted masks and labels; and lines that are wrong. Returns the table."""
    rows = [["image", "annotation", "patient", "structure", "reader", "split", "label", planted("name", "a column of a table")]]
    for number, kind in enumerate(KINDS):
        at = folder / planted(kind, "folder of pictures", in_path)
        at.mkdir(parents=True)
        name = planted(kind, "name of a picture", in_path)
        info = PngImagePlugin.PngInfo()
        info.add_text("Author", planted(kind, "text in a picture"))
        info.add_itxt("Comment", planted(kind, "compressed text in a picture"), zip=True)
        pixels = np.random.default_rng((9, number)).integers(0, 255, (SIZE, SIZE), np.uint8)
        Image.fromarray(pixels).save(at / f"{name}.png", pnginfo=info)
        raster = np.zeros((SIZE, SIZE), np.uint8)
        raster[5:15, 5:15] = 1
        Image.fromarray(raster).save(at / f"{name} mask.png", pnginfo=info)
        person = planted(kind, "patient in a table")
        about = [planted(kind, "structure in a table"), planted(kind, "reader in a table"), planted(kind, "split in a table")]
        beside = planted(kind, "a value of a further column")
        image = f"{at.name}/{name}.png"
        rows.append([image, f"{at.name}/{name} mask.png", person, *about, "", beside])
        second = planted(kind, "name of a labelled picture", in_path)
        Image.fromarray(pixels[::-1]).save(at / f"{second}.png")
        rows.append([f"{at.name}/{second}.png", "", person, planted(kind, "structure of a label"), *about[1:], "healthy", beside])
        rows.append([planted(kind, "a path in a table that is not there"), "", person, *about, "", beside])
        rows.append([image, "", planted(kind, "another patient of one picture"), *about, "", beside])
    # The contradictions of the last lines took the others with them: one picture has several patients.
    rows = [row for row in rows if row[2] not in {planted(kind, "another patient of one picture") for kind in list(KINDS)[1:]}]
    table = folder / planted("name", "name of a table", lambda text: f"{text}.csv")
    with table.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return table


def write_pattern(folder: Path, planted: Planted) -> Path:
    """18 patients by regular expressions: all that stands in paths. Returns the file of expressions."""
    for number, kind in enumerate(KINDS):
        at = folder / planted(kind, "patient in a path", in_path) / planted(kind, "study in a path", in_path)
        at.mkdir(parents=True)
        pixels = np.random.default_rng((11, number)).integers(0, 255, (SIZE, SIZE), np.uint8)
        Image.fromarray(pixels).save(at / f"{number}.png")
        raster = np.zeros((SIZE, SIZE), np.uint8)
        raster[5:15, 5:15] = 255
        structure, reader = planted(kind, "structure in a path", in_path), planted(kind, "reader in a path", in_path)
        Image.fromarray(raster).save(at / f"{number}+{structure}+{reader}.mask.png")
    pattern = folder / "names.toml"
    pattern.write_text(
        "[[image]]\npath = '(?P<patient>[^/]+)/(?P<study>[^/]+)/(?P<number>\\d+)\\.png'\n\n[[annotation]]\n"
        "path = '(?P<patient>[^/]+)/(?P<study>[^/]+)/(?P<number>\\d+)\\+(?P<structure>[^/]+)\\+(?P<reader>[^/]+)\\.mask\\.png'\n"
    )
    return pattern


def write_nifti(folder: Path, planted: Planted) -> None:
    """18 cases as nnU-Net has them: free texts of headers, an extension, names of files and of labels."""
    (folder / "imagesTr").mkdir(parents=True)
    (folder / "labelsTr").mkdir()
    for number, kind in enumerate(KINDS):
        case = planted(kind, "case", in_path)
        for place, below in (("imagesTr", f"{case}_0000.nii"), ("labelsTr", f"{case}.nii.gz")):
            values = np.zeros((8, 8, 2), np.int16)
            values[2:6, 2:6] = number + 1 if place == "labelsTr" else 100 + number
            image = nib.Nifti1Image(values, np.eye(4))
            image.header["descrip"] = planted(kind, "descrip").encode()[:79]
            image.header["aux_file"] = planted(kind, "aux_file", lambda text: text[:23]).encode()
            image.header["intent_name"] = planted(kind, "intent_name", lambda text: text[:15]).encode()
            image.header["db_name"] = planted(kind, "db_name", lambda text: text[:17]).encode()
            image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", planted(kind, "extension").encode()))
            nib.save(image, folder / place / below)
    labels = {"background": 0} | {planted(kind, "label's name in dataset.json"): at for at, kind in enumerate(KINDS, start=1)}
    said: dict[str, Any] = {"labels": labels, "channel_names": {"0": "MR"}, "description": planted("name", "description in dataset.json")}
    (folder / "dataset.json").write_text(json.dumps(said))
