"""Composing digit sequences, beside a plain re-implementation of the seed's way, in the same run.

    python benchmarks/sequences.py [--data FOLDER] [--home FOLDER] [--imgaug PYTHON] [--json FILE]

60,000 digits: MNIST's 10,000 test images (FOLDER holds t10k-images-idx3-ubyte.gz; else random blobs) and the same moved by a pixel. Times
are CPU seconds of this process, medians; a part of `init` is the database's work, so there the wall clock counts on both sides. The seed
changed its digits by imgaug, which does not run with numpy 2: `--imgaug` names a Python that has it; without it, OpenCV does the steps.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from catalog import ingest
from catalog.database import open_database
from loaderd import digits, sequences

COUNT = 60_000
IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
ASKED, RANGE, WIDTH = list(range(10)), (0, 20), 390
BATCH = 10_000
IMGAUG = """
import sys, time, statistics, numpy as np
np.bool = bool  # imgaug 0.4 is older than numpy 1.24
from imgaug import augmenters as iaa
images = np.load(sys.argv[1])
pipeline = iaa.SomeOf(10, [
    iaa.Sometimes(0.1, iaa.GaussianBlur(sigma=(0, 0.05))), iaa.Sometimes(0.15, iaa.ElasticTransformation(alpha=(0.5, 0.6), sigma=0.15)),
    iaa.Sometimes(0.3, iaa.Dropout(0.1)), iaa.Sometimes(0.3, iaa.Crop(percent=(0, 0.25))),
], random_order=True)
taken = []
for k in range(60):
    some = images[10 * k : 10 * k + 10]
    begun = time.process_time()
    pipeline(images=some)
    taken.append(time.process_time() - begun)
print(statistics.median(taken[10:]))
"""


def digits_of(folder: Path | None) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return 60,000 images and labels."""
    if folder is not None and (folder / "t10k-images-idx3-ubyte.gz").is_file():
        data = gzip.decompress((folder / "t10k-images-idx3-ubyte.gz").read_bytes())
        images = np.frombuffer(data, np.uint8, offset=16).reshape(-1, 28, 28)
        labels = np.frombuffer(gzip.decompress((folder / "t10k-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8)
    else:
        rng = np.random.default_rng(0)
        noise = rng.random((10_000, 28, 28), np.float32)
        images = np.stack([cv2.GaussianBlur(one, (9, 9), 3) for one in noise])
        images = (np.clip((images - 0.5) * 6, 0, 1) * 255).astype(np.uint8)
        labels = rng.integers(0, 10, 10_000).astype(np.uint8)
    moves = [(0, 0), (1, 0), (-1, 0), (0, 1), (0, -1), (1, 1)]
    return np.concatenate([np.roll(images, move, (1, 2)) for move in moves])[:COUNT], np.tile(labels, 6)[:COUNT]


# ------------------------------------------------------------------------------------------ the seed's way


def seed_images(path: Path) -> Any:
    with path.open("rb") as file:
        _, count, rows, columns = struct.unpack(">4I", file.read(16))
        size = count * rows * columns
        content = struct.unpack(">" + "B" * size, file.read(size))
        return ((255 - np.asarray(content, dtype=np.float32)) / 255).reshape((count, rows, columns))


def seed_labels(path: Path) -> Any:
    with path.open("rb") as file:
        _, count = struct.unpack(">2I", file.read(8))
        return np.asarray(struct.unpack(">" + "B" * count, file.read(count)))


def seed_groups(labels: Any, path: Path) -> list[list[int]]:
    groups: list[list[int]] = [[] for _ in range(len(set(labels)))]
    for index, label in enumerate(labels):
        groups[label].append(index)
    with path.open("w") as file:
        json.dump(groups, file)
    return groups


def seed_image(images: Any, groups: list[list[int]], *, change: bool) -> Any:
    chosen = np.take(images, [random.choice(groups[digit]) for digit in ASKED], axis=0)
    if change:
        chosen = [seed_change(one) for one in chosen]
    gaps = np.random.randint(RANGE[0], RANGE[1], len(ASKED) + 1)
    image = np.zeros((28, 0), dtype=np.float32)
    for place in range(len(gaps)):
        image = np.concatenate((image, np.ones([28, gaps[place]], dtype=np.float32)), axis=1)
        if place < len(chosen):
            image = np.concatenate((image, chosen[place]), axis=1)
    return np.array(Image.fromarray(image).resize((WIDTH, 28)))


def seed_change(image: Any) -> Any:
    """Change one digit as the seed's pipeline does, by OpenCV and without what imgaug adds around it."""
    steps = [0, 1, 2, 3]
    random.shuffle(steps)
    for step in steps:
        if step == 0 and random.random() < 0.1:
            image = cv2.GaussianBlur(image, (3, 3), random.uniform(0.001, 0.05))
        elif step == 1 and random.random() < 0.15:
            away = [cv2.GaussianBlur(np.random.rand(28, 28) * 2 - 1, (3, 3), 0.15) * random.uniform(0.5, 0.6) for _ in range(2)]
            y, x = np.mgrid[:28, :28]
            image = cv2.remap(image, (x + away[0]).astype(np.float32), (y + away[1]).astype(np.float32), cv2.INTER_CUBIC)
        elif step == 2 and random.random() < 0.3:
            image = image * (np.random.rand(28, 28) >= 0.1)
        elif step == 3 and random.random() < 0.3:
            top, bottom, left, right = (int(28 * random.uniform(0, 0.25)) for _ in range(4))
            image = cv2.resize(image[top : 28 - bottom, left : 28 - right], (28, 28), interpolation=cv2.INTER_CUBIC)
    image = np.ascontiguousarray(image, np.float32)
    return cv2.normalize(image, image, 0, 1, cv2.NORM_MINMAX)


# ------------------------------------------------------------------------------------------ measuring


def taken(call: Callable[[], Any], times: int, *, clock: Callable[[], float] = time.process_time) -> float:
    """Return the median seconds of a call."""
    found = []
    for _ in range(times):
        begun = clock()
        call()
        found.append(clock() - begun)
    return statistics.median(found)


def catalogued(home: Path, folder: Path | None) -> float:
    """Make the files and the catalog, unless they are there. Returns the seconds of the ingest."""
    data = home / "mnist"
    if data.exists():
        return 0.0
    images, labels = digits_of(folder)
    home.chmod(0o755)  # as root the server runs as another
    data.mkdir(mode=0o755)
    (data / IMAGES).write_bytes(struct.pack(">4I", 2051, COUNT, 28, 28) + images.tobytes())
    (data / LABELS).write_bytes(struct.pack(">2I", 2049, COUNT) + labels.tobytes())
    with open_database() as db:
        return taken(lambda: ingest.ingest(db, data), 1, clock=time.perf_counter)


def beginning(home: Path) -> tuple[dict[str, float], digits.Digits, Any, list[list[int]]]:
    """Measure what comes before the first image, on both sides; return the digits of both."""
    images, labels = home / "mnist" / IMAGES, home / "mnist" / LABELS
    wall = time.perf_counter
    found: dict[str, float] = {}
    with open_database() as db:
        shutil.rmtree(home / "catalog" / "cache", ignore_errors=True)
        found["init, first"] = taken(lambda: digits.load(db), 1, clock=wall)
        found["init, later"] = taken(lambda: digits.load(db), 5, clock=wall)
        pool = digits.load(db)
    found["init, seed"] = taken(lambda: (seed_images(images), seed_labels(labels)), 3, clock=wall)
    floats, named = seed_images(images), seed_labels(labels)
    found["grouping"] = taken(lambda: sequences.Sequencer({"length": 10}, pool.images, pool.labels, pool.sample_ids), 9)
    found["grouping, seed"] = taken(lambda: seed_groups(named, home / "groups.json"), 5)
    return found, pool, floats, seed_groups(named, home / "groups.json")


def composing(pool: digits.Digits, *, change: bool) -> dict[str, float]:
    """Measure images of ten digits, in batches and one a call."""
    what = "image changed" if change else "image"
    asked = np.tile(np.arange(10), (BATCH, 1))
    generator = sequences.generator(1)
    out, source = np.ones((2, BATCH, 28, WIDTH), np.float32)
    drawn, members = np.empty((2, BATCH, 10), np.int64)
    boxes = np.empty((BATCH, 10, 4), np.int64)
    made = pool.sequencer({"length": 10, "spacing": RANGE, "width": WIDTH, "transform": change})
    words = generator.integers(0, 2**64, (BATCH, made._words), np.uint64)
    copies, composed = [], []
    for _ in range(5):  # in turns: what else the machine does hits both
        copies.append(taken(lambda: np.copyto(out, source), 1))
        composed.append(taken(lambda: made._compose(words, asked, None, out, drawn, boxes, members), 1))
    return {
        f"{what}, in batches": statistics.median(composed) / BATCH,
        f"{what}, of the memcpy limit": statistics.median(copies) / statistics.median(composed),
        f"{what}, one a call": taken(
            lambda: sequences.compose(ASKED, RANGE, WIDTH, seed=generator, pool=pool, transform=change), 300
        ),
    }  # fmt: skip


def streamed(pool: digits.Digits) -> float:
    """Measure images of 3 to 8 digits as a stream's worker composes them, 64 at a time: seconds an image."""
    made = pool.sequencer({"length": (3, 8)})
    keys = [key.tobytes() for key in pool.sample_keys[:64]]
    images, drawn, boxes = np.empty((64, 28, made.width), np.float32), np.empty((64, 8), np.int64), np.empty((64, 8, 4), np.int64)
    return taken(lambda: made.fill_batch(keys, 0, 1, np.arange(64), images, drawn, boxes, drawn.copy()), 100) / 64


def measure(home: Path, folder: Path | None, imgaug: str | None) -> dict[str, float]:
    cv2.setNumThreads(1)
    os.environ["CATALOG_HOME"] = str(home / "catalog")
    ingested = catalogued(home, folder)
    found, pool, floats, groups = beginning(home)
    found["ingest once"] = ingested
    found["image, seed"] = taken(lambda: seed_image(floats, groups, change=False), 300)
    found["image changed, seed's steps"] = taken(lambda: seed_image(floats, groups, change=True), 300)
    if imgaug is not None:
        np.save(home / "some.npy", floats[:600])
        done = subprocess.run([imgaug, "-c", IMGAUG, str(home / "some.npy")], capture_output=True, text=True, check=True)
        found["image changed, seed's imgaug"] = found["image, seed"] + float(done.stdout)
    return {**found, **composing(pool, change=False), **composing(pool, change=True), "image of a stream": streamed(pool)}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    default = Path(os.environ.get("SCANFEED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")) / "mnist"
    arguments.add_argument("--data", type=Path, default=default, help="folder with MNIST's test files")
    arguments.add_argument("--home", type=Path, help="where the catalog is made, and found again by the next run; by default it is deleted")
    arguments.add_argument("--imgaug", help="a Python that has imgaug 0.4 and numpy 1")
    arguments.add_argument("--json", type=Path)
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as name:
        found = measure(given.home or Path(name), given.data, given.imgaug)
    rows = [
        ("init, first time", "init, first", "init, seed", 20),
        ("init, catalog unchanged since", "init, later", "init, seed", 20),
        ("grouping by digit", "grouping", "grouping, seed", 20),
        ("an image, in batches", "image, in batches", "image, seed", 5),
        ("an image, one a call", "image, one a call", "image, seed", 5),
        ("with transform, in batches; seed: by imgaug", "image changed, in batches", "image changed, seed's imgaug", 20),
        ("with transform, one a call; seed: by imgaug", "image changed, one a call", "image changed, seed's imgaug", 20),
        ("with transform, in batches; seed: by OpenCV alone", "image changed, in batches", "image changed, seed's steps", 20),
    ]
    print(f"{'':52}{'seed':>12}{'here':>12}{'ratio':>8}  goal")
    for what, here, seed, goal in rows:
        if seed in found:
            print(f"{what:52}{found[seed] * 1e3:9.3f} ms{found[here] * 1e3:9.3f} ms{found[seed] / found[here]:7.1f}×  {goal}×")
    plain, changed = found["image, of the memcpy limit"], found["image changed, of the memcpy limit"]
    print(f"of the memcpy limit: {plain:.2f} (goal 0.4), with transform {changed:.2f}")
    print(f"a stream's image of 3 to 8 digits: {found['image of a stream'] * 1e6:.0f} µs; ingest once: {found['ingest once']:.1f} s")
    versions = f"Python {sys.version.split()[0]}, numpy {np.__version__}, OpenCV {cv2.__version__}"
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {versions}")
    if given.json:
        given.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
