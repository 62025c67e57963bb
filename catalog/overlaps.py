"""Table `overlap`: which masks rules compare, and how many pixels they have in common.

Compared are, of current annotations whose pairing is accepted: on one image, what lies inside what (table `relation`, one reader), the
inner one first, and one structure that was drawn twice, the older first; and of one structure and reader within a series the next slice
(same phase) and the next phase (same position). What is next follows from position, phase and trigger time, never from a file's name or
number, and only among images of one orientation, size and spacing: of others no pixel lies behind the same pixel.

The rows say what is so now: `bring_up` adds what is missing and takes away what is no more. An ingest calls it for its root,
`catalog qa run` for what it looks at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import psycopg

from catalog import contours

PAIRS_AT_ONCE = 4_000

SCOPE = "SELECT series_id FROM scope"
OF_ROOT = """
SELECT n.series_id FROM file f JOIN annotation a ON a.file_id = f.id AND a.current JOIN pairing p ON p.annotation_id = a.id
JOIN image i ON i.id = p.image_id JOIN instance n ON n.id = i.instance_id WHERE f.root_id = %(root)s
"""

# 0.01 mm is what phases are numbered by, too.
WANTED = """
CREATE TEMP TABLE wanted_overlap ON COMMIT DROP AS
WITH drawn AS MATERIALIZED (
    SELECT p.id, p.image_id, a.structure_id, a.reader_id, n.series_id, i.position, i.phase, i.trigger_time,
           i.image_orientation, i.rows, i.columns, i.row_spacing, i.column_spacing
    FROM instance n JOIN image i ON i.instance_id = n.id JOIN pairing p ON p.image_id = i.id AND p.state = 'accepted'
    JOIN annotation a ON a.id = p.annotation_id AND a.current JOIN mask m ON m.pairing_id = p.id
    WHERE n.series_id IN ({series})
), slice AS (
    SELECT id, lead(id) OVER mine AS other_id, lead(position) OVER mine - position AS apart FROM drawn WHERE position IS NOT NULL
    WINDOW mine AS (PARTITION BY series_id, structure_id, reader_id, phase, rows, columns, row_spacing, column_spacing, image_orientation
                    ORDER BY position, id)
), phase AS (
    SELECT id, lead(id) OVER mine AS other_id, lead(trigger_time) OVER mine - trigger_time AS apart, lead(phase) OVER mine - phase AS steps
    FROM drawn WHERE position IS NOT NULL AND phase IS NOT NULL
    WINDOW mine AS (PARTITION BY series_id, structure_id, reader_id, round(position * 100), rows, columns, row_spacing, column_spacing,
                    image_orientation ORDER BY phase, id)
)
SELECT d.id AS pairing_id, e.id AS other_id, 'image' AS kind, 0::float8 AS apart
FROM relation r JOIN structure s ON s.name = r.inside JOIN structure t ON t.name = r.outside
JOIN drawn d ON d.structure_id = s.id JOIN drawn e ON e.image_id = d.image_id AND e.reader_id = d.reader_id AND e.structure_id = t.id
UNION ALL
SELECT d.id, e.id, 'image', 0
FROM drawn d JOIN drawn e ON e.image_id = d.image_id AND e.structure_id = d.structure_id AND e.id > d.id
UNION ALL
SELECT id, other_id, 'slice', apart FROM slice WHERE apart >= 0.01
UNION ALL
SELECT id, other_id, 'phase', apart FROM phase WHERE steps = 1
"""

TAKE_AWAY = """
DELETE FROM overlap o WHERE o.pairing_id IN (
    SELECT p.id FROM instance n JOIN image i ON i.instance_id = n.id JOIN pairing p ON p.image_id = i.id WHERE n.series_id IN ({series}))
AND NOT EXISTS (
    SELECT FROM wanted_overlap w WHERE (w.pairing_id, w.other_id, w.kind, w.apart) = (o.pairing_id, o.other_id, o.kind, o.apart))
"""

MISSING = """
SELECT w.pairing_id, w.other_id, w.kind, w.apart FROM wanted_overlap w
WHERE NOT EXISTS (SELECT FROM overlap o WHERE (o.pairing_id, o.other_id) = (w.pairing_id, w.other_id)) ORDER BY 1, 2
"""

MASKS = """
SELECT m.pairing_id, m.box_row, m.box_column, m.box_rows, m.box_columns, m.bits,
       i.image_position, i.image_orientation, i.row_spacing, i.column_spacing
FROM mask m JOIN pairing p ON p.id = m.pairing_id JOIN image i ON i.id = p.image_id WHERE m.pairing_id = ANY(%s)
"""

STAGED = """
CREATE TEMP TABLE IF NOT EXISTS overlap_staged (pairing_id bigint, other_id bigint, kind text, apart float8, pixels bigint)
ON COMMIT DELETE ROWS
"""
# One of the two may have gone meanwhile, and another program may have done the same.
WRITE = """
INSERT INTO overlap (pairing_id, other_id, kind, apart, pixels)
SELECT s.* FROM overlap_staged s JOIN pairing p ON p.id = s.pairing_id JOIN pairing q ON q.id = s.other_id ON CONFLICT DO NOTHING
"""


@dataclass(frozen=True, slots=True)
class Boxed:
    """A mask row, and where its image lies."""

    row: int
    column: int
    rows: int
    columns: int
    bits: bytes
    position: Sequence[float] | None
    orientation: Sequence[float] | None
    row_spacing: float | None
    column_spacing: float | None


def bring_up(conn: psycopg.Connection[Any], root_id: int | None = None) -> int:
    """Bring the rows of a root's series, by default of all series in the table `scope`, up to what is there now.

    The caller commits. Returns how many rows were added.
    """
    series = SCOPE if root_id is None else OF_ROOT
    root = {"root": root_id}
    conn.execute("DROP TABLE IF EXISTS wanted_overlap")
    conn.execute(WANTED.format(series=series).encode(), root)
    conn.execute("ANALYZE wanted_overlap")
    conn.execute(TAKE_AWAY.format(series=series).encode(), root)
    missing = conn.execute(MISSING).fetchall()
    if not missing:
        return 0
    conn.execute(STAGED)
    for start in range(0, len(missing), PAIRS_AT_ONCE):
        pairs = missing[start : start + PAIRS_AT_ONCE]
        rows = conn.execute(MASKS, [list({one for pair in pairs for one in pair[:2]})], binary=True)
        masks = {pairing_id: Boxed(*mask) for pairing_id, *mask in rows}
        with conn.cursor().copy("COPY overlap_staged FROM STDIN") as copy:
            for pairing_id, other_id, kind, apart in pairs:
                if pairing_id in masks and other_id in masks:
                    copy.write_row((pairing_id, other_id, kind, apart, in_common(masks[pairing_id], masks[other_id])))
    conn.execute(WRITE)
    conn.execute("TRUNCATE overlap_staged")
    if len(missing) >= PAIRS_AT_ONCE:
        conn.execute("ANALYZE overlap")
    return len(missing)


def in_common(one: Boxed, other: Boxed) -> int:
    """Return how many pixels lie in both masks, seen along the slice normal; the other is moved to the nearest whole pixel."""
    down, right = _offset(one, other)
    top, left = max(one.row, other.row + down), max(one.column, other.column + right)
    bottom = min(one.row + one.rows, other.row + down + other.rows)
    end = min(one.column + one.columns, other.column + right + other.columns)
    if top >= bottom or left >= end:
        return 0
    here = contours.unpack(one.bits, one.rows, one.columns)
    there = contours.unpack(other.bits, other.rows, other.columns)
    here = here[top - one.row : bottom - one.row, left - one.column : end - one.column]
    first_row, first_column = other.row + down, other.column + right
    there = there[top - first_row : bottom - first_row, left - first_column : end - first_column]
    return int(np.count_nonzero(here & there))


def _offset(one: Boxed, other: Boxed) -> tuple[int, int]:
    """Return the row and column of the first image behind which the first pixel of the other one lies."""
    if one.position is None or other.position is None or one.position == other.position or one.orientation is None:
        return 0, 0
    step = np.subtract(other.position, one.position)
    down = float(step @ one.orientation[3:]) / (one.row_spacing or 1.0)
    right = float(step @ one.orientation[:3]) / (one.column_spacing or 1.0)
    # Beyond this no two boxes meet.
    return int(np.clip(np.rint(down), -1e6, 1e6)), int(np.clip(np.rint(right), -1e6, 1e6))
