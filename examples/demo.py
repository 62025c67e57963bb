"""`make demo`: from a folder of studies to a trained model, with every step shown.

Without an argument it makes synthetic studies first. The model is a logistic regression per pixel on a few local features, in numpy
alone: enough to see a loss fall and to measure Dice on a patient it never saw, not enough to be of use.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from studies import SCRATCH, own_catalog, synthetic_studies, within

import loaderd

STEPS = 100
Floats = NDArray[np.float32]


def main() -> None:
    """Ingest, show, train, audit."""
    begun = time.monotonic()
    home = own_catalog("demo")
    folder = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else synthetic_studies()
    say(f"catalog in {home}; studies in {folder}")
    catalog("ingest", str(folder))

    here = within(folder)
    rows = ask(
        f"SELECT patient, min(sample_id) AS sample_id, count(*) FROM sample WHERE structure = 'inner' AND {here} GROUP BY 1 ORDER BY 1"
    )
    if len(rows) < 2:
        sys.exit(f"demo: {folder} has {len(rows)} patients with inner contours; two are needed, one of them to be held back")
    both = ask(f"SELECT sample_id FROM sample WHERE {here} GROUP BY 1 HAVING count(*) > 1 ORDER BY max(area_px) DESC LIMIT 1")
    picture = SCRATCH / "overlay.png"
    SCRATCH.mkdir(exist_ok=True)
    catalog("show", str((both or rows)[0]["sample_id"]), "-o", str(picture), quiet=True)
    say(f"overlay picture: {picture.resolve()}")

    held_back = rows[-1]["patient"]
    say(f"training on {len(rows) - 1} of {len(rows)} patients; held back: {held_back}")
    selection: dict[str, Any] = {"structures": ["inner"], "batch_size": 8}
    is_held_back = "patient = '" + str(held_back).replace("'", "''") + "'"
    with loaderd.Feed(**selection, where=f"{here} AND NOT {is_held_back}", seed=7) as feed:
        model = Model()
        epochs = -(-STEPS // len(feed))
        for batch in feed.epochs(epochs):
            if batch.epoch == batch.index == 0:
                say(f"first batch {time.monotonic() - begun:.1f} s after the first command")
            images, masks = batch
            loss = model.step(images, masks)
            if batch.index == len(feed) - 1 and (batch.epoch % max(1, epochs // 8) == 0 or batch.epoch == epochs - 1):
                say(f"epoch {batch.epoch:2}: loss {loss:.3f}")
        model.choose_threshold([(image.copy(), mask.copy()) for batch in feed.epoch() for image, mask in zip(*batch, strict=True)])
        with loaderd.Feed(**selection, where=f"{here} AND {is_held_back}", shuffle=False) as validation:
            dice = [dice_of(model.predict(image), mask) for batch in validation.epoch() for image, mask in zip(*batch, strict=True)]
            say(f"Dice on {held_back}, whom it never saw: {np.mean(dice):.3f} (mean of {len(dice)} images)")
        samples, seconds = measure(feed)
        say(f"feed alone: {samples / seconds:,.0f} samples/s ({samples} samples, {feed.num_samples} an epoch)")
        run = feed.run
    audit = ask(
        "SELECT count(*) AS epochs, sum(planned) AS planned, sum(delivered) AS delivered, sum(acknowledged) AS acknowledged, "
        f"sum(missing) AS missing, sum(twice) AS twice FROM epoch_coverage WHERE run = '{run}'"
    )[0]
    say(f"audit of run {run}: " + ", ".join(f"{value} {name}" for name, value in audit.items()))
    say(f"done in {time.monotonic() - begun:.1f} s")


def measure(feed: loaderd.Feed, seconds: float = 2.0) -> tuple[int, float]:
    """Return samples and seconds of feeding alone, every page touched."""
    samples, begun = 0, time.monotonic()
    while time.monotonic() - begun < seconds:
        for batch in feed.epochs(4):
            samples += len(batch)
            batch.images.reshape(-1).view(np.uint8)[::4096].sum()
    return samples, time.monotonic() - begun


class Model:
    """Logistic regression per pixel, trained by Adam."""

    def __init__(self) -> None:
        self.weights = np.zeros(0, np.float32)
        self.steps = 0
        self.threshold = 0.0

    def step(self, images: Floats, masks: NDArray[np.bool_]) -> float:
        """Take one step; returns the mean binary cross-entropy, in which both classes weigh alike."""
        x = np.concatenate([features(image) for image in images])
        y = masks.reshape(-1)
        if not self.steps:
            self.centre, self.scale = x.mean(0), x.std(0) + 1e-6
            self.weights = np.zeros(x.shape[1] + 1, np.float32)
            self.moment, self.square = np.zeros_like(self.weights), np.zeros_like(self.weights)
        x = (x - self.centre) / self.scale
        p = 1 / (1 + np.exp(-np.clip(x @ self.weights[:-1] + self.weights[-1], -30, 30)))
        weight = np.where(y, 0.5 / max(1, y.sum()), 0.5 / max(1, (~y).sum())).astype(np.float32)
        loss = -(weight * np.log(np.where(y, p, 1 - p) + 1e-7)).sum()
        slope = weight * (p - y)
        gradient = np.append(x.T @ slope, slope.sum()).astype(np.float32)
        self.steps += 1
        self.moment = 0.9 * self.moment + 0.1 * gradient
        self.square = 0.99 * self.square + 0.01 * gradient**2
        unbiased = self.moment / (1 - 0.9**self.steps), self.square / (1 - 0.99**self.steps)
        self.weights -= 0.2 * unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8)
        return float(loss)

    def score(self, image: Floats) -> Floats:
        """Return the logit of every pixel."""
        x = (features(image) - self.centre) / self.scale
        logits: Floats = (x @ self.weights[:-1] + self.weights[-1]).reshape(image.shape)
        return logits

    def choose_threshold(self, samples: list[tuple[Floats, NDArray[np.bool_]]]) -> None:
        """Take the threshold of the best mean Dice on the training images."""
        scored = [(self.score(image), mask) for image, mask in samples]
        candidates = np.linspace(0, 8, 33)
        self.threshold = float(max(candidates, key=lambda cut: np.mean([dice_of(score > cut, mask) for score, mask in scored])))

    def predict(self, image: Floats) -> NDArray[np.bool_]:
        """Return the mask of one image."""
        mask: NDArray[np.bool_] = self.score(image) > self.threshold
        return mask


def features(image: Floats) -> Floats:
    """Return (pixels, features): brightness at several scales, texture, and where in the image."""
    low, high = np.percentile(image, (1, 99))
    grey = np.clip((image - low) / max(high - low, 1e-6), 0, 1).astype(np.float32)
    small, middle, large = (box_mean(grey, radius) for radius in (2, 6, 14))
    rough = np.sqrt(np.maximum(box_mean(grey**2, 4) - box_mean(grey, 4) ** 2, 0))
    y, x = np.meshgrid(*(np.linspace(-1, 1, size, dtype=np.float32) for size in image.shape), indexing="ij")
    columns = (grey, small, middle, large, rough, small**2, small * middle, small - large, middle - large, x, y, x**2, y**2, x * y)
    return np.stack([column.reshape(-1) for column in columns], axis=1)


def box_mean(grey: Floats, radius: int) -> Floats:
    """Return the mean over a square window, by sums of sums."""
    size = 2 * radius + 1
    sums = np.pad(grey, ((radius + 1, radius), (radius + 1, radius)), mode="edge").astype(np.float64).cumsum(0).cumsum(1)
    mean: Floats = ((sums[size:, size:] - sums[:-size, size:] - sums[size:, :-size] + sums[:-size, :-size]) / size**2).astype(np.float32)
    return mean


def dice_of(predicted: NDArray[np.bool_], drawn: NDArray[np.bool_]) -> float:
    """Return 2 |A ∩ B| / (|A| + |B|)."""
    return float(2 * (predicted & drawn).sum() / max(1, predicted.sum() + drawn.sum()))


def catalog(*arguments: str, quiet: bool = False) -> str:
    """Run a command of the catalog, shown as a user would type it."""
    if not quiet:
        say("$ catalog " + " ".join(arguments))
    done = subprocess.run([sys.executable, "-m", "catalog.cli", *arguments], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    if not quiet:
        print("  " + done.stdout.strip())
    return done.stdout


def ask(query: str) -> list[dict[str, Any]]:
    """Return the rows of an SQL query."""
    rows: list[dict[str, Any]] = json.loads(catalog("sql", query, "--json", quiet=True))
    return rows


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


if __name__ == "__main__":
    main()
