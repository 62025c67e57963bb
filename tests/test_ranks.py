"""Runs that go on: states, attempts, ranks on one host and on several, and what is revoked under way."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest

from loaderd import Feed, FeedError, attach
from loaderd.workers import IN_FLIGHT, python
from tests.processes import daemons, kill, serving, wait_until, workers
from tests.test_feed import ids, order

Run = Callable[..., "subprocess.CompletedProcess[str]"]

N = 12  # inner contours of the synthetic studies
COVERAGE = "SELECT epoch, planned, delivered, dropped, missing, twice, finished FROM epoch_coverage WHERE run = %s ORDER BY epoch"


def coverage(conn: psycopg.Connection, run: str) -> list[tuple[Any, ...]]:
    return conn.execute(COVERAGE, [run]).fetchall()


@pytest.fixture
def served(ingested: str) -> Iterator[None]:
    with serving():
        yield


def settled(conn: psycopg.Connection) -> bool:
    """Wait until the ledger has the last word of all who left."""
    return wait_until(lambda: conn.execute("SELECT count(*) FROM consumer WHERE left_at IS NULL").fetchone() == (0,))


def flat(batches: list[list[int]]) -> list[int]:
    return [sample for batch in batches for sample in batch]


def said() -> dict[str, Any]:
    """Return what the daemon says of itself."""
    found = attach.status()
    assert found is not None
    return found


def fed() -> dict[str, Any]:
    """Return what it says of its only stream."""
    [stream] = said()["streams"]
    return stream  # type: ignore[no-any-return]


def take(feed: Feed, steps: int) -> list[list[int]]:
    """Return the sample ids of the next batches, and leave the iterator there."""
    found = []
    for batch in feed.epoch():
        found.append(batch.sample_ids.tolist())
        if len(found) == steps:
            break
    return found


# ------------------------------------------------------------------------------------------ states and attempts


@pytest.mark.usefixtures("served")
def test_a_state_goes_on_with_the_next_batch(conn: psycopg.Connection) -> None:
    """Saved after any batch and loaded in a new feed, a state gives the rest of the epoch in the same order, indexed on, then the next."""
    orders = [order(conn, 5, epoch) for epoch in range(3)]
    for steps in (1, 3, 5):
        with Feed(structures=["inner"], batch_size=2, seed=5, run=f"r{steps}") as feed:
            seen = flat(take(feed, steps))
            state = json.loads(json.dumps(feed.state_dict()))
        assert (state["epoch"], state["step"], state["attempt"]) == (0, steps, 1)
        with Feed(structures=["inner"], batch_size=2, seed=5, run=f"r{steps}") as feed:
            assert feed.attempt is None
            feed.load_state_dict(state)
            assert (feed.attempt, feed.next_epoch) == (2, 0)
            rest = list(feed.epoch())
            assert [batch.index for batch in rest] == list(range(steps, len(feed)))
            assert seen + flat([batch.sample_ids.tolist() for batch in rest]) == orders[0]
            del rest
            assert feed.state_dict()["epoch"] == 1 and feed.state_dict()["step"] == 0
            assert ids(feed, 2) == orders[1:]
        assert settled(conn)
        assert coverage(conn, f"r{steps}") == [(epoch, N, N, 0, 0, 0, True) for epoch in range(3)]


def test_going_back_replays_and_is_not_twice(ingested: str, conn: psycopg.Connection) -> None:
    """A state of an earlier epoch: the epochs behind it are fed again as they were; coverage counts them once."""
    with Feed(structures=["inner"], batch_size=2, seed=5, run="back") as feed:
        take(feed, 2)
        state = feed.state_dict()
        first = ids(feed, 2)
    with Feed(structures=["inner"], batch_size=2, seed=5, resume=state) as feed:
        assert (feed.run, feed.attempt) == ("back", 2)
        assert ids(feed, 3) == [order(conn, 5, 0)[4:], *first]
    assert coverage(conn, "back") == [(epoch, N, N, 0, 0, 0, True) for epoch in range(3)]
    replayed = conn.execute("SELECT sum(replayed) FROM epoch_coverage WHERE run = 'back'").fetchone()
    assert replayed is not None and replayed[0] >= 2 * N


def test_unnamed_feed_takes_the_states_run(ingested: str, conn: psycopg.Connection) -> None:
    """A feed without a run name goes on with the run of the state it loads, and leaves no empty run behind."""
    with Feed(structures=["inner"], batch_size=2) as feed:
        take(feed, 1)
        state = feed.state_dict()
    with Feed(structures=["inner"], batch_size=2) as feed:
        feed.load_state_dict(state)
        assert feed.run == state["run"]
        ids(feed)
    assert conn.execute("SELECT count(*) FROM run").fetchone() == (1,)


@pytest.mark.usefixtures("served")
def test_states_that_do_not_fit_are_refused() -> None:
    """A state of another stream, run or step, or one that comes too late, is refused in one line that says what differs."""
    with Feed(structures=["inner"], batch_size=2, run="a") as feed:
        take(feed, 2)
        state = feed.state_dict()
        with pytest.raises(FeedError, match="before the first epoch"):
            feed.load_state_dict(state)
    for arguments, changed, expected in (
        ({"batch_size": 3}, {}, "another stream"),
        ({"run": "b"}, {}, "run 'a'.*run 'b'"),
        ({}, {"step": 99}, "epoch 0, step 99, which attempt 1"),
        ({}, {"attempt": 7}, "attempt 7"),
        ({}, {"run": "none such"}, "none such"),
    ):
        with (
            Feed(**{"structures": ["inner"], "batch_size": 2, **arguments}) as feed,  # type: ignore[arg-type]
            pytest.raises(FeedError, match=expected) as raised,
        ):
            feed.load_state_dict({**state, **changed})
        assert "\n" not in str(raised.value)


@pytest.mark.usefixtures("served")
def test_resume_last_goes_on_behind_what_was_acknowledged(conn: psycopg.Connection) -> None:
    """`resume="last"` begins a new run, and goes on with one that is there, behind the last batch that was followed by another."""
    with Feed(structures=["inner"], batch_size=2, seed=2, run="x", resume="last") as feed:
        assert feed.attempt == 1
        assert take(feed, 3) == [order(conn, 2, 0)[at : at + 2] for at in (0, 2, 4)]
    with Feed(structures=["inner"], batch_size=2, seed=2, run="x", resume="last") as feed:
        assert feed.attempt == 2
        assert ids(feed) == [order(conn, 2, 0)[4:]]  # the third was not acknowledged
        feed.close()
    with Feed(structures=["inner"], batch_size=2, seed=2, run="x", resume="last") as feed:
        assert (feed.attempt, feed.next_epoch) == (3, 1)
    assert settled(conn)
    assert coverage(conn, "x") == [(0, N, N, 0, 0, 0, True)]


def test_resume_last_leaves_an_epoch_that_was_left(ingested: str, conn: psycopg.Connection) -> None:
    """An epoch that the trainer left early is over: `resume="last"` goes on behind the one that it went on to."""
    with Feed(structures=["inner"], batch_size=2, seed=2, slots=4, run="x") as feed:
        take(feed, 1)
        assert wait_until(lambda: fed()["announced"] >= 3)  # more than it ever looks at
        take(feed, 2)
    with Feed(structures=["inner"], batch_size=2, seed=2, run="x", resume="last") as feed:
        assert ids(feed) == [order(conn, 2, 1)[2:]]


@pytest.mark.parametrize("then", ["catalog", "leave", "daemon", "nothing"])
def test_an_epoch_begun_ahead_counts_once_it_is_asked_for(ingested: str, conn: psycopg.Connection, then: str) -> None:
    """While the trainer works on the last batch of an epoch the next one is begun, and that is taken back if the catalog changes or the
    trainer leaves; after the daemon's death the trainer goes on in it."""

    def begun() -> list[Any]:
        return conn.execute(
            "SELECT e.started_at IS NOT NULL, count(l.id) FROM epoch e LEFT JOIN ledger l ON l.epoch_id = e.id "
            "WHERE e.epoch = 1 GROUP BY e.id"
        ).fetchall()

    flagged = None
    found: list[list[int]] = [[], [], []]
    with Feed(structures=["inner"], batch_size=4, seed=3, run="x", slots=8) as feed:
        for batch in feed.epochs(3):
            found[batch.epoch].extend(batch.sample_ids.tolist())
            if (batch.epoch, batch.index) == (0, len(feed) - 1):
                assert wait_until(lambda: begun() == [(True, 1)])
                assert conn.execute("SELECT max(reserved_epoch) FROM consumer").fetchone() == (0,)
                if then == "leave":
                    break
                if then == "catalog":
                    flagged = batch.sample_ids.tolist()[0]
                    conn.execute(
                        "INSERT INTO flag (rule, severity, detail, image_id, raised_by) VALUES ('TEST', 'error', 'wrong', %s, 'test')",
                        [flagged],
                    )
                if then == "daemon":
                    kill(daemons())
    assert found[0] == order(conn, 3, 0)
    if then == "leave":
        assert begun() == []
        assert coverage(conn, "x") == [(0, N, N, 0, 0, 0, True)]
        return
    left = N - 1 if flagged else N
    assert coverage(conn, "x") == [(0, N, N, 0, 0, 0, True), (1, left, left, 0, 0, 0, True), (2, left, left, 0, 0, 0, True)]
    for number in (1, 2):
        assert flagged not in found[number] and len(set(found[number])) == left
        if not flagged:
            assert found[number] == order(conn, 3, number)


def test_a_pruned_epoch_is_not_fed_again(ingested: str, loaderd: Run) -> None:
    """A state that lies in an epoch whose order was pruned is refused with the remedy."""
    with Feed(structures=["inner"], batch_size=2, run="x") as feed:
        take(feed, 1)
        state = feed.state_dict()
        ids(feed, 3)
    assert loaderd("prune", "--run", "x", "--keep", "1").returncode == 0
    with pytest.raises(FeedError, match=r"epoch 0 was pruned.*later state"):
        Feed(structures=["inner"], batch_size=2, resume=state)


def test_one_attempt_at_a_time(ingested: str, conn: psycopg.Connection) -> None:
    """While a run is fed, a second training of that name waits for it to be gone, and goes on as soon as it is."""
    with Feed(structures=["inner"], batch_size=2, run="x") as feed:
        take(feed, 1)
        state = feed.state_dict()
        asked = "SELECT count(*) FROM consumer WHERE attempt IS NULL"
        closed = []

        def close() -> None:
            assert wait_until(lambda: conn.execute(asked).fetchone() == (1,))
            time.sleep(0.3)  # it looks again and again
            assert conn.execute(asked).fetchone() == (1,)
            closed.append(True)
            feed.close()

        with ThreadPoolExecutor() as pool:
            closing = pool.submit(close)
            with Feed(structures=["inner"], batch_size=2, resume=state) as second:
                assert closed and second.attempt == 2
            closing.result()


def test_leaving_early_is_dropped(ingested: str, conn: psycopg.Connection) -> None:
    """What an epoch that was left early had left is on record as dropped, once the trainer went on."""
    with Feed(structures=["inner"], batch_size=2, slots=2, run="x") as feed:
        take(feed, 2)
        ids(feed)
    [first, second] = coverage(conn, "x")
    assert first[1] == N and first[2] + first[3] == N and first[3] >= 4 and first[4:] == (0, 0, True)
    assert second == (1, N, N, 0, 0, 0, True)


# ------------------------------------------------------------------------------------------ ranks

RANK = """
import json, os, sys, loaderd
arguments, state, steps = json.loads(sys.argv[1])
got = []
with loaderd.Feed(structures=["inner"], seed=9, resume=state, **arguments) as feed:
    print("open", flush=True)
    input()
    for batch in feed.epochs(9):
        got.append([batch.epoch, batch.index, batch.sample_ids.tolist()])
        del batch
        if len(got) == steps:
            break
    state = feed.state_dict()
print(json.dumps([got, state]))
"""


def group(arguments: dict[str, Any], num_ranks: int, state: Any = None, steps: int = 0, folders: list[Path] | None = None) -> list[Any]:
    """Run a process a rank, on as many daemons as there are folders; return what each got and its state.

    They begin together, as trainings do: one that came when the others were through already would open an attempt of its own.
    """
    processes = []
    for rank in range(num_ranks):
        environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
        if folders:
            environment["LOADERD_RUN"] = str(folders[rank % len(folders)])
        command = [sys.executable, "-c", RANK, json.dumps([arguments, state, steps])]
        processes.append(subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/"))
    opened = [process.stdout.readline() for process in processes if process.stdout is not None]
    outs = [process.communicate("\n" if opened == ["open\n"] * num_ranks else "", timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * num_ranks
    return [json.loads(out) for out in outs]


def together(results: list[Any], epoch: int) -> list[int]:
    """Return an epoch's samples in the order of steps and ranks."""
    batches = sorted((index, rank, samples) for rank, (got, _) in enumerate(results) for at, index, samples in got if at == epoch)
    return [sample for _, _, samples in batches for sample in samples]


@contextlib.contextmanager
def two_hosts(tmp_path: Path) -> Iterator[list[Path]]:
    """Two daemons that share only the PostgreSQL, each with a folder of its own for its socket, as on two hosts."""
    folders, processes = [], []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir(mode=0o700)
        command, environment = python("-m", "loaderd", "serve", "--workers", "1")
        environment["LOADERD_RUN"] = str(folder)
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, cwd="/"))
        folders.append(folder)
    try:
        assert wait_until(lambda: all(list(folder.glob("*.sock")) for folder in folders))
        yield folders
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            assert process.wait(60) == 0


def test_ranks_on_two_daemons_share_one_order(ingested: str, conn: psycopg.Connection, tmp_path: Path) -> None:
    """Three ranks on two daemons get disjoint batches, together SQL's order; SQL counts none missing or twice."""
    with two_hosts(tmp_path) as folders:
        results = group({"batch_size": 2, "run": "ddp"}, 3, folders=folders)
    for epoch in range(9):
        assert together(results, epoch) == order(conn, 9, epoch)
        assert len({len([index for at, index, _ in got if at == epoch]) for got, _ in results}) == 1
    assert len({json.dumps(state) for _, state in results}) == 1
    assert coverage(conn, "ddp") == [(epoch, N, N, 0, 0, 0, True) for epoch in range(9)]
    assert conn.execute("SELECT count(*), count(DISTINCT attempt), count(DISTINCT daemon_pid) FROM consumer").fetchone() == (3, 1, 2)
    # Position by position, from the ledger itself.
    rows = conn.execute("SELECT epoch_id, rank, positions FROM ledger WHERE outcome = 'delivered'").fetchall()
    seen = sorted((epoch, at) for epoch, _, ranges in rows for part in ranges for at in range(part.lower, part.upper))
    assert seen == sorted({(epoch, at) for epoch, *_ in rows for at in range(N)})


@pytest.mark.parametrize(("first", "then"), [(1, 3), (4, 2)])
def test_another_number_of_ranks_goes_on_in_the_same_order(ingested: str, conn: psycopg.Connection, first: int, then: int) -> None:
    """In the middle of an epoch the number of ranks changes: the order goes on where it was, and every sample comes once."""
    before = group({"batch_size": 1, "run": "r"}, first, steps=2)
    states = {json.dumps(state, sort_keys=True) for _, state in before}
    assert len(states) == 1
    after = group({"batch_size": 1}, then, state=before[0][1])
    expected = order(conn, 9, 0)
    left = N - 2 * first
    dropped = left % then
    assert together(before, 0) == expected[: 2 * first]
    assert together(after, 0) == expected[2 * first : N - dropped]
    rows = coverage(conn, "r")
    assert rows[0] == (0, N, N - dropped, dropped, 0, 0, True)
    assert all(row[4:] == (0, 0, True) for row in rows) and len(rows) == 9


def test_ranks_with_states_of_different_steps_are_refused(ingested: str) -> None:
    """Two ranks that load states of different steps: the second is told both numbers."""
    arguments: dict[str, Any] = {"structures": ["inner"], "seed": 9, "batch_size": 2, "num_ranks": 2}
    with Feed(rank=0, run="r", **arguments) as first, Feed(rank=1, run="r", **arguments) as second:
        take(first, 2)
        take(second, 2)
        state = first.state_dict()
    with Feed(rank=0, resume=state, **arguments) as feed:
        assert feed.attempt == 2
        with pytest.raises(FeedError, match=r"epoch 0, step 1.*epoch 0, step 2"):
            Feed(rank=1, resume={**state, "step": 1}, **arguments)


# ------------------------------------------------------------------------------------------ named streams, revocation


def test_named_stream(ingested: str, loaderd: Run, conn: psycopg.Connection) -> None:
    """A stream made by `loaderd stream create` is fed by its name; one that differs is refused with both values; ended, it is gone."""
    made = loaderd("stream", "create", "train", "--structure", "inner", "--batch-size", "3", "--seed", "4")
    assert made.returncode == 0, made
    with Feed("train") as feed, Feed("train", batch_size=3, structures=["inner"]) as same:
        assert ids(feed) == [order(conn, 4, 0)] == ids(same)
        assert feed.structures == ("inner",)
        assert conn.execute("SELECT count(*) FROM stream").fetchone() == (1,)
        with pytest.raises(FeedError, match="batch_size: stored 3, given 5"):
            Feed("train", batch_size=5)
        with pytest.raises(FeedError, match=r"'trian'.*train.*loaderd stream create"):
            Feed("trian")
        iterator = feed.epochs(10_000)
        next(iterator)
        assert loaderd("stream", "end", "train").returncode == 0
        with pytest.raises(FeedError, match="'train' was ended"):
            for _ in iterator:
                time.sleep(0.05)
    with pytest.raises(FeedError, match="loaderd stream create"):
        Feed("train")


def test_revocation_acts_within_the_epoch(ingested: str, conn: psycopg.Connection, catalog: Run) -> None:
    """A patient withdrawn in the middle of an epoch is a hole in the rest of it: no other position shifts; and is in no epoch after."""
    expected = order(conn, 3, 0)
    patients = dict(conn.execute("SELECT sample_id, patient FROM sample WHERE structure = 'inner'").fetchall())
    with Feed(structures=["inner"], batch_size=2, seed=3, slots=2, run="r") as feed:
        iterator = feed.epochs(2)
        seen = [next(iterator).sample_ids.tolist() for _ in range(2)]
        assert catalog("patient", "withdraw", "SYN0002", "--reason", "asked for it").returncode == 0
        assert wait_until(lambda: said()["revoked"] > 0)
        rest: list[list[list[int]]] = [[], []]
        for batch in iterator:
            rest[batch.epoch].append(batch.sample_ids.tolist())
            now = conn.execute("SELECT twice FROM epoch_coverage WHERE run = 'r' AND epoch = 0").fetchone()
            assert now == (0,)  # at any moment a position has one outcome
        assert feed.num_samples < N
    first = flat(seen + rest[0])
    gone = {sample for sample, patient in patients.items() if patient == "SYN0002"}
    announced = 4 + 4  # two batches taken, two in the ring
    assert first == [sample for at, sample in enumerate(expected) if sample not in gone or sample in first[:announced]]
    assert not gone & set(first[announced:]) and len(first) < N
    assert flat(rest[1]) == [sample for sample in order(conn, 3, 1) if sample not in gone]
    row = conn.execute("SELECT planned, delivered, revoked, missing, twice FROM epoch_coverage WHERE run = 'r' AND epoch = 0").fetchone()
    assert row == (N, len(first), N - len(first), 0, 0)
    told = conn.execute("SELECT DISTINCT run FROM sample_history WHERE patient = 'SYN0002'").fetchall()
    assert told == [("r",)] or not gone & set(first)


def test_what_is_acknowledged_is_written_under_way(ingested: str, conn: psycopg.Connection) -> None:
    """Within a few seconds, though the reservation is not through: a crash of everything loses no more than that."""
    with Feed(structures=["inner"], batch_size=2, seed=3, slots=2, run="r") as feed:
        iterator = feed.epochs(1)
        for _ in range(3):
            next(iterator)
        acknowledged = "SELECT acknowledged FROM epoch_coverage WHERE run = 'r'"
        assert wait_until(lambda: conn.execute(acknowledged).fetchone() == (4,))


def test_revocation_keeps_the_shape_where_asked_to(ingested: str, conn: psycopg.Connection, catalog: Run) -> None:
    """With on_error="blank" a revoked sample is zeros and not valid, also when the epoch is fed again from its stored order."""
    with Feed(structures=["inner"], batch_size=4, seed=3, on_error="blank", run="r") as feed:
        take(feed, 1)
        state = feed.state_dict()
    victim = order(conn, 3, 0)[5]
    assert catalog("flag", "add", f"sample:{victim}", "--rule", "CONSENT", "--detail", "withdrawn", "--revoke").returncode == 0
    with Feed(structures=["inner"], batch_size=4, seed=3, on_error="blank", resume=state) as feed:
        batch = next(iter(feed.epoch()))
        assert batch.valid.tolist() == [True, False, True, True]
        assert batch.sample_ids.tolist()[1] == -1
        assert not batch.images[1].any() and batch.masks is not None and not batch.masks[1].any()
    with Feed(structures=["inner"], include_flagged=True) as feed:  # a flag is one thing, a revocation another
        assert victim not in ids(feed)[0] and feed.num_samples == N - 1
    assert daemons() == []


def test_revocation_reaches_what_is_decoded_already(ingested: str, conn: psycopg.Connection, catalog: Run) -> None:
    """A batch that was decoded but not announced when its patient was withdrawn is made again without."""
    expected = order(conn, 3, 0)
    with contextlib.ExitStack() as stack:
        stack.enter_context(serving(2))
        feed = stack.enter_context(Feed(structures=["inner"], batch_size=1, seed=3, slots=10, run="r"))
        assert wait_until(lambda: len(workers()) == 2)
        first, second = workers()
        kill((first, second), signal.SIGSTOP)
        with ThreadPoolExecutor() as pool:
            trainer = pool.submit(lambda: [batch.sample_ids.tolist() for batch in feed.epoch()])
            assert wait_until(lambda: fed()["decoding"] == 10)
            kill([first], signal.SIGCONT)  # it decodes its share and what waits; the other one has the first batch or the second
            assert wait_until(lambda: fed()["decoded"] == 10 - IN_FLIGHT)
            before = fed()["announced"]
            assert catalog("patient", "withdraw", "SYN0002").returncode == 0
            assert wait_until(lambda: said()["revoked"] > 0)
            kill([second], signal.SIGCONT)
            seen = flat(trainer.result())
    gone = {sample for (sample,) in conn.execute("SELECT sample_id FROM sample WHERE patient = 'SYN0002' AND structure = 'inner'")}
    assert seen == [sample for at, sample in enumerate(expected) if at < before or sample not in gone]
    assert before < N - 4


def test_ranks_agree_while_the_catalog_changes(ingested: str, conn: psycopg.Connection, tmp_path: Path) -> None:
    """Flags come all the time while three ranks on two daemons begin their epochs: each epoch has one order, dealt out once."""
    done = threading.Event()

    def change(url: str) -> None:
        with psycopg.connect(url, autocommit=True) as changing:
            flags = "INSERT INTO flag (rule, severity, detail, image_id, raised_by) SELECT %s, 'warning', '', min(id), 't' FROM image"
            while not done.wait(0.01):
                changing.execute(flags, [str(time.monotonic())])

    with two_hosts(tmp_path) as folders:
        changing = threading.Thread(target=change, args=(ingested,))
        changing.start()
        try:
            results = group({"batch_size": 1, "run": "ddp"}, 3, folders=folders)
        finally:
            done.set()
            changing.join()
    for epoch in range(9):
        assert together(results, epoch) == order(conn, 9, epoch)
    assert coverage(conn, "ddp") == [(epoch, N, N, 0, 0, 0, True) for epoch in range(9)]
