"""Annotations, the images they belong to, and the masks that follow.

A layout says what an annotation's source says about its image; here that becomes candidates, and candidates become pairings: one
candidate is accepted, several are only proposed, none is a flag. What a person decided is never touched. Masks are made for every
pairing that is not rejected, so that what is proposed can be looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg.types.json import Jsonb

from catalog import contours, images
from catalog.layouts import Annotation
from catalog.records import Polygon

if TYPE_CHECKING:
    from catalog.ingest import Run

MASKS_PER_COMMIT = 1_000
# A mask further than both from its polygon's area is worth a look; on the real contours they differ by 9 px and 1.2 % at most.
ODD_AREA_PX, ODD_AREA = 10, 0.05

WANTED = """
CREATE TEMP TABLE IF NOT EXISTS wanted (path text, image_path text, folder text, number integer, unpaired text) ON COMMIT DELETE ROWS
"""

# Every current annotation of the root with each image it may belong to; image_id NULL: none. `decided`: a person has said which.
CANDIDATE = """
CREATE TEMP TABLE candidate ON COMMIT DROP AS
WITH drawn AS (
    SELECT DISTINCT a.id AS annotation_id, w.image_path, w.folder, w.number, w.unpaired
    FROM wanted w JOIN file f ON f.root_id = %(root)s AND f.path = w.path JOIN annotation a ON a.file_id = f.id AND a.current
), found AS (
    SELECT d.annotation_id, l.image_id, 'file-number' AS method
    FROM drawn d JOIN file f ON f.root_id = %(root)s AND f.path = d.image_path AND f.state = 'present' JOIN location l ON l.file_id = f.id
    UNION
    SELECT d.annotation_id, l.image_id, 'instance-number'
    FROM drawn d
    JOIN file f ON f.root_id = %(root)s AND f.state = 'present' AND starts_with(f.path, d.folder || '/')
    JOIN location l ON l.file_id = f.id JOIN image i ON i.id = l.image_id
    JOIN instance n ON n.id = i.instance_id AND n.instance_number = d.number
    WHERE d.image_path IS NULL
)
SELECT d.annotation_id, c.image_id, c.method,
       CASE c.method WHEN 'file-number' THEN 'contour number ' || number || ' = number in the image file''s name'
                     ELSE 'contour number ' || number || ' = InstanceNumber (0020,0013)' END AS rule,
       count(c.image_id) OVER mine AS candidates, 1.0::float8 / nullif(count(c.image_id) OVER mine, 0) AS score,
       CASE count(c.image_id) OVER mine WHEN 1 THEN 'accepted' ELSE 'proposed' END AS state, d.number, d.unpaired,
       EXISTS (SELECT FROM pairing p WHERE p.annotation_id = d.annotation_id AND p.actor NOT LIKE 'layout:%%') AS decided
FROM (SELECT DISTINCT annotation_id, number, unpaired FROM drawn) d LEFT JOIN found c USING (annotation_id)
WINDOW mine AS (PARTITION BY d.annotation_id)
"""

TO_REJECT = """
SELECT p.id FROM pairing p WHERE p.actor = %(actor)s AND p.state <> 'rejected'
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
           CASE WHEN unpaired <> '' THEN unpaired ELSE 'no image has number ' || number END AS detail
    FROM candidate WHERE candidates = 0 AND NOT decided
    UNION ALL
    SELECT DISTINCT 'PAIR-AMBIGUOUS', annotation_id, 0, candidates || ' images have number ' || number || '; none was chosen'
    FROM candidate WHERE candidates > 1 AND NOT decided
    UNION ALL
    -- The image that this was first paired with has lost its place to another one.
    SELECT 'PAIR-CHANGED', 0, p.id, 'drawn when the image file held other pixels; look at it, or put the old file back'
    FROM candidate c JOIN pairing p USING (annotation_id, image_id) JOIN image i ON i.id = c.image_id
    WHERE NOT c.decided AND EXISTS (
        SELECT FROM pairing q JOIN image j ON j.id = q.image_id
        WHERE q.annotation_id = c.annotation_id AND q.id < p.id AND j.pixel_hash <> i.pixel_hash
          AND NOT EXISTS (SELECT FROM location l WHERE l.image_id = j.id))
), raised AS (
    SELECT g.id, g.rule, coalesce(g.annotation_id, 0) AS annotation_id, coalesce(g.pairing_id, 0) AS pairing_id,
           g.state = 'open' AS open, g.state <> 'open' AND g.closed_by <> 'ingest' AS closed_by_person
    FROM flag g LEFT JOIN pairing p ON p.id = g.pairing_id
    WHERE g.rule IN ('PAIR-NO-IMAGE', 'PAIR-AMBIGUOUS', 'PAIR-CHANGED') AND g.raised_by = 'ingest'
      AND coalesce(g.annotation_id, p.annotation_id) IN (SELECT annotation_id FROM candidate)
)
"""

TO_CLOSE = f"""{FOUND}
SELECT id FROM raised WHERE open AND (rule, annotation_id, pairing_id) NOT IN (SELECT rule, annotation_id, pairing_id FROM found)
"""  # noqa: S608

TO_RAISE = f"""{FOUND}
SELECT rule, detail, nullif(annotation_id, 0), nullif(pairing_id, 0) FROM found
WHERE (rule, annotation_id, pairing_id) NOT IN (SELECT rule, annotation_id, pairing_id FROM raised WHERE open OR closed_by_person)
"""  # noqa: S608

DRAWN_STAGED = """
CREATE TEMP TABLE IF NOT EXISTS drawn_staged (
    path text, size bigint, mtime_ns bigint, reader text, structure text, convention text, refers_to jsonb, points float8[],
    rings integer[], area_px float8, content_hash bytea
) ON COMMIT DELETE ROWS
"""

WRITE: tuple[str, ...] = (
    """
    INSERT INTO file (root_id, path, kind, size, mtime_ns, state, ingest_run_id)
    SELECT %(root)s, path, 'annotation', size, mtime_ns, 'present', %(run)s FROM drawn_staged ORDER BY path
    ON CONFLICT (root_id, path) DO UPDATE SET size = excluded.size, mtime_ns = excluded.mtime_ns, state = excluded.state,
        ingest_run_id = excluded.ingest_run_id
    """,
    "INSERT INTO reader (name) SELECT DISTINCT reader FROM drawn_staged ORDER BY 1 ON CONFLICT DO NOTHING",
    "INSERT INTO structure (name) SELECT DISTINCT structure FROM drawn_staged ORDER BY 1 ON CONFLICT DO NOTHING",
)

# Of each file its newest version: id, whether it is current, whether it holds the same.
LAST_VERSION = """
SELECT DISTINCT ON (a.file_id) a.id, a.current, a.content_hash = d.content_hash
FROM drawn_staged d JOIN file f ON f.root_id = %(root)s AND f.path = d.path JOIN annotation a ON a.file_id = f.id AND a.source_key = ''
ORDER BY a.file_id, a.version DESC
"""

# What is not current by now is new.
NEW_VERSION = """
INSERT INTO annotation (file_id, version, reader_id, structure_id, kind, origin, points, rings, convention, polygon_area_px, content_hash,
    refers_to, ingest_run_id)
SELECT f.id, 1 + coalesce((SELECT max(o.version) FROM annotation o WHERE o.file_id = f.id AND o.source_key = ''), 0), r.id, s.id, 'polygon',
       'contour', d.points, d.rings, d.convention, d.area_px, d.content_hash, d.refers_to, %(run)s
FROM drawn_staged d JOIN file f ON f.root_id = %(root)s AND f.path = d.path
JOIN reader r ON r.name = d.reader JOIN structure s ON s.name = d.structure
WHERE NOT EXISTS (SELECT FROM annotation c WHERE c.file_id = f.id AND c.source_key = '' AND c.current)
ORDER BY d.path RETURNING id, cardinality(points) / 2
"""

RETIRED = "no longer the current version"


def write_polygons(conn: psycopg.Connection[Any], run_id: int, root_id: int, read: Sequence[tuple[Annotation, Polygon]]) -> None:
    """Write what these files hold as their current versions; the same content again is no new version."""
    with conn.cursor().copy("COPY drawn_staged FROM STDIN") as copy:
        for drawn, shape in read:
            copy.write_row(
                (
                    drawn.entry.path, drawn.entry.size, drawn.entry.mtime_ns, drawn.reader, drawn.structure, drawn.convention,
                    Jsonb(drawn.refers_to), shape.points, shape.rings, shape.area_px, shape.content_hash,
                )
            )  # fmt: skip
    parameters = {"root": root_id, "run": run_id}
    for statement in WRITE:
        conn.execute(statement, parameters)
    images.close_file_flags(conn, root_id, [drawn.entry.path for drawn, _ in read])
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
    for annotation_id, points in conn.execute(NEW_VERSION, parameters).fetchall():
        if points < 3:
            flag(conn, annotation_id, "CONTOUR-POINTS", f"has {points} points; an area needs at least three")


def flag(
    conn: psycopg.Connection[Any], annotation_id: int, rule: str, detail: str, *, severity: str = "error", value: float | None = None
) -> None:
    """Raise a flag on an annotation, unless it is open already."""
    conn.execute(
        "INSERT INTO flag (rule, severity, detail, value, annotation_id, raised_by) VALUES (%s, %s, %s, %s, %s, 'ingest') "
        "ON CONFLICT DO NOTHING",
        [rule, severity, detail, value, annotation_id],
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


def pair(conn: psycopg.Connection[Any], run: Run, annotations: Sequence[Annotation]) -> None:
    """Bring the pairings that the layout makes up to what it says now. Writes nothing where nothing differs.

    Each step first asks what differs: even an UPDATE of no row counts as a change of the catalog, for which a daemon plans again.
    """
    with conn.cursor().copy("COPY wanted FROM STDIN") as copy:
        for drawn in annotations:
            for image_path in drawn.candidates or (None,):
                copy.write_row((drawn.entry.path, image_path, drawn.folder, drawn.number, drawn.unpaired))
    parameters = {"root": run.root_id, "actor": run.actor}
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


def make_masks(conn: psycopg.Connection[Any], run: Run) -> None:
    """Rasterise every polygon of the root whose pairing has no mask yet; commits every 1,000."""
    while True:
        todo = conn.execute(
            "SELECT p.id, a.id, a.points, a.rings, a.convention, a.shift_x, a.shift_y, a.polygon_area_px, i.rows, i.columns "
            "FROM pairing p JOIN annotation a ON a.id = p.annotation_id AND a.kind = 'polygon' JOIN file f ON f.id = a.file_id "
            "JOIN image i ON i.id = p.image_id "
            "WHERE f.root_id = %s AND p.state <> 'rejected' AND NOT EXISTS (SELECT FROM mask m WHERE m.pairing_id = p.id) LIMIT %s",
            [run.root_id, MASKS_PER_COMMIT],
        ).fetchall()
        if not todo:
            return
        areas = []
        with conn.cursor().copy(
            "COPY mask (pairing_id, rows, columns, box_row, box_column, box_rows, box_columns, bits) FROM STDIN"
        ) as copy:
            for pairing_id, annotation_id, points, rings, convention, shift_x, shift_y, polygon_area, rows, columns in todo:
                raster = contours.rasterise(
                    contours.unflatten(points, rings), rows, columns, convention=convention, shift=(shift_x, shift_y)
                )
                copy.write_row((pairing_id, rows, columns, *contours.boxed(raster)))
                if max(rings, default=0) >= 3:  # fewer are flagged as such
                    areas.append((annotation_id, int(raster.sum()), polygon_area))
        for annotation_id, area, polygon_area in areas:
            if not area:
                flag(conn, annotation_id, "MASK-EMPTY", "no pixel's centre lies inside the polygon, so there is nothing to learn from")
            elif abs(area - polygon_area) > max(ODD_AREA_PX, ODD_AREA * polygon_area):
                detail = (
                    f"{area} px in the mask, {polygon_area:.0f} px² in the polygon: it crosses itself, or lies partly outside the image"
                )
                flag(conn, annotation_id, "MASK-AREA", detail, severity="warning", value=area / polygon_area if polygon_area else None)
        conn.commit()
