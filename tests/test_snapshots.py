"""Snapshots: a digest of content that is the same wherever the content is, rows that nobody changes, and what erasing and undoing do."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg.conninfo import conninfo_to_dict
from pydicom import dcmread

from catalog import cli, database, drift, embedded, erasing, ingest, roots, runs, shifting, snapshots
from catalog.errors import CatalogError, DriftError, UsageError
from catalog.ingest import LOCK_CLASS
from catalog.selection import DRAWN
from loaderd.definitions import Definition
from tests.conftest import REPOSITORY

PATIENT = "SYN0002"  # of 16 images and 6 annotations, as each of the three
Make = Callable[..., snapshots.Made]
TakeIn = Callable[[Path], None]


@pytest.fixture
def db(database_url: str) -> Iterator[database.Database]:
    with database.open_database(database_url) as opened:
        yield opened


@pytest.fixture
def make(db: database.Database) -> Make:
    """Make a snapshot in this process."""
    return lambda name="one", **options: snapshots.create(db, name, **{"actor": "somebody", **options})


@pytest.fixture
def take_in(database_url: str) -> Iterator[TakeIn]:
    """Ingest a folder in this process."""
    with ThreadPoolExecutor(1) as threads:
        yield lambda folder: _take_in(database_url, folder, threads)


def _take_in(url: str, folder: Path, threads: ThreadPoolExecutor) -> None:
    with database.open_database(url) as opened:
        ingest.ingest(opened, folder, executor=threads)


@pytest.fixture
def folder(studies: Path, tmp_path: Path) -> Path:
    """The three patients, to change."""
    shutil.copytree(studies, tmp_path / "arrived")
    return tmp_path / "arrived"


@pytest.fixture
def say(database_url: str, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Run `catalog` in this process; returns its exit code and all that it says. Errors come as exceptions."""

    def run(*arguments: object) -> tuple[int, str]:
        capsys.readouterr()
        code = cli.app([str(argument) for argument in arguments], prog_name="catalog", standalone_mode=False)
        return code or 0, "".join(capsys.readouterr())

    return run


def ask(conn: psycopg.Connection, query: str, *parameters: object) -> list[tuple[Any, ...]]:
    return conn.execute(query.encode(), parameters).fetchall()


def one(conn: psycopg.Connection, query: str, *parameters: object) -> Any:
    return ask(conn, query, *parameters)[0][0]


# ------------------------------------------------------------------------------------------ the digest, written down a second time


def number(value: int) -> bytes:
    return struct.pack(">i", value)


def text(value: str | None) -> bytes:
    return number(-1) if value is None else number(len(value.encode())) + value.encode()


def digest_of_mask(structure: str, origin: str, drawn: str | np.ndarray) -> bytes:
    """Of a label, or a mask as bool (rows, columns)."""
    if isinstance(drawn, str):
        return hashlib.sha256(text(structure) + text(origin) + number(0) + text(drawn)).digest()
    rows, columns = np.flatnonzero(drawn.any(axis=1)), np.flatnonzero(drawn.any(axis=0))
    box = [0, 0, 0, 0] if not rows.size else [rows[0], columns[0], rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1]
    bits = np.packbits(drawn[box[0] : box[0] + box[2], box[1] : box[1] + box[3]]).tobytes()
    return hashlib.sha256(text(structure) + text(origin) + number(1) + b"".join(map(number, [*drawn.shape, *box])) + bits).digest()


def digest_of_sample(
    stored: np.ndarray, slope: float, intercept: float, lut: bool, part: str | None, fold: int | None, drawn: dict[str, bytes]
) -> bytes:
    """Of stored values (rows, columns) or (rows, columns, samples), and the digests of what is drawn by structure."""
    pixel_hash = hashlib.sha256(np.ascontiguousarray(stored, stored.dtype.newbyteorder("<")).tobytes()).digest()
    samples = 1 if stored.ndim == 2 else stored.shape[2]
    said = pixel_hash + number(stored.shape[0]) + number(stored.shape[1]) + number(samples)
    said += struct.pack(">dd?", slope, intercept, lut) + text(part) + number(-1 if fold is None else fold)
    return hashlib.sha256(said + b"".join(drawn[name] for name in sorted(drawn, key=str.encode))).digest()


def digest_of_snapshot(samples: Sequence[bytes]) -> str:
    return hashlib.sha256(b"scanfeed snapshot 1\n" + struct.pack(">q", len(samples)) + b"".join(sorted(samples))).hexdigest()


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=8)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    structure=NAMES, origin=st.sampled_from(DRAWN), label=NAMES,
    raster=st.tuples(st.integers(1, 9), st.integers(1, 20), st.floats(0, 1), st.integers(0, 99)), seed=st.integers(0, 99),
    rescale=st.tuples(st.floats(allow_nan=False), st.floats(allow_nan=False)), lut=st.booleans(),
    part=st.none() | NAMES, fold=st.none() | st.integers(0, 20),
)  # fmt: skip
def test_the_documented_form(
    conn: psycopg.Connection, structure: str, origin: str, label: str, raster: tuple[int, int, float, int], seed: int,
    rescale: tuple[float, float], lut: bool, part: str | None, fold: int | None,
) -> None:  # fmt: skip
    """What PostgreSQL hashes is what the documented form says, whatever the names, numbers, masks and labels are."""
    rows, columns, share, at = raster
    rng = np.random.default_rng(at)
    mask = rng.random((rows, columns)) < share
    stored = np.random.default_rng(seed).integers(0, 4096, (rows, columns), "<u2")
    inside = np.argwhere(mask)
    top, left = inside.min(axis=0).tolist() if len(inside) else (0, 0)
    height, width = (inside.max(axis=0) - inside.min(axis=0) + 1).tolist() if len(inside) else (0, 0)
    bits = np.packbits(mask[top : top + height, left : left + width]).tobytes()
    drawn = "(SELECT %s::text AS name) s, (SELECT %s::text AS origin, %s::text AS kind, %s::text AS label) a, (SELECT %s::int AS rows, "
    drawn += (
        "%s::int AS columns, %s::int AS box_row, %s::int AS box_column, %s::int AS box_rows, %s::int AS box_columns, %s::bytea AS bits) m"
    )
    of_mask = one(
        conn, f"SELECT {snapshots.MASK_SHA256} FROM {drawn}",
        structure, origin, "polygon", None, rows, columns, top, left, height, width, bits,
    )  # fmt: skip
    of_label = one(conn, f"SELECT {snapshots.MASK_SHA256} FROM {drawn}", structure, origin, "label", label, *[None] * 7)
    assert of_mask == digest_of_mask(structure, origin, mask)
    assert of_label == digest_of_mask(structure, origin, label)
    two = {structure: of_mask, structure + "b": of_label}
    pixel_hash = hashlib.sha256(stored.tobytes()).digest()
    of_sample = one(
        conn,
        f"SELECT {snapshots.SAMPLE_SHA256} FROM (SELECT %s::bytea AS pixel_hash, %s::int AS rows, %s::int AS columns, "
        "1::smallint AS samples_per_pixel, %s::float8 AS slope, %s::float8 AS intercept, %s::bool AS modality_lut) i, "
        f"(SELECT %s::text AS part, %s::int AS fold) k, (SELECT {snapshots.MASKS} AS masks FROM unnest(%s::text[], %s::bytea[]) AS x "
        "(structure, sha256)) d",
        pixel_hash, rows, columns, *rescale, lut, part, fold, [structure + "b", structure], [of_label, of_mask],
    )  # fmt: skip
    assert of_sample == digest_of_sample(stored, *rescale, lut, part, fold, two)


def test_a_digest_by_hand(ingested: str, conn: psycopg.Connection, make: Make, studies: Path) -> None:
    """The digest of three ingested studies is the one made from their files by pydicom and from the masks, without the database's help."""
    made = make()
    samples = []
    rows = ask(conn, "SELECT sample_id, path, structure, origin, annotation_id FROM sample ORDER BY 1")
    for sample_id in sorted({row[0] for row in rows}):
        drawn = {}
        [path, *_] = [row[1] for row in rows if row[0] == sample_id]
        for _, _, structure, origin, annotation in (row for row in rows if row[0] == sample_id):
            [(height, width, top, left, box_rows, box_columns, bits)] = ask(
                conn,
                "SELECT rows, columns, box_row, box_column, box_rows, box_columns, bits FROM mask JOIN pairing p ON p.id = pairing_id "
                "WHERE annotation_id = %s", annotation,
            )  # fmt: skip
            mask = np.zeros((height, width), np.bool_)
            count = box_rows * box_columns
            mask[top : top + box_rows, left : left + box_columns] = np.unpackbits(
                np.frombuffer(bits, np.uint8), count=count
            ).reshape(box_rows, box_columns)  # fmt: skip
            drawn[structure] = digest_of_mask(structure, origin, mask)
        dataset = dcmread(path)
        slope, intercept = float(dataset.get("RescaleSlope", 1)), float(dataset.get("RescaleIntercept", 0))
        samples.append(digest_of_sample(dataset.pixel_array, slope, intercept, False, None, None, drawn))
    assert made.sha256 == digest_of_snapshot(samples)
    assert (made.samples, made.patients, made.structures) == (len(samples), 3, {"inner": 12, "outer": 6})
    assert [row[0].hex() for row in ask(conn, "SELECT sha256 FROM snapshot_sample ORDER BY sha256")] == sorted(s.hex() for s in samples)


# ------------------------------------------------------------------------------------------ the same elsewhere


def test_another_order_and_another_server(
    folder: Path, new_database: Callable[..., str], tmp_path: Path, take_in: TakeIn, make: Make
) -> None:
    """The digest does not depend on the order of ingests, on ids, on the root's name and place: patient by patient, backwards, from
    another folder, gives the same.
    """
    take_in(folder)
    other, url = tmp_path / "elsewhere", new_database()
    lines = (folder / "link.csv").read_text().splitlines()
    with ThreadPoolExecutor(1) as threads:
        for count, patient in enumerate(("0003", "0002", "0001"), 1):
            for below in (f"dicoms/SYN{patient}", f"contourfiles/SC-SYN-{patient}"):
                shutil.copytree(folder / below, other / below)
            (other / "link.csv").write_text("\n".join([lines[0], *lines[-count:]]) + "\n")
            _take_in(url, other, threads)
    with database.open_database(url) as second, second.connect() as conn:
        assert snapshots.create(second, "another name").sha256 == make().sha256
        assert snapshots.create(second, "two", images=True).sha256 == make("all", images=True).sha256
        ids = ask(conn, "SELECT array_agg(image_id ORDER BY number) FROM snapshot_sample WHERE snapshot_id = 1")
    assert ids


def test_dumped_and_restored(
    request: pytest.FixtureRequest, ingested: str, make: Make, new_database: Callable[..., str], tmp_path: Path
) -> None:
    """A restored dump holds the same snapshot, finds it whole, makes the same again, and keeps it from being changed."""
    if request.config.getoption("--postgres") != "embedded":
        pytest.skip("needs the pg_dump of the embedded server")
    made, empty = make(), new_database("template0")
    dump = tmp_path / "dump"
    # Its server may run as another user, who cannot write here.
    for program, url, options in (
        ("pg_dump", ingested, ["-Fc", "-f", dump]),
        ("pg_restore", empty, ["--no-owner", "--exit-on-error", dump]),
    ):
        named = [f"--{key}={value}" for key, value in conninfo_to_dict(url).items() if key in ("host", "port", "dbname")]
        user = ["-U", conninfo_to_dict(url)["user"]]
        subprocess.run([embedded.wheel_binaries() / program, *named, *user, *options], check=True, capture_output=True)
    with database.open_database(empty) as second, second.connect(autocommit=True) as conn:
        assert drift.verify(second, "one").well
        assert snapshots.create(second, "one").changed is False
        assert snapshots.create(second, "two").sha256 == made.sha256
        with pytest.raises(psycopg.Error, match="frozen"):
            conn.execute("DELETE FROM snapshot_mask")


def test_after_a_root_moved(folder: Path, db: database.Database, make: Make, take_in: TakeIn, tmp_path: Path) -> None:
    """Moving the files changes neither the digest nor what verify says; while they are away, it says that."""
    take_in(folder)
    made = make()
    folder.rename(tmp_path / "moved")
    away = drift.verify(db, "one")
    assert {problem.code for problem in away.problems} == {"missing"} and len(away.problems) == made.samples and not away.well
    roots.move(db, "arrived", str(tmp_path / "moved"))
    assert drift.verify(db, "one", full=True).well
    assert make("two").sha256 == made.sha256


def test_one_contour_shifted(folder: Path, db: database.Database, make: Make, take_in: TakeIn, say: Any) -> None:
    """A contour that moves by one pixel, and that alone, gives another digest; diff names its sample and structure and ends with 4."""
    take_in(folder)
    made = make()
    contour = next((folder / "contourfiles").glob("*-0002/i-contours/*"))
    points = np.loadtxt(contour)
    contour.write_text("".join(f"{x + 1:.2f} {y:.2f}\n" for x, y in points))
    take_in(folder)
    assert make("two").sha256 != made.sha256
    found = drift.diff(db, "one", "two")
    assert [(one.change, one.what) for one in found.samples] == [("changed", ["inner changed"])] and not found.equal
    code, said = say("snapshot", "diff", "one", "two")
    assert code == 4 and f"1 sample changed: {found.samples[0].sample_id}\n  inner changed: 1 sample" in said
    contour.write_text("".join(f"{x:.2f} {y:.2f}\n" for x, y in points))
    take_in(folder)
    assert make("three").sha256 == made.sha256
    assert say("snapshot", "diff", "one", "three")[0] == 0
    assert drift.verify(db, "two").well  # what it froze is a version that is current no more, and is there


def test_all_contours_shifted(ingested: str, db: database.Database, make: Make) -> None:
    """`catalog annotations shift` makes new versions: another digest, and the old snapshot is whole. Shifted back: the first digest."""
    made = make()
    [root] = [row["name"] for row in roots.listed(db)]
    shifting.shift(db, root, by=(1.0, 0.0), reason="a try", structure="outer")
    assert make("two").sha256 != made.sha256
    assert drift.diff(db, "one", "two").counts() == {"added": 0, "removed": 0, "changed": 6, "outer changed": 6}
    shifting.shift(db, root, by=(0.0, 0.0), reason="back")
    assert make("three").sha256 == made.sha256
    assert drift.verify(db, "one").well and drift.verify(db, "two").well


# ------------------------------------------------------------------------------------------ what it holds


def test_what_is_frozen(ingested: str, conn: psycopg.Connection, make: Make, say: Any) -> None:
    """Without options: each sample that somebody drew on, by sample key, with all that was drawn; not what has an open error; with
    --include-flagged that too.
    """
    image = one(conn, "SELECT sample_id FROM sample WHERE structure = 'outer' LIMIT 1")
    conn.execute("INSERT INTO flag (rule, severity, detail, image_id, raised_by) VALUES ('MINE', 'error', 'bad', %s, 'me')", [image])
    made = make()
    assert (made.samples, made.structures) == (11, {"inner": 11, "outer": 5})
    rows = ask(conn, "SELECT number, image_id, sample_key FROM snapshot_sample ORDER BY number")
    assert [row[0] for row in rows] == list(range(11)) and image not in [row[1] for row in rows]
    assert [row[2] for row in rows] == sorted(row[2] for row in rows)
    frozen = ask(conn, "SELECT k.image_id, m.structure, p.annotation_id FROM snapshot_mask m "
                       "JOIN snapshot_sample k USING (snapshot_id, number) "
                       "JOIN pairing p ON p.id = m.pairing_id ORDER BY 1, 2")  # fmt: skip
    assert frozen == ask(conn, "SELECT sample_id, structure, annotation_id FROM sample WHERE error_flags = 0 ORDER BY 1, 2")
    assert make("more", include_flagged=True).samples == 12
    code, said = say("snapshot", "create", "most", "--include-flagged", "--json", "--actor", "me")
    found = json.loads(said)
    assert (code, found["samples"], found["sha256"]) == (0, 12, make("more", include_flagged=True).sha256)
    [shown] = [row for row in json.loads(say("snapshot", "list", "--json")[1]) if row["name"] == "most"]
    assert (shown["actor"], shown["structures"], shown["definition"]) == ("me", ["inner", "outer"], {"include_flagged": True})
    shown = json.loads(say("snapshot", "show", "more", "--json")[1])
    assert (shown["flagged"], shown["revoked"], shown["erased"]) == (1, 0, 0)
    assert shown["annotated"] == [
        {"structure": name, "origin": "contour", "part": None, "samples": count} for name, count in (("inner", 12), ("outer", 6))
    ]
    assert "1 sample with an open error now" in say("snapshot", "show", "more")[1]


def test_choosing(ingested: str, conn: psycopg.Connection, make: Make) -> None:
    """--structure, --require, --where, --images and --origin: each chooses what it says, and a user's condition gives the same digest as
    the option that says the same.
    """
    assert make("a", structures=["outer"]).structures == {"outer": 6}
    assert make("b", where="structure = 'outer'").sha256 == make("a", structures=["outer"]).sha256
    assert make("c", structures=["inner", "outer"], require="all").samples == 6
    any_of_them = make("any", structures=["inner", "outer"])  # by default, where a feed takes all: docs/sets.md sets them side by side
    assert any_of_them.samples == 12 and Definition(structures=("inner", "outer")).require == "all"
    assert "any of them, `Feed(structures=[…])` those that have all" in (REPOSITORY / "docs/sets.md").read_text()
    assert make("d", structures=["outer", "inner"]).sha256 == make("e").sha256
    assert make("f", where="patient = 'SYN0001' and area_px > 0 -- a remark").patients == 1
    every = make("g", images=True)
    assert (every.samples, every.structures) == (48, {"inner": 12, "outer": 6})
    assert make("h", images=True, where="patient = 'SYN0001'").samples == 16
    assert make("i", images=True, structures=["outer"]).structures == {"outer": 6}
    _derive(conn, "inner")
    assert make("j").sha256 == make("e").sha256
    assert make("k", origins=[*DRAWN, "interpolated"]).structures == {"inner": 13, "outer": 6}
    assert make("l", origins=["interpolated"]).samples == 1


def test_labels(ingested: str, conn: psycopg.Connection, make: Make, db: database.Database) -> None:
    """A label of the whole image counts with its class: another class, another digest."""
    image, file, run = ask(conn, "SELECT i.id, l.file_id, f.ingest_run_id FROM image i JOIN location l ON l.image_id = i.id JOIN file f "
                                 "ON f.id = l.file_id ORDER BY i.id LIMIT 1")[0]  # fmt: skip
    structure = one(conn, "INSERT INTO structure (name) VALUES ('view') RETURNING id")
    label = one(conn, "INSERT INTO annotation (file_id, source_key, reader_id, structure_id, kind, origin, label, content_hash, "
                      "ingest_run_id) "
                      "SELECT %s, 'view', (SELECT min(id) FROM reader), %s, 'label', 'label', 'short axis', '\\x00', %s RETURNING id",
                file, structure, run)  # fmt: skip
    conn.execute("INSERT INTO pairing (annotation_id, image_id, method, rule, score, state, actor) "
                 "VALUES (%s, %s, 'link', 'by hand', 1, 'accepted', 'me')", [label, image])  # fmt: skip
    made = make(structures=["view"])
    assert made.structures == {"view": 1}
    assert one(conn, "SELECT sha256 FROM snapshot_mask") == digest_of_mask("view", "label", "short axis")
    conn.execute("ALTER TABLE annotation DISABLE TRIGGER USER")
    conn.execute("UPDATE annotation SET label = 'long axis' WHERE id = %s", [label])
    assert make("two", structures=["view"]).sha256 != made.sha256
    assert [problem.code for problem in drift.verify(db, "one").problems] == ["differs"]


def test_a_condition_cannot_write(ingested: str, conn: psycopg.Connection, make: Make) -> None:
    """A user's condition is one expression, under a login that cannot write: everything else is one clear error and makes nothing."""
    for where, said in (
        ("true) OR (true", "--where: .* it must be an SQL condition over the view sample"),
        ("true; DELETE FROM flag", "--where: "),
        ("nonsense = 1", '--where: column "nonsense" does not exist'),
        ("query_to_xml('DELETE FROM snapshot_sample', true, true, '') IS NOT NULL", "not allowed in a non-volatile function"),
        ("pg_read_file('/etc/passwd') <> ''", "permission denied"),
    ):
        with pytest.raises(CatalogError, match=said):
            make("bad", where=where)
    assert one(conn, "SELECT count(*) FROM snapshot") == 0


def test_refused(ingested: str, conn: psycopg.Connection, make: Make, database_url: str) -> None:
    """What cannot be right is said in one line, with what to do, and nothing is made."""
    for options, error, said in (
        ({"name": ""}, UsageError, "a name is up to 100 letters"),
        ({"name": "a/b"}, UsageError, "a name is up to 100 letters"),
        ({"name": "a\nb"}, UsageError, "a name is up to 100 letters"),
        ({"name": "x" * 101}, UsageError, "a name is up to 100 letters"),
        ({"structures": ["innner"]}, UsageError, "structure 'innner': there is none of this name; there are inner, outer"),
        ({"split": "s"}, UsageError, "split 's': there is none of this name; there are none, see `catalog split create`"),
        ({"origins": ["drawn"]}, UsageError, "origins .*: must be of contour"),
        ({"require": "all"}, UsageError, "of which structures"),
        ({"where": "patient = 'nobody'"}, CatalogError, "nothing fits, so none was made; see `catalog status`"),
        ({"actor": " "}, UsageError, "--actor: is empty"),
    ):
        with pytest.raises(error, match=said):
            make(**{"name": "one", **options})
    with psycopg.connect(database_url) as other:
        other.execute("SELECT pg_advisory_lock(%s, (SELECT id FROM root)::integer)", [LOCK_CLASS])
        with pytest.raises(CatalogError, match=r"an ingest of it is running; try again when it has ended"):
            make()
        other.execute("SELECT pg_advisory_unlock_all()")  # the session ends a moment after it is closed
    conn.execute("UPDATE image SET pixel_hash = NULL WHERE id IN (SELECT sample_id FROM sample WHERE patient = 'SYN0001')")
    with pytest.raises(
        CatalogError, match=r"the pixels of 4 of its images were not hashed yet, .*; run `catalog measure`, then this again"
    ):
        make()
    assert make(where="patient <> 'SYN0001'").samples == 8
    assert one(conn, "SELECT count(*) FROM snapshot") == 1


def test_made_twice(ingested: str, conn: psycopg.Connection, make: Make, say: Any, catalog: Any) -> None:
    """The same name again: nothing happens while it would hold the same; when the catalog has moved on, exit code 4 and one line."""
    made = make()
    assert make() == snapshots.Made("one", made.sha256, False, 12, 3, {"inner": 12, "outer": 6})
    assert "is there already and holds the same 12 samples: nothing changed" in say("snapshot", "create", "one")[1]
    conn.execute("UPDATE pairing SET state = 'rejected' WHERE id = (SELECT min(id) FROM pairing)")
    with pytest.raises(DriftError, match=r"snapshot 'one': was made on .* of other samples .* never changed; choose another name"):
        make()
    done = catalog("snapshot", "create", "one")
    assert done.returncode == 4 and len(done.stderr.splitlines()) == 1 and not done.stdout
    assert one(conn, "SELECT count(*) FROM snapshot") == 1


def test_a_dry_run(ingested: str, conn: psycopg.Connection, make: Make, say: Any) -> None:
    """--dry-run says what would be frozen, with its digest; no row is written and no number used up."""
    dry = make(dry_run=True)
    assert one(conn, "SELECT count(*) FROM snapshot") == 0
    assert "dry run: nothing was changed" in say("snapshot", "create", "one", "--dry-run")[1]
    assert make() == dry and one(conn, "SELECT id FROM snapshot") == 1


# ------------------------------------------------------------------------------------------ splits


def _split(conn: psycopg.Connection, parts: dict[str, tuple[str, int | None]], *, frozen: bool = False) -> int:
    split = one(conn, "INSERT INTO split (name, parts, folds, actor) VALUES ('s', '{train,test}', 2, 'me') RETURNING id")
    for patient, (part, fold) in parts.items():
        conn.execute("INSERT INTO split_patient (split_id, patient_id, part, fold) "
                     "SELECT %s, id, %s, %s FROM patient WHERE patient_id = %s",
                     [split, part, fold, patient])  # fmt: skip
    if frozen:
        conn.execute("UPDATE split SET frozen_by = 'me', frozen_at = now()")
    return int(split)


def test_with_a_split(ingested: str, conn: psycopg.Connection, make: Make, say: Any, db: database.Database) -> None:
    """Each sample keeps part and fold of its patient, which count in the digest; patients without a part are left out and said."""
    _split(conn, {"SYN0001": ("train", 1), "SYN0003": ("test", None)})
    made = make(split="s")
    assert (made.samples, made.patients, made.parts, made.without_part) == (8, 2, {"test": 4, "train": 4}, 1)
    parted = "SELECT DISTINCT v.patient, k.part, k.fold FROM snapshot_sample k JOIN image_all v ON v.sample_id = k.image_id ORDER BY 1"
    assert ask(conn, parted) == [
        ("SYN0001", "train", 1), ("SYN0003", "test", None)]  # fmt: skip
    same = make("two", where="patient <> 'SYN0002'")
    assert same.sha256 != made.sha256
    assert drift.diff(db, "one", "two").counts() == {"added": 0, "removed": 0, "changed": 8, "part": 8}
    said = say("snapshot", "create", "one", "--split", "s")[1]
    assert "1 patient without a part in split s left out" in said
    shown = say("snapshot", "show", "one")[1]
    assert "part train, fold 1: 4 samples" in shown and "split: s" in shown and "inner (contour) in test: 4 samples" in shown
    conn.execute("UPDATE split_patient SET fold = 0 WHERE part = 'train'")
    assert make("three", split="s").sha256 != made.sha256


def test_pixels_on_two_sides(ingested: str, conn: psycopg.Connection, make: Make) -> None:
    """Images whose pixels lie on two sides of the split are in no snapshot with it."""
    _split(conn, {"SYN0001": ("train", 0), "SYN0002": ("train", 0), "SYN0003": ("test", None)})
    whole = make(split="s").samples
    first, last = (one(conn, "SELECT min(sample_id) FROM sample WHERE patient = %s", patient) for patient in ("SYN0001", "SYN0003"))
    conn.execute("UPDATE image SET pixel_hash = (SELECT pixel_hash FROM image WHERE id = %s) WHERE id = %s", [first, last])
    made = make("two", split="s")
    assert (made.leaking, made.samples) == (2, whole - 2)
    assert not {first, last} & {row[0] for row in ask(conn, "SELECT image_id FROM snapshot_sample WHERE snapshot_id = 2")}


# ------------------------------------------------------------------------------------------ frozen


RAW = (
    "UPDATE snapshot SET name = 'other'",
    "DELETE FROM snapshot",
    "TRUNCATE snapshot CASCADE",
    "UPDATE snapshot_sample SET part = 'train'",
    "UPDATE snapshot_sample SET sha256 = sha256(sha256)",
    "UPDATE snapshot_sample SET image_id = image_id + 1",
    "UPDATE snapshot_sample SET snapshot_id = 2",
    "UPDATE snapshot_sample SET number = -number",
    "UPDATE snapshot_sample SET image_id = NULL, sample_key = NULL",
    "DELETE FROM snapshot_sample",
    "TRUNCATE snapshot_sample CASCADE",
    "INSERT INTO snapshot_sample SELECT 1, 99, id, sample_key, NULL, NULL, sha256('') FROM image "
    "WHERE id NOT IN (SELECT image_id FROM snapshot_sample) LIMIT 1",
    "UPDATE snapshot_mask SET structure = 'x'",
    "UPDATE snapshot_mask SET pairing_id = (SELECT min(id) FROM pairing)",
    "DELETE FROM snapshot_mask",
    "TRUNCATE snapshot_mask",
    "INSERT INTO snapshot_mask SELECT 1, 0, 'x', min(id), sha256('') FROM pairing",
    "DELETE FROM pairing WHERE id IN (SELECT pairing_id FROM snapshot_mask)",
    "DELETE FROM image",
    "TRUNCATE image CASCADE",
)


def test_raw_sql_is_refused(ingested: str, conn: psycopg.Connection, make: Make, db: database.Database) -> None:
    """The owner himself cannot change, delete, empty or add to a snapshot, nor take away what it is made of."""
    make()
    tables = ("snapshot", "snapshot_sample", "snapshot_mask")
    before = [ask(conn, f"SELECT * FROM {table} ORDER BY 1, 2") for table in tables]
    for statement in RAW:
        with pytest.raises(psycopg.Error) as refused:
            conn.execute(statement.encode())
        assert refused.value.sqlstate in ("42501", "23503"), statement  # refused by a trigger, or by a reference
    assert [ask(conn, f"SELECT * FROM {table} ORDER BY 1, 2") for table in tables] == before
    assert drift.verify(db, "one").well


# ------------------------------------------------------------------------------------------ verify


def _file_of(conn: psycopg.Connection, place: int = 0) -> tuple[int, Path]:
    row = ask(conn, "SELECT k.image_id, v.path FROM snapshot_sample k JOIN image_all v ON v.sample_id = k.image_id ORDER BY k.number")[
        place
    ]
    return row[0], Path(row[1])


def _bend(path: Path, *, keep_time: bool) -> None:
    """Change the last pixel of a file."""
    status, data = path.stat(), bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + (0 if keep_time else 5_000_000_000)))


def test_verify_and_files(folder: Path, take_in: TakeIn, make: Make, conn: psycopg.Connection, db: database.Database, say: Any) -> None:
    """A file that was only touched is compared and found good; one with another pixel, a missing one and a shorter one are named by their
    sample; exit code 4. One whose size and time are as catalogued is found by --full alone.
    """
    take_in(folder)
    make()
    assert say("snapshot", "verify", "one")[0] == 0
    touched, changed, gone, short, secret = (_file_of(conn, place) for place in range(5))
    os.utime(touched[1], ns=(1, 1))
    _bend(changed[1], keep_time=False)
    gone[1].unlink()
    short[1].write_bytes(short[1].read_bytes()[:-100])
    found = drift.verify(db, "one", jobs=1)
    assert {(problem.sample_id, problem.code) for problem in found.problems} == {
        (changed[0], "changed"), (gone[0], "missing"), (short[0], "truncated")}  # fmt: skip
    assert (found.read, found.looked_at, found.whole) == (3, 12, True)
    _bend(secret[1], keep_time=True)
    assert secret[0] not in {problem.sample_id for problem in drift.verify(db, "one", jobs=1).problems}
    full = drift.verify(db, "one", full=True, jobs=1)
    assert {problem.sample_id for problem in full.problems} == {changed[0], gone[0], short[0], secret[0]} and full.read == 11
    code, said = say("snapshot", "verify", "one", "--full", "--jobs", 1)
    assert code == 4 and "1 sample missing: its file is not there; bring it back" in said and "is not what was frozen" in said
    assert "SYN" not in said
    assert json.loads(say("snapshot", "verify", "one", "--json")[1])["well"] is False


def test_verify_and_advice(folder: Path, take_in: TakeIn, make: Make, db: database.Database, say: Any, conn: psycopg.Connection) -> None:
    """What is advised helps: a file with other pixels, or cut off, is to be brought back as it was, not ingested. Ingested all the
    same it is said that no file holds the pixels, not that none is there. Pixels behind a longer header of their file are to be ingested.
    """
    take_in(folder)
    make()
    (changed, other), (short, cut), (moved, longer), (gone, away) = (_file_of(conn, place) for place in range(4))
    before = {path: path.read_bytes() for path in (other, cut, away)}
    _bend(other, keep_time=False)
    cut.write_bytes(before[cut][:-100])
    header = dcmread(longer)
    header.ImageComments = "more" * 50
    header.save_as(longer)
    away.unlink()
    ingest_it = "run `catalog ingest` on its root again"
    said = {problem.sample_id: problem for problem in drift.verify(db, "one", jobs=1).problems}
    assert {sample: problem.code for sample, problem in said.items()} == {
        changed: "changed", short: "truncated", moved: "changed", gone: "missing"}  # fmt: skip
    for sample in (changed, short):
        assert said[sample].message.endswith("; bring the file back as it was")
    assert said[moved].message == f"its pixels lie at another place of its file; {ingest_it}"
    assert "is not there" in said[gone].message
    take_in(folder)
    said = {problem.sample_id: problem for problem in drift.verify(db, "one", jobs=1).problems}
    assert set(said) == {changed, short, gone}  # the advice for the longer one was right
    assert "3 samples missing: no file of the catalog holds its pixels any more; bring back" in say("snapshot", "verify", "one")[1]
    for path, data in before.items():
        path.write_bytes(data)
    take_in(folder)
    assert drift.verify(db, "one", jobs=1).well


BEHIND = (
    "UPDATE mask SET bits = set_byte(bits, 3, get_byte(bits, 3) # 1) WHERE pairing_id = (SELECT min(pairing_id) FROM snapshot_mask)",
    "DELETE FROM mask WHERE pairing_id = (SELECT min(pairing_id) FROM snapshot_mask)",
    "UPDATE annotation SET origin = 'proposed' WHERE id = (SELECT annotation_id FROM pairing ORDER BY id LIMIT 1)",
    "UPDATE image SET slope = 2 WHERE id = (SELECT image_id FROM snapshot_sample WHERE number = 3)",
    "UPDATE image SET pixel_hash = sha256(pixel_hash) WHERE id = (SELECT image_id FROM snapshot_sample WHERE number = 3)",
)


def test_verify_and_rows(ingested: str, make: Make, conn: psycopg.Connection, db: database.Database) -> None:
    """A mask, annotation or image whose row was changed behind the program's back is found: one sample differs."""
    make()
    for change in BEHIND:
        with conn.transaction(force_rollback=True):
            conn.execute(change.encode())
            assert len(drift.changed(conn, 1)) == 1, change
    conn.execute(BEHIND[0].encode())
    found = drift.verify(db, "one")
    assert [problem.code for problem in found.problems] == ["differs"] and found.whole


def test_verify_and_its_own_rows(ingested: str, make: Make, conn: psycopg.Connection, db: database.Database, say: Any) -> None:
    """Who switches the triggers off and takes a sample out is found out: the digests do not make up the snapshot's any more. Who writes
    over the digest of a mask, too.
    """
    make()
    conn.execute("SET session_replication_role = replica")
    with conn.transaction(force_rollback=True):
        conn.execute("UPDATE snapshot_mask SET sha256 = sha256(sha256) WHERE number = 4")
        assert drift.changed(conn, 1) == [4]
    conn.execute("DELETE FROM snapshot_mask WHERE number = 4; DELETE FROM snapshot_sample WHERE number = 4")
    assert not drift.verify(db, "one").whole
    code, said = say("snapshot", "verify", "one")
    assert code == 4 and "its samples are not those that were frozen" in said


# ------------------------------------------------------------------------------------------ erasing and undoing


def _derive(conn: psycopg.Connection, structure: str, *, patient: str = PATIENT, origin: str = "interpolated") -> tuple[int, int]:
    """Write what `catalog interpolate` writes: a label between two of a patient's, on an image without one; its annotation and image."""
    drawn = "SELECT annotation_id FROM sample WHERE structure = %s AND patient = %s ORDER BY 1 LIMIT 2"
    parents = [row[0] for row in ask(conn, drawn, structure, patient)]
    free = "SELECT min(sample_id) FROM image_all WHERE patient = %s AND sample_id NOT IN (SELECT sample_id FROM sample)"
    image = one(conn, free, patient)
    made = one(
        conn,
        "INSERT INTO annotation (file_id, source_key, reader_id, structure_id, kind, origin, rows, columns, box, bits, content_hash, "
        "ingest_run_id) "
        "SELECT a.file_id, 'interpolate:' || %s, a.reader_id, a.structure_id, 'segment', %s, m.rows, m.columns, "
        "ARRAY[m.box_row, m.box_column, m.box_rows, m.box_columns], m.bits, '\\x01', a.ingest_run_id "
        "FROM annotation a JOIN pairing p ON p.annotation_id = a.id JOIN mask m ON m.pairing_id = p.id WHERE a.id = %s RETURNING id",
        structure, origin, parents[0],
    )  # fmt: skip
    pairing = one(conn, "INSERT INTO pairing (annotation_id, image_id, method, rule, score, state, actor) "
                        "VALUES (%s, %s, 'interpolate', 'between two', 1, 'accepted', 'somebody') RETURNING id", made, image)  # fmt: skip
    conn.execute("INSERT INTO mask (pairing_id, rows, columns, box_row, box_column, box_rows, box_columns, bits) "
                 "SELECT %s, rows, columns, box[1], box[2], box[3], box[4], bits FROM annotation WHERE id = %s",
                 [pairing, made])  # fmt: skip
    conn.execute("INSERT INTO derivation (annotation_id, method, along, first_id, second_id, fraction, gap, program_version, actor) "
                 "VALUES (%s, 'shape', 'slices', %s, %s, 0.5, 16, '0', 'somebody')", [made, *parents])  # fmt: skip
    return made, image


def test_erased(ingested: str, conn: psycopg.Connection, make: Make, db: database.Database, say: Any) -> None:
    """Erasing a patient takes the patient's samples out of snapshots, leaving their digests, and says of which how many; verify finds
    the rest whole, says so, and nothing of the patient is left.
    """
    _derive(conn, "inner")
    made, _, derived = make(), make("others", where=f"patient <> '{PATIENT}'"), make("derived", origins=[*DRAWN, "interpolated"])
    before = ask(conn, "SELECT number, sha256 FROM snapshot_sample WHERE snapshot_id = 1 ORDER BY number")
    dry = erasing.erase(db, PATIENT, reason="asked for", dry_run=True)
    assert dry.snapshots == {"one": 4, "derived": 5} and one(conn, "SELECT count(*) FROM erasure") == 0
    assert drift.verify(db, "one").erased == 0
    done = erasing.erase(db, PATIENT, reason="asked for")
    assert (done.snapshots, done.id, done.rows) == (dry.snapshots, 1, dry.rows)
    assert done.rows["annotation"] == 7  # the derived one, too
    assert ask(conn, "SELECT number, sha256 FROM snapshot_sample WHERE snapshot_id = 1 ORDER BY number") == before
    gone = (
        "SELECT erasure_id, num_nulls(image_id, sample_key), count(*) FROM snapshot_sample WHERE snapshot_id = 1 GROUP BY 1, 2 ORDER BY 2"
    )
    assert ask(conn, gone) == [(None, 0, 8), (1, 2, 4)]
    assert one(conn, "SELECT count(*) FROM snapshot_mask WHERE snapshot_id = 1") == 12
    found = drift.verify(db, "one", full=True, jobs=1)
    assert found.well and (found.erased, found.samples, found.looked_at) == (4, 12, 8)
    code, said = say("snapshot", "verify", "one")
    assert code == 0 and "4 samples of patients who were erased since: their digests alone are left" in said
    assert "4 samples of patients who were erased since" in say("snapshot", "show", "one")[1]
    assert [row["erased"] for row in json.loads(say("snapshot", "list", "--json")[1])] == [4, 0, 5]
    assert drift.diff(db, "one", "derived").counts()["added"] == 1
    assert drift.diff(db, "one", "others").counts() == {"added": 0, "removed": 4, "changed": 0}
    assert drift.verify(db, "derived").sha256 == derived.sha256 and made.sha256 != derived.sha256
    with pytest.raises(DriftError):
        make()
    [left] = conn.execute("SELECT min(number) FROM snapshot_sample WHERE snapshot_id = 1 AND erasure_id IS NULL").fetchone() or ()
    for change in ("erasure_id = NULL", "erasure_id = 1, image_id = NULL, sample_key = NULL"):  # nor for an erasure of long ago
        with pytest.raises(psycopg.Error, match="frozen"):
            conn.execute(f"UPDATE snapshot_sample SET {change} WHERE (snapshot_id, number) = (1, %s)", [left])


def test_erased_from_another_s_image(ingested: str, conn: psycopg.Connection, make: Make, db: database.Database) -> None:
    """A sample that loses a mask, since the contour was the erased patient's, is taken out as a whole."""
    made, _ = _derive(conn, "inner", patient="SYN0001")  # whose second parent becomes one of the patient's
    theirs = one(conn, "SELECT min(annotation_id) FROM sample WHERE patient = %s AND structure = 'inner'", PATIENT)
    conn.execute("UPDATE derivation SET second_id = %s WHERE annotation_id = %s", [theirs, made])
    make(origins=["interpolated"])
    assert erasing.erase(db, PATIENT, reason="asked for").snapshots == {"one": 1}
    assert one(conn, "SELECT count(*) FROM annotation WHERE id = %s", made) == 0
    assert drift.verify(db, "one").erased == 1


def test_undoing(folder: Path, take_in: TakeIn, make: Make, conn: psycopg.Connection, db: database.Database) -> None:
    """A run of which something is in a snapshot is not undone, in one line. Without one, what was derived on its images, or from its
    annotations, goes with it and is no person's decision; files of other runs are not read again for it.
    """
    late = folder.with_name("late")
    (late / "dicoms").mkdir(parents=True)
    # An image of the second patient's without a contour comes later, from a root of its own.
    image = next(
        path
        for path in sorted((folder / "dicoms" / PATIENT).iterdir())
        if not list(folder.glob(f"contourfiles/*0002/*/*-{int(path.stem):04d}-*"))
    )
    shutil.move(image, late / "dicoms" / image.name)
    take_in(folder)
    before = ask(conn, "SELECT id, mtime_ns FROM file ORDER BY 1")
    take_in(late)
    only = one(conn, "SELECT image_id FROM location l JOIN file f ON f.id = l.file_id WHERE f.first_run_id = 2")
    made, _ = _derive(conn, "inner")
    conn.execute("UPDATE pairing SET image_id = %s WHERE annotation_id = %s", [only, made])
    make(origins=["interpolated"])
    with pytest.raises(CatalogError, match="run 2: cannot be undone: what it brought is in 1 of the samples of snapshots"):
        runs.undo(db, 2)
    with pytest.raises(CatalogError, match=r"cannot be undone: .*is in 1 of the samples of snapshots"):
        runs.undo(db, 1)
    conn.execute("SET session_replication_role = replica")
    conn.execute("DELETE FROM snapshot_mask; DELETE FROM snapshot_sample; DELETE FROM snapshot")
    conn.execute("SET session_replication_role = origin")
    undone = runs.undo(db, 2)
    assert (undone.decided, undone.restored, undone.rows["annotation"], undone.rows["image"]) == (0, 0, 1, 1)
    assert one(conn, "SELECT count(*) FROM derivation") == 0
    assert ask(conn, "SELECT id, mtime_ns FROM file ORDER BY 1") == before
    assert one(conn, "SELECT count(*) FROM flag WHERE rule = 'PAIR-NO-IMAGE'") == 0


@pytest.mark.parametrize("frozen", [True, False])
def test_undoing_and_a_split(folder: Path, take_in: TakeIn, conn: psycopg.Connection, db: database.Database, frozen: bool) -> None:
    """A patient of a frozen split stays in it when the run that brought the patient is undone; of one that is not, the patient goes."""
    take_in(folder)
    _split(conn, {"SYN0001": ("train", 1)}, frozen=frozen)
    runs.undo(db, 1)
    assert one(conn, "SELECT count(*) FROM split_patient") == one(conn, "SELECT count(*) FROM patient") == int(frozen)
