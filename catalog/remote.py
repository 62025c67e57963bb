"""Roots that are URLs (``s3://``, ``gs://``, ``https://``, ``file://`` …), through fsspec.

Headers are read by ranges, not as whole objects; what needs all of an object takes it through the local cache (`catalog.cache`), and so
does the feed. An object's version is its size and modification time, or where its storage has none, its ETag in the place of the time.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

from catalog import cache
from catalog.errors import CatalogError, FileError
from catalog.layouts import LONGEST_PATH, Entry, Problem, Tree

CHUNK = 1 << 20
TIMES = ("mtime", "LastModified", "last_modified", "updated", "created", "Last-Modified")
TAGS = ("ETag", "etag", "md5Hash", "ino")


def is_url(place: str) -> bool:
    """Is this the URL of a storage, and not a folder?"""
    return "://" in place


class Url(str):
    """A URL in the place of a folder's path."""

    def __truediv__(self, below: str) -> Url:
        return Url(f"{self}/{below}".rstrip("/"))

    @property
    def name(self) -> str:
        """Its last part."""
        return self.rpartition("/")[2]


class RemoteTree(Tree):
    """The objects below a URL."""

    def __init__(self, url: str) -> None:
        super().__init__(Url(url.rstrip("/")))  # type: ignore[arg-type]

    @property
    def url(self) -> str:
        """Where it lies."""
        return str(self.root)

    def read(self, path: str, limit: int) -> bytes:
        """Return a small object. Raises FileError if it is over `limit` bytes or cannot be read."""
        data = read_range(self.url, path, 0, limit + 1)
        if len(data) > limit:
            raise FileError("unreadable", f"is over {limit} bytes, so it is not what its name says")
        return data

    def start(self, path: str, length: int) -> bytes:
        """Return the first bytes of an object. Raises FileError if it cannot be read."""
        return read_range(self.url, path, 0, length)

    def _walk(self) -> Iterator[Entry]:
        system, folder = opened(self.url)
        try:
            found = system.find(folder, detail=True)
        except Exception as error:
            raise CatalogError(f"{self.url}: cannot be listed ({_said(error)}); nothing was changed") from None
        for name, info in found.items():
            path = name[len(folder) :].lstrip("/")
            if any(part.startswith(".") for part in path.split("/")):
                continue
            if len(path.encode(errors="replace")) > LONGEST_PATH:
                self.problems.append(Problem(path[:200], "path-too-long", f"is over {LONGEST_PATH} bytes long; give it a shorter name"))
                continue
            yield Entry(path, int(info.get("size") or 0), version(info))


@functools.lru_cache(maxsize=64)
def opened(url: str) -> tuple[Any, str]:
    """Return fsspec's file system of a URL, and the folder in it. Raises CatalogError if there is none."""
    try:
        import fsspec
    except ImportError:
        raise CatalogError(f"{url}: fsspec is not installed; `pip install 'scanfeed[remote]'`") from None
    try:
        system, folder = fsspec.core.url_to_fs(url)
    except Exception as error:  # each storage has its own; a missing package is an ImportError or ValueError
        raise CatalogError(f"{url}: cannot be opened ({_said(error)})") from None
    return system, str(folder).rstrip("/")


def version(info: dict[str, Any]) -> int:
    """Return what tells one version of an object from another, as a time in ns since 1970 or in its place."""
    for name in TIMES:
        value = info.get(name)
        if isinstance(value, datetime):
            return int(value.timestamp() * 1e9)
        if isinstance(value, int | float) and value:
            return int(value * 1e9)
        if isinstance(value, str) and value:
            return _number(value)
    return next((_number(str(info[name])) for name in TAGS if info.get(name)), 0)


def read_range(url: str, path: str, start: int, end: int) -> bytes:
    """Return the bytes start … end of an object, fewer at its end. Raises FileError if it cannot be read."""
    system, folder = opened(url)
    try:
        data: bytes = system.cat_file(f"{folder}/{path}", start=start, end=end)
    except Exception as error:
        raise FileError("no-access", f"it cannot be fetched ({_said(error)}); it is left out; try again later") from None
    return data


def fetched(url: str, path: str, size: int, mtime_ns: int, coding: str = "") -> int:
    """Return a descriptor, open for reading, of an object in the local cache, decompressed if it has a coding; the caller closes it.

    Raises:
        FileError: ``changed`` if the storage has another version by now; ``no-access`` if it cannot be fetched; as `Cache.get`.
    """
    key = hashlib.sha256("\0".join((url, path, str(size), str(mtime_ns), coding)).encode(errors="surrogateescape")).hexdigest()

    def make(out: BinaryIO) -> None:
        system, folder = opened(url)
        name = f"{folder}/{path}"
        try:
            info = system.info(name)
            if (int(info.get("size") or 0), version(info)) != (size, mtime_ns):
                raise FileError("changed", "the object is not what was catalogued; run `catalog ingest` on its root again")
            with system.open(name, "rb") as file, gzip.GzipFile(fileobj=file) if coding else file as plain:
                while data := plain.read(CHUNK):
                    out.write(data)
        except FileError:
            raise
        except Exception as error:
            raise FileError("no-access", f"it cannot be fetched ({_said(error)})") from None

    return cache.default_cache().get(key, make)


@contextlib.contextmanager
def local(url: str, entry: Entry) -> Iterator[Path]:
    """Give a path under which an object's bytes can be opened: a temporary file, for readers that take paths.

    Raises:
        FileError: ``no-access`` if it cannot be fetched, ``changed`` if it is not as long as when it was listed.
    """
    system, folder = opened(url)
    with tempfile.TemporaryFile() as file:
        try:
            with system.open(f"{folder}/{entry.path}", "rb") as there:
                shutil.copyfileobj(there, file, CHUNK)
        except Exception as error:
            raise FileError("no-access", f"it cannot be fetched ({_said(error)}); it is left out; try again later") from None
        if file.tell() != entry.size:
            raise FileError("changed", "it is not as long as when it was listed, so it is being written; ingest again")
        file.flush()
        yield path_of(file.fileno())


def path_of(fd: int) -> Path:
    """Return a path under which an open descriptor can be opened again."""
    return next(Path(folder, str(fd)) for folder in ("/proc/self/fd", "/dev/fd") if Path(folder).is_dir())


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def _said(error: Exception) -> str:
    """Return an error's kind: its text may hold a key or a header's value."""
    return type(error).__name__
