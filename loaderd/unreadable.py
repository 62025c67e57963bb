"""Files that are not as the catalog has them: what of that is flagged, put right, or ends a stream.

A worker says of a sample that it could not read: [place in the batch, sample id, code, message]; the codes are decode.py's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import psycopg

from catalog.terms import REASON, REASONS

OWN_CODES = ("root-missing", "colour", "shape", "changed")  # whose words are decode.py's own
NOT_THE_FILES = ("no-access", "colour", "label", "no-spacing", "too-large")  # what no flag on a file would explain
UNREADABLE_SHARE = 0.01  # of an epoch; beyond it the storage is at fault, not single files
Connection = psycopg.Connection[tuple[Any, ...]]


def why_it_ends(unreadable: Sequence[Sequence[Any]], before: int, num_samples: int, on_error: str) -> str | None:
    """Return why samples that could not be read end their stream; None: their files are at fault, and are flagged.

    `before` is how many of the epoch's `num_samples` could not be read until now.
    """
    for _, sample_id, code, message in unreadable:
        if code == "root-missing":
            return f"sample {sample_id}: {message}; mount it again; nothing was flagged"
        if code.startswith("cache-") or code in NOT_THE_FILES:
            return f"sample {sample_id}: {message}; nothing was flagged"
    count = before + len(unreadable)
    if on_error != "stop" and count > UNREADABLE_SHARE * num_samples:
        return (
            f"{count} of {num_samples} samples could not be read, the last with: {unreadable[-1][3]}; "
            f"over 1 % is taken for a fault of the storage, and the feed stops; see `catalog ingest`"
        )
    return None


def words(code: str, message: str, *, pseudonymized: bool) -> str:
    """Return why a file could not be read, in words that may be kept: decoders quote what they read."""
    return REASONS.get(code, REASON) if pseudonymized and code not in OWN_CODES else message


def flag(conn: Connection, sample_id: int, code: str, message: str) -> None:
    """Flag the file of an image that could not be read, unless it is."""
    conn.execute(
        "INSERT INTO flag (rule, severity, detail, file_id, raised_by) "
        "SELECT 'FEED-UNREADABLE', 'error', %s, file_id, 'loaderd' FROM location WHERE image_id = %s AND preferred "
        "ON CONFLICT DO NOTHING",
        [f"{code}: {message}", sample_id],
    )


def moved(conn: Connection, root: str, path: str, size: int, mtime_ns: int, offset: int | None, sample_id: int) -> None:
    """Bring up the row of a file whose size or time changed around the same pixels."""
    row = conn.execute(
        "UPDATE file f SET size = %s, mtime_ns = %s FROM location l JOIN place pl ON pl.file_id = l.file_id "
        "WHERE l.image_id = %s AND l.file_id = f.id AND pl.url = %s AND pl.path = %s RETURNING f.id",
        [size, mtime_ns, sample_id, root, path],
    ).fetchone()
    if row is not None:
        conn.execute(
            "UPDATE location SET byte_offset = %s WHERE image_id = %s AND file_id = %s AND dtype IS NOT NULL AND byte_offset <> %s",
            [offset, sample_id, row[0], offset],
        )
