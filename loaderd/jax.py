"""A feed as JAX expects it: arrays on the local devices, always of one shape.

`jax.device_put` of a NumPy array on a CPU device copies nothing where it can: the JAX array is the slot, and keeps it. A loop that keeps
losses' inputs would soon hold the whole ring, and a step that donates its arguments would have XLA write to shared memory that is mapped
read-only. So what goes to CPU devices is copied first. An accelerator copies from the slot itself, which JAX holds until that is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from catalog.errors import UsageError
from loaderd.arrays import Arrays
from loaderd.attach import FeedError
from loaderd.batch import Batch
from loaderd.client import Feed

try:
    import jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
except ModuleNotFoundError:
    raise UsageError("feed.jax() needs JAX, which is not installed: pip install 'scanfeed[jax]'") from None


class JaxArrays(Arrays):
    """The batches of a feed as tuples of `jax.Array`; see `feed_jax`."""

    def __init__(self, feed: Feed, *, fields: Sequence[str] | None = None) -> None:
        super().__init__(feed, fields=fields)
        devices = jax.local_devices()
        if feed.tail == "short":
            raise UsageError(
                "feed.jax() needs batches of one size, since JAX compiles a step again for each: open the feed with tail='pad' "
                "(fields=[…, 'valid'] says which samples are none) or tail='drop'"
            )
        if feed.batch_size % len(devices):
            raise UsageError(
                f"batch_size={feed.batch_size}: cannot be dealt out evenly to the {len(devices)} devices of this process; "
                f"pass a multiple of {len(devices)}"
            )
        self._copies = devices[0].platform == "cpu"
        self._sharding = NamedSharding(Mesh(np.array(devices), ("batch",)), PartitionSpec("batch"))

    def _arrays(self, batch: Batch) -> tuple[Any, ...]:
        if len(batch) != self.feed.batch_size:  # tail="drop", and a sample could not be read or was revoked
            raise FeedError(
                f"batch {batch.index} of epoch {batch.epoch} has {len(batch)} samples instead of {self.feed.batch_size}, since some could "
                f"not be read or were revoked, and JAX would compile again for it; open the feed with tail='pad'"
            )
        arrays = [array.copy() for array in self._views(batch)] if self._copies else self._views(batch)
        return tuple(jax.device_put(arrays, self._sharding))


def feed_jax(feed: Feed, *, fields: Sequence[str] | None = None) -> JaxArrays:
    """Return the batches of a feed as tuples of `jax.Array`, an epoch an iteration.

    With several local devices the arrays are sharded over them along the batch axis, by a `NamedSharding` over a mesh ``("batch",)``.
    Over several processes open the feed with ``rank=jax.process_index(), num_ranks=jax.process_count()``; the arrays are this process's.

    Args:
        feed: The feed, opened with ``tail="pad"`` or ``tail="drop"``; it stays the caller's, who closes it.
        fields: What a tuple holds, as of `loaderd.arrays.Arrays`; by default (images, masks), or what else the feed's batches unpack to.
            64-bit fields become 32-bit ones unless ``jax_enable_x64`` is set, as everywhere in JAX.

    Raises:
        UsageError: If JAX is not installed, if batches are not all of one size, or cannot be dealt out evenly to the devices.
    """
    return JaxArrays(feed, fields=fields)
