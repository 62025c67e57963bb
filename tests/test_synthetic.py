"""Synthetic studies: the layout, the geometry, and that contours lie where the heart is drawn."""

import hashlib

import numpy as np
import pytest

from catalog.contours import polygon_area, rasterise, read_points
from catalog.dicom import decode_frame, read_instance
from catalog.synthetic import write_studies


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()
    }


def contour(folder, number, kind="i", patient=1):
    path = folder / "contourfiles" / f"SC-SYN-{patient:04d}" / f"{kind}-contours" / f"IM-0001-{number:04d}-{kind}contour-manual.txt"
    return read_points(path.read_bytes())


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    """Two patients, five slices of four phases: images 5, 9 and 13 are the labelled slices at rest, 7, 11 and 15 contracted."""
    folder = tmp_path_factory.mktemp("studies")
    write_studies(folder, patients=2, slices=5, phases=4)
    return folder


def test_files_are_those_of_the_sunnybrook_layout(studies):
    """Every file has its place and name in the layout; inner contours at two phases, outer at one, none in the first and last slice."""
    expected = {"link.csv"}
    for patient in ("0001", "0002"):
        expected |= {f"dicoms/SYN{patient}/{number}.dcm" for number in range(1, 21)}
        for kind, numbers in (("i", (5, 7, 9, 11, 13, 15)), ("o", (5, 9, 13))):
            expected |= {f"contourfiles/SC-SYN-{patient}/{kind}-contours/IM-0001-{n:04d}-{kind}contour-manual.txt" for n in numbers}
    assert set(contents(studies)) == expected
    assert (studies / "link.csv").read_text() == "patient_id,original_id\nSYN0001,SC-SYN-0001\nSYN0002,SC-SYN-0002\n"


def test_headers_give_the_geometry_of_a_short_axis_stack(studies):
    """Slices lie 10 mm apart, a slice's images at one place with rising trigger times; file number is Instance Number; UIDs are unique."""
    instances = [read_instance(studies / "dicoms" / "SYN0001" / f"{number}.dcm") for number in range(1, 21)]
    assert [instance.instance_number for instance in instances] == list(range(1, 21))
    assert {(i.patient_id, i.modality, i.images_in_acquisition, i.transfer_syntax_uid) for i in instances} == {
        ("SYN0001", "MR", 20, "1.2.840.10008.1.2.1")
    }
    assert len({instance.sop_instance_uid for instance in instances}) == 20
    assert len({(instance.study_instance_uid, instance.series_instance_uid) for instance in instances}) == 1
    assert all(len(instance.sop_instance_uid) <= 64 for instance in instances)
    frames = [instance.frames[0] for instance in instances]
    assert {(f.rows, f.columns, f.dtype, f.slope, f.intercept, f.pixel_spacing) for f in frames} == {
        (256, 256, "<i2", 1.0, 0.0, (1.367188, 1.367188))
    }
    positions = np.array([frame.position for frame in frames]).reshape(5, 4)
    assert (positions == positions[:, :1]).all()
    np.testing.assert_allclose(np.diff(positions[:, 0]), 10.0, atol=1e-3)
    assert (np.diff(np.array([frame.trigger_time for frame in frames]).reshape(5, 4), axis=1) > 0).all()


def test_contours_are_of_the_real_kind(studies):
    """Points are multiples of 0.5 and at most one pixel apart, and the mask has the polygon's area within 2 %."""
    for number in (5, 7, 9, 11, 13, 15):
        points = contour(studies, number)
        np.testing.assert_array_equal(points * 2, np.rint(points * 2))
        steps = np.hypot(*(points - np.roll(points, 1, axis=0)).T)
        assert steps.min() > 0
        assert steps.max() <= 1.0
        area = polygon_area([points])
        assert abs(rasterise([points], 256, 256, convention="centre").sum() - area) <= max(1.0, 0.02 * area)


def test_contours_lie_where_the_heart_is_drawn(studies):
    """Within the outer contour what is bright is what the inner one holds; moved by a pixel, it fits worse, each way about as much."""
    moved = dict.fromkeys([(1, 0), (-1, 0), (0, 1), (0, -1)], 0)
    unmoved = 0
    for patient in (1, 2):
        for number in (5, 9, 13):
            pixels = decode_frame(studies / "dicoms" / f"SYN{patient:04d}" / f"{number}.dcm", 0)
            inner, outer = (contour(studies, number, kind, patient) for kind in "io")
            pool = rasterise([inner], 256, 256, convention="centre")
            wall = rasterise([outer, inner], 256, 256, convention="centre")
            bright = (pool | wall) & (pixels > (pixels[pool].mean() + pixels[wall].mean()) / 2)
            unmoved += (bright ^ pool).sum()
            assert (bright ^ pool).sum() < 0.1 * pool.sum()
            for x, y in moved:
                # Not quite a pixel: half the points of a half-pixel grid meet centres, and which side those fall to must not favour a way.
                shift = (x * (1 - 1e-6), y * (1 - 1e-6))
                moved[x, y] += (bright ^ rasterise([inner], 256, 256, convention="centre", shift=shift)).sum()
    assert min(moved.values()) > unmoved
    assert moved[1, 0] == pytest.approx(moved[-1, 0], rel=0.15), moved
    assert moved[0, 1] == pytest.approx(moved[0, -1], rel=0.15), moved


def test_the_heart_contracts_and_narrows(studies):
    """The pool is smaller contracted than at rest, smaller towards the apex, and always within the outer contour."""
    rest, contracted = ([polygon_area([contour(studies, number)]) for number in numbers] for numbers in ((5, 9, 13), (7, 11, 15)))
    assert all(small < large for small, large in zip(contracted, rest, strict=True))
    assert rest == sorted(rest, reverse=True)
    for number in (5, 9, 13):
        inner, outer = (rasterise([contour(studies, number, kind)], 256, 256, convention="centre") for kind in "io")
        assert not (inner & ~outer).any()


def test_a_threshold_does_not_find_the_pool(studies):
    """Other things are as bright as the pool: the best threshold marks at least as much beside it as in it."""
    pixels = decode_frame(studies / "dicoms" / "SYN0001" / "9.dcm", 0)
    pool = rasterise([contour(studies, 9)], 256, 256, convention="centre")
    dice = [2 * (pool & (pixels > level)).sum() / (pool.sum() + (pixels > level).sum()) for level in range(0, 1000, 10)]
    assert max(dice) < 0.67


def test_the_same_arguments_give_the_same_bytes(tmp_path):
    """Studies are made by the seed alone; a patient's do not depend on how many there are, nor images on which are labelled."""
    for name, arguments in {
        "a": {},
        "again": {},
        "more": {"patients": 2},
        "every": {"every_image": True},
        "other": {"seed": 1},
    }.items():
        write_studies(tmp_path / name, **{"patients": 1, "slices": 2, "phases": 3, "size": 64} | arguments)
    first = contents(tmp_path / "a")
    assert contents(tmp_path / "again") == first
    del first["link.csv"]
    for name in ("more", "every"):
        assert first.items() <= contents(tmp_path / name).items()
    assert not first.items() & contents(tmp_path / "other").items()


def test_every_image_can_be_labelled(tmp_path):
    """With every_image each image has an inner contour that holds pixels, at the smallest size too."""
    write_studies(tmp_path, patients=1, slices=5, phases=3, size=32, every_image=True)
    for number in range(1, 16):
        assert rasterise([contour(tmp_path, number)], 32, 32, convention="centre").any()


def test_one_slice_of_one_phase_is_enough(tmp_path):
    """The smallest study has one image with both contours."""
    write_studies(tmp_path, patients=1, slices=1, phases=1, size=32)
    assert len(contents(tmp_path)) == 4


@pytest.mark.parametrize(
    "wrong",
    [{"patients": 0}, {"slices": 0}, {"phases": 0}, {"size": 31}, {"size": 5000}, {"slices": 100, "phases": 100}, {"patients": 10_000}],
)
def test_sizes_that_cannot_be_are_refused(tmp_path, wrong):
    """Nothing is written for counts that no study can have or that names have no digits for."""
    with pytest.raises(ValueError, match="must be within"):
        write_studies(tmp_path / "studies", **wrong)
    assert not (tmp_path / "studies").exists()
