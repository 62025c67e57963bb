"""Our own header reader against pydicom's, in files a second of one core, over the real files in SCANFEED_DATA.

    python benchmarks/header.py [--rounds 5] [--json FILE]

All read each file afresh from the page cache, opening included, in rounds that take turns; the numbers are medians. Seconds are those that
the process had a core, its system calls included, so that what else runs counts little. `with fallback` is what an ingest does:
pydicom's way, `catalog.dicom.read_instance` without hash, for each file that our reader leaves to it.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import logging
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pydicom

from catalog.dicom import read_instance
from catalog.errors import FileError
from catalog.header import Header, read_header

HERE = Path(__file__).resolve().parent
DATA = Path(os.environ.get("SCANFEED_DATA", HERE.parents[1] / "shared" / "data"))
LITTLE_ENDIAN = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1")


def ours(path: str) -> Header | None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return read_header(partial(os.pread, descriptor), os.fstat(descriptor).st_size)
    finally:
        os.close(descriptor)


def with_fallback(path: str) -> None:
    if ours(path) is None:
        with contextlib.suppress(FileError):
            read_instance(path, hash_pixels=False)


def pydicoms(path: str) -> None:
    with contextlib.suppress(Exception):
        pydicom.dcmread(path, stop_before_pixels=True)


def files_a_second(reader: Callable[[str], object], paths: list[str]) -> float:
    start = time.process_time()
    for path in paths:
        reader(path)
    return len(paths) / (time.process_time() - start)


def measured(paths: list[str], rounds: int) -> dict[str, float]:
    readers = {"ours": ours, "with fallback": with_fallback, "pydicom": pydicoms}
    found = [{name: files_a_second(reader, paths) for name, reader in readers.items()} for _ in range(rounds + 1)][1:]
    medians = {name: statistics.median(each[name] for each in found) for name in readers}
    ratio = statistics.median(each["ours"] / each["pydicom"] for each in found)
    left = sum(ours(path) is None for path in paths)
    return {"files": len(paths), **medians, "ratio": ratio, "left to pydicom": left / len(paths)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not (DATA / "manifest.csv").is_file():
        sys.exit(f"no manifest.csv under {DATA}; set SCANFEED_DATA")
    logging.getLogger("pydicom").disabled = True
    warnings.simplefilter("ignore")
    with (DATA / "manifest.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    sets = {
        "sunnybrook": [row for row in rows if row["path"].endswith(".dcm") and row["path"].startswith("sunnybrook")],
        "little-endian": [row for row in rows if row["kind"] == "dicom" and row["decode"] == "ok" and row["ts"] in LITTLE_ENDIAN],
        "DICOM": [row for row in rows if row["kind"] == "dicom"],
        "all": rows,
    }
    results = {name: measured([str(DATA / row["path"]) for row in kept], arguments.rounds) for name, kept in sets.items()}
    sys.stdout.write(f"{'':15}{'files':>7}{'ours':>9}{'with fallback':>15}{'pydicom':>9}{'ratio':>7}{'left to pydicom':>17}\n")
    for name, found in results.items():
        numbers = f"{found['files']:7}{found['ours']:9,.0f}{found['with fallback']:15,.0f}{found['pydicom']:9,.0f}{found['ratio']:7.1f}"
        sys.stdout.write(f"{name:15}{numbers}{found['left to pydicom']:17.1%}\n")
    if arguments.json:
        machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
        versions = {"pydicom": pydicom.__version__, "load": os.getloadavg()}
        arguments.json.write_text(json.dumps({"machine": machine | versions, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
