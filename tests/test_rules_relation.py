"""Rules on what lies inside what, on neighbouring slices and phases, and on polygons that were copied.

Studies are synthetic and their contours circles that the tests draw, so that each lies just within or just beyond a threshold. One slice
is 10 mm from the next, a pixel 1.367 mm wide.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import psycopg
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st

from catalog import contours, deciding, ingest, overlaps, qa, relations, rulefiles, synthetic
from catalog.database import open_database
from catalog.errors import CatalogError, UsageError
from tests.conftest import Run

SIZE, SLICES, PHASES = 64, 6, 3
MM = synthetic.SPACING
# Radii of the inner circle from base to apex, px; the outer one is 3 px wider.
RADII = (11.0, 11.5, 11.0, 9.5, 7.0, 3.5)
OURS = ("RELATION-*", "CENTROID-*", "AREA-*", "OVERLAP-*", "POLYGON-*")

Circle = tuple[float, float, float]  # x, y, radius in px
Key = tuple[int, str]  # number of the image, structure


def circle(x: float, y: float, radius: float, points: int = 48) -> np.ndarray:
    angle = np.linspace(0, 2 * math.pi, points, endpoint=False)
    return np.column_stack([x + radius * np.cos(angle), y + radius * np.sin(angle)])


def number(at: int, phase: int = 0) -> int:
    return at * PHASES + phase + 1


def heart(phase: int = 0) -> dict[Key, Circle]:
    """Return clean circles of one phase; their centre leans 1 px a slice."""
    found: dict[Key, Circle] = {}
    for at, radius in enumerate(RADII):
        found[number(at, phase), "inner"] = (32.3 + at, 31.7, radius)
        found[number(at, phase), "outer"] = (32.3 + at, 31.7, radius + 3)
    return found


def write(folder: Path, drawn: Mapping[Key, Circle | np.ndarray], *, patient: int = 1) -> None:
    """Write contours of one patient, and no others of it."""
    original = folder / "contourfiles" / f"SC-SYN-{patient:04d}"
    for old in original.glob("*/*.txt"):
        old.unlink()
    for (image, structure), shape in drawn.items():
        points = circle(*shape) if isinstance(shape, tuple) else shape
        letter = structure[0]
        path = original / f"{letter}-contours" / f"IM-0001-{image:04d}-{letter}contour-manual.txt"
        path.write_text("".join(f"{x:.4f} {y:.4f}\n" for x, y in points.tolist()))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two synthetic patients without contours."""
    synthetic.write_studies(tmp_path, patients=2, slices=SLICES, phases=PHASES, size=SIZE, seed=3)
    for patient in (1, 2):
        write(tmp_path, {}, patient=patient)
    return tmp_path


Found = dict[tuple[str, int, str, str], tuple[str, float | None, str]]  # rule, number, structure, patient → severity, value, detail


@pytest.fixture
def found(database_url: str, folder: Path, conn: psycopg.Connection) -> Callable[..., Found]:
    """Ingest the folder, run rules, and return the open flags on pairings."""

    def run(*patterns: str, changed: bool = False) -> Found:
        with open_database(database_url) as db:
            ingest.ingest(db, folder, jobs=1)
            rules = [rule for pattern in patterns or OURS for rule in qa.chosen(rulefiles.load(), pattern)]
            qa.run(db, rules=rules, changed=changed, actor="somebody")
        rows = conn.execute(
            "SELECT g.rule, n.instance_number, s.name, pt.patient_id, g.severity, g.value, g.detail FROM flag g "
            "JOIN pairing p ON p.id = g.pairing_id JOIN annotation a ON a.id = p.annotation_id JOIN structure s ON s.id = a.structure_id "
            "JOIN image i ON i.id = p.image_id JOIN instance n ON n.id = i.instance_id JOIN series se ON se.id = n.series_id "
            "JOIN study st ON st.id = se.study_id JOIN patient pt ON pt.id = st.patient_id WHERE g.state = 'open' AND g.raised_by = 'qa'"
        )
        return {
            (rule, image, structure, patient): (severity, value, detail)
            for rule, image, structure, patient, severity, value, detail in rows
        }

    return run


def subjects(found: Found, rule: str) -> set[Key]:
    return {(image, structure) for code, image, structure, _ in found if code == rule}


def test_a_clean_heart_has_no_finding(folder: Path, found: Callable[..., Found]) -> None:
    """A heart that narrows to a small apex, leans, and contracts over three phases fails none of these rules."""
    drawn = heart()
    for phase, share in ((1, 0.85), (2, 0.75)):
        drawn |= {(image, name): (x, y, radius * share) for (image, name), (x, y, radius) in heart(phase).items()}
    write(folder, drawn)
    assert found() == {}


def test_inner_must_lie_inside_outer_up_to_the_slack(folder: Path, found: Callable[..., Found]) -> None:
    """An inner mask of which 2 % lie outside is right, one pixel more is an error on the inner one."""
    x, y, radius = heart()[number(1), "outer"]
    outer = contours.rasterise([circle(x, y, radius)], SIZE, SIZE, convention="centre")

    def outside(moved: float) -> float:
        inner = contours.rasterise([circle(x + moved, y, 11.5)], SIZE, SIZE, convention="centre")
        return float((inner & ~outer).sum() / inner.sum())

    steps = [moved / 20 for moved in range(200)]
    beyond = next(moved for moved in steps if outside(moved) > 0.02)
    within = max(moved for moved in steps if moved < beyond and 0 < outside(moved) <= 0.02)
    for moved, expected in ((within, set()), (beyond, {(number(1), "inner")})):
        write(folder, heart() | {(number(1), "inner"): (x + moved, y, 11.5)})
        assert subjects(found("RELATION-*"), "RELATION-OUTSIDE") == expected
    [(severity, value, detail)] = found("RELATION-OUTSIDE").values()
    assert severity == "error" and value == pytest.approx(1 - outside(beyond))
    assert "outside outer (annotation " in detail


def test_what_lies_inside_what_is_data(folder: Path, found: Callable[..., Found], database_url: str) -> None:
    """Without the relation nothing is said; with it again, the same finding, also where nothing but the relation changed."""
    write(folder, heart() | {(number(2), "inner"): (48.0, 31.0, 11.0)})
    assert subjects(found("RELATION-*"), "RELATION-OUTSIDE") == {(number(2), "inner")}
    with open_database(database_url) as db:
        relations.relate(db, "inner", "outer", remove=True, reason="another naming", actor="somebody")
    assert found("RELATION-*") == {}
    with open_database(database_url) as db:
        assert relations.relate(db, "inner", "outer", reason="as before", actor="somebody").changed
        assert not relations.relate(db, "inner", "outer", reason="as before", actor="somebody").changed
        with pytest.raises(CatalogError, match="inner is said to lie inside outer"):
            relations.relate(db, "outer", "inner", reason="a circle", actor="somebody")
        with pytest.raises(UsageError, match="itself"):
            relations.relate(db, "inner", "inner", reason="a circle", actor="somebody")
    assert subjects(found("RELATION-*"), "RELATION-OUTSIDE") == {(number(2), "inner")}


def test_one_without_the_other_is_an_info(folder: Path, found: Callable[..., Found]) -> None:
    """Inner contours of a phase without outer ones are named; in a series that has no outer one at all nothing is."""
    lone = {key: shape for key, shape in heart(2).items() if key[1] == "inner"}
    write(folder, heart() | lone)
    write(folder, lone, patient=2)
    flags = found("RELATION-ALONE")
    assert {(image, name, patient) for _, image, name, patient in flags} == {(image, "inner", "SYN0001") for image, _ in lone}
    assert {severity for severity, _, _ in flags.values()} == {"info"}


@pytest.mark.parametrize(("off_px", "expected"), [(11.5, set()), (12.0, {(number(2), "inner")})])
def test_a_centre_that_jumps_is_named_and_not_its_neighbours(
    folder: Path, found: Callable[..., Found], off_px: float, expected: set[Key]
) -> None:
    """Beside its neighbours by 16 mm, 11.7 px: the one that moved is flagged alone."""
    drawn = {(number(at), "inner"): (26.3, 31.7, 9.0) for at in range(SLICES)}
    write(folder, drawn | {(number(2), "inner"): (26.3 + off_px, 31.7, 9.0)})
    assert subjects(found("CENTROID-JUMP"), "CENTROID-JUMP") == expected


def test_where_two_agree_with_nobody_both_are_named(folder: Path, found: Callable[..., Found]) -> None:
    """Of two contours alone nothing tells which one jumped."""
    write(folder, {(number(0), "inner"): (20.0, 30.0, 6.0), (number(1), "inner"): (40.0, 30.0, 6.0)})
    assert subjects(found("CENTROID-JUMP"), "CENTROID-JUMP") == {(number(0), "inner"), (number(1), "inner")}


@pytest.mark.parametrize(("radius", "expected"), [(14.5, set()), (15.2, {(number(0), "inner")})])
def test_a_size_that_jumps_at_the_end_is_named(folder: Path, found: Callable[..., Found], radius: float, expected: set[Key]) -> None:
    """12 mm of radius, 8.8 px, from one slice to the next; the one at the end that nobody agrees with is flagged."""
    drawn = {(number(at), "inner"): (32.3, 31.7, 6.0) for at in range(1, SLICES)}
    write(folder, drawn | {(number(0), "inner"): (32.3, 31.7, radius)})
    assert subjects(found("AREA-JUMP"), "AREA-JUMP") == expected


def test_phases_are_compared_by_trigger_time(folder: Path, found: Callable[..., Found]) -> None:
    """The same change of size is usual within 250 ms and none within 25 ms."""
    drawn = {(number(1, phase), "inner"): (32.3, 31.7, radius) for phase, radius in enumerate((12.0, 12.0, 7.0))}
    write(folder, drawn)
    assert subjects(found("AREA-JUMP"), "AREA-JUMP") == set()
    for path in (folder / "dicoms" / "SYN0001").iterdir():
        dataset = pydicom.dcmread(path)
        dataset.TriggerTime = f"{float(dataset.TriggerTime) / 10:.4f}"
        dataset.save_as(path)
    assert subjects(found("AREA-JUMP"), "AREA-JUMP") == {(number(1, 2), "inner")}


def test_neighbours_go_by_geometry_not_by_number(folder: Path, found: Callable[..., Found]) -> None:
    """With files and instance numbers in another order than the slices, a clean heart stays clean, and a jump is found where it is."""
    order = [3, 0, 5, 1, 4, 2]  # the file of slice `at` gets the place of slice order[at]
    paths = {image: folder / "dicoms" / "SYN0001" / f"{image}.dcm" for image in range(1, SLICES * PHASES + 1)}
    places = {image: pydicom.dcmread(path).ImagePositionPatient for image, path in paths.items()}
    for at, other in enumerate(order):
        for phase in range(PHASES):
            dataset = pydicom.dcmread(paths[number(at, phase)])
            dataset.ImagePositionPatient = places[number(other, phase)]
            dataset.save_as(paths[number(at, phase)])
    clean = {(number(order.index((image - 1) // PHASES)), name): shape for (image, name), shape in heart().items()}
    write(folder, clean)
    assert found() == {}
    wrong = (number(order.index(2)), "inner")
    x, y, radius = clean[wrong]
    write(folder, {key: shape for key, shape in clean.items() if key[1] == "inner"} | {wrong: (x + 14, y, radius)})
    assert subjects(found("CENTROID-JUMP"), "CENTROID-JUMP") == {wrong}


def test_small_contours_at_the_apex_are_no_outliers(folder: Path, found: Callable[..., Found]) -> None:
    """Areas that fall to a fiftieth towards the apex are right; one that is smaller than both of its neighbours by 20 % is not."""
    radii = (12.0, 12.0, 11.5, 10.5, 7.5, 1.7)
    drawn = {(number(at), "inner"): (32.3, 31.7, radius) for at, radius in enumerate(radii)}
    write(folder, drawn)
    assert found("AREA-*") == {}
    for radius, expected in ((9.4, set()), (9.1, {(number(1), "inner")})):  # 3 mm, 2.2 px, below 11.5
        write(folder, drawn | {(number(1), "inner"): (32.3, 31.7, radius)})
        assert subjects(found("AREA-*"), "AREA-OUTLIER") == expected


def test_no_overlap_with_the_next_slice_is_an_error(folder: Path, found: Callable[..., Found]) -> None:
    """A mask that shares no pixel with the ones beside it is an error; a thin one that runs aslant is a warning (but for its ends)."""
    drawn = {(number(at), "inner"): (16.3, 31.7, 5.0) for at in range(SLICES)}
    write(folder, drawn | {(number(3), "inner"): (44.3, 31.7, 5.0)})
    flags = found("OVERLAP-NONE")
    assert {(image, severity) for (_, image, _, _), (severity, _, _) in flags.items()} == {(number(3), "error")}
    write(folder, {(number(at), "inner"): (16.3 + 6 * at, 31.7, 2.0) for at in range(SLICES)})
    flags = found("OVERLAP-NONE")
    assert len(flags) == SLICES - 2 and {severity for severity, _, _ in flags.values()} == {"warning"}


@pytest.mark.parametrize(("off_px", "expected"), [(29.0, set()), (29.6, {(number(4), "inner")})])
def test_a_centre_far_from_the_others(folder: Path, found: Callable[..., Found], off_px: float, expected: set[Key]) -> None:
    """40 mm, 29.3 px, from the median of the series."""
    drawn = {(number(at), "inner"): (16.3, 31.7, 6.0) for at in range(SLICES)}
    write(folder, drawn | {(number(4), "inner"): (16.3 + off_px, 31.7, 6.0)})
    assert subjects(found("CENTROID-FAR"), "CENTROID-FAR") == expected


def test_a_copied_polygon_is_an_error_where_it_contradicts_and_an_info_where_it_agrees(
    folder: Path, found: Callable[..., Found], conn: psycopg.Connection, database_url: str
) -> None:
    """Copied to another slice and to another patient, from another point on and the other way round: the original gets an info that
    names the others; once these are rejected, nothing is left."""
    original = circle(*heart()[number(1), "inner"])
    other = {key: (x - 11, 40.0, radius) for key, (x, _, radius) in heart().items()}
    write(folder, heart() | {(number(5), "inner"): np.roll(original, 7, axis=0)})
    write(folder, other | {(number(3), "inner"): original[::-1]}, patient=2)
    flags = found("POLYGON-REPEATED")
    assert {(image, patient): severity for (_, image, _, patient), (severity, _, _) in flags.items()} == {
        (number(1), "SYN0001"): "info",
        (number(5), "SYN0001"): "error",
        (number(3), "SYN0002"): "error",
    }
    named = flags["POLYGON-REPEATED", number(1), "inner", "SYN0001"][2]
    rows = conn.execute(
        "SELECT p.id, p.annotation_id, p.image_id FROM flag g JOIN pairing p ON p.id = g.pairing_id WHERE g.severity = 'error'"
    ).fetchall()
    assert len(rows) == 2 and all(f"annotation {annotation} on sample {sample}" in named for _, annotation, sample in rows)
    with open_database(database_url) as db:
        deciding.reject(db, [pairing for pairing, _, _ in rows], actor="somebody")
    assert found("POLYGON-REPEATED") == {}


def test_a_copied_polygon_that_agrees_with_neighbours_alone(folder: Path, found: Callable[..., Found]) -> None:
    """Without any outer contour, the slices beside it tell the original from its copy."""
    inner = {key: shape for key, shape in heart().items() if key[1] == "inner"}
    copy = circle(*inner[number(1), "inner"])
    write(folder, inner)
    write(folder, {key: (20.0, 44.0, radius) for key, (_, _, radius) in inner.items()} | {(number(2), "inner"): copy}, patient=2)
    flags = found("POLYGON-REPEATED")
    assert {patient: severity for (_, _, _, patient), (severity, _, _) in flags.items()} == {"SYN0001": "info", "SYN0002": "error"}


def test_where_nothing_decides_all_copies_are_errors(folder: Path, found: Callable[..., Found]) -> None:
    """Two patients with one and the same polygon, alone: both are errors. Rectangles may be alike."""
    square = np.array([[20.0, 20.0], [40.0, 20.0], [40.0, 40.0], [20.0, 40.0]])
    for patient in (1, 2):
        write(folder, {(number(2), "inner"): circle(30.0, 30.0, 8.0), (number(4), "inner"): square}, patient=patient)
    flags = found("POLYGON-REPEATED")
    assert {(image, patient, severity) for (_, image, _, patient), (severity, _, _) in flags.items()} == {
        (number(2), "SYN0001", "error"),
        (number(2), "SYN0002", "error"),
    }


def test_what_is_compared_follows_what_changes(
    folder: Path, found: Callable[..., Found], conn: psycopg.Connection, database_url: str
) -> None:
    """Rows of `overlap` are those of the current contours: when one between two goes, these two are compared, and also by --changed."""
    drawn = {(number(at), "inner"): (20.3, 31.7, 6.0) for at in range(SLICES)}
    write(folder, drawn | {(number(1), "inner"): (42.3, 31.7, 6.0)})
    assert subjects(found("CENTROID-*"), "CENTROID-JUMP") == {(number(1), "inner")}
    assert conn.execute("SELECT count(*) FROM overlap WHERE pixels = 0").fetchone() == (2,)
    [(pairing,)] = conn.execute("SELECT DISTINCT pairing_id FROM flag WHERE rule = 'CENTROID-JUMP' AND state = 'open'").fetchall()
    with open_database(database_url) as db:
        deciding.reject(db, [pairing], actor="somebody")
    assert found("CENTROID-*", changed=True) == {}
    rows = conn.execute("SELECT round(apart), count(*), min(pixels) > 0 FROM overlap GROUP BY 1 ORDER BY 1").fetchall()
    assert rows == [(10.0, SLICES - 3, True), (20.0, 1, True)]


def test_no_finding_on_the_real_contours(database_url: str, sunnybrook: Path, conn: psycopg.Connection) -> None:
    """On the two real studies these rules say no more than which images have an inner contour alone, at end systole."""
    with open_database(database_url) as db:
        ingest.ingest(db, sunnybrook, jobs=1)
        qa.run(db, rules=[rule for pattern in OURS for rule in qa.chosen(rulefiles.load(), pattern)], actor="somebody")
    assert conn.execute("SELECT rule, severity, count(*) FROM flag GROUP BY 1, 2").fetchall() == [("RELATION-ALONE", "info", 18)]


boxes = st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 6), st.integers(0, 6), st.integers(0, 2**32 - 1))


@given(one=boxes, other=boxes, down=st.integers(-5, 5), right=st.integers(-5, 5))
def test_pixels_in_common_are_those_of_whole_rasters(one: tuple[int, ...], other: tuple[int, ...], down: int, right: int) -> None:
    """`in_common` of two boxes is the number of pixels in both full rasters, the second one moved as its image lies."""

    def mask(row: int, column: int, rows: int, columns: int, seed: int, place: tuple[float, ...]) -> tuple[overlaps.Boxed, np.ndarray]:
        raster = np.zeros((16, 16), np.bool_)
        raster[row : row + rows, column : column + columns] = np.random.default_rng(seed).random((rows, columns)) < 0.6
        top, left, height, width, bits = contours.boxed(raster)
        return overlaps.Boxed(top, left, height, width, bits, list(place), [1, 0, 0, 0, 1, 0], 2.0, 0.5), raster

    first, here = mask(*one, (3.0, 4.0, 5.0))  # type: ignore[arg-type]
    second, there = mask(*other, (3.0 + 0.5 * right, 4.0 + 2.0 * down, 15.0))  # type: ignore[arg-type]
    wide = np.zeros((26, 26), np.bool_)
    wide[5 + down : 21 + down, 5 + right : 21 + right] = there
    assert overlaps.in_common(first, second) == int((wide[5:21, 5:21] & here).sum())


def test_relate_on_the_command_line(database_url: str, catalog: Run, conn: psycopg.Connection) -> None:
    """`catalog qa relate` lists, adds and removes; who and why are in the event log; a dry run changes nothing."""
    assert "scanfeed" in catalog("qa", "relate").stdout
    assert catalog("qa", "relate", "papillary", "inner", "-m", "muscles", "--dry-run").returncode == 0
    assert conn.execute("SELECT count(*) FROM relation").fetchone() == (1,)
    said = catalog("qa", "relate", "papillary", "inner", "-m", "muscles", "--actor", "somebody")
    assert said.returncode == 0 and said.stdout == "papillary lies inside inner\n" and "papillary" in said.stderr
    assert catalog("qa", "relate", "papillary", "inner", "--remove", "-m", "not drawn").returncode == 0
    rows = conn.execute("SELECT action, actor, reason FROM event WHERE subject = 'relation' AND reason IS NOT NULL ORDER BY id").fetchall()
    assert [(action, reason) for action, _, reason in rows] == [("insert", "muscles"), ("delete", "not drawn")]
    assert rows[0][1] == "somebody"
    assert catalog("qa", "relate", "papillary", "-m", "muscles").returncode == 2
    assert catalog("qa", "relate", "papillary", "inner").returncode == 2
