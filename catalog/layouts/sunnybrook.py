"""Sunnybrook cardiac data: as arranged for teaching, and as published.

Arranged, recognised by ``link.csv`` beside ``dicoms/`` or ``contourfiles/``::

    link.csv                                                       patient_id,original_id
    dicoms/<patient_id>/<n>.dcm
    contourfiles/<original_id>/i-contours/IM-0001-<nnnn>-icontour-manual.txt

Contour nnnn belongs to image n of the linked patient: to the file of that number, else to the image of that InstanceNumber.

As published, recognised by images or contours of these names, also below folders named ``SCD_…``::

    scd_patientdata.csv                                            PatientID,OriginalID and others; anywhere, or absent
    SCD_IMAGES_01/SCD0000101/CINESAX_300/IM-0003-<nnnn>.dcm
    SC-HF-I-01/contours-manual/IRCCI-expert/IM-0001-<nnnn>-icontour-manual.txt

The 0003 is the image's series; the 0001 of the contour is the same for all and says nothing. So contour nnnn belongs to the linked
patient's images of number nnnn, of whatever series: where several have one, all are proposed and none is chosen. Its reader is the
folder's name. The table writes SC-HF-I-1 where the folder is SC-HF-I-01: zeros before a number do not count, unless two names differ by
nothing else. Without the table no contour is paired.

Of both, ``icontour`` is the structure ``inner``, ``ocontour`` is ``outer``, ``p1contour`` and ``p2contour`` are ``papillary1`` and
``papillary2``. The original id stands nowhere in the DICOM files: the table is the only bridge.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any, Literal

from catalog.errors import FileError
from catalog.layouts import Annotation, Entry, Found, Image, Problem, Tree

# The whole name: a loose pattern takes an editor's swap file beside the contours for one of them.
CONTOUR = re.compile(r"IM-\d{4}-(?P<number>\d{1,9})-(?P<kind>[io]|p[12])contour-(?P<reader>[A-Za-z0-9]+)\.txt", re.ASCII)
NUMBERED = re.compile(r"(?P<number>\d{1,9})(\.[^.]*)?", re.ASCII)
PUBLISHED_IMAGE = re.compile(r"IM-\d{4}-(?P<number>\d{1,9})\.dcm", re.ASCII)
PUBLISHED_FOLDER = re.compile(r"(?P<above>(?:.*/)?)(?P<patient>SCD\d{7})/.+", re.ASCII | re.DOTALL)
PUBLISHED_CONTOUR = re.compile(
    r"(?P<above>(?:.*/)?)(?P<original>SC-[A-Z]+(?:-[A-Z]+)*-\d+)/contours-manual/(?P<reader>[^/]+)/"
    + CONTOUR.pattern.replace("<reader>", "<how>"),
    re.ASCII,
)
OWN_FOLDERS = re.compile("(?:SCD_[^/]+/)*")
STRUCTURES = {"i": "inner", "o": "outer", "p1": "papillary1", "p2": "papillary2"}
# Of the two conventions the one in which the contours' polygons and masks agree; see docs/decisions.md.
CONVENTION: Literal["corner", "centre"] = "centre"
LINK_BYTES = 64 * 1024 * 1024


# What stands in some path of every such folder: without it nobody need look closer.
MARKS = ("link.csv", "contours-manual/", "SCD")


def recognises(tree: Tree) -> str | None:
    """Return why this is one of the two forms, or None."""
    if _is_arranged(tree) and any(entry.path == "link.csv" for entry in tree.entries):
        return "link.csv beside dicoms/ or contourfiles/"
    for entry in tree.entries:
        drawn = PUBLISHED_CONTOUR.fullmatch(entry.path)
        if drawn and OWN_FOLDERS.fullmatch(drawn["above"]):
            return f"{drawn['above']}SC-…/contours-manual/"
        image = PUBLISHED_FOLDER.fullmatch(entry.path)
        if image and OWN_FOLDERS.fullmatch(image["above"]) and PUBLISHED_IMAGE.fullmatch(entry.path.rpartition("/")[2]):
            return f"{image['above']}SCD…/<series>/IM-ssss-nnnn.dcm"
    return None


def read(tree: Tree, options: Mapping[str, Any]) -> Found:
    """Return the images and contours of the tree; nothing in it raises: what is wrong becomes a `Problem`."""
    return _read_arranged(tree) if _is_arranged(tree) else _read_published(tree)


def read_link(tree: Tree, path: str, patient: str, original: str, problems: list[Problem]) -> dict[int, tuple[str, str]]:
    """Return line number → (patient, original) of a table of two columns, without the lines that contradict each other.

    Args:
        path: The table, a CSV of UTF-8, relative to the root.
        patient: The column of the patient's name, whatever its case, and `original` that of its name with the annotations.
        problems: Gets what is wrong with the table, with line numbers.
    """

    def refuse(code: str, message: str) -> None:
        problems.append(Problem(path, code, message))

    useless = "no contour can be paired without it"
    try:
        content = tree.read(path, LINK_BYTES).decode("utf-8-sig")
    except FileError as error:
        refuse("link-unreadable", f"{error}: {useless}")
        return {}
    except UnicodeDecodeError:
        refuse("link-unreadable", f"is not UTF-8 text: {useless}; save it as UTF-8, then ingest again")
        return {}
    if "\0" in content:
        refuse("link-unreadable", f"holds NUL bytes, so it is no text: {useless}; save it as UTF-8, then ingest again")
        return {}
    lines: dict[int, tuple[str, str]] = {}
    try:
        reader = csv.reader(io.StringIO(content, newline=""), strict=True)
        header = [name.strip().lower() for name in next(reader, [])]
        missing = [name for name in (patient, original) if name.lower() not in header]
        if missing:
            refuse("link-columns", f"line 1: no column {' and no column '.join(missing)}; the header must be {patient},{original}")
            return {}
        patient_at, original_at = header.index(patient.lower()), header.index(original.lower())
        for row in reader:
            values = [value.strip() for value in row]
            if not any(values):
                continue
            if len(values) <= max(patient_at, original_at) or not values[patient_at] or not values[original_at]:
                refuse("link-columns", f"line {reader.line_num}: {patient} or {original} is missing; the line is left out")
                continue
            lines[reader.line_num] = (values[patient_at], values[original_at])
    except csv.Error as error:
        refuse("link-columns", f"line {reader.line_num}: {error}; the lines from here on are left out")
    counts = [Counter(pair[at] for pair in set(lines.values())) for at in (0, 1)]
    for at, name in ((0, patient), (1, original)):
        doubled = [number for number, pair in lines.items() if counts[at][pair[at]] > 1]
        if doubled:
            listed = ", ".join(map(str, doubled))
            refuse("link-ambiguous", f"lines {listed}: one {name} stands with several partners; none of these lines is used")
    return {number: pair for number, pair in lines.items() if counts[0][pair[0]] == counts[1][pair[1]] == 1}


def _is_arranged(tree: Tree) -> bool:
    return any(entry.path.startswith(("dicoms/", "contourfiles/")) for entry in tree.entries)


def _read_arranged(tree: Tree) -> Found:
    found = Found(problems=list(tree.problems))
    lines = read_link(tree, "link.csv", "patient_id", "original_id", found.problems)
    patients = {entry.path.split("/")[1] for entry in tree.entries if _is_image(entry)}
    for number, (patient, original) in lines.items():
        if patient in patients:  # without contours is no error
            found.originals[patient] = original
        else:
            problem = f"line {number}: dicoms/ has no folder of this patient_id, so its contours have no images"
            found.problems.append(Problem("link.csv", "link-no-folder", problem))
    linked = {original: patient for patient, original in found.originals.items()}
    numbered: dict[tuple[str, int], list[str]] = defaultdict(list)
    for entry in tree.entries:
        if _is_image(entry) and (name := NUMBERED.fullmatch(entry.path.rpartition("/")[2])):
            numbered[entry.path.split("/")[1], int(name["number"])].append(entry.path)
    for entry in tree.entries:
        contour = CONTOUR.fullmatch(entry.path.rpartition("/")[2])
        if entry.path.startswith("contourfiles/") and contour and entry.path.count("/") > 1:
            original, number = entry.path.split("/")[1], int(contour["number"])
            owner = linked.get(original)
            found.annotations.append(
                Annotation(
                    entry=entry,
                    structure=STRUCTURES[contour["kind"]],
                    reader=contour["reader"],
                    convention=CONVENTION,
                    refers_to={"original_id": original, "number": number},
                    number=number,
                    candidates=tuple(numbered[owner, number]) if owner else (),
                    folder=f"dicoms/{owner}" if owner else None,
                    unpaired="" if owner else "link.csv names no patient with images for this folder",
                )
            )
        elif _is_image(entry):
            parts = entry.path.split("/")
            found.images.append(Image(entry, patient=parts[1], sure=bool(NUMBERED.fullmatch(parts[-1]))))
        elif entry.path != "link.csv":
            found.left_over += 1
    return found


def _is_image(entry: Entry) -> bool:
    return entry.path.startswith("dicoms/") and entry.path.count("/") > 1


def _read_published(tree: Tree) -> Found:
    found = Found(problems=list(tree.problems))
    numbered: dict[tuple[str, int], list[str]] = defaultdict(list)
    contours: list[tuple[Entry, re.Match[str]]] = []
    tables = [entry.path for entry in tree.entries if entry.path.rpartition("/")[2].lower() == "scd_patientdata.csv"]
    for entry in tree.entries:
        name = entry.path.rpartition("/")[2]
        if drawn := PUBLISHED_CONTOUR.fullmatch(entry.path):
            contours.append((entry, drawn))
        elif folder := PUBLISHED_FOLDER.fullmatch(entry.path):
            image = PUBLISHED_IMAGE.fullmatch(name)
            found.images.append(Image(entry, patient=folder["patient"], sure=image is not None))
            if image:
                numbered[folder["patient"], int(image["number"])].append(entry.path)
        elif entry.path not in tables:
            found.left_over += 1
    owners, why = _owners(tree, tables, {drawn["original"] for _, drawn in contours}, found)
    for entry, drawn in contours:
        number, owner = int(drawn["number"]), owners.get(drawn["original"])
        candidates = tuple(numbered[owner, number]) if owner else ()
        found.annotations.append(
            Annotation(
                entry=entry,
                structure=STRUCTURES[drawn["kind"]],
                reader=drawn["reader"],
                convention=CONVENTION,
                refers_to={"original_id": drawn["original"], "number": number},
                number=number,
                candidates=candidates,
                unpaired="" if candidates else f"no image file of this patient has number {number}" if owner else why,
            )
        )
    return found


def _owners(tree: Tree, tables: list[str], originals: set[str], found: Found) -> tuple[dict[str, str], str]:
    """Return original as the contours' folders have it → patient with images; and why one of them has none."""
    if not tables:
        return {}, "there is no scd_patientdata.csv to say whose contour this is; put it beside the images, then ingest again"
    if len(tables) > 1:
        several = f"there are {len(tables)} files of this name, so which patient a contour is of is not certain; keep one"
        found.problems += [Problem(path, "link-ambiguous", several) for path in tables]
        return {}, "there are several scd_patientdata.csv; keep one"
    patients = {image.patient for image in found.images}
    linked: dict[str, str] = {}
    for patient, original in read_link(tree, tables[0], "PatientID", "OriginalID", found.problems).values():
        # The table is that of the whole archive: a patient who is not here is no error.
        if patient in patients:
            found.originals[patient] = original
            linked[original] = patient
    # Each plain name, and how many write it: SC-HF-I-1 and SC-HF-I-01 are one only where the table, or the folders, do not have both.
    plain = {_plain(original): patient for original, patient in linked.items()}
    written = Counter(map(_plain, linked)), Counter(map(_plain, originals))
    owners = {}
    for original in originals:
        short = _plain(original)
        if original in linked:
            owners[original] = linked[original]
        elif short in plain and written[0][short] == written[1][short] == 1:
            owners[original] = plain[short]
    return owners, "scd_patientdata.csv names no patient with images for this folder"


def _plain(original: str) -> str:
    return re.sub(r"(?<![0-9])0+(?=[0-9])", "", original)
