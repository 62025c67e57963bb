"""docs/privacy.md is true: its lists are those of the database and of the readers, its commands are there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import psycopg
from pydicom.datadict import dictionary_keyword
from typer.testing import CliRunner

from catalog import cli, dicom, encoding, header, pixels, privacy, rtstruct, seg

PAGE = Path(__file__).resolve().parent.parent / "docs" / "privacy.md"
ATTRIBUTE = re.compile(r"([A-Z][A-Za-z]+) \(([0-9A-F]{4}),([0-9A-F]{4})\)")
# What our readers take elements by, and what of it is no attribute of a file.
READERS = (header, encoding, dicom, rtstruct, seg, pixels, privacy)
COLUMNS = """
SELECT CASE WHEN table_schema = 'private' THEN 'private.' ELSE '' END || c.table_name, c.column_name
FROM information_schema.columns c JOIN information_schema.tables t USING (table_schema, table_name)
WHERE table_schema IN ('public', 'private') AND t.table_type = 'BASE TABLE'
"""
# Attributes of which a column says that they are there, or a digest: no value.
NO_VALUE = {"ModalityLUTSequence", "PixelData", "BitsAllocated", "BitsStored", "PixelRepresentation", "TransferSyntaxUID",
            "NominalCardiacTriggerDelayTime"}  # fmt: skip


def section(name: str) -> str:
    found = re.search(rf"<!-- {name} -->\n(.*?)<!-- end -->", PAGE.read_text(), re.S)
    assert found is not None, name
    return found[1]


def rows(name: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("| ").split("|")] for line in section(name).splitlines() if line.startswith("|")][2:]


def kept_attributes() -> set[str]:
    """Return the keywords of attributes of images whose values columns hold."""
    image = ("patient.", "study.", "series.", "instance.", "image.", "location.")
    return {
        keyword
        for column, source, _ in rows("columns from files")
        if column.startswith(image)
        for keyword, _, _ in ATTRIBUTE.findall(source)
    } - NO_VALUE


def attributes_read() -> set[tuple[str, str, str]]:
    """Return keyword, group and element of each attribute that a reader asks for."""
    tags: set[int] = set()
    for module in READERS:
        for name, value in vars(module).items():
            values = value if isinstance(value, (tuple, frozenset, dict)) else (value,)
            if not name.startswith(("_LONG", "_SHORT", "PREFIXES", "MOST", "WHOLE")):
                tags.update(one for one in values if isinstance(one, int) and one > 0xFFFF and one >> 16 < 0xFFFE)
    found = set()
    for tag in tags:
        try:
            found.add((dictionary_keyword(tag), f"{tag >> 16:04X}", f"{tag & 0xFFFF:04X}"))
        except KeyError:
            continue
    return found


def not_kept() -> str:
    """Return the list of what is read and not kept."""
    listed = {match for _, source, _ in rows("columns from files") for match in ATTRIBUTE.findall(source)}
    rest = sorted(attributes_read() - listed, key=lambda one: one[1:])
    return "\n".join(f"- {keyword} ({group},{element})" for keyword, group, element in rest) + "\n\n"


def test_every_column_is_in_one_of_the_lists(conn: psycopg.Connection) -> None:
    """Each column of the database, of the schema private too, is either said to hold something from files, with what, or to hold nothing of
    them; none is in both, and none is listed that is not there. A column that a migration adds fails this until somebody has said which."""
    there = set(conn.execute(COLUMNS).fetchall())
    listed: list[tuple[str, str]] = []
    for column, source, pseudonymized in rows("columns from files"):
        assert source, column
        assert pseudonymized, column
        table, _, name = column.rpartition(".")
        listed += [(table, one) for where, one in there if where == table] if name == "*" else [(table, name)]
    for table, columns in rows("columns from elsewhere"):
        listed += [(table, name.strip()) for name in columns.split(",")]
    assert len(listed) == len(set(listed)), sorted(one for one in listed if listed.count(one) > 1)
    assert set(listed) - there == set()
    assert there - set(listed) == set(), "say in docs/privacy.md what it holds, and what with --pseudonymize"


def test_every_attribute_that_is_read_is_listed() -> None:
    """Each attribute for which a reader of DICOM has a tag is in the white list or among those whose value is not kept, and has the
    keyword that PS3.6 gives it."""
    assert section("attributes that are not kept").strip() == not_kept().strip(), "run `python -m tests.test_privacy_docs`"
    for keyword, group, element in ATTRIBUTE.findall(PAGE.read_text()):
        assert dictionary_keyword(int(group + element, 16)) == keyword
    assert {"PatientName", "PatientBirthDate", "ReferringPhysicianName", "AccessionNumber"} <= {one for one, _, _ in attributes_read()}


def test_identifying_attributes_are_not_kept() -> None:
    """No attribute whose presence is noted (`catalog.privacy`) is in the white list."""
    listed = {int(group + element, 16) for _, source, _ in rows("columns from files") for _, group, element in ATTRIBUTE.findall(source)}
    assert listed.isdisjoint(privacy.TAGS)


def test_the_commands_are_there() -> None:
    """Each `catalog` line of the page's shell blocks is a command with options that it has."""
    lines = [line for block in re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(), re.M | re.S) for line in block.splitlines()]
    lines = [line for line in lines if line.startswith("catalog ")]
    assert len(lines) >= 2
    for line in lines:
        words = shlex.split(line, comments=True)
        if "pg_dump" in words:
            words = words[: words.index("pg_dump")]  # what follows is PostgreSQL's
        named = words[1:3] if words[1] == "db" else words[1:2]
        done = CliRunner().invoke(cli.app, [*named, "--help"], env={"COLUMNS": "200"})
        assert done.exit_code == 0, line
        for option in (word for word in words if word.startswith("--")):
            assert option in re.sub(r"\x1b\[[0-9;]*m", "", done.output), line


if __name__ == "__main__":
    page = PAGE.read_text()
    start = page.index("<!-- attributes that are not kept -->\n") + len("<!-- attributes that are not kept -->\n")
    PAGE.write_text(page[:start] + "\n" + not_kept().strip() + "\n\n<!-- end -->\n")
