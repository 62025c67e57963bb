"""`feed.tensorflow()`: a tf.data.Dataset whose spec holds, whose elements stay right, and whose iterations are the feed's epochs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

from tests.labelled import label

pytest.importorskip("tensorflow")

# In a process of its own: TensorFlow's threads and warnings stay there, and it takes 6 s of CPU to load.
DATASETS = """
import numpy as np, tensorflow as tf
from loaderd import Feed
from tests.labelled import COUNT, SEQUENCES, WIDTH, check_digits, check_sequences, check_views

with (
    Feed(structures=["inner"], batch_size=4, limit=10, slots=2, seed=5, run="short") as feed,
    Feed(structures=["inner", "outer"], batch_size=4, limit=6, slots=2, tail="pad", dtype="float64", run="pad") as padded,
    Feed(structures=["inner"], batch_size=4, limit=10, seed=5, run="truth") as same,
):
    truth = list(same.numpy()) + list(same.numpy())
    data = feed.tensorflow()
    assert data.element_spec == (tf.TensorSpec((None, 64, 64), tf.float32), tf.TensorSpec((None, 64, 64), tf.bool))
    # Two epochs, of which all are kept, read ahead out of two slots.
    kept = list(data.repeat(2).prefetch(4))
    assert len(kept) == len(truth) == 6
    for tensors, arrays in zip(kept, truth):
        for tensor, array in zip(tensors, arrays, strict=True):
            assert np.array_equal(tensor.numpy(), array)
    assert len(list(data)) == 3  # the next epoch

    data = padded.tensorflow(fields=("images", "masks", "valid", "sample_ids"))
    assert data.element_spec == (
        tf.TensorSpec((4, 64, 64), tf.float64), tf.TensorSpec((4, 2, 64, 64), tf.bool),
        tf.TensorSpec((4,), tf.bool), tf.TensorSpec((4,), tf.int64),
    )
    assert [valid.numpy().tolist() for _, _, valid, _ in data] == [[True] * 4, [True, True, False, False]]

with (
    Feed(labels="label", batch_size=8) as labelled,
    Feed(structures=["inner"], labels="view", batch_size=8) as both,
    Feed(labels="label", sequences=SEQUENCES, batch_size=8) as composed,
):
    data = labelled.tensorflow()
    assert data.element_spec == (tf.TensorSpec((None, 6, 5), tf.float32), tf.TensorSpec((None,), tf.int64))
    assert sum(check_digits(images, labels) for images, labels in data) == COUNT
    assert sum(check_views(masks, labels) for _, masks, labels in both.tensorflow()) == 12
    data = composed.tensorflow()
    assert data.element_spec == (tf.TensorSpec((None, 6, WIDTH), tf.float32), tf.TensorSpec((None, 4), tf.int64))
    assert sum(check_sequences(images, digits) for images, digits in data) == COUNT
    data = composed.tensorflow(fields=["images", "labels", "boxes"])
    assert data.element_spec[2] == tf.TensorSpec((None, 4, 4), tf.int64)
    assert sum(check_sequences(*tensors) for tensors in data) == COUNT
"""

REPOSITORY = Path(__file__).resolve().parent.parent

# What the docs show, run behind it.
DOCUMENTED = re.findall(r"^## TensorFlow$.*?^```python\n(.*?)^```", (REPOSITORY / "docs" / "frameworks.md").read_text(), re.M | re.S)


def test_a_dataset_is_the_feeds_epochs(ingested: str, conn: psycopg.Connection, tmp_path: Path) -> None:
    """Each iteration is the next epoch, bit for bit and whole, from the first on although the spec needs a batch; elements that are kept
    stay right when their slots are used again; the spec leaves the batch size open only where batches can be short. Of labels= an
    element is (images, labels), with structures (images, masks, labels); of sequences= labels are the digits, and `fields` has boxes."""
    label(ingested, tmp_path)
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2"}
    command = [sys.executable, "-c", DATASETS + DOCUMENTED[0]]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    coverage = conn.execute(
        "SELECT run, count(*), sum(planned - acknowledged), sum(twice) FROM epoch_coverage "
        "WHERE run IN ('pad', 'short', 'truth') GROUP BY run ORDER BY run"
    )
    assert coverage.fetchall() == [("pad", 1, 0, 0), ("short", 3, 0, 0), ("truth", 2, 0, 0)]
