"""Splits: patients that share pixels on one side, whoever writes; the same for the same seed; nobody moves; frozen is frozen."""

from __future__ import annotations

import csv
import io
import itertools
import json
import threading
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from catalog import cli, splitfiles, splits
from catalog.database import open_database
from catalog.dealing import Patient, deal, parse_ratios
from catalog.errors import CatalogError, UsageError
from tests.conftest import Run
from tests.planting import Archive

SEEDS = range(4)


# ------------------------------------------------------------------------------------------ who comes where


def people(rng: np.random.Generator, count: int, strata: int = 1) -> list[Patient]:
    values = [None, *map(str, range(1, strata))]
    return [Patient(number + 1, f"P{number:04d}", stratum=values[rng.integers(strata)]) for number in range(count)]


def ties(rng: np.random.Generator, ids: list[int], count: int) -> list[tuple[int, int]]:
    return [(int(a), int(b)) for a, b in rng.choice(ids, (count, 2)) if a != b]


def kin(ids: Iterable[int], twins: Iterable[tuple[int, int]]) -> list[set[int]]:
    """Groups that share pixels, found by growing each; not as the code does it."""
    beside: dict[int, set[int]] = defaultdict(set)
    for a, b in twins:
        beside[a].add(b)
        beside[b].add(a)
    left, found = set(ids), []
    while left:
        group, edge = set(), {left.pop()}
        while edge:
            group |= edge
            edge = {other for one in edge for other in beside[one]} - group
        left -= group
        found.append(group)
    return found


@pytest.mark.parametrize("seed", SEEDS)
def test_a_thousand_random_catalogs(seed: int) -> None:
    """Each patient in one part; who shares pixels lies together; parts are off by (1 − 1/k) of the largest group at most."""
    rng = np.random.default_rng(seed)
    for _ in range(1000):
        patients = people(rng, int(rng.integers(1, 40)))
        twins = ties(rng, [one.id for one in patients], int(rng.integers(0, 1 + len(patients) // 2)))
        shares = rng.integers(1, 30, int(rng.integers(1, 5))).tolist()
        parts = ["train", "val", "test", "other"][: len(shares)]
        folds = [None, 2, 5][rng.integers(3)]
        assert deal(patients, twins, parts, shares, folds=folds, seed=int(rng.integers(100))) == []
        side = {one.id: (one.part, one.fold) for one in patients}
        assert all(part in parts for part, _ in side.values())
        assert all(side[a] == side[b] for a, b in twins)
        assert all((one.fold is None) == (folds is None or one.part == "test") for one in patients)
        groups = kin(side, twins)
        largest = max(map(len, groups))
        for part, share in zip(parts, shares, strict=True):
            off = sum(one.part == part for one in patients) - share / sum(shares) * len(patients)
            assert abs(off) <= (1 - 1 / len(parts)) * largest + 1e-9
        folded = Counter(one.fold for one in patients if one.fold is not None)
        if folds and folded:
            largest = max(len(group) for group in groups if side[min(group)][1] is not None)
            for fold in range(folds):
                assert abs(folded[fold] - folded.total() / folds) <= (1 - 1 / folds) * largest + 1e-9


@pytest.mark.parametrize("seed", SEEDS)
def test_strata_are_dealt_out_evenly(seed: int) -> None:
    """With strata each part is near its share in all and in each stratum: within one and a half of the largest group."""
    rng = np.random.default_rng(seed)
    for _ in range(300):
        patients = people(rng, int(rng.integers(1, 150)), int(rng.choice([2, 5, 20])))
        twins = ties(rng, [one.id for one in patients], int(rng.choice([0, 0, len(patients) // 10])))
        shares = [[70, 15, 15], [80, 20], [1, 1, 1, 1, 1]][rng.integers(3)]
        parts = [f"part {number}" for number in range(len(shares))]
        deal(patients, twins, parts, shares, seed=int(rng.integers(100)))
        largest = max(map(len, kin([one.id for one in patients], twins)))
        for members in ([patients] if len(patients) else []) + [
            [one for one in patients if one.stratum == stratum] for stratum in {one.stratum for one in patients}
        ]:
            for part, share in zip(parts, shares, strict=True):
                off = sum(one.part == part for one in members) - share / sum(shares) * len(members)
                assert abs(off) <= 1.5 * largest


def test_small_strata_do_not_all_go_to_one_part() -> None:
    """Twenty strata of three: what rounding gave to val in one, test gets in the next."""
    patients = [Patient(number, f"P{number}", stratum=str(number // 3)) for number in range(60)]
    deal(patients, [], ["train", "val", "test"], [0.7, 0.15, 0.15])
    assert Counter(one.part for one in patients) == {"train": 42, "val": 9, "test": 9}


@given(
    count=st.integers(1, 25),
    shares=st.lists(st.integers(1, 100), min_size=1, max_size=4),
    folds=st.sampled_from([None, 2, 4]),
    seed=st.integers(0, 3),
    chance=st.randoms(use_true_random=False),
)
def test_the_order_of_rows_means_nothing(count: int, shares: list[int], folds: int | None, seed: int, chance: Any) -> None:
    """Other ids, another order of patients and of pairs: the same patients come to the same places."""
    names = [f"P{number}" for number in range(count)]
    strata = {name: chance.choice([None, "a", "b"]) for name in names}
    pairs = [(chance.choice(names), chance.choice(names)) for _ in range(count // 3)]
    found = []
    for _ in range(2):
        chance.shuffle(names)
        chance.shuffle(pairs)
        ids = {name: number * 7 + 3 for number, name in enumerate(names)}
        patients = [Patient(ids[name], name, stratum=strata[name]) for name in names]
        twins = [(ids[a], ids[b]) for a, b in (chance.choice([one, one[::-1]]) for one in pairs) if a != b]
        deal(patients, twins, [f"part {number}" for number in range(len(shares))], shares, folds=folds, seed=seed)
        found.append({one.name: (one.part, one.fold, one.stratum) for one in patients})
    assert found[0] == found[1]


@pytest.mark.parametrize("seed", SEEDS)
def test_who_comes_later_moves_nobody(seed: int) -> None:
    """New patients follow those that they share pixels with, or are left out where these lie on several sides; nobody else is."""
    rng = np.random.default_rng(seed)
    seen: Counter[str] = Counter()
    for _ in range(300):
        old = people(rng, int(rng.integers(1, 30)), 3)
        twins = ties(rng, [one.id for one in old], len(old) // 4)
        shares, folds, key = [0.6, 0.2, 0.2], [None, 3][rng.integers(2)], int(rng.integers(100))
        deal(old, twins, ["train", "val", "test"], shares, folds=folds, seed=key)
        before = {one.id: (one.part, one.fold) for one in old}
        new = [Patient(1000 + number, f"N{number}") for number in range(int(rng.integers(0, 20)))]
        later = [
            (one.id, int(rng.choice([other.id for other in (*old, *new)]))) for one in new for _ in range(int(rng.choice([0, 0, 1, 2])))
        ]
        twins += [pair for pair in later if pair[0] != pair[1]]
        tied = deal([*new, *old], twins, ["train", "val", "test"], shares, folds=folds, seed=key)
        side = {one.id: (one.part, one.fold) for one in (*old, *new)}
        assert {one.id: side[one.id] for one in old} == before
        fresh = {one.id for one in new}
        left = set()
        for group in kin(fresh, [pair for pair in twins if set(pair) <= fresh]):
            beside = {side[other] for pair in twins for one, other in (pair, pair[::-1]) if one in group and other not in fresh}
            if len(beside) > 1:
                left |= group
                assert {side[one] for one in group} == {(None, None)}
                seen["tied"] += 1
            else:
                [place] = {side[one] for one in group}
                assert place[0] in ("train", "val", "test") and (not beside or {place} == beside)
                seen["followed" if beside else "free"] += 1
        assert sorted(itertools.chain(*(one.patients for one in tied))) == sorted(left)
        assert all(len(one.sides) > 1 for one in tied)
    assert min(seen[what] for what in ("tied", "followed", "free")) > 50


def test_a_group_has_one_stratum() -> None:
    """Patients that go together are of the stratum that most of them have; of equally many the first."""
    patients = [Patient(number, f"P{number}", stratum=stratum) for number, stratum in enumerate(["b", "a", "b", "d", "c", None])]
    deal(patients, [(0, 1), (1, 2), (3, 4), (4, 5)], ["train"], [1.0])
    assert [one.stratum for one in patients] == ["b", "b", "b", "c", "c", "c"]


def test_known_answer() -> None:
    """The rule is the same in every version: what a seed gave it gives for ever."""
    patients = [Patient(number, f"P{number:02d}", stratum="ab"[number % 2]) for number in range(12)]
    deal(patients, [(0, 1), (1, 2)], ["train", "val", "test"], [0.5, 0.25, 0.25], folds=2, seed=7)
    assert " ".join(f"{one.part}{'' if one.fold is None else one.fold}" for one in patients) == KNOWN


KNOWN = "train0 train0 train0 train0 val1 val1 val1 train0 test train1 test test"


def test_seeds_differ_and_folds_are_no_parts() -> None:
    """Another seed deals otherwise; a fold holds patients of every part that has folds."""
    found = []
    for seed in (1, 2):
        patients = [Patient(number, f"P{number}") for number in range(40)]
        deal(patients, [], ["train", "val"], [0.5, 0.5], folds=2, seed=seed)
        found.append([one.part for one in patients])
        both = Counter((one.part, one.fold) for one in patients)
        assert len(both) == 4 and min(both.values()) >= 3
    assert found[0] != found[1]


def test_ratios() -> None:
    """Numbers in the order of train, val, test, or with names; they need not sum to anything; nonsense is refused."""
    assert parse_ratios("70,15,15") == {"train": 0.7, "val": 0.15, "test": 0.15}
    assert parse_ratios("80, 20") == {"train": 0.8, "val": 0.2}
    assert parse_ratios("0.7,0.1,.2") == {"train": 0.7, "val": 0.1, "test": 0.2}
    assert parse_ratios("1") == {"train": 1.0}
    assert parse_ratios("left=1,right=1,held out=2") == {"left": 0.25, "right": 0.25, "held out": 0.5}
    for wrong in ("", ",", "70,", "0,1", "-1,2", "nan,1", "inf,1", "1e3,1", "1,2,3,4", "a=1,2", "a=1,a=2", "a/b=1,c=1", "a:1=1", "=1", 
                  "a=", "a=0", "a=x", "70;30", "train=70%", "\udcff=1", "٧٠,٣٠", "99999999999,1"):  # fmt: skip
        with pytest.raises(UsageError, match="--ratios"):
            parse_ratios(wrong)


# ------------------------------------------------------------------------------------------ in the database


def plant(conn: psycopg.Connection, pixels: Mapping[str, Iterable[object]]) -> dict[str, int]:
    """Add patients with an image each of these pixels (None: not hashed), nothing else; returns PatientID → patient.id."""
    for patient, contents in pixels.items():
        conn.execute("INSERT INTO patient (patient_id) VALUES (%s) ON CONFLICT DO NOTHING", [patient])
        conn.execute(
            "INSERT INTO study (patient_id, study_instance_uid) SELECT id, %(p)s FROM patient WHERE patient_id = %(p)s "
            "ON CONFLICT DO NOTHING",
            {"p": patient},
        )
        conn.execute(
            "INSERT INTO series (study_id, series_instance_uid) SELECT id, %(p)s FROM study WHERE study_instance_uid = %(p)s "
            "ON CONFLICT DO NOTHING",
            {"p": patient},
        )
        for content in contents:
            uid = uuid.uuid4()
            conn.execute(
                "WITH n AS (INSERT INTO instance (series_id, sop_instance_uid, number_of_frames) "
                "SELECT id, %(uid)s, 1 FROM series WHERE series_instance_uid = %(p)s RETURNING id) "
                "INSERT INTO image (instance_id, frame, rows, columns, pixel_hash, sample_key) "
                "SELECT id, 0, 8, 8, sha256(%(content)s::bytea), %(key)s FROM n",
                {"p": patient, "uid": str(uid), "key": uid, "content": None if content is None else str(content).encode()},
            )
    return dict(conn.execute("SELECT patient_id, id FROM patient").fetchall())


def sides(conn: psycopg.Connection, split: str) -> dict[str, tuple[str, int | None]]:
    found = conn.execute(
        "SELECT p.patient_id, sp.part, sp.fold FROM split s JOIN split_patient sp ON sp.split_id = s.id "
        "JOIN patient p ON p.id = sp.patient_id WHERE s.name = %s ORDER BY 1",
        [split],
    )
    return {patient: (part, fold) for patient, part, fold in found.fetchall()}


def put(conn: psycopg.Connection, split: str, patient: str, part: str) -> None:
    conn.execute(
        "INSERT INTO split_patient (split_id, patient_id, part) SELECT s.id, p.id, %s FROM split s, patient p "
        "WHERE s.name = %s AND p.patient_id = %s",
        [part, split, patient],
    )


@pytest.fixture
def family(conn: psycopg.Connection) -> psycopg.Connection:
    """Six patients: A and B share pixels, so do B and C; the others share nothing."""
    plant(conn, {"A": [1, 2], "B": [2, 3], "C": [3, 4], "D": [5], "E": [6], "F": [7]})
    return conn


def test_random_catalogs_in_the_database(conn: psycopg.Connection, database_url: str) -> None:
    """150 times other patients share pixels and other ratios are asked for: nobody without a part, no pixels on two sides."""
    rng = np.random.default_rng(5)
    plant(conn, {f"P{number:02d}": [number, number + 100] for number in range(24)})
    images = [one for (one,) in conn.execute("SELECT id FROM image ORDER BY id").fetchall()]
    with open_database(database_url) as db:
        for number in range(150):
            kinds = rng.choice(int(rng.integers(12, 400)), len(images))
            conn.execute(
                "UPDATE image SET pixel_hash = sha256(d.kind::text::bytea) FROM unnest(%s::bigint[], %s::bigint[]) AS d (id, kind) "
                "WHERE image.id = d.id",
                [images, kinds.tolist()],
            )
            names = [["train", "val"], ["train", "val", "test"], ["train"]][rng.integers(3)]
            folds = int(rng.integers(2, 5)) if len(names) == 1 or rng.random() < 0.3 else None
            done = splits.create(
                db, f"s{number}", ratios=dict.fromkeys(names, 1 / len(names)), folds=folds, seed=int(rng.integers(1 << 60)), actor="ada"
            )
            assert (done.added, done.shown.without, done.tied) == (24, 0, [])
            [[held]] = conn.execute(
                "SELECT count(*) FROM split_patient sp JOIN split s ON s.id = sp.split_id WHERE s.name = %s", [f"s{number}"]
            ).fetchall()
            assert held == 24
            mixed = conn.execute(
                "SELECT i.pixel_hash FROM image i JOIN instance n ON n.id = i.instance_id JOIN series se ON se.id = n.series_id "
                "JOIN study st ON st.id = se.study_id JOIN split_patient sp ON sp.patient_id = st.patient_id "
                "JOIN split s ON s.id = sp.split_id WHERE s.name = %s GROUP BY 1 HAVING count(DISTINCT (sp.part, sp.fold)) > 1",
                [f"s{number}"],
            ).fetchall()
            assert mixed == []
            assert conn.execute("SELECT FROM split_leaks WHERE split = %s", [f"s{number}"]).fetchall() == []


def test_the_same_on_another_server(family: psycopg.Connection, database_url: str, new_database: Callable[..., str]) -> None:
    """Patients that came in another order, with other ids, in another database: the same split."""
    other = new_database()
    with psycopg.connect(other, autocommit=True) as conn:
        plant(conn, {"Z": []})
        for table in ("series", "study", "patient"):
            conn.execute(f"DELETE FROM {table}")
        plant(conn, {"F": [7], "E": [6], "D": [5], "C": [4, 3], "B": [3, 2], "A": [2, 1]})
        for url in (database_url, other):
            with open_database(url) as db:
                splits.create(db, "s", ratios=parse_ratios("50,25,25"), folds=2, seed=3, actor="ada")
        assert sides(conn, "s") == sides(family, "s")
        assert len(sides(conn, "s")) == 6


def test_a_split_grows_and_moves_nobody(family: psycopg.Connection, database_url: str) -> None:
    """Who came since gets a part, beside whom he shares pixels with; one who ties two sides together is left without and named."""
    with open_database(database_url) as db:
        splits.create(db, "s", ratios=parse_ratios("50,50"), actor="ada")
        before = sides(family, "s")
        d = next(name for name in "DEF" if before[name] != before["A"])
        ids = plant(family, {"G": [4, 20], "H": [{"D": 5, "E": 6, "F": 7}[d], 1], "I": [30], "J": [31], "K": [20]})
        foreseen = splits.extend(db, "s", actor="bo", dry_run=True)
        assert sides(family, "s") == before
        done = splits.extend(db, "s", actor="bo")
        after = sides(family, "s")
        assert done.shown == foreseen.shown and done.added == foreseen.added == 4
        assert {name: after[name] for name in before} == before
        # G has pixels of C, and K of G; H has pixels of A and of somebody on the other side.
        assert after["G"] == after["K"] == before["C"]
        assert [(one.patients, one.sides) for one in done.tied] == [([ids["H"]], ["train", "val"])]
        assert set(after) == set("ABCDEFGIJK")
        changes = family.execute("SELECT count(*) FROM catalog_change").fetchall()
        again = splits.extend(db, "s", actor="bo")
        assert again.added == 0 and sides(family, "s") == after
        assert family.execute("SELECT count(*) FROM catalog_change").fetchall() == changes  # no daemon has to plan anew
        assert splits.show(db, "s").without == 11 - len(after)
        [checked] = splits.check(db, "s")
        assert checked.leaks == [] and checked.tied == done.tied and checked.without == 11 - len(after)
    events = family.execute("SELECT actor, action, reason, count(*) FROM event WHERE subject = 'split_patient' GROUP BY 1, 2, 3 ORDER BY 1")
    assert events.fetchall() == [("ada", "insert", "split made", 6), ("bo", "insert", "split extended", len(after) - 6)]


def test_raw_sql_is_refused(family: psycopg.Connection, database_url: str) -> None:
    """Whoever writes the row: no second part of a patient, no sharer on another side, by INSERT or UPDATE; no part that there is not."""
    family.execute("INSERT INTO split (name, parts, actor) VALUES ('s', '{train,test}', 'x')")
    family.execute("INSERT INTO split (name, parts, folds, actor) VALUES ('f', '{train,test}', 2, 'x')")
    put(family, "s", "A", "train")
    put(family, "s", "D", "test")
    for refused in (
        lambda: put(family, "s", "A", "train"),
        lambda: put(family, "s", "A", "test"),
        lambda: put(family, "s", "B", "test"),
        lambda: put(family, "s", "E", "val"),
        lambda: put(family, "s", "E", ""),
        lambda: put(family, "f", "E", "train"),  # without a fold
        lambda: family.execute(
            "INSERT INTO split_patient (split_id, patient_id, part) "
            "SELECT s.id, p.id, CASE patient_id WHEN 'B' THEN 'train' ELSE 'test' END FROM split s, patient p "
            "WHERE s.name = 's' AND patient_id IN ('B', 'C')"
        ),
        lambda: family.execute(
            "INSERT INTO split_patient (split_id, patient_id, part, fold) "
            "SELECT s.id, p.id, 'train', CASE patient_id WHEN 'B' THEN 1 ELSE 0 END FROM split s, patient p "
            "WHERE s.name = 'f' AND patient_id IN ('B', 'C')"
        ),
        lambda: family.execute("UPDATE split SET parts = '{train,val}' WHERE name = 's'"),
        lambda: family.execute("UPDATE split SET stratify = 'modality' WHERE name = 's'"),
        lambda: family.execute("TRUNCATE split_patient"),
        lambda: family.execute("TRUNCATE patient CASCADE"),
        lambda: family.execute("TRUNCATE split CASCADE"),
    ):
        with pytest.raises((psycopg.errors.IntegrityError, psycopg.errors.InsufficientPrivilege)):
            refused()
    put(family, "s", "B", "train")
    with pytest.raises(psycopg.errors.CheckViolation, match="share pixels"):
        family.execute("UPDATE split_patient SET part = 'test' WHERE patient_id = (SELECT id FROM patient WHERE patient_id = 'A')")
    with pytest.raises(psycopg.errors.CheckViolation, match="share pixels"):
        family.execute(
            "UPDATE split_patient SET patient_id = (SELECT id FROM patient WHERE patient_id = 'C') "
            "WHERE patient_id = (SELECT id FROM patient WHERE patient_id = 'D')"
        )
    family.execute("UPDATE split_patient SET part = 'test' WHERE part = 'train'")  # both together may
    assert sides(family, "s") == {"A": ("test", None), "B": ("test", None), "D": ("test", None)}


def test_blank_images_tie_nobody(conn: psycopg.Connection) -> None:
    """A black frame that two patients have ties them together until it is measured, in both directions."""
    plant(conn, {"A": ["black", 1], "B": ["black", 2]})
    conn.execute("INSERT INTO split (name, parts, actor) VALUES ('s', '{train,test}', 'x')")
    put(conn, "s", "A", "train")
    with pytest.raises(psycopg.errors.CheckViolation):
        put(conn, "s", "B", "test")
    conn.execute(
        "INSERT INTO measure (image_id, minimum, maximum, mean, deviation, entropy, saturated, nans) "
        "SELECT id, 0, 0, 0, 0, 0, 0, 0 FROM image WHERE pixel_hash = sha256('black')"
    )
    put(conn, "s", "B", "test")
    assert conn.execute("SELECT FROM split_leaks").fetchall() == []


FROZEN = {
    "insert": "INSERT INTO split_patient (split_id, patient_id, part) SELECT s.id, p.id, 'train' FROM split s, patient p "
    "WHERE s.name = 's' AND p.patient_id = 'Z'",
    "part": "UPDATE split_patient SET part = 'train'",
    "patient": "UPDATE split_patient SET patient_id = (SELECT id FROM patient WHERE patient_id = 'Z') WHERE part = 'test'",
    "taken to another split": "UPDATE split_patient SET split_id = (SELECT id FROM split WHERE name = 'other')",
    "time": "UPDATE split_patient SET at = now()",
    "delete": "DELETE FROM split_patient",
    "truncate": "TRUNCATE split_patient",
    "thaw": "UPDATE split SET frozen_by = NULL, frozen_at = NULL WHERE name = 's'",
    "rename": "UPDATE split SET name = 't' WHERE name = 's'",
    "whole": "DELETE FROM split WHERE name = 's'",
    "truncate whole": "TRUNCATE split CASCADE",
}


def test_frozen_is_frozen(family: psycopg.Connection, database_url: str) -> None:
    """Of a frozen split no row comes, changes or goes, nor the split itself; extend says so in one line; freezing again changes nothing."""
    with open_database(database_url) as db:
        splits.create(db, "s", ratios=parse_ratios("50,25,25"), actor="ada")
        family.execute("INSERT INTO split (name, parts, actor) VALUES ('other', '{train,val,test}', 'x')")
        assert splits.freeze(db, "s", actor="bo", dry_run=True)[1] and splits.show(db, "s").split.frozen_by is None
        frozen, changed = splits.freeze(db, "s", actor="bo")
        assert changed and frozen.frozen_by == "bo" and frozen.frozen_at is not None
        assert splits.freeze(db, "s", actor="cy") == (frozen, False)
        before = sides(family, "s")
        plant(family, {"Z": [99]})
        for what, statement in FROZEN.items():
            with pytest.raises((psycopg.errors.CheckViolation, psycopg.errors.InsufficientPrivilege)):
                family.execute(statement.encode())
                pytest.fail(f"not refused: {what}")
        assert sides(family, "s") == before
        with pytest.raises(CatalogError, match="frozen by bo"):
            splits.extend(db, "s", actor="ada")


def test_an_erased_patient_leaves_a_frozen_split(ingested: str, conn: psycopg.Connection, catalog: Run) -> None:
    """Erasing is the one thing that a frozen split lets go through, and the split's events stay."""
    assert catalog("split", "create", "s", "--ratios", "50,50").returncode == 0
    assert catalog("split", "freeze", "s").returncode == 0
    before = sides(conn, "s")
    gone = min(before)
    done = catalog("patient", "erase", gone, "--reason", "asked for")
    assert done.returncode == 0, done.stderr
    assert sides(conn, "s") == {name: side for name, side in before.items() if name != gone}
    assert json.loads(catalog("split", "show", "s", "--json").stdout)["patients"] == 2


@pytest.mark.parametrize("isolation", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
@pytest.mark.parametrize("second", ["share", "frozen"])
def test_two_sessions_at_once(family: psycopg.Connection, database_url: str, isolation: str, second: str) -> None:
    """One puts A into train while another puts B, who shares its pixels, into test, or freezes the split: one of them is refused."""
    family.execute("INSERT INTO split (name, parts, actor) VALUES ('s', '{train,test}', 'x')")
    failed: list[psycopg.Error] = []
    with psycopg.connect(database_url) as one, psycopg.connect(database_url) as two:
        for conn in (one, two):
            conn.execute(f"SET TRANSACTION ISOLATION LEVEL {isolation}".encode())
            conn.execute("SELECT FROM split")
        if second == "share":
            put(one, "s", "A", "train")
        else:
            one.execute("UPDATE split SET frozen_by = 'x', frozen_at = now()")

        def other() -> None:
            try:
                put(two, "s", "B", "test")
                two.commit()
            except psycopg.Error as error:
                failed.append(error)

        thread = threading.Thread(target=other)
        thread.start()
        while (
            family.execute("SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'").fetchall() == []
        ):
            assert thread.is_alive(), "it did not wait for the first one"
        one.commit()
        thread.join()
        assert isinstance(failed[0], psycopg.errors.CheckViolation | psycopg.errors.SerializationFailure)
    assert sides(family, "s") == ({"A": ("train", None)} if second == "share" else {})


# ------------------------------------------------------------------------------------------ strata


def test_stratify(conn: psycopg.Connection, database_url: str) -> None:
    """By the most frequent value of an expression over the samples of a patient; those without a sample are a stratum of their own."""
    archive = Archive()
    for number in range(12):
        archive.heart(slices=1, phases=3) if number < 8 else archive.study(slices=1, phases=3)
    archive.write(conn)
    # Of the first four patients two samples of three are at phase 7; the value of one alone does not count.
    conn.execute(
        "UPDATE image i SET phase = 7 FROM instance n, series se, study st WHERE n.id = i.instance_id AND se.id = n.series_id "
        "AND st.id = se.study_id AND st.patient_id <= 4 AND i.phase > 0"
    )
    with open_database(database_url) as db:
        for name, expression in {"s": "phase = 7", "t": "CASE WHEN phase = 7 THEN 'late' END -- the rest is none", "u": "1 % 2"}.items():
            done = splits.create(db, name, ratios=parse_ratios("50,50"), stratify=expression, actor="ada")
            assert (
                done.shown.strata
                == {
                    "s": {"false": {"train": 2, "val": 2}, "true": {"train": 2, "val": 2}},
                    "t": {"late": {"train": 2, "val": 2}},
                    "u": {"1": {"train": 4, "val": 4}},
                }[name]
            )
            assert [one.patients for one in done.shown.parts] == [6, 6]
        plant(conn, {"Z": []})
        assert splits.extend(db, "s", actor="ada").added == 1
        for wrong in ("", "nothing", "phase)", "1) IS NULL OR (true", "phase, 1", "count(*)", "phase; SELECT 1", "(SELECT",
                      "1/(phase - phase)", "'a'::integer", "lo_create(0)", "pg_sleep(100), 1", "\udcff", "phase /*",
                      "rank() OVER ()"):  # fmt: skip
            if wrong == "lo_create(0)" and conn.info.server_version < 160000:
                continue  # there everybody may make large objects; what a reading connection makes is rolled back
            with pytest.raises((UsageError, CatalogError), match=r"^(--stratify|database|the embedded)"):
                splits.create(db, "wrong", ratios=parse_ratios("50,50"), stratify=wrong, actor="ada")
    assert {one for (one,) in conn.execute("SELECT name FROM split").fetchall()} == {"s", "t", "u"}


# ------------------------------------------------------------------------------------------ from a file


def test_import_takes_over_a_split(family: psycopg.Connection, database_url: str, catalog: Run, tmp_path: Path) -> None:
    """A CSV gives each patient its part and fold, by PatientID or the source's name; what `catalog sql` writes of a split comes back."""
    family.execute("UPDATE patient SET original_id = 'SC-' || patient_id")
    path = tmp_path / "given.csv"
    path.write_bytes("\ufeffpart,patient,fold\r\ntrain, A ,1\r\ntrain,SC-B,1\r\ntrain,C,1\r\n\r\ntest,D,\r\nextra,E,0\r\n".encode())
    with open_database(database_url) as db:
        assert splits.import_csv(db, "s", path, actor="ada", dry_run=True).added == 5
        assert sides(family, "s") == {}
        done = splits.import_csv(db, "s", path, actor="ada")
        assert (done.added, done.shown.without, done.shown.split.parts, done.shown.split.folds) == (5, 1, ["train", "test", "extra"], 2)
        assert sides(family, "s") == {"A": ("train", 1), "B": ("train", 1), "C": ("train", 1), "D": ("test", None), "E": ("extra", 0)}
        with pytest.raises(CatalogError, match="imported"):
            splits.extend(db, "s", actor="ada")
        with pytest.raises(CatalogError, match="there is one of this name"):
            splits.import_csv(db, "s", path, actor="ada")
    query = (
        "SELECT p.patient_id AS patient, part, fold FROM split s JOIN split_patient sp ON sp.split_id = s.id "
        "JOIN patient p ON p.id = sp.patient_id WHERE s.name = 's'"
    )
    written = catalog("sql", query, "--csv", "-o", tmp_path / "written.csv")
    assert written.returncode == 0, written.stderr
    assert catalog("split", "import", "again", tmp_path / "written.csv").returncode == 0
    assert sides(family, "again") == sides(family, "s")


def test_import_is_refused_as_a_whole(family: psycopg.Connection, database_url: str, tmp_path: Path) -> None:
    """Unknown patients, one twice, sharers on two sides: nothing is taken over, each is named by its line and nobody by name."""
    family.execute("UPDATE patient SET original_id = 'twin' WHERE patient_id IN ('E', 'F')")
    path = tmp_path / "given.csv"
    path.write_text("patient,part\nA,train\nWho,train\nD,val\nC,val\nB,val\nD,val\ntwin,val\n")
    with open_database(database_url) as db:
        with pytest.raises(CatalogError) as refused:
            splits.import_csv(db, "s", path, actor="ada")
        assert str(refused.value) == (
            "given.csv: nothing was imported: lines 2 and 6 share pixels, and lie on two sides; line 3 names no patient of the "
            "catalog; line 7 is the patient of line 4; line 8 names several patients of the catalog; "
            "mend or leave out these lines, then import again"
        )
        path.write_text("patient,part\n" + "".join(f"N{number},train\n" for number in range(30)))
        with pytest.raises(CatalogError, match=r"line 21 names no patient of the catalog; and 10 more; mend"):
            splits.import_csv(db, "s", path, actor="ada")
    assert splits_of(family) == [] and sides(family, "s") == {}


def splits_of(conn: psycopg.Connection) -> list[str]:
    return [name for (name,) in conn.execute("SELECT name FROM split ORDER BY 1").fetchall()]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "line 1: names the columns"),
        (b"patient\nA\n", "line 1: names the columns"),
        (b"patient,part,folds\nA,train,1\n", "line 1: names the columns"),
        (b"patient,part,part\nA,train,train\n", "line 1: names the columns"),
        (b"patient;part\nA;train\n", "line 1: names the columns"),
        (b"patient,part\n", "names no patient"),
        (b"patient,part\nA\n", "line 2: has 1 fields where line 1 has 2"),
        (b"patient,part\n ,train\n", "line 2: names no patient"),
        (b"patient,part\nA,train\nB,a/b\n", "line 3: part is text"),
        (b"patient,part\nA,\n", "line 2: part is text"),
        (b"patient,part\nA,a\0b\n", "line 2: holds a NUL"),
        (b"patient,part\nA,train\n\xe9,train\n", "line 3: is not UTF-8"),
        (b'patient,part\n"A,train\n', "line 2: unexpected end of data"),
        (b"patient,part,fold\nA,train,x\n", "line 2: fold is"),
        (b"patient,part,fold\nA,train,-1\n", "line 2: fold is"),
        (b"patient,part,fold\nA,train,1\nB,train,2\n", "folds count from 0"),
        (b"patient,part,fold\nA,train,0\nB,train,0\n", "folds count from 0"),
        (b"patient,part,fold\nA,train,0\nB,train,99999\n", "line 3: fold is"),
        (b"patient,part,fold\nA,train,0\nB,train,1\nD,train,\n", "line 4: who is in test has no fold"),
        (b"patient,part,fold\nA,train,0\nB,train,1\nD,test,1\n", "line 4: who is in test has no fold"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_split(database_url: str, tmp_path: Path, content: bytes, says: str) -> None:
    """What cannot be read as a split is told with its line, before the database is asked."""
    (tmp_path / "given.csv").write_bytes(content)
    with open_database(database_url) as db, pytest.raises(UsageError, match=says) as error:
        splits.import_csv(db, "s", tmp_path / "given.csv", actor="ada")
    assert "\n" not in str(error.value) and "\0" not in str(error.value)


@given(
    rows=st.lists(st.tuples(st.text(max_size=5), st.sampled_from(["train", "val", "test", "x", "", "a/b"]), st.sampled_from("01 x"))),
    cut=st.integers(0, 200),
    noise=st.binary(max_size=3),
)
def test_any_bytes_are_a_split_or_one_line(tmp_path_factory: pytest.TempPathFactory, rows: list[Any], cut: int, noise: bytes) -> None:
    """Whatever a file holds: rows, or a message in one line."""
    out = io.StringIO()
    csv.writer(out).writerows([("patient", "part", "fold"), *rows])
    path = tmp_path_factory.getbasetemp() / "any.csv"
    content = out.getvalue().encode(errors="replace")
    path.write_bytes(content[:cut] + noise + content[cut:])
    try:
        found = splitfiles.read(path)
    except UsageError as error:
        assert "\n" not in str(error)
    else:
        assert all(row.patient and row.part for row in found)


# ------------------------------------------------------------------------------------------ the commands


class Said(NamedTuple):
    """What a command ended with and wrote."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def split(database_url: str, capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """Run `catalog split …` in this process, which takes a tenth of the time of one of its own."""

    def run(*arguments: str) -> Said:
        try:
            code, words = cli.app(["split", *arguments], prog_name="catalog", standalone_mode=False), ""
        except CatalogError as error:
            code, words = error.exit_code, str(error)
        said = capsys.readouterr()
        return Said(code or 0, said.out, said.err + words)

    return run


def test_the_commands(ingested: str, conn: psycopg.Connection, split: Callable[..., Said], catalog: Run) -> None:
    """create, list, show, check, freeze as text and as JSON; a dry run says the same and changes nothing, not even a number."""

    def counted() -> list[tuple[Any, ...]]:
        return conn.execute(
            "SELECT (SELECT count(*) FROM event), (SELECT count(*) FROM split_patient), (SELECT count(*) FROM catalog_change), "
            "(SELECT concat(last_value, is_called) FROM split_id_seq), (SELECT last_value FROM event_id_seq), (SELECT count(*) FROM split)"
        ).fetchall()

    assert "no splits" in split("list").stdout
    assert "no splits" in split("check").stdout
    before = counted()
    asked = ["create", "s", "--ratios", "train=2,test=1", "--folds", "2", "--stratify", "modality", "--seed", "4", "--json"]
    foreseen = split(*asked, "--dry-run")
    assert foreseen.returncode == 0, foreseen.stderr
    assert "dry run" in foreseen.stderr and counted() == before
    done = split(*asked, "--actor", "ada")
    assert done.returncode == 0, done.stderr
    said, dry = json.loads(done.stdout), json.loads(foreseen.stdout)
    assert {**said["shown"], "split": 0} == {**dry["shown"], "split": 0}
    assert said["shown"]["split"]["actor"] == "ada" and said["added"] == 3
    assert [(one["name"], one["patients"], round(one["wanted"], 3), one["images"]) for one in said["shown"]["parts"]] == [
        ("train", 2, 0.667, 32), ("test", 1, 0.333, 16),
    ]  # fmt: skip
    assert [(one["name"], one["patients"]) for one in said["shown"]["folds"]] == [("0", 1), ("1", 1)]
    assert said["shown"]["strata"] == {"MR": {"train": 2, "test": 1}}
    balance = conn.execute(
        "SELECT part, sum(patients), sum(images), sum(annotated) FROM split_balance GROUP BY 1 ORDER BY 1 DESC"
    ).fetchall()
    assert balance == [(one["name"], one["patients"], one["images"], one["annotated"]) for one in said["shown"]["parts"]]
    assert json.loads(split("show", "s", "--json").stdout)["parts"] == said["shown"]["parts"]
    text = split("show", "s").stdout
    assert "seed 4, by modality; made by ada" in text and "train" in text and "fold" in text and "stratum" in text
    [row] = json.loads(split("list", "--json").stdout)
    assert (row["name"], row["patients"], row["folds"], row["frozen_by"]) == ("s", 3, 2, None)
    checked = split("check", "s")
    assert checked.returncode == 0 and "no pixels on two sides" in checked.stdout, checked.stderr
    assert "frozen" in split("freeze", "s", "--dry-run").stdout
    assert "split s: frozen" in split("freeze", "s").stdout
    assert "nothing changed" in split("freeze", "s").stdout
    assert split("list").stdout.count("s ") >= 1
    for code, words, *wrong in (
        (1, "there is one of this name", "create", "s", "--ratios", "1"),
        (2, "none of this name", "show", "nothing"),
        (2, "none of this name", "check", "nothing"),
        (2, "none of this name", "extend", "nothing"),
        (2, "none of this name", "freeze", "nothing"),
        (1, "frozen by", "extend", "s"),
        (2, "say --ratios", "create", "t"),
        (2, "--folds: nobody in test", "create", "t", "--ratios", "test=1", "--folds", "3"),
        (2, "NAME: is text without", "create", "a/b", "--ratios", "1"),
        (2, "NAME: is text without", "create", " a", "--ratios", "1"),
        (2, "NAME: is text without", "import", "a:b", "/nothing"),
        (2, "No such file", "import", "t", "/nothing"),
    ):
        done = split(*wrong)
        assert done.returncode == code and words in done.stderr, (wrong, done.stderr)
    assert splits_of(conn) == ["s"]


def test_an_empty_catalog_has_nobody_to_split(split: Callable[..., Said]) -> None:
    """One line that says what to do."""
    done = split("create", "s", "--ratios", "70,30")
    assert done.returncode == 1 and "holds no patient" in done.stderr and "catalog ingest" in done.stderr


def test_check_finds_leaks_and_what_nobody_knows(ingested: str, conn: psycopg.Connection, split: Callable[..., Said], catalog: Run) -> None:
    """Exit code 3 when pixels lie on two sides since, or are not hashed; with what to do; too few patients are said."""
    made = split("create", "s", "--ratios", "1,1,8")
    assert made.returncode == 0 and "nobody is in" in made.stderr
    few = split("create", "v", "--ratios", "2,1", "--folds", "5", "--dry-run").stderr
    assert "nobody is in folds 3, 4: there are too few patients for 5 folds" in few
    assert split("create", "t", "--ratios", "train=1,val=1,test=1").returncode == 0
    conn.execute("UPDATE image SET pixel_hash = NULL WHERE id IN (SELECT id FROM image ORDER BY id LIMIT 2)")
    done = split("check", "s", "--json")
    assert done.returncode == 3 and "pixels of 2 images are not hashed" in done.stderr and "catalog measure" in done.stderr
    assert json.loads(done.stdout)[0]["unhashed"] == 2
    assert "are not hashed" in split("create", "u", "--folds", "2").stderr
    assert catalog("measure").returncode == 0
    assert split("check").returncode == 0 and split("check", "s").returncode == 0
    conn.execute("UPDATE image SET pixel_hash = (SELECT pixel_hash FROM image ORDER BY id LIMIT 1) WHERE id = (SELECT max(id) FROM image)")
    done = split("check", "t")
    assert done.returncode == 3 and "2 images whose pixels lie on another side too" in done.stderr and "2 leaks" in done.stdout
    [found] = json.loads(split("check", "t", "--json").stdout)
    [[low, high]] = conn.execute("SELECT min(id), max(id) FROM image").fetchall()
    assert [(leak["sample_id"], leak["other_sample_id"]) for leak in found["leaks"]] == [(low, high), (high, low)]
    assert split("check", "s").returncode == (
        3 if sides(conn, "s")[patient_of(conn, low)] != sides(conn, "s")[patient_of(conn, high)] else 0
    )


def patient_of(conn: psycopg.Connection, image: int) -> str:
    [[patient]] = conn.execute("SELECT patient FROM image_all WHERE sample_id = %s", [image]).fetchall()
    return str(patient)


def test_patients_tied_together_are_counted(family: psycopg.Connection, split: Callable[..., Said]) -> None:
    """How many share pixels, and how large the largest group is."""
    done = split("create", "s", "--ratios", "50,50")
    assert "3 patients share pixels with others; the largest group that goes together has 3" in done.stdout
    assert "measure" not in done.stderr


def test_that_blank_images_tie_is_said(ingested: str, conn: psycopg.Connection, split: Callable[..., Said], catalog: Run) -> None:
    """Where patients share pixels and images are not measured, these may be blank: said when a split is made; not once they are."""
    conn.execute("UPDATE image SET pixel_hash = (SELECT pixel_hash FROM image ORDER BY id LIMIT 1) WHERE id = (SELECT max(id) FROM image)")
    assert "48 images not measured: blank ones tie" in split("create", "s", "--ratios", "50,50", "--dry-run").stderr
    assert catalog("measure").returncode == 0
    assert split("create", "s", "--ratios", "50,50").stderr == ""
