"""Every layout end to end: `catalog ingest` as a command, and what the views and the feed's rows then say."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psycopg
import pydicom
import pytest
from numpy.typing import NDArray
from PIL import Image

from catalog import cli, contours, synthetic
from loaderd import Feed
from tests.conftest import DATA

TakeIn = Callable[..., dict[str, Any]]
Conn = psycopg.Connection[tuple[Any, ...]]

needs_data = pytest.mark.skipif(not (DATA / "manifest.csv").is_file(), reason=f"no shared data under {DATA}; set SCANFEED_DATA")
RT = DATA / "rtstruct" / "rt-utils"
SEG = DATA / "seg"
HIPPOCAMPUS = DATA / "nifti" / "hippocampus"


def threads() -> Executor:
    """What `--executor` names here: a process for each ingest's reading would take most of this file's time."""
    return ThreadPoolExecutor(1)


class Answer(NamedTuple):
    """What a command ended with."""

    code: int
    stdout: str
    stderr: str


def command(*arguments: object) -> Answer:
    """Run `catalog` in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["catalog", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
    assert "Traceback" not in err.getvalue()
    return Answer(code, out.getvalue(), err.getvalue())


@pytest.fixture
def take_in(conn: Conn) -> TakeIn:
    """Run `catalog ingest FOLDER …`; returns its summary with `code`, and holds `--dry-run` against what it then did."""

    def run(folder: Path, *options: object) -> dict[str, Any]:
        looked = command("ingest", folder, *options, "--dry-run", "--json")
        done = command("ingest", folder, *options, "--json", "--executor", "tests.test_layouts:threads")
        assert (looked.code in (0, 3), done.code in (0, 3)) == (True, True), done.stderr
        dry, summary = json.loads(looked.stdout), json.loads(done.stdout)
        assert (dry["layout"], dry["chosen"], dry["left_over"]) == (summary["layout"], summary["chosen"], summary["left_over"])
        rows = "SELECT kind FROM file f JOIN root r ON r.id = f.root_id WHERE f.state <> 'missing' AND f.format <> 'none' AND r.url = %s"
        kinds = Counter(kind for (kind,) in conn.execute(rows, [str(folder)]))
        assert dry["images"] + dry["annotations"] == kinds.total()
        assert kinds["annotation"] >= dry["annotations"]  # RTSTRUCT and SEG look like images until they are opened
        if not dry["by_content"] and dry["annotations"] == kinds["annotation"] == summary["annotations"]:
            counts = dry["paired"], len(dry["proposed"]), len(dry["unpaired"])
            assert counts == (summary["paired"], summary["proposed"], summary["unpaired"])
        return {**summary, "code": done.code}

    return run


def ask(conn: Conn, query: str) -> list[tuple[Any, ...]]:
    return conn.execute(query).fetchall()


def flags(conn: Conn) -> Counter[str]:
    return Counter(rule for (rule,) in ask(conn, "SELECT rule FROM flag WHERE state = 'open'"))


def masks(conn: Conn, state: str = "accepted") -> dict[tuple[str, str, str, int], NDArray[np.bool_]]:
    """Return (annotation's file, structure, image's file, frame) → mask."""
    rows = ask(
        conn,
        "SELECT f.path, s.name, k.path, i.frame, m.rows, m.columns, m.box_row, m.box_column, m.box_rows, m.box_columns, m.bits "
        "FROM mask m JOIN pairing p ON p.id = m.pairing_id JOIN annotation a ON a.id = p.annotation_id AND a.current "
        "JOIN file f ON f.id = a.file_id JOIN structure s ON s.id = a.structure_id JOIN image i ON i.id = p.image_id "
        f"JOIN location l ON l.image_id = i.id AND l.preferred JOIN file k ON k.id = l.file_id WHERE p.state = '{state}'",
    )
    found = {(row[0], row[1], row[2], row[3]): contours.unboxed(row[4], row[5], row[6:10], row[10]) for row in rows}
    assert len(found) == len(rows)
    return found


def shown(sample: int, path: Path) -> Image.Image:
    """Run `catalog show`; returns the picture."""
    done = command("show", sample, "--output", path)
    assert done.code == 0, done.stderr
    picture = Image.open(path)
    picture.load()
    assert picture.format == "PNG"
    assert picture.width > 900
    assert picture.height > 500
    return picture


def save(dataset: pydicom.Dataset, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path)


def copied(*sources: Path, to: Path) -> Path:
    """Copy files and folders into a new folder."""
    to.mkdir(parents=True, exist_ok=True)
    for source in sources:
        if source.is_dir():
            shutil.copytree(source, to / source.name)
        else:
            shutil.copy(source, to)
    return to


def by_shapely(points: list[list[float]], image: pydicom.Dataset) -> NDArray[np.bool_]:
    """Rings in mm → mask, even-odd, by homogeneous coordinates (PS3.3 C.7.6.2.1.1, turned round) and shapely: none of our own code."""
    shapely = pytest.importorskip("shapely")
    position, axes, spacing = (
        np.array(value, float) for value in (image.ImagePositionPatient, image.ImageOrientationPatient, image.PixelSpacing)
    )
    matrix = np.eye(4)
    matrix[:3, 0], matrix[:3, 1], matrix[:3, 3] = axes[:3] * spacing[1], axes[3:] * spacing[0], position
    matrix[:3, 2] = np.cross(axes[:3], axes[3:])
    row, column = np.indices((image.Rows, image.Columns))
    mask = np.zeros(row.shape, bool)
    for ring in points:
        mm = np.array(ring, float).reshape(-1, 3)
        pixels = np.linalg.solve(matrix, np.column_stack([mm, np.ones(len(mm))]).T).T[:, :2]
        mask ^= shapely.contains_xy(shapely.Polygon(pixels).buffer(0), column.ravel(), row.ravel()).reshape(mask.shape)
    return mask


def drawn_in(path: Path) -> dict[tuple[str, str], list[list[float]]]:
    """Return (ROI name, SOPInstanceUID) → rings of a structure set, by pydicom."""
    dataset = pydicom.dcmread(path)
    names = {roi.ROINumber: roi.ROIName for roi in dataset.StructureSetROISequence}
    found: dict[tuple[str, str], list[list[float]]] = {}
    for roi in dataset.ROIContourSequence:
        for contour in roi.ContourSequence:
            key = names[roi.ReferencedROINumber], contour.ContourImageSequence[0].ReferencedSOPInstanceUID
            found.setdefault(key, []).append(list(contour.ContourData))
    return found


@needs_data
@pytest.mark.parametrize("by", ["uid", "geometry"])
def test_rtstruct(take_in: TakeIn, conn: Conn, tmp_path: Path, by: str) -> None:
    """Each ROI lies on the image that it names, or without names on the one of its plane; masks are shapely's within 0.3 %.

    What refers to the slice that is not there is an annotation with a flag. A hole is a hole. `show` draws the contour where the mask is.
    """
    folder = copied(*RT.glob("*.dcm"), to=tmp_path / "rt")
    images = {path.name: pydicom.dcmread(path) for path in RT.glob("ct_*.dcm")}
    of_uid = {image.SOPInstanceUID: name for name, image in images.items()}
    expected = {
        (name, roi, of_uid[uid]): rings
        for name in ("rt.dcm", "invalid_reference_rt.dcm")
        for (roi, uid), rings in drawn_in(RT / name).items()
        if uid in of_uid
    }
    if by == "geometry":
        for name in ("rt.dcm", "invalid_reference_rt.dcm"):
            dataset = pydicom.dcmread(RT / name)
            for roi in dataset.ROIContourSequence:
                for contour in roi.ContourSequence:
                    del contour.ContourImageSequence
            dataset.save_as(folder / name)
        # rt_utils made up a frame of reference, and without images named nothing says that it is that of the images.
        expected = {key: rings for key, rings in expected.items() if key[0] != "rt.dcm"}
    summary = take_in(folder)
    counts = summary["layout"], summary["images"], summary["annotations"], summary["paired"], summary["unpaired"]
    assert counts == ("dicom", 2, 13, len(expected), 13 - len(expected))
    assert ask(conn, "SELECT DISTINCT method, state FROM pairing") == [(by, "accepted")]
    found = {(key[0], key[1], key[2]): mask for key, mask in masks(conn).items()}
    assert found.keys() == expected.keys()
    for key, rings in expected.items():
        theirs = by_shapely(rings, images[key[2]])
        assert np.count_nonzero(found[key] != theirs) <= 0.003 * theirs.sum(), key
    of_file = "SELECT f.path FROM flag g JOIN annotation a ON a.id = g.annotation_id JOIN file f ON f.id = a.file_id"
    named = Counter(path for (path,) in ask(conn, of_file))
    assert named == Counter({"invalid_reference_rt.dcm": 4}) + Counter({"rt.dcm": 1} if by == "geometry" else {})
    assert flags(conn) == {"PAIR-NO-IMAGE": named.total()}
    ((sample,),) = ask(conn, "SELECT sample_id FROM image_all WHERE path LIKE '%ct_1.dcm'")
    shown(sample, tmp_path / "rt.png")


# A plane tilted about two axes, with pixels that are not square: rows and columns cannot be mixed up unseen.
TILTED = [0.8, 0.6, 0.0, -0.36, 0.48, 0.8]
POLYGON = np.array([[10.3, 8.2], [50.6, 12.9], [44.1, 55.5], [15.2, 40.7]])
HOLE = np.array([[20.1, 18.3], [35.4, 20.2], [30.2, 33.9]])


def oblique(folder: Path) -> tuple[pydicom.Dataset, pydicom.Dataset]:
    """Write one image of 64 × 64 px in a tilted plane and a structure set with a hole on it, that names the image; return both."""
    image, rt = pydicom.dcmread(RT / "ct_1.dcm"), pydicom.dcmread(RT / "rt.dcm")
    image.PixelData = image.pixel_array[100:164, 100:164].tobytes()
    image.Rows = image.Columns = 64
    image.PixelSpacing, image.ImageOrientationPatient, image.ImagePositionPatient = [0.7, 1.3], TILTED, [-20.5, 31.25, -7]
    axes = np.array(TILTED)
    contours_of = rt.ROIContourSequence[0].ContourSequence
    for contour, ring in zip(contours_of, (POLYGON, HOLE), strict=True):
        mm = np.array([-20.5, 31.25, -7]) + ring[:, :1] * 1.3 * axes[:3] + ring[:, 1:] * 0.7 * axes[3:]
        contour.ContourData, contour.NumberOfContourPoints = [f"{value:.6f}" for value in mm.ravel()], len(ring)
    for roi in rt.StructureSetROISequence:
        roi.ReferencedFrameOfReferenceUID = image.FrameOfReferenceUID
    rt.ReferencedFrameOfReferenceSequence[0].FrameOfReferenceUID = image.FrameOfReferenceUID
    save(image, folder / "image.dcm")
    save(rt, folder / "rt.dcm")
    return image, rt


@needs_data
@pytest.mark.parametrize("named", [True, False])
def test_an_oblique_plane(take_in: TakeIn, conn: Conn, tmp_path: Path, named: bool) -> None:
    """Contours in mm on a tilted plane give the mask of the pixels that they were computed from, the hole left out."""
    _, rt = oblique(tmp_path / "tilted")
    if not named:
        for contour in rt.ROIContourSequence[0].ContourSequence:
            del contour.ContourImageSequence
        rt.save_as(tmp_path / "tilted" / "rt.dcm")
    assert take_in(tmp_path / "tilted")["paired"] == 1
    (mask,) = masks(conn).values()
    np.testing.assert_array_equal(mask, contours.rasterise([POLYGON, HOLE], 64, 64, convention="centre"))
    assert not mask[24, 28]
    assert mask[15, 20]
    assert flags(conn) == {}


@needs_data
def test_a_plane_with_two_images_is_a_question(take_in: TakeIn, conn: Conn, tmp_path: Path) -> None:
    """Two series with one geometry: unless the structure set says which, both are proposed, and a person's word makes the sample."""
    image, rt = oblique(tmp_path / "two")
    image.SeriesInstanceUID += ".1"
    image.SOPInstanceUID += ".1"
    image.file_meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID
    image.save_as(tmp_path / "two" / "again.dcm")
    for contour in rt.ROIContourSequence[0].ContourSequence:
        del contour.ContourImageSequence
    rt.save_as(tmp_path / "two" / "rt.dcm")
    summary = take_in(tmp_path / "two")
    assert (summary["paired"], summary["proposed"]) == (1, 0)  # it names a series
    rt.ReferencedFrameOfReferenceSequence[0].RTReferencedStudySequence[0].RTReferencedSeriesSequence = []
    rt.save_as(tmp_path / "two" / "rt.dcm")
    summary = take_in(tmp_path / "two")
    assert (summary["paired"], summary["proposed"], summary["masks"]) == (0, 1, 2)
    assert ask(conn, "SELECT count(*) FROM sample") == [(0,)]
    assert flags(conn) == {"PAIR-AMBIGUOUS": 1}
    ((pairing,),) = ask(
        conn,
        "SELECT p.id FROM pairing p JOIN annotation a ON a.id = p.annotation_id AND a.current JOIN location l ON l.image_id = p.image_id "
        "JOIN file f ON f.id = l.file_id WHERE f.path = 'again.dcm' AND p.state = 'proposed'",
    )
    assert command("pair", "accept", pairing).code == 0
    assert ask(conn, "SELECT path FROM sample WHERE error_flags = 0") == [(str(tmp_path / "two" / "again.dcm"),)]
    assert take_in(tmp_path / "two")["paired"] == 1


HIGHDICOM = ("binary", "binary_overlap", "binary_single_frame", "true_fractional")
SEGMENTATIONS = [*(f"highdicom-ct/seg_image_ct_{name}.dcm" for name in HIGHDICOM), "dcmqi-24x38x3/seg/label.seg"]


def by_highdicom(path: Path) -> Counter[tuple[str, str, bytes]]:
    """Return each frame's (segment's label, UID of its source image, bits) by highdicom."""
    highdicom = pytest.importorskip("highdicom")
    opened = highdicom.seg.segread(path)
    found: Counter[tuple[str, str, bytes]] = Counter()
    for group in opened.PerFrameFunctionalGroupsSequence:
        number = int(group.SegmentIdentificationSequence[0].ReferencedSegmentNumber)
        uid = str(group.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID)
        pixels = opened.get_pixels_by_source_instance(
            [uid], segment_numbers=[number], ignore_spatial_locations=True, assert_missing_frames_are_empty=True
        )[0, :, :, 0]
        bits = pixels >= 0.5 if pixels.dtype.kind == "f" else pixels.astype(bool)
        found[opened.get_segment_description(number).segment_label, uid, bits.tobytes()] += 1
    return found


@needs_data
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("by", ["uid", "geometry"])
def test_seg(take_in: TakeIn, conn: Conn, tmp_path: Path, by: str) -> None:
    """All real segmentations beside their sources: each mask is highdicom's, bit for bit, on the image of that UID; without references
    the geometry finds the same images. `show` draws them."""
    folder = tmp_path / "seg"
    shutil.copytree(SEG, folder)
    (folder / "dcmqi-24x38x3/multiframe/mf.dcm").unlink()  # the same planes as the three images
    expected = {name: by_highdicom(SEG / name) for name in SEGMENTATIONS}
    if by == "geometry":
        for name in SEGMENTATIONS:
            dataset = pydicom.dcmread(folder / name)
            for group in (*dataset.PerFrameFunctionalGroupsSequence, dataset.SharedFunctionalGroupsSequence[0]):
                group.pop("DerivationImageSequence", None)
            dataset.save_as(folder / name)
    summary = take_in(folder)
    assert (summary["annotations"], summary["paired"], summary["unpaired"], summary["proposed"]) == (18, 18, 0, 0)
    assert ask(conn, "SELECT DISTINCT method FROM pairing") == [(by,)]
    uids = dict(ask(conn, "SELECT f.path, n.sop_instance_uid FROM file f JOIN location l ON l.file_id = f.id "
                                                 "JOIN image i ON i.id = l.image_id JOIN instance n ON n.id = i.instance_id"))  # fmt: skip
    found: dict[str, Counter[tuple[str, str, bytes]]] = {name: Counter() for name in SEGMENTATIONS}
    for (name, structure, image, frame), mask in masks(conn).items():
        assert frame == 0
        found[name][structure, uids[image], mask.tobytes()] += 1
    assert found == expected
    ((sample,),) = ask(conn, "SELECT sample_id FROM sample WHERE structure = 'Liver' AND area_px > 0")
    shown(sample, tmp_path / "seg.png")


@needs_data
def test_a_segment_on_another_grid_has_no_mask(take_in: TakeIn, conn: Conn, tmp_path: Path) -> None:
    """A source image that was cropped since is still the one that is named, but its pixels are not those of the segment: a flag."""
    folder = copied(SEG / "dcmqi-24x38x3" / "image", SEG / "dcmqi-24x38x3" / "seg", to=tmp_path / "seg")
    for path in (folder / "image").iterdir():
        image = pydicom.dcmread(path)
        image.PixelData, image.Rows = image.pixel_array[:30].tobytes(), 30
        image.save_as(path)
    summary = take_in(folder)
    assert (summary["annotations"], summary["masks"]) == (3, 0)
    assert flags(conn) == {"PAIR-GRID": 3}
    assert ask(conn, "SELECT count(*) FROM sample WHERE error_flags = 0") == [(0,)]


@needs_data
@pytest.mark.parametrize("names", ["Decathlon", "nnU-Net"])
def test_nifti(take_in: TakeIn, conn: Conn, tmp_path: Path, names: str) -> None:
    """Each slice is an image and each label a structure, named by dataset.json; another shape is a flag and a proposal without a mask.

    What is fed are nibabel's numbers, read by offset from the one file in the cache that the gzip'd one became. `show` draws them.
    """
    nibabel = pytest.importorskip("nibabel")
    folder = tmp_path / "Task04"
    cases = ["hippocampus_001", "hippocampus_004", "hippocampus_006"]
    for case in cases:
        channel = "_0000" if names == "nnU-Net" else ""
        copied(HIPPOCAMPUS / "images" / f"{case}.nii.gz", to=folder / "imagesTr").joinpath(f"{case}.nii.gz").rename(
            folder / "imagesTr" / f"{case}{channel}.nii.gz"
        )
        copied(HIPPOCAMPUS / "labels" / f"{case}.nii.gz", to=folder / "labelsTr")
    # The labels of another patient: a volume of another shape.
    shutil.copy(HIPPOCAMPUS / "labels" / "hippocampus_007.nii.gz", folder / "labelsTr" / "hippocampus_006.nii.gz")
    labels = {"background": 0, "anterior": 1, "posterior": 2}
    table = {"labels": labels} if names == "nnU-Net" else {"labels": {str(value): name for name, value in labels.items()}}
    (folder / "dataset.json").write_text(json.dumps(table))
    summary = take_in(folder)
    assert (summary["layout"], summary["code"]) == ("nifti", 3)
    found = masks(conn)
    for case in cases[:2]:
        truth = np.asarray(nibabel.load(HIPPOCAMPUS / "labels" / f"{case}.nii.gz").dataobj)
        expected = {(name, k): value == truth[:, :, k].T for name, value in labels.items() if value for k in range(truth.shape[2])}
        mine = {(key[1], key[3]): mask for key, mask in found.items() if case in key[0]}
        assert all(case in key[2] for key in found if case in key[0])
        for key, mask in expected.items():
            np.testing.assert_array_equal(mine.pop(key, np.zeros_like(mask)), mask)
        assert not mine
    assert not any("hippocampus_006" in key[0] for key in found)
    # Each segment has its flag; a slice beyond the image's last has no image either.
    flagged = "SELECT count(*) FROM flag WHERE rule = 'PAIR-GRID' AND annotation_id IS NOT NULL"
    segments = "SELECT count(*) FROM annotation a JOIN file f ON f.id = a.file_id WHERE f.path LIKE '%006%'"
    assert ask(conn, flagged) == ask(conn, segments) != [(0,)]
    assert set(flags(conn)) == {"PAIR-GRID", "PAIR-NO-IMAGE"}
    assert ask(conn, "SELECT count(*) FROM sample WHERE patient = 'hippocampus_006'") == [(0,)]
    ((sample, slice_),) = ask(conn, "SELECT sample_id, frame FROM sample WHERE patient = 'hippocampus_004' ORDER BY area_px DESC LIMIT 1")
    shown(sample, tmp_path / "nifti.png")
    if names == "nnU-Net":
        return
    values = nibabel.load(HIPPOCAMPUS / "images" / "hippocampus_004.nii.gz").get_fdata(dtype=np.float64)
    frames = dict(ask(conn, "SELECT sample_id, frame FROM image_all"))
    fed = 0
    with Feed(where="patient = 'hippocampus_004'", structures=["anterior"], batch_size=8) as feed:
        for batch in feed.epoch():
            assert batch.masks is not None
            for number, image, mask in zip(batch.sample_ids.tolist(), batch.images, batch.masks, strict=True):
                k = frames[number]
                np.testing.assert_array_equal(image, values[:, :, k].T.astype(np.float32))
                np.testing.assert_array_equal(
                    mask, found["labelsTr/hippocampus_004.nii.gz", "anterior", "imagesTr/hippocampus_004.nii.gz", k]
                )
                fed += 1
    assert fed > 5
    assert slice_ in frames.values()
    volumes = [path for path in (tmp_path / "home").rglob("*") if path.is_file() and path.stat().st_size >= values.size * 4]
    assert len([path for path in volumes if "cache" in str(path)]) == 1


@needs_data
def test_idx(take_in: TakeIn, conn: Conn, tmp_path: Path) -> None:
    """MNIST plain and gzip'd: each digit is an image, each label its label; both give the same samples."""
    names = ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
    content = {name: gzip.decompress((DATA / "mnist" / f"{name}.gz").read_bytes()) for name in names}
    count = 300
    head = count.to_bytes(4, "big")
    images, labels = content.values()
    content["t10k-images-idx3-ubyte"] = images[:4] + head + images[8 : 16 + count * 784]
    content["t10k-labels-idx1-ubyte"] = labels[:4] + head + labels[8 : 8 + count]
    for name, data in content.items():
        for kind in ("plain", "zipped"):
            (tmp_path / kind).mkdir(exist_ok=True)
            (tmp_path / kind / (name + ".gz" * (kind == "zipped"))).write_bytes(gzip.compress(data) if kind == "zipped" else data)
    for kind in ("plain", "zipped"):
        summary = take_in(tmp_path / kind)
        assert (summary["layout"], summary["images"], summary["paired"], summary["standing_errors"]) == ("idx", count, count, 0)
        rows = ask(conn, f"SELECT frame, kind, label, structure FROM sample WHERE path LIKE '{tmp_path}/{kind}/%' ORDER BY frame")
        assert rows == [(k, "label", str(labels[8 + k]), rows[0][3]) for k in range(count)]
    hashes = ask(conn, "SELECT frame, count(DISTINCT pixel_hash) FROM image GROUP BY 1")
    assert all(different == 1 for _, different in hashes)
    ((sample,),) = ask(conn, f"SELECT sample_id FROM sample WHERE frame = 7 AND path LIKE '{tmp_path}/zipped/%'")
    done = command("show", sample, "--output", tmp_path / "digit.png")
    assert done.code == 0, done.stderr


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """One synthetic patient to change: 6 images of 64×64 px, with contours on some."""
    folder = tmp_path / "arrived"
    synthetic.write_studies(folder, patients=1, slices=3, phases=2, size=64, seed=5)
    return folder


def painted(folder: Path, number: int) -> NDArray[np.bool_]:
    """Paint a mask for an image as a PNG of 0 and 255; returns it."""
    mask = np.zeros((64, 64), bool)
    mask[10 + number : 30, 20 : 40 + number] = True
    (folder / "masks").mkdir(exist_ok=True)
    Image.fromarray(mask.astype(np.uint8) * 255).save(folder / "masks" / f"{number}.png")
    return mask


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_table(take_in: TakeIn, conn: Conn, study: Path, kind: str) -> None:
    """A table brings DICOM images with painted masks, structures and labels; a structure that it changes is read again though the mask
    file did not change; when it cannot be read any more nothing is marked missing."""
    expected = {number: painted(study, number) for number in (1, 2, 3)}
    rows = [[f"dicoms/SYN0001/{number}.dcm", f"masks/{number}.png", "heart", f"grade {number}", "train"] for number in expected]
    columns = ["img", "mask_path", "what", "grade", "split"]
    table = study / f"scans.{kind}"

    def write() -> None:
        if kind == "csv":
            table.write_text("\n".join(",".join(row) for row in [columns, *rows]) + "\n")
        else:
            pyarrow = pytest.importorskip("pyarrow")
            parquet = pytest.importorskip("pyarrow.parquet")
            parquet.write_table(pyarrow.table(dict(zip(columns, map(list, zip(*rows, strict=True)), strict=True))), table)

    write()
    roles = {"image": "img", "annotation": "mask_path", "structure": "what", "label": "grade"}
    options = ["--table", table, *(word for role, name in roles.items() for word in ("--column", f"{role}={name}"))]
    summary = take_in(study, *options)
    assert (summary["layout"], summary["images"], summary["annotations"], summary["paired"], summary["code"]) == ("table", 3, 6, 6, 0)
    found = masks(conn)
    assert {key[:3] for key in found} == {(f"masks/{n}.png", "heart", f"dicoms/SYN0001/{n}.dcm") for n in expected}
    for key, mask in found.items():
        np.testing.assert_array_equal(mask, expected[int(Path(key[0]).stem)])
    labels = "SELECT instance_number, label FROM annotation_all WHERE kind = 'label' AND current ORDER BY 1"
    assert ask(conn, labels) == [(number, f"grade {number}") for number in expected]

    rows[1][2] = "liver"
    write()
    summary = take_in(study, *options)
    assert summary["code"] == 0
    assert {key[:2] for key in masks(conn)} == {("masks/1.png", "heart"), ("masks/2.png", "liver"), ("masks/3.png", "heart")}

    table.write_bytes(b"\0\1\2")
    before = ask(conn, "SELECT path, state FROM file ORDER BY 1")
    done = command("ingest", study, *options)
    assert done.code != 0
    assert "nothing was changed" in done.stderr
    assert done.stderr.count("\n") == 1
    assert ask(conn, "SELECT path, state FROM file ORDER BY 1") == before
    assert len(masks(conn)) == 3


NAMES = r"""
[[image]]
path = 'dicoms/(?P<patient>[^/]+)/(?P<number>\d+)\.dcm'

[[annotation]]
path = 'contourfiles/(?P<patient>[^/]+)/(?:.+/)?IM-\d{4}-(?P<number>\d+)-(?P<structure>[io])contour-(?P<reader>\w+)\.txt'
structures = {i = "inner", o = "outer"}
patients = "link.csv"
"""


@needs_data
def test_pattern(take_in: TakeIn, conn: Conn, tmp_path: Path) -> None:
    """A small TOML file for the real Sunnybrook folder gives the same samples as the layout sunnybrook."""
    source = DATA / "sunnybrook" / "final_data"
    folder = tmp_path / "final_data"
    copied(source / "contourfiles", source / "link.csv", to=folder)
    drawn_on = {int(path.stem.split("-")[2]) for path in folder.rglob("*contour-manual.txt")}
    for path in source.glob("dicoms/*/*.dcm"):
        if int(path.stem) in drawn_on:
            copied(path, to=folder / path.parent.relative_to(source))
    (tmp_path / "names.toml").write_text(NAMES)
    samples = "SELECT patient, sop_instance_uid, structure, area_px, pairing_method, error_flags FROM sample ORDER BY 1, 2, 3"
    summary = take_in(folder, "--pattern", tmp_path / "names.toml")
    assert (summary["layout"], summary["paired"], summary["code"]) == ("pattern", 54, 0)
    by_pattern = ask(conn, samples)
    summary = take_in(folder)
    assert (summary["layout"], summary["paired"]) == ("sunnybrook", 54)
    assert ask(conn, samples) == by_pattern
    assert len(by_pattern) == 54


def test_original_sunnybrook_names(take_in: TakeIn, conn: Conn, study: Path, tmp_path: Path) -> None:
    """Two series hold an image of the contour's number: both are proposed, neither is fed until a person accepts one."""
    folder = tmp_path / "published"
    (contour,) = study.rglob("IM-0001-0001-icontour-manual.txt")
    copied(contour, to=folder / "SC-HF-I-01" / "contours-manual" / "IRCCI-expert")
    for series, name in ((3, "CINESAX_300"), (4, "CINELAX_301")):
        image = pydicom.dcmread(study / "dicoms" / "SYN0001" / f"{series - 2}.dcm")
        image.PatientID = "SCD0000101"
        image.SeriesInstanceUID += f".{series}"
        save(image, folder / "SCD_IMAGES_01" / "SCD0000101" / name / f"IM-000{series}-0001.dcm")
    (folder / "scd_patientdata.csv").write_text("PatientID,OriginalID\nSCD0000101,SC-HF-I-1\n")
    summary = take_in(folder)
    assert (summary["layout"], summary["paired"], summary["proposed"], summary["masks"]) == ("sunnybrook", 0, 1, 2)
    listed = json.loads(command("pair", "list", "--state", "proposed", "--json").stdout)
    assert len(listed) == 1  # an annotation
    assert ask(conn, "SELECT count(*) FROM sample") == [(0,)]
    ((pairing,),) = ask(
        conn,
        "SELECT p.id FROM pairing p JOIN location l ON l.image_id = p.image_id JOIN file f ON f.id = l.file_id WHERE path LIKE '%SAX%'",
    )
    assert command("pair", "accept", pairing).code == 0
    ((path, errors),) = ask(conn, "SELECT path, error_flags FROM sample")
    assert (path.endswith("CINESAX_300/IM-0003-0001.dcm"), errors) == (True, 0)
    done = command("ingest", folder, "--json", "--executor", "tests.test_layouts:threads")
    assert json.loads(done.stdout)["paired"] == 1  # the person's word stands


OURS = """
import numpy as np
from catalog.layouts import Annotation, Found, Image
from catalog.records import Drawn, polygon

def read(tree):
    found = Found()
    for entry in tree.entries:
        if entry.path.endswith(".dcm"):
            found.images.append(Image(entry, "somebody", sure=True))
        elif entry.path.endswith(".npy"):
            image = "dicoms/SYN0001/" + entry.path.removesuffix(".npy").rpartition("/")[2] + ".dcm"
            found.annotations.append(Annotation(entry, structure="ours", reader="we", format="MODULE:outline", candidates=(image,)))
        else:
            found.left_over += 1
    return found

def outline(path, options):
    return [Drawn("", "", "", "polygon", polygon=polygon([np.load(path)]), convention="corner")]
"""


def test_a_reader_of_the_users_own(take_in: TakeIn, conn: Conn, study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module's function finds the files and another reads its own annotation format."""
    (tmp_path / "ours_of_test_layouts.py").write_text(OURS.replace("MODULE", "ours_of_test_layouts"))
    monkeypatch.syspath_prepend(tmp_path)
    square = np.array([[10.0, 12.0], [20.0, 12.0], [20.0, 32.0], [10.0, 32.0]])
    np.save(study / "2.npy", square)
    summary = take_in(study, "--reader", "ours_of_test_layouts:read")
    assert (summary["layout"], summary["images"], summary["annotations"], summary["paired"]) == ("reader", 6, 1, 1)
    assert ask(conn, "SELECT patient, structure, reader, instance_number, area_px, error_flags FROM sample") == [
        ("somebody", "ours", "we", 2, 200, 0)
    ]


@needs_data
def test_several_archives_in_one_root(take_in: TakeIn, conn: Conn, study: Path, tmp_path: Path) -> None:
    """Sunnybrook in a folder, a NIfTI data set in another, DICOM beside them: each goes to its layout, nothing twice, nothing lost."""
    folder = tmp_path / "all"
    shutil.copytree(study, folder / "heart" / "study")
    for side in ("images", "labels"):
        copied(HIPPOCAMPUS / side / "hippocampus_001.nii.gz", to=folder / "brain" / side)
    copied(*RT.glob("*.dcm"), to=folder / "phantom")
    (folder / "notes.md").write_text("who drew what")
    summary = take_in(folder)
    assert summary["layout"] == "sunnybrook+nifti+dicom"
    assert summary["left_over"] == 1
    per_folder = Counter(path.partition("/")[0] for (path,) in ask(conn, "SELECT f.path FROM file f"))
    assert per_folder == {"heart": 6 + len(list(study.rglob("*.txt"))), "brain": 2, "phantom": 4}
    methods = ask(conn, "SELECT DISTINCT split_part(f.path, '/', 1), method FROM pairing p JOIN annotation a ON a.id = p.annotation_id "
                        "JOIN file f ON f.id = a.file_id ORDER BY 1, 2")  # fmt: skip
    assert methods == [("brain", "path"), ("heart", "file-number"), ("phantom", "uid")]
    assert summary["unpaired"] == 4
    again = take_in(folder)
    assert (again["files_read"], again["missing"]) == (0, 0)


@needs_data
def test_two_layouts_that_fit_equally_are_a_question(study: Path, database_url: str) -> None:
    """A folder that is Sunnybrook's and a NIfTI data set's at once: exit code 2, both reasons, and no row."""
    for side in ("images", "labels"):
        copied(HIPPOCAMPUS / side / "hippocampus_001.nii.gz", to=study / f"{side}Tr")
    for extra in ((), ("--dry-run",)):
        done = command("ingest", study, *extra)
        assert done.code == 2
        assert "link.csv beside dicoms/" in done.stderr
        assert "imagesTr/ and labelsTr/" in done.stderr
        assert "--layout" in done.stderr
    assert command("ingest", study, "--layout", "sunnybrook", "--executor", "tests.test_layouts:threads").code == 0
