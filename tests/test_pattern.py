"""Patterns: a folder described by regular expressions is read as by a layout of its own; what the file says wrong is one line."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from catalog.errors import UsageError
from catalog.layouts import Found, Tree, pattern
from catalog.layouts import sunnybrook as sunnybrook_layout

# The docstring's files, in their order.
SHOWN = [
    "\n".join(line[4:] for line in block.splitlines())
    for block in re.findall(r"::\n\n((?:    .*\n|\n)+)", (pattern.__doc__ or "") + "\n")
]  # fmt: skip
SUNNYBROOK, PUBLISHED, PAINTED = SHOWN
SECRET = "Zbigniew-4711"


def make(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return root


def read(root: Path, content: str) -> Found:
    (root / "names.toml").write_text(content)
    return pattern.read(Tree(root), {"pattern": "names.toml"})


def candidates(found: Found) -> dict[str, tuple[str, ...]]:
    return {drawn.entry.path: drawn.candidates for drawn in found.annotations}


def same_as_the_layout(root: Path, content: str) -> Found:
    """Check that a pattern finds what the Sunnybrook layout finds; only where to look for a number that no file has may differ."""
    expected = sunnybrook_layout.read(Tree(root), {})
    found = read(root, content)
    assert found.images == expected.images
    assert [replace(drawn, folder=None, unpaired="") for drawn in found.annotations] == [
        replace(drawn, folder=None, unpaired="") for drawn in expected.annotations
    ]
    assert found.originals == expected.originals
    assert found.left_over == expected.left_over
    return found


def test_the_real_studies(sunnybrook: Path, tmp_path: Path) -> None:
    """The Sunnybrook studies read by the docstring's pattern give the layout's 500 images, 54 contours and their candidates."""
    expected = sunnybrook_layout.read(Tree(sunnybrook), {})
    (tmp_path / "names.toml").write_text(SUNNYBROOK)
    found = pattern.read(Tree(sunnybrook), {"pattern": str(tmp_path / "names.toml")})
    assert (len(found.images), len(found.annotations), found.problems) == (500, 54, [])
    assert found.images == expected.images
    assert [replace(drawn, folder=f"dicoms/{drawn.candidates[0].split('/')[1]}") for drawn in found.annotations] == expected.annotations
    assert found.originals == expected.originals


def test_the_arranged_names(studies: Path, tmp_path: Path) -> None:
    """So do synthetic ones, with a patient whom the table does not know, two images of one number and strays."""
    root = tmp_path / "studies"
    shutil.copytree(studies, root)
    make(root, "dicoms/SYN0001/05.dcm", "contourfiles/SC-SYN-0009/i-contours/IM-0001-0001-icontour-manual.txt", "stray/1.dcm")
    found = same_as_the_layout(root, SUNNYBROOK)
    assert sum(len(drawn.candidates) == 2 for drawn in found.annotations) == 2
    assert [drawn.unpaired for drawn in found.annotations if not drawn.candidates] == ["link.csv names no patient with images for it"]


def test_the_published_names(tmp_path: Path) -> None:
    """The docstring's pattern for the original names gives what the layout gives: several series, so several candidates."""
    root = make(
        tmp_path,
        *(f"SCD_IMAGES_01/SCD0000101/CINESAX_300/IM-0003-{n:04d}.dcm" for n in range(1, 11)),
        *(f"SCD_IMAGES_01/SCD0000101/CINELAX_301/IM-0004-{n:04d}.dcm" for n in range(1, 4)),
        *(f"SC-HF-I-01/contours-manual/IRCCI-expert/IM-0001-{n:04d}-{kind}contour-manual.txt" for n in (2, 7, 99) for kind in ("i", "p2")),
    )
    (root / "scd_patientdata.csv").write_text("PatientID,OriginalID\nSCD0000101,SC-HF-I-01\n")
    found = same_as_the_layout(root, PUBLISHED)
    assert sorted(len(drawn.candidates) for drawn in found.annotations) == [0, 0, 1, 1, 2, 2]


def test_painted_masks(tmp_path: Path) -> None:
    """The docstring's third pattern: rasters both, values and reader by the file, patients by the path."""
    found = read(make(tmp_path, "A/images/1.png", "A/images/2.png", "B/images/1.png", "A/masks/01.png", "B/masks/9.png", "x.png"), PAINTED)
    assert {(image.entry.path, image.patient, image.format) for image in found.images} == {
        ("A/images/1.png", "A", "raster"), ("A/images/2.png", "A", "raster"), ("B/images/1.png", "B", "raster"),
    }  # fmt: skip
    assert candidates(found) == {"A/masks/01.png": ("A/images/1.png",), "B/masks/9.png": ()}
    first, lost = found.annotations
    assert (first.reader, first.format, first.options) == ("kim", "raster", {"values": {"1": "ventricle", "2": "muscle"}})
    assert (first.refers_to, first.number) == ({"patient": "A", "number": 1}, 1)
    assert lost.unpaired == "no image's path has its patient and number"
    assert found.left_over == 1


def rule(kind: str, path: str, **more: str) -> str:
    return f"[[{kind}]]\npath = '{path}'\n" + "".join(f"{key} = {value}\n" for key, value in more.items())


def test_every_group_that_both_have_must_be_equal(tmp_path: Path) -> None:
    """Study and series are compared where both paths have them, numbers as numbers; groups that one side lacks do not count."""
    root = make(
        tmp_path, "P/s1/r1/7.dcm", "P/s1/r2/7.dcm", "P/s2/r1/7.dcm", "Q/s1/r1/7.dcm", "c/P-s1-r2-007.txt", "c/P-s1-7.txt", "c/P.txt"
    )
    images = rule("image", "(?P<patient>[A-Z])/(?P<study>[^/]+)/(?P<series>[^/]+)/(?P<number>[0-9]+).dcm")
    found = read(
        root,
        images + rule(
            "annotation", r"c/(?P<patient>\w)(-(?P<study>s\d))?(-(?P<series>r\d))?(-(?P<number>\d+))?\.txt", structure='"inner"'
        ),
    )  # fmt: skip
    assert candidates(found) == {
        "c/P-s1-r2-007.txt": ("P/s1/r2/7.dcm",),
        "c/P-s1-7.txt": ("P/s1/r1/7.dcm", "P/s1/r2/7.dcm"),
        "c/P.txt": ("P/s1/r1/7.dcm", "P/s1/r2/7.dcm", "P/s2/r1/7.dcm"),
    }


def test_numbers_that_no_path_has(tmp_path: Path) -> None:
    """Where images have no number in their paths it is looked for among InstanceNumbers, in a folder that holds just these images."""
    root = make(tmp_path, "d/A/x.dcm", "d/A/r/y.dcm", "d/B/z.dcm", "flat/C1.dcm", "flat/D1.dcm", "c/A-3.txt", "c/B-3.txt", "c/C-3.txt")
    content = (
        rule("image", "d/(?P<patient>.)/.+") + rule("image", "flat/(?P<patient>.)1.dcm")
        + rule("annotation", r"c/(?P<patient>.)-(?P<number>\d)\.txt", structure='"inner"')
    )  # fmt: skip
    found = read(root, content)
    said = {drawn.entry.path: (drawn.candidates, drawn.folder, drawn.number, drawn.unpaired) for drawn in found.annotations}
    assert said == {
        "c/A-3.txt": ((), "d/A", 3, ""),
        "c/B-3.txt": ((), "d/B", 3, ""),
        # Another patient's images lie beside.
        "c/C-3.txt": ((), None, 3, "no image's path has its patient and number"),
    }


def test_what_an_annotation_says_besides(tmp_path: Path) -> None:
    """Frame, structure, reader and convention come from the path or the file; DICOM and readers of the user's own say more themselves."""
    root = make(tmp_path, "A.dcm", "A-f2-x-kim.txt", "A.rt.dcm", "A.npy")
    content = (
        rule("image", r"(?P<patient>\w)\.dcm")
        + rule("annotation", r"(?P<patient>\w)-f(?P<frame>\d)-(?P<structure>\w)-(?P<reader>\w+)\.txt",
               convention='"corner"', structures='{x = "inner"}')
        + rule("annotation", r"\w\.rt\.dcm")
        + rule("annotation", r"(?P<patient>\w)\.npy", format='"ours:outline"')
    )  # fmt: skip
    found = read(root, content)
    own, drawn = found.annotations[::-1] if found.annotations[0].format == "contour" else found.annotations
    assert (drawn.structure, drawn.reader, drawn.convention) == ("inner", "kim", "corner")
    assert (drawn.refers_to, drawn.candidates) == ({"patient": "A", "frame": 2}, ("A.dcm",))
    assert (own.format, own.candidates) == ("ours:outline", ("A.dcm",))
    assert [(image.entry.path, image.patient, image.format) for image in found.images] == [
        ("A.dcm", "A", "dicom"), ("A.rt.dcm", None, "dicom"),
    ]  # fmt: skip


def test_what_two_rules_match_is_left_out(tmp_path: Path) -> None:
    """A file that two expressions match, and a number that is none, are problems of that file; the others go on."""
    root = make(tmp_path, "A/1.dcm", "A/x.dcm", "B/1.dcm")
    found = read(root, rule("image", r"(?P<patient>\w)/(?P<number>\w)\.dcm") + rule("image", "(?P<patient>B)/.*"))
    assert [image.entry.path for image in found.images] == ["A/1.dcm"]
    assert [(problem.path, problem.code) for problem in found.problems] == [("A/x.dcm", "pattern-number"), ("B/1.dcm", "pattern-ambiguous")]
    assert "names.toml: [[image]] 1 and names.toml: [[image]] 2" in found.problems[1].message


IMAGE = rule("image", r"(?P<patient>\w)/(?P<number>\d)\.dcm")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param("[[image]\n", "names.toml: is no TOML: ", id="TOML"),
        pytest.param("x = 1\n[[image]\n", "(at line 2, column 8)", id="TOML with its line"),
        pytest.param("", "has no [[image]]", id="empty"),
        pytest.param(rule("picture", ".*"), "there is no picture; there is: [[image]], [[annotation]]", id="another table"),
        pytest.param("[image]\npath = 'x'\n", "image must be written [[image]]", id="one bracket"),
        pytest.param(rule("image", "(?P<patient>"), "names.toml: [[image]] 1: path is no regular expression: missing )", id="regex"),
        pytest.param(IMAGE + rule("image", "a{2,1}"), "[[image]] 2: path is no regular expression", id="which one"),
        pytest.param(rule("image", "(?P<name>.*)"), "path has a group name; there is: patient, study, series, number", id="group"),
        pytest.param(rule("image", "(?P<structure>.*)"), "path has a group structure", id="an annotation's group"),
        pytest.param("[[image]]\nfile = 'x'\n", "there is no key file; there is: path, format", id="key"),
        pytest.param("[[image]]\n", "path is missing", id="no path"),
        pytest.param("[[image]]\npath = 5\n", "path must be a text", id="no text"),
        pytest.param(IMAGE + rule("annotation", "x", convention='"center"'), "convention must be centre or corner", id="convention"),
        pytest.param(IMAGE + rule("annotation", "x", structures='"i"'), "structures must be a table of texts", id="structures"),
        pytest.param(IMAGE + rule("annotation", "x", values='{red = "a"}'), "`values` must name", id="values"),
        pytest.param(IMAGE + rule("annotation", "x", format='"png"'), "format must be", id="format"),
        pytest.param(rule("image", "x", format='"contour"'), "format must be", id="an annotation's format"),
        pytest.param(IMAGE + rule("annotation", "x", patients='"link.csv"'), "which its path has not", id="patients without a group"),
        pytest.param(IMAGE + rule("annotation", "(?P<patient>x)", patients='{file = "a"}'), "patients must be", id="patients"),
        pytest.param(IMAGE + rule("annotation", r"(?P<patient>\w)/.*txt"), "[[annotation]] 1: says no structure", id="structure"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path: Path, content: str, message: str) -> None:
    """Whatever is wrong with a pattern file is a usage error of one line with the entry and what there is instead."""
    with pytest.raises(UsageError) as caught:
        read(make(tmp_path, "A/1.dcm", "A/1.txt"), content)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


def test_a_file_that_cannot_be_had(tmp_path: Path) -> None:
    """A pattern file that is not there or is no text is a usage error, too; nothing is recognised without one."""
    (tmp_path / "bad.toml").write_bytes(b"\xff\xfe")
    for name in ("none.toml", "bad.toml"):
        with pytest.raises(UsageError, match=name):
            pattern.read(Tree(tmp_path), {"pattern": name})
    assert pattern.recognises(Tree(tmp_path)) is None


def test_a_broken_link_table(tmp_path: Path) -> None:
    """Without its link table no annotation is paired; the table's fault is a problem and each annotation says why."""
    root = make(tmp_path, "dicoms/A/1.dcm", "contourfiles/X/i-contours/IM-0001-0001-icontour-manual.txt")
    for table in (None, b"\xff", b"patient,original\nA,X\n"):
        if table is not None:
            (root / "link.csv").write_bytes(table)
        found = read(root, SUNNYBROOK)
        assert [problem.path for problem in found.problems] == ["link.csv"]
        assert [(drawn.candidates, bool(drawn.unpaired)) for drawn in found.annotations] == [((), True)]


TOML = st.recursive(
    st.sampled_from(("'x'", "5", '"(?P<patient>.*)"', '"["', "true", '"link.csv"', "'corner'")),
    lambda inner: st.dictionaries(st.sampled_from(("a", "table", "1")), inner, max_size=2).map(
        lambda made: "{" + ", ".join(f"{key} = {value}" for key, value in made.items()) + "}"
    ) | st.lists(inner, max_size=2).map(lambda made: "[" + ", ".join(made) + "]"),
    max_leaves=4,
)  # fmt: skip
KEYS = st.sampled_from(("path", "format", "convention", "structures", "structure", "reader", "patients", "values", "other"))


@given(
    entries=st.lists(st.tuples(st.sampled_from(("image", "annotation", "x")), st.dictionaries(KEYS, TOML, max_size=4)), max_size=3),
    raw=st.text(max_size=60),
    use_raw=st.booleans(),
)
def test_any_file_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, entries: list[tuple[str, dict[str, Any]]], raw: str, use_raw: bool
) -> None:
    """Whatever a pattern file says, it is read, or refused in one line."""
    content = "".join(f"[[{kind}]]\n" + "".join(f"{key} = {value}\n" for key, value in made.items()) for kind, made in entries)
    root = make(tmp_path_factory.mktemp("tree"), "A/1.dcm", "A/1.txt")
    (root / "names.toml").write_bytes((raw if use_raw else content).encode("utf-8", "surrogatepass"))
    try:
        found = pattern.read(Tree(root), {"pattern": "names.toml"})
    except UsageError as error:
        assert "\n" not in str(error)
    else:
        assert found.images or found.left_over or found.problems
