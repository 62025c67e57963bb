"""Any tree of DICOM files, with or without DICOMDIR, suffix, preamble or Part 10 header.

Recognised by a file that begins as DICOM does. Every file whose name does not say that it is something else is looked at; patient, study
and series are what the files themselves say. RT Structure Sets and Segmentations among them are annotations: they say themselves which
image they were drawn on, by its UID, else by the plane in which they lie (`catalog.rtstruct`, `catalog.seg`). Plans, reports and
waveforms are catalogued as instances without images. A DICOMDIR (PS3.10 8) only repeats what its files say, and is left over.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

from catalog import dicom
from catalog.errors import FileError
from catalog.layouts import Entry, Found, Image, Tree

SURE = (".dcm", ".dicom", ".dic", ".ima")
# Suffixes of what is certainly something else. Names without a suffix, and numbers or UIDs as names, are DICOM's own habit.
OTHERS = (
    ".txt .csv .tsv .json .toml .yaml .yml .xml .html .htm .md .rst .pdf .doc .docx .xls .xlsx .png .jpg .jpeg .gif .bmp .tif .tiff .svg "
    ".zip .gz .tgz .tar .bz2 .xz .7z .nii .nrrd .nhdr .mha .mhd .raw .npy .npz .h5 .hdf5 .pkl .pt .pth .mat .parquet .py .ipynb .sh .log "
    ".ini .cfg .db .sqlite .exe .dll .so .whl .license .sha256 .md5 .swp "
)
LOOKED_AT = 64  # files that are opened to find one that is DICOM


def recognises(tree: Tree) -> str | None:
    """Is there a DICOM file in it?"""
    if (sure := sum(entry.path.lower().endswith(SURE) for entry in tree.entries)) > 0:
        return f"{sure} files named as DICOM"
    for entry in islice(filter(_may_be, tree.entries), LOOKED_AT):
        try:
            if dicom.begins(tree.start(entry.path, 132)):
                return "files that begin as DICOM does"
        except FileError:
            continue
    return None


def read(tree: Tree, options: Mapping[str, Any]) -> Found:
    """Return every file that may be DICOM."""
    given = dict(options)
    images = []
    for entry in tree.entries:
        sure = entry.path.lower().endswith(SURE)
        if sure or _may_be(entry):
            images.append(Image(entry, None, sure, options=given))
    found = Found(images=images)
    found.left_over = len(tree.entries) - len(found.images)
    return found


def _may_be(entry: Entry) -> bool:
    name = entry.path.rpartition("/")[2].lower()
    at = name.rfind(".")
    return entry.size > 0 and name != "dicomdir" and (at < 0 or f"{name[at:]} " not in OTHERS)
