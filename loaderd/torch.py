"""A feed as PyTorch expects it: an IterableDataset of tensors, one epoch an `iter()`.

A batch's arrays are read-only views on shared memory. PyTorch knows no read-only tensors: `add_` on one that was made of such a view
kills the process with SIGSEGV. So tensors for the CPU are copies unless `copy=False` asks for the views. What goes to a GPU is copied
into page-locked memory and from there on a stream of its own, while the GPU works on the batches before. That memory is PyTorch's own,
whose allocator lets nobody have a block again before the copy out of it is through; the slot is free as soon as the first copy is done.
Registering the ring itself with CUDA (`cudaHostRegister`) would save that first copy; docs/frameworks.md says why it is not done.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from catalog.errors import UsageError
from loaderd.arrays import Arrays
from loaderd.attach import FeedError
from loaderd.batch import Batch
from loaderd.client import Feed

try:
    import torch
    from torch.utils.data import IterableDataset, get_worker_info
except ModuleNotFoundError:
    raise UsageError("feed.torch() needs PyTorch, which is not installed: pip install 'scanfeed[torch]'") from None


class FeedDataset(Arrays, IterableDataset[Any]):  # type: ignore[misc]
    """The batches of a feed as tuples of tensors; each `iter()` is the feed's next epoch, or the rest of one that was resumed.

    For a plain loop, for ``DataLoader(dataset, batch_size=None)`` or torchdata's StatefulDataLoader, for Lightning. The daemon loads
    and batches in processes of its own, so there is nothing for a DataLoader's workers to do: ``num_workers`` must be 0.

    Args:
        feed: The feed; it stays the caller's, who closes it.
        device: Where the tensors lie: ``"cpu"`` or ``"cuda"``, ``"cuda:1"``, ….
        fields: What a tuple holds, as of `loaderd.arrays.Arrays`; by default (images, masks), or what else the feed's batches unpack to.
        copy: False gives tensors on the CPU that are the views themselves: nothing may be written to them, an in-place operation ends
            the process; and each holds a slot of the ring for as long as it or a view of it lives. For batches that are moved to a
            device at once.

    Attributes:
        feed: As above.

    Raises:
        UsageError: If an argument cannot be right, or there is no such device.
    """

    def __init__(self, feed: Feed, *, device: str | Any = "cpu", fields: Sequence[str] | None = None, copy: bool = True) -> None:
        super().__init__(feed, fields=fields)
        if type(copy) is not bool:
            raise UsageError(f"copy={copy!r}: must be True or False")
        self._device = _device(device)
        self._copy = copy
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        if get_worker_info() is not None:
            raise FeedError("a DataLoader around a Feed must have num_workers=0: the feed loads in processes of its own")
        # Nothing begins before the first next(): StatefulDataLoader makes iterators that it throws away.
        return super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Return where to go on, behind the batch that came last: `Feed.state_dict`."""
        return self.feed.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on there, before the first epoch: `Feed.load_state_dict`."""
        self.feed.load_state_dict(state)

    def _arrays(self, batch: Batch) -> tuple[Any, ...]:
        return tuple(map(self._tensor, self._views(batch)))

    def _tensor(self, array: NDArray[Any]) -> Any:
        if self._stream is not None:
            return self._on_gpu(torch.from_numpy(_writable(array)))
        return torch.from_numpy(array.copy() if self._copy else _writable(array))

    def _on_gpu(self, view: Any) -> Any:
        pinned = view.pin_memory()
        now = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            tensor = pinned.to(self._device, non_blocking=True)
        now.wait_stream(self._stream)  # the trainer's kernels wait on the GPU, not the CPU
        tensor.record_stream(now)  # made on one stream, used on another: not to be overwritten before that one is through
        return tensor


class _Claim:
    """An array's memory, said to be writable: else PyTorch warns of each read-only array that it is made a tensor of."""

    def __init__(self, array: NDArray[Any]) -> None:
        self._array = array  # keeps the slot, for as long as the tensor's memory is in use
        self.__array_interface__ = {**array.__array_interface__, "data": (array.__array_interface__["data"][0], False)}


def _writable(array: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(_Claim(array))


def _device(given: Any) -> Any:
    try:
        device = torch.device(given)
    except (RuntimeError, TypeError):
        raise UsageError(f"device={given!r}: must be 'cpu' or 'cuda', or 'cuda:0', 'cuda:1', …") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device={given!r}: must be 'cpu' or 'cuda'; for others move what feed.torch(copy=False) gives")
    if device.type == "cuda" and not (device.index or 0) < torch.cuda.device_count():
        raise UsageError(f"device={given!r}: PyTorch sees {torch.cuda.device_count()} CUDA devices here")
    return device
