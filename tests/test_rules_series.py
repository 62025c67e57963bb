"""Rules about series, images and identity: what each finds, what lies just inside its threshold, and that clean data has none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from catalog import database, flags, qa, rulefiles

Conn = psycopg.Connection[tuple[Any, ...]]
Found = dict[int, tuple[float | None, str, str]]  # subject → value, detail, severity
Find = Callable[..., Found]

# What is there: three patients, a series of 4 slices × 4 phases each, 64×64 px; slices are 10 mm apart.
SERIES = 1
RULES = sorted(code for code in rulefiles.load() if code.split("-")[0] in ("SERIES", "IMAGE", "IDENTITY"))


@pytest.fixture
def find(ingested: str, conn: Conn) -> Find:
    """Run one rule on the synthetic studies, whose images were measured: each another content and near hash."""
    conn.execute(
        "INSERT INTO measure (image_id, minimum, maximum, mean, deviation, entropy, saturated, nans, near_hash) "
        "SELECT id, 0, 900, 200, 150, 5, 0.001, 0, hashint8extended(id, 7) FROM image"
    )

    def run(code: str, *, not_evaluated: int = 0, **settings: str) -> Found:
        rule = rulefiles.load()[code]
        with database.open_database(ingested) as db:
            for name, value in settings.items():
                qa.set_value(db, rule, name, value, reason="test")
            result = qa.run(db, rules=[rule]).results[0]
        assert result.not_evaluated == not_evaluated, result.why
        column = flags.NAMED_BY["sample" if rule.subject == "image" else rule.subject][0]
        rows = conn.execute(f"SELECT {column}_id, value, detail, severity FROM flag WHERE rule = %s AND state = 'open'", [code]).fetchall()
        return {row[0]: row[1:] for row in rows}

    return run


def images(conn: Conn) -> list[int]:
    """Return the images of the first series, in the order of their numbers."""
    return [
        row[0]
        for row in conn.execute(
            "SELECT i.id FROM image i JOIN instance n ON n.id = i.instance_id WHERE n.series_id = 1 ORDER BY instance_number"
        )
    ]


@pytest.mark.parametrize("code", RULES)
def test_clean(code: str, find: Find) -> None:
    """On studies without a defect no rule of these groups finds anything, and nothing is left out."""
    assert find(code) == {}


@pytest.mark.parametrize("code", RULES)
def test_not_measured_or_placed(code: str, ingested: str, conn: Conn) -> None:
    """Without measurements and geometry nothing is found either, and rules that need them say how much they left out."""
    conn.execute("UPDATE image SET image_position = NULL, image_orientation = NULL, position = NULL, row_spacing = NULL, pixel_hash = NULL")
    conn.execute("UPDATE instance SET instance_number = NULL, images_in_acquisition = NULL")
    with database.open_database(ingested) as db:
        result = qa.run(db, rules=[rulefiles.load()[code]]).results[0] if rulefiles.load()[code].query else None
    blind = {"SERIES-SIZE", "SERIES-TILT", "IMAGE-SIZE", "IDENTITY-STUDY", "IDENTITY-SERIES"}
    assert result is not None and result.findings == 0
    assert (result.not_evaluated > 0) == (code not in blind)


@pytest.mark.parametrize("code", RULES)
def test_images_without_a_place(code: str, find: Find, conn: Conn) -> None:
    """Images whose file is gone are looked at by no rule."""
    conn.execute("UPDATE location SET preferred = false")
    assert find(code) == {}


# ------------------------------------------------------------------------------------------ series


def test_orientation(find: Find, conn: Conn) -> None:
    """One image astray is a warning, several planes of a localizer an info, rounding is nothing, two stacks under one UID a warning."""
    one = images(conn)[5]
    turn = "UPDATE image SET image_orientation = array_replace(image_orientation, image_orientation[1], image_orientation[1] + %s) "
    conn.execute(turn + "WHERE id = %s", [0.0099, one])
    assert find("SERIES-ORIENTATION") == {}
    conn.execute(turn + "WHERE id = %s", [0.0003, one])
    value, detail, severity = find("SERIES-ORIENTATION")[SERIES]
    assert value == pytest.approx(0.0102) and "15 of them in the commonest" in detail and severity == "warning"
    for at, image in enumerate(images(conn)):
        conn.execute("UPDATE image SET image_orientation = %s WHERE id = %s", [PLANES[at % 3], image])
    assert find("SERIES-ORIENTATION")[SERIES][2] == "info"
    conn.execute("UPDATE instance SET instance_number = instance_number % 8 WHERE series_id = 1")
    assert find("SERIES-ORIENTATION")[SERIES][2] == "warning"


PLANES = ([1.0, 0.0, 0.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 0.0, 0.0, -1.0], [1.0, 0.0, 0.0, 0.0, 0.0, -1.0])


def test_size(find: Find, conn: Conn) -> None:
    """An image of another size is found, in a series of a scanner as a warning, among radiographs as an info."""
    conn.execute("UPDATE image SET columns = 65 WHERE id = ANY(%s)", [images(conn)[:2]])
    value, detail, severity = find("SERIES-SIZE")[SERIES]
    assert (value, severity) == (2, "warning") and "14 of 64×64 px, 2 of 64×65 px" in detail
    conn.execute("UPDATE series SET modality = 'CR'")
    assert find("SERIES-SIZE")[SERIES][2] == "info"


def test_spacing(find: Find, conn: Conn) -> None:
    """A spacing off by more than 0.001 mm is found; so is one that only some images have."""
    one = images(conn)[3]
    conn.execute("UPDATE image SET row_spacing = row_spacing + 0.0009 WHERE id = %s", [one])
    assert find("SERIES-SPACING") == {}
    conn.execute("UPDATE image SET row_spacing = row_spacing + 0.0002 WHERE id = %s", [one])
    assert find("SERIES-SPACING")[SERIES][0] == pytest.approx(0.0011)
    conn.execute("UPDATE image SET row_spacing = NULL, column_spacing = NULL WHERE id = %s", [one])
    assert "1 of 16 images do not say" in find("SERIES-SPACING", not_evaluated=1)[SERIES][1]


def test_orthonormal(find: Find, conn: Conn) -> None:
    """Directions that are no unit vectors, or not at a right angle, are found from 0.002 on."""
    one = images(conn)[3]
    for orientation, wrong in (
        ([1.0019, 0, 0, 0, 1, 0], False),
        ([1.0021, 0, 0, 0, 1, 0], True),
        ([1, 0, 0, 0.0019, 1, 0], False),
        ([1, 0, 0, 0.0021, 1, 0], True),
        ([0, 0, 0, 0, 1, 0], True),
        ([1.0, 0, 0, 0, 1, 0], False),
    ):
        conn.execute("UPDATE image SET image_orientation = %s::float8[] WHERE id = %s", [[float(value) for value in orientation], one])
        assert (SERIES in find("SERIES-ORTHONORMAL")) == wrong


def test_position_twice(find: Find, conn: Conn) -> None:
    """An image at the place and trigger time of another is found; 0.02 mm beside it, or where every place has two, it is not."""
    first, second = images(conn)[:2]
    same = (
        "UPDATE image SET image_position = ARRAY[o.image_position[1] + %s, o.image_position[2], o.image_position[3]], "
        "position = o.position, trigger_time = o.trigger_time FROM image o WHERE o.id = %s AND image.id = %s"
    )
    conn.execute(same, [0.02, first, second])
    assert find("SERIES-POSITION-TWICE") == {}
    conn.execute(same, [0.0, first, second])
    value, detail, _ = find("SERIES-POSITION-TWICE")[SERIES]
    assert value == 1 and "1 of 15 places hold up to 2 images, the others 1" in detail
    conn.execute("UPDATE image SET trigger_time = NULL")  # 4 images at each of 4 places
    assert find("SERIES-POSITION-TWICE") == {}


def test_multiframe_is_left_out(find: Find, conn: Conn) -> None:
    """Frames of one object at one place are not called doubled: which dimension they run along is not known."""
    first, second = images(conn)[:2]
    conn.execute("UPDATE instance SET number_of_frames = 2 WHERE id IN (SELECT instance_id FROM image WHERE id = %s)", [first])
    conn.execute(
        "UPDATE image SET frame = 1, instance_id = o.instance_id, image_position = o.image_position, position = o.position, "
        "trigger_time = o.trigger_time FROM image o WHERE o.id = %s AND image.id = %s",
        [first, second],
    )
    assert find("SERIES-POSITION-TWICE", not_evaluated=1) == {}


def test_gap(find: Find, conn: Conn) -> None:
    """A missing slice and uneven distances are found from the threshold on, whatever the numbers are; decreasing numbers change nothing."""
    conn.execute("UPDATE instance SET instance_number = 100 - instance_number")
    (top,) = conn.execute("SELECT max(position) FROM image i JOIN instance n ON n.id = i.instance_id WHERE series_id = 1").fetchone() or (
        0,
    )
    move = "UPDATE image i SET position = %s FROM instance n WHERE n.id = i.instance_id AND n.series_id = 1 AND abs(i.position - %s) < 1e-6"
    conn.execute(move, [top + 0.99, top])
    assert find("SERIES-GAP") == {}
    conn.execute(move, [top + 1.01, top + 0.99])
    assert find("SERIES-GAP")[SERIES][0] == pytest.approx(0.101, abs=1e-3)
    conn.execute(move, [top + 10, top + 1.01])
    value, detail, _ = find("SERIES-GAP")[SERIES]
    assert value == pytest.approx(1.0, abs=1e-3) and "1 of 3 distances" in detail and "slices missing: 1" in detail
    conn.execute(
        "UPDATE image SET image_orientation = CASE WHEN phase < 2 THEN %s ELSE %s END::float8[] WHERE instance_id IN "
        "(SELECT id FROM instance WHERE series_id = 1)",
        [PLANES[0], PLANES[1]],
    )
    assert find("SERIES-GAP", not_evaluated=1) == {}  # of slices in several directions none is another's neighbour


def test_gap_at_an_end(find: Find, conn: Conn) -> None:
    """Slices that are missing at an end leave no gap: the rule that counts finds them, the one that measures does not."""
    conn.execute(
        "DELETE FROM location WHERE image_id IN (SELECT i.id FROM image i JOIN instance n ON n.id = i.instance_id "
        "WHERE n.series_id = 1 AND n.instance_number <= 4)"
    )
    assert find("SERIES-GAP") == {}
    value, detail, _ = find("SERIES-INCOMPLETE")[SERIES]
    assert value == 4 and detail == "12 images where ImagesInAcquisition says 16"


def test_phases(find: Find, conn: Conn) -> None:
    """A slice with fewer phases than the others is found; one whose times differ is not."""
    conn.execute("UPDATE image SET trigger_time = trigger_time + position * 0.1")
    assert find("SERIES-PHASES") == {}
    conn.execute("DELETE FROM location WHERE image_id = %s", [images(conn)[6]])
    value, detail, _ = find("SERIES-PHASES")[SERIES]
    assert value == 1 and "1 of 4 slices" in detail and detail.endswith("has 3")
    conn.execute("UPDATE image SET trigger_time = NULL WHERE id = %s", [images(conn)[9]])
    assert find("SERIES-PHASES", not_evaluated=1)[SERIES][0] == 2


def test_incomplete(find: Find, conn: Conn) -> None:
    """One image fewer than the files say is found, as many or more are not; frames of a multi-frame object count."""
    conn.execute("UPDATE instance SET images_in_acquisition = 15")
    assert find("SERIES-INCOMPLETE") == {}
    conn.execute("UPDATE instance SET images_in_acquisition = 17 WHERE series_id = 1")
    assert find("SERIES-INCOMPLETE") == {1: (1.0, "16 images where ImagesInAcquisition says 17", "warning")}
    conn.execute(
        "WITH one AS (SELECT min(id) AS id FROM instance WHERE series_id = 1) UPDATE image SET instance_id = one.id, frame = image.id "
        "FROM one WHERE instance_id IN (SELECT id FROM instance WHERE series_id = 1)"
    )
    conn.execute("UPDATE instance SET images_in_acquisition = 16")
    assert find("SERIES-INCOMPLETE") == {}


def test_numbers(find: Find, conn: Conn) -> None:
    """Doubled numbers are a warning, missing ones an info; numbers may begin anywhere."""
    conn.execute("UPDATE instance SET instance_number = instance_number + 111")
    assert find("SERIES-NUMBERS") == {}
    conn.execute("UPDATE instance SET instance_number = instance_number + 2 WHERE series_id = 1 AND instance_number > 120")
    value, detail, severity = find("SERIES-NUMBERS")[SERIES]
    assert (value, severity) == (2, "info") and "missing: 2, the first between 120 and 123" in detail
    conn.execute("UPDATE instance SET instance_number = 112 WHERE series_id = 2 AND instance_number = 127")
    assert find("SERIES-NUMBERS")[2][2] == "warning"


def test_tilt(find: Find, conn: Conn) -> None:
    """A tilt that the file says and one that the positions show are both reported from half a degree on."""
    conn.execute("UPDATE instance SET gantry_tilt = -0.5 WHERE series_id = 1")
    assert find("SERIES-TILT") == {}
    conn.execute("UPDATE instance SET gantry_tilt = -12.5 WHERE series_id = 1")
    assert find("SERIES-TILT")[1] == (12.5, find("SERIES-TILT")[1][1], "info")
    shear = (
        "UPDATE image i SET image_position = ARRAY[image_position[1] + image_orientation[1] * k, "
        "image_position[2] + image_orientation[2] * k, image_position[3] + image_orientation[3] * k] "
        "FROM (SELECT i.id, position * tand(%s) AS k FROM image i JOIN instance n "
        "ON n.id = i.instance_id WHERE series_id = 2) AS s WHERE s.id = i.id"
    )
    conn.execute(shear, [0.45])
    assert 2 not in find("SERIES-TILT")
    conn.execute(shear, [10])
    assert find("SERIES-TILT")[2][0] == pytest.approx(10.4, abs=0.1)


def test_few(find: Find, conn: Conn) -> None:
    """Two slices are few, three are not; a cine series of one slice is no such case."""
    keep = "DELETE FROM location WHERE image_id IN (SELECT id FROM (SELECT i.id, {} AS keep FROM image i JOIN instance n " \
           "ON n.id = i.instance_id WHERE series_id = %s) AS k WHERE NOT keep)"  # fmt: skip
    conn.execute(keep.format("phase = 0 AND instance_number < 12"), [1])  # three slices
    conn.execute(keep.format("instance_number <= 2"), [2])  # two phases of one
    assert find("SERIES-FEW", least="4") == {}  # objects without a file are no slices, but count when few series are looked for
    conn.execute("UPDATE instance SET number_of_frames = 0 WHERE id NOT IN (SELECT instance_id FROM image JOIN location ON image_id = id)")
    assert find("SERIES-FEW", least="3") == {}
    assert find("SERIES-FEW", least="4") == {1: (3.0, "slices: 3, fewer than 4", "info")}


# ------------------------------------------------------------------------------------------ images


def test_constant(find: Find, conn: Conn) -> None:
    """A constant image is a warning, with a mask on it an error; one without finite values is none."""
    drawn = conn.execute("SELECT image_id FROM pairing WHERE state = 'accepted' ORDER BY 1").fetchall()[0][0]
    bare = conn.execute("SELECT min(id) FROM image WHERE id NOT IN (SELECT image_id FROM pairing)").fetchall()[0][0]
    conn.execute("UPDATE measure SET minimum = 3, maximum = 3 WHERE image_id = ANY(%s)", [[drawn, bare]])
    conn.execute("UPDATE measure SET minimum = 'NaN', maximum = 'NaN' WHERE image_id = %s", [images(conn)[-1]])
    assert {image: severity for image, (_, _, severity) in find("IMAGE-CONSTANT").items()} == {drawn: "error", bare: "warning"}


def test_flat(find: Find, conn: Conn) -> None:
    """Next to no entropy, or a spread far below the series', is flat; just above it is not."""
    some = images(conn)
    conn.execute("UPDATE measure SET entropy = 0.101 WHERE image_id = %s", [some[0]])
    conn.execute("UPDATE measure SET entropy = 0.099 WHERE image_id = %s", [some[1]])
    conn.execute("UPDATE measure SET deviation = 2.95 WHERE image_id = %s", [some[2]])
    conn.execute("UPDATE measure SET deviation = 2.5 WHERE image_id = %s", [some[3]])
    assert set(find("IMAGE-FLAT")) == {some[1], some[3]}


def test_saturated(find: Find, conn: Conn) -> None:
    """More than 5 % at the largest value is found; a constant image is not called saturated."""
    some = images(conn)
    for share, image in ((0.0499, some[0]), (0.0501, some[1]), (1.0, some[2])):
        conn.execute("UPDATE measure SET saturated = %s WHERE image_id = %s", [share, image])
    conn.execute("UPDATE measure SET minimum = maximum WHERE image_id = %s", [some[2]])
    assert set(find("IMAGE-SATURATED")) == {some[1]}


def test_nan(find: Find, conn: Conn) -> None:
    """One value that is not finite is an error."""
    conn.execute("UPDATE measure SET nans = 1 WHERE image_id = %s", [images(conn)[0]])
    assert find("IMAGE-NAN") == {images(conn)[0]: (1.0, "1 of 4096 values are not finite", "error")}


def test_image_size(find: Find, conn: Conn) -> None:
    """An image three times as long as is usual is not far off, a longer or shorter one is; where no size is usual none is far."""
    some = images(conn)
    for side, image in ((192, some[0]), (193, some[1]), (21, some[2]), (22, some[3])):
        conn.execute("UPDATE image SET rows = %s, columns = %s WHERE id = %s", [side, side, image])
    assert set(find("IMAGE-SIZE")) == {some[1], some[2]}
    conn.execute("UPDATE image SET rows = 300 WHERE id %% 4 = 0".replace("%%", "%"))
    assert find("IMAGE-SIZE", not_evaluated=48) == {}


# ------------------------------------------------------------------------------------------ identity


def test_study_and_series(find: Find, conn: Conn) -> None:
    """A UID under two patients is an error on both sides; an empty one, or one that a patient without images has, is none."""
    conn.execute("UPDATE study SET study_instance_uid = 'one' WHERE id IN (1, 2)")
    conn.execute("UPDATE series SET series_instance_uid = 'two' WHERE id IN (2, 3)")
    assert {key: row[2] for key, row in find("IDENTITY-STUDY").items()} == {1: "error", 2: "error"}
    assert {key: row[2] for key, row in find("IDENTITY-SERIES").items()} == {2: "error", 3: "error"}
    conn.execute("DELETE FROM location l USING image i JOIN instance n ON n.id = i.instance_id WHERE i.id = l.image_id AND n.series_id = 2")
    assert find("IDENTITY-STUDY") == {} and find("IDENTITY-SERIES") == {}
    conn.execute("UPDATE study SET study_instance_uid = ''")
    conn.execute("UPDATE series SET series_instance_uid = ''")
    assert find("IDENTITY-STUDY", not_evaluated=3) == {} and find("IDENTITY-SERIES", not_evaluated=3) == {}


def test_same_pixels(find: Find, conn: Conn) -> None:
    """Equal pixels are found under two patients, and twice in one, never of an empty image; each names another sample."""
    of = {series: [i for (i,) in conn.execute(
        "SELECT i.id FROM image i JOIN instance n ON n.id = i.instance_id WHERE series_id = %s ORDER BY i.id", [series])]
        for series in (1, 2)}  # fmt: skip
    copy = "UPDATE image SET pixel_hash = (SELECT pixel_hash FROM image WHERE id = %s) WHERE id = %s"
    conn.execute(copy, [of[1][0], of[2][0]])  # under two patients
    conn.execute(copy, [of[1][1], of[1][2]])  # twice in one
    conn.execute(copy, [of[1][3], of[2][3]])  # empty images
    conn.execute("UPDATE measure SET maximum = minimum WHERE image_id = ANY(%s)", [[of[1][3], of[2][3]]])
    patients = find("IDENTITY-PIXELS-PATIENTS")
    assert set(patients) == {of[1][0], of[2][0]} and patients[of[1][0]][1].endswith(f"sample {of[2][0]}")
    assert patients[of[2][0]][1].endswith(f"sample {of[1][0]}") and patients[of[1][0]][2] == "error"
    twice = find("IDENTITY-PIXELS-TWICE")
    assert set(twice) == {of[1][1], of[1][2]} and twice[of[1][1]][1].endswith(f"sample {of[1][2]}")


@pytest.mark.parametrize("bits", [(0,), (63,), (3, 63), (17, 40), (20, 21), (5, 50), (33, 60)])
def test_near(bits: tuple[int, ...], find: Find, conn: Conn) -> None:
    """Hashes of two patients that differ in two bits at most, wherever these lie, are found and named; three bits are too many."""
    one, other, third = images(conn)[0], images(conn)[0] + 20, images(conn)[0] + 40
    flip = "UPDATE measure SET near_hash = (SELECT near_hash FROM measure WHERE image_id = %s) # %s WHERE image_id = %s"

    def mask(*flipped: int) -> int:
        return sum(-(2**63) if bit == 63 else 1 << bit for bit in flipped)

    conn.execute(flip, [one, mask(*bits), other])
    conn.execute(flip, [images(conn)[3], mask(1, 30, 62), third])
    found = find("IDENTITY-NEAR")
    assert {image: row[0] for image, row in found.items()} == {one: len(bits), other: len(bits)}
    assert found[one][1].endswith(f"sample {other}, of another patient")


def test_near_left_out(find: Find, conn: Conn) -> None:
    """Within a patient, and of equal pixels, nothing is found; a hash of too many patients is counted, not spread over all pairs."""
    some = images(conn)
    conn.execute("UPDATE measure SET near_hash = 5 WHERE image_id = ANY(%s)", [some[:4]])
    assert find("IDENTITY-NEAR") == {}
    conn.execute("UPDATE measure SET near_hash = 5 WHERE image_id = ANY(%s)", [[some[0] + 20, some[0] + 40]])
    assert len(find("IDENTITY-NEAR")) == 6
    assert find("IDENTITY-NEAR", not_evaluated=6, patients="2") == {}
    conn.execute("UPDATE image SET pixel_hash = (SELECT pixel_hash FROM image WHERE id = %s)", [some[0]])
    assert find("IDENTITY-NEAR", patients="20") == {}


def test_real_series(sunnybrook: Any, database_url: str, conn: Conn) -> None:
    """Of the two real studies these rules find, without a measurement, that slices are missing, with both numbers, and nothing else."""
    from catalog import ingest

    with database.open_database(database_url) as db:
        ingest.ingest(db, sunnybrook, jobs=1)
        qa.run(db, rules=[rule for code, rule in rulefiles.load().items() if code in RULES and rule.query])
    found = conn.execute("SELECT rule, severity, detail FROM flag WHERE rule = ANY(%s) ORDER BY 3", [RULES]).fetchall()
    assert found == [
        ("SERIES-INCOMPLETE", "warning", "240 images where ImagesInAcquisition says 280"),
        ("SERIES-INCOMPLETE", "warning", "260 images where ImagesInAcquisition says 300"),
    ]
