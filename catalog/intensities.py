"""Plot of intensities inside a drawn structure and around it: could a simple threshold do it?

Answered by Dice of each sample against what was drawn: of Otsu's threshold, of the best threshold there is (chosen knowing the answer, so
that no threshold does better), and of what `catalog threshold` would propose.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from catalog import inside, viewing
from catalog.contours import BoolArray
from catalog.database import Database
from catalog.errors import FileError, UsageError
from catalog.inside import Method
from catalog.plots import MOST_SERIES, Row, bars, legend_name, palette
from catalog.processes import Progress
from catalog.viewing import View
from catalog.workers import mapped

MOST_IMAGES = 2_000  # whose pixels are read; at random where there are more
NAMED_SAMPLES = 12
ENOUGH = 0.9  # Dice of the line that is drawn and counted against
OTSU, BEST = "Otsu's threshold", "best threshold"
PROPOSED = {method: f"proposed, {method.value}" for method in Method}
SHIFTED = (-0.12, 0.0, 0.12)  # points of one column beside each other


class Task(NamedTuple):
    """An image, and the masks of what lies inside and of what is around it."""

    view: View
    inside: int  # annotation ids
    outside: int


class Intensity(NamedTuple):
    """Mean and standard deviation inside (blood pool) and between inside and outside (muscle); NaN where there is no pixel.

    `dice`: of each way to find the inside, against what was drawn.
    """

    sample_id: int
    series: int
    pool: float
    pool_deviation: float
    muscle: float
    muscle_deviation: float
    area_px: int = 0
    dice: dict[str, float] = {}  # noqa: RUF012  never written to
    problem: str = ""


def measured(
    database: Database, rows: Sequence[Row], structures: Sequence[str], jobs: int | None, progress: Progress
) -> tuple[list[Intensity], tuple[str, str]]:
    """Return what was measured, and what is inside and around in words.

    Raises:
        UsageError: If no image has two structures of which one lies inside the other.
    """
    by_sample: dict[int, dict[str, int]] = defaultdict(dict)
    for row in rows:
        by_sample[row.sample_id][row.structure] = row.annotation_id
    with database.connect() as conn:
        around_of = viewing.relations(conn)
        pairs: list[tuple[int, int, int]] = []
        names: set[tuple[str, str]] = set()
        for sample, drawn in by_sample.items():
            for name in drawn:
                around = sorted(other for other in around_of.get(name, ()) if other in drawn)
                if around and (not structures or name in structures):
                    pairs.append((sample, drawn[name], drawn[around[0]]))
                    names.add((name, around[0]))
        if not pairs:
            raise UsageError("no image has a structure and the one around it (table relation, such as inner and outer)")
        if len(pairs) > MOST_IMAGES:
            picked = np.random.default_rng(0).choice(len(pairs), MOST_IMAGES, replace=False)
            pairs = [pairs[at] for at in sorted(picked.tolist())]
        found = {view.image["sample_id"]: view for view in viewing.views(conn, [sample for sample, *_ in pairs], neighbours=False)}
    tasks = [Task(found[sample], one, other) for sample, one, other in pairs if sample in found]
    results = list(mapped(measure_all, tasks, died=_died, jobs=jobs, progress=progress))
    if names == {("inner", "outer")}:
        return results, ("blood pool (inner)", "muscle (outer less inner)")
    listed = [", ".join(sorted({legend_name(name[side]) for name in names})) for side in (0, 1)]
    return results, (f"inside ({listed[0]})", f"around ({listed[1]} less what is inside)")


def measure_all(tasks: Sequence[Task]) -> list[Intensity]:
    """Measure some images. Runs in a process of its own."""
    return [_measure(task) for task in tasks]


def draw(figure: Any, found: Sequence[Intensity], named: tuple[str, str]) -> list[str]:
    """Draw means inside against means around and how both are distributed; below, Dice a way, and along the area of what was drawn.

    Returns the figures in words, the answer first. Raises UsageError if there is nothing to draw.
    """
    good = [one for one in found if np.isfinite(one.pool) and np.isfinite(one.muscle)]
    if not good:
        raise UsageError("no image has pixels both inside and between its contours that can be read, so there is nothing to plot")
    figure.set_size_inches(13, 12)
    (top_left, top_right), (left, right) = figure.subplots(2, 2)
    colours = palette([f"series {number}" for number in sorted({one.series for one in good})])
    said = _means(top_left, top_right, good, named, colours)
    said = _scores(left, right, good, named[0], colours) + said
    problems = [f"sample {one.sample_id}: {one.problem}" for one in found if one.problem]
    more = [f"… and {len(problems) - 10} more"] if len(problems) > 10 else []
    return said + problems[:10] + more


def _means(left: Any, right: Any, good: Sequence[Intensity], named: tuple[str, str], colours: dict[str, str]) -> list[str]:
    """Mean of the blood pool against mean of the muscle, a point a sample; and how both are distributed."""
    muscle, pool = (np.array([getattr(one, name) for one in good]) for name in ("muscle", "pool"))
    handles, labels = [], []
    for at, number in enumerate(sorted({one.series for one in good})):
        own = [one for one in good if one.series == number]
        error = left.errorbar(
            [one.muscle for one in own], [one.pool for one in own], xerr=[one.muscle_deviation for one in own],
            yerr=[one.pool_deviation for one in own], fmt="o", markersize=5, color=colours[f"series {number}"], elinewidth=0.5, alpha=0.8,
        )  # fmt: skip
        if at < MOST_SERIES:
            handles.append(error)
            labels.append(f"series {number}")
    ends = [float(min(muscle.min(), pool.min(), 0.0)), float(max(muscle.max(), pool.max()))]
    (line,) = left.plot(ends, ends, "k--", linewidth=1)
    # In bright-blood images, a pool that is no brighter than its muscle is a contour in the wrong place.
    for one in sorted(good, key=lambda one: (one.pool - one.muscle, one.sample_id))[:NAMED_SAMPLES]:
        if one.pool <= one.muscle:
            left.annotate(f"{one.sample_id}", (one.muscle, one.pool), textcoords="offset points", xytext=(6, -12), fontsize=10)
    left.set(title="a point a sample, bars one standard deviation", xlabel=f"{named[1]}, mean (modality units)",
             ylabel=f"{named[0]}, mean (modality units)")  # fmt: skip
    left.legend([*handles, line], [*labels, "equal: points below it are named"], fontsize=10)
    edges = np.linspace(ends[0], ends[1] if ends[1] > ends[0] else ends[0] + 1.0, bars(len(good)))
    for values, name, colour in ((pool, named[0], "#e69f00"), (muscle, named[1], "#56b4e9")):
        right.hist(values, bins=edges, color=colour, alpha=0.6, label=name)
    right.set(title=f"{len(good)} samples", xlabel="mean intensity (modality units)", ylabel="samples")
    right.yaxis.get_major_locator().set_params(integer=True)
    right.legend(fontsize=10)
    return [f"{sum(pool <= muscle)} of {len(good)} samples: {named[0]} is no brighter than {named[1]}"] if (pool <= muscle).any() else []


def _scores(left: Any, right: Any, good: Sequence[Intensity], name: str, colours: dict[str, str]) -> list[str]:
    """Dice against what was drawn: a column a way; and of two ways along the area of what was drawn."""
    ways = [way for way in (OTSU, BEST, *PROPOSED.values()) if all(way in one.dice for one in good)]
    said, ticks, lowest = [], [], min(min(one.dice.values()) for one in good)
    for at, way in enumerate(ways):
        values = np.array([one.dice[way] for one in good])
        shifts = np.array(SHIFTED)[np.arange(len(good)) % len(SHIFTED)]
        left.scatter(at + shifts, values, s=16, color=[colours[f"series {one.series}"] for one in good], alpha=0.8, linewidths=0)
        least, lower, middle, upper = np.percentile(values, (0, 25, 50, 75))
        left.plot([at - 0.3, at + 0.3], [middle, middle], color="k", linewidth=2)
        left.plot([at - 0.3, at + 0.3, np.nan, at - 0.3, at + 0.3], [lower, lower, np.nan, upper, upper], color="k", linewidth=1, ls="--")
        ticks.append(way.replace(", ", "\n") + f"\n{middle:.3f}")
        said.append(f"{way}: Dice {middle:.3f} (median of {len(good)} samples; quartiles {lower:.3f} and {upper:.3f}, least {least:.3f})")
    limits = (max(np.floor(lowest * 10 - 0.5) / 10, 0.0), 1.02)
    left.set_xticks(range(len(ways)), ticks, fontsize=10)
    left.set(title="line and number: median; dashed: quartiles", ylabel="Dice of each sample against what was drawn", ylim=limits)
    for way, marker in zip((OTSU, BEST), ("o", "^"), strict=True):
        right.scatter([one.area_px for one in good], [one.dice[way] for one in good], marker=marker, s=26, alpha=0.8, linewidths=0,
                      color="#333333" if way == OTSU else "#009e73", label=way)  # fmt: skip
    for one in sorted(good, key=lambda one: (one.dice[OTSU], one.sample_id))[:3]:
        right.annotate(f"{one.sample_id}", (one.area_px, one.dice[OTSU]), textcoords="offset points", xytext=(6, -4), fontsize=10)
    right.axhline(ENOUGH, color="k", linewidth=1, linestyle=":", label=f"{ENOUGH:g}")
    right.set(title="by size; the three lowest are named", xlabel=f"{name}, area drawn (px)", ylabel="Dice", ylim=limits)
    right.legend(fontsize=10, loc="lower right")
    short = sum(one.dice[BEST] < ENOUGH for one in good)
    said.append(f"{short} of {len(good)} samples: no threshold whatever reaches {ENOUGH:g}")
    if len(ways) == 2:
        said.append("what `catalog threshold` would propose is left out: pip install 'scanfeed[derive]'")
    return said


def _measure(task: Task) -> Intensity:
    image = task.view.image
    nothing = Intensity(image["sample_id"], image["series"], np.nan, np.nan, np.nan, np.nan)
    drawn = task.view.drawn()
    masks: dict[int, BoolArray | None] = {
        row["annotation"]: drawn[row["pairing"]].mask for row in task.view.rows if row["pairing"] in drawn
    }
    inner, outer = masks.get(task.inside), masks.get(task.outside)
    try:
        if why := viewing.unreadable(image):
            raise FileError("missing", why)
        pixels = viewing.pixels(image)
    except FileError as error:
        return nothing._replace(problem=str(error))
    except Exception as error:  # one file must not stop the others; the text could hold a value of its header
        return nothing._replace(problem=f"reading it failed with {type(error).__name__}")
    if pixels.ndim != 2 or inner is None or outer is None:
        return nothing._replace(problem="is a colour image" if pixels.ndim != 2 else "has no mask on its grid")
    finite = np.isfinite(pixels)
    pool, muscle = pixels[inner & finite], pixels[outer & ~inner & finite]
    if not (pool.size and muscle.size):
        return nothing._replace(problem="has no pixel between its contours")
    return nothing._replace(
        pool=float(pool.mean()), pool_deviation=float(pool.std()), muscle=float(muscle.mean()), muscle_deviation=float(muscle.std()),
        area_px=int(inner.sum()), dice=_dice(pixels, inner, outer),
    )  # fmt: skip


def _dice(pixels: viewing.Array, inner: BoolArray, outer: BoolArray) -> dict[str, float]:
    usable = outer & np.isfinite(pixels)
    level = inside.otsu(pixels[usable])
    above = np.zeros(outer.shape, np.bool_) if level is None else usable & (pixels > level)
    alone = above if inside.is_brighter(above, usable) else usable & ~above
    found = {OTSU: inside.dice(alone, inner), BEST: inside.best_dice(pixels, outer, inner)}
    for method in Method if inside.there() else ():
        proposal = inside.found(pixels, outer, method)
        found[PROPOSED[method]] = 0.0 if proposal is None else inside.dice(proposal.mask, inner)
    return found


def _died(task: Task) -> Intensity:
    image = task.view.image
    return Intensity(image["sample_id"], image["series"], np.nan, np.nan, np.nan, np.nan, problem="the process that decoded it died")
