"""psql, or another program of PostgreSQL, on the catalog: that of the wheel, else of PATH. No password ever stands on its command line."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from typing import Any

from psycopg import pq
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from catalog import embedded
from catalog.database import SQL_TIMEOUT_S, Database
from catalog.errors import CatalogError

SECRETS = ("password", "sslpassword")


def run(database: Database, command: Sequence[str] = (), *, owner: bool = False) -> int:
    """Run psql until it ends, and return its exit code; a shell's 128 + signal if it was killed.

    What it starts itself (`\\! pg_dump`) finds the same database: the place is in libpq's variables (PGHOST, …), too.

    Args:
        command: A program to run in its place, with its arguments.
        owner: With all rights; else under the login that cannot write.

    Raises:
        CatalogError: If there is no psql, or no such program.
    """
    parts: dict[str, Any] = dict(conninfo_to_dict(database.conninfo))
    if not owner:
        parts.update(database.reading_login())
        # A role that was made by hand has no settings of its own.
        reading = f"-c default_transaction_read_only=on -c statement_timeout={SQL_TIMEOUT_S}s"
        parts["options"] = " ".join(part for part in (parts.get("options") or os.environ.get("PGOPTIONS", ""), reading) if part)
    parts["application_name"] = "catalog db shell"
    environment = {**os.environ, "PATH": _path(database)}
    if database.server is not None:
        # libpq takes these before the variables that say where our own server is.
        for name in ("PGSERVICE", "PGHOSTADDR"):
            environment.pop(name, None)
        # A long folder's socket is named by a descriptor of this process, which another one does not have.
        parts["host"] = str(parts["host"]).replace("/proc/self/", f"/proc/{os.getpid()}/")
    said = make_conninfo(**{name: value for name, value in parts.items() if name not in SECRETS})
    if not command:
        psql = _psql()
        if psql is None:
            raise CatalogError(f"db shell: there is no psql on PATH; install PostgreSQL's client, or connect another one with: {said}")
        command = (psql, said)
    for option in pq.Conninfo.get_defaults():
        if option.envvar and (value := parts.get(option.keyword.decode())):
            environment[option.envvar.decode()] = str(value)
    # Ctrl-C is for psql, which takes it as: stop this statement.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        code = subprocess.run(command, env=environment, check=False, preexec_fn=_take_interrupts).returncode
    except OSError as error:
        raise CatalogError(f"db shell: {command[0]}: {error.strerror}") from None
    finally:
        signal.signal(signal.SIGINT, before)
    return code if code >= 0 else 128 - code


def _take_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _psql() -> str | None:
    # Ours first: a psql that is older than the server does not know all of its catalogs.
    try:
        ours = embedded.wheel_binaries() / "psql"
    except CatalogError:
        return shutil.which("psql")
    return str(ours) if ours.exists() else shutil.which("psql")


def _path(database: Database) -> str:
    """Return PATH with the wheel's programs: first for our own server, than which a pg_dump must not be older; last for any other."""
    path = os.environ.get("PATH", os.defpath)
    try:
        ours = str(embedded.wheel_binaries())
    except CatalogError:
        return path
    return os.pathsep.join([ours, path] if database.server else [path, ours])
