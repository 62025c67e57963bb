"""`loaderd top`: who waits for whom, interval by interval, how full the rings are and when the epoch ends.

`rates` compares two answers of the daemon and `render` lays out what it found; neither touches anything else. The daemon is asked over
its socket alone once the database said where that lies, so an outage of PostgreSQL can be watched too.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from catalog.errors import CatalogError
from loaderd import attach
from loaderd.messages import Message

SHORTEST_S = 0.1  # ten updates a second
WIDE = 150  # columns from which a consumer has one line instead of five
PIPE_COLUMNS = 160  # where the output is no terminal and COLUMNS is not set
SMOOTHED = 10  # intervals over which the time left is taken: a step may take longer than one
COUNTERS = ("batches", "samples", "bytes")
NOBODY = "no loaderd of this database is running; start one by `loaderd serve`, or let a Feed start its own"


@dataclass(frozen=True)
class Row:
    """A stream and its trainer over one interval. Rates a second; shares of the time in which the feed waited for somebody, 0 to 1."""

    stream: str
    run: str
    attempt: int
    rank: int
    num_ranks: int
    pid: int
    batches_per_s: float
    samples_per_s: float
    mb_per_s: float
    slots: int
    leased: int
    decoding: int
    free: int
    database: float
    decode: float
    trainer: float
    verdict: str  # trainer-bound, loader-bound, or idle: the feed waited for nobody
    epoch: int | None
    step: int  # steps the trainer is through with
    steps: int
    left_s: float | None


@dataclass(frozen=True)
class Interval:
    """What was found at the end of an interval; without a status nobody answered."""

    seconds: float
    status: Message | None
    rows: list[Row]
    gone_s: float = 0.0


def top(url: str | None, *, interval_s: float = 1.0, once: bool = False, as_json: bool = False) -> int:
    """Show what the daemon of a database does until q or Ctrl-C; returns the exit code.

    Without a terminal, or with `once`, one interval is measured and printed. `as_json` prints an object a line and interval.

    Raises:
        CatalogError: If there is no daemon, or with `once` if it ends within the interval.
    """
    path = attach.find(url)
    first = attach.ask(path)
    if first is None:
        raise CatalogError(NOBODY)
    interval_s = max(SHORTEST_S, interval_s)
    console = Console(highlight=False)
    try:
        if console.is_terminal and not console.is_dumb_terminal and not once and not as_json:
            _watch(console, path, first, interval_s)
            return 0
        for interval in _intervals(path, first, interval_s, _sleep):
            if interval.status is None and (once or not as_json):
                raise CatalogError(f"loaderd (pid {first['pid']}) ended meanwhile; see `loaderd status`")
            if as_json:
                print(json.dumps(_to_json(interval)), flush=True)  # noqa: T201
            else:
                width = shutil.get_terminal_size((PIPE_COLUMNS, 24)).columns
                Console(color_system=None, width=width).print(render(interval.status, interval.rows, width))
            if once or not as_json:
                break
    except KeyboardInterrupt:
        pass
    except BrokenPipeError:  # `| head`; what is buffered has nowhere to go at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _watch(console: Console, path: Path, first: Message, interval_s: float) -> None:
    with _keyboard() as wait, Live(console=console, screen=True, auto_refresh=False) as live:
        live.update(render(first, rates({}, first, 0.0), *console.size), refresh=True)
        for interval in _intervals(path, first, interval_s, wait):
            shown = render(interval.status, interval.rows, *console.size, gone_s=interval.gone_s)
            live.update(shown, refresh=True)


def _intervals(path: Path, first: Message, interval_s: float, wait: Callable[[float], bool]) -> Iterator[Interval]:
    """Yield interval after interval until `wait` says that it is enough."""
    polls = deque([(time.monotonic(), first)], maxlen=SMOOTHED + 1)
    while not wait(interval_s):
        status, now = attach.ask(path), time.monotonic()
        then, before = polls[-1]
        if status is None:
            yield Interval(interval_s, None, [], gone_s=now - then)
            continue
        rows = rates(before, status, now - then)
        longer = rates(polls[0][1], status, now - polls[0][0])
        polls.append((now, status))
        yield Interval(now - then, status, [replace(row, left_s=other.left_s) for row, other in zip(rows, longer, strict=True)])


# ------------------------------------------------------------------------------------------ what the numbers say


def rates(before: Message, after: Message, seconds: float) -> list[Row]:
    """Return what every stream of `after` did in the `seconds` since `before`.

    A stream that is not in `before`, or that began to count anew, is taken from when it attached on. What the daemon does not say
    counts as 0.
    """
    same = before.get("pid") == after.get("pid")
    known = {_key(stream): stream for stream in before.get("streams", ())} if same else {}
    rows = [_row(known.get(_key(stream)), stream, seconds) for stream in after.get("streams", ())]
    return sorted(rows, key=lambda row: (row.stream, row.run, row.rank, row.pid))


def _row(old: Message | None, new: Message, seconds: float) -> Row:
    if old is not None and any(_number(new, name) < _number(old, name) for name in (*COUNTERS, "attached_s")):
        old = None
    elapsed = seconds if old is not None else _number(new, "attached_s")
    old = old or {}

    def rate(name: str) -> float:
        return (_number(new, name) - _number(old, name)) / elapsed if elapsed > 0 else 0.0

    waits, waited = new.get("seconds") or {}, old.get("seconds") or {}
    database, decode, trainer = (max(0.0, _number(waits, who) - _number(waited, who)) for who in ("database", "decode", "trainer"))
    total = database + decode + trainer
    steps, step = int(_number(new, "steps")), int(_number(new, "acknowledged"))
    speed = rate("batches")
    if old and old.get("epoch") == new.get("epoch"):
        speed = rate("acknowledged")  # in the beginning batches are announced faster than they are used: the ring is filled
    definition = new.get("definition") or {}
    return Row(
        stream=new.get("stream") or f"({', '.join(definition.get('structures') or ()) or 'images'})",
        run=new.get("run") or "",
        attempt=int(_number(new, "attempt")),
        rank=int(_number(new, "rank")),
        num_ranks=int(_number(new, "num_ranks")) or 1,
        pid=int(_number(new, "pid")),
        batches_per_s=rate("batches"),
        samples_per_s=rate("samples"),
        mb_per_s=rate("bytes") / 1e6,
        slots=int(_number(new, "slots")),
        leased=int(_number(new, "leased")),
        decoding=int(_number(new, "decoding")),
        free=int(_number(new, "free")),
        database=database / total if total else 0.0,
        decode=decode / total if total else 0.0,
        trainer=trainer / total if total else 0.0,
        verdict="idle" if not total else "loader-bound" if database + decode > trainer else "trainer-bound",
        epoch=new.get("epoch"),
        step=step,
        steps=steps,
        left_s=max(0, steps - step) / speed if speed > 0 and steps else None,
    )


def _key(stream: Message) -> tuple[str, ...]:
    """Names a consumer: one process may feed a run from several unnamed streams."""
    definition = json.dumps(stream.get("definition"), sort_keys=True)
    return (definition, *(str(stream.get(name)) for name in ("pid", "stream", "run", "attempt", "rank")))


def _number(found: Message, name: str) -> float:
    value = found.get(name)
    return value if isinstance(value, int | float) else 0


def _to_json(interval: Interval) -> dict[str, Any]:
    status = interval.status
    return {
        "at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "seconds": round(interval.seconds, 3),
        "daemon": None if status is None else {name: value for name, value in status.items() if name not in ("op", "streams")},
        "streams": [asdict(row) for row in interval.rows],
    }


# ------------------------------------------------------------------------------------------ what it looks like


def render(status: Message | None, rows: list[Row], width: int, height: int | None = None, *, gone_s: float = 0.0) -> RenderableType:
    """Lay out an interval for so many columns and (None: as many as it takes) lines."""
    if status is None:
        return Text(f"loaderd does not answer since {gone_s:.0f} s; it may be starting again", style="red")
    lines: list[RenderableType] = list(_head(status))
    if not rows:
        return Group(*lines, Text("no trainer", style="dim"))
    each = 1 if width >= WIDE else 5
    room = len(rows) if height is None else max(1, (height - len(lines) - 3) // each)
    lines += [Text(), _table(rows[:room])] if width >= WIDE else [part for row in rows[:room] for part in _block(row, width)]
    if len(rows) > room:
        lines.append(Text(f"and {len(rows) - room} more: a higher terminal or --json shows them", style="dim"))
    return Group(*lines)


def _head(status: Message) -> Iterator[Text]:
    replaced = int(_number(status, "workers_replaced"))
    workers = f"{len(status.get('workers') or ())} workers" + (f" ({replaced} replaced)" if replaced else "")
    yield Text(f"loaderd {status.get('pid')}, up {_clock(_number(status, 'uptime_s'))}, {workers}", style="bold")
    memory, revoked = _number(status, "memory_bytes"), int(_number(status, "revoked"))
    line = Text(f"rings {_number(status, 'ring_bytes') / 2**20:,.0f} MiB" + (f" of {memory / 2**20:,.0f} MiB" if memory else ""))
    if revoked:
        line.append(f", {revoked:,} images revoked", style="yellow")
    yield line
    if status.get("outage_s") is not None:
        yield Text(f"PostgreSQL out of reach for {_clock(_number(status, 'outage_s'))}", style="red")


def _table(rows: list[Row]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    for name, shortest in (("stream", 8), ("run", 12)):  # rich narrows these alone, since only they may wrap
        table.add_column(name, min_width=shortest)
    for name in ("attempt", "rank", "pid", "batches/s", "samples/s", "MB/s"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("ring", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for name in ("database", "decode", "trainer", "epoch", "steps", "left"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        speeds = (_short(speed) for speed in (row.batches_per_s, row.samples_per_s, row.mb_per_s))
        shares = (f"{100 * share:.0f} %" for share in (row.database, row.decode, row.trainer))
        table.add_row(
            _cut(row.stream), _cut(row.run), str(row.attempt or ""), f"{row.rank}/{row.num_ranks}", str(row.pid),
            *speeds, _ring(row, 8), _verdict(row), *shares,
            "" if row.epoch is None else str(row.epoch), f"{row.step:,}/{row.steps:,}", _left(row),
        )  # fmt: skip
    return table


def _block(row: Row, width: int) -> Iterator[Text]:
    attempt = f" #{row.attempt}" if row.attempt else ""
    who = f"{attempt}, rank {row.rank}/{row.num_ranks}, pid {row.pid}"
    name = Text.assemble((row.stream, "bold"), f" {row.run}")
    name.truncate(max(1, width - len(who)), overflow="ellipsis")
    yield name.append(who)
    yield Text(f"  {_short(row.batches_per_s)} batches/s, {_short(row.samples_per_s)} samples/s, {_short(row.mb_per_s)} MB/s")
    ready = max(0, row.slots - row.leased - row.decoding - row.free)
    yield Text.assemble("  ", _ring(row, 8), f" {row.leased} leased, {ready} ready, {row.decoding} decoding, {row.free} free")
    shares = f"database {100 * row.database:.0f} %, decode {100 * row.decode:.0f} %, trainer {100 * row.trainer:.0f} %"
    yield Text.assemble("  ", _verdict(row), "" if row.verdict == "idle" else f": {shares}")
    done = f"epoch {row.epoch}, step {row.step:,} of {row.steps:,}" if row.epoch is not None else "no epoch asked for"
    yield Text(f"  {done}" + (f", {_left(row)} left" if row.left_s is not None else ""))


def _cut(name: str) -> Text:
    return Text(name, no_wrap=True, overflow="ellipsis")


def _verdict(row: Row) -> Text:
    return Text(row.verdict, style={"trainer-bound": "green", "loader-bound": "yellow"}.get(row.verdict, "dim"))


def _ring(row: Row, width: int) -> Text:
    """Return a bar: leased, then ready or decoding, then free."""
    slots = max(1, row.slots)
    leased = round(width * min(row.leased, slots) / slots)
    free = min(width - leased, round(width * row.free / slots)) if row.slots else width
    return Text.assemble(("█" * leased, "green"), ("▒" * (width - leased - free), "yellow"), ("·" * free, "dim"))


def _left(row: Row) -> str:
    return "" if row.left_s is None else _clock(row.left_s)


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.1f}"


def _clock(seconds: float) -> str:
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    return (f"{days} d " if days else "") + (f"{h}:{m:02}:{s:02}" if hours else f"{m}:{s:02}")


# ------------------------------------------------------------------------------------------ the keyboard


def _sleep(seconds: float) -> bool:
    time.sleep(seconds)
    return False


@contextlib.contextmanager
def _keyboard() -> Iterator[Callable[[float], bool]]:
    """Give a function that waits so many seconds and says whether q was typed; the terminal is put back in the end."""
    if not sys.stdin.isatty():
        yield _sleep
        return
    import termios  # not on every system that has a terminal
    import tty

    keys = sys.stdin.fileno()

    def wait(seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if select.select([keys], [], [], left)[0]:
                typed = os.read(keys, 64)
                if not typed or typed in (b"q", b"Q"):  # nothing: the terminal is gone
                    return True
        return False

    before = termios.tcgetattr(keys)
    try:
        tty.setcbreak(keys)
        yield wait
    finally:
        termios.tcsetattr(keys, termios.TCSADRAIN, before)
