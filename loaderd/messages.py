"""What the daemon, its trainers and its workers say to each other over Unix sequenced-packet sockets, a message a packet.

The four messages that go once a batch are a byte and 64-bit numbers (`PACKED`), all others JSON. They carry numbers of slots and sizes,
never pixels, and are never unpickled. They are bounded, so a peer cannot make the other side allocate; the attach message carries the
protocol's version, and another version is refused with the remedy.
"""

from __future__ import annotations

import json
import os
import socket
import stat
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from catalog.embedded import default_home
from catalog.errors import CatalogError

PROTOCOL = 3
LIMIT = 64 << 10  # bytes a message; in the steady state none is over 4 KiB
FDS_SPACE = socket.CMSG_SPACE(4 * 4)  # for four descriptors
SO_PEERPIDFD = 77  # since Linux 6.5; Python has no name for it
SO_PEERGROUPS = 59  # since Linux 4.13
PATH_LIMIT = 107  # bytes of a socket's address: sun_path less its end

Message = dict[str, Any]

# Messages of whole numbers alone, by their first byte: the four of a batch cost 9 µs to make and take, in JSON 16.
PACKED: dict[str, tuple[int, tuple[str, ...]]] = {
    "job": (1, ("stream", "job", "slot", "generation", "epoch", "index", "length", "pad")),
    "done": (2, ("stream", "job", "count", "by_offset", "opened")),
    "batch": (3, ("slot", "generation", "epoch", "index", "count")),
    "next": (4, ()),  # acknowledged epoch and index (-1: none), then slot and generation of each slot given back
}
_NAMES = {code: (op, names) for op, (code, names) in PACKED.items()}

# Made once: `json.dumps` with separators makes an encoder a call, and `json.loads` of bytes guesses their encoding.
_encode = json.JSONEncoder(separators=(",", ":")).encode
_decode = json.JSONDecoder().decode


class MessageError(CatalogError):
    """What came is no message of this protocol."""


def send(sock: socket.socket, message: Message, fds: Sequence[int] = ()) -> None:
    """Send one message, descriptors with it. Raises BlockingIOError if the peer does not read, BrokenPipeError if it is gone."""
    data = _pack(message)
    if len(data) > LIMIT:
        raise MessageError(f"a message of {len(data)} bytes is over the limit of {LIMIT}; shorten where= or structures=")
    if fds:
        socket.send_fds(sock, [data], fds)
    else:
        sock.send(data)


def size(message: Message) -> int:
    """Return how many bytes a message takes as JSON."""
    return len(_encode(message))


def receive(sock: socket.socket) -> Message | None:
    """Return the next message, None when the peer has closed and all it said was heard. Raises BlockingIOError if there is none yet."""
    try:
        data = sock.recv(LIMIT + 1)
    except ConnectionResetError:  # it closed with messages unread; Linux says so once, ahead of what it had said before
        data = sock.recv(LIMIT + 1)
    return _parse(data) if data else None


def receive_fds(sock: socket.socket) -> tuple[Message | None, list[int]]:
    """As `receive`, with the descriptors that came; they are the caller's to close."""
    try:
        data, ancillary, flags, _ = sock.recvmsg(LIMIT + 1, FDS_SPACE, socket.MSG_CMSG_CLOEXEC)
    except ConnectionResetError:
        data, ancillary, flags, _ = sock.recvmsg(LIMIT + 1, FDS_SPACE, socket.MSG_CMSG_CLOEXEC)
    fds: list[int] = []
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds += struct.unpack(f"{len(content) // 4}i", content)
    if flags & socket.MSG_CTRUNC:
        for fd in fds:
            os.close(fd)
        raise MessageError("more descriptors came than this protocol sends")
    return (_parse(data) if data else None), fds


def _pack(message: Message) -> bytes:
    op = message["op"]
    if op == "next":
        numbers = [*(message.get("ack") or (-1, -1)), *(number for pair in message.get("free", ()) for number in pair)]
    elif op in PACKED and len(message) == 1 + len(PACKED[op][1]):  # a report of trouble has more in it
        numbers = [message[name] for name in PACKED[op][1]]
    else:
        return _encode(message).encode()
    return struct.pack(f"<B{len(numbers)}q", PACKED[op][0], *numbers)


def _parse(data: bytes) -> Message:
    if len(data) > LIMIT:
        raise MessageError(f"a message is over the limit of {LIMIT} bytes")
    if data[0] in _NAMES:
        op, names = _NAMES[data[0]]
        count, odd = divmod(len(data) - 1, 8)
        if odd or (count != len(names) if names else count < 2 or count % 2):
            raise MessageError(f"what came is no {op} message")
        numbers = struct.unpack_from(f"<{count}q", data, 1)
        if names:
            return {"op": op, **dict(zip(names, numbers, strict=True))}
        ack = None if numbers[0] < 0 else [numbers[0], numbers[1]]
        return {"op": op, "ack": ack, "free": [[numbers[at], numbers[at + 1]] for at in range(2, count, 2)]}
    try:
        message = _decode(data.decode())
    except (ValueError, RecursionError) as error:
        raise MessageError("what came is not JSON") from error
    if not isinstance(message, dict):
        raise MessageError("what came is no JSON object")
    if message.get("op") == "next":  # its numbers would be anything; packed they are whole
        raise MessageError("what came is no next message")
    return message


def peer_pidfd(sock: socket.socket) -> tuple[int, int, int]:
    """Return (pid, uid, pidfd) of the process that connected; the pidfd becomes readable when that process ends.

    A hang-up alone is not enough: a forked child may keep the socket open after its parent's death.
    """
    pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    try:
        pidfd = sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
    except OSError:
        pidfd = os.pidfd_open(pid)
    return pid, uid, pidfd


def peer_groups(sock: socket.socket) -> set[int]:
    """Return the groups of the process that connected; of one with more than 256 its first one alone."""
    _, _, gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    try:
        groups = sock.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, 1024)  # bytes: Python takes no more
    except OSError:
        return {gid}
    return {gid, *struct.unpack(f"{len(groups) // 4}i", groups)}


class Address:
    """A Unix socket's path, also one over 107 bytes: reached through a descriptor of its folder (Linux)."""

    def __init__(self, path: Path) -> None:
        self._fd = -1
        self.name = str(path)
        if len(os.fsencode(path)) > PATH_LIMIT:
            self._fd = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            self.name = f"/proc/self/fd/{self._fd}/{path.name}"

    def __enter__(self) -> str:
        return self.name

    def __exit__(self, *_: object) -> None:
        if self._fd >= 0:
            os.close(self._fd)


def socket_path(identity: str) -> Path:
    """Return where the user's daemon for a database listens: a Feed never attaches to another database's daemon."""
    return run_folder() / f"loaderd-{identity}.sock"


def run_folder() -> Path:
    """Return the folder of the user's daemons, which no other user can enter; makes it.

    LOADERD_RUN names a folder that several users share (`loaderd serve --group`); who may enter it is up to whoever made it.

    Raises:
        CatalogError: If everybody may write to the shared folder: somebody could put a daemon of his own there.
    """
    if shared := os.environ.get("LOADERD_RUN"):
        if not Path(shared).is_dir() or Path(shared).stat().st_mode & stat.S_IWOTH:
            raise CatalogError(f"LOADERD_RUN={shared}: must be a folder in which not everybody may write")
        return Path(shared)
    runtime = Path(os.environ.get("XDG_RUNTIME_DIR") or "/nonexistent")
    if not (runtime.is_dir() and runtime.stat().st_uid == os.getuid()):
        runtime = default_home() / "run"
        runtime.mkdir(mode=0o700, parents=True, exist_ok=True)
    return runtime


def check_resume(run: object, resume: object) -> tuple[str, Any]:
    """Return a run's name and how to go on with it, as a trainer said them. Raises MessageError for anything else."""
    if not (isinstance(run, str) and 0 < len(run) <= 200):
        raise MessageError("run must be a name of at most 200 characters")
    if isinstance(resume, dict):
        if not all(type(resume.get(name)) is int and 0 <= resume[name] < 2**31 for name in ("epoch", "step", "attempt")):
            raise MessageError("the state must have epoch, step and attempt as whole numbers; load what state_dict() gave")
    elif resume not in (None, "last"):
        raise MessageError(f"resume={resume!r}: must be 'last' or what state_dict() gave")
    return run, resume


def check_pairs(message: Message) -> None:
    """Raise MessageError unless what a trainer said in JSON has whole numbers where they belong."""
    free, ack = message.get("free", []), message.get("ack")
    pairs = [*(free if isinstance(free, list) else [free]), *([] if ack is None else [ack])]
    if message.get("op") == "epoch":
        pairs.append([message.get("epoch"), message.get("ahead")])
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or not all(type(part) is int and 0 <= part < 2**31 for part in pair):
            raise MessageError("pairs of whole numbers were expected")
