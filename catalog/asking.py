"""SQL that a user gave, run under the login that cannot write, and its rows as a table, CSV, JSON or Parquet."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import Any

import psycopg

from catalog.database import SQL_TIMEOUT_S, Database, explain
from catalog.errors import CatalogError, UsageError
from catalog.output import plain, print_json, print_table


class Format(StrEnum):
    """How rows are written."""

    TABLE = "table"
    CSV = "csv"
    JSON = "json"
    PARQUET = "parquet"


@dataclass(frozen=True, slots=True)
class Answer:
    """Rows with the names of their columns."""

    names: list[str]
    rows: Sequence[tuple[Any, ...]]


def ask(database: Database, statement: str, *, timeout_s: float = SQL_TIMEOUT_S) -> Answer:
    """Return what one statement gives.

    Raises:
        CatalogError: If PostgreSQL refuses it, does not understand it, or stops it after `timeout_s`.
    """
    with database.read_only(timeout_s=timeout_s) as conn, conn.cursor() as cursor:
        try:
            # Prepared: the extended protocol carries one statement, so nothing can follow the first.
            cursor.execute(statement.encode(), prepare=True)
            return Answer([column.name for column in cursor.description or ()], cursor.fetchall() if cursor.description else [])
        except UnicodeEncodeError:
            raise UsageError("sql: the statement is not UTF-8") from None
        except (psycopg.errors.InsufficientPrivilege, psycopg.errors.ReadOnlySqlTransaction) as error:
            raise CatalogError(f"sql: refused: {error.diag.message_primary}; this login can only read") from error
        except psycopg.OperationalError as error:
            raise explain(error, database) from error
        except psycopg.Error as error:
            raise CatalogError(f"sql: {error.diag.message_primary or str(error).splitlines()[0]}") from error


def write(answer: Answer, form: Format, output: Path | None) -> None:
    """Write rows to a file, or to standard output if there is none.

    Raises:
        UsageError: If Parquet has no file to go to, or needs pyarrow.
        CatalogError: If a column cannot be written so.
    """
    if form == Format.PARQUET:
        if output is None:
            raise UsageError("--format parquet: needs -o FILE; it is no text")
        write_parquet(answer, output)
    elif output is None:
        _print(answer, form)
    else:
        _replace(output, lambda part: _print_into(answer, form, part))


def write_parquet(answer: Answer, output: Path) -> None:
    """Write rows as Parquet: numbers, times, texts and arrays by their kind, what Parquet has no kind for as text."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UsageError("--format parquet: needs pyarrow; pip install 'scanfeed[parquet]'") from None
    if twice := sorted({name for name in answer.names if answer.names.count(name) > 1}):
        raise UsageError(f"--format parquet: two columns are named {twice[0]}; give one another name with AS")
    arrays = [_array(pyarrow, [row[place] for row in answer.rows]) for place in range(len(answer.names))]
    table = pyarrow.table(dict(zip(answer.names, arrays, strict=True)))
    _replace(output, lambda part: pyarrow.parquet.write_table(table, part))


def _array(pyarrow: Any, values: list[Any]) -> Any:
    if all(value is None for value in values):
        return pyarrow.array(values, pyarrow.string())
    if any(isinstance(value, dict) for value in values):
        return pyarrow.array([None if value is None else json.dumps(value) for value in values], pyarrow.string())
    if all(value is None or (isinstance(value, Decimal) and value == value.to_integral_value()) for value in values):
        values = [None if value is None else int(value) for value in values]  # sum of bigint
    try:
        return pyarrow.array(values)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, pyarrow.ArrowNotImplementedError, OverflowError):
        return pyarrow.array([None if value is None else str(plain(value)) for value in values], pyarrow.string())


def _print(answer: Answer, form: Format) -> None:
    if form == Format.JSON:
        print_json([dict(zip(answer.names, map(plain, row), strict=True)) for row in answer.rows])
    elif form == Format.CSV:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(answer.names)
        writer.writerows([["" if value is None else plain(value) for value in row] for row in answer.rows])
    else:
        print_table(answer.names, [["" if value is None else str(plain(value)) for value in row] for row in answer.rows])


def _print_into(answer: Answer, form: Format, path: Path) -> None:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        _print(answer, form)
    path.write_text(said.getvalue(), "utf-8")


def _replace(output: Path, write_to: Callable[[Path], None]) -> None:
    """Write a file whole or not at all."""
    if output.exists() and not output.is_file():  # a pipe
        write_to(output)
        return
    part = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        write_to(part)
        part.replace(output)
    finally:
        part.unlink(missing_ok=True)
