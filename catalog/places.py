"""Where the files of a pseudonymized catalog lie, and what its tokens stand for: the schema `private`, for who may read it.

`catalog.pseudonyms` writes most of it; view `place` has the same for queries.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import psycopg

from catalog.database import private_schema
from catalog.errors import CatalogError

REVEAL = """
SELECT p.url || '/' || p.path FROM file f JOIN root r ON r.id = f.root_id JOIN place p ON p.file_id = f.id
WHERE f.path = %(token)s OR r.name || '/' || f.path = %(token)s OR 'file:' || f.id = %(token)s
UNION ALL
SELECT u.url FROM root r JOIN {0}.root_url u ON u.root_id = r.id WHERE r.url = %(token)s
UNION ALL
SELECT n.name FROM {0}.name n WHERE n.token = %(token)s OR %(token)s IN (SELECT r.name || '/' || n.token FROM root r) LIMIT 1
"""
STAGED_URL = "CREATE TEMP TABLE IF NOT EXISTS staged_url (root_id bigint, url text) ON COMMIT DELETE ROWS"


def is_pseudonymized(conn: psycopg.Connection[Any]) -> bool:
    """Return whether this catalog holds keyed hashes."""
    return conn.execute("SELECT EXISTS (SELECT FROM pseudonymization)").fetchone() == (True,)


def urls(conn: psycopg.Connection[Any]) -> dict[int, str]:
    """Return the place of every root by its id; empty in a catalog that is not pseudonymized.

    Raises:
        CatalogError: If who asks may not know.
    """
    if not is_pseudonymized(conn):
        return {}
    if conn.execute("SELECT may FROM privileged").fetchone() != (True,):
        raise CatalogError("this catalog is pseudonymized, and you may not know where its files lie; nothing was changed")
    return dict(conn.execute(f"SELECT root_id, url FROM {private_schema(conn)}.root_url").fetchall())  # noqa: S608  quoted


def revealed(conn: psycopg.Connection[Any], tokens: Iterable[str]) -> list[tuple[str, str | None]]:
    """Return what tokens of files (with or without their root's name and /, or file:ID), of roots and names stand for; None: nothing.

    Raises:
        CatalogError: If who asks may not know.
    """
    urls(conn)
    query = REVEAL.format(private_schema(conn)).encode()
    rows = {token: conn.execute(query, {"token": token}).fetchone() for token in tokens}
    return [(token, None if row is None else row[0]) for token, row in rows.items()]


def write_url(conn: psycopg.Connection[Any], root_id: int, url: str) -> None:
    """Note where a root lies."""
    conn.execute(STAGED_URL)
    with conn.cursor().copy("COPY staged_url FROM STDIN") as copy:
        copy.write_row((root_id, url))
    conn.execute(
        f"INSERT INTO {private_schema(conn)}.root_url (root_id, url) SELECT root_id, url FROM staged_url "  # noqa: S608  quoted
        "ON CONFLICT (root_id) DO UPDATE SET url = excluded.url"
    )
    conn.execute("TRUNCATE staged_url")
