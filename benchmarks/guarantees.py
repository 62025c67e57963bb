"""`make bench`: what `docs/guarantees.md` promises in numbers, measured in one run.

Everything is measured in rounds that take turns, so that what else the machine does meets all sides, and the table holds medians; the JSON
beside it holds every round. The samples are those of `feed.py`, and for the last part those of `million.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import million

from catalog import ingest
from catalog.database import Database, open_database
from catalog.synthetic import write_studies
from loaderd import Feed, attach
from loaderd.bench import touch

HERE = Path(__file__).resolve().parent
PATIENTS, SLICES = 16, 10
WORK_S = 0.002  # of a trainer that is no benchmark, a batch
SLOWER = 10  # times, the slow neighbour
WARM = 2  # epochs
PARTS = (0.0, 0.25, 0.5, 0.75, 0.999)  # of an epoch, to resume at
POSITIONS = 100_000  # of an epoch whose bytes are counted

# A daemon as `loaderd serve` starts it, without a supervisor; the second one writes nothing down but the orders.
WITH = """
import os, sys
from loaderd.cli import main
reading, writing = os.pipe()
sys.argv += ["--supervisor", str(reading)]
main()
"""
WITHOUT = (
    """
import itertools
from loaderd import ledger
from loaderd.supply import Supply
numbers = itertools.count(1)
ledger.reserve = lambda *arguments, **named: next(numbers)
ledger.start_epoch = lambda *arguments, **named: True
ledger.begin_epoch = lambda *arguments, **named: next(numbers)
ledger.unchanged = lambda *arguments: True
for name in ("settle", "reserved", "finish", "note"):
    setattr(Supply, name, lambda *arguments, **named: None)
"""
    + WITH
)

NEIGHBOUR = """
import sys, time
from loaderd import Feed
with Feed(structures=["inner"], seed=1, timeout_s=600) as feed:
    for batch in feed.epochs(1_000_000):
        batch.release()
        time.sleep(float(sys.argv[1]))
"""


def main() -> None:
    """Measure, print the table, write the JSON."""
    arguments = _arguments()
    found: dict[str, Any] = {}
    for name in ("CATALOG_DATABASE_URL", "XDG_RUNTIME_DIR", "RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    with _folder(arguments.folder) as folder:
        if set(arguments.only) - {"million"}:
            with _catalog(folder / "feed", lambda db, where: _studies(db, where, arguments.samples)) as (_, log):
                for name, measure in MEASURES.items():
                    if name in arguments.only:
                        _say(name)
                        found[name] = measure(arguments, log)
        if "million" in arguments.only:
            _say(f"million: filling a catalog of {arguments.million:,} samples")
            with _catalog(folder / "million", lambda db, where: million.fill(db, where, arguments.million)) as (db, log):
                found["million"] = _million(arguments, db, log)
    report = {
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "settings": {key: value for key, value in vars(arguments).items() if key not in ("json", "folder")},
        "machine": {"cores": len(os.sched_getaffinity(0)), "kernel": platform.release(), "load": os.getloadavg()},
        "found": found,
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    print(_table(found))
    _say(f"every round: {arguments.json}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--json", type=Path, default=HERE / "results" / "guarantees.json", help="where the JSON goes")
    parser.add_argument("--only", nargs="+", choices=[*MEASURES, "million"], default=[*MEASURES, "million"])
    parser.add_argument("--samples", type=int, default=4_000, help=f"of 256×256, rounded up to a multiple of {PATIENTS * SLICES}")
    parser.add_argument("--million", type=int, default=1_000_000, help=f"samples of 64×64, a multiple of {million.OF_ONE}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each side in each round, at least one epoch")
    parser.add_argument("--epochs", type=int, default=60, help="whose first batches are waited for")
    parser.add_argument("--kills", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="keep the data there; by default a temporary folder")
    return parser.parse_args()


@contextlib.contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    """Give the folder for data and databases; a temporary one goes away again."""
    folder = given.resolve() if given is not None else Path(tempfile.mkdtemp(prefix="scanfeed-bench-"))
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)  # as root PostgreSQL runs under another account, which must get through
    try:
        yield folder
    finally:
        if given is None:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _catalog(folder: Path, fill: Callable[[Database, Path], None]) -> Iterator[tuple[Database, Path]]:
    """Give a database of its own, filled unless it is, which this process and its daemons use, and where they write their log."""
    folder.mkdir(exist_ok=True)
    os.environ["CATALOG_HOME"] = str(folder / "home")
    with open_database(home=folder / "home") as db:
        if not (folder / "filled").exists():
            fill(db, folder / "studies")
            (folder / "filled").touch()
        yield db, folder / "loaderd.log"


def _studies(db: Database, folder: Path, samples: int) -> None:
    write_studies(folder, patients=PATIENTS, slices=SLICES, phases=-(-samples // (PATIENTS * SLICES)), size=256, every_image=True)
    ingest.ingest(db, folder, jobs=None)


# ------------------------------------------------------------------------------------------ what is measured


def _rate(seconds: float, work_s: float = 0.0) -> tuple[float, float]:
    """Return samples/s of a trainer in whole epochs after the first, and how many samples/s others on this daemon got meanwhile."""
    samples = began = others = 0.0
    with Feed(structures=["inner"], timeout_s=600) as feed:
        for batch in feed.epochs(1_000_000):
            if batch.index == 0 and batch.epoch:
                now = time.perf_counter()
                if not began:
                    began, others = now, _of_others()
                elif now - began >= seconds:
                    return samples / (now - began), (_of_others() - others) / (now - began)
            if began:
                samples += len(batch)
            touch(batch)
            if work_s:
                time.sleep(work_s)
    raise AssertionError


def _of_others() -> int:
    found = attach.status()
    assert found is not None
    return sum(stream["samples"] for stream in found["streams"] if stream["pid"] != os.getpid())


def _ledger(arguments: argparse.Namespace, log: Path) -> dict[str, Any]:
    """Samples/s with the ledger and without, in pairs, of which every second begins with the other side."""
    rates: dict[str, list[float]] = {"with": [], "without": []}
    for number in range(arguments.rounds):
        for side in ("with", "without") if number % 2 else ("without", "with"):
            with million.serving("-c", WITH if side == "with" else WITHOUT, log=log):
                rates[side].append(_rate(arguments.seconds)[0])
    return {
        **rates,
        "of_medians": statistics.median(rates["with"]) / statistics.median(rates["without"]),
        "of_pairs": statistics.median(ours / theirs for ours, theirs in zip(rates["with"], rates["without"], strict=True)),
    }


def _neighbour(arguments: argparse.Namespace, log: Path) -> dict[str, Any]:
    """What a trainer loses by another stream's that is ten times slower.

    `loss` is all of it. At full speed the cores are busy, and what the neighbour is fed is made on them: `own` is the loss without
    these samples, which a fair share of the machine costs as well.
    """
    found: dict[str, Any] = {}
    with million.serving(log=log):
        for name, work_s in (("working", WORK_S), ("unbounded", 0.0)):
            rounds = []
            for _ in range(arguments.rounds):
                alone, _ = _rate(arguments.seconds, work_s)
                sleep = SLOWER * 8 / alone
                neighbour = subprocess.Popen([sys.executable, "-c", NEIGHBOUR, str(sleep)], stdin=subprocess.DEVNULL)
                try:
                    while not _of_others():
                        time.sleep(0.02)
                    beside, other = _rate(arguments.seconds, work_s)
                finally:
                    neighbour.kill()
                    neighbour.wait()
                rounds.append({"alone": alone, "beside": beside, "neighbour": other})
            found[name] = {
                "rounds": rounds,
                "loss": statistics.median(1 - one["beside"] / one["alone"] for one in rounds),
                "own": statistics.median(1 - (one["beside"] + one["neighbour"]) / one["alone"] for one in rounds),
            }
    return found


def _opening(arguments: argparse.Namespace, log: Path) -> dict[str, Any]:
    """Waits for the first batch of an epoch, and for the others, in ms."""
    found: dict[str, Any] = {}
    with million.serving(log=log):
        for name, work_s in (("working", WORK_S), ("unbounded", 0.0)):
            opening, steady = [], []
            with Feed(structures=["inner"], timeout_s=600) as feed:
                batches = feed.epochs(WARM + arguments.epochs)
                began = time.perf_counter()
                for batch in batches:
                    waited = 1e3 * (time.perf_counter() - began)
                    if batch.epoch >= WARM:
                        (steady if batch.index else opening).append(waited)
                    touch(batch)
                    batch.release()
                    if work_s:
                        time.sleep(work_s)
                    began = time.perf_counter()
            p99 = sorted(steady)[math.ceil(len(steady) * 0.99) - 1]
            median = statistics.median(opening)
            found[name] = {
                "median_ms": median, "max_ms": max(opening), "p50_ms": statistics.median(steady), "p99_ms": p99,
                "times": median / p99, "each_ms": opening,
            }  # fmt: skip
    return found


def _attach(arguments: argparse.Namespace, log: Path) -> dict[str, Any]:
    """Seconds from SIGKILL of the daemon to the next batch."""

    def kill() -> dict[str, Any]:
        each = million.killed(arguments.kills, 200, structures=["inner"])
        return {"median": statistics.median(each), "max": max(each), "each": each}

    private = kill()
    with million.serving(log=log):
        return {"private": private, "served": kill()}


MEASURES: dict[str, Callable[[argparse.Namespace, Path], dict[str, Any]]] = {
    "ledger": _ledger,
    "neighbour": _neighbour,
    "opening": _opening,
    "attach": _attach,
}


def _million(arguments: argparse.Namespace, db: Database, log: Path) -> dict[str, Any]:
    """What depends on how many samples there are."""
    found: dict[str, Any] = {}
    times = min(3, arguments.rounds)
    with million.serving(log=log):
        for name, structures in (("images", []), ("inner", ["inner"])):
            _say(f"million: {name}")
            seeds = iter(range(1, 100))
            fresh = million.medians(lambda of=structures, seeds=seeds: million.first_batch(structures=of, seed=next(seeds)), times)
            state = million.whole_order(db, structures=structures)
            parts = {part: million.medians(lambda at=part, of=structures, s=state: million.resumed(s, at, structures=of), times)
                     for part in PARTS}  # fmt: skip
            found[name] = {"samples": state["steps"] * 8, "fresh": fresh, "resumed": parts}
        each = million.killed(min(3, arguments.kills), 200)
        found["attach"] = {"median": statistics.median(each), "max": max(each), "each": each}
    _say("million: memory")
    sides: dict[str, list[dict[str, int]]] = {"large": [], "small": []}
    batches = 2 * million.SMALL // 8
    for _ in range(times):
        for side, limit in (("large", None), ("small", million.SMALL)):
            with million.serving(log=log):
                sides[side].append(million.fed(batches, limit=limit))
    rss = {side: statistics.median(one["VmRSS"] for one in each) for side, each in sides.items()}
    with million.serving(log=log):
        each_epoch = million.growth(21, limit=million.SMALL)
    found["memory"] = {
        **sides, "more": rss["large"] / rss["small"] - 1, "each_epoch": each_epoch, "growth": each_epoch[-1] / each_epoch[0] - 1,
    }  # fmt: skip
    _say("million: bytes of an epoch")
    with million.serving(log=log):
        found["bytes"] = {ranks: million.bytes_of_epoch(db, ranks, min(POSITIONS, arguments.million)) for ranks in (1, 4)}
    return found


# ------------------------------------------------------------------------------------------ what is shown


def _table(found: dict[str, Any]) -> str:
    rows: list[tuple[str, str, str, bool | None]] = []
    if ledger := found.get("ledger"):
        said = f"{ledger['of_medians']:.3f} (median of the pairs {ledger['of_pairs']:.3f})"
        rows.append(("throughput with ledger / without", said, "≥ 0.98", min(ledger["of_medians"], ledger["of_pairs"]) >= 0.98))
    if neighbour := found.get("neighbour"):
        rows.append(("loss by a neighbour 10 × slower, 2 ms of work a batch", f"{neighbour['working']['loss']:.1%}", "≤ 5 %",
                     neighbour["working"]["loss"] <= 0.05))  # fmt: skip
        one = neighbour["unbounded"]
        said = f"{one['own']:.1%} ({one['loss']:.1%} with the neighbour's own samples)"
        rows.append(("the same at full speed, both cores busy", said, "≤ 5 %", one["own"] <= 0.05))
    for name, title in (("working", "2 ms of work a batch"), ("unbounded", "no work")):
        if one := found.get("opening", {}).get(name):
            said = f"{one['median_ms']:.2f} ms = {one['times']:.1f} × {one['p99_ms']:.2f} ms (max {one['max_ms']:.1f} ms)"
            rows.append((f"first batch of an epoch to p99 of the others, {title}", said, "≤ 3 ×", one["times"] <= 3))
    for name, one in found.get("attach", {}).items():
        rows.append((f"SIGKILL of a {name} daemon to the next batch", _seconds(one), "≤ 2 s", one["max"] <= 2))
    if large := found.get("million"):
        for name in ("images", "inner"):
            of = f"{large[name]['samples']:,} {name}"
            rows.append((f"first batch of a new stream of {of}", _seconds(large[name]["fresh"]), "", None))
            for part, one in large[name]["resumed"].items():
                rows.append((f"resuming at {float(part):.1%} of {of}", _seconds(one), "≤ 1 s", one["max"] <= 1))
        rows.append(("SIGKILL to the next batch there", _seconds(large["attach"]), "≤ 2 s", large["attach"]["max"] <= 2))
        memory = large["memory"]
        rows.append(("daemon's memory for all of them over that for 10,000", f"{memory['more']:+.1%}", "≤ +10 %", memory["more"] <= 0.1))
        rows.append(("growth of it over 20 epochs of 10,000", f"{memory['growth']:+.2%}", "≤ 1 %", memory["growth"] <= 0.01))
        for ranks, one in large["bytes"].items():
            said = f"{one['order']:.1f} order, {one['ledger']:.2f} ledger"
            rows.append((f"bytes a position in PostgreSQL, {ranks} rank{'s'[: int(ranks) > 1]}", said, "", None))
    verdict = {True: "met", False: "MISSED", None: ""}
    lines = ["| promise | measured | goal | |", "| --- | --- | --- | --- |"]
    return "\n".join(lines + [f"| {title} | {said} | {goal} | {verdict[met]} |" for title, said, goal, met in rows])


def _seconds(one: dict[str, Any]) -> str:
    return f"{one['median']:.2f} s (max {one['max']:.2f} s)"


def _say(line: str) -> None:
    print(f"bench: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
