"""`make bench`: loaderd beside PyTorch's DataLoader and beside the limit, in one run on the same samples and the same worker count.

Writes synthetic studies, ingests them into an embedded database of its own, and lets the contestants (`contestants.py`) take turns
in rounds, so that what else the machine does meets all of them. The table holds medians over the rounds; the JSON beside it holds
every round, with the cores that other processes kept busy meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import contestants
from contestants import Settings

from catalog.synthetic import write_studies

HERE = Path(__file__).resolve().parent
PATIENTS, SLICES = 16, 10
TORCH = ("pydicom", "npy")
TITLES = {
    "loaderd": "loaderd",
    "pydicom": "DataLoader + pydicom",
    "npy": "DataLoader + .npy",
    "limit": "limit (decode alone)",
}
GOALS = {"pydicom": 12.0, "limit": 0.6}  # times the samples/s of these
START_S = 60


def main() -> None:
    """Measure, print the table, write the JSON."""
    arguments = _arguments()
    with _folder(arguments.folder) as folder:
        samples = _make_data(folder, arguments.samples)
        results = _measure(folder, arguments, samples)
    report = _report(results, arguments, samples)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    print(_table(report))
    _say(f"every round: {arguments.json}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--json", type=Path, default=HERE / "results" / "feed.json", help="where the JSON goes")
    parser.add_argument("--samples", type=int, default=4_000, help=f"rounded up to a multiple of {PATIENTS * SLICES}")
    parser.add_argument("--workers", type=int, default=2, help="worker processes of each contestant")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--slots", type=int, help="of loaderd and of the limit; by default loaderd's default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=7.0, help="of each contestant in each round, at least one epoch")
    parser.add_argument("--only", nargs="+", choices=list(TITLES), default=list(TITLES), help="which contestants")
    parser.add_argument("--folder", type=Path, help="keep the data there; by default a temporary folder")
    return parser.parse_args()


@contextlib.contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    """Give the folder for data and database; a temporary one goes away again."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given.resolve()
        return
    folder = Path(tempfile.mkdtemp(prefix="scanfeed-bench-"))
    folder.chmod(0o755)  # as root PostgreSQL runs under another account, which must get through
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _make_data(folder: Path, samples: int) -> int:
    """Write and ingest the studies, unless they are there. Returns how many samples there are."""
    phases = -(-samples // (PATIENTS * SLICES))
    samples = PATIENTS * SLICES * phases
    studies = folder / "studies"
    if not studies.exists():
        _say(f"writing {samples} images and contours to {folder}")
        write_studies(studies, patients=PATIENTS, slices=SLICES, phases=phases, size=256, every_image=True)
    _say("ingesting")
    _python(folder, "-m", "catalog.cli", "ingest", str(studies))
    if not (folder / "decoded").exists():
        _say("decoding to .npy")
        contestants.write_decoded(str(folder))
    found = len(contestants.pairs(str(folder)))
    if found != samples:
        raise SystemExit(f"{folder} holds {found} samples, not {samples}: pass another --folder or --samples {found}")
    return samples


def _measure(folder: Path, arguments: argparse.Namespace, samples: int) -> dict[str, Any]:
    """Return the rounds of each contestant, and loaderd's first batches with a daemon of its own."""
    settings = Settings(
        folder=str(folder), batch_size=arguments.batch_size, workers=arguments.workers, seconds=arguments.seconds, slots=arguments.slots
    )
    names = [name for name in arguments.only if name not in TORCH or importlib.util.find_spec("torch")]
    _say("first batch with a private daemon, PostgreSQL started by it")
    private = [
        _contestant(folder, "loaderd", Settings(**{**asdict(settings), "first_only": True}))["first_batch_s"]
        for _ in range(arguments.rounds)
    ]
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with _daemon(folder, arguments.workers) as daemon:
        work = contestants.write_work(str(folder))
        if work != samples:
            raise SystemExit(f"loaderd feeds {work} samples and the folder holds {samples}; see `catalog errors`")
        postmaster = int((folder / "home" / "postgresql" / "postmaster.pid").read_text().split("\n", 1)[0])
        for number in range(arguments.rounds):
            for name in names:
                pids = {"daemon": daemon, "postmaster": postmaster} if name == "loaderd" else {}
                measured = _contestant(folder, name, Settings(**{**asdict(settings), **pids}))
                rounds[name].append(measured)
                rate = measured["samples"] / measured["seconds"]
                _say(f"round {number + 1} of {arguments.rounds}: {TITLES[name]}: {rate:,.0f} samples/s in {measured['seconds']:.1f} s")
    return {"rounds": rounds, "private_first_batch_s": private}


@contextlib.contextmanager
def _daemon(folder: Path, workers: int) -> Iterator[int]:
    """Give the pid of a running daemon."""
    command = [sys.executable, "-m", "loaderd", "serve", "--workers", str(workers)]
    with (folder / "loaderd.log").open("ab") as log:
        process = subprocess.Popen(command, env=_environment(folder), stdin=subprocess.DEVNULL, stderr=log)
    try:
        deadline = time.monotonic() + START_S
        while subprocess.run(
            [sys.executable, "-m", "loaderd", "status"], env=_environment(folder), capture_output=True, check=False
        ).returncode:
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"loaderd does not serve:\n{(folder / 'loaderd.log').read_text()}")
            time.sleep(0.1)
        yield process.pid
    finally:
        process.terminate()
        process.wait(timeout=START_S)


def _contestant(folder: Path, name: str, settings: Settings) -> dict[str, Any]:
    printed = _python(folder, str(HERE / "contestants.py"), name, json.dumps(asdict(settings)))
    measured: dict[str, Any] = json.loads(printed)
    return measured


def _python(folder: Path, *arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], env=_environment(folder), stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments[:3])} ended with code {done.returncode}")
    return done.stdout


def _environment(folder: Path) -> dict[str, str]:
    """Return the environment in which `catalog` and `loaderd` use the benchmark's own database."""
    environment = {name: value for name, value in os.environ.items() if name not in ("CATALOG_DATABASE_URL", "XDG_RUNTIME_DIR")}
    return {**environment, "CATALOG_HOME": str(folder / "home")}


def _report(results: dict[str, Any], arguments: argparse.Namespace, samples: int) -> dict[str, Any]:
    """Return what the JSON holds: medians over the rounds, the rounds themselves, and on what it was measured."""
    medians = {}
    for name, rounds in results["rounds"].items():
        medians[name] = {
            "samples_per_s": statistics.median(one["samples"] / one["seconds"] for one in rounds),
            "cpu_s_per_1000": statistics.median(1000 * one["cpu_s"] / one["samples"] for one in rounds),
            "trainer_cpu_s_per_1000": statistics.median(1000 * one["trainer_cpu_s"] / one["samples"] for one in rounds),
            "database_cpu_s_per_1000": statistics.median(1000 * one["database_cpu_s"] / one["samples"] for one in rounds),
            "first_batch_s": statistics.median(one["first_batch_s"] for one in rounds),
            "others_cores": statistics.median(one["others_cores"] for one in rounds),
        }
    ratios = {
        name: statistics.median(
            (ours["samples"] / ours["seconds"]) / (theirs["samples"] / theirs["seconds"])
            for ours, theirs in zip(results["rounds"]["loaderd"], rounds, strict=True)
        )
        for name, rounds in results["rounds"].items()
        if name != "loaderd" and "loaderd" in results["rounds"]
    }
    packages = ("numpy", "pydicom", "pillow", "psycopg", "torch")
    return {
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "samples": samples,
        "shape": [256, 256],
        "settings": {key: value for key, value in vars(arguments).items() if key not in ("json", "folder")},
        "machine": {"cpu": _cpu_model(), "cores": len(os.sched_getaffinity(0)), "kernel": platform.release()},
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages if importlib.util.find_spec(name.replace("pillow", "PIL"))},
        },
        "medians": medians,
        "loaderd_over": ratios,
        "private_first_batch_s": statistics.median(results["private_first_batch_s"]),
        "rounds": results["rounds"],
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _table(report: dict[str, Any]) -> str:
    settings, machine = report["settings"], report["machine"]
    lines = [
        f"{report['samples']} samples of 256×256, batch size {settings['batch_size']}, {settings['workers']} workers, "
        f"{machine['cores']} cores ({machine['cpu']}), medians of {settings['rounds']} rounds",
        "",
        "|                      | samples/s | loaderd is | CPU s per 1,000 | and PostgreSQL | first batch |",
        "| -------------------- | --------: | ---------: | --------------: | -------------: | ----------: |",
    ]
    for name in settings["only"]:
        row = report["medians"].get(name)
        if row is None:
            lines.append(f"| {TITLES[name]:<20} | not measured: pip install torch |")
            continue
        ratio = report["loaderd_over"].get(name)
        over = "" if ratio is None else f"{ratio:.2f} ×"
        database = f"{row['database_cpu_s_per_1000']:.3f}" if name == "loaderd" else ""
        first = "" if name == "limit" else f"{row['first_batch_s']:.3f} s"
        lines.append(
            f"| {TITLES[name]:<20} | {row['samples_per_s']:>9,.0f} | {over:>10} | {row['cpu_s_per_1000']:>15.3f} | {database:>14} "
            f"| {first:>11} |"
        )
    lines += ["", f"loaderd's first batch when it starts its own daemon and PostgreSQL: {report['private_first_batch_s']:.2f} s"]
    for name, goal in GOALS.items():
        if (ratio := report["loaderd_over"].get(name)) is not None:
            lines.append(f"{'met' if ratio >= goal else 'MISSED'}: loaderd at least {goal:g} × {TITLES[name]}: {ratio:.2f} ×")
    ours, bound = report["medians"].get("loaderd"), report["medians"].get("limit")
    if ours and bound:
        share = bound["cpu_s_per_1000"] / (ours["cpu_s_per_1000"] + ours["database_cpu_s_per_1000"])
        lines.append(f"By CPU seconds, which other processes disturb less: decoding alone is {share:.2f} of loaderd with PostgreSQL")
    busy = max(row["others_cores"] for row in report["medians"].values())
    if busy > 0.1:
        lines.append(f"Other processes kept up to {busy:.1f} cores busy meanwhile: measure again on a quiet machine.")
    return "\n".join(lines)


def _say(line: str) -> None:
    print(f"bench: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
