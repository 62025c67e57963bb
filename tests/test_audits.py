"""What auditors open: each view gives the rows that it should, and those that must be empty are so until somebody breaks something."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest

from catalog import auditing, cli, contours, database, overlaps
from catalog.errors import CatalogError, UsageError
from loaderd import Feed
from tests.conftest import Run
from tests.processes import daemons, server_ended, wait_until

EMPTY = [name for name, audit in auditing.load().items() if audit.must_be_empty]


def rows(conn: psycopg.Connection, view: str, columns: str = "*", **where: object) -> list[tuple[Any, ...]]:
    condition = " AND ".join(f"{name} = %({name})s" for name in where) or "true"
    return conn.execute(f"SELECT {columns} FROM {view} WHERE {condition}".encode(), where).fetchall()


# ------------------------------------------------------------------------------------------ the files and the views


def test_the_views_are_those_of_the_files(database_url: str, conn: psycopg.Connection) -> None:
    """The migration installed what the files say: query, comments, columns in their order; each column says what it is."""
    audits = auditing.load()
    assert {"inventory", "runs_and_errors", "unpaired", "duplicates", "pairing_provenance", "open_flags", "flag_history", "area_profile",
            "reader_agreement", "deliveries", "exposure", "constraint_state", "orphans"} <= audits.keys()  # fmt: skip
    for statement in auditing.statements():
        if statement.startswith("CREATE VIEW "):
            _, _, name, _, query = statement.split(maxsplit=4)
            conn.execute(f"CREATE VIEW from_file AS {query}".encode())
            [[installed, asked]] = conn.execute(
                "SELECT pg_get_viewdef(%s::regclass), pg_get_viewdef('from_file'::regclass)", [name]
            ).fetchall()
            assert installed == asked, f"{name}: a new migration must install what the file says now"
            conn.execute("DROP VIEW from_file")
    for name, audit in audits.items():
        comments = conn.execute(
            "SELECT attname, col_description(attrelid, attnum) FROM pg_attribute "
            "WHERE attrelid = %s::regclass AND attnum > 0 ORDER BY attnum",
            [name],
        ).fetchall()
        assert comments == list(audit.columns.items()), name
        [[comment]] = conn.execute("SELECT obj_description(%s::regclass, 'pg_class')", [name]).fetchall()
        assert audit.title in comment and audit.means in comment


def test_a_file_that_is_no_audit_is_told(tmp_path: Path) -> None:
    """Without a head that says whether it must be empty nobody knows what a row means."""
    (tmp_path / "odd.sql").write_text("-- title: Odd\n-- means: nothing\nSELECT 1\n")
    with pytest.raises(CatalogError, match=r"odd\.sql: is no audit"):
        auditing.parse(tmp_path / "odd.sql")


# ------------------------------------------------------------------------------------------ what each gives


def test_inventory_and_runs(ingested: str, conn: psycopg.Connection) -> None:
    """Three synthetic patients, 48 images of 64×64; one run without errors; a file that is gone counts as not present."""
    [row] = rows(conn, "inventory", "root, modality, patients, studies, series, images, sizes, annotated, structures, not_present, files")
    [[annotated]] = conn.execute("SELECT count(DISTINCT image_id) FROM pairing").fetchall()
    assert row == ("studies0", "MR", 3, 3, 3, 48, "64×64", annotated, "inner, outer", 0, 48)
    [[annotations, size]] = conn.execute(
        "SELECT (SELECT count(*) FROM pairing), (SELECT sum(size) FROM file WHERE kind = 'image')"
    ).fetchall()
    assert rows(conn, "inventory", "annotations, bytes") == [(annotations, size)]
    conn.execute("UPDATE file SET state = 'missing' WHERE id = (SELECT min(file_id) FROM location)")
    assert rows(conn, "inventory", "images, not_present") == [(48, 1)]
    assert rows(conn, "runs_and_errors", "run, state, stage, code, errors") == [(1, "finished", None, None, 0)]
    for code in ("no-pixels", "no-pixels", "not-dicom"):
        conn.execute("INSERT INTO ingest_error (ingest_run_id, path, stage, code, message) VALUES (1, 'x', 'read', %s, 'x')", [code])
    assert rows(conn, "runs_and_errors", "stage, code, errors") == [("read", "no-pixels", 2), ("read", "not-dicom", 1)]


def test_unpaired_and_provenance(ingested: str, conn: psycopg.Connection) -> None:
    """A pairing that is rejected or only proposed leaves its annotation unpaired; past versions are not asked about."""
    assert rows(conn, "unpaired") == []
    pairings = rows(conn, "pairing_provenance", "pairing_id, annotation_id, state, by_person, decisions")
    assert {row[2:] for row in pairings} == {("accepted", False, 1)}
    (first, one, *_), (second, two, *_), (third, three, *_) = pairings[:3]
    conn.execute("UPDATE pairing SET state = 'rejected', actor = 'ada' WHERE id = %s", [first])
    conn.execute("UPDATE pairing SET state = 'proposed' WHERE id = ANY(%s)", [[second, third]])
    conn.execute("UPDATE annotation SET current = false WHERE id = %s", [three])
    conn.execute(
        "INSERT INTO flag (rule, severity, detail, annotation_id, raised_by) VALUES ('PAIR-AMBIGUOUS', 'error', 'two fit', %s, 'ingest')",
        [two],
    )
    assert rows(conn, "unpaired", "annotation_id, proposed, rejected, why") == [(one, 0, 1, None), (two, 1, 0, "PAIR-AMBIGUOUS: two fit")]
    assert rows(conn, "pairing_provenance", "state, by_person, decisions", pairing_id=first) == [("rejected", True, 2)]
    assert rows(conn, "pairing_provenance", annotation_id=three) == []


def test_duplicates(ingested: str, conn: psycopg.Connection) -> None:
    """Equal pixels under two patients, equal files, and one UID with two contents."""
    assert rows(conn, "duplicates") == []
    [[a], [b]] = conn.execute(
        "SELECT min(i.id) FROM image i JOIN instance n ON n.id = i.instance_id GROUP BY n.series_id ORDER BY 1 LIMIT 2"
    ).fetchall()
    conn.execute("UPDATE image SET pixel_hash = (SELECT pixel_hash FROM image WHERE id = %s) WHERE id = %s", [a, b])
    conn.execute("UPDATE file SET content_hash = '\\x01' WHERE id IN (SELECT id FROM file WHERE state = 'present' ORDER BY id LIMIT 3)")
    conn.execute("UPDATE instance SET sop_instance_uid = '1.2.3' WHERE id IN (SELECT id FROM instance ORDER BY id LIMIT 2)")
    found = {row[0]: row[1:] for row in rows(conn, "duplicates", "what, count, patients, series, ids")}
    assert found["pixels"] == (2, 2, 2, sorted([a, b]))
    assert found["file"][:3] == (3, None, None) and len(found["file"][3]) == 3
    assert found["uid"][0] == 2 and set(found) == {"pixels", "file", "uid"}


def test_flags_and_their_history(ingested: str, conn: psycopg.Connection) -> None:
    """Open flags, errors first, with their subject; each change of one in its history, also of a flag that is gone."""
    conn.execute(
        "INSERT INTO flag (rule, severity, detail, value, series_id, raised_by) SELECT 'A', 'info', 'x', 1, min(id), 'qa' FROM series"
    )
    conn.execute("INSERT INTO flag (rule, severity, detail, pairing_id, raised_by) SELECT 'B', 'error', 'x', min(id), 'ada' FROM pairing")
    [[series, pairing]] = conn.execute("SELECT min(s.id), (SELECT min(id) FROM pairing) FROM series s").fetchall()
    assert rows(conn, "open_flags", "rule, severity, subject, subject_id") == [
        ("B", "error", "pairing", pairing), ("A", "info", "series", series)
    ]  # fmt: skip
    conn.execute("UPDATE flag SET value = 2 WHERE rule = 'A'")
    conn.execute("UPDATE flag SET state = 'resolved', closed_by = 'bo', closed_at = now(), reason = 'well' WHERE rule = 'A'")
    conn.execute("DELETE FROM flag WHERE rule = 'A'")
    history = rows(conn, "flag_history", "action, actor, state_before, state_after, value_before, value_after, reason", rule="A")
    [[me]] = conn.execute("SELECT session_user::text").fetchall()
    assert history == [
        ("insert", "qa", None, "open", None, 1, None),
        ("update", "qa", "open", "open", 1, 2, None),
        ("update", "bo", "open", "resolved", 2, 2, "well"),
        ("delete", me, "resolved", None, 2, None, None),
    ]
    assert {row[0] for row in rows(conn, "flag_history", "login")} == {me}
    assert [row[0] for row in rows(conn, "open_flags", "rule")] == ["B"]


def test_area_profile(ingested: str, conn: psycopg.Connection) -> None:
    """Along the slices of one phase by position: areas in px and mm², and the share by which each differs from the slice before."""
    found = rows(conn, "area_profile", "series_id, structure, phase, position, area_px, area_mm2, change, sample_id")
    assert len(found) == conn.execute("SELECT count(*) FROM mask").fetchall()[0][0]
    before: tuple[Any, ...] | None = None
    for row in found:
        [[area, spacing]] = conn.execute(
            "SELECT m.area_px, i.row_spacing * i.column_spacing FROM mask m JOIN pairing p ON p.id = m.pairing_id "
            "JOIN annotation a ON a.id = p.annotation_id JOIN structure s ON s.id = a.structure_id JOIN image i ON i.id = p.image_id "
            "WHERE i.id = %s AND s.name = %s",
            [row[7], row[1]],
        ).fetchall()
        assert row[4] == area and row[5] == pytest.approx(area * spacing, abs=0.01)
        if before is None or before[:3] != row[:3]:
            assert row[6] is None
        else:
            assert row[3] > before[3] and row[6] == pytest.approx(area / before[4] - 1, abs=1e-4)
        before = row
    assert any(row[6] is not None for row in found)


def test_reader_agreement(ingested: str, conn: psycopg.Connection) -> None:
    """A second reader's mask of the same structure, moved by two rows: Dice is that of the two rasters, computed here from their pixels."""
    assert rows(conn, "reader_agreement") == []
    [[pairing, image, area]] = conn.execute(
        "SELECT p.id, p.image_id, m.area_px FROM pairing p JOIN mask m ON m.pairing_id = p.id ORDER BY p.id LIMIT 1"
    ).fetchall()
    conn.execute("INSERT INTO reader (name) VALUES ('second')")
    conn.execute(
        "INSERT INTO annotation (file_id, source_key, reader_id, structure_id, kind, origin, points, rings, convention, content_hash, "
        "ingest_run_id) SELECT a.file_id, 'second', r.id, a.structure_id, a.kind, a.origin, a.points, a.rings, a.convention, "
        "sha256(a.content_hash), a.ingest_run_id FROM annotation a JOIN pairing p ON p.annotation_id = a.id, reader r "
        "WHERE p.id = %s AND r.name = 'second'",
        [pairing],
    )
    conn.execute(
        "INSERT INTO pairing (annotation_id, image_id, method, rule, score, state, actor) "
        "SELECT max(id), %s, 'manual', 'x', 1, 'accepted', 'second' FROM annotation",
        [image],
    )
    conn.execute(
        "INSERT INTO mask (pairing_id, rows, columns, box_row, box_column, box_rows, box_columns, bits) "
        "SELECT (SELECT max(id) FROM pairing), rows, columns, box_row + 2, box_column, box_rows, box_columns, bits FROM mask "
        "WHERE pairing_id = %s",
        [pairing],
    )
    assert rows(conn, "reader_agreement", "both_px, dice") == [(None, None)]
    conn.execute("INSERT INTO scope SELECT se.id, st.id, st.patient_id FROM series se JOIN study st ON st.id = se.study_id")
    with conn.transaction():
        overlaps.bring_up(conn)
    both = []
    for row in conn.execute(
        "SELECT rows, columns, box_row, box_column, box_rows, box_columns, bits FROM mask "
        "WHERE pairing_id IN (%s, (SELECT max(id) FROM pairing))",
        [pairing],
    ).fetchall():
        full = np.zeros(row[:2], bool)
        full[row[2] : row[2] + row[4], row[3] : row[3] + row[5]] = contours.unpack(row[6], row[4], row[5])
        both.append(full)
    shared = int((both[0] & both[1]).sum())
    assert 0 < shared < area
    found = rows(conn, "reader_agreement", "sample_id, other_reader, area_px, other_px, both_px, dice")
    assert found == [(image, "second", area, area, shared, pytest.approx(shared / area, abs=1e-6))]


def test_deliveries_and_exposure_of_runs(ingested: str, conn: psycopg.Connection) -> None:
    """Two epochs of a training: each planned position delivered; every patient of it was seen; revoking shows who had seen what."""
    with Feed(structures=["inner"], batch_size=2, run="seen") as feed:
        for _ in range(2):
            for batch in feed.epoch():
                del batch
        samples = feed.num_samples
    assert wait_until(lambda: daemons() == [])
    assert rows(conn, "deliveries", "run, epoch, planned, delivered, finished, consumers") == [
        ("seen", 0, samples, samples, True, 1), ("seen", 1, samples, samples, True, 1),
    ]  # fmt: skip
    patients = conn.execute(
        "SELECT patient, count(DISTINCT sample_id) FROM sample WHERE structure = 'inner' GROUP BY 1 ORDER BY 1"
    ).fetchall()
    assert rows(conn, "run_exposure", "patient, samples, epochs, revoked") == [(name, count, 2, False) for name, count in patients]
    conn.execute(
        "INSERT INTO flag (rule, severity, detail, revokes, patient_id, raised_by) "
        "SELECT 'PATIENT-WITHDRAWN', 'error', 'x', true, id, 'ada' FROM patient WHERE patient_id = %s",
        [patients[0][0]],
    )
    assert [row[0] for row in rows(conn, "run_exposure", "patient", revoked=True)] == [patients[0][0]]
    assert rows(conn, "delivery_gaps") == []
    conn.execute("DELETE FROM ledger WHERE id = (SELECT max(id) FROM ledger WHERE outcome = 'delivered')")
    [gap] = rows(conn, "delivery_gaps", "run, missing > 0, twice, beyond")
    assert gap == ("seen", True, 0, 0)
    conn.execute("UPDATE epoch SET num_samples = num_samples - 1 WHERE epoch = 0")
    assert 1 in [row[0] for row in rows(conn, "delivery_gaps", "beyond")]
    assert "epoch" in {row[0] for row in rows(conn, "orphans", "subject")}


def test_exposure(ingested: str, conn: psycopg.Connection) -> None:
    """Who may read and write: the owner all, the login for SQL all but its own password and what is private."""
    [[me, login]] = conn.execute("SELECT current_user::text, role FROM sql_login").fetchall()
    [own] = rows(conn, "exposure", "reads, writes, owns > 50, reads_private, writes_private", role=me)
    assert own == ("all", "all", True, "all", "all")
    assert rows(conn, "exposure", "may_log_in, superuser, reads, writes, owns, reads_private, writes_private", role=login) == [
        (True, False, "all but sql_login", "nothing", 0, "nothing", "nothing")
    ]


def test_exposure_of_what_is_private(ingested: str, conn: psycopg.Connection) -> None:
    """Who may read where files lie is listed for that alone, table by table; a grant behind a closed schema is none."""
    name = f"curious_{uuid.uuid4().hex[:8]}"
    conn.execute(f"CREATE ROLE {name}".encode())
    try:
        conn.execute(f"GRANT SELECT ON private.file_path, private.name TO {name}".encode())
        conn.execute(f"GRANT UPDATE (url) ON private.root_url TO {name}".encode())
        assert rows(conn, "exposure", role=name) == []
        conn.execute(f"GRANT USAGE ON SCHEMA private TO {name}".encode())
        assert rows(conn, "exposure", "reads, writes, reads_private, writes_private", role=name) == [
            ("nothing", "nothing", "file_path, name", "root_url")
        ]
    finally:
        conn.execute(f"DROP OWNED BY {name}; DROP ROLE {name}".encode())


# ------------------------------------------------------------------------------------------ what must be empty

# The last patient's last image has the pixels of the first one's first.
SHARED_PIXELS = "UPDATE image SET pixel_hash = (SELECT pixel_hash FROM image ORDER BY id LIMIT 1) WHERE id = (SELECT max(id) FROM image)"
BROKEN = {
    "constraint_state": [
        "ALTER TABLE event DISABLE TRIGGER refuse_change",
        "ALTER TABLE flag DISABLE TRIGGER ALL",
        "DROP TRIGGER record_update ON pairing",
        "DROP TRIGGER note_change ON mask",
        "DROP TRIGGER touch_insert ON shape",
        "ALTER TABLE pairing ENABLE REPLICA TRIGGER record_insert",
        "CREATE OR REPLACE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL;END'",
        "CREATE OR REPLACE FUNCTION record_flag() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL;END'",
        "ALTER TABLE mask ADD CONSTRAINT late CHECK (rows < 100000) NOT VALID",
        "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'ix_pairing_accepted'::regclass",
        "ALTER TABLE flag ENABLE ROW LEVEL SECURITY",
        "CREATE RULE swallow AS ON DELETE TO pairing DO INSTEAD NOTHING",
    ],
    "orphans": [
        "INSERT INTO study (patient_id, study_instance_uid) SELECT min(id), '1.2' FROM patient",
        "INSERT INTO series (study_id, series_instance_uid) SELECT min(id), '1.2' FROM study",
        "INSERT INTO instance (series_id, sop_instance_uid, number_of_frames) SELECT min(id), '1.2', 1 FROM series",
        "UPDATE image SET frame = 7 WHERE id = (SELECT min(id) FROM image)",
        "UPDATE location SET preferred = false WHERE image_id = (SELECT min(id) FROM image)",
        "DELETE FROM mask WHERE pairing_id = (SELECT min(pairing_id) FROM mask)",
        "UPDATE mask SET rows = rows + 1 WHERE pairing_id = (SELECT min(pairing_id) FROM mask)",
        "UPDATE mask SET box_rows = 3, box_columns = 3, bits = '\\xffff' WHERE pairing_id = (SELECT min(pairing_id) FROM mask)",
        "UPDATE shape SET largest_px = largest_px + 1 WHERE pairing_id = (SELECT min(pairing_id) FROM shape WHERE components = 1)",
        "DROP INDEX ix_annotation_current; "
        "UPDATE annotation SET (file_id, current) = (SELECT min(file_id), true FROM annotation), version = 2 "
        "WHERE id = (SELECT max(id) FROM annotation)",
        "INSERT INTO flag (rule, severity, detail, image_id, raised_by, state, closed_at) "
        "SELECT 'X', 'info', 'x', min(id), 'x', 'resolved', now() FROM image",
    ],
    "unrecorded_changes": [
        "ALTER TABLE pairing DISABLE TRIGGER record_update; UPDATE pairing SET state = 'rejected' WHERE id = 1",
        "ALTER TABLE annotation DISABLE TRIGGER record_update; UPDATE annotation SET shift_x = 1 WHERE id = 1",
        "ALTER TABLE flag DISABLE TRIGGER record_insert; "
        "INSERT INTO flag (rule, severity, detail, image_id, raised_by) SELECT 'X', 'info', 'x', min(id), 'x' FROM image",
        "ALTER TABLE flag DISABLE TRIGGER record_delete; DELETE FROM flag",
        "ALTER TABLE flag DISABLE TRIGGER record_update; UPDATE flag SET severity = 'error'",
    ],
    "delivery_gaps": [
        "INSERT INTO run (name, program_version, host) VALUES ('x', '0', 'x'); "
        "INSERT INTO stream (definition, digest) VALUES ('{}', '\\x00'); "
        "INSERT INTO epoch (run_id, stream_id, epoch, num_samples, catalog_changes, started_at) "
        "SELECT r.id, s.id, 0, 10, 0, now() FROM run r, stream s; "
        "INSERT INTO ledger (epoch_id, outcome, positions, consumer) SELECT id, 'delivered', '{[0,12)}', 'x:1' FROM epoch",
    ],
    "split_leaks": [
        "INSERT INTO split (name, parts, actor) VALUES ('s', '{train,test}', 'x'); "
        "INSERT INTO split_patient (split_id, patient_id, part) "
        "SELECT s.id, p.id, CASE p.id WHEN (SELECT min(id) FROM patient) THEN 'test' ELSE 'train' END FROM split s, patient p; "
        f"{SHARED_PIXELS}",
        "INSERT INTO split (name, parts, folds, actor) VALUES ('s', '{train}', 2, 'x'); "
        "INSERT INTO split_patient (split_id, patient_id, part, fold) "
        "SELECT s.id, p.id, 'train', CASE p.id WHEN (SELECT min(id) FROM patient) THEN 1 ELSE 0 END FROM split s, patient p; "
        f"{SHARED_PIXELS}",
        f"{SHARED_PIXELS}; INSERT INTO split (name, parts, actor) VALUES ('s', '{{train,test}}', 'x'); "
        "ALTER TABLE split_patient DISABLE TRIGGER guard_insert; INSERT INTO split_patient (split_id, patient_id, part) "
        "SELECT s.id, p.id, CASE p.id WHEN (SELECT min(id) FROM patient) THEN 'test' ELSE 'train' END FROM split s, patient p",
    ],
}  # fmt: skip


def test_each_that_must_be_empty_is_broken_below() -> None:
    """None of them is left untried."""
    assert sorted(BROKEN) == sorted(EMPTY)


def test_what_must_be_empty_is_so(ingested: str, conn: psycopg.Connection, catalog: Run) -> None:
    """On a catalog that nobody broke, also one that was measured, judged and decided in: no row, and exit code 0."""
    conn.execute(
        "INSERT INTO flag (rule, severity, detail, image_id, raised_by) SELECT 'X', 'info', 'x', id, 'x' FROM image ORDER BY id LIMIT 3"
    )
    [[pairing]] = conn.execute("SELECT min(id) FROM pairing").fetchall()
    for command in (["qa", "run"], ["pair", "reject", str(pairing)], ["pair", "accept", str(pairing)]):
        done = catalog(*command)
        assert done.returncode in (0, 3), done.stderr
    for name in EMPTY:
        assert rows(conn, name) == [], name
    done = catalog("audit", "--all")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("view", EMPTY)
def test_what_must_be_empty_is_not_once_broken(ingested: str, view: str, conn: psycopg.Connection) -> None:
    """Each way to break what a view guards leaves a row in it, and none where it was not broken."""
    conn.execute(
        "INSERT INTO flag (rule, severity, detail, image_id, raised_by) SELECT 'OLD', 'info', 'x', id, 'x' FROM image ORDER BY id LIMIT 1"
    )
    for statements in BROKEN[view]:
        assert rows(conn, view) == []
        conn.execute("BEGIN")
        for statement in statements.split("; "):
            conn.execute(statement.encode())
        found = rows(conn, view)
        conn.execute("ROLLBACK")
        assert found, f"not seen: {statements}"


def test_exit_code_of_a_broken_catalog(ingested: str, conn: psycopg.Connection, catalog: Run) -> None:
    """`catalog audit --all` and the view alone end with 3 and say which; another view ends with 0."""
    conn.execute("ALTER TABLE event DISABLE TRIGGER refuse_change")
    for command in (["--all"], ["constraint_state"], ["constraint_state", "--json"], ["--all", "--json"]):
        done = catalog("audit", *command)
        assert done.returncode == 3, command
        assert "constraint_state: 1 row where there must be none" in done.stderr
    assert catalog("audit", "inventory").returncode == 0


# ------------------------------------------------------------------------------------------ the commands


def test_audit_prints(ingested: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The list; one view as table, CSV and JSON; what does not go together is a usage error."""

    def said(*arguments: str) -> str:
        cli.app(["audit", *arguments, "--database", ingested], prog_name="catalog", standalone_mode=False)
        return capsys.readouterr().out

    assert "must be empty" in said() and len(json.loads(said("--json"))) == len(auditing.load())
    [row] = csv.DictReader(io.StringIO(said("inventory", "--csv")))
    assert row["images"] == "48" and row["sizes"] == "64×64"
    [one] = json.loads(said("area_profile", "--json", "--limit", "2"))
    assert one["name"] == "area_profile" and len(one["rows"]) == 2 < one["count"]
    assert "(2 of " in said("area_profile", "--limit", "2")
    for wrong in (["nothing"], ["inventory", "--all"], ["--all", "--csv"], ["--csv"], ["inventory", "--csv", "--json"]):
        with pytest.raises(UsageError):
            said(*wrong)


def test_schema_prints_the_dictionary(ingested: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every table and view with what it is; of one its columns, types, constraints, triggers, from the database's own comments."""

    def said(*arguments: str) -> str:
        cli.app(["schema", *arguments, "--database", ingested], prog_name="catalog", standalone_mode=False)
        return capsys.readouterr().out

    listed = {one["name"]: one for one in json.loads(said("--json"))}
    assert {"flag", "mask", "sample", "orphans"} <= listed.keys() and all(one["comment"] for one in listed.values())
    assert listed["orphans"]["kind"] == "view" and listed["mask"]["kind"] == "table"
    area = next(column for column in listed["mask"]["columns"] if column["name"] == "area_px")
    assert area == {
        "name": "area_px",
        "type": "bigint",
        "null": False,
        "default": "generated: bit_count(bits)",
        "comment": "Pixels in the mask.",
    }
    text = said("event")
    for words in ("Who decided what", "timestamp with time zone", "pk_event: PRIMARY KEY (id)", "refuse_change", "Why, in words."):
        assert words in text
    assert "mask" in said()
    with pytest.raises(UsageError, match="no such table"):
        said("nothing")


# ------------------------------------------------------------------------------------------ catalog sql


def test_sql_formats(ingested: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Table, CSV, JSON and Parquet say the same; from a file, from standard input, into a file."""
    pyarrow = pytest.importorskip("pyarrow.parquet")
    query = "SELECT structure, count(*) AS n, sum(area_px) AS area, avg(area_mm2) AS mean FROM sample GROUP BY 1 ORDER BY 1"
    (tmp_path / "asked.sql").write_text(query + " -- é\n;\n")

    def said(*arguments: str) -> str:
        cli.app(["sql", *arguments, "--database", ingested], prog_name="catalog", standalone_mode=False)
        return capsys.readouterr().out

    found = json.loads(said(query, "--format", "json"))
    assert [row["structure"] for row in found] == ["inner", "outer"]
    assert found == json.loads(said("-f", str(tmp_path / "asked.sql"), "--json"))
    for form in ("table", "csv", "json", "parquet"):
        assert said(query, "--format", form, "-o", str(tmp_path / form)) == ""
    assert (tmp_path / "table").read_text() == said(query)
    assert (tmp_path / "csv").read_text() == said(query, "--csv") == said(query, "--format", "csv", "--csv")
    assert json.loads((tmp_path / "json").read_text()) == found
    assert pyarrow.read_table(tmp_path / "parquet").to_pylist() == found
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(query.encode())))
    assert json.loads(said("-f", "-", "--json")) == found
    odd = "SELECT sample_key, pixel_hash, '{[1,3)}'::int8multirange AS ranges, NULL AS nothing, now() AS at, '{\"a\":1}'::jsonb AS j, "
    odd += "ARRAY[1,2] AS list, 'NaN'::numeric AS nan, true AS yes FROM image_all LIMIT 1"
    said(odd, "--format", "parquet", "-o", str(tmp_path / "odd"))
    [row] = pyarrow.read_table(tmp_path / "odd").to_pylist()
    assert (row["ranges"], row["nothing"], row["j"], row["list"], row["yes"]) == ("{[1, 3)}", None, '{"a": 1}', [1, 2], True)
    assert len(row["pixel_hash"]) == 32 and row["at"].tzinfo is not None
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []
    for wrong in ([], [query, "-f", "x"], [query, "--format", "parquet"], [query, "--json", "--csv"], [query, "--format", "json", "--csv"],
                  ["SELECT 1 AS a, 2 AS a", "--format", "parquet", "-o", str(tmp_path / "x")]):  # fmt: skip
        with pytest.raises(UsageError):
            said(*wrong)
    (tmp_path / "bytes.sql").write_bytes(b"SELECT '\xff'")
    with pytest.raises(UsageError, match="UTF-8"):
        said("-f", str(tmp_path / "bytes.sql"))


def test_parquet_without_pyarrow_is_one_line(ingested: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the extra is not installed the line names it, and no file is left."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match=r"pip install 'scanfeed\[parquet\]'"):
        cli.app(["sql", "SELECT 1 AS a", "--format", "parquet", "-o", str(tmp_path / "x")], prog_name="catalog", standalone_mode=False)
    assert list(tmp_path.glob("x*")) == []


# ------------------------------------------------------------------------------------------ catalog db shell


def test_the_shell_reads_and_cannot_write(ingested: str, catalog: Run, conn: psycopg.Connection) -> None:
    """psql under the login that cannot write: it answers, a DELETE is refused; its command line holds no password. --owner may write."""
    asked = "SELECT count(*) AS pairings FROM pairing;\nBEGIN READ WRITE; DELETE FROM pairing; COMMIT;\n"
    asked += "\\! tr '\\0' ' ' < /proc/$PPID/cmdline\n"
    done = catalog("db", "shell", input=asked)
    [[password, login, count]] = conn.execute("SELECT password, role, (SELECT count(*) FROM pairing) FROM sql_login").fetchall()
    assert done.returncode == 0 and f" {count}\n" in done.stdout and "permission denied for table pairing" in done.stderr
    assert login in done.stdout and password not in done.stdout + done.stderr
    assert conn.execute("SELECT count(*) FROM pairing").fetchone() == (count,)
    done = catalog("db", "shell", "--owner", input="CREATE TABLE made_by_hand ();\nSELECT current_user;\n")
    assert done.returncode == 0, done.stderr
    assert conn.execute("SELECT to_regclass('made_by_hand') IS NOT NULL").fetchone() == (True,)
    assert catalog("db", "shell", input="\\set ON_ERROR_STOP on\nSELECT nothing;\n").returncode == 3


def test_other_programs_find_the_catalog(ingested: str, catalog: Run, conn: psycopg.Connection) -> None:
    """A program in psql's place, options and all, gets the same database and login, and its exit code is the command's."""
    [[login, name]] = conn.execute("SELECT role, current_database() FROM sql_login").fetchall()
    done = catalog("db", "shell", "psql", "-Atc", "SELECT current_user, current_database(), current_setting('transaction_read_only')")
    assert (done.returncode, done.stdout) == (0, f"{login}|{name}|on\n"), done.stderr
    assert catalog("db", "shell", "sh", "-c", "exit 7").returncode == 7
    assert catalog("db", "shell", "sh", "-c", "kill $$").returncode == 128 + 15
    done = catalog("db", "shell", "no-such-program")
    assert (done.returncode, done.stderr) == (1, "catalog: db shell: no-such-program: No such file or directory\n")


def test_a_backup_of_the_embedded_server(studies: Path, catalog: Run, tmp_path: Path) -> None:
    """Dumped by one command and by psql's \\!, whatever PATH and PGSERVICE name and however long CATALOG_HOME; restored elsewhere."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "pg_dump").write_text("#!/bin/sh\necho too old\nexit 1\n")
    (tmp_path / "bin" / "pg_dump").chmod(0o755)
    (tmp_path / "services").write_text("[other]\ndbname=postgres\n")
    dump, again = tmp_path / "catalog.dump", tmp_path / "again.dump"
    # Not in pytest's folder, which only its user may enter: as root the server runs as another.
    with tempfile.TemporaryDirectory(prefix="scanfeed-backup-") as folder:
        Path(folder).chmod(0o755)
        homes = [Path(folder, "a" * 120), Path(folder, "restored")]
        other = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "PGSERVICE": "other", "PGSERVICEFILE": f"{tmp_path}/services"}
        first, second = [{**os.environ, **other, "CATALOG_HOME": str(home)} for home in homes]
        assert catalog("ingest", studies, "--jobs", 1, env=first).returncode == 0
        done = catalog("db", "shell", "--owner", "pg_dump", "-Fc", "-f", dump, env=first)
        assert done.returncode == 0, done.stdout + done.stderr
        done = catalog("db", "shell", "--owner", input=f"\\! pg_dump -Fc -f {again}\n", env=first)
        assert again.stat().st_size > 10_000, done.stdout + done.stderr
        options = ["--clean", "--if-exists", "--no-owner", "--no-acl", "--exit-on-error", "-d", "catalog"]
        done = catalog("db", "shell", "--owner", "pg_restore", *options, dump, env=second)
        assert done.returncode == 0, done.stderr
        assert catalog("digest", env=second).stdout == catalog("digest", env=first).stdout
        assert catalog("sql", "--csv", "SELECT count(*) FROM image_all", env=second).stdout.split() == ["count", "48"]
        # The dump to give away of docs/privacy.md: without it the login is made anew.
        given = ["--exclude-table-data=private.*", "--exclude-table-data=sql_login", "-f", dump]
        assert catalog("db", "shell", "--owner", "pg_dump", "-Fc", *given, env=first).returncode == 0
        password = catalog("db", "shell", "--owner", "psql", "-Atc", "SELECT password FROM sql_login", env=first).stdout.strip()
        assert catalog("db", "shell", "--owner", "pg_restore", *options, dump, env=second).returncode == 0
        assert catalog("sql", "--csv", "SELECT count(*) FROM image_all", env=second).stdout.split() == ["count", "48"]
        anew = catalog("db", "shell", "--owner", "psql", "-Atc", "SELECT password FROM sql_login", env=second).stdout.strip()
        assert len(password) == len(anew) and password != anew
        assert all(map(server_ended, homes))


def test_without_psql_the_line_says_where_to_connect(ingested: str, monkeypatch: pytest.MonkeyPatch, conn: psycopg.Connection) -> None:
    """No psql anywhere: one line with the place and the login, and no password."""
    from catalog import shell

    monkeypatch.setattr(shell, "_psql", lambda: None)
    with database.open_database(ingested) as db, pytest.raises(CatalogError) as error:
        shell.run(db)
    [[password, login]] = conn.execute("SELECT password, role FROM sql_login").fetchall()
    assert "no psql" in str(error.value) and login in str(error.value) and password not in str(error.value)


def test_everything_on_the_real_studies(sunnybrook: Path, database_url: str, conn: psycopg.Connection, catalog: Run) -> None:
    """The two real studies as FACTS.md describes them: inventory, areas; and nothing in what must be empty."""
    assert catalog("ingest", sunnybrook).returncode == 0
    done = catalog("audit", "--all", "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = {one["name"]: one for one in json.loads(done.stdout)}
    [row] = found["inventory"]["rows"]
    assert (row["patients"], row["images"], row["annotated"], row["annotations"], row["sizes"]) == (2, 500, 36, 54, "256×256")
    areas = conn.execute("SELECT patient, sum(area_px) FROM area_profile WHERE structure = 'inner' GROUP BY 1 ORDER BY 1").fetchall()
    assert areas == [("SCD0000101", 17_788), ("SCD0000201", 22_559)]
