"""How good labels between labels are: drawn slices left out, and phases against what is bright.

    python benchmarks/interpolation.py FOLDER [--json FILE] [--plot FILE]

Along slices: of each drawn contour that has drawn ones on both sides at the same phase, the Dice of what every method makes between each
two of them. Along phases nothing can be left out where a position has two drawn phases; there what `catalog threshold --method otsu` finds
on each phase within the drawn outer contour stands for the blood pool. It is not the truth: how far it agrees with the drawn contours, at
both ends, says what more one can ask for between.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psycopg

from catalog import ingest, inside, viewing
from catalog.between import METHODS, Outline, between
from catalog.database import open_database
from catalog.inside import dice
from catalog.interpolate import OUTLINES, _outline

HERE = Path(__file__).resolve().parent
STEPS = 5  # slice distances between the two parents, at most
ROWS = """
SELECT n.series_id, s.structure, s.phase, s.position, s.trigger_time, s.annotation_id, s.sample_id, i.rows, i.columns
FROM sample s JOIN image i ON i.id = s.sample_id JOIN instance n ON n.id = i.instance_id
WHERE s.origin IN ('contour', 'segment') AND s.position IS NOT NULL ORDER BY 1, 2, 3, 4
"""
PHASES = """
SELECT i.id, i.phase, i.trigger_time FROM image i JOIN instance n ON n.id = i.instance_id
WHERE n.series_id = %s AND round(i.position * 100) = round(%s * 100) ORDER BY i.phase
"""
Row = tuple[Any, ...]


def slices(rows: Sequence[Row], outlines: dict[int, Outline]) -> Iterator[dict[str, Any]]:
    """Yield a dict a method for each drawn slice and each two drawn ones around it, up to STEPS slices apart."""
    for (series, structure, phase), group in itertools.groupby(rows, key=lambda row: row[:3]):
        line = list(group)
        for low, high in itertools.combinations(range(len(line)), 2):
            if not 2 <= high - low <= STEPS:
                continue
            for at in range(low + 1, high):
                gap = line[high][3] - line[low][3]
                fraction = (line[at][3] - line[low][3]) / gap
                truth = outlines[line[at][5]].mask
                for method in METHODS:
                    made = between(method, outlines[line[low][5]], outlines[line[high][5]], fraction, shape=truth.shape)
                    yield {
                        "series": series, "structure": structure, "phase": phase, "position": line[at][3], "gap": gap, "method": method,
                        "dice": dice(made, truth), "area": int(made.sum()) / int(truth.sum()),
                        "end": low == 0 or high == len(line) - 1,
                    }  # fmt: skip


def phases(conn: psycopg.Connection[Any], rows: Sequence[Row], outlines: dict[int, Outline]) -> Iterator[dict[str, Any]]:
    """Yield a dict a method for each phase from one drawn inner contour to the next at its position, these two included."""
    outer = {(row[0], round(row[3], 1)): row for row in rows if row[1] == "outer"}
    drawn: dict[tuple[int, float], list[Row]] = defaultdict(list)
    for row in rows:
        if row[1] == "inner":
            drawn[row[0], round(row[3], 1)].append(row)
    for place, line in drawn.items():
        if place not in outer or len(line) < 2:
            continue
        within = outlines[outer[place][5]].mask
        images = conn.execute(PHASES, [place[0], line[0][3]]).fetchall()
        views = {view.image["sample_id"]: view for view in viewing.views(conn, [image for image, *_ in images], neighbours=False)}
        for first, second in itertools.pairwise(sorted(line, key=lambda row: row[4])):
            gap = second[4] - first[4]
            for image, phase, time in images:
                fraction = (time - first[4]) / gap
                if not 0 <= fraction <= 1:
                    continue
                pool = bright(viewing.pixels(views[image].image), within)
                for method in METHODS:
                    ends = {first[6]: first, second[6]: second}
                    if image in ends:
                        made = outlines[ends[image][5]].mask
                    else:
                        made = between(method, outlines[first[5]], outlines[second[5]], fraction, shape=within.shape)
                    yield {
                        "series": place[0], "position": place[1], "phase": phase, "fraction": fraction, "gap": gap, "method": method,
                        "drawn": image in ends, "dice": dice(made, pool), "pool_px": int(pool.sum()), "made_px": int(made.sum()),
                    }  # fmt: skip


def bright(pixels: np.ndarray[Any, Any], within: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return what `catalog threshold --method otsu` takes for the pool within a mask; nothing where it tells nothing apart."""
    found = inside.found(pixels, within, inside.Method.OTSU)
    return np.zeros_like(within) if found is None else found.mask


def table(found: Sequence[dict[str, Any]], timed: Sequence[dict[str, Any]]) -> str:
    """Return both results as Markdown."""
    lines = ["| structure | gap mm | left out | method | Dice: median | tenth lowest | least | area, median share |", "|" + "---|" * 8]
    for structure in sorted({one["structure"] for one in found}):
        for gap in sorted({round(one["gap"]) for one in found if one["structure"] == structure}):
            for method in METHODS:
                own = [one for one in found if (one["structure"], round(one["gap"]), one["method"]) == (structure, gap, method)]
                values = [one["dice"] for one in own]
                lines.append(
                    f"| {structure} | {gap} | {len(own)} | {method} | {np.median(values):.3f} | {np.quantile(values, 0.1):.3f} | "
                    f"{min(values):.3f} | {np.median([one['area'] for one in own]):.2f} |"
                )
    lines += [
        "",
        "| series | of the way | images | drawn | shape | linear | nearest | px made (shape) / px of the pool |",
        "|" + "---|" * 8,
    ]
    for series in sorted({one["series"] for one in timed}):
        for low, high in ((0.0, 0.0), (0.0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0), (1.0, 1.0)):
            own = [one for one in timed if one["series"] == series and (low < one["fraction"] < high or one["fraction"] == low == high)]
            by = {method: [one for one in own if one["method"] == method] for method in METHODS}
            medians = [f"{np.median([one['dice'] for one in by[method]]):.3f}" for method in METHODS]
            ratio = sum(one["made_px"] for one in by["shape"]) / sum(one["pool_px"] for one in by["shape"])
            is_drawn = low == high
            where = f"{low:g}" if is_drawn else f"{low:g}–{high:g}"
            cells = [medians[0], "", "", ""] if is_drawn else ["", *medians]
            lines.append(f"| {series} | {where} | {len(by['shape'])} | {' | '.join(cells)} | {ratio:.2f} |")
    return "\n".join(lines)


def plot(found: Sequence[dict[str, Any]], timed: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw both results: Dice by gap and method, and Dice against what is bright along the cycle."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
             "grid.color": "#e5e5e5", "legend.frameon": False}  # fmt: skip
    colours = dict(zip(METHODS, ("#0072b2", "#d55e00", "#7f7f7f"), strict=True))
    structures = sorted({one["structure"] for one in found})
    series = sorted({one["series"] for one in timed})
    with mpl.rc_context(style):
        figure = Figure(figsize=(12, 7.6), layout="constrained")
        axes = figure.subplots(2, 2, squeeze=False)
        for axis, structure in zip(axes[0], structures, strict=False):
            gaps = sorted({round(one["gap"]) for one in found})
            for number, method in enumerate(METHODS):
                boxes = [
                    [one["dice"] for one in found if (one["structure"], round(one["gap"]), one["method"]) == (structure, gap, method)]
                    for gap in gaps
                ]
                places = [gap + 2.6 * (number - 1) for gap in gaps]
                axis.boxplot(
                    boxes, positions=places, widths=2.2, manage_ticks=False, whis=(0, 100), patch_artist=True,
                    boxprops={"facecolor": colours[method], "alpha": 0.6}, medianprops={"color": "black", "linewidth": 1.6},
                )  # fmt: skip
                axis.plot([], [], "s", color=colours[method], alpha=0.6, label=method)
            axis.set(title=f"{structure}: drawn slices left out", xlabel="gap between the two that it is made from, mm", ylabel="Dice",
                     xticks=gaps, ylim=(0.1, 1.0))  # fmt: skip
            axis.legend(loc="lower left", title="box: quartiles, whiskers: all")
        for axis, number in zip(axes[1], series, strict=False):
            for method in METHODS:
                own = [one for one in timed if one["series"] == number and one["method"] == method]
                along = sorted({one["phase"] for one in own})
                medians = [np.median([one["dice"] for one in own if one["phase"] == phase]) for phase in along]
                axis.plot(along, medians, "o-", color=colours[method], markersize=4, label=method)
            ends = sorted({one["phase"] for one in timed if one["series"] == number and one["drawn"]})
            for end in ends:
                axis.axvline(end, color="black", linewidth=1, linestyle="--")
            axis.set(title=f"series {number}: inner along phases, against the pool by Otsu", xlabel="phase; dashed: drawn",
                     ylabel="Dice with that pool, median of slices", ylim=(0.7, 1.0))  # fmt: skip
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.legend(loc="upper center", ncols=3)
        figure.savefig(path, dpi=110, metadata={"Software": "scanfeed"})


def main() -> None:
    """Ingest into a catalog of its own, measure, print the tables, write JSON and plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("folder", type=Path, help="studies with contours")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "interpolation.json")
    parser.add_argument("--plot", type=Path, default=HERE.parent / "docs" / "interpolation.png")
    arguments = parser.parse_args()
    for name in ("CATALOG_DATABASE_URL", "CATALOG_HOME"):
        os.environ.pop(name, None)
    with tempfile.TemporaryDirectory(prefix="scanfeed-") as home:
        Path(home).chmod(0o755)
        with open_database(home=Path(home) / "home") as db:
            ingest.ingest(db, arguments.folder)
            with db.connect() as conn:
                rows = conn.execute(ROWS).fetchall()
                outlines = {row[0]: _outline(*row[1:]) for row in conn.execute(OUTLINES, [[row[5] for row in rows]], binary=True)}
                found = list(slices(rows, outlines))
                timed = list(phases(conn, rows, outlines))
    print(table(found, timed))
    arguments.json.write_text(json.dumps({"slices": found, "phases": timed}) + "\n")
    plot(found, timed, arguments.plot)


if __name__ == "__main__":
    main()
