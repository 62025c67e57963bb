"""Flags that people raise and close, and consent withdrawn: what each takes out of feeding, and which runs had seen it before.

A flag that revokes acts at once, on live and frozen streams, and on what is ingested later: the view `revoked_image` and the
triggers on table `flag` see to that. This page writes the rows and says what follows from them; who, when and why goes into the table
`event` by itself.

No message repeats a PatientID or a UID: they identify, and messages end in logs. `flaglist.listed` returns them, to whoever asks for the
list.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any

import psycopg
from psycopg import sql
from psycopg.rows import class_row, dict_row

from catalog.database import Database, explain
from catalog.errors import CatalogError, UsageError

WITHDRAWN = "PATIENT-WITHDRAWN"
PROGRAMS = ("ingest", "measure", "loaderd", "qa")  # these close what they raised by themselves: no person may sign so

# How a subject is named: its table, and the column that holds the name. The flag's own column is the table's name and _id.
NAMED_BY = {
    "sample": ("image", "id"),
    "file": ("file", "id"),
    "annotation": ("annotation", "id"),
    "pairing": ("pairing", "id"),
    "series": ("series", "series_instance_uid"),
    "study": ("study", "study_instance_uid"),
    "patient": ("patient", "patient_id"),
}

# The images of subjects, as the view revoked_image has them.
IMAGES = {
    "sample": "SELECT id FROM image WHERE id = ANY(%(ids)s)",
    "file": "SELECT image_id FROM location WHERE file_id = ANY(%(ids)s)",
    "annotation": "SELECT image_id FROM pairing WHERE annotation_id = ANY(%(ids)s)",
    "pairing": "SELECT image_id FROM pairing WHERE id = ANY(%(ids)s)",
    "series": "SELECT i.id FROM instance n JOIN image i ON i.instance_id = n.id WHERE n.series_id = ANY(%(ids)s)",
    "study": "SELECT i.id FROM series se JOIN instance n ON n.series_id = se.id JOIN image i ON i.instance_id = n.id "
    "WHERE se.study_id = ANY(%(ids)s)",
    "patient": "SELECT i.id FROM study st JOIN series se ON se.study_id = st.id JOIN instance n ON n.series_id = se.id "
    "JOIN image i ON i.instance_id = n.id WHERE st.patient_id = ANY(%(ids)s)",
}

# By patient first: of pruned epochs nothing else is known, and a patient is found by an index.
SEEN = """
SELECT run, stream, stream_name, array_agg(DISTINCT epoch ORDER BY epoch) AS epochs, count(DISTINCT sample_id) AS samples,
       count(sample_id) AS deliveries, min(at) AS first, max(at) AS last, coalesce(models, '{}') AS models,
       coalesce(array_agg(DISTINCT epoch ORDER BY epoch) FILTER (WHERE sample_id IS NULL), '{}') AS pruned
FROM sample_history
WHERE patient = ANY(ARRAY(
    SELECT pt.patient_id FROM image i JOIN instance n ON n.id = i.instance_id JOIN series se ON se.id = n.series_id
    JOIN study st ON st.id = se.study_id JOIN patient pt ON pt.id = st.patient_id WHERE i.id = ANY(%(images)s)))
  AND (sample_id IS NULL OR sample_id = ANY(%(images)s))
GROUP BY run, stream, stream_name, models ORDER BY min(at), run, stream
"""

ANNOTATIONS = """
SELECT count(DISTINCT a.id) FROM pairing p JOIN annotation a ON a.id = p.annotation_id
WHERE p.image_id = ANY(%(images)s) AND p.state = 'accepted' AND a.current
"""


class Severity(StrEnum):
    """How bad a finding is; open errors keep what they speak of out of feeding."""

    ERROR = "error"
    WARNING = "warning"
    INFO = "info"


@dataclass(frozen=True, slots=True)
class Subject:
    """What a flag is on. One UID may be several rows (under several patients): all of them are meant."""

    kind: str
    ids: list[int]


@dataclass(frozen=True, slots=True)
class Seen:
    """One run on one stream that was given some of it."""

    run: str
    stream: int
    stream_name: str | None
    epochs: list[int]
    samples: int  # different ones; not those of pruned epochs, of which only patients are known
    deliveries: int
    first: datetime
    last: datetime
    models: list[str]  # sha256, as noted of the run
    pruned: list[int]  # epochs


@dataclass(slots=True)
class Flag:
    """An open flag that is there now, or in a dry run would be."""

    id: int | None
    severity: str
    revokes: bool
    raised_by: str
    raised_at: datetime | None
    change: str | None = None  # what was done: raised, made to revoke


@dataclass(slots=True)
class Added:
    """What adding a flag did, and what it means."""

    flags: list[Flag]  # one a row of the subject
    images: int
    annotations: int
    seen: list[Seen] = field(default_factory=list)  # only if it revokes


@dataclass(slots=True)
class Closed:
    """A flag that is closed now; `changed` is False if it was before."""

    id: int
    rule: str
    revoked: bool
    state: str
    closed_by: str
    closed_at: datetime
    changed: bool
    freed: int = 0  # images that it alone had revoked
    held: int = 0  # images of it that other flags revoke still


@dataclass(frozen=True, slots=True)
class Changed:
    """A flag that is open again, or somebody's; `changed` is False if it was so before."""

    id: int
    rule: str
    was: str  # its state, or whose it was
    changed: bool
    revoked: int = 0  # images that are fed no more


def os_user() -> str:
    """Return the name of the user who runs this process; not what the environment says it is."""
    try:
        import pwd

        return pwd.getpwuid(os.geteuid()).pw_name
    except ImportError:
        return getpass.getuser()
    except KeyError:
        return f"uid {os.geteuid()}"


def add(
    database: Database,
    subject: str,
    *,
    rule: str,
    detail: str,
    severity: Severity = Severity.ERROR,
    revoke: bool = False,
    actor: str | None = None,
    dry_run: bool = False,
) -> Added:
    """Raise a flag on `subject` (KIND:ID), unless it is open already; an open one is made to revoke if that is asked for.

    Raises:
        UsageError: If an argument cannot be right.
        CatalogError: If there is no such subject.
    """
    if not re.fullmatch(r"[A-Z][A-Z0-9]*(-[A-Z0-9]+)*", rule):
        raise UsageError("--rule: is a short code in capitals, digits and hyphens, such as BAD-CONTOUR")
    if revoke and severity != Severity.ERROR:
        raise UsageError("--revoke: needs --severity error, since what is revoked is fed no more")
    detail, actor = written(detail, "-m"), person(actor)
    kind, colon, name = subject.partition(":")
    if kind not in NAMED_BY or not colon or not name:
        raise UsageError(f"SUBJECT: is KIND:ID, such as sample:17; KIND is one of {', '.join(NAMED_BY)}")
    if NAMED_BY[kind][1] == "id" and not re.fullmatch(r"[0-9]{1,18}", name):
        raise UsageError(f"SUBJECT: a {kind} is named by its number, such as {kind}:17")
    with transaction(database, dry_run=dry_run) as conn:
        return _add(conn, _find(conn, kind, name), rule, detail, severity, revoke, actor, dry_run)


def withdraw(database: Database, patient: str, *, reason: str = "", actor: str | None = None, dry_run: bool = False) -> Added:
    """Note that a patient's consent is withdrawn: nothing of the patient is fed any more, nor what is ingested later.

    Raises:
        CatalogError: If there is no such patient.
    """
    detail = "consent withdrawn" + (f": {written(reason, '--reason')}" if reason else "")
    actor = person(actor)
    with transaction(database, dry_run=dry_run) as conn:
        return _add(conn, _find(conn, "patient", patient), WITHDRAWN, detail, Severity.ERROR, True, actor, dry_run)


def reinstate(database: Database, patient: str, *, reason: str, actor: str | None = None, dry_run: bool = False) -> list[Closed]:
    """Close the flag that says that a patient's consent is withdrawn; returns nothing if there is none open.

    Raises:
        CatalogError: If there is no such patient.
    """
    reason, actor = written(reason, "--reason"), person(actor)
    with transaction(database, dry_run=dry_run) as conn:
        found = conn.execute(
            "SELECT id FROM flag WHERE state = 'open' AND rule = %s AND patient_id = ANY(%s)",
            [WITHDRAWN, _find(conn, "patient", patient).ids],
        )
        return [_close(conn, flag_id, "resolved", reason, actor) for (flag_id,) in found.fetchall()]


def close(
    database: Database, ids: Sequence[int], *, reason: str, false_positive: bool = False, actor: str | None = None, dry_run: bool = False
) -> list[Closed]:
    """Close flags, all or none; those that were closed before stay as they are.

    Raises:
        CatalogError: If one of them does not exist.
    """
    reason, actor = written(reason, "-m"), person(actor)
    state = "false_positive" if false_positive else "resolved"
    with transaction(database, dry_run=dry_run) as conn:
        # In one order, so that two who close the same ones do not wait for each other in a circle.
        return [_close(conn, flag_id, state, reason, actor) for flag_id in sorted(set(ids))]


def reopen(database: Database, ids: Sequence[int], *, reason: str, actor: str | None = None, dry_run: bool = False) -> list[Changed]:
    """Open closed flags again as they were, all or none; what revokes does so at once. Open ones stay as they are.

    Raises:
        CatalogError: If one of them does not exist, or another flag of the same rule is open on the same subject.
    """
    reason, actor = written(reason, "-m"), person(actor)
    with transaction(database, dry_run=dry_run) as conn:
        sign(conn, actor, reason)
        return [_reopen(conn, flag_id) for flag_id in sorted(set(ids))]


def assign(
    database: Database, ids: Sequence[int], *, to: str, reason: str, actor: str | None = None, dry_run: bool = False
) -> list[Changed]:
    """Say who looks after open flags, all or none; an empty name: nobody.

    Raises:
        CatalogError: If one of them does not exist, or is closed.
    """
    to = written(to, "--to") if to else ""
    reason, actor = written(reason, "-m"), person(actor)
    with transaction(database, dry_run=dry_run) as conn:
        sign(conn, actor, reason)
        return [_assign(conn, flag_id, to) for flag_id in sorted(set(ids))]


def revoked(conn: psycopg.Connection[Any]) -> int:
    """Return how many images are revoked now."""
    return _count(conn, "SELECT count(*) FROM revoked_image", {})


def _add(
    conn: psycopg.Connection[Any], subject: Subject, rule: str, detail: str, severity: Severity, revoke: bool, actor: str, dry_run: bool
) -> Added:
    column = f"{NAMED_BY[subject.kind][0]}_id"
    if revoke and subject.kind == "file":
        _refuse_annotations(conn, subject.ids)
    sign(conn, actor, detail)
    flags = [_raise(conn, column, one, rule, detail, severity, revoke, actor, dry_run) for one in subject.ids]
    if not dry_run:
        conn.commit()  # a long history takes a while to read, and daemons must not feed on until then
    images = _images(conn, subject)
    added = Added(flags, len(images), _count(conn, ANNOTATIONS, {"images": images}))
    if any(flag.revokes for flag in flags):
        with conn.cursor(row_factory=class_row(Seen)) as cursor:
            added.seen = cursor.execute(SEEN, {"images": images}).fetchall()
    return added


def _raise(
    conn: psycopg.Connection[Any],
    column: str,
    subject_id: int,
    rule: str,
    detail: str,
    severity: Severity,
    revoke: bool,
    actor: str,
    dry_run: bool,
) -> Flag:
    on = sql.Identifier(column)
    while True:  # until nobody else raises or closes it in between
        with conn.cursor(row_factory=class_row(Flag)) as cursor:
            found = cursor.execute(
                sql.SQL(
                    "SELECT id, severity, revokes, raised_by, raised_at FROM flag WHERE state = 'open' AND rule = %s AND {} = %s"
                ).format(on),
                [rule, subject_id],
            ).fetchone()
        if found is not None and (found.revokes or not revoke):
            return found
        if found is not None:
            # What ingest or loaderd raised they also close: a revocation stands until a person closes it, so it is a person's.
            done = conn.execute(
                "UPDATE flag SET revokes = true, severity = 'error', "
                "detail = concat(detail, '; made to revoke by ', %s::text, ' at ', now()::timestamptz(0), ': ', %s::text), "
                "raised_by = CASE WHEN raised_by = ANY(%s) THEN %s ELSE raised_by END WHERE id = %s AND state = 'open' AND NOT revokes",
                [actor, detail, list(PROGRAMS), actor, found.id],
            )
            if done.rowcount:
                return Flag(found.id, Severity.ERROR, True, found.raised_by, found.raised_at, "made to revoke")
        elif dry_run:  # the number of an inserted row would be used up
            return Flag(None, severity, revoke, actor, None, "raised")
        else:
            row = conn.execute(
                sql.SQL(
                    "INSERT INTO flag (rule, severity, detail, revokes, raised_by, {}) VALUES (%s, %s, %s, %s, %s, %s) "
                    "ON CONFLICT DO NOTHING RETURNING id, raised_at"
                ).format(on),
                [rule, severity, detail, revoke, actor, subject_id],
            ).fetchone()
            if row is not None:
                return Flag(row[0], severity, revoke, actor, row[1], "raised")


def _close(conn: psycopg.Connection[Any], flag_id: int, state: str, reason: str, actor: str) -> Closed:
    row = _locked(conn, flag_id, "closed")
    if row["state"] != "open":
        return Closed(flag_id, row["rule"], row["revokes"], row["state"], row["closed_by"], row["closed_at"], changed=False)
    at = conn.execute(
        "UPDATE flag SET state = %s, closed_by = %s, closed_at = now(), reason = %s WHERE id = %s RETURNING closed_at",
        [state, actor, reason, flag_id],
    ).fetchone()
    assert at is not None
    closed = Closed(flag_id, row["rule"], row["revokes"], state, actor, at[0], changed=True)
    if closed.revoked:
        images = _images(conn, _subject(row))
        closed.held = _count(conn, "SELECT count(*) FROM revoked_image WHERE sample_id = ANY(%(images)s)", {"images": images})
        closed.freed = len(images) - closed.held
    return closed


def _reopen(conn: psycopg.Connection[Any], flag_id: int) -> Changed:
    row = _locked(conn, flag_id, "opened")
    if row["state"] == "open":
        return Changed(flag_id, row["rule"], "open", changed=False)
    subject = _subject(row)
    column = f"{NAMED_BY[subject.kind][0]}_id"
    other = conn.execute(
        sql.SQL("SELECT id FROM flag WHERE state = 'open' AND rule = %s AND {} = %s").format(sql.Identifier(column)),
        [row["rule"], row[column]],
    ).fetchone()
    if other is not None:
        raise CatalogError(f"flag {flag_id}: flag {other[0]} says the same of the same {subject.kind} and is open, so nothing was opened")
    try:
        conn.execute("UPDATE flag SET state = 'open', closed_by = NULL, closed_at = NULL, reason = NULL WHERE id = %s", [flag_id])
    except psycopg.errors.UniqueViolation:
        raise CatalogError(f"flag {flag_id}: one that says the same was raised at this moment, so nothing was opened") from None
    return Changed(flag_id, row["rule"], row["state"], changed=True, revoked=len(_images(conn, subject)) if row["revokes"] else 0)


def _assign(conn: psycopg.Connection[Any], flag_id: int, to: str) -> Changed:
    row = _locked(conn, flag_id, "assigned")
    if row["state"] != "open":
        raise CatalogError(f"flag {flag_id}: is closed ({row['state']}), so nothing was assigned; `catalog flag reopen` opens it again")
    was = row["assigned_to"] or ""
    if was != to:
        conn.execute("UPDATE flag SET assigned_to = %s WHERE id = %s", [to or None, flag_id])
    return Changed(flag_id, row["rule"], was, changed=was != to)


def _locked(conn: psycopg.Connection[Any], flag_id: int, what: str) -> dict[str, Any]:
    with conn.cursor(row_factory=dict_row) as cursor:
        row = cursor.execute("SELECT * FROM flag WHERE id = %s FOR UPDATE", [flag_id]).fetchone()
    if row is None:
        raise UsageError(f"flag {flag_id}: there is none, so nothing was {what}; see `catalog flag list --state all`")
    return row


def _subject(row: dict[str, Any]) -> Subject:
    kind = next(kind for kind, (table, _) in NAMED_BY.items() if row[f"{table}_id"] is not None)
    return Subject(kind, [row[f"{NAMED_BY[kind][0]}_id"]])


def _images(conn: psycopg.Connection[Any], subject: Subject) -> list[int]:
    return [image for (image,) in conn.execute(f"SELECT DISTINCT * FROM ({IMAGES[subject.kind]}) AS o", {"ids": subject.ids}).fetchall()]  # noqa: S608


def _refuse_annotations(conn: psycopg.Connection[Any], file_ids: Sequence[int]) -> None:
    row = conn.execute(
        "SELECT min(id) FROM annotation WHERE current AND file_id IN (SELECT id FROM file WHERE id = ANY(%s) AND kind = 'annotation')",
        [list(file_ids)],
    ).fetchone()
    if row is not None and row[0] is not None:
        raise CatalogError(
            f"file {file_ids[0]}: holds no image but an annotation, so --revoke would keep nothing out; flag annotation:{row[0]}"
        )


def _find(conn: psycopg.Connection[Any], kind: str, name: str) -> Subject:
    table, column = NAMED_BY[kind]
    number = column == "id"
    query = sql.SQL("SELECT id FROM {} WHERE {} = %s ORDER BY id").format(sql.Identifier(table), sql.Identifier(column))
    rows = conn.execute(query, [int(name) if number else name]).fetchall() if is_text(name) else []
    if not rows:
        raise CatalogError(
            f"{f'{kind} {name}: ' if number else ''}no such {kind} in the catalog, so nothing was done; "
            f"the views image_all and annotation_all have what there is"
        )
    return Subject(kind, [one for (one,) in rows])


def sign(conn: psycopg.Connection[Any], actor: str, reason: str) -> None:
    """Say, for the events of this transaction, who decides and why, where the rows do not."""
    conn.execute("SELECT set_config('catalog.actor', %s, true), set_config('catalog.reason', %s, true)", [actor, reason])


def person(actor: str | None) -> str:
    """Return who decides, the OS user by default. Raises UsageError for what is no person."""
    actor = written(os_user() if actor is None else actor, "--actor")
    if actor in PROGRAMS:
        raise UsageError(f"--actor: {actor} is the program itself; say who you are")
    return actor


def written(text: str, option: str) -> str:
    """Return text without space around it. Raises UsageError if there is none, or it cannot be stored."""
    text = text.strip()
    if not text or not is_text(text):
        raise UsageError(f"{option}: is {'not UTF-8' if text else 'empty'}, and somebody will want to read it; write it out")
    return text


def is_text(text: str) -> bool:
    """Say whether it is UTF-8: other bytes of the command line come as lone surrogates, which PostgreSQL does not take."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _count(conn: psycopg.Connection[Any], query: str, parameters: dict[str, Any]) -> int:
    row = conn.execute(query.encode(), parameters).fetchone()
    assert row is not None
    return int(row[0])


@contextlib.contextmanager
def transaction(database: Database, *, dry_run: bool = False) -> Iterator[psycopg.Connection[Any]]:
    """Give a connection of which all is kept or, after an error or in a dry run, nothing."""
    try:
        with database.connect(application_name="catalog flag") as conn:
            yield conn
            if dry_run:
                conn.rollback()
    except psycopg.Error as error:
        raise explain(error, database) from error
