"""Transforms of values: each against plain numpy, SciPy or pydicom; what zero strength, constants, NaN and a user's faults do."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.pixels import apply_windowing

from catalog.errors import UsageError
from loaderd import user
from loaderd.arguments import Transform, TransformError
from loaderd.intensity import (
    TRANSFORMS,
    Blur,
    Brightness,
    ChannelShift,
    Contrast,
    Gamma,
    MinMax,
    Noise,
    Percentile,
    User,
    Window,
    ZScore,
    percentiles,
)  # fmt: skip

scipy_ndimage = pytest.importorskip("scipy.ndimage")
pytest.importorskip("cv2")

NO_MASKS = np.zeros((0, 1, 1), np.bool_)
NORMALISED = [ZScore(), MinMax(), MinMax(output=(-1, 3)), Percentile(), Percentile(lower=20, upper=21), Window(center=40, width=400)]
EACH = [Gamma(limit=0.5), Brightness(), Contrast(), ChannelShift(), Noise(), Blur(sigma=3), *NORMALISED]
SEEDS = st.integers(0, 2**64 - 1)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


def picture(dtype: str = "float32", channels: int = 2, seed: int = 0, low: float = -1000, scale: float = 500) -> np.ndarray[Any, Any]:
    """An image with a dark ground, structure and a long tail, in units of nothing in particular."""
    values = rng(seed).gamma(0.7, 1, (channels, 40, 56))
    return (scipy_ndimage.gaussian_filter(values, (0, 2, 2)) * scale + low).astype(dtype)


def applied(transform: Any, images: np.ndarray[Any, Any], seed: int = 0, statistics: Any = None) -> np.ndarray[Any, Any]:
    """What a transform makes of a copy."""
    result = np.array(images)
    transform.apply(result, NO_MASKS, rng(seed), statistics)
    assert result.dtype == images.dtype
    return result


def named(transform: Transform) -> str:
    return json.dumps(transform.to_json())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_strengths_are_those_of_the_formulas(dtype: str) -> None:
    """Gamma, brightness, contrast and channel shift are their formulas in float64, over all channels together."""
    images = picture(dtype)
    values = images.astype(np.float64)
    least, largest, mean, deviation = values.min(), values.max(), values.mean(), values.std()
    close = {"rtol": 1e-5, "atol": 1e-4 * deviation}
    for d in (-0.5, 0.3):
        expected = ((values - least) / (largest - least)) ** (1 + d) * (largest - least) + least
        np.testing.assert_allclose(applied(Gamma(limit=(d, d)), images), expected, **close)
        np.testing.assert_allclose(applied(Brightness(limit=(d, d)), images), values + d * deviation, **close)
        np.testing.assert_allclose(applied(Contrast(limit=(d, d)), images), (values - mean) * (1 + d) + mean, **close)
        np.testing.assert_allclose(applied(ChannelShift(limit=(d, d)), images), values + d * deviation, **close)
    shifts = (applied(ChannelShift(limit=1), images) - values).mean(axis=(1, 2)) / deviation
    assert np.abs(shifts).max() <= 1 + 1e-5
    assert abs(shifts[0] - shifts[1]) > 1e-3


@pytest.mark.parametrize(
    ("kind", "argument", "limit", "range_"),
    [(Brightness, "limit", 0.2, (-0.2, 0.2)), (Brightness, "limit", [0.5, 0.6], (0.5, 0.6)), (Noise, "std", 0.5, (0, 0.5)),
     (Noise, "std", [1, 1.5], (1, 1.5))],
)  # fmt: skip
def test_strengths_are_drawn_from_the_whole_range(kind: Any, argument: str, limit: Any, range_: tuple[float, float]) -> None:
    """A number is a range around 0 (noise: from 0), a pair is the range itself; it is used up to its ends, evenly."""
    images = picture(channels=1)
    changes = [(applied(kind(**{argument: limit}), images, seed) - images) / images.std() for seed in range(300)]
    found = np.array([change.mean() if kind is Brightness else change.std() for change in changes])
    low, high = range_
    slack = 0.05 * high if kind is Noise else 1e-4
    assert low - slack <= found.min() < low + 0.1 * (high - low)
    assert high - 0.1 * (high - low) < found.max() <= high + slack
    assert found.mean() == pytest.approx((low + high) / 2, abs=0.07 * (high - low))


@given(seed=SEEDS, values=st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=12, max_size=12))
@settings(max_examples=50, deadline=None)
def test_zero_strength_leaves_every_bit(seed: int, values: list[float]) -> None:
    """A strength of 0 gives the image bit for bit, whatever its values: also -0.0, NaN and infinity."""
    images = np.array(values, np.float32).reshape(2, 2, 3)
    for transform in (Gamma(limit=0), Brightness(limit=0), Contrast(limit=0), ChannelShift(limit=0), Noise(std=0), Blur(sigma=0)):
        assert applied(transform, images, seed).tobytes() == images.tobytes(), transform


@pytest.mark.parametrize("transform", EACH, ids=named)
def test_the_generator_alone_decides(transform: Any) -> None:
    """The same generator gives the same bits whatever was drawn elsewhere, with or without masks, which stay; another one differs."""
    import cv2

    images = picture()
    masks = rng(1).random((1, 40, 56)) < 0.5
    kept = masks.copy()
    first = applied(transform, images, 7)
    cv2.setRNGSeed(3)
    np.random.seed(3)
    again = images.copy()
    transform.apply(again, masks, rng(7), None)
    assert first.tobytes() == again.tobytes()
    assert np.array_equal(masks, kept)
    if transform not in NORMALISED:
        assert not np.array_equal(first, applied(transform, images, 8))
    assert not np.array_equal(first, images)


@given(factor=st.floats(0.01, 100), offset=st.floats(-1, 1), seed=SEEDS)
@settings(max_examples=25, deadline=None)
def test_units_do_not_matter(factor: float, offset: float, seed: int) -> None:
    """f(a·x + b) = a·f(x) + b: so in Hounsfield, in arbitrary units, or after a normalisation the same thing happens."""
    images = picture("float64", low=0, scale=1)
    for transform in (Gamma(limit=0.5), Brightness(limit=1), Contrast(limit=0.9), ChannelShift(limit=1), Noise(std=1), Blur(sigma=3)):
        expected = applied(transform, images, seed) * factor + offset
        np.testing.assert_allclose(applied(transform, images * factor + offset, seed), expected, rtol=1e-4, atol=1e-5 * factor)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("value", [0.0, 0.1, -1024.0, 3e7])
def test_a_constant_image_stays_finite(value: float, dtype: str) -> None:
    """A constant image gives no NaN: z-score 0, a range's low end, a window's linear value, and itself from everything else."""
    images = np.full((1, 100, 77), value, dtype)
    for transform in EACH:
        result = applied(transform, images)
        if transform in NORMALISED:
            expected = {"zscore": 0.0, "window": np.clip((value - 39.5 + 199.5) / 399, 0, 1)}.get(transform.name)
            expected = transform.output[0] if expected is None else expected
            np.testing.assert_allclose(result, expected, atol=1e-6, err_msg=named(transform))
        else:
            np.testing.assert_allclose(result, images, rtol=1e-6, err_msg=named(transform))


@given(seed=SEEDS, low=st.floats(-1e4, 1e4), scale=st.floats(1, 1e4))
@settings(max_examples=25, deadline=None)
def test_normalised_is_what_it_says(seed: int, low: float, scale: float) -> None:
    """Z-score: mean 0 and deviation 1. Min–max and percentile: within their range, both ends reached, the order of values kept."""
    images = picture(seed=seed, low=low, scale=scale)
    result = applied(ZScore(), images).astype(np.float64)
    slack = 1e-5 * max(1.0, abs(float(images.mean())) / float(images.std()))
    assert result.mean() == pytest.approx(0, abs=slack)
    assert result.std() == pytest.approx(1, abs=slack)
    for transform, ends in ((MinMax(output=(-1, 3)), images), (Percentile(lower=5, upper=90), np.percentile(images, (5, 90)))):
        result = applied(transform, images)
        low_, high_ = transform.output  # type: ignore[attr-defined]
        assert (result.min(), result.max()) == pytest.approx((low_, high_), abs=1e-6)
        assert low_ <= result.min()
        assert result.max() <= high_
        inside = np.clip((images - ends.min()) / (ends.max() - ends.min()), 0, 1) * (high_ - low_) + low_
        rounded = 4e-7 * float(np.abs(images).max()) / float(ends.max() - ends.min())  # float32's steps, as a share of the range
        np.testing.assert_allclose(result, inside, atol=1e-5 + rounded * (high_ - low_))


@given(
    seed=SEEDS,
    wanted=st.lists(st.floats(0, 100), min_size=1, max_size=3),
    power=st.sampled_from([0.1, 1, 8]),
    air=st.floats(0, 1),
    levels=st.sampled_from([0, 3, 1000]),
    odd=st.sampled_from([None, np.nan, np.inf, -np.inf]),
    dtype=st.sampled_from(["float32", "float64"]),
)
@settings(max_examples=60, deadline=None)
def test_percentiles_are_numpy_s(
    seed: int, wanted: list[float], power: float, air: float, levels: int, odd: float | None, dtype: str
) -> None:
    """The quick percentiles are np.percentile's of the finite pixels, whatever the distribution: ties, tails, half of it air."""
    numbers = rng(seed)
    images = (numbers.random((1, 160, 130)) ** power * 3000 - 1000).astype(dtype)
    if levels:
        images = np.round(images * (levels / 3000)).astype(dtype)
    images[numbers.random(images.shape) < air] = -1000
    if odd is not None:
        images[0, 3, 3:5] = odd
    expected = np.percentile(images[np.isfinite(images)].astype(np.float64), wanted)
    np.testing.assert_allclose(percentiles(images, tuple(wanted)), expected, rtol=1e-6, atol=1e-4)


@given(center=st.floats(-1000, 1000), width=st.floats(1, 4000))
@settings(max_examples=40, deadline=None)
def test_a_window_is_dicom_s(center: float, width: float) -> None:
    """A window gives pydicom's LINEAR function (PS3.3 C.11.2.1.2.1), brought to the output's range."""
    stored = np.arange(-2048, 2048, dtype=np.int16).reshape(64, 64)
    header = pydicom.Dataset()
    header.PhotometricInterpretation, header.BitsStored, header.PixelRepresentation = "MONOCHROME2", 12, 1
    header.WindowCenter, header.WindowWidth = float(f"{center:.6g}"), float(f"{width:.6g}")
    expected = (apply_windowing(stored, header) + 2048) / 4095
    window = Window(center=float(header.WindowCenter), width=float(header.WindowWidth), output=(-1, 1))
    result = applied(window, stored[np.newaxis].astype(np.float64))[0]
    np.testing.assert_allclose(result, expected * 2 - 1, atol=1e-9)
    np.testing.assert_allclose(applied(window, stored[np.newaxis].astype(np.float32))[0], expected * 2 - 1, atol=1e-3)


@pytest.mark.parametrize(
    ("transform", "keys"),
    [(ZScore(over="dataset"), ("mean", "std")), (MinMax(over="dataset", output=(0, 2)), ("min", "max")),
     (Percentile(lower=2, upper=99.5, over="dataset"), ("p2", "p99.5"))],
)  # fmt: skip
def test_over_the_dataset_takes_what_was_looked_up(transform: Any, keys: tuple[str, str]) -> None:
    """Over the dataset a transform names the statistics that it needs and uses them instead of the image's; without them it says so."""
    images = picture()
    assert transform.statistics == keys
    assert type(transform)().statistics == ()
    result = applied(transform, images, statistics={keys[0]: -990.0, keys[1]: 250.0})
    values = images.astype(np.float64)
    expected = (values + 990) / 250 if transform.name == "zscore" else np.clip((values + 990) / 1240, 0, 1) * transform.output[1]
    np.testing.assert_allclose(result, expected, atol=1e-4)
    with pytest.raises(TransformError, match=f"{transform.name}: the stream has no statistics {keys[0]} and {keys[1]}"):
        applied(transform, images, statistics={"mean": 0.0})


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_does_not_count(odd: float) -> None:
    """NaN and infinities change no other pixel's result; NaN stays NaN, infinity becomes an end where there are ends."""
    images = picture()
    spoilt = images.copy()
    where = np.zeros(images.shape, np.bool_)
    where[1, 5, 7] = True
    images[where] = images[~where].min()  # as good as not there
    spoilt[where] = odd
    for transform in (Gamma(), MinMax(), Percentile(lower=1, upper=99), Window(center=0, width=500)):
        result, expected = applied(transform, spoilt), applied(transform, images)
        np.testing.assert_allclose(result[~where], expected[~where], rtol=1e-3, atol=5e-3, err_msg=named(transform))
        if transform.name != "gamma":
            ends = {True: 1.0, False: 0.0}
            assert np.array_equal(result[where], [np.nan if np.isnan(odd) else ends[odd > 0]], equal_nan=True)
    values = images[~where].astype(np.float64)
    np.testing.assert_allclose(applied(ZScore(), spoilt)[~where], (values - values.mean()) / values.std(), atol=1e-4)
    np.testing.assert_allclose(applied(Brightness(limit=(1, 1)), spoilt)[~where], values + values.std(), rtol=1e-4)


def test_noise_is_gaussian_and_independent() -> None:
    """Noise is normal with the deviation asked for, independent between neighbours and channels, and even the first pixel is fair."""
    images = np.zeros((2, 256, 256), np.float32)
    images[0, 0, 0] = 1  # so that there is a deviation at all
    deviation = float(images.std())
    noise = (applied(Noise(std=(2, 2)), images, 5) - images) / (2 * deviation)
    assert abs(noise.mean()) < 0.02
    for within, share in ((0.5, 0.38292), (1, 0.68269), (2, 0.95450), (3, 0.99730)):
        assert np.mean(np.abs(noise) < within) == pytest.approx(share, abs=5 * (share * (1 - share) / noise.size) ** 0.5)
    for one, other in ((noise[0], noise[1]), (noise[:, 1:], noise[:, :-1]), (noise[..., 1:], noise[..., :-1])):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.02
    small = images[:1, :2, :2]
    first = [applied(Noise(std=(1, 1)), small, seed)[0, 0, 0] - 1 for seed in range(400)]
    assert 0.4 < np.mean(np.array(first) > 0) < 0.6


@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.7, 12.0])
def test_blur_is_scipy_s(sigma: float) -> None:
    """Blur is scipy.ndimage.gaussian_filter, mirrored at the edges, each channel for itself; also wider than the image."""
    images = picture()
    expected = scipy_ndimage.gaussian_filter(images.astype(np.float64), (0, sigma, sigma), mode="reflect", truncate=4)
    np.testing.assert_allclose(applied(Blur(sigma=(sigma, sigma)), images), expected, atol=1e-3 * float(images.std()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Gamma(limit=1), "limit=1: must be a number, or (lowest, highest) above -1 on"),
        (lambda: Gamma(limit=(-1.5, 0)), "limit=(-1.5, 0): must be"),
        (lambda: Contrast(limit=(0.2, 0.1)), "limit=(0.2, 0.1): must be"),
        (lambda: Brightness(limit="a lot"), "limit='a lot': must be"),  # type: ignore[arg-type]
        (lambda: Brightness(limit=True), "limit=True: must be"),
        (lambda: ChannelShift(limit=float("nan")), "limit=nan: must be"),
        (lambda: Noise(std=-1), "std=-1: must be a number from 0 on"),
        (lambda: Noise(std=(-1, 1)), "std=(-1, 1): must be (lowest, highest) from 0 on"),
        (lambda: Blur(sigma=101), "sigma=101: must be a number from 0 to 100"),
        (lambda: ZScore(over="epoch"), "over='epoch': must be one of 'image', 'dataset'"),
        (lambda: MinMax(output=(1, 0)), "output=(1, 0): must be (lowest, highest)"),
        (lambda: MinMax(output=(0, float("inf"))), "output=(0, inf): must be (lowest, highest)"),
        (lambda: Percentile(lower=5, upper=5), "upper=5.0: must be above lower=5"),
        (lambda: Percentile(upper=101), "upper=101: must be a number from 0 to 100"),
        (lambda: Window(center=0, width=0.5), "width=0.5: must be a number from 1 on"),
        (lambda: Brightness(p=1.5), "p=1.5: must be a number from 0 to 1"),
        (lambda: User(function="noise"), "function='noise': must be 'package.module:function'"),
        (lambda: User(function=rng), "must be 'package.module:function'"),  # type: ignore[arg-type]
        (lambda: User(function="os.path:2"), "function='os.path:2': must be 'package.module:function'"),
        (lambda: User(function="__main__:noise"), "must be in a module that other processes can import"),
        (lambda: User(function="a:b", arguments={"x": float("nan")}), "must be a mapping of what JSON knows"),
        (lambda: User(function="a:b", arguments={"x": np.ones(2)}), "must be a mapping of what JSON knows"),
        (lambda: User(function="a:b", arguments={"x": "\0"}), "must be a mapping of what JSON knows"),
        (lambda: User(function="a:b", arguments={"x": "\ud800"}), "must be a mapping of what JSON knows"),
        (lambda: User(function="a:b", arguments=[1]), "arguments=[1]: must be a mapping from names to values"),  # type: ignore[arg-type]
        (lambda: User(function="a:b", arguments={1: 2}), "must be a mapping from names to values"),  # type: ignore[dict-item]
    ],
)
def test_wrong_arguments_are_said(make: Any, message: str) -> None:
    """A wrong argument is refused where it is written, in one line: which, what, and what it must be."""
    with pytest.raises(UsageError) as caught:
        make()
    assert message.replace(" above -1 on", " above -1") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "transform",
    [*EACH, Gamma(limit=[0.1, 0.3], p=0.5), Noise(std=[0, 2]), User(function="a.b:c"),  # type: ignore[arg-type]
     User(function="a:b", arguments={"x": [1, {"y": None}]})],
    ids=named,
)  # fmt: skip
def test_json_is_a_fixed_point(transform: Transform) -> None:
    """A transform is its JSON: written, read and written again it is the same, and it holds what differs from the defaults alone."""
    written = json.loads(json.dumps(transform.to_json()))
    name = written.pop("name")
    kind = {one.name: one for one in TRANSFORMS}[name]
    again = kind(**written)
    assert again == transform
    assert again.to_json() == transform.to_json()
    if kind not in (User, Window):
        assert kind().to_json() == {"name": name}


def test_one_meaning_has_one_form() -> None:
    """A range written out and the number that stands for it are one transform, with one digest."""
    assert Noise(std=(0, 2)).to_json() == Noise(std=2).to_json() == {"name": "noise", "std": 2.0}
    assert Brightness(limit=(-1, 1)).to_json() == Brightness(limit=1).to_json()
    assert User(function="a:b", arguments={}).to_json() == User(function="a:b").to_json()


def test_arguments_are_what_the_database_gives_back() -> None:
    """A user's arguments have the form that they have after a jsonb column: no -0.0, and large floats are whole numbers."""
    found = User(function="a:b", arguments={"x": [-0.0, 1e16, 0.5, (1, 2)]}).arguments
    assert json.dumps(found) == '{"x": [0.0, 10000000000000000, 0.5, [1, 2]]}'


MODULE = """
import sys
import numpy as np

def doubled(images, masks, rng, by=2):
    images *= by

def returned(images, masks, rng):
    return images + rng.random(), ~masks

def raises(images, masks, rng):
    raise ValueError("cannot use", images, images.tobytes(), images.tolist(), "at\\n all")

def many(images, masks, rng):
    raise ValueError(" ".join(map(str, images.ravel())))

def divides(images, masks, rng):
    return images / np.ones((3, 3)), masks

def leaves(images, masks, rng):
    sys.exit("enough")

def one(images, masks, rng):
    return images

def smaller(images, masks, rng):
    return images[:, ::2], masks

def letters(images, masks, rng):
    return images, masks.astype(str)

class Odd(Exception):
    def __str__(self):
        raise RuntimeError

def odd(images, masks, rng):
    raise Odd

number = 3
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path with a user's modules."""
    (tmp_path / "mine.py").write_text(MODULE)
    (tmp_path / "lacking.py").write_text("import mine\nimport there_is_none_such\n")
    (tmp_path / "wrong.py").write_text("1 +\n")
    monkeypatch.syspath_prepend(tmp_path)
    user._imported.cache_clear()
    yield tmp_path
    user._imported.cache_clear()
    for name in ("mine", "lacking", "wrong"):
        sys.modules.pop(name, None)


def test_a_user_s_function_is_called(mine: Path) -> None:
    """It changes images and masks in place or returns them, gets its arguments, and draws from the sample's generator."""
    images = picture(channels=1)
    assert np.array_equal(applied(User(function="mine:doubled"), images), images * 2)
    assert np.array_equal(applied(User(function="mine:doubled", arguments={"by": 3}), images), images * 3)
    masks = images > images.mean()
    result, outside = images.copy(), ~masks
    User(function="mine:returned").apply(result, masks, rng(4), None)
    assert np.array_equal(result, images + rng(4).random())
    assert np.array_equal(masks, outside)


FAULTS = {
    "mine:raises": "user: mine:raises: ValueError: ('cannot use', array([…]",
    "mine:divides": "ValueError: operands could not be broadcast together with shapes (1,40,56) (3,3) (mine.py, line 18)",
    "mine:leaves": "SystemExit: enough",
    "mine:odd": "user: mine:odd: Odd (mine.py",
    "mine:one": "returned a ndarray; it must return (images, masks), or nothing",
    "mine:smaller": "returned float32 (1, 20, 56) as images, which must be float32 (1, 40, 56)",
    "mine:letters": "as masks, which must be bool (0, 1, 1)",
    "mine:none": "the module mine has no function none",
    "mine:number": "the module mine has no function number",
    "nowhere.sub:f": "the decode workers find no module nowhere; install it, or start with its folder in PYTHONPATH",
    "mine.sub:f": "the decode workers find no module mine.sub;",
    "lacking:f": "its module could not be imported: ModuleNotFoundError: No module named 'there_is_none_such' (lacking.py, line 2)",
    "wrong:f": "its module could not be imported: SyntaxError",
}


@pytest.mark.parametrize(("function", "message"), FAULTS.items())
def test_a_user_s_fault_is_one_line_without_pixels(mine: Path, function: str, message: str) -> None:
    """Whatever the function does wrong is one TransformError of one line: which function, what, where; arrays in it are left out."""
    with pytest.raises(TransformError) as caught:
        applied(User(function=function), picture(channels=1))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert len(re.findall(r"\d+", str(caught.value))) <= 12


def test_pixels_as_text_are_cut_off(mine: Path) -> None:
    """An exception's text full of numbers is cut off before it says what the pixels are."""
    with pytest.raises(TransformError) as caught:
        applied(User(function="mine:many"), picture(channels=1) + 0.25)
    assert len(str(caught.value)) < 150
    assert "…" in str(caught.value)


def test_a_worker_does_not_look_beside_the_script(mine: Path) -> None:
    """A module in the current folder is not found by a process as the workers are (python -P), and the error says what to do."""
    code = "from loaderd.intensity import User; User(function='mine:doubled').resolve()"
    environment = {**os.environ, "PYTHONPATH": str(Path(user.__file__).parents[1])}
    ended = subprocess.run([sys.executable, "-P", "-c", code], cwd=mine, env=environment, capture_output=True, text=True)
    assert "find no module mine; install it, or start with its folder in PYTHONPATH" in ended.stderr


def test_a_slot_of_half_precision_is_computed_in_single() -> None:
    """Through the pipeline, in the list's order, into a strided float16 slot: computed in float32, rounded once at the end."""
    from loaderd.transforms import checked
    from loaderd.warping import Pipeline

    images = picture(low=0, scale=40_000)  # beyond float16
    masks = images[:1] > 0
    given = checked([Window(center=20_000, width=40_000), Contrast(limit=(0.5, 0.5)), ZScore(p=0)])
    pipeline = Pipeline(given, seed=1, size=None, fit="crop", statistics=None)
    slot = np.zeros((40, 56, 2), np.float16)
    fed = np.zeros_like(masks)
    expected = applied(Contrast(limit=(0.5, 0.5)), applied(Window(center=20_000, width=40_000), images))
    pipeline(images, masks, key=bytes(16), epoch=0, spacing=None, out_images=slot.transpose(2, 0, 1), out_masks=fed)
    assert np.array_equal(slot.transpose(2, 0, 1), expected.astype(np.float16))
    assert np.array_equal(fed, masks)


PAGE = (Path(__file__).resolve().parent.parent / "docs" / "transforms.md").read_text()


def test_the_page_has_each_transform_with_its_arguments() -> None:
    """docs/transforms.md has a row for each transform there is, with all its arguments and their defaults, and none besides."""
    from loaderd.transforms import REGISTRY, Geometric

    common = {one.name for one in fields(Geometric)}
    signatures = set()
    for kind in REGISTRY.values():
        own = [one for one in fields(kind) if one.name not in common]
        signatures.add(f"{kind.__name__}({', '.join(one.name + ('' if one.default is MISSING else f'={one.default!r}') for one in own)})")
    rows = set(re.findall(r"^\| `(\w+\(.*\))` \| ", PAGE.split("## Order")[0], re.M))
    assert rows == signatures


def test_the_page_s_examples_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What docs/transforms.md shows in Python and in TOML is accepted and runs, its error is the one that comes, its function is called."""
    from loaderd import transforms
    from loaderd.warping import Pipeline

    blocks = re.findall(r"```(python|toml)\n(.*?)```", PAGE, re.S)
    (python, own), (toml,) = ([text for kind, text in blocks if kind == one] for one in ("python", "toml"))
    (given,) = [
        ast.unparse(one.value) for node in ast.walk(ast.parse(python)) if isinstance(node, ast.Call) for one in node.keywords
        if one.arg == "transforms"
    ]  # fmt: skip
    names = {kind.__name__: kind for kind in transforms.REGISTRY.values()}
    (tmp_path / "my_transforms.py").write_text(own)
    monkeypatch.syspath_prepend(tmp_path)
    images = picture(channels=1)
    masks = images > images.mean()
    for listed in (eval(given, dict(names)), tomllib.loads(toml)["transforms"]):
        pipeline = Pipeline(transforms.checked(listed), seed=7, size=None, fit="crop", statistics=None)
        out = np.zeros((1, 160, 160), np.float32), np.zeros((1, 160, 160), np.bool_)
        pipeline(images, masks, key=bytes(16), epoch=0, spacing=None, out_images=out[0], out_masks=out[1])
        assert np.isfinite(out[0]).all()
        assert 0 < out[1].sum() < out[1].size
    (message,) = re.findall(r"in one line: `(.*?)`", PAGE)
    with pytest.raises(UsageError) as caught:
        transforms.checked([{"name": "rotate"}, {"name": "flip"}, {"name": "gamma", "limit": -1}])
    assert str(caught.value) == message
