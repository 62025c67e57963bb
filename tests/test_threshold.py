"""Proposed labels: what is found by intensities, that it says what it is, and that it goes with what it was made from."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import psycopg
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from catalog import contours, flags, ingest, inside, roots, selection, synthetic, threshold
from catalog.database import open_database
from catalog.errors import CatalogError, UsageError
from catalog.inside import Method
from tests.conftest import Run

Mask = npt.NDArray[np.bool_]
GREY = st.floats(-1e6, 1e6, width=32)


def ellipse(at: tuple[float, float], radii: tuple[float, float], size: int = 80) -> Mask:
    rows, columns = np.mgrid[:size, :size]
    return ((rows - at[0]) / radii[0]) ** 2 + ((columns - at[1]) / radii[1]) ** 2 <= 1.0


# ------------------------------------------------------------------------------------------ by intensities


@given(hnp.arrays(np.float64, st.integers(0, 40), elements=GREY))
def test_otsu_is_the_best_of_all_thresholds(values: np.ndarray) -> None:
    """No other threshold gives two classes of less variance within; values that are all equal have no threshold."""
    level = inside.otsu(values)
    if len(np.unique(values)) < 2:
        assert level is None
        return
    assert level is not None and values.min() <= level < values.max()

    def within(at: float) -> float:
        low, high = values[values <= at], values[values > at]
        return float(((low - low.mean()) ** 2).sum() + ((high - high.mean()) ** 2).sum())

    best = min(within(at) for at in np.unique(values)[:-1].tolist())
    assert within(level) <= best * (1 + 1e-6) + 1e-9 * float(((values - values.mean()) ** 2).sum())


@given(hnp.arrays(np.int16, st.integers(2, 40)), st.floats(0.01, 100), st.floats(-1e4, 1e4))
def test_otsu_knows_no_unit(values: np.ndarray, slope: float, intercept: float) -> None:
    """Stored values and the same after a rescale are divided alike."""
    stored, rescaled = inside.otsu(values), inside.otsu(values * slope + intercept)
    if stored is None:
        assert rescaled is None
    else:
        assert rescaled == pytest.approx(stored * slope + intercept, rel=1e-6, abs=1e-6)


@settings(max_examples=40)
@given(
    at=st.tuples(st.floats(34, 46), st.floats(34, 46)), radii=st.tuples(st.floats(9, 14), st.floats(9, 14)), wall=st.floats(4, 8),
    seed=st.integers(0, 1000), brighter=st.booleans(), method=st.sampled_from(Method),
)  # fmt: skip
def test_a_pool_is_found(
    at: tuple[float, float], radii: tuple[float, float], wall: float, seed: int, brighter: bool, method: Method
) -> None:
    """A noisy ellipse inside another one is found by every method, brighter or darker than what is around it, whatever lies outside."""
    rng = np.random.default_rng(seed)
    outer, pool = ellipse(at, (radii[0] + wall, radii[1] + wall)), ellipse(at, radii)
    pixels = rng.normal(0, 12, outer.shape) + 100 * outer + (150 if brighter else -150) * pool
    pixels[:, 73:] += 400  # a bright neighbour
    found = inside.found(pixels, outer, method)
    assert found is not None and found.parameters["brighter"] is brighter
    assert not (found.mask & ~outer).any()
    assert inside.dice(found.mask, pool) > 0.93
    turned = inside.found(-pixels, outer, method)
    assert turned is not None and inside.dice(turned.mask, found.mask) > 0.99
    moved = inside.found(np.pad(pixels, 9, mode="edge"), np.pad(outer, 9), method)
    assert moved is not None and (moved.mask[9:-9, 9:-9] == found.mask).all()


@pytest.mark.parametrize("method", Method)
def test_what_hangs_in_the_pool_belongs_to_it(method: Method) -> None:
    """Papillary muscles, as dark as the wall, are inside, as readers draw them; a fleck of blood in the wall is not."""
    outer, pool = ellipse((40, 40), (24, 24)), ellipse((40, 40), (17, 17))
    muscles = ellipse((34, 36), (3, 3)) | ellipse((46, 45), (3, 3))
    pixels = 100.0 * outer + 150.0 * (pool & ~muscles)
    pixels[40, 61] = 300
    found = inside.found(pixels, outer, method)
    assert found is not None and found.mask[muscles].all() and not found.mask[40, 61]
    assert inside.dice(found.mask, pool) > 0.95


@given(
    st.data(),
    st.sampled_from(Method),
    hnp.arrays(np.float32, st.tuples(st.integers(1, 14), st.integers(1, 14)), elements=GREY | st.sampled_from([np.nan, np.inf, -np.inf])),
)
def test_whatever_the_pixels(data: st.DataObject, method: Method, pixels: np.ndarray) -> None:
    """Any pixels and any mask give a mask inside it that is neither empty nor all of it, or nothing; nothing is written to."""
    around = data.draw(hnp.arrays(np.bool_, pixels.shape))
    copies = pixels.copy(), around.copy()
    found = inside.found(pixels, around, method)
    np.testing.assert_array_equal(pixels, copies[0])
    np.testing.assert_array_equal(around, copies[1])
    if found is not None:
        assert found.mask.shape == around.shape and not (found.mask & ~around).any()
        assert found.mask.any() and (found.mask != around).any()


@pytest.mark.parametrize("method", Method)
def test_where_there_is_nothing_nothing_is_made_up(method: Method) -> None:
    """One grey, no number, an empty mask, a handful of pixels: None. Shapes that differ and colours are refused."""
    outer = ellipse((40, 40), (20, 20))
    assert inside.found(np.full(outer.shape, 7.0), outer, method) is None
    assert inside.found(np.full(outer.shape, np.nan), outer, method) is None
    assert inside.found(np.random.default_rng(0).normal(size=outer.shape), np.zeros_like(outer), method) is None
    assert inside.found(np.arange(6.0).reshape(2, 3), np.ones((2, 3), np.bool_), method) is None
    for shape in ((80, 81), (80, 80, 3)):
        with pytest.raises(ValueError, match="one shape"):
            inside.found(np.zeros(shape), outer, method)


@given(st.data())
def test_no_threshold_beats_the_best_one(data: st.DataObject) -> None:
    """`best_dice` is the largest Dice over all thresholds, brighter or darker."""
    pixels = data.draw(hnp.arrays(np.int8, (5, 6), elements=st.integers(0, 6))).astype(float)
    around, drawn = (data.draw(hnp.arrays(np.bool_, (5, 6))) for _ in range(2))
    around |= drawn
    if not drawn.any():
        return
    each = [inside.dice(around & (sign * pixels >= at), drawn) for sign in (1, -1) for at in np.unique(sign * pixels)]
    assert inside.best_dice(pixels, around, drawn) == pytest.approx(max(each))


def test_dice() -> None:
    """Twice the common pixels over both; two empty masks are equal."""
    one, other = np.array([1, 1, 0, 0], np.bool_), np.array([0, 1, 1, 1], np.bool_)
    assert inside.dice(one, other) == 2 / 5
    assert inside.dice(one & ~one, one & ~one) == 1.0 and inside.dice(one, ~one) == 0.0


# ------------------------------------------------------------------------------------------ as rows


@pytest.fixture
def propose(ingested: str) -> Callable[..., threshold.Proposed]:
    """Propose on the synthetic studies."""

    def run(**options: object) -> threshold.Proposed:
        with open_database(ingested) as db:
            return threshold.threshold(db, **{"outer": "outer", "jobs": 1, "actor": "somebody", **options})  # type: ignore[arg-type]

    return run


@pytest.fixture
def undrawn(conn: psycopg.Connection, ingested: str) -> list[int]:
    """Three samples with an outer contour whose inner ones are rejected; three more have both."""
    rows = conn.execute(
        "UPDATE pairing SET state = 'rejected' WHERE annotation_id IN (SELECT annotation_id FROM sample WHERE structure = 'inner' "
        "AND sample_id IN (SELECT sample_id FROM sample WHERE structure = 'outer' ORDER BY sample_key LIMIT 3)) RETURNING image_id"
    ).fetchall()
    return sorted(sample for (sample,) in rows)


def proposals(conn: psycopg.Connection) -> list[int]:
    """Return the samples that have a proposed inner one: what a feed gets that asks for it."""
    found, parameters = selection.conditions(of_structures=True, origins=["proposed"])
    query = psycopg.sql.SQL("SELECT sample_id FROM sample WHERE {} AND structure = 'inner' ORDER BY 1")
    return [sample for (sample,) in conn.execute(query.format(psycopg.sql.SQL(" AND ").join(found)), parameters)]


def everything(conn: psycopg.Connection) -> list[object]:
    query = "SELECT md5(string_agg(t::text, '' ORDER BY t::text)) FROM {} t"
    tables = ("annotation", "pairing", "mask", "shape", "overlap", "flag", "event", "derivation", "reader", "structure")
    return [conn.execute(query.format(table)).fetchone() for table in tables]  # type: ignore[arg-type]


def decide(conn: psycopg.Connection, samples: list[int], structure: str, state: str, origin: str = "contour") -> None:
    conn.execute(
        "UPDATE pairing p SET state = %s FROM annotation a JOIN structure s ON s.id = a.structure_id "
        "WHERE a.id = p.annotation_id AND p.image_id = ANY(%s) AND s.name = %s AND a.origin = %s AND a.current",
        [state, samples, structure, origin],
    )


def test_a_proposal_says_what_it_is(propose: Callable[..., threshold.Proposed], undrawn: list[int], conn: psycopg.Connection) -> None:
    """Where the inside is not drawn it is proposed: a segment of origin proposed in its parent's file and run, paired with the image, with
    a mask that is what the method finds in the file's pixels, a shape, and a derivation; where it is drawn nothing is, and the drawn one
    judges. No feed gets it that does not ask."""
    done = propose(method=Method.OTSU)
    assert (done.inner, done.images, done.drawn, done.proposed, done.replaced, done.problems) == ("inner", 6, 3, 3, 0, [])
    assert done.judged is not None and done.judged.images == 3 and 0.8 < done.judged.least <= done.judged.median <= 1.0
    assert proposals(conn) == undrawn
    rows = conn.execute(
        "SELECT v.sample_id, v.path, a.kind, a.origin, r.name, r.preference, a.version, a.source_key, 'threshold:inner:' || v.sample_key, "
        "(a.file_id, a.ingest_run_id) = (o.file_id, o.ingest_run_id), so.name, d.method, d.along, d.second_id, d.parameters, d.actor, "
        "p.method, p.state, p.score, p.actor, p.rule, m.rows, m.columns, ARRAY[m.box_row, m.box_column, m.box_rows, m.box_columns], "
        "m.bits, om.rows, om.columns, ARRAY[om.box_row, om.box_column, om.box_rows, om.box_columns], om.bits, h.holes "
        "FROM sample v JOIN annotation a ON a.id = v.annotation_id JOIN reader r ON r.id = a.reader_id JOIN derivation d "
        "ON d.annotation_id = a.id JOIN annotation o ON o.id = d.first_id JOIN structure so ON so.id = o.structure_id "
        "JOIN pairing p ON p.annotation_id = a.id JOIN mask m ON m.pairing_id = p.id JOIN shape h ON h.pairing_id = p.id "
        "JOIN pairing q ON q.annotation_id = o.id JOIN mask om ON om.pairing_id = q.id WHERE v.origin = 'proposed'"
    ).fetchall()
    assert len(rows) == 3
    for _, path, *said, found, actor, method, state, score, by, rule, h, w, box, bits, oh, ow, obox, obits, holes in rows:
        assert said[:6] == ["segment", "proposed", "threshold", 1000, 1, said[6]] and said[7:] == [True, "outer", "otsu", None, None]
        assert (actor, method, state, score, by, holes) == ("somebody", "threshold", "accepted", 0.5, "somebody", 0)
        assert rule == "Otsu's threshold of the pixels inside outer, convex hull of the largest part"
        outer = contours.unboxed(oh, ow, tuple(obox), obits)
        expected = inside.found(pydicom.dcmread(path).pixel_array, outer, Method.OTSU)
        assert expected is not None and (contours.unboxed(h, w, tuple(box), bits) == expected.mask).all()
        assert found == expected.parameters and found["brighter"]
    drawn, parameters = selection.conditions(of_structures=True)
    query = psycopg.sql.SQL("SELECT count(*) FROM sample WHERE {} AND origin = 'proposed'").format(psycopg.sql.SQL(" AND ").join(drawn))
    assert conn.execute(query, parameters).fetchone() == (0,)


def test_again_changes_nothing(propose: Callable[..., threshold.Proposed], undrawn: list[int], conn: psycopg.Connection) -> None:
    """The same again writes nothing, a dry run neither and says the same; another method makes new versions, of which one is current."""
    before = everything(conn)
    dry = propose(dry_run=True)
    assert everything(conn) == before
    assert propose() == dry and dry.proposed == 3
    made = everything(conn)
    again = propose()
    assert (again.proposed, again.unchanged, again.retired) == (0, 3, 0)
    assert everything(conn) == made
    other = propose(method=Method.KMEANS)
    assert (other.proposed, other.replaced, other.unchanged) == (3, 3, 0)
    assert conn.execute(
        "SELECT version, current, count(*) FROM annotation WHERE origin = 'proposed' GROUP BY 1, 2 ORDER BY 1"
    ).fetchall() == [
        (1, False, 3),
        (2, True, 3),
    ]


def test_where_it_is_drawn_only_if_asked(propose: Callable[..., threshold.Proposed], undrawn: list[int], conn: psycopg.Connection) -> None:
    """--also-drawn proposes on every image; the view keeps the drawn ones; without it what stands on drawn ones is retired."""
    done = propose(also_drawn=True)
    assert (done.proposed, done.drawn, done.judged and done.judged.images) == (6, 0, 3)
    assert proposals(conn) == undrawn
    done = propose()
    assert (done.proposed, done.unchanged, done.retired) == (0, 3, 3)
    assert conn.execute("SELECT count(*) FROM annotation WHERE origin = 'proposed' AND current").fetchone() == (3,)


def test_it_goes_with_its_parent(propose: Callable[..., threshold.Proposed], undrawn: list[int], conn: psycopg.Connection) -> None:
    """A rejected outer contour takes its proposal along at once; accepted again, the same proposal returns with the next run; if a run came
    between, it is retired by that and made as a new version."""
    propose()
    one = undrawn[:1]
    decide(conn, one, "outer", "rejected")
    assert proposals(conn) == undrawn[1:]
    decide(conn, one, "outer", "accepted")
    done = propose()
    assert (done.proposed, done.returned, done.unchanged, done.rejected) == (0, 1, 2, 0)
    assert proposals(conn) == undrawn
    decide(conn, one, "outer", "rejected")
    done = propose()
    assert (done.images, done.proposed, done.unchanged, done.retired) == (5, 0, 2, 1)
    decide(conn, one, "outer", "accepted")
    assert (propose().proposed, proposals(conn)) == (1, undrawn)
    assert conn.execute("SELECT max(version) FROM annotation WHERE origin = 'proposed' AND current").fetchone() == (2,)


def test_what_people_say_stands(propose: Callable[..., threshold.Proposed], undrawn: list[int], conn: psycopg.Connection) -> None:
    """A rejected proposal is not made again as long as it would be the same; where somebody drew since, the proposal is retired."""
    propose()
    decide(conn, undrawn[:1], "inner", "rejected", origin="proposed")
    done = propose()
    assert (done.proposed, done.unchanged, done.rejected) == (0, 3, 1)
    assert proposals(conn) == undrawn[1:]
    decide(conn, undrawn[1:2], "inner", "accepted")
    done = propose()
    assert (done.drawn, done.unchanged, done.retired) == (4, 2, 1)
    assert proposals(conn) == undrawn[2:]


def test_flagged_and_revoked_images_are_left_out(
    propose: Callable[..., threshold.Proposed], undrawn: list[int], conn: psycopg.Connection, ingested: str
) -> None:
    """An open error keeps an image out, and so does consent withdrawn; proposals that stand there stay as they are, unfed."""
    conn.execute(
        "INSERT INTO flag (rule, severity, detail, annotation_id, raised_by) SELECT 'X', 'error', 'x', annotation_id, 'test' FROM sample "
        "WHERE structure = 'outer' AND sample_id = %s",
        undrawn[:1],
    )
    assert (propose().proposed, proposals(conn)) == (2, undrawn[1:])
    conn.execute("UPDATE flag SET state = 'resolved', closed_by = 'somebody', closed_at = now() WHERE rule = 'X'")
    assert (propose().proposed, proposals(conn)) == (1, undrawn)
    conn.execute("UPDATE flag SET state = 'open', closed_by = NULL, closed_at = NULL WHERE rule = 'X'")
    done = propose()
    assert (done.images, done.unchanged, done.retired) == (5, 2, 0)
    assert proposals(conn) == undrawn[1:]
    [patient] = conn.execute("SELECT patient FROM sample WHERE sample_id = %s", undrawn[1:2]).fetchone() or [""]
    with open_database(ingested) as db:
        flags.withdraw(db, patient, reason="asked to", actor="somebody")
    assert propose().images < 5 and undrawn[1] not in proposals(conn)


def test_what_changed_meanwhile_is_not_overwritten(undrawn: list[int], ingested: str, conn: psycopg.Connection) -> None:
    """While pixels are read a parent may be rejected and a contour drawn: nothing is proposed there. A running ingest is waited for in
    vain and named."""
    with open_database(ingested) as db, db.connect() as own:
        targets = threshold._targets(own, "outer", "inner")
        outcomes = list(threshold._outcomes(db, targets, Method.EDGES, 1, lambda done, total: None))
        wanted = [one for one in outcomes if one.target.drawn is None]
        assert len(wanted) == 3
        decide(conn, undrawn[:1], "outer", "rejected")
        decide(conn, undrawn[1:2], "inner", "accepted")
        parameters = {
            "outer": "outer", "inner": "inner", "method": "edges", "also_drawn": False, "drawn": list(selection.DRAWN), "actor": "x",
            "reader": "threshold", "score": 0.5, "rule": "", "version": "", "parent_gone": threshold.PARENT_GONE,
        }  # fmt: skip
        done = threshold.Proposed("outer", "inner", "edges")
        threshold._write(own, done, wanted, parameters, dry_run=False)
        own.commit()
        assert done.proposed == 1 and proposals(conn) == undrawn[2:]
        with conn.transaction():
            [root] = conn.execute("SELECT id FROM root").fetchone() or [0]
            roots.alone(conn, [root])
            with pytest.raises(CatalogError, match="an ingest of it is running"):
                threshold.threshold(db, outer="outer", jobs=1, actor="somebody")


def test_a_changed_contour_makes_a_new_proposal(tmp_path: Path, database_url: str, conn: psycopg.Connection) -> None:
    """A corrected outer contour that is ingested takes the proposal of the old one along; the next run proposes from the new one. The
    same ingested again leaves proposals alone."""
    synthetic.write_studies(tmp_path / "s", patients=1, slices=4, phases=2, size=64, seed=4)
    shutil.rmtree(tmp_path / "s" / "contourfiles" / "SC-SYN-0001" / "i-contours")
    with open_database(database_url) as db:
        ingest.ingest(db, tmp_path / "s", jobs=1)
        assert threshold.threshold(db, outer="outer", jobs=1, actor="somebody").proposed == 2
        first = proposals(conn)
        ingest.ingest(db, tmp_path / "s", jobs=1)
        assert proposals(conn) == first and len(first) == 2
        path = sorted((tmp_path / "s").glob("contourfiles/*/o-contours/*.txt"))[0]
        points = np.loadtxt(path)
        path.write_text("".join(f"{x:.2f} {y:.2f}\n" for x, y in ((points - points.mean(axis=0)) * 1.1 + points.mean(axis=0)).tolist()))
        ingest.ingest(db, tmp_path / "s", jobs=1)
        assert len(proposals(conn)) == 1
        assert threshold.threshold(db, outer="outer", jobs=1, actor="somebody").proposed == 1
        assert proposals(conn) == first
        parents = conn.execute(
            "SELECT o.current FROM annotation a JOIN derivation d ON d.annotation_id = a.id JOIN annotation o ON o.id = d.first_id "
            "WHERE a.current AND a.origin = 'proposed'"
        ).fetchall()
        assert parents == [(True,), (True,)]


# ------------------------------------------------------------------------------------------ the command


def test_the_command(catalog: Run, tmp_path: Path, database_url: str, conn: psycopg.Connection) -> None:
    """It says what it proposed and how good that is; --json has the same; an image that cannot be read costs that one alone, exit code 3,
    with the sample's number and no path; names that make no sense are one line."""
    synthetic.write_studies(tmp_path / "s", patients=1, slices=5, phases=2, size=64, seed=4)
    with open_database(database_url) as db:
        ingest.ingest(db, tmp_path / "s", jobs=1)
    done = catalog("threshold", "--outer", "outer", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("inner inside outer by edges: 0 proposals made, 0 unchanged, 0 retired; 3 images have outer\n")
    assert "against 3 drawn ones: Dice 0." in done.stdout and "dry run" in done.stderr
    [sample] = conn.execute("SELECT min(sample_id) FROM sample WHERE structure = 'outer'").fetchone() or [0]
    [path] = conn.execute("SELECT path FROM image_all WHERE sample_id = %s", [sample]).fetchone() or [""]
    Path(path).unlink()
    done = catalog("threshold", "--outer", "outer", "--also-drawn", "--json")
    assert done.returncode == 3 and done.stderr.startswith(f"catalog: sample {sample}: ") and str(tmp_path) not in done.stderr
    said = json.loads(done.stdout)
    assert (said["proposed"], said["judged"]["images"], len(said["problems"])) == (2, 2, 1)
    conn.execute("INSERT INTO structure (name) VALUES ('clot')")
    for arguments, code, text in (
        (("--outer", "nobody"), 2, "--outer 'nobody': there is none of this name; there are clot, inner, outer"),
        (("--outer", "nobody", "--inner", "x"), 2, "--outer 'nobody': there is none of this name"),
        (("--outer", "inner"), 2, "--inner: nothing is said to lie inside inner"),
        (("--outer", "clot", "--inner", "x"), 1, "clot: no image has a mask of it"),
        (("--outer", "outer", "--inner", "outer"), 2, "cannot lie inside itself"),
        (("--outer", " "), 2, "--outer: is empty"),
    ):
        done = catalog("threshold", *arguments)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (code, "", 1) and text in done.stderr


def test_several_insides_are_asked_for(propose: Callable[..., threshold.Proposed], conn: psycopg.Connection) -> None:
    """Where several structures are said to lie inside, none is guessed; a new name is one."""
    conn.execute("INSERT INTO relation (inside, outside, actor) VALUES ('clot', 'outer', 'test')")
    with pytest.raises(UsageError, match="clot, inner lie inside outer"):
        propose()
    assert propose(inner="pool").proposed == 6
    assert conn.execute("SELECT count(*) FROM sample WHERE structure = 'pool' AND origin = 'proposed'").fetchone() == (6,)


def test_without_scipy_it_says_what_to_install(ingested: str) -> None:
    """One line that names the extra, and no traceback."""
    without = "import sys; sys.modules['scipy'] = None; from catalog.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", without, "threshold", "--outer", "outer"], capture_output=True, text=True, cwd="/", timeout=120
    )
    assert done.returncode == 1
    assert done.stderr == "catalog: proposals need SciPy, which is not installed: pip install 'scanfeed[derive]'\n"


def test_dice_on_the_real_studies(sunnybrook: Path, database_url: str) -> None:
    """On the 18 real images with both contours each method reaches what the docs say it does."""
    with open_database(database_url) as db:
        ingest.ingest(db, sunnybrook, jobs=1)
        found = {method: threshold.threshold(db, outer="outer", method=method, jobs=1, actor="x", dry_run=True).judged for method in Method}
    assert all(one is not None and one.images == 18 for one in found.values())
    medians = {method: round(one.median, 2) for method, one in found.items() if one}
    assert medians == {Method.EDGES: 0.92, Method.OTSU: 0.88, Method.KMEANS: 0.90}
