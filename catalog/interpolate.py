"""Labels between labels: what lies between two drawn slices of the same phase, or two drawn phases at the same position.

Which images: those of a series that have none, of one grid, spacing and orientation with two that were drawn, between them by position
along the slice normal or by trigger time, never by a file's name or number; never beyond the outermost, never where the two are
further apart than the limit. Time ends with the cycle: what lies between its last drawn phase and its first is beyond the outermost.
What is derived is an annotation of origin `interpolated` in the file of its first parent, left out of feeding unless asked for. Again
changes nothing; what can no longer be derived is retired. The masks themselves: `catalog.between`.
"""

from __future__ import annotations

import bisect
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import psycopg
from psycopg import sql

from catalog import __version__, contours, overlaps, pairings, roots, shapes
from catalog.between import Method, Outline, between, can, needed
from catalog.database import Database
from catalog.errors import CatalogError, UsageError
from catalog.flags import person, transaction
from catalog.processes import Progress
from catalog.records import Segment, segment
from catalog.selection import DRAWN, conditions, unknown_structure

Along = Literal["slices", "phases", "both"]
# Chosen by leaving drawn slices out, see docs/sets.md: over three slices of 10 mm the median Dice of inner contours is above 0.9, over
# four it is not. In time nothing can be left out of the real studies; their drawn phases are 410 to 459 ms apart.
WIDEST_MM, WIDEST_MS = 35.0, 500.0
UNITS = {"slices": "mm", "phases": "ms"}
HERE = 0.01  # mm or ms: nearer than that is the same place, as for phases (`images.number_phases`)
OFFSET_PX = 0.01  # rounding of positions in headers; the real ones are 0.001 px off
STEPS_AT_ONCE = 64  # whose parents' masks are in memory
LOST = "what it was made from is not accepted any more"  # the trigger retire_derived writes it: no person rejected that

STRUCTURE = """
SELECT s.id, array_agg(DISTINCT f.root_id) FROM structure s JOIN annotation a ON a.structure_id = s.id JOIN file f ON f.id = a.file_id
WHERE s.name = %(structure)s AND a.kind <> 'label' AND a.origin = ANY(%(drawn)s) GROUP BY s.id
"""
# Images of series in which the structure was drawn, and what on them can be a parent. What was drawn but is flagged by an error is
# none, but its image has a label.
IMAGES = """
WITH drawn AS MATERIALIZED (
    SELECT DISTINCT p.image_id FROM annotation a JOIN pairing p ON p.annotation_id = a.id AND p.state = 'accepted'
    WHERE a.structure_id = %(structure_id)s AND a.current AND a.origin = ANY(%(drawn)s) AND a.kind <> 'label'
), parent AS MATERIALIZED (
    SELECT sample_id, annotation_id FROM sample WHERE structure = %(structure)s AND kind <> 'label' AND area_px > 0 AND {parents}
), series AS MATERIALIZED (
    SELECT DISTINCT n.series_id FROM drawn d JOIN image i ON i.id = d.image_id JOIN instance n ON n.id = i.instance_id
)
SELECT n.series_id, i.id, i.sample_key, i.position, i.phase, i.trigger_time, i.rows, i.columns, i.row_spacing, i.column_spacing,
       i.image_position, i.image_orientation, p.annotation_id, d.image_id IS NOT NULL
FROM series s JOIN instance n ON n.series_id = s.series_id JOIN image i ON i.instance_id = n.id
LEFT JOIN parent p ON p.sample_id = i.id LEFT JOIN drawn d ON d.image_id = i.id
WHERE num_nonnulls(i.position, i.image_position, i.image_orientation, i.row_spacing, i.column_spacing) = 5
  AND i.row_spacing > 0 AND i.column_spacing > 0 AND i.id IN (SELECT sample_id FROM image_all WHERE {targets})
ORDER BY n.series_id, i.position, i.phase, i.sample_key
"""
OUTLINES = """
SELECT a.id, a.kind, a.points, a.rings, a.convention, a.shift_x, a.shift_y, m.rows, m.columns, m.box_row, m.box_column, m.box_rows,
       m.box_columns, m.bits, i.image_position, i.image_orientation, i.row_spacing, i.column_spacing
FROM annotation a JOIN pairing p ON p.annotation_id = a.id AND p.state = 'accepted' JOIN mask m ON m.pairing_id = p.id
JOIN image i ON i.id = p.image_id WHERE a.id = ANY(%s)
"""
THERE = """
SELECT a.source_key, a.id, a.content_hash, d.method, d.along, d.first_id, d.second_id, p.id, p.state, p.rule
FROM annotation a JOIN derivation d ON d.annotation_id = a.id JOIN pairing p ON p.annotation_id = a.id AND p.method = 'interpolate'
WHERE a.structure_id = %(structure_id)s AND a.current AND a.origin = 'interpolated'
"""
STAGED = """
CREATE TEMP TABLE derived_staged (
    source_key text, image_id bigint, first_id bigint, second_id bigint, along text, fraction float8, gap float8, rule text,
    rows integer, columns integer, box integer[], bits bytea, content_hash bytea
) ON COMMIT DROP
"""
RETURNED = "UPDATE pairing SET state = 'accepted', rule = %s, actor = %s, at = now() WHERE id = %s"
WRITE = (
    "INSERT INTO reader (name, preference) VALUES ('interpolate', 1000) ON CONFLICT DO NOTHING",
    """
    INSERT INTO annotation (file_id, source_key, version, reader_id, structure_id, kind, origin, rows, columns, box, bits, content_hash,
                            ingest_run_id)
    SELECT a.file_id, s.source_key,
           1 + coalesce((SELECT max(o.version) FROM annotation o WHERE (o.file_id, o.source_key) = (a.file_id, s.source_key)), 0),
           (SELECT id FROM reader WHERE name = 'interpolate'), %(structure_id)s, 'segment', 'interpolated', s.rows, s.columns, s.box,
           s.bits, s.content_hash, a.ingest_run_id
    FROM derived_staged s JOIN annotation a ON a.id = s.first_id ORDER BY s.source_key
    """,
    """
    CREATE TEMP TABLE derived ON COMMIT DROP AS
    SELECT s.*, a.id AS annotation_id FROM derived_staged s JOIN annotation f ON f.id = s.first_id
    JOIN annotation a ON (a.file_id, a.source_key) = (f.file_id, s.source_key) AND a.current
    """,
    """
    INSERT INTO pairing (annotation_id, image_id, method, rule, score, state, actor)
    SELECT annotation_id, image_id, 'interpolate', rule, 1, 'accepted', %(actor)s FROM derived ORDER BY annotation_id
    """,
    """
    INSERT INTO derivation (annotation_id, method, along, first_id, second_id, fraction, gap, program_version, actor)
    SELECT annotation_id, %(method)s, along, first_id, second_id, fraction, gap, %(version)s, %(actor)s FROM derived
    ORDER BY annotation_id
    """,
    "ANALYZE derivation, annotation, pairing",
)


class Image(NamedTuple):
    """A row of IMAGES."""

    series: int
    id: int
    sample_key: Any
    position: float
    phase: int | None
    time: float | None
    rows: int
    columns: int
    row_spacing: float
    column_spacing: float
    origin: Sequence[float]
    axes: Sequence[float]
    annotation: int | None  # a parent
    drawn: bool

    @property
    def grid(self) -> tuple[Any, ...]:
        """What images share of which pixels lie behind pixels."""
        spacing = (round(self.row_spacing, 4), round(self.column_spacing, 4))
        return self.rows, self.columns, *spacing, *(round(value, 4) for value in self.axes)

    def seen_from(self, other: Image) -> tuple[float, float]:
        """Return where this image's first pixel falls on another one: x, y in px."""
        step = np.subtract(self.origin, other.origin)
        x = float(step @ np.asarray(other.axes[:3])) / other.column_spacing
        y = float(step @ np.asarray(other.axes[3:])) / other.row_spacing
        return (x if abs(x) > OFFSET_PX else 0.0, y if abs(y) > OFFSET_PX else 0.0)


class Step(NamedTuple):
    """An image on which a label can be made, and what from."""

    image: Image
    first: Image  # of smaller position or time
    second: Image
    along: Literal["slices", "phases"]
    gap: float  # mm or ms from the first to the second
    fraction: float


@dataclass(slots=True)
class Interpolated:
    """What was derived; in a dry run, what would be."""

    structure: str
    method: Method
    along: dict[str, int] = field(default_factory=dict)  # labels that are there now, made along slices or phases
    widest: dict[str, float] = field(default_factory=dict)  # the widest gap among them, mm or ms
    made: int = 0
    changed: int = 0  # of those that were made, what replaced an older version
    unchanged: int = 0
    returned: int = 0  # had been rejected with a parent, which is accepted again
    retired: int = 0  # can no longer be derived
    rejected: int = 0  # would be the same as what a person rejected
    left: dict[str, int] = field(default_factory=dict)  # images without a label, by why they got none


def interpolate(
    database: Database,
    structure: str,
    *,
    along: Along = "both",
    method: Method = "shape",
    widest_mm: float = WIDEST_MM,
    widest_ms: float = WIDEST_MS,
    actor: str | None = None,
    dry_run: bool = False,
    progress: Progress = lambda done, total: None,
) -> Interpolated:
    """Make the labels of a structure that lie between drawn ones, and retire those that no longer do, all in one transaction.

    Args:
        along: Neighbours in space, in time, or of both the ones whose gap is the smaller share of its limit.
        widest_mm: The widest gap between two drawn slices, mm along the slice normal.
        widest_ms: The widest gap between two drawn phases, ms of trigger time.
        progress: Called with (masks made, of how many).

    Raises:
        UsageError: If there is no such structure, or a limit is no positive number.
        CatalogError: If nobody drew the structure, an ingest is running, or SciPy is missing where `shape` needs it.
    """
    if not all(np.isfinite(widest) and widest > 0 for widest in (widest_mm, widest_ms)):
        raise UsageError("--widest-mm and --widest-ms: are positive numbers")
    needed(method)
    actor = person(actor)
    directions: tuple[Literal["slices", "phases"], ...] = ("slices", "phases") if along == "both" else (along,)
    limits = {"slices": widest_mm, "phases": widest_ms}
    with transaction(database, dry_run=dry_run) as conn:
        row = conn.execute(STRUCTURE, {"structure": structure, "drawn": list(DRAWN)}).fetchone()
        if row is None:
            if said := unknown_structure(conn, [structure]):
                raise UsageError(f"structure {said}")
            raise CatalogError(f"structure {structure!r}: nobody drew any, so nothing lies between; see `catalog status`")
        structure_id, root_ids = row
        roots.alone(conn, root_ids)
        parameters = {"structure": structure, "structure_id": structure_id, "actor": actor, "method": method, "version": __version__}
        there = {key: rest for key, *rest in conn.execute(THERE, parameters)}
        done = Interpolated(structure, method)
        left: Counter[str] = Counter()
        steps: list[Step] = []
        for images in _by_series(conn, parameters):
            found, without = plan(images, directions, limits)
            steps += found
            left.update(without)
        conn.execute(STAGED)
        old, returned, wanted = [], [], set()
        with conn.cursor() as reading:
            rows: list[tuple[Any, ...]] = []
            for count, (step, made) in enumerate(_made(reading, steps, method), start=1):
                progress(count, len(steps))
                if isinstance(made, str):
                    left[made] += 1
                    continue
                key = f"interpolate:{structure}:{step.image.sample_key}"
                wanted.add(key)
                annotation_id, content, *how, pairing_id, state, rule = there.get(key) or [None] * 9
                same = how == [method, step.along, step.first.annotation, step.second.annotation]
                if state == "rejected" and rule != LOST and content == made.content_hash:
                    done.rejected += 1
                    continue
                done.along[step.along] = done.along.get(step.along, 0) + 1
                done.widest[step.along] = max(done.widest.get(step.along, 0.0), step.gap)
                if same and content == made.content_hash and state != "rejected":
                    done.unchanged += 1
                    continue
                if same and content == made.content_hash:
                    returned.append((pairing_id, _rule(step, method)))
                    continue
                done.made += 1
                if annotation_id is not None:
                    done.changed += 1
                    old.append(annotation_id)
                rows.append(_row(key, step, made, method))
        # Of the directions that were not asked for nothing is known: what was made along them stays.
        gone = [rest[0] for key, rest in there.items() if key not in wanted and rest[3] in directions]
        done.retired, done.returned, done.left = len(gone), len(returned), dict(sorted(left.items()))
        if not dry_run and (rows or old or gone or returned):
            _write(conn, rows, old + gone, returned, parameters, root_ids)
    return done


def plan(
    images: Sequence[Image], directions: Sequence[Literal["slices", "phases"]], limits: dict[str, float]
) -> tuple[list[Step], Counter[str]]:
    """Return on which images of one series labels can be made, and how many of the others have none, by why.

    Args:
        limits: The widest gap along slices in mm and along phases in ms.
    """
    found: dict[int, Step] = {}
    why: dict[int, str] = {}
    for direction in directions:
        lines: dict[Any, list[tuple[float, Image]]] = defaultdict(list)
        for image in images:
            if direction == "slices":
                lines[image.grid, image.phase].append((image.position, image))
            elif image.time is not None and image.phase is not None:
                lines[image.grid, round(image.position / HERE)].append((image.time, image))
        for line in lines.values():
            for step in _between(sorted(line, key=lambda at: (at[0], at[1].sample_key)), direction, limits[direction]):
                if isinstance(step, Step):
                    known = found.get(step.image.id)
                    if known is None or step.gap / limits[step.along] < known.gap / limits[known.along]:
                        found[step.image.id] = step
                else:
                    image, reason = step
                    why[image.id] = max(why.get(image.id, ""), reason, key=REASONS.index)
    without = Counter(
        why.get(image.id) or BEYOND for image in images if not image.drawn and image.annotation is None and image.id not in found
    )
    # Masks of the same parents one after the other: their outlines are read once.
    return sorted(found.values(), key=lambda step: (step.first.id, step.second.id, step.image.position, step.image.sample_key)), without


BEYOND, SEVERAL, WIDE = "not between two drawn ones", "several images at one place and time", "the gap is too wide"
EMPTY, RINGS = "nothing lies between the two", "linear takes contours of one ring alone"
REASONS = ("", BEYOND, SEVERAL, WIDE)  # of two directions the later one is said


def _between(
    line: Sequence[tuple[float, Image]], direction: Literal["slices", "phases"], limit: float
) -> Iterator[Step | tuple[Image, str]]:
    places = [at for at, _ in line]
    parents = [at for at in line if at[1].annotation is not None]
    drawn = [at for at, _ in parents]
    for at, image in line:
        if image.drawn or image.annotation is not None:
            continue
        before, after = bisect.bisect_right(drawn, at - HERE) - 1, bisect.bisect_left(drawn, at + HERE)
        if before < 0 or after >= len(drawn):
            yield image, BEYOND
            continue
        (low, first), (high, second) = parents[before], parents[after]
        # Two echoes, say: which of them the one that was drawn goes with nobody says.
        if any(bisect.bisect_left(places, here + HERE) - bisect.bisect_right(places, here - HERE) > 1 for here in (low, at, high)):
            yield image, SEVERAL
        elif high - low > limit:
            yield image, WIDE
        else:
            yield Step(image, first, second, direction, high - low, (at - low) / (high - low))


def _by_series(conn: psycopg.Connection[Any], parameters: dict[str, Any]) -> Iterator[list[Image]]:
    parents, of_parents = conditions(of_structures=True)
    targets, of_targets = conditions(of_structures=False, include_flagged=False)
    query = sql.SQL(IMAGES).format(parents=sql.SQL(" AND ").join(parents), targets=sql.SQL(" AND ").join(targets))
    with conn.cursor(name="images") as cursor:
        cursor.itersize = 10_000
        cursor.execute(query, {**parameters, **of_parents, **of_targets, "drawn": list(DRAWN)})
        for _, images in itertools.groupby(map(Image._make, cursor), key=lambda image: image.series):
            yield list(images)


def _made(cursor: psycopg.Cursor[Any], steps: Sequence[Step], method: Method) -> Iterator[tuple[Step, Segment | str]]:
    """Yield each step with its mask, or why there is none."""
    for start in range(0, len(steps), STEPS_AT_ONCE):
        some = steps[start : start + STEPS_AT_ONCE]
        ids = list({one.annotation for step in some for one in (step.first, step.second)})
        outlines = {row[0]: _outline(*row[1:]) for row in cursor.execute(OUTLINES, [ids], binary=True)}
        for step in some:
            first, second = (outlines[one.annotation] for one in (step.first, step.second) if one.annotation is not None)
            if not can(method, first, second):
                yield step, RINGS
                continue
            offsets = (step.first.seen_from(step.image), step.second.seen_from(step.image))
            mask = between(method, first, second, step.fraction, shape=(step.image.rows, step.image.columns), offsets=offsets)
            yield step, segment(mask) if mask.any() else EMPTY


def _outline(
    kind: str, points: list[float] | None, lengths: list[int] | None, convention: str | None, shift_x: float, shift_y: float, rows: int,
    columns: int, top: int, left: int, height: int, width: int, bits: bytes, *place: Any,
) -> Outline:  # fmt: skip
    mask = contours.unboxed(rows, columns, (top, left, height, width), bits)
    if kind != "polygon" or points is None or lengths is None:
        return Outline(mask)
    rings = contours.unflatten(points, lengths, 3 if convention == "patient" else 2)
    if convention == "patient":
        placed = shapes.in_pixels(rings, place)
        if placed is None:  # its image has changed since the mask was made
            return Outline(mask)
        rings = placed[0]
    half = 0.5 if convention == "corner" else 0.0
    return Outline(mask, [ring + np.array([shift_x - half, shift_y - half]) for ring in rings])


def _rule(step: Step, method: Method) -> str:
    what = "slice" if step.along == "slices" else "phase"
    return f"{method}: {step.fraction:.2f} of {step.gap:.4g} {UNITS[step.along]} from the drawn {what} before to the one after"


def _row(key: str, step: Step, made: Segment, method: Method) -> tuple[Any, ...]:
    parents = (step.first.annotation, step.second.annotation)
    how = (step.along, step.fraction, step.gap, _rule(step, method))
    return (key, step.image.id, *parents, *how, made.rows, made.columns, list(made.box), made.bits, made.content_hash)


def _write(
    conn: psycopg.Connection[Any],
    rows: Sequence[tuple[Any, ...]],
    old: Sequence[int],
    returned: Sequence[tuple[int, str]],
    parameters: dict[str, Any],
    root_ids: Sequence[int],
) -> None:
    conn.execute("SELECT set_config('catalog.actor', %s, true)", [parameters["actor"]])
    if old:
        pairings.retire_ids(conn, old)
    for pairing_id, rule in returned:
        conn.execute(
            "UPDATE pairing SET state = 'accepted', rule = %s, actor = %s, at = now() WHERE id = %s",
            [rule, parameters["actor"], pairing_id],
        )
    if rows:
        with conn.cursor().copy("COPY derived_staged FROM STDIN") as copy:
            for row in rows:
                copy.write_row(row)
        for statement in WRITE:
            conn.execute(statement.encode(), parameters)
    for root_id in root_ids:
        pairings.make_masks(conn, root_id, commit=False)
        overlaps.bring_up(conn, root_id)
