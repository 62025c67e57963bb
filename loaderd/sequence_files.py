"""Files of composed sequences: one picture, or a large set as one npz or HDF5 file, made by all cores.

A name that is taken gets a number (``out-2.png``) unless it may be overwritten; what is unfinished is never seen under its name. A set is
composed in parts of 1,000, each from its own random numbers: it is the same whatever the number of processes.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Future
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from catalog.database import open_database
from catalog.destinations import naming
from catalog.errors import CatalogError, UsageError
from catalog.processes import processes
from loaderd import digits
from loaderd.digits import Digits
from loaderd.sequences import Composed

PICTURES = (".png", ".jpg", ".jpeg")
SETS = (".npz", ".h5", ".hdf5")
PART = 1_000  # sequences
QUALITY = 95  # of JPEG
Progress = Callable[[int, int], None]
MadeOf = tuple[str | None, str | None, str | None, dict[str, Any]]  # database, where, labels, options


def picture(path: Path, image: NDArray[np.uint8], *, overwrite: bool) -> Path:
    """Write a grey image and return its path, which has a number where the name was taken. PNG keeps each value, JPEG does not.

    Raises:
        UsageError: If the name ends in none of .png, .jpg, .jpeg.
        OSError: If it cannot be written.
    """
    from PIL import Image

    suffix = path.suffix.lower()
    if suffix not in PICTURES:
        raise UsageError(f"{path}: a picture's name ends in {', '.join(PICTURES)}; a set (--count) in {', '.join(SETS)}")
    data = io.BytesIO()
    Image.fromarray(image).save(data, "PNG" if suffix == ".png" else "JPEG", quality=QUALITY)
    with _placed(path, overwrite=overwrite) as (part, place):
        part.write_bytes(data.getvalue())
    return place()


def dataset(
    path: Path,
    pool: Digits,
    options: dict[str, Any],
    number: int,
    seed: int,
    *,
    database: str | None,
    where: str | None,
    labels: str | None = None,
    overwrite: bool,
    jobs: int | None = None,
    progress: Progress = lambda done, total: None,
) -> Path:
    """Write `number` sequences and return the file's path, which has a number where the name was taken.

    The file holds ``images`` uint8 (N, rows, columns), to be divided by 255; ``digits`` int8 (N, L) and ``boxes`` int16 (N, L, 4), -1
    beyond a sequence; ``members`` int64 (N, L), the sample_ids; ``lengths`` and ``widths`` (N,); ``about``, JSON with options, seed and
    the name of the labels, if one was asked for.

    Raises:
        UsageError: If the name ends in none of .npz, .h5, .hdf5.
        CatalogError: If h5py is not installed, or a process died.
        OSError: If it cannot be written.
    """
    suffix = path.suffix.lower()
    if suffix not in SETS:
        raise UsageError(f"{path}: a set's name ends in {', '.join(SETS)}")
    if suffix != ".npz":
        from catalog.exporting import needed

        needed()
    sequencer = pool.sequencer(options)
    shape = (number, sequencer.height, sequencer.width)
    parts = _parts(pool, (database, where, labels, sequencer.options), number, seed, jobs, progress)
    about = json.dumps({"sequences": sequencer.options, "seed": seed, "part": PART, "divide_by": 255, "labels": labels})
    with _placed(path, overwrite=overwrite) as (part, place):
        (_write_npz if suffix == ".npz" else _write_hdf5)(part, shape, parts, about)
    return place()


@contextmanager
def _placed(path: Path, *, overwrite: bool) -> Iterator[tuple[Path, Callable[[], Path]]]:
    """Give a path to write to, and what says where it lies afterwards: under the name, or the next free one."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    placed = path
    with naming(path):
        part.touch()
    try:
        yield part, lambda: placed
        with naming(path):
            if overwrite:
                part.replace(path)
                return
            for again in count(2):
                try:
                    os.link(part, placed)  # unlike a rename it fails where a file is, also one that came just now
                    break
                except FileExistsError:
                    placed = path.with_stem(f"{path.stem}-{again}")
    finally:
        part.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------ composing


def _parts(pool: Digits, made_of: MadeOf, number: int, seed: int, jobs: int | None, progress: Progress) -> Iterator[Composed]:
    """Yield the parts of a set in their order."""
    tasks = [(at // PART, min(PART, number - at)) for at in range(0, number, PART)]
    done = 0
    if len(tasks) == 1 or jobs == 1:
        sequencer = pool.sequencer(made_of[-1])
        for task, size in tasks:
            yield sequencer.part(seed, task, size, dtype=np.uint8)
            progress(done := done + size, number)
        return
    running: deque[Future[Composed]] = deque()
    waiting = deque(tasks)
    try:
        with processes(jobs, len(tasks)) as executor:
            while waiting or running:
                # The parts on their way are the memory that it takes.
                while waiting and len(running) <= 2 * (jobs or os.cpu_count() or 1):
                    running.append(executor.submit(_part, made_of, len(pool.labels), seed, *waiting.popleft()))
                found = running.popleft().result()
                yield found
                progress(done := done + len(found.images), number)
    except BrokenExecutor:
        raise CatalogError(f"a process that composes died after {done} sequences; is there enough memory? fewer --jobs take less") from None


_pool: dict[tuple[str | None, str | None, str | None], Digits] = {}  # of a composing process


def _part(made_of: MadeOf, size: int, seed: int, number: int, sequences: int) -> Composed:
    database, where, labels, options = made_of
    if (database, where, labels) not in _pool:
        with open_database(database) as db:
            _pool[database, where, labels] = digits.load(db, where, labels=labels)
    pool = _pool[database, where, labels]
    if len(pool.labels) != size:
        raise CatalogError("the catalog changed while the set was composed, and some digits may be shown no more; compose it again")
    return pool.sequencer(options).part(seed, number, sequences, dtype=np.uint8)


# ------------------------------------------------------------------------------------------ writing


def _beside(parts: list[Composed]) -> dict[str, NDArray[Any]]:
    """Return what stands beside the images."""
    drawn = np.concatenate([part.digits for part in parts])
    return {
        "digits": drawn.astype(np.int8),
        "boxes": np.concatenate([part.boxes for part in parts]).astype(np.int16),
        "members": np.concatenate([part.members for part in parts]),
        "lengths": np.count_nonzero(drawn >= 0, axis=1),
        "widths": np.concatenate([part.widths for part in parts]),
    }


def _without_images(part: Composed) -> Composed:
    return Composed(part.images[:0], part.digits, part.boxes, part.members, part.widths)


def _write_npz(path: Path, shape: tuple[int, int, int], parts: Iterator[Composed], about: str) -> None:
    """Write parts one after the other, as `numpy.savez` would lay them out at once."""
    kept = []
    with zipfile.ZipFile(path, "w") as file:
        with file.open("images.npy", "w", force_zip64=True) as out:
            head = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(out, head)
            for part in parts:
                out.write(part.images.data)
                kept.append(_without_images(part))
        for name, values in {**_beside(kept), "about": np.array(about)}.items():
            with file.open(f"{name}.npy", "w", force_zip64=True) as out:
                _save(out, values)


def _save(out: Any, values: NDArray[Any]) -> None:
    np.lib.format.write_array(out, np.ascontiguousarray(values) if values.ndim else values, allow_pickle=False)


def _write_hdf5(path: Path, shape: tuple[int, int, int], parts: Iterator[Composed], about: str) -> None:
    import h5py

    kept, at = [], 0
    with h5py.File(path, "w") as file:
        images = file.create_dataset("images", shape, np.uint8)
        for part in parts:
            images[at : at + len(part.images)] = part.images
            at += len(part.images)
            kept.append(_without_images(part))
        for name, values in _beside(kept).items():
            file.create_dataset(name, data=values)
        file.attrs["about"] = about
