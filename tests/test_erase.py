"""`catalog patient erase`: nothing that says who it was is left in any table, others' rows are, and an ingest does not bring it back."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest

from catalog import cli, database, digest, erased, erasing, ingest
from catalog.errors import CatalogError, UsageError
from catalog.roots import LOCK_CLASS
from loaderd import runs
from tests.test_flags import feed

PATIENT, ORIGINAL = "SYN0002", "SC-SYN-0002"  # of 16 images and 6 annotations, as each of the three
Say = Callable[..., str]


@pytest.fixture
def say(database_url: str, capsys: pytest.CaptureFixture[str]) -> Say:
    """Run `catalog` in this process; returns all that it says. Errors come as exceptions."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        cli.app([str(argument) for argument in arguments], prog_name="catalog", standalone_mode=False)
        return "".join(capsys.readouterr())

    return run


@pytest.fixture
def take_in(database_url: str) -> Iterator[Callable[..., Any]]:
    """Ingest in this process."""
    with ThreadPoolExecutor(1) as threads:

        def ingest_folder(folder: Path) -> Any:
            with database.open_database(database_url) as db:
                return ingest.ingest(db, folder, executor=threads)

        yield ingest_folder


@pytest.fixture
def folder(studies: Path, tmp_path: Path) -> Path:
    """The three patients, to change. Of the second: an image in two files, one that is none, a contour without image, an ambiguous one."""
    folder = tmp_path / "arrived"
    shutil.copytree(studies, folder)
    images = folder / "dicoms" / PATIENT
    shutil.copy(images / "1.dcm", images / "0.dcm")
    shutil.copy(images / "2.dcm", images / "5.IMA")
    (images / "8.dcm").write_bytes(b"no image")
    contours = folder / "contourfiles" / ORIGINAL / "i-contours"
    shutil.copy(next(contours.iterdir()), contours / "IM-0001-0999-icontour-manual.txt")
    return folder


def everywhere(conn: psycopg.Connection) -> dict[str, str]:
    """Return all rows of all tables as text, less the bytes of masks."""
    names = [name for (name,) in conn.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY 1")]
    return {name: "\n".join(row for (row,) in conn.execute(f"SELECT t::text FROM {name} t ORDER BY 1".encode())) for name in names}


def one(conn: psycopg.Connection, query: str, *parameters: object) -> Any:
    row = conn.execute(query, parameters).fetchone()  # type: ignore[arg-type]
    assert row is not None
    return row[0]


def tables(url: str) -> dict[str, digest.Digest]:
    with database.open_database(url) as db:
        return digest.digest(db)[1]


def identifying(conn: psycopg.Connection) -> list[str]:
    """Return what names the patient in the catalog: ids, UIDs."""
    rows = conn.execute(
        "SELECT patient, study_instance_uid, series_instance_uid, sop_instance_uid, sample_key::text FROM image_all WHERE patient = %s",
        [PATIENT],
    )
    return sorted({value for row in rows for value in row} | {ORIGINAL})


def test_nothing_is_left(folder: Path, take_in: Callable[..., Any], say: Say, conn: psycopg.Connection, database_url: str) -> None:
    """No table holds the PatientID, the name in the annotations' source, a UID or a path of the patient any more, and what the command
    says does not either; everything of the others is as it was.
    """
    take_in(folder)
    say("flag", "add", f"patient:{PATIENT}", "--rule", "ODD", "--detail", "odd")
    say("flag", "add", "sample:1", "--rule", "ODD", "--detail", "odd")
    names = identifying(conn)
    assert len(names) > 16 and {name for name, text in everywhere(conn).items() if PATIENT in text} >= {"patient", "file", "ingest_error"}
    others = conn.execute("SELECT * FROM annotation_all WHERE patient <> %s ORDER BY 1, 3", [PATIENT]).fetchall()
    said = say("patient", "erase", PATIENT, "--reason", "asked for on 3 May", "--actor", "kim")
    for table, text in everywhere(conn).items():
        for name in names:
            assert name not in text, table
    assert not any(name in said for name in names)
    assert "1 patient" in said and "no run saw any of it" in said and "are not touched" in said
    assert conn.execute("SELECT * FROM annotation_all ORDER BY 1, 3").fetchall() == others
    assert one(conn, "SELECT count(*) FROM image_all") == 32
    left = (
        "SELECT (SELECT count(*) FROM instance), (SELECT count(*) FROM mask), (SELECT count(*) FROM pairing), (SELECT count(*) FROM flag)"
    )
    assert conn.execute(left).fetchall() == [(32, len(others), len(others), 1)]
    row = conn.execute("SELECT actor, reason, cardinality(image_ids), cardinality(file_sha256s) FROM erasure").fetchall()
    assert row == [("kim", "asked for on 3 May", 15, 7)]


def test_as_if_never_there(studies: Path, take_in: Callable[..., Any], say: Say, database_url: str, tmp_path: Path) -> None:
    """The content after an erasure is that of a catalog into which the patient never came."""
    folder = tmp_path / "arrived"
    shutil.copytree(studies, folder, ignore=shutil.ignore_patterns("*0002"))
    link = folder / "link.csv"
    whole = link.read_text()
    link.write_text("".join(line for line in whole.splitlines(keepends=True) if PATIENT not in line))
    take_in(folder)
    before = tables(database_url)
    link.write_text(whole)
    for part in (f"dicoms/{PATIENT}", f"contourfiles/{ORIGINAL}"):
        shutil.copytree(studies / part, folder / part)
    take_in(folder)
    assert tables(database_url) != before
    say("patient", "erase", PATIENT, "--reason", "asked for")
    assert tables(database_url) == before


def test_an_ingest_knows_the_files_again(folder: Path, take_in: Callable[..., Any], say: Say, conn: psycopg.Connection) -> None:
    """What an ingest asks finds the patient's name and the paths of the patient's annotations, and no others."""
    take_in(folder)
    paths = [path for (path,) in conn.execute("SELECT path FROM file WHERE kind = 'annotation' ORDER BY 1")]
    root = one(conn, "SELECT id FROM root")
    say("patient", "erase", PATIENT, "--reason", "asked for")
    assert erased.patients(conn, ["SYN0001", PATIENT, "SYN0003", "SYN00020"]) == {PATIENT}
    assert erased.files(conn, root, paths) == {path for path in paths if ORIGINAL in path}
    assert erased.files(conn, root + 1, paths) == set()


def test_what_is_shared_stays(folder: Path, take_in: Callable[..., Any], say: Say, conn: psycopg.Connection) -> None:
    """A contour that may belong to another patient's image too stays with that image; a file that holds another's image, too."""
    take_in(folder)
    drawn, mine = conn.execute("SELECT annotation_id, sample_id FROM annotation_all WHERE patient = %s LIMIT 1", [PATIENT]).fetchone() or ()
    other = one(conn, "SELECT min(sample_id) FROM image_all WHERE patient = 'SYN0001'")
    conn.execute("UPDATE pairing SET state = 'proposed' WHERE annotation_id = %s", [drawn])
    conn.execute(
        "INSERT INTO pairing (annotation_id, image_id, method, rule, score, state, actor) VALUES (%s, %s, 'x', 'x', 0.5, 'proposed', 'x')",
        [drawn, other],
    )
    file_id = one(conn, "SELECT file_id FROM image_all WHERE sample_id = %s", other)
    conn.execute("INSERT INTO location (image_id, file_id, transfer_syntax_uid, preferred) VALUES (%s, %s, '', false)", [mine, file_id])
    assert "1 file with images of others too stay" in say("patient", "erase", PATIENT, "--reason", "asked for")
    assert conn.execute("SELECT image_id FROM pairing WHERE annotation_id = %s", [drawn]).fetchall() == [(other,)]
    assert one(conn, "SELECT file_id FROM image_all WHERE sample_id = %s", other) == file_id


def test_a_folder_s_name_is_no_proof(folder: Path, take_in: Callable[..., Any], say: Say, conn: psycopg.Connection) -> None:
    """Where a folder of the patient's name holds others' images too, files without images in folders of that name stay."""
    shutil.move(folder / "dicoms" / "SYN0001", folder / "dicoms" / "SYN0001-away")
    (folder / "dicoms" / "SYN0001-away").rename(folder / "dicoms" / "SYN0001")
    take_in(folder)
    conn.execute("UPDATE file SET path = replace(path, '/SYN0001/', %s) WHERE path LIKE '%%/SYN0001/%%'", [f"/{PATIENT}/of-1/"])
    unreadable = "SELECT count(*) FROM file WHERE state = 'unreadable'"
    assert one(conn, unreadable) == 1
    say("patient", "erase", PATIENT, "--reason", "asked for")
    assert one(conn, unreadable) == 1
    assert one(conn, "SELECT count(*) FROM image_all WHERE patient = 'SYN0001' AND path IS NOT NULL") == 16


def test_what_was_fed_is_said_and_stays_a_number(folder: Path, take_in: Callable[..., Any], say: Say, conn: psycopg.Connection) -> None:
    """The runs that saw the patient are named; their orders and ledgers stay, and table erasure has the images that went."""
    take_in(folder)
    fed = [row[0] for row in conn.execute("SELECT sample_id FROM image_all WHERE patient = %s ORDER BY 1 LIMIT 3", [PATIENT])]
    mixed = [*fed, one(conn, "SELECT min(sample_id) FROM image_all WHERE patient = 'SYN0001'")]
    feed(conn, "unet-3", 0, mixed)
    kept = [conn.execute(f"SELECT * FROM {table}".encode()).fetchall() for table in ("epoch", "epoch_order", "ledger")]
    found = json.loads(say("patient", "erase", PATIENT, "--reason", "asked for", "--json"))
    assert [(one["run"], one["samples"]) for one in found["seen"]] == [("unet-3", 3)]
    assert [conn.execute(f"SELECT * FROM {table}".encode()).fetchall() for table in ("epoch", "epoch_order", "ledger")] == kept
    assert set(fed) < set(one(conn, "SELECT image_ids FROM erasure"))
    assert one(conn, "SELECT count(*) FROM sample_history") == 1
    audited = runs.audit(conn)
    assert audited.erased == 3 and "changed" not in {finding.what for finding in audited.findings}


def test_again_changes_nothing(folder: Path, take_in: Callable[..., Any], say: Say, conn: psycopg.Connection) -> None:
    """A second erase says when it was done and by whom, and writes nothing."""
    take_in(folder)
    say("patient", "erase", PATIENT, "--reason", "asked for", "--actor", "kim")
    before = everywhere(conn)
    assert re.search(r"erased already by kim at .* \(erasure 1\): nothing changed", say("patient", "erase", PATIENT, "--reason", "asked"))
    assert everywhere(conn) == before


def test_a_dry_run_changes_nothing(folder: Path, take_in: Callable[..., Any], say: Say, conn: psycopg.Connection) -> None:
    """--dry-run counts what would go, writes nothing and uses up no number."""
    take_in(folder)
    # What triggers write of itself counts on, also in what is taken back.
    numbers = "SELECT sequencename, last_value FROM pg_sequences WHERE sequencename NOT IN ('event_id_seq', 'touched_id_seq') ORDER BY 1"
    before = everywhere(conn), conn.execute(numbers).fetchall()
    erase = ("patient", "erase", PATIENT, "--reason", "asked", "--json")
    dry = json.loads(say(*erase, "--dry-run").partition("catalog: dry run")[0])
    text = say(*erase[:-1], "--dry-run")
    assert "erased the patient: 8 masks, " in text and "exit code 3 as long as they are there" in text
    assert (everywhere(conn), conn.execute(numbers).fetchall()) == before
    done = json.loads(say(*erase))
    assert dry["rows"] == done["rows"] and dry["rows"]["image"] == 15 and dry["rows"]["file"] == 25
    assert (dry["id"], done["id"]) == (None, 1)


def test_files_that_stay_on_the_disk_are_said(folder: Path, take_in: Callable[..., Any], say: Say, conn: psycopg.Connection) -> None:
    """Each ingest says how many files of who was erased it refuses, and what ends that: once they are removed, it says nothing of them."""
    take_in(folder)
    say("patient", "erase", PATIENT, "--reason", "asked")
    for _ in range(2):
        said = say("ingest", folder, "--jobs", 1)
        refused = one(conn, "SELECT count(*) FROM flag WHERE state = 'open' AND detail LIKE 'patient-erased: %%'")
        assert refused > 20
        assert f"catalog: {refused} of them are files of patients who were erased: remove what is still on the disk" in said
    shutil.rmtree(folder / "dicoms" / PATIENT)
    shutil.rmtree(folder / "contourfiles" / ORIGINAL)
    assert "who were erased" not in say("ingest", folder, "--jobs", 1)


@pytest.mark.parametrize("name", ["Doe^Jane", "Doe Jane", "\udcff"])
def test_an_unknown_name_goes_nowhere(folder: Path, take_in: Callable[..., Any], say: Say, conn: psycopg.Connection, name: str) -> None:
    """Of an unknown patient the message does not repeat the name; nor of one without quotes."""
    take_in(folder)
    before = everywhere(conn)
    for words in ([name], name.split()):
        with pytest.raises((CatalogError, UsageError)) as caught:
            say("patient", "erase", *words, "--reason", "asked for")
        assert "Doe" not in str(caught.value) and "Jane" not in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="--reason: is empty"):
        say("patient", "erase", PATIENT, "--reason", " ")
    assert everywhere(conn) == before


def test_not_while_an_ingest_runs(folder: Path, take_in: Callable[..., Any], conn: psycopg.Connection, database_url: str) -> None:
    """While an ingest runs nobody is erased: it could bring a file of the patient after that."""
    take_in(folder)
    before = everywhere(conn)
    with psycopg.connect(database_url) as other, database.open_database(database_url) as db:
        other.execute("SELECT pg_advisory_lock(%s, (SELECT id FROM root)::integer)", [LOCK_CLASS])
        with pytest.raises(CatalogError, match="root 'arrived': an ingest of it is running"):
            erasing.erase(db, PATIENT, reason="asked for")
    assert everywhere(conn) == before
