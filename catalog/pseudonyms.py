"""Keyed hashes in the place of identities: what `catalog ingest --pseudonymize` makes of all that comes from names and headers.

It stands between what was found and read and the one writer, so that nothing else knows of it: what comes out of here says the same of
the same files, in other names. Each is a HMAC-SHA256 (RFC 2104) under the key, so equal names stay equal whatever the run, and nobody
without the key can try names until one fits. The key is in a file of the user's, never in the database.

Of a path each folder's name is hashed by itself: what a layout says about a folder holds for what lies below it. Messages of readers may
quote what they read, so in their place a sentence for their code is kept (`terms.REASONS`). Where files lie, and which names were
replaced, goes into the schema `private`, by COPY: a server that logs statements logs their parameters.
"""

from __future__ import annotations

import functools
import hmac
import os
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any, Literal

import psycopg

from catalog import images, terms
from catalog.database import private_schema
from catalog.errors import UsageError
from catalog.layouts import Annotation, Entry, Found, Image, Problem
from catalog.layouts.choosing import ASKED
from catalog.reading import Read, Refused, Result
from catalog.records import Drawn

Dates = Literal["shift", "drop"]

KEY_BYTES = 32
MOST_KEY_BYTES = 1 << 20
HEX = 24  # characters of a hash: 96 bits
DEEPEST = 60  # folders; what lies deeper is hashed as one name, since PostgreSQL indexes no more than 2,704 bytes
MOST_DAYS = 3_650
TOKEN = re.compile(f"[NPR]-[0-9a-f]{{{HEX}}}")

# What of an annotation's `refers_to` is a number or a place, and says nothing of whom.
NUMBERS = ("frame", "number", "value", "roi_number", "segment_number", "threshold", "shape", "affine", "rows", "columns", "position",
           "orientation", "normal", "spacing")  # fmt: skip
UIDS = ("sop_instance_uid", "series_instance_uid", "study_instance_uid", "frame_of_reference_uid", "study", "series")
KEYS = {*NUMBERS, *UIDS, "original_id", "patient", "path", "plane", "mismatch", "fractional_type", "split"}
FRACTIONAL = ("PROBABILITY", "OCCUPANCY")  # PS3.3 C.8.20.2

COLUMNS = [column.split()[0] for column in images.STAGED[images.STAGED.index("(") + 1 : images.STAGED.rindex(")")].split(",")]
AT = {name: COLUMNS.index(name) for name in COLUMNS}
HEAD = COLUMNS.index("frame")  # columns before it are the same in all lines of a file
ESCAPES = {"t": "\t", "n": "\n", "r": "\r", "\\": "\\"}

STAGED_PATH = "CREATE TEMP TABLE IF NOT EXISTS staged_path (file_path text, path text) ON COMMIT DELETE ROWS"
STAGED_NAME = "CREATE TEMP TABLE IF NOT EXISTS staged_name (token text, name text) ON COMMIT DELETE ROWS"


class Pseudonyms:
    """What stands for whom under one key."""

    def __init__(self, key: bytes, *, dates: Dates | None = None, keep: Iterable[str] = ()) -> None:
        self._key = key
        self.dates = dates
        self.kept = terms.OWN_NAMES | set(keep)
        self.folder = ""  # of the root that is taken in
        self.places: dict[str, str] = {}  # path as the catalog has it → path
        self.items: dict[str, Image | Annotation] = {}  # the same → what is to be read
        self._names: dict[str, str] = {}  # token → name, not written yet
        self.path = functools.lru_cache(1 << 16)(self._path)
        self._component = functools.lru_cache(1 << 16)(self._hex)
        self._head = functools.lru_cache(1)(self._head_of)
        self.check = self._digest("check", "scanfeed")

    def _digest(self, kind: str, text: str) -> bytes:
        # As the columns hold it: without NUL, and UTF-8 throughout.
        said = text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode(errors="replace")
        return hmac.digest(self._key, kind.encode() + b"\0" + said, "sha256")

    def _hex(self, text: str) -> str:
        return self._digest("name", text).hex()[:HEX]

    # -------------------------------------------------------------------------------------- values

    def patient(self, name: str) -> str:
        """Return what stands for a PatientID, or another name of a patient; empty for none."""
        return f"P-{self._hex(name)}" if name else ""

    def uid(self, uid: str) -> str:
        """Return a UID for a UID: 2.25. and a number of 128 bits (PS3.5 B.2); empty for none."""
        return f"2.25.{int.from_bytes(self._digest('uid', uid)[:16], 'big')}" if uid else ""

    def registered(self, uid: str) -> str:
        """Return a UID of the standard as it is: a class, a transfer syntax; any other as `uid`."""
        return uid if uid in terms.registered() else self.uid(uid)

    def _path(self, path: str) -> str:
        """Return what stands for a path below the root: as many folders, the same for equal names."""
        names = path.split("/")
        if len(names) > DEEPEST:
            names[DEEPEST:] = ["/".join(names[DEEPEST:])]
        return "/".join(self._component(name) for name in names)

    def name(self, name: str) -> str:
        """Return the name of a structure or a reader: as it is if a layout gave it or it is to be kept, else what stands for it."""
        if name in self.kept or terms.OWN_NUMBERED.fullmatch(name):
            return name
        token = f"N-{self._hex(name)}"
        self._names[token] = name
        return token

    def date(self, day: str, patient: str) -> str:
        """Return a date (DA, PS3.5 6.2) as far from all others of its patient as it was; empty if it is none, or none is to be kept."""
        found = re.fullmatch(r"([0-9]{4})[.]?([0-9]{2})[.]?([0-9]{2})", day)
        if self.dates == "drop" or found is None:
            return ""
        days = 1 + int.from_bytes(self._digest("days", patient)[:8], "big") % MOST_DAYS
        try:
            return (date(*map(int, found.groups())) - timedelta(days)).isoformat().replace("-", "")
        except (ValueError, OverflowError):
            return ""

    def reason(self, code: str) -> tuple[str, str]:
        """Return a code and a message for it that quotes nothing; a code that a reader of the user's own made up is `unreadable`."""
        return (code if code in terms.CODES else "unreadable"), terms.REASONS.get(code, terms.REASON)

    # -------------------------------------------------------------------------------------- what was found

    def found(self, found: Found, layout: str) -> Found:
        """Return what a layout made of a tree, in other names."""
        asked = layout in ASKED  # their texts quote tables and patterns
        self.places.clear()
        self.items.clear()
        return replace(
            found,
            images=[
                replace(
                    image, entry=self._entry(image), patient=None if image.patient is None else self.patient(image.patient),
                    options=self._options(image.options),
                )
                for image in found.images
            ],
            annotations=[
                replace(
                    drawn, entry=self._entry(drawn), structure=self.name(drawn.structure), reader=self.name(drawn.reader),
                    refers_to=self.refers_to(drawn.refers_to), candidates=tuple(map(self.path, drawn.candidates)),
                    folder=None if drawn.folder is None else self.path(drawn.folder),
                    unpaired="no image was found for it" if drawn.unpaired and asked else drawn.unpaired,
                    options=self._options(drawn.options),
                )
                for drawn in found.annotations
            ],
            problems=sorted({Problem(self._problem(one.path), *self.reason(one.code)) for one in found.problems}, key=lambda one: one.path),
            originals={self.patient(patient): self.patient(original) for patient, original in found.originals.items()},
            chosen=list(dict.fromkeys(said.partition(" (")[0] for said in found.chosen)),
        )  # fmt: skip

    def _entry(self, item: Image | Annotation) -> Entry:
        entry = replace(item.entry, path=self.path(item.entry.path))
        self.places[entry.path] = item.entry.path
        self.items[entry.path] = item
        return entry

    def where(self, path: str) -> str:
        """Return where a file lies, by its path as the catalog has it."""
        return f"{self.folder}/{self.places[path]}"

    def _problem(self, path: str) -> str:
        if path in (".", ""):
            return path
        token = self.path(path)
        self._names[token] = path
        return token

    def _options(self, options: dict[str, Any]) -> dict[str, Any]:
        """What a reader is told enters the row as a number that changes with it (`read_as`), and is used nowhere else."""
        return {"told": self._digest("told", repr(options)).hex()} if options else {}

    # -------------------------------------------------------------------------------------- what was read

    def result(self, result: Result) -> Result:
        """Return what a file holds, in other names."""
        entry = replace(result.entry, path=self.path(result.entry.path))
        if isinstance(result, Refused):
            code, message = self.reason(result.code)
            return replace(result, entry=entry, code=code, message=message)
        if isinstance(result, Read):
            left_out = [f"in {len(result.left_out)} ROIs contours that enclose no area are left out"] if result.left_out else []
            drawn = [self.drawn(one) for one in result.drawn]
            patient = self.patient(result.patient)
            return replace(result, entry=entry, rows=self.rows(result.rows), patient=patient, drawn=drawn, left_out=left_out)
        return replace(result, entry=entry)

    def rows(self, lines: bytes) -> bytes:
        """Return lines for ``COPY staged`` in other names."""
        done = []
        for line in lines.decode().split("\n")[:-1]:
            fields = line.split("\t")
            frame = fields[HEAD:]
            at = AT["photometric"] - HEAD
            if frame[at] not in terms.PHOTOMETRIC and frame[at] != r"\N":
                frame[at] = ""
            done.append("\t".join((self._head("\t".join(fields[:HEAD])), *frame)) + "\n")
        return "".join(done).encode()

    def _head_of(self, head: str) -> str:
        fields = [_plain(field) for field in head.split("\t")]
        patient = fields[AT["patient"]]
        for name in ("study_instance_uid", "series_instance_uid", "sop_instance_uid", "frame_of_reference_uid"):
            fields[AT[name]] = self.uid(fields[AT[name]])
        for name in ("sop_class_uid", "transfer_syntax_uid"):
            fields[AT[name]] = self.registered(fields[AT[name]])
        for name, may in (("modality", terms.MODALITIES), ("burned_in_annotation", ("YES", "NO")), ("identity_removed", ("YES", "NO"))):
            if fields[AT[name]] not in may:
                fields[AT[name]] = ""
        fields[AT["path"]] = self.path(fields[AT["path"]])
        fields[AT["patient"]] = self.patient(patient)
        fields[AT["study_date"]] = self.date(fields[AT["study_date"]], patient)
        return "\t".join(field.replace("\\", r"\\") if field != r"\N" else field for field in fields)

    def drawn(self, one: Drawn) -> Drawn:
        """Return an annotation in other names. The class that a label gives stays: it is what is learnt."""
        key = one.source_key
        return replace(
            one,
            source_key=key if re.fullmatch("[0-9]{0,6}", key) else self._digest("key", key).hex()[:HEX],
            structure=self.name(one.structure),
            reader=self.name(one.reader),
            refers_to=self.refers_to(one.refers_to),
        )

    def refers_to(self, said: Mapping[str, Any]) -> dict[str, Any]:
        """Return what an annotation's source says about its image: numbers as they are, all else in other names."""
        found: dict[str, Any] = {}
        for name, value in said.items():
            if name not in KEYS:  # of a reader or an expression of the user's own
                found[f"N-{self._hex(name)}"] = f"N-{self._hex(repr(value))}"
            elif name in UIDS and isinstance(value, str):
                found[name] = self.uid(value)
            elif name in ("original_id", "patient") and isinstance(value, str):
                found[name] = self.patient(value)
            elif name == "path" and isinstance(value, str):
                found[name] = self.path(value)
            elif name == "plane" and isinstance(value, dict):
                found[name] = self.refers_to(value)
            elif name == "mismatch":
                found[name] = "its grid is not its image's"
            elif value is None or (name in NUMBERS and _is_numbers(value)) or (name == "fractional_type" and value in FRACTIONAL):
                found[name] = value
            elif name == "split" and isinstance(value, str):
                found[name] = self.name(value)
            else:
                found[name] = f"N-{self._hex(repr(value))}"
        return found

    # -------------------------------------------------------------------------------------- rows

    def bind(self, conn: psycopg.Connection[Any], folder: str) -> None:
        """Make ready for one root: tables to stage in, and the names that this catalog keeps already."""
        self.folder = folder
        for statement in (STAGED_PATH, STAGED_NAME):
            conn.execute(statement)
        rows = conn.execute("SELECT name FROM structure UNION SELECT name FROM reader UNION SELECT inside FROM relation "
                            "UNION SELECT outside FROM relation")  # fmt: skip
        self.kept |= {name for (name,) in rows if not TOKEN.fullmatch(name)}

    def write_paths(self, conn: psycopg.Connection[Any], root_id: int, paths: Iterable[str]) -> None:
        """Note where these files lie; their own rows are there."""
        with conn.cursor().copy("COPY staged_path FROM STDIN") as copy:
            for path in paths:
                copy.write_row((path, self.places[path]))
        conn.execute(
            f"INSERT INTO {private_schema(conn)}.file_path (file_id, path) SELECT f.id, s.path FROM staged_path s "  # noqa: S608  quoted
            "JOIN file f ON f.root_id = %s AND f.path = s.file_path ON CONFLICT (file_id) DO UPDATE SET path = excluded.path "
            "WHERE file_path.path <> excluded.path",
            [root_id],
        )
        self.write_names(conn)

    def write_names(self, conn: psycopg.Connection[Any]) -> None:
        """Note which names were replaced since this was last asked."""
        if not self._names:
            return
        with conn.cursor().copy("COPY staged_name FROM STDIN") as copy:
            for row in self._names.items():
                copy.write_row(row)
        conn.execute(
            f"INSERT INTO {private_schema(conn)}.name (token, name) SELECT token, name FROM staged_name "  # noqa: S608  quoted
            "ORDER BY token ON CONFLICT DO NOTHING"
        )
        self._names.clear()

    def root(self, name: str, url: str) -> str:
        """Return what stands for a root's folder: by its name too, so that a folder that another root has left can be one anew."""
        return f"R-{self._hex(f'{name} {url}')}"


def read_key(path: Path) -> bytes:
    """Return the key that a file holds.

    Raises:
        UsageError: If it cannot be read, is too short, or others may read it.
    """
    said = f"--pseudonymize {path}"
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            key = file.read(MOST_KEY_BYTES + 1) if stat.S_ISREG(mode) else b""
    except OSError as error:
        make = f"; make one: (umask 077; head -c {KEY_BYTES} /dev/urandom > KEYFILE)" if isinstance(error, FileNotFoundError) else ""
        raise UsageError(f"{said}: {error.strerror}; nothing was changed{make}") from None
    if not stat.S_ISREG(mode) or not KEY_BYTES <= len(key) <= MOST_KEY_BYTES:
        raise UsageError(f"{said}: is no key; it must be a file of at least {KEY_BYTES} random bytes; nothing was changed")
    if os.name == "posix" and mode & 0o077:
        raise UsageError(f"{said}: others may read the key (mode {mode & 0o777:o}); chmod 600 it, or make another; nothing was changed")
    return key


def agree(conn: psycopg.Connection[Any], names: Pseudonyms | None) -> bool:
    """See that a catalog and an ingest are of one kind and key; returns whether that is written down already.

    Raises:
        UsageError: If they are not.
    """
    row = conn.execute("SELECT key_check, dates FROM pseudonymization").fetchone()
    if names is None:
        if row is not None:
            raise UsageError("this catalog is pseudonymized: say --pseudonymize KEYFILE with its key; nothing was changed")
        return True
    if row is None:
        if conn.execute("SELECT EXISTS (SELECT FROM root) OR EXISTS (SELECT FROM patient)").fetchone() == (True,):
            raise UsageError(
                "--pseudonymize: this catalog was begun without a key, and the identities in it would stay; "
                "ingest into another database; nothing was changed"
            )
        names.dates = names.dates or "shift"
        return False
    if not hmac.compare_digest(row[0], names.check):
        raise UsageError("--pseudonymize: this is not the key that this catalog was begun with; nothing was changed")
    if names.dates not in (None, row[1]):
        raise UsageError(f"--dates {names.dates}: this catalog was begun with --dates {row[1]}, for all; nothing was changed")
    names.dates = row[1]
    return True


def begin(conn: psycopg.Connection[Any], names: Pseudonyms, actor: str) -> None:
    """Write down that this catalog holds keyed hashes."""
    conn.execute("INSERT INTO pseudonymization (key_check, dates, actor) VALUES (%s, %s, %s)", [names.check, names.dates, actor])


def _is_numbers(value: Any) -> bool:
    return all(map(_is_numbers, value)) if isinstance(value, list) else isinstance(value, (int, float))


def _plain(field: str) -> str:
    """Return a value as it was before it became a field of ``COPY``; NULL stays."""
    if "\\" not in field or field == r"\N":
        return field
    return re.sub(r"\\(.)", lambda found: ESCAPES.get(found[1], found[0]), field)
