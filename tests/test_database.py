"""Which PostgreSQL, and the two doors to it: what an owner is told, and what SQL from users cannot do."""

from __future__ import annotations

import contextlib
import json
import re
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from alembic import command
from alembic.config import Config
from psycopg import sql

from catalog import cli, database
from catalog.errors import CatalogError, DatabaseError
from tests.conftest import REPOSITORY, Run

# Each would leave something behind, read what is secret, or become somebody else.
FORBIDDEN = [
    "INSERT INTO structure (name) VALUES ('sneaked')",
    "UPDATE structure SET name = 'sneaked'",
    "DELETE FROM structure",
    "TRUNCATE structure CASCADE",
    "DROP TABLE mask",
    "ALTER TABLE mask ADD COLUMN sneaked int",
    "CREATE TABLE sneaked ()",
    "CREATE TEMP TABLE sneaked AS SELECT 1",
    "CREATE SCHEMA sneaked",
    "CREATE FUNCTION sneaked() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    "CREATE EXTENSION pg_trgm",
    "CREATE ROLE sneaked",
    "ALTER ROLE CURRENT_USER SET default_transaction_read_only = off",
    "ALTER ROLE CURRENT_USER PASSWORD 'sneaked'",
    "ALTER SYSTEM SET work_mem = '1GB'",
    "GRANT ALL ON structure TO CURRENT_USER",
    "COMMENT ON TABLE mask IS 'sneaked'",
    "SELECT nextval('structure_id_seq')",
    "SELECT id FROM structure FOR UPDATE",
    "WITH gone AS (DELETE FROM structure RETURNING *) SELECT * FROM gone",
    "EXPLAIN ANALYZE DELETE FROM structure",
    "SELECT query_to_xml('DELETE FROM structure RETURNING 1', true, true, '')",
    "SELECT set_config('transaction_read_only', 'off', true)",
    # one statement after another
    "COMMIT; INSERT INTO structure (name) VALUES ('sneaked')",
    "COMMIT; SET default_transaction_read_only = off; CREATE TEMP TABLE sneaked ()",
    "SELECT 1; DELETE FROM structure",
    "ROLLBACK; BEGIN READ WRITE; SELECT lo_create(0); COMMIT",
    "DO $$ BEGIN COMMIT; SET TRANSACTION READ WRITE; PERFORM lo_create(0); END $$",
    "DO $$ BEGIN SET TRANSACTION READ WRITE; INSERT INTO structure (name) VALUES ('sneaked'); END $$",
    # becoming somebody else
    "SET ROLE @OWNER@",
    "SET SESSION AUTHORIZATION @OWNER@",
    "SELECT set_config('role', '@OWNER@', false)",
    # files and programs of the server
    "COPY structure FROM PROGRAM 'echo sneaked'",
    "COPY (SELECT 1) TO PROGRAM 'cat > /dev/null'",
    "COPY (SELECT 1) TO '/tmp/sneaked'",
    "SELECT pg_read_file('postgresql.conf')",
    "SELECT pg_ls_dir('.')",
    "SELECT lo_import('/etc/hostname')",
    # what is secret
    "SELECT * FROM sql_login",
    "SELECT rolpassword FROM pg_authid",
]
# Taken, since PostgreSQL has no right for it (large objects: before 16), and undone.
UNDONE = [
    "SELECT lo_create(0)",
    "SELECT lo_from_bytea(0, 'sneaked')",
    "SELECT set_config('default_transaction_read_only', 'off', false)",
    "SET default_transaction_read_only = off",
    "SET TRANSACTION READ WRITE",
    "COMMIT",
    "ROLLBACK",
    "RESET ALL",
]


def ask(url: str, query: str, *options: str) -> None:
    """Run `catalog sql` in this process: its errors come as exceptions."""
    cli.app(["sql", query, "--database", url, *options], prog_name="catalog", standalone_mode=False)


def state(url: str) -> list[tuple[Any, ...]]:
    """Return what somebody who could write would have changed."""
    with psycopg.connect(url) as conn:
        return conn.execute(
            "SELECT (SELECT string_agg(name, ',') FROM structure), (SELECT count(*) FROM pg_class), (SELECT count(*) FROM pg_proc), "
            "(SELECT count(*) FROM pg_namespace WHERE nspname !~ '^pg_'), (SELECT count(*) FROM pg_largeobject_metadata), "
            "(SELECT array_agg(setconfig::text ORDER BY setrole) FROM pg_db_role_setting), "
            "(SELECT array_agg(rolname || coalesce(rolpassword, '') ORDER BY rolname) FROM pg_authid JOIN sql_login ON role = rolname), "
            "(SELECT last_value FROM structure_id_seq), obj_description('mask'::regclass)"
        ).fetchall()


@pytest.fixture
def owner(server_url: str, new_database: Callable[[], str]) -> Iterator[tuple[str, str]]:
    """URL of an empty database of an owner who has no other right on the server, and that owner's name."""
    name, password = f"owner_{uuid.uuid4().hex[:8]}", uuid.uuid4().hex
    url = new_database()
    database_name = psycopg.conninfo.conninfo_to_dict(url)["dbname"]
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute("DROP SCHEMA public, private CASCADE")
        conn.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(sql.Identifier(name), sql.Literal(password)))
        conn.execute(sql.SQL("CREATE SCHEMA public AUTHORIZATION {}").format(sql.Identifier(name)))
        conn.execute(sql.SQL("ALTER DATABASE {} OWNER TO {}").format(sql.Identifier(str(database_name)), sql.Identifier(name)))
    yield re.sub("//[^@]*@", f"//{name}:{password}@", url), name
    with psycopg.connect(url, autocommit=True) as conn:
        logins = []
        if conn.execute("SELECT to_regclass('sql_login')").fetchone() != (None,):
            logins = [row[0] for row in conn.execute("SELECT role FROM sql_login JOIN pg_roles ON rolname = role").fetchall()]
        conn.execute(sql.SQL("REASSIGN OWNED BY {} TO CURRENT_USER").format(sql.Identifier(name)))
        for role in (*logins, name):
            conn.execute(sql.SQL("DROP OWNED BY {}").format(sql.Identifier(role)))
            conn.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(role)))


# ------------------------------------------------------------------------------------------ which PostgreSQL


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+psycopg", "postgresql+psycopg2"])
def test_every_way_to_write_the_scheme_is_taken(database_url: str, scheme: str) -> None:
    """URLs written for libpq or for any driver of SQLAlchemy open the same database."""
    url = scheme + database_url.removeprefix("postgresql")
    with database.open_database(url) as given, database.open_database(database_url) as plain:
        assert given.identity() == plain.identity()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("mysql://ann:s3cret@somewhere/x", "scheme 'mysql' is not postgresql://"),
        ("sqlite:///catalog.db", "scheme 'sqlite' is not postgresql://"),
        ("catalog", "is not postgresql://"),
        ("postgresql://[", "database URL"),
        ("postgresql://somewhere/x?nonsense=1", "nonsense"),
        ("postgresql://ann:s3cret%@somewhere/x", "% is %25"),
        ("postgresql://ann:s3cret/more@somewhere/x", "/ is %2F"),
        ("postgresql://ann:12/s3cret@somewhere/x", "/ is %2F"),
    ],
)
def test_a_url_that_cannot_be_right_is_a_usage_error(catalog: Run, url: str, words: str) -> None:
    """Exit code 2 and one line, which never shows the password."""
    done = catalog("status", "--database", url)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    [line] = done.stderr.splitlines()
    assert line.startswith("catalog: ") and words in line
    assert "s3cret" not in line


def test_a_server_out_of_reach_is_one_line(catalog: Run, loaderd: Run) -> None:
    """Exit code 5 and one line that says where and what to look at, without the password."""
    url = "postgresql://ann:s3cret@127.0.0.1:1/studies"
    for done in (catalog("status", "--database", url), catalog("init", "--database", url), loaderd("serve", "--database", url)):
        assert (done.returncode, done.stdout) == (5, "")
        [line] = done.stderr.splitlines()
        assert "database 'studies' at 127.0.0.1:1: out of reach" in line and "CATALOG_DATABASE_URL" in line
        assert "s3cret" not in line


def test_a_wrong_password_is_one_line(database_url: str, catalog: Run) -> None:
    """A server that refuses the login: exit code 5, and the password is not shown."""
    done = catalog("status", "--database", re.sub("//[^@]*@", "//nobody_here:s3cret@", database_url))
    assert done.returncode == 5
    [line] = done.stderr.splitlines()
    assert "nobody_here" in line and "s3cret" not in line


def test_two_databases_of_one_server_are_not_taken_for_each_other(new_database: Callable[[], str]) -> None:
    """The identity that a daemon's socket carries differs between databases, and is the same each time it is asked for."""
    one, other = new_database(), new_database()
    with database.open_database(one) as first, database.open_database(other) as second, database.open_database(one) as again:
        assert first.identity() == again.identity() != second.identity()


def test_options_of_the_url_hold_beside_those_of_the_program(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A search path given in the URL, or in PGOPTIONS, holds on connections that have options of their own; theirs win."""
    shown = "SELECT current_setting('search_path'), current_setting('work_mem')"
    url = f"{database_url}{'&' if '?' in database_url else '?'}options=-csearch_path%3Dtenant,public%20-cwork_mem%3D5MB"
    with (
        database.open_database(url) as db,
        db.connect() as conn,
        db.connect(options="-c work_mem=6MB") as other,
        db.read_only() as reading,
    ):
        found = [door.execute(shown).fetchone() for door in (conn, other, reading)]
    assert found == [("tenant,public", "5MB"), ("tenant,public", "6MB"), ("tenant,public", "5MB")]
    monkeypatch.setenv("PGOPTIONS", "-c work_mem=7MB")
    with database.open_database(database_url) as db, db.connect(options="-c jit=off") as conn:
        assert conn.execute("SELECT current_setting('work_mem')").fetchone() == ("7MB",)


def test_a_client_host_that_died_is_noticed_within_a_minute(database_url: str) -> None:
    """The server is told to ask a silent client of another host, or its locks would stand for two hours; loaderd's options add to it."""
    asked = "SELECT name, reset_val FROM pg_settings WHERE name LIKE 'tcp_keepalives%'"  # what SHOW hides on a Unix socket
    with database.open_database(database_url) as db, db.connect(options="-c work_mem=6MB") as conn:
        found = {name: int(value) for name, value in conn.execute(asked).fetchall()}
    assert 0 < found["tcp_keepalives_idle"] + found["tcp_keepalives_interval"] * found["tcp_keepalives_count"] <= 60


# ------------------------------------------------------------------------------------------ SQL from users


def test_sql_from_users_cannot_write_by_any_door(database_url: str, conn: psycopg.Connection) -> None:
    """No statement changes anything, reads the login's password or another's rights, or touches the server's files."""
    conn.execute("INSERT INTO structure (name) VALUES ('inner')")
    [[owner]] = conn.execute("SELECT current_user").fetchall()
    ask(database_url, "SELECT count(*) FROM sample")
    before = state(database_url)
    for statement in FORBIDDEN:
        with pytest.raises(CatalogError, match=r"^sql: [^\n]+$"):
            ask(database_url, statement.replace("@OWNER@", owner))
            pytest.fail(f"was taken: {statement}")
        assert state(database_url) == before, statement
    for statement in UNDONE:
        with contextlib.suppress(CatalogError):
            ask(database_url, statement)
        assert state(database_url) == before, statement


def test_the_login_has_no_right_to_write_even_in_a_session_of_its_own(database_url: str, conn: psycopg.Connection) -> None:
    """Whoever gets hold of the login's password and sets nothing read-only still cannot change a table or see the password."""
    [[role, password]] = conn.execute("SELECT role, password FROM sql_login").fetchall()
    with psycopg.connect(database_url, user=role, password=password, autocommit=True) as session:
        session.execute("SET default_transaction_read_only = off")
        for statement in [*FORBIDDEN[:5], "SELECT * FROM sql_login", "CREATE TABLE sneaked ()", "SELECT nextval('structure_id_seq')"]:
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                session.execute(statement.encode())


def test_sql_prints_rows(database_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What may be asked is answered: as a table, JSON and CSV."""
    ask(database_url, "SELECT 1 AS one, NULL AS nothing, 'é' AS letter", "--json")
    assert json.loads(capsys.readouterr().out) == [{"one": 1, "nothing": None, "letter": "é"}]
    ask(database_url, "SELECT 1 AS one, NULL AS nothing, 'a,b' AS text", "--csv")
    assert capsys.readouterr().out == 'one,nothing,text\n1,,"a,b"\n'
    ask(database_url, "SELECT 10 AS n, 'x' AS text")
    assert capsys.readouterr().out == " n  text\n--  ----\n10  x\n"


@pytest.mark.parametrize("statement", ["SELECT pg_sleep(20)", "SELECT set_config('statement_timeout', '0', false), pg_sleep(20)"])
def test_sql_has_a_time_limit(database_url: str, statement: str) -> None:
    """A statement that takes longer than allowed is stopped, also one that lifts the limit."""
    with pytest.raises(CatalogError, match="took too long"):
        ask(database_url, statement, "--timeout", "0.2")


def test_copy_to_standard_output_is_one_line(database_url: str) -> None:
    """COPY … TO STDOUT, which is not rows, is refused in words."""
    with pytest.raises(CatalogError, match=r"^sql: [^\n]+$"):
        ask(database_url, "COPY (SELECT 1) TO STDOUT")


# ------------------------------------------------------------------------------------------ the login for it


def test_a_login_that_was_dropped_is_made_again(owner: tuple[str, str], server_url: str) -> None:
    """A dump restored elsewhere has no role: the next `catalog sql` makes it, with the name and password in the catalog."""
    url, name = owner
    with psycopg.connect(server_url, autocommit=True) as conn:
        conn.execute(sql.SQL("ALTER ROLE {} CREATEROLE").format(sql.Identifier(name)))
    with database.open_database(url) as db, db.connect() as conn:
        [[role]] = conn.execute("SELECT role FROM sql_login").fetchall()
        conn.execute(sql.SQL("REVOKE ALL ON ALL TABLES IN SCHEMA public FROM {}").format(sql.Identifier(role)))
        conn.execute(sql.SQL("REVOKE ALL ON SCHEMA public FROM {}").format(sql.Identifier(role)))
        conn.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(role)))
    ask(url, "SELECT count(*) FROM sample")
    with psycopg.connect(url) as conn:
        assert conn.execute("SELECT role FROM sql_login JOIN pg_roles ON rolname = role").fetchall() == [(role,)]


def test_an_owner_without_createrole_is_told_what_a_superuser_must_run(owner: tuple[str, str], server_url: str) -> None:
    """The message names a statement; once a superuser ran it with the password of table sql_login, `catalog sql` works."""
    url, _ = owner
    with pytest.raises(DatabaseError, match="may not create roles") as first:
        database.open_database(url)
    with pytest.raises(DatabaseError) as second:
        ask(url, "SELECT 1")
    assert str(first.value) == str(second.value)
    statement = re.search(r"CREATE ROLE (\w+) LOGIN PASSWORD", str(second.value))
    assert statement is not None
    with psycopg.connect(url) as conn:
        [[password]] = conn.execute("SELECT password FROM sql_login WHERE role = %s", [statement[1]]).fetchall()
    with psycopg.connect(server_url, autocommit=True) as conn:
        conn.execute(sql.SQL("{} {}").format(sql.SQL(statement[0]), sql.Literal(password)))
    ask(url, "SELECT count(*) FROM sample")


def test_the_login_reads_what_a_later_migration_brings(owner: tuple[str, str], server_url: str) -> None:
    """A catalog of version 0001 with a login: after the upgrade it reads every new table and view, and the passwords still not."""
    url, name = owner
    with psycopg.connect(server_url, autocommit=True) as conn:
        conn.execute(sql.SQL("ALTER ROLE {} CREATEROLE").format(sql.Identifier(name)))
    config = Config()
    config.set_main_option("script_location", str(REPOSITORY / "migrations").replace("%", "%%"))
    with database.open_database(url, migrate=False) as db:
        with db.engine().begin() as old:
            config.attributes["connection"] = old
            command.upgrade(config, "0001")
        with db.connect() as conn:
            login, _ = database.make_sql_login(conn)
        assert database.upgrade(db) == "0001"
        with db.connect() as conn:
            relations = "FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'v')"
            refused = f"SELECT relname {relations} AND NOT has_table_privilege(%s, oid, 'SELECT')"
            assert conn.execute(refused, [login]).fetchall() == [("sql_login",)]
    for view in ("revoked_image", "sample_history", "epoch_coverage", "run_provenance", "consumer"):
        ask(url, f"SELECT count(*) FROM {view}")
