"""Runs rules, whose files are described in `rulefiles.py`, and keeps the flags that say what they found.

Rules run under the login that cannot write. What they find is compared with the flags that are there: a new finding is raised, one that
is no longer so closes itself, one that a person called a false positive stays closed until its value changes by more than 5 %. What is
as it was writes nothing, so that daemons do not plan again. A rule that is turned off here closes its flags the next time it is asked for.

With `changed`, rules of scope ``series`` look at those patients alone of whom something was touched since the last complete run (one with
all of our rules). A rule that was not in that run as it is now (another query, parameter, relation) looks at all, as does one of scope
``all``.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import psycopg
from psycopg import sql

from catalog import __version__, flags, overlaps, shapes
from catalog.database import Database, explain
from catalog.errors import CatalogError, UsageError
from catalog.rulefiles import SEVERITIES, Rule, Value, as_kind, bound, load

ACTOR = "qa"
LOCK = 0x5CA90A  # advisory: one run at a time
RULE_TIMEOUT_S = 600.0
SAME = 0.05  # share by which a false positive's value may change and still be that
OFF = "the rule is turned off here"
ROUNDING = 1e-9  # 0.735 is no more than 5 % over 0.7, whatever doubles say

# In which series a subject is; none for what belongs to no series, and for study and patient, which `scope` has by column.
SERIES = {
    "file": "SELECT n.series_id FROM location l JOIN image i ON i.id = l.image_id JOIN instance n ON n.id = i.instance_id "
    "WHERE l.file_id = g.file_id UNION ALL SELECT n.series_id FROM file f JOIN instance n ON n.id = f.instance_id WHERE f.id = g.file_id "
    "UNION ALL SELECT n.series_id FROM annotation a JOIN pairing p ON p.annotation_id = a.id JOIN image i ON i.id = p.image_id "
    "JOIN instance n ON n.id = i.instance_id WHERE a.file_id = g.file_id",
    "image": "SELECT n.series_id FROM image i JOIN instance n ON n.id = i.instance_id WHERE i.id = g.image_id",
    "annotation": "SELECT n.series_id FROM pairing p JOIN image i ON i.id = p.image_id JOIN instance n ON n.id = i.instance_id "
    "WHERE p.annotation_id = g.annotation_id",
    "pairing": "SELECT n.series_id FROM pairing p JOIN image i ON i.id = p.image_id JOIN instance n ON n.id = i.instance_id "
    "WHERE p.id = g.pairing_id",
    "series": "SELECT g.series_id",
    "study": "SELECT se.id FROM series se WHERE se.study_id = g.study_id",
    "patient": "SELECT se.id FROM series se JOIN study st ON st.id = se.study_id WHERE st.patient_id = g.patient_id",
}

# `seen`: what was touched before the rules began. Not those up to the highest number: one that is lower may be committed later.
WORK = """
CREATE TEMP TABLE found (subject_id bigint, value float8, detail text, severity text) ON COMMIT DELETE ROWS;
CREATE TEMP TABLE seen AS SELECT id, series_id FROM touched;
ANALYZE seen
"""

# Of a series that is gone nobody knows any more whose it was: all are looked at.
TOUCHED = """
WHERE st.patient_id IN (SELECT t.patient_id FROM seen c JOIN series s ON s.id = c.series_id JOIN study t ON t.id = s.study_id)
   OR EXISTS (SELECT FROM seen c WHERE NOT EXISTS (SELECT FROM series s WHERE s.id = c.series_id))
"""

COMPLETE = """
SELECT rule, digest FROM qa_result
WHERE qa_run_id = (SELECT id FROM qa_run WHERE complete ORDER BY id DESC LIMIT 1)
"""


@dataclass(slots=True)
class Result:
    """What a rule found."""

    rule: str
    title: str
    severity: str
    subject: str
    findings: int = 0
    raised: int = 0
    closed: int = 0
    open: dict[str, int] = field(default_factory=dict)  # severity → flags of it that are open now
    not_evaluated: int = 0
    why: str = ""
    seconds: float = 0.0


@dataclass(slots=True)
class Summary:
    """What a run did."""

    run: int | None  # None in a dry run
    changed_only: bool
    patients: int  # looked at; with changed by rules that need not look at all
    results: list[Result] = field(default_factory=list)
    open: dict[str, int] = field(default_factory=dict)  # severity → open flags of all rules asked for, those that ingest raises too
    seconds: float = 0.0


def chosen(rules: Mapping[str, Rule], pattern: str | None) -> list[Rule]:
    """Return the rules whose code fits a shell pattern. Raises UsageError if none does."""
    found = [rule for code, rule in sorted(rules.items()) if fnmatch.fnmatchcase(code, (pattern or "*").upper())]
    if not found:
        raise UsageError(f"--rule {pattern}: no rule's code fits it; `catalog qa rules` lists them")
    return found


def run(
    database: Database,
    *,
    rules: Iterable[Rule],
    changed: bool = False,
    actor: str | None = None,
    dry_run: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> Summary:
    """Evaluate rules and bring the flags up to what they find.

    Args:
        changed: Look at those patients alone of whom something changed since they were last looked at by all of our rules; rules
            that compare across patients look at all.
        progress: Called with (rules done, rules).
        say: Called with a line when another run is being waited for.

    Raises:
        CatalogError: If the database refuses, or a rule's query fails: what the rules before it found is kept.
    """
    begun = time.monotonic()
    asked = list(rules)
    actor = flags.person(actor)
    ours = {rule.code for rule in load().values() if rule.query and rule.scope == "series"}
    complete = not dry_run and ours <= {rule.code for rule in asked}
    try:
        with database.connect(application_name="catalog qa") as conn, database.read_only(timeout_s=RULE_TIMEOUT_S) as reading:
            if conn.execute("SELECT pg_try_advisory_lock(%s)", [LOCK]).fetchone() != (True,):
                say("another run of the rules is going on; waiting for it")
                conn.execute("SELECT pg_advisory_lock(%s)", [LOCK])
            if not dry_run:
                shapes.make_missing(conn)
            settings = _settings(conn)
            digests = _digests(conn, asked, settings)
            known = dict(conn.execute(COMPLETE).fetchall()) if changed else {}
            summary = Summary(None, changed, 0)
            if not dry_run:
                row = conn.execute(
                    "INSERT INTO qa_run (changed_only, actor, program_version) VALUES (%s, %s, %s) RETURNING id",
                    [changed, actor, __version__],
                ).fetchone()
                summary.run = None if row is None else int(row[0])
            for statement in WORK.split(";"):
                conn.execute(statement.encode())
            conn.commit()
            evaluated = [rule for rule in asked if rule.query]
            part = [rule for rule in evaluated if rule.scope == "series" and known.get(rule.code) == digests[rule.code]]
            whole = [rule for rule in evaluated if rule not in part]
            for some, condition in ((part, TOUCHED), (whole, "")):
                if not some:
                    continue
                patients = _fill_scope(conn, condition)
                if some is part or not part:
                    summary.patients = patients
                if not dry_run:
                    overlaps.bring_up(conn)
                    conn.commit()
                for rule in some:
                    progress(len(summary.results), len(evaluated))
                    summary.results.append(_evaluate(conn, reading, rule, settings, condition != "", summary.run, digests[rule.code]))
            progress(len(evaluated), len(evaluated))
            summary.results.sort(key=lambda one: one.rule)
            if summary.run is not None:
                if complete:
                    conn.execute("DELETE FROM touched WHERE id IN (SELECT id FROM seen)")
                conn.execute("UPDATE qa_run SET finished_at = now(), complete = %s WHERE id = %s", [complete, summary.run])
                conn.execute("ANALYZE flag")
            summary.open = _open(conn, [rule.code for rule in asked if rule.raised_by])
            for result in summary.results:
                for severity, count in result.open.items():
                    summary.open[severity] = summary.open.get(severity, 0) + count
            conn.commit()
    except psycopg.Error as error:
        raise explain(error, database) from error
    summary.seconds = round(time.monotonic() - begun, 3)
    return summary


def set_value(
    database: Database, rule: Rule, name: str, value: str | None, *, reason: str, actor: str | None = None, dry_run: bool = False
) -> str | None:
    """Set a rule's parameter, or ``enabled``, for this catalog; None gives the default back. Returns the value before.

    Raises:
        UsageError: If the rule has no such parameter, or the value is none of its type.
    """
    if rule.raised_by:
        raise UsageError(f"{rule.code}: {rule.raised_by} raises it by itself, so there is nothing to set; close its flags")
    if name != "enabled" and name not in rule.parameters:
        known = ", ".join((*rule.parameters, "enabled"))
        raise UsageError(f"{name}: {rule.code} has no such parameter; it has {known}")
    kind = bool if name == "enabled" else type(rule.parameters[name])
    reason, actor = flags.written(reason, "-m"), flags.person(actor)
    if value is not None and as_kind(flags.written(value, "VALUE"), kind) is None:
        raise UsageError(f"VALUE: {name} of {rule.code} is a {KINDS[kind]}")
    with flags.transaction(database, dry_run=dry_run) as conn:
        row = conn.execute("SELECT value FROM rule_setting WHERE rule = %s AND name = %s", [rule.code, name]).fetchone()
        before = None if row is None else str(row[0])
        if value == before:
            return before
        flags.sign(conn, actor, reason)
        if value is None:
            conn.execute("DELETE FROM rule_setting WHERE rule = %s AND name = %s", [rule.code, name])
        else:
            conn.execute(
                "INSERT INTO rule_setting (rule, name, value, actor, reason) VALUES (%s, %s, %s, %s, %s) "
                "ON CONFLICT (rule, name) DO UPDATE "
                "SET value = excluded.value, actor = excluded.actor, reason = excluded.reason, at = now()",
                [rule.code, name, value, actor, reason],
            )
        return before


KINDS = {float: "number, such as 2.5", bool: "yes or no: true or false", str: "word"}


def _settings(conn: psycopg.Connection[Any]) -> dict[tuple[str, str], str]:
    return {(rule, name): value for rule, name, value in conn.execute("SELECT rule, name, value FROM rule_setting")}


def _enabled(rule: Rule, settings: Mapping[tuple[str, str], str]) -> bool:
    return settings.get((rule.code, "enabled"), "true") != "false"


def _parameters(rule: Rule, settings: Mapping[tuple[str, str], str]) -> dict[str, Value]:
    """Return what a rule's parameters are here."""
    parameters = dict(rule.parameters)
    for name, default in rule.parameters.items():
        if (text := settings.get((rule.code, name))) is not None:
            if (value := as_kind(text, type(default))) is None:
                raise CatalogError(f"{rule.code}: {name} was set to what is no {KINDS[type(default)]}; set it anew (`catalog qa set`)")
            parameters[name] = value
    return parameters


def _digests(conn: psycopg.Connection[Any], rules: Iterable[Rule], settings: Mapping[tuple[str, str], str]) -> dict[str, bytes]:
    """Return what each rule is now: what of it decides on flags."""
    relations = conn.execute("SELECT inside, outside FROM relation ORDER BY 1, 2").fetchall()
    digests = {}
    for rule in rules:
        content = (rule.version, rule.severity, rule.subject, rule.query, rule.not_evaluated, _parameters(rule, settings))
        digests[rule.code] = hashlib.sha256(json.dumps([*content, _enabled(rule, settings), relations]).encode()).digest()
    return digests


def _fill_scope(conn: psycopg.Connection[Any], condition: str) -> int:
    """Write which series are looked at. Returns the number of patients."""
    conn.execute("TRUNCATE scope")
    conn.execute(
        f"INSERT INTO scope (series_id, study_id, patient_id) "  # noqa: S608
        f"SELECT se.id, st.id, st.patient_id FROM series se JOIN study st ON st.id = se.study_id {condition} ORDER BY se.id".encode()
    )
    conn.execute("ANALYZE scope")
    row = conn.execute("SELECT count(DISTINCT patient_id) FROM scope").fetchone()
    conn.commit()
    return 0 if row is None else int(row[0])


def _evaluate(
    conn: psycopg.Connection[Any],
    reading: psycopg.Connection[Any],
    rule: Rule,
    settings: Mapping[tuple[str, str], str],
    part: bool,
    run_id: int | None,
    digest: bytes,
) -> Result:
    begun = time.monotonic()
    result = Result(rule.code, rule.title, rule.severity, rule.subject)
    reason = "it is no longer so"
    if _enabled(rule, settings):
        best = _found(reading, rule, _parameters(rule, settings), result)
        with conn.cursor().copy("COPY found (subject_id, value, detail, severity) FROM STDIN") as copy:
            for row in best:
                copy.write_row(row)
    else:
        result.why = reason = OFF
    _settle(conn, rule, result, part, reason, write=run_id is not None)
    result.seconds = round(time.monotonic() - begun, 3)
    if run_id is not None:
        conn.execute(
            "INSERT INTO qa_result (qa_run_id, rule, rule_version, findings, raised, closed, not_evaluated, why, seconds, digest) "
            "VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s)",
            [run_id, rule.code, rule.version, result.findings, result.raised, result.closed, result.not_evaluated, result.why,
             result.seconds, digest],
        )  # fmt: skip
    conn.commit()
    return result


def _found(
    reading: psycopg.Connection[Any], rule: Rule, parameters: Mapping[str, Value], result: Result
) -> list[tuple[int, float | None, str, str]]:
    """Return what a rule's query finds, one a subject: of several the worst, and always the same one."""

    def wrong(what: str) -> CatalogError:
        return CatalogError(f"{rule.path}: {what}; no flag of {rule.code} was changed")

    left: list[tuple[Any, ...]] = []
    try:
        with reading.cursor() as cursor:
            cursor.execute(bound(rule.query), parameters, prepare=True)
            names = [column.name for column in cursor.description or ()]
            if names[:3] != ["subject_id", "value", "detail"] or names[3:] not in ([], ["severity"]):
                what = ", ".join(names) or "no columns"
                raise wrong(f"its query returns {what}; it must return subject_id, value, detail and perhaps severity")
            rows = cursor.fetchall()
            if rule.not_evaluated:
                left = cursor.execute(bound(rule.not_evaluated), parameters, prepare=True).fetchall()
        reading.rollback()
    except psycopg.Error as error:
        if reading.closed:
            raise
        said = error.diag.message_primary or (str(error).splitlines() or [type(error).__name__])[0]
        raise wrong(f"its query fails: {said}") from error
    best: dict[int, tuple[int, str, float, float | None]] = {}
    for subject_id, number, detail, *own in rows:
        severity = own[0] if own else rule.severity
        if severity not in SEVERITIES:
            raise wrong(f"its query returns another severity than {', '.join(SEVERITIES)}")
        if type(subject_id) is not int or not isinstance(detail, str) or not detail:
            raise wrong("its query returns a subject_id that is no whole number, or a detail that says nothing")
        try:
            value = None if number is None else float(number)
        except (TypeError, ValueError):
            raise wrong("its query returns a value that is no number") from None
        one = (SEVERITIES.index(severity), detail, value or 0.0, value)
        if subject_id not in best or one < best[subject_id]:
            best[subject_id] = one
    result.findings = len(best)
    for row in left:
        if len(row) != 2 or not isinstance(row[1], str | None) or not isinstance(row[0], int | Decimal | None):
            raise wrong("its query after `-- not evaluated` returns something else than a count and why")
        if row[0]:
            result.not_evaluated += int(row[0])
            result.why = f"{result.why}; {row[1] or ''}" if result.why else row[1] or ""
    return [(subject_id, value, detail, SEVERITIES[rank]) for subject_id, (rank, detail, _, value) in best.items()]


def _settle(conn: psycopg.Connection[Any], rule: Rule, result: Result, part: bool, reason: str, *, write: bool) -> None:
    """Bring the flags of a rule up to the table `found`. Each statement is asked for first: even one of no row notes a change."""
    conn.execute("ANALYZE found")
    column = sql.Identifier(f"{rule.subject}_id")
    names = {"rule": rule.code, "version": rule.version, "actor": ACTOR, "same": SAME + ROUNDING, "reason": reason}
    within = sql.SQL(
        f"AND (EXISTS (SELECT FROM ({SERIES[rule.subject]}) AS o (series_id) JOIN scope USING (series_id)) "
        f"OR NOT EXISTS ({SERIES[rule.subject]}))"
        if part
        else ""
    )
    gone = sql.SQL(
        "FROM flag g WHERE g.rule = %(rule)s AND g.state = 'open' AND g.raised_by = %(actor)s "
        "AND NOT EXISTS (SELECT FROM found f WHERE f.subject_id = g.{}) {}"
    ).format(column, within)
    # A file, an image … may have gone since the query began.
    new = sql.SQL(
        "FROM found f JOIN {table} o ON o.id = f.subject_id "
        "WHERE NOT EXISTS (SELECT FROM flag g WHERE g.rule = %(rule)s AND g.state = 'open' AND g.{column} = f.subject_id) "
        "AND NOT EXISTS (SELECT FROM flag g WHERE g.rule = %(rule)s AND g.state = 'false_positive' AND g.{column} = f.subject_id "
        "AND (g.value IS NOT DISTINCT FROM f.value OR abs(f.value - g.value) <= %(same)s * abs(g.value)))"
    ).format(table=sql.Identifier(rule.subject), column=column)
    other = sql.SQL(
        "found f WHERE g.rule = %(rule)s AND g.state = 'open' AND g.raised_by = %(actor)s AND g.{} = f.subject_id AND "
        "(g.value, g.detail, g.severity, g.rule_version) IS DISTINCT FROM (f.value, f.detail, f.severity, %(version)s)"
    ).format(column)

    def count(what: sql.Composable) -> int:
        row = conn.execute(sql.SQL("SELECT count(*) {}").format(what), names).fetchone()
        return 0 if row is None else int(row[0])

    result.closed, result.raised = count(gone), count(new)
    # Before anything is written, so that a dry run says the same.
    after = sql.SQL(
        "SELECT severity, count(*) FROM (SELECT coalesce(f.severity, g.severity) AS severity FROM flag g "
        "LEFT JOIN found f ON f.subject_id = g.{} AND g.raised_by = %(actor)s "
        "WHERE g.rule = %(rule)s AND g.state = 'open' AND g.id NOT IN (SELECT g.id {}) UNION ALL SELECT f.severity {}) AS o GROUP BY 1"
    ).format(column, gone, new)
    result.open = dict(conn.execute(after, names).fetchall())
    if not write:
        return
    if result.closed:
        conn.execute(
            sql.SQL("UPDATE flag SET state = 'resolved', closed_by = %(actor)s, closed_at = now(), reason = %(reason)s "
                    "WHERE id IN (SELECT g.id {})").format(gone),
            names,
        )  # fmt: skip
    if count(sql.SQL("FROM flag g, {}").format(other)):
        conn.execute(
            sql.SQL(
                "UPDATE flag g SET value = f.value, detail = f.detail, severity = f.severity, rule_version = %(version)s FROM {}"
            ).format(other),
            names,
        )
    if result.raised:
        conn.execute(
            sql.SQL("INSERT INTO flag (rule, rule_version, severity, detail, value, raised_by, {}) "
                    "SELECT %(rule)s, %(version)s, f.severity, f.detail, f.value, %(actor)s, f.subject_id {} ON CONFLICT DO NOTHING")
            .format(column, new),
            names,
        )  # fmt: skip


def _open(conn: psycopg.Connection[Any], codes: list[str]) -> dict[str, int]:
    """Return how many flags of these rules are open, by severity."""
    found = conn.execute("SELECT severity, count(*) FROM flag WHERE state = 'open' AND rule = ANY(%s) GROUP BY 1", [codes])
    return dict(found.fetchall())
