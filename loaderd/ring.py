"""A stream's ring: one memfd, allocated and faulted in once, cut into slots of one batch each. Used on both sides.

::

    slot i at i * stride, stride a multiple of the page
      0         header: generation, epoch, index, samples, place of the sample being decoded (-1: none), as int64
      64        sample_ids   int64 (B,)         -1 where there is no sample
      …         sample_keys  uint8 (B, 16)
      …         valid        bool  (B,)
      …         present      bool  (B, K)
      …         labels       int64 (B, L)       on a multiple of 8; L = 0: none
      …         members      int64 (B, L)       of sequences: the sample that each label's digit is of, -1 where there is none
      …         boxes        int64 (B, L, 4)    of sequences: where each digit lies
      images    dtype (B, rows, columns)        on a page of its own; with channels (B, C, rows, columns) or (B, rows, columns, C)
      masks     bool  (B, K, rows, columns)     on a page of its own; K = 0: none

Copying 16 MiB takes 0.6 ms into a warm ring and 13 ms into fresh shared memory; so the pages are made once and kept. A memfd has
no name: nothing stays in ``/dev/shm`` after any kill -9, and Docker's 64 MB limit there does not hold for it. It is sealed against
resizing, so no mapping can be cut short under a reader. Trainers get the descriptor reopened read-only: that keeps them from
accidents, not a hostile process of the same user, which could trace the daemon anyway.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import math
import mmap
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from catalog.errors import CatalogError

PAGE = 4096
HEADER = 64
WORKING_AT = 32  # byte of the header's fifth number
# What the default number of slots aims at: a ring that stays in the last-level cache. With 8 slots of 2.6 MiB a feed made 22,100
# samples/s, with 16 of them 20,000, on a processor with 32 MiB of it.
RING_BYTES = 24 << 20


@dataclass(frozen=True)
class Layout:
    """Where everything lies in a ring. Sizes in samples, px and slots."""

    batch_size: int
    structures: int
    rows: int
    columns: int
    dtype: str
    slots: int
    channels: str = "none"  # or first, last
    depth: int = 1  # channels an image
    labels: int = 0  # numbers a sample
    sequences: bool = False  # with members and boxes

    @cached_property
    def labels_at(self) -> int:
        """Byte in the slot where the labels begin."""
        return -(-(HEADER + self.batch_size * (8 + 16 + 1 + self.structures)) // 8) * 8

    @cached_property
    def images_at(self) -> int:
        """Byte in the slot where the images begin."""
        return _pages(self.labels_at + 8 * self.batch_size * self.labels * (1 + 5 * self.sequences))

    @cached_property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of one image, with its channels."""
        plane = (self.rows, self.columns)
        return {"none": plane, "first": (self.depth, *plane), "last": (*plane, self.depth)}[self.channels]

    @cached_property
    def image_bytes(self) -> int:
        """Bytes of one image."""
        return self.depth * self.rows * self.columns * np.dtype(self.dtype).itemsize

    @cached_property
    def masks_at(self) -> int:
        """Byte in the slot where the masks begin."""
        return self.images_at + _pages(self.batch_size * self.image_bytes)

    @cached_property
    def stride(self) -> int:
        """Bytes from slot to slot."""
        return self.masks_at + _pages(self.batch_size * self.structures * self.rows * self.columns)

    @cached_property
    def size(self) -> int:
        """Bytes of the ring."""
        return self.stride * self.slots

    def to_json(self) -> dict[str, Any]:
        """Return it as messages carry it."""
        return asdict(self)


def default_slots(one: Layout) -> int:
    """Return how many slots of such a batch fit 24 MiB, at least 4 and at most 16."""
    return max(4, min(16, RING_BYTES // one.stride))


class Slot:
    """Views on one slot, each made when it is asked for (a trainer looks at two or three of them).

    They share one base array, so that its end is the end of the last of them: numpy collapses chains of views to it.
    """

    def __init__(self, base: NDArray[np.uint8], layout: Layout) -> None:
        self.base, self._layout = base, layout

    @cached_property
    def header(self) -> NDArray[np.int64]:
        """Generation, epoch, index, samples, place of the sample being decoded."""
        return self.base[:HEADER].view(np.int64)

    @cached_property
    def sample_ids(self) -> NDArray[np.int64]:
        """(B,)"""
        return self.base[HEADER : HEADER + 8 * self._layout.batch_size].view(np.int64)

    @cached_property
    def sample_keys(self) -> NDArray[np.uint8]:
        """(B, 16)"""
        batch = self._layout.batch_size
        return self.base[HEADER + 8 * batch : HEADER + 24 * batch].reshape(batch, 16)

    @cached_property
    def valid(self) -> NDArray[np.bool_]:
        """(B,)"""
        batch = self._layout.batch_size
        return self.base[HEADER + 24 * batch : HEADER + 25 * batch].view(np.bool_)

    @cached_property
    def present(self) -> NDArray[np.bool_]:
        """(B, K)"""
        batch, structures = self._layout.batch_size, self._layout.structures
        at = HEADER + 25 * batch
        return self.base[at : at + batch * structures].view(np.bool_).reshape(batch, structures)

    @cached_property
    def images(self) -> NDArray[Any]:
        """(B, rows, columns), with channels (B, C, rows, columns) or (B, rows, columns, C)"""
        layout = self._layout
        pixels = self.base[layout.images_at : layout.images_at + layout.batch_size * layout.image_bytes].view(layout.dtype)
        return pixels.reshape(layout.batch_size, *layout.image_shape)

    @cached_property
    def planes(self) -> NDArray[Any]:
        """(B, C, rows, columns): the images, wherever their channels lie."""
        if self._layout.channels == "last":
            return np.moveaxis(self.images, -1, 1)
        return self.images if self._layout.channels == "first" else self.images[:, np.newaxis]

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """(B, L)"""
        return self._numbers(0, 1)[:, :, 0]

    @cached_property
    def members(self) -> NDArray[np.int64]:
        """(B, L)"""
        return self._numbers(1, 1)[:, :, 0]

    @cached_property
    def boxes(self) -> NDArray[np.int64]:
        """(B, L, 4)"""
        return self._numbers(2, 4)

    def _numbers(self, before: int, each: int) -> NDArray[np.int64]:
        size = 8 * self._layout.batch_size * self._layout.labels
        at = self._layout.labels_at + before * size
        return self.base[at : at + each * size].view(np.int64).reshape(self._layout.batch_size, self._layout.labels, each)

    @cached_property
    def masks(self) -> NDArray[np.bool_]:
        """(B, K, rows, columns)"""
        layout = self._layout
        shape = (layout.batch_size, layout.structures, layout.rows, layout.columns)
        return self.base[layout.masks_at : layout.masks_at + math.prod(shape)].view(np.bool_).reshape(shape)


class Ring:
    """A mapping of a ring, for as long as any view on it lives."""

    def __init__(self, fd: int, layout: Layout, *, writable: bool = False) -> None:
        """Map a ring that somebody else may have made; the descriptor stays the caller's.

        Raises:
            CatalogError: If it is not of that size, or not sealed against resizing.
        """
        if os.fstat(fd).st_size != layout.size or not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            raise CatalogError("the ring is not of the size that was announced, or could still shrink under its readers; not mapped")
        self.layout = layout
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        # Faulted in now: the first epoch is not to pay 4 KiB by 4 KiB.
        self._map = mmap.mmap(fd, layout.size, mmap.MAP_SHARED | mmap.MAP_POPULATE, protection)

    def slot(self, number: int) -> Slot:
        """Return new views on a slot, on a base array of their own."""
        return Slot(np.frombuffer(self._map, np.uint8, count=self.layout.stride, offset=number * self.layout.stride), self.layout)


def create(layout: Layout) -> int:
    """Return the descriptor of a new ring, every page allocated, sealed against resizing.

    Raises:
        CatalogError: If there is no room for it.
    """
    if layout.size > _available():  # asking for more would not fail but wake the kernel's OOM killer
        raise CatalogError(_no_room(layout, f"{_available() / 2**20:.0f} MiB of memory are available"))
    fd = os.memfd_create("loaderd-ring", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.fchmod(fd, 0o600)
        os.posix_fallocate(fd, 0, layout.size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    except OSError as error:
        os.close(fd)
        if error.errno in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG, errno.EINVAL, errno.EDQUOT):
            raise CatalogError(_no_room(layout, str(error.strerror))) from error
        raise
    return fd


@contextlib.contextmanager
def read_only(fd: int) -> Iterator[int]:
    """Give the same memory under a descriptor that cannot write; closed at the end."""
    reopened = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield reopened
    finally:
        os.close(reopened)


def _available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return sys.maxsize


def _no_room(layout: Layout, why: str) -> str:
    return (
        f"the ring needs {layout.size / 2**20:.0f} MiB ({layout.slots} slots of {layout.stride / 2**20:.1f} MiB) and there is no room "
        f"for it: {why}; pass a smaller batch_size or fewer slots"
    )


def _pages(size: int) -> int:
    return -(-size // PAGE) * PAGE
