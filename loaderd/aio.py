"""``async for batch in feed``: one epoch, without blocking the event loop.

A Feed waits in `poll`, and attaches again if its daemon dies: nothing that an event loop could do in pieces. So a thread waits in its
place. Being cancelled costs no batch: what was asked for stays on its way, and the next `anext` gets it.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterator
from queue import SimpleQueue

from loaderd.batch import Batch
from loaderd.client import Feed

_Asked = SimpleQueue["asyncio.Future[Batch | None] | None"]


def iterate(feed: Feed) -> AsyncIterator[Batch]:
    """Return an asynchronous iterator over the feed's next epoch; the batches are those of ``for batch in feed``.

    Several may not run on one feed at the same time, as with ``for``. To end one early leave the loop, or cancel the task: the next
    iteration is the next epoch. `feed.close()` may be called meanwhile, from the loop or from elsewhere; who waits gets a `FeedError`.
    """
    return _Epoch(feed)


class _Epoch:
    """One epoch. The thread lives from the first `anext` to the end of the epoch or of this object."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed
        self._asked: _Asked = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._pending: asyncio.Future[Batch | None] | None = None

    def __aiter__(self) -> AsyncIterator[Batch]:
        return self

    async def __anext__(self) -> Batch:
        if self._pending is None:
            if self._thread is None:
                # A daemon thread: neither the loop's end nor the interpreter's waits for a batch that nobody wants any more.
                self._thread = threading.Thread(target=_work, args=(self._feed.epoch(), self._asked), name="loaderd-aio", daemon=True)
                self._thread.start()
            self._pending = asyncio.get_running_loop().create_future()
            self._asked.put(self._pending)
        try:
            batch = await asyncio.shield(self._pending)
        except asyncio.CancelledError:
            raise
        except BaseException:
            self._pending = None
            raise
        self._pending = None
        if batch is None:
            raise StopAsyncIteration
        return batch

    def __del__(self) -> None:
        self._asked.put(None)  # safe in a finalizer: SimpleQueue's `put` takes no lock of Python's


def _work(batches: Iterator[Batch], asked: _Asked) -> None:
    """Fetch a batch whenever one is asked for. Holds nothing of the iterator, whose end is its own."""
    while (future := asked.get()) is not None:
        batch, error = None, None
        try:
            batch = next(batches, None)
        except Exception as raised:
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop was closed
            future.get_loop().call_soon_threadsafe(_settle, future, batch, error)
        del future, batch, error  # else this frame would keep the slot


def _settle(future: asyncio.Future[Batch | None], batch: Batch | None, error: Exception | None) -> None:
    if future.cancelled():  # `asyncio.run` cancels what is left at its end
        return
    if error is None:
        future.set_result(batch)
    else:
        future.set_exception(error)
        future.exception()  # nobody may be waiting any more: no "exception was never retrieved"
