"""Patient millimetres to pixels: there and back, as highdicom has it, on oblique planes too."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from catalog import geometry

lengths = st.floats(0.05, 20.0)
coordinates = st.floats(-1000.0, 1000.0)
angles = st.floats(-np.pi, np.pi)


@st.composite
def images(draw):
    """Position, orientation and spacing of an image anyhow in space, with its spacings different."""
    (a, b, c) = (draw(angles) for _ in range(3))
    turn = np.eye(3)
    for axis, angle in enumerate((a, b, c)):
        one = np.eye(3)
        at = [i for i in range(3) if i != axis]
        one[np.ix_(at, at)] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        turn = turn @ one
    return [draw(coordinates) for _ in range(3)], [*turn[:, 0], *turn[:, 1]], [draw(lengths), draw(lengths)]


@given(images(), st.lists(st.tuples(st.floats(-600, 600), st.floats(-600, 600)), min_size=1, max_size=20))
def test_there_and_back(image, pixels):
    """A pixel's place in the patient is that pixel again, on the image's plane."""
    found, off = geometry.to_pixels(geometry.to_patient(pixels, *image), *image)
    assert found.dtype == off.dtype == np.float64
    assert found.flags.c_contiguous
    np.testing.assert_allclose(found, pixels, atol=1e-6)
    np.testing.assert_allclose(off, 0.0, atol=1e-9 * 1e4)


@given(images(), st.lists(st.tuples(coordinates, coordinates, coordinates), min_size=1, max_size=20))
def test_any_point_falls_where_highdicom_says(image, points):
    """Pixels, with whole numbers at centres, and the distance from the plane agree with highdicom's transformers."""
    spatial = pytest.importorskip("highdicom.spatial")
    found, off = geometry.to_pixels(points, *image)
    to_reference = spatial.ReferenceToPixelTransformer(*image, round_output=False)(np.array(points, np.float64))
    np.testing.assert_allclose(np.column_stack([found, off]), to_reference, atol=1e-6, rtol=1e-9)
    # SCOORD's convention, whole numbers at corners, is half a pixel off: what a contour's points are not.
    corner = spatial.ReferenceToImageTransformer(*image)(np.array(points, np.float64))
    np.testing.assert_allclose(found + 0.5, corner[:, :2], atol=1e-6, rtol=1e-9)


def test_rows_columns_and_spacing_are_not_mixed_up():
    """x runs along a row in steps of the second spacing, y down a column in steps of the first (PS3.3 10.7.1.3)."""
    sagittal = ([10.0, 20.0, 30.0], [0, 1, 0, 0, 0, -1], [2.0, 0.5])
    np.testing.assert_array_equal(geometry.to_patient([[4, 3]], *sagittal), [[10.0, 22.0, 24.0]])
    found, off = geometry.to_pixels([[12.0, 22.0, 24.0]], *sagittal)
    np.testing.assert_array_equal(found, [[4.0, 3.0]])
    np.testing.assert_array_equal(off, [-2.0])  # row × column is towards the right


@pytest.mark.parametrize("decimals", [3, 6])
def test_rounded_directions_are_taken_as_written(decimals):
    """Directions written with three decimals are accepted whatever the angle, and a pixel still comes back as itself."""
    for angle in np.linspace(0, np.pi, 200):
        row = np.array([np.cos(angle), np.sin(angle), 0.0])
        column = np.array([-np.sin(angle) * np.cos(1.1), np.cos(angle) * np.cos(1.1), np.sin(1.1)])
        image = ([5.0, -7.0, 100.0], np.round([*row, *column], decimals), [0.7, 0.9])
        found, off = geometry.to_pixels(geometry.to_patient([[511.0, 300.0]], *image), *image)
        np.testing.assert_allclose(found, [[511.0, 300.0]], atol=1e-9)
        np.testing.assert_allclose(off, 0.0, atol=1e-9)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"orientation": [1, 0, 0, 0, 1.01, 0]}, "off unit vectors"),
        ({"orientation": [1, 0, 0, 0.01, 1, 0]}, "off unit vectors"),
        ({"orientation": [1, 0, 0, 1, 0, 0]}, "off unit vectors"),
        ({"orientation": [0, 0, 0, 0, 0, 0]}, "off unit vectors"),
        ({"orientation": [1, 0, 0, 0, float("nan"), 0]}, "finite"),
        ({"orientation": [1, 0, 0]}, "3, 6 and 2 numbers"),
        ({"spacing": [0.0, 1.0]}, "spacing positive"),
        ({"spacing": [1.0, -1.0]}, "spacing positive"),
        ({"position": [0.0, float("inf"), 0.0]}, "finite"),
    ],
)
def test_a_geometry_that_cannot_be_is_refused(changes, words):
    """Directions that are no unit vectors at a right angle, and spacings that are none, give an error and no pixels."""
    image = {"position": [0.0, 0.0, 0.0], "orientation": [1, 0, 0, 0, 1, 0], "spacing": [1.0, 1.0], **changes}
    with pytest.raises(ValueError, match=words):
        geometry.to_pixels([[0.0, 0.0, 0.0]], **image)
    with pytest.raises(ValueError, match=words):
        geometry.to_patient([[0.0, 0.0]], **image)


@pytest.mark.parametrize("points", [[[0.0, 0.0]], [0.0, 0.0, 0.0], [[0.0, 0.0, float("nan")]]])
def test_points_that_are_none_are_refused(points):
    """Anything but (n, 3) finite numbers is an error."""
    with pytest.raises(ValueError, match=r"\(n, 3\)"):
        geometry.to_pixels(points, [0, 0, 0], [1, 0, 0, 0, 1, 0], [1, 1])


@given(images(), st.integers(5, 60))
def test_the_plane_of_a_contour_is_found(image, count):
    """The normal of points on an image is the image's, however they cross; a point off it is as far off as it was put."""
    turn = np.linspace(0, 2 * np.pi, count, endpoint=False)
    eight = np.column_stack([100 * np.sin(turn), 40 * np.sin(2 * turn + 0.3)])
    points = geometry.to_patient(eight, image[0], image[1], [1.0, 1.0])
    normal = np.cross(image[1][:3], image[1][3:])
    found, width, off = geometry.plane(points)
    assert found is not None
    assert abs(abs(found @ normal) - 1) < 1e-9
    assert found[np.argmax(np.abs(found))] > 0
    assert off < 1e-4
    assert 10 < width < 100
    assert geometry.plane(np.vstack([points, points, points[:1] + 5 * normal]))[2] > 3


def test_points_on_a_line_have_no_plane():
    """One point, two, or many in a row do not say how a plane lies."""
    for points in ([[1.0, 2, 3]], [[1.0, 2, 3], [4, 5, 6]], [[x, 2 * x, -x] for x in np.linspace(0, 100, 7)]):
        normal, width, off = geometry.plane(np.array(points))
        assert normal is None
        assert width < 0.01
        assert off == 0.0
