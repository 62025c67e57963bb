"""What the commands of `loaderd` share beside `catalog.output`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from catalog.database import Database

Structures = Annotated[list[str] | None, typer.Option(help="A structure whose masks are fed; again for more.", show_default=False)]
Where = Annotated[str | None, typer.Option(help="SQL condition over the view sample.", show_default=False)]


@contextlib.contextmanager
def opened(url: str | None) -> Iterator[Database]:
    """Have a database open; what PostgreSQL refuses is said in a line."""
    import psycopg

    from catalog.database import explain, open_database

    with open_database(url) as db:
        try:
            yield db
        except psycopg.Error as error:
            raise explain(error, db) from error


def count(number: int, noun: str) -> str:
    """Return no run, 1 run, 2 runs."""
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"


def print_rows(rows: list[dict[str, Any]], columns: dict[str, str], nothing: str) -> None:
    """Print rows as a table, their columns under these names; or that there is nothing."""
    from catalog.output import print_table

    if not rows:
        typer.echo(nothing)
        return
    print_table(list(columns.values()), [[cell(row[name]) for name in columns] for row in rows])


def cell(value: Any) -> str:
    """Return a value as one cell."""
    if isinstance(value, list):
        return " ".join(map(cell, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else f"{value:%Y-%m-%d %H:%M}" if hasattr(value, "isoformat") else str(value)
