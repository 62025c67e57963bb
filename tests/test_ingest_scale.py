"""Many files: killed again and again, changed here and there, and in memory that does not grow."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage

from catalog import database, deciding, digest, ingest
from tests.conftest import REPOSITORY
from tests.processes import wait_until
from tests.test_ingest import _written, ask, group, tuples

Conn = psycopg.Connection[tuple[Any, ...]]

OF_A_PATIENT = 250
SIZE = 16


def template() -> bytes:
    """Return a DICOM file with 8 digits, 77777777 or 88888888, where each file has its study's or its own number."""
    dataset = Dataset()
    dataset.PatientID = "P77777777"
    dataset.SOPClassUID, dataset.SOPInstanceUID = MRImageStorage, "1.2.826.0.1.3680043.2.77777777.1.88888888"
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = "1.2.826.0.1.3680043.2.77777777", "1.2.826.0.1.3680043.2.77777777.1"
    dataset.Modality, dataset.StudyDate, dataset.InstanceNumber, dataset.TriggerTime = "MR", "20200101", 88888888, 88888888
    dataset.ImagePositionPatient, dataset.ImageOrientationPatient, dataset.PixelSpacing = [0, 0, 0], [1, 0, 0, 0, 1, 0], [1, 1]
    dataset.Rows = dataset.Columns = SIZE
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PixelRepresentation = 1, "MONOCHROME2", 0
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
    dataset.PixelData = np.zeros((SIZE, SIZE), "<u2").tobytes()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID, dataset.file_meta.MediaStorageSOPInstanceUID = MRImageStorage, dataset.SOPInstanceUID
    out = BytesIO()
    dataset.save_as(out, enforce_file_format=True)
    return out.getvalue()


TEMPLATE = template()


def image_bytes(number: int) -> bytes:
    """Return the file of an image: an object, and pixels, of its own."""
    study = 10_000_000 + number // OF_A_PATIENT
    head = TEMPLATE[:-4].replace(b"77777777", b"%08d" % study).replace(b"88888888", b"%08d" % (10_000_000 + number))
    return head + number.to_bytes(4, "little")


def image_path(number: int) -> str:
    return f"dicoms/P{10_000_000 + number // OF_A_PATIENT}/{number + 1}.dcm"


def contour_path(number: int) -> str:
    return f"contourfiles/SC-{10_000_000 + number // OF_A_PATIENT}/i-contours/IM-0001-{number + 1:04d}-icontour-manual.txt"


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def make_tree(folder: Path, images: int, drawn_every: int = 10) -> int:
    """Write images of 16×16 px and contours of every tenth one in the Sunnybrook layout; returns how many files that ingest reads."""
    for number in range(images):
        write(folder / image_path(number), image_bytes(number))
    for number in range(0, images, drawn_every):
        at = number % 8
        write(folder / contour_path(number), f"{at} {at}\n{at + 6} {at}\n{at + 6} {at + 6}\n{at} {at + 6}\n".encode())
    patients = range(10_000_000, 10_000_000 + -(-images // OF_A_PATIENT))
    write(folder / "link.csv", "".join(["patient_id,original_id\n", *(f"P{one},SC-{one}\n" for one in patients)]).encode())
    return images + len(range(0, images, drawn_every))


# ------------------------------------------------------------------------------------------------ killed


def kill_at_random(
    tree: Path,
    new_database: Callable[[], str],
    tmp_path: Path,
    *,
    kills: int,
    files_per_commit: int,
    pause_s: float,
    seed: int,
    jobs: int = 1,
) -> None:
    """Kill ingests of a tree so often; whenever one is through, and at the end, the digest is that of an undisturbed one."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        f"from catalog import ingest, pairings\ningest.FILES_PER_COMMIT = pairings.MASKS_PER_COMMIT = {files_per_commit}\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])}

    def start(url: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "catalog.cli", "ingest", str(tree), "--jobs", str(jobs), "--database", url]
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/", start_new_session=True
        )

    whole = start(undisturbed := new_database())
    _, said = whole.communicate(timeout=600)
    assert whole.returncode == 0, said
    with database.open_database(undisturbed) as db:
        expected = digest.digest(db)
    files = expected[1]["file"].rows
    assert expected[1]["mask"].rows > 0

    def through(url: str, process: subprocess.Popen[str]) -> None:
        _, said = process.communicate(timeout=600)
        assert process.returncode == 0, said
        with database.open_database(url) as db:
            assert digest.digest(db) == expected

    chance = random.Random(seed)
    killed = midway = here = 0
    url = new_database()
    while killed < kills:
        process = start(url)
        # Three while files are read, then one when pairs and masks are made; one that is through by then does not count.
        moment = files if killed % 4 == 3 else here + chance.random() ** 2 * files / 2
        with psycopg.connect(url, autocommit=True) as conn:
            assert wait_until(lambda: process.poll() is not None or ask(conn, "SELECT count(*) FROM file")[0][0] >= min(moment, files), 300)  # noqa: B023
            time.sleep(chance.random() * chance.choice((0.0, 0.05, pause_s)))
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL) if chance.random() < 0.5 else os.killpg(process.pid, signal.SIGKILL)
            if process.wait() == -signal.SIGKILL:
                process.communicate()
                assert wait_until(lambda: group(process.pid) == [])  # noqa: B023
                killed += 1
                [(here, torn)] = ask(conn, COMMITTED)
                assert torn == 0
                midway += 0 < here < files
                if here < files:
                    continue
                process = start(url)
        through(url, process)
        url, here = new_database(), 0
    through(url, start(url))
    assert midway >= kills // 4  # else the moments were none


# How many files are there, and how many images of which only a part is.
COMMITTED = """
SELECT count(*), count(*) FILTER (WHERE kind = 'image' AND NOT EXISTS (SELECT FROM location l WHERE l.file_id = f.id)) FROM file f
"""


def test_killed_at_random_moments(new_database: Callable[[], str], tmp_path: Path) -> None:
    """600 files, killed by -9 at four random moments, the process alone or with its readers: in the end, what undisturbed is there."""
    make_tree(tmp_path / "arrived", 600)
    kill_at_random(tmp_path / "arrived", new_database, tmp_path, kills=4, files_per_commit=30, pause_s=0.1, seed=7)


@pytest.mark.soak
@pytest.mark.parametrize("files_per_commit", [500, ingest.FILES_PER_COMMIT])
def test_killed_at_fifty_random_moments(new_database: Callable[[], str], tmp_path: Path, files_per_commit: int) -> None:
    """The same for 20,000 files and 50 moments."""
    make_tree(tmp_path / "arrived", 20_000)
    kill_at_random(tmp_path / "arrived", new_database, tmp_path, kills=50, files_per_commit=files_per_commit, pause_s=0.4, seed=50, jobs=2)


# ------------------------------------------------------------------------------------------------ again


@pytest.fixture
def ingest_with(database_url: str) -> Iterator[Callable[..., ingest.Summary]]:
    """Ingest in this process, reading in a thread."""
    with ThreadPoolExecutor(1) as threads:

        def take_in(folder: Path) -> ingest.Summary:
            with database.open_database(database_url) as db:
                return ingest.ingest(db, folder, executor=threads)

        yield take_in


def find_changes(tree: Path, images: int, conn: Conn, url: str, take_in: Callable[..., ingest.Summary]) -> None:
    files = make_tree(tree, images)
    assert take_in(tree).files_read == files
    before, written = tuples(conn), _written(conn)
    again = take_in(tree)
    assert (again.files_read, again.moved, again.missing) == (0, 0, 0)
    assert tuples(conn) == before and _written(conn) == written

    changed, moved, gone, new = images // 2 + 1, images // 2 + 10, images // 2 + 2, images
    drawn = images // 2 + 20  # its contour file moves
    # People have a word on what moves: a contour that belongs to another image than its name says, and a flag on a file.
    [(annotation,)] = ask(conn, f"SELECT a.id FROM annotation a JOIN file f ON f.id = a.file_id WHERE f.path = '{contour_path(drawn)}'")
    [(image, file)] = ask(
        conn, f"SELECT l.image_id, f.id FROM location l JOIN file f ON f.id = l.file_id WHERE f.path = '{image_path(moved)}'"
    )
    with database.open_database(url) as db:
        deciding.link(db, annotation, image, actor="kim")
    conn.execute(
        "INSERT INTO flag (rule, severity, detail, file_id, raised_by) VALUES ('KIM-SAYS', 'warning', 'blurred', %s, 'kim')", [file]
    )
    decided = (
        "SELECT p.id, p.annotation_id, p.image_id, p.state, p.method, p.actor, p.at, m.bits FROM pairing p "
        f"LEFT JOIN mask m ON m.pairing_id = p.id WHERE p.annotation_id = {annotation} OR p.image_id = {image} ORDER BY 1"
    )
    said, flagged = ask(conn, decided), ask(conn, "SELECT id, file_id, state, closed_at FROM flag WHERE rule = 'KIM-SAYS'")
    assert [row[5] for row in said].count("kim") == 2  # the link, and what it rejected
    standing = take_in(tree).files_read, ask(conn, "SELECT count(*) FROM file")
    assert standing == (0, [(files,)])
    untouched = (
        "SELECT f.id, f.path, f.size, f.mtime_ns, f.state, f.ingest_run_id, f.xmin::text, l.image_id FROM file f "
        f"LEFT JOIN location l ON l.file_id = f.id WHERE f.ingest_run_id = {ask(conn, 'SELECT min(id) FROM ingest_run')[0][0]} ORDER BY 1"
    )
    rows = ask(conn, untouched)

    one = (tree / image_path(changed)).read_bytes()
    write(tree / image_path(changed), one[:-8] + b"\1\2\3\4" + one[-4:])
    os.utime(tree / image_path(changed), ns=(1, 1_000_000_000))
    (tree / image_path(moved)).parent.joinpath("later").mkdir()
    to_image = (tree / image_path(moved)).parent / "later" / f"{moved + 1}.dcm"
    (tree / image_path(moved)).rename(to_image)
    to_contour = (tree / contour_path(drawn)).parents[1] / "moved" / (tree / contour_path(drawn)).name
    to_contour.parent.mkdir()
    (tree / contour_path(drawn)).rename(to_contour)
    (tree / image_path(gone)).unlink()
    write(tree / f"dicoms/P{10_000_000 + images // OF_A_PATIENT - 1}/{new + 1}.dcm", image_bytes(new))

    summary = take_in(tree)
    assert (summary.files_read, summary.moved, summary.missing) == (4, 2, 1)
    run = ask(conn, "SELECT max(id) FROM ingest_run")[0][0]
    touched = {
        path: (state, mtime) for path, state, mtime in ask(conn, f"SELECT path, state, mtime_ns FROM file WHERE ingest_run_id = {run}")
    }
    assert touched == {
        image_path(changed): ("present", 1_000_000_000),
        str(to_image.relative_to(tree)): ("present", to_image.stat().st_mtime_ns),
        str(to_contour.relative_to(tree)): ("present", to_contour.stat().st_mtime_ns),
        image_path(gone): ("missing", ask(conn, f"SELECT mtime_ns FROM file WHERE path = '{image_path(gone)}'")[0][0]),
        f"dicoms/P{10_000_000 + images // OF_A_PATIENT - 1}/{new + 1}.dcm": (
            "present",
            touched[next(p for p in touched if f"/{new + 1}." in p)][1],
        ),
    }
    assert ask(conn, "SELECT count(*) FROM file") == [(files + 1,)]
    kept = {row[0]: row for row in ask(conn, untouched)}
    assert list(kept.values()) == [row for row in rows if row[0] in kept] and len(rows) - len(kept) == 4
    # What moved is what it was, and a person's word on it stands.
    assert ask(
        conn, f"SELECT f.id, l.image_id FROM file f JOIN location l ON l.file_id = f.id WHERE f.path LIKE '%/later/{moved + 1}.dcm'"
    ) == [(file, image)]
    assert ask(conn, f"SELECT a.id FROM annotation a JOIN file f ON f.id = a.file_id WHERE f.path LIKE '%/moved/{to_contour.name}'") == [
        (annotation,)
    ]
    assert ask(conn, decided) == said
    assert ask(conn, "SELECT id, file_id, state, closed_at FROM flag WHERE rule = 'KIM-SAYS'") == flagged
    # Other pixels under the old UID are another image; the vanished one is fed no more.
    assert ask(
        conn, f"SELECT g.rule FROM flag g JOIN file f ON f.id = g.file_id WHERE f.path = '{image_path(changed)}' AND g.state = 'open'"
    ) == [("FILE-CHANGED",)]
    assert ask(conn, "SELECT count(*) FROM image") == [(images + 2,)]
    before = tuples(conn)
    assert take_in(tree).files_read == 0
    assert tuples(conn) == before


def test_changes_are_found(database_url: str, conn: Conn, tmp_path: Path, ingest_with: Callable[..., ingest.Summary]) -> None:
    """Among 2,000 files: unchanged, nothing is read or written; one changed, moved, gone, new each is found and nothing else touched."""
    find_changes(tmp_path / "arrived", 2_000, conn, database_url, ingest_with)


@pytest.mark.soak
def test_changes_among_many_are_found(database_url: str, conn: Conn, tmp_path: Path, ingest_with: Callable[..., ingest.Summary]) -> None:
    """The same among 100,000."""
    find_changes(tmp_path / "arrived", 100_000, conn, database_url, ingest_with)


# ------------------------------------------------------------------------------------------------ memory


@pytest.mark.soak
def test_memory_stays_flat(database_url: str, tmp_path: Path) -> None:
    """Over 200,000 files with headers made up, the last tenth takes no more than 1.1 times the memory of the first."""
    environment = {**os.environ, "SCANFEED_BENCH_URL": database_url, "SCANFEED_BENCH_FOLDER": str(tmp_path)}
    command = [sys.executable, REPOSITORY / "benchmarks" / "ingest.py", "million", "200000"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1_800, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["last_tenth_kib"] <= 1.1 * found["first_tenth_kib"]
