"""`catalog export`: every image and mask, bit for bit, for h5py and webdataset; ended anywhere, it goes on to the same bytes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import hashlib
import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import psycopg
import pytest
import webdataset
from pydicom import dcmread
from pydicom.pixels import apply_modality_lut
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from catalog import cli, contours, database, destinations, exporting, flags, ingest, processes, shards, snapshots, splits, synthetic
from catalog.database import Database
from catalog.errors import CatalogError, DriftError, UsageError
from catalog.exporting import Exported
from loaderd import Feed
from tests.conftest import DATA
from tests.test_dicom import image_file, lut

Conn = psycopg.Connection[tuple[Any, ...]]
Export = Callable[..., Exported]
FORMS = ("hdf5", "webdataset")
PLACES = {"hdf5": "made.h5", "webdataset": "made"}


class Ended(NamedTuple):
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


@contextlib.contextmanager
def threads(jobs: int | None, tasks: int) -> Iterator[Executor]:
    """In the place of processes, of which each takes a second to begin."""
    with ThreadPoolExecutor(2) as pool:
        yield pool


@pytest.fixture
def db(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Database]:
    monkeypatch.setattr(exporting, "processes", threads)
    with database.open_database(database_url) as opened:
        yield opened


@pytest.fixture
def export(db: Database) -> Export:
    """Export a snapshot in this process."""
    return lambda name, place, to, **options: exporting.export(db, name, place, to=to, **options)


@pytest.fixture
def say(db: Database) -> Callable[..., Ended]:
    """Run `catalog` in this process."""

    def run(*arguments: object) -> Ended:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = cli.app([str(argument) for argument in arguments], prog_name="catalog", standalone_mode=False)
            except CatalogError as error:
                code = error.exit_code
                print(error, file=err)
        return Ended(code or 0, out.getvalue(), err.getvalue())

    return run


@pytest.fixture
def frozen(ingested: str, db: Database) -> str:
    """A snapshot of the synthetic studies with a split."""
    splits.create(db, "s", ratios={"train": 0.67, "val": 0.33}, seed=1)
    snapshots.create(db, "first", split="s", structures=["inner", "outer"])
    return "first"


def take_in(db: Database, folder: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        ingest.ingest(db, folder, executor=pool)


@dataclass
class Truth:
    """What the catalog says of a sample, read apart: a file, rasters by structure, origins, labels, and whose it is."""

    sample_id: int
    key: str
    path: str
    frame: int
    patient: str
    part: str | None
    fold: int | None
    masks: dict[str, np.ndarray[Any, Any]]
    origins: dict[str, str]
    labels: dict[str, str]


def truth(conn: Conn, name: str) -> dict[int, Truth]:
    """Return number → what it is, of the samples of a snapshot."""
    found = {}
    rows = conn.execute(
        "SELECT k.number, i.id, k.sample_key::text, r.url || '/' || f.path, i.frame, pt.patient_id, k.part, k.fold "
        "FROM snapshot s JOIN snapshot_sample k ON k.snapshot_id = s.id JOIN image i ON i.id = k.image_id "
        "JOIN instance n ON n.id = i.instance_id JOIN series se ON se.id = n.series_id JOIN study st ON st.id = se.study_id "
        "JOIN patient pt ON pt.id = st.patient_id JOIN location l ON l.image_id = i.id AND l.preferred JOIN file f ON f.id = l.file_id "
        "JOIN root r ON r.id = f.root_id WHERE s.name = %s",
        [name],
    )
    for number, *rest in rows.fetchall():
        found[number] = Truth(*rest, {}, {}, {})
    drawn = conn.execute(
        "SELECT k.number, k.structure, a.origin, a.label, m.rows, m.columns, m.box_row, m.box_column, m.box_rows, m.box_columns, m.bits "
        "FROM snapshot s JOIN snapshot_mask k ON k.snapshot_id = s.id JOIN pairing p ON p.id = k.pairing_id "
        "JOIN annotation a ON a.id = p.annotation_id LEFT JOIN mask m ON m.pairing_id = p.id WHERE s.name = %s",
        [name],
    )
    for number, structure, origin, label, rows_, columns, *box, bits in drawn.fetchall():
        if number in found:
            found[number].origins[structure] = origin
            if label is not None:
                found[number].labels[structure] = label
            else:
                found[number].masks[structure] = contours.unboxed(rows_, columns, tuple(box), bits)  # type: ignore[arg-type]
    return found


def values(one: Truth, dtype: str = "float32") -> np.ndarray[Any, Any]:
    """Return an image as pydicom says it is, after the modality transform."""
    dataset = dcmread(one.path, force=True)
    if "TransferSyntaxUID" not in dataset.file_meta:
        implicit, _ = dataset.original_encoding
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
    stored = dataset.pixel_array
    if int(dataset.get("NumberOfFrames") or 1) > 1:
        stored = stored[one.frame]
    if "ModalityLUTSequence" in dataset:
        return apply_modality_lut(stored, dataset).astype(np.float64).astype(dtype)  # type: ignore[no-any-return]
    said = dataset
    for groups in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        if dataset.get(groups):
            of_frame = dataset[groups][one.frame if groups.startswith("Per") else 0]
            said = of_frame.PixelValueTransformationSequence[0] if "PixelValueTransformationSequence" in of_frame else said
    slope, intercept = float(said.get("RescaleSlope", 1)), float(said.get("RescaleIntercept", 0))
    return (stored.astype(np.float64) * slope + intercept).astype(dtype)  # type: ignore[no-any-return]


Row = dict[str, Any]  # number, image, masks, present, part, fold, patient, sample_key, origins; cls and labels where there are any


def opened(place: Path, to: str) -> list[Row]:
    """Return what a user's program finds, by h5py or webdataset alone."""
    return _hdf5(place) if to == "hdf5" else _webdataset(place)


def _hdf5(place: Path) -> list[Row]:
    found = []
    with h5py.File(place) as file:
        groups = [file] if "images" in file else [group for group in file.values() if isinstance(group, h5py.Group)]
        structures, labels = list(file.attrs["structures"]), list(file.attrs["labels"])
        classes = json.loads(file["manifest"].asstr()[()])["labels"]
        for group in groups:
            texts = {name: group[name].asstr()[:] for name in ("part", "sample_key")}
            for at in range(len(group["images"])):
                row: Row = {"image": group["images"][at]}
                if structures:
                    row["masks"], row["present"] = group["masks"][at], group["present"][at].tolist()
                    row["origins"] = {
                        name: text for name, text in zip(structures, group["origins"].asstr()[at], strict=True) if text
                    }  # fmt: skip
                if labels:
                    codes = group["labels"][at].tolist()
                    row["labels"] = {name: classes[name][code] for name, code in zip(labels, codes, strict=True) if code >= 0}
                    row["codes"] = codes
                fold = int(group["fold"][at])
                row |= {"number": int(group["number"][at]), "patient": int(group["patient"][at]), "fold": None if fold < 0 else fold}
                row |= {"part": texts["part"][at] or None, "sample_key": texts["sample_key"][at]}
                found.append(row)
    return found


def decoded(tars: list[str]) -> list[dict[str, Any]]:
    """Return all samples of shards, as webdataset itself decodes them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves closing to the garbage collector
        found = list(webdataset.WebDataset(tars, shardshuffle=False).decode())
        gc.collect()
    return found


def _webdataset(place: Path) -> list[Row]:
    tars = sorted(str(path) for path in place.glob("*.tar"))
    labels = json.loads((place / "manifest.json").read_text())["labels"]
    found = []
    for sample in decoded(tars):
        said = sample["json"]
        row: Row = {"image": sample["image.npy"], **{name: said[name] for name in ("number", "patient", "part", "fold", "sample_key")}}
        assert int(sample["__key__"]) == said["number"]
        if "masks.npy" in sample:
            row |= {"masks": sample["masks.npy"], "present": said["present"]}
            row["origins"] = {name: origin for name, origin in said["origins"].items() if name not in labels}
        if labels:
            row["labels"] = said["labels"]
            row["codes"] = [sample["cls"]] if "cls" in sample else None
        found.append(row)
    return found


def bytes_of(place: Path) -> dict[str, bytes]:
    """Return all that an export is."""
    return {str(path.relative_to(place.parent)): path.read_bytes() for path in [place, *place.rglob("*")] if path.is_file()}


def check(rows: list[Row], wanted: dict[int, Truth], structures: list[str], dtype: str = "float32") -> None:
    """Compare each image, each mask, and what is said of them; and that they are all."""
    assert sorted(row["number"] for row in rows) == sorted(wanted)
    for row in rows:
        one = wanted[row["number"]]
        assert row["image"].dtype == dtype and np.array_equal(row["image"], values(one, dtype))
        if structures:
            assert row["masks"].dtype == np.bool_ and row["masks"].shape == (len(structures), *row["image"].shape)
            for structure, mask, present in zip(structures, row["masks"], row["present"], strict=True):
                assert present == (structure in one.masks)
                assert np.array_equal(mask, one.masks[structure]) if present else not mask.any()
            assert row["origins"] == {name: origin for name, origin in one.origins.items() if name in one.masks}
        assert (row["sample_key"], row["part"], row["fold"]) == (one.key, one.part, one.fold)
    patients = {(row["patient"], wanted[row["number"]].patient) for row in rows}
    assert len(patients) == len({number for number, _ in patients}) == len({name for _, name in patients})


@pytest.mark.parametrize("to", FORMS)
@pytest.mark.parametrize("dtype", exporting.DTYPES)
def test_bit_for_bit(frozen: str, conn: Conn, export: Export, tmp_path: Path, to: str, dtype: str) -> None:
    """What h5py and webdataset give is pydicom's pixels, the catalog's masks, part, key and origin of each sample, in order of number."""
    done = export(frozen, tmp_path / PLACES[to], to, dtype=dtype)
    assert done.complete and not done.problems
    wanted = truth(conn, frozen)
    rows = opened(tmp_path / PLACES[to], to)
    check(rows, wanted, ["inner", "outer"], dtype)
    assert [row["number"] for row in rows] == sorted(wanted) == list(range(done.samples))
    # Patients count up from 0 in the order in which they come first.
    assert list(dict.fromkeys(row["patient"] for row in rows)) == [0, 1, 2]
    assert {one.part for one in wanted.values()} == {"train", "val"}


@pytest.mark.parametrize("to", FORMS)
def test_as_a_feed_gives_it(frozen: str, conn: Conn, export: Export, tmp_path: Path, to: str) -> None:
    """Images, masks and which are present are those of a Feed over the same structures, bit for bit."""
    export(frozen, tmp_path / PLACES[to], to)
    rows = {row["sample_key"].replace("-", ""): row for row in opened(tmp_path / PLACES[to], to)}
    with Feed(structures=["inner", "outer"], require="any", include_flagged=True, shuffle=False, batch_size=4) as feed:
        for batch in feed.epoch():
            for key, image, masks, present in zip(batch.sample_keys, batch.images, batch.masks, batch.present, strict=True):
                row = rows.pop(bytes(key).hex(), None)
                if row is not None:
                    assert np.array_equal(row["image"], image) and np.array_equal(row["masks"], masks)
                    assert row["present"] == present.tolist()
    assert not rows


@pytest.mark.parametrize("to", FORMS)
def test_digest_inside(frozen: str, conn: Conn, export: Export, tmp_path: Path, to: str) -> None:
    """The snapshot's name and digest, and what was asked for, stand in the export; whom it is of does not."""
    place = tmp_path / PLACES[to]
    done = export(frozen, place, to, part="train")
    sha256 = conn.execute("SELECT encode(sha256, 'hex') FROM snapshot").fetchone()[0]  # type: ignore[index]
    assert done.sha256 == sha256
    if to == "hdf5":
        with h5py.File(place) as file:
            assert (file.attrs["snapshot"], file.attrs["sha256"]) == (frozen, sha256)
            manifest = json.loads(file["manifest"].asstr()[()])
    else:
        manifest = json.loads((place / "manifest.json").read_text())
        for sample in decoded([str(place / "shard-000000.tar")]):
            assert sample["json"]["snapshot_sha256"] == sha256
    assert (manifest["snapshot"], manifest["sha256"], manifest["part"], manifest["dtype"]) == (frozen, sha256, "train", "float32")
    everything = b"".join(bytes_of(place).values())
    uids = conn.execute("SELECT sop_instance_uid FROM instance UNION SELECT study_instance_uid FROM study").fetchall()
    paths = conn.execute("SELECT url FROM root UNION SELECT path FROM file").fetchall()
    for text in ["SYN0001", "SC-SYN", *(text for (text,) in uids + paths)]:
        assert text.encode() not in everything


def test_parts_and_folds(ingested: str, db: Database, conn: Conn, export: Export, tmp_path: Path) -> None:
    """A part alone, and of folds train:0 and val:0; a patient has the same number in all; what the snapshot has not is refused."""
    splits.create(db, "s", ratios={"train": 1.0}, folds=3, seed=1)
    snapshots.create(db, "folded", split="s", structures=["inner"])
    wanted = truth(conn, "folded")
    everything = {}
    for part, fits in (("train", lambda fold: True), ("train:0", lambda fold: fold != 0), ("val:0", lambda fold: fold == 0)):
        place = tmp_path / f"{part.replace(':', '-')}.h5"
        assert export("folded", place, "hdf5", part=part).complete
        rows = opened(place, "hdf5")
        check(rows, {number: one for number, one in wanted.items() if fits(one.fold)}, ["inner"])
        for row in rows:
            assert everything.setdefault(row["number"], row["patient"]) == row["patient"]
    for part in ("test", "val:3", "s/train", "/"):
        with pytest.raises(UsageError, match="part"):
            export("folded", tmp_path / "none.h5", "hdf5", part=part)
    snapshots.create(db, "whole", structures=["inner"])
    with pytest.raises(UsageError, match="without --split"):
        export("whole", tmp_path / "none.h5", "hdf5", part="train")
    assert not (tmp_path / "none.h5").exists() and not (tmp_path / "none.h5.part").exists()


@pytest.mark.parametrize("to", FORMS)
def test_several_shapes_and_labels(database_url: str, db: Database, conn: Conn, export: Export, tmp_path: Path, to: str) -> None:
    """In HDF5 a group a shape; labels are codes, by number where classes are numbers, with the classes in the manifest."""
    studies = tmp_path / "root" / "studies"
    synthetic.write_studies(studies, patients=1, slices=2, phases=2, size=40, seed=3)
    synthetic.write_studies(tmp_path / "other", patients=1, slices=2, phases=2, size=48, seed=4)
    take_in(db, studies)
    take_in(db, tmp_path / "other")
    digits = tmp_path / "digits"
    digits.mkdir()
    pixels = np.arange(12 * 5 * 7, dtype=np.uint8).reshape(12, 5, 7)
    (digits / "train-images-idx3-ubyte").write_bytes(struct.pack(">HBB3I", 0, 8, 3, *pixels.shape) + pixels.tobytes())
    (digits / "train-labels-idx1-ubyte").write_bytes(struct.pack(">HBBI", 0, 8, 1, 12) + bytes(range(12)))
    take_in(db, digits)
    snapshots.create(db, "mixed")
    place = tmp_path / PLACES[to]
    done = export("mixed", place, to, **({"shard": 3} if to == "webdataset" else {}))
    wanted, rows = truth(conn, "mixed"), opened(place, to)
    assert set(done.shapes) == {"5×7", "40×40", "48×48"} and done.labels == ["label"] and done.structures == ["inner", "outer"]
    drawn = [row for row in rows if not wanted[row["number"]].labels]
    check(drawn, {number: one for number, one in wanted.items() if not one.labels}, ["inner", "outer"])
    labelled = [row for row in rows if wanted[row["number"]].labels]
    assert len(labelled) == 12
    for row in labelled:
        one = wanted[row["number"]]
        assert np.array_equal(row["image"], pixels[one.frame].astype(np.float32)) and not row["masks"].any()
        assert row["labels"] == one.labels == {"label": str(one.frame)} and row["codes"] == [one.frame]
    if to == "hdf5":
        with h5py.File(place) as file:
            assert {name for name in file if isinstance(file[name], h5py.Group)} == {"5x7", "40x40", "48x48"}


def test_images_alone(ingested: str, db: Database, conn: Conn, export: Export, tmp_path: Path) -> None:
    """A snapshot without structures is exported without masks; a million pixels of nothing are not written."""
    snapshots.create(db, "plain", images=True, where="patient = 'SYN0001'")
    for to in FORMS:
        export("plain", tmp_path / PLACES[to], to)
        rows = opened(tmp_path / PLACES[to], to)
        wanted = truth(conn, "plain")
        assert len(rows) == 16
        assert rows == [] or "masks" not in rows[0] or any(one.masks for one in wanted.values())
        structures = sorted({name for one in wanted.values() for name in one.masks})
        check(rows, wanted, structures)


def test_same_bytes(frozen: str, export: Export, tmp_path: Path) -> None:
    """The same snapshot gives the same bytes, whenever and with however many processes; a tar holds no time, user or process."""
    for to in FORMS:
        first, second = tmp_path / "1" / PLACES[to], tmp_path / "2" / PLACES[to]
        for place in (first, second):
            place.parent.mkdir(exist_ok=True)
            export(frozen, place, to, **({"shard": 4} if to == "webdataset" else {}))
        assert bytes_of(first) == bytes_of(second)
    for path in (tmp_path / "1" / "made").glob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                assert (member.mtime, member.uid, member.gid, member.uname, member.gname, member.mode) == (0, 0, 0, "", "", 0o644)


class Dead(BaseException):
    """Stands for kill -9: nothing that is written to tidy up after an error may count on being run."""


@pytest.mark.parametrize("to", FORMS)
def test_ended_anywhere(frozen: str, export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str) -> None:
    """Ended after any of its writes, it is under no final name, and the same command makes it the bytes that it would have been."""
    monkeypatch.setattr(destinations, "ROWS_AT_ONCE", 4)
    options = {"shard": 4} if to == "webdataset" else {}
    whole = tmp_path / "whole" / PLACES[to]
    whole.parent.mkdir()
    export(frozen, whole, to, **options)
    wanted = {name: hashlib.sha256(data).digest() for name, data in bytes_of(whole).items()}
    system = {name: getattr(os, name) for name in ("pwrite", "fsync", "replace", "unlink")}
    if to == "webdataset":
        system["addfile"] = tarfile.TarFile.addfile
    left = -1

    def dying(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            nonlocal left
            if left == 0:
                raise Dead
            left -= left > 0
            return system[name](*arguments, **keywords)

        return call

    for name in system:
        monkeypatch.setattr(*((tarfile.TarFile, name) if name == "addfile" else (os, name)), dying(name))
    ends = 0
    for after in range(1, 400, 4):
        place = tmp_path / "ended" / PLACES[to]
        shutil.rmtree(place.parent, ignore_errors=True)
        place.parent.mkdir()
        left = after
        try:
            export(frozen, place, to, **options)
        except Dead:
            ends += 1
        else:
            assert left >= 0
            break
        finally:
            left = -1
        assert not (place if to == "hdf5" else place / "manifest.json").exists()
        done = export(frozen, place, to, **options)
        assert done.complete
        found = {name: hashlib.sha256(data).digest() for name, data in bytes_of(place).items()}
        assert found == wanted, f"ended after {after} calls"
        assert sorted(path.name for path in place.parent.iterdir()) == [place.name]
    assert ends > 10


# Stops itself whenever some more is written, and waits there to be killed, while its reading process goes on with one more task: on no
# machine it comes to its end before it is killed.
STOPPING = """
import os, signal
from catalog import cli, exporting

def stopping(*given, write=exporting._write):
    *rest, progress = given
    def told(done, total):
        progress(done, total)
        os.kill(os.getpid(), signal.SIGSTOP)
    return write(*rest, told)

exporting._write, exporting.TASKS_AT_ONCE = stopping, 2
cli.main()
"""


def test_killed(database_url: str, db: Database, conn: Conn, tmp_path: Path, catalog: Callable[..., Any]) -> None:
    """Killed by -9 again and again, the same command goes on with what is not there yet, and ends with the bytes of one that was not."""
    studies = tmp_path / "studies"
    synthetic.write_studies(studies, patients=1, slices=15, phases=20, size=40, seed=5)
    take_in(db, studies)
    snapshots.create(db, "all", images=True)
    for to in FORMS:
        options = ["--shard", "10"] if to == "webdataset" else []
        whole, place = tmp_path / "whole" / PLACES[to], tmp_path / "killed" / PLACES[to]
        for path in (whole, place):
            path.parent.mkdir(exist_ok=True)
        exporting.export(db, "all", whole, to=to, shard=10 if to == "webdataset" else None)
        for _ in range(2):
            before = written(place, to)
            command = [sys.executable, "-c", STOPPING, "export", "all", str(place), "--to", to, "--jobs", "1", *options]
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
                os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
                process.send_signal(signal.SIGKILL)
                said = process.communicate()  # to its end, which comes with that of the process that read for it
            assert process.returncode == -signal.SIGKILL, said
            assert written(place, to) > before
            assert not (place if to == "hdf5" else place / "manifest.json").exists()
        ended = catalog("export", "all", place, "--to", to, "--json", "--jobs", 1, *options)
        assert ended.returncode == 0, ended.stderr
        told = json.loads(ended.stdout)
        assert told["complete"] and told["there"] > 0
        assert bytes_of(place) == bytes_of(whole)
    check(opened(place, to), truth(conn, "all"), ["inner", "outer"])


def written(place: Path, to: str) -> int:
    """Return how many shards, or samples, of an unfinished export are there."""
    if to == "webdataset":
        return len(list(place.glob("*.tar")))
    with contextlib.suppress(OSError), h5py.File(place.with_name(place.name + ".part"), locking=False) as file:
        return int(np.count_nonzero(file["sample_key"][:]))
    return 0


@pytest.mark.parametrize("to", FORMS)
def test_another_is_refused(frozen: str, db: Database, export: Export, tmp_path: Path, to: str) -> None:
    """Another snapshot, part, dtype or shard, and anything that is no export, is refused in one line, and what is there stays."""
    place = tmp_path / PLACES[to]
    export(frozen, place, to, part="train")
    snapshots.create(db, "second", structures=["inner"])
    before = bytes_of(place)
    others: list[tuple[str, dict[str, Any]]] = [
        ("second", {}),
        (frozen, {}),
        (frozen, {"part": "val"}),
        (frozen, {"part": "train", "dtype": "float64"}),
    ]
    if to == "webdataset":
        others.append((frozen, {"part": "train", "shard": 1}))
    for dry_run in (True, False):
        for name, options in others:
            with pytest.raises(UsageError, match="give another place") as caught:
                export(name, place, to, dry_run=dry_run, **options)
            assert "\n" not in str(caught.value)
    assert bytes_of(place) == before
    again = export(frozen, place, to, part="train")
    assert again.complete and again.there == again.samples and bytes_of(place) == before
    strange = tmp_path / f"strange{place.suffix}"
    if to == "hdf5":
        strange.write_bytes(b"a user's own")
    else:
        strange.mkdir()
        (strange / "thesis.txt").write_bytes(b"a user's own")
    with pytest.raises(UsageError, match="holds no export"):
        export(frozen, strange, to)
    assert list(bytes_of(strange).values()) == [b"a user's own"]


def test_names_and_options(frozen: str, export: Export, tmp_path: Path) -> None:
    """An unknown snapshot, a file of another suffix, shards of an HDF5 file: each is one line of what to do."""
    for name, place, to, options, told in (
        ("none", "a.h5", "hdf5", {}, "catalog snapshot list"),
        (frozen, "a.tar", "hdf5", {}, ".h5 or .hdf5"),
        (frozen, "a.h5", "hdf5", {"shard": 5}, "--shard"),
        (frozen, "a.h5", "hdf5", {"dtype": "int16"}, "--dtype"),
    ):
        with pytest.raises(UsageError, match=told):
            export(name, tmp_path / place, to, **options)
    assert not list(tmp_path.glob("a*"))


def test_dry_run(frozen: str, say: Callable[..., Ended], tmp_path: Path) -> None:
    """Says how much would be written, and writes nothing."""
    for to in FORMS:
        ended = say("export", frozen, tmp_path / PLACES[to], "--to", to, "--dry-run", "--json")
        assert ended.returncode == 0 and "nothing was written" in ended.stderr
        said = json.loads(ended.stdout)
        assert said["samples"] and said["bytes"] == said["samples"] * 64 * 64 * (4 + 2) and not said["complete"]
    assert not list(tmp_path.glob("made*"))


@pytest.mark.parametrize("to", FORMS)
def test_cannot_be_written(frozen: str, export: Export, to: str) -> None:
    """Where nothing can be written the system's reason is said of the place that was asked for, not of a file beside it."""
    place = Path("/proc", PLACES[to])
    with pytest.raises(OSError, match=r"No such file or directory|Permission denied") as refused:
        export(frozen, place, to)
    assert refused.value.filename == str(place) and refused.value.strerror == os.strerror(refused.value.errno or 0)


def test_folder_that_cannot_be_written(frozen: str, export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a folder for shards that is there and takes no file the folder is named."""
    open_it = Path.open

    def refusing(path: Path, *given: Any, **options: Any) -> Any:
        if path.parent == tmp_path:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return open_it(path, *given, **options)

    monkeypatch.setattr(Path, "open", refusing)
    with pytest.raises(OSError, match="Read-only file system") as refused:
        export(frozen, tmp_path, "webdataset")
    assert refused.value.filename == str(tmp_path)


@pytest.mark.parametrize("to", FORMS)
def test_other_pixels(
    database_url: str, db: Database, studies: Path, export: Export, say: Callable[..., Ended], conn: Conn, tmp_path: Path, to: str
) -> None:
    """A changed or missing pixel is named by its sample, exit 4, and nothing is under a final name; a file only touched is exported."""
    folder = tmp_path / "studies"
    shutil.copytree(studies, folder)
    take_in(db, folder)
    snapshots.create(db, "one", structures=["inner"])
    wanted = truth(conn, "one")
    paths = [Path(one.path) for one in wanted.values()]
    ids = [one.sample_id for one in wanted.values()]
    before = paths[0].read_bytes()
    paths[0].write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    paths[1].rename(tmp_path / "away")
    os.utime(paths[2])
    place = tmp_path / PLACES[to]
    options = ["--shard", "1"] if to == "webdataset" else []
    ended = say("export", "one", place, "--to", to, *options)
    assert ended.returncode == 4
    lines = ended.stderr.splitlines()
    assert {line.split(":")[1] for line in lines[:2]} == {f" sample {ids[0]}", f" sample {ids[1]}"}
    assert len(lines) == 3 and "2 samples could not be exported" in lines[2] and str(folder) not in ended.stderr
    assert not (place if to == "hdf5" else place / "manifest.json").exists()
    # stdout says no digest of what is not there whole, and as many samples as the same command does not make again
    whole = 0 if to == "hdf5" else len(wanted) - 2  # one block of rows; tars of one sample
    where = f"{place}.part" if to == "hdf5" else place
    assert ended.stdout == f"{where}: unfinished: {whole} of {len(wanted)} samples written\n"
    again = json.loads(say("export", "one", place, "--to", to, *options, "--json").stdout)
    assert (again["there"], again["written"], again["complete"]) == (whole, whole, False)
    paths[0].write_bytes(before)
    (tmp_path / "away").rename(paths[1])
    ended = say("export", "one", place, "--to", to, *options)
    assert ended.returncode == 0, ended.stderr
    check(opened(place, to), wanted, ["inner"])


def test_other_rows(frozen: str, conn: Conn, export: Export, tmp_path: Path) -> None:
    """A mask whose row was changed behind the catalog's back is not exported under the old digest."""
    [(sample_id, pairing)] = conn.execute(
        "SELECT k.image_id, m.pairing_id FROM snapshot_sample k JOIN snapshot_mask m USING (snapshot_id, number) ORDER BY k.number LIMIT 1"
    ).fetchall()
    conn.execute("UPDATE mask SET bits = set_byte(bits, 0, get_byte(bits, 0) # 64) WHERE pairing_id = %s", [pairing])
    for to in FORMS:
        done = export(frozen, tmp_path / PLACES[to], to)
        assert [(one.sample_id, one.code) for one in done.problems] == [(sample_id, "changed")] and not done.complete


@pytest.mark.parametrize("to", FORMS)
def test_erased_and_revoked(
    frozen: str, db: Database, conn: Conn, export: Export, say: Callable[..., Ended], tmp_path: Path, to: str
) -> None:
    """Who withdrew consent is left out, and who was erased; it is said; an export made before is refused from then on, exit 4."""
    old = tmp_path / "old" / PLACES[to]
    old.parent.mkdir()
    export(frozen, old, to)
    wanted = truth(conn, frozen)
    flags.withdraw(db, "SYN0002", reason="asked")
    ended = say("export", frozen, tmp_path / PLACES[to], "--to", to)
    assert ended.returncode == 0, ended.stderr
    gone = {number for number, one in wanted.items() if one.patient == "SYN0002"}
    assert gone and f"{len(gone)} samples were revoked and left out" in ended.stderr
    check(opened(tmp_path / PLACES[to], to), {number: one for number, one in wanted.items() if number not in gone}, ["inner", "outer"])
    assert say("export", frozen, old, "--to", to).returncode == 4
    assert say("patient", "erase", "SYN0003", "--reason", "asked").returncode == 0
    ended = say("export", frozen, tmp_path / PLACES[to], "--to", to)
    assert ended.returncode == 4 and "erased" in ended.stderr
    ended = say("export", frozen, tmp_path / f"new-{PLACES[to]}", "--to", to)
    assert ended.returncode == 0 and "erased and left out" in ended.stderr
    left = {number: one for number, one in truth(conn, frozen).items() if number not in gone}
    assert {one.patient for one in left.values()} == {"SYN0001"}
    check(opened(tmp_path / f"new-{PLACES[to]}", to), left, ["inner", "outer"])


def test_revoked_meanwhile(frozen: str, db: Database, conn: Conn, export: Export, tmp_path: Path) -> None:
    """Consent withdrawn while it is written: nothing gets its final name."""
    for to in FORMS:
        withdrawn = False

        def withdraw(done: int, total: int) -> None:
            nonlocal withdrawn
            if not withdrawn:
                withdrawn = True
                flags.withdraw(db, "SYN0001", reason="asked")

        with pytest.raises(DriftError, match="delete what was written"):
            export(frozen, tmp_path / PLACES[to], to, progress=withdraw)
        assert not (tmp_path / "made.h5").exists() and not (tmp_path / "made" / "manifest.json").exists()
        flags.reinstate(db, "SYN0001", reason="asked again")


def test_one_at_a_time(frozen: str, export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While another export writes there, a second one is refused and touches nothing."""
    for to in FORMS:
        place = tmp_path / PLACES[to]
        with monkeypatch.context() as patch, contextlib.suppress(Dead):
            patch.setattr(shards, "write", lambda tasks: (_ for _ in ()).throw(Dead()))
            export(frozen, place, to)
        locked = place.with_name("made.h5.part") if to == "hdf5" else place
        before = bytes_of(locked)
        fd = os.open(locked, os.O_RDONLY)
        fcntl.flock(fd, fcntl.LOCK_EX)
        with pytest.raises(CatalogError, match="another export"):
            export(frozen, place, to)
        assert bytes_of(locked) == before
        os.close(fd)
        assert export(frozen, place, to).complete


def test_no_room(frozen: str, export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it would not fit, nothing is written, and it says how much is wanted."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    for to in FORMS:
        with pytest.raises(CatalogError, match="are free"):
            export(frozen, tmp_path / PLACES[to], to)


def test_a_process_that_dies(frozen: str, database_url: str, tmp_path: Path) -> None:
    """A decoder that takes its process with it: one line that names the samples, and what was written stays."""
    with database.open_database(database_url) as db, pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "processes", processes.processes)
        patch.setattr(shards, "write", _die)
        with pytest.raises(CatalogError, match=r"samples \d+ to \d+ died"):
            exporting.export(db, frozen, tmp_path / "made.h5", to="hdf5")
        patch.undo()
        assert exporting.export(db, frozen, tmp_path / "made.h5", to="hdf5", jobs=1).complete


def _die(tasks: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def test_without_h5py(frozen: str, export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where h5py is not installed, one line says what to install; webdataset needs nothing."""
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(CatalogError, match=r"pip install 'scanfeed\[hdf5\]'"):
        export(frozen, tmp_path / "made.h5", "hdf5")
    monkeypatch.setitem(sys.modules, "webdataset", None)
    assert export(frozen, tmp_path / "made", "webdataset").complete


def test_modality_lut_and_rescale(database_url: str, db: Database, conn: Conn, export: Export, tmp_path: Path) -> None:
    """Values of a Modality LUT, of slope and intercept, of unused high bits and of big endian are pydicom's."""
    folder = tmp_path / "odd"
    folder.mkdir()
    pixels = np.arange(24, dtype=np.uint16).reshape(4, 6)
    image_file(
        folder / "lut.dcm",
        pixels,
        ModalityLUTSequence=lut(0, 0, 16, np.arange(65536, dtype="<u2")[::-1].tobytes(), raw=True),
        SOPInstanceUID="1.1",
    )
    image_file(folder / "scaled.dcm", pixels + 100, RescaleSlope="0.1", RescaleIntercept="-1024.3", SOPInstanceUID="1.2")
    image_file(folder / "big.dcm", pixels + 200, syntax=ExplicitVRBigEndian, RescaleSlope="3", RescaleIntercept="0.5", SOPInstanceUID="1.3")
    take_in(db, folder)
    snapshots.create(db, "odd", images=True)
    for to in FORMS:
        export("odd", tmp_path / PLACES[to], to)
        rows = opened(tmp_path / PLACES[to], to)
        assert len(rows) == 3
        check(rows, truth(conn, "odd"), [])


def test_real_files(database_url: str, db: Database, conn: Conn, export: Export, tmp_path: Path) -> None:
    """All grey images of the real DICOM files, compressed ones too, are those that pydicom decodes; colour is refused with the remedy."""
    if not (DATA / "dicom").is_dir():
        pytest.skip(f"no DICOM files in {DATA}; set SCANFEED_DATA")
    take_in(db, DATA / "dicom")
    snapshots.create(db, "all", images=True)
    with pytest.raises(CatalogError, match="samples_per_pixel > 1") as caught:
        export("all", tmp_path / "all.h5", "hdf5")
    where = str(caught.value).split('"')[1]
    snapshots.create(db, "grey", images=True, where=where + " AND path NOT LIKE '%.nii.gz'")
    for to in FORMS:
        done = export("grey", tmp_path / PLACES[to], to)
        assert done.complete and len(done.shapes) > 5
        check(opened(tmp_path / PLACES[to], to), truth(conn, "grey"), sorted(done.structures))


def test_real_studies(sunnybrook: Path, database_url: str, db: Database, conn: Conn, export: Export, tmp_path: Path) -> None:
    """Of the two real studies every image and every mask, 36 inner and 18 outer ones."""
    take_in(db, sunnybrook)
    snapshots.create(db, "heart", structures=["inner", "outer"])
    for to in FORMS:
        export("heart", tmp_path / PLACES[to], to)
        rows = opened(tmp_path / PLACES[to], to)
        assert np.sum([row["present"] for row in rows], axis=0).tolist() == [36, 18]
        check(rows, truth(conn, "heart"), ["inner", "outer"])
