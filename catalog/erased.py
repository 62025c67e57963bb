"""Who was erased must not come in again: what an ingest asks before it writes. `catalog.erasing` is what erases."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import psycopg

PATIENTS = """
SELECT p.name FROM unnest(%s::text[]) AS p (name)
WHERE EXISTS (SELECT FROM erasure e WHERE e.patient_sha256 = sha256(e.salt || convert_to(p.name, 'UTF8')))
"""
FILES = """
SELECT p.path FROM unnest(%(paths)s::text[]) AS p (path) CROSS JOIN erasure e
WHERE (e.id, sha256(e.salt || convert_to(%(root)s::bigint || '/' || p.path, 'UTF8'))) IN (SELECT id, unnest(file_sha256s) FROM erasure)
"""
# Of a root, as an ingest of it noted them last.
REFUSED = """
SELECT count(*) FROM flag g JOIN file f ON f.id = g.file_id JOIN root r ON r.id = f.root_id
WHERE r.url = %s AND g.state = 'open' AND g.raised_by = 'ingest' AND split_part(g.detail, ': ', 1) = 'patient-erased'
"""


def patients(conn: psycopg.Connection[Any], names: Iterable[str]) -> set[str]:
    """Return which of these patients were erased."""
    return {name for (name,) in conn.execute(PATIENTS, [list(names)])}


def files(conn: psycopg.Connection[Any], root_id: int, paths: Iterable[str]) -> set[str]:
    """Return which of these files of a root were annotations of a patient who was erased."""
    return {path for (path,) in conn.execute(FILES, {"root": root_id, "paths": list(paths)})}


def refused(conn: psycopg.Connection[Any], url: str) -> int:
    """Return how many files of the root of that url were refused by ingests since their patient was erased, and are there still."""
    row = conn.execute(REFUSED, [url]).fetchone()
    assert row is not None
    return int(row[0])
