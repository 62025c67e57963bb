"""What tests ask the operating system about other processes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path


def commands() -> dict[int, list[bytes]]:
    """Return pid → command of the loaderd and worker processes of this test's catalog."""
    home = f"CATALOG_HOME={os.environ['CATALOG_HOME']}".encode()
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command, environment = (entry / "cmdline").read_bytes().split(b"\0"), (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if home in environment and b"-m" in command and any(part.startswith(b"loaderd") for part in command):
                found[int(entry.name)] = command
    return found


@contextlib.contextmanager
def serving(workers: int = 1) -> Iterator[int]:
    """One daemon for all feeds of a test: each would start its own, which takes longer than to be fed. Yields the supervisor's pid."""
    from loaderd.workers import python  # the processes of `odd` need none of it

    command, environment = python("-m", "loaderd", "serve", "--workers", str(workers))
    log = Path(os.environ["CATALOG_HOME"]).with_name("serve.log")
    with log.open("ab") as said:
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=said, stderr=said, cwd="/")
    try:
        assert wait_until(lambda: process.poll() is not None or b"event=serving" in log.read_bytes(), 120), log.read_text()
        assert process.poll() is None, log.read_text()
        yield process.pid
    finally:
        process.terminate()
        process.wait()


def daemons() -> list[int]:
    """Return the pids of the loaderd and worker processes of this test's catalog."""
    return list(commands())


def workers() -> list[int]:
    """Return the pids of this test's decode workers."""
    return [pid for pid, command in commands().items() if b"loaderd.decode" in command]


def kill(pids: Iterable[int], number: int = signal.SIGKILL) -> None:
    """Send a signal to each of these processes; the end of one may be the end of another, which is then gone already."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def wait_until(condition: Callable[[], bool], timeout_s: float = 60) -> bool:
    """Wait for something that another process does; False if it did not happen in time, which is meant for busy machines."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def server_ended(home: Path, timeout_s: float = 120) -> bool:
    """Wait until no process of a home's embedded PostgreSQL is left: all of them hold its server.lock. False if one is."""

    def free() -> bool:
        with (home / "server.lock").open("rb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        return True

    return not (home / "server.lock").exists() or wait_until(free, timeout_s)


def odd(items: list[int]) -> list[int]:
    """Double what it is given; ends its process at 13. Here, since each process that it runs in imports this module."""
    if 13 in items:
        os._exit(9)
    return [item * 2 for item in items]
