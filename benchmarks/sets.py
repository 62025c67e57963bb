"""Splits and snapshots on a catalog of a million images: seconds to make, to check and to feed from them.

    python benchmarks/sets.py [--images 1000000] [--folder FOLDER] [--json FILE]

The catalog is that of `qa.py`: 5,000 patients, two images in five with a contour; one image in 2,003 shares its pixels with another, most
with one of its own patient.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from catalog import drift, snapshots, splits
from catalog.database import Database, open_database
from loaderd import selections
from loaderd.definitions import Definition

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="keep the catalog here, and use it again")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "sets.json")
    arguments = parser.parse_args()
    for name in ("CATALOG_DATABASE_URL", "CATALOG_HOME"):
        os.environ.pop(name, None)
    from ingest import _folder  # benchmarks/ingest.py and qa.py: beside this file where it is run as a script
    from qa import fill, say

    with _folder(arguments.folder) as folder, open_database(home=folder / "home") as db:
        with db.connect(autocommit=True) as conn:
            if conn.execute("SELECT count(*) FROM image").fetchone() == (0,):
                fill(db, folder / "studies", arguments.images)
        load = [os.getloadavg()[0]]
        found = measure(db)
        load.append(os.getloadavg()[0])
    report = {
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "images": arguments.images,
        "machine": {"cores": len(os.sched_getaffinity(0)), "kernel": platform.release(), "load": load},
        "found": found,
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    for what, seconds in found["seconds"].items():
        print(f"| {what} | {seconds:.1f} s |")
    say(f"all of it: {arguments.json}")


def measure(db: Database) -> dict[str, Any]:
    """Return seconds by what was done, and what came of it."""
    seconds: dict[str, float] = {}

    def timed(what: str, do: Callable[[], Any]) -> Any:
        begun = time.perf_counter()
        result = do()
        seconds[what] = round(time.perf_counter() - begun, 2)
        return result

    name = f"bench{time.time_ns()}"
    made = timed("split create", lambda: splits.create(db, name, ratios={"train": 0.7, "val": 0.15, "test": 0.15}, seed=7))
    checked = timed("split check", lambda: splits.check(db, name))
    with db.read_only(timeout_s=600) as conn:
        for what, definition in {
            "selection of all inner": Definition(structures=("inner",)),
            "selection of split train": Definition(structures=("inner",), split=f"{name}/train"),
        }.items():
            timed(what, lambda definition=definition: selections.shapes(conn, definition))
            conn.rollback()
    frozen = timed("snapshot create", lambda: snapshots.create(db, name, split=name, structures=["inner"]))
    with db.read_only(timeout_s=600) as conn:
        definition = Definition(structures=("inner",), snapshot=name, split="train")
        timed("selection of snapshot, train", lambda: selections.shapes(conn, definition))
        conn.rollback()
    with db.connect() as conn:
        row = conn.execute("SELECT id FROM snapshot WHERE name = %s", [name]).fetchone()
        assert row is not None
        changed = timed("snapshot's rows compared", lambda: drift.changed(conn, row[0]))
    return {
        "seconds": seconds,
        "patients": made.shown.patients,
        "leaks": len(checked[0].leaks),
        "samples": frozen.samples,
        "changed": len(changed),
    }


if __name__ == "__main__":
    main()
