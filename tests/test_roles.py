"""What each role may do, tried by a login that is a member of it; and that what it may not do is refused, never passed over."""

from __future__ import annotations

import os
import subprocess
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from catalog import database, roles
from catalog.tables import metadata
from loaderd import Feed
from tests.conftest import Run
from tests.processes import daemons, wait_until

As = Callable[..., "subprocess.CompletedProcess[str]"]
# Written by triggers, by erasing, or by nobody.
OF_NO_GROUP = {"event", "catalog_change", "erasure", "sql_login"}


def login(conn: psycopg.Connection, url: str, group: str) -> tuple[str, str]:
    """Make a login that is a member of a role and return its URL and name."""
    name, password = f"member_{uuid.uuid4().hex[:8]}", uuid.uuid4().hex
    conn.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(sql.Identifier(name), sql.Literal(password)))
    conn.execute(sql.SQL("GRANT {} TO {}").format(sql.Identifier(group), sql.Identifier(name)))
    return url_of(url, name, password), name


def url_of(url: str, user: str, password: str) -> str:
    """Return the URL with another user."""
    parts = conninfo_to_dict(url)
    host, port = str(parts["host"]), parts.get("port", 5432)
    if host.startswith("/"):
        return f"postgresql://{user}:{password}@/{parts['dbname']}?host={host}&port={port}"
    return f"postgresql://{user}:{password}@{host}:{port}/{parts['dbname']}"


def dropped(conn: psycopg.Connection, names: Sequence[str]) -> None:
    """Drop roles with all their rights: they belong to the server, which lives on."""
    for name in names:
        conn.execute(sql.SQL("DROP OWNED BY {}").format(sql.Identifier(name)))
        conn.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(name)))


@pytest.fixture
def member(database_url: str, conn: psycopg.Connection) -> Iterator[Callable[[str], str]]:
    """Make the roles; returns the URL of a login that is a member of the one of this name."""
    with database.open_database(database_url) as db:
        made, _ = roles.make(db)
    logins: dict[str, tuple[str, str]] = {}

    def of(group: str) -> str:
        if group not in logins:
            logins[group] = login(conn, database_url, next(role.name for role in made if role.name.endswith(f"_{group}")))
        return logins[group][0]

    yield of
    conn.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename LIKE 'member_%%'", [])
    dropped(conn, [*(name for _, name in logins.values()), *(role.name for role in made)])


@pytest.fixture
def catalog_as(catalog: Run, member: Callable[[str], str]) -> As:
    """Run `catalog` as a member of a role."""
    return lambda group, *arguments: catalog(*arguments, env={**os.environ, "CATALOG_DATABASE_URL": member(group)})


def denied(url: str, *statements: str) -> None:
    """Each is refused by the server for want of a right."""
    with psycopg.connect(url, autocommit=True) as session:
        for statement in statements:
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                session.execute(statement.encode())
                pytest.fail(f"was taken: {statement}")


def test_every_table_is_somebodys_to_write() -> None:
    """No table is forgotten: each is written by a role of its own or known to be nobody's, and no role names one that is not there."""
    given = {table for writes in roles.WRITES.values() for tables in writes.values() for table in tables}
    assert given | OF_NO_GROUP == set(metadata.tables)
    assert not given & OF_NO_GROUP


def test_an_auditor_reads_every_row_and_changes_none(ingested: str, catalog_as: As, member: Callable[[str], str]) -> None:
    """Of each table the auditor sees as many rows as the owner; commands that read work; those that write are refused in words."""
    names = [name for name in metadata.tables if name != "sql_login"]
    counts = " UNION ALL ".join(f"SELECT '{name}', count(*) FROM {name}" for name in (*names, "sample", "orphans", "exposure"))
    with psycopg.connect(ingested) as conn, psycopg.connect(member("audit")) as session:
        assert session.execute(counts.encode()).fetchall() == conn.execute(counts.encode()).fetchall()
        assert conn.execute("SELECT count(*) FROM pg_class WHERE relrowsecurity").fetchone() == (0,)
    denied(
        member("audit"), "SELECT password FROM sql_login", "CREATE TABLE x ()", "CREATE TEMP TABLE x ()", "SELECT lo_create(0)",
        *(f"DELETE FROM {name}" for name in (*names, "sql_login")), *(f"TRUNCATE {name} CASCADE" for name in names),
    )  # fmt: skip
    for command in (
        ["status"],
        ["audit", "--all"],
        ["sql", "SELECT 1"],
        ["schema", "flag"],
        ["digest"],
        ["flag", "list"],
        ["pair", "list"],
    ):
        done = catalog_as("audit", *command)
        assert done.returncode == 0, (command, done.stderr)
    for command in (["pair", "reject", "1"], ["qa", "run"], ["init"], ["measure"],
                    ["db", "roles"], ["sql", "DELETE FROM flag"]):  # fmt: skip
        done = catalog_as("audit", *command)
        if command == ["init"]:  # there is nothing to bring up
            continue
        assert done.returncode not in (0, 3) and len(done.stderr.splitlines()) == 1, (command, done)
        assert "permission denied" in done.stderr or "refused" in done.stderr, (command, done.stderr)


def test_a_reviewer_decides(ingested: str, conn: psycopg.Connection, catalog_as: As, member: Callable[[str], str]) -> None:
    """A reviewer decides pairings and flags and runs rules; and may not delete them, ingest, feed or see to the event log."""
    [[image, pairing]] = conn.execute("SELECT image_id, id FROM pairing WHERE state = 'accepted' ORDER BY id LIMIT 1").fetchall()
    for command in (["pair", "reject", str(pairing)], ["pair", "accept", str(pairing)], ["qa", "run", "--fail-on", "error"]):
        done = catalog_as("review", *command)
        assert done.returncode == 0, (command, done.stderr)
    with psycopg.connect(member("review")) as session:
        session.execute(
            "INSERT INTO flag (rule, severity, detail, image_id, raised_by) VALUES ('SEEN', 'warning', 'looked at', %s, 'a person')",
            [image],
        )
        session.execute("UPDATE flag SET state = 'resolved', closed_by = 'me', closed_at = now(), reason = 'well' WHERE rule = 'SEEN'")
        session.execute("UPDATE rule_setting SET value = '1'")
        [[name]] = session.execute("SELECT current_user").fetchall()
    found = conn.execute("SELECT action, login FROM event WHERE subject = 'flag' AND coalesce(after, before)->>'rule' = 'SEEN' ORDER BY id")
    assert found.fetchall() == [("insert", name), ("update", name)]
    denied(
        member("review"), "DELETE FROM flag", "DELETE FROM pairing", "UPDATE image SET frame = 1", "DELETE FROM annotation",
        "DELETE FROM event",
        "INSERT INTO run (name, program_version, host) VALUES ('x', 'x', 'x')", "UPDATE ledger SET attempt = 2",
        "INSERT INTO event (actor, subject, action) VALUES ('x', 'flag', 'update')", "INSERT INTO touched (series_id) VALUES (1)",
        "INSERT INTO structure (name) VALUES ('x')", "ALTER TABLE flag DISABLE TRIGGER ALL", "DROP TABLE flag",
    )  # fmt: skip


def test_the_log_cannot_be_led_astray(ingested: str, conn: psycopg.Connection, member: Callable[[str], str]) -> None:
    """A temporary table of the log's name, or a search path of one's own, takes no event away from the log."""
    [[before]] = conn.execute("SELECT count(*) FROM event").fetchall()
    with psycopg.connect(member("review"), autocommit=True) as session:
        session.execute("CREATE TEMP TABLE event (LIKE public.event INCLUDING ALL)")
        session.execute("CREATE TEMP TABLE touched (LIKE public.touched INCLUDING ALL)")
        session.execute("SET search_path = pg_temp, public")
        session.execute("UPDATE public.pairing SET state = 'rejected', actor = 'somebody' WHERE id = (SELECT min(id) FROM public.pairing)")
        assert session.execute("SELECT count(*) FROM pg_temp.event").fetchone() == (0,)
    assert conn.execute("SELECT count(*) - %s FROM event WHERE true", [before]).fetchone() == (1,)


def test_a_training_is_fed(ingested: str, conn: psycopg.Connection, member: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The daemon of a member of train feeds a whole epoch, with a condition; a training decides nothing."""
    monkeypatch.setenv("CATALOG_DATABASE_URL", member("train"))
    with Feed(structures=["inner"], batch_size=2, where="area_px > 0", run="theirs") as feed:
        assert sum(len(batch) for batch in feed.epoch()) == feed.num_samples > 0
    assert wait_until(lambda: daemons() == [])
    [row] = conn.execute("SELECT planned = delivered, missing, twice FROM epoch_coverage WHERE run = 'theirs'").fetchall()
    assert row == (True, 0, 0)
    with psycopg.connect(member("train")) as session:
        session.execute(
            "INSERT INTO flag (rule, severity, detail, file_id, raised_by) "
            "SELECT 'FEED-UNREADABLE', 'error', 'x', min(id), 'loaderd' FROM file"
        )
        session.execute("UPDATE file SET size = size, mtime_ns = mtime_ns")
        session.execute("UPDATE location SET byte_offset = byte_offset")
    denied(
        member("train"), "UPDATE flag SET state = 'open'", "DELETE FROM flag", "UPDATE pairing SET state = 'accepted'",
        "UPDATE file SET path = 'x'", "UPDATE location SET preferred = false", "INSERT INTO structure (name) VALUES ('x')",
        "DELETE FROM annotation", "DELETE FROM event", "CREATE TEMP TABLE x ()",
    )  # fmt: skip


def test_an_ingest_ingests(
    database_url: str, studies: Path, conn: psycopg.Connection, catalog_as: As, member: Callable[[str], str]
) -> None:
    """A member of ingest takes a folder in, again after a change, and measures it; and sets no rule and feeds nobody."""
    for command in (["ingest", str(studies), "--jobs", "1"], ["ingest", str(studies), "--jobs", "1"], ["measure", "--jobs", "1"]):
        done = catalog_as("ingest", *command)
        assert done.returncode == 0, (command, done.stderr)
    [[images, masks, measured]] = conn.execute(
        "SELECT (SELECT count(*) FROM image), (SELECT count(*) FROM mask), (SELECT count(*) FROM measure)"
    ).fetchall()
    assert images == measured > 0 and masks > 0
    denied(
        member("ingest"), "DELETE FROM image", "DELETE FROM flag", "UPDATE relation SET actor = 'x'", "DELETE FROM rule_setting",
        "INSERT INTO run (name, program_version, host) VALUES ('x', 'x', 'x')", "UPDATE event SET actor = 'x'",
        "INSERT INTO event (actor, subject, action) VALUES ('x', 'flag', 'update')",
        "INSERT INTO catalog_change (xid, at) VALUES (1, now())",
    )  # fmt: skip


def test_an_owner_undoes_and_erases(ingested: str, conn: psycopg.Connection, catalog_as: As, member: Callable[[str], str]) -> None:
    """A member of owner erases a patient and undoes an ingest; the event log stands, and the tables are as they are."""
    [[patient]] = conn.execute("SELECT patient_id FROM patient ORDER BY id LIMIT 1").fetchall()
    for command in (["patient", "erase", patient, "--reason", "asked for", "--yes"], ["runs", "undo", "1", "--yes"]):
        done = catalog_as("owner", *command)
        if "No such option" in done.stderr:
            done = catalog_as("owner", *command[:-1])
        assert done.returncode == 0, (command, done.stderr)
    assert conn.execute("SELECT count(*) FROM image").fetchone() == (0,)
    denied(
        member("owner"), "UPDATE event SET actor = 'x'", "DELETE FROM event", "TRUNCATE event", "ALTER TABLE event DISABLE TRIGGER ALL",
        "INSERT INTO event (actor, subject, action) VALUES ('x', 'flag', 'update')", "DROP TABLE flag", "UPDATE sql_login SET role = 'x'",
    )  # fmt: skip


def test_roles_are_made_once_and_renewed(database_url: str, conn: psycopg.Connection, catalog: Run) -> None:
    """A dry run makes nothing and says the statements; a second run takes back what was given beside, and grants new tables."""
    done = catalog("db", "roles", "--dry-run")
    assert done.returncode == 0 and "CREATE ROLE" in done.stdout and "nothing was changed" in done.stderr
    [[prefix]] = conn.execute("SELECT replace(role, '_sql_', '_') FROM sql_login").fetchall()
    ours = "SELECT array_agg(rolname ORDER BY rolname) FROM pg_roles WHERE rolname LIKE %s"
    assert conn.execute(ours, [f"{prefix}%"]).fetchone() == (None,)
    assert catalog("db", "roles").returncode == 0
    names = [f"{prefix}_{group}" for group in sorted(roles.SAYS)]
    try:
        assert conn.execute(ours, [f"{prefix}%"]).fetchone() == (names,)
        audit = sql.Identifier(f"{prefix}_audit")
        conn.execute(sql.SQL("GRANT DELETE ON flag TO {}").format(audit))
        conn.execute("CREATE TABLE later ()")
        done = catalog("db", "roles")
        assert done.returncode == 0 and "renewed" in done.stdout
        asked = "SELECT has_table_privilege(%(role)s, 'flag', 'DELETE'), has_table_privilege(%(role)s, 'later', 'SELECT')"
        assert conn.execute(asked, {"role": f"{prefix}_audit"}).fetchone() == (False, True)
        conn.execute("CREATE TABLE after_a_migration ()")
        with psycopg.connect(database_url) as owner:
            roles.renew(owner)
        assert conn.execute("SELECT has_table_privilege(%s, 'after_a_migration', 'SELECT')", [f"{prefix}_audit"]).fetchone() == (True,)
    finally:
        dropped(conn, names)


def test_an_owner_who_may_not_create_roles_is_told(database_url: str, conn: psycopg.Connection, catalog: Run) -> None:
    """Without CREATEROLE, or by who does not own the tables: one line, exit code 5, nothing made."""
    name, password = f"member_{uuid.uuid4().hex[:8]}", uuid.uuid4().hex
    conn.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(sql.Identifier(name), sql.Literal(password)))
    conn.execute(sql.SQL("GRANT SELECT ON ALL TABLES IN SCHEMA public TO {}").format(sql.Identifier(name)))
    try:
        done = catalog("db", "roles", "--database", url_of(database_url, name, password))
        assert done.returncode == 5, done
        [line] = done.stderr.splitlines()
        assert "permission denied" in line and "CREATEROLE" in line and password not in line
    finally:
        dropped(conn, [name])
