"""Every rule, on a synthetic archive of 10,000 contours: planted defects are all found, near misses and the clean set raise nothing.

What is planted is what goes wrong in archives: a contour of another image, mirrored or cut short, a dropped slice, a copied file. The
plantings know a rule's title and its parameters, and not how it looks for anything. All rules run twice: on the clean set, and planted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import psycopg
import pytest

from catalog import qa, rulefiles
from catalog.database import Database
from tests import planted_contours, planted_images, planted_relations
from tests.conftest import _create, _named
from tests.planting import HEARTS, Archive, Ground
from tests.plantings import LEAST, PLANTINGS

assert planted_contours and planted_images and planted_relations  # importing them registers what they plant


@dataclass
class Planted:
    """What was planted, and what the rules said."""

    rules: dict[str, rulefiles.Rule]
    grounds: dict[str, Ground]
    clean: list[tuple[str, str, str, str, int]]  # rule, severity, detail, subject, its id; before anything was planted
    found: dict[str, dict[str, dict[int, tuple[str, str]]]]  # rule → subject → id → severity and detail, afterwards


def flagged(conn: psycopg.Connection) -> list[tuple[str, str, str, str, int]]:
    """Return rule, severity, detail, subject and its id of each open flag that a rule raised."""
    subjects = ("file", "image", "annotation", "pairing", "series", "study", "patient")
    return [
        (rule, severity, detail, *next((subject, one) for subject, one in zip(subjects, ids, strict=True) if one is not None))
        for rule, severity, detail, *ids in conn.execute(
            f"SELECT rule, severity, detail, {', '.join(f'{subject}_id' for subject in subjects)} FROM flag "
            f"WHERE state = 'open' AND raised_by = %s", [qa.ACTOR],
        )
    ]  # fmt: skip


@pytest.fixture(scope="module")
def planted(server_url: str, template: str) -> Iterator[Planted]:
    """An archive in a database of its own: rules run on it clean, everything is planted, and they run again."""
    only = os.environ.get("PLANTED_RULES", "").split()  # to try some alone
    rules = {code: rule for code, rule in rulefiles.load().items() if rule.query and (not only or code in only)}
    plan = {code: PLANTINGS[code] for code in rules if code in PLANTINGS}
    archive = Archive()
    for one in plan.values():
        archive.sides += [archive.study(*one.stack) for _ in range(sum(one.sides))]
    # Of a shift every heart may have one; those from which most contours are taken are made besides.
    archive.hearts = [archive.heart() for _ in range(HEARTS + 4 if not only else sum(abs(sum(one.hearts)) for one in plan.values()))]
    name = f"planted_{os.getpid()}"
    _create(server_url, name, template)
    grounds: dict[str, Ground] = {}
    try:
        url = _named(server_url, name)
        with psycopg.connect(url, autocommit=True) as conn, Database(url) as db:
            archive.write(conn)
            if "LABEL-UNEXPECTED" in rules:
                qa.set_value(db, rules["LABEL-UNEXPECTED"], "classes", "a|b", reason="some are expected here")
            qa.run(db, rules=rules.values(), actor="test")
            clean = flagged(conn)
            hearts, sides = iter(archive.hearts), iter(archive.sides)
            for code, one in sorted(plan.items(), key=lambda item: item[1].hearts[0] < 0):
                if one.hearts[0] < 0:  # some of all of them, which other rules share
                    whole = [heart for heart in archive.hearts if sum(ground.taken[heart.study] for ground in grounds.values()) < 60]
                    of_hearts = [whole[:LEAST], whole[LEAST : 2 * LEAST]]
                else:
                    of_hearts = [[next(hearts) for _ in range(count)] for count in one.hearts]
                of_sides = [[next(sides) for _ in range(count)] for count in one.sides]
                ground = grounds[code] = Ground(archive, rules[code], of_hearts[0] + of_sides[0], of_hearts[1] + of_sides[1])
                one.plant(ground)
                ground.write(conn)
            conn.execute("ANALYZE")
            qa.run(db, rules=rules.values(), actor="test")
            found: dict[str, dict[str, dict[int, tuple[str, str]]]] = {}
            for rule, severity, detail, subject, number in flagged(conn):
                found.setdefault(rule, {}).setdefault(subject, {})[number] = (severity, detail)
        yield Planted(rules, grounds, clean, found)
    finally:
        with psycopg.connect(server_url, autocommit=True) as conn:
            conn.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


def queried() -> list[str]:
    only = os.environ.get("PLANTED_RULES", "").split()
    return [code for code, rule in rulefiles.load().items() if rule.query and (not only or code in only)]


def said(found: dict[str, dict[int, tuple[str, str]]], one: dict[str, set[int]]) -> list[tuple[str, str]]:
    """Return severity and detail of what a rule flagged among some subjects."""
    return [found[subject][each] for subject, ids in one.items() for each in ids & found.get(subject, {}).keys()]


@pytest.mark.parametrize("code", queried())
def test_every_planted_defect_is_found(planted: Planted, code: str) -> None:
    """Of a rule at least 50 defects are planted, and it flags each; a rule that nobody planted anything for fails."""
    assert code in PLANTINGS, f"{code} has no planting in tests/test_planted.py"
    defects = planted.grounds[code].defects
    assert len(defects) >= LEAST
    missed = {}
    for number, (one, wanted) in enumerate(defects):
        heard = said(planted.found.get(code, {}), one)
        if not any(wanted in (None, severity) for severity, _ in heard):
            missed[number] = heard
    assert not missed, f"{len(missed)} of {len(defects)}"


@pytest.mark.parametrize("code", queried())
def test_no_near_miss_is_flagged(planted: Planted, code: str) -> None:
    """Of a rule at least 50 near misses are planted, just inside its thresholds, and it flags none."""
    misses = planted.grounds[code].misses
    assert len(misses) >= LEAST
    flagged = {number: heard for number, one in enumerate(misses) if (heard := said(planted.found.get(code, {}), one))}
    assert not flagged, f"{len(flagged)} of {len(misses)}"


def test_the_clean_set_raises_nothing(planted: Planted) -> None:
    """Before anything is planted no rule raises an error or a warning on any of 10,000 contours and their images."""
    assert [one for one in planted.clean if one[1] != "info"] == []


def test_plantings_are_of_rules() -> None:
    """No planting is left behind by a rule that is gone or was renamed."""
    assert set(PLANTINGS) <= {code for code, rule in rulefiles.load().items() if rule.query}
