"""IDX files as MNIST and its family name them.

Recognised by their names, in any folder, with or without ``.gz``; images and labels of one folder and one set belong together::

    t10k-images-idx3-ubyte    t10k-labels-idx1-ubyte                  MNIST, Fashion-MNIST, KMNIST
    t10k-images.idx3-ubyte    t10k-labels.idx1-ubyte                  as some sites unpack them
    emnist-letters-train-images-idx3-ubyte   …-train-labels-idx1-ubyte
    images.idx3-ubyte         labels.idx1-ubyte

Label i is that of image i. The set ("t10k", "emnist-letters-train") is the patient, since the format names nobody: below the root with
its folder ("fashion/t10k"), and "idx" where there is neither. Of a file that lies there both plain and gzip'd,
as downloads leave them, the plain one is taken.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from catalog.layouts import Annotation, Entry, Found, Image, Tree

NAME = re.compile(
    r"(?P<set>.*?)[-_.]?((?P<images>images?)(?P<separator>[-_.])idx3|labels?(?P<separator1>[-_.])idx1)"
    r"[-_.](ubyte|byte|short|int|float|double)(?P<gz>\.gz)?",
    re.ASCII | re.IGNORECASE,
)


@dataclass(slots=True)
class _Set:
    """Files whose names differ only in images or labels, and ``.gz``."""

    patient: str
    images: list[Entry] = field(default_factory=list)
    labels: list[Entry] = field(default_factory=list)


def recognises(tree: Tree) -> str | None:
    """Say why the tree holds IDX files, or None."""
    named = (entry for entry in tree.entries if "idx" in entry.path.lower())
    names = [name for entry in named if (match := NAME.fullmatch(name := entry.path.rpartition("/")[2])) and match["images"]]
    return f"{len(names)} IDX files of images, such as {names[0]}" if names else None


def read(tree: Tree, options: Mapping[str, Any]) -> Found:
    """Return the images and labels of the tree; nothing in it raises."""
    found = Found(problems=list(tree.problems))
    sets: dict[tuple[str, str, str], _Set] = {}
    for entry in tree.entries:
        folder, _, name = entry.path.rpartition("/")
        if not (match := NAME.fullmatch(name)):
            found.left_over += 1
            continue
        patient = "/".join(part for part in (folder, match["set"]) if part) or "idx"
        one = sets.setdefault((folder, match["set"], match["separator"] or match["separator1"]), _Set(patient))
        (one.images if match["images"] else one.labels).append(entry)
    for one in sets.values():
        images, labels = _plain(one.images), _plain(one.labels)
        found.left_over += len(one.images) + len(one.labels) - len(images) - len(labels)
        found.images += [Image(entry, one.patient, sure=True, format="idx") for entry in images]
        why = "" if len(images) == 1 else "several files of images have this name" if images else "no file of images has this name"
        wanted = {"image_path": images[0].path} if len(images) == 1 else {}
        found.annotations += [Annotation(entry, reader="manual", unpaired=why, format="idx", options=wanted) for entry in labels]
    return found


def _plain(entries: list[Entry]) -> list[Entry]:
    return [entry for entry in entries if not entry.path.lower().endswith(".gz")] or entries
