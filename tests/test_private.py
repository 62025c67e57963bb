"""What a catalog knows of people: 18 kinds of identifiers planted wherever one can stand, and a search of all that is written anywhere.

The same folders are taken in twice, plainly and with --pseudonymize, and every command is run on both. A plain catalog holds what the
white list of docs/privacy.md says and nothing else; a pseudonymized one nothing.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import io
import json
import os
import quopri
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import urllib.parse
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psycopg
import pytest
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from catalog import embedded
from tests import identified
from tests.identities import KINDS, NUMBERS, Planted, value
from tests.processes import server_ended
from tests.test_privacy_docs import kept_attributes

KEY = bytes(range(48))

# One process runs all: its file descriptors take what it and its children say, and Python starts once. The processes that commands read
# in are forked from one that has imported what they need: each start anew takes longer than what most of them do. What is drawn as letters
# is noted as it is set, since nothing finds it among pixels.
DRIVER = """
import json, multiprocessing, sys, traceback
from pathlib import Path

import catalog.cli, loaderd.cli
from catalog import overlay, sheet

context = multiprocessing.get_context
multiprocessing.set_forkserver_preload(["catalog.cli", "pydicom.pixels", "scipy.ndimage"])
multiprocessing.get_context = lambda method=None: context("forkserver" if method == "spawn" else method)

letters = open(sys.argv[1], "w", encoding="utf-8", errors="surrogateescape")

def noted(draw, x, y, lines, colour, write=overlay.write):
    print(*lines, sep="\\n", file=letters, flush=True)
    return write(draw, x, y, lines, colour)

overlay.write = sheet.write = noted

def feed(where, **given):
    from loaderd import Feed
    try:
        with Feed(where=where, batch_size=16, run="training", **given) as feed:
            for batch in feed.epoch():
                print(batch.images.shape, batch.sample_ids.tolist(), batch.sample_keys, feed)
            print(feed.state_dict())
    except Exception as error:
        print(type(error).__name__, error)

for command in json.load(sys.stdin):
    print(">", *command[: 2 if len(command) > 1 and command[1].isalpha() else 1], flush=True)
    if command[0] == "feed":
        feed(*command[1:])
        continue
    if command[0] == "damage":
        path = next(Path(command[1]).rglob("2.dcm"))
        path.write_bytes(path.read_bytes()[:-500])
        continue
    sys.argv = command
    try:
        {"catalog": catalog.cli.main, "loaderd": loaderd.cli.main}[command[0]]()
    except SystemExit as ended:
        print("exit code", ended.code, flush=True)
    except BaseException:
        traceback.print_exc()
"""


@dataclass
class Told:
    """All that was written by a catalog of one kind; by where: dump, messages, logs, a file's name."""

    planted: Planted
    said: dict[str, bytes]
    found: dict[str, set[tuple[str, str]]] = field(default_factory=dict)  # in what was searched already

    def places(self, *where: str) -> dict[str, set[str]]:
        """Return the places whose values stand in what is named, with their kinds; without names: in any of it."""
        found: dict[str, set[str]] = defaultdict(set)
        for name in where or self.said:
            if name not in self.found:
                self.found[name] = self.planted.found(self.said[name])
            for kind, place in self.found[name]:
                found[place].add(kind)
        return dict(found)


def commands(folder: Path, out: Path, key: Path | None) -> list[list[str]]:
    """Every command, as a user would give it; those that decide are told no name."""
    ingest = ["--pseudonymize", str(key), "--jobs", "1"] if key else ["--jobs", "1"]
    table, pattern = next((folder / "table").glob("*.csv")), folder / "pattern" / "names.toml"
    dicom = next(path for path in folder.iterdir() if path.name not in ("sunnybrook", "table", "pattern", "nifti"))
    roots = [["catalog", "ingest", str(root)] for root in (dicom, folder / "sunnybrook", folder / "nifti")]
    roots += [
        ["catalog", "ingest", str(folder / "table"), "--table", str(table)],
        ["catalog", "ingest", str(folder / "pattern"), "--pattern", str(pattern)],
    ]
    given = [
        ["status"], ["status", "--json"], ["errors"], ["errors", "--json"], ["runs", "list", "--json"], ["runs", "show", "1"],
        ["runs", "retry", "1", *ingest[:2]], ["root", "list"],
        ["root", "list", "--json"], ["measure", "--jobs", "1"], ["qa", "run"], ["qa", "rules"],
        ["qa", "explain", "PRIVACY-IDENTIFYING"], ["flag", "list"], ["flag", "list", "--json"], ["flag", "show", "1"],
        ["flag", "show", "2", "--json"], ["pair", "list"], ["pair", "list", "--json"], ["pair", "list", "--state", "accepted"],
        ["show", "1", "-o", str(out / "show.png")], ["show", "1", "-o", str(out / "named.png"), "--identify"],
        ["gallery", "-o", str(out / "page"), "--limit", "20", "--jobs", "1"],
        ["gallery", "-o", str(out / "page.html"), "--limit", "20", "--jobs", "1"],
        ["gallery", "-o", str(out / "page.png"), "--limit", "12", "--jobs", "1"],
        ["plot", "areas", "-o", str(out / "areas.svg")], ["plot", "spread", "-o", str(out / "spread.svg")],
        ["plot", "intensities", "-o", str(out / "intensities.svg"), "--jobs", "1"], ["digest", "--json"], ["audit"], ["schema", "--json"],
        ["sql", "select * from sample", "--json"], ["sql", "select * from image_all", "--csv"], ["sql", "select * from annotation_all"],
        ["sql", "select * from private.file_path"], ["sql", "select 1/0 from root"], ["sql", "select patient_id::int from patient"],
        ["split", "create", "parts", "--ratios", "70,30", "--seed", "1"], ["split", "show", "parts", "--json"], ["split", "check", "parts"],
        ["snapshot", "create", "frozen", "--split", "parts", "--include-flagged"], ["snapshot", "list"],
        ["snapshot", "show", "frozen", "--json"], ["snapshot", "verify", "frozen", "--full"],
        ["export", "frozen", str(out / "frozen.h5"), "--to", "hdf5"], ["export", "frozen", str(out / "tars"), "--to", "webdataset"],
        ["interpolate", "--structure", "inner"], ["threshold", "--outer", "inner", "--inner", "pool", "--jobs", "1"],
    ]  # fmt: skip
    after = [
        ["snapshot", "verify", "frozen", "--full"], ["measure", "--jobs", "1"], ["show", "2", "-o", str(out / "gone.png")],
        ["flag", "list", "--json"], ["runs", "undo", "1", "--dry-run"], ["errors"], ["root", "move", "nowhere", str(folder)],
    ]  # fmt: skip
    return [
        *(["catalog", "ingest", *root[2:], "--dry-run", *ingest] for root in roots[:2]),
        *([*root, *ingest] for root in roots),
        *([*root, *ingest, "--json"] for root in roots[:2]),
        *(["catalog", *command] for command in given),
        ["feed", f"rows = {identified.SIZE} and columns = {identified.SIZE}"],
        ["damage", str(dicom)],
        ["feed", f"rows = {identified.SIZE} and columns = {identified.SIZE} and phase is null"],
        ["loaderd", "run", "list"], ["loaderd", "status"], ["loaderd", "stream", "list"], ["loaderd", "audit"],
        *([*root, *ingest] for root in roots[:1]),
        *(["catalog", *command] for command in after),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Planted]:
    """A folder of folders, one a layout."""
    folder, planted = tmp_path_factory.mktemp("trees"), Planted()
    identified.write_dicom(folder / planted("name", "the root's own folder"), planted)
    identified.write_sunnybrook(folder / "sunnybrook", planted)
    identified.write_table(folder / "table", planted)
    identified.write_pattern(folder / "pattern", planted)
    identified.write_nifti(folder / "nifti", planted)
    return folder, planted


def told(trees: tuple[Path, Planted], folder: Path, *, pseudonymize: bool) -> Told:
    """Run everything on a catalog of its own, in an embedded server of its own, and gather what was written."""
    home, out, here, letters = folder / "home", folder / "out", folder / "trees", folder / "letters"
    out.mkdir()
    shutil.copytree(trees[0], here, symlinks=True)  # with the times of files, and one of them is damaged on the way
    key = None
    if pseudonymize:
        key = folder / "key"
        key.touch(0o600)
        key.write_bytes(KEY)
    environment = {name: text for name, text in os.environ.items() if name not in ("CATALOG_DATABASE_URL", "XDG_RUNTIME_DIR")}
    environment["CATALOG_HOME"] = str(home)
    with embedded.use(home) as server:  # else each command would start a server, and end it
        done = subprocess.run(
            [sys.executable, "-c", DRIVER, str(letters)],
            input=json.dumps(commands(here, out, key)).encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=Path(__file__).parent.parent,
            env=environment,
            timeout=500,
            check=False,
        )
        said = {"messages": done.stdout, "dump": dump(server), "letters": letters.read_bytes()}
    assert server_ended(home)  # and has said its last words
    said |= {f"log {path.name}": path.read_bytes() for path in home.rglob("*.log*")}
    said |= {f"file {path.relative_to(out)}": path.read_bytes() for path in out.rglob("*") if path.is_file()}
    said["names of files"] = "\n".join(str(path.relative_to(out)) for path in out.rglob("*")).encode()
    return Told(trees[1], said)


def dump(server: embedded.Server) -> bytes:
    """Return what pg_dump writes of an embedded catalog, less what is in its private schema: the dump to give away of docs/privacy.md."""
    door = ["--host", str(server.host), "--port", str(server.port), "--username", str(server.user)]
    command = [embedded.wheel_binaries() / "pg_dump", *door, "--exclude-table-data=private.*", "--exclude-table-data=sql_login", "catalog"]
    return subprocess.run(command, capture_output=True, check=True).stdout


@contextlib.contextmanager
def entered() -> Iterator[Path]:
    """A folder that the account of the embedded server may enter, too: pytest's own is 0700."""
    with tempfile.TemporaryDirectory(prefix="scanfeed-private-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture(scope="module")
def plain(trees: tuple[Path, Planted]) -> Iterator[Told]:
    """What a plain catalog writes."""
    with entered() as folder:
        yield told(trees, folder, pseudonymize=False)


@pytest.fixture(scope="module")
def pseudonymized(trees: tuple[Path, Planted]) -> Iterator[Told]:
    """What a pseudonymized one writes."""
    with entered() as folder:
        yield told(trees, folder, pseudonymize=True)


# Places of `tests.identified` whose values a plain catalog holds: what docs/privacy.md lists, in the words of the trees.
UIDS = re.compile("(Study|Series|SOP)InstanceUID( of .*)?|FrameOfReferenceUID|SOPClassUID")
PATHS = re.compile("(.*file|.*folder.*|name of .*|case|(patient|study|reader|structure) in a path|reader in a contour's name)(?<!points)")
NAMES = {
    "PatientID", "StudyDate", "Modality", "BurnedInAnnotation", "PatientIdentityRemoved", "file name",
    "ROIName", "StructureSetLabel", "ROIGenerationAlgorithm", "SegmentLabel", "SegmentAlgorithmName", "SegmentationFractionalType",
    "Sunnybrook's patient", "Sunnybrook's original id", "patient in a table", "structure in a table", "reader in a table",
    "split in a table", "structure of a label", "label's name in dataset.json", "link to a folder elsewhere",
}  # fmt: skip
# Whose values stand nowhere, though they look like one of these.
NEVER = {"patient without a folder", "a file that is left over", "name of a note", "SOPInstanceUID of a damaged file",
         "SOPInstanceUID of a file of an unknown transfer syntax"}  # fmt: skip


def is_listed(place: str) -> bool:
    return place not in NEVER and (place in NAMES or bool(UIDS.fullmatch(place)) or bool(PATHS.fullmatch(place)))


def test_a_plain_catalog_holds_the_white_list_and_nothing_else(plain: Told) -> None:
    """Of all that was planted a dump has PatientID, UIDs, study date, paths, names of what was drawn and by whom, and codes; the rest
    is not there in any form. Each of the 18 kinds came through somewhere, so the search finds each of them."""
    found = plain.places("dump")
    assert {place for place in found if not is_listed(place)} == set()
    assert {kind for kinds in found.values() for kind in kinds} >= set(KINDS)
    for place in ("PatientID", "StudyInstanceUID", "SOPInstanceUID", "folder", "ROIName", "SegmentLabel", "Sunnybrook's original id"):
        assert found[place] == set(KINDS), place


def test_a_plain_catalog_says_no_more_than_it_holds(plain: Told) -> None:
    """Messages, logs, pictures and exports of a plain catalog have nothing that is not on the white list either."""
    assert {place for place in plain.places() if not is_listed(place) and place != "the root's own folder"} - {
        # What a command's own arguments named, or a table says of its columns.
        "name of a table",
    } == set()


def test_everything_ran(plain: Told, pseudonymized: Told) -> None:
    """No command ended in a traceback, both kinds of catalog gave the same files, and there is something in each."""
    for one in (plain, pseudonymized):
        text = one.said["messages"].decode()
        assert "Traceback" not in text, text[text.index("Traceback") - 500 :][:3000]
        assert {"file show.png", "file page/index.html", "file page.html", "file page.png", "file areas.svg", "file frozen.h5"} <= set(
            one.said
        )
        assert any(name.startswith("file tars/") for name in one.said)
        assert any(name.startswith("log loaderd") for name in one.said)
        assert len(one.said["dump"]) > 100_000
        assert b"no such option" not in one.said["messages"].lower()
    codes = [re.findall(rb"\n> (.*)(?:(?!\n> )[\s\S])*?\nexit code (\S+)", one.said["messages"]) for one in (plain, pseudonymized)]
    assert [code for _, code in codes[0]] == [code for _, code in codes[1]], list(zip(*codes, strict=False))


def test_a_pseudonymized_catalog_holds_nothing(pseudonymized: Told) -> None:
    """None of what was planted is in a dump less the schema private: no PatientID, UID, date, path or name, in no form."""
    assert pseudonymized.places("dump") == {}


def test_a_pseudonymized_catalog_says_nothing(pseudonymized: Told) -> None:
    """Nor is it in any message, log of daemon or server, picture, page, plot, export, or a name of one of these files."""
    found = {name: pseudonymized.places(name) for name in pseudonymized.said if name != "dump"}
    assert {name: places for name, places in found.items() if places} == {}


def test_captions_are_what_the_catalog_holds(pseudonymized: Told) -> None:
    """Text that is drawn as pixels comes from the rows alone: what `show --identify` and a gallery's picture set in letters is noted as
    it is set, on a pseudonymized catalog, and holds nothing of what was planted."""
    assert any("P-" in line for line in pseudonymized.said["letters"].decode().splitlines())
    assert pseudonymized.places("letters") == {}


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ExplicitVRBigEndian, ImplicitVRLittleEndian])
def test_of_every_attribute_of_the_standard_the_listed_ones_are_stored(
    syntax: str, conn: psycopg.Connection, tmp_path: Path, catalog: object
) -> None:
    """Of an image with a value of its own in each of over 3,500 attributes of PS3.6, texts, numbers, bytes and sequences, the catalog holds
    those that docs/privacy.md lists, whether our own reader or pydicom reads it."""
    planted = Planted()
    said = identified.write_everything(tmp_path / "a.dcm", planted, syntax)
    assert len(said) > 3_500
    done = catalog("ingest", tmp_path, "--jobs", "1")  # type: ignore[operator]
    assert done.returncode == 0, done.stderr
    assert conn.execute("SELECT count(*) FROM image").fetchone() == (1,)
    names = [name for (name,) in conn.execute("SELECT table_name FROM information_schema.tables WHERE table_schema = 'public'")]
    rows = "\n".join(
        str(conn.execute(psycopg.sql.SQL("SELECT to_jsonb(t) FROM {} t").format(psycopg.sql.Identifier(name))).fetchall()) for name in names
    ).encode()
    words = {place for _, place in planted.found(rows)}
    numbers = {
        keyword
        for keyword, text in said.items()
        if text.isdigit() and re.search(rb"(?<![\d.:])" + text.encode() + rb"(?:\.0+)?(?![\d:])", rows)
    }
    assert words | numbers == {keyword for keyword in kept_attributes() if keyword in said}


def in_forms(text: str) -> dict[str, bytes]:
    """A text as it may be written."""
    data = text.encode()
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">L4s", 13, b"IHDR") + bytes(17)
    packed = b"Comment\0\0" + zlib.compress(data)
    zipped, tarred = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.txt", text)
    with tarfile.open(fileobj=tarred, mode="w") as tar:
        member = tarfile.TarInfo("a.txt")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    return {
        "plain": data,
        "upper": text.upper().encode(),
        "UTF-16 LE": text.encode("utf-16-le"),
        "UTF-16 BE": text.encode("utf-16-be"),
        "UTF-32": text.encode("utf-32"),
        "Latin-1": f"Müller {text}".encode("latin-1"),
        "hex": data.hex().encode(),
        "bytea of UTF-16": b"\\x00" + text.encode("utf-16-le").hex().encode(),
        "hex, odd": b"a" + data.hex().encode(),
        "base64": base64.b64encode(data),
        "base64, shifted by one": base64.b64encode(b"x" + data),
        "base64, shifted by two": base64.b64encode(b"xy" + data),
        "base64 for URLs": base64.urlsafe_b64encode(data),
        "quoted-printable": quopri.encodestring(f"Müller {text}".encode()),
        "quoted-printable, all": "".join(f"={ord(letter):02X}" for letter in text).encode(),
        "percent": urllib.parse.quote(text, safe="").encode(),
        "percent, all": "".join(f"%{ord(letter):02x}" for letter in text).encode(),
        "HTML": "".join(f"&#{ord(letter)};" for letter in text).encode(),
        "JSON": "".join(f"\\u{ord(letter):04x}" for letter in text).encode(),
        "gzip": gzip.compress(data),
        "zip": zipped.getvalue(),
        "tar": tarred.getvalue(),
        "PNG": png + struct.pack(">L4s", len(packed), b"zTXt") + packed + bytes(4),
        "PNG in a page": b'<img src="data:image/png;base64,'
        + base64.b64encode(png + struct.pack(">L4s", len(packed), b"zTXt") + packed + bytes(4))
        + b'">',
    }


@pytest.mark.parametrize("kind", KINDS)
def test_the_search_finds_each_kind_in_each_form(kind: str) -> None:
    """A value is found plain, in capitals, as UTF-16, Latin-1, hexadecimal, base64 at each offset, quoted-printable, percent-encoded,
    escaped, compressed, in an archive and in a picture's text; and not where it is not."""
    planted = Planted()
    text = planted(kind, "here")
    for form, data in in_forms(text).items():
        assert planted.found(b"before " + data + b" behind" if form not in ("gzip", "zip", "tar", "PNG") else data) == {(kind, "here")}, (
            form
        )
    assert planted.found(value(kind, "there").encode()) == set()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in NUMBERS])
def test_the_search_finds_parts_of_names(kind: str) -> None:
    """One word of a value is enough."""
    planted = Planted()
    for word in re.findall("(?i)zq[a-z]{10}", planted(kind, "here")):
        assert planted.found(f"xx{word}yy".encode()) == {(kind, "here")}


def test_the_search_finds_dates_and_numbers_written_otherwise() -> None:
    """A date in other orders, a telephone number without its spaces."""
    planted = Planted()
    date, phone = planted("date", "here"), planted("phone", "here")
    year, month, day = date[:4], date[4:6], date[6:]
    for text in (f"{year}-{month}-{day}", f"{day}.{month}.{year}", f"{month}/{day}/{year}"):
        assert planted.found(text.encode()) == {("date", "here")}
    assert planted.found(re.sub("[^0-9]", "", phone).encode()) == {("phone", "here")}
    assert planted.found(f"1{date}1".encode()) == set()
