"""Pseudonymized catalogs: keyed hashes in the place of identities, and all else as in a catalog that has names."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import psycopg
import pydicom
import pydicom.encaps
import pydicom.uid
import pytest

from catalog import database, edges, ingest, measuring, places, pseudonyms, reading, roles, staged, terms
from catalog.errors import CatalogError, UsageError
from catalog.ingest import LOCK_CLASS
from catalog.layouts import Entry, Found, Image, Problem
from catalog.pseudonyms import Pseudonyms
from catalog.records import Drawn
from tests.conftest import DATA, Run
from tests.processes import wait_until

KEY = bytes(range(32))


@contextlib.contextmanager
def threads(jobs: int | None, tasks: int) -> Iterator[Executor]:
    """In the place of processes, of which each takes a second to begin; commands, which are processes themselves, have theirs."""
    with ThreadPoolExecutor(1) as pool:
        yield pool


@pytest.fixture(autouse=True)
def _threads(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (reading, measuring, edges):
        monkeypatch.setattr(module, "processes", threads)


@pytest.fixture
def key(tmp_path: Path) -> Path:
    """A key's file."""
    path = tmp_path / "key"
    path.write_bytes(KEY)
    path.chmod(0o600)
    return path


@pytest.fixture
def tree(tmp_path: Path, studies: Path) -> Path:
    """The synthetic studies, to be changed."""
    return Path(shutil.copytree(studies, tmp_path / "Doe^Jane"))


def take(db: database.Database, folder: Path, *, key: bytes = KEY, **how: Any) -> ingest.Summary:
    keep = how.pop("keep", ())
    dates = how.pop("dates", None)
    return ingest.ingest(db, folder, jobs=1, names=Pseudonyms(key, keep=keep, dates=dates), **how)


def one(conn: psycopg.Connection, query: str, *parameters: Any) -> Any:
    row = conn.execute(query, parameters).fetchone()  # type: ignore[arg-type]
    assert row is not None
    return row[0]


COUNTED = """
SELECT (SELECT count(*) FROM patient), (SELECT count(*) FROM study), (SELECT count(*) FROM series), (SELECT count(*) FROM instance),
       (SELECT count(*) FROM image), (SELECT count(*) FROM file), (SELECT count(*) FROM location), (SELECT count(*) FROM annotation),
       (SELECT array_agg(s ORDER BY s) FROM (
           SELECT state || method || score || count(*) AS s FROM pairing GROUP BY state, method, score) x),
       (SELECT array_agg(r ORDER BY r) FROM (SELECT rule || count(*) AS r FROM flag WHERE state = 'open' GROUP BY rule) y)
"""
# What is drawn on which pixels, whatever they are called.
MASKS = """
SELECT encode(i.pixel_hash, 'hex'), i.phase, i.position, p.state, p.method, m.rows, m.columns, m.box_row, m.box_column,
       encode(m.bits, 'hex'), a.kind, a.label
FROM image i LEFT JOIN pairing p ON p.image_id = i.id LEFT JOIN annotation a ON a.id = p.annotation_id
LEFT JOIN mask m ON m.pairing_id = p.id ORDER BY 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12
"""


def same(first: psycopg.Connection, second: psycopg.Connection) -> None:
    for query in (COUNTED, MASKS):
        assert first.execute(query).fetchall() == second.execute(query).fetchall()


# ------------------------------------------------------------------------------------------ what stands for what


def test_values() -> None:
    """A known answer keeps it so: the same key and name give the same on any machine, version and PYTHONHASHSEED."""
    names = Pseudonyms(KEY, dates="shift")
    said = [names.patient("SCD0000101"), names.uid("1.2.3"), names.path("a/b/a"), names.name("liver"), names.date("20200229", "SCD0000101")]
    assert said == [
        "P-2578d8e82e47b5814c737158",
        "2.25.323208961630152073077901537594917788276",
        "792389ac20d6df944dcf9be7/3c30d2f0f809811986c5d5b4/792389ac20d6df944dcf9be7",
        "N-010e5c4117564137fedac658",
        "20120816",
    ]
    code = (
        "from catalog.pseudonyms import Pseudonyms; n = Pseudonyms(bytes(range(32)), dates='shift'); "
        "print(n.patient('SCD0000101'), n.uid('1.2.3'))"
    )
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        )
        assert done.stdout.split() == said[:2]


@hypothesis.given(st.text(min_size=1), st.text(min_size=1))
def test_injective(first: str, second: str) -> None:
    """Different names get different hashes, equal ones equal; a UID's is a valid UID; nothing stays empty or becomes it."""
    names, again, other = Pseudonyms(KEY), Pseudonyms(KEY), Pseudonyms(KEY[::-1])
    stored = [text.encode(errors="replace").decode().replace("\0", "\ufffd") for text in (first, second)]
    assert (names.patient(first) == names.patient(second)) == (stored[0] == stored[1])
    assert names.uid(first) == again.uid(first) != other.uid(first)
    assert re.fullmatch(r"2\.25\.(0|[1-9][0-9]{0,38})", names.uid(first))
    assert names.uid("") == names.patient("") == ""


@hypothesis.given(st.dates(datetime.date(1930, 1, 1)), st.dates(datetime.date(1930, 1, 1)), st.text(min_size=1))
def test_dates(first: datetime.date, second: datetime.date, patient: str) -> None:
    """A patient's dates keep their distance and are not what they were; dropped ones are empty, and what is no date is not kept."""
    names = Pseudonyms(KEY, dates="shift")

    def moved(day: datetime.date) -> datetime.date:
        text = names.date(day.isoformat().replace("-", ""), patient)
        return datetime.date(int(text[:4]), int(text[4:6]), int(text[6:]))

    assert moved(first) - moved(second) == first - second
    assert 1 <= (first - moved(first)).days <= pseudonyms.MOST_DAYS
    assert Pseudonyms(KEY, dates="drop").date("20200101", patient) == ""
    assert names.date("Jane Doe", patient) == names.date("20201301", patient) == names.date("00010101", patient) == ""


@hypothesis.given(
    st.lists(st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=80)
)
def test_paths(parts: list[str]) -> None:
    """What lies below a folder lies below what stands for it, so that layouts' folders still mean something; and the index holds it."""
    names = Pseudonyms(KEY)
    whole = names.path("/".join(parts))
    assert len(whole.encode()) < 2_704
    for depth in range(1, min(len(parts), pseudonyms.DEEPEST)):
        assert whole.startswith(names.path("/".join(parts[:depth])) + "/")
    assert whole.split("/")[0] == names.patient(parts[0])[2:]


TEXT = st.text(max_size=30)


@hypothesis.given(TEXT, TEXT, TEXT, TEXT, TEXT, st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1))
def test_rows(patient: str, study: str, series: str, instance: str, modality: str, path: str) -> None:
    """Of a line for COPY every text that a file can choose is replaced, whatever stands in it, and the rest stays to the byte."""
    names = Pseudonyms(KEY, dates="shift")
    item = Image(Entry(path, 1, 1), None, sure=True)
    found = INSTANCE._replace(patient, study, series, instance, modality)
    line = staged.rows(item, found, patient)
    fields = line.decode()[:-1].split("\t")
    done = names.rows(line).decode()[:-1].split("\t")
    at = pseudonyms.AT
    assert done[at["path"]] == names.path(path)
    assert done[at["patient"]] == names.patient(patient)
    assert done[at["sop_instance_uid"]] == names.uid(instance)
    assert done[at["study_instance_uid"]] == names.uid(study)
    assert done[at["modality"]] in terms.MODALITIES | {""}
    replaced = {"path", "patient", "study_instance_uid", "series_instance_uid", "sop_instance_uid", "frame_of_reference_uid", "study_date",
                "modality", "sop_class_uid", "transfer_syntax_uid", "burned_in_annotation", "identity_removed"}  # fmt: skip
    for name in pseudonyms.COLUMNS:
        if name not in replaced:
            assert done[at[name]] == fields[at[name]], name


class _Instance:
    """An instance whose texts hypothesis chooses."""

    def _replace(self, patient: str, study: str, series: str, instance: str, modality: str) -> Any:
        from catalog.records import Frame, Instance

        frame = Frame(0, 2, 3, 1, "MONOCHROME2", 16, (1.0, 2.0), (1.0, 2.0, 3.0), None, 4.5, None, None, 1.0, 0.0, None, None,
                      b"\\x5c\n" * 8, 100, 12, "<i2")  # fmt: skip
        return Instance(patient, study, series, instance, study, modality, 7, modality, 3, None, study, series, 1, (frame,), "",
                        modality, modality, None, ("(0010,0010)", "(0010,0030)"))  # fmt: skip


INSTANCE = _Instance()


def test_columns() -> None:
    """A column that comes to `staged` is one that somebody thought about here."""
    known = set(re.findall(r"[a-z_0-9]+", """
        path patient study_instance_uid study_date series_instance_uid series_number modality sop_instance_uid sop_class_uid instance_number
        number_of_frames images_in_acquisition content_hash frame_of_reference_uid transfer_syntax_uid coding burned_in_annotation
        identity_removed over_89 identifying gantry_tilt other_meta_uid surplus_bytes frame rows columns samples_per_pixel photometric
        row_spacing column_spacing image_position image_orientation position slice_thickness trigger_time slope intercept modality_lut
        pixel_hash byte_offset byte_length dtype bits_stored"""))  # fmt: skip
    assert set(pseudonyms.COLUMNS) == known
    assert len(pseudonyms.COLUMNS) - pseudonyms.HEAD == staged.FRAME_COLUMNS


def test_drawn() -> None:
    """Of an annotation names, UIDs, paths and what a reader of the user's own adds are replaced; numbers and the label stay."""
    names = Pseudonyms(KEY, keep=["spleen"])
    plane = {"position": [1.5, 2, 3], "normal": None, "study_instance_uid": "1.3"}
    said = {
        "path": "Doe/1.dcm", "frame": 3, "sop_instance_uid": "1.2", "roi_number": 4, "plane": plane, "original_id": "Doe",
        "mismatch": "Doe", "Doe": 5, "fractional_type": "Doe", "split": "Doe",
    }  # fmt: skip
    done = names.drawn(Drawn("4/1.2/Doe", "Jane's liver", "Dr Doe", "label", said, label="benign"))
    assert "Doe" not in repr(done) and "1.2'" not in repr(done) and "Jane" not in repr(done)
    assert done.label == "benign"
    assert done.refers_to["path"] == names.path("Doe/1.dcm")
    assert (done.refers_to["frame"], done.refers_to["roi_number"]) == (3, 4)
    assert done.refers_to["plane"] == {"position": [1.5, 2, 3], "normal": None, "study_instance_uid": names.uid("1.3")}
    kept = ("inner", "outer", "papillary1", "mask", "manual", "", "label 3", "ROI 12", "segment 1", "spleen", "AUTOMATIC")
    assert [names.name(name) for name in kept] == list(kept)
    for name in ("Inner", "label 3 Doe", "ROI 5551234567", names.name("liver")):
        assert re.fullmatch("N-[0-9a-f]{24}", names.name(name)) and names.name(name) != name


def test_messages() -> None:
    """In the place of a message that may quote its file stands a sentence for its code; a code that is none of ours is not kept either."""
    names = Pseudonyms(KEY)
    problems = [Problem("Doe/x", "unreadable", "Doe"), Problem("Doe/y", "Doe", "Doe"), Problem("Doe", "folder-unreadable", "Doe")]
    found = names.found(Found(problems=problems, chosen=["nifti (Doe: 3 NIfTI files)", "dicom (Doe)"]), "nifti+dicom")
    assert "Doe" not in repr(found)
    assert found.chosen == ["nifti", "dicom"]
    assert {problem.code for problem in found.problems} == {"unreadable", "folder-unreadable"}
    refused = names.result(reading.Refused(Entry("Doe/x", 1, 1), "image", "dicom", "no-decoder", "private syntax 1.2.Doe"))
    assert "Doe" not in repr(refused)


# ------------------------------------------------------------------------------------------ the key


def test_key_file(tmp_path: Path, key: Path) -> None:
    """A key that is missing, too short, a folder, or others may read is refused as a wrong argument, in one line."""
    assert pseudonyms.read_key(key) == KEY
    short = tmp_path / "short"
    short.write_bytes(KEY[1:])
    short.chmod(0o600)
    for path in (short, tmp_path / "none", tmp_path):
        with pytest.raises(UsageError, match="nothing was changed") as error:
            pseudonyms.read_key(path)
        assert "\n" not in str(error.value)
    for mode in (0o640, 0o604, 0o620):
        key.chmod(mode)
        with pytest.raises(UsageError, match="chmod 600"):
            pseudonyms.read_key(key)


def test_another_key(hidden: database.Database, tree: Path) -> None:
    """A pseudonymized catalog takes its own key alone, and its own way with dates; nothing is written before that is seen."""
    with connected(hidden) as conn:
        before = conn.execute("SELECT count(*), (SELECT count(*) FROM root) FROM catalog_change").fetchone()
        with pytest.raises(UsageError, match="is not the key"):
            take(hidden, tree, key=KEY[::-1])
        with pytest.raises(UsageError, match="say --pseudonymize"):
            ingest.ingest(hidden, tree, jobs=1)
        with pytest.raises(UsageError, match="begun with --dates shift"):
            take(hidden, tree, dates="drop")
        assert conn.execute("SELECT count(*), (SELECT count(*) FROM root) FROM catalog_change").fetchone() == before


def test_catalog_with_names(ingested: str, tree: Path, key: Path, catalog: Run, conn: psycopg.Connection) -> None:
    """A catalog that holds identities is not made a pseudonymized one: exit code 2, one line, nothing written."""
    done = catalog("ingest", tree, "--pseudonymize", key, "--jobs", 1)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "begun without a key" in done.stderr
    assert one(conn, "SELECT count(*) FROM pseudonymization") == 0 and one(conn, "SELECT count(*) FROM root") == 1
    assert catalog("ingest", tree, "--dates", "drop").returncode == 2
    assert catalog("ingest", tree, "--keep-name", "liver").returncode == 2


# ------------------------------------------------------------------------------------------ as in a catalog with names


@pytest.fixture
def plain_url(new_database: Callable[..., str], full_template: str) -> str:
    """URL of a catalog of the same studies with their names."""
    return new_database(full_template)


@pytest.fixture
def plain(plain_url: str) -> Iterator[database.Database]:
    """That catalog."""
    with database.open_database(plain_url) as db:
        yield db


@pytest.fixture
def hidden(new_database: Callable[..., str], tree: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[database.Database]:
    """A pseudonymized catalog of the synthetic studies, which is also the one that commands use."""
    url = new_database()
    monkeypatch.setenv("CATALOG_DATABASE_URL", url)
    with database.open_database(url) as db:
        take(db, tree)
        yield db


def connected(db: database.Database) -> psycopg.Connection:
    return db.connect(autocommit=True)


def test_same_as_with_names(hidden: database.Database, plain: database.Database, tree: Path) -> None:
    """Counts, pairings, flags and every mask are those of a plain ingest of the same files, and an ingest again finds nothing to do."""
    with connected(hidden) as conn, connected(plain) as other:
        same(conn, other)
        changes = one(conn, "SELECT count(*) FROM catalog_change")
        again = take(hidden, tree)
        assert (again.files_read, again.moved, again.missing, again.standing_errors) == (0, 0, 0, 0)
        assert one(conn, "SELECT count(*) FROM catalog_change") == changes
        assert one(conn, "SELECT count(*) FROM ingest_run") == 1


@pytest.mark.parametrize("name", ["sunnybrook/final_data", "nifti", "rtstruct", "seg", "dicom"])
def test_real(name: str, new_database: Callable[..., str]) -> None:
    """So it is with real files of every kind: damaged ones, structure sets, segmentations, volumes."""
    if not (folder := DATA / name).is_dir():
        pytest.skip(f"the real files are not in {folder}; set SCANFEED_DATA")
    with database.open_database(new_database()) as first, database.open_database(new_database()) as second:
        summaries = ingest.ingest(first, folder, jobs=1), take(second, folder)
        for field in ("images", "annotations", "paired", "proposed", "unpaired", "masks", "standing_errors", "left_over", "fell_back"):
            assert getattr(summaries[0], field) == getattr(summaries[1], field), field
        with connected(first) as plain, connected(second) as conn:
            same(plain, conn)
            codes = "SELECT split_part(detail, ': ', 1), count(*) FROM flag WHERE rule = 'FILE-UNREADABLE' GROUP BY 1 ORDER BY 1"
            assert plain.execute(codes).fetchall() == conn.execute(codes).fetchall()


def test_nothing_of_whom(hidden: database.Database, tree: Path) -> None:
    """No column of the catalog's own schema holds a patient, a UID, a date, a path or the name of the folder."""
    header = pydicom.dcmread(next(tree.glob("dicoms/*/*.dcm")), stop_before_pixels=True)
    wanted = ["SYN0001", "SC-SYN", "Jane", "dicoms", ".dcm", "link.csv", str(header.StudyInstanceUID), str(header.SOPInstanceUID),
              str(header.SeriesInstanceUID), str(header.FrameOfReferenceUID), str(header.StudyDate), str(tree.parent)]  # fmt: skip
    with connected(hidden) as conn:
        tables = conn.execute("SELECT relname FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace").fetchall()
        for (table,) in tables:
            for (row,) in conn.execute(f"SELECT t::text FROM {table} t").fetchall():
                assert not [text for text in wanted if text in row], table
        assert one(conn, "SELECT count(*) FROM private.file_path WHERE path LIKE 'dicoms/SYN%%'") > 40
        assert conn.execute("SELECT url FROM private.root_url").fetchall() == [(str(tree),)]


def test_who_sees_paths(hidden: database.Database, catalog: Run, tree: Path) -> None:
    """The owner's `sample.path` is the file; to the login for SQL and the audit role it is NULL and `private` shut; `exposure` says so."""
    query = "SELECT count(*), count(path) FROM sample"
    with connected(hidden) as conn:
        whole = one(conn, "SELECT count(*) FROM sample")
        assert conn.execute(query).fetchone() == (whole, whole) and whole > 0
        assert Path(one(conn, "SELECT path FROM sample LIMIT 1")).is_file()
        done = catalog("sql", "--json", query)
        assert json.loads(done.stdout) == [{"count": whole, "count_1": 0}] or "0" in done.stdout
        assert catalog("sql", "SELECT path FROM private.file_path").returncode != 0
        roles = json.loads(catalog("db", "roles", "--json").stdout)
        audit = next(role["name"] for role in roles["roles"] if role["name"].endswith("_audit"))
        exposed = {
            role.rpartition("_")[2]: rights
            for role, *rights in conn.execute("SELECT role, reads_private, writes_private FROM exposure WHERE role ~ %s", [audit[:-6]])
        }
        assert exposed == {"owner": ["all", "all"], "ingest": ["all", "all"], "review": ["nothing", "nothing"],
                           "train": ["all", "nothing"], "audit": ["nothing", "nothing"]}  # fmt: skip
        with conn.transaction():
            conn.execute(f"SET LOCAL ROLE {audit}")
            assert conn.execute(query).fetchone() == (whole, 0)
            with pytest.raises(CatalogError, match="you may not know"):
                places.revealed(conn, ["8" * 24])
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                conn.execute("SELECT path FROM private.file_path")


def test_roles(new_database: Callable[..., str], tree: Path, tmp_path: Path) -> None:
    """Members of the ingest role take in with the key, find places and measure, without owning the catalog."""
    url = new_database()
    with database.open_database(url) as db:
        made, _ = roles.make(db)
    role = next(one.name for one in made if one.name.endswith("_ingest"))
    with database.open_database(f"{url}&options=-c%20role%3D{role}") as db:
        assert take(db, tree).images == 48
        assert take(db, tree).files_read == 0
        assert measuring.measure(db, jobs=1).measured == 48
        with connected(db) as conn:
            assert places.urls(conn) == {1: str(tree)}


def test_dates_and_originals(hidden: database.Database, tree: Path, new_database: Callable[..., str]) -> None:
    """Study dates are shifted by what the key says of their patient, or gone; the annotations' name of a patient is hashed as well."""
    names = Pseudonyms(KEY, dates="shift")
    header = pydicom.dcmread(tree / "dicoms" / "SYN0001" / "1.dcm", stop_before_pixels=True)
    with connected(hidden) as conn:
        row = conn.execute(
            "SELECT p.original_id, s.study_date, s.study_instance_uid FROM patient p JOIN study s ON s.patient_id = p.id "
            "WHERE p.patient_id = %s",
            [names.patient("SYN0001")],
        ).fetchone()
    assert row == (names.patient("SC-SYN-0001"), names.date(header.StudyDate, "SYN0001"), names.uid(header.StudyInstanceUID))
    with database.open_database(new_database()) as db:
        take(db, tree, dates="drop")
        with connected(db) as conn:
            assert one(conn, "SELECT array_agg(DISTINCT study_date) FROM study") == [""]


# ------------------------------------------------------------------------------------------ what comes later


def test_moved_changed_gone(hidden: database.Database, tree: Path) -> None:
    """A file that moved keeps its row and gets its new place; one that changed is read again; one that is gone is missing."""
    images = tree / "dicoms" / "SYN0002"
    images.rename(tree / "dicoms" / "SYN0002x")
    images.mkdir()
    for path in (tree / "dicoms" / "SYN0002x").iterdir():
        path.rename(images / f"1000{path.name}" if path.name == "7.dcm" else images / path.name)
    (tree / "dicoms" / "SYN0002x").rmdir()
    gone, changed = sorted((tree / "contourfiles").rglob("*icontour*.txt"))[:2]
    gone.unlink()
    changed.write_text(changed.read_text().replace("3", "4"))
    summary = take(hidden, tree)
    assert (summary.moved, summary.missing, summary.files_read) == (1, 1, 2)
    with connected(hidden) as conn:
        names = Pseudonyms(KEY)
        place = "SELECT p.path FROM file f JOIN place p ON p.file_id = f.id WHERE f.path = %s"
        assert one(conn, place, names.path("dicoms/SYN0002/10007.dcm")) == "dicoms/SYN0002/10007.dcm"
        assert one(conn, "SELECT count(*) FROM file WHERE state = 'missing'") == 1
        assert one(conn, "SELECT max(version) FROM annotation") == 2
        assert one(conn, "SELECT count(*) FROM place p JOIN file f ON f.id = p.file_id WHERE f.state = 'present' AND p.path IS NULL") == 0
        assert one(conn, "SELECT count(*) FROM image") == 48


def test_root_moved(hidden: database.Database, tree: Path, tmp_path: Path, catalog: Run) -> None:
    """A moved root is found in its new place by the same key, is said without the place, and its old folder can be a root anew."""
    new = tmp_path / "elsewhere"
    shutil.copytree(tree, new)
    with connected(hidden) as conn:
        changes = one(conn, "SELECT count(*) FROM catalog_change")
        done = catalog("root", "move", "root", new)
        assert done.returncode == 0 and "20 of 20 looked for were found there" in done.stdout
        assert str(tmp_path) not in done.stdout + done.stderr
        assert one(conn, "SELECT count(*) FROM catalog_change") == changes + 1
        assert one(conn, "SELECT url FROM private.root_url") == str(new)
        assert "nothing changed" in catalog("root", "move", "root", new).stdout
        assert take(hidden, new).files_read == 0
        summary = take(hidden, tree)
        assert summary.files_read > 0
        assert [name for (name,) in conn.execute("SELECT name FROM root ORDER BY id")] == ["root", "root-2"]
        refused = catalog("root", "move", "root-2", new)
        assert refused.returncode == 1 and "is the place of root 'root'" in refused.stderr and str(tmp_path) not in refused.stderr


def test_retry_and_errors(hidden: database.Database, tree: Path, key: Path, catalog: Run) -> None:
    """What cannot be read is said by hashes alone, `where` turns each back, and a retry with the key takes it in once it is whole."""
    path = tree / "dicoms" / "SYN0001" / "3.dcm"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    told = catalog("ingest", tree, "--pseudonymize", key, "--jobs", 1)
    assert told.returncode == 3
    errors, shown = catalog("errors"), catalog("runs", "show", 2)
    token = Pseudonyms(KEY).path("dicoms/SYN0001/3.dcm")
    assert f"root/{token}  [read: truncated]" in errors.stdout and token in shown.stdout
    found = catalog("where", f"root/{token}", "8" * 24)
    assert (found.returncode, found.stdout) == (1, f"root/{token}: {path}\n") and "8" * 24 in found.stderr
    with connected(hidden) as conn:
        root, file = one(conn, "SELECT url FROM root"), f"file:{one(conn, 'SELECT id FROM file WHERE path = %s', token)}"
    assert root in catalog("root", "list").stdout and file in catalog("flag", "list").stdout
    assert catalog("where", root, file).stdout == f"{root}: {tree}\n{file}: {path}\n"
    assert catalog("where", "file:0", "R-" + "0" * 24).returncode == 1
    assert catalog("runs", "retry", 2).returncode == 2
    path.write_bytes(whole)
    again = catalog("runs", "retry", 2, "--pseudonymize", key, "--jobs", 1)
    assert again.returncode == 0, again.stderr
    said = "".join(done.stdout + done.stderr for done in (told, errors, shown, again))
    assert not re.search(r"SYN0001|dicoms|3\.dcm|Jane", said.replace(str(tree), ""))
    assert str(tree) not in said
    with connected(hidden) as conn:
        assert one(conn, "SELECT count(*) FROM flag WHERE state = 'open'") == 0


def test_dry_run(hidden: database.Database, tree: Path, key: Path, catalog: Run) -> None:
    """A dry run names what it would do by the hashes under which it will stand in the catalog."""
    (tree / "link.csv").unlink()
    done = catalog("ingest", tree, "--pseudonymize", key, "--dry-run", "--layout", "sunnybrook")
    assert Pseudonyms(KEY).path("contourfiles/SC-SYN-0001").partition("/")[0] in done.stdout
    assert not re.search("SYN|Jane|contourfiles", done.stdout + done.stderr)
    as_json = catalog("ingest", tree, "--pseudonymize", key, "--dry-run", "--layout", "sunnybrook", "--json")
    assert not re.search("SYN|Jane|contourfiles", as_json.stdout + as_json.stderr)


def test_measured(hidden: database.Database, plain: database.Database) -> None:
    """Pixels are read in their places: every image is measured, every contour fitted, with the numbers of a catalog with names."""
    summary = measuring.measure(hidden, jobs=1)
    measuring.measure(plain, jobs=1)
    query = """SELECT encode(i.pixel_hash, 'hex'), i.phase, i.position, m.mean, m.entropy, e.scores FROM image i
               JOIN measure m ON m.image_id = i.id LEFT JOIN pairing p ON p.image_id = i.id LEFT JOIN edge_fit e ON e.pairing_id = p.id
               ORDER BY 1, 2, 3, 6"""
    with connected(hidden) as conn, connected(plain) as other:
        assert conn.execute(query).fetchall() == other.execute(query).fetchall()
    assert (summary.measured, summary.flagged, summary.left) == (48, 0, {})


def test_undecodable(new_database: Callable[..., str], tmp_path: Path, tree: Path, catalog: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a decoder says of pixels, which may quote the file, is neither stored by `measure` nor said by `show`; its code is."""
    image = pydicom.dcmread(tree / "dicoms" / "SYN0001" / "1.dcm")
    image.file_meta.TransferSyntaxUID = pydicom.uid.RLELossless
    image.PixelData = pydicom.encaps.encapsulate([b"Zqdoe" * 20])
    folder = tmp_path / "one"
    folder.mkdir()
    image.save_as(folder / "1.dcm")
    found = []
    for names in (None, Pseudonyms(KEY)):
        url = new_database()
        monkeypatch.setenv("CATALOG_DATABASE_URL", url)
        with database.open_database(url) as db:
            ingest.ingest(db, folder, jobs=1, hashing="none", names=names)
            assert measuring.measure(db, jobs=1).flagged == 1
            with connected(db) as conn:
                found.append(one(conn, "SELECT detail FROM flag WHERE rule = 'FILE-UNREADABLE'"))
        found.append(catalog("show", 1, "-o", tmp_path / "x.png").stderr)
    assert [text.partition(": ")[2] for text in (found[0], found[1])] != [terms.REASON] * 2
    assert found[2].partition(": ")[2] == terms.REASONS.get(found[2].partition(": ")[0], terms.REASON)
    assert found[2].partition(": ")[2] in found[3] and found[1] != found[3]


def test_fed(hidden: database.Database, plain_url: str) -> None:
    """A Feed reads the files in their places: each image and mask is, to the bit, that of a catalog with names."""
    from loaderd import Feed

    fed = []
    for url in (None, plain_url):
        with Feed(structures=["inner"], batch_size=8, shuffle=False, database=url) as feed:
            batches = list(feed.epoch())
            fed.append(sorted(one.tobytes() + mask.tobytes() for b in batches for one, mask in zip(b.images, b.masks, strict=True)))
            del batches
    assert fed[0] == fed[1] and len(fed[0]) == 12


def test_uncompared(tree: Path, new_database: Callable[..., str]) -> None:
    """Without hashes of pixels, files of one UID are still compared, in their places: equal pixels are one image, others a conflict."""
    images = tree / "dicoms" / "SYN0001"
    shutil.copy(images / "1.dcm", images / "901.dcm")
    other = pydicom.dcmread(images / "2.dcm")
    other.SOPInstanceUID = pydicom.dcmread(images / "3.dcm").SOPInstanceUID
    other.save_as(images / "902.dcm")
    found = []
    for names in (None, Pseudonyms(KEY)):
        with database.open_database(new_database()) as db:
            ingest.ingest(db, tree, jobs=1, hashing="none", names=names)
            with connected(db) as conn:
                found.append(conn.execute(COUNTED).fetchone())
                assert one(conn, "SELECT count(*) FROM flag WHERE rule = 'UID-CONFLICT'") == 2
    assert found[0] == found[1]


def test_erased(hidden: database.Database, tree: Path, key: Path, catalog: Run) -> None:
    """A patient is found by what stands for the PatientID, is erased with paths and all, and is not taken in again."""
    (tree / "dicoms" / "SYN0001" / "99.dcm").write_bytes(b"damaged")  # whose it is its folder alone says
    take(hidden, tree)
    patient = catalog("patient", "pseudonym", key, input="SYN0001\n\n").stdout.strip()
    assert patient == Pseudonyms(KEY).patient("SYN0001")
    done = catalog("patient", "erase", patient, "--reason", "asked for it")
    assert done.returncode == 0, done.stderr
    with connected(hidden) as conn:
        left = one(conn, "SELECT count(*) FROM private.file_path WHERE path ~ 'SYN-?0001'")
        assert left == 0
        again = catalog("ingest", tree, "--pseudonymize", key, "--jobs", 1)
        assert again.returncode == 3 and "SYN" not in again.stdout + again.stderr
        assert one(conn, "SELECT count(*) FROM patient") == 2
        assert one(conn, "SELECT count(*) FROM flag WHERE detail LIKE 'patient-erased%%'") > 0


def test_undone(hidden: database.Database, tree: Path, catalog: Run) -> None:
    """Undoing the run takes its places out too; the next ingest brings the same."""
    with connected(hidden) as conn:
        before = conn.execute(MASKS).fetchall()
        assert catalog("runs", "undo", 1).returncode == 0
        assert one(conn, "SELECT count(*) FROM private.file_path") == 0
        take(hidden, tree)
        assert conn.execute(MASKS).fetchall() == before


def test_kept_names(tree: Path, new_database: Callable[..., str]) -> None:
    """A reader whose name no layout gives becomes a token that the owner alone can turn back; --keep-name keeps it."""
    for path in list((tree / "contourfiles").rglob("*-manual.txt")):
        path.rename(path.with_name(path.name.replace("-manual", "-DrDoe")))
    for keep in ((), ("DrDoe",)):
        with database.open_database(new_database()) as db:
            take(db, tree, keep=keep)
            with connected(db) as conn:
                token = Pseudonyms(KEY, keep=keep).name("DrDoe")
                readers = "SELECT DISTINCT r.name FROM annotation a JOIN reader r ON r.id = a.reader_id"
                assert conn.execute(readers).fetchall() == [(token,)]
                assert conn.execute("SELECT token, name FROM private.name").fetchall() == ([] if keep else [(token, "DrDoe")])
                told = places.revealed(conn, [token, "N-" + "0" * 24])
                assert told == [(token, None if keep else "DrDoe"), ("N-" + "0" * 24, None)]
                assert take(db, tree).files_read == 0
                assert conn.execute(readers).fetchall() == [(token,)]


@pytest.mark.parametrize("kind", ["plain", "pseudonymized"])
def test_two_beginnings(kind: str, tree: Path, new_database: Callable[..., str]) -> None:
    """Of two first ingests at the same time, one with a key and one without, the later one is refused: no catalog is half of each."""
    with database.open_database(new_database()) as db, ThreadPoolExecutor(1) as thread, connected(db) as conn:
        with conn.transaction():
            conn.execute("SELECT pg_advisory_xact_lock(%s, 0)", [LOCK_CLASS])  # the other one makes its root
            late = thread.submit(ingest.ingest, db, tree, jobs=1, names=Pseudonyms(KEY) if kind == "pseudonymized" else None)
            assert wait_until(lambda: one(conn, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted") == 1)
            if kind == "pseudonymized":
                conn.execute("INSERT INTO root (name, url) VALUES ('other', '/other')")
            else:
                pseudonyms.begin(conn, Pseudonyms(KEY, dates="shift"), "somebody")
        with pytest.raises(UsageError, match="begun without a key" if kind == "pseudonymized" else "say --pseudonymize"):
            late.result(300)
        assert one(conn, "SELECT count(*) FROM root WHERE name <> 'other'") == 0
        assert one(conn, "SELECT count(*) FROM pseudonymization") == (kind == "plain")
