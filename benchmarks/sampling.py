"""Does sampling at random with replacement train as well as a permutation per epoch? Pairs of trainings that differ in that alone.

    python benchmarks/sampling.py --mnist FOLDER --studies FOLDER [--quick] [--json FILE] [--plot FILE]
    python benchmarks/sampling.py --again            # tables and plot from the JSON, without training

Digits: a net with one hidden layer on MNIST's t10k, up to 8,000 images to train on (drawn anew for each seed), 2,000 to test on. Hearts: a
small U-Net for the inner contour on two studies, trained on one patient and tested on the other, both ways round. Images, masks and labels
are one epoch of a Feed, in the order of the sample_key, which has nothing to do with what they show. Trainings of one seed have the same
samples, first weights, augmentations, number of steps and batch sizes; each takes its samples

- by a new permutation each epoch (what a Feed does),
- independently and uniformly, with replacement, or
- by one permutation, the same each epoch.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

HERE = Path(__file__).resolve().parent
DATA = HERE.parent.parent / "shared" / "data"
ARMS = ("permutation", "replacement", "same order")
TEST = 2_000  # digits that are never trained on
Arrays = dict[str, NDArray[Any]]
Report = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """What the trainings of one row of the table have in common: `count` samples in batches of `batch`, tested after `marks` epochs."""

    task: str
    count: int
    batch: int
    optimiser: str
    rate: float
    marks: tuple[int, ...]

    @property
    def title(self) -> str:
        """As the tables name it."""
        return f"{self.task}, {self.count:,}, {self.optimiser}"


# Rates that train well by permutations, from a look at a few; none was tuned for an arm.
SETTINGS = (
    *(
        Setting("digits", count, batch, optimiser, rate, (1, 2, 5, 10))
        for count, batch in ((100, 10), (1_000, 32), (8_000, 32))
        for optimiser, rate in (("SGD", 0.02), ("Adam", 0.002))
    ),
    *(Setting("hearts", 18, 2, optimiser, rate, (5, 10, 20, 40)) for optimiser, rate in (("SGD", 0.05), ("Adam", 0.005))),
)


def order(arm: str, count: int, epochs: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return int64 (epochs, count): which of `count` samples comes when."""
    if arm == "replacement":
        return rng.integers(count, size=(epochs, count))
    rows = [rng.permutation(count) for _ in range(epochs if arm == "permutation" else 1)]
    return np.stack(rows * (epochs // len(rows)))


def unseen(count: int, epochs: int, draws: int, seed: int) -> NDArray[np.float64]:
    """Return float64 (epochs,): the share of samples not seen by the end of each epoch with replacement, mean over `draws` trainings."""
    rng = np.random.default_rng(seed)
    shares = np.zeros(epochs)
    for _ in range(draws):
        first = np.full(count, epochs)
        drawn = order("replacement", count, epochs, rng)
        np.minimum.at(first, drawn.ravel(), np.repeat(np.arange(epochs), count))
        shares += [(first > epoch).mean() for epoch in range(epochs)]
    return shares / draws


def fetch(mnist: Path, studies: Path) -> Arrays:
    """Return what a Feed gives of both folders: digits and labels; per patient images (18, 32, 32) of mean 0 and masks."""
    import loaderd
    from catalog import ingest
    from catalog.database import open_database

    found: Arrays = {}
    with tempfile.TemporaryDirectory(prefix="scanfeed-") as home:
        Path(home).chmod(0o755)
        os.environ.pop("CATALOG_DATABASE_URL", None)
        os.environ["CATALOG_HOME"] = str(Path(home) / "home")
        with open_database() as db:
            for folder in (mnist, studies):
                ingest.ingest(db, folder)
            with db.connect() as conn:
                labels = dict(conn.execute("SELECT sample_id, label::int FROM sample WHERE kind = 'label'").fetchall())
                patients = [name for (name,) in conn.execute("SELECT DISTINCT patient FROM sample WHERE structure = 'inner' ORDER BY 1")]
            with loaderd.Feed(where="rows = 28", shuffle=False, batch_size=500) as feed:
                batches = [(batch.images / 255, [labels[sample] for sample in batch.sample_ids.tolist()]) for batch in feed.epoch()]
            found["digits"] = np.concatenate([images for images, _ in batches])
            found["labels"] = np.concatenate([values for _, values in batches])
            found["patients"] = np.array(patients)
            for patient in patients:
                with loaderd.Feed(structures=["inner"], where=f"patient = '{patient}'", shuffle=False, batch_size=4) as feed:
                    pairs = [(small(images), small(masks) >= 0.5) for images, masks in feed.epoch()]
                images = np.concatenate([image for image, _ in pairs])
                images = (images - images.mean((1, 2), keepdims=True)) / images.std((1, 2), keepdims=True)
                found[f"images {patient}"] = images.clip(-2, 3)  # some vessels are four times as bright as the heart
                found[f"masks {patient}"] = np.concatenate([mask for _, mask in pairs])
    return found


def small(images: NDArray[Any]) -> NDArray[np.float32]:
    """Return float32 (B, 32, 32) of (B, 256, 256): the means of 4×4 pixels of the middle half, where the hearts are."""
    middle = images[:, 64:192, 64:192].astype(np.float32)
    return middle.reshape(len(images), 32, 4, 32, 4).mean((2, 4))


def weights(shapes: Sequence[tuple[int, ...]], seeds: Sequence[int]) -> list[Any]:
    """Return a float32 tensor (models, *shape) a shape, drawn from each model's seed (He et al. 2015); of one dimension, zeros."""
    import torch

    drawn = []
    for seed in seeds:
        rng = np.random.default_rng([seed, 0])
        drawn.append([rng.normal(0, len(shape) > 1 and np.sqrt(2 / np.prod(shape[1:])), shape).astype(np.float32) for shape in shapes])
    return [torch.from_numpy(np.stack(each)).requires_grad_() for each in zip(*drawn, strict=True)]


class Digits:
    """Images to 10 classes by one hidden layer of 32."""

    shapes = ((32, 784), (32,), (10, 32), (10,))

    @staticmethod
    def net(own: Sequence[Any], images: Any) -> Any:
        """Return (models, b, 10) of (models, b, 784)."""
        hidden = (images @ own[0].mT + own[1][:, None]).relu()
        return hidden @ own[2].mT + own[3][:, None]

    @staticmethod
    def loss(logits: Any, labels: Any) -> Any:
        """Return the cross entropy of each image, (models, b)."""
        from torch.nn import functional

        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)

    @staticmethod
    def score(logits: Any, labels: Any) -> Any:
        """Return for each image whether it is right, (models, b)."""
        return (logits.argmax(2) == labels).float()


class Hearts:
    """Images to masks by a U-Net of three levels with 4, 8 and 16 channels; all models' convolutions are one, in groups."""

    shapes = ((4, 1, 3, 3), (4,), (8, 4, 3, 3), (8,), (16, 8, 3, 3), (16,), (8, 24, 3, 3), (8,), (4, 12, 3, 3), (4,), (1, 4, 1, 1), (1,))

    @staticmethod
    def net(own: Sequence[Any], images: Any) -> Any:
        """Return logits (models, b, 1024) of (models, b, 1024)."""
        import torch
        from torch.nn import functional

        models, b = images.shape[:2]

        def conv(at: int, inputs: Any) -> Any:
            weight = own[2 * at].flatten(0, 1)
            return functional.conv2d(inputs, weight, padding=weight.shape[-1] // 2, groups=models)

        def block(at: int, inputs: Any) -> Any:
            return (functional.group_norm(conv(at, inputs), models) + own[2 * at + 1].flatten()[:, None, None]).relu()

        def joined(below: Any, beside: Any) -> Any:
            above = functional.interpolate(below, scale_factor=2)
            return torch.cat([each.unflatten(1, (models, -1)) for each in (above, beside)], 2).flatten(1, 2)

        first = block(0, images.transpose(0, 1).unflatten(2, (32, 32)))
        second = block(1, functional.max_pool2d(first, 2))
        third = block(2, functional.max_pool2d(second, 2))
        last = conv(5, block(4, joined(block(3, joined(third, second)), first)))
        return last.view(b, models, -1).transpose(0, 1) + own[11][:, None]

    @staticmethod
    def loss(logits: Any, masks: Any) -> Any:
        """Return each image's cross entropy plus 1 - soft Dice, (models, b): the usual sum where a structure is small."""
        from torch.nn import functional

        shares = logits.sigmoid()
        dice = (2 * (shares * masks).sum(2) + 1) / (shares.sum(2) + masks.sum(2) + 1)
        return functional.binary_cross_entropy_with_logits(logits, masks, reduction="none").mean(2) + 1 - dice

    @staticmethod
    def score(logits: Any, masks: Any) -> Any:
        """Return each image's Dice, (models, b)."""
        found, drawn = logits > 0, masks > 0
        return 2 * (found & drawn).sum(2) / (found.sum(2) + drawn.sum(2))


def turned() -> NDArray[np.int64]:
    """Return int64 (648, 1024): which pixel comes where in an image turned, mirrored and moved by up to 4 of its 32 pixels."""
    pixels = np.arange(1024).reshape(32, 32)
    turns = [np.rot90(side, turn) for side in (pixels, pixels.T) for turn in range(4)]
    return np.stack([np.roll(one, (down, right), (0, 1)).ravel() for one in turns for down in range(-4, 5) for right in range(-4, 5)])


def train(setting: Setting, seeds: int, path: Path) -> dict[str, Any]:
    """Train all arms of all seeds of a setting, side by side: one tensor holds all models' weights, and no gradient mixes two of them.

    Returns:
        Per arm a list (seeds, marks, 2): score in % and loss over the whole training set; of the hearts the mean of both ways round.
    """
    import torch

    torch.set_num_threads(1)  # the settings are what runs side by side
    task: type[Digits | Hearts] = Digits if setting.task == "digits" else Hearts
    data = np.load(path)
    if setting.task == "digits":
        images, targets, ways = data["digits"].reshape(-1, 784), data["labels"], 1
        edge = len(images) - TEST
    else:
        names = [str(name) for name in data["patients"]]
        images = np.concatenate([data[f"images {name}"] for name in names]).reshape(-1, 1024)
        targets = np.concatenate([data[f"masks {name}"] for name in names]).reshape(-1, 1024).astype(np.float32)
        edge, ways = setting.count, 2
    models = [(seed, way, arm) for seed in range(seeds) for way in range(ways) for arm in ARMS]
    epochs = setting.marks[-1]
    own, test, drawn = [], [], []
    for seed, way, arm in models:
        if setting.task == "digits":
            own.append(np.random.default_rng([seed, 1]).permutation(edge)[: setting.count])
            test.append(np.arange(edge, len(images)))
        else:
            halves = np.arange(edge), np.arange(edge, len(images))
            own.append(halves[way])
            test.append(halves[1 - way])
        drawn.append(own[-1][order(arm, setting.count, epochs, np.random.default_rng([seed, 2, way, ARMS.index(arm)]))])
    plan, everything, held = (torch.from_numpy(np.stack(one)) for one in (drawn, own, test))
    pixels, wanted, maps = torch.from_numpy(images), torch.from_numpy(targets), torch.from_numpy(turned())
    dice = [np.random.default_rng([seed, 3, way]) for seed, way, arm in models if arm == ARMS[0]]

    def shaken(inputs: Any, masks: Any) -> tuple[Any, Any]:
        """Turn, move and scale each image at random, the same in all arms of a seed at the same place of the same step."""
        b = inputs.shape[1]
        choice = torch.from_numpy(np.stack([rng.integers(len(maps), size=b) for rng in dice])).repeat_interleave(len(ARMS), 0)
        gain = torch.from_numpy(np.stack([rng.uniform(0.7, 1.3, (b, 1)) for rng in dice]).astype(np.float32))
        where = maps[choice]
        return inputs.gather(2, where) * gain.repeat_interleave(len(ARMS), 0), masks.gather(2, where)

    def mean(what: Callable[..., Any], places: Any) -> NDArray[Any]:
        with torch.no_grad():
            parts = [what(task.net(net, pixels[part]), wanted[part]).sum(1) for part in places.split(250, dim=1)]
            return (sum(parts) / places.shape[1]).numpy()

    net = weights(task.shapes, [seed for seed, _, _ in models])
    sgd = setting.optimiser == "SGD"
    optimiser = torch.optim.SGD(net, setting.rate, momentum=0.9) if sgd else torch.optim.Adam(net, setting.rate)
    begun = time.process_time()
    found = []
    for epoch in range(epochs):
        for places in plan[:, epoch].split(setting.batch, dim=1):
            inputs, outputs = pixels[places], wanted[places]
            if setting.task == "hearts":
                inputs, outputs = shaken(inputs, outputs)
            optimiser.zero_grad()
            task.loss(task.net(net, inputs), outputs).mean(1).sum().backward()
            optimiser.step()
        if epoch + 1 in setting.marks:
            found.append(np.stack([100 * mean(task.score, held), mean(task.loss, everything)], -1))
            print(f"{setting.title}: {epoch + 1} of {epochs} epochs, {time.process_time() - begun:.0f} CPU s", file=sys.stderr, flush=True)
    # (marks, seeds, ways, arms, 2) → (arms, seeds, marks, 2)
    runs = np.stack(found).reshape(len(found), seeds, ways, len(ARMS), 2).mean(2).transpose(2, 1, 0, 3)
    return {arm: run.round(5).tolist() for arm, run in zip(ARMS, runs.astype(float), strict=True)}


def measure(settings: Sequence[Setting], seeds: int, path: Path, processes: int) -> Report:
    """Train all settings, the longest first, in processes; return the report."""
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(train, setting, seeds, path) for setting in reversed(settings)]
        trained = [job.result() for job in reversed(jobs)]
    report: Report = {"seeds": seeds}
    report["settings"] = [{**asdict(setting), "runs": runs} for setting, runs in zip(settings, trained, strict=True)]
    report["unseen"] = {
        str(count): unseen(count, 5, 200, seed=count).round(5).tolist() for count in sorted({one.count for one in settings})
    }
    return report


@dataclass(frozen=True)
class Difference:
    """Paired differences: their mean, half of its 95 % interval (Student), and how many are above and below 0, for the sign test."""

    mean: float
    half: float
    above: int
    below: int


def difference(values: NDArray[np.float64]) -> Difference:
    """Return what (pairs,) differences say."""
    from scipy import stats

    half = float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))
    return Difference(float(values.mean()), half, int((values > 0).sum()), int((values < 0).sum()))


def rows(report: Report) -> Iterator[tuple[Setting, dict[str, NDArray[np.float64]]]]:
    """Yield each setting with its runs: per arm float64 (seeds, marks, 2), score and training loss."""
    for one in report["settings"]:
        named = {name: one[name] for name in ("task", "count", "batch", "optimiser", "rate")}
        yield Setting(**named, marks=tuple(one["marks"])), {arm: np.array(one["runs"][arm]) for arm in ARMS}


def table(report: Report) -> str:
    """Return the report as Markdown, one table a task and one of what is never seen."""
    lines: list[str] = []
    everything = list(rows(report))
    for task in dict.fromkeys(setting.task for setting, _ in everything):
        marks = next(setting.marks for setting, _ in everything if setting.task == task)
        heads = [f"after {mark} epoch" + "s" * (mark > 1) for mark in marks]
        lines += [f"| {task} | | {' | '.join(heads)} |", "|---|---|" + "---:|" * len(marks)]
        for setting, runs in everything:
            if setting.task != task:
                continue
            score = {arm: run[:, :, 0] for arm, run in runs.items()}
            loss = {arm: np.log(run[:, :, 1]) for arm, run in runs.items()}
            who = f"{setting.count:,} images, {setting.optimiser}"
            lines.append(f"| {who} | by permutations, % | " + " | ".join(f"{value:.1f}" for value in score["permutation"].mean(0)) + " |")
            for arm in ARMS[1:]:
                cells = [cell(difference(score["permutation"][:, at] - score[arm][:, at])) for at in range(len(marks))]
                lines.append(f"| | better than {arm} by | {' | '.join(cells)} |")
            ratios = [difference(loss["replacement"][:, at] - loss["permutation"][:, at]) for at in range(len(marks))]
            lines.append(f"| | training loss with replacement | {' | '.join(ratio(one) for one in ratios)} |")
        lines.append("")
    lines += ["| samples | " + " | ".join(f"{epoch} epoch" + "s" * (epoch > 1) for epoch in range(1, 6)) + " |", "|---|" + "---:|" * 5]
    for count, shares in report["unseen"].items():
        lines.append(f"| {int(count):,}, drawn | " + " | ".join(f"{100 * share:.1f} %" for share in shares) + " |")
    lines.append("| theory, many | " + " | ".join(f"{100 * np.exp(-epoch):.1f} %" for epoch in range(1, 6)) + " |")
    return "\n".join(lines)


def cell(one: Difference) -> str:
    """Return a difference as the tables show it: bold where its interval leaves 0 out, and how many pairs have its sign."""
    text = f"{one.mean:+.2f} ± {one.half:.2f}"
    return f"{f'**{text}**' if abs(one.mean) > one.half else text} ({one.above}:{one.below})"


def ratio(one: Difference) -> str:
    """Return a mean difference of logarithms as a factor with its interval."""
    low, mid, high = np.exp([one.mean - one.half, one.mean, one.mean + one.half])
    text = f"× {mid:.2f} ({low:.2f}–{high:.2f})"
    return f"**{text}**" if abs(one.mean) > one.half else text


def plot(report: Report, path: Path) -> None:
    """Draw the paired differences with their intervals: a panel a task and size, over epochs."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
             "grid.color": "#e5e5e5", "legend.frameon": False}  # fmt: skip
    colours = {"replacement": "#d55e00", "same order": "#0072b2"}
    everything = list(rows(report))
    panels = list(dict.fromkeys((setting.task, setting.count) for setting, _ in everything))
    optimisers = list(dict.fromkeys(setting.optimiser for setting, _ in everything))
    with mpl.rc_context(style):
        figure = Figure(figsize=(3.4 * len(panels), 6.4), layout="constrained")
        axes = figure.subplots(len(optimisers), len(panels), squeeze=False, sharey="col")
        for setting, runs in everything:
            axis = axes[optimisers.index(setting.optimiser)][panels.index((setting.task, setting.count))]
            axis.axhline(0, color="black", linewidth=1)
            for side, (arm, colour) in zip((-0.08, 0.08), colours.items(), strict=True):
                values = runs["permutation"][:, :, 0] - runs[arm][:, :, 0]
                places = np.arange(len(setting.marks)) + side
                for place, column in zip(places, values.T, strict=True):
                    axis.plot(np.full(len(column), place), column, ".", color=colour, alpha=0.25, markersize=4)
                found = [difference(column) for column in values.T]
                axis.errorbar(
                    places, [one.mean for one in found], [one.half for one in found], fmt="o", color=colour, markersize=5, capsize=3,
                    label=f"against {arm}",
                )  # fmt: skip
            unit = "accuracy" if setting.task == "digits" else "Dice"
            axis.set(title=f"{setting.task}: {setting.count:,} images, {setting.optimiser}", xlabel="epochs",
                     ylabel=f"better by, points of {unit}")  # fmt: skip
            axis.set_xticks(range(len(setting.marks)), [str(mark) for mark in setting.marks])
        figure.suptitle("How much better a new permutation each epoch is: each pair, mean and 95 % interval")
        figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
        figure.savefig(path, dpi=110, metadata={"Software": "scanfeed"})


def main() -> None:
    """Take the data through a catalog of its own, train, print the tables, write JSON and plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--mnist", type=Path, default=DATA / "mnist", help="folder with MNIST's t10k files")
    parser.add_argument("--studies", type=Path, default=DATA / "sunnybrook" / "final_data", help="two studies with inner contours")
    parser.add_argument("--seeds", type=int, default=30, help="pairs of each setting")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="3 seeds, without the 8,000 digits: is it all in order?")
    parser.add_argument("--again", action="store_true", help="tables and plot from the JSON")
    parser.add_argument("--json", type=Path, default=HERE.parent / "docs" / "sampling.json")
    parser.add_argument("--plot", type=Path, default=HERE.parent / "docs" / "sampling.png")
    arguments = parser.parse_args()
    if arguments.again:
        report = json.loads(arguments.json.read_text())
    else:
        settings = [setting for setting in SETTINGS if not arguments.quick or setting.count < 8_000]
        with tempfile.TemporaryDirectory(prefix="scanfeed-sampling-") as folder:
            path = Path(folder) / "data.npz"
            np.savez(path, **fetch(arguments.mnist, arguments.studies))
            report = measure(settings, 3 if arguments.quick else arguments.seeds, path, arguments.processes)
        arguments.json.write_text(json.dumps(report) + "\n")
    print(table(report))
    plot(report, arguments.plot)


if __name__ == "__main__":
    main()
