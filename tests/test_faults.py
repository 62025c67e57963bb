"""Every kind of death in the middle of a training: nothing missing, nothing twice, every batch as if nothing had happened.

The long version is `make soak`.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from catalog import database, ingest, synthetic
from loaderd import Feed, FeedError, attach
from loaderd.decode import WORK_STRIDE
from tests.faults.harness import INJECT, SMALL_SHM, Harness, Scenario, shared_memory, undisturbed
from tests.processes import daemons, kill, server_ended, serving, wait_until, workers
from tests.test_feed import order
from tests.test_isolation import rings
from tests.test_ranks import two_hosts

Run = Callable[..., "subprocess.CompletedProcess[str]"]

N = 112  # images of `many_contours`


@pytest.fixture(scope="session")
def many_contours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """112 images of 32×32 px, each with a contour."""
    folder = tmp_path_factory.mktemp("many")
    synthetic.write_studies(folder, patients=7, slices=4, phases=4, size=32, seed=3, every_image=True)
    return folder


@pytest.fixture
def catalogued(database_url: str, many_contours: Path) -> str:
    """URL of a database with them."""
    with database.open_database(database_url) as db:
        ingest.ingest(db, many_contours, jobs=1)
    return database_url


@pytest.fixture
def own_server(many_contours: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The CATALOG_HOME of an embedded server of this test alone, with the same studies."""
    # Not in pytest's folder, which only its user may enter: as root the server runs as another.
    home = Path(tempfile.mkdtemp(prefix="scanfeed-faults-"))
    monkeypatch.setenv("CATALOG_HOME", str(home))
    with database.open_database() as db:
        ingest.ingest(db, many_contours, jobs=1)
    yield home
    assert wait_until(lambda: daemons() == [])
    assert server_ended(home)
    shutil.rmtree(home)


@pytest.fixture
def shm_can_be_small() -> None:
    """Skips where nothing can be mounted."""
    if shutil.which("unshare") is None or subprocess.run([*SMALL_SHM, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("no mount namespace can be made here (unshare -m needs root)")


# Together every point, and each of those that die at some time.
ONE = Scenario(
    ranks=(1,), daemons="private", limit=15, seed=1, tail="drop",
    faults=("ended>saved", "decoded>starting", "saved", "announced", "received", "daemon", "planned"),
)  # fmt: skip
THREE = Scenario(
    ranks=(3,), daemons="served", limit=29, seed=2, faults=("acknowledged", "asked", "worker", "reserved", "trainer", "everything")
)  # fmt: skip


@pytest.mark.parametrize("scenario", [ONE, THREE], ids=["one rank", "three ranks"])
def test_a_training_survives_death_at_every_point(catalogued: str, conn: psycopg.Connection, tmp_path: Path, scenario: Scenario) -> None:
    """Each position of each epoch comes once, in SQL's order, bit for bit; the ledger proves it, and nothing is left behind."""
    expected = undisturbed()
    before = set(shared_memory())
    harness = Harness(scenario, tmp_path / "faults", catalogued, "unet")
    harness.run()
    harness.check(conn, expected)
    assert sum(harness.told.faults.values()) == len(scenario.faults)
    assert set(shared_memory()) <= before  # other programs' goes when it likes


def everything(feed: Feed, epochs: int, between: Callable[[int], None] = lambda number: None) -> list[list[int]]:
    """Return the samples of each epoch."""
    found: list[list[int]] = [[] for _ in range(epochs)]
    for number, batch in enumerate(feed.epochs(epochs)):
        found[batch.epoch] += batch.sample_ids.tolist()
        del batch
        between(number)
    return found


def test_a_rank_that_comes_while_the_others_daemon_is_away(
    catalogued: str, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It waits for them to attach again instead of opening an attempt of its own, and they share the epoch."""
    arguments: dict[str, Any] = {"structures": ["inner"], "batch_size": 4, "seed": 3, "run": "r", "num_ranks": 2, "resume": "last"}
    with two_hosts(tmp_path) as (one, two), ThreadPoolExecutor() as pool:
        monkeypatch.setenv("LOADERD_RUN", str(one))
        with Feed(rank=0, **arguments) as first:
            pid = json.loads((next(one.glob("*.lock"))).read_text())
            os.kill(pid, signal.SIGKILL)
            monkeypatch.setenv("LOADERD_RUN", str(two))
            rest = pool.submit(lambda: [batch.sample_ids.tolist() for batch in first.epoch()])
            with Feed(rank=1, **arguments) as second:
                got = [batch.sample_ids.tolist() for batch in second.epoch()]
            assert [sample for pair in zip(rest.result(), got, strict=True) for part in pair for sample in part] == order(conn, 3, 0)
    assert conn.execute("SELECT count(*) FROM attempt").fetchone() == (1,)
    assert conn.execute("SELECT delivered, missing, twice FROM epoch_coverage").fetchall() == [(N, 0, 0)]


def test_a_sample_that_kills_two_workers_is_left_out(
    catalogued: str, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch, loaderd: Run
) -> None:
    """It is flagged, the rest of its epoch delivered and itself on record as unreadable; the next epoch does without it."""
    orders = [order(conn, 3, epoch) for epoch in range(2)]
    victim = orders[0][50]
    monkeypatch.setenv("PYTHONPATH", str(INJECT))
    monkeypatch.setenv("FAULTS_DEADLY", str(victim))
    with Feed(structures=["inner"], batch_size=4, seed=3, run="r") as feed:
        assert everything(feed, 2) == [[sample for sample in samples if sample != victim] for samples in orders]
        # A batch of the next epoch may have been on its way with it when the second one died.
        assert json.loads(loaderd("status", "--json").stdout)["workers_replaced"] in (2, 3)
    flagged = "SELECT rule, severity, state FROM flag WHERE file_id = (SELECT file_id FROM location WHERE image_id = %s AND preferred)"
    assert conn.execute(flagged, [victim]).fetchall() == [("FEED-UNREADABLE", "error", "open")]
    rows = conn.execute("SELECT planned, delivered, unreadable, missing, twice, finished FROM epoch_coverage ORDER BY epoch").fetchall()
    assert rows == [(N, N - 1, 1, 0, 0, True), (N - 1, N - 1, 0, 0, 0, True)]
    assert loaderd("audit", "r").returncode == 0


def test_a_batch_that_cannot_be_handed_out_again_ends_its_stream_alone(
    catalogued: str, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If nothing can be written when a batch is made again without the sample that killed two workers, its feed ends with one line and
    gives its ring back; the daemon and who else is fed go on."""
    victim = order(conn, 3, 0)[5]  # in batch 1, so in slot 1: its work begins where the file may end
    monkeypatch.setenv("PYTHONPATH", str(INJECT))
    monkeypatch.setenv("FAULTS_DEADLY", str(victim))
    beside: dict[str, Any] = {"structures": ["inner"], "batch_size": 4, "shuffle": False, "where": f"sample_id <> {victim}"}

    def said() -> dict[str, Any]:
        found = attach.status()
        assert found is not None
        return found

    with serving(workers=1), Feed(**beside) as other:
        daemon = said()["pid"]
        with ThreadPoolExecutor() as pool, Feed(structures=["inner"], batch_size=4, seed=3, slots=30) as feed:
            kill(workers(), signal.SIGSTOP)
            fed = pool.submit(everything, feed, 1)
            assert wait_until(lambda: N // 4 in [stream["decoding"] for stream in said()["streams"]])  # all of it is written by now
            limit = resource.prlimit(daemon, resource.RLIMIT_FSIZE)
            resource.prlimit(daemon, resource.RLIMIT_FSIZE, (WORK_STRIDE, limit[1]))
            kill(workers(), signal.SIGCONT)
            with pytest.raises(FeedError, match="File too large") as raised:
                fed.result()
            assert "\n" not in str(raised.value)
            resource.prlimit(daemon, resource.RLIMIT_FSIZE, limit)
        assert wait_until(lambda: len(rings(daemon)) == 1)
        [samples] = everything(other, 1)
        assert len(samples) == N - 1 and victim not in samples
        found = said()
        assert found["pid"] == daemon and found["workers_replaced"] == 2


def test_no_other_sample_is_blamed_for_a_workers_death(catalogued: str, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a worker had reported before it died is heard, though Linux reports the death first if it left jobs unread: else the batch
    that was done counts as the one it died on, and after two such deaths a good sample is flagged and left out."""
    victim = order(conn, 3, 0)[5]  # in batch 1
    monkeypatch.setenv("PYTHONPATH", str(INJECT))
    monkeypatch.setenv("FAULTS_DEADLY", str(victim))
    with serving(workers=1), ThreadPoolExecutor() as pool, Feed(structures=["inner"], batch_size=4, seed=3, slots=30) as feed:
        status = attach.status()
        assert status is not None
        [worker] = workers()
        os.kill(worker, signal.SIGSTOP)
        fed = pool.submit(everything, feed, 1)
        assert wait_until(lambda: (attach.status() or {})["streams"][0]["decoding"] == N // 4)
        os.kill(status["pid"], signal.SIGSTOP)
        os.kill(worker, signal.SIGCONT)
        assert wait_until(lambda: Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[0] == "Z")
        os.kill(status["pid"], signal.SIGCONT)
        [samples] = fed.result()
        assert len(samples) == N - 1 and victim not in samples
        status = attach.status()
        assert status is not None and status["workers_replaced"] == 2


def test_nobody_dies_for_a_batch_that_nobody_wants(catalogued: str, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that killed a worker is not handed out again once its trainer has gone on to the next epoch; it ends no stream."""
    orders = [order(conn, 3, epoch) for epoch in range(2)]
    victim = orders[0][10]  # in batch 2, which has slot 0 once batch 0 is let go of
    monkeypatch.setenv("PYTHONPATH", str(INJECT))
    monkeypatch.setenv("FAULTS_DEADLY", str(victim))

    def said(what: str) -> int:
        found = attach.status()
        assert found is not None
        return int(found["streams"][0][what])

    with serving(workers=1), ThreadPoolExecutor() as pool, Feed(structures=["inner"], batch_size=4, seed=3, slots=2) as feed:
        left = feed.epoch()
        next(left)
        assert wait_until(lambda: said("announced") == 2)
        kill(workers(), signal.SIGSTOP)
        next(left)
        assert wait_until(lambda: said("decoding") == 1)
        left.close()
        fed = pool.submit(lambda: [sample for batch in feed.epoch() for sample in batch.sample_ids.tolist()])
        assert wait_until(lambda: said("epoch") == 1)
        kill(workers(), signal.SIGCONT)
        assert fed.result() == [sample for sample in orders[1] if sample != victim]
        status = attach.status()
        assert status is not None and status["workers_replaced"] == 3  # one for the epoch that was left, two for the next one


def test_killed_postgresql_comes_back(own_server: Path, loaderd: Run) -> None:
    """The embedded server's postmaster killed three times under a training: it gets everything in order, and the ledger says so."""
    killed: set[int] = set()

    def postmaster() -> int | None:
        try:
            return int((own_server / "postgresql/postmaster.pid").read_text().split()[0])
        except (FileNotFoundError, IndexError):  # the next one is just writing it
            return None

    def kill_it(number: int) -> None:
        if number in (5, 40, 100):
            assert wait_until(lambda: postmaster() not in {None, *killed})
            killed.add(pid := postmaster() or 0)
            os.kill(pid, signal.SIGKILL)

    with Feed(structures=["inner"], batch_size=4, seed=3, run="r") as feed:
        found = everything(feed, 5, kill_it)
    assert len(killed) == 3
    with database.open_database() as db, db.connect() as conn:
        assert found == [order(conn, 3, epoch) for epoch in range(5)]
        rows = conn.execute("SELECT delivered, missing, twice, finished FROM epoch_coverage ORDER BY epoch").fetchall()
    assert rows == [(N, 0, 0, True)] * 5
    assert loaderd("audit", "r").returncode == 0


def test_postgresql_gone_for_good(catalogued: str, conn: psycopg.Connection, tmp_path: Path) -> None:
    """What is reserved is fed all the same; then the feed ends with one line within its time."""
    parts = conninfo_to_dict(catalogued)
    folder = Path(tempfile.mkdtemp(prefix="proxy-"))
    command = [sys.executable, str(INJECT.parent / "proxy.py"), str(folder), str(parts["host"]), str(parts["port"])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as proxy, contextlib.ExitStack() as stack:
        stack.callback(proxy.kill)
        assert proxy.stdout is not None and proxy.stdout.readline() == "listening\n"
        secret = f":{parts['password']}" if parts.get("password") else ""
        url = f"postgresql://{parts['user']}{secret}@/{parts['dbname']}?host={folder}&port=5432"
        found: list[int] = []
        with Feed(structures=["inner"], batch_size=4, seed=3, run="r", database=url) as feed:
            with pytest.raises(FeedError, match="database") as raised:
                for number, batch in enumerate(feed.epochs(50)):
                    found += batch.sample_ids.tolist()
                    if number == 3:
                        proxy.kill()
                    if len(found) == N:
                        feed.timeout_s = 1
            kill(daemons())  # else it waits for its database for a while
            for process in attach._started:
                process.wait()
    assert "\n" not in str(raised.value)
    assert len(found) >= N and found[:N] == order(conn, 3, 0)
    assert conn.execute("SELECT delivered, missing, twice FROM epoch_coverage WHERE epoch = 0").fetchone() == (N, 0, 0)
    shutil.rmtree(folder)
