"""Labels that can be told from what they are labels of: digits from their pixels, and of the synthetic studies a number from the mask.

What each framework gets of `labels=` and `sequences=` is checked by it, also in processes of their own.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import psycopg

from catalog import database, ingest

COUNT, ROWS, COLUMNS = 60, 6, 5
SEQUENCES = {"length": (2, 4), "spacing": (0, 3)}
WIDTH = 4 * COLUMNS + 5 * 3


def label(url: str, folder: Path) -> None:
    """Add 60 digits, and to each drawn inner contour the label `view`: the mask's pixels modulo 3; to digits, too: what is missing to 9."""
    pixels = np.empty((COUNT, ROWS, COLUMNS), np.uint8)
    pixels[:] = 20 * (np.arange(COUNT) % 10)[:, None, None] + 10
    pixels[:, 0, 0] = 255 - np.arange(COUNT)  # no two are one image
    (folder / "t-images-idx3-ubyte").write_bytes(struct.pack(">HBB3I", 0, 8, 3, *pixels.shape) + pixels.tobytes())
    (folder / "t-labels-idx1-ubyte").write_bytes(struct.pack(">HBBI", 0, 8, 1, COUNT) + bytes(at % 10 for at in range(COUNT)))
    with database.open_database(url) as db:
        ingest.ingest(db, folder, jobs=1)
    with psycopg.connect(url) as conn:
        conn.execute(
            "WITH s AS (INSERT INTO structure (name) VALUES ('view') RETURNING id), "
            "d AS (SELECT annotation_id, sample_id, coalesce(9 - label::integer, area_px::integer % 3)::text AS label FROM sample "
            "  WHERE structure = 'inner' OR kind = 'label'), "
            "a AS (INSERT INTO annotation (file_id, source_key, reader_id, structure_id, kind, origin, label, content_hash, ingest_run_id) "
            "  SELECT o.file_id, 'v' || o.id, o.reader_id, s.id, 'label', 'label', d.label, o.content_hash, o.ingest_run_id "
            "  FROM s, d JOIN annotation o ON o.id = d.annotation_id RETURNING id, source_key) "
            "INSERT INTO pairing (annotation_id, image_id, method, rule, score, state, actor) "
            "SELECT a.id, d.sample_id, 'guess', 'by hand', 1, 'accepted', 'test' FROM a JOIN d ON 'v' || d.annotation_id = a.source_key"
        )


def check_digits(images: Any, labels: Any) -> int:
    """Check single digits, images (B, rows, columns); returns how many there were."""
    images, labels = np.asarray(images), np.asarray(labels)
    assert images.shape == (len(labels), ROWS, COLUMNS) and labels.shape == (len(labels),)
    assert np.array_equal(images[:, 1, 1], 20 * labels + 10)
    return len(labels)


def check_views(masks: Any, labels: Any) -> int:
    """Check masks (B, rows, columns) and their labels; returns how many there were."""
    masks, labels = np.asarray(masks), np.asarray(labels)
    assert masks.dtype == bool and masks.any((1, 2)).all() and np.array_equal(masks.sum((1, 2)) % 3, labels)
    return len(labels)


def check_sequences(images: Any, digits: Any, boxes: Any = None) -> int:
    """Check composed digits, black on white, images (B, rows, columns), and where they are; returns how many there were."""
    images, digits = np.asarray(images), np.asarray(digits)
    assert images.shape == (len(digits), ROWS, WIDTH) and digits.shape == (len(digits), 4)
    for at, row in enumerate(np.rint(255 * (1 - images[:, 1].astype(np.float64))).astype(int)):
        left = np.flatnonzero(row)[::COLUMNS]
        assert 2 <= len(left) <= 4
        assert digits[at].tolist() == [*(row[left + 1] - 10) // 20, *[-1] * (4 - len(left))]
        if boxes is not None:
            found = [[0, column, ROWS, COLUMNS] for column in left] + [[-1] * 4] * (4 - len(left))
            assert np.asarray(boxes)[at].tolist() == found
    return len(digits)
