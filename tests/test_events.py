"""The event log: every decision leaves who, what, when and why, and no row of it is changed or deleted by anybody."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest

from catalog import database, deciding, flags, qa
from tests.conftest import Run


@pytest.fixture
def after(conn: psycopg.Connection) -> Callable[[], list[tuple[Any, ...]]]:
    """Return the events since the last call: subject, id, action, actor, reason, before, after."""
    seen = 0

    def look() -> list[tuple[Any, ...]]:
        nonlocal seen
        rows = conn.execute(
            "SELECT id, subject, subject_id, action, actor, reason, before, after FROM event WHERE id > %s ORDER BY id", [seen]
        ).fetchall()
        seen = max([seen, *(row[0] for row in rows)])
        return [row[1:] for row in rows]

    look()
    return look


def differing(event: tuple[Any, ...]) -> dict[str, tuple[Any, Any]]:
    """Return what an update changed: name → before and after."""
    before, now = event[-2] or {}, event[-1] or {}
    return {name: (before.get(name), now.get(name)) for name in before.keys() | now.keys() if before.get(name) != now.get(name)}


def test_a_flags_life(ingested: str, conn: psycopg.Connection, after: Callable[[], list[Any]]) -> None:
    """Raised, closed, reopened, given to somebody, deleted: one event each, with who and why, before and after."""
    [[image]] = conn.execute("SELECT min(id) FROM image").fetchall()
    with database.open_database(ingested) as db:
        added = flags.add(db, f"sample:{image}", rule="BAD", detail="odd", actor="ada")
        flag = added.flags[0].id
        assert flag is not None
        [one] = after()
        assert one[:4] == ("flag", flag, "insert", "ada") and one[5] is None
        assert (one[6]["rule"], one[6]["state"], one[6]["severity"], one[6]["image"]) == ("BAD", "open", "error", image)
        flags.close(db, [flag], reason="it is well", actor="bo")
        [one] = after()
        assert one[:5] == ("flag", flag, "update", "bo", "it is well") and differing(one) == {"state": ("open", "resolved")}
    conn.execute("BEGIN")
    conn.execute("SELECT set_config('catalog.actor', 'cy', true), set_config('catalog.reason', 'looked again', true)")
    conn.execute("UPDATE flag SET state = 'open', closed_by = NULL, closed_at = NULL, reason = NULL WHERE id = %s", [flag])
    conn.execute("UPDATE flag SET assigned_to = 'di', value = 3 WHERE id = %s", [flag])
    conn.execute("UPDATE flag SET state = 'resolved', closed_by = 'bo', closed_at = now(), reason = 'old' WHERE id = %s", [flag])
    conn.execute("UPDATE flag SET severity = 'info' WHERE id = %s", [flag])
    conn.execute("DELETE FROM flag WHERE id = %s", [flag])
    conn.execute("COMMIT")
    reopened, given, closed, closed_still, deleted = after()
    assert closed[2:4] == closed_still[2:4] == ("update", "cy"), "who closed it is not who changes it later"
    assert reopened[2:5] == ("update", "cy", "looked again") and differing(reopened) == {"state": ("resolved", "open")}
    assert given[2:5] == ("update", "cy", "looked again") and differing(given) == {"assigned_to": (None, "di"), "value": (None, 3)}
    assert deleted[:5] == ("flag", flag, "delete", "cy", "looked again") and deleted[5]["rule"] == "BAD" and deleted[6] is None


def test_what_changes_nothing_is_no_event(ingested: str, conn: psycopg.Connection, after: Callable[[], list[Any]]) -> None:
    """An UPDATE that leaves a row as it is, or touches what no event keeps, writes nothing."""
    conn.execute("UPDATE pairing SET state = state, at = now()")
    conn.execute("UPDATE annotation SET current = current")
    conn.execute("UPDATE relation SET at = now()")
    conn.execute("DELETE FROM flag WHERE false")
    assert after() == []


def test_decisions_about_pairings(ingested: str, conn: psycopg.Connection, after: Callable[[], list[Any]]) -> None:
    """Rejecting, accepting and linking by hand are events by who did it; those of ingest are by its layout."""
    by_layout = conn.execute("SELECT DISTINCT actor FROM event WHERE subject = 'pairing' AND action = 'insert'").fetchall()
    assert by_layout == [("layout:sunnybrook",)]
    assert conn.execute("SELECT (SELECT count(*) FROM event WHERE subject = 'pairing') = count(*) FROM pairing").fetchone() == (True,)
    [[pairing, annotation, image]] = conn.execute("SELECT id, annotation_id, image_id FROM pairing ORDER BY id LIMIT 1").fetchall()
    [[other]] = conn.execute(
        "SELECT min(i.id) FROM image i WHERE i.rows = 64 AND NOT EXISTS (SELECT FROM pairing p WHERE p.image_id = i.id)"
    ).fetchall()
    with database.open_database(ingested) as db:
        deciding.reject(db, [pairing], actor="ada")
        [one] = [event for event in after() if event[0] == "pairing"]
        assert one[:4] == ("pairing", pairing, "update", "ada") and differing(one) == {"state": ("accepted", "rejected")}
        linked = deciding.link(db, annotation, other, actor="bo")
    made = [event for event in after() if event[0] == "pairing"]
    assert [event[1:4] for event in made] == [(linked.pairing, "insert", "bo")]
    assert (made[0][6]["annotation"], made[0][6]["image"], made[0][6]["state"], made[0][6]["method"]) == (
        annotation,
        other,
        "accepted",
        "manual",
    )
    assert image != other


def test_versions_of_annotations(
    database_url: str, conn: psycopg.Connection, after: Callable[[], list[Any]], studies: Path, tmp_path: Path, catalog: Run
) -> None:
    """A contour that changed on disk: the old version is no longer current, a new one came, both by ingest, told by their hashes."""
    copy = tmp_path / "studies"
    shutil.copytree(studies, copy)
    assert catalog("ingest", copy, "--jobs", "1").returncode == 0
    came = [event for event in after() if event[0] == "annotation"]
    assert len(came) == conn.execute("SELECT count(*) FROM annotation").fetchall()[0][0] > 0
    assert {event[2:4] for event in came} == {("insert", "ingest")}
    contour = sorted(copy.rglob("*icontour*.txt"))[0]
    contour.write_text(re.sub(r"^(\S+) ", lambda match: f"{float(match[1]) + 1} ", contour.read_text(), flags=re.M))
    assert catalog("ingest", copy, "--jobs", "1").returncode == 0
    retired, new = sorted((event for event in after() if event[0] == "annotation"), key=lambda event: event[2], reverse=True)
    assert retired[2:4] == ("update", "ingest") and differing(retired) == {"current": (True, False)}
    assert new[2:4] == ("insert", "ingest") and (new[6]["version"], new[6]["current"]) == (2, True)
    assert len(new[6]["sha256"]) == 64 and new[6]["sha256"] != retired[6]["sha256"]


def test_settings_and_relations(ingested: str, conn: psycopg.Connection, after: Callable[[], list[Any]]) -> None:
    """Setting a rule's parameter, setting it again and giving the default back; adding and removing a relation."""
    rule = next(rule for rule in qa.load().values() if rule.query)
    with database.open_database(ingested) as db:
        qa.set_value(db, rule, "enabled", "false", reason="too loud", actor="ada")
        qa.set_value(db, rule, "enabled", "true", reason="mended", actor="bo")
        qa.set_value(db, rule, "enabled", None, reason="as it was", actor="cy")
    first, second, third = [event for event in after() if event[0] == "rule_setting"]
    assert first[:5] == ("rule_setting", None, "insert", "ada", "too loud")
    assert first[6] == {"rule": rule.code, "name": "enabled", "value": "false"}
    assert second[2:5] == ("update", "bo", "mended") and differing(second) == {"value": ("false", "true")}
    assert third[2:5] == ("delete", "cy", "as it was") and third[5]["value"] == "true"
    conn.execute("INSERT INTO relation (inside, outside, actor) VALUES ('papillary', 'inner', 'ada')")
    conn.execute("DELETE FROM relation WHERE inside = 'papillary'")
    came, went = after()
    assert came[:4] == ("relation", None, "insert", "ada") and came[6] == {"inside": "papillary", "outside": "inner"}
    assert went[2] == "delete" and went[5] == {"inside": "papillary", "outside": "inner"}
    assert conn.execute("SELECT session_user").fetchone() == (went[3],)


def test_many_rows_of_one_statement_are_an_event_each(ingested: str, conn: psycopg.Connection, after: Callable[[], list[Any]]) -> None:
    """One statement over all pairings leaves as many events as rows it changed; a transaction undone leaves none."""
    [[count]] = conn.execute("SELECT count(*) FROM pairing").fetchall()
    conn.execute("BEGIN")
    conn.execute("UPDATE pairing SET state = 'rejected'")
    conn.execute("ROLLBACK")
    assert after() == []
    conn.execute("UPDATE pairing SET state = 'rejected'")
    assert len(after()) == count > 1


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE event SET actor = 'nobody'",
        "UPDATE event SET reason = NULL WHERE id = 1",
        "DELETE FROM event",
        "DELETE FROM event WHERE false",
        "TRUNCATE event",
        "INSERT INTO event (id, actor, subject, action) OVERRIDING SYSTEM VALUE SELECT id, 'x', 'x', 'x' FROM event "
        "ON CONFLICT (id) DO UPDATE SET actor = 'x'",
        "MERGE INTO event e USING (SELECT 1) o ON true WHEN MATCHED THEN DELETE",
        "WITH gone AS (DELETE FROM event RETURNING 1) SELECT count(*) FROM gone",
    ],
)
def test_the_log_refuses_change_from_its_owner_too(ingested: str, conn: psycopg.Connection, statement: str) -> None:
    """Nobody changes, deletes or empties it: a superuser and owner is refused by the server."""
    before = conn.execute("SELECT * FROM event ORDER BY id").fetchall()
    assert before
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="never changed or deleted"):
        conn.execute(statement.encode())
    assert conn.execute("SELECT * FROM event ORDER BY id").fetchall() == before


def test_it_identifies_nobody(ingested: str, conn: psycopg.Connection) -> None:
    """No event holds a PatientID, a UID, a path, or what is said of a patient: subjects are named by number."""
    conn.execute(
        "INSERT INTO flag (rule, severity, detail, patient_id, raised_by) SELECT 'X', 'info', 'of ' || patient_id, id, 'ada' FROM patient"
    )
    [[text]] = conn.execute("SELECT string_agg(e::text, ' ') FROM event e").fetchall()
    secret = conn.execute(
        "SELECT patient_id FROM patient UNION SELECT original_id FROM patient UNION SELECT study_instance_uid FROM study "
        "UNION SELECT series_instance_uid FROM series UNION SELECT sop_instance_uid FROM instance UNION SELECT path FROM file "
        "UNION SELECT url FROM root"
    ).fetchall()
    found = [value for (value,) in secret if value and value in text]
    assert len(secret) > 50 and found == []
