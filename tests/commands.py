"""Commands as processes that start fast: each is forked from one that has imported what they import, which takes longer than most of them.

Whatever a command is to the system is its own all the same: arguments, environment, folder, streams, end and exit code. Tests that kill
commands, or watch them start, start them themselves.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def _python(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what an interpreter reads when it starts."""
    return {name: value for name, value in environment.items() if name.startswith("PYTHON")}


FORKED = _python(os.environ)


@contextmanager
def forking() -> Iterator[socket.socket]:
    """The door to the process that commands are forked from, which ends with the block."""
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", "tests.commands", str(theirs.fileno())]
    with subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()]), ours:
        theirs.close()
        yield ours


def run(
    door: socket.socket,
    module: str,
    arguments: Iterable[object],
    *,
    input: str = "",
    env: Mapping[str, str] | None = None,
    timeout: float = 300,
) -> subprocess.CompletedProcess[str]:
    """Run `python -m module arguments` in /, forked; started anew with another PYTHONPATH, as that may change what is imported."""
    command, environment = [sys.executable, "-m", module, *map(str, arguments)], dict(os.environ if env is None else env)
    if _python(environment) != FORKED:
        return subprocess.run(command, env=environment, input=input, capture_output=True, text=True, timeout=timeout, cwd="/", check=False)
    ours, theirs = socket.socketpair()
    (stdin, write), (read_out, stdout), (read_err, stderr) = os.pipe(), os.pipe(), os.pipe()
    with ours, ThreadPoolExecutor(2) as readers, os.fdopen(read_out) as out, os.fdopen(read_err) as err:
        socket.send_fds(door, [b"."], [theirs.fileno(), stdin, stdout, stderr])
        theirs.close()
        for fd in (stdin, stdout, stderr):
            os.close(fd)
        heard = readers.submit(out.read), readers.submit(err.read)
        ours.sendall(json.dumps([module, command[3:], environment]).encode())
        ours.shutdown(socket.SHUT_WR)
        with suppress(BrokenPipeError), os.fdopen(write, "w") as file:
            file.write(input)
        ours.settimeout(timeout)
        with ours.makefile() as lines:
            pid = int(lines.readline())
            try:
                code = int(lines.readline())
            except TimeoutError:
                os.kill(pid, signal.SIGKILL)
                raise subprocess.TimeoutExpired(command, timeout) from None
        return subprocess.CompletedProcess(command, code, heard[0].result(), heard[1].result())


# What stands for `python -m module` in a folder of programs: hands its streams over, and ends as the command does. Python alone, less what
# it need not load, as it is to start fast.
_PROGRAM = """#!{python} -IS
import os, socket, sys

with socket.socket(socket.AF_UNIX) as asker:
    asker.connect({address!r})
    socket.send_fds(asker, [b"."], [0, 1, 2])
    import json

    asker.sendall(json.dumps([{module!r}, sys.argv[1:], dict(os.environ), os.getcwd()]).encode())
    asker.shutdown(socket.SHUT_WR)
    sys.exit([int(line) for line in asker.makefile()][1])
"""


@contextmanager
def programs(door: socket.socket, folder: Path, modules: Mapping[str, str]) -> Iterator[None]:
    """Programs that run modules, name → module, as `run` does, but in the folder where they are called; for a shell that is tested."""
    folder.mkdir()
    address = f"\0scanfeed-{uuid.uuid4().hex}"  # no file: paths of sockets may not be long
    for name, module in modules.items():
        path = folder / name
        path.write_text(_PROGRAM.format(python=sys.executable, address=address, module=module))
        path.chmod(0o755)

    def let_in(listening: socket.socket) -> None:
        with suppress(OSError):  # closed
            while True:
                asker, _ = listening.accept()
                with asker:
                    _, fds, _, _ = socket.recv_fds(asker, 1, 3)
                    socket.send_fds(door, [b"."], [asker.fileno(), *fds])
                for fd in fds:
                    os.close(fd)

    with ThreadPoolExecutor(1) as porter, socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen()
        porter.submit(let_in, listening)
        try:
            yield
        finally:
            listening.shutdown(socket.SHUT_RDWR)


def _command(door: socket.socket) -> tuple[str, list[str], Mapping[str, str], str]:
    """Fork whenever somebody asks at the door; returns in the command's process."""
    while True:
        asked, fds, _, _ = socket.recv_fds(door, 1, 4)
        if not asked:
            os._exit(0)
        if os.fork() == 0:
            break
        for fd in fds:
            os.close(fd)
    door.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with socket.socket(fileno=fds[0]) as asker:
        module, arguments, environment, *folder = json.load(asker.makefile())
        if pid := os.fork():  # one that waits, as only a parent may
            for fd in fds[1:]:
                os.close(fd)
            asker.sendall(b"%d\n" % pid)
            asker.sendall(b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
            os._exit(0)
    for number, fd in enumerate(fds[1:]):
        os.dup2(fd, number)
        os.close(fd)
    return module, arguments, environment, folder[0] if folder else "/"


if __name__ == "__main__":
    for each in ("catalog.cli", "loaderd.cli", "pydicom.pixels", "scipy.ndimage"):
        importlib.import_module(each)
    del sys.modules["catalog.cli"]  # which is to be __main__
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that wait
    name, sys.argv[1:], environ, place = _command(socket.socket(fileno=int(sys.argv[1])))
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(place)
    sys.path[0] = "/"
    runpy.run_module(name, run_name="__main__", alter_sys=True)
