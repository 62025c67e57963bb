"""`catalog runs`: what an ingest brought, what it could not take in, going again, and taking it out without a trace."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
from pydicom import dcmread

from catalog import cli, database, digest, ingest, runs
from catalog.errors import CatalogError, UsageError
from catalog.ingest import LOCK_CLASS
from tests.test_flags import feed
from tests.test_rtstruct import contour as ring
from tests.test_rtstruct import flat, structures, written

Say = Callable[..., str]
TakeIn = Callable[..., Any]


@pytest.fixture
def say(database_url: str, capsys: pytest.CaptureFixture[str]) -> Say:
    """Run `catalog` in this process; returns its standard output. Errors come as exceptions."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        cli.app([str(argument) for argument in arguments], prog_name="catalog", standalone_mode=False)
        return capsys.readouterr().out

    return run


@pytest.fixture
def take_in(database_url: str) -> Iterator[TakeIn]:
    """Ingest in this process."""
    with ThreadPoolExecutor(1) as threads:

        def ingest_folder(folder: Path, **options: Any) -> Any:
            with database.open_database(database_url) as db:
                return ingest.ingest(db, folder, **{"executor": threads, **options})

        yield ingest_folder


@pytest.fixture
def folder(studies: Path, tmp_path: Path) -> Path:
    """Patients 1 and 2; the third can be put there by `arrive`."""
    shutil.copytree(studies, tmp_path / "arrived", ignore=shutil.ignore_patterns("*0003"))
    link = tmp_path / "arrived" / "link.csv"
    link.write_text("".join(link.read_text().splitlines(keepends=True)[:-1]))
    return tmp_path / "arrived"


@pytest.fixture
def arrive(studies: Path, folder: Path) -> Callable[[], None]:
    """Put the third patient there."""

    def copy() -> None:
        shutil.copy(studies / "link.csv", folder / "link.csv")
        for part in ("dicoms/SYN0003", "contourfiles/SC-SYN-0003"):
            shutil.copytree(studies / part, folder / part)

    return copy


def image(folder: Path, number: int, patient: int = 1) -> Path:
    return folder / "dicoms" / f"SYN000{patient}" / f"{number}.dcm"


def contour(folder: Path, number: int, patient: int = 1) -> Path:
    return folder / "contourfiles" / f"SC-SYN-000{patient}" / "i-contours" / f"IM-0001-{number:04d}-icontour-manual.txt"


def one(conn: psycopg.Connection, query: str, *parameters: object) -> Any:
    row = conn.execute(query, parameters).fetchone()  # type: ignore[arg-type]
    assert row is not None
    return row[0]


def tables(url: str) -> dict[str, digest.Digest]:
    with database.open_database(url) as db:
        return digest.digest(db)[1]


TABLES = (
    "patient", "study", "series", "instance", "image", "location", "file", "annotation", "pairing", "mask", "measure", "flag", "ingest_run",
    "ingest_error",
)  # fmt: skip


def rows(conn: psycopg.Connection) -> dict[str, list[tuple[Any, ...]]]:
    found = {table: conn.execute(f"SELECT t::text FROM {table} t ORDER BY 1".encode()).fetchall() for table in TABLES}
    numbers = "SELECT sequencename, last_value FROM pg_sequences WHERE sequencename NOT IN ('event_id_seq', 'touched_id_seq') ORDER BY 1"
    found["numbers"] = conn.execute(numbers).fetchall()
    found["changes"] = conn.execute("SELECT count(*) FROM catalog_change").fetchall()
    return found


# ------------------------------------------------------------------------------------------ looking


def test_listed_and_shown(folder: Path, take_in: TakeIn, say: Say, conn: psycopg.Connection) -> None:
    """Each run that had something to do with what it saw and read; show adds what it brought, and its errors by code with a remedy."""
    take_in(folder)
    image(folder, 1).write_bytes(b"")
    image(folder, 2).write_bytes(image(folder, 2).read_bytes()[:-100])
    image(folder, 3).write_bytes(image(folder, 3).read_bytes()[:-100])
    take_in(folder, hashing="head")
    take_in(folder)
    first, second = json.loads(say("runs", "list", "--json"))
    files = one(conn, "SELECT count(*) FROM file")
    assert (first["run"], first["root"], first["layout"], first["state"], first["errors"], first["hash"], first["undone"]) == (
        1, "arrived", "sunnybrook", "finished", 0, "full", None,
    )  # fmt: skip
    assert (first["files_seen"], first["files_read"], second["files_seen"], second["files_read"]) == (files, files, files, 3)
    found = json.loads(say("runs", "show", 2, "--json"))
    assert found["hash"] == "head" and found["errors"] >= 3 and found["brought"] == {"files": 0, "images": 0, "annotations": 0}
    codes = {error["code"]: error for error in found["by_code"] if error["stage"] == "read"}
    assert codes["truncated"]["files"] == 2 and "copy the file again" in codes["truncated"]["remedy"]
    assert codes["truncated"]["paths"] == ["dicoms/SYN0001/2.dcm", "dicoms/SYN0001/3.dcm"]
    assert all(error["remedy"] for error in found["by_code"])
    assert json.loads(say("runs", "show", 1, "--json"))["brought"]["files"] == files
    assert "2 errors read: truncated: copy the file again" in say("runs", "show", 2)
    drawn = one(conn, "SELECT count(*) FROM annotation WHERE ingest_run_id = 1")
    brought = f"  brought, and there still: {files} files, {files - drawn} images, {drawn} annotations\n"
    assert brought in say("runs", "show", 1)
    assert [line.split()[0] for line in say("runs", "list").splitlines()[2:]] == ["1", "2"]


def test_one_is_not_said_as_several(folder: Path, say: Say) -> None:
    """Of one file, one image, one error an ingest speaks in the singular."""
    assert "; 0 errors; " in say("ingest", folder, "--jobs", 1)
    image(folder, 1).unlink()
    assert "\n1 file is gone, and now marked missing\n" in say("ingest", folder, "--jobs", 1)
    image(folder, 2).write_bytes(image(folder, 2).read_bytes()[:-100])
    assert "; 1 file read in " in say("ingest", folder, "--jobs", 1)


def test_an_error_is_counted_once_everywhere(studies: Path, tmp_path: Path, take_in: TakeIn, say: Say) -> None:
    """What is wrong in the same words with three contours of one file is one error for the ingest, for `errors` and for `runs`."""
    (tmp_path / "rt").mkdir()
    shutil.copy(next(studies.rglob("1.dcm")), tmp_path / "rt")
    drawn = [ring(flat([(0, 0), (10, 0), (10, 8), (0, 8)]), f"1.9.1.{at}") for at in (1, 2, 3)]
    written(tmp_path / "rt" / "rt.dcm", structures({1: drawn}, series=(("1.9", "1.9.1", ("1.9.1.1", "1.9.1.2", "1.9.1.3")),)))
    summary = take_in(tmp_path / "rt")
    assert (summary.unpaired, summary.standing_errors) == (3, 1)
    [run] = json.loads(say("runs", "list", "--json"))
    assert (run["errors"], len(json.loads(say("errors", "--json")))) == (1, 1)
    assert "1 error pair: pair-no-image" in say("runs", "show", 1)


def test_a_killed_run_is_no_running_one(folder: Path, take_in: TakeIn, say: Say, conn: psycopg.Connection, database_url: str) -> None:
    """A row that says running while nobody ingests that root is of a run that was killed; while somebody does, it runs."""
    take_in(folder)
    conn.execute("UPDATE ingest_run SET state = 'running'")
    assert json.loads(say("runs", "list", "--json"))[0]["state"] == "interrupted"
    with psycopg.connect(database_url) as other:
        other.execute("SELECT pg_advisory_lock(%s, (SELECT id FROM root)::integer)", [LOCK_CLASS])
        assert json.loads(say("runs", "list", "--json"))[0]["state"] == "running"


def test_no_such_run(database_url: str, say: Say) -> None:
    """A run that is none: one line."""
    for command in (("runs", "show", 7), ("runs", "retry", 7), ("runs", "undo", 7), ("errors", "--run", 7)):
        with pytest.raises(UsageError, match="run 7: there is no such run of `catalog ingest`; see `catalog runs list`"):
            say(*command)


def test_retried(folder: Path, take_in: TakeIn, say: Say, conn: psycopg.Connection) -> None:
    """A file that could not be read is tried again, with the layout and the hash of that run; nothing else is read."""
    kept = image(folder, 1).read_bytes()
    stat = image(folder, 1).stat()
    image(folder, 1).write_bytes(bytes(len(kept)))
    assert take_in(folder, hashing="none", layout="sunnybrook").standing_errors
    image(folder, 1).write_bytes(kept)
    os.utime(image(folder, 1), ns=(stat.st_atime_ns, one(conn, "SELECT mtime_ns FROM file WHERE path LIKE '%%/SYN0001/1.dcm'")))
    assert json.loads(say("runs", "retry", 1, "--dry-run", "--json"))["layout"] == "sunnybrook"
    summary = json.loads(say("runs", "retry", 1, "--json", "--jobs", 1))
    assert (summary["files_read"], summary["standing_errors"]) == (1, 0)
    assert conn.execute("SELECT layout, hash FROM ingest_run ORDER BY id").fetchall() == [("sunnybrook", "none")] * 2


def test_a_run_by_a_table_says_how_to_go_again(folder: Path, take_in: TakeIn, say: Say, conn: psycopg.Connection) -> None:
    """What a table, pattern or reader said is not kept: retry says to give it again."""
    take_in(folder)
    conn.execute("UPDATE ingest_run SET layout = 'table'")
    with pytest.raises(CatalogError, match="run 1: was read by --table; say that again"):
        say("runs", "retry", 1)


# ------------------------------------------------------------------------------------------ undoing


def test_undone_without_a_trace(
    folder: Path, arrive: Callable[[], None], take_in: TakeIn, say: Say, conn: psycopg.Connection, database_url: str
) -> None:
    """What run 2 brought goes, with the patients it was of: the content is that after run 1. Again, it comes in as it was; a second undo
    of the same run does nothing.
    """
    take_in(folder)
    before = tables(database_url)
    arrive()
    take_in(folder)
    both = tables(database_url)
    said = say("runs", "undo", 2)
    assert "1 patient" in said and "16 images" in said and "the next ingest of this root brings it again" in said
    assert tables(database_url) == before
    assert one(conn, "SELECT undone_at FROM ingest_run WHERE id = 2") is not None
    kept = rows(conn)
    assert "undone already" in say("runs", "undo", 2)
    assert rows(conn) == kept
    assert take_in(folder).files_read == both["file"].rows - before["file"].rows
    assert tables(database_url) == both
    say("runs", "undo", 3)
    say("runs", "undo", 1)
    assert {table: one.rows for table, one in tables(database_url).items() if one.rows} == {"root": 1}


def test_a_dry_run_changes_nothing(folder: Path, arrive: Callable[[], None], take_in: TakeIn, say: Say, conn: psycopg.Connection) -> None:
    """--dry-run prints the counts of what undo then takes out, writes nothing and uses up no number."""
    shutil.copy(image(folder, 4), folder / "late.dcm")
    (folder / "late.dcm").rename(image(folder, 17))
    take_in(folder)
    arrive()
    take_in(folder)
    before = rows(conn)
    dry = json.loads(say("runs", "undo", 2, "--dry-run", "--json"))
    assert rows(conn) == before
    assert dry == json.loads(say("runs", "undo", 2, "--json"))
    assert dry["rows"]["image"] == 16


def test_what_lies_elsewhere_too_stays(folder: Path, take_in: TakeIn, say: Say, conn: psycopg.Connection, database_url: str) -> None:
    """An image of which another run's file has the pixels stays, is read from there, and keeps what is drawn on it."""
    take_in(folder)
    before = tables(database_url)
    shutil.copy(image(folder, 1), folder / "dicoms" / "SYN0001" / "0.dcm")  # sorts first, so it is read from here
    take_in(folder)
    assert one(conn, "SELECT count(*) FROM location l JOIN file f ON f.id = l.file_id WHERE f.path LIKE '%%/0.dcm' AND l.preferred") == 1
    say("runs", "undo", 2)
    assert tables(database_url) == before


def test_a_uid_of_two_contents_is_one_s_again(folder: Path, take_in: TakeIn, say: Say, conn: psycopg.Connection, database_url: str) -> None:
    """A conflict that the undone run brought is none any more: keys and flags are as before."""
    take_in(folder)
    before = tables(database_url)
    dataset = dcmread(image(folder, 1))
    dataset.PixelData = bytes(byte ^ 1 for byte in dataset.PixelData)
    dataset.save_as(image(folder, 30))
    take_in(folder)
    assert one(conn, "SELECT count(*) FROM flag WHERE rule = 'UID-CONFLICT' AND state = 'open'") == 2
    say("runs", "undo", 2)
    assert tables(database_url) == before


def test_the_version_before_is_current_again(folder: Path, take_in: TakeIn, say: Say, conn: psycopg.Connection, database_url: str) -> None:
    """A contour that run 2 read anew: its version goes, the one before is fed again with what was found about it; then the next ingest
    brings the new one again.
    """
    contour(folder, 7).write_text("900 900\n950 900\n950 950\n")
    take_in(folder)
    before = tables(database_url)
    flags = "SELECT count(*) FROM flag WHERE rule = 'MASK-EMPTY' AND state = 'open'"
    assert one(conn, flags) == 1
    shutil.copy(contour(folder, 7, 2), contour(folder, 7))
    take_in(folder)
    assert one(conn, flags) == 0
    after = tables(database_url)
    assert "of 1 annotation the version before is current again" in say("runs", "undo", 2)
    assert one(conn, flags) == 1
    now = tables(database_url)
    # The file itself holds the new one still: it is to be read again.
    assert {table for table in now if now[table] != before[table]} == {"file"}
    take_in(folder)
    assert tables(database_url) == after


def test_annotations_that_lose_their_image_say_so(
    folder: Path, take_in: TakeIn, say: Say, conn: psycopg.Connection, database_url: str
) -> None:
    """Contours of run 1 that were paired with images of run 2 stay, unpaired, with a finding; the next ingest pairs them again."""
    away = folder.parent / "away"
    (folder / "dicoms" / "SYN0002").rename(away)
    take_in(folder)
    away.rename(folder / "dicoms" / "SYN0002")
    take_in(folder)
    both = tables(database_url)
    paired = one(conn, "SELECT count(DISTINCT annotation_id) FROM annotation_all WHERE patient = 'SYN0002'")
    assert paired
    say("runs", "undo", 2)
    assert one(conn, "SELECT count(*) FROM flag WHERE rule = 'PAIR-NO-IMAGE' AND state = 'open'") == paired
    take_in(folder)
    assert tables(database_url) == both


def test_what_was_fed_is_not_undone(folder: Path, arrive: Callable[[], None], take_in: TakeIn, say: Say, conn: psycopg.Connection) -> None:
    """An image in the order of a started epoch forbids it, with the number; so does an annotation; of a pruned epoch the patient stays."""
    take_in(folder)
    arrive()
    take_in(folder)
    fed = [row[0] for row in conn.execute("SELECT sample_id FROM image_all WHERE patient = 'SYN0003' ORDER BY 1 LIMIT 3")]
    older = [row[0] for row in conn.execute("SELECT sample_id FROM image_all WHERE patient = 'SYN0001' ORDER BY 1 LIMIT 3")]
    epoch = feed(conn, "unet", 0, older + fed)
    before = rows(conn)
    with pytest.raises(CatalogError, match=r"run 2: cannot be undone: 3 of its images and annotations were fed, .*; nothing was changed"):
        say("runs", "undo", 2)
    drawn = one(conn, "SELECT max(id) FROM annotation WHERE ingest_run_id = 2")
    conn.execute("UPDATE epoch_order SET sample_ids = %s, annotation_ids = %s", [older, [drawn, 0, 0]])
    with pytest.raises(CatalogError, match="1 of its images and annotations were fed"):
        say("runs", "undo", 2)
    assert rows(conn) == before
    conn.execute("DELETE FROM ledger")
    conn.execute("DELETE FROM epoch_order")
    patient = one(conn, "SELECT id FROM patient WHERE patient_id = 'SYN0003'")
    conn.execute("UPDATE epoch SET pruned_at = now(), summary = '{}', patients = %s WHERE id = %s", [[patient], epoch])
    say("runs", "undo", 2)
    assert one(conn, "SELECT count(*) FROM image_all WHERE patient = 'SYN0003'") == 0
    assert one(conn, "SELECT count(*) FROM sample_history WHERE patient = 'SYN0003'") == 1


def test_what_was_planned_and_never_begun_may_go(folder: Path, take_in: TakeIn, say: Say, conn: psycopg.Connection) -> None:
    """An order that was prepared ahead forbids nothing: a daemon plans again, since the catalog changed."""
    take_in(folder)
    feed(conn, "unet", 0, [row[0] for row in conn.execute("SELECT id FROM image LIMIT 3")])
    conn.execute("DELETE FROM ledger")
    conn.execute("UPDATE epoch SET started_at = NULL")
    changes = one(conn, "SELECT count(*) FROM catalog_change")
    say("runs", "undo", 1)
    assert one(conn, "SELECT count(*) FROM catalog_change") > changes


def test_what_later_runs_built_on_is_not_undone(
    folder: Path, take_in: TakeIn, say: Say, conn: psycopg.Connection, database_url: str
) -> None:
    """Every reason is listed with its number: changed files, newer versions, later contours on its images, a person's open flag; once
    the later runs are undone and the flag is closed only the changed image stands in the way.
    """
    away = folder.parent / "away.txt"
    contour(folder, 11).rename(away)
    take_in(folder)
    away.rename(contour(folder, 11))
    contour(folder, 7).write_text("10 10\n20 10\n20 20\n")
    dataset = dcmread(image(folder, 2))
    dataset.PixelData = bytes(byte ^ 1 for byte in dataset.PixelData)
    dataset.save_as(image(folder, 2))
    take_in(folder)
    flag = re.search(r"flag (\d+)", say("flag", "add", "sample:1", "--rule", "ODD", "--detail", "odd"))
    assert flag
    before = rows(conn)
    with pytest.raises(CatalogError) as caught:
        say("runs", "undo", 1)
    said = str(caught.value)
    assert "\n" not in said
    for why in (
        "1 of its files were read again by later runs",
        "1 of its annotations have newer versions by later runs",
        "1 annotations that later runs brought are paired with its images",
        "1 open flags on it were raised by people",
    ):
        assert why in said
    assert rows(conn) == before
    say("flag", "resolve", flag[1], "-m", "is not")
    stays = say("runs", "undo", 2)
    assert "1 file that had been there before and changed stay as the run read them" in stays
    with pytest.raises(CatalogError, match="run 1: cannot be undone: 1 of its files were read again by later runs; nothing was changed"):
        say("runs", "undo", 1)


def test_missing_files_go_too(folder: Path, take_in: TakeIn, say: Say, conn: psycopg.Connection, database_url: str) -> None:
    """That a later run found files gone does not stand in the way."""
    take_in(folder)
    shutil.rmtree(folder / "dicoms" / "SYN0002")
    take_in(folder)
    say("runs", "undo", 1)
    assert one(conn, "SELECT count(*) FROM image") == 0


def test_a_person_s_words_on_the_patient_stay(
    folder: Path, arrive: Callable[[], None], take_in: TakeIn, say: Say, conn: psycopg.Connection
) -> None:
    """Consent withdrawn stays withdrawn, though nothing else of the patient is left: what comes in again is revoked."""
    take_in(folder)
    arrive()
    take_in(folder)
    say("patient", "withdraw", "SYN0003")
    assert one(conn, "SELECT count(*) FROM revoked_image") == 16
    say("runs", "undo", 2)
    assert (one(conn, "SELECT count(*) FROM revoked_image"), one(conn, "SELECT count(*) FROM patient")) == (0, 3)
    take_in(folder)
    assert one(conn, "SELECT count(*) FROM revoked_image") == 16


def test_decisions_that_go_are_counted(
    folder: Path, arrive: Callable[[], None], take_in: TakeIn, say: Say, conn: psycopg.Connection
) -> None:
    """Pairings that people decided are said to go."""
    take_in(folder)
    arrive()
    take_in(folder)
    pairing = one(conn, "SELECT max(id) FROM pairing")
    say("pair", "accept", pairing, "--actor", "kim")
    assert "1 pairing that people had decided went with it" in say("runs", "undo", 2)


def test_not_while_an_ingest_runs(folder: Path, take_in: TakeIn, conn: psycopg.Connection, database_url: str) -> None:
    """While an ingest of the root runs nothing is undone."""
    take_in(folder)
    before = rows(conn)
    with psycopg.connect(database_url) as other, database.open_database(database_url) as db:
        other.execute("SELECT pg_advisory_lock(%s, (SELECT id FROM root)::integer)", [LOCK_CLASS])
        with pytest.raises(CatalogError, match="root 'arrived': an ingest of it is running"):
            runs.undo(db, 1)
    assert rows(conn) == before
