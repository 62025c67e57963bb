"""Files → what their rows will hold, in parallel processes. Nothing here knows a database.

Bounded numbers of files are in flight, so memory is bounded whatever the tree's size. A reading process that dies takes nothing with
it: the files it had are read again one by one, and the one that kills its reader is refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from catalog import contours, dicom
from catalog.errors import FileError
from catalog.layouts import Annotation, Entry, Image

FILES_PER_TASK = 32  # small enough for an even end, large enough that the executor's own cost (0.2 ms a task) is lost in it


@dataclass(frozen=True, slots=True)
class Refused:
    """A file that could not be read."""

    entry: Entry
    kind: str
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class ReadImage:
    """A file's rows for ``staged``, one a frame."""

    entry: Entry
    rows: list[tuple[Any, ...]]
    other_patient: bool


@dataclass(frozen=True, slots=True)
class ReadAnnotation:
    """A contour file's points."""

    entry: Entry
    polygon: Polygon


Result = ReadImage | ReadAnnotation | Refused | None
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Polygon:
    """A polygon as a row keeps it: x, y, x, y, … as read, points in each ring, area in px², sha256 of both."""

    points: list[float]
    rings: list[int]
    area_px: float
    content_hash: bytes


def polygon(rings: Sequence[NDArray[np.float64]]) -> Polygon:
    """Return rings, each (n, 2), as a row keeps them."""
    points = np.concatenate(rings) if rings else np.empty((0, 2))
    lengths = [len(ring) for ring in rings]
    digest = hashlib.sha256(np.array(lengths, "<i8").tobytes() + points.astype("<f8").tobytes()).digest()
    return Polygon(points.ravel().tolist(), lengths, contours.polygon_area(rings), digest)


@contextlib.contextmanager
def _processes(jobs: int | None, files: int) -> Iterator[Executor]:
    # Never fork: this process has a libpq connection, and may have threads.
    workers = max(1, min(jobs or os.cpu_count() or 1, -(-files // FILES_PER_TASK)))
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_ignore_interrupts)
    try:
        yield pool
    except BaseException:
        for process in (pool._processes or {}).values():
            process.terminate()  # Ctrl-C ends within a second, whatever is being read
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all; the writer decides


def read_all(
    folder: str, todo: Sequence[Image | Annotation], jobs: int | None, executor: Executor | None, progress: Progress
) -> Generator[Result]:
    """Yield a result a file, in no order; read by `executor`, or by `jobs` processes of this machine."""
    tasks = (todo[start : start + FILES_PER_TASK] for start in range(0, len(todo), FILES_PER_TASK))
    running: dict[Future[list[Result]], Sequence[Image | Annotation]] = {}
    read = 0
    while read < len(todo):
        with contextlib.nullcontext(executor) if executor else _processes(jobs, len(todo) - read) as pool:
            try:
                while read < len(todo):
                    for items in islice(tasks, 16 - len(running)):
                        running[pool.submit(read_files, folder, items)] = items
                    done, _ = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        results = future.result()
                        del running[future]
                        read += len(results)
                        progress(read, len(todo))
                        yield from results
            except BrokenProcessPool:
                pass  # a reading process died: below, and then the rest in new ones
        while running:
            _, items = running.popitem()
            read += len(items)
            yield from _read_one_by_one(folder, items)


def _read_one_by_one(folder: str, items: Iterable[Image | Annotation]) -> Iterator[Result]:
    """After a reading process died: each file in a process of its own, so that the one that kills it is found."""
    for item in items:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_ignore_interrupts) as alone:
            try:
                yield from alone.submit(read_files, folder, [item]).result()
            except BrokenProcessPool:
                kind = "image" if isinstance(item, Image) else "annotation"
                yield Refused(
                    item.entry, kind, "reader-died", "the process that read it died; it is left out; look at it with another program"
                )


def read_files(folder: str, items: Sequence[Image | Annotation]) -> list[Result]:
    """Read some files of one root; None for one that turns out to be no part of the layout. Runs in a reading process."""
    return [_read_image(folder, item) if isinstance(item, Image) else _read_annotation(folder, item) for item in items]


def _read_image(folder: str, item: Image) -> Result:
    try:
        found = dicom.read_instance(Path(folder, item.entry.path))
    except FileError as error:
        if error.code == "not-dicom" and not item.sure:
            return None
        return Refused(item.entry, "image", error.code, str(error))
    content = hashlib.sha256(b"".join(frame.pixel_hash for frame in found.frames)).digest()
    head = (
        item.entry.path, item.entry.size, item.entry.mtime_ns, item.patient, _text(found.study_instance_uid), _text(found.study_date),
        _text(found.series_instance_uid), _int4(found.series_number), _text(found.modality), _text(found.sop_instance_uid),
        _text(found.sop_class_uid), _int4(found.instance_number), found.number_of_frames, _int4(found.images_in_acquisition),
        content, _text(found.transfer_syntax_uid),
    )  # fmt: skip
    rows = [
        (
            *head, frame.frame, frame.rows, frame.columns, frame.samples_per_pixel, _text(frame.photometric),
            *(frame.pixel_spacing or (None, None)), _list(frame.image_position), _list(frame.image_orientation), frame.position,
            frame.slice_thickness, frame.trigger_time, frame.slope, frame.intercept, frame.pixel_hash,
            frame.offset, frame.length if frame.dtype else None, frame.dtype,
        )
        for frame in found.frames
    ]  # fmt: skip
    return ReadImage(item.entry, rows, other_patient=found.patient_id not in ("", item.patient))


def _read_annotation(folder: str, item: Annotation) -> Result:
    try:
        data = Path(folder, item.entry.path).read_bytes() if item.entry.size <= contours.MAX_BYTES else b""
        if not data and item.entry.size:
            raise FileError("contour-unreadable", f"{item.entry.size} bytes are too many for a contour; it is left out")
        return ReadAnnotation(item.entry, polygon([contours.read_points(data)]))
    except FileError as error:
        return Refused(item.entry, "annotation", error.code, str(error))
    except OSError as error:
        return Refused(item.entry, "annotation", "unreadable", f"{error.strerror}; it is left out; give read access, then ingest again")


def _text(value: str) -> str:
    # PostgreSQL stores neither NUL nor half a surrogate; everything else stays as found.
    return value.replace("\0", "\N{REPLACEMENT CHARACTER}").encode(errors="replace").decode()


def _int4(value: int | None) -> int | None:
    return value if value is not None and -(2**31) <= value < 2**31 else None


def _list(value: tuple[float, ...] | None) -> list[float] | None:
    return None if value is None else list(value)
