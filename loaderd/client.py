"""What a trainer imports: `Feed` and its batches. Loads numpy and psycopg, neither SQLAlchemy nor pydicom.

A batch's arrays are views on the daemon's shared memory. They stay valid for as long as any of them lives: each lease has a base array
of its own, on which numpy hangs every view, and whose end gives the slot back. The finalizer that notices it only notes the slot and
wakes an eventfd: it may run anywhere, in the middle of anything. The note is sent with the next message.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from catalog import __version__, database
from catalog.embedded import default_home
from catalog.errors import CatalogError
from loaderd import messages
from loaderd.messages import PROTOCOL, Message
from loaderd.ring import Layout, Ring, Slot
from loaderd.workers import python

START_S = 60
_started: list[subprocess.Popen[bytes]] = []  # private daemons of this process, to be reaped


class FeedError(CatalogError):
    """The feed cannot go on; the message says why and what to do."""


class Batch:
    """One batch: views on shared memory, read-only, valid until the last of them is gone or `release` was called.

    Attributes:
        images: (B, rows, columns) of the feed's dtype, in modality units: stored * slope + intercept.
        masks: bool (B, rows, columns) for one structure, (B, K, rows, columns) for K >= 2; None for a feed without structures.
        present: bool (B, K): is there an annotation? False only with ``require="any"``.
        sample_ids: int64 (B,); -1 where ``tail="pad"`` filled up.
        sample_keys: uint8 (B, 16), the samples' uuids.
        valid: bool (B,); False for padding and (``on_error="blank"``) for what could not be read.
        epoch, index: counted from 0.

    B is the feed's batch size, or less at the end of an epoch (``tail="short"``) and where samples could not be read.
    Unpacks to ``images, masks``.
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
        yield self.images
        yield self.masks

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
        return contact_sheet(self.images, masks, titles, self._feed.structures)

    def __repr__(self) -> str:
        if self._slot is None:
            return f"<Batch {self.index} of epoch {self.epoch}, released>"
        return (
            f"<Batch {self.index} of epoch {self.epoch}: {len(self)} × {self.images.shape[1]}×{self.images.shape[2]} {self.images.dtype}>"
        )


class Feed:
    """Batches of a stream, in the database's random order, from a daemon over shared memory.

    Finds the user's daemon for this database (`loaderd serve`), or starts one for itself and ends it with itself. The first feed of
    a process starts it, further ones share it.

    Args:
        structures: Names to feed masks of; none: images alone.
        where: An SQL condition over the view ``sample`` (without structures: ``image_all``); it runs under a login that cannot write.
        limit: At most so many samples, the first by sample_key.
        include_flagged: Feed also what open flags of severity error speak against.
        require: With several structures, ``"all"`` of them must be there, or ``"any"``.
        batch_size: Samples a batch.
        seed: With the epoch it decides the order; 64 bits.
        shuffle: False gives the order by sample_key, the same in every epoch.
        tail: What becomes of the last samples that fill no batch: ``"short"``, ``"drop"`` or ``"pad"`` (zeros, ``valid`` False).
        dtype: Of the images: ``"float32"``, ``"float64"`` or ``"float16"``.
        on_error: What to do about a sample that cannot be read: ``"skip"``, ``"blank"`` (zeros, ``valid`` False) or ``"stop"``.
        run: The training's name in the ledger; without one a new name is made up.
        slots: Batches in the ring, 2 to 128; by default as many as fit 24 MiB (a cache), 4 to 16.
        timeout_s: How long to wait for a batch, in seconds, before `FeedError`.
        database: A PostgreSQL URL; by default ``CATALOG_DATABASE_URL``, else the embedded database.

    Raises:
        FeedError: If the stream cannot be opened; the message says why.
    """

    def __init__(
        self,
        *,
        structures: Sequence[str] = (),
        where: str | None = None,
        limit: int | None = None,
        include_flagged: bool = False,
        require: Literal["all", "any"] = "all",
        batch_size: int = 8,
        seed: int = 0,
        shuffle: bool = True,
        tail: Literal["short", "drop", "pad"] = "short",
        dtype: str = "float32",
        on_error: Literal["skip", "blank", "stop"] = "skip",
        run: str | None = None,
        slots: int | None = None,
        timeout_s: float = 60.0,
        database: str | None = None,
    ) -> None:
        if isinstance(structures, str):
            raise TypeError(f"structures={structures!r}: must be a list of names, such as [{structures!r}]")
        if sys.platform != "linux":
            raise FeedError("loaderd needs Linux: it feeds through a memfd; the catalog works here all the same")
        self.structures = tuple(structures)
        self.timeout_s = timeout_s
        self._database = database
        self._pid = os.getpid()
        self._lock = threading.RLock()  # a signal handler may close the feed in the middle of a wait
        self._closed = False  # nothing comes any more
        self._left = False  # and the daemon was told
        self._returned = _Returned()
        self._leases = 0
        self._last: list[int] | None = None  # epoch and index of the batch that was handed out last
        self._next_epoch = 0
        definition = {
            "structures": list(structures), "where": where, "limit": limit, "include_flagged": include_flagged, "require": require,
            "batch_size": batch_size, "seed": seed, "shuffle": shuffle, "tail": tail, "dtype": dtype, "on_error": on_error,
        }  # fmt: skip
        attach = {"op": "attach", "protocol": PROTOCOL, "version": __version__, "definition": definition, "run": run, "slots": slots}
        self._sock, reply, fd = _attach(attach, database, timeout_s)
        self._poller = select.poll()
        self._poller.register(self._sock, select.POLLIN)
        self._poller.register(self._returned.fd, select.POLLIN)
        self._ring = Ring(fd, Layout(**reply["layout"]))
        os.close(fd)
        self.run: str = reply["run"]
        self.num_samples: int = reply["num_samples"]
        self._steps: int = reply["steps"]

    def __len__(self) -> int:
        """Steps (batches) an epoch, as of when the feed was opened or the last epoch began."""
        return self._steps

    def epochs(self, count: int) -> Iterator[Batch]:
        """Return one iterator over the next `count` epochs."""
        for more in reversed(range(count)):
            yield from self._run_epoch(more)

    def epoch(self) -> Iterator[Batch]:
        """Return an iterator over the next epoch."""
        return self.epochs(1)

    def close(self) -> None:
        """Leave the stream; from any thread, as often as you like. A daemon that this process started ends with its last feed.

        Batches that are still held stay readable.
        """
        if os.getpid() != self._pid:
            return
        self._closed = True
        self._returned.wake()  # an iterator that waits in another thread, which then lets go of the lock
        with self._lock, self._sock:
            if not self._left:
                self._left = True
                _leave(self._sock)

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_sock"):
            self.close()

    def __getstate__(self) -> object:
        raise TypeError(
            "a Feed cannot be sent to another process: it batches and loads by itself; iterate it directly, or wrap it in a "
            "DataLoader with batch_size=None and num_workers=0"
        )

    # ------------------------------------------------------------------ iterating

    def _run_epoch(self, more: int) -> Iterator[Batch]:
        with self._lock:
            self._check()
            number = self._next_epoch
            self._next_epoch += 1
            self._send({"op": "epoch", "epoch": number, "ahead": more})
        while True:
            batch = self._next(number)
            if batch is None:
                return
            yield batch
            del batch  # else this frame would keep the slot while the trainer works on the next one

    def _next(self, number: int) -> Batch | None:
        with self._lock:
            self._check()
            if self._last is not None or self._returned.slots:
                self._send({"op": "next"})
            deadline = time.monotonic() + self.timeout_s
            while True:
                message = self._receive(deadline)
                if message["op"] == "error":
                    self._closed = True
                    raise FeedError(message["message"])
                if message.get("epoch") != number:
                    if message["op"] == "batch":  # of an epoch that was left before its end
                        self._note_released(message["slot"], message["generation"])
                    continue
                if message["op"] == "epoch":
                    self._steps, self.num_samples = message["steps"], message["num_samples"]
                elif message["op"] == "end":
                    return None
                elif message["op"] == "batch":
                    return self._batch(message)

    def _batch(self, message: Message) -> Batch:
        slot = self._ring.slot(message["slot"])
        if int(slot.header[0]) != message["generation"]:
            raise FeedError("a slot holds another batch than was announced; this is a bug in scanfeed")
        self._leases += 1
        finalizer = weakref.finalize(slot.base, self._returned.note, message["slot"], message["generation"])
        finalizer.atexit = False
        self._last = [message["epoch"], message["index"]]
        return Batch(self, slot, message, finalizer)

    def _receive(self, deadline: float) -> Message:
        while True:
            self._wait(deadline)
            try:
                message = messages.receive(self._sock)
            except BlockingIOError:
                continue  # it was a slot that came back
            except ConnectionResetError:
                continue  # reported once, ahead of what the daemon said before it closed; then the end
            except OSError:
                self._check()  # closed here, by a signal handler
                message = None
            if message is None:
                self._closed = True
                raise FeedError(
                    f"loaderd ended while it fed this training; its last words are in {default_home() / 'loaderd.log'} "
                    f"(or in the terminal of `loaderd serve`); open a new Feed to go on"
                )
            return message

    def _wait(self, deadline: float) -> None:
        """Wait until something comes, or until a slot was let go of somewhere else and can be sent back."""
        returned = self._returned
        returned.awaited = True
        # A slot that was let go of before this line woke nobody.
        ready = bool(returned.slots) or bool(self._poller.poll(max(0.0, deadline - time.monotonic()) * 1000))
        returned.awaited = False
        returned.drain()
        if not ready:
            held = self._leases - len(self._returned.slots)
            slots = self._ring.layout.slots
            why = (
                f"this process holds all {slots} slots: drop batches (or copies of their views) it no longer needs, or raise slots="
                if held >= slots
                else "the daemon is still decoding or waits for the database; see `loaderd status`, or raise timeout_s="
            )
            raise FeedError(f"no batch came within {self.timeout_s:g} s: {why}")
        self._check()
        if returned.slots:
            self._send({"op": "next"})

    def _send(self, message: Message) -> None:
        """Send a message, with what was let go of and how far the trainer came."""
        free = self._take_released()
        if free:
            message["free"] = free
        if self._last is not None:
            message["ack"] = self._last
            self._last = None
        try:
            messages.send(self._sock, message)
        except BlockingIOError:
            raise FeedError("the daemon does not read; see `loaderd status`") from None
        except OSError:
            pass  # it is gone: what it said before, or its end, is read next

    def _acknowledge(self, epoch: int, index: int) -> None:
        with self._lock:
            self._check()
            if self._last is not None and self._last >= [epoch, index]:
                last, self._last = self._last, [epoch, index]
                self._send({"op": "next"})
                self._last = last if last > [epoch, index] else None

    def _take_released(self) -> list[tuple[int, int]]:
        free = []
        while self._returned.slots:
            free.append(self._returned.slots.popleft())
        self._leases -= len(free)
        return free

    def _note_released(self, slot: int, generation: int) -> None:
        self._leases += 1
        self._returned.slots.append((slot, generation))

    def _check(self) -> None:
        if os.getpid() != self._pid:
            raise FeedError(
                "this Feed was opened before a fork and cannot be used in the child: open one there, "
                "or use DataLoader(num_workers=0) around it, since it loads in processes of its own"
            )
        if self._closed:
            raise FeedError("this Feed is closed; open a new one")


def batches(*, epochs: int = 1, **arguments: Any) -> Iterator[tuple[NDArray[Any], NDArray[np.bool_] | None]]:
    """Yield (images, masks) of `epochs` epochs; takes `Feed`'s arguments, and opens and closes it."""
    with Feed(**arguments) as feed:
        for batch in feed.epochs(epochs):
            yield batch.images, batch.masks


class _Returned:
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


# ------------------------------------------------------------------------------------------ finding and starting a daemon


def _attach(attach: Message, url: str | None, timeout_s: float) -> tuple[socket.socket, Message, int]:
    """Return the socket, the daemon's answer and the ring's descriptor; starts a private daemon if there is none."""
    with database.open_database(url, migrate=False) as db:
        path = messages.socket_path(db.identity())
        for _ in range(5):  # a private daemon may be ending just now
            sock = connect(path)
            if sock is None:
                with _starting(path):
                    sock = connect(path)
                    if sock is None:
                        _start_private(url)
                        continue
            try:
                messages.send(sock, attach)
                sock.settimeout(timeout_s)
                reply, fds = messages.receive_fds(sock)
            except TimeoutError:
                sock.close()
                raise FeedError(
                    f"loaderd did not open the stream within {timeout_s:g} s; see `loaderd status`, or raise timeout_s="
                ) from None
            except OSError:
                reply, fds = None, []
            if reply is not None and reply["op"] == "attached":
                sock.setblocking(False)
                return sock, reply, fds[0]
            with sock:
                if reply is not None:
                    if reply["ending"]:
                        _wait_for_end(sock)
                    raise FeedError(reply["message"])
    raise FeedError(f"loaderd ends as soon as it starts; its last words are in {default_home() / 'loaderd.log'}")


def connect(path: Path) -> socket.socket | None:
    """Return a connection to the daemon that listens there, None if there is none."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        with messages.Address(path) as name:
            sock.connect(name)
    except OSError:
        sock.close()
        return None
    return sock


class _starting:  # noqa: N801
    """Only one process at a time starts a daemon; the others then find it."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path.with_suffix(".start"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def __enter__(self) -> None:
        fcntl.flock(self._fd, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def _start_private(url: str | None) -> None:
    """Start a daemon that ends with its last trainer, and wait until it listens.

    By `subprocess`, never by fork: this works from a script without a main guard, from Jupyter, ``-c`` and standard input.
    """
    _started[:] = [process for process in _started if process.poll() is None]
    command, environment = python("-m", "loaderd", "serve", "--private")
    if url is not None:
        environment["CATALOG_DATABASE_URL"] = url  # not an argument: it may hold a password, and all users see arguments
    home = default_home()
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (home / "loaderd.log").open("ab") as log:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, start_new_session=True
        )
    _started.append(process)
    assert process.stdout is not None
    with process.stdout as said:
        line = said.readline().decode(errors="replace").strip() if _readable(said.fileno(), START_S) else ""
    if line != "ready":
        process.kill()
        process.wait()
        raise FeedError(line or f"loaderd did not start; its last words are in {home / 'loaderd.log'}")


def _leave(sock: socket.socket) -> None:
    """Say goodbye, and wait for a daemon that ends with this."""
    try:
        sock.settimeout(5)
        messages.send(sock, {"op": "bye"})
        while (reply := messages.receive(sock)) is not None:
            if reply["op"] == "bye":
                if reply["ending"]:
                    _wait_for_end(sock)
                return
    except OSError:
        pass  # gone already


def _wait_for_end(sock: socket.socket) -> None:
    try:
        _, _, pidfd = messages.peer_pidfd(sock)
    except OSError:  # it has ended
        return
    _readable(pidfd, 15)
    os.close(pidfd)
    _started[:] = [process for process in _started if process.poll() is None]


def _readable(fd: int, timeout_s: float) -> bool:
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    return bool(poller.poll(timeout_s * 1000))


def status(url: str | None = None) -> Message | None:
    """Return what the daemon of a database says of itself, None if there is none."""
    with database.open_database(url, migrate=False) as db:
        sock = connect(messages.socket_path(db.identity()))
    if sock is None:
        return None
    with sock:
        sock.settimeout(10)
        messages.send(sock, {"op": "status"})
        return messages.receive(sock)
