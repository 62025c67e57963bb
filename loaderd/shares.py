"""Which positions of an epoch a rank gets, and at which step: arithmetic on the stored order, so hosts need not talk.

Step by step all ranks together take a contiguous piece of the order, ``batch_size * num_ranks`` positions, rank r the r-th part of it. So
the order depends on neither the number of ranks nor of workers, and at every step what was dealt out is a prefix of the order: an
attempt with another number of ranks goes on where the one before it ended.

The last step is dealt out evenly (``tail="drop"``: not at all): all ranks have the same number of batches, whose sizes differ by at
most one. If fewer samples than ranks are left, nobody gets them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

Span = tuple[int, int]  # positions first … end, end not included


@dataclass(frozen=True)
class Share:
    """One rank's part of an epoch, from the step and position at which the attempt begins in it."""

    num_samples: int
    batch_size: int
    rank: int = 0
    num_ranks: int = 1
    tail: str = "short"
    first_step: int = 0
    first_position: int = 0

    @property
    def together(self) -> int:
        """Positions that all ranks take in a whole step."""
        return self.batch_size * self.num_ranks

    @cached_property
    def whole(self) -> int:
        """The step after the last whole one."""
        return self.first_step + max(0, self.num_samples - self.first_position) // self.together

    @cached_property
    def rest(self) -> int:
        """Samples that are dealt out in the last step."""
        left = max(0, self.num_samples - self.first_position) % self.together
        return left if self.tail != "drop" and left >= self.num_ranks else 0

    @property
    def steps(self) -> int:
        """The step after the last one; as many on every rank."""
        return self.whole + (self.rest > 0)

    @property
    def end(self) -> int:
        """The position after the last that anybody gets; what follows is dropped."""
        return self.begins(self.steps)

    def begins(self, step: int) -> int:
        """The position at which all ranks' batches of a step begin: what lies before it was dealt out in earlier steps."""
        if step <= self.whole:
            return self.first_position + (step - self.first_step) * self.together
        return self.begins(self.whole) + self.rest

    def span(self, step: int) -> Span:
        """The positions of this rank's batch."""
        first = self.begins(step)
        if step < self.whole:
            return first + self.rank * self.batch_size, first + (self.rank + 1) * self.batch_size
        size, more = divmod(self.rest, self.num_ranks)
        mine = first + self.rank * size + min(self.rank, more)
        return mine, mine + size + (self.rank < more)

    def spans(self, first: int, end: int) -> list[Span]:
        """The positions of this rank's batches of steps first … end, touching ones in one."""
        if self.num_ranks == 1:
            return [(self.begins(first), self.begins(end))] if first < end else []
        return [self.span(step) for step in range(first, end)]


def without(spans: list[Span], holes: list[int]) -> list[Span]:
    """Return ascending spans less some positions."""
    left = []
    missing = sorted(holes)
    for first, end in spans:
        while missing and missing[0] < end:
            hole = missing.pop(0)
            if hole > first:
                left.append((first, hole))
            first = max(first, hole + 1)  # noqa: PLW2901
        if first < end:
            left.append((first, end))
    return left
