"""The digits of a stream of sequences, in memory that the daemon and its workers share.

A memfd: how many images of which size, then their sample ids, labels, which of them may still be shown, and the pixels. They stand in the
order of their sample keys, so what is drawn follows from what the samples are. The daemon takes out what is revoked; a worker that
composes looks at that each time.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from catalog.database import Database
from catalog.errors import UsageError
from loaderd import digits
from loaderd.definitions import Definition
from loaderd.selections import SELECT_TIMEOUT_S, selection
from loaderd.sequences import Sequencer

HEAD = 32  # bytes: count, rows, columns as int64, and room


class Pool:
    """A mapping of a pool, for as long as any view on it lives; the descriptor stays the caller's.

    Attributes:
        sample_ids: int64 (N,).
        labels: uint8 (N,).
        alive: bool (N,): which may be shown.
        images: uint8 (N, rows, columns).
    """

    def __init__(self, fd: int) -> None:
        data = mmap.mmap(fd, 0, mmap.MAP_SHARED)
        count, rows, columns = np.frombuffer(data, np.int64, 3).tolist()
        ids_end = HEAD + 8 * count
        self.sample_ids = np.frombuffer(data, np.int64, count, HEAD)
        self.labels = np.frombuffer(data, np.uint8, count, ids_end)
        self.alive = np.frombuffer(data, np.bool_, count, ids_end + count)
        self.images = np.frombuffer(data, np.uint8, count * rows * columns, ids_end + 2 * count).reshape(count, rows, columns)

    def take_out(self, samples: Collection[int]) -> int:
        """Let these samples not be shown any more; return how many of them were until now."""
        gone = self.alive & np.isin(self.sample_ids, np.fromiter(samples, np.int64, len(samples)))
        self.alive[gone] = False
        return int(np.count_nonzero(gone))


class Composer:
    """Composes a stream's sequences, each with the sample of its position as one of its digits."""

    def __init__(self, pool: Pool, options: Mapping[str, Any], seed: int) -> None:
        self._sequencer = Sequencer(options, pool.images, pool.labels, pool.sample_ids, pool.alive)
        self._seed = seed
        self._places = {sample: place for place, sample in enumerate(pool.sample_ids.tolist())}

    def fill(
        self,
        sample_ids: Sequence[int],
        keys: Sequence[bytes],
        epoch: int,
        out_images: NDArray[Any],
        out_digits: NDArray[np.int64],
        out_boxes: NDArray[np.int64],
        out_members: NDArray[np.int64],
    ) -> None:
        """Compose the sequences of some positions: into (B, rows, columns), (B, L), (B, L, 4) and (B, L).

        Raises:
            CatalogError: If of a digit nothing is left that may be shown.
        """
        anchors = np.array([self._places[sample] for sample in sample_ids], np.int64)
        self._sequencer.fill_batch(keys, epoch, self._seed, anchors, out_images, out_digits, out_boxes, out_members)


def make(database: Database, definition: Definition) -> tuple[int, tuple[int, int], int]:
    """Return a new pool's descriptor, (rows, columns) of the composed images and the length of the longest sequence.

    Raises:
        UsageError: If not all samples of the stream are images of digits, or the sequences cannot be composed of them.
    """
    query, parameters = selection(definition)
    with database.read_only(timeout_s=SELECT_TIMEOUT_S) as reading:
        wanted = np.array([row[0] for row in reading.execute(query, parameters)], np.int64)
    # Of a feed without labels the condition, if any, is one over images.
    found = digits.load(database, definition.where if definition.labels is not None else None, labels=definition.labels)
    here = np.isin(found.sample_ids, wanted)
    if (missing := len(wanted) - np.count_nonzero(here)) > 0:
        raise UsageError(
            f"sequences: {missing} of {len(wanted)} samples have no digit that can be shown (no label from 0 to 9, or an open error); "
            f"leave them out by where="
        )
    assert definition.sequences is not None
    pixels = found.images[here]
    sequencer = Sequencer(definition.sequences, pixels, found.labels[here], found.sample_ids[here])
    count, rows, columns = pixels.shape
    fd = os.memfd_create("loaderd-pool", os.MFD_CLOEXEC)
    try:
        os.fchmod(fd, 0o600)
        parts = (
            np.array([count, rows, columns, 0], np.int64), found.sample_ids[here].astype(np.int64), found.labels[here].astype(np.uint8),
            np.ones(count, np.bool_), pixels,
        )  # fmt: skip
        with os.fdopen(os.dup(fd), "wb") as file:
            for part in parts:
                file.write(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
    except BaseException:
        os.close(fd)
        raise
    return fd, (sequencer.height, sequencer.width), sequencer.max_length
