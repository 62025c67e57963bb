"""Galleries: the worst first, everything at its place, nothing from elsewhere, nothing that says of whom."""

import base64
import hashlib
import json
import re
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import psycopg
import pytest
from PIL import Image

from catalog import gallery, gallery_page, workers
from catalog.database import Database, open_database
from catalog.errors import CatalogError, UsageError
from tests import processes

HOSTILE = '"><script>alert(1)</script><img src=http://x/y onerror=z>&amp;\u202e$\\bad$'


class Page(HTMLParser):
    """What a browser makes of a page: elements with their attributes, and all text outside scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self._tag = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self._tag = tag

    def handle_endtag(self, tag):
        self._tag = ""

    def handle_data(self, data):
        if self._tag not in ("script", "style"):
            self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


@pytest.fixture
def db(ingested: str):
    with open_database(ingested) as database:
        yield database


def chosen(db: Database, **how) -> gallery.Chosen:
    return gallery.choose(db, **{"where": None, "sample": None, "seed": 0, "limit": 1000, "images": False, **how})


def write(db: Database, folder: Path, **how) -> str:
    cards, inside = gallery.cards(db, chosen(db, **how).ids)
    gallery_page.write_folder(folder, cards, inside, title="t", processes=1, progress=lambda done, total: None)
    return (folder / "index.html").read_text()


def raise_flag(conn, rule: str, severity: str, column: str, number: int, detail: str = "made up") -> None:
    conn.execute(
        f"INSERT INTO flag (rule, severity, detail, {column}, raised_by) VALUES (%s, %s, %s, %s, 'test')",
        [rule, severity, detail, number],
    )


def one(conn, query: str, *parameters):
    return conn.execute(query, parameters).fetchone()[0]


def test_the_worst_come_first(db: Database, conn: psycopg.Connection) -> None:
    """By open errors, then warnings, then flags of their own before those of the series; closed flags count for nothing."""
    ids = [number for (number,) in conn.execute("SELECT DISTINCT sample_id FROM sample ORDER BY 1").fetchall()]
    assert chosen(db).ids == ids
    assert chosen(db).fitting == len(ids)
    pairing = "SELECT id FROM pairing WHERE image_id = %s ORDER BY id LIMIT 1"
    annotation = "SELECT annotation_id FROM pairing WHERE image_id = %s ORDER BY id LIMIT 1"
    raise_flag(conn, "A", "warning", "image_id", ids[5])
    raise_flag(conn, "B", "error", "pairing_id", one(conn, pairing, ids[7]))
    for rule in "CDE":
        raise_flag(conn, rule, "warning", "annotation_id", one(conn, annotation, ids[3]))
    raise_flag(conn, "F", "error", "image_id", ids[8])
    raise_flag(conn, "G", "warning", "image_id", ids[8])
    raise_flag(conn, "H", "error", "image_id", ids[1])
    conn.execute("UPDATE flag SET state = 'resolved', closed_by = 'x', closed_at = now(), reason = 'y' WHERE rule = 'H'")
    raise_flag(conn, "I", "info", "image_id", ids[9])
    assert chosen(db).ids[:5] == [ids[8], ids[7], ids[3], ids[5], ids[9]]
    assert chosen(db, limit=2).ids == [ids[8], ids[7]]
    series = "SELECT n.series_id FROM image i JOIN instance n ON n.id = i.instance_id WHERE i.id = %s"
    raise_flag(conn, "J", "error", "series_id", one(conn, series, ids[-1]))
    with_errors = {number for (number,) in conn.execute("SELECT sample_id FROM sample WHERE error_flags > 0").fetchall()}
    assert {ids[8], ids[7], ids[-1]} <= with_errors and len(with_errors) > 3
    assert set(chosen(db).ids[: len(with_errors)]) == with_errors


def test_a_random_sample_is_the_same_for_the_same_seed(db: Database) -> None:
    """--sample takes as many as asked, the same ones by the same seed, and others by another."""
    first = chosen(db, sample=6, seed=1).ids
    assert len(first) == 6 and first == chosen(db, sample=6, seed=1).ids
    assert any(set(first) != set(chosen(db, sample=6, seed=seed).ids) for seed in (2, 3))
    assert len(chosen(db, sample=10_000).ids) == chosen(db).fitting


@pytest.mark.parametrize(
    "where",
    [
        "true; DELETE FROM flag",
        "1=1) OR (1=1",
        "true) UNION SELECT 1, (SELECT sample_key FROM sample LIMIT 1) --",
        "nobody = 1",
        "(SELECT password FROM sql_login) = 'x'",
        "(SELECT count(*) FROM pg_authid) > 0",
        "sample_id",
        "",
        "'",
    ],
)
def test_where_is_one_condition_without_rights(db: Database, where: str) -> None:
    """A user's SQL is one expression over the view, under the login that may read the catalog alone; else one clear line."""
    with pytest.raises(UsageError, match=r"^--where: [^\n]+; it must be an SQL condition over the view sample$"):
        chosen(db, where=where)


def test_where_cannot_write(db: Database, conn: psycopg.Connection) -> None:
    """A function that writes is refused by the server, and what it would have changed is as it was."""
    for call in ("nextval(pg_get_serial_sequence('flag', 'id')) > 0", "lo_creat(-1) > 0"):
        with pytest.raises((UsageError, CatalogError)):
            chosen(db, where=f"structure = 'inner' AND {call}")
    assert one(conn, "SELECT count(*) FROM pg_largeobject_metadata") == 0


def test_where_chooses(db: Database, conn: psycopg.Connection) -> None:
    """What fits is shown and nothing else, also with a % and a comment in it; --images is over all images."""
    outer = {number for (number,) in conn.execute("SELECT sample_id FROM sample WHERE structure = 'outer'").fetchall()}
    assert set(chosen(db, where="structure LIKE 'out%' -- the outer ones").ids) == outer
    assert chosen(db, where="false").ids == []
    assert len(chosen(db, images=True).ids) == one(conn, "SELECT count(*) FROM image")


def test_a_page_needs_nothing_from_elsewhere(db: Database, tmp_path: Path) -> None:
    """No address in it, each picture is there, its script is the only one that may run; one file holds the pictures itself."""
    text = write(db, tmp_path / "g")
    page = Page(text)
    sources = [attributes["src"] for attributes in page.all("img")]
    assert sources and {tmp_path / "g" / source for source in sources} == set((tmp_path / "g" / "pictures").iterdir())
    assert len(page.all("article")) == chosen(db).fitting
    cards, inside = gallery.cards(db, chosen(db, sample=4).ids)
    gallery_page.write_file(tmp_path / "g.html", cards, inside, title="t", processes=1, progress=lambda done, total: None)
    whole = (tmp_path / "g.html").read_text()
    held = json.loads("{" + re.search(r"const PICTURES = \{(.*?)\};", whole)[1] + "}")
    assert {attributes["data-p"] for attributes in Page(whole).all("img")} == set(held)
    assert all(value.startswith("data:image/png;base64,") for value in held.values())
    for one_page in (text, whole):
        assert not re.search(
            r"https?:|//[a-z]|url\(|@import|<link|<iframe", re.sub(r"base64,[^\"]*|^ *//.*$", "", one_page, flags=re.M), re.I
        )
        script = re.search(r"<script>(.*)</script>", one_page, re.S)[1]
        allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy = next(found["content"] for found in Page(one_page).all("meta") if "http-equiv" in found)
        assert "default-src 'none'" in policy and f"script-src 'sha256-{allowed}'" in policy
        for key in ("ArrowRight", "ArrowLeft", "j:", "k:", "Home", "End"):
            assert key in script


def test_a_gallery_says_nothing_of_whom(db: Database, conn: psycopg.Connection, tmp_path: Path) -> None:
    """No patient, UID, path or reader stands in a page, nor in the names of its files."""
    text = write(db, tmp_path / "g") + " ".join(path.name for path in (tmp_path / "g").rglob("*"))
    names = conn.execute(
        "SELECT DISTINCT unnest(ARRAY[patient, reader, study_instance_uid, series_instance_uid, sop_instance_uid, path]) FROM sample"
    ).fetchall()
    assert len(names) > 20
    for (name,) in names:
        assert not re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.])", Page(text).text + " ".join(map(str, Page(text).found))), name


def test_hostile_names_are_only_text(db: Database, conn: psycopg.Connection, tmp_path: Path) -> None:
    """A structure's name and a flag's detail full of markup are read as they are, and make no element."""
    plain = Page(write(db, tmp_path / "plain"))
    conn.execute("UPDATE structure SET name = %s WHERE name = 'inner'", [HOSTILE])
    pairing = one(conn, "SELECT p.id FROM pairing p JOIN annotation a ON a.id = p.annotation_id ORDER BY 1 LIMIT 1")
    raise_flag(conn, "CONTOUR-CROSSING", "error", "pairing_id", pairing, HOSTILE)
    page = Page(write(db, tmp_path / "hostile"))
    assert "<script>alert(1)</script><img src=http://x/y onerror=z>&amp;" in page.text
    for tag in ("script", "img", "article"):
        assert len(page.all(tag)) == len(plain.all(tag))
    assert not any(name.startswith("on") for _, attributes in page.found for name in attributes)


def test_a_page_is_the_same_for_the_same_catalog(db: Database, tmp_path: Path) -> None:
    """Twice the same bytes, page and pictures."""
    for name in "ab":
        write(db, tmp_path / name, sample=5, seed=3)
    files = [{path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.*")} for name in "ab"]
    assert files[0] == files[1]


def test_lines_and_pixels_share_one_place(db: Database, conn: psycopg.Connection, tmp_path: Path) -> None:
    """A contour's points stand in the page as drawn, moved by its convention alone, in a system in which the image has its px."""
    conn.execute("UPDATE image SET row_spacing = 3.0, column_spacing = 1.5")
    text = write(db, tmp_path / "g", where="structure = 'outer'", limit=1)
    (sample,) = chosen(db, where="structure = 'outer'", limit=1).ids
    rows = conn.execute(
        "SELECT p.id, a.points, a.convention FROM annotation a JOIN pairing p ON p.annotation_id = a.id WHERE p.image_id = %s", [sample]
    ).fetchall()
    assert rows
    for pairing, points, convention in rows:
        path = re.search(rf'<path id="c{pairing}" d="([^"]*)"', text)[1]
        drawn = np.array([float(number) for number in re.findall(r"[-\d.]+", path)]).reshape(-1, 2)
        expected = np.array(points).reshape(-1, 2) + (0.5 if convention == "centre" else 0.0)
        np.testing.assert_allclose(drawn, expected, atol=0.006)
        assert f'href="#c{pairing}"' in text
    # The first view: its image and its lines bring px (17, 23) to one place.
    view = text.split('<div class="view"')[1]
    left, top, width, height = (float(re.search(rf"{name}:(-?[\d.]+)%", view)[1]) for name in ("left", "top", "width", "height"))
    across, down = (float(number) for number in re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', view).groups())
    sx, sy, x0, y0 = (float(number) for number in re.search(r"scale\(([\d.]+) ([\d.]+)\) translate\((-?\d+) (-?\d+)\)", view).groups())
    assert (sx, sy) == (1.5, 3.0)
    assert left + 17 / 64 * width == pytest.approx(100 * (17 + x0) * sx / across, abs=1e-3)
    assert top + 23 / 64 * height == pytest.approx(100 * (23 + y0) * sy / down, abs=1e-3)
    assert float(re.search(r"--ratio:([\d.]+)", view)[1]) == pytest.approx(across / down, rel=1e-4)
    # Its scale bar is as long, in mm of the viewBox, as it says.
    bar, said = re.search(r'class="bar" d="M[\d.]+ [\d.]+h([\d.]+)"/><text [^>]*>([\d.]+) mm<', view).groups()
    assert float(bar) == float(said) and across / 9 < float(bar) <= across / 3


def test_a_masks_edge_runs_between_it_and_the_rest() -> None:
    """Each side of a pixel that differs from its neighbour's is on the path once, and nothing else is."""
    mask = np.random.default_rng(1).random((13, 17)) < 0.4
    sides = set()
    for x, y, way, length in re.findall(r"M(\d+) (\d+)([hv])(\d+)", gallery.edge_path(mask)):
        for step in range(int(length)):
            side = (int(x) + step * (way == "h"), int(y) + step * (way == "v"), way)
            assert side not in sides
            sides.add(side)
    padded = np.pad(mask, 1)
    expected = {(x, y, "h") for y in range(14) for x in range(17) if padded[y, x + 1] != padded[y + 1, x + 1]}
    expected |= {(x, y, "v") for y in range(13) for x in range(18) if padded[y + 1, x] != padded[y + 1, x + 1]}
    assert sides == expected
    assert gallery.edge_path(np.zeros((3, 3), bool)) == ""


def test_neighbours_are_by_place_and_time(db: Database, conn: psycopg.Connection) -> None:
    """Slices before and after at the same phase, phases before and after at the same slice, whatever the instance numbers say."""
    conn.execute("UPDATE instance SET instance_number = 100000 - instance_number * 7 % 31")
    cards, _ = gallery.cards(db, chosen(db).ids)
    series = defaultdict(list)
    for number, of, position, phase in conn.execute(
        "SELECT i.id, n.series_id, i.position, i.phase FROM image i JOIN instance n ON n.id = i.instance_id"
    ).fetchall():
        series[of].append((number, position, phase))
    for card in cards:
        image = card.view.image
        own = series[image["series"]]
        slices = sorted((position - image["position"], number) for number, position, phase in own if phase == image["phase"])
        before = [(at, number) for at, number in slices if at < 0][-1:]
        after = [(at, number) for at, number in slices if at > 0][:1]
        expected = [(f"slice {at:+.3g} mm", number) for at, number in before + after]
        phases = {phase: number for number, position, phase in own if position == image["position"]}
        expected += [(f"phase {at}", phases[at]) for at in (image["phase"] - 1, image["phase"] + 1) if at in phases]
        assert [(title, other.image["sample_id"]) for title, other in card.view.beside] == expected
        assert len(expected) >= 2


def test_what_cannot_be_read_is_said_and_the_rest_is_shown(catalog, conn, studies: Path, tmp_path: Path, database_url: str) -> None:
    """A file that is gone or cut off costs its own card: that says so, and the command names the sample."""
    import shutil

    shutil.copytree(studies, tmp_path / "studies")
    assert catalog("ingest", tmp_path / "studies").returncode == 0
    rows = conn.execute("SELECT DISTINCT sample_id, path FROM sample ORDER BY 1").fetchall()
    Path(rows[0][1]).unlink()
    with Path(rows[1][1]).open("r+b") as file:
        file.truncate(5_000)
    done = catalog("gallery", "-o", tmp_path / "g", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["samples"] == [number for number, _ in rows]
    assert [line.split(":")[0] for line in said["problems"]] == [f"sample {rows[0][0]}", f"sample {rows[1][0]}"]
    page = Page((tmp_path / "g" / "index.html").read_text())
    assert page.text.count("cannot be shown: ") >= 2
    assert "Traceback" not in done.stderr and str(tmp_path) not in done.stdout.replace(said["path"], "")
    taken = catalog("gallery", "-o", tmp_path / "g.html", "--sample", 3, "--seed", 5)
    assert "3 samples of " in taken.stdout and taken.stdout.endswith(" at random (seed 5), worst first\n"), taken.stderr
    picture = catalog("gallery", "-o", tmp_path / "g.png")
    assert picture.returncode == 0, picture.stderr
    with Image.open(tmp_path / "g.png") as image:
        assert image.format == "PNG" and image.width > 1_000


def test_a_folder_of_other_things_is_left_alone(db: Database, tmp_path: Path) -> None:
    """A gallery is written over an older one, whose pictures go, and over nothing else."""
    write(db, tmp_path / "g")
    before = len(list((tmp_path / "g" / "pictures").iterdir()))
    write(db, tmp_path / "g", limit=1)
    assert 0 < len(list((tmp_path / "g" / "pictures").iterdir())) < before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "index.html").write_text("my thesis")
    with pytest.raises(UsageError, match="holds other things"):
        write(db, tmp_path / "mine")
    assert (tmp_path / "mine" / "index.html").read_text() == "my thesis"


def test_nobody_makes_pictures_of_whom_withdrew(db: Database, conn: psycopg.Connection, catalog) -> None:
    """Samples of a patient who withdrew consent are in no gallery."""
    patient, of = conn.execute("SELECT patient, count(DISTINCT sample_id) FROM sample GROUP BY 1 LIMIT 1").fetchone()
    before = chosen(db).fitting
    assert catalog("patient", "withdraw", patient).returncode == 0
    assert chosen(db).fitting == before - of


def test_flags_are_listed_and_their_places_drawn(db: Database, conn: psycopg.Connection, tmp_path: Path) -> None:
    """An error's code stands at its structure and its text below; an info is listed alone."""
    pairing, sample = conn.execute("SELECT id, image_id FROM pairing ORDER BY id LIMIT 1").fetchone()
    raise_flag(conn, "MASK-TINY", "error", "pairing_id", pairing, "12 px")
    raise_flag(conn, "RELATION-ALONE", "info", "pairing_id", pairing, "no outer")
    text = write(db, tmp_path / "g", limit=1)
    assert f'id="s{sample}"' in text
    assert re.findall(r'<text [^>]*stroke-width="[^"]*">([A-Z-]+)</text>', text) == ["MASK-TINY"]
    assert re.search(r'<li class="error">error: MASK-TINY on \w+ \(pairing\): 12 px</li>', text)
    assert re.search(r'<li class="info">info: RELATION-ALONE on \w+ \(pairing\): no outer</li>', text)


def test_what_kills_its_process_costs_itself_alone() -> None:
    """The others' results come, in order."""
    found = list(workers.mapped(processes.odd, list(range(40)), died=lambda item: -item, jobs=2))
    assert found == [-13 if item == 13 else item * 2 for item in range(40)]


def test_real_studies(catalog, sunnybrook: Path, database_url: str, conn: psycopg.Connection, tmp_path: Path) -> None:
    """All 36 samples of the real studies are shown, each contour where its file says."""
    assert catalog("ingest", sunnybrook).returncode == 0
    done = catalog("gallery", "-o", tmp_path / "g")
    assert done.returncode == 0 and "36 samples of 36" in done.stdout, done.stderr
    text = (tmp_path / "g" / "index.html").read_text()
    rows = conn.execute(
        "SELECT p.id, r.url || '/' || f.path FROM annotation a JOIN pairing p ON p.annotation_id = a.id "
        "JOIN file f ON f.id = a.file_id JOIN root r ON r.id = f.root_id"
    ).fetchall()
    assert len(rows) == 54
    for pairing, path in rows:
        drawn = re.search(rf'<path id="c{pairing}" d="([^"]*)"', text)[1]
        points = np.array([float(number) for number in re.findall(r"[-\d.]+", drawn)]).reshape(-1, 2)
        read = np.loadtxt(path)
        offset = points[0] - read[0]
        assert (offset == offset[0]).all() and offset[0] in (0.0, 0.5)
        np.testing.assert_allclose(points[: len(read)], read[: len(points)] + offset)
