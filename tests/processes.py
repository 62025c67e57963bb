"""What tests ask the operating system about other processes."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path


def daemons() -> list[int]:
    """Return the pids of the loaderd and worker processes of this test's catalog."""
    home = f"CATALOG_HOME={os.environ['CATALOG_HOME']}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command, environment = (entry / "cmdline").read_bytes().split(b"\0"), (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if home in environment and b"-m" in command and any(part.startswith(b"loaderd") for part in command):
                found.append(int(entry.name))
    return found


def workers() -> list[int]:
    """Return the pids of this test's decode workers."""
    return [pid for pid in daemons() if b"loaderd.decode" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def wait_until(condition: Callable[[], bool], timeout_s: float = 60) -> bool:
    """Wait for something that another process does; False if it did not happen in time, which is meant for busy machines."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def server_ended(home: Path, timeout_s: float = 30) -> bool:
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
