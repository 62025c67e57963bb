"""Pairings that people decide: listing what was only proposed, accepting, rejecting, linking by hand.

What a person decided of an annotation stands: no ingest touches its pairings any more.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import psycopg
from psycopg.rows import dict_row

from catalog import pairings, roots
from catalog.database import Database
from catalog.errors import CatalogError, UsageError
from catalog.flags import person, transaction


class State(StrEnum):
    """Which pairings to list; `unpaired`: annotations that have none, or only rejected ones."""

    PROPOSED = "proposed"
    ACCEPTED = "accepted"
    REJECTED = "rejected"
    UNPAIRED = "unpaired"
    ALL = "all"


# One row a pairing, one without for an annotation that has none of the state asked for.
LISTED = """
SELECT a.id AS annotation, s.name AS structure, r.name AS reader, a.kind, ro.url || '/' || f.path AS file, a.source_key,
       p.id AS pairing, p.image_id AS sample_id, ir.url || '/' || im.path AS image, i.frame,
       p.method, p.rule, p.score, p.state, p.actor, p.at
FROM annotation a JOIN structure s ON s.id = a.structure_id JOIN reader r ON r.id = a.reader_id
JOIN file f ON f.id = a.file_id JOIN root ro ON ro.id = f.root_id
LEFT JOIN pairing p ON p.annotation_id = a.id AND %(state)s IN (p.state, 'all')
LEFT JOIN image i ON i.id = p.image_id LEFT JOIN location l ON l.image_id = i.id AND l.preferred
LEFT JOIN file im ON im.id = l.file_id LEFT JOIN root ir ON ir.id = im.root_id
WHERE a.current AND (p.id IS NOT NULL OR %(state)s = 'all' OR %(state)s = 'unpaired'
    AND NOT EXISTS (SELECT FROM pairing q WHERE q.annotation_id = a.id AND q.state <> 'rejected'))
ORDER BY a.id, p.id
"""

ANNOTATION = """
SELECT a.id, a.current, a.rows, a.columns, f.root_id FROM annotation a JOIN file f ON f.id = a.file_id WHERE a.id = %s FOR UPDATE OF a
"""

IMAGE = """
SELECT i.rows, i.columns, EXISTS (SELECT FROM location l JOIN file f ON f.id = l.file_id WHERE l.image_id = i.id AND f.state = 'present')
FROM image i WHERE i.id = %s
"""

# What ingest raised because nobody had said which image it is, or of pairings that are none any more.
ANSWERED = """
SELECT id FROM flag WHERE state = 'open' AND raised_by = 'ingest'
  AND (annotation_id = %(annotation)s AND rule IN ('PAIR-AMBIGUOUS', 'PAIR-NO-IMAGE', 'PAIR-GRID') OR pairing_id = ANY(%(rejected)s))
ORDER BY id
"""


BY_HAND = "a person said so"


@dataclass(slots=True)
class Candidate:
    """An image that an annotation was paired with."""

    pairing: int
    sample_id: int
    image: str | None  # path; None: it lies nowhere any more
    frame: int
    method: str
    rule: str
    score: float
    state: str
    actor: str
    at: Any


@dataclass(slots=True)
class Drawn:
    """A current annotation with its pairings of the state asked for."""

    annotation: int
    structure: str
    reader: str
    kind: str
    file: str
    source_key: str
    candidates: list[Candidate] = field(default_factory=list)


@dataclass(slots=True)
class Decided:
    """What was decided of one annotation; not `changed`: it had been decided so before."""

    annotation: int
    sample_id: int
    pairing: int | None  # None: a dry run, in which none was made
    state: str
    changed: bool
    rejected: list[int] = field(default_factory=list)  # other pairings of the annotation
    closed: list[int] = field(default_factory=list)  # flags


def listed(database: Database, *, state: State = State.PROPOSED) -> list[Drawn]:
    """Return current annotations with their pairings of a state, in the order in which they came in."""
    found: list[Drawn] = []
    with transaction(database) as conn, conn.cursor(row_factory=dict_row) as cursor:
        for row in cursor.execute(LISTED, {"state": state}):
            if not found or found[-1].annotation != row["annotation"]:
                found.append(Drawn(*(row[name] for name in ("annotation", "structure", "reader", "kind", "file", "source_key"))))
            if row["pairing"] is not None:
                found[-1].candidates.append(Candidate(*(row[name] for name in Candidate.__slots__)))
    return found


def accept(database: Database, ids: Sequence[int], *, actor: str | None = None, dry_run: bool = False) -> list[Decided]:
    """Say that pairings are right, all or none: the other ones of their annotations are rejected, and the masks made.

    Raises:
        UsageError: If two are of one annotation.
        CatalogError: If one does not exist, is of a past version, or its image has no pixels; or an ingest is running.
    """
    actor = person(actor)
    with transaction(database, dry_run=dry_run) as conn:
        found = _pairings(conn, ids)
        decided = [_accept(conn, *one, actor, dry_run) for one in found]
        _finish(conn, [annotation_id for _, annotation_id, _ in found], dry_run)
    return decided


def reject(database: Database, ids: Sequence[int], *, actor: str | None = None, dry_run: bool = False) -> list[Decided]:
    """Say that pairings are wrong, all or none. An annotation without any other stays unpaired until it is linked.

    Raises:
        CatalogError: If one does not exist or is of a past version; or an ingest is running.
    """
    actor = person(actor)
    decided = []
    with transaction(database, dry_run=dry_run) as conn:
        for pairing_id, annotation_id, sample_id in _pairings(conn, ids, several=True):
            _current(conn, annotation_id)
            state, by = _state(conn, pairing_id)
            one = Decided(annotation_id, sample_id, pairing_id, "rejected", state != "rejected" or _of_layout(by))
            if one.changed:
                _set(conn, [pairing_id], "rejected", actor)
                left = conn.execute("SELECT id FROM pairing WHERE annotation_id = %s AND state <> 'rejected'", [annotation_id]).fetchone()
                # While others are proposed still, nobody has said which it is.
                one.closed = _close(conn, 0 if left else annotation_id, [pairing_id], actor)
            decided.append(one)
    return decided


def link(database: Database, annotation_id: int, sample_id: int, *, actor: str | None = None, dry_run: bool = False) -> Decided:
    """Pair an annotation with an image by hand: method `manual`, score 1. Its other pairings are rejected, and the mask is made.

    Raises:
        CatalogError: If one of them does not exist, the annotation is a past version, or the image has no pixels; or an ingest is running.
    """
    actor = person(actor)
    with transaction(database, dry_run=dry_run) as conn:
        row = conn.execute("SELECT id FROM pairing WHERE annotation_id = %s AND image_id = %s", [annotation_id, sample_id]).fetchone()
        decided = _accept(conn, None if row is None else row[0], annotation_id, sample_id, actor, dry_run, by_hand=True)
        _finish(conn, [annotation_id], dry_run)
    return decided


def _accept(
    conn: psycopg.Connection[Any],
    pairing_id: int | None,
    annotation_id: int,
    sample_id: int,
    actor: str,
    dry_run: bool,
    *,
    by_hand: bool = False,
) -> Decided:
    grid = _current(conn, annotation_id)
    image = conn.execute(IMAGE, [sample_id]).fetchone()
    if image is None:
        raise UsageError(f"sample {sample_id}: there is none in the catalog, so nothing was done; the view image_all has what there is")
    if not image[2]:
        raise CatalogError(f"sample {sample_id}: no file with its pixels is present, so nothing was done; bring it back, then ingest again")
    if grid not in ((None, None), (image[0], image[1])):
        raise CatalogError(
            f"annotation {annotation_id}: is a segment of {grid[0]}×{grid[1]} px, sample {sample_id} has {image[0]}×{image[1]}; "
            f"segments are not resampled, so nothing was done"
        )
    state, by = (None, "") if pairing_id is None else _state(conn, pairing_id)
    decided = Decided(annotation_id, sample_id, pairing_id, "accepted", state != "accepted" or _of_layout(by))
    if not decided.changed:
        return decided
    others = conn.execute(
        "SELECT id FROM pairing WHERE annotation_id = %s AND image_id <> %s AND state <> 'rejected' ORDER BY id", [annotation_id, sample_id]
    )
    decided.rejected = [other for (other,) in others]
    _set(conn, decided.rejected, "rejected", actor)  # first: of one annotation only one can be accepted at a time
    if pairing_id is not None:
        _set(conn, [pairing_id], "accepted", actor)
        if by_hand:
            conn.execute("UPDATE pairing SET method = 'manual', rule = %s, score = 1 WHERE id = %s", [BY_HAND, pairing_id])
    elif not dry_run:  # the number of an inserted row would be used up
        row = conn.execute(
            "INSERT INTO pairing (annotation_id, image_id, method, rule, score, state, actor) "
            "VALUES (%s, %s, 'manual', %s, 1, 'accepted', %s) RETURNING id",
            [annotation_id, sample_id, BY_HAND, actor],
        ).fetchone()
        assert row is not None
        decided.pairing = row[0]
    decided.closed = _close(conn, annotation_id, decided.rejected, actor)
    return decided


def _pairings(conn: psycopg.Connection[Any], ids: Sequence[int], *, several: bool = False) -> list[tuple[int, int, int]]:
    """Return (pairing, annotation, image) of each; in one order, so that two who decide the same ones do not wait in a circle."""
    rows = conn.execute(
        "SELECT id, annotation_id, image_id FROM pairing WHERE id = ANY(%s) ORDER BY annotation_id, id", [list(ids)]
    ).fetchall()
    if missing := sorted(set(ids) - {pairing_id for pairing_id, _, _ in rows}):
        raise UsageError(f"pairing {missing[0]}: there is none, so nothing was done; see `catalog pair list --state all`")
    for (first, annotation_id, _), (second, next_id, _) in itertools.pairwise(rows):
        if annotation_id == next_id and not several:
            raise UsageError(f"pairings {first} and {second}: are of one annotation ({annotation_id}), which was drawn on one image")
    return rows


def _current(conn: psycopg.Connection[Any], annotation_id: int) -> tuple[int | None, int | None]:
    """Lock an annotation, keep ingests of its root out, and return its grid (rows, columns) if it is a segment."""
    row = conn.execute(ANNOTATION, [annotation_id]).fetchone()
    if row is None:
        raise UsageError(f"annotation {annotation_id}: there is none, so nothing was done; see `catalog pair list --state all`")
    if not row[1]:
        raise CatalogError(
            f"annotation {annotation_id}: is a past version, so nothing was done; see `catalog pair list --state all` for the current one"
        )
    roots.alone(conn, [row[4]])
    return row[2], row[3]


def _state(conn: psycopg.Connection[Any], pairing_id: int) -> tuple[str, str]:
    row = conn.execute("SELECT state, actor FROM pairing WHERE id = %s FOR UPDATE", [pairing_id]).fetchone()
    assert row is not None  # its annotation is locked, and nothing else deletes pairings while ingests are kept out
    return row[0], row[1]


def _of_layout(actor: str) -> bool:
    return actor.startswith("layout:")


def _set(conn: psycopg.Connection[Any], ids: Sequence[int], state: str, actor: str) -> None:
    if ids:
        conn.execute("UPDATE pairing SET state = %s, actor = %s, at = now() WHERE id = ANY(%s)", [state, actor, list(ids)])


def _close(conn: psycopg.Connection[Any], annotation_id: int, rejected: Sequence[int], actor: str) -> list[int]:
    closed = [flag_id for (flag_id,) in conn.execute(ANSWERED, {"annotation": annotation_id, "rejected": list(rejected)})]
    if closed:
        conn.execute(
            "UPDATE flag SET state = 'resolved', closed_by = %s, closed_at = now(), reason = 'the pairing was decided' WHERE id = ANY(%s)",
            [actor, closed],
        )
    return closed


def _finish(conn: psycopg.Connection[Any], annotation_ids: Iterable[int], dry_run: bool) -> None:
    """Make the masks at once. What was decided is committed before: an ingest makes masks that are missing, too."""
    if dry_run:
        return
    rows = conn.execute(
        "SELECT DISTINCT f.root_id FROM annotation a JOIN file f ON f.id = a.file_id WHERE a.id = ANY(%s)", [list(annotation_ids)]
    )
    root_ids = [root_id for (root_id,) in rows]
    conn.commit()
    for root_id in root_ids:
        pairings.make_masks(conn, root_id)
