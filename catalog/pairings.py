"""Annotations, the images they belong to, and the masks that follow.

A layout says what an annotation's source says about its image; here that becomes candidates, and candidates become pairings: one
candidate is accepted, several are only proposed, none is a flag. What a person decided is never touched. Masks are made for every
pairing that is not rejected, so that what is proposed can be looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import psycopg
from numpy.typing import NDArray
from psycopg.types.json import Jsonb

from catalog import contours
from catalog.layouts import Annotation
from catalog.reading import Polygon

if TYPE_CHECKING:
    from catalog.ingest import Run

MASKS_PER_COMMIT = 1_000
FULL_FRAME_PX = 1_000_000  # larger images keep their masks cropped: design 3

WANTED = """
CREATE TEMP TABLE IF NOT EXISTS wanted (path text, image_path text, folder text, number integer, unpaired text) ON COMMIT DELETE ROWS
"""

# Every current annotation of the root with each image it may belong to; image_id NULL: none.
CANDIDATE = """
CREATE TEMP TABLE candidate ON COMMIT DROP AS
WITH drawn AS (
    SELECT DISTINCT a.id AS annotation_id, w.path, w.image_path, w.folder, w.number, w.unpaired
    FROM wanted w JOIN file f ON f.root_id = %(root)s AND f.path = w.path JOIN annotation a ON a.file_id = f.id AND a.current
), named AS (
    SELECT d.annotation_id, l.image_id, 'file-number' AS method
    FROM drawn d JOIN file f ON f.root_id = %(root)s AND f.path = d.image_path AND f.state = 'present' JOIN location l ON l.file_id = f.id
), numbered AS (
    SELECT DISTINCT d.annotation_id, l.image_id, 'instance-number' AS method
    FROM drawn d
    JOIN file f ON f.root_id = %(root)s AND f.state = 'present' AND starts_with(f.path, d.folder || '/')
    JOIN location l ON l.file_id = f.id JOIN image i ON i.id = l.image_id
    JOIN instance n ON n.id = i.instance_id AND n.instance_number = d.number
    WHERE d.image_path IS NULL
), found AS (
    SELECT * FROM named UNION ALL SELECT * FROM numbered
)
SELECT d.annotation_id, c.image_id, c.method, count(c.image_id) OVER (PARTITION BY d.annotation_id) AS candidates,
       d.path, d.number, d.unpaired
FROM (SELECT DISTINCT annotation_id, path, number, unpaired FROM drawn) d LEFT JOIN found c USING (annotation_id)
"""

REJECT = """
UPDATE pairing p SET state = 'rejected', at = now() FROM candidate c
WHERE p.annotation_id = c.annotation_id AND p.actor = %(actor)s AND p.state <> 'rejected'
  AND NOT EXISTS (SELECT FROM candidate k WHERE k.annotation_id = p.annotation_id AND k.image_id = p.image_id)
"""

PAIR = """
INSERT INTO pairing (annotation_id, image_id, method, rule, score, state, actor)
SELECT annotation_id, image_id, method,
       CASE method WHEN 'file-number' THEN 'contour number ' || number || ' = number in the image file''s name'
                   ELSE 'contour number ' || number || ' = InstanceNumber (0020,0013)' END,
       1.0 / candidates, CASE candidates WHEN 1 THEN 'accepted' ELSE 'proposed' END, %(actor)s
FROM candidate c
WHERE image_id IS NOT NULL AND NOT EXISTS (
    SELECT FROM pairing p WHERE p.annotation_id = c.annotation_id AND p.actor NOT LIKE 'layout:%%')
ON CONFLICT (annotation_id, image_id) DO UPDATE SET method = excluded.method, rule = excluded.rule, score = excluded.score,
    state = excluded.state, actor = excluded.actor, at = now()
WHERE (pairing.state, pairing.score, pairing.method) IS DISTINCT FROM (excluded.state, excluded.score, excluded.method)
"""

FLAG = """
INSERT INTO flag (rule, severity, detail, annotation_id, raised_by)
SELECT DISTINCT %(rule)s, 'error', CASE WHEN unpaired <> '' THEN unpaired WHEN candidates = 0 THEN 'no image has number ' || number
                        ELSE candidates || ' images have number ' || number || '; none was chosen' END, annotation_id, 'ingest'
FROM candidate c WHERE CASE %(rule)s WHEN 'PAIR-NO-IMAGE' THEN candidates = 0 ELSE candidates > 1 END
ON CONFLICT DO NOTHING RETURNING annotation_id, detail
"""

UNFLAG = """
UPDATE flag g SET state = 'resolved', closed_by = 'ingest', closed_at = now(), reason = 'the pairing changed'
FROM candidate c WHERE g.annotation_id = c.annotation_id AND g.rule = %(rule)s AND g.state = 'open'
  AND NOT CASE %(rule)s WHEN 'PAIR-NO-IMAGE' THEN c.candidates = 0 ELSE c.candidates > 1 END
"""


def write_polygon(conn: psycopg.Connection[Any], run_id: int, file_id: int, drawn: Annotation, shape: Polygon) -> None:
    """Write what was drawn as the file's current version; the same content again is no new version."""
    last = conn.execute(
        "SELECT id, version, content_hash, current FROM annotation WHERE file_id = %s AND source_key = '' ORDER BY version DESC LIMIT 1",
        [file_id],
    ).fetchone()
    if last is not None and bytes(last[2]) == shape.content_hash:
        if not last[3]:  # its file was away and is back
            conn.execute("UPDATE annotation SET current = true WHERE id = %s", [last[0]])
        return
    if last is not None:
        retire_ids(conn, [last[0]])
    conn.execute("INSERT INTO reader (name) VALUES (%s) ON CONFLICT DO NOTHING", [drawn.reader])
    conn.execute("INSERT INTO structure (name) VALUES (%s) ON CONFLICT DO NOTHING", [drawn.structure])
    row = conn.execute(
        "INSERT INTO annotation (file_id, version, reader_id, structure_id, kind, origin, points, rings, convention, polygon_area_px, "
        "content_hash, refers_to, ingest_run_id) SELECT %s, %s, r.id, s.id, 'polygon', 'contour', %s, %s, %s, %s, %s, %s, %s "
        "FROM reader r, structure s WHERE r.name = %s AND s.name = %s RETURNING id",
        [
            file_id, 1 if last is None else last[1] + 1, shape.points, shape.rings, drawn.convention, shape.area_px,
            shape.content_hash, Jsonb(drawn.refers_to), run_id, drawn.reader, drawn.structure,
        ],
    ).fetchone()  # fmt: skip
    assert row is not None
    if max(shape.rings, default=0) < 3:
        flag(conn, row[0], "CONTOUR-POINTS", f"has {sum(shape.rings)} points; an area needs at least three")


def flag(conn: psycopg.Connection[Any], annotation_id: int, rule: str, detail: str) -> None:
    """Raise an error flag on an annotation, unless it is open already."""
    conn.execute(
        "INSERT INTO flag (rule, severity, detail, annotation_id, raised_by) VALUES (%s, 'error', %s, %s, 'ingest') ON CONFLICT DO NOTHING",
        [rule, detail, annotation_id],
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
        "UPDATE flag SET state = 'resolved', closed_by = 'ingest', closed_at = now(), reason = 'no longer the current version' "
        "WHERE annotation_id = ANY(%s) AND state = 'open' AND raised_by = 'ingest'",
        [list(annotation_ids)],
    )


def pair(conn: psycopg.Connection[Any], run: Run, annotations: Sequence[Annotation]) -> None:
    """Bring the pairings that the layout makes up to what it says now. Writes nothing where nothing differs."""
    with conn.cursor().copy("COPY wanted FROM STDIN") as copy:
        for drawn in annotations:
            for image_path in drawn.candidates or (None,):
                copy.write_row((drawn.entry.path, image_path, drawn.folder, drawn.number, drawn.unpaired))
    parameters = {"root": run.root_id, "actor": run.actor}
    conn.execute(CANDIDATE, parameters)
    changed = conn.execute(REJECT, parameters).rowcount + conn.execute(PAIR, parameters).rowcount
    for rule, code in (("PAIR-NO-IMAGE", "no-image"), ("PAIR-AMBIGUOUS", "several-images")):
        changed += conn.execute(UNFLAG, {"rule": rule}).rowcount
        for annotation_id, detail in conn.execute(FLAG, {"rule": rule}).fetchall():
            path = conn.execute("SELECT path FROM candidate WHERE annotation_id = %s LIMIT 1", [annotation_id]).fetchone()
            run.refuse(path[0] if path else "", "pair", code, detail)
    if changed:
        run.id  # noqa: B018  a link table that changed is worth a row, too


def make_masks(conn: psycopg.Connection[Any], run: Run) -> None:
    """Rasterise every polygon of the root whose pairing has no mask yet; commits every 1,000."""
    while True:
        todo = conn.execute(
            "SELECT p.id, a.id, a.points, a.rings, a.convention, a.shift_x, a.shift_y, i.rows, i.columns "
            "FROM pairing p JOIN annotation a ON a.id = p.annotation_id AND a.kind = 'polygon' JOIN file f ON f.id = a.file_id "
            "JOIN image i ON i.id = p.image_id "
            "WHERE f.root_id = %s AND p.state <> 'rejected' AND NOT EXISTS (SELECT FROM mask m WHERE m.pairing_id = p.id) LIMIT %s",
            [run.root_id, MASKS_PER_COMMIT],
        ).fetchall()
        if not todo:
            return
        empty = []
        with conn.cursor().copy(
            "COPY mask (pairing_id, rows, columns, box_row, box_column, box_rows, box_columns, bits) FROM STDIN"
        ) as copy:
            for pairing_id, annotation_id, points, rings, convention, shift_x, shift_y, rows, columns in todo:
                raster = contours.rasterise(unflatten(points, rings), rows, columns, convention=convention, shift=(shift_x, shift_y))
                copy.write_row((pairing_id, rows, columns, *boxed(raster)))
                if not raster.any():
                    empty.append(annotation_id)
        for annotation_id in empty:
            flag(conn, annotation_id, "MASK-EMPTY", "no pixel's centre lies inside the polygon")
        conn.commit()


def unflatten(points: Sequence[float], rings: Sequence[int]) -> list[NDArray[np.float64]]:
    """Return the rings, each (n, 2) float64, of a polygon as a row keeps it."""
    flat = np.asarray(points, np.float64).reshape(-1, 2)
    return np.split(flat, np.cumsum(rings)[:-1]) if len(rings) else []


def boxed(raster: NDArray[np.bool_]) -> tuple[int, int, int, int, bytes]:
    """Return (first row, first column, rows, columns, packed bits) of what a mask row keeps of a raster."""
    top, left, (rows, columns) = 0, 0, raster.shape
    if raster.size > FULL_FRAME_PX:
        inside_rows, inside_columns = np.flatnonzero(raster.any(axis=1)), np.flatnonzero(raster.any(axis=0))
        top, left = (int(inside_rows[0]), int(inside_columns[0])) if inside_rows.size else (0, 0)
        rows = int(inside_rows[-1]) - top + 1 if inside_rows.size else 0
        columns = int(inside_columns[-1]) - left + 1 if inside_columns.size else 0
    return top, left, rows, columns, contours.pack(raster[top : top + rows, left : left + columns])
