"""What the commands of `catalog` and `loaderd` share: their common options, how they print, and how they end."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from decimal import Decimal
from typing import Annotated, Any

import typer

from catalog.errors import CatalogError, UsageError

DatabaseUrl = Annotated[
    str | None,
    typer.Option("--database", envvar="CATALOG_DATABASE_URL", help="PostgreSQL URL; without it the embedded database.", show_default=False),
]
Actor = Annotated[str | None, typer.Option(help="Who decides; by default the OS user.", show_default=False)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would happen; changes nothing.")]
PatientName = Annotated[str, typer.Argument(metavar="PATIENT", help="PatientID, or the layout's name for the patient.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
# The words of an unquoted name are taken, so that no message of the command line's parser repeats them.
ONE_NAME = {"allow_extra_args": True}


def one_name(context: typer.Context) -> None:
    """Refuse more words than one name, without repeating them."""
    if context.args:
        raise UsageError("one at a time; a name with spaces goes into quotes")


def say_dry(dry_run: bool) -> None:
    """Say that nothing was changed, in a dry run."""
    if dry_run:
        say("dry run: nothing was changed; this is what would be said")


def number(count: int, noun: str) -> str:
    """Return 1 image, 2 images."""
    return f"{count} {noun if count == 1 else plural(noun)}"


def counted(rows: Mapping[str, int]) -> str:
    """Return how many rows of which table: 3 images, 1 study."""
    return ", ".join(number(count, table.replace("_", " ")) for table, count in rows.items() if count) or "nothing"


def print_json(found: Any) -> None:
    """Print a result, with times and bytes as text."""
    typer.echo(json.dumps(found, indent=2, default=plain))


def cell(value: Any) -> str:
    """Return a value as one line of a table."""
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d %H:%M:%S}"
    return "" if value is None else " ".join(str(value).split())


def plain(value: Any) -> Any:
    """Return a value as JSON and CSV can carry it."""
    if isinstance(value, memoryview | bytes):
        return bytes(value).hex()
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, uuid.UUID) or (value is not None and not isinstance(value, str | int | float | bool | dict)):
        return str(value)
    return value


def print_table(names: list[str], rows: list[list[str]]) -> None:
    """Print rows below their names, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]
    numbers = [all(value.replace(".", "", 1).lstrip("-").isdigit() or not value for value in column) for column in zip(*rows, strict=True)]
    for place, row in enumerate([names, *rows]):
        cells = [
            value.rjust(width) if numeric else value.ljust(width)
            for value, width, numeric in zip(row, widths, numbers or [False] * len(names), strict=True)
        ]
        typer.echo("  ".join(cells).rstrip())
        if place == 0:
            typer.echo("  ".join("-" * width for width in widths))


def plural(noun: str) -> str:
    """Return the noun for several."""
    return {"patient": "patients", "study": "studies", "series": "series"}.get(noun, noun + "s")


def say(line: str) -> None:
    """Say something on stderr, beside the result."""
    typer.echo(f"catalog: {line}", err=True)


@contextlib.contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show files/s and the time left on stderr, ten times a second; nothing when that is no terminal."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=10, transient=True) as bar:
        task = bar.add_task(what, total=None, rate="")

        def update(done: int, total: int) -> None:
            speed = bar.tasks[0].speed
            bar.update(task, completed=done, total=total, rate=f"{speed:.0f} files/s" if speed else "")

        yield update


# What these did stays, and they go on from there; others begin anew.
RESUMED = ("catalog ingest", "catalog measure", "catalog export", "catalog runs retry")
# What pydantic puts around a reason, with which newer Typers read values.
PYDANTIC = re.compile("Value error, |, unable to parse string as an? [a-z]+")

# Typer exports neither, and since 0.16 carries a click of its own.
_ClickException: type[Exception] = typer.BadParameter.__mro__[2]


def run(command: typer.Typer, name: str) -> None:
    """Run a command line: an expected error is one line on stderr and its exit code, Ctrl-C is 130."""
    try:
        code = command(prog_name=name, standalone_mode=False)
        if code == 130:  # how newer Typers say that Ctrl-C came
            raise KeyboardInterrupt
        sys.exit(code)
    except CatalogError as error:
        typer.echo(f"{name}: {error}", err=True)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        resumed = f"{' '.join([name, *sys.argv[1:3]])} ".startswith(tuple(f"{one} " for one in RESUMED))
        then = "the same command goes on where this one ended" if resumed else "run the same command again"
        typer.echo(f"{name}: interrupted; {then}", err=True)
        sys.exit(130)
    except BrokenPipeError:  # `catalog sql … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        typer.echo(f"{name}: {where}{error.strerror or error}", err=True)
        sys.exit(1)
    except _ClickException as error:
        if message := error.format_message().rstrip("."):  # type: ignore[attr-defined] # empty: help was printed
            context = getattr(error, "ctx", None)
            path = name if context is None else context.command_path
            line = PYDANTIC.sub("", " ".join(message.split())).replace(": Input should ", ": must ")
            typer.echo(f"{name}: {line}; see `{path} --help`", err=True)
        sys.exit(2)
