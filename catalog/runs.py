"""Runs of `catalog ingest`: what each brought, what it could not take in, going again, and taking it out."""

# ruff: noqa: S608  statements are put together from constants; values are parameters

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import psycopg
from psycopg.rows import dict_row

from catalog import erasing, places, roots
from catalog.database import Database
from catalog.errors import CatalogError, UsageError
from catalog.flags import transaction
from catalog.ingest import find
from catalog.ingest_run import STANDING
from catalog.layouts.choosing import ASKED
from catalog.pairings import RETIRED
from catalog.remote import is_url
from catalog.roots import LOCK_CLASS

# A run that says running while nobody holds its root's lock was killed.
RUN = f"""
SELECT i.id AS run, r.name AS root, r.url, i.layout, CASE WHEN i.state = 'running' AND NOT EXISTS (
           SELECT FROM pg_locks l WHERE l.locktype = 'advisory' AND l.classid::bigint = {LOCK_CLASS} AND l.objid::bigint = i.root_id
             AND l.objsubid = 2 AND l.granted AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
       ) THEN 'interrupted' ELSE i.state END AS state, i.started_at AS started, i.finished_at AS finished, i.files_seen, i.files_read,
       i.errors, i.hash, i.fell_back, i.undone_at AS undone, i.program_version, i.host
FROM ingest_run i JOIN root r ON r.id = i.root_id
"""
BROUGHT = """
SELECT (SELECT count(*) FROM file WHERE first_run_id = %(run)s) AS files,
       (SELECT count(DISTINCT l.image_id) FROM location l JOIN file f ON f.id = l.file_id WHERE f.first_run_id = %(run)s) AS images,
       (SELECT count(*) FROM annotation WHERE ingest_run_id = %(run)s) AS annotations
"""
ERRORS = """
SELECT stage, code, count(*) AS files, min(message) AS message, (array_agg(path ORDER BY path COLLATE "C"))[:3] AS paths
FROM ingest_error WHERE ingest_run_id = %(run)s GROUP BY stage, code ORDER BY count(*) DESC, stage, code
"""

# What to do, by code; messages say the same of each file in its own words.
REMEDIES = {
    "unreadable": "look at the file with another program; copy it again from where it came from",
    "truncated": "copy the file again from where it came from; it ends too early",
    "no-decoder": 'install the decoders: pip install "scanfeed[codecs]"',
    "not-dicom": "it has the name of an image and is none; remove it, or copy it again",
    "no-pixels": "nothing, if it should have no image",
    "file-unreadable": "give read access",
    "folder-unreadable": "give read access",
    "folder-link": "put the folder itself here, or ingest it as a root of its own",
    "name-not-utf8": "rename it",
    "path-too-long": "give it shorter names",
    "reader-died": "look at the file with another program",
    "pair-no-image": "`catalog pair list --state unpaired`; bring the image, or `catalog pair link`",
    "pair-ambiguous": "`catalog pair list`, `catalog show`, then `catalog pair accept`",
    "pair-grid": "`catalog pair list`, then accept or reject",
    "uid-conflict": "remove one of the files, or say which is right by a flag",
}


@dataclass(slots=True)
class Undone:
    """What undoing a run took out, or would; not `changed`: it was undone before."""

    run: int
    changed: bool
    at: datetime | None
    rows: dict[str, int] = field(default_factory=dict)  # by table
    restored: int = 0  # annotations of which the version before is current again
    decided: int = 0  # of the pairings those that a person had decided
    stay: int = 0  # files that were there before and that it read again: they stay as they are now


def listed(database: Database) -> list[dict[str, Any]]:
    """Return every run, oldest first."""
    with transaction(database) as conn, conn.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(f"{RUN} ORDER BY i.id".encode()).fetchall()


def errors(conn: psycopg.Connection[Any], run: int | None = None) -> list[tuple[int, str, str, str, str, str]]:
    """Return (run, root, path, stage, code, message) of what a run noted; without one of what stands now, with each root's last run.

    What people decided since the last run is out of it; what is wrong with a tree itself is as the last run found it.

    Raises:
        UsageError: If there is no such run.
    """
    noted = (
        "SELECT e.ingest_run_id, r.name, e.path, e.stage, e.code, e.message FROM ingest_error e "
        "JOIN ingest_run i ON i.id = e.ingest_run_id JOIN root r ON r.id = i.root_id WHERE e.ingest_run_id = %s"
    )
    if run is not None:
        if conn.execute("SELECT FROM ingest_run WHERE id = %s", [run]).fetchone() is None:
            raise _unknown(run)
        return conn.execute(f"{noted} ORDER BY e.id", [run]).fetchall()
    found: list[tuple[int, str, str, str, str, str]] = []
    last = "SELECT r.id, r.name, max(i.id) FROM root r JOIN ingest_run i ON i.root_id = r.id GROUP BY r.id ORDER BY r.id"
    for root_id, name, last_run in conn.execute(last).fetchall():
        found += conn.execute(f"{noted} AND e.stage = 'find' ORDER BY e.id", [last_run]).fetchall()
        found += [(last_run, name, *error) for error in conn.execute(STANDING, {"root": root_id}).fetchall()]
    return found


def shown(database: Database, run: int) -> dict[str, Any]:
    """Return a run, what is there of what it brought, and its errors grouped by code, each with a remedy.

    Raises:
        UsageError: If there is no such run.
    """
    with transaction(database) as conn, conn.cursor(row_factory=dict_row) as cursor:
        found = _run(cursor, run)
        brought = cursor.execute(BROUGHT, {"run": run}).fetchone()
        errors = cursor.execute(ERRORS, {"run": run}).fetchall()
    for error in errors:
        error["remedy"] = REMEDIES.get(error["code"]) or error["message"].rpartition("; ")[2]
    return {**found, "brought": brought, "by_code": errors}


def again(database: Database, run: int) -> tuple[str, str, str]:
    """Return (place, layout, hash) with which to ingest a run's root again: files that failed are tried again, others that differ.

    Raises:
        UsageError: If there is no such run.
        CatalogError: If it needs an option that is not kept.
    """
    with transaction(database) as conn, conn.cursor(row_factory=dict_row) as cursor:
        found = _run(cursor, run)
        where = cursor.execute("SELECT root_id FROM ingest_run WHERE id = %s", [run]).fetchone()
        hidden = places.urls(conn)
        url = hidden.get(where["root_id"] if where else 0, found["url"])
    layout = found["layout"]
    if layout in ASKED:
        raise CatalogError(f"run {run}: was read by --{layout}; say that again: catalog ingest FOLDER --{layout} …")
    return url, _layout(url, layout, quiet=bool(hidden)), found["hash"]


def _layout(place: str, layout: str, *, quiet: bool) -> str:
    """Return how to ask for the layout that a run had: by itself, unless it would be another one now."""
    if "+" in layout:  # several, each for its part, are what looking by itself gives
        return "auto"
    try:
        return "auto" if find(place if is_url(place) else Path(place), quiet=quiet)[0] == layout else layout
    except UsageError:
        return layout


# ------------------------------------------------------------------------------------------ undoing

# What the run brought: its files, the images that lie nowhere else, the annotations of these files, and new versions in older files.
# An image that had been there before, without a place, keeps its row.
OF_RUN = (
    "INSERT INTO gone_file SELECT id FROM file WHERE first_run_id = %(run)s",
    """
    INSERT INTO gone_image SELECT DISTINCT l.image_id FROM location l JOIN gone_file g ON g.id = l.file_id
    WHERE NOT EXISTS (SELECT FROM location o WHERE o.image_id = l.image_id AND o.file_id NOT IN (TABLE gone_file))
      AND NOT EXISTS (SELECT FROM pairing p WHERE p.image_id = l.image_id AND p.at < %(started)s)
    """,
    "INSERT INTO gone_annotation SELECT id FROM annotation WHERE ingest_run_id = %(run)s OR file_id IN (TABLE gone_file)",
    erasing.DERIVED,
)

# Each says how many, and why that forbids it. Of a started epoch the proof of what was fed hangs on its images.
AGAINST = {
    "{} of its images and annotations were fed, or are in the order of an epoch; `loaderd prune` drops orders of epochs that are over": """
        SELECT (SELECT count(DISTINCT s.id) FROM epoch e JOIN epoch_order o ON o.epoch_id = e.id
                CROSS JOIN unnest(o.sample_ids) AS s (id) JOIN gone_image g ON g.id = s.id WHERE e.started_at IS NOT NULL)
             + (SELECT count(DISTINCT s.id) FROM epoch e JOIN epoch_order o ON o.epoch_id = e.id
                CROSS JOIN unnest(o.annotation_ids) AS s (id) JOIN gone_annotation g ON g.id = s.id WHERE e.started_at IS NOT NULL)""",
    "what it brought is in {} of the samples of snapshots, which are never changed; see `catalog snapshot list`": (
        f"SELECT count(*) FROM ({erasing.IN_SNAPSHOTS}) AS s"
    ),
    "{} of its files were read again by later runs": """
        SELECT count(*) FROM file f JOIN gone_file g ON g.id = f.id
        WHERE f.ingest_run_id > %(run)s AND f.state <> 'missing' AND f.kind <> 'annotation'""",
    "{} of its annotations have newer versions by later runs; undo these runs first": """
        SELECT count(*) FROM gone_annotation g JOIN annotation a ON a.id = g.id AND a.ingest_run_id = %(run)s WHERE EXISTS (
            SELECT FROM annotation o WHERE o.file_id = a.file_id AND o.source_key = a.source_key AND o.ingest_run_id > %(run)s)""",
    "{} annotations that later runs brought are paired with its images; undo these runs first": """
        SELECT count(DISTINCT a.id) FROM pairing p JOIN gone_image g ON g.id = p.image_id JOIN annotation a ON a.id = p.annotation_id
        WHERE a.ingest_run_id > %(run)s AND a.id NOT IN (TABLE gone_annotation) AND p.state <> 'rejected'""",
    "{} open flags on it were raised by people; close them first (`catalog flag list`)": """
        SELECT count(*) FROM flag f LEFT JOIN pairing p ON p.id = f.pairing_id
        WHERE f.state = 'open' AND f.raised_by NOT IN ('ingest', 'loaderd', 'measure') AND (
            f.file_id IN (TABLE gone_file) OR coalesce(f.image_id, p.image_id) IN (TABLE gone_image)
            OR coalesce(f.annotation_id, p.annotation_id) IN (TABLE gone_annotation))""",
}

# Who asks for labels that nobody drew decides nothing about a pairing.
DECIDED = f"""
SELECT count(*) FROM pairing WHERE actor NOT LIKE 'layout:%%' AND id IN ({erasing.GONE_PAIRING})
    AND annotation_id NOT IN (SELECT annotation_id FROM derivation)
"""

# The version before is current again, and what was found about it is open again; its file must be read again, since it holds another.
# Not so of what nobody drew: that is made anew from what there is then.
READ = "gone_annotation WHERE id NOT IN (SELECT annotation_id FROM derivation)"
BEFORE = f"""
SELECT DISTINCT ON (a.file_id, a.source_key) a.id FROM annotation a
WHERE a.id NOT IN (TABLE gone_annotation) AND (a.file_id, a.source_key) IN (
    SELECT o.file_id, o.source_key FROM annotation o JOIN file f ON f.id = o.file_id
    WHERE o.id IN (SELECT id FROM {READ}) AND f.state = 'present' AND f.id NOT IN (TABLE gone_file))
ORDER BY a.file_id, a.source_key, a.version DESC
"""
OLDER = f"SELECT DISTINCT file_id FROM annotation WHERE id IN (SELECT id FROM {READ}) AND file_id NOT IN (TABLE gone_file)"
REOPEN = """
INSERT INTO flag (rule, rule_version, severity, detail, value, annotation_id, pairing_id, raised_by)
SELECT rule, rule_version, severity, detail, value, annotation_id, pairing_id, raised_by FROM (
    SELECT DISTINCT ON (f.rule, f.annotation_id, f.pairing_id) f.* FROM flag f LEFT JOIN pairing p ON p.id = f.pairing_id
    WHERE coalesce(f.annotation_id, p.annotation_id) = ANY(%s) ORDER BY f.rule, f.annotation_id, f.pairing_id, f.id DESC) AS newest
WHERE reason = %s ON CONFLICT DO NOTHING
"""
READ_AGAIN = """
UPDATE file SET mtime_ns = 0, content_hash = NULL,
    ingest_run_id = coalesce((SELECT max(a.ingest_run_id) FROM annotation a WHERE a.file_id = file.id), ingest_run_id) WHERE id = ANY(%s)
"""

# Rows above that are left empty, from below; one that a person flagged stays, and one that a pruned epoch or a frozen split names.
EMPTY = {
    "instance": "DELETE FROM instance n WHERE id = ANY(%(instances)s) AND NOT EXISTS (SELECT FROM image i WHERE i.instance_id = n.id) "
    "AND NOT EXISTS (SELECT FROM file f WHERE f.instance_id = n.id)",
    "series": "DELETE FROM series se WHERE id = ANY(%(series)s) AND NOT EXISTS (SELECT FROM instance n WHERE n.series_id = se.id) "
    "AND NOT EXISTS (SELECT FROM flag f WHERE f.series_id = se.id)",
    "study": "DELETE FROM study st WHERE id = ANY(%(studies)s) AND NOT EXISTS (SELECT FROM series se WHERE se.study_id = st.id) "
    "AND NOT EXISTS (SELECT FROM flag f WHERE f.study_id = st.id)",
    "patient": "DELETE FROM patient pt WHERE id = ANY(%(patients)s) AND NOT EXISTS (SELECT FROM study st WHERE st.patient_id = pt.id) "
    "AND NOT EXISTS (SELECT FROM flag f WHERE f.patient_id = pt.id) AND NOT EXISTS (SELECT FROM epoch e WHERE pt.id = ANY(e.patients)) "
    "AND pt.id NOT IN (SELECT sp.patient_id FROM split_patient sp JOIN split s ON s.id = sp.split_id WHERE s.frozen_at IS NOT NULL)",
}
ABOVE = """
SELECT array_agg(DISTINCT n.id), array_agg(DISTINCT se.id), array_agg(DISTINCT st.id), array_agg(DISTINCT st.patient_id)
FROM instance n JOIN series se ON se.id = n.series_id JOIN study st ON st.id = se.study_id
WHERE n.id IN (SELECT i.instance_id FROM gone_image g JOIN image i ON i.id = g.id
               UNION ALL SELECT f.instance_id FROM gone_file g JOIN file f ON f.id = g.id WHERE f.instance_id IS NOT NULL)
"""


def undo(database: Database, run: int, *, dry_run: bool = False) -> Undone:
    """Take out what a run brought, in one transaction. The next ingest of its root brings it again.

    Raises:
        UsageError: If there is no such run.
        CatalogError: If something of it was fed or later runs built on it, or an ingest of its root is running.
    """
    with transaction(database, dry_run=dry_run) as conn:
        row = conn.execute("SELECT root_id, started_at, undone_at FROM ingest_run WHERE id = %s FOR UPDATE", [run]).fetchone()
        if row is None:
            raise _unknown(run)
        root_id, started, undone_at = row
        if undone_at is not None:
            return Undone(run, changed=False, at=undone_at)
        roots.alone(conn, [root_id])
        conn.execute("LOCK TABLE epoch IN SHARE ROW EXCLUSIVE MODE")  # none begins with what goes meanwhile
        parameters = {"run": run, "started": started}
        for statement in (*erasing.GONE, *OF_RUN):
            conn.execute(statement, parameters)
        conn.execute(erasing.COUNT_GONE)
        against = [words.format(count) for words, query in AGAINST.items() if (count := _one(conn, query, parameters))]
        if against:
            raise CatalogError(f"run {run}: cannot be undone: {'; '.join(against)}; nothing was changed")
        undone = Undone(run, changed=True, at=None)
        undone.decided = _one(conn, DECIDED, parameters)
        undone.stay = _one(
            conn, "SELECT count(*) FROM file WHERE ingest_run_id = %(run)s AND first_run_id <> %(run)s AND kind <> 'annotation'", parameters
        )
        before = [one for (one,) in conn.execute(BEFORE.encode())]
        undone.restored = len(before)
        older = [one for (one,) in conn.execute(OLDER.encode())]
        above = conn.execute(ABOVE).fetchone() or (None,) * 4
        undone.rows = erasing.take_out(conn, dry_run=dry_run)
        _restore(conn, before, older, dry_run)
        ids = dict(zip(("instances", "series", "studies", "patients"), (one or [] for one in above), strict=True))
        for table, statement in EMPTY.items():
            undone.rows[table] = conn.execute(statement, ids).rowcount
        conn.execute("UPDATE ingest_run SET undone_at = now() WHERE id = %s", [run])
    return undone


def _restore(conn: psycopg.Connection[Any], before: Sequence[int], older: Sequence[int], dry_run: bool) -> None:
    if before:
        conn.execute("UPDATE annotation SET current = true WHERE id = ANY(%s)", [list(before)])
        if not dry_run:  # the numbers of inserted rows would be used up
            conn.execute(REOPEN, [list(before), RETIRED])
    if older:
        conn.execute(READ_AGAIN, [list(older)])


def _run(cursor: psycopg.Cursor[dict[str, Any]], run: int) -> dict[str, Any]:
    found = cursor.execute(f"{RUN} WHERE i.id = %s".encode(), [run]).fetchone()
    if found is None:
        raise _unknown(run)
    return found


def _unknown(run: int) -> UsageError:
    return UsageError(f"run {run}: there is no such run of `catalog ingest`; see `catalog runs list`")


def _one(conn: psycopg.Connection[Any], query: str, parameters: dict[str, Any]) -> int:
    row = conn.execute(query.encode(), parameters).fetchone()
    assert row is not None
    return int(row[0])
