"""`catalog export`: a snapshot as files that trainers elsewhere open."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from catalog.database import open_database
from catalog.output import AsJson, DatabaseUrl, number, print_json, progress, say

MOST_TOLD = 20  # samples


class To(StrEnum):
    """Into what."""

    HDF5 = "hdf5"
    WEBDATASET = "webdataset"


class Dtype(StrEnum):
    """Of images."""

    FLOAT16 = "float16"
    FLOAT32 = "float32"
    FLOAT64 = "float64"


def export(
    snapshot: Annotated[str, typer.Argument(metavar="SNAPSHOT", help="Its name; see `catalog snapshot list`.")],
    destination: Annotated[Path, typer.Argument(metavar="DEST", help="hdf5: a file .h5 or .hdf5; webdataset: a folder.")],
    to: Annotated[To, typer.Option("--to", help="One HDF5 file, or tar shards for webdataset.")],
    part: Annotated[
        str | None, typer.Option(metavar="PART", help="This part alone; of folds train:FOLD or val:FOLD.", show_default=False)
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of images, as of a Feed.")] = Dtype.FLOAT32,
    shard: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Samples a tar; by default as many as take 256 MiB.", show_default=False)
    ] = None,
    jobs: Annotated[int | None, typer.Option(min=1, max=256, help="Processes; by default one a core.", show_default=False)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be written; writes nothing.")] = False,
    database: DatabaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """Write a snapshot's images and masks, for h5py or webdataset. Stop it at any time; the same command goes on where it ended.

    What was erased or revoked is left out. Exit code 4: a sample's pixels are not those of the snapshot; it is named, and only what is
    written with it waits: its shard, or its 64 rows of an HDF5 file.
    """
    from catalog import exporting

    with open_database(database) as db, progress("exporting samples") as update:
        done = exporting.export(
            db, snapshot, destination, to=to.value, part=part, dtype=dtype.value, shard=shard, jobs=jobs, dry_run=dry_run, progress=update
        )
    if dry_run:
        say("dry run: nothing was written; this is what would be")
    if as_json:
        print_json({**asdict(done), "problems": [one._asdict() for one in done.problems]})
    elif done.problems:
        place = f"{done.path}.part" if to is To.HDF5 else done.path
        typer.echo(f"{place}: unfinished: {done.written} of {number(done.samples, 'sample')} written")
    else:
        shapes = f"{len(done.shapes)} shapes" if len(done.shapes) > 1 else next(iter(done.shapes))
        what = f"{number(done.samples, 'sample')} of {number(done.patients, 'patient')} ({shapes}, {dtype.value})"
        with_what = ", ".join([*done.structures, *done.labels]) or "nothing drawn"
        shards = f", {number(done.shards, 'shard')}" if to is To.WEBDATASET else ""
        there = f"; {done.there} were there already" if done.there else ""
        typer.echo(f"{done.path}: {what} with {with_what}: {done.bytes / 1e6:.1f} MB{shards}{there}")
        typer.echo(f"snapshot {done.snapshot}, sha256 {done.sha256}")
    for count, why in ((done.erased, "erased"), (done.revoked, "revoked")):
        if count:
            say(f"{number(count, 'sample')} {'was' if count == 1 else 'were'} {why} and left out")
    for problem in done.problems[:MOST_TOLD]:
        say(f"sample {problem.sample_id}: {problem.code}: {problem.message}")
    if done.problems:
        more = f" ({len(done.problems) - MOST_TOLD} more: --json names all)" if len(done.problems) > MOST_TOLD else ""
        say(f"{number(len(done.problems), 'sample')} could not be exported{more}; the export is unfinished, and the same command goes on")
        raise typer.Exit(4)
