"""`loaderd`: serve, status, stream, run, audit, prune."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from catalog.errors import CatalogError, UsageError
from loaderd.cli_gallery import gallery
from loaderd.cli_sequence import sequence
from loaderd.messages import Message

if TYPE_CHECKING:
    from catalog.database import Database

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Feeds trainers through shared memory.")

DatabaseUrl = Annotated[
    str | None,
    typer.Option("--database", envvar="CATALOG_DATABASE_URL", help="PostgreSQL URL; without it the embedded database.", show_default=False),
]

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done; changes nothing.")]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="The training's name.")]
Structures = Annotated[list[str] | None, typer.Option(help="A structure whose masks are fed; again for more.", show_default=False)]
Where = Annotated[str | None, typer.Option(help="SQL condition over the view sample.", show_default=False)]
StreamName = Annotated[str, typer.Argument(metavar="NAME", help="The stream's name.")]

stream_app = typer.Typer(no_args_is_help=True, help="Streams with a name: make, list, show and end them.")
run_app = typer.Typer(no_args_is_help=True, help="Runs: list and show them, note what became of them.")
app.add_typer(stream_app, name="stream")
app.add_typer(run_app, name="run")
app.command()(gallery)
app.command()(sequence)


@app.command()
def serve(
    database: DatabaseUrl = None,
    workers: Annotated[
        int | None, typer.Option(min=1, max=256, help="Decode processes; by default one a core.", show_default=False)
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="Of all rings together, such as 512M or 4G; by default what the machine has.", show_default=False)
    ] = None,
    group: Annotated[
        str | None, typer.Option(help="Members of this group may attach, too, where they can reach the socket.", show_default=False)
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="End with the last trainer: how a Feed starts its own.")] = False,
    supervisor: Annotated[int | None, typer.Option(hidden=True, help="How `loaderd serve` starts the daemon that it watches over.")] = None,
) -> None:
    """Serve trainers in the foreground until Ctrl-C or SIGTERM. A Feed finds this daemon by itself; after a crash it comes back."""
    from catalog.database import open_database
    from loaderd import messages
    from loaderd.daemon import Daemon
    from loaderd.supervise import supervise

    if sys.platform != "linux":
        raise CatalogError("loaderd needs Linux: it feeds through a memfd; the catalog works here all the same")
    limit, members = _bytes(memory), _gid(group)
    try:
        db = open_database(database)
        path = messages.socket_path(db.identity())
        if not private and supervisor is None:
            with db:
                if database is not None:
                    os.environ["CATALOG_DATABASE_URL"] = database  # not an argument: it may hold a password, and all users see arguments
                given = {"--workers": workers, "--memory": memory, "--group": group}
                supervise([part for name, value in given.items() if value is not None for part in (name, str(value))])
                return
        try:
            daemon = Daemon(
                db,
                path,
                workers=workers or len(os.sched_getaffinity(0)),
                private=private,
                memory=limit,
                group=members,
                supervisor=supervisor,
            )
        except BaseException:
            db.close()
            raise
    except CatalogError as error:
        if private:  # standard output is a pipe to the Feed that waits
            typer.echo(str(error))
        raise
    if private:
        typer.echo("ready")
        os.close(1)
    daemon.serve()


def _bytes(text: str | None) -> int | None:
    """Return a size such as 512M or 4G in bytes."""
    if text is None:
        return None
    number, unit = text.rstrip("iB").rstrip("KMGkmg"), text.rstrip("iB")[-1:].upper()
    if not number.isdecimal() or text[:1] == "0":
        raise UsageError(f"--memory {text}: must be a number of bytes, or one with K, M or G behind it")
    return int(number) << {"K": 10, "M": 20, "G": 30}.get(unit, 0)


def _size(text: str | None) -> list[int] | None:
    """Return a size such as 128x96 as rows and columns."""
    if text is None:
        return None
    numbers = text.lower().split("x")
    if len(numbers) != 2 or not all(number.isascii() and number.isdecimal() for number in numbers):
        raise UsageError(f"--size {text}: must be rows and columns, such as 128x96")
    return [int(number) for number in numbers]


def _gid(name: str | None) -> int | None:
    import grp

    try:
        return None if name is None else grp.getgrnam(name).gr_gid
    except KeyError:
        raise UsageError(f"--group {name}: there is no such group on this machine") from None


@app.command()
def status(
    database: DatabaseUrl = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what the daemon of this database is doing. Exit code 1: there is none."""
    from loaderd import attach

    found = attach.status(database)
    if found is None:
        if as_json:
            typer.echo("null")
        raise CatalogError("no loaderd of this database is running; start one by `loaderd serve`, or let a Feed start its own")
    typer.echo(json.dumps(found, indent=2) if as_json else _as_text(found))


def _as_text(found: Message) -> str:
    lines = [
        f"loaderd {found['version']}, pid {found['pid']}, up {found['uptime_s']:.0f} s, "
        f"{'private, ' if found['private'] else 'supervised, ' if found['supervised'] else ''}"
        f"{len(found['workers'])} workers ({found['workers_replaced']} replaced)",
        f"  database  {found['database']}",
        f"  socket    {found['socket']}",
        f"  rings     {found['ring_bytes'] / 2**20:.0f} MiB"
        + (f" of {found['memory_bytes'] / 2**20:.0f}" if found["memory_bytes"] else ""),
    ]
    if found["outage_s"]:
        lines.append(f"  PostgreSQL has been out of reach for {found['outage_s']:.0f} s; what is reserved is fed, the rest waits")
    if found["revoked"]:
        lines.append(f"  {found['revoked']} images are revoked and not fed")
    for stream in found["streams"]:
        definition = stream["definition"]
        fast = 100 * stream["by_offset"] / stream["decoded"] if stream["decoded"] else 0
        lines += [
            f"  trainer {stream['pid']}, rank {stream['rank']} of {stream['num_ranks']}, run {stream['run']}, attempt {stream['attempt']}",
            f"    {stream['stream'] or 'unnamed stream'}: {', '.join(definition.get('structures', ())) or 'images'}, "
            f"batch size {definition.get('batch_size')}, seed {definition.get('seed')}",
            f"    epoch {stream['epoch']}, step {stream['announced']} of {stream['steps']}, position {stream['position']} of "
            f"{stream['num_samples']}; {stream['batches']} batches, {stream['samples']} samples ({fast:.0f} % by offset), "
            f"{stream['unreadable']} unreadable, {stream['revoked']} revoked",
            f"    ring {stream['ring_bytes'] / 2**20:.0f} MiB: {stream['slots']} slots, {stream['leased']} announced or held, "
            f"{stream['decoding']} decoding, {stream['free']} free",
        ]
    if not found["streams"]:
        lines.append("  no trainer")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------ streams


@stream_app.command("create")
def stream_create(
    name: StreamName,
    database: DatabaseUrl = None,
    structure: Structures = None,
    snapshot: Annotated[str | None, typer.Option(metavar="NAME", help="Feed a frozen list: catalog snapshot.", show_default=False)] = None,
    split: Annotated[
        str | None, typer.Option(metavar="[SPLIT/]PART[:FOLD]", help="Feed one side of a split: catalog split.", show_default=False)
    ] = None,
    origin: Annotated[
        list[str] | None,
        typer.Option(help="Labels of this origin: contour, segment, interpolated, proposed; again for more.", show_default=False),
    ] = None,
    reader: Annotated[list[str] | None, typer.Option(help="Annotations of this reader alone; again for more.", show_default=False)] = None,
    labels: Annotated[str | None, typer.Option(metavar="NAME", help="Feed this label, too: label for MNIST's.", show_default=False)] = None,
    where: Where = None,
    limit: Annotated[int | None, typer.Option(help="Feed so many samples: those of the smallest keys.", show_default=False)] = None,
    include_flagged: Annotated[
        bool | None, typer.Option("--include-flagged", help="Feed samples with open errors, too.", show_default=False)
    ] = None,
    require: Annotated[
        str | None, typer.Option(help="Of the structures, all (default) or any must be drawn on an image.", show_default=False)
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples a batch; by default 8.", show_default=False)] = None,
    seed: Annotated[int | None, typer.Option(help="Of the random orders; by default 0.", show_default=False)] = None,
    no_shuffle: Annotated[
        bool | None, typer.Option("--no-shuffle", help="Feed in the order of the sample keys, each epoch.", show_default=False)
    ] = None,
    tail: Annotated[str | None, typer.Option(help="The last batch: short (default), drop or pad.", show_default=False)] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the images: float16, float32 (default) or float64.", show_default=False)] = None,
    channels: Annotated[
        str | None, typer.Option(help="Where images have an axis for channels: none (default), first or last.", show_default=False)
    ] = None,
    size: Annotated[str | None, typer.Option(metavar="ROWSxCOLUMNS", help="Bring all images to this size.", show_default=False)] = None,
    fit: Annotated[str | None, typer.Option(help="How: resize (default), crop or pad.", show_default=False)] = None,
    context: Annotated[int | None, typer.Option(help="So many neighbouring slices on each side as channels.", show_default=False)] = None,
    context_ends: Annotated[
        str | None, typer.Option(help="Where there is no neighbour: repeat (default) or zero.", show_default=False)
    ] = None,
    on_error: Annotated[
        str | None, typer.Option(help="An image that cannot be read: skip (default), blank or stop.", show_default=False)
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("-f", "--file", help="TOML with these options as keys, transforms and sequences, instead.", show_default=False),
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Keep a definition under a name, for Feed("NAME"). The same again changes nothing, another one under that name is refused."""
    from loaderd import named, selections
    from loaderd.definitions import Definition, settled

    options = {
        "structures": structure, "snapshot": snapshot, "split": split, "origins": origin, "readers": reader,
        "labels": labels, "where": where, "limit": limit, "include_flagged": include_flagged, "require": require,
        "batch_size": batch_size, "seed": seed, "shuffle": None if no_shuffle is None else not no_shuffle, "tail": tail, "dtype": dtype,
        "channels": channels, "size": _size(size), "fit": fit, "context": context, "context_ends": context_ends, "on_error": on_error,
    }  # fmt: skip
    given = {field: value for field, value in options.items() if value not in (None, [])}
    if file is not None and given:
        raise UsageError(f"-f and {', '.join(given)}: the definition comes from the file or from the options; choose one")
    definition = named.from_toml(file) if file is not None else Definition.from_json(given)
    with _database(database) as db, db.read_only() as reading:
        definition = settled(reading, definition)
        selections.check_where(reading, definition)
        found = selections.shapes(reading, definition)
        with db.connect() as conn:
            stream_id = named.create(conn, name, definition)
            if definition.looks_up:
                from loaderd import constants

                constants.of(conn, reading, stream_id, definition)
            if dry_run:
                conn.rollback()
    listed = ", ".join(f"{count} of {rows}×{columns}" for (rows, columns), count in found.items())
    samples = _count(sum(found.values()), "sample")
    typer.echo(f"stream {name!r}{', not made: it' if dry_run else ''} has {samples} now{f' ({listed})' if found else ''}")
    try:
        selections.one_shape(found, definition)
    except UsageError as error:
        typer.echo(f"loaderd: nobody can be fed from it as it is now: {error}", err=True)


@stream_app.command("list")
def stream_list(database: DatabaseUrl = None, as_json: AsJson = False) -> None:
    """List the streams that have a name and are not ended."""
    from loaderd import named, runs

    with _database(database) as db, db.connect() as conn:
        found = [{**stream._asdict(), "consumers": len(runs.consumers_of(conn, stream.id))} for stream in named.listed(conn)]
    if as_json:
        _print_json(found)
    else:
        _print_rows(found, {"name": "name", "created_at": "created", "runs": "runs", "consumers": "fed now"}, "no stream has a name yet")


@stream_app.command("show")
def stream_show(name: StreamName, database: DatabaseUrl = None, as_json: AsJson = False) -> None:
    """Print a stream's definition as TOML for `stream create -f`, with its runs and who is fed now as comments."""
    from loaderd import named, runs

    with _database(database) as db, db.connect() as conn:
        stream_id, definition = named.find(conn, name)
        fed, now = runs.runs_of(conn, stream_id), runs.consumers_of(conn, stream_id)
    if as_json:
        sha256 = definition.digest().hex()
        _print_json({"id": stream_id, "name": name, "sha256": sha256, "definition": definition.to_json(), "runs": fed, "consumers": now})
        return
    typer.echo(f"# stream {name!r}, sha256 {definition.digest().hex()}")
    typer.echo(named.to_toml(definition), nl=False)
    for row in fed:
        last = "–" if row["last_epoch"] is None else row["last_epoch"]
        typer.echo(f"# run {row['run']!r}: {_count(row['attempts'], 'attempt')}, up to epoch {last}")
    for row in now:
        typer.echo(f"# fed now: {row['host']}:{row['pid']}, rank {row['rank']} of {row['num_ranks']}, run {row['run']!r}")


@stream_app.command("end")
def stream_end(name: StreamName, database: DatabaseUrl = None, dry_run: DryRun = False) -> None:
    """End a stream: nobody attaches to it any more, and its name is free. What is known of its runs stays."""
    from loaderd import named, runs

    with _database(database) as db, db.connect() as conn:
        now = len(runs.consumers_of(conn, named.end(conn, name)))
        if dry_run:
            conn.rollback()
    typer.echo(f"stream {name!r} {'would be ended' if dry_run else 'is ended'}; {_count(now, 'trainer')} fed from it now")


# ------------------------------------------------------------------------------------------ runs


@run_app.command("list")
def run_list(database: DatabaseUrl = None, as_json: AsJson = False) -> None:
    """List the trainings and what they were fed."""
    from loaderd import runs

    with _database(database) as db, db.connect() as conn:
        found = runs.listed(conn)
    if as_json:
        _print_json(found)
        return
    rows = [{**row, "streams": [runs.called(one["stream"], one["stream_name"]) for one in row["streams"]]} for row in found]
    columns = {"run": "run", "opened": "opened", "live": "live", "streams": "streams", "attempts": "attempts", "last_epoch": "last epoch",
               "delivered": "delivered", "models": "models"}  # fmt: skip
    _print_rows(rows, columns, "no run yet")


@run_app.command("show")
def run_show(run: RunName, database: DatabaseUrl = None, as_json: AsJson = False) -> None:
    """Show a training: its attempts, consumers, epochs, notes, and what it was fed with."""
    from loaderd import runs

    with _database(database) as db, db.connect() as conn:
        found = runs.shown(conn, run)
    if as_json:
        _print_json(found)
        return
    typer.echo(f"run {run!r}, opened {_cell(found['opened'])} by scanfeed {found['program_version']} on {found['host']}")
    for part in ("attempts", "consumers", "epochs", "notes"):
        typer.echo(f"\n{part}")
        rows = found[part]
        shown = [name for name in rows[0] if part != "epochs" or name not in ("stream_name", "order_sha256")] if rows else []
        _print_rows(rows, {name: name for name in shown}, "none")
    for row in found["provenance"]:
        typer.echo(f"\nprovenance, stream {runs.called(row['stream'], row['stream_name'])}")
        for name in ("stream_sha256", "snapshot_sha256", "definition", "transforms", "constants", "daemon_versions", "trainer_versions",
                     "order_sha256s",
                     "models"):  # fmt: skip
            values = row[name] if isinstance(row[name], list) else [row[name]]
            for value in values:
                typer.echo(f"  {name:<16}  {json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else _cell(value)}")


@run_app.command("note")
def run_note(
    run: RunName,
    text: Annotated[str, typer.Argument(help="What to note, in words.", show_default=False)] = "",
    database: DatabaseUrl = None,
    model_sha256: Annotated[str | None, typer.Option(metavar="HEX", help="A model that it made.", show_default=False)] = None,
    model: Annotated[Path | None, typer.Option(help="The same, from the model's file.", show_default=False)] = None,
    actor: Annotated[str | None, typer.Option(help="Who notes it; by default the user of this process.", show_default=False)] = None,
) -> None:
    """Note a remark on a training or a model that it made; `catalog sql` on the view sample_history then knows the model, too."""
    import hashlib

    from loaderd import runs

    if model is not None and model_sha256 is not None:
        raise UsageError("--model and --model-sha256: choose one")
    digest: bytes | None = None
    if model is not None:
        with model.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").digest()
    elif model_sha256 is not None:
        try:
            digest = bytes.fromhex(model_sha256)
        except ValueError:
            digest = b""
        if len(digest) != hashlib.sha256().digest_size:
            raise UsageError(f"--model-sha256 {model_sha256!r}: must be 64 hex digits; --model FILE computes them")
    if not text and digest is None:
        raise UsageError("run note: nothing to note; give a text, --model FILE or --model-sha256 HEX")
    with _database(database) as db, db.connect() as conn:
        runs.note(conn, run, text, digest, actor or _user())
    typer.echo(f"run {run!r}: noted{f', model {digest.hex()}' if digest else ''}")


# ------------------------------------------------------------------------------------------ proof


@app.command()
def audit(
    run: Annotated[str | None, typer.Argument(help="Of this training alone.", show_default=False)] = None,
    database: DatabaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """Prove that every planned position came once, in the stored order. Exit code 3: something is missing, twice or not what was fed."""
    from psycopg import IsolationLevel

    from loaderd import runs

    with _database(database) as db, db.connect() as conn:
        conn.isolation_level, conn.read_only = IsolationLevel.REPEATABLE_READ, True
        found = runs.audit(conn, run)
    if as_json:
        _print_json(asdict(found))
    else:
        for finding in found.findings:
            typer.echo(str(finding))
        if found.erased:
            typer.echo(f"{found.erased} positions are of patients who were erased since: their orders cannot be compared any more")
        typer.echo(f"{_count(found.runs, 'run')}, {_count(found.epochs, 'epoch')}: {_count(len(found.findings), 'finding')}")
    raise typer.Exit(3 if found.findings else 0)


@app.command()
def prune(
    database: DatabaseUrl = None,
    run: Annotated[str | None, typer.Option(help="Of this training alone.", show_default=False)] = None,
    older_than: Annotated[
        str | None, typer.Option(metavar="AGE", help="Epochs of which nothing was fed for so long: 90d, 12h, 4w.", show_default=False)
    ] = None,
    keep: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="But the newest N epochs of each run and stream.", show_default=False)
    ] = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Drop orders and ledger rows of epochs that are over; digests, summaries and the patients stay. Exit code 3: an audit finds something.

    All conditions must fit. The newest epoch of a run and stream always stays, and so does one at which `loaderd audit` finds something.
    """
    from loaderd import runs

    with _database(database) as db, db.connect(autocommit=True) as conn:
        done = runs.prune(conn, run=run, older_than=None if older_than is None else runs.age(older_than), keep=keep, dry_run=dry_run)
    if as_json:
        _print_json({"dry_run": dry_run, **asdict(done)})
    else:
        for row in done.epochs:
            typer.echo(
                f"run {row['run']!r}, stream {runs.called(row['stream'], row['stream_name'])}, epoch {row['epoch']}: {row['bytes']} bytes"
            )
        for finding in done.findings:
            typer.echo(f"left alone: {finding}")
        typer.echo(
            f"{'would drop' if dry_run else 'dropped'} {_count(len(done.epochs), 'epoch')} and {_count(done.provisional, 'order')} "
            f"that nobody asked for: {done.bytes} bytes of the tables are free for new rows"
        )
    raise typer.Exit(3 if done.findings else 0)


# ------------------------------------------------------------------------------------------ printing


@contextlib.contextmanager
def _database(url: str | None) -> Iterator[Database]:
    import psycopg

    from catalog.database import explain, open_database

    with open_database(url) as db:
        try:
            yield db
        except psycopg.Error as error:
            raise explain(error, db) from error


def _count(number: int, noun: str) -> str:
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"


def _user() -> str:
    import pwd

    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a container's user without a name
        return f"uid {os.getuid()}"


def _print_json(found: Any) -> None:
    typer.echo(json.dumps(found, indent=2, default=lambda value: value.isoformat()))


def _print_rows(rows: list[dict[str, Any]], columns: dict[str, str], nothing: str) -> None:
    from catalog.output import print_table

    if not rows:
        typer.echo(nothing)
        return
    print_table(list(columns.values()), [[_cell(row[name]) for name in columns] for row in rows])


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_cell, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else f"{value:%Y-%m-%d %H:%M}" if hasattr(value, "isoformat") else str(value)


@app.command()
def top(
    database: DatabaseUrl = None,
    once: Annotated[bool, typer.Option("--once", help="Measure one interval, print it and end; so does a pipe.")] = False,
    as_json: AsJson = False,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 1.0,
) -> None:
    """Show, live, how fast each trainer is fed and who waits for whom; q ends it. With --json an object a line."""
    from loaderd.top import top

    raise typer.Exit(top(database, interval_s=interval, once=once, as_json=as_json))


@app.command()
def bench(
    stream: Annotated[str | None, typer.Argument(help="A stream's name; without one, what the options choose.", show_default=False)] = None,
    database: DatabaseUrl = None,
    structure: Structures = None,
    where: Where = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples a batch. [default: 8]", show_default=False)] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="At least so long, to the end of an epoch; at most twice.")] = 10.0,
    as_json: AsJson = False,
) -> None:
    """Measure how fast this machine feeds your own data with no trainer; leaves nothing in the ledger."""
    from loaderd.bench import as_text, bench

    given = {"stream": stream, "structures": structure, "where": where, "batch_size": batch_size, "database": database}
    found = bench({name: value for name, value in given.items() if value not in (None, [])}, seconds=seconds)
    typer.echo(json.dumps(found, indent=2) if as_json else as_text(found))


def main() -> None:
    """Run the command line; errors are one line on stderr and a documented exit code."""
    from catalog.output import run

    run(app, "loaderd")


if __name__ == "__main__":
    main()
