"""Studies that look like cardiac MR, in the Sunnybrook layout: for the demo, tests and benchmarks. No patient is behind them.

What is drawn is a left ventricle in short axis, a bright pool in a dark muscle ring that contracts over the phases and
narrows from base to apex, in a chest with the things that a reader must not take for it: a right ventricle and vessels as
bright as the pool, one of them with a dark wall, muscles inside the pool, texture, an uneven coil and noise.
"""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian, MRImageStorage

Image = npt.NDArray[np.float32]
Angles = npt.NDArray[np.float32]

SPACING = 1.367188  # mm between pixels, and SLICE_DISTANCE between slices, both as in the real studies
SLICE_DISTANCE = 10.0
_ACROSS = (-0.104592, 0.346381, -0.932245)
_ALONG = (-0.733192, -0.660188, -0.163037)
_NORMAL = np.cross(_ACROSS, _ALONG)
_CYCLE = 750.0  # ms


def write_studies(
    folder: Path, *, patients: int = 3, slices: int = 8, phases: int = 6, size: int = 256, seed: int = 0, every_image: bool = False
) -> None:
    """Write synthetic studies of `patients` × `slices` × `phases` images of `size` × `size` px in the Sunnybrook layout.

    Patients are SYN0001, SYN0002, … with the contours of SC-SYN-0001, …, bridged by link.csv. Image n.dcm has Instance
    Number n, slice (n-1) // phases from base to apex and phase (n-1) % phases; the heart is widest at phase 0 and
    narrowest at phase `phases` // 2. Inner contours lie at these two phases, outer ones at phase 0, both in all slices
    but the first and the last (in all, where there are fewer than four). Points are multiples of 0.5 in pixels with
    pixel centres at integers.

    The same arguments give the same bytes with the same versions of numpy and pydicom. A patient's images depend neither
    on how many patients there are nor on `every_image`. Files of the same names are overwritten, others are left alone.

    Args:
        folder: Created if it is not there.
        every_image: Give every image an inner contour.

    Raises:
        ValueError: If a count is below 1 or beyond its names' digits, or `size` is not within [32, 4096].
        OSError: If a file cannot be written.
    """
    if not (1 <= patients <= 9999 and slices >= 1 and phases >= 1 and slices * phases <= 9999):
        raise ValueError(f"patients and slices × phases must be within [1, 9999], not {patients} and {slices} × {phases}")
    if not 32 <= size <= 4096:
        raise ValueError(f"size must be within [32, 4096] px, not {size}")
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["patient_id,original_id"]
    for number in range(1, patients + 1):
        patient, original = f"SYN{number:04d}", f"SC-SYN-{number:04d}"
        lines.append(f"{patient},{original}")
        images = folder / "dicoms" / patient
        contours = folder / "contourfiles" / original
        for path in (images, contours / "i-contours", contours / "o-contours"):
            path.mkdir(parents=True, exist_ok=True)
        _write_study(images, contours, patient, np.random.default_rng((seed, number)), (seed, number, slices, phases, size), every_image)
    (folder / "link.csv").write_text("\n".join(lines) + "\n", encoding="ascii", newline="\n")


def _write_study(
    images: Path, contours: Path, patient: str, rng: np.random.Generator, parameters: tuple[int, ...], every_image: bool
) -> None:
    _, _, slices, phases, size = parameters
    # The UIDs hold all parameters: two sets of other sizes in one catalog are not the same images.
    uid = "synthetic " + " ".join(map(str, parameters))
    heart = _Heart.draw(rng, size)
    dataset = _study_dataset(patient, uid, slices * phases, size)
    for at in range(slices):
        background, coil = _chest(rng, size, heart), _coil(rng, size)
        labelled = slices < 4 or 0 < at < slices - 1
        for phase in range(phases):
            number = at * phases + phase + 1
            inner, outer = heart.radii(at / max(slices - 1, 1), math.sin(math.pi * phase / phases) ** 2)
            pixels = heart.paint(background, inner, outer)
            pixels *= coil
            pixels += rng.standard_normal((size, size), np.float32) * np.float32(14.0)
            stored = np.abs(pixels).astype("<i2")  # a magnitude image has no negative noise
            _write_image(images / f"{number}.dcm", dataset, uid, number, stored, at, (phase + 0.5) * _CYCLE / phases)
            if every_image or (labelled and phase in (0, phases // 2)):
                _write_contour(contours, "i", number, heart.outline(inner))
            if labelled and phase == 0:
                _write_contour(contours, "o", number, heart.outline(outer))


@dataclass(frozen=True, slots=True)
class _Heart:
    """One patient's heart. Lengths in px; its outline is r(θ) = radius · shape(θ) around (x, y)."""

    size: int
    x: float
    y: float
    inner: float  # radius of the pool at base and rest
    outer: float
    contraction: float  # how much of the radius it loses
    wobble: tuple[tuple[float, float], ...]  # amplitude and phase of the second, third and fourth harmonic
    side: float  # direction in which the right ventricle lies
    papillary: tuple[tuple[float, float, float], ...]  # angle, distance and size of muscles in the pool, in radii
    blood: float
    muscle: float

    @classmethod
    def draw(cls, rng: np.random.Generator, size: int) -> "_Heart":
        inner = size * rng.uniform(0.075, 0.095)
        side = rng.uniform(0.6, 1.4) * math.pi
        return cls(
            size=size,
            x=size * rng.uniform(0.46, 0.56),
            y=size * rng.uniform(0.46, 0.56),
            inner=inner,
            outer=inner + size * rng.uniform(0.030, 0.042),
            contraction=rng.uniform(0.18, 0.35),
            wobble=tuple((rng.uniform(0.0, most), rng.uniform(0.0, 2 * math.pi)) for most in (0.08, 0.04, 0.02)),
            side=side,
            papillary=tuple(
                (side + angle + rng.uniform(-0.3, 0.3), rng.uniform(0.5, 0.65), rng.uniform(0.1, 0.17)) for angle in (2.0, 4.2)
            ),
            blood=rng.uniform(430.0, 560.0),
            muscle=rng.uniform(90.0, 140.0),
        )

    def radii(self, along: float, contracted: float) -> tuple[float, float]:
        """Return the mean inner and outer radius, 0 <= along <= 1 from base to apex; the muscle keeps its area as it contracts."""
        narrowing = math.sqrt(1.0 - 0.8 * along**2)
        inner, outer = self.inner * narrowing, self.outer * (0.3 + 0.7 * narrowing)
        now = inner * (1.0 - self.contraction * contracted)
        return now, math.sqrt(outer**2 - inner**2 + now**2)

    def shape(self, angle: Angles) -> Angles:
        waves = (amplitude * np.cos(order * angle + start) for order, (amplitude, start) in enumerate(self.wobble, start=2))
        return np.float32(1.0) + sum(waves, np.zeros_like(angle)).astype(np.float32)

    def outline(self, radius: float) -> npt.NDArray[np.float64]:
        """Return the contour of a radius as a reader's tool stores it: (n, 2) on half pixels, none twice running, not closed."""
        steps = max(16, int(radius * 16))
        angle = np.linspace(0.0, 2 * math.pi, steps, endpoint=False, dtype=np.float32)
        reach = radius * self.shape(angle)
        points = np.rint(np.column_stack([self.x + reach * np.cos(angle), self.y + reach * np.sin(angle)]).astype(np.float64) * 2.0) / 2.0
        moved: npt.NDArray[np.float64] = points[(points != np.roll(points, 1, axis=0)).any(axis=1)]
        return moved

    def paint(self, background: Image, inner: float, outer: float) -> Image:
        """Return the background with the heart over it, a new (size, size) float32 array."""
        pixels = background.copy()
        half = math.ceil(self.outer * 1.7) + 4  # as far as the right ventricle and its wall reach
        left, top = max(0, int(self.x) - half), max(0, int(self.y) - half)
        window = pixels[top : int(self.y) + half, left : int(self.x) + half]
        y, x = np.ogrid[top : top + window.shape[0], left : left + window.shape[1]]
        dx, dy = (x - self.x).astype(np.float32), (y - self.y).astype(np.float32)
        distance = np.hypot(dx, dy)
        shape = self.shape(np.arctan2(dy, dx))
        # Right ventricle: an ellipse behind the muscle, with a wall of its own.
        across = dx * math.cos(self.side) + dy * math.sin(self.side) - outer * 0.85
        beside = dy * math.cos(self.side) - dx * math.sin(self.side)
        right = np.hypot(across / 0.75, beside / 1.35)
        _blend(window, outer * 0.92 - right + self.size * 0.012, self.muscle)
        _blend(window, outer * 0.92 - right, self.blood * 0.94)
        _blend(window, outer * shape - distance, self.muscle)
        _blend(window, inner * shape - distance, self.blood)
        for angle, away, width in self.papillary:
            muscle = np.hypot(dx - inner * away * math.cos(angle), dy - inner * away * math.sin(angle))
            _blend(window, inner * width - muscle, self.muscle * 1.4)
        return pixels


def _blend(window: Image, depth: npt.NDArray[np.floating], value: float) -> None:
    """Paint `value` where `depth` is positive, in place; half of it half a pixel either side of the edge, as a real pixel averages."""
    window += (np.float32(value) - window) * np.clip(depth + 0.5, 0.0, 1.0).astype(np.float32)


def _chest(rng: np.random.Generator, size: int, heart: _Heart) -> Image:
    """Return what lies around the heart in one slice, (size, size) float32."""
    y, x = np.ogrid[:size, :size]
    x, y = (x / size).astype(np.float32), (y / size).astype(np.float32)
    scale = size / 2.0
    pixels = np.full((size, size), 8.0, np.float32)

    def ellipse(at: tuple[float, float], radii: tuple[float, float], value: float) -> None:
        away = np.hypot((x - at[0]) / radii[0], (y - at[1]) / radii[1])
        _blend(pixels, (1.0 - away) * min(radii) * 2 * scale, value)

    body = (rng.uniform(0.44, 0.47), rng.uniform(0.36, 0.40))
    ellipse((0.5, 0.5), body, rng.uniform(550.0, 750.0))  # fat under the skin
    ellipse((0.5, 0.5), (body[0] - 0.03, body[1] - 0.03), rng.uniform(120.0, 170.0))
    ellipse((rng.uniform(0.24, 0.30), 0.46), (0.16, 0.24), 22.0)  # lungs
    ellipse((rng.uniform(0.70, 0.76), 0.46), (0.15, 0.25), 22.0)
    ellipse((rng.uniform(0.35, 0.45), 0.72), (0.2, 0.1), rng.uniform(180.0, 240.0))  # liver
    ellipse((0.5, 0.8), (0.045, 0.05), rng.uniform(250.0, 330.0))  # spine
    for _ in range(int(rng.integers(4, 8))):  # vessels as bright as the pool, anywhere
        at = (rng.uniform(0.15, 0.85), rng.uniform(0.22, 0.78))
        radius = rng.uniform(0.008, 0.022)
        ellipse(at, (radius, radius * rng.uniform(0.7, 1.5)), rng.uniform(0.6, 1.05) * heart.blood)
    # The descending aorta: a small pool with a dark wall, as the ventricle is.
    aorta, radius = (rng.uniform(0.56, 0.62), rng.uniform(0.70, 0.74)), rng.uniform(0.025, 0.034)
    ellipse(aorta, (radius + 0.015, radius + 0.015), heart.muscle)
    ellipse(aorta, (radius, radius), heart.blood)
    pixels *= np.float32(1.0) + np.float32(0.22) * _smooth(rng, size, 40) + np.float32(0.12) * _smooth(rng, size, 14)
    return pixels


def _coil(rng: np.random.Generator, size: int) -> Image:
    """Return how strongly the coil receives in one slice, (size, size) float32 about 1: stronger on one side, never even."""
    y, x = np.ogrid[:size, :size]
    direction = rng.uniform(0.0, 2 * math.pi)
    slope = ((x / size - 0.5) * math.cos(direction) + (y / size - 0.5) * math.sin(direction)).astype(np.float32)
    return np.float32(1.0) + np.float32(0.5) * slope + np.float32(0.06) * _smooth(rng, size, 12)


def _smooth(rng: np.random.Generator, size: int, cells: int) -> Image:
    """Return a smooth random field of about unit deviation, (size, size) float32: noise at `cells` points a side, interpolated."""
    points = rng.standard_normal((cells, cells), np.float32) * np.float32(1.5)
    at = np.linspace(0.0, cells - 1.0, size)
    below = np.minimum(at.astype(np.int64), cells - 2)
    share = (at - below).astype(np.float32)
    # By hand, because a matrix product wakes the threads of BLAS, which then spin on every core.
    rows = points[below] + (points[below + 1] - points[below]) * share[:, np.newaxis]
    return np.asarray(rows[:, below] + (rows[:, below + 1] - rows[:, below]) * share, dtype=np.float32)


def _uid(text: str) -> UID:
    """Return a UID made from a text: PS3.5 B.2, 2.25 and a 128-bit number."""
    return UID(f"2.25.{int.from_bytes(hashlib.sha256(text.encode()).digest()[:16])}")


def _study_dataset(patient: str, uid: str, images: int, size: int) -> FileDataset:
    """Return what all images of a study share."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = MRImageStorage
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset("", Dataset(), preamble=b"\0" * 128, file_meta=meta)
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "CARDIAC", "NONE"]
    dataset.SOPClassUID = MRImageStorage
    dataset.StudyDate = "20120101"
    dataset.StudyTime = ""
    dataset.AccessionNumber = ""
    dataset.Modality = "MR"
    dataset.Manufacturer = "scanfeed synthetic"
    dataset.ReferringPhysicianName = ""
    dataset.PatientName = patient
    dataset.PatientID = patient
    dataset.PatientBirthDate = ""
    dataset.PatientSex = ""
    dataset.ScanningSequence = "GR"
    dataset.SequenceVariant = "SS"
    dataset.ScanOptions = ""
    dataset.MRAcquisitionType = "2D"
    dataset.SliceThickness = f"{SLICE_DISTANCE:g}"
    dataset.EchoTime = "1.5"
    dataset.EchoTrainLength = 1
    dataset.StudyInstanceUID = _uid(uid)
    dataset.SeriesInstanceUID = _uid(f"{uid} series")
    dataset.StudyID = ""
    dataset.SeriesNumber = 300
    dataset.ImageOrientationPatient = [f"{value:g}" for value in (*_ACROSS, *_ALONG)]
    dataset.FrameOfReferenceUID = _uid(f"{uid} frame of reference")
    dataset.PositionReferenceIndicator = ""
    dataset.ImagesInAcquisition = images
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.Rows = dataset.Columns = size
    dataset.PixelSpacing = [f"{SPACING}", f"{SPACING}"]
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit = 15
    dataset.PixelRepresentation = 1
    dataset.WindowCenter = "300"
    dataset.WindowWidth = "600"
    return dataset


def _write_image(path: Path, dataset: FileDataset, uid: str, number: int, stored: npt.NDArray[np.int16], at: int, trigger: float) -> None:
    instance = _uid(f"{uid} {number}")
    dataset.file_meta.MediaStorageSOPInstanceUID = instance
    dataset.SOPInstanceUID = instance
    dataset.InstanceNumber = number
    dataset.TriggerTime = f"{trigger:.4f}"
    position = np.array((160.0, 35.0, 145.0)) + _NORMAL * SLICE_DISTANCE * at
    dataset.ImagePositionPatient = [f"{value:.6f}" for value in position]
    dataset.PixelData = stored.tobytes()
    dataset["PixelData"].VR = "OW"
    dataset.save_as(path, enforce_file_format=True)


def _write_contour(contours: Path, kind: str, number: int, points: npt.NDArray[np.float64]) -> None:
    path = contours / f"{kind}-contours" / f"IM-0001-{number:04d}-{kind}contour-manual.txt"
    path.write_text("".join(f"{x:.2f} {y:.2f}\n" for x, y in points.tolist()), encoding="ascii", newline="\n")
