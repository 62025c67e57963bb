"""The Sunnybrook data under its original names: the series is not in a contour's name, so what is not certain is proposed."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom import dcmread

from catalog import synthetic
from catalog.layouts import Found, Tree, sunnybrook

TABLE = "PatientID,OriginalID,Gender,Age\nSCD0000101,SC-HF-I-01,Female,63\nSCD0000201,SC-HF-NI-03,Male,60\n"
CONTOURS = "contours-manual/IRCCI-expert"


def touch(folder: Path, *paths: str) -> None:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """Two patients: the first has its images in a short-axis series and a few in a long-axis one, the second in one series."""
    touch(
        tmp_path,
        *(f"SCD_IMAGES_01/SCD0000101/CINESAX_300/IM-0003-{n:04d}.dcm" for n in range(1, 61)),
        *(f"SCD_IMAGES_01/SCD0000101/CINELAX_301/IM-0004-{n:04d}.dcm" for n in range(1, 21)),
        *(f"SCD_IMAGES_02/SCD0000201/CINESAX_300/IM-0005-{n:04d}.dcm" for n in range(1, 61)),
        f"SC-HF-I-01/{CONTOURS}/IM-0001-0048-icontour-manual.txt",
        f"SC-HF-I-01/{CONTOURS}/IM-0001-0048-ocontour-manual.txt",
        f"SC-HF-I-01/{CONTOURS}/IM-0001-0048-p1contour-manual.txt",
        f"SC-HF-I-01/{CONTOURS}/IM-0001-0048-p2contour-manual.txt",
        f"SC-HF-I-01/{CONTOURS}/IM-0001-0008-icontour-manual.txt",
        f"SC-HF-NI-03/{CONTOURS}/IM-0001-0008-icontour-manual.txt",
        f"SC-HF-NI-03/{CONTOURS}/IM-0001-0099-icontour-manual.txt",
    )
    (tmp_path / "scd_patientdata.csv").write_text(TABLE)
    return tmp_path


def read(folder: Path) -> Found:
    return sunnybrook.read(Tree(folder), {})


def candidates(found: Found) -> dict[str, list[str]]:
    """Return for each contour, by folder, number and kind, the images that it may belong to."""
    said = {}
    for drawn in found.annotations:
        folder, *_, name = drawn.entry.path.split("/")
        said[f"{folder} {name[8:-11]}"] = [path.removeprefix("SCD_IMAGES_0") for path in drawn.candidates]
    return said


def test_original_names(published: Path) -> None:
    """Contours of a number that one series has are paired; of one that two series have, both images are proposed; none is invented."""
    found = read(published)
    sax = "1/SCD0000101/CINESAX_300/IM-0003-0048.dcm"
    assert candidates(found) == {
        "SC-HF-I-01 0048-icontour": [sax],
        "SC-HF-I-01 0048-ocontour": [sax],
        "SC-HF-I-01 0048-p1contour": [sax],
        "SC-HF-I-01 0048-p2contour": [sax],
        "SC-HF-I-01 0008-icontour": ["1/SCD0000101/CINELAX_301/IM-0004-0008.dcm", "1/SCD0000101/CINESAX_300/IM-0003-0008.dcm"],
        "SC-HF-NI-03 0008-icontour": ["2/SCD0000201/CINESAX_300/IM-0005-0008.dcm"],
        "SC-HF-NI-03 0099-icontour": [],
    }
    assert {drawn.structure for drawn in found.annotations} == {"inner", "outer", "papillary1", "papillary2"}
    assert {drawn.reader for drawn in found.annotations} == {"IRCCI-expert"}
    assert [drawn.unpaired for drawn in found.annotations if not drawn.candidates] == ["no image file of this patient has number 99"]
    # InstanceNumbers of another series say nothing about the file that is missing.
    assert all(drawn.folder is None for drawn in found.annotations)
    assert (len(found.images), found.left_over, found.problems) == (140, 0, [])
    assert {(image.patient, image.sure) for image in found.images} == {("SCD0000101", True), ("SCD0000201", True)}
    assert found.originals == {"SCD0000101": "SC-HF-I-01", "SCD0000201": "SC-HF-NI-03"}


def test_without_a_table_nothing_is_paired(published: Path) -> None:
    """Which patient a contour's folder is of stands in the table alone: without it, or with two, every contour is unpaired and says why."""
    (published / "more").mkdir()
    (published / "more" / "SCD_PatientData.csv").write_text(TABLE)
    found = read(published)
    assert {problem.code for problem in found.problems} == {"link-ambiguous"}
    for drawn in found.annotations:
        assert (drawn.candidates, drawn.folder, drawn.unpaired) == ((), None, "there are several scd_patientdata.csv; keep one")
    (published / "more" / "SCD_PatientData.csv").unlink()
    (published / "scd_patientdata.csv").unlink()
    found = read(published)
    assert (len(found.images), len(found.annotations), found.problems) == (140, 7, [])
    assert {drawn.candidates for drawn in found.annotations} == {()}
    assert all("there is no scd_patientdata.csv" in drawn.unpaired for drawn in found.annotations)


@pytest.mark.parametrize(
    ("table", "paired"),
    [
        pytest.param("PatientID,OriginalID\nSCD0000101,SC-HF-I-1\n", 5, id="the table writes no zero"),
        pytest.param("PatientID,OriginalID\nSCD0000101,SC-HF-I-001\n", 5, id="the table writes more zeros"),
        pytest.param("PatientID,OriginalID\nSCD0000101,SC-HF-I-1\nSCD0000201,SC-HF-I-001\n", 0, id="two that differ by zeros"),
        pytest.param("PatientID,OriginalID\nSCD0000101,SC-HF-I-01\nSCD0000201,SC-HF-I-1\n", 5, id="the very name comes first"),
        pytest.param("PatientID,OriginalID\nSCD0000101,SC-HF-I-10\n", 0, id="10 is not 01"),
        pytest.param("patientid;originalid\nSCD0000101;SC-HF-I-01\n", 0, id="other separator"),
        pytest.param("originalid , PATIENTID\nSC-HF-I-01, SCD0000101\n", 5, id="other case and order"),
        pytest.param("PatientID,OriginalID\nSCD0000101,SC-HF-I-01\nSCD0000201,SC-HF-I-01\n", 0, id="two patients"),
        pytest.param("PatientID,OriginalID\nSCD0000909,SC-HF-I-01\n", 0, id="a patient who is not here"),
    ],
)
def test_the_patients_table(published: Path, table: str, paired: int) -> None:
    """A contour's folder is of the patient whom the table names; zeros before a number do not count where that leaves one."""
    (published / "scd_patientdata.csv").write_text(table)
    found = read(published)
    of_first = [drawn for drawn in found.annotations if drawn.entry.path.startswith("SC-HF-I-01/")]
    assert sum(bool(drawn.candidates) for drawn in of_first) == paired
    assert all("SCD0000101" in path for drawn in of_first for path in drawn.candidates)
    assert all(drawn.candidates or drawn.unpaired for drawn in found.annotations)


def test_two_folders_that_differ_by_zeros(published: Path) -> None:
    """Where both SC-HF-I-01 and SC-HF-I-1 hold contours, only the one that the table writes is paired."""
    touch(published, f"SC-HF-I-1/{CONTOURS}/IM-0001-0048-icontour-manual.txt")
    said = candidates(read(published))
    assert (len(said["SC-HF-I-01 0048-icontour"]), len(said["SC-HF-I-1 0048-icontour"])) == (1, 0)
    (published / "scd_patientdata.csv").write_text("PatientID,OriginalID\nSCD0000101,SC-HF-I-001\n")
    assert not any(paths for name, paths in candidates(read(published)).items() if "HF-I-" in name)


def test_names(published: Path) -> None:
    """Whole names count: strays are left over, other files of a patient's folder may be images, of which nothing is promised."""
    touch(
        published,
        f"SC-HF-I-01/{CONTOURS}/IM-0001-0049-icontour-manual.txt~",
        f"SC-HF-I-01/{CONTOURS}/IM-0001-0049-p3contour-manual.txt",
        f"SC-HF-I-01/{CONTOURS}/IM-0001-\u0664\u0669-icontour-manual.txt",
        "SC-HF-I-01/contours-auto/Auto1/IM-0001-0049-icontour-auto.txt",
        "SC-HF-I-01/IM-0001-0049-icontour-manual.txt",
        "IM-0003-0001.dcm",
        "notes.txt",
        # What is part of it:
        "SCD_IMAGES_01/SCD0000101/CINESAX_300/README",
        "SCD_ManualContours/SC-N-02/contours-manual/kim/IM-0001-0048-ocontour-manual.txt",
    )
    found = read(published)
    assert found.left_over == 7
    assert [image.entry.path.rpartition("/")[2] for image in found.images if not image.sure] == ["README"]
    assert len(found.annotations) == 8
    assert {drawn.reader for drawn in found.annotations} == {"IRCCI-expert", "kim"}


def test_recognised(published: Path, studies: Path, tmp_path: Path) -> None:
    """Both forms are recognised and say by what; a folder that merely contains one further below is not."""
    assert sunnybrook.recognises(Tree(published)) == "SC-…/contours-manual/"
    assert sunnybrook.recognises(Tree(studies)) == "link.csv beside dicoms/ or contourfiles/"
    assert sunnybrook.recognises(Tree(published / "SCD_IMAGES_01")) == "SCD…/<series>/IM-ssss-nnnn.dcm"
    assert sunnybrook.recognises(Tree(published / "SC-HF-I-01")) is None
    (published.parent / "around" / "data").mkdir(parents=True)
    published.rename(published.parent / "around" / "data" / "published")
    assert sunnybrook.recognises(Tree(published.parent / "around")) is None
    assert sunnybrook.recognises(Tree(published.parent / "around" / "data" / "published")) is not None


def test_a_synthetic_archive(tmp_path: Path) -> None:
    """Real DICOM files and contours under the original names: each contour finds the image it was drawn on, among the candidates."""
    synthetic.write_studies(tmp_path / "arranged", patients=2, slices=3, phases=2, size=32, seed=3)
    archive = tmp_path / "archive"
    lines = ["PatientID,OriginalID"]
    for number, patient in enumerate(("SYN0001", "SYN0002"), start=1):
        name, original = f"SCD000000{number}", f"SC-N-{number}"
        lines.append(f"{name},{original}")
        for image in (tmp_path / "arranged" / "dicoms" / patient).iterdir():
            new = archive / "SCD_IMAGES_01" / name / "CINESAX_300" / f"IM-0003-{int(image.stem):04d}.dcm"
            new.parent.mkdir(parents=True, exist_ok=True)
            image.rename(new)
        for contour in (tmp_path / "arranged" / "contourfiles" / f"SC-{patient[:3]}-{patient[3:]}").rglob("*.txt"):
            new = archive / f"SC-N-{number:02d}" / CONTOURS / contour.name
            new.parent.mkdir(parents=True, exist_ok=True)
            contour.rename(new)
    (archive / "scd_patientdata.csv").write_text("\n".join(lines))
    found = read(archive)
    assert (len(found.images), len(found.annotations), found.problems, found.left_over) == (12, 18, [], 0)
    for drawn in found.annotations:
        (path,) = drawn.candidates
        assert path.split("/")[1][-1] == drawn.entry.path.split("/")[0][-1]
        assert dcmread(archive / path).InstanceNumber == drawn.number


@given(table=st.binary(max_size=200) | st.text(alphabet='PatientIDOrgl,"\n\r SCHF01-;\0', max_size=200).map(str.encode))
def test_any_table_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, table: bytes) -> None:
    """Whatever bytes the table holds, reading the tree raises nothing, and a contour without candidates says why."""
    folder = tmp_path_factory.mktemp("tree")
    touch(folder, "SCD_IMAGES_01/SCD0000001/A/IM-0003-0001.dcm", f"SC-HF-I-01/{CONTOURS}/IM-0001-0001-icontour-manual.txt")
    (folder / "scd_patientdata.csv").write_bytes(table)
    (drawn,) = read(folder).annotations
    assert bool(drawn.candidates) != bool(drawn.unpaired)
