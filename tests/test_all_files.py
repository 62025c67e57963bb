"""All 730 shared files in one ingest: which layout took what, every value as the feed gives it, every broken file in its own words."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import os
import sys
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psycopg
import pytest
from numpy.typing import NDArray
from psycopg import sql
from pydicom import dcmread

from catalog import database, dicom, ingest
from catalog.ingest import Summary
from loaderd import Feed, FeedError, decode
from loaderd.decode import Decoder, Sample
from loaderd.definitions import Definition
from loaderd.ring import Layout, create
from loaderd.work import work_query
from tests.conftest import DATA, _create, _named

pytest.importorskip("nibabel", reason="needs the extra `nifti`")
pytest.importorskip("pylibjpeg", reason="needs the extra `codecs`")
pytest.importorskip("gdcm", reason="needs the extra `codecs`")
pytestmark = pytest.mark.skipif(not (DATA / "manifest.csv").is_file(), reason=f"no manifest.csv under {DATA}; set SCANFEED_DATA")

CT = "dicom/transfer-syntax-ctimage/CTImage.dcm"
# What a radiology engineer would say of each file that cannot be used: code and beginning of the message.
BROKEN = {
    "dicom/broken/JPEG2000-embedded-sequence-delimiter.dcm": (
        "unreadable",
        "a compressed frame says of itself that it is 1024×3722445056×1",
    ),
    "dicom/broken/MR_truncated.dcm": (
        "truncated",
        "(7FE0,0010) Pixel Data has 8130 bytes where 1 frame(s) of 64×64×1 at 16 bits take 8192",
    ),
    "dicom/broken/UN_sequence.dcm": ("no-pixels", "(7FE0,0010) Pixel Data is missing though it says that it is CT Image Storage"),
    "dicom/broken/badVR.dcm": ("unreadable", "(0028,0008) Number of Frames is not a whole number"),
    "dicom/broken/empty_charset_LEI.dcm": ("no-pixels", "(7FE0,0010) Pixel Data is missing, and (0008,0016) SOP Class UID too"),
    "dicom/broken/meta_missing_tsyntax.dcm": ("unreadable", "(0028,0100) Bits Allocated is missing"),
    "dicom/broken/nested_priv_SQ.dcm": ("unreadable", "(0028,0100) Bits Allocated is missing"),
    "dicom/broken/no_meta.dcm": ("not-dicom", "neither `DICM` at byte 128 nor a DICOM element at its start"),
    "dicom/broken/no_meta_group_length.dcm": ("no-pixels", "(7FE0,0010) Pixel Data is missing though it says that it is RT Image"),
    "dicom/broken/rtplan_truncated.dcm": ("truncated", "it ends within (300A,00B0)"),
    "dicom/charset/chrSQEncoding.dcm": ("no-pixels", "(7FE0,0010) Pixel Data is missing though it says that it is MR Image Storage"),
    "dicom/pydicom/JPEG-lossy.dcm": ("unreadable", "its pixels cannot be decoded as JPEG Extended (Process 2 and 4)"),
    # A segmentation of three frames of which somebody cut the pixels to one and left the other two frames' groups in.
    "dicom/pydicom/liver_1frame.dcm": ("unreadable", "(5200,9230) Per-Frame Functional Groups Sequence has 3 items for 1 frames"),
    f"{CT}_JPEGProcess10_12TransferSyntax_1.2.840.10008.1.2.4.55.dcm": ("no-decoder", "(0002,0010) Transfer Syntax UID is JPEG Full"),
    f"{CT}_JPEGProcess6_8TransferSyntax_1.2.840.10008.1.2.4.53.dcm": ("no-decoder", "(0002,0010) Transfer Syntax UID is JPEG Spectral"),
}
NO_DECODER = {path for path, (code, _) in BROKEN.items() if code == "no-decoder"}
# Their headers are whole, so an ingest that looks at no pixels finds nothing wrong with them.
DAMAGED_PIXELS = {"dicom/broken/JPEG2000-embedded-sequence-delimiter.dcm", "dicom/pydicom/JPEG-lossy.dcm"}
# Each claims the UID of a damaged one, which without hashes is taken for another image: so their keys hold more than the UID.
SAME_UID = {"dicom/pydicom/JPEG2000.dcm", "dicom/pydicom/JPGExtended.dcm"}
# Structure sets that refer to images that are not here.
WITHOUT_IMAGES = {"rtstruct/pydicom-rtstruct-no-preamble.dcm": 3, "rtstruct/rt-utils/invalid_reference_rt.dcm": 4}


class Ingested(NamedTuple):
    """A database with all files."""

    url: str
    name: str  # of the database, to copy
    summary: Summary


def _ingested(server_url: str, template: str, home: Path, hashing: Any) -> Iterator[Ingested]:
    name = f"all_{uuid.uuid4().hex[:8]}"
    _create(server_url, name, template)
    url = _named(server_url, name)
    try:
        with pytest.MonkeyPatch.context() as patch, database.open_database(url) as made:
            patch.setenv("CATALOG_HOME", str(home))
            summary = ingest.ingest(made, DATA, hashing=hashing)
        yield Ingested(url, name, summary)
    finally:
        with psycopg.connect(server_url, autocommit=True) as conn:
            conn.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.fixture(scope="module")
def full(server_url: str, template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ingested]:
    """All files, hashed: not to be changed."""
    yield from _ingested(server_url, template, tmp_path_factory.mktemp("full"), "full")


@pytest.fixture(scope="module")
def bare(server_url: str, template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ingested]:
    """All files, without any hash: not to be changed."""
    yield from _ingested(server_url, template, tmp_path_factory.mktemp("bare"), "none")


def ask(url: str, query: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(url, autocommit=True) as conn:
        return conn.execute(query).fetchall()


def manifest() -> dict[str, dict[str, str]]:
    with (DATA / "manifest.csv").open(newline="", encoding="utf-8") as file:
        return {row["path"]: row for row in csv.DictReader(file)}


def work(conn: psycopg.Connection[Any], nth: int) -> list[Sample]:
    """Return the daemon's own rows for all images, each from its nth location; a table that hides `epoch_order` holds their order."""
    conn.execute("UPDATE location SET preferred = false WHERE preferred")
    conn.execute(
        "UPDATE location l SET preferred = true FROM ("
        "SELECT image_id, file_id, row_number() OVER (PARTITION BY image_id ORDER BY file_id) AS n FROM location) o "
        "WHERE (l.image_id, l.file_id, %s::bigint) = (o.image_id, o.file_id, o.n)",
        [nth],
    )
    ids = [number for (number,) in conn.execute("SELECT image_id FROM location WHERE preferred ORDER BY image_id")]
    conn.execute("CREATE TEMP TABLE epoch_order (epoch_id bigint, part integer, sample_ids bigint[], annotation_ids bigint[])")
    for part in range(0, len(ids), 1024):
        conn.execute("INSERT INTO pg_temp.epoch_order VALUES (0, %s, %s, '{}')", [part // 1024, ids[part : part + 1024]])
    asked = {"epoch": 0, "first": 0, "end": len(ids), "part": 1024, "positions": f"{{[0,{len(ids)})}}"}
    rows = conn.execute(work_query(Definition()), asked).fetchall()
    conn.rollback()
    assert len(rows) == len(ids)
    return [Sample.parse(json.loads(row)) for row, _ in rows]


def all_samples(url: str) -> dict[str, list[Sample]]:
    """Return path → its samples in the order of its frames, at every location of every image."""
    found: dict[str, list[Sample]] = defaultdict(list)
    with psycopg.connect(url) as conn:
        (most,) = conn.execute("SELECT max(n) FROM (SELECT count(*) AS n FROM location GROUP BY image_id) x").fetchone() or (0,)
        for nth in range(1, most + 1):
            for sample in work(conn, nth):
                found[sample.path].append(sample)
    return {path: sorted(samples, key=lambda sample: sample.frame) for path, samples in found.items()}


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    layout = Layout(1, 0, 1, 1, "float32", 1)
    fd = create(layout)
    made = Decoder(fd, os.open(os.devnull, os.O_RDONLY), layout, blank=False)
    os.close(fd)
    yield made
    made.close()


def read(decoder: Decoder, sample: Sample, dtype: str = "float32") -> tuple[NDArray[Any], Any]:
    """Return an image as a worker reads it, and "fast", None or what is wrong."""
    image = np.full((sample.rows, sample.columns), np.nan, dtype)
    changed: list[list[Any]] = []
    problem = decoder._read(sample, image, changed)
    assert not changed
    return image, problem


def test_which_layout_took_what(full: Ingested, capsys: pytest.CaptureFixture[str]) -> None:
    """One ingest, no option: four layouts share the tree; what is no image, contour, volume or table is left over, and nothing else."""
    summary, rows = full.summary, manifest()
    assert summary.layout == "sunnybrook+nifti+idx+dicom"
    assert [chosen.partition(" (")[0] for chosen in summary.chosen] == ["sunnybrook", "nifti", "idx", "dicom"]
    assert "sunnybrook/final_data: link.csv" in summary.chosen[0]
    took = dict(ask(full.url, "SELECT path, format FROM file"))
    kinds = Counter((rows[path]["kind"], form) for path, form in took.items())
    assert kinds == {("dicom", "dicom"): 627, ("contour", "contour"): 54, ("nifti", "nifti"): 43, ("idx.gz", "idx"): 2}
    assert set(rows.keys() - took.keys()) == {
        "dicom/dicomdir-tree/DICOMDIR",
        "seg/dcmqi-24x38x3/nrrd/label.nrrd",
        "sunnybrook/final_data/link.csv",
        "sunnybrook/strays/.IM-0001-0048-icontour-manual.txt.swp",
    }
    assert summary.left_over == len([path for path in DATA.rglob("*") if path.is_file()]) - len(took) - 2  # the hidden one, and link.csv
    assert (summary.images, summary.proposed, summary.unpaired) == (11673, 0, 7)
    (counts,) = ask(full.url, "SELECT count(*), count(byte_offset) FROM location")
    with capsys.disabled():
        sys.stdout.write(
            f"\n{summary.files_read} files in {summary.seconds:.1f} s: pydicom read the header of {summary.fell_back} "
            f"({summary.fell_back / kinds['dicom', 'dicom']:.1%} of the DICOM files); {counts[1]} of {counts[0]} locations by offset\n"
        )


def test_every_value_as_the_feed_gives_it(
    full: Ingested, decoder: Decoder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The worker's reader, with the daemon's own rows, gives the manifest's pixels for every grey file, and their values after rescale.

    Each of several files with one image is read, not the preferred one alone. Colour is refused in words; its pixels are right all
    the same through `decode_frame`.
    """
    monkeypatch.setattr(decode, "RETRY_S", 0)
    rows, samples = manifest(), all_samples(full.url)
    dicoms = {path for path, row in rows.items() if row["kind"] == "dicom" and row["decode"] == "ok"}
    objects = {path for (path,) in ask(full.url, "SELECT path FROM file WHERE kind <> 'image' AND format = 'dicom'")}  # SEG
    assert {path for path in samples if rows[path]["kind"] == "dicom"} == dicoms - objects - set(BROKEN)
    assert dicoms & set(BROKEN) == {"dicom/pydicom/liver_1frame.dcm"}
    fast = grey = colour = 0
    for path in sorted(dicoms & samples.keys()):
        row, frames = rows[path], []
        for sample in samples[path]:
            image, problem = read(decoder, replace(sample, slope=1.0, intercept=0.0), "float64")
            if row["photo"] in ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR"):  # of a palette the feed gives the indices, as stored
                assert problem in ("fast", None), (path, problem)
                grey += 1
                fast += problem == "fast"
                values, _ = read(decoder, sample)
                expected = (image * sample.slope + sample.intercept).astype(np.float32)
                np.testing.assert_array_equal(values, expected, err_msg=path)
                if row["slope"] or row["intercept"]:
                    assert (sample.slope, sample.intercept) == (float(row["slope"] or 1), float(row["intercept"] or 0)), path
                frames.append(image)
            else:
                assert isinstance(problem, tuple), path
                code, message = problem
                assert code == "colour", (path, problem)
                assert message == decode.COLOUR
                colour += 1
                frames.append(dicom.decode_frame(DATA / path, sample.frame))
        whole = np.stack(frames) if row["frames"] not in ("", "1") else frames[0]
        stored = whole.astype(np.dtype(row["dtype"]).newbyteorder("<"))
        assert (stored == whole).all()
        assert "x".join(map(str, stored.shape)) == row["shape"], path
        assert (float(stored.min()), float(stored.max())) == (float(row["min"]), float(row["max"])), path
        assert hashlib.sha256(stored.tobytes()).hexdigest()[:16] == row["pixsha"], path
    with capsys.disabled():
        sys.stdout.write(f"\n{grey} grey DICOM images read as fed, {fast} ({fast / grey:.1%}) by offset; {colour} in colour refused\n")


def test_volumes_and_digits_as_the_feed_gives_them(full: Ingested, decoder: Decoder, tmp_path: Path) -> None:
    """Each slice of each NIfTI volume is nibabel's float64 values rounded once, each MNIST digit the published bytes; all by offset.

    A gzip'd file is decompressed into the cache once, however many slices are read.
    """
    import nibabel

    rows, samples = manifest(), all_samples(full.url)
    zipped = {path for path in samples if path.endswith(".gz")}
    volumes = {path for path, row in rows.items() if row["kind"] == "nifti" and "/labels/" not in path}
    assert volumes == {path for path in samples if rows[path]["kind"] == "nifti"}
    for path in sorted(volumes):
        volume: Any = nibabel.load(DATA / path)
        values = volume.get_fdata(dtype=np.float64)
        values = values.reshape(*values.shape[:2], -1, order="F")
        assert len(samples[path]) == values.shape[2]
        for sample in samples[path]:
            image, problem = read(decoder, sample)
            assert problem == "fast", path
            np.testing.assert_array_equal(image, values[:, :, sample.frame].T.astype(np.float32), err_msg=path)
        assert f"{values.min():.6g}" == f"{float(rows[path]['min']):.6g}"
    digits = np.frombuffer(gzip.decompress((DATA / "mnist/t10k-images-idx3-ubyte.gz").read_bytes())[16:], np.uint8).reshape(-1, 28, 28)
    for sample in samples["mnist/t10k-images-idx3-ubyte.gz"]:
        image, problem = read(decoder, sample)
        assert problem == "fast"
        assert (image == digits[sample.frame]).all()
    cached = [path for path in (tmp_path / "home").rglob("*") if path.is_file() and path.stat().st_size > 10_000]
    assert len(cached) == len(zipped)
    labels = ask(full.url, "SELECT frame, label, error_flags FROM sample WHERE kind = 'label' ORDER BY frame")
    published = gzip.decompress((DATA / "mnist/t10k-labels-idx1-ubyte.gz").read_bytes())[8:]
    assert labels == [(frame, str(label), 0) for frame, label in enumerate(published)]


def test_every_broken_file_is_an_error_in_its_own_words(full: Ingested) -> None:
    """Fifteen files cannot be used and say why; the structure sets without their images do; nothing else is an error."""
    errors = ask(full.url, "SELECT path, stage, code, message FROM ingest_error")
    read = {path: (code, message) for path, stage, code, message in errors if stage == "read"}
    assert read.keys() == BROKEN.keys()
    for path, (code, words) in BROKEN.items():
        assert (path, read[path][0], read[path][1][: len(words)]) == (path, code, words)
    assert {(path, code) for path, stage, code, _ in errors if stage != "read"} == {(path, "pair-no-image") for path in WITHOUT_IMAGES}
    states = {path for (path,) in ask(full.url, "SELECT path FROM file WHERE state = 'unreadable'")}
    assert states == BROKEN.keys()
    flags = ask(
        full.url,
        "SELECT f.path, count(*) FROM flag g JOIN annotation a ON a.id = g.annotation_id JOIN file f ON f.id = a.file_id "
        "WHERE g.rule = 'PAIR-NO-IMAGE' AND g.state = 'open' GROUP BY 1",
    )
    assert dict(flags) == WITHOUT_IMAGES


ENCODINGS = """
SELECT s.uid, count(DISTINCT s.instance), count(DISTINCT s.image), count(DISTINCT s.path), count(DISTINCT s.key), bool_or(s.conflict)
FROM (SELECT n.sop_instance_uid AS uid, n.id AS instance, i.id AS image, f.path, i.sample_key AS key,
             EXISTS (SELECT FROM flag g WHERE g.image_id = i.id AND g.rule = 'UID-CONFLICT') AS conflict
      FROM instance n JOIN image i ON i.instance_id = n.id JOIN location l ON l.image_id = i.id JOIN file f ON f.id = l.file_id
      WHERE f.path ~ '^dicom/(transfer-syntax-ctimage/|multiframe/emri_small)') s GROUP BY 1 ORDER BY 4 DESC, 1
"""


def test_encodings_of_one_image_are_one_image(full: Ingested, bare: Ingested) -> None:
    """Ten lossless encodings of the CT are one image in ten places, five of the enhanced MR one instance of ten images; lossy ones are
    images of their own; and no conflict. Without hashes just the same: files that claim one UID are compared when it is met again."""
    for url in (full.url, bare.url):
        found = ask(url, ENCODINGS)
        assert [row[1:] for row in found] == [(1, 1, 10, 1, False), (1, 10, 5, 10, False), *[(1, 1, 1, 1, False)] * 4]


# All that an ingest writes but hashes, and what is known only with them: bits above Bits Stored, keys of images without a UID.
CONTENT = {
    "file": "SELECT path, kind, format, size, mtime_ns, state, read_as, instance_id IS NULL FROM file",
    "image": "SELECT f.path, p.patient_id, original_id, study_instance_uid, study_date, series_instance_uid, series_number, modality, "
    "sop_instance_uid, sop_class_uid, instance_number, number_of_frames, images_in_acquisition, frame_of_reference_uid, i.frame, i.rows, "
    "i.columns, samples_per_pixel, photometric, row_spacing, column_spacing, image_position, image_orientation, position, "
    "slice_thickness, trigger_time, phase, slope, intercept, modality_lut, byte_offset, byte_length, dtype, coding, transfer_syntax_uid, "
    "preferred, i.sample_key = sample_key(sop_instance_uid, i.frame) FROM location l JOIN file f ON f.id = l.file_id "
    "JOIN image i ON i.id = l.image_id JOIN instance n ON n.id = i.instance_id "
    "JOIN series e ON e.id = n.series_id JOIN study s ON s.id = e.study_id JOIN patient p ON p.id = s.patient_id",
    "several": "SELECT array_agg(f.path ORDER BY f.path)::text FROM location l JOIN file f ON f.id = l.file_id GROUP BY l.image_id",
    "annotation": "SELECT f.path, source_key, version, current, r.name, s.name, a.kind, origin, label, points, rings, convention, "
    "polygon_area_px, a.rows, a.columns, box, bits, a.content_hash, refers_to::text FROM annotation a JOIN file f ON f.id = a.file_id "
    "JOIN reader r ON r.id = a.reader_id JOIN structure s ON s.id = a.structure_id",
    "pairing": "SELECT f.path, source_key, n.sop_instance_uid, i.frame, k.path, method, rule, score, p.state, actor, m.bits, m.box_row "
    "FROM pairing p JOIN annotation a ON a.id = p.annotation_id JOIN file f ON f.id = a.file_id JOIN image i ON i.id = p.image_id "
    "JOIN instance n ON n.id = i.instance_id JOIN location l ON l.image_id = i.id AND l.preferred JOIN file k ON k.id = l.file_id "
    "LEFT JOIN mask m ON m.pairing_id = p.id",
    "flag": "SELECT rule, severity, g.state, detail, value, coalesce(f.path, b.path) FROM flag g LEFT JOIN file f ON f.id = g.file_id "
    "LEFT JOIN annotation a ON a.id = g.annotation_id LEFT JOIN file b ON b.id = a.file_id",
    "error": "SELECT path, stage, code, message FROM ingest_error",
}


def test_without_hashes_the_rows_are_the_same(full: Ingested, bare: Ingested) -> None:
    """`--hash none` writes what `--hash full` does less the hashes; it opens no pixels, so what is damaged there alone is not seen yet."""
    for table, query in CONTENT.items():
        hashed, unhashed = (
            Counter(
                row for (row,) in ask(url, f"SELECT t::text FROM ({query}) t") if not any(path in row for path in DAMAGED_PIXELS | SAME_UID)
            )
            for url in (full.url, bare.url)
        )
        assert (table, list(hashed - unhashed), list(unhashed - hashed)) == (table, [], [])
    assert {path for (path,) in ask(bare.url, "SELECT path FROM file WHERE state = 'unreadable'")} == BROKEN.keys() - DAMAGED_PIXELS
    assert ask(bare.url, "SELECT count(*) FROM file WHERE content_hash IS NOT NULL") == [(0,)]
    # Hashed are only those whose UID was met again, and what has none.
    hashed_all = (
        "SELECT count(*) FROM image i JOIN instance n ON n.id = i.instance_id WHERE pixel_hash IS NOT NULL AND sop_instance_uid <> ''"
    )
    assert 0 < ask(bare.url, hashed_all)[0][0] < 100


def test_again_nothing_is_done(full: Ingested, new_database: Callable[..., str]) -> None:
    """A second ingest of the same tree reads only what might go better now, the two files without a decoder, and writes nothing."""
    url = new_database(full.name)
    tables = [table for (table,) in ask(url, "SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY 1")]

    def tuples() -> dict[str, list[Any]]:
        return {table: ask(url, f"SELECT ctid::text, xmin::text, xmax::text FROM {table} ORDER BY 1") for table in tables}

    before = tuples()
    with database.open_database(url) as made:
        summary = ingest.ingest(made, DATA, jobs=1)
    assert summary.files_read == len(NO_DECODER)
    assert summary.standing_errors == full.summary.standing_errors
    assert tuples() == before


def test_colour_is_refused_in_words(full: Ingested, new_database: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A feed of colour images ends with one error that says what they are, not with wrong pixels."""
    monkeypatch.setenv("CATALOG_DATABASE_URL", new_database(full.name))
    with pytest.raises(FeedError) as caught, Feed(where="path LIKE '%/color-px.dcm' OR path LIKE '%SC_rgb%'", batch_size=1) as feed:
        for _ in feed.epoch():
            pass
    assert decode.COLOUR in str(caught.value)


def test_without_a_uid_and_a_hash_two_images_stay_two(
    studies: Path, tmp_path: Path, database_url: str, conn: psycopg.Connection[Any]
) -> None:
    """Two files of one series without a SOPInstanceUID are two images under `--hash none` too: nothing says that they are one."""
    for number in (1, 2):
        dataset = dcmread(studies / "dicoms" / "SYN0001" / f"{number}.dcm")
        dataset.SOPInstanceUID = ""
        dataset.save_as(tmp_path / f"{number}.dcm")
    with database.open_database(database_url) as made:
        ingest.ingest(made, tmp_path, layout="dicom", hashing="none", jobs=1)
    assert conn.execute("SELECT count(*), count(DISTINCT image_id) FROM location WHERE preferred").fetchone() == (2, 2)
