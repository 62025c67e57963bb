"""Plots of all samples together: areas along slices and phases, their spread, intensities of what lies inside and around.

Drawn by matplotlib, the extra `plots`. Nothing in them says of whom: series are called by their number in the catalog, samples by theirs.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import psycopg
from psycopg import sql

from catalog import viewing
from catalog.canvas import colours_of
from catalog.contours import BoolArray
from catalog.database import Database, explain
from catalog.errors import CatalogError, FileError, UsageError
from catalog.gallery import WHERE
from catalog.lettering import one_line
from catalog.reading import Progress
from catalog.selection import checked
from catalog.viewing import View
from catalog.workers import mapped

MOST_SERIES = 8  # panels of one plot
MOST_IMAGES = 2_000  # whose pixels are read; at random where there are more
NAMED_PHASES = 4  # lines that the legend tells apart
NAMED_SAMPLES = 12
YELLOW, BLUE = (240, 228, 66), (0, 114, 178)  # on white, Okabe and Ito's yellow is lost where their blue is on black
DPI = 130

ROWS = """
SELECT s.sample_id, s.annotation_id, s.structure, n.series_id, s.position, s.phase, s.area_px, s.area_mm2, s.error_flags,
       h.centroid_column * s.column_spacing, h.centroid_row * s.row_spacing
FROM (SELECT * FROM sample WHERE {conditions}) s JOIN image i ON i.id = s.sample_id JOIN instance n ON n.id = i.instance_id
JOIN pairing p ON p.annotation_id = s.annotation_id AND p.image_id = s.sample_id LEFT JOIN shape h ON h.pairing_id = p.id
WHERE s.area_px IS NOT NULL AND (%(structures)s::text[] IS NULL OR s.structure = ANY(%(structures)s))
ORDER BY n.series_id, s.structure, s.position, s.phase, s.sample_id
"""


class Row(NamedTuple):
    """A mask of the view `sample`; its centroid from the image's first pixel, in mm."""

    sample_id: int
    annotation_id: int
    structure: str
    series: int
    position: float | None
    phase: int | None
    area_px: int
    area_mm2: float | None
    errors: int
    centroid_x: float | None
    centroid_y: float | None


class Task(NamedTuple):
    """An image, and the masks of what lies inside and of what is around it."""

    view: View
    inside: int  # annotation ids
    outside: int


class Intensity(NamedTuple):
    """Mean and standard deviation inside (blood pool) and between inside and outside (muscle); NaN where there is no pixel."""

    sample_id: int
    series: int
    pool: float
    pool_deviation: float
    muscle: float
    muscle_deviation: float
    problem: str = ""


def needed() -> None:
    """Say in one line what to install where matplotlib is not there."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise CatalogError("plots need matplotlib, which is not installed: pip install 'scanfeed[plots]'") from None


def plot(
    database: Database,
    what: str,
    *,
    where: str | None,
    structures: Sequence[str],
    kind: str,
    jobs: int | None = None,
    progress: Progress = lambda done, total: None,
) -> tuple[bytes, list[str]]:
    """Return a plot as a PNG or SVG file, and what to say about it.

    Args:
        what: areas, spread or intensities.
        where: A user's SQL condition over the view `sample`; it runs under the login that cannot write.
        structures: These alone, all where it is empty; of intensities, those that lie inside another one.
        kind: png or svg.

    Raises:
        UsageError: If the condition is none, or nothing fits.
        CatalogError: If the database refuses.
    """
    needed()
    # Of intensities the structure around is needed, too.
    rows = _rows(database, where, [] if what == "intensities" else structures)
    if not rows:
        raise UsageError("no mask fits, so there is nothing to plot; `catalog status` says what there is")
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: dict[str, Any] = {
        "text.parse_math": False,  # a name may hold a $
        "svg.hashsalt": "scanfeed",
        "font.size": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#e5e5e5",
        "legend.frameon": False,
    }
    with mpl.rc_context(style):
        figure = Figure(layout="constrained")
        if what == "areas":
            said = _areas(figure, rows)
        elif what == "spread":
            said = _spread(figure, rows)
        else:
            said = _intensities(figure, *_measured(database, rows, structures, jobs, progress))
        buffer = io.BytesIO()
        # Without a date the same catalog gives the same file.
        figure.savefig(buffer, format=kind, dpi=DPI, metadata={"Date": None} if kind == "svg" else {"Software": "scanfeed"})
    return buffer.getvalue(), said


def _rows(database: Database, where: str | None, structures: Sequence[str]) -> list[Row]:
    with database.read_only() as conn:
        query = sql.SQL(ROWS).format(conditions=sql.SQL(" AND ").join([sql.SQL(WHERE), *checked(conn, where, "sample")]))
        try:
            rows = conn.execute(query, {"structures": list(structures) or None}, prepare=True).fetchall()
        except psycopg.Error as error:
            raise explain(error, database) from error
    return [Row(*row) for row in rows]


def _areas(figure: Any, rows: Sequence[Row]) -> list[str]:
    """A row of panels a series: area along slices, a line a phase; and along phases, a line a slice."""
    series = sorted({row.series for row in rows})
    shown = series[:MOST_SERIES]
    colours = _colours([row.structure for row in rows])
    across = 2 if any(row.phase is not None for row in rows) else 1
    figure.set_size_inches(13, 0.8 + 3.6 * len(shown))
    axes = figure.subplots(len(shown), across, squeeze=False, sharey="row")
    unplaced = 0
    for number, panels in zip(shown, axes, strict=True):
        left, right = panels[0], panels[-1]
        own = [row for row in rows if row.series == number]
        mm = all(row.area_mm2 is not None for row in own)
        unplaced += sum(row.position is None for row in own)
        slices: dict[tuple[str, int], list[Row]] = defaultdict(list)
        phases: dict[tuple[str, float], list[Row]] = defaultdict(list)
        for row in own:
            if row.position is not None:
                slices[row.structure, -1 if row.phase is None else row.phase].append(row)
                if row.phase is not None:
                    phases[row.structure, round(row.position, 2)].append(row)
        ranks = {phase: rank for rank, phase in enumerate(sorted({phase for _, phase in slices}))}
        handles, labels = [], []
        for (structure, phase), found in sorted(slices.items()):
            rank = ranks[phase]
            (line,) = left.plot(
                [row.position for row in found], [_area(row, mm) for row in found], color=colours[structure],
                marker="osD^"[rank % 4], linestyle=("-", "--", "-.", ":")[rank % 4], markersize=5,
            )  # fmt: skip
            if rank < NAMED_PHASES:
                handles.append(line)
                labels.append(_shown(structure) + (f", phase {phase}" if phase >= 0 else ""))
        for (structure, _), found in sorted(phases.items()):
            found.sort(key=lambda row: row.phase or 0)
            right.plot([row.phase for row in found], [_area(row, mm) for row in found], color=colours[structure], marker="o",
                       markersize=4, linewidth=1)  # fmt: skip
        for panel, axis in zip(panels, ("position", "phase"), strict=False):
            wrong = [row for row in own if row.errors and row.position is not None and getattr(row, axis) is not None]
            if wrong:
                (line,) = panel.plot([getattr(row, axis) for row in wrong], [_area(row, mm) for row in wrong], "kx", markersize=11, mew=2)
                if panel is left:
                    handles.append(line)
                    labels.append("open error")
        left.set(title=f"series {number}, along slices", xlabel="position along the slice normal (mm)", ylabel=f"area ({_unit(mm)})")
        if right is not left:
            right.set(title=f"series {number}, along phases: a line a slice", xlabel="phase (from 0)")
            right.xaxis.get_major_locator().set_params(integer=True)
        left.set_ylim(bottom=0)
        if len(ranks) > NAMED_PHASES:
            left.set_title(f"series {number}, along slices: a line a phase, {len(ranks)} phases")
        right.legend(handles, labels, fontsize=10, loc="center left", bbox_to_anchor=(1.0, 0.5))
    said = [f"{len(series) - len(shown)} more series fit and are not shown; narrow down with --where"] if len(series) > len(shown) else []
    return said + ([f"{unplaced} masks left out: their images do not say where they lie"] if unplaced else [])


def _spread(figure: Any, rows: Sequence[Row]) -> list[str]:
    """A row of panels a structure: how areas are distributed, and how far centroids lie from where they mostly do in their series."""
    structures = sorted({row.structure for row in rows})
    colours = _colours(structures)
    mm = all(row.area_mm2 is not None for row in rows)
    away = _away(rows)
    shown = structures[:MOST_SERIES]
    figure.set_size_inches(13, 0.8 + 2.9 * len(shown))
    axes = figure.subplots(len(shown), 2, squeeze=False, sharex="col")
    areas = {name: [_area(row, mm) for row in rows if row.structure == name] for name in shown}
    distances = {name: [away[row.annotation_id] for row in rows if row.structure == name and row.annotation_id in away] for name in shown}
    for name, (left, right) in zip(shown, axes, strict=True):
        for panel, values, everything in ((left, areas[name], areas), (right, distances[name], distances)):
            most = max((value for found in everything.values() for value in found), default=1.0) or 1.0
            panel.hist(values, bins=np.linspace(0, most, _bins(len(values))), color=colours[name], alpha=0.75)
            if values:
                low, middle, high = np.percentile(values, (5, 50, 95))
                panel.axvline(middle, color="k", linewidth=1.5)
                for value in (low, high):
                    panel.axvline(value, color="k", linewidth=1, linestyle="--")
            if 0 < len(values) <= 500:  # each on its own, below the bars
                panel.plot(
                    values, [-0.04] * len(values), "|", color="k", markersize=8, transform=panel.get_xaxis_transform(), clip_on=False
                )
                panel.tick_params(axis="x", pad=9)
            panel.set_ylabel("masks")
            panel.yaxis.get_major_locator().set_params(integer=True)
        left.set_title(f"{_shown(name)}: {len(areas[name])} masks")
        right.set_title(f"{_shown(name)}: {len(distances[name])} masks")
    axes[-1][0].set_xlabel(f"area ({_unit(mm)})")
    axes[-1][1].set_xlabel("centroid, from the series' median centroid (mm in the plane)")
    figure.suptitle("line: median; dashed: 5th and 95th percentile", fontsize=11)
    said = [f"{len(structures) - len(shown)} more structures are not shown; see --structure"] if len(structures) > len(shown) else []
    left_out = sum(row.area_px > 0 for row in rows) - len(away)
    return said + ([f"{left_out} masks have no centroid in mm: no pixel spacing, or their shapes are not computed yet"] if left_out else [])


def _away(rows: Sequence[Row]) -> dict[int, float]:
    """Return how far centroids lie from the median centroid of their structure in their series, in mm, by annotation."""
    found: dict[tuple[int, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row.centroid_x is not None and row.centroid_y is not None:
            found[row.series, row.structure].append(row)
    away: dict[int, float] = {}
    for group in found.values():
        places = np.array([(row.centroid_x, row.centroid_y) for row in group], np.float64)
        far = np.hypot(*(places - np.median(places, axis=0)).T)
        away.update(zip((row.annotation_id for row in group), far.tolist(), strict=True))
    return away


def _intensities(figure: Any, found: Sequence[Intensity], named: tuple[str, str]) -> list[str]:
    """Mean of the blood pool against mean of the muscle, a point a sample; and how both are distributed."""
    good = [one for one in found if np.isfinite(one.pool) and np.isfinite(one.muscle)]
    if not good:
        raise UsageError("no image has pixels both inside and between its contours that can be read, so there is nothing to plot")
    figure.set_size_inches(13, 6)
    left, right = figure.subplots(1, 2)
    muscle, pool = (np.array([getattr(one, name) for one in good]) for name in ("muscle", "pool"))
    series = sorted({one.series for one in good})
    colours = _colours([f"series {number}" for number in series])
    handles, labels = [], []
    for number in series:
        own = [one for one in good if one.series == number]
        error = left.errorbar(
            [one.muscle for one in own], [one.pool for one in own], xerr=[one.muscle_deviation for one in own],
            yerr=[one.pool_deviation for one in own], fmt="o", markersize=5, color=colours[f"series {number}"], elinewidth=0.5, alpha=0.8,
        )  # fmt: skip
        if number in series[:MOST_SERIES]:
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
    bins = np.linspace(ends[0], ends[1] if ends[1] > ends[0] else ends[0] + 1.0, _bins(len(good)))
    for values, name, colour in ((pool, named[0], "#e69f00"), (muscle, named[1], "#56b4e9")):
        right.hist(values, bins=bins, color=colour, alpha=0.6, label=name)
    right.set(title=f"{len(good)} samples", xlabel="mean intensity (modality units)", ylabel="samples")
    right.yaxis.get_major_locator().set_params(integer=True)
    right.legend(fontsize=10)
    said = [f"{sum(pool <= muscle)} of {len(good)} samples: {named[0]} is no brighter than {named[1]}"] if (pool <= muscle).any() else []
    problems = [f"sample {one.sample_id}: {one.problem}" for one in found if one.problem]
    more = [f"… and {len(problems) - 10} more"] if len(problems) > 10 else []
    return said + problems[:10] + more


def _measured(
    database: Database, rows: Sequence[Row], structures: Sequence[str], jobs: int | None, progress: Progress
) -> tuple[list[Intensity], tuple[str, str]]:
    """Return what was measured, and what is inside and around in words."""
    by_sample: dict[int, dict[str, int]] = defaultdict(dict)
    for row in rows:
        by_sample[row.sample_id][row.structure] = row.annotation_id
    with database.connect() as conn:
        inside = viewing.relations(conn)
        pairs: list[tuple[int, int, int]] = []
        names: set[tuple[str, str]] = set()
        for sample, drawn in by_sample.items():
            for name in drawn:
                around = sorted(other for other in inside.get(name, ()) if other in drawn)
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
    measured = list(mapped(measure_all, tasks, died=_died, jobs=jobs, progress=progress))
    if names == {("inner", "outer")}:
        return measured, ("blood pool (inner)", "muscle (outer less inner)")
    listed = [", ".join(sorted({_shown(name[side]) for name in names})) for side in (0, 1)]
    return measured, (f"inside ({listed[0]})", f"around ({listed[1]} less what is inside)")


def measure_all(tasks: Sequence[Task]) -> list[Intensity]:
    """Measure some images. Runs in a process of its own."""
    return [_measure(task) for task in tasks]


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
        pool=float(pool.mean()), pool_deviation=float(pool.std()), muscle=float(muscle.mean()), muscle_deviation=float(muscle.std())
    )


def _died(task: Task) -> Intensity:
    image = task.view.image
    return Intensity(image["sample_id"], image["series"], np.nan, np.nan, np.nan, np.nan, "the process that decoded it died")


def _colours(names: Sequence[str]) -> dict[str, str]:
    return {name: "#{:02x}{:02x}{:02x}".format(*(BLUE if colour == YELLOW else colour)) for name, colour in colours_of(names).items()}


def _area(row: Row, mm: bool) -> float:
    return float(row.area_mm2) if mm and row.area_mm2 is not None else float(row.area_px)


def _unit(mm: bool) -> str:
    return "mm²" if mm else "px: a pixel spacing is not known"


def _bins(count: int) -> int:
    """Edges of a histogram's bars: not many more bars than masks."""
    return int(np.clip(round(2 * count**0.5), 8, 40)) + 1


def _shown(name: str) -> str:
    """A name as a legend takes it: one line, not too long."""
    name = one_line(name)
    return name if len(name) <= 40 else name[:39] + "…"
