"""`catalog flag`: what is wrong, and what people say about it."""

from __future__ import annotations

import itertools
from dataclasses import asdict
from typing import Annotated, Any

import typer

from catalog import flaglist, flags, rulefiles
from catalog.database import open_database
from catalog.output import ONE_NAME, Actor, AsJson, DatabaseUrl, DryRun, cell, number, one_name, print_json, print_table, say, say_dry

flag_app = typer.Typer(no_args_is_help=True, help="Findings: list and look at them, decide on them, raise your own.")

Ids = Annotated[list[int], typer.Argument(metavar="ID...", help="As `catalog flag list` shows.")]
Why = Annotated[str, typer.Option("-m", "--reason", help="Why, in words.")]


@flag_app.command("add", context_settings=ONE_NAME)
def flag_add(
    context: typer.Context,
    subject: Annotated[str, typer.Argument(help="sample:17, file:9, annotation:3, pairing:5, series:UID, study:UID or patient:NAME.")],
    rule: Annotated[str, typer.Option(help="A short code, such as BAD-CONTOUR.")],
    detail: Annotated[str, typer.Option("-m", "--reason", "--detail", help="What was found, in words.")],
    severity: Annotated[flags.Severity, typer.Option(help="Open errors keep samples out of feeding.")] = flags.Severity.ERROR,
    revoke: Annotated[bool, typer.Option("--revoke", help="Feed nothing of it any more, at once, from frozen streams too.")] = False,
    actor: Actor = None,
    dry_run: DryRun = False,
    database: DatabaseUrl = None,
) -> None:
    """Raise a flag; says what it keeps out, and with --revoke which runs saw it. Daemons take up to a second: again lists all."""
    one_name(context)
    with open_database(database) as db:
        added = flags.add(db, subject, rule=rule, detail=detail, severity=severity, revoke=revoke, actor=actor, dry_run=dry_run)
    say_dry(dry_run)
    kind, _, name = subject.partition(":")
    for flag in added.flags:
        print_flag(flag, f"{kind} {name}" if flags.NAMED_BY[kind][1] == "id" else f"the {kind}")
    samples = number(added.images, "sample")
    if any(flag.revokes for flag in added.flags):
        typer.echo(f"affects {samples}, fed no more, and what is ingested of it later")
        print_seen(added.seen)
    elif any(flag.severity == flags.Severity.ERROR for flag in added.flags):
        typer.echo(f"affects {samples}, left out from the next epoch on")
    else:
        typer.echo(f"affects {samples}, fed all the same: it is no error")


@flag_app.command("list")
def flag_list(
    rule: Annotated[str | None, typer.Option(metavar="GLOB", help="Of rules that fit, such as 'MASK-*'.", show_default=False)] = None,
    severity: Annotated[flags.Severity | None, typer.Option(help="Of this severity alone.", show_default=False)] = None,
    subject: Annotated[flaglist.Kind | None, typer.Option(help="On such subjects alone.", show_default=False)] = None,
    assigned_to: Annotated[str | None, typer.Option(metavar="NAME", help="Whose they are; '' for nobody's.", show_default=False)] = None,
    sample: Annotated[
        int | None, typer.Option(help="On this one, its files, series, study, patient and what is drawn on it.", show_default=False)
    ] = None,
    state: Annotated[flaglist.State, typer.Option(help="open, resolved, false_positive or all.")] = flaglist.State.OPEN,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many, the oldest.", show_default=False)] = None,
    database: DatabaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """List flags, oldest first."""
    with open_database(database) as db:
        rows = flaglist.listed(
            db, rule=rule, state=state, severity=severity, subject=subject, assigned_to=assigned_to, sample=sample,
            limit=None if limit is None else limit + 1,
        )  # fmt: skip
    more = limit is not None and len(rows) > limit
    rows = rows[:limit]
    if as_json:
        print_json(rows)
    elif not rows:
        typer.echo("no flags" if state == flaglist.State.ALL else f"no {state.replace('_', ' ')} flags")
    else:
        hidden = () if state != flaglist.State.OPEN else ("state", "closed_by", "closed_at", "reason")
        names = [name for name in rows[0] if name not in hidden]
        print_table(names, [[cell(row[name]) for name in names] for row in rows])
    if more:
        say(f"these are the first {limit}; there are more")


@flag_app.command("show")
def flag_show(
    flag_id: Annotated[int, typer.Argument(metavar="ID", help="As `catalog flag list` shows.")],
    database: DatabaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """Show all about one flag: what was found, what it means, and who did what to it, when and why."""
    with open_database(database) as db:
        row, events = flaglist.history(db, flag_id)
    rule = rulefiles.load().get(row["rule"])
    if as_json:
        print_json({**row, "history": [asdict(event) for event in events]})
        return
    state = row["state"].replace("_", " ") + (", revokes" if row["revokes"] else "")
    typer.echo(f"flag {row['id']} ({row['rule']} version {row['rule_version']}, {row['severity']}): {state}, on {row['subject']}")
    typer.echo(f"found: {cell(row['detail'])}" + ("" if row["value"] is None else f" (value {row['value']:.6g})"))
    if rule is not None:
        typer.echo(f"means: {rule.means}\ndo: {rule.do}")
    if row["assigned_to"]:
        typer.echo(f"assigned to {row['assigned_to']}")
    typer.echo()
    if not events:  # older than the log
        print_table(["at", "who", "what"], [[cell(row["raised_at"]), row["raised_by"], "raised, before there was a log of events"]])
        return
    rows = [[cell(event.at), event.actor, _said(event), cell(event.reason)] for event in events]
    print_table(["at", "who", "what", "why"], rows)


@flag_app.command("resolve")
def flag_resolve(ids: Ids, reason: Why, actor: Actor = None, dry_run: DryRun = False, database: DatabaseUrl = None) -> None:
    """What was wrong is put right: close flags, all or none. A rule that still finds it raises a new one.

    What they kept out is fed again, unless another flag keeps it out.
    """
    with open_database(database) as db:
        closed = flags.close(db, ids, reason=reason, actor=actor, dry_run=dry_run)
    say_dry(dry_run)
    print_closed(closed)


@flag_app.command("false-positive")
def flag_false_positive(ids: Ids, reason: Why, actor: Actor = None, dry_run: DryRun = False, database: DatabaseUrl = None) -> None:
    """There is nothing wrong: close flags, all or none. A rule raises them again once their value changes by more than 5 %.

    What they kept out is fed again, unless another flag keeps it out.
    """
    with open_database(database) as db:
        closed = flags.close(db, ids, reason=reason, false_positive=True, actor=actor, dry_run=dry_run)
    say_dry(dry_run)
    print_closed(closed)


@flag_app.command("reopen")
def flag_reopen(ids: Ids, reason: Why, actor: Actor = None, dry_run: DryRun = False, database: DatabaseUrl = None) -> None:
    """Take back that flags were closed, all or none. They are as they were: what revokes does so at once, a rule closes its own."""
    with open_database(database) as db:
        changed = flags.reopen(db, ids, reason=reason, actor=actor, dry_run=dry_run)
    say_dry(dry_run)
    for flag in changed:
        if not flag.changed:
            typer.echo(f"flag {flag.id} ({flag.rule}) is open: nothing changed")
            continue
        revoked = f"; {number(flag.revoked, 'sample')} fed no more" if flag.revoked else ""
        typer.echo(f"flag {flag.id} ({flag.rule}) is open again; it was {flag.was.replace('_', ' ')}{revoked}")


@flag_app.command("assign")
def flag_assign(
    ids: Ids,
    to: Annotated[str, typer.Option(metavar="NAME", help="Who looks after them; '' for nobody.")],
    reason: Why,
    actor: Actor = None,
    dry_run: DryRun = False,
    database: DatabaseUrl = None,
) -> None:
    """Say who looks after open flags, all or none."""
    with open_database(database) as db:
        changed = flags.assign(db, ids, to=to, reason=reason, actor=actor, dry_run=dry_run)
    say_dry(dry_run)
    whose = to.strip() or "nobody"
    for flag in changed:
        said = f"assigned to {whose}; it was {flag.was or 'nobody'}'s" if flag.changed else f"is {whose}'s: nothing changed"
        typer.echo(f"flag {flag.id} ({flag.rule}) {said}")


def _said(event: flaglist.Event) -> str:
    """Return what happened in words: what was before and what after."""
    if event.action == "insert":
        return f"raised ({event.after.get('severity')}{', revokes' if event.after.get('revokes') else ''})"
    names = dict.fromkeys((*event.before, *event.after))
    return "; ".join(f"{name} {_shown(event.before, name)} → {_shown(event.after, name)}" for name in names) or event.action


def _shown(values: dict[str, Any], name: str) -> str:
    value = values.get(name)
    return (
        "none"
        if value is None
        else f"{value:.6g}"
        if isinstance(value, float)
        else ("yes" if value is True else "no" if value is False else str(value))
    )


def print_flag(flag: flags.Flag, on: str) -> None:
    """Print what became of a flag that was to be raised."""
    what = f"flag {flag.id or '(new)'} ({flag.severity}{', revokes' if flag.revokes else ''}) on {on}"
    if flag.change is None:
        typer.echo(f"{what} is open already, raised by {flag.raised_by} at {cell(flag.raised_at)}: nothing changed")
    else:
        typer.echo(f"{what} {flag.change}")


def print_closed(closed: list[flags.Closed]) -> None:
    """Print which flags are closed now, and what is fed again."""
    for flag in closed:
        if not flag.changed:
            typer.echo(f"flag {flag.id} was closed already by {flag.closed_by} at {cell(flag.closed_at)} ({flag.state}): nothing changed")
            continue
        freed = f"; {number(flag.freed, 'sample')} no longer revoked" if flag.revoked else ""
        held = f", {flag.held} still are by other flags" if flag.held else ""
        typer.echo(f"flag {flag.id} ({flag.rule}) closed: {flag.state}{freed}{held}")


def print_seen(seen: list[flags.Seen]) -> None:
    """Print which runs were given some of it."""
    if not seen:
        typer.echo("no run saw any of it")
        return
    typer.echo(f"seen already by {number(len({one.run for one in seen}), 'run')}:")
    rows = []
    for one in seen:
        samples = f"{one.samples}{'+' if one.pruned else ''}"
        times = [cell(one.first), cell(one.last)]
        models = ", ".join(one.models) or "none noted"
        rows.append([one.run, one.stream_name or str(one.stream), _ranges(one.epochs), samples, str(one.deliveries), *times, models])
    print_table(["run", "stream", "epochs", "samples", "deliveries", "first", "last", "models"], rows)
    if any(one.pruned for one in seen):
        typer.echo("+ perhaps more in pruned epochs, of which only the patients are known")


def _ranges(numbers: list[int]) -> str:
    """Return sorted numbers as 0-3, 5."""
    runs = [[at for _, at in group] for _, group in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
