"""PostgreSQL away under a stream: what its threads were carrying out waits, and is carried out again.

While one waits its queue fills, and what was fetched before is fed on. A command must be one that can be carried out a second time:
nobody knows whether the first was committed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import psycopg

from catalog.database import Database, explain
from catalog.errors import CatalogError, DatabaseError
from loaderd.events import Event, Failed

OUTAGE_S = 300  # how long PostgreSQL may be out of reach until a stream ends
LEAVE_S = 10  # the same while the trainer is gone already
RETRY_S = 0.2

Command = Callable[[], Event | None]


class Outages:
    """What a stream's threads know of their database being away; each calls `carry_out` for its own commands.

    Attributes:
        since: When it was lost, by the monotonic clock; None while it is in reach. The loop reads it, too.
        given_up: It is away for good.
    """

    def __init__(self, database: Database, peer: int, leaving: threading.Event, say: Callable[..., None]) -> None:
        """`peer` is the trainer's pid, for the log; `leaving` is set once it is gone."""
        self.since: float | None = None
        self.given_up = False
        self._database, self._peer, self._leaving, self._say = database, peer, leaving, say

    def carry_out(self, command: Command, regain: Callable[[], None] | None) -> Event | None:
        """Carry out one command and return what came of it: a `Failed` for whatever went wrong, None if it was broken off.

        If PostgreSQL goes away under it, `regain` connects anew and the command is carried out again; None: such a command fails.
        """
        lost: float | None = None
        while True:
            try:
                if lost is not None and regain is not None:
                    self._wait(lost, regain)
                return command()
            except (psycopg.Error, DatabaseError) as error:
                if self._leaving.is_set() and isinstance(error, psycopg.errors.QueryCanceled):
                    return None  # broken off, since nobody needs it
                if gone(error) and regain is not None:
                    lost = lost or time.monotonic()
                    continue
                return Failed(explain(error, self._database) if isinstance(error, psycopg.Error) else error)
            except CatalogError as error:
                return Failed(error)
            except Exception as error:  # a bug of ours must not leave a trainer waiting for ever
                return Failed(CatalogError(f"{type(error).__name__}: {error}; this is a bug in scanfeed"))

    def _wait(self, lost: float, regain: Callable[[], None]) -> None:
        """Try to connect anew until PostgreSQL is back.

        Raises:
            CatalogError: If it is away for too long, or `regain` finds that the stream cannot go on.
        """
        if self.since is None:
            self._say("PostgreSQL is out of reach; what is reserved is fed, the rest waits", peer=self._peer)
        self.since = self.since or lost
        while True:
            try:
                regain()
                if self.since is not None:  # else another thread was back first, and said so
                    self._say("PostgreSQL is back", peer=self._peer, after_s=f"{time.monotonic() - lost:.2f}")
                self.since = None
                return
            except (psycopg.Error, DatabaseError) as error:
                if not gone(error):
                    raise
                away = time.monotonic() - lost
                if away > (LEAVE_S if self._leaving.is_set() else OUTAGE_S):
                    self.given_up = True
                    raise CatalogError(
                        f"{self._database.name}: out of reach for {away:.0f} s, so no more can be fed; "
                        f"open a new Feed with this one's state when it is back"
                    ) from error
                time.sleep(RETRY_S)


def gone(error: psycopg.Error | DatabaseError) -> bool:
    """Is this the end of the connection or the server, and not of the statement?"""
    if isinstance(error, DatabaseError):
        return True
    if not isinstance(error, psycopg.OperationalError | psycopg.InterfaceError) or isinstance(error, psycopg.errors.QueryCanceled):
        return False
    return error.sqlstate is None or error.sqlstate[:2] in ("57", "08")
