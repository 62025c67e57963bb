"""Take in a folder and feed one epoch of it, with whatever installation runs this: every number is held against SQL.

    python .ci/smoke.py FOLDER     the database: CATALOG_DATABASE_URL, else the embedded one
    python .ci/smoke.py            synthetic studies

Run it from outside the checkout, so that what is imported is what is installed.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import catalog
import loaderd


def command(*arguments: str) -> str:
    """Run the `catalog` that was installed beside this Python; return what it printed."""
    program = Path(sys.executable).with_name("catalog")
    done = subprocess.run([program, *arguments], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"smoke: catalog {' '.join(arguments)}: exit code {done.returncode}")
    return done.stdout


def ask(query: str) -> list[dict[str, int]]:
    return json.loads(command("sql", query, "--json"))


def check(folder: Path) -> str:
    taken = json.loads(command("ingest", str(folder), "--json"))
    [expected] = ask("SELECT count(*) AS samples, sum(area_px) AS area FROM sample WHERE structure = 'inner' AND error_flags = 0")
    assert expected["samples"] > 0, "no sample of inner was found"
    seen: list[int] = []
    area = 0
    began = time.monotonic()
    with loaderd.Feed(structures=["inner"], batch_size=8, seed=1) as feed:
        steps = len(feed)
        for batch in feed.epoch():
            assert batch.images.dtype == np.float32 and batch.masks.shape == batch.images.shape
            assert np.isfinite(batch.images).all() and batch.images.std() > 0
            seen += batch.sample_ids.tolist()
            area += int(batch.masks.sum())
            steps -= 1
            batch.done()
    assert steps == 0, f"{steps} steps fewer than promised"
    assert len(seen) == len(set(seen)) == expected["samples"], f"{len(seen)} samples came, SQL counts {expected['samples']}"
    assert area == expected["area"], f"masks of {area} px came, SQL says {expected['area']}"
    [covered] = ask("SELECT planned, delivered, acknowledged, missing, twice FROM epoch_coverage")
    expected_coverage = {"planned": len(seen), "delivered": len(seen), "acknowledged": len(seen), "missing": 0, "twice": 0}
    assert covered == expected_coverage, f"the ledger says {covered}"
    assert json.loads(command("ingest", str(folder), "--json"))["files_read"] == 0, "a second ingest read files again"
    return f"{taken['images']} images taken in, {len(seen)} samples fed in {time.monotonic() - began:.1f} s, as SQL counts them"


def main() -> None:
    where = Path(catalog.__file__).parent
    if len(sys.argv) > 1:
        said = check(Path(sys.argv[1]))
    else:
        from catalog.synthetic import write_studies

        with tempfile.TemporaryDirectory() as folder:
            write_studies(Path(folder))
            said = check(Path(folder))
    sys.stdout.write(f"smoke: {said}; numpy {np.__version__}, Python {sys.version.split()[0]}, {where}\n")


if __name__ == "__main__":
    main()
