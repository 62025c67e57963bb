"""`catalog snapshot`: frozen lists of samples with a digest of what they are."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from catalog import snapshots
from catalog.database import open_database
from catalog.output import Actor, AsJson, DatabaseUrl, DryRun, cell, number, print_json, print_table, progress, say, say_dry
from catalog.selection import DRAWN

if TYPE_CHECKING:
    from catalog import drift

SHOWN = 20  # sample ids a line

snapshot_app = typer.Typer(no_args_is_help=True, help="Frozen lists of samples, with a digest of what they are.")

Name = Annotated[str, typer.Argument(metavar="NAME", help="As `catalog snapshot list` shows.")]


class Require(StrEnum):
    """Of several structures."""

    ANY = "any"
    ALL = "all"


class Origin(StrEnum):
    """Where an annotation comes from."""

    CONTOUR = "contour"
    SEGMENT = "segment"
    LABEL = "label"
    INTERPOLATED = "interpolated"
    PROPOSED = "proposed"


@snapshot_app.callback()
def _group() -> None:
    """Frozen lists of samples, with a digest of what they are."""


@snapshot_app.command("create")
def snapshot_create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What to call it, such as train-1.")],
    where: Annotated[
        str | None,
        typer.Option(metavar="CONDITION", help="SQL over the view sample, with --images over image_all.", show_default=False),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Keep each patient's part and fold; leave out patients without a part.", show_default=False),
    ] = None,
    structure: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="This one alone; again for more. By default all.", show_default=False)
    ] = None,
    origin: Annotated[
        list[Origin] | None,
        typer.Option(help="What comes from there alone; again for more. By default contour, segment and label.", show_default=False),
    ] = None,
    include_flagged: Annotated[bool, typer.Option("--include-flagged", help="Also samples with an open error.")] = False,
    require: Annotated[Require, typer.Option(help="Of several structures: samples that have any, or (as of a Feed) all.")] = Require.ANY,
    images: Annotated[bool, typer.Option("--images", help="Every image, drawn on or not.")] = False,
    actor: Actor = None,
    dry_run: DryRun = False,
    database: DatabaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """Freeze what fits now. Exit code 4: there is one of this name that holds something else.

    Made again with the same name it changes nothing if it would hold the same.
    """
    origins = [one.value for one in origin] if origin else DRAWN
    with open_database(database) as db:
        made = snapshots.create(
            db, name, where=where, split=split, structures=structure or (), origins=origins, include_flagged=include_flagged,
            require=require.value, images=images, actor=actor, dry_run=dry_run,
        )  # fmt: skip
    say_dry(dry_run)
    if made.without_part:
        say(f"{number(made.without_part, 'patient')} without a part in split {split} left out; see `catalog split extend`")
    if made.leaking:
        say(f"{number(made.leaking, 'image')} left out, whose pixels lie on two sides of split {split}; see `catalog split check {split}`")
    if as_json:
        print_json(asdict(made))
        return
    if not made.changed:
        typer.echo(f"snapshot {name} is there already and holds the same {number(made.samples, 'sample')}: nothing changed")
    else:
        typer.echo(f"snapshot {name}: {number(made.samples, 'sample')} of {number(made.patients, 'patient')}")
    for counts in (made.structures, made.parts):
        if counts:
            typer.echo("  " + ", ".join(f"{key} {count}" for key, count in counts.items()))
    typer.echo(f"  sha256 {made.sha256}")


@snapshot_app.command("list")
def snapshot_list(database: DatabaseUrl = None, as_json: AsJson = False) -> None:
    """List the snapshots, oldest first."""
    with open_database(database) as db:
        found = snapshots.listed(db)
    if as_json:
        print_json(found)
        return
    if not found:
        typer.echo("no snapshots yet: catalog snapshot create NAME")
        return
    names = ["name", "sha256", "samples", "patients", "erased", "structures", "created", "actor"]
    rows = [{**row, "sha256": row["sha256"][:12], "structures": ", ".join(row["structures"])} for row in found]
    print_table(names, [[cell(row[name]) for name in names] for row in rows])


@snapshot_app.command("show")
def snapshot_show(name: Name, database: DatabaseUrl = None, as_json: AsJson = False) -> None:
    """Show a snapshot: how it was chosen, what it holds by part and structure, what became of it since."""
    with open_database(database) as db:
        found = snapshots.shown(db, name)
    if as_json:
        print_json(found)
        return
    typer.echo(f"snapshot {name}: {number(found['samples'], 'sample')} of {number(found['patients'], 'patient')}")
    typer.echo(f"  sha256 {found['sha256']}")
    typer.echo(f"  made {cell(found['created'])} by {found['actor']}, scanfeed {found['program_version']}")
    for key, value in found["definition"].items():
        typer.echo(f"  {key.replace('_', ' ')}: {', '.join(value) if isinstance(value, list) else value}")
    for row in found["parts"]:
        if row["part"] is not None:
            fold = "" if row["fold"] is None else f", fold {row['fold']}"
            typer.echo(f"  part {row['part']}{fold}: {number(row['samples'], 'sample')}")
    for row in found["annotated"]:
        of_part = f" in {row['part']}" if row["part"] else ""
        typer.echo(f"  {row['structure']} ({row['origin']}){of_part}: {number(row['samples'], 'sample')}")
    for count, what in (
        (found["erased"], "of patients who were erased since: their digests alone are left"),
        (found["revoked"], "fed no more: consent was withdrawn, or a flag revokes them"),
        (found["flagged"], "with an open error now; a stream on the snapshot feeds them all the same"),
    ):
        if count:
            typer.echo(f"  {number(count, 'sample')} {what}")


@snapshot_app.command("diff")
def snapshot_diff(
    first: Annotated[str, typer.Argument(metavar="A", help="As `catalog snapshot list` shows.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another one.")],
    database: DatabaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """Say how B differs from A: samples added, removed, and changed in what. Exit code 4: they differ."""
    from catalog import drift

    with open_database(database) as db:
        found = drift.diff(db, first, second)
    counts = found.counts()
    if as_json:
        print_json({"equal": found.equal, "sha256": found.sha256, "counts": counts, "samples": [asdict(one) for one in found.samples]})
    elif found.equal:
        typer.echo(f"{first} and {second} hold the same: sha256 {found.sha256[0]}")
    else:
        for change in ("added", "removed", "changed"):
            ids = [str(one.sample_id or "(erased)") for one in found.samples if one.change == change]
            if ids:
                typer.echo(f"{number(len(ids), 'sample')} {change}: {_some(ids)}")
        for what in sorted(set(counts) - {"added", "removed", "changed"}):
            typer.echo(f"  {what}: {number(counts[what], 'sample')}")
    if not found.equal:
        raise typer.Exit(4)


@snapshot_app.command("verify")
def snapshot_verify(
    name: Name,
    full: Annotated[bool, typer.Option("--full", help="Compare all pixels, not those alone whose file looks different.")] = False,
    jobs: Annotated[int | None, typer.Option(min=1, max=256, help="Processes; by default one a core.", show_default=False)] = None,
    database: DatabaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """Is it still what was frozen? Compares digests with the rows, looks at each file, and compares pixels. Exit code 4: it is not."""
    from catalog import drift

    with open_database(database) as db, progress("images") as update:
        found = drift.verify(db, name, full=full, jobs=jobs, progress=update)
    if as_json:
        print_json({**asdict(found), "problems": [one._asdict() for one in found.problems], "well": found.well})
    else:
        _print_verified(found)
    if not found.well:
        raise typer.Exit(4)


def _print_verified(found: drift.Verified) -> None:
    if not found.whole:
        typer.echo("its samples are not those that were frozen: rows were taken out or changed behind the database's back")
    by_message: dict[tuple[str, str], list[str]] = {}
    for one in found.problems:
        by_message.setdefault((one.code, one.message), []).append(str(one.sample_id))
    for (code, message), ids in by_message.items():
        typer.echo(f"{number(len(ids), 'sample')} {code}: {message}: {_some(ids)}")
    if found.erased:
        typer.echo(f"{number(found.erased, 'sample')} of patients who were erased since: their digests alone are left")
    said = "is what was frozen" if found.well else "is not what was frozen"
    typer.echo(f"snapshot {found.name} {said}: {number(found.looked_at, 'image')} looked at, pixels of {found.read} compared")
    typer.echo(f"  sha256 {found.sha256}")


def _some(ids: list[str]) -> str:
    return ", ".join(ids[:SHOWN]) + (f", … ({len(ids) - SHOWN} more: --json)" if len(ids) > SHOWN else "")
