"""A synthetic archive of cine MR as rows: hearts with 10,000 inner and outer contours, and small series beside them, to plant defects in.

Everything that a rule can ask about is there as an ingest would have written it: masks come from `catalog.contours`, shapes from
`catalog.shapes`. A `Place` names one image with what hangs on it, so that a planting says where it was, whatever subject a rule flags.
What is planted is written as changes to those rows, as what happened to the files would have made them.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import psycopg

from catalog import contours, shapes

Points = npt.NDArray[np.float64]

SIZE = 192  # px, rows and columns
SPACING = 1.5  # mm
DISTANCE = 8.0  # mm between slices
HEARTS, SLICES, PHASES = 100, 10, 5  # 100 × 10 × 5 images with an inner and an outer contour each: 10,000 annotations
CYCLE_MS = 800.0
UID = "1.2.826.0.1.3680043.8.498"

COLUMNS = {
    "patient": "id, patient_id",
    "study": "id, patient_id, study_instance_uid, study_date",
    "series": "id, study_id, series_instance_uid, series_number, modality",
    "instance": "id, series_id, sop_instance_uid, sop_class_uid, instance_number, number_of_frames, images_in_acquisition, content_hash, "
    "burned_in_annotation, identity_removed, over_89",
    "file": "id, root_id, path, kind, format, size, mtime_ns, ingest_run_id",
    "image": 'id, instance_id, frame, rows, "columns", photometric, row_spacing, column_spacing, image_position, image_orientation, '
    "position, slice_thickness, trigger_time, phase, pixel_hash, sample_key",
    "location": "image_id, file_id, byte_offset, byte_length, dtype, transfer_syntax_uid, preferred",
    "measure": "image_id, minimum, maximum, mean, deviation, entropy, saturated, nans, near_hash",
    "annotation": "id, file_id, reader_id, structure_id, kind, origin, points, rings, convention, polygon_area_px, content_hash, "
    "ingest_run_id",
    "pairing": "id, annotation_id, image_id, method, rule, score, state, actor",
    "mask": 'pairing_id, rows, "columns", box_row, box_column, box_rows, box_columns, bits',
    "shape": ", ".join(("pairing_id", *shapes.COLUMNS)),
    "edge_fit": "pairing_id, scores",
}


@dataclass(slots=True)
class Drawing:
    """One contour: where it is in the database, and its rings as they stand there."""

    annotation: int
    pairing: int
    file: int
    rings: list[Points]

    @property
    def points(self) -> Points:
        """The first ring, (n, 2) x, y in px."""
        return self.rings[0]


@dataclass(slots=True)
class Place:
    """One image and what belongs to it, by id."""

    patient: int
    study: int
    series: int
    instance: int
    image: int
    file: int
    slice: int
    phase: int
    inner: Drawing | None = None
    outer: Drawing | None = None

    def subjects(self, drawing: Drawing | None = None) -> dict[str, set[int]]:
        """Return the ids under which a rule may flag this image, or one contour on it: subject → ids."""
        found = {"patient": {self.patient}, "study": {self.study}, "series": {self.series}, "image": {self.image}}
        drawn = [drawing] if drawing else [one for one in (self.inner, self.outer) if one]
        return {
            **found,
            "file": {drawing.file} if drawing else {self.file, *(one.file for one in drawn)},
            "annotation": {one.annotation for one in drawn},
            "pairing": {one.pairing for one in drawn},
        }


@dataclass(slots=True)
class Study:
    """One series of one patient, its images by (slice, phase)."""

    patient: int
    study: int
    series: int
    normal: Points
    axes: Points
    places: dict[tuple[int, int], Place] = field(default_factory=dict)

    def __iter__(self) -> Any:
        return iter(self.places.values())

    @property
    def first(self) -> Place:
        return self.places[0, 0]

    @property
    def middle(self) -> Place:
        return self.places[max(key[0] for key in self.places) // 2, 0]


class Archive:
    """Rows that wait for COPY, and where everything is."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.rows: dict[str, list[tuple[Any, ...]]] = {table: [] for table in COLUMNS}
        self.hearts: list[Study] = []
        self.sides: list[Study] = []

    def number(self, table: str) -> int:
        """Return the next id of a table."""
        return len(self.rows[table]) + 1

    def study(self, slices: int, phases: int) -> Study:
        """Add a patient with a study of one series of so many images, without contours."""
        rng = self.rng
        patient, study, series = (self.number(table) for table in ("patient", "study", "series"))
        # Oblique as short axes are, and another plane in everybody.
        turned, _ = np.linalg.qr(rng.standard_normal((3, 3)))
        axes = np.concatenate([turned[:, 0], turned[:, 1]])
        made = Study(patient, study, series, np.cross(turned[:, 0], turned[:, 1]), axes)
        self.rows["patient"].append((patient, f"Q{rng.integers(1 << 40):010X}"))
        self.rows["study"].append((study, patient, f"{UID}.1.{study}", "20120101"))
        self.rows["series"].append((series, study, f"{UID}.2.{series}", 300, "MR"))
        origin = rng.uniform(-150, 50, 3)
        for at in range(slices):
            for phase in range(phases):
                self._image(made, origin, at, phase, slices * phases, phases)
        return made

    def _image(self, made: Study, origin: Points, at: int, phase: int, count: int, phases: int) -> None:
        rng, rows = self.rng, self.rows
        instance, image, file = (self.number(table) for table in ("instance", "image", "file"))
        number = at * phases + phase + 1
        place = origin + made.normal * DISTANCE * at
        pixels = rng.bytes(32)
        rows["instance"].append(
            (instance, made.series, f"{UID}.3.{instance}", "1.2.840.10008.5.1.4.1.1.4", number, 1, count,
             hashlib.sha256(pixels).digest(), "NO", "YES", False)
        )  # fmt: skip
        rows["file"].append((file, 1, f"images/s{made.study:05d}/{number:04d}.dcm", "image", "dicom", SIZE * SIZE * 2 + 1500, 1, 1))
        rows["image"].append(
            (image, instance, 0, SIZE, SIZE, "MONOCHROME2", SPACING, SPACING, place.tolist(), made.axes.tolist(),
             float(place @ made.normal), 8.0, (phase + 0.5) * CYCLE_MS / phases + float(rng.uniform(0, 2)), phase, pixels,
             uuid.UUID(bytes=rng.bytes(16)))
        )  # fmt: skip
        rows["location"].append((image, file, 1500, SIZE * SIZE * 2, "<i2", "1.2.840.10008.1.2.1", True))
        rows["measure"].append(
            (image, 0.0, float(rng.uniform(900, 1600)), float(rng.uniform(120, 180)), float(rng.uniform(110, 160)),
             float(rng.uniform(5, 6.5)), float(rng.uniform(0.00003, 0.0003)), 0, int(rng.integers(-(1 << 63), (1 << 63) - 1)))
        )  # fmt: skip
        made.places[at, phase] = Place(made.patient, made.study, made.series, instance, image, file, at, phase)

    def heart(self, slices: int = SLICES, phases: int = PHASES) -> Study:
        """Add a patient with a study all of whose images have an inner and an outer contour."""
        rng = self.rng
        made = self.study(slices, phases)
        x, y = rng.uniform(0.42, 0.58, 2) * SIZE
        drift = rng.uniform(-0.5, 0.5, 2)  # px a slice
        inner, wall = rng.uniform(15, 18), rng.uniform(5.5, 7.5)  # px at the base, at rest
        squeeze = rng.uniform(0.10, 0.18)
        waves = [(rng.uniform(0, most), rng.uniform(0, 2 * np.pi)) for most in (0.05, 0.03, 0.015)]
        for place in made:
            along = place.slice / max(slices - 1, 1)
            narrow = np.sqrt(1.0 - 0.8 * along**2)
            base, around = inner * narrow, (inner + wall) * (0.3 + 0.7 * narrow)
            now = base * (1.0 - squeeze * np.sin(np.pi * place.phase / phases) ** 2)
            centre = np.array([x, y]) + drift * place.slice
            # The muscle keeps its area as it contracts.
            place.outer = self._draw(place, 2, outline(centre, np.sqrt(around**2 - base**2 + now**2), waves))
            place.inner = self._draw(place, 1, outline(centre, now, waves))
        return made

    def _draw(self, place: Place, structure: int, points: Points) -> Drawing:
        if place.image % 4 == 0:
            points = np.concatenate([points, points[:1]])  # some tools repeat the first point
        file, annotation, pairing = (self.number(table) for table in ("file", "annotation", "pairing"))
        drawn = Drawing(annotation, pairing, file, [points])
        rows = self.rows
        rows["file"].append((file, 1, f"drawn/{annotation:06d}.txt", "annotation", "contour", len(points) * 14, 1, 1))
        rows["annotation"].append(
            (annotation, file, 1, structure, "polygon", "contour", *polygon(drawn.rings), 1)
        )  # fmt: skip
        rows["pairing"].append((pairing, annotation, place.image, "file-number", "by number", 1.0, "accepted", "layout:planting"))
        mask, shape = raster(drawn.rings, rows["image"][place.image - 1])
        rows["mask"].append((pairing, *mask))
        rows["shape"].append((pairing, *shape))
        rows["edge_fit"].append((pairing, fit(self.rng)))
        return drawn

    def write(self, conn: psycopg.Connection[Any]) -> None:
        """Write all rows into an empty, migrated database."""
        with conn.transaction():
            conn.execute("INSERT INTO root (name, url) VALUES ('planting', '/nowhere/planting')")
            conn.execute("INSERT INTO ingest_run (root_id, layout, program_version, host) VALUES (1, 'planting', '0', 'here')")
            conn.execute("INSERT INTO reader (name) VALUES ('expert')")
            conn.execute("INSERT INTO structure (name) VALUES ('inner'), ('outer')")
            for table, rows in self.rows.items():
                copy_rows(conn, table, rows)
                if COLUMNS[table].startswith("id,"):
                    conn.execute(f"SELECT setval(pg_get_serial_sequence('{table}', 'id'), %s)", [len(rows)])
        conn.execute("ANALYZE")


def copy_rows(conn: psycopg.Connection[Any], table: str, rows: Iterable[Sequence[Any]]) -> None:
    """COPY rows into a table, in the order of COLUMNS."""
    with conn.cursor().copy(f"COPY {table} ({COLUMNS[table]}) FROM STDIN") as copy:
        for row in rows:
            copy.write_row(row)


def outline(centre: Points, radius: float, waves: Sequence[tuple[float, float]]) -> Points:
    """Return a closed, star-shaped outline, (n, 2) px, on the half pixels on which readers' tools store it; its ends do not meet."""
    angle = np.linspace(0, 2 * np.pi, max(16, int(2 * np.pi * radius / 1.3)), endpoint=False)
    reach = radius * (1 + sum(size * np.cos(order * angle + start) for order, (size, start) in enumerate(waves, start=2)))
    return np.rint((centre + reach[:, np.newaxis] * np.column_stack([np.cos(angle), np.sin(angle)])) * 2) / 2


def polygon(rings: Sequence[Points]) -> tuple[Any, ...]:
    """Return what a row of annotation says of a polygon: points, rings, convention, area, digest."""
    flat = np.concatenate(rings).ravel()
    digest = hashlib.sha256(flat.tobytes() + repr([len(ring) for ring in rings]).encode()).digest()
    return flat.tolist(), [len(ring) for ring in rings], "centre", contours.polygon_area(rings), digest


def raster(rings: Sequence[Points], image: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return what the rows of mask and shape say of a polygon on an image, given as a row of image."""
    rows, columns = image[3], image[4]
    mask = contours.rasterise(rings, rows, columns, convention="centre")
    return (rows, columns, *contours.boxed(mask)), shape_of(rings, mask, image)


def fit(rng: np.random.Generator, at: tuple[float, float] = (0.0, 0.0), height: float = 1.0, noise: float = 0.05) -> list[float]:
    """Return the scores of an edge_fit: a hill of a height over its foot with its top at (x, y) px, and noise; of mean 0."""
    y, x = np.mgrid[-2:2.1:0.5, -2:2.1:0.5]
    hill = height * np.exp(-((x - at[0]) ** 2 + (y - at[1]) ** 2) / 2)
    scores = (hill + rng.normal(0, noise, hill.shape)).ravel()
    return list((scores - scores.mean()).tolist())


def shape_of(rings: Sequence[Points], mask: npt.NDArray[np.bool_], image: Sequence[Any]) -> tuple[Any, ...]:
    """Return what the row of shape says, by the function that an ingest uses."""
    raise NotImplementedError


Change = Callable[[Points], Points]
