"""Splits: each patient on one side. Made by ratios, brought from a file, extended by who came since, checked, frozen.

Who comes where follows from the seed and the PatientIDs, not from the order of an ingest: `catalog.dealing.deal` has the rule. The
database refuses a patient twice, patients that share pixels on two sides, and changes of a frozen split, whoever writes the row.

No message holds a PatientID: patients are named by ``patient.id``, lines of a file by their number.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import psycopg
from psycopg.rows import class_row

from catalog.database import Database, explain
from catalog.dealing import HELD_OUT, UNNAMED, Patient, Tied, deal, together
from catalog.errors import CatalogError, UsageError
from catalog.flags import is_text, person, sign, transaction
from catalog.selection import NAME, checked
from catalog.splitfiles import place, read

SPLITS = "SELECT id, name, parts, ratios, folds, stratify, seed, actor, created_at, frozen_by, frozen_at FROM split"
PATIENTS = """
SELECT pt.id, pt.patient_id AS name, coalesce(c.images, 0) AS images, coalesce(c.annotated, 0) AS annotated, sp.part, sp.fold, sp.stratum
FROM patient pt LEFT JOIN split_patient sp ON (sp.split_id, sp.patient_id) = (%s::bigint, pt.id)
LEFT JOIN (
    SELECT st.patient_id, count(*) AS images, count(d.image_id) AS annotated
    FROM image i JOIN instance n ON n.id = i.instance_id JOIN series se ON se.id = n.series_id JOIN study st ON st.id = se.study_id
    LEFT JOIN (SELECT DISTINCT p.image_id FROM pairing p JOIN annotation a ON a.id = p.annotation_id
               WHERE p.state = 'accepted' AND a.current) d ON d.image_id = i.id
    GROUP BY st.patient_id
) c ON c.patient_id = pt.id
"""
TWINS = "SELECT DISTINCT least(patient_id, other_id), greatest(patient_id, other_id) FROM pixel_twin"

# Of images that can be read: who shares pixels with whom is known by hashes alone; blank images are told by their measures.
UNKNOWN = """
SELECT count(*) FILTER (WHERE i.pixel_hash IS NULL),
       count(*) FILTER (WHERE i.pixel_hash IS NOT NULL AND m.image_id IS NULL)
FROM image i JOIN location l ON l.image_id = i.id AND l.preferred JOIN file f ON f.id = l.file_id AND f.state = 'present'
LEFT JOIN measure m ON m.image_id = i.id
"""

# The most frequent value a patient; of equally frequent ones the first in the order of their bytes.
STRATA = """
SELECT DISTINCT ON (patient) patient, value
FROM (SELECT patient, ({expression})::text COLLATE "C" AS value, count(*) AS n FROM sample GROUP BY 1, 2) AS counted
WHERE value IS NOT NULL ORDER BY patient, n DESC, value
"""

LEAKS = "SELECT sample_id, part, fold, other_sample_id, other_part, other_fold FROM split_leaks WHERE split = %s"


@dataclass(slots=True)
class Split:
    """What a split was asked to be."""

    id: int | None  # None: a dry run
    name: str
    parts: list[str]
    ratios: list[float] | None  # share of the patients a part; None: imported
    folds: int | None
    stratify: str | None
    seed: int | None
    actor: str
    created_at: datetime | None = None
    frozen_by: str | None = None
    frozen_at: datetime | None = None


@dataclass(slots=True)
class Share:
    """What lies in a part or in a fold."""

    name: str
    patients: int
    share: float
    wanted: float | None  # None: imported
    images: int
    annotated: int


@dataclass(slots=True)
class Shown:
    """A split and what lies where."""

    split: Split
    patients: int  # that have a part
    without: int  # that have none
    parts: list[Share]
    folds: list[Share]
    strata: dict[str, dict[str, int]]  # value → part → patients; a patient without a value is in none


@dataclass(slots=True)
class Dealt:
    """What was given to whom; in a dry run, what would be."""

    shown: Shown
    added: int  # patients that got a part
    sharing: int = 0  # of these, those that share pixels with another one
    largest: int = 1  # patients of the largest group that had to go together
    tied: list[Tied] = field(default_factory=list)
    unhashed: int = 0  # images whose pixels were not hashed: who shares them is not known
    unmeasured: int = 0  # images that may be blank, which would tie nobody together


@dataclass(slots=True)
class Checked:
    """What is wrong with a split."""

    split: str
    leaks: list[dict[str, Any]]  # an image, its side, the other image of the same pixels and its side
    unhashed: int
    without: int
    tied: list[Tied]
    frozen: bool


def create(
    database: Database,
    name: str,
    *,
    ratios: Mapping[str, float] | None = None,
    folds: int | None = None,
    stratify: str | None = None,
    seed: int = 0,
    actor: str | None = None,
    dry_run: bool = False,
) -> Dealt:
    """Make a split of all patients that the catalog has.

    Args:
        ratios: Part → share of the patients; may be left out with `folds`: all are ``train``.
        folds: So many folds among all who are not in ``test``.
        stratify: A user's SQL expression over the view ``sample``: patients with the same most frequent value are a stratum, those
            without a sample are one, too. It runs under the login that cannot write.
        seed: Decides who comes where, with the PatientIDs.

    Raises:
        UsageError: If an argument cannot be right.
        CatalogError: If there is such a split already, or no patient.
    """
    actor = person(actor)
    if ratios is None and folds is None:
        raise UsageError("say --ratios, such as 70,15,15, or --folds")
    ratios = {UNNAMED[0]: 1.0} if ratios is None else ratios
    if folds is not None and list(ratios) == [HELD_OUT]:
        raise UsageError(f"--folds: nobody in {HELD_OUT} has a fold, and there is no other part")
    made = Split(None, _named(name), list(ratios), list(ratios.values()), folds, stratify, seed, actor)
    strata = _strata(database, stratify)
    with transaction(database, dry_run=dry_run) as conn:
        _refuse_taken(conn, name)
        patients = _patients(conn, None)
        if not patients:
            raise CatalogError("the catalog holds no patient, so there is nobody to split; see `catalog ingest`")
        return _deal(conn, made, patients, strata, actor, dry_run)


def extend(database: Database, name: str, *, actor: str | None = None, dry_run: bool = False) -> Dealt:
    """Give a part to the patients that came since; those who have one stay.

    Raises:
        UsageError: If there is no such split.
        CatalogError: If it is frozen, or was imported.
    """
    actor = person(actor)
    with transaction(database) as conn:
        found = _found(conn, name)
    strata = _strata(database, found.stratify)
    with transaction(database, dry_run=dry_run) as conn:
        found = _found(conn, name, lock=True)
        if found.frozen_at is not None:
            raise CatalogError(f"split {name!r}: was frozen by {found.frozen_by}, so nobody comes to it; make another one")
        if found.ratios is None:
            raise CatalogError(f"split {name!r}: was imported, so nobody knows which share goes where; import another with all patients")
        return _deal(conn, found, _patients(conn, found.id), strata, actor, dry_run)


def import_csv(database: Database, name: str, path: Path, *, actor: str | None = None, dry_run: bool = False) -> Dealt:
    """Take over a split from a CSV with the columns patient, part and, if it has folds, fold (from 0): as a whole or not at all.

    A patient is named by PatientID or, where no patient has that, by the name that the annotations' source has for it.

    Raises:
        UsageError: If the file cannot be read, or is no such table.
        CatalogError: If there is such a split already; a patient is not in the catalog or stands there twice; or patients that share pixels
            lie on two sides.
    """
    actor, name = person(actor), _named(name)
    rows = read(path)
    with transaction(database, dry_run=dry_run) as conn:
        _refuse_taken(conn, name)
        patients = _patients(conn, None)
        others = conn.execute("SELECT id, original_id FROM patient WHERE original_id IS NOT NULL ORDER BY id").fetchall()
        placed = place(path.name, rows, patients, others, conn.execute(TWINS).fetchall())
        order = {part: place for place, part in enumerate(UNNAMED)}
        parts = sorted(dict.fromkeys(row.part for row in rows), key=lambda part: order.get(part, len(order)))
        highest = max((row.fold for row in rows if row.fold is not None), default=None)
        made = Split(None, name, parts, None, None if highest is None else highest + 1, None, None, actor)
        done = Dealt(_shown(made, patients), placed, unhashed=_unknown(conn)[0])
        if not dry_run:
            _insert(conn, made, [one for one in patients if one.part], actor)
    return done


def freeze(database: Database, name: str, *, actor: str | None = None, dry_run: bool = False) -> tuple[Split, bool]:
    """Freeze a split for good: nobody comes to it, moves or goes but who is erased. Returns it, and False if it was frozen already.

    Raises:
        UsageError: If there is no such split.
    """
    actor = person(actor)
    with transaction(database, dry_run=dry_run) as conn:
        found = _found(conn, name, lock=True)
        changed = found.frozen_at is None
        if changed:
            conn.execute("UPDATE split SET frozen_by = %s, frozen_at = now() WHERE id = %s", [actor, found.id])
            found = _found(conn, name)
    return found, changed


def listed(database: Database) -> list[tuple[Split, int]]:
    """Return each split with how many patients it has, in order of names."""
    with transaction(database) as conn:
        counts = dict(conn.execute("SELECT s.name, count(*) FROM split s JOIN split_patient p ON p.split_id = s.id GROUP BY 1").fetchall())
        with conn.cursor(row_factory=class_row(Split)) as cursor:
            return [(one, counts.get(one.name, 0)) for one in cursor.execute(SPLITS + " ORDER BY name")]


def show(database: Database, name: str) -> Shown:
    """Return a split and what lies where. Raises UsageError if there is none."""
    with transaction(database) as conn:
        found = _found(conn, name)
        return _shown(found, _patients(conn, found.id))


def check(database: Database, name: str | None = None) -> list[Checked]:
    """Return what is wrong with a split, or with each.

    Raises:
        UsageError: If there is no such split.
    """
    with transaction(database) as conn:
        names = [name] if name is not None else [one for (one,) in conn.execute("SELECT name FROM split ORDER BY name")]
        unhashed, _ = _unknown(conn)
        twins = conn.execute(TWINS).fetchall()
        done = []
        for one in names:
            found = _found(conn, one)
            patients = _patients(conn, found.id)
            cursor = conn.execute(LEAKS, [one])
            leaks = [
                dict(zip(("sample_id", "part", "fold", "other_sample_id", "other_part", "other_fold"), row, strict=True)) for row in cursor
            ]
            without = sum(patient.part is None for patient in patients)
            done.append(Checked(one, leaks, unhashed, without, together(patients, twins)[1], found.frozen_at is not None))
    return done


def _deal(
    conn: psycopg.Connection[Any], made: Split, patients: list[Patient], strata: Mapping[str, str], actor: str, dry_run: bool
) -> Dealt:
    new = [one for one in patients if one.part is None]
    for one in new:
        one.stratum = strata.get(one.name)
    twins = conn.execute(TWINS).fetchall()
    tied = deal(patients, twins, made.parts, made.ratios or [], folds=made.folds, seed=made.seed or 0)
    new = [one for one in new if one.part is not None]
    ids = {one.id for one in new}
    groups, _ = together([Patient(one.id, one.name) for one in patients], twins)
    shared = [group for group, _ in groups if len(group) > 1 and any(one.id in ids for one in group)]
    unhashed, unmeasured = _unknown(conn)
    done = Dealt(_shown(made, patients), len(new), tied=tied, unhashed=unhashed, unmeasured=unmeasured)
    done.sharing, done.largest = sum(one.id in ids for group in shared for one in group), max(map(len, shared), default=1)
    if not dry_run:
        _insert(conn, made, new, actor)
    return done


def _insert(conn: psycopg.Connection[Any], made: Split, patients: Sequence[Patient], actor: str) -> None:
    sign(conn, actor, "split made" if made.id is None else "split extended")
    if made.id is None:
        row = conn.execute(
            "INSERT INTO split (name, parts, ratios, folds, stratify, seed, actor) VALUES (%s, %s, %s, %s, %s, %s, %s) "
            "ON CONFLICT DO NOTHING RETURNING id, created_at",
            [made.name, made.parts, made.ratios, made.folds, made.stratify, made.seed, made.actor],
        ).fetchone()
        if row is None:
            raise CatalogError(f"split {made.name!r}: somebody made one of this name at this moment; see `catalog split show`")
        made.id, made.created_at = row
    if patients:  # nobody is no change, of which daemons must hear
        with conn.cursor().copy("COPY split_patient (split_id, patient_id, part, fold, stratum) FROM STDIN") as copy:
            for one in patients:
                copy.write_row((made.id, one.id, one.part, one.fold, one.stratum))


def _found(conn: psycopg.Connection[Any], name: str, *, lock: bool = False) -> Split:
    with conn.cursor(row_factory=class_row(Split)) as cursor:
        query = SPLITS + " WHERE name = %s" + (" FOR NO KEY UPDATE" if lock else "")
        found = cursor.execute(query, [name]).fetchone() if is_text(name) else None
    if found is None:
        raise UsageError(f"split {name!r}: there is none of this name, so nothing was done; see `catalog split list`")
    return found


def _refuse_taken(conn: psycopg.Connection[Any], name: str) -> None:
    if conn.execute("SELECT FROM split WHERE name = %s", [name]).fetchone() is not None:
        raise CatalogError(f"split {name!r}: there is one of this name, so nothing was done; see `catalog split show` and `extend`")


def _named(name: str) -> str:
    if not is_text(name) or not re.fullmatch(NAME, name):
        raise UsageError("NAME: is text without / and : and without space around it, since Feed(split='NAME/train') names it so")
    return name


def _patients(conn: psycopg.Connection[Any], split_id: int | None) -> list[Patient]:
    with conn.cursor(row_factory=class_row(Patient)) as cursor:
        return cursor.execute(PATIENTS, [split_id]).fetchall()


def _unknown(conn: psycopg.Connection[Any]) -> tuple[int, int]:
    row = conn.execute(UNKNOWN).fetchone()
    assert row is not None
    return row[0], row[1]


def _shown(split: Split, patients: Sequence[Patient]) -> Shown:
    inside = [one for one in patients if one.part is not None]

    def share(name: str, members: Sequence[Patient], of: int, wanted: float | None) -> Share:
        images, annotated = sum(one.images for one in members), sum(one.annotated for one in members)
        return Share(name, len(members), round(len(members) / of, 4) if of else 0.0, wanted, images, annotated)

    ratios: Sequence[float | None] = split.ratios or [None] * len(split.parts)
    parts = [
        share(part, [one for one in inside if one.part == part], len(inside), ratio)
        for part, ratio in zip(split.parts, ratios, strict=True)
    ]
    folded = [one for one in inside if one.fold is not None]
    wanted = None if split.ratios is None or split.folds is None else 1 / split.folds
    folds = [share(str(fold), [one for one in folded if one.fold == fold], len(folded), wanted) for fold in range(split.folds or 0)]
    strata: dict[str, dict[str, int]] = {}
    for value in sorted({one.stratum for one in inside if one.stratum is not None}):
        counts = Counter(one.part for one in inside if one.stratum == value)
        strata[value] = {part: counts[part] for part in split.parts}
    return Shown(split, len(inside), len(patients) - len(inside), parts, folds, strata)


def _strata(database: Database, expression: str | None) -> dict[str, str]:
    """Return PatientID → the most frequent value of a user's expression over the patient's samples."""
    if expression is None:
        return {}
    if not is_text(expression):
        raise UsageError("--stratify: is not UTF-8")
    with database.read_only() as conn:
        try:
            # True whatever it is, if it is one: no WHERE takes an aggregate, nor several expressions.
            checked(conn, f"{expression}\nIS NULL OR true", "sample", named="--stratify")
        except UsageError as error:
            raise UsageError(f"{str(error).rpartition(';')[0]}; it must be an SQL expression over the view sample") from error
        try:
            query = STRATA.replace("{expression}", expression.replace("%", "%%") + "\n")
            return dict(conn.execute(query.encode(), {}, prepare=True).fetchall())
        except (psycopg.OperationalError, psycopg.errors.InsufficientPrivilege) as error:
            raise explain(error, database) from error
        except psycopg.Error as error:
            raise UsageError(f"--stratify: {(error.diag.message_primary or str(error)).splitlines()[0]}") from error
