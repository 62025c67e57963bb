"""QA rules: a rule is a file ``<CODE>.sql`` with a head that says what it is, and one query that returns what fails it.

    -- title: Inner contour larger than the outer one
    -- severity: error                error, warning or info
    -- subject: pairing               file, image, annotation, pairing, series, study or patient
    -- version: 1
    -- scope: series                  or all, for a rule that compares across patients; see below
    -- means: what it means; goes on
    --   in lines that are indented
    -- do: what to do about it
    -- parameter least: 0.5 px; what it is for
    SELECT p.id AS subject_id, area AS value, 'in words, with units' AS detail FROM …
    -- not evaluated
    SELECT count(*), 'why not' FROM …

The query may return a fourth column, ``severity``, that differs from the head's. ``:least`` in it is the parameter, of its default's type.
A rule of scope ``series`` joins the table ``scope`` (series_id, study_id, patient_id): all series of the patients to look at, of all
patients or of those of whom something changed. The query after ``-- not evaluated`` counts what could not be looked at; it may be left
out. A head with ``raised by`` (ingest, loaderd, measure) and no query describes what those raise by themselves.

Rules run under the login that cannot write. What they find is compared with the flags that are there: a new finding is raised, one that
is no longer so closes itself, one that a person called a false positive stays closed until its value changes by more than 5 %.
"""

from __future__ import annotations

import fnmatch
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psycopg
from psycopg import sql

from catalog import __version__, flags
from catalog.database import Database, explain
from catalog.errors import CatalogError, UsageError

FOLDER = Path(__file__).parent / "rules"
ACTOR = "qa"
LOCK = 0x5CA90A  # advisory: one run at a time
RULE_TIMEOUT_S = 600.0
SAME = 0.05  # share by which a false positive's value may change and still be that
SEVERITIES = ("error", "warning", "info")
HEAD = re.compile(r"--\s?(?P<key>title|severity|subject|version|scope|means|do|raised by|parameter \w+)\s*:\s*(?P<value>.*)")
PARAMETER = re.compile(r"(?<![:\w]):([a-z_][a-z_0-9]*)\b")

# In which series a subject is; none for what belongs to no series, and for study and patient, which `scope` has by column.
SERIES = {
    "file": "SELECT n.series_id FROM location l JOIN image i ON i.id = l.image_id JOIN instance n ON n.id = i.instance_id "
    "WHERE l.file_id = g.file_id UNION ALL SELECT n.series_id FROM file f JOIN instance n ON n.id = f.instance_id WHERE f.id = g.file_id",
    "image": "SELECT n.series_id FROM image i JOIN instance n ON n.id = i.instance_id WHERE i.id = g.image_id",
    "annotation": "SELECT n.series_id FROM pairing p JOIN image i ON i.id = p.image_id JOIN instance n ON n.id = i.instance_id "
    "WHERE p.annotation_id = g.annotation_id",
    "pairing": "SELECT n.series_id FROM pairing p JOIN image i ON i.id = p.image_id JOIN instance n ON n.id = i.instance_id "
    "WHERE p.id = g.pairing_id",
    "series": "SELECT g.series_id",
    "study": "SELECT se.id FROM series se WHERE se.study_id = g.study_id",
    "patient": "SELECT se.id FROM series se JOIN study st ON st.id = se.study_id WHERE st.patient_id = g.patient_id",
}

FOUND = """
CREATE TEMP TABLE IF NOT EXISTS found (subject_id bigint, value float8, detail text, severity text) ON COMMIT DELETE ROWS
"""


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule, as its file says it."""

    code: str
    title: str
    severity: str
    subject: str
    version: int
    means: str
    do: str
    scope: Literal["series", "all"]
    raised_by: str  # empty: by `catalog qa run`
    parameters: Mapping[str, float | bool | str]  # with their defaults
    said: Mapping[str, str]  # what each parameter is for
    query: str
    not_evaluated: str
    path: Path


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
    patients: int
    results: list[Result] = field(default_factory=list)
    seconds: float = 0.0


def load(folders: Sequence[Path] = ()) -> dict[str, Rule]:
    """Return the rules by code: our own, and those in these folders.

    Raises:
        UsageError: If a folder cannot be read, a file is no rule, or two have one code.
    """
    rules: dict[str, Rule] = {}
    for folder in (FOLDER, *folders):
        if not folder.is_dir():
            raise UsageError(f"{folder}: is no folder; --rules takes one with .sql files in it")
        for path in sorted(folder.glob("*.sql")):
            rule = parse(path)
            if rule.code in rules:
                raise UsageError(f"{path}: there is a rule {rule.code} already ({rules[rule.code].path}); give it another name")
            rules[rule.code] = rule
    return rules


def parse(path: Path) -> Rule:
    """Return the rule in a file. Raises UsageError, with the line, if it is none."""
    if not re.fullmatch(r"[A-Z][A-Z0-9]*(-[A-Z0-9]+)*", path.stem):
        raise UsageError(f"{path}: a rule's file is named CODE.sql, in capitals, digits and hyphens, such as MASK-TINY.sql")
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as UTF-8 text: {getattr(error, 'strerror', None) or 'other bytes'}") from None
    head: dict[str, str] = {}
    parts: dict[str, list[str]] = {"query": [], "not evaluated": []}
    into, key = "query", ""
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() == "-- not evaluated":
            into, key = "not evaluated", ""
        elif (match := HEAD.fullmatch(line.rstrip())) and not parts["query"]:
            key = match["key"]
            if key in head:
                raise UsageError(f"{path}:{number}: {key} is there twice")
            head[key] = match["value"].strip()
        elif line.startswith("--   ") and key:
            head[key] += " " + line[2:].strip()
        else:
            key = ""
            if line.strip() and not (line.startswith("--") and not parts[into]):
                parts[into].append(line)
    query = "\n".join(parts["query"]).strip().rstrip(";")
    raised_by = head.get("raised by", "")
    for needed in ("title", "severity", "subject", "means", "do"):
        if not head.get(needed):
            raise UsageError(f"{path}: its head says no {needed}; see `catalog qa rules --help`")
    if head["severity"] not in SEVERITIES or head["subject"] not in SERIES or head.get("scope", "series") not in ("series", "all"):
        raise UsageError(f"{path}: severity is one of {', '.join(SEVERITIES)}; subject one of {', '.join(SERIES)}; scope series or all")
    if bool(query) == bool(raised_by):
        raise UsageError(f"{path}: needs one query, or says by whom it is raised")
    if not re.fullmatch(r"[1-9][0-9]{0,5}", head.get("version", "1")):
        raise UsageError(f"{path}: its version is no whole number from 1")
    parameters, said = {}, {}
    for name, value in head.items():
        if name.startswith("parameter "):
            default, _, words = value.partition(" ")
            parameters[name[10:]] = _value(default)
            said[name[10:]] = words.strip()
    used = set(PARAMETER.findall(query)) | set(PARAMETER.findall("\n".join(parts["not evaluated"])))
    if used - parameters.keys():
        raise UsageError(f"{path}: the query has :{min(used - parameters.keys())}, which is no parameter of its head")
    return Rule(
        path.stem, head["title"], head["severity"], head["subject"], int(head.get("version", "1")), head["means"], head["do"],
        "all" if head.get("scope") == "all" else "series", raised_by, parameters, said, query,
        "\n".join(parts["not evaluated"]).strip().rstrip(";"), path,
    )  # fmt: skip


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
        changed: Look at those patients alone of whom something changed since they were last looked at by all of these rules; rules
            that compare across patients look at all.
        progress: Called with (rules done, rules).
        say: Called with a line when another run is being waited for.

    Raises:
        CatalogError: If the database refuses, or a rule's query fails: what the rules before it found is kept.
    """
    begun = time.monotonic()
    asked = [rule for rule in rules if rule.query]
    actor = flags.person(actor)
    try:
        with database.connect(application_name="catalog qa") as conn, database.read_only(timeout_s=RULE_TIMEOUT_S) as reading:
            if conn.execute("SELECT pg_try_advisory_lock(%s)", [LOCK]).fetchone() != (True,):
                say("another run of the rules is going on; waiting for it")
                conn.execute("SELECT pg_advisory_lock(%s)", [LOCK])
            settings = _settings(conn)
            asked = [rule for rule in asked if settings.get((rule.code, "enabled"), "true") != "false"]
            seen = _fill_scope(conn, changed)
            conn.execute(FOUND)
            run_id = None
            if not dry_run:
                row = conn.execute(
                    "INSERT INTO qa_run (changed_only, actor, program_version) VALUES (%s, %s, %s) RETURNING id",
                    [changed, actor, __version__],
                ).fetchone()
                run_id = None if row is None else int(row[0])
            counted = conn.execute("SELECT count(DISTINCT patient_id) FROM scope").fetchone()
            conn.commit()
            summary = Summary(run_id, changed, counted[0] if counted else 0)
            for done, rule in enumerate(asked):
                progress(done, len(asked))
                summary.results.append(_evaluate(conn, reading, rule, settings, changed, run_id))
            progress(len(asked), len(asked))
            if run_id is not None:
                # What was touched while the rules ran has a higher id, and stays.
                if {rule.code for rule in asked} >= {rule.code for rule in load().values() if rule.query and rule.scope == "series"}:
                    conn.execute("DELETE FROM touched WHERE id <= %s", [seen])
                conn.execute("UPDATE qa_run SET finished_at = now() WHERE id = %s", [run_id])
                conn.execute("ANALYZE flag")
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
    if name != "enabled" and name not in rule.parameters:
        known = ", ".join((*rule.parameters, "enabled"))
        raise UsageError(f"{name}: {rule.code} has no such parameter; it has {known}")
    kind = bool if name == "enabled" else type(rule.parameters[name])
    if value is not None and type(_value(value)) is not kind:
        raise UsageError(f"{value}: {name} is a {'number' if kind is float else 'true or false' if kind is bool else 'text'}")
    reason, actor = flags.written(reason, "-m"), flags.person(actor)
    with flags.transaction(database, dry_run=dry_run) as conn:
        row = conn.execute("SELECT value FROM rule_setting WHERE rule = %s AND name = %s", [rule.code, name]).fetchone()
        if value is None:
            conn.execute("SELECT set_config('catalog.actor', %s, true), set_config('catalog.reason', %s, true)", [actor, reason])
            conn.execute("DELETE FROM rule_setting WHERE rule = %s AND name = %s", [rule.code, name])
        else:
            conn.execute(
                "INSERT INTO rule_setting (rule, name, value, actor, reason) VALUES (%s, %s, %s, %s, %s) "
                "ON CONFLICT (rule, name) DO UPDATE "
                "SET value = excluded.value, actor = excluded.actor, reason = excluded.reason, at = now()",
                [rule.code, name, value, actor, reason],
            )
        return None if row is None else str(row[0])


def _settings(conn: psycopg.Connection[Any]) -> dict[tuple[str, str], str]:
    return {(rule, name): value for rule, name, value in conn.execute("SELECT rule, name, value FROM rule_setting")}


def _fill_scope(conn: psycopg.Connection[Any], changed: bool) -> int:
    """Write which series are looked at. Returns the last change that is seen by it."""
    row = conn.execute("SELECT coalesce(max(id), 0) FROM touched").fetchone()
    assert row is not None
    conn.execute("TRUNCATE scope")
    only = (
        "WHERE st.patient_id IN (SELECT t.patient_id FROM touched c JOIN series s ON s.id = c.series_id JOIN study t ON t.id = s.study_id)"
        if changed
        else ""
    )
    conn.execute(
        f"INSERT INTO scope (series_id, study_id, patient_id) "  # noqa: S608
        f"SELECT se.id, st.id, st.patient_id FROM series se JOIN study st ON st.id = se.study_id {only} ORDER BY se.id"
    )
    conn.execute("ANALYZE scope")
    return int(row[0])


def _evaluate(
    conn: psycopg.Connection[Any],
    reading: psycopg.Connection[Any],
    rule: Rule,
    settings: Mapping[tuple[str, str], str],
    changed: bool,
    run_id: int | None,
) -> Result:
    begun = time.monotonic()
    parameters = {name: _value(settings[rule.code, name]) if (rule.code, name) in settings else default
                  for name, default in rule.parameters.items()}  # fmt: skip
    result = Result(rule.code, rule.title, rule.severity, rule.subject)
    try:
        with reading.cursor() as cursor:
            cursor.execute(_bound(rule.query), parameters, prepare=True)
            names = [column.name for column in cursor.description or ()]
            if names[:3] != ["subject_id", "value", "detail"] or names[3:] not in ([], ["severity"]):
                raise CatalogError(
                    f"{rule.path}: returns {', '.join(names)}; it must return subject_id, value, detail and perhaps severity"
                )
            rows = cursor.fetchall()
            if rule.not_evaluated:
                for count, why in cursor.execute(_bound(rule.not_evaluated), parameters, prepare=True).fetchall():
                    if count:
                        result.not_evaluated += count
                        result.why = f"{result.why}; {why}" if result.why else str(why)
        reading.rollback()
    except psycopg.Error as error:
        said = error.diag.message_primary or str(error).splitlines()[0]
        raise CatalogError(f"{rule.path}: its query fails: {said}") from error
    best: dict[int, tuple[Any, ...]] = {}
    for subject_id, value, detail, *own in rows:
        severity = own[0] if own else rule.severity
        one = (SEVERITIES.index(severity), subject_id, None if value is None else float(value), detail, severity)
        if subject_id not in best or one[0] < best[subject_id][0]:
            best[subject_id] = one
    with conn.cursor().copy("COPY found (subject_id, value, detail, severity) FROM STDIN") as copy:
        for one in best.values():
            copy.write_row(one[1:])
    result.findings = len(best)
    _settle(conn, rule, result, changed and rule.scope == "series")
    result.seconds = round(time.monotonic() - begun, 3)
    if run_id is None:
        conn.rollback()
        conn.execute(FOUND)
        return result
    conn.execute(
        "INSERT INTO qa_result (qa_run_id, rule, rule_version, findings, raised, closed, not_evaluated, why, seconds) "
        "VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s)",
        [run_id, rule.code, rule.version, result.findings, result.raised, result.closed, result.not_evaluated, result.why, result.seconds],
    )
    conn.commit()
    return result


def _settle(conn: psycopg.Connection[Any], rule: Rule, result: Result, part: bool) -> None:
    """Bring the flags of a rule up to the table `found`. Each statement is asked for first: even one of no row notes a change."""
    conn.execute("ANALYZE found")
    column = sql.Identifier(f"{flags.NAMED_BY['sample' if rule.subject == 'image' else rule.subject][0]}_id")
    names = {"rule": rule.code, "version": rule.version, "actor": ACTOR, "same": SAME}
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
    if result.closed:
        conn.execute(
            sql.SQL("UPDATE flag SET state = 'resolved', closed_by = %(actor)s, closed_at = now(), reason = 'it is no longer so' "
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
    result.open = dict(
        conn.execute("SELECT severity, count(*) FROM flag WHERE rule = %s AND state = 'open' GROUP BY 1", [rule.code]).fetchall()
    )


def _bound(query: str) -> bytes:
    """Return a query with its parameters as psycopg names them."""
    return PARAMETER.sub(r"%(\1)s", query.replace("%", "%%")).encode()


def _value(text: str) -> float | bool | str:
    if text in ("true", "false"):
        return text == "true"
    try:
        return float(text)
    except ValueError:
        return text
