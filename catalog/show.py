"""One image of the catalog with what was drawn on it, its open flags and its neighbours, as a picture."""

from __future__ import annotations

from catalog import viewing
from catalog.database import Database
from catalog.errors import CatalogError, FileError, UsageError
from catalog.overlay import Beside, overlay
from catalog.viewing import Image, View


def picture(database: Database, sample_id: int, *, identify: bool = False) -> bytes:
    """Return a PNG of an image with its contours and masks, open flags and neighbours; geometry and what is not sure in the caption.

    Args:
        identify: Say patient, readers and SOP Instance UID, too.

    Raises:
        UsageError: If there is no such image.
        CatalogError: If its pixels cannot be read.
    """
    with database.connect() as conn:
        found = viewing.views(conn, [sample_id])
        inside = viewing.relations(conn)
    if not found:
        raise UsageError(f"sample {sample_id}: is not in the catalog; the view image_all lists what is")
    return drawn(found[0], inside, identify=identify)


def drawn(view: View, inside: dict[str, set[str]], *, identify: bool = False) -> bytes:
    """Return the picture of one sample. Neighbours that cannot be read are left out, and the caption says so.

    Raises:
        CatalogError: If its pixels cannot be read.
    """
    image = view.image
    if why := viewing.unreadable(image):
        raise CatalogError(f"sample {image['sample_id']}: {why}")
    try:
        pixels = viewing.pixels(image)
    except FileError as error:
        raise CatalogError(f"sample {image['sample_id']}: {error}; it cannot be shown") from error
    except OSError as error:
        raise CatalogError(f"sample {image['sample_id']}: {error.strerror} while its file was read; it cannot be shown") from error
    beside, gaps = [], []
    for title, other in view.beside:
        try:
            if why := viewing.unreadable(other.image):
                raise FileError("missing", why)
            beside.append(Beside(title, viewing.pixels(other.image), list(other.drawn().values())))
        except (FileError, OSError):
            gaps.append(f"{title}: cannot be read")
    here = view.drawn()
    return overlay(
        pixels,
        list(here.values()),
        spacing_mm=view.spacing,
        caption=[*caption(image, identify=identify), *view.labels(), *_readers(view, identify), *gaps],
        marks=view.marks(here, inside),
        findings=view.findings(here) or [("info", "no open flags")],
        beside=beside,
        inverted=image["photometric"] == "MONOCHROME1",
    )


def caption(image: Image, *, identify: bool) -> list[str]:
    """Return what is known of an image in lines: where and when it was taken, its grid; with `identify` of whom."""

    def known(text: str, value: object, unit: str = "") -> list[str]:
        return [] if value is None else [f"{text} {value:.6g}{unit}" if isinstance(value, float) else f"{text} {value}{unit}".lstrip()]

    spacing = None if image["row_spacing"] is None else f"{image['row_spacing']:.6g} × {image['column_spacing']:.6g}"
    where = [
        *known("", image["modality"] or None),
        *known("position", image["position"], " mm"),
        *known("phase", image["phase"]),
        *known("trigger time", image["trigger_time"], " ms"),
        *known("frame", image["frame"] or None),
    ]
    notes = {"MONOCHROME1": ", small values bright", "PALETTE COLOR": ", indices of a palette, shown as grey"}
    lines = [
        ", ".join([f"sample {image['sample_id']}, series {image['series']}", *where]),
        f"{image['rows']} × {image['columns']} px{''.join(known(', pixel spacing', spacing, ' mm'))}{notes.get(image['photometric'], '')}",
    ]
    if identify:
        lines.append(", ".join([f"patient {image['patient']}", *known("instance number", image["instance_number"])]))
        lines.append(f"SOP Instance UID {image['sop_instance_uid'] or '(missing)'}")
    return lines


def _readers(view: View, identify: bool) -> list[str]:
    return [f"{row['structure']}, version {row['version']}: drawn by {row['reader']}" for row in view.rows] if identify else []
