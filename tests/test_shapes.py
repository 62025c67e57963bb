"""What a mask and its polygon are like: against shapely, and against flood filling and the definition written out."""

import math
import os
from fractions import Fraction
from itertools import combinations
from pathlib import Path

import numpy as np
import psycopg
import pytest
import shapely
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from catalog import contours, crossings, database, ingest, qa, rulefiles, shapes
from catalog.shapes import Shape, of_polygon, of_segment, polygon_hash

DATA = Path(os.environ.get("SCANFEED_DATA", Path(__file__).parents[2] / "shared" / "data"))
SUNNYBROOK = DATA / "sunnybrook" / "final_data" / "contourfiles"
NOWHERE = (None, None, None, None)

halves = st.integers(0, 12).map(lambda number: number / 2)
# General position: no three points on a line but by an accident that does not happen.
anywhere = st.floats(0, 16, allow_nan=False, width=32)


def rings_of(coordinates, least=3, most=9, rings=2):
    return st.lists(st.lists(st.tuples(coordinates, coordinates), min_size=least, max_size=most), min_size=1, max_size=rings)


def as_arrays(rings):
    return [np.array(ring, np.float64).reshape(-1, 2) for ring in rings]


def shape_of(rings, rows=16, columns=16, *, convention="centre", shift=(0.0, 0.0), place=NOWHERE) -> Shape:
    drawn = as_arrays(rings)
    *box, bits = contours.boxed(contours.rasterise(drawn, rows, columns, convention=convention, shift=shift))
    return of_polygon(drawn, rows, columns, tuple(box), bits, convention=convention, shift=shift, place=place)


def segment_of(mask, place=NOWHERE) -> Shape:
    *box, bits = contours.boxed(mask)
    return of_segment(*mask.shape, tuple(box), bits, place)


def flooded(mask, steps):
    """Sizes of the connected parts of a mask, by flood filling."""
    left, sizes = {(int(row), int(column)) for row, column in np.argwhere(mask)}, []
    while left:
        todo, size = [left.pop()], 0
        while todo:
            row, column = todo.pop()
            size += 1
            near = {(row + down, column + right) for down, right in steps} & left
            left -= near
            todo += near
        sizes.append(size)
    return sizes


EDGES = ((0, 1), (1, 0), (0, -1), (-1, 0))
CORNERS = (*EDGES, (1, 1), (1, -1), (-1, 1), (-1, -1))


@settings(max_examples=300, deadline=None)
@given(mask=st.tuples(st.integers(1, 9), st.integers(1, 9)).flatmap(lambda size: arrays(np.bool_, size)))
@example(mask=np.ones((1, 1), bool))
@example(mask=np.eye(5, dtype=bool))
@example(mask=~np.eye(5, dtype=bool))
def test_a_mask_is_what_flood_filling_says(mask) -> None:
    """Parts, the largest, holes, border, outline and centroid of any mask, in any corner of its image, are those of the definition."""
    shape = segment_of(mask)
    parts = flooded(mask, EDGES)
    assert (shape.components, shape.largest_px) == (len(parts), max(parts, default=0))
    assert shape.holes == len(flooded(~np.pad(mask, 1), CORNERS)) - 1
    inner = np.zeros_like(mask)
    inner[1:-1, 1:-1] = True
    assert shape.border_px == (mask & ~inner).sum()
    framed = np.pad(mask, 1).astype(int)
    assert shape.perimeter_px == np.abs(np.diff(framed, axis=0)).sum() + np.abs(np.diff(framed, axis=1)).sum()
    if mask.any():
        assert (shape.centroid_row, shape.centroid_column) == pytest.approx(tuple(np.argwhere(mask).mean(axis=0)), abs=1e-9)
    else:
        assert (shape.centroid_row, shape.centroid_column, shape.centroid) == (None, None, None)


def test_a_large_noisy_mask() -> None:
    """Tens of thousands of runs are put together as flood filling does, parts that meet only rows later too."""
    noise = np.random.default_rng(1).random((300, 300)) < 0.6
    spiral = np.zeros((41, 41), bool)
    for ring in range(0, 20, 2):
        spiral[ring, ring : -1 - ring or None] = spiral[-1 - ring, ring : -ring or None] = True
        spiral[ring : -ring or None, ring] = spiral[ring : -ring or None, -1 - ring] = True
    comb = np.vstack([np.tile([[True, False]], (99, 50)), np.ones((1, 100), bool)])
    for mask in (noise, spiral, np.tile([[True, False]], (100, 50)), comb):
        shape, parts = segment_of(mask), flooded(mask, EDGES)
        assert (shape.components, shape.largest_px) == (len(parts), max(parts))
        assert shape.holes == len(flooded(~np.pad(mask, 1), CORNERS)) - 1


def segments_of(rings):
    return [
        (Fraction(a[0]), Fraction(a[1]), Fraction(b[0]), Fraction(b[1]))
        for ring in rings
        for a, b in zip(ring, ring[1:] + ring[:1], strict=True)
    ]


def side(a, b, c):
    value = (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])
    return (value > 0) - (value < 0)


@settings(max_examples=300, deadline=None)
@given(rings=rings_of(anywhere))
def test_crossings_are_those_of_shapely(rings) -> None:
    """In general position an outline crosses itself where shapely says that two of its edges cross, and encloses what shapely says."""
    rings = [list(dict.fromkeys(ring)) for ring in rings]
    edges = [shapely.LineString([a, b]) for ring in rings if len(ring) >= 3 for a, b in zip(ring, ring[1:] + ring[:1], strict=True)]
    points = [point for ring in rings for point in ring]
    # Nearer than our tolerance to being degenerate is not what is asked here.
    lines = [(a, b) for ring in rings for a, b in zip(ring, ring[1:] + ring[:1], strict=True) if a != b]
    apart = all(
        shapely.LineString(line).distance(shapely.Point(point)) > 1e-4 for line in lines for point in points if point not in line
    ) and len(set(points)) == len(points)
    if not apart:
        return
    expected = sum(one.crosses(other) for one, other in combinations(edges, 2))
    shape = shape_of(rings)
    assert shape.self_crossings == min(expected, 100)
    assert shape.polygon_area_px == pytest.approx(even_odd(rings), abs=1e-6)


def even_odd(rings) -> float:
    """The area by even-odd: the lines cut the plane into faces; those count that lie inside an odd number of times."""
    lines = [shapely.LineString([*ring, ring[0]]) for ring in rings if len(ring) >= 3]
    if not lines:
        return 0.0
    total = 0.0
    for face in shapely.polygonize([shapely.unary_union(lines)]).geoms:
        point = shapely.point_on_surface(face)
        turns = 0
        for ring in rings:
            for (x1, y1), (x2, y2) in zip(ring, ring[1:] + ring[:1], strict=True) if len(ring) >= 3 else ():
                if (y1 <= point.y) != (y2 <= point.y) and x1 + (point.y - y1) / (y2 - y1) * (x2 - x1) > point.x:
                    turns += 1
        total += face.area * (turns % 2)
    return total


def crossings_by_definition(rings) -> int:
    """All pairs of edges in rational numbers: both ends of each on other sides; and, at a point on the other, coming from and going to."""
    count = 0
    cleaned = [[point for at, point in enumerate(ring) if point != ring[at - 1]] for ring in rings if len(ring) >= 3]
    stretches = [(ring[at - 1], ring[at], ring[(at + 1) % len(ring)]) for ring in cleaned if len(ring) >= 3 for at in range(len(ring))]
    for (a, b, after), (c, d, next_) in combinations(stretches, 2):
        if side(a, b, c) * side(a, b, d) < 0 and side(c, d, a) * side(c, d, b) < 0:
            count += 1
        for (start, end), (comes, at, goes) in (((a, b), (c, d, next_)), ((c, d), (a, b, after))):
            between = (start < at < end or end < at < start) and side(start, end, at) == 0
            count += between and side(start, end, comes) * side(start, end, goes) < 0
        if b == d:
            # Which of the other's two ways lie in the wedge from the way back to the way on?
            back, on = (a[0] - b[0], a[1] - b[1]), (after[0] - b[0], after[1] - b[1])
            ways = [(c[0] - b[0], c[1] - b[1]), (next_[0] - b[0], next_[1] - b[1])]
            angles = [math.atan2(y, x) for x, y in (back, on, *ways)]
            turned = [(angle - angles[0]) % (2 * math.pi) for angle in angles[1:]]
            apart = [abs(math.remainder(angles[p] - angles[q], 2 * math.pi)) for p, q in combinations(range(4), 2) if (p, q) != (2, 3)]
            distinct = min(apart) > 1e-9
            count += distinct and (turned[1] < turned[0]) != (turned[2] < turned[0])
    return count


@settings(max_examples=600, deadline=None)
@given(rings=rings_of(halves))
def test_crossings_on_half_pixels(rings) -> None:
    """Where points lie on edges and on points, as they do on half pixels, a crossing is a change of sides and nothing else."""
    shape = shape_of(rings)
    assert shape.self_crossings == min(100, crossings_by_definition(rings))
    assert shape.polygon_area_px == pytest.approx(even_odd(rings), abs=1e-6)


SQUARE = [(2, 2), (8, 2), (8, 8), (2, 8)]


@pytest.mark.parametrize(
    ("rings", "count"),
    [
        ([SQUARE], 0),
        ([[*SQUARE, (2, 2)]], 0),
        ([[point for point in SQUARE for _ in range(3)]], 0),
        ([[(2, 2), (8, 2), (2, 8), (8, 8)]], 1),  # a bow tie
        ([[(2, 2), (5, 5), (8, 2), (8, 8), (5, 5), (2, 8)]], 0),  # two triangles that touch at a point
        ([[(2, 2), (5, 5), (8, 8), (8, 2), (5, 5), (2, 8)]], 1),  # the bow tie with a point where it crosses, twice
        ([[(2, 2), (5, 5), (8, 8), (8, 2), (2, 8)]], 1),  # with a point there once
        ([[(2, 2), (8, 2), (8, 5), (5, 2), (2, 5)]], 0),  # a point that touches an edge
        ([[(2, 2), (8, 2), (8, 5), (12, 5), (8, 5), (8, 8), (2, 8)]], 0),  # a whisker
        ([SQUARE, [(4, 4), (6, 4), (6, 6), (4, 6)]], 0),  # a hole
        ([SQUARE, [(8, 2), (12, 2), (12, 8), (8, 8)]], 0),  # a neighbour
        ([SQUARE, [(5, 5), (12, 5), (12, 6), (5, 6)]], 2),  # an arm that comes out
        ([[(2, 2), (8, 2)], SQUARE], 0),  # a ring of two points
        ([[(np.cos(0.8 * np.pi * at), np.sin(0.8 * np.pi * at)) for at in range(5)]], 5),  # a pentagram
    ],
)
def test_known_crossings(rings, count) -> None:
    """Touching, doubling back, holes and doubled points are no crossings; bow ties are, wherever their points lie."""
    assert shape_of(rings).self_crossings == count
    turned = [[(x * 0.6 - y * 0.8 + 7.1, x * 0.8 + y * 0.6) for x, y in ring] for ring in rings]
    assert shape_of(turned).self_crossings == count


def test_many_points() -> None:
    """10,000 points are looked at in a fraction of all pairs; a scribble stops at 100, and what is too much is not known, not 0."""
    angle = np.linspace(0, 2 * np.pi, 10_000, endpoint=False)
    round_one = np.column_stack([128 + 60 * np.cos(angle), 128 + 60 * np.sin(angle)])
    looked_at = sum(len(one) for one, _ in crossings._pairs(*(np.roll(round_one.view(complex).ravel(), by) for by in (0, -1))))
    assert looked_at < 50_000
    assert shape_of([round_one], 256, 256).self_crossings == 0
    scribble = np.random.default_rng(1).uniform(0, 256, (10_000, 2))
    assert shape_of([scribble], 256, 256).self_crossings == 100
    comb = np.exp(0.7j) * (np.arange(20_000) % 2 * 200 + 0.01j * np.arange(20_000))
    assert crossings.crossings([comb]) == (None, None)
    swapped = round_one.copy()
    swapped[[4000, 9000]] = swapped[[9000, 4000]]
    assert shape_of([swapped], 256, 256).self_crossings > 0


@settings(max_examples=200, deadline=None)
@given(rings=rings_of(halves | anywhere, least=1, rings=3), turn=st.integers(0, 8), data=st.data())
def test_one_polygon_one_hash(rings, turn, data) -> None:
    """Another start, direction, order of rings, a repeated closing point or a doubled one change nothing; a moved point does."""
    known = polygon_hash(as_arrays(rings))
    other = []
    for ring in data.draw(st.permutations(rings)):
        at = turn % len(ring)
        turned = ring[at:] + ring[:at]
        turned = turned[::-1] if data.draw(st.booleans()) else turned
        turned = [*turned, turned[0]] if data.draw(st.booleans()) else turned
        other.append([point for point in turned for _ in range(data.draw(st.integers(1, 2)))])
    assert polygon_hash(as_arrays(other)) == known
    which, moved = data.draw(st.integers(0, len(rings) - 1)), [list(ring) for ring in rings]
    moved[which][0] = (moved[which][0][0] + 0.25, moved[which][0][1])
    kept = [sorted({(round(x * 1024), round(y * 1024)) for x, y in ring}) for ring in (rings[which], moved[which])]
    if kept[0] != kept[1]:
        assert polygon_hash(as_arrays(moved)) != known


def test_a_ring_that_comes_back_to_its_first_point() -> None:
    """A ring whose smallest point stands there many times has one hash from any start, found in linear time."""
    star = [point for at in range(3000) for point in ((0.0, 0.0), (float(at % 7), float(at % 5) + 1))]
    known = polygon_hash(as_arrays([star]))
    assert polygon_hash(as_arrays([star[2001:] + star[:2001]])) == known == polygon_hash(as_arrays([star[::-1]]))
    assert polygon_hash(as_arrays([[*star[:-1], (9.0, 9.0)]])) != known


def test_numbers_of_a_polygon() -> None:
    """Points, the poorest ring, gap, step, length and area of an open half circle with a small second ring are as drawn."""
    arc = [(8 + 5 * math.cos(angle), 8 + 5 * math.sin(angle)) for angle in np.linspace(0, math.pi, 26)]
    shape = shape_of([arc, [(8, 10), (8, 10), (9, 10), (8, 10)]])
    assert (shape.points, shape.smallest_ring, shape.points_outside) == (30, 2, 0)
    assert shape.gap_px == pytest.approx(10.0)
    assert shape.step_px == pytest.approx(2 * 5 * math.sin(math.pi / 50))
    assert shape.perimeter_px == pytest.approx(10 + 25 * 10 * math.sin(math.pi / 50) + 2)
    assert shape.polygon_area_px == pytest.approx(shapely.Polygon(arc).area)
    closed = shape_of([[*SQUARE, SQUARE[0]]])
    assert (closed.gap_px, closed.step_px, closed.perimeter_px, closed.points, closed.smallest_ring) == (0.0, 6.0, 24.0, 5, 4)
    assert shape_of([[]]).points == 0 and shape_of([]).components == 0
    assert shape_of([[(3, 3)]]).smallest_ring == 1


@pytest.mark.parametrize(("convention", "low", "high"), [("centre", -0.5, 15.5), ("corner", 0.0, 16.0)])
def test_outside_begins_at_the_outer_edge_of_the_outermost_pixels(convention, low, high) -> None:
    """A point on the image's edge is inside, one beyond it is not, in either convention and after the shift."""
    box = [(low, low), (high, low), (high, high), (low, high)]
    assert shape_of([box], convention=convention).points_outside == 0
    assert shape_of([box], convention=convention).border_px == 60
    assert shape_of([box], convention=convention, shift=(0.01, 0)).points_outside == 2
    assert shape_of([box], convention=convention, shift=(0, -0.01)).points_outside == 2
    assert shape_of([[(low - 0.01, 3), (5, 3), (5, 9)]], convention=convention).points_outside == 1


def test_the_centroid_in_the_patient() -> None:
    """The centroid in mm lies where position, orientation and spacing put it; an image that does not say has none."""
    place = ([10.0, 20.0, 30.0], [0.0, 1.0, 0.0, 0.0, 0.0, -1.0], 2.0, 3.0)
    shape = shape_of([SQUARE], place=place)
    assert (shape.centroid_row, shape.centroid_column) == (4.5, 4.5)
    assert shape.centroid == pytest.approx([10.0, 20.0 + 4.5 * 3.0, 30.0 - 4.5 * 2.0])
    for at, wrong in ((0, None), (1, None), (2, None), (3, 0.0), (1, [0.0, 1.0, 0.0, 0.0, 0.0, -2.0])):
        assert shape_of([SQUARE], place=[*place[:at], wrong, *place[at + 1 :]]).centroid is None


def test_real_contours_are_plain() -> None:
    """No real contour crosses itself, leaves its image, gapes, or makes a mask of parts or with holes."""
    if not SUNNYBROOK.is_dir():
        pytest.skip(f"the real contours are not in {SUNNYBROOK}; set SCANFEED_DATA")
    paths = sorted(SUNNYBROOK.glob("*/*/*-manual.txt"))
    assert len(paths) == 54
    hashes = set()
    for path in paths:
        ring = contours.read_points(path.read_bytes())
        shape = shape_of([ring], 256, 256, convention="corner")
        assert (shape.self_crossings, shape.points_outside, shape.components, shape.holes, shape.border_px) == (0, 0, 1, 0, 0)
        assert shape.gap_px <= 1.0 and shape.step_px == 0.5 and shape.smallest_ring >= 57
        assert shape.polygon_area_px == pytest.approx(shapely.Polygon(ring).area)
        assert shape.perimeter_px == pytest.approx(shapely.Polygon(ring).length)
        hashes.add(shape.polygon_hash)
    assert len(hashes) == 54


ALL = f"SELECT {shapes.COLUMNS} FROM shape ORDER BY pairing_id"


def test_every_mask_has_a_shape(ingested: str, conn: psycopg.Connection) -> None:
    """An ingest leaves a shape for each mask; where they are gone, as in an older catalog, the next run of the rules makes the same up."""
    rows = conn.execute(ALL).fetchall()
    assert len(rows) == conn.execute("SELECT count(*) FROM mask").fetchone()[0] > 0
    assert conn.execute("SELECT count(*) FROM shape h JOIN mask m USING (pairing_id) WHERE h.largest_px <> m.area_px").fetchone() == (0,)
    conn.execute("DELETE FROM shape")
    conn.execute("DELETE FROM touched")
    with database.open_database(ingested) as opened:
        rules = qa.chosen(rulefiles.load(), "CONTOUR-CROSSING")
        qa.run(opened, rules=rules, dry_run=True)
        assert conn.execute("SELECT count(*) FROM shape").fetchone() == (0,)
        qa.run(opened, rules=rules, changed=True)
        assert conn.execute(ALL).fetchall() == rows
        assert conn.execute("SELECT count(*) FROM scope").fetchone()[0] > 0  # what has a shape now is looked at
    with psycopg.connect(ingested) as again:
        assert shapes.make_missing(again) == 0


def test_an_undone_mask_takes_its_shape_along(ingested: str, conn: psycopg.Connection, studies: Path) -> None:
    """A pairing that goes takes its shape; masks that are made again have theirs, in the same transaction."""
    conn.execute("DELETE FROM shape")
    conn.execute("DELETE FROM mask")
    with database.open_database(ingested) as opened:
        ingest.ingest(opened, studies, jobs=1)
    assert conn.execute("SELECT count(*) FROM mask m FULL JOIN shape h USING (pairing_id) WHERE m IS NULL OR h IS NULL").fetchone() == (0,)
    conn.execute("DELETE FROM pairing WHERE id = (SELECT min(id) FROM pairing)")
    without = "SELECT count(*) FROM shape h WHERE NOT EXISTS (SELECT FROM mask m WHERE m.pairing_id = h.pairing_id)"
    assert conn.execute(without).fetchone() == (0,)
