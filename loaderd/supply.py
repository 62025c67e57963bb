"""The threads of a stream that speak with the database: one fetches work and keeps the ledger, one plans the epochs to come.

The daemon's loop must never wait for PostgreSQL. It puts commands into a queue; a thread carries them out one after the other and
posts what came of them. Planning has a thread of its own, since a plan takes as long as fetching several thousand samples. Work is
fetched about 1,000 positions at a time by one query, in which the server itself writes each sample's row as JSON: here it is passed
on to the workers unread.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, LiteralString

import psycopg
from psycopg import sql

from catalog.database import Database, explain
from catalog.errors import CatalogError, DatabaseError
from loaderd import ledger, orders
from loaderd.ledger import Span
from loaderd.orders import Definition, Plan

CHUNK = 1_024  # positions a query, rounded down to whole batches
KEPT = 16_384  # samples: streams of up to so many keep their work (about 1 KB a sample) while the catalog stands still

WORK_MEMORY = "64MB"  # for the sort of a chunk, which would spill to disk with PostgreSQL's 4 MB (59 ms a chunk, then 43)


def work_query(structures: int) -> sql.Composed:
    """Return the query of the work for positions first … end of an epoch: a row and the masks' bits for each.

    The annotations are those of the order, not those that are current now: an epoch is fed as it was planned. The masks' boxes and bits
    stand in the order of the stream's structures, null and nothing where there is none. A join a structure: one lateral join for all
    took twice as long.
    """
    numbers = range(1, structures + 1)

    def each(text: LiteralString, between: LiteralString) -> sql.Composed:
        return sql.SQL(between).join(sql.SQL(text).format(k=sql.SQL(str(number))) for number in numbers)

    boxes = each(
        "CASE WHEN m{k}.bits IS NOT NULL THEN json_build_array(m{k}.box_row, m{k}.box_column, m{k}.box_rows, m{k}.box_columns) END", ", "
    )
    bits = each("coalesce(m{k}.bits, '')", " || ") if structures else sql.SQL("''::bytea")
    slices = each(", e.annotation_ids[cardinality(e.sample_ids) * ({k} - 1) + 1 : cardinality(e.sample_ids) * {k}]", "")
    drawn = each(", a{k}", "")
    masks = each(
        "LEFT JOIN pairing p{k} ON p{k}.annotation_id = s.a{k} AND p{k}.image_id = i.id LEFT JOIN mask m{k} ON m{k}.pairing_id = p{k}.id ",
        "",
    )
    return sql.SQL(
        "SELECT convert_to(json_build_array(i.id, encode(uuid_send(i.sample_key), 'hex'), ro.url, f.path, f.size, f.mtime_ns, "
        "l.byte_offset, l.byte_length, l.dtype, i.slope, i.intercept, i.frame, i.rows, i.columns, n.sop_instance_uid, "
        "encode(i.pixel_hash, 'hex'), json_build_array({boxes}))::text, 'UTF8'), {bits} "
        "FROM epoch_order e CROSS JOIN LATERAL unnest(e.sample_ids{slices}) WITH ORDINALITY AS s (id{drawn}, n) "
        "JOIN image i ON i.id = s.id JOIN instance n ON n.id = i.instance_id "
        "LEFT JOIN location l ON l.image_id = i.id AND l.preferred LEFT JOIN file f ON f.id = l.file_id "
        "LEFT JOIN root ro ON ro.id = f.root_id "
        "{masks}WHERE e.epoch_id = %(epoch)s AND e.part BETWEEN %(first)s / %(part)s AND (%(end)s - 1) / %(part)s "
        "AND e.part * %(part)s + s.n - 1 >= %(first)s AND e.part * %(part)s + s.n - 1 < %(end)s ORDER BY e.part, s.n"
    ).format(boxes=boxes, bits=bits, slices=slices, drawn=drawn, masks=masks)


@dataclass(frozen=True, slots=True)
class Opened:
    """The stream is open: its run, the shape of its images and how many samples it has now."""

    run: str
    rows: int
    columns: int
    num_samples: int


@dataclass(frozen=True, slots=True)
class Planned:
    """An epoch's order is stored (of a large one, its beginning)."""

    plan: Plan


@dataclass(frozen=True, slots=True)
class Started:
    """The epoch that was prepared is final, and this reservation is durable (None: it had fetched nothing)."""

    plan: Plan
    ledger_id: int | None


@dataclass(frozen=True, slots=True)
class Fetched:
    """Work for positions first … end: a row and the masks' bits for each. `ledger_id`: reserved already."""

    plan: Plan
    span: Span
    work: list[tuple[bytes, bytes]]
    ledger_id: int | None


@dataclass(frozen=True, slots=True)
class Failed:
    """A command failed; the stream ends with this."""

    error: CatalogError


Command = Callable[[], "Event | None"]
Event = Opened | Planned | Started | Fetched | Failed


class Supply:
    """Carries out a stream's commands in order; `post` is called with what came of them, from this thread."""

    def __init__(
        self, database: Database, definition: Definition, *, run: str | None, consumer: str, post: Callable[[Event], None]
    ) -> None:
        self.database, self.definition, self.consumer = database, definition, consumer
        self.post = post
        self.attempt = 1
        self._run_name = run
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._plans: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._planning = threading.Lock()  # an epoch whose plan was overtaken is planned again by the other thread
        self._conn: psycopg.Connection[tuple[Any, ...]]
        self._planner: orders.Planner | None = None
        self._work = work_query(len(definition.structures))
        self._shape = (0, 0)
        self._num_samples = 0
        self._closing = False
        self._kept: dict[int, tuple[bytes, bytes]] = {}
        self._kept_for = -1  # the change counter of the plan that the kept work belongs to
        self._thread = threading.Thread(target=self._run, name="supply", daemon=True)
        self._thread.start()

    # Commands: called by the loop, carried out by the thread.

    def plan(self, epoch: int) -> None:
        """Plan an epoch ahead; posts `Planned`."""
        self._plans.put(lambda: self._plan(epoch))

    def begin(self, plan: Plan, fetched: Span | None) -> None:
        """Make an epoch final if the catalog is still as it was: posts `Started`, else plans again and posts `Planned`."""
        self._commands.put(lambda: self._begin(plan, fetched))

    def fetch(self, plan: Plan, span: Span, *, reserve: bool) -> None:
        """Fetch work; posts `Fetched`."""
        self._commands.put(lambda: self._fetch(plan, span, reserve=reserve))

    def settle(self, ledger_id: int, announced: Sequence[Span], acknowledged: Sequence[Span]) -> None:
        """Say what of a reservation was announced and acknowledged."""
        self._commands.put(lambda: self._settle(ledger_id, announced, acknowledged))

    def note(self, plan: Plan, outcome: str, spans: Sequence[Span]) -> None:
        """Note positions that were dropped or unreadable."""
        self._commands.put(lambda: self._note(plan, outcome, spans))

    def flag(self, sample_id: int, code: str, message: str) -> None:
        """Flag the file of an image that could not be read."""
        self._commands.put(lambda: self._flag(sample_id, code, message))

    def moved(self, root: str, path: str, size: int, mtime_ns: int, offset: int | None, sample_id: int) -> None:
        """Bring up the row of a file whose size or time changed around the same pixels."""
        self._commands.put(lambda: self._moved(root, path, size, mtime_ns, offset, sample_id))

    def close(self) -> None:
        """Carry out what settles the ledger, then end; what would feed more is left out."""
        self._closing = True
        self._commands.put(None)

    @property
    def alive(self) -> bool:
        """Is it still carrying out commands?"""
        return self._thread.is_alive()

    def join(self, timeout_s: float) -> None:
        """Wait until it ended, after `close`."""
        self._thread.join(timeout_s)

    # The thread.

    def _run(self) -> None:
        """Open the stream, then carry out commands until `close`."""
        planning = threading.Thread(target=self._carry_out, args=(self._plans,), name="planner", daemon=True)
        try:
            if not self._guarded(self._open):
                return
            planning.start()
            self._carry_out(self._commands)
            self._plans.put(None)
            planning.join()
            self._guarded(self._forget_provisional)
        finally:
            if self._planner is not None:
                self._planner.close()
            if hasattr(self, "_conn"):
                self._conn.close()

    def _carry_out(self, commands: queue.SimpleQueue[Command | None]) -> None:
        while (command := commands.get()) is not None:
            if not self._guarded(command):
                return

    def _guarded(self, command: Command) -> bool:
        """Carry out one command and post what came of it; False if it failed, which is posted too and ends the stream."""
        try:
            event = command()
        except psycopg.Error as error:
            event = Failed(explain(error, self.database))
        except CatalogError as error:
            event = Failed(error)
        except Exception as error:  # a bug of ours must not leave a trainer waiting for ever
            event = Failed(CatalogError(f"{type(error).__name__}: {error}; this is a bug in scanfeed"))
        if event is not None:
            self.post(event)
        return not isinstance(event, Failed)

    def _open(self) -> Opened:
        self._conn = self.database.connect(application_name="loaderd", options=f"-c work_mem={WORK_MEMORY}")
        with self.database.read_only(timeout_s=orders.SELECT_TIMEOUT_S) as reading:
            orders.check_where(reading, self.definition)
            found = orders.shapes(reading, self.definition)
        self._shape = orders.one_shape(found, self.definition)
        stream_id = ledger.open_stream(self._conn, self.definition)
        run_id, run = ledger.open_run(self._conn, self._run_name, stream_id)
        self._conn.commit()
        self._planner = orders.Planner(self.database, self.definition, run_id, stream_id)
        self._num_samples = sum(found.values())
        return Opened(run, *self._shape, num_samples=self._num_samples)

    def _plan(self, epoch: int) -> Planned:
        assert self._planner is not None
        with self._planning:
            planned = Planned(self._planner.plan(epoch, self._shape, self._num_samples))
            self._num_samples = planned.plan.num_samples
        return planned

    def _begin(self, plan: Plan, fetched: Span | None) -> Event | None:
        if self._closing:  # a reservation now would report what nobody is to see
            return None
        if ledger.changes(self._conn) != plan.catalog_changes:
            self._conn.rollback()
            plan = self._plan(plan.epoch).plan
            fetched = None
        ledger.start_epoch(self._conn, plan.epoch_id)
        ledger_id = None if fetched is None else ledger.reserve(self._conn, plan.epoch_id, self.attempt, fetched, self.consumer)
        self._conn.commit()
        return Started(plan, ledger_id)

    def _fetch(self, plan: Plan, span: Span, *, reserve: bool) -> Fetched | None:
        if self._closing:
            return None
        plan.wait_for(span[1])
        if plan.catalog_changes != self._kept_for:
            self._kept, self._kept_for = {}, plan.catalog_changes
        samples = self._samples(plan, span)
        work = [kept for sample in samples if (kept := self._kept.get(sample)) is not None]
        if len(work) < len(samples):
            parameters = {"epoch": plan.epoch_id, "first": span[0], "end": span[1], "part": orders.PART}
            with self._conn.cursor(binary=True) as cursor:
                work = cursor.execute(self._work, parameters, prepare=True).fetchall()
            if len(work) < len(samples):
                raise DatabaseError(
                    f"epoch {plan.epoch}: of {len(samples)} positions only {len(work)} have an image; was a patient erased?"
                )
            if plan.num_samples <= KEPT:
                self._kept.update(zip(samples, work, strict=True))
        ledger_id = ledger.reserve(self._conn, plan.epoch_id, self.attempt, span, self.consumer) if reserve else None
        self._conn.commit()
        return Fetched(plan, span, work, ledger_id)

    def _samples(self, plan: Plan, span: Span) -> list[int]:
        """Return the sample ids at positions first … end."""
        first, last = span[0] // orders.PART, (span[1] - 1) // orders.PART
        parts = self._conn.execute(
            "SELECT sample_ids FROM epoch_order WHERE epoch_id = %s AND part BETWEEN %s AND %s ORDER BY part",
            [plan.epoch_id, first, last],
            binary=True,
        )
        samples = [sample for (part,) in parts for sample in part]
        return samples[span[0] - first * orders.PART : span[1] - first * orders.PART]

    def _settle(self, ledger_id: int, announced: Sequence[Span], acknowledged: Sequence[Span]) -> None:
        # The reservation is durable already; losing this with PostgreSQL reports too much exposure, never too little.
        self._conn.execute("SET LOCAL synchronous_commit = off")
        ledger.settle(self._conn, ledger_id, announced, acknowledged)
        self._conn.commit()

    def _note(self, plan: Plan, outcome: str, spans: Sequence[Span]) -> None:
        ledger.note(self._conn, plan.epoch_id, self.attempt, outcome, spans, self.consumer)
        self._conn.commit()

    def _flag(self, sample_id: int, code: str, message: str) -> None:
        self._conn.execute(
            "INSERT INTO flag (rule, severity, detail, file_id, raised_by) "
            "SELECT 'FEED-UNREADABLE', 'error', %s, file_id, 'loaderd' FROM location WHERE image_id = %s AND preferred "
            "ON CONFLICT DO NOTHING",
            [f"{code}: {message}", sample_id],
        )
        self._conn.commit()

    def _moved(self, root: str, path: str, size: int, mtime_ns: int, offset: int | None, sample_id: int) -> None:
        row = self._conn.execute(
            "UPDATE file f SET size = %s, mtime_ns = %s FROM root r WHERE r.id = f.root_id AND r.url = %s AND f.path = %s RETURNING f.id",
            [size, mtime_ns, root, path],
        ).fetchone()
        if row is not None:
            self._conn.execute(
                "UPDATE location SET byte_offset = %s WHERE image_id = %s AND file_id = %s AND dtype IS NOT NULL AND byte_offset <> %s",
                [offset, sample_id, row[0], offset],
            )
        self._conn.commit()

    def _forget_provisional(self) -> None:
        """Delete what was prepared ahead and never asked for."""
        if self._planner is not None:
            self._conn.execute(
                "DELETE FROM epoch WHERE run_id = %s AND stream_id = %s AND started_at IS NULL",
                [self._planner.run_id, self._planner.stream_id],
            )
            self._conn.commit()
