"""Kills its own process at a chosen point of loaderd. Python imports this by itself where its folder is on PYTHONPATH.

FAULTS names a folder. A file ``armed-POINT`` in it says "the n-th passing from now on"; whoever makes that passing renames the file,
so that it happens once and never after a restart, and dies, having armed the file ``held-POINT`` of a point named there as the next.
FAULTS_DEADLY is the id of a sample on which each decode worker dies.

No test code is in the product: the classes are patched as they are made.
"""

from __future__ import annotations

import builtins
import os
import signal
from collections.abc import Callable
from typing import Any

FOLDER = os.environ.get("FAULTS", "")
DEADLY = int(os.environ.get("FAULTS_DEADLY", "-1"))
_make_class = builtins.__build_class__  # type: ignore[attr-defined]
_passings: dict[str, int] = {}


def passed(point: str) -> None:
    """Die here if a fault is armed and this is its passing."""
    armed = f"{FOLDER}/armed-{point}"
    try:
        with open(armed, encoding="ascii") as file:  # noqa: PTH123 (pathlib takes long to load, and this runs in every process)
            count, number, *then = file.read().split()
        _passings[number] = _passings.get(number, 0) + 1
        if _passings[number] < int(count):
            return
        os.rename(armed, f"{FOLDER}/fired-{number}-{os.getpid()}")  # noqa: PTH104
    except FileNotFoundError:  # nothing is armed, or another process was first
        return
    for other in then:
        os.rename(f"{FOLDER}/held-{other}", f"{FOLDER}/armed-{other}")  # noqa: PTH104
    os.kill(os.getpid(), signal.SIGKILL)


def _before(point: str, method: Callable[..., Any]) -> Callable[..., Any]:
    def patched(*arguments: Any, **named: Any) -> Any:
        passed(point)
        return method(*arguments, **named)

    return patched


def _after(point: str, method: Callable[..., Any], happened: Callable[[Any], bool] = lambda result: True) -> Callable[..., Any]:
    def patched(*arguments: Any, **named: Any) -> Any:
        result = method(*arguments, **named)
        if happened(result):
            passed(point)
        return result

    return patched


def _reserved(event: Any) -> bool:
    return getattr(event, "ledger_id", None) is not None


def _announcing(opened: Callable[..., None]) -> Callable[..., None]:
    def patched(stream: Any, *arguments: Any, **named: Any) -> None:
        opened(stream, *arguments, **named)
        tell = stream._tell

        def announce(message: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
            tell(message, fds)
            if message["op"] == "batch":
                passed("announced")

        stream._tell = announce

    return patched


def _asking(send: Callable[..., None]) -> Callable[..., None]:
    def patched(feed: Any, message: dict[str, Any]) -> None:
        send(feed, message)
        if "ack" in message:
            passed("asked")

    return patched


def _deadly(read: Callable[..., Any]) -> Callable[..., Any]:
    def patched(decoder: Any, sample: Any, *arguments: Any) -> Any:
        if sample.sample_id == DEADLY:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(decoder, sample, *arguments)

    return patched


def _patch(made: type[Any]) -> None:
    if made.__name__ == "Planner":
        made.plan = _after("planned", made.plan)
    elif made.__name__ == "Supply":
        made.finish = _before("ended", made.finish)
        made._begin, made._fetch = (_after("reserved", method, _reserved) for method in (made._begin, made._fetch))
    elif made.__name__ == "Stream":
        made._decoded = _before("decoded", made._decoded)
        made._acknowledge = _after("acknowledged", made._acknowledge)
        made.__init__ = _announcing(made.__init__)  # type: ignore[misc]
    elif made.__name__ == "Daemon":
        made.__init__ = _before("starting", made.__init__)  # type: ignore[misc]
    elif made.__name__ == "Feed":
        made._send = _asking(made._send)
    elif made.__name__ == "Decoder":
        made._read = _deadly(made._read)


def _make(function: Callable[..., Any], name: str, /, *bases: Any, **named: Any) -> Any:
    made = _make_class(function, name, *bases, **named)
    # `loaderd.decode` is the main module of a worker.
    if made.__module__.startswith("loaderd.") or (made.__module__ == "__main__" and name == "Decoder"):
        _patch(made)
    return made


builtins.__build_class__ = _make  # type: ignore[attr-defined]
