"""The gaps of a digit sequence: which widths they can give, and one tuple drawn from all that give the width asked for.

n digits have n + 1 gaps. ``subtype="edge"``: all may be wide; ``"between"``: the first and the last are 0. ``type="fixed"``: all are equal;
``"variable"``: each is drawn within the closed range, uniformly **among all tuples whose total gives exactly the width**. For that the
tuples are counted (exactly, in whole numbers) and one is chosen by its rank: the first gap is the one within whose share of the tuples
the rank lies, what is left of the rank chooses the rest. Drawing gap after gap and mending the last would favour some tuples.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from catalog.errors import UsageError

TYPES = ("fixed", "variable")
SUBTYPES = ("between", "edge")
MOST_LISTED = 6  # widths in a message
FEW = 4  # sequences
LOW_32 = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)

Words = NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Spacing:
    """How digits of `side` px are spaced: gaps from `low` to `high` px, both inclusive; `width` px in all, None for whatever they give."""

    type: str
    subtype: str
    low: int
    high: int
    width: int | None
    side: int

    def gaps(self, digits: int) -> int:
        """Return how many gaps of so many digits may be wide."""
        return digits + 1 if self.subtype == "edge" else digits - 1

    def widths(self, digits: int) -> range:
        """Return the widths that so many digits can have, ascending."""
        gaps = self.gaps(digits)
        least = digits * self.side + gaps * self.low
        return range(least, least + gaps * (self.high - self.low) + 1, gaps if self.type == "fixed" and gaps else 1)

    def check(self, lengths: Iterable[int]) -> None:
        """Raise UsageError, with the widths that are possible, if sequences of one of these lengths cannot have the width."""
        lengths = list(lengths)
        if self.subtype == "between" and 1 in lengths:
            raise UsageError("one digit has no gap between digits; use subtype edge, or two digits or more")
        if self.width is None or all(self.width in self.widths(one) for one in lengths):
            return
        gaps = f"{self.type} gaps of {self.low} to {self.high} px ({self.subtype})"
        asked = f"a width of {self.width} px is not possible:"
        if len(lengths) == 1:
            [digits] = lengths
            raise UsageError(f"{asked} {_counted(digits)} of {self.side} px with {gaps} give {_listed(self.widths(digits), self.width)}")
        first, last = lengths[0], lengths[-1]
        common = set(self.widths(first)).intersection(*(self.widths(one) for one in lengths[1:]))
        if common:
            raise UsageError(f"{asked} {first} to {last} digits with {gaps} all fit into {_listed(sorted(common), self.width)}")
        each = ", ".join(f"{_counted(one)} give {_listed(self.widths(one), self.width)}" for one in (first, last))
        raise UsageError(f"{asked} no width fits all lengths with {gaps}: {each}; leave the width out, or ask for fewer lengths")

    def words(self, digits: int) -> int:
        """Return how many random words `draw` takes for so many digits."""
        gaps = self.gaps(digits)
        if self.type == "fixed":
            return 1
        if self.width is None:
            return gaps
        return int(_counts(gaps, self.high - self.low, self._spare(digits))[gaps][-1] - 1).bit_length() // 64 + 2

    def draw(self, words: Words, digits: int) -> NDArray[np.int64]:
        """Return gaps for sequences of so many digits, in px: (B, digits + 1) int64.

        Args:
            words: uint64 (B, at least `self.words(digits)`), uniformly random.
        """
        if len(words) <= FEW:  # numpy's calls take 60 µs, however few the rows
            return np.array([self.draw_one(row.tolist(), digits) for row in words], np.int64).reshape(len(words), digits + 1)
        gaps, span = self.gaps(digits), self.high - self.low
        found = np.zeros((len(words), digits + 1), np.int64)
        inner = found if self.subtype == "edge" else found[:, 1:-1]
        if self.type == "fixed":
            if self.width is None:
                inner[...] = self.low + below(words[:, 0], span + 1)[:, None]
            else:
                inner[...] = (self.width - digits * self.side) // gaps
        elif self.width is None:
            inner[...] = self.low + below(words[:, :gaps], span + 1)
        else:
            inner[...] = self.low + unranked(_ranks(words, gaps, span, self._spare(digits)), gaps, span, self._spare(digits))
        return found

    def draw_one(self, words: list[int], digits: int) -> list[int]:
        """Return the gaps of one sequence, in px: as `draw`, of the same words as Python's integers."""
        gaps, span = self.gaps(digits), self.high - self.low
        if self.type == "fixed":
            wide = self.low + (words[0] * (span + 1) >> 64) if self.width is None else (self.width - digits * self.side) // gaps
            inner = [wide] * gaps
        elif self.width is None:
            inner = [self.low + (word * (span + 1) >> 64) for word in words[:gaps]]
        else:
            spare = self._spare(digits)
            counted = _listed_counts(gaps, span, spare)
            inner = [self.low + gap for gap in _unranked_one(_long_rank(words, counted[gaps][-1] - counted[gaps][-2]), counted, spare)]
        return inner if self.subtype == "edge" else [0, *inner, 0]

    def _spare(self, digits: int) -> int:
        """Return what the gaps have to share beyond the least, px."""
        assert self.width is not None
        return self.width - digits * self.side - self.gaps(digits) * self.low


def ways(gaps: int, span: int, total: int) -> int:
    """Return how many tuples of so many gaps, each 0 to `span`, have this total: exactly."""
    row = _counts(gaps, span, total)[gaps]
    return int(row[total + 1] - row[total])


def unranked(ranks: NDArray[Any], gaps: int, span: int, total: int) -> NDArray[np.int64]:
    """Return the tuples with these ranks among all of so many gaps, each 0 to `span`, with this total, in lexical order: (B, gaps).

    Args:
        ranks: Whole numbers in [0, `ways(gaps, span, total)`), of the dtype of the counts; int64, or Python's integers as object.
    """
    table = _counts(gaps, span, total)
    found = np.empty((len(ranks), gaps), np.int64)
    left, end = ranks, np.full(len(ranks), total + 1)
    for place in range(gaps):
        row = table[gaps - place - 1]
        # Tuples whose gap here is smaller than g: row[end] - row[end - g]. The largest g for which that is at most the rank.
        begin = np.searchsorted(row, row[end] - left)
        left = left - (row[end] - row[begin])
        found[:, place] = end - begin
        end = begin
    return found


def _unranked_one(rank: int, table: list[list[int]], total: int) -> Iterator[int]:
    """Yield the gaps of one rank: as `unranked`."""
    end = total + 1
    for row in table[-2::-1]:
        begin = bisect_left(row, row[end] - rank)
        rank -= row[end] - row[begin]
        yield end - begin
        end = begin


@lru_cache(maxsize=64)
def _listed_counts(gaps: int, span: int, total: int) -> list[list[int]]:
    found: list[list[int]] = _counts(gaps, span, total).tolist()
    return found


@lru_cache(maxsize=64)
def _counts(gaps: int, span: int, total: int) -> NDArray[Any]:
    """Return for k = 0 … gaps and t = 0 … total + 1 how many tuples of k gaps, each 0 to `span`, have a total below t: exactly.

    int64, or Python's integers where these are too small: 21 digits with gaps of 0 to 20 have 10²⁷ tuples.
    """
    dtype = np.int64 if (span + 1) ** gaps < 2**63 else object
    table = np.zeros((gaps + 1, total + 2), dtype)
    table[0, 1:] = 1
    for k in range(1, gaps + 1):
        before = table[k - 1]
        shifted = np.zeros(total + 1, dtype)
        shifted[span + 1 :] = before[1 : max(total + 1 - span, 1)]
        table[k, 1:] = np.cumsum(before[1:] - shifted, dtype=dtype)
    table.setflags(write=False)
    return table


def _ranks(words: Words, gaps: int, span: int, total: int) -> NDArray[Any]:
    """Return uniformly random ranks; of words of 64 bits more than needed, so that no tuple is off its share by over 2⁻⁶⁴ of it."""
    count = ways(gaps, span, total)
    if count < 2**63 and _counts(gaps, span, total).dtype == np.int64:
        # floor((w0 · 2⁶⁴ + w1) · count / 2¹²⁸)
        scale = np.uint64(count)
        high, low, more = _high(words[:, 0], scale), words[:, 0] * scale, _high(words[:, 1], scale)
        return np.asarray(high + (low + more < low), np.int64)
    found = np.empty(len(words), object)
    found[:] = [_long_rank(row.tolist(), count) for row in words]
    return found


def _long_rank(words: list[int], count: int) -> int:
    used = (count - 1).bit_length() // 64 + 2
    number = 0
    for word in words[:used]:
        number = number << 64 | word
    return number * count >> 64 * used


def below(words: Words, count: int | NDArray[Any]) -> NDArray[np.int64]:
    """Return whole numbers in [0, count): ``floor(word · count / 2⁶⁴)``, uniform to within count / 2⁶⁴."""
    return np.asarray(_high(words, np.asarray(count).astype(np.uint64)), np.int64)


def _high(a: Any, b: Any) -> Any:
    """Return the upper 64 bits of the products of uint64."""
    a0, a1, b0, b1 = a & LOW_32, a >> HALF, b & LOW_32, b >> HALF
    u = a1 * b0 + (a0 * b0 >> HALF)
    v = a0 * b1 + (u & LOW_32)
    return a1 * b1 + (u >> HALF) + (v >> HALF)


def _counted(digits: int) -> str:
    return f"{digits} digit{'s' if digits > 1 else ''}"


def _listed(widths: Any, asked: int) -> str:
    """Return widths in words, those next to the one asked for among them."""
    if len(widths) <= MOST_LISTED and not (isinstance(widths, range) and widths.step == 1 and len(widths) > 2):
        return f"{', '.join(map(str, widths[:-1]))}{' or ' if len(widths) > 1 else ''}{widths[-1]} px"
    near = sorted(sorted(widths, key=lambda one: abs(one - asked))[:2])
    step = widths.step if isinstance(widths, range) else 0
    if step == 1 or widths[-1] - widths[0] == len(widths) - 1:
        return f"{widths[0]} to {widths[-1]} px"
    return f"{widths[0]} to {widths[-1]} px{f' in steps of {step}' if step else ''}, nearest {near[0]} and {near[1]}"
