"""One image of the catalog with what was drawn on it, as a picture."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from psycopg.rows import dict_row

from catalog import cache, dicom, geometry, raster, remote
from catalog.contours import Convention, FloatArray, unboxed, unflatten
from catalog.database import Database
from catalog.errors import CatalogError, FileError
from catalog.layouts import Entry
from catalog.overlay import Drawn, overlay

IMAGE = """
SELECT v.*, i.slope, i.intercept, i.modality_lut, i.image_position, i.image_orientation, ro.url, f.path AS below, f.size, f.mtime_ns,
       f.format, l.byte_offset, l.byte_length, l.dtype, l.bits_stored, l.coding
FROM image_all v JOIN image i ON i.id = v.sample_id LEFT JOIN location l ON l.image_id = i.id AND l.preferred
LEFT JOIN file f ON f.id = l.file_id LEFT JOIN root ro ON ro.id = f.root_id WHERE v.sample_id = %s
"""
# What stands on it now, proposed pairings too: they are to be looked at.
DRAWN = """
SELECT v.structure, v.reader, v.version, v.kind, v.label, v.pairing_state, v.area_px, v.area_mm2, v.open_flags, a.points, a.rings,
       a.convention, a.shift_x, a.shift_y, m.rows, m.columns, m.box_row, m.box_column, m.box_rows, m.box_columns, m.bits
FROM annotation_all v JOIN annotation a ON a.id = v.annotation_id LEFT JOIN mask m ON m.pairing_id = v.pairing_id
WHERE v.sample_id = %s AND v.current AND v.pairing_state <> 'rejected' ORDER BY v.structure, v.reader
"""


def picture(database: Database, sample_id: int) -> bytes:
    """Return a PNG of an image with its contours and masks; spacing, position, labels and ids in the caption.

    Raises:
        CatalogError: If there is no such image, or its pixels cannot be read.
    """
    with database.connect(row_factory=dict_row) as conn:
        image: Any = conn.execute(IMAGE, [sample_id]).fetchone()
        drawn: list[Any] = conn.execute(DRAWN, [sample_id]).fetchall()
    if image is None:
        raise CatalogError(f"sample {sample_id}: is not in the catalog; the view image_all lists what is")
    if image["path"] is None:
        raise CatalogError(f"sample {sample_id}: no file that holds it is present; see `catalog errors`")
    try:
        pixels = _pixels(image)
    except FileError as error:
        raise CatalogError(f"{image['path']}: {error}; it cannot be shown") from error
    except OSError as error:
        raise CatalogError(f"{image['path']}: {error.strerror}; it cannot be shown") from error
    if pixels.ndim != 2:
        raise CatalogError(f"{image['path']}: is a colour image; only grey images can be shown so far")
    spacing = None if image["row_spacing"] is None else (image["row_spacing"], image["column_spacing"])
    caption = _caption(image) + [f"{row['structure']}: {row['label']} ({row['reader']})" for row in drawn if row["kind"] == "label"]
    return overlay(pixels, [_drawn(row, image) for row in drawn if row["kind"] != "label"], spacing_mm=spacing, caption=caption)


def _pixels(image: Any) -> npt.NDArray[Any]:
    """Return the image's values after the modality transform, or of a colour image what is stored."""
    if image["dtype"] is not None and image["format"] not in ("dicom", "raster"):
        return _modality(_by_offset(image), image)
    with contextlib.ExitStack() as stack:
        entry = Entry(image["below"], image["size"], image["mtime_ns"])
        path = stack.enter_context(remote.local(image["url"], entry)) if remote.is_url(image["url"]) else Path(image["path"])
        if image["modality_lut"]:
            return dicom.decode_values(path, image["frame"])
        return _modality((raster if image["format"] == "raster" else dicom).decode_frame(path, image["frame"]), image)


def _modality(stored: npt.NDArray[Any], image: Any) -> npt.NDArray[Any]:
    return stored if stored.ndim != 2 else stored.astype(np.float64) * image["slope"] + image["intercept"]


def _by_offset(image: Any) -> npt.NDArray[Any]:
    """Return stored values of a volume or a file of digits, which no decoder knows, from where the catalog says they lie."""
    place = (image["size"], image["mtime_ns"])
    if remote.is_url(image["url"]):
        fd = remote.fetched(image["url"], image["below"], *place, image["coding"])
    elif image["coding"]:
        fd = cache.decompressed(Path(image["path"]), image["coding"], *place)
    else:
        fd = os.open(image["path"], os.O_RDONLY | os.O_CLOEXEC)
    try:
        status = os.fstat(fd)
        if not (image["coding"] or remote.is_url(image["url"])) and (status.st_size, status.st_mtime_ns) != place:
            raise FileError("changed", "the file is not what was catalogued; run `catalog ingest` on its root again")
        values = np.frombuffer(os.pread(fd, image["byte_length"], image["byte_offset"]), image["dtype"])
    except ValueError:
        raise FileError("truncated", "there are fewer pixels than were catalogued; run `catalog ingest` on its root again") from None
    finally:
        os.close(fd)
    if values.size != image["rows"] * image["columns"]:
        raise FileError("truncated", "there are fewer pixels than were catalogued; run `catalog ingest` on its root again")
    return values.reshape(image["rows"], image["columns"])


def _drawn(row: Any, image: Any) -> Drawn:
    mask = None
    if row["bits"] is not None:
        box = (row["box_row"], row["box_column"], row["box_rows"], row["box_columns"])
        mask = unboxed(row["rows"], row["columns"], box, row["bits"])
    label = f"{row['structure']}, {row['reader']}, version {row['version']}"
    if row["area_px"] is not None:
        label += f", {row['area_px']} px" + (f", {row['area_mm2']:.0f} mm²" if row["area_mm2"] is not None else "")
    if row["pairing_state"] == "proposed":
        label += ", only proposed"
    if row["open_flags"]:
        label += f", {row['open_flags']} open flags"
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


def _caption(image: Any) -> list[str]:
    def known(text: str, value: object, unit: str = "") -> list[str]:
        return [] if value is None else [f"{text} {value:.6g}{unit}" if isinstance(value, float) else f"{text} {value}{unit}".lstrip()]

    spacing = None if image["row_spacing"] is None else f"{image['row_spacing']:.6g} × {image['column_spacing']:.6g}"
    where = [
        *known("instance number", image["instance_number"]),
        *known("position", image["position"], " mm"),
        *known("phase", image["phase"]),
        *known("trigger time", image["trigger_time"], " ms"),
        *known("frame", image["frame"] or None),
    ]
    return [
        ", ".join([f"sample {image['sample_id']}, patient {image['patient']}", *known("", image["modality"] or None), *where]),
        f"{image['rows']} × {image['columns']} px" + "".join(known(", pixel spacing", spacing, " mm")),
        f"SOP Instance UID {image['sop_instance_uid'] or '(missing)'}",
    ]
