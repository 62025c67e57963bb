"""What a stream feeds: its definition, checked, as JSON, and with its digest."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from typing import Any

import psycopg
from psycopg import sql

from catalog.errors import UsageError
from catalog.selection import DRAWN, ORIGINS, known, on_side, side
from loaderd import transforms as changes

DTYPES = ("float16", "float32", "float64")
LARGEST = 16_384  # px of a side that is asked for
FURTHEST = 8  # neighbours on each side
# Fields of the first version; what came later is in a definition's JSON only where it says something, so digests stay as they were.
FIRST = ("structures", "where", "limit", "include_flagged", "require", "batch_size", "seed", "shuffle", "tail", "dtype", "on_error")
LISTS = ("structures", "origins", "readers", "size", "transforms")
SUCH_AS = {  # what each of them must be
    "structures": "a list, such as ['inner']", "origins": "a list, such as ['contour']", "readers": "a list, such as ['anna']",
    "size": "(rows, columns)", "transforms": "a list, such as [{'name': 'rotate', 'limit': 15}]",
}  # fmt: skip


@dataclass(frozen=True)
class Definition:
    """What a stream feeds. Everything that changes a batch's content is here, and nothing else."""

    structures: tuple[str, ...] = ()
    snapshot: str | None = None
    split: str | None = None
    origins: tuple[str, ...] = DRAWN
    readers: tuple[str, ...] | None = None
    labels: str | None = None
    where: str | None = None
    limit: int | None = None
    include_flagged: bool = False
    require: str = "all"
    batch_size: int = 8
    seed: int = 0
    shuffle: bool = True
    tail: str = "short"
    dtype: str = "float32"
    channels: str = "none"
    size: tuple[int, int] | None = None
    fit: str | None = None
    context: int = 0
    context_ends: str = "repeat"
    transforms: tuple[dict[str, Any], ...] = ()
    sequences: dict[str, Any] | None = None
    on_error: str = "skip"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("require", ("all", "any")),
            ("tail", ("short", "drop", "pad")),
            ("dtype", DTYPES),
            ("channels", ("none", "first", "last")),
            ("fit", (None, "crop", "pad", "resize")),
            ("context_ends", ("repeat", "zero")),
            ("on_error", ("skip", "blank", "stop")),
        ):
            if getattr(self, name) not in allowed:
                raise UsageError(f"{name}={getattr(self, name)!r}: must be one of {', '.join(repr(one) for one in allowed if one)}")
        # `type`, not isinstance: True is an int to Python, and JSON from a socket may hold anything.
        if type(self.batch_size) is not int or not 1 <= self.batch_size <= 65_536:
            raise UsageError(f"batch_size={self.batch_size!r}: must be a whole number from 1 to 65536")
        if type(self.seed) is not int or not -(2**63) <= self.seed < 2**63:
            raise UsageError(f"seed={self.seed!r}: must be a whole number of 64 bits, since the database hashes with it")
        if self.limit is not None and (type(self.limit) is not int or self.limit < 1):
            raise UsageError(f"limit={self.limit!r}: must be a whole number from 1 on")
        for name in ("shuffle", "include_flagged"):
            if type(getattr(self, name)) is not bool:
                raise UsageError(f"{name}={getattr(self, name)!r}: must be true or false")
        for name in ("structures", "readers"):
            names = getattr(self, name) or ()
            if not all(isinstance(one, str) and one for one in names) or len(set(names)) != len(names):
                raise UsageError(f"{name}={list(names)!r}: must be different names")
        if self.readers is not None and not self.readers:
            raise UsageError("readers=[]: must name somebody; leave it out for the preferred reader")
        if self.readers is not None:
            object.__setattr__(self, "readers", tuple(sorted(self.readers)))  # their order says nothing
        if not self.origins or not all(one in ORIGINS for one in self.origins) or len(set(self.origins)) != len(self.origins):
            raise UsageError(f"origins={list(self.origins)!r}: must be different ones of {', '.join(map(repr, ORIGINS))}")
        object.__setattr__(self, "origins", tuple(sorted(self.origins)))
        if self.labels == "":
            raise UsageError("labels='': must be the name of a label, such as 'label' for MNIST's")
        if self.split is not None:
            side(self.split)
        if self.snapshot is not None:
            # A snapshot is a frozen list: what chooses anew contradicts it.
            flagged = self.include_flagged or None
            for name, value in (
                ("where", self.where), ("include_flagged", flagged), ("origins", self._origins()), ("readers", self.readers),
            ):  # fmt: skip
                if value is not None:
                    raise UsageError(f"{name}={value!r}: a snapshot's samples are chosen when it is made; leave {name}= out")
        self._check_pixels()

    def _check_pixels(self) -> None:
        if self.size is not None:
            if len(self.size) != 2 or not all(type(one) is int and 1 <= one <= LARGEST for one in self.size):
                raise UsageError(f"size={list(self.size)!r}: must be (rows, columns), whole numbers from 1 to {LARGEST}")
            object.__setattr__(self, "fit", self.fit or "resize")
        elif self.fit is not None:
            raise UsageError(f"fit={self.fit!r}: says how images come to a size; pass size=(rows, columns), too")
        if type(self.context) is not int or not 0 <= self.context <= FURTHEST:
            raise UsageError(f"context={self.context!r}: must be a whole number from 0 to {FURTHEST}, the neighbours on each side")
        if self.context and self.channels == "none":
            raise UsageError(f'context={self.context}: neighbours are channels; pass channels="first" or "last", too')
        object.__setattr__(self, "transforms", changes.checked(list(self.transforms), size=self.size))
        if self.sequences is None:
            return
        from loaderd import sequences

        object.__setattr__(self, "sequences", sequences.checked(self.sequences))
        object.__setattr__(self, "labels", self.labels or "label")
        for name in ("structures", "size", "context", "transforms"):
            if value := getattr(self, name):
                raise UsageError(f"{name}={value!r}: sequences are composed of digits, and have none; leave {name}= out")

    def _origins(self) -> list[str] | None:
        """Return the origins if they are not the default, which then says nothing."""
        return None if self.origins == DRAWN else list(self.origins)

    @property
    def drawn(self) -> bool:
        """Does a sample need something that was drawn on it, or said of it?"""
        return bool(self.structures or self.labels)

    @property
    def plain(self) -> bool:
        """Are images and masks fed as they are, and nothing else? Then workers read straight into the slot."""
        return not (self.labels or self.size or self.context or self.transforms or self.sequences)

    @property
    def annotations(self) -> int:
        """How many annotations a sample has: one a structure, and the label."""
        return len(self.structures) + (self.labels is not None)

    @property
    def fixed_size(self) -> tuple[int, int] | None:
        """(rows, columns) of what is fed, if that does not depend on the images."""
        return changes.output_size(self.transforms, self.size)

    @property
    def looks_up(self) -> bool:
        """Are there constants of the stream: classes of its labels, or statistics of its images?"""
        return bool((self.labels is not None and self.sequences is None) or changes.needs_statistics(self.transforms))

    @classmethod
    def from_json(cls, given: object) -> Definition:
        """Return the definition that a client sent. Raises UsageError for anything that is none."""
        names = set(cls.__dataclass_fields__)
        if not isinstance(given, dict) or not set(given) <= names:
            raise UsageError(f"a stream's definition has the fields {', '.join(sorted(names))}")
        lists = {name: given[name] for name in LISTS if name in given}
        optional = ("readers", "size")
        for name, value in lists.items():
            if not isinstance(value, list) and not (value is None and name in optional):
                raise UsageError(f"{name}={value!r}: must be {SUCH_AS[name]}")
        for name in ("where", "split", "snapshot", "labels"):
            if not (given.get(name) is None or isinstance(given[name], str)):
                raise UsageError(f"{name}={given[name]!r}: must be a text")
        if not (given.get("sequences") is None or isinstance(given["sequences"], dict)):
            raise UsageError(f"sequences={given['sequences']!r}: must be options, such as {{'length': [3, 8]}}")
        return cls(**{**given, **{name: None if value is None else tuple(value) for name, value in lists.items()}})

    def whole(self) -> dict[str, Any]:
        """Return all of its fields, as JSON has them."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in self.__dict__.items()}

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON keeps it."""
        usual = Definition.__dataclass_fields__
        return {name: value for name, value in self.whole().items() if name in FIRST or getattr(self, name) != usual[name].default}

    def digest(self) -> bytes:
        """Return sha256 of the definition as canonical JSON."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True, separators=(",", ":")).encode()).digest()


def settled(conn: psycopg.Connection[Any], definition: Definition) -> Definition:
    """Return the definition with its split's name spelled out, after a look at what it names.

    Raises:
        UsageError: If there is no such split, part, fold or snapshot, or the snapshot does not hold what is asked for.
    """
    if definition.snapshot is None:
        return definition if definition.split is None else replace(definition, split=str(known(conn, side(definition.split))))
    name = definition.snapshot
    row = conn.execute("SELECT id, structures, definition->>'split' FROM snapshot WHERE name = %s", [name]).fetchone()
    if row is None:
        listed = ", ".join(str(one) for (one,) in conn.execute("SELECT name FROM snapshot ORDER BY name LIMIT 10").fetchall())
        raise UsageError(f"snapshot={name!r}: there is none of this name; there are {listed or 'none, see `catalog snapshot create`'}")
    snapshot_id, structures, split = row
    if missing := [one for one in definition.structures if one not in structures]:
        raise UsageError(f"structures={missing!r}: snapshot {name!r} holds {', '.join(structures) or 'images alone'}")
    if definition.split is None:
        return definition
    wanted = side(definition.split)
    if wanted.split not in (None, split):
        raise UsageError(f"split={definition.split!r}: snapshot {name!r} was made with {f'split {split!r}' if split else 'no split'}")
    here, parameters = on_side(wanted)
    there = sql.SQL("SELECT EXISTS (SELECT FROM snapshot_sample WHERE snapshot_id = %(snapshot)s AND {})").format(here)
    if conn.execute(there, {"snapshot": snapshot_id, **parameters}).fetchone() != (True,):
        raise UsageError(f"split={definition.split!r}: snapshot {name!r} has nothing there; see `catalog snapshot show`")
    return replace(definition, split=str(replace(wanted, split=None)))
