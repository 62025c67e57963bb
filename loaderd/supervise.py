"""`loaderd serve` watches over its daemon: a child process, started again after any crash.

The child holds the reading end of a pipe; when the supervisor itself is killed it hangs up, and the child feeds on until its last
trainer left. The supervisor keeps the database open, so an embedded server does not stop and start with each child.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import deque
from types import FrameType

from catalog.errors import CatalogError
from loaderd.daemon import say
from loaderd.workers import python

CRASHES, WITHIN_S = 10, 60.0  # as many in so short a time are no accident
PAUSE_S = 0.05


def supervise(arguments: list[str]) -> None:
    """Run `loaderd serve` with these arguments as a child, again and again, until it ends by itself or is told to.

    Raises:
        CatalogError: If it crashes all the time, or ends with an error of its own, which it said on stderr.
    """
    told: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def tell(number: int, _: FrameType | None) -> None:
        told.append(number)
        if child is not None:
            child.send_signal(signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, tell)
    reading, writing = os.pipe()  # `writing` is ours alone: it closes with us, whatever ends us
    crashes: deque[float] = deque(maxlen=CRASHES)
    try:
        while not told:
            command, environment = python("-m", "loaderd", "serve", *arguments, "--supervisor", str(reading))
            child = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, pass_fds=[reading], start_new_session=True)
            if told:  # between the loop's condition and the line above
                child.send_signal(signal.SIGTERM)
            code = child.wait()
            if code == 0 or told:
                return
            if code > 0 and not crashes:
                raise SystemExit(code)  # it said why
            crashes.append(time.monotonic())
            say("daemon died and is started again", child=child.pid, code=code, crashes=len(crashes))
            if len(crashes) == CRASHES and crashes[-1] - crashes[0] < WITHIN_S:
                raise CatalogError(f"loaderd crashed {CRASHES} times within {WITHIN_S:g} s; its last words are above")
            time.sleep(PAUSE_S if code < 0 else 1.0)
    finally:
        os.close(writing)
        os.close(reading)
