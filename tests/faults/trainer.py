"""A training process as users write it: feeds, keeps a journal of what it got, saves its state now and then, goes on from one.

The ranks of a group keep in step as an all-reduce makes them. The harness kills it and starts it again (`tests.faults.harness`).
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import os
import signal
import struct
import sys
import time
from pathlib import Path

import sitecustomize  # of tests/faults/inject

import loaderd

KEPT = 8  # states of each rank
COUNTER = struct.Struct("<2q")  # of each rank: ticks (steps and ends of iterators), epoch


class Trainer:
    """One rank of one generation of the group."""

    def __init__(self, folder: Path, generation: int, rank: int, num_ranks: int, every: int, pause_s: float) -> None:
        self.folder, self.rank, self.num_ranks, self.every, self.pause_s = folder, rank, num_ranks, every, pause_s
        self.name = f"{generation}-{rank}"
        self.journal = (folder / f"{self.name}.journal").open("ab", buffering=0)
        self.counters = os.open(folder / f"{generation}.counters", os.O_RDWR | os.O_CREAT)
        self.ticks = 0
        self.saved: list[Path] = []
        self.parent = os.getppid()

    def train(self, feed: loaderd.Feed) -> None:
        """Iterate until the harness says where to end, an iterator of one to three epochs at a time."""
        self.save(feed)
        self.together(feed)
        while (epochs := self.wanted(feed.next_epoch)) > 0:
            for batch in feed.epochs(epochs):
                sitecustomize.passed("received")
                assert batch.masks is not None
                hashes = [
                    hashlib.blake2b(image.tobytes() + mask.tobytes(), digest_size=16).hexdigest()
                    for image, mask in zip(batch.images, batch.masks, strict=True)
                ]
                entry = [batch.epoch, batch.index, batch.sample_ids.tolist(), hashes]
                del batch
                self.journal.write(json.dumps(entry).encode() + b"\n")
                time.sleep(self.pause_s)
                self.together(feed)
            self.together(feed)

    def wanted(self, epoch: int) -> int:
        """Return how many epochs to iterate now."""
        try:
            last = int((self.folder / "last").read_text())
        except FileNotFoundError:
            return 1 + epoch % 3
        assert epoch <= last, "the harness said too late where to end"
        return min(1 + epoch % 3, last - epoch)

    def together(self, feed: loaderd.Feed) -> None:
        """Save every few steps, then wait for the other ranks."""
        self.ticks += 1
        if self.ticks % self.every == 0:
            self.save(feed)
        os.pwrite(self.counters, COUNTER.pack(self.ticks, feed.next_epoch), self.rank * COUNTER.size)
        while self.num_ranks > 1:
            found = os.pread(self.counters, self.num_ranks * COUNTER.size, 0).ljust(self.num_ranks * COUNTER.size, b"\0")
            if all(ticks >= self.ticks for ticks, _ in COUNTER.iter_unpack(found)):
                return
            time.sleep(0.002)

    def save(self, feed: loaderd.Feed) -> None:
        """Keep the state together with the length of the journal, whole or not at all."""
        state = feed.state_dict()
        path = self.folder / f"{self.name}.{state['epoch']}.{state['step']}.state"
        new = path.with_suffix(".new")
        new.write_text(json.dumps({"state": state, "journal": os.fstat(self.journal.fileno()).st_size}))
        new.replace(path)
        sitecustomize.passed("saved")
        if path not in self.saved:
            self.saved.append(path)
        while len(self.saved) > KEPT:
            self.saved.pop(0).unlink()


def main() -> None:
    """Train as the JSON in the only argument says."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: not to be left behind by a test run that is killed
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    given = json.loads(sys.argv[1])
    trainer = Trainer(
        Path(given["folder"]), given["generation"], given["rank"], given["num_ranks"], given["every"], given["pause_s"]
    )  # fmt: skip
    state = given["state"]
    # Nobody is fed before all ranks saved their first state: without any, nothing was trained on, and "last" is the beginning.
    feed = loaderd.Feed(**given["feed"], rank=given["rank"], num_ranks=given["num_ranks"], resume=None if state else "last")
    with feed:
        if state:
            feed.load_state_dict(state)
        trainer.train(feed)


if __name__ == "__main__":
    main()
