"""Who comes on which side of a split: patients that share pixels together, shares as near as can be, nobody moved.

Pure: from patients, who shares pixels with whom, shares and a seed to parts and folds. Rows are for `catalog.splits`.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from catalog.errors import UsageError
from catalog.flags import is_text
from catalog.selection import NAME

UNNAMED = ("train", "val", "test")  # what ratios without names are of
HELD_OUT = "test"  # has no fold
Side = tuple[str, int | None]  # part and fold


@dataclass(slots=True)
class Patient:
    """A patient, and where a split has it; no part: it has none yet."""

    id: int
    name: str
    images: int = 0
    annotated: int = 0
    part: str | None = None
    fold: int | None = None
    stratum: str | None = None


@dataclass(slots=True)
class Tied:
    """Patients without a part who share pixels, among themselves and with patients on several sides."""

    patients: list[int]  # patient.id
    sides: list[str]


def deal(
    patients: Sequence[Patient],
    twins: Iterable[tuple[int, int]],
    parts: Sequence[str],
    ratios: Sequence[float],
    *,
    folds: int | None = None,
    seed: int = 0,
) -> list[Tied]:
    """Give a part, and with `folds` a fold, to each patient that has none; patients that have one stay there.

    Patients that share pixels are one group and go together; one that shares them with a patient who has a part follows there. The
    other groups come stratum by stratum, large ones first, then by the least sha256 of seed, "part" and PatientID in them. Each goes to
    the part that lacks most patients, in its stratum and in all strata so far together; to the first of several. Folds are dealt in the
    same way, among all who are not in `test`, in an order of their own.

    Without strata a new split's part differs from its share of the N patients by at most (1 − 1/k) · g patients, for k parts and g
    patients in the largest group: a part that is given a group lacked at least a k-th of those still to come.

    Args:
        patients: Changed in place: part, fold, and stratum, which is their group's most frequent one.
        twins: Pairs of ``patient.id`` that share pixels.
        ratios: Share of each part; they need not sum to 1.

    Returns:
        The patients that are left without a part, since they tie several sides together.
    """
    groups, tied = together(patients, twins)
    free = []
    for group, sides in groups:
        values = Counter(one.stratum for one in group)
        stratum = min(values, key=lambda value: (-values[value], value is None, value or ""))
        for one in group:
            one.stratum = stratum
            if sides:
                [(one.part, one.fold)] = sides
        if not sides:
            free.append(group)
    taken = [one for one in patients if one.part]
    _even(_ordered(free, seed, "part"), taken, {part: place for place, part in enumerate(parts)}, ratios, "part")
    if folds is not None:
        folded = _ordered([group for group in free if group[0].part != HELD_OUT], seed, "fold")
        taken = [one for one in patients if one.fold is not None]
        _even(folded, taken, {fold: fold for fold in range(folds)}, [1.0] * folds, "fold")
    return tied


def _ordered(groups: Iterable[list[Patient]], seed: int, what: str) -> list[list[Patient]]:
    # In another order for folds than for parts: else a fold would be a part.
    def key(group: list[Patient]) -> tuple[int, bytes]:
        return -len(group), min(hashlib.sha256(f"{seed}\0{what}\0{one.name}".encode()).digest() for one in group)

    return sorted(groups, key=key)


def _even(groups: Sequence[list[Patient]], taken: Iterable[Patient], places: Mapping[Any, int], ratios: Sequence[float], what: str) -> None:
    # In whole numbers, where what is equal is equal on every machine.
    exact = [Fraction(ratio).limit_denominator(1_000_000_000) for ratio in ratios]
    unit = math.lcm(*(one.denominator for one in exact))
    weights = [int(one * unit) for one in exact]
    whole, names, everywhere = sum(weights), list(places), range(len(places))
    held: dict[str | None, list[int]] = defaultdict(lambda: [0] * len(weights))
    for one in taken:
        held[one.stratum][places[getattr(one, what)]] += 1
    sums = [sum(counts[place] for counts in held.values()) for place in everywhere]
    overall = [weights[place] * sum(sums) - whole * sums[place] for place in everywhere]
    strata: dict[str | None, list[list[Patient]]] = defaultdict(list)
    for group in groups:
        strata[group[0].stratum].append(group)
    for stratum in sorted(strata, key=lambda value: (value is None, value or "")):
        new, here = sum(map(len, strata[stratum])), held[stratum]
        lacks = [weights[place] * (sum(here) + new) - whole * here[place] for place in everywhere]
        overall = [overall[place] + weights[place] * new for place in everywhere]
        for group in strata[stratum]:
            place = max(everywhere, key=lambda place: lacks[place] + overall[place])
            lacks[place] -= whole * len(group)
            overall[place] -= whole * len(group)
            for one in group:
                setattr(one, what, names[place])


def together(patients: Sequence[Patient], twins: Iterable[tuple[int, int]]) -> tuple[list[tuple[list[Patient], set[Side]]], list[Tied]]:
    """Return the patients without a part in groups that share pixels, each with the side (none or one) of others that it shares with.

    Groups that share with several sides come second.
    """
    known = {one.id: one for one in patients}
    above = {one.id: one.id for one in patients if one.part is None}

    def top(patient: int) -> int:
        while above[patient] != patient:
            above[patient] = above[above[patient]]
            patient = above[patient]
        return patient

    beside: list[tuple[int, int]] = []
    for a, b in twins:
        if a not in known or b not in known:  # ingested at this moment
            continue
        if a in above and b in above:
            above[top(a)] = top(b)
        elif a in above:
            beside.append((a, b))
        elif b in above:
            beside.append((b, a))
    groups: dict[int, list[Patient]] = defaultdict(list)
    for patient in above:
        groups[top(patient)].append(known[patient])
    sides: dict[int, set[Side]] = defaultdict(set)
    for new, other in beside:
        sides[top(new)].add((known[other].part or "", known[other].fold))
    fitting = [(group, sides[first]) for first, group in groups.items() if len(sides[first]) < 2]
    tied = [
        Tied(sorted(one.id for one in group), sorted(part + ("" if fold is None else f":{fold}") for part, fold in sides[first]))
        for first, group in groups.items()
        if len(sides[first]) > 1
    ]
    return fitting, sorted(tied, key=lambda one: one.patients)


def parse_ratios(text: str) -> dict[str, float]:
    """Return part → share, sum 1, of ``70,15,15`` (train, val, test) or ``train=70,val=15,test=15``.

    Raises:
        UsageError: If it is neither.
    """
    given = [one.strip() for one in text.split(",")]
    named = "=" in text
    if not named and len(given) > len(UNNAMED):
        raise UsageError(f"--ratios: {len(given)} parts need names, such as train=60,val=20,test=10,other=10")
    found: dict[str, Fraction] = {}
    for place, one in enumerate(given):
        part, equals, ratio = (word.strip() for word in (one.rpartition("=") if named else (UNNAMED[place], "=", one)))
        if not equals or not re.fullmatch(NAME, part) or not is_text(part):
            raise UsageError("--ratios: is numbers, such as 70,15,15, or each with its part, such as train=70,val=15,test=15")
        if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?|\.[0-9]{1,9}", ratio) or not Fraction(ratio):
            raise UsageError(f"--ratios: of {part} is no number over 0; leave a part out that is to have nobody")
        if part in found:
            raise UsageError(f"--ratios: names {part} twice")
        found[part] = Fraction(ratio)
    return {part: float(ratio / sum(found.values())) for part, ratio in found.items()}
