"""The Sunnybrook layout: which contour belongs to which image, and the two real studies."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom import dcmread

from catalog import database, ingest, synthetic
from catalog.ingest import Summary
from catalog.layouts import Found, Tree, sunnybrook

Run = Callable[..., "subprocess.CompletedProcess[str]"]
Conn = psycopg.Connection[tuple[Any, ...]]


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """One synthetic patient to change: 6 images of 64×64 px, three slices of two phases, with 6 inner and 3 outer contours."""
    synthetic.write_studies(tmp_path / "arrived", patients=1, slices=3, phases=2, size=64, seed=5)
    return tmp_path / "arrived"


@pytest.fixture
def take_in(database_url: str) -> Iterator[Callable[[Path], Summary]]:
    """Ingest in this process."""
    with ThreadPoolExecutor(1) as threads:

        def ingest_folder(folder: Path) -> Summary:
            with database.open_database(database_url) as db:
                return ingest.ingest(db, folder, executor=threads)

        yield ingest_folder


def make_tree(folder: Path, link: bytes | None, patients: str = "ABC", originals: str = "XYZ") -> Path:
    """Make a tree of empty files: for each patient image 1, for each original inner contour 1."""
    for patient in patients:
        (folder / "dicoms" / patient).mkdir(parents=True)
        (folder / "dicoms" / patient / "1.dcm").touch()
    for original in originals:
        (folder / "contourfiles" / original / "i-contours").mkdir(parents=True)
        (folder / "contourfiles" / original / "i-contours" / "IM-0001-0001-icontour-manual.txt").touch()
    if link is not None:
        (folder / "link.csv").write_bytes(link)
    return folder


def pairs(found: Found) -> dict[str, str]:
    """Return original → patient, for each contour that has a candidate."""
    return {str(drawn.refers_to["original_id"]): drawn.candidates[0].split("/")[1] for drawn in found.annotations if drawn.candidates}


PLAIN = b"patient_id,original_id\nA,X\nB,Y\n"
AX_BY = {"X": "A", "Y": "B"}


@pytest.mark.parametrize(
    ("link", "expected", "codes"),
    [
        pytest.param(PLAIN, AX_BY, [], id="plain"),
        pytest.param(b"\xef\xbb\xbf" + PLAIN, AX_BY, [], id="byte order mark"),
        pytest.param(PLAIN.replace(b"\n", b"\r\n"), AX_BY, [], id="CRLF"),
        pytest.param(PLAIN.replace(b"\n", b"\r"), AX_BY, [], id="CR"),
        pytest.param(PLAIN.rstrip(), AX_BY, [], id="no last line end"),
        pytest.param(b" patient_id , Original_ID \n\n A ,\tX\n,\n  B,Y  \n\n", AX_BY, [], id="blanks and empty lines"),
        pytest.param(b'"patient_id","original_id"\n"A","X"\n"B",Y\n', AX_BY, [], id="quoted"),
        pytest.param(b'note,original_id,patient_id\n"of\ntwo, lines",X,A\n,Y,B,more\n', AX_BY, [], id="other columns, other order"),
        pytest.param(PLAIN + b"A,X\n", AX_BY, [], id="one line twice"),
        pytest.param(b"patient_id,original_id\nA,X\nB\n,Y\nC,\n", {"X": "A"}, ["link-columns"] * 3, id="missing values"),
        pytest.param(b"patient_id;original_id\nA;X\n", {}, ["link-columns"], id="other separator"),
        pytest.param(b"patient,original\nA,X\n", {}, ["link-columns"], id="wrong columns"),
        pytest.param(b"patient_id\nA\n", {}, ["link-columns"], id="a column is missing"),
        pytest.param(b"", {}, ["link-columns"], id="empty"),
        pytest.param(b'patient_id,original_id\nA,X\n"B,Y\n', {"X": "A"}, ["link-columns"], id="a quote that does not end"),
        pytest.param(PLAIN.decode().encode("utf-16"), {}, ["link-unreadable"], id="UTF-16"),
        pytest.param(b"patient_id,original_id\nA,X\0\nB,Y\n", {}, ["link-unreadable"], id="NUL"),
        pytest.param(PLAIN + b"C,X\n", {"Y": "B"}, ["link-ambiguous"], id="one original of two patients"),
        pytest.param(PLAIN + b"A,Z\n", {"Y": "B"}, ["link-ambiguous"], id="one patient of two originals"),
        pytest.param(PLAIN + b"A,Z\nC,Z\n", {"Y": "B"}, ["link-ambiguous"] * 2, id="a chain of them"),
        pytest.param(PLAIN + b"D,Z\n", AX_BY, ["link-no-folder"], id="a patient without a folder"),
        pytest.param(PLAIN + b"C,W\n", AX_BY, [], id="an original without contours"),
        pytest.param(b"patient_id,original_id\n" + b"A" * 200_000 + b",X\nB,Y\n", {}, ["link-columns"], id="a field too long"),
    ],
)
def test_link(tmp_path: Path, link: bytes, expected: dict[str, str], codes: list[str]) -> None:
    """link.csv pairs what it names once and clearly; what it does not is said with its line, and no other pairing suffers."""
    found = sunnybrook.read(Tree(make_tree(tmp_path, link)), {})
    assert pairs(found) == expected
    assert [problem.code for problem in found.problems] == codes
    assert all(problem.path == "link.csv" and "\n" not in problem.message for problem in found.problems)
    assert all(drawn.unpaired for drawn in found.annotations if not drawn.candidates)
    assert (len(found.images), len(found.annotations)) == (3, 3)


@given(link=st.binary(max_size=200) | st.text(alphabet='patient_idorgl,"\n\r ABXY\0;', max_size=200).map(str.encode))
def test_any_link_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, link: bytes) -> None:
    """Whatever bytes link.csv holds, reading the tree raises nothing, and no contour has two patients."""
    folder = tmp_path_factory.mktemp("tree")
    make_tree(folder, link, "A", "X")
    found = sunnybrook.read(Tree(folder), {})
    assert len(found.annotations) == 1
    assert found.originals or not found.annotations[0].candidates


def test_names(tmp_path: Path) -> None:
    """Contours are known by their whole name, images by nothing but lying in a patient's folder; hidden files are no part of it."""
    make_tree(tmp_path, PLAIN, "A", "X")
    for name in (
        "contourfiles/X/i-contours/.IM-0001-0048-icontour-manual.txt.swp",
        "contourfiles/X/i-contours/IM-0001-0048-icontour-manual.txt.swp",
        "contourfiles/X/i-contours/IM-0001-0048-icontour-manual.txt~",
        "contourfiles/X/i-contours/IM-0001-0048-pcontour-manual.txt",
        "contourfiles/X/i-contours/IM-0001-\u0664\u0668-icontour-manual.txt",
        "contourfiles/IM-0001-0048-icontour-manual.txt",
        "IM-0001-0048-icontour-manual.txt",
        ".git/dicoms/A/1.dcm",
        "dicoms/A/.DS_Store",
        "dicoms/stray.dcm",
        "notes.txt",
        # What is part of it:
        "contourfiles/X/expert/o-contours/IM-0001-0002-ocontour-kim.txt",
        "dicoms/A/48",
        "dicoms/A/48.IMA",
        "dicoms/A/series/3.dcm",
        "dicoms/A/README.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = sunnybrook.read(Tree(tmp_path), {})
    drawn = {(item.structure, item.reader, item.number) for item in found.annotations}
    assert drawn == {("inner", "manual", 1), ("outer", "kim", 2)}
    images = {item.entry.path.removeprefix("dicoms/A/"): item.sure for item in found.images}
    assert images == {"1.dcm": True, "48": True, "48.IMA": True, "series/3.dcm": True, "README.txt": False}
    assert found.left_over == 8


def test_recognised(tmp_path: Path) -> None:
    """A folder is recognised by link.csv beside dicoms/ or contourfiles/."""
    make_tree(tmp_path, None, "A", "X")
    assert not sunnybrook.recognises(Tree(tmp_path))
    (tmp_path / "link.csv").touch()
    assert sunnybrook.recognises(Tree(tmp_path))
    shutil.rmtree(tmp_path / "dicoms")
    assert sunnybrook.recognises(Tree(tmp_path))
    shutil.rmtree(tmp_path / "contourfiles")
    assert not sunnybrook.recognises(Tree(tmp_path))


def test_images_are_known_by_content(study: Path, conn: Conn, take_in: Callable[[Path], Summary]) -> None:
    """Image files may be named 1, 2.IMA or 3.dcm; a contour's number is the file's, else the InstanceNumber; junk is no error."""
    folder = study / "dicoms" / "SYN0001"
    (folder / "1.dcm").rename(folder / "1")
    (folder / "2.dcm").rename(folder / "2.IMA")
    (folder / "4.dcm").rename(folder / "MR.4.somewhere")  # found by InstanceNumber
    (folder / "5.dcm").rename(folder / "five.dcm")
    (folder / "deeper").mkdir()
    (folder / "6.dcm").rename(folder / "deeper" / "0006")
    for name in ("README.txt", "Thumbs.db", "report.pdf", "empty"):
        (folder / name).write_bytes(b"" if name == "empty" else os.urandom(500))
    summary = take_in(study)
    assert (summary.images, summary.paired, summary.standing_errors) == (6, 9, 0)
    methods = "SELECT instance_number, pairing_method FROM sample WHERE structure = 'inner' ORDER BY 1"
    assert conn.execute(methods).fetchall() == [
        (1, "file-number"), (2, "file-number"), (3, "file-number"), (4, "instance-number"), (5, "instance-number"), (6, "file-number"),
    ]  # fmt: skip
    assert conn.execute("SELECT original_id FROM patient").fetchall() == [("SC-SYN-0001",)]


def test_the_files_number_comes_first(study: Path, conn: Conn, take_in: Callable[[Path], Summary]) -> None:
    """Where file number and InstanceNumber disagree, the file's number decides."""
    folder = study / "dicoms" / "SYN0001"
    for number, instance in ((1, 2), (2, 1)):
        dataset = dcmread(folder / f"{number}.dcm")
        dataset.InstanceNumber = instance
        dataset.save_as(folder / f"{number}.dcm")
    take_in(study)
    rows = conn.execute("SELECT path, instance_number FROM sample WHERE structure = 'outer' AND instance_number < 3").fetchall()
    assert rows == [(str(folder / "1.dcm"), 2)]


def test_two_images_of_one_number(study: Path, conn: Conn, take_in: Callable[[Path], Summary]) -> None:
    """Two images of one number are both proposed, flagged, looked at and never chosen between; one goes: the other is taken."""
    folder = study / "dicoms" / "SYN0001"
    shutil.copy(folder / "2.dcm", folder / "1.IMA")  # two files of one number
    for number in (3, 4):  # two images of one InstanceNumber
        dataset = dcmread(folder / f"{number}.dcm")
        dataset.InstanceNumber = 3
        dataset.save_as(folder / f"image {number}")
        (folder / f"{number}.dcm").unlink()
    (study / "contourfiles" / "SC-SYN-0001" / "i-contours" / "IM-0001-0004-icontour-manual.txt").unlink()
    summary = take_in(study)
    assert (summary.paired, summary.proposed, summary.masks, summary.standing_errors) == (4, 4, 12, 4)
    proposed = "SELECT a.refers_to->>'number', p.method, p.score, p.state FROM pairing p JOIN annotation a ON a.id = p.annotation_id"
    assert set(conn.execute(f"{proposed} WHERE p.state <> 'accepted'").fetchall()) == {  # type: ignore[arg-type]
        ("1", "file-number", 0.5, "proposed"), ("3", "instance-number", 0.5, "proposed"),
    }  # fmt: skip
    assert conn.execute("SELECT DISTINCT rule, detail FROM flag WHERE state = 'open' ORDER BY 2").fetchall() == [
        ("PAIR-AMBIGUOUS", "2 images have number 1; none was chosen"), ("PAIR-AMBIGUOUS", "2 images have number 3; none was chosen"),
    ]  # fmt: skip
    assert conn.execute("SELECT instance_number FROM sample WHERE structure = 'inner' ORDER BY 1").fetchall() == [(2,), (5,), (6,)]
    (folder / "1.IMA").unlink()
    (folder / "image 4").unlink()
    summary = take_in(study)
    assert (summary.paired, summary.proposed, summary.masks, summary.standing_errors) == (8, 0, 8, 0)


def test_link_corrected_later(study: Path, conn: Conn, take_in: Callable[[Path], Summary]) -> None:
    """Contours that a wrong or broken link.csv left alone, or gave to another patient, are paired when it is right; the flags end."""
    right = (study / "link.csv").read_text()
    shutil.copytree(study / "dicoms" / "SYN0001", study / "dicoms" / "SYN0002")
    for path in (study / "dicoms" / "SYN0002").iterdir():
        dataset = dcmread(path)
        dataset.SOPInstanceUID += ".2"
        dataset.PatientID = "SYN0002"
        dataset.save_as(path)
    standing = []
    for text in ("", right.replace("SYN0001", "SYN0002"), right + "SYN0009,SC-SYN-0001\n", right):
        (study / "link.csv").write_text(text)
        summary = take_in(study)
        standing.append((summary.files_read, summary.paired, summary.masks, summary.standing_errors))
    assert standing == [(21, 0, 0, 1 + 9), (0, 9, 9, 0), (0, 0, 0, 1 + 9), (0, 9, 9, 0)]
    assert conn.execute("SELECT DISTINCT patient FROM sample").fetchall() == [("SYN0001",)]
    assert conn.execute("SELECT count(*) FROM flag WHERE state = 'open'").fetchall() == [(0,)]
    assert conn.execute("SELECT state, count(*) FROM pairing GROUP BY 1 ORDER BY 1").fetchall() == [("accepted", 9), ("rejected", 9)]
    assert [row[0] for row in conn.execute("SELECT errors FROM ingest_run ORDER BY id")] == [10, 0, 10, 0]


# ---------------------------------------------------------------------------------------------------- the real studies

# As README shows it.
EJECTION_FRACTION = """
WITH slice AS (
    SELECT DISTINCT patient, position FROM image_all
), gap AS (
    SELECT patient, position - lag(position) OVER (PARTITION BY patient ORDER BY position) AS mm FROM slice
), distance AS (
    SELECT patient, percentile_cont(0.5) WITHIN GROUP (ORDER BY mm) AS mm FROM gap GROUP BY patient
), volume AS (
    SELECT patient, phase, count(*) AS slices, sum(polygon_area_px * row_spacing * column_spacing) * mm / 1000 AS ml
    FROM sample JOIN distance USING (patient)
    WHERE structure = 'inner'
    GROUP BY patient, phase, mm
)
SELECT patient, min(slices) AS slices, round(max(ml)::numeric, 1) AS edv_ml, round(min(ml)::numeric, 1) AS esv_ml,
       round((100 * (1 - min(ml) / max(ml)))::numeric, 1) AS ef_percent
FROM volume
GROUP BY patient
ORDER BY patient
"""


def test_the_real_studies(sunnybrook: Path, database_url: str, conn: Conn, catalog: Run, tmp_path: Path) -> None:
    """500 images, 54 contours, all paired, no error, an editor's swap file notwithstanding; masks and volumes are the known ones."""
    folder = tmp_path / "final_data"
    shutil.copytree(sunnybrook, folder, copy_function=os.symlink)
    for stray in (sunnybrook.parent / "strays").iterdir():
        shutil.copy(stray, folder / "contourfiles" / "SC-HF-I-1" / "i-contours")
        shutil.copy(stray, folder / "contourfiles" / "SC-HF-I-1" / "i-contours" / stray.name.removeprefix("."))
    done = catalog("ingest", folder, "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    counts = {"images": 500, "annotations": 54, "paired": 54, "masks": 54, "standing_errors": 0, "left_over": 1}
    assert {name: summary[name] for name in counts} == counts
    drawn = "SELECT patient, structure, count(*), sum(area_px)::int FROM sample WHERE error_flags = 0 GROUP BY 1, 2 ORDER BY 1, 2"
    rows = conn.execute(drawn).fetchall()
    assert [(patient, structure, count) for patient, structure, count, _ in rows] == [
        ("SCD0000101", "inner", 18), ("SCD0000101", "outer", 9), ("SCD0000201", "inner", 18), ("SCD0000201", "outer", 9),
    ]  # fmt: skip
    assert [area for _, structure, _, area in rows if structure == "inner"] == [17_788, 22_559]
    odd = "SELECT path, area_px, polygon_area_px FROM sample WHERE abs(area_px - polygon_area_px) > greatest(1, 0.02 * polygon_area_px)"
    assert conn.execute(odd).fetchall() == []
    assert conn.execute("SELECT count(*) FROM flag").fetchone() == (0,)
    # Slices of 20 phases each: file number n is slice (n - 1) // 20 and phase (n - 1) % 20.
    wrong = "SELECT path FROM image_all WHERE phase <> (instance_number - 1) % 20 OR path NOT LIKE '%/' || instance_number || '.dcm'"
    assert conn.execute(wrong).fetchall() == []
    slices = "SELECT patient, count(DISTINCT position), count(DISTINCT phase) FROM image_all GROUP BY 1 ORDER BY 1"
    assert conn.execute(slices).fetchall() == [("SCD0000101", 12, 20), ("SCD0000201", 13, 20)]
    answer = json.loads(catalog("sql", EJECTION_FRACTION, "--json").stdout)
    assert answer == [
        {"patient": "SCD0000101", "slices": 9, "edv_ml": 191.3, "esv_ml": 141.3, "ef_percent": 26.2},
        {"patient": "SCD0000201", "slices": 9, "edv_ml": 241.9, "esv_ml": 180.3, "ef_percent": 25.5},
    ]
