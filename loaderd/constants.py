"""What a stream looks up once, when it is first asked for, and keeps: the classes of its labels, statistics over its images.

It stays with the stream whatever comes into the catalog: what a training saw as class 3, or as 0.7, is the same when it goes on.

Mean, standard deviation, least and largest value follow from what `catalog measure` found in each image. Percentiles need the pixels:
of all images, or of a stream of more than 2,000 of the 2,000 first by sample_key, which is as good as at random and the same on any host.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, LiteralString

import numpy as np
import psycopg
from numpy.typing import NDArray
from psycopg import sql
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from catalog import viewing
from catalog.errors import CatalogError, FileError
from catalog.statistics import Statistics, statistics
from loaderd import selections, transforms
from loaderd.definitions import Definition

MOST_READ = 2_000  # images whose pixels are read here, one after the other: some seconds
BINS = 1 << 20  # of the histogram that percentiles are taken from
AT_ONCE = 1 << 20  # pixels that are counted together: emptying and adding the bins takes as long as counting so many
WORST = 0.01  # of the images may be unreadable
NUMBER = re.compile(r"[+-]?[0-9]{1,18}")  # as `loaderd.work.work_query` has it: fits int64

Connection = psycopg.Connection[Any]
Query = tuple[sql.Composed, dict[str, Any]]


def of(conn: Connection, reading: Connection, stream_id: int, definition: Definition) -> dict[str, Any]:
    """Return the constants of a stream: what is stored with it, else what is found now, which is stored.

    "classes": the sorted texts of its labels, None if all of them are numbers. "statistics": what its transforms need, by key.
    The caller owns the transaction of `conn`; `reading` is the login under which a user's condition may run.

    Raises:
        CatalogError: As `statistics_of`.
    """
    if not definition.looks_up:
        return {}
    stored = _stored(conn, stream_id)
    if stored is not None:
        return stored
    query = selections.selection(definition)
    found: dict[str, Any] = {}
    if definition.labels is not None and definition.sequences is None:
        found["classes"] = classes(reading, query)
    if wanted := transforms.needs_statistics(definition.transforms):
        found["statistics"] = statistics_of(conn, reading, query, wanted)
    conn.execute("UPDATE stream SET constants = %s WHERE id = %s AND constants IS NULL", [Jsonb(found), stream_id])
    return _stored(conn, stream_id) or found  # of two ranks that come at once the first one's counts


def _stored(conn: Connection, stream_id: int) -> dict[str, Any] | None:
    row = conn.execute("SELECT constants FROM stream WHERE id = %s", [stream_id]).fetchone()
    found: dict[str, Any] | None = None if row is None else row[0]
    return found


def classes(reading: Connection, query: Query) -> list[str] | None:
    """Return the sorted label texts of a selection, None if all of them are whole numbers. A sample's label is the last annotation."""
    text: LiteralString = (
        "SELECT DISTINCT a.label FROM ({}) AS s JOIN annotation a ON a.id = s.annotation_ids[cardinality(s.annotation_ids)]"
    )
    found = sorted(label for (label,) in reading.execute(sql.SQL(text).format(query[0]), query[1]))
    return None if all(NUMBER.fullmatch(label) for label in found) else found


def statistics_of(conn: Connection, reading: Connection, query: Query, wanted: Sequence[str]) -> dict[str, float]:
    """Return statistics over all pixels of a selection's images, in modality units; what is no finite number is left out.

    Args:
        query: A selection as `selections.selection` returns it: sample_id and sample_key of each sample.
        wanted: Of "mean", "std" (of the population), "min", "max", and "p0.5", "p99", …: percentiles, which are exact to 2⁻²⁰ of the range
            from the least to the largest value, and wholly where these are at most 2²⁰ steps of one rescale slope apart.

    Raises:
        CatalogError: More than 2,000 images are not measured; over 1 % of those that are read here cannot be; there is no finite value.
    """
    text: LiteralString = (
        "SELECT s.sample_id, i.slope, i.intercept, i.modality_lut OR coalesce(l.dtype LIKE '_f%%', false), "
        "i.rows::bigint * i.columns * i.samples_per_pixel - m.nans, m.minimum, m.maximum, m.mean, m.deviation "
        "FROM ({}) AS s JOIN image i ON i.id = s.sample_id LEFT JOIN measure m ON m.image_id = i.id "
        "LEFT JOIN location l ON l.image_id = i.id AND l.preferred ORDER BY s.sample_key"
    )
    rows = reading.execute(sql.SQL(text).format(query[0]), query[1], binary=True).fetchall()
    unknown = [row[0] for row in rows if row[4] is None]
    if len(unknown) > MOST_READ:
        raise CatalogError(
            f"statistics of the stream: {len(unknown):,} of its {len(rows):,} images are not measured; run `catalog measure` first"
        )
    measured: list[Sequence[Any]] = [row[4:] for row in rows if row[4] is not None]
    for values in _pixels(conn, unknown):
        one = statistics(values)
        measured.append((values.size - one.nans, *one[:4]))
    whole = combined(measured)
    found = {"mean": whole.mean, "std": whole.deviation, "min": whole.minimum, "max": whole.maximum}
    percents = {key: float(key[1:]) for key in wanted if key not in found}
    if percents:
        images = [row[0] for row in rows[:MOST_READ]]
        scales = {row[1:4] for row in rows}
        [(slope, _, floats)] = scales if len(scales) == 1 else [(0.0, 0.0, True)]
        step = None if floats or slope == 0 else abs(slope)
        found |= dict(zip(percents, percentiles(_pixels(conn, images), list(percents.values()), whole, step), strict=True))
    return {key: found[key] for key in wanted}


def combined(measured: Iterable[Sequence[Any]]) -> Statistics:
    """Return the statistics of several images together; of each: number of finite values, minimum, maximum, mean, deviation.

    Raises:
        CatalogError: There is no finite value.
    """
    rows = [row for row in measured if row[0] > 0]
    if not rows:
        raise CatalogError("statistics of the stream: its images hold no finite number, or there are none; leave out what needs statistics")
    counts, lows, highs, means, deviations = np.array(rows, np.float64).T
    total = math.fsum(counts)
    mean = math.fsum(counts * means) / total
    # Squares around the common mean: those of the values themselves would lose all digits where the mean is large.
    variance = math.fsum(counts * (deviations**2 + (means - mean) ** 2)) / total
    return Statistics(float(lows.min()), float(highs.max()), mean, math.sqrt(variance), 0.0, 0.0, 0)


def percentiles(images: Iterable[NDArray[np.float64]], percents: Sequence[float], whole: Statistics, step: float | None) -> list[float]:
    """Return percentiles, from 0 to 100, over all finite values of some images, interpolated as numpy does.

    Args:
        whole: Their least and largest value.
        step: What values are whole multiples of, from the least one; None if nobody knows.

    Raises:
        CatalogError: There is no finite value.
    """
    low, extent = whole.minimum, whole.maximum - whole.minimum
    if extent == 0:
        return [low] * len(percents)
    width = extent / (BINS - 1) if step is None or extent / step > BINS - 1 else step
    bins = np.zeros(BINS, np.int64)
    waiting: list[NDArray[np.float64]] = []

    def count() -> None:
        nonlocal bins
        values = np.concatenate(waiting)
        bins += np.bincount(np.clip(np.rint((values[np.isfinite(values)] - low) / width), 0, BINS - 1).astype(np.intp), minlength=BINS)
        waiting.clear()

    for values in images:
        waiting.append(values.reshape(-1))
        if sum(one.size for one in waiting) >= AT_ONCE:
            count()
    if waiting:
        count()
    below = np.cumsum(bins)
    if not below[-1]:
        raise CatalogError("statistics of the stream: of the images that percentiles are taken from none holds a finite number")
    found = []
    for percent in percents:
        rank = percent / 100 * float(below[-1] - 1)
        first, last = (float(np.searchsorted(below, end, side="right")) for end in (math.floor(rank), math.ceil(rank)))
        found.append(low + (first + (rank - math.floor(rank)) * (last - first)) * width)
    return found


def _pixels(conn: Connection, images: Sequence[int]) -> Iterable[NDArray[np.float64]]:
    """Yield the values of images that can be read, as they are fed, float64 (rows, columns); raise if too many cannot."""
    if not images:
        return
    with conn.cursor(row_factory=dict_row) as cursor:
        known: Mapping[int, viewing.Image] = {row["sample_id"]: row for row in cursor.execute(viewing.IMAGES, [list(images)])}
    unreadable = 0
    for number in images:
        image = known.get(number)
        try:
            if image is None or viewing.unreadable(image) is not None:
                raise FileError("missing", "no file that holds it is present")
            values = viewing.pixels(image)
            if values.ndim != 2:
                raise FileError("colour", "a colour image, and only grey ones are fed; leave it out of the stream")
        except Exception as error:  # a decoder's own bug, too: that file comes as unreadable when it is fed
            unreadable += 1
            if unreadable > max(1, WORST * len(images)):
                why = str(error) if isinstance(error, FileError) else f"{type(error).__name__} while it was read"
                raise CatalogError(
                    f"statistics of the stream: {unreadable} of {len(images)} images cannot be read, of sample {number}: {why}; "
                    "see `catalog errors`"
                ) from error
            continue
        yield values
