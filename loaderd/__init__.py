"""How batches reach trainers: `Feed` and `batches` are what a training loop needs.

>>> import loaderd
>>> with loaderd.Feed(structures=["inner"], batch_size=8, seed=7) as feed:  # doctest: +SKIP
...     for images, masks in feed.epochs(3):
...         ...
"""

from loaderd.attach import FeedError
from loaderd.client import Batch, Feed, batches

__all__ = ["Batch", "Feed", "FeedError", "batches"]
