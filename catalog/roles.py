"""Group roles: what an owner, an ingest, a reviewer, a training and an auditor may do in the catalog, as PostgreSQL holds it.

Roles belong to the whole server, so their names begin as that of the login for SQL does: ``scanfeed_1f2e3d4c_audit``. They are no logins:
``GRANT scanfeed_1f2e3d4c_audit TO alice`` makes alice a member. A right that is missing is an error of the server; nothing hides rows.

No role writes the event log, nor what else triggers write: these run with the rights of whoever owns the tables, who alone brings the
schema up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import psycopg
from psycopg import sql

from catalog.database import Database, explain, private_schema
from catalog.errors import DatabaseError

SAYS = {
    "owner": "all but the event log: also undoing ingests, erasing patients, pruning",
    "ingest": "ingest and measure",
    "review": "decide pairings and flags, correct and derive annotations, run rules and set them",
    "train": "feed: splits, snapshots, streams, runs, orders, the ledger; flags of what cannot be read",
    "audit": "read everything, change nothing",
}
TEMPORARY = ("owner", "ingest", "review")  # who stages rows in temporary tables
SECRET = "sql_login"  # noqa: S105  a table: its password opens the login for SQL, whose password a member could then change
ADD, CHANGE, WRITE = "INSERT", "INSERT, UPDATE", "INSERT, UPDATE, DELETE"

# What each may write. A table that is nobody's here is written by its triggers or by the owner's role alone.
WRITES: dict[str, dict[str, tuple[str, ...]]] = {
    "ingest": {
        CHANGE: ("root", "ingest_run", "ingest_error", "file", "patient", "study", "series", "instance", "image", "measure", "reader",
                 "structure", "annotation", "pairing", "flag"),
        WRITE: ("location", "mask", "shape", "overlap", "edge_fit"),
        ADD: ("pseudonymization",),
    },
    "review": {
        CHANGE: ("pairing", "flag", "annotation", "reader", "derivation", "qa_run", "qa_result"),
        WRITE: ("mask", "shape", "overlap", "edge_fit", "relation", "rule_setting"),
        "INSERT, UPDATE, DELETE, TRUNCATE": ("scope",),
        "DELETE": ("touched",),
    },
    "train": {
        WRITE: ("stream", "run", "run_note", "attempt", "consumer", "epoch", "epoch_order", "ledger", "split", "split_patient"),
        ADD: ("flag", "snapshot", "snapshot_sample", "snapshot_mask"),
        "UPDATE (size, mtime_ns)": ("file",),  # a file that was copied, and is the same
        "UPDATE (byte_offset)": ("location",),
    },
    "audit": {},
}  # fmt: skip
NOT_OWNERS = (SECRET, "event", "alembic_version")
# Where files of a pseudonymized catalog lie: for the owner, who ingests, and the daemon, which reads them.
PRIVATE = {"owner": "SELECT, INSERT, UPDATE, DELETE", "ingest": "SELECT, INSERT, UPDATE", "train": "SELECT"}
# Before 16 PostgreSQL lets everybody make large objects, and even after that in a session that is not read-only.
LARGE_OBJECTS = ("lo_create(oid)", "lo_creat(integer)", "lo_from_bytea(oid, bytea)")


@dataclass(slots=True)
class Role:
    """One group role."""

    name: str
    may: str
    made: bool  # now; in a dry run: it would be
    members: list[str] = field(default_factory=list)


def make(database: Database, *, dry_run: bool = False) -> tuple[list[Role], list[str]]:
    """Make the roles that are missing, and give each its rights anew. Returns them, and the statements that were run, or would be.

    Raises:
        DatabaseError: If who asks may not create roles, or does not own the tables.
    """
    try:
        with database.connect(application_name="catalog db roles") as conn:
            conn.execute("SELECT pg_advisory_xact_lock(hashtext('sql_login'))")
            names = _names(conn)
            there = _there(conn, names)
            statements = [
                *(sql.SQL("CREATE ROLE {} NOLOGIN").format(sql.Identifier(name)) for name in names.values() if name not in there),
                *_grants(conn, names, made=True),
            ]
            if not dry_run:
                for statement in statements:
                    conn.execute(statement)
            roles = [Role(name, SAYS[group], name not in there, there.get(name, [])) for group, name in names.items()]
            said = [statement.as_string(conn) for statement in statements]
    except psycopg.errors.InsufficientPrivilege as error:
        raise DatabaseError(
            f"{database.name}: {error.diag.message_primary}; "
            f"roles are made by a superuser, or by who owns the catalog's tables and has CREATEROLE"
        ) from error
    except psycopg.Error as error:
        raise explain(error, database) from error
    return roles, said


def renew(conn: psycopg.Connection[Any]) -> None:
    """Give the roles their rights on what a migration brought, if they were made before; commits."""
    names = _names(conn)
    if len(_there(conn, names)) == len(names):
        for statement in _grants(conn, names, made=False):
            conn.execute(statement)
    conn.commit()


def _names(conn: psycopg.Connection[Any]) -> dict[str, str]:
    row = conn.execute("SELECT role FROM sql_login").fetchone()
    if row is None:
        raise DatabaseError("the catalog has no login for SQL, after which roles are named; run `catalog init`")
    prefix = str(row[0]).replace("scanfeed_sql_", "scanfeed_")
    return {group: f"{prefix}_{group}" for group in SAYS}


def _there(conn: psycopg.Connection[Any], names: dict[str, str]) -> dict[str, list[str]]:
    return dict(
        conn.execute(
            "SELECT r.rolname, ARRAY(SELECT m.rolname FROM pg_auth_members k JOIN pg_roles m ON m.oid = k.member "
            "WHERE k.roleid = r.oid AND NOT m.rolsuper ORDER BY 1) FROM pg_roles r WHERE r.rolname = ANY(%s)",
            [list(names.values())],
        ).fetchall()
    )


def _grants(conn: psycopg.Connection[Any], names: dict[str, str], *, made: bool) -> Iterator[sql.Composed]:
    """Give the statements that take every right from the roles and give them what they are to have."""
    row = conn.execute(
        "SELECT current_schema(), current_database(), (SELECT rolsuper FROM pg_roles WHERE rolname = current_user), "
        "pg_has_role((SELECT datdba FROM pg_database WHERE datname = current_database()), 'USAGE'), "
        "EXISTS (SELECT FROM pg_class WHERE relkind = 'r' AND relnamespace <> current_schema()::regnamespace "
        "AND relnamespace <> %s::text::regnamespace AND relnamespace::regnamespace::text !~ '^(pg_|information_schema)')",
        [private_schema(conn)],
    ).fetchone()
    assert row is not None
    schema, database = sql.Identifier(row[0]), sql.Identifier(row[1])
    is_superuser, owns_database, others = row[2:]
    private = _constant(private_schema(conn))
    tables = "SELECT relname FROM pg_class WHERE relkind = 'r' AND relnamespace = current_schema()::regnamespace ORDER BY 1"
    there = [name for (name,) in conn.execute(tables.encode())]
    for group, name in names.items():
        role = sql.Identifier(name)
        yield sql.SQL("REVOKE ALL ON ALL TABLES IN SCHEMA {} FROM {}").format(schema, role)
        yield sql.SQL("GRANT USAGE ON SCHEMA {} TO {}").format(schema, role)
        yield sql.SQL("GRANT SELECT ON ALL TABLES IN SCHEMA {} TO {}").format(schema, role)
        if group == "audit":
            yield sql.SQL("REVOKE ALL ON {}.{} FROM {}").format(schema, sql.Identifier(SECRET), role)
        if group == "owner":
            writes = {"INSERT, UPDATE, DELETE, TRUNCATE": tuple(table for table in there if table not in NOT_OWNERS)}
        else:
            writes = WRITES[group]
        for rights, on in writes.items():
            listed = sql.SQL(", ").join(sql.SQL("{}.{}").format(schema, sql.Identifier(table)) for table in on)
            yield sql.SQL("GRANT {} ON {} TO {}").format(_constant(rights), listed, role)
        yield sql.SQL("REVOKE ALL ON ALL TABLES IN SCHEMA {} FROM {}").format(private, role)
        if group in PRIVATE:
            yield sql.SQL("GRANT USAGE ON SCHEMA {} TO {}").format(private, role)
            yield sql.SQL("GRANT {} ON ALL TABLES IN SCHEMA {} TO {}").format(_constant(PRIVATE[group]), private, role)
        if group in TEMPORARY and owns_database:
            yield sql.SQL("GRANT TEMPORARY ON DATABASE {} TO {}").format(database, role)
    # In a database that others use as well these are theirs to decide.
    if made and owns_database and not others:
        yield sql.SQL("REVOKE TEMPORARY ON DATABASE {} FROM PUBLIC").format(database)
        if is_superuser:
            for function in LARGE_OBJECTS:
                yield sql.SQL("REVOKE EXECUTE ON FUNCTION pg_catalog.{} FROM PUBLIC").format(_constant(function))


def _constant(text: Any) -> sql.SQL:
    """Return words of this file as SQL."""
    return sql.SQL(text)
