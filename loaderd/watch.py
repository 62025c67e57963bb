"""The thread that listens to the database for what cannot wait until the next epoch: revocations, and streams that are ended."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import psycopg

from catalog.database import Database
from catalog.errors import DatabaseError

LOOK_S = 1.0  # how often it looks whether it is to end
RETRY_S = 0.5  # after the connection was lost


class Watch:
    """Calls `seen` from its thread with what is revoked (sample ids) and which streams were ended: at first, and after each change."""

    def __init__(self, database: Database, seen: Callable[[set[int], set[int]], None]) -> None:
        self._database, self._seen = database, seen
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        """Begin; returns once what is revoked now was seen, so that nobody is fed before."""
        ready = threading.Event()
        self._ready = ready
        self._thread.start()
        ready.wait(10)

    def close(self) -> None:
        """End soon; what it sees from now on is not of interest."""
        self._closing.set()

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                with self._database.connect(autocommit=True, application_name="loaderd watch") as conn:
                    self._listen(conn)
            except (psycopg.Error, DatabaseError):
                # Whatever was revoked meanwhile is looked up when the connection is back.
                self._closing.wait(RETRY_S)

    def _listen(self, conn: psycopg.Connection[tuple[Any, ...]]) -> None:
        conn.execute("LISTEN scanfeed")
        while not self._closing.is_set():
            revoked = {sample for (sample,) in conn.execute("SELECT sample_id FROM revoked_image")}
            ended = {stream for (stream,) in conn.execute("SELECT id FROM stream WHERE ended_at IS NOT NULL")}
            if self._closing.is_set():
                return
            self._seen(revoked, ended)
            self._ready.set()
            while not self._closing.is_set() and not list(conn.notifies(timeout=LOOK_S, stop_after=1)):
                pass
