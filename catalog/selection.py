"""What of the catalog is asked for: conditions that streams, snapshots and pictures share.

A `where` of a user's stands in a statement as text. It is checked to be one expression, and runs under the login that cannot write.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import sql

from catalog.errors import UsageError

DRAWN = ("contour", "label", "segment")  # origins of what somebody drew: the default
ORIGINS = (*DRAWN, "interpolated", "proposed")
NAME = r"[^/:\s](?:[^/:]*[^/:\s])?"  # of a split or a part


@dataclass(frozen=True, slots=True)
class Side:
    """One side of a split: a part, or with a fold its training part ``train`` (the other folds) or ``val`` (that fold)."""

    split: str | None
    part: str
    fold: int | None = None

    def __str__(self) -> str:
        return (f"{self.split}/" if self.split else "") + self.part + ("" if self.fold is None else f":{self.fold}")


def side(text: str) -> Side:
    """Return the side that ``[SPLIT/]PART[:FOLD]`` names. Raises UsageError if it names none."""
    match = re.fullmatch(rf"(?:(?P<split>{NAME})/)?(?P<part>{NAME})(?::(?P<fold>[0-9]{{1,4}}))?", text)
    if match is None:
        raise UsageError(f"split={text!r}: is PART, SPLIT/PART or, of a split with folds, SPLIT/train:FOLD or SPLIT/val:FOLD")
    found = Side(match["split"], match["part"], None if match["fold"] is None else int(match["fold"]))
    if found.fold is not None and found.part not in ("train", "val"):
        raise UsageError(f"split={text!r}: of a fold there is train (the other folds) and val (that fold)")
    return found


def known(conn: psycopg.Connection[Any], wanted: Side) -> Side:
    """Return the side with its split's name: of several splits it must be said which.

    Raises:
        UsageError: If there is no such split, part or fold.
    """
    splits = {name: (parts, folds) for name, parts, folds in conn.execute("SELECT name, parts, folds FROM split ORDER BY name").fetchall()}
    if not splits:
        raise UsageError(f"split={str(wanted)!r}: the catalog has no split; see `catalog split create`")
    name = wanted.split
    if name is None:
        if len(splits) > 1:
            raise UsageError(f"split={str(wanted)!r}: there are {len(splits)} splits; say which, such as {next(iter(splits))}/{wanted}")
        [name] = splits
    if name not in splits:
        raise UsageError(f"split={str(wanted)!r}: there is no split {name!r}; there are {', '.join(splits)}")
    parts, folds = splits[name]
    if wanted.fold is None and wanted.part not in parts:
        raise UsageError(f"split={str(wanted)!r}: split {name!r} has the parts {', '.join(parts)}")
    if wanted.fold is not None and (folds is None or wanted.fold >= folds):
        has = f"the folds 0 to {folds - 1}" if folds else "no folds"
        raise UsageError(f"split={str(wanted)!r}: split {name!r} has {has}")
    return Side(name, wanted.part, wanted.fold)


def on_side(wanted: Side) -> tuple[sql.Composable, dict[str, Any]]:
    """Return the condition that a row with columns part and fold is on a side, and its parameters."""
    parameters = {"part": wanted.part, "fold": wanted.fold}
    if wanted.fold is None:
        return sql.SQL("part = %(part)s"), parameters
    return sql.SQL("fold = %(fold)s" if wanted.part == "val" else "fold <> %(fold)s"), parameters


def conditions(
    *, of_structures: bool, include_flagged: bool = False, origins: Sequence[str] = DRAWN, wanted: Side | None = None
) -> tuple[list[sql.Composable], dict[str, Any]]:
    """Return conditions over the view ``sample`` (or ``image_all``) and their parameters: what can be fed, and is not revoked.

    Args:
        of_structures: The view is ``sample``; only what has a mask or a label of one of these origins is wanted.
        wanted: A side of a split, as `known` returns it. Images whose pixels lie on another side too are on none.
    """
    found: list[sql.Composable] = [sql.SQL("file_id IS NOT NULL AND sample_id NOT IN (SELECT sample_id FROM revoked_image)")]
    parameters: dict[str, Any] = {}
    if not include_flagged:
        found.append(sql.SQL("error_flags = 0"))
    if of_structures:
        found.append(sql.SQL("origin = ANY(%(origins)s)"))
        parameters["origins"] = list(origins)
    if wanted is not None:
        here, parameters_of_side = on_side(wanted)
        found.append(
            sql.SQL(
                "patient IN (SELECT pt.patient_id FROM split s JOIN split_patient sp ON sp.split_id = s.id "
                "JOIN patient pt ON pt.id = sp.patient_id WHERE s.name = %(split)s AND {}) "
                "AND sample_id NOT IN (SELECT sample_id FROM split_leaks WHERE split = %(split)s)"
            ).format(here)
        )
        parameters |= {"split": wanted.split, **parameters_of_side}
    return found, parameters


def samples(origins: Sequence[str], readers: Sequence[str] | None = None) -> sql.Composable:
    """Return what stands after FROM for one label an image and structure: the view ``sample``, or the same of other origins or readers.

    The view prefers what was drawn, and of two derived labels or readers shows one. Asked for a certain one, it must not be the other.
    """
    if set(origins) == set(DRAWN) and readers is None:
        return sql.SQL("sample")
    return sql.SQL(
        "(SELECT DISTINCT ON (sample_id, structure_id) * FROM annotation_all "
        "WHERE current AND pairing_state = 'accepted' AND origin = ANY(%(origins)s) {}"
        "ORDER BY sample_id, structure_id, origin IN ('interpolated', 'proposed'), reader_preference, annotation_id) AS sample"
    ).format(sql.SQL("" if readers is None else "AND reader = ANY(%(readers)s) "))


def checked(conn: psycopg.Connection[Any], where: str | None, view: str, *, named: str = "--where") -> list[sql.Composable]:
    """Return a user's condition as SQL, an empty list for None.

    It is one boolean expression: between brackets and between CASE and END it must parse both times, each time as a prepared statement,
    which is one statement. Text that closes a bracket to say more fails in one of them.

    Args:
        named: What to call it in a message.

    Raises:
        UsageError: If it is none.
    """
    if where is None:
        return []
    text = where.replace("%", "%%")  # which psycopg would take for a parameter
    for before, after in (("(", "\n)"), ("CASE WHEN ", "\nTHEN true END")):
        try:
            query = sql.SQL("SELECT 1 FROM {} WHERE {} LIMIT 0").format(sql.Identifier(view), _text(before + text + after))
            # A prepared statement is one statement: the extended protocol refuses a second.
            conn.execute(query, {}, prepare=True)
        except psycopg.Error as error:
            conn.rollback()
            reason = (error.diag.message_primary or str(error)).splitlines()[0]
            raise UsageError(f"{named}: {reason}; it must be an SQL condition over the view {view}") from error
    conn.rollback()
    return [_text("(" + text + "\n)")]  # the newline ends a comment that the text may end with


def _text(text: Any) -> sql.SQL:
    # The only place where text from a user becomes SQL; see `checked`.
    return sql.SQL(text)


def unknown_structure(conn: psycopg.Connection[Any], names: Sequence[str]) -> str | None:
    """Return in words the first of these names that no structure of the catalog has, and which there are; None if it has all."""
    there = [name for (name,) in conn.execute('SELECT name FROM structure ORDER BY name COLLATE "C"')]
    for name in names:
        if name not in there:
            return f"{name!r}: there is none of this name; there are {', '.join(there) or 'none'}"
    return None
