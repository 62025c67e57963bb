"""Files → what their rows will hold, in parallel processes. Nothing here knows a database.

Bounded numbers of files are in flight, so memory is bounded whatever the tree's size. A reading process that dies takes nothing with
it: the files it had are read again apart, and the one that kills its reader is refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from catalog import contours, dicom
from catalog.errors import FileError
from catalog.layouts import Annotation, Entry, Image
from catalog.records import Polygon, polygon

FILES_PER_TASK = 32  # small enough for an even end, large enough that the executor's own work a task is little beside reading them
TASKS_AT_ONCE = 16
LONGEST_UID = 1_000  # characters; far beyond PS3.5 9.1, since UIDs are kept as found, and within what PostgreSQL indexes
LONGEST_MM = 1e9


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


@dataclass(frozen=True, slots=True)
class NotPart:
    """A file that turned out to be no part of the layout."""

    entry: Entry


Result = ReadImage | ReadAnnotation | Refused | NotPart
Progress = Callable[[int, int], None]


@contextlib.contextmanager
def _processes(jobs: int | None, files: int) -> Iterator[Executor]:
    # Never fork: this process has a libpq connection, and may have threads.
    workers = max(1, min(jobs or os.cpu_count() or 1, -(-files // FILES_PER_TASK)))
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_begin_reading)
    try:
        yield pool
    except BaseException:
        for process in (pool._processes or {}).values():
            process.terminate()  # Ctrl-C ends within a second, whatever is being read
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def _submit(pool: Executor, folder: str, items: Sequence[Image | Annotation]) -> Future[list[Result]]:
    """Hand files to a reading process. One that starts now inherits that Ctrl-C is for the writer alone, from its first line on."""
    if not hasattr(signal, "pthread_sigmask"):
        return pool.submit(read_files, folder, items)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(read_files, folder, items)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_reading() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all; the writer decides
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A writer killed by -9 cannot stop its readers, and they would wait for work for ever."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def read_all(
    folder: str, todo: Sequence[Image | Annotation], jobs: int | None, executor: Executor | None, progress: Progress
) -> Generator[Result]:
    """Yield a result a file, in no order; read by `executor`, or by `jobs` processes of this machine."""
    tasks = deque(todo[start : start + FILES_PER_TASK] for start in range(0, len(todo), FILES_PER_TASK))
    running: dict[Future[list[Result]], Sequence[Image | Annotation]] = {}
    read = 0
    while tasks:
        with contextlib.nullcontext(executor) if executor else _processes(jobs, len(todo) - read) as pool:
            try:
                while tasks or running:
                    while tasks and len(running) < TASKS_AT_ONCE:
                        running[_submit(pool, folder, tasks[0])] = tasks[0]
                        tasks.popleft()
                    done, _ = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        results = future.result()
                        del running[future]
                        read += len(results)
                        progress(read, len(todo))
                        yield from results
            except BrokenExecutor:
                executor = None  # a reading process died: below, and then the rest in new ones
        while running:
            _, items = running.popitem()
            yield from _read_apart(folder, items)
            read += len(items)
            progress(read, len(todo))


def _read_apart(folder: str, items: Sequence[Image | Annotation]) -> Iterator[Result]:
    """After a reading process died: in a process of their own and by halves, until the file that kills it is found."""
    with _processes(1, 1) as alone:
        try:
            results = _submit(alone, folder, items).result()
        except BrokenExecutor:
            results = None
    if results is not None:
        yield from results
    elif len(items) > 1:
        yield from _read_apart(folder, items[: len(items) // 2])
        yield from _read_apart(folder, items[len(items) // 2 :])
    else:
        died = "the process that read it died; it is left out; look at it with another program"
        yield Refused(items[0].entry, _kind(items[0]), "reader-died", died)


def read_files(folder: str, items: Sequence[Image | Annotation]) -> list[Result]:
    """Read some files of one root. Runs in a reading process."""
    return [_read(folder, item) for item in items]


def _read(folder: str, item: Image | Annotation) -> Result:
    try:
        return _read_image(folder, item) if isinstance(item, Image) else _read_annotation(folder, item)
    except FileError as error:
        if error.code == "not-dicom" and isinstance(item, Image) and not item.sure:
            return NotPart(item.entry)
        return Refused(item.entry, _kind(item), error.code, str(error))
    except Exception as error:  # one file of a million must not stop the others; the text could hold a value of its header
        return Refused(item.entry, _kind(item), "reader-failed", f"reading it failed with {type(error).__name__}; it is left out")


def _kind(item: Image | Annotation) -> str:
    return "image" if isinstance(item, Image) else "annotation"


def _read_image(folder: str, item: Image) -> ReadImage:
    found = dicom.read_instance(Path(folder, item.entry.path))
    for uid in (found.study_instance_uid, found.series_instance_uid, found.sop_instance_uid):
        if len(uid) > LONGEST_UID:
            raise FileError("unreadable", f"a UID of {len(uid)} characters, where DICOM allows 64 (PS3.5 9.1), so the header is damaged")
    content = hashlib.sha256(b"".join(frame.pixel_hash or b"" for frame in found.frames)).digest()
    head = (
        item.entry.path, item.entry.size, item.entry.mtime_ns, item.patient, _text(found.study_instance_uid), _text(found.study_date),
        _text(found.series_instance_uid), _int4(found.series_number), _text(found.modality), _text(found.sop_instance_uid),
        _text(found.sop_class_uid), _int4(found.instance_number), found.number_of_frames, _int4(found.images_in_acquisition),
        content, _text(found.transfer_syntax_uid),
    )  # fmt: skip
    rows = [
        (
            *head, frame.frame, frame.rows, frame.columns, frame.samples_per_pixel, _text(frame.photometric),
            *_spacing(frame.pixel_spacing), _list(frame.image_position), _list(frame.image_orientation), _mm(frame.position),
            _mm(frame.slice_thickness), frame.trigger_time, frame.slope, frame.intercept, frame.pixel_hash,
            frame.offset, frame.length if frame.dtype else None, frame.dtype,
        )
        for frame in found.frames
    ]  # fmt: skip
    return ReadImage(item.entry, rows, other_patient=found.patient_id not in ("", item.patient))


def _read_annotation(folder: str, item: Annotation) -> ReadAnnotation:
    if item.entry.size > contours.MAX_BYTES:
        raise FileError("contour-unreadable", f"{item.entry.size} bytes are too many for a contour; it is left out")
    try:
        data = Path(folder, item.entry.path).read_bytes()
    except OSError as error:
        raise FileError("unreadable", f"{error.strerror}; it is left out; give read access, then ingest again") from None
    return ReadAnnotation(item.entry, polygon([contours.read_points(data)]))


def _text(value: str) -> str:
    # PostgreSQL stores neither NUL nor half a surrogate; everything else stays as found.
    return value.replace("\0", "\N{REPLACEMENT CHARACTER}").encode(errors="replace").decode()


def _int4(value: int | None) -> int | None:
    return value if value is not None and -(2**31) <= value < 2**31 else None


def _mm(value: float | None) -> float | None:
    # A damaged header's 1e300 mm would overflow in the views, and one such row would fail every query over all.
    return value if value is not None and abs(value) < LONGEST_MM else None


def _spacing(spacing: tuple[float, float] | None) -> tuple[float | None, float | None]:
    return spacing if spacing and all(0 < value < LONGEST_MM for value in spacing) else (None, None)


def _list(value: tuple[float, ...] | None) -> list[float] | None:
    return None if value is None else list(value)
