"""Folder → rows: what is new or changed below a root is read in parallel processes and written by one COPY writer.

The writer commits every 5,000 files, each file together with all that was read from it. A killed ingest therefore leaves whole
files only, and the next one goes on with the files that are not there yet or differ in size or time. What spans files (phases,
pairings, masks) is worked out afterwards from the rows, by statements that find what is missing; so it does not matter where the
last ingest ended. An ingest that finds nothing to do writes nothing, not even a row about itself.
"""

from __future__ import annotations

import contextlib
import gc
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psycopg

from catalog import erased, files, images, layouts, overlaps, pairings, places, pseudonyms, remote
from catalog.database import Database, explain
from catalog.errors import CatalogError
from catalog.flags import person
from catalog.ingest_run import Run
from catalog.layouts import Annotation, Found, Image, choosing
from catalog.processes import Progress
from catalog.pseudonyms import Pseudonyms
from catalog.reading import TASKS_AT_ONCE, Hashing, NotPart, Read, Refused, Result, read_all
from catalog.roots import LOCK_CLASS

FILES_PER_COMMIT = 5_000

# Files that could not be read are tried again where neither their size nor their time must change for it: a right was given, a decoder
# installed, a disk came back. What is damaged is read again once it changes, or by `catalog runs retry`.
UNREADABLE = """
SELECT f.path, g.detail FROM flag g JOIN file f ON f.id = g.file_id
WHERE f.root_id = %(root)s AND g.state = 'open' AND g.raised_by <> 'measure' AND (g.rule = 'FEED-UNREADABLE'
    OR g.rule = 'FILE-UNREADABLE' AND (%(all)s OR split_part(g.detail, ': ', 1) IN ('no-access', 'no-decoder', 'reader-died',
        'reader-failed', 'cache-full', 'changed')))
"""


@dataclass(slots=True)
class Summary:
    """What an ingest found and did; counts of files, images and rows."""

    root: str
    layout: str
    chosen: list[str] = field(default_factory=list)  # which layout reads what, and why
    images: int = 0
    annotations: int = 0
    files_read: int = 0
    missing: int = 0
    moved: int = 0
    fell_back: int = 0
    paired: int = 0
    proposed: int = 0
    unpaired: int = 0
    masks: int = 0
    standing_errors: int = 0
    left_over: int = 0
    seconds: float = 0.0


def find(
    folder: Path | str, layout: str = "auto", options: Mapping[str, Any] = MappingProxyType({}), *, quiet: bool = False
) -> tuple[str, Found]:
    """Return the layouts' names and what they find below a folder; reads names and small tables, no image.

    Raises:
        CatalogError: If the folder cannot be used, or no layout fits, or several fit equally; with `quiet` without names of the tree.
    """
    try:
        tree = remote.RemoteTree(folder) if isinstance(folder, str) else layouts.Tree(_usable(folder))
        parts = choosing.choose(tree, layout, options)
        return "+".join(dict.fromkeys(part.name for part in parts)), choosing.read(tree, parts, options)
    except CatalogError as error:
        if not quiet:
            raise
        said = str(error).replace(str(folder), "the folder")
        if isinstance(folder, Path):
            said = said.replace(str(folder.absolute()), "the folder").replace(str(folder.resolve()), "the folder")
        if "fit equally" in said:
            said = "several layouts fit a folder of this tree equally; say which one by --layout"
        raise type(error)(said) from None


def _usable(folder: Path) -> Path:
    """Return a folder's absolute path. Raises CatalogError if it is none."""
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
    return folder


def ingest(
    database: Database,
    folder: Path | str,
    *,
    layout: str = "auto",
    options: Mapping[str, Any] = MappingProxyType({}),
    name: str | None = None,
    names: Pseudonyms | None = None,
    hashing: Hashing | None = None,
    retry: bool = False,
    jobs: int | None = None,
    executor: Executor | None = None,
    at_once: int = TASKS_AT_ONCE,
    progress: Progress = lambda done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> Summary:
    """Bring the catalog up to what lies below a folder, or a URL that fsspec knows (text with ://).

    Args:
        layout: A layout's name, or ``auto``.
        options: What the layout needs to know: a table, a pattern file, a reader.
        name: The root's name; by default the folder's.
        names: Makes what stands for patients, UIDs, paths and names; needed for a catalog that was begun with it, refused by others.
        hashing: ``full`` (for a folder) hashes pixels and files; ``head`` the first 64 KiB of each file, no pixels; ``none`` (for a URL,
            whose objects would be fetched whole) nothing. Without pixel hashes `catalog measure` makes them later; files of one UID are
            compared all the same.
        retry: Read everything again that could not be read, also what is damaged and did not change.
        jobs: Reading processes; by default one a core.
        executor: Where files are read instead of `jobs` processes of this machine; `at_once` tasks are in flight.
        progress: Called with (files read, files to read).
        say: Called with a line when something is being waited for.

    Raises:
        CatalogError: If the folder cannot be used, no layout fits, or the database refuses.
        UsageError: If the catalog is pseudonymized and `names` is missing or has another key, or the other way round.
    """
    begun = time.monotonic()
    asked = layout
    with _without_collector():
        layout, found = find(folder, asked, options, quiet=names is not None)
    hashing = hashing or ("none" if isinstance(folder, str) else "full")
    folder = folder.rstrip("/") if isinstance(folder, str) else folder.resolve()
    try:
        with database.connect(application_name="catalog ingest") as conn:
            conn.execute(files.STAGED)
            conn.execute(images.STAGED)
            conn.execute(pairings.WANTED)
            conn.execute(pairings.DRAWN_STAGED)
            root_id, url = _root(conn, str(folder), name, names)
            conn.commit()
            if _wait_alone(conn, root_id, say):
                # again, since the other one may have seen a later state of the tree
                layout, found = find(folder, asked, options, quiet=names is not None)
            if names is not None:
                names.bind(conn, str(folder))
                found = names.found(found, layout)
                conn.commit()
            summary = Summary(root=url, layout=layout, chosen=found.chosen, left_over=found.left_over)
            if not found.images and found.problems and layout in choosing.ASKED:
                # Else a table that cannot be read would make all of its files missing.
                raise CatalogError(f"{found.problems[0].path}: {found.problems[0].message}; nothing was changed")
            with Run(conn, root_id, layout, found, hashing, url, names) as run:
                wanted: dict[str, Image | Annotation] = {item.entry.path: item for item in found.images}
                wanted |= {item.entry.path: item for item in found.annotations}
                with _without_collector():
                    todo, gone = _differing(conn, run, wanted, again=retry)
                if names is not None:
                    todo = [names.items[item.entry.path] for item in todo]
                with contextlib.closing(
                    read_all(str(folder), todo, hashing=hashing, jobs=jobs, executor=executor, at_once=at_once, progress=progress)
                ) as results:
                    _ingest(conn, run, found, summary, wanted, results if names is None else map(names.result, results), gone)
            # The session, and its locks with it, ends a moment after it is closed: who comes right behind an ingest would be refused.
            conn.execute("SELECT pg_advisory_unlock(%s, %s)", [LOCK_CLASS, root_id])
    except psycopg.Error as error:
        raise explain(error, database) from error
    summary.seconds = round(time.monotonic() - begun, 3)
    return summary


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """Keep Python's cycle collector from looking at every file's objects again and again: 1.5–2 µs a file."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _differing(
    conn: psycopg.Connection[Any], run: Run, wanted: Mapping[str, Image | Annotation], *, again: bool
) -> tuple[list[Image | Annotation], dict[int, list[str]]]:
    """Return what is new or changed and must be read, and by size the paths of files that are not there any more."""
    rows = conn.execute("SELECT path, size, mtime_ns, state, read_as FROM file WHERE root_id = %s", [run.root_id], binary=True).fetchall()
    unreadable = dict(conn.execute(UNREADABLE, {"root": run.root_id, "all": again}).fetchall())
    gone: dict[int, list[str]] = {}
    same = set()
    for path, size, mtime_ns, state, read_as in rows:
        item = wanted.get(path)
        if item is None:
            if state != "missing":
                gone.setdefault(size, []).append(path)
        # An unreadable file whose flag a person closed is left in peace until it changes.
        elif (
            state != "missing"
            and path not in unreadable
            and (item.entry.size, item.entry.mtime_ns, item.read_as) == (size, mtime_ns, read_as)
        ):
            same.add(path)
        else:
            run.known.add(path)
    conn.commit()
    run.unreadable = unreadable
    return [item for path, item in wanted.items() if path not in same], gone


def _ingest(
    conn: psycopg.Connection[Any],
    run: Run,
    found: Found,
    summary: Summary,
    wanted: Mapping[str, Image | Annotation],
    results: Iterable[Result],
    gone: dict[int, list[str]],
) -> None:
    again = run.last_differs()
    if again or gone:
        run.id  # noqa: B018  a run of its own, also when all that changed is that something is gone
    while batch := list(islice(results, FILES_PER_COMMIT)):
        _write(conn, run, batch, gone, wanted)
        conn.commit()
        run.files_read += sum(not isinstance(result, NotPart) for result in batch)
        run.fell_back += sum(isinstance(result, Read) and result.fell_back for result in batch)
    missing = [path for paths in gone.values() for path in paths]
    if missing:
        files.mark_missing(conn, run.id, run.root_id, missing)
    summary.missing, summary.moved, summary.files_read, summary.fell_back = len(missing), run.moved, run.files_read, run.fell_back
    _write_originals(conn, found)
    if run.files_read:
        # An embedded server is seldom up long enough for autovacuum; without statistics a selection takes twice as long, and
        # the joins below are planned as if there were a handful of rows.
        conn.execute("ANALYZE patient, study, series, instance, image, file, location, annotation, flag")
    images.number_phases(conn)
    pairings.pair(conn, run, found.annotations, everything=again or bool(missing) or run.files_read > 0)
    conn.commit()
    pairings.make_masks(conn, run.root_id)
    if run.files_read:
        conn.execute("ANALYZE pairing, mask, shape, flag")
        overlaps.bring_up(conn, run.root_id)
    conn.commit()
    summary.standing_errors = run.note_standing()
    if run.names is not None:
        run.names.write_names(conn)
    conn.commit()
    _count(conn, run, summary)


def _root(conn: psycopg.Connection[Any], folder: str, name: str | None, names: Pseudonyms | None) -> tuple[int, str]:
    """Return the root's id, and its folder as the catalog has it; a new folder becomes a root.

    Raises:
        UsageError: If the catalog is pseudonymized by another key or not at all, or the other way round.
    """
    pseudonyms.agree(conn, names)
    row = _known_root(conn, folder, names)
    if row is None:  # root ids begin at 1, so this lock is that of making a root
        conn.execute("SELECT pg_advisory_xact_lock(%s, 0)", [LOCK_CLASS])
        if not pseudonyms.agree(conn, names) and names is not None:
            pseudonyms.begin(conn, names, person(None))
        row = _known_root(conn, folder, names)
    if row is not None:
        if name not in (None, row[1]):
            raise CatalogError(f"--name {name}: this folder is in the catalog already, as {row[1]}; leave --name out")
        return int(row[0]), row[2]
    # A folder's name may be a patient's.
    wanted = name or (folder.rpartition("/")[2] if names is None else "") or "root"
    taken = {taken for (taken,) in conn.execute("SELECT name FROM root WHERE starts_with(name, %s)", [wanted])}
    if name in taken:
        raise CatalogError(f"--name {name}: another root has this name; choose one that is free (see `catalog status`)")
    free = wanted if wanted not in taken else next(f"{wanted}-{n}" for n in range(2, len(taken) + 3) if f"{wanted}-{n}" not in taken)
    url = folder if names is None else names.root(free, folder)
    row = conn.execute("INSERT INTO root (name, url) VALUES (%s, %s) RETURNING id", [free, url]).fetchone()
    assert row is not None
    if names is not None:
        places.write_url(conn, int(row[0]), folder)
    return int(row[0]), url


def _known_root(conn: psycopg.Connection[Any], folder: str, names: Pseudonyms | None) -> tuple[int, str, str] | None:
    """Return a root's id, name and folder as the catalog has it."""
    if names is None:
        return conn.execute("SELECT id, name, url FROM root WHERE url = %s", [folder]).fetchone()
    ids = [root_id for root_id, url in places.urls(conn).items() if url == folder]
    return conn.execute("SELECT id, name, url FROM root WHERE id = ANY(%s)", [ids]).fetchone()


def _wait_alone(conn: psycopg.Connection[Any], root_id: int, say: Callable[[str], None]) -> bool:
    """Keep other ingests of this root out until the connection ends. Returns whether one had to be waited for."""
    waits = conn.execute("SELECT pg_try_advisory_lock(%s, %s)", [LOCK_CLASS, root_id]).fetchone() != (True,)
    if waits:
        say("another ingest of this root is running; waiting for it")
        conn.execute("SELECT pg_advisory_lock(%s, %s)", [LOCK_CLASS, root_id])
    conn.commit()
    return waits


def _write(
    conn: psycopg.Connection[Any],
    run: Run,
    results: Sequence[Result],
    gone: dict[int, list[str]],
    wanted: Mapping[str, Image | Annotation],
) -> None:
    results = _without_erased(conn, run, results)
    read = [result for result in results if isinstance(result, Read)]
    refused = [
        result
        for result in results
        if isinstance(result, Refused) and run.unreadable.get(result.entry.path) != f"{result.code}: {result.message}"
    ]
    if read or refused:
        moved = files.moved(conn, run.root_id, gone, read)
        run.moved += len(moved)
        run.known.update(moved.values())
        files.write(conn, run.id, run.root_id, [*read, *refused], wanted, run.known, run.names)
    if read:
        if with_rows := [result for result in read if result.rows]:
            images.write(conn, run.root_id, run.url, with_rows, run.known, None if run.names is None else run.names.where)
        pairings.write(conn, run.id, run.root_id, read)
    for file in read:
        if file.left_out:
            conn.execute(
                "INSERT INTO flag (rule, severity, detail, file_id, raised_by) SELECT 'FILE-LEFT-OUT', 'info', %s, id, 'ingest' "
                "FROM file WHERE root_id = %s AND path = %s ON CONFLICT DO NOTHING",
                ["; ".join(file.left_out)[:2_000], run.root_id, file.entry.path],
            )
    for result in refused:
        conn.execute(
            "INSERT INTO flag (rule, severity, detail, file_id, raised_by) "
            "SELECT 'FILE-UNREADABLE', 'error', %s, id, 'ingest' FROM file WHERE root_id = %s AND path = %s "
            "ON CONFLICT DO NOTHING",  # a person may have raised it before
            [f"{result.code}: {result.message}", run.root_id, result.entry.path],
        )
        run.refuse(result.entry.path, "read", result.code, result.message)
    if paths := [result.entry.path for result in refused]:
        images.settle(conn, run.root_id, paths)
        pairings.retire(conn, run.root_id, paths)
    # Perhaps there was an image in it once.
    if unfit := [result for result in results if isinstance(result, NotPart)]:
        files.write(conn, run.id, run.root_id, unfit, wanted, run.known, run.names)
        images.unplace(conn, run.root_id, [result.entry.path for result in unfit])


def _without_erased(conn: psycopg.Connection[Any], run: Run, results: Sequence[Result]) -> list[Result]:
    """Refuse what belongs to patients who were erased: their files may still lie there."""
    if conn.execute("SELECT EXISTS (SELECT FROM erasure)").fetchone() != (True,):
        return list(results)
    patients = erased.patients(conn, {result.patient for result in results if isinstance(result, Read) and result.rows})
    paths = erased.files(conn, run.root_id, [result.entry.path for result in results if isinstance(result, Read) and not result.rows])
    told = "its patient was erased from this catalog, so it is not taken in again; delete the file"
    return [
        Refused(result.entry, result.kind, result.format, "patient-erased", told)
        if isinstance(result, Read) and ((result.rows and result.patient in patients) or result.entry.path in paths)
        else result
        for result in results
    ]


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
