"""docs/qa.md is true: its table is that of the rules' files, its rule runs, its commands work."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import psycopg
from typer.testing import CliRunner

from catalog import cli, rulefiles

PAGE = Path(__file__).resolve().parent.parent / "docs" / "qa.md"
PLACE = re.compile(r"(<!-- `python -m tests.test_qa_docs`.*?-->\n)(.*)(<!-- end -->)", re.S)


def table() -> str:
    """Return the table of all rules."""
    lines = ["| rule | severity | on a | finds | parameters |", "| --- | --- | --- | --- | --- |"]
    for code, rule in sorted(rulefiles.load().items()):
        parameters = ", ".join(
            f"{name} {str(default).lower() if isinstance(default, bool) else f'{default:.15g}' if isinstance(default, float) else default}"
            for name, default in rule.parameters.items()
        )
        by = f" (by {rule.raised_by})" if rule.raised_by else ""
        lines.append(f"| {code} | {rule.severity} | {rule.subject} | {rule.title}{by} | {parameters} |")
    return "\n".join(lines) + "\n"


def test_the_table_is_that_of_the_files() -> None:
    """Each rule under catalog/rules stands in the table with its severity, subject, title and parameters, and no other."""
    found = PLACE.search(PAGE.read_text())
    assert found is not None and found[2] == table(), "run `python -m tests.test_qa_docs`"


def test_the_rule_that_is_shown_runs(ingested: str, conn: psycopg.Connection, tmp_path: Path) -> None:
    """The example finds series whose slices overlap, beside our own rules, with its parameter, and counts what it cannot judge."""
    [text] = re.findall(r"^```sql\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    (tmp_path / "SERIES-THICK.sql").write_text(text)
    run = ["qa", "run", "--rules", str(tmp_path), "--rule", "SERIES-THICK"]
    conn.execute("UPDATE image SET slice_thickness = 10")  # 10 mm apart, as the synthetic studies are
    assert CliRunner().invoke(cli.app, run).exit_code == 0
    assert conn.execute("SELECT count(*) FROM flag").fetchone() == (0,)
    conn.execute("UPDATE image SET slice_thickness = 15.1 WHERE id = 1")
    conn.execute("UPDATE image SET position = NULL WHERE id = 20")
    CliRunner().invoke(cli.app, run)
    assert conn.execute("SELECT series_id, round(value::numeric, 3)::float8, severity FROM flag").fetchall() == [(1, 1.51, "warning")]
    assert conn.execute("SELECT not_evaluated FROM qa_result ORDER BY qa_run_id").fetchall() == [(0,), (1,)]


def test_the_commands_are_there() -> None:
    """Each line of the page's shell blocks is a command with options that it has."""
    lines = [line for block in re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(), re.M | re.S) for line in block.splitlines()]
    assert len(lines) > 10
    for line in lines:
        words = shlex.split(line, comments=True)
        assert words[0] == "catalog"
        done = CliRunner().invoke(cli.app, [*[word for word in words[1:] if not word.startswith("--")][:2], "--help"])
        assert done.exit_code == 0, line
        for option in (word for word in words if word.startswith("--")):
            assert option in re.sub(r"\x1b\[[0-9;]*m", "", done.output), line


if __name__ == "__main__":
    PAGE.write_text(PLACE.sub(lambda found: found[1] + table() + found[3], PAGE.read_text()))
