"""A catalog of a million samples without a million files: one patient is ingested, and SQL copies its rows for all the others.

Each copy has files, instances, images, annotations, pairings and masks of its own, as an ingest would have written them. Its folder is a
link to the first patient's, so every path can be read. `guarantees.py` and the soak test measure with what follows below.
"""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql

from catalog import ingest
from catalog.database import Database
from catalog.synthetic import write_studies
from loaderd import Feed, attach
from loaderd.bench import touch

SLICES, PHASES, SIZE = 50, 20, 64
OF_ONE = SLICES * PHASES  # samples of a patient; 96 of them have an inner contour, 48 an outer one
STEP = 10_000  # a copy's keys are the first patient's and so much more; the first patient's are smaller
AT_ONCE = 50  # patients a transaction
SMALL = 10_000  # samples of the stream that a large one's memory is compared with
START_S = 60

TABLES = ("patient", "study", "series", "instance", "file", "image", "location", "annotation", "pairing", "mask")
SHARED = ("root_id", "ingest_run_id", "first_run_id", "reader_id", "structure_id")
# What is another text in each copy; all else is the same, but for keys.
OWN = {
    ("patient", "patient_id"): "patient_id || '.' || n",
    ("patient", "original_id"): "original_id || '.' || n",
    ("study", "study_instance_uid"): "study_instance_uid || '.' || n",
    ("series", "series_instance_uid"): "series_instance_uid || '.' || n",
    ("instance", "sop_instance_uid"): "sop_instance_uid || '.' || n",
    ("file", "path"): "regexp_replace(path, '(SYN-?0001)/', '\\1.' || n || '/')",
    ("image", "sample_key"): "sample_key((SELECT o.sop_instance_uid FROM instance o WHERE o.id = instance_id) || '.' || n, frame)",
}


def fill(db: Database, folder: Path, samples: int) -> None:
    """Fill an empty database with so many samples of 64×64 px, a multiple of 1,000, whose files lie in `folder`."""
    write_studies(folder, patients=1, slices=SLICES, phases=PHASES, size=SIZE)
    ingest.ingest(db, folder, jobs=1)
    for part in ("dicoms", "contourfiles"):
        [first] = [path for path in (folder / part).iterdir() if path.is_dir()]
        for number in range(1, samples // OF_ONE):
            first.with_name(f"{first.name}.{number}").symlink_to(first.name)
    with db.connect() as conn:
        for number in range(1, samples // OF_ONE, AT_ONCE):
            for table in TABLES:
                conn.execute(_copy(conn, table), [number, min(number + AT_ONCE, samples // OF_ONE) - 1])
            conn.commit()
        for table in TABLES:
            if table not in ("location", "mask"):
                name = sql.Identifier(table)
                conn.execute(sql.SQL("SELECT setval(pg_get_serial_sequence({}, 'id'), max(id)) FROM {}").format(table, name))
    with db.connect(autocommit=True) as conn:
        conn.execute("VACUUM (ANALYZE)")  # as autovacuum does within minutes


def _copy(conn: psycopg.Connection[Any], table: str) -> sql.Composed:
    """Return the statement that copies the first patient's rows of a table for the patients with two numbers and between."""
    columns = [
        name
        for (name,) in conn.execute(
            "SELECT attname FROM pg_attribute WHERE attrelid = %s::regclass AND attnum > 0 AND attgenerated = '' AND NOT attisdropped",
            [table],
        )
    ]
    moved = [name for name in columns if (name == "id" or name.endswith("_id")) and name not in SHARED]
    values = [OWN.get((table, name), f'"{name}" + n * {STEP}' if name in moved else f'"{name}"') for name in columns]
    return sql.SQL(
        "INSERT INTO {} ({}) OVERRIDING SYSTEM VALUE SELECT {} "
        "FROM generate_series(%s::integer, %s::integer) AS n CROSS JOIN {} WHERE {} < {}"
    ).format(
        sql.Identifier(table),
        sql.SQL(", ").join(map(sql.Identifier, columns)),
        sql.SQL(", ").join(map(sql.SQL, values)),
        sql.Identifier(table),
        sql.Identifier(next(name for name in ("id", "image_id", "pairing_id") if name in columns)),
        sql.Literal(STEP),
    )


# ------------------------------------------------------------------------------------------ measuring, with a daemon of its own


@contextlib.contextmanager
def serving(*arguments: str, log: Path, workers: int = 2, environment: Mapping[str, str] | None = None) -> Iterator[None]:
    """Have a `loaderd serve` run, or what `arguments` to Python make instead of it."""
    command = [sys.executable, *(arguments or ("-m", "loaderd")), "serve", "--workers", str(workers)]
    with log.open("ab") as stderr:
        process = subprocess.Popen(command, env={**os.environ, **(environment or {})}, stdin=subprocess.DEVNULL, stderr=stderr)
    try:
        deadline = time.monotonic() + START_S
        while process.poll() is None and attach.status() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        if process.poll() is not None or time.monotonic() > deadline:  # or another one serves
            raise SystemExit(f"loaderd does not serve; see {log}")
        yield
    finally:
        process.terminate()
        process.wait(timeout=START_S)


def daemon() -> int:
    """Return the pid of the daemon."""
    found = attach.status()
    assert found is not None
    return int(found["pid"])


def memory(pid: int) -> dict[str, int]:
    """Return what a process has in memory, and the most that it had, in KiB."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {name: int(lines[name].split()[0]) for name in ("VmRSS", "VmHWM", "RssAnon")}


def first_batch(**arguments: Any) -> float:
    """Return the seconds from opening a feed to its first batch."""
    began = time.perf_counter()
    with Feed(timeout_s=600, **arguments) as feed:
        touch(next(feed.epochs(2)))
        return time.perf_counter() - began


def fed(batches: int, **arguments: Any) -> dict[str, int]:
    """Return the daemon's memory after so many batches."""
    with Feed(timeout_s=600, **arguments) as feed:
        for number, batch in enumerate(feed.epochs(1_000), start=1):
            touch(batch)
            if number == batches:
                break
        return memory(daemon())


def growth(epochs: int, **arguments: Any) -> list[int]:
    """Return the daemon's memory in KiB after each of some epochs."""
    found = []
    with Feed(**arguments) as feed:
        for batch in feed.epochs(epochs + 1):
            if batch.index == 0 and batch.epoch:
                found.append(memory(daemon())["VmRSS"])
            if batch.epoch == epochs:
                break
            touch(batch)
    return found


def whole_order(db: Database, **arguments: Any) -> dict[str, Any]:
    """Begin a run, wait until its first epoch's order is stored, and return its state behind the first batch."""
    with Feed(timeout_s=600, **arguments) as feed, db.connect(autocommit=True) as conn:
        touch(next(feed.epochs(2)))
        stored = "SELECT e.order_sha256 IS NOT NULL FROM epoch e JOIN run r ON r.id = e.run_id WHERE r.name = %s AND e.epoch = 0"
        while conn.execute(stored, [feed.run]).fetchone() != (True,):
            time.sleep(0.05)
        return {**feed.state_dict(), "steps": len(feed)}


def resumed(state: Mapping[str, Any], part: float, **arguments: Any) -> float:
    """Return the seconds from opening a feed with a state in that part of its epoch to the first batch."""
    step = min(int(state["steps"] * part), state["steps"] - 1)
    return first_batch(resume={**state, "step": step}, **arguments)


def killed(times: int, between: int, **arguments: Any) -> list[float]:
    """Return the seconds from each SIGKILL of the daemon to the first batch of the next one, `between` batches after the last."""
    found = []
    with Feed(timeout_s=600, **arguments) as feed:
        batches = feed.epochs(1_000_000)
        for _ in range(times):
            for _ in range(between):
                touch(next(batches))
            sock = feed._sock  # another one once it attached again
            began = time.perf_counter()
            os.kill(daemon(), signal.SIGKILL)
            while feed._sock is sock:  # what the dead one had announced is still read
                touch(next(batches))
            found.append(time.perf_counter() - began)
    return found


def medians(measure: Callable[[], float], times: int) -> dict[str, Any]:
    """Return median and maximum of a measurement, and each."""
    found = [measure() for _ in range(times)]
    return {"median": statistics.median(found), "max": max(found), "each": found}


def bytes_of_epoch(db: Database, ranks: int, samples: int) -> dict[str, float]:
    """Return what a position costs in PostgreSQL, in bytes: in the order, and in the ledger once all of them are acknowledged."""
    run = f"bytes-{ranks}-{time.time_ns()}"

    def feed(rank: int) -> None:
        with Feed(limit=samples, rank=rank, num_ranks=ranks, run=run, timeout_s=600) as mine:
            for batch in mine.epoch():
                batch.release()

    with ThreadPoolExecutor(ranks) as pool:
        list(pool.map(feed, range(ranks)))
    with db.connect(autocommit=True) as conn:
        time.sleep(0.5)  # what closing feeds have to settle
        row = conn.execute(
            "SELECT (SELECT sum(pg_column_size(o)) FROM epoch_order o WHERE o.epoch_id = e.id), "
            "(SELECT sum(pg_column_size(l)) FROM ledger l WHERE l.epoch_id = e.id), e.num_samples "
            "FROM epoch e JOIN run r ON r.id = e.run_id WHERE r.name = %s AND e.epoch = 0",
            [run],
        ).fetchone()
    assert row is not None
    return {"order": float(row[0]) / row[2], "ledger": float(row[1]) / row[2], "positions": float(row[2])}
