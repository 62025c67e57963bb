"""NIfTI volumes as nnU-Net and the Medical Segmentation Decathlon have them, any folders ``images`` and ``labels``, or by themselves.

Recognised by files named ``.nii`` or ``.nii.gz``. Anywhere below the root, folders beside each other are a data set::

    dataset.json                         the labels' names; may be missing: then they are "label 1" …
    imagesTr/case.nii.gz                 Decathlon: image and label volume have one name
    imagesTr/case_0000.nii.gz            nnU-Net: one file a channel, counted from 0000
    labelsTr/case.nii.gz
    imagesTs/…  labelsTs/…               the same, with or without labels
    images/…    labels/…                 the same

The case is the patient. Which of the two names a pair of folders has is decided for all of it: if any label volume has an image of its
own name, equal names; else channels. A label volume belongs to every channel of its case, which by nnU-Net's definition share one
geometry; the same holds for the channels in a Decathlon's 4-D image, if dataset.json counts as many. Other files in a data set are
left over: they may be predictions.

Volumes that lie in no data set are images without annotations, each a patient of its own, named by its path.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from catalog.errors import FileError
from catalog.layouts import Annotation, Entry, Found, Image, Problem, Tree

CHANNEL = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})", re.ASCII)
PAIRS = {"imagesTr": "labelsTr", "imagesTs": "labelsTs", "images": "labels"}
MOST_CHANNELS = 16  # more than any scanner's; a folder of files 0000 to 0099 is a hundred patients
TABLE_BYTES = 64 * 1024 * 1024
LONGEST_NAME = 200


@dataclass(slots=True)
class _Names:
    """What dataset.json says."""

    labels: dict[str, str] = field(default_factory=dict)  # "1", or "1,2" for a structure of both, → structure
    channels: int = 1


def recognises(tree: Tree) -> str | None:
    """Say why the tree holds NIfTI volumes, or None."""
    volumes = [entry.path for entry in tree.entries if ".nii" in entry.path.lower() and _stem(entry.path) is not None]
    if not volumes:
        return None
    folders = {path.rpartition("/")[0].rpartition("/")[2] for path in volumes}
    for images, labels in PAIRS.items():
        if {images, labels} <= folders:
            table = any(entry.path.rpartition("/")[2] == "dataset.json" for entry in tree.entries)
            return f"{'dataset.json beside ' if table else ''}{images}/ and {labels}/ with NIfTI files"
    return f"{len(volumes)} NIfTI files"


def read(tree: Tree, options: Mapping[str, Any]) -> Found:
    """Return the volumes and label volumes of the tree; nothing in it raises: what is wrong becomes a `Problem`."""
    found = Found(problems=list(tree.problems))
    sides: dict[str, dict[str, list[Entry]]] = defaultdict(lambda: defaultdict(list))  # data set → folder's name → volumes
    tables: dict[str, Entry] = {}
    others: list[Entry] = []
    for entry in tree.entries:
        folder, _, name = entry.path.rpartition("/")
        above, _, last = folder.rpartition("/")
        if name == "dataset.json":
            tables[folder] = entry
        elif _stem(name) is not None and (last in PAIRS or last in PAIRS.values()):
            sides[above][last].append(entry)
        else:
            others.append(entry)
    for folder, volumes in sides.items():
        names = _names(tree, tables[folder], found) if folder in tables else _Names()
        for images, labels in PAIRS.items():
            _pair(volumes.get(images, []), volumes.get(labels, []), images, names, found)
    within = tuple(f"{folder}/" if folder else "" for folder in sides)
    for entry in others:
        if (stem := _stem(entry.path)) is None or entry.path.startswith(within):
            found.left_over += 1
        else:
            found.images.append(Image(entry, stem, sure=True, format="nifti"))
    found.left_over += len(tables.keys() - sides.keys())
    found.images.sort(key=lambda image: image.entry.path)
    found.annotations.sort(key=lambda drawn: drawn.entry.path)
    return found


def _pair(images: list[Entry], labels: list[Entry], folder: str, names: _Names, found: Found) -> None:
    """Add the volumes of one folder of images and its folder of labels."""
    twice = _twice(images) | _twice(labels)
    for name in sorted(twice):
        first = next(entry for entry in (*images, *labels) if _name(entry) == name)
        again = "lies there under two suffixes, so nothing is paired with it; take one away, then ingest again"
        found.problems.append(Problem(first.path, "name-twice", again))
    by_channel = _by_channel(images, labels)
    of_case: dict[str, list[Entry]] = defaultdict(list)
    for entry in images:
        match = CHANNEL.fullmatch(_name(entry)) if by_channel else None
        case = match["case"] if match else _name(entry)
        of_case[case].append(entry)
        found.images.append(Image(entry, case, sure=True, format="nifti"))
    for entry in labels:
        case = of_case[_name(entry)]
        why = "" if case else f"{folder}/ holds no image of this name"
        if not twice.isdisjoint(map(_name, (entry, *case))):
            case, why = [], "two files have this name"
        paths = [image.path for image in case]
        wanted: dict[str, Any] = {"labels": names.labels, "channels": names.channels}
        if paths:
            wanted["image_path"] = paths if len(paths) > 1 else paths[0]
        found.annotations.append(Annotation(entry, reader="manual", unpaired=why, format="nifti", options=wanted))


def _twice(entries: list[Entry]) -> set[str]:
    return {name for name, count in Counter(map(_name, entries)).items() if count > 1}


def _by_channel(images: list[Entry], labels: list[Entry]) -> bool:
    """Are these nnU-Net's names? Without labels: if every file has a channel, and each case all of them from 0000 on."""
    names = {_name(entry) for entry in images}
    if labels:
        return names.isdisjoint(_name(entry) for entry in labels)
    channels: dict[str, list[int]] = defaultdict(list)
    for name in names:
        if not (match := CHANNEL.fullmatch(name)):
            return False
        channels[match["case"]].append(int(match["channel"]))
    return all(len(each) <= MOST_CHANNELS and sorted(each) == list(range(len(each))) for each in channels.values())


def _names(tree: Tree, table: Entry, found: Found) -> _Names:
    """Return what dataset.json says, less what cannot be meant."""
    try:
        data = json.loads(tree.read(table.path, TABLE_BYTES))
        labels, channels = data.get("labels", {}), data.get("channel_names", data.get("modality", {}))
        pairs = [_meant(str(key), value) for key, value in labels.items()]
    except FileError as error:
        found.problems.append(Problem(table.path, error.code, str(error)))
        return _Names()
    except (ValueError, AttributeError, TypeError, RecursionError):
        found.problems.append(Problem(table.path, "table-unreadable", "is no JSON with labels as nnU-Net and Decathlon write them"))
        return _Names()
    values: dict[str, set[int]] = defaultdict(set)
    for name, these in pairs:
        values[name] |= these
    named: dict[str, list[str]] = defaultdict(list)
    for name, these in values.items():
        if these != {0}:
            named[",".join(map(str, sorted(these)))].append(name)
    for key, names in named.items():
        if len(names) > 1:
            found.problems.append(
                Problem(table.path, "label-twice", f"gives value {key} {len(names)} names, so it has none; give it one, then ingest again")
            )
    count = len(channels) if isinstance(channels, dict) else 1
    return _Names({key: names[0] for key, names in named.items() if len(names) == 1}, max(1, count))


def _meant(key: str, value: object) -> tuple[str, set[int]]:
    """Return name and values of one entry: name → value or values in nnU-Net's, value → name in Decathlon's."""
    name, numbers = (value, [int(key)]) if isinstance(value, str) else (key, value if isinstance(value, list) else [value])
    if not all(isinstance(number, int) and not isinstance(number, bool) for number in numbers) or not numbers:
        raise ValueError
    if not 0 < len(name) <= LONGEST_NAME:
        raise ValueError
    return name, set(numbers)


def _stem(path: str) -> str | None:
    """Return a path without the suffix of a NIfTI file, or None. A pair's .hdr counts: its reader says what to do with it."""
    lower = path.lower()
    for suffix in (".nii.gz", ".nii", ".hdr"):
        if lower.endswith(suffix) and len(path.rpartition("/")[2]) > len(suffix):
            return path[: -len(suffix)]
    return None


def _name(entry: Entry) -> str:
    return (_stem(entry.path) or entry.path).rpartition("/")[2]
