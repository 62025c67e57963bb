"""A feed as TensorFlow expects it: a `tf.data.Dataset`, an epoch an iteration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from catalog.errors import UsageError
from loaderd.arrays import ArraysLookedAt
from loaderd.attach import FeedError
from loaderd.client import Feed

try:
    import tensorflow as tf
except ModuleNotFoundError:
    raise UsageError("feed.tensorflow() needs TensorFlow, which is not installed: pip install 'scanfeed[tensorflow]'") from None


def feed_tensorflow(feed: Feed, *, fields: Sequence[str] | None = None) -> Any:
    """Return a `tf.data.Dataset` of tuples of tensors; each iteration is the feed's next epoch, ``repeat(3)`` three of them.

    The tensors are copies: ``prefetch`` and ``cache`` are safe. The daemon loads, batches and shuffles: ``shuffle`` and ``batch`` have
    nothing to do here. Iterators that run at the same time would share the feed's epochs: one at a time.

    The element spec knows everything but the number of samples a batch, which is None, or with ``tail="pad"`` the batch size: in the
    other tails a batch can be short. For the shapes the first batch is waited for here; load a state before (``resume=``).

    Args:
        feed: The feed; it stays the caller's, who closes it.
        fields: What an element holds, as of `loaderd.arrays.Arrays`; by default (images, masks), or what else the feed's batches unpack to.

    Raises:
        UsageError: If TensorFlow is not installed, or there is no such field.
        FeedError: If no batch comes.
    """
    return dataset_of(ArraysLookedAt(feed, fields=fields), fixed=feed.tail == "pad")


def dataset_of(batches: ArraysLookedAt, *, fixed: bool) -> Any:
    """Return a dataset over something that can be iterated over and over; `fixed`: every batch is of the first one's size."""
    first, _ = batches.begin()
    if first is None:
        raise FeedError("the epoch has no batch, so there are no shapes to tell TensorFlow; see `loaderd run show`")
    spec = tf.nest.map_structure(lambda array: tf.TensorSpec(array.shape if fixed else (None, *array.shape[1:]), array.dtype), first)
    options = tf.data.Options()
    # Else it reads a batch ahead unasked: that would count as trained on, and a look would take two.
    options.experimental_optimization.inject_prefetch = False
    return tf.data.Dataset.from_generator(lambda: batches, output_signature=spec).with_options(options)
