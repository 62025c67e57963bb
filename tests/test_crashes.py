"""Real processes, real signals: what is left after each of them dies, and what the others notice."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psycopg
import pytest

from loaderd import Batch, Feed, FeedError, attach
from loaderd.workers import python
from tests.processes import commands, daemons, kill, wait_until, workers

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def serving(ingested: str) -> Iterator[subprocess.Popen[str]]:
    """A `loaderd serve` in the foreground of another process."""
    command, environment = python("-m", "loaderd", "serve", "--workers", "2")
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, cwd="/") as process:
        assert process.stderr is not None and "serving" in process.stderr.readline()
        yield process
        process.kill()
        assert wait_until(lambda: daemons() == [])


def checksums(feed: Feed, epochs: int, between: Callable[[int], None] = lambda number: None) -> list[tuple[int, int, list[int], int, int]]:
    """Return what every batch of some epochs held."""
    return checksums_of(feed.epochs(epochs), between)


def checksums_of(batches: Iterator[Batch], between: Callable[[int], None]) -> list[tuple[int, int, list[int], int, int]]:
    found = []
    for number, batch in enumerate(batches):
        between(number)
        assert batch.masks is not None
        images, masks = hash(batch.images.tobytes()), hash(batch.masks.tobytes())
        found.append((batch.epoch, batch.index, batch.sample_ids.tolist(), images, masks))
    return found


def daemons_alone() -> set[int]:
    """Return the pids of this test's daemons, without workers and without a `loaderd serve` that watches over one."""
    return {
        pid
        for pid, command in commands().items()
        if b"loaderd.decode" not in command and (b"serve" not in command or {b"--supervisor", b"--private"} & set(command))
    }


def leftovers() -> set[str]:
    """Return what lies in /dev/shm."""
    return {entry.name for entry in Path("/dev/shm").iterdir()}


def nothing_stays(before: set[str]) -> bool:
    """Wait until all daemons have ended and nothing is in /dev/shm that was not: what others have there meanwhile goes, ours would not."""
    # Python's process pools have semaphores there, also those of other programs on this machine, and they may stay.
    return wait_until(lambda: daemons() == [] and not [name for name in leftovers() - before if not name.startswith("sem.mp-")])


def test_killed_workers_are_replaced_bit_for_bit(ingested: str, loaderd: Run) -> None:
    """Decode workers killed in the middle of an epoch are replaced, and every batch is what it would have been."""
    with Feed(structures=["inner"], batch_size=2, seed=11) as feed:
        undisturbed = checksums(feed, 6)
    before = leftovers()

    def kill_some(number: int) -> None:
        if number % 7 == 3:
            kill(workers())

    with Feed(structures=["inner"], batch_size=2, seed=11, slots=3) as feed:
        assert checksums(feed, 6, kill_some) == undisturbed
        replaced = json.loads(loaderd("status", "--json").stdout)["workers_replaced"]
        assert replaced >= 4
    assert nothing_stays(before)


TRAINER = """
import os, sys, time, loaderd
feed = loaderd.Feed(structures=["inner"], batch_size=2, slots=3)
held = [batch.images for _, batch in zip(range(2), feed.epochs(50))]
if len(sys.argv) > 1 and os.fork() == 0:
    time.sleep(600)
print("holding", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("forked", [False, True], ids=["alone", "with a forked child"])
def test_killed_trainer_gives_everything_back(serving: subprocess.Popen[str], loaderd: Run, conn: psycopg.Connection, forked: bool) -> None:
    """A trainer killed while it holds leases, even if a forked child keeps its socket open, leaves no stream; others notice nothing."""
    command = [sys.executable, "-c", TRAINER, *(["fork"] if forked else [])]
    trainer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd="/", start_new_session=True)
    assert trainer.stdout is not None and trainer.stdout.readline() == "holding\n"
    with Feed(structures=["inner"], batch_size=2, seed=1) as other:
        assert len(json.loads(loaderd("status", "--json").stdout)["streams"]) == 2
        pid = json.loads(loaderd("status", "--json").stdout)["pid"]
        descriptors = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        trainer.kill()
        assert wait_until(lambda: len(json.loads(loaderd("status", "--json").stdout)["streams"]) == 1)
        assert wait_until(lambda: len(list(Path(f"/proc/{pid}/fd").iterdir())) < descriptors)  # its ring went, too
        assert sum(len(batch) for batch in other.epoch()) == other.num_samples
    os.killpg(trainer.pid, signal.SIGKILL)
    trainer.wait()
    trainer.stdout.close()
    # What it was announced is on record as delivered; nothing as acknowledged but what it went on from.
    assert wait_until(
        lambda: conn.execute("SELECT count(*) FROM epoch_coverage WHERE delivered >= 4 AND acknowledged = 2").fetchone() == (1,)
    )


LAST_WORDS = """
import sys, time, loaderd
fed = loaderd.Feed(structures=["inner"], batch_size=1, slots=6).epochs(50)
next(fed)
print("began", flush=True)
sys.stdin.readline()
for _ in range(3):
    next(fed)
print("took", flush=True)
time.sleep(600)
"""


def test_what_a_killed_trainer_acknowledged_last_counts(serving: subprocess.Popen[str], loaderd: Run, conn: psycopg.Connection) -> None:
    """Linux reports its death ahead of what it had said if it left messages unread; its acknowledgements are in the ledger all the same."""
    command = [sys.executable, "-c", LAST_WORDS]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/") as trainer:
        assert trainer.stdout is not None and trainer.stdout.readline() == "began\n"
        assert wait_until(lambda: json.loads(loaderd("status", "--json").stdout)["streams"][0]["leased"] == 6)
        [daemon] = daemons_alone()
        os.kill(daemon, signal.SIGSTOP)
        assert trainer.stdin is not None
        trainer.stdin.write("\n")
        trainer.stdin.flush()
        assert trainer.stdout.readline() == "took\n"  # two of six are unread
        trainer.kill()
        trainer.wait()
        os.kill(daemon, signal.SIGCONT)
    rows = "SELECT acknowledged FROM epoch_coverage WHERE acknowledged > 0"
    assert wait_until(lambda: conn.execute("SELECT count(*) FROM consumer WHERE left_at IS NOT NULL").fetchone() == (1,))
    assert conn.execute(rows).fetchall() == [(3,)]


def test_killed_trainer_takes_its_private_daemon_along(ingested: str) -> None:
    """A private daemon ends when its only trainer is killed: no process, no socket, nothing in /dev/shm."""
    before = leftovers()
    trainer = subprocess.Popen([sys.executable, "-c", TRAINER], stdout=subprocess.PIPE, text=True, cwd="/")
    assert trainer.stdout is not None and trainer.stdout.readline() == "holding\n"
    assert len(daemons()) == 1 + len(os.sched_getaffinity(0))  # a decode worker a core
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    assert nothing_stays(before)
    assert list(Path(os.environ["CATALOG_HOME"], "run").glob("*.sock")) == []


@pytest.mark.parametrize("kind", ["private", "served"])
def test_killed_daemon_comes_back(
    ingested: str, kind: str, request: pytest.FixtureRequest, conn: psycopg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    """A daemon killed three times under a trainer is back each time, a private one started by the trainer; every batch is what it would
    have been, what is held stays readable, and the ledger has each position once."""
    before = leftovers()
    with Feed(structures=["inner"], batch_size=2, seed=11) as feed:
        undisturbed = checksums(feed, 6)
    if kind == "served":
        request.getfixturevalue("serving")
    killed: set[int] = set()
    held: list[tuple[np.ndarray, np.ndarray]] = []

    def kill_daemon(number: int) -> None:
        if number in (3, 14, 20):
            [pid] = daemons_alone()
            kill([pid])
            killed.add(pid)

    with Feed(structures=["inner"], batch_size=2, seed=11, slots=3, run="r") as feed:
        iterator = feed.epochs(6)
        batch = next(iterator)
        held.append((batch.images, batch.images.copy()))
        first = (batch.epoch, batch.index, batch.sample_ids.tolist(), hash(batch.images.tobytes()), hash(batch.masks.tobytes()))  # type: ignore[union-attr]
        del batch
        assert [first, *checksums_of(iterator, kill_daemon)] == undisturbed
        assert (held[0][0] == held[0][1]).all()
    assert len(killed) == 3 and caplog.text.count("attached again") == 3
    counted = "SELECT count(*), count(DISTINCT (planned - delivered, missing, twice, finished)), bool_and(finished) FROM epoch_coverage"
    # A daemon that goes on settles what was closed a moment later.
    assert wait_until(lambda: conn.execute(f"{counted} WHERE run = 'r' AND acknowledged = planned").fetchone() == (6, 1, True))
    assert conn.execute("SELECT DISTINCT planned - delivered, missing, twice FROM epoch_coverage").fetchall() == [(0, 0, 0)]
    if kind == "private":
        assert nothing_stays(before)


def dead_children() -> set[int]:
    """Return the children of this process that ended and that it did not wait for: they stay in the system's table of processes."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                if state == "Z" and int(parent) == os.getpid():
                    found.add(int(entry.name))
    return found


def test_private_daemons_that_ended_are_reaped(ingested: str) -> None:
    """A training that opens feeds over and over, or whose daemon dies over and over, does not fill the table of processes: a daemon that
    ended with its last feed is gone when that is closed, of those that were killed at most the last one is left meanwhile."""
    before = dead_children()
    for _ in range(2):
        with Feed(structures=["inner"]):
            pass
        assert dead_children() <= before
    with Feed(structures=["inner"], batch_size=2, slots=2) as feed:
        for batch in feed.epochs(3):
            if batch.index == 1:
                [pid] = daemons_alone()
                kill([pid])
        assert len(dead_children() - before) <= 1
    assert dead_children() <= before


def test_two_threads_reap_the_same_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Feeds that end at once in two threads may both see that a daemon has ended: they go on; what ended is forgotten, not what runs."""
    both = threading.Barrier(2)

    class Seen(subprocess.Popen[bytes]):
        """A process whose end both threads have seen before either forgets it."""

        def poll(self) -> int | None:
            code = super().poll()
            both.wait(60)
            return code

    ended = [kind([sys.executable, "-c", ""]) for kind in (Seen, subprocess.Popen)]
    for process in ended:
        process.wait()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as running:
        monkeypatch.setattr(attach, "_started", [*ended, running])
        with ThreadPoolExecutor(2) as pool:
            for reaping in [pool.submit(attach._reap) for _ in range(2)]:
                reaping.result()
        assert attach._started == [running]
        running.communicate(b"\n")


def test_killed_supervisor(serving: subprocess.Popen[str]) -> None:
    """The daemon of a supervisor that was killed feeds on until its last trainer left, then ends; also if its log goes nowhere any more."""
    with Feed(structures=["inner"], batch_size=2) as feed:
        [daemon] = daemons_alone()
        assert serving.stderr is not None
        serving.stderr.close()
        serving.kill()
        serving.wait()
        assert sum(len(batch) for batch in feed.epochs(3)) == 3 * feed.num_samples
        assert daemons_alone() == {daemon}
    assert wait_until(lambda: daemons() == [])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_ends_cleanly(serving: subprocess.Popen[str], number: signal.Signals) -> None:
    """Ctrl-C and SIGTERM end `loaderd serve` with exit code 0; a trainer is told, and nothing stays."""
    with Feed(structures=["inner"], batch_size=2, slots=2) as feed:
        iterator = feed.epochs(1_000_000)  # more than are fed until the signal has come through the supervisor
        next(iterator)
        serving.send_signal(number)
        with pytest.raises(FeedError, match="told to stop"):
            for _ in iterator:
                pass
    assert serving.wait(60) == 0
    assert wait_until(lambda: daemons() == [])
    assert list(Path(os.environ["CATALOG_HOME"], "run").glob("*.sock")) == []


def test_one_daemon_a_database(serving: subprocess.Popen[str], loaderd: Run) -> None:
    """A second `loaderd serve` says that one is running; `loaderd status` without any exits 1 and says how to start one."""
    second = loaderd("serve")
    pid = json.loads(loaderd("status", "--json").stdout)["pid"]
    assert second.returncode == 1 and f"pid {pid}" in second.stderr and second.stderr.count("\n") == 1
    serving.terminate()
    serving.wait()
    gone = loaderd("status")
    assert gone.returncode == 1 and "loaderd serve" in gone.stderr


def test_another_databases_daemon_is_not_used(serving: subprocess.Popen[str], new_database: Callable[[], str]) -> None:
    """A Feed on an empty database does not attach to the daemon of a full one."""
    with pytest.raises(FeedError, match="the stream is empty"):
        Feed(structures=["inner"], database=new_database())


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_no_batch_passes_through_a_socket(serving: subprocess.Popen[str], tmp_path: Path) -> None:
    """In 1,000 batches no process writes over 4 KiB to a socket, none maps memory, and files are opened once a sample."""
    with Feed(structures=["inner"], batch_size=4, slots=8) as feed:
        epochs = -(-1_000 // len(feed))
        for _ in feed.epochs(3):
            pass
        trace = tmp_path / "trace"
        pids = [str(pid) for pid in (os.getpid(), *daemons())]
        tracer = subprocess.Popen(
            ["strace", "-f", "-y", "-e", "trace=write,writev,sendto,sendmsg,mmap,openat,pwrite64", "-o", trace,
             *(part for pid in pids for part in ("-p", pid))],
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert tracer.stderr is not None
        for _ in pids:
            tracer.stderr.readline()
        samples = sum(len(batch) for batch in feed.epochs(epochs))
        time.sleep(0.3)
        tracer.terminate()
        tracer.communicate()
    calls = trace.read_text().splitlines()
    to_sockets = [line for line in calls if re.search(r"(write|writev|sendto|sendmsg)\(\d+<(socket|UNIX|TCP)", line)]
    sizes = [int(found[1]) for line in to_sockets if (found := re.search(r"= (\d+)$", line))]
    assert len(sizes) > 2_000
    assert max(sizes) <= 4_096
    assert sum(".dcm" in line and "openat(" in line for line in calls) == samples
    # Python's and libpq's own heaps may grow by a little; a batch a map would be a thousand.
    shared = [line for line in calls if "mmap(" in line and "MAP_SHARED" in line]
    assert shared == []
    assert sum("mmap(" in line for line in calls) < 50
