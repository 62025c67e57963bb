"""Contours: what is read, which pixels belong, and what is packed."""

import math
import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from catalog import contours
from catalog.contours import pack, polygon_area, rasterise, read_points, unpack
from catalog.errors import FileError

DATA = Path(os.environ.get("SCANFEED_DATA", Path(__file__).parents[2] / "shared" / "data"))
SUNNYBROOK = DATA / "sunnybrook" / "final_data" / "contourfiles"
CONVENTIONS = ["centre", "corner"]


def exact_mask(rings, rows, columns, convention):
    """The definition, pixel by pixel in rational numbers: cross an edge's half-open height left of or at the centre, and change sides."""
    centre = Fraction(1, 2) if convention == "corner" else Fraction(0)
    mask = np.zeros((rows, columns), dtype=bool)
    for ring in rings:
        points = [(Fraction(float(x)), Fraction(float(y))) for x, y in ring]
        for (x1, y1), (x2, y2) in zip(points, points[1:] + points[:1], strict=True) if len(points) >= 3 else ():
            for row in range(rows):
                y = row + centre
                if (y1 <= y) != (y2 <= y):
                    x = x1 + (y - y1) * (x2 - x1) / (y2 - y1)
                    for column in range(columns):
                        mask[row, column] ^= column + centre >= x
    return mask


halves = st.integers(-6, 26).map(lambda number: number / 2)
# An ulp beside a centre or a vertex is where rounding would decide.
almost_halves = st.tuples(halves, st.integers(-3, 3)).map(lambda pair: pair[0] + pair[1] * float(np.spacing(abs(pair[0]) or 1.0)))
anything = st.floats(-1e308, 1e308, allow_nan=False) | st.floats(-20, 20, allow_nan=False)
tiny = st.integers(-4, 4).map(lambda number: number * 5e-324)
thirds = st.integers(-9, 40).map(lambda number: number / 3)


def rings_of(coordinates):
    return st.lists(st.lists(st.tuples(coordinates, coordinates), min_size=0, max_size=8), min_size=0, max_size=3)


@pytest.mark.parametrize("convention", CONVENTIONS)
@settings(max_examples=400, deadline=None)
@given(rings=st.one_of(*(rings_of(kind) for kind in (halves, almost_halves, thirds, anything, tiny | halves, halves | anything))))
def test_mask_is_exact(convention, rings):
    """For any finite polygon, self-crossing, doubled, degenerate, with holes or outside, the mask is the definition in rational numbers."""
    arrays = [np.array(ring, dtype=np.float64).reshape(-1, 2) for ring in rings]
    np.testing.assert_array_equal(rasterise(arrays, 9, 11, convention=convention), exact_mask(arrays, 9, 11, convention))


@settings(max_examples=100, deadline=None)
@given(rings=rings_of(thirds), at_once=st.integers(1, 20))
def test_mask_does_not_depend_on_how_much_is_held_at_once(rings, at_once):
    """A polygon of many crossings, sorted out in parts, has the same mask."""
    arrays = [np.array(ring, dtype=np.float64).reshape(-1, 2) for ring in rings]
    whole = rasterise(arrays, 12, 12, convention="centre")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contours, "_CROSSINGS_AT_ONCE", at_once)
        np.testing.assert_array_equal(rasterise(arrays, 12, 12, convention="centre"), whole)


def test_long_slanted_edges_through_centres_are_exact():
    """Edges off the half-pixel grid whose crossings fall on centres, in their hundreds, are decided rationally, not by rounding."""
    ring = np.array([[0.1, 0.1], [300.1, 100.1], [300.1, 290.3], [0.1, 200.3]])
    np.testing.assert_array_equal(rasterise([ring], 60, 60, convention="centre"), exact_mask([ring], 60, 60, "centre"))


@pytest.mark.parametrize("convention", CONVENTIONS)
@settings(max_examples=300, deadline=None)
@given(through=st.tuples(halves, halves), far=st.tuples(st.integers(-(2**50), 2**50), st.integers(2**51, 2**52)), off=st.integers(-1, 1))
def test_edges_from_far_away_are_exact(convention, through, far, off):
    """Long edges through a centre or next to it, with ends whose products no longer fit 53 bits, are decided rightly."""
    reach = np.array(far) / 256
    ring = np.array([through - reach, through + reach * 0.75 + (0, off / 256), through + reach[::-1] * (1, -1)])
    np.testing.assert_array_equal(rasterise([ring], 9, 11, convention=convention), exact_mask([ring], 9, 11, convention))


def test_edges_longer_than_any_float_are_exact():
    """Where the difference of two coordinates overflows, rational arithmetic still knows the crossing."""
    for ring in (np.array([[0.3, -1e308], [6.1, 1e308], [20.0, 0.0]]), np.array([[-1e308, 0.3], [1e308, 6.1], [0.0, 20.0]])):
        np.testing.assert_array_equal(rasterise([ring], 9, 11, convention="centre"), exact_mask([ring], 9, 11, "centre"))


@pytest.mark.parametrize(("convention", "first"), [("centre", 0.0), ("corner", 0.5)])
def test_left_and_top_edges_belong_right_and_bottom_do_not(convention, first):
    """A square through four pixels' centres holds those on its left and top edge only, in both conventions."""
    square = np.array([[1, 2], [4, 2], [4, 5], [1, 5]]) + first
    expected = np.zeros((8, 8), dtype=bool)
    expected[2:5, 1:4] = True
    np.testing.assert_array_equal(rasterise([square], 8, 8, convention=convention), expected)
    np.testing.assert_array_equal(rasterise([square[::-1]], 8, 8, convention=convention), expected)


@settings(max_examples=200, deadline=None)
@given(cut=st.tuples(halves, halves), start=st.floats(0, 12), end=st.floats(0, 12))
def test_neighbours_share_no_pixel_and_leave_none_out(cut, start, end):
    """Two polygons either side of a broken line cover the image once: no pixel twice, none left."""
    line = [(start, -1.0), (min(max(cut[0], 0.0), 12.0), min(max(cut[1], 0.0), 12.0)), (end, 13.0)]
    left = rasterise([np.array([(-1.0, -1.0), *line, (-1.0, 13.0)])], 12, 12, convention="corner")
    right = rasterise([np.array([*line, (13.0, 13.0), (13.0, -1.0)])], 12, 12, convention="corner")
    assert not (left & right).any()
    assert (left | right).all()


def test_a_ring_within_a_ring_is_a_hole():
    """Even-odd over all rings: the inner ring cuts out, whichever way round it is drawn."""
    outer = np.array([[0.0, 0], [8, 0], [8, 8], [0, 8]])
    inner = np.array([[2.0, 2], [5, 2], [5, 5], [2, 5]])
    for hole in (inner, inner[::-1]):
        mask = rasterise([outer, hole], 10, 10, convention="centre")
        assert mask.sum() == 64 - 9
        assert not mask[2:5, 2:5].any()


def test_outside_is_clipped():
    """A polygon partly outside has the mask that a larger image has there; one wholly outside, on any side, has none."""
    ring = np.array([[-3.3, -2.1], [9.7, 1.2], [14.5, 13.5], [2.2, 8.8]])
    larger = rasterise([ring], 30, 30, convention="centre", shift=(10.0, 10.0))
    np.testing.assert_array_equal(rasterise([ring], 8, 9, convention="centre"), larger[10:18, 10:19])
    for shift in ((-50.0, 0.0), (50.0, 0.0), (0.0, -50.0), (0.0, 50.0), (1e300, 0.0)):
        assert not rasterise([ring], 8, 9, convention="centre", shift=shift).any()


def test_shift_moves_the_mask():
    """A shift of whole pixels moves the mask by them; the corner convention is the other one half a pixel away."""
    ring = np.array([[2.5, 2.0], [7.0, 3.5], [6.5, 8.0], [3.0, 7.5]])
    mask = rasterise([ring], 12, 12, convention="centre")
    np.testing.assert_array_equal(rasterise([ring], 12, 12, convention="centre", shift=(-1.0, 2.0)), np.roll(mask, (2, -1), (0, 1)))
    np.testing.assert_array_equal(rasterise([ring], 12, 12, convention="corner", shift=(0.5, 0.5)), mask)


@pytest.mark.parametrize(
    ("rings", "rows", "convention"),
    [
        ([np.zeros((3, 3))], 4, "centre"),
        ([np.zeros(6)], 4, "centre"),
        ([np.array([[0, 0], [1, math.nan], [2, 2]])], 4, "centre"),
        ([np.array([[0, 0], [1, math.inf], [2, 2]])], 4, "corner"),
        ([np.zeros((3, 2))], 4, "center"),
        ([np.zeros((3, 2))], -1, "centre"),
    ],
)
def test_wrong_arguments_are_refused(rings, rows, convention):
    """What is no polygon, no convention or no image is a ValueError, never a guessed mask."""
    with pytest.raises(ValueError, match=r"ring|convention|image"):
        rasterise(rings, rows, 4, convention=convention)


@pytest.mark.parametrize("rings", [[], [np.empty((0, 2))], [np.array([[1.0, 1]])], [np.array([[1.0, 1], [5, 5]])]])
def test_fewer_than_three_points_enclose_nothing(rings):
    """A point or a line has no pixels and no area."""
    assert not rasterise(rings, 8, 8, convention="centre").any()
    assert polygon_area(rings) == 0.0


@pytest.mark.skipif(not SUNNYBROOK.is_dir(), reason=f"no Sunnybrook contours under {DATA}; set SCANFEED_DATA")
@pytest.mark.parametrize(
    ("study", "kind", "pixels", "area"),
    [
        ("SC-HF-I-1", "i", 17788, 17792.75),
        ("SC-HF-I-2", "i", 22559, 22589.875),
        ("SC-HF-I-1", "o", 16186, 16183.625),
        ("SC-HF-I-2", "o", 20159, 20169.375),
    ],
)
def test_real_contours_have_the_area_of_their_polygons(study, kind, pixels, area):
    """With centres at integers the real masks are the published sums, each within 2 % (or one pixel) of its polygon's area."""
    masks, areas = [], []
    for path in sorted((SUNNYBROOK / study / f"{kind}-contours").iterdir()):
        points = read_points(path.read_bytes())
        masks.append(int(rasterise([points], 256, 256, convention="centre").sum()))
        areas.append(polygon_area([points]))
        assert abs(masks[-1] - areas[-1]) <= max(1.0, 0.02 * areas[-1]), path.name
    assert sum(masks) == pixels
    assert sum(areas) == pytest.approx(area)


def test_area_of_known_polygons():
    """Shoelace for one ring, either way round and far from the origin; a hole counts against its ring, an island in it for it."""
    square = np.array([[0.0, 0], [8, 0], [8, 8], [0, 8]])
    assert polygon_area([square]) == polygon_area([square[::-1]]) == 64.0
    assert polygon_area([np.vstack([square, square[:1]])]) == 64.0
    assert polygon_area([square + 1e9]) == 64.0
    assert polygon_area([square, square / 2 + 2]) == 64.0 - 16.0
    assert polygon_area([square, square / 2 + 2, square / 8 + 3]) == 64.0 - 16.0 + 1.0
    assert polygon_area([square, square + 20]) == 128.0


@settings(max_examples=100, deadline=None)
@given(rows=st.integers(0, 20), columns=st.integers(0, 20), seed=st.integers(0, 1000))
def test_pack_and_unpack_give_the_mask_back(rows, columns, seed):
    """Packing loses nothing for any size, whole bytes or not."""
    mask = np.random.default_rng(seed).random((rows, columns)) < 0.5
    bits = pack(mask)
    assert len(bits) == (rows * columns + 7) // 8
    back = unpack(bits, rows, columns)
    assert back.dtype == np.bool_
    np.testing.assert_array_equal(back, mask)


def test_bits_are_in_c_order_from_the_highest():
    """The order of bits is a contract with what is stored: (0, 0) is the highest bit of the first byte, rows follow without a gap."""
    mask = np.zeros((2, 5), dtype=bool)
    mask[0, 0] = mask[1, 0] = mask[1, 4] = True
    assert pack(mask) == bytes([0b10000100, 0b01000000])
    assert pack(np.asfortranarray(mask)) == pack(mask)


def test_bits_of_another_size_are_refused():
    """Bits that are not those of the size asked for are an error, not a mask with a guessed rest."""
    with pytest.raises(ValueError, match="takes 2 bytes, not 3"):
        unpack(b"\0\0\0", 2, 5)


@pytest.mark.parametrize(
    "text",
    [
        b"1.5 2\n3 4.25\n-1e1 .5\n",
        b"1.5,2\n3,4.25\n-10,0.5",
        b"\xef\xbb\xbf1.5 , 2  \r\n\r\n\t3\t4.25 \r\n+1.5 0.5\r\n".replace(b"+1.5 0.5", b"-10. 0.5"),
        b"\n\n  1.5 2\r3 4.25\r-10 0.5\r",
    ],
)
def test_points_are_read_as_they_stand(text):
    """Spaces, tabs, commas, blank lines, any line ends and a byte order mark make no difference to the points."""
    points = read_points(text)
    assert points.dtype == np.float64
    np.testing.assert_array_equal(points, [[1.5, 2.0], [3.0, 4.25], [-10.0, 0.5]])


def test_a_closed_ring_stays_closed_and_an_open_one_open():
    """Points are kept as read: nothing closes a ring, drops a double or sorts."""
    np.testing.assert_array_equal(read_points(b"1 1\n1 1\n2 2\n1 1"), [[1, 1], [1, 1], [2, 2], [1, 1]])


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (b"1 2\n3 4\n5\n", 3),
        (b"1 2\n\n\n3 4 5\n", 4),
        (b"1 2\r\n3 x\r\n", 2),
        (b"# a comment\n1 2\n", 1),
        (b"1 2\nnan 3\n", 2),
        (b"1 2\ninf 3\n", 2),
        (b"1 1e999\n", 1),
        (b"1 2\n1000001 3\n", 2),
        (b"1,5 2,5\n", 1),
        (b"1,,2\n", 1),
        (b"1_0 2\n", 1),
        (b"0x1 2\n", 1),
        ("1 2\n１ 2\n".encode(), 2),
        (b"1 2\n3 4\0\n", 2),
        ("1 2\n".encode("utf-16"), 1),
        (b"1 2\n\xff\xfe\n", 2),
        (b"1 2\n" + b"1" * 1000 + b" 2\n", 2),
    ],
)
def test_what_is_no_point_is_refused_with_its_line(text, line):
    """Anything but two finite numbers a line is an error that names the line and not what stands in it."""
    with pytest.raises(FileError, match=rf"^line {line}: ") as caught:
        read_points(text)
    assert caught.value.code == "contour-unreadable"


@pytest.mark.parametrize("text", [b"", b"\n\n", b" \t\r\n", b"\xef\xbb\xbf"])
def test_a_file_without_a_point_is_empty(text):
    """Nothing but white space is an empty contour, which is not the same as an unreadable one."""
    with pytest.raises(FileError) as caught:
        read_points(text)
    assert caught.value.code == "contour-empty"


def test_absurd_sizes_are_refused(monkeypatch):
    """Above the limit the data is not even looked at."""
    monkeypatch.setattr(contours, "MAX_BYTES", 10)
    assert len(read_points(b"1 2\n3 4\n5 ".replace(b"5 ", b""))) == 2
    with pytest.raises(FileError, match="11 bytes are too many"):
        read_points(b"1 2\n3 4\n5 6")


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60) | st.text("0123456789.,eE+- \r\n\t_naif\0", max_size=60).map(str.encode))
def test_any_bytes_are_points_or_a_file_error(data):
    """Whatever the bytes, the answer is points within bounds or a FileError of one line."""
    try:
        points = read_points(data)
    except FileError as error:
        assert error.code in ("contour-empty", "contour-unreadable")
        assert "\n" not in str(error)
    else:
        assert points.shape[0] >= 1
        assert points.shape[1] == 2
        assert (np.abs(points) <= 1e6).all()


@pytest.mark.skipif(not (DATA / "sunnybrook" / "strays").is_dir(), reason=f"no stray files under {DATA}; set SCANFEED_DATA")
def test_the_swap_file_beside_the_contours_is_refused():
    """An editor's swap file, which starts like a contour's name, is no contour."""
    (stray,) = (path for path in (DATA / "sunnybrook" / "strays").iterdir() if path.suffix == ".swp")
    with pytest.raises(FileError, match="line 1: a NUL byte"):
        read_points(stray.read_bytes())
