"""Snapshots: frozen lists of samples with a digest of what they are.

The digest is made of pixels, masks, labels, structures, origins and parts alone: of no id, path, UID or sample key. So it is the same on
another server, after dump and restore, after a root moved, after an ingest in another order; and another one if a single pixel differs.
It is computed where the rows lie; of a selection with a user's condition, which runs under the login that cannot write, the numbers of
the samples are all that leaves the server.

**Version 1.** ``text(x)`` is its UTF-8 bytes after their number; whole numbers are 4 bytes, floats IEEE 754 of 8 bytes, a truth is 1
byte, all with the high byte first; what is missing is the number -1. sha256 of

    mask      text(structure) text(origin) 1 rows columns box_row box_column box_rows box_columns bits   (numpy.packbits of the box)
    label     text(structure) text(origin) 0 text(label)
    sample    pixel_hash rows columns samples_per_pixel slope intercept modality_lut text(part) fold, then of each structure, in the order
              of its UTF-8 bytes, the sha256 of its mask or label
    snapshot  "scanfeed snapshot 1\\n", the number of samples (8 bytes), then the sha256 of each sample, ascending

What it does not see: whether stored values have a sign, and what a Modality LUT holds (only that there is one).
"""

# ruff: noqa: S608  statements are put together from the constants of this file; values are parameters

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, LiteralString

import psycopg
from psycopg import sql
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from catalog import __version__, roots
from catalog.database import Database, explain
from catalog.errors import CatalogError, DriftError, UsageError
from catalog.flags import is_text, person, transaction
from catalog.selection import DRAWN, NAME, ORIGINS, checked, conditions, samples, unknown_structure

VERSION = 1
LONGEST_NAME = 100  # letters: an export makes file names of it
SELECT_TIMEOUT_S = 600  # as that of a stream's selection

Connection = psycopg.Connection[Any]


def _text_of(column: str) -> str:
    return f"int4send(octet_length(convert_to({column}, 'UTF8'))) || convert_to({column}, 'UTF8')"


# ------------------------------------------------------------------------------------------ the digest

MASK_SHA256 = f"""sha256({_text_of("s.name")} || {_text_of("a.origin")}
    || CASE WHEN a.kind = 'label' THEN int4send(0) || {_text_of("a.label")}
       ELSE int4send(1) || int4send(m.rows) || int4send(m.columns) || int4send(m.box_row) || int4send(m.box_column)
            || int4send(m.box_rows) || int4send(m.box_columns) || m.bits END)"""
SAMPLE_SHA256 = f"""sha256(i.pixel_hash || int4send(i.rows) || int4send(i.columns) || int4send(i.samples_per_pixel) || float8send(i.slope)
    || float8send(i.intercept) || boolsend(i.modality_lut) || coalesce({_text_of("k.part")}, int4send(-1))
    || coalesce(int4send(k.fold), int4send(-1)) || coalesce(d.masks, ''))"""
DRAWN_OF = """pairing p JOIN annotation a ON a.id = p.annotation_id JOIN structure s ON s.id = a.structure_id
LEFT JOIN mask m ON m.pairing_id = p.id"""
MASKS = "string_agg(sha256, ''::bytea ORDER BY structure COLLATE \"C\")"
# One value holds at most 1 GB: 33 million samples.
WHOLE_SHA256 = f"""sha256(convert_to('scanfeed snapshot {VERSION}' || chr(10), 'UTF8') || int8send(count(*))
    || string_agg(sha256, ''::bytea ORDER BY sha256))"""

# ------------------------------------------------------------------------------------------ making one

CHOSEN = "CREATE TEMP TABLE chosen (image_id bigint NOT NULL, annotation_id bigint) ON COMMIT DROP"
# Not through the view's `patient`, which is text: the split's rows have the patient's number.
PARTED = """
CREATE TEMP TABLE parted ON COMMIT DROP AS
SELECT c.image_id, st.patient_id, sp.part, sp.fold FROM (SELECT DISTINCT image_id FROM chosen) c JOIN image i ON i.id = c.image_id
JOIN instance n ON n.id = i.instance_id JOIN series se ON se.id = n.series_id JOIN study st ON st.id = se.study_id
LEFT JOIN split_patient sp ON sp.split_id = %(split)s AND sp.patient_id = st.patient_id
"""
WITHOUT_PART = "SELECT count(DISTINCT patient_id) FROM parted WHERE part IS NULL"
LEAKING = """
CREATE TEMP TABLE leaking ON COMMIT DROP AS SELECT DISTINCT sample_id FROM split_leaks WHERE split = %(name)s
"""
DROP_WITHOUT_PART = "DELETE FROM parted WHERE part IS NULL"
DROP_LEAKING = "DELETE FROM parted WHERE image_id IN (TABLE leaking)"
NOT_ALL = """
DELETE FROM chosen WHERE image_id IN (SELECT image_id FROM chosen GROUP BY 1 HAVING count(annotation_id) < %(count)s)
"""
UNHASHED = "SELECT count(*) FROM parted JOIN image i ON i.id = image_id WHERE i.pixel_hash IS NULL"

FROZEN_MASK = f"""
CREATE TEMP TABLE frozen_mask ON COMMIT DROP AS
SELECT c.image_id, s.name AS structure, p.id AS pairing_id, {MASK_SHA256} AS sha256
FROM chosen c JOIN parted USING (image_id) JOIN ({DRAWN_OF}) ON (p.annotation_id, p.image_id) = (c.annotation_id, c.image_id)
"""
FROZEN_SAMPLE = f"""
CREATE TEMP TABLE frozen_sample ON COMMIT DROP AS
SELECT row_number() OVER (ORDER BY i.sample_key) - 1 AS number, i.id AS image_id, i.sample_key, k.part, k.fold, {SAMPLE_SHA256} AS sha256
FROM parted k JOIN image i ON i.id = k.image_id LEFT JOIN (SELECT image_id, {MASKS} AS masks FROM frozen_mask GROUP BY 1) d USING (image_id)
"""
COUNTED = f"""
SELECT count(*), {WHOLE_SHA256}, (SELECT count(DISTINCT patient_id) FROM parted) FROM frozen_sample
"""
BY_STRUCTURE = 'SELECT structure, count(*) FROM frozen_mask GROUP BY 1 ORDER BY structure COLLATE "C"'
BY_PART = 'SELECT part, count(*) FROM frozen_sample WHERE part IS NOT NULL GROUP BY 1 ORDER BY part COLLATE "C"'

INSERT = """
INSERT INTO snapshot (name, sha256, structures, definition, num_samples, num_patients, program_version, actor)
VALUES (%(name)s, %(sha256)s, %(structures)s, %(definition)s, %(samples)s, %(patients)s, %(version)s, %(actor)s) RETURNING id
"""
INSERT_SAMPLES = """
INSERT INTO snapshot_sample (snapshot_id, number, image_id, sample_key, part, fold, sha256)
SELECT %s, number, image_id, sample_key, part, fold, sha256 FROM frozen_sample ORDER BY number
"""
INSERT_MASKS = """
INSERT INTO snapshot_mask (snapshot_id, number, structure, pairing_id, sha256)
SELECT %s, number, structure, pairing_id, m.sha256 FROM frozen_mask m JOIN frozen_sample USING (image_id) ORDER BY number, structure
"""

LISTED = """
SELECT s.name, encode(s.sha256, 'hex') AS sha256, s.num_samples AS samples, s.num_patients AS patients,
       (SELECT count(*) FROM snapshot_sample k WHERE k.snapshot_id = s.id AND k.erasure_id IS NOT NULL) AS erased, s.structures,
       s.definition, s.actor, s.created_at AS created, s.program_version
FROM snapshot s ORDER BY s.id
"""
SINCE = "SELECT revoked, flagged FROM snapshot_contents WHERE snapshot = %s"
PARTS = """
SELECT k.part, k.fold, count(*) AS samples, count(*) FILTER (WHERE k.erasure_id IS NOT NULL) AS erased
FROM snapshot_sample k JOIN snapshot s ON s.id = k.snapshot_id WHERE s.name = %s GROUP BY 1, 2 ORDER BY part COLLATE "C", fold
"""
ANNOTATED = """
SELECT m.structure, a.origin, k.part, count(*) AS samples
FROM snapshot_mask m JOIN snapshot s ON s.id = m.snapshot_id JOIN snapshot_sample k ON (k.snapshot_id, k.number) = (m.snapshot_id, m.number)
JOIN pairing p ON p.id = m.pairing_id JOIN annotation a ON a.id = p.annotation_id
WHERE s.name = %s GROUP BY 1, 2, 3 ORDER BY structure COLLATE "C", a.origin, k.part COLLATE "C"
"""


@dataclass(slots=True)
class Made:
    """What making a snapshot did, or would; not `changed`: there is one of that name, and it holds the same."""

    name: str
    sha256: str = ""  # hex
    changed: bool = True
    samples: int = 0
    patients: int = 0
    structures: dict[str, int] = field(default_factory=dict)  # samples that have it
    parts: dict[str, int] = field(default_factory=dict)  # samples; empty without a split
    without_part: int = 0  # patients that the split gives no part: left out
    leaking: int = 0  # images whose pixels lie on two sides of the split: left out


def create(
    database: Database,
    name: str,
    *,
    where: str | None = None,
    split: str | None = None,
    structures: Sequence[str] = (),
    origins: Sequence[str] = DRAWN,
    include_flagged: bool = False,
    require: str = "any",
    images: bool = False,
    actor: str | None = None,
    dry_run: bool = False,
) -> Made:
    """Freeze what the catalog holds now, or a part of it, as a list of samples with a digest of its content.

    Args:
        name: What to call it: up to 100 letters without / and :.
        where: A user's SQL condition over the view `sample`, or with `images` over `image_all`.
        split: The name of a split: each sample gets its patient's part and fold. Patients without a part are left out, and images whose
            pixels lie on two sides.
        structures: What was drawn; all if there is none.
        origins: Of `selection.ORIGINS`; by default what somebody drew.
        include_flagged: Samples with an open error, too.
        require: "all": samples alone that have each of the structures; "any": at least one.
        images: Each image is a sample, drawn on or not.
        dry_run: Say what it would hold, and its digest.

    Raises:
        UsageError: If an argument cannot be right.
        DriftError: If there is a snapshot of this name that holds something else.
        CatalogError: If nothing fits, pixels were not hashed yet, or an ingest is running.
    """
    _check(name, structures, origins, require, images)
    actor = person(actor)
    made = Made(name)
    definition: dict[str, Any] = {"where": where, "split": split, "structures": sorted(structures) or None, "images": images or None,
        "origins": None if set(origins) == set(DRAWN) else sorted(origins), "include_flagged": include_flagged or None,
        "require": None if require == "any" else require}  # fmt: skip
    parameters = {"count": len(structures), "name": split}
    with transaction(database, dry_run=dry_run) as conn:
        if said := unknown_structure(conn, structures):
            raise UsageError(f"structure {said}")
        # What is frozen holds still until it is.
        roots.alone(conn, [root_id for (root_id,) in conn.execute("SELECT id FROM root")])
        split_id = _split(conn, split)
        conn.execute(CHOSEN)
        _choose(database, conn, where, structures, origins, include_flagged, images)
        if require == "all":
            conn.execute(NOT_ALL, parameters)
        conn.execute("ANALYZE chosen")
        conn.execute(PARTED, {"split": split_id})
        if split is not None:
            made.without_part = _one(conn, WITHOUT_PART)
            conn.execute(DROP_WITHOUT_PART)
            conn.execute(LEAKING, parameters)
            made.leaking = conn.execute(DROP_LEAKING).rowcount
        conn.execute("ANALYZE parted")
        if unhashed := _one(conn, UNHASHED):
            raise CatalogError(
                f"snapshot {name!r}: the pixels of {unhashed} of its images were not hashed yet, so it cannot say what it holds; "
                f"run `catalog measure`, then this again"
            )
        conn.execute(FROZEN_MASK.encode())
        conn.execute("ANALYZE frozen_mask")
        conn.execute(FROZEN_SAMPLE.encode())
        conn.execute("CREATE UNIQUE INDEX ON frozen_sample (image_id)")
        conn.execute("ANALYZE frozen_sample")
        counted = conn.execute(COUNTED.encode()).fetchone()
        assert counted is not None
        made.samples, made.patients = counted[0], counted[2]
        if not made.samples:
            left = f" but what its split leaves out ({_left_out(made)})" if made.without_part or made.leaking else ""
            raise CatalogError(f"snapshot {name!r}: nothing fits{left}, so none was made; see `catalog status`")
        made.sha256 = counted[1].hex()
        made.structures = dict(conn.execute(BY_STRUCTURE).fetchall())
        made.parts = dict(conn.execute(BY_PART).fetchall())
        if _there(conn, made):
            made.changed = False
        elif not dry_run:
            kept = {key: value for key, value in definition.items() if value is not None}
            _insert(conn, made, {"definition": Jsonb(kept), "actor": actor, "version": __version__})
    return made


def listed(database: Database) -> list[dict[str, Any]]:
    """Return every snapshot, oldest first: name, sha256 (hex), samples and patients when it was made, samples erased since, …"""
    with transaction(database) as conn, conn.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(LISTED).fetchall()


def shown(database: Database, name: str) -> dict[str, Any]:
    """Return a snapshot as `listed` does, what became of its samples since, and its samples by part and by structure and origin.

    Raises:
        UsageError: If there is none of this name.
    """
    with transaction(database) as conn, conn.cursor(row_factory=dict_row) as cursor:
        found(conn, name)
        [row] = [row for row in cursor.execute(LISTED) if row["name"] == name]
        row |= cursor.execute(SINCE, [name]).fetchone() or {}
        return row | {"parts": cursor.execute(PARTS, [name]).fetchall(), "annotated": cursor.execute(ANNOTATED, [name]).fetchall()}


def found(conn: Connection, name: str) -> tuple[int, str]:
    """Return a snapshot's id and sha256 as hex. Raises UsageError if there is none of this name."""
    row = conn.execute("SELECT id, encode(sha256, 'hex') FROM snapshot WHERE name = %s", [name]).fetchone() if is_text(name) else None
    if row is None:
        raise UsageError(f"snapshot {name!r}: there is none of this name; see `catalog snapshot list`")
    return int(row[0]), str(row[1])


def _check(name: str, structures: Sequence[str], origins: Sequence[str], require: str, images: bool) -> None:
    if not re.fullmatch(NAME, name) or not name.isprintable() or not is_text(name) or len(name) > LONGEST_NAME or name in (".", ".."):
        raise UsageError(f"snapshot {name!r}: a name is up to {LONGEST_NAME} letters without / and :, such as train-1")
    if isinstance(structures, str) or len(set(structures)) != len(structures) or not all(map(is_text, structures)):
        raise UsageError(f"structures {structures!r}: must be different names")
    if not origins or isinstance(origins, str) or not set(origins) <= set(ORIGINS):
        raise UsageError(f"origins {origins!r}: must be of {', '.join(ORIGINS)}")
    if require not in ("any", "all"):
        raise UsageError(f"require {require!r}: must be any or all")
    if require == "all" and (images or not structures):
        raise UsageError("require all: of which structures? name them, and leave images out, which asks for none")


def _split(conn: Connection, name: str | None) -> int | None:
    """Return a split's id. Nobody comes to it or moves in it until the transaction ends."""
    if name is None:
        return None
    row = conn.execute("SELECT id FROM split WHERE name = %s FOR SHARE", [name]).fetchone() if is_text(name) else None
    if row is None:
        there = [one for (one,) in conn.execute("SELECT name FROM split ORDER BY name")]
        raise UsageError(f"split {name!r}: there is none of this name; there are {', '.join(there) or 'none, see `catalog split create`'}")
    return int(row[0])


def _choose(
    database: Database,
    conn: Connection,
    where: str | None,
    structures: Sequence[str],
    origins: Sequence[str],
    include_flagged: bool,
    images: bool,
) -> None:
    """Fill the temporary table `chosen`: an image and an annotation a row; with `images` also a row an image without one."""
    of_drawn, parameters = conditions(of_structures=True, include_flagged=include_flagged, origins=origins)
    of_drawn.append(sql.SQL("(kind = 'label' OR area_px IS NOT NULL)"))  # a mask could not be made of everything
    if structures:
        of_drawn.append(sql.SQL("structure = ANY(%(structures)s)"))
        parameters["structures"] = list(structures)
    of_image, _ = conditions(of_structures=False, include_flagged=include_flagged)
    drawn = sql.SQL("SELECT sample_id, annotation_id FROM {} WHERE ").format(samples(origins))
    alone = sql.SQL("SELECT sample_id, NULL::bigint FROM image_all WHERE ").format()
    query, wanted = (alone, of_image) if images else (drawn, of_drawn)
    into = sql.SQL("INSERT INTO chosen {}")
    if where is None:
        conn.execute(into.format(query + sql.SQL(" AND ").join(wanted)), parameters)
    else:
        with database.read_only(timeout_s=SELECT_TIMEOUT_S) as reading, conn.cursor() as cursor:
            wanted = [*wanted, *checked(reading, where, "image_all" if images else "sample")]
            try:
                with cursor.copy("COPY chosen FROM STDIN") as copy, reading.cursor() as asked:
                    for row in asked.stream(query + sql.SQL(" AND ").join(wanted), parameters):
                        copy.write_row(row)
            except psycopg.Error as error:
                raise explain(error, database) from error
    if images:
        of_drawn.append(sql.SQL("sample_id IN (SELECT image_id FROM chosen)"))
        conn.execute(into.format(drawn + sql.SQL(" AND ").join(of_drawn)), parameters)


def _there(conn: Connection, made: Made) -> bool:
    row = conn.execute("SELECT encode(sha256, 'hex'), created_at FROM snapshot WHERE name = %s", [made.name]).fetchone()
    if row is not None and row[0] != made.sha256:
        raise DriftError(
            f"snapshot {made.name!r}: was made on {row[1]:%Y-%m-%d} of other samples (sha256 {row[0][:12]}…, now {made.sha256[:12]}…), and "
            f"is never changed; choose another name, and see `catalog snapshot diff` then"
        )
    return row is not None


def _insert(conn: Connection, made: Made, parameters: dict[str, Any]) -> None:
    try:
        row = conn.execute(INSERT, {
            **parameters, "name": made.name, "sha256": bytes.fromhex(made.sha256), "structures": list(made.structures),
            "samples": made.samples, "patients": made.patients,
        }).fetchone()  # fmt: skip
    except psycopg.errors.UniqueViolation:
        raise CatalogError(
            f"snapshot {made.name!r}: another process has made one of this name just now; see `catalog snapshot list`"
        ) from None
    assert row is not None
    conn.execute(INSERT_SAMPLES, [row[0]])
    conn.execute(INSERT_MASKS, [row[0]])
    conn.execute("ANALYZE snapshot_sample, snapshot_mask")  # an embedded server is seldom up long enough for autovacuum


def _left_out(made: Made) -> str:
    return f"{made.without_part} patients without a part, {made.leaking} images of which the pixels lie on two sides"


def _one(conn: Connection, query: LiteralString) -> int:
    row = conn.execute(query).fetchone()
    assert row is not None
    return int(row[0])
