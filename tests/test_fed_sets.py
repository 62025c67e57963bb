"""What a feed gets of a split, of a snapshot and of labels that nobody drew. Rows are made in SQL: the commands have their own tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from catalog import database, flags
from catalog.errors import UsageError
from loaderd import Feed, FeedError
from loaderd.definitions import Definition
from tests.conftest import Run
from tests.processes import serving

SNAPSHOT = """
WITH made AS (
    INSERT INTO snapshot (name, sha256, structures, definition, num_samples, num_patients, program_version, actor)
    SELECT %(name)s, sha256('x'), ARRAY['inner'], %(definition)s::jsonb, count(*), count(DISTINCT patient), '0', 'test'
    FROM sample WHERE structure = 'inner' AND error_flags = 0 RETURNING id
), samples AS (
    INSERT INTO snapshot_sample (snapshot_id, number, image_id, sample_key, part, sha256)
    SELECT made.id, row_number() OVER (ORDER BY s.sample_key) - 1, s.sample_id, s.sample_key,
           CASE s.patient WHEN 'SYN0001' THEN 'val' ELSE 'train' END, sha256('y')
    FROM made, sample s WHERE s.structure = 'inner' AND s.error_flags = 0 RETURNING snapshot_id, number, image_id
)
INSERT INTO snapshot_mask (snapshot_id, number, structure, pairing_id, sha256)
SELECT k.snapshot_id, k.number, 'inner', p.id, sha256('z') FROM samples k
JOIN sample s ON s.sample_id = k.image_id AND s.structure = 'inner'
JOIN pairing p ON p.annotation_id = s.annotation_id AND p.image_id = s.sample_id
"""


@pytest.fixture
def ingested(ingested: str) -> Iterator[str]:
    """The same, with one daemon for all feeds of a test."""
    with serving():
        yield ingested


def fed(*arguments: str, **how: object) -> list[int]:
    """Return the sample ids of an epoch, sorted."""
    with Feed(*arguments, **{"seed": 1, **({} if arguments else {"structures": ["inner"]}), **how}) as feed:  # type: ignore[arg-type]
        return sorted(sample for batch in feed.epoch() for sample in batch.sample_ids.tolist())


def make_split(conn: psycopg.Connection, name: str, parts: dict[str, str], folds: dict[str, int] | None = None) -> None:
    """Put patients into the parts of a split."""
    conn.execute(
        "INSERT INTO split (name, parts, folds, actor) VALUES (%s, %s, %s, 'test')",
        [name, sorted({"train", "val", "test", *parts.values()}), max(folds.values()) + 1 if folds else None],
    )
    for patient, part in parts.items():
        conn.execute(
            "INSERT INTO split_patient (split_id, patient_id, part, fold) SELECT s.id, p.id, %s, %s FROM split s, patient p "
            "WHERE s.name = %s AND p.patient_id = %s",
            [part, (folds or {}).get(patient), name, patient],
        )


def samples(conn: psycopg.Connection, *patients: str) -> list[int]:
    """Return the ids of the inner samples of these patients."""
    rows = conn.execute("SELECT sample_id FROM sample WHERE structure = 'inner' AND patient = ANY(%s) ORDER BY 1", [list(patients)])
    return [sample for (sample,) in rows]


def test_each_side_gets_its_patients(ingested: str, conn: psycopg.Connection) -> None:
    """train, val and test are fed their patients' samples and nobody else's; a patient without a part is on no side."""
    make_split(conn, "mri", {"SYN0001": "val", "SYN0002": "train"})
    assert fed(split="train") == samples(conn, "SYN0002")
    assert fed(split="mri/val", shuffle=False) == samples(conn, "SYN0001")
    with pytest.raises(FeedError, match=r"no sample fits .*split='mri/test'"):
        fed(split="test")


def test_a_fold_is_held_out(ingested: str, conn: psycopg.Connection) -> None:
    """train:K is all folds but K, val:K is that fold; test patients are in neither."""
    make_split(conn, "cv", {"SYN0001": "train", "SYN0002": "train", "SYN0003": "test"}, {"SYN0001": 0, "SYN0002": 1})
    assert fed(split="train:0") == samples(conn, "SYN0002")
    assert fed(split="val:0") == samples(conn, "SYN0001")
    assert fed(split="cv/train:1") == samples(conn, "SYN0001")
    with pytest.raises(FeedError, match="has the folds 0 to 1"):
        fed(split="val:2")


def test_a_side_that_is_none(ingested: str, conn: psycopg.Connection) -> None:
    """A part of one of several splits, an unknown split and an unknown part are refused in a line that says what there is."""
    make_split(conn, "a", {"SYN0001": "train"})
    make_split(conn, "b", {"SYN0001": "val"})
    for split, said in (
        ("train", "there are 2 splits; say which"), ("c/train", "there is no split 'c'; there are a, b"), ("a/dev", "has the parts"),
    ):  # fmt: skip
        with pytest.raises(FeedError, match=said):
            fed(split=split)


def test_pixels_on_two_sides_are_on_none(ingested: str, conn: psycopg.Connection) -> None:
    """An image that turns out to have the pixels of one on another side is fed to neither; the rest of both sides is."""
    make_split(conn, "mri", {"SYN0001": "val", "SYN0002": "train"})
    one, other = samples(conn, "SYN0001")[0], samples(conn, "SYN0002")[0]
    conn.execute("UPDATE image SET pixel_hash = (SELECT pixel_hash FROM image WHERE id = %s) WHERE id = %s", [one, other])
    assert fed(split="val") == samples(conn, "SYN0001")[1:]
    assert fed(split="train") == samples(conn, "SYN0002")[1:]


def test_a_snapshot_ignores_what_came_later(ingested: str, conn: psycopg.Connection) -> None:
    """Flags, rejected pairings and a moved side change nothing for a stream on a snapshot; a live stream of the same shows them."""
    conn.execute(SNAPSHOT, {"name": "v1", "definition": "{}"})
    before = samples(conn, "SYN0001", "SYN0002", "SYN0003")
    conn.execute("INSERT INTO flag (rule, severity, detail, image_id, raised_by) VALUES ('X', 'error', 'x', %s, 'me')", [before[0]])
    conn.execute("UPDATE pairing SET state = 'rejected' WHERE image_id = %s", [before[1]])
    assert fed(snapshot="v1") == before
    assert fed() == before[2:]


def test_what_is_revoked_leaves_a_snapshot(ingested: str, conn: psycopg.Connection) -> None:
    """A patient who withdraws is fed from no snapshot either, nor planned, so that steps are counted without."""
    conn.execute(SNAPSHOT, {"name": "v1", "definition": "{}"})
    with database.open_database(ingested) as db:
        flags.withdraw(db, "SYN0002", reason="asked to")
    left = samples(conn, "SYN0001", "SYN0003")
    assert fed(snapshot="v1") == left
    with Feed(structures=["inner"], snapshot="v1") as feed:
        assert feed.num_samples == len(left)


def test_status_says_what_became_of_a_snapshot(ingested: str, conn: psycopg.Connection, catalog: Run) -> None:
    """A stream on a snapshot ignores flags, so `catalog status` counts the samples that have one by now, and those that are revoked."""
    conn.execute(SNAPSHOT, {"name": "v1", "definition": "{}"})
    count = len(samples(conn, "SYN0001", "SYN0002", "SYN0003"))
    assert f"  snapshot v1: {count} samples\n" in catalog("status").stdout
    image, other, *_ = samples(conn, "SYN0001")
    conn.execute("INSERT INTO flag (rule, severity, detail, image_id, raised_by) VALUES ('X', 'error', 'x', %s, 'me')", [image])
    conn.execute(
        "INSERT INTO flag (rule, severity, detail, pairing_id, raised_by) SELECT 'X', 'error', 'x', m.pairing_id, 'me' "
        "FROM snapshot_mask m JOIN snapshot_sample USING (snapshot_id, number) WHERE image_id = %s",
        [other],
    )
    with database.open_database(ingested) as db:
        flags.withdraw(db, "SYN0002", reason="asked to")
    gone = len(samples(conn, "SYN0002"))
    # What is revoked is an open error, too.
    assert f"  snapshot v1: {count} samples, of which now {gone} revoked, {gone + 2} with open errors\n" in catalog("status").stdout


def test_the_sides_of_a_snapshot_stay(ingested: str, conn: psycopg.Connection) -> None:
    """split= of a snapshot is the side as it was then, whatever the split says now; another split's name is refused."""
    conn.execute(SNAPSHOT, {"name": "v1", "definition": '{"split": "mri"}'})
    make_split(conn, "mri", {"SYN0001": "train"})
    assert fed(snapshot="v1", split="val") == samples(conn, "SYN0001")
    assert fed(snapshot="v1", split="mri/train") == samples(conn, "SYN0002", "SYN0003")
    with pytest.raises(FeedError, match="was made with split 'mri'"):
        fed(snapshot="v1", split="other/val")
    with pytest.raises(FeedError, match="has nothing there"):
        fed(snapshot="v1", split="test")


def test_provenance_names_the_snapshot(ingested: str, conn: psycopg.Connection) -> None:
    """run_provenance gives the digest of the snapshot that a run was fed; of a live stream none."""
    conn.execute(SNAPSHOT, {"name": "v1", "definition": "{}"})
    fed(snapshot="v1", run="frozen")
    fed(run="live")
    found = dict(conn.execute("SELECT run, snapshot_sha256 FROM run_provenance").fetchall())
    [(digest,)] = conn.execute("SELECT encode(sha256, 'hex') FROM snapshot").fetchall()
    assert found == {"frozen": digest, "live": None}


CONTRADICTING: list[tuple[dict[str, object], str]] = [
    ({"snapshot": "v1", "where": "true"}, "leave where= out"),
    ({"snapshot": "v1", "include_flagged": True}, "leave include_flagged= out"),
    ({"snapshot": "v1", "origins": ["interpolated"]}, "leave origins= out"),
    ({"snapshot": "v2"}, "there is none of this name; there are v1"),
    ({"snapshot": "v1", "structures": ["outer"]}, "snapshot 'v1' holds inner"),
    ({"origins": ["drawn"]}, "must be different ones of"),
    ({"split": "a/b/c"}, "is PART, SPLIT/PART or"),
]


def test_what_contradicts_itself(ingested: str, conn: psycopg.Connection) -> None:
    """A snapshot with what would choose anew, one that is not there, origins and sides that are none: refused in one line."""
    conn.execute(SNAPSHOT, {"name": "v1", "definition": "{}"})
    for how, said in CONTRADICTING:
        with pytest.raises(FeedError, match=said) as refused:
            fed(**how)
        assert "\n" not in str(refused.value)


def derive(conn: psycopg.Connection, origin: str) -> int:
    """Give an image without inner contour a label that was derived from two drawn ones of its patient; returns the image's id."""
    row = conn.execute(
        """
        WITH parents AS (
            SELECT min(annotation_id) AS first, max(annotation_id) AS second, patient FROM sample WHERE structure = 'inner' GROUP BY patient
            ORDER BY patient LIMIT 1
        ), target AS (
            SELECT i.sample_id, i.rows, i.columns, p.* FROM parents p JOIN image_all i USING (patient)
            WHERE i.sample_id NOT IN (SELECT image_id FROM pairing) ORDER BY 1 LIMIT 1
        ), drawn AS (
            INSERT INTO annotation (file_id, source_key, reader_id, structure_id, kind, origin, rows, columns, box, bits, content_hash,
                                    ingest_run_id)
            SELECT a.file_id, 'derived', a.reader_id, a.structure_id, 'segment', %s, t.rows, t.columns, ARRAY[0, 0, 1, 8], '\\xff',
                   sha256('d'), a.ingest_run_id FROM target t JOIN annotation a ON a.id = t.first RETURNING id
        ), paired AS (
            INSERT INTO pairing (annotation_id, image_id, method, rule, score, state, actor)
            SELECT d.id, t.sample_id, 'interpolate', 'between', 1, 'accepted', 'me' FROM drawn d, target t RETURNING id
        ), masked AS (
            INSERT INTO mask (pairing_id, rows, columns, box_rows, box_columns, bits)
            SELECT p.id, t.rows, t.columns, 1, 8, '\\xff' FROM paired p, target t
        ), derived AS (
            INSERT INTO derivation (annotation_id, method, along, first_id, second_id, fraction, gap, program_version, actor)
            SELECT d.id, 'shape', 'slices', t.first, t.second, 0.5, 10, '0', 'me' FROM drawn d, target t
        ) SELECT sample_id FROM target
        """,
        [origin],
    ).fetchone()
    assert row is not None
    return int(row[0])


@pytest.mark.parametrize("origin", ["interpolated", "proposed"])
def test_a_derived_label_is_fed_only_when_asked_for(ingested: str, conn: psycopg.Connection, origin: str) -> None:
    """By default only what somebody drew is fed; with the origin named, the derived label too, and its mask is the one that was made."""
    drawn = samples(conn, "SYN0001", "SYN0002", "SYN0003")
    image = derive(conn, origin)
    assert fed() == drawn
    with Feed(structures=["inner"], origins=["contour", origin]) as feed:
        masks = {
            sample: int(mask.sum()) for batch in feed.epoch() for sample, mask in zip(batch.sample_ids.tolist(), batch.masks, strict=True)
        }
    assert sorted(masks) == sorted([*drawn, image]) and masks[image] == 8
    assert fed(origins=[origin]) == [image]


def test_of_two_derived_labels_the_one_that_is_asked_for(ingested: str, conn: psycopg.Connection) -> None:
    """Where an image has an interpolated and a proposed label, each is fed where its origin is asked for, whichever came first."""
    image = derive(conn, "interpolated")
    conn.execute(
        """
        WITH drawn AS (
            INSERT INTO annotation (file_id, source_key, reader_id, structure_id, kind, origin, rows, columns, box, bits, content_hash,
                                    ingest_run_id)
            SELECT file_id, 'other', reader_id, structure_id, kind, 'proposed', rows, columns, ARRAY[0, 0, 1, 8], '\\xf0', sha256('p'),
                   ingest_run_id FROM annotation WHERE source_key = 'derived' RETURNING id, rows, columns
        ), paired AS (
            INSERT INTO pairing (annotation_id, image_id, method, rule, score, state, actor)
            SELECT id, %s, 'threshold', 'inside', 0.5, 'accepted', 'me' FROM drawn RETURNING id
        )
        INSERT INTO mask (pairing_id, rows, columns, box_rows, box_columns, bits)
        SELECT p.id, d.rows, d.columns, 1, 8, '\\xf0' FROM paired p, drawn d
        """,
        [image],
    )
    for origin, pixels in (("interpolated", 8), ("proposed", 4)):
        with Feed(structures=["inner"], origins=["contour", origin]) as feed:
            found = {
                sample: int(mask.sum())
                for batch in feed.epoch()
                for sample, mask in zip(batch.sample_ids.tolist(), batch.masks, strict=True)
            }
        assert found[image] == pixels


def test_a_derived_label_falls_with_its_parents(ingested: str, conn: psycopg.Connection) -> None:
    """When a parent is rejected the derived label is rejected by the database itself, and when it is deleted the label goes with it."""
    image = derive(conn, "interpolated")
    [(parent, derived)] = conn.execute("SELECT first_id, annotation_id FROM derivation").fetchall()
    conn.execute("INSERT INTO flag (rule, severity, detail, annotation_id, raised_by) VALUES ('X', 'error', 'x', %s, 'me')", [parent])
    assert image not in fed(origins=["contour", "interpolated"])  # an error on the parent is one on what was made from it
    conn.execute("DELETE FROM flag")
    assert image in fed(origins=["contour", "interpolated"])
    conn.execute("UPDATE pairing SET state = 'rejected', actor = 'me' WHERE annotation_id = %s", [parent])
    assert conn.execute("SELECT state FROM pairing WHERE annotation_id = %s", [derived]).fetchall() == [("rejected",)]
    assert image not in fed(origins=["contour", "interpolated"])
    conn.execute("DELETE FROM pairing WHERE annotation_id = %s", [parent])
    conn.execute("DELETE FROM annotation WHERE id = %s", [parent])
    assert conn.execute("SELECT count(*) FROM annotation WHERE id = %s", [derived]).fetchone() == (0,)


def test_a_derived_label_falls_with_a_newer_version(ingested: str, conn: psycopg.Connection) -> None:
    """A parent that is not current any more rejects it too."""
    derive(conn, "interpolated")
    conn.execute("UPDATE annotation SET current = false WHERE id = (SELECT second_id FROM derivation)")
    [(state,)] = conn.execute("SELECT p.state FROM pairing p JOIN derivation USING (annotation_id)").fetchall()
    assert state == "rejected"


def test_named_streams_keep_their_side(ingested: str, conn: psycopg.Connection, loaderd: Run) -> None:
    """A stream is kept with its split's name; the part alone is the same to a Feed as long as there is one split; another one is not."""
    make_split(conn, "mri", {"SYN0001": "val", "SYN0002": "train"})
    made = loaderd("stream", "create", "s", "--structure", "inner", "--split", "train", "--origin", "contour")
    assert made.returncode == 0, made.stderr
    shown = loaderd("stream", "show", "s").stdout
    assert 'split = "mri/train"' in shown and 'origins = ["contour"]' in shown
    assert fed("s", split="train", seed=0) == samples(conn, "SYN0002")
    with pytest.raises(FeedError, match='split: stored "mri/train", given "mri/val"'):
        fed("s", split="val", seed=0)


def test_a_stream_from_toml(ingested: str, conn: psycopg.Connection, loaderd: Run, tmp_path: Path) -> None:
    """What `stream show` prints of a stream on a snapshot makes the same stream again."""
    conn.execute(SNAPSHOT, {"name": "v1", "definition": "{}"})
    assert loaderd("stream", "create", "a", "--structure", "inner", "--snapshot", "v1").returncode == 0
    (tmp_path / "a.toml").write_text(loaderd("stream", "show", "a").stdout)
    assert loaderd("stream", "create", "b", "-f", tmp_path / "a.toml").returncode == 0
    assert conn.execute("SELECT count(DISTINCT digest) FROM stream").fetchone() == (1,)


def test_digests_of_older_streams_stay() -> None:
    """A definition that names none of what this version brought has the digest that it had before: its runs can go on."""
    digest = Definition(structures=("inner",), seed=7).digest().hex()
    assert digest == "e19bf84d072117fbb3eacba23cf39d7c1f522689d178db25279b963240b85635"
    assert Definition(structures=("inner",), seed=7, origins=("segment", "label", "contour")).digest().hex() == digest
    with pytest.raises(UsageError):
        Definition(origins=())
