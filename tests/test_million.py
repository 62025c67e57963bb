"""What must not depend on how many samples there are: how fast a training goes on, and what the daemon has in memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import million
from catalog import database
from tests.processes import daemons, wait_until

pytestmark = pytest.mark.soak

SAMPLES = 300_000
PARTS = (0.0, 0.5, 0.999)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("million")


def test_a_large_catalog_costs_neither_time_nor_memory(database_url: str, folder: Path) -> None:
    """Over 300,000 samples a run goes on within a second wherever it was, and the daemon has no more memory than for 10,000, nor later."""
    with database.open_database(database_url) as db:
        million.fill(db, folder / "studies", SAMPLES)
        log = folder / "loaderd.log"
        with million.serving(log=log):
            state = million.whole_order(db)
            assert state["steps"] * 8 == SAMPLES
            waits = {part: min(million.resumed(state, part) for _ in range(3)) for part in PARTS}
            assert max(waits.values()) <= 1.0, waits
            [wait] = million.killed(1, 200)
            assert wait <= 2.0
        batches = 2 * million.SMALL // 8
        with million.serving(log=log):
            large = million.fed(batches)["VmRSS"]
        with million.serving(log=log):
            small = million.fed(batches, limit=million.SMALL)["VmRSS"]
        assert large <= 1.1 * small
        with million.serving(log=log):
            each = million.growth(21, limit=million.SMALL)
        assert each[-1] <= 1.01 * each[0], each
    assert wait_until(lambda: daemons() == [])
