"""What a stream did so far, and whom it waited for: the trainer, decoding or the database."""

from __future__ import annotations

import time
from dataclasses import dataclass

from loaderd.epochs import Epoch


@dataclass
class Counters:
    """What a stream did so far."""

    batches: int = 0
    samples: int = 0
    bytes: int = 0
    decoded: int = 0
    by_offset: int = 0
    opened: int = 0
    unreadable: int = 0
    revoked: int = 0


class Waits:
    """How long a stream waited for whom."""

    def __init__(self) -> None:
        self.seconds = {"trainer": 0.0, "decode": 0.0, "database": 0.0}
        self._for = "trainer"
        self._since = time.monotonic()

    def count(self) -> None:
        """Add the time since it was counted last."""
        now = time.monotonic()
        self.seconds[self._for] += now - self._since
        self._since = now

    def now_for(self, epoch: Epoch | None, *, free: bool) -> None:
        """Say what the feed waits for from now on: `epoch` is the one that is fed, `free` whether the ring has room."""
        if epoch is None or not epoch.asked or epoch.ended or epoch.announced_to > epoch.acknowledged_to:
            self._for = "trainer"
        elif (batch := epoch.batches.get(epoch.announced_to)) is not None:
            self._for = "decode" if batch.report is None else "database"
        else:
            self._for = "trainer" if epoch.waiting and not free else "database"
