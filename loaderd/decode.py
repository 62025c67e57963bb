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
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from catalog.errors import CatalogError, FileError
from loaderd import messages
from loaderd.ring import Layout, Ring, Slot

if TYPE_CHECKING:
    from loaderd.warping import Pipeline

DONE: dict[str, Any] = {"op": "done", "count": 0, "by_offset": 0, "opened": 0}  # of a job that came to nothing
WORK_STRIDE = 1 << 36  # bytes of a slot's part of the work file: sparse, so only what is written takes memory
BLOCK = 8_192  # values rescaled at a time in float64: 64 KiB of scratch
RETRY_S = 0.05
VOLUMES = 32  # decompressed files that a worker keeps open
COLOUR = "a colour image, and only grey ones are fed; leave it out of the stream"
CHANGED = "the file is not what was catalogued; run `catalog ingest` on its root again"


@dataclass(slots=True)  # not frozen: that makes a sample cost 2.9 µs instead of 1.3
class Sample:
    """One sample as the daemon's query gives it; see `loaderd.work`."""

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
    label: int | None = None
    spacing: tuple[float, float] | None = None
    neighbours: list[Any] | None = None

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
            *more,
        ) = row
        label, spacing, neighbours = (*more, None, None, None)[:3]
        return cls(
            sample_id, bytes.fromhex(key), root, path, size, mtime_ns, offset, length, dtype, float(slope), float(intercept), frame,
            rows, columns, uid, bytes.fromhex(pixel_hash or ""), form, coding, bits_stored,
            modality_lut,
            tuple(None if box is None else tuple(box) for box in boxes or ()),
            label, None if spacing is None or None in spacing else tuple(spacing), neighbours,
        )  # fmt: skip


class Changed:
    """What a stream is fed beyond images and masks as they are: made of the daemon's ``pipeline``, with the pool of its sequences."""

    def __init__(self, given: dict[str, Any], pool_fd: int | None) -> None:
        self.seed: int = given["seed"]
        self.sequences = None
        self._given = given
        if given["sequences"] is not None:
            from loaderd import pools

            assert pool_fd is not None
            self.sequences = pools.Composer(pools.Pool(pool_fd), given["sequences"], self.seed)

    @cached_property
    def pipeline(self) -> Pipeline | None:
        """What images and masks go through. Raises CatalogError if a user's function or OpenCV is not there."""
        if not self._given["transforms"] and self._given["size"] is None:
            return None
        from loaderd.warping import Pipeline  # OpenCV takes 0.1 s to load

        size = self._given["size"]
        return Pipeline(
            self._given["transforms"], seed=self.seed, size=None if size is None else tuple(size), fit=self._given["fit"] or "resize",
            statistics=self._given["statistics"],
        )  # fmt: skip


class Decoder:
    """Fills slots of one stream's ring."""

    def __init__(
        self, ring_fd: int, work_fd: int, layout: Layout, *, blank: bool, changed: Changed | None = None, context_ends: str = "repeat"
    ) -> None:
        self.layout = layout
        self.changed = changed
        self.context_ends = context_ends
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
        composed: list[tuple[int, Sample]] = []  # places and what they are composed around
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
            if self.changed is not None and self.changed.sequences is not None:
                problem = None
                composed.append((filled, sample))
            elif self.changed is None:
                problem = self._read(sample, slot.planes[filled, 0], changed)
                if problem is None or problem == "fast":
                    self._masks(sample, at, slot.masks[filled])
            else:
                try:
                    problem = self._changed(sample, at, slot, filled, changed, job["epoch"])
                except CatalogError as error:  # a fault of the stream's, not of the file's
                    return {**DONE, "stream": job["stream"], "job": job["job"], "fault": str(error)}
            if problem is None or problem == "fast":
                fast += problem == "fast"
                slot.present[filled] = [box is not None for box in sample.boxes]
                slot.valid[filled] = True
            else:
                [code, message, *of] = problem
                unreadable.append([number, of[0] if of else sample.sample_id, code, message])
                if self.blank:
                    self._empty(slot, filled)
            if problem is None or problem == "fast" or self.blank:
                slot.sample_ids[filled] = sample.sample_id
                slot.sample_keys[filled] = np.frombuffer(sample.sample_key, np.uint8)
                filled += 1
            at += bits
        if composed:
            try:
                self._compose(composed, slot, job["epoch"])
            except CatalogError as error:
                return {**DONE, "stream": job["stream"], "job": job["job"], "fault": str(error)}
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

    def _compose(self, composed: list[tuple[int, Sample]], slot: Slot, epoch: int) -> None:
        """Compose a batch's sequences at once: one by one they take ten times as long."""
        assert self.changed is not None and self.changed.sequences is not None
        places = [place for place, _ in composed]
        whole = places == list(range(places[0], places[0] + len(places)))  # else some between them were revoked, and are blank
        runs = [composed] if whole else [[one] for one in composed]
        for run in runs:
            at = slice(run[0][0], run[-1][0] + 1)
            self.changed.sequences.fill(
                [sample.sample_id for _, sample in run], [sample.sample_key for _, sample in run], epoch, slot.planes[at, 0],
                slot.labels[at], slot.boxes[at], slot.members[at],
            )  # fmt: skip

    def _changed(self, sample: Sample, at: int, slot: Slot, number: int, changed: list[list[Any]], epoch: int) -> Any:
        """Fill one place of a stream that is fed more than images and masks as they are; as `_read`."""
        assert self.changed is not None
        if self.layout.labels:
            if sample.label is None:
                return "label", "its label is none of the classes that the stream began with; end the stream and make it anew"
            slot.labels[number] = sample.label
        images, masks = slot.planes[number], slot.masks[number]
        pipeline = self.changed.pipeline
        if pipeline is not None or self.layout.channels == "last":
            shape = (self.layout.depth, sample.rows, sample.columns)
            images = np.empty(shape, np.float64 if self.layout.dtype == "float64" else np.float32)
        if pipeline is not None:
            masks = np.empty((self.layout.structures, sample.rows, sample.columns), np.bool_)
        problem = self._read(sample, images[self.layout.depth // 2], changed)
        if problem not in (None, "fast"):
            return problem
        found = self._neighbours(sample, images, changed)
        if found is not None:
            return found
        self._masks(sample, at, masks)
        if pipeline is not None:
            try:
                pipeline(
                    images, masks, key=sample.sample_key, epoch=epoch, spacing=sample.spacing, out_images=slot.planes[number],
                    out_masks=slot.masks[number],
                )  # fmt: skip
            except FileError as error:
                return error.code, str(error)
        elif self.layout.channels == "last":
            slot.planes[number] = images
        return problem

    def _neighbours(self, sample: Sample, images: NDArray[Any], changed: list[list[Any]]) -> Any:
        """Fill the channels beside the middle one, from it outwards, so that an end can repeat what lies before it."""
        middle = self.layout.depth // 2
        for distance in range(1, middle + 1):
            for at in (middle - distance, middle + distance):
                row = (sample.neighbours or [])[at if at < middle else at - 1]
                if row is not None:
                    problem = self._read(Sample.parse([*row, ()]), images[at], changed)
                    if problem not in (None, "fast"):
                        return *problem, row[0]  # that file is to blame
                elif self.context_ends == "zero":
                    images[at] = 0
                else:
                    images[at] = images[at + 1 if at < middle else at - 1]
        return None

    def _masks(self, sample: Sample, at: int, masks: NDArray[np.bool_]) -> None:
        for structure, box in enumerate(sample.boxes):
            mask = masks[structure]
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
        if self.layout.labels:
            slot.labels[number] = -1
        if self.layout.sequences:
            slot.boxes[number] = slot.members[number] = -1
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
            changed = None if message["pipeline"] is None else Changed(message["pipeline"], fds[2] if len(fds) > 2 else None)
            decoders[message["stream"]] = Decoder(
                fds[0], fds[1], Layout(**message["layout"]), blank=message["blank"], changed=changed, context_ends=message["context_ends"]
            )
            for fd in (fds[0], *fds[2:]):
                os.close(fd)  # the mappings stay
        elif message["op"] == "close":
            decoder = decoders.pop(message["stream"], None)
            if decoder is not None:
                decoder.close()
        else:
            messages.send(sock, decoders[message["stream"]].fill(message))


if __name__ == "__main__":
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):  # the daemon was killed: as if it had hung up
        main()
