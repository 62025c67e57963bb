"""Which flags there are, and what became of each: the table of flags, and the events that its triggers wrote."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

import psycopg
from psycopg.rows import dict_row

from catalog.database import Database
from catalog.errors import UsageError
from catalog.flags import Severity, transaction

LISTED = """
SELECT f.id, f.rule, f.severity, f.state, f.revokes,
       coalesce('sample:' || f.image_id, 'file:' || f.file_id, 'annotation:' || f.annotation_id, 'pairing:' || f.pairing_id,
                'series:' || se.series_instance_uid, 'study:' || st.study_instance_uid, 'patient:' || pt.patient_id) AS subject,
       f.detail, f.value, f.assigned_to, f.raised_by, f.raised_at, f.closed_by, f.closed_at, f.reason
FROM flag f LEFT JOIN series se ON se.id = f.series_id LEFT JOIN study st ON st.id = f.study_id LEFT JOIN patient pt ON pt.id = f.patient_id
"""

# What the columns error_flags of the views `sample` and `image_all` count, and its warnings and infos.
OF_SAMPLE = """
f.id IN (
    WITH above AS (
        SELECT n.series_id, se.study_id, st.patient_id FROM image i JOIN instance n ON n.id = i.instance_id
        JOIN series se ON se.id = n.series_id JOIN study st ON st.id = se.study_id WHERE i.id = %(sample)s
    ), drawn AS (
        SELECT p.id AS pairing_id, a.id AS annotation_id FROM pairing p JOIN annotation a ON a.id = p.annotation_id
        WHERE p.image_id = %(sample)s AND p.state = 'accepted' AND a.current
    )
    SELECT id FROM flag WHERE image_id = %(sample)s
    UNION ALL SELECT g.id FROM flag g JOIN location l ON l.file_id = g.file_id WHERE l.image_id = %(sample)s
    UNION ALL SELECT g.id FROM flag g JOIN drawn d ON d.pairing_id = g.pairing_id
    UNION ALL SELECT g.id FROM flag g JOIN drawn d ON d.annotation_id = g.annotation_id
    UNION ALL SELECT g.id FROM flag g JOIN above a ON a.series_id = g.series_id
    UNION ALL SELECT g.id FROM flag g JOIN above a ON a.study_id = g.study_id
    UNION ALL SELECT g.id FROM flag g JOIN above a ON a.patient_id = g.patient_id)
"""


class State(StrEnum):
    """Which flags to list."""

    OPEN = "open"
    RESOLVED = "resolved"
    FALSE_POSITIVE = "false_positive"
    ALL = "all"


class Kind(StrEnum):
    """What a flag may be on."""

    SAMPLE = "sample"
    FILE = "file"
    ANNOTATION = "annotation"
    PAIRING = "pairing"
    SERIES = "series"
    STUDY = "study"
    PATIENT = "patient"


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that somebody did to a flag."""

    at: datetime
    actor: str
    action: str
    before: dict[str, Any]  # only what changed
    after: dict[str, Any]
    reason: str | None


def listed(
    database: Database,
    *,
    rule: str | None = None,
    state: State = State.OPEN,
    severity: Severity | None = None,
    subject: Kind | None = None,
    assigned_to: str | None = None,
    sample: int | None = None,
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """Return flags, oldest first.

    Args:
        rule: A shell pattern of codes, such as MASK-*.
        severity: Of this one alone.
        assigned_to: Whose they are; an empty name: nobody's.
        sample: Those on this image, its files, series, study and patient, and on what is drawn on it: its open errors keep it out.
        limit: At most so many, the first.

    Raises:
        CatalogError: If there is no such sample.
    """
    column = "image_id" if subject == Kind.SAMPLE else f"{subject}_id"
    conditions = {
        "f.state = %(state)s": state != State.ALL,
        "f.rule = ANY(%(rules)s)": rule is not None,
        "f.severity = %(severity)s": severity is not None,
        f"f.{column} IS NOT NULL": subject is not None,
        "coalesce(f.assigned_to, '') = %(assigned_to)s": assigned_to is not None,
        OF_SAMPLE: sample is not None,
    }
    query = f"{LISTED} WHERE {' AND '.join(['true', *(one for one, asked in conditions.items() if asked)])} ORDER BY f.id LIMIT %(limit)s"
    with transaction(database) as conn, conn.cursor(row_factory=dict_row) as cursor:
        if sample is not None and conn.execute("SELECT FROM image WHERE id = %s", [sample]).fetchone() is None:
            raise UsageError(f"sample {sample}: no such sample in the catalog; the view image_all has what there is")
        values = {
            "state": state, "severity": severity, "assigned_to": assigned_to, "sample": sample, "limit": limit,
            "rules": None if rule is None else _fitting(conn, rule.upper()),
        }  # fmt: skip
        return cursor.execute(query.encode(), values).fetchall()


def history(database: Database, flag_id: int) -> tuple[dict[str, Any], list[Event]]:
    """Return a flag and what became of it, oldest first.

    Raises:
        CatalogError: If there is none.
    """
    with transaction(database) as conn, conn.cursor(row_factory=dict_row) as cursor:
        query = LISTED.replace("f.detail,", "f.rule_version, f.detail,")
        row = cursor.execute(f"{query} WHERE f.id = %s".encode(), [flag_id]).fetchone()
        if row is None:
            raise UsageError(f"flag {flag_id}: there is none; see `catalog flag list --state all`")
        found = cursor.execute(
            "SELECT at, actor, action, coalesce(before, '{}') AS before, coalesce(after, '{}') AS after, reason FROM event "
            "WHERE subject = 'flag' AND subject_id = %s ORDER BY id",
            [flag_id],
        ).fetchall()
    events = []
    for one in found:
        before, after = one["before"], one["after"]
        same = {name for name in before.keys() & after.keys() if before[name] == after[name]}
        one["before"], one["after"] = ({name: value for name, value in of.items() if name not in same} for of in (before, after))
        events.append(Event(**one))
    return row, events


def _fitting(conn: psycopg.Connection[Any], pattern: str) -> list[str]:
    if not set(pattern) & set("*?["):
        return [pattern]
    return [code for (code,) in conn.execute("SELECT DISTINCT rule FROM flag") if fnmatch.fnmatchcase(code, pattern)]
