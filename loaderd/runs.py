"""What runs left in the database: listing, notes, the proof of what was fed, and dropping the detail of what is long over.

Functions of an open connection. The caller owns the transaction, but for `prune`, which commits epoch by epoch and takes an
autocommitting connection.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, LiteralString

import psycopg
from psycopg.rows import dict_row

from catalog.errors import UsageError
from loaderd.attempts import CONSUMER_LOCK, RUN_LOCK
from loaderd.orders import ORDER_LOCK

Connection = psycopg.Connection[tuple[Any, ...]]
Row = dict[str, Any]

# Its daemon holds an advisory lock on the consumer's id, until it dies.
LIVE_CONSUMER: LiteralString = (
    "SELECT k.* FROM consumer k JOIN pg_locks l ON l.locktype = 'advisory' AND l.classid::bigint = %(lock)s AND l.objid::bigint = k.id "
    "AND l.objsubid = 2 AND l.granted AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())"
)

ORDER_BYTES: LiteralString = "40 + pg_column_size(o.sample_ids) + pg_column_size(o.annotation_ids)"  # 40: header, pointer, key

# What a started epoch's rows say, and whether its order is what it was. Part by part: image's index is asked 1,024 keys at a time.
# What must be stored of an order: all of it once it is whole or the epoch over, else what was given out of it.
EVIDENCE: LiteralString = (
    "SELECT c.run, c.stream, c.stream_name, c.epoch, c.planned, c.missing, c.twice, l.beyond, e.order_sha256 AS noted, o.found, o.erased, "
    "CASE WHEN c.pruned_at IS NOT NULL THEN 0 WHEN e.order_sha256 IS NOT NULL OR c.finished THEN c.planned "
    "ELSE least(l.upto, c.planned) END - o.stored AS not_stored, c.pruned_at IS NOT NULL AS pruned, "
    "c.finished FROM epoch_coverage c JOIN run r ON r.name = c.run "
    "JOIN epoch e ON e.run_id = r.id AND e.stream_id = c.stream AND e.epoch = c.epoch "
    "CROSS JOIN LATERAL (SELECT coalesce(sum(cardinality(p.sample_ids)), 0)::bigint AS stored, "
    "sha256(coalesce(string_agg(k.keys, '' ORDER BY p.part), '')) AS found, coalesce(sum(k.erased), 0)::bigint AS erased "
    "FROM epoch_order p CROSS JOIN LATERAL ("
    "SELECT string_agg(uuid_send(i.sample_key), '' ORDER BY s.n) AS keys, "
    "count(*) FILTER (WHERE i.id IS NULL AND EXISTS (SELECT FROM erasure x WHERE s.id = ANY(x.image_ids))) AS erased "
    "FROM unnest(p.sample_ids) WITH ORDINALITY AS s (id, n) LEFT JOIN image i ON i.id = s.id) k WHERE p.epoch_id = e.id) o "
    "CROSS JOIN LATERAL (SELECT coalesce(max(upper(x.positions)), 0) AS upto, "
    "length_of(range_agg(x.positions) - int8multirange(int8range(0, e.num_samples))) AS beyond FROM ledger x WHERE x.epoch_id = e.id) l "
)

# Orders that were prepared ahead, and the daemon died before anybody asked for them.
PROVISIONAL: LiteralString = (
    f"SELECT e.id AS epoch_id, e.run_id, (SELECT coalesce(sum({ORDER_BYTES}), 0) FROM epoch_order o WHERE o.epoch_id = e.id)::bigint "  # noqa: S608
    f"AS bytes FROM epoch e JOIN run r ON r.id = e.run_id WHERE e.started_at IS NULL AND e.planned_at < now() - interval '1 day' "
    f"AND NOT EXISTS (SELECT FROM ledger l WHERE l.epoch_id = e.id) "
    f"AND NOT EXISTS (SELECT FROM ({LIVE_CONSUMER}) k WHERE k.run_id = e.run_id) "
)

WORDS = {
    "missing": "{} of {} positions are missing from the ledger",
    "twice": "{} of {} positions are in the ledger twice",
    "beyond": "{} positions are in the ledger that its order of {} does not have",
    "not_stored": "{} of {} positions of its order are not stored",
    "unsigned": "its order of {} positions has lost its sha256",
    "changed": "its stored order of {} positions is not the one that was fed: its sha256 differs from epoch.order_sha256",
}


@dataclass(frozen=True)
class Finding:
    """Something about an epoch that must not be."""

    run: str
    stream: int
    stream_name: str | None
    epoch: int
    what: str
    count: int
    planned: int

    def __str__(self) -> str:
        where = f"run {self.run!r}, stream {called(self.stream, self.stream_name)}, epoch {self.epoch}"
        return f"{where}: {WORDS[self.what].format(self.count, self.planned)}"


@dataclass
class Audited:
    """What an audit looked at, and what it found."""

    runs: int
    epochs: int
    findings: list[Finding]
    erased: int = 0  # positions of patients who were erased since: what was fed there cannot be compared with the order any more


@dataclass
class Pruned:
    """What was dropped, or would be."""

    epochs: list[Row] = field(default_factory=list)  # run, stream, stream_name, epoch, bytes
    provisional: int = 0
    bytes: int = 0
    findings: list[Finding] = field(default_factory=list)  # of the epochs that were left alone


# ------------------------------------------------------------------------------------------ looking


def called(stream: int, name: str | None) -> str:
    """Return what people call a stream: its name, or the number of one without."""
    return repr(name) if name else f"#{stream}"


def run_id(conn: Connection, run: str) -> int:
    """Return the id of the run of that name, or raise UsageError."""
    row = conn.execute("SELECT id FROM run WHERE name = %s", [run]).fetchone()
    if row is None:
        raise UsageError(f"there is no run {run!r} in this catalog; see `loaderd run list`")
    return int(row[0])


def listed(conn: Connection) -> list[Row]:
    """Return every run: name, opened, live, streams, attempts, last epoch, delivered samples, models."""
    return _rows(
        conn,
        f"WITH live AS MATERIALIZED ({LIVE_CONSUMER}) SELECT r.name AS run, r.created_at AS opened, "  # noqa: S608
        "EXISTS (SELECT FROM live WHERE live.run_id = r.id) AS live, "
        "coalesce((SELECT jsonb_agg(DISTINCT jsonb_build_object('stream', s.id, 'stream_name', s.name)) FROM attempt t "
        "JOIN stream s ON s.id = t.stream_id WHERE t.run_id = r.id), '[]') AS streams, "
        "(SELECT count(*) FROM attempt t WHERE t.run_id = r.id) AS attempts, "
        "c.last_epoch, coalesce(c.delivered, 0) AS delivered, coalesce((SELECT array_agg(encode(n.model_sha256, 'hex') ORDER BY n.id) "
        "FROM run_note n WHERE n.run_id = r.id AND n.model_sha256 IS NOT NULL), '{}') AS models FROM run r LEFT JOIN ("
        "SELECT run, max(epoch) AS last_epoch, sum(delivered)::bigint AS delivered FROM epoch_coverage GROUP BY run"
        ") c ON c.run = r.name ORDER BY r.id",
        {"lock": CONSUMER_LOCK},
    )


def shown(conn: Connection, run: str) -> Row:
    """Return all that is known of a run: attempts, consumers, coverage of its epochs, notes, provenance."""
    parameters = {"run": run, "id": run_id(conn, run), "lock": CONSUMER_LOCK}
    [head] = _rows(
        conn,
        "SELECT name AS run, created_at AS opened, program_version, host FROM run WHERE id = %(id)s",
        parameters,
    )
    return {
        **head,
        "attempts": _rows(
            conn,
            "SELECT stream_id AS stream, attempt, num_ranks, epoch, step, position, opened_at AS opened FROM attempt "
            "WHERE run_id = %(id)s ORDER BY id",
            parameters,
        ),
        "consumers": _rows(
            conn,
            f"WITH live AS MATERIALIZED ({LIVE_CONSUMER}) "  # noqa: S608
            "SELECT id AS consumer, stream_id AS stream, attempt, rank, num_ranks, host, pid, uid, attached_at AS attached, "
            "left_at AS left, reason, id IN (SELECT id FROM live) AS live FROM consumer WHERE run_id = %(id)s ORDER BY id",
            parameters,
        ),
        "epochs": _rows(
            conn,
            "SELECT stream, stream_name, epoch, planned, delivered, acknowledged, dropped, revoked, unreadable, missing, twice, replayed, "
            "finished, encode(order_sha256, 'hex') AS order_sha256, started_at AS started, pruned_at AS pruned FROM epoch_coverage "
            "WHERE run = %(run)s ORDER BY stream, epoch",
            parameters,
        ),
        "notes": _rows(
            conn,
            "SELECT at, actor, note, encode(model_sha256, 'hex') AS model_sha256 FROM run_note WHERE run_id = %(id)s ORDER BY id",
            parameters,
        ),
        "provenance": _rows(conn, "SELECT * FROM run_provenance WHERE run = %(run)s ORDER BY stream", parameters),
    }


def consumers_of(conn: Connection, stream_id: int) -> list[Row]:
    """Return who is fed from a stream now, on any host."""
    return _rows(
        conn,
        f"SELECT k.id AS consumer, r.name AS run, k.attempt, k.rank, k.num_ranks, k.host, k.pid, k.attached_at AS attached "  # noqa: S608
        f"FROM ({LIVE_CONSUMER}) k LEFT JOIN run r ON r.id = k.run_id WHERE k.stream_id = %(stream)s ORDER BY k.id",
        {"lock": CONSUMER_LOCK, "stream": stream_id},
    )


def runs_of(conn: Connection, stream_id: int) -> list[Row]:
    """Return the runs that were fed from a stream: name, attempts, last epoch."""
    return _rows(
        conn,
        "SELECT r.name AS run, count(*) AS attempts, (SELECT max(e.epoch) FROM epoch e WHERE e.run_id = r.id "
        "AND e.stream_id = %(stream)s AND e.started_at IS NOT NULL) AS last_epoch FROM attempt t JOIN run r ON r.id = t.run_id "
        "WHERE t.stream_id = %(stream)s GROUP BY r.id ORDER BY r.id",
        {"stream": stream_id},
    )


def note(conn: Connection, run: str, text: str, model_sha256: bytes | None, actor: str) -> None:
    """Note something of a run: a remark, a model that it made, or both."""
    conn.execute(
        "INSERT INTO run_note (run_id, actor, note, model_sha256) VALUES (%s, %s, %s, %s)", [run_id(conn, run), actor, text, model_sha256]
    )


# ------------------------------------------------------------------------------------------ proving


def audit(conn: Connection, run: str | None = None) -> Audited:
    """Look whether everything that was planned is accounted for, once, and whether the orders are those that were fed."""
    if run is None:
        rows = _rows(conn, EVIDENCE + "ORDER BY r.id, c.stream, c.epoch", {})
        [counted] = _rows(conn, "SELECT count(*) AS runs FROM run", {})
        return _audited(counted["runs"], rows)
    run_id(conn, run)
    rows = _rows(conn, EVIDENCE + "WHERE c.run = %(run)s ORDER BY c.stream, c.epoch", {"run": run})
    return _audited(1, rows)


def _audited(runs: int, rows: list[Row]) -> Audited:
    return Audited(runs, len(rows), [finding for row in rows for finding in _findings(row)], sum(row["erased"] for row in rows))


def _findings(row: Row) -> list[Finding]:
    whole = not row["pruned"] and row["not_stored"] <= 0
    counts = {
        "missing": row["missing"],
        "twice": row["twice"],
        "beyond": row["beyond"],
        "not_stored": row["not_stored"],
        "unsigned": row["planned"] if whole and row["finished"] and row["noted"] is None else 0,
        "changed": max(row["planned"], 1) if whole and not row["erased"] and row["noted"] not in (None, row["found"]) else 0,
    }
    where = (row["run"], row["stream"], row["stream_name"], row["epoch"])
    return [Finding(*where, what, count, row["planned"]) for what, count in counts.items() if count > 0]


# ------------------------------------------------------------------------------------------ dropping
def prune(
    conn: Connection, *, run: str | None = None, older_than: timedelta | None = None, keep: int | None = None, dry_run: bool = False
) -> Pruned:
    """Drop orders and ledger rows of epochs that are over, keeping digest, summary and whose samples they delivered.

    Only of epochs that all the conditions given fit. Never of one at which an audit finds something, nor of the newest of a run and
    stream: it may be resumed in. Nor of the one before it while a rank may still be at its last batch. Orders that were prepared ahead
    by a daemon that died go, too.

    Raises:
        UsageError: If no condition is given, or there is no such run.
    """
    if run is None and older_than is None and keep is None:
        raise UsageError("prune: say what may go: --older-than 90d, --keep N (epochs of each run and stream) or --run RUN")
    if run is not None:
        run_id(conn, run)
    candidates = _rows(
        conn,
        "SELECT * FROM (SELECT r.id AS run_id, e.id AS epoch_id, c.run, c.stream, c.epoch, c.finished, c.pruned_at, "
        "NOT EXISTS (SELECT FROM ledger l WHERE l.epoch_id = e.id AND l.outcome = 'delivered' AND l.acknowledged <> l.positions AND "
        "l.attempt = (SELECT max(t.attempt) FROM attempt t WHERE t.run_id = e.run_id AND t.stream_id = e.stream_id)) AS acknowledged, "
        "greatest(e.started_at, (SELECT max(l.at) FROM ledger l WHERE l.epoch_id = e.id)) "
        "AS fed_at, row_number() OVER (PARTITION BY c.run, c.stream ORDER BY c.epoch DESC) AS nth "
        "FROM epoch_coverage c JOIN run r ON r.name = c.run JOIN epoch e ON e.run_id = r.id AND e.stream_id = c.stream "
        "AND e.epoch = c.epoch WHERE e.started_at IS NOT NULL AND (%(run)s::text IS NULL OR c.run = %(run)s) "
        # An epoch that a later attempt went back before is none any more: the newest is the one that it came to.
        "AND (c.finished OR c.delivered + c.dropped + c.revoked + c.unreadable > 0)) AS fed "
        "WHERE finished AND pruned_at IS NULL AND nth > %(keep)s AND (nth > 2 OR acknowledged) "
        "AND (%(older)s::interval IS NULL OR fed_at < now() - %(older)s) ORDER BY run_id, stream, epoch",
        {"run": run, "keep": max(keep or 1, 1), "older": older_than},
    )
    pruned = Pruned()
    for one in candidates:
        _prune_epoch(conn, one, pruned, dry_run)
    for one in _rows(conn, PROVISIONAL + "AND (%(run)s::text IS NULL OR r.name = %(run)s)", {"run": run, "lock": CONSUMER_LOCK}):
        with conn.transaction():
            _prune_provisional(conn, one, pruned, dry_run)
    return pruned


def _prune_epoch(conn: Connection, one: Row, pruned: Pruned, dry_run: bool) -> None:
    of_epoch: LiteralString = "WHERE c.run = %(run)s AND c.stream = %(stream)s AND c.epoch = %(epoch)s "
    [evidence] = _rows(conn, EVIDENCE + of_epoch, one)
    if found := _findings(evidence):
        pruned.findings += found
        return
    # All that takes long comes before the lock: an order is never changed, and of an epoch that is over the ledger is not either.
    [kept] = _rows(
        conn,
        f"SELECT (SELECT coalesce(sum({ORDER_BYTES}), 0) FROM epoch_order o WHERE o.epoch_id = %(epoch_id)s)::bigint "  # noqa: S608
        "+ (SELECT coalesce(sum(pg_column_size(l)), 0) FROM ledger l WHERE l.epoch_id = %(epoch_id)s)::bigint AS bytes, "
        "ARRAY(SELECT DISTINCT st.patient_id FROM epoch_order o "
        "CROSS JOIN LATERAL unnest(o.sample_ids) WITH ORDINALITY AS s (id, n) JOIN image i ON i.id = s.id "
        "JOIN instance ins ON ins.id = i.instance_id JOIN series se ON se.id = ins.series_id JOIN study st ON st.id = se.study_id "
        # Also what a later attempt replaced: somebody saw it.
        "WHERE o.epoch_id = %(epoch_id)s AND o.part * 1024 + s.n - 1 <@ (SELECT range_agg(l.positions) FROM ledger l "
        "WHERE l.epoch_id = %(epoch_id)s AND l.outcome = 'delivered') ORDER BY 1) AS patients",
        one,
    )
    with conn.transaction():
        # Whoever opens an attempt holds this lock, and may have gone back to this epoch since it was looked at.
        conn.execute("SELECT pg_advisory_xact_lock(%s, %s::integer)", [RUN_LOCK, one["run_id"]])
        summary = _rows(
            conn,
            "SELECT to_jsonb(c)::text AS summary FROM epoch_coverage c "  # noqa: S608
            + of_epoch
            + "AND c.finished AND c.missing = 0 AND c.twice = 0 AND c.pruned_at IS NULL",
            one,
        )
        if not summary:
            return
        if not dry_run:
            conn.execute(
                "UPDATE epoch SET pruned_at = now(), summary = %(summary)s, patients = %(patients)s WHERE id = %(epoch_id)s",
                {**one, **kept, **summary[0]},
            )
            conn.execute("DELETE FROM ledger WHERE epoch_id = %(epoch_id)s", one)
            conn.execute("DELETE FROM epoch_order WHERE epoch_id = %(epoch_id)s", one)
    where = {"run": one["run"], "stream": one["stream"], "stream_name": evidence["stream_name"], "epoch": one["epoch"]}
    pruned.epochs.append({**where, "bytes": kept["bytes"]})
    pruned.bytes += kept["bytes"]


def _prune_provisional(conn: Connection, one: Row, pruned: Pruned, dry_run: bool) -> None:
    # Whoever plans or begins an epoch holds this lock, and attached before; so look again under it.
    conn.execute("SELECT pg_advisory_xact_lock(%s, %s::integer)", [ORDER_LOCK, one["run_id"]])
    for row in _rows(conn, PROVISIONAL + "AND e.id = %(epoch_id)s", {**one, "lock": CONSUMER_LOCK}):
        if not dry_run:
            conn.execute("DELETE FROM epoch WHERE id = %(epoch_id)s", row)
        pruned.provisional += 1
        pruned.bytes += row["bytes"]


def age(text: str) -> timedelta:
    """Return how long `90d`, `12h` or `4w` is, or raise UsageError."""
    match = re.fullmatch(r"([0-9]{1,5})([hdw])", text)
    if match is None:
        raise UsageError(f"--older-than {text!r}: must be a whole number and h, d or w, such as 90d")
    return int(match[1]) * {"h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}[match[2]]


def _rows(conn: Connection, query: LiteralString, parameters: Row) -> list[Row]:
    with conn.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(query, parameters).fetchall()
