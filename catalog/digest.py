"""One number for what the catalog says: the same for the same content, however it came in.

Rows are named by what they mean (a root's name and path, UIDs, what was drawn), never by an id, a time or a run. History that depends on
the way is left out: what ingest raised and closed again, what a layout proposed and took back, when a file was modified. Each row is
hashed where it lies, and the hashes are sorted: order and collation play no part, and no row leaves the server.
"""

# ruff: noqa: S608  statements are put together from the constants of this file

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import psycopg

from catalog.database import Database, explain

# What an image is: the four levels down to it. Of several contents under one UID each is its own.
LEVELS = "JOIN series se ON se.id = n.series_id JOIN study st ON st.id = se.study_id JOIN patient pt ON pt.id = st.patient_id"
INSTANCE = f"instance n {LEVELS}"
IMAGE = f"image i JOIN instance n ON n.id = i.instance_id {LEVELS}"
INSTANCE_KEY = "pt.patient_id, st.study_instance_uid, se.series_instance_uid, n.sop_instance_uid, n.content_hash"
DRAWN = """annotation a JOIN file af ON af.id = a.file_id JOIN root ar ON ar.id = af.root_id JOIN structure s ON s.id = a.structure_id
JOIN reader r ON r.id = a.reader_id"""
DRAWN_KEY = "ar.name AS root, af.path, a.source_key, a.version"
PAIRED = f"pairing p JOIN ({IMAGE}) ON i.id = p.image_id"

CONTENT = {
    "root": "SELECT name FROM root",
    "file": f"""
        SELECT r.name, f.path, f.kind, f.format, f.size, f.state, f.content_hash, o.* FROM file f JOIN root r ON r.id = f.root_id
        LEFT JOIN LATERAL (SELECT {INSTANCE_KEY} FROM {INSTANCE} WHERE n.id = f.instance_id) o ON true""",
    "patient": "SELECT patient_id, original_id FROM patient",
    "study": """
        SELECT pt.patient_id, st.study_instance_uid, st.study_date FROM study st JOIN patient pt ON pt.id = st.patient_id""",
    "series": """
        SELECT pt.patient_id, st.study_instance_uid, se.series_instance_uid, se.series_number, se.modality
        FROM series se JOIN study st ON st.id = se.study_id JOIN patient pt ON pt.id = st.patient_id""",
    "instance": f"""
        SELECT {INSTANCE_KEY}, n.sop_class_uid, n.instance_number, n.number_of_frames, n.images_in_acquisition, n.frame_of_reference_uid,
               n.burned_in_annotation, n.identity_removed, n.over_89, n.identifying, n.gantry_tilt, n.other_meta_uid, n.surplus_bytes
        FROM {INSTANCE}""",
    # The key of an image without a place is made from its id.
    "image": f"""
        SELECT {INSTANCE_KEY}, i.frame, i.rows, i.columns, i.samples_per_pixel, i.photometric, i.row_spacing, i.column_spacing,
               i.image_position, i.image_orientation, i.position, i.slice_thickness, i.trigger_time, i.phase, i.slope, i.intercept,
               i.modality_lut, i.pixel_hash,
               CASE WHEN EXISTS (SELECT FROM location l WHERE l.image_id = i.id) THEN i.sample_key END AS sample_key
        FROM {IMAGE}""",
    "location": f"""
        SELECT {INSTANCE_KEY}, i.frame, r.name, f.path, l.byte_offset, l.byte_length, l.dtype, l.bits_stored, l.transfer_syntax_uid,
               l.coding, l.preferred
        FROM location l JOIN file f ON f.id = l.file_id JOIN root r ON r.id = f.root_id JOIN ({IMAGE}) ON i.id = l.image_id""",
    "annotation": f"""
        SELECT {DRAWN_KEY}, a.current, r.name AS reader, r.preference, s.name AS structure, a.kind, a.origin, a.label, a.points, a.rings,
               a.convention, a.shift_x, a.shift_y, a.polygon_area_px, a.rows, a.columns, a.box, a.bits, a.content_hash,
               a.refers_to::text AS refers_to
        FROM {DRAWN}""",
    "pairing": f"""
        SELECT {DRAWN_KEY}, {INSTANCE_KEY}, i.frame, p.method, p.rule, p.score, p.state, regexp_replace(p.actor, '^layout:.*', 'layout')
        FROM {PAIRED} JOIN ({DRAWN}) ON a.id = p.annotation_id WHERE p.state <> 'rejected' OR p.actor NOT LIKE 'layout:%'""",
    "mask": f"""
        SELECT {DRAWN_KEY}, {INSTANCE_KEY}, i.frame, m.rows, m.columns, m.box_row, m.box_column, m.box_rows, m.box_columns, m.bits
        FROM mask m JOIN ({PAIRED}) ON p.id = m.pairing_id JOIN ({DRAWN}) ON a.id = p.annotation_id
        WHERE p.state <> 'rejected' OR p.actor NOT LIKE 'layout:%'""",
    "flag": f"""
        SELECT g.rule, g.rule_version, g.severity, g.state, g.detail, g.value, g.revokes, g.raised_by, g.closed_by, g.reason,
               fr.name, f.path, drawn.*, paired.*, shown.*, se.series_instance_uid, st.study_instance_uid, pt.patient_id
        FROM flag g LEFT JOIN file f ON f.id = g.file_id LEFT JOIN root fr ON fr.id = f.root_id
        LEFT JOIN pairing p ON p.id = g.pairing_id
        LEFT JOIN LATERAL (SELECT {DRAWN_KEY} FROM {DRAWN} WHERE a.id IN (g.annotation_id, p.annotation_id)) drawn ON true
        LEFT JOIN LATERAL (SELECT g.pairing_id IS NOT NULL) paired ON true
        LEFT JOIN LATERAL (
            SELECT {INSTANCE_KEY}, i.frame FROM {IMAGE}
            WHERE i.id IN (g.image_id, p.image_id)) shown ON true
        LEFT JOIN series se ON se.id = g.series_id LEFT JOIN study st ON st.id = g.study_id LEFT JOIN patient pt ON pt.id = g.patient_id
        WHERE g.state = 'open' OR g.closed_by NOT IN ('ingest', 'loaderd', 'measure')""",
}

# The binary form of a row depends on no setting of the session. By the first byte, since one value holds at most 1 GB.
HASHED = """
SELECT string_agg(hash, '' ORDER BY hash), count(*) FROM (SELECT sha256(record_send(t)) AS hash FROM ({}) t) AS hashed
GROUP BY get_byte(hash, 0) ORDER BY get_byte(hash, 0)
"""


@dataclass(frozen=True, slots=True)
class Digest:
    """Of a table's rows."""

    rows: int
    sha256: str


def digest(database: Database) -> tuple[str, dict[str, Digest]]:
    """Return the sha256 of the catalog's content as hex, and that of each table, of one moment."""
    found: dict[str, Digest] = {}
    try:
        with database.connect(application_name="catalog digest", client_encoding="UTF8") as conn:
            conn.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
            conn.read_only = True
            for table, query in CONTENT.items():
                whole, rows = hashlib.sha256(), 0
                with conn.cursor(binary=True) as cursor:
                    for hashes, count in cursor.stream(HASHED.format(query).encode()):
                        whole.update(hashes)
                        rows += count
                found[table] = Digest(rows, whole.hexdigest())
    except psycopg.Error as error:
        raise explain(error, database) from error
    lines = "".join(f"{table} {one.rows} {one.sha256}\n" for table, one in found.items())
    return hashlib.sha256(lines.encode()).hexdigest(), found
