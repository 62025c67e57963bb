"""Proposed labels: what lies inside a structure that somebody drew, found by intensities.

Proposals are annotations of origin ``proposed``: their parent is the drawn one around them, in whose file they stand, and with which
they go. They are fed only where a feed's ``origins`` ask for them. Asked again, the same proposals are made again, which changes nothing;
what a person rejected stays rejected as long as it would be the same. What can no longer be derived, since the parent is not accepted any
more or somebody has drawn the inside by now, is retired.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from uuid import UUID

import numpy as np
import psycopg
from psycopg import sql
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from catalog import __version__, inside, overlaps, pairings, roots, viewing
from catalog.contours import unboxed
from catalog.database import Database, explain
from catalog.errors import CatalogError, FileError, UsageError
from catalog.flags import person, transaction, written
from catalog.inside import Method
from catalog.processes import Progress
from catalog.records import Segment, segment
from catalog.selection import DRAWN, conditions, unknown_structure
from catalog.workers import mapped

READER = "threshold"
SCORE = 0.5  # of a pairing: on which image it lies is sure, what it says is a guess
AT_ONCE = 20_000  # images in memory
MOST_JUDGED = 500  # proposals compared with what was drawn where nothing else is asked of these images; at random where there are more
# What the trigger retire_derived writes: no person rejected these.
PARENT_GONE = "what it was made from is not accepted any more"

AROUND = """
SELECT s.sample_id, s.sample_key, p.id AS around, s.annotation_id AS parent, (
    SELECT q.id FROM pairing q JOIN annotation b ON b.id = q.annotation_id JOIN structure t ON t.id = b.structure_id
    JOIN reader r ON r.id = b.reader_id JOIN mask m ON m.pairing_id = q.id
    WHERE q.image_id = s.sample_id AND q.state = 'accepted' AND b.current AND b.origin = ANY(%(drawn)s) AND t.name = %(inner)s
    ORDER BY r.preference, b.id LIMIT 1) AS drawn
FROM (SELECT * FROM sample WHERE {conditions} AND structure = %(outer)s AND area_px > 0) s
JOIN pairing p ON p.annotation_id = s.annotation_id AND p.image_id = s.sample_id ORDER BY s.sample_id
"""
MASKS = "SELECT pairing_id, rows, columns, box_row, box_column, box_rows, box_columns, bits FROM mask WHERE pairing_id = ANY(%s)"

STAGED = """
CREATE TEMP TABLE proposed_staged (
    image_id bigint PRIMARY KEY, parent_id bigint, source_key text, rows integer, columns integer, box integer[], bits bytea,
    content_hash bytea, parameters jsonb
) ON COMMIT DROP
"""
# Current proposals of that structure, whatever they were made from: an image has one at most.
STANDING = """
CREATE TEMP TABLE standing ON COMMIT DROP AS
SELECT a.id AS annotation_id, p.id AS pairing_id, p.image_id, p.state, p.rule, d.first_id AS parent_id, d.method, a.content_hash, f.root_id,
       o.name AS outside
FROM annotation a JOIN derivation d ON d.annotation_id = a.id JOIN pairing p ON p.annotation_id = a.id JOIN file f ON f.id = a.file_id
JOIN structure s ON s.id = a.structure_id JOIN annotation parent ON parent.id = d.first_id JOIN structure o ON o.id = parent.structure_id
WHERE a.current AND a.origin = 'proposed' AND s.name = %(inner)s
"""
ROOTS = """
SELECT f.root_id FROM proposed_staged t JOIN annotation a ON a.id = t.parent_id JOIN file f ON f.id = a.file_id
UNION SELECT root_id FROM standing ORDER BY 1
"""
# While pixels were read a parent may have been decided on, or a contour drawn.
DERIVABLE = """
CREATE TEMP TABLE derivable ON COMMIT DROP AS
SELECT x.image_id, x.parent_id FROM (SELECT image_id, parent_id FROM proposed_staged UNION SELECT image_id, parent_id FROM standing) x
JOIN annotation a ON a.id = x.parent_id AND a.current
JOIN pairing p ON (p.annotation_id, p.image_id, p.state) = (a.id, x.image_id, 'accepted')
WHERE %(also_drawn)s OR NOT EXISTS (
    SELECT FROM pairing q JOIN annotation b ON b.id = q.annotation_id JOIN structure t ON t.id = b.structure_id
    WHERE q.image_id = x.image_id AND q.state = 'accepted' AND b.current AND b.origin = ANY(%(drawn)s) AND t.name = %(inner)s)
"""
OVERTAKEN = """
DELETE FROM proposed_staged t WHERE NOT EXISTS (SELECT FROM derivable d WHERE (d.image_id, d.parent_id) = (t.image_id, t.parent_id))
"""
# Made already: neither new, nor to be replaced.
SAME = """
CREATE TEMP TABLE same ON COMMIT DROP AS
SELECT s.annotation_id, s.pairing_id, s.image_id, s.state = 'rejected' AND s.rule = %(parent_gone)s AS back,
       s.state = 'rejected' AND s.rule <> %(parent_gone)s AS rejected
FROM standing s JOIN proposed_staged t ON (s.image_id, s.parent_id, s.content_hash) = (t.image_id, t.parent_id, t.content_hash)
WHERE s.method = %(method)s
"""
KEPT = "DELETE FROM proposed_staged t USING same s WHERE s.image_id = t.image_id"
REPLACED = "SELECT s.annotation_id FROM standing s JOIN proposed_staged t USING (image_id)"
# What is replaced is not gone.
GONE = """
SELECT s.annotation_id FROM standing s WHERE s.outside = %(outer)s
AND NOT EXISTS (SELECT FROM proposed_staged t WHERE t.image_id = s.image_id)
AND NOT EXISTS (SELECT FROM derivable d WHERE (d.image_id, d.parent_id) = (s.image_id, s.parent_id))
"""

WRITE = (
    "INSERT INTO reader (name, preference) VALUES (%(reader)s, 1000) ON CONFLICT DO NOTHING",
    "INSERT INTO structure (name) VALUES (%(inner)s) ON CONFLICT DO NOTHING",
    """
    INSERT INTO annotation (file_id, source_key, version, reader_id, structure_id, kind, origin, rows, columns, box, bits, content_hash,
        ingest_run_id)
    SELECT a.file_id, t.source_key,
           1 + coalesce((SELECT max(o.version) FROM annotation o WHERE o.file_id = a.file_id AND o.source_key = t.source_key), 0),
           (SELECT id FROM reader WHERE name = %(reader)s), (SELECT id FROM structure WHERE name = %(inner)s),
           'segment', 'proposed', t.rows, t.columns, t.box, t.bits, t.content_hash, a.ingest_run_id
    FROM proposed_staged t JOIN annotation a ON a.id = t.parent_id ORDER BY t.image_id
    """,
    """
    CREATE TEMP TABLE made ON COMMIT DROP AS
    SELECT b.id AS annotation_id, t.image_id, t.parent_id, t.parameters FROM proposed_staged t JOIN annotation a ON a.id = t.parent_id
    JOIN annotation b ON b.file_id = a.file_id AND b.source_key = t.source_key AND b.current
    """,
    """
    INSERT INTO derivation (annotation_id, method, first_id, parameters, program_version, actor)
    SELECT annotation_id, %(method)s, parent_id, parameters, %(version)s, %(actor)s FROM made ORDER BY annotation_id
    """,
    """
    INSERT INTO pairing (annotation_id, image_id, method, rule, score, state, actor)
    SELECT annotation_id, image_id, %(reader)s, %(rule)s, %(score)s, 'accepted', %(actor)s FROM made ORDER BY annotation_id
    """,
)
ACCEPT = "UPDATE pairing SET state = 'accepted', rule = %(rule)s, actor = %(actor)s, at = now() WHERE id = ANY(%(ids)s)"


class Target(NamedTuple):
    """An image on which something was drawn that has an inside."""

    sample_id: int
    sample_key: UUID
    around: int  # its pairing
    parent: int  # its annotation
    drawn: int | None  # the pairing of the inside that somebody drew

    def wanted(self, also_drawn: bool) -> bool:
        """Say whether a proposal is to be made."""
        return also_drawn or self.drawn is None


class Task(NamedTuple):
    """What a process needs: a row of viewing.IMAGES, and rows of MASKS without their first column."""

    target: Target
    image: viewing.Image
    around: tuple[Any, ...]
    drawn: tuple[Any, ...] | None
    method: Method


class Outcome(NamedTuple):
    """What became of a task; neither a segment nor a problem: intensities tell nothing apart."""

    target: Target
    segment: Segment | None = None
    parameters: dict[str, float | bool] | None = None
    dice: float | None = None  # against what was drawn
    problem: str = ""


@dataclass(slots=True)
class Judged:
    """Dice of proposals against what was drawn on the same images."""

    images: int
    least: float
    lower: float  # quartile
    median: float
    upper: float  # quartile


@dataclass(slots=True)
class Proposed:
    """What was proposed; in a dry run, what would be."""

    outer: str
    inner: str
    method: str
    images: int = 0  # that have the outer one
    drawn: int = 0  # of them, those whose inside is drawn and that were left out for it
    proposed: int = 0  # new, or new versions
    replaced: int = 0  # of them, new versions
    unchanged: int = 0
    rejected: int = 0  # of the unchanged, those that a person rejected
    returned: int = 0  # accepted again, as what they were made from is
    retired: int = 0  # can no longer be derived
    nothing: int = 0  # images where intensities tell nothing apart
    judged: Judged | None = None
    problems: list[str] = field(default_factory=list)


def threshold(
    database: Database,
    *,
    outer: str,
    inner: str | None = None,
    method: Method = Method.EDGES,
    also_drawn: bool = False,
    actor: str | None = None,
    jobs: int | None = None,
    dry_run: bool = False,
    progress: Progress = lambda done, total: None,
) -> Proposed:
    """Propose what lies inside a drawn structure, on every image that has it accepted and without an open error.

    Args:
        inner: What to call it; by default what table relation says lies inside `outer`.
        also_drawn: On images, too, where somebody drew it. By default these only serve to judge the method.
        progress: Called with (images done, images).

    Raises:
        UsageError: If there is no such structure, or it is not said, or not plain, what the inside is called.
        CatalogError: If SciPy is not there, no image has such a structure, the database refuses, or an ingest is running.
    """
    inside.needed()
    outer, actor = written(outer, "--outer"), person(actor)
    with transaction(database) as conn:
        if said := unknown_structure(conn, [outer]):
            raise UsageError(f"--outer {said}")
        inner = _inner(conn, outer, inner)
        targets = _targets(conn, outer, inner)
    if not targets:
        raise CatalogError(f"{outer}: no image has a mask of it that somebody drew and that can be read; see `catalog status`")
    done = Proposed(outer, inner, method.value, len(targets), sum(not one.wanted(also_drawn) for one in targets))
    outcomes = list(_outcomes(database, _chosen(targets, also_drawn), method, jobs, progress))
    done.nothing = sum(one.segment is None and not one.problem for one in outcomes)
    done.problems = [f"sample {one.target.sample_id}: {one.problem}" for one in outcomes if one.problem]
    done.judged = _judged([one.dice for one in outcomes if one.dice is not None])
    wanted = [one for one in outcomes if one.segment is not None and one.target.wanted(also_drawn)]
    parameters = {
        "outer": outer, "inner": inner, "method": method.value, "also_drawn": also_drawn, "drawn": list(DRAWN), "actor": actor,
        "reader": READER, "score": SCORE, "rule": inside.SAID[method].format(outer), "version": __version__,
        "parent_gone": PARENT_GONE,
    }  # fmt: skip
    with transaction(database, dry_run=dry_run) as conn:
        conn.execute("SELECT set_config('catalog.actor', %s, true)", [actor])
        _write(conn, done, wanted, parameters, dry_run)
    return done


def _inner(conn: psycopg.Connection[Any], outer: str, inner: str | None) -> str:
    if inner is not None:
        inner = written(inner, "--inner")
        if inner == outer:
            raise UsageError(f"--inner: {inner} cannot lie inside itself; name two structures")
        return inner
    names = [name for (name,) in conn.execute("SELECT inside FROM relation WHERE outside = %s ORDER BY 1", [outer])]
    if len(names) != 1:
        says = f"{', '.join(names)} lie" if names else "nothing is said to lie"
        raise UsageError(f"--inner: {says} inside {outer} (table relation); say how to call what is proposed")
    return str(names[0])


def _targets(conn: psycopg.Connection[Any], outer: str, inner: str) -> list[Target]:
    feedable, parameters = conditions(of_structures=True)
    query = sql.SQL(AROUND).format(conditions=sql.SQL(" AND ").join(feedable))
    rows = conn.execute(query, {**parameters, "outer": outer, "inner": inner, "drawn": list(DRAWN)})
    return [Target(*row) for row in rows]


def _chosen(targets: Sequence[Target], also_drawn: bool) -> list[Target]:
    """Return where something is proposed, and some where it can be judged."""
    judging = [one for one in targets if not one.wanted(also_drawn)]
    if len(judging) > MOST_JUDGED:
        picked = np.random.default_rng(0).choice(len(judging), MOST_JUDGED, replace=False)
        judging = [judging[at] for at in sorted(picked.tolist())]
    return [one for one in targets if one.wanted(also_drawn)] + judging


def _outcomes(database: Database, targets: Sequence[Target], method: Method, jobs: int | None, progress: Progress) -> Iterator[Outcome]:
    for start in range(0, len(targets), AT_ONCE):
        # No transaction stays open while pixels are read.
        try:
            with database.connect(application_name="catalog threshold") as conn:
                tasks = _tasks(conn, targets[start : start + AT_ONCE], method)
        except psycopg.Error as error:
            raise explain(error, database) from error
        for at, outcome in enumerate(mapped(propose_all, tasks, died=_died, jobs=jobs), start + 1):
            progress(at, len(targets))
            yield outcome


def _tasks(conn: psycopg.Connection[Any], targets: Sequence[Target], method: Method) -> list[Task]:
    wanted = [pairing for one in targets for pairing in (one.around, one.drawn) if pairing is not None]
    masks = {pairing: tuple(mask) for pairing, *mask in conn.execute(MASKS, [wanted], binary=True)}
    with conn.cursor(row_factory=dict_row) as cursor:
        images = {row["sample_id"]: row for row in cursor.execute(viewing.IMAGES, [[one.sample_id for one in targets]])}
    return [
        Task(one, images[one.sample_id], masks[one.around], masks.get(one.drawn or 0), method)
        for one in targets
        if one.sample_id in images and one.around in masks
    ]


def propose_all(tasks: Sequence[Task]) -> list[Outcome]:
    """Propose on some images. Runs in a process of its own."""
    return [_propose(task) for task in tasks]


def _propose(task: Task) -> Outcome:
    try:
        if why := viewing.unreadable(task.image):
            raise FileError("missing", why)
        pixels = viewing.pixels(task.image)
    except FileError as error:
        return Outcome(task.target, problem=str(error))
    except Exception as error:  # one file must not stop the others; the text could hold a value of its header
        return Outcome(task.target, problem=f"reading it failed with {type(error).__name__}")
    around = _mask(task.around)
    if pixels.ndim != 2:
        return Outcome(task.target, problem="is a colour image, of which no intensity is known")
    if pixels.shape != around.shape:
        return Outcome(task.target, problem="has its mask on another grid")
    found = inside.found(pixels, around, task.method)
    if found is None:
        return Outcome(task.target)
    same = None if task.drawn is None else inside.dice(found.mask, _mask(task.drawn))
    return Outcome(task.target, segment(found.mask), found.parameters, same)


def _died(task: Task) -> Outcome:
    return Outcome(task.target, problem="the process that decoded it died")


def _mask(row: tuple[Any, ...]) -> Any:
    rows, columns, *box, bits = row
    return unboxed(rows, columns, (box[0], box[1], box[2], box[3]), bytes(bits))


def _judged(found: Sequence[float]) -> Judged | None:
    if not found:
        return None
    return Judged(len(found), *(round(float(value), 4) for value in np.percentile(found, (0, 25, 50, 75))))


def _write(conn: psycopg.Connection[Any], done: Proposed, wanted: Sequence[Outcome], parameters: dict[str, Any], dry_run: bool) -> None:
    conn.execute(STAGED)
    with conn.cursor().copy("COPY proposed_staged FROM STDIN") as copy:
        for target, raster, found, *_ in wanted:
            assert raster is not None
            key = f"{READER}:{done.inner}:{target.sample_key}"
            shape = (raster.rows, raster.columns, list(raster.box), raster.bits, raster.content_hash)
            copy.write_row((target.sample_id, target.parent, key, *shape, Jsonb(found)))
    conn.execute(STANDING, parameters)
    root_ids = _ids(conn, ROOTS, parameters)
    roots.alone(conn, root_ids)
    # From here on nobody else decides on these roots; what stands is looked at again.
    conn.execute("DROP TABLE standing")
    for statement in (STANDING, DERIVABLE, "ANALYZE proposed_staged, standing, derivable", OVERTAKEN, SAME, KEPT):
        conn.execute(statement, parameters)
    back = _ids(conn, "SELECT pairing_id FROM same WHERE back ORDER BY 1", parameters)
    [done.rejected] = _ids(conn, "SELECT count(*) FROM same WHERE rejected", parameters)
    [done.unchanged] = _ids(conn, "SELECT count(*) FROM same WHERE NOT back", parameters)
    [done.proposed] = _ids(conn, "SELECT count(*) FROM proposed_staged", parameters)
    replaced, gone = _ids(conn, REPLACED, parameters), _ids(conn, GONE, parameters)
    done.returned, done.replaced, done.retired = len(back), len(replaced), len(gone)
    if dry_run or not (done.proposed or back or gone):  # in a dry run numbers of inserted rows would be used up
        return
    if replaced or gone:
        pairings.retire_ids(conn, [*replaced, *gone])
    if back:
        conn.execute(ACCEPT, {**parameters, "ids": back})
    for statement in WRITE if done.proposed else ():
        conn.execute(statement, parameters)
    for root_id in root_ids:
        pairings.make_masks(conn, root_id, commit=False)
        overlaps.bring_up(conn, root_id)


def _ids(conn: psycopg.Connection[Any], query: str, parameters: dict[str, Any]) -> list[int]:
    return [number for (number,) in conn.execute(query.encode(), parameters)]
