"""Tables of the user's own: what a row says is taken, what it does not say for certain is a problem with its line; and a reader by name."""

from __future__ import annotations

import io
import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from catalog.errors import FileError, UsageError
from catalog.layouts import Found, Tree, custom, table

SECRET = "Zbigniew-4711"
FILES = ("a/1.dcm", "a/2.dcm", "b/1.png", "b/2.TIF", "m/1.txt", "m/2.csv", "m/3.png", "m/4.JPG", "m/rt.dcm", "c d/ö,1.dcm", "notes.md")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A root of empty files."""
    return make(tmp_path / "root")


def make(root: Path) -> Path:
    for name in FILES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def read(root: Path, content: str | bytes, name: str = "scans.csv", **options: Any) -> Found:
    """Read a table that lies in the root; checks that problems are one line each and tell nobody's name."""
    (root / name).write_bytes(content.encode() if isinstance(content, str) else content)
    found = table.read(Tree(root), {"table": name, **options})
    for problem in found.problems:
        assert problem.path == name
        assert SECRET not in problem.message
        assert "\n" not in problem.message
        assert str(root) not in problem.message
    json.dumps([drawn.options | drawn.refers_to for drawn in found.annotations])
    return found


def drawn(found: Found) -> dict[str, tuple[str, str, str, tuple[str, ...], dict[str, Any]]]:
    return {item.entry.path: (item.format, item.structure, item.reader, item.candidates, item.refers_to) for item in found.annotations}


def labels(found: Found) -> list[tuple[Any, ...]]:
    """Return what the reading process makes of the label rows, through JSON as the database keeps it."""
    (item,) = [item for item in found.annotations if item.format == "table-label"]
    read_back = table.read_annotations(Path("/nowhere"), json.loads(json.dumps(item.options)))
    assert all(one.kind == "label" for one in read_back)
    assert len({one.source_key for one in read_back}) == len(read_back)
    return [(one.structure, one.reader, one.label, one.refers_to) for one in read_back]


WHOLE = """image,annotation,patient,structure,label,reader,frame,split
a/1.dcm,m/1.txt,P1,inner,,kim,,train
a/1.dcm,m/3.png,P1,outer,,,0,train
a/2.dcm,m/2.csv,P1,,,,3,
b/1.png,m/4.JPG,,scar,,,,
b/1.png,,,,ill,,,test
b/2.TIF,,P3,grade,2,kim,1,
a/2.dcm,m/rt.dcm,,,,,,
"c d/ö,1.dcm",,,,,,,
"""


def test_a_whole_table(folder: Path) -> None:
    """Every role is taken: images with patients and formats, annotations with their image, frame and split, labels, what is left over."""
    found = read(folder, WHOLE)
    assert found.problems == []
    assert {image.entry.path: (image.patient, image.format, image.sure) for image in found.images} == {
        "a/1.dcm": ("P1", "dicom", True), "a/2.dcm": ("P1", "dicom", True), "b/1.png": ("b", "raster", True),
        "b/2.TIF": ("P3", "raster", True), "c d/ö,1.dcm": (None, "dicom", True), "m/rt.dcm": ("P1", "dicom", True),
    }  # fmt: skip
    of_files = drawn(found)
    assert of_files.pop("scans.csv")[0] == "table-label"
    assert of_files == {
        "m/1.txt": ("contour", "inner", "kim", ("a/1.dcm",), {"path": "a/1.dcm", "split": "train"}),
        "m/3.png": ("raster", "outer", "", ("a/1.dcm",), {"path": "a/1.dcm", "frame": 0, "split": "train"}),
        "m/2.csv": ("contour", "mask", "", ("a/2.dcm",), {"path": "a/2.dcm", "frame": 3}),
        "m/4.JPG": ("raster", "scar", "", ("b/1.png",), {"path": "b/1.png"}),
    }
    assert labels(found) == [
        ("label", "", "ill", {"path": "b/1.png", "split": "test"}),
        ("grade", "kim", "2", {"path": "b/2.TIF", "frame": 1}),
    ]
    assert found.left_over == 1  # notes.md; the table is no part of what is left
    assert table.recognises(Tree(folder)) is None


def test_columns_by_other_names(folder: Path) -> None:
    """Columns are the user's: named by `columns`, in any order, with others beside them; separator, BOM and line ends as they come."""
    names = {"image": "img path", "annotation": "msk", "patient": "pid", "label": "diagnosis"}
    content = "pid;age;diagnosis;msk;img path\r\nP1;63;ill;m/1.txt;a/1.dcm\r\n\r\n;;;;\r\nP2;64;well; ;a/2.dcm"
    found = read(folder, b"\xef\xbb\xbf" + content.encode(), columns=names, separator=";")
    assert found.problems == []
    assert {image.entry.path: image.patient for image in found.images} == {"a/1.dcm": "P1", "a/2.dcm": "P2"}
    assert [row[:3] for row in labels(found)] == [("diagnosis", "", "ill"), ("diagnosis", "", "well")]
    tabs = read(folder, content.replace(";", "\t"), "scans.tsv", columns=names)
    assert [image.entry.path for image in tabs.images] == [image.entry.path for image in found.images]


def test_paths(folder: Path, tmp_path: Path) -> None:
    """Paths may be relative, absolute below the root, or lead there through a link; none leaves the root."""
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "beside.dcm").touch()
    lines = [
        f"{folder}/a/1.dcm", f"{tmp_path}/link/a/2.dcm", "./b/../b//1.png", "../beside.dcm", f"{tmp_path}/beside.dcm", "/etc/passwd", "..",
        "a/../../beside.dcm", f"{SECRET}.dcm", "a", "b/2.tif",
    ]  # fmt: skip
    found = read(folder, "image\n" + "\n".join(lines))
    assert [image.entry.path for image in found.images] == ["a/1.dcm", "a/2.dcm", "b/1.png"]
    assert [problem.message.split(";")[0] for problem in found.problems] == [
        *(f"line {line}: the image's path is not below the root" for line in range(5, 10)),
        *(f"line {line}: the image's file is not there, is hidden or cannot be read" for line in range(10, 13)),
    ]


def test_the_table_lies_elsewhere(folder: Path, tmp_path: Path) -> None:
    """A table outside the root serves for images and annotations; labels have no file to stand for them there, which is said."""
    (tmp_path / "t.csv").write_text("image,annotation,label\na/1.dcm,m/1.txt,ill\n")
    found = table.read(Tree(folder), {"table": str(tmp_path / "t.csv")})
    assert ([image.entry.path for image in found.images], list(drawn(found))) == (["a/1.dcm"], ["m/1.txt"])
    assert [(problem.path, problem.code) for problem in found.problems] == [("t.csv", "table-outside")]
    (folder / "t.csv").write_text("image,label\na/1.dcm,ill\n")
    assert len(labels(table.read(Tree(folder), {"table": str(folder / "t.csv")}))) == 1


@pytest.mark.parametrize(
    ("rows", "left", "lines"),
    [
        pytest.param(["a/1.dcm,,A,,,", "a/2.dcm,,B,,,", "a/1.dcm,,B,,,"], ["a/2.dcm"], "line 2, line 4", id="patients"),
        pytest.param(["a/1.dcm,,A,,,", "a/1.dcm,,,,,"], ["a/1.dcm"], None, id="one says no patient"),
        pytest.param(["a/1.dcm,,,,,train", "a/1.dcm,,,,,test"], [], "line 2, line 3", id="splits"),
        pytest.param(["a/1.dcm,m/1.txt,,,,", "a/2.dcm,m/1.txt,,,,"], [], "line 2, line 3", id="one contour, two images"),
        pytest.param(["a/1.dcm,m/1.txt,,inner,,", "a/1.dcm,m/1.txt,,outer,,"], [], "line 2, line 3", id="structures"),
        pytest.param(["a/1.dcm,m/1.txt,,inner,,"] * 2, ["a/1.dcm"], None, id="one row twice"),
        pytest.param(["a/1.dcm,,,x,1,", "a/1.dcm,,,x,2,"], [], "line 2, line 3", id="labels"),
        pytest.param(["a/1.dcm,,,x,1,", "a/1.dcm,,,y,2,"], ["a/1.dcm"], None, id="labels of two structures"),
    ],
)
def test_contradictions(folder: Path, rows: list[str], left: list[str], lines: str | None) -> None:
    """Rows that contradict each other are named by line and none of them is used; the others are."""
    found = read(folder, "\n".join(["image,annotation,patient,structure,label,split", *rows]))
    assert [image.entry.path for image in found.images] == left
    assert [problem.message.split(":")[0] for problem in found.problems] == ([lines] if lines else [])
    assert {problem.code for problem in found.problems} <= {"table-ambiguous"}


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        pytest.param(b"picture,pid\na/1.dcm,X\n", {"columns": {"patient": "pid"}}, "there is: picture, pid", id="columns that are there"),
        pytest.param(b"image,pid\na/1.dcm,X\n", {"columns": {"patient": "who"}}, "no column who; there is: image, pid", id="a named one"),
        pytest.param(f"a/1.dcm,{SECRET}\n".encode(), {}, "its first line must name the columns", id="no header"),
        pytest.param(b"image;patient\na/1.dcm;X\n", {}, "separator", id="other separator"),
        pytest.param(b"image,label,label\na/1.dcm,1,2\n", {}, "several columns are called label", id="a column twice"),
        pytest.param(b"", {}, "no column image", id="empty"),
        pytest.param("image\nä.dcm\n".encode("latin-1"), {}, "line 2: is not UTF-8", id="not UTF-8"),
        pytest.param("image\na/1.dcm\n".encode("utf-16"), {}, "not UTF-8", id="UTF-16"),
        pytest.param(b"image\n\na\0b\n", {}, "line 3: holds a NUL", id="NUL"),
        pytest.param(b'image\na/1.dcm\n"a/2.dcm\n', {}, "line 3: unexpected end of data", id="a quote that does not end"),
        pytest.param(b"image\n" + b"a" * 200_000, {}, "field larger than field limit", id="a field too long"),
        pytest.param(f"image,patient\na/1.dcm,{SECRET},b\n".encode(), {}, "line 2: has 3 fields where line 1 has 2", id="a field more"),
        pytest.param(b"image,frame\na/1.dcm,-1\n", {}, "line 2: frame is no whole number", id="frame"),
        pytest.param(f"image,patient\na/1.dcm,{SECRET * 50}\n".encode(), {}, "line 2: patient has over 200 characters", id="a long name"),
        pytest.param(b"image,annotation\n,m/1.txt\n", {}, "line 2: names no image", id="no image"),
        pytest.param(b"image,annotation\na/1.dcm,a/1.dcm\n", {}, "line 2: one file is named as image and as annotation", id="itself"),
        pytest.param(b"PAR1" + bytes(100) + b"PAR1", {}, "cannot be read as Parquet", id="broken Parquet"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(folder: Path, content: bytes, options: dict[str, Any], message: str) -> None:
    """Each thing that can be wrong with a table is one problem that says where and what, without any value of a cell."""
    (problem,) = read(folder, content, **options).problems
    assert message in problem.message


def test_a_table_that_cannot_be_had(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that is not there or too large is a problem; an option that cannot be right is a usage error."""
    found = table.read(Tree(folder), {"table": "none.csv"})
    assert [problem.code for problem in found.problems] == ["table-unreadable"]
    monkeypatch.setattr(table, "TABLE_BYTES", 10)
    assert "is over 10 bytes" in read(folder, WHOLE).problems[0].message
    for options in ({"columns": {"picture": "x"}}, {"separator": ";;"}, {"values": {"red": "inner"}}, {"values": "255"}):
        with pytest.raises(UsageError):
            read(folder, "image\n", **options)


def test_values_of_masks(folder: Path) -> None:
    """What the values of masks stand for reaches their reader, and no other."""
    found = read(folder, WHOLE, values={"255": "inner"})
    assert {item.entry.path: item.options for item in found.annotations if item.format != "table-label"} == {
        "m/1.txt": {}, "m/2.csv": {}, "m/3.png": {"values": {"255": "inner"}}, "m/4.JPG": {"values": {"255": "inner"}},
    }  # fmt: skip


def parquet(columns: dict[str, Any], **options: Any) -> bytes:
    pyarrow, writer = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = io.BytesIO()
    writer.write_table(pyarrow.table(columns), file, **options)
    return file.getvalue()


def test_parquet_is_read_as_csv(folder: Path) -> None:
    """The same table as Parquet gives the same images and annotations, with typed columns and missing values."""
    lines = [line.split(",") for line in WHOLE.replace('"c d/ö,1.dcm"', "c d/ö;1.dcm").splitlines()]
    columns: dict[str, Any] = {name: [line[at].replace(";", ",") or None for line in lines[1:]] for at, name in enumerate(lines[0])}
    columns["frame"] = [None if value is None else float(value) for value in columns["frame"]]
    columns["age"] = [[1, 2]] * len(lines[1:])
    expected, found = read(folder, WHOLE), read(folder, parquet(columns), "scans.parquet")
    assert (found.images, found.problems) == (expected.images, [])
    assert [item for item in found.annotations if item.format != "table-label"] == expected.annotations[:-1]
    assert labels(found) == labels(expected)
    for made in (parquet({"image": ["a/1.dcm", "b/9.dcm"]}), parquet({"image": [["a/1.dcm"]]}), parquet({"picture": ["a/1.dcm"]})):
        assert len(read(folder, made, "scans.parquet").problems) == 1


def test_parquet_of_many_rows(folder: Path) -> None:
    """A small Parquet file of a great many rows is refused before they are made."""
    pyarrow = pytest.importorskip("pyarrow")
    same = pyarrow.DictionaryArray.from_arrays(pyarrow.array(np.zeros(table.MOST_ROWS + 1, "i1")), pyarrow.array(["a/1.dcm"]))
    data = parquet({"image": same})
    assert len(data) < 100_000
    (problem,) = read(folder, data, "scans.parquet").problems
    assert f"over {table.MOST_ROWS} rows" in problem.message


def test_without_pyarrow(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where pyarrow is not installed, Parquet says what to install; CSV goes on."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (problem,) = read(folder, b"PAR1", "scans.parquet").problems
    assert "pip install 'scanfeed[parquet]'" in problem.message
    assert read(folder, WHOLE).problems == []


CELLS = st.sampled_from(("a/1.dcm", "m/1.txt", "m/3.png", "", "0", "-1", SECRET, '"', "\r", "ö", "\0", ";", "x" * 300, "../a"))


@given(
    content=st.binary(max_size=300)
    | st.lists(st.lists(CELLS, min_size=1, max_size=5), max_size=6).map(
        lambda rows: "\n".join(["image,annotation,label,frame,split", *map(",".join, rows)]).encode()
    )
)
def test_any_table_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    """Whatever bytes a table holds, nothing is raised, and what it gives are files of the tree."""
    root = make(tmp_path_factory.mktemp("tree"))
    found = read(root, content)
    assert {image.entry.path for image in found.images} <= set(FILES)
    for item in found.annotations:
        assert set(item.candidates) <= set(FILES)


def survives(root: Path, inputs: int, seed: int) -> int:
    """Read mutants of a CSV and a Parquet table; returns how many gave images."""
    rng, gave = random.Random(seed), 0
    sound = [WHOLE.encode()] * 3 + [parquet({"image": ["a/1.dcm", "a/2.dcm"], "label": ["ill", "well"]}, compression="zstd")]
    for _ in range(inputs):
        data = bytearray(rng.choice(sound))
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data))
            data[at : at + rng.randint(0, 3)] = rng.choice((b"", b'"', b"\0", b"\n", b",", b"\xff\xff\xff\x7f", rng.randbytes(2)))
            data = data or bytearray(b"x")
        gave += bool(read(root, bytes(data)).images)
    return gave


def test_mutants(folder: Path) -> None:
    """2,000 damaged tables are read or refused."""
    assert survives(folder, 2_000, 1) > 200


@pytest.mark.soak
def test_many_mutants(folder: Path) -> None:
    """The same for 100,000."""
    assert survives(folder, 100_000, 2) > 10_000


# ------------------------------------------------------------------------------------------------ a reader of the user's own

OURS = """
from pathlib import Path
import numpy as np
from catalog.layouts import Annotation, Found, Image, Tree
from catalog.records import Drawn, polygon

def read(tree: Tree) -> Found:
    found = Found()
    for entry in tree.entries:
        patient, _, name = entry.path.partition("/")
        if name.endswith(".dcm"):
            found.images.append(Image(entry, patient, sure=True))
        elif name.endswith(".npy"):
            image = entry.path.removesuffix(".npy") + ".dcm"
            found.annotations.append(Annotation(entry, structure="inner", format="{module}:outline", candidates=(image,)))
        else:
            found.left_over += 1
    return found

def outline(path: Path, options: dict) -> list[Drawn]:
    return [Drawn("", "", "", "polygon", polygon=polygon([np.load(path).astype(np.float64)]), convention="corner")]

def fails(tree):
    raise KeyError("{secret}")

def nothing(tree):
    return None

NUMBER = 5
"""


@pytest.fixture
def ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module in the working folder."""
    name = f"ours_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(OURS.replace("{module}", name).replace("{secret}", SECRET))
    (tmp_path / f"{name}_broken.py").write_text("x = (\n")
    (tmp_path / f"{name}_needs.py").write_text("import nowhere_at_all\n")
    (tmp_path / f"{name}_raises.py").write_text(f"\n\nraise ValueError({SECRET!r})\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    custom.load.cache_clear()
    return name


def test_a_reader_of_ones_own(folder: Path, ours: str) -> None:
    """The docstring's example works: a module of the working folder finds images and pairs, and reads what it drew."""
    outline = np.array([[1, 1], [4, 1], [4, 4]])
    np.save(folder / "a" / "1.npy", outline)
    found = custom.read(Tree(folder), {"reader": f"{ours}:read"})
    assert {image.entry.path for image in found.images} == {path for path in FILES if path.endswith(".dcm")}
    (item,) = found.annotations
    assert (item.candidates, item.format) == (("a/1.dcm",), f"{ours}:outline")
    (one,) = custom.load(item.format)(folder / item.entry.path, item.options)
    assert one.polygon is not None
    assert one.polygon.points == outline.ravel().tolist()
    assert custom.recognises(Tree(folder)) is None


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("reader", "is no import path"),
        ("{ours}:", "is no import path"),
        ("os.path:join:x", "is no import path"),
        ("../{ours}:read", "is no import path"),
        ("nowhere_at_all:read", "there is no module nowhere_at_all"),
        ("{ours}.more:read", "there is no module {ours}.more"),
        ("{ours}_needs:read", "needs nowhere_at_all, which is not installed"),
        ("{ours}_broken:read", "failed with SyntaxError in line 1 of {ours}_broken.py"),
        ("{ours}_raises:read", "failed with ValueError in line 3 of {ours}_raises.py"),
        ("{ours}:write", "has no function write"),
        ("{ours}:NUMBER", "something that is no function NUMBER"),
        ("{ours}:fails", "failed with KeyError in line 24 of {ours}.py"),
        ("{ours}:nothing", "returned NoneType; it must return a catalog.layouts.Found"),
    ],
)
def test_a_reader_that_cannot_be_had(folder: Path, ours: str, spec: str, message: str) -> None:
    """Whatever is wrong with a reader of the user's own is one line that says what and where, without the text of its error."""
    with pytest.raises(UsageError) as caught:
        custom.read(Tree(folder), {"reader": spec.format(ours=ours)})
    assert message.format(ours=ours) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert SECRET not in str(caught.value)


def test_its_own_errors_pass(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A FileError that the user's function raises is its own: it is passed on as it is."""
    (tmp_path / "ours_refusing.py").write_text(
        "from catalog.errors import FileError\ndef read(tree): raise FileError('ours', 'not today')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(FileError, match="not today"):
        custom.read(Tree(folder), {"reader": "ours_refusing:read"})
