"""Plots of all samples together: areas along slices and phases, and their spread; `catalog.intensities` has the one of intensities.

Drawn by matplotlib, the extra `plots`, from what somebody drew; what was derived is left out. Nothing in them says of whom: series are
called by their number in the catalog, samples by theirs.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import psycopg
from psycopg import sql

from catalog.canvas import colours_of
from catalog.database import Database, explain
from catalog.errors import CatalogError, UsageError
from catalog.gallery import WHERE
from catalog.lettering import one_line
from catalog.processes import Progress
from catalog.selection import DRAWN, checked

MOST_SERIES = 8  # panels of one plot
NAMED_PHASES = 4  # lines that the legend tells apart
YELLOW, BLUE = (240, 228, 66), (0, 114, 178)  # on white, Okabe and Ito's yellow is lost where their blue is on black
DPI = 130

ROWS = """
SELECT s.sample_id, s.annotation_id, s.structure, n.series_id, s.position, s.phase, s.area_px, s.area_mm2, s.error_flags,
       h.centroid_column * s.column_spacing, h.centroid_row * s.row_spacing, s.origin
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
    origin: str = "contour"


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
    found = masks(database, where, [] if what == "intensities" else structures)
    rows = [row for row in found if row.origin in DRAWN]
    derived = len(found) - len(rows)
    if not rows:
        raise UsageError("no mask that somebody drew fits, so there is nothing to plot; `catalog status` says what there is")
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
            from catalog import intensities

            said = intensities.draw(figure, *intensities.measured(database, rows, structures, jobs, progress))
        buffer = io.BytesIO()
        # Without a date the same catalog gives the same file.
        figure.savefig(buffer, format=kind, dpi=DPI, metadata={"Date": None} if kind == "svg" else {"Software": "scanfeed"})
    return buffer.getvalue(), said + ([f"{derived} derived masks left out: nobody drew them"] if derived else [])


def masks(database: Database, where: str | None, structures: Sequence[str]) -> list[Row]:
    """Return masks of the view `sample`, in order of series, structure, position and phase."""
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
    colours = palette([row.structure for row in rows])
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
                labels.append(legend_name(structure) + (f", phase {phase}" if phase >= 0 else ""))
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
    colours = palette(structures)
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
            panel.hist(values, bins=np.linspace(0, most, bars(len(values))), color=colours[name], alpha=0.75)
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
        left.set_title(f"{legend_name(name)}: {len(areas[name])} masks")
        right.set_title(f"{legend_name(name)}: {len(distances[name])} masks")
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


def palette(names: Sequence[str]) -> dict[str, str]:
    """Return a colour, #rrggbb, for each name, that is told from the others on white."""
    return {name: "#{:02x}{:02x}{:02x}".format(*(BLUE if colour == YELLOW else colour)) for name, colour in colours_of(names).items()}


def _area(row: Row, mm: bool) -> float:
    return float(row.area_mm2) if mm and row.area_mm2 is not None else float(row.area_px)


def _unit(mm: bool) -> str:
    return "mm²" if mm else "px: a pixel spacing is not known"


def bars(count: int) -> int:
    """Edges of a histogram's bars: not many more bars than masks."""
    return int(np.clip(round(2 * count**0.5), 8, 40)) + 1


def legend_name(name: str) -> str:
    """A name as a legend takes it: one line, not too long."""
    name = one_line(name)
    return name if len(name) <= 40 else name[:39] + "…"
