"""Contours that are counted from another origin: found by the edges of their images, moved as new versions, moved back."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from catalog import contours, deciding, edges, flags, ingest, measuring, qa, rulefiles, shifting, synthetic
from catalog.database import open_database
from catalog.errors import CatalogError, UsageError
from tests.conftest import Run

SEEDS = range(10)


def find_shifts(url: str) -> None:
    with open_database(url) as db:
        qa.run(db, rules=qa.chosen(rulefiles.load(), "CONTOUR-SHIFT"), actor="somebody")


def move(folder: Path, x: float, y: float) -> None:
    """Add to all coordinates of a tree's contours."""
    for path in folder.glob("contourfiles/*/*/*.txt"):
        points = np.loadtxt(path) + np.array([x, y])
        path.write_text("".join(f"{a:.2f} {b:.2f}\n" for a, b in points.tolist()))


def disc(x: float, y: float, radius: float, size: int = 48) -> np.ndarray:
    rows, columns = np.mgrid[:size, :size]
    return np.clip(radius - np.hypot(columns - x, rows - y) + 0.5, 0, 1) * 300


def circle(x: float, y: float, radius: float) -> np.ndarray:
    angle = np.linspace(0, 2 * math.pi, 60, endpoint=False)
    return np.column_stack([x + radius * np.cos(angle), y + radius * np.sin(angle)])


@given(x=st.sampled_from(edges.SHIFTS.tolist()), y=st.sampled_from(edges.SHIFTS.tolist()), seed=st.integers(0, 1000))
def test_scores_are_best_where_the_edge_is(x: float, y: float, seed: int) -> None:
    """A circle drawn off a disc by (x, y) scores best when moved back; the scores are of mean 0 and deviation 1."""
    rng = np.random.default_rng(seed)
    at, radius = rng.uniform(20, 28, 2), rng.uniform(6, 10)
    image = disc(at[0], at[1], radius) + rng.normal(0, 2, (48, 48))
    found = edges.scores(image, [circle(at[0] - x, at[1] - y, radius)])
    best = int(found.argmax())
    assert (edges.SHIFTS[best % 9], edges.SHIFTS[best // 9]) == (x, y)
    assert abs(found.mean()) < 1e-9 and abs(found.std() - 1) < 1e-9


def test_scores_know_no_slope_and_no_frame() -> None:
    """They do not depend on where in the image the contour lies, on the rescale, or on a second, equal sample a pixel."""
    image, ring = disc(20, 22, 8), circle(20.5, 21, 8)
    expected = edges.scores(image, [ring])
    wide = np.zeros((120, 90))
    wide[50:98, 30:78] = image
    assert np.allclose(edges.scores(wide, [ring + np.array([30, 50])]), expected)
    assert np.allclose(edges.scores(-3 * image + 7, [ring]), expected)
    assert np.allclose(edges.scores(np.repeat(image[:, :, np.newaxis], 3, axis=2), [ring]), expected)
    assert np.allclose(edges.scores(image, [ring[::-1]]), expected)


@pytest.mark.parametrize(
    ("image", "rings"),
    [
        (np.zeros((32, 32)), [circle(16, 16, 5)]),
        (disc(16, 16, 5, 32), []),
        (disc(16, 16, 5, 32), [np.array([[1.0, 2.0], [3.0, 4.0]])]),
        (np.full((32, 32), np.nan), [circle(16, 16, 5)]),
        (np.zeros((1, 1)), [circle(0, 0, 5)]),
        (disc(16, 16, 5, 32), [circle(1e6, -1e6, 5)]),
        (disc(16, 16, 5, 32), [np.full((5, 2), 3.0)]),
    ],
)
def test_where_nothing_tells_shifts_apart_scores_are_zero(image: np.ndarray, rings: list[np.ndarray]) -> None:
    """No edge, no ring, no length, no pixel: a row of zeros, so that it is not tried again and again."""
    found = edges.scores(image, rings)
    assert found.shape == (81,) and not found.any()


def test_a_shifted_set_is_found_and_one_that_is_right_is_not(database_url: str, tmp_path: Path, conn: psycopg.Connection) -> None:
    """Of 10 synthetic sets as they are none is named; of 10 others, moved by 1 px in x and 1 or -1 in y, each is, with the shift
    that undoes it."""
    with open_database(database_url) as db:
        for seed in SEEDS:
            for name, x, y in ((f"right-{seed}", 0, 0), (f"shifted-{seed}", 1, 1 - 2 * (seed % 2))):
                synthetic.write_studies(tmp_path / name, patients=2, slices=6, phases=2, size=96, seed=2 * seed + x)
                move(tmp_path / name, x, y)
                ingest.ingest(db, tmp_path / name, jobs=1)
        assert measuring.measure(db, jobs=1).contours == len(SEEDS) * 2 * 2 * (8 + 4)
    find_shifts(database_url)
    details = [detail for (detail,) in conn.execute("SELECT detail FROM flag WHERE rule = 'CONTOUR-SHIFT' AND severity = 'warning'")]
    assert not any("root right-" in detail for detail in details)
    for seed in SEEDS:
        assert (
            sum(f"inner of root shifted-{seed}: best when moved by (-1, {2 * (seed % 2) - 1}) px" in detail for detail in details) == 2
        ), seed


def test_the_real_contours_are_counted_from_one(database_url: str, sunnybrook: Path, conn: psycopg.Connection, catalog: Run) -> None:
    """Inner contours of the real studies fit best when moved by (-1, -1) px; moved so, they fit where they are; the outer are right."""
    with open_database(database_url) as db:
        ingest.ingest(db, sunnybrook, jobs=1)
        measuring.measure(db, jobs=1)
        find_shifts(database_url)
        found = conn.execute("SELECT detail, severity, value FROM flag WHERE rule = 'CONTOUR-SHIFT' AND state = 'open'").fetchall()
        assert len(found) == 2
        for detail, severity, value in found:
            assert detail.startswith("inner of root final_data: best when moved by (-1, -1) px") and "outer" not in detail
            assert severity == "warning" and value == pytest.approx(math.sqrt(2))
        shifting.shift(db, "final_data", by=(-1.0, -1.0), structure="inner", reason="counted from 1", actor="somebody")
        assert measuring.measure(db, jobs=1).contours == 36
        qa.run(db, rules=list(rulefiles.load().values()), actor="somebody")
    assert conn.execute("SELECT count(*) FROM flag WHERE state = 'open' AND severity = 'error'").fetchone() == (0,)
    assert conn.execute("SELECT count(*) FROM flag WHERE state = 'open' AND rule = 'CONTOUR-SHIFT'").fetchone() == (0,)


# ------------------------------------------------------------------------------------------ moving them


def masks(conn: psycopg.Connection, structure: str = "inner") -> dict[int, np.ndarray]:
    """Return by sample the current mask."""
    rows = conn.execute(
        "SELECT v.sample_id, m.rows, m.columns, ARRAY[box_row, box_column, box_rows, box_columns], m.bits FROM sample v "
        "JOIN pairing p ON p.annotation_id = v.annotation_id AND p.image_id = v.sample_id JOIN mask m ON m.pairing_id = p.id "
        "WHERE v.structure = %s",
        [structure],
    ).fetchall()
    return {sample: contours.unboxed(rows, columns, tuple(box), bits) for sample, rows, columns, box, bits in rows}  # type: ignore[arg-type]


def rows_of(conn: psycopg.Connection) -> list[tuple[object, ...]]:
    query = "SELECT {} FROM {} ORDER BY 1".format
    return [
        tuple(conn.execute(query("md5(string_agg(t::text, '' ORDER BY t::text))", f"{table} t")).fetchall())
        for table in ("annotation", "pairing", "mask", "shape", "flag", "overlap", "event")
    ]


@pytest.fixture
def shift(ingested: str) -> Callable[..., shifting.Shifted]:
    """Move the inner contours of the synthetic studies."""
    with psycopg.connect(ingested) as conn:
        [name] = conn.execute("SELECT name FROM root").fetchone() or [""]

    def run(*by: float, **options: object) -> shifting.Shifted:
        with open_database(ingested) as db:
            return shifting.shift(db, name, by=by, reason="counted from 1", **{"structure": "inner", "actor": "somebody", **options})  # type: ignore[arg-type]

    return run


def test_a_shift_makes_new_versions(shift: Callable[..., shifting.Shifted], conn: psycopg.Connection) -> None:
    """Each polygon gets a version with the shift and the same points; its mask is the raster of the moved points; the other structure
    is left alone; the version before is there still."""
    before, outer = masks(conn), masks(conn, "outer")
    done = shift(-1.0, 0.5)
    assert (done.annotations, done.accepted, done.unchanged) == (len(before), len(before), 0)
    assert done.structures == {"inner": len(before)}
    rows = conn.execute(
        "SELECT p.image_id, a.points, a.rings, a.convention, a.version, a.shift_x, a.shift_y, o.points = a.points, o.current, "
        "o.content_hash = a.content_hash, s.centroid_row "
        "FROM annotation a JOIN annotation o ON (o.file_id, o.source_key, o.version) = (a.file_id, a.source_key, a.version - 1) "
        "JOIN pairing p ON p.annotation_id = a.id JOIN shape s ON s.pairing_id = p.id WHERE a.current"
    ).fetchall()
    assert len(rows) == len(before)
    after = masks(conn)
    for sample, points, rings, convention, version, x, y, same, old_current, same_hash, centroid in rows:
        assert (version, x, y, same, old_current, same_hash) == (2, -1.0, 0.5, True, False, True)
        moved = [ring + np.array([-1.0, 0.5]) for ring in contours.unflatten(points, rings)]
        raster = contours.rasterise(moved, *before[sample].shape, convention=convention)
        assert (after[sample] == raster).all() and (after[sample] != before[sample]).any()
        assert centroid == pytest.approx(np.nonzero(raster)[0].mean())
    assert all((masks(conn, "outer")[sample] == mask).all() for sample, mask in outer.items())
    compared = conn.execute(
        "SELECT count(*), count(*) FILTER (WHERE a.current AND b.current) FROM overlap o JOIN pairing p ON p.id = o.pairing_id "
        "JOIN pairing q ON q.id = o.other_id JOIN annotation a ON a.id = p.annotation_id JOIN annotation b ON b.id = q.annotation_id"
    ).fetchone()
    assert compared is not None and compared[0] == compared[1] > 0


def test_undo_gives_back_what_was_read(shift: Callable[..., shifting.Shifted], conn: psycopg.Connection) -> None:
    """After an undo each mask is bit for bit the first one; a shift replaces an earlier one, and the same again does nothing."""
    before = masks(conn)
    shift(3.0, 3.0)
    shift(-1.0, -1.0)
    assert (shift(-1.0, -1.0).annotations, shift(-1.0, -1.0).unchanged) == (0, len(before))
    shift(0.0, 0.0)
    after = masks(conn)
    assert after.keys() == before.keys() and all((after[sample] == mask).all() for sample, mask in before.items())
    assert conn.execute(
        "SELECT DISTINCT version FROM annotation a JOIN structure s ON s.id = structure_id WHERE current AND name = 'inner'"
    ).fetchall() == [(4,)]


def test_an_ingest_keeps_the_shift_of_what_did_not_change(
    database_url: str, tmp_path: Path, conn: psycopg.Connection, catalog: Run
) -> None:
    """Ingested again, also with other times, nothing is new; a contour that was changed is a version as read; an undone shift stays
    undone."""
    synthetic.write_studies(tmp_path, patients=1, slices=4, phases=2, size=48, seed=5)
    state = "SELECT f.path, a.version, a.shift_x FROM annotation a JOIN file f ON f.id = a.file_id WHERE a.current ORDER BY 1"
    with open_database(database_url) as db:
        ingest.ingest(db, tmp_path, jobs=1, name="one")
        shifting.shift(db, "one", by=(-1.0, -1.0), reason="counted from 1", actor="somebody")
        shifted = conn.execute(state).fetchall()
        assert ingest.ingest(db, tmp_path, jobs=1).files_read == 0
        paths = sorted(tmp_path.glob("contourfiles/*/*/*.txt"))
        for path in paths:
            os.utime(path, ns=(1, 1))
        assert ingest.ingest(db, tmp_path, jobs=1).files_read == len(paths)
        assert conn.execute(state).fetchall() == shifted and {x for *_, x in shifted} == {-1.0}
        paths[0].write_text("10 10\n30 10\n30 30\n10 30\n")
        assert ingest.ingest(db, tmp_path, jobs=1).standing_errors == 0
        now = conn.execute(state).fetchall()
        assert [row for row in now if row not in shifted] == [(str(paths[0].relative_to(tmp_path)), 3, 0.0)]
        shifting.shift(db, "one", by=(0.0, 0.0), reason="no", actor="somebody")
        undone = conn.execute(state).fetchall()
        for path in paths:
            os.utime(path, ns=(2, 2))
        ingest.ingest(db, tmp_path, jobs=1)
        assert conn.execute(state).fetchall() == undone and {x for *_, x in undone} == {0.0}
    assert catalog("digest").returncode == 0


def test_what_was_decided_goes_along(shift: Callable[..., shifting.Shifted], conn: psycopg.Connection, ingested: str) -> None:
    """A pairing that a person decided stays that person's; open flags and false positives are on the new version; closed ones stay."""
    [(first, pairing, sample), (second, other, _)] = conn.execute(
        "SELECT p.annotation_id, p.id, p.image_id FROM pairing p JOIN annotation a ON a.id = p.annotation_id "
        "JOIN structure s ON s.id = a.structure_id WHERE s.name = 'inner' ORDER BY p.id LIMIT 2"
    ).fetchall()
    with open_database(ingested) as db:
        deciding.link(db, first, sample, actor="a radiologist")
        raised = [
            flags.add(db, subject, rule=rule, detail="seen", actor="a radiologist").flags[0].id or 0
            for subject, rule in ((f"annotation:{first}", "BAD-A"), (f"pairing:{pairing}", "BAD-B"), (f"pairing:{other}", "BAD-C"),
                                  (f"annotation:{second}", "BAD-D"))
        ]  # fmt: skip
        flags.close(db, [raised[2]], reason="it is right", false_positive=True, actor="a radiologist")
        flags.close(db, [raised[3]], reason="was corrected", actor="a radiologist")
    assert shift(-1.0, -1.0).flags == 3
    rows = conn.execute(
        "SELECT g.rule, g.state, a.current, p.actor FROM flag g "
        "LEFT JOIN pairing p ON p.id = g.pairing_id OR p.annotation_id = g.annotation_id "
        "JOIN annotation a ON a.id = p.annotation_id ORDER BY 1"
    ).fetchall()
    assert [(rule, state, current) for rule, state, current, _ in rows] == [
        ("BAD-A", "open", True), ("BAD-B", "open", True), ("BAD-C", "false_positive", True), ("BAD-D", "resolved", False),
    ]  # fmt: skip
    assert [actor for *_, actor in rows[:2]] == ["a radiologist", "a radiologist"]
    assert conn.execute("SELECT count(*) FROM sample WHERE error_flags > 0 AND structure = 'inner'").fetchone() == (1,)


def test_who_and_why_are_kept(shift: Callable[..., shifting.Shifted], conn: psycopg.Connection) -> None:
    """The event log says of each version who moved it and why, and by how much."""
    done = shift(-1.0, -1.0)
    rows = conn.execute(
        "SELECT action, count(*), min(reason), max(actor) FROM event WHERE subject = 'annotation' AND reason IS NOT NULL "
        "AND (action = 'update' OR (after ->> 'shift_x')::float8 = -1) GROUP BY 1 ORDER BY 1"
    ).fetchall()
    assert rows == [("insert", done.annotations, "counted from 1", "somebody"), ("update", done.annotations, "counted from 1", "somebody")]


def test_a_dry_run_and_a_failure_leave_everything_as_it_was(shift: Callable[..., shifting.Shifted], conn: psycopg.Connection) -> None:
    """A dry run says the same counts and writes nothing; what fails half way, while masks are made, leaves nothing."""
    before = rows_of(conn)
    planned = shift(-1.0, -1.0, dry_run=True)
    assert rows_of(conn) == before
    conn.execute(
        "CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'no space left'; END $$; "
        "CREATE TRIGGER full_disk BEFORE INSERT ON overlap FOR EACH ROW EXECUTE FUNCTION full_disk()"
    )
    with pytest.raises(CatalogError, match="no space left"):
        shift(-1.0, -1.0)
    assert rows_of(conn) == before
    conn.execute("DROP TRIGGER full_disk ON overlap")
    done = shift(-1.0, -1.0)
    assert (done.annotations, done.accepted, done.structures) == (planned.annotations, planned.accepted, planned.structures)


def test_shift_on_the_command_line(ingested: str, catalog: Run, conn: psycopg.Connection) -> None:
    """`catalog annotations shift`: JSON, exit codes, one clear line for what cannot be."""
    [name] = conn.execute("SELECT name FROM root").fetchone() or [""]
    command = ("annotations", "shift", "--root", name, "-m", "counted from 1")
    assert json.loads(catalog(*command, "--by", "-1,-1", "--structure", "inner", "--dry-run", "--json").stdout)["x"] == -1.0
    said = catalog(*command, "--by", "-1,-1", "--structure", "inner")
    assert said.returncode == 0 and "px from where they were read: new versions" in said.stdout
    assert "there already" in catalog(*command, "--by", "-1,-1", "--structure", "inner").stdout
    assert "now as read" in catalog(*command, "--undo").stdout
    for wrong, code in (
        (("--by", "nan,1"), 2), (("--by", "1"), 2), (("--by", "1e9,1"), 2), ((), 2), (("--by", "1,1", "--undo"), 2),
        (("--by", "1,1", "--structure", "nothing"), 1), (("--by", "1,1", "--reader", "nobody"), 1),
    ):  # fmt: skip
        refused = catalog(*command, *wrong)
        assert refused.returncode == code and refused.stderr.count("\n") == 1, wrong
    assert catalog("annotations", "shift", "--root", "none", "--by", "1,1", "-m", "x").returncode == 2
    assert catalog("annotations", "shift", "--root", name, "--by", "1,1").returncode == 2
    with open_database(ingested) as db, pytest.raises(UsageError, match="finite"):
        shifting.shift(db, name, by=(math.nan, 0.0), reason="x", actor="somebody")


def test_what_was_called_a_false_positive_is_not_raised_again(database_url: str, tmp_path: Path, conn: psycopg.Connection) -> None:
    """Making masks anew finds the same crossing polygon: where a person said that it is right, it stays closed; else it is open."""
    synthetic.write_studies(tmp_path, patients=1, slices=4, phases=2, size=48, seed=5)
    for path in sorted(tmp_path.glob("contourfiles/*/i-contours/*.txt"))[:2]:
        path.write_text("10 10\n30 30\n30 10\n10 32\n")  # a figure of eight
    with open_database(database_url) as db:
        ingest.ingest(db, tmp_path, jobs=1, name="one")
        raised = [one for (one,) in conn.execute("SELECT id FROM flag WHERE rule = 'MASK-AREA' AND state = 'open' ORDER BY id")]
        assert len(raised) == 2
        flags.close(db, raised[:1], reason="it is right", false_positive=True, actor="a radiologist")
        shifting.shift(db, "one", by=(-1.0, -1.0), reason="counted from 1", actor="somebody")
    rows = conn.execute(
        "SELECT g.state, a.current, count(*) FROM flag g JOIN annotation a ON a.id = g.annotation_id WHERE rule = 'MASK-AREA' "
        "AND g.state <> 'resolved' GROUP BY 1, 2 ORDER BY 1"
    ).fetchall()
    assert [(state, current) for state, current, _ in rows] == [("false_positive", True), ("open", True)]
    assert rows[1][2] == 1
