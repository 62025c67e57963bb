"""One function over many items in processes, in the items' order; an item that kills its process costs that item alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Future
from typing import TypeVar

from catalog.processes import Progress, processes

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

ITEMS_PER_TASK = 8
TASKS_AT_ONCE = 32


def mapped(
    function: Callable[[Sequence[_Item]], list[_Result]],
    items: Sequence[_Item],
    *,
    died: Callable[[_Item], _Result],
    jobs: int | None = None,
    progress: Progress = lambda done, total: None,
) -> Iterator[_Result]:
    """Yield a result an item, in the items' order.

    Args:
        function: Takes some items and returns a result for each; it is importable by name, as it runs in other processes.
        died: What stands for the result of an item whose process died of it: a decoder in C may.
        jobs: Processes; by default one a core.
        progress: Called with (items done, items).
    """
    waiting = deque(items[start : start + ITEMS_PER_TASK] for start in range(0, len(items), ITEMS_PER_TASK))
    running: deque[tuple[Sequence[_Item], Future[list[_Result]]]] = deque()
    done = 0
    while waiting or running:
        # What was running when a process died may all be lost: it is done again, an item at a time, apart.
        with processes(jobs, max(len(items) // ITEMS_PER_TASK, 1)) as pool:
            try:
                while waiting or running:
                    while waiting and len(running) < TASKS_AT_ONCE:
                        running.append((waiting[0], pool.submit(function, waiting[0])))
                        waiting.popleft()
                    results = running[0][1].result()
                    done += len(running.popleft()[0])
                    progress(done, len(items))
                    yield from results
            except BrokenExecutor:
                pass
        for task, _ in running:
            for item in task:
                yield _alone(function, item, died)
            done += len(task)
            progress(done, len(items))
        running.clear()


def _alone(function: Callable[[Sequence[_Item]], list[_Result]], item: _Item, died: Callable[[_Item], _Result]) -> _Result:
    with processes(1, 1) as pool:
        try:
            return pool.submit(function, [item]).result()[0]
        except BrokenExecutor:
            return died(item)
