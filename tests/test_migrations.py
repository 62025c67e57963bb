"""The migrations give what `tables.py` says, on any server, and whatever happens while they run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from psycopg import sql

from catalog import database
from catalog.tables import metadata
from tests.conftest import Run
from tests.processes import wait_until

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture
def new_empty(new_database: Callable[[], str]) -> Iterator[Callable[[], str]]:
    """Make a database without a schema; returns its URL. The role that a migration makes there goes with it."""
    made: list[str] = []

    def make() -> str:
        made.append(new_database())
        with psycopg.connect(made[-1], autocommit=True) as conn:
            conn.execute("DROP SCHEMA public, private CASCADE")
            conn.execute("CREATE SCHEMA public")
        return made[-1]

    yield make
    for url in made:
        with psycopg.connect(url, autocommit=True) as conn:
            if conn.execute("SELECT to_regclass('sql_login')").fetchone() == (None,):
                continue
            for (role,) in conn.execute("SELECT role FROM sql_login JOIN pg_roles ON rolname = role").fetchall():
                conn.execute(sql.SQL("DROP OWNED BY {}").format(sql.Identifier(role)))
                conn.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(role)))


@pytest.fixture
def empty(new_empty: Callable[[], str]) -> str:
    """URL of a database without a schema."""
    return new_empty()


def start_init(url: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "catalog.cli", "init"]
    environment = {**os.environ, "CATALOG_DATABASE_URL": url}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd="/")


def head() -> str | None:
    config = Config()
    config.set_main_option("script_location", str(REPOSITORY / "migrations").replace("%", "%%"))
    return ScriptDirectory.from_config(config).get_current_head()


def described(url: str) -> dict[str, set[tuple[object, ...]]]:
    """Return what compare_metadata does not look at (a dropped CHECK, a partial index, …), in PostgreSQL's own words."""
    queries = {
        "columns": "SELECT c.relname, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attidentity, a.attgenerated, "
        "pg_get_expr(d.adbin, d.adrelid) FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid "
        "LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum WHERE c.relkind = 'r' AND a.attnum > 0 AND NOT a.attisdropped",
        "constraints": "SELECT c.relname, o.conname, pg_get_constraintdef(o.oid) FROM pg_constraint o "
        "JOIN pg_class c ON c.oid = o.conrelid WHERE true",
        "indexes": "SELECT c.relname, pg_get_indexdef(x.indexrelid) FROM pg_index x JOIN pg_class c ON c.oid = x.indrelid WHERE true",
        "comments": "SELECT c.relname, a.attname, e.description FROM pg_description e JOIN pg_class c ON c.oid = e.objoid "
        "LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = e.objsubid AND e.objsubid > 0 "
        "WHERE e.classoid = 'pg_class'::regclass AND c.relkind = 'r'",
    }
    with psycopg.connect(url) as conn:
        ours = "c.relnamespace = 'public'::regnamespace AND c.relname <> 'alembic_version'"
        return {what: set(conn.execute(f"{query} AND {ours}").fetchall()) for what, query in queries.items()}


def test_migrations_give_what_tables_says(database_url: str) -> None:
    """After all migrations, Alembic finds nothing to add, drop or alter."""
    options = {"compare_type": True, "compare_server_default": True}
    with database.open_database(database_url) as db, db.engine().connect() as conn:
        assert compare_metadata(MigrationContext.configure(conn, opts=options), metadata) == []


def test_a_migrated_database_and_a_made_one_are_the_same(database_url: str, empty: str) -> None:
    """Constraints, indexes, generated columns and comments of a migrated database are those that create_all makes."""
    with database.open_database(empty, migrate=False) as db:
        metadata.create_all(db.engine())
    migrated, made = described(database_url), described(empty)
    for what, rows in made.items():
        assert rows
        assert migrated[what] - rows == set(), f"{what} of the migrations alone"
        assert rows - migrated[what] == set(), f"{what} of tables.py alone"


def test_every_table_view_and_column_says_what_it_is(conn: psycopg.Connection) -> None:
    """Every table, every view and every column of a table has a comment."""
    silent = conn.execute(
        "SELECT c.relname, NULL FROM pg_class c WHERE c.relkind IN ('r', 'v') AND c.relnamespace = 'public'::regnamespace "
        "AND c.relname <> 'alembic_version' AND obj_description(c.oid, 'pg_class') IS NULL UNION ALL "
        "SELECT c.relname, a.attname FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid WHERE c.relkind = 'r' "
        "AND c.relnamespace = 'public'::regnamespace AND c.relname <> 'alembic_version' AND a.attnum > 0 AND NOT a.attisdropped "
        "AND col_description(c.oid, a.attnum) IS NULL"
    ).fetchall()
    assert silent == []


def test_the_program_knows_the_newest_migration(database_url: str) -> None:
    """SCHEMA_VERSION is the head of the migrations, and what a migrated database says of itself."""
    assert head() == database.SCHEMA_VERSION
    with database.open_database(database_url, migrate=False) as db:
        assert database.schema_version(db) == database.SCHEMA_VERSION


def test_a_newer_database_is_refused(database_url: str, conn: psycopg.Connection, catalog: Run) -> None:
    """A database that a newer program migrated: exit code 4, one line with both versions and the remedy; init changes nothing either."""
    conn.execute("UPDATE alembic_version SET version_num = '9999'")
    for command in ("status", "init"):
        done = catalog(command)
        assert (done.returncode, done.stdout) == (4, ""), command
        [line] = done.stderr.splitlines()
        assert "9999" in line and database.SCHEMA_VERSION in line and "pip install --upgrade scanfeed" in line
    assert conn.execute("SELECT version_num FROM alembic_version").fetchall() == [("9999",)]


def test_an_older_database_is_not_migrated_behind_its_owners_back(database_url: str, conn: psycopg.Connection, catalog: Run) -> None:
    """An older schema on a server that is not ours: exit code 4, and the line names `catalog init`."""
    conn.execute("UPDATE alembic_version SET version_num = '0000'")
    done = catalog("status")
    assert done.returncode == 4
    [line] = done.stderr.splitlines()
    assert "0000" in line and "run `catalog init`" in line
    assert conn.execute("SELECT version_num FROM alembic_version").fetchall() == [("0000",)]


def test_many_inits_at_once_make_one_schema(empty: str) -> None:
    """Processes that find an empty database at the same moment all succeed; there is one version and one login."""
    processes = [start_init(empty) for _ in range(4)]
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, said
    with psycopg.connect(empty) as conn:
        assert conn.execute("SELECT version_num FROM alembic_version").fetchall() == [(database.SCHEMA_VERSION,)]
        assert conn.execute("SELECT count(*) FROM sql_login JOIN pg_roles ON rolname = role").fetchone() == (1,)


def test_a_migration_that_was_killed_leaves_nothing(empty: str, catalog: Run) -> None:
    """After a SIGKILL in the middle of a migration there is no half schema, and the next init makes the whole one."""
    with psycopg.connect(empty) as holder, psycopg.connect(empty, autocommit=True) as watcher:
        holder.execute("CREATE TABLE pairing ()")  # a migration that comes to this table waits for us
        process = start_init(empty)
        waiting = (
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock' "
            "AND query LIKE '%CREATE TABLE pairing%' AND pid <> pg_backend_pid()"
        )
        assert wait_until(lambda: watcher.execute(waiting).fetchone() != (0,) or process.poll() is not None, timeout_s=120)
        assert process.poll() is None, "the migration never came to the table"
        process.send_signal(signal.SIGKILL)
        process.communicate()
        holder.rollback()
        assert watcher.execute("SELECT to_regclass('alembic_version'), to_regclass('patient')").fetchone() == (None, None)
    done = catalog("init", "--database", empty)
    assert done.returncode == 0, done.stderr
    assert f"schema {database.SCHEMA_VERSION} (new)" in done.stdout
    assert catalog("status", "--database", empty).returncode == 0
