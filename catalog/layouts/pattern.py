r"""Names by regular expressions in a small TOML file, so that another folder needs a file and not a fork.

Never recognised, only asked for: ``catalog ingest FOLDER --pattern names.toml``. Each expression must match a whole path relative to the
root, with / between folders. Its named groups say what stands in the path: of an image ``patient``, ``study``, ``series`` and ``number``;
of an annotation these and ``structure``, ``reader`` and ``frame`` (of the image's file, from 0). An annotation belongs to the images of
which every group that both have is equal, ``number`` as a number: one is paired, several are proposed. A number is looked for in paths;
where images have none in theirs, among the InstanceNumbers of the folder that holds the images of the other groups and no others.

What the four exercises had, the Sunnybrook studies as arranged for teaching (`catalog.layouts.sunnybrook` reads the same without)::

    [[image]]
    path = 'dicoms/(?P<patient>[^/]+)/(?P<number>\d+)\.dcm'

    [[annotation]]
    path = 'contourfiles/(?P<patient>[^/]+)/(?:.+/)?IM-\d{4}-(?P<number>\d+)-(?P<structure>[io])contour-(?P<reader>\w+)\.txt'
    convention = "centre"                         # pixel centres at whole numbers; "corner": at halves
    structures = {i = "inner", o = "outer"}       # what they are called here; others keep their name
    patients = "link.csv"                         # the patient in this path is an original_id; link.csv has its patient_id

The same as published, where the table and its columns have other names::

    [[image]]
    path = 'SCD_IMAGES_\d+/(?P<patient>SCD\d+)/[^/]+/IM-\d+-(?P<number>\d+)\.dcm'

    [[annotation]]
    path = '(?P<patient>SC-[^/]+)/contours-manual/(?P<reader>[^/]+)/IM-\d+-(?P<number>\d+)-(?P<structure>[iop]\d?)contour-manual\.txt'
    structures = {i = "inner", o = "outer", p1 = "papillary1", p2 = "papillary2"}
    patients = {table = "scd_patientdata.csv", original_id = "OriginalID", patient_id = "PatientID"}

Pictures with painted masks beside them::

    [[image]]
    path = '(?P<patient>[^/]+)/images/(?P<number>\d+)\.png'

    [[annotation]]
    path = '(?P<patient>[^/]+)/masks/(?P<number>\d+)\.png'
    values = {1 = "ventricle", 2 = "muscle"}      # as in catalog.raster; without it: structure = "…", of what is not 0
    reader = "kim"                                # where the path does not say it

Files are read by their suffix, as in `catalog.layouts.table`; ``format = "module:function"`` names a reader of the user's own
(`catalog.layouts.custom`). Files that no expression matches are left over; one that two match is a problem.
"""

from __future__ import annotations

import posixpath
import re
import tomllib
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from catalog.errors import FileError, UsageError
from catalog.layouts import Annotation, Entry, Found, Image, Problem, Tree
from catalog.layouts.sunnybrook import read_link
from catalog.layouts.table import format_of, read_named
from catalog.raster import named_values

SHARED = ("patient", "study", "series", "number")
GROUPS = {"image": SHARED, "annotation": (*SHARED, "structure", "reader", "frame")}
KEYS = {
    "image": ("path", "format"),
    "annotation": ("path", "format", "convention", "structures", "structure", "reader", "patients", "values"),
}
PATTERN_BYTES = 1024 * 1024
NUMBER = re.compile("[0-9]{1,9}", re.ASCII)  # PostgreSQL's integer holds any of them


class _Link(NamedTuple):
    """A table that says whose an annotation's folder is, and the names of its columns."""

    table: str
    original_id: str = "original_id"
    patient_id: str = "patient_id"


@dataclass(frozen=True, slots=True)
class _Rule:
    """An entry of the file. `said` names it in messages."""

    kind: Literal["image", "annotation"]
    said: str
    path: re.Pattern[str]
    format: str = ""
    convention: Literal["corner", "centre"] = "centre"
    structures: Mapping[str, str] = field(default_factory=dict)
    structure: str = ""
    reader: str = ""
    patients: _Link | None = None
    values: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Match:
    entry: Entry
    rule: _Rule
    groups: dict[str, str]  # those that took part


def recognises(tree: Tree) -> str | None:
    """None: a pattern is asked for, never found."""
    return None


def read(tree: Tree, options: Mapping[str, Any]) -> Found:
    """Return the images and annotations whose paths match the file ``options["pattern"]``, absolute or relative to the root.

    Raises:
        UsageError: If the file cannot be read or anything in it cannot be right.
    """
    rules = _rules(tree, str(options["pattern"]))
    found = Found(problems=list(tree.problems))
    images, drawn = _matches(tree, rules, found, {str(options["pattern"]).removeprefix(f"{tree.root}/")})
    linked = {rule.patients: _linked(tree, rule.patients, images, found) for rule in rules if rule.patients}
    places = _Places(images)
    for one in images:
        form = one.rule.format or ("raster" if format_of(one.entry.path) == "raster" else "dicom")
        folder = posixpath.basename(posixpath.dirname(one.entry.path)) or tree.root.name
        found.images.append(Image(one.entry, one.groups.get("patient", folder if form == "raster" else None), sure=True, format=form))
    for one in drawn:
        form = one.rule.format or format_of(one.entry.path)
        if form == "dicom":  # RTSTRUCT and SEG are told from images, and paired, by what stands in them
            found.images.append(Image(one.entry, None, sure=True))
        else:
            found.annotations.append(_annotation(one, form, linked, places))
    return found


def _matches(tree: Tree, rules: list[_Rule], found: Found, own: set[str]) -> tuple[list[_Match], list[_Match]]:
    """Return the images' and the annotations' files; counts those that nothing matches."""
    matches: dict[str, list[_Match]] = {"image": [], "annotation": []}
    own |= {rule.patients.table for rule in rules if rule.patients}
    for entry in tree.entries:
        fitting = [(rule, match) for rule in rules if (match := rule.path.fullmatch(entry.path))]
        if not fitting:
            found.left_over += entry.path not in own
            continue
        if len(fitting) > 1:
            said = " and ".join(rule.said for rule, _ in fitting)
            found.problems.append(Problem(entry.path, "pattern-ambiguous", f"matches {said}; it is left out; make one of them narrower"))
            continue
        ((rule, match),) = fitting
        groups = {name: value for name, value in match.groupdict().items() if value is not None}
        wrong = [name for name in ("number", "frame") if name in groups and not NUMBER.fullmatch(groups[name])]
        if wrong:
            message = f"what {rule.said} takes as its {wrong[0]} is no whole number of up to 9 digits; it is left out"
            found.problems.append(Problem(entry.path, "pattern-number", message))
            continue
        matches[rule.kind].append(_Match(entry, rule, groups))
    return matches["image"], matches["annotation"]


def _linked(tree: Tree, link: _Link, images: list[_Match], found: Found) -> dict[str, str]:
    """Return original → patient, for patients that have images."""
    patients = {one.groups.get("patient") for one in images}
    lines = read_link(tree, link.table, link.patient_id, link.original_id, found.problems)
    originals = {patient: original for patient, original in lines.values() if patient in patients}
    found.originals |= originals
    return {original: patient for patient, original in originals.items()}


class _Places:
    """The images' files by what stands in their paths."""

    def __init__(self, images: list[_Match]) -> None:
        self._by_names: dict[tuple[str, ...], list[_Match]] = defaultdict(list)
        for one in images:
            self._by_names[tuple(name for name in SHARED if name in one.groups)].append(one)
        self._sorted = sorted(one.entry.path for one in images)
        self._index: dict[tuple[tuple[str, ...], tuple[str, ...]], dict[tuple[str | int, ...], list[str]]] = {}

    def equal(self, groups: Mapping[str, str], numbered: bool | None) -> list[str]:
        """Return the images of which every group that both have is equal: only those with (True) or without (False) a number in theirs."""
        found: list[str] = []
        for names in self._by_names:
            common = tuple(name for name in names if name in groups)
            if common and numbered in (None, "number" in names):
                found += self._of(names, common).get(_values(groups, common), [])
        return sorted(found)

    def folder(self, paths: list[str]) -> str | None:
        """Return the folder in which these images lie and no others."""
        folder = posixpath.commonpath([posixpath.dirname(path) for path in paths]) if paths else ""
        first, end = bisect_left(self._sorted, folder + "/"), bisect_left(self._sorted, folder + "0")  # "0" follows "/"
        return folder if folder and end - first == len(paths) else None

    def _of(self, names: tuple[str, ...], common: tuple[str, ...]) -> dict[tuple[str | int, ...], list[str]]:
        if (names, common) not in self._index:
            index: dict[tuple[str | int, ...], list[str]] = defaultdict(list)
            for one in self._by_names[names]:
                index[_values(one.groups, common)].append(one.entry.path)
            self._index[names, common] = index
        return self._index[names, common]


def _values(groups: Mapping[str, str], names: tuple[str, ...]) -> tuple[str | int, ...]:
    return tuple(int(groups[name]) if name == "number" else groups[name] for name in names)


def _annotation(one: _Match, form: str, linked: Mapping[_Link, Mapping[str, str]], places: _Places) -> Annotation:
    rule, groups = one.rule, dict(one.groups)
    structure = groups.pop("structure", "")
    structure = rule.structures.get(structure, structure) or rule.structure
    if not (structure or rule.values or ":" in form):
        raise UsageError(f'{rule.said}: says no structure; give its path a group (?P<structure>…), or say structure = "…"')
    reader = groups.pop("reader", "") or rule.reader
    frame = groups.pop("frame", None)
    number = int(groups["number"]) if "number" in groups else None
    refers_to: dict[str, Any] = (
        {**groups} | ({} if number is None else {"number": number}) | ({} if frame is None else {"frame": int(frame)})
    )
    unpaired, candidates, folder = "", [], None
    if rule.patients and "patient" in groups:
        refers_to["original_id"] = refers_to.pop("patient")
        groups["patient"] = linked[rule.patients].get(groups["patient"], "")
    if groups.get("patient") == "":
        unpaired = f"{rule.patients.table if rule.patients else ''} names no patient with images for it"
    else:
        candidates = places.equal(groups, None if number is None else True)
        if not candidates and number is not None:
            folder = places.folder(places.equal(groups, False))
        if not candidates and folder is None:
            unpaired = f"no image's path has its {' and '.join(name for name in SHARED if name in groups) or 'groups: it has none'}"
    return Annotation(
        one.entry,
        structure=structure,
        reader=reader,
        convention=rule.convention,
        refers_to=refers_to,
        number=number,
        candidates=tuple(candidates),
        folder=folder,
        unpaired=unpaired,
        format=form,
        options={"values": dict(rule.values)} if rule.values else {},
    )


def _rules(tree: Tree, path: str) -> list[_Rule]:
    """Return what the file says."""
    name = posixpath.basename(path)
    try:
        content = tomllib.loads(read_named(tree, path, PATTERN_BYTES).decode())
    except FileError as error:
        raise UsageError(f"{name}: {error}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{name}: is not UTF-8 text") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{name}: is no TOML: {error}") from None
    if unknown := [key for key in content if key not in KEYS]:
        raise UsageError(f"{name}: there is no {', '.join(unknown)}; there is: [[image]], [[annotation]]")
    rules: list[_Rule] = []
    for kind in KEYS:
        entries = content.get(kind, [])
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise UsageError(f"{name}: {kind} must be written [[{kind}]]")
        rules += [_rule(kind, f"{name}: [[{kind}]] {number}", entry) for number, entry in enumerate(entries, start=1)]
    if not any(rule.kind == "image" for rule in rules):
        raise UsageError(f"{name}: has no [[image]]; without images there is nothing to catalog")
    return rules


def _rule(kind: str, said: str, entry: dict[str, Any]) -> _Rule:
    def wrong(message: str) -> UsageError:
        return UsageError(f"{said}: {message}")

    if unknown := [key for key in entry if key not in KEYS[kind]]:
        raise wrong(f"there is no key {', '.join(unknown)}; there is: {', '.join(KEYS[kind])}")
    for key, value in entry.items():
        texts = value.values() if key in ("structures", "values") and isinstance(value, dict) else [value]
        if key != "patients" and not all(isinstance(text, str) and text for text in texts):
            raise wrong(f"{key} must be {'a table of texts' if key in ('structures', 'values') else 'a text'}")
        if key in ("structures", "values") and not isinstance(value, dict):
            raise wrong(f"{key} must be a table of texts")
    if "path" not in entry:
        raise wrong("path is missing")
    try:
        path = re.compile(entry["path"])
    except re.error as error:
        raise wrong(
            f"path is no regular expression: {error.msg}" + ("" if error.pos is None else f" at character {error.pos + 1}")
        ) from None
    if unknown := [group for group in path.groupindex if group not in GROUPS[kind]]:
        raise wrong(f"path has a group {', '.join(unknown)}; there is: {', '.join(GROUPS[kind])}")
    form = entry.get("format", "")
    if form and ":" not in form and form not in ("dicom", "raster", "contour")[: 2 if kind == "image" else 3]:
        raise wrong("format must be dicom, raster, of an annotation contour, or module:function")
    if entry.get("convention", "centre") not in ("corner", "centre"):
        raise wrong("convention must be centre or corner")
    try:
        values = named_values(entry.get("values"))
    except FileError as error:
        raise wrong(str(error)) from None
    link = entry.get("patients")
    if isinstance(link, str):
        link = {"table": link}
    if link is not None and not (
        isinstance(link, dict)
        and "table" in link
        and link.keys() <= set(_Link._fields)
        and all(isinstance(text, str) for text in link.values())
    ):
        raise wrong("patients must be a table's path, or {table = …, original_id = …, patient_id = …}")
    if link is not None and "patient" not in path.groupindex:
        raise wrong("patients says whose the group patient is, which its path has not")
    return _Rule(
        kind="image" if kind == "image" else "annotation",
        said=said,
        path=path,
        format=form,
        convention=entry.get("convention", "centre"),
        structures=entry.get("structures", {}),
        structure=entry.get("structure", ""),
        reader=entry.get("reader", ""),
        patients=None if link is None else _Link(**link),
        values=values,
    )
