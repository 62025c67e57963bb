"""`loaderd`: serve, status, top, bench, and the commands of the other files."""

from __future__ import annotations

import json
import os
import sys
from typing import Annotated

import typer

from catalog.errors import CatalogError, UsageError
from catalog.output import AsJson, DatabaseUrl
from loaderd import cli_run, cli_stream
from loaderd.cli_gallery import gallery
from loaderd.cli_sequence import sequence
from loaderd.messages import Message
from loaderd.output import Structures, Where

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Feeds trainers through shared memory.")

app.add_typer(cli_stream.app, name="stream")
app.add_typer(cli_run.app, name="run")
for one in (gallery, sequence, cli_run.audit, cli_run.prune):
    app.command()(one)


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


def _gid(name: str | None) -> int | None:
    import grp

    try:
        return None if name is None else grp.getgrnam(name).gr_gid
    except KeyError:
        raise UsageError(f"--group {name}: there is no such group on this machine") from None


@app.command()
def status(
    database: DatabaseUrl = None,
    as_json: AsJson = False,
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
