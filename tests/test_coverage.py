"""The views that prove what was fed, against an oracle in plain Python that goes position by position."""

from __future__ import annotations

import itertools
import random
import runpy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg.types.multirange import Int8Multirange, Multirange
from psycopg.types.numeric import Int8
from psycopg.types.range import Range

from loaderd import runs

REPOSITORY = Path(__file__).resolve().parent.parent
OUTCOMES = ("delivered", "delivered", "delivered", "delivered", "dropped", "revoked", "unreadable")
COLUMNS = "planned, delivered, acknowledged, dropped, revoked, unreadable, missing, twice, replayed, finished"

# What a rolled back example leaves behind is nothing, so one database serves them all.
examples = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@dataclass
class Reservation:
    """A row of the ledger."""

    epoch: int
    attempt: int
    rank: int
    outcome: str
    positions: frozenset[int]
    acknowledged: frozenset[int] = frozenset()


@dataclass
class Attach:
    """A row of consumer."""

    attempt: int
    rank: int
    num_ranks: int
    reserved: tuple[int, int] | None = None  # epoch, position
    ended: int | None = None


@dataclass
class Training:
    """A run on one stream as the daemons' rules allow it to be."""

    sizes: list[int]
    attempts: list[tuple[int, int, int]] = field(default_factory=list)  # epoch, position, num_ranks
    ledger: list[Reservation] = field(default_factory=list)
    attached: list[Attach] = field(default_factory=list)


def feed(seed: int) -> Training:
    """Feed a random run: each attempt deals positions out to its ranks, which come differently far, and then one goes on or back."""
    draw = random.Random(seed)
    run = Training([draw.choice((0, 1, 2, 7, 30, 50)) for _ in range(draw.randint(1, 3))])
    point = (0, 0)
    for number in range(1, draw.randint(1, 4) + 1):
        ranks = draw.randint(1, 5)
        run.attempts.append((*point, ranks))
        last = draw.randint(point[0], len(run.sizes) - 1)
        # An attempt goes on, at the latest, where all ranks came to: more cannot have been acknowledged.
        furthest = min([_feed_rank(run, draw, number, rank, ranks, point, last) for rank in range(ranks)])
        points = [furthest]
        for epoch in range(min(furthest[0] + 1, len(run.sizes))):
            points.append((epoch, draw.randint(0, min(run.sizes[epoch], furthest[1]) if epoch == furthest[0] else run.sizes[epoch])))
        point = draw.choice(points)
        if point[0] == len(run.sizes):
            break
    return run


def _feed_rank(
    run: Training, draw: random.Random, attempt: int, rank: int, ranks: int, start: tuple[int, int], last: int
) -> tuple[int, int]:
    """Note what one rank is fed up to somewhere in epoch `last`; returns where it came to."""
    if draw.random() < 0.05:  # it never came
        return start
    attach = Attach(attempt, rank, ranks)
    run.attached.append(attach)
    if draw.random() < 0.05:  # it never asked for anything
        return start
    for epoch in range(start[0], last + 1):
        first, size = (start[1] if epoch == start[0] else 0), run.sizes[epoch]
        to = size if epoch < last or draw.random() < 0.6 else draw.randint(min(first, size), size)
        mine = [position for position in range(first, to) if position * 2654435761 % 97 % ranks == rank]
        for chunk, outcome in itertools.groupby(mine, key=lambda position: (position // 8, draw.choice(OUTCOMES))):
            positions = frozenset(outcome)
            seen = frozenset(p for p in positions if draw.random() < 0.7) if chunk[1] == "delivered" else frozenset[int]()
            run.ledger.append(Reservation(epoch, attempt, rank, chunk[1], positions, seen))
        if mine or draw.random() < 0.5:
            attach.reserved = (epoch, to)
        if to == size and (epoch < last or draw.random() < 0.8):
            attach.ended = epoch
        elif epoch == last:
            return epoch, _taken_over(run, draw, attach, epoch, to)
        if draw.random() < 0.2:  # its daemon died: it attached anew, and what it had is of an older row
            attach = Attach(attempt, rank, ranks)
            run.attached.append(attach)
    return last + 1, 0


def _taken_over(run: Training, draw: random.Random, attach: Attach, epoch: int, to: int) -> int:
    """The daemon died, and the next one took back what it had reserved beyond what was seen; returns where the rank is now."""
    if attach.reserved != (epoch, to) or draw.random() < 0.5:
        return to
    back = draw.randint(0, to)
    for row in [row for row in run.ledger if (row.epoch, row.attempt, row.rank) == (epoch, attach.attempt, attach.rank)]:
        run.ledger.remove(row)
        if left := frozenset(position for position in row.positions if position < back):
            run.ledger.append(Reservation(epoch, row.attempt, row.rank, row.outcome, left, row.acknowledged & left))
    run.attached.append(Attach(attach.attempt, attach.rank, attach.num_ranks, (epoch, back)))
    return back


def counts(run: Training, row: Reservation, position: int) -> bool:
    """Nothing of a later attempt begins at or before this position."""
    return not any((epoch, at) <= (row.epoch, position) for epoch, at, _ in run.attempts[row.attempt :])


def expected(run: Training, epoch: int) -> dict[str, int | bool]:
    """What epoch_coverage must say of an epoch."""
    size = run.sizes[epoch]
    rows = [row for row in run.ledger if row.epoch == epoch]
    times = Counter(position for row in rows for position in row.positions if counts(run, row, position))
    by_outcome = {
        outcome: {p for row in rows if row.outcome == outcome for p in row.positions if counts(run, row, p)} for outcome in OUTCOMES
    }
    newest = len(run.attempts)
    began, at, ranks = run.attempts[-1]
    ended = 0
    reserved = []
    for rank in range(ranks):
        rows_of_rank = [attach for attach in run.attached if (attach.attempt, attach.rank) == (newest, rank)]
        if any(attach.ended is not None and attach.ended >= epoch for attach in rows_of_rank):
            ended += 1
            reserved.append(size)
        else:
            spoke = [attach.reserved for attach in rows_of_rank if attach.reserved is not None]
            to = spoke[-1] if spoke else (-1, 0)
            reserved.append(size if to[0] > epoch else to[1] if to[0] == epoch else 0)
    finished = began > epoch or ended == ranks
    upto = size if finished else max(at if began == epoch else 0, min(reserved))
    return {
        "planned": size,
        "delivered": len(by_outcome["delivered"]),
        "acknowledged": len({p for row in rows for p in row.acknowledged if counts(run, row, p)}),
        "dropped": len(by_outcome["dropped"]),
        "revoked": len(by_outcome["revoked"]),
        "unreadable": len(by_outcome["unreadable"]),
        "missing": sum(position not in times for position in range(upto)),
        "twice": times.total() - len(times),
        "replayed": len({p for row in rows if row.outcome == "delivered" for p in row.positions if not counts(run, row, p)}),
        "finished": finished,
    }


def multirange(positions: frozenset[int]) -> Int8Multirange:
    return Int8Multirange([Range(Int8(position), Int8(position + 1), "[)") for position in sorted(positions)])


def positions_of(found: Multirange[int]) -> frozenset[int]:
    return frozenset(position for part in found for position in range(part.lower or 0, part.upper or 0))


@contextmanager
def stored(conn: psycopg.Connection, run: Training) -> Iterator[None]:
    """Write a run as it is into the tables, until the block ends; another run and stream beside it must not matter."""
    with conn.transaction(force_rollback=True):
        for name in ("other", "proved"):
            stream = conn.execute(
                "INSERT INTO stream (name, definition, digest) VALUES (%s, '{}', sha256('x')) RETURNING id", [name]
            ).fetchone()
            made = conn.execute("INSERT INTO run (name, program_version, host) VALUES (%s, '0', 'here') RETURNING id", [name]).fetchone()
            assert stream is not None and made is not None
            ids = {"run": made[0], "stream": stream[0]}
            with conn.cursor() as cursor:
                cursor.executemany(
                    "INSERT INTO attempt (run_id, stream_id, attempt, num_ranks, epoch, step, position) "
                    "VALUES (%(run)s, %(stream)s, %(attempt)s, %(ranks)s, %(epoch)s, 0, %(position)s)",
                    [
                        {**ids, "attempt": number, "epoch": epoch, "position": position, "ranks": ranks}
                        for number, (epoch, position, ranks) in enumerate(run.attempts, 1)
                    ],
                )
                cursor.executemany(
                    "INSERT INTO consumer (run_id, stream_id, attempt, rank, num_ranks, host, pid, uid, daemon_pid, reserved_epoch, "
                    "reserved_to, ended_epoch) VALUES (%(run)s, %(stream)s, %(attempt)s, %(rank)s, %(ranks)s, 'here', 1, 1, 1, "
                    "%(reserved_epoch)s, %(reserved_to)s, %(ended)s)",
                    [
                        {**ids, "attempt": one.attempt, "rank": one.rank, "ranks": one.num_ranks, "ended": one.ended,
                         "reserved_epoch": one.reserved and one.reserved[0], "reserved_to": one.reserved and one.reserved[1]}
                        for one in run.attached
                    ],
                )  # fmt: skip
                cursor.executemany(
                    "INSERT INTO epoch (run_id, stream_id, epoch, num_samples, catalog_changes, started_at) "
                    "VALUES (%(run)s, %(stream)s, %(epoch)s, %(size)s, 0, now())",
                    [{**ids, "epoch": epoch, "size": size} for epoch, size in enumerate(run.sizes)],
                )
                cursor.executemany(
                    "INSERT INTO ledger (epoch_id, attempt, rank, outcome, positions, acknowledged, consumer) SELECT id, %(attempt)s, "
                    "%(rank)s, %(outcome)s, %(positions)s, %(acknowledged)s, 'here:1' FROM epoch "
                    "WHERE run_id = %(run)s AND stream_id = %(stream)s AND epoch = %(epoch)s",
                    [
                        {**ids, "epoch": row.epoch, "attempt": row.attempt, "rank": row.rank, "outcome": row.outcome,
                         "positions": multirange(row.positions), "acknowledged": multirange(row.acknowledged)}
                        for row in run.ledger
                    ],
                )  # fmt: skip
        yield


def covered(conn: psycopg.Connection, name: str = "proved") -> list[dict[str, int | bool]]:
    rows = conn.execute(f"SELECT {COLUMNS} FROM epoch_coverage WHERE run = %s ORDER BY epoch", [name]).fetchall()
    return [dict(zip(COLUMNS.split(", "), row, strict=True)) for row in rows]


def found(conn: psycopg.Connection, name: str = "proved") -> set[tuple[int, str]]:
    """Return (epoch, what) of what an audit finds in the ledger; these runs have no orders."""
    return {(finding.epoch, finding.what) for finding in runs.audit(conn, name).findings} - {
        (epoch, what) for epoch in range(3) for what in ("not_stored", "unsigned")
    }


SEEDS = st.integers(0, 2**32)


@examples
@given(SEEDS)
def test_what_was_fed_by_the_rules_is_whole(conn: psycopg.Connection, seed: int) -> None:
    """Whatever attempts and ranks there were and wherever they ended: nothing is missing or twice, and all counts are the oracle's."""
    run = feed(seed)
    with stored(conn, run):
        said = covered(conn)
        assert said == [expected(run, epoch) for epoch in range(len(run.sizes))] == covered(conn, "other")
        assert all((row["missing"], row["twice"]) == (0, 0) for row in said)
        assert found(conn) == set()
    for row in said:
        ends = [row[outcome] for outcome in ("delivered", "dropped", "revoked", "unreadable")]
        assert sum(ends) == row["planned"] or not row["finished"]


@examples
@given(SEEDS, st.data())
def test_whatever_is_done_to_the_ledger_is_counted(conn: psycopg.Connection, seed: int, data: st.DataObject) -> None:
    """Rows deleted, doubled, overlapping with others or of a wrong attempt: all counts are the oracle's, in every epoch."""
    run = feed(seed)
    draw = data.draw(st.randoms(use_true_random=False))
    for _ in range(draw.randint(1, 4)):
        if not run.ledger:
            break
        row = draw.choice(run.ledger)
        what = draw.choice(("delete", "double", "overlap", "attempt"))
        if what == "delete":
            run.ledger.remove(row)
        elif what == "double":
            run.ledger.append(row)
        elif what == "overlap":
            taken = frozenset(position + draw.randint(-2, 2) for position in row.positions) & frozenset(range(run.sizes[row.epoch]))
            if taken:
                run.ledger.append(Reservation(row.epoch, row.attempt, row.rank, draw.choice(OUTCOMES), taken))
        else:
            row.attempt = draw.randint(1, len(run.attempts))
    with stored(conn, run):
        assert covered(conn) == [expected(run, epoch) for epoch in range(len(run.sizes))]


@examples
@given(SEEDS, st.data())
def test_one_row_deleted_or_doubled_turns_its_epoch_red(conn: psycopg.Connection, seed: int, data: st.DataObject) -> None:
    """Any single row that counts, of an epoch that is over: deleted, they are missing, doubled, they are twice; an audit agrees."""
    run = feed(seed)
    with stored(conn, run):
        rows = conn.execute(
            "SELECT l.id, l.epoch, length_of(l.positions) FROM ledger_effective l JOIN epoch_coverage c ON c.run = 'proved' "
            "AND c.epoch = l.epoch JOIN run r ON r.id = l.run_id AND r.name = c.run WHERE c.finished AND NOT isempty(l.positions) "
            "ORDER BY l.id"
        ).fetchall()
        if not rows:
            return
        row, epoch, length = data.draw(st.sampled_from(rows))
        untouched = covered(conn)
        with conn.transaction(force_rollback=True):
            conn.execute("DELETE FROM ledger WHERE id = %s", [row])
            assert [(one["missing"], one["twice"]) for one in covered(conn)] == [
                (length if number == epoch else 0, 0) for number in range(len(run.sizes))
            ]
            assert found(conn) == {(epoch, "missing")}
        conn.execute(
            "INSERT INTO ledger (epoch_id, attempt, rank, outcome, positions, acknowledged, consumer) "
            "SELECT epoch_id, attempt, rank, outcome, positions, acknowledged, consumer FROM ledger WHERE id = %s",
            [row],
        )
        assert covered(conn) == [{**one, "twice": length if number == epoch else 0} for number, one in enumerate(untouched)]
        assert found(conn) == {(epoch, "twice")}
        assert found(conn, "other") == set()


@examples
@given(SEEDS)
def test_what_a_later_attempt_replaced(conn: psycopg.Connection, seed: int) -> None:
    """ledger_effective splits each row into what counts and what was replayed, position by position."""
    run = feed(seed)
    with stored(conn, run):
        rows = conn.execute(
            "SELECT l.positions, l.acknowledged, l.replayed FROM ledger_effective l JOIN run r ON r.id = l.run_id "
            "WHERE r.name = 'proved' ORDER BY l.id"
        ).fetchall()
    assert len(rows) == len(run.ledger)
    for row, (positions, acknowledged, replayed) in zip(run.ledger, rows, strict=True):
        effective = frozenset(position for position in row.positions if counts(run, row, position))
        assert [positions_of(one) for one in (positions, acknowledged, replayed)] == [
            effective, row.acknowledged & effective, row.positions - effective,
        ]  # fmt: skip


def test_a_rank_that_is_through_does_not_hide_what_the_others_lost(conn: psycopg.Connection) -> None:
    """An epoch is due as far as every rank came; one that had all of it, were it nothing at all, came to its end."""
    run = Training([4], [(0, 0, 2)], [], [Attach(1, 0, 2, None, 0), Attach(1, 1, 2, (0, 3))])
    with stored(conn, run):
        [row] = covered(conn)
        assert row == expected(run, 0)
        assert (row["missing"], row["finished"]) == (3, False)


def test_a_provisional_epoch_is_nobodys(conn: psycopg.Connection) -> None:
    """An order that was prepared ahead and not asked for is no epoch yet, unless something of it was reserved."""
    run = Training([4, 4], [(0, 0, 1)], [Reservation(0, 1, 0, "delivered", frozenset(range(4)))], [Attach(1, 0, 1, (0, 4), 0)])
    with stored(conn, run):
        conn.execute("UPDATE epoch SET started_at = NULL")
        [row] = covered(conn)
        assert (row["planned"], row["delivered"], row["missing"], row["finished"]) == (4, 4, 0, True)


def test_what_an_older_version_kept_is_carried_over(conn: psycopg.Connection) -> None:
    """The migration takes unreadable positions out of the deliveries around them, also where nothing is left of one."""
    carry_over = runpy.run_path(str(REPOSITORY / "migrations" / "versions" / "0002_runs.py"))["CARRY_OVER"]
    rows = [("delivered", range(8)), ("delivered", [8]), ("delivered", [9]), ("unreadable", [3]), ("unreadable", [8]), ("unreadable", [9])]
    run = Training([10], [], [Reservation(0, 1, 0, outcome, frozenset(positions)) for outcome, positions in rows])
    with stored(conn, run):
        for statement in carry_over.split(";"):
            conn.execute(statement)
        assert covered(conn) == [
            {"planned": 10, "delivered": 7, "acknowledged": 0, "dropped": 0, "revoked": 0, "unreadable": 3, "missing": 0, "twice": 0,
             "replayed": 0, "finished": True}
        ]  # fmt: skip


# ------------------------------------------------------------------------------------------ whom a run saw


@pytest.fixture
def fed(ingested: str) -> Iterator[psycopg.Connection]:
    """Two epochs of all images that have an inner contour, in a made up order; epoch 0 was replaced from position 5 on by attempt 2."""
    with psycopg.connect(ingested, autocommit=True) as conn:
        make_epochs(conn, "unet-3", epochs=2)
        yield conn


def make_epochs(conn: psycopg.Connection, run: str, *, epochs: int) -> None:
    """Make a run of whole epochs by hand; its attempt 1 died in epoch 0, having had positions 0 … 7 and acknowledged two."""
    conn.execute(
        "INSERT INTO stream (name, definition, digest) VALUES ('inner', '{\"structures\": [\"inner\"]}', sha256('inner')) "
        "ON CONFLICT DO NOTHING"
    )
    conn.execute("INSERT INTO run (name, program_version, host) VALUES (%s, '0.1.0', 'here')", [run])
    of = "FROM run r, stream s WHERE r.name = %(run)s AND s.name = 'inner'"
    for number, epoch, position in ((1, 0, 0), (2, 0, 5)):
        conn.execute(
            "INSERT INTO attempt (run_id, stream_id, attempt, num_ranks, epoch, step, position, versions) "
            f'SELECT r.id, s.id, %(number)s, 1, %(epoch)s, 0, %(position)s, \'{{"scanfeed": "0.1.0"}}\' {of}',
            {"run": run, "number": number, "epoch": epoch, "position": position},
        )
        conn.execute(
            "INSERT INTO consumer (run_id, stream_id, attempt, rank, num_ranks, host, pid, uid, daemon_pid, versions, ended_epoch) "
            f"SELECT r.id, s.id, %(number)s, 0, 1, 'here', 10 + %(number)s, 0, 9, '{{\"numpy\": \"2.0\"}}', %(ended)s {of}",
            {"run": run, "number": number, "ended": None if number == 1 else epochs - 1},
        )
    for epoch in range(epochs):
        conn.execute(
            "WITH fed AS (SELECT sample_id, sample_key, row_number() OVER (ORDER BY sample_key) - 1 AS position FROM sample "
            "WHERE structure = 'inner'), made AS (INSERT INTO epoch (run_id, stream_id, epoch, num_samples, catalog_changes, "
            "order_sha256, started_at) SELECT r.id, s.id, %(epoch)s, (SELECT count(*) FROM fed), 0, "
            f"(SELECT sha256(string_agg(uuid_send(sample_key), '' ORDER BY position)) FROM fed), now() - interval '100 days' {of} "
            "RETURNING id), parts AS (INSERT INTO epoch_order SELECT made.id, position / 1024, "
            "array_agg(sample_id ORDER BY position), '{}' FROM made, fed GROUP BY 1, 2) SELECT 1",
            {"run": run, "epoch": epoch},
        )
        reservations: list[tuple[int, int, int | None, int | None]] = [(2, 5 if epoch == 0 else 0, None, None)]
        if epoch == 0:
            reservations.append((1, 0, 8, 2))
        for attempt, first, end, acknowledged in reservations:
            conn.execute(
                "INSERT INTO ledger (epoch_id, attempt, outcome, positions, acknowledged, consumer, at) SELECT e.id, %(attempt)s, "
                "'delivered', int8multirange(int8range(%(first)s, coalesce(%(end)s, num_samples))), "
                "int8multirange(int8range(%(first)s, coalesce(%(acknowledged)s, num_samples))), 'here:' || 10 + %(attempt)s, "
                "now() - interval '100 days' FROM epoch e JOIN run r ON r.id = e.run_id WHERE r.name = %(run)s AND e.epoch = %(epoch)s",
                {"run": run, "epoch": epoch, "attempt": attempt, "first": first, "end": end, "acknowledged": acknowledged},
            )


def test_the_history_of_a_sample(fed: psycopg.Connection) -> None:
    """sample_history has a row for each time a sample was delivered, also what was replayed, with attempt, consumer and acknowledgement."""
    planned = fed.execute("SELECT count(*) FROM sample WHERE structure = 'inner'").fetchone()
    assert planned is not None and planned[0] > 10
    rows = fed.execute("SELECT epoch, position, attempt, replayed, acknowledged, consumer FROM sample_history ORDER BY 1, 2, 3").fetchall()
    first = [(0, p, 1, p >= 5, p < 2, "here:11") for p in range(8)]
    then = [(0, p, 2, False, True, "here:12") for p in range(5, planned[0])]
    assert rows == sorted(first + then) + [(1, p, 2, False, True, "here:12") for p in range(planned[0])]
    stored_order = fed.execute(
        "SELECT h.sample_id = o.sample_ids[h.position + 1], h.sample_key = s.sample_key, h.patient = s.patient, h.run, h.stream_name "
        "FROM sample_history h JOIN epoch e ON e.epoch = h.epoch JOIN epoch_order o ON o.epoch_id = e.id "
        "JOIN sample s ON s.sample_id = h.sample_id AND s.structure = 'inner'"
    ).fetchall()
    assert set(stored_order) == {(True, True, True, "unet-3", "inner")} and len(stored_order) == len(rows)


def test_which_models_saw_a_patient(fed: psycopg.Connection) -> None:
    """Asked for a patient, sample_history names the runs and the models that saw that one's images, and no others."""
    make_epochs(fed, "other", epochs=1)
    with fed.transaction():
        runs.note(fed, "unet-3", "", bytes(32), "me")
        runs.note(fed, "unet-3", "better", bytes([1] * 32), "me")
        runs.note(fed, "unet-3", "no model", None, "me")
    # One patient less in the other run: what was not delivered was not seen.
    fed.execute(
        "DELETE FROM ledger l USING epoch e, run r WHERE l.epoch_id = e.id AND r.id = e.run_id AND r.name = 'other' AND l.attempt = 2"
    )
    patients = {row[0] for row in fed.execute("SELECT DISTINCT patient FROM sample WHERE structure = 'inner'")}
    seen = fed.execute("SELECT DISTINCT patient, run, models FROM sample_history").fetchall()
    assert {patient for patient, run, _ in seen if run == "unet-3"} == patients
    assert {tuple(models) for _, run, models in seen if run == "unet-3"} == {("00" * 32, "01" * 32)}
    assert {models for _, run, models in seen if run == "other"} == {None}
    of_other = fed.execute(
        "SELECT DISTINCT s.patient FROM epoch_order o JOIN epoch e ON e.id = o.epoch_id JOIN run r ON r.id = e.run_id, "
        "unnest(o.sample_ids[:8]) AS first (id) JOIN sample s ON s.sample_id = first.id WHERE r.name = 'other'"
    ).fetchall()
    assert {(patient,) for patient, run, _ in seen if run == "other"} == set(of_other)


def test_a_pruned_epoch_still_says_whom_it_saw(fed: psycopg.Connection) -> None:
    """After pruning, sample_history has one row a patient and epoch, also of those whose samples were replayed; counts and digests stay."""
    # Of epoch 0 nothing was delivered but its last position, and that by the attempt that was replaced.
    of_epoch_0 = "epoch_id = (SELECT id FROM epoch WHERE epoch = 0)"
    fed.execute(
        "UPDATE ledger SET outcome = 'revoked', positions = int8multirange(int8range(0, n)), acknowledged = '{}' "
        f"FROM (SELECT num_samples AS n FROM epoch WHERE epoch = 0) e WHERE {of_epoch_0} AND attempt = 2"
    )
    fed.execute(
        "UPDATE ledger SET positions = int8multirange(int8range(n - 1, n)), acknowledged = '{}' "
        f"FROM (SELECT num_samples AS n FROM epoch WHERE epoch = 0) e WHERE {of_epoch_0} AND attempt = 1"
    )
    coverage = fed.execute("SELECT * FROM epoch_coverage ORDER BY epoch").fetchall()
    provenance = fed.execute("SELECT * FROM run_provenance").fetchall()
    [(saw,)] = fed.execute("SELECT patient FROM sample_history WHERE epoch = 0").fetchall()
    assert len(runs.prune(fed, keep=1).epochs) == 1
    history = fed.execute("SELECT patient, sample_id, position, attempt FROM sample_history WHERE epoch = 0").fetchall()
    assert history == [(saw, None, None, None)]
    pruned = fed.execute("SELECT * FROM epoch_coverage ORDER BY epoch").fetchall()
    assert [row[:-1] for row in pruned] == [row[:-1] for row in coverage]
    assert [row[-1] is not None for row in pruned] == [True, False]
    assert fed.execute("SELECT * FROM run_provenance").fetchall() == provenance
    assert fed.execute("SELECT DISTINCT epoch FROM epoch_order o JOIN epoch e ON e.id = o.epoch_id").fetchall() == [(1,)]


def test_where_a_model_comes_from(fed: psycopg.Connection) -> None:
    """run_provenance names definition, digests of stream and orders, versions, consumers and models of a run."""
    with fed.transaction():
        runs.note(fed, "unet-3", "", bytes(32), "me")
    with fed.cursor(row_factory=psycopg.rows.dict_row) as cursor:
        [row] = cursor.execute("SELECT * FROM run_provenance WHERE run = 'unet-3'").fetchall()
    orders = fed.execute("SELECT encode(order_sha256, 'hex') FROM epoch ORDER BY epoch").fetchall()
    digest = fed.execute("SELECT encode(sha256('inner'), 'hex')").fetchone()
    assert digest is not None
    expected_row = {
        "stream_name": "inner", "stream_sha256": digest[0], "definition": {"structures": ["inner"]}, "transforms": [], "attempts": 2,
        "order_sha256s": [order for (order,) in orders], "daemon_versions": [{"scanfeed": "0.1.0"}], "trainer_versions": [{"numpy": "2.0"}],
        "consumers": ["here:11 rank 0 of 1", "here:12 rank 0 of 1"], "models": ["00" * 32], "program_version": "0.1.0",
    }  # fmt: skip
    assert {name: row[name] for name in expected_row} == expected_row
