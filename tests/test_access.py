"""Who may attach, and what somebody who means harm can do to the daemon and to those it feeds: nothing beyond a share of their own."""

from __future__ import annotations

import contextlib
import grp
import json
import multiprocessing
import operator
import os
import random
import resource
import select
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest

from catalog import dicom
from catalog.errors import CatalogError
from loaderd import Feed, FeedError, attach, messages
from loaderd.daemon import CONSUMERS, OF_ONE_PROCESS
from loaderd.loop import Loop
from loaderd.messages import LIMIT, PROTOCOL, Message
from loaderd.workers import python
from tests.processes import daemons, wait_until
from tests.test_feed import order, stored

Run = Callable[..., "subprocess.CompletedProcess[str]"]
Serve = Callable[..., dict[str, Any]]
HELLO = {
    "op": "attach", "protocol": PROTOCOL, "version": "0", "stream": None, "definition": {"structures": ["inner"], "batch_size": 1},
    "rank": 0, "num_ranks": 1, "run": None, "resume": None, "slots": 2, "versions": {"test": "1"},
}  # fmt: skip
GOOD = {"structures": ["inner"], "batch_size": 2, "seed": 5}  # what the trainer is fed whom the others mean harm


@pytest.fixture
def serve(ingested: str, tmp_path: Path) -> Iterator[Serve]:
    """Start `loaderd serve` with these arguments and return its status; what it says goes to a file, so that it never waits."""
    log = tmp_path / "serve.log"
    with contextlib.ExitStack() as stack:

        def start(*arguments: str, database: str = ingested) -> dict[str, Any]:
            command, environment = python("-m", "loaderd", "serve", "--workers", "2", *arguments)
            with log.open("ab") as said:
                said.truncate(0)
                environment["CATALOG_DATABASE_URL"] = database
                process = subprocess.Popen(command, env=environment, stdout=said, stderr=said, cwd="/")
            stack.callback(process.wait, 60)
            stack.callback(process.terminate)
            assert wait_until(lambda: process.poll() is not None or b"event=serving" in log.read_bytes()), log.read_text()
            found = attach.status(database)
            assert found is not None, log.read_text()
            return found

        yield start
    assert wait_until(lambda: daemons() == [])


def connected(path: str | Path) -> socket.socket:
    """Return a connection that does what no client of ours would."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with messages.Address(Path(path)) as name:
        sock.connect(name)
    sock.settimeout(120)
    return sock


def heard(sock: socket.socket) -> Message | None:
    """Return the next message, None if the daemon hung up; descriptors are closed."""
    try:
        reply, fds = messages.receive_fds(sock)
    except ConnectionResetError:  # reported once, ahead of what was said before
        reply, fds = messages.receive_fds(sock)
    for fd in fds:
        os.close(fd)
    return reply


def status() -> Message:
    """Return what the daemon says of itself."""
    found = attach.status()
    assert found is not None
    return found


def alone() -> bool:
    """Is one stream left? As long as strangers fill the daemon it may have no room for a question."""
    with contextlib.suppress(CatalogError):
        found = attach.status()
        return found is not None and len(found["streams"]) == 1
    return False


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208


def threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))  # noqa: PTH208


def anonymous(pid: int) -> int:
    """Return the bytes of a process that are its own alone."""
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("RssAnon:")]
    return int(line.split()[1]) * 1024


# ------------------------------------------------------------------------------------------ harm


def garbage(rng: random.Random) -> bytes:
    """Return what is no message, or one of a wrong shape."""
    number = rng.choice([-1, 0, 1, 0.5, 2**31, 2**63, -(2**63), 10**300, 1e308, float("nan"), float("inf"), True, None, "1", [], {}])
    op = rng.choice(["next", "epoch", "begin", "bye", "batch", "done", "job", "status", "x", None, 4, [], {}])
    match rng.randrange(9):
        case 0:
            return rng.randbytes(rng.randint(1, 300))
        case 1:
            return rng.randbytes(1) * rng.choice([LIMIT - 1, LIMIT, LIMIT + 1, LIMIT * 2])
        case 2:  # packed, with numbers of any size and sometimes half of one
            code, count = rng.randint(1, 5), rng.choice([0, 1, 2, 3, 4, 5, 8, 9, 128])
            return bytes([code]) + rng.randbytes(8 * count + rng.choice([0, 0, 0, 3]))
        case 3:
            return json.dumps({"op": op, "free": [[number, number]], "ack": [0, number]}).encode()
        case 4:
            return json.dumps({"op": op, "epoch": number, "ahead": number, "run": number, "resume": number}).encode()
        case 5:
            return b'{"op":"x","free":' + b"[" * rng.choice([900, 9_000, 60_000])
        case 6:
            return json.dumps(
                {"op": "begin", "run": rng.choice(["\ud800", "\0", "r" * 201, ""]), "resume": rng.choice([number, "last"])}
            ).encode()
        case 7:
            return json.dumps(HELLO).encode()[: rng.randint(1, 200)]
        case _:
            return json.dumps(rng.choice([number, [number], {"op": op}, {"op": op, "ack": number, "free": number}])).encode()


def hello(rng: random.Random) -> Message:
    """Return an attach message with some of its fields wrong."""
    odd = [
        None,
        -1,
        0,
        1,
        2,
        0.5,
        2**31,
        10**30,
        float("nan"),
        True,
        "",
        "x",
        "\0",
        "\ud800",
        "x" * 30_000,
        [],
        [1],
        {},
        {"a": {}},
        [[]] * 9,
    ]
    message: Message = {**HELLO, "definition": dict(HELLO["definition"])}  # type: ignore[call-overload]
    for _ in range(rng.randint(1, 2)):
        match rng.randrange(4):
            case 0 if isinstance(message["definition"], dict):
                names = ("batch_size", "seed", "structures", "where", "limit", "dtype", "tail", "require", "on_error", "shuffle", "y")
                message["definition"][rng.choice(names)] = rng.choice([*odd, "error_flags = 0) OR (true", ["inner"] * 2])
            case 1:
                numbers = {name: rng.choice(odd[:12]) for name in ("attempt", "epoch", "received", "ahead")}
                message["again"] = rng.choice([*odd, {**numbers, "acknowledged": rng.choice([[], [[0, 1]], *odd])}])
                message["run"] = rng.choice(["good", "nobody's", *odd])
            case 2:
                message["resume"] = rng.choice(
                    [*odd, "last", {"epoch": 0, "step": 0, "attempt": 1}, {"epoch": 2**30, "step": 1, "attempt": 9}]
                )
                message["run"] = rng.choice(["good", "nobody's"])
            case _:
                message[rng.choice([*HELLO][1:])] = rng.choice(odd)
    return message


def fuzz(path: str, seed: int, count: int) -> None:
    """Send so many messages, none of which a trainer would send so, on as many connections as it takes."""
    rng = random.Random(seed)
    sent = 0
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hands = [os.open("/dev/null", os.O_RDONLY) for _ in range(4)]
    while sent < count:
        with connected(path) as sock, contextlib.suppress(OSError):
            kind = rng.random()
            if kind < 0.015:  # attach with something wrong
                messages.send(sock, hello(rng))
                sent += 1
                with contextlib.suppress(TimeoutError):
                    sock.settimeout(rng.choice([0.05, 1]))
                    heard(sock)
            elif kind < 0.03:  # attach well, then what comes to mind, until the daemon hangs up
                messages.send(sock, HELLO)
                while (reply := heard(sock)) is not None and reply["op"] == "attached":
                    for _ in range(1_200):
                        data = struct.pack("<B8q", 4, *(rng.choice([0, 1, -1, 2**62, rng.getrandbits(40)]) for _ in range(8)))
                        sock.send(data if rng.random() < 0.999 else garbage(rng))
                        sent += 1
                    break
            elif kind < 0.04:  # orders epochs and attempts without end, and never reads
                messages.send(sock, {**HELLO, "run": f"flood-{seed}-{sent}"})
                sock.setblocking(False)
                for number in range(100):
                    sock.send(json.dumps({"op": "epoch", "epoch": number, "ahead": 1}).encode())
                    sock.send(json.dumps({"op": "begin", "run": f"flood-{number}", "resume": None}).encode())
                    sent += 2
            elif kind < 0.08:  # asks and never reads
                for _ in range(200):
                    sock.send(b'{"op":"status"}')
                    sent += 1
            elif kind < 0.16:  # sends descriptors along
                for _ in range(4):
                    socket.send_fds(sock, [garbage(rng)], hands * 50)
                    sent += 1
            else:
                for _ in range(rng.randint(1, 3)):
                    sock.send(garbage(rng))
                    sent += 1


def crowd(path: str, count: int) -> None:
    """Hold so many connections at once, say nothing, and be closed."""
    many = [connected(path) for _ in range(count)]
    for sock in many:
        with sock, contextlib.suppress(ConnectionError):
            assert heard(sock) is not None  # an error, and why


def test_no_client_can_harm_the_daemon_or_other_trainers(serve: Serve, loaderd: Run, conn: psycopg.Connection) -> None:
    """10⁵ messages that no trainer would send, descriptors with them, a thousand connections at once, silence: the daemon lives.

    A trainer beside gets every batch bit for bit, a forger of its run gets nothing of it, and nothing of the strangers stays.
    """
    before = serve()
    daemon, path = before["pid"], before["socket"]
    truth = {sample: (dicom.decode_frame(file, 0).astype(np.float32), mask) for sample, (file, mask) in stored(conn, "inner").items()}
    spawn = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack, Feed(**GOOD, run="good") as feed:  # type: ignore[arg-type]
        assert [sample for batch in feed.epoch() for sample in batch.sample_ids.tolist()] == order(conn, 5, 0)
        calm = descriptors(daemon), threads(daemon), anonymous(daemon)
        # This process forges its own run beside itself: the kernel cannot tell them apart, so the live rank must.
        forger = stack.enter_context(connected(path))
        again = {"attempt": 1, "epoch": 0, "received": 1, "ahead": 0, "acknowledged": [[0, 1]]}
        messages.send(forger, {**HELLO, "definition": GOOD, "run": "good", "again": again})
        harm = [spawn.Process(target=fuzz, args=(path, seed, 8_000)) for seed in range(5)]
        harm += [spawn.Process(target=crowd, args=(path, count)) for count in (1_000, 100, 100, 100, 100, 100)]
        for process in harm:
            process.start()
        epochs = 1
        while any(process.is_alive() for process in harm) or epochs < 5:
            seen = []
            for batch in feed.epoch():
                assert batch.masks is not None
                for sample, image, mask in zip(batch.sample_ids.tolist(), batch.images, batch.masks, strict=True):
                    seen.append(sample)
                    assert np.array_equal(image, truth[sample][0]) and np.array_equal(mask, truth[sample][1])
            assert seen == order(conn, 5, epochs)
            epochs += 1
            time.sleep(0.1)  # hundreds of epochs would take long to audit
        assert [process.exitcode for process in harm] == [0] * len(harm)
        refused = heard(forger)
        assert refused is not None and "still fed" in refused["message"]
        forger.close()
        assert wait_until(alone)
        left = lambda: (descriptors(daemon), threads(daemon))  # noqa: E731
        assert wait_until(lambda: all(map(operator.le, left(), calm))), (left(), calm)
        assert anonymous(daemon) < calm[2] + (24 << 20), f"{anonymous(daemon) / 2**20:.0f} MiB, {calm[2] / 2**20:.0f} before"
        now = status()
        assert now["pid"] == daemon and now["workers"] == before["workers"]
        assert loaderd("status").returncode == 0
    audited = loaderd("audit", "good")
    assert audited.returncode == 0, audited.stdout
    fed = "SELECT count(*), sum(delivered), sum(twice), (SELECT count(*) FROM consumer WHERE stream_id = c.stream AND run_id IS NOT NULL) "
    fed += (
        "FROM epoch_coverage c WHERE run = 'good' AND (SELECT definition ->> 'seed' FROM stream WHERE id = c.stream) = '5' GROUP BY stream"
    )
    assert conn.execute(fed.encode()).fetchall() == [(epochs, epochs * len(truth), 0, 1)]


EPOCH = {"op": "epoch", "epoch": 0, "ahead": 0}
BEGIN = {"op": "begin", "run": "another", "resume": None}
AGAIN = {"attempt": 1, "received": 0, "ahead": 0, "acknowledged": []}
# What is sent in turn, with the names of messages that are waited for in between; and what the daemon says to it. What stands behind
# the last of these comes at once: the daemon is stopped until all of it is there.
WRONG: list[tuple[list[Message | str | bytes], str]] = [
    ([EPOCH], "first message"),
    ([HELLO, "attached", EPOCH, EPOCH], "asked for twice"),
    ([HELLO, "attached", EPOCH, "batch", b'{"op":"next","ack":[0,0.5]}'], "no next message"),
    ([HELLO, "attached", EPOCH, "batch", {"op": "x", "ack": [0, 0.5]}], "whole numbers"),
    ([HELLO, "attached", EPOCH, "batch", {"op": "x", "free": [[[], 1]]}], "whole numbers"),
    ([HELLO, "attached", EPOCH, "batch", BEGIN], "too late"),
    ([HELLO, "attached", BEGIN, BEGIN], "another one is being loaded"),
    ([HELLO, "attached", {**BEGIN, "run": "r" * 201}], "run must be a name"),
    ([HELLO, "attached", *({**EPOCH, "epoch": number} for number in range(60))], "faster than they are planned"),
    ([HELLO, "attached", {**EPOCH, "epoch": 2**31}], "whole numbers"),
    ([{**HELLO, "run": "r", "again": AGAIN}], "its run, attempt, epoch"),
    ([{**HELLO, "run": "r", "again": {**AGAIN, "epoch": ""}}], "its run, attempt, epoch"),
    ([{**HELLO, "resume": "x" * 60_000}], "must be 'last'"),
]


def test_what_is_out_of_order_is_refused(serve: Serve, tmp_path: Path) -> None:
    """Each wrong message ends its own connection, with a line that says what was wrong with it and a log that stays short."""
    found = serve()
    for wrong, expected in WRONG:
        with connected(found["socket"]) as sock:
            last = max((at for at, message in enumerate(wrong) if isinstance(message, str)), default=-1)
            for at, message in enumerate(wrong):
                if isinstance(message, str):
                    assert wait_until(lambda sock=sock, op=message: (heard(sock) or {})["op"] == op)  # type: ignore[misc]
                    if at == last:
                        os.kill(found["pid"], signal.SIGSTOP)
                elif isinstance(message, bytes):
                    sock.send(message)
                else:
                    messages.send(sock, message)
            os.kill(found["pid"], signal.SIGCONT)
            while (reply := heard(sock)) is not None and reply["op"] != "error":
                pass
            assert reply is not None and expected in reply["message"], (reply, expected)
            assert len(reply["message"]) < 2_000
    time.sleep(2)  # the daemon looks after its streams once a second
    assert status()["pid"] == found["pid"]
    assert (tmp_path / "serve.log").stat().st_size < 40_000


def test_an_event_of_a_closed_descriptor_is_not_its_successors() -> None:
    """Who gets the number of a descriptor that was closed in the same round does not get that one's event."""
    loop = Loop()
    ends = [os.eventfd(1), os.eventfd(1)]
    told = []

    def replace(other: int) -> None:
        loop.remove(other)
        os.close(other)
        assert os.eventfd(0) == other
        loop.add(other, lambda: told.append("successor"))

    for fd, other in (ends, ends[::-1]):
        loop.add(fd, lambda other=other: replace(other))  # type: ignore[misc]
    assert loop.once(1)
    assert told == []
    loop.close()
    for fd in ends:
        os.close(fd)


def test_a_forged_return_takes_nothing(serve: Serve, conn: psycopg.Connection) -> None:
    """Who says that he is somebody else's trainer whose daemon died is refused, in any rank, and changes no row of that run."""
    path = serve()["socket"]
    kept = "SELECT (SELECT array_agg(l ORDER BY id) FROM ledger l)::text, (SELECT array_agg(e ORDER BY id) FROM epoch e)::text, "
    kept += (
        "(SELECT array_agg(t ORDER BY id) FROM attempt t)::text, (SELECT array_agg(k ORDER BY id) FROM consumer k WHERE attempt = 1)::text"
    )
    definition = {"structures": ["inner"], "batch_size": 2}
    script = (
        "import json, sys\nfrom tests.test_access import connected, heard\nfrom loaderd import messages\n"
        "for hello in json.loads(sys.argv[2]):\n"
        "    with connected(sys.argv[1]) as sock:\n        messages.send(sock, hello)\n        print(heard(sock)['message'])\n"
    )
    with Feed(**definition, run="hers", slots=3) as feed:  # type: ignore[arg-type]
        held = [batch for _, batch in zip(range(3), feed.epoch(), strict=False)]
        # What it acknowledged is written within a second, and the order of the next epoch when it likes; then nothing is until it takes
        # the next one.
        written = "SELECT (SELECT acknowledged FROM epoch_coverage), (SELECT count(*) FROM epoch WHERE order_sha256 IS NOT NULL)"
        assert wait_until(lambda: conn.execute(written).fetchone() == (4, 2))
        before = conn.execute(kept.encode()).fetchone()
        forged = []
        for rank, num_ranks in ((0, 1), (1, 2), (3, 9)):
            for epoch in (None, 0, 7):
                again = {"attempt": 1, "epoch": epoch, "received": 0, "ahead": 3, "acknowledged": [[0, 6]]}
                forged.append({**HELLO, "definition": definition, "run": "hers", "rank": rank, "num_ranks": num_ranks, "again": again})
        done = subprocess.run([sys.executable, "-c", script, path, json.dumps(forged)], capture_output=True, text=True, cwd=Path.cwd())
        assert done.stdout.count("cannot go on for another one") == len(forged), done
        assert conn.execute(kept.encode()).fetchone() == before
        assert len(status()["streams"]) == 1
        del held
        assert [batch.index for batch in feed.epoch()] == list(range(len(feed)))


@pytest.mark.parametrize("left", [4, 5])
def test_without_descriptors_the_daemon_waits(serve: Serve, tmp_path: Path, left: int) -> None:
    """A daemon that runs out of descriptors lets nobody in until there are some again; it hangs up on nobody, says so once, neither
    ends nor loses a trainer. A connection takes two descriptors, so whether an odd or an even number is left makes no difference."""
    found = serve()
    with Feed(structures=["inner"], batch_size=2) as feed:
        old = resource.prlimit(found["pid"], resource.RLIMIT_NOFILE)
        used = {int(name) for name in os.listdir(f"/proc/{found['pid']}/fd")}  # noqa: PTH208
        limit = [number for number in range(len(used) + left + 1) if number not in used][left]
        resource.prlimit(found["pid"], resource.RLIMIT_NOFILE, (limit, old[1]))
        with contextlib.ExitStack() as stack:
            many = [stack.enter_context(connected(found["socket"])) for _ in range(12)]
            assert wait_until(lambda: b'event="cannot accept"' in (tmp_path / "serve.log").read_bytes())
            assert not any(select.select(many, [], [], 0.5)[0])  # nobody was answered, and nobody hung up on
            assert (tmp_path / "serve.log").read_bytes().count(b'event="cannot accept"') == 1
            for sock in many:
                messages.send(sock, HELLO)
            assert sum(len(batch) for batch in feed.epoch()) == feed.num_samples
        resource.prlimit(found["pid"], resource.RLIMIT_NOFILE, old)
        assert wait_until(lambda: len(status()["streams"]) == 1)
        assert sum(len(batch) for batch in feed.epoch()) == feed.num_samples
        assert status()["pid"] == found["pid"]


# ------------------------------------------------------------------------------------------ who may


# Runs as root until everything is imported, then as who it is told to be.
STRANGER = """
import array, ctypes, fcntl, json, mmap, os, socket, sys
uid, gid, groups, path, hello = json.loads(sys.argv[1])
os.setgroups(groups); os.setgid(gid); os.setuid(uid)
sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
said = {}
def tried(name, act):
    try:
        act()
    except (OSError, ValueError) as error:
        said[name] = type(error).__name__
    else:
        said[name] = "done"
try:
    sock.connect(path)
    sock.settimeout(120)
    try:
        sock.send(json.dumps(hello).encode())
    except BrokenPipeError:
        pass  # it was refused before it spoke, and is told why
    try:
        data, ancillary, *_ = sock.recvmsg(65537, 256)
    except ConnectionResetError:
        data, ancillary, *_ = sock.recvmsg(65537, 256)
    said["reply"] = json.loads(data)
    for _, _, content in ancillary:
        fd, = array.array("i", content)
        size = os.fstat(fd).st_size
        said["mode"] = os.fstat(fd).st_mode & 0o777
        view = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ)
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype, libc.mmap.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
        at = libc.mmap(None, 4096, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
        said["protect"] = libc.mprotect(ctypes.c_void_p(at), 4096, mmap.PROT_READ | mmap.PROT_WRITE)
        said["punch"] = libc.fallocate(fd, 3, ctypes.c_long(0), ctypes.c_long(4096))
        tried("map", lambda: mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE))
        tried("write", lambda: os.pwrite(fd, b"x", 0))
        tried("shrink", lambda: os.ftruncate(fd, 0))
        tried("grow", lambda: os.ftruncate(fd, size * 2))
        tried("allocate", lambda: os.posix_fallocate(fd, 0, size * 2))
        tried("chmod", lambda: os.fchmod(fd, 0o666))
        tried("chown", lambda: os.fchown(fd, uid, gid))
        tried("reopen", lambda: os.open(f"/proc/self/fd/{fd}", os.O_RDWR))
        said["size"] = [os.fstat(fd).st_size, size]
except OSError as error:
    said["error"] = type(error).__name__
print(json.dumps(said))
"""
NOBODY = 65_534
REFUSED = {
    "map": "PermissionError", "write": "OSError", "shrink": "OSError", "grow": "OSError", "allocate": "OSError", "chmod": "PermissionError",
    "chown": "PermissionError", "reopen": "PermissionError", "protect": -1, "punch": -1,
}  # fmt: skip


def stranger(path: str, hello: Message, uid: int = NOBODY, gid: int = NOBODY, groups: tuple[int, ...] = ()) -> dict[str, Any]:
    """Return what another user gets who connects and says something, and what it can do to what comes with the answer."""
    told = json.dumps([uid, gid, groups, path, hello])
    done = subprocess.run([sys.executable, "-c", STRANGER, told], capture_output=True, text=True, cwd="/", timeout=300)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.fixture
def shared_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A run folder that all users can reach: pytest's own is for its user alone."""
    if os.getuid() != 0:
        pytest.skip("only root can be somebody else")
    folder = Path(tempfile.mkdtemp(prefix="scanfeed-run-"))
    folder.chmod(0o755)
    monkeypatch.setenv("LOADERD_RUN", str(folder))
    yield folder
    shutil.rmtree(folder)


def test_other_users_are_refused(serve: Serve, shared_folder: Path) -> None:
    """The socket has mode 0600, and whoever reaches it all the same is asked the kernel for: of another user, he is told to go."""
    found = serve()
    path = found["socket"]
    assert Path(path).parent == shared_folder and stat.S_IMODE(Path(path).stat().st_mode) == 0o600
    assert stranger(path, {"op": "status"}) == {"error": "PermissionError"}
    Path(path).chmod(0o666)
    for hello in ({"op": "status"}, HELLO):
        assert "another user" in stranger(path, hello)["reply"]["message"]
    assert "reply" in stranger(path, {"op": "status"}, uid=0, gid=0)
    assert status()["pid"] == found["pid"] and status()["streams"] == []


def test_a_group_is_let_in_and_reads_alone(serve: Serve, shared_folder: Path, conn: psycopg.Connection) -> None:
    """With --group its members may ask and attach, by their first or another group; nobody else. What they get cannot be written, and no
    function that they name is called."""
    group = grp.getgrgid(NOBODY)
    found = serve("--group", group.gr_name)
    path = found["socket"]
    assert stat.S_IMODE(Path(path).stat().st_mode) == 0o660 and Path(path).stat().st_gid == NOBODY
    assert stranger(path, {"op": "status"})["reply"]["pid"] == found["pid"]
    assert stranger(path, HELLO, gid=12_345) == {"error": "PermissionError"}
    Path(path).chmod(0o666)
    for groups in ((), (1, 2, 3), tuple(range(100, 5_000))):
        assert "another user" in stranger(path, HELLO, gid=12_345, groups=groups)["reply"]["message"]
    assert stranger(path, {"op": "status"}, groups=tuple(range(100, 5_000)))["reply"]["op"] == "status"
    theirs = {**GOOD, "transforms": [{"name": "user", "function": "os:abort"}]}
    assert "calls no functions for you" in stranger(path, {**HELLO, "definition": theirs})["reply"]["message"]
    for gid, groups in ((NOBODY, ()), (12_345, (7, NOBODY))):
        said = stranger(path, {**HELLO, "versions": {"torch": "2.7"}}, gid=gid, groups=groups)
        assert said["reply"]["op"] == "attached"
        assert {name: said[name] for name in REFUSED} == REFUSED
        assert said["mode"] == 0o600 and said["size"][0] == said["size"][1]
    assert status()["pid"] == found["pid"]
    assert wait_until(lambda: conn.execute("SELECT count(*) FROM consumer WHERE left_at IS NOT NULL").fetchone() == (2,))
    rows = conn.execute("SELECT DISTINCT host, uid, rank, num_ranks, versions, reason, daemon_pid FROM consumer").fetchall()
    assert rows == [(socket.gethostname(), NOBODY, 0, 1, {"torch": "2.7"}, None, found["pid"])]


def test_no_other_user_takes_a_place_over(serve: Serve, shared_folder: Path, conn: psycopg.Connection) -> None:
    """A member of the group who says that he is a trainer of another user, one who is gone even, is refused."""
    path = serve("--group", grp.getgrgid(NOBODY).gr_name)["socket"]
    with Feed(structures=["inner"], batch_size=1, run="hers") as feed:
        next(feed.epoch())
    assert wait_until(lambda: conn.execute("SELECT count(*) FROM consumer WHERE left_at IS NOT NULL").fetchone() == (1,))
    ledger = conn.execute("SELECT array_agg(l ORDER BY id)::text FROM ledger l").fetchone()
    again = {"attempt": 1, "epoch": 0, "received": 0, "ahead": 0, "acknowledged": []}
    assert "another one" in stranger(path, {**HELLO, "run": "hers", "again": again})["reply"]["message"]
    assert conn.execute("SELECT array_agg(l ORDER BY id)::text FROM ledger l").fetchone() == ledger


def test_every_attach_is_a_row(serve: Serve, conn: psycopg.Connection) -> None:
    """Who attached when, as whom, from where, with which versions, and why he left: said goodbye, was refused, was told to go."""
    serve()

    def row() -> tuple[Any, ...] | None:
        columns = "pid, uid, host, rank, num_ranks, versions ->> 'numpy', left_at >= attached_at, reason"
        return conn.execute(f"SELECT {columns} FROM consumer ORDER BY id DESC LIMIT 1").fetchone()  # type: ignore[arg-type]

    me = (os.getpid(), os.getuid(), socket.gethostname())
    with Feed(structures=["inner"], rank=1, num_ranks=3, run="three"):
        assert row() == (*me, 1, 3, np.__version__, None, None)
    assert wait_until(lambda: row() == (*me, 1, 3, np.__version__, True, None))
    with Feed(structures=["inner"], run="once", limit=2) as feed:
        assert len(list(feed.epoch())) == 1
    with Feed(structures=["inner"], run="once", limit=2) as feed, pytest.raises(FeedError, match="resume='last'"):
        list(feed.epoch())
    assert wait_until(lambda: (row() or ())[-2] is True)
    assert "resume='last'" in (row() or ())[-1]
    with pytest.raises(FeedError, match="never fed"):
        Feed(structures=["inner"], run="never", resume={"stream": "x", "run": "never", "epoch": 0, "step": 0, "attempt": 1})
    assert wait_until(lambda: (row() or ())[-2] is True)
    assert "never fed" in (row() or ())[-1]
    with connected(status()["socket"]) as sock:
        messages.send(sock, HELLO)
        assert (heard(sock) or {})["op"] == "attached"
        sock.send(b"\xff")
        assert heard(sock) is not None
    assert wait_until(lambda: "not JSON" in ((row() or ())[-1] or ""))


# ------------------------------------------------------------------------------------------ shares


def test_memory_bounds_all_rings_together(serve: Serve, loaderd: Run) -> None:
    """A stream whose ring would exceed --memory is refused with the numbers, the others go on, and it is let in when they left."""
    serve("--memory", "40M")
    large = {"structures": ["inner"], "batch_size": 64, "slots": 24}  # 29 MiB
    with Feed(**large, tail="pad") as first:  # type: ignore[arg-type]
        found = json.loads(loaderd("status", "--json").stdout)
        assert found["memory_bytes"] == 40 << 20
        assert found["ring_bytes"] == found["streams"][0]["ring_bytes"] > 25 << 20
        with pytest.raises(
            FeedError, match=r"^the ring needs \d\d MiB, and of loaderd's 40 MiB \(--memory\) \d\d are in use; .*fewer slots"
        ) as no:
            Feed(**large, tail="pad", seed=1)  # type: ignore[arg-type]
        assert "\n" not in str(no.value)
        with Feed(structures=["inner"], batch_size=8, slots=8) as small:
            assert sum(len(batch) for batch in small.epoch()) == small.num_samples
        assert sum(int(batch.valid.sum()) for batch in first.epoch()) == first.num_samples
    with Feed(**large, tail="pad", seed=1) as second:  # type: ignore[arg-type]
        assert sum(int(batch.valid.sum()) for batch in second.epoch()) == second.num_samples
    assert json.loads(loaderd("status", "--json").stdout)["ring_bytes"] == 0


def fill(path: str, hello: Message, count: int) -> None:
    """Attach so often from another process, say so, and stay until told to go."""
    many = [connected(path) for _ in range(count)]
    for sock in many:
        messages.send(sock, hello)
    assert all((heard(sock) or {})["op"] == "attached" for sock in many)
    print("attached", flush=True)  # noqa: T201
    sys.stdin.read()


def test_status_of_many_consumers(serve: Serve, loaderd: Run) -> None:
    """A status that no single message holds comes whole, to `status`, `top` and a program; no connection beyond a share is let in."""
    path = serve()["socket"]
    definition = {"structures": ["inner", "y" * 2_500], "require": "any", "batch_size": 1}
    with Feed(**definition, run="before") as feed:  # type: ignore[arg-type]
        list(feed.epoch())
    # A run that was fed before waits for its state, at one connection to PostgreSQL a trainer.
    hello = {**HELLO, "definition": definition, "run": "before"}
    script = f"from tests.test_access import fill\nfill({path!r}, {hello!r}, {OF_ONE_PROCESS - 2})"
    with contextlib.ExitStack() as stack:
        crowds = []
        for _ in range(2):
            process = subprocess.Popen(
                [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
            )
            stack.callback(process.communicate)
            crowds.append(process)
        for process in crowds:
            assert process.stdout is not None and process.stdout.readline() == "attached\n"
        found = status()
        assert len(json.dumps(found)) > 2 * LIMIT
        assert len(found["streams"]) == 2 * (OF_ONE_PROCESS - 2)
        assert {stream["pid"] for stream in found["streams"]} == {process.pid for process in crowds}
        assert found["streams"][0]["definition"]["structures"] == definition["structures"]
        assert len(json.loads(loaderd("status", "--json").stdout)["streams"]) == len(found["streams"])
        assert loaderd("status").stdout.count("trainer") == len(found["streams"])
        assert len(json.loads(loaderd("top", "--once", "--json", "--interval", "0.1").stdout)["streams"]) == len(found["streams"])
        mine = [connected(path) for _ in range(OF_ONE_PROCESS + 3)]
        told = [heard(sock) for sock in mine[OF_ONE_PROCESS:]]
        assert all(reply is not None and f"{OF_ONE_PROCESS} of them with this process" in reply["message"] for reply in told)
        with pytest.raises(FeedError, match="takes no more for now"):
            Feed(structures=["inner"])
        for sock in mine:
            sock.close()
    assert wait_until(lambda: status()["streams"] == [])
    assert CONSUMERS > OF_ONE_PROCESS


def test_one_long_definition_does_not_spoil_the_status(serve: Serve) -> None:
    """A definition that alone fills more than a message is shown shortened; the streams around it are shown whole."""
    path = serve()["socket"]
    where = "sample_id > 0 /* " + "ä" * 15_000 + " */"
    with Feed(structures=["inner"]), Feed(structures=["inner"], seed=2), connected(path) as sock:
        sock.send(json.dumps({**HELLO, "definition": {"structures": ["inner"], "where": where}}, ensure_ascii=False).encode())
        assert (heard(sock) or {})["op"] == "attached"
        found = status()["streams"]
        assert [stream["definition"]["seed"] for stream in found] == [0, 2, 0] or [stream["definition"]["seed"] for stream in found] == [
            0,
            0,
            2,
        ]
        [long] = [stream for stream in found if stream["definition"]["where"]]
        assert long["definition"]["where"].startswith("sample_id > 0") and len(long["definition"]["where"]) < 2_000


def test_status_while_the_database_is_out_of_reach(serve: Serve, loaderd: Run, new_database: Callable[[], str]) -> None:
    """Without PostgreSQL `status` and `top` find the only daemon there is; of several they list the sockets."""
    lost = ("--database", "postgresql://nobody@127.0.0.1:1/none")
    none = loaderd("status", *lost)
    assert none.returncode == 5 and none.stderr.count("\n") == 1
    found = serve()
    stale = Path(found["socket"]).with_name("loaderd-0000000000000000.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock, messages.Address(stale) as name:
        sock.bind(name)  # a socket that a killed daemon left behind
    assert json.loads(loaderd("status", "--json", *lost).stdout)["pid"] == found["pid"]
    assert json.loads(loaderd("top", "--once", "--json", "--interval", "0.1", *lost).stdout)["daemon"]["pid"] == found["pid"]
    other = serve(database=new_database())
    several = loaderd("status", *lost)
    assert several.returncode == 5 and several.stderr.count("\n") == 1
    assert found["socket"] in several.stderr and other["socket"] in several.stderr and str(stale) not in several.stderr
    assert status()["pid"] == found["pid"]
    os.kill(other["pid"], signal.SIGTERM)
