"""Sample rows → a slot: exact numbers from every kind of file, and what happens when a file is not what was catalogued."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psycopg
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.uid import ExplicitVRBigEndian, ImplicitVRLittleEndian, RLELossless

from catalog import database, dicom, ingest, synthetic
from loaderd import Feed, FeedError, attach
from loaderd.decode import BLOCK, Decoder, Sample
from loaderd.ring import Layout, create


@pytest.fixture
def copied(studies: Path, tmp_path: Path) -> Path:
    """The synthetic studies, to be changed."""
    shutil.copytree(studies, tmp_path / "studies")
    return tmp_path / "studies"


def take_in(url: str, folder: Path) -> ingest.Summary:
    with database.open_database(url) as db:
        return ingest.ingest(db, folder, jobs=1)


def many(folder: Path) -> Path:
    """Write 120 images, enough that one unreadable file is under 1 %."""
    synthetic.write_studies(folder, patients=1, slices=10, phases=12, size=32, every_image=True)
    return folder


def sample(slope: float, intercept: float, shape: tuple[int, int]) -> Sample:
    return Sample(1, bytes(16), "/", "x", 0, 0, 0, 0, "<i2", slope, intercept, 0, *shape, "", b"", "dicom", "", None, False, ())


@given(
    stored=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=3),
    slope=st.one_of(st.just(1.0), st.floats(-1e3, 1e3)),
    intercept=st.one_of(st.just(0.0), st.floats(-1e5, 1e5)),
    kind=st.sampled_from(["<i2", "<u2", "|u1", "|i1", "<i4", "<u4"]),
    dtype=st.sampled_from(["float16", "float32", "float64"]),
)
def test_rescale_is_exact(stored: list[int], slope: float, intercept: float, kind: str, dtype: str) -> None:
    """An image is dtype(float64(stored) * slope + intercept), rounded once, whatever the stored type, slope and block."""
    values = np.resize(np.array(stored, np.int64).astype(kind), (3, BLOCK // 2))
    layout = Layout(1, 0, *values.shape, dtype, 1)
    fd = create(layout)
    decoder = Decoder(fd, -1, layout, blank=False)
    os.close(fd)
    image = decoder.slots[0].images[0]
    with np.errstate(over="ignore"):
        decoder._rescale(values, sample(slope, intercept, values.shape), image)
        expected = (values.astype(np.float64) * slope + intercept).astype(dtype)
    assert np.array_equal(image, expected)


def rle(data: pydicom.Dataset) -> None:
    data.compress(RLELossless)


def big_endian(data: pydicom.Dataset) -> None:
    data.PixelData = np.frombuffer(data.PixelData, "<i2").astype(">i2").tobytes()
    data.file_meta.TransferSyntaxUID = ExplicitVRBigEndian


def implicit(data: pydicom.Dataset) -> None:
    data.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian


def rescaled(data: pydicom.Dataset) -> None:
    data.RescaleSlope, data.RescaleIntercept = "1.7", "-1024.3"


def eight_bit(data: pydicom.Dataset) -> None:
    data.PixelData = (np.frombuffer(data.PixelData, "<i2") >> 4).astype(np.uint8).tobytes()
    data.BitsAllocated = data.BitsStored = 8
    data.HighBit, data.PixelRepresentation = 7, 0
    data["PixelData"].VR = "OB"


CHANGES: list[tuple[Callable[[pydicom.Dataset], None], bool]] = [
    (rle, False), (big_endian, False), (implicit, True), (rescaled, True), (eight_bit, True),
]  # fmt: skip


@pytest.mark.parametrize(("change", "by_offset"), CHANGES, ids=[change.__name__ for change, _ in CHANGES])
def test_every_encoding(
    database_url: str, copied: Path, conn: psycopg.Connection, change: Callable[[pydicom.Dataset], None], by_offset: bool
) -> None:
    """Compressed, big-endian, implicit, rescaled and 8-bit files come as the standard's formula over pydicom's pixels, bit for bit."""
    for path in sorted(copied.glob("dicoms/SYN0001/*.dcm")):
        data = pydicom.dcmread(path)
        change(data)
        little = data.file_meta.TransferSyntaxUID != ExplicitVRBigEndian
        pydicom.dcmwrite(path, data, implicit_vr=data.file_meta.TransferSyntaxUID == ImplicitVRLittleEndian, little_endian=little)
    assert take_in(database_url, copied).standing_errors == 0
    paths = dict(conn.execute("SELECT sample_id, path FROM image_all").fetchall())
    with Feed(where="patient = 'SYN0001'", batch_size=4) as feed:
        for batch in feed.epoch():
            for number, image in zip(batch.sample_ids.tolist(), batch.images, strict=True):
                data = pydicom.dcmread(paths[number])
                slope, intercept = float(data.get("RescaleSlope", 1)), float(data.get("RescaleIntercept", 0))
                assert np.array_equal(image, (data.pixel_array.astype(np.float64) * slope + intercept).astype(np.float32))
        status = attach.status()
        assert status is not None
        assert status["streams"][0]["by_offset"] == (16 if by_offset else 0)


def test_touched_file_is_fed_and_its_row_brought_up(database_url: str, copied: Path, conn: psycopg.Connection) -> None:
    """A file with another time around the same pixels is fed; its row is updated and no flag is raised."""
    take_in(database_url, copied)
    paths = sorted(copied.glob("dicoms/SYN0001/*.dcm"))
    os.utime(paths[0], ns=(1, 1_000_000_001))
    longer = pydicom.dcmread(paths[1])
    longer.StudyDescription = "longer"  # pixels move to another offset
    longer.save_as(paths[1])
    expected = {str(path): dicom.decode_frame(path, 0).astype(np.float32) for path in paths}
    names = dict(conn.execute("SELECT sample_id, path FROM image_all").fetchall())
    for decoded_by_offset in (len(paths) - 2, len(paths)):
        with Feed(where="patient = 'SYN0001'", batch_size=8) as feed:
            assert feed.num_samples == len(paths)
            for batch in feed.epoch():
                for number, image in zip(batch.sample_ids.tolist(), batch.images, strict=True):
                    assert np.array_equal(image, expected[names[number]])
            status = attach.status()
            assert status is not None
            assert status["streams"][0]["by_offset"] == decoded_by_offset
    assert conn.execute("SELECT count(*) FROM flag").fetchone() == (0,)
    touched = conn.execute("SELECT mtime_ns FROM file WHERE path = %s", [str(paths[0].relative_to(copied))]).fetchone()
    assert touched == (1_000_000_001,)


def spoil(path: Path) -> None:
    data = pydicom.dcmread(path)
    data.PixelData = bytes(len(data.PixelData))
    data.save_as(path)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


@pytest.mark.parametrize("damage", [spoil, cut, Path.unlink], ids=["other pixels", "truncated", "gone"])
def test_unreadable_sample_is_skipped_and_flagged(
    database_url: str, tmp_path: Path, conn: psycopg.Connection, damage: Callable[[Path], None], catalog: Callable[..., object]
) -> None:
    """One file of 120 changed its pixels, was cut or is gone: its batch is one shorter, ledger and flag say so, no other is harmed."""
    folder = many(tmp_path / "many")
    take_in(database_url, folder)
    victim = folder / "dicoms" / "SYN0001" / "50.dcm"
    kept = victim.read_bytes()
    damage(victim)
    with Feed(structures=["inner"], batch_size=8) as feed:
        sizes = [len(batch) for batch in feed.epoch()]
        assert sorted(sizes) == [7, *[8] * 14]
    assert conn.execute("SELECT delivered, unreadable, missing, twice FROM epoch_coverage").fetchone() == (119, 1, 0, 0)
    assert conn.execute("SELECT rule, severity, state FROM flag").fetchall() == [("FEED-UNREADABLE", "error", "open")]
    with Feed(structures=["inner"], batch_size=8) as feed:
        assert feed.num_samples == 119
    victim.write_bytes(kept)  # repaired: the next ingest reads it, and it is fed again
    os.utime(victim, ns=(1, 2_000_000_001))
    assert take_in(database_url, folder).standing_errors == 0
    with Feed(structures=["inner"], batch_size=8) as feed:
        assert feed.num_samples == 120


def test_blank_keeps_the_shape_and_stop_stops(database_url: str, tmp_path: Path, conn: psycopg.Connection) -> None:
    """on_error="blank" feeds zeros with `valid` False in that place, "stop" ends with an error that names the sample."""
    folder = many(tmp_path / "many")
    take_in(database_url, folder)
    (folder / "dicoms" / "SYN0001" / "50.dcm").unlink()
    stopped = pytest.raises(FeedError, match=r"sample \d+ could not be read: .*No such file")
    with Feed(structures=["inner"], batch_size=8, on_error="stop") as feed, stopped:
        for _ in feed.epoch():
            pass
    with Feed(structures=["inner"], batch_size=8, on_error="blank", include_flagged=True) as feed:
        blanks = []
        for batch in feed.epoch():
            assert len(batch) == 8
            blanks += [(image.any(), mask.any()) for image, mask, valid in zip(*batch, batch.valid, strict=True) if not valid]
    assert blanks == [(False, False)]


def test_a_fault_of_the_storage_stops_and_flags_nothing(database_url: str, tmp_path: Path, conn: psycopg.Connection) -> None:
    """The root's folder out of reach, or over 1 % of an epoch unreadable: the feed stops with the reason, and files are not blamed."""
    folder = many(tmp_path / "many")
    take_in(database_url, folder)
    folder.rename(tmp_path / "away")
    with Feed(structures=["inner"]) as feed, pytest.raises(FeedError, match=r"out of reach.*nothing was flagged"):
        next(feed.epoch())
    assert conn.execute("SELECT count(*) FROM flag").fetchone() == (0,)
    (tmp_path / "away").rename(folder)
    for number in range(40, 50):
        (folder / "dicoms" / "SYN0001" / f"{number}.dcm").unlink()
    with Feed(structures=["inner"]) as feed, pytest.raises(FeedError, match=r"of 120 samples could not be read.*over 1 %"):
        for _ in feed.epoch():
            pass
    flags = conn.execute("SELECT count(*) FROM flag").fetchone()
    assert flags is not None and flags[0] <= 1


def test_large_masks_are_cropped_and_come_back_whole(database_url: str, tmp_path: Path, conn: psycopg.Connection) -> None:
    """A mask is stored as its bounding box, and fed on the whole frame, on an image of over a megapixel, too."""
    folder = tmp_path / "large"
    synthetic.write_studies(folder, patients=1, slices=1, phases=2, size=1_100)
    take_in(database_url, folder)
    rows = conn.execute("SELECT rows, columns, box_rows, box_columns, area_px FROM mask").fetchall()
    assert rows and all(row[:2] == (1_100, 1_100) and row[2] < 1_100 > row[3] for row in rows)
    from catalog import contours

    drawn = {
        number: contours.rasterise(contours.unflatten(points, rings), 1_100, 1_100, convention=convention)
        for number, points, rings, convention in conn.execute(
            "SELECT s.sample_id, a.points, a.rings, a.convention FROM sample s JOIN annotation a ON a.id = s.annotation_id "
            "WHERE s.structure = 'inner'"
        )
    }
    with Feed(structures=["inner"], batch_size=1) as feed:
        for batch in feed.epoch():
            assert batch.masks is not None and np.array_equal(batch.masks[0], drawn.pop(int(batch.sample_ids[0])))
    assert drawn == {}
