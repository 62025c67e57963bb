"""Every door through which SQL of a user comes: the server refuses what writes, and nothing is changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

import loaderd.cli
from catalog import cli, database, digest, roles
from catalog.errors import CatalogError
from loaderd import Feed, FeedError
from tests.test_database import FORBIDDEN
from tests.test_roles import dropped, login

Door = Callable[[str], None]

# Whole statements.
STATEMENTS = [
    *FORBIDDEN,
    "TRUNCATE event",
    "UPDATE event SET actor = 'nobody'",
    "INSERT INTO event (actor, subject, action) VALUES ('somebody', 'flag', 'update')",
    "COMMIT; SET TRANSACTION READ WRITE; DELETE FROM pairing",
    "commit; set transaction read write; delete from flag; commit",
    "DO $$ BEGIN DELETE FROM pairing; END $$",
    "DO $$ BEGIN EXECUTE 'DELETE FROM pairing'; EXCEPTION WHEN OTHERS THEN RAISE; END $$",
    "WITH x AS (UPDATE pairing SET state = 'rejected' RETURNING id) SELECT id, 1.0::float8, 'x' FROM x",
    "WITH x AS (INSERT INTO flag (rule, severity, detail, image_id, raised_by) "
    "SELECT 'X', 'error', 'x', min(id), 'x' FROM image RETURNING id) SELECT id AS subject_id, 1.0::float8 AS value, 'x' AS detail FROM x",
    "MERGE INTO structure s USING (SELECT 'x' AS name) n ON s.name = n.name WHEN NOT MATCHED THEN INSERT (name) VALUES (n.name)",
    "SELECT setval('structure_id_seq', 9999)",
    "SELECT dblink_exec('DELETE FROM pairing')",
    "COPY pairing FROM STDIN",
    "COPY (SELECT 1) TO STDOUT",
    "COPY pairing TO '/tmp/scanfeed-sneaked'",
    "REFRESH MATERIALIZED VIEW sample",
    "LOCK TABLE pairing IN ACCESS EXCLUSIVE MODE",
    "ALTER TABLE event DISABLE TRIGGER ALL",
    "DROP VIEW orphans",
    "CREATE OR REPLACE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'",
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '@OWNER@'",
    "SELECT lo_export(1, '/tmp/scanfeed-sneaked')",
    "SELECT pg_switch_wal()",
    "VACUUM pairing",
]
# Of these a rule or a condition is made: each would be true of something, and would write beside.
CONDITIONS = [
    "setval('structure_id_seq', 9999) > 0",
    "nextval('structure_id_seq') > 0",
    "query_to_xml('DELETE FROM pairing RETURNING 1', true, true, '') IS NOT NULL",
    "pg_read_file('postgresql.conf') <> ''",
    "set_config('role', '@OWNER@', false) <> ''",
    "set_config('transaction_read_only', 'off', true) <> '' AND query_to_xml('DELETE FROM pairing', true, true, '') IS NOT NULL",
    "EXISTS (WITH x AS (DELETE FROM pairing RETURNING 1) SELECT 1 FROM x)",
    "sample_id IN (DELETE FROM pairing RETURNING 1)",
    "true); DELETE FROM pairing; --",
    "true; COMMIT; SET TRANSACTION READ WRITE; DELETE FROM pairing",
    "(SELECT password FROM sql_login) <> ''",
    "dblink_exec('DELETE FROM pairing') <> ''",
    "lo_import('/etc/hostname') > 0",
]


LOOKED_AT = {
    "events": "SELECT count(*) FROM event",
    "relations": "SELECT count(*) FROM pg_class WHERE relpersistence <> 't' AND relnamespace <> 'pg_toast'::regnamespace",
    "functions": "SELECT string_agg(prosrc, '' ORDER BY oid) FROM pg_proc",
    "schemas": "SELECT count(*) FROM pg_namespace WHERE nspname !~ '^pg_'",
    "rights": "SELECT array_agg(relname || relacl::text ORDER BY oid) FROM pg_class WHERE relnamespace = 'public'::regnamespace",
    "triggers": "SELECT array_agg(tgname || tgenabled::text ORDER BY oid) FROM pg_trigger",
    "large objects": "SELECT count(*) FROM pg_largeobject_metadata",
    "a sequence": "SELECT last_value, is_called FROM structure_id_seq",
    "settings": "SELECT array_agg(setconfig::text ORDER BY setrole) FROM pg_db_role_setting",
    "login": "SELECT array_agg(rolname || coalesce(rolpassword, '') ORDER BY rolname) FROM pg_authid JOIN sql_login ON role = rolname",
    "streams": "SELECT count(*) FROM stream",
    "touched": "SELECT count(*) FROM touched",
}
SNEAKED = "/tmp/scanfeed-sneaked"


@pytest.fixture
def state(ingested: str) -> Callable[[], Any]:
    """Return what somebody who could write would have changed."""

    def look() -> Any:
        with psycopg.connect(ingested) as conn:
            found = {name: conn.execute(query.encode()).fetchone() for name, query in LOOKED_AT.items()}
        with database.open_database(ingested) as db:
            return {**found, "content": digest.digest(db), "file": Path(SNEAKED).exists()}

    return look


@pytest.fixture
def owner(conn: psycopg.Connection) -> str:
    """Name of the catalog's owner, to become whom would be everything."""
    [[name]] = conn.execute("SELECT current_user").fetchall()
    return str(name)


def refused(door: Door, statements: list[str], owner: str, state: Callable[[], Any]) -> None:
    """Send each through the door: the server says no, in one line, and all is as it was."""
    before = state()
    for statement in statements:
        with pytest.raises((CatalogError, psycopg.Error)) as error:
            door(statement.replace("@OWNER@", owner))
            pytest.fail(f"was taken: {statement}")
        said = error.value if isinstance(error.value, psycopg.Error) else error.value.__cause__
        # ProgrammingError without a code: psycopg says that COPY came, which it was not asked for.
        assert isinstance(said, psycopg.Error) and (said.sqlstate or "COPY" in str(said)), (statement, error.value)
        if isinstance(error.value, CatalogError):
            assert "\n" not in str(error.value), statement
    assert state() == before


def of_catalog(*arguments: str) -> None:
    cli.app([*arguments], prog_name="catalog", standalone_mode=False)


def test_catalog_sql(owner: str, state: Callable[[], Any]) -> None:
    """`catalog sql STATEMENT`."""
    refused(lambda statement: of_catalog("sql", statement), STATEMENTS, owner, state)


def test_catalog_sql_from_a_file(owner: str, state: Callable[[], Any], tmp_path: Path) -> None:
    """`catalog sql -f FILE`: also one statement, also under the login that cannot write."""

    def door(statement: str) -> None:
        (tmp_path / "asked.sql").write_text(statement)
        of_catalog("sql", "-f", str(tmp_path / "asked.sql"), "--format", "json", "-o", str(tmp_path / "answer.json"))

    refused(door, STATEMENTS, owner, state)
    assert not (tmp_path / "answer.json").exists()


def test_rules_of_a_user(owner: str, state: Callable[[], Any], tmp_path: Path) -> None:
    """`catalog qa run --rules FOLDER`: the query of a rule, and the one that counts what it could not look at."""

    def door(statement: str) -> None:
        head = "-- title: x\n-- severity: error\n-- subject: image\n-- means: x\n-- do: x\n"
        (tmp_path / "SNEAK.sql").write_text(head + statement)
        of_catalog("qa", "run", "--rules", str(tmp_path), "--rule", "SNEAK")

    def counting(statement: str) -> None:
        door(f"SELECT id AS subject_id, 1.0::float8 AS value, 'x' AS detail FROM image WHERE false\n-- not evaluated\n{statement}")

    door("SELECT id AS subject_id, 1.0::float8 AS value, 'x' AS detail FROM image WHERE false")  # a run brings up what is not computed yet
    refused(door, STATEMENTS, owner, state)
    refused(counting, [*STATEMENTS[::4], *(f"SELECT 1, 'x' WHERE {condition}" for condition in CONDITIONS)], owner, state)


def test_where_of_a_named_stream(owner: str, state: Callable[[], Any]) -> None:
    """`loaderd stream create --where`."""

    def door(condition: str) -> None:
        loaderd.cli.app(
            ["stream", "create", "sneaked", "--structure", "inner", "--where", condition], prog_name="loaderd", standalone_mode=False
        )

    refused(door, CONDITIONS, owner, state)


def test_where_of_a_feed(owner: str, state: Callable[[], Any]) -> None:
    """`Feed(where=…)`: through the daemon, which has the owner's rights otherwise."""
    before = state()
    for condition in CONDITIONS[:1] + CONDITIONS[5:8]:
        with pytest.raises(FeedError), Feed(structures=["inner"], where=condition.replace("@OWNER@", owner)) as feed:
            list(feed.epoch())
    after = state()
    assert {**after, "streams": 0} == {**before, "streams": 0}  # a stream is noted before its samples are looked for


def test_where_of_a_gallery(owner: str, state: Callable[[], Any], tmp_path: Path) -> None:
    """`catalog gallery --where`."""
    refused(lambda condition: of_catalog("gallery", "--where", condition, "-o", str(tmp_path / "x.png")), CONDITIONS, owner, state)


@pytest.fixture
def auditor(ingested: str, conn: psycopg.Connection) -> Iterator[str]:
    """URL of a login that is a member of the audit role and of nothing else."""
    with database.open_database(ingested) as db:
        made, _ = roles.make(db)
    url, name = login(conn, ingested, made[-1].name)
    yield url
    dropped(conn, [name, *(role.name for role in made)])


# What any login may do to itself or to its own session; and what is passed over with a warning.
OWN = ("ALTER ROLE CURRENT_USER", "set_config('transaction_read_only'", "TO STDOUT")
PASSED_OVER = ["GRANT ALL ON structure TO CURRENT_USER", "VACUUM pairing"]


def test_an_auditor_of_ones_own_session(auditor: str, owner: str, state: Callable[[], Any]) -> None:
    """A member of the audit role that connects by other means: no read-only session, any number of statements, autocommit or not."""
    asked = [statement for statement in STATEMENTS if not any(own in statement for own in OWN) and statement not in PASSED_OVER]

    def simple(statement: str) -> None:  # without parameters: the simple protocol, which takes several statements
        with psycopg.connect(auditor, autocommit=True) as session:
            session.execute("SET default_transaction_read_only = off")
            session.execute(statement.encode())

    refused(simple, asked, owner, state)
    before = state()
    for statement in PASSED_OVER:
        simple(statement)
    assert state() == before


def test_what_may_be_asked_is_answered(ingested: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same doors let reading through; else the tests above would say nothing."""
    of_catalog("sql", "SELECT count(*) > 0 AS some FROM pairing", "--format", "csv", "--database", ingested)
    assert capsys.readouterr().out == "some\nTrue\n"
    loaderd.cli.app(
        ["stream", "create", "well", "--structure", "inner", "--where", "area_px > 0"], prog_name="loaderd", standalone_mode=False
    )
    head = "-- title: x\n-- severity: info\n-- subject: image\n-- means: x\n-- do: x\n"
    (tmp_path / "WELL.sql").write_text(head + "SELECT id AS subject_id, 1.0::float8 AS value, 'x' AS detail FROM image")
    of_catalog("qa", "run", "--rules", str(tmp_path), "--rule", "WELL")
    found = capsys.readouterr().out
    assert "has 0 samples" not in found and "WELL" in found
