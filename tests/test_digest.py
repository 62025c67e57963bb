"""`catalog digest`: equal for equal content, however it came in; different for any other, and it says where."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest

from catalog import cli, database, digest, ingest

TakeIn = Callable[..., Any]


@pytest.fixture
def take_in(new_database: Callable[..., str]) -> Iterator[TakeIn]:
    """Ingest a folder in this process; returns the digests of all that is in the database of that URL then."""
    with ThreadPoolExecutor(1) as threads:

        def ingest_folder(url: str, folder: Path, **options: Any) -> tuple[str, dict[str, digest.Digest]]:
            with database.open_database(url) as db:
                ingest.ingest(db, folder, executor=threads, **options)
                return digest.digest(db)

        yield ingest_folder


@pytest.fixture
def three(studies: Path, tmp_path: Path) -> Path:
    """Three patients to change: contours that are ambiguous, an image in two files, a file that is none."""
    folder = tmp_path / "arrived"
    shutil.copytree(studies, folder)
    images = folder / "dicoms" / "SYN0001"
    shutil.copy(images / "6.dcm", images / "5.IMA")
    shutil.copy(images / "4.dcm", images / "40.dcm")
    (images / "8.dcm").write_bytes(b"no image")
    return folder


def without(folder: Path, to: Path, *parts: str) -> None:
    """Copy a folder without what its paths name, with the times of its files."""
    shutil.copytree(folder, to, ignore=lambda at, names: [name for name in names if any(part in f"{at}/{name}" for part in parts)])


def test_whatever_the_way(three: Path, tmp_path: Path, new_database: Callable[..., str], take_in: TakeIn) -> None:
    """In one go; patient by patient from the last; images and contours after one another, either first: one digest of each table."""
    found = {}
    for parts in ((), ("SYN0001", "SYN-0001", "SYN0002", "SYN-0002"), ("dicoms",), ("contourfiles",)):
        url = new_database()
        for end in range(len(parts), -1, -1):  # ever less is left out
            part = tmp_path / f"{'-'.join(parts)} {end}" / "arrived"
            without(three, part, *parts[:end])
            if end == len(parts):
                found[parts] = take_in(url, part)
            else:
                with psycopg.connect(url, autocommit=True) as conn:
                    conn.execute("UPDATE root SET url = %s", [str(part)])
                found[parts] = take_in(url, part)
    tables = {parts: one[1] for parts, one in found.items()}
    differ = {(parts, table) for parts, one in tables.items() for table in one if one[table] != tables[()][table]}
    assert differ == set()
    assert len({one[0] for one in found.values()}) == 1
    assert {table for table, one in tables[()].items() if not one.rows} == set()  # each table says something


def test_stopped_and_gone_on(three: Path, new_database: Callable[..., str], take_in: TakeIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after each commit and gone on until it is through: the digest of an ingest that nobody stopped."""
    straight, stopped = new_database(), new_database()
    expected = take_in(straight, three)
    monkeypatch.setattr(ingest, "FILES_PER_COMMIT", 20)

    class StopHereError(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done > 25:
            raise StopHereError

    for _ in range(2):
        with pytest.raises(StopHereError):
            take_in(stopped, three, progress=stop)
    assert take_in(stopped, three) == expected


@pytest.fixture
def filled(new_database: Callable[..., str], three: Path, take_in: TakeIn) -> str:
    """URL of a database with the three."""
    url = new_database()
    take_in(url, three)
    return url


def of(url: str) -> dict[str, str]:
    with database.open_database(url) as db:
        whole, tables = digest.digest(db)
    return {"": whole, **{table: one.sha256 for table, one in tables.items()}}


CHANGES = {
    "UPDATE root SET name = 'other'": {"root", "file", "location", "annotation", "pairing", "mask", "flag"},
    "UPDATE file SET size = size + 1 WHERE id = 1": {"file"},
    "UPDATE file SET content_hash = NULL WHERE id = 1": {"file"},
    "UPDATE file SET state = 'missing' WHERE id = 1": {"file"},
    "UPDATE patient SET original_id = 'x' WHERE patient_id = 'SYN0001'": {"patient"},
    "UPDATE study SET study_date = 'x' WHERE id = 1": {"study"},
    "UPDATE series SET modality = 'CT' WHERE id = 1": {"series"},
    "UPDATE instance SET instance_number = 99 WHERE id = 1": {"instance"},
    "UPDATE image SET row_spacing = row_spacing + 1e-12 WHERE id = 1": {"image"},
    "UPDATE image SET slope = -0.0 WHERE id = 1": {"image"},
    "UPDATE location SET byte_offset = 3 WHERE image_id = 1": {"location"},
    "UPDATE annotation SET points[1] = 0.25 WHERE id = 1": {"annotation"},
    "UPDATE reader SET preference = 7": {"annotation"},
    "UPDATE pairing SET actor = 'kim' WHERE id = 1": {"pairing"},
    "UPDATE pairing SET state = 'proposed' WHERE state = 'accepted'": {"pairing"},
    "UPDATE mask SET bits = set_byte(bits, 0, 1 - get_byte(bits, 0) % 2) WHERE pairing_id = 1": {"mask"},
    "UPDATE flag SET detail = 'x' WHERE state = 'open'": {"flag"},
    "UPDATE flag SET state = 'resolved', closed_by = 'kim', closed_at = now() WHERE state = 'open'": {"flag"},
    "DELETE FROM flag": {"flag"},
}  # fmt: skip


def test_each_change_is_seen_and_located(filled: str) -> None:
    """A change of one value changes the digest of its table, of those that are named by it, and no other."""
    with psycopg.connect(filled) as conn:
        before = hashes(conn)
        for change, tables in CHANGES.items():
            with conn.transaction(force_rollback=True):
                assert conn.execute(change).rowcount, change  # type: ignore[arg-type]
                after = hashes(conn)
            assert {table for table in after if after[table] != before[table]} == tables, change


def hashes(conn: psycopg.Connection) -> dict[str, list[tuple[Any, ...]]]:
    return {table: conn.execute(digest.HASHED.format(query).encode()).fetchall() for table, query in digest.CONTENT.items()}


def test_neither_ids_nor_times_nor_settings(filled: str) -> None:
    """When a file was modified, when and by which run it came in, and settings of the session say nothing; neither does history
    that ingest wrote and took back.
    """
    before = of(filled)
    with psycopg.connect(filled, autocommit=True) as conn:
        conn.execute("UPDATE file SET mtime_ns = mtime_ns + 1")
        conn.execute("UPDATE pairing SET at = now() + interval '1 day'")
        conn.execute("UPDATE flag SET raised_at = now() + interval '1 day'")
        conn.execute("UPDATE annotation SET created_at = now() + interval '1 day'")
        conn.execute("INSERT INTO ingest_run (root_id, layout, program_version, host) SELECT id, 'x', 'x', 'x' FROM root")
        conn.execute(
            "INSERT INTO flag (rule, severity, detail, state, closed_by, closed_at, file_id, raised_by) "
            "VALUES ('X', 'error', 'x', 'resolved', 'ingest', now(), 1, 'ingest')"
        )
        conn.execute(
            "INSERT INTO pairing (annotation_id, image_id, method, rule, score, state, actor) "
            "VALUES (1, (SELECT max(id) FROM image), 'x', 'x', 1, 'rejected', 'layout:x')"
        )
        for setting in ("bytea_output = 'escape'", "extra_float_digits = 0", "timezone = 'Asia/Tokyo'", "datestyle = 'German'"):
            conn.execute(f"ALTER DATABASE {conn.info.dbname} SET {setting}".encode())
    assert of(filled) == before


def test_the_command(filled: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It prints one sha256, with --json also each table's with its rows, and writes nothing."""
    monkeypatch.setenv("CATALOG_DATABASE_URL", filled)
    with psycopg.connect(filled, autocommit=True) as conn:
        changes = conn.execute("SELECT count(*) FROM catalog_change").fetchall()
        cli.app(["digest"], prog_name="catalog", standalone_mode=False)
        whole = capsys.readouterr().out.strip()
        assert len(bytes.fromhex(whole)) == 32
        cli.app(["digest", "--json"], prog_name="catalog", standalone_mode=False)
        found = json.loads(capsys.readouterr().out)
        assert found["sha256"] == whole and found["tables"]["patient"]["rows"] == 3
        assert set(found["tables"]) == set(digest.CONTENT)
        assert conn.execute("SELECT count(*) FROM catalog_change").fetchall() == changes
