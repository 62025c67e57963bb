"""psql on the catalog: that of the embedded server's binaries, else the one on PATH. No password ever stands on its command line."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from typing import Any

from psycopg.conninfo import conninfo_to_dict, make_conninfo

from catalog import embedded
from catalog.database import SQL_TIMEOUT_S, Database
from catalog.errors import CatalogError

SECRETS = ("password", "sslpassword")


def run(database: Database, *, owner: bool = False) -> int:
    """Run psql until it ends, and return its exit code.

    Args:
        owner: With all rights; else under the login that cannot write.

    Raises:
        CatalogError: If there is no psql.
    """
    parts: dict[str, Any] = dict(conninfo_to_dict(database.conninfo))
    if not owner:
        parts.update(database.reading_login())
        # A role that was made by hand has no settings of its own.
        reading = f"-c default_transaction_read_only=on -c statement_timeout={SQL_TIMEOUT_S}s"
        parts["options"] = " ".join(part for part in (parts.get("options") or os.environ.get("PGOPTIONS", ""), reading) if part)
    parts["application_name"] = "catalog db shell"
    said = make_conninfo(**{name: value for name, value in parts.items() if name not in SECRETS})
    psql = _psql()
    if psql is None:
        raise CatalogError(f"db shell: there is no psql on PATH; install PostgreSQL's client, or connect another one with: {said}")
    environment = dict(os.environ)
    if parts.get("password"):
        environment["PGPASSWORD"] = str(parts["password"])
    # Ctrl-C is for psql, which takes it as: stop this statement.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return subprocess.run([psql, said], env=environment, check=False, preexec_fn=_take_interrupts).returncode
    finally:
        signal.signal(signal.SIGINT, before)


def _take_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _psql() -> str | None:
    # Ours first: a psql that is older than the server does not know all of its catalogs.
    try:
        ours = embedded.wheel_binaries() / "psql"
    except CatalogError:
        return shutil.which("psql")
    return str(ours) if ours.exists() else shutil.which("psql")
