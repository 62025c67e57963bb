"""Flags that people raise and close, and consent withdrawn: what is said, what is written, and what is never repeated."""

from __future__ import annotations

import json
import os
import pwd
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest

from catalog import cli, database, flaglist, flags, synthetic
from catalog.errors import CatalogError, UsageError
from tests.conftest import Run

PATIENT = "SYN0002"  # of 16 images and 6 annotations, as each of the three
ME = pwd.getpwuid(os.geteuid()).pw_name

Say = Callable[..., str]


@pytest.fixture
def say(ingested: str, capsys: pytest.CaptureFixture[str]) -> Say:
    """Run `catalog` in this process; returns its standard output. Errors come as exceptions."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        cli.app([str(argument) for argument in arguments], prog_name="catalog", standalone_mode=False)
        return capsys.readouterr().out

    return run


def one(conn: psycopg.Connection, query: str, *parameters: object) -> Any:
    row = conn.execute(query, parameters).fetchone()
    assert row is not None
    return row[0]


def written(conn: psycopg.Connection) -> tuple[Any, ...]:
    """Return all that a command about flags could have changed: rows, numbers used up, the daemons' counter."""
    return (
        conn.execute("SELECT * FROM flag ORDER BY id").fetchall(),
        one(conn, "SELECT last_value FROM flag_id_seq"),
        one(conn, "SELECT count(*) FROM catalog_change"),
    )


def subject_of(conn: psycopg.Connection, kind: str) -> str:
    """Return a subject of that kind of the second patient, which has something drawn on it."""
    column = {
        "sample": "sample_id", "file": "file_id", "annotation": "annotation_id", "pairing": "pairing_id", "series": "series_instance_uid",
        "study": "study_instance_uid", "patient": "patient",
    }[kind]  # fmt: skip
    return f"{kind}:{one(conn, f'SELECT {column} FROM annotation_all WHERE patient = %s ORDER BY sample_id LIMIT 1', PATIENT)}"


def images_of(conn: psycopg.Connection, patient: str) -> list[int]:
    return [row[0] for row in conn.execute("SELECT sample_id FROM image_all WHERE patient = %s ORDER BY 1", [patient])]


def feed(conn: psycopg.Connection, run: str, epoch: int, samples: Sequence[int], *, attempts: int = 1) -> int:
    """Write what a daemon writes that delivered these samples; returns the epoch's id."""
    stream = one(
        conn,
        "INSERT INTO stream (name, definition, digest) VALUES ('heart', '{}', '') ON CONFLICT (name) WHERE ended_at IS NULL "
        "DO UPDATE SET digest = '' RETURNING id",
    )
    run_id = one(
        conn,
        "INSERT INTO run (name, program_version, host) VALUES (%s, '0', 'here') ON CONFLICT (name) DO UPDATE SET host = 'here' "
        "RETURNING id",
        run,
    )
    epoch_id = one(
        conn,
        "INSERT INTO epoch (run_id, stream_id, epoch, num_samples, catalog_changes, started_at) VALUES (%s, %s, %s, %s, 0, now()) "
        "RETURNING id",
        run_id, stream, epoch, len(samples),
    )  # fmt: skip
    conn.execute("INSERT INTO epoch_order (epoch_id, part, sample_ids, annotation_ids) VALUES (%s, 0, %s, '{}')", [epoch_id, list(samples)])
    for attempt in range(1, attempts + 1):
        conn.execute(
            "INSERT INTO attempt (run_id, stream_id, attempt, num_ranks, epoch, step, position) VALUES (%s, %s, %s, 1, 0, 0, 0) "
            "ON CONFLICT DO NOTHING",
            [run_id, stream, attempt],
        )
        conn.execute(
            "INSERT INTO ledger (epoch_id, attempt, outcome, positions, consumer) "
            "VALUES (%s, %s, 'delivered', %s::int8multirange, 'here:1')",
            [epoch_id, attempt, f"{{[0,{len(samples)})}}"],
        )
    return int(epoch_id)


# ------------------------------------------------------------------------------------------ raising


def test_what_is_said_to_be_revoked_is_revoked(say: Say, conn: psycopg.Connection) -> None:
    """On each kind of subject: the number of samples that `flag add --revoke` names is that of view revoked_image, and of status,
    which does not mention revocation where there is none.
    """
    assert "revoked" not in say("status")
    assert json.loads(say("status", "--json"))["revoked"] == 0
    subjects = {kind: subject_of(conn, kind) for kind in flags.NAMED_BY}
    conn.execute(
        "INSERT INTO pairing (annotation_id, image_id, method, rule, score, state, actor) "
        "SELECT %s, max(id), 'guess', 'by hand', 0, 'proposed', 'ada' FROM image",
        [subjects["annotation"].partition(":")[2]],
    )
    for number, (kind, subject) in enumerate(subjects.items(), 1):
        expected = {"series": 16, "study": 16, "patient": 16, "annotation": 2}.get(kind, 1)
        said = say("flag", "add", subject, "--rule", "BAD-CONSENT", "--detail", "form is missing", "--revoke")
        assert one(conn, "SELECT count(*) FROM revoked_image") == expected
        assert f"affects {expected} sample" in said and "no run saw any of it" in said
        assert f"revoked: {expected} sample" in say("status")
        assert json.loads(say("status", "--json"))["revoked"] == expected
        [row] = json.loads(say("flag", "list", "--json"))
        assert [row[name] for name in ("subject", "rule", "detail", "severity", "revokes", "raised_by")] == [
            subject, "BAD-CONSENT", "form is missing", "error", True, ME
        ]  # fmt: skip
        assert f"; {expected} sample" in say("flag", "resolve", number, "--reason", "form found")


def test_severity_decides_what_is_fed(say: Say, conn: psycopg.Connection) -> None:
    """Open errors are error_flags of the sample, warnings and infos are not, and the command says which it is; none revokes."""
    found = "SELECT open_flags, error_flags FROM image_all WHERE sample_id = 3"
    for severity, counts, words in (
        ("info", (1, 0), "fed all the same"),
        ("warning", (2, 0), "fed all the same"),
        ("error", (3, 1), "out"),
    ):
        said = say("flag", "add", "sample:3", "--rule", severity.upper(), "--detail", "looks odd", "--severity", severity, "--actor", "ada")
        assert "affects 1 sample" in said and words in said and "saw" not in said
        assert conn.execute(found).fetchall() == [counts]
    written = conn.execute("SELECT severity, revokes, raised_by FROM flag ORDER BY id").fetchall()
    assert written == [(severity, False, "ada") for severity in ("info", "warning", "error")]


def test_the_same_flag_again_changes_nothing(say: Say, conn: psycopg.Connection) -> None:
    """A second add of an open flag writes nothing, whatever else it says; daemons are not made to plan again; once closed it is new."""
    add = ["flag", "add", subject_of(conn, "sample"), "--rule", "ODD", "--detail"]
    say(*add, "looks odd", "--actor", "ada")
    before = written(conn)
    said = say(*add, "looks odd again", "--severity", "info")
    assert "flag 1 (error)" in said and "is open already, raised by ada" in said and "nothing changed" in said
    assert written(conn) == before
    say("flag", "resolve", 1, "--reason", "looked at it")
    assert "raised" in say(*add, "odd after all")
    assert one(conn, "SELECT count(*) FROM flag") == 2


def test_an_open_flag_is_made_to_revoke(say: Say, conn: psycopg.Connection) -> None:
    """`--revoke` on an open warning makes it an error that revokes, with who and why beside what was found; and then stands."""
    add = ["flag", "add", subject_of(conn, "sample"), "--rule", "ODD", "--detail"]
    say(*add, "looks odd", "--severity", "warning", "--actor", "ada")
    assert "made to revoke" in say(*add, "reader asked for it", "--revoke", "--actor", "bo")
    [(severity, revokes, raised_by, detail)] = conn.execute("SELECT severity, revokes, raised_by, detail FROM flag").fetchall()
    assert (severity, revokes, raised_by) == ("error", True, "ada")
    assert detail.startswith("looks odd; made to revoke by bo at ") and detail.endswith(": reader asked for it")
    before = written(conn)
    assert "nothing changed" in say(*add, "looks odd", "--severity", "warning")
    assert "nothing changed" in say(*add, "looks odd", "--revoke")
    assert written(conn) == before


def test_ingest_does_not_close_what_was_made_to_revoke(say: Say, conn: psycopg.Connection, studies: Path) -> None:
    """A flag of ingest's own that a person made to revoke stands when the file is read again, where ingest would have closed it."""
    file_id = one(conn, "SELECT min(id) FROM file WHERE kind = 'image'")
    conn.execute(
        "INSERT INTO flag (rule, severity, detail, file_id, raised_by) VALUES ('PATIENT-DIFFERS', 'warning', 'differs', %s, 'ingest')",
        [file_id],
    )
    say("flag", "add", f"file:{file_id}", "--rule", "PATIENT-DIFFERS", "--detail", "is another patient", "--revoke")
    conn.execute("UPDATE file SET mtime_ns = 0 WHERE id = %s", [file_id])
    assert "1 file read" in say("ingest", studies, "--jobs", 1)
    assert conn.execute("SELECT state, raised_by FROM flag").fetchall() == [("open", ME)]


def test_many_who_raise_one_flag_leave_one(ingested: str, conn: psycopg.Connection) -> None:
    """Of eight at the same moment one raises it, the others find it open; so with making it revoke."""
    subject = subject_of(conn, "sample")
    with database.open_database(ingested) as db, ThreadPoolExecutor(8) as pool:
        for revoke, change in ((False, "raised"), (True, "made to revoke")):
            calls = [pool.submit(flags.add, db, subject, rule="ODD", detail="odd", revoke=revoke) for _ in range(8)]
            changes = [flag.change for call in calls for flag in call.result().flags]
            assert sorted(changes, key=str) == sorted([change, *[None] * 7], key=str)
    assert conn.execute("SELECT revokes FROM flag").fetchall() == [(True,)]


def test_one_uid_may_be_several_rows(say: Say, conn: psycopg.Connection) -> None:
    """A series under two studies is flagged in both: nothing of it slips through."""
    series = one(conn, "SELECT id FROM series ORDER BY id LIMIT 1")
    conn.execute("UPDATE series SET series_instance_uid = '1.2.3' WHERE id IN (%s, (SELECT max(id) FROM series))", [series])
    said = say("flag", "add", "series:1.2.3", "--rule", "TWICE", "--detail", "two studies", "--revoke")
    assert "affects 32 samples" in said and said.count("on the series raised") == 2
    assert one(conn, "SELECT count(*) FROM revoked_image") == 32


WRONG = [
    (["DOE^JOHN"], "KIND:ID"),
    (["person:DOE^JOHN"], "KIND is one of sample, file"),
    (["patient:"], "KIND:ID"),
    (["sample:DOE^JOHN"], "named by its number"),
    (["sample:-1"], "named by its number"),
    (["sample:" + "9" * 5000], "named by its number"),
    (["patient:SYN0002", "JOHN"], "quotes"),
    (["sample:1", "--rule", "looks odd"], "--rule"),
    (["sample:1", "--detail", " "], "-m: is empty"),
    (["sample:1", "--detail", "caf\udce9"], "-m: is not UTF-8"),
    (["sample:1", "--revoke", "--severity", "info"], "--severity error"),
    (["sample:1", "--actor", "ingest"], "--actor: ingest is the program itself"),
]


def test_an_argument_that_cannot_be_right_is_one_line(say: Say, conn: psycopg.Connection) -> None:
    """A usage error says what is wrong without repeating a name, and nothing is written."""
    before = written(conn)
    for arguments, words in WRONG:
        with pytest.raises(UsageError) as caught:
            say("flag", "add", "--rule", "ODD", "--detail", "odd", *arguments)
        assert words in str(caught.value) and "\n" not in str(caught.value) and "JOHN" not in str(caught.value)
    assert written(conn) == before


def test_an_unknown_subject_is_one_line(say: Say, conn: psycopg.Connection) -> None:
    """What the catalog does not know is not flagged; of the name only a number is repeated."""
    names = {"sample": "999", "file": "999", "annotation": "999", "pairing": "999", "series": "1.9", "study": "1.9", "patient": "DOE^JOHN"}
    for kind, name in [*names.items(), ("patient", "\udce9")]:
        with pytest.raises(CatalogError, match=f"no such {kind} in the catalog") as caught:
            say("flag", "add", f"{kind}:{name}", "--rule", "ODD", "--detail", "odd")
        assert caught.value.exit_code == 1 and "\n" not in str(caught.value)
        assert (name in str(caught.value)) is (name == "999")
    assert one(conn, "SELECT count(*) FROM flag") == 0


def test_a_contour_s_file_cannot_be_revoked_in_vain(say: Say, conn: psycopg.Connection) -> None:
    """Nothing follows from a flag on a file that holds no image, so --revoke is refused there, and the annotation named."""
    annotation, file_id = conn.execute("SELECT id, file_id FROM annotation ORDER BY id LIMIT 1").fetchall()[0]
    with pytest.raises(CatalogError, match=rf"flag annotation:{annotation}$"):
        say("flag", "add", f"file:{file_id}", "--rule", "BAD", "--detail", "bad", "--revoke")
    assert one(conn, "SELECT count(*) FROM flag") == 0
    assert "affects 0 samples" in say("flag", "add", f"file:{file_id}", "--rule", "BAD", "--detail", "bad")


# ------------------------------------------------------------------------------------------ listing and closing


def test_list_shows_what_is_open_and_all(say: Say, conn: psycopg.Connection) -> None:
    """Open flags, those of one rule, all with who closed them and why; as a table of one line each and as JSON."""
    assert say("flag", "list") == "no open flags\n"
    for rule in ("ODD", "WORSE"):
        say("flag", "add", "sample:3", "--rule", rule, "--detail", "looks\nodd")
    say("flag", "false-positive", 1, "-m", "was right", "--actor", "ada")
    assert [line.split()[:2] for line in say("flag", "list").splitlines()[2:]] == [["2", "WORSE"]]
    assert [row["id"] for row in json.loads(say("flag", "list", "--state", "all", "--json"))] == [1, 2]
    assert say("flag", "list", "--rule", "ODD") == "no open flags\n"
    [row] = json.loads(say("flag", "list", "--rule", "ODD", "--state", "all", "--json"))
    assert (row["state"], row["closed_by"], row["reason"], row["subject"]) == ("false_positive", "ada", "was right", "sample:3")
    table = say("flag", "list", "--state", "all").splitlines()
    assert len(table) == 4 and "false_positive" in table[2] and "was right" in table[2] and "looks odd" in table[2]


def test_closing_gives_back_what_no_other_flag_holds(say: Say, conn: psycopg.Connection) -> None:
    """Closing a flag that revokes says how many samples are fed again and how many another flag still revokes: the view agrees."""
    say("flag", "add", f"patient:{PATIENT}", "--rule", "FORM", "--detail", "form is missing", "--revoke")
    say("flag", "add", subject_of(conn, "sample"), "--rule", "NAME-BURNT-IN", "--detail", "a name in the pixels", "--revoke")
    dry = say("flag", "resolve", 1, "--reason", "form found", "--dry-run")
    assert one(conn, "SELECT count(*) FROM revoked_image") == 16
    said = say("flag", "resolve", 1, "--reason", "form found")
    assert said == dry == "flag 1 (FORM) closed: resolved; 15 samples no longer revoked, 1 still are by other flags\n"
    assert one(conn, "SELECT count(*) FROM revoked_image") == 1
    assert "; 1 sample no longer revoked\n" in say("flag", "resolve", 2, "--reason", "cut out")
    closed = conn.execute("SELECT state, closed_by, reason, closed_at IS NULL FROM flag ORDER BY id").fetchall()
    assert closed == [("resolved", ME, "form found", False), ("resolved", ME, "cut out", False)]


def test_a_closed_flag_stays_as_it_was_closed(say: Say, conn: psycopg.Connection) -> None:
    """Closing it again is said and writes nothing; closing it with an open one closes the open one."""
    for rule in ("ODD", "WORSE"):
        say("flag", "add", "sample:3", "--rule", rule, "--detail", "odd")
    say("flag", "resolve", 1, "--reason", "first", "--actor", "ada")
    before = written(conn)
    assert "flag 1 was closed already by ada at" in say("flag", "false-positive", 1, "--reason", "second")
    assert written(conn) == before
    said = say("flag", "resolve", 2, 1, 2, "--reason", "third")
    assert len(said.splitlines()) == 2 and "flag 2 (WORSE) closed: resolved" in said
    assert conn.execute("SELECT reason FROM flag ORDER BY id").fetchall() == [("first",), ("third",)]


def test_closing_is_all_or_nothing(say: Say, conn: psycopg.Connection) -> None:
    """If one of several flags does not exist none is closed, and the line names it; a reason is needed."""
    say("flag", "add", "sample:3", "--rule", "ODD", "--detail", "odd")
    before = written(conn)
    with pytest.raises(CatalogError, match=r"^flag 99: there is none, so nothing was closed; see `catalog flag list"):
        say("flag", "resolve", 1, 99, "--reason", "looked at it")
    with pytest.raises(UsageError, match="-m: is empty"):
        say("flag", "resolve", 1, "--reason", "")
    assert written(conn) == before


def test_daemons_are_told(say: Say, conn: psycopg.Connection) -> None:
    """Raising a flag that revokes, making one revoke and closing it each wake who listens; other flags do not, nor does a dry run."""
    add = ["flag", "add", "sample:3", "--rule", "ODD", "--detail", "odd"]
    conn.execute("LISTEN scanfeed")
    for command, heard in (
        (add, 0), ([*add, "--revoke", "--dry-run"], 0), ([*add, "--revoke"], 1), ([*add, "--revoke"], 0),
        (["flag", "resolve", 1, "--reason", "fine", "--dry-run"], 0), (["flag", "resolve", 1, "--reason", "fine"], 1),
        (["patient", "withdraw", PATIENT, "--dry-run"], 0), (["patient", "withdraw", PATIENT], 1),
    ):  # fmt: skip
        say(*command)
        conn.execute("SELECT 1")
        assert [notice.payload for notice in conn.notifies(timeout=0, stop_after=5)] == ["flag"] * heard, command


# ------------------------------------------------------------------------------------------ opening again, assigning, looking


def events_of(conn: psycopg.Connection, flag_id: int) -> list[tuple[Any, ...]]:
    query = "SELECT actor, action, before, after, reason FROM event WHERE subject = 'flag' AND subject_id = %s ORDER BY id"
    rows = conn.execute(query, [flag_id]).fetchall()
    return [
        (actor, action, {k: v for k, v in (before or {}).items() if v != (after or {}).get(k)} if before else None,
         {k: v for k, v in after.items() if v != (before or {}).get(k)} if before else None, reason)
        for actor, action, before, after, reason in rows
    ]  # fmt: skip


def test_who_when_and_why_stand_in_the_log(say: Say, conn: psycopg.Connection) -> None:
    """Each thing done to a flag is an event with the person who did it and why, also where the row itself says neither."""
    say("flag", "add", "sample:3", "--rule", "ODD", "-m", "looks odd", "--severity", "warning", "--actor", "ada")
    say("flag", "add", "sample:3", "--rule", "ODD", "-m", "reader asked", "--revoke", "--actor", "bo")
    say("flag", "assign", 1, "--to", "cy", "-m", "knows the scanner", "--actor", "di")
    say("flag", "resolve", 1, "-m", "cut out", "--actor", "cy")
    say("flag", "reopen", 1, "-m", "was not", "--actor", "ada")
    say("flag", "false-positive", 1, "-m", "is right", "--actor", "bo")
    assert events_of(conn, 1) == [
        ("ada", "insert", None, None, "looks odd"),
        ("bo", "update", {"severity": "warning", "revokes": False}, {"severity": "error", "revokes": True}, "reader asked"),
        ("di", "update", {}, {"assigned_to": "cy"}, "knows the scanner"),
        ("cy", "update", {"state": "open"}, {"state": "resolved"}, "cut out"),
        ("ada", "update", {"state": "resolved"}, {"state": "open"}, "was not"),
        ("bo", "update", {"state": "open"}, {"state": "false_positive"}, "is right"),
    ]
    found = json.loads(say("flag", "show", 1, "--json"))
    assert (found["id"], found["subject"], found["state"], found["assigned_to"]) == (1, "sample:3", "false_positive", "cy")
    assert [(one["actor"], one["reason"]) for one in found["history"]] == [(row[0], row[4]) for row in events_of(conn, 1)]
    lines = say("flag", "show", 1).splitlines()
    assert lines[0] == "flag 1 (ODD version 1, error): false positive, revokes, on sample:3"
    assert [line.split()[2] for line in lines[-6:]] == ["ada", "bo", "di", "cy", "ada", "bo"]
    assert "revokes no → yes; severity warning → error" in lines[-5] and lines[-5].endswith("reader asked")
    assert "assigned_to none → cy" in lines[-4] and "state resolved → open" in lines[-2]
    with pytest.raises(CatalogError, match=r"^flag 9: there is none; see"):
        say("flag", "show", 9)


def test_show_says_what_a_rule_means(say: Say, conn: psycopg.Connection) -> None:
    """Of a flag that one of our rules raised the rule's own words are shown, too."""
    conn.execute(
        "INSERT INTO flag (rule, severity, detail, value, raised_by, pairing_id) "
        "SELECT 'RELATION-LARGER', 'error', 'inner has 9 px, outer has 8 px', 1.125, 'qa', min(id) FROM pairing"
    )
    said = say("flag", "show", 1)
    assert "found: inner has 9 px, outer has 8 px (value 1.125)\n" in said and "\nmeans: On one image" in said and "\ndo: Look" in said
    assert "raised (error)" in said and "qa" in said


def test_what_is_opened_again_acts_at_once(say: Say, conn: psycopg.Connection) -> None:
    """A closed flag is as it was: one that revokes does so again and daemons are told; a dry run says the same and does nothing."""
    say("flag", "add", f"patient:{PATIENT}", "--rule", "FORM", "-m", "form is missing", "--revoke")
    say("flag", "resolve", 1, "-m", "found", "--actor", "ada")
    conn.execute("LISTEN scanfeed")
    before = written(conn)
    dry = say("flag", "reopen", 1, "-m", "another one's", "--dry-run")
    assert written(conn) == before and list(conn.notifies(timeout=0)) == []
    assert say("flag", "reopen", 1, "-m", "another one's") == dry
    assert dry == "flag 1 (FORM) is open again; it was resolved; 16 samples fed no more\n"
    assert [notice.payload for notice in conn.notifies(timeout=60, stop_after=1)] == ["flag"]
    assert one(conn, "SELECT count(*) FROM revoked_image") == 16
    row = conn.execute("SELECT state, closed_by, closed_at, reason, raised_by, detail FROM flag").fetchone()
    assert row == ("open", None, None, None, ME, "form is missing")
    before = written(conn)
    assert say("flag", "reopen", 1, "-m", "again") == "flag 1 (FORM) is open: nothing changed\n"
    assert written(conn) == before


def test_one_finding_is_open_once(say: Say, conn: psycopg.Connection) -> None:
    """A flag is not opened again where one says the same already, and then no other of the command is; two of one finding neither."""
    for _ in range(2):
        say("flag", "add", "sample:3", "--rule", "ODD", "-m", "odd")
        say("flag", "resolve", one(conn, "SELECT max(id) FROM flag"), "-m", "fine")
    say("flag", "add", "sample:4", "--rule", "ODD", "-m", "odd")
    say("flag", "resolve", 3, "-m", "fine")
    before = written(conn)
    with pytest.raises(CatalogError, match=r"^flag 2: flag 1 says the same of the same sample and is open, so nothing was opened$"):
        say("flag", "reopen", 3, 2, 1, "-m", "not fine")
    assert written(conn) == before
    say("flag", "reopen", 3, 2, "-m", "not fine")
    assert conn.execute("SELECT id FROM flag WHERE state = 'open' ORDER BY id").fetchall() == [(2,), (3,)]
    with pytest.raises(CatalogError, match="flag 1: flag 2 says the same"):
        say("flag", "reopen", 1, "-m", "not fine")


def test_assigning_is_taken_back_and_all_or_nothing(say: Say, conn: psycopg.Connection) -> None:
    """Open flags get a name, lose it by '', and are not written where it is theirs already; a closed or unknown one refuses all."""
    for sample in (3, 4, 5):
        say("flag", "add", f"sample:{sample}", "--rule", "ODD", "-m", "odd")
    say("flag", "resolve", 3, "-m", "fine")
    assert say("flag", "assign", 2, 1, "--to", "ada", "-m", "hers").splitlines()[0] == "flag 1 (ODD) assigned to ada; it was nobody's"
    before = written(conn)
    assert say("flag", "assign", 1, "--to", "ada", "-m", "hers") == "flag 1 (ODD) is ada's: nothing changed\n"
    say("flag", "assign", 1, "--to", "bo", "-m", "his", "--dry-run")
    with pytest.raises(CatalogError, match=r"flag 3: is closed \(resolved\), so nothing was assigned"):
        say("flag", "assign", 1, 3, "--to", "bo", "-m", "his")
    with pytest.raises(CatalogError, match="flag 9: there is none, so nothing was assigned"):
        say("flag", "assign", 1, 9, "--to", "bo", "-m", "his")
    with pytest.raises(UsageError, match="--to: is empty"):
        say("flag", "assign", 1, "--to", " ", "-m", "his")
    assert written(conn) == before
    assert [row["id"] for row in json.loads(say("flag", "list", "--assigned-to", "ada", "--json"))] == [1, 2]
    assert say("flag", "assign", 1, "--to", "", "-m", "is away") == "flag 1 (ODD) assigned to nobody; it was ada's\n"
    assert [row["id"] for row in json.loads(say("flag", "list", "--assigned-to", "", "--json"))] == [1]


def test_a_reason_is_always_asked_for(ingested: str, catalog: Run, conn: psycopg.Connection) -> None:
    """Without -m nothing is decided: exit code 2 and one line; an empty one is none."""
    for arguments in (["add", "sample:3", "--rule", "ODD"], *([name, "1"] for name in ("resolve", "false-positive", "reopen")),
                      ["assign", "1", "--to", "ada"]):  # fmt: skip
        for reason in ([], ["-m", " "]):
            done = catalog("flag", *arguments, *reason)
            assert (done.returncode, done.stdout) == (2, ""), done
            assert len(done.stderr.splitlines()) == 1 and "-m" in done.stderr
    assert one(conn, "SELECT count(*) FROM flag") == 0


def test_the_list_is_narrowed(say: Say, conn: psycopg.Connection) -> None:
    """Each option alone and together gives what a query on the table gives; what was left out by --limit is said."""
    for kind in flags.NAMED_BY:
        for rule, severity in (("MASK-ODD", "error"), ("MASK-OTHER", "warning"), ("FORM", "info")):
            say("flag", "add", subject_of(conn, kind), "--rule", rule, "-m", "odd", "--severity", severity)
    say("flag", "resolve", 1, 5, "-m", "fine")
    say("flag", "false-positive", 2, "-m", "fine")

    def ids(*options: object) -> list[int]:
        return [row["id"] for row in json.loads(say("flag", "list", "--json", *options))]

    def where(condition: str) -> list[int]:
        return [row[0] for row in conn.execute(f"SELECT id FROM flag WHERE {condition} ORDER BY id").fetchall()]

    assert ids("--rule", "mask-*") == where("state = 'open' AND rule LIKE 'MASK-%'") != []
    assert ids("--rule", "MASK-O??") == where("state = 'open' AND rule = 'MASK-ODD'")
    assert ids("--rule", "NOT-ONE-*") == []
    assert ids("--severity", "warning", "--state", "all") == where("severity = 'warning'")
    assert ids("--state", "resolved") == [1, 5] and ids("--state", "false_positive") == [2]
    for kind, (table, _) in flags.NAMED_BY.items():
        assert ids("--subject", kind, "--state", "all") == where(f"{table}_id IS NOT NULL") != []
    assert ids("--limit", 2, "--severity", "error") == where("state = 'open' AND severity = 'error'")[:2]
    assert {kind.value for kind in flaglist.Kind} == set(flags.NAMED_BY)


def test_all_that_keeps_a_sample_out_is_listed(say: Say, conn: psycopg.Connection) -> None:
    """--sample gives what error_flags of the views count, for each kind of subject: on it, of it and above it; of others nothing."""
    sample = int(subject_of(conn, "sample").partition(":")[2])
    for kind in flags.NAMED_BY:
        say("flag", "add", subject_of(conn, kind), "--rule", "ODD", "-m", "odd")
    say("flag", "add", "patient:SYN0001", "--rule", "ODD", "-m", "odd")
    found = json.loads(say("flag", "list", "--sample", sample, "--json"))
    assert sorted(row["subject"].partition(":")[0] for row in found) == sorted(flags.NAMED_BY)
    counted = "SELECT max(error_flags) FROM annotation_all WHERE sample_id = %s AND current AND pairing_state = 'accepted'"
    assert one(conn, counted, sample) == len(found) == 7
    below = [
        row["subject"].partition(":")[0] for row in json.loads(say("flag", "list", "--sample", max(images_of(conn, PATIENT)), "--json"))
    ]
    assert sorted(below) == ["patient", "series", "study"]
    with pytest.raises(CatalogError, match="sample 9999: no such sample"):
        say("flag", "list", "--sample", 9999)


# ------------------------------------------------------------------------------------------ consent


def test_withdraw_says_what_it_takes_out_and_who_saw_it(say: Say, conn: psycopg.Connection) -> None:
    """Images and annotations, and for each run and stream: epochs, samples, deliveries, times and models; of others nothing."""
    samples = images_of(conn, PATIENT)
    other = images_of(conn, "SYN0001")
    for epoch in (0, 1, 3):
        feed(conn, "unet-3", epoch, [*other, *samples[:5]])
    feed(conn, "unet-4", 0, samples[4:7], attempts=2)  # the second attempt replaced the first: both read the pixels
    feed(conn, "elsewhere", 0, other)
    conn.execute(
        "INSERT INTO run_note (run_id, actor, model_sha256) "
        "SELECT id, 'ada', sha256('model') FROM run WHERE name IN ('unet-3', 'elsewhere')"
    )
    pruned = feed(conn, "old", 7, samples)
    conn.execute("DELETE FROM ledger WHERE epoch_id = %s", [pruned])
    conn.execute("DELETE FROM epoch_order WHERE epoch_id = %s", [pruned])
    conn.execute(
        "UPDATE epoch SET pruned_at = now(), summary = '{}', patients = ARRAY(SELECT id FROM patient WHERE patient_id = %s) WHERE id = %s",
        [PATIENT, pruned],
    )
    before = written(conn)
    dry_text, dry = say("patient", "withdraw", PATIENT, "--dry-run"), json.loads(say("patient", "withdraw", PATIENT, "--dry-run", "--json"))
    assert written(conn) == before
    found = json.loads(say("patient", "withdraw", PATIENT, "--reason", "letter of 3 May", "--json"))
    assert {**found, "flag": None, "dry_run": True} == dry
    assert (found["flag"], found["change"], found["images"]) == (1, "raised", 16)
    assert found["annotations"] == one(conn, "SELECT count(*) FROM sample WHERE patient = %s", PATIENT) > 0
    sha256 = "9372c470eeadd5ecd9c3c74c2b3cb633f8e2f2fad799250a0f70d652b6b825e4"
    seen = {
        row["run"]: [row[name] for name in ("stream_name", "epochs", "samples", "deliveries", "models", "pruned")] for row in found["seen"]
    }
    assert seen == {
        "unet-3": ["heart", [0, 1, 3], 5, 15, [sha256], []],
        "unet-4": ["heart", [0], 3, 6, [], []],
        "old": ["heart", [7], 0, 0, [], [7]],
    }
    assert all(row["first"] <= row["last"] for row in found["seen"])
    assert conn.execute("SELECT rule, severity, revokes, state, detail, raised_by FROM flag").fetchall() == [
        ("PATIENT-WITHDRAWN", "error", True, "open", "consent withdrawn: letter of 3 May", ME)
    ]
    again = say("patient", "withdraw", PATIENT)
    assert "is open already" in again and again.splitlines()[1:] == dry_text.splitlines()[1:]
    assert "takes out 16 images and 6 annotations" in again and "seen already by 3 runs:" in again
    [line] = [line for line in again.splitlines() if line.startswith("unet-3")]
    assert line.split()[1:6] == ["heart", "0-1,", "3", "5", "15"] and line.endswith(sha256)
    assert PATIENT not in again + dry_text
    # The same history for one of its samples: of the pruned epoch it is not known.
    said = say("flag", "add", f"sample:{samples[0]}", "--rule", "ODD", "--detail", "odd", "--revoke")
    assert [row.split()[0] for row in said.splitlines()[5:]] == ["unet-3", "old", "+"]
    assert "seen already by 2 runs:" in said


def test_what_comes_later_of_a_withdrawn_patient_is_revoked_too(say: Say, conn: psycopg.Connection, tmp_path: Path) -> None:
    """A second ingest, of another root with new images of the patient, adds to revoked_image at once; reinstating frees all."""
    say("patient", "withdraw", PATIENT)
    synthetic.write_studies(tmp_path / "later", patients=2, slices=2, phases=2, size=64, seed=99)
    say("ingest", tmp_path / "later", "--jobs", 1)
    assert len(images_of(conn, PATIENT)) == 20
    revoked = [row[0] for row in conn.execute("SELECT sample_id FROM revoked_image ORDER BY 1")]
    assert revoked == images_of(conn, PATIENT)
    assert one(conn, "SELECT min(error_flags) FROM sample WHERE patient = %s", PATIENT) == 1
    assert one(conn, "SELECT max(error_flags) FROM sample WHERE patient <> %s", PATIENT) == 0
    assert "revoked: 20 samples" in say("status")
    assert "takes out 20 images" in say("patient", "withdraw", PATIENT)
    before = written(conn)
    dry = say("patient", "reinstate", PATIENT, "--reason", "signed again", "--dry-run")
    assert written(conn) == before
    assert say("patient", "reinstate", PATIENT, "--reason", "signed again", "--actor", "ada") == dry
    assert dry == "flag 1 (PATIENT-WITHDRAWN) closed: resolved; 20 samples no longer revoked\n"
    assert one(conn, "SELECT count(*) FROM revoked_image") == 0
    assert conn.execute("SELECT state, closed_by, reason FROM flag").fetchall() == [("resolved", "ada", "signed again")]
    assert say("patient", "reinstate", PATIENT, "--reason", "again") == "the patient is not withdrawn: nothing changed\n"


def test_an_unknown_patient_s_name_goes_nowhere(ingested: str, catalog: Run) -> None:
    """Exit code 1 and one line without the name; an unquoted name, exit code 2 and one line without its words."""
    for command in ("withdraw", "reinstate"):
        done = catalog("patient", command, "DOE^JOHN", "--reason", "why")
        assert (done.returncode, done.stdout) == (1, "")
        [line] = done.stderr.splitlines()
        assert line.startswith("catalog: no such patient") and "DOE" not in line
        done = catalog("patient", command, "DOE", "JOHN", "--reason", "why")
        assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
        assert "DOE" not in done.stderr and "JOHN" not in done.stderr and "quotes" in done.stderr


def test_a_known_patient_s_name_goes_nowhere_else(ingested: str, catalog: Run) -> None:
    """Neither withdrawing nor flagging a patient prints the name; the list of flags, which somebody asks for, does."""
    for arguments in (
        ["patient", "withdraw", PATIENT], ["patient", "withdraw", PATIENT, "--dry-run", "--json"],
        ["flag", "add", f"patient:{PATIENT}", "--rule", "ODD", "--detail", "odd"], ["flag", "resolve", "2", "--reason", "fine"],
        ["patient", "reinstate", PATIENT, "--reason", "signed"],
    ):  # fmt: skip
        done = catalog(*arguments)
        assert done.returncode == 0, done.stderr
        assert PATIENT not in done.stdout + done.stderr
        assert done.stderr == ("catalog: dry run: nothing was changed; this is what would be said\n" if "--dry-run" in arguments else "")
    assert f"patient:{PATIENT}" in catalog("flag", "list", "--state", "all").stdout


def test_the_actor_is_who_runs_it_whatever_the_environment_says(ingested: str, conn: psycopg.Connection) -> None:
    """Without --actor the account of the process is written down, not $USER."""
    command = [sys.executable, "-m", "catalog.cli", "flag", "add", "sample:3", "--rule", "ODD", "--detail", "odd"]
    subprocess.run(command, env={**os.environ, "USER": "eve", "LOGNAME": "eve"}, check=True, capture_output=True)
    assert conn.execute("SELECT raised_by FROM flag").fetchall() == [(ME,)]


def test_sql_from_users_may_ask_what_was_revoked(say: Say, conn: psycopg.Connection) -> None:
    """`catalog sql` reads flags, revoked_image and sample_history."""
    feed(conn, "unet-3", 0, images_of(conn, PATIENT))
    say("patient", "withdraw", PATIENT)
    query = "SELECT count(*) AS n FROM revoked_image JOIN sample_history USING (sample_id) WHERE EXISTS (SELECT FROM flag WHERE revokes)"
    assert json.loads(say("sql", query, "--json")) == [{"n": 16}]
