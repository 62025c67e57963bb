"""What was delivered to whom: rows that stay true through any crash.

A reservation says *delivered* before the first of its batches is announced, about 1,000 positions at a time. So a crash can report
positions that no trainer saw, never hide one that it did. What was announced and what the trainer went on from (*acknowledged*) is
written while it goes on and when the reservation is through, and on closing it is cut down to what was announced.

Functions of an open connection; the caller owns the transaction.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import psycopg
from psycopg.types.multirange import Int8Multirange
from psycopg.types.numeric import Int8
from psycopg.types.range import Range

from loaderd.shares import Span

Connection = psycopg.Connection[tuple[Any, ...]]


def start_epoch(conn: Connection, epoch_id: int, *, unchanged: bool) -> bool:
    """The epoch's first batch was asked for: its order is final now. With `unchanged` only if the catalog is as it was planned on."""
    condition = "AND catalog_changes = (SELECT count(*) FROM catalog_change)" if unchanged else ""
    query = f"UPDATE epoch SET started_at = coalesce(started_at, now()) WHERE id = %s AND (started_at IS NOT NULL OR (true {condition}))"  # noqa: S608
    return conn.execute(query.encode(), [epoch_id], prepare=True).rowcount == 1


def reserve(
    conn: Connection, epoch_id: int, attempt: int, spans: Sequence[Span], *, consumer_id: int, rank: int, consumer: str, epoch: int,
    upto: int, again: bool,
) -> int:  # fmt: skip
    """Return the id of a new row: these positions are delivered, as far as anybody can tell after a crash.

    `upto`: all positions of this rank before that one have a row now. `again`: the row may be there, if an answer was lost.
    """
    positions = multirange(spans)
    if again:
        row = conn.execute(
            "SELECT id FROM ledger WHERE epoch_id = %s AND attempt = %s AND rank = %s AND outcome = 'delivered' AND positions = %s",
            [epoch_id, attempt, rank, positions],
        ).fetchone()
        if row is not None:
            return int(row[0])
    asked(conn, consumer_id, epoch, upto)
    row = conn.execute(
        "INSERT INTO ledger (epoch_id, attempt, rank, outcome, positions, consumer) VALUES (%s, %s, %s, 'delivered', %s, %s) RETURNING id",
        [epoch_id, attempt, rank, positions, consumer],
        prepare=True,
    ).fetchone()
    assert row is not None
    return int(row[0])


BEGIN = """
WITH begun AS (
    UPDATE epoch SET started_at = coalesce(started_at, now()) WHERE id = %(epoch_id)s
    AND (started_at IS NOT NULL OR catalog_changes = (SELECT count(*) FROM catalog_change)) RETURNING id
), noted AS (
    UPDATE consumer SET reserved_epoch = %(epoch)s, reserved_to = %(upto)s
    WHERE id = %(consumer_id)s AND NOT %(ahead)s AND EXISTS (SELECT FROM begun)
)
INSERT INTO ledger (epoch_id, attempt, rank, outcome, positions, consumer)
SELECT id, %(attempt)s, %(rank)s, 'delivered', %(positions)s, %(consumer)s FROM begun RETURNING id
"""


def begin_epoch(
    conn: Connection, epoch_id: int, attempt: int, spans: Sequence[Span], *, consumer_id: int, rank: int, consumer: str, epoch: int,
    upto: int, ahead: bool,
) -> int | None:  # fmt: skip
    """`start_epoch` of an unchanged catalog and `reserve` in one statement, which commits by itself; None if the catalog changed.

    A trainer waits for this one: five round trips would be in its way. `ahead`: nobody asked for the epoch yet.
    """
    parameters = {
        "epoch_id": epoch_id, "attempt": attempt, "positions": multirange(spans), "consumer_id": consumer_id, "rank": rank,
        "consumer": consumer, "epoch": epoch, "upto": upto, "ahead": ahead,
    }  # fmt: skip
    with _alone(conn):
        row = conn.execute(BEGIN, parameters, prepare=True).fetchone()
    return None if row is None else int(row[0])


def unchanged(conn: Connection, epoch_id: int) -> bool:
    """Is the catalog as it was when this epoch was planned?"""
    with _alone(conn):
        row = conn.execute(
            "SELECT catalog_changes = (SELECT count(*) FROM catalog_change) FROM epoch WHERE id = %s", [epoch_id], prepare=True
        ).fetchone()
    return row == (True,)


def take_back(conn: Connection, epoch_id: int) -> None:
    """Nobody asked for an epoch that was begun ahead: it is provisional again."""
    conn.execute("DELETE FROM ledger WHERE epoch_id = %s", [epoch_id])
    conn.execute("UPDATE epoch SET started_at = NULL WHERE id = %s", [epoch_id])


@contextlib.contextmanager
def _alone(conn: Connection) -> Iterator[None]:
    """Have a statement commit by itself."""
    conn.autocommit = True
    try:
        yield
    finally:
        if not conn.closed:
            conn.autocommit = False


def settle(conn: Connection, ledger_id: int, announced: Iterable[Span], acknowledged: Iterable[Span]) -> None:
    """Cut a reservation down to what was announced, and say what of it was acknowledged."""
    kept = multirange(announced)
    if kept:
        conn.execute("UPDATE ledger SET positions = %s, acknowledged = %s WHERE id = %s", [kept, multirange(acknowledged), ledger_id])
    else:
        conn.execute("DELETE FROM ledger WHERE id = %s", [ledger_id])


def take_out(conn: Connection, ledger_id: int, spans: Sequence[Span]) -> None:
    """Take positions out of a reservation: they have another outcome."""
    parameters = {"id": ledger_id, "out": multirange(spans)}
    conn.execute("DELETE FROM ledger WHERE id = %(id)s AND positions <@ %(out)s", parameters)
    conn.execute("UPDATE ledger SET positions = positions - %(out)s, acknowledged = acknowledged - %(out)s WHERE id = %(id)s", parameters)


def asked(conn: Connection, consumer_id: int, epoch: int, upto: int) -> None:
    """A consumer asked for an epoch; its positions before this one have rows."""
    conn.execute("UPDATE consumer SET reserved_epoch = %s, reserved_to = %s WHERE id = %s", [epoch, upto, consumer_id], prepare=True)


def reserved(conn: Connection, consumer_id: int, upto: int) -> None:
    """Of what was reserved nothing from this position on was announced."""
    conn.execute("UPDATE consumer SET reserved_to = %s WHERE id = %s AND reserved_to > %s", [upto, consumer_id, upto])


def ended(conn: Connection, consumer_id: int, epoch: int) -> None:
    """A consumer got everything of an epoch, or left it."""
    conn.execute("UPDATE consumer SET ended_epoch = greatest(ended_epoch, %s) WHERE id = %s", [epoch, consumer_id])


def note(conn: Connection, epoch_id: int, attempt: int, rank: int, outcome: str, spans: Sequence[Span], consumer: str) -> None:
    """Note positions that were dropped, unreadable or revoked, once."""
    positions = multirange(spans)
    conn.execute(
        "INSERT INTO ledger (epoch_id, attempt, rank, outcome, positions, consumer) SELECT %(epoch)s, %(attempt)s, %(rank)s, %(outcome)s, "
        "%(positions)s, %(consumer)s WHERE NOT EXISTS (SELECT FROM ledger WHERE epoch_id = %(epoch)s AND attempt = %(attempt)s "
        "AND rank = %(rank)s AND outcome = %(outcome)s AND positions && %(positions)s)",
        {"epoch": epoch_id, "attempt": attempt, "rank": rank, "outcome": outcome, "positions": positions, "consumer": consumer},
    )


def multirange(spans: Iterable[Span]) -> Int8Multirange:
    """Return spans as PostgreSQL takes them."""
    # Int8: psycopg before 3.3.9 took the bounds' own width for that of the range.
    return Int8Multirange([Range(Int8(first), Int8(end), "[)") for first, end in spans])
