"""Which descriptors the daemon waits for, and what it does when one is readable.

epoll and a dictionary. Of several events that come together, a handler may close what a later one was for; that one is then left out,
also if the number of its descriptor was given to another one meanwhile.
"""

from __future__ import annotations

import select
from collections.abc import Callable


class Loop:
    """Readable descriptors and their handlers."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[], None]] = {}

    def add(self, fd: int, handler: Callable[[], None]) -> None:
        """Call `handler` whenever this descriptor is readable or hung up; it must not block."""
        self._handlers[fd] = handler
        self._epoll.register(fd, select.EPOLLIN)

    def remove(self, fd: int) -> None:
        """Wait for this descriptor no more; to be called before it is closed."""
        del self._handlers[fd]
        self._epoll.unregister(fd)

    def once(self, timeout_s: float | None) -> bool:
        """Wait for something and handle it; False if nothing came in time."""
        events = [(fd, self._handlers.get(fd)) for fd, _ in self._epoll.poll(timeout_s)]
        for fd, handler in events:
            if handler is not None and self._handlers.get(fd) is handler:  # else what came before it removed it
                handler()
        return bool(events)

    def close(self) -> None:
        """Give the epoll descriptor up."""
        self._epoll.close()
