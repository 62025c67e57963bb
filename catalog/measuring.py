"""`catalog measure`: what images' pixels are like, and their hash where ingest did not make one.

A pass of its own over the pixels, by processes. It can be stopped at any moment and goes on with the images that have no row yet. Each
file is opened once for all its images that one task has; size and time must be those catalogued, before and after it was read.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, wait
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import psycopg

from catalog import images, places, terms
from catalog.database import Database, explain
from catalog.errors import CatalogError, FileError
from catalog.nearness import near_hash
from catalog.processes import Progress, processes
from catalog.roots import LOCK_CLASS
from catalog.statistics import Statistics, pixel_hash_of, statistics

IMAGES_PER_TASK = 64
TASKS_AT_ONCE = 16
IMAGES_PER_PAGE = 8_192
IMAGES_PER_COMMIT = 4_096
SECONDS_PER_COMMIT = 10.0  # where decoding is slow
CHUNK = 1 << 20
# What is wrong with this machine, and not with the file.
NOT_THE_FILE = ("changed", "missing", "no-access", "no-decoder", "cache-limit", "cache-full", "cache-unusable")

# An image whose file was found unreadable is looked at again once that flag is closed: by an ingest of another file, or by a person.
# One that was measured before there were near hashes is measured once more, if it can have one (`nearness.near_hash`).
UNMEASURED = """
FROM image i JOIN location l ON l.image_id = i.id AND l.preferred JOIN file f ON f.id = l.file_id AND f.state = 'present'
JOIN place r ON r.file_id = f.id
WHERE i.id > %(after)s AND (i.pixel_hash IS NULL OR NOT EXISTS (SELECT FROM measure m WHERE m.image_id = i.id AND (
    m.near_hash IS NOT NULL OR m.minimum >= m.maximum OR m.nans > 0 OR least(i.rows, i.columns) < 32))) AND NOT EXISTS (
    SELECT FROM flag g WHERE g.file_id = f.id AND g.state = 'open' AND g.rule IN ('FILE-UNREADABLE', 'FEED-UNREADABLE'))
"""
COUNT = f"SELECT count(*) {UNMEASURED}"
PAGE = f"""
SELECT i.id, f.id, f.root_id, r.url, r.path, f.size, f.mtime_ns, f.format, l.coding, i.frame, i.rows, i.columns, i.samples_per_pixel,
       i.slope, i.intercept, i.modality_lut, l.byte_offset, l.byte_length, l.dtype, l.bits_stored, i.pixel_hash IS NULL
{UNMEASURED} ORDER BY i.id LIMIT {IMAGES_PER_PAGE}
"""

STAGED = """
CREATE TEMP TABLE IF NOT EXISTS measured (
    image_id bigint, file_id bigint, size bigint, mtime_ns bigint, pixel_hash bytea, minimum float8, maximum float8, mean float8,
    deviation float8, entropy float8, saturated float8, nans bigint, near_hash bigint
) ON COMMIT DELETE ROWS
"""
# What an ingest took out or read again meanwhile.
OUTDATED = """
DELETE FROM measured m WHERE NOT EXISTS (
    SELECT FROM location l JOIN file f ON f.id = l.file_id
    WHERE l.image_id = m.image_id AND f.id = m.file_id AND (f.size, f.mtime_ns) = (m.size, m.mtime_ns))
"""
MEASURE = """
INSERT INTO measure (image_id, minimum, maximum, mean, deviation, entropy, saturated, nans, near_hash)
SELECT image_id, minimum, maximum, mean, deviation, entropy, saturated, nans, near_hash FROM measured ORDER BY image_id
ON CONFLICT (image_id) DO UPDATE SET near_hash = excluded.near_hash WHERE measure.near_hash IS NULL AND excluded.near_hash IS NOT NULL
"""
HASH = """
UPDATE image i SET pixel_hash = m.pixel_hash FROM measured m WHERE i.id = m.image_id AND m.pixel_hash IS NOT NULL AND i.pixel_hash IS NULL
RETURNING i.id, i.instance_id
"""
CONTENTS = """
SELECT i.instance_id, sha256(string_agg(i.pixel_hash, ''::bytea ORDER BY i.frame)) FROM image i JOIN instance n ON n.id = i.instance_id
WHERE i.instance_id = ANY(%(instances)s) AND n.content_hash IS NULL
GROUP BY i.instance_id, n.number_of_frames HAVING count(i.pixel_hash) = n.number_of_frames
"""
# Apart from the SELECT: in one statement PostgreSQL took 35 s for what are 0.1 s, while it had no statistics of these columns yet.
CONTENT = """
UPDATE instance n SET content_hash = c.hash FROM unnest(%s::bigint[], %s::bytea[]) AS c (id, hash) WHERE n.id = c.id AND NOT EXISTS (
    SELECT FROM instance o WHERE o.series_id = n.series_id AND o.sop_instance_uid = n.sop_instance_uid AND o.content_hash = c.hash)
"""
# Those whose sample_key depends on their pixels.
KEYED_BY_PIXELS = """
SELECT i.id FROM image i JOIN instance n ON n.id = i.instance_id WHERE i.id = ANY(%(images)s) AND (
    n.sop_instance_uid = '' OR EXISTS (SELECT FROM instance o WHERE o.sop_instance_uid = n.sop_instance_uid AND o.id <> n.id))
"""
FLAG = """
INSERT INTO flag (rule, severity, detail, file_id, raised_by)
SELECT 'FILE-UNREADABLE', 'error', %s, id, 'measure' FROM file WHERE id = %s AND (size, mtime_ns) = (%s, %s) ON CONFLICT DO NOTHING
"""

Array = npt.NDArray[Any]

CHANGED = ("changed", "the file is not what was catalogued; run `catalog ingest` on its root again")


@dataclass(slots=True)
class Summary:
    """What a pass did. Counts images, and files in `flagged`."""

    images: int = 0
    measured: int = 0
    hashed: int = 0
    flagged: int = 0  # as unreadable
    left: dict[str, int] = field(default_factory=dict)  # not measured now for another reason: code and message → how many
    not_measured: int = 0  # all that have no row in ``measure``
    contours: int = 0  # whose edges were measured: rows added to ``edge_fit``
    seconds: float = 0.0


class Item(NamedTuple):
    """One image to measure, as `PAGE` gives it."""

    image_id: int
    file_id: int
    root_id: int
    root: str
    path: str
    size: int
    mtime_ns: int
    format: str
    coding: str
    frame: int
    rows: int
    columns: int
    samples: int
    slope: float
    intercept: float
    modality_lut: bool
    offset: int | None
    length: int | None
    dtype: str | None
    bits_stored: int | None
    to_hash: bool


class Measured(NamedTuple):
    """What was found in one image; its hash where it was asked for."""

    item: Item
    pixel_hash: bytes | None
    statistics: Statistics
    near_hash: int | None  # None: too small, constant, or with values that are not finite


class Left(NamedTuple):
    """An image that was not measured, and why; codes are those of FileError."""

    item: Item
    code: str
    message: str


Outcome = Measured | Left


def measure(
    database: Database,
    *,
    jobs: int | None = None,
    limit: int | None = None,
    progress: Progress = lambda done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> Summary:
    """Measure the pixels of all images that have no row in ``measure``, no pixel hash, or no near hash where one can be made.

    Then how well contours follow the edges of measured images (`edges.fit`).

    Args:
        jobs: Processes; by default one a core.
        limit: At most so many images, and contours.
        progress: Called with (images done, images to do).
        say: Called with a line when something is being waited for.

    A file that cannot be decoded gets a flag, FILE-UNREADABLE, and is left alone until that is closed. One that is not there, may not be
    opened, is not what was catalogued or needs a decoder that is not installed is tried again the next time (`Summary.left`).

    Raises:
        CatalogError: If the database refuses, or no process can be started.
    """
    from catalog import edges

    begun = time.monotonic()
    summary = Summary()
    try:
        with database.connect(application_name="catalog measure") as conn:
            conn.execute(STAGED)
            todo = conn.execute(COUNT, {"after": 0}).fetchone()
            conn.commit()
            assert todo is not None
            total = todo[0] if limit is None else min(limit, todo[0])
            with contextlib.closing(_outcomes(_tasks(conn, total), total, jobs)) as outcomes:
                batch: list[Outcome] = []
                written = time.monotonic()
                for done, outcome in enumerate(outcomes, 1):
                    batch.append(outcome)
                    if done % IMAGES_PER_TASK == 0:
                        progress(done, total)
                    if len(batch) == IMAGES_PER_COMMIT or time.monotonic() - written > SECONDS_PER_COMMIT:
                        _write(conn, batch, summary, say)
                        batch, written = [], time.monotonic()
                if batch:
                    _write(conn, batch, summary, say)
                    progress(total, total)
            if summary.measured:
                conn.execute("ANALYZE measure, image, instance")  # an embedded server is seldom up long enough for autovacuum
            counts = conn.execute("SELECT (SELECT count(*) FROM image), (SELECT count(*) FROM measure)").fetchone()
            assert counts is not None
            summary.images, summary.not_measured = counts[0], counts[0] - counts[1]
            conn.commit()
    except psycopg.Error as error:
        raise explain(error, database) from error
    summary.contours = edges.fit(database, jobs=jobs, limit=limit, say=say)
    summary.seconds = round(time.monotonic() - begun, 3)
    return summary


# ------------------------------------------------------------------------------------------ rows


def _tasks(conn: psycopg.Connection[Any], total: int) -> Iterator[list[Item]]:
    """Yield what is to be measured, in the order in which it was ingested, so that images of one file come together."""
    after = 0
    while total > 0:
        items = [Item._make(row) for row in conn.execute(PAGE, {"after": after}, binary=True).fetchmany(total)]
        conn.commit()
        if not items:
            return
        for start in range(0, len(items), IMAGES_PER_TASK):
            yield items[start : start + IMAGES_PER_TASK]
        total -= len(items)
        after = items[-1].image_id


def _write(conn: psycopg.Connection[Any], batch: Sequence[Outcome], summary: Summary, say: Callable[[str], None]) -> None:
    if places.is_pseudonymized(conn):  # decoders may quote what they read
        batch = [outcome._replace(message=terms.REASONS.get(outcome.code, terms.REASON)) if isinstance(outcome, Left) else outcome
                 for outcome in batch]  # fmt: skip
    _keep_ingests_out(conn, sorted({outcome.item.root_id for outcome in batch}), say)
    measured = [outcome for outcome in batch if isinstance(outcome, Measured)]
    if measured:
        with conn.cursor().copy("COPY measured FROM STDIN") as copy:
            for one in measured:
                item = one.item
                copy.write_row((item.image_id, item.file_id, item.size, item.mtime_ns, one.pixel_hash, *one.statistics, one.near_hash))
        if outdated := conn.execute(OUTDATED).rowcount:
            _count(summary, *CHANGED, outdated)
        summary.measured += len(measured) - outdated
        conn.execute(MEASURE)
        # Asked first: even an UPDATE of no row counts as a change of the catalog, for which a daemon plans its next epoch again.
        if any(one.pixel_hash is not None for one in measured):
            hashed = conn.execute(HASH).fetchall()
            summary.hashed += len(hashed)
            touched = {"images": [image_id for image_id, _ in hashed], "instances": list({instance_id for _, instance_id in hashed})}
            if contents := conn.execute(CONTENTS, touched).fetchall():
                conn.execute(CONTENT, [list(column) for column in zip(*contents, strict=True)])
            if keyed := conn.execute(KEYED_BY_PIXELS, touched).fetchall():
                images.settle(conn, 0, [], [image_id for (image_id,) in keyed])
    unreadable: dict[int, Left] = {}
    for outcome in batch:
        if isinstance(outcome, Left):
            if outcome.code in NOT_THE_FILE:
                _count(summary, outcome.code, outcome.message)
            else:
                unreadable.setdefault(outcome.item.file_id, outcome)
    for file_id, left in unreadable.items():
        item = left.item
        summary.flagged += conn.execute(FLAG, [f"{left.code}: {left.message}", file_id, item.size, item.mtime_ns]).rowcount
    conn.commit()


def _count(summary: Summary, code: str, message: str, count: int = 1) -> None:
    summary.left[f"{code}: {message}"] = summary.left.get(f"{code}: {message}", 0) + count


def _keep_ingests_out(conn: psycopg.Connection[Any], root_ids: list[int], say: Callable[[str], None]) -> None:
    """Take, until the transaction ends, the lock under which ingest writes these roots: both change rows of images."""
    for root_id in root_ids:
        if conn.execute("SELECT pg_try_advisory_xact_lock(%s, %s)", [LOCK_CLASS, root_id]).fetchone() != (True,):
            say("an ingest of this root is running; waiting for it")
            conn.execute("SELECT pg_advisory_xact_lock(%s, %s)", [LOCK_CLASS, root_id])


# ------------------------------------------------------------------------------------------ processes


def _outcomes(tasks: Iterator[list[Item]], total: int, jobs: int | None) -> Generator[Outcome]:
    """Yield an outcome an image, in no order. A process that dies takes nothing with it but the file that kills it."""
    running: dict[Future[list[Outcome]], list[Item]] = {}
    task = next(tasks, None)
    while task is not None:
        with processes(jobs, -(-total // IMAGES_PER_TASK)) as pool:
            try:
                while task is not None or running:
                    while task is not None and len(running) < TASKS_AT_ONCE:
                        running[pool.submit(measure_images, task)] = task
                        task = next(tasks, None)
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        found = future.result()
                        del running[future]
                        yield from found
            except BrokenExecutor:
                pass  # below, and then the rest in new ones
        yield from _apart(list(running.values()))
        running.clear()


def _apart(tasks: list[list[Item]]) -> Iterator[Outcome]:
    """After a process died: one task at a time, and by halves what it dies of, until the image is found that kills it."""
    while tasks:
        with processes(1, 1) as alone:
            try:
                while tasks:
                    found: list[Outcome] = alone.submit(measure_images, tasks[-1]).result()
                    tasks.pop()
                    yield from found
            except BrokenExecutor:
                pass
        if tasks:
            items = tasks.pop()
            half = len(items) // 2
            if half:
                tasks += [items[half:], items[:half]]
            else:
                with processes(1, 1) as alone:
                    try:
                        alone.submit(measure_images, []).result()
                    except BrokenExecutor:
                        raise CatalogError("no process can be started, so nothing is measured; see the error above") from None
                yield Left(items[0], "reader-died", "the process that decoded it died; look at it with another program")


def measure_images(items: Sequence[Item]) -> list[Outcome]:
    """Measure some images. Runs in a process of its own."""
    scratch = np.empty(max((item.length or 0 for item in items), default=0), np.uint8)
    return [outcome for _, group in groupby(items, lambda item: item.file_id) for outcome in _measure_file(list(group), scratch)]


def _measure_file(items: list[Item], scratch: npt.NDArray[np.uint8]) -> list[Outcome]:
    """Measure images of one file; `scratch` has room for each that is read by offset."""
    first = items[0]
    found: list[Outcome] = []
    try:
        with contextlib.ExitStack() as stack:
            descriptor, path = _opened(first, any(item.dtype is None for item in items), stack)
            for item in items:
                if item.dtype is None:
                    found.append(_decoded(item, path))
                else:
                    found.append(_measured(item, _by_offset(item, descriptor, scratch)))
        if "://" not in first.root and _changed(path.stat(), first):
            return [Left(item, *CHANGED) for item in items]
    except FileNotFoundError:
        return _left(items, found, "missing", "it was taken away while it was read; run `catalog ingest` on its root again")
    except OSError as error:
        return _left(items, found, "unreadable", f"{error.strerror} while its pixels were read")
    except FileError as error:
        return _left(items, found, error.code, str(error))
    except CatalogError:
        raise  # a setting of this machine that cannot be right
    except Exception as error:  # one file of a million must not stop the others; the text could hold a value of its header
        return _left(items, found, "reader-failed", f"decoding it failed with {type(error).__name__}")
    return found


def _opened(item: Item, decode: bool, stack: contextlib.ExitStack) -> tuple[int, Path]:
    """Return a descriptor to read an image's file from by offset, and a path by which a decoder can open it, until the stack is closed.

    Raises:
        FileError: ``missing``, ``changed`` or ``no-access``; as `cache.decompressed`.
    """
    if "://" in item.root:
        from catalog import remote

        descriptor = remote.fetched(item.root, item.path, item.size, item.mtime_ns, item.coding)
        stack.callback(os.close, descriptor)
        if not decode:
            return descriptor, Path()
        # In the cache other bytes follow, which a decoder would take for its own.
        copy = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
        for start in range(0, item.size, CHUNK):
            copy.write(os.pread(descriptor, min(CHUNK, item.size - start), start))
        copy.flush()
        return descriptor, remote.path_of(copy.fileno())
    path = f"{item.root}/{item.path}"
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise FileError("missing", f"{error.strerror}; give read access, or run `catalog ingest` on its root again") from None
    stack.callback(os.close, descriptor)
    if _changed(os.fstat(descriptor), item):
        raise FileError(*CHANGED)
    if item.coding:
        from catalog import cache

        descriptor = cache.decompressed(Path(path), item.coding, item.size, item.mtime_ns)
        stack.callback(os.close, descriptor)
    return descriptor, Path(path)


def stored_values(item: Item) -> Array:
    """Return an image's stored values, read from its file: (rows, columns), or (rows, columns, samples); a new array.

    Raises:
        FileError: ``missing``, ``changed``, ``no-access`` or ``truncated``; as the decoders.
        OSError: If reading fails.
    """
    from catalog import dicom, raster

    with contextlib.ExitStack() as stack:
        descriptor, path = _opened(item, item.dtype is None, stack)
        if item.dtype is None:
            stored: Array = (raster if item.format == "raster" else dicom).decode_frame(path, item.frame)
        else:
            stored = _by_offset(item, descriptor, np.empty(item.length or 0, np.uint8))
    if stored.size != item.rows * item.columns * item.samples:
        raise FileError(*CHANGED)
    return stored.reshape((item.rows, item.columns) if item.samples == 1 else (item.rows, item.columns, item.samples))


def _left(items: list[Item], found: list[Outcome], code: str, message: str) -> list[Outcome]:
    # What damages one frame is seldom alone in its file, and the flag is the file's.
    return [*found, *(Left(item, code, message) for item in items[len(found) :])]


def _changed(status: os.stat_result, item: Item) -> bool:
    return (status.st_size, status.st_mtime_ns) != (item.size, item.mtime_ns)


def _by_offset(item: Item, descriptor: int, scratch: npt.NDArray[np.uint8]) -> Array:
    """Return an image's stored values, flat, in `scratch`."""
    assert item.offset is not None and item.length is not None and item.dtype is not None
    values = scratch[: item.length].view(item.dtype)
    if (
        values.size != item.rows * item.columns * item.samples
        or os.preadv(descriptor, [scratch[: item.length].data], item.offset) != item.length
    ):
        raise FileError("truncated", "there are fewer pixels than were catalogued; run `catalog ingest` on its root again")
    if item.bits_stored is not None:  # PS3.5 8.1.1: what lies above is no part of the value
        values <<= 8 * values.itemsize - item.bits_stored
        values >>= 8 * values.itemsize - item.bits_stored
    return values


def _decoded(item: Item, path: Path) -> Measured:
    from catalog import dicom, raster

    stored: Array | None = None
    if item.to_hash or not item.modality_lut:
        stored = (raster if item.format == "raster" else dicom).decode_frame(path, item.frame)
        if stored.size != item.rows * item.columns * item.samples:
            raise FileError("shape", f"decodes to {'×'.join(map(str, stored.shape))}, not to the catalogued {item.rows}×{item.columns}")
    return _measured(item, stored, dicom.decode_values(path, item.frame) if item.modality_lut else None)


def _measured(item: Item, stored: Array | None, values: Array | None = None) -> Measured:
    """Measure an image by its stored values, or by `values`, which come out of a Modality LUT; what is hashed is stored."""
    pixel_hash = pixel_hash_of(stored) if item.to_hash and stored is not None else None
    slope, intercept = (item.slope, item.intercept) if values is None else (1.0, 0.0)
    if values is None:
        assert stored is not None
        values = stored
    shape = (item.rows, item.columns) if item.samples == 1 else (item.rows, item.columns, item.samples)
    return Measured(item, pixel_hash, statistics(values, slope, intercept), near_hash(values.reshape(shape), slope))
