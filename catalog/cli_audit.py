"""`catalog audit`, `schema`, `sql` and `db`: asking the catalog anything, and who may do what."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from catalog import asking, auditing, dictionary, roles
from catalog.asking import Answer, Format
from catalog.database import SQL_TIMEOUT_S, open_database
from catalog.errors import UsageError
from catalog.output import AsJson, DatabaseUrl, DryRun, cell, number, plain, print_json, print_table, say, say_dry

db_app = typer.Typer(no_args_is_help=True, help="The database itself: a shell on it, and the roles of those who use it.")
SHOWN = 20  # rows of a view that `audit --all` prints

AsCsv = Annotated[bool, typer.Option("--csv", help="Print CSV.")]


def audit(
    name: Annotated[str | None, typer.Argument(help="A view; without one they are listed.", show_default=False)] = None,
    every: Annotated[bool, typer.Option("--all", help=f"All views, the first {SHOWN} rows of each.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many rows of a view.", show_default=False)] = None,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
    database: DatabaseUrl = None,
) -> None:
    """Print views for auditors. Exit code 3: one that must be empty is not."""
    if as_json and as_csv:
        raise UsageError("--json and --csv: choose one")
    if name is not None and every:
        raise UsageError("NAME and --all: choose one")
    if name is None and not every:
        if as_csv or limit:
            raise UsageError("--csv and --limit: need NAME; `catalog audit` lists the views")
        _list_audits(as_json)
        return
    if every and as_csv:
        raise UsageError("--csv: takes one view; name it, or use --json")
    asked = list(auditing.load().values()) if name is None else [auditing.chosen(name)]
    with open_database(database) as db:
        found = [auditing.look(db, one, limit=limit or (SHOWN if every else None)) for one in asked]
    if as_json:
        print_json([
            {"name": one.audit.name, "title": one.audit.title, "must_be_empty": one.audit.must_be_empty, "count": one.count,
             "rows": [dict(zip(one.names, map(plain, row), strict=True)) for row in one.rows]}
            for one in found
        ])  # fmt: skip
    else:
        for one in found:
            if every:
                typer.echo(f"{one.audit.name}: {one.audit.title}{', must be empty' if one.audit.must_be_empty else ''}")
            if as_csv:
                asking.write(Answer(one.names, one.rows), Format.CSV, None)
            else:
                print_table(one.names, [[cell(value) for value in row] for row in one.rows])
                typer.echo(_counted(one))
            if every:
                typer.echo()
    if failed := [one for one in found if one.failed]:
        for one in failed:
            say(f"{one.audit.name}: {number(one.count, 'row')} where there must be none: {one.audit.title}")
        raise typer.Exit(3)


def _list_audits(as_json: bool) -> None:
    found = auditing.load().values()
    if as_json:
        print_json([
            {"name": one.name, "title": one.title, "means": one.means, "must_be_empty": one.must_be_empty, "columns": dict(one.columns)}
            for one in found
        ])  # fmt: skip
    else:
        print_table(["audit", "must be empty", "title"], [[one.name, "yes" if one.must_be_empty else "", one.title] for one in found])


def _counted(found: auditing.Found) -> str:
    if len(found.rows) == found.count:
        return f"({number(found.count, 'row')})"
    return f"({len(found.rows)} of {number(found.count, 'row')}; catalog audit {found.audit.name})"


def schema(
    table: Annotated[str | None, typer.Argument(help="A table or view; without one they are listed.", show_default=False)] = None,
    as_json: AsJson = False,
    database: DatabaseUrl = None,
) -> None:
    """Print the data dictionary: what each table, view and column is, as the database itself says."""
    with open_database(database) as db:
        found = dictionary.relations(db, table)
    if as_json:
        print_json(found)
    elif table is None:
        print_table(["name", "kind", "columns", "what it is"],
                    [[one["name"], one["kind"], str(len(one["columns"])), _first_sentence(one["comment"])] for one in found])  # fmt: skip
    else:
        [one] = found
        typer.echo(f"{one['kind']} {one['name']}: {one['comment']}\n")
        rows = [[column["name"], column["type"], "" if column["null"] else "not null", column["default"], column["comment"]]
                for column in one["columns"]]  # fmt: skip
        print_table(["column", "type", "", "default", "what it is"], rows)
        for kind, lines in (("constraints", one["constraints"]), ("indexes", one["indexes"]), ("triggers", one["triggers"])):
            if lines:
                typer.echo(f"\n{kind}")
                for line in lines:
                    typer.echo(f"  {line['name']}: {line['definition']}")


def _first_sentence(text: str) -> str:
    head, dot, _ = text.partition(". ")
    return head + dot.strip()


def sql(
    query: Annotated[
        str | None,
        typer.Argument(
            help="One statement; views: sample, image_all, annotation_all, epoch_coverage; see `catalog schema`.", show_default=False
        ),
    ] = None,
    file: Annotated[
        str | None,
        typer.Option("-f", "--file", metavar="FILE", help="The statement is in this file; -: on standard input.", show_default=False),
    ] = None,
    form: Annotated[Format, typer.Option("--format", help="How rows are written.")] = Format.TABLE,
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write them to a file.", show_default=False)] = None,
    database: DatabaseUrl = None,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds the statement may take.")] = SQL_TIMEOUT_S,
) -> None:
    """Ask the catalog in SQL, under a login that cannot write."""
    chosen = {form} - {Format.TABLE} | ({Format.JSON} if as_json else set()) | ({Format.CSV} if as_csv else set())
    if len(chosen) > 1:
        raise UsageError(f"{' and '.join(sorted(f'--{one.value}' for one in chosen))}: choose one format")
    form = chosen.pop() if chosen else Format.TABLE
    if (query is None) == (file is None):
        raise UsageError("the statement: as an argument or with -f FILE, one of the two")
    if form == Format.PARQUET and output is None:
        raise UsageError("--format parquet: needs -o FILE; it is no text")
    statement = _read(file) if file is not None else query or ""
    with open_database(database) as db:
        answer = asking.ask(db, statement, timeout_s=timeout)
    asking.write(answer, form, output)
    if output is not None:
        say(f"{number(len(answer.rows), 'row')} written to {output}")


def _read(file: str) -> str:
    try:
        return sys.stdin.buffer.read().decode() if file == "-" else Path(file).read_text("utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"-f {file}: is not UTF-8 text; save it so") from None


@db_app.command("shell", context_settings={"allow_interspersed_args": False})
def db_shell(
    command: Annotated[
        list[str] | None,
        typer.Argument(help="A program to run in place of psql, such as pg_dump, with its arguments.", show_default=False),
    ] = None,
    owner: Annotated[bool, typer.Option("--owner", help="With all rights of the catalog's owner, instead of those to read.")] = False,
    database: DatabaseUrl = None,
) -> None:
    """Open psql, or another of PostgreSQL's programs, on the catalog, under the login that cannot write."""
    from catalog import shell

    with open_database(database) as db:
        raise typer.Exit(shell.run(db, command or (), owner=owner))


@db_app.command("roles")
def db_roles(dry_run: DryRun = False, as_json: AsJson = False, database: DatabaseUrl = None) -> None:
    """Make group roles: owner, ingest, review, train, audit. Run it again at any time: each gets exactly its rights, members stay."""
    with open_database(database) as db:
        found, statements = roles.make(db, dry_run=dry_run)
    say_dry(dry_run)
    if as_json:
        print_json({"roles": [{"name": one.name, "may": one.may, "made": one.made, "members": one.members} for one in found],
                    "statements": statements})  # fmt: skip
        return
    if dry_run:
        for statement in statements:
            typer.echo(f"{statement};")
        return
    print_table(["role", "", "members", "may"],
                [[one.name, "made" if one.made else "renewed", ", ".join(one.members), one.may] for one in found])  # fmt: skip
    typer.echo(f"make somebody a member: GRANT {found[-1].name} TO somebody")
