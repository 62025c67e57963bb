"""`catalog`: init, ingest, status, errors, sql, show, flag, patient."""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import os
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any

import typer

from catalog import flags
from catalog.database import SQL_TIMEOUT_S, explain, open_database, schema_version, upgrade
from catalog.errors import CatalogError, UsageError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Catalog of imaging studies.")

DatabaseUrl = Annotated[
    str | None,
    typer.Option("--database", envvar="CATALOG_DATABASE_URL", help="PostgreSQL URL; without it the embedded database.", show_default=False),
]
Actor = Annotated[str | None, typer.Option(help="Who decides; by default the OS user.", show_default=False)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would happen; changes nothing.")]
PatientName = Annotated[str, typer.Argument(metavar="PATIENT", help="PatientID, or the layout's name for the patient.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def init(database: DatabaseUrl = None) -> None:
    """Make the database, or bring its schema up. Other commands do it by themselves on a fresh or embedded database."""
    with open_database(database, migrate=False) as db:
        before = upgrade(db)
        now = schema_version(db)
        typer.echo(f"{db.name}: schema {now}" + ("" if before == now else f" ({'new' if before is None else 'was ' + before})"))


@app.command()
def ingest(
    folder: Annotated[Path, typer.Argument(help="The folder that holds the studies.")],
    database: DatabaseUrl = None,
    layout: Annotated[str, typer.Option(help="auto looks by itself; or sunnybrook.")] = "auto",
    name: Annotated[str | None, typer.Option(help="The root's name; by default the folder's.", show_default=False)] = None,
    jobs: Annotated[int | None, typer.Option(min=1, max=256, help="Reading processes; by default one a core.", show_default=False)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be found; touches no database.")] = False,
    as_json: AsJson = False,
) -> None:
    """Take in what is new or changed below a folder. Exit code 3: some files could not be used; see `catalog errors`."""
    from catalog import ingest as ingesting

    if dry_run:
        chosen, found = ingesting.find(folder, layout)
        counts = {"layout": chosen, "images": len(found.images), "annotations": len(found.annotations), "left_over": found.left_over}
        problems = [asdict(problem) for problem in found.problems]
        unpaired = [drawn.entry.path for drawn in found.annotations if drawn.folder is None]
        if as_json:
            typer.echo(json.dumps({**counts, "unpaired": unpaired, "problems": problems}, indent=2))
        else:
            typer.echo(
                f"layout {chosen}: {len(found.images)} image files, {len(found.annotations)} annotations, {found.left_over} left over"
            )
            for path in unpaired:
                typer.echo(f"  unpaired  {path}")
            for problem in found.problems:
                typer.echo(f"  problem   {problem.path}: {problem.message}")
        raise typer.Exit(3 if problems else 0)
    with open_database(database) as db, _progress("reading files") as progress:
        summary = ingesting.ingest(db, folder, layout=layout, name=name, jobs=jobs, progress=progress, say=_say)
    if as_json:
        typer.echo(json.dumps(asdict(summary), indent=2))
    else:
        rate = f" ({summary.files_read / summary.seconds:.0f} files/s)" if summary.files_read else ", nothing new"
        typer.echo(
            f"{summary.root}: layout {summary.layout}: {summary.images} images, {summary.annotations} annotations: "
            f"{summary.paired} paired, {summary.proposed} proposed, {summary.unpaired} unpaired; {summary.masks} masks; "
            f"{summary.standing_errors} errors; {summary.files_read} files read in {summary.seconds:.1f} s{rate}"
        )
        if summary.missing:
            typer.echo(f"{summary.missing} files are gone and were marked missing")
    if summary.standing_errors:
        _say(f"{summary.standing_errors} errors stand; see `catalog errors`")
        raise typer.Exit(3)


@app.command()
def status(database: DatabaseUrl = None, as_json: AsJson = False) -> None:
    """Say what the catalog holds."""
    with open_database(database) as db, db.connect() as conn:
        counts = {
            table: conn.execute(f"SELECT count(*) FROM {table}").fetchone()[0]  # type: ignore[index]  # noqa: S608
            for table in ("patient", "study", "series", "image", "annotation", "mask", "run")
        }
        roots = conn.execute(
            "SELECT r.name, r.url, count(f.id), count(f.id) FILTER (WHERE f.state <> 'present') "
            "FROM root r LEFT JOIN file f ON f.root_id = r.id GROUP BY r.id ORDER BY r.id"
        ).fetchall()
        samples = conn.execute(
            "SELECT structure, count(*), count(*) FILTER (WHERE error_flags > 0) FROM sample GROUP BY 1 ORDER BY 1"
        ).fetchall()
        open_flags = conn.execute(
            "SELECT rule, severity, count(*) FROM flag WHERE state = 'open' GROUP BY 1, 2 ORDER BY severity, rule"
        ).fetchall()
        revoked = flags.revoked(conn)
        version = schema_version(db)
    if as_json:
        found = {
            "database": db.name,
            "schema": version,
            "rows": counts,
            "roots": [dict(zip(("name", "url", "files", "not_present"), row, strict=True)) for row in roots],
            "samples": [dict(zip(("structure", "samples", "with_errors"), row, strict=True)) for row in samples],
            "open_flags": [dict(zip(("rule", "severity", "count"), row, strict=True)) for row in open_flags],
            "revoked": revoked,
        }
        typer.echo(json.dumps(found, indent=2))
        return
    typer.echo(f"{db.name}, schema {version}")
    typer.echo("  " + ", ".join(f"{count} {table if count == 1 else _plural(table)}" for table, count in counts.items()))
    for name, url, files, away in roots:
        typer.echo(f"  root {name}: {url}, {files} files" + (f", {away} missing or unreadable" if away else ""))
    for structure, count, flagged in samples:
        typer.echo(f"  samples of {structure}: {count}" + (f", {flagged} with open errors" if flagged else ""))
    for rule, severity, count in open_flags:
        typer.echo(f"  open flags {rule} ({severity}): {count}")
    if revoked:
        typer.echo(f"  revoked: {_number(revoked, 'sample')}, of which nothing is fed")
    if not roots:
        typer.echo("  nothing ingested yet: catalog ingest FOLDER")


@app.command()
def errors(
    database: DatabaseUrl = None,
    run: Annotated[int | None, typer.Option(help="Of this ingest; by default of each root's last.", show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """List what ingests could not take in."""
    with open_database(database) as db, db.connect() as conn:
        rows = conn.execute(
            "SELECT e.ingest_run_id, r.name, e.path, e.stage, e.code, e.message FROM ingest_error e "
            "JOIN ingest_run i ON i.id = e.ingest_run_id JOIN root r ON r.id = i.root_id "
            "WHERE e.ingest_run_id = coalesce(%s, (SELECT max(o.id) FROM ingest_run o WHERE o.root_id = i.root_id)) ORDER BY e.id",
            [run],
        ).fetchall()
    names = ("run", "root", "path", "stage", "code", "message")
    if as_json:
        typer.echo(json.dumps([dict(zip(names, row, strict=True)) for row in rows], indent=2))
    else:
        for number, root, path, stage, code, message in rows:
            typer.echo(f"run {number}  {root}/{path}  [{stage}: {code}]  {message}")


@app.command()
def sql(
    query: Annotated[str, typer.Argument(help="One statement; views: sample, image_all, annotation_all, epoch_coverage.")],
    database: DatabaseUrl = None,
    as_json: AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds the statement may take.")] = SQL_TIMEOUT_S,
) -> None:
    """Ask the catalog in SQL, under a login that cannot write."""
    import psycopg

    if as_json and as_csv:
        raise UsageError("--json and --csv: choose one")
    with open_database(database) as db, db.read_only(timeout_s=timeout) as conn, conn.cursor() as cursor:
        try:
            # Prepared: the extended protocol carries one statement, so nothing can follow the first.
            cursor.execute(query.encode(), prepare=True)
            names = [column.name for column in cursor.description or ()]
            rows = cursor.fetchall() if cursor.description else []
        except psycopg.errors.InsufficientPrivilege as error:
            raise CatalogError(f"sql: refused: {error.diag.message_primary}; this login can only read") from error
        except psycopg.errors.ReadOnlySqlTransaction as error:
            raise CatalogError(f"sql: refused: {error.diag.message_primary}; this login can only read") from error
        except psycopg.OperationalError as error:
            raise explain(error, db) from error
        except psycopg.Error as error:
            raise CatalogError(f"sql: {error.diag.message_primary or str(error).splitlines()[0]}") from error
    if as_json:
        typer.echo(json.dumps([dict(zip(names, map(_plain, row), strict=True)) for row in rows], indent=2))
    elif as_csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(names)
        writer.writerows([["" if value is None else _plain(value) for value in row] for row in rows])
    else:
        _print_table(names, [["" if value is None else str(_plain(value)) for value in row] for row in rows])


@app.command()
def show(
    sample: Annotated[int, typer.Argument(help="A sample_id of the views sample and image_all.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The PNG file to write.")],
    database: DatabaseUrl = None,
) -> None:
    """Draw an image with its contours and masks."""
    from catalog import show as showing

    with open_database(database) as db:
        png = showing.picture(db, sample)
    output.write_bytes(png)
    typer.echo(str(output))


flag_app = typer.Typer(no_args_is_help=True, help="Findings: raise, list and close them.")
app.add_typer(flag_app, name="flag")
patient_app = typer.Typer(no_args_is_help=True, help="Consent: withdraw it, give it back.")
app.add_typer(patient_app, name="patient")
# The words of an unquoted name are taken, so that no message of the command line's parser repeats them.
ONE_NAME = {"allow_extra_args": True}


@flag_app.command("add", context_settings=ONE_NAME)
def flag_add(
    context: typer.Context,
    subject: Annotated[str, typer.Argument(help="sample:17, file:9, annotation:3, pairing:5, series:UID, study:UID or patient:NAME.")],
    rule: Annotated[str, typer.Option(help="A short code, such as BAD-CONTOUR.")],
    detail: Annotated[str, typer.Option(help="What was found, in words.")],
    severity: Annotated[flags.Severity, typer.Option(help="Open errors keep samples out of feeding.")] = flags.Severity.ERROR,
    revoke: Annotated[bool, typer.Option("--revoke", help="Feed nothing of it any more, at once, from frozen streams too.")] = False,
    actor: Actor = None,
    dry_run: DryRun = False,
    database: DatabaseUrl = None,
) -> None:
    """Raise a flag; says what it keeps out, and with --revoke which runs saw it. Daemons take up to a second: again lists all."""
    _one_name(context)
    with open_database(database) as db:
        added = flags.add(db, subject, rule=rule, detail=detail, severity=severity, revoke=revoke, actor=actor, dry_run=dry_run)
    _say_dry(dry_run)
    kind, _, name = subject.partition(":")
    for flag in added.flags:
        _print_flag(flag, f"{kind} {name}" if flags.NAMED_BY[kind][1] == "id" else f"the {kind}")
    samples = _number(added.images, "sample")
    if any(flag.revokes for flag in added.flags):
        typer.echo(f"affects {samples}, fed no more, and what is ingested of it later")
        _print_seen(added.seen)
    elif any(flag.severity == flags.Severity.ERROR for flag in added.flags):
        typer.echo(f"affects {samples}, left out from the next epoch on")
    else:
        typer.echo(f"affects {samples}, fed all the same: it is no error")


@flag_app.command("list")
def flag_list(
    rule: Annotated[str | None, typer.Option(help="Those of this rule alone.", show_default=False)] = None,
    state: Annotated[flags.State, typer.Option(help="open, or all with those that were closed.")] = flags.State.OPEN,
    database: DatabaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """List flags, oldest first."""
    with open_database(database) as db:
        rows = flags.listed(db, rule=rule, state=state)
    if as_json:
        typer.echo(json.dumps([{name: _plain(value) for name, value in row.items()} for row in rows], indent=2))
    elif not rows:
        typer.echo("no flags" if state == flags.State.ALL else "no open flags")
    else:
        names = [name for name in rows[0] if state == flags.State.ALL or name not in ("state", "closed_by", "closed_at", "reason")]
        _print_table(names, [[_cell(row[name]) for name in names] for row in rows])


@flag_app.command("close")
def flag_close(
    ids: Annotated[list[int], typer.Argument(metavar="ID...", help="As `catalog flag list` shows.")],
    reason: Annotated[str, typer.Option(help="Why, in words.")],
    false_positive: Annotated[bool, typer.Option("--false-positive", help="There was nothing wrong.")] = False,
    actor: Actor = None,
    dry_run: DryRun = False,
    database: DatabaseUrl = None,
) -> None:
    """Close flags, all or none. What they kept out is fed again, unless another flag keeps it out."""
    with open_database(database) as db:
        closed = flags.close(db, ids, reason=reason, false_positive=false_positive, actor=actor, dry_run=dry_run)
    _say_dry(dry_run)
    _print_closed(closed)


@patient_app.command(context_settings=ONE_NAME)
def withdraw(
    context: typer.Context,
    patient: PatientName,
    reason: Annotated[str, typer.Option(help="More about it, in words.", show_default=False)] = "",
    actor: Actor = None,
    dry_run: DryRun = False,
    database: DatabaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """Consent is withdrawn: feed nothing of the patient any more, also of what comes later; says which trainings saw the patient.

    Running daemons take up to a second: the same command again lists what they delivered until then.
    """
    _one_name(context)
    with open_database(database) as db:
        added = flags.withdraw(db, patient, reason=reason, actor=actor, dry_run=dry_run)
    _say_dry(dry_run)
    [flag] = added.flags
    if as_json:
        found = {"flag": flag.id, "change": flag.change, "dry_run": dry_run, "images": added.images, "annotations": added.annotations}
        seen = [{name: _plain(value) for name, value in asdict(one).items()} for one in added.seen]
        typer.echo(json.dumps({**found, "seen": seen}, indent=2))
        return
    _print_flag(flag, "the patient")
    typer.echo(f"takes out {_number(added.images, 'image')} and {_number(added.annotations, 'annotation')}, and what is ingested later")
    _print_seen(added.seen)


@patient_app.command(context_settings=ONE_NAME)
def reinstate(
    context: typer.Context,
    patient: PatientName,
    reason: Annotated[str, typer.Option(help="Why, in words.")],
    actor: Actor = None,
    dry_run: DryRun = False,
    database: DatabaseUrl = None,
) -> None:
    """Consent is given again: close the flag of `catalog patient withdraw`."""
    _one_name(context)
    with open_database(database) as db:
        closed = flags.reinstate(db, patient, reason=reason, actor=actor, dry_run=dry_run)
    _say_dry(dry_run)
    _print_closed(closed)
    if not closed:
        typer.echo("the patient is not withdrawn: nothing changed")


def _one_name(context: typer.Context) -> None:
    if context.args:
        raise UsageError("one at a time; a name with spaces goes into quotes")


def _say_dry(dry_run: bool) -> None:
    if dry_run:
        _say("dry run: nothing was changed; this is what would be said")


def _print_flag(flag: flags.Flag, on: str) -> None:
    what = f"flag {flag.id or '(new)'} ({flag.severity}{', revokes' if flag.revokes else ''}) on {on}"
    if flag.change is None:
        typer.echo(f"{what} is open already, raised by {flag.raised_by} at {_cell(flag.raised_at)}: nothing changed")
    else:
        typer.echo(f"{what} {flag.change}")


def _print_closed(closed: list[flags.Closed]) -> None:
    for flag in closed:
        if not flag.changed:
            typer.echo(f"flag {flag.id} was closed already by {flag.closed_by} at {_cell(flag.closed_at)} ({flag.state}): nothing changed")
            continue
        freed = f"; {_number(flag.freed, 'sample')} no longer revoked" if flag.revoked else ""
        held = f", {flag.held} still are by other flags" if flag.held else ""
        typer.echo(f"flag {flag.id} ({flag.rule}) closed: {flag.state}{freed}{held}")


def _print_seen(seen: list[flags.Seen]) -> None:
    if not seen:
        typer.echo("no run saw any of it")
        return
    typer.echo(f"seen already by {_number(len({one.run for one in seen}), 'run')}:")
    rows = []
    for one in seen:
        samples = f"{one.samples}{'+' if one.pruned else ''}"
        times = [_cell(one.first), _cell(one.last)]
        models = ", ".join(one.models) or "none noted"
        rows.append([one.run, one.stream_name or str(one.stream), _ranges(one.epochs), samples, str(one.deliveries), *times, models])
    _print_table(["run", "stream", "epochs", "samples", "deliveries", "first", "last", "models"], rows)
    if any(one.pruned for one in seen):
        typer.echo("+ perhaps more in pruned epochs, of which only the patients are known")


def _ranges(numbers: list[int]) -> str:
    """Return sorted numbers as 0-3, 5."""
    runs = [[at for _, at in group] for _, group in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _number(count: int, noun: str) -> str:
    return f"{count} {noun if count == 1 else _plural(noun)}"


def _cell(value: Any) -> str:
    """Return a value as one line of a table."""
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d %H:%M:%S}"
    return "" if value is None else " ".join(str(value).split())


def _plain(value: Any) -> Any:
    """Return a value as JSON and CSV can carry it."""
    if isinstance(value, memoryview | bytes):
        return bytes(value).hex()
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, uuid.UUID) or (value is not None and not isinstance(value, str | int | float | bool | dict)):
        return str(value)
    return value


def _print_table(names: list[str], rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]
    numbers = [all(value.replace(".", "", 1).lstrip("-").isdigit() or not value for value in column) for column in zip(*rows, strict=True)]
    for number, row in enumerate([names, *rows]):
        cells = [
            value.rjust(width) if numeric else value.ljust(width)
            for value, width, numeric in zip(row, widths, numbers or [False] * len(names), strict=True)
        ]
        typer.echo("  ".join(cells).rstrip())
        if number == 0:
            typer.echo("  ".join("-" * width for width in widths))


def _plural(noun: str) -> str:
    return {"patient": "patients", "study": "studies", "series": "series"}.get(noun, noun + "s")


def _say(line: str) -> None:
    typer.echo(f"catalog: {line}", err=True)


@contextlib.contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show files/s and the time left on stderr, ten times a second; nothing when that is no terminal."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=10, transient=True) as bar:
        task = bar.add_task(what, total=None, rate="")

        def update(done: int, total: int) -> None:
            speed = bar.tasks[0].speed
            bar.update(task, completed=done, total=total, rate=f"{speed:.0f} files/s" if speed else "")

        yield update


# Typer exports neither, and since 0.16 carries a click of its own.
_ClickException: type[Exception] = typer.BadParameter.__mro__[2]


def run(command: typer.Typer, name: str) -> None:
    """Run a command line: an expected error is one line on stderr and its exit code, Ctrl-C is 130."""
    try:
        code = command(prog_name=name, standalone_mode=False)
        if code == 130:  # how newer Typers say that Ctrl-C came
            raise KeyboardInterrupt
        sys.exit(code)
    except CatalogError as error:
        typer.echo(f"{name}: {error}", err=True)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        typer.echo(f"{name}: interrupted; the same command goes on where this one ended", err=True)
        sys.exit(130)
    except BrokenPipeError:  # `catalog sql … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        typer.echo(f"{name}: {where}{error.strerror or error}", err=True)
        sys.exit(1)
    except _ClickException as error:
        if message := error.format_message().rstrip("."):  # type: ignore[attr-defined] # empty: help was printed
            typer.echo(f"{name}: {message}; see `{name} --help`", err=True)
        sys.exit(2)


def main() -> None:
    """Entry point of `catalog`."""
    run(app, "catalog")


if __name__ == "__main__":
    main()
