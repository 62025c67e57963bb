"""Some samples of a snapshot → bytes in an export: their pixels are read, compared with the catalogued hash, and written beside the masks.

Runs in processes of its own; nothing here knows a database. There are two forms:

- a **shard** for webdataset is a tar file of its own, renamed into place once it is whole: it is there, and right, or it is not there;
- an HDF5 file has all its room from the start, as contiguous datasets, and each row's place in the file follows by arithmetic, so
  processes write into it side by side. A row's sample key is written last: a row that has one is whole.

Equal samples give equal bytes: no time, user or process number is written.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from catalog import viewing
from catalog.contours import BoolArray, unboxed
from catalog.errors import CatalogError, FileError
from catalog.measuring import Item, stored_values
from catalog.statistics import pixel_hash_of

Array = npt.NDArray[Any]
KEY_BYTES = 36  # of a uuid as text
ORIGIN_BYTES = 12  # interpolated


class Drawn(NamedTuple):
    """What a snapshot has of one structure on one sample: a mask as its row keeps it, or a label."""

    origin: str
    label: str | None
    box: tuple[int, int, int, int] | None  # first row, first column, rows, columns; None: no mask was made
    bits: bytes


class Sample(NamedTuple):
    """One sample to write. `item.root` is empty where no file that holds it is present."""

    number: int
    item: Item
    pixel_hash: bytes
    frozen: bool  # its rows give the digest that was frozen
    sample_key: str
    patient: int
    part: str | None
    fold: int | None
    drawn: dict[str, Drawn]  # by structure or label


@dataclass(frozen=True, slots=True)
class Names:
    """What all samples of an export have in common."""

    sha256: str  # of the snapshot, hex
    dtype: str
    structures: tuple[str, ...]
    labels: dict[str, tuple[str, ...]]  # the label → its classes; a class's code is its place there


class Problem(NamedTuple):
    """A sample whose pixels are not to be had, or not those of the snapshot."""

    sample_id: int
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Shard:
    """A tar file to write. `digits`: of the samples' numbers, which name its members."""

    path: Path
    samples: Sequence[Sample]
    names: Names
    digits: int


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of an HDF5 file to write: `first` and following of the datasets that `places` names, as byte of the first row, bytes a row."""

    path: Path
    first: int
    samples: Sequence[Sample]
    names: Names
    places: dict[str, tuple[int, int]]


def write(tasks: Sequence[Shard | Rows]) -> list[Problem]:
    """Write what is asked for, and return what is wrong with samples. A shard with such a sample is not written, nor rows' sample keys.

    Raises:
        OSError: If writing fails.
        CatalogError: If a setting of this machine cannot be right.
    """
    return [problem for task in tasks for problem in (_shard(task) if isinstance(task, Shard) else _rows(task))]


# ------------------------------------------------------------------------------------------ one sample


def pixels(sample: Sample, dtype: str) -> Array:
    """Return a sample's image as a Feed gives it: float64(stored) * slope + intercept, rounded once to `dtype`; (rows, columns).

    A Modality LUT (PS3.3 C.11.1.1) stands in the place of slope and intercept. A file of other time or size is read where its pixels were
    catalogued: their hash says whether they are there still.

    Raises:
        FileError: If it cannot be read, or its pixels are not those whose hash was catalogued.
    """
    item = sample.item
    if not sample.frozen:
        raise FileError("changed", "its rows are not those that were frozen; see `catalog snapshot verify`")
    if not item.root:
        raise FileError("missing", "no file that holds it is present; see `catalog errors`")
    if "://" not in item.root:
        try:
            status = Path(item.root, item.path).stat()
        except OSError as error:
            raise FileError("missing", f"its file cannot be opened ({error.strerror}); bring it back, or see `catalog root move`") from None
        item = item._replace(size=status.st_size, mtime_ns=status.st_mtime_ns)
    stored = stored_values(item)
    if pixel_hash_of(stored) != sample.pixel_hash:
        raise FileError("changed", "its pixels are not those of the snapshot any more; bring its file back as it was")
    with np.errstate(over="ignore", invalid="ignore"):
        if item.modality_lut:
            row = {"url": item.root, "below": item.path, **item._asdict(), "dtype": None}
            return viewing.pixels(row).astype(dtype)
        return (stored.astype(np.float64) * item.slope + item.intercept).astype(dtype)


def masks(sample: Sample, names: Names) -> tuple[BoolArray, BoolArray]:
    """Return masks, bool (structures, rows, columns), and which of them there are, bool (structures,)."""
    shape = (sample.item.rows, sample.item.columns)
    rasters = np.zeros((len(names.structures), *shape), np.bool_)
    present = np.zeros(len(names.structures), np.bool_)
    for at, structure in enumerate(names.structures):
        one = sample.drawn.get(structure)
        if one is not None and one.box is not None:
            rasters[at], present[at] = unboxed(*shape, one.box, one.bits), True
    return rasters, present


def _codes(sample: Sample, names: Names) -> list[int]:
    """A label's class by its place among the classes; -1: the sample has none."""
    found = []
    for label, classes in names.labels.items():
        one = sample.drawn.get(label)
        found.append(-1 if one is None or one.label is None else classes.index(one.label))
    return found


def _read(sample: Sample, dtype: str, problems: list[Problem]) -> Array | None:
    try:
        return pixels(sample, dtype)
    except FileError as error:
        problems.append(Problem(sample.item.image_id, error.code, str(error)))
    except OSError as error:
        problems.append(Problem(sample.item.image_id, "unreadable", f"{error.strerror} while its pixels were read"))
    except CatalogError:
        raise
    except Exception as error:  # a decoder's own bug; the text could hold a value of a header
        problems.append(Problem(sample.item.image_id, "reader-failed", f"decoding it failed with {type(error).__name__}"))
    return None


# ------------------------------------------------------------------------------------------ webdataset


def _shard(task: Shard) -> list[Problem]:
    problems: list[Problem] = []
    unfinished = task.path.with_name(f".{task.path.name}.{os.getpid()}.part")
    try:
        with unfinished.open("wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for sample in task.samples:
                    image = _read(sample, task.names.dtype, problems)
                    if image is not None and not problems:
                        for name, data in _members(sample, image, task.names):
                            member = tarfile.TarInfo(f"{sample.number:0{task.digits}d}.{name}")  # time, user and group are 0 in it
                            member.size = len(data)
                            tar.addfile(member, io.BytesIO(data))
            file.flush()
            os.fsync(file.fileno())
        if not problems:
            unfinished.replace(task.path)
    finally:
        unfinished.unlink(missing_ok=True)
    return problems


def _members(sample: Sample, image: Array, names: Names) -> list[tuple[str, bytes]]:
    """Name and content of a sample's members, as webdataset's own decoders take them: .npy, .json, .cls."""
    rasters, present = masks(sample, names)
    codes = _codes(sample, names)
    said = {
        "snapshot_sha256": names.sha256,
        "number": sample.number,
        "sample_key": sample.sample_key,
        "patient": sample.patient,
        "part": sample.part,
        "fold": sample.fold,
        "structures": list(names.structures),
        "present": present.tolist(),
        "origins": {name: one.origin for name, one in sorted(sample.drawn.items())},
        "labels": {label: sample.drawn[label].label for label in names.labels if label in sample.drawn},
    }
    found = [("image.npy", _npy(image))]
    if names.structures:
        found.append(("masks.npy", _npy(rasters)))
    if len(codes) == 1 and codes[0] >= 0:
        found.append(("cls", str(codes[0]).encode()))
    return [*found, ("json", json.dumps(said, sort_keys=True).encode())]


def _npy(array: Array) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array(out, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return out.getvalue()


# ------------------------------------------------------------------------------------------ HDF5


def datasets(names: Names, samples: int, rows: int, columns: int, part_bytes: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return name → (shape, dtype) of the datasets of so many samples of one shape; S: text, padded with zero bytes."""
    structures, labels = len(names.structures), len(names.labels)
    found: dict[str, tuple[tuple[int, ...], str]] = {"images": ((samples, rows, columns), np.dtype(names.dtype).newbyteorder("<").str)}
    if structures:
        found["masks"] = ((samples, structures, rows, columns), "bool")
        found["present"] = ((samples, structures), "bool")
        found["origins"] = ((samples, structures), f"S{ORIGIN_BYTES}")
    if labels:
        found["labels"] = ((samples, labels), "<i8")
    for name in ("number", "patient", "fold"):
        found[name] = ((samples,), "<i8")
    return {**found, "part": ((samples,), f"S{part_bytes}"), "sample_key": ((samples,), f"S{KEY_BYTES}")}


def _rows(task: Rows) -> list[Problem]:
    problems: list[Problem] = []
    said: dict[str, list[Any]] = {name: [] for name in task.places if name not in ("images", "masks")}
    fd = os.open(task.path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        for at, sample in enumerate(task.samples, task.first):
            image = _read(sample, task.names.dtype, problems)
            if image is None:
                continue
            _put(fd, image.astype(image.dtype.newbyteorder("<"), copy=False), at, task.places["images"])
            drawn = [sample.drawn.get(structure) for structure in task.names.structures]
            if drawn:
                rasters, present = masks(sample, task.names)
                _put(fd, rasters, at, task.places["masks"])
                said["present"].append(present)
                said["origins"].append([one.origin.encode() if one else b"" for one in drawn])
            if task.names.labels:
                said["labels"].append(_codes(sample, task.names))
            said["number"].append(sample.number)
            said["patient"].append(sample.patient)
            said["fold"].append(-1 if sample.fold is None else sample.fold)
            said["part"].append((sample.part or "").encode())
            said["sample_key"].append(sample.sample_key.encode())
        if problems:
            return problems
        for name, values in said.items():
            _, length = task.places[name]
            kinds = {"present": "bool", "origins": f"S{ORIGIN_BYTES}", "part": f"S{length}", "sample_key": f"S{KEY_BYTES}"}
            if name == "sample_key":
                os.fsync(fd)  # after a power cut, too, a row that has a key is whole
            _put(fd, np.array(values, kinds.get(name, "<i8")), task.first, task.places[name])
    finally:
        os.close(fd)
    return problems


def _put(fd: int, values: Array, row: int, place: tuple[int, int]) -> None:
    """Write values that begin at a row of a dataset."""
    left = np.ascontiguousarray(values).data.cast("B")
    offset = place[0] + row * place[1]
    while left:
        written = os.pwrite(fd, left, offset)
        left, offset = left[written:], offset + written
