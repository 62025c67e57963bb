"""Named streams: kept, compared, shown and ended."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from catalog.errors import CatalogError, UsageError
from catalog.selection import ORIGINS
from loaderd import named
from loaderd.attempts import CONSUMER_LOCK
from loaderd.cli import main
from loaderd.definitions import Definition
from tests.conftest import Run
from tests.processes import wait_until

INNER = Definition(structures=("inner",), seed=7)

texts = st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=20)
definitions = st.builds(
    Definition,
    structures=st.lists(texts.filter(bool), unique=True, max_size=3).map(tuple),
    split=st.none() | st.sampled_from(("train", "mri/val", "mri/train:3")),
    origins=st.lists(st.sampled_from(ORIGINS), unique=True, min_size=1).map(tuple),
    where=st.none() | texts,
    limit=st.none() | st.integers(1, 2**40),
    include_flagged=st.booleans(),
    require=st.sampled_from(("all", "any")),
    batch_size=st.integers(1, 65_536),
    seed=st.integers(-(2**63), 2**63 - 1),
    shuffle=st.booleans(),
    tail=st.sampled_from(("short", "drop", "pad")),
    dtype=st.sampled_from(("float16", "float32", "float64")),
    on_error=st.sampled_from(("skip", "blank", "stop")),
)


def in_process(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run `loaderd` as `main` does, without the half second that a process takes."""
    command = ["loaderd", *map(str, arguments)]
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch("sys.argv", command),
        pytest.raises(SystemExit) as end,
    ):
        main()
    return subprocess.CompletedProcess(command, int(end.value.code or 0), out.getvalue(), err.getvalue())


@pytest.fixture
def loaderd() -> Run:
    """Run `loaderd` in this process."""
    return in_process


def one_line(done: Any, code: int) -> str:
    """Return the only line on standard error of a command that failed with this code."""
    assert (done.returncode, done.stdout) == (code, ""), done
    [line] = done.stderr.splitlines()
    return str(line)


def test_a_name_means_one_definition(conn: psycopg.Connection) -> None:
    """The same definition again is the same stream; another one under its name is refused, each field that differs shown with both."""
    first = named.create(conn, "train", INNER)
    assert named.create(conn, "train", INNER) == first
    assert named.find(conn, "train") == (first, INNER)
    assert named.create(conn, "other", INNER) != first
    with pytest.raises(UsageError) as refused:
        named.create(conn, "train", Definition(structures=("inner", "outer"), seed=7, batch_size=16, where="phase = 0"))
    assert str(refused.value) == (
        'stream \'train\' is there already and differs: structures: stored ["inner"], given ["inner", "outer"]; '
        'where: stored nothing, given "phase = 0"; batch_size: stored 8, given 16; '
        "end it (loaderd stream end train) or choose another name"
    )
    assert [stream.name for stream in named.listed(conn)] == ["other", "train"]


def test_compare_looks_at_what_was_given_alone() -> None:
    """A Feed that names a stream may say again what it feeds; only fields that it gives, and that differ, are refused."""
    named.compare("train", INNER, {})
    named.compare("train", INNER, {"structures": ["inner"], "seed": 7})
    named.compare("train", INNER, {"structures": ("inner",)})
    with pytest.raises(UsageError, match=r"'train'.*: seed: stored 7, given 8; end it"):
        named.compare("train", INNER, {"seed": 8, "structures": ("inner",)})
    with pytest.raises(UsageError, match="batch_size=True"):
        named.compare("train", INNER, {"batch_size": True})


def test_an_ended_stream_frees_its_name(conn: psycopg.Connection) -> None:
    """After end, the name is unknown, may be given to another definition, and the old row stays."""
    first = named.create(conn, "train", INNER)
    assert named.end(conn, "train") == first
    for use in (named.find, named.end):
        with pytest.raises(UsageError, match=r"there is no stream 'train', nor any other; see `loaderd stream create`"):
            use(conn, "train")
    assert named.listed(conn) == []
    second = named.create(conn, "train", Definition(structures=("outer",)))
    assert second != first
    assert conn.execute("SELECT id, ended_at IS NULL FROM stream ORDER BY id").fetchall() == [(first, False), (second, True)]


def test_an_unknown_name_is_answered_with_the_known_ones(conn: psycopg.Connection) -> None:
    """The error lists up to ten names, and that there are more; unnamed streams are not among them."""
    conn.execute("INSERT INTO stream (definition, digest) VALUES ('{}', 'x')")
    for number in range(10):
        named.create(conn, f"s{number}", INNER)
    with pytest.raises(UsageError, match=r"there are s0, s1, s2, s3, s4, s5, s6, s7, s8, s9; see"):
        named.find(conn, "train")
    named.create(conn, "s99", INNER)
    with pytest.raises(UsageError, match=r"there are s0, .*, s9, …; see"):
        named.find(conn, "train")


@pytest.mark.parametrize("name", ["", " train", "train\n", "a\tb", "\udcff"])
def test_what_is_no_name(conn: psycopg.Connection, name: str) -> None:
    """A name that would not print as one word in a line is refused."""
    with pytest.raises(UsageError, match="a name is printable text"):
        named.create(conn, name, INNER)


@pytest.mark.parametrize("definition", [Definition(where="'\udcff' = ''"), Definition(structures=("a\0b",))])
def test_what_the_database_cannot_keep(conn: psycopg.Connection, definition: Definition) -> None:
    """Bytes that are no text are refused before the database chokes on them."""
    with pytest.raises(UsageError, match="structures, names and where"):
        named.create(conn, "train", definition)


@pytest.mark.parametrize("kept", ['{"batch_size": "many"}', '{"of_later": 1}', "[]", "3"])
def test_what_the_database_keeps_is_checked(conn: psycopg.Connection, kept: str) -> None:
    """A definition that this version does not understand, in the database, is one line with the stream's name and the remedy."""
    conn.execute("INSERT INTO stream (name, definition, digest) VALUES ('odd', %s, 'x')", [kept])
    with pytest.raises(CatalogError, match=r"stream 'odd': .* is no definition to this version: .*loaderd stream end odd") as refused:
        named.find(conn, "odd")
    assert "\n" not in str(refused.value)
    named.end(conn, "odd")


def test_two_make_a_stream_at_once(database_url: str) -> None:
    """Of two that make a name at the same time with different definitions, one gets it and the other is told; nothing else is left."""
    with psycopg.connect(database_url) as one, psycopg.connect(database_url, options="-c lock_timeout=5s") as other:
        named.create(one, "train", INNER)
        with pytest.raises(psycopg.errors.LockNotAvailable):  # it waits to see what becomes of the first
            other.execute("SET lock_timeout = '50ms'")
            named.create(other, "train", Definition(structures=("outer",)))
        other.rollback()
        one.commit()
        with pytest.raises(UsageError, match="differs"):
            named.create(other, "train", Definition(structures=("outer",)))


@given(definitions)
def test_toml_there_and_back(definition: Definition) -> None:
    """Any definition written as TOML is TOML, and reads as the same definition."""
    text = named.to_toml(definition)
    given_fields = tomllib.loads(text)
    assert Definition.from_json(given_fields) == definition
    assert None not in given_fields.values()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(definitions)
def test_the_database_keeps_a_definition_as_it_is(conn: psycopg.Connection, definition: Definition) -> None:
    """Any definition comes back from the table equal, and under the digest that the table keeps."""
    with conn.transaction(force_rollback=True):
        made = named.create(conn, "any", definition)
        assert named.find(conn, "any") == (made, definition)
        assert named.create(conn, "any", definition) == made
        assert named.listed(conn)[0].sha256 == definition.digest().hex()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("batch_size = 'many'", "batch_size='many'"),
        ("batch_size = true", "batch_size=True"),
        ("batchsize = 8", "'batchsize' is no field of a stream; there are structures, snapshot, split, origins, readers,"),
        ("structures = 'inner'", "structures='inner': must be a list"),
        ("structures = [1]", "structures=[1]"),
        ("where = 3", "where=3: must be a text"),
        ("limit = 2026-01-01", "limit=datetime.date(2026, 1, 1)"),
        ("tail = 'long'", "tail='long': must be one of 'short', 'drop', 'pad'"),
        ("[stream]\nseed = 1", "'stream' is no field"),
        ("seed = ", "is no TOML"),
        ("seed = 1\nseed = 2", "is no TOML"),
        (b"where = '\xff'", "is no TOML"),
        ("x = " + "[" * 10_000, "is no TOML"),
    ],
)
def test_a_file_that_is_no_definition(tmp_path: Path, text: str | bytes, says: str) -> None:
    """A file with an unknown key, a wrong type or no TOML is refused in one line with its name, and the key."""
    path = tmp_path / "stream.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError) as refused:
        named.from_toml(path)
    assert str(refused.value).startswith(f"{path}: ") and says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    """A missing file, and a folder, are one line with the path."""
    with pytest.raises(UsageError, match=r"gone\.toml: No such file"):
        named.from_toml(tmp_path / "gone.toml")
    with pytest.raises(UsageError, match="Is a directory"):
        named.from_toml(tmp_path)


# ------------------------------------------------------------------------------------------ the command line


def test_create_show_and_end(ingested: str, loaderd: Run, tmp_path: Path, new_database: Callable[[], str]) -> None:
    """What create kept, show prints as TOML, from which create makes the same stream elsewhere; end frees the name."""
    options = ["--structure", "inner", "--where", "phase = 0", "--batch-size", 16, "--seed", -3, "--no-shuffle", "--tail", "drop"]
    tried = loaderd("stream", "create", "train", *options, "--dry-run")
    assert tried.returncode == 0 and "not made" in tried.stdout
    with psycopg.connect(ingested, autocommit=True) as conn:
        assert named.listed(conn) == []
        expected = conn.execute("SELECT count(DISTINCT sample_id) FROM sample WHERE structure = 'inner' AND phase = 0").fetchone()
        assert expected is not None and expected[0] > 0
        made = loaderd("stream", "create", "train", *options)
        assert (made.returncode, made.stderr) == (0, "")
        assert made.stdout == f"stream 'train' has {expected[0]} samples now ({expected[0]} of 64×64)\n"
        wanted = Definition(structures=("inner",), where="phase = 0", batch_size=16, seed=-3, shuffle=False, tail="drop")
        stream_id, stored = named.find(conn, "train")
        assert stored == wanted
        shown = loaderd("stream", "show", "train")
        file = tmp_path / "stream.toml"
        file.write_text(shown.stdout)
        assert named.from_toml(file) == wanted
        assert loaderd("stream", "create", "train", "-f", file).returncode == 0
        refused = loaderd("stream", "create", "train", "--structure", "inner")
        assert "batch_size: stored 16, given 8" in one_line(refused, 2)
        as_json = json.loads(loaderd("stream", "show", "train", "--json").stdout)
        assert (as_json["id"], Definition.from_json(as_json["definition"])) == (stream_id, wanted)
        assert "would be ended" in loaderd("stream", "end", "train", "--dry-run").stdout
        assert named.find(conn, "train") == (stream_id, wanted)
        assert loaderd("stream", "end", "train").stdout == "stream 'train' is ended; no trainers fed from it now\n"
        assert "there is no stream 'train'" in one_line(loaderd("stream", "show", "train"), 2)


def test_a_file_and_options(database_url: str, loaderd: Run, tmp_path: Path) -> None:
    """-f with options beside it is refused, naming them: nobody has to know which would win."""
    file = tmp_path / "stream.toml"
    file.write_text("seed = 1\n")
    line = one_line(loaderd("stream", "create", "train", "-f", file, "--seed", "1", "--include-flagged"), 2)
    assert line.startswith("loaderd: -f and include_flagged, seed: ")
    file.write_text("sed = 1\n")
    assert one_line(loaderd("stream", "create", "train", "-f", file), 2).startswith(f"loaderd: {file}: 'sed' is no field")


def test_a_selection_is_checked_before_it_is_kept(ingested: str, loaderd: Run) -> None:
    """A where that is no condition keeps nothing; an empty selection is kept, and said to be empty."""
    assert "where='nonsense'" in one_line(loaderd("stream", "create", "train", "--structure", "inner", "--where", "nonsense"), 2)
    assert "division by zero" in one_line(
        loaderd("stream", "create", "train", "--structure", "inner", "--where", "1 / (rows - rows) = 1"), 1
    )
    empty = loaderd("stream", "create", "later", "--structure", "nobody drew this")
    assert (empty.returncode, empty.stdout) == (0, "stream 'later' has no samples now\n")
    assert empty.stderr.startswith("loaderd: nobody can be fed from it as it is now: the stream is empty")
    with psycopg.connect(ingested) as conn:
        assert [stream.name for stream in named.listed(conn)] == ["later"]


def test_lists_say_who_is_fed_now(database_url: str, conn: psycopg.Connection, loaderd: Run) -> None:
    """list and show count the consumers whose lock is held, by whatever daemon, and the runs that were fed."""
    assert loaderd("stream", "list").stdout == "no stream has a name yet\n"
    assert json.loads(loaderd("stream", "list", "--json").stdout) == []
    stream_id = named.create(conn, "train", INNER)
    conn.execute("INSERT INTO run (name, program_version, host) VALUES ('unet-3', '0', 'here')")
    conn.execute(
        "INSERT INTO attempt (run_id, stream_id, attempt, num_ranks, epoch, step, position) SELECT id, %s, 1, 1, 0, 0, 0 FROM run",
        [stream_id],
    )
    ids = conn.execute(
        "INSERT INTO consumer (run_id, stream_id, attempt, rank, num_ranks, host, pid, uid, daemon_pid) "
        "SELECT id, %s, 1, rank, 2, 'here', 77 + rank, 0, 1 FROM run, generate_series(0, 1) AS rank RETURNING id",
        [stream_id],
    ).fetchall()
    with psycopg.connect(database_url, autocommit=True) as daemon:
        daemon.execute("SELECT pg_advisory_lock(%s, %s::integer)", [CONSUMER_LOCK, ids[1][0]])
        [row] = json.loads(loaderd("stream", "list", "--json").stdout)
        assert {name: row[name] for name in ("name", "runs", "consumers")} == {"name": "train", "runs": 1, "consumers": 1}
        shown = loaderd("stream", "show", "train").stdout
        assert "# run 'unet-3': 1 attempt, up to epoch –\n# fed now: here:78, rank 1 of 2, run 'unet-3'\n" in shown
        assert Definition.from_json(tomllib.loads(shown)) == INNER
        assert loaderd("stream", "end", "train", "--dry-run").stdout == "stream 'train' would be ended; 1 trainer fed from it now\n"
    # PostgreSQL drops the lock with the connection, whatever became of the daemon.
    assert wait_until(lambda: json.loads(loaderd("stream", "show", "train", "--json").stdout)["consumers"] == [])
