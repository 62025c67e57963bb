"""`loaderd bench`: how fast the daemon feeds the user's own data, with no trainer behind it.

Every page of a batch is read before it is dropped, so the pixels really come through shared memory. What the daemon wrote down about the
run is deleted afterwards: nothing was trained.
"""

from __future__ import annotations

import math
import os
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from catalog import __version__
from catalog.database import Database, open_database
from catalog.errors import CatalogError
from loaderd import messages
from loaderd.attach import ask
from loaderd.attempts import CONSUMER_LOCK
from loaderd.batch import Batch
from loaderd.client import Feed
from loaderd.messages import Message

PAGE = 4096
PREFIX = "bench-"  # of the runs that `forget` deletes, and of no others
UNENDING = 1 << 30  # epochs; the clock ends it
SETTLE_S = 15.0  # for the daemon to write the last rows of a stream that was closed
WHO = ("database", "decode", "trainer")


def bench(feed_arguments: dict[str, Any], *, seconds: float, epochs: int | None = None) -> dict[str, Any]:
    """Feed for so many seconds (or epochs, if they are over first) and return what was measured, as JSON holds it.

    It stops at the end of the epoch in which the time is over; in one that takes as long again, in its middle.

    Raises:
        CatalogError: As `Feed` does.
    """
    run = PREFIX + uuid.uuid4().hex[:12]
    given = {name: value for name, value in feed_arguments.items() if value is not None}
    # Alone, whatever RANK and WORLD_SIZE say of the shell that it is started from.
    arguments = {"rank": 0, "num_ranks": 1, **given, "run": run}
    with open_database(given.pop("database", None)) as db:
        try:
            found = _measure(arguments, messages.socket_path(db.identity()), seconds, epochs or UNENDING)
        finally:
            forget(db, run)
    return {"version": __version__, "cores": len(os.sched_getaffinity(0)), "feed": given, **found}


def _measure(arguments: dict[str, Any], path: Path, seconds: float, epochs: int) -> dict[str, Any]:
    steady, opening = [], []  # ms waited for a batch; for the first of an epoch, less the very first
    batches = samples = size = whole = 0
    asked = time.perf_counter()
    with Feed(**arguments) as feed:
        fed = feed.epochs(epochs)
        batch = next(fed, None)
        if batch is None:
            raise CatalogError("the stream has no batch to feed; see `catalog status`, or choose less narrowly")
        touch(batch)
        first_batch_s = time.perf_counter() - asked
        epoch = batch.epoch
        batch = None  # a slot that is held while the next batch is made is missing to the daemon
        daemon, before = _stream(path, arguments["run"])
        began = time.perf_counter()
        while True:
            waiting = time.perf_counter()
            batch = next(fed, None)
            now = time.perf_counter()
            if batch is None or batch.epoch != epoch:
                whole += 1
                if batch is None or now - began >= seconds:
                    break
                epoch = batch.epoch
                opening.append(1e3 * (now - waiting))
            else:
                steady.append(1e3 * (now - waiting))
            batches += 1
            samples += int(np.count_nonzero(batch.valid))
            size += touch(batch)
            batch = None
            if now - began >= 2 * seconds:
                break
        elapsed = time.perf_counter() - began
        daemon, after = _stream(path, arguments["run"])
        num_samples = feed.num_samples
    waited = {who: _number(after.get("seconds"), who) - _number(before.get("seconds"), who) for who in WHO}
    total = sum(waited.values())
    decoded = _number(after, "decoded")
    return {
        "num_samples": num_samples,
        "epochs": whole,
        "seconds": elapsed,
        "batches": batches,
        "samples": samples,
        "bytes": size,
        "samples_per_s": samples / elapsed,
        "batches_per_s": batches / elapsed,
        "mb_per_s": size / elapsed / 1e6,
        "first_batch_s": first_batch_s,
        **waits_of(steady, opening),
        "by_offset": _number(after, "by_offset") / decoded if decoded > 0 else None,
        "unreadable": int(_number(after, "unreadable")),
        "shares": {who: spent / total for who, spent in waited.items()} if total > 0 else None,
        "ring_bytes": int(max(_number(before, "ring_bytes"), _number(after, "ring_bytes"))),
        "slots": int(_number(after, "slots")),
        "workers": len(daemon.get("workers") or ()),
        "other_streams": max(0, len(daemon.get("streams") or ()) - 1),
    }


def touch(batch: Batch) -> int:
    """Read a byte of every page of a batch's images and masks; returns their size in bytes."""
    size = 0
    for array in (batch.images, batch.masks):
        if array is not None:
            array.reshape(-1).view(np.uint8)[::PAGE].sum()
            size += array.nbytes
    return size


def waits_of(steady: Sequence[float], opening: Sequence[float]) -> dict[str, Any]:
    """Return the percentiles of the waits for batches within epochs, and of those for the first batches of epochs, in ms.

    A percentile is the smallest wait that so many of a hundred do not exceed; None where there was none to measure.
    """
    p99 = _percentile(steady, 99)
    first = _percentile(opening, 50)
    return {
        "wait_ms": {"p50": _percentile(steady, 50), "p99": p99, "max": max(steady, default=None)},
        "epoch_gap_ms": {"p50": first, "max": max(opening, default=None), "to_p99": first / p99 if first is not None and p99 else None},
    }


def _percentile(waits: Sequence[float], percent: int) -> float | None:
    return sorted(waits)[math.ceil(len(waits) * percent / 100) - 1] if waits else None


def _stream(path: Path, run: str) -> tuple[Message, Message]:
    """Return what the daemon says of itself and of our stream."""
    daemon = ask(path) or {}
    return daemon, next((stream for stream in daemon.get("streams", ()) if stream.get("run") == run), {})


def _number(found: Message | None, name: str) -> float:
    value = (found or {}).get(name)
    return value if isinstance(value, int | float) else 0


# ------------------------------------------------------------------------------------------ leaving no trace


def forget(db: Database, run: str) -> None:
    """Delete a bench's run from the database, with its unnamed streams where nothing else used them; no rows, no error.

    Raises:
        ValueError: For a run that is no bench's: what a training was fed is never deleted.
    """
    if not run.startswith(PREFIX):
        raise ValueError(f"run {run!r} is no bench's; trainings are not forgotten")
    with db.connect(autocommit=True) as conn:
        # A stream that was closed still has rows to write, and would write them to a run that is gone.
        deadline = time.monotonic() + SETTLE_S
        while time.monotonic() < deadline:
            fed = conn.execute(
                "SELECT FROM consumer k JOIN run r ON r.id = k.run_id JOIN pg_locks l ON l.locktype = 'advisory' AND l.granted "
                "AND l.classid = %s::integer::oid AND l.objid = k.id::integer::oid "
                "AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database()) WHERE r.name = %s",
                [CONSUMER_LOCK, run],
            ).fetchone()
            if fed is None:
                break
            time.sleep(0.02)
        with conn.transaction():
            found = conn.execute("SELECT id FROM run WHERE name = %s FOR UPDATE", [run]).fetchone()
            if found is None:
                return
            streams = conn.execute(
                "SELECT stream_id FROM epoch WHERE run_id = %(run)s UNION SELECT stream_id FROM attempt WHERE run_id = %(run)s "
                "UNION SELECT stream_id FROM consumer WHERE run_id = %(run)s",
                {"run": found[0]},
            ).fetchall()
            conn.execute("DELETE FROM ledger d USING epoch e WHERE e.id = d.epoch_id AND e.run_id = %s", found)
            conn.execute("DELETE FROM epoch WHERE run_id = %s", found)  # its order goes with it
            conn.execute("DELETE FROM consumer WHERE run_id = %s", found)
            conn.execute("DELETE FROM attempt WHERE run_id = %s", found)
            conn.execute("DELETE FROM run_note WHERE run_id = %s", found)
            conn.execute("DELETE FROM run WHERE id = %s", found)
            conn.execute(
                "DELETE FROM stream s WHERE id = ANY(%s) AND name IS NULL AND NOT EXISTS (SELECT FROM epoch WHERE stream_id = s.id) "
                "AND NOT EXISTS (SELECT FROM attempt WHERE stream_id = s.id) AND NOT EXISTS (SELECT FROM consumer WHERE stream_id = s.id)",
                [[stream for (stream,) in streams]],
            )


# ------------------------------------------------------------------------------------------ for a reader


def as_text(found: dict[str, Any]) -> str:
    """Return a bench's result as a table."""
    waits, gap, shares = found["wait_ms"], found["epoch_gap_ms"], found["shares"]
    wait, first = found["wait_ms"]["p50"] is not None, gap["p50"] is not None
    times = f", {gap['to_p99']:.1f} times the p99 above" if gap["to_p99"] is not None else ""
    others = f", beside {found['other_streams']} other streams" if found["other_streams"] else ""
    rows = [
        ("fed", f"{found['samples_per_s']:,.0f} samples/s, {found['batches_per_s']:,.0f} batches/s, {found['mb_per_s']:,.0f} MB/s"),
        ("", f"{found['samples']:,} samples in {found['seconds']:.1f} s, {found['epochs']} whole epochs of {found['num_samples']:,}"),
        ("first batch", f"{found['first_batch_s']:.2f} s after the feed was asked for"),
        ("wait for a batch", f"p50 {waits['p50']:.2f} ms, p99 {waits['p99']:.2f} ms, max {waits['max']:.2f} ms" if wait else "none"),
        ("wait for an epoch", f"p50 {gap['p50']:.2f} ms, max {gap['max']:.2f} ms{times}" if first else "none began meanwhile"),
        ("read by offset", "unknown" if found["by_offset"] is None else f"{100 * found['by_offset']:.0f} % of the samples"),
        ("feed waited for", ", ".join(f"{who} {100 * shares[who]:.0f} %" for who in WHO) if shares else "unknown"),
        ("ring", f"{found['ring_bytes'] / 2**20:,.0f} MiB in {found['slots']} slots"),
        ("with", f"{found['workers']} workers on {found['cores']} cores{others}"),
    ]
    if found["unreadable"]:
        rows.append(("unreadable", f"{found['unreadable']:,} samples; see `catalog errors`"))
    return "\n".join(f"{name:18}{value}" for name, value in rows)
