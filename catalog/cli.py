"""`catalog`: init, ingest, measure, status, errors, digest, show; the others' commands are in `cli_…`."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from catalog import cli_audit, cli_pictures, flags
from catalog.cli_annotations import annotations_app
from catalog.cli_decide import pair_app, patient_app
from catalog.cli_export import export
from catalog.cli_flags import flag_app
from catalog.cli_interpolate import interpolate
from catalog.cli_keep import RunNumber, root_app, runs_app
from catalog.cli_qa import qa_app
from catalog.cli_snapshot import snapshot_app
from catalog.cli_split import split_app
from catalog.cli_threshold import threshold
from catalog.database import Database, open_database, schema_version, upgrade
from catalog.errors import CatalogError, UsageError
from catalog.output import AsJson, DatabaseUrl, number, plural, print_json, progress, run, say

if TYPE_CHECKING:
    from catalog.pseudonyms import Pseudonyms

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Catalog of imaging studies.")
app.add_typer(flag_app, name="flag")
app.add_typer(pair_app, name="pair")
app.add_typer(patient_app, name="patient")
app.add_typer(runs_app, name="runs")
app.add_typer(root_app, name="root")
app.add_typer(qa_app, name="qa")
cli_pictures.register(app)
app.add_typer(annotations_app, name="annotations")
app.add_typer(cli_audit.db_app, name="db")
app.add_typer(split_app, name="split")
app.add_typer(snapshot_app, name="snapshot")
for command in (cli_audit.audit, cli_audit.schema, cli_audit.sql, export, interpolate, threshold):
    app.command()(command)


class Hash(StrEnum):
    """What of each file is hashed."""

    FULL = "full"
    HEAD = "head"
    NONE = "none"


class Dates(StrEnum):
    """What becomes of a patient's dates."""

    SHIFT = "shift"
    DROP = "drop"


KeyFile = Annotated[
    Path | None,
    typer.Option(
        metavar="KEYFILE",
        help="Keep keyed hashes (HMAC-SHA256) in the place of patients, UIDs, paths and names. The catalog's first ingest decides it, "
        "and all others need the same key: a file of 32 random bytes or more that nobody else may read.",
        show_default=False,
    ),
]
KeptDates = Annotated[
    Dates | None,
    typer.Option(help="With --pseudonymize: shift a patient's dates by the same days (the default), or drop them.", show_default=False),
]
KeepName = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME", help="With --pseudonymize: a structure or reader that keeps its name; again for more.", show_default=False
    ),
]


@app.command()
def init(database: DatabaseUrl = None) -> None:
    """Make the database, or bring its schema up. Other commands do it by themselves on a fresh or embedded database."""
    with open_database(database, migrate=False) as db:
        before = upgrade(db)
        now = schema_version(db)
        typer.echo(f"{db.name}: schema {now}" + ("" if before == now else f" ({'new' if before is None else 'was ' + before})"))


@app.command()
def ingest(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="The folder, or URL with ://, that holds the studies.")],
    database: DatabaseUrl = None,
    layout: Annotated[str, typer.Option(help="auto looks by itself; or the name of one, such as sunnybrook or dicom.")] = "auto",
    table: Annotated[
        str | None, typer.Option(metavar="FILE", help="A CSV or Parquet that says which file is what.", show_default=False)
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(metavar="ROLE=NAME", help="How the table calls a column, such as image=path; again for more.", show_default=False),
    ] = None,
    pattern: Annotated[
        str | None, typer.Option(metavar="FILE", help="TOML with regular expressions over paths.", show_default=False)
    ] = None,
    reader: Annotated[
        str | None, typer.Option(metavar="MODULE:FUNCTION", help="A layout of your own, in Python.", show_default=False)
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Share from which a pixel of a fractional DICOM SEG belongs to the mask; 0.5.", show_default=False)
    ] = None,
    hashing: Annotated[
        Hash | None,
        typer.Option(
            "--hash",
            help="full: files and pixels, for a folder the default; head: of each file the first 64 KiB, so a change behind them that "
            "keeps size and time is not seen, and no pixels; none, for a URL the default: moved files are new ones. Without pixels hashed, "
            "see `catalog measure`.",
            show_default=False,
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="The root's name; by default the folder's.", show_default=False)] = None,
    jobs: Annotated[int | None, typer.Option(min=1, max=256, help="Reading processes; by default one a core.", show_default=False)] = None,
    dask: Annotated[
        str | None, typer.Option(metavar="SCHEDULER", help="Read on a Dask cluster: tls://…, or one on this machine.", show_default=False)
    ] = None,
    executor: Annotated[
        str | None,
        typer.Option(metavar="MODULE:FUNCTION", help="Read on the concurrent.futures.Executor that it returns.", show_default=False),
    ] = None,
    pseudonymize: KeyFile = None,
    dates: KeptDates = None,
    keep_name: KeepName = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be found; touches no database.")] = False,
    as_json: AsJson = False,
) -> None:
    """Take in what is new or changed below a folder. Exit code 3: some files could not be used; see `catalog errors`."""
    from catalog.reading import TASKS_AT_ONCE
    from catalog.remote import is_url

    options: dict[str, Any] = {
        "table": _file(table),
        "columns": _columns(column),
        "pattern": _file(pattern),
        "reader": reader,
        "threshold": threshold,
    }
    options = {role: value for role, value in options.items() if value is not None}
    place = folder if is_url(folder) else Path(folder)
    names = _pseudonyms(pseudonymize, dates, keep_name)
    if dry_run:
        _look(place, layout, options, as_json, names)
        return
    from catalog import executors

    with open_database(database) as db, executors.of(dask, executor) as elsewhere:
        pool, at_once = elsewhere or (None, TASKS_AT_ONCE)
        _ingest(
            db, place, as_json, layout=layout, options=options, name=name, names=names, hashing=hashing and hashing.value, jobs=jobs,
            executor=pool, at_once=at_once,
        )  # fmt: skip


@runs_app.command("retry")
def runs_retry(
    run: RunNumber,
    database: DatabaseUrl = None,
    jobs: Annotated[int | None, typer.Option(min=1, max=256, help="Reading processes; by default one a core.", show_default=False)] = None,
    pseudonymize: KeyFile = None,
    dates: KeptDates = None,
    keep_name: KeepName = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be found; changes nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Ingest the root of a run again with its layout and hash: what failed is tried again, and what is new or changed taken in."""
    from catalog import runs
    from catalog.pseudonyms import agree
    from catalog.remote import is_url

    names = _pseudonyms(pseudonymize, dates, keep_name)
    with open_database(database) as db:
        with db.connect() as conn:
            agree(conn, names)
        url, layout, hashing = runs.again(db, run)
        place = url if is_url(url) else Path(url)
        if dry_run:
            _look(place, layout, {}, as_json, names)
        else:
            _ingest(db, place, as_json, layout=layout, names=names, hashing=hashing, jobs=jobs, retry=True)


@patient_app.command("pseudonym")
def patient_pseudonym(
    key: Annotated[Path, typer.Argument(metavar="KEYFILE", help="The key of the catalog.")],
) -> None:
    """Say what stands for PatientIDs in a pseudonymized catalog: reads one a line from standard input. Touches no database."""
    names = _pseudonyms(key, None, None)
    assert names is not None
    for line in sys.stdin:
        if name := line.strip():
            typer.echo(names.patient(name))


@app.command()
def where(
    tokens: Annotated[list[str], typer.Argument(metavar="TOKEN…", help="As `root list`, `errors`, `flag list` (file:3) and others say.")],
    database: DatabaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """Say where files and roots of a pseudonymized catalog lie, and which names tokens stand for; for the owner, an ingest and a daemon."""
    from catalog import places

    with open_database(database) as db, db.connect() as conn:
        found = places.revealed(conn, tokens)
    if as_json:
        print_json(dict(found))
    else:
        for token, said in found:
            if said is not None:
                typer.echo(f"{token}: {said}")
    if unknown := [token for token, said in found if said is None]:
        raise CatalogError(f"{', '.join(unknown)}: no file, root or name of this catalog stands behind it")


def _pseudonyms(key: Path | None, dates: Dates | None, keep: list[str] | None) -> Pseudonyms | None:
    from catalog.pseudonyms import Pseudonyms, read_key

    if key is None:
        if dates is not None or keep:
            raise UsageError(f"{'--dates' if dates is not None else '--keep-name'}: goes with --pseudonymize KEYFILE alone")
        return None
    return Pseudonyms(read_key(key), dates=None if dates is None else dates.value, keep=keep or ())


def _file(path: str | None) -> str | None:
    """Return a file as a layout takes it: absolute if it is there for the user, else relative to the root."""
    return str(Path(path).resolve()) if path is not None and Path(path).is_file() else path


def _columns(given: list[str] | None) -> dict[str, str] | None:
    columns = {}
    for one in given or ():
        role, equals, column = one.partition("=")
        if not (role and equals and column) or role in columns:
            raise UsageError("--column: is ROLE=NAME, each role once, such as --column image=path")
        columns[role] = column
    return columns or None


def _look(place: Path | str, layout: str, options: dict[str, Any], as_json: bool, names: Pseudonyms | None) -> None:
    """Say what an ingest would find, by names and tables alone; ends with exit code 3 where something is wrong."""
    from catalog.ingest import find

    layout, found = find(place, layout, options, quiet=names is not None)
    if names is not None:
        found = names.found(found, layout)
    paired: list[dict[str, Any]] = []
    proposed: list[dict[str, Any]] = []
    unpaired: list[dict[str, Any]] = []
    inside: list[str] = []
    for drawn in found.annotations:
        if drawn.unpaired:
            unpaired.append({"path": drawn.entry.path, "why": drawn.unpaired})
        elif drawn.candidates:
            (paired if len(drawn.candidates) == 1 else proposed).append({"path": drawn.entry.path, "images": list(drawn.candidates)})
        else:  # a number that is looked for in headers, or what the file itself says
            inside.append(drawn.entry.path)
    if as_json:
        counts = {"layout": layout, "chosen": found.chosen, "images": len(found.images), "annotations": len(found.annotations)}
        pairs = {"paired": len(paired), "proposed": proposed, "by_content": inside, "unpaired": unpaired, "left_over": found.left_over}
        print_json({**counts, **pairs, "problems": [asdict(problem) for problem in found.problems]})
    else:
        typer.echo(f"layout {', '.join(found.chosen) or layout}: {number(len(found.images), 'image file')}, "
                   f"{number(len(found.annotations), 'annotation file')}: {len(paired)} would be paired, {len(proposed)} proposed, "
                   f"{len(inside)} by what stands inside, {len(unpaired)} unpaired; {found.left_over} left over")  # fmt: skip
        for one in proposed:
            typer.echo(f"  proposed  {one['path']}: {', '.join(one['images'])}")
        for one in unpaired:
            typer.echo(f"  unpaired  {one['path']}: {one['why']}")
        for problem in found.problems:
            typer.echo(f"  refused   {problem.path}: {problem.message}")
    if found.problems:
        raise typer.Exit(3)


def _ingest(db: Database, place: Path | str, as_json: bool, **how: Any) -> None:
    from catalog import erased
    from catalog import ingest as ingesting

    with progress("reading files") as update:
        summary = ingesting.ingest(db, place, progress=update, say=say, **how)
    if as_json:
        print_json(asdict(summary))
    else:
        rate = f" ({summary.files_read / summary.seconds:.0f} files/s)" if summary.files_read else ", nothing new"
        typer.echo(
            f"{summary.root}: layout {summary.layout}: {number(summary.images, 'image')}, {number(summary.annotations, 'annotation')}: "
            f"{summary.paired} paired, {summary.proposed} proposed, {summary.unpaired} unpaired; {number(summary.masks, 'mask')}; "
            f"{number(summary.standing_errors, 'error')}; {number(summary.files_read, 'file')} read in {summary.seconds:.1f} s{rate}"
        )
        for chosen in summary.chosen:
            typer.echo(f"  {chosen}")
        if summary.fell_back:
            share = summary.fell_back / max(summary.files_read, 1)
            typer.echo(f"of {summary.fell_back} files ({share:.1%}) pydicom read the header, the others our own reader")
        if summary.moved:
            typer.echo(f"{number(summary.moved, 'file')} moved within the root, and are known still")
        if summary.missing:
            typer.echo(f"{number(summary.missing, 'file')} {'is' if summary.missing == 1 else 'are'} gone, and now marked missing")
    if summary.standing_errors:
        stand = "error stands" if summary.standing_errors == 1 else "errors stand"
        say(f"{summary.standing_errors} {stand}; see `catalog errors`")
        with db.connect() as conn:
            refused = erased.refused(conn, summary.root)
        if refused:
            whose = "is a file of a patient who was erased" if refused == 1 else "are files of patients who were erased"
            say(f"{refused} of them {whose}: remove what is still on the disk, then ingest again")
        raise typer.Exit(3)


@app.command()
def measure(
    database: DatabaseUrl = None,
    jobs: Annotated[int | None, typer.Option(min=1, max=256, help="Processes; by default one a core.", show_default=False)] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many images.", show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """Read the pixels of what was not measured yet: hash, least, largest, mean, entropy. Stop it at any time; it goes on where it ended."""
    from catalog import measuring

    with open_database(database) as db, progress("measuring images") as update:
        summary = measuring.measure(db, jobs=jobs, limit=limit, progress=update, say=say)
    if as_json:
        print_json(asdict(summary))
    else:
        rate = f" ({summary.measured / summary.seconds:.0f} images/s)" if summary.measured and summary.seconds else ""
        typer.echo(f"{number(summary.measured, 'image')} measured, {summary.hashed} hashed in {summary.seconds:.1f} s{rate}")
        if summary.contours:
            typer.echo(f"edges along {number(summary.contours, 'contour')} measured")
        for why, count in summary.left.items():
            typer.echo(f"  {number(count, 'image')} left: {why}")
        if summary.not_measured:
            typer.echo(f"not measured: {number(summary.not_measured, 'image')}")
    if summary.flagged:
        say(f"{number(summary.flagged, 'file')} could not be read and were flagged; see `catalog flag list`")
        raise typer.Exit(3)


@app.command()
def digest(database: DatabaseUrl = None, as_json: AsJson = False) -> None:
    """Print one sha256 of what the catalog says: equal for equal content, however it came in. --json: of each table, too."""
    from catalog import digest as digesting

    with open_database(database) as db:
        whole, tables = digesting.digest(db)
    if as_json:
        print_json({"sha256": whole, "tables": {table: asdict(one) for table, one in tables.items()}})
    else:
        typer.echo(whole)


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
        frozen = conn.execute("SELECT snapshot, samples, erased, revoked, flagged FROM snapshot_contents").fetchall()
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
            "snapshots": [dict(zip(("name", "samples", "erased", "revoked", "flagged"), row, strict=True)) for row in frozen],
        }
        typer.echo(json.dumps(found, indent=2))
        return
    typer.echo(f"{db.name}, schema {version}")
    typer.echo("  " + ", ".join(f"{count} {table if count == 1 else plural(table)}" for table, count in counts.items()))
    for name, url, files, away in roots:
        typer.echo(f"  root {name}: {url}, {files} files" + (f", {away} missing or unreadable" if away else ""))
    for structure, count, flagged in samples:
        typer.echo(f"  samples of {structure}: {count}" + (f", {flagged} with open errors" if flagged else ""))
    for rule, severity, count in open_flags:
        typer.echo(f"  open flags {rule} ({severity}): {count}")
    if revoked:
        typer.echo(f"  revoked: {number(revoked, 'sample')}, of which nothing is fed")
    for name, count, *since in frozen:
        became = [f"{many} {what}" for many, what in zip(since, ("erased", "revoked", "with open errors"), strict=True) if many]
        typer.echo(f"  snapshot {name}: {number(count, 'sample')}" + (f", of which now {', '.join(became)}" if became else ""))
    if not roots:
        typer.echo("  nothing ingested yet: catalog ingest FOLDER")


@app.command()
def errors(
    database: DatabaseUrl = None,
    run: Annotated[int | None, typer.Option(help="What this ingest noted; by default what stands now.", show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """List what could not be taken in, and what is wrong with it still."""
    from catalog import runs

    with open_database(database) as db, db.connect() as conn:
        rows = runs.errors(conn, run)
    names = ("run", "root", "path", "stage", "code", "message")
    if as_json:
        typer.echo(json.dumps([dict(zip(names, row, strict=True)) for row in rows], indent=2))
    else:
        for of_run, root, path, stage, code, message in rows:
            typer.echo(f"run {of_run}  {root}/{path}  [{stage}: {code}]  {message}")
        if len(rows) > 1:
            by_code = Counter(code for *_, code, _ in rows).most_common()
            say(f"{number(len(rows), 'error')}: {', '.join(f'{count} {code}' for code, count in by_code)}; see `catalog runs show`")


def main() -> None:
    """Entry point of `catalog`."""
    run(app, "catalog")


if __name__ == "__main__":
    main()
