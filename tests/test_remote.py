"""Roots that are URLs: headers by ranges, pixels through the cache."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import psycopg
import pytest

from catalog import database, ingest
from catalog.errors import CatalogError
from loaderd import Feed

Conn = psycopg.Connection[tuple[Any, ...]]


@pytest.fixture
def bucket(studies: Path) -> Iterator[Any]:
    """The synthetic studies in fsspec's memory."""
    system = fsspec.filesystem("memory")
    system.put(str(studies), "/bucket/archive", recursive=True)
    yield system
    system.rm("/bucket", recursive=True)


def take_in(url: str, root: str | Path) -> ingest.Summary:
    with database.open_database(url) as db, ThreadPoolExecutor(1) as here:  # another process has another memory
        return ingest.ingest(db, root, executor=here)


def test_headers_by_ranges(bucket: Any, database_url: str, conn: Conn, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bucket gives the catalog that its folder gives; of an image no more than its header is fetched, and an unchanged one not at all."""
    opened, ranges = [], []
    open_, cat_file = type(bucket).open, type(bucket).cat_file
    monkeypatch.setattr(type(bucket), "open", lambda self, path, *rest, **named: opened.append(path) or open_(self, path, *rest, **named))
    monkeypatch.setattr(
        type(bucket), "cat_file",
        lambda self, path, start=None, end=None: ranges.append((path, start, end)) or cat_file(self, path, start=start, end=end),
    )  # fmt: skip
    summary = take_in(database_url, "memory://bucket/archive")
    assert (summary.images, summary.annotations, summary.paired, summary.masks, summary.standing_errors) == (48, 18, 18, 18, 0)
    images = {path for path, _, _ in ranges if path.endswith(".dcm")}
    assert len(images) == 48 and all(end is not None and end - start <= 16_384 for path, start, end in ranges if path in images)
    assert not [path for path in opened if path.endswith(".dcm")]
    assert conn.execute("SELECT url, count(f.id) FROM root r JOIN file f ON f.root_id = r.id GROUP BY 1").fetchall() == [
        ("memory://bucket/archive", 66)
    ]
    opened.clear()
    ranges.clear()
    again = take_in(database_url, "memory://bucket/archive/")
    assert again.files_read == 0 and {path.rpartition("/")[2] for path, _, _ in ranges} <= {"link.csv"}
    bucket.pipe_file("/bucket/archive/dicoms/SYN0001/1.dcm", b"no image any more")
    assert (again := take_in(database_url, "memory://bucket/archive")).files_read == 1 and again.standing_errors == 1


def test_a_url_that_cannot_be_used(database_url: str) -> None:
    """One line each: a storage of which nothing is known, one that is not there."""
    for url in ("nowhere://bucket", "file:///no/such/folder"):
        with pytest.raises(CatalogError, match=r"cannot be|no layout"):
            take_in(database_url, url)


def test_fed_through_the_cache(new_database: Callable[[], str], studies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A remote root feeds what a folder feeds, bit for bit; what was fetched lies in the cache."""
    monkeypatch.setenv("CATALOG_HOME", str(tmp_path / "home"))
    roots = {"folder": studies, "url": f"file://{studies}"}
    found: dict[str, list[Any]] = {}
    for name, root in roots.items():
        url = new_database()
        take_in(url, root)
        monkeypatch.setenv("CATALOG_DATABASE_URL", url)
        with Feed(structures=["inner"], batch_size=4, seed=2) as feed:
            found[name] = [(batch.sample_keys.tolist(), batch.images.copy(), batch.masks.copy()) for batch in feed.epochs(1)]  # type: ignore[union-attr]
    for one, other in zip(found["folder"], found["url"], strict=True):
        assert one[0] == other[0]
        assert np.array_equal(one[1], other[1]) and np.array_equal(one[2], other[2])
    kept = [entry for entry in (tmp_path / "home" / "cache").rglob("*") if entry.is_file() and os.path.getsize(entry) > 4096]  # noqa: PTH202
    assert len(kept) == 12  # images with an inner contour
