"""The database's random order of an epoch."""

from __future__ import annotations

import json
import shutil
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from catalog import database, ingest
from catalog.errors import UsageError
from loaderd import attempts, ledger, orders, selections
from loaderd.definitions import Definition
from tests.processes import wait_until

INNER = Definition(structures=("inner",), seed=7)


def plan(url: str, definition: Definition, epoch: int, run: str = "test") -> tuple[list[str], list[int]]:
    """Return the stored order of an epoch as (sample keys, annotation ids)."""
    with database.open_database(url) as db, db.connect() as conn:
        stream_id = attempts.open_stream(conn, definition)
        run_id = make_run(conn, run)
        conn.commit()
        planner = orders.Planner(db, definition, run_id, stream_id)
        found = selections.shapes(planner.reading, definition)
        made = planner.plan(epoch, selections.one_shape(planner.reading, found, definition), sum(found.values()))
        made.wait_for(made.num_samples)
        if planner._rest is not None:
            planner._rest.join()
        planner.close()
        rows = conn.execute(
            "SELECT array_agg(i.sample_key::text ORDER BY o.part, s.n) FROM epoch_order o, "
            "unnest(o.sample_ids) WITH ORDINALITY AS s (id, n) JOIN image i ON i.id = s.id WHERE o.epoch_id = %s",
            [made.epoch_id],
        ).fetchone()
        drawn = conn.execute(
            "SELECT array_agg(a.id ORDER BY o.part, a.n) FROM epoch_order o, unnest(o.annotation_ids) WITH ORDINALITY AS a (id, n) "
            "WHERE o.epoch_id = %s",
            [made.epoch_id],
        ).fetchone()
    assert rows is not None and drawn is not None
    return rows[0], drawn[0] or []


def make_run(conn: psycopg.Connection, name: str) -> int:
    query = "INSERT INTO run (name, program_version, host) VALUES (%s, '', '') ON CONFLICT (name) DO UPDATE SET host = '' RETURNING id"
    row = conn.execute(query, [name]).fetchone()
    assert row is not None
    return row[0]


def take_in(url: str, folder: Path) -> None:
    with database.open_database(url) as db:
        ingest.ingest(db, folder, jobs=1)


def test_known_answer(conn: psycopg.Connection) -> None:
    """Ten known keys come in the known order for a seed and epoch, on any PostgreSQL: the order of a paper stays that of the paper."""
    keys = [str(uuid.UUID(int=number * 0x0123456789ABCDEF)) for number in range(1, 11)]
    order = orders.order_by(INNER).as_string(conn)
    rows = conn.execute(
        f"SELECT sample_key::text FROM unnest(%(keys)s::uuid[]) AS k (sample_key) ORDER BY {order}",  # type: ignore[arg-type]
        {"keys": keys, "epoch": 3, "seed": 2_026},
    ).fetchall()
    assert [keys.index(key) for (key,) in rows] == KNOWN


# As PostgreSQL 15, 16 and 18 gave it.
KNOWN = [3, 9, 5, 2, 4, 7, 0, 6, 8, 1]


def test_order_is_sqls_own(database_url: str, studies: Path, catalog: Callable[..., object]) -> None:
    """`catalog sql` gives with ORDER BY exactly the order that was stored, and each sample once."""
    take_in(database_url, studies)
    stored, _ = plan(database_url, INNER, 2)
    query = (
        "SELECT sample_key FROM sample WHERE structure = 'inner' "
        "ORDER BY uuid_hash_extended(sample_key, hashint8extended(2::bigint, 7::bigint)), sample_key"
    )
    asked = json.loads(catalog("sql", query, "--json").stdout)  # type: ignore[attr-defined]
    assert stored == [row["sample_key"] for row in asked]
    assert len(set(stored)) == len(stored) > 10


def test_order_depends_on_seed_and_epoch_alone(new_database: Callable[[], str], studies: Path, tmp_path: Path) -> None:
    """Another database, into which the same files came in another order, has the same orders; another seed or epoch another."""
    first, second = new_database(), new_database()
    take_in(first, studies)
    for folder in ("SYN0003", "SYN0001", "SYN0002"):  # a root each, the last patient first
        sub = tmp_path / folder
        (sub / "dicoms").mkdir(parents=True)
        shutil.copytree(studies / "dicoms" / folder, sub / "dicoms" / folder)
        shutil.copytree(studies / "contourfiles", sub / "contourfiles")
        shutil.copy(studies / "link.csv", sub / "link.csv")
        take_in(second, sub)
    orders_of = {(seed, epoch): plan(first, Definition(structures=("inner",), seed=seed), epoch)[0] for seed in (1, 2) for epoch in (0, 1)}
    for (seed, epoch), order in orders_of.items():
        assert plan(second, Definition(structures=("inner",), seed=seed), epoch)[0] == order
    assert len({tuple(order) for order in orders_of.values()}) == 4
    assert len({frozenset(order) for order in orders_of.values()}) == 1


def test_unshuffled_is_by_key(database_url: str, studies: Path) -> None:
    """shuffle=False is the order by sample_key, in every epoch."""
    take_in(database_url, studies)
    definition = Definition(structures=("inner",), shuffle=False)
    first, second = plan(database_url, definition, 0)[0], plan(database_url, definition, 1)[0]
    assert first == second == sorted(first)


def test_large_epochs_begin_before_they_are_sorted(database_url: str, studies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large epoch the first positions are stored before the full sort, and are the beginning of the same order."""
    take_in(database_url, studies)
    whole = plan(database_url, INNER, 0, run="whole")
    for name, value in (("PART", 4), ("FIRST", 8), ("LARGE", 1)):
        monkeypatch.setattr(orders, name, value)
    stored: list[tuple[int, int]] = []
    insert = orders.Planner._insert
    monkeypatch.setattr(
        orders.Planner, "_insert", lambda self, plan, part: (stored.append((plan.stored, part.number)), insert(self, plan, part))
    )
    assert plan(database_url, INNER, 0, run="early") == whole
    parts = -(-len(whole[0]) // 4)
    assert stored == [(0, 0), (0, 1), *((8, part) for part in range(2, parts))]
    with psycopg.connect(database_url) as conn:
        assert conn.execute("SELECT count(DISTINCT order_sha256), count(order_sha256) FROM epoch").fetchone() == (1, 2)


@pytest.mark.parametrize("structures", [("inner",), ("outer", "inner"), ()])
def test_next_epoch_permutes_the_last_one(
    database_url: str, studies: Path, conn: psycopg.Connection, structures: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the catalog does not change, an epoch's samples come from the last order and not from the view, in the same order as ever;
    once it changed, from the view."""
    take_in(database_url, studies)
    definition = Definition(structures=structures, seed=5, require="any")
    expected = [plan(database_url, definition, epoch, run=f"fresh {epoch}") for epoch in range(3)]
    selected: list[int] = []
    monkeypatch.setattr(orders, "selection", lambda given, call=orders.selection: selected.append(1) or call(given))
    with database.open_database(database_url) as db:
        stream_id = attempts.open_stream(conn, definition)
        run_id = make_run(conn, "one planner")
        planner = orders.Planner(db, definition, run_id, stream_id)
        plans = [planner.plan(epoch, (64, 64), 48) for epoch in range(3)]
        assert selected == []  # an earlier run of the stream was planned on the same catalog
        conn.execute("INSERT INTO flag (rule, severity, detail, image_id, raised_by) SELECT 'T', 'error', '', min(id), 't' FROM image")
        fewer = planner.plan(3, (64, 64), 48)
        assert len(selected) == 1
        planner.close()
    rows = "SELECT sample_ids, annotation_ids FROM epoch_order WHERE epoch_id = %s ORDER BY part"
    for made, (keys, drawn) in zip(plans, expected, strict=True):
        [(samples, annotations)] = conn.execute(rows, [made.epoch_id]).fetchall()
        assert annotations == drawn
        named = dict(conn.execute("SELECT id, sample_key::text FROM image").fetchall())
        assert [named[sample] for sample in samples] == keys
    assert fewer.num_samples in (plans[0].num_samples, plans[0].num_samples - 1)


def test_ranks_that_race_find_one_order(database_url: str, studies: Path, conn: psycopg.Connection) -> None:
    """Several planners of one run that plan an epoch at once, while the catalog changes, have one order between them."""
    take_in(database_url, studies)
    with database.open_database(database_url) as db:
        run_id, stream_id = make_run(conn, "r"), attempts.open_stream(conn, INNER)
        planners = [orders.Planner(db, INNER, run_id, stream_id) for _ in range(4)]
        with ThreadPoolExecutor(5) as pool:
            flags = "INSERT INTO flag (rule, severity, detail, image_id, raised_by) SELECT %s, 'error', '', min(id), 't' FROM image"
            plans = [pool.submit(lambda one=one: [one.plan(epoch, (64, 64), 12).epoch_id for epoch in range(3)]) for one in planners]
            for number in range(10):
                conn.execute(flags, [str(number)])
            found = list(zip(*(future.result() for future in plans), strict=True))
        # A plan that nobody began is made again when the catalog moved: whoever came last has the one that stands.
        for epoch, ids in enumerate(found):
            [(stands, stored)] = conn.execute(
                "SELECT id, num_samples FROM epoch WHERE run_id = %s AND epoch = %s AND order_sha256 IS NOT NULL", [run_id, epoch]
            ).fetchall()
            assert stands == max(ids)
            counted = "SELECT sum(cardinality(sample_ids)) FROM epoch_order WHERE epoch_id = %s"
            assert conn.execute(counted, [stands]).fetchone() == (stored,)
        for planner in planners:
            planner.close()


@pytest.mark.parametrize("begun", [False, True])
def test_a_planner_that_dies_behind_the_first_positions(
    database_url: str, studies: Path, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    """Its order is completed if somebody was fed from it, else made anew; either way it is what it would have been."""
    take_in(database_url, studies)
    whole = plan(database_url, INNER, 0, run="whole")
    for name, value in (("PART", 4), ("FIRST", 4), ("LARGE", 1)):
        monkeypatch.setattr(orders, name, value)
    with database.open_database(database_url) as db, monkeypatch.context() as dying:
        dying.setattr(orders.Planner, "_store_behind", lambda self, plan, shape: None)
        planner = orders.Planner(db, INNER, make_run(conn, "cut off"), attempts.open_stream(conn, INNER))
        first = planner.plan(0, (64, 64), 12)
        assert (first.stored, first.num_samples) == (4, 12)
        other = orders.Planner(db, INNER, make_run(conn, "cut off"), attempts.open_stream(conn, INNER))
        assert other.plan(0, (64, 64), 12).foreign  # while the first one lives it is waited for
        other.close()
        planner.close()
        if begun:
            ledger.start_epoch(conn, first.epoch_id, unchanged=False)
    assert wait_until(lambda: conn.execute("SELECT count(*) FROM pg_locks WHERE classid = %s", [orders.PLANNER_LOCK]).fetchone() == (0,))
    assert plan(database_url, INNER, 0, run="cut off") == whole
    kept = conn.execute("SELECT max(e.id) FROM epoch e JOIN run r ON r.id = e.run_id WHERE r.name = 'cut off'").fetchone()
    assert (kept == (first.epoch_id,)) == begun


@pytest.mark.parametrize("begun", [False, True])
def test_a_trainer_that_leaves_while_its_order_is_stored(
    database_url: str, studies: Path, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    """The order of an epoch that was begun is stored to its end, so that a run can go on in it; one that was not is broken off.

    Either way no thread still reads from a connection that is closed: libpq frees it, and the whole process aborts.
    """
    take_in(database_url, studies)
    for name, value in (("PART", 4), ("FIRST", 4), ("LARGE", 1)):
        monkeypatch.setattr(orders, name, value)
    insert, cancel = orders.Planner._insert, orders.Planner.cancel
    left = threading.Event()
    monkeypatch.setattr(orders.Planner, "_insert", lambda self, plan, part: (part.number and left.wait(60), insert(self, plan, part)))
    monkeypatch.setattr(orders.Planner, "cancel", lambda self: (left.set(), cancel(self)))
    with database.open_database(database_url) as db:
        planner = orders.Planner(db, INNER, make_run(conn, "r"), attempts.open_stream(conn, INNER))
        assert planner.plan(0, (64, 64), 12).stored == 4
        if begun:  # nothing is cancelled
            threading.Timer(0.3, left.set).start()
        planner.close(begun=0 if begun else -1)
        assert left.is_set()
        assert not any(thread.name == "order" for thread in threading.enumerate())
    assert conn.execute("SELECT order_sha256 IS NOT NULL FROM epoch").fetchone() == (begun,)


def test_where_stands_alone(database_url: str, studies: Path) -> None:
    """`where` must be one condition: text that closes the bracket, says more or ends the statement is refused."""
    take_in(database_url, studies)
    with database.open_database(database_url) as db, db.read_only() as reading:
        for good in ("patient = 'SYN0001'", "true -- a comment", "path LIKE '%.dcm'", "area_px > 10 OR (phase = 0 AND position < 1e9)"):
            selections.check_where(reading, Definition(structures=("inner",), where=good))
        for bad in ("1=1) or (1=1", "true THEN true END FROM sample; SELECT CASE WHEN true", "true; DELETE FROM flag", "", "nonsense", "1",
                    "true) UNION SELECT 1 --", "true /*", "(SELECT password FROM sql_login) = ''"):  # fmt: skip
            with pytest.raises(UsageError, match="where="):
                selections.check_where(reading, Definition(structures=("inner",), where=bad))


def test_limit_takes_the_first_by_key(database_url: str, studies: Path) -> None:
    """limit=n feeds the n samples of the smallest keys, whatever the seed."""
    take_in(database_url, studies)
    everything = sorted(plan(database_url, INNER, 0)[0])
    assert sorted(plan(database_url, Definition(structures=("inner",), limit=5), 0)[0]) == everything[:5]


def test_several_structures(database_url: str, studies: Path, conn: psycopg.Connection) -> None:
    """An order keeps one annotation a position of the first structure that was asked for, then of the next; 0 where there is none."""
    take_in(database_url, studies)
    keys, drawn = plan(database_url, Definition(structures=("outer", "inner"), require="any"), 0)
    assert len(drawn) == 2 * len(keys)
    names = dict(conn.execute("SELECT a.id, s.name FROM annotation a JOIN structure s ON s.id = a.structure_id").fetchall())
    assert {names[one] for one in drawn[: len(keys)] if one} == {"outer"}
    assert {names[one] for one in drawn[len(keys) :] if one} == {"inner"}
    assert 0 in drawn[: len(keys)]
    both, _ = plan(database_url, Definition(structures=("outer", "inner")), 0)
    assert set(both) < set(keys)
    assert len(both) == sum(1 for one in drawn[: len(keys)] if one)


@given(
    st.dictionaries(st.sampled_from(sorted(Definition.__dataclass_fields__)), st.one_of(st.none(), st.booleans(), st.integers(), st.text()))
)
def test_any_definition_is_refused_or_kept(given_fields: dict[str, object]) -> None:
    """Whatever a client sends as a definition is either refused as such or comes back as it was."""
    try:
        definition = Definition.from_json(given_fields)
    except UsageError:
        return
    assert Definition.from_json(json.loads(json.dumps(definition.to_json()))) == definition
