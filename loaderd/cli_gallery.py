"""`loaderd gallery`: look at what a stream will feed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from catalog.errors import UsageError
from catalog.output import DatabaseUrl, number
from loaderd.output import opened


def gallery(
    stream: Annotated[str, typer.Argument(metavar="STREAM", help="A named stream: loaderd stream list.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE.png", help="The picture to write.")],
    epochs: Annotated[int, typer.Option(min=1, max=16, help="Epochs side by side.")] = 3,
    samples: Annotated[int, typer.Option(min=1, max=64, help="Samples, one a row: those of the smallest keys.")] = 12,
    database: DatabaseUrl = None,
) -> None:
    """Draw samples of a stream as they lie in the catalog and, beside that, as a trainer gets them epoch by epoch. Feeds nobody."""
    from loaderd import gallery as galleries

    if output.suffix.lower() != ".png":
        raise UsageError(f"{output}: -o takes a file that ends in .png")
    with opened(database) as db:
        found = galleries.look(db, stream, samples=samples, epochs=epochs)
    output.write_bytes(galleries.picture(found))
    shown = number(len(found.epochs[0].sample_ids), "sample")
    typer.echo(f"{output}: {shown} of {found.num_samples} in {number(epochs, 'epoch')}")
