"""The memory that the daemon shares with its workers for one stream: the ring, what they are to decode and, of sequences, the digits."""

from __future__ import annotations

import os
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING

from catalog.errors import CatalogError
from loaderd import ring
from loaderd.decode import WORK_STRIDE

if TYPE_CHECKING:
    from loaderd.pools import Pool


class Memory:
    """Owns the descriptors, from when there is one until `close`; -1 where there is none. Used by the loop alone.

    Attributes:
        ring: The slots.
        pool: The digits of a stream of sequences. Whoever has one made for this stream hands it over by setting this.
        taken_out: How many digits are shown no more.
    """

    def __init__(self) -> None:
        self.ring = self.pool = self._work = -1
        self.taken_out = 0
        self._stride = 0
        self._digits: Pool | None = None

    def make(self, layout: ring.Layout) -> None:
        """Allocate the ring and the work file. Raises CatalogError if there is no room."""
        self.ring = ring.create(layout)
        self._stride = layout.stride
        self._work = os.memfd_create("loaderd-work", os.MFD_CLOEXEC)
        if self.pool >= 0:
            from loaderd.pools import Pool

            self._digits = Pool(self.pool)

    @property
    def descriptors(self) -> tuple[int, ...]:
        """What a worker is given: ring, work and, where there is one, pool."""
        return tuple(fd for fd in (self.ring, self._work, self.pool) if fd >= 0)

    def write_work(self, slot: int, record: bytes) -> None:
        """Write what is to be decoded into a slot. Raises CatalogError if there is no memory for it."""
        try:
            written = os.pwrite(self._work, record, slot * WORK_STRIDE)
        except OSError as error:
            raise CatalogError(f"the work of a batch ({len(record)} bytes) cannot be written: {error.strerror}") from error
        if written != len(record):
            raise CatalogError(f"no memory for the work of a batch ({len(record)} bytes)")

    def take_out(self, revoked: AbstractSet[int]) -> None:
        """Let no sequence that is composed from now on show what is revoked."""
        if self._digits is not None:
            self.taken_out += self._digits.take_out(revoked)

    def died_at(self, slot: int) -> int:
        """Return the place in the slot's batch that a worker worked on when it died, once; -1: none."""
        at = slot * self._stride + ring.WORKING_AT
        place = int.from_bytes(os.pread(self.ring, 8, at), "little", signed=True)
        os.pwrite(self.ring, b"\xff" * 8, at)  # the next one may die before it begins
        return place

    def close(self) -> None:
        """Close what there is; no worker may write any more."""
        for fd in self.descriptors:
            os.close(fd)
        self.ring = self.pool = self._work = -1
        self._digits = None  # its mapping has a descriptor of its own
