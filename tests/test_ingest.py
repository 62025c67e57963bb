"""Folder → rows: what an ingest writes, what it leaves alone, and what is left when it is stopped at any moment."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
from pydicom import dcmread

from catalog import database, ingest, pairings, processes, reading, synthetic
from catalog.errors import CatalogError
from catalog.ingest import Summary
from tests.processes import wait_until

Run = Callable[..., "subprocess.CompletedProcess[str]"]
Conn = psycopg.Connection[tuple[Any, ...]]


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """One synthetic patient to change: 6 images of 64×64 px, three slices of two phases, with 6 inner and 3 outer contours."""
    folder = tmp_path / "arrived"
    synthetic.write_studies(folder, patients=1, slices=3, phases=2, size=64, seed=5)
    return folder


@pytest.fixture
def three(studies: Path, tmp_path: Path) -> Path:
    """Three patients to change: 48 images."""
    shutil.copytree(studies, tmp_path / "arrived")
    return tmp_path / "arrived"


@pytest.fixture
def take_in(database_url: str) -> Iterator[Callable[..., Summary]]:
    """Ingest in this process, reading in a thread: a process for that takes half a second to begin."""
    with ThreadPoolExecutor(1) as threads:

        def ingest_folder(folder: Path, **options: Any) -> Summary:
            with database.open_database(database_url) as db:
                return ingest.ingest(db, folder, **{"executor": threads, **options})

        yield ingest_folder


def image(folder: Path, number: int = 1) -> Path:
    return folder / "dicoms" / "SYN0001" / f"{number}.dcm"


def contour(folder: Path, number: int = 1, kind: str = "i") -> Path:
    return folder / "contourfiles" / "SC-SYN-0001" / f"{kind}-contours" / f"IM-0001-{number:04d}-{kind}contour-manual.txt"


def edit(path: Path, *, brighter: bool = False, to: Path | None = None, **elements: object) -> None:
    """Write a DICOM file again with other elements, or with other pixels."""
    dataset = dcmread(path)
    for name, value in elements.items():
        setattr(dataset, name, value)
    if brighter:
        dataset.PixelData = bytes(byte ^ 1 for byte in dataset.PixelData)
    dataset.save_as(to or path)


def ask(conn: Conn, query: str) -> list[tuple[Any, ...]]:
    return conn.execute(query).fetchall()  # type: ignore[arg-type]


def open_flags(conn: Conn) -> list[tuple[str, str]]:
    """Return (rule, path of the file it concerns) of every open flag."""
    return ask(
        conn,
        "SELECT g.rule, coalesce(f.path, b.path, k.path) FROM flag g LEFT JOIN file f ON f.id = g.file_id "
        "LEFT JOIN pairing p ON p.id = g.pairing_id LEFT JOIN annotation a ON a.id = coalesce(g.annotation_id, p.annotation_id) "
        "LEFT JOIN file b ON b.id = a.file_id LEFT JOIN location l ON l.image_id = g.image_id AND l.preferred "
        "LEFT JOIN file k ON k.id = l.file_id WHERE g.state = 'open' ORDER BY 1, 2",
    )  # type: ignore[return-value]


def fed(conn: Conn) -> set[tuple[str, int]]:
    """Return (structure, instance number) of all that a Feed would take."""
    return set(ask(conn, "SELECT structure, instance_number FROM sample WHERE error_flags = 0 AND path IS NOT NULL"))  # type: ignore[arg-type]


ALL_FED = {("inner", number) for number in range(1, 7)} | {("outer", number) for number in (1, 3, 5)}


def tables(conn: Conn) -> list[str]:
    return [name for (name,) in ask(conn, "SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY 1")]


def tuples(conn: Conn) -> dict[str, list[tuple[Any, ...]]]:
    """Return where every row of every table lies and which transaction wrote it: any write changes this."""
    return {name: ask(conn, f"SELECT ctid::text, xmin::text, xmax::text FROM {name} ORDER BY 1") for name in tables(conn)}


# Everything that an ingest writes, by what it means: no id, no time, no run.
CONTENT = {
    "root": "SELECT name, url FROM root",
    "file": "SELECT path, kind, size, mtime_ns, state FROM file",
    "image": "SELECT p.patient_id, original_id, study_instance_uid, study_date, series_instance_uid, series_number, modality, "
    "sop_instance_uid, sop_class_uid, instance_number, number_of_frames, images_in_acquisition, content_hash, i.frame, i.rows, i.columns, "
    "samples_per_pixel, photometric, row_spacing, column_spacing, image_position, image_orientation, position, slice_thickness, "
    "trigger_time, phase, slope, intercept, pixel_hash, sample_key, array(SELECT (f.path, byte_offset, byte_length, dtype, "
    "transfer_syntax_uid, preferred)::text "
    "FROM location l JOIN file f ON f.id = l.file_id WHERE l.image_id = i.id ORDER BY f.path) "
    "FROM image i JOIN instance n ON n.id = i.instance_id JOIN series e ON e.id = n.series_id JOIN study s ON s.id = e.study_id "
    "JOIN patient p ON p.id = s.patient_id",
    "annotation": "SELECT f.path, source_key, version, current, r.name, s.name, a.kind, origin, label, points, rings, convention, shift_x, "
    "shift_y, polygon_area_px, a.content_hash, refers_to::text FROM annotation a JOIN file f ON f.id = a.file_id "
    "JOIN reader r ON r.id = a.reader_id JOIN structure s ON s.id = a.structure_id",
    "pairing": "SELECT f.path, a.version, i.sample_key, method, rule, score, p.state, actor, m.rows, m.columns, m.box_row, m.box_column, "
    "m.box_rows, m.box_columns, m.bits, m.area_px FROM pairing p JOIN annotation a ON a.id = p.annotation_id "
    "JOIN file f ON f.id = a.file_id JOIN image i ON i.id = p.image_id LEFT JOIN mask m ON m.pairing_id = p.id",
    "flag": "SELECT rule, severity, g.state, detail, value, coalesce(f.path, b.path, i.sample_key::text) FROM flag g "
    "LEFT JOIN file f ON f.id = g.file_id LEFT JOIN annotation a ON a.id = g.annotation_id LEFT JOIN file b ON b.id = a.file_id "
    "LEFT JOIN image i ON i.id = g.image_id",
    "error": "SELECT path, stage, code, message FROM ingest_error WHERE ingest_run_id = (SELECT max(id) FROM ingest_run)",
}


def content(conn: Conn) -> dict[str, list[str]]:
    return {name: [row for (row,) in ask(conn, f"SELECT t::text FROM ({query}) t ORDER BY 1")] for name, query in CONTENT.items()}


def spoil(folder: Path) -> None:
    """Put one of every error into a folder of several patients, beside what is no part of the layout."""
    patient = folder / "dicoms" / "SYN0001"
    (patient / "README.txt").write_text("not an image")
    (patient / "Thumbs.db").write_bytes(bytes(1000))
    (patient / "5.dcm").write_bytes(b"")  # an image of no bytes, to which a contour belongs
    (patient / "2.dcm").write_bytes((patient / "2.dcm").read_bytes()[:-100])
    edit(patient / "3.dcm", brighter=True, to=patient / "30.dcm")  # one UID, two contents
    shutil.copy(patient / "4.dcm", patient / "40.dcm")  # a second place
    shutil.copy(patient / "6.dcm", patient / "7")  # a second file of the number that a contour names
    contours = folder / "contourfiles" / "SC-SYN-0002" / "i-contours"
    drawn = sorted(contours.iterdir())
    drawn[0].write_text("")
    drawn[1].write_text("10 10\n20 20\n")
    drawn[2].write_text("900 900\n950 900\n950 950\n")
    drawn[3].write_text("-20 10\n20 10\n20 40\n-20 40\n")
    drawn[3].with_name("IM-0001-0999-icontour-manual.txt").write_text("10 10\n20 10\n20 20\n")
    (folder / "contourfiles" / "SC-SYN-0001" / "i-contours" / "IM-0001-0007-icontour-manual.txt").write_text("10 10\n20 10\n20 20\n")
    with (folder / "link.csv").open("a") as link:
        link.write("SYN0009,SC-SYN-0009\n")


# ---------------------------------------------------------------------------------------------------- errors


def test_what_is_wrong_is_said_and_the_rest_goes_on(three: Path, conn: Conn, catalog: Run) -> None:
    """Each kind of error is an error row of one line and a flag; exit code 3; everything else is fed, and a later ingest still says it."""
    spoil(three)
    for number in (1, 6):
        edit(image(three, number), PatientName="Secret^Name", PatientBirthDate="19010203", AccessionNumber="SECRET")
    (image(three, 8)).write_bytes(b"\0" * 128 + b"DICM" + b"Secret^Name" * 50)
    done = catalog("ingest", three, "--json", "--jobs", 1)
    assert done.returncode == 3, done.stderr
    found = json.loads(done.stdout)
    listed = json.loads(catalog("errors", "--json").stdout)
    said = {(error["path"].rpartition("/")[2], error["stage"], error["code"]) for error in listed}
    assert said == {
        ("link.csv", "find", "link-no-folder"),
        ("5.dcm", "read", "not-dicom"),
        ("2.dcm", "read", "truncated"),
        ("8.dcm", "read", "truncated"),
        ("3.dcm", "read", "uid-conflict"),
        ("30.dcm", "read", "uid-conflict"),
        ("IM-0001-0005-icontour-manual.txt", "read", "contour-empty"),
        ("IM-0001-0007-icontour-manual.txt", "read", "contour-points"),
        ("IM-0001-0009-icontour-manual.txt", "mask", "mask-empty"),
        ("IM-0001-0999-icontour-manual.txt", "pair", "pair-no-image"),
        ("IM-0001-0005-icontour-manual.txt", "pair", "pair-no-image"),
        ("IM-0001-0005-ocontour-manual.txt", "pair", "pair-no-image"),
        ("IM-0001-0007-icontour-manual.txt", "pair", "pair-ambiguous"),
    }
    assert found["standing_errors"] == len(listed) == 13
    assert ask(conn, "SELECT rule, count(*) FROM flag WHERE severity = 'warning' GROUP BY 1") == [("MASK-AREA", 1)]
    assert all("\n" not in error["message"] and "Traceback" not in error["message"] for error in listed)
    said_everywhere = done.stdout + done.stderr + json.dumps(listed) + str(content(conn))
    assert not re.search("Secret|SECRET|19010203", said_everywhere)
    # Of the third patient, in whose files nothing is wrong, everything is fed; of the others what is right.
    assert ask(conn, "SELECT count(*) FROM sample WHERE patient = 'SYN0003' AND error_flags = 0") == [(6,)]
    assert ask(conn, "SELECT instance_number, structure FROM sample WHERE patient = 'SYN0002' AND error_flags = 0 ORDER BY 1, 2") == [
        (5, "outer"), (9, "outer"), (11, "inner"),
    ]  # fmt: skip
    shutil.copy(image(three, 10), image(three, 16).with_name("17.dcm"))
    again = catalog("ingest", three)
    assert again.returncode == 3
    assert "13 errors stand" in again.stderr and again.stderr.count("\n") == 1
    assert len(json.loads(catalog("errors", "--json").stdout)) == 13
    shown = catalog("errors").stdout.splitlines()
    assert len(shown) == 13 and all(line.startswith("run 2  arrived/") for line in shown)


def test_bad_names_and_links(study: Path, conn: Conn, take_in: Callable[..., Summary]) -> None:
    """A name that is not UTF-8, links in a circle, a link elsewhere and a path too long for an index: said, and the rest goes on."""
    patient = study / "dicoms" / "SYN0001"
    (study / "elsewhere").mkdir()
    Path(os.fsdecode(os.fsencode(patient) + b"/\xff.dcm")).write_bytes(b"x")
    (patient / "loop").symlink_to(study)
    (patient / "8.dcm").symlink_to("9.dcm")
    (patient / "9.dcm").symlink_to("8.dcm")
    (patient / "10.dcm").symlink_to("nowhere")
    (study / "dicoms" / "SYN0002").symlink_to(study.parent)
    (study / "dicoms" / "SYN0003").symlink_to(patient)  # within the root: catalogued under its real path
    deep = study
    while len(str(deep.relative_to(study))) < 2_000:
        deep /= "d" * 200
    deep.mkdir(parents=True)
    os.mkfifo(patient / "11.dcm")
    summary = take_in(study)
    said = ask(conn, "SELECT code, count(*) FROM ingest_error GROUP BY 1 ORDER BY 1")
    assert said == [("file-unreadable", 2), ("folder-link", 1), ("name-not-utf8", 1), ("path-too-long", 1)]
    assert (summary.images, summary.standing_errors) == (6, 5)
    assert fed(conn) == ALL_FED
    before = tuples(conn)
    assert take_in(study).standing_errors == 5
    assert tuples(conn) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_folder(study: Path, conn: Conn, take_in: Callable[..., Summary]) -> None:
    """A folder and a file without read access are errors; with access given they come in, though no time or size changed."""
    folder, file = contour(study).parent, image(study, 2)
    folder.chmod(0)
    file.chmod(0)
    assert take_in(study).standing_errors == 2
    folder.chmod(0o700)
    file.chmod(0o600)
    assert take_in(study).standing_errors == 0
    assert fed(conn) == ALL_FED


@pytest.mark.parametrize(
    ("what", "message"),
    [("nowhere", "is not there"), ("file", "is no folder"), ("empty", "no layout fits"), ("n\udcffme", "is not UTF-8")],
)
def test_roots_that_are_none(what: str, message: str, database_url: str, tmp_path: Path, conn: Conn, catalog: Run) -> None:
    """A root that is not there, a file, of no layout or without a storable name is one line and exit code 1; nothing is written."""
    root = tmp_path / what
    if what == "file":
        root.write_text("")
    elif what != "nowhere":
        root.mkdir()
    done = catalog("ingest", root, "--jobs", 1)
    assert done.returncode == 1
    assert message in done.stderr and done.stderr.startswith("catalog: ") and done.stderr.count("\n") == 1
    assert ask(conn, "SELECT count(*) FROM root") == [(0,)]


def test_headers_beyond_what_a_column_holds(study: Path, conn: Conn, take_in: Callable[..., Summary]) -> None:
    """Numbers and UIDs of damaged headers stop neither the ingest nor a later query over all samples."""
    edit(image(study, 1), PixelSpacing=["1e200", "1e200"], SliceThickness="1e300", RescaleSlope="1e300", RescaleIntercept="0")
    edit(image(study, 2), ImagePositionPatient=["1e308", "1e308", "1e308"], TriggerTime="1e308", InstanceNumber=2)
    data = image(study, 3).read_bytes()
    uid = dcmread(image(study, 3)).SOPInstanceUID.encode()
    at = data.index(b"\x08\x00\x18\x00UI")
    header = data[: at + 6] + (6_000).to_bytes(2, "little") + b"1." * 3_000
    image(study, 3).write_bytes(header + data[at + 8 + len(uid) + len(uid) % 2 :])
    summary = take_in(study)
    assert ask(conn, "SELECT path, code FROM ingest_error WHERE stage = 'read'") == [("dicoms/SYN0001/3.dcm", "unreadable")]
    assert (summary.images, summary.standing_errors) == (5, 3)  # and its two contours
    assert len(ask(conn, "SELECT * FROM sample")) == len(ALL_FED) - 2
    assert ask(conn, "SELECT area_mm2 FROM sample WHERE structure = 'inner' AND instance_number = 1") == [(None,)]


def test_one_failing_reader_refuses_one_file(
    study: Path, conn: Conn, take_in: Callable[..., Summary], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever reading a file raises, it is that file's error, and its text, which could hold a header's value, is not kept."""
    read_dicom = reading._read_dicom

    def fail(path: Path, entry: Any, hashing: Any) -> Any:
        if path.name == "2.dcm":
            raise RecursionError("Secret^Name")
        return read_dicom(path, entry, hashing)

    monkeypatch.setattr(reading, "_read_dicom", fail)
    take_in(study)
    [(path, code, message)] = ask(conn, "SELECT path, code, message FROM ingest_error WHERE stage = 'read'")
    assert (path, code) == ("dicoms/SYN0001/2.dcm", "reader-failed")
    assert "RecursionError" in message and "Secret" not in message
    assert fed(conn) == ALL_FED - {("inner", 2)}


# ---------------------------------------------------------------------------------------------------- again


class Counting(Executor):
    """Reads in this thread and notes which files."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.threads = ThreadPoolExecutor(1)

    def submit(self, fn: Any, /, folder: str, items: Any, hashing: Any) -> Any:  # type: ignore[override]
        self.paths += [item.entry.path.rpartition("/")[2] for item in items]
        return self.threads.submit(fn, folder, items, hashing)


def test_again_changes_nothing(three: Path, conn: Conn, take_in: Callable[..., Summary]) -> None:
    """The same folder again writes not one tuple and reads no file, also while errors stand; `retry` reads the damaged."""
    spoil(three)
    first = take_in(three)
    before, statistics = tuples(conn), _written(conn)
    counting = Counting()
    second = take_in(three, executor=counting)
    assert tuples(conn) == before
    assert _written(conn) == statistics
    assert counting.paths == []
    take_in(three, executor=counting, retry=True)
    assert sorted(counting.paths) == ["2.dcm", "5.dcm", "IM-0001-0005-icontour-manual.txt"]
    assert tuples(conn) == before
    same = ("images", "annotations", "paired", "proposed", "unpaired", "masks", "standing_errors", "left_over")
    assert [getattr(first, name) for name in same] == [getattr(second, name) for name in same]
    assert (second.missing, first.standing_errors) == (0, 12)


def _written(conn: Conn) -> list[tuple[Any, ...]]:
    # A session says what it wrote when it ends, and that is a moment after its client closed it.
    others = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND backend_type = 'client backend'"
    assert wait_until(lambda: ask(conn, others) == [(1,)])
    conn.execute("SELECT pg_stat_force_next_flush(), pg_stat_clear_snapshot()")
    return ask(conn, "SELECT relname, n_tup_ins, n_tup_upd, n_tup_del FROM pg_stat_user_tables WHERE schemaname = 'public' ORDER BY 1")


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_again_opens_no_image(study: Path, take_in: Callable[..., Summary], tmp_path: Path) -> None:
    """The kernel sees no image and no contour opened by an ingest that finds nothing new."""
    take_in(study)
    trace = tmp_path / "trace"
    command = ["strace", "-f", "-e", "trace=open,openat", "-o", trace, sys.executable, "-m", "catalog.cli", "ingest", study]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd="/")
    assert done.returncode == 0 and "0 files read" in done.stdout, done.stderr
    opened = trace.read_text()
    assert "link.csv" in opened
    assert ".dcm" not in opened and "contour-manual" not in opened


def test_what_a_person_decided_stays(study: Path, conn: Conn, take_in: Callable[..., Summary]) -> None:
    """An ingest neither takes back a pairing or a flag that a person decided, nor raises again what a person closed."""
    shutil.copy(image(study, 2), image(study, 1).with_name("1.IMA"))
    contour(study, 5).write_text("900 900\n950 900\n950 950\n")
    image(study, 6).write_bytes(b"DICM")
    take_in(study)
    assert {rule for rule, _ in open_flags(conn)} == {"PAIR-AMBIGUOUS", "MASK-EMPTY", "FILE-UNREADABLE", "PAIR-NO-IMAGE"}
    conn.execute(
        "UPDATE pairing SET state = 'accepted', actor = 'kim' WHERE id IN (SELECT max(id) FROM pairing WHERE state = 'proposed' "
        "GROUP BY annotation_id)"
    )
    conn.execute("UPDATE flag SET state = 'false_positive', closed_by = 'kim', closed_at = now() WHERE state = 'open'")
    before = tuples(conn)
    assert take_in(study).standing_errors == 0
    assert tuples(conn) == before
    assert ask(conn, "SELECT actor, state FROM pairing WHERE actor = 'kim'") == [("kim", "accepted")] * 2


# ---------------------------------------------------------------------------------------------------- what changes


def test_other_pixels_under_a_name(study: Path, conn: Conn, take_in: Callable[..., Summary]) -> None:
    """A file with the same UID and other pixels is another image, not fed until a person agrees; the old one keeps what was drawn on it."""
    take_in(study)
    [(old, drawn, key)] = ask(
        conn, "SELECT sample_id, annotation_id, sample_key FROM sample WHERE structure = 'inner' AND phase = 0 LIMIT 1"
    )
    [(number, path)] = ask(conn, f"SELECT instance_number, path FROM image_all WHERE sample_id = {old}")
    original = Path(path).read_bytes()
    edit(Path(path), brighter=True)
    summary = take_in(study)
    assert (summary.images, summary.paired) == (6, 9)
    changed = [name for name in ("inner", "outer") if (name, number) in ALL_FED]
    assert [rule for rule, _ in open_flags(conn)] == ["FILE-CHANGED"] + ["PAIR-CHANGED"] * len(changed)
    assert fed(conn) == ALL_FED - {(name, number) for name in changed}
    # The old image: its place is gone, its pairing and mask are history.
    assert ask(conn, f"SELECT path FROM image_all WHERE sample_id = {old}") == [(None,)]
    assert ask(conn, f"SELECT pairing_state, area_px > 0 FROM annotation_all WHERE sample_id = {old} AND annotation_id = {drawn}") == [
        ("rejected", True)
    ]
    # The key is what the file's UID says, as in a catalog that never saw the old one; phases do not shift.
    assert ask(conn, f"SELECT count(*) FROM sample WHERE sample_key = '{key}' AND sample_id <> {old}") == [(len(changed),)]
    assert {phase for (phase,) in ask(conn, "SELECT phase FROM image_all WHERE path IS NOT NULL")} == {0, 1}
    before = tuples(conn)
    take_in(study)
    assert tuples(conn) == before
    # A person looks and agrees.
    conn.execute("UPDATE flag SET state = 'resolved', closed_by = 'kim', closed_at = now() WHERE rule = 'PAIR-CHANGED'")
    take_in(study)
    assert fed(conn) == ALL_FED
    # Or the old file comes back: what was, is again.
    Path(path).write_bytes(original)
    take_in(study)
    assert fed(conn) == ALL_FED
    assert ask(conn, f"SELECT sample_id, annotation_id FROM sample WHERE sample_key = '{key}' AND structure = 'inner'") == [(old, drawn)]
    assert ask(conn, "SELECT count(*) FROM image") == [(7,)]


def test_drawn_again_after_the_pixels_changed(study: Path, conn: Conn, take_in: Callable[..., Summary]) -> None:
    """Contours drawn on a replaced image wait for a person; drawn anew, they are fed."""
    take_in(study)
    edit(image(study, 2), brighter=True, SOPInstanceUID="2.25.1")
    take_in(study)
    assert fed(conn) == ALL_FED - {("inner", 2)}
    contour(study, 2).write_text("10 10\n30 10\n30 30\n10 30\n")
    take_in(study)
    assert fed(conn) == ALL_FED
    assert [rule for rule, _ in open_flags(conn)] == ["FILE-CHANGED"]


def test_header_corrected_in_place(study: Path, conn: Conn, take_in: Callable[..., Summary]) -> None:
    """A header corrected around the same pixels changes the rows, makes no image and no flag; phases and areas follow."""
    take_in(study)
    before = ask(conn, "SELECT sample_id, sample_key, structure FROM sample ORDER BY 1, 2, 3")
    edit(image(study, 1), PixelSpacing=["2", "3"], InstanceNumber=101, TriggerTime="9000", RescaleSlope="2", RescaleIntercept="-5")
    summary = take_in(study)
    assert (summary.files_read, summary.images, summary.standing_errors) == (1, 6, 0)
    assert ask(conn, "SELECT sample_id, sample_key, structure FROM sample ORDER BY 1, 2, 3") == before
    changed = "SELECT row_spacing, column_spacing, area_mm2 / area_px, phase, instance_number FROM sample WHERE path LIKE '%/1.dcm'"
    assert set(ask(conn, changed)) == {(2.0, 3.0, 6.0, 1, 101)}
    assert ask(conn, "SELECT slope, intercept FROM image WHERE slope <> 1") == [(2.0, -5.0)]
    assert ask(conn, "SELECT phase FROM image_all WHERE path LIKE '%/2.dcm'") == [(0,)]
    assert open_flags(conn) == []


def test_corrected_series_uid_moves_the_image(study: Path, conn: Conn, take_in: Callable[..., Summary]) -> None:
    """Series UIDs corrected around the same pixels: what was drawn goes on being fed, under the same keys as before."""
    take_in(study)
    keys = ask(conn, "SELECT sample_key, structure FROM sample ORDER BY 1, 2")
    for number in range(1, 7):
        edit(image(study, number), SeriesInstanceUID="2.25.77")
    take_in(study)
    assert ask(conn, "SELECT sample_key, structure FROM sample ORDER BY 1, 2") == keys
    assert ask(conn, "SELECT DISTINCT series_instance_uid FROM sample") == [("2.25.77",)]
    assert open_flags(conn) == [] and fed(conn) == ALL_FED


def test_contour_changed(study: Path, conn: Conn, take_in: Callable[..., Summary]) -> None:
    """A changed contour is a new version: `sample` shows it, the old one and its mask stay; rewritten alike it is none."""
    take_in(study)
    old = ask(conn, "SELECT annotation_id, area_px FROM sample WHERE structure = 'inner' AND instance_number = 3")
    contour(study, 3).write_text("10 10\n20 10\n20 20\n10 20\n")
    contour(study, 4).write_bytes(contour(study, 4).read_bytes().replace(b"\n", b"\r\n"))
    summary = take_in(study)
    assert (summary.files_read, summary.annotations, summary.paired, summary.masks) == (2, 9, 9, 9)
    assert ask(conn, "SELECT area_px FROM sample WHERE structure = 'inner' AND instance_number = 3") == [(100,)]
    history = (
        "SELECT annotation_id, area_px, version, current, pairing_state FROM annotation_all "
        "WHERE instance_number = 3 AND structure = 'inner'"
    )
    assert sorted(ask(conn, history))[0] == (*old[0], 1, False, "accepted")
    assert sorted(ask(conn, history))[1][2:] == (2, True, "accepted")
    assert ask(conn, "SELECT max(version) FROM annotation_all WHERE instance_number = 4") == [(1,)]


def test_gone_and_back(study: Path, conn: Conn, take_in: Callable[..., Summary], tmp_path: Path) -> None:
    """Files that are gone are missing and not fed; when they return all is as it was, with the flags they had, and nothing twice."""
    contour(study, 5).write_text("900 900\n950 900\n950 950\n")
    contour(study, 6).write_text("10 10\n12 12\n")
    take_in(study)
    before, flags = content(conn), open_flags(conn)
    assert flags == [
        ("CONTOUR-POINTS", str(contour(study, 6).relative_to(study))),
        ("MASK-EMPTY", str(contour(study, 5).relative_to(study))),
    ]
    away = [image(study, 1), contour(study, 2), contour(study, 5), contour(study, 6)]
    for number, path in enumerate(away):
        path.rename(tmp_path / str(number))
    summary = take_in(study)
    assert (summary.missing, summary.images, summary.annotations) == (4, 5, 6)
    assert fed(conn) == ALL_FED - {("inner", number) for number in (1, 2, 5, 6)} - {("outer", 1)}
    assert {rule for rule, _ in open_flags(conn)} == {"PAIR-NO-IMAGE"}  # image 1's two contours
    for number, path in enumerate(away):
        (tmp_path / str(number)).rename(path)
    assert take_in(study).missing == 0
    after = content(conn)
    assert {name: rows for name, rows in after.items() if name not in ("flag", "error")} == {
        name: rows for name, rows in before.items() if name not in ("flag", "error")
    }
    assert open_flags(conn) == flags


def test_repaired_file(study: Path, conn: Conn, take_in: Callable[..., Summary]) -> None:
    """A flag on a file that could not be read ends when it can be, when it is gone, and when it was an image and is junk now."""
    whole = {number: image(study, number).read_bytes() for number in (1, 2, 3)}
    for number in (1, 2, 3):
        image(study, number).write_bytes(whole[number][:3000])
    assert take_in(study).standing_errors == 3 + 5
    image(study, 1).write_bytes(whole[1])
    image(study, 2).unlink()
    contour(study, 2).unlink()
    image(study, 3).unlink()
    image(study, 3).with_name("other").write_bytes(whole[3])
    assert take_in(study).standing_errors == 0  # contour 3 finds its image by InstanceNumber
    assert open_flags(conn) == []
    assert fed(conn) == ALL_FED - {("inner", 2)}
    assert ask(conn, "SELECT pairing_method FROM sample WHERE instance_number = 3") == [("instance-number",)] * 2
    image(study, 3).with_name("other").write_text("no image any more")
    assert take_in(study).standing_errors == 2
    assert fed(conn) == ALL_FED - {("inner", 2), ("inner", 3), ("outer", 3)}
    assert ask(conn, "SELECT state, kind FROM file WHERE path LIKE '%/other'") == [("present", "other")]


def test_one_image_in_two_files(study: Path, conn: Conn, take_in: Callable[..., Summary]) -> None:
    """The same UID and pixels in two files are one image with two places; when the preferred goes, or is replaced, the other serves."""
    shutil.copy(image(study, 1), image(study, 1).with_name("copy"))
    shutil.copy(image(study, 1), image(study, 1).with_name("1.IMA"))  # of the same number, too: still one image
    assert take_in(study).images == 6
    places = (
        "SELECT f.path, l.preferred FROM location l JOIN file f ON f.id = l.file_id "
        "WHERE l.image_id IN (SELECT image_id FROM location GROUP BY 1 HAVING count(*) > 1) ORDER BY 1"
    )
    assert [path.rpartition("/")[2] for path, _ in ask(conn, places)] == ["1.IMA", "1.dcm", "copy"]
    assert [preferred for _, preferred in ask(conn, places)].count(True) == 1
    assert fed(conn) == ALL_FED and open_flags(conn) == []
    served = "SELECT path FROM sample WHERE structure = 'outer' AND instance_number = 1"
    for _ in range(2):
        [(path,)] = ask(conn, served)
        Path(path).unlink()
        take_in(study)
        assert ask(conn, served) != [(path,)]
    [(path,)] = ask(conn, served)
    assert fed(conn) == ALL_FED
    shutil.copy(path, image(study, 1).with_name("1.x"))
    take_in(study)
    edit(Path(path), brighter=True, SOPInstanceUID="2.25.9")
    take_in(study)
    assert ask(conn, "SELECT count(*) FROM image i WHERE NOT EXISTS (SELECT FROM location l WHERE l.image_id = i.id AND l.preferred)") == [
        (0,)
    ]


def test_one_uid_of_two_contents(
    study: Path, conn: Conn, take_in: Callable[..., Summary], new_database: Callable[[], str], tmp_path: Path
) -> None:
    """One UID on other pixels: two images, both flagged and not fed, whose keys do not depend on which came first; one goes: well again."""
    take_in(study)
    [(plain,)] = ask(conn, "SELECT sample_key FROM image_all WHERE instance_number = 1")
    other = image(study, 7)
    edit(image(study, 1), brighter=True, to=other)
    take_in(study)
    assert open_flags(conn) == [("UID-CONFLICT", "dicoms/SYN0001/1.dcm"), ("UID-CONFLICT", "dicoms/SYN0001/7.dcm")]
    assert fed(conn) == ALL_FED - {("inner", 1), ("outer", 1)}
    keys = ask(conn, "SELECT path, sample_key FROM image_all ORDER BY 1")
    assert len({key for _, key in keys}) == 7 and plain not in {key for _, key in keys}
    second = new_database()
    with database.open_database(second) as db, ThreadPoolExecutor(1) as threads, psycopg.connect(second, autocommit=True) as there:
        image(study, 1).rename(tmp_path / "1.dcm")
        ingest.ingest(db, study, executor=threads)
        (tmp_path / "1.dcm").rename(image(study, 1))
        ingest.ingest(db, study, executor=threads)
        assert ask(there, "SELECT path, sample_key FROM image_all ORDER BY 1") == keys
    other.unlink()
    assert take_in(study).standing_errors == 0
    assert fed(conn) == ALL_FED
    edit(image(study, 1), brighter=True, to=other)
    assert take_in(study).standing_errors == 2


def test_missing_uid(study: Path, conn: Conn, take_in: Callable[..., Summary], new_database: Callable[[], str]) -> None:
    """Images without a SOPInstanceUID are catalogued, fed and told apart by their pixels, in any catalog under the same keys."""
    for number in (1, 2, 3):
        edit(image(study, number), SOPInstanceUID="")
    assert take_in(study).standing_errors == 0
    assert fed(conn) == ALL_FED
    keys = ask(conn, "SELECT path, sample_key FROM image_all ORDER BY 1")
    assert len({key for _, key in keys}) == 6
    second = new_database()
    with database.open_database(second) as db, ThreadPoolExecutor(1) as threads, psycopg.connect(second, autocommit=True) as there:
        for number in (3, 1, 2):  # in another order
            os.utime(image(study, number))
            ingest.ingest(db, study, executor=threads)
        assert ask(there, "SELECT path, sample_key FROM image_all ORDER BY 1") == keys


def test_same_content_in_two_roots(study: Path, conn: Conn, take_in: Callable[..., Summary], tmp_path: Path) -> None:
    """A copy of a root adds places; a copy with corrected series UIDs adds images; neither stops the ingest, and names are made unique."""
    take_in(study)
    for name in ("copy", "corrected"):
        shutil.copytree(study, tmp_path / name / "arrived")
    for number in range(1, 7):
        edit(image(tmp_path / "corrected" / "arrived", number), SeriesInstanceUID="2.25.77")
    assert take_in(tmp_path / "copy" / "arrived").images == 6
    assert ask(conn, "SELECT count(*) FROM image") == [(6,)]
    take_in(tmp_path / "corrected" / "arrived")
    assert ask(conn, "SELECT count(*), count(DISTINCT sample_key) FROM image") == [(12, 12)]
    assert ask(conn, "SELECT name FROM root ORDER BY id") == [("arrived",), ("arrived-2",), ("arrived-3",)]
    with pytest.raises(CatalogError, match="in the catalog already, as arrived-2"):
        take_in(tmp_path / "copy" / "arrived", name="mine")


def test_phases(study: Path, conn: Conn, take_in: Callable[..., Summary]) -> None:
    """Phases are numbered by trigger time within a position, whatever the file numbers say and however the files came in."""
    later = image(study, 6).read_bytes()
    image(study, 6).unlink()
    for number, trigger in ((1, 500), (2, 20), (3, 100), (4, 100.5), (5, 800)):
        edit(image(study, number), TriggerTime=str(trigger))
    take_in(study)
    phases = "SELECT instance_number, phase FROM image_all ORDER BY 1"
    assert ask(conn, phases) == [(1, 1), (2, 0), (3, 0), (4, 1), (5, 0)]
    image(study, 6).write_bytes(later)
    edit(image(study, 6), TriggerTime="30")
    take_in(study)
    assert ask(conn, phases) == [(1, 1), (2, 0), (3, 0), (4, 1), (5, 1), (6, 0)]


def test_a_table_that_goes_wrong_is_a_run_of_its_own(study: Path, conn: Conn, take_in: Callable[..., Summary]) -> None:
    """What comes to be wrong with the tree itself, and that it was put right, is on record each once, though no file is read again."""
    link = study / "link.csv"
    whole = link.read_text()
    for text in (whole, whole + "SYN0009,SC-SYN-0009\n", whole):
        link.write_text(text)
        for _ in range(2):
            take_in(study)
    runs = "SELECT r.files_read, e.code FROM ingest_run r LEFT JOIN ingest_error e ON e.ingest_run_id = r.id ORDER BY r.id"
    assert ask(conn, runs) == [(15, None), (0, "link-no-folder"), (0, None)]


# ---------------------------------------------------------------------------------------------------- stopped


def program(
    tmp_path: Path,
    *,
    slow: float = 0.0,
    lethal: str = "no such file",
    held: str = "no such file",
    files_per_task: int = 4,
    patience: int = 300,
) -> dict[str, str]:
    """Return an environment in which reading an image takes longer, or one file kills its reader, and commits are small.

    An image that is `held` is not read before there is tmp_path / "go on"; a process that reads it ends after `patience` seconds.
    """
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(f"""
import os, signal, time
from catalog import ingest, reading
ingest.FILES_PER_COMMIT, reading.FILES_PER_TASK, reading.PATIENCE_S = 10, {files_per_task}, {patience}
read_dicom = reading._read_dicom
def read(path, entry, hashing):
    time.sleep({slow})
    while {held!r} in str(path) and not os.path.exists({str(tmp_path / "go on")!r}):
        time.sleep(0.02)
    if {lethal!r} in str(path):
        os.kill(os.getpid(), signal.SIGKILL)
    return read_dicom(path, entry, hashing)
reading._read_dicom = read
""")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}


def start(folder: Path, environment: dict[str, str], *options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "catalog.cli", "ingest", folder, "--jobs", "1", *options]
    return subprocess.Popen(  # type: ignore[call-overload, no-any-return]
        list(map(str, command)), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/", start_new_session=True
    )


def group(leader: int) -> list[int]:
    """Return the pids that are left of a process group."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            fields = (entry / "stat").read_text().rpartition(") ")[2].split() if entry.name.isdigit() else []
        except OSError:
            continue
        if fields and int(fields[2]) == leader and fields[0] != "Z":
            found.append(int(entry.name))
    return found


def test_killed_at_any_moment(
    three: Path, conn: Conn, database_url: str, new_database: Callable[[], str], tmp_path: Path, take_in: Callable[..., Summary]
) -> None:
    """Killed by -9 at eight random moments or more and begun again, an ingest ends with what it would have written undisturbed.

    Each time whole files are there only, no reading process stays, and the killed run is on record as interrupted.
    """
    spoil(three)
    take_in(three)
    undisturbed = content(conn)
    total = len(undisturbed["file"])
    random_moments = random.Random(2026)
    environment = program(tmp_path, slow=0.004)
    kills = 0
    for catalogs in range(10):
        if catalogs >= 2 and kills >= 5:  # else more of them: the others had ended by then
            break
        url = new_database()
        with psycopg.connect(url, autocommit=True) as there:
            for moment in sorted(random_moments.randrange(total + 5) for _ in range(4)):
                process = start(three, {**environment, "CATALOG_DATABASE_URL": url})
                assert wait_until(
                    lambda moment=moment, process=process, there=there: (  # type: ignore[misc]
                        ask(there, "SELECT count(*) FROM file")[0][0] >= moment or process.poll() is not None
                    )
                )
                time.sleep(random_moments.random() * 0.1)
                with contextlib.suppress(ProcessLookupError):  # the others had ended by then
                    os.kill(process.pid, signal.SIGKILL) if random_moments.random() < 0.5 else os.killpg(process.pid, signal.SIGKILL)
                kills += process.wait() == -signal.SIGKILL
                process.communicate()
                assert wait_until(lambda process=process: group(process.pid) == [])  # type: ignore[misc]
                orphans = (
                    "SELECT count(*) FROM file f WHERE kind = 'image' AND state = 'present' "
                    "AND NOT EXISTS (SELECT FROM location WHERE file_id = f.id)"
                )
                assert ask(there, orphans) == [(0,)]
            with database.open_database(url) as db, ThreadPoolExecutor(1) as threads:
                ingest.ingest(db, three, executor=threads)
                assert content(there) == undisturbed
                states = [state for (state,) in ask(there, "SELECT state FROM ingest_run ORDER BY id")]
                assert states[-1] == "finished" and "running" not in states
                before = tuples(there)
                ingest.ingest(db, three, executor=threads)
                assert tuples(there) == before
    assert kills >= 5


def test_reader_that_dies(three: Path, conn: Conn, catalog: Run, tmp_path: Path) -> None:
    """A file that kills the process which reads it is refused; every other file comes in, also those that were being read."""
    done = catalog("ingest", three, "--jobs", 2, env=program(tmp_path, lethal="SYN0002/11.dcm", files_per_task=16))
    assert done.returncode == 3 and done.stderr.count("\n") == 1, done.stderr
    died = "SELECT path, code FROM ingest_error WHERE stage = 'read'"
    assert ask(conn, died) == [("dicoms/SYN0002/11.dcm", "reader-died")]
    assert ask(conn, "SELECT count(*) FROM image") == [(47,)]


def test_executor_that_breaks(three: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An executor of the caller's whose process dies, with work handed over and work not yet, loses no file."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    _, found = ingest.find(three)
    for name, value in program(tmp_path, lethal="/11.dcm").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(reading, "FILES_PER_TASK", 2)
    monkeypatch.setattr(reading, "TASKS_AT_ONCE", 2)
    seen: list[tuple[int, int]] = []
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        results = list(
            reading.read_all(
                str(three),
                found.images[:12],
                hashing="full",
                jobs=None,
                executor=pool,
                progress=lambda done, total: seen.append((done, total)),
            )
        )
    assert sorted(result.entry.path for result in results) == sorted(item.entry.path for item in found.images[:12])
    assert [result.code for result in results if isinstance(result, reading.Refused)] == ["reader-died"]
    assert seen[-1] == (12, 12)


def test_reading_that_comes_to_no_end(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file over which a decoder runs for ever is refused as one that kills its reader; every other file is read."""
    _, found = ingest.find(study)
    for name, value in program(tmp_path, held="/3.dcm", patience=3).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(reading, "FILES_PER_TASK", 1)
    todo = found.images[2:4]
    end = threading.Timer(60, (tmp_path / "go on").touch)  # so that without an alarm this fails, and does not hang
    end.start()
    try:
        results = list(reading.read_all(str(study), todo, hashing="full", jobs=1, executor=None, progress=lambda done, total: None))
    finally:
        end.cancel()
    assert sorted(result.entry.path for result in results) == sorted(item.entry.path for item in todo)
    [refused] = [result for result in results if not isinstance(result, reading.Read)]
    assert isinstance(refused, reading.Refused) and (Path(refused.entry.path).name, refused.code) == ("3.dcm", "reader-died")


def test_executor_that_takes_no_more(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An executor that is found broken when work is handed over loses nothing either: processes of our own read the rest."""
    _, found = ingest.find(study)

    class Breaking(Counting):
        def submit(self, fn: Any, /, folder: str, items: Any, hashing: Any) -> Any:  # type: ignore[override]
            if self.paths:
                raise BrokenExecutor
            return super().submit(fn, folder, items, hashing)

    monkeypatch.setattr(reading, "FILES_PER_TASK", 5)
    todo = [*found.images, *found.annotations]
    results = list(reading.read_all(str(study), todo, hashing="full", jobs=1, executor=Breaking(), progress=lambda done, total: None))
    assert sorted(result.entry.path for result in results) == sorted(item.entry.path for item in todo)


@pytest.mark.parametrize("files", [0, 10], ids=["at once", "midway"])
def test_interrupted(three: Path, conn: Conn, tmp_path: Path, take_in: Callable[..., Summary], files: int) -> None:
    """Ctrl-C ends at once with exit code 130 and one line; the run is on record, and the next goes on."""
    process = start(three, program(tmp_path, held="SYN0002/1.dcm" if files else "SYN0001/1.dcm"))
    assert process.stderr is not None
    assert wait_until(lambda: len(group(process.pid)) > 2 and ask(conn, "SELECT count(*) FROM file")[0][0] >= files)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)  # what is being read would not come to an end
    assert (process.returncode, said) == (130, "catalog: interrupted; the same command goes on where this one ended\n")
    assert wait_until(lambda: group(process.pid) == [])
    [(done, state)] = ask(conn, "SELECT (SELECT count(*) FROM file), (SELECT max(state) FROM ingest_run)")
    assert state == ("interrupted" if files else None)
    summary = take_in(three)
    assert summary.files_read == 66 - done
    assert ask(conn, "SELECT state FROM ingest_run ORDER BY id DESC LIMIT 1") == [("finished",)]


def test_ctrl_c_waits_until_a_reader_has_begun() -> None:
    """Ctrl-C that another thread takes, as those of NumPy's BLAS do, interrupts no half started process: it comes when that has begun."""
    over, begun = threading.Event(), False
    other = threading.Thread(target=over.wait)
    other.start()
    try:
        with pytest.raises(KeyboardInterrupt), processes._undisturbed():
            assert other.ident is not None
            signal.pthread_kill(other.ident, signal.SIGINT)
            time.sleep(0.1)
            begun = True
    finally:
        over.set()
        other.join()
    assert begun


def test_two_at_once(three: Path, conn: Conn, tmp_path: Path) -> None:
    """Of two first ingests of one root one waits and says so; each file is read once."""
    environment = program(tmp_path, held="SYN0001/1.dcm")
    with conn.transaction():
        conn.execute("SELECT pg_advisory_xact_lock(%s, 0)", [ingest.LOCK_CLASS])
        both = [start(three, environment, "--json") for _ in range(2)]
        at_the_gate = (
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted "
            "AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
        )
        assert wait_until(lambda: ask(conn, at_the_gate) == [(2,)])
    assert wait_until(lambda: ask(conn, f"{at_the_gate} AND objid <> 0") == [(1,)])  # one for the other, which has the root
    (tmp_path / "go on").touch()
    said = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    waiting = "catalog: another ingest of this root is running; waiting for it\n"
    assert sorted(errors for _, errors in said) == ["", waiting]
    assert sorted(json.loads(output)["files_read"] for output, _ in said) == [0, 66]
    assert ask(conn, "SELECT count(*) FROM root") == [(1,)]
    assert ask(conn, "SELECT files_seen, files_read, errors, state FROM ingest_run") == [(66, 66, 0, "finished")]


def test_killed_at_the_last_moment(study: Path, conn: Conn, take_in: Callable[..., Summary]) -> None:
    """A run that was killed when all was written but its own end does not stand as running for ever."""
    take_in(study)
    conn.execute("UPDATE ingest_run SET state = 'running', finished_at = NULL")
    assert take_in(study).files_read == 0
    assert ask(conn, "SELECT state FROM ingest_run ORDER BY id") == [("interrupted",), ("finished",)]
    before = tuples(conn)
    take_in(study)
    assert tuples(conn) == before


def test_small_commits(study: Path, conn: Conn, take_in: Callable[..., Summary], monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are committed by a number, not all at the end: another connection sees the first while the last are read."""
    monkeypatch.setattr(ingest, "FILES_PER_COMMIT", 5)
    monkeypatch.setattr(reading, "FILES_PER_TASK", 1)
    monkeypatch.setattr(pairings, "MASKS_PER_COMMIT", 2)
    seen = []
    take_in(study, progress=lambda done, total: seen.append(ask(conn, "SELECT count(*) FROM file")[0][0]))
    assert {0, 5, 10} <= set(seen)
    assert ask(conn, "SELECT count(*), count(DISTINCT ingest_run_id) FROM file") == [(15, 1)]
    assert fed(conn) == ALL_FED


# ---------------------------------------------------------------------------------------------------- the command


def test_dry_run(study: Path, catalog: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--dry-run says what would be found, as text or JSON, touches no database and makes no CATALOG_HOME."""
    monkeypatch.delenv("CATALOG_DATABASE_URL", raising=False)
    before = sorted(tmp_path.rglob("*"))
    done = catalog("ingest", study, "--dry-run", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout) == {
        "layout": "sunnybrook",
        "chosen": ["sunnybrook (link.csv beside dicoms/ or contourfiles/)"],
        "images": 6,
        "annotations": 9,
        "paired": 9,
        "proposed": [],
        "by_content": [],
        "left_over": 0,
        "unpaired": [],
        "problems": [],
    }
    assert "6 image files, 9 annotation files: 9 would be paired" in catalog("ingest", study, "--dry-run", "--layout", "sunnybrook").stdout
    assert sorted(tmp_path.rglob("*")) == before
    (study / "link.csv").write_text("patient,original\n")
    done = catalog("ingest", study, "--dry-run", "--json")
    assert done.returncode == 3
    found = json.loads(done.stdout)
    assert len(found["unpaired"]) == 9 and [problem["code"] for problem in found["problems"]] == ["link-columns"]
    done = catalog("ingest", study, "--dry-run", "--layout", "other")
    assert done.returncode == 2 and "there is no such layout; there is: sunnybrook" in done.stderr


def test_json(study: Path, database_url: str, catalog: Run) -> None:
    """--json prints the summary, and nothing else, on stdout."""
    done = catalog("ingest", study, "--json", "--name", "first", "--jobs", 1)
    assert (done.returncode, done.stderr) == (0, "")
    summary = json.loads(done.stdout)
    assert summary.pop("seconds") > 0
    assert summary == {
        "root": str(study), "layout": "sunnybrook", "chosen": ["sunnybrook (link.csv beside dicoms/ or contourfiles/)"],
        "images": 6, "annotations": 9, "files_read": 15, "fell_back": 0, "missing": 0, "moved": 0, "paired": 9, "proposed": 0,
        "unpaired": 0, "masks": 9, "standing_errors": 0, "left_over": 0,
    }  # fmt: skip
