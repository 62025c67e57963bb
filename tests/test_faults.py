"""Every kind of death in the middle of a training: nothing missing, nothing twice, every batch as if nothing had happened.

The long version is `make soak`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import psycopg
import pytest

from catalog import database, ingest, synthetic
from tests.faults.harness import SMALL_SHM, Harness, Scenario, undisturbed


@pytest.fixture(scope="session")
def many_contours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 images of 32×32 px, each with a contour."""
    folder = tmp_path_factory.mktemp("many")
    synthetic.write_studies(folder, patients=3, slices=4, phases=4, size=32, seed=3, every_image=True)
    return folder


@pytest.fixture
def catalogued(database_url: str, many_contours: Path) -> str:
    """URL of a database with them."""
    with database.open_database(database_url) as db:
        ingest.ingest(db, many_contours, jobs=1)
    return database_url


ONE = Scenario(
    ranks=(1,), daemons="private", limit=15, seed=1,
    faults=("decoded", "saved", "announced", "received", "daemon", "planned", "trainer"),
)  # fmt: skip
THREE = Scenario(
    ranks=(3,), daemons="served", limit=29, seed=2, faults=("acknowledged", "asked", "worker", "reserved", "everything"),
)  # fmt: skip


@pytest.mark.parametrize("scenario", [ONE, THREE], ids=["one rank", "three ranks"])
def test_a_training_survives_death_at_every_point(
    catalogued: str, conn: psycopg.Connection, tmp_path: Path, scenario: Scenario
) -> None:
    expected = undisturbed()
    before = sorted(os.listdir("/dev/shm"))
    harness = Harness(scenario, tmp_path / "faults", catalogued, "unet")
    harness.run()
    harness.check(conn, expected)
    assert sum(harness.told.faults.values()) == len(scenario.faults)
    assert sorted(os.listdir("/dev/shm")) == before
    print(harness.told)


@pytest.mark.parametrize("seed", range(4))
def test_x(catalogued: str, conn: psycopg.Connection, tmp_path: Path, seed: int) -> None:
    expected = undisturbed()
    harness = Harness(Scenario((1,), "private", 7, ("announced+saved",) * 8, seed=seed, batch_size=2, tail="drop", every=1), tmp_path / "faults", catalogued, "unet")
    harness.run()
    print(harness.told, conn.execute("select epoch, planned, delivered, dropped, missing, twice, finished from epoch_coverage order by 1").fetchall())
    harness.check(conn, expected)
