"""`feed.keras()`: an epoch of Keras is an epoch of the feed, whatever Keras looks at before and counts behind. In processes: a process
has one backend."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import psycopg
import pytest

from tests.labelled import label

pytest.importorskip("keras")

# The loss is the mean of the masks: over an epoch, in which Keras weighs batches by their samples, that of all of them, each once.
FIT = """
import json, os, sys, warnings
warnings.simplefilter("error", UserWarning)
import keras, numpy as np
from keras import layers, losses, ops
from loaderd import Feed
from tests.labelled import COUNT, SEQUENCES, check_digits, check_sequences, check_views

def mean_mask(y, p):
    return ops.mean(ops.cast(y, "float32")) + 0 * ops.mean(p)

def model():
    made = keras.Sequential([layers.Conv2D(1, 1)])
    made.compile(optimizer=keras.optimizers.SGD(0.0), loss=mean_mask)
    return made

class States(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        state = train.state_dict()
        states.append((state["epoch"], state["step"]))

states = []
with (
    Feed(structures=["inner"], batch_size=5, limit=12, seed=3, run="fit") as train,
    Feed(structures=["inner"], batch_size=4, where="patient = 'SYN0002'", shuffle=False, run="validation") as validation,
    Feed(structures=["inner", "outer"], batch_size=5, limit=8, tail="pad", run="repeat") as several,
):
    data = train.keras()
    images, masks = next(iter(data))
    shapes = [images.shape, str(images.dtype), masks.shape, str(masks.dtype)]
    unbuilt = model()
    history = unbuilt.fit(data, epochs=3, validation_data=validation.keras(), callbacks=[States()], verbose=0).history
    history["exact"] = unbuilt.fit(data, epochs=2, steps_per_epoch=len(train), verbose=0).history["loss"]
    # An epoch of Keras is two of the feed here, whose padding is left out.
    history["repeat"] = model().fit(several.keras(repeat=True), epochs=2, steps_per_epoch=4, verbose=0).history["loss"]
    predicted = unbuilt.predict(validation.keras(), verbose=0).shape

# Classifiers that say the same of all images: the loss of what is a label is then -log(1/10), whatever a sequence is filled up with.
flat = keras.Sequential([layers.Flatten(), layers.Dense(10, kernel_initializer="zeros")])
each = keras.Sequential([layers.Flatten(), layers.Dense(40, kernel_initializer="zeros"), layers.Reshape((4, 10))])
history["labels"] = []
with (
    Feed(labels="label", batch_size=8) as labelled,
    Feed(structures=["inner"], labels="view", batch_size=4) as both,
    Feed(labels="label", sequences=SEQUENCES, batch_size=8) as composed,
):
    assert sum(check_digits(x[..., 0], y) for x, y in labelled.keras()) == COUNT
    assert sum(check_views(masks[..., 0], labels) for _, (masks, labels) in both.keras()) == 12
    assert sum(check_sequences(x[..., 0], y) for x, y in composed.keras()) == COUNT
    for classifier, feed, ignored in ((flat, labelled, None), (each, composed, -1)):
        loss = losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=ignored, reduction="mean")
        classifier.compile(optimizer=keras.optimizers.SGD(0.0), loss=loss)
        history["labels"] += classifier.fit(feed.keras(), verbose=0).history["loss"]
found = {"history": history, "shapes": shapes, "predicted": predicted, "states": states, "backend": keras.backend.backend()}
print("found", json.dumps(found))
"""

REPOSITORY = Path(__file__).resolve().parent.parent

# What the docs show, run behind it.
DOCUMENTED = re.findall(r"^## Keras$.*?^```python\n(.*?)^```", (REPOSITORY / "docs" / "frameworks.md").read_text(), re.M | re.S)


def needs(backend: str) -> pytest.param:  # type: ignore[valid-type]
    """A backend that may not be installed."""
    return pytest.param(backend, marks=pytest.mark.skipif(importlib.util.find_spec(backend) is None, reason=f"no {backend}"))


@pytest.mark.parametrize("backend", [needs("jax"), needs("torch"), needs("tensorflow")])
def test_an_epoch_of_keras_is_one_of_the_feed(ingested: str, conn: psycopg.Connection, backend: str, tmp_path: Path) -> None:
    """On each backend `fit` trains on every sample once an epoch, short last batch included, validates on the same samples each time,
    and leaves no batch unacknowledged: what it took to build the model came again, and no padding was trained on. Of labels= y is the
    labels, with structures (masks, labels); of sequences= the digits, of which a loss ignores the -1 behind the last."""
    label(ingested, tmp_path)
    environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "2"}
    done = subprocess.run(
        [sys.executable, "-c", FIT + "model = unbuilt\n" + DOCUMENTED[0].replace("SCD0000201", "SYN0002")],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        cwd=REPOSITORY,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(re.findall(r"^found (.*)", done.stdout, re.M)[0])
    assert said["backend"] == backend

    def mean(condition: str, limit: int = 12) -> float:
        areas = conn.execute(f"SELECT area_px FROM sample WHERE {condition} ORDER BY sample_key LIMIT {limit}").fetchall()  # type: ignore[call-overload]
        return float(np.mean(areas)) / 64**2

    one, other = mean("structure = 'inner'"), mean("structure = 'inner' AND patient = 'SYN0002'")
    both = "sample_id IN (SELECT sample_id FROM sample WHERE structure <> 'view' GROUP BY 1 HAVING count(*) = 2)"
    two = (mean(f"structure = 'inner' AND {both}", 8) + mean(f"structure = 'outer' AND {both}", 8)) / 2
    means = {"loss": [one] * 3, "val_loss": [other] * 3, "exact": [one] * 2, "repeat": [two] * 2, "labels": [np.log(10)] * 2}
    for name, expected in means.items():
        assert said["history"][name] == pytest.approx(expected, rel=1e-5), name
    assert said["shapes"] == [[5, 64, 64, 1], "float32", [5, 64, 64, 1], "bool"]
    assert said["states"] == [[1, 0], [2, 0], [3, 0]]
    coverage = conn.execute(
        "SELECT run, count(*), sum(planned - acknowledged), sum(missing), sum(twice) FROM epoch_coverage "
        "WHERE run IN ('fit', 'validation', 'repeat') GROUP BY run ORDER BY run"
    ).fetchall()
    validated = said["predicted"][0]
    assert said["predicted"] == [validated, 64, 64, 1]
    assert coverage == [("fit", 5, 0, 0, 0), ("repeat", 4, 0, 0, 0), ("validation", 4, 0, 0, 0)]
