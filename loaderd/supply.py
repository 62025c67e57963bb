"""The threads of a stream that speak with the database: one fetches work and keeps the ledger, one plans the epochs to come.

The daemon's loop must never wait for PostgreSQL. It puts commands into a queue; a thread carries them out one after the other and
posts what came of them. Planning has a thread of its own, since a plan takes as long as fetching several thousand samples.
"""

from __future__ import annotations

import contextlib
import os
import platform
import queue
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import psycopg

from catalog import __version__
from catalog.database import Database
from catalog.errors import CatalogError, UsageError
from loaderd import attempts, ledger, named, orders, selections, unreadable
from loaderd.attempts import Attempt
from loaderd.definitions import Definition, settled
from loaderd.events import Begun, Event, Failed, Fetched, Opened, Planned, Pooled, Started
from loaderd.messages import Message
from loaderd.orders import Plan
from loaderd.outages import LEAVE_S, Command, Outages, gone
from loaderd.shares import Share, Span
from loaderd.work import Work

CHUNK = 1_024  # positions a query, rounded down to whole batches
BREAK_OFF_S = 0.1  # how often a plan that is in the way is broken off
UNSURE_S = 2.0  # commits that did not wait for the disk are made again after a crash of PostgreSQL if they are younger

WORK_MEMORY = "64MB"  # for the sort of a chunk, which would spill to disk with PostgreSQL's 4 MB (59 ms a chunk, then 43)
# A host that vanishes without a word gives its locks back after a minute. Unix sockets ignore it.
KEEPALIVE = "-c tcp_keepalives_idle=30 -c tcp_keepalives_interval=10 -c tcp_keepalives_count=3"


@dataclass(frozen=True, slots=True)
class Client:
    """Who attached, and as which rank."""

    pid: int
    uid: int
    rank: int
    num_ranks: int
    versions: dict[str, str]

    @property
    def name(self) -> str:
        """host:pid"""
        return f"{socket.gethostname()}:{self.pid}"


class Supply:
    """Carries out a stream's commands in order; `post` is called with what came of them, from its threads.

    `asked` is the attach message: a stream's name or definition, the run, how to resume, and of a trainer whose daemon died what it got.
    """

    def __init__(self, database: Database, asked: Message, client: Client, post: Callable[[Event], None], say: Callable[..., None]) -> None:
        self.database, self.asked, self.client, self.post = database, asked, client, post
        self.definition: Definition
        self.attempt: Attempt
        self.pseudonymized = False  # the catalog is
        self.reason: str | None = None  # why the trainer left
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._plans: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._planning = threading.RLock()  # an epoch whose plan was overtaken is planned again by the other thread
        self._conn: psycopg.Connection[tuple[Any, ...]]
        self._consumer_id = 0
        self._planner: orders.Planner | None = None
        self._begun = -1  # the last epoch that was asked for
        self._ahead: tuple[int, int] | None = None  # (epoch_id, ledger_id) of the epoch that was begun before it is asked for
        self._work: Work
        self._shape: tuple[int, int] | None = None
        self._constants: dict[str, Any] = {}
        self._num_samples = 0
        self._closing = threading.Event()
        self._outages = Outages(database, client.pid, self._closing, say)
        self._again = False  # this command is carried out a second time
        self._unsure: deque[tuple[float, Callable[[], None]]] = deque()
        self._thread = threading.Thread(target=self._run, name="supply", daemon=True)
        self._thread.start()

    # Commands: called by the loop, carried out by the threads.

    def begin_attempt(self, run: str, resume: Any) -> None:
        """Join or open the attempt; posts `Begun`."""
        self._commands.put(lambda: None if self._closing.is_set() else self._begin_attempt(run, resume))

    def plan(self, epoch: int) -> None:
        """Plan an epoch ahead; posts `Planned`."""
        self._plans.put(lambda: None if self._closing.is_set() else self._plan(epoch))

    def begin(self, plan: Plan, steps: Span | None) -> None:
        """Make an epoch final if the catalog is still as it was: posts `Started`, else plans again and posts `Started` with that."""
        self._commands.put(lambda: self._begin(plan, steps))

    def begin_ahead(self, plan: Plan, steps: Span) -> None:
        """Do what takes the disk's time before the trainer asks for an epoch; `begin` takes it back if the catalog changes until then."""
        self._commands.put(lambda: self._begin_ahead(plan, steps))

    def fetch(self, plan: Plan, steps: Span, *, reserve: bool) -> None:
        """Fetch work; posts `Fetched`."""
        self._commands.put(lambda: self._fetch(plan, steps, reserve=reserve))

    def settle(self, ledger_id: int, announced: Sequence[Span], acknowledged: Sequence[Span]) -> None:
        """Say what of a reservation was announced and acknowledged."""
        self._unsafe(lambda: ledger.settle(self._conn, ledger_id, announced, acknowledged))

    def reserved(self, upto: int) -> None:
        """Say that nothing from this position on was announced."""
        self._unsafe(lambda: ledger.reserved(self._conn, self._consumer_id, upto))

    def finish(self, plan: Plan, dropped: Sequence[Span]) -> None:
        """Say that the trainer got everything of an epoch, or left it; what nobody gets was dropped."""

        def finish() -> None:
            if dropped:
                ledger.note(self._conn, plan.epoch_id, self.attempt.number, self.client.rank, "dropped", dropped, self.client.name)
            ledger.ended(self._conn, self._consumer_id, plan.epoch)

        self._unsafe(finish)

    def note(self, plan: Plan, ledger_id: int, outcome: str, spans: Sequence[Span]) -> None:
        """Note positions of a reservation that were unreadable or revoked."""

        def note() -> None:
            ledger.take_out(self._conn, ledger_id, spans)
            ledger.note(self._conn, plan.epoch_id, self.attempt.number, self.client.rank, outcome, spans, self.client.name)

        self._unsafe(note)

    def flag(self, sample_id: int, code: str, message: str) -> None:
        """Flag the file of an image that could not be read."""

        def flag() -> None:
            unreadable.flag(self._conn, sample_id, code, message)
            self._conn.commit()

        self._commands.put(flag)

    def moved(self, root: str, path: str, size: int, mtime_ns: int, offset: int | None, sample_id: int) -> None:
        """Bring up the row of a file whose size or time changed around the same pixels."""

        def moved() -> None:
            unreadable.moved(self._conn, root, path, size, mtime_ns, offset, sample_id)
            self._conn.commit()

        self._commands.put(moved)

    def close(self, reason: str | None = None) -> None:
        """Carry out what settles the ledger, then end; what would feed more is left out."""
        self.reason = reason or self.reason
        self._closing.set()
        self._commands.put(None)

    @property
    def alive(self) -> bool:
        """Is it still carrying out commands?"""
        return self._thread.is_alive()

    @property
    def leaving(self) -> bool:
        """Is its trainer gone?"""
        return self._closing.is_set()

    @property
    def outage_since(self) -> float | None:
        """When PostgreSQL was lost, by the monotonic clock; None while it is in reach."""
        return self._outages.since

    @property
    def planning(self) -> int:
        """How many epochs are still to be planned."""
        return self._plans.qsize()

    def join(self, timeout_s: float) -> None:
        """Wait until it ended, after `close`."""
        self._thread.join(timeout_s)

    # The threads.

    def _run(self) -> None:
        """Open the stream, then carry out commands until `close`."""
        planning = threading.Thread(target=self._carry_out, args=(self._plans, self._regain_planner), name="planner", daemon=True)
        try:
            if not self._closing.is_set() and self._guarded(self._open, None):
                planning.start()
                self._carry_out(self._commands, self._regain)
                self._plans.put(None)
                planning.join(BREAK_OFF_S)
                while planning.is_alive():
                    self._break_off()
                    planning.join(BREAK_OFF_S)
            if self._consumer_id:
                self._guarded(self._leave, self._regain)
        finally:
            if hasattr(self, "_conn"):
                self._conn.close()
            if self._planner is not None:
                self._planner.close(self._begun)

    def _break_off(self) -> None:
        """Have a plan that nobody asked for yet broken off: over a million samples it takes seconds, and the next attempt waits for us."""
        if self._planner is not None and self._planner.epoch is not None and self._planner.epoch > self._begun:
            self._planner.cancel()

    def _carry_out(self, commands: queue.SimpleQueue[Command | None], regain: Callable[[], None]) -> None:
        """Carry out commands until `close`; after one that failed what settles the ledger still counts, the others are left out."""
        while (command := commands.get()) is not None:
            if not self._outages.given_up:
                self._guarded(command, regain)

    def _guarded(self, command: Command, regain: Callable[[], None] | None) -> bool:
        """Carry out one command and post what came of it; False if it failed, which is posted too and ends the stream."""
        event = self._outages.carry_out(command, regain)
        if threading.current_thread() is self._thread:
            self._again = False
            if isinstance(event, Failed) and hasattr(self, "_conn"):
                with contextlib.suppress(psycopg.Error):
                    self._conn.rollback()
        if isinstance(event, Failed):
            self.reason = self.reason or str(event.error)
        if event is not None:
            self.post(event)
        return not isinstance(event, Failed)

    def _regain(self) -> None:
        """Connect again, and make again what may not have reached the disk; from the thread that fetches.

        Raises:
            CatalogError: If another attempt was opened meanwhile, or PostgreSQL does not let go of the old connection.
        """
        self._conn.close()
        self._conn = self._connect()
        self._hold()
        for _, command in list(self._unsure):
            command()
        self._again = True

    def _regain_planner(self) -> None:
        """Connect again; from the thread that plans."""
        if self._planner is not None:
            with self._planning:  # the other thread may plan with it
                self._planner.close()
                self._planner.connect()

    def _hold(self) -> None:
        """Take the consumer's lock again, unless a newer attempt was opened meanwhile."""
        if not self._consumer_id:
            return
        deadline = time.monotonic() + LEAVE_S  # PostgreSQL may take a moment to notice that our old connection is gone
        while not attempts.hold(self._conn, self._consumer_id):
            self._conn.rollback()
            if time.monotonic() > deadline:
                raise CatalogError("PostgreSQL still holds this training's old connection; open a new Feed with its state to go on")
            time.sleep(0.05)
        if hasattr(self, "attempt"):
            newest = attempts.newest(self._conn, self.attempt.run_id, self.attempt.run, self.attempt.stream_id)
            if newest is None or newest.number != self.attempt.number:
                raise CatalogError(f"run {self.attempt.run!r}: while PostgreSQL was away another attempt was opened; this one ends")
        self._conn.commit()

    def _connect(self) -> psycopg.Connection[tuple[Any, ...]]:
        return self.database.connect(application_name="loaderd", options=f"-c work_mem={WORK_MEMORY} {KEEPALIVE}")

    def _unsafe(self, change: Callable[[], None]) -> None:
        """Have a change committed without waiting for the disk.

        The reservation is durable already: losing this with PostgreSQL and this daemon reports too much exposure, never too little. If
        PostgreSQL alone dies, it is made again.
        """

        def command() -> None:
            self._conn.execute("SET LOCAL synchronous_commit = off")
            change()
            self._conn.commit()

        def first() -> None:
            command()
            now = time.monotonic()
            while self._unsure and now - self._unsure[0][0] > UNSURE_S:
                self._unsure.popleft()
            self._unsure.append((now, command))

        self._commands.put(first)

    def _open(self) -> Opened:
        asked, client = self.asked, self.client
        self._conn = self._connect()
        if (name := asked.get("stream")) is None:
            self.definition = settled(self._conn, Definition.from_json(asked.get("definition")))
        else:
            stream_id, self.definition = named.find(self._conn, name)
            # Of a split the part alone may be named; and what the stream names may be gone.
            given = settled(self._conn, Definition.from_json({**self.definition.whole(), **asked["definition"]}))
            named.compare(name, self.definition, given.whole())
        if client.uid != os.getuid() and any(one["name"] == "user" for one in self.definition.transforms):
            raise UsageError("transforms: user: this daemon is another user's, and calls no functions for you; run one of your own")
        self.pseudonymized = self._conn.execute("SELECT EXISTS (SELECT FROM pseudonymization)").fetchone() == (True,)
        with self.database.read_only(timeout_s=selections.SELECT_TIMEOUT_S) as reading:
            selections.check_where(reading, self.definition)
            if name is None:
                stream_id = attempts.open_stream(self._conn, self.definition)
                self._conn.commit()
            going_on = asked.get("resume") is not None or asked.get("again") is not None
            # What a condition of the user's selects may change without the catalog.
            found = attempts.seen(self._conn, stream_id, going_on=going_on) if going_on or self.definition.where is None else None
            if found is None:
                shapes = selections.shapes(reading, self.definition)
                found = (*selections.one_shape(reading, shapes, self.definition), sum(shapes.values()))
            if self.definition.looks_up:
                from loaderd import constants

                self._constants = constants.of(self._conn, reading, stream_id, self.definition)
        *shape, self._num_samples = found
        self._shape = (shape[0], shape[1]) if self.definition.fixed_size is None else None
        fed_as = self.definition.fixed_size or (shape[0], shape[1])
        self._work = Work(self.definition, self._constants.get("classes"))
        labels = int(self.definition.labels is not None)
        if self.definition.sequences is not None:
            from loaderd import pools

            pool, fed_as, labels = pools.make(self.database, self.definition)
            self.post(Pooled(pool))  # at once, so that it has an owner whatever goes wrong from here on
        self._consumer_id = attempts.attach(
            self._conn, stream_id, rank=client.rank, num_ranks=client.num_ranks, pid=client.pid, uid=client.uid,
            daemon_pid=os.getpid(), versions=client.versions,
        )  # fmt: skip
        self._conn.commit()
        run = asked.get("run") or attempts.unused_name(self._conn)
        attempt = self._first_attempt(stream_id, run)
        return Opened(
            self.definition, stream_id, name, run, *fed_as, num_samples=self._num_samples, attempt=attempt, labels=labels,
            constants=self._constants,
        )  # fmt: skip

    def _first_attempt(self, stream_id: int, run: str) -> Attempt | None:
        """Go on with the attempt that the trainer was in, or open one, unless its state may still come (load_state_dict)."""
        again, resume = self.asked.get("again"), self.asked.get("resume")
        self._stream_id = stream_id
        if again is not None:
            attempt = attempts.take_over(
                self._conn, run, stream_id, self.definition, number=again["attempt"], consumer_id=self._consumer_id,
                rank=self.client.rank, epoch=again["epoch"], received=again["received"], acknowledged=again["acknowledged"],
            )  # fmt: skip
            self._enter(attempt)
            return attempt
        if resume is None and self.asked.get("run") is not None and attempts.exists(self._conn, run, stream_id):
            # Another rank of a new run may have come first; a run that was fed before waits for its state.
            try:
                return self._begin_attempt(run, None).attempt
            except attempts.FedBeforeError:
                self._conn.rollback()
                return None
        return self._begin_attempt(run, resume).attempt

    def _begin_attempt(self, run: str, resume: Any) -> Begun:
        attempt = attempts.begin(
            self._conn, run, self._stream_id, self.definition, consumer_id=self._consumer_id, rank=self.client.rank,
            num_ranks=self.client.num_ranks, resume=resume, versions=_versions(self._conn),
        )  # fmt: skip
        self._enter(attempt)
        return Begun(attempt)

    def _enter(self, attempt: Attempt) -> None:
        with self._planning:
            if self._planner is not None:
                self._planner.close()
                attempts.forget_attempt(self._conn, self.attempt, self._consumer_id)
                self._conn.commit()
            self.attempt = attempt
            self._planner = orders.Planner(self.database, self.definition, attempt.run_id, attempt.stream_id)

    def share(self, plan: Plan) -> Share:
        """Return the trainer's part of an epoch."""
        return self.attempt.share(self.definition, plan.epoch, plan.num_samples, self.client.rank)

    def _plan(self, epoch: int, *, locked: bool = False) -> Planned:
        with self._planning:
            assert self._planner is not None
            planned = Planned(self._planner.plan(epoch, self._shape, self._num_samples, locked=locked))
            self._num_samples = planned.plan.num_samples
        return planned

    def _begin(self, plan: Plan, steps: Span | None) -> Event | None:
        if self._closing.is_set():  # a reservation now would report what nobody is to see
            return None
        self._begun = max(self._begun, plan.epoch)
        if self._ahead is not None:
            epoch_id, ahead = self._ahead
            if steps is not None and epoch_id == plan.epoch_id and ledger.unchanged(self._conn, epoch_id):
                self._ahead = None
                upto = self.share(plan).begins(steps[1])
                self._unsafe(lambda: ledger.asked(self._conn, self._consumer_id, plan.epoch, upto))
                return Started(plan, ahead)
            self._take_back()
        if steps is not None and not plan.final and not self._again:
            ledger_id = ledger.begin_epoch(self._conn, plan.epoch_id, self.attempt.number, **self._reservation(plan, steps), ahead=False)
            if ledger_id is not None:
                return Started(plan, ledger_id)
        if plan.final or not ledger.start_epoch(self._conn, plan.epoch_id, unchanged=True):
            # Somebody began it before, or the catalog moved, or another rank saw that first.
            self._conn.rollback()
            with self._planning:  # first this, then the database's lock: so does the other thread
                self._conn.execute("SELECT pg_advisory_xact_lock(%s, %s::integer)", [orders.ORDER_LOCK, self.attempt.run_id])
                found = orders.find(self._conn, self.attempt.run_id, self.attempt.stream_id, plan.epoch)
                if found is None or not found.final or found.epoch_id != plan.epoch_id:
                    plan = self._plan(plan.epoch, locked=True).plan
                    steps = None
                ledger.start_epoch(self._conn, plan.epoch_id, unchanged=False)
        ledger_id = None if steps is None else self._reserve(plan, steps)
        self._conn.commit()
        return Started(plan, ledger_id)

    def _begin_ahead(self, plan: Plan, steps: Span) -> None:
        if self._closing.is_set() or plan.final:
            return
        if self._again:  # PostgreSQL went away under it, perhaps behind the commit
            ledger.take_back(self._conn, plan.epoch_id)
            self._conn.commit()
            return
        ledger_id = ledger.begin_epoch(self._conn, plan.epoch_id, self.attempt.number, **self._reservation(plan, steps), ahead=True)
        if ledger_id is not None:
            self._ahead = plan.epoch_id, ledger_id

    def _take_back(self) -> None:
        """Nobody asked for what was begun ahead, or the catalog changed before."""
        if self._ahead is not None:
            ledger.take_back(self._conn, self._ahead[0])
            self._conn.commit()
            self._ahead = None

    def _reserve(self, plan: Plan, steps: Span) -> int:
        return ledger.reserve(self._conn, plan.epoch_id, self.attempt.number, **self._reservation(plan, steps), again=self._again)

    def _reservation(self, plan: Plan, steps: Span) -> dict[str, Any]:
        share = self.share(plan)
        return {
            "spans": share.spans(*steps), "consumer_id": self._consumer_id, "rank": share.rank, "consumer": self.client.name,
            "epoch": plan.epoch, "upto": share.begins(steps[1]),
        }  # fmt: skip

    def _fetch(self, plan: Plan, steps: Span, *, reserve: bool) -> Event | None:
        if self._closing.is_set():
            return None
        spans = self.share(plan).spans(*steps)
        if not self._stored(plan, spans[-1][1]):
            return None if self._closing.is_set() else self._plan(plan.epoch)
        found = self._work.fetch(self._conn, plan, spans)
        if found is None:  # another rank planned it again, or a crash of PostgreSQL took it
            planned = self._plan(plan.epoch)
            if planned.plan.epoch_id == plan.epoch_id:
                raise CatalogError(f"epoch {plan.epoch}: its stored order has holes; see `loaderd audit`")
            return planned
        samples, work = found
        ledger_id = self._reserve(plan, steps) if reserve else None
        self._conn.commit()
        return Fetched(plan, steps, work, samples, ledger_id)

    def _stored(self, plan: Plan, positions: int) -> bool:
        """Wait until so many positions are stored; False if the order was lost or its planner died: it must be looked for again."""
        if not plan.foreign:
            try:
                plan.wait_for(positions)
            except psycopg.Error as error:
                if not gone(error):
                    raise
                return False
            return True
        while plan.stored < positions:
            row = self._conn.execute(
                "SELECT CASE WHEN e.order_sha256 IS NOT NULL THEN e.num_samples ELSE 0 END, EXISTS (SELECT FROM pg_locks l "
                "WHERE l.locktype = 'advisory' AND l.classid = %s::integer::oid AND l.objid = e.id::integer::oid) "
                "FROM epoch e WHERE e.id = %s",
                [orders.PLANNER_LOCK, plan.epoch_id],
            ).fetchone()
            self._conn.rollback()
            if row is None or (row[0] < positions and not row[1]):
                return False
            plan.grew(row[0])
            time.sleep(0.01)
        return True

    def _leave(self) -> None:
        self._conn.rollback()  # of a command that failed
        self._forget_provisional()
        attempts.leave(self._conn, self._consumer_id, self.reason)
        self._conn.commit()

    def _forget_provisional(self) -> None:
        """Delete what was prepared ahead and never asked for, unless another rank may ask for it, and a run that was fed nothing."""
        self._take_back()
        if hasattr(self, "attempt"):
            attempts.forget_provisional(self._conn, self.attempt, self._consumer_id)
            self._conn.commit()


def _versions(conn: psycopg.Connection[tuple[Any, ...]]) -> dict[str, str]:
    """Return what this daemon runs on."""
    found = {name: metadata.version(name) for name in ("numpy", "pydicom", "psycopg")}
    server = conn.info.server_version
    return {"scanfeed": __version__, "python": platform.python_version(), "postgresql": f"{server // 10000}.{server % 10000}", **found}
