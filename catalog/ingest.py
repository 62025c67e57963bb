"""Folder → rows: what is new or changed below a root is read in parallel processes and written by one COPY writer.

The writer commits every 5,000 files, each file together with all that was read from it. A killed ingest therefore leaves whole
files only, and the next one goes on with the files that are not there yet or differ in size or time. What spans files (phases,
pairings, masks) is worked out afterwards from the rows, by statements that find what is missing; so it does not matter where the
last ingest ended. An ingest that finds nothing to do writes nothing, not even a row about itself.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import psycopg

from catalog import __version__, images, layouts, pairings
from catalog.database import Database, explain
from catalog.errors import CatalogError
from catalog.layouts import Annotation, Entry, Found, Image, sunnybrook
from catalog.reading import NotPart, Progress, ReadAnnotation, ReadImage, Refused, Result, read_all

LAYOUTS = {"sunnybrook": sunnybrook}
FILES_PER_COMMIT = 5_000
LOCK_CLASS = 0x5CA9  # advisory lock (LOCK_CLASS, root id): one ingest a root at a time

LAST_RUN = "SELECT id, state FROM ingest_run WHERE root_id = %s ORDER BY id DESC LIMIT 1"

# Files that could not be read are tried again at every ingest, since a right given changes neither size nor time.
UNREADABLE = """
SELECT f.path, g.detail FROM flag g JOIN file f ON f.id = g.file_id
WHERE f.root_id = %s AND g.state = 'open' AND g.rule IN ('FILE-UNREADABLE', 'FEED-UNREADABLE')
"""

# What ingests found and what is still so, whenever it was found; what is wrong with the tree itself comes from the tree.
STANDING = """
SELECT f.path, 'read' AS stage, split_part(g.detail, ': ', 1) AS code, substring(g.detail FROM position(': ' IN g.detail) + 2) AS message
FROM flag g JOIN file f ON f.id = g.file_id
WHERE f.root_id = %(root)s AND g.state = 'open' AND g.severity = 'error' AND g.raised_by = 'ingest'
UNION ALL
SELECT f.path, CASE split_part(g.rule, '-', 1) WHEN 'PAIR' THEN 'pair' WHEN 'MASK' THEN 'mask' ELSE 'read' END, lower(g.rule), g.detail
FROM flag g LEFT JOIN pairing p ON p.id = g.pairing_id
JOIN annotation a ON a.id = coalesce(g.annotation_id, p.annotation_id) JOIN file f ON f.id = a.file_id
WHERE f.root_id = %(root)s AND g.state = 'open' AND g.severity = 'error' AND g.raised_by = 'ingest'
UNION ALL
SELECT f.path, 'read', lower(g.rule), g.detail
FROM flag g JOIN location l ON l.image_id = g.image_id AND l.preferred JOIN file f ON f.id = l.file_id
WHERE f.root_id = %(root)s AND g.state = 'open' AND g.severity = 'error' AND g.raised_by = 'ingest'
ORDER BY 1, 2, 3, 4
"""


@dataclass(slots=True)
class Summary:
    """What an ingest found and did; counts of files, images and rows."""

    root: str
    layout: str
    images: int = 0
    annotations: int = 0
    files_read: int = 0
    missing: int = 0
    paired: int = 0
    proposed: int = 0
    unpaired: int = 0
    masks: int = 0
    standing_errors: int = 0
    left_over: int = 0
    seconds: float = 0.0


def find(folder: Path, layout: str = "auto") -> tuple[str, Found]:
    """Return the layout's name and what it finds below a folder; reads names and link tables, no image.

    Raises:
        CatalogError: If the folder cannot be used, or no layout fits it.
    """
    try:
        folder = folder.resolve(strict=True)
        str(folder).encode()
        if not folder.is_dir():
            raise CatalogError(f"{folder}: is no folder; ingest takes the folder that holds the studies")
        os.scandir(folder).close()
    except FileNotFoundError:
        raise CatalogError(f"{folder}: is not there; nothing was changed") from None
    except UnicodeEncodeError:
        shown = str(folder).encode(errors="replace").decode()
        raise CatalogError(f"{shown}: its path is not UTF-8, which PostgreSQL cannot store; rename it") from None
    except (OSError, RuntimeError) as error:
        raise CatalogError(f"{folder}: {getattr(error, 'strerror', None) or error}; nothing was changed") from None
    tree = layouts.Tree(folder)
    name = choose(tree, layout)
    return name, LAYOUTS[name].read(tree)


def choose(tree: layouts.Tree, name: str) -> str:
    """Return the layout's name: the one asked for, or for ``auto`` the one that recognises the tree."""
    if name != "auto":
        if name not in LAYOUTS:
            raise CatalogError(f"--layout {name}: there is no such layout; there is: {', '.join(LAYOUTS)}")
        return name
    for candidate, module in LAYOUTS.items():
        if module.recognises(tree):
            return candidate
    raise CatalogError(
        f"{tree.root}: no layout fits; sunnybrook wants link.csv, dicoms/<patient>/ and contourfiles/<original>/; "
        f"point at the folder that holds these, or name a layout by --layout"
    )


def ingest(
    database: Database,
    folder: Path,
    *,
    layout: str = "auto",
    name: str | None = None,
    jobs: int | None = None,
    executor: Executor | None = None,
    progress: Progress = lambda done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> Summary:
    """Bring the catalog up to what lies below a folder.

    Args:
        layout: A layout's name, or ``auto``.
        name: The root's name; by default the folder's.
        jobs: Reading processes; by default one a core.
        executor: Where files are read instead of `jobs` processes of this machine.
        progress: Called with (files read, files to read).
        say: Called with a line when something is being waited for.

    Raises:
        CatalogError: If the folder cannot be used, no layout fits, or the database refuses.
    """
    begun = time.monotonic()
    layout, found = find(folder, layout)
    folder = folder.resolve()
    try:
        with database.connect(application_name="catalog ingest") as conn:
            conn.execute(images.STAGED)
            conn.execute(pairings.WANTED)
            conn.execute(pairings.DRAWN_STAGED)
            root_id = _root(conn, folder, name)
            conn.commit()
            if _wait_alone(conn, root_id, say):
                layout, found = find(folder, layout)  # again, since the other one may have seen a later state of the tree
            summary = Summary(root=str(folder), layout=layout, left_over=found.left_over)
            with Run(conn, root_id, layout, found) as run:
                _ingest(conn, run, found, summary, folder, jobs, executor, progress)
    except psycopg.Error as error:
        raise explain(error, database) from error
    summary.seconds = round(time.monotonic() - begun, 3)
    return summary


class Run:
    """The row of ``ingest_run``, written only once there is something to say."""

    def __init__(self, conn: psycopg.Connection[Any], root_id: int, layout: str, found: Found) -> None:
        self.conn, self.root_id, self.layout = conn, root_id, layout
        self.files_seen = len(found.images) + len(found.annotations)
        self.problems = sorted({(problem.path, problem.code, problem.message) for problem in found.problems})
        self.files_read = 0
        self._id: int | None = None
        self._noted: set[tuple[str, str, str, str]] = set()

    @property
    def actor(self) -> str:
        """Who decides pairings in this run."""
        return f"layout:{self.layout}"

    @property
    def id(self) -> int:
        """The row's id; inserts the row at the first call."""
        if self._id is None:
            # Only one ingest of a root runs at a time, so a row that still says running was killed.
            self.conn.execute("UPDATE ingest_run SET state = 'interrupted' WHERE root_id = %s AND state = 'running'", [self.root_id])
            row = self.conn.execute(
                "INSERT INTO ingest_run (root_id, layout, program_version, host, files_seen) VALUES (%s, %s, %s, %s, %s) RETURNING id",
                [self.root_id, self.layout, __version__, socket.gethostname(), self.files_seen],
            ).fetchone()
            assert row is not None
            self._id = int(row[0])
            for path, code, message in self.problems:
                self.refuse(path, "find", code, message)
        return self._id

    def refuse(self, path: str, stage: str, code: str, message: str) -> None:
        """Note an error, once a run; it becomes durable with the caller's transaction."""
        if (path, stage, code, message) not in self._noted:
            self.conn.execute(
                "INSERT INTO ingest_error (ingest_run_id, path, stage, code, message) VALUES (%s, %s, %s, %s, %s)",
                [self.id, path, stage, code, message],
            )
            self._noted.add((path, stage, code, message))

    def note_standing(self) -> int:
        """Return how many errors stand. A run that has a row lists them all, also those that an earlier one found."""
        standing = [
            *self.conn.execute(STANDING, {"root": self.root_id}),
            *((path, "find", code, text) for path, code, text in self.problems),
        ]
        if self._id is not None:
            for error in standing:
                self.refuse(*error)
        return len(standing)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self.conn.closed:
            return
        self.conn.rollback()  # of what was being written when an error came; a finished ingest has committed
        if self._id is None:
            return
        state = "finished" if kind is None else "interrupted" if kind is KeyboardInterrupt else "failed"
        self.conn.execute(
            "UPDATE ingest_run SET state = %s, finished_at = now(), files_read = %s, errors = %s WHERE id = %s",
            [state, self.files_read, len(self._noted), self._id],
        )
        self.conn.commit()


def _ingest(
    conn: psycopg.Connection[Any],
    run: Run,
    found: Found,
    summary: Summary,
    folder: Path,
    jobs: int | None,
    executor: Executor | None,
    progress: Progress,
) -> None:
    rows = conn.execute("SELECT path, size, mtime_ns, state FROM file WHERE root_id = %s", [run.root_id])
    known = {path: (size, mtime, state) for path, size, mtime, state in rows}
    wanted: list[Image | Annotation] = [*found.images, *found.annotations]
    unreadable = dict(conn.execute(UNREADABLE, [run.root_id]).fetchall())
    todo = [item for item in wanted if item.entry.path in unreadable or _differs(item.entry, known.get(item.entry.path))]
    if _last_differs(conn, run):
        run.id  # noqa: B018  a run of its own, also when all that changed is that something wrong is gone
    summary.missing = _mark_missing(conn, run, list(known.keys() - {item.entry.path for item in wanted}))
    conn.commit()
    polygons = {item.entry.path: item for item in found.annotations}
    with contextlib.closing(read_all(str(folder), todo, jobs, executor, progress)) as results:
        while batch := list(islice(results, FILES_PER_COMMIT)):
            _write(conn, run, batch, polygons, unreadable)
            conn.commit()
            run.files_read += sum(not isinstance(result, NotPart) for result in batch)
    summary.files_read = run.files_read
    _write_originals(conn, found)
    images.number_phases(conn)
    pairings.pair(conn, run, found.annotations)
    conn.commit()
    pairings.make_masks(conn, run)
    if run.files_read:
        # An embedded server is seldom up long enough for autovacuum; without statistics a selection takes twice as long.
        conn.execute("ANALYZE patient, study, series, instance, image, file, location, annotation, pairing, mask, flag")
    conn.commit()
    summary.standing_errors = run.note_standing()
    conn.commit()
    _count(conn, run, summary)


def _last_differs(conn: psycopg.Connection[Any], run: Run) -> bool:
    """Was the last run cut short, or is something else wrong with the tree than then?"""
    last = conn.execute(LAST_RUN, [run.root_id]).fetchone()
    if last is None or last[1] != "finished":
        return last is not None or bool(run.problems)
    rows = conn.execute("SELECT path, code, message FROM ingest_error WHERE stage = 'find' AND ingest_run_id = %s", [last[0]])
    return run.problems != sorted(rows.fetchall())


def _root(conn: psycopg.Connection[Any], folder: Path, name: str | None) -> int:
    """Return the root's id; a new folder becomes a root."""
    known = "SELECT id, name FROM root WHERE url = %s"
    row = conn.execute(known, [str(folder)]).fetchone()
    if row is None:  # root ids begin at 1, so this lock is that of making a root
        conn.execute("SELECT pg_advisory_xact_lock(%s, 0)", [LOCK_CLASS])
        row = conn.execute(known, [str(folder)]).fetchone()
    if row is not None:
        if name not in (None, row[1]):
            raise CatalogError(f"--name {name}: this folder is in the catalog already, as {row[1]}; leave --name out")
        return int(row[0])
    wanted = name or folder.name or "root"
    taken = {taken for (taken,) in conn.execute("SELECT name FROM root WHERE starts_with(name, %s)", [wanted])}
    if name in taken:
        raise CatalogError(f"--name {name}: another root has this name; choose one that is free (see `catalog status`)")
    free = wanted if wanted not in taken else next(f"{wanted}-{n}" for n in range(2, len(taken) + 3) if f"{wanted}-{n}" not in taken)
    row = conn.execute("INSERT INTO root (name, url) VALUES (%s, %s) RETURNING id", [free, str(folder)]).fetchone()
    assert row is not None
    return int(row[0])


def _wait_alone(conn: psycopg.Connection[Any], root_id: int, say: Callable[[str], None]) -> bool:
    """Keep other ingests of this root out until the connection ends. Returns whether one had to be waited for."""
    waits = conn.execute("SELECT pg_try_advisory_lock(%s, %s)", [LOCK_CLASS, root_id]).fetchone() != (True,)
    if waits:
        say("another ingest of this root is running; waiting for it")
        conn.execute("SELECT pg_advisory_lock(%s, %s)", [LOCK_CLASS, root_id])
    conn.commit()
    return waits


def _differs(entry: Entry, known: tuple[int, int, str] | None) -> bool:
    # An unreadable file whose flag a person closed is left in peace until it changes.
    return known is None or known[:2] != (entry.size, entry.mtime_ns) or known[2] == "missing"


def _write(
    conn: psycopg.Connection[Any], run: Run, results: Sequence[Result], polygons: dict[str, Annotation], unreadable: dict[str, str]
) -> None:
    read = [result for result in results if isinstance(result, ReadImage)]
    if read:
        images.write(conn, run.id, run.root_id, read)
    drawn = [(polygons[result.entry.path], result.polygon) for result in results if isinstance(result, ReadAnnotation)]
    if drawn:
        pairings.write_polygons(conn, run.id, run.root_id, drawn)
    refused = []
    for result in results:
        if isinstance(result, Refused) and unreadable.get(result.entry.path) != f"{result.code}: {result.message}":
            file_id = _write_unreadable(conn, run, result)
            conn.execute(
                "INSERT INTO flag (rule, severity, detail, file_id, raised_by) VALUES ('FILE-UNREADABLE', 'error', %s, %s, 'ingest') "
                "ON CONFLICT DO NOTHING",  # a person may have raised it before
                [f"{result.code}: {result.message}", file_id],
            )
            run.refuse(result.entry.path, "read", result.code, result.message)
            refused.append(result.entry.path)
    if refused:
        images.settle(conn, run.root_id, refused)
        pairings.retire(conn, run.root_id, refused)
    # Perhaps there was an image in it once.
    _mark_missing(conn, run, [result.entry.path for result in results if isinstance(result, NotPart)])


def _write_unreadable(conn: psycopg.Connection[Any], run: Run, result: Refused) -> int:
    row = conn.execute(
        "INSERT INTO file (root_id, path, kind, size, mtime_ns, state, ingest_run_id) VALUES (%s, %s, %s, %s, %s, 'unreadable', %s) "
        "ON CONFLICT (root_id, path) DO UPDATE SET size = excluded.size, mtime_ns = excluded.mtime_ns, state = excluded.state, "
        "ingest_run_id = excluded.ingest_run_id RETURNING id",
        [run.root_id, result.entry.path, result.kind, result.entry.size, result.entry.mtime_ns, run.id],
    ).fetchone()
    assert row is not None
    images.close_file_flags(conn, run.root_id, [result.entry.path])
    return int(row[0])


def _mark_missing(conn: psycopg.Connection[Any], run: Run, paths: Sequence[str]) -> int:
    """Note that these files are not there any more; returns how many of them are news."""
    rows = conn.execute(
        "SELECT path FROM file WHERE root_id = %s AND path = ANY(%s) AND state <> 'missing'", [run.root_id, list(paths)]
    ).fetchall()
    if gone := [path for (path,) in rows]:
        conn.execute(
            "UPDATE file SET state = 'missing', ingest_run_id = %s WHERE root_id = %s AND path = ANY(%s)", [run.id, run.root_id, gone]
        )
        images.close_file_flags(conn, run.root_id, gone, "the file is gone")
        images.settle(conn, run.root_id, gone)
        pairings.retire(conn, run.root_id, gone)
    return len(gone)


def _write_originals(conn: psycopg.Connection[Any], found: Found) -> None:
    rows = conn.execute("SELECT patient_id, original_id FROM patient WHERE patient_id = ANY(%s)", [list(found.originals)])
    if changed := [patient for patient, original in rows if original != found.originals[patient]]:
        conn.execute(
            "UPDATE patient SET original_id = o.original FROM unnest(%s::text[], %s::text[]) AS o(patient, original) "
            "WHERE patient_id = o.patient",
            [changed, [found.originals[patient] for patient in changed]],
        )
    conn.commit()


def _count(conn: psycopg.Connection[Any], run: Run, summary: Summary) -> None:
    row = conn.execute(
        """
        SELECT (SELECT count(DISTINCT l.image_id) FROM location l JOIN file f ON f.id = l.file_id
                WHERE f.root_id = %(root)s AND f.state = 'present'),
               count(*), count(*) FILTER (WHERE p.accepted > 0), count(*) FILTER (WHERE p.accepted = 0 AND p.proposed > 0),
               count(*) FILTER (WHERE p.accepted = 0 AND p.proposed = 0), coalesce(sum(p.masks), 0)
        FROM annotation a JOIN file f ON f.id = a.file_id AND f.root_id = %(root)s
        CROSS JOIN LATERAL (
            SELECT count(*) FILTER (WHERE q.state = 'accepted') AS accepted, count(*) FILTER (WHERE q.state = 'proposed') AS proposed,
                   count(*) FILTER (WHERE m.pairing_id IS NOT NULL AND q.state <> 'rejected') AS masks
            FROM pairing q LEFT JOIN mask m ON m.pairing_id = q.id WHERE q.annotation_id = a.id) p
        WHERE a.current
        """,
        {"root": run.root_id},
    ).fetchone()
    assert row is not None
    summary.images, summary.annotations, summary.paired, summary.proposed, summary.unpaired = row[:5]
    summary.masks = int(row[5])
