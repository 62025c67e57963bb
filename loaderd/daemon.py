"""The daemon: one loop over its socket, its trainers, its workers and what the database threads post.

It listens on a Unix socket in a folder that only its user can enter, one daemon a database. A lock file beside the socket is held for
life: whoever gets it knows that a socket left behind belongs to nobody. A trainer that dies is seen by hang-up or by its pidfd,
whichever comes first; its slots, its stream and its threads go with it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from catalog import __version__
from catalog.database import Database
from catalog.errors import CatalogError, UsageError
from loaderd import messages
from loaderd.loop import Loop
from loaderd.messages import PROTOCOL, Message, MessageError
from loaderd.orders import Definition
from loaderd.streams import Stream
from loaderd.supply import Supply
from loaderd.workers import Workers

CONSUMERS = 256  # connections at a time
SLOTS = 128
IDLE_S = 10  # a private daemon that nobody attached to ends
LEAVE_S = 10  # for the ledger's last rows when it ends


def say(event: str, **details: object) -> None:
    """Write one line of the log to stderr."""
    listed = "".join(f" {name}={value}" for name, value in details.items())
    print(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} loaderd[{os.getpid()}] {event}{listed}", file=sys.stderr, flush=True)  # noqa: T201


@dataclass(eq=False)
class Consumer:
    """A connection: a trainer once it attached, else somebody who asks for the status."""

    sock: socket.socket
    pid: int
    pidfd: int
    stream: Stream | None = None
    supply: Supply | None = None


class Daemon:
    """Serves one database until it is told to end (or, if private, until its last trainer is gone)."""

    def __init__(self, database: Database, path: Path, *, workers: int, private: bool) -> None:
        self.path, self.private = path, private
        self.database = database
        self.began = time.monotonic()
        self._lock = self._take_lock()
        self.loop = Loop()
        self._posted: deque[Callable[[], None]] = deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.loop.add(self._wake, self._take_posted)
        self.workers = Workers(workers, self.loop, say)
        self.consumers: list[Consumer] = []
        self._supplies: list[Supply] = []
        self._stopping = False
        self._attached = False
        self._streams = 0
        path.unlink(missing_ok=True)
        self.listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        old = os.umask(0o077)
        try:
            with messages.Address(path) as name:
                self.listening.bind(name)
        finally:
            os.umask(old)
        self.listening.listen(64)
        self.listening.setblocking(False)
        self.loop.add(self.listening.fileno(), self._accept)

    def _take_lock(self) -> int:
        fd = os.open(self.path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + LEAVE_S + 5
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                # One that is ending has given up its socket already and keeps the lock for its ledger's last rows.
                if self.path.exists() or time.monotonic() > deadline:
                    holder = os.pread(fd, 32, 0).decode(errors="replace").strip()
                    os.close(fd)
                    raise CatalogError(f"a loaderd of this database is running (pid {holder or 'unknown'}); see `loaderd status`") from None
                time.sleep(0.02)
        os.ftruncate(fd, 0)
        os.pwrite(fd, str(os.getpid()).encode(), 0)
        return fd

    def serve(self) -> None:
        """Run until SIGTERM or SIGINT, or, if private, until nobody is left."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.stop())
        say("serving", database=self.database.name.replace(" ", "_"), socket=self.path, workers=len(self.workers.workers))
        try:
            while not self._stopping:
                came = self.loop.once(IDLE_S if self.private and not self.consumers else None)
                if self.private and not self.consumers and (self._attached or not came):
                    break
        finally:
            self._leave()

    def stop(self) -> None:
        """End the loop; safe from a signal handler."""
        self._stopping = True
        os.eventfd_write(self._wake, 1)

    def _leave(self) -> None:
        # First the socket: whoever comes now starts a new daemon instead of waiting for this one.
        self.loop.remove(self.listening.fileno())
        self.listening.close()
        self.path.unlink(missing_ok=True)
        for consumer in list(self.consumers):
            self._part(consumer, "loaderd is ending (it was told to stop)")
        deadline = time.monotonic() + LEAVE_S
        for supply in self._supplies:
            supply.join(max(0.0, deadline - time.monotonic()))
        self.workers.close()
        self.loop.close()
        os.close(self._lock)
        self.database.close()
        say("ended")

    # ------------------------------------------------------------------ trainers

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                sock, _ = self.listening.accept()
                self._welcome(sock)

    def _welcome(self, sock: socket.socket) -> None:
        try:
            pid, uid, pidfd = messages.peer_pidfd(sock)
        except OSError:  # gone already
            sock.close()
            return
        if uid not in (os.getuid(), 0) or len(self.consumers) >= CONSUMERS:
            say("refused", pid=pid, uid=uid, consumers=len(self.consumers))
            os.close(pidfd)
            sock.close()
            return
        sock.setblocking(False)
        consumer = Consumer(sock, pid, pidfd)
        self.consumers.append(consumer)
        self.loop.add(sock.fileno(), lambda: self._hear(consumer))
        self.loop.add(pidfd, lambda: self._part(consumer))

    def _hear(self, consumer: Consumer) -> None:
        try:
            message = messages.receive(consumer.sock)
            if message is None:
                self._part(consumer)
            elif consumer.stream is not None:
                if message.get("op") == "bye":
                    self._bye(consumer)
                else:
                    consumer.stream.asked(message)
            elif message.get("op") == "status":
                self._tell(consumer, self.status())
            elif message.get("op") == "attach":
                self._attach(consumer, message)
            else:
                raise MessageError("the first message must be attach or status")
        except BlockingIOError:
            pass
        except OSError:
            self._part(consumer)
        except CatalogError as error:
            self._part(consumer, str(error))
        except Exception as error:  # whatever a peer sends must not end the daemon, which feeds others
            self._part(consumer, f"{type(error).__name__}: {error}; this is a bug in scanfeed")

    def _attach(self, consumer: Consumer, message: Message) -> None:
        self._attached = True
        if message.get("protocol") != PROTOCOL:
            raise UsageError(
                f"this loaderd ({__version__}) speaks protocol {PROTOCOL}, the trainer's scanfeed ({message.get('version')}) "
                f"protocol {message.get('protocol')}; end it (kill {os.getpid()}) and start it again with the same version"
            )
        slots, run = message.get("slots"), message.get("run")
        if slots is not None and not (type(slots) is int and 2 <= slots <= SLOTS):
            raise UsageError(f"slots={slots!r}: must be a whole number from 2 to {SLOTS}")
        if not (run is None or (isinstance(run, str) and 0 < len(run) <= 200)):
            raise UsageError("run must be a name of at most 200 characters")
        definition = Definition.from_json(message.get("definition"))
        self._streams += 1
        supply = Supply(
            self.database,
            definition,
            run=run,
            consumer=f"{socket.gethostname()}:{consumer.pid}",
            post=lambda event: self._post(consumer, event),
        )
        self._supplies = [one for one in self._supplies if one.alive] + [supply]
        consumer.stream = Stream(
            self._streams,
            definition,
            supply,
            self.workers,
            slots=slots,
            tell=lambda message, fds=(): self._tell(consumer, message, fds),
            end=lambda reason: self._part(consumer, reason),
        )
        say("attached", pid=consumer.pid, stream=self._streams)

    def _post(self, consumer: Consumer, event: Any) -> None:
        """From a supply thread: let the loop take an event."""
        self._posted.append(lambda: consumer.stream.heard(event) if consumer.stream is not None else None)
        os.eventfd_write(self._wake, 1)

    def _take_posted(self) -> None:
        os.eventfd_read(self._wake)
        while self._posted:
            self._posted.popleft()()

    def _tell(self, consumer: Consumer, message: Message, fds: Sequence[int] = ()) -> None:
        try:
            messages.send(consumer.sock, message, fds)
        except BlockingIOError:
            self._part(consumer)  # hundreds of messages unread: it will not read this one either
        except OSError:
            self._part(consumer)

    def _bye(self, consumer: Consumer) -> None:
        self._tell(consumer, {"op": "bye", "ending": self._ending(without=consumer)})
        self._part(consumer)

    def _ending(self, without: Consumer | None = None) -> bool:
        return self._stopping or (self.private and all(one is without for one in self.consumers))

    def _part(self, consumer: Consumer, reason: str | None = None) -> None:
        """Let go of a connection and of all that belongs to it; with a reason, tell it first."""
        if consumer not in self.consumers:
            return
        self.consumers.remove(consumer)
        if reason is not None:
            say("refused" if consumer.stream is None else "stream ended", pid=consumer.pid, reason=repr(reason))
            with contextlib.suppress(OSError, MessageError):
                messages.send(consumer.sock, {"op": "error", "message": reason, "ending": self._ending()})
        self.loop.remove(consumer.sock.fileno())
        self.loop.remove(consumer.pidfd)
        consumer.sock.close()
        os.close(consumer.pidfd)
        if consumer.stream is not None:
            consumer.stream.close()
            if reason is None:
                say("left", pid=consumer.pid, batches=consumer.stream.counters.batches)

    def status(self) -> Message:
        """Return what `loaderd status` shows."""
        return {
            "op": "status",
            "pid": os.getpid(),
            "version": __version__,
            "protocol": PROTOCOL,
            "database": self.database.name,
            "socket": str(self.path),
            "private": self.private,
            "uptime_s": round(time.monotonic() - self.began, 1),
            "workers": [worker.process.pid for worker in self.workers.workers],
            "workers_replaced": self.workers.replaced,
            "streams": [{"pid": one.pid, **one.stream.status()} for one in self.consumers if one.stream is not None],
        }
