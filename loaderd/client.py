"""What a trainer imports: `Feed`; `loaderd.batch` has what it gives. Loads numpy and psycopg, neither SQLAlchemy nor pydicom."""

from __future__ import annotations

import logging
import os
import platform
import select
import sys
import threading
import time
import weakref
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from catalog import __version__
from loaderd import attach, messages
from loaderd.attach import FeedError
from loaderd.batch import Batch, Returned
from loaderd.messages import PROTOCOL, Message
from loaderd.progress import Progress
from loaderd.ring import Layout, Ring

MAX_RANKS = 65_536
LONGEST_S = 2_147_483  # poll(2) counts milliseconds in 32 bits
_log = logging.getLogger("loaderd")
_UNSET: Any = type("unset", (), {"__repr__": lambda self: "…"})()  # the stream's own, or the default


class Feed:
    """Batches of a stream, in the database's random order, from a daemon over shared memory.

    Finds the user's daemon for this database (`loaderd serve`), or starts one for itself and ends it with itself. The first feed of
    a process starts it, further ones share it. If the daemon dies, the feed attaches to the one that comes back, or starts another,
    and goes on with the batch after the last one that it handed out.

    Args:
        stream: A named stream (`loaderd stream create`). Of the arguments down to `on_error` none is needed then, and one that is given
            and differs from the stream's is an error. Without it these arguments define an unnamed stream.
        structures: Names to feed masks of; none: images alone.
        snapshot: The name of a frozen list (`catalog snapshot create`): its samples are fed whatever flags were raised since, but nothing
            that was revoked or erased. `where`, `include_flagged` and `origins` choose anew and do not go with it.
        split: A side of a split: ``"train"``, where there are several splits ``"mri/train"``; of a split with folds ``"train:2"`` (all
            folds but 2) and ``"val:2"``. With `shuffle=False` a validation feed. Of a snapshot: the side as it was then.
        origins: Which labels: by default what somebody drew, ``["contour", "segment", "label"]``. ``"interpolated"`` and ``"proposed"`` are
            fed only where asked for; where something is drawn too, and asked for, that is fed.
        readers: Whose annotations: these readers' alone. By default of each sample what the preferred reader drew.
        labels: A label to feed: ``"label"`` for MNIST's. A text that is a whole number is fed as that number; else its place in `classes`.
        where: An SQL condition over the view ``sample`` (without structures and labels: ``image_all``); it runs under a login that cannot
            write.
        limit: At most so many samples, the first by sample_key.
        include_flagged: Feed also what open flags of severity error speak against. What was revoked is never fed.
        require: With several structures, ``"all"`` (default) of them must be there, or ``"any"``.
        batch_size: Samples a batch; default 8.
        seed: With the epoch it decides the order; 64 bits; default 0.
        shuffle: False gives the order by sample_key, the same in every epoch.
        tail: What becomes of the last samples that fill no batch: ``"short"`` (default), ``"drop"`` or ``"pad"`` (zeros, ``valid``
            False). Over several ranks the last step is dealt out evenly.
        dtype: Of the images: ``"float32"`` (default), ``"float64"`` or ``"float16"``.
        channels: Images have an axis for channels ``"first"`` or ``"last"``, or ``"none"`` (default).
        size: (rows, columns) to bring all images and masks to; without it all images must have one shape.
        fit: How: ``"resize"`` (default: stretched), ``"crop"`` (its middle, at the scale it has) or ``"pad"`` (all of it, with a margin).
        context: So many neighbours on each side along the slice normal as channels, in order of position, at the same phase.
        context_ends: Where there is no neighbour: ``"repeat"`` (default) the nearest channel, or ``"zero"``.
        transforms: What is done to images and masks together, drawn anew for each sample and epoch: `loaderd.transforms`, or the same as
            dicts; docs/transforms.md.
        sequences: Options of composed sequences of digits, instead of single images: docs/sequences.md.
        on_error: What to do about a sample that cannot be read: ``"skip"`` (default), ``"blank"`` (zeros, ``valid`` False) or ``"stop"``.
        rank, num_ranks: This process's place among those that share the batches; by default from RANK and WORLD_SIZE, else alone.
        run: The training's name in the ledger, the same on all ranks; without one a new name is made up.
        resume: Where to go on with a run that was fed before: a state (`state_dict`), or ``"last"``: behind what all ranks acknowledged.
        slots: Batches in the ring, 2 to 128; by default as many as fit 24 MiB (a cache), 4 to 16.
        timeout_s: How long to wait for a batch, in seconds, before `FeedError`; up to 2147483, which is 24 days.
        progress: Show a line with the progress on stderr, if that is a terminal.
        database: A PostgreSQL URL; by default ``CATALOG_DATABASE_URL``, else the embedded database.

    Attributes:
        run: The run's name.
        attempt: Which uninterrupted stretch of the run this is, from 1; None as long as a run that was fed before waits for its state.
        next_epoch: The epoch that the next iterator begins with.
        num_samples: Samples an epoch, of all ranks together.
        classes: Of labels that are no numbers: their texts, sorted; a label is fed as its place here. Else None.
        structures, batch_size, tail, rank, num_ranks: As above.

    Raises:
        FeedError: If the stream cannot be opened; the message says why.
    """

    def __init__(
        self,
        stream: str | None = None,
        *,
        structures: Sequence[str] = _UNSET,
        snapshot: str | None = _UNSET,
        split: str | None = _UNSET,
        origins: Sequence[str] = _UNSET,
        readers: Sequence[str] = _UNSET,
        labels: str | None = _UNSET,
        where: str | None = _UNSET,
        limit: int | None = _UNSET,
        include_flagged: bool = _UNSET,
        require: Literal["all", "any"] = _UNSET,
        batch_size: int = _UNSET,
        seed: int = _UNSET,
        shuffle: bool = _UNSET,
        tail: Literal["short", "drop", "pad"] = _UNSET,
        dtype: str = _UNSET,
        channels: Literal["none", "first", "last"] = _UNSET,
        size: tuple[int, int] | None = _UNSET,
        fit: Literal["crop", "pad", "resize"] | None = _UNSET,
        context: int = _UNSET,
        context_ends: Literal["repeat", "zero"] = _UNSET,
        transforms: Sequence[Any] = _UNSET,
        sequences: Mapping[str, Any] | None = _UNSET,
        on_error: Literal["skip", "blank", "stop"] = _UNSET,
        rank: int | None = None,
        num_ranks: int | None = None,
        run: str | None = None,
        resume: Literal["last"] | Mapping[str, Any] | None = None,
        slots: int | None = None,
        timeout_s: float = 60.0,
        progress: bool = False,
        database: str | None = None,
    ) -> None:
        for name, value in (("structures", structures), ("origins", origins), ("readers", readers)):
            if isinstance(value, str):
                raise TypeError(f"{name}={value!r}: must be a list of names, such as [{value!r}]")
        if sys.platform != "linux":
            raise FeedError("loaderd needs Linux: it feeds through a memfd; the catalog works here all the same")
        if transforms is not _UNSET:
            from loaderd.transforms import checked  # few trainings have any

            transforms = checked(transforms, size=None if size is _UNSET else size)
        definition = {
            "structures": structures, "snapshot": snapshot, "split": split, "origins": origins, "readers": readers, "labels": labels,
            "where": where, "limit": limit, "include_flagged": include_flagged, "require": require, "batch_size": batch_size, "seed": seed,
            "shuffle": shuffle, "tail": tail, "dtype": dtype, "channels": channels, "size": size, "fit": fit, "context": context,
            "context_ends": context_ends, "transforms": transforms, "sequences": sequences, "on_error": on_error,
        }  # fmt: skip
        self.rank, self.num_ranks = _ranks(rank, num_ranks)
        state = _state(resume) if isinstance(resume, Mapping) else None
        if state is not None and run not in (None, state["run"]):
            raise FeedError(f"run={run!r}, and the state is of run {state['run']!r}; leave run= out to go on with that one")
        run = state["run"] if state is not None else run
        if self.num_ranks > 1 and run is None:
            raise FeedError(f"num_ranks={self.num_ranks}: ranks share one run; pass run=NAME, the same on all of them")
        self.timeout_s = timeout_s = _timeout(timeout_s)
        self._database = database
        self._pid = os.getpid()
        self._lock = threading.RLock()  # a signal handler may close the feed in the middle of a wait
        self._closed = False  # nothing comes any more
        self._left = False  # and the daemon was told
        self._last: list[int] | None = None  # epoch and index of the batch that was handed out last
        self._asked: tuple[int, int] | None = None  # epoch and how many more
        self._received: tuple[int, int] = (0, 0)  # epoch and step that comes next
        self._through: dict[int, int] = {}  # epoch → steps before which the trainer is through, of the last two
        self._progress = Progress() if progress and self.rank == 0 else None  # ranks share a terminal
        self._attach: Message = {
            "op": "attach", "protocol": PROTOCOL, "version": __version__, "stream": stream,
            "definition": {name: _plain(name, value) for name, value in definition.items() if value is not _UNSET},
            "rank": self.rank, "num_ranks": self.num_ranks, "run": run, "resume": state or resume, "slots": slots,
            "versions": {"scanfeed": __version__, "python": platform.python_version(), "numpy": np.__version__},
        }  # fmt: skip
        self._take(attach.attach(self._attach, database, timeout_s))

    def _take(self, found: attach.Attached) -> None:
        """Go on with a connection to a daemon that opened the stream."""
        self._sock, self._path, reply = found.sock, found.path, found.reply
        # What an earlier daemon's ring still holds is none of this one's slots.
        self._returned = Returned()
        self._leases = 0
        self._poller = select.poll()
        self._poller.register(self._sock, select.POLLIN)
        self._poller.register(self._returned.fd, select.POLLIN)
        self._ring = Ring(found.ring_fd, Layout(**reply["layout"]))
        os.close(found.ring_fd)
        self._private: bool = reply["private"]
        self._digest: str = reply["digest"]
        self.structures: tuple[str, ...] = tuple(reply["structures"])
        self.classes: tuple[str, ...] | None = None if reply["classes"] is None else tuple(reply["classes"])
        self.batch_size: int = reply["batch_size"]
        self.tail: str = reply["tail"]
        self.run: str = reply["run"]
        self.attempt: int | None = None
        if not hasattr(self, "next_epoch"):
            self.next_epoch = 0
            self.num_samples: int = reply["num_samples"]
            self._steps: int = reply["steps"]
        if "attempt" in reply:
            self._begun(reply)

    def _begun(self, message: Message) -> None:
        self.run, self.attempt = message["run"], message["attempt"]
        if self._asked is None:
            self.next_epoch = message["epoch"]
            self._received = (message["epoch"], message["step"])

    def __len__(self) -> int:
        """Steps (batches) an epoch, as of when the feed was opened or the last epoch began."""
        return self._steps

    def epochs(self, count: int) -> Iterator[Batch]:
        """Return one iterator over the next `count` epochs; the first may be the rest of one (`load_state_dict`)."""
        for more in reversed(range(count)):
            yield from self._run_epoch(more)

    def epoch(self) -> Iterator[Batch]:
        """Return an iterator over the next epoch."""
        return self.epochs(1)

    def __iter__(self) -> Iterator[Batch]:
        return self.epochs(1)

    def __aiter__(self) -> AsyncIterator[Batch]:
        from loaderd.aio import iterate

        return iterate(self)

    def numpy(self, **options: Any) -> Any:
        """Return the feed as copies that may be written to and kept: see `loaderd.arrays.Arrays`, which takes the options."""
        from loaderd.arrays import Arrays

        return Arrays(self, **options)

    def torch(self, **options: Any) -> Any:
        """Return the feed as a PyTorch IterableDataset: see `loaderd.torch.FeedDataset`, which takes the options."""
        from loaderd.torch import FeedDataset

        return FeedDataset(self, **options)

    def keras(self, **options: Any) -> Any:
        """Return the feed for Keras 3's ``model.fit``: see `loaderd.keras.feed_keras`, which takes the options."""
        from loaderd.keras import feed_keras

        return feed_keras(self, **options)

    def jax(self, **options: Any) -> Any:
        """Return an iterator over JAX arrays on the local devices: see `loaderd.jax.feed_jax`, which takes the options."""
        from loaderd.jax import feed_jax

        return feed_jax(self, **options)

    def tensorflow(self, **options: Any) -> Any:
        """Return the feed as a ``tf.data.Dataset``: see `loaderd.tensorflow.feed_tensorflow`, which takes the options."""
        from loaderd.tensorflow import feed_tensorflow

        return feed_tensorflow(self, **options)

    def state_dict(self) -> dict[str, Any]:
        """Return where to go on: behind the batch that was handed out last. The same on all ranks at the same step, and small.

        Save it with the model, and load it by `load_state_dict` or `resume` in a later process: that goes on with the next batch of the
        same epoch, in the same order, also with another number of ranks. (As torchdata's StatefulDataLoader does.)
        """
        with self._lock:
            self._begin(None)
            epoch, step = self._received
            if self._asked is not None and step >= self._steps:
                epoch, step = epoch + 1, 0
            return {"stream": self._digest, "run": self.run, "epoch": epoch, "step": step, "attempt": self.attempt}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was called; before the first epoch.

        Raises:
            FeedError: If the state is of another run or stream, if the ranks' states are of different steps, if the run's last
                attempt is still fed, or if this feed was iterated already.
        """
        wanted = _state(state)
        with self._lock:
            self._check()
            if self._asked is not None:
                raise FeedError("load_state_dict comes before the first epoch; open a new Feed for it")
            if self._attach["run"] not in (None, wanted["run"]):
                raise FeedError(f"the state is of run {wanted['run']!r}, and this feed is of run {self._attach['run']!r}")
            if wanted["stream"] != self._digest:
                raise FeedError("the state is of another stream: batch size, seed, structures or selection differ from this feed's")
            self._attach["run"], self._attach["resume"] = wanted["run"], wanted
            self.attempt = None
            self._begin(wanted)

    def _begin(self, state: Mapping[str, Any] | None) -> None:
        """Open or join the run's attempt, unless that is done."""
        if self.attempt is not None:
            return
        self._check()
        self.run = self._attach["run"] or self.run
        self._send({"op": "begin", "run": self.run, "resume": state})
        deadline = time.monotonic() + self.timeout_s
        while self.attempt is None:
            try:
                message = self._receive(deadline)
            except _LostError:
                self._attach_again(deadline)
                continue
            if message["op"] == "begun":
                self._begun(message)
            elif message["op"] == "error":
                self._closed = True
                raise FeedError(message["message"])

    def close(self) -> None:
        """Leave the stream; from any thread, as often as you like. A daemon that this process started ends with its last feed.

        Batches that are still held stay readable.
        """
        if os.getpid() != self._pid:
            return
        self._closed = True
        self._returned.wake()  # an iterator that waits in another thread, which then lets go of the lock
        with self._lock, self._sock:
            if not self._left:
                self._left = True
                attach.leave(self._sock)
                if self._progress is not None:
                    self._progress.close()

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_sock"):
            self.close()

    def __getstate__(self) -> object:
        raise TypeError(
            "a Feed cannot be sent to another process: it batches and loads by itself; iterate it directly, or wrap it in a "
            "DataLoader with batch_size=None and num_workers=0"
        )

    # ------------------------------------------------------------------ iterating

    def _run_epoch(self, more: int) -> Iterator[Batch]:
        with self._lock:
            self._check()
            self._begin(None)
            number = self.next_epoch
            self.next_epoch += 1
            if self._received[0] != number:
                self._received = (number, 0)
            self._asked = (number, more)
            self._send({"op": "epoch", "epoch": number, "ahead": more})
        while True:
            began = time.monotonic()
            batch = self._next(number)
            if batch is None:
                return
            if self._progress is not None:
                self._progress.step(batch.index, len(batch), time.monotonic() - began)
            yield batch
            del batch  # else this frame would keep the slot while the trainer works on the next one

    def _next(self, number: int) -> Batch | None:
        with self._lock:
            self._check()
            if self._last is not None or self._returned.slots:
                self._send({"op": "next"})
            deadline = time.monotonic() + self.timeout_s
            while True:
                try:
                    message = self._receive(deadline)
                except _LostError:
                    self._attach_again(deadline)
                    continue
                if message["op"] == "error":
                    self._closed = True
                    raise FeedError(message["message"])
                if message.get("epoch") != number:
                    if message["op"] == "batch":  # of an epoch that was left before its end
                        self._note_released(message["slot"], message["generation"])
                    continue
                if message["op"] == "epoch":
                    self._steps, self.num_samples = message["steps"], message["num_samples"]
                    if self._progress is not None:
                        self._progress.begin(number, self._steps)
                elif message["op"] == "end":
                    self._received = (number, self._steps)
                    return None
                elif message["op"] == "batch":
                    return self._batch(message)

    def _attach_again(self, deadline: float) -> None:
        """The daemon died: go on with another one behind the batch that was handed out last."""
        began = time.monotonic()
        self._sock.close()
        _log.warning("the daemon of this feed (run %s) died; attaching again", self.run)
        if self.attempt is not None:
            epoch, more = self._asked or (None, 0)
            self._attach["again"] = {
                "attempt": self.attempt, "epoch": epoch, "received": self._received[1], "ahead": more,
                "acknowledged": [list(pair) for pair in self._through.items()],
            }  # fmt: skip
            self._attach["run"] = self.run
        self._take(attach.again(self._attach, self._database, self._path, deadline, private=self._private))
        self._check()  # closed meanwhile by another thread, which woke who waits for the daemon that died
        _log.warning("attached again after %.2f s", time.monotonic() - began)

    def _batch(self, message: Message) -> Batch:
        slot = self._ring.slot(message["slot"])
        if int(slot.header[0]) != message["generation"]:
            raise FeedError("a slot holds another batch than was announced; this is a bug in scanfeed")
        self._leases += 1
        finalizer = weakref.finalize(slot.base, self._returned.note, message["slot"], message["generation"])
        finalizer.atexit = False
        self._last = [message["epoch"], message["index"]]
        self._received = (message["epoch"], message["index"] + 1)
        return Batch(self, slot, message, finalizer)

    def _receive(self, deadline: float) -> Message:
        while True:
            self._wait(deadline)
            try:
                message = messages.receive(self._sock)
            except BlockingIOError:
                continue  # it was a slot that came back
            except OSError:
                self._check()  # closed here, by a signal handler
                message = None
            if message is None:
                raise _LostError
            return message

    def _wait(self, deadline: float) -> None:
        """Wait until something comes, or until a slot was let go of somewhere else and can be sent back."""
        returned = self._returned
        returned.awaited = True
        # A slot that was let go of before this line woke nobody.
        ready = bool(returned.slots) or bool(self._poller.poll(max(0.0, deadline - time.monotonic()) * 1000))
        returned.awaited = False
        returned.drain()
        if not ready:
            held = self._leases - len(self._returned.slots)
            slots = self._ring.layout.slots
            why = (
                f"this process holds all {slots} slots: drop batches (or copies of their views) it no longer needs, or raise slots="
                if held >= slots
                else "the daemon is still decoding or waits for the database; see `loaderd status`, or raise timeout_s="
            )
            raise FeedError(f"no batch came within {self.timeout_s:g} s: {why}")
        self._check()
        if returned.slots:
            self._send({"op": "next"})

    def _send(self, message: Message) -> None:
        """Send a message, with what was let go of and how far the trainer came."""
        free = self._take_released()
        if free:
            message["free"] = free
        if self._last is not None:
            message["ack"] = self._last
            epoch, index = self._last
            self._through = {of: step for of, step in self._through.items() if of == epoch - 1} | {epoch: index + 1}
            self._last = None
        try:
            messages.send(self._sock, message)
        except BlockingIOError:
            raise FeedError("the daemon does not read; see `loaderd status`") from None
        except OSError:
            pass  # it is gone: what it said before, or its end, is read next

    def _acknowledge(self, epoch: int, index: int) -> None:
        with self._lock:
            self._check()
            if self._last is not None and self._last >= [epoch, index]:
                last, self._last = self._last, [epoch, index]
                self._send({"op": "next"})
                self._last = last if last > [epoch, index] else None

    def _take_released(self) -> list[tuple[int, int]]:
        free = []
        while self._returned.slots:
            free.append(self._returned.slots.popleft())
        self._leases -= len(free)
        return free

    def _note_released(self, slot: int, generation: int) -> None:
        self._leases += 1
        self._returned.slots.append((slot, generation))

    def _check(self) -> None:
        if os.getpid() != self._pid:
            raise FeedError(
                "this Feed was opened before a fork and cannot be used in the child: open one there, "
                "or use DataLoader(num_workers=0) around it, since it loads in processes of its own"
            )
        if self._closed:
            raise FeedError("this Feed is closed; open a new one")


def batches(*, epochs: int = 1, **arguments: Any) -> Iterator[tuple[Any, ...]]:
    """Yield (images, masks) of `epochs` epochs, with labels what a batch unpacks to; takes `Feed`'s arguments, opens and closes it."""
    with Feed(**arguments) as feed:
        for batch in feed.epochs(epochs):
            yield tuple(batch)


class _LostError(Exception):
    """The daemon hung up without a word."""


def _ranks(rank: int | None, num_ranks: int | None) -> tuple[int, int]:
    """Return rank and number of ranks, as given or as launchers such as torchrun say."""
    if rank is None and num_ranks is None and "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        given: tuple[Any, Any] = os.environ["RANK"], os.environ["WORLD_SIZE"]
        if not (given[0].isdecimal() and given[1].isdecimal()):
            raise FeedError(f"RANK={given[0]!r} and WORLD_SIZE={given[1]!r}: must be whole numbers; pass rank= and num_ranks=")
        rank, num_ranks = int(given[0]), int(given[1])
    rank, num_ranks = rank or 0, 1 if num_ranks is None and not rank else num_ranks
    if type(num_ranks) is not int or type(rank) is not int or not 0 <= rank < num_ranks <= MAX_RANKS:
        raise FeedError(f"rank={rank!r}, num_ranks={num_ranks!r}: rank must be from 0 to num_ranks - 1, num_ranks from 1 to {MAX_RANKS}")
    return rank, num_ranks


def _timeout(given: Any) -> float:
    """Return seconds to wait."""
    if isinstance(given, bool) or not isinstance(given, int | float | np.integer | np.floating) or not 0 < given <= LONGEST_S:
        raise FeedError(f"timeout_s={given!r}: must be a number of seconds above 0, at most {LONGEST_S}")
    return float(given)


def _state(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state as the daemon takes it."""
    try:
        state = {name: given[name] for name in ("stream", "run", "epoch", "step", "attempt")}
    except KeyError as error:
        raise FeedError(f"the state has no {error}; pass what state_dict() of a Feed gave") from None
    if not isinstance(state["run"], str) or not all(type(state[name]) is int for name in ("epoch", "step", "attempt")):
        raise FeedError("the state's run must be a name, its epoch, step and attempt whole numbers; pass what state_dict() of a Feed gave")
    return state


def _plain(argument: str, value: Any) -> Any:
    """Return a value as JSON has it: numpy's numbers and arrays, and tuples come from users, too."""
    if isinstance(value, Mapping):
        return {name: _plain(argument, one) for name, one in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(argument, one) for one in value]
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if not (value is None or isinstance(value, str | int | float | list)):
        raise FeedError(f"{argument}: a {type(value).__name__} is nothing that can be kept with a stream; pass a text, a number or a list")
    return value
