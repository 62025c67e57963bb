"""Geometry: what is fed is where it was drawn to be, in image and mask alike, and follows from the sample's key alone."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from catalog import contours
from catalog.errors import FileError, UsageError
from loaderd import transforms
from loaderd.transforms import Crop, Elastic, Flip, Resample, Rotate, Scale, Shear, Shift

ndimage = pytest.importorskip("scipy.ndimage")
warping = pytest.importorskip("loaderd.warping")
pytest.importorskip("cv2")

KEY = bytes(range(16))
ROWS, COLUMNS = 96, 128
LANDMARKS = np.array([[40.0, 30.0], [88.5, 34.2], [63.3, 48.0], [36.7, 66.1], [90.0, 62.0]])  # x, y


def pipeline(chain: list[Any], *, seed: int = 7, size: tuple[int, int] | None = None, fit: str = "crop") -> Any:
    return warping.Pipeline(transforms.checked(chain, size), seed=seed, size=size, fit=fit, statistics=None)


def transformed(
    chain: list[Any],
    images: np.ndarray,
    masks: np.ndarray | None = None,
    *,
    key: bytes = KEY,
    epoch: int = 0,
    seed: int = 7,
    size: tuple[int, int] | None = None,
    fit: str = "crop",
    spacing: tuple[float, float] | None = None,
    dtype: Any = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return (images, masks) after a chain; both are given and returned as (n, rows, columns)."""
    masks = np.zeros((0, *images.shape[1:]), np.bool_) if masks is None else masks
    shape = transforms.output_size(transforms.checked(chain, size), size) or images.shape[1:]
    found = np.full((len(images), *shape), 777, images.dtype if dtype is None else dtype), np.ones((len(masks), *shape), np.bool_)
    pipeline(chain, seed=seed, size=size, fit=fit)(
        images, masks, key=key, epoch=epoch, spacing=spacing, out_images=found[0], out_masks=found[1]
    )
    return found


def discs(points: np.ndarray, rows: int = ROWS, columns: int = COLUMNS, radius: float = 5.0) -> tuple[np.ndarray, np.ndarray]:
    """Return images and masks (n, rows, columns): a disc at each point, with a soft edge in the image."""
    y, x = np.mgrid[:rows, :columns]
    away = np.hypot(x - points[:, 0, None, None], y - points[:, 1, None, None])
    return (np.clip(radius + 0.5 - away, 0, 1) * 900).astype(np.float32), away <= radius


def centroids(planes: np.ndarray) -> np.ndarray:
    y, x = np.mgrid[: planes.shape[1], : planes.shape[2]]
    weights = planes.astype(np.float64)
    total = weights.sum(axis=(1, 2))
    return np.stack([(weights * x).sum(axis=(1, 2)), (weights * y).sum(axis=(1, 2))], axis=1) / total[:, None]


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# Where a point goes, written down a second time: forward, and each for itself. Points (n, 2): x, y; shape: rows, columns.
def _turned(points: np.ndarray, shape: tuple[int, int], degrees: float) -> np.ndarray:
    x, y = (points - [(shape[1] - 1) / 2, (shape[0] - 1) / 2]).T
    angle = math.radians(degrees)  # counter-clockwise on a screen, where y goes down
    return np.stack(
        [
            x * math.cos(angle) + y * math.sin(angle) + (shape[1] - 1) / 2,
            y * math.cos(angle) - x * math.sin(angle) + (shape[0] - 1) / 2,
        ],
        axis=1,
    )


def _scaled(points: np.ndarray, shape: tuple[int, int], factor: float) -> np.ndarray:
    middle = np.array([(shape[1] - 1) / 2, (shape[0] - 1) / 2])
    return (points - middle) * factor + middle


def _sheared(points: np.ndarray, shape: tuple[int, int], degrees: float) -> np.ndarray:
    x, y = (points - [(shape[1] - 1) / 2, (shape[0] - 1) / 2]).T
    x = x + y * math.tan(math.radians(degrees))
    return np.stack([x + (shape[1] - 1) / 2, y + x * math.tan(math.radians(degrees)) + (shape[0] - 1) / 2], axis=1)


FORWARD: dict[str, tuple[Any, Any]] = {
    "rotate": (Rotate((20, 20)), lambda points, shape: _turned(points, shape, 20)),
    "shift": (
        Shift(limit_x=(0.0431, 0.0431), limit_y=(-0.0317, -0.0317)),
        lambda points, shape: points + np.array([0.0431 * shape[1], -0.0317 * shape[0]]),
    ),
    "scale": (Scale((0.17, 0.17)), lambda points, shape: _scaled(points, shape, 1.17)),
    "shrink": (Scale((-0.45, -0.45)), lambda points, shape: _scaled(points, shape, 0.55)),
    "shear": (Shear((9, 9)), lambda points, shape: _sheared(points, shape, 9)),
    "left-right": (Flip(), lambda points, shape: [shape[1] - 1, 0] + points * [-1, 1]),
    "top-bottom": (Flip("vertical"), lambda points, shape: [0, shape[0] - 1] + points * [1, -1]),
    "crop": (Crop((80, 101), at="center"), lambda points, shape: points - [(shape[1] - 101) // 2, (shape[0] - 80) // 2]),
}  # fmt: skip
CHAINS = [
    *[[name] for name in FORWARD],
    ["rotate", "shift", "scale", "shear"], ["shear", "left-right", "rotate", "crop"],
    ["crop", "shrink", "rotate"], ["scale", "top-bottom", "crop", "shift"],
]  # fmt: skip


@pytest.mark.parametrize("chain", CHAINS, ids="-".join)
def test_landmarks_go_where_the_transforms_say(chain):
    """After each transform and after chains, a landmark's centroid in the image and in the mask lie within 0.5 px of each other and
    of where the transforms, applied to the point one after another, move it.
    """
    expected, shape = LANDMARKS, (ROWS, COLUMNS)
    for name in chain:
        expected = FORWARD[name][1](expected, shape)
        shape = (80, 101) if name == "crop" else shape
    images, masks = transformed([FORWARD[name][0] for name in chain], *discs(LANDMARKS))
    assert images.shape[1:] == shape
    inside = ((expected > 8) & (expected < np.array(shape[::-1]) - 9)).all(axis=1)  # the discs with their edges
    assert inside.sum() >= 2
    found = centroids(images[inside])
    assert np.abs(found - expected[inside]).max() < 0.05
    assert np.abs(centroids(masks[inside]) - found).max() < 0.5


@pytest.mark.parametrize(
    "chain", [[Elastic(120, 8)], [Rotate(15), Elastic(60, 5), Scale(0.2), Crop((80, 100))], [Elastic(90, 9), Elastic(40, 4)]]
)
def test_landmarks_stay_together_through_elastic_fields(chain):
    """Image and mask take the same displacement, alone and between affine transforms, for each of some samples, and it is one of pixels."""
    moved = []
    for number in range(8):
        images, masks = transformed(chain, *discs(LANDMARKS), key=number.to_bytes(16, "big"))
        edges = np.concatenate([images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]], axis=1)
        kept = (edges.max(axis=1) == 0) & (images.max(axis=(1, 2)) > 0)
        assert np.abs(centroids(images[kept]) - centroids(masks[kept])).max() < 0.5
        moved.extend(np.abs(centroids(images[kept]) - LANDMARKS[kept]).max(axis=1))
    assert len(moved) > 20 and max(moved) > 2


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_no_strength_gives_the_input_bit_for_bit(dtype):
    """Limits of 0, alpha 0, p=0, a crop and a size as large as the image: every bit stays, of NaN, -0.0 and the smallest numbers too."""
    images = noise(2, 33, 47).astype(dtype) + dtype(1e-3)
    images[0, 3, :5] = [np.nan, -0.0, np.inf, -np.inf, np.finfo(dtype).smallest_subnormal]
    masks = noise(3, 33, 47, seed=1) > 0
    nothing = [Rotate(0), Shift(0), Scale(0), Shear(0), Elastic(0)]
    for chain in (
        [],
        *([one] for one in nothing),
        nothing,
        [Flip(p=0), Rotate(p=0), Elastic(p=0)],
        [Crop((33, 47))],
        [Flip(), Flip()],
        [Rotate((360, 360))],
    ):
        found = transformed(chain, images.copy(), masks.copy())
        assert found[0].tobytes() == images.tobytes() and found[1].tobytes() == masks.tobytes(), chain
    for fit in warping.FITS:
        assert transformed([], images.copy(), masks, size=(33, 47), fit=fit)[0].tobytes() == images.tobytes()
    assert transformed([Resample((0.5, 2))], images.copy(), masks, size=(33, 47), spacing=(0.5, 2.0))[0].tobytes() == images.tobytes()


DRAWN = [{"name": "rotate"}, {"name": "elastic", "p": 0.5}, {"name": "crop", "size": 40}, {"name": "flip", "p": 0.5}, {"name": "noise"}]
ELSEWHERE = """
import hashlib, json, sys
import numpy as np
from loaderd.warping import Pipeline
chain, keys = json.loads(sys.argv[1]), json.loads(sys.argv[2])
images = np.arange(64 * 64, dtype=np.float32).reshape(1, 64, 64)
run = Pipeline(chain, seed=-5, size=None, fit="crop", statistics=None)
for key in keys:
    out = np.empty((1, 40, 40), np.float32), np.empty((1, 40, 40), np.bool_)
    run(images.copy(), images > 2000, key=bytes.fromhex(key), epoch=3, spacing=None, out_images=out[0], out_masks=out[1])
    print(key, hashlib.sha256(out[0].tobytes() + out[1].tobytes()).hexdigest())
"""


def test_a_sample_is_the_same_on_any_worker():
    """Same seed, epoch and key: the same bits in another process that saw other samples before, in another order."""
    keys = [hashlib.sha256(bytes([number])).digest()[:16].hex() for number in range(12)]
    images = np.arange(64 * 64, dtype=np.float32).reshape(1, 64, 64)
    here = {}
    for key in keys:
        found = transformed(DRAWN, images.copy(), images > 2000, key=bytes.fromhex(key), epoch=3, seed=-5)
        here[key] = hashlib.sha256(found[0].tobytes() + found[1].tobytes()).hexdigest()
    command = [sys.executable, "-c", ELSEWHERE, json.dumps(transforms.checked(DRAWN)), json.dumps(keys[::-1] + keys[3:5])]
    there = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert [(key, here[key]) for key in keys[::-1] + keys[3:5]] == list(zip(there[::2], there[1::2], strict=True))
    assert len(set(here.values())) == len(keys)


def test_what_a_draw_depends_on():
    """Key, epoch and seed each make another sample; another p of one transform, or one more behind, changes no other's draw."""
    images = noise(1, 64, 64)
    chain = [Rotate(30), Flip(p=0.5), Crop(32)]
    found, _ = transformed(chain, images)
    for other in ({"key": KEY[:15] + b"x"}, {"key": b"x" + KEY[1:]}, {"epoch": 1}, {"seed": 8}, {"epoch": 7, "seed": 0}):
        assert not np.array_equal(transformed(chain, images, **other)[0], found), other
    always, never = transformed([Rotate(30), Crop(32)], images), transformed([Rotate(30), Crop(32), Shear(10, p=0)], images)
    assert np.array_equal(always[0], never[0])
    angles = {p: [_angle([Rotate(30, p=p)], number) for number in range(40)] for p in (0.4, 1.0)}
    kept = [(a, b) for a, b in zip(angles[0.4], angles[1.0], strict=True) if a != 0]
    assert 8 <= len(kept) <= 24 and all(a == b for a, b in kept)
    assert min(angles[1.0]) < -15 and max(angles[1.0]) > 15
    second = [_angle([Elastic(), Rotate(30)], number) for number in range(5)]  # behind one that draws much, and one that draws little
    assert second == [_angle([Flip(p=0), Rotate(30)], number) for number in range(5)] != angles[1.0][:5]


def _angle(chain: list[Any], number: int) -> float:
    run = pipeline(chain)
    run._state["state"]["counter"][2:] = number, 0
    matrix = run._draw(9, 9, np.zeros((0, 9, 9), np.bool_), None)._matrix
    return math.degrees(math.atan2(matrix[1, 0], matrix[0, 0]))


SCIPY = {"constant": "grid-constant", "nearest": "nearest", "reflect": "reflect", "wrap": "grid-wrap"}


@pytest.mark.parametrize("fill", SCIPY)
def test_a_chain_is_scipys_affine_transform(fill):
    """A chain's images are what SciPy makes of the multiplied matrices, to 1e-3 of white noise's standard deviation, also outside."""
    image = noise(61, 83)
    value = {"fill_value": 4.5} if fill == "constant" else {}
    steps = [(Rotate((35, 35), fill=fill, **value), 0), (Shift((0.21, 0.21)), 1), (Scale((0.1, 0.1)), 2), (Shear((-7, -7)), 3)]
    corners = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])  # where three points come from says the matrix
    shape = image.shape
    there = _turned(corners, shape, 35) + np.array([0.21 * 83, 0.21 * 61])
    there = _sheared(_scaled(there, shape, 1.1), shape, -7)
    forward = np.stack([there[1] - there[0], there[2] - there[0]], axis=1)  # (x, y) before → after
    back = np.linalg.inv(forward)[::-1, ::-1]  # rows first, as SciPy counts
    offset = -back @ there[0][::-1]
    expected = ndimage.affine_transform(image.astype(np.float64), back, offset=offset, order=1, mode=SCIPY[fill], cval=4.5)
    found, masks = transformed([one for one, _ in steps], image[None], image[None] > 0.3)
    assert np.abs(found[0] - expected).max() < 1e-3
    if fill != "constant":
        coverage = ndimage.affine_transform((image > 0.3).astype(np.float64), back, offset=offset, order=1, mode=SCIPY[fill])
        sure = np.abs(coverage - 0.5) > 0.01
        assert np.array_equal(masks[0][sure], coverage[sure] > 0.5)


def test_a_chain_is_one_resampling():
    """There and back is the identity, bit for bit; three turns of 10 degrees are one of 30, which three resamplings are far from."""
    image = noise(1, 64, 64)
    assert np.array_equal(transformed([Rotate((33, 33)), Shear((0, 0)), Rotate((-33, -33))], image)[0], image)
    at_once, _ = transformed([Rotate((30, 30))], image)
    assert np.abs(transformed([Rotate((10, 10))] * 3, image)[0] - at_once).max() < 1e-4
    one_by_one = image
    for _ in range(3):
        one_by_one, _ = transformed([Rotate((10, 10))], one_by_one)
    assert one_by_one[0, 20:44, 20:44].std() < 0.8 * at_once[0, 20:44, 20:44].std()


PADS: dict[str, dict[str, Any]] = {
    "constant": {"mode": "constant", "constant_values": -3.0}, "nearest": {"mode": "edge"},
    "reflect": {"mode": "symmetric"}, "wrap": {"mode": "wrap"},
}  # fmt: skip


@pytest.mark.parametrize("fill", PADS)
def test_fills_are_numpys_pads(fill):
    """What a window holds outside of the image is what numpy.pad puts there, in image and mask (False for a constant), copied exactly."""
    images, masks = noise(2, 10, 13).astype(np.float64), noise(1, 10, 13, seed=2) > 0
    padded = np.pad(images, [(0, 0), (25, 26), (30, 31)], **PADS[fill])
    seen = np.pad(masks, [(0, 0), (25, 26), (30, 31)], **{**PADS[fill], **({"constant_values": False} if fill == "constant" else {})})
    value = {"fill_value": -3} if fill == "constant" else {}
    found = transformed([Crop((61, 74), fill=fill, **value)], images, masks)
    assert np.array_equal(found[0], padded) and np.array_equal(found[1], seen)
    # Mirrored, and moved by whole pixels: 5 of 10 rows down, 13 columns to the left, that is out of the picture.
    found = transformed([Flip(), Shift(limit_x=(-1, -1), limit_y=(0.5, 0.5), fill=fill, **value)], images, masks)
    assert np.array_equal(
        found[0],
        padded[:, 20:30, 17:30] if fill == "constant" else np.pad(images[:, :, ::-1], [(0, 0), (5, 0), (0, 13)], **PADS[fill])[:, :10, 13:],
    )
    found = transformed([], images, masks, size=(61, 74), fit="pad")
    assert np.array_equal(found[0], np.pad(images, [(0, 0), (25, 26), (30, 31)]))


def test_sizes_fit():
    """crop cuts and fills at the same scale; resize takes means where it shrinks; pad shrinks what is too large, in proportion."""
    image = noise(1, 40, 60)
    assert np.array_equal(transformed([], image, size=(31, 80))[0], np.pad(image[:, 4:35], [(0, 0), (0, 0), (10, 10)]))
    halves, _ = transformed([], image, size=(20, 30), fit="resize")
    assert np.abs(halves - image.reshape(1, 20, 2, 30, 2).mean(axis=(2, 4))).max() < 1e-4
    thirds, _ = transformed([], image, size=(40, 20), fit="resize")
    assert np.abs(thirds - image.reshape(1, 40, 20, 3).mean(axis=3)).max() < 1e-4
    padded, _ = transformed([], image, size=(40, 30), fit="pad")
    assert np.abs(padded[:, 10:30] - halves).max() < 1e-4 and not padded[:, :10].any() and not padded[:, 30:].any()
    ramp = np.broadcast_to(np.arange(60, dtype=np.float32), (1, 40, 60))
    wide, _ = transformed([], ramp, size=(40, 120), fit="resize")
    assert np.allclose(wide[0, :, 1:-1], np.arange(1, 119) / 2 - 0.25, atol=1e-4)  # centres of pixels half as large
    whole = np.ones((1, 40, 60), np.bool_)
    for fit, area in (("crop", 31 * 60), ("pad", 31 * 46), ("resize", 31 * 80)):
        assert abs(int(transformed([], image, whole, size=(31, 80), fit=fit)[1].sum()) - area) <= 31, fit


def test_any_float_and_any_strides_are_filled():
    """The output may be float16, or (H, W, C) seen as (C, H, W): the same numbers as in float32, rounded once."""
    images, masks = noise(3, 20, 24), noise(2, 20, 24, seed=1) > 0
    for chain in ([Rotate(20)], [Flip()], [Rotate(20), {"name": "gamma"}]):
        plain, seen = transformed(chain, images.copy(), masks.copy())
        slot = np.empty((20, 24, 3), np.float32)
        pipeline(chain)(images.copy(), masks, key=KEY, epoch=0, spacing=None, out_images=slot.transpose(2, 0, 1), out_masks=seen)
        assert np.array_equal(slot, plain.transpose(1, 2, 0))
        assert np.array_equal(transformed(chain, images.copy(), masks, dtype=np.float16)[0], plain.astype(np.float16))
    with pytest.raises(ValueError, match="3×20×24"):
        pipeline([])(images, masks, key=KEY, epoch=0, spacing=None, out_images=np.empty((3, 20, 23), np.float32), out_masks=masks)


def test_crops():
    """A random window is a copy of a part of the image and takes every place; one at the mask holds the mask and its margin."""
    image = np.arange(12 * 15, dtype=np.float32).reshape(1, 12, 15)
    places = set()
    for number in range(400):
        found = transformed([Crop((9, 11))], image, key=number.to_bytes(16, "little"))[0][0]
        top, left = divmod(int(found[0, 0]), 15)
        assert np.array_equal(found, image[0, top : top + 9, left : left + 11])
        places.add((top, left))
    assert places == {(top, left) for top in range(4) for left in range(5)}
    assert np.array_equal(transformed([Crop((9, 12), at="center")], image)[0][0], image[0, 1:10, 1:13])

    y, x = np.mgrid[:96, :128]
    masks = np.stack([np.hypot(x - 30, y - 70) < 9, np.hypot(x - 44, y - 60) < 6])
    marked = masks.any(axis=0).astype(np.float32)[None]
    seen = set()
    for number in range(60):
        _, found = transformed([Crop(48, at="mask", margin=5)], marked, masks, key=number.to_bytes(16, "big"))
        assert found.sum() == masks.sum() and not found[:, :5].any() and not found[:, :, :5].any() and not found[:, :, -5:].any()
        seen.add(np.flatnonzero(found.any(axis=(0, 1)))[0])
        # The same after a turn and a field: the whole mask is in the window, and not at its edge.
    # Behind a turn and a field the box is where they brought the mask: the window misses nothing of it.
    disc = np.hypot(x - 84, y - 45)[None] < 6
    for chain, window in (([Rotate((90, 90))], 20), ([Rotate((70, 70)), Elastic(700, 20), Scale((0.1, 0.1))], 32)):
        for number in range(8):
            _, everything = transformed(chain, marked, disc, key=number.to_bytes(16, "big"))
            _, found = transformed([*chain, Crop(window, at="mask", margin=2)], marked, disc, key=number.to_bytes(16, "big"))
            assert found.sum() == everything.sum() > 60 and not found[:, :1].any() and not found[:, :, :1].any()
    assert len(seen) > 5
    _, found = transformed([Crop(10, at="mask", margin=5)], marked, masks)  # too small for the box: its middle
    assert found.any()
    empty, _ = transformed([Crop((9, 12), at="mask")], image, np.zeros((1, 12, 15), np.bool_))
    assert np.array_equal(empty[0], image[0, 1:10, 1:13])


def test_resampled_to_millimetres():
    """A disc of 12 mm on pixels of 2 × 0.75 mm becomes round, its area in mm² and its middle stay; without spacing: an error."""
    y, x = np.mgrid[:50, :120]
    disc = np.hypot((y - 24.5) * 2.0, (x - 59.5) * 0.75) <= 12
    images, masks = transformed(
        [Resample(0.5), Crop((160, 170), at="center")], disc[None].astype(np.float32), disc[None], spacing=(2.0, 0.75)
    )
    assert masks.sum() * 0.25 == pytest.approx(disc.sum() * 1.5, rel=0.02)
    rows, columns = (np.flatnonzero(masks[0].any(axis=axis)) for axis in (1, 0))
    assert abs((rows[-1] - rows[0]) - (columns[-1] - columns[0])) <= 4  # two pixels of the input
    assert np.abs(centroids(masks) - [[84.5, 79.5]]).max() < 0.3 and np.abs(centroids(images) - [[84.5, 79.5]]).max() < 0.3
    for spacing in (None, (0.0, 1.0), (1.0, math.nan)):
        with pytest.raises(FileError, match="distance between its pixels") as caught:
            transformed([Resample(1), Crop(8)], disc[None].astype(np.float32), spacing=spacing)
        assert caught.value.code == "no-spacing"


def test_masks_are_right_to_the_sub_pixel():
    """Turned discs are, by Dice, nearer to the turned polygon's raster than nearest pixels would be, their area is right, and moved by half
    a pixel they keep it.
    """
    random = np.random.default_rng(3)
    ours, nearest, areas = [], [], []
    for number in range(30):
        angle = np.linspace(0, 2 * np.pi, 60, endpoint=False)
        ring = np.stack([70 + random.random() + 12 * np.cos(angle), 52 + random.random() + 12 * np.sin(angle)], axis=1)
        mask = _raster(ring)
        degrees = float(random.uniform(-180, 180))
        _, found = transformed([Rotate((degrees, degrees))], mask[None].astype(np.float32), mask[None])
        expected = _raster(_turned(ring, mask.shape, degrees))
        y, x = np.mgrid[:ROWS, :COLUMNS]
        source = np.rint(_turned(np.stack([x.ravel(), y.ravel()], axis=1), mask.shape, -degrees)).astype(int)
        plain = mask[source[:, 1].clip(0, ROWS - 1), source[:, 0].clip(0, COLUMNS - 1)].reshape(mask.shape)
        ours.append(_dice(found[0], expected))
        nearest.append(_dice(plain, expected))
        areas.append(found.sum() / expected.sum())
        half = (0.5 + number % 3) / COLUMNS, (number % 2 - 0.5) / ROWS
        moved = transformed([Shift(limit_x=(half[0], half[0]), limit_y=(half[1], half[1]))], mask[None].astype(np.float32), mask[None])
        assert moved[1].sum() == pytest.approx(mask.sum(), rel=0.03)
    assert np.mean(ours) > 0.983 > np.mean(nearest) and abs(np.mean(areas) - 1) < 0.005


def _raster(ring: np.ndarray) -> np.ndarray:
    return contours.rasterise([ring], ROWS, COLUMNS, convention="centre")


def _dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def test_an_elastic_field_is_as_strong_as_simards():
    """Pixels move by 0.16 · alpha / sigma in each direction (root mean square), smoothly for any sigma, and less at the edges."""
    edges = []
    for alpha, sigma in ((40, 4), (200, 10), (600, 17)):
        y, x = np.mgrid[:128, :128].astype(np.float32)
        fields = []
        for number in range(6):
            found, _ = transformed([Elastic(alpha, sigma, fill="nearest")], np.stack([x, y]), key=number.to_bytes(16, "big"))
            fields.append(found - [x, y])
        moved = np.stack(fields)[:, :, 32:-32, 32:-32]
        edges.append(np.stack(fields)[:, :, 0].std() / moved.std())
        assert moved.std() == pytest.approx(alpha / (2 * math.sqrt(3 * math.pi) * sigma), rel=0.25)
        assert np.diff(moved, axis=-1).std() == pytest.approx(moved.std() / (math.sqrt(2) * sigma), rel=0.2)
    assert np.mean(edges) < 1


def test_a_field_lies_where_it_stands_in_the_list():
    """Between a shift and its opposite a field is the same field, seen from 16 pixels beside, and x and y have each their own."""
    y, x = np.mgrid[:128, :128].astype(np.float32)
    moved = {}
    for right in (0, 0.125):
        chain = [Shift(limit_x=(right, right), limit_y=0), Elastic(200, 10, fill="nearest"), Shift(limit_x=(-right, -right), limit_y=0)]
        moved[right] = transformed(chain, np.stack([x, y]))[0] - [x, y]
    assert np.abs(moved[0.125][:, 24:-24, 24:-40] - moved[0][:, 24:-24, 40:-24]).max() < 1e-3
    assert abs(np.corrcoef(moved[0][:, 24:-24, 24:-24].reshape(2, -1))[0, 1]) < 0.5


def test_large_images():
    """Up to 32,766 rows or columns are interpolated; beyond, mirroring works still and interpolating says what is too large, before it
    takes gigabytes."""
    image = np.arange(32_766 * 3, dtype=np.float32).reshape(1, 3, 32_766)
    found, _ = transformed([Shift(limit_x=(0.5 / 32_766, 0.5 / 32_766), limit_y=0)], image)
    assert np.array_equal(found[0, :, 1:], image[0, :, 1:] - 0.5)
    image = np.zeros((1, 3, 40_000), np.float32)
    image[0, 0, 0] = 1
    assert transformed([Flip()], image)[0][0, 0, -1] == 1
    for chain in ([Rotate((5, 5))], [Elastic()]):
        with pytest.raises(FileError, match="3×40000") as caught:
            transformed(chain, image)
        assert caught.value.code == "too-large"
    with pytest.raises(FileError, match="64000×64000"):  # in between, though the image and the window are small
        transformed([Resample(0.001), Elastic(), Crop(8)], noise(1, 64, 64), spacing=(1.0, 1.0))


def test_without_opencv(monkeypatch):
    """A missing OpenCV, or one that rounds coordinates, is one line that says what to install."""
    import cv2

    warping.opencv.cache_clear()
    try:
        with monkeypatch.context() as patched:
            patched.setattr(cv2, "__version__", "4.13.0")
            with pytest.raises(UsageError, match="need OpenCV 5"):
                pipeline([])
            patched.setitem(sys.modules, "cv2", None)
            with pytest.raises(UsageError, match=r"pip install 'scanfeed\[transforms\]'"):
                pipeline([])
    finally:
        warping.opencv.cache_clear()


REFUSED = [
    ("rotate", "transforms='rotate': must be a list"),
    ({"name": "rotate"}, "must be a list"),
    (["rotate"], "transforms[0]: 'rotate': must be a transform"),
    ([Flip(), {"limit": 3}], "transforms[1]: name=None: there is none of this name; there are rotate, shift,"),
    ([{"name": "rotatr"}], "transforms[0]: name='rotatr': there is none"),
    ([{"name": "rotate", "degrees": 3}], "transforms[0]: rotate: 'degrees' is none of its arguments; there are p, fill"),
    ([{"name": "rotate", "limit": "3"}], "transforms[0]: rotate: limit='3': must be a number, or (lowest, highest) from -360 to 360"),
    ([{"name": "rotate", "limit": True}], "limit=True: must be"),
    ([{"name": "rotate", "limit": -3}], "limit=-3: must be"),
    ([{"name": "rotate", "limit": [3, -3]}], "limit=[3, -3]: must be"),
    ([{"name": "rotate", "limit": [1, 2, 3]}], "limit=[1, 2, 3]: must be"),
    ([{"name": "rotate", "limit": math.nan}], "limit=nan: must be"),
    ([{"name": "rotate", "limit": 10**400}], "limit=1000"),
    ([{"name": "rotate", "p": 1.5}], "transforms[0]: rotate: p=1.5: must be a number from 0 to 1"),
    ([{"name": "scale", "limit": 1}], "scale: limit=1: must be a number, or (lowest, highest) from -0.99 to 99"),
    ([{"name": "flip", "axis": "diagonal"}], "axis='diagonal': must be one of 'horizontal', 'vertical'"),
    ([{"name": "elastic", "sigma": 0}], "sigma=0: must be a number from 0.5 to 1000"),
    ([{"name": "crop"}], "transforms[0]: crop: size is missing"),
    ([{"name": "crop", "size": 0}], "size=0: must be one whole number from 1 to 32766, or (rows, columns)"),
    ([{"name": "crop", "size": [3]}], "size=[3]: must be"),
    ([{"name": "crop", "size": 9, "margin": 2}], "margin=2: must be left out unless at='mask'"),
    ([{"name": "resample", "spacing": 0}], "spacing=0: must be millimetres"),
    ([{"name": "rotate", "fill": "mirror"}], "fill='mirror': must be one of 'constant', 'nearest', 'reflect', 'wrap'"),
    ([{"name": "flip", "fill_value": math.inf}], "fill_value=inf: must be a number"),
    ([{"name": "rotate", "fill": "wrap", "fill_value": 1}], "fill_value=1.0: must be left out"),
    ([Rotate(fill="wrap"), Shift(fill="nearest")],
     "transforms[1]: shift: fill='nearest': all geometry is one resampling, and transforms[0]: rotate says"),
    ([Rotate(fill="wrap"), Shift(fill_value=2)],
     "transforms[1]: shift: fill_value=2.0: transforms[0]: rotate says fill='wrap', which has no constant"),
    ([Resample(1)], "transforms[0]: resample: samples would differ in size after it; add a crop behind it, or size="),
    ([Crop(8), Resample(1), Flip()], "transforms[1]: resample: samples would differ"),
    ([Crop(8, p=0.5)], "transforms[0]: crop: samples would differ"),
]  # fmt: skip


@pytest.mark.parametrize(("given_one", "line"), REFUSED, ids=[line[:60] for _, line in REFUSED])
def test_refusals_say_where_and_what(given_one, line):
    """What is no list of transforms is refused in one line: which transform, which argument, what it must be."""
    with pytest.raises(UsageError) as caught:
        transforms.checked(given_one)
    assert line in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_the_one_form():
    """The form keeps what differs from the defaults; ways to say the same have one form; it comes back from JSON as it was."""
    given_ways = [
        Rotate(15),
        Rotate((-15, 15), p=1),
        {"name": "rotate", "limit": 15},
        {"name": "rotate", "limit": [-15, 15.0], "p": 1, "fill": None},
    ]
    assert transforms.checked(given_ways) == ({"name": "rotate", "limit": 15.0},) * 4
    found = transforms.checked([Crop(64, at="mask", margin=4.0), Shift(0.1, limit_y=0), Resample((1, 2), p=0)])
    assert found == (
        {"name": "crop", "size": [64, 64], "at": "mask", "margin": 4},
        {"name": "shift", "limit": 0.1, "limit_y": 0.0},
        {"name": "resample", "spacing": [1.0, 2.0], "p": 0.0},
    )
    assert transforms.checked(json.loads(json.dumps(found))) == found
    assert json.dumps(transforms.checked([Shift(-0.0, limit_y=-0.0)])) == json.dumps(transforms.checked([Shift(0, limit_y=0)]))
    assert transforms.build(found)[0] == Crop((64, 64), at="mask", margin=4)


def test_output_sizes():
    """The size that every sample has: the stream's, else the last crop's, else None for as it came."""

    def sized(*chain, size=None):
        return transforms.output_size(transforms.checked(list(chain), size), size)

    assert sized() is None and sized(Rotate(), Elastic()) is None
    assert sized(Crop((8, 9)), Rotate()) == (8, 9) and sized(Crop(8), Crop(5)) == (5, 5) and sized(Resample(1), Crop(8)) == (8, 8)
    assert sized(Crop(8), size=(3, 4)) == (3, 4) and sized(Resample(1), size=(3, 4)) == (3, 4)
    assert sized(Crop(8), Crop(8, p=0.5)) == (8, 8) and sized(Crop(8), Crop(4, p=0)) == (8, 8)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["constant", "wrap", "mask", "image", "dataset"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)
ARGUMENTS = sorted({name for one in transforms.REGISTRY.values() for name in one.__dataclass_fields__})


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.builds(
            lambda name, arguments: {**arguments, "name": name},
            st.sampled_from(list(transforms.REGISTRY)) | JSON,
            st.dictionaries(
                st.sampled_from(ARGUMENTS),
                JSON | st.floats(0, 2) | st.integers(0, 50) | st.lists(st.floats(-3, 3), min_size=2, max_size=2),
                max_size=3,
            ),
        )
        | JSON,
        max_size=3,
    )
    | JSON
)
def test_any_json_is_refused_or_has_one_form(given_one):
    """Whatever a socket or a file may hold: a UsageError of one line, or dicts that JSON keeps and that are accepted unchanged."""
    try:
        found = transforms.checked(given_one)
    except UsageError as error:
        assert "\n" not in str(error)
        return
    again = json.loads(json.dumps(found, allow_nan=False))
    assert json.dumps(transforms.checked(again)) == json.dumps(found) == json.dumps(again)
    assert len(transforms.build(found)) == len(found)
    transforms.output_size(found, None)
    transforms.needs_statistics(found)
