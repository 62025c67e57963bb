"""The rows of files: what lies in a root, what moved in it, what is gone or cannot be read.

Functions of an open connection; the caller owns the transaction.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any

import psycopg

from catalog import images, pairings
from catalog.layouts import Annotation, Image
from catalog.reading import Read, Refused, Result

if TYPE_CHECKING:
    from catalog.pseudonyms import Pseudonyms

STAGED = """
CREATE TEMP TABLE IF NOT EXISTS staged_file (
    path text, kind text, format text, size bigint, mtime_ns bigint, state text, read_as bigint, content_hash bytea
) ON COMMIT DELETE ROWS
"""

WRITE = """
INSERT INTO file (root_id, path, kind, format, size, mtime_ns, state, read_as, content_hash, ingest_run_id, first_run_id)
SELECT %(root)s, path, kind, format, size, mtime_ns, state, read_as, content_hash, %(run)s, %(run)s FROM staged_file ORDER BY path
ON CONFLICT (root_id, path) DO UPDATE SET kind = excluded.kind, format = excluded.format, size = excluded.size,
    mtime_ns = excluded.mtime_ns, state = excluded.state, read_as = excluded.read_as, content_hash = excluded.content_hash,
    ingest_run_id = excluded.ingest_run_id
"""


def write(
    conn: psycopg.Connection[Any],
    run_id: int,
    root_id: int,
    results: Sequence[Result],
    wanted: Mapping[str, Image | Annotation],
    known: Set[str],
    names: Pseudonyms | None = None,
) -> None:
    """Write the rows of files that were read, could not be, or hold nothing of use.

    `known` are the paths that have a row: what was found about them before is closed. `names` knows where they lie, if their paths do not.
    """
    with conn.cursor().copy("COPY staged_file FROM STDIN") as copy:
        for result in results:
            entry = result.entry
            state = "unreadable" if isinstance(result, Refused) else "present"
            content_hash = result.content_hash if isinstance(result, Read) else None
            copy.write_row(
                (entry.path, result.kind, result.format, entry.size, entry.mtime_ns, state, wanted[entry.path].read_as, content_hash)
            )
    conn.execute(WRITE, {"root": root_id, "run": run_id})
    if names is not None:
        names.write_paths(conn, root_id, [result.entry.path for result in results])
    if again := [result.entry.path for result in results if result.entry.path in known]:
        images.close_file_flags(conn, root_id, again)


def moved(conn: psycopg.Connection[Any], root_id: int, gone: Mapping[int, list[str]], results: Iterable[Read]) -> dict[str, str]:
    """Give files that were moved within the root their new paths: new ones with the content of one that is gone. Returns old → new.

    `gone` are the paths of files that are not there any more by size; what is found to have moved is taken out of it. Where nothing was
    hashed (``--hash none``) a moved file is a new one; its images are known by their UIDs all the same.
    """
    new = {(result.entry.size, result.content_hash): result.entry.path for result in results if result.content_hash is not None}
    paths = [path for size in {size for size, _ in new} for path in gone.get(size, ())]
    if not paths:
        return {}
    found: dict[str, str] = {}
    rows = conn.execute(
        "SELECT path, size, content_hash FROM file WHERE root_id = %s AND path = ANY(%s) AND content_hash IS NOT NULL ORDER BY path",
        [root_id, paths],
    )
    for path, size, content_hash in rows:
        if (to := new.pop((size, content_hash), None)) is not None:
            found[path] = to
            gone[size].remove(path)
    if found:
        # A row under the new path is of a file that was there once and is gone.
        conn.execute(
            "UPDATE file SET path = path || ' (was here until ' || now() || ')', state = 'missing' WHERE root_id = %s AND path = ANY(%s)",
            [root_id, list(found.values())],
        )
        conn.execute(
            "UPDATE file SET path = m.new FROM unnest(%s::text[], %s::text[]) AS m (old, new) WHERE root_id = %s AND path = m.old",
            [list(found), list(found.values()), root_id],
        )
    return found


def mark_missing(conn: psycopg.Connection[Any], run_id: int, root_id: int, paths: Sequence[str]) -> None:
    """Note that these files are not there any more. Nothing is deleted."""
    conn.execute(
        "UPDATE file SET state = 'missing', ingest_run_id = %s WHERE root_id = %s AND path = ANY(%s)", [run_id, root_id, list(paths)]
    )
    images.close_file_flags(conn, root_id, paths, "the file is gone")
    images.settle(conn, root_id, paths)
    pairings.retire(conn, root_id, paths)
