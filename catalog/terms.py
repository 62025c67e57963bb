"""What stands in a pseudonymized catalog as it is, since no file can put a name into it: defined terms, our own names and sentences."""

from __future__ import annotations

import functools
import re

# Names of structures and readers that layouts and readers of files give by themselves; "" is nobody.
OWN_NAMES = frozenset((
    "",
    "inner", "outer", "papillary1", "papillary2", "mask", "label", "manual", "auto", "MANUAL", "SEMIAUTOMATIC", "AUTOMATIC",
    "interpolate", "threshold",
))  # fmt: skip
OWN_NUMBERED = re.compile("(label|ROI|segment) [0-9]{1,4}")

# Modality (0008,0060) and Photometric Interpretation (0028,0004): defined terms of PS3.3 C.7.3.1.1.1 and C.7.6.3.1.2, and older ones.
MODALITIES = frozenset((
    "ANN", "AR", "ASMT", "AU", "BDUS", "BI", "BMD", "CD", "CF", "CFM", "CP", "CR", "CS", "CT", "CTPROTOCOL", "DD", "DF", "DG", "DM",
    "DMS", "DOC", "DS", "DX", "EC", "ECG", "EEG", "EMG", "EOG", "EPS", "ES", "FA", "FID", "FS", "GM", "HC", "HD", "IO", "IOL",
    "IVOCT", "IVUS", "KER", "KO", "LEN", "LP", "LS", "M3D", "MA", "MG", "MR", "MS", "NM", "OAM", "OCT", "OP", "OPM", "OPR", "OPT",
    "OPTBSV", "OPTENF", "OPV", "OSS", "OT", "PA", "PLAN", "POS", "PR", "PT", "PX", "REG", "RESP", "RF", "RG", "RTDOSE", "RTIMAGE",
    "RTINTENT", "RTPLAN", "RTRAD", "RTRECORD", "RTSEGANN", "RTSTRUCT", "RWV", "SC", "SEG", "SM", "SMR", "SR", "SRF", "ST", "STAIN",
    "TEXTUREMAP", "TG", "US", "VA", "VF", "XA", "XAPROTOCOL", "XC",
))  # fmt: skip
PHOTOMETRIC = frozenset((
    "MONOCHROME1", "MONOCHROME2", "PALETTE COLOR", "RGB", "HSV", "ARGB", "CMYK", "YBR_FULL", "YBR_FULL_422", "YBR_PARTIAL_422",
    "YBR_PARTIAL_420", "YBR_ICT", "YBR_RCT", "XYB",
))  # fmt: skip

# In the place of messages, which may quote names, UIDs and text of the file.
REASONS = {
    "cache-full": "the cache of decoded images has no room for it; make room on its disk, then try again",
    "changed": "it changed or was taken away while it was read; it is left out; ingest again when it is complete",
    "contour-unreadable": "it is no contour as its format asks for, or is damaged; look at it with another program",
    "file-unreadable": "it cannot be looked at; give read access, then ingest again",
    "folder-link": "a link to a folder elsewhere, which is not followed; put the folder here",
    "folder-unreadable": "its files are not catalogued; give read access, then ingest again",
    "label-twice": "gives one value several names, so it has none; give it one, then ingest again",
    "link-ambiguous": "one name stands with several partners, or the table lies there twice; what contradicts itself is not used",
    "link-columns": "has not the columns that are asked for, or a line is not whole; such lines are left out",
    "link-no-folder": "a line names a patient without a folder of images, so its contours have no images",
    "link-unreadable": "is no text of UTF-8 that can be read, so no contour can be paired by it",
    "missing": "it is not there, or cannot be opened; give read access, or ingest its root again",
    "name-not-utf8": "a name in this folder is not UTF-8, which PostgreSQL cannot store; rename it",
    "name-twice": "lies there under two suffixes, so nothing is paired with it; take one away, then ingest again",
    "no-access": "it cannot be opened; it is left out; give read access, then ingest again",
    "no-decoder": 'no decoder for its pixels is installed; pip install "scanfeed[codecs]"',
    "no-pixels": "it holds no pixels, or they were removed; nothing, if it should have none",
    "not-dicom": "it has the name of an image and is none; remove it, or copy it again",
    "not-labels": "it holds no labels as its format has them; see whether it is an image",
    "path-too-long": "its path is too long for PostgreSQL; give it shorter names",
    "patient-erased": "its patient was erased from this catalog, so it is not taken in again; delete the file",
    "pattern-ambiguous": "several expressions match it; it is left out; make one of them narrower",
    "pattern-number": "what an expression takes as its number is no whole number of up to 9 digits; it is left out",
    "reader-died": "the process that read it died; it is left out; look at it with another program",
    "reader-failed": "reading it failed; it is left out; look at it with another program",
    "table-ambiguous": "lines contradict each other; none of these is used",
    "table-columns": "has not the columns that are asked for; say by --column which is which",
    "table-outside": "holds labels but lies outside the root, so they have no file to stand for them; put it below the root",
    "table-path": "a line names a file that is not there, or not below the root; it is left out",
    "table-row": "a line cannot be used as it is; it is left out",
    "table-unreadable": "is no table that can be read; save it again as CSV in UTF-8, or as Parquet",
    "truncated": "it ends too early, or is not what its header says; copy it again from where it came from",
}  # fmt: skip
REASON = "it cannot be used; look at it with another program, or copy it again from where it came from"
# Codes of our own readers without a sentence of their own.
CODES = frozenset((
    "unreadable", "raster-values", "raster-too-large", "not-raster", "no-frame", "not-rtstruct", "not-seg", "not-idx", "not-nifti",
    "seg-tiled", "contour-empty", "shape", "dicomdir", "cache-limit", "cache-unusable",
)) | REASONS.keys()  # fmt: skip


@functools.cache
def registered() -> frozenset[str]:
    """Return the UIDs of the standard (PS3.6 A): classes, transfer syntaxes; and GE's transfer syntax, which pydicom reads."""
    from pydicom import _uid_dict

    return frozenset(_uid_dict.UID_dictionary) | {"1.2.840.113619.5.2"}
