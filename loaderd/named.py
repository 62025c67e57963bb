"""Named streams: definitions under a name, which trainers and daemons on any host ask for.

Functions of an open connection; the caller owns the transaction.
"""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
from psycopg.types.json import Jsonb

from catalog.errors import CatalogError, UsageError
from loaderd.definitions import LISTS, Definition

Connection = psycopg.Connection[tuple[Any, ...]]
BARE = re.compile("[A-Za-z0-9_-]+")  # a key of TOML without quotes
MENTIONED = 10  # names that an error lists


class Named(NamedTuple):
    """A named stream that is not ended."""

    id: int
    name: str
    created_at: datetime
    sha256: str
    runs: int


def create(conn: Connection, name: str, definition: Definition) -> int:
    """Return the id of the stream of that name, made if there is none.

    Raises:
        UsageError: If the name is none, or that of another definition.
    """
    if not name.isprintable() or not name or name != name.strip():
        raise UsageError(f"stream {name!r}: a name is printable text without blanks around it")
    if any("\0" in text or not _is_unicode(text) for text in _texts(definition.to_json())):
        raise UsageError(f"stream {name!r}: the database cannot keep a NUL or half a character; see its structures, names and where")
    while True:
        made = conn.execute(
            "INSERT INTO stream (name, definition, digest) VALUES (%s, %s, %s) ON CONFLICT (name) WHERE ended_at IS NULL DO NOTHING "
            "RETURNING id",
            [name, Jsonb(definition.to_json()), definition.digest()],
        ).fetchone()
        if made is not None:
            return int(made[0])
        found = _look_up(conn, name)
        if found is not None:  # else it was ended in between
            compare(name, found[1], definition.whole())
            return found[0]


def find(conn: Connection, name: str) -> tuple[int, Definition]:
    """Return (id, definition) of the stream of that name.

    Raises:
        UsageError: If there is none.
    """
    found = _look_up(conn, name)
    if found is None:
        raise _unknown(conn, name)
    return found


def compare(name: str, stored: Definition, given: dict[str, Any]) -> None:
    """Raise UsageError if one of the given fields is not what is stored, showing each such field."""
    wanted = Definition.from_json(
        {**stored.whole(), **{field: list(value) if isinstance(value, tuple) else value for field, value in given.items()}}
    )
    was, now = stored.whole(), wanted.whole()
    differing = [f"{field}: stored {_shown(was[field])}, given {_shown(now[field])}" for field in was if was[field] != now[field]]
    if differing:
        raise UsageError(
            f"stream {name!r} is there already and differs: {'; '.join(differing)}; end it (loaderd stream end {shlex.quote(name)}) or "
            f"choose another name"
        )


def end(conn: Connection, name: str) -> int:
    """End the stream of that name, and return its id: nobody attaches any more, and the name is free again.

    Raises:
        UsageError: If there is none.
    """
    row = conn.execute("UPDATE stream SET ended_at = now() WHERE name = %s AND ended_at IS NULL RETURNING id", [name]).fetchone()
    if row is None:
        raise _unknown(conn, name)
    return int(row[0])


def listed(conn: Connection) -> list[Named]:
    """Return the streams that have a name and are not ended, by name."""
    rows = conn.execute(
        "SELECT s.id, s.name, s.created_at, encode(s.digest, 'hex'), (SELECT count(DISTINCT run_id) FROM attempt WHERE stream_id = s.id) "
        "FROM stream s WHERE s.name IS NOT NULL AND s.ended_at IS NULL ORDER BY s.name"
    ).fetchall()
    return [Named(*row) for row in rows]


def from_toml(path: Path) -> Definition:
    """Return the definition that a TOML file holds; its keys are Definition's fields.

    Raises:
        UsageError: If the file cannot be read or is no definition; the line names the file and the key.
    """
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # bad TOML, or no UTF-8
        raise UsageError(f"{path}: is no TOML: {error}") from error
    fields = Definition.__dataclass_fields__
    if unknown := next((key for key in given if key not in fields), None):
        raise UsageError(f"{path}: {unknown!r} is no field of a stream; there are {', '.join(fields)}")
    kinds = {list: "a list", str: "a text", dict: "a table"}
    for key, kind in (
        *((name, list) for name in LISTS), *((name, str) for name in ("where", "split", "snapshot", "labels")), ("sequences", dict),
    ):  # fmt: skip
        if key in given and not isinstance(given[key], kind):
            raise UsageError(f"{path}: {key}={given[key]!r}: must be {kinds[kind]}")
    try:
        return Definition.from_json(given)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def to_toml(definition: Definition) -> str:
    """Return the definition as TOML that `from_toml` reads; what is None is left out, as TOML has no word for it."""
    return "".join(f"{field} = {_shown(value)}\n" for field, value in definition.to_json().items() if value is not None)


def _look_up(conn: Connection, name: str) -> tuple[int, Definition] | None:
    row = conn.execute("SELECT id, definition FROM stream WHERE name = %s AND ended_at IS NULL", [name]).fetchone()
    if row is None:
        return None
    try:
        return int(row[0]), Definition.from_json(row[1])
    except UsageError as error:
        remedy = f"use the scanfeed that made it, or end it (loaderd stream end {shlex.quote(name)})"
        raise CatalogError(f"stream {name!r}: what the database keeps is no definition to this version: {error}; {remedy}") from error


def _unknown(conn: Connection, name: str) -> UsageError:
    rows = conn.execute(
        "SELECT name FROM stream WHERE name IS NOT NULL AND ended_at IS NULL ORDER BY name LIMIT %s", [MENTIONED + 1]
    ).fetchall()
    names = ", ".join(str(row[0]) for row in rows[:MENTIONED]) + (", …" if len(rows) > MENTIONED else "")
    others = f"; there are {names}" if rows else ", nor any other"
    return UsageError(f"there is no stream {name!r}{others}; see `loaderd stream create`")


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return (
            "{"
            + ", ".join(f"{key if BARE.fullmatch(key) else _shown(key)} = {_shown(one)}" for key, one in value.items() if one is not None)
            + "}"
        )
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_shown, value)) + "]"
    # JSON of a text, number or truth value is TOML too, but for DEL.
    return "nothing" if value is None else json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _texts(value: Any) -> Iterator[str]:
    """Yield every text that a definition holds."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for one in value.items() if isinstance(value, dict) else value:
            yield from _texts(one)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes from the command line that are no UTF-8
        return False
    return True
