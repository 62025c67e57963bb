"""Rule files: what one says is what is run, and one that cannot be right is told in one line with its place."""

from __future__ import annotations

import math
import string
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from catalog import rulefiles
from catalog.errors import UsageError
from catalog.rulefiles import Rule

HEAD = "-- title: T\n-- severity: error\n-- subject: image\n-- means: m\n-- do: d\n"
QUERY = "SELECT id AS subject_id, 1 AS value, 'x' AS detail FROM image\n"


def parsed(folder: Path, text: str | bytes, code: str = "ODD-ONE") -> Rule:
    path = folder / f"{code}.sql"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return rulefiles.parse(path)


def test_a_file_s_head_and_queries_are_taken_apart(tmp_path: Path) -> None:
    """Each line of the head, its continuations, parameters of each type, comments and both queries; as Windows writes it, too."""
    text = (
        "-- Somebody's note\n-- title: Too big: far too big\n-- severity: warning\n-- subject: pairing\n-- version: 12\n-- scope: all\n"
        "-- means: one\n--   two\n-- do: look\n--   again: closely\n"
        "-- parameter least_mm: -0.5 mm; at least\n-- parameter strict: true;\n-- parameter name: inner the structure\n\n"
        "-- a comment: of the query\nSELECT p.id AS subject_id, 1 AS value, 'a :least_mm b'' :no' AS detail -- :nor\n"
        "  FROM pairing p WHERE 5 % 3 > :least_mm::float8 AND :strict AND x[1:2] = :name;\n"
        "-- not evaluated\n-- since\nSELECT count(*), '100 %' FROM image WHERE :strict;\n"
    )
    for written in (text, text.replace("\n", "\r\n"), "\ufeff" + text):
        rule = parsed(tmp_path, written)
        assert (rule.code, rule.title, rule.severity, rule.subject, rule.version, rule.scope) == (
            "ODD-ONE", "Too big: far too big", "warning", "pairing", 12, "all",
        )  # fmt: skip
        assert (rule.means, rule.do) == ("one two", "look again: closely")
        assert dict(rule.parameters) == {"least_mm": -0.5, "strict": True, "name": "inner"}
        assert dict(rule.said) == {"least_mm": "mm; at least", "strict": "", "name": "the structure"}
        assert rulefiles.names_in(rule.query) == ["least_mm", "strict", "name"]
        assert rulefiles.bound(rule.query).endswith(b"WHERE 5 %% 3 > %(least_mm)s::float8 AND %(strict)s AND x[1:2] = %(name)s")
        assert b"'a :least_mm b'' :no' AS detail -- :nor" in rulefiles.bound(rule.query)
        assert rule.not_evaluated == "SELECT count(*), '100 %' FROM image WHERE :strict"


WRONG = [
    ("", 1, "says no title"),
    (HEAD.replace("-- do: d\n", ""), 1, "says no do"),
    (HEAD.replace("means: m", "means:"), 4, "says no means"),
    (HEAD + "-- title: again\n" + QUERY, 6, "title is there twice"),
    (HEAD.replace("error", "fatal") + QUERY, 2, "severity is one of error, warning, info"),
    (HEAD.replace("image", "sample") + QUERY, 3, "subject is one of"),
    (HEAD + "-- scope: patient\n" + QUERY, 6, "scope is one of series, all"),
    (HEAD + "-- version: 0\n" + QUERY, 6, "version"),
    (HEAD + "-- version: 1.5\n" + QUERY, 6, "version"),
    (HEAD + "-- raised by: somebody\n", 6, "raised by is one of"),
    (HEAD + "-- raised by: ingest\n" + QUERY, 6, "one query, or says by whom"),
    (HEAD, 1, "one query, or says by whom"),
    (HEAD + "-- raised by: ingest\n-- not evaluated\nSELECT 1, ''\n", 8, "has no query"),
    (HEAD + QUERY + "-- not evaluated\nSELECT 1, ''\n-- not evaluated\nSELECT 2, ''\n", 9, "twice"),
    (HEAD + "-- parameter Least: 1\n" + QUERY, 6, "small letters"),
    (HEAD + "-- parameter two words: 1\n" + QUERY, 6, "small letters"),
    (HEAD + "-- parameter enabled: true\n" + QUERY, 6, "small letters"),
    (HEAD + "-- parameter least:\n" + QUERY, 6, "no default"),
    (HEAD + QUERY + "WHERE id > :least\n", 7, ":least, which is no parameter"),
    (HEAD + QUERY + "-- not evaluated\nSELECT :most, ''\n", 8, ":most, which is no parameter"),
    (HEAD + "SELECT\0 1\n", 6, "control character"),
    (HEAD.encode() + b"SELECT '\xe9'\n", None, "cannot be read as UTF-8"),
]


@pytest.mark.parametrize(("text", "line", "words"), WRONG)
def test_what_is_no_rule_is_told_with_its_line(tmp_path: Path, text: str | bytes, line: int | None, words: str) -> None:
    """One line: the file, the line of what is wrong, and what; exit code 2."""
    with pytest.raises(UsageError) as caught:
        parsed(tmp_path, text)
    place = f"{tmp_path}/ODD-ONE.sql:" + ("" if line is None else f"{line}:")
    assert str(caught.value).startswith(place) and words in str(caught.value) and "\n" not in str(caught.value)


LINES = st.sampled_from([*HEAD.splitlines(), *QUERY.splitlines(), "-- not evaluated", "--   more", "-- parameter x: 1", ":x :y '", "--"])


@given(st.lists(LINES | st.text(st.characters(codec="utf-8"), max_size=30), max_size=14), st.binary(max_size=8), st.sampled_from("\n\r "))
@example([], b"\xff", "\n")
@example(["-- parameter \u0661: 1"], b"", "\n")
def test_no_file_ends_in_a_traceback(tmp_path_factory: pytest.TempPathFactory, lines: list[str], tail: bytes, end: str) -> None:
    """Whatever stands in a file: a rule whose parameters are all known, or a UsageError that names the file in one line."""
    try:
        rule = parsed(tmp_path_factory.getbasetemp(), "\n".join(lines).encode() + end.encode() + tail)
    except UsageError as error:
        assert "ODD-ONE.sql" in str(error) and "\n" not in str(error) and "\0" not in str(error)
    else:
        assert rule.query or rule.raised_by
        assert set(rulefiles.names_in(rule.query)) <= rule.parameters.keys()
        rulefiles.bound(rule.query)


@given(st.text(string.printable, max_size=12))
@example("nan")
@example("1e999")
@example("1_000")
@example("-.5e3")
def test_a_default_s_type_is_plain(text: str) -> None:
    """true and false, finite numbers as they are written in SQL, and all else text: never NaN or infinity."""
    value = rulefiles.default_of(text)
    assert not isinstance(value, float) or math.isfinite(value)
    assert isinstance(value, bool) == (text in ("true", "false"))
    if isinstance(value, float):
        assert float(text) == value and not set(text) - set("0123456789+-.eE")


def test_a_file_is_named_by_its_code(tmp_path: Path) -> None:
    """Another name than a code in capitals is refused; what an editor leaves beside the rules is no rule."""
    for name in ("odd", "ODD_ONE", "-ODD", "ODD-", "1ODD", "ODD ONE"):
        with pytest.raises(UsageError, match=r"named CODE\.sql"):
            parsed(tmp_path, HEAD + QUERY, name)
        (tmp_path / f"{name}.sql").unlink()
    parsed(tmp_path, HEAD + QUERY)
    for name in (".ODD-TWO.sql", "._ODD-ONE.sql", "ODD-ONE.sql~", "README.md"):
        (tmp_path / name).write_text("what")
    assert "ODD-ONE" in rulefiles.load([tmp_path])


def test_folders_of_one_s_own_add_rules(tmp_path: Path) -> None:
    """Rules of several folders are there beside ours; one code twice, a folder without rules or none at all is told in one line."""
    ours = rulefiles.load()
    for name in ("a", "b", "empty"):
        (tmp_path / name).mkdir()
    parsed(tmp_path / "a", HEAD + QUERY)
    parsed(tmp_path / "b", HEAD + QUERY, "ODD-TWO")
    assert rulefiles.load([tmp_path / "a", tmp_path / "b"]).keys() == ours.keys() | {"ODD-ONE", "ODD-TWO"}
    taken = min(ours)
    for folders, words in (
        (["a", "a"], "there is a rule ODD-ONE already"),
        (["empty"], "has no .sql file"),
        (["gone"], "No such file"),
        (["a/ODD-ONE.sql"], "Not a directory"),
        (["nul\0"], "NUL"),
    ):
        with pytest.raises(UsageError, match=words):
            rulefiles.load([tmp_path / folder for folder in folders])
    parsed(tmp_path / "empty", HEAD + QUERY, taken)
    with pytest.raises(UsageError, match=f"there is a rule {taken} already"):
        rulefiles.load([tmp_path / "empty"])


def test_our_rules_say_what_they_mean() -> None:
    """Each of our files is a rule with a title that fits a line, words on each parameter, and what to do."""
    for rule in rulefiles.load().values():
        assert len(rule.title) < 60, rule.code
        assert all(rule.said.values()), rule.code
        assert len(rule.means) > 40 and len(rule.do) > 20, rule.code
        assert set(rule.parameters) <= {*rulefiles.names_in(rule.query), *rulefiles.names_in(rule.not_evaluated)}, rule.code
        if rule.query and rule.scope == "series":
            assert "scope" in rule.query.lower(), f"{rule.code}: does not join scope"
