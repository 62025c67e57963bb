"""The decode workers: processes that fill slots, replaced when they die.

Each is a fresh ``python -m loaderd.decode`` with one socket: never a fork of the daemon, which has threads and libpq connections. A
worker has some jobs waiting beside the one that it works on, so that it need not wait for the daemon in between. The jobs of one
that dies are given out again; decoding depends on the rows alone, so what is made again is bit-identical.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loaderd import messages
from loaderd.loop import Loop
from loaderd.messages import Message

IN_FLIGHT = 4  # jobs a worker has; with 2 it waited for the daemon now and then (20,300 samples/s, then 21,400)
DEATHS = 6  # of workers with the same job at its head, and no sample to blame, until the stream ends
SOURCE = Path(__file__).resolve().parent.parent  # where `catalog` and `loaderd` lie


def python(*arguments: str) -> tuple[list[str], dict[str, str]]:
    """Return command and environment of a Python that finds these packages, whatever started this one.

    ``-P`` keeps the working folder out of its path: a trainer's own ``token.py`` beside it must not shadow the standard library.
    """
    path = os.pathsep.join(filter(None, [str(SOURCE), os.environ.get("PYTHONPATH", "")]))
    return [sys.executable, "-P", *arguments], {**os.environ, "PYTHONPATH": path}


@dataclass
class Job:
    """A batch to be decoded.

    `done` is called with the worker's report, None if it keeps killing workers. `died` is called when a worker died on it and says
    whether to have it decoded again as it is.
    """

    number: int
    message: Message
    done: Callable[[Message | None], None]
    died: Callable[[], bool]
    deaths: int = 0


@dataclass
class Worker:
    """One process and what it was given."""

    process: subprocess.Popen[bytes]
    sock: socket.socket
    jobs: dict[int, Job] = field(default_factory=dict)


@dataclass(frozen=True)
class Shared:
    """What a worker needs once for a stream."""

    message: Message
    fds: tuple[int, ...]


class Workers:
    """A fixed number of workers, shared by all streams in the order in which the jobs come."""

    def __init__(self, count: int, loop: Loop, say: Callable[..., None]) -> None:
        self.loop, self.say = loop, say
        self.waiting: deque[Job] = deque()
        self.streams: dict[int, Shared] = {}
        self.replaced = 0
        self._next = 0
        self.workers = [self._spawn() for _ in range(count)]

    def open(self, stream: int, message: Message, fds: tuple[int, ...]) -> None:
        """Give every worker, also those to come, the ring and the work file of a stream; the descriptors stay the caller's."""
        self.streams[stream] = Shared({"op": "open", "stream": stream, **message}, fds)
        for worker in self.workers:
            self._tell(worker, self.streams[stream].message, fds)

    def forget(self, stream: int) -> None:
        """Let the workers unmap a stream's ring; none of its jobs may be waiting."""
        self.streams.pop(stream, None)  # one whose opening failed half-way was never given to them
        for worker in self.workers:
            self._tell(worker, {"op": "close", "stream": stream})

    def submit(self, message: Message, done: Callable[[Message | None], None], died: Callable[[], bool]) -> None:
        """Have a batch decoded."""
        self._next += 1
        self.waiting.append(Job(self._next, {"op": "job", "job": self._next, **message}, done, died))
        self._hand_out()

    def close(self) -> None:
        """End all workers: they end when their socket hangs up."""
        for worker in self.workers:
            self.loop.remove(worker.sock.fileno())
            worker.sock.close()
        for worker in self.workers:
            try:
                worker.process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()

    def _hand_out(self) -> None:
        while self.waiting:
            worker = min(self.workers, key=lambda worker: len(worker.jobs))
            if len(worker.jobs) >= IN_FLIGHT:
                return
            job = self.waiting.popleft()
            worker.jobs[job.number] = job
            self._tell(worker, job.message)

    def _tell(self, worker: Worker, message: Message, fds: tuple[int, ...] = ()) -> None:
        # If it is dead: its hang-up, which the loop sees next, gives its jobs to others.
        with contextlib.suppress(OSError):
            messages.send(worker.sock, message, fds)

    def _spawn(self) -> Worker:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command, environment = python("-m", "loaderd.decode", str(theirs.fileno()))
            # Two threads of BLAS a worker would only take turns on the cores that the workers share.
            environment = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", **environment}
            process = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        worker = Worker(process, ours)
        self.loop.add(ours.fileno(), lambda: self._heard(worker))
        for shared in self.streams.values():
            self._tell(worker, shared.message, shared.fds)
        return worker

    def _heard(self, worker: Worker) -> None:
        try:
            message: Any = messages.receive(worker.sock)
        except OSError:
            message = None
        if message is None:
            self._replace(worker)
        else:
            worker.jobs.pop(message["job"]).done(message)
        self._hand_out()

    def _replace(self, worker: Worker) -> None:
        self.loop.remove(worker.sock.fileno())
        worker.sock.close()
        worker.process.kill()
        code = worker.process.wait()
        self.replaced += 1
        self.say("worker died and is replaced", pid=worker.process.pid, code=code, jobs=len(worker.jobs))
        self.workers[self.workers.index(worker)] = self._spawn()
        jobs = sorted(worker.jobs.values(), key=lambda job: job.number)
        again = []
        for job in jobs:
            if job is jobs[0]:  # it worked on that one; the others only waited
                job.deaths += 1
                if not job.died():
                    continue
            again.append(job)
        for job in reversed(again):
            if job.deaths < DEATHS:
                self.waiting.appendleft(job)
            else:
                job.done(None)
