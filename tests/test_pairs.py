"""`catalog pair`: what was only proposed is decided by people, and stands."""

from __future__ import annotations

import json
import os
import pwd
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest

from catalog import cli, database, ingest, synthetic
from catalog.errors import CatalogError, UsageError
from catalog.ingest import LOCK_CLASS

Say = Callable[..., str]
ME = pwd.getpwuid(os.geteuid()).pw_name


@pytest.fixture
def say(database_url: str, capsys: pytest.CaptureFixture[str]) -> Say:
    """Run `catalog` in this process; returns its standard output. Errors come as exceptions."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        cli.app([str(argument) for argument in arguments], prog_name="catalog", standalone_mode=False)
        return capsys.readouterr().out

    return run


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Six images with nine contours; of image 2 there is a second file of its number in other pixels, and contour 999 has no image."""
    folder = tmp_path / "arrived"
    synthetic.write_studies(folder, patients=1, slices=3, phases=2, size=64, seed=5)
    images = folder / "dicoms" / "SYN0001"
    shutil.copy(images / "2.dcm", images / "1.IMA")
    contours = folder / "contourfiles" / "SC-SYN-0001" / "i-contours"
    shutil.copy(contours / "IM-0001-0004-icontour-manual.txt", contours / "IM-0001-0999-icontour-manual.txt")
    return folder


@pytest.fixture
def take_in(database_url: str, study: Path) -> Iterator[Callable[[], Any]]:
    """Ingest the study in this process."""
    with ThreadPoolExecutor(1) as threads:

        def ingest_study() -> Any:
            with database.open_database(database_url) as db:
                return ingest.ingest(db, study, executor=threads)

        yield ingest_study


@pytest.fixture
def arrived(take_in: Callable[[], Any]) -> None:
    """The study is in the catalog."""
    take_in()


def ask(conn: psycopg.Connection, query: str, *parameters: object) -> list[tuple[Any, ...]]:
    return conn.execute(query, parameters).fetchall()  # type: ignore[arg-type]


def written(conn: psycopg.Connection) -> tuple[Any, ...]:
    """Return all that a decision could have changed: rows, numbers used up, the daemons' counter."""
    return (
        ask(conn, "SELECT * FROM pairing ORDER BY id"),
        ask(conn, "SELECT * FROM flag ORDER BY id"),
        ask(conn, "SELECT pairing_id FROM mask ORDER BY 1"),
        ask(conn, "SELECT (SELECT last_value FROM pairing_id_seq), (SELECT last_value FROM flag_id_seq)"),
        ask(conn, "SELECT count(*) FROM catalog_change"),
    )


def proposed(say: Say) -> list[dict[str, Any]]:
    return json.loads(say("pair", "list", "--json"))  # type: ignore[no-any-return]


def test_what_is_proposed_is_listed(arrived: None, say: Say, conn: psycopg.Connection, study: Path) -> None:
    """Each ambiguous annotation with its file, structure, reader and every image that it may belong to, with how it was found."""
    expected = ask(conn, "SELECT DISTINCT annotation_id FROM pairing WHERE state = 'proposed' ORDER BY 1")
    found = proposed(say)
    assert expected and [(one["annotation"],) for one in found] == expected
    for one in found:
        assert one["file"].startswith(f"{study}/contourfiles/") and one["structure"] in ("inner", "outer") and one["reader"] == "manual"
        assert len(one["candidates"]) == 2
        for which in one["candidates"]:
            assert Path(which["image"]).is_file() and which["state"] == "proposed" and which["score"] == 0.5
            assert which["actor"] == "layout:sunnybrook" and which["at"] and which["rule"] and which["method"]
    for state in ("proposed", "accepted", "rejected", "unpaired", "all"):
        [(pairings, annotations)] = ask(
            conn,
            "SELECT count(p.id), count(DISTINCT a.id) FROM annotation a LEFT JOIN pairing p ON p.annotation_id = a.id "
            "WHERE %s = 'all' OR p.state = %s OR %s = 'unpaired' AND p.id IS NULL", state, state, state,
        )  # fmt: skip
        listed = json.loads(say("pair", "list", "--state", state, "--json"))
        assert (sum(len(one["candidates"]) for one in listed), len(listed)) == (pairings, annotations), state
        text = say("pair", "list", "--state", state)
        assert all(str(one["annotation"]) in text for one in listed)


def test_accepted(arrived: None, say: Say, conn: psycopg.Connection, take_in: Callable[[], Any]) -> None:
    """The accepted image is the annotation's, with mask; the other one is rejected, its finding closed; an ingest leaves all so, and a
    second accept writes nothing.
    """
    [one, *_] = proposed(say)
    drawn, (first, second) = one["annotation"], one["candidates"]
    fed = "SELECT sample_id, area_px > 0, error_flags FROM sample WHERE annotation_id = %s"
    assert ask(conn, fed, drawn) == []
    said = say("pair", "accept", second["pairing"])
    assert f"pairing {second['pairing']} of annotation {drawn} with sample {second['sample_id']} accepted" in said
    assert f"rejected: {first['pairing']}" in said and "closed 1 flag" in said
    assert ask(conn, fed, drawn) == [(second["sample_id"], True, 0)]
    assert ask(conn, "SELECT state, actor FROM pairing WHERE annotation_id = %s ORDER BY id", drawn) == [("rejected", ME), ("accepted", ME)]
    flags = "SELECT state, closed_by FROM flag WHERE rule = 'PAIR-AMBIGUOUS' AND annotation_id = %s"
    assert ask(conn, flags, drawn) == [("resolved", ME)]
    noted = {error["path"] for error in json.loads(say("errors", "--run", 1, "--json")) if error["code"] == "pair-ambiguous"}
    stands = {error["path"] for error in json.loads(say("errors", "--json")) if error["code"] == "pair-ambiguous"}
    assert stands == noted - {one["file"].partition("/arrived/")[2]} != noted, "what was decided since is no error any more"
    before = written(conn)
    take_in()
    assert "nothing changed" in say("pair", "accept", second["pairing"])
    assert written(conn) == before
    assert drawn not in [one["annotation"] for one in proposed(say)]
    # And the other way round, after all.
    say("pair", "accept", first["pairing"], "--actor", "kim")
    assert ask(conn, fed, drawn) == [(first["sample_id"], True, 0)]
    assert ask(conn, "SELECT state, actor FROM pairing WHERE annotation_id = %s ORDER BY id", drawn) == [
        ("accepted", "kim"), ("rejected", "kim"),
    ]  # fmt: skip


def test_a_layout_s_pairing_accepted_by_a_person(arrived: None, say: Say, conn: psycopg.Connection) -> None:
    """Accepting what a layout accepted makes it a person's decision: no ingest touches it any more."""
    [(pairing_id,)] = ask(conn, "SELECT min(id) FROM pairing WHERE state = 'accepted'")
    assert "accepted" in say("pair", "accept", pairing_id, "--actor", "kim")
    assert ask(conn, "SELECT state, actor, method <> 'manual' FROM pairing WHERE id = %s", pairing_id) == [("accepted", "kim", True)]


def test_rejected(arrived: None, say: Say, conn: psycopg.Connection, take_in: Callable[[], Any]) -> None:
    """One of two rejected: the other is proposed still and the finding open. Both: it is unpaired, the finding closed, for good."""
    [one, *_] = proposed(say)
    drawn, (first, second) = one["annotation"], one["candidates"]
    flags = "SELECT state FROM flag WHERE rule = 'PAIR-AMBIGUOUS' AND annotation_id = %s"
    say("pair", "reject", first["pairing"])
    assert ask(conn, flags, drawn) == [("open",)]
    assert [which["pairing"] for one in proposed(say) if one["annotation"] == drawn for which in one["candidates"]] == [second["pairing"]]
    said = json.loads(say("pair", "reject", first["pairing"], second["pairing"], "--json"))
    assert [(one["pairing"], one["state"], one["changed"]) for one in said] == [
        (first["pairing"], "rejected", False), (second["pairing"], "rejected", True),
    ]  # fmt: skip
    assert ask(conn, flags, drawn) == [("resolved",)]
    assert drawn in [one["annotation"] for one in json.loads(say("pair", "list", "--state", "unpaired", "--json"))]
    before = written(conn)
    take_in()
    assert written(conn) == before


def test_linked_by_hand(arrived: None, say: Say, conn: psycopg.Connection, take_in: Callable[[], Any]) -> None:
    """An annotation without image gets one: method manual, score 1, mask at once, finding closed; an ingest leaves it so."""
    [drawn] = json.loads(say("pair", "list", "--state", "unpaired", "--json"))
    [(sample,)] = ask(conn, "SELECT sample_id FROM image_all WHERE instance_number = 4")
    say("pair", "link", drawn["annotation"], sample)
    found = "SELECT image_id, method, score, state, actor FROM pairing WHERE annotation_id = %s"
    assert ask(conn, found, drawn["annotation"]) == [(sample, "manual", 1.0, "accepted", ME)]
    # Drawn like contour 4, whose mask it must have.
    [(bits, count)] = ask(
        conn,
        "SELECT m.bits, count(*) OVER () FROM mask m JOIN pairing p ON p.id = m.pairing_id JOIN annotation a ON a.id = p.annotation_id "
        "JOIN file f ON f.id = a.file_id WHERE f.path LIKE '%%0004-icontour%%'",
    )
    assert count == 1
    assert ask(conn, "SELECT bits FROM mask JOIN pairing p ON p.id = pairing_id WHERE annotation_id = %s", drawn["annotation"]) == [(bits,)]
    assert ask(conn, "SELECT count(*) FROM flag WHERE state = 'open' AND rule = 'PAIR-NO-IMAGE'") == [(0,)]
    before = written(conn)
    take_in()
    assert "nothing changed" in say("pair", "link", drawn["annotation"], sample)
    assert written(conn) == before


def test_linking_what_was_proposed(arrived: None, say: Say, conn: psycopg.Connection) -> None:
    """A link to an image that was only proposed makes that pairing the accepted one, by hand; a link elsewhere rejects it again."""
    [one, *_] = proposed(say)
    drawn, (first, second) = one["annotation"], one["candidates"]
    say("pair", "link", drawn, second["sample_id"])
    states = "SELECT id, state, method FROM pairing WHERE annotation_id = %s ORDER BY id"
    [(_, rejected, _), accepted] = ask(conn, states, drawn)
    assert rejected == "rejected" and accepted == (second["pairing"], "accepted", "manual")
    [(sample,)] = ask(conn, "SELECT min(id) FROM image WHERE id NOT IN (%s, %s)", first["sample_id"], second["sample_id"])
    say("pair", "link", drawn, sample)
    assert [row[1] for row in ask(conn, states, drawn)] == ["rejected", "rejected", "accepted"]


@pytest.mark.parametrize("command", ["accept", "reject", "link"])
def test_a_dry_run_changes_nothing(arrived: None, say: Say, conn: psycopg.Connection, command: str) -> None:
    """--dry-run says what would be said, writes nothing and uses up no number."""
    [one, *_] = proposed(say)
    [(other,)] = ask(conn, "SELECT max(id) FROM image")
    arguments = (one["annotation"], other) if command == "link" else (one["candidates"][0]["pairing"],)
    before = written(conn)
    dry = say("pair", command, *arguments, "--dry-run")
    assert written(conn) == before
    assert say("pair", command, *arguments).replace(str(before[3][0][0] + 1), "(new)", 1 if command == "link" else 0) == dry


def test_refused(arrived: None, say: Say, conn: psycopg.Connection, study: Path, take_in: Callable[[], Any]) -> None:
    """Unknown numbers, two of one annotation, a past version, an image that lies nowhere, a program's name: one line, nothing written."""
    [one, *_] = proposed(say)
    drawn, (first, second) = one["annotation"], one["candidates"]
    [(good,)] = ask(conn, "SELECT min(id) FROM pairing WHERE state = 'accepted'")
    [(old, old_pairing)] = ask(
        conn,
        "SELECT a.id, p.id FROM annotation a JOIN pairing p ON p.annotation_id = a.id JOIN file f ON f.id = a.file_id "
        "WHERE f.path LIKE '%%0006-icontour%%'",
    )
    contour = next(study.rglob("IM-0001-0006-icontour-manual.txt"))
    contour.write_text("10 10\n20 10\n20 20\n")
    (study / "dicoms" / "SYN0001" / "5.dcm").unlink()
    [(gone,)] = ask(conn, "SELECT sample_id FROM image_all WHERE instance_number = 5")
    [(lost,)] = ask(conn, "SELECT id FROM pairing WHERE image_id = %s LIMIT 1", gone)
    take_in()
    before = written(conn)
    for arguments, kind, message in (
        (("accept", good, 9999), CatalogError, "pairing 9999: there is none, so nothing was done"),
        (("reject", 9999), CatalogError, "pairing 9999: there is none"),
        (("link", 9999, gone), CatalogError, "annotation 9999: there is none"),
        (("link", drawn, 9999), CatalogError, "sample 9999: there is none in the catalog"),
        (("accept", first["pairing"], second["pairing"]), UsageError, f"are of one annotation \\({drawn}\\)"),
        (("link", old, gone), CatalogError, f"annotation {old}: is a past version"),
        (("accept", old_pairing), CatalogError, f"annotation {old}: is a past version"),
        (("reject", old_pairing), CatalogError, f"annotation {old}: is a past version"),
        (("link", drawn, gone), CatalogError, f"sample {gone}: no file with its pixels is present"),
        (("accept", lost), CatalogError, f"sample {gone}: no file with its pixels is present"),
        (("accept", good, "--actor", "ingest"), UsageError, "is the program itself"),
    ):
        with pytest.raises(kind, match=message) as caught:
            say("pair", *arguments)
        assert "\n" not in str(caught.value)
    assert written(conn) == before


def test_a_segment_needs_its_grid(arrived: None, say: Say, conn: psycopg.Connection) -> None:
    """A segment is not linked to an image of another size, which would have no mask; to one of its size it is, with its own bits."""
    [drawn] = json.loads(say("pair", "list", "--state", "unpaired", "--json"))
    [(sample,)] = ask(conn, "SELECT min(id) FROM image")
    shape = "UPDATE annotation SET kind = 'segment', points = NULL, rings = NULL, convention = NULL, rows = %s, columns = 64, "
    conn.execute(f"{shape} box = '{{1,2,2,4}}', bits = '\\x0f' WHERE id = %s", [32, drawn["annotation"]])
    with pytest.raises(CatalogError, match=f"is a segment of 32×64 px, sample {sample} has 64×64; segments are not resampled"):
        say("pair", "link", drawn["annotation"], sample)
    conn.execute("UPDATE annotation SET rows = 64 WHERE id = %s", [drawn["annotation"]])
    say("pair", "link", drawn["annotation"], sample)
    found = "SELECT box_row, box_rows, bits FROM mask JOIN pairing p ON p.id = pairing_id WHERE annotation_id = %s"
    assert ask(conn, found, drawn["annotation"]) == [(1, 2, b"\x0f")]


def test_not_while_an_ingest_runs(arrived: None, say: Say, conn: psycopg.Connection, database_url: str) -> None:
    """While an ingest of the root runs nothing is decided: it would be written over."""
    [one, *_] = proposed(say)
    before = written(conn)
    with psycopg.connect(database_url) as other:
        other.execute("SELECT pg_advisory_lock(%s, (SELECT id FROM root)::integer)", [LOCK_CLASS])
        for arguments in (("accept", 1), ("reject", 1), ("link", one["annotation"], 1)):
            with pytest.raises(CatalogError, match="root 'arrived': an ingest of it is running; try again when it has ended"):
                say("pair", *arguments)
    assert written(conn) == before


def test_daemons_are_told(arrived: None, say: Say, conn: psycopg.Connection) -> None:
    """A decision changes the catalog's counter, for which daemons plan their next epoch again."""
    counter = "SELECT count(*) FROM catalog_change"
    before = ask(conn, counter)
    say("pair", "accept", proposed(say)[0]["candidates"][0]["pairing"])
    assert ask(conn, counter) > before
