"""Plots: what stands in the catalog is what is drawn, with units, as PNG and SVG."""

import io
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import psycopg
import pydicom
import pytest
from matplotlib.figure import Figure
from PIL import Image

from catalog import contours, inside, intensities, plots, threshold
from catalog.database import Database, open_database
from catalog.errors import UsageError


@pytest.fixture
def db(ingested: str):
    with open_database(ingested) as database:
        yield database


def plot(db: Database, what: str, kind: str = "svg", **how) -> bytes:
    return plots.plot(db, what, **{"where": None, "structures": [], "jobs": 1, "kind": kind, **how})[0]


@pytest.mark.parametrize("what", ["areas", "spread", "intensities"])
def test_both_kinds_are_what_they_say(db: Database, what: str) -> None:
    """A PNG opens; an SVG is well formed, runs nothing and loads nothing, and is the same bytes twice."""
    with Image.open(io.BytesIO(plot(db, what, "png"))) as image:
        assert image.format == "PNG" and min(image.size) > 500
    text = plot(db, what)
    assert text == plot(db, what)
    for element in ET.fromstring(text).iter():
        assert element.tag.rpartition("}")[2] not in ("script", "image", "foreignObject")
        for name, value in element.attrib.items():
            assert not name.rpartition("}")[2].startswith("on")
            assert name.rpartition("}")[2] != "href" or value.startswith("#")


def test_areas_are_those_of_the_view(db: Database, conn: psycopg.Connection) -> None:
    """Each mask is a point: position in mm or phase across, area in mm² up; axes say the units; open errors are crossed out."""
    conn.execute(
        "INSERT INTO flag (rule, severity, detail, pairing_id, raised_by) "
        "SELECT 'X', 'error', 'x', id, 'test' FROM pairing ORDER BY id LIMIT 1"
    )
    figure = Figure()
    plots._areas(figure, plots.masks(db, None, []))
    series = [number for (number,) in conn.execute("SELECT id FROM series ORDER BY 1").fetchall()]
    left, right = figure.axes[::2], figure.axes[1::2]
    assert len(left) == len(right) == len(series)
    crossed = 0
    for number, slices, phases in zip(series, left, right, strict=True):
        rows = conn.execute(
            "SELECT s.position, s.phase, s.area_mm2, s.error_flags FROM sample s JOIN image i ON i.id = s.sample_id "
            "JOIN instance n ON n.id = i.instance_id WHERE n.series_id = %s",
            [number],
        ).fetchall()
        assert rows
        for axes, column in ((slices, 0), (phases, 1)):
            lines = [line for line in axes.get_lines() if line.get_marker() != "x"]
            drawn = sorted((x, y) for line in lines for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True))
            np.testing.assert_allclose(drawn, sorted((row[column], row[2]) for row in rows))
        crosses = [line for line in slices.get_lines() if line.get_marker() == "x"]
        wrong = sorted(row[0] for row in rows if row[3])
        assert sorted(x for line in crosses for x in line.get_xdata()) == wrong
        crossed += len(wrong)
        assert f"series {number}" in slices.get_title()
        assert (slices.get_xlabel(), slices.get_ylabel()) == ("position along the slice normal (mm)", "area (mm²)")
        assert "phase" in phases.get_xlabel()
    assert crossed == 1


def test_areas_without_spacing_are_px(db: Database, conn: psycopg.Connection) -> None:
    """Where no mm are known the axis says px, and nothing is left out."""
    conn.execute("UPDATE image SET row_spacing = NULL, column_spacing = NULL")
    figure = Figure()
    rows = plots.masks(db, None, [])
    plots._areas(figure, rows)
    assert figure.axes[0].get_ylabel().startswith("area (px")
    drawn = [y for axes in figure.axes[::2] for line in axes.get_lines() for y in line.get_ydata()]
    assert sorted(drawn) == sorted(row.area_px for row in rows)


def test_masks_without_a_place_are_counted() -> None:
    """An image that does not say where it lies is no point at a made-up place: it is said."""
    rows = [plots.Row(1, 1, "a", 1, None, None, 5, 5.0, 0, None, None), plots.Row(2, 2, "a", 1, 3.0, None, 6, 6.0, 0, None, None)]
    figure = Figure()
    assert plots._areas(figure, rows) == ["1 masks left out: their images do not say where they lie"]
    assert len(figure.axes) == 1  # no phases: no panel for them
    assert [list(line.get_xdata()) for line in figure.axes[0].get_lines()] == [[3.0]]


def test_centroids_are_measured_from_the_median() -> None:
    """The distance is in mm from the median centroid of the same structure and series."""
    places = [(10.0, 10.0), (10.0, 10.0), (13.0, 14.0), (10.0, 10.0)]
    rows = [plots.Row(at, at, "a", 1, 0.0, 0, 9, 9.0, 0, *place) for at, place in enumerate(places)]
    rows.append(plots.Row(9, 9, "a", 2, 0.0, 0, 9, 9.0, 0, 90.0, 90.0))
    rows.append(plots.Row(10, 10, "b", 1, 0.0, 0, 9, 9.0, 0, None, None))
    assert plots._away(rows) == {0: 0.0, 1: 0.0, 2: 5.0, 3: 0.0, 9: 0.0}


def test_intensities_are_of_the_pixels(catalog, sunnybrook: Path, database_url: str, conn: psycopg.Connection) -> None:
    """Blood pool and muscle of real samples have the means that pydicom and a mask made here give; the pool is the brighter one."""
    assert catalog("ingest", sunnybrook).returncode == 0
    with open_database(database_url) as db:
        found, named = intensities.measured(db, plots.masks(db, None, []), [], 1, lambda done, total: None)
    assert named == ("blood pool (inner)", "muscle (outer less inner)")
    assert len(found) == 18
    for one in found:
        masks = {}
        path = None
        for structure, points, convention, image in conn.execute(
            "SELECT s.name, a.points, a.convention, v.path FROM sample v JOIN annotation a ON a.id = v.annotation_id "
            "JOIN structure s ON s.id = a.structure_id WHERE v.sample_id = %s",
            [one.sample_id],
        ).fetchall():
            masks[structure] = contours.rasterise([np.array(points).reshape(-1, 2)], 256, 256, convention=convention)
            path = image
        pixels = pydicom.dcmread(path).pixel_array.astype(float)
        assert one.pool == pytest.approx(pixels[masks["inner"]].mean())
        assert one.muscle == pytest.approx(pixels[masks["outer"] & ~masks["inner"]].mean())
        assert one.muscle_deviation == pytest.approx(pixels[masks["outer"] & ~masks["inner"]].std())
        assert one.pool > one.muscle
        level = inside.otsu(pixels[masks["outer"]])
        assert level is not None
        above = masks["outer"] & (pixels > level)
        both = int(above.sum() + masks["inner"].sum())
        assert one.dice[intensities.OTSU] == pytest.approx(2 * int((above & masks["inner"]).sum()) / both)
        assert one.dice[intensities.OTSU] <= one.dice[intensities.BEST] < 1
    # The exercise's answer, as the docs have it.
    figure = Figure()
    said = intensities.draw(figure, found, named)
    assert said[0] == "Otsu's threshold: Dice 0.856 (median of 18 samples; quartiles 0.839 and 0.902, least 0.602)"
    assert said[1].startswith("best threshold: Dice 0.905 ") and said[2].startswith("proposed, edges: Dice 0.92")
    assert said[-1] == "7 of 18 samples: no threshold whatever reaches 0.9"
    drawn = sorted(y for points in figure.axes[2].collections[:1] for _, y in points.get_offsets().tolist())
    assert drawn == pytest.approx(sorted(one.dice[intensities.OTSU] for one in found))


def test_what_nobody_drew_is_left_out(db: Database, conn: psycopg.Connection) -> None:
    """Masks that were derived are no points of a plot, and it is said how many there were."""
    samples = conn.execute(
        "UPDATE pairing SET state = 'rejected' WHERE annotation_id IN (SELECT annotation_id FROM sample WHERE structure = 'inner' "
        "AND sample_id IN (SELECT sample_id FROM sample WHERE structure = 'outer' ORDER BY sample_key LIMIT 2)) RETURNING image_id"
    ).fetchall()
    before = plots.plot(db, "areas", where=None, structures=[], jobs=1, kind="svg")
    assert before[1] == []
    assert threshold.threshold(db, outer="outer", jobs=1, actor="somebody").proposed == len(samples) == 2
    assert plots.plot(db, "areas", where=None, structures=[], jobs=1, kind="svg") == (
        before[0],
        ["2 derived masks left out: nobody drew them"],
    )
    with pytest.raises(UsageError, match="no mask that somebody drew fits"):
        plot(db, "areas", where="origin = 'proposed'")


def test_without_scipy_thresholds_are_judged_alone(catalog, ingested: str, tmp_path: Path) -> None:
    """The question is answered with matplotlib's extra alone; what would be proposed is left out, and it is said how to get it."""
    (tmp_path / "scipy.py").write_text("raise ImportError\n")
    done = catalog("plot", "intensities", "-o", tmp_path / "x.png", env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    lines = [line.removeprefix("catalog: ") for line in done.stderr.splitlines()]
    assert [line.partition(":")[0] for line in lines[:2]] == ["Otsu's threshold", "best threshold"]
    assert lines[2].endswith("samples: no threshold whatever reaches 0.9")
    assert lines[3] == "what `catalog threshold` would propose is left out: pip install 'scanfeed[derive]'"


def test_hostile_names_are_drawn(db: Database, conn: psycopg.Connection) -> None:
    """Dollars, markup and a leading underscore in a structure's name are text like any other."""
    conn.execute("UPDATE structure SET name = %s WHERE name = 'inner'", ["_$\\bad{$ </text><script>alert(1)</script>"])
    for what in ("areas", "spread"):
        root = ET.fromstring(plot(db, what))
        assert not [element for element in root.iter() if element.tag.endswith("script")]
    figure = Figure()
    plots._areas(figure, plots.masks(db, None, []))
    legend = figure.axes[1].get_legend()
    assert any("_$\\bad{$" in text.get_text() for text in legend.get_texts())


def test_where_and_structures_choose(db: Database, conn: psycopg.Connection) -> None:
    """--where is a condition over the view, run without rights; --structure leaves the others out; nothing is one clear line."""
    assert {row.structure for row in plots.masks(db, None, ["outer"])} == {"outer"}
    assert {row.phase for row in plots.masks(db, "phase = 0", [])} == {0}
    for where in ("true; DELETE FROM flag", "1=1) OR (1=1", "(SELECT password FROM sql_login) = 'x'"):
        with pytest.raises(UsageError, match="it must be an SQL condition over the view sample"):
            plot(db, "areas", where=where)
    with pytest.raises(UsageError, match="nothing to plot"):
        plot(db, "areas", where="structure = 'nobody'")
    with pytest.raises(UsageError, match="the one around it"):
        plot(db, "intensities", where="structure = 'inner'")


def test_the_command_writes_a_file_or_one_line(catalog, ingested: str, tmp_path: Path) -> None:
    """PNG or SVG by the file's name; another name is refused before anything is read."""
    assert "distributions" not in catalog("plot", "--help").stdout  # what is asked for is called spread
    done = catalog("plot", "spread", "-o", tmp_path / "x.svg", "--structure", "inner")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'x.svg'}\n"), done.stderr
    assert (tmp_path / "x.svg").read_text().startswith("<?xml")
    done = catalog("plot", "areas", "-o", tmp_path / "x.pdf")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and ".png or .svg" in done.stderr


def test_without_matplotlib_it_says_what_to_install(ingested: str, tmp_path: Path) -> None:
    """One line that names the extra, and no traceback; the rest of the command line works."""
    without = "import sys; sys.modules['matplotlib'] = None; from catalog.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", without, "plot", "areas", "-o", str(tmp_path / "x.png")],
        capture_output=True,
        text=True,
        cwd="/",
        timeout=120,
    )
    assert done.returncode == 1
    assert done.stderr == "catalog: plots need matplotlib, which is not installed: pip install 'scanfeed[plots]'\n"
