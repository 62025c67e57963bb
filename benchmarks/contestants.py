"""What `feed.py` compares, each in a process of its own: ``python contestants.py NAME SETTINGS`` prints one JSON object.

All read the same samples from a warm page cache with the same number of worker processes, and the same consumer touches every page
of every batch. The first epoch warms up; then whole epochs are timed, as many as take the asked seconds.

``limit`` is what no loader around `loaderd.decode.Decoder` can beat here: the same decode function in as many worker processes, into
a warm ring of as many slots, over the same samples in a random order. The rows of all batches lie in the work file beforehand, each
worker has jobs waiting at all times, a message is eight bytes, and the one other process does nothing but touch pages.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Fed = tuple[int, NDArray[Any], NDArray[Any]]  # epoch, images, masks
PAGE = 4096
TICKS = os.sysconf("SC_CLK_TCK")
JOB = struct.Struct("<II")  # batch, slot


@dataclass(frozen=True)
class Settings:
    """What a contestant is told. `daemon` and `postmaster` are pids, for loaderd's share of the CPU; 0 where there is none."""

    folder: str
    batch_size: int
    workers: int
    seconds: float
    slots: int | None = None
    daemon: int = 0
    postmaster: int = 0
    first_only: bool = False


@dataclass(frozen=True)
class Measured:
    """One round of one contestant. CPU seconds are those of the steady window, of all processes that took part."""

    first_batch_s: float
    samples: int = 0
    seconds: float = 0.0
    cpu_s: float = 0.0
    trainer_cpu_s: float = 0.0
    daemon_cpu_s: float = 0.0
    database_cpu_s: float = 0.0
    others_cores: float = 0.0  # cores that processes outside this benchmark kept busy meanwhile


def touch(array: NDArray[Any]) -> int:
    """Read a byte of every page."""
    return int(array.reshape(-1).view(np.uint8)[::PAGE].sum())


def consume(batches: Iterable[Fed], settings: Settings, began: float) -> Measured:
    """Touch every page of every batch, and time whole epochs after the first; `began` is where the first batch was asked for."""
    first, epoch, samples, window = 0.0, 0, 0, (0.0, [0.0] * 5)
    for number, images, masks in batches:
        if number != epoch:
            epoch = number
            if not window[0]:
                window = (time.perf_counter(), _cpu(settings))
                samples = 0
            elif time.perf_counter() - window[0] >= settings.seconds:
                break
        touch(images)
        touch(masks)
        samples += len(images)
        if not first:
            first = time.perf_counter() - began
            if settings.first_only:
                return Measured(first)
    elapsed = time.perf_counter() - window[0]
    trainer, alone, daemon, database, machine = (now - then for now, then in zip(_cpu(settings), window[1], strict=True))
    return Measured(
        first_batch_s=first,
        samples=samples,
        seconds=elapsed,
        cpu_s=trainer + daemon,
        trainer_cpu_s=alone,
        daemon_cpu_s=daemon,
        database_cpu_s=database,
        others_cores=max(0.0, machine - trainer - daemon - database) / elapsed,
    )


def _cpu(settings: Settings) -> list[float]:
    """Return the CPU seconds so far of: this process and its children; this one alone; the daemon's tree; PostgreSQL; the machine."""
    parents, spent = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it ended just now
                continue
            parents[int(entry.name)] = int(fields[1])
            spent[int(entry.name)] = sum(map(int, fields[11:15])) / TICKS  # user and system, its own and of children that ended

    def tree(root: int) -> float:
        below = {root}
        while more := {pid for pid, parent in parents.items() if parent in below} - below:
            below |= more
        return sum(spent.get(pid, 0.0) for pid in below) if root else 0.0

    machine = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    busy = (sum(map(int, machine[1:4])) + sum(map(int, machine[6:8]))) / TICKS  # user, nice, system; irq, softirq
    own = os.times()
    return [tree(os.getpid()), own.user + own.system, tree(settings.daemon), tree(settings.postmaster), busy]


def loaderd(settings: Settings) -> Measured:
    """Feed from the daemon that runs, or from a private one if none does."""
    from loaderd import Feed

    began = time.perf_counter()
    with Feed(structures=["inner"], batch_size=settings.batch_size, slots=settings.slots) as feed:
        batches = ((batch.epoch, batch.images, batch.masks) for batch in feed.epochs(1_000_000) if batch.masks is not None)
        return consume(batches, settings, began)


# ------------------------------------------------------------------------------------------------------- PyTorch


def pairs(folder: str) -> list[tuple[Path, Path]]:
    """Return (DICOM file, contour file) of every sample, as the layout's users find them: by patient and image number."""
    found = []
    for patient in sorted(Path(folder, "studies", "dicoms").iterdir()):
        contours = Path(folder, "studies", "contourfiles", f"SC-SYN-{patient.name[3:]}", "i-contours")
        for image in patient.iterdir():
            found.append((image, contours / f"IM-0001-{int(image.stem):04d}-icontour-manual.txt"))
    return found


def read_pair(image: Path, contour: Path) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return image and mask by pydicom and Pillow."""
    import pydicom
    from PIL import Image, ImageDraw

    pixels = pydicom.dcmread(image).pixel_array.astype(np.float32)
    with contour.open() as lines:
        points = [(float(x), float(y)) for x, y in (line.split() for line in lines)]
    mask = Image.new("L", (pixels.shape[1], pixels.shape[0]), 0)
    ImageDraw.Draw(mask).polygon(points, outline=0, fill=1)
    return pixels, np.array(mask).astype(np.bool_)


def write_decoded(folder: str) -> None:
    """Write image n and mask n of `pairs` as decoded/n.image.npy and decoded/n.mask.npy."""
    decoded = Path(folder, "decoded")
    decoded.mkdir(exist_ok=True)
    for number, pair in enumerate(pairs(folder)):
        image, mask = read_pair(*pair)
        np.save(decoded / f"{number}.image.npy", image)
        np.save(decoded / f"{number}.mask.npy", mask)


class Decoding:
    """A map-style dataset over DICOM and contour files."""

    def __init__(self, folder: str) -> None:
        self.pairs = pairs(folder)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, number: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        return read_pair(*self.pairs[number])


class Decoded:
    """A map-style dataset over decoded .npy files."""

    def __init__(self, folder: str) -> None:
        self.folder = str(Path(folder, "decoded"))
        self.count = len(pairs(folder))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        return np.load(f"{self.folder}/{number}.image.npy"), np.load(f"{self.folder}/{number}.mask.npy")


def pytorch(settings: Settings, dataset: Callable[[str], Any]) -> Measured:
    """Feed from a DataLoader with persistent workers."""
    import pydicom  # noqa: F401  # before the clock starts and the workers fork: they would import it one by one
    import torch
    from PIL import ImageDraw  # noqa: F401
    from torch.utils.data import DataLoader

    torch.set_num_threads(1)
    data = dataset(settings.folder)
    began = time.perf_counter()
    loader = DataLoader(data, batch_size=settings.batch_size, shuffle=True, num_workers=settings.workers, persistent_workers=True)

    def batches() -> Iterator[Fed]:
        for epoch in range(1_000_000):
            for images, masks in loader:
                yield epoch, images.numpy(), masks.numpy()

    return consume(batches(), settings, began)


# ------------------------------------------------------------------------------------------------------- the limit


def write_work(folder: str) -> int:
    """Take the rows of one epoch out of the database, as the daemon does, into FOLDER/work. Returns how many samples it has."""
    from catalog.database import open_database
    from loaderd import ledger, orders
    from loaderd.definitions import Definition
    from loaderd.work import work_query

    with open_database(home=Path(folder, "home")) as db, db.connect() as conn, conn.cursor(binary=True) as cursor:
        newest = "SELECT id, num_samples FROM epoch WHERE started_at IS NOT NULL ORDER BY id DESC LIMIT 1"
        found = cursor.execute(newest).fetchone()
        assert found is not None, "nothing was fed from this database yet"
        epoch, samples = int(found[0]), int(found[1])
        parameters = {"epoch": epoch, "first": 0, "end": samples, "part": orders.PART, "positions": ledger.multirange([(0, samples)])}
        work = cursor.execute(work_query(Definition(structures=("inner",))), parameters).fetchall()
    Path(folder, "work").write_text("".join(json.dumps([row.decode(), bits.hex()]) + "\n" for row, bits in work))
    return samples


def limit(settings: Settings) -> Measured:
    """Have workers fill a warm ring as fast as they can."""
    from loaderd import decode, ring

    work = [json.loads(line) for line in Path(settings.folder, "work").read_text().splitlines()]
    rows, columns = json.loads(work[0][0])[12:14]
    one = ring.Layout(settings.batch_size, structures=1, rows=rows, columns=columns, dtype="float32", slots=1)
    layout = replace(one, slots=settings.slots or ring.default_slots(one))
    ring_fd, work_fd = ring.create(layout), os.memfd_create("work")
    lengths = []  # of each batch's rows
    for batch, first in enumerate(range(0, len(work), settings.batch_size)):
        taken = work[first : first + settings.batch_size]
        record = ("[" + ",".join(row for row, _ in taken) + "]").encode()
        lengths.append((len(record), len(taken)))
        os.pwrite(work_fd, record + b"".join(bytes.fromhex(bits) for _, bits in taken), batch * decode.WORK_STRIDE)
    own = ring.Ring(ring_fd, layout)
    slots = [own.slot(number) for number in range(layout.slots)]
    began = time.perf_counter()
    workers, poller = {}, select.poll()
    for _ in range(settings.workers):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            told = json.dumps([theirs.fileno(), ring_fd, work_fd, asdict(layout), [length for length, _ in lengths]])
            process = subprocess.Popen(
                [sys.executable, "-P", __file__, "limit-worker"],
                stdin=subprocess.PIPE,
                pass_fds=[theirs.fileno(), ring_fd, work_fd],
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
            )
        assert process.stdin is not None
        with process.stdin as pipe:
            pipe.write(told.encode())
        workers[ours.fileno()] = (ours, process)
        poller.register(ours, select.POLLIN)

    def batches() -> Iterator[Fed]:
        submitted = filled = 0
        for slot in range(layout.slots):  # all at once: a worker has as many jobs waiting as there are slots for it
            list(workers.values())[slot % len(workers)][0].send(JOB.pack(submitted % len(lengths), slot))
            submitted += 1
        while True:
            for fd, _ in poller.poll():
                sock = workers[fd][0]
                batch, slot = JOB.unpack(sock.recv(JOB.size))
                count = lengths[batch][1]
                yield filled // len(lengths), slots[slot].images[:count], slots[slot].masks[:count, 0]
                filled += 1
                sock.send(JOB.pack(submitted % len(lengths), slot))
                submitted += 1

    try:
        return consume(batches(), settings, began)
    finally:
        for sock, process in workers.values():
            sock.close()
            process.wait(timeout=10)


def limit_worker() -> None:
    """Decode what the socket says, until it hangs up."""
    from loaderd.decode import Decoder
    from loaderd.ring import Layout

    fd, ring_fd, work_fd, layout, lengths = json.load(sys.stdin)
    sock = socket.socket(fileno=fd)
    decoder = Decoder(ring_fd, work_fd, Layout(**layout), blank=False)
    slots = decoder.slots
    # `Decoder.fill` takes a job's rows from where its slot's number says. Here that number is the batch's, so that all rows can lie
    # there beforehand, and the list says which slot it is this time.
    decoder.slots = slots * -(-len(lengths) // len(slots))
    with contextlib.suppress(ConnectionError):  # it hangs up on jobs that are still waiting
        while data := sock.recv(JOB.size):
            batch, slot = JOB.unpack(data)
            decoder.slots[batch] = slots[slot]
            job = {"stream": 1, "job": 0, "slot": batch, "generation": 1, "epoch": 0, "index": batch, "length": lengths[batch], "pad": 0}
            report = decoder.fill(job)
            if report["by_offset"] != report["count"]:
                raise SystemExit(f"not every sample was read by offset: {report}")
            sock.send(data)


CONTESTANTS: dict[str, Callable[[Settings], Measured]] = {
    "loaderd": loaderd,
    "pydicom": lambda settings: pytorch(settings, Decoding),
    "npy": lambda settings: pytorch(settings, Decoded),
    "limit": limit,
}

if __name__ == "__main__":
    if sys.argv[1] == "limit-worker":
        limit_worker()
    else:
        print(json.dumps(asdict(CONTESTANTS[sys.argv[1]](Settings(**json.loads(sys.argv[2]))))))
