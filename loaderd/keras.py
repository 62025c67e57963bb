"""A feed as Keras 3 expects it: what `model.fit`, `evaluate` and `predict` take as `x` and as `validation_data`, on any backend.

Neither of the two forms that Keras documents fits a stream. It asks a `PyDataset` for batches by index, shuffled by `fit`'s default, and
takes some (one, or two with TensorFlow) only to see shapes, without saying so: they would be missing in the epoch. Of a generator it
repeats the first two at each validation, and cannot tell where an epoch ends. So this is what Keras makes of both inside, a
`DataAdapter`, which `fit` takes as it is from Keras 3.8 on ("allow passing a custom data adapter"): it is asked for iterators, so an
iterator is an epoch, and one that was left after its first batch was a look.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from catalog.errors import UsageError
from loaderd.arrays import ArraysLookedAt
from loaderd.batch import Batch
from loaderd.client import Feed

try:
    import keras
    from keras.src.trainers.data_adapters import data_adapter_utils
    from keras.src.trainers.data_adapters.data_adapter import DataAdapter
except ModuleNotFoundError as error:
    raise UsageError(f"feed.keras() needs Keras and a backend, and there is no {error.name}: pip install 'scanfeed[keras]'") from None
if tuple(map(int, keras.__version__.split(".")[:2])) < (3, 8):
    raise UsageError(f"feed.keras() needs Keras 3.8 or later, and {keras.__version__} is installed: pip install 'scanfeed[keras]'")


class KerasBatches(ArraysLookedAt, DataAdapter):  # type: ignore[misc]
    """The batches of a feed as Keras trains on them; see `feed_keras`."""

    def __init__(self, feed: Feed, *, repeat: bool = False) -> None:
        super().__init__(feed)
        self._repeat = repeat
        self._at = (0, 0)  # epoch and index of the batch that came last

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        while True:
            for arrays in super().__iter__():
                if len(arrays[0]):  # the mean loss of a batch in which nothing could be read is NaN
                    yield arrays
            if not self._repeat:
                return

    def _arrays(self, batch: Batch) -> tuple[Any, ...]:
        self._at = batch.epoch, batch.index
        images, *targets = (array[batch.valid] for array in self._views(batch))  # copies, without padding
        images = _with_channels(images) if images.ndim == 3 else images
        targets = [_channels_moved(target) if target.ndim == 4 else _with_channels(target) for target in targets]
        if not targets:
            return (images,)
        return images, targets[0] if len(targets) == 1 else tuple(targets)

    # What Keras asks a DataAdapter.

    def get_numpy_iterator(self) -> Any:
        return iter(self)

    def get_jax_iterator(self) -> Any:
        return iter(self)

    def get_torch_dataloader(self) -> Any:
        return data_adapter_utils.get_torch_dataloader(self)

    def get_tf_dataset(self) -> Any:
        from loaderd.tensorflow import dataset_of

        return dataset_of(self, fixed=False)

    @property
    def num_batches(self) -> int | None:
        return None if self._repeat else len(self)

    @property
    def batch_size(self) -> None:
        return None

    def on_epoch_end(self) -> None:
        """The last batch was trained on: Keras counts, and does not ask for one more."""
        epoch, index = self._at
        if index + 1 == len(self):
            self.feed._acknowledge(epoch, index)


def feed_keras(feed: Feed, *, repeat: bool = False) -> KerasBatches:
    """Return the feed for ``model.fit(feed.keras(), epochs=…)``, `evaluate` and `predict`; an epoch of Keras is one of the feed.

    As ``validation_data`` take a feed of its own, with ``shuffle=False``. A batch is (x, y):

    - x: images (B, H, W, 1) of the feed's dtype; of a feed with channels as they are. With ``image_data_format`` ``"channels_first"``
      (B, 1, H, W).
    - y: masks, bool (B, H, W, 1), or (B, H, W, K) of K structures; with ``"channels_first"`` (B, K, H, W). Or labels, int64 (B,), of
      sequences (B, L); (masks, labels) of a feed with both; of a feed with neither there is x alone.

    What is no sample (padding, or ``on_error="blank"``) is left out rather than weighted by zero, since Keras' metrics take no heed
    of weights. So ``tail="short"`` and ``"pad"`` are the same here: the last batch is smaller, and a backend that compiles does so once
    more for it. ``tail="drop"`` avoids that.

    Args:
        feed: The feed; it stays the caller's, who closes it.
        repeat: Without an end: an epoch of Keras is then ``fit(…, steps_per_epoch=…)`` batches, whatever their number, and goes on
            where the last one ended. Without it `steps_per_epoch` may be left out or be ``len(feed)``.

    Raises:
        UsageError: If Keras or its backend is not installed, or too old.
    """
    return KerasBatches(feed, repeat=repeat)


def _with_channels(array: NDArray[Any]) -> NDArray[Any]:
    """(B, H, W) → (B, H, W, 1), or (B, 1, H, W); labels as they are."""
    if array.ndim < 3:
        return array
    return array[:, None] if keras.config.image_data_format() == "channels_first" else array[..., None]


def _channels_moved(masks: NDArray[Any]) -> NDArray[Any]:
    """(B, K, H, W) → (B, H, W, K), unless Keras has them first."""
    return masks if keras.config.image_data_format() == "channels_first" else np.ascontiguousarray(np.moveaxis(masks, 1, -1))
