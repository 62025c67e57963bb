"""Real processes, real signals: what is left after each of them dies, and what the others notice."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from loaderd import Feed, FeedError
from loaderd.workers import python
from tests.processes import daemons, wait_until, workers

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
    found = []
    for number, batch in enumerate(feed.epochs(epochs)):
        between(number)
        assert batch.masks is not None
        images, masks = hash(batch.images.tobytes()), hash(batch.masks.tobytes())
        found.append((batch.epoch, batch.index, batch.sample_ids.tolist(), images, masks))
    return found


def leftovers() -> list[str]:
    """Return what lies in /dev/shm."""
    return sorted(entry.name for entry in Path("/dev/shm").iterdir())


def test_killed_workers_are_replaced_bit_for_bit(ingested: str, loaderd: Run) -> None:
    """Decode workers killed in the middle of an epoch are replaced, and every batch is what it would have been."""
    with Feed(structures=["inner"], batch_size=2, seed=11) as feed:
        undisturbed = checksums(feed, 6)
    before = leftovers()

    def kill(number: int) -> None:
        if number % 7 == 3:
            for pid in workers():
                os.kill(pid, signal.SIGKILL)

    with Feed(structures=["inner"], batch_size=2, seed=11, slots=3) as feed:
        assert checksums(feed, 6, kill) == undisturbed
        replaced = json.loads(loaderd("status", "--json").stdout)["workers_replaced"]
        assert replaced >= 4
    assert daemons() == []
    assert leftovers() == before


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
        descriptors = len(list(Path(f"/proc/{serving.pid}/fd").iterdir()))
        trainer.kill()
        assert wait_until(lambda: len(json.loads(loaderd("status", "--json").stdout)["streams"]) == 1)
        assert wait_until(lambda: len(list(Path(f"/proc/{serving.pid}/fd").iterdir())) < descriptors)  # its ring went, too
        assert sum(len(batch) for batch in other.epoch()) == other.num_samples
    os.killpg(trainer.pid, signal.SIGKILL)
    trainer.wait()
    trainer.stdout.close()
    # What it was announced is on record as delivered; nothing as acknowledged but what it went on from.
    assert wait_until(
        lambda: conn.execute("SELECT count(*) FROM epoch_coverage WHERE delivered >= 4 AND acknowledged = 2").fetchone() == (1,)
    )


def test_killed_trainer_takes_its_private_daemon_along(ingested: str) -> None:
    """A private daemon ends when its only trainer is killed: no process, no socket, nothing in /dev/shm."""
    before = leftovers()
    trainer = subprocess.Popen([sys.executable, "-c", TRAINER], stdout=subprocess.PIPE, text=True, cwd="/")
    assert trainer.stdout is not None and trainer.stdout.readline() == "holding\n"
    assert len(daemons()) == 3
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    assert wait_until(lambda: daemons() == [])
    assert list(Path(os.environ["CATALOG_HOME"], "run").glob("*.sock")) == []
    assert leftovers() == before


def test_killed_daemon_is_a_clear_error_at_once(ingested: str) -> None:
    """A trainer whose daemon is killed gets an error at once, its workers end, and the next Feed starts afresh."""
    before = leftovers()
    with Feed(structures=["inner"], batch_size=2, slots=2) as feed:
        iterator = feed.epochs(50)
        batch = next(iterator)
        kept = batch.images.copy()
        [daemon] = set(daemons()) - set(workers())
        os.kill(daemon, signal.SIGKILL)
        begun = time.monotonic()
        with pytest.raises(FeedError, match=r"loaderd ended.*loaderd\.log.*new Feed"):
            for _ in iterator:
                pass
        assert time.monotonic() - begun < 10  # not the feed's timeout of 60 s
        assert (batch.images == kept).all()  # what is held stays readable
    assert wait_until(lambda: daemons() == [])
    assert leftovers() == before
    with Feed(structures=["inner"], batch_size=2) as feed:  # over the socket file that the killed one left behind
        assert sum(len(batch) for batch in feed.epoch()) == feed.num_samples
    assert daemons() == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_ends_cleanly(serving: subprocess.Popen[str], number: signal.Signals) -> None:
    """Ctrl-C and SIGTERM end `loaderd serve` with exit code 0; a trainer is told, and nothing stays."""
    with Feed(structures=["inner"], batch_size=2, slots=2) as feed:
        iterator = feed.epochs(50)
        next(iterator)
        serving.send_signal(number)
        with pytest.raises(FeedError, match="told to stop"):
            for _ in iterator:
                pass
    assert serving.wait(20) == 0
    assert daemons() == []
    assert list(Path(os.environ["CATALOG_HOME"], "run").glob("*.sock")) == []


def test_one_daemon_a_database(serving: subprocess.Popen[str], loaderd: Run) -> None:
    """A second `loaderd serve` says that one is running; `loaderd status` without any exits 1 and says how to start one."""
    second = loaderd("serve")
    assert second.returncode == 1 and f"pid {serving.pid}" in second.stderr and second.stderr.count("\n") == 1
    assert loaderd("status").returncode == 0
    serving.kill()
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
