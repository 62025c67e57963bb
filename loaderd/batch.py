"""One batch in a trainer's hands, and the end of its lease.

A batch's arrays are views on the daemon's shared memory. They stay valid for as long as any of them lives: each lease has a base array
of its own, on which numpy hangs every view, and whose end gives the slot back. The finalizer that notices it only notes the slot and
wakes an eventfd: it may run anywhere, in the middle of anything. The note is sent with the next message.
"""

from __future__ import annotations

import contextlib
import os
import sys
import weakref
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from loaderd.attach import FeedError
from loaderd.messages import Message
from loaderd.ring import Slot

if TYPE_CHECKING:
    from loaderd.client import Feed


class Batch:
    """One batch: views on shared memory, read-only, valid until the last of them is gone or `release` was called.

    Attributes:
        images: (B, rows, columns) of the feed's dtype, in modality units: stored * slope + intercept, then what the transforms made of it.
            With ``channels="first"`` (B, C, rows, columns), with ``"last"`` (B, rows, columns, C).
        masks: bool (B, rows, columns) for one structure, (B, K, rows, columns) for K >= 2; None for a feed without structures.
        present: bool (B, K): is there an annotation? False only with ``require="any"``.
        labels: int64 (B,), with ``labels=``; None without. With ``sequences=`` (B, L): the digits, -1 behind the last.
        boxes: int64 (B, L, 4) with ``sequences=``: row, column, rows and columns of each digit, px; -1 behind the last. Else None.
        members: int64 (B, L) with ``sequences=``: the samples that the digits are images of, -1 behind the last. Else None.
        sample_ids: int64 (B,); -1 where ``tail="pad"`` filled up.
        sample_keys: uint8 (B, 16), the samples' uuids.
        valid: bool (B,); False for padding and (``on_error="blank"``) for what could not be read.
        epoch, index: counted from 0.

    B is the feed's batch size, or less at the end of an epoch (``tail="short"``) and where samples could not be read.
    Unpacks to ``images, masks``; with labels to ``images, labels``, with structures and labels to ``images, masks, labels``.
    """

    def __init__(self, feed: Feed, slot: Slot, message: Message, finalizer: weakref.finalize[..., Any]) -> None:
        self.epoch: int = message["epoch"]
        self.index: int = message["index"]
        self._count: int = message["count"]
        self._slot: Slot | None = slot
        self._feed = feed
        self._finalizer = finalizer

    @property
    def images(self) -> NDArray[Any]:
        """(B, rows, columns) of the feed's dtype: a view."""
        return self._held().images[: self._count]

    @property
    def masks(self) -> NDArray[np.bool_] | None:
        """Bool (B, rows, columns), or (B, K, rows, columns): a view; None for a feed without structures."""
        structures = len(self._feed.structures)
        if not structures:
            return None
        return self._held().masks[: self._count, 0] if structures == 1 else self._held().masks[: self._count]

    @property
    def present(self) -> NDArray[np.bool_]:
        """Bool (B, K): a view."""
        return self._held().present[: self._count]

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """Int64 (B,), of sequences (B, L): a view; None for a feed without labels."""
        layout = self._feed._ring.layout
        if not layout.labels:
            return None
        return self._held().labels[: self._count] if layout.sequences else self._held().labels[: self._count, 0]

    @property
    def boxes(self) -> NDArray[np.int64] | None:
        """Int64 (B, L, 4): a view; None but for sequences."""
        return self._held().boxes[: self._count] if self._feed._ring.layout.sequences else None

    @property
    def members(self) -> NDArray[np.int64] | None:
        """Int64 (B, L): a view; None but for sequences."""
        return self._held().members[: self._count] if self._feed._ring.layout.sequences else None

    @property
    def sample_ids(self) -> NDArray[np.int64]:
        """Int64 (B,): a view."""
        return self._held().sample_ids[: self._count]

    @property
    def sample_keys(self) -> NDArray[np.uint8]:
        """Uint8 (B, 16): a view."""
        return self._held().sample_keys[: self._count]

    @property
    def valid(self) -> NDArray[np.bool_]:
        """Bool (B,): a view."""
        return self._held().valid[: self._count]

    def _held(self) -> Slot:
        if self._slot is None:
            raise FeedError(f"batch {self.index} of epoch {self.epoch} was released; what it held may be overwritten by now")
        return self._slot

    def __iter__(self) -> Iterator[Any]:
        labels = self.labels
        yield self.images
        if labels is None or self._feed.structures:
            yield self.masks
        if labels is not None:
            yield labels

    def __len__(self) -> int:
        return self._count

    def release(self) -> None:
        """Give the slot back now. Views on this batch that are still around will show later batches: use with care."""
        self._slot = None
        self._finalizer()

    def done(self) -> None:
        """Say that this batch (and all before it) was trained on, without asking for the next one."""
        self._feed._acknowledge(self.epoch, self.index)

    def show(self) -> None:
        """Show the batch as a picture: in a notebook inline, else in the system's image viewer."""
        if "IPython" in sys.modules:
            from IPython.display import Image, display  # type: ignore[import-not-found]

            display(Image(data=self._repr_png_()))
        else:
            import io

            from PIL import Image as Pillow

            Pillow.open(io.BytesIO(self._repr_png_())).show()

    def _repr_png_(self) -> bytes:
        from catalog.overlay import contact_sheet  # Pillow takes 20 ms to load, and few trainings look

        masks = self._held().masks[: self._count] if self._feed.structures else None
        titles = [f"sample {sample}" if valid else "no sample" for sample, valid in zip(self.sample_ids, self.valid, strict=True)]
        planes = self._held().planes[: self._count]
        return contact_sheet(planes[:, planes.shape[1] // 2], masks, titles, self._feed.structures)

    def __repr__(self) -> str:
        if self._slot is None:
            return f"<Batch {self.index} of epoch {self.epoch}, released>"
        return f"<Batch {self.index} of epoch {self.epoch}: {len(self)} × {'×'.join(map(str, self.images.shape[1:]))} {self.images.dtype}>"


class Returned:
    """The slots whose last view died, and an eventfd that wakes an iterator that waits. Lives as long as any lease."""

    def __init__(self) -> None:
        self.slots: deque[tuple[int, int]] = deque()
        self.awaited = False
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._pid = os.getpid()

    def note(self, slot: int, generation: int) -> None:
        """The end of a lease. Runs wherever the last view dies: takes no lock, sends nothing."""
        if os.getpid() == self._pid:  # a forked child that drops its copy must not free what its parent reads
            self.slots.append((slot, generation))
            if self.awaited:
                self.wake()

    def wake(self) -> None:
        """Wake the iterator that waits for a batch."""
        os.eventfd_write(self.fd, 1)

    def drain(self) -> None:
        """Take back what `wake` did, if it was called."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.fd)

    def __del__(self) -> None:
        os.close(self.fd)
