"""`catalog runs` and `catalog root`: what ingests did, and where the files lie."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from catalog.database import open_database
from catalog.output import AsJson, DatabaseUrl, DryRun, cell, counted, number, print_json, print_table, say_dry

runs_app = typer.Typer(no_args_is_help=True, help="Runs of `catalog ingest`: what each brought, going again, taking it out.")
root_app = typer.Typer(no_args_is_help=True, help="Where the files lie.")

RunNumber = Annotated[int, typer.Argument(metavar="RUN", help="As `catalog runs list` shows.")]


@runs_app.command("list")
def runs_list(database: DatabaseUrl = None, as_json: AsJson = False) -> None:
    """List the runs of `catalog ingest` that had something to do, oldest first."""
    from catalog import runs

    with open_database(database) as db:
        found = runs.listed(db)
    if as_json:
        print_json(found)
        return
    if not found:
        typer.echo("nothing ingested yet: catalog ingest FOLDER")
        return
    names = ["run", "root", "layout", "state", "started", "files_seen", "files_read", "errors", "hash", "fell_back", "undone"]
    print_table(names, [[cell(row[name]) for name in names] for row in found])


@runs_app.command("show")
def runs_show(run: RunNumber, database: DatabaseUrl = None, as_json: AsJson = False) -> None:
    """Show one run: what is there of what it brought, and its errors by code with what to do."""
    from catalog import runs

    with open_database(database) as db:
        found = runs.shown(db, run)
    if as_json:
        print_json(found)
        return
    typer.echo(f"run {run} of root {found['root']} ({found['url']}), layout {found['layout']}, hash {found['hash']}: {found['state']}")
    ended = f", ended {cell(found['finished'])}" if found["finished"] else ""
    typer.echo(f"  started {cell(found['started'])}{ended}, by scanfeed {found['program_version']} on {found['host']}")
    typer.echo(
        f"  {number(found['files_seen'], 'file')} seen, {found['files_read']} read, of which pydicom read {found['fell_back']} headers"
    )
    if found["undone"]:
        typer.echo(f"  undone {cell(found['undone'])}")
    # JSON calls them files, images, annotations; here the count says how many.
    typer.echo("  brought, and there still: " + counted({name.removesuffix("s"): count for name, count in found["brought"].items()}))
    for error in found["by_code"]:
        more = ", …" if error["files"] > len(error["paths"]) else ""
        typer.echo(f"  {number(error['files'], 'error')} {error['stage']}: {error['code']}: {error['remedy']}")
        typer.echo(f"      {', '.join(error['paths'])}{more}")


@runs_app.command("undo")
def runs_undo(run: RunNumber, dry_run: DryRun = False, database: DatabaseUrl = None, as_json: AsJson = False) -> None:
    """Take out what a run brought. The next ingest of its root brings it again. Refused if something of it was fed or built upon."""
    from catalog import runs

    with open_database(database) as db:
        undone = runs.undo(db, run, dry_run=dry_run)
    say_dry(dry_run)
    if as_json:
        print_json(asdict(undone))
        return
    if not undone.changed:
        typer.echo(f"run {run} was undone already at {cell(undone.at)}: nothing changed")
        return
    typer.echo(f"run {run} undone: took out {counted(undone.rows)}")
    if undone.restored:
        typer.echo(f"of {number(undone.restored, 'annotation')} the version before is current again")
    if undone.decided:
        typer.echo(f"{number(undone.decided, 'pairing')} that people had decided went with it")
    if undone.stay:
        typer.echo(f"{number(undone.stay, 'file')} that had been there before and changed stay as the run read them")
    typer.echo("the next ingest of this root brings it again")


@root_app.command("list")
def root_list(database: DatabaseUrl = None, as_json: AsJson = False) -> None:
    """List the storage places."""
    from catalog import roots

    with open_database(database) as db:
        found = roots.listed(db)
    if as_json:
        print_json(found)
    elif not found:
        typer.echo("nothing ingested yet: catalog ingest FOLDER")
    else:
        print_table(list(found[0]), [[cell(value) for value in row.values()] for row in found])


@root_app.command("move")
def root_move(
    name: Annotated[str, typer.Argument(help="The root's name, as `catalog root list` shows.")],
    place: Annotated[str, typer.Argument(metavar="NEWPATH", help="Where its files lie now: a folder, or a URL.")],
    even_so: Annotated[bool, typer.Option("--even-so", help="Also if files that are looked for are not found there.")] = False,
    dry_run: DryRun = False,
    database: DatabaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """Say that a root's files lie elsewhere now. Moves no file; feeding reads from the new place from its next epoch on."""
    from catalog import roots

    with open_database(database) as db:
        moved = roots.move(db, name, place, even_so=even_so, dry_run=dry_run)
    say_dry(dry_run)
    if as_json:
        print_json({**asdict(moved), "changed": moved.changed})
    elif not moved.changed:
        typer.echo(f"root {name} lies in {moved.after} already: nothing changed")
    else:
        found = f"{moved.found} of {moved.looked_for} looked for were found there" if moved.looked_for else "none to look for"
        typer.echo(f"root {name}: {number(moved.files, 'file')} from {moved.before} to {moved.after}; {found}")
