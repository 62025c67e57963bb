"""`catalog split`: who is trained on, and who is held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from catalog import splits
from catalog.database import open_database
from catalog.dealing import Tied, parse_ratios
from catalog.output import Actor, AsJson, DatabaseUrl, DryRun, cell, number, print_json, print_table, say, say_dry

SHOWN = 20  # rows of a long list

split_app = typer.Typer(no_args_is_help=True, help="Who is trained on, and who is held out.")

Name = Annotated[str, typer.Argument(metavar="NAME", help="The split's name.")]


@split_app.command()
def create(
    name: Name,
    ratios: Annotated[
        str | None,
        typer.Option(
            metavar="R,R,R",
            help="Shares of the patients: 70,15,15 are train, val and test, 80,20 train and val; or train=60,val=20,other=20.",
            show_default=False,
        ),
    ] = None,
    folds: Annotated[
        int | None,
        typer.Option(min=2, max=1000, help="Folds among all who are not in test; without --ratios all are train.", show_default=False),
    ] = None,
    stratify: Annotated[
        str | None,
        typer.Option(
            metavar="EXPR",
            help="An SQL expression over the view sample; each of its values, the most frequent one of a patient, is dealt out evenly.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Decides who comes where.")] = 0,
    actor: Actor = None,
    dry_run: DryRun = False,
    database: DatabaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """Give each patient a part. Patients that share pixels go together. The same seed and patients give the same split anywhere."""
    shares = None if ratios is None else parse_ratios(ratios)
    with open_database(database) as db:
        done = splits.create(db, name, ratios=shares, folds=folds, stratify=stratify, seed=seed, actor=actor, dry_run=dry_run)
    _print_dealt(done, dry_run, as_json)


@split_app.command()
def extend(name: Name, actor: Actor = None, dry_run: DryRun = False, database: DatabaseUrl = None, as_json: AsJson = False) -> None:
    """Give a part to patients that came since. Those who have one stay."""
    with open_database(database) as db:
        done = splits.extend(db, name, actor=actor, dry_run=dry_run)
    _print_dealt(done, dry_run, as_json)


@split_app.command("import")
def import_(
    name: Name,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A CSV with the columns patient, part and, if it has folds, fold from 0.")],
    actor: Actor = None,
    dry_run: DryRun = False,
    database: DatabaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """Take over a split that somebody else made, as a whole or not at all."""
    with open_database(database) as db:
        done = splits.import_csv(db, name, file, actor=actor, dry_run=dry_run)
    _print_dealt(done, dry_run, as_json)


@split_app.command("list")
def list_(database: DatabaseUrl = None, as_json: AsJson = False) -> None:
    """List the splits."""
    with open_database(database) as db:
        found = splits.listed(db)
    if as_json:
        print_json([asdict(one) | {"patients": patients} for one, patients in found])
    elif not found:
        typer.echo("no splits; see `catalog split create`")
    else:
        print_table(
            ["name", "parts", "folds", "patients", "seed", "stratify", "made by", "at", "frozen by", "at"],
            [
                [
                    one.name, _parts(one), cell(one.folds), str(patients), cell(one.seed), cell(one.stratify), one.actor,
                    cell(one.created_at), cell(one.frozen_by), cell(one.frozen_at),
                ]
                for one, patients in found
            ],
        )  # fmt: skip


@split_app.command()
def show(name: Name, database: DatabaseUrl = None, as_json: AsJson = False) -> None:
    """Say what lies in a split: patients, images and annotated images by part, by fold, by stratum."""
    with open_database(database) as db:
        found = splits.show(db, name)
    if as_json:
        print_json(asdict(found))
        return
    _print_shown(found)
    if found.without:
        typer.echo(f"{number(found.without, 'patient')} of the catalog without a part")


@split_app.command()
def check(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="The split's name; by default all.", show_default=False)] = None,
    database: DatabaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """Look for pixels on two sides. Exit code 3: there are some, or pixels are not hashed, so that nobody can know."""
    with open_database(database) as db:
        found = splits.check(db, name)
    if as_json:
        print_json([asdict(one) for one in found])
    elif not found:
        typer.echo("no splits; see `catalog split create`")
    for one in found:
        if not as_json:
            _print_checked(one)
        if one.leaks:
            images = len({leak["sample_id"] for leak in one.leaks})
            say(
                f"split {one.split}: {number(images, 'image')} whose pixels lie on another side too; no part is fed them until "
                f"the others are gone, as `catalog patient erase` or `catalog runs undo` takes them out"
            )
    if found and found[0].unhashed:
        _say_unhashed(found[0].unhashed)
    if any(one.leaks or one.unhashed for one in found):
        raise typer.Exit(3)


@split_app.command()
def freeze(name: Name, actor: Actor = None, dry_run: DryRun = False, database: DatabaseUrl = None, as_json: AsJson = False) -> None:
    """Freeze a split for good: nobody comes to it, moves or goes but who is erased."""
    with open_database(database) as db:
        found, changed = splits.freeze(db, name, actor=actor, dry_run=dry_run)
    say_dry(dry_run)
    if as_json:
        print_json(asdict(found) | {"changed": changed})
    elif changed:
        typer.echo(f"split {found.name}: frozen")
    else:
        typer.echo(f"split {found.name}: was frozen by {found.frozen_by} at {cell(found.frozen_at)}: nothing changed")


def _print_dealt(done: splits.Dealt, dry_run: bool, as_json: bool) -> None:
    say_dry(dry_run)
    if as_json:
        print_json(asdict(done))
    else:
        typer.echo(f"split {done.shown.split.name}: {number(done.added, 'patient')} got a part")
        _print_shown(done.shown)
        if done.sharing:
            typer.echo(
                f"{number(done.sharing, 'patient')} share pixels with others; the largest group that goes together has {done.largest}"
            )
        if done.shown.without:
            typer.echo(f"{number(done.shown.without, 'patient')} of the catalog without a part")
        _print_tied(done.tied)
    if empty := [one.name for one in done.shown.parts if not one.patients]:
        say(f"nobody is in {' and '.join(empty)}: there are too few patients for these ratios")
    if empty := [one.name for one in done.shown.folds if not one.patients]:
        few, said = len(empty) == 1, ", ".join(empty[:SHOWN]) + (", …" if len(empty) > SHOWN else "")
        say(f"nobody is in {'fold' if few else 'folds'} {said}: there are too few patients for {len(done.shown.folds)} folds")
    if done.unhashed:
        _say_unhashed(done.unhashed)
    if done.sharing and done.unmeasured:
        say(
            f"{number(done.unmeasured, 'image')} not measured: blank ones tie patients together that need not be; "
            f"run `catalog measure`, then make the split"
        )


def _print_shown(found: splits.Shown) -> None:
    split = found.split
    made = "imported" if split.ratios is None else f"seed {split.seed}" + (f", by {split.stratify}" if split.stratify else "")
    typer.echo(f"{made}; made by {split.actor}" + ("" if split.frozen_at is None else f", frozen by {split.frozen_by}"))
    for title, rows in (("part", found.parts), ("fold", found.folds)):
        if rows:
            print_table(
                [title, "patients", "share", "wanted", "images", "annotated"],
                [
                    [
                        one.name, str(one.patients), f"{one.share:.4f}", "" if one.wanted is None else f"{one.wanted:.4f}", str(one.images),
                        str(one.annotated),
                    ]
                    for one in rows
                ],
            )  # fmt: skip
    if found.strata:
        strata = [[cell(value), *map(str, counts.values())] for value, counts in found.strata.items()]
        print_table(["stratum", *split.parts], strata[:SHOWN])
        if len(strata) > SHOWN:
            typer.echo(f"({SHOWN} of {len(strata)} strata; --json has all)")


def _print_checked(one: splits.Checked) -> None:
    typer.echo(f"split {one.split}: " + (f"{number(len(one.leaks), 'leak')}" if one.leaks else "no pixels on two sides"))
    if one.leaks:
        print_table(list(one.leaks[0]), [[cell(value) for value in leak.values()] for leak in one.leaks[:SHOWN]])
        if len(one.leaks) > SHOWN:
            typer.echo(f"({SHOWN} of {len(one.leaks)}; --json has all)")
    if one.without:
        remedy = "; it is frozen" if one.frozen else "; see `catalog split extend`"
        typer.echo(f"{number(one.without, 'patient')} of the catalog without a part{remedy}")
    _print_tied(one.tied)


def _print_tied(tied: Sequence[Tied]) -> None:
    for one in tied[:SHOWN]:
        typer.echo(
            f"left without a part: {', '.join(map(str, one.patients[:SHOWN]))} (patient.id): sharing pixels with {' and '.join(one.sides)}"
        )
    if len(tied) > SHOWN:
        typer.echo(f"({SHOWN} of {len(tied)} groups that tie sides together; --json has all)")


def _say_unhashed(count: int) -> None:
    say(f"the pixels of {number(count, 'image')} are not hashed, so nobody knows who shares them; run `catalog measure`, then check again")


def _parts(split: splits.Split) -> str:
    if split.ratios is None:
        return ", ".join(split.parts)
    return ", ".join(f"{part} {ratio:.4g}" for part, ratio in zip(split.parts, split.ratios, strict=True))
