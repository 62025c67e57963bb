"""Polygons whose coordinates count from another origin: moved by a shift, as new versions.

Points stay as they were read; a version says by how much they are moved before the mask is made (`annotation.shift_x`, `shift_y`). What
was decided goes along: pairings with who decided them, flags that are open or were called false positives. Masks, shapes and what rules
compare are made anew, all in one transaction; how well the contours follow the edges is for `catalog measure`. A file that is ingested
again and holds the same stays as it is here; one that holds something else is a version as read.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

import psycopg

from catalog import overlaps, pairings, roots
from catalog.database import Database
from catalog.errors import CatalogError, UsageError
from catalog.flags import person, transaction, written

FURTHEST_PX = 1_000.0

CHOSEN = """
CREATE TEMP TABLE to_shift ON COMMIT DROP AS
SELECT a.id AS old_id, a.file_id, a.source_key, s.name AS structure, a.shift_x, a.shift_y,
       (a.shift_x, a.shift_y) IS DISTINCT FROM (%(x)s::float8, %(y)s::float8) AS changes
FROM annotation a JOIN file f ON f.id = a.file_id JOIN structure s ON s.id = a.structure_id JOIN reader r ON r.id = a.reader_id
WHERE f.root_id = %(root)s AND a.current AND a.kind = 'polygon' AND s.name = coalesce(%(structure)s, s.name)
  AND r.name = coalesce(%(reader)s, r.name)
"""
COUNTED = """
SELECT count(*) FILTER (WHERE changes), count(*) FILTER (WHERE NOT changes),
       count(*) FILTER (WHERE changes AND EXISTS (SELECT FROM pairing p WHERE p.annotation_id = old_id AND p.state = 'accepted'))
FROM to_shift
"""
BY_STRUCTURE = "SELECT structure, count(*) FROM to_shift WHERE changes GROUP BY 1 ORDER BY 1"

COPIED = (
    "reader_id, structure_id, kind, origin, label, points, rings, convention, polygon_area_px, rows, columns, box, bits, content_hash, "
    "refers_to, ingest_run_id"
)
STEPS = (
    "DELETE FROM to_shift WHERE NOT changes",
    "UPDATE annotation SET current = false WHERE id IN (SELECT old_id FROM to_shift)",
    f"""
    INSERT INTO annotation (file_id, source_key, version, shift_x, shift_y, {COPIED})
    SELECT file_id, source_key,
           1 + (SELECT max(o.version) FROM annotation o WHERE o.file_id = a.file_id AND o.source_key = a.source_key), %(x)s, %(y)s, {COPIED}
    FROM annotation a WHERE id IN (SELECT old_id FROM to_shift) ORDER BY id
    """,  # noqa: S608
    """
    CREATE TEMP TABLE shifted ON COMMIT DROP AS
    SELECT t.old_id, a.id AS new_id FROM to_shift t JOIN annotation a ON (a.file_id, a.source_key) = (t.file_id, t.source_key) AND a.current
    """,
    # In the order in which they came: what an ingest says about them depends on it.
    """
    INSERT INTO pairing (annotation_id, image_id, method, rule, score, state, actor, at)
    SELECT s.new_id, p.image_id, p.method, p.rule, p.score, p.state, p.actor, p.at
    FROM pairing p JOIN shifted s ON s.old_id = p.annotation_id ORDER BY p.id
    """,
    """
    CREATE TEMP TABLE shifted_pairing ON COMMIT DROP AS
    SELECT p.id AS old_id, q.id AS new_id FROM shifted s JOIN pairing p ON p.annotation_id = s.old_id
    JOIN pairing q ON (q.annotation_id, q.image_id) = (s.new_id, p.image_id)
    """,
    "ANALYZE shifted, shifted_pairing",
    # What making masks finds, it finds anew.
    """
    UPDATE flag SET state = 'resolved', closed_by = 'ingest', closed_at = now(), reason = %(retired)s
    WHERE state = 'open' AND raised_by = 'ingest' AND (
        annotation_id IN (SELECT old_id FROM shifted) AND rule IN ('MASK-EMPTY', 'MASK-AREA', 'MASK-GEOMETRY')
        OR pairing_id IN (SELECT old_id FROM shifted_pairing) AND rule = 'PAIR-PLANE')
    """,
)
MOVE_FLAGS = (
    "UPDATE flag g SET annotation_id = s.new_id FROM shifted s WHERE g.annotation_id = s.old_id AND g.state IN ('open', 'false_positive')",
    "UPDATE flag g SET pairing_id = s.new_id FROM shifted_pairing s "
    "WHERE g.pairing_id = s.old_id AND g.state IN ('open', 'false_positive')",
)
# What a person called a false positive, and making the masks raised again.
STILL_FALSE = """
UPDATE flag g SET state = 'false_positive', closed_by = f.closed_by, closed_at = now(), reason = f.reason
FROM flag f JOIN shifted s ON s.new_id = f.annotation_id
WHERE g.state = 'open' AND g.raised_by = 'ingest' AND f.state = 'false_positive'
  AND (f.annotation_id, f.rule) = (g.annotation_id, g.rule) AND (f.value IS NULL OR abs(g.value - f.value) <= 0.05 * abs(f.value))
"""


@dataclass(slots=True)
class Shifted:
    """What a shift did; in a dry run, what it would do."""

    root: str
    x: float  # px added to what was read
    y: float
    annotations: int = 0  # new versions
    unchanged: int = 0  # had that shift already
    accepted: int = 0  # of the new versions, those that are paired
    flags: int = 0  # that went along
    structures: dict[str, int] = field(default_factory=dict)


def parse(by: str) -> tuple[float, float]:
    """Return a shift in px written as ``X,Y``. Raises UsageError if it is none."""
    number = r"[+-]?(?:\d+\.?\d*|\.\d+)"
    match = re.fullmatch(rf"\s*({number})\s*,\s*({number})\s*", by, re.ASCII)
    if match is None or not max(abs(float(match[1])), abs(float(match[2]))) <= FURTHEST_PX:
        raise UsageError(f"--by: is two numbers of px with a comma between, such as -1,-1, up to {FURTHEST_PX:g}")
    return float(match[1]) + 0.0, float(match[2]) + 0.0


def shift(
    database: Database,
    root: str,
    *,
    by: tuple[float, float],
    reason: str,
    structure: str | None = None,
    reader: str | None = None,
    actor: str | None = None,
    dry_run: bool = False,
) -> Shifted:
    """Move the current polygons of a root, those of a structure or reader alone if one is named.

    Args:
        by: px added to x and y as they were read, whatever was added before: (0, 0) undoes a shift.

    Raises:
        CatalogError: If there is no such root, or nothing of that structure and reader in it, or an ingest of it is running.
    """
    if not all(math.isfinite(value) and abs(value) <= FURTHEST_PX for value in by):
        raise UsageError(f"by: is finite and at most {FURTHEST_PX:g} px, not {by}")
    reason, actor = written(reason, "-m"), person(actor)
    x, y = by
    with transaction(database, dry_run=dry_run) as conn:
        row = conn.execute("SELECT id FROM root WHERE name = %s", [root]).fetchone()
        if row is None:
            raise UsageError(f"root {root!r}: there is none of this name; see `catalog root list`")
        roots.alone(conn, [row[0]])
        done = Shifted(root, x, y)
        parameters = {"root": row[0], "x": x, "y": y, "structure": structure, "reader": reader, "retired": pairings.RETIRED}
        conn.execute(CHOSEN, parameters)
        counted = conn.execute(COUNTED).fetchone()
        assert counted is not None
        done.annotations, done.unchanged, done.accepted = counted
        if not done.annotations + done.unchanged:
            of = "".join(f" of {what} {name!r}" for what, name in (("structure", structure), ("reader", reader)) if name is not None)
            raise CatalogError(f"root {root!r}: holds no current polygon{of}, so nothing was done; see `catalog status`")
        done.structures = dict(conn.execute(BY_STRUCTURE).fetchall())
        if done.annotations and not dry_run:  # numbers of inserted rows would be used up
            done.flags = _write(conn, row[0], parameters, actor, reason)
    return done


def _write(conn: psycopg.Connection[Any], root_id: int, parameters: dict[str, Any], actor: str, reason: str) -> int:
    conn.execute("SELECT set_config('catalog.actor', %s, true), set_config('catalog.reason', %s, true)", [actor, reason])
    for statement in STEPS:
        conn.execute(statement.encode(), parameters)
    moved = sum(conn.execute(statement.encode()).rowcount for statement in MOVE_FLAGS)
    pairings.make_masks(conn, root_id, commit=False)
    conn.execute(STILL_FALSE)
    overlaps.bring_up(conn, root_id)
    return moved
