"""What `loaderd top`, `loaderd bench` and `Feed(progress=True)` say: the right numbers, within the terminal, not oftener than promised."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from rich.console import Console

from catalog import database
from catalog.errors import CatalogError
from loaderd import Feed
from loaderd.attempts import CONSUMER_LOCK
from loaderd.bench import as_text, bench, forget, waits_of
from loaderd.progress import Progress
from loaderd.top import Row, rates, render, top
from loaderd.workers import python
from tests.processes import daemons, wait_until

Message = dict[str, Any]


def stream(**given: Any) -> Message:
    """Return a stream's part of a status, as a daemon says it."""
    return {
        "pid": 11, "rank": 0, "num_ranks": 1, "stream": "train", "run": "unet-3", "attempt": 2, "definition": {"structures": ["inner"]},
        "epoch": 3, "steps": 300, "announced": 110, "acknowledged": 100, "position": 880, "num_samples": 2400, "slots": 8, "leased": 3,
        "free": 2, "decoding": 2, "ring_bytes": 1 << 20, "batches": 1000, "samples": 8000, "bytes": 8_000_000_000, "decoded": 8000,
        "by_offset": 8000, "opened": 0, "unreadable": 0, "revoked": 0, "seconds": {"trainer": 50.0, "decode": 30.0, "database": 20.0},
        "attached_s": 100.0, **given,
    }  # fmt: skip


def status(*streams: Message, **given: Any) -> Message:
    """Return what a daemon says."""
    return {
        "op": "status", "pid": 7, "version": "0", "protocol": 1, "database": "d", "socket": "s", "private": False, "supervised": True,
        "uptime_s": 4000.0, "workers": [8, 9], "workers_replaced": 0, "ring_bytes": 120 << 20, "memory_bytes": None, "outage_s": None,
        "revoked": 0, "streams": list(streams), **given,
    }  # fmt: skip


def later(**given: Any) -> Message:
    """Return the same stream two seconds, 20 batches, 160 samples and 1 GB later."""
    grown = {"batches": 1020, "samples": 8160, "bytes": 9_000_000_000, "acknowledged": 120, "attached_s": 102.0}
    return stream(**{**grown, "seconds": {"trainer": 50.5, "decode": 31.0, "database": 20.5}, **given})


# ------------------------------------------------------------------------------------------ what the numbers say


def test_rates_are_those_of_the_interval() -> None:
    """Rates, shares, verdict and time left come from what changed between two answers, not from what was before."""
    (row,) = rates(status(stream()), status(later()), 2.0)
    assert (row.batches_per_s, row.samples_per_s, row.mb_per_s) == (10, 80, 500)
    assert (row.database, row.decode, row.trainer) == (0.25, 0.5, 0.25) and row.verdict == "loader-bound"
    assert (row.epoch, row.step, row.steps, row.left_s) == (3, 120, 300, 18.0)
    assert (row.stream, row.run, row.attempt, row.rank, row.num_ranks, row.pid) == ("train", "unet-3", 2, 0, 1, 11)
    assert (row.slots, row.leased, row.decoding, row.free) == (8, 3, 2, 2)


def test_the_verdict_says_who_waits() -> None:
    """Waiting for the trainer at least as long as for decoding and database together is trainer-bound; nobody waited for: idle."""
    for waited, verdict in (((3.0, 0.9, 0.9), "trainer-bound"), ((1.0, 0.5, 0.6), "loader-bound"), ((0.0, 0.0, 0.0), "idle")):
        seconds = dict(zip(("trainer", "decode", "database"), (50 + waited[0], 30 + waited[1], 20 + waited[2]), strict=True))
        (row,) = rates(status(stream()), status(later(seconds=seconds)), 2.0)
        assert row.verdict == verdict


def test_streams_that_come_and_go() -> None:
    """A stream that is new is taken from its attaching on, one that went is not shown, and neither touches the others."""
    new = stream(pid=12, run="vgg", batches=50, samples=400, bytes=0, attached_s=0.5)
    rows = rates(status(stream(), stream(pid=13)), status(later(), new), 2.0)
    assert [(row.run, row.batches_per_s) for row in rows] == [("unet-3", 10), ("vgg", 100)]
    assert rates(status(stream()), status(), 2.0) == []


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (status(stream(attached_s=10.0)), status(stream(batches=2000, attached_s=20.0), pid=70)),  # no counter is below the one before
        (status(stream(batches=5000)), status(stream(batches=2000, attached_s=20.0))),
        (status(stream(attached_s=500.0)), status(stream(batches=2000, attached_s=20.0))),
    ],
    ids=["daemon", "counters", "attached"],
)
def test_counters_that_begin_anew(before: Message, after: Message) -> None:
    """After a restart rates are those since then: never negative, and never a difference between two daemons."""
    (row,) = rates(before, after, 2.0)
    assert row.batches_per_s == 100 and row.samples_per_s == 400
    assert min(row.database, row.decode, row.trainer) >= 0 and row.database + row.decode + row.trainer == pytest.approx(1)


def test_two_streams_of_one_process_and_run() -> None:
    """A training and a validation feed of the same process and run, both unnamed, are told apart by what they feed."""
    val: Message = {"stream": None, "definition": {"structures": ["inner"], "where": "patient = 'p'"}, "batches": 400}
    rows = rates(status(stream(stream=None), stream(**val)), status(later(stream=None), stream(**val)), 2.0)
    assert sorted(row.batches_per_s for row in rows) == [0, 10] and {row.stream for row in rows} == {"(inner)"}


def test_no_time_and_no_keys() -> None:
    """An interval of no length, and a daemon that says less than this program knows, give zeros and no error."""
    (row,) = rates(status(stream()), status(later()), 0.0)
    assert (row.batches_per_s, row.mb_per_s, row.left_s) == (0, 0, None)
    (row,) = rates({}, {"streams": [{}]}, 1.0)
    assert (row.run, row.num_ranks, row.steps, row.epoch, row.verdict) == ("", 1, 0, None, "idle")
    nothing = stream(epoch=None, steps=None, stream=None, run=None, attempt=None, num_samples=None, definition={}, seconds={})
    (row,) = rates(status(nothing), status(nothing), 1.0)
    assert (row.stream, row.steps, row.left_s) == ("(images)", 0, None)


# ------------------------------------------------------------------------------------------ what it looks like


def drawn(width: int, found: Message | None, rows: list[Row], height: int | None = None, **given: Any) -> list[str]:
    """Return the lines that a terminal of that width would show, not cut off by it."""
    console = Console(file=io.StringIO(), width=1000, color_system=None)
    assert isinstance(console.file, io.StringIO)
    console.print(render(found, rows, width, height, **given), width=width)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


@pytest.mark.parametrize("width", [60, 100, 149, 150, 160, 200])
def test_it_fits(width: int) -> None:
    """Long names are shortened, numbers never: every line is within the terminal, with every figure of every consumer."""
    long = "2026-11-21T12:16:42-1a2b3c4d-and-more-than-anybody-would-read-of-a-name"
    streams = [later(rank=rank, num_ranks=16, pid=4_000_000 + rank, run=long, stream=long, steps=31_250) for rank in range(3)]
    before = [stream(rank=rank, num_ranks=16, pid=4_000_000 + rank, run=long, stream=long, steps=31_250) for rank in range(3)]
    found = status(*streams, memory_bytes=2 << 30, outage_s=12.0, revoked=3, workers_replaced=1)
    lines = drawn(width, found, rates(status(*before), found, 2.0))
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    for part in ("loaderd 7, up 1:06:40, 2 workers (1 replaced)", "rings 120 MiB of 2,048 MiB, 3 images revoked", "out of reach for 0:12"):
        assert part in text
    assert text.count("loader-bound") == 3 and text.count("25 %") == 6 and text.count("50 %") == 3
    assert text.count("31,250") == 3 and text.count("51:53") == 3 and text.count("500") == 3
    if width < 150:
        assert all(f"#2, rank {rank}/16, pid {4_000_000 + rank}" in text for rank in range(3))
    else:
        assert len(lines) == 8  # one line each, under a heading
        assert all(f"{rank}/16" in line and str(4_000_000 + rank) in line for rank, line in enumerate(lines[-3:]))


def test_a_low_terminal_says_what_it_leaves_out() -> None:
    """More consumers than lines: as many as fit, and a line with how many more there are."""
    found = status(*(later(rank=rank) for rank in range(20)))
    for width in (60, 160):
        lines = drawn(width, found, rates(status(), found, 2.0), height=18)
        assert len(lines) <= 18
        (shown,) = re.findall(r"and (\d+) more", "\n".join(lines))
        assert "\n".join(lines).count("unet-3") == 20 - int(shown)


@pytest.mark.parametrize(
    ("leased", "decoding", "free", "bar"), [(4, 2, 2, "████▒▒··"), (8, 0, 0, "█" * 8), (0, 0, 8, "·" * 8), (0, 0, 0, "▒" * 8)]
)
def test_the_bar_of_the_ring(leased: int, decoding: int, free: int, bar: str) -> None:
    """Leased, then ready or decoding, then free: together always the whole ring."""
    found = status(stream(leased=leased, decoding=decoding, free=free))
    assert bar in "\n".join(drawn(160, found, rates(found, found, 1.0)))


def test_nobody_there() -> None:
    """No trainer, or a daemon that is gone for the moment, is said in words."""
    assert drawn(60, status(), [])[-1] == "no trainer"
    assert "does not answer since 3 s" in drawn(60, None, [], gone_s=3.2)[0]


# ------------------------------------------------------------------------------------------ a terminal


END = b"\0"


class Terminal:
    """A pseudo-terminal of 80 columns (or so many): a text stream to write to, and what arrived."""

    def __init__(self, columns: int = 80) -> None:
        self.master, self.slave = pty.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
        self.stream = os.fdopen(os.dup(self.slave), "w", encoding="utf-8")
        self.text = ""

    def read(self) -> str:
        """Return what was written since the last call."""
        os.write(self.slave, END)  # the kernel passes on what is written in order, and in its own time
        arrived = b""
        while END not in arrived:
            arrived += os.read(self.master, 65536)
        self.text += (new := arrived.replace(END, b"").decode(errors="replace"))
        return new

    def arriving(self) -> str:
        """Return what arrived since the last call; another process is writing it."""
        arrived = b""
        while select.select([self.master], [], [], 0.0 if arrived else 0.02)[0]:
            arrived += os.read(self.master, 65536)
        return arrived.decode(errors="replace")

    def close(self) -> None:
        """Give everything back."""
        with contextlib.suppress(OSError):
            self.stream.close()
        os.close(self.master)
        os.close(self.slave)


class Clock:
    """Time that goes on when told, and by so much at each look."""

    def __init__(self, look_s: float = 0.0) -> None:
        self.now, self.look_s = 1000.0, look_s

    def perf_counter(self) -> float:
        """Return the time in seconds."""
        self.now += self.look_s
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of progress lines: what this machine does meanwhile must not change them."""
    made = Clock()
    monkeypatch.setattr("loaderd.progress.time", made)
    return made


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    """A terminal of 80 columns."""
    made = Terminal()
    yield made
    made.close()


def test_progress_draws_ten_times_a_second_at_most(terminal: Terminal, clock: Clock) -> None:
    """However fast steps and epochs go by, no second sees more than ten updates; a long epoch's end is among them."""
    progress = Progress(terminal.stream)
    updates: list[float] = []
    began = clock.now
    for epoch in range(10_000):
        steps = 1 if epoch else 2000
        progress.begin(epoch, steps)
        for index in range(steps):
            progress.step(index, 8, 0.0)
            updates += [clock.now] * terminal.read().count("epoch ")
            clock.now += 0.0006
        if clock.now - began > 2.5:
            break
    progress.close()
    assert len(updates) >= 10
    assert max(sum(start <= at < start + 1 for at in updates) for start in updates) <= 10  # a carriage return ends a line that stays, too
    assert "epoch 0  2000/2000" in terminal.text


def test_progress_says_what_happened(terminal: Terminal, clock: Clock) -> None:
    """Steps, speed, time left and the share of the time that went on waiting are right, also where an epoch was resumed half-way."""
    progress = Progress(terminal.stream)
    progress.begin(3, 300)
    for index in range(200, 206):
        clock.now += 0.15  # so each is drawn
        progress.step(index, 8, 0.06)
    (line,) = re.findall(
        r"epoch 3  206/300  (\d+) samples/s  0:(\d\d) left  waits (\d+) % for batches", terminal.read().rpartition("\r")[2]
    )
    assert tuple(map(int, line)) == (53, 14, 40)  # 8 samples in 0.15 s, 94 steps of 0.15 s, 0.06 s of 0.15 s
    progress.close()


def test_a_wait_before_the_beginning_counts(terminal: Terminal, clock: Clock) -> None:
    """An epoch begins to count when its first batch was asked for: the share waited is never over 100 % nor hidden."""
    progress = Progress(terminal.stream)
    progress.begin(0, 10)
    progress.step(0, 8, 2.0)
    assert "waits 100 % for batches" in terminal.read() and "4 samples/s" in terminal.text


def test_a_long_epoch_leaves_its_line_and_close_clears_the_rest(terminal: Terminal, clock: Clock) -> None:
    """A finished epoch's line stays with its duration; `close` wipes an unfinished one, so what the user prints stands alone."""
    progress = Progress(terminal.stream)
    progress.begin(0, 2)
    progress.step(0, 8, 0.0)
    clock.now += 1.05
    progress.step(1, 8, 0.0)
    assert re.search(r"\repoch 0  2/2  15 samples/s  in 0:01  waits 0 % for batches *\r\n$", terminal.read())
    clock.now += 0.15
    progress.begin(1, 2)
    progress.step(0, 8, 0.0)
    length = len(terminal.read().rpartition("\r")[2])
    assert length > 20
    progress.close()
    assert terminal.read() == "\r" + " " * length + "\r"
    progress.step(1, 8, 0.0)
    progress.close()
    assert terminal.read() == ""


@pytest.mark.parametrize("columns", [10, 30, 60])
def test_progress_is_never_wider_than_the_terminal(columns: int) -> None:
    """In a narrow terminal parts are left out: a line that wraps would not be drawn over."""
    terminal = Terminal(columns)
    progress = Progress(terminal.stream)
    progress.begin(1234, 1_000_000)
    progress.step(999, 512, 0.0)
    line = terminal.read().rpartition("\r")[2]
    assert line.startswith("epoch 123") and len(line) < columns
    terminal.close()


def test_progress_is_silent_and_cheap_without_a_terminal() -> None:
    """In a log file nothing is written, and a step costs less than a microsecond."""
    log = io.StringIO()
    progress = Progress(log)
    progress.begin(0, 100_000)
    costs = []
    for _ in range(50):  # the cheapest counts: in the others this machine did something else
        began = time.perf_counter()
        for index in range(2_000):
            progress.step(index, 8, 0.001)
        costs.append((time.perf_counter() - began) / 2_000)
    progress.close()
    assert log.getvalue() == ""
    assert min(costs) < 1e-6


def test_progress_outlives_its_terminal(terminal: Terminal, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stderr that is closed, or none at all, never raises into a training."""
    progress = Progress(terminal.stream)
    progress.begin(0, 100)
    progress.step(0, 8, 0.0)
    terminal.stream.close()
    clock.now += 0.15
    progress.step(1, 8, 0.0)
    progress.close()
    Progress(terminal.stream).step(0, 8, 0.0)
    monkeypatch.setattr(sys, "stderr", None)
    Progress().step(0, 8, 0.0)


# ------------------------------------------------------------------------------------------ a real daemon


def test_top_without_a_daemon(ingested: str) -> None:
    """Without a daemon `top` says so in one line and starts none."""
    with pytest.raises(CatalogError, match="no loaderd of this database is running"):
        top(None, once=True)
    assert daemons() == []


def test_top_measures_once(ingested: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a terminal one interval is measured: the rates are those of what was fed in it, as text and as JSON."""
    with Feed(structures=["inner"], batch_size=2, run="seen") as feed:
        fed = feed.epochs(1_000_000)
        for _ in range(100):
            next(fed)
        assert top(None, interval_s=0.1) == 0
        text = capsys.readouterr().out
        assert "seen" in text and f"{os.getpid()}" in text and "\x1b" not in text

        def measured() -> dict[str, Any]:
            assert top(None, once=True, as_json=True, interval_s=0.1) == 0
            return json.loads(capsys.readouterr().out)  # type: ignore[no-any-return]

        # Nobody takes a batch meanwhile, so the ring is full in a moment.
        assert wait_until(lambda: measured()["streams"][0]["batches_per_s"] == 0)
        found = measured()
    assert found["daemon"]["pid"] > 0 and found["seconds"] >= 0.1
    (row,) = found["streams"]
    assert (row["run"], row["pid"], row["batches_per_s"]) == ("seen", os.getpid(), 0)
    assert row["leased"] > 0 and row["slots"] >= row["leased"] + row["decoding"] + row["free"]


def test_top_on_a_terminal(ingested: str, terminal: Terminal) -> None:
    """It keeps showing what goes on, says when the daemon went and sees the next one; q ends it and leaves the terminal as it was."""
    before = termios.tcgetattr(terminal.slave)
    command, environment = python("-c", "import sys; from loaderd.top import top; sys.exit(top(None, interval_s=0.1))")
    environment["TERM"] = "xterm"
    with contextlib.ExitStack() as stack:
        feed = stack.enter_context(Feed(structures=["inner"], run="first"))
        process = subprocess.Popen(command, env=environment, stdin=terminal.slave, stdout=terminal.slave, stderr=subprocess.PIPE)
        stack.callback(process.kill)
        assert wait_until(lambda: "first" in terminal.arriving())
        list(feed.epoch())
        feed.close()
        assert wait_until(lambda: "does not answer" in terminal.arriving())
        stack.enter_context(Feed(structures=["inner"], run="second"))
        assert wait_until(lambda: "second" in terminal.arriving())
        os.write(terminal.master, b"q")
        assert process.wait(60) == 0
        assert process.stderr is not None
        with process.stderr:
            assert process.stderr.read() == b""
    assert termios.tcgetattr(terminal.slave) == before


# ------------------------------------------------------------------------------------------ bench


def test_the_percentiles_of_known_waits() -> None:
    """p50, p99 and max are waits that happened; the gap between epochs is set against the p99 of the waits within them."""
    found = waits_of([float(wait) for wait in range(100, 0, -1)], [297.0, 10.0, 198.0])
    assert found["wait_ms"] == {"p50": 50, "p99": 99, "max": 100}
    assert found["epoch_gap_ms"] == {"p50": 198, "max": 297, "to_p99": 2}
    assert waits_of([3.0], [])["wait_ms"] == {"p50": 3, "p99": 3, "max": 3}
    nothing = {"p50": None, "p99": None, "max": None}
    assert waits_of([], []) == {"wait_ms": nothing, "epoch_gap_ms": {"p50": None, "max": None, "to_p99": None}}


class LookedAt(Clock):
    """The module `time`, in which a look at the clock takes a millisecond and nothing else any."""

    def __init__(self) -> None:
        super().__init__(0.001)

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


TABLES = ("run", "attempt", "consumer", "epoch", "epoch_order", "ledger", "stream", "run_note")


def rows_of(conn: psycopg.Connection) -> dict[str, int]:
    """Return how many rows the tables of trainings have."""
    return {table: conn.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in TABLES}  # type: ignore[index]


def test_bench_measures_and_leaves_no_trace(ingested: str, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured agrees with itself and with the catalog; afterwards the database is as before, a training's rows untouched."""
    with Feed(structures=["inner"], run="training", batch_size=4) as feed:
        samples = feed.num_samples
        list(feed.epoch())
    assert wait_until(lambda: daemons() == [])
    before = rows_of(conn)
    # A look at the clock is all that takes time: else a moment in which this machine does something else could end an epoch in its middle.
    with monkeypatch.context() as patched:
        patched.setattr("loaderd.bench.time", LookedAt())
        found = bench({"structures": ["inner"], "batch_size": 4, "where": None}, seconds=0.5)
    assert rows_of(conn) == before and before["run"] == 1
    assert json.loads(json.dumps(found)) == found
    assert found["feed"] == {"structures": ["inner"], "batch_size": 4}
    assert found["num_samples"] == samples and found["epochs"] >= 1 and 0.5 <= found["seconds"] < 0.51
    assert found["samples"] == found["epochs"] * samples - 4  # whole epochs, less the batch that was waited for before the clock began
    assert found["bytes"] == found["samples"] * 64 * 64 * 5  # float32 images and bool masks
    assert found["samples_per_s"] == pytest.approx(found["samples"] / found["seconds"])
    assert found["wait_ms"]["p50"] <= found["wait_ms"]["p99"] <= found["wait_ms"]["max"] <= 1e3 * found["seconds"]
    assert found["first_batch_s"] > 0 and found["by_offset"] == 1 and found["ring_bytes"] > 0
    assert f"{found['samples_per_s']:,.0f} samples/s" in as_text(found)


def test_bench_ends_after_its_epochs_and_in_the_middle_of_a_long_one(ingested: str, conn: psycopg.Connection) -> None:
    """`epochs` bounds it where that is less; an epoch that takes as long again as the time asked for is left."""
    found = bench({"structures": ["inner"], "batch_size": 4}, seconds=600, epochs=2)
    assert found["epochs"] == 2 and found["seconds"] < 300
    found = bench({"structures": ["inner"], "batch_size": 1}, seconds=0.0)
    assert (found["epochs"], found["batches"], found["by_offset"] is not None) == (0, 1, True)
    assert "none began meanwhile" in as_text(found)
    assert set(rows_of(conn).values()) == {0}


def test_bench_on_a_stream_that_somebody_trains_on(ingested: str, conn: psycopg.Connection) -> None:
    """Beside a training of the same definition, bench takes its own rows away and nothing of the training's."""
    with Feed(structures=["inner"], run="training", batch_size=4) as feed:
        fed = feed.epochs(2)
        next(fed)
        found = bench({"structures": ["inner"], "batch_size": 4}, seconds=0.2)
        assert found["other_streams"] == 1
        assert 2 * len(feed) == 1 + len(list(fed))
    assert conn.execute("SELECT name FROM run").fetchall() == [("training",)]
    assert (
        conn.execute("SELECT planned = delivered AND planned = acknowledged, missing, twice FROM epoch_coverage").fetchall()
        == [(True, 0, 0)] * 2
    )


def test_nothing_but_a_bench_is_forgotten(ingested: str, conn: psycopg.Connection) -> None:
    """`forget` refuses a training's run, and takes a name that is not there for done."""
    with Feed(structures=["inner"], run="training") as feed:
        list(feed.epoch())
    before = rows_of(conn)
    with database.open_database(ingested) as db:
        with pytest.raises(ValueError, match="trainings are not forgotten"):
            forget(db, "training")
        forget(db, "bench-that-never-was")
    assert rows_of(conn) == before


FED = """
WITH s AS (INSERT INTO stream (definition, digest) VALUES ('{}', sha256('x')) RETURNING id),
r AS (INSERT INTO run (name, program_version, host) VALUES ('bench-1', '0', 'h'), ('training', '0', 'h') RETURNING id, name),
t AS (INSERT INTO attempt (run_id, stream_id, attempt, num_ranks, epoch, step, position) SELECT r.id, s.id, 1, 1, 0, 0, 0 FROM r, s),
e AS (INSERT INTO epoch (run_id, stream_id, epoch, num_samples, catalog_changes) SELECT r.id, s.id, 0, 8, 0 FROM r, s RETURNING id),
o AS (INSERT INTO epoch_order (epoch_id, part, sample_ids, annotation_ids) SELECT id, 0, '{1}', '{}' FROM e),
l AS (INSERT INTO ledger (epoch_id, outcome, positions, consumer) SELECT id, 'delivered', '{[0,8)}', 'h:1' FROM e),
n AS (INSERT INTO run_note (run_id, actor, note) SELECT id, 'me', 'fast' FROM r)
INSERT INTO consumer (run_id, stream_id, attempt, rank, num_ranks, host, pid, uid, daemon_pid)
SELECT r.id, s.id, 1, 0, 1, 'h', 1, 0, 2 FROM r, s
"""


def test_forgetting_waits_for_the_daemon(database_url: str, conn: psycopg.Connection) -> None:
    """A bench's rows go from every table, once the daemon is through with it; a training on the same stream keeps its own."""
    conn.execute(FED)
    before = rows_of(conn)
    with psycopg.connect(database_url, autocommit=True) as daemon, database.open_database(database_url) as db:
        locked = "SELECT pg_advisory_lock(%s, k.id::integer) FROM consumer k JOIN run r ON r.id = k.run_id WHERE r.name = 'bench-1'"
        daemon.execute(locked, [CONSUMER_LOCK])
        thread = threading.Thread(target=forget, args=(db, "bench-1"))
        thread.start()
        time.sleep(0.3)
        assert thread.is_alive() and rows_of(conn) == before
        daemon.execute("SELECT pg_advisory_unlock_all()")
        thread.join(60)
    assert rows_of(conn) == {table: count // 2 if table != "stream" else 1 for table, count in before.items()}
    assert conn.execute("SELECT name FROM run").fetchall() == [("training",)]
