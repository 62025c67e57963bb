"""A decode worker: sample rows → a slot. `python -m loaderd.decode FD` is the process; the daemon starts and replaces it.

A job names a slot and a place in the *work file*, another memfd, where the daemon wrote the batch's rows: a JSON line a sample and
the packed bits of its masks. The worker reads each frame by one ``preadv`` at its catalogued offset and converts it straight into
the slot; masks are unpacked beside it. One frame of scratch memory serves all samples.

One ``fstat`` checks that size and time are those catalogued. If they are not, the file is looked at again through pydicom: the same
UID and the same pixels are fed, and reported so that the row is brought up; anything else is unreadable.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from catalog.errors import FileError
from loaderd import messages
from loaderd.ring import Layout, Ring, Slot

WORK_STRIDE = 1 << 36  # bytes of a slot's part of the work file: sparse, so only what is written takes memory
BLOCK = 8_192  # values rescaled at a time in float64: 64 KiB of scratch
RETRY_S = 0.05
VOLUMES = 32  # decompressed files that a worker keeps open
COLOUR = "a colour image, and only grey ones are fed; leave it out of the stream"
CHANGED = "the file is not what was catalogued; run `catalog ingest` on its root again"


@dataclass(slots=True)  # not frozen: that makes a sample cost 2.9 µs instead of 1.3
class Sample:
    """One sample as the daemon's query gives it; see `loaderd.supply`."""

    sample_id: int
    sample_key: bytes
    root: str
    path: str
    size: int
    mtime_ns: int
    offset: int | None
    length: int | None
    dtype: str | None
    slope: float
    intercept: float
    frame: int
    rows: int
    columns: int
    sop_instance_uid: str
    pixel_hash: bytes
    format: str
    coding: str
    bits_stored: int | None
    modality_lut: bool
    boxes: tuple[tuple[int, int, int, int] | None, ...]

    @classmethod
    def parse(cls, row: Sequence[Any]) -> Sample:
        """Return the sample of one row of the work file."""
        (
            sample_id,
            key,
            root,
            path,
            size,
            mtime_ns,
            offset,
            length,
            dtype,
            slope,
            intercept,
            frame,
            rows,
            columns,
            uid,
            pixel_hash,
            form,
            coding,
            bits_stored,
            modality_lut,
            boxes,
        ) = row
        return cls(
            sample_id, bytes.fromhex(key), root, path, size, mtime_ns, offset, length, dtype, float(slope), float(intercept), frame,
            rows, columns, uid, bytes.fromhex(pixel_hash or ""), form, coding, bits_stored,
            modality_lut,
            tuple(None if box is None else tuple(box) for box in boxes or ()),
        )  # fmt: skip


class Decoder:
    """Fills slots of one stream's ring."""

    def __init__(self, ring_fd: int, work_fd: int, layout: Layout, *, blank: bool) -> None:
        self.layout = layout
        self.ring = Ring(ring_fd, layout, writable=True)
        self.slots = [self.ring.slot(number) for number in range(layout.slots)]
        self.work_fd = work_fd
        self.blank = blank
        self._scratch = np.empty(0, np.uint8)
        self._block = np.empty(BLOCK, np.float64)
        self._volumes: OrderedDict[tuple[str, int, int], int] = OrderedDict()  # decompressed files that are open
        self.opened = 0

    def close(self) -> None:
        """Close what is open beside the ring, whose mapping goes with the object."""
        for fd in (self.work_fd, *self._volumes.values()):
            os.close(fd)

    def fill(self, job: dict[str, Any]) -> dict[str, Any]:
        """Decode one job's samples into its slot and return what happened, as the daemon wants to hear it."""
        slot = self.slots[job["slot"]]
        at = job["slot"] * WORK_STRIDE
        rows = json.loads(os.pread(self.work_fd, job["length"], at))
        at += job["length"]
        opened, fast, filled = self.opened, 0, 0
        unreadable: list[list[Any]] = []
        changed: list[list[Any]] = []
        for number, row in enumerate(rows):
            if row is None:  # revoked, or left out because it kills workers
                if self.blank:
                    self._empty(slot, filled)
                    slot.sample_ids[filled] = -1
                    slot.sample_keys[filled] = 0
                    filled += 1
                continue
            slot.header[4] = number
            sample = Sample.parse(row)
            bits = sum(-(-box[2] * box[3] // 8) for box in sample.boxes if box)
            problem = self._read(sample, slot.images[filled], changed)
            if problem is None or problem == "fast":
                fast += problem == "fast"
                self._masks(sample, at, slot, filled)
                slot.valid[filled] = True
            else:
                unreadable.append([number, sample.sample_id, *problem])
                if self.blank:
                    self._empty(slot, filled)
            if problem is None or problem == "fast" or self.blank:
                slot.sample_ids[filled] = sample.sample_id
                slot.sample_keys[filled] = np.frombuffer(sample.sample_key, np.uint8)
                filled += 1
            at += bits
        count = filled if job["pad"] == 0 else self.layout.batch_size
        for number in range(filled, count):
            self._empty(slot, number)
            slot.sample_ids[number] = -1
            slot.sample_keys[number] = 0
        slot.header[:5] = job["generation"], job["epoch"], job["index"], count, -1
        report = {
            "op": "done", "stream": job["stream"], "job": job["job"], "count": count, "by_offset": fast, "opened": self.opened - opened,
        }  # fmt: skip
        return {**report, "unreadable": unreadable, "changed": changed} if unreadable or changed else report

    def _read(self, sample: Sample, image: NDArray[Any], changed: list[list[Any]]) -> Any:
        """Fill one image; "fast" if by offset, None if decoded, else (code, message)."""
        problem: tuple[str, str] = ("unreadable", "")
        for attempt in (1, 2):
            try:
                if sample.dtype is not None and self._by_offset(sample, image):
                    return "fast"
                self._decoded(sample, image, changed)
                return None
            except FileError as error:
                problem = (error.code, str(error))
            except OSError as error:
                problem = ("unreadable", str(error.strerror))
                if isinstance(error, FileNotFoundError) and not Path(sample.root).is_dir():
                    return "root-missing", "the root's folder is out of reach"
            except Exception as error:  # a decoder's own bug must not end the worker: the file is what is odd
                problem = ("unreadable", f"{type(error).__name__} while it was decoded")
            if attempt == 1:
                time.sleep(RETRY_S)  # a file being replaced, a network share that hiccups
        return problem

    def _by_offset(self, sample: Sample, image: NDArray[Any]) -> bool:
        """One open, one fstat, one preadv. False if the file is not the one catalogued."""
        assert sample.offset is not None and sample.length is not None and sample.dtype is not None
        if len(self._scratch) < sample.length:
            self._scratch = np.empty(sample.length, np.uint8)
        stored = self._scratch[: sample.length]
        if sample.coding or "://" in sample.root:
            if os.preadv(self._volume(sample), [stored.data], sample.offset) != sample.length:
                raise FileError("truncated", "what it decompresses to is shorter than when it was catalogued; run `catalog ingest` again")
            self._place(stored, sample, image)
            return True
        fd = os.open(f"{sample.root}/{sample.path}", os.O_RDONLY | os.O_CLOEXEC)
        self.opened += 1
        try:
            status = os.fstat(fd)
            if (status.st_size, status.st_mtime_ns) != (sample.size, sample.mtime_ns):
                return False
            if os.preadv(fd, [stored.data], sample.offset) != sample.length:
                return False
        finally:
            os.close(fd)
        self._place(stored, sample, image)
        return True

    def _place(self, stored: NDArray[np.uint8], sample: Sample, image: NDArray[Any]) -> None:
        assert sample.dtype is not None
        values = stored.view(sample.dtype)
        if values.size != image.size:  # colour
            if values.size == 3 * image.size:
                raise FileError("colour", COLOUR)
            raise FileError("shape", f"has {values.size} values where {image.size} were catalogued")
        if sample.bits_stored is not None:  # PS3.5 8.1.1: what lies above is no part of the value
            unused = 8 * values.itemsize - sample.bits_stored
            values <<= unused
            values >>= unused
        self._rescale(values.reshape(image.shape), sample, image)

    def _volume(self, sample: Sample) -> int:
        """Return the open file in the local cache that a compressed file decompresses to, or that an object of a remote root is."""
        key = (f"{sample.root}/{sample.path}", sample.size, sample.mtime_ns)
        if "://" not in sample.root:
            status = os.stat(key[0])  # noqa: PTH116
            if (status.st_size, status.st_mtime_ns) != key[1:]:
                raise FileError("changed", CHANGED)
        if key not in self._volumes:
            from catalog import cache

            self.opened += 1
            if "://" in sample.root:
                from catalog import remote

                self._volumes[key] = remote.fetched(sample.root, sample.path, sample.size, sample.mtime_ns, sample.coding)
            else:
                self._volumes[key] = cache.decompressed(Path(key[0]), sample.coding, sample.size, sample.mtime_ns)
            if len(self._volumes) > VOLUMES:
                os.close(self._volumes.popitem(last=False)[1])
        self._volumes.move_to_end(key)
        return self._volumes[key]

    def _decoded(self, sample: Sample, image: NDArray[Any], changed: list[list[Any]]) -> None:
        """Read what cannot be read by offset, or is not the file that was catalogued."""
        if "://" in sample.root:
            self._decode_copy(sample, image)
            return
        path = Path(sample.root, sample.path)
        self.opened += 1
        status = path.stat()
        if (status.st_size, status.st_mtime_ns) != (sample.size, sample.mtime_ns):
            if sample.format != "dicom":
                raise FileError("changed", CHANGED)
            from catalog import dicom  # pydicom takes 0.2 s to import, and most workers never need it

            found = dicom.read_instance(path)
            frames = [frame for frame in found.frames if frame.frame == sample.frame]
            # Without a hash of its pixels (--hash none) nothing says that they are the same.
            if found.sop_instance_uid != sample.sop_instance_uid or not frames or frames[0].pixel_hash != sample.pixel_hash:
                raise FileError("changed", CHANGED)
            changed.append([sample.sample_id, sample.root, sample.path, status.st_size, status.st_mtime_ns, frames[0].offset])
        self._decode(path, sample, image)

    def _decode_copy(self, sample: Sample, image: NDArray[Any]) -> None:
        """Decode an object of a remote root. In the cache other bytes follow it, which a reader would take for a part of it."""
        fd = os.memfd_create("object", os.MFD_CLOEXEC)
        try:
            os.sendfile(fd, self._volume(sample), 0, sample.size)
            self._decode(Path(f"/proc/self/fd/{fd}"), sample, image)
        finally:
            os.close(fd)

    def _decode(self, path: Path, sample: Sample, image: NDArray[Any]) -> None:
        from catalog import dicom, raster

        if sample.modality_lut:
            image[...] = dicom.decode_values(path, sample.frame)
            return
        stored = (raster if sample.format == "raster" else dicom).decode_frame(path, sample.frame)
        if stored.shape == (*image.shape, 3):
            raise FileError("colour", COLOUR)
        if stored.shape != image.shape:
            raise FileError("shape", f"decodes to {'×'.join(map(str, stored.shape))}, not to the catalogued {sample.rows}×{sample.columns}")
        self._rescale(stored, sample, image)

    def _rescale(self, stored: NDArray[Any], sample: Sample, image: NDArray[Any]) -> None:
        """image = dtype(float64(stored) * slope + intercept), rounded once (PS3.3 C.11.1.1.2)."""
        if sample.slope == 1 and sample.intercept == 0 and (stored.itemsize <= 2 or (stored.itemsize <= 4 and image.dtype != np.float16)):
            image[...] = stored  # the same, rounded once; not 64 bits, nor 32 to float16
            return
        flat, out = stored.reshape(-1), image.reshape(-1)
        for start in range(0, flat.size, BLOCK):
            block = self._block[: min(BLOCK, flat.size - start)]
            np.multiply(flat[start : start + BLOCK], sample.slope, out=block)
            block += sample.intercept
            out[start : start + BLOCK] = block

    def _masks(self, sample: Sample, at: int, slot: Slot, number: int) -> None:
        for structure, box in enumerate(sample.boxes):
            mask = slot.masks[number, structure]
            slot.present[number, structure] = box is not None
            if box is None:
                mask[...] = False
                continue
            top, left, rows, columns = box
            length = -(-rows * columns // 8)
            bits = np.frombuffer(os.pread(self.work_fd, length, at), np.uint8)
            at += length
            if (rows, columns) != mask.shape:
                mask[...] = False
                mask = mask[top : top + rows, left : left + columns]
            mask[...] = np.unpackbits(bits, count=rows * columns).view(np.bool_).reshape(rows, columns)

    def _empty(self, slot: Slot, number: int) -> None:
        slot.images[number] = 0
        slot.masks[number] = False
        slot.present[number] = False
        slot.valid[number] = False


def main() -> None:
    """Serve the daemon on the socket whose descriptor is the only argument, until it hangs up."""
    sock = socket.socket(fileno=int(sys.argv[1]))
    decoders: dict[int, Decoder] = {}
    while True:
        message, fds = messages.receive_fds(sock)
        if message is None:
            return
        if message["op"] == "open":
            decoders[message["stream"]] = Decoder(fds[0], fds[1], Layout(**message["layout"]), blank=message["blank"])
            os.close(fds[0])  # the mapping stays
        elif message["op"] == "close":
            decoder = decoders.pop(message["stream"], None)
            if decoder is not None:
                decoder.close()
        else:
            messages.send(sock, decoders[message["stream"]].fill(message))


if __name__ == "__main__":
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):  # the daemon was killed: as if it had hung up
        main()
