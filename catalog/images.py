"""What was read from image files → rows of the four DICOM levels, images and locations.

Rows come by COPY into a temporary table and go on from there by statements over the whole batch (ORM ``add_all`` wrote 2,900 rows/s
where this writes 41,000). Each statement may be repeated: what is there already stays as it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import psycopg

from catalog import dicom
from catalog.errors import FileError
from catalog.reading import Read

STAGED = """
CREATE TEMP TABLE IF NOT EXISTS staged (
    path text, patient text, study_instance_uid text, study_date text, series_instance_uid text,
    series_number integer, modality text, sop_instance_uid text, sop_class_uid text, instance_number integer,
    number_of_frames integer, images_in_acquisition integer, content_hash bytea, frame_of_reference_uid text, transfer_syntax_uid text,
    coding text, burned_in_annotation text, identity_removed text, over_89 boolean, identifying text[], gantry_tilt float8,
    other_meta_uid boolean, surplus_bytes bigint, frame integer, rows integer, columns integer, samples_per_pixel smallint,
    photometric text, row_spacing float8, column_spacing float8, image_position float8[], image_orientation float8[], position float8,
    slice_thickness real, trigger_time float8, slope float8, intercept float8, modality_lut boolean, pixel_hash bytea, byte_offset bigint,
    byte_length bigint, dtype text, bits_stored smallint
) ON COMMIT DELETE ROWS
"""

# The four levels by their natural keys; the unique indexes make each join a look-up.
STAGED_INSTANCES = """
staged s
JOIN patient pt ON pt.patient_id = s.patient
JOIN study st ON st.patient_id = pt.id AND st.study_instance_uid = s.study_instance_uid
JOIN series se ON se.study_id = st.id AND se.series_instance_uid = s.series_instance_uid
JOIN instance ins ON ins.series_id = se.id AND ins.sop_instance_uid = s.sop_instance_uid
    AND ins.content_hash IS NOT DISTINCT FROM s.content_hash
"""
STAGED_IMAGES = STAGED_INSTANCES + "JOIN image i ON i.instance_id = ins.id AND i.frame = s.frame\n"
STAGED_FILES = "JOIN file f ON f.root_id = %(root)s AND f.path = s.path\n"

# What a header says of its object as a whole, and may say differently once it was corrected in place.
SAID = (
    "sop_class_uid", "instance_number", "images_in_acquisition", "frame_of_reference_uid", "burned_in_annotation", "identity_removed",
    "over_89", "identifying", "gantry_tilt", "other_meta_uid", "surplus_bytes",
)  # fmt: skip
INS_SAID, S_SAID = (", ".join(f"{source}.{name}" for name in SAID) for source in ("ins", "s"))

INSTANCES = f"""
INSERT INTO instance (series_id, sop_instance_uid, number_of_frames, content_hash, {", ".join(SAID)})
SELECT DISTINCT ON (se.id, s.sop_instance_uid, s.content_hash)
    se.id, s.sop_instance_uid, s.number_of_frames, s.content_hash, {S_SAID}
FROM staged s JOIN patient pt ON pt.patient_id = s.patient
JOIN study st ON st.patient_id = pt.id AND st.study_instance_uid = s.study_instance_uid
JOIN series se ON se.study_id = st.id AND se.series_instance_uid = s.series_instance_uid
ORDER BY se.id, s.sop_instance_uid, s.content_hash, s.path ON CONFLICT DO NOTHING
"""

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
    INSTANCES,
    # A UID that is missing or that several contents claim gets its key below, when all of them are known.
    f"""
    INSERT INTO image (instance_id, frame, rows, columns, samples_per_pixel, photometric, row_spacing, column_spacing, image_position,
        image_orientation, position, slice_thickness, trigger_time, slope, intercept, modality_lut, pixel_hash, phase,
        sample_key)
    SELECT DISTINCT ON (ins.id, s.frame) ins.id, s.frame, s.rows, s.columns, s.samples_per_pixel, s.photometric, s.row_spacing,
        s.column_spacing, s.image_position, s.image_orientation, s.position, s.slice_thickness, s.trigger_time, s.slope, s.intercept,
        s.modality_lut, s.pixel_hash,
        -- Of a series that is new. One that a batch's end cuts is numbered by `number_phases`, as one that grows. Numbering all of them
        -- behind their rows doubled the table: 1,330 bytes an image of file, image and location, 888 so.
        CASE WHEN s.trigger_time IS NOT NULL AND s.position IS NOT NULL AND NOT ins.series_id = ANY(%(grown)s)
             THEN dense_rank() OVER (PARTITION BY ins.series_id, round(s.position * 100) ORDER BY s.trigger_time) - 1 END,
        CASE WHEN s.sop_instance_uid = ''
                  OR EXISTS (SELECT FROM instance o WHERE o.sop_instance_uid = s.sop_instance_uid AND o.id <> ins.id)
             THEN gen_random_uuid() ELSE sample_key(s.sop_instance_uid, s.frame) END
    FROM {STAGED_INSTANCES} WHERE s.frame IS NOT NULL ORDER BY ins.id, s.frame, s.path ON CONFLICT (instance_id, frame) DO NOTHING
    """,
    f"""
    INSERT INTO location (image_id, file_id, byte_offset, byte_length, dtype, bits_stored, transfer_syntax_uid, coding, preferred)
    SELECT i.id, f.id, s.byte_offset, s.byte_length, s.dtype, s.bits_stored, s.transfer_syntax_uid, s.coding,
        row_number() OVER (PARTITION BY i.id ORDER BY s.byte_offset IS NULL, f.path COLLATE "C") = 1
        AND NOT EXISTS (SELECT FROM location p WHERE p.image_id = i.id AND p.preferred)
    FROM {STAGED_IMAGES} {STAGED_FILES} ORDER BY f.id
    ON CONFLICT (image_id, file_id) DO UPDATE SET byte_offset = excluded.byte_offset, byte_length = excluded.byte_length,
        dtype = excluded.dtype, bits_stored = excluded.bits_stored,
        transfer_syntax_uid = excluded.transfer_syntax_uid, coding = excluded.coding
    """,
    """
    INSERT INTO flag (rule, severity, detail, file_id, raised_by)
    SELECT 'PATIENT-DIFFERS', 'warning', 'PatientID (0010,0020) differs from the folder''s name; the folder''s is used', f.id, 'ingest'
    FROM file f WHERE f.root_id = %(root)s AND f.path = ANY(%(other)s) ON CONFLICT DO NOTHING
    """,
)


# Does one of these instances share its UID, or have none?
SHARED = """
SELECT EXISTS (
    SELECT FROM (SELECT DISTINCT sop_instance_uid FROM staged) s
    WHERE s.sop_instance_uid = '' OR (SELECT count(*) FROM instance o WHERE o.sop_instance_uid = s.sop_instance_uid) > 1)
"""

# Series that have images already.
GROWN = """
SELECT se.id FROM (SELECT DISTINCT patient, study_instance_uid, series_instance_uid FROM staged) s
JOIN patient pt ON pt.patient_id = s.patient JOIN study st ON st.patient_id = pt.id AND st.study_instance_uid = s.study_instance_uid
JOIN series se ON se.study_id = st.id AND se.series_instance_uid = s.series_instance_uid
WHERE EXISTS (SELECT FROM instance n WHERE n.series_id = se.id)
"""

OBJECTS = f"""
UPDATE file SET instance_id = o.instance_id
FROM (SELECT f.id, min(ins.id) FILTER (WHERE s.frame IS NULL) AS instance_id FROM {STAGED_INSTANCES} {STAGED_FILES} GROUP BY f.id) o
WHERE file.id = o.id AND file.instance_id IS DISTINCT FROM o.instance_id
"""

# A header that was corrected in place around the same pixels; of several files with one image, the one it is read from counts.
CORRECT: tuple[str, ...] = (
    f"""
    UPDATE image SET row_spacing = s.row_spacing, column_spacing = s.column_spacing, image_position = s.image_position,
        image_orientation = s.image_orientation, position = s.position, slice_thickness = s.slice_thickness,
        trigger_time = s.trigger_time, slope = s.slope, intercept = s.intercept,
        modality_lut = s.modality_lut, phase = NULL
    FROM {STAGED_IMAGES} {STAGED_FILES} JOIN location l ON l.image_id = i.id AND l.file_id = f.id AND l.preferred
    WHERE image.id = i.id AND
        (i.row_spacing, i.column_spacing, i.image_position, i.image_orientation, i.position, i.slice_thickness, i.trigger_time, i.slope,
         i.intercept, i.modality_lut) IS DISTINCT FROM
        (s.row_spacing, s.column_spacing, s.image_position, s.image_orientation, s.position, s.slice_thickness, s.trigger_time, s.slope,
         s.intercept, s.modality_lut)
    """,
    f"""
    UPDATE instance SET {", ".join(f"{name} = s.{name}" for name in SAID)}
    FROM {STAGED_IMAGES} {STAGED_FILES} JOIN location l ON l.image_id = i.id AND l.file_id = f.id AND l.preferred
    WHERE instance.id = ins.id AND s.frame = 0 AND ({INS_SAID}) IS DISTINCT FROM ({S_SAID})
    """,
    # An object without images has one file, or several that say the same.
    f"""
    UPDATE instance SET {", ".join(f"{name} = s.{name}" for name in SAID)}
    FROM {STAGED_INSTANCES} {STAGED_FILES}
    WHERE instance.id = ins.id AND s.frame IS NULL AND f.instance_id = ins.id AND ({INS_SAID}) IS DISTINCT FROM ({S_SAID})
    """,
)

# What a file held before it was replaced stays, without a place, with what was drawn on it.
UNPLACE = f"""
DELETE FROM location l USING file f
WHERE l.file_id = f.id AND f.root_id = %(root)s AND f.path = ANY(%(paths)s)
  AND (l.image_id, l.file_id) NOT IN (SELECT i.id, g.id FROM {STAGED_IMAGES} JOIN file g ON g.root_id = %(root)s AND g.path = s.path)
RETURNING l.image_id, l.file_id
"""

FILE_CHANGED = """
INSERT INTO flag (rule, severity, detail, file_id, raised_by)
SELECT DISTINCT 'FILE-CHANGED', 'warning', 'other pixels lie under this path than before', g.file_id, 'ingest'
FROM unnest(%(images)s::bigint[], %(files)s::bigint[]) AS g (image_id, file_id) JOIN image o ON o.id = g.image_id
WHERE NOT EXISTS (
    SELECT FROM location l JOIN image i ON i.id = l.image_id
    WHERE l.file_id = g.file_id AND i.frame = o.frame AND i.pixel_hash = o.pixel_hash)
ON CONFLICT DO NOTHING
"""


# One UID, and nothing is known of the pixels: they are looked at now, and those of images without a UID, which nothing else tells
# apart. A file that is read again under its own path is no second one.
UNCOMPARED = """
SELECT DISTINCT s.path, s.sop_instance_uid FROM staged s
WHERE s.content_hash IS NULL AND s.frame = 0 AND (
    s.sop_instance_uid = ''
    OR s.sop_instance_uid IN (SELECT o.sop_instance_uid FROM staged o WHERE o.frame = 0 GROUP BY 1 HAVING count(*) > 1)
    OR EXISTS (SELECT FROM instance n WHERE n.sop_instance_uid = s.sop_instance_uid AND (n.content_hash IS NOT NULL OR EXISTS (
        SELECT FROM image i JOIN location l ON l.image_id = i.id JOIN file f ON f.id = l.file_id
        WHERE i.instance_id = n.id AND (f.root_id, f.path) <> (%(root)s, s.path)))))
"""
UNHASHED = """
SELECT DISTINCT ON (n.id) n.id, pl.url || '/' || pl.path, r.url || '/' || f.path FROM instance n JOIN image i ON i.instance_id = n.id
JOIN location l ON l.image_id = i.id JOIN file f ON f.id = l.file_id AND f.state = 'present' JOIN root r ON r.id = f.root_id
JOIN place pl ON pl.file_id = f.id WHERE n.sop_instance_uid = ANY(%s) AND n.content_hash IS NULL ORDER BY n.id, f.id
"""


def write(
    conn: psycopg.Connection[Any],
    root_id: int,
    folder: str,
    read: Sequence[Read],
    known: AbstractSet[str],
    where: Callable[[str], str] | None = None,
) -> None:
    """Write what these files hold, in the caller's transaction; their own rows are there already. `known`: paths that had one before.

    `folder` is the root's url; `where` gives the place of a path, by default below it.
    """
    with conn.cursor().copy("COPY staged FROM STDIN") as copy:
        for file in read:
            copy.write(file.rows)
    # Else joins of a batch are nested loops over it.
    conn.execute("ANALYZE staged (path, patient, study_instance_uid, series_instance_uid, sop_instance_uid, frame)")
    paths = [file.entry.path for file in read]
    parameters = {"root": root_id, "paths": paths, "other": [file.entry.path for file in read if file.other_patient]}
    _compare(conn, root_id, folder, where)
    parameters["grown"] = [series_id for (series_id,) in conn.execute(GROWN)]
    made = {statement: conn.execute(statement, parameters).rowcount for statement in WRITE}
    fresh = known.isdisjoint(paths)
    if not fresh or any(not file.frames for file in read):
        conn.execute(OBJECTS, parameters)
    if fresh:
        # Of instances that are all new, each with a UID of its own, nothing follows for what was there.
        if made[INSTANCES] != len(paths) or conn.execute(SHARED).fetchone() == (True,):
            settle(conn, root_id, paths, fresh=True)
        return
    gone = conn.execute(UNPLACE, parameters).fetchall()
    if gone:
        images, files = zip(*gone, strict=True)
        conn.execute(FILE_CHANGED, {"images": list(images), "files": list(files)})
    settle(conn, root_id, paths, [image_id for image_id, _ in gone])
    for statement in CORRECT:
        conn.execute(statement, parameters)


def _compare(conn: psycopg.Connection[Any], root_id: int, folder: str, where: Callable[[str], str] | None) -> None:
    """Hash the pixels of files that claim one UID, so that a re-encoding and a conflict are told apart (``--hash none`` and ``head``)."""
    uncompared = conn.execute(UNCOMPARED, {"root": root_id}).fetchall()
    if not uncompared:
        return
    for path, _ in uncompared:
        named = f"{folder}/{path}"
        content, hashes = _hashes(where(path) if where else named, named)
        conn.execute("UPDATE staged SET content_hash = %s, pixel_hash = (%s::bytea[])[frame + 1] WHERE path = %s", [content, hashes, path])
    for instance_id, place, named in conn.execute(UNHASHED, [[uid for _, uid in uncompared]]).fetchall():
        content, hashes = _hashes(place, named)
        conn.execute("UPDATE image SET pixel_hash = (%s::bytea[])[frame + 1] WHERE instance_id = %s", [hashes, instance_id])
        conn.execute("UPDATE instance SET content_hash = %s WHERE id = %s", [content, instance_id])


def _hashes(place: str, named: str) -> tuple[bytes, list[bytes]]:
    try:
        hashes = [frame.pixel_hash or b"" for frame in dicom.read_instance(place).frames]
    except FileError:  # what cannot be decoded cannot be compared: it is kept apart
        return hashlib.sha256(named.encode()).digest(), []
    return hashlib.sha256(b"".join(hashes)).digest(), hashes


def unplace(conn: psycopg.Connection[Any], root_id: int, paths: Sequence[str]) -> None:
    """These files hold no image any more, if they did: what was in them stays, without a place."""
    gone = conn.execute(
        "DELETE FROM location l USING file f WHERE l.file_id = f.id AND f.root_id = %s AND f.path = ANY(%s) RETURNING l.image_id",
        [root_id, list(paths)],
    ).fetchall()
    if gone:
        settle(conn, root_id, (), [image_id for (image_id,) in gone])


def close_file_flags(conn: psycopg.Connection[Any], root_id: int, paths: Sequence[str], reason: str = "the file was read again") -> None:
    """Close what was found about these files when they were last read, by an ingest or at feed time.

    That the pixels of a file that is still there once changed stays true: only a person closes that.
    """
    conn.execute(
        "UPDATE flag g SET state = 'resolved', closed_by = 'ingest', closed_at = now(), reason = %(reason)s "
        "FROM file f WHERE g.file_id = f.id AND f.root_id = %(root)s AND f.path = ANY(%(paths)s) "
        "AND g.state = 'open' AND g.raised_by IN ('ingest', 'loaderd', 'measure') AND (g.rule <> 'FILE-CHANGED' OR f.state = 'missing')",
        {"reason": reason, "root": root_id, "paths": list(paths)},
    )


# Where an image is read from: a present file, by offset where there is one.
RANKED = """
WITH ranked AS (
    SELECT l.image_id, l.file_id, f.state = 'present' AND row_number() OVER (
        PARTITION BY l.image_id ORDER BY f.state <> 'present', l.byte_offset IS NULL, f.path COLLATE "C", f.id) = 1 AS best
    FROM location l JOIN file f ON f.id = l.file_id WHERE l.image_id = ANY(%(images)s)
)
UPDATE location SET preferred = best FROM ranked
WHERE location.image_id = ranked.image_id AND location.file_id = ranked.file_id AND location.preferred <> best AND
"""

# Among the images with a place, one UID that one content claims is the key; a UID that is missing or that several claim takes the pixels
# too; if those are equal as well, the path and what the content belongs to. An image without a place gives way to those that have one.
KEYED = """
WITH tied AS (
    SELECT i.id, i.frame, i.pixel_hash, ins.sop_instance_uid AS uid, p.path,
           concat_ws(E'\\n', p.path, pt.patient_id, st.study_instance_uid, se.series_instance_uid, encode(ins.content_hash, 'hex')) AS own,
           min(ins.id) FILTER (WHERE p.path IS NOT NULL) OVER one_uid
               <> max(ins.id) FILTER (WHERE p.path IS NOT NULL) OVER one_uid AS shared,
           count(p.path) OVER (PARTITION BY ins.sop_instance_uid, i.frame, i.pixel_hash) > 1 AS same_pixels
    FROM instance ins JOIN image i ON i.instance_id = ins.id
    JOIN series se ON se.id = ins.series_id JOIN study st ON st.id = se.study_id JOIN patient pt ON pt.id = st.patient_id
    LEFT JOIN LATERAL (SELECT min(f.path) AS path FROM location l JOIN file f ON f.id = l.file_id WHERE l.image_id = i.id) p ON true
    WHERE ins.sop_instance_uid <> '' AND ins.sop_instance_uid = ANY(%(uids)s)
       OR ins.sop_instance_uid = '' AND i.pixel_hash = ANY(%(hashes)s)
    WINDOW one_uid AS (PARTITION BY ins.sop_instance_uid)
), keyed AS (
    SELECT id, CASE WHEN path IS NULL THEN sample_key(uid, frame, coalesce(pixel_hash, ''), 'image ' || id)
                    WHEN uid <> '' AND NOT shared THEN sample_key(uid, frame)
                    WHEN same_pixels THEN sample_key(uid, frame, coalesce(pixel_hash, ''), own)
                    ELSE sample_key(uid, frame, coalesce(pixel_hash, '')) END AS sample_key FROM tied
)
UPDATE image SET sample_key = {} FROM keyed WHERE image.id = keyed.id AND image.sample_key <> keyed.sample_key
"""

# One UID stands for several contents as long as files with each of them are there.
CONFLICTING = """
WITH claims AS (
    SELECT i.id, ins.sop_instance_uid AS uid, i.frame, i.pixel_hash,
           EXISTS (SELECT FROM location l JOIN file f ON f.id = l.file_id WHERE l.image_id = i.id AND f.state = 'present') AS there
    FROM instance ins JOIN image i ON i.instance_id = ins.id WHERE ins.sop_instance_uid = ANY(%(uids)s) AND ins.sop_instance_uid <> ''
), conflicting AS (
    SELECT id, there AND min(hash) FILTER (WHERE there) OVER one_image <> max(hash) FILTER (WHERE there) OVER one_image AS conflict
    FROM (SELECT *, encode(pixel_hash, 'hex') AS hash FROM claims) AS hashed WINDOW one_image AS (PARTITION BY uid, frame)
)
"""


def settle(conn: psycopg.Connection[Any], root_id: int, paths: Sequence[str], images: Sequence[int] = (), *, fresh: bool = False) -> None:
    """Work out what follows for `images` and the images in these files: where to read them, their sample keys, conflicts of UIDs.

    `fresh`: the files were not there before, so an image that is in one of them alone is read from there.
    """
    touched = conn.execute(
        "SELECT i.id, n.sop_instance_uid, i.pixel_hash, i.sample_key = sample_key(n.sop_instance_uid, i.frame) AND count(*) OVER one <= "
        "n.number_of_frames, (SELECT count(*) FROM location k WHERE k.image_id = i.id) <> 1 "
        "FROM image i JOIN instance n ON n.id = i.instance_id WHERE i.id = ANY(%s) OR i.id IN ("
        "SELECT l.image_id FROM location l JOIN file f ON f.id = l.file_id WHERE f.root_id = %s AND f.path = ANY(%s)) "
        "WINDOW one AS (PARTITION BY n.sop_instance_uid)",
        [list(images), root_id, list(paths)],
    ).fetchall()
    uids = list({uid for _, uid, _, _, _ in touched if uid})
    several = conn.execute(
        "SELECT sop_instance_uid FROM instance WHERE sop_instance_uid = ANY(%s) GROUP BY 1 HAVING count(*) > 1", [uids]
    ).fetchall()
    # Where one content claims a UID, and the key says so, nothing follows.
    settled = {uid for _, uid, _, plain, _ in touched if plain} - {uid for (uid,) in several}
    moved = set(images)
    settled -= {uid for image_id, uid, _, _, _ in touched if image_id in moved}
    parameters = {
        "images": [image_id for image_id, *_ in touched],
        "uids": [uid for uid in uids if uid not in settled],
        "hashes": list({pixel_hash for _, uid, pixel_hash, _, _ in touched if not uid}),  # else one would touch all without a UID
    }
    if not fresh or any(elsewhere for *_, elsewhere in touched):
        # First the old ones down, then the new ones up: the index allows one at a time.
        conn.execute(RANKED + "NOT best", parameters)
        conn.execute(RANKED + "best", parameters)
    if not parameters["uids"] and not parameters["hashes"]:
        return
    # Off the old keys first: two images may change places.
    if conn.execute(KEYED.format("gen_random_uuid()"), parameters).rowcount:
        conn.execute(KEYED.format("keyed.sample_key"), parameters)
    conn.execute(
        CONFLICTING + "UPDATE flag g SET state = 'resolved', closed_by = 'ingest', closed_at = now(), "
        "reason = 'no other file has this UID any more' FROM conflicting c "
        "WHERE g.image_id = c.id AND NOT c.conflict AND g.rule = 'UID-CONFLICT' AND g.state = 'open' AND g.raised_by = 'ingest'",
        parameters,
    )
    conn.execute(
        CONFLICTING + "INSERT INTO flag (rule, severity, detail, image_id, raised_by) SELECT 'UID-CONFLICT', 'error', "
        "'another file has this SOPInstanceUID (0008,0018) and other pixels; remove one, or say which is right', id, 'ingest' "
        "FROM conflicting WHERE conflict AND NOT EXISTS ("
        "SELECT FROM flag g WHERE g.image_id = conflicting.id AND g.rule = 'UID-CONFLICT' AND g.closed_by <> 'ingest') "
        "ON CONFLICT DO NOTHING",
        parameters,
    )


def number_phases(conn: psycopg.Connection[Any]) -> None:
    """Number the phases of each series with an image that has none: by trigger time at the same position (to 0.01 mm)."""
    without = """
        SELECT n.series_id FROM image m JOIN instance n ON n.id = m.instance_id
        WHERE m.phase IS NULL AND m.trigger_time IS NOT NULL AND m.position IS NOT NULL
          AND EXISTS (SELECT FROM location l WHERE l.image_id = m.id)
    """
    # Asked first: even an UPDATE of no row counts as a change of the catalog, for which a daemon plans its next epoch again.
    if conn.execute(f"SELECT EXISTS ({without})").fetchone() == (True,):
        conn.execute(
            f"""
            WITH ranked AS (
                SELECT i.id, dense_rank() OVER (PARTITION BY ins.series_id, round(i.position * 100) ORDER BY i.trigger_time) - 1 AS phase
                FROM instance ins JOIN image i ON i.instance_id = ins.id
                WHERE i.trigger_time IS NOT NULL AND i.position IS NOT NULL AND ins.series_id IN ({without})
                  AND EXISTS (SELECT FROM location l WHERE l.image_id = i.id)
            )
            UPDATE image SET phase = ranked.phase FROM ranked WHERE image.id = ranked.id AND image.phase IS DISTINCT FROM ranked.phase
            """
        )
    conn.commit()
