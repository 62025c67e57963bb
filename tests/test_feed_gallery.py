"""`loaderd gallery`: what it shows is what trainers get, to the bit, and it leaves nothing behind."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
from PIL import Image

from catalog.canvas import colours_of
from catalog.database import open_database
from loaderd import Feed, gallery, named
from loaderd.definitions import Definition
from tests.conftest import Run

TABLES = ("run", "attempt", "consumer", "epoch", "epoch_order", "ledger", "flag")
CHANGED = Definition.from_json(
    {
        "structures": ["inner", "outer"], "require": "any", "seed": 5, "batch_size": 4, "context": 1, "channels": "last", "size": [40, 56],
        "fit": "crop", "transforms": [{"name": "rotate", "limit": 20.0}, {"name": "noise"}, {"name": "zscore", "over": "dataset"}],
    }
)  # fmt: skip


def make(url: str, name: str, definition: Definition) -> None:
    with open_database(url) as db, db.connect() as conn:
        named.create(conn, name, definition)


def written(conn: psycopg.Connection[Any]) -> list[Any]:
    """What feeding would have written, and the streams' constants."""
    counts = [conn.execute(f"SELECT count(*) FROM {table}").fetchone() for table in TABLES]
    return counts + conn.execute("SELECT constants FROM stream ORDER BY id").fetchall()


def test_it_shows_what_trainers_get(ingested: str, conn: psycopg.Connection[Any]) -> None:
    """Images, masks and order of samples of each epoch are a Feed's, bit for bit; the first column is the file's; nothing is written."""
    make(ingested, "train", CHANGED)
    before = written(conn)
    with open_database(ingested) as db:
        found = gallery.look(db, "train", samples=5, epochs=2)
    assert written(conn) == before and before[0] == (0,)
    fed: dict[tuple[int, int], tuple[Any, Any]] = {}
    with Feed("train") as feed:
        for batch in feed.epochs(2):
            for at, sample in enumerate(batch.sample_ids.tolist()):
                fed[batch.epoch, sample] = batch.images[at].copy(), batch.masks[at].copy()
    assert found.num_samples == len(fed) / 2 == 12
    for epoch, seen in enumerate(found.epochs):
        assert seen.sample_ids == found.epochs[0].sample_ids and len(set(seen.sample_ids)) == 5
        for sample, planes, masks in zip(seen.sample_ids, seen.images, seen.masks, strict=True):
            images, drawn = fed[epoch, sample]
            assert np.array_equal(np.moveaxis(planes, 0, -1), images) and np.array_equal(masks, drawn)
    assert not np.array_equal(found.epochs[0].images, found.epochs[1].images)
    with Feed(structures=["inner", "outer"], require="any", batch_size=12) as feed:
        [batch] = feed.epoch()
        for seen in found.plain:
            at = batch.sample_ids.tolist().index(seen.sample_ids[0])
            assert np.array_equal(seen.images[0, 0], batch.images[at]) and np.array_equal(seen.masks[0], batch.masks[at])


def test_the_picture(ingested: str) -> None:
    """A row a sample, a column an epoch beside the catalog's image; each with its outline."""
    make(ingested, "plain", Definition(structures=("inner",)))
    with open_database(ingested) as db:
        found = gallery.look(db, "plain", samples=2, epochs=3)
        sizes = {}
        for samples, epochs in ((2, 3), (2, 1), (1, 3)):
            some = gallery.look(db, "plain", samples=samples, epochs=epochs)
            sizes[samples, epochs] = Image.open(io.BytesIO(gallery.picture(some))).size
    assert sizes[2, 3][0] - sizes[2, 1][0] >= 200 and sizes[2, 3][1] - sizes[1, 3][1] > gallery.CELL
    colour = colours_of(["inner"])["inner"]
    shown = np.asarray(Image.open(io.BytesIO(gallery.picture(found))))
    drawn = (shown == colour).all(axis=2)
    for row in range(2):
        for column in range(4):
            top = 60 + row * (gallery.CELL + 54)
            left = gallery.GAP + column * (gallery.CELL + gallery.GAP)
            assert drawn[top : top + gallery.CELL, left : left + gallery.CELL].sum() > 30, (row, column)


def test_an_unreadable_file(ingested: str, conn: psycopg.Connection[Any]) -> None:
    """One sample that cannot be read is named in its place, and the others are shown."""
    make(ingested, "plain", Definition(structures=("inner",)))
    with open_database(ingested) as db:
        [whole] = gallery.look(db, "plain", samples=3, epochs=1).epochs
        conn.execute("UPDATE file SET size = size + 1 WHERE id = (SELECT file_id FROM location WHERE image_id = %s)", [whole.sample_ids[1]])
        conn.execute("UPDATE image SET pixel_hash = sha256('other') WHERE id = %s", [whole.sample_ids[1]])
        found = gallery.look(db, "plain", samples=3, epochs=1)
        assert gallery.picture(found).startswith(b"\x89PNG")
    [seen] = found.epochs
    assert seen.problems == {1: "changed"} and not seen.images[1].any()
    assert np.array_equal(seen.images[[0, 2]], whole.images[[0, 2]]) and seen.sample_ids == whole.sample_ids
    assert conn.execute("SELECT count(*) FROM flag").fetchone() == (0,)


def test_the_command(ingested: str, loaderd: Run, tmp_path: Path) -> None:
    """It writes a PNG and says of how many samples; no such stream, or another kind of file, is a usage error in one line."""
    make(ingested, "train", CHANGED)
    done = loaderd("gallery", "train", "-o", tmp_path / "seen.png", "--samples", "3", "--epochs", "2")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'seen.png'}: 3 samples of 12 in 2 epochs\n"), done.stderr
    assert (tmp_path / "seen.png").read_bytes().startswith(b"\x89PNG")
    for name, file, said in (("other", "x.png", "'other'"), ("train", "x.jpg", "-o takes a file that ends in .png")):
        failed = loaderd("gallery", name, "-o", tmp_path / file)
        assert failed.returncode == 2 and said in failed.stderr and failed.stderr.count("\n") == 1
