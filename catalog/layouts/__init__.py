"""How a folder's images and annotations are found and paired: one file a layout.

A layout is a module with

* ``recognises(tree) -> bool``: does this folder look like mine?
* ``read(tree) -> Found``: which files are images, which are annotations, and what each annotation says about its image.

A layout reads names and link tables, no image and no contour: `catalog.ingest` does that, in parallel.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

LONGEST_PATH = 2_000  # bytes; PostgreSQL indexes at most 2,704


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of the tree: its path relative to the root, its size in bytes and its modification time in ns."""

    path: str
    size: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Image:
    """A file that should hold images. `patient` is the layout's name for its patient; `sure`: its name promises an image."""

    entry: Entry
    patient: str
    sure: bool


@dataclass(frozen=True, slots=True)
class Annotation:
    """A file with one polygon.

    `candidates` are the image files that its name points at. Where there is none, `number` is looked for among the
    InstanceNumbers below `folder`. Without a folder it stays unpaired, and `unpaired` says why.
    """

    entry: Entry
    structure: str
    reader: str
    convention: Literal["corner", "centre"]
    refers_to: dict[str, str | int]
    number: int
    candidates: tuple[str, ...]
    folder: str | None
    unpaired: str = ""


@dataclass(frozen=True, slots=True)
class Problem:
    """Something about the tree itself that is wrong; becomes a row of ``ingest_error``."""

    path: str
    code: str
    message: str


@dataclass(slots=True)
class Found:
    """What a layout made of a tree. `originals` maps a patient to the name that the annotations' source has for it."""

    images: list[Image] = field(default_factory=list)
    annotations: list[Annotation] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    originals: dict[str, str] = field(default_factory=dict)
    left_over: int = 0


class Tree:
    """The files below a root, walked once. Hidden files and folders are no part of any layout."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.problems: list[Problem] = []
        self.entries = sorted(self._walk(), key=lambda entry: entry.path)

    def _walk(self) -> Iterator[Entry]:
        folders = [self.root]
        while folders:
            folder = folders.pop()
            try:
                with os.scandir(folder) as found:
                    items = list(found)
            except OSError as error:
                self._refuse(
                    folder, "folder-unreadable", f"{error.strerror}: its files are not catalogued; give read access, then ingest again"
                )
                continue
            for item in items:
                if item.name.startswith("."):
                    continue
                try:
                    item.path.encode()
                except UnicodeEncodeError:
                    self._refuse(folder, "name-not-utf8", "a name in this folder is not UTF-8, which PostgreSQL cannot store; rename it")
                    continue
                path = os.path.relpath(item.path, self.root)
                if len(path.encode()) > LONGEST_PATH:
                    self._refuse(folder, "path-too-long", f"a path below it is over {LONGEST_PATH} bytes long; give it shorter names")
                    continue
                try:
                    # Links to folders are not followed: two of them can point at each other.
                    if item.is_dir(follow_symlinks=False):
                        folders.append(Path(item.path))
                    elif item.is_dir():
                        if not Path(item.path).resolve().is_relative_to(self.root):
                            self._refuse(
                                Path(item.path), "folder-link", "a link to a folder elsewhere, which is not followed; put the folder here"
                            )
                    elif item.is_file():
                        found_stat = item.stat()
                        yield Entry(path, found_stat.st_size, found_stat.st_mtime_ns)
                except OSError as error:
                    self._refuse(Path(item.path), "file-unreadable", f"{error.strerror}: not catalogued")

    def _refuse(self, path: Path, code: str, message: str) -> None:
        name = os.path.relpath(path, self.root).encode(errors="replace").decode()
        self.problems.append(Problem(name, code, message))
