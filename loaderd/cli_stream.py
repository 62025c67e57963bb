"""`loaderd stream`: streams with a name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from catalog.errors import UsageError
from catalog.output import AsJson, DatabaseUrl, DryRun, print_json
from loaderd.output import Structures, Where, count, opened, print_rows

StreamName = Annotated[str, typer.Argument(metavar="NAME", help="The stream's name.")]

app = typer.Typer(no_args_is_help=True, help="Streams with a name: make, list, show and end them.")


@app.command("create")
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
    with opened(database) as db, db.read_only() as reading:
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
        samples = count(sum(found.values()), "sample")
        typer.echo(f"stream {name!r}{', not made: it' if dry_run else ''} has {samples} now{f' ({listed})' if found else ''}")
        try:
            selections.one_shape(reading, found, definition)
        except UsageError as error:
            typer.echo(f"loaderd: nobody can be fed from it as it is now: {error}", err=True)


@app.command("list")
def stream_list(database: DatabaseUrl = None, as_json: AsJson = False) -> None:
    """List the streams that have a name and are not ended."""
    from loaderd import named, runs

    with opened(database) as db, db.connect() as conn:
        found = [{**stream._asdict(), "consumers": len(runs.consumers_of(conn, stream.id))} for stream in named.listed(conn)]
    if as_json:
        print_json(found)
    else:
        print_rows(found, {"name": "name", "created_at": "created", "runs": "runs", "consumers": "fed now"}, "no stream has a name yet")


@app.command("show")
def stream_show(name: StreamName, database: DatabaseUrl = None, as_json: AsJson = False) -> None:
    """Print a stream's definition as TOML for `stream create -f`, with its runs and who is fed now as comments."""
    from loaderd import named, runs

    with opened(database) as db, db.connect() as conn:
        stream_id, definition = named.find(conn, name)
        fed, now = runs.runs_of(conn, stream_id), runs.consumers_of(conn, stream_id)
    if as_json:
        sha256 = definition.digest().hex()
        print_json({"id": stream_id, "name": name, "sha256": sha256, "definition": definition.to_json(), "runs": fed, "consumers": now})
        return
    typer.echo(f"# stream {name!r}, sha256 {definition.digest().hex()}")
    typer.echo(named.to_toml(definition), nl=False)
    for row in fed:
        last = "–" if row["last_epoch"] is None else row["last_epoch"]
        typer.echo(f"# run {row['run']!r}: {count(row['attempts'], 'attempt')}, up to epoch {last}")
    for row in now:
        typer.echo(f"# fed now: {row['host']}:{row['pid']}, rank {row['rank']} of {row['num_ranks']}, run {row['run']!r}")


@app.command("end")
def stream_end(name: StreamName, database: DatabaseUrl = None, dry_run: DryRun = False) -> None:
    """End a stream: nobody attaches to it any more, and its name is free. What is known of its runs stays."""
    from loaderd import named, runs

    with opened(database) as db, db.connect() as conn:
        now = len(runs.consumers_of(conn, named.end(conn, name)))
        if dry_run:
            conn.rollback()
    typer.echo(f"stream {name!r} {'would be ended' if dry_run else 'is ended'}; {count(now, 'trainer')} fed from it now")


def _size(text: str | None) -> list[int] | None:
    """Return a size such as 128x96 as rows and columns."""
    if text is None:
        return None
    numbers = text.lower().split("x")
    if len(numbers) != 2 or not all(number.isascii() and number.isdecimal() for number in numbers):
        raise UsageError(f"--size {text}: must be rows and columns, such as 128x96")
    return [int(number) for number in numbers]
