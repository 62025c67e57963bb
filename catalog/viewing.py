"""What pictures of samples are made from: rows, pixels, what was drawn, open flags, neighbours. The database is asked once for all.

A sample is an image; neighbours are the images of the same phase at the positions before and after it, and those of the phases before
and after it at the same position: by geometry and trigger time, never by file or instance number. Where an image does not say where it
lies, they are the frames before and after it in its object.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import psycopg
from psycopg.rows import dict_row

from catalog import geometry, terms
from catalog.contours import Convention, FloatArray, unboxed, unflatten
from catalog.errors import FileError
from catalog.layouts import Entry
from catalog.marks import Drawn, Mark, mark

Image = dict[str, Any]  # a row of IMAGES
Array = npt.NDArray[Any]

IMAGES = """
SELECT i.id AS sample_id, i.frame, n.instance_number, n.sop_instance_uid, se.id AS series, se.modality, pt.patient_id AS patient, i.rows,
       i.columns, i.samples_per_pixel, i.photometric, i.row_spacing, i.column_spacing, i.position, i.phase, i.trigger_time, i.slope,
       i.intercept, i.modality_lut, i.image_position, i.image_orientation, f.id AS file,
       pl.url, pl.path AS below, f.size, f.mtime_ns, f.format,
       l.byte_offset, l.byte_length, l.dtype, l.bits_stored, l.coding, EXISTS (SELECT FROM pseudonymization) AS pseudonymized
FROM image i JOIN instance n ON n.id = i.instance_id JOIN series se ON se.id = n.series_id JOIN study st ON st.id = se.study_id
JOIN patient pt ON pt.id = st.patient_id LEFT JOIN location l ON l.image_id = i.id AND l.preferred
LEFT JOIN file f ON f.id = l.file_id LEFT JOIN place pl ON pl.file_id = f.id WHERE i.id = ANY(%s)
"""
# What stands on them now, proposed pairings too: they are to be looked at.
DRAWN = """
SELECT p.image_id AS sample_id, p.id AS pairing, a.id AS annotation, s.name AS structure, r.name AS reader, a.version, a.kind,
       a.origin, a.label, p.state, m.area_px, m.area_px * i.row_spacing * i.column_spacing AS area_mm2,
       a.points, a.rings, a.convention, a.shift_x, a.shift_y, m.rows, m.columns, m.box_row, m.box_column, m.box_rows, m.box_columns, m.bits
FROM pairing p JOIN image i ON i.id = p.image_id JOIN annotation a ON a.id = p.annotation_id AND a.current
JOIN structure s ON s.id = a.structure_id JOIN reader r ON r.id = a.reader_id LEFT JOIN mask m ON m.pairing_id = p.id
WHERE p.image_id = ANY(%s) AND p.state <> 'rejected' ORDER BY p.image_id, s.name, r.name, a.id
"""
# Of what a sample is made and what it belongs to. Open flags are few: each is asked for the images that it is about.
FLAGGED = """
SELECT g.image_id AS sample_id, g.id, 'image' AS subject, NULL::bigint AS pairing
FROM flag g WHERE g.state = 'open' AND g.image_id IS NOT NULL
UNION ALL SELECT l.image_id, g.id, 'file', NULL FROM flag g JOIN location l ON l.file_id = g.file_id WHERE g.state = 'open'
UNION ALL SELECT p.image_id, g.id, 'file', p.id FROM flag g JOIN annotation a ON a.file_id = g.file_id AND a.current
          JOIN pairing p ON p.annotation_id = a.id AND p.state <> 'rejected' WHERE g.state = 'open'
UNION ALL SELECT p.image_id, g.id, 'annotation', p.id FROM flag g JOIN annotation a ON a.id = g.annotation_id AND a.current
          JOIN pairing p ON p.annotation_id = a.id AND p.state <> 'rejected' WHERE g.state = 'open'
UNION ALL SELECT p.image_id, g.id, 'pairing', p.id FROM flag g JOIN pairing p ON p.id = g.pairing_id AND p.state <> 'rejected'
          JOIN annotation a ON a.id = p.annotation_id AND a.current WHERE g.state = 'open'
UNION ALL SELECT i.id, g.id, 'series', NULL FROM flag g JOIN instance n ON n.series_id = g.series_id JOIN image i ON i.instance_id = n.id
          WHERE g.state = 'open'
UNION ALL SELECT i.id, g.id, 'study', NULL FROM flag g JOIN series se ON se.study_id = g.study_id JOIN instance n ON n.series_id = se.id
          JOIN image i ON i.instance_id = n.id WHERE g.state = 'open'
UNION ALL SELECT i.id, g.id, 'patient', NULL FROM flag g JOIN study st ON st.patient_id = g.patient_id JOIN series se ON se.study_id = st.id
          JOIN instance n ON n.series_id = se.id JOIN image i ON i.instance_id = n.id WHERE g.state = 'open'
"""
FLAGS = f"""
SELECT f.sample_id, g.id, g.rule, g.severity, g.detail, f.subject, f.pairing
FROM ({FLAGGED}) f JOIN flag g ON g.id = f.id WHERE f.sample_id = ANY(%s)
ORDER BY f.sample_id, array_position(ARRAY['error', 'warning', 'info'], g.severity),
         f.subject IN ('series', 'study', 'patient'), g.rule, g.id
"""  # noqa: S608  our own text
# Directions are rounded: scanners write the same ones with different last digits.
NEIGHBOURS = """
WITH asked AS (SELECT i.id, i.instance_id, n.series_id FROM image i JOIN instance n ON n.id = i.instance_id WHERE i.id = ANY(%(ids)s)),
around AS (
    SELECT i.id, i.instance_id, n.series_id, i.frame, i.position, i.phase, i.rows, i.columns,
           (SELECT array_agg(round(axis::numeric, 2) ORDER BY at) FROM unnest(i.image_orientation) WITH ORDINALITY AS o (axis, at)) AS axes
    FROM image i JOIN instance n ON n.id = i.instance_id
    WHERE n.series_id IN (SELECT series_id FROM asked)
), placed AS (
    SELECT id, position, phase, lag(id) OVER slices AS slice_before, lead(id) OVER slices AS slice_after,
           lag(position) OVER slices - position AS mm_before, lead(position) OVER slices - position AS mm_after,
           lag(id) OVER phases AS phase_before, lead(id) OVER phases AS phase_after
    FROM around WHERE position IS NOT NULL
    WINDOW slices AS (PARTITION BY series_id, axes, rows, columns, phase ORDER BY position, id),
           phases AS (PARTITION BY series_id, axes, rows, columns, position ORDER BY phase, id)
), framed AS (
    SELECT id, lag(id) OVER frames AS frame_before, lead(id) OVER frames AS frame_after
    FROM around WHERE position IS NULL WINDOW frames AS (PARTITION BY instance_id, rows, columns ORDER BY frame)
)
SELECT a.id, p.slice_before, p.mm_before, p.slice_after, p.mm_after, p.phase_before, p.phase_after, f.frame_before, f.frame_after
FROM asked a LEFT JOIN placed p ON p.id = a.id LEFT JOIN framed f ON f.id = a.id
"""


class Flag(NamedTuple):
    """An open flag on something of a sample."""

    id: int
    rule: str
    severity: str
    detail: str
    subject: str  # image, file, annotation, pairing, series, study or patient
    pairing: int | None  # whose annotation it speaks of


@dataclass
class View:
    """What a picture of one sample needs; a neighbour has neither flags nor neighbours."""

    image: Image
    rows: list[dict[str, Any]] = field(default_factory=list)  # of DRAWN
    flags: list[Flag] = field(default_factory=list)
    beside: list[tuple[str, View]] = field(default_factory=list)

    @property
    def spacing(self) -> tuple[float, float] | None:
        """Between rows and between columns in mm; None where nobody knows, or what the file says can be none."""
        row, column = self.image["row_spacing"], self.image["column_spacing"]
        return (row, column) if row is not None and column is not None and 0 < row < np.inf and 0 < column < np.inf else None

    def drawn(self) -> dict[int, Drawn]:
        """Return contours and masks by pairing; class labels are in `labels`."""
        return {row["pairing"]: _drawn(row, self.image) for row in self.rows if row["kind"] != "label"}

    def labels(self) -> list[str]:
        """Return the classes that readers gave the whole image."""
        return [f"{row['structure']}: {row['label']}" for row in self.rows if row["kind"] == "label"]

    def marks(self, drawn: Mapping[int, Drawn], inside: Mapping[str, set[str]]) -> list[Mark]:
        """Return where causes of flags on what was drawn are. `inside`: a structure → those that it lies inside of."""
        shape = (self.image["rows"], self.image["columns"])
        found = []
        for flag in self.flags:
            one = drawn.get(flag.pairing or 0)
            if one is not None and flag.severity != "info":  # infos are many, and nothing is wrong
                around = [other for other in drawn.values() if other.structure in inside.get(one.structure, ())]
                found.append(mark(flag.rule, one, around, shape))
        return found

    def findings(self, drawn: Mapping[int, Drawn]) -> list[tuple[str, str]]:
        """Return severity and text of each open flag."""
        return [(flag.severity, f"{flag.rule} on {self.named(flag, drawn)}: {flag.detail}") for flag in self.flags]

    def named(self, flag: Flag, drawn: Mapping[int, Drawn]) -> str:
        """Return what a flag is on, in words."""
        one = drawn.get(flag.pairing or 0)
        if one is not None:
            return one.structure if flag.subject == "annotation" else f"{one.structure} ({flag.subject})"
        return f"the {flag.subject}"


def views(conn: psycopg.Connection[Any], ids: Sequence[int], *, neighbours: bool = True) -> list[View]:
    """Return what pictures of these samples need, in their order. What is not in the catalog is left out."""
    asked = list(ids)
    with conn.cursor(row_factory=dict_row) as cursor:
        beside: dict[int, list[tuple[str, int]]] = {}
        if neighbours:
            for row in cursor.execute(NEIGHBOURS, {"ids": asked}).fetchall():
                beside[row["id"]] = _beside(row)
        everything = list({*asked, *(at for found in beside.values() for _, at in found)})
        known = {row["sample_id"]: View(row) for row in cursor.execute(IMAGES, [everything])}
        for row in cursor.execute(DRAWN, [everything]):
            known[row["sample_id"]].rows.append(row)
        for row in cursor.execute(FLAGS, [asked]):
            flag = Flag(*(row[name] for name in Flag._fields))
            # A contour file of which several images have contours is one flag on each.
            if all((flag.id, flag.pairing) != (other.id, other.pairing) for other in known[row["sample_id"]].flags):
                known[row["sample_id"]].flags.append(flag)
    for number in asked:
        if number in known:
            known[number].beside = [(_titled(what, known[at].image), known[at]) for what, at in beside.get(number, ()) if at in known]
    return [known[number] for number in asked if number in known]


def relations(conn: psycopg.Connection[Any]) -> dict[str, set[str]]:
    """Return which structures each structure lies inside of."""
    found: dict[str, set[str]] = {}
    for inside, outside in conn.execute("SELECT inside, outside FROM relation"):
        found.setdefault(inside, set()).add(outside)
    return found


def pixels(image: Image) -> Array:
    """Return an image's values after the modality transform, float64 (rows, columns), or RGB uint8 (rows, columns, 3).

    Read by offset where that can be done; indices of a palette are taken for grey.

    Raises:
        FileError: If the file is not what was catalogued, or cannot be decoded.
        OSError: If it cannot be read.
    """
    try:
        return _pixels(image)
    except FileError as error:
        if not image["pseudonymized"]:
            raise
        # Decoders may quote what they read.
        raise FileError(error.code, terms.REASONS.get(error.code, terms.REASON)) from None


def _pixels(image: Image) -> Array:
    if image["dtype"] is not None:
        return _values(_by_offset(image), image)
    from catalog import dicom, raster, remote

    with contextlib.ExitStack() as stack:
        entry = Entry(image["below"], image["size"], image["mtime_ns"])
        path = stack.enter_context(remote.local(image["url"], entry)) if remote.is_url(image["url"]) else Path(image["url"], image["below"])
        if image["modality_lut"]:
            return dicom.decode_values(path, image["frame"])
        return _values((raster if image["format"] == "raster" else dicom).decode_frame(path, image["frame"]), image)


def unreadable(image: Image) -> str | None:
    """Return why an image cannot be shown, where the catalog knows."""
    if image["url"] is None and image["file"] is not None:
        return "this catalog is pseudonymized, and you may not know where its files lie"
    return "no file that holds it is present; see `catalog errors`" if image["url"] is None else None


def where(image: Image) -> list[str]:
    """Return where and when an image was taken, in parts, without anything that says of whom."""
    found = [f"series {image['series']}", image["modality"]]
    found += [] if image["position"] is None else [f"slice {image['position']:.1f} mm"]
    found += [] if image["phase"] is None else [f"phase {image['phase']}"]
    found += [f"frame {image['frame']}"] if image["frame"] else []
    return [text for text in found if text]


def _values(stored: Array, image: Image) -> Array:
    if stored.ndim == 2:
        values: Array = stored.astype(np.float64) * image["slope"] + image["intercept"]
        return values
    if stored.dtype == np.uint8:
        return stored
    most = float(np.iinfo(stored.dtype).max) if stored.dtype.kind in "iu" else float(np.nanmax(stored, initial=0.0)) or 1.0
    return np.clip(np.nan_to_num(stored.astype(np.float64)) / most * 255.0, 0, 255).astype(np.uint8)


def _by_offset(image: Image) -> Array:
    from catalog import cache, remote

    place = (image["size"], image["mtime_ns"])
    if remote.is_url(image["url"]):
        fd = remote.fetched(image["url"], image["below"], *place, image["coding"])
    elif image["coding"]:
        fd = cache.decompressed(Path(image["url"], image["below"]), image["coding"], *place)
    else:
        fd = os.open(f"{image['url']}/{image['below']}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        status = os.fstat(fd)
        if not (image["coding"] or remote.is_url(image["url"])) and (status.st_size, status.st_mtime_ns) != place:
            raise FileError("changed", "the file is not what was catalogued; run `catalog ingest` on its root again")
        stored = bytearray(os.pread(fd, image["byte_length"], image["byte_offset"]))
    finally:
        os.close(fd)
    count = image["rows"] * image["columns"] * image["samples_per_pixel"]
    if len(stored) != count * np.dtype(image["dtype"]).itemsize:
        raise FileError("truncated", "there are fewer pixels than were catalogued; run `catalog ingest` on its root again")
    values: Array = np.frombuffer(stored, image["dtype"])
    if image["bits_stored"] is not None:  # PS3.5 8.1.1: what lies above is no part of the value
        values <<= 8 * values.itemsize - image["bits_stored"]
        values >>= 8 * values.itemsize - image["bits_stored"]
    shape = (image["rows"], image["columns"])
    return values.reshape(shape if image["samples_per_pixel"] == 1 else (*shape, image["samples_per_pixel"]))


def _drawn(row: dict[str, Any], image: Image) -> Drawn:
    mask = None
    if row["bits"] is not None:
        box = (row["box_row"], row["box_column"], row["box_rows"], row["box_columns"])
        mask = unboxed(row["rows"], row["columns"], box, row["bits"])
        if mask.shape != (image["rows"], image["columns"]):
            mask = None
    label = f"{row['structure']}, version {row['version']}"
    if row["area_px"] is not None:
        label += f", {row['area_px']} px" + (f", {row['area_mm2']:.0f} mm²" if row["area_mm2"] is not None else "")
    if row["origin"] in ("interpolated", "proposed"):
        label += f", {row['origin']}: nobody drew it"
    if row["state"] == "proposed":
        label += ", only proposed"
    rings: list[FloatArray] = []
    convention: Convention = "centre"
    if row["kind"] == "polygon":
        rings = unflatten(row["points"], row["rings"], 3 if row["convention"] == "patient" else 2)
        if row["convention"] != "patient":
            convention = row["convention"]
        elif mask is None:  # its image does not say where it lies, so nor can this
            rings, label = [], label + ", not on this image's grid"
        else:
            place = (image["image_position"], image["image_orientation"], (image["row_spacing"], image["column_spacing"]))
            rings = [geometry.to_pixels(ring, *place)[0] for ring in rings]
    elif mask is None:
        label += ", not on this image's grid"
    return Drawn(row["structure"], rings, convention, (row["shift_x"], row["shift_y"]), mask, label)


def _beside(row: dict[str, Any]) -> list[tuple[str, int]]:
    found = []
    for name in ("slice_before", "slice_after", "phase_before", "phase_after", "frame_before", "frame_after"):
        if row[name] is not None:
            what, _, side = name.partition("_")
            found.append((f"slice {row['mm_' + side]:+.3g} mm" if what == "slice" else what, row[name]))
    return found


def _titled(what: str, image: Image) -> str:
    return f"{what} {image[what]}" if what in ("phase", "frame") else what
