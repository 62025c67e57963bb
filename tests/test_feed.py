"""What a trainer gets from `loaderd.Feed`: the right samples, once each, bit for bit, from a real daemon in another process."""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest

from catalog import contours, database, dicom, ingest
from loaderd import Batch, Feed, FeedError, attach, batches
from tests.processes import daemons, kill, wait_until


def stored(conn: psycopg.Connection, structure: str) -> dict[int, tuple[str, np.ndarray]]:
    """Return sample_id → (path, mask) as the catalog has it."""
    rows = conn.execute(
        "SELECT s.sample_id, s.path, m.rows, m.columns, m.box_row, m.box_column, m.box_rows, m.box_columns, m.bits FROM sample s "
        "JOIN pairing p ON p.annotation_id = s.annotation_id AND p.image_id = s.sample_id JOIN mask m ON m.pairing_id = p.id "
        "WHERE s.structure = %s",
        [structure],
    )
    return {sample: (path, contours.unboxed(height, width, tuple(box), bits)) for sample, path, height, width, *box, bits in rows}  # type: ignore[arg-type]


def order(conn: psycopg.Connection, seed: int, epoch: int, structure: str = "inner") -> list[int]:
    """Return the order as SQL gives it to anybody who asks."""
    rows = conn.execute(
        "SELECT sample_id FROM sample WHERE structure = %s "
        "ORDER BY uuid_hash_extended(sample_key, hashint8extended(%s::bigint, %s::bigint)), sample_key",
        [structure, epoch, seed],
    )
    return [sample for (sample,) in rows]


def ids(feed: Feed, epochs: int = 1) -> list[list[int]]:
    """Return the sample ids of some epochs."""
    seen: dict[int, list[int]] = {}
    for batch in feed.epochs(epochs):
        seen.setdefault(batch.epoch, []).extend(batch.sample_ids.tolist())
    return list(seen.values())


def test_every_sample_once_in_sqls_order_bit_for_bit(ingested: str, conn: psycopg.Connection) -> None:
    """An epoch has each sample once, in SQL's order; images are pydicom's pixels and masks the stored ones; the next epoch differs."""
    truth = stored(conn, "inner")
    with Feed(structures=["inner"], batch_size=4, seed=7) as feed:
        assert feed.num_samples == len(truth)
        assert len(feed) == -(-len(truth) // 4)
        epochs: list[list[int]] = [[], []]
        for number, batch in enumerate(feed.epochs(2)):
            images, masks = batch
            assert images.dtype == np.float32 and images.shape[1:] == (64, 64)
            assert masks.dtype == np.bool_ and masks.shape == images.shape
            assert batch.valid.all() and batch.present.all() and batch.index == number % len(feed)
            epochs[batch.epoch].extend(batch.sample_ids.tolist())
            for sample, image, mask in zip(batch.sample_ids.tolist(), images, masks, strict=True):
                path, raster = truth[sample]
                assert np.array_equal(image, dicom.decode_frame(path, 0).astype(np.float32))
                assert np.array_equal(mask, raster)
    assert epochs == [order(conn, 7, 0), order(conn, 7, 1)]
    assert epochs[0] != epochs[1] and sorted(epochs[0]) == sorted(truth)


def test_seed_and_epoch_repeat_the_order(ingested: str) -> None:
    """Two feeds of the same seed see the same epochs; another seed sees others."""
    with (
        Feed(structures=["inner"], seed=3) as one,
        Feed(structures=["inner"], seed=3, batch_size=5) as same,
        Feed(structures=["inner"], seed=4) as other,
    ):
        first = ids(one, 2)
        assert ids(same, 2) == first
        assert ids(other, 2) != first


def test_tails(ingested: str, conn: psycopg.Connection) -> None:
    """The last two of 10 samples come as a short batch, not at all, or padded with zeros; the ledger has every position either way."""
    with contextlib.ExitStack() as stack:
        for tail, sizes in (("short", [4, 4, 2]), ("drop", [4, 4]), ("pad", [4, 4, 4])):
            feed = stack.enter_context(Feed(structures=["inner"], batch_size=4, limit=10, tail=tail, run=tail))  # type: ignore[arg-type]
            assert len(feed) == len(sizes)
            last: Batch | None = None
            seen = []
            for last in feed.epoch():
                seen.append(len(last))
            assert seen == sizes and last is not None
            if tail == "pad":
                assert last.valid.tolist() == [True] * 2 + [False] * 2
                assert not last.images[2:].any() and last.masks is not None and not last.masks[2:].any()
                assert last.sample_ids[2:].tolist() == [-1] * 2
    rows = "SELECT run, planned, delivered, acknowledged, dropped, missing, twice FROM epoch_coverage ORDER BY run"
    assert conn.execute(rows).fetchall() == [
        ("drop", 10, 8, 8, 2, 0, 0), ("pad", 10, 10, 10, 0, 0, 0), ("short", 10, 10, 10, 0, 0, 0),
    ]  # fmt: skip


def test_several_structures_and_none(ingested: str, conn: psycopg.Connection) -> None:
    """Two structures give masks (B, 2, H, W) and `present`; no structure gives every image, and masks None."""
    inner, outer = stored(conn, "inner"), stored(conn, "outer")
    with Feed(structures=["outer", "inner"], require="any", batch_size=3) as feed:
        seen = 0
        for batch in feed.epoch():
            assert batch.masks is not None and batch.masks.shape == (len(batch), 2, 64, 64)
            for sample, masks, present in zip(batch.sample_ids.tolist(), batch.masks, batch.present, strict=True):
                seen += 1
                assert present.tolist() == [sample in outer, sample in inner]
                for truth, mask in zip((outer, inner), masks, strict=True):
                    assert np.array_equal(mask, truth[sample][1] if sample in truth else np.zeros((64, 64), bool))
    assert seen == len(inner.keys() | outer.keys())
    with Feed(structures=["outer", "inner"]) as both, Feed(batch_size=16) as feed:
        assert both.num_samples == len(inner.keys() & outer.keys())
        assert feed.num_samples == 48
        for batch in feed.epoch():
            assert batch.masks is None and batch.present.shape == (len(batch), 0)


def test_dtypes(ingested: str, conn: psycopg.Connection) -> None:
    """Images come in the dtype asked for, the stored values rounded once."""
    truth = stored(conn, "inner")
    with contextlib.ExitStack() as stack:
        for dtype in ("float16", "float32", "float64"):
            feed = stack.enter_context(Feed(structures=["inner"], dtype=dtype, limit=4))
            for batch in feed.epoch():
                for sample, image in zip(batch.sample_ids.tolist(), batch.images, strict=True):
                    assert image.dtype == dtype
                    assert np.array_equal(image, dicom.decode_frame(truth[sample][0], 0).astype(dtype))


def test_where_selects_and_unshuffled_is_by_key(ingested: str, conn: psycopg.Connection) -> None:
    """A validation feed: one patient, the order by sample_key, equal in every epoch."""
    with Feed(structures=["inner"], where="patient = 'SYN0002'", shuffle=False) as feed:
        first, second = ids(feed, 2)
    expected = conn.execute("SELECT sample_id FROM sample WHERE structure = 'inner' AND patient = 'SYN0002' ORDER BY sample_key").fetchall()
    assert first == second == [sample for (sample,) in expected]


def test_generator(ingested: str) -> None:
    """`batches` is the same as a plain generator, and its daemon is gone with it."""
    shapes = [(images.shape, masks.shape) for images, masks in batches(structures=["inner"], batch_size=8, epochs=2, limit=12)]  # type: ignore[union-attr]
    assert shapes == [((8, 64, 64),) * 2, ((4, 64, 64),) * 2] * 2
    assert daemons() == []


def test_arguments_are_checked(ingested: str) -> None:
    """A wrong argument is one clear line that names it, and one that this version does not have is an error."""
    with pytest.raises(FeedError, match=r"the stream is empty.*; structure 'valve': there is none of this name; there are inner, outer$"):
        Feed(structures=["valve", "inner", "pool"])
    with pytest.raises(FeedError, match=r"the stream is empty.*; see `catalog status`$"):
        Feed(structures=["inner"], where="rows = 7")
    assert daemons() == []
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"structures": ["inner"], "where": "nonsense > 1"}, "where=.*nonsense"),
        ({"structures": ["inner"], "batch_size": 0}, "batch_size=0"),
        ({"structures": ["inner"], "dtype": "int7"}, "dtype='int7'.*float32"),
        ({"structures": ["inner"], "tail": "long"}, "tail='long'"),
        ({"structures": ["inner"], "slots": 1}, "slots=1"),
        ({"structures": ["inner"], "seed": 2**63}, "seed="),
        ({"structures": ["inner"], "batch_size": 60_000, "slots": 128}, "the ring needs .* MiB"),
        ({"structures": ["inner"], "rank": 2, "num_ranks": 2, "run": "r"}, "rank=2, num_ranks=2"),
        ({"structures": ["inner"], "rank": 1}, "rank=1"),
        ({"structures": ["inner"], "rank": 0, "num_ranks": 2}, "run=NAME"),
        ({"structures": ["inner"], "resume": "first"}, "resume='first'"),
        ({"structures": ["inner"], "resume": {"epoch": 3}}, "'stream'.*state_dict"),
        ({"structures": ["inner"], "size": 96}, r"^size=96: must be \(rows, columns\)$"),
        ({"structures": ["inner"], "size": 96, "transforms": [{"name": "flip"}]}, r"^size=96: must be \(rows, columns\)$"),
        ({"structures": {"inner"}}, "^structures: a set is nothing that can be kept with a stream; pass a text, a number or a list$"),
        ({"where": b"rows = 64"}, "^where: a bytes is nothing"),
        ({"structures": ["inner"], "size": np.array([96, 0])}, r"^size=\[96, 0\]: must be"),
        ({"structures": 7}, r"^structures=7: must be a list, such as \['inner'\]$"),
        ({"structures": ["inner"], "where": 3}, "^where=3: must be a text$"),
        ({"sequences": 3}, "^sequences=3: must be options, such as"),
        *(
            ({"timeout_s": wrong}, "^timeout_s=.*: must be a number of seconds above 0, at most 2147483$")
            for wrong in (-1, 0, "5", None, True, float("nan"), float("inf"), 1e10)
        ),
    ]
    with Feed(structures=["inner"]):  # whose daemon refuses the others: to start one for each takes long
        for arguments, expected in wrong:
            with pytest.raises(FeedError, match=expected) as raised:
                Feed(**arguments)
            assert "\n" not in str(raised.value)
    with pytest.raises(TypeError, match=r"structures='inner'.*list"):
        Feed(structures="inner")
    with pytest.raises(TypeError, match="augmentations"):
        Feed(structures=["inner"], augmentations=[])  # type: ignore[call-arg]
    assert daemons() == []


def test_shapes_that_differ_are_listed(ingested: str, tmp_path: Path) -> None:
    """Images of two sizes: the error lists both with their counts and says what to pass, and that works."""
    from catalog import synthetic

    synthetic.write_studies(tmp_path / "larger", patients=1, slices=2, phases=2, size=96, seed=9)
    with database.open_database(ingested) as db:
        ingest.ingest(db, tmp_path / "larger", jobs=1)
    # The same patient names on purpose: what is in the way is the size alone.
    with pytest.raises(FeedError, match=r"64×64 \(48\), 96×96 \(4\).*rows = 64 and columns = 64"):
        Feed()
    with Feed(where="rows = 96 and columns = 96") as feed:
        assert feed.num_samples == 4


def test_run_names(ingested: str, conn: psycopg.Connection) -> None:
    """A run may be named once; feeding it again from the same stream needs its state, and is refused."""
    with Feed(structures=["inner"], run="unet-3", limit=4) as feed:
        assert feed.run == "unet-3"
        ids(feed)
    with (
        pytest.raises(FeedError, match=r"run='unet-3'.*attempt 1.*resume='last'.*another name"),
        Feed(structures=["inner"], run="unet-3", limit=4) as feed,
    ):
        ids(feed)
    with Feed(structures=["inner"], run="unet-3", limit=3, shuffle=False) as validation:  # another stream of the same training
        ids(validation)
    assert conn.execute("SELECT count(*) FROM run").fetchone() == (1,)


# ------------------------------------------------------------------------------------------ leases


def test_views_keep_their_slot_and_no_longer(ingested: str) -> None:
    """A batch's arrays do not change while any view on them lives, and cannot be written; the slot is back when the last one dies."""
    with Feed(structures=["inner"], batch_size=2, slots=3) as feed:
        held = []
        sums = []
        for batch in feed.epochs(20):
            if batch.index % 7 == 0 and len(held) < 1:
                held.append(batch.images[1:, 10:20][:, ::2])  # a view of a view of a view
                sums.append(held[0].sum())
            if held:
                assert held[0].sum() == sums[0]
            with pytest.raises(ValueError, match="read-only"):
                batch.images[0, 0, 0] = 1
        del batch, held


def test_holding_all_slots_says_so(ingested: str) -> None:
    """A trainer that keeps every batch gets an error that says that it holds all slots, and goes on once it drops them."""
    with Feed(structures=["inner"], batch_size=2, slots=3) as feed:
        iterator = feed.epoch()
        held = [next(iterator).images for _ in range(3)]
        feed.timeout_s = 0.5  # only now: what is on its way may take longer
        with pytest.raises(FeedError, match=r"within 0.5 s: .*holds all 3 slots.*slots="):
            next(iterator)
        feed.timeout_s = 60
        held.clear()
        gc.collect()
        assert len(ids(feed)[0]) == feed.num_samples


def test_a_view_that_dies_in_another_thread_frees_the_slot(ingested: str) -> None:
    """A feed that waits for a slot goes on as soon as another thread drops the last view."""
    with Feed(structures=["inner"], batch_size=2, slots=2) as feed:
        iterator = feed.epoch()
        held = [next(iterator).images for _ in range(2)]
        dropped = threading.Event()

        def drop() -> None:
            assert wait_until(lambda: feed._returned.awaited)
            dropped.set()
            held.clear()

        with ThreadPoolExecutor() as pool:
            dropping = pool.submit(drop)
            assert next(iterator).index == 2  # else there is none within its minute
            assert dropped.is_set()
            dropping.result()


def test_release_and_done(ingested: str, conn: psycopg.Connection) -> None:
    """`release` gives the slot back though a view is around; `done` acknowledges without asking for more, `release` does not."""
    with Feed(structures=["inner"], batch_size=2, slots=2, limit=8) as feed:
        kept = []
        iterator = feed.epoch()
        for number in range(3):
            batch = next(iterator)
            kept.append(batch.images)
            batch.release()
            assert "released" in repr(batch)
            if number == 2:
                last = batch
        last.done()
        feed.close()
        del kept
    assert conn.execute("SELECT delivered, acknowledged FROM epoch_coverage").fetchone() in {(8, 6), (6, 6)}


def test_leaving_an_epoch_early(ingested: str, conn: psycopg.Connection) -> None:
    """`break` and go on: the next epoch is whole and in its own order; the first is acknowledged as far as the trainer came."""
    with Feed(structures=["inner"], batch_size=2, seed=5) as feed:
        for batch in feed.epochs(4):
            if batch.index == 2:
                break
        del batch
        assert ids(feed) == [order(conn, 5, 1)]
    rows = conn.execute("SELECT epoch, acknowledged, twice FROM epoch_coverage ORDER BY epoch").fetchall()
    assert rows == [(0, 6, 0), (1, len(order(conn, 5, 1)), 0)]


def test_two_feeds_share_one_daemon(ingested: str, loaderd: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    """Training and validation in one process: one private daemon, two streams; it ends with the last of them."""
    with Feed(structures=["inner"], seed=1) as training, Feed(structures=["inner"], shuffle=False) as validation:
        status = loaderd("status")
        assert status.stdout.count("trainer") == 2, status
        for left, right in zip(training.epoch(), validation.epoch(), strict=True):
            assert len(left) == len(right)
        validation.close()
        assert len(ids(training)[0]) == training.num_samples
    assert daemons() == []


# ------------------------------------------------------------------------------------------ processes and threads


def test_refused_after_fork_and_in_pickle(ingested: str) -> None:
    """A forked child cannot use its parent's feed, and dropping its copies frees nothing of the parent's; nor can a feed be pickled."""
    with Feed(structures=["inner"], batch_size=2, slots=2) as feed:
        iterator = feed.epoch()
        batch = next(iterator)
        before = batch.images.copy()
        child = os.fork()
        if child == 0:
            try:
                next(iterator)
            except FeedError as error:
                del batch
                gc.collect()
                feed.close()
                os._exit(0 if "fork" in str(error) else 1)
            os._exit(2)
        assert os.waitpid(child, 0)[1] == 0
        for _ in range(3):
            next(iterator)
        assert np.array_equal(batch.images, before)
        with pytest.raises(TypeError, match="num_workers=0"):
            pickle.dumps(feed)


def test_close_from_another_thread(ingested: str) -> None:
    """A feed that waits in one thread can be closed in another: the wait ends at once with a clear error."""
    feed = Feed(structures=["inner"], batch_size=2, slots=2, timeout_s=600)
    iterator = feed.epoch()
    held = [next(iterator).images, next(iterator).images]
    with ThreadPoolExecutor() as pool:
        closing = pool.submit(lambda: (wait_until(lambda: feed._returned.awaited), feed.close()))
        begun = time.monotonic()
        with pytest.raises(FeedError, match="closed"):
            next(iterator)
        assert time.monotonic() - begun < 60
        closing.result()
    assert held[0].shape == (2, 64, 64)  # what is held stays readable
    feed.close()
    assert daemons() == []


def test_close_while_it_attaches_again(ingested: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A feed whose daemon died and that is closed by another thread meanwhile says so, and does not wait for the next daemon."""
    feed = Feed(structures=["inner"], batch_size=2, slots=2, timeout_s=60)
    iterator = feed.epoch()
    held = [next(iterator).images, next(iterator).images]  # both slots, so that no batch lies in the dead daemon's socket
    again = attach.again

    def closed_meanwhile(*arguments: Any, **options: Any) -> attach.Attached:
        found = again(*arguments, **options)
        kill(daemons(), signal.SIGSTOP)  # before it says anything that would end the wait
        closing.append(pool.submit(feed.close))
        assert wait_until(lambda: feed._closed)
        return found

    monkeypatch.setattr(attach, "again", closed_meanwhile)
    closing: list[Future[None]] = []
    with ThreadPoolExecutor() as pool:
        kill(daemons())
        with pytest.raises(FeedError, match="closed"):
            next(iterator)
        kill(daemons(), signal.SIGCONT)
        closing[0].result()
    assert len(held) == 2 and wait_until(lambda: daemons() == [])


SCRIPT = """
import loaderd
n = sum(len(images) for images, masks in loaderd.batches(structures=["inner"], batch_size=8))
print("samples", n)
"""


@pytest.mark.parametrize("how", ["script", "-c", "stdin"])
def test_works_however_python_was_started(ingested: str, tmp_path: Path, how: str) -> None:
    """A script without a main guard, ``-c`` and standard input all get their batches, also beside files named like modules."""
    for name in ("json.py", "token.py", "loaderd.txt"):
        (tmp_path / name).write_text("raise SystemExit('shadowed')\n")
    script = tmp_path / "elsewhere" / "train.py"
    script.parent.mkdir()
    script.write_text(SCRIPT)
    command = {"script": [str(script)], "-c": ["-P", "-c", SCRIPT], "stdin": ["-P", "-"]}[how]
    done = subprocess.run([sys.executable, *command], input=SCRIPT, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.stdout.startswith("samples "), done
    assert done.stderr == ""
    assert daemons() == []


def test_two_that_race_start_one_daemon(ingested: str) -> None:
    """Several trainings that start at once without a daemon share one."""
    code = SCRIPT.replace(
        "n = sum", "feed = loaderd.Feed(structures=['inner']); print(loaderd.attach.status()['pid'], flush=True); input(); n = sum"
    )
    racing = [
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/") for _ in range(4)
    ]
    pids = {process.stdout.readline() for process in racing if process.stdout is not None}
    outs = [process.communicate("\n", timeout=300)[0] for process in racing]
    assert all("samples" in out for out in outs), outs
    assert len(pids) == 1, pids
    assert wait_until(lambda: daemons() == [])


def test_flags_act_on_the_next_epoch(ingested: str, conn: psycopg.Connection) -> None:
    """An error flag raised during an epoch leaves that one as planned and takes the sample out of the next, prepared ahead or not."""
    with Feed(structures=["inner"], batch_size=4, seed=1, slots=16) as feed:
        seen: list[list[int]] = [[], []]
        flagged = 0
        for batch in feed.epochs(2):
            seen[batch.epoch].extend(batch.sample_ids.tolist())
            if batch.epoch == 0 and batch.index == 1:
                flagged = seen[0][0]
                conn.execute(
                    "INSERT INTO flag (rule, severity, detail, image_id, raised_by) VALUES ('TEST', 'error', 'wrong', %s, 'test')",
                    [flagged],
                )
    assert len(seen[0]) == feed.num_samples + 1
    assert sorted(seen[1]) == sorted(set(seen[0]) - {flagged})
    conn.execute(
        "INSERT INTO flag (rule, severity, detail, image_id, raised_by) VALUES ('TEST', 'error', 'wrong', %s, 'test')", [seen[1][0]]
    )
    with Feed(structures=["inner"], batch_size=4, seed=1) as again:  # not what its last epoch had
        assert again.num_samples == len(seen[0]) - 2
    with Feed(structures=["inner"], include_flagged=True) as everything:
        assert everything.num_samples == len(seen[0])


def test_memory_is_flat(ingested: str) -> None:
    """1,000 batches leave no Python memory behind in the trainer."""
    import tracemalloc

    with Feed(structures=["inner"], batch_size=2) as feed:
        ids(feed, 20)
        gc.collect()
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        ids(feed, 1 + 1_000 // len(feed))
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
    assert grown < 50_000, grown


def test_notebook_picture(ingested: str) -> None:
    """A batch shows itself as a PNG in a notebook."""
    with Feed(structures=["inner"], batch_size=4, limit=4) as feed:
        for batch in feed.epoch():
            assert batch._repr_png_().startswith(b"\x89PNG")


def test_real_studies(database_url: str, sunnybrook: Path, conn: psycopg.Connection) -> None:
    """The real data: 36 inner samples once each, and every one of the 500 images by the fast path, equal to pydicom bit for bit."""
    from loaderd import attach

    with database.open_database(database_url) as db:
        ingest.ingest(db, sunnybrook)
    with Feed(structures=["inner"], seed=7) as feed:
        assert ids(feed, 2) == [order(conn, 7, 0), order(conn, 7, 1)]
        assert feed.num_samples == 36
    paths = dict(conn.execute("SELECT sample_id, path FROM image_all").fetchall())
    with Feed(batch_size=16) as feed:
        for batch in feed.epoch():
            for sample, image in zip(batch.sample_ids.tolist(), batch.images, strict=True):
                assert np.array_equal(image, dicom.decode_frame(paths.pop(sample), 0).astype(np.float32))
        status = attach.status()
        assert status is not None
        [stream] = status["streams"]
    assert paths == {}
    assert (stream["decoded"], stream["by_offset"], stream["opened"]) == (500, 500, 500)
    print(f"by offset: {100 * stream['by_offset'] / stream['decoded']:.0f} %")  # noqa: T201
