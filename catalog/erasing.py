"""Taking rows out of the catalog for good, and erasing a patient: what is left is a number for what was lost.

Everything else in the catalog is kept when its file goes away; only `erase` and `catalog.runs.undo` delete. What is in a snapshot goes with
an erasure alone.

No message repeats the PatientID. Of an erased patient table `erasure` keeps a salted hash, by which an ingest knows the patient's files
again and refuses them. Orders and ledgers of epochs stay: numbers that stand for nothing any more.
"""

# ruff: noqa: S608  statements are put together from constants; values are parameters

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import psycopg
from psycopg.rows import class_row

from catalog import images, roots
from catalog.database import Database
from catalog.errors import CatalogError
from catalog.flags import SEEN, Seen, is_text, person, transaction, written

# What goes, for `take_out`: whoever fills these decides.
GONE = (
    "CREATE TEMP TABLE gone_image (id bigint PRIMARY KEY) ON COMMIT DROP",
    "CREATE TEMP TABLE gone_annotation (id bigint PRIMARY KEY) ON COMMIT DROP",
    "CREATE TEMP TABLE gone_file (id bigint PRIMARY KEY) ON COMMIT DROP",
)
# Fresh temporary tables have no statistics, and PostgreSQL takes them for large or small at random.
COUNT_GONE = "ANALYZE gone_image, gone_annotation, gone_file"

# A label that nobody drew goes with its image, and with what it was made from.
DERIVED = """
WITH RECURSIVE going AS (
    SELECT id FROM gone_annotation
    UNION
    SELECT d.annotation_id FROM derivation d JOIN pairing p ON p.annotation_id = d.annotation_id WHERE p.image_id IN (TABLE gone_image)
    UNION
    SELECT d.annotation_id FROM going g JOIN derivation d ON g.id IN (d.first_id, d.second_id)
)
INSERT INTO gone_annotation SELECT id FROM going ON CONFLICT DO NOTHING
"""

# In the order that references ask for. Masks and measures go with their pairings and images.
TAKE_OUT = {
    "pairing": "DELETE FROM pairing WHERE annotation_id IN (TABLE gone_annotation) OR image_id IN (TABLE gone_image)",
    "annotation": "DELETE FROM annotation WHERE id IN (TABLE gone_annotation)",
    "location": "DELETE FROM location WHERE image_id IN (TABLE gone_image) OR file_id IN (TABLE gone_file)",
    "file": "DELETE FROM file WHERE id IN (TABLE gone_file)",
    "image": "DELETE FROM image WHERE id IN (TABLE gone_image)",
}
GONE_PAIRING = "SELECT id FROM pairing WHERE annotation_id IN (TABLE gone_annotation) OR image_id IN (TABLE gone_image)"
FLAGS = f"""
DELETE FROM flag WHERE image_id IN (TABLE gone_image) OR annotation_id IN (TABLE gone_annotation) OR file_id IN (TABLE gone_file)
    OR pairing_id IN ({GONE_PAIRING})
"""
MASKS = f"SELECT count(*) FROM mask WHERE pairing_id IN ({GONE_PAIRING})"

# Images that stay and have the UID of one that goes, or its pixels where there is no UID; or that lie in a file that goes.
NEIGHBOURS = """
SELECT DISTINCT i.id FROM gone_image g JOIN image gi ON gi.id = g.id JOIN instance gn ON gn.id = gi.instance_id
JOIN instance n ON n.sop_instance_uid = gn.sop_instance_uid JOIN image i ON i.instance_id = n.id
WHERE gn.sop_instance_uid <> '' AND i.id NOT IN (TABLE gone_image)
UNION
SELECT i.id FROM gone_image g JOIN image gi ON gi.id = g.id JOIN instance gn ON gn.id = gi.instance_id
JOIN image i ON i.pixel_hash = gi.pixel_hash
WHERE gn.sop_instance_uid = '' AND i.id NOT IN (TABLE gone_image)
UNION
SELECT image_id FROM location WHERE file_id IN (TABLE gone_file) AND image_id NOT IN (TABLE gone_image)
"""
# Current annotations that stay and lose all that they were paired with.
WIDOWED = """
SELECT DISTINCT p.annotation_id FROM pairing p JOIN annotation a ON a.id = p.annotation_id AND a.current
WHERE p.image_id IN (TABLE gone_image) AND p.annotation_id NOT IN (TABLE gone_annotation) AND p.state <> 'rejected' AND NOT EXISTS (
    SELECT FROM pairing q WHERE q.annotation_id = p.annotation_id AND q.state <> 'rejected' AND q.image_id NOT IN (TABLE gone_image))
"""


def take_out(conn: psycopg.Connection[Any], *, dry_run: bool) -> dict[str, int]:
    """Delete the images, annotations and files of the temporary tables `GONE` with all that hangs on them; returns rows by table.

    What stays is brought in order: where images are read from, their sample keys, annotations that have no image any more. A dry run,
    which the caller rolls back, leaves that out, since it would use up numbers.
    """
    conn.execute(COUNT_GONE)
    stay = [image_id for (image_id,) in conn.execute(NEIGHBOURS)]
    widowed = [annotation_id for (annotation_id,) in conn.execute(WIDOWED)]
    masks = conn.execute(MASKS).fetchone()
    assert masks is not None
    counts = {"mask": masks[0], "flag": conn.execute(FLAGS).rowcount}
    for table, statement in TAKE_OUT.items():
        counts[table] = conn.execute(statement).rowcount
    if not dry_run:
        if stay:
            images.settle(conn, 0, [], stay)
        conn.cursor().executemany(
            "INSERT INTO flag (rule, severity, detail, annotation_id, raised_by) "
            "VALUES ('PAIR-NO-IMAGE', 'error', 'the image that it refers to is not in the catalog', %s, 'ingest') ON CONFLICT DO NOTHING",
            [[annotation_id] for annotation_id in widowed],
        )
    return counts


# ------------------------------------------------------------------------------------------ erasing a patient

# What folders of the patient's are called. Where a pseudonym stands for a folder's name it stands without P-.
FOLDERS = """
SELECT CASE WHEN EXISTS (SELECT FROM pseudonymization) THEN ARRAY[substr(patient_id, 3), substr(original_id, 3)]
            ELSE ARRAY[patient_id, original_id] END
FROM patient WHERE id = %(patient)s
"""

# An image of the patient; an annotation that is paired with such images alone, or lies in a DICOM object of the patient, or has no
# image and lies in a folder of the patient's name; a file that holds nothing else.
OF_PATIENT = (
    "CREATE TEMP TABLE gone_instance ON COMMIT DROP AS SELECT n.id FROM study st JOIN series se ON se.study_id = st.id "
    "JOIN instance n ON n.series_id = se.id WHERE st.patient_id = %(patient)s",
    "INSERT INTO gone_image SELECT id FROM image WHERE instance_id IN (TABLE gone_instance)",
    # A name that stands over images of others too says nothing.
    f"""
    CREATE TEMP TABLE named_file ON COMMIT DROP AS WITH named AS (
        SELECT f.id, f.root_id FROM file f
        WHERE string_to_array(f.path, '/') && ({FOLDERS}))
    SELECT id FROM named WHERE root_id NOT IN (
        SELECT o.root_id FROM named o JOIN location l ON l.file_id = o.id WHERE l.image_id NOT IN (TABLE gone_image))
    """,
    """
    INSERT INTO gone_annotation
    WITH touched AS (
        SELECT file_id, source_key FROM annotation WHERE file_id IN (TABLE named_file)
        UNION SELECT a.file_id, a.source_key FROM annotation a JOIN file f ON f.id = a.file_id WHERE f.instance_id IN (TABLE gone_instance)
        UNION SELECT a.file_id, a.source_key FROM pairing p JOIN annotation a ON a.id = p.annotation_id
            WHERE p.image_id IN (TABLE gone_image)
    ), counted AS (
        SELECT t.file_id, t.source_key, count(p.id) AS paired, count(p.id) FILTER (WHERE p.image_id IN (TABLE gone_image)) AS own
        FROM touched t JOIN annotation v USING (file_id, source_key) LEFT JOIN pairing p ON p.annotation_id = v.id AND p.state <> 'rejected'
        GROUP BY t.file_id, t.source_key
    )
    SELECT a.id FROM counted c JOIN annotation a USING (file_id, source_key) JOIN file f ON f.id = c.file_id
    WHERE f.instance_id IN (TABLE gone_instance) OR c.own = c.paired AND (c.own > 0 OR c.file_id IN (TABLE named_file))
    """,
    DERIVED,
    """
    INSERT INTO gone_file SELECT f.id FROM file f
    WHERE (f.id IN (SELECT file_id FROM location WHERE image_id IN (TABLE gone_image)) OR f.instance_id IN (TABLE gone_instance)
           OR f.id IN (SELECT file_id FROM annotation WHERE id IN (TABLE gone_annotation)) OR f.id IN (TABLE named_file))
      AND NOT EXISTS (SELECT FROM location l WHERE l.file_id = f.id AND l.image_id NOT IN (TABLE gone_image))
      AND NOT EXISTS (SELECT FROM annotation a WHERE a.file_id = f.id AND a.id NOT IN (TABLE gone_annotation))
      AND (f.instance_id IS NULL OR f.instance_id IN (TABLE gone_instance))
    """,
)

# What was refused of the patient's files, and folders of the patient's name, stand in the errors of ingests by their paths.
ERRORS = f"""
DELETE FROM ingest_error e USING ingest_run i
WHERE i.id = e.ingest_run_id AND ((i.root_id, e.path) IN (SELECT root_id, path FROM file WHERE id IN (TABLE gone_file))
    OR string_to_array(e.path, '/') && ({FOLDERS}))
"""

REST = {
    "instance": "DELETE FROM instance WHERE id IN (TABLE gone_instance)",
    "series": "DELETE FROM series se USING study st WHERE st.id = se.study_id AND st.patient_id = %(patient)s",
    "study": "DELETE FROM study WHERE patient_id = %(patient)s",
    "patient": "DELETE FROM patient WHERE id = %(patient)s",
}

FLAGS_ABOVE = """
DELETE FROM flag WHERE patient_id = %(patient)s OR study_id IN (SELECT id FROM study WHERE patient_id = %(patient)s)
    OR series_id IN (SELECT se.id FROM series se JOIN study st ON st.id = se.study_id WHERE st.patient_id = %(patient)s)
"""

# An annotation's file does not say whose it is, so the path that is refused is kept, as a hash.
NOTE = """
INSERT INTO erasure (actor, reason, salt, patient_sha256, file_sha256s, annotations, image_ids)
SELECT %(actor)s, %(reason)s, s.salt, sha256(s.salt || convert_to(%(name)s, 'UTF8')),
       ARRAY(SELECT sha256(s.salt || convert_to(f.root_id || '/' || f.path, 'UTF8')) FROM file f
             WHERE f.kind = 'annotation' AND f.id IN (TABLE gone_file) ORDER BY 1),
       (SELECT count(*) FROM gone_annotation), ARRAY(SELECT id FROM gone_image ORDER BY id)
FROM (SELECT uuid_send(gen_random_uuid()) AS salt) AS s RETURNING id
"""
# In a dry run: its number is not taken from those that are given out once.
NOTE_NOTHING = """
INSERT INTO erasure (id, actor, reason, salt, patient_sha256, file_sha256s, annotations, image_ids)
OVERRIDING SYSTEM VALUE VALUES (0, '', '', uuid_send(gen_random_uuid()), sha256(''), '{}', 0, '{}') RETURNING id
"""
ERASED = "SELECT id, at, actor FROM erasure WHERE patient_sha256 = sha256(salt || convert_to(%s, 'UTF8')) ORDER BY id DESC LIMIT 1"

# Of a sample that loses its image, or something drawn on it, a snapshot keeps the digest alone.
IN_SNAPSHOTS = f"""
SELECT snapshot_id, number FROM snapshot_sample WHERE image_id IN (TABLE gone_image)
UNION SELECT snapshot_id, number FROM snapshot_mask WHERE pairing_id IN ({GONE_PAIRING})
"""
FROM_SNAPSHOTS = (
    f"CREATE TEMP TABLE gone_sample ON COMMIT DROP AS {IN_SNAPSHOTS}",
    "UPDATE snapshot_sample SET erasure_id = %(erasure)s, image_id = NULL, sample_key = NULL "
    "WHERE (snapshot_id, number) IN (TABLE gone_sample)",
    "DELETE FROM snapshot_mask WHERE (snapshot_id, number) IN (TABLE gone_sample)",
)
BY_SNAPSHOT = "SELECT s.name, count(*) FROM gone_sample JOIN snapshot s ON s.id = snapshot_id GROUP BY s.id ORDER BY s.id"


@dataclass(slots=True)
class Erased:
    """What erasing a patient took out; not `changed`: the patient had been erased before."""

    id: int | None  # of table erasure; None in a dry run
    changed: bool
    at: datetime | None = None
    actor: str = ""
    rows: dict[str, int] = field(default_factory=dict)  # by table
    kept_files: int = 0  # in which something of another patient lies, too
    seen: list[Seen] = field(default_factory=list)  # runs that were fed some of it
    snapshots: dict[str, int] = field(default_factory=dict)  # samples taken out, by the snapshot's name


def erase(database: Database, patient: str, *, reason: str, actor: str | None = None, dry_run: bool = False) -> Erased:
    """Delete all that the catalog holds of a patient, for good. Files stay where they are; an ingest refuses them from now on.

    Raises:
        CatalogError: If there is no such patient, or an ingest of one of the patient's roots is running.
    """
    reason, actor = written(reason, "--reason"), person(actor)
    with transaction(database, dry_run=dry_run) as conn:
        row = conn.execute("SELECT id FROM patient WHERE patient_id = %s FOR UPDATE", [patient]).fetchone() if is_text(patient) else None
        if row is None:
            before = conn.execute(ERASED, [patient]).fetchone() if is_text(patient) else None
            if before is None:
                raise CatalogError("no such patient in the catalog, so nothing was done; the view image_all has what there is")
            return Erased(before[0], changed=False, at=before[1], actor=before[2])
        parameters: dict[str, Any] = {"patient": row[0], "name": patient, "actor": actor, "reason": reason}
        # All roots, since any of them may hold files of the patient that are not catalogued yet.
        roots.alone(conn, [root_id for (root_id,) in conn.execute("SELECT id FROM root")])
        for statement in (*GONE, *OF_PATIENT):
            conn.execute(statement.encode(), parameters)
        erased = Erased(None, changed=True, actor=actor)
        with conn.cursor(row_factory=class_row(Seen)) as cursor:
            erased.seen = cursor.execute(SEEN, {"images": [one for (one,) in conn.execute("TABLE gone_image")]}).fetchall()
        kept = conn.execute(
            "SELECT count(DISTINCT file_id) FROM location WHERE image_id IN (TABLE gone_image) AND file_id NOT IN (TABLE gone_file)"
        ).fetchone()
        assert kept is not None
        erased.kept_files = kept[0]
        note = conn.execute((NOTE_NOTHING if dry_run else NOTE).encode(), parameters).fetchone()
        assert note is not None
        erased.id = None if dry_run else note[0]
        for statement in FROM_SNAPSHOTS:
            conn.execute(statement.encode(), {"erasure": note[0]})
        erased.snapshots = dict(conn.execute(BY_SNAPSHOT).fetchall())
        errors = conn.execute(ERRORS.encode(), parameters).rowcount
        # Rows of patients that stay may be named by flags of the levels above alone.
        above = conn.execute(FLAGS_ABOVE, parameters).rowcount
        erased.rows = take_out(conn, dry_run=dry_run)
        erased.rows["flag"] += above
        erased.rows["ingest_error"] = errors
        for table, statement in REST.items():
            erased.rows[table] = conn.execute(statement, parameters).rowcount
    if not dry_run:
        _forget_dead_rows(database)
    return erased


def _forget_dead_rows(database: Database) -> None:
    """Let deleted rows be written over; until then they lie in the server's files. Who holds them up still is no reason to fail."""
    with contextlib.suppress(psycopg.Error), database.connect(autocommit=True) as conn:
        others = ("measure", "mask", "shape", "flag", "ingest_error", "snapshot_sample", "snapshot_mask")
        conn.execute(f"VACUUM (SKIP_LOCKED) {', '.join((*TAKE_OUT, *REST, *others))}".encode())
