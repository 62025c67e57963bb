"""`catalog show`, `catalog gallery`, `catalog plot`: look at samples, and at all of them together."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from catalog.database import open_database
from catalog.errors import UsageError
from catalog.output import AsJson, DatabaseUrl, number, print_json, progress, say

Where = Annotated[
    str | None,
    typer.Option(
        metavar="SQL", help="Those alone that fit: a condition over the view sample, run without write rights.", show_default=False
    ),
]
Jobs = Annotated[int | None, typer.Option(min=1, max=256, help="Processes; by default one a core.", show_default=False)]
# Of one picture or file all is in memory at once, and who would look at more?
MOST = {"folder": 1_000, ".html": 200, ".png": 48}


class Plot(StrEnum):
    """What is plotted."""

    AREAS = "areas"
    SPREAD = "spread"
    INTENSITIES = "intensities"


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    app.command()(show)
    app.command()(gallery)
    app.command()(plot)


def show(
    sample: Annotated[int, typer.Argument(help="A sample_id of the views sample and image_all.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The PNG file to write.")],
    identify: Annotated[bool, typer.Option("--identify", help="Say patient, readers and SOP Instance UID, too.")] = False,
    database: DatabaseUrl = None,
) -> None:
    """Draw an image with its contours and masks, open flags with their causes, and neighbours."""
    from catalog import show as showing

    if output.suffix.lower() != ".png":
        raise UsageError(f"{output}: -o takes a file that ends in .png")
    with open_database(database) as db:
        png = showing.picture(db, sample, identify=identify)
    output.write_bytes(png)
    typer.echo(str(output))


def gallery(
    output: Annotated[Path, typer.Option("-o", "--output", help="A folder for a page; or one file .html, or one picture .png.")],
    where: Where = None,
    images: Annotated[
        bool, typer.Option("--images", help="Images without annotation, too; --where is then over the view image_all.")
    ] = False,
    sample: Annotated[int | None, typer.Option(min=1, help="So many of them, at random.", show_default=False)] = None,
    seed: Annotated[int, typer.Option(min=-(2**63), max=2**63 - 1, help="Of --sample: the same seed takes the same ones.")] = 0,
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most so many, the worst; 1000, in one .html 200, in a .png 48.", show_default=False)
    ] = None,
    jobs: Jobs = None,
    database: DatabaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """Draw samples with contours, flags and neighbours, the worst first: a page to be opened from the disk, or one picture.

    Keys of the page: arrows, j, k, Home, End; Enter for a large view; c, m and f hide contours, masks and the places of flags.
    """
    from catalog import gallery as galleries
    from catalog import gallery_page

    kind = output.suffix.lower() if output.suffix.lower() in MOST else "folder"
    with open_database(database) as db, progress("drawing images") as update:
        chosen = galleries.choose(db, where=where, sample=sample, seed=seed, limit=limit or MOST[kind], images=images)
        cards, inside = galleries.cards(db, chosen.ids)
        taken = f" at random (seed {seed})" if sample else ""
        title = f"{number(len(cards), 'sample')} of {chosen.fitting}{taken}, worst first"
        if kind == "folder":
            problems = gallery_page.write_folder(output, cards, inside, title=title, processes=jobs, progress=update)
        elif kind == ".html":
            problems = gallery_page.write_file(output, cards, inside, title=title, processes=jobs, progress=update)
        else:
            from catalog import sheet

            problems = []
            output.write_bytes(sheet.made(cards, inside, title=title, processes=jobs, progress=update))
    path = output / "index.html" if kind == "folder" else output
    if as_json:
        print_json({"path": str(path), "samples": [card.view.image["sample_id"] for card in cards], "fitting": chosen.fitting,
                    "problems": problems})  # fmt: skip
    else:
        typer.echo(f"{path}: {title}")
    for line in problems:
        say(line)
    if len(cards) < chosen.picked:
        say(f"{chosen.picked - len(cards)} more fit and are not shown; see --limit")


def plot(
    what: Annotated[
        Plot,
        typer.Argument(
            help="areas along slices and phases; spread of areas and centroids; intensities of pool and muscle, and what thresholds reach."
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The file to write: .png or .svg.")],
    where: Where = None,
    structure: Annotated[list[str] | None, typer.Option(help="Of these structures alone; again for more.", show_default=False)] = None,
    jobs: Jobs = None,
    database: DatabaseUrl = None,
) -> None:
    """Plot what somebody drew: areas in mm² along slices and phases, their spread, or intensities and the Dice that thresholds reach.

    Needs the extra `plots`; with the extra `derive` what `catalog threshold` would propose is judged, too.
    """
    from catalog import plots

    if output.suffix.lower() not in (".png", ".svg"):
        raise UsageError(f"{output}: -o takes a file that ends in .png or .svg")
    plots.needed()
    with open_database(database) as db, progress("reading images") as update:
        content, lines = plots.plot(
            db, what.value, where=where, structures=structure or [], kind=output.suffix.lower()[1:], jobs=jobs, progress=update
        )
    output.write_bytes(content)
    typer.echo(str(output))
    for line in lines:
        say(line)
