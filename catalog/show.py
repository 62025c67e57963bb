"""One image of the catalog with what was drawn on it, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from psycopg.rows import dict_row

from catalog import dicom
from catalog.contours import unboxed, unflatten
from catalog.database import Database
from catalog.errors import CatalogError, FileError
from catalog.overlay import Drawn, overlay

IMAGE = """
SELECT v.*, i.slope, i.intercept FROM image_all v JOIN image i ON i.id = v.sample_id WHERE v.sample_id = %s
"""
# What stands on it now, proposed pairings too: they are to be looked at.
DRAWN = """
SELECT v.structure, v.reader, v.version, v.pairing_state, v.area_px, v.area_mm2, v.open_flags, a.points, a.rings, a.convention, a.shift_x,
       a.shift_y, m.rows, m.columns, m.box_row, m.box_column, m.box_rows, m.box_columns, m.bits
FROM annotation_all v JOIN annotation a ON a.id = v.annotation_id LEFT JOIN mask m ON m.pairing_id = v.pairing_id
WHERE v.sample_id = %s AND v.current AND v.pairing_state <> 'rejected' AND v.kind = 'polygon' ORDER BY v.structure, v.reader
"""


def picture(database: Database, sample_id: int) -> bytes:
    """Return a PNG of an image with its contours and masks; spacing, position and ids in the caption.

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
        stored = dicom.decode_frame(Path(image["path"]), image["frame"])
    except FileError as error:
        raise CatalogError(f"{image['path']}: {error}; it cannot be shown") from error
    if stored.ndim != 2:
        raise CatalogError(f"{image['path']}: is a colour image; only grey images can be shown so far")
    pixels = stored.astype(np.float64) * image["slope"] + image["intercept"]
    spacing = None if image["row_spacing"] is None else (image["row_spacing"], image["column_spacing"])
    return overlay(pixels, [_drawn(row) for row in drawn], spacing_mm=spacing, caption=_caption(image))


def _drawn(row: Any) -> Drawn:
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
    rings = unflatten(row["points"], row["rings"])
    return Drawn(row["structure"], rings, row["convention"], (row["shift_x"], row["shift_y"]), mask, label)


def _caption(image: Any) -> list[str]:
    def known(text: str, value: object, unit: str = "") -> list[str]:
        return [] if value is None else [f"{text} {value:.6g}{unit}" if isinstance(value, float) else f"{text} {value}{unit}"]

    spacing = None if image["row_spacing"] is None else f"{image['row_spacing']:.6g} × {image['column_spacing']:.6g}"
    where = [
        *known("instance number", image["instance_number"]),
        *known("position", image["position"], " mm"),
        *known("phase", image["phase"]),
        *known("trigger time", image["trigger_time"], " ms"),
        *known("frame", image["frame"] or None),
    ]
    return [
        f"sample {image['sample_id']}, patient {image['patient']}, {image['modality']}, " + ", ".join(where),
        f"{image['rows']} × {image['columns']} px" + "".join(known(", pixel spacing", spacing, " mm")),
        f"SOP Instance UID {image['sop_instance_uid'] or '(missing)'}",
    ]
