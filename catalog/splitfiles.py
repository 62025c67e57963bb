"""A split that somebody else made, as a CSV: read and matched with the catalog's patients, as a whole or not at all.

Messages name lines, not patients: a line may hold a PatientID.
"""

from __future__ import annotations

import csv
import io
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from catalog.dealing import HELD_OUT, Patient
from catalog.errors import CatalogError, UsageError
from catalog.selection import NAME

MOST_SAID = 20  # lines that one message names


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the file."""

    at: int
    patient: str
    part: str
    fold: int | None


def read(path: Path) -> list[Row]:
    """Return the rows of a CSV with the columns patient, part and, if it has folds, fold (from 0).

    Raises:
        UsageError: If it cannot be read, or is no such table; with the line.
    """
    try:
        data = path.read_bytes()
        content = data.decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; FILE is a CSV with the columns patient, part and, if it has folds, fold") from None
    except UnicodeDecodeError as error:
        at = data.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{path}: line {at}: is not UTF-8; save the table as UTF-8") from None
    if "\0" in content:
        at = content.count("\n", 0, content.index("\0")) + 1
        raise UsageError(f"{path}: line {at}: holds a NUL byte, so it is no text; save the table as UTF-8")
    reader = csv.reader(io.StringIO(content, newline=""), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        if sorted(header) not in (["part", "patient"], ["fold", "part", "patient"]):
            raise UsageError(f"{path}: line 1: names the columns, which are patient, part and, if it has folds, fold, and no others")
        rows = [_line(path, reader.line_num, header, fields) for fields in reader if any(map(str.strip, fields))]
    except csv.Error as error:
        raise UsageError(f"{path}: line {reader.line_num}: {error}; save the table as CSV") from None
    if not rows:
        raise UsageError(f"{path}: names no patient; a row is a patient and a part")
    folds = {row.fold for row in rows if row.fold is not None}
    if folds and folds != set(range(max(2, len(folds)))):
        raise UsageError(f"{path}: folds count from 0, there are two or more, and each has a patient; here are {sorted(folds)[:MOST_SAID]}")
    for row in rows:
        if folds and (row.fold is None) != (row.part == HELD_OUT):
            raise UsageError(f"{path}: line {row.at}: who is in {HELD_OUT} has no fold, and everybody else one")
    return rows


def _line(path: Path, at: int, header: list[str], fields: list[str]) -> Row:
    if len(fields) != len(header):
        raise UsageError(f"{path}: line {at}: has {len(fields)} fields where line 1 has {len(header)}")
    row = {name: value.strip() for name, value in zip(header, fields, strict=True)}
    if not row["patient"]:
        raise UsageError(f"{path}: line {at}: names no patient")
    if not re.fullmatch(NAME, row["part"]):
        raise UsageError(f"{path}: line {at}: part is text without / and :")
    fold = row.get("fold", "")
    if not re.fullmatch(r"[0-9]{0,4}", fold, re.ASCII):
        raise UsageError(f"{path}: line {at}: fold is a whole number from 0, or empty")
    return Row(at, row["patient"], row["part"], int(fold) if fold else None)


def place(
    name: str, rows: Iterable[Row], patients: Sequence[Patient], others: Iterable[tuple[int, str]], twins: Iterable[tuple[int, int]]
) -> int:
    """Put patients where the rows say, which changes them; returns how many.

    Args:
        name: The file's, for the message.
        others: ``patient.id`` and the name that the annotations' source has for the patient, for rows that name no PatientID.
        twins: Pairs of ``patient.id`` that share pixels.

    Raises:
        CatalogError: If a row's patient is not there or has a row already, or two that share pixels lie on two sides; with the lines.
    """
    known = {one.id: one for one in patients}
    ids = {one.name: [one.id] for one in patients}
    named: dict[str, list[int]] = defaultdict(list)
    for patient, other in others:
        named[other].append(patient)
    lines: dict[int, int] = {}
    wrong: list[tuple[int, str]] = []
    for row in rows:
        found = ids.get(row.patient) or named.get(row.patient, [])
        if len(found) != 1:
            wrong.append((row.at, f"line {row.at} names {'several patients' if found else 'no patient'} of the catalog"))
        elif found[0] in lines:
            wrong.append((row.at, f"line {row.at} is the patient of line {lines[found[0]]}"))
        else:
            lines[found[0]] = row.at
            known[found[0]].part, known[found[0]].fold = row.part, row.fold
    for a, b in twins:
        if a in lines and b in lines and (known[a].part, known[a].fold) != (known[b].part, known[b].fold):
            first, second = sorted((lines[a], lines[b]))
            wrong.append((first, f"lines {first} and {second} share pixels, and lie on two sides"))
    if wrong:
        said = "; ".join(words for _, words in sorted(wrong)[:MOST_SAID])
        more = f"; and {len(wrong) - MOST_SAID} more" if len(wrong) > MOST_SAID else ""
        raise CatalogError(f"{name}: nothing was imported: {said}{more}; mend or leave out these lines, then import again")
    return len(lines)
