"""One stream and its trainer: which batch goes into which slot, when it is announced, when the slot is free again.

A batch moves from *fetched* (its rows are here) through *decoding* (it has a slot, a worker has it) and *decoded* to *announced* (the
trainer may read it), and the slot is free again once the trainer released it. Batches are announced in order, ahead of the trainer, as
far as the slots reach; a full ring waits. The next epoch's order is taken ahead, and if the trainer said that it wants more epochs its
first batches are decoded ahead too; but it is announced only when the trainer asks for it, and if the catalog changed until then,
it is planned again.

Everything is counted in steps of this rank; which positions they are is arithmetic (`shares.Share`). A sample that was revoked is a
hole: a batch that holds one is decoded again without it, up to its announcement.

All of this runs in the daemon's loop and never waits. What the database has to do goes through `Supply`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import Any

from catalog.errors import CatalogError
from loaderd import ring
from loaderd.counters import Counters, Waits
from loaderd.definitions import Definition
from loaderd.epochs import Batch, Chunk, Epoch
from loaderd.events import Begun, Event, Failed, Fetched, Opened, Planned, Pooled, Started
from loaderd.memory import Memory
from loaderd.messages import Message, MessageError, check_pairs, check_resume
from loaderd.orders import Plan
from loaderd.shares import Share
from loaderd.supply import CHUNK, Supply
from loaderd.unreadable import why_it_ends, words
from loaderd.workers import Workers

FETCHED_AHEAD = 2 * CHUNK  # positions; a crash reports at most these and one chunk more as delivered than were
PLANNED_AHEAD = 16  # epochs that a trainer may ask for and leave before they are planned
DEADLY = 2  # workers that a sample may kill until it is left out


class Stream:
    """A definition, its ring and its trainer."""

    def __init__(
        self,
        number: int,
        supply: Supply,
        workers: Workers,
        *,
        slots: int | None,
        again: Message | None,
        revoked: AbstractSet[int],
        room: Callable[[int], None],
        tell: Callable[..., None],
        end: Callable[[CatalogError | str], None],
    ) -> None:
        self.number, self.supply, self.workers = number, supply, workers
        self.counters, self._waits = Counters(), Waits()
        self.definition: Definition | None = None
        self.layout: ring.Layout | None = None
        self.name: str | None = None
        self.stream_id = 0
        self.run = ""
        self._slots, self._again, self._revoked, self._room = slots, again, revoked, room
        self._tell, self._end = tell, end
        self._memory = Memory()
        self._free: deque[int] = deque()
        self._generation: list[int] = []
        self._leased: dict[int, int] = {}  # slot → generation that the trainer holds
        self._decoding = 0
        self._killers: set[int] = set()  # samples
        self._epochs: deque[Epoch] = deque()
        self._ahead = 0  # epochs that the trainer wants after the one it asked for
        self._beginning = False  # an attempt is being opened
        self._closed = False
        self.attached = time.monotonic()

    # ------------------------------------------------------------------ from the database

    def heard(self, event: Event) -> None:
        """Take what the supply thread posts."""
        if isinstance(event, Failed):
            self._end(event.error)
        elif isinstance(event, Pooled):
            self._memory.pool = event.pool
            if self._closed:  # the trainer left while it was made
                self._release_memory()
        elif not self._closed:
            try:
                self._take(event)
                self._pump()
            except CatalogError as error:
                self._end(error)

    def _take(self, event: Event) -> None:
        if isinstance(event, Opened):
            self._open(event)
        elif isinstance(event, Begun):
            self._enter(event)
        elif isinstance(event, Planned):
            self._planned(event.plan)
        elif isinstance(event, Started):
            epoch = self._find(event.plan.epoch)
            if epoch is None or epoch.plan is None:  # the trainer went on meanwhile
                if event.ledger_id is not None:
                    self.supply.settle(event.ledger_id, [], [])
                return
            if epoch.plan.epoch_id != event.plan.epoch_id:  # the catalog moved: nothing that was prepared holds
                epoch = self._replace(epoch, event.plan)
                epoch.begun = True
            elif epoch.chunks and event.ledger_id is not None:
                epoch.chunks[0].ledger_id = event.ledger_id
            epoch.started = True
            share = epoch.dealt
            self._tell({"op": "epoch", "epoch": epoch.number, "steps": share.steps, "num_samples": event.plan.num_samples})
        elif isinstance(event, Fetched):
            epoch = self._find(event.plan.epoch)
            if epoch is None or epoch.plan is None or epoch.plan.epoch_id != event.plan.epoch_id:
                if event.ledger_id is not None:  # reserved, and the trainer went on: nothing of it was announced
                    self.supply.settle(event.ledger_id, [], [])
                return
            epoch.fetching = False
            chunk = Chunk(event.steps, event.work, event.samples, event.ledger_id, settled_to=event.steps[0])
            epoch.chunks.append(chunk)
            epoch.waiting.append(chunk)
            self._begin(epoch)

    def _open(self, opened: Opened) -> None:
        definition = self.definition = opened.definition
        self.run, self.name, self.stream_id = opened.run, opened.name, opened.stream_id
        one = ring.Layout(
            batch_size=definition.batch_size,
            structures=len(definition.structures),
            rows=opened.rows,
            columns=opened.columns,
            dtype=definition.dtype,
            slots=1,
            channels=definition.channels,
            depth=1 + 2 * definition.context,
            labels=opened.labels,
            sequences=definition.sequences is not None,
        )
        layout = replace(one, slots=self._slots or ring.default_slots(one))
        self._room(layout.size)
        self._memory.make(layout)
        self._memory.take_out(self._revoked)
        self.layout = layout
        self._free.extend(range(self.layout.slots))
        self._generation = [0] * self.layout.slots
        opening = {
            "layout": self.layout.to_json(), "blank": definition.on_error == "blank", "context_ends": definition.context_ends,
            "pipeline": None if definition.plain else {
                "transforms": definition.transforms, "seed": definition.seed, "size": definition.size, "fit": definition.fit,
                "sequences": definition.sequences, "statistics": opened.constants.get("statistics"),
            },
        }  # fmt: skip
        self.workers.open(self.number, opening, self._memory.descriptors)
        share = Share(opened.num_samples, definition.batch_size, self.supply.client.rank, self.supply.client.num_ranks, definition.tail)
        answer = {
            "op": "attached",
            "layout": self.layout.to_json(),
            "structures": list(definition.structures),
            "classes": opened.constants.get("classes"),
            "digest": definition.digest().hex(),
            "run": opened.run,
            "num_samples": opened.num_samples,
            "steps": share.steps,
            "batch_size": definition.batch_size,
            "tail": definition.tail,
        }
        if opened.attempt is not None:
            answer |= _where(opened)
        with ring.read_only(self._memory.ring) as fd:
            self._tell(answer, (fd,))
        if opened.attempt is None:
            return
        if self._again is None or self._again["epoch"] is None:
            self._prepare(opened.attempt.epoch)
        else:
            self._ahead = self._again["ahead"]
            self._prepare(self._again["epoch"]).asked = True

    def _enter(self, begun: Begun) -> None:
        for epoch in list(self._epochs):
            self._drop(epoch)
        self._beginning = False
        self.run = begun.attempt.run
        self._tell({"op": "begun", **_where(begun)})
        self._prepare(begun.attempt.epoch)

    def _planned(self, plan: Plan) -> None:
        epoch = self._find(plan.epoch)
        if epoch is None:
            return
        if epoch.plan is None:
            epoch.plan, epoch.share = plan, self.supply.share(plan)
            received = self._again["received"] if self._again and self._again["epoch"] == plan.epoch else 0
            epoch.begin_at(min(max(epoch.share.first_step, received), epoch.share.steps))
        elif epoch.plan.epoch_id != plan.epoch_id:  # what was prepared is lost: another rank planned again, or PostgreSQL crashed
            if epoch.announced_to > epoch.first:
                raise CatalogError(f"epoch {plan.epoch}: its order was replaced while it was fed; see `loaderd audit`")
            epoch = self._replace(epoch, plan)
        else:  # the same order, whose rest is being stored anew
            epoch.plan, epoch.fetching = plan, False
            epoch.fetched_to = epoch.chunks[-1].steps[1] if epoch.chunks else epoch.next_batch
        self._begin(epoch)

    def _replace(self, epoch: Epoch, plan: Plan) -> Epoch:
        """Begin an epoch again on another order; nothing of the first one was announced."""
        at = self._epochs.index(epoch)
        self._drop(epoch)
        share = self.supply.share(plan)
        fresh = Epoch(plan.epoch, plan=plan, share=share, asked=epoch.asked)
        fresh.begin_at(min(max(share.first_step, epoch.first), share.steps))
        self._epochs.insert(at, fresh)
        return fresh

    def revoke(self, samples: AbstractSet[int]) -> None:
        """Announce none of these samples from now on; what is decoded is decoded again without them."""
        self._revoked = samples
        self._memory.take_out(samples)

    # ------------------------------------------------------------------ from the trainer

    def asked(self, message: Message) -> None:
        """Take a message of the trainer's. Raises MessageError if it is none."""
        op = message.get("op")
        if op != "next":  # which the protocol's own layer checked
            check_pairs(message)
        for slot, generation in message.get("free", ()):
            if self._leased.get(slot) == generation:  # anything else was released before
                del self._leased[slot]
                self._free.append(slot)
        ack = message.get("ack")
        if ack is not None:
            self._acknowledge(ack[0], ack[1])
        if op == "begin":
            if any(epoch.asked for epoch in self._epochs):
                raise MessageError("a state comes too late: an epoch was asked for already")
            if self._beginning:
                raise MessageError("a state comes while another one is being loaded")
            resume = check_resume(message.get("run"), message.get("resume"))
            self._beginning = True
            self.supply.begin_attempt(*resume)
        elif op == "epoch":
            self._ask(message["epoch"], message["ahead"])
        self._pump()

    def _ask(self, number: int, ahead: int) -> None:
        if self.layout is None or not hasattr(self.supply, "attempt"):
            raise MessageError("an epoch was asked for before the run was begun")
        if self.supply.planning > PLANNED_AHEAD:
            raise MessageError("epochs were asked for faster than they are planned")
        self._ahead = ahead
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
        epoch.acknowledged_to = max(epoch.acknowledged_to, min(index + 1, epoch.announced_to))
        while epoch.chunks and epoch.chunks[0].steps[1] <= epoch.acknowledged_to:
            self._settle(epoch, epoch.chunks.popleft())

    def flush(self) -> None:
        """Write what was acknowledged of reservations that are not through yet; the daemon calls it about once a second."""
        if self._closed or self.supply.outage_since is not None:
            return
        for epoch in self._epochs:
            for chunk in epoch.chunks:
                upto = min(epoch.acknowledged_to, chunk.steps[1])
                if chunk.ledger_id is not None and upto > chunk.settled_to:
                    chunk.settled_to = upto
                    self.supply.settle(chunk.ledger_id, epoch.spans(chunk, chunk.steps[1]), epoch.spans(chunk, upto))

    # ------------------------------------------------------------------ moving batches

    def _pump(self) -> None:
        if self._closed or self.layout is None:
            return
        self._waits.count()
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
            if not epoch.all_fetched:
                break
        self._begin_ahead()
        self._waits.now_for(self._epochs[0] if self._epochs else None, free=bool(self._free))

    def _prepare(self, number: int) -> Epoch:
        epoch = Epoch(number)
        self._epochs.append(epoch)
        self.supply.plan(number)
        return epoch

    def _begin(self, epoch: Epoch) -> None:
        """Have an epoch made final once it is asked for and planned; what was fetched ahead is reserved with it."""
        if epoch.asked and epoch.plan is not None and not epoch.fetching and not epoch.begun:
            epoch.begun = True
            self.supply.begin(epoch.plan, epoch.chunks[0].steps if epoch.chunks else None)

    def _begin_ahead(self) -> None:
        """Have the next epoch begun while the trainer still works on the last batches of this one.

        The flush to disk is most of an epoch's first wait (2.7 ms without this, 0.4 ms later). Not with several ranks: another one may
        be fed from it when the catalog changes, and then it could not be taken back.
        """
        if len(self._epochs) < 2 or not self._epochs[0].ended or not self._ahead or self.supply.client.num_ranks > 1:
            return
        epoch = self._epochs[1]
        if epoch.plan is not None and epoch.chunks and not (epoch.asked or epoch.begun_ahead):
            epoch.begun_ahead = True
            self.supply.begin_ahead(epoch.plan, epoch.chunks[0].steps)

    def _fetch(self, epoch: Epoch) -> None:
        """Have the next steps fetched while less waits here than the ring and two chunks hold."""
        if epoch.fetching or epoch.all_fetched or self.layout is None or epoch.plan is None:
            return
        if not epoch.started and (epoch.fetched_to > epoch.first or epoch.asked):
            return  # before it is final one chunk is enough; while it becomes final a new one would miss its reservation
        share, size = epoch.dealt, self.layout.batch_size
        if (epoch.fetched_to - epoch.next_batch) * size > max(self.layout.slots * size, FETCHED_AHEAD):
            return
        first = epoch.fetched_to
        epoch.fetched_to = min(first + max(1, CHUNK // size), share.steps)
        epoch.fetching = True
        self.supply.fetch(epoch.plan, (first, epoch.fetched_to), reserve=epoch.started)

    def _dispatch(self, epoch: Epoch) -> None:
        share = epoch.dealt
        while self._free and epoch.waiting:
            chunk, index = epoch.waiting[0], epoch.next_batch
            epoch.next_batch += 1
            span = share.span(index)
            at = chunk.taken
            chunk.taken += span[1] - span[0]
            if index + 1 == chunk.steps[1]:
                epoch.waiting.popleft()
            slot = self._free.popleft()
            batch = Batch(epoch, index, span, chunk, at, slot, 0)
            epoch.batches[index] = batch
            self._submit(batch)

    def _submit(self, batch: Batch) -> None:
        assert self.definition is not None
        self._generation[batch.slot] += 1
        batch.generation = self._generation[batch.slot]
        batch.report = None
        batch.taken_out = self._memory.taken_out
        batch.revoked = self._places(batch, self._revoked)
        batch.killers = self._places(batch, self._killers) - batch.revoked
        holes = batch.revoked | batch.killers
        work = batch.chunk.work[batch.at : batch.at + batch.span[1] - batch.span[0]]
        rows = b"[" + b",".join(b"null" if at in holes else row for at, (row, _) in enumerate(work)) + b"]"
        record = b"".join([rows, *(bits for at, (_, bits) in enumerate(work) if at not in holes)])
        self._memory.write_work(batch.slot, record)
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
            lambda report: self._safely(lambda: self._decoded(batch, report)),
            lambda: self._died(batch),
        )

    def _safely(self, act: Callable[[], None]) -> None:
        """Do what a worker's message asks for; what goes wrong there ends this stream, not the daemon, which feeds others."""
        try:
            act()
        except CatalogError as error:
            self._end(error)
        except Exception as error:
            self._end(f"{type(error).__name__}: {error}; this is a bug in scanfeed")

    def _places(self, batch: Batch, samples: AbstractSet[int]) -> frozenset[int]:
        """Return which places of a batch hold one of these samples."""
        return frozenset(at for at, sample in enumerate(batch.samples) if sample in samples) if samples else frozenset()

    def _decoded(self, batch: Batch, report: Message | None) -> None:
        self._decoding -= 1
        if self._closed:
            if not self._decoding:
                self._release_memory()
            return
        if batch.epoch.dropped:
            self._free.append(batch.slot)
            self._pump()
            return
        if report is None:
            self._end(f"epoch {batch.epoch.number}, batch {batch.index}: decoding it killed several workers; see the log")
            return
        if "fault" in report:
            self._end(f"epoch {batch.epoch.number}, batch {batch.index}: {report['fault']}")
            return
        unreadable = report.get("unreadable", [])
        self.counters.decoded += len(batch.samples) - len(unreadable) - len(batch.revoked) - len(batch.killers)
        self.counters.by_offset += report["by_offset"]
        self.counters.opened += report["opened"]
        for sample_id, root, path, size, mtime_ns, offset in report.get("changed", []):
            self.supply.moved(root, path, size, mtime_ns, offset, sample_id)
        batch.report = report
        if unreadable:
            kept = self.supply.pseudonymized
            said = [[place, sample, code, words(code, text, pseudonymized=kept)] for place, sample, code, text in unreadable]
            self._could_not_read(batch, said)
        self._pump()

    def _died(self, batch: Batch) -> bool:
        """A worker died on this batch. False: it is not handed out again.

        Either nobody wants it any more, or it is decoded without the sample that it died on, since that killed one before.
        """
        if self._closed or batch.epoch.dropped:
            self._safely(lambda: self._decoded(batch, None))
            return False
        place = self._memory.died_at(batch.slot)
        if place < 0:
            return True
        batch.deaths[place] = batch.deaths.get(place, 0) + 1
        if batch.deaths[place] < DEADLY or place >= len(batch.samples):
            return True
        self._decoding -= 1
        self._killers.add(batch.samples[place])
        self._could_not_read(batch, [[place, batch.samples[place], "kills-worker", f"{DEADLY} decode workers died on it"]])
        if self._closed:
            if not self._decoding:
                self._release_memory()
        else:
            self._safely(lambda: self._submit(batch))
        return False

    def _could_not_read(self, batch: Batch, unreadable: list[list[Any]]) -> None:
        """Flag what could not be read, or end the stream where that is not the files' fault."""
        epoch, plan = batch.epoch, batch.epoch.plan
        assert plan is not None and self.definition is not None
        where = f"epoch {epoch.number}, batch {batch.index}"
        if (why := why_it_ends(unreadable, epoch.unreadable, plan.num_samples, self.definition.on_error)) is not None:
            self._end(f"{where}: {why}")
            return
        epoch.unreadable += len(unreadable)
        self.counters.unreadable += len(unreadable)
        for _, sample_id, code, message in unreadable:
            self.supply.flag(sample_id, code, message)
        if self.definition.on_error == "stop":
            self._note(batch, "unreadable", [at for at, *_ in unreadable])
            self._end(f"{where}: sample {unreadable[0][1]} could not be read: {unreadable[0][3]}; it is flagged (on_error='stop')")

    def _note(self, batch: Batch, outcome: str, places: list[int]) -> None:
        """Say that some positions of a reserved batch were not delivered."""
        epoch, chunk = batch.epoch, batch.chunk
        if epoch.plan is None or chunk.ledger_id is None:
            return
        positions = [batch.span[0] + at for at in sorted(places)]
        chunk.holes += positions
        self.supply.note(epoch.plan, chunk.ledger_id, outcome, [(position, position + 1) for position in positions])

    def _announce(self) -> None:
        while self._epochs and self._epochs[0].started:
            epoch = self._epochs[0]
            assert epoch.plan is not None and self.layout is not None
            batch = epoch.batches.get(epoch.announced_to)
            if batch is not None:
                if batch.report is None or batch.chunk.ledger_id is None:
                    return
                if batch.taken_out != self._memory.taken_out or self._places(batch, self._revoked) != batch.revoked:
                    self._submit(batch)  # something was revoked since it was decoded
                    return
                del epoch.batches[batch.index]
                epoch.announced_to += 1
                unreadable = [*batch.killers, *(at for at, *_ in batch.report.get("unreadable", []))]
                if unreadable:
                    self._note(batch, "unreadable", unreadable)
                if batch.revoked:
                    self._note(batch, "revoked", list(batch.revoked))
                    self.counters.revoked += len(batch.revoked)
                count = batch.report["count"]
                if not count:  # nothing in it could be read
                    self._free.append(batch.slot)
                    continue
                self._leased[batch.slot] = batch.generation
                self.counters.batches += 1
                self.counters.samples += len(batch.samples) - len(unreadable) - len(batch.revoked)
                self.counters.bytes += count * (self.layout.image_bytes + self.layout.structures * self.layout.rows * self.layout.columns)
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
            share = epoch.dealt
            if epoch.announced_to < share.steps:
                return
            if not epoch.ended:
                epoch.ended = True
                # What nobody gets is said once, by rank 0.
                nobody = [(share.end, share.num_samples)] if share.rank == 0 and share.end < share.num_samples else []
                self.supply.finish(epoch.plan, nobody)
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
        if epoch.started and not epoch.ended:
            share = epoch.dealt
            assert epoch.plan is not None
            if self._closed:
                self.supply.reserved(share.begins(epoch.announced_to))
            else:  # it went on
                rest = share.spans(epoch.announced_to, share.steps)
                nobody = [(share.end, share.num_samples)] if share.rank == 0 and share.end < share.num_samples else []
                self.supply.finish(epoch.plan, rest + nobody)
        epoch.chunks.clear()
        epoch.waiting.clear()
        epoch.batches.clear()

    def _settle(self, epoch: Epoch, chunk: Chunk) -> None:
        if chunk.ledger_id is not None:
            self.supply.settle(chunk.ledger_id, epoch.spans(chunk, epoch.announced_to), epoch.spans(chunk, epoch.acknowledged_to))

    # ------------------------------------------------------------------ the end

    def close(self, reason: str | None = None) -> None:
        """The trainer is gone, or the daemon ends: settle the ledger, give everything back once no worker writes any more."""
        if self._closed:
            return
        self._closed = True
        for epoch in list(self._epochs):
            self._drop(epoch)
        self.supply.close(reason)
        if not self._decoding:
            self._release_memory()

    def _release_memory(self) -> None:
        if self._memory.ring >= 0:
            self.workers.forget(self.number)
        self._memory.close()

    @property
    def ring_bytes(self) -> int:
        """Bytes of the ring, while there is one."""
        return self.layout.size if self.layout and self._memory.ring >= 0 else 0

    def status(self) -> Message:
        """Return what `loaderd status` shows of this stream."""
        self._waits.count()
        epoch = self._epochs[0] if self._epochs else None
        share = epoch.share if epoch else None
        return {
            "stream": self.name,
            "run": self.run,
            "attempt": self.supply.attempt.number if hasattr(self.supply, "attempt") else None,
            "rank": self.supply.client.rank,
            "num_ranks": self.supply.client.num_ranks,
            "definition": self.definition.to_json() if self.definition else {},
            "epoch": epoch.number if epoch else None,
            "steps": share.steps if share else None,
            "announced": epoch.announced_to if epoch else 0,
            "acknowledged": epoch.acknowledged_to if epoch else 0,
            "position": share.begins(epoch.announced_to) if epoch and share else 0,
            "num_samples": share.num_samples if share else None,
            "slots": self.layout.slots if self.layout else 0,
            "leased": len(self._leased),
            "free": len(self._free),
            "decoding": self._decoding,
            "ring_bytes": self.ring_bytes,
            "seconds": {name: round(seconds, 3) for name, seconds in self._waits.seconds.items()},
            "attached_s": round(time.monotonic() - self.attached, 1),
            **self.counters.__dict__,
        }

    # ------------------------------------------------------------------ arithmetic

    def _find(self, number: int) -> Epoch | None:
        return next((epoch for epoch in self._epochs if epoch.number == number), None)


def _where(event: Opened | Begun) -> Message:
    attempt = event.attempt
    assert attempt is not None
    return {"run": attempt.run, "attempt": attempt.number, "epoch": attempt.epoch, "step": attempt.step}
