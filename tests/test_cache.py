"""The local cache: made once, checked, bounded, and never a wrong byte, whoever is killed."""

from __future__ import annotations

import errno
import fcntl
import gzip
import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest

from catalog import cache
from catalog.cache import TRAILER, Cache, decompressed
from catalog.errors import FileError, UsageError

REPOSITORY = Path(__file__).resolve().parent.parent
GB = 10**9
only_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

# A process that gets one entry of 16 parts, noting each that it makes, and says sha256 of what it got. With a pause below 0 it goes on
# behind the first part when its standard input is closed.
PROCESS = """
import hashlib, os, sys, time
from pathlib import Path
from catalog.cache import Cache
folder, key, limit, pause = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
def make(out):
    with open(folder.parent / "made", "a") as notes:
        notes.write(key + "\\n")
    for part in range(16):
        out.write(key.encode() * 100)
        print("part", flush=True)
        sys.stdin.read() if pause < 0 else time.sleep(pause)
print("begin", flush=True)
fd = Cache(folder, limit).get(key, make)
print(hashlib.sha256(os.read(fd, 6400 * 16)).hexdigest(), flush=True)
"""


def key_of(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def content_of(key: str) -> bytes:
    """What PROCESS makes."""
    return key.encode() * 1600


def writes(data: bytes, made: list[bytes] | None = None) -> Callable[[BinaryIO], None]:
    def make(out: BinaryIO) -> None:
        if made is not None:
            made.append(data)
        out.write(data)

    return make


def get(store: Cache, key: str, make: Callable[[BinaryIO], None]) -> bytes:
    """Get an entry, and return its content."""
    fd = store.get(key, make)
    with os.fdopen(fd, "rb") as file:
        return file.read()[: -TRAILER.size]


def start(folder: Path, key: str, *, limit: int = GB, pause: float = 0.0, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROCESS, str(folder), key, str(limit), str(pause)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY, **options)  # type: ignore[call-overload, no-any-return]


def said(process: subprocess.Popen[str]) -> str:
    """Wait for a process and return its last line."""
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out.splitlines()[-1]


def test_made_once(tmp_path: Path) -> None:
    """An entry is made once and read again by others; nobody else may read it, and what is handed out cannot be written to."""
    made: list[bytes] = []
    for store in (first := Cache(tmp_path / "cache", GB), first, Cache(tmp_path / "cache", GB)):
        assert get(store, key_of("a"), writes(b"content", made)) == b"content"
    assert made == [b"content"]
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700
    assert [path.stat().st_mode & 0o777 for path in (tmp_path / "cache").iterdir()] == [0o600]
    fd = first.get(key_of("a"), writes(b""))
    assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
    assert not os.get_inheritable(fd)
    os.close(fd)
    assert get(first, key_of("empty"), writes(b"")) == b""
    for wrong in ("", "a" * 63, "../" + "a" * 61, "A" * 64):
        with pytest.raises(ValueError, match="64 hexadecimal"):
            first.get(wrong, writes(b""))


def test_processes_that_ask_at_once(tmp_path: Path) -> None:
    """Of six processes that want one entry at the same time one makes it; all get it."""
    key = key_of("wanted")
    processes = [start(tmp_path / "cache", key, pause=0.02) for _ in range(6)]
    assert {said(process) for process in processes} == {hashlib.sha256(content_of(key)).hexdigest()}
    assert (tmp_path / "made").read_text() == f"{key}\n"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [key]


def test_threads_that_ask_at_once(tmp_path: Path) -> None:
    """Threads of one process wait for each other as processes do."""
    store, made, got = Cache(tmp_path / "cache", GB), [], []

    def make(out: BinaryIO) -> None:
        made.append(1)
        time.sleep(0.2)
        out.write(b"x" * 1000)

    threads = [threading.Thread(target=lambda: got.append(get(store, key_of("a"), make))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (made, got) == ([1], [b"x" * 1000] * 8)


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)


def swapped(path: Path) -> None:
    """Another entry under this one's name: sound, and wrong."""
    get(Cache(path.parent, GB), key_of("other"), writes(b"y" * 5000))
    (path.parent / key_of("other")).rename(path)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a flipped bit": flipped,
    "cut off": lambda path: os.truncate(path, 4000),
    "cut off in the trailer": lambda path: os.truncate(path, 5000 + 10),
    "too long": lambda path: os.truncate(path, 9000),
    "zeros, as after a power cut": lambda path: path.write_bytes(bytes(5000 + TRAILER.size)),
    "empty": lambda path: os.truncate(path, 0),
    "another entry": swapped,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_entry(tmp_path: Path, damage: str) -> None:
    """A damaged entry is made again, by a process that opens it for the first time and by one that had found it sound."""
    key, made = key_of("a"), list[bytes]()
    old = Cache(tmp_path / "cache", GB)
    for store in (Cache(tmp_path / "cache", GB), old):
        assert get(old, key, writes(b"x" * 5000)) == b"x" * 5000
        made.clear()
        time.sleep(0.01)  # a file system's clock ticks every 4 ms
        DAMAGES[damage](tmp_path / "cache" / key)
        assert get(store, key, writes(b"x" * 5000, made)) == b"x" * 5000
        assert len(made) == 1
        assert get(store, key, writes(b"x" * 5000, made)) == b"x" * 5000
        assert len(made) == 1


def test_eviction(tmp_path: Path) -> None:
    """The least recently used make room, the folder stays within its limit, and what somebody has open goes on working."""
    size = 1000 - TRAILER.size
    store = Cache(tmp_path / "cache", 5_080)  # room for five: a 64th is kept free
    for name in "abcde":
        assert get(store, key_of(name), writes(name.encode() * size)) == name.encode() * size
    opened = store.get(key_of("a"), writes(b""))  # used again: b is the oldest now
    assert get(store, key_of("f"), writes(b"f" * size)) == b"f" * size
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {key_of(name) for name in "acdef"}
    for name in "ghijk":
        get(store, key_of(name), writes(b"x" * size))
        assert sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) <= 5_080
    assert not (tmp_path / "cache" / key_of("a")).exists()
    assert os.pread(opened, size, 0) == b"a" * size
    os.close(opened)
    made: list[bytes] = []
    assert get(store, key_of("a"), writes(b"a" * size, made)) == b"a" * size
    assert len(made) == 1


def test_what_is_being_made_is_not_evicted(tmp_path: Path) -> None:
    """While one process makes an entry, another fills the cache: both get theirs, and the one in the making is made once."""
    key = key_of("slow")
    slow = start(tmp_path / "cache", key, limit=300_000, pause=-1, stdin=subprocess.PIPE)
    assert slow.stdout is not None
    assert [slow.stdout.readline() for _ in range(2)] == ["begin\n", "part\n"]
    store = Cache(tmp_path / "cache", 300_000)
    for number in range(8):
        assert get(store, key_of(str(number)), writes(b"x" * 90_000)) == b"x" * 90_000
    assert (tmp_path / "cache" / f"{key}.part").exists()
    assert said(slow) == hashlib.sha256(content_of(key)).hexdigest()
    assert (tmp_path / "made").read_text() == f"{key}\n"


def test_killed_in_the_middle(tmp_path: Path) -> None:
    """What a process killed by -9 had begun is never served: one that waits takes over, and what nobody asks for again is removed."""
    key = key_of("a")
    killed = start(tmp_path / "cache", key, pause=60)
    assert killed.stdout is not None
    assert [killed.stdout.readline() for _ in range(2)] == ["begin\n", "part\n"]
    waiting = start(tmp_path / "cache", key)
    assert waiting.stdout is not None
    assert waiting.stdout.readline() == "begin\n"
    time.sleep(0.1)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [f"{key}.part"]
    killed.kill()
    killed.communicate()
    assert said(waiting) == hashlib.sha256(content_of(key)).hexdigest()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [key]
    lost = start(tmp_path / "cache", key_of("lost"), pause=60)
    assert lost.stdout is not None
    assert [lost.stdout.readline() for _ in range(2)] == ["begin\n", "part\n"]
    lost.kill()
    lost.communicate()
    assert get(Cache(tmp_path / "cache", GB), key_of("b"), writes(b"b")) == b"b"
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {key, key_of("b")}


def kill_at_random(tmp_path: Path, kills: int) -> None:
    chance, folder = random.Random(7), tmp_path / "cache"
    keys = [key_of(str(number)) for number in range(4)]
    done = killed = 0
    processes: list[tuple[str, subprocess.Popen[str]]] = []
    while killed < kills or processes:
        while killed < kills and len(processes) < 3:
            key = chance.choice(keys)
            processes.append((key, start(folder, key, limit=250_000, pause=0.002)))  # two of four fit
        time.sleep(chance.uniform(0, 0.05))
        key, process = processes.pop(0)
        if killed < kills:
            time.sleep(chance.uniform(0, 0.08))
            process.send_signal(signal.SIGKILL)
            killed += 1
        out, err = process.communicate(timeout=60)
        assert process.returncode in (0, -signal.SIGKILL), err
        if process.returncode == 0:
            assert out.splitlines()[-1] == hashlib.sha256(content_of(key)).hexdigest()
            done += 1
    store = Cache(folder, 250_000)
    assert get(store, key_of("last"), writes(b"last")) == b"last"
    left = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert not [name for name in left if name.endswith(".part")]
    assert sum(left.values()) <= 250_000
    for key in keys:
        assert get(store, key, writes(content_of(key))) == content_of(key)
    assert done


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """Processes are killed by -9 at random moments while others want the same entries: no wrong byte, and nothing is left over."""
    kill_at_random(tmp_path, 25)


@pytest.mark.soak
def test_killed_at_any_moment_for_long(tmp_path: Path) -> None:
    """The same, 1,000 times."""
    kill_at_random(tmp_path, 1_000)


@pytest.mark.parametrize("error", [FileError("truncated", "cut off"), OSError(errno.EIO, "the source"), KeyboardInterrupt(), ValueError()])
def test_what_make_raises(tmp_path: Path, error: BaseException) -> None:
    """What `make` raises, an error of reading the source too, comes out as it is and leaves nothing; the next one makes it."""

    def make(out: BinaryIO) -> None:
        out.write(b"half")
        raise error

    store = Cache(tmp_path / "cache", GB)
    with pytest.raises(type(error)) as caught:
        store.get(key_of("a"), make)
    assert caught.value is error
    assert list((tmp_path / "cache").iterdir()) == []
    assert get(store, key_of("a"), writes(b"whole")) == b"whole"


def test_who_waits_for_a_make_that_fails(tmp_path: Path) -> None:
    """A process that waits makes the entry itself when the one it waits for gives up."""
    store, begun = Cache(tmp_path / "cache", GB), threading.Event()

    def fail(out: BinaryIO) -> None:
        begun.set()
        time.sleep(0.3)
        raise FileError("truncated", "cut off")

    def first() -> None:
        with pytest.raises(FileError):
            store.get(key_of("a"), fail)

    thread = threading.Thread(target=first)
    thread.start()
    begun.wait()
    assert get(store, key_of("a"), writes(b"whole")) == b"whole"
    thread.join()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [key_of("a")]


def test_made_between_look_and_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry that another makes after this one looked for it, and before it has the lock, is not made twice."""
    store, made = Cache(tmp_path / "cache", GB), list[bytes]()
    open_part = Cache._open_part

    def slow(self: Cache, part: Path) -> int:
        assert get(Cache(tmp_path / "cache", GB), key_of("a"), writes(b"x", made)) == b"x"
        return open_part(self, part)

    monkeypatch.setattr(store, "_open_part", slow.__get__(store))
    assert get(store, key_of("a"), writes(b"x", made)) == b"x"
    assert made == [b"x"]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [key_of("a")]


def test_what_a_killed_process_left(tmp_path: Path) -> None:
    """A part longer than the entry: none of it is in the entry."""
    (tmp_path / "cache").mkdir(mode=0o700)
    (tmp_path / "cache" / f"{key_of('a')}.part").write_bytes(b"junk" * 1000)
    store = Cache(tmp_path / "cache", GB)
    assert get(store, key_of("a"), writes(b"whole")) == b"whole"
    assert get(Cache(tmp_path / "cache", GB), key_of("a"), writes(b"")) == b"whole"


def test_entry_over_the_limit(tmp_path: Path) -> None:
    """An entry larger than the cache is refused before it is written, and evicts nothing."""
    store = Cache(tmp_path / "cache", 10_000)
    get(store, key_of("a"), writes(b"a" * 100))
    with pytest.raises(FileError, match=r"1e-05 GB .* CATALOG_CACHE_GB") as caught:
        store.get(key_of("b"), writes(b"b" * 10_000))
    assert caught.value.code == "cache-limit"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [key_of("a")]


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    """What the system refuses to write is said in one line, and no half entry is left."""
    limited = start(tmp_path / "cache", key_of("a"), preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)))
    _, err = limited.communicate(timeout=60)
    assert limited.returncode == 1
    assert err.splitlines()[-1].startswith("catalog.errors.FileError: the cache in ")
    assert "disk is full; free some space" in err.splitlines()[-1]
    assert list((tmp_path / "cache").iterdir()) == []


@only_root
def test_full_disk(tmp_path: Path) -> None:
    """A full disk is said in one line, and no half entry is left; what was there stays."""
    script = """
import os, sys
from pathlib import Path
from catalog.cache import Cache
from catalog.errors import FileError
folder = Path(sys.argv[1], "cache")
os.close(Cache(folder, 10**9).get("a" * 64, lambda out: out.write(b"x" * 100_000)))
try:
    Cache(folder, 10**9).get("b" * 64, lambda out: [out.write(b"x" * 100_000) for _ in range(100)])
except FileError as error:
    print(error.code, "\\n" in str(error), sorted(path.name[:1] for path in folder.iterdir()))
os.close(Cache(folder, 10**9).get("a" * 64, None))
"""
    mount = 'mount -t tmpfs -o size=1m,mode=700 none "$1" && exec "$2" -c "$3" "$1"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", mount, "sh", str(tmp_path), sys.executable, script], capture_output=True, text=True, cwd=REPOSITORY
    )
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip("no disk can be mounted here")
    assert (done.returncode, done.stdout.strip()) == (0, "cache-full False ['a']"), done.stderr


def test_folder_that_is_not_ones_own(tmp_path: Path) -> None:
    """A folder that others can write to, a file in its place, or a parent that is a file is refused, not repaired."""
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    (tmp_path / "file").touch()
    for folder in (shared, tmp_path / "file", tmp_path / "file" / "cache"):
        with pytest.raises(FileError) as caught:
            Cache(folder, GB).get(key_of("a"), writes(b"a"))
        assert (caught.value.code, "\n" in str(caught.value)) == ("cache-unusable", False)
    assert shared.stat().st_mode & 0o777 == 0o777
    assert list(shared.iterdir()) == []


@only_root
def test_entries_of_another_user(tmp_path: Path) -> None:
    """An entry that another user put there is not served."""
    store, key = Cache(tmp_path / "cache", GB), key_of("a")
    get(store, key, writes(b"good"))
    os.chown(tmp_path / "cache" / key, 65534, 65534)
    assert get(Cache(tmp_path / "cache", GB), key, writes(b"mine")) == b"mine"


def test_folder_removed_meanwhile(tmp_path: Path) -> None:
    """A user may remove the folder at any time: it is made anew."""
    store = Cache(tmp_path / "cache", GB)
    for name in "ab":
        assert get(store, key_of(name), writes(b"x")) == b"x"
        for path in (tmp_path / "cache").iterdir():
            path.unlink()
        (tmp_path / "cache").rmdir()
    assert get(store, key_of("a"), writes(b"y")) == b"y"


# ------------------------------------------------------------------------------------------------------- decompressed


def zipped(path: Path, data: bytes) -> tuple[Path, str, int, int]:
    """Write a gzip file; returns what `decompressed` is asked with."""
    path.write_bytes(data)
    return path, "gzip", path.stat().st_size, path.stat().st_mtime_ns


def test_decompressed(tmp_path: Path) -> None:
    """A gzip file's content, of several members too, by offset; from CATALOG_HOME's cache, where it is once."""
    data = os.urandom(3 << 20)
    file = zipped(tmp_path / "a.gz", gzip.compress(data[:1000], 1) + gzip.compress(data[1000:], 1))
    for _ in range(2):
        fd = decompressed(*file)
        assert os.pread(fd, 500, 800) == data[800:1300]
        assert os.fstat(fd).st_size == len(data) + TRAILER.size
        os.close(fd)
    assert len(list(Path(os.environ["CATALOG_HOME"], "cache").iterdir())) == 1


def test_decompressed_and_changed(tmp_path: Path) -> None:
    """A file that is not the catalogued one any more is refused, though its old content is cached; one that is gone is an OSError."""
    path, coding, size, mtime_ns = file = zipped(tmp_path / "a.gz", gzip.compress(b"old"))
    os.close(decompressed(*file))
    path.write_bytes(gzip.compress(b"new"))
    os.utime(path, ns=(0, mtime_ns + 1))
    with pytest.raises(FileError) as caught:
        decompressed(*file)
    assert caught.value.code == "changed"
    fd = decompressed(path, coding, size, mtime_ns + 1)
    assert os.read(fd, 3) == b"new"
    os.close(fd)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        decompressed(path, coding, size, mtime_ns + 1)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (gzip.compress(os.urandom(100_000))[:-5000], "truncated"),
        (gzip.compress(b"a" * 1000)[:-8] + bytes(8), "unreadable"),
        (gzip.compress(b"a" * 1000)[:10] + b"\xff" * 100, "unreadable"),
        (gzip.compress(b"a" * 1000) + b"garbage", "unreadable"),
        (b"no gzip", "unreadable"),
        (gzip.compress(bytes(20_000_000)), "cache-limit"),
    ],
    ids=["cut off", "wrong checksum", "damaged", "something after it", "no gzip", "a bomb"],
)
def test_what_does_not_decompress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, code: str) -> None:
    """What is damaged, or would fill the disk, is refused in one line without a path, and leaves nothing in the cache."""
    monkeypatch.setenv("CATALOG_CACHE_GB", "0.01")
    with pytest.raises(FileError) as caught:
        decompressed(*zipped(tmp_path / "a.gz", data))
    assert (caught.value.code, "a.gz" in str(caught.value), "\n" in str(caught.value)) == (code, False, False)
    assert list(Path(os.environ["CATALOG_HOME"], "cache").iterdir()) == []


def test_which_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CATALOG_HOME's cache, else the user's cache folder; 10 GB unless CATALOG_CACHE_GB says otherwise, and nonsense is refused."""
    assert cache.default_cache().folder == Path(os.environ["CATALOG_HOME"], "cache")
    monkeypatch.delenv("CATALOG_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert (cache.default_cache().folder, cache.default_cache().limit_bytes) == (tmp_path / "xdg" / "scanfeed", 10 * GB)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert cache.default_cache().folder == tmp_path / "me" / ".cache" / "scanfeed"
    monkeypatch.setenv("CATALOG_CACHE_GB", "2.5")
    assert cache.default_cache().limit_bytes == 2_500_000_000
    for wrong in ("0", "-1", "much", "nan", "inf"):
        monkeypatch.setenv("CATALOG_CACHE_GB", wrong)
        with pytest.raises(UsageError, match="CATALOG_CACHE_GB"):
            cache.default_cache()


def test_a_decode_worker_loads_little() -> None:
    """`import catalog.cache` loads the standard library alone."""
    script = "import json, sys; before = set(sys.modules); import catalog.cache; print(json.dumps(sorted(set(sys.modules) - before)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert {name.partition(".")[0] for name in json.loads(done.stdout)} - sys.stdlib_module_names == {"catalog"}
