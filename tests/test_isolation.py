"""What trainers hold, and what their neighbours do meanwhile: no batch changes under a reader, no trainer costs another anything."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loaderd import Feed, attach, ring
from loaderd.workers import python
from tests.processes import daemons, wait_until, workers

Run = Callable[..., "subprocess.CompletedProcess[str]"]
PAGE = os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def serving(ingested: str, tmp_path: Path) -> Iterator[int]:
    """A `loaderd serve` of two workers; gives the daemon's pid."""
    command, environment = python("-m", "loaderd", "serve", "--workers", "2")
    log = tmp_path / "serve.log"
    with log.open("wb") as said, subprocess.Popen(command, env=environment, stdout=said, stderr=said, cwd="/") as process:
        assert wait_until(lambda: b"event=serving" in log.read_bytes()), log.read_text()
        yield int(status()["pid"])
        process.terminate()
    assert wait_until(lambda: daemons() == [])


def status() -> dict[str, Any]:
    """Return what the daemon says of itself."""
    found = attach.status()
    assert found is not None
    return found


@contextlib.contextmanager
def training(script: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Run a trainer, killed in the end."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/", start_new_session=True) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def tell(process: subprocess.Popen[str], line: str = "") -> None:
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


# ------------------------------------------------------------------------------------------ immutable


# Sums up each batch when it comes and when it lets go of it, some much later, some through a copy or a forked child.
HOLDER = """
import gc, os, random, sys, time, zlib, loaderd
seed, count, slots = map(int, sys.argv[1:4])
rng = random.Random(seed)
changed = batches = 0

def total(parts):
    return [zlib.crc32(part) for part in parts]

def let_go(entry):
    global changed
    parts, was = entry
    changed += total(parts) != was

with loaderd.Feed(structures=["inner"], batch_size=2, seed=seed, slots=slots) as feed:
    held, children = [], []
    while batches < count:
        for batch in feed.epochs(8):
            batches += 1
            whole = rng.random() < 0.5
            parts = [batch.images, batch.masks, batch.sample_ids, batch.sample_keys] if whole else [batch.images[-1].reshape(-1)]
            held.append((parts, total(parts)))
            chance = rng.random()
            if chance < 0.02:
                held[-1] = ([part.copy() for part in parts], held[-1][1])
            elif chance < 0.025:
                reads = rng.random() < 0.5
                child = os.fork()
                if child == 0:  # drops its copies of the views, which must free nothing of its parent's, and lives on
                    wrong = sum(total(parts) != was for parts, was in held) if reads else 0
                    del batch, parts
                    held.clear()
                    gc.collect()
                    time.sleep(0.05)
                    os._exit(min(wrong, 100))
                if reads:  # a lease is the parent's: what it lets go of, its child must not read any more
                    changed += os.waitpid(child, 0)[1] != 0
                else:
                    children.append(child)
            elif chance < 0.03:
                time.sleep(0.01)
            del batch, parts
            while children and (len(children) > 3 or batches >= count):
                changed += os.waitpid(children.pop(0), 0)[1] != 0
            while len(held) > rng.randrange(slots - 1):  # one slot at least is free
                let_go(held.pop(rng.randrange(len(held))))
            if batches % 100 == 0:
                print(batches, changed, flush=True)
            if batches >= count:
                break
    for entry in held:
        let_go(entry)
print("end", batches, changed, flush=True)
"""


def hold_and_check(trainers: int, each: int, kills: int) -> None:
    """Run trainers beside each other; each finds every batch the same when it lets go of it, also while neighbours are killed."""
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(training(HOLDER, seed, each, 4 + 2 * seed)) for seed in range(trainers)]
        for number in range(kills):
            with training(HOLDER, 100 + number, 10**9, 3) as victim:  # killed while it holds views, then started again
                assert said(victim).endswith(" 0")
        for process in processes:
            while not (line := said(process)).startswith("end"):
                assert line.endswith(" 0"), line
            assert line == f"end {each} 0"


def test_batches_never_change_under_a_reader(serving: int) -> None:
    """5,000 batches have the same checksums when they are let go of as when they came.

    Trainers hold views for long, copy, fork, and beside them others die with their leases and start again.
    """
    hold_and_check(trainers=3, each=1_700, kills=3)
    assert wait_until(lambda: status()["streams"] == [])
    assert status()["pid"] == serving


@pytest.mark.soak
def test_batches_never_change_in_100_000(serving: int) -> None:
    """The same with 10⁵ batches and 40 deaths."""
    hold_and_check(trainers=4, each=25_000, kills=40)
    assert wait_until(lambda: status()["streams"] == [])
    assert status()["pid"] == serving


def test_a_trainer_cannot_write_what_it_is_fed(ingested: str) -> None:
    """No view can be written, none can be made writable, and the process has no mapping of the ring that could be."""
    with Feed(structures=["inner"], batch_size=2) as feed:
        batch = next(feed.epoch())
        assert batch.masks is not None
        for view in (batch.images, batch.masks, batch.present, batch.sample_ids, batch.sample_keys, batch.valid, batch.images[0, 1:2, ::2]):
            kept = view.tobytes()
            with pytest.raises(ValueError, match="read-only"):
                view[...] = 0
            with pytest.raises(ValueError):
                view.flags.writeable = True
            with pytest.raises((TypeError, ValueError, BufferError)):
                memoryview(view).cast("B")[0] = 1  # type: ignore[call-overload]
            with pytest.raises(ValueError, match="read-only"):
                np.logical_not(view, out=view, casting="unsafe")
            assert view.tobytes() == kept
        maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:loaderd-ring" in line]
        assert maps and all(permissions == "r--s" for _, permissions, *_ in maps)
        links = [Path(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]  # noqa: PTH208
        for link in links:
            if link.is_symlink() and "memfd:loaderd" in os.readlink(link):  # noqa: PTH115
                assert fcntl.fcntl(int(link.name), fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        del view, batch


# ------------------------------------------------------------------------------------------ sizes


def memory(pid: int) -> tuple[int, int]:
    """Return the bytes of a process that are its own (anonymous) and that are shared memory."""
    found = dict(re.findall(r"(Rss\w+):\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text()))
    return int(found["RssAnon"]) * 1024, int(found["RssShmem"]) * 1024


def rings(pid: int) -> list[tuple[int, int]]:
    """Return (size, allocated) in bytes of the rings that a daemon holds."""
    found = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if "memfd:loaderd-ring" in str(link.readlink()):
                status = link.stat()
                found.append((status.st_size, status.st_blocks * 512))
    return found


def test_a_ring_is_allocated_at_the_start(serving: int) -> None:
    """From the attach on a ring has all its pages, and it is of the size that `status` says; it is gone with its trainer."""
    made = ring.create(ring.Layout(32, 1, 64, 64, "float32", 16))  # before anybody maps it
    assert os.fstat(made).st_blocks * 512 == os.fstat(made).st_size
    os.close(made)
    with Feed(structures=["inner"], batch_size=32, slots=16):
        assert wait_until(lambda: len(rings(serving)) == 1)  # for a moment also what was given to us
        [(size, allocated)] = rings(serving)
        assert allocated == size == status()["ring_bytes"] > 8 << 20
    assert wait_until(lambda: rings(serving) == [])


SLOW = """
import sys, time, loaderd
with loaderd.Feed(structures=["inner"], batch_size=2, seed=9) as feed:
    print("fed", flush=True)
    for batch in feed.epochs(10**6):
        time.sleep(0.02)
"""


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside a slow one"])
def test_memory_is_flat(serving: int, beside: bool) -> None:
    """Over 200 epochs neither the daemon's memory nor its workers' grows by more than 1 %, private and shared looked at apart."""
    with contextlib.ExitStack() as stack:
        if beside:
            assert said(stack.enter_context(training(SLOW))) == "fed"
        feed = stack.enter_context(Feed(structures=["inner"], batch_size=2, seed=1))
        for _ in feed.epochs(300):  # what Python and libpq keep for themselves is there after some
            pass
        processes = {"daemon": serving, **{f"worker {number}": pid for number, pid in enumerate(sorted(workers()))}}
        before = {name: memory(pid) for name, pid in processes.items()}
        for _ in feed.epochs(200):
            pass
        for name, pid in processes.items():
            now = memory(pid)
            for kind, old, new in zip(("private", "shared"), before[name], now, strict=True):
                assert new <= old * 1.01 + PAGE, f"{name}: {kind} memory went from {old} to {new} bytes in 200 epochs"
        assert all(size == allocated for size, allocated in rings(serving))


# ------------------------------------------------------------------------------------------ neighbours


HALF = """
import sys, time, zlib, loaderd
with loaderd.Feed(structures=["inner"], batch_size=2, seed=3, slots=3, run="half") as feed:
    fed = feed.epoch()
    held = next(fed)
    kept = zlib.crc32(held.images), zlib.crc32(held.masks)
    print("holding", flush=True)
    sys.stdin.readline()
    assert kept == (zlib.crc32(held.images), zlib.crc32(held.masks))
    print(1 + sum(1 for _ in fed), len(feed), flush=True)
    held = [batch.images for _, batch in zip(range(2), feed.epoch())]
    print("holding", flush=True)
    sys.stdin.readline()
"""


def test_a_stopped_trainer_holds_only_its_own_ring(serving: int) -> None:
    """A trainer that is stopped in the middle of a batch costs others nothing, goes on when it is continued, and if killed is gone."""
    with Feed(structures=["inner"], batch_size=2, seed=1) as other, training(HALF) as stopped:
        assert said(stopped) == "holding"
        for number in range(2):
            stopped.send_signal(signal.SIGSTOP)
            assert wait_until(lambda: "T (stopped)" in Path(f"/proc/{stopped.pid}/status").read_text())
            assert sum(len(batch) for batch in other.epochs(5)) == 5 * other.num_samples
            mine, its = sorted(status()["streams"], key=lambda stream: stream["pid"] == stopped.pid)
            assert its["run"] == "half" and its["leased"] <= its["slots"] == 3 and mine["epoch"] == 5 * number + 4
            if number == 0:
                stopped.send_signal(signal.SIGCONT)
                tell(stopped)
                steps, expected = said(stopped).split()
                assert steps == expected and said(stopped) == "holding"
        assert wait_until(lambda: len(rings(serving)) == 2)
        stopped.kill()
        assert wait_until(lambda: len(status()["streams"]) == 1 and len(rings(serving)) == 1)
        assert sum(len(batch) for batch in other.epoch()) == other.num_samples


HOARDER = """
import sys, loaderd
with loaderd.Feed(structures=["inner"], batch_size=2, seed=3, slots=3) as feed:
    held, fed = [], feed.epochs(9)
    try:
        for batch in fed:
            held.append(batch.images)
            print("held", len(held), flush=True)
            if len(held) == 3:
                feed.timeout_s = 2  # what is on its way may take longer
    except loaderd.FeedError as error:
        print(error, flush=True)
"""


def test_a_trainer_that_never_lets_go_stops_itself_alone(serving: int) -> None:
    """Who keeps every batch is told that it holds all slots, and to raise slots=; its neighbour goes on meanwhile."""
    with Feed(structures=["inner"], batch_size=2, seed=1) as other, training(HOARDER) as hoarder:
        assert [said(hoarder) for _ in range(3)] == ["held 1", "held 2", "held 3"]
        for _ in range(3):
            assert sum(len(batch) for batch in other.epochs(2)) == 2 * other.num_samples
        error = said(hoarder)
        assert "holds all 3 slots" in error and "raise slots=" in error
        assert hoarder.wait(60) == 0
        assert sum(len(batch) for batch in other.epoch()) == other.num_samples
        assert len(status()["streams"]) == 1
