"""What runs left in the database: listing, notes, the audit, and dropping what is long over."""

from __future__ import annotations

import hashlib
import json
import os
import pwd
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import psycopg
import pytest

from catalog.errors import CatalogError, UsageError
from loaderd import runs
from loaderd.attempts import CONSUMER_LOCK, RUN_LOCK
from tests.conftest import Run
from tests.processes import wait_until
from tests.test_coverage import make_epochs
from tests.test_named import in_process, one_line

OLD = timedelta(days=90)


@pytest.fixture
def fed(ingested: str) -> Iterator[psycopg.Connection]:
    """Runs a and b of three epochs each, fed a hundred days ago; see `make_epochs`."""
    with psycopg.connect(ingested, autocommit=True) as conn:
        for run in ("a", "b"):
            make_epochs(conn, run, epochs=3)
        yield conn


@pytest.fixture
def loaderd() -> Run:
    """Run `loaderd` in this process."""
    return in_process


def left(conn: psycopg.Connection) -> list[tuple[str, int]]:
    """Return (run, epoch) of the epochs that were not pruned."""
    return conn.execute(
        "SELECT r.name, e.epoch FROM epoch e JOIN run r ON r.id = e.run_id WHERE e.pruned_at IS NULL ORDER BY 1, 2"
    ).fetchall()


def found(conn: psycopg.Connection, run: str | None = None) -> list[tuple[str, int, str, int]]:
    return [(one.run, one.epoch, one.what, one.count) for one in runs.audit(conn, run).findings]


def epoch_id(conn: psycopg.Connection, run: str, epoch: int) -> int:
    row = conn.execute("SELECT e.id FROM epoch e JOIN run r ON r.id = e.run_id WHERE r.name = %s AND epoch = %s", [run, epoch]).fetchone()
    assert row is not None
    return int(row[0])


def hold(url: str, conn: psycopg.Connection, run: str) -> psycopg.Connection:
    """Hold the lock of the run's newest consumer, as its daemon does."""
    daemon = psycopg.connect(url, autocommit=True)
    row = conn.execute("SELECT max(c.id) FROM consumer c JOIN run r ON r.id = c.run_id WHERE r.name = %s", [run]).fetchone()
    assert row is not None
    daemon.execute("SELECT pg_advisory_lock(%s, %s::integer)", [CONSUMER_LOCK, row[0]])
    return daemon


# ------------------------------------------------------------------------------------------ looking


def test_runs_are_listed_and_shown(fed: psycopg.Connection, ingested: str, loaderd: Run) -> None:
    """run list has one row a run with what it was fed and whether it is fed now; run show has all of its rows, for people and machines."""
    planned = fed.execute("SELECT count(*) FROM sample WHERE structure = 'inner'").fetchone()
    assert planned is not None
    with fed.transaction():
        runs.note(fed, "b", "the good one", bytes(32), "me")
    daemon = hold(ingested, fed, "a")
    # A lock of another class, and one of a single number, are nobody's.
    daemon.execute("SELECT pg_advisory_lock(%s, id::integer) FROM consumer", [RUN_LOCK])
    daemon.execute("SELECT pg_advisory_lock(%s::bigint << 32 | id) FROM consumer", [CONSUMER_LOCK])
    listed = json.loads(loaderd("run", "list", "--json").stdout)
    daemon.close()
    shared = {"attempts": 2, "last_epoch": 2, "delivered": 3 * planned[0]}
    [stream] = listed[0]["streams"]
    assert stream["stream_name"] == "inner"
    assert [{name: row[name] for name in row if name != "opened"} for row in listed] == [
        {"run": "a", "live": True, "streams": [stream], "models": [], **shared},
        {"run": "b", "live": False, "streams": [stream], "models": ["00" * 32], **shared},
    ]
    table = loaderd("run", "list").stdout.splitlines()
    assert len(table) == 4 and table[3].split() == ["b", *table[3].split()[1:3], "no", "'inner'", "2", "2", str(3 * planned[0]), "00" * 32]

    shown = json.loads(loaderd("run", "show", "b", "--json").stdout)
    assert [(row["attempt"], row["epoch"], row["position"]) for row in shown["attempts"]] == [(1, 0, 0), (2, 0, 5)]
    assert [(row["pid"], row["live"]) for row in shown["consumers"]] == [(11, False), (12, False)]
    assert [(row["epoch"], row["delivered"], row["replayed"], row["missing"], row["finished"]) for row in shown["epochs"]] == [
        (0, planned[0], 3, 0, True), (1, planned[0], 0, 0, True), (2, planned[0], 0, 0, True),
    ]  # fmt: skip
    assert [(row["actor"], row["note"], row["model_sha256"]) for row in shown["notes"]] == [("me", "the good one", "00" * 32)]
    assert [row["definition"] for row in shown["provenance"]] == [{"structures": ["inner"]}]
    text = loaderd("run", "show", "b").stdout
    assert text.startswith("run 'b', opened ")
    for word in ("the good one", "00" * 32, shown["epochs"][2]["order_sha256"], '{"structures": ["inner"]}', "here"):
        assert word in text


def test_an_unknown_run_is_one_line(database_url: str, loaderd: Run) -> None:
    """Every command that takes a run says in one line that it does not know it, exit code 2; lists of nothing are empty."""
    for command in (["run", "show", "x"], ["run", "note", "x", "text"], ["audit", "x"], ["prune", "--run", "x"]):
        assert one_line(loaderd(*command), 2) == "loaderd: there is no run 'x' in this catalog; see `loaderd run list`"
    assert loaderd("run", "list").stdout == "no run yet\n"


def test_a_note_knows_the_model(fed: psycopg.Connection, loaderd: Run, tmp_path: Path) -> None:
    """A note keeps its text, its actor (by default the user) and the model's sha256, given or computed, which the history then names."""
    model = tmp_path / "model.pt"
    model.write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    assert digest in loaderd("run", "note", "a", "epoch 2", "--model", model).stdout
    assert loaderd("run", "note", "a", "--model-sha256", "AB" * 32, "--actor", "ci").returncode == 0
    assert loaderd("run", "note", "a", "diverged").returncode == 0
    rows = fed.execute("SELECT actor, note, encode(model_sha256, 'hex') FROM run_note ORDER BY id").fetchall()
    me = pwd.getpwuid(os.getuid()).pw_name
    assert rows == [(me, "epoch 2", digest), ("ci", "", "ab" * 32), (me, "diverged", None)]
    assert fed.execute("SELECT DISTINCT models FROM sample_history WHERE run = 'a'").fetchall() == [([digest, "ab" * 32],)]


def test_a_note_that_says_nothing(database_url: str, loaderd: Run, tmp_path: Path) -> None:
    """Neither text nor model, two models, no sha256, no file: one line each, and nothing is noted."""
    file = tmp_path / "model.pt"
    file.write_bytes(b"")
    assert "nothing to note" in one_line(loaderd("run", "note", "a"), 2)
    assert "choose one" in one_line(loaderd("run", "note", "a", "--model", file, "--model-sha256", "ab" * 32), 2)
    assert "64 hex digits" in one_line(loaderd("run", "note", "a", "--model-sha256", "ab" * 31), 2)
    assert "64 hex digits" in one_line(loaderd("run", "note", "a", "--model-sha256", "xy" * 32), 2)
    assert "gone.pt: No such file" in one_line(loaderd("run", "note", "a", "--model", tmp_path / "gone.pt"), 1)


# ------------------------------------------------------------------------------------------ proving


def test_a_good_run_is_clean(fed: psycopg.Connection, loaderd: Run) -> None:
    """Of runs that were fed whole, audit finds nothing and ends with 0, pruned or not."""
    assert runs.audit(fed) == runs.Audited(2, 6, [])
    done = loaderd("audit")
    assert (done.returncode, done.stdout) == (0, "2 runs, 6 epochs: no findings\n")
    assert len(runs.prune(fed, keep=1).epochs) == 4
    assert json.loads(loaderd("audit", "a", "--json").stdout) == {"runs": 1, "epochs": 3, "findings": [], "erased": 0}


def test_an_audit_is_red(fed: psycopg.Connection, loaderd: Run) -> None:
    """One ledger row deleted or doubled by hand: exit code 3, a line each with run, stream, epoch and how many, and a summary."""
    planned = fed.execute("SELECT count(*) FROM sample WHERE structure = 'inner'").fetchone()
    assert planned is not None
    fed.execute("DELETE FROM ledger WHERE epoch_id = %s", [epoch_id(fed, "a", 1)])
    fed.execute(
        "INSERT INTO ledger (epoch_id, attempt, outcome, positions, consumer) SELECT epoch_id, attempt, outcome, positions, consumer "
        "FROM ledger WHERE epoch_id = %s AND attempt = 1",
        [epoch_id(fed, "b", 0)],
    )
    done = loaderd("audit")
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout.splitlines() == [
        f"run 'a', stream 'inner', epoch 1: {planned[0]} of {planned[0]} positions are missing from the ledger",
        f"run 'b', stream 'inner', epoch 0: 5 of {planned[0]} positions are in the ledger twice",
        "2 runs, 6 epochs: 2 findings",
    ]
    done = loaderd("audit", "b", "--json")
    assert done.returncode == 3
    [finding] = json.loads(done.stdout)["findings"]
    assert {name: finding[name] for name in ("run", "stream_name", "epoch", "what", "count")} == {
        "run": "b", "stream_name": "inner", "epoch": 0, "what": "twice", "count": 5,
    }  # fmt: skip


def test_an_order_is_what_was_fed(fed: psycopg.Connection) -> None:
    """Whatever is changed in a stored order, its digest, or to positions that it does not have, is one finding of that epoch."""
    planned = fed.execute("SELECT count(*) FROM sample WHERE structure = 'inner'").fetchone()
    assert planned is not None
    for change, what, count in (
        ("epoch_order SET sample_ids = sample_ids[2:2] || sample_ids[1:1] || sample_ids[3:] WHERE epoch_id = %s", "changed", planned[0]),
        ("epoch_order SET sample_ids = sample_ids[1:1] || sample_ids[1:1] || sample_ids[3:] WHERE epoch_id = %s", "changed", planned[0]),
        ("epoch_order SET sample_ids = sample_ids || sample_ids[1] WHERE epoch_id = %s", "changed", planned[0]),
        ("epoch_order SET sample_ids = -1 || sample_ids[2:] WHERE epoch_id = %s", "changed", planned[0]),
        ("epoch SET order_sha256 = sha256('') WHERE id = %s", "changed", planned[0]),
        ("epoch SET order_sha256 = NULL WHERE id = %s", "unsigned", planned[0]),
        ("epoch_order SET sample_ids = sample_ids[4:] WHERE epoch_id = %s", "not_stored", 3),
        ("epoch_order SET epoch_id = (SELECT max(id) FROM epoch), part = 1 WHERE epoch_id = %s", "not_stored", planned[0]),
        ("ledger SET positions = positions + '{[5000,5002)}' WHERE epoch_id = %s", "beyond", 2),
        ("ledger SET positions = positions + '{[-2,-1)}' WHERE epoch_id = %s", "beyond", 1),
    ):
        with fed.transaction(force_rollback=True):
            fed.execute("UPDATE " + change, [epoch_id(fed, "a", 1)])
            assert found(fed, "a") == [("a", 1, what, count)], change
            assert found(fed, "b") == [] or "max(id)" in change


def test_the_digest_goes_over_all_parts(fed: psycopg.Connection) -> None:
    """An order of several parts hashes in position order, as the planner hashes it; two parts exchanged are a finding."""
    target = epoch_id(fed, "a", 1)
    fed.execute("UPDATE epoch_order SET part = 2 WHERE epoch_id = %s", [target])
    for part, some in ((0, "sample_ids[:5]"), (1, "sample_ids[6:10]")):
        fed.execute(
            f"INSERT INTO epoch_order SELECT epoch_id, {part}, {some}, '{{}}' FROM epoch_order WHERE epoch_id = %s AND part = 2",
            [target],
        )
    fed.execute("UPDATE epoch_order SET sample_ids = sample_ids[11:] WHERE epoch_id = %s AND part = 2", [target])
    assert found(fed) == []
    fed.execute("UPDATE epoch_order SET part = 7 - part WHERE epoch_id = %s AND part < 2", [target])
    fed.execute("UPDATE epoch_order SET part = part - 6 WHERE epoch_id = %s AND part > 5", [target])
    assert [what for _, _, what, _ in found(fed)] == ["changed"]


def test_an_order_that_is_still_being_stored(fed: psycopg.Connection) -> None:
    """While an epoch is fed its order may not be whole; then it must hold what was given out of it. Once it is over, all of it."""
    target = epoch_id(fed, "a", 2)
    fed.execute("UPDATE epoch SET order_sha256 = NULL WHERE id = %s", [target])
    fed.execute("UPDATE epoch_order SET sample_ids = sample_ids[:9] WHERE epoch_id = %s", [target])
    fed.execute("UPDATE ledger SET positions = '{[0,9)}', acknowledged = '{}' WHERE epoch_id = %s", [target])
    ended = "UPDATE consumer SET ended_epoch = %s, reserved_epoch = 2, reserved_to = 9 WHERE run_id = (SELECT id FROM run WHERE name = 'a')"
    fed.execute(ended, [1])
    assert found(fed) == []
    fed.execute("UPDATE ledger SET positions = '{[0,11)}' WHERE epoch_id = %s", [target])
    assert found(fed) == [("a", 2, "not_stored", 2)]
    fed.execute(ended, [2])
    planned = fed.execute("SELECT num_samples FROM epoch WHERE id = %s", [target]).fetchone()
    assert planned is not None
    assert found(fed) == [("a", 2, "missing", planned[0] - 11), ("a", 2, "not_stored", planned[0] - 9)]


def test_an_empty_epoch_is_clean(fed: psycopg.Connection) -> None:
    """An epoch of no samples has no order, whose sha256 is that of nothing."""
    target = epoch_id(fed, "a", 1)
    fed.execute("DELETE FROM ledger WHERE epoch_id = %s", [target])
    fed.execute("DELETE FROM epoch_order WHERE epoch_id = %s", [target])
    fed.execute("UPDATE epoch SET num_samples = 0, order_sha256 = sha256('') WHERE id = %s", [target])
    assert found(fed) == []


# ------------------------------------------------------------------------------------------ dropping


def test_prune_says_what_and_keeps_the_proof(fed: psycopg.Connection, loaderd: Run) -> None:
    """prune --keep drops orders and ledger rows of older epochs; --dry-run says the same and drops nothing; the coverage stays."""
    before = fed.execute(
        "SELECT run, epoch, delivered, acknowledged, replayed, missing, twice FROM epoch_coverage ORDER BY 1, 2"
    ).fetchall()
    tried = json.loads(loaderd("prune", "--keep", "2", "--dry-run", "--json").stdout)
    assert len(left(fed)) == 6 and fed.execute("SELECT count(*) FROM epoch_order").fetchone() == (6,)
    done = loaderd("prune", "--keep", "2", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    said = json.loads(done.stdout)
    assert said == {**tried, "dry_run": False}
    assert [(row["run"], row["stream_name"], row["epoch"]) for row in said["epochs"]] == [("a", "inner", 0), ("b", "inner", 0)]
    assert said["bytes"] == sum(row["bytes"] for row in said["epochs"]) > 200
    assert left(fed) == [(run, epoch) for run in "ab" for epoch in (1, 2)]
    counts = (fed.execute(f"SELECT count(*) FROM {table}").fetchone() for table in ("epoch_order", "ledger", "epoch"))
    assert list(counts) == [(4,), (4,), (6,)]
    after = fed.execute("SELECT run, epoch, delivered, acknowledged, replayed, missing, twice FROM epoch_coverage ORDER BY 1, 2").fetchall()
    assert after == before
    text = loaderd("prune", "--keep", "1").stdout.splitlines()
    assert text[0].startswith("run 'a', stream 'inner', epoch 1: ") and text[0].endswith(" bytes")
    assert text[-1].startswith("dropped 2 epochs and no orders that nobody asked for: ")


def test_prune_fits_all_conditions(fed: psycopg.Connection) -> None:
    """--run, --older-than and --keep narrow each other down; age is since something of an epoch was fed last."""
    fed.execute("UPDATE ledger SET at = now() - interval '89 days' WHERE epoch_id = %s", [epoch_id(fed, "a", 1)])
    assert [row["epoch"] for row in runs.prune(fed, run="a", older_than=OLD).epochs] == [0]
    assert [row["epoch"] for row in runs.prune(fed, run="b", older_than=OLD, keep=2).epochs] == [0]
    assert runs.prune(fed, older_than=timedelta(days=101)).epochs == []
    assert left(fed) == [(run, epoch) for run in "ab" for epoch in (1, 2)]
    runs.prune(fed, run="b")
    assert left(fed) == [("a", 1), ("a", 2), ("b", 2)]


def test_prune_wants_a_condition(database_url: str, loaderd: Run) -> None:
    """Without a condition, and with an age that is none, prune is a usage error in one line."""
    assert "say what may go" in one_line(loaderd("prune"), 2)
    for text in ("90", "d", "-1d", "1.5d", "9" * 9 + "d", "90 days"):
        with pytest.raises(UsageError, match="must be a whole number and h, d or w"):
            runs.age(text)
    assert [runs.age(text) for text in ("90d", "12h", "4w")] == [timedelta(90), timedelta(hours=12), timedelta(28)]


def test_prune_leaves_what_is_faulty(fed: psycopg.Connection, loaderd: Run) -> None:
    """An epoch at which an audit finds something stays as it is, is named with what is wrong, and the exit code is 3."""
    fed.execute(
        "UPDATE ledger SET positions = positions - '{[0,2)}', acknowledged = positions - '{[0,2)}' WHERE epoch_id = %s",
        [epoch_id(fed, "a", 1)],
    )
    fed.execute("UPDATE epoch SET order_sha256 = sha256('') WHERE id = %s", [epoch_id(fed, "b", 0)])
    done = loaderd("prune", "--keep", "1")
    assert done.returncode == 3
    assert "left alone: run 'a', stream 'inner', epoch 1: 2 of " in done.stdout
    assert "left alone: run 'b', stream 'inner', epoch 0: its stored order" in done.stdout
    assert left(fed) == [("a", 1), ("a", 2), ("b", 0), ("b", 2)]
    assert [(run, epoch, what) for run, epoch, what, _ in found(fed)] == [("a", 1, "missing"), ("b", 0, "changed")]


def test_prune_leaves_what_may_be_resumed_in(fed: psycopg.Connection) -> None:
    """The newest epoch stays even when it is old, and so does one that a later attempt came back to; epochs after it are none any more."""
    fed.execute(
        "INSERT INTO attempt (run_id, stream_id, attempt, num_ranks, epoch, step, position) "
        "SELECT run_id, stream_id, 3, 1, 1, 0, 4 FROM attempt t JOIN run r ON r.id = t.run_id WHERE r.name = 'a' AND attempt = 2"
    )
    assert [(row["run"], row["epoch"]) for row in runs.prune(fed, older_than=OLD).epochs] == [("a", 0), ("b", 0), ("b", 1)]
    assert left(fed) == [("a", 1), ("a", 2), ("b", 2)]
    # Once the third attempt is through with epoch 1, that is the newest: of epoch 2 nothing counts.
    fed.execute(
        "INSERT INTO ledger (epoch_id, attempt, outcome, positions, acknowledged, consumer, at) SELECT epoch_id, 3, outcome, "
        "positions - '{[0,4)}', positions - '{[0,4)}', consumer, at FROM ledger WHERE epoch_id = %s AND attempt = 2",
        [epoch_id(fed, "a", 1)],
    )
    fed.execute(
        "INSERT INTO consumer (run_id, stream_id, attempt, rank, num_ranks, host, pid, uid, daemon_pid, ended_epoch) "
        "SELECT run_id, stream_id, 3, 0, 1, 'here', 13, 0, 9, 1 FROM attempt t JOIN run r ON r.id = t.run_id "
        "WHERE r.name = 'a' AND attempt = 3"
    )
    assert fed.execute("SELECT finished, missing, twice FROM epoch_coverage WHERE run = 'a' AND epoch = 1").fetchall() == [(True, 0, 0)]
    assert runs.prune(fed, older_than=OLD).epochs == []


def test_prune_waits_for_the_last_acknowledgement(fed: psycopg.Connection) -> None:
    """Of the last two epochs, the older one stays while the newest attempt has not acknowledged all of it: resume='last' may go there."""
    fed.execute("UPDATE ledger SET acknowledged = '{[0,3)}' WHERE epoch_id = %s", [epoch_id(fed, "a", 1)])
    runs.prune(fed, older_than=OLD)
    assert left(fed) == [("a", 1), ("a", 2), ("b", 2)]
    fed.execute("UPDATE ledger SET acknowledged = positions WHERE epoch_id = %s", [epoch_id(fed, "a", 1)])
    runs.prune(fed, older_than=OLD)
    assert left(fed) == [("a", 2), ("b", 2)]


def test_prune_looks_again_once_nobody_opens_an_attempt(fed: psycopg.Connection, ingested: str, loaderd: Run) -> None:
    """An attempt that is opened while prune is about to drop the epoch it goes back to keeps that epoch."""
    with psycopg.connect(ingested) as daemon:
        daemon.execute("SELECT pg_advisory_xact_lock(%s, id::integer) FROM run WHERE name = 'b'", [RUN_LOCK])
        process = subprocess.Popen([sys.executable, "-m", "loaderd", "prune", "--keep", "1"], stdout=subprocess.PIPE, text=True, cwd="/")
        waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND classid = %s AND NOT granted"
        assert wait_until(lambda: process.poll() is not None or fed.execute(waiting, [RUN_LOCK]).fetchone() == (1,))
        assert process.returncode is None, "prune did not wait for the lock of the run"
        daemon.execute(
            "INSERT INTO attempt (run_id, stream_id, attempt, num_ranks, epoch, step, position) "
            "SELECT run_id, stream_id, 3, 1, 0, 0, 4 FROM attempt t JOIN run r ON r.id = t.run_id WHERE r.name = 'b' AND attempt = 2"
        )
        daemon.commit()
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert left(fed) == [("a", 2), ("b", 0), ("b", 1), ("b", 2)]


def test_orders_that_nobody_asked_for(fed: psycopg.Connection, ingested: str) -> None:
    """An order prepared ahead over a day ago goes with what prune drops, unless its run is fed now, or something of it is in the ledger."""
    for run, age in (("a", "2 days"), ("b", "23 hours")):
        fed.execute(
            "INSERT INTO epoch (run_id, stream_id, epoch, num_samples, catalog_changes, planned_at) SELECT run_id, stream_id, 3, 3, 0, "
            "now() - %s::interval FROM attempt t JOIN run r ON r.id = t.run_id WHERE r.name = %s AND attempt = 1",
            [age, run],
        )
        fed.execute("INSERT INTO epoch_order SELECT %s, 0, '{1,2,3}', '{}'", [epoch_id(fed, run, 3)])
    with hold(ingested, fed, "a") as daemon:
        assert runs.prune(fed, older_than=timedelta(days=1000)) == runs.Pruned()
        daemon.execute("SELECT pg_advisory_unlock_all()")  # the session ends a moment after it is closed
    assert runs.prune(fed, run="b", older_than=timedelta(days=1000)) == runs.Pruned()
    tried = runs.prune(fed, older_than=timedelta(days=1000), dry_run=True)
    assert (tried.provisional, tried.bytes > 40, ("a", 3) in left(fed)) == (1, True, True)
    with fed.transaction(force_rollback=True):
        fed.execute(
            "INSERT INTO ledger (epoch_id, outcome, positions, consumer) VALUES (%s, 'delivered', '{[0,1)}', 'x')", [epoch_id(fed, "a", 3)]
        )
        assert runs.prune(fed, older_than=timedelta(days=1000)) == runs.Pruned()
    assert runs.prune(fed, older_than=timedelta(days=1000)) == tried
    assert ("a", 3) not in left(fed) and ("b", 3) in left(fed)
    assert runs.audit(fed).findings == []


def test_unknown_runs(conn: psycopg.Connection) -> None:
    """Asked for a run that is not there, no function answers for all runs instead."""
    for ask in (lambda: runs.audit(conn, "x"), lambda: runs.prune(conn, run="x"), lambda: runs.shown(conn, "x")):
        with pytest.raises(CatalogError, match="there is no run 'x'"):
            ask()
