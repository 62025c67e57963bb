"""Classes and statistics that a stream looks up once: the same as numpy over all pixels, and kept whatever comes later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st

from catalog import ingest, measuring
from catalog.database import open_database
from catalog.errors import CatalogError
from catalog.statistics import statistics
from loaderd import attempts, constants, selections
from loaderd.definitions import Definition

WANTED = ("mean", "std", "min", "max", "p0", "p1", "p50", "p99.5", "p100")


def by_numpy(images: list[np.ndarray[Any, Any]]) -> dict[str, float]:
    every = np.concatenate([image.reshape(-1).astype(np.float64) for image in images])
    every = every[np.isfinite(every)]
    found = {"mean": every.mean(), "std": every.std(), "min": every.min(), "max": every.max()}
    percents = [key for key in WANTED if key not in found]
    return found | dict(zip(percents, np.percentile(every, [float(key[1:]) for key in percents]), strict=True))


def files_of(conn: psycopg.Connection[Any], phases: int = 100) -> list[np.ndarray[Any, Any]]:
    """What pydicom and numpy say of all images of the catalog's first phases."""
    rows = conn.execute(
        "SELECT pl.url, pl.path, i.slope, i.intercept FROM image i JOIN location l ON l.image_id = i.id AND l.preferred "
        "JOIN place pl ON pl.file_id = l.file_id WHERE i.phase < %s ORDER BY i.sample_key",
        [phases],
    ).fetchall()
    return [pydicom.dcmread(Path(url, path)).pixel_array.astype(np.float64) * slope + shift for url, path, slope, shift in rows]


def look_up(conn: psycopg.Connection[Any], definition: Definition | None = None) -> dict[str, float]:
    return constants.statistics_of(conn, conn, selections.selection(definition or Definition()), WANTED)


@given(
    st.lists(st.tuples(st.integers(1, 50), st.floats(-1e4, 1e4), st.floats(0, 100)), min_size=1, max_size=8),
    st.integers(0, 2**32 - 1),
    st.sampled_from([None, 1.0, 0.25, -2.0]),
)
def test_together_is_as_numpy_over_all(drawn: list[tuple[int, float, float]], seed: int, slope: float | None) -> None:
    """Of images of any sizes: mean and deviation to 1e-9, percentiles to a 2⁻²⁰ of the range; of whole numbers times a slope exactly."""
    rng = np.random.default_rng(seed)
    images = [rng.normal(mean, spread, size) for size, mean, spread in drawn]
    if slope is not None:
        images = [np.rint(image) * slope + 7.5 for image in images]
    whole = constants.combined([(image.size, *statistics(image)[:4]) for image in images])
    expected = by_numpy(images)
    scale = max(abs(expected["min"]), abs(expected["max"]), 1e-300)
    assert whole.mean == pytest.approx(expected["mean"], rel=1e-9, abs=1e-9 * scale)
    assert whole.deviation == pytest.approx(expected["std"], rel=1e-9, abs=1e-9 * scale)
    assert (whole.minimum, whole.maximum) == (expected["min"], expected["max"])
    percents = [0.0, 1.0, 37.5, 50.0, 99.5, 100.0]
    found = constants.percentiles(images, percents, whole, None if slope is None else abs(slope))
    extent = whole.maximum - whole.minimum
    tolerance = 1e-12 * scale if slope is not None else extent / constants.BINS + 1e-12 * scale
    assert found == pytest.approx(np.percentile(np.concatenate(images), percents).tolist(), rel=0, abs=tolerance)


def test_large_means_keep_their_deviation() -> None:
    """A deviation of 1 on a mean of 10⁹ comes out, where the difference of squares would have no digit left."""
    images = [1e9 + np.random.default_rng(n).standard_normal(1000) for n in range(3)]
    assert constants.combined([(1000, *statistics(one)[:4]) for one in images]).deviation == pytest.approx(
        np.concatenate(images).std(), 1e-6
    )


def test_what_is_no_number_is_left_out() -> None:
    """NaN and infinity count nowhere; an image of nothing else counts for nothing, and with no other there is an error."""
    images = [np.array([1.0, np.nan, 3.0]), np.array([np.inf, np.nan]), np.array([8.0, 8.0])]
    measured = [(image.size - one.nans, *one[:4]) for image in images for one in [statistics(image)]]
    whole = constants.combined(measured)
    assert (whole.mean, whole.minimum, whole.maximum) == (5.0, 1.0, 8.0)
    assert constants.percentiles(images, [0, 50, 100], whole, 1.0) == [1.0, 5.5, 8.0]
    assert constants.percentiles(images[2:], [0, 50], constants.combined(measured[2:]), None) == [8.0, 8.0]
    with pytest.raises(CatalogError, match="no finite number"):
        constants.combined(measured[1:2])


def test_measured_or_not_it_is_the_same(ingested: str, conn: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not measured is read here; slopes that differ count; beyond so many images `catalog measure` is named."""
    conn.execute("UPDATE image SET slope = 0.3, intercept = -3.1 WHERE phase = 1")
    expected = by_numpy(files_of(conn))
    read = look_up(conn)
    assert read == pytest.approx(expected, abs=(expected["max"] - expected["min"]) / constants.BINS)
    assert read["mean"] == pytest.approx(expected["mean"], rel=1e-9) and read["std"] == pytest.approx(expected["std"], rel=1e-9)
    monkeypatch.setattr(constants, "MOST_READ", 47)
    with pytest.raises(CatalogError, match="48 of its 48 images are not measured; run `catalog measure`"):
        look_up(conn)
    with open_database(ingested) as db:
        measuring.measure(db, jobs=1)
    measured = look_up(conn)
    for key in ("mean", "std", "min", "max"):
        assert measured[key] == pytest.approx(expected[key], rel=1e-9)
    # Percentiles come from the pixels of the 47 first by their key.
    first = by_numpy(files_of(conn)[:47])
    for key in ("p1", "p50", "p99.5"):
        assert measured[key] == pytest.approx(first[key], abs=(expected["max"] - expected["min"]) / constants.BINS)
    monkeypatch.undo()
    assert look_up(conn) == pytest.approx(read, rel=1e-12)
    part = Definition(structures=("inner",), where="patient = 'SYN0002'", limit=3)
    assert look_up(conn, part)["max"] < expected["max"] and look_up(conn, part) == look_up(conn, part)


@pytest.mark.usefixtures("ingested")
def test_files_that_cannot_be_read(conn: psycopg.Connection[Any]) -> None:
    """One unreadable file of many changes nothing but that it is left out; more say which sample, why, and what to do."""
    ids = [image for (image,) in conn.execute("SELECT id FROM image ORDER BY id LIMIT 3")]
    everything = look_up(conn)
    conn.execute("UPDATE file f SET size = size + 1 FROM location l WHERE l.file_id = f.id AND l.image_id = %s", [ids[0]])
    assert look_up(conn)["mean"] != everything["mean"]
    conn.execute("UPDATE file f SET size = size + 1 FROM location l WHERE l.file_id = f.id AND l.image_id = ANY(%s)", [ids[1:]])
    with pytest.raises(CatalogError, match=r"2 of 48 images cannot be read, of sample \d+: the file is not what was catalogued"):
        look_up(conn)


@pytest.mark.usefixtures("ingested")
def test_it_stays_with_the_stream(conn: psycopg.Connection[Any]) -> None:
    """The first that asks decides: what comes into the catalog later, or is found by a rank that came at once, changes nothing."""
    definition = Definition(transforms=({"name": "zscore", "over": "dataset"},), where="phase = 0")
    stream = attempts.open_stream(conn, definition)
    found = constants.of(conn, conn, stream, definition)
    assert set(found) == {"statistics"} and set(found["statistics"]) == {"mean", "std"}
    conn.execute("UPDATE file SET size = size + 1")  # nothing could be read any more
    assert constants.of(conn, conn, stream, definition) == found
    other = attempts.open_stream(conn, Definition(where="phase = 1"))
    assert constants.of(conn, conn, other, Definition(where="phase = 1")) == {}
    assert conn.execute("SELECT count(*) FROM stream WHERE constants IS NOT NULL").fetchone() == (1,)


@pytest.mark.usefixtures("ingested")
def test_classes_are_the_sorted_texts(conn: psycopg.Connection[Any]) -> None:
    """Labels that are texts have their places in the order of code points, whatever the database's collation; numbers need none."""
    conn.execute("INSERT INTO structure (name) VALUES ('view')")
    conn.execute(
        "INSERT INTO annotation (file_id, source_key, reader_id, structure_id, kind, origin, label, content_hash, ingest_run_id) "
        "SELECT a.file_id, 'v', a.reader_id, (SELECT id FROM structure WHERE name = 'view'), 'label', 'label', "
        "(ARRAY['b', 'a', 'B', 'ä', '10', 'a b'])[1 + row_number() OVER (ORDER BY a.id) % 6], '\\x00', a.ingest_run_id "
        "FROM annotation a JOIN structure t ON t.id = a.structure_id AND t.name = 'inner'"
    )
    conn.execute(
        "INSERT INTO pairing (annotation_id, image_id, method, rule, score, state, actor) "
        "SELECT v.id, p.image_id, 'test', 'as the contour', 1, 'accepted', 'test' FROM annotation v "
        "JOIN annotation a ON a.file_id = v.file_id AND a.kind <> 'label' JOIN pairing p ON p.annotation_id = a.id WHERE v.kind = 'label'"
    )
    definition = Definition(labels="view")
    conn.execute("SET enable_sort = off")  # else they come in the order of this server's collation
    found = constants.of(conn, conn, attempts.open_stream(conn, definition), definition)
    assert found == {"classes": ["10", "B", "a", "a b", "b", "ä"]}
    conn.execute("UPDATE annotation SET label = (id % 3 - 1)::text WHERE kind = 'label'")
    assert constants.classes(conn, selections.selection(definition)) is None


def test_real_studies(database_url: str, conn: psycopg.Connection[Any], sunnybrook: Path) -> None:
    """Over 100 of the real images mean and deviation are numpy's to 1e-9, percentiles are numpy's."""
    with open_database(database_url) as db:
        ingest.ingest(db, sunnybrook, jobs=1)
    expected = by_numpy(files_of(conn, phases=4))
    found = look_up(conn, Definition(where="phase < 4"))
    assert found["mean"] == pytest.approx(expected["mean"], rel=1e-9) and found["std"] == pytest.approx(expected["std"], rel=1e-9)
    assert found == pytest.approx(expected, rel=1e-9)
