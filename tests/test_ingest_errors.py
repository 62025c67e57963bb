"""What goes wrong around an ingest: files that change, rights, full disks, a database that goes away. One line, and nothing is lost."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import psycopg
import pytest

from catalog import contours, database, digest, ingest, synthetic
from catalog.errors import FileError
from catalog.ingest import Summary
from catalog.layouts import Problem, Tree, sunnybrook
from tests.conftest import REPOSITORY
from tests.processes import server_ended, wait_until
from tests.test_ingest import ALL_FED, ask, contour, fed, group, image, open_flags, program, start, tuples
from tests.test_ingest_scale import make_tree

Run = Callable[..., "subprocess.CompletedProcess[str]"]
Conn = psycopg.Connection[tuple[Any, ...]]

only_root = pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="root alone can mount a disk or give rights up")


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """One synthetic patient to change: 6 images of 64×64 px with 6 inner and 3 outer contours."""
    folder = tmp_path / "arrived"
    synthetic.write_studies(folder, patients=1, slices=3, phases=2, size=64, seed=5)
    return folder


@pytest.fixture
def take_in(database_url: str) -> Iterator[Callable[..., Summary]]:
    """Ingest in this process, reading in a thread."""
    with ThreadPoolExecutor(1) as threads:

        def ingest_folder(folder: Path, **options: Any) -> Summary:
            with database.open_database(database_url) as db:
                return ingest.ingest(db, folder, **{"executor": threads, **options})

        yield ingest_folder


def digest_of(url: str | None = None, *, home: Path | None = None) -> Any:
    with database.open_database(url, home=home) as db:
        return digest.digest(db)


def one_line(said: str) -> bool:
    return said.startswith("catalog: ") and said.count("\n") == 1 and "Traceback" not in said


# ------------------------------------------------------------------------------------------------ the tree


def test_root_that_is_a_loop_of_links(database_url: str, tmp_path: Path, conn: Conn, catalog: Run) -> None:
    """A root that is a link to itself is one line and exit code 1, and nothing is written."""
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to("one")
    done = catalog("ingest", tmp_path / "one", "--jobs", 1)
    assert done.returncode == 1 and one_line(done.stderr), done.stderr
    assert "nothing was changed" in done.stderr
    assert ask(conn, "SELECT count(*) FROM root") == [(0,)]


# Root may read everything. So the program walks and reads without CAP_DAC_OVERRIDE (1) and CAP_DAC_READ_SEARCH (2), as others do.
AS_OTHERS = """
import ctypes
from catalog import ingest, reading
libc, head = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0)
def without(call):
    def called(*arguments, **options):
        data = (ctypes.c_uint32 * 6)()
        libc.capget(head, data)
        data[0] &= ~6
        assert libc.capset(head, data) == 0
        try:
            return call(*arguments, **options)
        finally:
            data[0] |= 6
            libc.capset(head, data)
    return called
ingest.find, reading._read = without(ingest.find), without(reading._read)
"""


@only_root
def test_unreadable_in_places(study: Path, conn: Conn, catalog: Run, tmp_path: Path) -> None:
    """A file and a folder without read access are errors, exit code 3, and the rest comes in; a root without is exit code 1.

    With access given all comes in, though no time or size changed.
    """
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(AS_OTHERS)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), *filter(None, [os.environ.get("PYTHONPATH")])])}

    def run() -> subprocess.CompletedProcess[str]:
        return catalog("ingest", study, "--jobs", 1, env=environment)

    folder, file = contour(study).parent, image(study, 2)
    folder.chmod(0)
    file.chmod(0)
    done = run()
    assert done.returncode == 3 and one_line(done.stderr), done.stderr
    errors = dict(ask(conn, "SELECT path, code FROM ingest_error"))
    assert errors == {str(folder.relative_to(study)): "folder-unreadable", "dicoms/SYN0001/2.dcm": "no-access"}
    outer = {("outer", number) for number in (1, 3, 5)}
    assert fed(conn) == outer
    study.chmod(0)
    done = run()
    assert done.returncode == 1 and one_line(done.stderr) and "nothing was changed" in done.stderr, done.stderr
    assert fed(conn) == outer
    study.chmod(0o700)
    folder.chmod(0o700)
    file.chmod(0o600)
    assert run().returncode == 0
    assert fed(conn) == ALL_FED


# ------------------------------------------------------------------------------------------------ files that change meanwhile


class Between(ThreadPoolExecutor):
    """Does something to the tree after it was walked and before a file is read."""

    def __init__(self, act: Callable[[], object]) -> None:
        super().__init__(1)
        self.act = act

    def submit(self, fn: Any, /, *arguments: Any, **options: Any) -> Any:
        self.act()
        self.act = lambda: None
        return super().submit(fn, *arguments, **options)


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def test_grown_between_walk_and_read(study: Path, conn: Conn, take_in: Callable[..., Summary]) -> None:
    """A file that is longer when it is read than when it was found is refused, and read once it has come to rest."""
    drawn, picture = contour(study, 2), image(study, 4)
    whole = drawn.read_bytes()
    half = whole[: whole.index(b"\n", len(whole) // 2) + 1]
    drawn.write_bytes(half)  # three points or more: it looks like a contour

    def grow() -> None:
        append(drawn, whole[len(half) :])
        append(picture, b"\0" * 10)

    with Between(grow) as executor:
        summary = take_in(study, executor=executor)
    assert summary.standing_errors == 3  # the image's contour has none
    assert ask(conn, "SELECT f.path FROM flag g JOIN file f ON f.id = g.file_id WHERE g.detail LIKE 'changed: %' ORDER BY 1") == [
        (str(drawn.relative_to(study)),),
        (str(picture.relative_to(study)),),
    ]
    assert fed(conn) == ALL_FED - {("inner", 2), ("inner", 4)}
    again = take_in(study)
    assert (again.files_read, again.standing_errors) == (2, 0)
    assert fed(conn) == ALL_FED and open_flags(conn) == []
    before = tuples(conn)
    take_in(study)
    assert tuples(conn) == before


def test_grows_while_it_is_read(study: Path, conn: Conn, take_in: Callable[..., Summary], monkeypatch: pytest.MonkeyPatch) -> None:
    """A contour written on while it is read is refused, also where it was known: what was drawn in it is not fed until it is at rest."""
    take_in(study)
    path, read_points = contour(study, 3), contours.read_points
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index(b"\n", len(whole) // 2) + 1])
    half = len(path.read_bytes())

    def while_written(data: bytes) -> Any:
        if len(data) == half:
            append(path, whole[half:])
        return read_points(data)

    monkeypatch.setattr(contours, "read_points", while_written)
    assert take_in(study).standing_errors == 1
    assert ask(conn, "SELECT code FROM ingest_error WHERE ingest_run_id = 2") == [("changed",)]
    assert fed(conn) == ALL_FED - {("inner", 3)}
    take_in(study)
    assert fed(conn) == ALL_FED and open_flags(conn) == []
    assert ask(conn, "SELECT count(*) FROM annotation") == [(9,)]  # half of it was never one


def test_gone_between_walk_and_read(study: Path, conn: Conn, take_in: Callable[..., Summary]) -> None:
    """A file that is gone when it comes to be read is that file's error, and missing the next time."""
    with Between(image(study, 2).unlink) as executor:
        take_in(study, executor=executor)
    assert fed(conn) == ALL_FED - {("inner", 2)}
    assert take_in(study).missing == 1
    assert ask(conn, "SELECT state FROM file WHERE path LIKE '%/2.dcm'") == [("missing",)]


def test_ingests_while_a_tree_is_copied(
    study: Path, tmp_path: Path, conn: Conn, take_in: Callable[..., Summary], new_database: Callable[[], str]
) -> None:
    """Files that another program copies in pieces, ingested again and again meanwhile: in the end all is as if ingested when whole."""
    arriving, twice, done = tmp_path / "slow" / "arrived", threading.Event(), threading.Event()

    def copy() -> None:
        for source in sorted(study.rglob("*")):
            if source.is_file():
                target = arriving / source.relative_to(study)
                target.parent.mkdir(parents=True, exist_ok=True)
                data, step = source.read_bytes(), max(1, source.stat().st_size // 3)
                with target.open("wb", buffering=0) as file:
                    for at in range(0, len(data), step):
                        file.write(data[at : at + step])
                        time.sleep(0.02)
                    if source == image(study, 3):
                        twice.wait(60)  # however long an ingest takes
        done.set()

    (arriving / "dicoms").mkdir(parents=True)
    shutil.copy(study / "link.csv", arriving)
    copier = threading.Thread(target=copy)
    copier.start()
    ingests = 0
    while not done.is_set():
        take_in(arriving)
        ingests += 1
        if ingests == 2:
            twice.set()
    copier.join()
    assert take_in(arriving).standing_errors == 0
    assert ingests >= 2
    url = new_database()
    with database.open_database(url) as db, ThreadPoolExecutor(1) as threads:
        ingest.ingest(db, arriving, executor=threads)
    content = "SELECT patient, instance_number, structure, sample_key::text, area_px, phase, error_flags FROM sample ORDER BY 1, 2, 3"
    with psycopg.connect(url) as there:
        assert ask(conn, content) == ask(there, content)
        for name in ("file", "image", "location"):  # nothing but contours has versions
            assert digest_of()[1][name] == digest_of(url)[1][name]
    assert open_flags(conn) == []


# ------------------------------------------------------------------------------------------------ disks


def in_small_disk(folder: Path, size: str, script: str, *arguments: object) -> dict[str, Any]:
    """Run a Python script that prints JSON where a disk of this size lies at `folder`; skips where none can be mounted."""
    mount = 'mount -t tmpfs -o size="$1",mode=755 none "$2" && shift 2 && exec "$@"'
    command = ["unshare", "-m", "sh", "-c", mount, "sh", size, folder, sys.executable, "-c", script, folder, *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=500, cwd=REPOSITORY)
    if "unshare:" in done.stderr or "mount:" in done.stderr:
        pytest.skip("no disk can be mounted here")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


FULL_DATABASE = """
import json, os, subprocess, sys
from pathlib import Path
from catalog import database, digest
home, tree = Path(sys.argv[1]), sys.argv[2]
os.environ["CATALOG_HOME"] = str(home)

def ingest():
    command = [sys.executable, "-m", "catalog.cli", "ingest", tree, "--jobs", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    return done.returncode, done.stderr

with database.open_database() as db:
    disk = os.statvfs(home)
    (home / "ballast").write_bytes(bytes(disk.f_bavail * disk.f_frsize - int(sys.argv[3])))
    full = ingest()
    with db.connect() as conn:
        states = conn.execute("SELECT (SELECT count(*) FROM file), (SELECT max(state) FROM ingest_run)").fetchone()
    (home / "ballast").unlink()
    print(json.dumps({"full": full, "states": states, "again": ingest(), "digest": digest.digest(db)[0]}))
"""


@only_root
@pytest.mark.parametrize("left", [150_000, pytest.param(400_000, marks=pytest.mark.soak)])
def test_the_databases_disk_fills_up(tmp_path: Path, database_url: str, take_in: Callable[..., Summary], left: int) -> None:
    """A disk that fills up under PostgreSQL is one line and exit code 5; with space again the same command goes on to the end."""
    make_tree(tmp_path / "arrived", 500, drawn_every=5)
    take_in(tmp_path / "arrived")
    home = Path(tempfile.mkdtemp(prefix="scanfeed-full-"))
    home.chmod(0o755)
    os.environ.pop("CATALOG_DATABASE_URL")
    try:
        found = in_small_disk(home, "400m", FULL_DATABASE, tmp_path / "arrived", left)
    finally:
        assert server_ended(home)
        shutil.rmtree(home)
    code, said = found["full"]
    assert code == 5 and one_line(said), said
    assert "disk is full" in said and "run the same command again" in said
    assert found["again"] == [0, ""]
    assert found["digest"] == digest_of(database_url)[0]


FULL_CACHE = """
import json
from loaderd import Feed, FeedError
try:
    with Feed(structures=["inner"], batch_size=2, seed=1) as feed:
        said = ["", sum(1 for _ in feed.epoch())]
except FeedError as error:
    said = [str(error), 0]
print(json.dumps({"said": said}))
"""


@only_root
def test_the_caches_disk_fills_up(tmp_path: Path, conn: Conn, take_in: Callable[..., Summary]) -> None:
    """A volume that does not fit the cache's disk ends the feed with one line and flags no file; with space it is fed."""
    tree, cache = tmp_path / "arrived", Path(os.environ["CATALOG_HOME"]) / "cache"
    voxels = np.random.default_rng(1).integers(0, 1000, (64, 64, 300), "i2")
    for folder, data in (("imagesTr", voxels), ("labelsTr", (voxels > 500).astype("u1"))):
        (tree / folder).mkdir(parents=True)
        nib.save(nib.Nifti1Image(data, np.eye(4)), tree / folder / ("x_0000.nii.gz" if folder == "imagesTr" else "x.nii.gz"))
    names = {"labels": {"background": 0, "inner": 1}, "channel_names": {"0": "MR"}, "file_ending": ".nii.gz", "numTraining": 1}
    (tree / "dataset.json").write_text(json.dumps(names))
    summary = take_in(tree)
    assert (summary.images, summary.paired, summary.standing_errors) == (300, 300, 0)
    cache.mkdir(parents=True)
    cache.chmod(0o700)
    mounted = in_small_disk(cache, "1m", FULL_CACHE)["said"]
    assert "disk is full" in mounted[0] and "nothing was flagged" in mounted[0] and "\n" not in mounted[0], mounted
    assert open_flags(conn) == []
    assert wait_until(lambda: not list(cache.iterdir()))
    done = subprocess.run([sys.executable, "-c", FULL_CACHE], capture_output=True, text=True, timeout=300, cwd=REPOSITORY)
    assert json.loads(done.stdout)["said"] == ["", 150], done.stderr


# ------------------------------------------------------------------------------------------------ processes


@pytest.fixture
def own_home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The CATALOG_HOME of an embedded server of this test alone, with the schema made."""
    home = Path(tempfile.mkdtemp(prefix="scanfeed-away-"))  # not in pytest's folder: as root the server runs as another
    monkeypatch.setenv("CATALOG_HOME", str(home))
    database.open_database(home=home).close()
    yield home
    assert server_ended(home)
    shutil.rmtree(home)


def test_the_database_goes_away(tmp_path: Path, own_home: Path, new_database: Callable[[], str]) -> None:
    """PostgreSQL killed by -9 under an ingest: exit code 5 and one line; the same command then ends with what undisturbed is there."""
    make_tree(tmp_path / "arrived", 300)
    process = start(tmp_path / "arrived", program(tmp_path, held="/200.dcm"))
    with database.open_database(home=own_home) as db, db.connect(autocommit=True) as conn:
        assert wait_until(lambda: ask(conn, "SELECT count(*) FROM file")[0][0] >= 100)
        os.kill(int((own_home / "postgresql/postmaster.pid").read_text().split()[0]), signal.SIGKILL)
        (tmp_path / "go on").touch()
        _, said = process.communicate(timeout=300)
    assert process.returncode == 5 and one_line(said), said
    assert "went away" in said and "run the same command again" in said
    assert wait_until(lambda: group(process.pid) == [])
    with database.open_database(home=own_home) as db, db.connect() as conn:
        here = ask(conn, "SELECT count(*) FROM file")[0][0]
    assert 100 <= here < 330
    again = start(tmp_path / "arrived", {**os.environ}, "--json")
    output, said = again.communicate(timeout=300)
    assert again.returncode == 0, said
    assert json.loads(output)["files_read"] == 330 - here
    url = new_database()
    with database.open_database(url) as db, ThreadPoolExecutor(1) as threads:
        ingest.ingest(db, tmp_path / "arrived", executor=threads)
    assert digest_of(home=own_home) == digest_of(url)


def test_script_without_a_main_guard(study: Path, database_url: str, tmp_path: Path, conn: Conn) -> None:
    """A script that ingests at its top level needs no main guard: its reading processes do not run it again."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom catalog import database, ingest\nprint('began')\n"
        "with database.open_database() as db:\n    print(ingest.ingest(db, Path(sys.argv[1]), jobs=1).images)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, str(script), str(study)], capture_output=True, text=True, timeout=300, cwd="/", env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["began", "6"]
    assert ask(conn, "SELECT count(*) FROM image") == [(6,)]


# ------------------------------------------------------------------------------------------------ fuzzing


def mutants(seeds: list[bytes], pieces: list[bytes], count: int, seed: int) -> Iterator[bytes]:
    """Yield bytes near `seeds`: pieces put in, taken out, doubled, cut off."""
    chance = random.Random(seed)
    for _ in range(count):
        data = bytearray(chance.choice(seeds))
        for _ in range(chance.choice((0, 1, 1, 2, 4, 8))):
            at = chance.randrange(len(data) + 1)
            what = chance.random()
            if what < 0.6:
                data[at : at + chance.choice((0, 0, 1, 2))] = chance.choice(pieces)
            elif what < 0.8:
                data[at:at] = data[at : at + chance.randrange(60)] * chance.choice((1, 2, 20))
            elif what < 0.9:
                data[at : at + chance.randrange(20)] = chance.randbytes(chance.randrange(6))
            else:
                del data[at:]
        yield bytes(data)


def grown_kib(before: int) -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before


SEPARATORS = [b"\n", b"\r\n", b"\r", b" ", b"\t", b",", b";", b"\0", b"\x0b", b"\x0c", b"\x1c", b"\x85", b"\xa0", b"\xff", b"\xef\xbb\xbf"]
NUMBERS = [b"1e400", b"-1e400", b"nan", b"inf", b"0x1", b"1_0", b".", b"-", b"+5", b"1e-999", b"9" * 400, "٣".encode(), b"1e1000000000"]


def fuzz_contours(count: int) -> None:
    seeds = [
        b"10.5 20.25\n30 20\n30 40\n",
        b"\xef\xbb\xbf1,2\r\n3,4\r\n5,6\r\n",
        b"".join(b"%d.50 %d.00\n" % (n, n * n % 50) for n in range(40)),
        b"1e1 2E-1\n-3 +4\n",
    ]
    before, began, read, refused = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time(), 0, 0
    for data in mutants(seeds, SEPARATORS + NUMBERS, count, 11):
        try:
            points = contours.read_points(data)
        except FileError as error:
            assert error.code in ("contour-empty", "contour-unreadable") and "\n" not in str(error) and len(str(error)) < 200
            refused += 1
            continue
        assert points.dtype == np.float64 and points.ndim == 2 and points.shape[1] == 2 and 1 <= len(points) <= len(data)
        assert np.isfinite(points).all() and np.abs(points).max() <= contours.MAX_COORDINATE
        read += 1
    assert read > count // 10 and refused > count // 4
    assert grown_kib(before) < 100_000 and (time.process_time() - began) / count < 0.005


SECRET = "Secret^Name"


def fuzz_link_tables(folder: Path, count: int) -> None:
    seeds = [
        b"patient_id,original_id\nSYN0001,SC-1\nSYN0002,SC-2\n",
        b'\xef\xbb\xbfOriginal_ID, Patient_ID ,more\r\n"SC,1","SYN""1",x\r\nSC-2,SYN2,y\r\n',
        b"patient_id,original_id\n" + b"".join(b"SYN%d,SC-%d\n" % (n, n) for n in range(60)),
        f"patient_id,original_id,name\nSYN0001,SC-1,{SECRET}\n".encode(),
    ]
    pieces = [*SEPARATORS, b'"', b'""', b'"\n', b"'", b"\\", b"patient_id", b"original_id", b"SYN0001", b"x" * 20_000, "ö".encode()]
    path, tree = folder / "link.csv", Tree(folder)
    before, began, read, said = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time(), 0, 0
    for data in mutants(seeds, pieces, count, 12):
        path.write_bytes(data)
        problems: list[Problem] = []
        lines = sunnybrook.read_link(tree, "link.csv", "patient_id", "original_id", problems)
        patients, originals = [one for one, _ in lines.values()], [one for _, one in lines.values()]
        assert all(patients) and all(originals) and len(set(patients)) <= len(lines)
        assert len(set(patients)) == len(set(originals)) == len(set(lines.values()))  # no line contradicts another
        for problem in problems:
            assert problem.path == "link.csv" and problem.code in ("link-unreadable", "link-columns", "link-ambiguous")
            assert "\n" not in problem.message and SECRET not in problem.message
        read += bool(lines)
        said += bool(problems)
    assert read > count // 10 and said > count // 10
    assert grown_kib(before) < 200_000 and (time.process_time() - began) / count < 0.02


def test_damaged_contours() -> None:
    """2,000 mutants of contour texts give points that are numbers, or one line that names none of its content."""
    fuzz_contours(2_000)


def test_damaged_link_tables(tmp_path: Path) -> None:
    """2,000 mutants of link tables give pairs that do not contradict each other, or problems of one line."""
    fuzz_link_tables(tmp_path, 2_000)


@pytest.mark.soak
def test_many_damaged_contours() -> None:
    """The same 100,000 times."""
    fuzz_contours(100_000)


@pytest.mark.soak
def test_many_damaged_link_tables(tmp_path: Path) -> None:
    """The same 100,000 times."""
    fuzz_link_tables(tmp_path, 100_000)
