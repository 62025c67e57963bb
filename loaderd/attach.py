"""Finding the user's daemon, or starting one: the trainer's way in, and back after a crash.

Loads neither SQLAlchemy nor pydicom.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
import subprocess
import time
from pathlib import Path

from catalog import database
from catalog.embedded import default_home
from catalog.errors import CatalogError, DatabaseError
from loaderd import messages
from loaderd.messages import Message
from loaderd.workers import python

START_S = 60
ANSWER_S = 5.0  # for a daemon to answer in
LEAVE_S = 15.0  # and to say goodbye: whoever left relies on what was fed being in the ledger, and a private daemon gone
GRACE_S = 5.0  # how long `loaderd serve` has to come back by itself after a crash, until its trainers start one of their own
RUNNING = "a loaderd of this database is running"  # what a second one says
_started: list[subprocess.Popen[bytes]] = []  # private daemons of this process, to be reaped


class FeedError(CatalogError):
    """The feed cannot go on; the message says why and what to do."""


class Attached:
    """A connection to a daemon that opened the stream; the descriptors are the caller's."""

    def __init__(self, sock: socket.socket, reply: Message, ring_fd: int, path: Path) -> None:
        self.sock, self.reply, self.ring_fd, self.path = sock, reply, ring_fd, path


def attach(message: Message, url: str | None, timeout_s: float) -> Attached:
    """Attach to the daemon of a database; starts a private one if there is none."""
    with database.open_database(url, migrate=False) as db:
        path = messages.socket_path(db.identity())
        for _ in range(5):  # a private daemon may be ending just now
            sock = connect(path) or _start(path, url)
            if sock is not None and (found := _ask(sock, message, path, timeout_s)) is not None:
                return found
    raise FeedError(f"loaderd ends as soon as it starts; its last words are in {default_home() / 'loaderd.log'}")


def again(message: Message, url: str | None, path: Path, deadline: float, *, private: bool) -> Attached:
    """Attach after the daemon died: to the one that comes back, or to a new private one."""
    grace = time.monotonic() + (0 if private else GRACE_S)
    while True:
        try:
            sock = connect(path)
            if sock is None and time.monotonic() > grace:
                sock = _start(path, url)
            if sock is not None and (found := _ask(sock, message, path, max(0.1, deadline - time.monotonic()))) is not None:
                return found
        except DatabaseError:  # down as well: it may come back, too
            if time.monotonic() > deadline:
                raise
        if time.monotonic() > deadline:
            raise FeedError(
                f"loaderd died and did not come back in time; its last words are in {default_home() / 'loaderd.log'} (or in the terminal "
                f"of `loaderd serve`); open a new Feed with this one's state to go on"
            )
        time.sleep(0.02)


def _start(path: Path, url: str | None) -> socket.socket | None:
    """Start a private daemon unless another process was faster; None if it is gone again."""
    try:
        starting = _starting(path)
    except PermissionError:
        raise FeedError(f"no loaderd serves in {path.parent}, and this user may not start one there; see `loaderd serve --group`") from None
    with starting:
        sock = connect(path)
        if sock is not None:
            return sock
        try:
            _start_private(url)
        except FeedError as error:
            if RUNNING not in str(error):  # else `loaderd serve` was faster, or whoever started it died meanwhile
                raise
        return connect(path)


def _ask(sock: socket.socket, message: Message, path: Path, timeout_s: float) -> Attached | None:
    """Attach on a connection; None if that daemon is ending."""
    sock.settimeout(timeout_s)
    with contextlib.suppress(OSError):  # it refused before it heard anything, and said why
        messages.send(sock, message)
    try:
        reply, fds = messages.receive_fds(sock)
    except TimeoutError:
        sock.close()
        raise FeedError(f"loaderd did not open the stream within {timeout_s:g} s; see `loaderd status`, or raise timeout_s=") from None
    except OSError:
        reply, fds = None, []
    if reply is not None and reply["op"] == "attached":
        sock.setblocking(False)
        return Attached(sock, reply, fds[0], path)
    with sock:
        if reply is not None:
            if reply["ending"]:
                _wait_for_end(sock)
            if message.get("again") and reply.get("code") == DatabaseError.exit_code:
                raise DatabaseError(reply["message"])
            raise FeedError(reply["message"])
    return None


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
    _reap()
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
        answered = _readable(said.fileno(), START_S)
        line = said.readline().decode(errors="replace").strip() if answered else ""
    if line != "ready":
        try:
            code = process.wait(5 if answered else 0)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        if answered and not line and code < 0:
            return  # it was killed: whoever waits for it tries again
        if code == DatabaseError.exit_code:
            raise DatabaseError(line)
        raise FeedError(line or f"loaderd did not start; its last words are in {home / 'loaderd.log'}")


def leave(sock: socket.socket) -> None:
    """Say goodbye, and wait for a daemon that ends with this."""
    try:
        sock.settimeout(LEAVE_S)
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
    _readable(pidfd, LEAVE_S)
    os.close(pidfd)
    _reap()


def _reap() -> None:
    """Forget private daemons that ended. Never by making the list anew: another thread may be adding to it."""
    for process in list(_started):
        if process.poll() is not None:
            with contextlib.suppress(ValueError):  # another thread was faster
                _started.remove(process)


def _readable(fd: int, timeout_s: float) -> bool:
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    return bool(poller.poll(timeout_s * 1000))


def find(url: str | None) -> Path:
    """Return where the daemon of a database listens. While that database is out of reach: the only daemon that the user has.

    Raises:
        DatabaseError: If it is out of reach, and there are several daemons or none.
    """
    try:
        with database.open_database(url, migrate=False) as db:
            return messages.socket_path(db.identity())
    except DatabaseError as error:
        there = [path for path in sorted(messages.run_folder().glob("loaderd-*.sock")) if _listens(path)]
        if len(there) == 1:
            return there[0]
        if there:
            raise DatabaseError(
                f"{error}; without it nobody can say which of these {len(there)} daemons is meant: {', '.join(map(str, there))}"
            ) from None
        raise


def _listens(path: Path) -> bool:
    sock = connect(path)
    if sock is not None:
        sock.close()
    return sock is not None


def status(url: str | None = None) -> Message | None:
    """Return what the daemon of a database says of itself, None if there is none."""
    return ask(find(url))


def ask(path: Path) -> Message | None:
    """Return the status of the daemon that listens there, None if there is none or it does not answer.

    It says of as many streams at a time as a message holds.
    """
    sock = connect(path)
    if sock is None:
        return None
    with sock:
        sock.settimeout(ANSWER_S)
        found: Message | None = None
        after: int | None = 0
        while after is not None:
            with contextlib.suppress(OSError):  # it refused before it heard anything, and said why
                messages.send(sock, {"op": "status", "after": after})
            try:
                page = messages.receive(sock)
            except OSError:
                return None
            if page is None or page.get("ending"):
                return None
            if page.get("op") == "error":
                raise CatalogError(str(page.get("message")))
            if found is None:
                found = page
            else:
                found["streams"] += page["streams"]
            after = page.pop("more", None)
        return found
