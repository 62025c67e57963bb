"""`catalog qa`: run rules, list and explain them, set their parameters."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from catalog import qa, relations, rulefiles
from catalog.database import open_database
from catalog.errors import UsageError
from catalog.output import Actor, AsJson, DatabaseUrl, DryRun, number, print_json, print_table, progress, say, say_dry

qa_app = typer.Typer(no_args_is_help=True, help="Rules: what is wrong with files, images, pairings, contours and masks.")

Rules = Annotated[
    list[Path] | None,
    typer.Option("--rules", metavar="FOLDER", help="Rules of your own, CODE.sql each; again for more.", show_default=False),
]
Code = Annotated[str, typer.Argument(metavar="CODE", help="As `catalog qa rules` lists.")]


class FailOn(StrEnum):
    """From which severity open flags of the rules asked for are exit code 3."""

    ERROR = "error"
    WARNING = "warning"


@qa_app.command("run")
def qa_run(
    rule: Annotated[
        str | None, typer.Option(metavar="GLOB", help="Those alone whose code fits, such as 'MASK-*'.", show_default=False)
    ] = None,
    changed: Annotated[
        bool, typer.Option("--changed", help="Look at patients alone of whom something changed since the last run.")
    ] = False,
    fail_on: Annotated[FailOn, typer.Option(help="From which severity an open flag is exit code 3.")] = FailOn.ERROR,
    rules: Rules = None,
    actor: Actor = None,
    dry_run: DryRun = False,
    database: DatabaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate rules: raise flags on what fails, close those that are no longer so. Exit code 3: flags of these rules are open.

    Those that ingest, measure and loaderd raise by themselves count too.
    """
    asked = qa.chosen(rulefiles.load(rules or ()), rule)
    with open_database(database) as db, progress("evaluating rules") as update:
        summary = qa.run(db, rules=asked, changed=changed, actor=actor, dry_run=dry_run, progress=update, say=say)
    say_dry(dry_run)
    if as_json:
        print_json(asdict(summary))
    else:
        _print_summary(summary)
    failing = rulefiles.SEVERITIES[: rulefiles.SEVERITIES.index(fail_on.value) + 1]
    if count := sum(summary.open.get(severity, 0) for severity in failing):
        say(f"{number(count, 'open flag')} of severity {' or '.join(failing)}; see `catalog flag list` and `catalog gallery`")
        raise typer.Exit(3)


def _print_summary(summary: qa.Summary) -> None:
    rows = []
    for one in summary.results:
        if one.findings or one.closed or one.not_evaluated:
            left = f"{one.not_evaluated}: {one.why}" if one.not_evaluated else one.why
            rows.append([one.rule, one.severity, one.subject, str(one.findings), str(one.raised), str(one.closed), left])
    if rows:
        print_table(["rule", "severity", "subject", "findings", "raised", "closed", "not evaluated"], rows)
    quiet = sum(not (one.findings or one.not_evaluated or one.why) for one in summary.results)
    off = sum(one.why == qa.OFF for one in summary.results)
    typer.echo(
        f"{number(len(summary.results), 'rule')} over {number(summary.patients, 'patient')} in {summary.seconds:.1f} s; "
        f"{quiet} found nothing and left nothing out" + (f"; {off} turned off here" if off else "")
    )


@qa_app.command("rules")
def qa_rules(rules: Rules = None, as_json: AsJson = False) -> None:
    """List rules. One is a file CODE.sql: a head of `-- title:`, `-- severity:`, `-- subject:`, `-- means:`, `-- do:` and a query."""
    found = [rule for _, rule in sorted(rulefiles.load(rules or ()).items())]
    if as_json:
        print_json([_described(rule) for rule in found])
    else:
        print_table(["rule", "severity", "subject", "title"], [[one.code, one.severity, one.subject, one.title] for one in found])


@qa_app.command("explain")
def qa_explain(code: Code, rules: Rules = None, database: DatabaseUrl = None, as_json: AsJson = False) -> None:
    """Say what a rule means, what to do about it, and how it is set here."""
    rule = _rule(code, rules)
    with open_database(database) as db, db.connect() as conn:
        here = dict(conn.execute("SELECT name, value FROM rule_setting WHERE rule = %s", [rule.code]).fetchall())
        open_flags = conn.execute("SELECT count(*) FROM flag WHERE rule = %s AND state = 'open'", [rule.code]).fetchone()
    count = open_flags[0] if open_flags else 0
    if as_json:
        print_json({**_described(rule), "settings": here, "open_flags": count})
        return
    typer.echo(f"{rule.code} ({rule.severity}, on a {rule.subject}, version {rule.version}): {rule.title}")
    typer.echo(f"means: {rule.means}")
    typer.echo(f"do: {rule.do}")
    for name, default in rule.parameters.items():
        set_here = f"; here {here[name]}" if name in here else ""
        typer.echo(f"parameter {name}: {_shown(default)}{set_here}: {rule.said[name]}")
    if rule.raised_by:
        typer.echo(f"raised by {rule.raised_by} itself")
    if here.get("enabled") == "false":
        typer.echo("not run here: it was set to enabled false")
    typer.echo(f"{number(count, 'open flag')}")


# Unknown options are values: -2.5 looks like one.
@qa_app.command("set", context_settings={"ignore_unknown_options": True})
def qa_set(
    code: Code,
    name: Annotated[str, typer.Argument(help="A parameter of the rule, or enabled.")],
    value: Annotated[str | None, typer.Argument(help="A number, true, false or text; without one the default is back.")] = None,
    reason: Annotated[str, typer.Option("-m", "--reason", help="Why, in words; needed.", show_default=False)] = "",
    rules: Rules = None,
    actor: Actor = None,
    dry_run: DryRun = False,
    database: DatabaseUrl = None,
) -> None:
    """Set a parameter of a rule for this catalog. The next run goes by it."""
    rule = _rule(code, rules)
    with open_database(database) as db:
        before = qa.set_value(db, rule, name, value, reason=reason, actor=actor, dry_run=dry_run)
    say_dry(dry_run)
    default = "true" if name == "enabled" else _shown(rule.parameters[name])
    if before == value:
        typer.echo(f"{rule.code} {name} is {default if value is None else value}: nothing changed")
        return
    typer.echo(f"{rule.code} {name}: {default if value is None else value} (was {default if before is None else before})")
    if name == "enabled" and value == "false":
        typer.echo("its open flags close with the next `catalog qa run`; until then they count")


def _rule(code: str, folders: list[Path] | None) -> rulefiles.Rule:
    rules = rulefiles.load(folders or ())
    if code.upper() not in rules:
        raise UsageError(f"{code}: there is no such rule; `catalog qa rules` lists them")
    return rules[code.upper()]


def _described(rule: rulefiles.Rule) -> dict[str, Any]:
    return {name: value for name, value in asdict(rule).items() if name not in ("query", "not_evaluated", "path")}


def _shown(value: float | bool | str) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:.15g}" if isinstance(value, float) else value


@qa_app.command("relate")
def qa_relate(
    inside: Annotated[str | None, typer.Argument(help="A structure; without any, what was said is listed.", show_default=False)] = None,
    outside: Annotated[str | None, typer.Argument(help="The one around it.", show_default=False)] = None,
    remove: Annotated[bool, typer.Option("--remove", help="It does not lie there, or need not.")] = False,
    reason: Annotated[str, typer.Option("-m", "--reason", help="Why, in words.")] = "",
    actor: Actor = None,
    dry_run: DryRun = False,
    database: DatabaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """Say which structure lies inside which, for the rules RELATION-*. The next run goes by it."""
    if inside is None or outside is None:
        if inside is not None:
            raise UsageError(f"{inside}: inside what? Name two structures, or none for a list")
        with open_database(database) as db:
            rows = relations.listed(db)
        if as_json:
            print_json([dict(zip(("inside", "outside", "actor"), row, strict=True)) for row in rows])
        else:
            print_table(["inside", "outside", "said by"], [list(row) for row in rows])
        return
    with open_database(database) as db:
        done = relations.relate(db, inside, outside, reason=reason, remove=remove, actor=actor, dry_run=dry_run)
    say_dry(dry_run)
    for name in done.unknown:
        say(f"nothing in the catalog is of a structure {name!r} yet")
    if as_json:
        print_json(asdict(done))
    else:
        what = "no longer said to lie" if remove else "lies"
        typer.echo(f"{inside} {what} inside {outside}" + ("" if done.changed else ": it was so before"))
