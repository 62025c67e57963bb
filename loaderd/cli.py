"""`loaderd`: serve and status."""

from __future__ import annotations

import json
import os
import sys
from typing import Annotated

import typer

from catalog.errors import CatalogError
from loaderd.messages import Message

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Feeds trainers through shared memory.")

DatabaseUrl = Annotated[
    str | None,
    typer.Option("--database", envvar="CATALOG_DATABASE_URL", help="PostgreSQL URL; without it the embedded database.", show_default=False),
]


@app.command()
def serve(
    database: DatabaseUrl = None,
    workers: Annotated[
        int | None, typer.Option(min=1, max=256, help="Decode processes; by default one a core.", show_default=False)
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="End with the last trainer: how a Feed starts its own.")] = False,
) -> None:
    """Serve trainers in the foreground until Ctrl-C or SIGTERM. A Feed finds this daemon by itself."""
    from catalog.database import open_database
    from loaderd import messages
    from loaderd.daemon import Daemon

    if sys.platform != "linux":
        raise CatalogError("loaderd needs Linux: it feeds through a memfd; the catalog works here all the same")
    try:
        db = open_database(database)
        try:
            daemon = Daemon(db, messages.socket_path(db.identity()), workers=workers or len(os.sched_getaffinity(0)), private=private)
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


@app.command()
def status(
    database: DatabaseUrl = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what the daemon of this database is doing. Exit code 1: there is none."""
    from loaderd import client

    found = client.status(database)
    if found is None:
        if as_json:
            typer.echo("null")
        raise CatalogError("no loaderd of this database is running; start one by `loaderd serve`, or let a Feed start its own")
    typer.echo(json.dumps(found, indent=2) if as_json else _as_text(found))


def _as_text(found: Message) -> str:
    lines = [
        f"loaderd {found['version']}, pid {found['pid']}, up {found['uptime_s']:.0f} s, {'private, ' if found['private'] else ''}"
        f"{len(found['workers'])} workers ({found['workers_replaced']} replaced)",
        f"  database  {found['database']}",
        f"  socket    {found['socket']}",
    ]
    for stream in found["streams"]:
        definition = stream["definition"]
        fast = 100 * stream["by_offset"] / stream["decoded"] if stream["decoded"] else 0
        lines += [
            f"  trainer {stream['pid']}, run {stream['run']}: {', '.join(definition['structures']) or 'images'}, "
            f"batch size {definition['batch_size']}, seed {definition['seed']}",
            f"    epoch {stream['epoch']}, position {stream['position']} of {stream['num_samples']}; {stream['batches']} batches, "
            f"{stream['samples']} samples ({fast:.0f} % by offset), {stream['unreadable']} unreadable",
            f"    ring {stream['ring_bytes'] / 2**20:.0f} MiB: {stream['slots']} slots, {stream['leased']} announced or held, "
            f"{stream['decoding']} decoding, {stream['free']} free",
        ]
    if not found["streams"]:
        lines.append("  no trainer")
    return "\n".join(lines)


def main() -> None:
    """Run the command line; errors are one line on stderr and a documented exit code."""
    from catalog.cli import run

    run(app, "loaderd")


if __name__ == "__main__":
    main()
