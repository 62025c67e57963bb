"""What was delivered to whom: rows that stay true through any crash.

A reservation says *delivered* before the first of its batches is announced, about 1,000 positions at a time. So a crash can report
positions that no trainer saw, never hide one that it did. What was announced and what the trainer went on from (*acknowledged*) is
written when the reservation is through, and on closing it is cut down to what was announced.

Functions of an open connection; the caller owns the transaction.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable
from typing import Any

import psycopg
from psycopg.types.json import Jsonb
from psycopg.types.multirange import Int8Multirange
from psycopg.types.numeric import Int8
from psycopg.types.range import Range

from catalog import __version__
from catalog.errors import CatalogError
from loaderd.orders import Definition

Connection = psycopg.Connection[tuple[Any, ...]]
Span = tuple[int, int]  # positions first … end, end not included


def open_stream(conn: Connection, definition: Definition) -> int:
    """Return the id of the unnamed stream with this definition."""
    parameters = [Jsonb(definition.to_json()), definition.digest()]
    conn.execute("INSERT INTO stream (definition, digest) VALUES (%s, %s) ON CONFLICT DO NOTHING", parameters)
    row = conn.execute("SELECT id FROM stream WHERE digest = %s AND name IS NULL", parameters[1:]).fetchone()
    assert row is not None
    return int(row[0])


def open_run(conn: Connection, name: str | None, stream_id: int) -> tuple[int, str]:
    """Return (id, name) of the run; without a name a new one.

    Raises:
        CatalogError: If that run was fed from this stream before: going on with it needs its state.
    """
    wanted = name or _unused_name(conn)
    conn.execute(
        "INSERT INTO run (name, program_version, host) VALUES (%s, %s, %s) ON CONFLICT DO NOTHING",
        [wanted, __version__, socket.gethostname()],
    )
    row = conn.execute("SELECT id FROM run WHERE name = %s", [wanted]).fetchone()
    assert row is not None
    run_id = int(row[0])
    fed = "SELECT max(epoch) FROM epoch WHERE run_id = %s AND stream_id = %s AND started_at IS NOT NULL"
    last = conn.execute(fed, [run_id, stream_id]).fetchone()
    if last is not None and last[0] is not None:
        raise CatalogError(
            f"run={wanted!r}: was fed from this stream before, up to epoch {last[0]}; choose another name for a new training"
        )
    return run_id, wanted


def _unused_name(conn: Connection) -> str:
    row = conn.execute(
        "SELECT to_char(now() AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS') || '-' || left(gen_random_uuid()::text, 8)"
    ).fetchone()
    assert row is not None
    return str(row[0])


def changes(conn: Connection) -> int:
    """Return the catalog's change counter: how many transactions changed what can be fed."""
    row = conn.execute("SELECT count(*) FROM catalog_change").fetchone()
    assert row is not None
    return int(row[0])


def start_epoch(conn: Connection, epoch_id: int) -> None:
    """The epoch's first batch was asked for: its order is final now."""
    conn.execute("UPDATE epoch SET started_at = now() WHERE id = %s", [epoch_id])


def reserve(conn: Connection, epoch_id: int, attempt: int, span: Span, consumer: str) -> int:
    """Return the id of a new row: these positions are delivered, as far as anybody can tell after a crash."""
    row = conn.execute(
        "INSERT INTO ledger (epoch_id, attempt, outcome, positions, consumer) VALUES (%s, %s, 'delivered', %s, %s) RETURNING id",
        [epoch_id, attempt, _multirange([span]), consumer],
    ).fetchone()
    assert row is not None
    return int(row[0])


def settle(conn: Connection, ledger_id: int, announced: Iterable[Span], acknowledged: Iterable[Span]) -> None:
    """Cut a reservation down to what was announced, and say what of it was acknowledged."""
    kept = _multirange(announced)
    if kept:
        conn.execute("UPDATE ledger SET positions = %s, acknowledged = %s WHERE id = %s", [kept, _multirange(acknowledged), ledger_id])
    else:
        conn.execute("DELETE FROM ledger WHERE id = %s", [ledger_id])


def note(conn: Connection, epoch_id: int, attempt: int, outcome: str, spans: Iterable[Span], consumer: str) -> None:
    """Note positions that were dropped or unreadable."""
    conn.execute(
        "INSERT INTO ledger (epoch_id, attempt, outcome, positions, consumer) VALUES (%s, %s, %s, %s, %s) ON CONFLICT DO NOTHING",
        [epoch_id, attempt, outcome, _multirange(spans), consumer],
    )


def _multirange(spans: Iterable[Span]) -> Int8Multirange:
    # Int8: psycopg before 3.3.9 took the bounds' own width for that of the range.
    return Int8Multirange([Range(Int8(first), Int8(end), "[)") for first, end in spans])
