"""How batches reach trainers: `Feed` and `batches` are what a training loop needs.

>>> import loaderd
>>> with loaderd.Feed(structures=["inner"], batch_size=8, seed=7) as feed:  # doctest: +SKIP
...     for images, masks in feed.epochs(3):
...         ...
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loaderd.attach import FeedError
    from loaderd.batch import Batch
    from loaderd.client import Feed, batches

__all__ = ["Batch", "Feed", "FeedError", "batches"]


def __getattr__(name: str) -> Any:
    """Load what a trainer needs when it is asked for: the daemon's workers, which start with each feed, need none of it."""
    if name not in __all__:
        raise AttributeError(f"module 'loaderd' has no attribute {name!r}")
    from loaderd import attach, client

    return getattr(attach if name == "FeedError" else client, name)
