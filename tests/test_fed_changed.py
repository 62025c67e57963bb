"""What a feed gets beyond images and masks as they are: labels, a reader's own annotations, channels, sizes, neighbours, transforms."""

from __future__ import annotations

import os
import signal
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
from typer.testing import CliRunner

from catalog import database, dicom, ingest
from catalog.errors import UsageError
from loaderd import Feed, FeedError, named
from loaderd.cli import app
from loaderd.definitions import Definition
from tests.processes import serving, workers


def batches(**how: Any) -> list[tuple[np.ndarray[Any, Any], ...]]:
    """Return copies of what an epoch's batches unpack to."""
    with Feed(seed=1, **how) as feed:
        return [tuple(part.copy() for part in batch) for batch in feed.epoch()]


def whole(**how: Any) -> dict[str, np.ndarray[Any, Any]]:
    """Return an epoch in one batch: every array of it, copied."""
    with Feed(seed=1, batch_size=4096, slots=2, **how) as feed:
        [batch] = feed.epoch()
        found = {name: getattr(batch, name) for name in ("images", "masks", "labels", "sample_ids", "sample_keys", "present")}
        return {name: None if array is None else array.copy() for name, array in found.items()}


@pytest.fixture
def ingested(ingested: str) -> Iterator[str]:
    """The same, with one daemon for all feeds of a test."""
    with serving():
        yield ingested


@pytest.fixture
def digits(database_url: str, tmp_path: Path) -> np.ndarray[Any, Any]:
    """A catalog of 50 images of 9×7 with the labels 0 to 9; returns the pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (50, 9, 7), np.uint8)
    (tmp_path / "t-images-idx3-ubyte").write_bytes(struct.pack(">HBB3I", 0, 8, 3, 50, 9, 7) + pixels.tobytes())
    (tmp_path / "t-labels-idx1-ubyte").write_bytes(struct.pack(">HBBI", 0, 8, 1, 50) + bytes(at % 10 for at in range(50)))
    with database.open_database(database_url) as db:
        ingest.ingest(db, tmp_path, jobs=1)
    return pixels


def test_labels_that_are_numbers(digits: np.ndarray[Any, Any], conn: psycopg.Connection) -> None:
    """A label that is a number is fed as that number, beside its own image; a batch unpacks to images and labels."""
    frames = dict(conn.execute("SELECT id, frame FROM image").fetchall())
    with Feed(labels="label", batch_size=16, seed=3) as feed:
        assert feed.classes is None
        seen = 0
        for batch in feed.epoch():
            images, labels = batch
            at = [frames[sample] for sample in batch.sample_ids.tolist()]
            assert labels.dtype == np.int64 and labels.tolist() == [one % 10 for one in at]
            assert np.array_equal(images, digits[at])
            seen += len(batch)
    assert seen == 50


def test_labels_that_are_words(digits: np.ndarray[Any, Any], conn: psycopg.Connection) -> None:
    """Other labels are fed as their places among the sorted words, which the stream keeps: a word that comes later ends the feed."""
    conn.execute("UPDATE annotation SET label = (ARRAY['pig', 'cat', 'ape'])[label::integer % 3 + 1]")
    words = dict(conn.execute("SELECT p.image_id, a.label FROM annotation a JOIN pairing p ON p.annotation_id = a.id").fetchall())
    with Feed(labels="label", batch_size=50, seed=1) as feed:
        assert feed.classes == ("ape", "cat", "pig")
        [batch] = feed.epoch()
        assert [feed.classes[label] for label in batch.labels] == [words[sample] for sample in batch.sample_ids.tolist()]
        conn.execute("UPDATE annotation SET label = 'yak' WHERE label = 'cat'")
        with pytest.raises(FeedError, match="label is none of the classes"):
            list(feed.epoch())
    assert conn.execute("SELECT constants FROM stream").fetchall() == [({"classes": ["ape", "cat", "pig"]},)]
    assert conn.execute("SELECT count(*) FROM flag WHERE rule = 'FEED-UNREADABLE'").fetchone() == (0,)


def test_structures_and_labels(ingested: str, conn: psycopg.Connection) -> None:
    """With structures and labels a sample has both, and a batch unpacks to images, masks and labels."""
    conn.execute(
        "WITH s AS (INSERT INTO structure (name) VALUES ('view') RETURNING id), "
        "a AS (INSERT INTO annotation (file_id, source_key, reader_id, structure_id, kind, origin, label, content_hash, ingest_run_id) "
        "  SELECT o.file_id, 'v' || o.id, o.reader_id, s.id, 'label', 'label', (o.id % 3)::text, o.content_hash, o.ingest_run_id "
        "  FROM s, annotation o JOIN structure t ON t.id = o.structure_id AND t.name = 'inner' WHERE o.id % 4 > 0 "
        "  RETURNING id, source_key) "
        "INSERT INTO pairing (annotation_id, image_id, method, rule, score, state, actor) "
        "SELECT a.id, p.image_id, p.method, p.rule, 1, 'accepted', 'test' FROM a JOIN pairing p ON 'v' || p.annotation_id = a.source_key"
    )
    wanted = dict(
        conn.execute(
            "SELECT s.sample_id, v.label::integer FROM sample s JOIN sample v ON v.sample_id = s.sample_id AND v.structure = 'view' "
            "WHERE s.structure = 'inner'"
        ).fetchall()
    )
    assert len(set(wanted.values())) == 3
    found = whole(structures=["inner"], labels="view")
    assert dict(zip(found["sample_ids"].tolist(), found["labels"].tolist(), strict=True)) == wanted
    plain = whole(structures=["inner"])
    for sample, mask in zip(found["sample_ids"], found["masks"], strict=True):
        assert np.array_equal(mask, plain["masks"][plain["sample_ids"] == sample][0]) and mask.any()
    assert {len(batch) for batch in batches(structures=["inner"], labels="view")} == {3}


def test_a_readers_own(ingested: str, conn: psycopg.Connection) -> None:
    """readers= feeds what these readers drew and nobody else's; without it the preferred reader's is fed."""
    second = (
        "WITH r AS (INSERT INTO reader (name, preference) VALUES ('second', 900) RETURNING id) "
        "UPDATE annotation SET reader_id = r.id FROM r WHERE annotation.id IN (SELECT annotation_id FROM sample "
        "WHERE structure = 'inner' AND patient = 'SYN0001')"
    )
    conn.execute(second)
    drawn = dict(conn.execute("SELECT reader, array_agg(sample_id ORDER BY 1) FROM sample WHERE structure = 'inner' GROUP BY 1").fetchall())
    assert len(drawn) == 2
    for reader, samples in drawn.items():
        assert sorted(whole(structures=["inner"], readers=[reader])["sample_ids"].tolist()) == sorted(samples)
    everybody = whole(structures=["inner"], readers=list(drawn))["sample_ids"].tolist()
    assert sorted(everybody) == sorted(one for samples in drawn.values() for one in samples)
    with pytest.raises(FeedError, match=r"no sample fits .*readers=\('nobody',\)"):
        Feed(structures=["inner"], readers=["nobody"])


def test_channels(ingested: str) -> None:
    """An axis for channels is first or last, and the pixels are the same."""
    plain = whole(structures=["inner"])["images"]
    assert np.array_equal(whole(structures=["inner"], channels="first")["images"], plain[:, np.newaxis])
    assert np.array_equal(whole(structures=["inner"], channels="last")["images"], plain[..., np.newaxis])


def test_images_of_any_size_share_a_batch(digits: np.ndarray[Any, Any], tmp_path: Path) -> None:
    """Images of two sizes are refused without size=, and fed with it; each as if it were alone."""
    (tmp_path / "u-images-idx3-ubyte").write_bytes(struct.pack(">HBB3I", 0, 8, 3, 4, 5, 6) + bytes(range(120)))
    with database.open_database() as db:
        ingest.ingest(db, tmp_path, jobs=1)
    with pytest.raises(FeedError, match=r"2 shapes .*size="):
        Feed()
    both = whole(size=(8, 8), fit="pad")
    alone = whole(size=(8, 8), fit="pad", where="rows = 5")
    assert both["images"].shape == (54, 8, 8) and alone["images"].shape == (4, 8, 8)
    for sample, image in zip(alone["sample_ids"], alone["images"], strict=True):
        assert np.array_equal(both["images"][both["sample_ids"] == sample][0], image)
        assert np.array_equal(image[1:6, 1:7], np.arange(image[1, 1], image[1, 1] + 30).reshape(5, 6))


def test_images_and_masks_come_to_one_size(ingested: str) -> None:
    """With fit="crop" what is fed is the middle of image and mask as they are fed without it."""
    plain, cut = whole(structures=["inner"]), whole(structures=["inner"], size=(32, 40), fit="crop")
    assert plain["images"].shape[1:] == (64, 64)
    assert np.array_equal(cut["images"], plain["images"][:, 16:48, 12:52]) and np.array_equal(cut["masks"], plain["masks"][:, 16:48, 12:52])


def test_neighbours_are_channels(ingested: str, conn: psycopg.Connection) -> None:
    """context=1 feeds the slices before and after at the same phase as channels; at the ends the nearest one, or zeros, as asked."""
    rows = conn.execute(
        "SELECT sample_id, series_instance_uid, phase, position, path FROM image_all ORDER BY series_instance_uid, phase, position"
    ).fetchall()
    lines: dict[Any, list[Any]] = {}
    for sample, series, phase, _, path in rows:
        lines.setdefault((series, phase), []).append((sample, dicom.decode_frame(Path(path), 0)))
    around = {sample: (line, at) for line in lines.values() for at, (sample, _) in enumerate(line)}
    for ends in ("repeat", "zero"):
        found = whole(context=1, channels="last", context_ends=ends)
        for sample, image in zip(found["sample_ids"].tolist(), found["images"], strict=True):
            line, at = around[sample]
            nothing = np.zeros_like(line[at][1]) if ends == "zero" else line[at][1]
            wanted = [line[at - 1][1] if at else nothing, line[at][1], line[at + 1][1] if at + 1 < len(line) else nothing]
            assert np.array_equal(image, np.stack(wanted, axis=-1))
        assert any(around[sample][1] == 0 for sample in found["sample_ids"].tolist())  # contours are not drawn at the ends


CHANGES = [{"name": "rotate", "limit": 20}, {"name": "noise"}, {"name": "zscore"}]


def test_the_same_sample_gives_the_same_pixels(ingested: str) -> None:
    """Of (seed, epoch, sample) the same pixels come with any batch size and order, and after a worker was killed; other epochs differ."""

    def images(**how: Any) -> list[dict[bytes, bytes]]:
        found = []
        with Feed(structures=["inner"], transforms=CHANGES, seed=5, **how) as feed:
            for _ in range(2):
                epoch = {}
                for batch in feed.epoch():
                    if how.get("batch_size") == 2 and batch.index == 1:
                        os.kill(workers()[0], signal.SIGKILL)
                    epoch |= {key.tobytes(): image.tobytes() for key, image in zip(batch.sample_keys, batch.images, strict=True)}
                found.append(epoch)
        return found

    first, second = images(), images(batch_size=2, shuffle=False)
    assert first == second and len(first[0]) > 4
    assert all(first[0][key] != first[1][key] for key in first[0])


def test_statistics_stay(ingested: str, conn: psycopg.Connection) -> None:
    """What a stream was normalised with stays as it was when the stream was first asked for, and an auditor sees it."""
    how: Any = {"structures": ["inner"], "transforms": [{"name": "zscore", "over": "dataset"}]}
    first = whole(**how)
    assert abs(first["images"].mean()) < 1e-3 and abs(first["images"].std() - 1) < 1e-3
    sample = int(first["sample_ids"][0])
    conn.execute("UPDATE pairing SET state = 'rejected' WHERE image_id = %s", [sample])
    again = whole(**how, run="again")
    assert sample not in again["sample_ids"]
    for at, one in enumerate(again["sample_ids"]):
        assert np.array_equal(again["images"][at], first["images"][first["sample_ids"] == one][0])
    [(constants,)] = conn.execute("SELECT constants FROM run_provenance WHERE run = 'again'").fetchall()
    assert constants["statistics"]["std"] > 0


def test_a_fault_of_the_stream_flags_nothing(ingested: str, conn: psycopg.Connection) -> None:
    """A user's function that is not there ends its feed in one line, flags no file, and leaves workers and other feeds as they are."""
    with Feed(structures=["inner"], seed=1) as other:
        before = workers()
        with (
            Feed(structures=["inner"], transforms=[{"name": "user", "function": "nowhere_at_all:change"}]) as feed,
            pytest.raises(FeedError, match="nowhere_at_all") as refused,
        ):
            list(feed.epoch())
        assert "\n" not in str(refused.value)
        assert sum(len(batch) for batch in other.epoch()) == other.num_samples and workers() == before
    assert conn.execute("SELECT count(*) FROM flag WHERE raised_by = 'loaderd'").fetchone() == (0,)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"labels": ""}, "labels='': must be"),
        ({"readers": []}, "readers=.*: must name somebody"),
        ({"channels": "middle"}, "channels='middle': must be one of 'none', 'first', 'last'"),
        ({"fit": "crop"}, "fit='crop': says how images come to a size"),
        ({"size": [0, 3]}, r"size=\[0, 3\]: must be"),
        ({"context": 1}, "context=1: neighbours are channels"),
        ({"context": -1, "channels": "first"}, "context=-1: must be"),
        ({"transforms": [{"name": "rotate", "limit": "much"}]}, r"transforms\[0\]: rotate: limit='much'"),
        ({"sequences": {"length": [3, 8]}, "structures": ["inner"]}, "structures=.*sequences are composed"),
        ({"snapshot": "a", "readers": ["b"]}, "readers=.*: a snapshot's samples"),
    ],
)
def test_definitions_that_contradict_themselves(given: dict[str, Any], says: str) -> None:
    """Each wrong argument is refused with its name, before a database is asked."""
    with pytest.raises(UsageError, match=says):
        Definition.from_json(given)


def test_older_definitions_keep_their_digest() -> None:
    """A definition that says nothing new has the JSON, and so the digest, that it had before there was anything new to say."""
    assert set(Definition(structures=("inner",)).to_json()) == {
        "structures", "where", "limit", "include_flagged", "require", "batch_size", "seed", "shuffle", "tail", "dtype", "on_error",
    }  # fmt: skip
    assert Definition(size=(3, 4)).to_json()["fit"] == "resize"
    again = Definition.from_json(Definition(labels="label", size=(3, 4), transforms=({"name": "flip", "p": 0.5},)).to_json())
    assert again == Definition(labels="label", size=(3, 4), transforms=({"name": "flip", "p": 0.5},))


@pytest.mark.parametrize(
    "definition",
    [
        Definition(transforms=({"name": "rotate", "limit": [-5.0, 20.0], "p": 0.25}, {"name": "zscore", "over": "dataset"})),
        Definition(labels="label", readers=("b", "a"), size=(3, 4), fit="pad", channels="last", context=2, context_ends="zero"),
        Definition(sequences={"length": [3, 8], "width": 390, "type": "fixed"}),
    ],
)
def test_a_definition_as_toml(definition: Definition, tmp_path: Path) -> None:
    """What `stream show` prints is TOML that gives the same definition again, tables in lists included."""
    path = tmp_path / "stream.toml"
    path.write_text(named.to_toml(definition))
    assert named.from_toml(path) == definition and named.from_toml(path).digest() == definition.digest()


def test_a_stream_by_options(ingested: str, conn: psycopg.Connection) -> None:
    """`stream create` takes what Feed takes, as options; the Feed of that name is fed so."""
    options = [
        "--structure",
        "inner",
        "--size",
        "40x48",
        "--fit",
        "crop",
        "--channels",
        "first",
        "--context",
        "1",
        "--context-ends",
        "zero",
    ]
    done = CliRunner().invoke(app, ["stream", "create", "wide", *options])
    assert done.exit_code == 0, done.output
    with Feed("wide", size=(40, 48)) as feed:
        batch = next(feed.epoch())
        assert batch.images.shape[1:] == (3, 40, 48) and batch.masks is not None and batch.masks.shape[1:] == (40, 48)
    refused = CliRunner().invoke(app, ["stream", "create", "wide", "--size", "40"])
    assert isinstance(refused.exception, UsageError) and "--size 40: must be rows and columns" in str(refused.exception)
