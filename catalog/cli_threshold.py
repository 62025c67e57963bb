"""`catalog threshold`: propose what lies inside a drawn structure, by intensities."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from catalog.database import open_database
from catalog.inside import Method
from catalog.output import Actor, AsJson, DatabaseUrl, DryRun, number, print_json, progress, say, say_dry

if TYPE_CHECKING:
    from catalog import threshold as thresholding

MOST_PROBLEMS = 10


def threshold(
    outer: Annotated[str, typer.Option(metavar="NAME", help="The structure that was drawn, inside of which to look.")],
    inner: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="How to call what is proposed; by default what is said to lie inside it.", show_default=False),
    ] = None,
    method: Annotated[
        Method, typer.Option(help="edges: the line of the steepest edge; otsu: a threshold; kmeans: two clusters of intensity and depth.")
    ] = Method.EDGES,
    also_drawn: Annotated[
        bool, typer.Option("--also-drawn", help="Propose where it is drawn, too; what is drawn stays preferred.")
    ] = False,
    jobs: Annotated[int | None, typer.Option(min=1, max=256, help="Processes; by default one a core.", show_default=False)] = None,
    actor: Actor = None,
    dry_run: DryRun = False,
    database: DatabaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """Propose labels of what lies inside a drawn structure, by intensities. They are fed only to feeds whose origins name `proposed`.

    Where somebody drew the inside nothing is proposed; there the method is judged, by Dice against what was drawn. Exit code 3: some images
    could not be read. Needs the extra `derive`.
    """
    from catalog import threshold as thresholding

    with open_database(database) as db, progress("looking inside") as update:
        done = thresholding.threshold(
            db, outer=outer, inner=inner, method=method, also_drawn=also_drawn, actor=actor, jobs=jobs, dry_run=dry_run, progress=update
        )
    say_dry(dry_run)
    if as_json:
        print_json(asdict(done))
    else:
        _print(done)
    for line in done.problems[:MOST_PROBLEMS]:
        say(line)
    if done.problems:
        if len(done.problems) > MOST_PROBLEMS:
            say(f"… and {len(done.problems) - MOST_PROBLEMS} more")
        raise typer.Exit(3)


def _print(done: thresholding.Proposed) -> None:
    new = f" ({done.replaced} of them in place of an older one)" if done.replaced else ""
    typer.echo(
        f"{done.inner} inside {done.outer} by {done.method}: {number(done.proposed, 'proposal')} made{new}, {done.unchanged} unchanged, "
        f"{done.retired} retired; {number(done.images, 'image')} {'has' if done.images == 1 else 'have'} {done.outer}"
    )
    if done.drawn:
        typer.echo(f"nothing proposed on {number(done.drawn, 'image')} where {done.inner} is drawn; --also-drawn does")
    if done.returned:
        typer.echo(f"{number(done.returned, 'proposal')} accepted again, as what they were made from is")
    if done.rejected:
        typer.echo(f"{number(done.rejected, 'proposal')} that somebody rejected {'stays' if done.rejected == 1 else 'stay'} so")
    if done.nothing:
        typer.echo(f"nothing found on {number(done.nothing, 'image')}: intensities inside {done.outer} tell nothing apart")
    if done.judged is None:
        typer.echo(f"how good they are is not known: no image has {done.inner} drawn")
    else:
        found = done.judged
        typer.echo(
            f"against {number(found.images, 'drawn one')}: Dice {found.median:.3f} (median; quartiles {found.lower:.3f} and "
            f"{found.upper:.3f}, least {found.least:.3f})"
        )
