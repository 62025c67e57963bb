"""The database's random order of what a stream feeds.

The order is SQL's alone: ``ORDER BY uuid_hash_extended(sample_key, hashint8extended(epoch, seed)), sample_key``. No Python shuffles
ids. It follows from what the samples are, so the same seed and content give the same order on any PostgreSQL, after dump and
restore, with any number of workers. (``hashint8extended`` on a bigint key would fold it to 32 bits first, and the same neighbours
would stay together in every epoch.)

The selection holds SQL that a user gave (``where``), so it runs under the login without write rights; what it returns is stored
by the owner, 1,024 positions a row. Of a large epoch the first 4,096 positions are taken by a top-N sort and stored at once, in the
same REPEATABLE READ snapshot as the full sort, so that training starts before that is done.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from typing import Any, LiteralString

import psycopg
from psycopg import IsolationLevel, sql

from catalog.database import Database
from catalog.errors import CatalogError
from loaderd.definitions import Definition
from loaderd.selections import SELECT_TIMEOUT_S, selection

PART = 1_024  # positions a row of epoch_order
FIRST = 4 * PART  # taken ahead by a top-N sort; whole parts
LARGE = 100_000  # samples from which the full sort is worth not waiting for (25 ms)
ORDER_LOCK = 1_554_429  # class of the advisory locks on run.id while an epoch is planned or begun
PLANNER_LOCK = 1_554_430  # and of those on epoch.id while its order is being stored
CANCEL_S = 0.5  # how long a cancelled selection has to end before it is cancelled again

Connection = psycopg.Connection[tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class Part:
    """1,024 positions (the last part: fewer): sample ids, annotation ids (all of the first structure, then …), the samples' keys."""

    number: int
    samples: list[int]
    annotations: list[int]
    keys: bytes
    total: int = 0  # positions of the whole order, where it was counted


@dataclass
class Plan:
    """An epoch whose order is stored, at least in part."""

    epoch_id: int
    epoch: int
    num_samples: int
    catalog_changes: int
    stored: int = 0  # positions
    final: bool = False  # somebody was fed from it
    foreign: bool = False  # another process stores the rest
    failed: BaseException | None = None
    _grew: threading.Condition = field(default_factory=threading.Condition, repr=False)

    def wait_for(self, positions: int) -> None:
        """Return when that many positions are stored. Raises what kept the rest from being stored."""
        with self._grew:
            self._grew.wait_for(lambda: self.stored >= positions or self.failed is not None)
            if self.stored < positions and self.failed is not None:
                raise self.failed

    def grew(self, stored: int, failed: BaseException | None = None) -> None:
        """Tell waiting threads how far the order is stored."""
        with self._grew:
            self.stored, self.failed = max(self.stored, stored), failed
            self._grew.notify_all()


def find(conn: Connection, run_id: int, stream_id: int, epoch: int) -> Plan | None:
    """Return an epoch that was planned before, with how much of its order is stored."""
    row = conn.execute(
        "SELECT e.id, e.epoch, e.num_samples, e.catalog_changes, CASE WHEN e.order_sha256 IS NOT NULL THEN e.num_samples "
        "ELSE (SELECT coalesce(sum(cardinality(o.sample_ids)), 0) FROM epoch_order o WHERE o.epoch_id = e.id) END::bigint, "
        "e.started_at IS NOT NULL FROM epoch e WHERE e.run_id = %s AND e.stream_id = %s AND e.epoch = %s",
        [run_id, stream_id, epoch],
    ).fetchone()
    return None if row is None else Plan(*row)


class Planner:
    """Takes and stores the orders of one stream in one run. Used by one thread; holds two connections.

    Every rank has one, on any host. The first to come plans an epoch, under an advisory lock, and the others find its order: so they
    cannot cut the catalog differently. Of a large epoch, whoever plans it holds a second lock until all of it is stored; if that lock
    is free and the order is not whole, its planner died.
    """

    def __init__(self, database: Database, definition: Definition, run_id: int, stream_id: int) -> None:
        self.database, self.definition = database, definition
        self.run_id, self.stream_id = run_id, stream_id
        self._rest: threading.Thread | None = None
        self._storing = -1  # the epoch whose order it stores
        self._broken_off = False
        self._last: Plan | None = None
        self.epoch: int | None = None  # that is being planned, or was last
        self.connect()

    def connect(self) -> None:
        """Open both connections, also anew."""
        self._broken_off = False
        self.reading = self.database.read_only(timeout_s=SELECT_TIMEOUT_S)
        self.reading.autocommit = True  # what this connection does otherwise is rolled back, settings too
        with contextlib.suppress(psycopg.Error):  # not on every system; else a daemon that was killed leaves a sort running
            self.reading.execute("SET client_connection_check_interval = '1s'")
        self.reading.autocommit = False
        self.reading.isolation_level = IsolationLevel.REPEATABLE_READ
        self.writing = self.database.connect(application_name="loaderd order")
        # An order that is lost in a crash of PostgreSQL is taken again; the reservation that follows waits for the disk for both.
        self.writing.execute("SET synchronous_commit = off")
        self.writing.commit()

    def plan(self, epoch: int, shape: tuple[int, int] | None, expected: int, *, locked: bool = False) -> Plan:
        """Find an epoch's order, or take it and store it, all or (of a large one) the first 4,096 positions; the rest follows by a thread.

        `shape` is that of all images, None where they may differ. `expected` is about how many samples there are: it only decides whether
        the epoch is a large one. `locked`: the caller holds the run's lock, on another connection.
        """
        if self._rest is not None:
            self._rest.join()  # it has the connections
            self._rest = None
        self.epoch = epoch
        if self.reading.closed or self.writing.closed:
            self.close()
            self.connect()
        self.reading.rollback()
        self.writing.rollback()
        if not locked:
            self.writing.execute("SELECT pg_advisory_xact_lock(%s, %s::integer)", [ORDER_LOCK, self.run_id])
        changes = _one(self.reading, "SELECT count(*) FROM catalog_change")
        found = find(self.writing, self.run_id, self.stream_id, epoch)
        if found is not None:
            if found.stored < found.num_samples and not self._being_stored(found):
                if found.final:
                    return self._complete(found, shape, changes)
            elif found.final or found.catalog_changes == changes:
                found.foreign = found.stored < found.num_samples
                self.writing.rollback()
                self.reading.rollback()
                if not found.foreign:
                    self._last = found
                return found
            self._forget(found)
        self._last = None if self.definition.where else self._usable(self._last, changes) or self._usable(self._newest(), changes)
        if expected < LARGE:
            parts = list(self._parts(epoch, shape))
            plan = self._insert_epoch(epoch, sum(len(part.samples) for part in parts), changes)
            self._store(plan, parts)
            self.reading.rollback()
            self._last = plan
            return plan
        parts = list(self._parts(epoch, shape, first=FIRST))
        plan = self._insert_epoch(epoch, self._last.num_samples if self._last is not None else parts[0].total if parts else 0, changes)
        self.writing.execute("SELECT pg_advisory_lock(%s, %s::integer)", [PLANNER_LOCK, plan.epoch_id])
        for part in parts:
            self._insert(plan, part)
        self.writing.commit()
        plan.grew(min(FIRST, plan.num_samples))
        self._store_behind(plan, shape)
        return plan

    def cancel(self) -> None:
        """Break off a selection that is running; from another thread."""
        with contextlib.suppress(psycopg.Error):
            self.reading.cancel_safe(timeout=2)

    def close(self, begun: int = -1) -> None:
        """Give up both connections; an order of an epoch up to `begun` is stored to its end first, since somebody may go on in it."""
        # First its thread ends: libpq frees a connection that is closed, also under a thread that reads from it, and the process aborts.
        while self._rest is not None and self._rest.is_alive():
            if self._storing > begun:
                self._broken_off = True
                self.cancel()  # else PostgreSQL goes on sorting for nobody
            self._rest.join(CANCEL_S)  # again, as between two statements there is nothing to cancel
        self.reading.close()
        self.writing.close()

    def _newest(self) -> Plan | None:
        """Return the whole order of this stream that was planned last, in whatever run: what it fed need not be selected again."""
        row = self.writing.execute(
            "SELECT id, epoch, num_samples, catalog_changes FROM epoch WHERE stream_id = %s AND order_sha256 IS NOT NULL "
            "AND pruned_at IS NULL ORDER BY id DESC LIMIT 1",
            [self.stream_id],
        ).fetchone()
        return None if row is None else Plan(*row)

    def _usable(self, plan: Plan | None, changes: int) -> Plan | None:
        """Return an earlier order if the catalog is as it was and nobody deleted it."""
        if plan is None or plan.catalog_changes != changes:
            return None
        there = "SELECT count(*) FROM epoch WHERE id = %s AND order_sha256 IS NOT NULL AND pruned_at IS NULL"
        return plan if _one(self.reading, there, [plan.epoch_id]) else None

    def _being_stored(self, plan: Plan) -> bool:
        lock = "SELECT pg_try_advisory_xact_lock(%s, %s::integer)"
        row = self.writing.execute(lock, [PLANNER_LOCK, plan.epoch_id]).fetchone()
        return row is None or not row[0]

    def _forget(self, plan: Plan) -> None:
        """Delete an order that nobody was fed from, with what was reserved of it ahead."""
        self.writing.execute(
            "DELETE FROM ledger WHERE epoch_id = (SELECT id FROM epoch WHERE id = %s AND started_at IS NULL)", [plan.epoch_id]
        )
        self.writing.execute("DELETE FROM epoch WHERE id = %s AND started_at IS NULL", [plan.epoch_id])
        if self._last is not None and self._last.epoch_id == plan.epoch_id:
            self._last = None

    def _complete(self, plan: Plan, shape: tuple[int, int] | None, changes: int) -> Plan:
        """Go on where a planner died behind the first positions, which somebody was fed."""
        self._last = None
        if plan.catalog_changes != changes:
            raise CatalogError(
                f"epoch {plan.epoch}: its order was cut off by a crash and the catalog changed since, so its rest is unknown; "
                f"set epoch {plan.epoch + 1} and step 0 in the state to go on behind it, or choose another run"
            )
        self.writing.execute("SELECT pg_advisory_lock(%s, %s::integer)", [PLANNER_LOCK, plan.epoch_id])
        self.writing.commit()
        self._store_behind(plan, shape)
        return plan

    def _store_behind(self, plan: Plan, shape: tuple[int, int] | None) -> None:
        self._storing = plan.epoch
        self._rest = threading.Thread(target=self._store_rest, args=(plan, shape), name="order", daemon=True)
        self._rest.start()

    def _store_rest(self, plan: Plan, shape: tuple[int, int] | None) -> None:
        try:
            with contextlib.closing(self._parts(plan.epoch, shape)) as parts:
                self._store(plan, parts)
            self.writing.execute("SELECT pg_advisory_unlock(%s, %s::integer)", [PLANNER_LOCK, plan.epoch_id])
            self.writing.commit()
            self.reading.rollback()
            self._last = plan
        except BaseException as error:
            plan.grew(plan.stored, error)
            with contextlib.suppress(psycopg.Error):
                self.writing.rollback()
                self.writing.execute("SELECT pg_advisory_unlock_all()")
                self.writing.commit()

    def _store(self, plan: Plan, parts: Iterable[Part]) -> None:
        digest = hashlib.sha256()
        stored = 0
        for part in parts:
            if self._broken_off:
                raise CatalogError(f"epoch {plan.epoch}: its order was broken off, as the trainer left")
            digest.update(part.keys)
            stored += len(part.samples)
            if stored > plan.stored:
                self._insert(plan, part)
        self.writing.execute("UPDATE epoch SET order_sha256 = %s WHERE id = %s", [digest.digest(), plan.epoch_id])
        self.writing.commit()
        plan.grew(stored)

    def _insert_epoch(self, epoch: int, num_samples: int, changes: int) -> Plan:
        epoch_id = _one(
            self.writing,
            "INSERT INTO epoch (run_id, stream_id, epoch, num_samples, catalog_changes) VALUES (%s, %s, %s, %s, %s) RETURNING id",
            [self.run_id, self.stream_id, epoch, num_samples, changes],
        )
        return Plan(epoch_id, epoch, num_samples, changes)

    def _insert(self, plan: Plan, part: Part) -> None:
        self.writing.execute(
            "INSERT INTO epoch_order (epoch_id, part, sample_ids, annotation_ids) VALUES (%s, %s, %s::text::bigint[], %s::text::bigint[])",
            # As text: psycopg dumps a list of 1,024 numbers element by element, in 0.5 ms.
            [plan.epoch_id, part.number, _array(part.samples), _array(part.annotations)],
        )

    def _fed(self) -> tuple[sql.Composed, dict[str, Any]]:
        """Return the query of what is fed: of a catalog that did not change since the last epoch, what that one fed.

        Looking samples up by their ids takes a seventh of selecting them anew from the view. Not where a condition of the user's could
        change its mind.
        """
        if self._last is None:
            return selection(self.definition)
        numbers = [sql.SQL(str(number)) for number in range(1, self.definition.annotations + 1)]
        slices = [
            sql.SQL(", e.annotation_ids[cardinality(e.sample_ids) * ({k} - 1) + 1 : cardinality(e.sample_ids) * {k}]").format(k=number)
            for number in numbers
        ]
        columns = [sql.SQL("a{}").format(number) for number in numbers]
        return sql.SQL(
            "SELECT i.id AS sample_id, i.sample_key, ARRAY[{columns}]::bigint[] AS annotation_ids, i.rows, i.columns FROM epoch_order e "
            "CROSS JOIN LATERAL unnest(e.sample_ids{slices}) AS s (id{names}) JOIN image i ON i.id = s.id WHERE e.epoch_id = %(last)s"
        ).format(
            columns=sql.SQL(", ").join(columns),
            slices=sql.SQL("").join(slices),
            names=sql.SQL("").join(sql.SQL(", {}").format(column) for column in columns),
        ), {"last": self._last.epoch_id}

    def _parts(self, epoch: int, shape: tuple[int, int] | None, first: int | None = None) -> Generator[Part]:
        """Yield the epoch's order; a whole order at once below `LARGE`.

        There the statement stays prepared: planning it took 17 ms on a busy machine. The first positions of a selection come with its
        count: a query of its own would make all of it once more.
        """
        query, parameters = self._fed()
        order = order_by(self.definition)
        limit = sql.SQL("") if first is None else sql.SQL(" ORDER BY {} LIMIT {}").format(order, sql.Literal(first))
        drawn_here = sql.SQL("array_agg(annotation_ids ORDER BY position)" if self.definition.drawn else "NULL")
        counted = sql.SQL(", count(*) OVER () AS total" if first is not None and self._last is None else ", 0 AS total")
        whole = sql.SQL(
            "SELECT (position / {part})::integer, array_agg(sample_id ORDER BY position), {drawn}, "
            "string_agg(uuid_send(sample_key), '' ORDER BY position), min(rows), max(rows), min(columns), max(columns), min(total) FROM ("
            "SELECT *, row_number() OVER (ORDER BY {order}) - 1 AS position FROM (SELECT *{counted} FROM ({query}) AS fed{limit}) AS taken"
            ") AS placed GROUP BY 1 ORDER BY 1"
        ).format(part=sql.Literal(PART), drawn=drawn_here, order=order, counted=counted, query=query, limit=limit)
        parameters |= {"epoch": epoch, "seed": self.definition.seed}
        with self.reading.cursor(binary=True) as cursor:
            if first is None and self._rest is None:
                rows: Iterable[Any] = cursor.execute(whole, parameters, prepare=True).fetchall()
            else:
                rows = cursor.stream(whole, parameters)
            for number, samples, drawn, keys, *extent, total in rows:
                _same_shape((extent[0], extent[2]), shape)
                _same_shape((extent[1], extent[3]), shape)
                annotations = [annotation for column in zip(*(drawn or []), strict=True) for annotation in column]
                yield Part(number, samples, annotations, bytes(keys), total)


def _same_shape(found: tuple[int, int], shape: tuple[int, int] | None) -> None:
    if shape is not None and found != shape:
        was, now = "×".join(map(str, shape)), "×".join(map(str, found))
        raise CatalogError(f"the catalog now has images of {now} in this stream, which began with {was}; open a new Feed")


def order_by(definition: Definition) -> sql.SQL:
    """Return the ORDER BY of an epoch, over ``sample_key`` and the parameters epoch and seed."""
    if not definition.shuffle:
        return sql.SQL("sample_key")
    return sql.SQL("uuid_hash_extended(sample_key, hashint8extended(%(epoch)s::bigint, %(seed)s::bigint)), sample_key")


def _array(numbers: list[int]) -> str:
    return "{" + ",".join(map(str, numbers)) + "}"


def _one(conn: Connection, query: LiteralString, parameters: list[Any] | None = None) -> int:
    row = conn.execute(query, parameters).fetchone()
    assert row is not None
    return int(row[0])
