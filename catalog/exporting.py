"""`catalog export`: a snapshot's images and masks as one HDF5 file, or as tar shards for webdataset.

What is written is decided before the first byte: which samples (not erased, not revoked), in the order of their numbers, and where each
lies. It stands in the **manifest**, beside what was asked for and the snapshot's digest. While an export is unfinished its name ends in
``.part`` (the HDF5 file, or the shards' manifest.json); it is renamed when all is written. Whatever ends it, the same command goes on: rows
and shards that are whole are not made again, and the bytes are the same as if nothing had happened. Another snapshot, or other options,
are refused there.

One file with contiguous datasets, not one a shard with virtual datasets over them: h5py reads images from it in random order faster, and
other programs may map it.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor, Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psycopg
from psycopg import sql

from catalog import __version__, selection, shards
from catalog.database import Database, explain
from catalog.destinations import File, Folder, Numbers, Plan
from catalog.errors import CatalogError, DriftError, UsageError
from catalog.measuring import Item
from catalog.processes import Progress, processes
from catalog.shards import Drawn, Names, Problem, Sample
from catalog.snapshots import DRAWN_OF, MASK_SHA256, MASKS, SAMPLE_SHA256

Form = Literal["hdf5", "webdataset"]
DTYPES = ("float16", "float32", "float64")  # as of a Feed
FORMAT = "scanfeed export 1"
SHARD_BYTES = 256 << 20  # of a tar, about, unless it is said how many samples
TASKS_AT_ONCE = 16
SUFFIXES = (".h5", ".hdf5")

# Patients are numbered by their first sample, over all of the snapshot: the parts' exports call them the same.
PLAN = """
SELECT number, rows, columns, samples_per_pixel, dense_rank() OVER (ORDER BY first) - 1, revoked, part, fold FROM (
    SELECT k.number, i.rows, i.columns, i.samples_per_pixel, k.part, k.fold, min(k.number) OVER (PARTITION BY st.patient_id) AS first,
           k.image_id IN (SELECT sample_id FROM revoked_image) AS revoked
    FROM snapshot_sample k JOIN image i ON i.id = k.image_id JOIN instance n ON n.id = i.instance_id
    JOIN series se ON se.id = n.series_id JOIN study st ON st.id = se.study_id WHERE k.snapshot_id = %(snapshot)s
) AS k
"""
ERASED = "SELECT count(*) FROM snapshot_sample WHERE snapshot_id = %(snapshot)s AND erasure_id IS NOT NULL"
PARTS = "SELECT DISTINCT part FROM snapshot_sample WHERE snapshot_id = %(snapshot)s AND part IS NOT NULL ORDER BY 1"
DRAWN_ON = """
FROM snapshot_mask k JOIN pairing p ON p.id = k.pairing_id JOIN annotation a ON a.id = p.annotation_id
LEFT JOIN mask m ON m.pairing_id = p.id WHERE k.snapshot_id = %(snapshot)s
"""
NAMED = f"SELECT DISTINCT k.structure, CASE a.kind WHEN 'label' THEN a.label END {DRAWN_ON}"
# Whether rows are still those that were frozen is asked where they are read: no second pass, and nothing can change in between.
IMAGES = f"""
SELECT k.number, k.sample_key::text, k.part, k.fold, i.pixel_hash, i.id, f.id, f.root_id, pl.url, pl.path, f.size, f.mtime_ns, f.format,
       l.coding, i.frame, i.rows, i.columns, i.samples_per_pixel, i.slope, i.intercept, i.modality_lut, l.byte_offset, l.byte_length,
       l.dtype, l.bits_stored, false, {SAMPLE_SHA256} = k.sha256
FROM snapshot_sample k JOIN image i ON i.id = k.image_id LEFT JOIN location l ON l.image_id = i.id AND l.preferred
LEFT JOIN file f ON f.id = l.file_id AND f.state = 'present' LEFT JOIN place pl ON pl.file_id = f.id
CROSS JOIN LATERAL (SELECT {MASKS} AS masks FROM (
    SELECT s.name AS structure, {MASK_SHA256} AS sha256 FROM snapshot_mask f JOIN ({DRAWN_OF}) ON p.id = f.pairing_id
    WHERE (f.snapshot_id, f.number) = (k.snapshot_id, k.number)) AS f) AS d
WHERE k.snapshot_id = %(snapshot)s AND k.number = ANY(%(numbers)s) ORDER BY k.number
"""  # noqa: S608  our own text
DRAWN = f"""
SELECT k.number, k.structure, a.origin, a.label, m.box_row, m.box_column, m.box_rows, m.box_columns, m.bits {DRAWN_ON}
  AND k.number = ANY(%(numbers)s)
"""

WITHOUT_COLOUR = "sample_id NOT IN (SELECT id FROM image WHERE samples_per_pixel > 1)"

Connection = psycopg.Connection[Any]


@dataclass(slots=True)
class Exported:
    """What was exported, or in a dry run would be. Not `complete`: pixels of `problems` are not those of the snapshot."""

    path: str
    form: str
    snapshot: str
    sha256: str  # hex
    samples: int
    patients: int
    shapes: dict[str, int]  # rows×columns → samples
    structures: list[str]
    labels: list[str]
    erased: int  # left out
    revoked: int  # left out
    bytes: int  # of images and masks
    shards: int = 1
    there: int = 0  # samples that an earlier call had written
    written: int = 0  # that are whole at the end; the same command does not make them again
    complete: bool = False
    problems: list[Problem] = field(default_factory=list)
    seconds: float = 0.0


def export(
    database: Database,
    snapshot: str,
    destination: Path,
    *,
    to: Form,
    part: str | None = None,
    dtype: str = "float32",
    shard: int | None = None,
    jobs: int | None = None,
    dry_run: bool = False,
    progress: Progress = lambda done, total: None,
) -> Exported:
    """Write the samples of a snapshot that were neither erased nor revoked, or go on with an export that was not finished.

    Args:
        destination: hdf5: a file that ends in .h5 or .hdf5; webdataset: a folder, made if it is not there.
        part: ``PART`` of the snapshot's split, or ``train:FOLD`` or ``val:FOLD``; by default all.
        dtype: Of the images: float16, float32 or float64, as of a Feed.
        shard: Samples a tar; by default as many as take 256 MiB.
        jobs: Processes; by default one a core.
        progress: Called with (samples written, samples to write).

    Raises:
        UsageError: If there is no such snapshot or part, or the destination holds something else.
        DriftError: If rows are not those that were frozen, or samples were erased or revoked since the export was begun.
        CatalogError: If h5py is not installed, another export writes there, there is no room, or the database refuses.
        OSError: If it cannot be written.
    """
    begun = time.monotonic()
    if dtype not in DTYPES:
        raise UsageError(f"--dtype: is one of {', '.join(DTYPES)}")
    if to == "hdf5":
        needed()
        if destination.suffix.lower() not in SUFFIXES:
            raise UsageError(f"{destination}: an HDF5 export is one file, whose name ends in .h5 or .hdf5")
        if shard is not None:
            raise UsageError("--shard: is of webdataset; an HDF5 export is one file")
    try:
        with database.connect(application_name="catalog export") as conn:
            plan = _plan(conn, snapshot, to=to, part=part, dtype=dtype, shard=shard)
            done = _summary(plan, destination)
            target = (File if to == "hdf5" else Folder)(destination, plan)
            with contextlib.ExitStack() as stack:
                todo = target.begun() if dry_run else target.begin(stack)
                done.there = len(plan.numbers) - sum(len(places) for places in todo)
                done.written, done.complete = done.there, target.finished
                _check_room(destination, todo, plan)
                if not (dry_run or done.complete):
                    done.problems, written = _write(conn, plan, target, todo, jobs, progress)
                    done.written += written
                    if not done.problems:
                        _check_unchanged(conn, plan)
                        target.finish()
                        done.complete = True
    except psycopg.Error as error:
        raise explain(error, database) from error
    done.problems.sort()
    done.seconds = round(time.monotonic() - begun, 3)
    return done


def needed() -> None:
    """Say in one line what to install where h5py is not there."""
    try:
        import h5py  # noqa: F401
    except ImportError:
        raise CatalogError("HDF5 needs h5py, which is not installed: pip install 'scanfeed[hdf5]'") from None


# ------------------------------------------------------------------------------------------ what is exported


def _plan(conn: Connection, snapshot: str, *, to: Form, part: str | None, dtype: str, shard: int | None) -> Plan:
    row = conn.execute("SELECT id, encode(sha256, 'hex') FROM snapshot WHERE name = %s", [snapshot]).fetchone()
    if row is None:
        raise UsageError(f"snapshot {snapshot!r}: there is none of this name; see `catalog snapshot list`")
    snapshot_id, sha256 = row
    known = {"snapshot": snapshot_id}
    numbers, patients, shapes, revoked = _chosen(conn, snapshot, snapshot_id, part)
    structures: set[str] = set()
    classes: dict[str, list[str]] = {}
    for name, label in conn.execute(NAMED, known):
        if label is None:
            structures.add(name)
        else:
            classes.setdefault(name, []).append(label)
    names = Names(sha256, dtype, tuple(sorted(structures)), {name: _in_order(classes[name]) for name in sorted(classes)})
    erased = (conn.execute(ERASED, known).fetchone() or (0,))[0]
    parts = [name for (name,) in conn.execute(PARTS, known)]
    conn.commit()
    manifest = {
        "format": FORMAT,
        "to": to,
        "snapshot": snapshot,
        "sha256": sha256,
        "program_version": __version__,
        "part": part,
        "dtype": dtype,
        "structures": list(names.structures),
        "labels": {name: list(each) for name, each in names.labels.items()},
        "samples": len(numbers),
        "patients": len(np.unique(patients)),
        "erased": erased,
        "revoked": revoked,
        # The numbers of the samples, 8 bytes each, low byte first.
        "numbers_sha256": hashlib.sha256(numbers.astype("<i8").tobytes()).hexdigest(),
        "shapes": [[rows, columns, len(places)] for (rows, columns), places in shapes.items()],
    }
    if to == "webdataset":
        manifest["shard"] = shard or max(1, SHARD_BYTES * len(numbers) // _bytes(shapes, names))
        manifest["shards"] = -(-len(numbers) // manifest["shard"])
    part_bytes = max([1, *(len(name.encode()) for name in parts)])
    return Plan(snapshot_id, manifest, names, numbers, patients, shapes, part_bytes)


def _in_order(classes: Sequence[str]) -> tuple[str, ...]:
    """By number where all are numbers: of 0 to 11 the code of 10 is 10."""
    numbers = all(text.isascii() and text.isdigit() for text in classes)
    return tuple(sorted(classes, key=lambda text: (int(text) if numbers else 0, text)))


def _chosen(
    conn: Connection, snapshot: str, snapshot_id: int, part: str | None
) -> tuple[Numbers, Numbers, dict[tuple[int, int], Numbers], int]:
    """Return numbers of the samples, of their patients, places by shape, and how many more are revoked."""
    parameters: dict[str, Any] = {"snapshot": snapshot_id}
    here: sql.Composable = sql.SQL("true")
    if part is not None:
        try:
            wanted = selection.side(part)
        except UsageError:
            wanted = selection.Side("", "")
        if wanted.split is not None:
            raise UsageError(f"--part: is PART, train:FOLD or val:FOLD of the snapshot's split, not {part!r}")
        here, more = selection.on_side(wanted)
        parameters |= more
    query = sql.SQL("SELECT number, rows, columns, samples_per_pixel, dense_rank, revoked FROM ({}) AS k (number, rows, columns, "
                    "samples_per_pixel, dense_rank, revoked, part, fold) WHERE {} ORDER BY number").format(sql.SQL(PLAN), here)  # fmt: skip
    with conn.cursor(name="plan", binary=True) as cursor:  # on the server: rows of a million samples come in pieces
        cursor.itersize = 50_000
        cursor.execute(query, parameters)
        pieces = []
        while rows := cursor.fetchmany(cursor.itersize):
            pieces.append(np.array(rows, np.int64))
    table = np.concatenate(pieces) if pieces else np.empty((0, 6), np.int64)
    if part is not None and not len(table):
        parts = [name for (name,) in conn.execute(PARTS, parameters)]
        has = f"it has {', '.join(parts)}" if parts else "it was made without --split"
        raise UsageError(f"--part: snapshot {snapshot!r} has no sample in {part}; {has}")
    revoked = table[:, 5] != 0
    table = table[~revoked]
    if not len(table):
        raise CatalogError(f"snapshot {snapshot!r}: all of its samples were erased or revoked, so there is nothing to export")
    colour = int(np.count_nonzero(table[:, 3] != 1))
    if colour:
        raise CatalogError(
            f"snapshot {snapshot!r}: holds {colour} colour images, and only grey ones are fed and exported; make one without them: "
            f'--where "{WITHOUT_COLOUR}"'
        )
    shapes = {}
    for rows, columns in np.unique(table[:, 1:3], axis=0):
        shapes[int(rows), int(columns)] = np.flatnonzero((table[:, 1] == rows) & (table[:, 2] == columns))
    return table[:, 0].copy(), table[:, 4].copy(), shapes, int(np.count_nonzero(revoked))


def _check_unchanged(conn: Connection, plan: Plan) -> None:
    """Raise DriftError if a sample was erased or revoked while it was exported: it must not be given away."""
    conn.rollback()
    numbers, _, _, _ = _chosen(conn, plan.manifest["snapshot"], plan.snapshot_id, plan.manifest["part"])
    if not np.array_equal(numbers, plan.numbers):
        raise _left_meanwhile(plan)


def _left_meanwhile(plan: Plan) -> DriftError:
    return DriftError(
        f"snapshot {plan.manifest['snapshot']!r}: samples of it were erased or revoked while it was exported; "
        "delete what was written and export it again"
    )


def _samples(conn: Connection, plan: Plan, places: Numbers) -> list[Sample]:
    """Return the samples at these places, with masks as rows keep them."""
    parameters = {"snapshot": plan.snapshot_id, "numbers": plan.numbers[places].tolist()}
    drawn: dict[int, dict[str, Drawn]] = {}
    for number, structure, origin, label, *box, bits in conn.execute(DRAWN, parameters, binary=True):
        drawn.setdefault(number, {})[structure] = Drawn(origin, label, None if bits is None else tuple(box), bytes(bits or b""))
    found = []
    for at, row in zip(places, conn.execute(IMAGES, parameters, binary=True), strict=False):
        number, sample_key, part, fold, pixel_hash, *rest, frozen = row
        item = Item._make(rest)
        if item.file_id is not None and item.root is None:
            raise CatalogError("this login may not know where files lie, which are to be read; export as the catalog's owner")
        item = item._replace(root=item.root or "", path=item.path or "")
        patient, on_it = int(plan.patients[at]), drawn.get(number, {})
        found.append(Sample(number, item, bytes(pixel_hash or b""), bool(frozen), sample_key, patient, part, fold, on_it))
    conn.commit()
    if [sample.number for sample in found] != parameters["numbers"]:
        raise _left_meanwhile(plan)
    return found


def _summary(plan: Plan, destination: Path) -> Exported:
    manifest = plan.manifest
    return Exported(
        path=str(destination), form=manifest["to"], snapshot=manifest["snapshot"], sha256=manifest["sha256"], samples=manifest["samples"],
        patients=manifest["patients"], shapes={f"{rows}×{columns}": count for rows, columns, count in manifest["shapes"]},
        structures=list(plan.names.structures), labels=list(plan.names.labels), erased=manifest["erased"], revoked=manifest["revoked"],
        bytes=_bytes(plan.shapes, plan.names), shards=manifest.get("shards", 1),
    )  # fmt: skip


def _bytes(shapes: dict[tuple[int, int], Numbers], names: Names) -> int:
    """Bytes of images and masks."""
    pixel = np.dtype(names.dtype).itemsize + len(names.structures)
    return sum(rows * columns * pixel * len(places) for (rows, columns), places in shapes.items())


# ------------------------------------------------------------------------------------------ writing


def _write(
    conn: Connection, plan: Plan, target: File | Folder, todo: Sequence[Numbers], jobs: int | None, progress: Progress
) -> tuple[list[Problem], int]:
    """Write what is to be done, in processes; return what is wrong with samples, and how many are written.

    A shard with such a sample, or a block of an HDF5 file's rows, is not; the others are all the same.
    """
    problems: list[Problem] = []
    total, done, written = sum(map(len, todo)), 0, 0
    running: deque[tuple[Sequence[Sample], Future[list[Problem]]]] = deque()
    try:
        with processes(jobs, len(todo)) as pool:
            for places in [*todo, *[None] * TASKS_AT_ONCE]:
                if places is not None:
                    samples = _samples(conn, plan, places)
                    running.append((samples, pool.submit(shards.write, [target.task(places, samples)])))
                while running and (places is None or len(running) >= TASKS_AT_ONCE):
                    wrong, size = running[0][1].result(), len(running[0][0])
                    running.popleft()
                    problems += wrong
                    written += 0 if wrong else size
                    done += size
                    progress(done, total)
    except BrokenExecutor:
        first = running[0][0]
        raise CatalogError(
            f"the process that read samples {first[0].item.image_id} to {first[-1].item.image_id} died; what was written stays; "
            f"`catalog snapshot verify {plan.manifest['snapshot']} --full` says which of them is damaged"
        ) from None
    return problems, written


def _check_room(destination: Path, todo: Sequence[Numbers], plan: Plan) -> None:
    """Raise CatalogError if what is to be written does not fit on the disk."""
    wanted = _bytes(plan.shapes, plan.names) * sum(map(len, todo)) // len(plan.numbers)
    folder = destination.absolute()
    while not folder.is_dir():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise CatalogError(
            f"{destination}: takes {wanted / 1e9:.1f} GB more, and {free / 1e9:.1f} GB are free; free some space, or export a --part"
        )
