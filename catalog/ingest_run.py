"""What an ingest says of itself: its row of ``ingest_run``, and the errors that it and earlier ones found and that still stand."""

from __future__ import annotations

import socket
from typing import Any

import psycopg

from catalog import __version__
from catalog.layouts import Found
from catalog.pseudonyms import Pseudonyms
from catalog.reading import Hashing

LAST_RUN = "SELECT id, state FROM ingest_run WHERE root_id = %s ORDER BY id DESC LIMIT 1"

# What ingests found and what is still so, whenever it was found; what is wrong with the tree itself comes from the tree.
# As of a run, what is wrong in the same words with several annotations of a file is one error.
STANDING = """
SELECT f.path, 'read' AS stage, split_part(g.detail, ': ', 1) AS code, substring(g.detail FROM position(': ' IN g.detail) + 2) AS message
FROM flag g JOIN file f ON f.id = g.file_id
WHERE f.root_id = %(root)s AND g.state = 'open' AND g.severity = 'error' AND g.raised_by = 'ingest'
UNION
SELECT f.path, CASE split_part(g.rule, '-', 1) WHEN 'PAIR' THEN 'pair' WHEN 'MASK' THEN 'mask' ELSE 'read' END, lower(g.rule), g.detail
FROM flag g LEFT JOIN pairing p ON p.id = g.pairing_id
JOIN annotation a ON a.id = coalesce(g.annotation_id, p.annotation_id) JOIN file f ON f.id = a.file_id
WHERE f.root_id = %(root)s AND g.state = 'open' AND g.severity = 'error' AND g.raised_by = 'ingest'
UNION
SELECT f.path, 'read', lower(g.rule), g.detail
FROM flag g JOIN location l ON l.image_id = g.image_id AND l.preferred JOIN file f ON f.id = l.file_id
WHERE f.root_id = %(root)s AND g.state = 'open' AND g.severity = 'error' AND g.raised_by = 'ingest'
ORDER BY 1, 2, 3, 4
"""


class Run:
    """The row of ``ingest_run``, written only once there is something to say."""

    def __init__(
        self,
        conn: psycopg.Connection[Any],
        root_id: int,
        layout: str,
        found: Found,
        hashing: Hashing,
        url: str,
        names: Pseudonyms | None,
    ) -> None:
        self.conn, self.root_id, self.layout, self.hashing = conn, root_id, layout, hashing
        self.url, self.names = url, names  # the root's folder as the catalog has it
        self.files_seen = len(found.images) + len(found.annotations)
        self.problems = sorted({(problem.path, problem.code, problem.message) for problem in found.problems})
        self.files_read = self.fell_back = self.moved = 0
        self.unreadable: dict[str, str] = {}  # path → what was found when it was last tried
        self.known: set[str] = set()  # paths of files to read that have a row
        self._id: int | None = None
        self._noted: set[tuple[str, str, str, str]] = set()

    @property
    def actor(self) -> str:
        """Who decides pairings in this run."""
        return f"layout:{self.layout}"

    @property
    def id(self) -> int:
        """The row's id; inserts the row at the first call."""
        if self._id is None:
            # Only one ingest of a root runs at a time, so a row that still says running was killed.
            self.conn.execute("UPDATE ingest_run SET state = 'interrupted' WHERE root_id = %s AND state = 'running'", [self.root_id])
            row = self.conn.execute(
                "INSERT INTO ingest_run (root_id, layout, program_version, host, files_seen, hash) VALUES (%s, %s, %s, %s, %s, %s) "
                "RETURNING id",
                [self.root_id, self.layout, __version__, socket.gethostname(), self.files_seen, self.hashing],
            ).fetchone()
            assert row is not None
            self._id = int(row[0])
            for path, code, message in self.problems:
                self.refuse(path, "find", code, message)
        return self._id

    def last_differs(self) -> bool:
        """Was the last run cut short, or is something else wrong with the tree than then?"""
        last = self.conn.execute(LAST_RUN, [self.root_id]).fetchone()
        if last is None or last[1] != "finished":
            return last is not None or bool(self.problems)
        rows = self.conn.execute("SELECT path, code, message FROM ingest_error WHERE stage = 'find' AND ingest_run_id = %s", [last[0]])
        return self.problems != sorted(rows.fetchall())

    def refuse(self, path: str, stage: str, code: str, message: str) -> None:
        """Note an error, once a run; it becomes durable with the caller's transaction."""
        if (path, stage, code, message) not in self._noted:
            self.conn.execute(
                "INSERT INTO ingest_error (ingest_run_id, path, stage, code, message) VALUES (%s, %s, %s, %s, %s)",
                [self.id, path, stage, code, message],
            )
            self._noted.add((path, stage, code, message))

    def note_standing(self) -> int:
        """Return how many errors stand. A run that has a row lists them all, also those that an earlier one found."""
        standing = [
            *self.conn.execute(STANDING, {"root": self.root_id}),
            *((path, "find", code, text) for path, code, text in self.problems),
        ]
        if self._id is not None:
            for error in standing:
                self.refuse(*error)
        return len(standing)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self.conn.closed:
            return
        self.conn.rollback()  # of what was being written when an error came; a finished ingest has committed
        if self._id is None:
            return
        state = "finished" if kind is None else "interrupted" if kind is KeyboardInterrupt else "failed"
        self.conn.execute(
            "UPDATE ingest_run SET state = %s, finished_at = now(), files_read = %s, errors = %s, fell_back = %s WHERE id = %s",
            [state, self.files_read, len(self._noted), self.fell_back, self._id],
        )
        self.conn.commit()
