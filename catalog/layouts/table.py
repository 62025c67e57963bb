"""A table of the user's own, CSV or Parquet, a row an image with what was drawn on it: brings in any layout without code.

Never recognised, only asked for: ``catalog ingest FOLDER --table scans.csv``. Columns, by the names of their roles or as the option
``columns`` names them::

    image       path of the image file, relative to the root or absolute below it; several rows may name one image
    annotation  path of what was drawn on it: .txt and .csv points in px, centres of pixels at whole numbers; .png .tif .tiff .bmp .gif
                .jpg .jpeg masks; anything else DICOM (RTSTRUCT, SEG), which says itself what it holds and what it refers to
    patient     without it the DICOM file says it; of a raster image it is the folder's name
    structure   without it a file of points or a mask is of the structure `mask`, a label of one named as its column
    label       a class of the whole image, instead of an annotation file or besides it
    reader      who drew it
    frame       which image of the file, from 0; without it a file of several images gives proposed pairings
    split       train, val, …: kept with what the row draws (`refers_to`)

Only ``image`` must be there. A row belongs to the image that it names. Raster images are read by `catalog.raster`, others as DICOM.
The option ``values`` says what the values of masks stand for, as in `catalog.raster.read_annotations`.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
import posixpath
import re
from collections import defaultdict
from collections.abc import Callable, Container, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from catalog.errors import FileError, UsageError
from catalog.layouts import Annotation, Entry, Found, Image, Problem, Tree
from catalog.raster import named_values
from catalog.records import Drawn

ROLES = ("image", "annotation", "patient", "structure", "label", "reader", "frame", "split")
RASTERS = (".png", ".tif", ".tiff", ".bmp", ".gif", ".jpg", ".jpeg")
POINTS = (".txt", ".csv")
TABLE_BYTES = 64 * 1024 * 1024
MOST_ROWS = 10_000_000  # a Parquet file of a few KB can promise 2⁶³
MOST_BYTES = 1 << 30
LONGEST = 200  # characters of a patient, structure, reader, label or split; PS3.5 6.2 allows 64
LONGEST_KEY = 1_000  # bytes; PostgreSQL indexes at most 2,704


@dataclass(frozen=True, slots=True)
class _Row:
    at: str  # "line 3", for messages
    values: dict[str, str]  # role → value, without empty ones
    image: Entry
    annotation: Entry | None
    frame: int | None


def recognises(tree: Tree) -> str | None:
    """None: a table is asked for, never found."""
    return None


def read(tree: Tree, options: Mapping[str, Any]) -> Found:
    """Return the images and annotations that a table names. What is wrong with it becomes a `Problem` with the line.

    Args:
        options: ``table``, its path, absolute or relative to the root; ``columns``, role → column's name; ``separator``, by default a
            comma, or a tab in a .tsv; ``values``.

    Raises:
        UsageError: If an option cannot be right.
    """
    columns = _columns(options)
    try:
        values = named_values(options.get("values"))
    except FileError as error:
        raise UsageError(str(error)) from None
    found = Found(problems=list(tree.problems))
    table = os.path.normpath(str(options["table"]))
    path = posixpath.relpath(table, tree.root) if Path(table).is_relative_to(tree.root) else table
    entries = {entry.path: entry for entry in tree.entries}
    shown = path if path in entries else Path(path).name

    def refuse(code: str, message: str) -> None:
        found.problems.append(Problem(shown, code, message))

    try:
        data = read_named(tree, path, TABLE_BYTES)
        named = options.get("columns") or {}
        parquet = data[:4] == b"PAR1"
        records = _of_parquet(data, columns, named) if parquet else _of_csv(data, columns, named, _separator(options, path), refuse)
        rows = [row for at, values in records if (row := _row(tree, entries, at, values, refuse)) is not None]
    except FileError as error:
        refuse("table-unreadable" if error.code == "unreadable" else error.code, str(error))
        return found
    rows = _without_contradictions(rows, refuse)
    patients = {row.image.path: row.values["patient"] for row in rows if "patient" in row.values}
    seen: set[str] = {path}
    for row in rows:
        for entry in filter(None, (row.image, row.annotation)):
            if entry.path in seen:
                continue
            seen.add(entry.path)
            form = format_of(entry.path)
            if entry is row.annotation and form != "dicom":
                found.annotations.append(_annotation(row, entry, form, values))
                continue
            # RTSTRUCT and SEG are told from images by what stands in them.
            folder = posixpath.basename(posixpath.dirname(entry.path)) or tree.root.name
            patient = patients.get(row.image.path, folder if form == "raster" else None)
            found.images.append(Image(entry, patient, sure=True, format="raster" if form == "raster" else "dicom"))
    if labels := [_label(row, columns["label"]) for row in rows if "label" in row.values]:
        if path in entries:
            found.annotations.append(Annotation(entries[path], format="table-label", options={"rows": labels}))
        else:
            refuse("table-outside", "holds labels but lies outside the root, so they have no file to stand for them; put it below the root")
    found.left_over = len(entries.keys() - seen)
    return found


def read_annotations(path: Path, options: Mapping[str, Any]) -> list[Drawn]:
    """Return the labels of a table, one a row of ``options["rows"]``, which `read` made: the file is not opened again."""
    drawn = []
    for row in options["rows"]:
        refers_to = {name: row[name] for name in ("path", "frame", "split") if name in row}
        key = json.dumps([row["path"], row.get("frame"), row["structure"], row["reader"]], ensure_ascii=False)
        if len(key.encode()) > LONGEST_KEY:
            key = hashlib.sha256(key.encode()).hexdigest()
        drawn.append(Drawn(key, row["structure"], row["reader"], "label", refers_to, label=row["label"]))
    return drawn


def read_named(tree: Tree, path: str, limit: int) -> bytes:
    """Return a small file that an option names: below the root, or an absolute path on this machine, wherever the root lies.

    Raises:
        FileError: If it is over `limit` bytes or cannot be read.
    """
    if not posixpath.isabs(path):
        return tree.read(path, limit)
    try:
        with Path(path).open("rb") as file:
            data = file.read(limit + 1)
    except FileNotFoundError:
        raise FileError("unreadable", "there is no such file") from None
    except OSError as error:
        raise FileError("unreadable", f"{error.strerror}; give read access, then ingest again") from None
    if len(data) > limit:
        raise FileError("unreadable", f"is over {limit} bytes, so it is not what its name says")
    return data


def format_of(path: str) -> str:
    """Return the format of a file by its name: ``raster``, ``contour``, else ``dicom``."""
    small = path.lower()
    return "raster" if small.endswith(RASTERS) else "contour" if small.endswith(POINTS) else "dicom"


def _annotation(row: _Row, entry: Entry, form: str, values: dict[str, str]) -> Annotation:
    refers_to: dict[str, Any] = {"path": row.image.path}
    if row.frame is not None:
        refers_to["frame"] = row.frame
    if "split" in row.values:
        refers_to["split"] = row.values["split"]
    return Annotation(
        entry,
        structure=row.values.get("structure", "mask"),
        reader=row.values.get("reader", ""),
        refers_to=refers_to,
        candidates=(row.image.path,),
        format=form,
        options={"values": values} if values and form == "raster" else {},
    )


def _label(row: _Row, column: str) -> dict[str, Any]:
    said: dict[str, Any] = {
        "path": row.image.path,
        "structure": row.values.get("structure", column),
        "reader": row.values.get("reader", ""),
    }
    if row.frame is not None:
        said["frame"] = row.frame
    return said | {name: row.values[name] for name in ("label", "split") if name in row.values}


def _columns(options: Mapping[str, Any]) -> dict[str, str]:
    named = options.get("columns") or {}
    if unknown := [role for role in named if role not in ROLES]:
        raise UsageError(f"columns: there is no role {', '.join(map(str, unknown))}; there is: {', '.join(ROLES)}")
    return {role: str(named.get(role, role)) for role in ROLES}


def _separator(options: Mapping[str, Any], path: str) -> str:
    separator = str(options.get("separator") or ("\t" if path.lower().endswith(".tsv") else ",")).replace("\\t", "\t")
    if len(separator) != 1 or separator in '"\r\n':
        raise UsageError("separator: must be one character, such as ; or a tab")
    return separator


def _places(header: Sequence[str], columns: Mapping[str, str], named: Container[str]) -> dict[str, int]:
    """Return role → place of its column. `named`: roles whose columns must be there, besides the image's."""
    there = [columns[role] for role in ROLES if columns[role] in header]
    missing = [columns[role] for role in ROLES if columns[role] not in header and (role == "image" or role in named)]
    if missing:
        said = f"line 1: there is no column {' and no column '.join(missing)}"
        if len(header) == 1 and any(mark in header[0] for mark in ";\t|"):
            raise FileError("table-columns", f"{said}: all is one column; say which separator it has")
        # A table without a header has a patient's row in its place.
        if not there:
            raise FileError("table-columns", f"{said} and none of the others; its first line must name the columns")
        listed = ", ".join("".join(letter if letter.isprintable() else " " for letter in name[:40]) for name in header[:50])
        raise FileError("table-columns", f"{said}; there is: {listed}; say by `columns` which is which")
    if doubled := [name for name in dict.fromkeys(there) if list(header).count(name) > 1]:
        raise FileError("table-columns", f"line 1: several columns are called {', '.join(doubled)}; rename all but one")
    return {role: list(header).index(columns[role]) for role in ROLES if columns[role] in header}


def _of_csv(
    data: bytes, columns: Mapping[str, str], named: Container[str], separator: str, refuse: Callable[[str, str], None]
) -> Iterator[tuple[str, dict[str, str]]]:
    try:
        content = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise FileError("table-unreadable", f"line {line}: is not UTF-8 text; save the table as UTF-8") from None
    if "\0" in content:
        line = content.count("\n", 0, content.index("\0")) + 1
        raise FileError("table-unreadable", f"line {line}: holds a NUL byte, so it is no text; save the table as UTF-8")
    reader = csv.reader(io.StringIO(content, newline=""), delimiter=separator, strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        places = _places(header, columns, named)
        for fields in reader:
            if not any(field.strip() for field in fields):
                continue
            if len(fields) != len(header):
                # One more or less, and its values stand in the wrong columns.
                refuse("table-row", f"line {reader.line_num}: has {len(fields)} fields where line 1 has {len(header)}; it is left out")
                continue
            yield f"line {reader.line_num}", {role: fields[at].strip() for role, at in places.items()}
    except csv.Error as error:
        refuse("table-row", f"line {reader.line_num}: {error}; the lines from here on are left out")


def _of_parquet(data: bytes, columns: Mapping[str, str], named: Container[str]) -> Iterator[tuple[str, dict[str, str]]]:
    try:
        import pyarrow  # type: ignore[import-untyped,import-not-found,unused-ignore]
        import pyarrow.parquet  # type: ignore[import-untyped,import-not-found,unused-ignore]
    except ImportError:
        raise FileError("table-unreadable", "Parquet needs pyarrow: `pip install 'scanfeed[parquet]'`, or save the table as CSV") from None
    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data))
        places = _places(file.schema_arrow.names, columns, named)
        groups = [file.metadata.row_group(at) for at in range(file.metadata.num_row_groups)]
        size = sum(group.total_byte_size for group in groups)
        if file.metadata.num_rows > MOST_ROWS or size > MOST_BYTES:
            raise FileError("table-unreadable", f"has over {MOST_ROWS} rows or {MOST_BYTES >> 20} MiB; save it as several tables")
        number = 0
        for batch in file.iter_batches(batch_size=1024, columns=[columns[role] for role in places], use_threads=False):
            fields = [batch.column(columns[role]).to_pylist() for role in places]
            for values in zip(*fields, strict=True):
                number += 1
                yield f"row {number}", {role: _plain(value, columns[role]) for role, value in zip(places, values, strict=True)}
    except FileError:
        raise
    except Exception as error:  # pyarrow raises its own errors, OSError, ValueError, UnicodeDecodeError …
        raise FileError("table-unreadable", f"cannot be read as Parquet ({type(error).__name__}); save it again") from None


def _plain(value: Any, column: str) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float) and value.is_integer():  # pandas makes floats of whole numbers where one is missing
        return str(int(value))
    if not isinstance(value, (str, int, float)):
        raise FileError("table-columns", f"column {column} holds {type(value).__name__}, which is neither text nor a number")
    return str(value).strip()


def _row(tree: Tree, entries: Mapping[str, Entry], at: str, values: Mapping[str, str], refuse: Callable[[str, str], None]) -> _Row | None:
    """Return a row, or None after it was refused."""
    found: dict[str, Entry | None] = {"annotation": None}
    for role in ("image", "annotation"):
        if not values.get(role):
            if role == "image":
                refuse("table-row", f"{at}: names no image; it is left out")
                return None
            continue
        # As it stands, for most: taking paths apart is most of the work.
        path = values[role] if values[role] in entries else _below(tree.root, values[role])
        if path is None:
            refuse("table-path", f"{at}: the {role}'s path is not below the root; it is left out")
            return None
        if path not in entries:
            refuse("table-path", f"{at}: the {role}'s file is not there, is hidden or cannot be read; it is left out")
            return None
        found[role] = entries[path]
    if found["image"] is found["annotation"]:
        refuse("table-path", f"{at}: one file is named as image and as annotation; it is left out")
        return None
    frame = values.get("frame", "")
    if frame and not re.fullmatch("[0-9]{1,9}", frame):
        refuse("table-row", f"{at}: frame is no whole number from 0; it is left out")
        return None
    for role in ROLES[2:]:
        if len(values.get(role, "")) > LONGEST or "\0" in values.get(role, ""):
            refuse("table-row", f"{at}: {role} has over {LONGEST} characters or a NUL; it is left out")
            return None
    image = found["image"]
    assert image is not None
    said = {role: value for role, value in values.items() if value}
    return _Row(at, said, image, found["annotation"], int(frame) if frame else None)


def _below(root: Path, path: str) -> str | None:
    """Return a path relative to the root, None if it is not below it."""
    if "\0" in path:
        return None
    if posixpath.isabs(path):
        inside = Path(posixpath.normpath(path))
        if not inside.is_relative_to(root):
            inside = Path(os.path.realpath(path))  # the root is named by another way, such as a link
        if not inside.is_relative_to(root):
            return None
        return inside.relative_to(root).as_posix()
    plain = posixpath.normpath(path)
    return None if plain == ".." or plain.startswith("../") else plain


def _without_contradictions(rows: list[_Row], refuse: Callable[[str, str], None]) -> list[_Row]:
    """Return the rows of which no two say different things of the same."""

    def value(row: _Row, role: str) -> str:
        return row.values.get(role, "")

    bad: set[int] = set()
    checks: dict[str, Callable[[_Row], tuple[Hashable, Hashable] | None]] = {
        "one image has several patients": lambda row: (row.image.path, value(row, "patient")) if "patient" in row.values else None,
        "one image has several splits": lambda row: (row.image.path, value(row, "split")) if "split" in row.values else None,
        "one annotation file is given several images, frames, structures or readers": lambda row: (
            (row.annotation.path, (row.image.path, row.frame, value(row, "structure"), value(row, "reader"))) if row.annotation else None
        ),
        "one image has several labels of one structure and reader": lambda row: (
            ((row.image.path, row.frame, value(row, "structure"), value(row, "reader")), value(row, "label"))
            if "label" in row.values
            else None
        ),
    }
    for what, said in checks.items():
        groups: dict[Hashable, dict[Hashable, list[int]]] = defaultdict(lambda: defaultdict(list))
        for number, row in enumerate(rows):
            if pair := said(row):
                groups[pair[0]][pair[1]].append(number)
        for group in groups.values():
            if len(group) > 1:
                numbers = sorted(number for several in group.values() for number in several)
                bad.update(numbers)
                listed = ", ".join(rows[number].at for number in numbers[:20]) + (" …" if len(numbers) > 20 else "")
                refuse("table-ambiguous", f"{listed}: {what}; none of these is used")
    return [row for number, row in enumerate(rows) if number not in bad]
