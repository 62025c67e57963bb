"""A feed as tuples of NumPy arrays that are the trainer's own; what the forms for Keras, JAX and TensorFlow are made of.

A batch's arrays are read-only views on a slot of the ring, which is used again when the last of them is gone. Frameworks keep what they
are given for as long as they like, and some write to it. A copy gives the slot back at once; what it costs is in docs/frameworks.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from numpy.typing import NDArray

from catalog.errors import UsageError
from loaderd.batch import Batch
from loaderd.client import Feed

FIELDS = ("images", "masks", "labels", "boxes", "members", "present", "sample_ids", "sample_keys", "valid")


class Arrays:
    """The batches of a feed as tuples of arrays; each `iter()` is the feed's next epoch, or the rest of one that was resumed.

    Args:
        feed: The feed; it stays the caller's, who closes it.
        fields: What a tuple holds, in this order: some of a `Batch`'s ``"images"``, ``"masks"``, ``"labels"``, ``"boxes"``,
            ``"members"``, ``"present"``, ``"sample_ids"``, ``"sample_keys"``, ``"valid"``. By default what it unpacks to: images, then
            masks, then labels, as far as the feed has them. Shapes and dtypes are the batch's.

    Attributes:
        feed: As above.

    Raises:
        UsageError: If there is no such field, or, at the first batch, the feed does not have it.
    """

    def __init__(self, feed: Feed, *, fields: Sequence[str] | None = None) -> None:
        if fields is not None and (isinstance(fields, str) or not fields or any(name not in FIELDS for name in fields)):
            raise UsageError(f"fields={fields!r}: must be a list of some of {', '.join(FIELDS)}")
        self.feed = feed
        self._fields = None if fields is None else tuple(fields)

    def __len__(self) -> int:
        """Steps (batches) a whole epoch, on this rank."""
        return len(self.feed)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return map(self._arrays, self.feed.epoch())

    def _arrays(self, batch: Batch) -> tuple[Any, ...]:
        """Return what becomes of a batch."""
        return tuple(array.copy() for array in self._views(batch))

    def _views(self, batch: Batch) -> list[NDArray[Any]]:
        """Return the arrays that were asked for, on shared memory."""
        if self._fields is None:
            return [array for array in batch if array is not None]
        arrays = {name: getattr(batch, name) for name in self._fields}
        if absent := [name for name, array in arrays.items() if array is None]:
            raise UsageError(f"fields: {absent[0]!r}: this feed has none; open it with structures=, labels= or sequences=")
        return list(arrays.values())


class ArraysLookedAt(Arrays):
    """`Arrays` for frameworks that take a first batch to see its shapes, throw it away, and begin anew.

    An iteration that is left after its first batch was such a look: the next one begins with that batch again. After `LOOKS` of them in
    a row the next is the next epoch all the same: else who trains one step an iteration would train on one batch for ever.
    """

    LOOKS = 2  # the user's, and Keras' to build a model

    def __init__(self, feed: Feed, *, fields: Sequence[str] | None = None) -> None:
        super().__init__(feed, fields=fields)
        self._begun: tuple[tuple[Any, ...], Iterator[Batch]] | None = None  # an epoch's first batch, and the rest of it
        self._looks = 0

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        if self._looks > self.LOOKS:
            self._begun = None
        first, rest = self.begin()
        self._looks += 1
        if len(self) == 1:  # who takes the only batch has had the epoch
            self._begun = None
        if first is not None:
            yield first
        del first
        self._begun = None
        yield from map(self._arrays, rest)

    def begin(self) -> tuple[tuple[Any, ...] | None, Iterator[Batch]]:
        """Return the first batch of the epoch that the next iteration gives, and the rest of it; None if it is empty."""
        if self._begun is None:
            rest = self.feed.epoch()
            batch = next(rest, None)
            if batch is None:
                return None, rest
            self._begun, self._looks = (self._arrays(batch), rest), 0
        return self._begun
