"""How a folder's images and annotations are found and paired: one file a layout.

A layout is a module with

* ``recognises(tree) -> str | None``: why this folder looks like mine, in words, or None;
* ``read(tree, options) -> Found``: which files are images, which are annotations, and what each annotation says about its image.

A layout reads names and small tables, no image and no annotation: `catalog.ingest` does that, in parallel.
"""

from __future__ import annotations

import copy
import os
import zlib
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

from catalog.errors import FileError

LONGEST_PATH = 2_000  # bytes; PostgreSQL indexes at most 2,704


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of the tree: its path relative to the root, its size in bytes and its modification time in ns."""

    path: str
    size: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Image:
    """A file that should hold images.

    `patient` is the layout's name for its patient; None: the file says it. `sure`: its name promises an image. `format` says what reads
    it (`catalog.reading.FORMATS`), and `options` is what that needs besides the file, as JSON; a path in it is relative to the root.
    """

    entry: Entry
    patient: str | None
    sure: bool
    format: str = "dicom"
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def read_as(self) -> int:
        """A number that changes when the layout says something else about the file; 0 where it says nothing."""
        if self.patient is None and not self.options:
            return 0
        return zlib.crc32(repr((self.format, self.patient, self.options)).encode(errors="replace"))


@dataclass(frozen=True, slots=True)
class Annotation:
    """A file that holds annotations, and what its name says about them.

    `candidates` are the image files that its name points at. Where there is none, `number` is looked for among the
    InstanceNumbers below `folder`. Where it says neither, what the file itself says counts (`Drawn.refers_to`), and `unpaired` says why
    nothing is looked for. `format` and `options` are as in `Image`.
    """

    entry: Entry
    structure: str = ""
    reader: str = ""
    convention: Literal["corner", "centre"] = "centre"
    refers_to: dict[str, Any] = field(default_factory=dict)
    number: int | None = None
    candidates: tuple[str, ...] = ()
    folder: str | None = None
    unpaired: str = ""
    format: str = "contour"
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def read_as(self) -> int:
        """As `Image.read_as`. Which image it belongs to is looked at each time, and no part of it."""
        said = (self.format, self.structure, self.reader, self.convention, self.refers_to, self.options)
        return zlib.crc32(repr(said).encode(errors="replace"))


@dataclass(frozen=True, slots=True)
class Problem:
    """Something about the tree itself that is wrong; becomes a row of ``ingest_error``."""

    path: str
    code: str
    message: str


@dataclass(slots=True)
class Found:
    """What a layout made of a tree, or several of them: `chosen` says which and why.

    `originals` maps a patient to the name that the annotations' source has for it.
    """

    images: list[Image] = field(default_factory=list)
    annotations: list[Annotation] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    originals: dict[str, str] = field(default_factory=dict)
    left_over: int = 0
    chosen: list[str] = field(default_factory=list)


class Tree:
    """The files below a root, walked once. Hidden files and folders are no part of any layout.

    Or a part of such a tree: `below` a folder, or `without` what others took.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.problems: list[Problem] = []
        self.entries = sorted(self._walk(), key=_path)

    def below(self, prefix: str) -> Tree:
        """Return what lies below a folder (its path with the last /), with paths from there."""
        if not prefix:
            return self
        first = bisect_left(self.entries, prefix, key=_path)
        end = bisect_left(self.entries, f"{prefix[:-1]}0", key=_path)  # 0 comes after /
        cut = len(prefix)
        return self._part(self.root / prefix, [Entry(entry.path[cut:], entry.size, entry.mtime_ns) for entry in self.entries[first:end]])

    def without(self, prefixes: Iterable[str], paths: Set[str] = frozenset()) -> Tree:
        """Return the rest: nothing below these folders, none of these files."""
        beginnings = tuple(prefixes)
        rest = [entry for entry in self.entries if entry.path not in paths and not (beginnings and entry.path.startswith(beginnings))]
        return self._part(self.root, rest)

    def _part(self, root: Path, entries: list[Entry]) -> Tree:
        part = copy.copy(self)
        part.root, part.entries, part.problems = root, entries, []
        return part

    def read(self, path: str, limit: int) -> bytes:
        """Return a small file of the tree. Raises FileError if it is over `limit` bytes or cannot be read."""
        try:
            with (self.root / path).open("rb") as file:
                data = file.read(limit + 1)
        except OSError as error:
            raise FileError("unreadable", f"{error.strerror}; give read access, then ingest again") from None
        if len(data) > limit:
            raise FileError("unreadable", f"is over {limit} bytes, so it is not what its name says")
        return data

    def start(self, path: str, length: int) -> bytes:
        """Return the first bytes of a file. Raises FileError if it cannot be read."""
        try:
            with (self.root / path).open("rb", buffering=0) as file:
                return file.read(length) or b""
        except OSError as error:
            raise FileError("unreadable", f"{error.strerror}; give read access, then ingest again") from None

    def _walk(self) -> Iterator[Entry]:
        """Yield every file. 230,000 a second: a stat each, and no path taken apart or put together that need not be."""
        root = os.fspath(self.root)
        folders = [""]  # below the root, with the last /
        while folders:
            folder = folders.pop()
            try:
                with os.scandir(f"{root}/{folder}") as found:
                    items = list(found)
            except OSError as error:
                self._refuse(
                    folder, "folder-unreadable", f"{error.strerror}: its files are not catalogued; give read access, then ingest again"
                )
                continue
            for item in items:
                name = item.name
                if name.startswith("."):
                    continue
                path = folder + name
                if not name.isascii() and not _is_utf8(name):
                    self._refuse(folder, "name-not-utf8", "a name in this folder is not UTF-8, which PostgreSQL cannot store; rename it")
                    continue
                if len(path) > LONGEST_PATH // 4 and len(path.encode()) > LONGEST_PATH:  # a character takes at most four bytes
                    self._refuse(folder, "path-too-long", f"a path below it is over {LONGEST_PATH} bytes long; give it shorter names")
                    continue
                try:
                    if item.is_file():
                        status = item.stat()
                        yield Entry(path, status.st_size, status.st_mtime_ns)
                    # Links to folders are not followed: two of them can point at each other.
                    elif item.is_dir(follow_symlinks=False):
                        folders.append(f"{path}/")
                    elif item.is_dir() and not Path(item.path).resolve().is_relative_to(self.root):
                        self._refuse(path, "folder-link", "a link to a folder elsewhere, which is not followed; put the folder here")
                except OSError as error:
                    self._refuse(path, "file-unreadable", f"{error.strerror}: not catalogued")

    def _refuse(self, path: str, code: str, message: str) -> None:
        self.problems.append(Problem(path.rstrip("/").encode(errors="replace").decode() or ".", code, message))


_path = attrgetter("path")


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
