"""The line that `Feed(progress=True)` draws on stderr: how far the epoch is, how fast, and how much of the time the trainer waited.

In the trainer's process, so without rich: a carriage return and a line, never wider than the terminal.
"""

from __future__ import annotations

import os
import sys
import time
from typing import TextIO

EVERY_S = 0.125  # together with the lines that stay, at most ten updates in any second
STAYS_S = 1.0  # an epoch that took so long leaves its line; shorter ones would scroll everything else away


class Progress:
    """One line, drawn over itself. Does nothing where the stream is no terminal, and never raises because of the stream."""

    def __init__(self, stream: TextIO | None = None) -> None:
        """Draw on `stream`; None is stderr as it is now."""
        self._stream = sys.stderr if stream is None else stream
        self._width = 0  # of what stands in the line
        self._due = 0.0
        self._epoch = self._steps = self._made = self._samples = 0
        self._waited_s = self._began = 0.0
        try:
            self._shown = self._stream is not None and self._stream.isatty()  # None under pythonw and its like
        except ValueError:  # closed
            self._shown = False

    def begin(self, epoch: int, steps: int) -> None:
        """An epoch of so many steps was asked for."""
        if self._shown:
            self._epoch, self._steps, self._made, self._samples = epoch, steps, 0, 0
            self._waited_s, self._began = 0.0, time.perf_counter()

    def step(self, index: int, samples: int, waited_s: float) -> None:
        """Batch `index` is handed out; the trainer waited so long for it."""
        if not self._shown:
            return
        self._made += 1  # which is less than index + 1 where the run was resumed within the epoch
        self._samples += samples
        self._waited_s += waited_s
        now = time.perf_counter()
        self._began = min(self._began, now - waited_s)  # an epoch is begun in the middle of the wait for its first batch
        if index + 1 >= self._steps and now - self._began >= STAYS_S:
            self._draw(index + 1, now, end="\n")
            self._width = 0
        elif now >= self._due:
            self._draw(index + 1, now)

    def close(self) -> None:
        """Clear the line."""
        if self._width:
            self._write("\r" + " " * self._width + "\r")
            self._width = 0
        self._shown = False

    def _draw(self, done: int, now: float, end: str = "") -> None:
        self._due = now + EVERY_S
        elapsed = max(now - self._began, 1e-9)
        left = max(0, self._steps - done) * elapsed / self._made
        parts = (
            f"epoch {self._epoch}",
            f"{done}/{self._steps}",
            f"{self._samples / elapsed:,.0f} samples/s",
            f"in {_clock(elapsed)}" if end else f"{_clock(left)} left",
            f"waits {min(100.0, 100 * self._waited_s / elapsed):.0f} % for batches",
        )
        try:
            columns = os.get_terminal_size(self._stream.fileno()).columns or 80
        except (OSError, ValueError):
            columns = 80
        line = parts[0]
        for part in parts[1:]:
            if len(line) + 2 + len(part) < columns:  # the last column stays empty: some terminals wrap when it is written
                line += "  " + part
        line = line[: columns - 1]
        # What was longer before is painted over, but not beyond a terminal that was made narrower since.
        self._write("\r" + line.ljust(min(self._width, columns - 1)) + end)
        self._width = len(line)

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):  # the terminal is gone, or somebody closed the stream: the training is not to end with it
            self._shown = False


def _clock(seconds: float) -> str:
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"
