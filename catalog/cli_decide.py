"""`catalog pair`, `catalog patient`: what people decide; about flags in `cli_flags`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from catalog import deciding, flags
from catalog.cli_flags import print_closed, print_flag, print_seen
from catalog.database import open_database
from catalog.output import (
    ONE_NAME,
    Actor,
    AsJson,
    DatabaseUrl,
    DryRun,
    PatientName,
    cell,
    counted,
    number,
    one_name,
    plain,
    print_json,
    print_table,
    say_dry,
)

patient_app = typer.Typer(no_args_is_help=True, help="Consent: withdraw it, give it back; and erasing a patient.")
pair_app = typer.Typer(no_args_is_help=True, help="What was drawn on which image: look at what is proposed, and decide.")


@patient_app.command(context_settings=ONE_NAME)
def withdraw(
    context: typer.Context,
    patient: PatientName,
    reason: Annotated[str, typer.Option(help="More about it, in words.", show_default=False)] = "",
    actor: Actor = None,
    dry_run: DryRun = False,
    database: DatabaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """Consent is withdrawn: feed nothing of the patient any more, also of what comes later; says which trainings saw the patient.

    Running daemons take up to a second: the same command again lists what they delivered until then.
    """
    one_name(context)
    with open_database(database) as db:
        added = flags.withdraw(db, patient, reason=reason, actor=actor, dry_run=dry_run)
    say_dry(dry_run)
    [flag] = added.flags
    if as_json:
        found = {"flag": flag.id, "change": flag.change, "dry_run": dry_run, "images": added.images, "annotations": added.annotations}
        seen = [{name: plain(value) for name, value in asdict(one).items()} for one in added.seen]
        typer.echo(json.dumps({**found, "seen": seen}, indent=2))
        return
    print_flag(flag, "the patient")
    typer.echo(f"takes out {number(added.images, 'image')} and {number(added.annotations, 'annotation')}, and what is ingested later")
    print_seen(added.seen)


@patient_app.command(context_settings=ONE_NAME)
def reinstate(
    context: typer.Context,
    patient: PatientName,
    reason: Annotated[str, typer.Option(help="Why, in words.")],
    actor: Actor = None,
    dry_run: DryRun = False,
    database: DatabaseUrl = None,
) -> None:
    """Consent is given again: close the flag of `catalog patient withdraw`."""
    one_name(context)
    with open_database(database) as db:
        closed = flags.reinstate(db, patient, reason=reason, actor=actor, dry_run=dry_run)
    say_dry(dry_run)
    print_closed(closed)
    if not closed:
        typer.echo("the patient is not withdrawn: nothing changed")


@patient_app.command(context_settings=ONE_NAME)
def erase(
    context: typer.Context,
    patient: PatientName,
    reason: Annotated[str, typer.Option(help="Why, in words.")],
    actor: Actor = None,
    dry_run: DryRun = False,
    database: DatabaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """Delete all that the catalog holds of a patient, for good; says which trainings saw the patient. Files are not touched.

    An ingest refuses the patient's files from now on. Running trainings that have the patient in their epoch end with an error: withdraw
    first. Epochs keep their numbers, of which nothing leads back.
    """
    from catalog import erasing

    one_name(context)
    with open_database(database) as db:
        erased = erasing.erase(db, patient, reason=reason, actor=actor, dry_run=dry_run)
    say_dry(dry_run)
    if as_json:
        print_json(asdict(erased))
        return
    if not erased.changed:
        typer.echo(f"the patient was erased already by {erased.actor} at {cell(erased.at)} (erasure {erased.id}): nothing changed")
        return
    numbered = f" (erasure {erased.id})" if erased.id else ""  # a dry run has none
    typer.echo(f"erased the patient{numbered}: {counted(erased.rows)}")
    if erased.kept_files:
        typer.echo(f"{number(erased.kept_files, 'file')} with images of others too stay in the catalog")
    for name, count in erased.snapshots.items():
        typer.echo(f"snapshot {name}: {number(count, 'sample')} taken out; the digest stays")
    print_seen(erased.seen)
    typer.echo(
        "the files themselves, decoded copies in local caches and backups are not touched: remove them; an ingest refuses the files now, "
        "and ends with exit code 3 as long as they are there"
    )


@pair_app.command("list")
def pair_list(
    state: Annotated[deciding.State, typer.Option(help="Of which state; unpaired: annotations without.")] = deciding.State.PROPOSED,
    database: DatabaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """List annotations with the images that they may belong to; `catalog show SAMPLE -o FILE` draws one."""
    with open_database(database) as db:
        found = deciding.listed(db, state=state)
    if as_json:
        print_json([asdict(one) for one in found])
        return
    if not found:
        typer.echo("no annotations" if state == deciding.State.ALL else f"nothing is {state}")
        return
    names = [
        "annotation",
        "structure",
        "reader",
        "file",
        "pairing",
        "sample_id",
        "image",
        "method",
        "rule",
        "score",
        "state",
        "actor",
        "at",
    ]
    rows = []
    for one in found:
        drawn = [str(one.annotation), one.structure, one.reader, one.file + (f" [{one.source_key}]" if one.source_key else "")]
        for which in one.candidates:
            image = (which.image or "(no file)") + (f" [{which.frame}]" if which.frame else "")
            said = [which.method, which.rule, f"{which.score:.3g}", which.state, which.actor, cell(which.at)]
            rows.append([*drawn, str(which.pairing), str(which.sample_id), image, *said])
        if not one.candidates:
            rows.append([*drawn, *[""] * (len(names) - len(drawn))])
    print_table(names, rows)


@pair_app.command("accept")
def pair_accept(
    ids: Annotated[list[int], typer.Argument(metavar="PAIRING_ID...", help="As `catalog pair list` shows.")],
    actor: Actor = None,
    dry_run: DryRun = False,
    database: DatabaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """Say that pairings are right, all or none: other ones of the same annotation are rejected. No ingest touches them any more."""
    with open_database(database) as db:
        decided = deciding.accept(db, ids, actor=actor, dry_run=dry_run)
    _print_decided(decided, dry_run, as_json)


@pair_app.command("reject")
def pair_reject(
    ids: Annotated[list[int], typer.Argument(metavar="PAIRING_ID...", help="As `catalog pair list` shows.")],
    actor: Actor = None,
    dry_run: DryRun = False,
    database: DatabaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """Say that pairings are wrong, all or none. No ingest touches the annotation's pairings any more."""
    with open_database(database) as db:
        decided = deciding.reject(db, ids, actor=actor, dry_run=dry_run)
    _print_decided(decided, dry_run, as_json)


@pair_app.command("link")
def pair_link(
    annotation: Annotated[int, typer.Argument(metavar="ANNOTATION_ID", help="As `catalog pair list` shows.")],
    sample: Annotated[int, typer.Argument(metavar="SAMPLE_ID", help="A sample_id of the view image_all.")],
    actor: Actor = None,
    dry_run: DryRun = False,
    database: DatabaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """Pair an annotation with an image by hand, and make the mask."""
    with open_database(database) as db:
        decided = deciding.link(db, annotation, sample, actor=actor, dry_run=dry_run)
    _print_decided([decided], dry_run, as_json)


def _print_decided(decided: list[deciding.Decided], dry_run: bool, as_json: bool) -> None:
    say_dry(dry_run)
    if as_json:
        print_json([asdict(one) for one in decided])
        return
    for one in decided:
        what = f"pairing {one.pairing or '(new)'} of annotation {one.annotation} with sample {one.sample_id}"
        if not one.changed:
            typer.echo(f"{what} was {one.state} already: nothing changed")
            continue
        others = f"; rejected: {', '.join(map(str, one.rejected))}" if one.rejected else ""
        typer.echo(f"{what} {one.state}{others}" + (f"; closed {number(len(one.closed), 'flag')}" if one.closed else ""))
