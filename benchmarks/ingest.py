"""Ingest against what one would write by hand, and against a PACS; and what it leaves alone, takes on disk and in memory.

    python benchmarks/ingest.py [--files 20000] [--rounds 3] [--only PART …] [--folder FOLDER] [--json FILE]

The files are copies of the real 134 KB cardiac MR images in SCANFEED_DATA, each an object of its own: its UIDs and PatientID are patched in
place. They lie in folders as a PACS exports them and are read from the page cache. Sides take turns, the table holds medians, the JSON
beside it every round. The peers are a loop of pydicom and one INSERT a file (in one process, as one writes it), and Orthanc with its
PostgreSQL plugin, which also copies the bytes; all of them use the same server, our embedded one.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import http.client
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from itertools import cycle
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pydicom
from psycopg import sql

from catalog import embedded, ingest, layouts, measuring, processes, reading
from catalog.database import Database, open_database
from catalog.records import Frame, Instance

HERE = Path(__file__).resolve().parent
DATA = Path(os.environ.get("SCANFEED_DATA", HERE.parents[1] / "shared" / "data"))
ROWS = COLUMNS = 256
CONNECTIONS = 8  # that upload to Orthanc
ORTHANC = "/usr/sbin/Orthanc"
PLUGINS = Path("/usr/share/orthanc/plugins")
OF_A_STUDY = 500  # synthesised files
PARTS = ("plain", "full", "orthanc", "noop", "bytes", "measure", "million")


def main() -> None:
    """Measure, print the table, write the JSON."""
    arguments = _arguments()
    for name in ("CATALOG_DATABASE_URL", "CATALOG_HOME"):
        os.environ.pop(name, None)
    found: dict[str, Any] = {}
    with _folder(arguments.folder) as folder, embedded.use(folder / "home") as server:
        admin = f"postgresql://{server.user}@/postgres?host={server.host}&port={server.port}"
        bench = Bench(arguments, folder, admin)
        for part in PARTS:
            if part in arguments.only:
                _say(part)
                found[part] = getattr(bench, part)()
    report = {
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "settings": {key: value for key, value in vars(arguments).items() if key not in ("json", "folder")},
        "machine": {"cores": len(os.sched_getaffinity(0)), "kernel": platform.release(), "load": os.getloadavg()},
        "found": found,
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    print(table(found))
    _say(f"every round: {arguments.json}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--json", type=Path, default=HERE / "results" / "ingest.json", help="where the JSON goes")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--files", type=int, default=20_000, help="of 134 KB each")
    parser.add_argument("--million", type=int, default=1_000_000, help="files synthesised for the memory")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="keep the data there; by default a temporary folder")
    return parser.parse_args()


@contextlib.contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    folder = given.resolve() if given is not None else Path(tempfile.mkdtemp(prefix="scanfeed-bench-"))
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)  # as root PostgreSQL runs under another account, which must get through
    try:
        yield folder
    finally:
        if given is None:
            shutil.rmtree(folder, ignore_errors=True)


def make_copies(folder: Path, files: int) -> list[str]:
    """Write so many distinct objects below a folder, a study a folder, and return their paths; what is there already stays."""
    studies = [sorted(study.glob("*.dcm")) for study in sorted((DATA / "sunnybrook" / "final_data" / "dicoms").iterdir())]
    paths: list[str] = []
    for patient, sources in enumerate(cycle(studies)):
        for source in sources:
            if len(paths) == files:
                return paths
            path = folder / f"PAT{patient:05d}" / "ST0001" / "SE0001" / f"IM{len(paths) + 1:06d}.dcm"
            paths.append(str(path))
            if path.exists():
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            data = source.read_bytes()
            header = pydicom.dcmread(source, stop_before_pixels=True)
            end = len(data) - ROWS * COLUMNS * 2 - 64
            head = data[:end]
            numbers = {"SOPInstanceUID": len(paths), "SeriesInstanceUID": patient, "StudyInstanceUID": patient, "PatientID": patient}
            for name, number in numbers.items():
                before = str(header[name].value).encode()
                assert before in head
                head = head.replace(before, before[:-6] + b"%06d" % number)  # as long as before, so nothing moves
            path.write_bytes(head + data[end:])
    raise AssertionError


def make_small(folder: Path, files: int) -> None:
    """Write so many objects of 32×32 px below a folder, 250 a folder; what is there already stays."""
    source = next((DATA / "sunnybrook" / "final_data" / "dicoms").rglob("*.dcm"))
    data = source.read_bytes()
    before = str(pydicom.dcmread(source, stop_before_pixels=True).SOPInstanceUID).encode()
    at = data.index(b"\xe0\x7f\x10\0OW")
    head = data[:at]
    for tag in (b"\x28\0\x10\0US\2\0", b"\x28\0\x11\0US\2\0"):  # Rows and Columns
        value = head.index(tag) + len(tag)
        head = head[:value] + b"\x20\0" + head[value + 2 :]
    rest = b"\xe0\x7f\x10\0OW\0\0" + (2 * 32 * 32).to_bytes(4, "little") + data[-2 * 32 * 32 :]
    for number in range(files):
        path = folder / f"{number // 250:04d}" / f"IM{number:07d}.dcm"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(head.replace(before, before[:-6] + b"%06d" % number) + rest)


class Bench:
    """The parts of the benchmark, on one server."""

    def __init__(self, arguments: argparse.Namespace, folder: Path, admin: str) -> None:
        self.arguments, self.folder, self.admin = arguments, folder, admin
        self._made: list[str] | None = None
        self._template = ""

    @property
    def tree(self) -> Path:
        """The folder with the files, in the page cache."""
        folder = self.folder / f"files-{self.arguments.files}"
        if self._made is None:
            _say(f"writing {self.arguments.files:,} files")
            self._made = make_copies(folder, self.arguments.files)
        for path in self._made:
            Path(path).read_bytes()
        return folder

    @contextlib.contextmanager
    def database(self, *, empty: bool = False) -> Iterator[str]:
        """Give the URL of a fresh database, with our schema unless it is to be empty."""
        if not empty and not self._template:
            self._template = self._create("template1")
            open_database(self._url(self._template)).close()
        name = self._create("template1" if empty else self._template)
        try:
            yield self._url(name)
        finally:
            with psycopg.connect(self.admin, autocommit=True) as conn:
                conn.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))

    def _create(self, template: str) -> str:
        name = f"bench_{uuid.uuid4().hex[:8]}"
        with psycopg.connect(self.admin, autocommit=True) as conn:
            conn.execute(sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(name), sql.Identifier(template)))
            conn.execute("CHECKPOINT")
        return name

    def _url(self, name: str) -> str:
        return self.admin.replace("/postgres?", f"/{name}?")

    # What is measured.

    def plain(self) -> dict[str, Any]:
        """Ingest without hashes against a loop over headers."""
        return self._against("none", lambda tree, url: plain_loop(tree, url, whole=False))

    def full(self) -> dict[str, Any]:
        """Ingest with all hashes against a loop that reads and hashes whole files."""
        return self._against("full", lambda tree, url: plain_loop(tree, url, whole=True))

    def orthanc(self) -> dict[str, Any]:
        """Ingest with all hashes against an upload to Orthanc."""
        if not Path(ORTHANC).exists() or not (PLUGINS / "libOrthancPostgreSQLIndex.so").exists():
            return {"missing": "Orthanc is not installed: apt-get install orthanc orthanc-postgresql"}
        return self._against("full", self._upload)

    def _against(self, hashing: str, peer: Callable[[Path, str], float]) -> dict[str, Any]:
        tree = self.tree
        sides: dict[str, list[float]] = {"ours_s": [], "theirs_s": []}
        for number in range(self.arguments.rounds):
            for side in ("ours_s", "theirs_s") if number % 2 else ("theirs_s", "ours_s"):
                with self.database(empty=side == "theirs_s") as url:
                    sides[side].append(run_ingest(tree, url, hashing) if side == "ours_s" else peer(tree, url))
                _say(f"  {side[:-2]}: {self.arguments.files / sides[side][-1]:,.0f} files/s")
        ratio = statistics.median(sides["theirs_s"]) / statistics.median(sides["ours_s"])
        pairs = [theirs / ours for ours, theirs in zip(sides["ours_s"], sides["theirs_s"], strict=True)]
        return {**sides, "files": self.arguments.files, "ratio": ratio, "pairs": pairs}

    def _upload(self, tree: Path, url: str) -> float:
        """Upload all files to a fresh Orthanc by several connections; returns seconds."""
        found = psycopg.conninfo.conninfo_to_dict(url)
        storage = Path(tempfile.mkdtemp(prefix="orthanc-", dir=self.folder))
        port = 18042
        config = {
            "Name": "bench", "StorageDirectory": str(storage), "IndexDirectory": str(storage), "HttpPort": port,
            "DicomServerEnabled": False, "RemoteAccessAllowed": False, "AuthenticationEnabled": False, "HttpThreadsCount": CONNECTIONS,
            "OverwriteInstances": False,
            "Plugins": [str(PLUGINS / "libOrthancPostgreSQLIndex.so")],
            "PostgreSQL": {
                "EnableIndex": True, "EnableStorage": False, "Host": found["host"], "Port": int(found["port"] or 5432),
                "Database": found["dbname"], "Username": found["user"], "Password": "", "EnableSsl": False, "Lock": False,
                "IndexConnectionsCount": CONNECTIONS,
            },
        }  # fmt: skip
        (storage / "orthanc.json").write_text(json.dumps(config))
        with (self.folder / "orthanc.log").open("wb") as log:
            server = subprocess.Popen([ORTHANC, str(storage / "orthanc.json")], stdout=log, stderr=log)
        try:
            _wait_for(port, server)
            assert self._made is not None
            paths = list(self._made)
            begun = time.perf_counter()
            with ThreadPoolExecutor(CONNECTIONS) as threads:
                stored = sum(threads.map(lambda number: _post(port, paths[number::CONNECTIONS]), range(CONNECTIONS)))
            seconds = time.perf_counter() - begun
            assert stored == len(paths), f"Orthanc took {stored} of {len(paths)} files"
            return seconds
        finally:
            server.terminate()
            server.wait(60)
            shutil.rmtree(storage)

    def noop(self) -> dict[str, Any]:
        """What an ingest of an unchanged tree does."""
        tree = self.tree
        with self.database() as url:
            run_ingest(tree, url, "none")
            command = [run_ingest(tree, url, "none") for _ in range(self.arguments.rounds)]
            with open_database(url) as db:
                inside = [ingest.ingest(db, tree, hashing="none").seconds for _ in range(2 * self.arguments.rounds)]
            before = _written(url)
            opened = self._opened(tree, url)
            written = _written(url) - before
        many = self._noop_of_many()
        return {"files": self.arguments.files, "command_s": command, "inside_s": inside, "opened": opened, "written": written, "many": many}

    def _opened(self, tree: Path, url: str) -> int | None:
        """Count the files below the tree that an ingest opens, in all its processes."""
        if shutil.which("strace") is None:
            return None
        log = self.folder / "strace.log"
        run_ingest(tree, url, "none", ("strace", "-f", "-qq", "-e", "trace=open,openat,openat2", "-s", "4096", "-o", str(log)))
        pattern = re.compile(rf'open(?:at2?)?\([^"]*"{re.escape(str(tree))}/[^"]*", (?P<flags>.*)')
        with log.open(errors="replace") as lines:
            return sum("O_DIRECTORY" not in match["flags"] for line in lines if (match := pattern.search(line)))

    def _noop_of_many(self) -> dict[str, Any]:
        """The same over five times as many small files: what each one costs, without what a command costs."""
        files = 5 * self.arguments.files
        tree = self.folder / f"small-{files}"
        make_small(tree, files)
        with self.database() as url, open_database(url) as db:
            first = ingest.ingest(db, tree, hashing="none")
            assert first.files_read == files, first
            seconds = [ingest.ingest(db, tree, hashing="none").seconds for _ in range(2 * self.arguments.rounds)]
            assert ingest.ingest(db, tree, hashing="none").files_read == 0
        return {"files": files, "inside_s": seconds}

    def bytes(self) -> dict[str, Any]:
        """What the rows of an image take in the database, with their indexes."""
        found: dict[str, Any] = {}
        for hashing in ("none", "full"):
            with self.database() as url:
                run_ingest(self.tree, url, hashing)
                with psycopg.connect(url, autocommit=True) as conn:
                    conn.execute("VACUUM")
                    found[hashing] = {
                        name: conn.execute("SELECT pg_total_relation_size(%s::regclass)", [name]).fetchone()[0] / self.arguments.files  # type: ignore[index]
                        for name in ("file", "image", "location", "instance")
                    }
        return found

    def measure(self) -> dict[str, Any]:
        """`catalog measure` against reading and converting the same pixels, and that with a hash; images a second of one core."""
        found: dict[str, list[float]] = {"limit": [], "limit_hashed": [], "hashed": [], "known": []}
        paths = sorted(map(str, self.tree.rglob("*.dcm")))
        for _ in range(self.arguments.rounds):
            found["limit"].append(decode_limit(paths, hashing=False))
            found["limit_hashed"].append(decode_limit(paths, hashing=True))
            for name, hashing in (("hashed", "none"), ("known", "full")):
                with self.database() as url:
                    run_ingest(self.tree, url, hashing)
                    with open_database(url) as db:
                        begun = time.perf_counter()
                        done = measuring.measure(db, jobs=1)
                    assert done.measured == len(paths)
                    found[name].append(len(paths) / (time.perf_counter() - begun))
        return found

    def million(self) -> dict[str, Any]:
        """Memory of an ingest of very many files, synthesised in its reading processes: samples of all of its processes."""
        with self.database() as url:
            command = [sys.executable, __file__, "--files", str(self.arguments.million)]
            environment = {**os.environ, "SCANFEED_BENCH_URL": url, "SCANFEED_BENCH_FOLDER": str(self.folder)}
            result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
            return json.loads(result.stdout)  # type: ignore[no-any-return]


# ------------------------------------------------------------------------------------------ the sides


def run_ingest(tree: Path, url: str, hashing: str, before: tuple[str, ...] = ()) -> float:
    """Run `catalog ingest` as a user does; returns seconds, Python's start among them."""
    command = [*before, sys.executable, "-m", "catalog.cli", "ingest", str(tree), "--hash", hashing, "--database", url]
    begun = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - begun


TAGS = (
    "PatientID", "StudyInstanceUID", "StudyDate", "SeriesInstanceUID", "SeriesNumber", "Modality", "SOPInstanceUID", "SOPClassUID",
    "InstanceNumber", "Rows", "Columns", "PixelSpacing", "ImagePositionPatient", "ImageOrientationPatient", "SliceThickness", "TriggerTime",
    "RescaleSlope", "RescaleIntercept",
)  # fmt: skip


def plain_loop(tree: Path, url: str, *, whole: bool) -> float:
    """Take files in as one writes it by hand; returns seconds."""
    columns = ", ".join(f"{name} text" for name in TAGS)
    statement = f"INSERT INTO plain VALUES ({', '.join(['%s'] * (len(TAGS) + 4))})"
    warnings.simplefilter("ignore")  # pydicom's about UIDs with leading zeros; printing them would cost more than the rest
    begun = time.perf_counter()
    with psycopg.connect(url) as conn:
        conn.execute(f"CREATE TABLE plain (path text PRIMARY KEY, size bigint, mtime float8, sha256 bytea, {columns})")
        conn.execute("CREATE INDEX ON plain (SOPInstanceUID)")
        number = 0
        for folder, _, names in os.walk(tree):
            for name in names:
                path = os.path.join(folder, name)  # noqa: PTH118
                status = os.stat(path)  # noqa: PTH116
                digest = hashlib.sha256(Path(path).read_bytes()).digest() if whole else None
                header = pydicom.dcmread(path, stop_before_pixels=not whole)
                values = [str(header.get(tag, "")) for tag in TAGS]
                conn.execute(statement, [path, status.st_size, status.st_mtime, digest, *values])
                number += 1
                if number % 1_000 == 0:
                    conn.commit()
    return time.perf_counter() - begun


def _wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            conn = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            conn.request("GET", "/system")
            if conn.getresponse().status == 200:
                return
        except OSError:
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("Orthanc does not start; see orthanc.log") from None
            time.sleep(0.1)


def _post(port: int, paths: list[str]) -> int:
    """Upload files by one connection; returns how many were stored."""
    conn = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    stored = 0
    for path in paths:
        conn.request("POST", "/instances", body=Path(path).read_bytes(), headers={"Content-Type": "application/dicom"})
        answer = conn.getresponse()
        body = answer.read()
        stored += answer.status == 200 and json.loads(body)["Status"] == "Success"
    conn.close()
    return stored


def decode_limit(paths: list[str], *, hashing: bool) -> float:
    """Return images/s of opening, one preadv, float32, and perhaps a hash."""
    stored = np.empty(ROWS * COLUMNS, "<i2")
    image = np.empty(ROWS * COLUMNS, np.float32)
    begun = time.perf_counter()
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.preadv(descriptor, [stored.data], 2_000)  # all are as long and begin a little later: where does not matter here
        os.close(descriptor)
        image[...] = stored
        if hashing:
            hashlib.sha256(stored.data).digest()
    return len(paths) / (time.perf_counter() - begun)


def _written(url: str) -> int:
    """Return how many rows of the catalog were ever inserted, updated or deleted."""
    with psycopg.connect(url, autocommit=True) as conn:
        time.sleep(1.5)  # sessions report when they end, and at most once a second
        row = conn.execute("SELECT sum(n_tup_ins + n_tup_upd + n_tup_del)::bigint FROM pg_stat_user_tables").fetchone()
        assert row is not None
        return int(row[0])


# ------------------------------------------------------------------------------------------ a million files that are not there


def synthesised(path: Path, entry: layouts.Entry, hashing: reading.Hashing) -> tuple[Instance, bool, bytes | None]:
    """Return what a header says, in place of `catalog.reading._read_dicom`."""
    number = int(entry.path[-11:-4])
    study = number // OF_A_STUDY
    frame = Frame(
        frame=0, rows=ROWS, columns=COLUMNS, samples_per_pixel=1, photometric="MONOCHROME2", bits_stored=16, pixel_spacing=(1.4, 1.4),
        image_position=(0.0, 0.0, number % 25 * 10.0), image_orientation=(1.0, 0.0, 0.0, 0.0, 1.0, 0.0), position=number % 25 * 10.0,
        slice_thickness=8.0, trigger_time=number % OF_A_STUDY // 25 * 40.0, slope=1.0, intercept=0.0, window_center=None, window_width=None,
        pixel_hash=None, offset=2000, length=2 * ROWS * COLUMNS, dtype="<i2",
    )  # fmt: skip
    instance = Instance(
        patient_id=f"PAT{study:06d}", study_instance_uid=f"1.2.826.0.1.3680043.2.1143.{study}",
        series_instance_uid=f"1.2.826.0.1.3680043.2.1143.{study}.1", sop_instance_uid=f"1.2.826.0.1.3680043.2.1143.{study}.1.{number}",
        sop_class_uid="1.2.840.10008.5.1.4.1.1.4", modality="MR", series_number=1, study_date="20120101", instance_number=number,
        images_in_acquisition=OF_A_STUDY, frame_of_reference_uid=f"1.2.826.0.1.3680043.2.1143.{study}.2",
        transfer_syntax_uid="1.2.840.10008.1.2.1", number_of_frames=1, frames=(frame,),
    )  # fmt: skip
    return instance, False, None


def begin_synthesis() -> None:
    """Have a reading process make up what it should read."""
    processes._begin()
    reading._read_dicom = synthesised


def ingest_million(url: str, folder: Path, files: int) -> None:
    """Ingest a tree that is not there; prints seconds since the start, share of the files read, and KiB of the writer and of all."""
    empty = Path(tempfile.mkdtemp(dir=folder))
    layouts.Tree._walk = lambda self: (  # type: ignore[method-assign]
        layouts.Entry(f"PAT{number // OF_A_STUDY:06d}/ST1/SE1/IM{number:07d}.dcm", 134_000, 1) for number in range(files)
    )
    samples: list[tuple[float, float, int, int]] = []
    begun = time.monotonic()
    share, ended = 0.0, threading.Event()

    def progress(done: int, total: int) -> None:
        nonlocal share
        share = done / total

    def watch() -> None:
        while not ended.wait(0.25):
            samples.append((round(time.monotonic() - begun, 2), share, _rss(os.getpid()), sum(_rss(pid) for pid in _family(os.getpid()))))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with (
            Database(psycopg.conninfo.make_conninfo(url)) as db,
            ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn"), initializer=begin_synthesis) as readers,
        ):
            summary = ingest.ingest(db, empty, hashing="none", executor=readers, progress=progress)
            assert summary.images == files, summary
    finally:
        ended.set()
        watcher.join()
    reading_phase = [sample for sample in samples if 0 < sample[1] < 1]
    first = statistics.median(sample[3] for sample in reading_phase if sample[1] <= 0.1)
    last = statistics.median(sample[3] for sample in reading_phase if sample[1] > 0.9)
    peak = max(sample[3] for sample in samples)
    print(json.dumps({
        "files": files, "seconds": summary.seconds, "first_tenth_kib": first, "last_tenth_kib": last, "peak_kib": peak,
        "writer_peak_kib": max(sample[2] for sample in samples), "samples": samples[:: max(1, len(samples) // 400)],
    }))  # fmt: skip


def _rss(pid: int) -> int:
    """Return the KiB that a process has in memory, counting only its share of what others have too."""
    try:
        found = re.search(r"^Pss:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) if found else 0


def _family(pid: int) -> list[int]:
    """Return a process and those that it started, PostgreSQL's not among them."""
    try:
        children = [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]
    except OSError:
        children = []
    return [pid, *(one for child in children for one in _family(child))]


# ------------------------------------------------------------------------------------------ what is shown


def table(found: dict[str, Any]) -> str:
    """Return what was found as Markdown."""
    rows: list[tuple[str, str, str, bool | None]] = []
    for part, title, goal in (
        ("plain", "ingest without hashes, over a loop of pydicom and INSERT", 8),
        ("full", "ingest with all hashes, over such a loop that hashes too", 5),
        ("orthanc", f"ingest with all hashes, over Orthanc with PostgreSQL ({CONNECTIONS} connections; it also copies the bytes)", 15),
    ):
        if one := found.get(part):
            if "missing" in one:
                rows.append((title, one["missing"], f"≥ {goal} ×", None))
                continue
            ours, theirs = (one["files"] / statistics.median(one[side]) for side in ("ours_s", "theirs_s"))
            rows.append((title, f"{one['ratio']:.1f} × ({ours:,.0f} over {theirs:,.0f} files/s)", f"≥ {goal} ×", one["ratio"] >= goal))
    if one := found.get("noop"):
        many = one["many"]["files"] / statistics.median(one["many"]["inside_s"])
        rows.append((f"no-op ingest of {one['many']['files']:,} files", f"{many:,.0f} files/s", "≥ 100,000", many >= 100_000))
        command = one["files"] / statistics.median(one["command_s"])
        rows.append((f"the command `catalog ingest` over {one['files']:,} unchanged files, Python's start included",
                     f"{command:,.0f} files/s", "", None))  # fmt: skip
        rows.append(("files that it opens", str(one["opened"]), "0", one["opened"] == 0))
        rows.append(("rows that it writes", str(one["written"]), "0", one["written"] == 0))
    for hashing, one in found.get("bytes", {}).items():
        three = sum(one[name] for name in ("file", "image", "location"))
        said = f"{three:.0f} ({', '.join(f'{name} {each:.0f}' for name, each in one.items())})"
        rows.append((f"bytes an image of file, image and location with their indexes, --hash {hashing}", said, "≤ 850", three <= 850))
    if one := found.get("measure"):
        median = {name: statistics.median(each) for name, each in one.items()}
        for name, title, limit in (("known", "hashes known", "limit"), ("hashed", "hashes made", "limit_hashed")):
            said = f"{median[name]:,.0f} images/s = {median[name] / median[limit]:.2f} × {median[limit]:,.0f}"
            hashing = " and sha256" if limit == "limit_hashed" else ""
            rows.append((f"`catalog measure`, one process, {title}, over preadv and float32{hashing}", said, "≥ 0.5 ×",
                         median[name] >= 0.5 * median[limit]))  # fmt: skip
    if one := found.get("million"):
        peak, growth = one["peak_kib"] / 1024**2, one["last_tenth_kib"] / one["first_tenth_kib"]
        rows.append((f"memory of an ingest of {one['files']:,} files, all its processes", f"{peak:.2f} GiB at most", "≤ 1 GB",
                     one["peak_kib"] * 1024 <= 1e9))  # fmt: skip
        rows.append(("its last tenth over its first", f"{growth:.2f} ×", "≤ 1.1 ×", growth <= 1.1))
    verdict = {True: "met", False: "MISSED", None: ""}
    lines = ["| promise | measured | goal | |", "| --- | --- | --- | --- |"]
    return "\n".join(lines + [f"| {title} | {said} | {goal} | {verdict[met]} |" for title, said, goal, met in rows])


def _say(line: str) -> None:
    print(f"bench: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    if "SCANFEED_BENCH_URL" in os.environ:
        ingest_million(os.environ["SCANFEED_BENCH_URL"], Path(os.environ["SCANFEED_BENCH_FOLDER"]), int(sys.argv[2]))
    else:
        main()
