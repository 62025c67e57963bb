"""A stream of composed digits: pixels, digits, boxes and members agree, and follow from seed, epoch and sample."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import struct
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest

from catalog import database, ingest
from loaderd import Feed, FeedError, attach
from loaderd.workers import IN_FLIGHT
from tests.processes import kill, serving, wait_until, workers

COUNT, ROWS, COLUMNS = 60, 6, 5
OPTIONS: dict[str, Any] = {"length": (2, 4), "spacing": (0, 3)}


@pytest.fixture
def pixels(database_url: str, tmp_path: Path) -> np.ndarray[Any, Any]:
    """A catalog of 60 digits of 6×5; returns their pixels by frame, and frame % 10 is the digit."""
    found = np.random.default_rng(0).integers(1, 256, (COUNT, ROWS, COLUMNS), np.uint8)
    (tmp_path / "t-images-idx3-ubyte").write_bytes(struct.pack(">HBB3I", 0, 8, 3, *found.shape) + found.tobytes())
    (tmp_path / "t-labels-idx1-ubyte").write_bytes(struct.pack(">HBBI", 0, 8, 1, COUNT) + bytes(at % 10 for at in range(COUNT)))
    with database.open_database(database_url) as db:
        ingest.ingest(db, tmp_path, jobs=1)
    return found


def epochs(count: int, **how: Any) -> list[dict[int, tuple[Any, ...]]]:
    """Return sample id → (image, digits, boxes, members) of some epochs."""
    with Feed(sequences=OPTIONS, **{"seed": 4, **how}) as feed:
        found = []
        for _ in range(count):
            epoch: dict[int, tuple[Any, ...]] = {}
            for batch in feed.epoch():
                images, labels = batch
                assert labels is not None and batch.boxes is not None and batch.members is not None
                for at, sample in enumerate(batch.sample_ids.tolist()):
                    epoch[sample] = images[at].copy(), labels[at].copy(), batch.boxes[at].copy(), batch.members[at].copy()
            found.append(epoch)
    return found


def test_what_is_fed_is_what_is_said(pixels: np.ndarray[Any, Any], conn: psycopg.Connection) -> None:
    """Each sample comes once an epoch as one digit of its sequence; all else is ground, and each box holds the pixels of its member."""
    frames = dict(conn.execute("SELECT id, frame FROM image").fetchall())
    first, second = epochs(2)
    assert sorted(first) == sorted(second) == sorted(frames)
    lengths = set()
    for epoch in (first, second):
        for sample, (image, digits, boxes, members) in epoch.items():
            assert image.shape == (ROWS, 4 * COLUMNS + 5 * 3) and image.dtype == np.float32
            length = int(np.count_nonzero(digits >= 0))
            lengths.add(length)
            assert sample in members[:length].tolist()
            ground = np.ones(image.shape, bool)
            for digit, box, member in zip(digits[:length], boxes[:length].tolist(), members[:length].tolist(), strict=True):
                assert frames[member] % 10 == digit
                top, left, height, width = box
                assert (top, height, width) == (0, ROWS, COLUMNS)
                assert np.array_equal(image[:, left : left + width], (255 - pixels[frames[member]]) / np.float32(255))
                assert ground[:, left : left + width].all()
                ground[:, left : left + width] = False
            assert (image[ground] == 1).all()
            assert (digits[length:] == -1).all() and (boxes[length:] == -1).all() and (members[length:] == -1).all()
    assert lengths == {2, 3, 4}
    assert sum(first[sample][3].tolist() != second[sample][3].tolist() for sample in first) > COUNT // 2


def test_a_sequence_follows_from_seed_epoch_and_sample(pixels: np.ndarray[Any, Any]) -> None:
    """Another batch size and order, and a worker that dies, change no pixel; another seed does."""

    def same(one: dict[int, tuple[Any, ...]], other: dict[int, tuple[Any, ...]]) -> bool:
        return all(np.array_equal(a, b) for sample in one for a, b in zip(one[sample], other[sample], strict=True))

    [first] = epochs(1)
    with Feed(sequences=OPTIONS, seed=4, batch_size=5, shuffle=False, channels="first") as feed:
        for batch in feed.epoch():
            if batch.index == 2:
                os.kill(workers()[0], signal.SIGKILL)
            assert batch.images.shape[1:] == (1, *first[int(batch.sample_ids[0])][0].shape)
            for sample, image in zip(batch.sample_ids.tolist(), batch.images, strict=True):
                assert np.array_equal(image[0], first[sample][0])
    [other] = epochs(1, seed=5)
    assert not same(first, other)


def test_what_is_revoked_is_in_no_sequence(pixels: np.ndarray[Any, Any], conn: psycopg.Connection) -> None:
    """An image that is revoked while it is fed comes neither as a sample nor as a digit beside another one from then on, also in what
    was composed before."""
    [(gone,)] = conn.execute("SELECT id FROM image WHERE frame = 7").fetchall()
    [_, second] = epochs(2)
    assert any(gone in members for sample, (*_, members) in second.items() if sample != gone)
    with Feed(sequences=OPTIONS, seed=4, batch_size=4, slots=20) as feed:
        fed = feed.epochs(2)
        for _ in range(len(feed)):
            next(fed)
        # The second epoch is composed, and nothing of it is announced until it is asked for.
        assert wait_until(lambda: (attach.status() or {})["streams"][0]["decoded"] == 2 * COUNT)
        conn.execute(
            "INSERT INTO flag (rule, severity, detail, image_id, raised_by, revokes) VALUES ('CONSENT', 'error', 'x', %s, 'test', true)",
            [gone],
        )
        assert wait_until(lambda: (attach.status() or {})["revoked"] == 1)  # the daemon has heard of it
        for batch in itertools.chain(fed, feed.epochs(3)):
            assert batch.members is not None and gone not in batch.members and gone not in batch.sample_ids


def test_a_revoked_digit_leaves_what_is_composed_already(pixels: np.ndarray[Any, Any], conn: psycopg.Connection) -> None:
    """A sequence that was composed but not announced when one of its other digits was revoked is composed again, also if as many images
    are revoked as before, since another one's revocation was taken back."""
    [first] = epochs(1)
    shown = Counter(member for sample, (*_, members) in first.items() for member in {*members.tolist()} - {sample, -1})
    (gone, times), (other, _) = shown.most_common(2)
    assert times >= 5
    revoke = "INSERT INTO flag (rule, severity, detail, image_id, raised_by, revokes) VALUES ('CONSENT', 'error', 'x', %s, 'test', true)"
    log = Path(os.environ["CATALOG_HOME"]).with_name("serve.log")

    def stream(what: str) -> int:
        return int((attach.status() or {})["streams"][0][what])

    with serving(2), Feed(sequences=OPTIONS, seed=4, batch_size=4, slots=15) as feed, ThreadPoolExecutor() as pool:
        conn.execute(revoke, [other])
        assert wait_until(lambda: log.read_bytes().count(b"event=revoked") == 1)
        one, two = workers()
        kill([one, two], signal.SIGSTOP)
        fed = pool.submit(lambda: [batch.members.copy() for batch in feed.epoch() if batch.members is not None])
        assert wait_until(lambda: stream("decoding") == 15)
        kill([one], signal.SIGCONT)  # it composes its share and what waits; the other one has the first batch or the second
        assert wait_until(lambda: stream("decoding") == IN_FLIGHT)
        announced = stream("announced")
        assert announced <= 1
        with conn.transaction():
            conn.execute("DELETE FROM flag WHERE image_id = %s", [other])
            conn.execute(revoke, [gone])
        assert wait_until(lambda: log.read_bytes().count(b"event=revoked") == 2)
        kill([two], signal.SIGCONT)
        assert not any(gone in members for members in fed.result()[announced:])


def test_what_cannot_be_composed_is_refused(pixels: np.ndarray[Any, Any], conn: psycopg.Connection) -> None:
    """A width that no sequence has, and samples that are no digits, are errors when the feed is opened, in one line."""
    for how, says in (
        ({"sequences": {"length": 3, "spacing": (0, 1), "width": 400}}, "400"),
        ({"sequences": {"length": 0}}, "length"),
    ):
        with pytest.raises(FeedError, match=says) as refused:
            Feed(**how)  # type: ignore[arg-type]
        assert "\n" not in str(refused.value)
    conn.execute("UPDATE annotation SET label = 'cat' WHERE label = '3'")
    with pytest.raises(FeedError, match="6 of 60 samples have no digit"):
        Feed(sequences=OPTIONS)


def test_labels_of_two_names_are_not_mixed(pixels: np.ndarray[Any, Any], conn: psycopg.Connection) -> None:
    """Where labels of two names are numbers from 0 to 9, a feed's `labels=` says whose digits are fed and drawn, and of none other; without
    it those called `label` are, or, where none is called so, one line names both."""

    def fed(**how: Any) -> tuple[int, set[int]]:
        with Feed(sequences=OPTIONS, batch_size=COUNT, **how) as feed:
            [batch] = feed
            assert batch.labels is not None
            return feed.num_samples, set(batch.labels.ravel().tolist()) - {-1}

    conn.execute(
        "WITH s AS (INSERT INTO structure (name) VALUES ('bi''rads') RETURNING id) "
        "UPDATE annotation SET structure_id = s.id FROM s WHERE label IN ('1', '2')"
    )
    others = (COUNT * 8 // 10, {0, 3, 4, 5, 6, 7, 8, 9})
    assert fed() == others == fed(labels="label")
    assert fed(labels="bi'rads") == (COUNT // 5, {1, 2})
    conn.execute("UPDATE structure SET name = 'digit' WHERE name = 'label'")
    with pytest.raises(FeedError, match=r"there are bi'rads, digit$") as refused:
        Feed(sequences=OPTIONS)
    assert "\n" not in str(refused.value)
    assert fed(labels="digit") == others
    assert fed(labels="bi'rads", where="label = '2'") == (COUNT // 10, {2})


def held(daemon: int) -> int:
    """Return how many descriptors of digits a daemon has."""
    found = 0
    for entry in Path(f"/proc/{daemon}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed since
            found += "loaderd-pool" in str(entry.readlink())
    return found


def test_a_feed_that_is_refused_leaves_no_memory_behind(pixels: np.ndarray[Any, Any]) -> None:
    """The digits that were looked up for a stream that cannot be fed are given back: for want of room, or as its run was fed before."""
    with Feed(limit=1):
        status = attach.status()
        assert status is not None
        daemon = status["pid"]
        with pytest.raises(FeedError, match="there is no room for it"):
            Feed(sequences={"length": (2, 100)}, batch_size=60_000, slots=128)
        state = {"stream": "x", "run": "never", "epoch": 0, "step": 0, "attempt": 1}
        with pytest.raises(FeedError, match="never fed"):
            Feed(sequences=OPTIONS, run="never", resume=state)
        assert wait_until(lambda: held(daemon) == 0)
        with Feed(sequences=OPTIONS):
            assert held(daemon) > 0
        assert wait_until(lambda: held(daemon) == 0)


def test_a_trainer_that_dies_while_its_digits_are_looked_up_leaves_none_behind(
    pixels: np.ndarray[Any, Any], database_url: str, conn: psycopg.Connection
) -> None:
    """They come when nobody is there any more to be fed with them, and are given back all the same."""

    def streams() -> int:
        found = attach.status()
        assert found is not None
        return len(found["streams"])

    with Feed(limit=1):
        status = attach.status()
        assert status is not None
        with psycopg.connect(database_url) as locking:
            locking.execute("LOCK TABLE image IN ACCESS EXCLUSIVE MODE")
            trainer = subprocess.Popen([sys.executable, "-c", f"import loaderd; loaderd.Feed(sequences={OPTIONS!r})"])
            assert wait_until(lambda: streams() == 2)
            trainer.kill()
            trainer.wait()
            assert wait_until(lambda: streams() == 1)
        # Its row comes behind the digits.
        assert wait_until(lambda: conn.execute("SELECT count(*) FROM consumer WHERE left_at IS NOT NULL").fetchone() == (1,))
        assert wait_until(lambda: held(status["pid"]) == 0)
