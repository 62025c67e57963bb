"""Where an export goes to, and how far it is: a folder of tar shards, or an HDF5 file. An export that was ended goes on from there.

While it is unfinished its name ends in ``.part`` (of a folder its manifest.json's), and a lock keeps a second one out. A shard that is
there is whole, and so is a row of an HDF5 file that has a sample key.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from catalog import shards
from catalog.errors import CatalogError, DriftError, UsageError
from catalog.shards import Names, Rows, Sample, Shard

with contextlib.suppress(ImportError):  # not on Windows
    import fcntl

Numbers = npt.NDArray[np.int64]

ROWS_AT_ONCE = 64  # samples of an HDF5 file that a process writes before it is given others
MANIFEST = "manifest.json"


class Plan(NamedTuple):
    """What is exported, before where it goes to."""

    snapshot_id: int
    manifest: dict[str, Any]
    names: Names
    numbers: Numbers  # of the samples, ascending
    patients: Numbers  # of each
    shapes: dict[tuple[int, int], Numbers]  # (rows, columns) → places in `numbers`
    part_bytes: int


class Folder:
    """Shards for webdataset: ``shard-000000.tar`` … and ``manifest.json``, until all are there ``manifest.json.part``."""

    def __init__(self, place: Path, plan: Plan) -> None:
        self.place, self.plan, self.finished = place, plan, False
        self._each = plan.manifest["shard"]
        self._digits = max(6, len(str(plan.numbers[-1])))

    def begun(self) -> list[Numbers]:
        """Return places of the samples that are still to be written, a shard each; changes nothing."""
        found = next((path for path in (self.place / MANIFEST, self.place / f"{MANIFEST}.part") if path.is_file()), None)
        if found is not None:
            _compare(self.place, _manifest(found.read_bytes(), found), self.plan)
        elif self.place.exists() and (not self.place.is_dir() or set(self.place.iterdir()) - set(self._left())):
            raise UsageError(f"{self.place}: is there and holds no export; give a new folder")
        places = np.arange(len(self.plan.numbers))
        each = [places[start : start + self._each] for start in range(0, len(places), self._each)]
        todo = [some for some in each if not self._path(some).is_file()]
        self.finished = not todo and found == self.place / MANIFEST
        return todo

    def begin(self, stack: contextlib.ExitStack) -> list[Numbers]:
        """The same, with the folder made and locked."""
        self.begun()
        self.place.mkdir(parents=True, exist_ok=True)
        _locked(self.place, stack)
        for left in self._left():
            left.unlink(missing_ok=True)
        todo = self.begun()
        if todo and not (self.place / f"{MANIFEST}.part").is_file():
            (self.place / MANIFEST).unlink(missing_ok=True)  # shards were taken away
            new = self.place / f".{MANIFEST}.new"
            with naming(self.place):
                with new.open("w") as file:
                    json.dump(self.plan.manifest, file, indent=1)
                    file.write("\n")
                    file.flush()
                    os.fsync(file.fileno())
                new.replace(self.place / f"{MANIFEST}.part")
        return todo

    def task(self, places: Numbers, samples: Sequence[Sample]) -> Shard:
        """Return what a process is to write."""
        return Shard(self._path(places), samples, self.plan.names, self._digits)

    def finish(self) -> None:
        """Say that all is there."""
        (self.place / f"{MANIFEST}.part").replace(self.place / MANIFEST)

    def _left(self) -> list[Path]:
        """Return what one that was killed left behind."""
        return [*self.place.glob(".shard-*.part"), *self.place.glob(f".{MANIFEST}.new")]

    def _path(self, places: Numbers) -> Path:
        return self.place / f"shard-{places[0] // self._each:06d}.tar"


class File:
    """One HDF5 file, until it is whole with ``.part`` behind its name. Images of several shapes lie in a group a shape."""

    def __init__(self, place: Path, plan: Plan) -> None:
        self.place, self.plan, self.finished = place, plan, False
        self._part = place.with_name(f"{place.name}.part")
        self._fd = -1
        self._places: dict[tuple[int, int], dict[str, tuple[int, int]]] = {}

    def begun(self) -> list[Numbers]:
        """Return places of the samples that are still to be written, some at a time; changes nothing."""
        if self.place.exists():
            self._open(self.place)
            self.finished = True
            return []
        if self._part.exists():
            self._open(self._part)
            return self._missing()
        return list(_some(self.plan.shapes.values()))

    def begin(self, stack: contextlib.ExitStack) -> list[Numbers]:
        """The same, with the file made, which has all its room from then on, and locked."""
        if self.place.exists():
            return self.begun()
        self.place.parent.mkdir(parents=True, exist_ok=True)
        if not self._part.exists():
            new = self.place.with_name(f".{self.place.name}.{os.getpid()}.new")
            with naming(self.place):
                new.touch()  # h5py says no file's name, and no reason
                try:
                    self._make(new)
                    new.replace(self._part)
                finally:
                    new.unlink(missing_ok=True)
        self._fd = _locked(self._part, stack)
        for left in self.place.parent.glob(f".{glob.escape(self.place.name)}.*.new"):  # of one that was killed
            left.unlink(missing_ok=True)
        return self.begun()

    def task(self, places: Numbers, samples: Sequence[Sample]) -> Rows:
        """Return what a process is to write: samples of one shape, one behind the other."""
        shape = (samples[0].item.rows, samples[0].item.columns)
        first = int(np.searchsorted(self.plan.shapes[shape], places[0]))
        return Rows(self._part, first, samples, self.plan.names, self._places[shape])

    def finish(self) -> None:
        """Say that all is there."""
        here, there = os.fstat(self._fd), self._part.stat()
        if (here.st_dev, here.st_ino) != (there.st_dev, there.st_ino):
            raise CatalogError(f"{self._part}: another export began it anew meanwhile; export it again")
        os.fsync(self._fd)
        self._part.replace(self.place)

    def _make(self, path: Path) -> None:
        import h5py

        layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)  # each row's place is known then
        layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)  # and a file of holes costs nothing
        layout.set_obj_track_times(False)
        with h5py.File(path, "w", locking=False) as file:
            manifest = self.plan.manifest
            for name in ("format", "snapshot", "sha256", "structures"):
                file.attrs[name] = np.array(manifest[name], h5py.string_dtype()) if name == "structures" else manifest[name]
            file.attrs["labels"] = np.array(list(manifest["labels"]), h5py.string_dtype())
            file.create_dataset("manifest", data=json.dumps(manifest, indent=1))
            for shape, places in self.plan.shapes.items():
                group = file.require_group(self._group(shape))
                for name, (extent, dtype) in shards.datasets(self.plan.names, len(places), *shape, self.plan.part_bytes).items():
                    text = h5py.string_dtype("utf-8", int(dtype[1:])) if dtype[0] == "S" else np.dtype(dtype)
                    group.create_dataset(name, extent, text, dcpl=layout.copy())
        with path.open("rb") as made:
            os.fsync(made.fileno())

    def _open(self, path: Path) -> None:
        """Look at what is there: refuse what is another export, and take down where its rows lie."""
        import h5py

        try:
            with h5py.File(path, "r", locking=False) as file:
                _compare(path, _manifest(file["manifest"][()], path), self.plan)
                for shape in self.plan.shapes:
                    self._places[shape] = {
                        name: (data.id.get_offset(), data.nbytes // len(data)) for name, data in file[self._group(shape)].items()
                        if isinstance(data, h5py.Dataset) and name != "manifest"
                    }  # fmt: skip
        except (OSError, KeyError, AttributeError) as error:
            if isinstance(error, OSError) and error.errno in (13, 2):
                raise
            raise UsageError(f"{path}: is there and holds no export; give another name") from None

    def _missing(self) -> list[Numbers]:
        """Return places of samples whose rows have no sample key: it is written last."""
        todo = []
        fd = os.open(self._part, os.O_RDONLY | os.O_CLOEXEC)
        try:
            for shape, places in self.plan.shapes.items():
                offset, length = self._places[shape]["sample_key"]
                keys = np.frombuffer(_read(fd, len(places) * length, offset), np.uint8).reshape(-1, length)
                whole: npt.NDArray[np.bool_] = (keys != 0).all(axis=1)
                todo += [some for some in _some([places]) if not np.all(whole[np.searchsorted(places, some)])]
        finally:
            os.close(fd)
        return todo

    def _group(self, shape: tuple[int, int]) -> str:
        return "/" if len(self.plan.shapes) == 1 else f"{shape[0]}x{shape[1]}"


@contextlib.contextmanager
def naming(place: Path) -> Iterator[None]:
    """Let what the system refuses of a file that is still unfinished be said of the place that was asked for."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(place)) from None


def _locked(path: Path, stack: contextlib.ExitStack) -> int:
    """Return a descriptor of a file or folder that no other export has locked. The kernel unlocks it on any death."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CatalogError(f"{path}: another export is writing it; wait for it, or export to another place") from None
    return fd


def _compare(place: Path, found: dict[str, Any], plan: Plan) -> None:
    """Refuse to go on with an export of something else."""
    wanted = plan.manifest
    if (found.get("snapshot"), found.get("sha256")) != (wanted["snapshot"], wanted["sha256"]):
        raise UsageError(
            f"{place}: holds snapshot {found.get('snapshot')!r} ({str(found.get('sha256'))[:12]}…), not {wanted['snapshot']!r} "
            f"({wanted['sha256'][:12]}…); give another place"
        )
    for key in ("format", "to", "part", "dtype", "shard"):
        if found.get(key) != wanted.get(key):
            was = f"with {key} {found[key]}" if found.get(key) is not None else f"without {key}"
            raise UsageError(f"{place}: was begun {was}, not {wanted.get(key)}; say the same, or give another place")
    if found != {**wanted, "program_version": found.get("program_version")}:
        raise DriftError(f"{place}: samples of the snapshot were erased, revoked or reinstated since; delete it and export it again")


def _some(shapes: Any) -> Iterator[Numbers]:
    for places in shapes:
        for start in range(0, len(places), ROWS_AT_ONCE):
            yield places[start : start + ROWS_AT_ONCE]


def _read(fd: int, length: int, offset: int) -> bytes:
    data = bytearray()
    while len(data) < length and (piece := os.pread(fd, min(length - len(data), 1 << 28), offset + len(data))):
        data += piece
    return bytes(data.ljust(length, b"\0"))  # holes at the end


def _manifest(text: bytes | str, path: Path) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UsageError(f"{path}: is no manifest of an export; give another place")
    return found
