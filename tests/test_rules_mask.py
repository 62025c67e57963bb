"""Rules about pairings, contours, masks and labels: what is planted is found, what lies just inside is not, what is right is not."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psycopg
import pytest
from psycopg.types.json import Jsonb

from catalog import database, ingest, pairings, qa, records, rulefiles

Conn = psycopg.Connection[Any]
Ring = list[tuple[float, float]]
Drawn = list[Ring] | npt.NDArray[np.bool_]

MINE = ("CONTOUR-[!S]*", "MASK-*", "PAIR-*", "LABEL-*")
RAISED_BY_INGEST = {
    "CONTOUR-POINTS", "MASK-AREA", "MASK-EMPTY", "MASK-GEOMETRY", "PAIR-AMBIGUOUS", "PAIR-CHANGED", "PAIR-GRID", "PAIR-NO-IMAGE",
    "PAIR-PLANE",
}  # fmt: skip


def inner(conn: Conn, at: int = 0) -> tuple[int, int, int]:
    """Return (annotation, pairing, image) of one of the inner contours, counted from 0."""
    row = conn.execute(
        "SELECT a.id, p.id, p.image_id FROM annotation a JOIN pairing p ON p.annotation_id = a.id "
        "JOIN structure s ON s.id = a.structure_id WHERE s.name = 'inner' ORDER BY a.id OFFSET %s LIMIT 1",
        [at],
    ).fetchone()
    assert row is not None
    return row[0], row[1], row[2]


def plant(conn: Conn, drawn: Drawn, at: int = 0, spacing: float | None = None) -> int:
    """Draw something else in place of an inner contour, as a reader would have, and make its mask. Returns its annotation."""
    annotation, pairing, image = inner(conn, at)
    if isinstance(drawn, list):
        outline = records.polygon([np.array(ring, np.float64).reshape(-1, 2) for ring in drawn])
        what: list[object] = ["polygon", "contour", outline.points, outline.rings, "corner", None, None, None, None]
    else:
        raster = records.segment(drawn)
        what = ["segment", "segment", None, None, None, raster.rows, raster.columns, list(raster.box), raster.bits]
    conn.execute(
        'UPDATE annotation SET kind = %s, origin = %s, points = %s, rings = %s, convention = %s, "rows" = %s, columns = %s, box = %s, '
        "bits = %s WHERE id = %s",
        [*what, annotation],
    )
    conn.execute("DELETE FROM shape WHERE pairing_id = %s", [pairing])
    conn.execute("DELETE FROM mask WHERE pairing_id = %s", [pairing])
    if spacing is not None:
        conn.execute("UPDATE image SET row_spacing = %s, column_spacing = %s WHERE id = %s", [spacing, spacing, image])
    row = conn.execute("SELECT min(id) FROM root").fetchone()
    assert row is not None
    pairings.make_masks(conn, row[0])
    return annotation


def evaluate(url: str, pattern: str, **options: Any) -> list[qa.Result]:
    with database.open_database(url) as opened:
        return qa.run(opened, rules=qa.chosen(rulefiles.load(), pattern), **options).results


def flags(conn: Conn, code: str) -> dict[int, tuple[str, float | None, str]]:
    """Return what a rule has open: annotation → severity, value, detail."""
    rows = conn.execute(
        "SELECT coalesce(p.annotation_id, g.annotation_id), g.severity, g.value, g.detail FROM flag g "
        "LEFT JOIN pairing p ON p.id = g.pairing_id WHERE g.rule = %s AND g.state = 'open' AND g.raised_by = 'qa'",
        [code],
    )
    return {annotation: (severity, value, detail) for annotation, severity, value, detail in rows}


def box(left: float, top: float, right: float, bottom: float) -> Ring:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def walk(side: float, step: float, gap: float) -> Ring:
    """A square outline from (10, 10) with a point each `step` px, that ends `gap` px before it is round."""
    count = round((4 * side - gap) / step)
    corners = np.array([*box(10, 10, 10 + side, 10 + side), (10, 10)])
    along = np.arange(count + 1) * step
    ways = [np.interp(along, np.arange(5) * side, corners[:, axis]) for axis in (0, 1)]
    return list(zip(*(way.tolist() for way in ways), strict=True))


def pixels(count: int, width: int = 64) -> npt.NDArray[np.bool_]:
    """A mask of the first pixels below the border, row by row, `width` to a row."""
    mask = np.zeros((64, 64), bool)
    rows = np.arange(count)
    mask[(1 if width < 63 else 0) + rows // width, (1 if width < 63 else 0) + rows % width] = True
    return mask


def holed(*holes: tuple[int, int]) -> npt.NDArray[np.bool_]:
    mask = np.zeros((64, 64), bool)
    mask[10:30, 10:30] = True
    for row, column in holes:
        mask[row, column] = False
    return mask


def apart(*blocks: tuple[int, int]) -> npt.NDArray[np.bool_]:
    mask = np.zeros((64, 64), bool)
    for row, column in blocks:
        mask[row : row + 4, column : column + 4] = True
    return mask


STAR = [(30 + 20 * math.cos(0.8 * math.pi * at), 30 + 20 * math.sin(0.8 * math.pi * at)) for at in range(5)]
# Twice round: what the second turn encloses is no part of the mask.
LOOP = [(10.0, 10.0), (30.0, 10.0), (30.0, 30.0), (10.0, 30.0), (10.0, 14.0), (25.0, 14.0), (25.0, 25.0), (15.0, 25.0), (15.0, 14.0)]
BOW_TIE = [(10.0, 10.0), (30.0, 30.0), (30.0, 10.0), (10.0, 30.0)]
# In to the hole, round it the other way, and out by the way it came: how structure sets write holes.
KEYHOLE = [(10.0, 10.0), (30.0, 10.0), (30.0, 20.0), (25.0, 20.0), (25.0, 15.0), (15.0, 15.0), (15.0, 25.0), (25.0, 25.0), (25.0, 20.0),
           (30.0, 20.0), (30.0, 30.0), (10.0, 30.0)]  # fmt: skip

CASES: list[tuple[str, Drawn, tuple[str, float] | None]] = [
    ("CONTOUR-FEW-POINTS", [[(5, 5), (5, 5), (20, 20), (5, 5)]], ("error", 2)),
    ("CONTOUR-FEW-POINTS", [box(10, 10, 20, 20), [(5, 5), (6, 6), (5, 5)]], ("warning", 2)),
    ("CONTOUR-FEW-POINTS", [[(5, 5), (20, 20), (5, 20)]], None),
    ("CONTOUR-OUTSIDE", [box(-0.01, 10, 20, 20)], ("warning", 2)),
    ("CONTOUR-OUTSIDE", [[*box(10, 10, 64, 20), (30, 64.5)]], ("warning", 1)),
    ("CONTOUR-OUTSIDE", [box(0, 0, 64, 64)], None),
    ("CONTOUR-CROSSING", [BOW_TIE], ("warning", 1)),
    ("CONTOUR-CROSSING", [STAR], ("warning", 5)),
    ("CONTOUR-CROSSING", [box(10, 10, 20, 20), box(15, 12, 25, 18)], ("warning", 2)),
    ("CONTOUR-CROSSING", [KEYHOLE], None),
    ("CONTOUR-CROSSING", [[(10, 10), (20, 20), (30, 10), (30, 30), (20, 20), (10, 30)]], None),
    ("CONTOUR-CROSSING", [[*box(10, 10, 20, 20), (10, 10), (10, 10)]], None),
    ("CONTOUR-OPEN", [walk(20, 1, 9)], ("warning", 9)),
    ("CONTOUR-OPEN", [walk(20, 1, 8)], None),  # a tenth of 80 px
    ("CONTOUR-OPEN", [walk(5, 0.5, 3)], ("warning", 6)),
    ("CONTOUR-OPEN", [walk(5, 0.5, 2.5)], None),  # five steps
    ("CONTOUR-OPEN", [walk(20, 4, 36)], ("warning", 6.403)),  # 12 points
    ("CONTOUR-OPEN", [walk(20, 4, 40)], None),  # 11
    ("CONTOUR-OPEN", [box(10, 10, 60, 12)], None),
    ("MASK-TINY", [box(10, 10, 14, 11)], ("warning", 4)),
    ("MASK-TINY", [box(10, 10, 15, 11)], None),
    ("MASK-TINY", pixels(4, 2), ("info", 4)),
    ("MASK-TINY", pixels(5, 2), None),
    ("MASK-HUGE", pixels(2049), ("warning", 2049 / 4096)),
    ("MASK-HUGE", pixels(2048), None),
    ("MASK-PARTS", [[(10, 10), (20, 20), (30, 10), (30, 30), (20, 20), (10, 30)]], ("warning", 90)),
    ("MASK-PARTS", [box(10, 10, 20, 20), box(30, 10, 35, 20)], None),
    ("MASK-PARTS", [box(10, 10, 20, 20)], None),
    ("MASK-PARTS", apart((10, 10), (14, 14)), ("info", 16)),
    ("MASK-PARTS", apart((10, 10), (13, 14)), None),
    ("MASK-HOLES", [LOOP], ("warning", 1)),
    ("MASK-HOLES", [KEYHOLE], ("info", 1)),
    ("MASK-HOLES", [box(10, 10, 30, 30), box(15, 15, 20, 20)], None),
    ("MASK-HOLES", holed((12, 12), (15, 15)), ("info", 2)),
    ("MASK-HOLES", holed((12, 12), (13, 13)), ("info", 1)),
    ("MASK-HOLES", holed((10, 15), (11, 16)), None),  # open to the outside by a corner
    ("MASK-BORDER", [box(10, 0, 20, 20)], ("info", 10)),
    ("MASK-BORDER", [box(10, 1, 20, 20)], None),
    ("MASK-BORDER", [box(50, 50, 64, 64)], ("info", 27)),
    ("MASK-BORDER", [box(50, 50, 63, 63)], None),
]


@pytest.mark.parametrize("code", sorted({code for code, _, _ in CASES}))
def test_planted(code: str, ingested: str, conn: Conn) -> None:
    """What a rule is about is found with its severity and value, what lies just inside the limit is not, and repaired it closes itself."""
    cases = [(drawn, expected) for rule, drawn, expected in CASES if rule == code]
    wanted = {plant(conn, drawn, at): expected for at, (drawn, expected) in enumerate(cases)}
    (result,) = evaluate(ingested, code)
    found = flags(conn, code)
    for (drawn, expected), annotation in zip(cases, wanted, strict=True):
        got = found.get(annotation)
        assert (got is None) == (expected is None), (drawn, got)
        if got is not None and expected is not None:
            assert got[0] == expected[0], drawn
            assert got[1] == pytest.approx(expected[1], abs=0.05 if code == "CONTOUR-OPEN" else 1e-9), drawn
    assert found.keys() == {annotation for annotation, expected in wanted.items() if expected}  # nothing else in the clean studies
    assert (result.findings, result.not_evaluated) == (len(found), 2 if code == "CONTOUR-OPEN" else 0)  # of 4 and of 11 points
    for at in range(len(cases)):
        plant(conn, [box(20, 20, 40, 40)], at)
    evaluate(ingested, code, changed=True)
    assert flags(conn, code) == {}


def test_tiny_in_millimetres(ingested: str, conn: Conn) -> None:
    """3 mm² is enough on a fine grid, less is not; without a pixel spacing pixels alone are counted, and it is said so."""
    small, right = plant(conn, [box(10, 10, 21, 11)], 0, 0.5), plant(conn, [box(10, 10, 22, 11)], 1, 0.5)
    unknown = plant(conn, [box(10, 10, 15, 11)], 2)
    conn.execute("UPDATE image SET row_spacing = NULL WHERE id = %s", [inner(conn, 2)[2]])
    (result,) = evaluate(ingested, "MASK-TINY")
    found = flags(conn, "MASK-TINY")
    assert found.keys() == {small} and not {right, unknown} & found.keys()
    assert found[small][2] == "11 px, 2.75 mm²; at least 5 px and 3 mm² are expected"
    assert result.why == "masks on images without pixel spacing, of which only the pixels were counted"
    assert result.not_evaluated == 2  # an outer contour lies on the same image


def test_parameters(ingested: str, conn: Conn) -> None:
    """Structures that are named may be of parts and have holes; limits move with their parameters."""
    parts, holes = plant(conn, apart((10, 10), (20, 20)), 0), plant(conn, holed((12, 12)), 1)
    evaluate(ingested, "MASK-*")
    assert set(flags(conn, "MASK-PARTS")) == {parts} and set(flags(conn, "MASK-HOLES")) == {holes}
    with database.open_database(ingested) as opened:
        for code in ("MASK-PARTS", "MASK-HOLES"):
            qa.set_value(opened, rulefiles.load()[code], "usual", "lungs|inner", reason="they are")
    evaluate(ingested, "MASK-*")
    assert (flags(conn, "MASK-PARTS"), flags(conn, "MASK-HOLES")) == ({}, {})


def test_what_is_not_looked_at(ingested: str, conn: Conn) -> None:
    """What is proposed, rejected, a past version or on an image that is away has no flag; that a shape is missing is said."""
    annotations = [plant(conn, [BOW_TIE], at) for at in range(5)]
    for at, state in ((0, "proposed"), (1, "rejected")):
        conn.execute("UPDATE pairing SET state = %s WHERE id = %s", [state, inner(conn, at)[1]])
    conn.execute("UPDATE annotation SET current = false WHERE id = %s", [annotations[2]])
    conn.execute("UPDATE file SET state = 'missing' WHERE id = (SELECT file_id FROM location WHERE image_id = %s)", [inner(conn, 3)[2]])
    conn.execute("DELETE FROM shape WHERE pairing_id = %s", [inner(conn, 5)[1]])
    (result,) = evaluate(ingested, "CONTOUR-CROSSING", dry_run=True)
    assert (result.findings, result.not_evaluated) == (1, 1)
    (result,) = evaluate(ingested, "CONTOUR-CROSSING")
    assert (result.findings, result.not_evaluated) == (1, 0)
    assert flags(conn, "CONTOUR-CROSSING").keys() == {annotations[4]}
    conn.execute("UPDATE shape SET self_crossings = NULL WHERE pairing_id = %s", [inner(conn, 6)[1]])
    (result,) = evaluate(ingested, "CONTOUR-CROSSING")
    assert (result.not_evaluated, result.why) == (1, "contours of too many points to compare all edges")


def other_patient(conn: Conn, image: int) -> tuple[int, str]:
    """Return an instance, and the original name, of another patient than the image's."""
    row = conn.execute(
        "SELECT n.id, pa.original_id FROM instance n JOIN series se ON se.id = n.series_id JOIN study st ON st.id = se.study_id "
        "JOIN patient pa ON pa.id = st.patient_id WHERE st.patient_id NOT IN ("
        "SELECT t.patient_id FROM image i JOIN instance m ON m.id = i.instance_id JOIN series s ON s.id = m.series_id "
        "JOIN study t ON t.id = s.study_id WHERE i.id = %s) ORDER BY n.id LIMIT 1",
        [image],
    ).fetchone()
    assert row is not None
    return row[0], row[1]


def test_patient_of_the_annotation(ingested: str, conn: Conn) -> None:
    """A list's name or a file's PatientID of another patient is an error; of the same one, or where only the UID pairs, it is not."""
    ids = [inner(conn, at) for at in range(5)]
    instance, original = other_patient(conn, ids[0][2])
    conn.execute("UPDATE annotation SET refers_to = refers_to || %s WHERE id = %s", [Jsonb({"original_id": original}), ids[0][0]])
    for at in (1, 2):
        conn.execute("UPDATE file SET instance_id = %s WHERE id = (SELECT file_id FROM annotation WHERE id = %s)", [instance, ids[at][0]])
    conn.execute("UPDATE pairing SET method = 'uid' WHERE id = %s", [ids[2][1]])
    conn.execute(
        "UPDATE file SET instance_id = (SELECT instance_id FROM image WHERE id = %s) "
        "WHERE id = (SELECT file_id FROM annotation WHERE id = %s)",
        [ids[3][2], ids[3][0]],
    )
    conn.execute("UPDATE annotation SET refers_to = '{}' WHERE id = %s", [ids[4][0]])
    (result,) = evaluate(ingested, "PAIR-PATIENT")
    found = flags(conn, "PAIR-PATIENT")
    assert {annotation: one[0] for annotation, one in found.items()} == {ids[0][0]: "error", ids[1][0]: "error", ids[2][0]: "warning"}
    assert (result.not_evaluated, result.why) == (1, "annotations whose source names no patient")
    assert not any(original in one[2] for one in found.values())


def test_references(ingested: str, conn: Conn) -> None:
    """A UID, frame or file that is not there is named as such, without saying which; one that is there is not."""
    row = conn.execute("SELECT n.sop_instance_uid, f.path FROM instance n, file f WHERE f.kind = 'image' LIMIT 1").fetchone()
    assert row is not None
    uid, path = row
    said: list[tuple[dict[str, Any], str | None]] = [
        ({"sop_instance_uid": uid}, None),
        ({"sop_instance_uid": uid, "frame": 0}, None),
        ({"sop_instance_uid": uid, "frame": 1}, "it names frame 2 of an image that has 1"),
        ({"sop_instance_uid": "1.2.3.4"}, "no image has the UID that it names"),
        ({"path": path}, None),
        ({"path": "no/such.nii"}, "the image file that it names is not there"),
        ({"sop_instance_uid": ""}, None),
    ]
    ids = [inner(conn, at)[0] for at in range(len(said))]
    for annotation, (refers_to, _) in zip(ids, said, strict=True):
        conn.execute("UPDATE annotation SET refers_to = %s WHERE id = %s", [Jsonb(refers_to), annotation])
    conn.execute("UPDATE pairing SET state = 'rejected' WHERE annotation_id = %s", [ids[3]])
    evaluate(ingested, "PAIR-REFERENCE")
    found = flags(conn, "PAIR-REFERENCE")
    assert found.keys() == {annotation for annotation, (_, detail) in zip(ids, said, strict=True) if detail}
    for annotation, (_, detail) in zip(ids, said, strict=True):
        if detail:
            assert found[annotation][2].startswith(detail)
    assert found[ids[3]][2].endswith("; it has no image") and found[ids[2]][2].endswith("; paired by file-number")
    assert uid not in str(found) and "no/such" not in str(found)


def volume(path: Path, values: npt.NDArray[Any]) -> None:
    nibabel = pytest.importorskip("nibabel")
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), path)


def test_label_values(database_url: str, conn: Conn, tmp_path: Path) -> None:
    """In a label volume a value beside the list is found; of one without a list it is said that nothing is known."""
    for name, listed in (("with", {"background": 0, "liver": 1}), ("without", None)):
        folder = tmp_path / "arrived" / name
        labels = np.zeros((16, 16, 3), np.uint8)
        labels[2:8, 2:8], labels[10:13, 10:13, 1] = 1, 7
        volume(folder / "imagesTr" / "a_0000.nii.gz", np.arange(768, dtype=np.int16).reshape(16, 16, 3))
        volume(folder / "labelsTr" / "a.nii.gz", labels)
        if listed:
            table = {"channel_names": {"0": "CT"}, "labels": listed, "numTraining": 1, "file_ending": ".nii.gz"}
            (folder / "dataset.json").write_text(json.dumps(table))
    with database.open_database(database_url) as opened:
        ingest.ingest(opened, tmp_path / "arrived", jobs=1)
    (result,) = evaluate(database_url, "LABEL-UNEXPECTED")
    rows = conn.execute(
        "SELECT f.path, s.name, g.severity, g.value, g.detail FROM flag g JOIN annotation a ON a.id = g.annotation_id "
        "JOIN file f ON f.id = a.file_id JOIN structure s ON s.id = a.structure_id WHERE g.rule = 'LABEL-UNEXPECTED'"
    ).fetchall()
    assert rows == [("with/labelsTr/a.nii.gz", "label 7", "warning", 7.0, "value 7, which the list of labels does not name")]
    assert (result.not_evaluated, result.why) == (4, "segments of label volumes without a list")


def test_classes(ingested: str, conn: Conn) -> None:
    """A class that is none of those expected is an error; before anybody said which are, none is looked at; unnamed segments are found."""
    ids = [inner(conn, at)[0] for at in range(4)]
    nothing = "points = NULL, rings = NULL, convention = NULL"
    for annotation, label in zip(ids[:3], ("cat", "dog", "do"), strict=True):
        conn.execute(
            f"UPDATE annotation SET kind = 'label', origin = 'label', label = %s, {nothing} WHERE id = %s",
            [label, annotation],
        )
    conn.execute("INSERT INTO structure (name) VALUES ('segment 3'), ('segment 30')")
    plant(conn, pixels(50, 10), 3)
    for name in ("segment 3", "segment 30"):
        conn.execute(
            "UPDATE annotation SET refers_to = %s, structure_id = (SELECT id FROM structure WHERE name = %s) WHERE id = %s",
            [Jsonb({"segment_number": 3}), name, ids[3]],
        )
        (result,) = evaluate(ingested, "LABEL-UNEXPECTED")
        assert (result.not_evaluated, result.why) == (3, "classes, as nobody said which to expect")
        assert flags(conn, "LABEL-UNEXPECTED").keys() == ({ids[3]} if name == "segment 3" else set())
    with database.open_database(ingested) as opened:
        qa.set_value(opened, rulefiles.load()["LABEL-UNEXPECTED"], "classes", "cat|dog", reason="the protocol")
    (result,) = evaluate(ingested, "LABEL-UNEXPECTED")
    assert result.not_evaluated == 0
    assert flags(conn, "LABEL-UNEXPECTED") == {ids[2]: ("error", None, "class do, which is none of cat|dog")}


def all_mine(url: str) -> list[qa.Result]:
    return [result for pattern in MINE for result in evaluate(url, pattern) if result.rule != "CONTOUR-SHIFT"]


def test_nothing_on_clean_studies(ingested: str) -> None:
    """Of studies as they should be no rule finds anything."""
    assert {result.rule: result.findings for result in all_mine(ingested) if result.findings} == {}


def test_nothing_on_the_real_studies(database_url: str, sunnybrook: Path) -> None:
    """Of the real contours, which are right, no rule finds anything, not so much as an info; and all are looked at."""
    with database.open_database(database_url) as opened:
        ingest.ingest(opened, sunnybrook, jobs=1)
    results = all_mine(database_url)
    assert len(results) >= 12 and {result.rule: result.findings for result in results if result.findings} == {}
    assert {result.rule: result.not_evaluated for result in results if result.not_evaluated} == {"PAIR-REFERENCE": 54}


def test_what_ingest_raises_is_explained() -> None:
    """Each code that an ingest raises of pairings, contours and masks has a rule that says what it means."""
    rules = rulefiles.load()
    assert {code for code in RAISED_BY_INGEST if code not in rules or rules[code].raised_by != "ingest"} == set()
    source = Path(pairings.__file__).read_text()
    assert all(f'"{code}"' in source or f"'{code}'" in source for code in RAISED_BY_INGEST)
