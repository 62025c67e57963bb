"""Files → what their rows will hold, in parallel processes. Nothing here knows a database.

Bounded numbers of files are in flight, so memory is bounded whatever the tree's size. A reading process that dies takes nothing with
it: the files it had are read again apart, and the one that kills its reader is refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from catalog import header, pixels, remote, staged
from catalog.errors import CatalogError, FileError
from catalog.layouts import Annotation, Entry, Image
from catalog.processes import Progress, end_after, processes
from catalog.records import Drawn, Instance, polygon

FILES_PER_TASK = 32  # small enough for an even end, large enough that the executor's own work a task is little beside reading them
TASKS_AT_ONCE = 128  # 4,096 files: about what is read while the writer writes 5,000; with 512 the readers ran out of work
LONGEST_UID = 1_000  # characters; far beyond PS3.5 9.1, since UIDs are kept as found, and within what PostgreSQL indexes
# After that the alarm ends the process, and the file is refused as one that kills its reader: a decoder in C may look for ever for the end
# of a damaged codestream (pylibjpeg did, with two bytes of a JPEG-LS frame changed).
PATIENCE_S = 300
WHOLE = 64 * 1024 * 1024  # bytes of a file that are read at once
HEAD = 65_536  # bytes that --hash head takes: the header of nearly every DICOM file and the first pixels

Hashing = Literal["full", "head", "none"]

# What reads a file: the module that has `read_images` or `read_annotations`. "module:function" is a reader of the user's own.
FORMATS = {
    "dicom": "dicom", "nifti": "nifti", "idx": "idx", "raster": "raster",
    "table-label": "layouts.table",
}  # fmt: skip
# SOP classes (PS3.4 B.5) of objects that hold annotations and no image.
ANNOTATIONS = {
    "1.2.840.10008.5.1.4.1.1.481.3": "rtstruct",
    "1.2.840.10008.5.1.4.1.1.66.4": "seg",
    "1.2.840.10008.5.1.4.1.1.66.7": "seg",
}


@dataclass(frozen=True, slots=True)
class Refused:
    """A file that could not be read."""

    entry: Entry
    kind: str
    format: str
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Read:
    """What a file holds: `frames` images, and what was drawn.

    `rows` are lines for ``COPY staged``: one a frame, one for an object without images, none for what is no instance. They are written
    here, where there are several processes, and not by the one writer.
    """

    entry: Entry
    format: str
    content_hash: bytes | None
    rows: bytes = b""
    patient: str = ""
    frames: int = 0
    drawn: list[Drawn] = field(default_factory=list)
    other_patient: bool = False
    fell_back: bool = False
    left_out: list[str] = field(default_factory=list)  # of what it holds, what can be no annotation

    @property
    def kind(self) -> str:
        """What it is foremost: image, annotation or other."""
        return "annotation" if self.drawn else "image" if self.frames else "other"


@dataclass(frozen=True, slots=True)
class NotPart:
    """A file that turned out to be no part of the layout. It has a row, so that it is not opened again as long as it does not change."""

    entry: Entry
    kind: str = "other"
    format: str = "none"


Result = Read | Refused | NotPart


def read_all(
    folder: str,
    todo: Sequence[Image | Annotation],
    *,
    hashing: Hashing,
    jobs: int | None,
    executor: Executor | None,
    at_once: int = TASKS_AT_ONCE,
    progress: Progress,
) -> Generator[Result]:
    """Yield a result a file, in no order; read by `executor`, or by `jobs` processes of this machine."""
    tasks = deque(todo[start : start + FILES_PER_TASK] for start in range(0, len(todo), FILES_PER_TASK))
    running: dict[Future[list[Result]], Sequence[Image | Annotation]] = {}
    read = 0

    def counted(results: Iterable[Result]) -> Iterator[Result]:
        nonlocal read
        for result in results:
            read += 1
            progress(read, len(todo))
            yield result

    while tasks:
        with contextlib.nullcontext(executor) if executor else processes(jobs, len(tasks)) as pool:
            try:
                while tasks or running:
                    while tasks and len(running) < at_once:
                        running[pool.submit(read_files, folder, tasks[0], hashing)] = tasks[0]
                        tasks.popleft()
                    done, _ = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        results = _outcome(future)
                        items = running.pop(future)
                        yield from counted(results if results is not None else _read_apart(folder, [items], hashing))
            except BrokenExecutor:
                _check_starts(folder, hashing)
                executor, at_once = None, TASKS_AT_ONCE  # a reading process died: below, and then the rest in new ones
        yield from counted(_read_apart(folder, list(running.values()), hashing))
        running.clear()


def _outcome(future: Future[list[Result]]) -> list[Result] | None:
    """Return what was read; None if the executor gave these files up, as Dask does with what several of its workers died on."""
    try:
        return future.result()
    except BrokenExecutor:
        raise
    except Exception:  # reading itself raises nothing
        return None


def _check_starts(folder: str, hashing: Hashing) -> None:
    """Where no process of ours can begin, each file would be taken for the one that killed its reader."""
    with processes(1, 1) as alone:
        try:
            alone.submit(read_files, folder, [], hashing).result()
        except BrokenExecutor:
            raise CatalogError("reading processes end as soon as they start; is there memory for them?") from None


def _read_apart(folder: str, tasks: Iterable[Sequence[Image | Annotation]], hashing: Hashing) -> Iterator[Result]:
    """After a reading process died: one task at a time, what kills its reader by halves, until the file that does is found."""
    waiting = deque(tasks)
    while waiting:
        with processes(1, 1) as alone:
            try:
                while waiting:
                    results = alone.submit(read_files, folder, waiting[0], hashing).result()
                    waiting.popleft()
                    yield from results
            except BrokenExecutor:
                items = waiting.popleft()
                if len(items) > 1:
                    waiting.extendleft((items[len(items) // 2 :], items[: len(items) // 2]))
                    continue
                died = "the process that read it died; it is left out; look at it with another program"
                yield Refused(items[0].entry, _kind(items[0]), items[0].format, "reader-died", died)


def read_files(folder: str, items: Sequence[Image | Annotation], hashing: Hashing) -> list[Result]:
    """Read some files of one root. Runs in a reading process."""
    return [_read(folder, item, hashing) for item in items]


def _read(folder: str, item: Image | Annotation, hashing: Hashing) -> Result:
    end_after(PATIENCE_S)
    try:
        # Half of a file can look whole: a contour has no end. As its row says how it was when it was found, it is read again next time.
        before = _stamp(folder, item.entry)
        read = _read_image(folder, item, hashing) if isinstance(item, Image) else _read_annotation(folder, item, hashing)
        if before is not None and (before[0] != item.entry.size or before != _stamp(folder, item.entry)):
            raise FileError("changed", "it changed while it was read; it is left out; ingest again when it is complete")
        return read
    except FileError as error:
        if error.code == "dicomdir" or (error.code == "not-dicom" and isinstance(item, Image) and not item.sure):
            return NotPart(item.entry)
        return Refused(item.entry, _kind(item), item.format, error.code, str(error))
    except Exception as error:  # one file of a million must not stop the others; the text could hold a value of its header
        failed = f"reading it failed with {type(error).__name__}; it is left out"
        return Refused(item.entry, _kind(item), item.format, "reader-failed", failed)
    finally:
        end_after(0)


def _stamp(folder: str, entry: Entry) -> tuple[int, int] | None:
    """Return a file's size and time now; None where that is not to be had, which is for its reader to say."""
    if remote.is_url(folder):
        return None
    try:
        status = os.stat(f"{folder}/{entry.path}")  # noqa: PTH116  1.5 µs; pathlib takes three times as long
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _kind(item: Image | Annotation) -> str:
    return "image" if isinstance(item, Image) else "annotation"


def _reader(form: str, function: str) -> Any:
    """Return the function of a format, or of the user's own by import path."""
    if ":" in form:
        from catalog.layouts import custom

        return custom.load(form)
    return getattr(importlib.import_module(f"catalog.{FORMATS[form]}"), function)


def _local(folder: str, entry: Entry) -> contextlib.AbstractContextManager[Path]:
    """Return a context that gives a path under which a file can be opened."""
    return remote.local(folder, entry) if remote.is_url(folder) else contextlib.nullcontext(Path(folder, entry.path))


def _read_image(folder: str, item: Image, hashing: Hashing) -> Read:
    if remote.is_url(folder) and item.format == "dicom" and hashing == "none":
        read = partial(_range, folder, item.entry.path)
        if (found := header.read_header(read, item.entry.size)) is not None and found.instance.sop_class_uid not in ANNOTATIONS:
            return _as_read(item, found.instance, None, [], fell_back=False)
    with _local(folder, item.entry) as path:
        return _read_local(path, item, hashing)


def _range(url: str, path: str, length: int, start: int) -> bytes:
    return remote.read_range(url, path, start, start + length)


def _read_local(path: Path, item: Image, hashing: Hashing) -> Read:
    fell_back = False
    content_hash: bytes | None = None
    drawn: list[Drawn] = []
    left_out: list[str] = []
    if item.format == "dicom":
        found, fell_back, content_hash = _read_dicom(path, item.entry, hashing)
        if (holds := ANNOTATIONS.get(found.sop_class_uid)) is not None:
            if holds == "rtstruct":
                from catalog import rtstruct

                drawn = rtstruct.read_annotations(path, item.options, left_out)
            else:
                from catalog import seg

                drawn = seg.read_annotations(path, item.options)
            found = replace(found, frames=())
    else:
        found = _reader(item.format, "read_images")(path, item.options)
        found = replace(found, series_instance_uid=found.series_instance_uid or item.entry.path)
    read = _as_read(item, found, content_hash or _content_hash(path, item.entry, hashing), drawn, fell_back=fell_back)
    return replace(read, left_out=left_out)


def _as_read(item: Image, found: Instance, content_hash: bytes | None, drawn: list[Drawn], *, fell_back: bool) -> Read:
    for uid in (found.study_instance_uid, found.series_instance_uid, found.sop_instance_uid):
        if len(uid) > LONGEST_UID:
            raise FileError("unreadable", f"a UID of {len(uid)} characters, where DICOM allows 64 (PS3.5 9.1), so the header is damaged")
    own = found.patient_id.strip()
    patient = item.patient or own or found.study_instance_uid or item.entry.path.rpartition("/")[0] or item.entry.path
    other = bool(own and item.patient and own != item.patient)
    rows = staged.rows(item, found, patient)
    return Read(item.entry, item.format, content_hash, rows, patient, len(found.frames), drawn, other_patient=other, fell_back=fell_back)


def _read_dicom(path: Path, entry: Entry, hashing: Hashing) -> tuple[Instance, bool, bytes | None]:
    """Return what a DICOM file says, whether that took pydicom, and the file's hash where that came with it."""
    content_hash = None
    try:
        file = os.open(path, os.O_RDONLY)  # half the time of a file object's
        try:
            if hashing != "full":
                found = header.read_header(partial(os.pread, file), entry.size)
                if found is not None:
                    return found.instance, False, None
            elif entry.size <= WHOLE:
                data = os.read(file, entry.size + 1)
                content_hash = hashlib.sha256(data).digest()
                found = header.parse_header(data, len(data))
                if found is not None and (hashed := _hashed(found, data)) is not None:
                    return hashed, False, content_hash
        finally:
            os.close(file)
    except OSError as error:
        raise _unopened(error) from None
    from catalog import dicom  # with pydicom, which takes 0.2 s to import and most trees do not need

    return dicom.read_instance(path, hash_pixels=hashing == "full"), True, content_hash


def _hashed(found: header.Header, data: bytes) -> Instance | None:
    """Return an instance with its pixels' hashes; None where its pixels must be decoded for that."""
    frames = []
    for frame in found.instance.frames:
        if frame.offset is None or frame.dtype is None:
            return None
        stored = memoryview(data)[frame.offset : frame.offset + frame.length]
        if len(stored) != frame.length or not (found.checked or pixels.fits(stored, np.dtype(frame.dtype), frame.bits_stored)):
            return None
        frames.append(replace(frame, pixel_hash=hashlib.sha256(stored).digest()))
    return replace(found.instance, frames=tuple(frames))


def _read_annotation(folder: str, item: Annotation, hashing: Hashing) -> Read:
    with _local(folder, item.entry) as path:
        return _drawn_in(path, folder, item, hashing)


def _drawn_in(path: Path, folder: str, item: Annotation, hashing: Hashing) -> Read:
    if item.format == "contour":
        drawn = [_read_contour(path, item)]
    else:
        read = _reader(item.format, "read_annotations")(path, {"root": folder, **item.options})
        drawn = [
            replace(
                one,
                structure=one.structure or item.structure,
                reader=one.reader or item.reader,
                refers_to={**item.refers_to, **one.refers_to},
            )
            for one in read
        ]
    return Read(item.entry, item.format, _content_hash(path, item.entry, hashing), drawn=drawn)


def _read_contour(path: Path, item: Annotation) -> Drawn:
    from catalog import contours

    if item.entry.size > contours.MAX_BYTES:
        raise FileError("contour-unreadable", f"{item.entry.size} bytes are too many for a contour; it is left out")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _unopened(error) from None
    outline = polygon([contours.read_points(data)])
    return Drawn("", item.structure, item.reader, "polygon", item.refers_to, polygon=outline, convention=item.convention)


def _content_hash(path: Path, entry: Entry, hashing: Hashing) -> bytes | None:
    if hashing == "none":
        return None
    try:
        with path.open("rb", buffering=0) as file:
            if hashing == "full":
                return hashlib.file_digest(file, "sha256").digest()
            return hashlib.sha256(entry.size.to_bytes(8, "little") + (file.read(HEAD) or b"")).digest()
    except OSError as error:
        raise _unopened(error) from None


def _unopened(error: OSError) -> FileError:
    if isinstance(error, FileNotFoundError):
        return FileError("changed", "it was taken away before it was read; it is left out; ingest again")
    return FileError("no-access", f"{error.strerror}; it is left out; give read access, then ingest again")
