"""Alembic's entry: runs migrations on the connection that `catalog.database` hands over, or on the configured database."""

import contextlib
from collections.abc import Iterator

from alembic import context
from sqlalchemy import Connection, text

from catalog import database
from catalog.tables import metadata

# One number for this program's migrations on any server: two that start at once run one after the other.
LOCK = 0x5CA9FEED


@contextlib.contextmanager
def connection() -> Iterator[Connection]:
    given = context.config.attributes.get("connection")
    if given is not None:
        yield given
        return
    with database.open_database(migrate=False) as db, db.engine().connect() as conn, conn.begin():
        yield conn


with connection() as conn:
    # A migration that waits for a lock makes everyone behind it wait too.
    conn.execute(text("SET LOCAL lock_timeout = '30s'"))
    conn.execute(text(f"SELECT pg_advisory_xact_lock({LOCK})"))
    context.configure(connection=conn, target_metadata=metadata, transactional_ddl=True)
    with context.begin_transaction():
        context.run_migrations()
