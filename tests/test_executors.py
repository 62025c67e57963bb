"""Reading on a cluster and on executors of the user's own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest

from catalog import executors
from catalog.errors import UsageError
from tests.test_ingest import content

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def three(studies: Path, tmp_path: Path) -> Path:
    """Three patients to read: 48 images."""
    return Path(shutil.copytree(studies, tmp_path / "arrived"))


CLUSTER = """
import sys
from distributed import LocalCluster
if __name__ == "__main__":
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        print(cluster.scheduler_address, *[nanny.pid for nanny in cluster.workers.values()], flush=True)
        sys.stdin.read()
"""


@pytest.mark.parametrize("killed", [False, True], ids=["undisturbed", "a worker killed"])
def test_a_cluster_reads_what_one_machine_reads(
    three: Path, new_database: Callable[[], str], catalog: Run, tmp_path: Path, killed: bool
) -> None:
    """`--dask` gives the rows that an ingest on this machine gives, also if a worker is killed with files in its hands."""
    here, there = new_database(), new_database()
    assert catalog("ingest", three, "--database", here).returncode == 0
    site = tmp_path / "site"
    site.mkdir()
    # The first worker that reads waits until it is killed; the other one is slow enough to be reading then.
    (site / "sitecustomize.py").write_text(
        textwrap.dedent(f"""
        import os, time
        from catalog import reading
        reading.FILES_PER_TASK = 4
        read = reading._read_dicom
        def slow(path, entry, hashing):
            time.sleep(0.02)
            if {killed} and entry.path.endswith("/11.dcm"):
                try:
                    os.close(os.open({str(tmp_path / "dying")!r}, os.O_CREAT | os.O_EXCL))
                    os.kill(os.getpid(), {int(signal.SIGKILL)})
                except FileExistsError:
                    pass
            return read(path, entry, hashing)
        reading._read_dicom = slow
        """)
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(Path(__file__).parents[1])])}
    with subprocess.Popen(
        [sys.executable, "-c", CLUSTER],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as cluster:
        assert cluster.stdout is not None and cluster.stdin is not None
        address = cluster.stdout.readline().split()[0]
        done = catalog("ingest", three, "--json", "--database", there, "--dask", address, env=environment)
        cluster.stdin.close()
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["files_read"] == 66
    assert (tmp_path / "dying").exists() == killed
    with psycopg.connect(here, autocommit=True) as one, psycopg.connect(there, autocommit=True) as other:
        assert content(other) == content(one)


def test_an_executor_of_the_users_own(three: Path, database_url: str, catalog: Run, tmp_path: Path) -> None:
    """`--executor module:function` takes what the function returns."""
    (tmp_path / "ours.py").write_text("from concurrent.futures import ThreadPoolExecutor\ndef four():\n    return ThreadPoolExecutor(4)\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])}
    done = catalog("ingest", three, "--json", "--executor", "ours:four", env=environment)
    assert done.returncode == 0 and json.loads(done.stdout)["files_read"] == 66, done.stderr
    done = catalog("ingest", three, "--executor", "os:getcwd", env=environment)
    assert done.returncode == 2 and "not a concurrent.futures.Executor" in done.stderr


@pytest.mark.parametrize(
    "address", ["tcp://10.0.0.1:8786", "10.0.0.1:8786", "tcp://scheduler:8786", "ws://localhost:1", "tcp://127.0.0.1.evil:1"]
)
def test_a_cluster_that_others_could_speak_to_is_refused(address: str) -> None:
    """Dask's wire carries pickle: only TLS or this machine."""
    with pytest.raises(UsageError, match="tls://"), executors.of(address, None):
        pass


def test_a_scheduler_that_is_not_there(three: Path, database_url: str, catalog: Run) -> None:
    """One line, and nothing was written."""
    done = catalog("ingest", three, "--dask", "tcp://127.0.0.1:1")
    assert done.returncode == 1 and "out of reach" in done.stderr and done.stderr.count("\n") == 1, done.stderr
