"""`context=n`: the n images before and the n after each sample along the slice normal, found by geometry.

Neighbours lie in one line: images of the same series, rows, columns, pixel spacing, orientation and phase, in the order of their position
(mm along the normal), never of a file's name. Images within 0.01 mm are at one place; of several there (echoes, moments of a 4-D volume,
repeated acquisitions) the k-th goes with the k-th of the next place, or with its last one, in the order of instance numbers and frames.
Where the next place is more than 1.5 times the line's usual distance away (the median; of two in the middle the smaller), a slice is
missing: there the line ends, and nothing beyond is a neighbour; two slices alone say nothing of what is usual. Images that are revoked, or
of which no file is present, are as if they were not there. What does not say where it lies goes by the frames of its object: a volume
without an affine, a clip.

Frames of reference play no part: there are archives where each file has its own. Channels are laid over one another pixel by pixel: where
a scanner moved the field of view from slice to slice, so are they.

An image row does not say its series, so to find one neighbour all images of its series are read: 1,024 samples of 650 series of 240 images
took 2 s in one query. Hence each series is read once, and what was found is kept until the catalog changes (`Neighbours.forget`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, LiteralString

import numpy as np
import psycopg
from numpy.typing import NDArray
from psycopg import sql

SAME_MM = 0.01  # as `catalog.images.number_phases` and `catalog.interpolate`
WIDEST = 1.5  # times the usual distance: one missing slice is 2, the jitter of positions far below

# What a work row says of an image; see `loaderd.work`. Of the tables image i, instance n, location l, file f and view place pl.
LOCATION: LiteralString = (
    "i.id, encode(uuid_send(i.sample_key), 'hex'), pl.url, pl.path, f.size, f.mtime_ns, l.byte_offset, l.byte_length, l.dtype, i.slope, "
    "i.intercept, i.frame, i.rows, i.columns, n.sop_instance_uid, encode(i.pixel_hash, 'hex'), f.format, l.coding, l.bits_stored, "
    "i.modality_lut"
)
LOCATED: LiteralString = (
    "JOIN instance n ON n.id = i.instance_id LEFT JOIN location l ON l.image_id = i.id AND l.preferred "
    "LEFT JOIN file f ON f.id = l.file_id LEFT JOIN place pl ON pl.file_id = f.id "
)

# A line is one number. Directions are rounded to 0.01, spacings to 0.001 mm: scanners write the same ones with different last digits.
# least and greatest keep damaged headers from overflowing. COPY in binary: fixed columns without NULL, which numpy reads as they come.
LINES: LiteralString = """
COPY (
    SELECT i.id, hash_record_extended(ROW(n.series_id, CASE WHEN o.framed THEN n.id END, i.rows, i.columns,
               CASE WHEN NOT o.framed THEN i.phase END, round(least(i.row_spacing, 1e6) * 1e3), round(least(i.column_spacing, 1e6) * 1e3),
               {axes}), 0) AS line,
           CASE WHEN o.framed THEN i.frame ELSE i.position END::float8 AS at, coalesce(n.instance_number, 0)::bigint, i.frame::bigint,
           uuid_hash_extended(i.sample_key, 0)
    FROM instance n JOIN image i ON i.instance_id = n.id JOIN location l ON l.image_id = i.id AND l.preferred
    CROSS JOIN LATERAL (
        SELECT i.position IS NULL OR (n.number_of_frames > 1 AND EXISTS (
            SELECT FROM image u WHERE u.instance_id = n.id AND u.position IS NULL)) AS framed OFFSET 0
    ) o
    WHERE n.series_id = ANY({series}) AND i.id NOT IN (SELECT sample_id FROM revoked_image)
) TO STDOUT (FORMAT binary)
"""
AXIS: LiteralString = "round(least(greatest(i.image_orientation[{k}], -1), 1) * 100)"
COLUMNS = (("id", ">i8"), ("line", ">i8"), ("at", ">f8"), ("number", ">i8"), ("frame", ">i8"), ("tie", ">i8"))
RECORD = np.dtype(
    [("fields", ">i2"), *((name, kind) for column, of in COLUMNS for name, kind in ((f"{column} bytes", ">i4"), (column, of)))]
)
SIGNATURE, TRAILER = 19, 2  # bytes before the first record and after the last

Ids = NDArray[np.int64]


class Neighbours:
    """The neighbours of a stream's samples, as the catalog says when a series is first asked for, until `forget`."""

    def __init__(self, context: int) -> None:
        self.context = context
        self.forget()

    def forget(self) -> None:
        """Look everything up again: the catalog changed."""
        self._ids: Ids = np.empty(0, np.int64)  # ascending
        self._around: Ids = np.empty((0, 2 * self.context), np.int64)

    def of(self, conn: psycopg.Connection[Any], samples: Sequence[int]) -> Ids:
        """Return the image ids of the neighbours, (samples, 2 * context) in the order of position, 0 where there is none; a new array."""
        asked = np.asarray(samples, np.int64)
        at = np.searchsorted(self._ids, asked)
        unknown = asked[self._ids[np.minimum(at, len(self._ids) - 1)] != asked] if len(self._ids) else asked
        if unknown.size:
            ids, around = lines(_read(conn, unknown), self.context)
            lost = np.setdiff1d(unknown, ids)  # revoked, or without a file
            self._keep(np.concatenate([ids, lost]), np.concatenate([around, np.zeros((lost.size, 2 * self.context), np.int64)]))
            at = np.searchsorted(self._ids, asked)
        found: Ids = self._around[at]
        return found

    def _keep(self, ids: Ids, around: Ids) -> None:
        ids, first = np.unique(np.concatenate([ids, self._ids]), return_index=True)
        self._ids, self._around = ids, np.concatenate([around, self._around])[first]

    def rows(self, conn: psycopg.Connection[Any], samples: Sequence[int]) -> list[bytes]:
        """Return, for each sample, a JSON array of its 2 * context neighbours: each what the work says of an image, or null.

        What was revoked or lost its file since the neighbours were looked up is null.
        """
        around = self.of(conn, samples)
        query = (
            f"SELECT i.id, convert_to(json_build_array({LOCATION})::text, 'UTF8') FROM image i {LOCATED}"  # noqa: S608  our own text
            "WHERE i.id = ANY(%s) AND l.image_id IS NOT NULL AND i.id NOT IN (SELECT sample_id FROM revoked_image)"
        )
        wanted = np.unique(around[around > 0]).tolist()
        known: dict[int, bytes] = dict(conn.execute(query, [wanted], binary=True).fetchall()) if wanted else {}
        return [b"[%s]" % b", ".join([known.get(one, b"null") for one in images]) for images in around.tolist()]


def with_neighbours(work: Sequence[tuple[bytes, bytes]], around: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    """Return work rows with their neighbours as one more element, the last, of the row's JSON array."""
    return [(b"%s, %s]" % (row[:-1], beside), bits) for (row, bits), beside in zip(work, around, strict=True)]


def _read(conn: psycopg.Connection[Any], images: Ids) -> NDArray[Any]:
    """Return a RECORD for each image of the series that these belong to, in any order."""
    series = conn.execute(
        "SELECT array_agg(DISTINCT n.series_id) FROM image i JOIN instance n ON n.id = i.instance_id WHERE i.id = ANY(%s)",
        [images.tolist()],
    ).fetchone()
    assert series is not None
    axes = sql.SQL(", ").join(sql.SQL(AXIS).format(k=sql.Literal(number)) for number in range(1, 7))
    query = sql.SQL(LINES).format(axes=axes, series=sql.Literal(series[0] or []))
    with conn.cursor().copy(query) as copy:
        content = b"".join(bytes(block) for block in copy)
    return np.frombuffer(content, RECORD, offset=SIGNATURE, count=(len(content) - SIGNATURE - TRAILER) // RECORD.itemsize)


def lines(images: NDArray[Any], context: int) -> tuple[Ids, Ids]:
    """Return the ids of some images, and of each its neighbours: (images,) and (images, 2 * context), 0 where there is none.

    Args:
        images: A structured array with the fields id, line, at (mm, or frames), number, frame, tie; whole lines of them, in any order.
    """
    images = images[np.isfinite(images["at"])]  # a damaged header
    if not len(images):
        return np.empty(0, np.int64), np.empty((0, 2 * context), np.int64)
    line, at = images["line"].astype(np.int64), images["at"].astype(np.float64)
    order = np.lexsort((at, line))
    line, at = line[order], at[order]
    first = np.concatenate([[True], line[1:] != line[:-1]])  # of its line
    step = np.where(first, np.inf, np.diff(at, prepend=at[:1]))
    fresh = first | (step > SAME_MM)  # of its place
    numbered = np.cumsum(first) - 1  # the line, from 0
    ends = first | (fresh & (step > WIDEST * _usual(numbered, step, fresh & ~first)[numbered]))
    place, stretch = np.cumsum(fresh) - 1, np.cumsum(ends)[fresh]  # of each image; of each place
    within = images[order]
    turned = np.lexsort((within["tie"], within["frame"], within["number"], place))
    ids = within["id"][turned].astype(np.int64)
    # As `place` ascends, sorting by it first moves no image to another place's part.
    starts = np.flatnonzero(fresh)
    many = np.diff(starts, append=len(ids))
    turn = np.arange(len(ids)) - starts[place]
    around = np.zeros((len(ids), 2 * context), np.int64)
    for column, away in enumerate([step for step in range(-context, context + 1) if step]):
        there = place + away
        inside = (there >= 0) & (there < len(starts))
        there = np.where(inside, there, place)
        inside &= stretch[there] == stretch[place]
        around[:, column] = np.where(inside, ids[starts[there] + np.minimum(turn, many[there] - 1)], 0)
    return ids, around


def _usual(numbered: Ids, step: NDArray[np.float64], between: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the median distance of neighbouring places of each line, of two the smaller; NaN of a line with one place."""
    of, steps = numbered[between], step[between]
    order = np.lexsort((steps, of))
    of, steps = of[order], steps[order]
    count = np.bincount(of, minlength=int(numbered[-1]) + 1)
    begin = np.cumsum(count) - count
    found = np.full(len(count), np.nan)
    some = np.flatnonzero(count)
    found[some] = steps[begin[some] + (count[some] - 1) // 2]
    return found
