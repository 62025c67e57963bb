"""Which PostgreSQL, and the doors to it.

Without a URL the catalog lives in an embedded server under ``CATALOG_HOME`` (`embedded.py`); with ``--database`` or
``CATALOG_DATABASE_URL`` in any server from version 15 on. `open_database` brings the schema up where that is safe and refuses
a schema that is newer than this program.

There are two doors. `Database.connect` is the owner's. `Database.read_only` logs in as a role that has no right to write: SQL
given by users comes through that one alone. A session that is merely *set* read-only is not enough, since ``commit; set …``
undoes it.

SQLAlchemy and Alembic are imported inside functions: the trainer's side finds its daemon through this module and must not load
them (0.25 s).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq import TransactionStatus

from catalog import embedded
from catalog.errors import CatalogError, DatabaseError, DriftError, UsageError

if TYPE_CHECKING:
    from sqlalchemy import Engine

SCHEMA_VERSION = "0008"  # the newest revision under migrations/versions; a test holds them equal
OLDEST_SERVER = 15  # NULLS NOT DISTINCT (unique rows with missing values) came with 15
SQL_TIMEOUT_S = 60
EMBEDDED_DATABASE = "catalog"
# A client host that died or lost its net holds its locks until the server notices: by default after more than two hours.
KEEPALIVE = "-c tcp_keepalives_idle=30 -c tcp_keepalives_interval=10 -c tcp_keepalives_count=3"

# May who asks change anything, by rights that it has or by a role that it may become?
MAY_WRITE = """
SELECT coalesce(bool_or(r.rolsuper OR has_table_privilege(r.oid, c.oid, 'INSERT, DELETE, TRUNCATE')
                        OR has_any_column_privilege(r.oid, c.oid, 'INSERT, UPDATE')), true)
FROM pg_roles r CROSS JOIN pg_class c
WHERE pg_has_role(r.oid, 'MEMBER') AND c.relkind IN ('r', 'v', 'p', 'f', 'm')
  AND c.relnamespace NOT IN ('pg_catalog'::regnamespace, 'information_schema'::regnamespace)
"""

_Connection = TypeVar("_Connection", bound=psycopg.Connection[Any])


class _Reading(psycopg.Connection[tuple[Any, ...]]):
    """A connection that keeps nothing: before 16, PostgreSQL lets everybody make large objects, even where it is read-only."""

    def commit(self) -> None:
        self.rollback()

    def rollback(self) -> None:
        if self.info.transaction_status == TransactionStatus.ACTIVE:  # in the middle of a COPY, which psycopg was not asked for
            self.close()
        else:
            super().rollback()


@dataclass
class Database:
    """One catalog's database. Holds the embedded server, if that is the one, until `close`."""

    conninfo: str
    server: embedded.Server | None = None
    _engine: Engine | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """Where it is, without a password: for messages."""
        if self.server is not None:
            return f"the embedded database in {self.server.home}"
        parts = conninfo_to_dict(self.conninfo)
        place = parts.get("host") or parts.get("hostaddr") or "local socket"
        return f"database {parts.get('dbname') or parts.get('user') or ''!r} at {place}:{parts.get('port') or 5432}"

    def connect(self, *, autocommit: bool = False, **parameters: Any) -> psycopg.Connection[tuple[Any, ...]]:
        """Return a new connection with the owner's rights; the caller closes it.

        An embedded server that died meanwhile is started again. `options` add to those of the URL and win over them.

        Raises:
            DatabaseError: If the server is out of reach or refuses.
        """
        try:
            return self._dial(psycopg.connect, autocommit=autocommit, **parameters)
        except psycopg.OperationalError as error:
            raise self._out_of_reach(error) from error

    def read_only(self, *, timeout_s: float = SQL_TIMEOUT_S) -> psycopg.Connection[tuple[Any, ...]]:
        """Return a new connection without write rights, for SQL that a user gave; each statement has `timeout_s`.

        Raises:
            DatabaseError: If the server is out of reach, or does not let that login in.
        """
        login = self.reading_login()
        options = f"-c statement_timeout={int(timeout_s * 1000)} -c default_transaction_read_only=on"
        try:
            return self._dial(_Reading.connect, **login, options=options, application_name="catalog sql")
        except psycopg.OperationalError as error:
            as_whom = f"the login {login['user']}" if login else "this login"
            raise DatabaseError(
                f"{self.name}: does not let {as_whom} in, under which SQL from users runs: {_first_line(error)}; "
                f"give it a line in pg_hba.conf (scram-sha-256)"
            ) from error

    def reading_login(self) -> dict[str, str]:
        """Return user and password of the login for SQL from users, made if need be; empty: the login in use cannot write anyway.

        Raises:
            DatabaseError: If the server is out of reach, or there is no such login and none can be made.
        """
        with self.connect() as conn:
            try:
                # A restored dump has the row without the role, a role made by hand has no rights yet.
                login = conn.execute(
                    "SELECT l.role, l.password FROM sql_login l JOIN pg_roles r ON r.rolname = l.role "
                    "WHERE has_table_privilege(r.oid, 'revoked_image'::regclass, 'SELECT')"
                ).fetchone() or make_sql_login(conn)
            except psycopg.errors.InsufficientPrivilege as error:
                conn.rollback()
                if conn.execute(MAY_WRITE).fetchone() == (False,):
                    return {}
                raise DatabaseError(
                    f"{self.name}: this login may neither read table sql_login, which names the login for SQL from users, nor make one; "
                    f"let the catalog's owner run `catalog db roles`, and be a member of one of these roles"
                ) from error
        return {"user": login[0], "password": login[1]}

    def engine(self) -> Engine:
        """Return the SQLAlchemy engine over the owner's door, made once."""
        if self._engine is None:
            from sqlalchemy import create_engine
            from sqlalchemy.pool import NullPool

            self._engine = create_engine("postgresql+psycopg://", creator=self.connect, poolclass=NullPool)
        return self._engine

    def identity(self) -> str:
        """Return 16 hex digits that name this database, its server and its schema: the daemon's socket carries them."""
        with self.connect() as conn:
            row = conn.execute(
                "SELECT (SELECT system_identifier FROM pg_control_system())::text, current_database()::text, current_schema()::text"
            ).fetchone()
        return hashlib.sha256("\0".join(str(part) for part in row or ()).encode()).hexdigest()[:16]

    def close(self) -> None:
        """Give up the embedded server; it ends when its last user has."""
        if self._engine is not None:
            self._engine.dispose()
        if self.server is not None:
            self.server.close()

    def __enter__(self) -> Database:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _dial(self, connect: Callable[..., _Connection], *, options: str = "", **parameters: Any) -> _Connection:
        url = str(conninfo_to_dict(self.conninfo).get("options") or os.environ.get("PGOPTIONS", ""))
        options = " ".join(part for part in ("" if self.server else KEEPALIVE, url, options) if part)
        deadline = time.monotonic() + embedded.START_SECONDS
        answers = self.server is None
        while True:
            try:
                return connect(self.conninfo, options=options, **parameters)
            except psycopg.OperationalError:
                # A server that answers and is asked once more may have died in between; after that it is there and refuses.
                if answers or self.server is None or time.monotonic() > deadline:
                    raise
                answers = self.server.start()

    def _out_of_reach(self, error: psycopg.Error) -> DatabaseError:
        remedy = "see postgresql.log there" if self.server else "is it running? see --database and CATALOG_DATABASE_URL"
        return DatabaseError(f"{self.name}: out of reach: {_first_line(error)}; {remedy}")


def open_database(url: str | None = None, *, home: Path | None = None, migrate: bool = True) -> Database:
    """Return the catalog's database, its schema made or brought up.

    A fresh database and an embedded one are migrated. Another server's older schema is not touched behind its owner's back:
    `catalog init` does that.

    Raises:
        UsageError: If the URL is none.
        DatabaseError: If the server is out of reach, too old, or refuses.
        DriftError: If the schema is newer than this program, or older on a server that is not embedded.
    """
    url = url or os.environ.get("CATALOG_DATABASE_URL")
    database = _external(url) if url else _embedded(home or embedded.default_home())
    try:
        if migrate:
            _bring_up(database, force=database.server is not None)
    except BaseException:
        database.close()
        raise
    return database


def upgrade(database: Database) -> str | None:
    """Run the migrations that are missing, under an advisory lock. Returns the version before, None for a fresh database."""
    before = schema_version(database)
    _bring_up(database, force=True)
    return before


def schema_version(database: Database) -> str | None:
    """Return the schema's version, or None where there is none yet."""
    with database.connect() as conn:
        server = conn.info.server_version // 10000
        if server < OLDEST_SERVER:
            raise DatabaseError(f"{database.name}: PostgreSQL {server} is too old; {OLDEST_SERVER} or newer is needed")
        if conn.execute("SELECT to_regclass('alembic_version')").fetchone() == (None,):
            return None
        row = conn.execute("SELECT version_num FROM alembic_version").fetchone()
        return None if row is None else str(row[0])


def _embedded(home: Path) -> Database:
    server = embedded.use(home)
    try:
        conninfo = make_conninfo(host=server.host, port=server.port, user=server.user)
        with Database(make_conninfo(conninfo, dbname="postgres"), server).connect(autocommit=True) as conn:
            if conn.execute("SELECT 1 FROM pg_database WHERE datname = %s", [EMBEDDED_DATABASE]).fetchone() is None:
                # Another process may be first.
                with contextlib.suppress(psycopg.errors.DuplicateDatabase, psycopg.errors.UniqueViolation):
                    conn.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(EMBEDDED_DATABASE)))
        return Database(make_conninfo(conninfo, dbname=EMBEDDED_DATABASE), server)
    except psycopg.Error as error:
        server.close()
        raise DatabaseError(f"the embedded database in {home}: {_first_line(error)}; see postgresql.log there") from error
    except BaseException:
        server.close()
        raise


def _external(url: str) -> Database:
    scheme = url.partition(":")[0]
    if scheme.split("+")[0] not in ("postgresql", "postgres"):
        known = f"scheme {scheme!r}" if "://" in url else "what was given"  # which may be a password in the wrong place
        raise UsageError(f"database URL: {known} is not postgresql://; only PostgreSQL is supported")
    unreadable = UsageError(
        "database URL: cannot be read; in a user's name and password, @ is written %40, : is %3A, / is %2F and % is %25"
    )
    if "@" in url.partition("://")[2].partition("/")[2].partition("?")[0]:  # half of a password with a slash in it
        raise unreadable
    try:
        return Database(make_conninfo("postgresql" + url[len(scheme) :], application_name="scanfeed"))
    except psycopg.ProgrammingError as error:
        # libpq quotes what it did not understand: not if that may be of the password.
        said = _first_line(error)
        hidden = any(part in url.rpartition("@")[0] for part in said.split('"')[1::2])
        raise unreadable if hidden else UsageError(f"database URL: {said}") from None


def _bring_up(database: Database, *, force: bool) -> None:
    version = schema_version(database)
    if version == SCHEMA_VERSION:
        return
    if version is not None and version > SCHEMA_VERSION:
        raise DriftError(
            f"{database.name}: its schema is version {version}, this program knows {SCHEMA_VERSION}; "
            f"install a newer scanfeed (pip install --upgrade scanfeed)"
        )
    if version is not None and not force:
        raise DriftError(f"{database.name}: its schema is version {version}, this program needs {SCHEMA_VERSION}; run `catalog init`")
    _migrate(database)


def _migrate(database: Database) -> None:
    from alembic import command
    from alembic.config import Config
    from sqlalchemy.exc import DBAPIError

    from catalog import roles

    here = Path(__file__).parent
    # Inside the package once installed, beside it in a checkout.
    folder = next(path for path in (here / "migrations", here.parent / "migrations") if (path / "env.py").exists())
    config = Config()
    config.set_main_option("script_location", str(folder).replace("%", "%%"))
    try:
        with database.engine().begin() as conn:
            config.attributes["connection"] = conn
            command.upgrade(config, "head")
        with database.connect() as conn:
            make_sql_login(conn)
            roles.renew(conn)
    except DBAPIError as error:
        raise explain(error.orig if isinstance(error.orig, psycopg.Error) else psycopg.Error(str(error)), database) from error
    except psycopg.Error as error:
        raise explain(error, database) from error


def make_sql_login(conn: psycopg.Connection[tuple[Any, ...]]) -> tuple[str, str]:
    """Make the login for SQL that users give, or mend it, and return (role, password).

    Roles belong to the whole server, so its name is drawn once per catalog and kept in ``sql_login``.
    """
    conn.execute("SELECT pg_advisory_xact_lock(hashtext('sql_login'))")
    found = conn.execute("SELECT role, password FROM sql_login").fetchone()
    role, password = found or (f"scanfeed_sql_{secrets.token_hex(4)}", secrets.token_urlsafe(24))
    if found is None:
        conn.execute("INSERT INTO sql_login (role, password) VALUES (%s, %s)", [role, password])
    name = sql.Identifier(role)
    schema = sql.Identifier(str((conn.execute("SELECT current_schema()").fetchone() or ("public",))[0]))
    try:
        if conn.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", [role]).fetchone() is None:
            with conn.transaction():
                conn.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(name, sql.Literal(password)))
                conn.execute(sql.SQL("ALTER ROLE {} SET default_transaction_read_only = on").format(name))
                conn.execute(sql.SQL("ALTER ROLE {} SET statement_timeout = {}").format(name, sql.Literal(f"{SQL_TIMEOUT_S}s")))
    except psycopg.errors.InsufficientPrivilege as error:
        conn.commit()  # the name and password that the remedy speaks of
        raise DatabaseError(
            "the catalog's owner may not create roles, and SQL from users must run under a login without write rights; "
            f"let a superuser run: CREATE ROLE {role} LOGIN PASSWORD '(the one in table sql_login)', or grant CREATEROLE"
        ) from error
    conn.execute(sql.SQL("GRANT USAGE ON SCHEMA {} TO {}").format(schema, name))
    conn.execute(sql.SQL("GRANT SELECT ON ALL TABLES IN SCHEMA {} TO {}").format(schema, name))
    conn.execute(sql.SQL("REVOKE ALL ON sql_login FROM {}").format(name))
    conn.commit()
    return role, password


def private_schema(conn: psycopg.Connection[Any]) -> str:
    """Return the schema, quoted, that says where the files of a pseudonymized catalog lie: beside the catalog's own."""
    query = "SELECT quote_ident(CASE current_schema() WHEN 'public' THEN 'private' ELSE current_schema() || '_private' END)"
    return str((conn.execute(query).fetchone() or ("private",))[0])


def explain(error: psycopg.Error, database: Database) -> CatalogError:
    """Return what PostgreSQL said as one line with a remedy."""
    if isinstance(error, psycopg.errors.DiskFull):
        return DatabaseError(f"{database.name}: the disk is full: {_first_line(error)}; free some space, then run the same command again")
    if isinstance(error, psycopg.errors.QueryCanceled):
        return CatalogError(f"{database.name}: the statement took too long and was stopped; narrow it down")
    if isinstance(error, psycopg.OperationalError) and error.sqlstate in (None, "57P01", "57P02", "57P03", "08006", "08003"):
        return DatabaseError(f"{database.name}: went away: {_first_line(error)}; run the same command again when it is back")
    return CatalogError(f"{database.name}: {_first_line(error)}")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
