"""Which samples a gallery shows, worst first, and what each of its pictures needs: images as grey PNGs, lines as paths.

Images keep their own pixels, each in a window from the part that is looked at; the reader's program enlarges them, and lines are
drawn over them as vectors, so that a contour is at its sub-pixel place at any size. Values that identify somebody are left out: no
patient, no UID, no path, no reader, not the SQL that chose the samples.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import psycopg
from PIL import Image as Pillow
from psycopg import sql

from catalog import viewing
from catalog.canvas import Colour, colours_of, windowed
from catalog.contours import BoolArray, FloatArray
from catalog.database import Database, explain
from catalog.errors import FileError
from catalog.marks import Drawn, placed_rings
from catalog.overlay import panes
from catalog.processes import Progress
from catalog.selection import checked
from catalog.viewing import FLAGGED, View
from catalog.workers import mapped

LARGEST = 1_024  # px a side; a larger image is made smaller, and the part that is looked at added as it is
WHERE = "sample_id NOT IN (SELECT sample_id FROM revoked_image)"  # of whom consent was withdrawn nobody makes pictures
# A flag on what a sample belongs to counts for each of its images. Among equals those come first that have flags of their own.
CHOSEN = """
WITH chosen AS (SELECT sample_id, sample_key FROM {view} WHERE {conditions} GROUP BY 1, 2), picked AS ({picked}),
counts AS (
    SELECT f.sample_id, count(DISTINCT g.id) FILTER (WHERE g.severity = 'error') AS errors,
           count(DISTINCT g.id) FILTER (WHERE g.severity = 'warning') AS warnings, count(DISTINCT g.id) AS flags,
           count(DISTINCT g.id) FILTER (WHERE f.subject NOT IN ('series', 'study', 'patient')) AS own
    FROM ({flagged}) f JOIN flag g ON g.id = f.id GROUP BY 1
)
SELECT p.sample_id, (SELECT count(*) FROM chosen), (SELECT count(*) FROM picked)
FROM picked p LEFT JOIN counts c USING (sample_id)
ORDER BY coalesce(c.errors, 0) DESC, coalesce(c.warnings, 0) DESC, coalesce(c.own, 0) DESC, coalesce(c.flags, 0) DESC, p.sample_id
LIMIT %(limit)s
"""
ALL_OF_THEM = "SELECT sample_id FROM chosen"
AT_RANDOM = "SELECT sample_id FROM chosen ORDER BY uuid_hash_extended(sample_key, %(seed)s), sample_key LIMIT %(sample)s"


class Chosen(NamedTuple):
    """What a gallery shows, worst first, of how many that fit."""

    ids: list[int]
    fitting: int
    picked: int


class Region(NamedTuple):
    """A part of an image, in px."""

    x0: int
    y0: int
    columns: int
    rows: int


class Job(NamedTuple):
    """An image to be made a PNG, and the part of it that is looked at."""

    view: View
    region: Region


class Layer(NamedTuple):
    """A PNG and what part of its image it shows."""

    png: bytes
    region: Region


@dataclass(frozen=True, slots=True)
class Made:
    """What a page needs of one image."""

    sample_id: int
    layers: list[Layer]  # all of it; of a large one, the part that is looked at, too
    window: str
    paths: dict[int, tuple[str, str]]  # pairing → contour and edge of the mask, as SVG path data in px
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Card:
    """One sample of a gallery."""

    view: View
    drawn: dict[int, Drawn]
    region: Region


def choose(database: Database, *, where: str | None, sample: int | None, seed: int, limit: int, images: bool) -> Chosen:
    """Return which samples to show, worst first: by open errors, then warnings, then flags of their own.

    Args:
        where: A user's SQL condition over the view `sample`, or with `images` over `image_all`. It runs under the login that cannot write.
        sample: So many of them, at random by `seed`: the same ones as long as the catalog holds the same.
        limit: At most so many, the worst.

    Raises:
        UsageError: If the condition is none.
        CatalogError: If the database refuses, or takes too long.
    """
    view = "image_all" if images else "sample"
    with database.read_only() as conn:
        conditions = checked(conn, where, view)
        query = _text(CHOSEN).format(
            view=sql.Identifier(view),
            conditions=sql.SQL(" AND ").join([sql.SQL(WHERE), *conditions]),
            picked=sql.SQL(AT_RANDOM if sample is not None else ALL_OF_THEM),
            flagged=_text(FLAGGED),
        )
        try:
            rows = conn.execute(query, {"seed": seed, "sample": sample, "limit": limit}, prepare=True).fetchall()
        except psycopg.Error as error:
            raise explain(error, database) from error
    return Chosen([row[0] for row in rows], rows[0][1] if rows else 0, rows[0][2] if rows else 0)


def cards(database: Database, ids: Sequence[int]) -> tuple[list[Card], dict[str, set[str]]]:
    """Return what the cards of these samples show, in their order, and which structure lies inside which."""
    with database.connect() as conn:
        found = viewing.views(conn, ids)
        inside = viewing.relations(conn)
    made = []
    for view in found:
        drawn = view.drawn()
        whole, zoom = panes((view.image["rows"], view.image["columns"]), list(drawn.values()), spacing_mm=view.spacing)
        pane = zoom or whole
        made.append(Card(view, drawn, Region(pane.x0, pane.y0, pane.columns, pane.rows)))
    return made, inside


def palette(found: Sequence[Card]) -> dict[str, Colour]:
    """Return the colour of each structure that cards show: the same on all of them."""
    everywhere = [view for card in found for view in (card.view, *(other for _, other in card.view.beside))]
    return colours_of([row["structure"] for view in everywhere for row in view.rows if row["kind"] != "label"])


def jobs_of(found: Sequence[Card]) -> list[Job]:
    """Return each image once that cards show, neighbours too, with the part that the first of them looks at."""
    first: dict[int, Job] = {}
    for card in found:
        first.setdefault(card.view.image["sample_id"], Job(View(card.view.image, card.view.rows), card.region))
    for card in found:
        for _, other in card.view.beside:
            first.setdefault(other.image["sample_id"], Job(View(other.image, other.rows), card.region))
    return list(first.values())


def made(
    found: Sequence[Card],
    take: Callable[[Made], None],
    *,
    processes: int | None = None,
    progress: Progress = lambda done, total: None,
) -> None:
    """Make all images of some cards in processes; `take` gets each as soon as it and those before it are made."""
    todo = jobs_of(found)
    for one in mapped(make_all, todo, died=_died, jobs=processes, progress=progress):
        take(one)


def make_all(jobs: Sequence[Job]) -> list[Made]:
    """Make PNGs and paths of some images. Runs in a process of its own."""
    return [_make(job) for job in jobs]


def _make(job: Job) -> Made:
    image = job.view.image
    paths: dict[int, tuple[str, str]] = {}
    for pairing, one in job.view.drawn().items():
        paths[pairing] = contour_path(placed_rings(one)), "" if one.mask is None else edge_path(one.mask)
    try:
        if why := viewing.unreadable(image):
            raise FileError("missing", why)
        values = viewing.pixels(image)
    except FileError as error:
        return Made(image["sample_id"], [], "", paths, str(error))
    except OSError as error:
        return Made(image["sample_id"], [], "", paths, f"{error.strerror} while its file was read")
    except Exception as error:  # one file of a thousand must not stop the others; the text could hold a value of its header
        return Made(image["sample_id"], [], "", paths, f"decoding it failed with {type(error).__name__}")
    part = job.region
    grey, window = windowed(values, np.s_[part.y0 : part.y0 + part.rows, part.x0 : part.x0 + part.columns])
    if image["photometric"] == "MONOCHROME1":
        grey = 255.0 - grey
    shown = np.rint(np.clip(grey, 0, 255)).astype(np.uint8)
    rows, columns = shown.shape[:2]
    layers = [Layer(_png(shown), Region(0, 0, columns, rows))]
    if max(rows, columns) > LARGEST and (part.columns, part.rows) != (columns, rows):
        layers.append(Layer(_png(shown[part.y0 : part.y0 + part.rows, part.x0 : part.x0 + part.columns]), part))
    return Made(image["sample_id"], layers, window, paths)


def _died(job: Job) -> Made:
    return Made(job.view.image["sample_id"], [], "", {}, "the process that decoded it died; look at it with another program")


def _png(shown: Any) -> bytes:
    picture = Pillow.fromarray(shown)
    picture.thumbnail((LARGEST, LARGEST), Pillow.Resampling.BOX)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)  # at 6 a picture takes five times as long, and is no fifth smaller
    return buffer.getvalue()


def contour_path(rings: Sequence[FloatArray]) -> str:
    """Return closed rings, from the first pixel's corner, as SVG path data: to a hundredth of a pixel."""
    path = []
    for ring in rings:
        if len(ring):
            near = np.clip(ring, -1e6, 1e6)
            path.append("M" + "L".join(f"{x:.2f} {y:.2f}" for x, y in near.tolist()) + "Z")
    return "".join(path)


def edge_path(mask: BoolArray) -> str:
    """Return the edges between a mask's pixels and all others as SVG path data, in px from the first pixel's corner."""
    if not mask.any():
        return ""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    top, left = int(rows[0]), int(columns[0])
    box = np.pad(mask[top : int(rows[-1]) + 1, left : int(columns[-1]) + 1].astype(np.int8), 1)
    path = []
    for turned in (False, True):
        bits = box.T if turned else box
        runs = np.diff((bits[1:] != bits[:-1]).astype(np.int8), axis=1)  # 1 where an edge between two rows begins, -1 where it ends
        for (at, first), (_, past) in zip(np.argwhere(runs == 1).tolist(), np.argwhere(runs == -1).tolist(), strict=True):
            path.append(f"M{left + at} {top + first}v{past - first}" if turned else f"M{left + first} {top + at}h{past - first}")
    return "".join(path)


def _text(query: str) -> sql.SQL:
    # The only place where text from a user becomes SQL; see `checked`.
    return sql.SQL(query)
