"""Audits: views that an auditor opens, one file ``audits/<name>.sql`` each.

    -- title: What is there
    -- means: what a row is, and what to think of it; goes on
    --   in lines that are indented
    -- must be empty: no              yes, if a row means that something is wrong
    -- column root: what each column is, in the view's order
    SELECT r.name AS root, … FROM …

They are views of the database, so that any client reads them, with what they say as comments. A migration that installs some reads a
copy of its own, such as `migrations/versions/0005_audits.sql`: a migration must do tomorrow what it did today, and these files must be
free to change. Installing them from here after each migration would be shorter, and would leave a catalog whose schema is said to be 0005
with views of any age. A test holds the installed views and these files together. To add or change one: a new migration with what
``python -m catalog.auditing NAME`` prints.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql

from catalog.database import Database, explain
from catalog.errors import CatalogError, DriftError, UsageError

FOLDER = Path(__file__).parent / "audits"
AUDIT_TIMEOUT_S = 600.0
HEAD = re.compile(r"-- (?P<key>title|means|must be empty|column \w+): (?P<value>.+)")


@dataclass(frozen=True, slots=True)
class Audit:
    """One view, as its file says it."""

    name: str
    title: str
    means: str
    must_be_empty: bool
    columns: Mapping[str, str]  # with what each is
    query: str


@dataclass(slots=True)
class Found:
    """What a view holds."""

    audit: Audit
    names: list[str]
    rows: list[tuple[Any, ...]]  # the first `limit` of them
    count: int

    @property
    def failed(self) -> bool:
        """Is there something in it that must not be?"""
        return self.audit.must_be_empty and self.count > 0


def load() -> dict[str, Audit]:
    """Return the audits by name."""
    return {path.stem: parse(path) for path in sorted(FOLDER.glob("*.sql"))}


def parse(path: Path) -> Audit:
    """Return the audit in a file. Raises CatalogError if it is none."""
    head: dict[str, str] = {}
    key = ""
    lines = path.read_text("utf-8").splitlines()
    begin = 0
    for line in lines:
        if match := HEAD.fullmatch(line):
            key = match["key"]
            head[key] = match["value"]
        elif line.startswith("--   ") and key:
            head[key] += " " + line[5:]
        else:
            break
        begin += 1
    if not {"title", "means", "must be empty"} <= head.keys() or head["must be empty"] not in ("yes", "no"):
        raise CatalogError(f"{path}: is no audit: its head says title, means, and must be empty (yes or no)")
    columns = {name[7:]: said for name, said in head.items() if name.startswith("column ")}
    return Audit(path.stem, head["title"], head["means"], head["must be empty"] == "yes", columns, "\n".join(lines[begin:]).strip())


def chosen(name: str) -> Audit:
    """Return the audit of this name. Raises UsageError if there is none."""
    audits = load()
    if name not in audits:
        raise UsageError(f"{name}: there is no such audit; `catalog audit` lists them")
    return audits[name]


def statements(names: Sequence[str] = ()) -> Iterator[str]:
    """Give the statements that install audits, all or those of these names, for a migration."""
    for audit in map(chosen, names or load()):
        yield f"CREATE VIEW {audit.name} AS\n{audit.query}"
        title = audit.title + (": must be empty." if audit.must_be_empty else ".")
        yield f"COMMENT ON VIEW {audit.name} IS {_quoted(f'{title} {audit.means}')}"
        for column, said in audit.columns.items():
            yield f"COMMENT ON COLUMN {audit.name}.{column} IS {_quoted(said)}"


def look(database: Database, audit: Audit, *, limit: int | None = None) -> Found:
    """Return what a view holds: its first `limit` rows, and how many there are. Under the login that cannot write.

    Raises:
        DriftError: If the catalog does not have the view.
        CatalogError: If the database refuses, or it takes longer than ten minutes.
    """
    try:
        with database.read_only(timeout_s=AUDIT_TIMEOUT_S) as conn:
            conn.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ  # rows and count of one moment
            cursor = conn.execute(sql.SQL("SELECT * FROM {} LIMIT {}").format(sql.Identifier(audit.name), sql.Literal(limit)))
            names, rows = [column.name for column in cursor.description or ()], cursor.fetchall()
            if limit is None or len(rows) < limit:
                return Found(audit, names, rows, len(rows))
            counted = conn.execute(sql.SQL("SELECT count(*) FROM {}").format(sql.Identifier(audit.name))).fetchone()
            return Found(audit, names, rows, counted[0] if counted else 0)
    except psycopg.errors.UndefinedTable as error:
        raise DriftError(f"{database.name}: has no view {audit.name}; run `catalog init` with this version") from error
    except psycopg.Error as error:
        raise explain(error, database) from error


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


if __name__ == "__main__":
    sys.stdout.write(";\n\n".join(statements(sys.argv[1:])) + ";\n")
