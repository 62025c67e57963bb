"""Is a snapshot still what was frozen, and how do two of them differ?

What a snapshot holds stands in rows that the database keeps from changing, and in files that it cannot. `verify` computes the digests from
the rows as they are now, looks at each file, and compares the pixels of those that look different with the hash in the catalog.
"""

# ruff: noqa: S608  statements are put together from constants; values are parameters

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import psycopg
from psycopg.rows import class_row

from catalog import measuring, remote, snapshots
from catalog.database import Database
from catalog.errors import CatalogError, FileError
from catalog.flags import transaction
from catalog.measuring import Item
from catalog.processes import Progress
from catalog.statistics import pixel_hash_of
from catalog.workers import mapped

FILES_AT_ONCE = 16  # looked at: a network storage answers late, and many at a time
IMAGES_PER_PAGE = 65_536

# Samples whose digest, or that of something drawn on them, is not the one that was frozen; not those that were erased.
CHANGED = f"""
WITH drawn AS (
    SELECT f.number, f.structure, f.sha256 AS frozen, {snapshots.MASK_SHA256} AS sha256
    FROM snapshot_mask f LEFT JOIN ({snapshots.DRAWN_OF}) ON p.id = f.pairing_id WHERE f.snapshot_id = %(snapshot)s
), d AS (
    SELECT number, {snapshots.MASKS} AS masks, bool_or(sha256 IS DISTINCT FROM frozen) AS differ FROM drawn GROUP BY 1
)
SELECT k.number FROM snapshot_sample k JOIN image i ON i.id = k.image_id LEFT JOIN d ON d.number = k.number
WHERE k.snapshot_id = %(snapshot)s AND (d.differ OR {snapshots.SAMPLE_SHA256} IS DISTINCT FROM k.sha256) ORDER BY k.number
"""
KEPT = f"""
SELECT count(*), count(*) FILTER (WHERE erasure_id IS NOT NULL), {snapshots.WHOLE_SHA256} FROM snapshot_sample WHERE snapshot_id = %s
"""
NUMBERED = "SELECT number, image_id FROM snapshot_sample WHERE snapshot_id = %s AND number = ANY(%s)"
# By file, so that one with many images is looked at once.
PAGE = f"""
SELECT i.id, coalesce(f.id, 0), coalesce(f.root_id, 0), pl.url, pl.path, coalesce(f.size, 0), coalesce(f.mtime_ns, 0),
       coalesce(f.format, ''), coalesce(l.coding, ''), i.frame, i.rows, i.columns, i.samples_per_pixel, i.slope, i.intercept,
       i.modality_lut, l.byte_offset, l.byte_length, l.dtype, l.bits_stored, true, i.pixel_hash
FROM snapshot_sample k JOIN image i ON i.id = k.image_id LEFT JOIN location l ON l.image_id = i.id AND l.preferred
LEFT JOIN file f ON f.id = l.file_id LEFT JOIN place pl ON pl.file_id = f.id
WHERE k.snapshot_id = %(snapshot)s AND (coalesce(f.id, 0), i.id) > (%(file)s, %(image)s)
ORDER BY coalesce(f.id, 0), i.id LIMIT {IMAGES_PER_PAGE}
"""

# An erased sample has no image: it is the same as one of the other side that has the same digest.
SIDE = """
SELECT number, coalesce(image_id, 0) AS image, CASE WHEN image_id IS NULL THEN sha256 ELSE '' END AS erased,
       CASE WHEN image_id IS NULL THEN row_number() OVER (PARTITION BY image_id, sha256 ORDER BY number) END AS copy, part, fold, sha256
FROM snapshot_sample WHERE snapshot_id = %({})s
"""
DRAWN_ON = "SELECT w.bn, m.structure, m.sha256 FROM differing w JOIN snapshot_mask m ON (m.snapshot_id, m.number) = (%({})s, w.{})"
DIFFERENCES = f"""
WITH a AS ({SIDE.format("a")}), b AS ({SIDE.format("b")}), differing AS (
    SELECT a.number AS an, b.number AS bn, nullif(coalesce(a.image, b.image), 0) AS sample_id,
           a.number IS NOT NULL AND b.number IS NOT NULL AND (a.part, a.fold) IS DISTINCT FROM (b.part, b.fold) AS moved
    FROM a FULL JOIN b ON (a.image, a.erased, coalesce(a.copy, 0)) = (b.image, b.erased, coalesce(b.copy, 0))
    WHERE a.sha256 IS DISTINCT FROM b.sha256
), drawn AS (
    SELECT bn, array_agg(structure || CASE WHEN o.sha256 IS NULL THEN ' added' WHEN m.sha256 IS NULL THEN ' removed' ELSE ' changed' END
                         ORDER BY structure COLLATE "C") AS what
    FROM ({DRAWN_ON.format("a", "an")} WHERE w.bn IS NOT NULL) o
    FULL JOIN ({DRAWN_ON.format("b", "bn")} WHERE w.an IS NOT NULL) m USING (bn, structure)
    WHERE o.sha256 IS DISTINCT FROM m.sha256 GROUP BY 1
)
SELECT w.sample_id, CASE WHEN an IS NULL THEN 'added' WHEN w.bn IS NULL THEN 'removed' ELSE 'changed' END AS change,
       CASE WHEN an IS NULL OR w.bn IS NULL THEN '{{}}' WHEN NOT moved AND d.what IS NULL THEN '{{image}}'
            ELSE CASE WHEN moved THEN '{{part}}' ELSE '{{}}' END::text[] || coalesce(d.what, '{{}}') END AS what
FROM differing w LEFT JOIN drawn d ON d.bn = w.bn ORDER BY change, sample_id, an, w.bn
"""


@dataclass(frozen=True, slots=True)
class Difference:
    """A sample that two snapshots do not have alike."""

    sample_id: int | None  # None: its patient was erased
    change: str  # added, removed or changed
    what: list[str]  # of a changed one: part, image (pixels, size, rescale), or a structure that was added, removed or changed


@dataclass(slots=True)
class Diff:
    """How the second of two snapshots differs from the first."""

    equal: bool
    sha256: list[str]  # of the two, hex
    samples: list[Difference] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """Return how many samples were added, removed and changed, and of the changed ones in what."""
        found = dict.fromkeys(("added", "removed", "changed"), 0)
        for one in self.samples:
            for key in (one.change, *one.what):
                found[key] = found.get(key, 0) + 1
        return found


class Problem(NamedTuple):
    """A sample that is not what was frozen, or of which nobody can say."""

    sample_id: int
    code: str  # differs: by the catalog's rows; missing, changed or a code of FileError: by its file
    message: str


@dataclass(slots=True)
class Verified:
    """What `verify` found."""

    name: str
    sha256: str
    samples: int = 0
    erased: int = 0  # whose patient was erased: of them the digests alone are left
    whole: bool = True  # the digests of its samples make up the snapshot's
    looked_at: int = 0  # images whose file was found, and in size and time as catalogued
    read: int = 0  # images whose pixels were compared
    problems: list[Problem] = field(default_factory=list)

    @property
    def well(self) -> bool:
        """Is all that was not erased as it was frozen?"""
        return self.whole and not self.problems


def diff(database: Database, first: str, second: str) -> Diff:
    """Return how two snapshots differ, sample by sample.

    Raises:
        UsageError: If there is no such snapshot.
    """
    with transaction(database) as conn:
        (a, sha256), (b, other) = snapshots.found(conn, first), snapshots.found(conn, second)
        made = Diff(sha256 == other, [sha256, other])
        if not made.equal:
            with conn.cursor(row_factory=class_row(Difference)) as cursor:
                made.samples = cursor.execute(DIFFERENCES.encode(), {"a": a, "b": b}).fetchall()
    return made


def changed(conn: psycopg.Connection[Any], snapshot_id: int) -> list[int]:
    """Return the numbers of samples that, by the catalog's rows now, are not what was frozen. Reads no file."""
    return [number for (number,) in conn.execute(CHANGED.encode(), {"snapshot": snapshot_id}).fetchall()]


def verify(
    database: Database,
    name: str,
    *,
    full: bool = False,
    jobs: int | None = None,
    progress: Progress = lambda done, total: None,
) -> Verified:
    """Compare a snapshot with the catalog's rows and with the files.

    Args:
        full: Compare all pixels, not those alone whose file has another size or time than was catalogued.
        jobs: Processes that read pixels; by default one a core.
        progress: Called with (images done, images).

    Raises:
        UsageError: If there is no such snapshot.
        CatalogError: If the catalog is pseudonymized, and who asks may not know where its files lie.
    """
    with transaction(database) as conn:
        snapshot_id, sha256 = snapshots.found(conn, name)
        done = Verified(name, sha256)
        if conn.execute("SELECT may FROM privileged").fetchone() != (True,) and conn.execute("SELECT FROM pseudonymization").fetchone():
            raise CatalogError(f"snapshot {name!r}: the catalog is pseudonymized, and this login may not know where its files lie")
        kept = conn.execute(KEPT.encode(), [snapshot_id]).fetchone()
        assert kept is not None
        done.samples, done.erased, digest = kept
        done.whole = digest.hex() == sha256
        numbers = changed(conn, snapshot_id)
        for _, image_id in conn.execute(NUMBERED, [snapshot_id, numbers]).fetchall():
            done.problems.append(Problem(image_id, "differs", "its rows in the catalog are not what was frozen"))
        with ThreadPoolExecutor(FILES_AT_ONCE) as threads:
            for page in _pages(conn, snapshot_id):
                before = done.looked_at
                _look(page, done, full, jobs, threads, lambda read, total: progress(before + read, done.samples - done.erased))  # noqa: B023
                progress(done.looked_at, done.samples - done.erased)
    done.problems.sort()
    return done


Image = tuple[Item, bytes]


def _pages(conn: psycopg.Connection[Any], snapshot_id: int) -> Iterator[list[Image]]:
    after = {"file": -1, "image": 0}
    while rows := conn.execute(PAGE.encode(), {"snapshot": snapshot_id, **after}).fetchall():
        conn.commit()  # reading files may take hours
        page = [(Item._make(row[:-1]), row[-1]) for row in rows]
        yield page
        after = {"file": page[-1][0].file_id, "image": page[-1][0].image_id}


def _look(page: list[Image], done: Verified, full: bool, jobs: int | None, threads: ThreadPoolExecutor, progress: Progress) -> None:
    """Look at the files of some images, and compare the pixels of those that look different."""
    files = {item.file_id: item for item, _ in page if item.path is not None}
    states = dict(zip(files, threads.map(_state, files.values()), strict=True))
    to_read: list[Image] = []
    for item, pixel_hash in page:
        state = states.get(item.file_id, _GONE)
        if isinstance(state, Problem):
            done.problems.append(state._replace(sample_id=item.image_id))
        elif full or state != (item.size, item.mtime_ns):
            to_read.append((item._replace(size=state[0], mtime_ns=state[1]), pixel_hash))
    done.looked_at += len(page)
    done.read += len(to_read)
    if to_read:
        done.problems += filter(None, mapped(compared, to_read, died=_died, jobs=jobs, progress=progress))


_MISSING = Problem(0, "missing", "its file is not there; bring it back, then run `catalog ingest` on its root again")
# An ingest since saw that its file is gone, or is there and holds something else.
_GONE = Problem(
    0, "missing", "no file of the catalog holds its pixels any more; bring back the one that was frozen, then run `catalog ingest`"
)
# An ingest would take in what the file holds now, and the sample would have no file at all. Of these codes `measuring` says to ingest.
_BROUGHT_BACK = {"changed": "its pixels are others; bring the file back as it was",
                 "truncated": "there are fewer pixels than were frozen; bring the file back as it was"}  # fmt: skip


def _state(item: Item) -> tuple[int, int] | Problem:
    """Return size and time of a file as they are now."""
    try:
        if remote.is_url(item.root):
            system, folder = remote.opened(item.root)
            info = system.info(f"{folder}/{item.path}")
            return int(info.get("size") or 0), remote.version(info)
        status = os.stat(f"{item.root}/{item.path}")  # noqa: PTH116
        return status.st_size, status.st_mtime_ns
    except (FileNotFoundError, NotADirectoryError):
        return _MISSING
    except Exception as error:  # each storage has its own
        said = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
        return Problem(0, "no-access", f"its file cannot be looked at ({said}); give read access, or try again later")


def compared(images: Sequence[Image]) -> list[Problem | None]:
    """Return for each image what is wrong with its pixels. Runs in a process of its own."""
    return [_compared(item, pixel_hash) for item, pixel_hash in images]


def _compared(item: Item, pixel_hash: bytes) -> Problem | None:
    try:
        if pixel_hash_of(measuring.stored_values(item)) == pixel_hash:
            return None
        code, message = "changed", _BROUGHT_BACK["changed"]
    except FileError as error:
        code, message = error.code, _BROUGHT_BACK.get(error.code, str(error))
    except OSError as error:
        return Problem(item.image_id, "unreadable", f"{error.strerror} while its pixels were read")
    except CatalogError:
        raise  # a setting of this machine that cannot be right
    except Exception as error:  # the text could hold a value of its header
        return Problem(item.image_id, "unreadable", f"decoding it failed with {type(error).__name__}")
    if code in _BROUGHT_BACK and _elsewhere_in_file(item, pixel_hash):
        message = "its pixels lie at another place of its file; run `catalog ingest` on its root again"
    return Problem(item.image_id, code, message)


def _elsewhere_in_file(item: Item, pixel_hash: bytes) -> bool:
    """Does the file hold the pixels that were frozen, behind a header of another length?"""
    if item.format != "dicom" or item.dtype is None:  # others were decoded, or have no such header
        return False
    try:
        return pixel_hash_of(measuring.stored_values(item._replace(dtype=None))) == pixel_hash
    except Exception:  # it was cut off, or a decoder has a bug: what is wrong is known already
        return False


def _died(image: Image) -> Problem:
    return Problem(image[0].image_id, "reader-died", "the process that decoded it died; look at it with another program")
