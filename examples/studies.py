"""What the examples work on: the real studies under SCANFEED_DATA, else synthetic ones, in a catalog of their own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from catalog import embedded, synthetic

DATA = Path(os.environ.get("SCANFEED_DATA", Path(__file__).resolve().parent.parent.parent / "shared" / "data"))
SCRATCH = Path(".demo")


def own_catalog(name: str) -> str:
    """Take a catalog beside the user's own one, not that, unless CATALOG_HOME says which; returns where it is."""
    if "CATALOG_HOME" not in os.environ:
        home = embedded.default_home()
        os.environ["CATALOG_HOME"] = str(home.with_name(f"{home.name}-{name}"))
    return os.environ["CATALOG_HOME"]


def studies() -> Path:
    """Return the folder of the real studies, else of synthetic ones."""
    real = (DATA / "sunnybrook" / "final_data").resolve()
    return real if real.is_dir() else synthetic_studies()


def synthetic_studies() -> Path:
    """Return a folder of synthetic studies, written at the first call."""
    folder = (SCRATCH / "studies").resolve()
    if not folder.exists():
        unfinished = folder.with_suffix(".new")
        shutil.rmtree(unfinished, ignore_errors=True)
        synthetic.write_studies(unfinished, patients=5, slices=8, phases=6)
        unfinished.rename(folder)
    return folder


def within(folder: Path) -> str:
    """Return the SQL condition for samples of a folder."""
    return "starts_with(path, '" + f"{folder}/".replace("'", "''") + "')"


def train_and_held_out() -> tuple[str, str]:
    """Ingest the studies; returns the feeds' conditions ``where=`` for training and, one patient, for validation."""
    own_catalog("examples")
    folder = studies()
    catalog("ingest", str(folder))
    here = within(folder)
    found = catalog("sql", "--json", f"SELECT max(patient) AS last FROM sample WHERE structure = 'inner' AND {here}")
    last = json.loads(found)[0]["last"].replace("'", "''")
    print(f"studies in {folder}; held out: {last}", flush=True)
    return f"{here} AND patient <> '{last}'", f"{here} AND patient = '{last}'"


def catalog(*arguments: str) -> str:
    """Run a command of the catalog; returns what it printed."""
    done = subprocess.run([sys.executable, "-m", "catalog.cli", *arguments], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout
