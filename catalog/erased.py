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


def patients(conn: psycopg.Connection[Any], names: Iterable[str]) -> set[str]:
    """Return which of these patients were erased."""
    return {name for (name,) in conn.execute(PATIENTS, [list(names)])}


def files(conn: psycopg.Connection[Any], root_id: int, paths: Iterable[str]) -> set[str]:
    """Return which of these files of a root were annotations of a patient who was erased."""
    return {path for (path,) in conn.execute(FILES, {"root": root_id, "paths": list(paths)})}
