"""Labels between labels: the masks, on which images they are made, and what becomes of them when their parents change."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from catalog import contours, deciding, erasing, ingest, roots, synthetic
from catalog.between import METHODS, Outline, between, can, signed_distance
from catalog.database import open_database
from catalog.errors import CatalogError, UsageError
from catalog.inside import dice
from catalog.interpolate import BEYOND, SEVERAL, WIDE, Image, interpolate, plan
from tests.conftest import Run

SIZE = 48
DERIVED = """
SELECT a.id, p.image_id, p.state, a.current, a.version, d.method, d.along, d.first_id, d.second_id, d.fraction, d.gap, p.id
FROM annotation a JOIN derivation d ON d.annotation_id = a.id JOIN pairing p ON p.annotation_id = a.id
WHERE a.origin = 'interpolated' ORDER BY a.id
"""


def disc(x: float, y: float, radius: float) -> Outline:
    """A circle, as a polygon and its mask."""
    angle = np.linspace(0, 2 * math.pi, 90, endpoint=False)
    ring = np.column_stack([x + radius * np.cos(angle), y + radius * np.sin(angle)])
    return Outline(contours.rasterise([ring], SIZE, SIZE, convention="centre"), [ring])


def make(one: Outline, other: Outline, fraction: float, method: str = "shape", **options: Any) -> np.ndarray:
    return between(method, one, other, fraction, shape=(SIZE, SIZE), **options)  # type: ignore[arg-type]


discs = st.builds(disc, st.floats(8, 40), st.floats(8, 40), st.floats(2, 12))
fractions = st.floats(0.02, 0.98)


@given(discs, discs, fractions)
def test_shape_lies_between(one: Outline, other: Outline, fraction: float) -> None:
    """What lies in both masks is in it, what lies in neither is not; the other way round it is the same; near one it is that one."""
    made = make(one, other, fraction)
    assert (made >= (one.mask & other.mask)).all()
    assert (made <= (one.mask | other.mask)).all()
    assert (made == make(other, one, 1.0 - fraction)).mean() > 0.999  # rounding of 1 - fraction
    if one.mask.any() and other.mask.any():
        assert (make(one, other, 1e-5) == one.mask).all()
        assert (make(one, other, 1.0 - 1e-5) == other.mask).all()


@given(st.lists(discs, min_size=1, max_size=3), fractions)
def test_between_two_equal_ones_is_the_same(parts: list[Outline], fraction: float) -> None:
    """Between two equal masks of any form, parts and holes too, lies that mask; nothing of it is lost at the image's border."""
    mask = np.logical_xor.reduce([part.mask for part in parts])
    mask[0, :20] = True
    assert (make(Outline(mask), Outline(mask), fraction) == mask).all()


@given(st.floats(4, 16), st.floats(4, 16), fractions, st.sampled_from(["shape", "linear"]))
def test_radii_of_circles_are_mixed(one: float, other: float, fraction: float, method: str) -> None:
    """Between two circles of one centre lies the circle whose radius lies between theirs, to three quarters of a pixel."""
    radius = (1 - fraction) * one + fraction * other
    made = make(disc(24, 24, one), disc(24, 24, other), fraction, method)
    assert abs(math.sqrt(made.sum() / math.pi) - radius) < 0.75  # small circles are rough: 0.65 was seen between 5 and 8
    assert dice(made, disc(24, 24, radius).mask) > 0.85


def test_holes_and_parts_stay() -> None:
    """A ring between two rings has its hole, and of two parts that both masks have there are two."""
    ring = [Outline(disc(24, 24, wide).mask & ~disc(24, 24, hole).mask) for wide, hole in ((14, 4), (16, 8))]
    made = make(*ring, 0.5)
    assert not made[24, 24] and made[24, 24 + 10] and not made[24, 24 + 17]
    parts = [Outline(disc(12, 12, size).mask | disc(36, 36, size).mask) for size in (4, 8)]
    made = make(*parts, 0.5)
    assert made[12, 12] and made[36, 36] and not made[24, 24]
    assert abs(math.sqrt(made.sum() / 2 / math.pi) - 6) < 0.6


@given(st.integers(0, 89), st.booleans(), fractions)
def test_linear_finds_corresponding_points(start: int, backwards: bool, fraction: float) -> None:
    """Wherever a contour begins and whichever way it runs, the contour between two is the same to a few pixels at its border."""
    angle = np.linspace(0, 2 * math.pi, 90, endpoint=False)
    ring = np.column_stack([22 + 12 * np.cos(angle) + 2 * np.cos(2 * angle), 24 + 7 * np.sin(angle)])
    other = np.roll(ring * 0.8 + 6, start, axis=0)
    other = other[::-1] if backwards else other
    one, moved = (Outline(contours.rasterise([r], SIZE, SIZE, convention="centre"), [r]) for r in (ring, other))
    truth = contours.rasterise([(1 - fraction) * ring + fraction * (ring * 0.8 + 6)], SIZE, SIZE, convention="centre")
    assert dice(make(one, moved, fraction, "linear"), truth) > 0.97


def test_linear_goes_where_shape_cannot() -> None:
    """Between two discs that have nothing in common `shape` has nothing and `linear` a disc half-way; segments and holes it refuses."""
    one, other = disc(10, 24, 4), disc(38, 24, 4)
    assert not make(one, other, 0.5).any()
    assert dice(make(one, other, 0.5, "linear"), disc(24, 24, 4).mask) > 0.9
    assert not can("linear", one, Outline(other.mask))
    assert not can("linear", one, Outline(other.mask, [*(other.rings or []), *(one.rings or [])]))
    with pytest.raises(ValueError, match="one ring"):
        make(one, Outline(other.mask), 0.5, "linear")
    for fraction in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="fraction"):
            make(one, other, fraction)


@given(discs, discs)
def test_nearest_is_the_nearer_one(one: Outline, other: Outline) -> None:
    """`nearest` is the first mask up to half-way, then the second."""
    assert (make(one, other, 0.5, "nearest") == one.mask).all()
    assert (make(one, other, 0.51, "nearest") == other.mask).all()


@pytest.mark.parametrize("method", METHODS)
def test_offsets_of_the_images_count(method: str) -> None:
    """Of a parent whose image begins elsewhere in the plane the mask lies where it lies in the patient, not at the same pixels."""
    one, other = disc(20.25, 22, 8), disc(24, 18.5, 8)
    made = make(one, other, 0.4, method, offsets=((3.75, 2.0), (0.0, 5.5)))
    assert dice(made, disc(24, 24, 8).mask) > 0.97
    segments = Outline(one.mask), Outline(other.mask)
    if method != "linear":
        assert dice(make(*segments, 0.4, method, offsets=((3.75, 2.0), (0.0, 5.5))), disc(24, 24, 8).mask) > 0.93
        assert not make(*segments, 0.4, method, offsets=((500.0, 0.0), (500.0, 0.0))).any()


def test_signed_distance() -> None:
    """From the border between pixels: half a pixel inside the outermost pixel, half a pixel outside the next. Beyond the array: outside."""
    mask = np.zeros((5, 7), np.bool_)
    mask[1:4, 1:4] = True
    found = signed_distance(mask)
    assert found[2, 2] == 1.5 and found[1, 1] == 0.5 and found[2, 4] == -0.5 and found[2, 6] == -2.5
    assert signed_distance(np.ones((3, 3), np.bool_))[1, 1] == 1.5


# ------------------------------------------------------------------------------------------ on which images


def image(
    number: int, position: float, phase: int | None, time: float | None, parent: bool, *, drawn: bool = False, rows: int = 8
) -> Image:
    axes = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    return Image(1, number, number, position, phase, time, 8, 8, 1.0, 1.0, [0.0, 0.0, position], axes, number if parent else None,
                 parent or drawn)  # fmt: skip


@settings(max_examples=300)
@given(
    st.lists(st.sampled_from("pd..."), min_size=1, max_size=40),
    st.integers(1, 5),
    st.sampled_from([("slices",), ("phases",), ("slices", "phases")]),
    st.floats(5, 60),
    st.floats(20, 400),
    st.randoms(),
)
def test_parents_are_the_nearest_on_both_sides(
    kinds: list[str], num_phases: int, directions: tuple[Any, ...], widest_mm: float, widest_ms: float, random: Any
) -> None:
    """Of every image that gets a label the parents are the nearest drawn ones on both sides, of one phase or one position, no further apart
    than the limit; every other image without a label is counted with its reason; what was drawn gets none. The order is no matter."""
    images = [
        image(n, 10.0 * (n // num_phases), n % num_phases, 37.5 * (n % num_phases), kind == "p", drawn=kind == "d")
        for n, kind in enumerate(kinds)
    ]
    shuffled = random.sample(images, len(images))
    limits = {"slices": widest_mm, "phases": widest_ms}
    steps, left = plan(shuffled, directions, limits)
    made = {step.image.id for step in steps}
    assert len(made) == len(steps)
    assert sum(left.values()) + len(made) == sum(kind == "." for kind in kinds)
    for one in images:
        options = []
        for direction in directions:
            unit, fixed = ("position", "phase") if direction == "slices" else ("time", "position")
            line = [other for other in images if getattr(other, fixed) == getattr(one, fixed) and other.annotation is not None]
            here = getattr(one, unit)
            low = max((other for other in line if getattr(other, unit) < here), key=lambda other: getattr(other, unit), default=None)
            high = min((other for other in line if getattr(other, unit) > here), key=lambda other: getattr(other, unit), default=None)
            if low is not None and high is not None and getattr(high, unit) - getattr(low, unit) <= limits[direction]:
                gap = getattr(high, unit) - getattr(low, unit)
                options.append((gap / limits[direction], direction, low.id, high.id, (here - getattr(low, unit)) / gap))
        if one.drawn or not options:
            assert one.id not in made
            continue
        [step] = [step for step in steps if step.image.id == one.id]
        best = min(options, key=lambda option: option[0])
        assert (step.along, step.first.id, step.second.id) == best[1:4]
        assert step.fraction == pytest.approx(best[4]) and 0 < step.fraction < 1


def test_why_an_image_gets_none() -> None:
    """Beyond the outermost, over too wide a gap, between images of another grid, or where two images lie at one place: no label."""
    line = [image(n, 10.0 * n, None, None, n in (1, 3)) for n in range(5)]
    limits = {"slices": 20.0, "phases": 100.0}
    steps, left = plan(line, ("slices",), limits)
    assert [step.image.id for step in steps] == [2] and left == {BEYOND: 2}
    assert plan(line, ("slices",), {"slices": 19.9, "phases": 1.0})[1] == {BEYOND: 2, WIDE: 1}
    assert plan(line, ("phases",), limits)[1] == {BEYOND: 3}
    other = [one._replace(rows=9) if one.id == 3 else one for one in line]
    assert plan(other, ("slices",), limits)[1] == {BEYOND: 3}
    tilted = [one._replace(axes=[1.0, 0.0, 0.0, 0.0, 0.99, 0.14]) if one.id == 3 else one for one in line]
    assert plan(tilted, ("slices",), limits)[1] == {BEYOND: 3}
    echo = [*line, image(9, 20.0, None, None, False)]
    assert plan(echo, ("slices",), limits)[1] == {BEYOND: 2, SEVERAL: 2}


def test_where_another_image_lies() -> None:
    """Where an image's first pixel falls on another: in its own px along rows and columns; less than a hundredth is rounding."""
    here = image(1, 0.0, None, None, True)._replace(row_spacing=2.0, column_spacing=0.5, axes=[0.0, 1.0, 0.0, 0.0, 0.0, 1.0])
    assert here._replace(origin=[10.0, 3.0, 5.0]).seen_from(here) == (6.0, 2.5)
    assert here._replace(origin=[10.0, 0.004, -0.01]).seen_from(here) == (0.0, 0.0)


def test_the_cycle_is_not_closed() -> None:
    """Between the last drawn phase and the first of the next beat nothing is made: nothing measured says that it is right."""
    line = [image(n, 0.0, n, 40.0 * n, n in (5, 15)) for n in range(20)]
    steps, left = plan(line, ("phases",), {"slices": 1.0, "phases": 1000.0})
    assert sorted(step.image.id for step in steps) == list(range(6, 15))
    assert left == {BEYOND: 9}


# ------------------------------------------------------------------------------------------ in the catalog


def rows(conn: psycopg.Connection) -> list[tuple[Any, ...]]:
    return conn.execute(DERIVED).fetchall()


def run(url: str, **options: Any) -> Any:
    with open_database(url) as db:
        return interpolate(db, options.pop("structure", "inner"), actor="somebody", **options)


@pytest.fixture
def five(new_database: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Path]:
    """A study of 5 slices × 4 phases of which slices 1 to 3 have inner contours at phases 0 and 2."""
    synthetic.write_studies(tmp_path / "five", patients=1, slices=5, phases=4, size=64, seed=3)
    url = new_database()
    monkeypatch.setenv("CATALOG_DATABASE_URL", url)
    take_in(url, tmp_path / "five")
    return url, tmp_path / "five"


def take_in(url: str, folder: Path) -> Any:
    with open_database(url) as db:
        return ingest.ingest(db, folder, jobs=1)


def reject(url: str, ids: Sequence[int]) -> None:
    with open_database(url) as db:
        deciding.reject(db, ids, actor="somebody")


def accept(url: str, ids: Sequence[int]) -> None:
    with open_database(url) as db:
        deciding.accept(db, ids, actor="somebody")


def test_what_is_written(ingested: str, conn: psycopg.Connection, catalog: Run) -> None:
    """The command makes a label on each image between two drawn phases, says so, and writes mask, shape, parents and how."""
    said = catalog("interpolate", "--structure", "inner", "--actor", "somebody", "--json")
    assert said.returncode == 0, said.stderr
    done = json.loads(said.stdout)
    made = rows(conn)
    assert done["made"] == len(made) == 6 and done["along"] == {"phases": 6}
    assert done["left"] == {BEYOND: 48 - 12 - 6}
    for _, sample, state, current, version, method, along, first, second, fraction, gap, pairing in made:
        assert (state, current, version, method, along) == ("accepted", True, 1, "shape", "phases")
        around = conn.execute(
            "SELECT s.position = o.position, s.trigger_time FROM image o, sample s WHERE o.id = %s AND s.annotation_id IN (%s, %s) "
            "AND s.structure = 'inner' AND s.origin = 'contour' ORDER BY s.trigger_time",
            [sample, first, second],
        ).fetchall()
        [(time,)] = conn.execute("SELECT trigger_time FROM image WHERE id = %s", [sample]).fetchall()
        assert [same for same, _ in around] == [True, True]
        assert around[0][1] < time < around[1][1]
        assert gap == pytest.approx(around[1][1] - around[0][1]) and fraction == pytest.approx((time - around[0][1]) / gap)
        assert conn.execute("SELECT count(*) FROM shape h JOIN mask m USING (pairing_id) WHERE pairing_id = %s", [pairing]).fetchone() == (
            1,
        )
    found = conn.execute(
        "SELECT DISTINCT reader, structure, kind, origin, pairing_method FROM sample WHERE origin NOT IN ('contour')"
    ).fetchall()
    assert found == [("interpolate", "inner", "segment", "interpolated", "interpolate")]
    assert conn.execute("SELECT preference FROM reader WHERE name = 'interpolate'").fetchone() == (1000,)
    assert conn.execute("SELECT count(*) FROM derived_labels").fetchone() == (6,)
    # The file and its run are the first parent's, and so is whatever holds for them.
    odd = "SELECT count(*) FROM derivation d JOIN annotation a ON a.id = d.annotation_id JOIN annotation f ON f.id = d.first_id"
    assert conn.execute(f"{odd} WHERE (a.file_id, a.ingest_run_id) IS DISTINCT FROM (f.file_id, f.ingest_run_id)").fetchone() == (0,)
    made_by = conn.execute("SELECT DISTINCT p.actor, d.actor FROM derivation d JOIN pairing p USING (annotation_id)").fetchall()
    assert made_by == [("somebody", "somebody")]
    noted = "SELECT count(*) FROM event WHERE (subject, action, actor) = ('annotation', 'insert', 'somebody')"
    assert conn.execute(noted).fetchone() == (6,)


def test_again_changes_nothing(ingested: str, conn: psycopg.Connection, catalog: Run) -> None:
    """A second run, with --json and in words, writes no row; a dry run before the first wrote none either."""
    dry = catalog("interpolate", "--structure", "inner", "--dry-run", "--json")
    assert json.loads(dry.stdout)["made"] == 6 and not rows(conn)
    assert "nothing was changed" in dry.stderr
    first = catalog("interpolate", "--structure", "inner")
    assert "6 interpolated labels of inner: 6 along phases" in first.stdout and "origins" in first.stderr
    before = rows(conn)
    changes = conn.execute("SELECT count(*) FROM catalog_change").fetchone()
    digest = catalog("digest").stdout
    again = catalog("interpolate", "--structure", "inner")
    assert "0 made; 6 were there already; 0 retired" in again.stdout
    assert rows(conn) == before and catalog("digest").stdout == digest
    assert conn.execute("SELECT count(*) FROM catalog_change").fetchone() == changes


def test_another_method_is_a_new_version(ingested: str, conn: psycopg.Connection) -> None:
    """Made by another method a label is a new version, the old one no longer current; a narrower limit retires what is beyond it."""
    run(ingested)
    done = run(ingested, method="linear")
    assert (done.made, done.changed) == (6, 6)
    now = [row for row in rows(conn) if row[3]]
    assert [row[4:6] for row in now] == [(2, "linear")] * 6
    assert conn.execute("SELECT count(*) FROM sample WHERE origin = 'interpolated'").fetchone() == (6,)
    done = run(ingested, method="linear", widest_ms=1.0)
    assert (done.made, done.retired, done.left[WIDE]) == (0, 6, 6)
    assert conn.execute("SELECT count(*) FROM sample WHERE origin = 'interpolated'").fetchone() == (0,)


def test_along_slices(five: tuple[str, Path]) -> None:
    """Where a contour in the middle is rejected, the label between its neighbours in space is made, at the same phase; and what was made
    along the other direction stays when one is asked for alone."""
    url, _ = five
    with psycopg.connect(url, autocommit=True) as conn:
        ids = conn.execute(
            "SELECT p.id FROM sample s JOIN pairing p USING (annotation_id) WHERE structure = 'inner' AND phase = 2 ORDER BY position"
        ).fetchall()
        reject(url, [ids[1][0]])
        done = run(url, along="slices")
        assert done.along == {"slices": 1} and done.widest["slices"] == pytest.approx(20.0, abs=0.01)
        [row] = rows(conn)
        assert row[6] == "slices" and row[9] == pytest.approx(0.5, abs=1e-4)
        done = run(url, along="phases")
        assert done.along == {"phases": 2} and done.retired == 0
        assert len([row for row in rows(conn) if row[3]]) == 3
        both = run(url)
        assert both.along == {"slices": 1, "phases": 2} and (both.made, both.unchanged) == (0, 3)
        # The contour that was rejected is close to what took its place.
        masks = conn.execute(
            "SELECT m.rows, m.columns, m.box_row, m.box_column, m.box_rows, m.box_columns, m.bits FROM mask m "
            "WHERE pairing_id IN (%s, %s)", [ids[1][0], row[11]]
        ).fetchall()  # fmt: skip
        assert dice(*(contours.unboxed(*mask[:2], mask[2:6], mask[6]) for mask in masks)) > 0.85


def test_stands_and_falls_with_its_parents(ingested: str, conn: psycopg.Connection) -> None:
    """A rejected parent rejects at once what was made from it; accepted again, the next run accepts that again; else it retires it."""
    run(ingested)
    first = rows(conn)[0]
    [(parent,)] = conn.execute("SELECT id FROM pairing WHERE annotation_id = %s", [first[7]]).fetchall()
    reject(ingested, [parent])
    assert {row[0]: row[2] for row in rows(conn)}[first[0]] == "rejected"
    assert conn.execute("SELECT count(*) FROM sample WHERE sample_id = %s AND structure = 'inner'", [first[1]]).fetchone() == (0,)
    accept(ingested, [parent])
    done = run(ingested)
    assert (done.returned, done.unchanged, done.made) == (1, 5, 0)
    assert [row[2] for row in rows(conn)] == ["accepted"] * 6
    reject(ingested, [parent])
    done = run(ingested)
    assert (done.retired, done.unchanged) == (1, 5)
    assert [row[3] for row in rows(conn) if row[0] == first[0]] == [False]
    accept(ingested, [parent])
    assert run(ingested).made == 1


def test_what_a_person_rejected_stays_rejected(ingested: str, conn: psycopg.Connection) -> None:
    """A derived label that a person rejected is not made again while it would be the same."""
    run(ingested)
    derived = rows(conn)[2]
    reject(ingested, [derived[11]])
    done = run(ingested)
    assert (done.rejected, done.unchanged, done.made, done.returned) == (1, 5, 0, 0)
    assert [row[2] for row in rows(conn) if row[0] == derived[0]] == ["rejected"]


def test_flagged_contours_are_no_parents(ingested: str, conn: psycopg.Connection) -> None:
    """What has an open error is not interpolated from, and an image with a label that is in error is not given another."""
    first = conn.execute("SELECT annotation_id, sample_id FROM sample WHERE structure = 'inner' ORDER BY 1").fetchone()
    assert first is not None
    conn.execute(
        "INSERT INTO flag (rule, severity, detail, annotation_id, raised_by) VALUES ('X', 'error', 'wrong', %s, 'somebody')", first[:1]
    )
    assert run(ingested).made == 5
    assert not [row for row in rows(conn) if first[0] in row[7:9] or row[1] == first[1]]


def test_an_ingest_leaves_them_alone(five: tuple[str, Path]) -> None:
    """Ingests after it, of changed files too, raise no flag on derived labels and retire none but those whose parent changed; what is drawn
    on such an image later takes its place."""
    url, folder = five
    run(url)
    with psycopg.connect(url, autocommit=True) as conn:
        before = rows(conn)
        assert len(before) == 3
        contour = sorted(folder.glob("contourfiles/*/i-contours/*.txt"))
        os.utime(contour[0], ns=(1, 1))  # looked at again, and the same
        take_in(url, folder)
        assert rows(conn) == before
        changed = contour[0]
        changed.write_text("".join(f"{float(x) + 1:.2f} {y}\n" for x, y in map(str.split, changed.read_text().splitlines())))
        take_in(url, folder)
        states = {row[0]: row[2] for row in rows(conn)}
        assert sorted(states.values()) == ["accepted", "accepted", "rejected"] and all(row[3] for row in rows(conn))
        assert conn.execute("SELECT rule FROM flag WHERE rule LIKE 'PAIR%'").fetchall() == []
        done = run(url)
        assert (done.made, done.changed, done.unchanged) == (1, 1, 2)
        # A contour is drawn on an image that has a derived label.
        target = [row for row in rows(conn) if row[3]][-1]
        [(number,)] = conn.execute(
            "SELECT n.instance_number FROM image i JOIN instance n ON n.id = i.instance_id WHERE i.id = %s", [target[1]]
        ).fetchall()
        shutil.copy(contour[-1], contour[-1].with_name(f"IM-0001-{number:04d}-icontour-manual.txt"))
        take_in(url, folder)
        assert conn.execute("SELECT origin FROM sample WHERE sample_id = %s AND structure = 'inner'", [target[1]]).fetchall() == [
            ("contour",)
        ]
        done = run(url)
        assert done.retired == 1
        assert [row[3] for row in rows(conn) if row[0] == target[0]] == [False]
        # Nor is one that has lost its image taken for what its file holds, and paired with the file's.
        conn.execute("DELETE FROM pairing WHERE method = 'interpolate'")
        os.utime(contour[0], ns=(2, 2))
        take_in(url, folder)
        assert rows(conn) == []
        assert conn.execute("SELECT rule FROM flag WHERE rule LIKE 'PAIR%'").fetchall() == []


def test_erased_with_the_patient(ingested: str, conn: psycopg.Connection) -> None:
    """With a patient go the labels derived from the patient's contours."""
    run(ingested)
    with open_database(ingested) as db:
        erasing.erase(db, "SYN0001", reason="asked", actor="somebody")
    assert len(rows(conn)) == 4
    assert conn.execute("SELECT count(*) FROM annotation WHERE origin = 'interpolated'").fetchone() == (4,)


def test_segments_are_parents_too(conn: psycopg.Connection, ingested: str) -> None:
    """Between labels that are rasters `shape` and `nearest` work; `linear` says that it does not."""
    for row in conn.execute(
        "SELECT a.id, m.* FROM annotation a JOIN pairing p ON p.annotation_id = a.id JOIN mask m ON m.pairing_id = p.id"
    ):
        conn.execute(
            "UPDATE annotation SET kind = 'segment', origin = 'segment', points = NULL, rings = NULL, convention = NULL, rows = %s, "
            "columns = %s, box = %s, bits = %s WHERE id = %s", [*row[2:4], list(row[4:8]), row[8], row[0]],
        )  # fmt: skip
    assert run(ingested, method="linear").left["linear takes contours of one ring alone"] == 6
    assert run(ingested, method="shape").made == 6
    assert run(ingested, method="nearest").made == 6


def test_refused(ingested: str, catalog: Run, tmp_path: Path) -> None:
    """A structure that is none or that nobody drew, a limit that is none, another ingest running, and SciPy missing: one line each, and
    nothing written."""
    with psycopg.connect(ingested) as other:
        other.execute("INSERT INTO structure (name) VALUES ('clot')")
    for arguments, code, said in (
        (["--structure", "Inner"], 2, "structure 'Inner': there is none of this name; there are clot, inner, outer"),
        (["--structure", "clot"], 1, "nobody drew any"),
        (["--structure", "inner", "--widest-mm", "0"], 2, "positive"),
        (["--structure", "inner", "--widest-ms", "nan"], 2, "positive"),
        (["--structure", "inner", "--along", "time"], 2, "along"),
        ([], 2, "structure"),
    ):
        found = catalog("interpolate", *arguments)
        assert found.returncode == code and said in found.stderr and "Traceback" not in found.stderr, found.stderr
        assert len(found.stderr.strip().splitlines()) == 1
    (tmp_path / "scipy").mkdir()
    (tmp_path / "scipy" / "__init__.py").write_text("raise ImportError\n")
    bare = {**os.environ, "PYTHONPATH": str(tmp_path)}
    without = catalog("interpolate", "--structure", "inner", env=bare)
    assert without.returncode == 1 and "pip install 'scanfeed[derive]'" in without.stderr
    assert catalog("interpolate", "--structure", "inner", "--method", "nearest", env=bare).returncode == 0
    with psycopg.connect(ingested) as other:
        other.execute("SELECT pg_advisory_xact_lock(%s, (SELECT min(id)::integer FROM root))", [roots.LOCK_CLASS])
        with pytest.raises(CatalogError, match="is running"):
            run(ingested)
    with pytest.raises(UsageError):
        run(ingested, widest_mm=math.inf)


def test_real_studies(sunnybrook: Path, new_database: Callable[..., str]) -> None:
    """Between end systole and end diastole of the two real studies lie 198 images; each gets a label, and its area lies between its
    parents'. Of inner contours left out over 20 mm the median Dice is above 0.92."""
    url = new_database()
    take_in(url, sunnybrook)
    done = run(url)
    assert done.along == {"phases": 198} and done.left == {BEYOND: 266}
    with psycopg.connect(url) as conn:
        areas = conn.execute(
            "SELECT m.area_px, least(f.area_px, s.area_px), greatest(f.area_px, s.area_px) FROM derivation d "
            "JOIN pairing p ON p.annotation_id = d.annotation_id JOIN mask m ON m.pairing_id = p.id "
            "JOIN pairing q ON q.annotation_id = d.first_id JOIN mask f ON f.pairing_id = q.id "
            "JOIN pairing r ON r.annotation_id = d.second_id JOIN mask s ON s.pairing_id = r.id"
        ).fetchall()
        assert len(areas) == 198 and all(0.9 * low <= area <= 1.05 * high for area, low, high in areas)
        line = conn.execute(
            "SELECT s.patient, s.phase, s.position, m.rows, m.columns, ARRAY[m.box_row, m.box_column, m.box_rows, m.box_columns], m.bits "
            "FROM sample s JOIN pairing p ON p.annotation_id = s.annotation_id AND p.state = 'accepted' JOIN mask m ON m.pairing_id = p.id "
            "WHERE structure = 'inner' AND origin = 'contour' ORDER BY 1, 2, 3"
        ).fetchall()
    found = []
    for low, middle, high in zip(line, line[1:], line[2:], strict=False):
        if low[:2] == high[:2]:
            masks = [contours.unboxed(row[3], row[4], tuple(row[5]), row[6]) for row in (low, middle, high)]
            fraction = (middle[2] - low[2]) / (high[2] - low[2])
            found.append(dice(between("shape", Outline(masks[0]), Outline(masks[2]), fraction, shape=masks[1].shape), masks[1]))
    assert len(found) == 28 and np.median(found) > 0.92
