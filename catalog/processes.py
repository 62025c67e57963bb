"""Processes of this machine that work for a command: begun as they are needed, and ended with it, whatever ends it.

What they do is for their callers to say: an ingest reads files in them (`catalog.reading`), others measure, draw or export images.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from types import FrameType, ModuleType
from typing import Any

Progress = Callable[[int, int], None]  # called with (done, all of them)


class _Processes(ProcessPoolExecutor):
    """Processes, started as they are needed: never by fork, as this one has a libpq connection and may have threads."""

    def __init__(self, jobs: int) -> None:
        super().__init__(jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_begin)

    def submit(self, *args: Any, **kwargs: Any) -> Future[Any]:
        # A process that starts now finds no script to run again, so one that ingests needs no main guard, and what a command imports is
        # not imported once more (0.5 s). It inherits that Ctrl-C is for this one alone, from its first line on.
        with _undisturbed():
            main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
            try:
                return super().submit(*args, **kwargs)
            finally:
                sys.modules["__main__"] = main


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Have Ctrl-C wait until the block is through: a process half started would be one that nobody ends, and would say so on stderr.

    To block the signal here is for the processes and threads that begin meanwhile, which inherit that. Another thread that does not
    block it, such as those of NumPy's BLAS, still takes it, and Python then interrupts this one all the same.
    """
    before = signal.getsignal(signal.SIGINT)
    came = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came = True

    handled = callable(before) and threading.current_thread() is threading.main_thread()
    if handled:
        signal.signal(signal.SIGINT, note)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if hasattr(signal, "pthread_sigmask") else None
    try:
        yield
    finally:
        if blocked is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        if handled:
            signal.signal(signal.SIGINT, before)
        if came and callable(before):
            before(signal.SIGINT, None)


@contextlib.contextmanager
def processes(jobs: int | None, tasks: int) -> Iterator[Executor]:
    """Have `jobs` processes, by default one a core, at most one a task; whatever ends the context ends them."""
    with _undisturbed():
        pool = _Processes(max(1, min(jobs or os.cpu_count() or 1, tasks)))
    try:
        yield pool
    except BaseException:
        for process in list((pool._processes or {}).values()):
            process.terminate()  # Ctrl-C ends within a second, whatever is being done
        # Not without waiting: at its exit Python would wake the executor's thread through a pipe that this one may just be closing.
        pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown()


_alone = False  # in one of these processes


def _begin() -> None:
    global _alone  # noqa: PLW0603  what an initializer leaves to its process
    _alone = hasattr(signal, "setitimer")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all; who began them decides
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Who began them and is killed by -9 cannot stop them, and they would wait for work for ever."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def end_after(seconds: float) -> None:
    """Have this process, if it is one of these, killed in so many seconds, whatever it does then; 0 takes that back."""
    if _alone:
        signal.setitimer(signal.ITIMER_REAL, seconds)
