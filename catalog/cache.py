"""What compressed files hold: read once from front to end, or kept decoded on a local disk and then read by offset.

The cache is a folder of one user (0700) that any number of its processes share. An entry is a file named by its key: the content and
then a trailer of 48 bytes with its length and sha256, so that content and checksum come and go in one rename. While it is made it is
``<key>.part`` and locked (flock); whoever waits for that lock finds the file renamed, or gone because its maker failed, and looks
again. A killed maker's lock ends with it, so what it left is taken over or removed and never served.

Nothing here needs more than the standard library: decode workers use it.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import gzip
import hashlib
import io
import math
import os
import re
import stat
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

from catalog.errors import FileError, UsageError

with contextlib.suppress(ImportError):  # Windows, where nothing is cached
    import fcntl

DEFAULT_GB = 10.0
CHUNK = 1 << 20
KEY = re.compile(r"[0-9a-f]{64}")
TRAILER = struct.Struct("<8sQ32s")
MAGIC = b"scanfeed"
MOST_DEFLATED = 1_032  # deflate's best: a match of 258 bytes in 2 bits (RFC 1951 3.2.5)
MOST_AFTER = 64 << 20  # bytes that may follow what is wanted of a compressed file
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Content:
    """What a file holds once decompressed, from front to end; `open_content` opens it. `coding` is "gzip", or "" for a file as it lies."""

    def __init__(self, file: BinaryIO, coding: str, size: int) -> None:
        self.coding = coding
        self._file = file
        self._size = size

    def expect(self, total: int) -> None:
        """Refuse a file that cannot hold `total` bytes whatever is in it, before anything is allocated for them.

        Raises:
            FileError: ``truncated``.
        """
        most = self._size * MOST_DEFLATED if self.coding else self._size
        if total > most:
            holds = f"can hold at most {most}" if self.coding else f"has {most}"
            raise FileError("truncated", f"its header promises {total} bytes and the file {holds}, so it is cut off or its header wrong")

    def take(self, count: int) -> bytes:
        """Return the next `count` bytes.

        Raises:
            FileError: ``truncated`` if there are fewer.
        """
        data = self._file.read(count)
        if len(data) != count:
            raise FileError("truncated", f"it ends {count - len(data)} bytes too early, so it is cut off or its header wrong")
        return data

    def skip(self, count: int) -> None:
        """Leave `count` bytes out."""
        while count > 0:
            count -= len(self.take(min(count, CHUNK)))

    def finish(self) -> None:
        """Read a compressed file to its end, where its checksum lies.

        Raises:
            FileError: ``unreadable`` if the checksum is wrong, or far more follows than an image file holds.
        """
        after = 0
        while self.coding and (data := self._file.read(CHUNK)):
            after += len(data)
            if after > MOST_AFTER:
                raise FileError("unreadable", f"over {MOST_AFTER} bytes follow its images, so it is not what its header says")


@contextlib.contextmanager
def open_content(path: Path) -> Iterator[Content]:
    """Open a file, decompressing it if it begins as gzip does, whatever its name; in the block, errors of reading become FileError.

    Raises:
        FileError: ``unreadable``; ``truncated`` where a gzip stream ends too early. The message does not repeat the path.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if file.peek(2)[:2] == b"\x1f\x8b":
                with gzip.GzipFile(fileobj=file) as plain:
                    yield Content(cast("BinaryIO", plain), "gzip", size)
            else:
                yield Content(file, "", size)
    except EOFError:
        raise FileError("truncated", "its gzip stream ends too early, so the file is cut off") from None
    except (gzip.BadGzipFile, zlib.error):
        raise FileError("unreadable", "its gzip stream is damaged, so what it holds cannot be trusted; get the file again") from None
    except OSError as error:
        raise FileError("unreadable", f"it cannot be read: {error.strerror or type(error).__name__}") from error


def decompressed(path: Path, coding: str, size: int, mtime_ns: int) -> int:
    """Return a descriptor, open for reading, of what a file decompresses to, from the user's cache; the caller closes it.

    Offsets count from its start; 48 bytes of the cache's own follow the content. The file itself is only asked for its size and time,
    which must be those given, unless the content has to be made.

    Raises:
        FileError: ``changed`` if the file is another by now; ``truncated`` or ``unreadable`` where it does not decompress;
            ``cache-limit``, ``cache-full`` or ``cache-unusable`` where its content cannot be kept.
        OSError: If the file cannot be found.
        UsageError: If CATALOG_CACHE_GB is no number above 0.
    """
    if coding != "gzip":
        raise FileError("no-decoder", f"coding {coding!r} is unknown to this version, so its pixels cannot be found")
    _check_unchanged(path.stat(), size, mtime_ns)
    key = hashlib.sha256("\0".join((os.path.abspath(path), str(size), str(mtime_ns), coding)).encode(errors="surrogateescape"))  # noqa: PTH100

    def make(out: BinaryIO) -> None:
        with path.open("rb") as file, gzip.GzipFile(fileobj=file) as plain:
            try:
                while data := plain.read(CHUNK):
                    out.write(data)
            except EOFError:
                raise FileError("truncated", "its gzip stream ends too early, so the file is cut off") from None
            except (gzip.BadGzipFile, zlib.error):
                raise FileError("unreadable", "its gzip stream is damaged; get the file again") from None
            _check_unchanged(os.fstat(file.fileno()), size, mtime_ns)

    return default_cache().get(key.hexdigest(), make)


def _check_unchanged(found: os.stat_result, size: int, mtime_ns: int) -> None:
    if (found.st_size, found.st_mtime_ns) != (size, mtime_ns):
        raise FileError("changed", "the file is not what was catalogued; run `catalog ingest` on its root again")


def default_cache() -> Cache:
    """Return the cache of this user: in ``$CATALOG_HOME/cache``, else the user's cache folder; of CATALOG_CACHE_GB (10) GB.

    Raises:
        FileError: ``cache-unusable`` if there is no home folder either.
        UsageError: If CATALOG_CACHE_GB is no number above 0.
    """
    return _cache(*(os.environ.get(name, "") for name in ("CATALOG_HOME", "XDG_CACHE_HOME", "CATALOG_CACHE_GB")))


@functools.cache
def _cache(home: str, user_cache: str, gigabytes: str) -> Cache:
    try:
        limit = float(gigabytes or DEFAULT_GB)
    except ValueError:
        limit = math.nan
    if not 0 < limit < 1e9:
        raise UsageError("CATALOG_CACHE_GB must be a number of gigabytes above 0, such as 10")
    try:
        if home:
            folder = Path(home).expanduser().absolute() / "cache"
        else:
            folder = (Path(user_cache) if Path(user_cache).is_absolute() else Path.home() / ".cache") / "scanfeed"
    except RuntimeError:
        raise FileError(
            "cache-unusable", "this user has no home folder to cache in; set CATALOG_HOME to a folder by its full path"
        ) from None
    return Cache(folder, int(limit * 1e9))


class Cache:
    """Decoded files in a folder of their own, at most `limit_bytes` of them, the least recently used of which make room.

    Every process sees to the limit for itself: while several fill it, the folder may be over by a 64th of the limit for each of them.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self._checked: dict[str, tuple[int, ...]] = {}
        self._room = 0  # bytes that this process may add before it looks at the folder again

    def get(self, key: str, make: Callable[[BinaryIO], None]) -> int:
        """Return a descriptor of the entry, open for reading, for the caller to close; `make` writes it if there is none.

        Of several processes or threads that ask at once one makes it, and the others wait. An entry is compared with its checksum when
        a process first opens it and whenever it was written to since; one that does not agree is made again. An open entry that is
        evicted goes on working. What `make` raises leaves no entry.

        Args:
            key: 64 hexadecimal digits that say what the content is.

        Raises:
            FileError: ``cache-limit`` for an entry larger than the cache, ``cache-full`` for a full disk, ``cache-unusable``.
            ValueError: If the key is none.
        """
        if not KEY.fullmatch(key):
            raise ValueError(f"a key is 64 hexadecimal digits, not {key!r}")
        while True:
            if (found := self._open(key)) is not None:
                return found
            part = self.folder / f"{key}.part"
            with self._errors():
                fd = self._open_part(part)
            try:
                with self._errors():
                    fcntl.flock(fd, fcntl.LOCK_EX)
                    ours = _is_file(fd, part)
                if ours and (found := self._open(key)) is not None:  # made between our look and our lock
                    part.unlink(missing_ok=True)
                    return found
                if ours:
                    return self._make(key, fd, part, make)
            finally:
                os.close(fd)

    def _open(self, key: str) -> int | None:
        """Return a descriptor of an entry that is what was written; None if there is none such."""
        with self._errors():
            try:
                fd = os.open(f"{self.folder}/{key}", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            except FileNotFoundError:
                return None
            try:
                found = os.fstat(fd)
                identity = _identity(found)
                if self._checked.get(key) != identity:
                    if found.st_uid != os.geteuid() or not _agrees(fd, key, found.st_size):
                        os.close(fd)
                        return None
                    self._checked[key] = identity
                _used(fd)
            except BaseException:
                os.close(fd)
                raise
            return fd

    def _open_part(self, part: Path) -> int:
        """Open what an entry is made in. The folder is looked at each time: a user may have removed it meanwhile."""
        with contextlib.suppress(FileExistsError):
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self.folder.mkdir(mode=0o700)
        found = self.folder.stat()
        if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise FileError(
                "cache-unusable", f"the cache in {self.folder} is not this user's alone; set CATALOG_HOME to a folder of your own"
            )
        return os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)

    def _make(self, key: str, fd: int, part: Path, make: Callable[[BinaryIO], None]) -> int:
        ready = None
        try:
            with self._errors():
                os.ftruncate(fd, 0)  # a killed maker's part
            entry = _Entry(self, fd, key)
            make(cast("BinaryIO", entry))
            entry.seal()
            with self._errors():
                self._make_room(part.name, entry.size)
                ready = os.open(part, os.O_RDONLY | os.O_CLOEXEC)
                _used(ready)
                part.rename(self.folder / key)
                self._checked[key] = _identity(os.fstat(ready))
        except BaseException:
            if ready is not None:
                os.close(ready)
            part.unlink(missing_ok=True)
            raise
        return ready

    def _make_room(self, new: str, size: int) -> None:
        """Evict until the new entry, which lies there as a part, fits. Listing 40,000 entries takes 0.3 s, so not each time."""
        self._room -= size
        if self._room >= 0:
            return
        total = 0
        entries: list[tuple[int, int, str]] = []
        with os.scandir(self.folder) as found:
            for item in found:
                with contextlib.suppress(FileNotFoundError):
                    if KEY.fullmatch(item.name):
                        status = item.stat(follow_symlinks=False)
                        entries.append((status.st_atime_ns, status.st_size, item.name))
                    elif item.name == new or (item.name.endswith(".part") and not _removed_if_dead(Path(item.path))):
                        status = item.stat(follow_symlinks=False)
                    else:
                        continue
                    total += status.st_size
        target = self.limit_bytes - self.limit_bytes // 64
        for _, freed, name in sorted(entries):
            if total <= target:
                break
            (self.folder / name).unlink(missing_ok=True)
            self._checked.pop(name, None)
            total -= freed
        self._room = max(0, min(self.limit_bytes // 64, self.limit_bytes - total))

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in FULL:
                code, why = "cache-full", "its disk is full; free some space there, or set CATALOG_HOME to another disk"
            else:
                code, why = "cache-unusable", f"{error.strerror}; set CATALOG_HOME to a folder of your own"
            raise FileError(code, f"the cache in {self.folder} cannot keep what this file holds: {why}") from error


class _Entry(io.RawIOBase):
    """What `make` writes to: counts, hashes, and knows an error of the cache from one of what is read for it."""

    def __init__(self, cache: Cache, fd: int, key: str) -> None:
        self.size = 0
        self._cache = cache
        self._fd = fd
        self._hash = hashlib.sha256(key.encode())

    def writable(self) -> bool:
        return True

    def write(self, data: memoryview | bytes, /) -> int:  # type: ignore[override]
        view = memoryview(data).cast("B")
        if self.size + len(view) + TRAILER.size > self._cache.limit_bytes:
            raise FileError(
                "cache-limit",
                f"it decompresses to more than the {self._cache.limit_bytes / 1e9:g} GB that the cache may hold; "
                "if it is no damaged file, set CATALOG_CACHE_GB higher",
            )
        self._hash.update(view)
        self._append(view)
        return len(view)

    def seal(self) -> None:
        self._append(memoryview(TRAILER.pack(MAGIC, self.size, self._hash.digest())))

    def _append(self, view: memoryview) -> None:
        with self._cache._errors():
            while view:
                count = os.write(self._fd, view)
                self.size += count
                view = view[count:]


def _agrees(fd: int, key: str, size: int) -> bool:
    """Whether an entry is what was written."""
    length = size - TRAILER.size
    if length < 0:
        return False
    magic, said, digest = TRAILER.unpack(os.pread(fd, TRAILER.size, length).ljust(TRAILER.size, b"\0"))
    if (magic, said) != (MAGIC, length):
        return False
    found = hashlib.sha256(key.encode())
    at = 0
    while at < length and (data := os.pread(fd, min(CHUNK, length - at), at)):
        found.update(data)
        at += len(data)
    return bool(found.digest() == digest)


def _identity(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _used(fd: int) -> None:
    """Note that an entry is used now, and leave when it was written.

    Set, because a file system mounted noatime keeps no such time, and before Linux 6.13 others count it in ticks: entries of one
    tick would be evicted by their names.
    """
    os.utime(fd, ns=(time.time_ns(), os.fstat(fd).st_mtime_ns))


def _is_file(fd: int, path: Path) -> bool:
    """Whether an open file still has this name."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    return _identity(found)[:2] == _identity(os.fstat(fd))[:2]


def _removed_if_dead(part: Path) -> bool:
    """Remove a part whose maker is gone, which nothing holds locked."""
    fd = os.open(part, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_file(fd, part):
            part.unlink()
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
