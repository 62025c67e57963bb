"""`feed.jax()`: arrays on the local devices, right for as long as they live, whatever becomes of the slot they came from."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from catalog.errors import UsageError
from loaderd import Feed
from tests.labelled import COUNT, SEQUENCES, check_digits, check_sequences, check_views, label

pytest.importorskip("jax")

# Four devices: a process decides on that once.
SHARDED = """
import gc, jax, numpy as np
from loaderd import Feed
from catalog.errors import UsageError

assert jax.local_device_count() == 4
with Feed(structures=["inner"], batch_size=4, limit=10, slots=2, tail="pad", shuffle=False) as feed:
    truth = [[array.copy() for array in (*batch, batch.valid)] for batch in feed.epoch()]
    data = feed.jax(fields=("images", "masks", "valid"))
    kept = [arrays for _ in range(3) for arrays in data]  # 9 batches out of 2 slots
    step = jax.jit(lambda images: images * 2, donate_argnums=0)
    for images, masks, valid in kept:
        assert [shard.data.shape for shard in images.addressable_shards] == [(1, 64, 64)] * 4
        assert images.sharding.is_equivalent_to(masks.sharding, 3) and images.sharding.spec == jax.sharding.PartitionSpec("batch")
    for arrays, expected in zip(kept, truth * 3, strict=True):
        for array, right in zip(arrays, expected, strict=True):
            assert array.dtype == right.dtype and np.array_equal(array, right)
    assert all(np.array_equal(step(images), 2 * right[0]) for (images, _, _), right in zip(kept, truth * 3))
    assert kept[2][2].tolist() == [True, True, False, False]
    assert step._cache_size() == 1
with Feed(structures=["inner"], batch_size=6, tail="drop") as feed:
    try:
        feed.jax()
    except UsageError as error:
        print(error)
"""

# What the docs show, run behind it.
DOCUMENTED = re.findall(
    r"^## JAX$.*?^```python\n(.*?)^```", (Path(__file__).resolve().parent.parent / "docs" / "frameworks.md").read_text(), re.M | re.S
)


def test_arrays_stay_right_over_four_devices(ingested: str) -> None:
    """Kept JAX arrays, sharded over four devices, hold what their batches held after the two slots were used four times over, and may
    be donated; padding keeps one shape, so nothing compiles again; a batch size that cannot be dealt out is refused."""
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SHARDED + "step = jax.jit(lambda images, masks, valid: images.mean())\n" + DOCUMENTED[0]],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "batch_size=6: cannot be dealt out evenly to the 4 devices" in done.stdout


def test_short_batches_are_refused(ingested: str) -> None:
    """A feed whose last batch may be short is refused at once, with the remedy; so is a field that there is not."""
    with Feed(structures=["inner"], batch_size=5) as feed:
        with pytest.raises(UsageError, match=r"compiles a step again for each: open the feed with tail='pad'"):
            feed.jax()
        with pytest.raises(UsageError, match=r"fields=\['image'\]: must be a list of some of images, masks"):
            feed.numpy(fields=["image"])
        with pytest.raises(UsageError, match="'labels': this feed has none"):
            next(iter(feed.numpy(fields=["labels"])))


def test_labels_and_sequences(ingested: str, tmp_path: Path) -> None:
    """A tuple is (images, labels), with structures (images, masks, labels); of sequences labels are the digits (B, L), and `fields` has
    their boxes. JAX makes int64 int32; what is not valid can be left out."""
    label(ingested, tmp_path)
    with Feed(labels="label", batch_size=8, tail="pad") as feed:
        assert sum(images.shape == (8, 6, 5) and labels.shape == (8,) for images, labels in feed.jax()) == len(feed)
        batches = [[np.asarray(array) for array in arrays] for arrays in feed.jax(fields=["images", "labels", "valid"])]
        assert all(labels.dtype == np.int32 for _, labels, _ in batches)
        assert sum(check_digits(images[valid], labels[valid]) for images, labels, valid in batches) == COUNT
    with Feed(structures=["inner"], labels="view", batch_size=4, tail="drop") as feed:
        assert sum(check_views(masks, labels) for _, masks, labels in feed.jax()) == 12
    with Feed(labels="label", sequences=SEQUENCES, batch_size=8, tail="drop") as feed:
        assert sum(check_sequences(images, digits) for images, digits in feed.jax()) == COUNT // 8 * 8
        assert sum(check_sequences(*arrays) for arrays in feed.jax(fields=["images", "labels", "boxes"])) == COUNT // 8 * 8
