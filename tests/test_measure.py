"""`catalog measure`: numbers and hashes of pixels against numpy, stopping and going on, files that cannot be measured."""

from __future__ import annotations

import contextlib
import csv
import gzip
import hashlib
import math
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pydicom import Dataset, dcmread
from pydicom.uid import RLELossless

from catalog import database, ingest, measuring
from catalog.measuring import Summary
from catalog.statistics import Statistics, statistics
from tests.conftest import DATA
from tests.processes import wait_until
from tests.test_ingest import group

Conn = psycopg.Connection[tuple[Any, ...]]
TakeIn = Callable[..., Any]
Measure = Callable[..., Summary]


@pytest.fixture
def take_in(database_url: str) -> Iterator[TakeIn]:
    """Ingest without looking at pixels, unless told otherwise."""
    with ThreadPoolExecutor(1) as threads, database.open_database(database_url) as db:
        yield lambda folder, **options: ingest.ingest(db, folder, **{"executor": threads, "hashing": "none", **options})


@pytest.fixture
def measure(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Measure]:
    """Measure in a thread: a process for that takes a second to begin."""

    @contextlib.contextmanager
    def threads(jobs: int | None, tasks: int) -> Iterator[Executor]:
        with ThreadPoolExecutor(2) as pool:
            yield pool

    monkeypatch.setattr(measuring, "processes", threads)
    with database.open_database(database_url) as db:
        yield lambda **options: measuring.measure(db, **options)


def expected(stored: np.ndarray[Any, Any], slope: float = 1.0, intercept: float = 0.0) -> Statistics:
    """Say by hand what the numbers are: bins in exact fractions."""
    values = stored.astype(np.float64).ravel() * slope + intercept
    finite = values[np.isfinite(values)]
    if not finite.size:
        return Statistics(math.nan, math.nan, math.nan, math.nan, 0.0, 0.0, values.size)
    counts = Counter(finite.tolist())
    low, high = min(counts), max(counts)
    span = Fraction(high) - Fraction(low)
    bins: Counter[int] = Counter()
    for value, count in counts.items():
        bins[min(255, math.floor((Fraction(value) - Fraction(low)) * 256 / span)) if span else 0] += count
    entropy = -sum(n / finite.size * math.log2(n / finite.size) for n in bins.values())
    saturated = counts[high] / finite.size
    return Statistics(low, high, float(np.mean(finite)), float(np.std(finite)), entropy, saturated, values.size - finite.size)


def same(found: Sequence[float], wanted: Sequence[float]) -> bool:
    return found == pytest.approx(wanted, rel=1e-9, abs=1e-9, nan_ok=True)


def rows(conn: Conn) -> dict[str, tuple[Any, ...]]:
    """Return path and frame → hash and numbers of every image that was measured."""
    found = conn.execute(
        "SELECT f.path || ' ' || i.frame, i.pixel_hash, m.minimum, m.maximum, m.mean, m.deviation, m.entropy, m.saturated, m.nans "
        "FROM measure m JOIN image i ON i.id = m.image_id JOIN location l ON l.image_id = i.id AND l.preferred "
        "JOIN file f ON f.id = l.file_id"
    )
    return {row[0]: row[1:] for row in found}


def tuples(conn: Conn) -> list[tuple[Any, ...]]:
    """Return where every row lies and which transaction wrote it: any write changes this."""
    names = conn.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY 1").fetchall()
    return [row for (name,) in names for row in conn.execute(f"SELECT '{name}', ctid::text, xmin::text, xmax::text FROM {name} ORDER BY 2")]


def open_flags(conn: Conn) -> list[tuple[Any, ...]]:
    return conn.execute(
        "SELECT g.rule, g.severity, split_part(g.detail, ':', 1), f.path FROM flag g JOIN file f ON f.id = g.file_id WHERE g.state = 'open'"
    ).fetchall()


WHOLE = st.sampled_from(["u1", "i1", "<u2", "<i2", ">i2", "<i4", "<u4"])
# More levels than bins, each another number of times: it shows in which bin each lies.
MANY = np.repeat(np.arange(300, dtype="<i2"), np.arange(300) % 5 + 1)
SHAPES = arrays.array_shapes(min_dims=2, max_dims=3, min_side=1, max_side=9)


@given(
    stored=WHOLE.flatmap(lambda dtype: arrays.arrays(dtype, SHAPES)),
    slope=st.sampled_from([1.0, 2.0, 0.5, -1.0, -0.25]),
    intercept=st.integers(-2000, 2000),
)
@example(MANY, 1.0, 0)
@example(MANY, -0.25, 7)
def test_statistics_of_whole_numbers(stored: np.ndarray[Any, Any], slope: float, intercept: int) -> None:
    """Of any whole numbers, minimum, maximum, mean, deviation, entropy and saturation are those of the values after the transform."""
    assert same(statistics(stored, slope, float(intercept)), expected(stored, slope, float(intercept)))


@given(
    arrays.arrays(
        np.float64,
        SHAPES,
        elements=st.one_of(st.integers(-(2**20), 2**20).map(lambda value: value / 8), st.sampled_from([math.nan, math.inf, -math.inf])),
    )
)
def test_statistics_of_floats(stored: np.ndarray[Any, Any]) -> None:
    """Values that are not finite are counted and left out of everything else; without any finite one there are no numbers."""
    assert same(statistics(stored), expected(stored))


@given(arrays.arrays(np.float64, SHAPES), st.floats(), st.floats())
def test_statistics_of_anything(stored: np.ndarray[Any, Any], slope: float, intercept: float) -> None:
    """No values and no rescale, however large or odd, raise, warn, or give a share or an entropy that cannot be."""
    found = statistics(stored, slope, intercept)
    assert 0 <= found.saturated <= 1 and 0 <= found.entropy <= 8 and 0 <= found.nans <= stored.size


def test_rescale_beyond_all_numbers() -> None:
    """A slope that makes some whole numbers infinite leaves those out, as for floats."""
    stored = np.array([[1, 2], [3, 4]], np.int16)
    found = statistics(stored, 1e308)
    assert (found.nans, found.minimum, found.maximum) == (3, 1e308, 1e308)


def test_like_a_full_ingest(
    studies: Path, tmp_path: Path, conn: Conn, take_in: TakeIn, measure: Measure, new_database: Callable[..., str]
) -> None:
    """After an ingest without hashes and a measure, pixel hashes, content hashes and sample keys are those of an ingest with hashes."""
    folder = tmp_path / "arrived"
    shutil.copytree(studies, folder)
    nameless = sorted(folder.rglob("*.dcm"))[0]
    dataset = dcmread(nameless)
    dataset.SOPInstanceUID = ""  # what it is then says its pixels
    dataset.save_as(nameless)
    query = (
        "SELECT f.path, i.frame, i.pixel_hash, n.content_hash, i.sample_key FROM image i JOIN instance n ON n.id = i.instance_id "
        "JOIN location l ON l.image_id = i.id JOIN file f ON f.id = l.file_id ORDER BY 1, 2"
    )
    take_in(folder)
    # As if ingest had not looked at the one without a UID.
    conn.execute("UPDATE instance SET content_hash = NULL")
    conn.execute("UPDATE image SET pixel_hash = NULL, sample_key = gen_random_uuid() WHERE pixel_hash IS NOT NULL")
    assert conn.execute("SELECT count(pixel_hash) FROM image").fetchone() == (0,)
    found = measure()
    assert (found.images, found.measured, found.hashed, found.not_measured) == (48, 48, 48, 0)
    with database.open_database(new_database()) as other, ThreadPoolExecutor(1) as threads:
        ingest.ingest(other, folder, executor=threads, hashing="full")
        with other.connect() as full:
            assert conn.execute(query).fetchall() == full.execute(query).fetchall()  # type: ignore[arg-type]


def test_numbers_of_files(studies: Path, conn: Conn, take_in: TakeIn, measure: Measure) -> None:
    """What stands in the rows is what numpy says of pydicom's pixels."""
    take_in(studies)
    measure()
    found = rows(conn)
    assert len(found) == 48
    for name, (_, *numbers) in found.items():
        assert same(numbers, expected(dcmread(studies / name.rpartition(" ")[0]).pixel_array))


def test_nothing_to_do_writes_nothing(studies: Path, conn: Conn, take_in: TakeIn, measure: Measure) -> None:
    """Measured again, no row is written and no file opened; after a full ingest no image row is either, and no epoch is planned anew."""
    take_in(studies, hashing="full")
    images = conn.execute("SELECT ctid, xmin FROM image ORDER BY 1").fetchall()
    changes = conn.execute("SELECT count(*) FROM catalog_change").fetchall()
    assert measure().measured == 48
    assert conn.execute("SELECT ctid, xmin FROM image ORDER BY 1").fetchall() == images
    assert conn.execute("SELECT count(*) FROM catalog_change").fetchall() == changes
    before = tuples(conn)
    again = measure()
    assert (again.measured, again.hashed, again.not_measured, again.left) == (0, 0, 0, {})
    assert tuples(conn) == before


def test_limit_goes_on_where_it_ended(studies: Path, conn: Conn, take_in: TakeIn, measure: Measure) -> None:
    """A limit measures so many, says how many are left, and the next pass takes others; progress counts up to the limit."""
    take_in(studies)
    seen: list[tuple[int, int]] = []
    first = measure(limit=20, progress=lambda done, total: seen.append((done, total)))
    assert (first.measured, first.not_measured) == (20, 28) and seen[-1] == (20, 20)
    second = measure()
    assert (second.measured, second.not_measured) == (28, 0)


def test_missing_and_changed_files(studies: Path, tmp_path: Path, conn: Conn, take_in: TakeIn, measure: Measure) -> None:
    """Files that are gone, or other than catalogued, are left without a row and a flag, and are said with their reason."""
    folder = tmp_path / "arrived"
    shutil.copytree(studies, folder)
    take_in(folder)
    images = sorted(folder.rglob("*.dcm"))
    images[0].unlink()
    os.utime(images[1])
    found = measure()
    assert (found.measured, found.not_measured, found.flagged) == (46, 2, 0)
    assert {key.split(":")[0]: count for key, count in found.left.items()} == {"missing": 1, "changed": 1}
    assert str(folder) not in "".join(found.left)
    assert open_flags(conn) == []
    shutil.copy2(studies / images[0].relative_to(folder), images[0])
    take_in(folder)  # has the changed one read again
    assert measure().not_measured == 0


def test_file_that_changes_while_it_is_read(
    studies: Path, tmp_path: Path, conn: Conn, take_in: TakeIn, measure: Measure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was read from a file that was written to meanwhile is not kept."""
    folder = tmp_path / "arrived"
    shutil.copytree(studies, folder)
    take_in(folder)
    victim = sorted(folder.rglob("*.dcm"))[0]
    plain = measuring._by_offset

    def slow(item: measuring.Item, *arguments: Any) -> Any:
        stored = plain(item, *arguments)
        if item.path == str(victim.relative_to(folder)):
            os.utime(victim, ns=(1, 1))
        return stored

    monkeypatch.setattr(measuring, "_by_offset", slow)
    found = measure()
    assert (found.measured, found.not_measured) == (47, 1) and f"{victim.relative_to(folder)} 0" not in rows(conn)


def compressed(source: Path, path: Path, *, damaged: bool = False) -> None:
    dataset = dcmread(source)
    dataset.compress(RLELossless)
    if damaged:
        dataset.PixelData = dataset.PixelData[:60] + bytes([127]) * (len(dataset.PixelData) - 68) + dataset.PixelData[-8:]
    dataset.save_as(path)


def test_damaged_file(studies: Path, tmp_path: Path, conn: Conn, take_in: TakeIn, measure: Measure) -> None:
    """A file whose pixels do not decode is flagged once and left alone; all others are measured. A good one in its place is measured."""
    folder = tmp_path / "arrived"
    shutil.copytree(studies, folder)
    images = sorted(folder.rglob("*.dcm"))
    compressed(images[0], images[0], damaged=True)
    compressed(images[1], images[1])
    take_in(folder)
    found = measure()
    assert (found.measured, found.flagged, found.not_measured) == (47, 1, 1)
    name = str(images[0].relative_to(folder))
    (flag,) = open_flags(conn)
    assert flag[0] == "FILE-UNREADABLE" and flag[1] == "error" and flag[3] == name
    before = tuples(conn)
    tried: list[int] = []
    assert measure(progress=lambda done, total: tried.append(total)).flagged == 0
    assert (tried, tuples(conn)) == ([], before)
    shutil.copy2(studies / name, images[0])
    take_in(folder)
    assert not [rule for rule, *_ in open_flags(conn) if rule == "FILE-UNREADABLE"]
    assert (measure().measured, conn.execute("SELECT count(*) FROM measure").fetchone()) == (1, (48,))


def deadly(items: Sequence[measuring.Item]) -> list[measuring.Outcome]:
    """Measure, but die of one file."""
    if any(item.path.endswith("SYN0002/3.dcm") for item in items):
        os._exit(9)
    return measuring.measure_images(items)


def test_process_that_dies(studies: Path, conn: Conn, take_in: TakeIn, database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image that kills the process that decodes it is found and flagged, and takes no other with it."""
    take_in(studies)
    monkeypatch.setattr(measuring, "measure_images", deadly)
    monkeypatch.setattr(measuring, "IMAGES_PER_TASK", 2)
    with database.open_database(database_url) as db:
        found = measuring.measure(db, jobs=2)
    assert (found.measured, found.flagged, found.not_measured) == (47, 1, 1)
    ((_, _, code, path),) = open_flags(conn)
    assert code == "reader-died" and path.endswith("SYN0002/3.dcm")


SLOW = """
import sys, time
from catalog import measuring
from catalog.database import open_database

measure_images = measuring.measure_images

done = 0

def slow(items):
    global done
    done += 1
    time.sleep(0.05 if done <= 4 else 600)
    return measure_images(items)

if __name__ == "__main__":
    import slow as module  # in a process that measures this is no main module
    measuring.measure_images = module.slow
    measuring.IMAGES_PER_TASK, measuring.IMAGES_PER_COMMIT = 2, 4
    with open_database() as db:
        measuring.measure(db, jobs=2)
"""


@pytest.fixture
def slowly(tmp_path: Path, database_url: str) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Start a process that measures some of the images, and the others in 10 minutes each, in a group of its own."""
    script = tmp_path / "slow.py"
    script.write_text(SLOW)
    started: list[subprocess.Popen[bytes]] = []

    def start() -> subprocess.Popen[bytes]:
        started.append(
            subprocess.Popen([sys.executable, script], start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        )
        return started[-1]

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_killed_in_the_middle(
    studies: Path, conn: Conn, take_in: TakeIn, measure: Measure, slowly: Callable[[], subprocess.Popen[bytes]]
) -> None:
    """After kill -9 in the middle its processes are gone too, what was committed stays, and a second pass ends with the rows of one."""
    take_in(studies)
    measure()
    whole = rows(conn)
    conn.execute("TRUNCATE measure")
    conn.execute("UPDATE image SET pixel_hash = NULL")
    conn.execute("UPDATE instance SET content_hash = NULL")
    process = slowly()
    assert wait_until(lambda: conn.execute("SELECT count(*) > 3 FROM measure").fetchone() == (True,), 60)
    process.kill()
    process.wait()
    assert wait_until(lambda: group(process.pid) == [])
    assert wait_until(
        lambda: conn.execute("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'catalog measure'").fetchone() == (0,)
    )
    kept = rows(conn)
    assert 0 < len(kept) < len(whole) and all(whole[name] == row for name, row in kept.items())
    assert measure().measured == len(whole) - len(kept)
    assert rows(conn) == whole
    assert conn.execute("SELECT count(*) FROM instance WHERE content_hash IS NULL").fetchone() == (0,)


def test_interrupted(studies: Path, conn: Conn, take_in: TakeIn, slowly: Callable[[], subprocess.Popen[bytes]]) -> None:
    """Ctrl-C ends it without waiting for the images that are being measured, and leaves what was committed."""
    take_in(studies)
    process = slowly()
    assert wait_until(lambda: conn.execute("SELECT count(*) > 3 FROM measure").fetchone() == (True,), 60)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    process.wait(60)
    assert conn.execute("SELECT count(*) > 3 FROM measure").fetchone() == (True,)


def test_waits_for_an_ingest(studies: Path, conn: Conn, take_in: TakeIn, measure: Measure) -> None:
    """While an ingest of the root runs it writes nothing, and says that it waits."""
    take_in(studies)
    (root,) = conn.execute("SELECT id FROM root").fetchone() or (0,)
    conn.execute("SELECT pg_advisory_lock(%s, %s)", [ingest.LOCK_CLASS, root])
    said: list[str] = []

    def let_go(line: str) -> None:
        said.append(line)
        assert conn.execute("SELECT count(*) FROM measure").fetchone() == (0,)
        conn.execute("SELECT pg_advisory_unlock(%s, %s)", [ingest.LOCK_CLASS, root])

    assert measure(say=let_go).measured == 48
    assert said == ["an ingest of this root is running; waiting for it"]


def test_bits_above_bits_stored(studies: Path, tmp_path: Path, conn: Conn, take_in: TakeIn, measure: Measure) -> None:
    """Bits above Bits Stored are no part of a value, in the numbers as in the hash: PS3.5 8.1.1."""
    dataset = dcmread(sorted(studies.rglob("*.dcm"))[0])
    stored = dataset.pixel_array
    dataset.BitsStored, dataset.HighBit = 12, 11
    dataset.PixelData = (stored.astype("<u2") & 0x0FFF | 0x4000).tobytes()
    dataset.PixelRepresentation = 0
    (tmp_path / "arrived").mkdir()
    dataset.save_as(tmp_path / "arrived" / "1.dcm")
    take_in(tmp_path / "arrived")
    measure()
    ((_, numbers),) = ((row[0], row[1:]) for row in rows(conn).values())
    assert same(numbers, expected(dcmread(tmp_path / "arrived" / "1.dcm").pixel_array)) and numbers[1] < 4096


def test_gzipped_idx(tmp_path: Path, conn: Conn, take_in: TakeIn, measure: Measure, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images in a compressed file are measured at their offsets in what it decompresses to, big endian as they are."""
    images = np.random.default_rng(1).integers(-3000, 3000, (100, 7, 5)).astype(">i2")
    header = bytes([0, 0, 0x0B, 3]) + np.array(images.shape, ">i4").tobytes()
    (tmp_path / "arrived").mkdir()
    (tmp_path / "arrived" / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + images.tobytes()))
    take_in(tmp_path / "arrived")
    conn.execute("UPDATE image SET pixel_hash = NULL")
    measure()
    found = rows(conn)
    assert len(found) == 100
    for name, (pixel_hash, *numbers) in found.items():
        image = images[int(name.rpartition(" ")[2])]
        assert same(numbers, expected(image))
        assert pixel_hash == hashlib.sha256(image.astype("<i2").tobytes()).digest()


def test_remote_root(studies: Path, tmp_path: Path, conn: Conn, take_in: TakeIn, measure: Measure) -> None:
    """Objects of a bucket are measured as their files are, by offset and decoded; one that is gone is left, without a flag."""
    fsspec = pytest.importorskip("fsspec")
    folder = tmp_path / "arrived"
    shutil.copytree(studies, folder)
    images = sorted(folder.rglob("*.dcm"))
    compressed(images[0], images[0])
    system = fsspec.filesystem("memory")
    system.put(str(folder), "/bucket/measured", recursive=True)
    try:
        take_in("memory://bucket/measured")
        system.rm(f"/bucket/measured/{images[1].relative_to(folder)}")
        found = measure()
    finally:
        system.rm("/bucket", recursive=True)
    assert (found.measured, found.flagged, [key.split(":")[0] for key in found.left]) == (47, 0, ["no-access"])
    for name, (pixel_hash, *numbers) in rows(conn).items():
        stored = dcmread(folder / name.rpartition(" ")[0]).pixel_array
        assert same(numbers, expected(stored)) and pixel_hash == hashlib.sha256(stored.astype("<i2").tobytes()).digest()


def test_modality_lut(studies: Path, tmp_path: Path, conn: Conn, take_in: TakeIn, measure: Measure) -> None:
    """Values that go through a Modality LUT are measured as they come out of it, and hashed as they are stored."""
    dataset = dcmread(sorted(studies.rglob("*.dcm"))[0])
    stored = dataset.pixel_array
    table = (np.arange(512) * 7 % 1009).astype("<u2")
    item = Dataset()
    item.LUTDescriptor, item.ModalityLUTType, item.LUTData = [512, 3, 16], "US", table.tobytes()
    item["LUTDescriptor"].VR, item["LUTData"].VR = "US", "OW"
    dataset.ModalityLUTSequence = [item]
    (tmp_path / "arrived").mkdir()
    dataset.save_as(tmp_path / "arrived" / "1.dcm")
    take_in(tmp_path / "arrived")
    measure()
    ((pixel_hash, *numbers),) = rows(conn).values()
    assert same(numbers, expected(table[np.clip(stored.astype(int) - 3, 0, 511)]))
    assert pixel_hash == hashlib.sha256(stored.astype("<i2").tobytes()).digest()


# By offset with a rescale, decoded, RGB, YBR, a palette, deflated, big endian, many frames, 12 bits, 32 bits.
REAL = (
    "rescale-signed/CT_small.dcm", "pydicom/JPEG2000.dcm", "pydicom/MR_small_RLE.dcm", "pydicom/ExplVR_BigEnd.dcm",
    "pydicom/examples_palette.dcm", "pydicom/examples_ybr_color.dcm", "pydicom/image_dfl.dcm", "pydicom/SC_ybr_full_422_uncompressed.dcm",
    "pydicom/SC_rgb_rle_2frame.dcm", "mono1/dx_image.dcm", "multiframe/emri_small_RLE.dcm", "multiframe/eCT_Supplemental.dcm",
    "pydicom/rtdose.dcm",
)  # fmt: skip


def rescale(dataset: Dataset) -> tuple[float, float]:
    """Return slope and intercept, of an enhanced object those that all its frames share."""
    if "SharedFunctionalGroupsSequence" in dataset:
        dataset = dataset.SharedFunctionalGroupsSequence[0].get("PixelValueTransformationSequence", [dataset])[0]
    return float(dataset.get("RescaleSlope", 1)), float(dataset.get("RescaleIntercept", 0))


def test_real_files(tmp_path: Path, conn: Conn, take_in: TakeIn, measure: Measure) -> None:
    """Of real files of every kind, hashes are the manifest's and numbers those of pydicom's pixels after its modality transform."""
    if not (DATA / "manifest.csv").is_file():
        pytest.skip(f"the real files are not in {DATA}; set SCANFEED_DATA")
    with (DATA / "manifest.csv").open() as file:
        manifest = {row["path"]: row for row in csv.DictReader(file)}
    chosen = [f"dicom/{name}" for name in REAL]
    (tmp_path / "arrived").mkdir()
    for path in chosen:
        shutil.copy2(DATA / path, tmp_path / "arrived")
    take_in(tmp_path / "arrived")
    assert measure().not_measured == 0
    found = rows(conn)
    for path in chosen:
        dataset = dcmread(DATA / path)
        pixels = dataset.pixel_array
        frames = pixels if int(dataset.get("NumberOfFrames") or 1) > 1 else [pixels]
        for number, frame in enumerate(frames):
            pixel_hash, *numbers = found[f"{Path(path).name} {number}"]
            assert same(numbers, expected(frame, *rescale(dataset))), path
            if len(frames) == 1:
                assert pixel_hash.hex()[:16] == manifest[path]["pixsha"], path
