"""The near hash: what leaves it as it is, what does not, and what `catalog measure` writes of it."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydicom import dcmread

from catalog import measuring, nearness
from catalog.nearness import near_hash
from tests.test_measure import measure, take_in

__all__ = ["measure", "take_in"]  # fixtures

Conn = psycopg.Connection[tuple[Any, ...]]
Array = npt.NDArray[Any]


def apart(one: int | None, other: int | None) -> int:
    assert one is not None and other is not None
    return ((one ^ other) & (2**64 - 1)).bit_count()


def picture(seed: int, rows: int = 96, columns: int = 96) -> Array:
    """Return something that looks like an image, (rows, columns) int16: smooth patches."""
    coarse = np.random.default_rng(seed).integers(0, 1000, (12, 12))
    values: Array = np.kron(coarse, np.ones((rows // 12 + 1, columns // 12 + 1)))[:rows, :columns]
    return values.astype("<i2")


def symmetric(size: int = 128) -> Array:
    """Return a phantom with two axes of symmetry, of which half of the cosine coefficients are nothing but rounding."""
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    values: Array = 900.0 * (np.hypot(x / 30, y / 45) < 1) + 300.0 * (np.hypot(x / 12, y / 10) < 1)
    return values


def noisy(values: Array, share: float, seed: int) -> Array:
    spread = float(values.max()) - float(values.min())
    return np.asarray(values + np.random.default_rng(seed).standard_normal(values.shape) * share * spread)


def to_8_bits(values: Array) -> Array:
    low, high = float(values.min()), float(values.max())
    return np.rint((values - low) / (high - low) * 255).astype(np.uint8)


def jpeg(values: Array, quality: int) -> Array:
    buffer = io.BytesIO()
    Image.fromarray(to_8_bits(values)).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


DISTURBED: dict[str, Callable[[Array, int], Array]] = {
    "slope and intercept": lambda values, seed: values * 3.7 - 1024,
    "8 bits": lambda values, seed: to_8_bits(values),
    "JPEG 90": lambda values, seed: jpeg(values, 90),
    "noise of 1 %": lambda values, seed: noisy(values, 0.01, seed),
}


@pytest.mark.parametrize("name", DISTURBED)
def test_same_image_disturbed(name: str) -> None:
    """Rescaled, in 8 bits, compressed or a little noisy, an image keeps its hash but for two bits; so does one with axes of symmetry."""
    for seed in range(30):
        values = picture(seed)
        assert apart(near_hash(values), near_hash(DISTURBED[name](values, seed))) <= 2
        phantom = symmetric(96 + seed * 2)
        assert apart(near_hash(phantom), near_hash(DISTURBED[name](phantom, seed))) <= 2


def test_other_images() -> None:
    """Different images differ in many bits, and about half of the bits are set in half of the images: none is wasted."""
    hashes = [near_hash(picture(seed)) for seed in range(120)]
    assert min(apart(one, other) for at, one in enumerate(hashes) for other in hashes[:at]) >= 10
    shares = np.mean([[(one or 0) >> bit & 1 for bit in range(64)] for one in hashes], axis=0)
    assert shares.min() > 0.2 and shares.max() < 0.8


def test_quarters_are_alike() -> None:
    """Each quarter of the bits takes every fourth frequency, from low to high."""
    places = [(place // nearness.FREQUENCIES) ** 2 + (place % nearness.FREQUENCIES) ** 2 for place in nearness.LOWEST.tolist()]
    quarters = [places[start : start + 16] for start in range(0, 64, 16)]
    assert all(quarter == sorted(quarter) for quarter in quarters)
    assert len(set(nearness.LOWEST.tolist())) == 64 and 0 not in places
    assert max(sum(quarter) for quarter in quarters) - min(sum(quarter) for quarter in quarters) < 100


@given(
    dtype=st.sampled_from(["u1", "<u2", "<i2", ">i2", "<i4", "<f4", "<f8", ">f8"]),
    rows=st.integers(32, 130),
    columns=st.integers(32, 130),
    seed=st.integers(0, 99),
)
def test_types_and_shapes(dtype: str, rows: int, columns: int, seed: int) -> None:
    """The hash depends on values, not on their type and byte order; it fits a bigint; any size from 32 px has one."""
    values = np.random.default_rng(seed).integers(0, 100, (rows, columns))
    found = near_hash(values.astype(dtype))
    assert found is not None and -(2**63) <= found < 2**63
    assert found == near_hash(values)


def test_colour_and_slope() -> None:
    """Of several samples a pixel their sum counts; a negative slope inverts the image; halving its size changes next to nothing."""
    values = picture(7, 128, 128)
    assert near_hash(np.stack([values] * 3, axis=-1)) == near_hash(values)
    assert near_hash(values, -0.5) == near_hash(-values.astype(np.int32))
    assert near_hash(values, -0.5) != near_hash(values)
    assert apart(near_hash(values.reshape(64, 2, 64, 2).mean((1, 3))), near_hash(values)) <= 2


def test_no_hash() -> None:
    """None: constant, under 32 px a side, or with a value that is not finite; 0 where nothing differs but a fine pattern."""
    assert near_hash(np.full((64, 64), 7, np.uint8)) is None and near_hash(np.full((50, 60), 0.1)) is None
    assert near_hash(picture(1, 31, 200)) is None and near_hash(picture(1, 200, 31)) is None
    for odd in (np.nan, np.inf, -np.inf):
        values = picture(1).astype(np.float32)
        values[5, 5] = odd
        assert near_hash(values) is None
    assert near_hash(np.full((40, 40), np.nan)) is None
    assert near_hash(np.tile([0, 1], (64, 32))) == 0
    assert near_hash(np.where(picture(1) > 500, 1e308, -1e308)) is not None  # whose sums are too large for a float


# ------------------------------------------------------------------------------------------ in the catalog


def test_measured(studies: Path, conn: Conn, take_in: Callable[..., Any], measure: Callable[..., Any]) -> None:
    """Every image gets the hash of its pixels; one measured before there were hashes gets it later, once, and keeps its numbers."""
    take_in(studies)
    measure()
    found = conn.execute(
        "SELECT f.path, m.near_hash FROM measure m JOIN location l ON l.image_id = m.image_id JOIN file f ON f.id = l.file_id"
    ).fetchall()
    assert len(found) == 48
    for path, value in found:
        assert value == near_hash(dcmread(studies / path).pixel_array)
    rows = conn.execute("SELECT * FROM measure ORDER BY 1").fetchall()
    conn.execute("UPDATE measure SET near_hash = NULL")
    assert measure().measured == 48
    assert conn.execute("SELECT * FROM measure ORDER BY 1").fetchall() == rows
    assert measure().measured == 0


def test_measured_without(studies: Path, tmp_path: Path, conn: Conn, take_in: Callable[..., Any], measure: Callable[..., Any]) -> None:
    """Images that cannot have a hash are not measured again and again; one in colour has that of its samples' sum."""
    source = sorted(studies.rglob("*.dcm"))[0]
    (tmp_path / "arrived").mkdir()
    grey = (picture(3) % 256).astype(np.uint8)
    for number, values in enumerate(
        (
            np.full((64, 64), 9, np.uint8),
            np.arange(900).reshape(30, 30).astype(np.uint8),
            np.tile(np.array([0, 200], np.uint8), (64, 32)),
            np.dstack([grey] * 3),
        )
    ):
        dataset = dcmread(source)
        dataset.Rows, dataset.Columns = values.shape[:2]
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 8, 8, 7, 0
        if values.ndim == 3:
            dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PlanarConfiguration = 3, "RGB", 0
        dataset.PixelData = values.tobytes()
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = f"2.25.{number + 1}"
        dataset.save_as(tmp_path / "arrived" / f"{number}.dcm")
    take_in(tmp_path / "arrived")
    assert measure().measured == 4
    found = conn.execute(
        "SELECT m.near_hash FROM measure m JOIN location l ON l.image_id = m.image_id JOIN file f ON f.id = l.file_id ORDER BY f.path"
    ).fetchall()
    assert found == [(None,), (None,), (0,), (near_hash(grey),)]
    assert measure().measured == 0


def test_said_in_sql() -> None:
    """The size from which images are measured again for their hash is the one from which they have one."""
    assert re.search(r"least\(i\.rows, i\.columns\) < (\d+)", measuring.UNMEASURED)[1] == str(nearness.BLOCKS)  # type: ignore[index]


# ------------------------------------------------------------------------------------------ real images


def test_real_images(sunnybrook: Path) -> None:
    """On real cine MR two bits at most change under each disturbance, and two patients' images stay ten bits apart and more."""
    patients = [
        [dcmread(path).pixel_array for path in sorted((sunnybrook / "dicoms" / name).glob("*.dcm"))[::4]]
        for name in ("SCD0000101", "SCD0000201")
    ]
    hashes = [[near_hash(values) for values in patient] for patient in patients]
    for patient, known in zip(patients, hashes, strict=True):
        for at, values in enumerate(patient):
            for disturbed in DISTURBED.values():
                assert apart(near_hash(disturbed(values, at)), known[at]) <= 2
    assert min(apart(one, other) for one in hashes[0] for other in hashes[1]) >= 10
