"""A synthetic archive of cine MR as rows: hearts with 10,000 inner and outer contours, and small series beside them, to plant defects in.

Everything that a rule can ask about is there as an ingest would have written it: masks come from `catalog.contours`, shapes from
`catalog.shapes`. A `Place` names one image with what hangs on it, so that a planting says where it was, whatever subject a rule flags.
What is planted is written as changes to those rows, as what happened to the files would have made them.
"""

from __future__ import annotations

import hashlib
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import psycopg

from catalog import contours, records, rulefiles, shapes

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
    "shape": shapes.COLUMNS,
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
            place.outer = self._draw(place, 2, self._by_hand(centre, np.sqrt(around**2 - base**2 + now**2), waves))
            place.inner = self._draw(place, 1, self._by_hand(centre, now, waves))
        return made

    def _by_hand(self, centre: Points, radius: float, waves: Sequence[tuple[float, float]]) -> Points:
        """Return an outline as no hand draws it twice."""
        finer = [(self.rng.uniform(0.005, 0.012), self.rng.uniform(0, 2 * np.pi)) for _ in range(3)]
        return outline(centre + self.rng.normal(0, 0.25, 2), radius, [*waves, *finer])

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
        rows["shape"].append(shapes.row(pairing, shape))
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
                if COLUMNS[table].startswith("id,") and rows:
                    conn.execute(f"SELECT setval(pg_get_serial_sequence('{table}', 'id'), %s)", [len(rows)])
        conn.execute("ANALYZE")


def copy_rows(conn: psycopg.Connection[Any], table: str, rows: Iterable[Sequence[Any]]) -> None:
    """COPY rows into a table, in the order of COLUMNS."""
    with conn.cursor().copy(f"COPY {table} ({COLUMNS[table]}) FROM STDIN") as copy:
        for row in rows:
            # psycopg looks at each number of a list, for what would need quotes.
            copy.write_row(["{" + ",".join(map(str, one)) + "}" if type(one) is list else one for one in row])


def outline(centre: Points, radius: float, waves: Sequence[tuple[float, float]]) -> Points:
    """Return a closed, star-shaped outline, (n, 2) px, on the half pixels on which readers' tools store it; its ends do not meet."""
    angle = np.linspace(0, 2 * np.pi, max(16, int(2 * np.pi * radius / 1.3)), endpoint=False)
    reach = radius * (1 + sum(size * np.cos(order * angle + start) for order, (size, start) in enumerate(waves, start=2)))
    return np.rint((centre + reach[:, np.newaxis] * np.column_stack([np.cos(angle), np.sin(angle)])) * 2) / 2


def polygon(rings: Sequence[Points]) -> tuple[Any, ...]:
    """Return what a row of annotation says of a polygon: points, rings, convention, area, digest."""
    one = records.polygon(rings)
    return one.points, one.rings, "centre", one.area_px, one.content_hash


def raster(rings: Sequence[Points], image: Sequence[Any]) -> tuple[tuple[Any, ...], shapes.Shape]:
    """Return what the rows of mask and shape say of a polygon on an image, given as a row of image; by what an ingest uses."""
    rows, columns, place = image[3], image[4], (image[8], image[9], image[6], image[7])
    top, left, high, wide, bits = contours.boxed(contours.rasterise(rings, rows, columns, convention="centre"))
    shape = shapes.of_polygon(rings, rows, columns, (top, left, high, wide), bits, convention="centre", place=place)
    return (rows, columns, top, left, high, wide, bits), shape


def fit(rng: np.random.Generator, at: tuple[float, float] = (0.0, 0.0), noise: float = 0.05) -> list[float]:
    """Return the scores of an edge_fit: a hill with its top at (x, y) px, and noise; of mean 0 and deviation 1."""
    y, x = np.mgrid[-2:2.1:0.5, -2:2.1:0.5]
    hill = np.exp(-((x - at[0]) ** 2 + (y - at[1]) ** 2) / 2)
    scores = (hill + rng.normal(0, noise, hill.shape)).ravel()
    return list(((scores - scores.mean()) / scores.std()).tolist())


class Ground:
    """Where one rule's defects and near misses are planted: studies of its own, which nothing else touches."""

    def __init__(self, archive: Archive, rule: rulefiles.Rule, bad: list[Study], near: list[Study]) -> None:
        self.archive, self.rule, self.bad, self.near = archive, rule, bad, near
        self.defects: list[tuple[dict[str, set[int]], str | None]] = []
        self.misses: list[dict[str, set[int]]] = []
        self.updates: dict[tuple[str, tuple[str, ...]], list[tuple[Any, ...]]] = {}
        self.statements: list[tuple[str, list[Any]]] = []
        self.drawings: dict[int, tuple[Drawing, Place]] = {}
        self.taken: Counter[int] = Counter()

    def limit(self, name: str) -> float:
        """Return a parameter of the rule: the only thing that a planting may know about it."""
        return float(self.rule.parameters[name])

    def both(self) -> Iterator[tuple[bool, int, Study]]:
        """Yield is it a defect, number, study."""
        for wrong, studies in ((True, self.bad), (False, self.near)):
            for number, study in enumerate(studies):
                yield wrong, number, study

    def cells(self, structure: str, pick: Callable[[Place], bool] = lambda place: True) -> Iterator[tuple[bool, int, Place, Drawing]]:
        """Yield is it a defect, number, place and a structure's drawing there, of each image of its hearts."""
        for wrong, studies in ((True, self.bad), (False, self.near)):
            for number, place in enumerate(place for study in studies for place in study if pick(place)):
                drawn = place.inner if structure == "inner" else place.outer
                assert drawn is not None
                yield wrong, number, place, drawn

    def mark(self, wrong: bool, *where: Place | tuple[Place, Drawing], severity: str | None = None) -> None:
        """Note a defect, or a near miss, at one place; of several places that contradict each other one has to be flagged, or none."""
        merged: dict[str, set[int]] = {}
        for one in where:
            for subject, ids in (one.subjects() if isinstance(one, Place) else one[0].subjects(one[1])).items():
                merged.setdefault(subject, set()).update(ids)
        if wrong:
            self.defects.append((merged, severity))
        else:
            self.misses.append(merged)

    def set(self, table: str, number: int, key: str = "id", **values: Any) -> None:
        """Change columns of a row."""
        self.updates.setdefault((table, (*values, key)), []).append((*values.values(), number))

    def run(self, statement: str, *values: Any) -> None:
        """Send a statement with the changes."""
        self.statements.append((statement, list(values)))

    def image(self, place: Place) -> dict[str, Any]:
        """Return the row of an image."""
        names = [name.strip().strip('"') for name in COLUMNS["image"].split(",")]
        return dict(zip(names, self.archive.rows["image"][place.image - 1], strict=True))

    def move(self, place: Place, position: Points | None = None, axes: Points | None = None) -> None:
        """Say that an image lies elsewhere, or is turned; `position` along the normal follows, as an ingest works it out."""
        row = self.image(place)
        at = np.asarray(row["image_position"] if position is None else position)
        turned = np.asarray(row["image_orientation"] if axes is None else axes)
        normal = np.cross(turned[:3], turned[3:])
        along = float(at @ normal / np.linalg.norm(normal))
        self.set("image", place.image, image_position=at.tolist(), image_orientation=turned.tolist(), position=along)

    def drop(self, places: Iterable[Place]) -> None:
        """Take images out, as if their files had never come."""
        for place in places:
            self.run("DELETE FROM flag WHERE image_id = %s OR file_id = %s", place.image, place.file)
            self.run("DELETE FROM image WHERE id = %s", place.image)
            self.run("DELETE FROM instance WHERE id = %s", place.instance)
            self.run("DELETE FROM file WHERE id = %s", place.file)

    def unpair(self, study: int, drawn: Drawing) -> None:
        """Take a contour off its image, with what was said of that."""
        self.taken[study] += 1
        self.run("DELETE FROM flag WHERE pairing_id = %s", drawn.pairing)
        self.run("DELETE FROM pairing WHERE id = %s", drawn.pairing)

    def apart(self, places: Sequence[Place], study: int) -> None:
        """Put images into another series of their study, as a localizer lies beside a stack."""
        self.run("INSERT INTO series (study_id, series_instance_uid, modality) VALUES (%s, %s, 'MR')", study, f"{UID}.9.{places[0].image}")
        for place in places:
            self.run(
                "UPDATE instance SET series_id = (SELECT id FROM series WHERE series_instance_uid = %s) WHERE id = %s",
                f"{UID}.9.{places[0].image}", place.instance,
            )  # fmt: skip

    def redraw(self, place: Place, drawn: Drawing, *rings: Points) -> None:
        """Have a contour be another one, as if its file had held that."""
        drawn.rings = [np.asarray(ring, np.float64) for ring in rings]
        self.drawings[drawn.pairing] = (drawn, place)

    def write(self, conn: psycopg.Connection[Any]) -> None:
        """Write what was planted."""
        changed = {"annotation": [], "mask": [], "shape": []}  # type: dict[str, list[tuple[Any, ...]]]
        for drawn, place in self.drawings.values():
            mask, shape = raster(drawn.rings, self.archive.rows["image"][place.image - 1])
            points, rings, _, area, digest = polygon(drawn.rings)
            changed["annotation"].append((points, rings, area, digest, drawn.annotation))
            changed["mask"].append((drawn.pairing, *mask))
            changed["shape"].append(shapes.row(drawn.pairing, shape))
        with conn.transaction(), conn.cursor() as cursor:
            if changed["annotation"]:
                cursor.executemany(
                    "UPDATE annotation SET points = %s, rings = %s, polygon_area_px = %s, content_hash = %s WHERE id = %s",
                    changed["annotation"],
                )
                # A new version of an annotation would have a new pairing: what was counted on the old one does not hold.
                cursor.execute(
                    "DELETE FROM overlap WHERE pairing_id = ANY(%(those)s) OR other_id = ANY(%(those)s)", {"those": list(self.drawings)}
                )
                for table in ("shape", "mask"):
                    cursor.execute(f"DELETE FROM {table} WHERE pairing_id = ANY(%s)", [list(self.drawings)])
                    copy_rows(conn, table, changed[table])
            for (table, names), rows in self.updates.items():
                assigned = ", ".join(f'"{name}" = %s' for name in names[:-1])
                cursor.executemany(f"UPDATE {table} SET {assigned} WHERE {names[-1]} = %s", rows)
            with conn.pipeline():  # else each of twenty thousand waits for its answer
                for statement, values in self.statements:
                    cursor.execute(statement, values)
