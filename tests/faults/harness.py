"""Runs a training under faults and proves that nothing is missing, nothing twice, and every batch what it would have been.

A `Scenario` says what is fed to how many ranks by which daemons, and which faults come. `Harness.run` starts the group of trainers,
strikes, and starts again what does not come back by itself, as users' tools do: torchrun the whole group of ranks as soon as one is
dead, from the newest step that all ranks saved; systemd `loaderd serve` if its supervisor is dead. `Harness.check` compares what the
trainers kept in their journals with SQL's order, dealt out as `loaderd.shares` says, and with the ledger.

Each start of the group is a *generation*. Of the journals of one, what lies behind the state that the next one loads is cut off: the
model went on from that state, so what it had seen since is as if it never was.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import signal
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psycopg

from loaderd import Feed
from loaderd.shares import Share
from loaderd.workers import SOURCE, python
from tests.processes import kill, wait_until

HERE = Path(__file__).parent
INJECT = HERE / "inject"
COUNTER = struct.Struct("<2q")  # as in trainer.py
IN_DAEMON = ("planned", "reserved", "decoded", "announced", "ended", "acknowledged", "starting")
IN_TRAINER = ("received", "asked", "saved")
POINTS = (*IN_DAEMON, *IN_TRAINER)  # "starting" is passed only by one that follows another
VICTIMS = ("daemon", "worker", "trainer", "everything")  # killed at some time; also: supervisor, postgresql
START_S = 180  # generous: two shared cores, and other tests on them
# A small /dev/shm of its own for a process and its children.
SMALL_SHM = ("unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"', "sh")

Entry = tuple[int, int, int, tuple[int, ...]]  # epoch, index, rank, sample ids
Key = tuple[int, int]  # epoch and step of a state


@dataclass(frozen=True)
class Scenario:
    """What is trained, and what happens to it. `ranks`: the group's sizes, drawn anew at each start. `daemons`: who starts them."""

    ranks: tuple[int, ...]
    daemons: Literal["private", "served", "two"]
    limit: int
    faults: tuple[str, ...]  # points and victims, in this order
    seed: int = 0
    batch_size: int = 4
    tail: str = "short"
    every: int = 2  # ticks between states
    prefix: tuple[str, ...] = ()  # of every command


@dataclass
class Generation:
    """One start of the group: how many ranks, which state they load, and where that is."""

    number: int
    num_ranks: int
    state: dict[str, Any] | None
    start: tuple[int, int, int]  # epoch, step, position
    trainers: list[subprocess.Popen[bytes]] = field(default_factory=list)


@dataclass
class Told:
    """What a scenario came to, for the summary."""

    faults: Counter[str] = field(default_factory=Counter)
    epochs: int = 0
    missing: int = 0
    twice: int = 0
    restarts: int = 0  # of the group
    served: int = 0  # restarts of `loaderd serve`
    again: int = 0  # trainers that attached again
    longest_s: float = 0.0  # of these
    seconds: float = 0.0


class Harness:
    """One scenario in one folder. `url` None: the embedded server in CATALOG_HOME."""

    def __init__(self, scenario: Scenario, folder: Path, url: str | None, run: str) -> None:
        folder.mkdir()
        self.scenario, self.folder, self.url, self.name = scenario, folder, url, run
        self.draw = random.Random(scenario.seed)
        self.told = Told()
        self.armed = 0
        self.generations: list[Generation] = []
        self.serving: dict[int, subprocess.Popen[bytes]] = {}
        self.ended_serving: list[subprocess.Popen[bytes]] = []
        self.refused = 0.0

    # ------------------------------------------------------------------ starting

    def environment(self, host: int) -> dict[str, str]:
        """Return the environment of everything on a host; two hosts share the PostgreSQL alone."""
        found = {**os.environ, "FAULTS": str(self.folder), "PYTHONPATH": f"{SOURCE}{os.pathsep}{INJECT}"}
        if self.url is not None:
            found["CATALOG_DATABASE_URL"] = self.url
        if self.scenario.daemons == "two":
            home, sockets = self.folder / f"home{host}", self.folder / f"run{host}"
            home.mkdir(exist_ok=True)
            sockets.mkdir(mode=0o700, exist_ok=True)
            found |= {"CATALOG_HOME": str(home), "LOADERD_RUN": str(sockets)}
        return found

    @property
    def hosts(self) -> int:
        return 2 if self.scenario.daemons == "two" else 1

    def serve(self) -> None:
        """Start `loaderd serve` where it is to run and does not."""
        if self.scenario.daemons == "private":
            return
        for host in range(self.hosts):
            process = self.serving.get(host)
            if process is not None and process.poll() is None:
                continue
            if process is not None:
                self.told.served += 1
                self.ended_serving.append(process)
            command, _ = python("-m", "loaderd", "serve", "--workers", "2")
            with (self.folder / f"serve{host}.log").open("ab") as log:
                self.serving[host] = subprocess.Popen(
                    [*self.scenario.prefix, *command], env=self.environment(host), stderr=log, cwd="/", start_new_session=True
                )

    def start(self) -> None:
        """Start the group: the next generation, from the newest step that all ranks of the last one saved."""
        state, start = None, (0, 0, 0)
        if self.generations:
            state, start = self._newest(self.generations[-1])
        num_ranks = self.draw.choice(self.scenario.ranks)
        generation = Generation(len(self.generations), num_ranks, state, start)
        self.generations.append(generation)
        for rank in range(num_ranks):
            given = {
                "folder": str(self.folder), "generation": generation.number, "rank": rank, "num_ranks": num_ranks, "state": state,
                "every": self.scenario.every, "pause_s": 0.01, "feed": {**self.feed, "run": self.name},
            }  # fmt: skip
            with (self.folder / f"{generation.number}-{rank}.log").open("ab") as log:
                generation.trainers.append(
                    subprocess.Popen(
                        [*self.scenario.prefix, sys.executable, str(HERE / "trainer.py"), json.dumps(given)],
                        env=self.environment(rank % self.hosts), stderr=log, cwd="/",
                    )
                )  # fmt: skip

    @property
    def feed(self) -> dict[str, Any]:
        """What the trainers pass to Feed."""
        scenario = self.scenario
        return {
            "structures": ["inner"], "batch_size": scenario.batch_size, "seed": scenario.seed, "limit": scenario.limit,
            "tail": scenario.tail, "slots": 4, "timeout_s": 90.0,
        }  # fmt: skip

    def _newest(self, last: Generation) -> tuple[dict[str, Any] | None, tuple[int, int, int]]:
        """Cut the journals of a dead generation to its newest step that all ranks saved; return the state and where it is."""
        saved = []
        for rank in range(last.num_ranks):
            found: dict[Key, Any] = {}
            for path in self.folder.glob(f"{last.number}-{rank}.*.state"):
                _, epoch, step, _ = path.name.split(".")
                found[int(epoch), int(step)] = json.loads(path.read_text())
            saved.append(found)
        common = set.intersection(*(set(found) for found in saved))
        for rank, found in enumerate(saved):
            journal = self.folder / f"{last.number}-{rank}.journal"
            if journal.exists():
                os.truncate(journal, found[max(common)]["journal"] if common else 0)
        if not common:  # nobody was fed
            return last.state, last.start
        epoch, step = max(common)
        states = [found[epoch, step]["state"] for found in saved]
        assert all(state == states[0] for state in states), "state_dict() differs between ranks at the same step"
        share = self.share(last, epoch)
        over = step >= share.steps and step > share.first_step  # else that epoch was not begun; it may have no step for anybody
        return states[0], (epoch + 1, 0, 0) if over else (epoch, step, share.begins(step))

    def share(self, generation: Generation, epoch: int, rank: int = 0) -> Share:
        """Return what a rank gets of an epoch."""
        step, position = generation.start[1:] if generation.start[0] == epoch else (0, 0)
        scenario = self.scenario
        return Share(scenario.limit, scenario.batch_size, rank, generation.num_ranks, scenario.tail, step, position)

    # ------------------------------------------------------------------ running

    def run(self) -> None:
        """Train until all faults have struck, and three epochs more."""
        began = time.monotonic()
        try:
            self.serve()
            for host, process in self.serving.items():
                log = self.folder / f"serve{host}.log"
                assert wait_until(lambda log=log: "event=serving" in log.read_text() or process.poll() is not None, START_S)  # noqa: B023
            self.start()
            self.wait(self.moved(3), "the training does not begin")
            for fault in self.scenario.faults:
                self.strike(fault)
                if self.draw.random() < 0.75:  # else the next one comes while this one is being overcome
                    self.wait(self.moved(2 + self.draw.randrange(6)), f"the training does not go on after {fault}")
            self.wait(self.moved(1), "the training does not go on after the last fault")
            # Stopped meanwhile, or on a busy machine they would be further by the time that they are told.
            kill([trainer.pid for trainer in self.group], signal.SIGSTOP)
            last = max(epoch for _, epoch in self.counters()) + 12  # none of them is so far yet
            (self.folder / "new").write_text(str(last))
            (self.folder / "new").replace(self.folder / "last")
            kill([trainer.pid for trainer in self.group], signal.SIGCONT)
            self.told.epochs = last
            self.wait(lambda: all(trainer.poll() == 0 for trainer in self.group), "the training does not end")
        finally:
            self.told.seconds = time.monotonic() - began
            self.end()

    @property
    def group(self) -> list[subprocess.Popen[bytes]]:
        return self.generations[-1].trainers

    def counters(self) -> list[tuple[int, int]]:
        """Return how many ticks each rank made in this generation, and its epoch."""
        generation = self.generations[-1]
        try:
            found = (self.folder / f"{generation.number}.counters").read_bytes()
        except FileNotFoundError:
            found = b""
        return list(COUNTER.iter_unpack(found.ljust(generation.num_ranks * COUNTER.size, b"\0")))

    def moved(self, ticks: int) -> Callable[[], bool]:
        """Return whether all ranks made some more ticks since now, or in a new generation."""
        number, before = len(self.generations), min(made for made, _ in self.counters())

        def has() -> bool:
            return min(made for made, _ in self.counters()) >= ticks + (before if number == len(self.generations) else 0)

        return has

    def wait(self, condition: Callable[[], bool], otherwise: str, timeout_s: float = START_S) -> None:
        """Wait, starting again what died by our hand; a trainer that ended by itself ends the test."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            self.mend()
            assert time.monotonic() < deadline, f"{otherwise}: {self.words()}"
            time.sleep(0.005)

    def mend(self) -> None:
        """Do what torchrun and systemd do."""
        codes = [trainer.poll() for trainer in self.group]
        assert all(code in (None, 0, -signal.SIGKILL) for code in codes), f"a trainer ended by itself: {codes}: {self.words()}"
        if -signal.SIGKILL in codes:
            for trainer in self.group:
                trainer.kill()
            for trainer in self.group:
                trainer.wait()
            self.told.restarts += 1
            self.start()
        if time.monotonic() - self.refused > 0.3:  # systemd's RestartSec
            self.refused = time.monotonic()
            self.serve()

    def strike(self, fault: str) -> None:
        """Kill a victim at some time, or whoever passes a point for the n-th time from now ("a>b": and then the next one)."""
        points = fault.split(">")
        if set(points) <= set(POINTS):
            for at, point in enumerate(points):
                self.armed += 1
                count = 1 + self.draw.randrange(6) if at == 0 and point != "ended" else 1
                new = self.folder / "new"
                new.write_text(" ".join([str(count), str(self.armed), *points[at + 1 : at + 2]]))
                new.replace(self.folder / f"{'held' if at else 'armed'}-{point}")
            self.wait(lambda: not any(self.held(point) for point in points), f"{fault} is never passed")
        else:
            time.sleep(self.draw.uniform(0, 0.4))
            victims: list[int] = []

            def found() -> bool:
                victims[:] = self.victims(fault)
                return bool(victims)

            self.wait(found, f"there is no {fault} to be killed")
            for pid in victims if fault == "everything" else [self.draw.choice(victims)]:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
        self.told.faults[fault] += 1

    def held(self, point: str) -> bool:
        """Return whether a fault there is still to come."""
        return any((self.folder / f"{state}-{point}").exists() for state in ("held", "armed"))

    def victims(self, kind: str) -> list[int]:
        """Return the processes of a kind."""
        if kind == "trainer":
            return [trainer.pid for trainer in self.group if trainer.poll() is None]
        if kind == "postgresql":  # the postmaster of the embedded server; its file outlives it
            try:
                pid = int((Path(os.environ["CATALOG_HOME"]) / "postgresql/postmaster.pid").read_text().split()[0])
                return [pid] if b"postgres" in Path(f"/proc/{pid}/cmdline").read_bytes() else []
            except (FileNotFoundError, ProcessLookupError, IndexError):
                return []
        return sorted(pid for pid, what in self.processes().items() if kind in (what, "everything"))

    def processes(self) -> dict[int, str]:
        """Return the processes of this scenario, told by FAULTS in their environment: supervisor, daemon, worker or other."""
        mark, found = f"FAULTS={self.folder}".encode(), {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                command, environment = (entry / "cmdline").read_bytes().split(b"\0"), (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if mark not in environment or b"catalog.embedded" in command or b"postgres" in command[0]:
                continue
            kind = "trainer" if str(HERE / "trainer.py").encode() in command else "other"
            if b"loaderd.decode" in command:
                kind = "worker"
            elif b"serve" in command:
                kind = "daemon" if {b"--private", b"--supervisor"} & set(command) else "supervisor"
            found[int(entry.name)] = kind
        return found

    def words(self) -> str:
        """Return the ends of the logs, for the message of a failure."""
        logs = sorted(self.folder.glob("*.log"), key=lambda path: path.stat().st_mtime)[-8:]
        home = Path(os.environ["CATALOG_HOME"], "loaderd.log")
        told = [f"{path.name}: …{path.read_text()[-1500:]}" for path in [*logs, *([home] if home.exists() else [])] if path.stat().st_size]
        return f"{self.counters()}, {self.processes()}, {dict(self.told.faults)}\n" + "\n".join(told)

    def end(self) -> None:
        """End what still runs. After a training that went well that is `loaderd serve` alone."""
        for trainer in self.group if self.generations else []:
            trainer.kill()
            trainer.wait()
        for process in self.serving.values():
            process.terminate()
        for process in [*self.serving.values(), *self.ended_serving]:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.left = not wait_until(lambda: self.processes() == {})
        kill(self.processes())

    # ------------------------------------------------------------------ proving

    def journal(self) -> Iterator[tuple[Entry, list[str]]]:
        """Yield what the trainers kept, with the hashes of what was in it."""
        for generation in self.generations:
            for rank in range(generation.num_ranks):
                path = self.folder / f"{generation.number}-{rank}.journal"
                for line in path.read_text().splitlines() if path.exists() else []:
                    epoch, index, samples, hashes = json.loads(line)
                    yield (epoch, index, rank, tuple(samples)), hashes

    def expected(self, conn: psycopg.Connection) -> list[list[Entry]]:
        """Return what each epoch's batches must be: SQL's order, dealt out to the ranks that there were at each step."""
        scenario = self.scenario
        epochs = []
        for epoch in range(self.told.epochs):
            samples = order(conn, scenario, epoch)
            assert len(samples) == scenario.limit
            entries: list[Entry] = []
            upto = 0
            for at, generation in enumerate(self.generations):
                following = self.generations[at + 1].start if at + 1 < len(self.generations) else (self.told.epochs, 0, 0)
                if not generation.start[0] <= epoch <= following[0] or generation.start == following:
                    continue
                share = self.share(generation, epoch)
                end = following[1] if following[0] == epoch else share.steps
                assert upto == share.begins(share.first_step), "generations do not touch"
                upto = share.begins(end)
                for step in range(share.first_step, end):
                    for rank in range(generation.num_ranks):
                        first, last = self.share(generation, epoch, rank).span(step)
                        pad = scenario.batch_size - (last - first) if scenario.tail == "pad" else 0
                        entries.append((epoch, step, rank, (*samples[first:last], *[-1] * pad)))
            epochs.append(entries)
        return epochs

    def check(self, conn: psycopg.Connection, undisturbed: dict[int, str]) -> None:
        """Raise AssertionError unless everything came once, in order, bit for bit, the ledger says so, and nothing is left."""
        assert not self.left, "processes are left"
        for log in self.folder.glob("*.log"):
            waits = [float(seconds) for seconds in re.findall(r"attached again after ([\d.]+) s", log.read_text())]
            self.told.again += len(waits)
            self.told.longest_s = max([self.told.longest_s, *waits])
        rows = conn.execute(
            "SELECT epoch, planned, delivered + dropped + revoked + unreadable, missing, twice, finished FROM epoch_coverage "
            "WHERE run = %s ORDER BY epoch",
            [self.name],
        ).fetchall()
        self.told.missing, self.told.twice = sum(row[3] for row in rows), sum(row[4] for row in rows)
        got: list[list[Entry]] = [[] for _ in range(self.told.epochs)]
        for entry, hashes in self.journal():
            got[entry[0]].append(entry)
            assert hashes == [undisturbed[sample] for sample in entry[3]], f"{entry}: not what an undisturbed run gives"
        for epoch, expected in enumerate(self.expected(conn)):
            assert sorted(got[epoch]) == sorted(expected), f"epoch {epoch} is not SQL's order"
        limit = self.scenario.limit
        assert rows == [(epoch, limit, limit, 0, 0, True) for epoch in range(self.told.epochs)]
        command, environment = python("-m", "loaderd", "audit", self.name)
        if self.url is not None:
            environment["CATALOG_DATABASE_URL"] = self.url
        audit = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd="/", check=False)
        assert audit.returncode == 0, audit.stdout + audit.stderr


def shared_memory() -> list[str]:
    """Return what lies in /dev/shm, less the semaphores of Python's `multiprocessing`, which is others' (loaderd has none of it)."""
    return sorted(entry.name for entry in Path("/dev/shm").iterdir() if not entry.name.startswith("sem.mp-"))


def memory(pid: int) -> int:
    """Return the bytes that a process holds: its own and, through its descriptors, in memfds."""
    [own] = re.findall(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    held = 0
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if str(entry.readlink()).startswith("/memfd:"):
                held += entry.stat().st_blocks * 512
    return int(own) * 1024 + held


def order(conn: psycopg.Connection, scenario: Scenario, epoch: int) -> list[int]:
    """Return the order that SQL gives to anybody who asks."""
    rows = conn.execute(
        "SELECT sample_id FROM (SELECT * FROM sample WHERE structure = 'inner' ORDER BY sample_key LIMIT %s) AS s "
        "ORDER BY uuid_hash_extended(sample_key, hashint8extended(%s::bigint, %s::bigint)), sample_key",
        [scenario.limit, epoch, scenario.seed],
    )
    return [sample for (sample,) in rows]


def undisturbed() -> dict[int, str]:
    """Return sample → hash of its image and mask, as a training gives them to which nothing happens; -1 is padding."""
    found = {}
    with Feed(structures=["inner"], batch_size=4, seed=77) as feed:
        for batch in feed.epoch():
            assert batch.masks is not None
            for sample, image, mask in zip(batch.sample_ids.tolist(), batch.images, batch.masks, strict=True):
                found[sample] = hashlib.blake2b(image.tobytes() + mask.tobytes(), digest_size=16).hexdigest()
                found[-1] = hashlib.blake2b(bytes(image.nbytes + mask.nbytes), digest_size=16).hexdigest()
    return found
