"""One PostgreSQL a session (embedded, a container or a URL), one migrated template, and a database of its own for each test.

`database_url` is for tests in which another process must see what was committed; everything real: no mocked database, no mocked socket.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import LiteralString

import hypothesis
import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from catalog import database, embedded, ingest, synthetic
from tests import commands
from tests.processes import server_ended, wait_until

REPOSITORY = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("SCANFEED_DATA", REPOSITORY.parent / "shared" / "data"))
IMAGE = os.environ.get("POSTGRES_IMAGE", "postgres:17")

# Two shared cores: how long an example takes says nothing.
hypothesis.settings.register_profile("scanfeed", max_examples=60, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("scanfeed")

# A shell that runs the suite in the background has it ignore Ctrl-C, and so would every process that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Files whose tests take over 20 s, the longest first.
LONG = [f"test_{name}" for name in (
    "private", "readme", "ingest", "access", "planted", "export", "faults", "feed", "pseudonyms", "ranks", "crashes", "coverage",
    "embedded", "fed_sets", "ingest_errors", "ingest_scale", "isolation", "top", "flags", "qa", "runs", "splits", "snapshots",
    "rules_series", "million",
)]  # fmt: skip

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--postgres", default="embedded", help="embedded, container (testcontainers) or a superuser's postgresql:// URL")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first: processes take files in this order, and one that starts last keeps the others waiting."""
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test sees the user's catalog, daemon or runtime folder."""
    monkeypatch.setenv("CATALOG_HOME", str(tmp_path / "home"))
    for name in ("CATALOG_DATABASE_URL", "XDG_RUNTIME_DIR", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def server_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """URL of a superuser's door to a server, up to and without the database's name."""
    chosen = request.config.getoption("--postgres")
    if chosen == "container":
        try:
            from testcontainers.community.postgres import PostgresContainer
        except ImportError:  # before 4.15
            from testcontainers.postgres import PostgresContainer

        made = PostgresContainer(IMAGE, username="postgres", password=uuid.uuid4().hex, dbname="postgres", driver=None)
        # In memory: hundreds of databases are made and dropped.
        with made.with_env("PGDATA", "/data/postgresql").with_tmpfs_mount("/data") as container:
            _hurry(container.get_connection_url())
            yield container.get_connection_url()
    elif chosen == "embedded":
        # Not in pytest's folder, which only its user may enter: as root the server runs as another.
        home = Path(tempfile.mkdtemp(prefix="scanfeed-test-"))
        with embedded.use(home) as server:
            url = f"postgresql://{server.user}@/postgres?host={server.host}&port={server.port}"
            _hurry(url)
            yield url
        assert server_ended(home)
        shutil.rmtree(home)
    else:
        yield chosen


@pytest.fixture(scope="session")
def template(server_url: str) -> Iterator[str]:
    """Name of a migrated database to copy."""
    name = f"template_{uuid.uuid4().hex[:8]}"
    _create(server_url, name, "template1")
    with database.open_database(_named(server_url, name)) as made, made.connect() as conn:
        login = conn.execute("SELECT role FROM sql_login").fetchone()
    yield name
    _drop(server_url, name)
    with psycopg.connect(server_url, autocommit=True) as conn:
        assert login is not None
        conn.execute(sql.SQL("DROP ROLE IF EXISTS {}").format(sql.Identifier(login[0])))


@pytest.fixture(scope="session")
def full_template(server_url: str, template: str, studies: Path) -> Iterator[str]:
    """Name of a database with the synthetic studies, to copy."""
    name = f"full_{uuid.uuid4().hex[:8]}"
    _create(server_url, name, template)
    with database.open_database(_named(server_url, name)) as made:
        ingest.ingest(made, studies, jobs=1)
    yield name
    _drop(server_url, name)


@pytest.fixture
def new_database(server_url: str, template: str) -> Iterator[Callable[..., str]]:
    """Make another migrated, empty database, or a copy of another one; returns its URL."""
    made: list[str] = []

    def make(source: str = template) -> str:
        made.append(f"test_{uuid.uuid4().hex[:8]}")
        _create(server_url, made[-1], source)
        return _named(server_url, made[-1])

    yield make
    _drop(server_url, *made)


@pytest.fixture
def database_url(request: pytest.FixtureRequest, new_database: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> str:
    """URL of a migrated database, which is also what `catalog` and `loaderd` use without --database; empty, except for `ingested`."""
    url = new_database(request.getfixturevalue("full_template")) if "ingested" in request.fixturenames else new_database()
    monkeypatch.setenv("CATALOG_DATABASE_URL", url)
    return url


@pytest.fixture
def conn(database_url: str) -> Iterator[psycopg.Connection]:
    """An autocommitting connection of the owner."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        yield connection


@pytest.fixture(scope="session")
def _forking() -> Iterator[socket.socket]:
    with commands.forking() as door:
        yield door


@pytest.fixture
def catalog(_forking: socket.socket) -> Run:
    """Run `catalog` as a process."""
    return lambda *arguments, **options: commands.run(_forking, "catalog.cli", arguments, **options)


@pytest.fixture
def loaderd(_forking: socket.socket) -> Run:
    """Run `loaderd` as a process."""
    return lambda *arguments, **options: commands.run(_forking, "loaderd", arguments, **options)


@pytest.fixture(scope="session")
def studies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three synthetic studies of 64×64 px: not to be changed; copy what a test changes."""
    folder = tmp_path_factory.mktemp("studies")
    synthetic.write_studies(folder, patients=3, slices=4, phases=4, size=64, seed=1)
    return folder


@pytest.fixture
def ingested(database_url: str) -> str:
    """URL of a database with the synthetic studies."""
    return database_url


@pytest.fixture(scope="session")
def sunnybrook() -> Path:
    """The two real studies; skips where they are not."""
    folder = DATA / "sunnybrook" / "final_data"
    if not folder.is_dir():
        pytest.skip(f"the real studies are not in {folder}; set SCANFEED_DATA")
    return folder


def _hurry(server_url: str) -> None:
    """Have a server that is made for the tests not wait for the disk: no power failure is tested, and a test's own database costs half.

    Nor clean up by itself: when it comes to it a table's xmax and statistics change, which tests take for something that was written.
    """
    with psycopg.connect(server_url, autocommit=True) as conn:
        conn.execute("ALTER SYSTEM SET fsync = off")
        conn.execute("ALTER SYSTEM SET autovacuum = off")
        conn.execute("SELECT pg_reload_conf()")


def _create(server_url: str, name: str, template: str) -> None:
    # By copying files: through the log, which is the default, dropping it again takes five times as long.
    _patiently(server_url, "CREATE DATABASE {} TEMPLATE {} STRATEGY file_copy", name, template)


def _drop(server_url: str, *names: str) -> None:
    for name in names:
        _patiently(server_url, "DROP DATABASE IF EXISTS {} WITH (FORCE)", name)


def _patiently(server_url: str, statement: LiteralString, *names: str) -> None:
    """Make or drop a database: PostgreSQL gives who is connected to it five seconds to end, which a busy machine may not keep."""

    def done() -> bool:
        try:
            conn.execute(sql.SQL(statement).format(*map(sql.Identifier, names)))
        except psycopg.errors.ObjectInUse:
            return False
        return True

    with psycopg.connect(server_url, autocommit=True) as conn:
        assert wait_until(done), f"{names[-1]} is still in use"


def _named(server_url: str, name: str) -> str:
    parts = conninfo_to_dict(server_url)
    host, port, user, password = (str(parts.get(key) or "") for key in ("host", "port", "user", "password"))
    secret = f":{password}" if password else ""
    if host.startswith("/"):
        return f"postgresql://{user}{secret}@/{name}?host={host}&port={port}"
    return f"postgresql://{user}{secret}@{host}:{port}/{name}"
