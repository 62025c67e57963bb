"""`async for batch in feed` and `feed.numpy()`, which need no framework, and what docs/frameworks.md says of them."""

from __future__ import annotations

import asyncio
import gc
import re
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from loaderd import Batch, Feed, FeedError
from tests.processes import wait_until

FRAMEWORKS = (Path(__file__).resolve().parent.parent / "docs" / "frameworks.md").read_text()


def test_async_for(ingested: str) -> None:
    """An epoch by `async for` is that of `for`; the loop goes on while it waits; what was cancelled comes next; closing ends a wait."""
    with Feed(structures=["inner"], batch_size=2, shuffle=False, slots=2, timeout_s=600) as feed:
        expected = [(batch.index, batch.sample_ids.tolist()) for batch in feed.epoch()]
        assert len(expected) > 4

        async def one_epoch() -> list[tuple[int, list[int]]]:
            return [(batch.index, batch.sample_ids.tolist()) async for batch in feed]

        assert asyncio.run(one_epoch()) == expected

        async def cancelled() -> list[tuple[int, list[int]]]:
            batches = aiter(feed)
            held = [await anext(batches), await anext(batches)]
            # Both slots are held, so nothing can come. The loop runs on, and is not asked to wait for the thread: for ten minutes.
            begun = time.monotonic()
            for _ in range(3):
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(anext(batches), 0.05)
            assert time.monotonic() - begun < 60
            seen = [(batch.index, batch.sample_ids.tolist()) for batch in held]
            held.clear()
            async for batch in batches:
                seen.append((batch.index, batch.sample_ids.tolist()))
            return seen

        assert asyncio.run(cancelled()) == expected

        async def left() -> list[int]:
            async for batch in feed:
                if batch.index == 1:
                    break
            del batch
            return [batch.epoch async for batch in feed]

        assert asyncio.run(left()) == [feed.next_epoch - 1] * len(expected)

        async def closed(held: list[Batch]) -> None:
            batches = aiter(feed)
            held += [await anext(batches), await anext(batches)]
            waiting = asyncio.create_task(anext(batches))  # type: ignore[arg-type]
            await asyncio.sleep(0.05)
            feed.close()
            with pytest.raises(FeedError, match="closed"):
                await waiting

        asyncio.run(closed([]))
    gc.collect()
    assert wait_until(lambda: all(thread.name != "loaderd-aio" for thread in threading.enumerate())), "a thread outlived its iteration"


def test_copies_and_the_documented_ways(ingested: str) -> None:
    """`feed.numpy()` gives all batches of an epoch out of fewer slots, to keep and to write to; what the docs show runs."""
    with Feed(structures=["inner"], batch_size=2, shuffle=False, slots=2) as feed:
        data = feed.numpy()
        kept = list(data)
        assert len(kept) == len(data) > 2
        for (images, masks), batch in zip(kept, feed.epoch(), strict=True):
            assert np.array_equal(images, batch.images) and np.array_equal(masks, batch.masks)
            images[:] = 0
            masks[:] = True
        # Meanwhile this process has a daemon, which the blocks' feeds share.
        for title, number in (("NumPy and asyncio", 2), ("The seeds' way", 2)):
            section = re.search(rf"^## {title}$(.*?)(^## |\Z)", FRAMEWORKS, re.M | re.S)
            assert section is not None
            blocks = re.findall(r"^```python\n(.*?)^```", section[1], re.M | re.S)
            assert len(blocks) == number
            for block in blocks:
                exec(compile(block, f"docs/frameworks.md: {title}", "exec"), {"__name__": "__main__"})
