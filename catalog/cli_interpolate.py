"""`catalog interpolate`: labels between labels."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from typing import Annotated

import typer

from catalog.database import open_database
from catalog.output import Actor, AsJson, DatabaseUrl, DryRun, number, print_json, progress, say, say_dry


class Along(StrEnum):
    """Where the neighbours are looked for."""

    SLICES = "slices"
    PHASES = "phases"
    BOTH = "both"


class How(StrEnum):
    """How a mask is made from two."""

    SHAPE = "shape"
    LINEAR = "linear"
    NEAREST = "nearest"


def interpolate(
    structure: Annotated[str, typer.Option(metavar="NAME", help="Of which structure.")],
    along: Annotated[
        Along, typer.Option(help="slices: neighbours in space at the same phase; phases: in time at the same position; both: the nearer.")
    ] = Along.BOTH,
    method: Annotated[
        How,
        typer.Option(help="shape: signed distances, Raya & Udupa 1990; linear: between points of two contours; nearest: the nearer one."),
    ] = How.SHAPE,
    widest_mm: Annotated[float, typer.Option(metavar="MM", help="The widest gap between two drawn slices.")] = 35.0,
    widest_ms: Annotated[float, typer.Option(metavar="MS", help="The widest gap between two drawn phases.")] = 500.0,
    actor: Actor = None,
    dry_run: DryRun = False,
    database: DatabaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """Make labels on images between drawn ones, of origin interpolated: fed only where asked for. Again changes nothing."""
    from catalog import interpolate as interpolating

    with open_database(database) as db, progress("making masks") as update:
        done = interpolating.interpolate(
            db, structure, along=along.value, method=method.value, widest_mm=widest_mm, widest_ms=widest_ms, actor=actor, dry_run=dry_run,
            progress=update,
        )  # fmt: skip
    say_dry(dry_run)
    if as_json:
        print_json(asdict(done))
        return
    there = sum(done.along.values())
    each = ", ".join(
        f"{count} along {direction} (gaps up to {done.widest[direction]:.4g} {interpolating.UNITS[direction]})"
        for direction, count in sorted(done.along.items())
    )
    typer.echo(f"{number(there, 'interpolated label')} of {structure}" + (f": {each}" if each else ""))
    made = f"{done.made} made" + (f", {done.changed} of them in place of others" if done.changed else "")
    typer.echo(f"  {made}; {done.unchanged} were there already; {done.retired} retired that can no longer be derived")
    if done.returned:
        typer.echo(f"  {done.returned} accepted again, as what they were made from is")
    if done.rejected:
        typer.echo(f"  {done.rejected} not made: a person rejected the same")
    for why, count in done.left.items():
        typer.echo(f"  {number(count, 'image')} left without: {why}")
    if there:
        say('left out of feeding unless asked for: Feed(origins=["contour", "interpolated"]); see the view derived_labels')
