"""What each transform costs a worker, beside decoding the same sample.

    python benchmarks/transforms.py [--rounds 30] [--calls 20] [--size 256] [--json FILE]

One 256×256 image with one mask, through `loaderd.warping.Pipeline` into a slot's place as a worker does it, one thread, every strength
drawn from its default unless the table says otherwise. *decode* is what happens to a sample without transforms: open, fstat, one preadv of
the pixels, conversion to float32, the mask unpacked. Each round times all contestants one after another; numbers are medians of CPU
seconds, since the machine has other work. Also: a chain of five geometric transforms as the one resampling that it is, and one after
another.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loaderd.arguments import Transform
from loaderd.intensity import (
    Blur,
    Brightness,
    ChannelShift,
    Contrast,
    Gamma,
    MinMax,
    Noise,
    Percentile,
    Window,
    ZScore,
)
from loaderd.transforms import Crop, Elastic, Flip, Resample, Rotate, Scale, Shear, Shift, checked
from loaderd.warping import Pipeline

HERE = Path(__file__).resolve().parent
STATISTICS = {"mean": 200.0, "std": 150.0, "min": 0.0, "max": 1_500.0, "p0.5": 3.0, "p99.5": 900.0}
SPACING = (1.25, 1.25)  # mm
OFFSET = 1_024  # of the pixels in the file

Call = Callable[[int], object]  # with the number of the sample


def contestants(size: int) -> list[tuple[str, Sequence[Transform], tuple[int, int] | None, str]]:
    """Return (what the table says, transforms, size=, fit=)."""
    half = (size // 2, size // 2)
    return [
        ("(none: one copy)", (), None, "crop"),
        ("Rotate()", (Rotate(),), None, "crop"),
        ("Shift()", (Shift(),), None, "crop"),
        ("Scale()", (Scale(),), None, "crop"),
        ("Shear()", (Shear(),), None, "crop"),
        ("Flip()", (Flip(),), None, "crop"),
        ("Elastic()", (Elastic(),), None, "crop"),
        ("Rotate(), Elastic()", (Rotate(), Elastic()), None, "crop"),
        (f"Crop(size={half[0]})", (Crop(size=half),), None, "crop"),
        (f"Crop(size={half[0]}, at='mask')", (Crop(size=half, at="mask"),), None, "crop"),
        ("Resample(spacing=1.0), its size kept", (Resample(spacing=1.0),), (size, size), "crop"),
        (f"size={half}, fit='resize'", (), half, "resize"),
        (f"size={half}, fit='pad'", (), half, "pad"),
        ("Gamma()", (Gamma(),), None, "crop"),
        ("Brightness()", (Brightness(),), None, "crop"),
        ("Contrast()", (Contrast(),), None, "crop"),
        ("ChannelShift()", (ChannelShift(),), None, "crop"),
        ("Noise()", (Noise(),), None, "crop"),
        ("Blur(sigma=(1, 1))", (Blur(sigma=(1.0, 1.0)),), None, "crop"),
        ("Blur(sigma=(3, 3))", (Blur(sigma=(3.0, 3.0)),), None, "crop"),
        ("ZScore()", (ZScore(),), None, "crop"),
        ("ZScore(over='dataset')", (ZScore(over="dataset"),), None, "crop"),
        ("MinMax()", (MinMax(),), None, "crop"),
        ("MinMax(over='dataset')", (MinMax(over="dataset"),), None, "crop"),
        ("Percentile()", (Percentile(),), None, "crop"),
        ("Percentile(over='dataset')", (Percentile(over="dataset"),), None, "crop"),
        ("Window(center=300, width=600)", (Window(center=300.0, width=600.0),), None, "crop"),
        (
            "a training's usual: Rotate, Scale, Elastic, Flip, Gamma, Noise, ZScore",
            (Rotate(), Scale(), Elastic(), Flip(p=0.5), Gamma(), Noise(), ZScore()),
            None,
            "crop",
        ),
    ]


CHAIN: tuple[Transform, ...] = (Rotate(), Shift(), Scale(), Shear(), Flip())


class Sample:
    """An image and a mask as they lie in a file and in the database, and the room for what becomes of them."""

    def __init__(self, folder: Path, size: int) -> None:
        rng = np.random.default_rng(0)
        rows, columns = np.mgrid[:size, :size]
        inside = (rows - size * 0.5) ** 2 + (columns - size * 0.45) ** 2 < (size * 0.2) ** 2
        stored = (rng.gamma(2, 80, (size, size)) + 400 * inside).astype("<i2")
        self.path = folder / "pixels"
        self.path.write_bytes(bytes(OFFSET) + stored.tobytes())
        self.bits = np.packbits(inside).tobytes()
        self.size = size
        self.scratch = np.empty(stored.nbytes, np.uint8)
        self.images = stored[np.newaxis].astype(np.float32)
        self.masks = inside[np.newaxis]
        self.out = np.empty_like(self.images), np.empty_like(self.masks)

    def decode(self, _: int) -> None:
        """As `loaderd.decode` does it."""
        fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        os.fstat(fd)
        os.preadv(fd, [self.scratch.data], OFFSET)
        os.close(fd)
        self.out[0][0] = self.scratch.view("<i2").reshape(self.size, self.size)
        bits = np.unpackbits(np.frombuffer(self.bits, np.uint8), count=self.size * self.size)
        self.out[1][0] = bits.view(np.bool_).reshape(self.size, self.size)

    def through(self, transforms: Sequence[Transform], size: tuple[int, int] | None, fit: str) -> Call:
        """Return the call that sends the sample through a pipeline."""
        pipeline = made(transforms, size, fit)
        rows, columns = size or (transforms[0].size if transforms and isinstance(transforms[0], Crop) else (self.size, self.size))
        out = np.empty((1, rows, columns), np.float32), np.empty((1, rows, columns), np.bool_)
        return lambda number: run(pipeline, number, self.images, self.masks, out)

    def one_after_another(self) -> Call:
        """Return the call that resamples for each transform of the chain."""
        pipelines = [made((one,), None, "crop") for one in CHAIN]
        rooms = [(np.empty_like(self.images), np.empty_like(self.masks)) for _ in range(2)]

        def call(number: int) -> None:
            images, masks = self.images, self.masks
            for place, pipeline in enumerate(pipelines):
                images, masks = run(pipeline, number, images, masks, rooms[place % 2])

        return call


def made(transforms: Sequence[Transform], size: tuple[int, int] | None, fit: str) -> Pipeline:
    """Return a pipeline of these."""
    given = checked(list(transforms), size=size)
    return Pipeline(given, seed=1, size=size, fit=fit, statistics=STATISTICS)


def run(pipeline: Pipeline, number: int, images: Any, masks: Any, out: tuple[Any, Any]) -> tuple[Any, Any]:
    """Send one sample through; returns where it came out."""
    pipeline(images, masks, key=number.to_bytes(16, "big"), epoch=0, spacing=SPACING, out_images=out[0], out_masks=out[1])
    return out


def measured(calls: dict[str, Call], rounds: int, each: int) -> dict[str, float]:
    """Return the median µs of CPU time a call of each contestant."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            start = time.thread_time()
            for sample in range(each):
                call(number * each + sample)
            if number:  # the first round warms up
                taken[name].append((time.thread_time() - start) / each * 1e6)
    return {name: float(np.median(values)) for name, values in taken.items()}


def table(found: dict[str, float]) -> str:
    """Return the results as Markdown."""
    lines = ["| transform | µs a sample | × decode |", "| --- | ---: | ---: |"]
    return "\n".join(lines + [f"| {name} | {value:,.0f} | {value / found['decode']:.1f} |" for name, value in found.items()])


def main() -> None:
    """Measure, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="of which the median is taken")
    parser.add_argument("--calls", type=int, default=20, help="samples a round")
    parser.add_argument("--size", type=int, default=256, help="rows and columns")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "transforms.json", help="where the numbers go")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="scanfeed-") as folder:
        sample = Sample(Path(folder), arguments.size)
        before = sample.images.copy()
        calls: dict[str, Call] = {"decode": sample.decode}
        calls |= {name: sample.through(transforms, size, fit) for name, transforms, size, fit in contestants(arguments.size)}
        calls["Rotate, Shift, Scale, Shear, Flip: one resampling"] = sample.through(CHAIN, None, "crop")
        calls["the same five one after another"] = sample.one_after_another()
        load = [os.getloadavg()[0]]
        found = measured(calls, arguments.rounds, arguments.calls)
        load.append(os.getloadavg()[0])
        if not np.array_equal(sample.images, before):
            raise AssertionError("a transform wrote into its input, so the contestants did not get the same")
    report = {
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "settings": {key: value for key, value in vars(arguments).items() if key != "json"},
        "machine": {"cores": len(os.sched_getaffinity(0)), "kernel": platform.release(), "numpy": np.__version__, "load": load},
        "us": {name: round(value, 1) for name, value in found.items()},
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
