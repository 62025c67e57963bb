"""`catalog annotations`: what holds for many of them at once."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from catalog import shifting
from catalog.database import open_database
from catalog.errors import UsageError
from catalog.output import Actor, AsJson, DatabaseUrl, DryRun, number, print_json, say_dry

annotations_app = typer.Typer(no_args_is_help=True, help="Annotations: what holds for many of them at once.")


@annotations_app.callback()
def _group() -> None:
    """Annotations: what holds for many of them at once."""


@annotations_app.command("shift")
def annotations_shift(
    root: Annotated[str, typer.Option(metavar="NAME", help="Whose polygons, as `catalog root list` names it.")],
    by: Annotated[
        str | None,
        typer.Option(metavar="X,Y", help="px to add to x and y as they were read; replaces an earlier shift.", show_default=False),
    ] = None,
    undo: Annotated[bool, typer.Option("--undo", help="As they were read.")] = False,
    structure: Annotated[str | None, typer.Option(metavar="NAME", help="Those of this structure alone.", show_default=False)] = None,
    reader: Annotated[str | None, typer.Option(metavar="NAME", help="Those of this reader alone.", show_default=False)] = None,
    reason: Annotated[str, typer.Option("-m", "--reason", help="Why, in words.")] = "",
    actor: Actor = None,
    dry_run: DryRun = False,
    database: DatabaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """Move polygons whose coordinates count from another origin, as new versions; masks are made anew, pairings and flags stay."""
    if (by is None) != undo:
        raise UsageError("say either --by X,Y or --undo")
    place = (0.0, 0.0) if by is None else shifting.parse(by)
    with open_database(database) as db:
        done = shifting.shift(db, root, by=place, reason=reason, structure=structure, reader=reader, actor=actor, dry_run=dry_run)
    say_dry(dry_run)
    if as_json:
        print_json(asdict(done))
        return
    if not done.annotations:
        typer.echo(f"nothing to do: {number(done.unchanged, 'polygon')} of {root} {'is' if done.unchanged == 1 else 'are'} there already")
        return
    each = ", ".join(f"{count} {name}" for name, count in done.structures.items())
    place_now = "as read" if place == (0.0, 0.0) else f"({done.x:g}, {done.y:g}) px from where they were read"
    typer.echo(f"{number(done.annotations, 'polygon')} of {root} ({each}) now {place_now}: new versions, {done.accepted} of them paired")
    if done.flags:
        typer.echo(f"{number(done.flags, 'flag')} went along")
    if done.unchanged:
        typer.echo(f"{number(done.unchanged, 'polygon')} had that shift already")
    typer.echo("how they follow the edges now: `catalog measure`, then `catalog qa run`")
