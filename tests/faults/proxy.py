"""A door to a PostgreSQL that can be slammed: `proxy.py FOLDER HOST PORT` listens in FOLDER as a server of port 5432 does."""

from __future__ import annotations

import socket
import sys
import threading


def carry(source: socket.socket, target: socket.socket) -> None:
    """Carry bytes until either end hangs up."""
    try:
        while data := source.recv(1 << 16):
            target.sendall(data)
    except OSError:
        pass
    for end in (source, target):
        end.close()


def dial(host: str, port: str) -> socket.socket:
    """Connect as libpq does: a host that begins with a slash is a folder."""
    if not host.startswith("/"):
        return socket.create_connection((host, int(port)))
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(f"{host}/.s.PGSQL.{port}")
    return sock


def main() -> None:
    """Serve until killed."""
    folder, host, port = sys.argv[1:]
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(f"{folder}/.s.PGSQL.5432")
    listening.listen(64)
    print("listening", flush=True)  # noqa: T201
    while True:
        client, _ = listening.accept()
        server = dial(host, port)
        for ends in ((client, server), (server, client)):
            threading.Thread(target=carry, args=ends, daemon=True).start()


if __name__ == "__main__":
    main()
