"""`catalog root`: a moved root is one UPDATE, and only where its files are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest

from catalog import cli, database, roots
from catalog.errors import CatalogError
from catalog.ingest import LOCK_CLASS

Say = Callable[..., str]


@pytest.fixture
def say(ingested: str, capsys: pytest.CaptureFixture[str]) -> Say:
    """Run `catalog` in this process; returns its standard output. Errors come as exceptions."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        cli.app([str(argument) for argument in arguments], prog_name="catalog", standalone_mode=False)
        return capsys.readouterr().out

    return run


@pytest.fixture
def root(conn: psycopg.Connection) -> str:
    """Name of the one root."""
    return one(conn, "SELECT name FROM root")


def one(conn: psycopg.Connection, query: str) -> Any:
    row = conn.execute(query).fetchone()  # type: ignore[arg-type]
    assert row is not None
    return row[0]


def state(conn: psycopg.Connection) -> tuple[Any, ...]:
    return one(conn, "SELECT url FROM root ORDER BY id"), one(conn, "SELECT count(*) FROM catalog_change")


def test_moved(say: Say, conn: psycopg.Connection, root: str, studies: Path, tmp_path: Path) -> None:
    """All paths are below the new place at once, one change is noted for the daemons, and an ingest there finds nothing to do."""
    new = tmp_path / "elsewhere" / "here"
    shutil.copytree(studies, new)
    before = state(conn)
    assert "20 of 20 looked for were found there" in say("root", "move", root, tmp_path / "elsewhere" / ".." / "elsewhere" / "here")
    assert state(conn) == (str(new), before[1] + 1)
    assert one(conn, "SELECT bool_and(starts_with(path, url)) FROM image_all, root") is True
    assert "nothing new" in say("ingest", new, "--jobs", 1)
    assert "already: nothing changed" in say("root", "move", root, new)
    assert state(conn) == (str(new), before[1] + 1)


def test_listed(say: Say, conn: psycopg.Connection, root: str, studies: Path) -> None:
    """The list says where each root lies, and how many of its files are there."""
    conn.execute("UPDATE file SET state = 'missing' WHERE id IN (1, 2)")
    conn.execute("UPDATE file SET state = 'unreadable' WHERE id = 3")
    [row] = json.loads(say("root", "list", "--json"))
    files = one(conn, "SELECT count(*) FROM file")
    size = one(conn, "SELECT sum(size)::bigint FROM file WHERE state = 'present'")
    assert {name: row[name] for name in ("name", "url", "files", "present", "missing", "unreadable", "bytes", "last_run")} == {
        "name": root, "url": str(studies), "files": files, "present": files - 3, "missing": 2, "unreadable": 1, "bytes": size,
        "last_run": 1,
    }  # fmt: skip
    assert str(studies) in say("root", "list")


def test_files_that_are_not_there(say: Say, conn: psycopg.Connection, root: str, studies: Path, tmp_path: Path) -> None:
    """A place without the files, or with others of their names, is refused with the number found; --even-so takes it."""
    new = tmp_path / "new"
    shutil.copytree(studies, new)
    for path in new.rglob("*.dcm"):
        path.write_bytes(b"other")
    before = state(conn)
    with pytest.raises(CatalogError, match=rf"of 20 files of root '{root}' that were looked for, \d+ are there .* --even-so"):
        say("root", "move", root, new)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CatalogError, match="looked for, 0 are there"):
        say("root", "move", root, tmp_path / "empty")
    assert state(conn) == before
    assert "0 of 20 looked for" in say("root", "move", root, tmp_path / "empty", "--even-so")
    assert state(conn)[0] == str(tmp_path / "empty")


def test_refused(say: Say, conn: psycopg.Connection, root: str, studies: Path, tmp_path: Path) -> None:
    """An unknown root, no place, a file, another root's place, a name that is not UTF-8: one line, nothing written."""
    (tmp_path / "file").write_text("")
    (tmp_path / "taken").mkdir()
    (tmp_path / "bad").mkdir()
    conn.execute("INSERT INTO root (name, url) VALUES ('second', %s)", [str(tmp_path / "taken")])
    before = state(conn)
    for name, place, message in (
        ("none", tmp_path, "root 'none': there is none of this name; see `catalog root list`"),
        (root, tmp_path / "gone", "No such file or directory; nothing was changed"),
        (root, tmp_path / "file", "is no folder"),
        (root, tmp_path / "taken", "is the place of root 'second'; two roots cannot share one"),
        (root, "nul\0", "nothing was changed"),
        (root, tmp_path / "bad" / "\udcff", "bad/\\?: "),
        (root, "nowhere://bucket", "cannot be opened"),
    ):
        with pytest.raises(CatalogError, match=message) as caught:
            say("root", "move", name, place, "--even-so")
        assert "\n" not in str(caught.value)
        assert caught.value.exit_code == (2 if name == "none" else 1)
    assert state(conn) == before


def test_a_dry_run_changes_nothing(say: Say, conn: psycopg.Connection, root: str, studies: Path, tmp_path: Path) -> None:
    """--dry-run says the same and writes nothing."""
    shutil.copytree(studies, tmp_path / "new")
    before = state(conn)
    dry = say("root", "move", root, tmp_path / "new", "--dry-run")
    assert state(conn) == before
    assert say("root", "move", root, tmp_path / "new") == dry


def test_not_while_an_ingest_runs(ingested: str, conn: psycopg.Connection, root: str, studies: Path, tmp_path: Path) -> None:
    """While an ingest of the root runs, moving it is refused: it writes paths of where it began."""
    shutil.copytree(studies, tmp_path / "new")
    before = state(conn)
    with psycopg.connect(ingested) as other, database.open_database(ingested) as db:
        other.execute("SELECT pg_advisory_lock(%s, (SELECT id FROM root)::integer)", [LOCK_CLASS])
        with pytest.raises(CatalogError, match=f"root '{root}': an ingest of it is running"):
            roots.move(db, root, str(tmp_path / "new"))
    assert state(conn) == before


def test_to_a_url(say: Say, conn: psycopg.Connection, root: str, studies: Path) -> None:
    """A URL that fsspec knows is a place too: its files are looked for there."""
    fsspec = pytest.importorskip("fsspec")
    system = fsspec.filesystem("memory")
    for path in studies.rglob("*"):
        if path.is_file():
            system.pipe(f"/bucket/scans/{path.relative_to(studies)}", path.read_bytes())
    try:
        with pytest.raises(CatalogError, match="looked for, 0 are there"):
            say("root", "move", root, "memory://bucket/other")
        assert "20 of 20" in say("root", "move", root, "memory://bucket/scans/")
        assert state(conn)[0] == "memory://bucket/scans"
    finally:
        system.rm("/bucket", recursive=True)
