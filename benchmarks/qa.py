"""QA rules and look-ups on a catalog of a million images: seconds a rule, what a small change costs, and how fast one finds things.

    python benchmarks/qa.py [--images 1000000] [--rounds 300] [--only PART …] [--folder FOLDER] [--json FILE]

Five synthetic patients are ingested and measured, and SQL copies their rows for all the others, as in `million.py`; UIDs, hashes of pixels
and polygons are each copy's own, else every rule about repetition would speak of nothing else. Two images in five have a contour. Some
defects are spread over it, and flags of other origin lie beside those that the rules raise, so that the look-ups have something to find.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
from psycopg import sql

from catalog import ingest, measuring, qa, rulefiles
from catalog.database import Database, open_database
from catalog.synthetic import write_studies

HERE = Path(__file__).resolve().parent
PATIENTS, SLICES, PHASES, SIZE = 5, 10, 20, 128
OF_ALL = PATIENTS * SLICES * PHASES  # images of the patients that are copied together; 400 of them have a contour
DRAWN = 5  # of 25 images in a row have an inner and an outer contour: two annotations for five images
STEP = 10_000  # a copy's keys are those of the first patients and so much more; those are smaller
AT_ONCE = 25  # copies a transaction
PARTS = ("rules", "changed", "lookups", "plans", "gallery")
CHANGED = 0.01  # of the patients
GALLERY = 1_000  # samples
FLAGS = 20_000  # of other origin than the rules, for a million images
LARGE = 20_000  # rows; reading fewer from end to end is no worse than an index

TABLES = ("patient", "study", "series", "instance", "file", "image", "location", "measure", "annotation", "pairing", "mask", "shape",
          "overlap", "edge_fit")  # fmt: skip
SHARED = ("root_id", "ingest_run_id", "first_run_id", "reader_id", "structure_id")
# What is another text or hash in each copy; all else is the same, but for keys.
OWN = {
    ("patient", "patient_id"): "patient_id || '.' || n",
    ("patient", "original_id"): "original_id || '.' || n",
    ("study", "study_instance_uid"): "study_instance_uid || '.' || n",
    ("series", "series_instance_uid"): "series_instance_uid || '.' || n",
    ("instance", "sop_instance_uid"): "sop_instance_uid || '.' || n",
    ("instance", "content_hash"): "sha256(content_hash || n::text::bytea)",
    ("file", "path"): "regexp_replace(path, '(SYN-?[0-9]{4})/', '\\1.' || n || '/')",
    ("image", "pixel_hash"): "sha256(pixel_hash || n::text::bytea)",
    ("image", "sample_key"): "sample_key((SELECT o.sop_instance_uid FROM instance o WHERE o.id = instance_id) || '.' || n, frame)",
    ("measure", "near_hash"): "hashint8extended(near_hash, n)",
    ("annotation", "content_hash"): "sha256(content_hash || n::text::bytea)",
    ("annotation", "refers_to"): "refers_to || jsonb_build_object('original_id', (refers_to ->> 'original_id') || '.' || n)",
    ("shape", "polygon_hash"): "sha256(polygon_hash || pairing_id::text::bytea || n::text::bytea)",
}

IMAGES = """
SELECT i.id, n.sop_instance_uid, i.frame, i.rows, i.columns, i.position, i.phase, i.trigger_time, se.series_instance_uid,
       st.study_instance_uid, pt.patient_id, f.path
FROM {} JOIN study st ON st.patient_id = pt.id JOIN series se ON se.study_id = st.id JOIN instance n ON n.series_id = se.id
JOIN image i ON i.instance_id = n.id LEFT JOIN location l ON l.image_id = i.id AND l.preferred LEFT JOIN file f ON f.id = l.file_id
WHERE {}
"""
ONE_UID = IMAGES.format("patient pt", "n.sop_instance_uid = %s")
# Everything about a patient: each image with what is drawn on it, mask and shape, and the flags on any of that.
PATIENT_IMAGES = IMAGES.format("patient pt", "pt.patient_id = %s")
PATIENT_DRAWN = """
SELECT a.id, s.name, p.state, p.method, m.area_px, h.perimeter_px, h.centroid, i.id
FROM patient pt JOIN study st ON st.patient_id = pt.id JOIN series se ON se.study_id = st.id JOIN instance n ON n.series_id = se.id
JOIN image i ON i.instance_id = n.id JOIN pairing p ON p.image_id = i.id JOIN annotation a ON a.id = p.annotation_id
JOIN structure s ON s.id = a.structure_id LEFT JOIN mask m ON m.pairing_id = p.id LEFT JOIN shape h ON h.pairing_id = p.id
WHERE pt.patient_id = %s
"""
PATIENT_FLAGS = """
WITH mine AS MATERIALIZED (
    SELECT pt.id AS patient_id, st.id AS study_id, se.id AS series_id, i.id AS image_id
    FROM patient pt JOIN study st ON st.patient_id = pt.id JOIN series se ON se.study_id = st.id JOIN instance n ON n.series_id = se.id
    JOIN image i ON i.instance_id = n.id WHERE pt.patient_id = %s
)
SELECT g.rule, g.severity, g.state, g.detail FROM flag g JOIN (SELECT DISTINCT patient_id FROM mine) o USING (patient_id)
UNION ALL SELECT g.rule, g.severity, g.state, g.detail FROM flag g JOIN (SELECT DISTINCT study_id FROM mine) o USING (study_id)
UNION ALL SELECT g.rule, g.severity, g.state, g.detail FROM flag g JOIN (SELECT DISTINCT series_id FROM mine) o USING (series_id)
UNION ALL SELECT g.rule, g.severity, g.state, g.detail FROM flag g JOIN mine USING (image_id)
UNION ALL SELECT g.rule, g.severity, g.state, g.detail FROM mine JOIN location l USING (image_id) JOIN flag g ON g.file_id = l.file_id
UNION ALL SELECT g.rule, g.severity, g.state, g.detail FROM mine JOIN pairing p USING (image_id) JOIN flag g ON g.pairing_id = p.id
UNION ALL SELECT g.rule, g.severity, g.state, g.detail FROM mine JOIN pairing p USING (image_id)
    JOIN flag g ON g.annotation_id = p.annotation_id
"""
OPEN_BY_RULE = "SELECT rule, severity, count(*) FROM flag WHERE state = 'open' GROUP BY 1, 2 ORDER BY 1, 2"
OPEN_OF_RULE = "SELECT id, severity, detail, value FROM flag WHERE state = 'open' AND rule = %s ORDER BY id LIMIT 100"


def main() -> None:
    """Measure, print the table, write the JSON."""
    arguments = _arguments()
    for name in ("CATALOG_DATABASE_URL", "CATALOG_HOME"):
        os.environ.pop(name, None)
    from ingest import _folder  # benchmarks/ingest.py: beside this file where it is run as a script

    found: dict[str, Any] = {}
    with _folder(arguments.folder) as folder:
        with open_database(home=folder / "home") as db:
            with db.connect(autocommit=True) as conn:
                filled = conn.execute("SELECT count(*) FROM image").fetchone() != (0,)
            if not filled:
                begun = time.perf_counter()
                fill(db, folder / "studies", arguments.images)
                found["fill_s"] = round(time.perf_counter() - begun, 1)
                say(f"filled in {found['fill_s']} s")
            load = [os.getloadavg()[0]]
            if "rules" in arguments.only:
                found["rules"] = run_rules(db, changed=False)
            if "changed" in arguments.only:
                touch(db, CHANGED)
                found["changed"] = run_rules(db, changed=True)
            if "lookups" in arguments.only:
                found["lookups"] = lookups(db, arguments.rounds)
            if "plans" in arguments.only:
                found["plans"] = plans(db)
            if "gallery" in arguments.only:
                found["gallery"] = gallery(db, folder)
            with db.connect(autocommit=True) as conn:
                for name in ("image", "annotation", "flag"):
                    row = conn.execute(sql.SQL("SELECT count(*) FROM {}").format(sql.Identifier(name))).fetchone()
                    found[name] = row[0] if row else 0
        load.append(os.getloadavg()[0])
    report = {
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "settings": {key: value for key, value in vars(arguments).items() if key not in ("json", "folder")},
        "machine": {"cores": len(os.sched_getaffinity(0)), "kernel": platform.release(), "load": load},
        "found": found,
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    print(table(found))
    say(f"all of it: {arguments.json}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--json", type=Path, default=HERE / "results" / "qa.json", help="where the JSON goes")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--images", type=int, default=1_000_000, help=f"a multiple of {OF_ALL}")
    parser.add_argument("--rounds", type=int, default=300, help="of each look-up")
    parser.add_argument("--folder", type=Path, help="keep the data there, and use what is there; by default a temporary folder")
    return parser.parse_args()


# ------------------------------------------------------------------------------------------ the catalog


def fill(db: Database, folder: Path, images: int) -> None:
    """Fill an empty database with so many images, a multiple of 1,000, whose files lie in `folder`, and with two annotations for five."""
    write_studies(folder, patients=PATIENTS, slices=SLICES, phases=PHASES, size=SIZE, every_image=True)
    for path in folder.glob("contourfiles/*/o-contours/*.txt"):
        path.unlink()
    for path in folder.glob("contourfiles/*/i-contours/*.txt"):
        if int(path.name.split("-")[2]) % 25 >= DRAWN:
            path.unlink()
            continue
        points = np.loadtxt(path)
        middle = points.mean(axis=0)
        around = np.rint((middle + (points - middle) * 1.4) * 2) / 2
        np.savetxt(str(path).replace("i-contours", "o-contours").replace("icontour", "ocontour"), around, "%.2f")
    ingest.ingest(db, folder, jobs=1)
    measuring.measure(db, jobs=1)
    copies = images // OF_ALL
    for part in ("dicoms", "contourfiles"):
        for first in [path for path in (folder / part).iterdir() if path.is_dir()]:
            for number in range(1, copies):
                first.with_name(f"{first.name}.{number}").symlink_to(first.name)
    with db.connect() as conn:
        statements = [_copy(conn, table) for table in TABLES]
        for number in range(1, copies, AT_ONCE):
            for statement in statements:
                conn.execute(statement, [number, min(number + AT_ONCE, copies) - 1])
            conn.commit()
            if number // AT_ONCE % 8 == 0:
                say(f"{number * OF_ALL:,} images")
        for name in TABLES:
            if name not in ("location", "mask", "measure", "shape", "overlap", "edge_fit"):
                conn.execute(sql.SQL("SELECT setval(pg_get_serial_sequence({}, 'id'), max(id)) FROM {}").format(name, sql.Identifier(name)))
        _spoil(conn, images)
    with db.connect(autocommit=True) as conn:
        conn.execute("VACUUM (ANALYZE)")  # as autovacuum does within minutes


def _copy(conn: psycopg.Connection[Any], table: str) -> sql.Composed:
    """Return the statement that copies the first patients' rows of a table, with two numbers: from which copy to which."""
    columns = [
        name
        for (name,) in conn.execute(
            "SELECT attname FROM pg_attribute WHERE attrelid = %s::regclass AND attnum > 0 AND attgenerated = '' AND NOT attisdropped",
            [table],
        )
    ]
    moved = [name for name in columns if (name == "id" or name.endswith("_id")) and (table, name) not in OWN and name not in SHARED]
    values = [OWN.get((table, name), f'"{name}" + n * {STEP}' if name in moved else f'"{name}"') for name in columns]
    return sql.SQL(
        "INSERT INTO {} ({}) OVERRIDING SYSTEM VALUE SELECT {} "
        "FROM generate_series(%s::integer, %s::integer) AS n CROSS JOIN {} WHERE {} < {}"
    ).format(
        sql.Identifier(table),
        sql.SQL(", ").join(map(sql.Identifier, columns)),
        sql.SQL(", ").join(map(sql.SQL, values)),
        sql.Identifier(table),
        sql.Identifier(next(name for name in ("id", "image_id", "pairing_id") if name in columns)),
        sql.Literal(STEP),
    )


def _spoil(conn: psycopg.Connection[Any], images: int) -> None:
    """Spread defects of some kinds over the catalog, one in some hundreds, and flags of other origin."""
    conn.execute("UPDATE measure SET maximum = minimum, deviation = 0, entropy = 0, saturated = 1 WHERE image_id % 1009 = 0")
    conn.execute("UPDATE image SET pixel_hash = o.pixel_hash FROM image o WHERE image.id % 2003 = 0 AND o.id = image.id - 1")
    conn.execute("UPDATE shape SET components = 2, self_crossings = 1 WHERE pairing_id % 499 = 0")
    conn.execute("UPDATE instance SET instance_number = 1 WHERE id % 10007 = 0")
    conn.execute("DELETE FROM mask WHERE pairing_id % 5003 = 0")
    conn.execute(
        "INSERT INTO flag (rule, severity, detail, image_id, raised_by) SELECT 'SEEN-' || id %% 10, 'info', 'looked at', id, 'person' "
        "FROM image WHERE id %% %s = 0",
        [max(1, 1_000_000 // FLAGS)],
    )
    conn.commit()


def touch(db: Database, part: float) -> None:
    """Change something of so many of the patients, spread evenly: an image is measured anew, a pairing decided again."""
    with db.connect() as conn:
        step = round(1 / part)
        mine = (
            "SELECT i.id FROM study st JOIN series se ON se.study_id = st.id JOIN instance n ON n.series_id = se.id "
            "JOIN image i ON i.instance_id = n.id WHERE (st.patient_id / %s * %s + st.patient_id %% %s) %% %s = 1"
        )
        numbers = [STEP, PATIENTS, STEP, step]
        conn.execute(f"UPDATE measure SET measured_at = now() WHERE image_id IN ({mine})", numbers)
        conn.execute(f"UPDATE pairing SET score = 0.9, at = now() WHERE image_id IN ({mine})", numbers)
        conn.commit()


# ------------------------------------------------------------------------------------------ what is measured


def run_rules(db: Database, *, changed: bool) -> dict[str, Any]:
    """Run all rules; returns seconds of all and of each, and what they found."""
    before = cpu_s(db)
    summary = qa.run(db, rules=rulefiles.load().values(), changed=changed, actor="bench")
    cpu = round(cpu_s(db) - before, 1)
    say(f"rules{' --changed' if changed else ''}: {summary.seconds:.1f} s over {summary.patients:,} patients, {cpu} s of them computing")
    each = {
        result.rule: {"s": result.seconds, "findings": result.findings, "raised": result.raised, "not_evaluated": result.not_evaluated}
        for result in sorted(summary.results, key=lambda result: -result.seconds)
    }
    return {"s": summary.seconds, "cpu_s": cpu, "patients": summary.patients, "each": each}


def cpu_s(db: Database) -> float:
    """Return the CPU seconds of this process and of the server, with sessions that have ended: what else the machine does is not in it."""
    with db.connect(autocommit=True) as conn:
        row = conn.execute("SELECT pg_backend_pid()").fetchone()
    time.sleep(0.2)  # until the session that asked is over and counted
    own = os.times()
    total = own.user + own.system
    if row is None or db.server is None:
        return total
    postmaster = int(Path(db.server.host, "postmaster.pid").read_text().split()[0])
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(stat.parent.name) == postmaster:
            total += sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
        elif int(fields[1]) == postmaster:
            total += sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")
    return total


def _asked(conn: psycopg.Connection[Any], rng: random.Random, rounds: int) -> dict[str, list[list[tuple[str, Sequence[Any]]]]]:
    """Return what is looked up: name → rounds → statements with what they ask for."""
    uids = [row[0] for row in conn.execute("SELECT sop_instance_uid FROM instance TABLESAMPLE SYSTEM (2)").fetchall()]
    patients = [row[0] for row in conn.execute("SELECT patient_id FROM patient").fetchall()]
    rules = [row[0] for row in conn.execute("SELECT DISTINCT rule FROM flag").fetchall()]
    return {
        "a SOPInstanceUID": [[(ONE_UID, [rng.choice(uids)])] for _ in range(rounds)],
        "a patient's everything": [
            [(query, [one]) for query in (PATIENT_IMAGES, PATIENT_DRAWN, PATIENT_FLAGS)] for one in rng.choices(patients, k=rounds)
        ],
        "open flags by rule, counted": [[(OPEN_BY_RULE, [])] for _ in range(rounds)],
        "open flags of a rule, 100 of them": [[(OPEN_OF_RULE, [rng.choice(rules)])] for _ in range(rounds)],
        "a SOPInstanceUID in the view image_all": [
            [("SELECT * FROM image_all WHERE sop_instance_uid = %s", [rng.choice(uids)])] for _ in range(rounds // 4)
        ],
    }


def lookups(db: Database, rounds: int) -> dict[str, dict[str, float]]:
    """Return the milliseconds of each look-up, rows fetched, by one connection that has asked before: median and 95th percentile."""
    found = {}
    with db.connect(autocommit=True) as conn:
        for name, asked in _asked(conn, random.Random(0), rounds).items():
            took = []
            for statements in asked:
                begun = time.perf_counter()
                for statement, values in statements:
                    conn.execute(statement, values, prepare=True).fetchall()
                took.append((time.perf_counter() - begun) * 1000)
            took.sort()
            found[name] = {"median_ms": round(took[len(took) // 2], 3), "p95_ms": round(took[int(len(took) * 0.95)], 3)}
    return found


def plans(db: Database) -> dict[str, list[str]]:
    """Return, for each look-up that has an index to go by, the large tables that its plan reads from end to end: there must be none."""
    found = {}
    with db.connect(autocommit=True) as conn:
        for name, asked in _asked(conn, random.Random(0), 1).items():
            if name.startswith(("a ", "open flags of")) and "view" not in name:
                found[name] = sorted({one for statement, values in asked[0] for one in scanned(conn, statement, values)})
    return found


def scanned(conn: psycopg.Connection[Any], statement: str, values: Sequence[Any]) -> Iterator[str]:
    """Yield the large tables that a statement's plan reads from end to end."""
    large = {name for (name,) in conn.execute("SELECT relname FROM pg_class WHERE relkind = 'r' AND reltuples >= %s", [LARGE])}
    row = conn.execute(f"EXPLAIN (FORMAT JSON) {statement}", values).fetchone()
    assert row is not None
    plan = [row[0][0]["Plan"]]
    while plan:
        node = plan.pop()
        plan += node.get("Plans", [])
        if node["Node Type"] == "Seq Scan" and node["Relation Name"] in large:
            yield node["Relation Name"]


def gallery(db: Database, folder: Path) -> dict[str, Any]:
    """Return the seconds of `catalog gallery` for many samples, Python's start among them."""
    command = [sys.executable, "-m", "catalog.cli", "gallery", "--sample", str(GALLERY), "--seed", "1", "-o", str(folder / "gallery")]
    begun = time.perf_counter()
    done = subprocess.run(command, env={**os.environ, "CATALOG_HOME": str(folder / "home")}, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - begun
    if done.returncode:
        return {"missing": re.sub(r"\s+", " ", done.stderr.strip())[-200:]}
    return {"s": round(seconds, 1), "samples": GALLERY}


# ------------------------------------------------------------------------------------------ what is shown


def table(found: dict[str, Any]) -> str:
    """Return what was found as Markdown: promises, then seconds a rule."""
    rows: list[tuple[str, str, str, bool | None]] = []
    if one := found.get("rules"):
        title = f"all {len(one['each'])} rules on {found['image']:,} images and {found['annotation']:,} annotations"
        rows.append((title, f"{one['s']:.1f} s, {one['cpu_s']:.1f} s of CPU", "≤ 60 s", one["s"] <= 60))
        if part := found.get("changed"):
            title = f"`--changed` after a change of {part['patients']} of {one['patients']:,} patients"
            said = f"{part['s']:.1f} s, {part['cpu_s']:.1f} s of CPU"
            rows.append((title, said, f"≤ 10 %: {one['s'] / 10:.1f} s", part["s"] <= one["s"] / 10))
    goals = {
        "a SOPInstanceUID": 1,
        "a patient's everything": 10,
        "open flags by rule, counted": 20,
        "open flags of a rule, 100 of them": 20,
    }
    for name, one in found.get("lookups", {}).items():
        goal = goals.get(name)
        rows.append((f"look-up: {name}, p95", f"{one['p95_ms']:.2f} ms (median {one['median_ms']:.2f})", f"≤ {goal} ms" if goal else "",
                     one["p95_ms"] <= goal if goal else None))  # fmt: skip
    for name, scans in found.get("plans", {}).items():
        rows.append((f"large tables that its plan reads from end to end: {name}", ", ".join(scans) or "none", "none", not scans))
    if one := found.get("gallery"):
        said = f"{one['s']:.1f} s" if "s" in one else one["missing"]
        rows.append((f"`catalog gallery` of {GALLERY:,} samples", said, "≤ 30 s", one["s"] <= 30 if "s" in one else None))
    verdict = {True: "met", False: "MISSED", None: ""}
    lines = ["| promise | measured | goal | |", "| --- | --- | --- | --- |"]
    lines += [f"| {title} | {said} | {goal} | {verdict[met]} |" for title, said, goal, met in rows]
    if one := found.get("rules"):
        part = found.get("changed", {"each": {}})["each"]
        lines += ["", "| rule | s | --changed, s | findings | not evaluated |", "| --- | ---: | ---: | ---: | ---: |"]
        for rule, each in one["each"].items():
            again = f"{part[rule]['s']:.2f}" if rule in part else ""
            lines.append(f"| {rule} | {each['s']:.2f} | {again} | {each['findings']:,} | {each['not_evaluated']:,} |")
    return "\n".join(lines)


def say(line: str) -> None:
    """Say on stderr how far it is."""
    print(f"bench: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
