"""A catalog of a million samples without a million files: one patient is ingested, and SQL copies its rows for all the others.

Each copy has files, instances, images, annotations, pairings and masks of its own, as an ingest would have written them. Its folder is a
link to the first patient's, so every path can be read. Used by `guarantees.py` and by the soak test.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql

from catalog import ingest
from catalog.database import Database
from catalog.synthetic import write_studies

SLICES, PHASES, SIZE = 50, 20, 64
OF_ONE = SLICES * PHASES  # samples of a patient; 96 of them have an inner contour, 48 an outer one
STEP = 10_000  # a copy's keys are the first patient's and so much more; the first patient's are smaller
AT_ONCE = 50  # patients a transaction

TABLES = ("patient", "study", "series", "instance", "file", "image", "location", "annotation", "pairing", "mask")
SHARED = ("root_id", "ingest_run_id", "reader_id", "structure_id")
# What is another text in each copy; all else is the same, but for keys.
OWN = {
    ("patient", "patient_id"): "patient_id || '.' || n",
    ("study", "study_instance_uid"): "study_instance_uid || '.' || n",
    ("series", "series_instance_uid"): "series_instance_uid || '.' || n",
    ("instance", "sop_instance_uid"): "sop_instance_uid || '.' || n",
    ("file", "path"): "regexp_replace(path, '(SYN-?0001)/', '\\1.' || n || '/')",
    ("image", "sample_key"): "sample_key((SELECT o.sop_instance_uid FROM instance o WHERE o.id = instance_id) || '.' || n, frame)",
}


def fill(db: Database, folder: Path, samples: int) -> None:
    """Fill an empty database with so many samples of 64×64 px, a multiple of 1,000, whose files lie in `folder`."""
    write_studies(folder, patients=1, slices=SLICES, phases=PHASES, size=SIZE)
    ingest.ingest(db, folder, jobs=1)
    for part in ("dicoms", "contourfiles"):
        [first] = [path for path in (folder / part).iterdir() if path.is_dir()]
        for number in range(1, samples // OF_ONE):
            first.with_name(f"{first.name}.{number}").symlink_to(first.name)
    with db.connect() as conn:
        for number in range(1, samples // OF_ONE, AT_ONCE):
            for table in TABLES:
                conn.execute(_copy(conn, table), [number, min(number + AT_ONCE, samples // OF_ONE) - 1])
            conn.commit()
        for table in TABLES:
            if table not in ("location", "mask"):
                name = sql.Identifier(table)
                conn.execute(sql.SQL("SELECT setval(pg_get_serial_sequence({}, 'id'), max(id)) FROM {}").format(table, name))
    with db.connect(autocommit=True) as conn:
        conn.execute("VACUUM (ANALYZE)")  # as autovacuum does within minutes


def _copy(conn: psycopg.Connection[Any], table: str) -> sql.Composed:
    """Return the statement that copies the first patient's rows of a table for the patients with two numbers and between."""
    columns = [
        name
        for (name,) in conn.execute(
            "SELECT attname FROM pg_attribute WHERE attrelid = %s::regclass AND attnum > 0 AND attgenerated = '' AND NOT attisdropped",
            [table],
        )
    ]
    moved = [name for name in columns if (name == "id" or name.endswith("_id")) and name not in SHARED]
    values = [OWN.get((table, name), f'"{name}" + n * {STEP}' if name in moved else f'"{name}"') for name in columns]
    return sql.SQL("INSERT INTO {} ({}) OVERRIDING SYSTEM VALUE SELECT {} FROM generate_series(%s, %s) AS n CROSS JOIN {} WHERE {} < {}").format(
        sql.Identifier(table),
        sql.SQL(", ").join(map(sql.Identifier, columns)),
        sql.SQL(", ").join(map(sql.SQL, values)),
        sql.Identifier(table),
        sql.Identifier(next(name for name in ("id", "image_id", "pairing_id") if name in columns)),
        sql.Literal(STEP),
    )
