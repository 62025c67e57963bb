"""Digit sequences: which gaps, which digits, which pixels; from the catalog, as pictures, sets and for streams."""

from __future__ import annotations

import itertools
import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from typer.testing import CliRunner

from catalog import ingest
from catalog.database import open_database
from catalog.errors import CatalogError, UsageError
from loaderd import digits, distortion, gaps, sequences
from loaderd.cli_sequence import sequence
from loaderd.digits import Digits
from loaderd.gaps import Spacing

RNG = np.random.default_rng(5)
EACH = 7  # images of each digit in the pool


def make_pool() -> Digits:
    """Return 70 images of random values: 7 of each digit, in no order."""
    labels = RNG.permutation(np.repeat(np.arange(10, dtype=np.uint8), EACH))
    images = RNG.integers(0, 256, (len(labels), 28, 28), dtype=np.uint8)
    return Digits(images, labels, 1000 + RNG.permutation(len(labels)), RNG.integers(0, 256, (len(labels), 16), dtype=np.uint8))


POOL = make_pool()


def words(count: int, width: int, seed: int = 1) -> NDArray[np.uint64]:
    return np.random.default_rng(seed).integers(0, 2**64, (count, width), np.uint64)


def unlikely(counts: NDArray[Any]) -> bool:
    """Whether counts would come from a uniform distribution less often than once in a million times (Wilson and Hilferty's chi-square)."""
    expected = counts.sum() / counts.size
    freedom = counts.size - 1
    chi = ((counts - expected) ** 2 / expected).sum()
    return bool(((chi / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / np.sqrt(2 / (9 * freedom)) > 4.75)


# ------------------------------------------------------------------------------------------ gaps


def test_tuples_are_counted_exactly_and_each_rank_is_one() -> None:
    """The count of tuples of gaps with a total is that of an enumeration, and the ranks give each tuple once, in lexical order."""
    for number, span in itertools.product(range(1, 5), range(4)):
        every = sorted(itertools.product(range(span + 1), repeat=number))
        for total in range(number * span + 1):
            wanted = [one for one in every if sum(one) == total]
            assert gaps.ways(number, span, total) == len(wanted)
            assert [tuple(one) for one in gaps.unranked(np.arange(len(wanted)), number, span, total).tolist()] == wanted
    # 22 gaps of 0 to 7 have 2⁶⁶ tuples, which int64 does not hold.
    assert sum(gaps.ways(22, 7, total) for total in range(22 * 7 + 1)) == 8**22


@pytest.mark.parametrize(("number", "span", "total"), [(4, 3, 6), (3, 10, 4), (22, 7, 2)])
def test_gaps_are_uniform_among_all_tuples_of_the_width(number: int, span: int, total: int) -> None:
    """None is off its share, also where the counts are larger than 64 bits."""
    spacing = Spacing("variable", "edge", 0, span, (number - 1) * 28 + total, 28)
    tuples = gaps.ways(number, span, total)
    drawn = spacing.draw(words(max(30 * tuples, 4_000), spacing.words(number - 1)), number - 1)
    _, counts = np.unique(drawn, axis=0, return_counts=True)
    assert len(counts) == tuples
    assert not unlikely(counts)


@given(st.data())
@settings(max_examples=100)
def test_gaps_lie_in_the_range_and_give_the_width(data: st.DataObject) -> None:
    """Gaps are within the closed range, fixed ones equal, outer ones of `between` 0; the width is exact; other widths are refused."""
    kind, subtype = data.draw(st.sampled_from(gaps.TYPES)), data.draw(st.sampled_from(gaps.SUBTYPES))
    number = data.draw(st.integers(2 if subtype == "between" else 1, 30))
    low = data.draw(st.integers(0, 30))
    high = low + data.draw(st.integers(0, 30))
    free = number - 1 if subtype == "between" else number + 1
    width = data.draw(st.integers(28 * number + free * low - 3, 28 * number + free * high + 3) | st.none())
    spacing = Spacing(kind, subtype, low, high, width, 28)
    spare = (width or 0) - 28 * number
    possible = width is None or (free * low <= spare <= free * high and (kind == "variable" or spare % free == 0))
    if not possible:
        with pytest.raises(UsageError, match=f"a width of {width} px is not possible") as caught:
            spacing.check([number])
        least = 28 * number + free * low
        assert str(least) in str(caught.value)
        return
    spacing.check([number])
    random = words(5, spacing.words(number))
    found = spacing.draw(random, number)
    assert found.tolist() == [spacing.draw_one(row.tolist(), number) for row in random]
    inner = found if subtype == "edge" else found[:, 1:-1]
    assert found.shape == (5, number + 1)
    assert (subtype == "edge") or not found[:, [0, -1]].any()
    assert ((low <= inner) & (inner <= high)).all()
    assert kind == "variable" or (inner == inner[:, :1]).all()
    assert width is None or (found.sum(axis=1) == spare).all()


def test_the_error_names_the_widths_that_are_possible() -> None:
    """The message lists them: a range, steps with the nearest ones, or that lengths have none in common; and each is accepted."""
    with pytest.raises(UsageError, match="give 280 to 500 px in steps of 11, nearest 390 and 401"):
        Spacing("fixed", "edge", 0, 20, 391, 28).check([10])
    with pytest.raises(UsageError, match=r"10 digits of 28 px with variable gaps of 0 to 20 px .between. give 280 to 460 px"):
        Spacing("variable", "between", 0, 20, 461, 28).check([10])
    with pytest.raises(UsageError, match=r"3 to 5 digits with fixed gaps of 0 to 40 px .edge. all fit into 152 or 212 px"):
        Spacing("fixed", "edge", 0, 40, 190, 28).check([3, 4, 5])
    for width in (152, 212):
        Spacing("fixed", "edge", 0, 40, width, 28).check([3, 4, 5])
    with pytest.raises(UsageError, match=r"no width fits all lengths.*3 digits give 84 to 164 px, 8 digits give 224 to 404 px"):
        Spacing("variable", "edge", 0, 20, 390, 28).check(range(3, 9))


# ------------------------------------------------------------------------------------------ images


def check_pixels(made: sequences.Composed, *, white: bool) -> None:
    """Each box holds its member's pixels, and all else is ground."""
    by_id = dict(zip(POOL.sample_ids.tolist(), POOL.images, strict=True))
    label = dict(zip(POOL.sample_ids.tolist(), POOL.labels.tolist(), strict=True))
    for image, drawn, boxes, members, width in zip(made.images, made.digits, made.boxes, made.members, made.widths, strict=True):
        wanted = np.full(image.shape, 255 if white else 0, np.uint8)
        length = int(np.count_nonzero(drawn >= 0))
        for (top, left, height, columns), member, digit in zip(boxes[:length], members, drawn, strict=False):
            assert label[member] == digit
            wanted[top : top + height, left : left + columns] = 255 - by_id[member] if white else by_id[member]
        for beyond in (drawn, members, boxes):
            assert (beyond[length:] == -1).all()
        assert (boxes[:length, 1] + 28 <= width).all() and width <= image.shape[1]
        assert np.array_equal(image, wanted if image.dtype == np.uint8 else wanted.astype(image.dtype) / image.dtype.type(255))


@pytest.mark.parametrize("ground", ["white", "black"])
def test_an_image_holds_its_members_and_ground(ground: str) -> None:
    """Also where lengths differ, in batches that are no multiple of what is composed at once, and for each dtype."""
    made = POOL.sequencer({"length": (1, 6), "spacing": (0, 9), "ground": ground})
    assert (made.height, made.width, made.max_length) == (28, 6 * 28 + 7 * 9, 6)
    for dtype in (np.float32, np.float64, np.float16, np.uint8):
        found = made.part(3, 0, 37, dtype=dtype)
        assert found.images.dtype == dtype
        assert set(np.count_nonzero(found.digits >= 0, axis=1)) == {1, 2, 3, 4, 5, 6}
        check_pixels(found, white=ground == "white")


def test_compose_is_the_seed_s_call() -> None:
    """`compose(digits, spacing_range, image_width)` gives float32 (28, width) from 0 to 1, the same for a seed, another for the next."""
    image = sequences.compose([3, 5, 0], (0, 20), 150, seed=7, pool=POOL)
    assert (image.shape, image.dtype) == ((28, 150), np.float32)
    assert image.min() >= 0 and image.max() == 1
    assert np.array_equal(image, sequences.compose("350", (0, 20), 150, seed=7, pool=POOL))
    assert np.array_equal(image, sequences.compose(np.array([3, 5, 0]), (0, 20), np.int64(150), seed=np.int64(7), pool=POOL))  # type: ignore[arg-type]
    assert not np.array_equal(image, sequences.compose("350", (0, 20), 150, seed=8, pool=POOL))
    generator = sequences.generator(7)
    several = [sequences.compose("350", (0, 20), 150, seed=generator, pool=POOL) for _ in range(2)]
    assert np.array_equal(several[0], image) and not np.array_equal(*several)
    free = {sequences.compose("350", (2, 9), None, seed=seed, pool=POOL).shape[1] for seed in range(20)}
    assert len(free) > 5 and min(free) >= 84 + 4 * 2 and max(free) <= 84 + 4 * 9
    assert sequences.compose("7", (4, 4), 36, pool=POOL).shape == (28, 36)


@pytest.mark.parametrize("transform", [False, True])
@pytest.mark.parametrize("rows", [28, 20])
@pytest.mark.parametrize("how", [{}, {"type": "fixed"}, {"subtype": "between"}, {"width": None}, {"ground": "black"}])
def test_one_image_is_that_of_many(how: dict[str, Any], rows: int, transform: bool) -> None:
    """The image that `compose` gives by itself is, pixel for pixel, the one of the batch of the same random words; of dead digits, too,
    whichever generator they come from, and both leave it in one state."""
    options = {"length": 10, "width": 390, "transform": transform, **how}
    alive = np.ones(len(POOL.labels), np.bool_)
    sequencer = sequences.Sequencer(options, POOL.images[:, :rows], POOL.labels, POOL.sample_ids, alive)
    numbers = [3, 1, 4, 1, 5, 9, 2, 6, 5, 0]
    for seed in range(25):
        alive[:] = True
        alive[:: seed % 3 + 3] = seed < 15  # a third of the images, a quarter, …
        bits = (np.random.Philox, np.random.PCG64, np.random.MT19937)[seed % 5 % 3]  # of MT19937, a raw word has 32 bits
        ours, theirs = (np.random.Generator(bits(seed)) for _ in range(2))
        for generator in (ours, theirs):
            generator.integers(0, 9, dtype=np.uint32)  # half a word is left over
        made = sequencer.compose(np.array([numbers]), theirs)
        one = sequencer.image(numbers, ours)
        assert one.dtype == np.float32 and np.array_equal(one, made.images[0, :, : made.widths[0]])
        assert ours.integers(0, 2**63) == theirs.integers(0, 2**63)


def test_a_seed_gives_the_same_image_in_each_version() -> None:
    """Which images are drawn for a seed, and where they stand, is what it was when this was written."""
    values = np.arange(1, 71, dtype=np.uint8)  # each image is one grey
    pool = Digits(np.broadcast_to(values[:, None, None], (70, 28, 28)), values % 10, values.astype(np.int64), np.zeros((70, 16), np.uint8))

    def drawn(width: int | None, kind: str) -> list[tuple[int, int]]:
        row = np.rint(sequences.compose("35091", (0, 20), width, type=kind, ground="black", seed=7, pool=pool)[0] * 255).astype(int)
        return [(int(row[at]), at) for at in np.flatnonzero(np.diff(row, prepend=0)).tolist() if row[at]]

    assert drawn(200, "variable") == [(43, 9), (5, 45), (60, 84), (59, 127), (31, 161)]
    assert drawn(None, "variable") == [(43, 9), (5, 54), (60, 95), (59, 139), (31, 168)]
    assert drawn(None, "fixed") == [(43, 9), (5, 46), (60, 83), (59, 120), (31, 157)]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"digits": [3, -1]}, r"digits\[1\]=-1: must be a whole number from 0 to 9"),
        ({"digits": [10]}, r"digits\[0\]=10: must be"),
        ({"digits": "12a"}, r"digits\[2\]='a': must be"),
        ({"digits": "٣"}, r"digits\[0\]="),
        ({"digits": [1.0]}, r"digits\[0\]=1.0: must be"),
        ({"digits": [True]}, r"digits\[0\]=True: must be"),
        ({"digits": []}, "digits: there is none"),
        ({"digits": ""}, "digits: there is none"),
        ({"digits": 7}, "digits=7: must be a text"),
        ({"digits": "1" * 101}, "at most 100"),
        ({"digits": "1", "subtype": "between"}, "one digit has no gap between digits"),
        ({"spacing_range": (20, 0)}, "spacing=.*upside down"),
        ({"spacing_range": (-1, 5)}, "spacing=.*from 0"),
        ({"spacing_range": 5}, "spacing=5: must be"),
        ({"spacing_range": (0, 1.5)}, "spacing=.*whole numbers"),
        (
            {"image_width": 27},
            "a width of 27 px is not possible: 3 digits of 28 px with variable gaps of 0 to 20 px .edge. give 84 to 164 px",
        ),
        ({"image_width": 0}, "width=0: must be"),
        ({"image_width": "390"}, "width='390': must be"),
        ({"type": "random"}, "type='random': must be 'fixed' or 'variable'"),
        ({"subtype": "middle"}, "subtype='middle': must be"),
        ({"ground": "grey"}, "ground='grey': must be"),
        ({"transform": 1}, "transform=1: must be true or false"),
        ({"seed": "x"}, "seed='x': must be"),
    ],
)
def test_wrong_arguments_are_named(changed: dict[str, Any], message: str) -> None:
    """Each is one line of UsageError that says which argument, its value and what it must be."""
    with pytest.raises(UsageError, match=message) as caught:
        sequences.compose(**{"digits": "123", "image_width": 100, "pool": POOL, **changed})
    assert "\n" not in str(caught.value)


def test_options_have_one_form() -> None:
    """Lists, tuples and numpy's numbers are one; defaults are left out; the form is its own form; what is unknown is refused."""
    form = sequences.checked({"length": (3, 8), "spacing": (0, 20), "width": None, "type": "variable", "transform": False})
    assert form == {"length": [3, 8]} == sequences.checked(form)
    assert sequences.checked({"length": np.int64(4), "width": np.int64(200)}) == {"length": [4, 4], "width": 200}
    assert json.loads(json.dumps(form)) == form
    for wrong, message in (
        ({"length": 3, "heigth": 28}, "sequences: 'heigth' is no option; there are length, spacing, width"),
        ({"lenght": 3}, "sequences: 'lenght' is no option; there are length"),
        ({}, "length is missing"),
        ([], r"sequences=\[\]: must be options of these: length, spacing"),
        ({"length": (8, 3)}, "upside down"),
        ({"length": 0}, "from 1 to 100"),
    ):
        with pytest.raises(UsageError, match=message):
            sequences.checked(wrong)
    with pytest.raises(UsageError, match="are 50270 px wide; at most 16384"):
        POOL.sequencer({"length": 100, "spacing": (0, 470)})


def test_each_image_of_a_digit_is_as_likely() -> None:
    """Digits, images of a digit and lengths are uniform, and in a stream so is the place of the anchor."""
    found = POOL.sequencer({"length": (2, 4), "spacing": (0, 0)}).part(9, 0, 20_000, dtype=np.uint8)
    lengths = np.count_nonzero(found.digits >= 0, axis=1)
    assert not unlikely(np.bincount(lengths, minlength=5)[2:])
    assert not unlikely(np.unique(found.digits[found.digits >= 0], return_counts=True)[1])
    members, counts = np.unique(found.members[found.members >= 0], return_counts=True)
    assert len(members) == len(POOL.labels) and not unlikely(counts)
    made = POOL.sequencer({"length": 4})
    at = [fed(made, list(range(70)), epoch=epoch).members == POOL.sample_ids[:, None] for epoch in range(30)]
    assert not unlikely(np.sum(at, axis=(0, 1)))


def test_parts_of_a_set_differ() -> None:
    """Another number or seed gives other sequences, the same ones the same."""
    made = POOL.sequencer({"length": 5})
    first = made.part(1, 0, 10)
    assert np.array_equal(first.images, made.part(1, 0, 10).images)
    for other in (made.part(1, 1, 10), made.part(2, 0, 10)):
        assert not np.array_equal(first.members, other.members)


# ------------------------------------------------------------------------------------------ streams


def fed(made: sequences.Sequencer, anchors: list[int], *, epoch: int = 0, seed: int = 3) -> sequences.Composed:
    """Compose as a stream's worker does, into views that are not contiguous."""
    count, longest = len(anchors), made.max_length
    images = np.zeros((count, made.height, 2 * made.width), np.float32)[..., ::2]
    drawn, members = np.zeros((2, count, longest), np.int64)
    boxes = np.zeros((count, longest, 4), np.int32)
    keys = [POOL.sample_keys[one].tobytes() for one in anchors]
    made.fill_batch(keys, epoch, seed, np.array(anchors), images, drawn, boxes, members)
    widths = boxes[..., 1].max(axis=1) + 28
    return sequences.Composed(images, drawn, boxes.astype(np.int64), members, widths)


@pytest.mark.parametrize("transform", [False, True])
def test_a_sequence_of_a_stream_is_its_anchor_s_alone(transform: bool) -> None:
    """It shows its anchor; alone, in another batch, order or sequencer it is the same to the bit; another epoch or seed gives another."""
    options = {"length": (3, 8), "spacing": (0, 12), "transform": transform}
    made = POOL.sequencer(options)
    together = fed(made, list(range(70)))
    assert set(np.count_nonzero(together.digits >= 0, axis=1)) == set(range(3, 9))
    for anchor in range(70):
        assert POOL.sample_ids[anchor] in together.members[anchor]
    if not transform:
        check_pixels(together, white=True)
    other = sequences.Sequencer(options, POOL.images, POOL.labels, POOL.sample_ids)
    backwards = fed(other, list(range(69, 30, -1)))
    alone = np.empty((28, made.width), np.float32), np.empty(8, np.int64), np.empty((8, 4), np.int64), np.empty(8, np.int64)
    for anchor in (31, 50, 69):
        other.fill(POOL.sample_keys[anchor].tobytes(), 0, 3, anchor, *alone)
        for left, right, single in zip(
            (together.images, together.digits, together.boxes, together.members),
            (backwards.images, backwards.digits, backwards.boxes, backwards.members),
            alone,
            strict=True,
        ):
            assert np.array_equal(left[anchor], right[69 - anchor]) and np.array_equal(left[anchor], single)
    for changed in (fed(made, [5], epoch=1), fed(made, [5], seed=4), fed(made, [5], seed=-3)):
        assert not np.array_equal(changed.images[0], together.images[5])


def test_what_is_not_alive_is_shown_no_more_and_changes_no_other_sequence() -> None:
    """From then on; only the sequences that showed it differ. Without any image of a digit left the error says so."""
    alive = np.ones(70, np.bool_)
    made = sequences.Sequencer({"length": (2, 8)}, POOL.images, POOL.labels, POOL.sample_ids, alive)
    anchors = np.flatnonzero(POOL.labels != 4).tolist()
    before = fed(made, anchors)
    fours = np.flatnonzero(POOL.labels == 4)
    alive[fours[0]] = False
    after = fed(made, anchors)
    showed = (before.members == POOL.sample_ids[fours[0]]).any(axis=1)
    assert 0 < showed.sum() < 20
    assert np.array_equal((before.images != after.images).any(axis=(1, 2)), showed)
    alive[fours[1:-1]] = False  # one of seven is left
    drawn = fed(made, anchors)
    assert set(drawn.members[drawn.digits == 4]) == {POOL.sample_ids[fours[-1]]}
    assert np.array_equal(drawn.digits, before.digits)
    alive[fours[-1]] = False
    with pytest.raises(CatalogError, match="no image of a 4 is left that may be shown"):
        fed(made, anchors)


def test_a_digit_without_images_is_not_drawn() -> None:
    """A pool without some digits gives sequences of the others, and asked for one says which."""
    some = POOL.labels > 7
    made = sequences.Sequencer({"length": 4}, POOL.images[some], POOL.labels[some], POOL.sample_ids[some])
    assert set(np.unique(made.part(1, 0, 50).digits)) == {8, 9}
    with pytest.raises(UsageError, match="there is no image of a 3"):
        made.compose(np.array([[8, 3, 3, 9]]), sequences.generator(1))
    few = Digits(POOL.images[~some], POOL.labels[~some], POOL.sample_ids[~some], POOL.sample_keys[~some])
    for missing in "89":
        with pytest.raises(UsageError, match=f"there is no image of a {missing}"):
            sequences.compose(f"0{missing}", image_width=None, pool=few)


# ------------------------------------------------------------------------------------------ changed digits


@pytest.mark.parametrize("times", [1, 3])
def test_a_digit_is_changed_by_its_own_words(times: int) -> None:
    """Together with others, alone or in reverse it becomes the same; what is not chosen stays as it is, bit for bit. Also where digits are
    so high that those of a batch have more rows than OpenCV counts."""
    images = np.tile(POOL.images, (1, times, 1))[np.arange(2100) % 70]
    chances = words(len(images), distortion.WORDS)
    together = images.copy()
    distortion.distort(together, chances, 255)
    same = (together == images).all(axis=(1, 2))
    share = (1 - distortion.CROPPED) * (1 - distortion.JITTERED) * (1 - distortion.DROPPED) * (1 - distortion.BLURRED)
    assert abs(same.mean() - share) < 0.05
    backwards = images[::-1].copy()
    distortion.distort(backwards, chances[::-1], 255)
    assert np.array_equal(backwards[::-1], together)
    for one in (0, 3, 2099):
        alone = images[one : one + 1].copy()
        distortion.distort(alone, chances[one : one + 1], 255)
        assert np.array_equal(alone[0], together[one])


def only(*columns: int, **values: float) -> NDArray[np.uint64]:
    """Return words of one digit that is changed in these ways alone."""
    found = np.full((1, distortion.WORDS), 2**64 - 1, np.uint64)
    for column in columns:
        found[0, column] = 0
    for name, value in values.items():
        found[0, int(name[1:])] = np.uint64(int(value * (2**64 - 1)))
    return found


def test_a_crop_enlarges_what_is_left() -> None:
    """With a quarter cut off all around, the middle half fills the digit: a square of 8 px becomes one of 16 at twice the distance."""
    digit = np.zeros((1, 28, 28), np.uint8)
    digit[0, 8:16, 12:20] = 255
    distortion.distort(digit, only(0), 0)  # all four sides: 1.0 of the largest crop
    rows, columns = (np.flatnonzero(digit[0].max(axis=axis) > 127) for axis in (1, 0))
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (2, 17, 10, 25)
    digit = np.zeros((1, 28, 28), np.uint8)
    digit[0, 8:16, 12:20] = 255
    distortion.distort(digit, only(0, w6=0.0, w7=0.0), 0)  # the upper and the lower side alone
    rows, columns = (np.flatnonzero(digit[0].max(axis=axis) > 127) for axis in (1, 0))
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (2, 17, 12, 19)


def test_jitter_moves_pixels_by_about_half_a_pixel_and_blur_spreads_them() -> None:
    """Jitter changes a ramp by at most 0.6 of its slope; blur of a point keeps its sum, on all sides alike; a tenth of the pixels drops."""
    ramp = np.repeat(np.arange(28, dtype=np.uint8)[None, None] * 9, 28, axis=1)
    moved = ramp.copy()
    distortion.distort(moved, only(1, w9=0.3), 0)
    away = np.abs(moved.astype(int) - ramp)[0, :, 1:-1]
    assert 0 < away.max() <= 0.6 * 9 + 1 and away.mean() > 1
    point = np.zeros((1, 28, 28), np.uint8)
    point[0, 10, 10] = 200
    distortion.distort(point, only(2), 0)
    assert abs(int(point.sum()) - 200) <= 5 and point[0, 10, 10] < 140
    assert point[0, 9, 10] == point[0, 11, 10] == point[0, 10, 9] == point[0, 10, 11] > 0
    dropped = np.full((1, 28, 28), 9, np.uint8)
    distortion.distort(dropped, only(3), 255)
    assert set(np.unique(dropped)) == {9, 255} and 40 < (dropped == 255).sum() < 120


# ------------------------------------------------------------------------------------------ the catalog, and files


def pixels(path: str) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image)


def write_idx(folder: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Write 60 digits as MNIST's files are; returns images and labels."""
    images = np.random.default_rng(2).integers(0, 256, (60, 28, 28), dtype=np.uint8)
    labels = (np.arange(60) * 7 % 10).astype(np.uint8)
    folder.mkdir()
    (folder / "train-images-idx3-ubyte").write_bytes(struct.pack(">4I", 2051, 60, 28, 28) + images.tobytes())
    (folder / "train-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 2049, 60) + labels.tobytes())
    return images, labels


def test_digits_come_from_the_catalog_and_never_stale(database_url: str, tmp_path: Path, conn: psycopg.Connection) -> None:
    """All with their labels, by sample_key; a flag, a corrected label or a changed file acts at once, also on what was kept."""
    images, labels = write_idx(tmp_path / "mnist")
    with open_database(database_url) as db:
        ingest.ingest(db, tmp_path / "mnist", jobs=1)
        rows = conn.execute("SELECT sample_id, frame, sample_key FROM sample ORDER BY sample_key").fetchall()
        for _ in range(2):  # read, then from the cache
            found = digits.load(db)
            assert found.sample_ids.tolist() == [row[0] for row in rows]
            assert [key.tobytes() for key in found.sample_keys] == [row[2].bytes for row in rows]
            frames = [row[1] for row in rows]
            assert np.array_equal(found.images, images[frames]) and np.array_equal(found.labels, labels[frames])
        entries = {path: path.stat().st_mtime_ns for path in (tmp_path / "home" / "cache").iterdir()}
        assert len(entries) == 1
        assert found.places(np.array([rows[5][0], 10**9, rows[0][0]])).tolist() == [5, -1, 0]
        assert set(digits.load(db, "label IN ('3', '4')").labels) == {3, 4}
        conn.execute("INSERT INTO flag (rule, severity, image_id, detail, raised_by) VALUES ('BAD', 'error', %s, '', 'me')", [rows[5][0]])
        assert rows[5][0] not in digits.load(db).sample_ids and len(digits.load(db).labels) == 59
        conn.execute("UPDATE annotation SET label = 'x' WHERE id = (SELECT annotation_id FROM sample WHERE sample_id = %s)", [rows[7][0]])
        assert len(digits.load(db).labels) == 58
        assert {path: path.stat().st_mtime_ns for path in entries} == entries
        (tmp_path / "mnist" / "train-images-idx3-ubyte").touch()
        with pytest.raises(CatalogError, match="train-images-idx3-ubyte: is not what was catalogued"):
            digits.load(db)
        with pytest.raises(UsageError, match="no image with a label from 0 to 9 for which"):
            digits.load(db, "label = 'y'")


def test_labels_of_two_names_are_not_mixed(database_url: str, tmp_path: Path, conn: psycopg.Connection) -> None:
    """Where labels of two names are numbers from 0 to 9, one line names both and the ways to choose; each of these gives one name's."""
    write_idx(tmp_path / "mnist")
    with open_database(database_url) as db:
        ingest.ingest(db, tmp_path / "mnist", jobs=1)
        conn.execute(
            "WITH s AS (INSERT INTO structure (name) VALUES ('bi''rads') RETURNING id) "
            "UPDATE annotation SET structure_id = s.id FROM s WHERE label IN ('1', '2')"
        )
        with pytest.raises(UsageError, match=r"labels of 2 names are numbers from 0 to 9 \(\"bi'rads\", 'label'\); choose") as caught:
            digits.load(db)
        assert "\n" not in str(caught.value)
        assert """labels="bi'rads" (--labels), or by where="structure = 'bi''rads'\"""" in str(caught.value)
        for _ in range(2):  # read, then from the cache
            assert set(digits.load(db, labels="bi'rads").labels) == {1, 2} == set(digits.load(db, "structure = 'bi''rads'").labels)
            assert set(digits.load(db, labels="label").labels) == {0, 3, 4, 5, 6, 7, 8, 9}
            assert set(digits.load(db, "label = '3'", labels="label").labels) == {3}
        with pytest.raises(UsageError, match=r"the catalog has no image with a label 'other' from 0 to 9$"):
            digits.load(db, labels="other")
    wanted = {"labels": "label", "database": database_url}
    assert sequences.compose("30", image_width=60, **wanted).shape == (28, 60)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="there is no image of a 1"):
        sequences.compose("1", image_width=60, **wanted)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="labels of 2 names"):
        sequences.compose("1", image_width=60, database=database_url)
    for wrong in ("", 3, ["label"]):
        with pytest.raises(UsageError, match=r"labels=.*: must be the name of a label"):
            sequences.compose("1", image_width=60, labels=wrong, database=database_url)  # type: ignore[arg-type]


@pytest.fixture
def run(database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Run `loaderd sequence` in this process, in a folder of its own, on a catalog of 60 digits."""
    write_idx(tmp_path / "mnist")
    with open_database(database_url) as db:
        ingest.ingest(db, tmp_path / "mnist", jobs=1)
    monkeypatch.chdir(tmp_path)
    app = typer.Typer()
    app.command()(sequence)

    def run(*arguments: object) -> Any:
        done = CliRunner().invoke(app, [*map(str, arguments), "--json"])
        if done.exception is not None:
            raise done.exception
        return json.loads(done.stdout)

    return run


def test_loaderd_sequence(run: Callable[..., Any], tmp_path: Path, database_url: str) -> None:
    """A picture is what `compose` gives; a name that is taken is numbered; the seed's config is understood; a set is the same by any
    number of processes and in both formats; what cannot be is refused before anything is written."""
    first = run("0123456789", "--width", 390, "--seed", 7, "-o", "out.png")
    image = pixels("out.png")
    with open_database(database_url) as db:
        wanted = sequences.compose("0123456789", image_width=390, seed=7, pool=digits.load(db))
    assert np.array_equal(image / np.float32(255), wanted)
    assert (first["width"], first["height"], len(first["boxes"]), first["seed"]) == (390, 28, 10, 7)
    again = run("0123456789", "--width", 390, "--type", "fixed", "-o", "out.png")
    assert again["path"] == "out-2.png" and {b[1] - a[1] for a, b in itertools.pairwise(again["boxes"])} == {38}
    second = pixels("out-2.png")
    fixed = ("0123456789", "--width", 390, "--type", "fixed", "--seed", again["seed"])
    assert run(*fixed, "-o", "out.png", "--overwrite")["path"] == "out.png" and np.array_equal(pixels("out.png"), second)
    assert not Path("out-3.png").exists()
    Path("seed.json").write_text(
        '{"image": {"transform": true}, "spacing": {"type": "FIXED", "subtype": "between"}, "output_format": "jpg"}'
    )
    configured = run("123", "--config", "seed.json", "--width", 100)
    assert configured["path"] == "seq_123.jpg" and pixels("seq_123.jpg").shape == (28, 100)
    assert configured["sequences"] == {"length": [3, 3], "width": 100, "type": "fixed", "subtype": "between", "transform": True}
    assert run("123", "--config", "seed.json", "--no-transform", "--subtype", "edge")["sequences"] == {"length": [3, 3], "type": "fixed"}

    made = run("--count", 1200, "--length", "2:4", "--seed", 5, "-o", "set.npz", "--jobs", 2)
    assert (made["count"], made["width"]) == (1200, 4 * 28 + 5 * 20)
    run("--count", 1200, "--length", "2:4", "--seed", 5, "-o", "set.h5", "--jobs", 1)
    h5py = pytest.importorskip("h5py")
    with np.load("set.npz") as left, h5py.File("set.h5") as right:
        assert left["images"].shape == (1200, 28, 212)
        assert set(left.files) - {"about"} == set(right) == {"images", "digits", "boxes", "members", "lengths", "widths"}
        for name in right:
            assert np.array_equal(left[name], right[name][...]), name
        assert json.loads(str(left["about"])) == json.loads(right.attrs["about"])
    assert run("--count", 3, "--length", 2, "-o", "set.npz")["path"] == "set-2.npz"

    for arguments in (("12", "-o", "/proc/x.png"), ("--count", 3, "--length", 2, "-o", "/proc/x.npz")):
        with pytest.raises(OSError, match=r"No such file or directory|Permission denied") as refused:
            run(*arguments)
        assert refused.value.filename == arguments[-1]  # not a file beside it

    there = sorted(tmp_path.iterdir())
    for arguments, message in (
        (("12", "-o", "a.gif"), "-o a.gif: must end in .png, .jpg, .jpeg"),
        (("12", "--count", 3, "-o", "a.npz"), "give DIGITS for one image, or --count"),
        ((), "give DIGITS for one image, or --count"),
        (("--count", 3, "-o", "a.npz"), "--count: a set needs --length"),
        (("--count", 3, "--length", 3, "-o", "a.png"), "must end in .npz, .h5, .hdf5"),
        (("12", "--length", 3), "--length: is of a set"),
        (("12", "--spacing", "9:3"), "--spacing 9:3: is upside down"),
        (("12", "--spacing", "1:2:3"), "--spacing 1:2:3: must be"),
        (("12", "--width", 40), "a width of 40 px is not possible"),
        (("12", "--config", "none.json"), "--config none.json: cannot be read"),
        (("12", "--where", "label = '1'"), "there is no image of a 2"),
        (("12", "--where", "1) or (1 = 1"), "where"),
    ):
        with pytest.raises(UsageError, match=re.escape(message)):
            run(*arguments)
    for text, message in (
        ("{", "is no JSON"),
        ("[]", "must be an object with image, spacing, output_format"),
        ('{"images": {}}', "'images' is no key; there are image, spacing, output_format"),
        ('{"image": {"transfrom": true}}', "'transfrom' is no key of image; there is transform"),
        ('{"spacing": {"transform": true}}', "'transform' is no key of spacing; there is type, subtype"),
        ('{"image": true}', "image must be an object with transform"),
        ('{"output_format": "gif"}', "output_format is one of"),
        ('{"spacing": {"type": 3}}', "type=3: must be"),
    ):
        Path("seed.json").write_text(text)
        with pytest.raises(UsageError, match=message):
            run("12", "--config", "seed.json")
    assert sorted(tmp_path.iterdir()) == there


def test_loaderd_sequence_of_labels_of_one_name(run: Callable[..., Any], conn: psycopg.Connection) -> None:
    """Where labels of two names are numbers from 0 to 9, `--labels` says whose digits a picture or a set is composed of, also in the
    processes that compose a set, which says it in turn; without it the command is refused."""
    conn.execute(
        "WITH s AS (INSERT INTO structure (name) VALUES ('birads') RETURNING id) "
        "UPDATE annotation SET structure_id = s.id FROM s WHERE label IN ('1', '2')"
    )
    with pytest.raises(UsageError, match="labels of 2 names"):
        run("12")
    assert run("12", "--labels", "birads")["digits"] == "12"
    with pytest.raises(UsageError, match="there is no image of a 1"):
        run("12", "--labels", "label")
    for jobs, labels, shown in ((2, "birads", {1, 2}), (1, "label", {0, 3, 4, 5, 6, 7, 8, 9})):
        made = run("--count", 1001, "--length", 2, "--labels", labels, "-o", "set.npz", "--overwrite", "--jobs", jobs)
        with np.load(made["path"]) as found:
            assert set(np.unique(found["digits"])) == shown and json.loads(str(found["about"]))["labels"] == labels
