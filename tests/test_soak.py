"""`make soak`: some 250 deaths over a thousand epochs; every number of ranks from 1 to 5, every remainder of the batch size."""

from __future__ import annotations

import random
import statistics
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from catalog.database import open_database
from tests.faults.harness import IN_DAEMON, IN_TRAINER, SMALL_SHM, Harness, Scenario, Told, memory, shared_memory, undisturbed
from tests.test_faults import catalogued, many_contours, own_server, shm_can_be_small  # noqa: F401

pytestmark = pytest.mark.soak
POINTS = (*(point for point in IN_DAEMON if point != "starting"), *IN_TRAINER)
DAEMONS = ("private", "served", "two")
TAILS = ("short", "drop", "pad")
TIMED = ("daemon", "worker", "trainer", "everything")


def scenarios() -> Iterator[tuple[str, Scenario]]:
    """Yield a name and a scenario."""
    for ranks in range(1, 6):
        for rest in range(4):
            seed = 10 * ranks + rest
            draw = random.Random(seed)
            daemons = DAEMONS[(ranks + rest) % 3]
            # Two dice of the points, two of the times, all points over any two scenarios.
            points = POINTS[::2] if rest % 2 else POINTS[1::2]
            faults = [*points, *draw.sample(TIMED, 3), draw.choice(["ended>saved", "decoded>starting", "reserved>asked"])]
            if daemons == "served" and rest >= 2:
                faults.append("supervisor")
            draw.shuffle(faults)
            tail = TAILS[(ranks + 2 * rest) % 3] if ranks == 1 else "short"
            scenario = Scenario((ranks,), daemons, 4 + 8 * ranks + rest, tuple(faults), seed=seed, tail=tail, every=1 + seed % 3)
            yield f"{ranks} ranks, {scenario.limit} samples, {daemons}, {tail}", scenario
    for seed, daemons in enumerate(DAEMONS, 100):
        draw = random.Random(seed)
        faults = (*draw.sample(POINTS, 4), "trainer", "everything", *draw.sample(("trainer", "saved", "received", "asked"), 4))
        tail = TAILS[seed % 3 % 2]
        yield f"1 to 5 ranks by turns, {daemons}, {tail}", Scenario((1, 2, 3, 4, 5), daemons, 37 + seed % 3, faults, seed, tail=tail)
    # Nobody gets anything while there are five ranks.
    faults = ("planned", "trainer", "everything", "daemon", "saved", "trainer", "planned", "everything")
    yield "1 or 5 ranks by turns, 3 samples", Scenario((1, 5), "served", 3, faults, seed=200)
    yield "5 ranks, 3 samples", Scenario((5,), "private", 3, faults, seed=201)


SCENARIOS = dict(scenarios())
told: dict[str, Told] = {}
failed: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def _table() -> Iterator[None]:
    yield
    if not told:
        return
    kinds: Counter[str] = sum((one.faults for one in told.values()), Counter())
    columns = ("faults", "epochs", "missing", "twice", "restarts", "again", "longest s", "seconds")
    lines = ["", f"{'':48}" + "".join(f"{name:>10}" for name in columns)]
    for name, one in [*told.items(), ("together", together())]:
        numbers = (sum(one.faults.values()), one.epochs, one.missing, one.twice, one.restarts, one.again)
        row = "".join(f"{number:>10}" for number in numbers) + f"{one.longest_s:>10.2f}{one.seconds:>10.0f}"
        lines.append(f"{name:48}{row}{'  FAILED' if name in failed else ''}")
    lines += ["", "faults by point or victim"]
    lines += [f"  {kind:28}{count:>4}" for kind, count in sorted(kinds.items(), key=lambda pair: (-pair[1], pair[0]))]
    lines += [
        "",
        "restarts: of the group of trainers; again, longest s: trainers that attached again, and the longest that one of them took",
    ]
    say("\n".join(lines))


def say(text: str) -> None:
    sys.stderr.write(text + "\n")


def together() -> Told:
    """Return the sums."""
    ones = told.values()
    return Told(
        sum((one.faults for one in ones), Counter()), sum(one.epochs for one in ones), sum(one.missing for one in ones),
        sum(one.twice for one in ones), sum(one.restarts for one in ones), sum(one.served for one in ones),
        sum(one.again for one in ones), max(one.longest_s for one in ones), sum(one.seconds for one in ones),
    )  # fmt: skip


def soak(name: str, scenario: Scenario, folder: Path, url: str | None, kind: type[Harness] = Harness) -> Harness:
    """Run one scenario and prove it; keep what it came to."""
    before = shared_memory()
    expected = undisturbed()
    harness = kind(scenario, folder, url, name.replace(" ", "-"))
    told[name] = harness.told
    say(f"{name}: {' '.join(scenario.faults)}")
    failed.append(name)
    try:
        harness.run()
        with open_database(url) as db, db.connect(autocommit=True) as conn:
            harness.check(conn, expected)
    except AssertionError as error:
        say(f"  FAILED: {error}")
        raise
    assert shared_memory() == before
    failed.remove(name)
    say(f"  {harness.told}")
    return harness


@pytest.mark.parametrize("name", SCENARIOS)
def test_nothing_is_missing_and_nothing_twice(name: str, catalogued: str, tmp_path: Path) -> None:  # noqa: F811
    """Each position of each epoch comes once, in SQL's order, bit for bit, whatever dies when."""
    soak(name, SCENARIOS[name], tmp_path / "faults", catalogued)


def test_small_shared_memory(catalogued: str, tmp_path: Path, shm_can_be_small: None) -> None:  # noqa: F811
    """All of it in 1 MiB of /dev/shm."""
    scenario = replace(SCENARIOS["2 ranks, 21 samples, private, short"], prefix=SMALL_SHM)
    soak("1 MiB of /dev/shm", scenario, tmp_path / "faults", catalogued)


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.usefixtures("own_server")
def test_postgresql_dies(tmp_path: Path, ranks: int) -> None:
    """PostgreSQL killed under it, alone and close to other deaths: it comes back, and so does the training."""
    faults = ("postgresql", "announced", "postgresql", "trainer", "postgresql", "daemon", "everything", "postgresql")
    scenario = Scenario((ranks,), "served" if ranks > 1 else "private", 10 * ranks + 3, faults, seed=300 + ranks)
    soak(f"{ranks} ranks, PostgreSQL killed", scenario, tmp_path / "faults", None)


class Weighed(Harness):
    """Keeps what the daemon holds before each fault."""

    def strike(self, fault: str) -> None:
        """Weigh, then kill."""
        self.weights = getattr(self, "weights", [])
        self.weights += [memory(pid) for pid in self.victims("daemon")]
        super().strike(fault)


def test_memory_is_back_where_it_was(catalogued: str, tmp_path: Path) -> None:  # noqa: F811
    """After 60 kills of trainers and workers the same daemon holds what it held after the first ten."""
    scenario = Scenario((1,), "served", 40, ("trainer", "worker") * 30, seed=400)
    harness = soak("60 trainers and workers", scenario, tmp_path / "faults", catalogued, Weighed)
    assert isinstance(harness, Weighed)
    early, late = statistics.median(harness.weights[5:15]), statistics.median(harness.weights[-10:])
    say(f"  the daemon held {early / 2**20:.1f} MiB, then {late / 2**20:.1f} MiB")
    assert len(harness.weights) == 60 and late < 1.05 * early
