"""What was read from image files → rows of the four DICOM levels, images and locations.

Rows come by COPY into a temporary table and go on from there by statements over the whole batch (ORM ``add_all`` wrote 2,900 rows/s
where this writes 41,000). Each statement may be repeated: what is there already stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import psycopg

from catalog.reading import ReadImage

STAGED = """
CREATE TEMP TABLE IF NOT EXISTS staged (
    path text, size bigint, mtime_ns bigint, patient text, study_instance_uid text, study_date text, series_instance_uid text,
    series_number integer, modality text, sop_instance_uid text, sop_class_uid text, instance_number integer,
    number_of_frames integer, images_in_acquisition integer, content_hash bytea, transfer_syntax_uid text, frame integer,
    rows integer, columns integer, samples_per_pixel smallint, photometric text, row_spacing float8, column_spacing float8,
    image_position float8[], image_orientation float8[], position float8, slice_thickness real, trigger_time float8,
    slope float8, intercept float8, pixel_hash bytea, byte_offset bigint, byte_length bigint, dtype text
) ON COMMIT DELETE ROWS
"""

# The four levels by their natural keys; the unique indexes make each join a look-up.
STAGED_INSTANCES = """
staged s
JOIN patient pt ON pt.patient_id = s.patient
JOIN study st ON st.patient_id = pt.id AND st.study_instance_uid = s.study_instance_uid
JOIN series se ON se.study_id = st.id AND se.series_instance_uid = s.series_instance_uid
JOIN instance ins ON ins.series_id = se.id AND ins.sop_instance_uid = s.sop_instance_uid AND ins.content_hash = s.content_hash
"""
STAGED_IMAGES = STAGED_INSTANCES + "JOIN image i ON i.instance_id = ins.id AND i.frame = s.frame\n"
STAGED_FILES = "JOIN file f ON f.root_id = %(root)s AND f.path = s.path\n"

WRITE: tuple[str, ...] = (
    """
    INSERT INTO patient (patient_id) SELECT DISTINCT patient FROM staged ORDER BY 1 ON CONFLICT DO NOTHING
    """,
    """
    INSERT INTO study (patient_id, study_instance_uid, study_date)
    SELECT DISTINCT ON (pt.id, s.study_instance_uid) pt.id, s.study_instance_uid, s.study_date
    FROM staged s JOIN patient pt ON pt.patient_id = s.patient ORDER BY 1, 2, s.path ON CONFLICT DO NOTHING
    """,
    """
    INSERT INTO series (study_id, series_instance_uid, series_number, modality)
    SELECT DISTINCT ON (st.id, s.series_instance_uid) st.id, s.series_instance_uid, s.series_number, s.modality
    FROM staged s JOIN patient pt ON pt.patient_id = s.patient
    JOIN study st ON st.patient_id = pt.id AND st.study_instance_uid = s.study_instance_uid ORDER BY 1, 2, s.path ON CONFLICT DO NOTHING
    """,
    """
    INSERT INTO instance (series_id, sop_instance_uid, sop_class_uid, instance_number, number_of_frames, images_in_acquisition,
        content_hash)
    SELECT DISTINCT ON (se.id, s.sop_instance_uid, s.content_hash)
        se.id, s.sop_instance_uid, s.sop_class_uid, s.instance_number, s.number_of_frames, s.images_in_acquisition, s.content_hash
    FROM staged s JOIN patient pt ON pt.patient_id = s.patient
    JOIN study st ON st.patient_id = pt.id AND st.study_instance_uid = s.study_instance_uid
    JOIN series se ON se.study_id = st.id AND se.series_instance_uid = s.series_instance_uid
    ORDER BY se.id, s.sop_instance_uid, s.content_hash, s.path ON CONFLICT DO NOTHING
    """,
    """
    INSERT INTO file (root_id, path, kind, size, mtime_ns, state, ingest_run_id)
    SELECT DISTINCT ON (path) %(root)s, path, 'image', size, mtime_ns, 'present', %(run)s FROM staged ORDER BY path
    ON CONFLICT (root_id, path) DO UPDATE SET size = excluded.size, mtime_ns = excluded.mtime_ns, state = 'present',
        ingest_run_id = excluded.ingest_run_id
    """,
    # A UID that is missing or that several contents claim gets its key below, when all of them are known.
    f"""
    INSERT INTO image (instance_id, frame, rows, columns, samples_per_pixel, photometric, row_spacing, column_spacing, image_position,
        image_orientation, position, slice_thickness, trigger_time, slope, intercept, pixel_hash, sample_key)
    SELECT DISTINCT ON (ins.id, s.frame) ins.id, s.frame, s.rows, s.columns, s.samples_per_pixel, s.photometric, s.row_spacing,
        s.column_spacing, s.image_position, s.image_orientation, s.position, s.slice_thickness, s.trigger_time, s.slope, s.intercept,
        s.pixel_hash,
        CASE WHEN s.sop_instance_uid = ''
                  OR EXISTS (SELECT FROM instance o WHERE o.sop_instance_uid = s.sop_instance_uid AND o.id <> ins.id)
             THEN gen_random_uuid() ELSE sample_key(s.sop_instance_uid, s.frame) END
    FROM {STAGED_INSTANCES} ORDER BY ins.id, s.frame, s.path ON CONFLICT (instance_id, frame) DO NOTHING
    """,
    # A file that was replaced no longer holds what it held. What it held stays, without a place, with what was drawn on it.
    f"""
    WITH gone AS (
        DELETE FROM location l USING file f
        WHERE l.file_id = f.id AND f.root_id = %(root)s AND f.path IN (SELECT path FROM staged)
          AND (l.image_id, l.file_id) NOT IN (
              SELECT i.id, g.id FROM {STAGED_IMAGES} JOIN file g ON g.root_id = %(root)s AND g.path = s.path)
        RETURNING l.file_id
    )
    INSERT INTO flag (rule, severity, detail, file_id, raised_by)
    SELECT DISTINCT 'FILE-CHANGED', 'warning', 'other pixels lie under this path than before', file_id, 'ingest' FROM gone
    ON CONFLICT DO NOTHING
    """,
    f"""
    INSERT INTO location (image_id, file_id, byte_offset, byte_length, dtype, transfer_syntax_uid, preferred)
    SELECT i.id, f.id, s.byte_offset, s.byte_length, s.dtype, s.transfer_syntax_uid,
        row_number() OVER (PARTITION BY i.id ORDER BY s.byte_offset IS NULL, f.id) = 1
        AND NOT EXISTS (SELECT FROM location p WHERE p.image_id = i.id AND p.preferred)
    FROM {STAGED_IMAGES} {STAGED_FILES}
    ON CONFLICT (image_id, file_id) DO UPDATE SET byte_offset = excluded.byte_offset, byte_length = excluded.byte_length,
        dtype = excluded.dtype, transfer_syntax_uid = excluded.transfer_syntax_uid
    """,
    # A header that was corrected in place, around the same pixels.
    f"""
    UPDATE image SET row_spacing = s.row_spacing, column_spacing = s.column_spacing, image_position = s.image_position,
        image_orientation = s.image_orientation, position = s.position, slice_thickness = s.slice_thickness,
        trigger_time = s.trigger_time, slope = s.slope, intercept = s.intercept, phase = NULL
    FROM {STAGED_IMAGES} {STAGED_FILES} JOIN location l ON l.image_id = i.id AND l.file_id = f.id AND l.preferred
    WHERE image.id = i.id AND
        (i.row_spacing, i.column_spacing, i.image_position, i.image_orientation, i.position, i.slice_thickness, i.trigger_time, i.slope,
         i.intercept) IS DISTINCT FROM
        (s.row_spacing, s.column_spacing, s.image_position, s.image_orientation, s.position, s.slice_thickness, s.trigger_time, s.slope,
         s.intercept)
    """,
    """
    WITH tied AS (
        SELECT i.id, ins.sop_instance_uid AS uid, i.frame, i.pixel_hash,
               (SELECT min(f.path) FROM location l JOIN file f ON f.id = l.file_id WHERE l.image_id = i.id) AS path,
               count(*) OVER (PARTITION BY ins.sop_instance_uid, i.frame, i.pixel_hash) > 1 AS same_pixels
        FROM instance ins JOIN image i ON i.instance_id = ins.id
        WHERE ins.sop_instance_uid IN (
            SELECT s.sop_instance_uid FROM (SELECT DISTINCT sop_instance_uid FROM staged) s
            WHERE s.sop_instance_uid = ''
               OR (SELECT count(*) FROM instance o WHERE o.sop_instance_uid = s.sop_instance_uid) > 1)
    ), keyed AS (
        SELECT id, CASE WHEN same_pixels THEN sample_key(uid, frame, pixel_hash, coalesce(path, id::text))
                        ELSE sample_key(uid, frame, pixel_hash) END AS sample_key FROM tied
    )
    UPDATE image SET sample_key = keyed.sample_key FROM keyed WHERE image.id = keyed.id AND image.sample_key <> keyed.sample_key
    """,
    """
    INSERT INTO flag (rule, severity, detail, image_id, raised_by)
    SELECT DISTINCT 'UID-CONFLICT', 'error', 'another file has this SOPInstanceUID (0008,0018) and other pixels', i.id, 'ingest'
    FROM staged s JOIN instance o ON o.sop_instance_uid = s.sop_instance_uid JOIN image i ON i.instance_id = o.id
    WHERE s.sop_instance_uid <> '' AND EXISTS (
        SELECT FROM instance p JOIN image j ON j.instance_id = p.id
        WHERE p.sop_instance_uid = s.sop_instance_uid AND j.frame = i.frame AND j.pixel_hash <> i.pixel_hash)
    ON CONFLICT DO NOTHING
    """,
    """
    INSERT INTO flag (rule, severity, detail, file_id, raised_by)
    SELECT 'PATIENT-DIFFERS', 'warning', 'PatientID (0010,0020) differs from the folder''s name; the folder''s is used', f.id, 'ingest'
    FROM file f WHERE f.root_id = %(root)s AND f.path = ANY(%(other)s) ON CONFLICT DO NOTHING
    """,
)


def write(conn: psycopg.Connection[Any], run_id: int, root_id: int, read: Sequence[ReadImage]) -> None:
    """Write what these files hold, in the caller's transaction."""
    with conn.cursor().copy("COPY staged FROM STDIN") as copy:
        for file in read:
            for row in file.rows:
                copy.write_row(row)
    paths = [file.entry.path for file in read]
    parameters = {
        "root": root_id,
        "run": run_id,
        "paths": paths,
        "other": [file.entry.path for file in read if file.other_patient],
    }
    close_file_flags(conn, root_id, paths)
    for statement in WRITE:
        conn.execute(statement, parameters)
    prefer(conn, root_id, paths)


def close_file_flags(conn: psycopg.Connection[Any], root_id: int, paths: Sequence[str]) -> None:
    """Close what was found about these files when they were last read, by an ingest or at feed time."""
    conn.execute(
        "UPDATE flag g SET state = 'resolved', closed_by = 'ingest', closed_at = now(), reason = 'the file was read again' "
        "FROM file f WHERE g.file_id = f.id AND f.root_id = %s AND f.path = ANY(%s) "
        "AND g.state = 'open' AND g.raised_by IN ('ingest', 'loaderd')",
        [root_id, list(paths)],
    )


def prefer(conn: psycopg.Connection[Any], root_id: int, paths: Sequence[str]) -> None:
    """Choose again where the images in these files are read from: a present file, by offset where there is one."""
    parameters = {"root": root_id, "paths": list(paths)}
    ranked = """
        WITH touched AS (
            SELECT DISTINCT l.image_id FROM location l JOIN file f ON f.id = l.file_id
            WHERE f.root_id = %(root)s AND f.path = ANY(%(paths)s)
        ), ranked AS (
            SELECT l.image_id, l.file_id, f.state = 'present' AND row_number() OVER (
                PARTITION BY l.image_id ORDER BY f.state <> 'present', l.byte_offset IS NULL, f.id) = 1 AS best
            FROM touched t JOIN location l ON l.image_id = t.image_id JOIN file f ON f.id = l.file_id
        )
        UPDATE location SET preferred = best FROM ranked
        WHERE location.image_id = ranked.image_id AND location.file_id = ranked.file_id AND location.preferred <> best AND
    """
    # First the old ones down, then the new ones up: the index allows one at a time.
    conn.execute(ranked + "NOT best", parameters)
    conn.execute(ranked + "best", parameters)


def number_phases(conn: psycopg.Connection[Any]) -> None:
    """Number the phases of each series with an image that has none: by trigger time at the same position (to 0.01 mm)."""
    conn.execute(
        """
        WITH ranked AS (
            SELECT i.id, dense_rank() OVER (PARTITION BY ins.series_id, round(i.position * 100) ORDER BY i.trigger_time) - 1 AS phase
            FROM instance ins JOIN image i ON i.instance_id = ins.id
            WHERE i.trigger_time IS NOT NULL AND i.position IS NOT NULL AND ins.series_id IN (
                SELECT n.series_id FROM image m JOIN instance n ON n.id = m.instance_id
                WHERE m.phase IS NULL AND m.trigger_time IS NOT NULL AND m.position IS NOT NULL)
        )
        UPDATE image SET phase = ranked.phase FROM ranked WHERE image.id = ranked.id AND image.phase IS DISTINCT FROM ranked.phase
        """
    )
    conn.commit()
