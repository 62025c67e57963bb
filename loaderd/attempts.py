"""Runs that go on: attempts, who is fed in them, and where they begin.

A run is one training, fed by attempts: uninterrupted stretches, one at a time. Each attach is a row of ``consumer``; as long as it is
fed, its daemon's connection holds an advisory lock on that row's id, which PostgreSQL drops with the connection, whatever killed it.

Functions of an open connection; the caller owns the transaction, except where it says so.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg.types.json import Jsonb

from catalog import __version__
from catalog.errors import CatalogError, UsageError
from loaderd import ledger
from loaderd.definitions import Definition
from loaderd.shares import Share, Span

CONSUMER_LOCK = 1_554_427  # class of the advisory locks on consumer.id; arbitrary
RUN_LOCK = 1_554_428  # and of those on run.id, held while an attempt is opened
DIFFERENT_S = 3  # how long a rank waits for others that began elsewhere to be gone, until it says so
BACK_S = 30  # how long a rank that comes late waits for the others, whose daemon was killed, to attach again
TAKEOVER_S = 20  # how long a new attempt waits for the consumers of the one before it to be gone
Connection = psycopg.Connection[tuple[Any, ...]]


class FedBeforeError(CatalogError):
    """The run was fed from this stream before, and nothing says where to go on."""


LIVE = (
    "SELECT k.id, k.rank, k.host, k.pid FROM consumer k JOIN pg_locks l ON l.locktype = 'advisory' AND l.classid = %(lock)s::integer::oid "
    "AND l.objid = k.id::integer::oid AND l.granted AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database()) "
    "WHERE k.run_id = %(run)s AND k.stream_id = %(stream)s AND k.attempt = %(attempt)s AND k.id <> %(but)s ORDER BY k.rank"
)
# Was this process, as this rank of as many, fed in the attempt before? Who it is the kernel says.
ITSELF = (
    "SELECT 1 FROM consumer k JOIN consumer me USING (rank, num_ranks, pid, uid) "
    "WHERE k.run_id = %s AND k.stream_id = %s AND k.attempt = %s AND me.id = %s AND k.id <> me.id"
)


@dataclass(frozen=True)
class Attempt:
    """One uninterrupted stretch of a run on a stream, and where it begins."""

    run_id: int
    run: str
    stream_id: int
    number: int
    num_ranks: int
    epoch: int
    step: int
    position: int

    def share(self, definition: Definition, epoch: int, num_samples: int, rank: int = 0) -> Share:
        """Return a rank's part of one of its epochs."""
        here = epoch == self.epoch
        return Share(
            num_samples, definition.batch_size, rank, self.num_ranks, definition.tail,
            first_step=self.step if here else 0, first_position=self.position if here else 0,
        )  # fmt: skip


@dataclass(frozen=True)
class Point:
    """Where to go on: the first step of an epoch that was not made, and its position."""

    epoch: int
    step: int
    position: int


# ------------------------------------------------------------------------------------------ who is fed


def open_stream(conn: Connection, definition: Definition) -> int:
    """Return the id of the unnamed stream with this definition."""
    parameters = [Jsonb(definition.to_json()), definition.digest()]
    conn.execute("INSERT INTO stream (definition, digest) VALUES (%s, %s) ON CONFLICT DO NOTHING", parameters)
    row = conn.execute("SELECT id FROM stream WHERE digest = %s AND name IS NULL", parameters[1:]).fetchone()
    assert row is not None
    return int(row[0])


def attach(conn: Connection, stream_id: int, *, rank: int, num_ranks: int, pid: int, uid: int, daemon_pid: int, versions: Any) -> int:
    """Return the id of a new consumer, locked until the connection ends or `leave`."""
    row = conn.execute(
        "INSERT INTO consumer (stream_id, rank, num_ranks, host, pid, uid, daemon_pid, versions) "
        "VALUES (%s, %s, %s, %s, %s, %s, %s, %s) RETURNING id, pg_advisory_lock(%s, id::integer)",
        [stream_id, rank, num_ranks, socket.gethostname(), pid, uid, daemon_pid, Jsonb(versions), CONSUMER_LOCK],
    ).fetchone()
    assert row is not None
    return int(row[0])


def hold(conn: Connection, consumer_id: int) -> bool:
    """Lock a consumer again, on a new connection; False if somebody else holds it."""
    row = conn.execute("SELECT pg_try_advisory_lock(%s, %s::integer)", [CONSUMER_LOCK, consumer_id]).fetchone()
    return row is not None and bool(row[0])


def leave(conn: Connection, consumer_id: int, reason: str | None) -> None:
    """A consumer is gone."""
    conn.execute("UPDATE consumer SET left_at = now(), reason = %s WHERE id = %s", [reason, consumer_id])


def unused_name(conn: Connection) -> str:
    """Return a name for a run that was given none."""
    row = conn.execute(
        "SELECT to_char(now() AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS') || '-' || left(gen_random_uuid()::text, 8)"
    ).fetchone()
    assert row is not None
    return str(row[0])


def seen(conn: Connection, stream_id: int, *, going_on: bool) -> tuple[int, int, int] | None:
    """Return (rows, columns, samples) of what this stream fed last; None: it must be looked at.

    Only if the catalog is still as it was, except where a run goes on: it is fed from an order that is there.
    """
    row = conn.execute(
        "SELECT i.rows, i.columns, e.num_samples FROM epoch e JOIN epoch_order o ON o.epoch_id = e.id AND o.part = 0 "
        "JOIN image i ON i.id = o.sample_ids[1] WHERE e.stream_id = %s AND (%s OR e.order_sha256 IS NOT NULL "
        "AND e.catalog_changes = (SELECT count(*) FROM catalog_change)) ORDER BY e.id DESC LIMIT 1",
        [stream_id, going_on],
    ).fetchone()
    return None if row is None else (row[0], row[1], row[2])


def exists(conn: Connection, run: str, stream_id: int) -> bool:
    """Was this run fed from this stream before?"""
    row = conn.execute(
        "SELECT EXISTS (SELECT FROM attempt t JOIN run r ON r.id = t.run_id WHERE r.name = %s AND t.stream_id = %s)", [run, stream_id]
    ).fetchone()
    return row is not None and bool(row[0])


def begin(
    conn: Connection,
    run: str,
    stream_id: int,
    definition: Definition,
    *,
    consumer_id: int,
    rank: int,
    num_ranks: int,
    resume: Any,
    versions: Any,
) -> Attempt:
    """Join the run's attempt, or open the next one once the consumers of the last one are gone; commits.

    `resume` is None (a new run), "last", or a state: {"epoch", "step", "attempt", …}. All ranks of an attempt must begin at one point.

    Raises:
        CatalogError: If the run was fed before and there is no state, if somebody is still fed, or if the states differ.
        UsageError: If the state is not of this run and stream.
    """
    run_id = _run_id(conn, run)
    conn.commit()
    began = time.monotonic()
    while True:
        conn.execute("SELECT pg_advisory_xact_lock(%s, %s::integer)", [RUN_LOCK, run_id])
        last = newest(conn, run_id, run, stream_id)
        if last is None:
            if isinstance(resume, dict):
                raise UsageError(
                    f"the state is of run {run!r}, which this catalog never fed from this stream; do batch size, seed or transforms differ?"
                )
            found: Attempt | None = Attempt(run_id, run, stream_id, 1, num_ranks, 0, 0, 0)
        else:
            found = _join_or_follow(conn, last, definition, consumer_id, rank, num_ranks, resume, waited_s=time.monotonic() - began)
        if found is not None:
            break
        conn.rollback()
        time.sleep(0.05)
    if last is not None and found.number != last.number and found.step == 0:
        of = _attempt(conn, last, resume["attempt"]) if isinstance(resume, dict) else last
        _drop_rest(conn, of or last, definition, found.epoch - 1)
    conn.execute(
        "INSERT INTO attempt (run_id, stream_id, attempt, num_ranks, epoch, step, position, versions) "
        "VALUES (%s, %s, %s, %s, %s, %s, %s, %s) ON CONFLICT DO NOTHING",
        [run_id, stream_id, found.number, num_ranks, found.epoch, found.step, found.position, Jsonb(versions)],
    )
    conn.execute("UPDATE consumer SET run_id = %s, attempt = %s WHERE id = %s", [run_id, found.number, consumer_id])
    conn.commit()
    return found


def _join_or_follow(
    conn: Connection, last: Attempt, definition: Definition, consumer_id: int, rank: int, num_ranks: int, resume: Any, *, waited_s: float
) -> Attempt | None:
    """Return the attempt to be fed in, None to look again a little later; having waited long, say what is in the way."""
    live = _live(conn, last, consumer_id)
    used = conn.execute(
        "SELECT 1 FROM consumer WHERE run_id = %s AND stream_id = %s AND attempt = %s AND rank = %s AND id <> %s",
        [last.run_id, last.stream_id, last.number, rank, consumer_id],
    ).fetchone()
    start = Point(last.epoch, last.step, last.position)
    point = None  # "last": where the others begin, else where the last attempt came to
    if resume is None:
        point = Point(0, 0, 0)
    elif isinstance(resume, dict):
        point = _point_of(conn, last, definition, resume)
    if live and not used:
        if num_ranks != last.num_ranks:
            if waited_s > DIFFERENT_S:
                raise CatalogError(f"run {last.run!r}: num_ranks={num_ranks}, and its other ranks began with {last.num_ranks}")
            return None
        if point in (None, start):
            return last
        if waited_s > DIFFERENT_S or resume is None:
            if resume is None:
                raise _fed_before(last)
            assert point is not None
            raise CatalogError(
                f"run {last.run!r}: rank {rank} has the state of epoch {point.epoch}, step {point.step}, and the others began at epoch "
                f"{start.epoch}, step {start.step}; load the states that all ranks saved at one step"
            )
        return None
    if resume is None and not used and num_ranks == last.num_ranks and point == start:
        return last  # the last rank to come: the others are through already, or their daemon was killed and they attach again
    if not live and not used and num_ranks == last.num_ranks and point in (None, start) and waited_s < BACK_S and _lost(conn, last):
        return None  # the daemon of the ranks that came first died, and they are about to attach again
    if resume is None:
        raise _fed_before(last)
    if live:
        if waited_s > TAKEOVER_S:
            _, other, host, pid = live[0]
            raise CatalogError(f"run {last.run!r}: attempt {last.number} is still fed to rank {other} ({host}:{pid}); end it first")
        return None
    point = point or _last_point(conn, last, definition)
    pruned = "SELECT 1 FROM epoch WHERE run_id = %s AND stream_id = %s AND epoch = %s AND pruned_at IS NOT NULL"
    if conn.execute(pruned, [last.run_id, last.stream_id, point.epoch]).fetchone() is not None:
        raise CatalogError(f"run {last.run!r}: the order of epoch {point.epoch} was pruned, so it cannot be fed again; load a later state")
    return Attempt(last.run_id, last.run, last.stream_id, last.number + 1, num_ranks, point.epoch, point.step, point.position)


def _fed_before(last: Attempt) -> FedBeforeError:
    return FedBeforeError(
        f"run={last.run!r}: was fed from this stream before (attempt {last.number}); load its state (load_state_dict or resume=STATE), "
        f"pass resume='last' to go on behind what it acknowledged, or choose another name for a new training"
    )


def _live(conn: Connection, attempt: Attempt, but: int) -> list[tuple[int, int, str, int]]:
    parameters = {"lock": CONSUMER_LOCK, "run": attempt.run_id, "stream": attempt.stream_id, "attempt": attempt.number, "but": but}
    return conn.execute(LIVE, parameters).fetchall()


def _lost(conn: Connection, attempt: Attempt) -> bool:
    """Is there a rank whose last consumer in this attempt ended without a word, as with a daemon that was killed?"""
    row = conn.execute(
        "SELECT EXISTS (SELECT FROM consumer k WHERE run_id = %(run)s AND stream_id = %(stream)s AND attempt = %(attempt)s "
        "AND left_at IS NULL AND NOT EXISTS (SELECT FROM consumer o WHERE o.run_id = k.run_id AND o.stream_id = k.stream_id "
        "AND o.attempt = k.attempt AND o.rank = k.rank AND o.id > k.id))",
        {"run": attempt.run_id, "stream": attempt.stream_id, "attempt": attempt.number},
    ).fetchone()
    return row is not None and bool(row[0])


def newest(conn: Connection, run_id: int, run: str, stream_id: int) -> Attempt | None:
    """Return the newest attempt of a run on a stream."""
    row = conn.execute(
        "SELECT attempt, num_ranks, epoch, step, position FROM attempt WHERE run_id = %s AND stream_id = %s ORDER BY attempt DESC LIMIT 1",
        [run_id, stream_id],
    ).fetchone()
    return None if row is None else Attempt(run_id, run, stream_id, *row)


def _run_id(conn: Connection, run: str) -> int:
    conn.execute(
        "INSERT INTO run (name, program_version, host) VALUES (%s, %s, %s) ON CONFLICT DO NOTHING", [run, __version__, socket.gethostname()]
    )
    row = conn.execute("SELECT id FROM run WHERE name = %s", [run]).fetchone()
    assert row is not None
    return int(row[0])


def _point_of(conn: Connection, last: Attempt, definition: Definition, state: dict[str, Any]) -> Point:
    """Return where a state goes on: its step counts batches of the number of ranks that its attempt had."""
    of = _attempt(conn, last, state["attempt"])
    if of is None:
        raise UsageError(f"the state is of attempt {state['attempt']} of run {last.run!r}, which this catalog does not know")
    epoch, step = int(state["epoch"]), int(state["step"])
    counted = conn.execute(
        "SELECT num_samples FROM epoch WHERE run_id = %s AND stream_id = %s AND epoch = %s AND started_at IS NOT NULL",
        [last.run_id, last.stream_id, epoch],
    ).fetchone()
    share = of.share(definition, epoch, counted[0] if counted else 0)
    if not share.first_step <= step <= share.steps or (epoch, step) < (of.epoch, of.step):
        raise UsageError(f"the state is of epoch {epoch}, step {step}, which attempt {of.number} of run {last.run!r} never had")
    if counted is not None and step >= share.steps and step > share.first_step:  # else it did not come to that epoch yet
        return Point(epoch + 1, 0, 0)
    return Point(epoch, step, share.begins(step))


def _attempt(conn: Connection, last: Attempt, number: int) -> Attempt | None:
    """Return an earlier attempt of the same run and stream."""
    row = conn.execute(
        "SELECT attempt, num_ranks, epoch, step, position FROM attempt WHERE run_id = %s AND stream_id = %s AND attempt = %s",
        [last.run_id, last.stream_id, number],
    ).fetchone()
    return None if row is None else Attempt(last.run_id, last.run, last.stream_id, *row)


def _drop_rest(conn: Connection, of: Attempt, definition: Definition, epoch: int) -> None:
    """The next attempt begins behind this epoch: note what nobody got of it, if trainers and daemon died before that was written."""
    row = conn.execute(
        "SELECT id, num_samples FROM epoch WHERE run_id = %s AND stream_id = %s AND epoch = %s AND started_at IS NOT NULL "
        "AND pruned_at IS NULL",
        [of.run_id, of.stream_id, epoch],
    ).fetchone()
    if row is None or epoch < of.epoch:
        return
    share = of.share(definition, epoch, row[1])
    if share.end < share.num_samples:
        ledger.note(conn, row[0], of.number, 0, "dropped", [(share.end, share.num_samples)], "")


def _last_point(conn: Connection, last: Attempt, definition: Definition) -> Point:
    """Return the first step that not all ranks acknowledged, from the last epoch on that all of them asked for."""
    row = conn.execute(
        "SELECT count(*), min(k.epoch) FROM (SELECT max(reserved_epoch) AS epoch FROM consumer WHERE run_id = %s AND stream_id = %s "
        "AND attempt = %s AND reserved_epoch IS NOT NULL GROUP BY rank) k",
        [last.run_id, last.stream_id, last.number],
    ).fetchone()
    asked = row[1] if row is not None and row[0] == last.num_ranks else last.epoch
    rows = conn.execute(
        "SELECT e.epoch, e.num_samples, (SELECT range_agg(CASE WHEN l.outcome = 'delivered' THEN l.acknowledged ELSE l.positions END) "
        "FROM ledger_effective l WHERE l.epoch_id = e.id) FROM epoch e WHERE e.run_id = %s AND e.stream_id = %s "
        "AND e.started_at IS NOT NULL AND e.pruned_at IS NULL AND e.epoch >= %s ORDER BY e.epoch",
        [last.run_id, last.stream_id, max(last.epoch, asked)],
    ).fetchall()
    for epoch, num_samples, done in rows:
        share = last.share(definition, epoch, num_samples)
        ranges = list(done or ())
        reached = next((part.upper for part in ranges if part.lower <= share.first_position < part.upper), share.first_position)
        step = share.first_step + (reached - share.first_position) // share.together
        if reached < share.end:
            return Point(epoch, step, share.begins(step))
    return Point(rows[-1][0] + 1, 0, 0) if rows else Point(last.epoch, last.step, last.position)


def forget_provisional(conn: Connection, attempt: Attempt, consumer_id: int) -> None:
    """Delete what was prepared ahead and never asked for, unless another rank may ask for it."""
    if _live(conn, attempt, consumer_id):
        return
    whose = {"run": attempt.run_id, "stream": attempt.stream_id, "consumer": consumer_id}
    unasked = "epoch WHERE run_id = %(run)s AND stream_id = %(stream)s AND started_at IS NULL"
    conn.execute(f"DELETE FROM ledger WHERE epoch_id IN (SELECT id FROM {unasked})".encode(), whose)  # noqa: S608
    conn.execute(f"DELETE FROM {unasked}".encode(), whose)  # noqa: S608


def forget_attempt(conn: Connection, attempt: Attempt, consumer_id: int) -> None:
    """A trainer that joined this attempt loaded a state of another run before it was fed: delete what is of no use to anybody now."""
    forget_provisional(conn, attempt, consumer_id)
    whose = {"run": attempt.run_id, "stream": attempt.stream_id, "attempt": attempt.number}
    used = (
        "SELECT FROM epoch WHERE run_id = %(run)s AND stream_id = %(stream)s UNION ALL "
        "SELECT FROM consumer WHERE run_id = %(run)s AND stream_id = %(stream)s"
    )
    conn.execute(
        f"DELETE FROM attempt WHERE run_id = %(run)s AND stream_id = %(stream)s AND attempt = %(attempt)s AND NOT EXISTS ({used})".encode(),  # noqa: S608
        whose,
    )
    conn.execute(
        "DELETE FROM run r WHERE id = %(run)s AND NOT EXISTS (SELECT FROM attempt WHERE run_id = r.id) "
        "AND NOT EXISTS (SELECT FROM consumer WHERE run_id = r.id) AND NOT EXISTS (SELECT FROM epoch WHERE run_id = r.id) "
        "AND NOT EXISTS (SELECT FROM run_note WHERE run_id = r.id)",
        whose,
    )


# ------------------------------------------------------------------------------------------ going on after the daemon's death


def take_over(
    conn: Connection, run: str, stream_id: int, definition: Definition, *, number: int, consumer_id: int, rank: int, epoch: int | None,
    received: int, acknowledged: Sequence[tuple[int, int]],
) -> Attempt:  # fmt: skip
    """Go on feeding a rank whose daemon died, in the same attempt; commits.

    It says itself what it got: steps of `epoch` before `received`, and (epoch, step) pairs before which it is through. What its old
    daemon had reserved beyond that was never seen and is taken back.

    Raises:
        CatalogError: If a newer attempt was opened, its old daemon is still there, or it is not the process that was fed.
    """
    row = conn.execute("SELECT id FROM run WHERE name = %s", [run]).fetchone()
    if row is None:
        raise CatalogError(f"run {run!r} is not in this catalog any more")
    run_id = int(row[0])
    deadline = time.monotonic() + TAKEOVER_S
    while True:
        conn.execute("SELECT pg_advisory_xact_lock(%s, %s::integer)", [RUN_LOCK, run_id])
        last = newest(conn, run_id, run, stream_id)
        if last is None or last.number != number:
            now = "none" if last is None else f"attempt {last.number}"
            raise CatalogError(f"run {run!r}: this training was in attempt {number}, and now there is {now}; it cannot go on beside it")
        was = conn.execute(ITSELF, [run_id, stream_id, number, consumer_id]).fetchone()
        if was is None:
            raise CatalogError(f"run {run!r}: no rank {rank} of attempt {number} was fed to this process; it cannot go on for another one")
        if all(other != rank for _, other, _, _ in _live(conn, last, consumer_id)):
            break
        conn.rollback()
        if time.monotonic() > deadline:
            raise CatalogError(f"run {run!r}: rank {rank} of attempt {number} is still fed by another daemon")
        time.sleep(0.02)
    conn.execute("UPDATE consumer SET run_id = %s, attempt = %s WHERE id = %s", [run_id, number, consumer_id])
    rows = conn.execute(
        "SELECT epoch, id, num_samples FROM epoch WHERE run_id = %(run)s AND stream_id = %(stream)s AND epoch >= %(from)s "
        "AND epoch > coalesce((SELECT max(ended_epoch) FROM consumer WHERE run_id = %(run)s AND stream_id = %(stream)s "
        "AND attempt = %(attempt)s AND rank = %(rank)s), -1) - 2",
        {"run": run_id, "stream": stream_id, "from": last.epoch, "attempt": number, "rank": rank},
    )
    epochs: dict[int, tuple[int, int]] = {of: (epoch_id, num_samples) for of, epoch_id, num_samples in rows}
    for of, step in acknowledged:
        if of in epochs:
            epoch_id, num_samples = epochs[of]
            _acknowledge_before(conn, epoch_id, last, rank, last.share(definition, of, num_samples).begins(step))
    if epoch is not None:
        _give_back(conn, last, definition, epochs, consumer_id=consumer_id, rank=rank, epoch=epoch, received=received)
    conn.commit()
    return last


def _acknowledge_before(conn: Connection, epoch_id: int, attempt: Attempt, rank: int, position: int) -> None:
    conn.execute(
        "UPDATE ledger SET acknowledged = positions * int8multirange(int8range(NULL, %s)) WHERE epoch_id = %s AND attempt = %s "
        "AND rank = %s AND outcome = 'delivered'",
        [position, epoch_id, attempt.number, rank],
    )


def _give_back(
    conn: Connection, attempt: Attempt, definition: Definition, epochs: dict[int, tuple[int, int]], *,
    consumer_id: int, rank: int, epoch: int, received: int,
) -> None:  # fmt: skip
    """Take back what was reserved behind `received`, and settle epochs that were left before."""
    whose = {"run": attempt.run_id, "stream": attempt.stream_id, "attempt": attempt.number, "rank": rank, "epoch": epoch}
    for of, (epoch_id, num_samples) in epochs.items():
        share = attempt.share(definition, of, num_samples, rank)
        if of < epoch:  # it left that one; what it did not get there was dropped, if that was not written any more
            left = conn.execute(
                "SELECT %s - coalesce(range_agg(positions), '{}') FROM ledger WHERE epoch_id = %s AND attempt = %s AND rank = %s",
                [ledger.multirange(_owed(share)), epoch_id, attempt.number, rank],
            ).fetchone()
            if left is not None and left[0]:
                ledger.note(conn, epoch_id, attempt.number, rank, "dropped", [(part.lower, part.upper) for part in left[0]], "")
            continue
        keep = share.begins(max(share.first_step, min(received, share.steps))) if of == epoch else 0
        upto = {"epoch_id": epoch_id, "attempt": attempt.number, "rank": rank, "keep": keep}
        conn.execute(
            "DELETE FROM ledger WHERE epoch_id = %(epoch_id)s AND attempt = %(attempt)s AND rank = %(rank)s "
            "AND NOT positions && int8multirange(int8range(NULL, %(keep)s))",
            upto,
        )
        conn.execute(
            "UPDATE ledger SET positions = positions * int8multirange(int8range(NULL, %(keep)s)), "
            "acknowledged = acknowledged * int8multirange(int8range(NULL, %(keep)s)) WHERE epoch_id = %(epoch_id)s "
            "AND attempt = %(attempt)s AND rank = %(rank)s AND NOT positions <@ int8multirange(int8range(NULL, %(keep)s))",
            upto,
        )
        if of == epoch:
            whose["keep"] = keep
    conn.execute(
        "UPDATE consumer SET ended_epoch = CASE WHEN %(epoch)s::integer > 0 THEN %(epoch)s - 1 END WHERE run_id = %(run)s "
        "AND stream_id = %(stream)s AND attempt = %(attempt)s AND rank = %(rank)s AND ended_epoch >= %(epoch)s",
        whose,
    )
    ledger.asked(conn, consumer_id, epoch, whose.get("keep", 0))
    if attempt.num_ranks == 1:  # begun ahead, and never asked for
        conn.execute(
            "UPDATE epoch SET started_at = NULL WHERE run_id = %(run)s AND stream_id = %(stream)s AND epoch > %(epoch)s "
            "AND NOT EXISTS (SELECT FROM ledger WHERE epoch_id = epoch.id)",
            whose,
        )


def _owed(share: Share) -> list[Span]:
    """Return what a rank accounts for: its batches, and for rank 0 also what nobody gets."""
    spans = share.spans(share.first_step, share.steps)
    return spans + ([(share.end, share.num_samples)] if share.rank == 0 and share.end < share.num_samples else [])
