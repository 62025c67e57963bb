"""Roots: where the files lie that the catalog knows, and moving one as a whole."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from psycopg.rows import dict_row

from catalog import places
from catalog.database import Database
from catalog.errors import CatalogError, UsageError
from catalog.flags import transaction
from catalog.remote import is_url, opened

LOCK_CLASS = 0x5CA9  # advisory lock (LOCK_CLASS, root id): one ingest a root at a time

# s. An ingest that has just ended holds its lock until the server sees that its connection is gone.
PAUSES = (0.0, 0.05, 0.2, 0.5)

LOOKED_AT = 20  # files of a moved root that are looked for in the new place

LISTED = """
SELECT r.name, r.url, count(f.id) AS files, count(f.id) FILTER (WHERE f.state = 'present') AS present,
       count(f.id) FILTER (WHERE f.state = 'missing') AS missing, count(f.id) FILTER (WHERE f.state = 'unreadable') AS unreadable,
       coalesce(sum(f.size) FILTER (WHERE f.state = 'present'), 0)::bigint AS bytes, r.created_at AS created,
       (SELECT max(i.id) FROM ingest_run i WHERE i.root_id = r.id) AS last_run
FROM root r LEFT JOIN file f ON f.root_id = r.id GROUP BY r.id ORDER BY r.name
"""

# Spread over the root, and the same ones each time that it is tried.
SOME_FILES = """
SELECT p.path, f.size FROM file f JOIN place p ON p.file_id = f.id WHERE f.root_id = %s AND f.state = 'present'
ORDER BY sha256(convert_to(f.path, 'UTF8')) LIMIT %s
"""


@dataclass(frozen=True, slots=True)
class Moved:
    """What moving a root did, or would do. In a pseudonymized catalog the places are not said."""

    name: str
    before: str
    after: str
    files: int
    looked_for: int
    found: int

    @property
    def changed(self) -> bool:
        """False: it lay there already."""
        return self.before != self.after


def listed(database: Database) -> list[dict[str, Any]]:
    """Return every root: name, url, files by state, bytes, when it was made, its last run of `catalog ingest`."""
    with transaction(database) as conn, conn.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(LISTED).fetchall()


def move(database: Database, name: str, place: str, *, even_so: bool = False, dry_run: bool = False) -> Moved:
    """Note that a root's files lie elsewhere now: one UPDATE. Daemons read from the new place from their next epoch on.

    Args:
        place: A folder, or a URL with ://.
        even_so: Also if the files that are looked for there are not found.

    Raises:
        UsageError: If there is no such root.
        CatalogError: If the place is no folder or another root's, or its files are not there.
    """
    after = _place(place)
    with transaction(database, dry_run=dry_run) as conn:
        row = conn.execute("SELECT id, url FROM root WHERE name = %s FOR UPDATE", [name]).fetchone()
        if row is None:
            raise UsageError(f"root {name!r}: there is none of this name; see `catalog root list`")
        root_id, before = row
        hidden = places.urls(conn)
        lay, said = hidden.get(root_id, before), "elsewhere" if hidden else after
        files = conn.execute("SELECT count(*) FROM file WHERE root_id = %s", [root_id]).fetchone()
        assert files is not None
        if after == lay:
            return Moved(name, before, before, files[0], 0, 0)
        alone(conn, [root_id])
        there = [other for other, url in hidden.items() if url == after]
        if taken := conn.execute("SELECT name FROM root WHERE id = ANY(%s) OR url = %s", [there, said]).fetchone():
            raise CatalogError(f"{'the new place' if hidden else after}: is the place of root {taken[0]!r}; two roots cannot share one")
        some = conn.execute(SOME_FILES, [root_id, LOOKED_AT]).fetchall()
        found = sum(_size(after, path) == size for path, size in some)
        if found < len(some) and not even_so:
            raise CatalogError(
                f"{'the new place' if hidden else after}: of {len(some)} files of root {name!r} that were looked for, "
                f"{found} are there with their size; nothing was changed; move the files first, or say --even-so"
            )
        # Of a root whose folder is a keyed hash too: daemons look for changes of this table.
        conn.execute("UPDATE root SET url = %s WHERE id = %s", [before if hidden else after, root_id])
        if hidden:
            places.write_url(conn, root_id, after)
        return Moved(name, before, said, files[0], len(some), found)


def alone(conn: psycopg.Connection[Any], root_ids: Iterable[int]) -> None:
    """Keep ingests of these roots out until the transaction ends.

    Raises:
        CatalogError: If one is running: it would write over what is decided or taken out meanwhile.
    """
    for root_id in sorted(set(root_ids)):
        if not any(_locked(conn, root_id, pause) for pause in PAUSES):
            name = conn.execute("SELECT name FROM root WHERE id = %s", [root_id]).fetchone()
            raise CatalogError(f"root {name[0] if name else root_id!r}: an ingest of it is running; try again when it has ended")


def _locked(conn: psycopg.Connection[Any], root_id: int, pause: float) -> bool:
    time.sleep(pause)
    return conn.execute("SELECT pg_try_advisory_xact_lock(%s, %s)", [LOCK_CLASS, root_id]).fetchone() == (True,)


def _place(place: str) -> str:
    if is_url(place):
        return place.rstrip("/")
    shown = place.encode(errors="replace").decode()
    try:
        folder = Path(place).resolve(strict=True)
        str(folder).encode()
    except UnicodeEncodeError:
        raise CatalogError(f"{shown}: its path is not UTF-8, which PostgreSQL cannot store; rename it") from None
    except (OSError, RuntimeError, ValueError) as error:
        raise CatalogError(f"{shown}: {getattr(error, 'strerror', None) or error}; nothing was changed") from None
    if not folder.is_dir():
        raise CatalogError(f"{shown}: is no folder; nothing was changed")
    return str(folder)


def _size(place: str, path: str) -> int | None:
    """Return the size of a file in bytes, None if it is not there."""
    try:
        if not is_url(place):
            return Path(place, path).stat().st_size
        system, folder = opened(place)
        return int(system.size(f"{folder}/{path}"))
    except CatalogError:
        raise
    except Exception:  # each storage has errors of its own; all say that it cannot be had there
        return None
