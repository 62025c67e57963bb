"""How far a stream is in each of its epochs: what is fetched, what is being decoded, what was announced and used."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from loaderd.messages import Message
from loaderd.orders import Plan
from loaderd.shares import Share, Span, without


@dataclass(eq=False)
class Chunk:
    """Fetched work for some steps; `ledger_id` once it is reserved."""

    steps: Span
    work: list[tuple[bytes, bytes]]
    samples: list[int]
    ledger_id: int | None
    taken: int = 0  # positions that are in batches
    holes: list[int] = field(default_factory=list)  # positions of announced batches that have another outcome
    settled_to: int = 0  # steps of which the ledger knows that they are acknowledged


@dataclass(eq=False)
class Batch:
    """One batch on its way; `report` is the worker's, once it is decoded. `revoked`: places in it that are left out.

    `taken_out`: how many digits of a stream of sequences were shown no more when it was handed out.
    """

    epoch: Epoch
    index: int
    span: Span
    chunk: Chunk
    at: int  # in the chunk's work
    slot: int
    generation: int
    revoked: frozenset[int] = frozenset()
    taken_out: int = 0
    killers: frozenset[int] = frozenset()  # places that are left out because they killed workers
    deaths: dict[int, int] = field(default_factory=dict)  # place → workers that died on it
    report: Message | None = None

    @property
    def samples(self) -> list[int]:
        """Sample ids, revoked or not."""
        return self.chunk.samples[self.at : self.at + self.span[1] - self.span[0]]


@dataclass(eq=False)
class Epoch:
    """One pass. Steps before `fetched_to` are here or through, before `announced_to` announced, before `acknowledged_to` used."""

    number: int
    plan: Plan | None = None
    share: Share | None = None
    asked: bool = False  # by the trainer
    begun: bool = False  # the database was asked to make it final
    begun_ahead: bool = False  # before the trainer asked for it
    started: bool = False  # it is final
    ended: bool = False  # and all of it was announced
    dropped: bool = False  # the trainer went on, or the catalog moved
    fetching: bool = False
    first: int = 0  # the step at which this daemon begins in it
    fetched_to: int = 0
    next_batch: int = 0  # to be dispatched
    announced_to: int = 0
    acknowledged_to: int = 0
    chunks: deque[Chunk] = field(default_factory=deque)  # not settled yet
    waiting: deque[Chunk] = field(default_factory=deque)  # of these, with batches that have no slot yet
    batches: dict[int, Batch] = field(default_factory=dict)
    unreadable: int = 0

    def begin_at(self, step: int) -> None:
        """Leave out the steps before this one: another attempt made them, or another daemon."""
        self.first = self.fetched_to = self.next_batch = self.announced_to = self.acknowledged_to = step

    @property
    def dealt(self) -> Share:
        """This rank's part of it, once it is planned."""
        assert self.share is not None
        return self.share

    @property
    def all_fetched(self) -> bool:
        """Is the work of all steps fetched, or on its way?"""
        return self.share is not None and self.fetched_to >= self.share.steps

    def spans(self, chunk: Chunk, upto: int) -> list[Span]:
        """Return the positions that a chunk delivers in its steps before `upto`."""
        first, end = chunk.steps
        return without(self.dealt.spans(first, min(end, upto)), chunk.holes)
