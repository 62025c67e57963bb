"""Annotations, the images they belong to, and the masks that follow.

A layout says what an annotation's source says about its image; here that becomes candidates, and candidates become pairings: one
candidate is accepted, several are only proposed, none is a flag. What a person decided is never touched. Masks are made for every
pairing that is not rejected, so that what is proposed can be looked at.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg.types.json import Jsonb

from catalog import contours, shapes
from catalog.layouts import Annotation
from catalog.reading import Read
from catalog.records import Drawn

if TYPE_CHECKING:
    from catalog.ingest_run import Run

MASKS_PER_COMMIT = 1_000
# A mask further than both from its polygon's area is worth a look; on the real contours they differ by 9 px and 1.2 % at most.
ODD_AREA_PX, ODD_AREA = 10, 0.05

WANTED = """
CREATE TEMP TABLE IF NOT EXISTS wanted (path text, image_path text, folder text, number integer, unpaired text) ON COMMIT DELETE ROWS
"""

# Which images of a file an annotation names: all, or the one of its frame, by look-ups in indexes. A join over all that the file holds
# took 30 s for the 10,000 labels of one IDX file. A file's images are of one instance.
IN_FILE = """CROSS JOIN LATERAL (
        SELECT l.image_id FROM location l WHERE d.frame IS NULL AND l.file_id = f.id
        UNION ALL
        SELECT i.id FROM image i WHERE i.frame = d.frame AND i.instance_id = (
            SELECT k.instance_id FROM location l JOIN image k ON k.id = l.image_id WHERE l.file_id = f.id LIMIT 1)) o"""

PLANE_MM = 0.5  # how far an image's plane may lie from a point that is said to lie in it

# Current annotations of the root with each image they may belong to; image_id NULL: none. `decided`: a person has said which. Derived
# labels have theirs from what they were made for.
#
# What the layout's names say comes first, then what the annotation's file says (`refers_to`): a path and frame, a UID and frame, a plane.
# The first that finds images decides. A plane is looked for in the series that is named, else in the study, else in the frame of
# reference; a FrameOfReferenceUID that only one instance has means nothing (in the Sunnybrook files every one differs).
CANDIDATE = f"""
CREATE TEMP TABLE candidate ON COMMIT DROP AS
WITH drawn AS (
    SELECT DISTINCT a.id AS annotation_id, a.refers_to, (a.refers_to ->> 'frame')::integer AS frame, w.image_path, w.folder, w.number,
           w.unpaired
    FROM annotation a JOIN file f ON f.id = a.file_id LEFT JOIN wanted w ON w.path = f.path AND f.root_id = %(root)s
    WHERE a.current AND a.origin NOT IN ('interpolated', 'proposed')
      AND (f.root_id = %(root)s AND (w.path IS NOT NULL OR %(all)s) OR %(all)s AND EXISTS (
        SELECT FROM flag g WHERE g.annotation_id = a.id AND g.rule = 'PAIR-NO-IMAGE' AND g.state = 'open'))
), direct AS (
    SELECT d.annotation_id, o.image_id, 1 AS turn, CASE WHEN d.number IS NULL THEN 'path' ELSE 'file-number' END AS method
    FROM drawn d JOIN file f ON f.root_id = %(root)s AND f.path = d.image_path AND f.state = 'present' {IN_FILE}
    UNION
    SELECT d.annotation_id, l.image_id, 1, 'instance-number'
    FROM drawn d
    JOIN file f ON f.root_id = %(root)s AND f.state = 'present' AND starts_with(f.path, d.folder || '/')
    JOIN location l ON l.file_id = f.id JOIN image i ON i.id = l.image_id
    JOIN instance n ON n.id = i.instance_id AND n.instance_number = d.number
    WHERE d.image_path IS NULL
    UNION
    SELECT d.annotation_id, o.image_id, 2, 'path'
    FROM drawn d JOIN file f ON f.root_id = %(root)s AND f.path = d.refers_to ->> 'path' AND f.state = 'present' {IN_FILE}
    UNION
    SELECT d.annotation_id, i.id, 3, 'uid'
    FROM drawn d JOIN instance n ON n.sop_instance_uid = d.refers_to ->> 'sop_instance_uid' AND n.sop_instance_uid <> ''
    JOIN image i ON i.instance_id = n.id AND i.frame = d.frame
    WHERE EXISTS (SELECT FROM location l JOIN file f ON f.id = l.file_id WHERE l.image_id = i.id AND f.state = 'present')
    UNION
    SELECT d.annotation_id, i.id, 3, 'uid'
    FROM drawn d JOIN instance n ON n.sop_instance_uid = d.refers_to ->> 'sop_instance_uid' AND n.sop_instance_uid <> ''
    JOIN image i ON i.instance_id = n.id AND d.frame IS NULL AND CASE
        WHEN n.number_of_frames = 1 OR jsonb_typeof(d.refers_to #> '{{plane,position}}') <> 'array' THEN true
        ELSE abs(plane_distance(numbers(d.refers_to #> '{{plane,position}}'), i.image_position, i.image_orientation)) <= {PLANE_MM} END
    WHERE EXISTS (SELECT FROM location l JOIN file f ON f.id = l.file_id WHERE l.image_id = i.id AND f.state = 'present')
), plane AS MATERIALIZED (
    SELECT d.annotation_id, numbers(p -> 'position') AS position, numbers(p -> 'orientation') AS orientation,
           numbers(p -> 'normal') AS normal, numbers(p -> 'spacing') AS spacing,
           coalesce(p ->> 'series_instance_uid', '') AS series, coalesce(p ->> 'study_instance_uid', '') AS study,
           coalesce(p ->> 'frame_of_reference_uid', '') AS reference, (p ->> 'rows')::integer AS rows, (p ->> 'columns')::integer AS columns
    FROM drawn d CROSS JOIN LATERAL (SELECT d.refers_to -> 'plane' AS p) q
    WHERE jsonb_typeof(p) = 'object' AND NOT EXISTS (SELECT FROM direct o WHERE o.annotation_id = d.annotation_id)
), scope AS (
    SELECT p.annotation_id, se.id AS series_id FROM plane p JOIN series se ON se.series_instance_uid = p.series WHERE p.series <> ''
    UNION
    SELECT p.annotation_id, se.id FROM plane p JOIN study st ON st.study_instance_uid = p.study JOIN series se ON se.study_id = st.id
    WHERE p.study <> '' AND NOT EXISTS (SELECT FROM series o WHERE o.series_instance_uid = p.series AND p.series <> '')
    UNION
    SELECT p.annotation_id, n.series_id FROM plane p JOIN instance n ON n.frame_of_reference_uid = p.reference
    WHERE p.reference <> '' AND p.study = '' AND p.series = ''
), found AS (
    SELECT * FROM direct
    UNION
    SELECT p.annotation_id, i.id, 4, 'geometry'
    FROM plane p JOIN scope USING (annotation_id) JOIN instance n USING (series_id) JOIN image i ON i.instance_id = n.id
    WHERE (p.reference = '' OR n.frame_of_reference_uid IN ('', p.reference) OR NOT EXISTS (
          SELECT FROM instance x WHERE x.series_id = n.series_id AND x.frame_of_reference_uid = n.frame_of_reference_uid AND x.id <> n.id))
      AND abs(plane_distance(p.position, i.image_position, i.image_orientation)) <= {PLANE_MM}
      -- 0.999 is 2.6 degrees.
      AND (p.normal IS NULL OR abs(plane_distance(p.normal, ARRAY[0, 0, 0], i.image_orientation)) >= 0.999)
      AND (p.orientation IS NULL OR same_grid(p.position, p.orientation, i.image_position, i.image_orientation))
      AND (p.rows IS NULL OR (p.rows, p.columns) = (i.rows, i.columns))
      AND (p.spacing IS NULL OR abs(i.row_spacing / p.spacing[1] - 1) <= 0.001 AND abs(i.column_spacing / p.spacing[2] - 1) <= 0.001)
      AND EXISTS (SELECT FROM location l JOIN file f ON f.id = l.file_id WHERE l.image_id = i.id AND f.state = 'present')
), best AS (
    SELECT * FROM (SELECT *, rank() OVER (PARTITION BY annotation_id ORDER BY turn) AS place FROM found) AS ranked WHERE place = 1
)
SELECT d.annotation_id, c.image_id, c.method,
       CASE c.method WHEN 'file-number' THEN 'number ' || number || ' = number in the image file''s name'
                     WHEN 'instance-number' THEN 'number ' || number || ' = InstanceNumber (0020,0013)'
                     WHEN 'path' THEN 'the image file that its name or table gives'
                     WHEN 'uid' THEN 'ReferencedSOPInstanceUID (0008,1155) = SOPInstanceUID (0008,0018)'
                     WHEN 'geometry' THEN 'its plane = the image''s, within {PLANE_MM} mm' END AS rule,
       count(c.image_id) OVER mine AS candidates, 1.0::float8 / nullif(count(c.image_id) OVER mine, 0) AS score,
       CASE WHEN count(c.image_id) OVER mine = 1 AND d.mismatch IS NULL THEN 'accepted' ELSE 'proposed' END AS state,
       d.number, d.unpaired, d.mismatch,
       EXISTS (SELECT FROM pairing p WHERE p.annotation_id = d.annotation_id AND p.actor NOT LIKE 'layout:%%') AS decided
FROM (SELECT DISTINCT annotation_id, number, unpaired, refers_to ->> 'mismatch' AS mismatch FROM drawn) d
LEFT JOIN best c USING (annotation_id)
WINDOW mine AS (PARTITION BY d.annotation_id)
"""

TO_REJECT = """
SELECT p.id FROM pairing p WHERE p.actor LIKE 'layout:%%' AND p.state <> 'rejected'
  AND p.annotation_id IN (SELECT annotation_id FROM candidate)
  AND NOT EXISTS (SELECT FROM candidate k WHERE k.annotation_id = p.annotation_id AND k.image_id = p.image_id)
"""

TO_PAIR = """
SELECT c.annotation_id, c.image_id, c.method, c.rule, c.score, c.state, %(actor)s::text AS actor
FROM candidate c LEFT JOIN pairing p USING (annotation_id, image_id)
WHERE c.image_id IS NOT NULL AND NOT c.decided AND (p.state, p.score, p.method) IS DISTINCT FROM (c.state, c.score, c.method)
"""

PAIR = f"""
INSERT INTO pairing (annotation_id, image_id, method, rule, score, state, actor) {TO_PAIR}
ON CONFLICT (annotation_id, image_id) DO UPDATE SET method = excluded.method, rule = excluded.rule, score = excluded.score,
    state = excluded.state, actor = excluded.actor, at = now()
"""

# What is wrong with a pairing, by what the candidates say now; a finding that a person closed is not raised again.
FOUND = """
WITH found AS (
    SELECT DISTINCT 'PAIR-NO-IMAGE' AS rule, annotation_id, 0::bigint AS pairing_id,
           CASE WHEN unpaired <> '' THEN unpaired WHEN number IS NOT NULL THEN 'no image has number ' || number
                ELSE 'the image that it refers to is not in the catalog' END AS detail
    FROM candidate WHERE candidates = 0 AND NOT decided
    UNION ALL
    SELECT DISTINCT 'PAIR-AMBIGUOUS', annotation_id, 0,
           candidates || CASE WHEN number IS NOT NULL THEN ' images have number ' || number ELSE ' images fit' END || '; none was chosen'
    FROM candidate WHERE candidates > 1 AND NOT decided
    UNION ALL
    SELECT DISTINCT 'PAIR-GRID', annotation_id, 0, mismatch || '; none was chosen' FROM candidate WHERE mismatch IS NOT NULL AND NOT decided
    UNION ALL
    -- The image that this was first paired with has lost its place to another one.
    SELECT 'PAIR-CHANGED', 0, p.id, 'drawn when the image file held other pixels; look at it, or put the old file back'
    FROM candidate c JOIN pairing p USING (annotation_id, image_id) JOIN image i ON i.id = c.image_id
    WHERE NOT c.decided AND EXISTS (
        SELECT FROM pairing q JOIN image j ON j.id = q.image_id
        WHERE q.annotation_id = c.annotation_id AND q.id < p.id AND j.pixel_hash <> i.pixel_hash
          AND NOT EXISTS (SELECT FROM location l WHERE l.image_id = j.id))
), raised AS (
    SELECT g.id, g.rule, g.detail, coalesce(g.annotation_id, 0) AS annotation_id, coalesce(g.pairing_id, 0) AS pairing_id,
           g.state = 'open' AS open, g.state <> 'open' AND g.closed_by <> 'ingest' AS closed_by_person
    FROM flag g LEFT JOIN pairing p ON p.id = g.pairing_id
    WHERE g.rule IN ('PAIR-NO-IMAGE', 'PAIR-AMBIGUOUS', 'PAIR-CHANGED', 'PAIR-GRID') AND g.raised_by = 'ingest'
      AND coalesce(g.annotation_id, p.annotation_id) IN (SELECT annotation_id FROM candidate)
)
"""

TO_CLOSE = f"""{FOUND}
SELECT id FROM raised r WHERE open AND NOT EXISTS (
    SELECT FROM found f WHERE (f.rule, f.annotation_id, f.pairing_id, f.detail) = (r.rule, r.annotation_id, r.pairing_id, r.detail))
  -- While a person has rejected some candidates and accepted none, it is still a question.
  AND NOT (r.rule = 'PAIR-AMBIGUOUS' AND EXISTS (SELECT FROM pairing p WHERE p.annotation_id = r.annotation_id AND p.state = 'proposed'))
"""

TO_RAISE = f"""{FOUND}
SELECT rule, detail, nullif(annotation_id, 0), nullif(pairing_id, 0) FROM found
WHERE (rule, annotation_id, pairing_id) NOT IN (SELECT rule, annotation_id, pairing_id FROM raised WHERE closed_by_person)
  AND (rule, annotation_id, pairing_id, detail) NOT IN (SELECT rule, annotation_id, pairing_id, detail FROM raised WHERE open)
"""

DRAWN_STAGED = """
CREATE TEMP TABLE IF NOT EXISTS drawn_staged (
    path text, source_key text, reader text, structure text, kind text, origin text, label text, convention text, refers_to jsonb,
    points float8[], rings integer[], area_px float8, rows integer, columns integer, box integer[], bits bytea, content_hash bytea
) ON COMMIT DELETE ROWS
"""

WRITE: tuple[str, ...] = (
    "INSERT INTO reader (name) SELECT DISTINCT reader FROM drawn_staged ORDER BY 1 ON CONFLICT DO NOTHING",
    "INSERT INTO structure (name) SELECT DISTINCT structure FROM drawn_staged ORDER BY 1 ON CONFLICT DO NOTHING",
)

# Of each annotation its newest version: id, whether it is current, whether its file holds the same still (NULL: nothing under that key).
# What a table or a pattern says about an unchanged file, its structure above all, is a part of that. Derived labels never stood in it.
LAST_VERSION = """
SELECT DISTINCT ON (a.file_id, a.source_key) a.id, a.current,
       CASE WHEN d.path IS NOT NULL THEN (a.content_hash, a.refers_to, s.name, r.name, a.convention, a.label)
           IS NOT DISTINCT FROM (d.content_hash, d.refers_to, d.structure, d.reader, d.convention, d.label) END
FROM unnest(%(paths)s::text[]) AS read (path) JOIN file f ON f.root_id = %(root)s AND f.path = read.path
JOIN annotation a ON a.file_id = f.id JOIN structure s ON s.id = a.structure_id JOIN reader r ON r.id = a.reader_id
LEFT JOIN drawn_staged d ON d.path = f.path AND d.source_key = a.source_key
WHERE a.origin NOT IN ('interpolated', 'proposed')
ORDER BY a.file_id, a.source_key, a.version DESC
"""

# What is not current by now is new.
NEW_VERSION = """
INSERT INTO annotation (file_id, source_key, version, reader_id, structure_id, kind, origin, label, points, rings, convention,
    polygon_area_px, rows, columns, box, bits, content_hash, refers_to, ingest_run_id)
SELECT f.id, d.source_key,
       1 + coalesce((SELECT max(o.version) FROM annotation o WHERE o.file_id = f.id AND o.source_key = d.source_key), 0), r.id, s.id,
       d.kind, d.origin, d.label, d.points, d.rings, d.convention, d.area_px, d.rows, d.columns, d.box, d.bits, d.content_hash,
       d.refers_to, %(run)s
FROM drawn_staged d JOIN file f ON f.root_id = %(root)s AND f.path = d.path
JOIN reader r ON r.name = d.reader JOIN structure s ON s.name = d.structure
WHERE NOT EXISTS (SELECT FROM annotation c WHERE c.file_id = f.id AND c.source_key = d.source_key AND c.current)
ORDER BY d.path, d.source_key
RETURNING id, kind, cardinality(points) / CASE convention WHEN 'patient' THEN 3 ELSE 2 END
"""

RETIRED = "no longer the current version"


def write(conn: psycopg.Connection[Any], run_id: int, root_id: int, read: Sequence[Read]) -> None:
    """Write what was drawn in these files as current versions; the same content again is no new version.

    A file that held an annotation and does not any more retires it.
    """
    with conn.cursor().copy("COPY drawn_staged FROM STDIN") as copy:
        for file in read:
            for one in file.drawn:
                copy.write_row((file.entry.path, *_row(one)))
    paths = [file.entry.path for file in read]
    parameters = {"root": root_id, "run": run_id, "paths": paths}
    for statement in WRITE:
        conn.execute(statement, parameters)
    last = conn.execute(LAST_VERSION, parameters).fetchall()
    if replaced := [annotation_id for annotation_id, current, same in last if current and not same]:
        retire_ids(conn, replaced)
    if returned := [annotation_id for annotation_id, current, same in last if same and not current]:
        # Its file was away and is back, and so is what was found about it.
        conn.execute("UPDATE annotation SET current = true WHERE id = ANY(%s)", [returned])
        conn.execute(
            "INSERT INTO flag (rule, rule_version, severity, detail, value, annotation_id, raised_by) "
            "SELECT rule, rule_version, severity, detail, value, annotation_id, raised_by FROM ("
            "SELECT DISTINCT ON (annotation_id, rule) * FROM flag WHERE annotation_id = ANY(%s) ORDER BY annotation_id, rule, id DESC"
            ") newest WHERE reason = %s",
            [returned, RETIRED],
        )
    for annotation_id, kind, points in conn.execute(NEW_VERSION, parameters).fetchall():
        if kind == "polygon" and points < 3:
            flag(conn, annotation_id, "CONTOUR-POINTS", f"has {points} points; an area needs at least three")


def _row(one: Drawn) -> tuple[Any, ...]:
    outline, raster = one.polygon, one.segment
    label = None if one.label is None else hashlib.sha256(one.label.encode()).digest()
    content = outline.content_hash if outline else raster.content_hash if raster else label
    origin = "contour" if one.kind == "polygon" else one.kind
    shape = (None, None, None, None) if raster is None else (raster.rows, raster.columns, list(raster.box), raster.bits)
    points = (None, None, None) if outline is None else (outline.points, outline.rings, outline.area_px)
    return (
        one.source_key, one.reader, one.structure, one.kind, origin, one.label, one.convention, Jsonb(one.refers_to), *points, *shape,
        content,
    )  # fmt: skip


def flag(
    conn: psycopg.Connection[Any], annotation_id: int, rule: str, detail: str, *, severity: str = "error", value: float | None = None
) -> None:
    """Raise a flag on an annotation, unless it is open already."""
    conn.execute(
        "INSERT INTO flag (rule, severity, detail, value, annotation_id, raised_by) VALUES (%s, %s, %s, %s, %s, 'ingest') "
        "ON CONFLICT DO NOTHING",
        [rule, severity, detail, value, annotation_id],
    )


def _flag_pairing(conn: psycopg.Connection[Any], pairing_id: int, rule: str, detail: str, value: float | None = None) -> None:
    conn.execute(
        "INSERT INTO flag (rule, severity, detail, value, pairing_id, raised_by) VALUES (%s, 'error', %s, %s, %s, 'ingest') "
        "ON CONFLICT DO NOTHING",
        [rule, detail, value, pairing_id],
    )


def retire(conn: psycopg.Connection[Any], root_id: int, paths: Sequence[str]) -> None:
    """What these files held is no longer current: they are gone, or cannot be read."""
    rows = conn.execute(
        "SELECT a.id FROM annotation a JOIN file f ON f.id = a.file_id WHERE f.root_id = %s AND f.path = ANY(%s) AND a.current",
        [root_id, list(paths)],
    )
    retire_ids(conn, [annotation_id for (annotation_id,) in rows])


def retire_ids(conn: psycopg.Connection[Any], annotation_ids: Sequence[int]) -> None:
    """Make these annotations past versions, and close what was found about them."""
    conn.execute("UPDATE annotation SET current = false WHERE id = ANY(%s)", [list(annotation_ids)])
    conn.execute(
        "UPDATE flag SET state = 'resolved', closed_by = 'ingest', closed_at = now(), reason = %s "
        "WHERE state = 'open' AND raised_by = 'ingest' "
        "AND (annotation_id = ANY(%s) OR pairing_id IN (SELECT id FROM pairing WHERE annotation_id = ANY(%s)))",
        [RETIRED, list(annotation_ids), list(annotation_ids)],
    )


def pair(conn: psycopg.Connection[Any], run: Run, annotations: Sequence[Annotation], *, everything: bool) -> None:
    """Bring the pairings that the layouts make up to what they say now. Writes nothing where nothing differs.

    `everything`: also those of which no name says anything, since files were read or are gone. Each step first asks what differs: even an
    UPDATE of no row counts as a change of the catalog, for which a daemon plans again.
    """
    with conn.cursor().copy("COPY wanted FROM STDIN") as copy:
        for drawn in annotations:
            if drawn.candidates or drawn.folder or drawn.unpaired:
                for image_path in drawn.candidates or (None,):
                    copy.write_row((drawn.entry.path, image_path, drawn.folder, drawn.number, drawn.unpaired))
    parameters = {"root": run.root_id, "actor": run.actor, "all": everything}
    conn.execute(CANDIDATE, parameters)
    if rejected := [pairing_id for (pairing_id,) in conn.execute(TO_REJECT, parameters)]:
        conn.execute("UPDATE pairing SET state = 'rejected', at = now() WHERE id = ANY(%s)", [rejected])
    paired = conn.execute(f"SELECT EXISTS ({TO_PAIR})", parameters).fetchone() == (True,)
    if paired:
        conn.execute(PAIR, parameters)
    if closed := [flag_id for (flag_id,) in conn.execute(TO_CLOSE)]:
        conn.execute(
            "UPDATE flag SET state = 'resolved', closed_by = 'ingest', closed_at = now(), reason = 'the pairing changed' "
            "WHERE id = ANY(%s)",
            [closed],
        )
    if raised := conn.execute(TO_RAISE).fetchall():
        conn.cursor().executemany(
            "INSERT INTO flag (rule, severity, detail, annotation_id, pairing_id, raised_by) VALUES (%s, 'error', %s, %s, %s, 'ingest') "
            "ON CONFLICT DO NOTHING",
            raised,
        )
    if rejected or paired or closed or raised:
        run.id  # noqa: B018  a link table that changed is worth a row, too


# Segments are masks already; on an image of another grid they are none, and a finding.
SEGMENTS = """
SELECT p.id, a.rows, a.columns, a.box, a.bits, i.image_position, i.image_orientation, i.row_spacing, i.column_spacing
FROM pairing p JOIN annotation a ON a.id = p.annotation_id AND a.kind = 'segment' JOIN file f ON f.id = a.file_id
JOIN image i ON i.id = p.image_id AND (i.rows, i.columns) = (a.rows, a.columns)
WHERE f.root_id = %s AND p.id > %s AND p.state <> 'rejected' AND NOT EXISTS (SELECT FROM mask m WHERE m.pairing_id = p.id)
ORDER BY p.id LIMIT %s
"""
MASK = "COPY mask (pairing_id, rows, columns, box_row, box_column, box_rows, box_columns, bits) FROM STDIN"
OTHER_GRIDS = """
SELECT p.id, a.rows || '×' || a.columns || ', the image has ' || i.rows || '×' || i.columns
FROM pairing p JOIN annotation a ON a.id = p.annotation_id AND a.kind = 'segment' AND a.current JOIN file f ON f.id = a.file_id
JOIN image i ON i.id = p.image_id AND (i.rows, i.columns) <> (a.rows, a.columns)
WHERE f.root_id = %(root)s AND p.state <> 'rejected' AND NOT EXISTS (SELECT FROM flag g WHERE g.pairing_id = p.id AND g.rule = 'PAIR-GRID')
"""


def make_masks(conn: psycopg.Connection[Any], root_id: int, *, commit: bool = True) -> None:
    """Make the mask and the shape of every pairing of the root that has none yet; commits every 1,000 masks, or leaves it to the caller."""
    _masks_of_segments(conn, root_id, commit)
    for pairing_id, grids in conn.execute(OTHER_GRIDS, {"root": root_id}).fetchall():
        _flag_pairing(conn, pairing_id, "PAIR-GRID", f"the segment has {grids}; it has no mask there")
    if commit:
        conn.commit()
    last = 0
    while True:
        todo = conn.execute(
            "SELECT p.id, a.id, a.points, a.rings, a.convention, a.shift_x, a.shift_y, a.polygon_area_px, i.rows, i.columns, "
            "i.image_position, i.image_orientation, i.row_spacing, i.column_spacing "
            "FROM pairing p JOIN annotation a ON a.id = p.annotation_id AND a.kind = 'polygon' JOIN file f ON f.id = a.file_id "
            "JOIN image i ON i.id = p.image_id WHERE f.root_id = %s AND p.state <> 'rejected' AND p.id > %s "
            "AND NOT EXISTS (SELECT FROM mask m WHERE m.pairing_id = p.id) ORDER BY p.id LIMIT %s",
            [root_id, last, MASKS_PER_COMMIT],
        ).fetchall()
        if not todo:
            return
        last = todo[-1][0]
        areas, unplaced, far, shaped = [], [], [], []
        with conn.cursor().copy(MASK) as copy:
            for pairing_id, annotation_id, points, rings, convention, shift_x, shift_y, polygon_area, rows, columns, *place in todo:
                drawn = contours.unflatten(points, rings, 3 if convention == "patient" else 2)
                if convention == "patient":
                    placed = shapes.in_pixels(drawn, place)
                    if placed is None:
                        unplaced.append(annotation_id)
                        continue
                    drawn, off = placed
                    convention, polygon_area = "centre", contours.polygon_area(drawn)  # noqa: PLW2901
                    if off > PLANE_MM:
                        far.append((pairing_id, off))
                raster = contours.rasterise(drawn, rows, columns, convention=convention, shift=(shift_x, shift_y))
                *box, bits = contours.boxed(raster)
                copy.write_row((pairing_id, rows, columns, *box, bits))
                covered, shift = (box[0], box[1], box[2], box[3]), (shift_x, shift_y)
                shape = shapes.of_polygon(drawn, rows, columns, covered, bits, convention=convention, shift=shift, place=place)
                shaped.append(shapes.row(pairing_id, shape))
                if max(rings, default=0) >= 3:  # fewer are flagged as such
                    areas.append((annotation_id, int(raster.sum()), polygon_area))
        shapes.write(conn, shaped)
        for annotation_id in unplaced:
            flag(conn, annotation_id, "MASK-GEOMETRY", "its image does not say plainly where it lies, so it has no mask there")
        for pairing_id, off in far:
            _flag_pairing(conn, pairing_id, "PAIR-PLANE", f"drawn {off:.1f} mm off the plane of its image", value=off)
        for annotation_id, area, polygon_area in areas:
            if not area:
                flag(conn, annotation_id, "MASK-EMPTY", "no pixel's centre lies inside the polygon, so there is nothing to learn from")
            elif abs(area - polygon_area) > max(ODD_AREA_PX, ODD_AREA * polygon_area):
                detail = (
                    f"{area} px in the mask, {polygon_area:.0f} px² in the polygon: it crosses itself, or lies partly outside the image"
                )
                flag(conn, annotation_id, "MASK-AREA", detail, severity="warning", value=area / polygon_area if polygon_area else None)
        if commit:
            conn.commit()


def _masks_of_segments(conn: psycopg.Connection[Any], root_id: int, commit: bool) -> None:
    last = 0
    while todo := conn.execute(SEGMENTS, [root_id, last, MASKS_PER_COMMIT]).fetchall():
        last = todo[-1][0]
        with conn.cursor().copy(MASK) as copy:
            for pairing_id, rows, columns, box, bits, *_ in todo:
                copy.write_row((pairing_id, rows, columns, *box, bits))
        shapes.write(
            conn,
            [
                shapes.row(pairing_id, shapes.of_segment(rows, columns, (box[0], box[1], box[2], box[3]), bits, place))
                for pairing_id, rows, columns, box, bits, *place in todo
            ],
        )
        if commit:
            conn.commit()
