"""The daemon: one loop over its socket, its trainers, its workers and what the database threads post.

It listens on a Unix socket in a folder that only its user can enter (or a group, `--group`), one daemon a database. A lock file beside
the socket is held for life: whoever gets it knows that a socket left behind belongs to nobody. A trainer that dies is seen by hang-up
or by its pidfd, whichever comes first; its slots, its stream and its threads go with it.

Whatever a peer sends, it can cost the daemon no more than its share: messages are bounded, a connection that does not attach is
closed, one process has few of them, and all rings together stay within `--memory`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import resource
import signal
import socket
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from catalog import __version__
from catalog.database import Database
from catalog.errors import CatalogError, UsageError
from loaderd import messages
from loaderd.attach import RUNNING, connect
from loaderd.loop import Loop
from loaderd.messages import PROTOCOL, Message, MessageError, check_resume
from loaderd.streams import Stream
from loaderd.supply import Client, Supply
from loaderd.watch import Watch
from loaderd.workers import Workers

CONSUMERS = 256  # connections at a time
OF_ONE_PROCESS = 32  # of these
HELLO_S = 10  # a connection that asks for nothing in that time is closed
MESSAGES = 64  # of one peer in a row; then others have their turn
SLOTS = 128
LONGEST = 1_000  # characters of a value in the log, and of what a peer is told
DESCRIPTORS = 8_192  # asked of the system: a trainer takes eight (socket, pidfd, ring, work, connections)
TICK_S = 1.0
IDLE_S = 10  # a private daemon that nobody attached to ends
LEAVE_S = 10  # for the ledger's last rows when it ends


def say(event: str, **details: object) -> None:
    """Write one line of the log to stderr: logfmt, one event a line."""
    fields = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "pid": os.getpid(), "event": event, **details}
    line = " ".join(f"{name}={_quoted(value)}" for name, value in fields.items())
    with contextlib.suppress(OSError):  # a terminal that was closed, a full disk: no reason to stop feeding
        os.write(2, f"{line}\n".encode(errors="replace"))


def _quoted(value: object) -> str:
    text = _short(str(value))  # a peer decides what is in it
    return json.dumps(text, ensure_ascii=False) if not text or any(not one.isprintable() or one in ' "=' for one in text) else text


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} … {text[-LONGEST // 2 :]}"


@dataclass(eq=False)
class Consumer:
    """A connection: a trainer once it attached, else somebody who asks for the status."""

    sock: socket.socket
    pid: int
    uid: int
    pidfd: int
    stream: Stream | None = None
    began: float = field(default_factory=time.monotonic)


class Daemon:
    """Serves one database until it is told to end (or, if private, until its last trainer is gone)."""

    def __init__(
        self,
        database: Database,
        path: Path,
        *,
        workers: int,
        private: bool = False,
        memory: int | None = None,
        group: int | None = None,
        supervisor: int | None = None,
    ) -> None:
        """Listen; `memory` bounds all rings together in bytes, `group` may attach, too, `supervisor` is a pipe that hangs up with it."""
        self.path, self.private, self.memory, self.group = path, private, memory, group
        self.supervised = supervisor is not None
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
        self._full = False  # said that no descriptor is left
        path.unlink(missing_ok=True)
        self.listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        old = os.umask(0o177)
        try:
            with messages.Address(path) as name:
                self.listening.bind(name)
        finally:
            os.umask(old)
        self.listening.listen(64)
        if group is not None:
            os.chown(path, -1, group)
            path.chmod(0o660)
        self.listening.setblocking(False)
        self.loop.add(self.listening.fileno(), self._accept)
        self.revoked: set[int] = set()  # sample ids
        self._watch = Watch(database, self._seen)
        if supervisor is not None:
            self.loop.add(supervisor, lambda: self._orphaned(supervisor))

    def _take_lock(self) -> int:
        fd = os.open(self.path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + LEAVE_S + 5
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                # One that is ending has given up its socket already and keeps the lock for its ledger's last rows; one that has just
                # begun does not listen yet, and may die before it does. The socket's file alone may be a killed one's.
                listening = connect(self.path)
                if listening is not None:
                    listening.close()
                if listening is not None or time.monotonic() > deadline:
                    holder = os.pread(fd, 32, 0).decode(errors="replace").strip()
                    os.close(fd)
                    raise CatalogError(f"{RUNNING} (pid {holder or 'unknown'}); see `loaderd status`") from None
                time.sleep(0.02)
        os.ftruncate(fd, 0)
        os.pwrite(fd, str(os.getpid()).encode(), 0)
        return fd

    def serve(self) -> None:
        """Run until SIGTERM or SIGINT, or, if private, until nobody is left."""
        self._watch.start()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.stop())
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, DESCRIPTORS)), hard))
        say("serving", database=self.database.name, socket=self.path, workers=len(self.workers.workers))
        ticked = idle = time.monotonic()
        try:
            while not self._stopping:
                self.loop.once(TICK_S)
                now = time.monotonic()
                if now - ticked >= TICK_S:
                    ticked = now
                    self._tick(now)
                if self.consumers:
                    idle = now
                elif self.private and (self._attached or now - idle > IDLE_S):
                    break
        except Exception as error:  # said before what ends with it, which may take seconds or be killed
            say("ends by an error of its own", error=repr(error), where=traceback.format_exc(limit=-3))
            raise
        finally:
            self._leave()

    def stop(self) -> None:
        """End the loop; safe from a signal handler."""
        self._stopping = True
        os.eventfd_write(self._wake, 1)

    def _tick(self, now: float) -> None:
        for consumer in list(self.consumers):
            if consumer.stream is not None:
                self._guarded(consumer, consumer.stream.flush)
            elif now - consumer.began > HELLO_S:
                self._part(consumer, f"nothing was asked for within {HELLO_S} s")

    def _orphaned(self, supervisor: int) -> None:
        """The supervisor died: feed who is here, then end, since nobody would start this daemon again."""
        self.loop.remove(supervisor)
        os.close(supervisor)
        say("supervisor died; ending with the last trainer")
        self.private, self.supervised, self._attached = True, False, True

    def _seen(self, revoked: set[int], ended: set[int]) -> None:
        """From the watching thread: what is revoked now, and which streams were ended."""

        def take() -> None:
            if revoked != self.revoked:
                say("revoked", images=len(revoked))
                self.revoked = revoked
                for consumer in self.consumers:
                    if consumer.stream is not None:
                        consumer.stream.revoke(revoked)
            for consumer in list(self.consumers):
                if consumer.stream is not None and consumer.stream.stream_id in ended:
                    self._part(consumer, f"the stream {consumer.stream.name!r} was ended (loaderd stream end)")

        self._posted.append(take)
        os.eventfd_write(self._wake, 1)

    def _leave(self) -> None:
        # First the socket: whoever comes now starts a new daemon instead of waiting for this one.
        self.loop.remove(self.listening.fileno())
        self.listening.close()
        self.path.unlink(missing_ok=True)
        for consumer in list(self.consumers):
            # After an error of its own it hangs up without a word, as if killed: trainers then attach to the next one.
            self._part(consumer, "loaderd is ending (it was told to stop)" if self._stopping else None)
        deadline = time.monotonic() + LEAVE_S
        for supply in self._supplies:
            supply.join(max(0.0, deadline - time.monotonic()))
        self._watch.close()
        self.workers.close()
        self.loop.close()
        os.close(self._lock)
        self.database.close()
        say("ended")

    # ------------------------------------------------------------------ trainers

    def _accept(self) -> None:
        try:
            while True:
                # Who is let in takes two descriptors, a socket and its process's: with one left alone they would be hung up on.
                spare = os.dup(self._wake)
                try:
                    sock, _ = self.listening.accept()
                finally:
                    os.close(spare)
                self._welcome(sock)
        except BlockingIOError:
            self._full = False
        except OSError as error:  # no descriptor is left: whoever waits is let in when somebody left
            if not self._full:
                say("cannot accept", error=error)
            self._full = True
            time.sleep(0.01)  # since the loop calls this again at once

    def _welcome(self, sock: socket.socket) -> None:
        try:
            pid, uid, pidfd = messages.peer_pidfd(sock)
        except OSError:  # gone already; or another thread took the last descriptor, and who came tries again
            sock.close()
            return
        known = uid in (os.getuid(), 0) or (self.group is not None and self.group in messages.peer_groups(sock))
        its = sum(consumer.pid == pid for consumer in self.consumers)
        sock.setblocking(False)
        if not known or len(self.consumers) >= CONSUMERS or its >= OF_ONE_PROCESS:
            say("refused", peer=pid, uid=uid, connections=len(self.consumers), its_own=its)
            full = f"has {len(self.consumers)} connections, {its} of them with this process, and takes no more for now"
            why = full if known else "is another user's"
            with contextlib.suppress(OSError):
                messages.send(sock, {"op": "error", "message": f"this loaderd {why}", "ending": False, "code": 1})
            os.close(pidfd)
            sock.close()
            return
        consumer = Consumer(sock, pid, uid, pidfd)
        self.consumers.append(consumer)
        self.loop.add(sock.fileno(), lambda: self._hear(consumer))
        self.loop.add(pidfd, lambda: self._part(consumer))

    def _hear(self, consumer: Consumer) -> None:
        try:
            for _ in range(MESSAGES):
                message = messages.receive(consumer.sock)
                if message is None:
                    self._part(consumer)
                else:
                    self._take(consumer, message)
                if consumer not in self.consumers:
                    return
        except BlockingIOError:
            pass
        except OSError:
            self._part(consumer)
        except CatalogError as error:
            self._part(consumer, str(error))
        except Exception as error:  # whatever a peer sends must not end the daemon, which feeds others
            self._part(consumer, f"{type(error).__name__}: {error}; this is a bug in scanfeed")

    def _guarded(self, consumer: Consumer, act: Callable[[], None]) -> None:
        """Do something for one trainer; what goes wrong there ends its stream, not the daemon, which feeds others."""
        try:
            act()
        except CatalogError as error:
            self._part(consumer, str(error), error.exit_code)
        except Exception as error:
            self._part(consumer, f"{type(error).__name__}: {error}; this is a bug in scanfeed")

    def _take(self, consumer: Consumer, message: Message) -> None:
        op = message.get("op")
        if consumer.stream is not None:
            if op == "bye":
                self._bye(consumer)
            else:
                consumer.stream.asked(message)
        elif op == "status":
            after = message.get("after", 0)
            self._tell(consumer, self.status(after if type(after) is int else 0))
        elif op == "attach":
            self._attach(consumer, message)
        else:
            raise MessageError("the first message must be attach or status")

    def _attach(self, consumer: Consumer, message: Message) -> None:
        self._attached = True
        if message.get("protocol") != PROTOCOL:
            raise UsageError(
                f"this loaderd ({__version__}) speaks protocol {PROTOCOL}, the trainer's scanfeed ({message.get('version')}) "
                f"protocol {message.get('protocol')}; end it (kill {os.getpid()}) and start it again with the same version"
            )
        slots = _checked(message)
        self._supplies = [one for one in self._supplies if one.alive]
        leaving = [one for one in self._supplies if one.leaving]
        if len(leaving) >= CONSUMERS or sum(one.client.pid == consumer.pid for one in leaving) >= OF_ONE_PROCESS:
            raise CatalogError("many trainers are just leaving, and the database is still told of them; try again in a moment")
        client = Client(consumer.pid, consumer.uid, message["rank"], message["num_ranks"], message["versions"])
        self._streams += 1
        supply = Supply(self.database, message, client, post=lambda event: self._post(consumer, event), say=say)
        self._supplies.append(supply)
        consumer.stream = Stream(
            self._streams,
            supply,
            self.workers,
            slots=slots,
            again=message.get("again"),
            revoked=self.revoked,
            room=self._room,
            tell=lambda message, fds=(): self._tell(consumer, message, fds),
            end=lambda error: self._part(consumer, str(error), getattr(error, "exit_code", 1)),
        )
        say("attached", peer=consumer.pid, stream=self._streams, name=message.get("stream"), run=message.get("run"),
            rank=client.rank, num_ranks=client.num_ranks, again="again" in message)  # fmt: skip

    def _room(self, size: int) -> None:
        """Raise CatalogError if another ring of this size would be over the limit."""
        used = self._ring_bytes()
        if self.memory is not None and used + size > self.memory:
            raise CatalogError(
                f"the ring needs {size / 2**20:.0f} MiB, and of loaderd's {self.memory / 2**20:.0f} MiB (--memory) {used / 2**20:.0f} are "
                f"in use; pass a smaller batch_size or fewer slots, or end another training"
            )

    def _ring_bytes(self) -> int:
        return sum(consumer.stream.ring_bytes for consumer in self.consumers if consumer.stream is not None)

    def _post(self, consumer: Consumer, event: Any) -> None:
        """From a supply thread: let the loop take an event."""

        def hear() -> None:
            if consumer.stream is not None:
                stream = consumer.stream
                self._guarded(consumer, lambda: stream.heard(event))

        self._posted.append(hear)
        os.eventfd_write(self._wake, 1)

    def _take_posted(self) -> None:
        os.eventfd_read(self._wake)
        while self._posted:
            self._posted.popleft()()

    def _tell(self, consumer: Consumer, message: Message, fds: Sequence[int] = ()) -> None:
        try:
            if message["op"] == "attached":
                message["private"] = self.private
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

    def _part(self, consumer: Consumer, reason: str | None = None, code: int = 1) -> None:
        """Let go of a connection and of all that belongs to it; with a reason, tell it first."""
        if consumer not in self.consumers:
            return
        self.consumers.remove(consumer)
        if reason is not None:
            reason = _short(reason)
            say("refused" if consumer.stream is None else "stream ended", peer=consumer.pid, reason=reason)
            with contextlib.suppress(OSError, MessageError):
                messages.send(consumer.sock, {"op": "error", "message": reason, "ending": self._ending(), "code": code})
        self.loop.remove(consumer.sock.fileno())
        self.loop.remove(consumer.pidfd)
        consumer.sock.close()
        os.close(consumer.pidfd)
        if consumer.stream is not None:
            consumer.stream.close(reason)
            if reason is None:
                say("left", peer=consumer.pid, batches=consumer.stream.counters.batches)

    def status(self, after: int = 0) -> Message:
        """Return what `loaderd status` shows: of the streams as many as a message holds.

        "more" is the number after which the next ones come, None if there are none.
        """
        head = self._head()
        streams: list[Message] = []
        room = messages.LIMIT - messages.size({**head, "more": 2**63, "streams": []})
        fed = [(one, one.stream) for one in self.consumers if one.stream is not None and one.stream.number > after]
        for one, stream in sorted(fed, key=lambda pair: pair[1].number):
            status = {"pid": one.pid, **stream.status()}
            if messages.size(status) > room and not streams:
                status["definition"] = _shortened(status["definition"])
            room -= messages.size(status) + 1  # the comma
            if room < 0:
                break
            streams.append(status)
            after = stream.number
        return {**head, "streams": streams, "more": after if len(streams) < len(fed) else None}

    def _head(self) -> Message:
        return {
            "op": "status",
            "pid": os.getpid(),
            "version": __version__,
            "protocol": PROTOCOL,
            "database": self.database.name,
            "socket": str(self.path),
            "private": self.private,
            "supervised": self.supervised,
            "uptime_s": round(time.monotonic() - self.began, 1),
            "workers": [worker.process.pid for worker in self.workers.workers],
            "workers_replaced": self.workers.replaced,
            "ring_bytes": self._ring_bytes(),
            "memory_bytes": self.memory,
            "outage_s": self._outage_s(),
            "revoked": len(self.revoked),
        }

    def _outage_s(self) -> float | None:
        """Return for how long a stream has been without its database."""
        since = [one.stream.supply.outage_since for one in self.consumers if one.stream is not None]
        gone = [time.monotonic() - began for began in since if began is not None]
        return round(max(gone), 1) if gone else None


def _shortened(definition: Message) -> Message:
    """Return a definition that alone fills a message, with what makes it long cut."""
    names = [_short(name) for name in definition["structures"][:8]]
    texts = {name: _short(definition[name]) for name in ("where", "split", "snapshot") if definition.get(name)}
    return {**definition, "structures": names, **texts}


def _checked(message: Message) -> int | None:
    """Return the slots that an attach message asks for. Raises UsageError for anything in it that cannot be."""
    slots, run, stream = message.get("slots"), message.get("run"), message.get("stream")
    if slots is not None and not (type(slots) is int and 2 <= slots <= SLOTS):
        raise UsageError(f"slots={slots!r}: must be a whole number from 2 to {SLOTS}")
    if not (run is None or (isinstance(run, str) and 0 < len(run) <= 200)):
        raise UsageError("run must be a name of at most 200 characters")
    if not (stream is None or isinstance(stream, str)) or not isinstance(message.get("definition"), dict):
        raise UsageError("a stream is asked for by its name or its definition")
    rank, num_ranks, versions = message.get("rank"), message.get("num_ranks"), message.get("versions")
    if type(rank) is not int or type(num_ranks) is not int or not 0 <= rank < num_ranks <= 2**16:
        raise UsageError(f"rank={rank!r}, num_ranks={num_ranks!r}: rank must be from 0 to num_ranks - 1")
    if not isinstance(versions, dict) or not all(isinstance(text, str) and len(text) < 100 for text in versions.values()):
        raise UsageError("versions must be names and versions")
    check_resume(run or "none", message.get("resume"))
    again = message.get("again")
    if again is not None:
        numbers = again if isinstance(again, dict) else {}
        epoch = numbers.get("epoch", "missing")
        counted = [numbers.get("attempt"), numbers.get("received"), numbers.get("ahead"), 0 if epoch is None else epoch]
        pairs = numbers.get("acknowledged")
        if not isinstance(pairs, list) or len(pairs) > 8 or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
            raise UsageError("a trainer that attaches again says what it acknowledged")
        if run is None or not all(
            type(number) is int and 0 <= number < 2**31 for number in [*counted, *(part for pair in pairs for part in pair)]
        ):
            raise UsageError("a trainer that attaches again says its run, attempt, epoch and step")
    return slots
