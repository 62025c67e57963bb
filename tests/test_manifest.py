"""Every DICOM file of the shared data against the manifest: values for what can be read, the right words for what cannot."""

import csv
import hashlib
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from catalog.dicom import decode_frame, decode_values, read_instance
from catalog.errors import FileError

DATA = Path(os.environ.get("SCANFEED_DATA", Path(__file__).parents[2] / "shared" / "data"))
pytestmark = pytest.mark.skipif(not (DATA / "manifest.csv").is_file(), reason=f"no manifest.csv under {DATA}; set SCANFEED_DATA")
LITTLE_ENDIAN = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1")
CT = "dicom/transfer-syntax-ctimage/CTImage.dcm"
# Without the extra `codecs` these transfer syntaxes, and two files of 12 bits in another, are told from damaged files by their code.
EXTRA_DECODERS = {"1.2.840.10008.1.2.4." + end for end in ("51", "57", "70", "80", "81", "90", "91")}

# What a radiology engineer would say of each file that gives no images, found by looking at it element by element.
REFUSED = {
    # A JPEG 2000 codestream whose size field holds FFFE,E0DD: it says that it is 3,722,445,056 px wide.
    "dicom/broken/JPEG2000-embedded-sequence-delimiter.dcm": ("unreadable", "says of itself that it is 1024×3722445056×1"),
    "dicom/broken/MR_truncated.dcm": ("truncated", "(7FE0,0010) Pixel Data has 8130 bytes where"),
    # A CT without an image, an SOP Class or an SOP Instance UID: one private sequence.
    "dicom/broken/UN_sequence.dcm": ("no-pixels", "it says that it is CT Image Storage"),
    "dicom/broken/badVR.dcm": ("unreadable", "(0028,0008) Number of Frames is not a whole number"),
    # Two elements, nothing that tells what it is.
    "dicom/broken/empty_charset_LEI.dcm": ("no-pixels", "(0008,0016) SOP Class UID too"),
    # Two bytes of Pixel Data and no element that describes them.
    "dicom/broken/meta_missing_tsyntax.dcm": ("unreadable", "(0028,0100) Bits Allocated is missing"),
    "dicom/broken/nested_priv_SQ.dcm": ("unreadable", "(0028,0100) Bits Allocated is missing"),
    # A stray byte stands before the first element, so every other is misread.
    "dicom/broken/no_meta.dcm": ("not-dicom", "neither `DICM` at byte 128 nor a DICOM element at its start"),
    # An RT image of three elements.
    "dicom/broken/no_meta_group_length.dcm": ("no-pixels", "it says that it is RT Image Storage"),
    "dicom/broken/rtplan_truncated.dcm": ("truncated", "it ends within (300A,00B0)"),
    # Of class MR, with two elements more.
    "dicom/charset/chrSQEncoding.dcm": ("no-pixels", "it says that it is MR Image Storage"),
    # An index of the files beside it: neither an image nor damaged.
    "dicom/dicomdir-tree/DICOMDIR": ("dicomdir", "an index of the files beside it"),
    # Its scan header breaks the JPEG standard; what is installed decodes neither this nor the two retired processes below.
    "dicom/pydicom/JPEG-lossy.dcm": ("unreadable", "cannot be decoded as JPEG Extended (Process 2 and 4)"),
    CT + "_JPEGProcess10_12TransferSyntax_1.2.840.10008.1.2.4.55.dcm": ("no-decoder", "which pydicom cannot decode"),
    CT + "_JPEGProcess6_8TransferSyntax_1.2.840.10008.1.2.4.53.dcm": ("no-decoder", "which pydicom cannot decode"),
}
# Objects without pixels, whole: instances without images, those without meta information too.
WITHOUT_PIXELS = {
    "dicom/broken/ExplVR_BigEndNoMeta.dcm": "RTPLAN",
    "dicom/broken/ExplVR_LitEndNoMeta.dcm": "RTPLAN",
    "dicom/pydicom/test-SR.dcm": "SR",
    "dicom/pydicom/waveform_ecg.dcm": "ECG",
    "rtstruct/pydicom-rtstruct-no-preamble.dcm": "RTSTRUCT",
    "rtstruct/rt-utils/invalid_reference_rt.dcm": "RTSTRUCT",
    "rtstruct/rt-utils/rt.dcm": "RTSTRUCT",
}


def manifest():
    """The rows of all 730 files."""
    with (DATA / "manifest.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def pixels(path, instance):
    """The stored values of all frames as the catalog's readers get them: by offset where there is a dtype, else decoded."""
    frames = []
    for frame in instance.frames:
        shape = (frame.rows, frame.columns) if frame.samples_per_pixel == 1 else (frame.rows, frame.columns, frame.samples_per_pixel)
        if frame.dtype is None:
            frames.append(decode_frame(path, frame.frame))
        else:
            with path.open("rb") as file:
                raw = os.pread(file.fileno(), frame.length, frame.offset)
            frames.append(np.frombuffer(raw, frame.dtype).reshape(shape))
    return frames


def test_every_readable_file_has_the_values_of_the_manifest(capsys):
    """Shape, dtype, smallest, largest and hash of all pixels, and the identifiers, are the manifest's, through the catalog's own reader.

    A frame's own hash is that of its values, with and without the fast path; the share of uncompressed little-endian files that take
    it is printed, and what does not take it is named here.
    """
    rows = [row for row in manifest() if row["kind"] == "dicom" and row["decode"] == "ok"]
    read = fast = little_endian = 0
    slow = set()
    for row in rows:
        path = DATA / row["path"]
        try:
            instance = read_instance(path)
        except FileError as error:
            assert error.code == "no-decoder", (row["path"], str(error))
            assert row["ts"] in EXTRA_DECODERS, row["path"]
            continue
        read += 1
        assert (instance.patient_id, instance.study_instance_uid) == (row["patient"], row["study"]), row["path"]
        assert (instance.series_instance_uid, instance.sop_instance_uid) == (row["series"], row["sop"]), row["path"]
        assert (instance.transfer_syntax_uid, instance.modality) == (row["ts"], row["modality"]), row["path"]
        assert instance.number_of_frames == len(instance.frames) == int(row["frames"] or 1), row["path"]
        frames = pixels(path, instance)
        whole = np.stack(frames) if row["frames"] not in ("", "1") else frames[0]
        assert "x".join(map(str, whole.shape)) == row["shape"], row["path"]
        assert whole.dtype == np.dtype(row["dtype"]).newbyteorder("="), row["path"]
        assert (float(whole.min()), float(whole.max())) == (float(row["min"]), float(row["max"])), row["path"]
        little = whole.astype(whole.dtype.newbyteorder("<"))
        assert hashlib.sha256(little.tobytes()).hexdigest()[:16] == row["pixsha"], row["path"]
        for frame, values in zip(instance.frames, frames, strict=True):
            assert (frame.rows, frame.columns, frame.photometric) == (int(row["rows"]), int(row["cols"]), row["photo"]), row["path"]
            assert frame.bits_stored == int(row["bits"].partition("/")[0]), row["path"]
            assert frame.pixel_hash == hashlib.sha256(values.astype(values.dtype.newbyteorder("<")).tobytes()).digest(), row["path"]
        by_offset = all(frame.dtype is not None for frame in instance.frames)
        if by_offset:
            decoded = decode_frame(path, len(frames) - 1)
            np.testing.assert_array_equal(frames[-1], decoded, err_msg=row["path"])
            assert frames[-1].dtype == decoded.dtype
        if instance.transfer_syntax_uid in LITTLE_ENDIAN:
            little_endian += 1
            fast += by_offset
            if not by_offset:
                slow.add(row["path"])
    with capsys.disabled():
        sys.stdout.write(
            f"\n{read} of {len(rows)} readable DICOM files have the manifest's values; "
            f"{fast} of {little_endian} uncompressed little-endian files ({fast / little_endian:.1%}) are read by offset\n"
        )
    # Single bits and halved colour are no array in the file; every other is.
    assert slow == {
        "dicom/pydicom/SC_ybr_full_422_uncompressed.dcm",
        "dicom/pydicom/liver_1frame.dcm",
        "seg/dcmqi-24x38x3/seg/label.seg",
        "seg/highdicom-ct/seg_image_ct_binary.dcm",
        "seg/highdicom-ct/seg_image_ct_binary_overlap.dcm",
        "seg/highdicom-ct/seg_image_ct_binary_single_frame.dcm",
    }


def test_every_other_file_is_an_instance_without_images_or_says_what_is_wrong():
    """Each DICOM file that pydicom does not decode is in one of the two tables above, with its code and words, and in no other way."""
    others = {row["path"]: row for row in manifest() if row["kind"] == "dicom" and row["decode"] != "ok"}
    assert set(others) == set(REFUSED) | set(WITHOUT_PIXELS)
    for path, (code, words) in REFUSED.items():
        for read in (read_instance, lambda path: decode_values(path, 0)):
            with pytest.raises(FileError) as caught:
                read(DATA / path)
            if caught.value.code == "no-decoder" and others[path]["ts"] in EXTRA_DECODERS:
                continue  # the extra is not installed
            assert (path, caught.value.code) == (path, code)
            assert words in str(caught.value), path
    for path, modality in WITHOUT_PIXELS.items():
        instance, row = read_instance(DATA / path), others[path]
        assert (instance.number_of_frames, instance.frames, instance.modality) == (0, (), modality), path
        assert (instance.study_instance_uid, instance.sop_instance_uid) == (row["study"], row["sop"]), path
        assert instance.sop_class_uid, path


def test_files_that_are_no_dicom_are_told_from_it():
    """Contours, volumes, digits and the rest give `not-dicom`, so a tree of everything is read without an error for them."""
    for row in manifest():
        if row["kind"] != "dicom":
            with pytest.raises(FileError) as caught:
                read_instance(DATA / row["path"])
            assert (row["path"], caught.value.code) == (row["path"], "not-dicom")


def test_without_hashing_every_file_says_the_same():
    """`hash_pixels=False` differs in the hash alone: the same rows, offsets and codes, but for damage that only a decoder sees."""
    for row in manifest():
        if row["kind"] != "dicom":
            continue
        try:
            expected = read_instance(DATA / row["path"])
        except FileError as error:
            if REFUSED.get(row["path"], ("", ""))[0] == "unreadable" and row["ts"].startswith("1.2.840.10008.1.2.4"):
                read_instance(DATA / row["path"], hash_pixels=False)
                continue
            if error.code == "no-decoder" and row["ts"] in EXTRA_DECODERS:
                continue
            with pytest.raises(FileError) as caught:
                read_instance(DATA / row["path"], hash_pixels=False)
            assert (row["path"], caught.value.code, str(caught.value)) == (row["path"], error.code, str(error))
            continue
        expected = replace(expected, frames=tuple(replace(frame, pixel_hash=None) for frame in expected.frames))
        assert read_instance(DATA / row["path"], hash_pixels=False) == expected, row["path"]


def test_encodings_of_one_image_have_one_hash():
    """The ten lossless encodings of the CT and the five of the enhanced MR are each one image in several files; lossy ones are not."""
    rows = [row for row in manifest() if row["path"].startswith(("dicom/transfer-syntax-ctimage/", "dicom/multiframe/emri_small"))]
    hashes: dict[str, set[tuple[bytes | None, ...]]] = {}
    files: dict[str, int] = {}
    for row in rows:
        if row["decode"] != "ok":
            continue
        try:
            instance = read_instance(DATA / row["path"])
        except FileError as error:
            assert error.code == "no-decoder"
            pytest.skip("needs the extra `codecs`")
        hashes.setdefault(instance.sop_instance_uid, set()).add(tuple(frame.pixel_hash for frame in instance.frames))
        files[instance.sop_instance_uid] = files.get(instance.sop_instance_uid, 0) + 1
    assert sorted(files.values()) == [1, 1, 1, 1, 5, 10], files
    assert all(len(found) == 1 for found in hashes.values())
    assert len({found for every in hashes.values() for found in every}) == len(hashes)


def test_values_of_lossy_encodings_are_near_the_original():
    """After the modality transform a lossy encoding of the CT differs by what its compression lost, whatever its own rescale is."""
    original = decode_values(DATA / CT, 0)
    assert (original.dtype, original.shape) == (np.float64, (512, 512))
    for name, most in (
        ("JPEGProcess1TransferSyntax_1.2.840.10008.1.2.4.50", 64.3),
        ("JPEGProcess2_4TransferSyntax_1.2.840.10008.1.2.4.51", 35.7),
        ("JPEG2000TransferSyntax_1.2.840.10008.1.2.4.91", 5),
        ("JPEGLSLossyTransferSyntax_1.2.840.10008.1.2.4.81", 1),
    ):
        try:
            values = decode_values(DATA / f"{CT}_{name}.dcm", 0)
        except FileError as error:
            assert error.code == "no-decoder"
            continue
        assert np.abs(values - original).max() <= most + 0.05, name
