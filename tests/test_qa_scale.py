"""What must not depend on how many images there are: that what one looks up goes by an index, and that a second run finds nothing new."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import qa as benchmark
from catalog import database

pytestmark = pytest.mark.soak

IMAGES = 60_000


def test_lookups_in_a_large_catalog_go_by_indexes(database_url: str, tmp_path: Path) -> None:
    """Among 60,000 images no look-up of an object, a patient or a rule's flags reads a table of over 20,000 rows from end to end; rules
    that run again over 1 % of the patients raise nothing that they had not raised."""
    with database.open_database(database_url) as db:
        benchmark.fill(db, tmp_path / "studies", IMAGES)
        first = benchmark.run_rules(db, changed=False)
        assert sum(each["findings"] for each in first["each"].values()) > 0
        assert {name: scans for name, scans in benchmark.plans(db).items() if scans} == {}
        benchmark.touch(db, benchmark.CHANGED)
        again = benchmark.run_rules(db, changed=True)
        assert 0 < again["patients"] <= first["patients"] * 0.02
        assert {rule: each["raised"] for rule, each in again["each"].items() if each["raised"]} == {}
