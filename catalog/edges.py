"""How well polygons follow the edges of their images, as drawn and moved a little: table `edge_fit`.

The score of a shift is the mean magnitude of the gradient along the moved polygon. A contour that was drawn along an edge scores best
where it lies; if all contours of a source score best at one and the same shift, their coordinates are counted from another origin. One
contour says little, as its best shift scatters by a pixel, so the rule CONTOUR-SHIFT asks for the mean over many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, wait
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import psycopg

from catalog import contours, geometry
from catalog.contours import FloatArray
from catalog.database import Database, explain
from catalog.errors import CatalogError, FileError
from catalog.measuring import Item, stored_values
from catalog.processes import Progress, processes

SHIFTS = np.arange(-2.0, 2.01, 0.5)  # px, in x and in y
SPACING_PX = 0.5  # of the points at which the gradient is looked up
SIGMA_PX = 1.0  # the image is smoothed by so much first: single pixels of noise are no edges
MARGIN_PX = 8  # around the polygon: the widest shift, and what smoothing and differences reach
MOST_POINTS = 20_000
CONTOURS_PER_TASK = 64
TASKS_AT_ONCE = 16
CONTOURS_PER_PAGE = 4_096

UNFITTED = """
FROM pairing p JOIN annotation a ON a.id = p.annotation_id AND a.current AND a.kind = 'polygon' JOIN image i ON i.id = p.image_id
JOIN measure m ON m.image_id = i.id JOIN location l ON l.image_id = i.id AND l.preferred
JOIN file f ON f.id = l.file_id AND f.state = 'present' JOIN place r ON r.file_id = f.id
WHERE p.id > %(after)s AND p.state = 'accepted' AND NOT EXISTS (SELECT FROM edge_fit e WHERE e.pairing_id = p.id)
"""
COUNT = f"SELECT count(*) {UNFITTED}"
PAGE = f"""
SELECT i.id, f.id, f.root_id, r.url, r.path, f.size, f.mtime_ns, f.format, l.coding, i.frame, i.rows, i.columns, i.samples_per_pixel,
       i.slope, i.intercept, i.modality_lut, l.byte_offset, l.byte_length, l.dtype, l.bits_stored, false,
       p.id, a.points, a.rings, a.convention, a.shift_x, a.shift_y, i.image_position, i.image_orientation, i.row_spacing, i.column_spacing
{UNFITTED} ORDER BY p.id LIMIT {CONTOURS_PER_PAGE}
"""
STAGED = "CREATE TEMP TABLE IF NOT EXISTS fitted (pairing_id bigint, scores real[]) ON COMMIT DELETE ROWS"
WRITE = "INSERT INTO edge_fit SELECT f.* FROM fitted f JOIN pairing p ON p.id = f.pairing_id ORDER BY 1 ON CONFLICT DO NOTHING"

Fitted = tuple[int, list[float]]  # pairing, scores


class Contour(NamedTuple):
    """One polygon to fit, as `PAGE` gives it, and the image that it is on."""

    item: Item
    pairing_id: int
    points: list[float]
    rings: list[int]
    convention: str
    shift_x: float
    shift_y: float
    position: list[float] | None
    orientation: list[float] | None
    row_spacing: float | None
    column_spacing: float | None


def fit(
    database: Database,
    *,
    jobs: int | None = None,
    limit: int | None = None,
    progress: Progress = lambda done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> int:
    """Fill in the scores of accepted polygons on measured images that have none yet; returns how many.

    An image that cannot be read now is left for the next time: why, `catalog measure` and the feed find out.

    Args:
        jobs: Processes; by default one a core.
        limit: At most so many contours.
        progress: Called with (contours done, contours to do).
        say: Called with a line when a process died.

    Raises:
        CatalogError: If the database refuses.
    """
    count = done = 0
    try:
        with database.connect(application_name="catalog measure") as conn:
            conn.execute(STAGED)
            row = conn.execute(COUNT, {"after": 0}).fetchone()
            conn.commit()
            total = min(row[0] if row else 0, limit or 1 << 62)
            if not total:
                return 0
            with processes(jobs, -(-total // CONTOURS_PER_TASK)) as pool:
                for task in _done(pool.submit, _tasks(conn, total)):
                    with conn.cursor().copy("COPY fitted FROM STDIN") as copy:
                        for one in task:
                            copy.write_row(one)
                    count += conn.execute(WRITE).rowcount
                    conn.commit()
                    done += CONTOURS_PER_TASK
                    progress(min(done, total), total)
            conn.execute("ANALYZE edge_fit")
    except BrokenExecutor:
        say("a process that looked at edges died; what it had is left for the next `catalog measure`")
    except psycopg.Error as error:
        raise explain(error, database) from error
    return count


def _tasks(conn: psycopg.Connection[Any], total: int) -> Iterator[list[Contour]]:
    after = 0
    while total > 0:
        rows = conn.execute(PAGE, {"after": after}, binary=True).fetchmany(total)
        conn.commit()
        page = [Contour(Item._make(row[: len(Item._fields)]), *row[len(Item._fields) :]) for row in rows]
        if not page:
            return
        for start in range(0, len(page), CONTOURS_PER_TASK):
            yield page[start : start + CONTOURS_PER_TASK]
        total -= len(page)
        after = page[-1].pairing_id


def _done(submit: Callable[..., Future[list[Fitted]]], tasks: Iterator[list[Contour]]) -> Iterator[list[Fitted]]:
    running: set[Future[list[Fitted]]] = set()
    for task in tasks:
        running.add(submit(fit_contours, task))
        if len(running) == TASKS_AT_ONCE:
            ended, running = wait(running, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in ended)
    for future in running:
        yield future.result()


def fit_contours(task: Sequence[Contour]) -> list[Fitted]:
    """Return the scores of some polygons; those whose image cannot be read are left out. Runs in a process of its own."""
    found: list[Fitted] = []
    image_id, values = 0, np.empty((0, 0))
    for contour in sorted(task, key=lambda one: one.item.image_id):
        try:
            if contour.item.image_id != image_id:
                values, image_id = np.asarray(stored_values(contour.item)), contour.item.image_id
        except (OSError, FileError, CatalogError):
            continue
        found.append((contour.pairing_id, scores(values, _placed(contour)).astype(np.float32).tolist()))
    return found


def _placed(contour: Contour) -> list[FloatArray]:
    """Return a polygon's rings, (n, 2) x and y in px with centres at whole numbers; none if its image does not say where it lies."""
    patient = contour.convention == "patient"
    rings = contours.unflatten(contour.points, contour.rings, 3 if patient else 2)
    if patient:
        place, spacing = (contour.position, contour.orientation), (contour.row_spacing, contour.column_spacing)
        try:
            rings = [geometry.to_pixels(ring, *place, spacing)[0] for ring in rings]  # type: ignore[arg-type]
        except (ValueError, TypeError):
            return []
    centre = 0.5 if contour.convention == "corner" else 0.0
    moved = np.array([contour.shift_x - centre, contour.shift_y - centre])
    return [ring + moved for ring in rings]


def scores(values: npt.NDArray[Any], rings: Sequence[FloatArray]) -> npt.NDArray[np.float64]:
    """Return how well a polygon follows the edges of an image at each of 9 × 9 shifts.

    Args:
        values: (rows, columns), or (rows, columns, samples), whose mean is taken.
        rings: Each (n, 2), x and y in px with pixel centres at whole numbers; fewer than three points are no ring.

    Returns:
        float64 (81,): at 9 * j + i the shift of (SHIFTS[i], SHIFTS[j]) px in x and y. Mean 0 and standard deviation 1; all 0 where nothing
        tells shifts apart: no ring, no edge.
    """
    nothing = np.zeros(SHIFTS.size**2)
    at, weight = _along(rings)
    rows, columns = values.shape[:2]
    if not len(at):
        return nothing
    low = np.clip(np.floor(at.min(axis=0)).astype(np.int64) - MARGIN_PX, 0, (columns - 1, rows - 1))
    high = np.clip(np.ceil(at.max(axis=0)).astype(np.int64) + MARGIN_PX + 1, 1, (columns, rows))
    part = np.nan_to_num(values[low[1] : high[1], low[0] : high[0]].astype(np.float64), posinf=0.0, neginf=0.0)
    if part.ndim == 3:
        part = part.mean(axis=2)
    if min(part.shape, default=0) < 2:
        return nothing
    steep = np.hypot(*np.gradient(_smooth(part)))
    found = np.empty((SHIFTS.size, SHIFTS.size))
    x = at[:, 0] - low[0] + SHIFTS[:, np.newaxis]
    for j, shift in enumerate(SHIFTS):
        found[j] = _between(steep, x, np.broadcast_to(at[:, 1] - low[1] + shift, x.shape)) @ weight
    deviation = float(found.std())
    if not deviation > 1e-12 * max(1.0, float(np.abs(found).max())):
        return nothing
    return np.asarray((found - found.mean()).reshape(-1) / deviation)


def _along(rings: Sequence[FloatArray]) -> tuple[FloatArray, FloatArray]:
    """Return points along closed rings, (n, 2), at most half a pixel apart, and the share of the length that each stands for, (n,)."""
    closed = [ring for ring in rings if len(ring) >= 3]
    if not closed:
        return np.empty((0, 2)), np.empty(0)
    start, end = np.concatenate(closed), np.concatenate([np.roll(ring, -1, axis=0) for ring in closed])
    length = np.hypot(*(end - start).T)
    total = float(length.sum())
    if not 0 < total < np.inf:
        return np.empty((0, 2)), np.empty(0)
    step = max(SPACING_PX, total / MOST_POINTS)
    counts = np.ceil(length / step).astype(np.int64)
    edge = np.repeat(np.arange(len(length)), counts)
    place = np.arange(len(edge)) - np.repeat(np.cumsum(counts) - counts, counts)
    share = (place + 0.5) / counts[edge]
    return start[edge] + (end - start)[edge] * share[:, np.newaxis], (length / np.maximum(counts, 1))[edge] / total


def _smooth(values: FloatArray) -> FloatArray:
    reach = int(np.ceil(3 * SIGMA_PX))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / SIGMA_PX) ** 2)
    kernel /= kernel.sum()
    for axis in (0, 1):
        wide = np.pad(values, [(reach, reach) if axis == one else (0, 0) for one in (0, 1)], mode="edge")
        size = values.shape[axis]
        values = sum((k * wide.take(range(s, s + size), axis) for s, k in enumerate(kernel)), np.zeros_like(values))
    return values


def _between(values: FloatArray, x: FloatArray, y: FloatArray) -> FloatArray:
    """Return values between pixels, bilinear; beyond the border as at the border."""
    rows, columns = values.shape
    x, y = np.clip(x, 0, columns - 1), np.clip(y, 0, rows - 1)
    left, top = np.minimum(x.astype(np.int64), columns - 2), np.minimum(y.astype(np.int64), rows - 2)
    right_share, low_share = x - left, y - top
    flat, first = values.reshape(-1), top * columns + left
    upper = flat[first] * (1 - right_share) + flat[first + 1] * right_share
    lower = flat[first + columns] * (1 - right_share) + flat[first + columns + 1] * right_share
    return np.asarray(upper * (1 - low_share) + lower * low_share)
