"""`catalog qa`: what rules find becomes flags, which live as docs/qa.md says, whatever is killed, changed or decided in between."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

import loaderd
from catalog import cli, database, flags, qa, rulefiles
from catalog.errors import CatalogError, UsageError
from tests.conftest import Run
from tests.processes import wait_until

HEAD = "-- title: {title}\n-- severity: {severity}\n-- subject: {subject}\n-- means: m\n-- do: d\n"
BRIGHT = """-- parameter most: 100; the largest mean that is right
SELECT m.image_id AS subject_id, {value} AS value, format('mean is %s', m.mean) AS detail{more}
FROM scope c JOIN instance n USING (series_id) JOIN image i ON i.instance_id = n.id JOIN measure m ON m.image_id = i.id
WHERE m.mean > :most
-- not evaluated
SELECT count(*), 'not measured' FROM scope c JOIN instance n USING (series_id) JOIN image i ON i.instance_id = n.id
WHERE NOT EXISTS (SELECT FROM measure m WHERE m.image_id = i.id)
"""

Write = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of rules that stands for our own, so that no test here depends on what our rules find."""
    rules = tmp_path / "rules"
    rules.mkdir()
    monkeypatch.setattr(rulefiles, "FOLDER", rules)
    return rules


@pytest.fixture
def write(folder: Path) -> Write:
    """Write a rule; by default one on images whose mean is over 100."""

    def one(code: str = "T-BRIGHT", query: str = BRIGHT, *, value: str = "m.mean", more: str = "", to: Path = folder, **head: str) -> Path:
        head = {"title": "Bright", "severity": "error", "subject": "image", **head}
        extra = "".join(f"-- {name}: {said}\n" for name, said in head.items() if name not in ("title", "severity", "subject"))
        path = to / f"{code}.sql"
        path.write_text(HEAD.format(**head) + extra + (query.format(value=value, more=more) if query is BRIGHT else query))
        return path

    return one


@pytest.fixture
def db(ingested: str) -> Iterator[database.Database]:
    with database.open_database(ingested) as opened:
        yield opened


@pytest.fixture
def say(ingested: str, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run `catalog` in this process; returns its standard output. Errors come as exceptions."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        cli.app([str(argument) for argument in arguments], prog_name="catalog", standalone_mode=False)
        return capsys.readouterr().out

    return run


def run(db: database.Database, **options: Any) -> qa.Summary:
    return qa.run(db, rules=rulefiles.load().values(), **options)


def measured(conn: psycopg.Connection, means: dict[int, float]) -> None:
    with conn.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO measure (image_id, minimum, maximum, mean, deviation, entropy, saturated, nans) VALUES (%s, 0, 1, %s, 1, 1, 0, 0) "
            "ON CONFLICT (image_id) DO UPDATE SET mean = excluded.mean",
            list(means.items()),
        )


def found(conn: psycopg.Connection, what: str = "image_id, state, value") -> list[tuple[Any, ...]]:
    return conn.execute(f"SELECT {what} FROM flag ORDER BY id").fetchall()


def rows(conn: psycopg.Connection) -> tuple[Any, ...]:
    """Return all that a run may change that somebody sees: flags, events, what daemons watch, numbers used up."""
    return (
        found(conn, "*"),
        *(conn.execute(query).fetchone() for query in (
            "SELECT count(*) FROM catalog_change", "SELECT count(*), max(id) FROM event", "SELECT last_value FROM flag_id_seq",
        )),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------ a flag's life


def test_a_finding_is_raised_once_and_closes_itself(db: database.Database, conn: psycopg.Connection, write: Write) -> None:
    """What fails is flagged with value, words and version; again writes nothing at all, so that no daemon plans again; what is put
    right closes by itself, and what fails again is a new flag.
    """
    write(version="3")
    measured(conn, {1: 150.0, 2: 90.0, 3: 100.0})
    summary = run(db, actor="ada")
    [result] = summary.results
    assert (result.findings, result.raised, result.closed, result.open) == (1, 1, 0, {"error": 1})
    assert (result.not_evaluated, result.why) == (45, "not measured")
    assert found(conn, "rule, rule_version, severity, state, detail, value, image_id, raised_by, revokes") == [
        ("T-BRIGHT", 3, "error", "open", "mean is 150", 150.0, 1, "qa", False)
    ]
    assert conn.execute("SELECT actor, changed_only, complete, finished_at >= started_at FROM qa_run").fetchall() == [
        ("ada", False, True, True)
    ]
    assert conn.execute("SELECT findings, raised, closed, not_evaluated, why, rule_version FROM qa_result").fetchall() == [
        (1, 1, 0, 45, "not measured", 3)
    ]
    before = rows(conn)
    for changed in (False, True):
        [again] = run(db, changed=changed).results
        assert (again.raised, again.closed, again.open) == (0, 0, {"error": 1})
    assert rows(conn) == before
    measured(conn, {1: 99.0})
    [result] = run(db).results
    assert (result.findings, result.raised, result.closed, result.open) == (0, 0, 1, {})
    assert found(conn, "state, closed_by, reason, closed_at IS NULL") == [("resolved", "qa", "it is no longer so", False)]
    measured(conn, {1: 101.0})
    run(db)
    assert found(conn) == [(1, "resolved", 150.0), (1, "open", 101.0)]


def test_what_changes_about_a_finding_changes_its_flag(db: database.Database, conn: psycopg.Connection, write: Write) -> None:
    """Value, words, severity and version follow the rule; who raised it and when stay; each severity that a query names is kept."""
    write(more=", CASE WHEN m.mean > 200 THEN 'error' ELSE 'info' END AS severity", severity="warning")
    measured(conn, {1: 150.0, 2: 250.0})
    run(db)
    assert found(conn, "image_id, severity") == [(1, "info"), (2, "error")]
    raised = found(conn, "raised_at")
    measured(conn, {1: 201.0})
    run(db)
    assert found(conn, "image_id, severity, value, detail, rule_version") == [
        (1, "error", 201.0, "mean is 201", 1), (2, "error", 250.0, "mean is 250", 1)
    ]  # fmt: skip
    write(version="2", severity="warning")
    [result] = run(db).results
    assert (result.raised, result.closed, result.open) == (0, 0, {"warning": 2})
    assert found(conn, "severity, rule_version") == [("warning", 2)] * 2
    assert found(conn, "raised_at") == raised


@pytest.mark.parametrize(
    ("was", "now", "again"),
    [(200, 210, False), (200, 210.2, True), (200, 190, False), (200, 189.8, True), (200, 200, False), (0.7, 0.735, False),
     (0.1, 0.105, False), (-200, -210, False), (-200, -210.2, True), (0, 0.001, True), (None, None, False), (None, 1, True),
     (1, None, True)],
)  # fmt: skip
def test_a_false_positive_stays_one_until_its_value_moves(
    db: database.Database, conn: psycopg.Connection, write: Write, was: float | None, now: float | None, again: bool
) -> None:
    """At 5 % it stays closed, at 5.1 % it is raised again; so with numbers below zero, with none, and whatever doubles do to 5 %."""
    measured(conn, {1: 150.0})

    def as_sql(value: float | None) -> str:
        return "NULL::float8" if value is None else f"({value!r})::float8"

    write(value=as_sql(was))
    run(db)
    flags.close(db, [1], reason="is right", false_positive=True)
    run(db)
    assert found(conn, "state") == [("false_positive",)]
    write(value=as_sql(now))
    [result] = run(db).results
    assert result.raised == int(again)
    assert found(conn, "state, value") == [("false_positive", was), *([("open", now)] if again else [])]


def test_what_a_person_resolved_is_looked_at_again(db: database.Database, conn: psycopg.Connection, write: Write) -> None:
    """A finding that somebody resolved and that is still so is raised again, also by --changed, though nothing of it changed; one that
    was opened again and is no longer so closes itself; what people raised stays theirs.
    """
    write()
    measured(conn, {1: 150.0, 17: 150.0})
    run(db)
    flags.close(db, [1], reason="done")
    assert run(db, changed=True).patients == 1
    assert found(conn, "id, image_id, state, raised_by") == [(1, 1, "resolved", "qa"), (2, 17, "open", "qa"), (3, 1, "open", "qa")]
    measured(conn, {1: 90.0})
    run(db)
    flags.reopen(db, [1], reason="is not")
    run(db, changed=True)
    assert found(conn, "id, state, closed_by") == [(1, "resolved", "qa"), (2, "open", None), (3, "resolved", "qa")]
    flags.add(db, "sample:1", rule="T-BRIGHT", detail="a person's")
    run(db)
    assert found(conn, "id, state, raised_by")[-1][1] == "open"


def test_two_rules_with_one_subject_do_not_meddle(db: database.Database, conn: psycopg.Connection, write: Write) -> None:
    """Each rule has its own flag on a subject, which closes alone; of several rows on a subject the worst is kept, always the same."""
    write("T-BRIGHT")
    write("T-DIM", query="SELECT image_id AS subject_id, mean AS value, 'dim' AS detail FROM measure JOIN scope ON true WHERE mean > 120\n")
    measured(conn, {1: 150.0})
    run(db)
    assert sorted(found(conn, "rule, detail")) == [("T-BRIGHT", "mean is 150"), ("T-DIM", "dim")]
    measured(conn, {1: 110.0})
    run(db)
    assert sorted(found(conn, "rule, state")) == [("T-BRIGHT", "open"), ("T-DIM", "resolved")]
    for order in ("", "DESC"):
        several = "(VALUES (1, 'a', 'info'), (2, 'c', 'error'), (3, 'b', 'error'), (4, 'b', 'error')) AS o (v, d, s)"
        query = f"SELECT 1 AS subject_id, v AS value, d AS detail, s AS severity FROM {several} ORDER BY v {order}\n"
        write("T-DIM", query=query)
        run(db)
        assert found(conn, "rule, severity, detail, value")[2:] == [("T-DIM", "error", "b", 3.0)]


def test_flags_may_be_on_anything(db: database.Database, conn: psycopg.Connection, write: Write) -> None:
    """A rule on each kind of subject raises there, and closes what is put right, in a full run and with --changed."""
    tables = {
        "file": "file", "image": "image", "annotation": "annotation", "pairing": "pairing", "series": "series", "study": "study",
        "patient": "patient",
    }  # fmt: skip
    for subject, table in tables.items():
        query = f"SELECT o.id AS subject_id, 1 AS value, 'x' AS detail FROM {table} o, measure, scope WHERE o.id = 1 AND series_id = 1\n"
        write(f"T-{subject.upper()}", query, subject=subject)
    measured(conn, {1: 1.0})
    run(db)
    assert [row.count(None) for row in found(conn, ", ".join(f"{table}_id" for table in tables))] == [6] * 7
    conn.execute("DELETE FROM measure")
    assert sum(result.closed for result in run(db, changed=True).results) == 7


def test_a_rule_that_is_turned_off_closes_its_flags(db: database.Database, conn: psycopg.Connection, write: Write, say: Any) -> None:
    """`qa set CODE enabled false`: at the next run its flags close with that as the reason; turned on again it looks at all."""
    write()
    measured(conn, {1: 150.0})
    run(db)
    assert "close with the next" in say("qa", "set", "T-BRIGHT", "enabled", "false", "-m", "too many")
    assert found(conn, "state") == [("open",)]
    assert "not run here" in say("qa", "explain", "t-bright")
    [result] = run(db, changed=True).results
    assert (result.closed, result.findings, result.why) == (1, 0, "the rule is turned off here")
    assert found(conn, "state, closed_by, reason") == [("resolved", "qa", "the rule is turned off here")]
    before = rows(conn)
    assert "1 turned off here" in say("qa", "run")
    assert rows(conn) == before
    say("qa", "set", "T-BRIGHT", "enabled", "-m", "needed")
    [result] = run(db, changed=True).results
    assert (result.raised, result.open) == (1, {"error": 1})


# ------------------------------------------------------------------------------------------ parameters


def test_parameters_are_set_by_people(db: database.Database, conn: psycopg.Connection, write: Write, say: Any) -> None:
    """A parameter is set with who and why, and goes back to its default; the next run goes by it, also one with --changed; each is an
    event; the same again and a dry run write nothing.
    """
    write()
    measured(conn, {1: 150.0})
    run(db)
    assert say("qa", "set", "t-bright", "most", "160.5", "-m", "contrast agent", "--actor", "ada") == "T-BRIGHT most: 160.5 (was 100)\n"
    assert "parameter most: 100; here 160.5: the largest mean that is right\n" in say("qa", "explain", "T-BRIGHT")
    before = conn.execute("SELECT * FROM rule_setting").fetchall()
    assert "nothing changed" in say("qa", "set", "T-BRIGHT", "most", "160.5", "-m", "again", "--actor", "bo")
    say("qa", "set", "T-BRIGHT", "most", "7", "-m", "again", "--dry-run")
    assert conn.execute("SELECT * FROM rule_setting").fetchall() == before
    assert run(db, changed=True).results[0].closed == 1
    assert say("qa", "set", "T-BRIGHT", "most", "-1e2", "-m", "try", "--actor", "bo") == "T-BRIGHT most: -1e2 (was 160.5)\n"
    assert say("qa", "set", "T-BRIGHT", "most", "-m", "as before", "--actor", "cy") == "T-BRIGHT most: 100 (was -1e2)\n"
    assert run(db, changed=True).results[0].raised == 1
    log = "SELECT actor, action, before ->> 'value', after ->> 'value', reason FROM event WHERE subject = 'rule_setting' ORDER BY id"
    assert conn.execute(log).fetchall() == [
        ("ada", "insert", None, "160.5", "contrast agent"),
        ("bo", "update", "160.5", "-1e2", "try"),
        ("cy", "delete", "-1e2", None, "as before"),
    ]


def test_a_value_of_another_type_is_refused(db: database.Database, conn: psycopg.Connection, write: Write) -> None:
    """A number stays a number, a word may look like one, and what cannot be set is told in one line; nothing is written."""
    path = write()
    path.write_text(
        path.read_text().replace(
            "-- parameter most", "-- parameter name: inner; a structure\n-- parameter strict: true; strictly\n-- parameter most"
        )
    )
    rule = rulefiles.load()["T-BRIGHT"]
    for name, value, words in (
        ("most", "high", "most of T-BRIGHT is a number"),
        ("most", "nan", "number"),
        ("most", "true", "number"),
        ("most", " ", "VALUE: is empty"),
        ("most", "\udce9", "VALUE: is not UTF-8"),
        ("strict", "1", "true or false"),
        ("enabled", "maybe", "true or false"),
        ("least", "1", "it has name, strict, most, enabled"),
    ):
        with pytest.raises(UsageError, match=words):
            qa.set_value(db, rule, name, value, reason="why")
    with pytest.raises(UsageError, match="-m: is empty"):
        qa.set_value(db, rule, "most", "5", reason="")
    assert conn.execute("SELECT count(*) FROM rule_setting").fetchone() == (0,)
    assert qa.set_value(db, rule, "name", "17", reason="is called so") is None
    run(db)
    conn.execute("UPDATE rule_setting SET name = 'most', value = 'high'")
    with pytest.raises(CatalogError, match=r"^T-BRIGHT: most was set to what is no number"):
        run(db)
    write("T-HEAD", query="", **{"raised by": "ingest"})
    with pytest.raises(UsageError, match="T-HEAD: ingest raises it by itself"):
        qa.set_value(db, rulefiles.load()["T-HEAD"], "enabled", "false", reason="why")


# ------------------------------------------------------------------------------------------ rules that fail


FAILS = [
    ("SELECT 1 FROM nowhere\n", 'its query fails: relation "nowhere" does not exist'),
    ("SELECT 1\n", r"its query returns \?column\?; it must return subject_id, value, detail"),
    ("SELECT 1 AS subject_id, 1 AS value, 'x' AS detail, 'x' AS more\n", "it must return"),
    ("SELECT 1 AS subject_id, 1 AS value, 'x' AS detail, 'fatal' AS severity\n", "another severity"),
    ("SELECT 'a' AS subject_id, 1 AS value, 'x' AS detail\n", "no whole number"),
    ("SELECT NULL::bigint AS subject_id, 1 AS value, 'x' AS detail\n", "no whole number"),
    ("SELECT 1 AS subject_id, 1 AS value, NULL AS detail\n", "says nothing"),
    ("SELECT 1 AS subject_id, 'much' AS value, 'x' AS detail\n", "a value that is no number"),
    ("SELECT 1 AS subject_id, 1 / 0 AS value, 'x' AS detail\n", "division by zero"),
    ("SELECT 1 AS subject_id, 1 AS value, 'x' AS detail; SELECT 2\n", "multiple commands"),
    ("SELECT 1 AS subject_id, 1 AS value, 'x' AS detail\n-- not evaluated\nSELECT 'many', 'x'\n", "a count and why"),
    ("SELECT 1 AS subject_id, 1 AS value, 'x' AS detail\n-- not evaluated\nSELECT 1\n", "a count and why"),
    ("DELETE FROM flag\n", "its query fails"),
    ("SET ROLE postgres\n", "no columns|its query fails"),
    ("WITH d AS (DELETE FROM flag RETURNING id) SELECT id AS subject_id, 1 AS value, 'x' AS detail FROM d\n", "its query fails"),
    ("INSERT INTO flag (rule) VALUES ('X')\n", "its query fails"),
]


@pytest.mark.parametrize(("query", "words"), FAILS)
def test_a_rule_that_fails_says_which_and_why(
    db: database.Database, conn: psycopg.Connection, write: Write, tmp_path: Path, query: str, words: str
) -> None:
    """A query that cannot be run, returns something else, or would write: one line with its file. What the rules before it found is
    kept, its own flags stay as they are, and the run does not count as ended.
    """
    write()
    measured(conn, {1: 150.0})
    conn.execute("INSERT INTO flag (rule, severity, detail, image_id, raised_by) VALUES ('U-WRONG', 'error', 'x', 2, 'qa')")
    own = tmp_path / "own"
    own.mkdir()
    path = write("U-WRONG", query=query, to=own)
    write("V-AFTER", to=own)
    with pytest.raises(CatalogError, match=words) as caught:
        qa.run(db, rules=rulefiles.load([own]).values())
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value) and caught.value.exit_code == 1
    assert found(conn, "rule, state, image_id") == [("U-WRONG", "open", 2), ("T-BRIGHT", "open", 1)]
    assert conn.execute("SELECT complete, finished_at FROM qa_run").fetchall() == [(False, None)]
    path.unlink()
    assert qa.run(db, rules=rulefiles.load([own]).values()).results[0].raised == 0


# ------------------------------------------------------------------------------------------ --changed


def test_changed_looks_at_whom_something_changed(db: database.Database, conn: psycopg.Connection, write: Write) -> None:
    """After a complete run only patients of whom something changed are looked at; flags of others do not close, though nothing found
    them; a rule across patients looks at all; after nothing changed nobody is looked at.
    """
    write()
    every = "SELECT m.image_id AS subject_id, 1 AS value, (SELECT count(*)::text FROM scope) AS detail FROM measure m\n"
    write("T-ACROSS", query=every, scope="all")
    measured(conn, {1: 150.0, 17: 150.0, 33: 150.0})
    assert run(db, changed=True).patients == 3  # the first time all are looked at
    assert run(db, changed=True).patients == 0
    before = rows(conn)
    measured(conn, {17: 90.0})
    summary = run(db, changed=True)
    assert (summary.patients, [result.closed for result in summary.results]) == (1, [0, 1])
    assert found(conn, "rule, image_id, state, detail") == [
        ("T-ACROSS", 1, "open", "3"), ("T-ACROSS", 17, "open", "3"), ("T-ACROSS", 33, "open", "3"), ("T-BRIGHT", 1, "open", "mean is 150"),
        ("T-BRIGHT", 17, "resolved", "mean is 150"), ("T-BRIGHT", 33, "open", "mean is 150"),
    ]  # fmt: skip
    assert rows(conn) != before
    conn.execute("UPDATE measure SET mean = 90 WHERE image_id = 33")
    qa.run(db, rules=[rulefiles.load()["T-ACROSS"]], changed=True)  # not all rules: what changed is kept for the others
    assert run(db, changed=True).results[1].closed == 1
    write(query=BRIGHT.replace(">", ">=").format(value="m.mean", more=""))  # another rule now: all are looked at
    assert run(db, changed=True).patients == 3
    assert run(db, changed=True).patients == 0


def test_what_is_changed_during_a_run_is_looked_at_next(db: database.Database, conn: psycopg.Connection, write: Write) -> None:
    """A change that was begun before a run and is committed during it, under a lower number than others that the run saw, is not lost."""
    write()
    measured(conn, {1: 90.0, 17: 90.0})
    run(db)
    with psycopg.connect(db.conninfo) as slow:
        measured(slow, {1: 150.0})
        measured(conn, {17: 150.0})  # touched after it, committed before it
        assert run(db, changed=True, progress=lambda done, total: slow.commit()).results[0].raised == 1
    assert run(db, changed=True).results[0].raised == 1
    assert [row[0] for row in found(conn)] == [17, 1]


def test_what_belonged_to_a_series_that_is_gone(db: database.Database, conn: psycopg.Connection, write: Write) -> None:
    """Of a series that was deleted nobody knows any more whose it was: then all are looked at."""
    crowded = """SELECT st.patient_id AS subject_id, count(*) AS value, 'x' AS detail
    FROM scope c JOIN study st ON st.id = c.study_id GROUP BY 1 HAVING count(*) > 1\n"""
    write("T-CROWDED", query=crowded, subject="patient")
    extra = "INSERT INTO series (study_id, series_instance_uid) SELECT study_id, '1.2' FROM series WHERE id = 1 RETURNING id"
    [(series,)] = conn.execute(extra).fetchall()
    conn.execute("INSERT INTO instance (series_id, sop_instance_uid, number_of_frames) VALUES (%s, '1.3', 0)", [series])
    assert run(db).results[0].raised == 1
    conn.execute("DELETE FROM instance WHERE series_id = %s", [series])
    conn.execute("DELETE FROM series WHERE id = %s", [series])
    assert run(db, changed=True).results[0].closed == 1


def of(alias: str) -> str:
    return ", ".join(f"{alias}.{table}_id" for table, _ in flags.NAMED_BY.values())


CHANGES = [
    "UPDATE pairing SET state = (ARRAY['accepted', 'proposed', 'rejected'])[1 + %(n)s %% 3] WHERE id = %(pairing)s",
    "DELETE FROM pairing p WHERE id = %(pairing)s AND NOT EXISTS (SELECT FROM flag WHERE pairing_id = p.id)",
    "UPDATE mask SET bits = set_byte(bits, 0, %(n)s) WHERE pairing_id = %(pairing)s",
    "UPDATE shape SET components = 1 + %(n)s %% 4, holes = %(n)s %% 3, border_px = %(n)s %% 2 * 20, self_crossings = %(n)s %% 2, "
    "points_outside = %(n)s %% 3, largest_px = %(n)s WHERE pairing_id = %(pairing)s",
    "UPDATE annotation SET current = false WHERE id = (SELECT annotation_id FROM pairing WHERE id = %(pairing)s)",
    "INSERT INTO measure (image_id, minimum, maximum, mean, deviation, entropy, saturated, nans) "
    "VALUES (%(image)s, 0, %(n)s, 1, %(n)s %% 3, 1, %(n)s %% 2, %(n)s %% 3) ON CONFLICT (image_id) DO UPDATE "
    "SET deviation = excluded.deviation, saturated = excluded.saturated, nans = excluded.nans, maximum = excluded.maximum",
    "DELETE FROM measure WHERE image_id = %(image)s",
    "UPDATE image SET row_spacing = row_spacing * 2 WHERE id = %(image)s",
    "UPDATE image SET position = position + 3, image_position[3] = image_position[3] + 3 WHERE id = %(image)s",
    "UPDATE image SET image_orientation[1] = 0.5 WHERE id = %(image)s",
    "UPDATE image SET phase = NULL, trigger_time = NULL WHERE id = %(image)s",
    "UPDATE instance SET instance_number = %(n)s %% 5, gantry_tilt = %(n)s %% 7, burned_in_annotation = 'YES' "
    "WHERE id = (SELECT instance_id FROM image WHERE id = %(image)s)",
    "UPDATE instance SET surplus_bytes = %(n)s %% 3, other_meta_uid = %(n)s %% 2 = 0, over_89 = %(n)s %% 2 = 0, identity_removed = 'YES' "
    "WHERE id = (SELECT instance_id FROM image WHERE id = %(image)s)",
    "UPDATE file SET state = (ARRAY['present', 'missing'])[1 + %(n)s %% 2] "
    "WHERE id = (SELECT file_id FROM location WHERE image_id = %(image)s LIMIT 1)",
    "UPDATE file SET state = 'missing' WHERE id = (SELECT a.file_id FROM annotation a JOIN pairing p ON p.annotation_id = a.id "
    "WHERE p.id = %(pairing)s)",
    "UPDATE flag SET state = 'resolved', closed_by = 'ada', closed_at = now(), reason = 'x' "
    "WHERE state = 'open' AND id %% 5 = %(n)s %% 5",
    "UPDATE flag SET state = 'false_positive', closed_by = 'ada', closed_at = now(), reason = 'x' "
    "WHERE state = 'open' AND id %% 7 = %(n)s %% 7",
    "UPDATE flag SET state = 'open', closed_by = NULL, closed_at = NULL, reason = NULL WHERE id = (SELECT max(id) FROM flag f "
    "WHERE state <> 'open' AND raised_by = 'qa' AND closed_by = 'ada' AND NOT EXISTS (SELECT FROM flag g "
    f"WHERE g.state = 'open' AND g.rule = f.rule AND ({of('g')}) IS NOT DISTINCT FROM ({of('f')})))",
    "INSERT INTO relation (inside, outside, actor) VALUES ('outer', 'inner', 'ada') ON CONFLICT DO NOTHING",
    "DELETE FROM relation WHERE inside = 'outer'",
]  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_changed_gives_what_a_full_run_gives(ingested: str, new_database: Callable[..., str], seed: int) -> None:
    """With all of our rules, after random changes to pairings, masks, images, files and flags: --changed leaves the same flags, to the
    word, as a full run over a copy of the same database, again and again.
    """
    draw = random.Random(seed)
    rules = list(rulefiles.load().values())
    url = ingested
    with database.open_database(url) as db:
        qa.run(db, rules=rules)
    for _ in range(3):
        with psycopg.connect(url, autocommit=True) as conn:
            patient = draw.choice([row[0] for row in conn.execute("SELECT id FROM patient").fetchall()])
            drawn = conn.execute(
                "SELECT i.id, p.id FROM image i JOIN instance n ON n.id = i.instance_id JOIN series se ON se.id = n.series_id "
                "JOIN study st ON st.id = se.study_id LEFT JOIN pairing p ON p.image_id = i.id WHERE st.patient_id = %s ORDER BY 1, 2",
                [patient],
            ).fetchall()
            images, pairings = sorted({row[0] for row in drawn}), [row[1] for row in drawn if row[1]]
            for statement in draw.sample(CHANGES, 6):
                values = {"n": draw.randrange(100), "image": draw.choice(images), "pairing": draw.choice(pairings or [0])}
                conn.execute((statement % {name: str(value) for name, value in values.items()}).encode())
        copy = new_database(str(conninfo_to_dict(url)["dbname"]))
        left = []
        for one, changed in ((url, True), (copy, False)):
            with database.open_database(one) as db, psycopg.connect(one) as conn:
                qa.run(db, rules=rules, changed=changed)
                left.append(found(conn, f"rule, state, severity, detail, value, closed_by, reason, {of('flag')}"))
        assert sorted(map(str, left[0])) == sorted(map(str, left[1]))


# ------------------------------------------------------------------------------------------ several runs, killed runs


GATE = "SELECT i.id AS subject_id, 1 AS value, 'x' AS detail FROM image i, pg_advisory_xact_lock_shared(77) WHERE i.id = 2\n"


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "catalog.cli", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_the_gate(conn: psycopg.Connection) -> None:
    """Wait until a rule waits for the lock that the test holds."""
    query = "SELECT FROM pg_stat_activity WHERE wait_event = 'advisory' AND query LIKE '%image i%'"
    assert wait_until(lambda: conn.execute(query).fetchone() is not None, timeout_s=120)


def test_two_runs_at_once(ingested: str, conn: psycopg.Connection, write: Write, tmp_path: Path) -> None:
    """The second says that it waits, waits, and finds what the first left: nothing to write."""
    own = tmp_path / "own"
    own.mkdir()
    write("U-GATE", query=GATE, to=own)
    arguments = ("qa", "run", "--rules", own, "--rule", "U-*", "--json")
    conn.execute("SELECT pg_advisory_lock(77)")
    first = start(*arguments)
    wait_for_the_gate(conn)
    second = start(*arguments)
    assert second.stderr is not None
    assert second.stderr.readline() == "catalog: another run of the rules is going on; waiting for it\n"
    conn.execute("SELECT pg_advisory_unlock(77)")
    raised = [json.loads(process.communicate(timeout=120)[0])["results"][0]["raised"] for process in (first, second)]
    assert raised == [1, 0] and (first.returncode, second.returncode) == (3, 3)
    assert found(conn, "rule, state") == [("U-GATE", "open")]


def test_a_killed_run_is_made_up_for(ingested: str, conn: psycopg.Connection, write: Write, tmp_path: Path) -> None:
    """kill -9 in the middle keeps what was found before, holds no lock, and the same command again leaves the flags of one whole run."""
    own = tmp_path / "own"
    own.mkdir()
    write("U-A", to=own)
    write("U-GATE", query=GATE, to=own)
    write("U-Z", to=own)
    measured(conn, {1: 150.0})
    arguments = ("qa", "run", "--rules", own, "--rule", "U-*")
    conn.execute("SELECT pg_advisory_lock(77)")
    process = start(*arguments)
    wait_for_the_gate(conn)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=120)
    assert found(conn, "rule, image_id") == [("U-A", 1)]
    conn.execute("SELECT pg_advisory_unlock(77)")
    process = start(*arguments)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 3, err
    assert found(conn, "rule, image_id, state") == [("U-A", 1, "open"), ("U-GATE", 2, "open"), ("U-Z", 1, "open")]
    assert conn.execute("SELECT finished_at IS NULL FROM qa_run ORDER BY id").fetchall() == [(True,), (False,)]


# ------------------------------------------------------------------------------------------ the command


def test_the_exit_code_says_what_is_open(ingested: str, conn: psycopg.Connection, write: Write, tmp_path: Path, catalog: Run) -> None:
    """3 from the severity of --fail-on upwards, whoever raised it of the rules asked for; 0 below; 2 for a rule that there is not."""
    own = tmp_path / "own"
    own.mkdir()
    write("U-WARN", to=own, severity="warning")
    write("U-HEAD", query="", to=own, **{"raised by": "ingest"})
    measured(conn, {1: 150.0})
    arguments = ("qa", "run", "--rules", own, "--rule", "u-*")
    done = catalog(*arguments)
    assert done.returncode == 0 and "1 rule over 3 patients" in done.stdout and "U-WARN" in done.stdout
    done = catalog(*arguments, "--fail-on", "warning")
    assert done.returncode == 3 and "catalog: 1 open flag of severity error or warning" in done.stderr
    conn.execute("INSERT INTO flag (rule, severity, detail, image_id, raised_by) VALUES ('U-HEAD', 'error', 'x', 2, 'ingest')")
    done = catalog(*arguments, "--json")
    assert done.returncode == 3 and json.loads(done.stdout)["open"] == {"error": 1, "warning": 1}
    conn.execute("UPDATE flag SET rule = 'ELSE' WHERE rule = 'U-HEAD'")
    assert catalog(*arguments).returncode == 0
    for wrong in (("--rule", "NONE-*"), ("--rules", tmp_path / "gone"), ("--fail-on", "info")):
        done = catalog("qa", "run", *wrong)
        assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr


def test_a_dry_run_says_the_same_and_writes_nothing(db: database.Database, conn: psycopg.Connection, write: Write) -> None:
    """What it would raise, close and leave open, as the real one says it; no row, no number used up, no run, nothing taken as seen."""
    write()
    write("T-SEVERE", more=", CASE WHEN m.mean > 200 THEN 'error' ELSE 'info' END AS severity")
    measured(conn, {1: 150.0, 2: 150.0, 3: 90.0, 17: 150.0})
    run(db)
    measured(conn, {1: 250.0, 2: 90.0, 3: 150.0})
    before = rows(conn), conn.execute("SELECT * FROM touched ORDER BY id").fetchall(), conn.execute("SELECT * FROM qa_run").fetchall()
    dry = run(db, dry_run=True, changed=True)
    assert before == (
        rows(conn),
        conn.execute("SELECT * FROM touched ORDER BY id").fetchall(),
        conn.execute("SELECT * FROM qa_run").fetchall(),
    )
    real = run(db, changed=True)
    assert dry.run is None and (dry.open, dry.patients) == (real.open, real.patients) == ({"error": 4, "info": 2}, 1)
    for one, other in zip(dry.results, real.results, strict=True):
        assert (one.findings, one.raised, one.closed, one.open) == (other.findings, other.raised, other.closed, other.open)
    assert sum(one.raised for one in real.results) == 2 and sum(one.closed for one in real.results) == 2


def test_an_open_error_keeps_a_sample_out(db: database.Database, conn: psycopg.Connection, write: Write) -> None:
    """What a rule of severity error flags is not fed, unless include_flagged says so, which stands in the stream; a warning is fed."""
    sample = conn.execute("SELECT sample_id FROM sample WHERE structure = 'inner' ORDER BY 1 LIMIT 1").fetchone()
    assert sample is not None
    measured(conn, {sample[0]: 150.0})
    fed = []
    for severity in ("warning", "error"):
        write(severity=severity)
        run(db)
        for include in (False, True):
            with loaderd.Feed(structures=["inner"], batch_size=4, seed=7, include_flagged=include) as feed:
                fed.append({int(one) for batch in feed.epoch() for one in batch.sample_ids})
    assert fed[0] == fed[1] == fed[3] and sample[0] in fed[0]
    assert fed[2] == fed[0] - {sample[0]}
    streams = conn.execute("SELECT coalesce(definition ->> 'include_flagged', 'false') FROM stream ORDER BY 1").fetchall()
    assert streams == [("false",), ("true",)]
