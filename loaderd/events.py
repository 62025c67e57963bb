"""What a stream's threads tell the daemon's loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from catalog.errors import CatalogError
from loaderd.attempts import Attempt
from loaderd.definitions import Definition
from loaderd.orders import Plan
from loaderd.shares import Span


@dataclass(frozen=True, slots=True)
class Pooled:
    """The digits of a stream of sequences are in this memfd, which is the stream's to close from here on. Comes before `Opened`."""

    pool: int


@dataclass(frozen=True, slots=True)
class Opened:
    """The stream is open: the shape of its images and how many samples it has now. No attempt: the run was fed before.

    `labels`: numbers a sample.
    """

    definition: Definition
    stream_id: int
    name: str | None
    run: str
    rows: int
    columns: int
    num_samples: int
    attempt: Attempt | None
    labels: int
    constants: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Begun:
    """The attempt in which the trainer is fed."""

    attempt: Attempt


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
    """Work for this rank's steps first … end: a row, the masks' bits and the sample id for each position.

    `ledger_id`: reserved already.
    """

    plan: Plan
    steps: Span
    work: list[tuple[bytes, bytes]]
    samples: list[int]
    ledger_id: int | None


@dataclass(frozen=True, slots=True)
class Failed:
    """A command failed; the stream ends with this."""

    error: CatalogError


Event = Pooled | Opened | Begun | Planned | Started | Fetched | Failed
