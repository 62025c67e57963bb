"""Sunnybrook cardiac data as the four exercises had it.

Recognised by ``link.csv`` beside ``dicoms/`` or ``contourfiles/``::

    link.csv                                                       patient_id,original_id
    dicoms/<patient_id>/<n>.dcm
    contourfiles/<original_id>/i-contours/IM-0001-<nnnn>-icontour-manual.txt   inner
    contourfiles/<original_id>/o-contours/IM-0001-<nnnn>-ocontour-manual.txt   outer

Contour nnnn belongs to image n of the linked patient: to the file of that number, else to the image of that InstanceNumber.
``original_id`` stands nowhere in the DICOM files: link.csv is the only bridge.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter, defaultdict
from typing import Literal

from catalog.layouts import Annotation, Entry, Found, Image, Problem, Tree

# The whole name: a loose pattern takes an editor's swap file beside the contours for one of them.
CONTOUR = re.compile(r"IM-\d{4}-(?P<number>\d{1,9})-(?P<kind>[io])contour-(?P<reader>[A-Za-z0-9]+)\.txt", re.ASCII)
NUMBERED = re.compile(r"(?P<number>\d{1,9})(\.[^.]*)?", re.ASCII)
STRUCTURES = {"i": "inner", "o": "outer"}
# Of the two conventions the one in which the contours' polygons and masks agree; see docs/decisions.md.
CONVENTION: Literal["corner", "centre"] = "centre"
LINK_BYTES = 64 * 1024 * 1024


def recognises(tree: Tree) -> bool:
    """Is there a link.csv beside a folder of images or contours?"""
    return (tree.root / "link.csv").is_file() and any((tree.root / name).is_dir() for name in ("dicoms", "contourfiles"))


def read(tree: Tree) -> Found:
    """Return the images and contours of the tree; nothing in it raises: what is wrong becomes a `Problem`."""
    found = Found(problems=list(tree.problems))
    lines = _link(tree, found)
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


def _link(tree: Tree, found: Found) -> dict[int, tuple[str, str]]:
    """Return line number → (patient_id, original_id) of link.csv, without the lines that contradict each other."""

    def refuse(code: str, message: str) -> None:
        found.problems.append(Problem("link.csv", code, message))

    path = tree.root / "link.csv"
    try:
        if path.stat().st_size > LINK_BYTES:
            refuse("link-unreadable", "is over 64 MiB, so it is no link table")
            return {}
        content = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        refuse("link-unreadable", f"{error.strerror}: no contour can be paired without it; give read access, then ingest again")
        return {}
    except UnicodeDecodeError:
        refuse("link-unreadable", "is not UTF-8 text: no contour can be paired without it; save it as UTF-8, then ingest again")
        return {}
    if "\0" in content:
        refuse(
            "link-unreadable", "holds NUL bytes, so it is no text: no contour can be paired without it; save it as UTF-8, then ingest again"
        )
        return {}
    lines: dict[int, tuple[str, str]] = {}
    try:
        reader = csv.reader(io.StringIO(content, newline=""), strict=True)
        header = [name.strip().lower() for name in next(reader, [])]
        missing = [name for name in ("patient_id", "original_id") if name not in header]
        if missing:
            refuse("link-columns", f"line 1: no column {' and no column '.join(missing)}; the header must be patient_id,original_id")
            return {}
        patient_at, original_at = header.index("patient_id"), header.index("original_id")
        for row in reader:
            values = [value.strip() for value in row]
            if not any(values):
                continue
            if len(values) <= max(patient_at, original_at) or not values[patient_at] or not values[original_at]:
                refuse("link-columns", f"line {reader.line_num}: patient_id or original_id is missing; the line is left out")
                continue
            lines[reader.line_num] = (values[patient_at], values[original_at])
    except csv.Error as error:
        refuse("link-columns", f"line {reader.line_num}: {error}; the lines from here on are left out")
    counts = [Counter(pair[at] for pair in set(lines.values())) for at in (0, 1)]
    for at, name in ((0, "patient_id"), (1, "original_id")):
        doubled = [number for number, pair in lines.items() if counts[at][pair[at]] > 1]
        if doubled:
            listed = ", ".join(map(str, doubled))
            refuse("link-ambiguous", f"lines {listed}: one {name} stands with several partners; none of these lines is used")
    return {number: pair for number, pair in lines.items() if counts[0][pair[0]] == counts[1][pair[1]] == 1}
