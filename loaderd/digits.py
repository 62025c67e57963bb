"""The catalog's images of digits, as one array: all images with a label from 0 to 9, whatever data set they came with.

Numbers from 0 to 9 may be something else, such as a BI-RADS category: where labels of several names are such numbers, one must be chosen.

Which images show a 7 is asked of the database, so that flags, revocations and corrected labels count; the pixels are read by offset.
What was read is kept in the user's cache (`catalog.cache`), under a name that says which state of the catalog it is of: after any change
of the catalog there is no entry, and none can be stale. Processes that open the same entry share its memory.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import psycopg
from numpy.typing import NDArray
from psycopg import sql

from catalog import cache as cached
from catalog.database import Database, explain, open_database
from catalog.errors import CatalogError, FileError, UsageError
from catalog.selection import DRAWN, checked, conditions
from loaderd.sequences import Sequencer

FORMAT = 1  # of what is kept in the cache
RUN = 1 << 24  # bytes read at a time
DIGITS = tuple("0123456789")
IMAGES = """
SELECT s.sample_id, s.structure, s.label, s.rows, s.columns, uuid_send(s.sample_key), l.file_id, l.byte_offset,
       l.dtype IN ('|u1', 'u1') AND l.byte_length = s.rows * s.columns AND i.slope = 1 AND i.intercept = 0 AND NOT i.modality_lut
           AND coalesce(l.bits_stored, 8) = 8
FROM (SELECT sample_id, sample_key, structure, label, rows, columns FROM sample WHERE kind = 'label' AND label = ANY(%(digits)s) AND {}) s
JOIN image i ON i.id = s.sample_id JOIN location l ON l.image_id = s.sample_id AND l.preferred
ORDER BY s.sample_key
"""
FILES = """
SELECT f.id, pl.url, pl.path, f.size, f.mtime_ns, (SELECT l.coding FROM location l WHERE l.file_id = f.id LIMIT 1)
FROM file f JOIN place pl ON pl.file_id = f.id WHERE f.id = ANY(%(files)s) ORDER BY f.id
"""


@dataclass(frozen=True, eq=False)
class Digits:
    """Images of digits, ordered by sample_key; read-only.

    Attributes:
        images: uint8 (N, rows, columns), as stored: ink bright on 0.
        labels: uint8 (N,), 0 to 9.
        sample_ids: int64 (N,).
        sample_keys: uint8 (N, 16).
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    sample_ids: NDArray[np.int64]
    sample_keys: NDArray[np.uint8]
    _sequencers: dict[str, Sequencer] = field(default_factory=dict, repr=False)

    def sequencer(self, options: Mapping[str, Any]) -> Sequencer:
        """Return what composes sequences with these options (`loaderd.sequences.checked`), made once; not for several threads."""
        name = repr(options)  # as written: their one form takes longer than a picture
        if name not in self._sequencers:
            while len(self._sequencers) >= 32:  # somebody asks for each width once
                del self._sequencers[next(iter(self._sequencers))]
            self._sequencers[name] = Sequencer(options, self.images, self.labels, self.sample_ids)
        return self._sequencers[name]

    def places(self, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return where in the arrays these samples are; -1: nowhere."""
        order = np.argsort(self.sample_ids)
        found = order[np.minimum(np.searchsorted(self.sample_ids, sample_ids, sorter=order), len(order) - 1)]
        return np.where(self.sample_ids[found] == sample_ids, found, -1)


@cache
def once(database: str | None, labels: str | None) -> Digits:
    """Return the digits of the catalog at a URL (None: as everywhere), read by this process once."""
    with open_database(database) as db:
        return load(db, labels=labels)


def load(database: Database, where: str | None = None, *, labels: str | None = None) -> Digits:
    """Return the digits of a catalog that feeds would feed: not revoked, no open error, an accepted label from 0 to 9.

    Args:
        where: A user's SQL condition over the view ``sample``; it runs under the login that cannot write.
        labels: The name of the labels that are digits; None if the catalog has labels from 0 to 9 of one name only.

    Raises:
        UsageError: If there is none, their labels are of several names, they are of several sizes or no plain 8-bit images, or the
            condition is none.
        FileError: If a file is not the one that was catalogued, or cannot be read.
        DatabaseError: If the database is out of reach.
    """
    try:
        with database.connect() as conn:
            state = conn.execute(
                "SELECT (SELECT count(*) FROM catalog_change), (SELECT oid FROM pg_database WHERE datname = current_database())"
            ).fetchone()
        key = hashlib.sha256("\0".join(map(repr, (FORMAT, database.identity(), state, where, labels))).encode()).hexdigest()

        def make(out: BinaryIO) -> None:
            _write(out, _read(database, where, labels))

        try:
            fd = cached.default_cache().get(key, make)
        except FileError as error:
            if not error.code.startswith("cache-"):
                raise
            return _read(database, where, labels)[0]  # as slow as the first time, each time
        try:
            return _mapped(fd)
        finally:
            os.close(fd)
    except psycopg.Error as error:
        raise explain(error, database) from error


def _read(database: Database, where: str | None, labels: str | None) -> tuple[Digits, list[list[Any]]]:
    """Return the digits, and the files that they were read from."""
    found, parameters = conditions(of_structures=True, origins=DRAWN)
    if labels is not None:
        found.append(sql.SQL("structure = %(labels)s"))
    with database.read_only() as reading:
        found += checked(reading, where, "sample")
        query = sql.SQL(IMAGES).format(sql.SQL(" AND ").join(found))
        reading.execute("SET LOCAL work_mem = '64MB'")
        reading.execute("SET LOCAL enable_nestloop = off")  # of 60,000 rows 150 are expected: 1.9 s, and 1.2 without
        rows = reading.execute(query, {**parameters, "digits": list(DIGITS), "labels": labels}, binary=True).fetchall()
    if not rows:
        raise UsageError(
            f"the catalog has no image with a label {'' if labels is None else f'{labels!r} '}from 0 to 9"
            + (f" for which {where!r} holds" if where else "" if labels else "; take MNIST's files in: `catalog ingest FOLDER`")
        )
    numbers, structures, shown, heights, widths, keys, file_ids, offsets, plain = zip(*rows, strict=True)
    if len(names := sorted(set(structures))) > 1:
        listed = ", ".join(map(repr, names[:5])) + ", …" * (len(names) > 5)
        raise UsageError(
            f"digits: labels of {len(names)} names are numbers from 0 to 9 ({listed}); choose one by labels={names[0]!r} (--labels), "
            f'or by where="structure = {sql.Literal(names[0]).as_string()}"'
        )
    shapes = set(zip(heights, widths, strict=True))
    if len(shapes) > 1:
        listed = ", ".join(f"{height}×{width}" for height, width in sorted(shapes))
        raise UsageError(f'digits: images of several sizes have labels from 0 to 9 ({listed}); choose, such as where="rows = 28"')
    if not all(plain):
        raise UsageError(
            f"digits: {len(rows) - sum(map(bool, plain))} of {len(rows)} images are no plain 8-bit values in a file, and only such are "
            "composed; leave them out by where="
        )
    with database.connect() as conn:
        files = [list(row) for row in conn.execute(FILES, {"files": sorted(set(file_ids))})]
    [(height, width)] = shapes
    in_file, at = np.array(file_ids), np.array(offsets)
    images = np.empty((len(rows), height, width), np.uint8)
    for file_id, *file in files:
        some = np.flatnonzero(in_file == file_id)
        some = some[np.argsort(at[some])]
        images[some] = _pixels(file, at[some], height * width).reshape(-1, height, width)
    found_keys = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 16)
    return Digits(images, np.array(list(map(int, shown)), np.uint8), np.array(numbers), found_keys), [file for _, *file in files]


def _pixels(file: list[Any], offsets: NDArray[np.int64], length: int) -> NDArray[np.uint8]:
    """Return frames of one file, by their ascending offsets: (n, length). What lies side by side is read at once."""
    fd = _open(file)
    try:
        found = np.empty((len(offsets), length), np.uint8)
        runs = np.flatnonzero(np.diff(offsets, prepend=offsets[0] - 2 * length) != length)
        for first, end in zip(runs.tolist(), [*runs[1:].tolist(), len(offsets)], strict=True):
            run = found[first:end].reshape(-1)
            for at in range(0, len(run), RUN):
                piece = run[at : at + RUN]
                if os.preadv(fd, [piece.data], int(offsets[first]) + at) != len(piece):
                    raise FileError(
                        "truncated", f"{file[1]}: is shorter than when it was catalogued; run `catalog ingest` on its root again"
                    )
        return found
    finally:
        os.close(fd)


def _open(file: list[Any]) -> int:
    """Return a descriptor of a file as it was catalogued, or of what it decompresses to."""
    url, name, size, mtime_ns, coding = file
    if url is None:
        raise CatalogError("this login may not know where files lie, which are to be read; ask the catalog's owner")
    try:
        if "://" in url:
            from catalog import remote

            return remote.fetched(url, name, size, mtime_ns, coding)
        path = Path(url, name)
        if coding:
            return cached.decompressed(path, coding, size, mtime_ns)
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileError as error:
        raise FileError(error.code, f"{name}: {error}") from None
    except OSError as error:
        raise FileError("unreadable", f"{name}: cannot be read: {error.strerror}") from None
    status = os.fstat(fd)
    if (status.st_size, status.st_mtime_ns) != (size, mtime_ns):
        os.close(fd)
        raise FileError("changed", f"{name}: is not what was catalogued; run `catalog ingest` on its root again")
    return fd


def _write(out: BinaryIO, found: tuple[Digits, list[list[Any]]]) -> None:
    """Write an entry: the length of its head, the head as JSON, and the arrays."""
    digits, files = found
    head = json.dumps({"shape": digits.images.shape, "files": files}).encode()
    out.write(len(head).to_bytes(8, "little") + head)
    for part in (digits.sample_ids, digits.sample_keys, digits.labels, digits.images):
        out.write(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)


def _mapped(fd: int) -> Digits:
    """Return what an entry holds, as views on its mapping, if the files are still those that it was read from."""
    data = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
    length = int.from_bytes(data[:8], "little")
    head = json.loads(data[8 : 8 + length])
    for file in head["files"]:
        if "://" not in file[0]:
            os.close(_open([*file[:4], ""]))
    count, height, width = head["shape"]
    at = 8 + length
    ids = np.frombuffer(data[at : at + 8 * count], np.int64)  # a copy: the mapping's bytes are not aligned
    keys = np.frombuffer(data, np.uint8, 16 * count, at + 8 * count).reshape(-1, 16)
    labels = np.frombuffer(data, np.uint8, count, at + 24 * count)
    images = np.frombuffer(data, np.uint8, count * height * width, at + 25 * count).reshape(count, height, width)
    return Digits(images, labels, ids, keys)
