"""One stream and its trainer: which batch goes into which slot, when it is announced, when the slot is free again.

A batch moves from *fetched* (its rows are here) through *decoding* (it has a slot, a worker has it) and *decoded* to *announced* (the
trainer may read it), and the slot is free again once the trainer released it. Batches are announced in order, ahead of the trainer, as
far as the slots reach; a full ring waits. The next epoch's order is taken ahead, and if the trainer said that it wants more epochs its
first batches are decoded ahead too; but it is announced only when the trainer asks for it, and if the catalog changed until then,
it is planned again.

All of this runs in the daemon's loop and never waits. What the database has to do goes through `Supply`.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from catalog.errors import CatalogError
from loaderd import decode, ring
from loaderd.ledger import Span
from loaderd.messages import Message, MessageError
from loaderd.orders import Definition, Plan
from loaderd.supply import CHUNK, Event, Failed, Fetched, Opened, Planned, Started, Supply
from loaderd.workers import Workers

FETCHED_AHEAD = 2 * CHUNK  # positions; a crash reports at most these and one chunk more as delivered than were
UNREADABLE_SHARE = 0.01  # of an epoch; beyond it the storage is at fault, not single files


@dataclass(eq=False)
class Chunk:
    """Fetched work for some batches; `ledger_id` once it is reserved."""

    span: Span
    work: list[tuple[bytes, bytes]]
    ledger_id: int | None


@dataclass(eq=False)
class Batch:
    """One batch on its way; `report` is the worker's, once it is decoded."""

    epoch: Epoch
    index: int
    span: Span
    chunk: Chunk
    slot: int
    generation: int
    report: Message | None = None


@dataclass(eq=False)
class Epoch:
    """One pass. Positions up to `fetched_to` are here or through, up to `announced_to` announced, up to `acknowledged_to` used."""

    number: int
    plan: Plan | None = None
    asked: bool = False  # by the trainer
    begun: bool = False  # the database was asked to make it final
    started: bool = False  # it is final
    ended: bool = False  # and all of it was announced
    dropped: bool = False  # the trainer went on, or the catalog moved
    fetching: bool = False
    fetched_to: int = 0
    announced_to: int = 0
    acknowledged_to: int = 0
    next_batch: int = 0  # to be dispatched
    next_announced: int = 0
    chunks: deque[Chunk] = field(default_factory=deque)  # not settled yet
    waiting: deque[Chunk] = field(default_factory=deque)  # of these, with batches that have no slot yet
    batches: dict[int, Batch] = field(default_factory=dict)
    unreadable: int = 0


@dataclass
class Counters:
    """What a stream did so far."""

    batches: int = 0
    samples: int = 0
    decoded: int = 0
    by_offset: int = 0
    opened: int = 0
    unreadable: int = 0


class Stream:
    """A definition, its ring and its trainer."""

    def __init__(
        self,
        number: int,
        definition: Definition,
        supply: Supply,
        workers: Workers,
        *,
        slots: int | None,
        tell: Callable[..., None],
        end: Callable[[str], None],
    ) -> None:
        self.number, self.definition, self.supply, self.workers = number, definition, supply, workers
        self.counters = Counters()
        self.layout: ring.Layout | None = None
        self.run = ""
        self._slots = slots
        self._tell, self._end = tell, end
        self._ring_fd = self._work_fd = -1
        self._free: deque[int] = deque()
        self._generation: list[int] = []
        self._leased: dict[int, int] = {}  # slot → generation that the trainer holds
        self._decoding = 0
        self._epochs: deque[Epoch] = deque()
        self._ahead = 0  # epochs that the trainer wants after the one it asked for
        self._closed = False

    # ------------------------------------------------------------------ from the database

    def heard(self, event: Event) -> None:
        """Take what the supply thread posts."""
        if isinstance(event, Failed):
            self._end(str(event.error))
        elif not self._closed:
            try:
                self._take(event)
                self._pump()
            except CatalogError as error:
                self._end(str(error))

    def _take(self, event: Event) -> None:
        if isinstance(event, Opened):
            self._open(event)
        elif isinstance(event, Planned):
            epoch = self._find(event.plan.epoch)
            if epoch is not None:
                epoch.plan = event.plan
                self._begin(epoch)
        elif isinstance(event, Started):
            epoch = self._find(event.plan.epoch)
            if epoch is None or epoch.plan is None:  # the trainer went on meanwhile
                if event.ledger_id is not None:
                    self.supply.settle(event.ledger_id, [], [])
                return
            if epoch.plan.epoch_id != event.plan.epoch_id:  # the catalog moved: nothing that was prepared holds
                self._drop(epoch)
                epoch = Epoch(event.plan.epoch, plan=event.plan, asked=True, begun=True)
                self._epochs.appendleft(epoch)
            elif epoch.chunks and event.ledger_id is not None:
                epoch.chunks[0].ledger_id = event.ledger_id
            epoch.started = True
            plan = event.plan
            self._tell({"op": "epoch", "epoch": plan.epoch, "steps": self._steps(plan), "num_samples": plan.num_samples})
        elif isinstance(event, Fetched):
            epoch = self._find(event.plan.epoch)
            if epoch is None or epoch.plan is None or epoch.plan.epoch_id != event.plan.epoch_id:
                if event.ledger_id is not None:  # reserved, and the trainer went on: nothing of it was announced
                    self.supply.settle(event.ledger_id, [], [])
                return
            epoch.fetching = False
            chunk = Chunk(event.span, event.work, event.ledger_id)
            epoch.chunks.append(chunk)
            epoch.waiting.append(chunk)
            self._begin(epoch)

    def _open(self, opened: Opened) -> None:
        definition = self.definition
        self.run = opened.run
        self.layout = ring.layout_for(
            batch_size=definition.batch_size,
            structures=len(definition.structures),
            rows=opened.rows,
            columns=opened.columns,
            dtype=definition.dtype,
            slots=self._slots,
        )
        self._ring_fd = ring.create(self.layout)
        self._work_fd = os.memfd_create("loaderd-work", os.MFD_CLOEXEC)
        self._free.extend(range(self.layout.slots))
        self._generation = [0] * self.layout.slots
        opening = {"layout": self.layout.to_json(), "blank": definition.on_error == "blank"}
        self.workers.open(self.number, opening, (self._ring_fd, self._work_fd))
        with ring.read_only(self._ring_fd) as fd:
            self._tell(
                {
                    "op": "attached",
                    "layout": self.layout.to_json(),
                    "run": opened.run,
                    "num_samples": opened.num_samples,
                    "steps": self._steps_of(opened.num_samples),
                },
                (fd,),
            )
        self._prepare(0)

    # ------------------------------------------------------------------ from the trainer

    def asked(self, message: Message) -> None:
        """Take a message of the trainer's. Raises MessageError if it is none."""
        if message.get("op") != "next":  # which the protocol's own layer checked
            _check_pairs(message)
        for slot, generation in message.get("free", ()):
            if self._leased.get(slot) == generation:  # anything else was released before
                del self._leased[slot]
                self._free.append(slot)
        ack = message.get("ack")
        if ack is not None:
            self._acknowledge(ack[0], ack[1])
        if message.get("op") == "epoch":
            self._ask(message["epoch"], message["ahead"])
        self._pump()

    def _ask(self, number: int, ahead: int) -> None:
        self._ahead = max(0, ahead)
        while self._epochs and self._epochs[0].number < number:
            self._drop(self._epochs[0])
        epoch = self._find(number)
        if epoch is None:
            for other in list(self._epochs):
                self._drop(other)
            epoch = self._prepare(number)
        if epoch.asked:
            raise MessageError(f"epoch {number} was asked for twice")
        epoch.asked = True
        self._begin(epoch)

    def _acknowledge(self, number: int, index: int) -> None:
        epoch = self._find(number)
        if epoch is None or epoch.plan is None:
            return
        end = min((index + 1) * self.definition.batch_size, epoch.plan.num_samples)
        epoch.acknowledged_to = max(epoch.acknowledged_to, min(end, epoch.announced_to))
        while epoch.chunks and epoch.chunks[0].span[1] <= epoch.acknowledged_to:
            self._settle(epoch, epoch.chunks.popleft())

    # ------------------------------------------------------------------ moving batches

    def _pump(self) -> None:
        if self._closed or self.layout is None:
            return
        self._announce()
        for epoch in list(self._epochs):
            if epoch.plan is None or not (epoch.asked or self._ahead):
                break
            if self._free and epoch.waiting:
                self._dispatch(epoch)
            if not epoch.fetching:
                self._fetch(epoch)
            if epoch.started and len(self._epochs) == 1:
                self._prepare(epoch.number + 1)
            if not self._all_fetched(epoch):
                break

    def _prepare(self, number: int) -> Epoch:
        epoch = Epoch(number)
        self._epochs.append(epoch)
        self.supply.plan(number)
        return epoch

    def _begin(self, epoch: Epoch) -> None:
        """Have an epoch made final once it is asked for and planned; what was fetched ahead is reserved with it."""
        if epoch.asked and epoch.plan is not None and not epoch.fetching and not epoch.begun:
            epoch.begun = True
            self.supply.begin(epoch.plan, epoch.chunks[0].span if epoch.chunks else None)

    def _fetch(self, epoch: Epoch) -> None:
        """Have the next positions fetched while less waits here than the ring and two chunks hold."""
        if epoch.fetching or self._all_fetched(epoch) or self.layout is None or epoch.plan is None:
            return
        if not epoch.started and (epoch.fetched_to or epoch.asked):
            return  # before it is final one chunk is enough; while it becomes final a new one would miss its reservation
        size = self.definition.batch_size
        if epoch.fetched_to - epoch.next_batch * size > max(self.layout.slots * size, FETCHED_AHEAD):
            return
        first = epoch.fetched_to
        epoch.fetched_to = min(first + max(1, CHUNK // size) * size, self._end_of(epoch.plan))
        epoch.fetching = True
        self.supply.fetch(epoch.plan, (first, epoch.fetched_to), reserve=epoch.started)

    def _dispatch(self, epoch: Epoch) -> None:
        assert epoch.plan is not None
        size, end = self.definition.batch_size, self._end_of(epoch.plan)
        while self._free and epoch.waiting:
            chunk, index = epoch.waiting[0], epoch.next_batch
            epoch.next_batch += 1
            span = (index * size, min((index + 1) * size, end))
            if span[1] == chunk.span[1]:
                epoch.waiting.popleft()
            slot = self._free.popleft()
            self._generation[slot] += 1
            batch = Batch(epoch, index, span, chunk, slot, self._generation[slot])
            epoch.batches[index] = batch
            self._submit(batch)

    def _submit(self, batch: Batch) -> None:
        first = batch.chunk.span[0]
        work = batch.chunk.work[batch.span[0] - first : batch.span[1] - first]
        rows = b"[" + b",".join(row for row, _ in work) + b"]"
        record = b"".join([rows, *(bits for _, bits in work)])
        if os.pwrite(self._work_fd, record, batch.slot * decode.WORK_STRIDE) != len(record):
            raise CatalogError(f"no memory for the work of a batch ({len(record)} bytes)")
        self._decoding += 1
        self.workers.submit(
            {
                "stream": self.number,
                "slot": batch.slot,
                "generation": batch.generation,
                "epoch": batch.epoch.number,
                "index": batch.index,
                "length": len(rows),
                "pad": int(self.definition.tail == "pad"),
            },
            lambda report: self._decoded(batch, report),
        )

    def _decoded(self, batch: Batch, report: Message | None) -> None:
        self._decoding -= 1
        if self._closed:
            if not self._decoding:
                self._release_memory()
            return
        if report is None:
            self._end(f"epoch {batch.epoch.number}, batch {batch.index}: decoding it killed several workers; see the log")
            return
        unreadable = report.get("unreadable", [])
        self.counters.decoded += batch.span[1] - batch.span[0] - len(unreadable)
        self.counters.by_offset += report["by_offset"]
        self.counters.opened += report["opened"]
        for sample_id, root, path, size, mtime_ns, offset in report.get("changed", []):
            self.supply.moved(root, path, size, mtime_ns, offset, sample_id)
        if batch.epoch.dropped:
            self._free.append(batch.slot)
        else:
            batch.report = report
            if unreadable:
                self._could_not_read(batch, unreadable)
        self._pump()

    def _could_not_read(self, batch: Batch, unreadable: list[list[Any]]) -> None:
        """Flag what could not be read, or end the stream where that is not the files' fault."""
        epoch, plan = batch.epoch, batch.epoch.plan
        assert plan is not None
        where = f"epoch {epoch.number}, batch {batch.index}"
        for _, sample_id, code, message in unreadable:
            if code == "root-missing":
                self._end(f"{where}: sample {sample_id}: {message}; mount it again; nothing was flagged")
                return
        epoch.unreadable += len(unreadable)
        self.counters.unreadable += len(unreadable)
        if self.definition.on_error != "stop" and epoch.unreadable > UNREADABLE_SHARE * plan.num_samples:
            self._end(
                f"{where}: {epoch.unreadable} of {plan.num_samples} samples could not be read, the last with: {unreadable[-1][3]}; "
                f"over 1 % is taken for a fault of the storage, and the feed stops; see `catalog ingest`"
            )
            return
        for _, sample_id, code, message in unreadable:
            self.supply.flag(sample_id, code, message)
        self.supply.note(plan, "unreadable", [(batch.span[0] + at, batch.span[0] + at + 1) for at, *_ in unreadable])
        if self.definition.on_error == "stop":
            self._end(f"{where}: sample {unreadable[0][1]} could not be read: {unreadable[0][3]}; it is flagged (on_error='stop')")

    def _announce(self) -> None:
        while self._epochs and self._epochs[0].started:
            epoch = self._epochs[0]
            assert epoch.plan is not None
            batch = epoch.batches.get(epoch.next_announced)
            if batch is not None:
                if batch.report is None or batch.chunk.ledger_id is None:
                    return
                del epoch.batches[batch.index]
                epoch.next_announced += 1
                epoch.announced_to = batch.span[1]
                count = batch.report["count"]
                if not count:  # nothing in it could be read
                    self._free.append(batch.slot)
                    continue
                self._leased[batch.slot] = batch.generation
                self.counters.batches += 1
                self.counters.samples += batch.span[1] - batch.span[0] - len(batch.report.get("unreadable", []))
                self._tell(
                    {
                        "op": "batch",
                        "slot": batch.slot,
                        "generation": batch.generation,
                        "epoch": epoch.number,
                        "index": batch.index,
                        "count": count,
                    }
                )
                continue
            if epoch.next_announced < self._steps(epoch.plan):
                return
            if not epoch.ended:
                epoch.ended = True
                if self._end_of(epoch.plan) < epoch.plan.num_samples:
                    self.supply.note(epoch.plan, "dropped", [(self._end_of(epoch.plan), epoch.plan.num_samples)])
                self._tell({"op": "end", "epoch": epoch.number})
            return

    def _drop(self, epoch: Epoch) -> None:
        """Forget an epoch: it is through, the trainer went on, or the catalog moved."""
        epoch.dropped = True
        self._epochs.remove(epoch)
        for batch in epoch.batches.values():
            if batch.report is not None:  # else its worker still writes there; `_decoded` frees it
                self._free.append(batch.slot)
        for chunk in epoch.chunks:
            self._settle(epoch, chunk)
        epoch.chunks.clear()
        epoch.waiting.clear()
        epoch.batches.clear()

    def _settle(self, epoch: Epoch, chunk: Chunk) -> None:
        if chunk.ledger_id is None:
            return
        first, end = chunk.span
        announced, acknowledged = min(end, epoch.announced_to), min(end, epoch.acknowledged_to)
        self.supply.settle(
            chunk.ledger_id,
            [(first, announced)] if announced > first else [],
            [(first, acknowledged)] if acknowledged > first else [],
        )

    # ------------------------------------------------------------------ the end

    def close(self) -> None:
        """The trainer is gone, or the daemon ends: settle the ledger, give everything back once no worker writes any more."""
        if self._closed:
            return
        for epoch in list(self._epochs):
            self._drop(epoch)
        self._closed = True
        self.supply.close()
        if not self._decoding:
            self._release_memory()

    def _release_memory(self) -> None:
        if self._ring_fd >= 0:
            self.workers.forget(self.number)
            os.close(self._ring_fd)
            os.close(self._work_fd)
            self._ring_fd = self._work_fd = -1

    def status(self) -> Message:
        """Return what `loaderd status` shows of this stream."""
        epoch = self._epochs[0] if self._epochs else None
        plan = epoch.plan if epoch else None
        return {
            "run": self.run,
            "definition": self.definition.to_json(),
            "epoch": epoch.number if epoch else None,
            "position": epoch.announced_to if epoch else 0,
            "num_samples": plan.num_samples if plan else None,
            "slots": self.layout.slots if self.layout else 0,
            "leased": len(self._leased),
            "free": len(self._free),
            "decoding": self._decoding,
            "ring_bytes": self.layout.size if self.layout else 0,
            **self.counters.__dict__,
        }

    # ------------------------------------------------------------------ arithmetic

    def _find(self, number: int) -> Epoch | None:
        return next((epoch for epoch in self._epochs if epoch.number == number), None)

    def _steps_of(self, num_samples: int) -> int:
        size = self.definition.batch_size
        return num_samples // size if self.definition.tail == "drop" else -(-num_samples // size)

    def _steps(self, plan: Plan) -> int:
        return self._steps_of(plan.num_samples)

    def _end_of(self, plan: Plan) -> int:
        """The position after the last that is fed."""
        size = self.definition.batch_size
        return plan.num_samples // size * size if self.definition.tail == "drop" else plan.num_samples

    def _all_fetched(self, epoch: Epoch) -> bool:
        return epoch.plan is not None and epoch.fetched_to >= self._end_of(epoch.plan)


def _check_pairs(message: Message) -> None:
    """Raise MessageError unless what a trainer said in JSON has whole numbers where they belong."""
    free, ack = message.get("free", []), message.get("ack")
    pairs = [*(free if isinstance(free, list) else [free]), *([] if ack is None else [ack])]
    if message.get("op") == "epoch":
        pairs.append([message.get("epoch"), message.get("ahead")])
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or not all(type(part) is int and part >= 0 for part in pair):
            raise MessageError("pairs of whole numbers were expected")
