"""Where files are read instead of processes of this machine: a Dask cluster, or any executor of the user's own.

One machine is enough as long as its disk is: two cores read thousands of headers a second. A cluster helps where the files lie on storage
that many machines reach under the same path, faster together than one alone. Only reading is handed out; one writer stays here.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from concurrent.futures import Executor
from typing import Any

from catalog.errors import CatalogError, UsageError
from catalog.layouts import custom

TASKS_A_THREAD = 3  # in flight: one is read, one waits there, one is on its way
# Dask's wire carries pickle: whoever speaks on it runs code. So only with certificates of both sides, or on this machine.
SAFE = re.compile(r"tls://.+|(tcp://)?(127\.\d+\.\d+\.\d+|localhost|\[::1\]):\d+|inproc://.+")


@contextlib.contextmanager
def of(dask: str | None, factory: str | None) -> Iterator[tuple[Executor, int] | None]:
    """Give an executor and how many tasks may be in flight; None: processes of this machine.

    Args:
        dask: Address of a Dask scheduler, ``tls://…`` or on this machine. Its certificates are those of Dask's own configuration.
        factory: ``module:function``; what the function returns is used as a context manager.

    Raises:
        UsageError: For both, for an address over which others could send code, and for a factory that is none.
        CatalogError: If the scheduler is out of reach.
    """
    if dask is not None and factory is not None:
        raise UsageError("--dask and --executor: choose one")
    if factory is not None:
        made = custom.load(factory)()
        if not isinstance(made, Executor):
            raise UsageError(f"--executor {factory}: gave a {type(made).__name__}, not a concurrent.futures.Executor")
        with made:
            yield made, 16
    elif dask is not None:
        if not SAFE.fullmatch(dask):
            raise UsageError(f"--dask {dask}: must be tls://… or on this machine, since Dask's messages can run code")
        with _client(dask) as client:
            executor = client.get_executor()
            try:
                yield executor, max(16, TASKS_A_THREAD * sum(client.nthreads().values()))
            finally:
                executor.shutdown(wait=False)
    else:
        yield None


def _client(address: str) -> Any:
    try:
        from distributed import Client
    except ImportError:
        raise CatalogError("--dask: Dask is not installed; `pip install 'scanfeed[dask]'`") from None
    try:
        return Client(address, timeout=10, set_as_default=False)
    except (OSError, TimeoutError, ValueError) as error:
        raise CatalogError(f"--dask {address}: out of reach ({type(error).__name__}); is the scheduler running there?") from None
